"""Builds .cu files for the CPU: unmodified sources, g++, the CUDA toolkit's own headers, the shim.

    library = load(build(["csrc/cuda/adamw.cu"]))  # a ctypes.CDLL: its extern "C" functions launch
    build(sources, sanitize="address")             # ASan and UBSan; load it under sanitizer_env()
    build(sources, sanitize="race")                # the race detector; loads anywhere

From a shell: python tests/cuda_host/build.py [--sanitize address] -o libadamw.so csrc/cuda/adamw.cu
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"
CACHE = Path(os.environ.get("CUDA_HOST_CACHE", HERE / ".cache"))
CXX = os.environ.get("CXX", "g++")
RUNTIME = sorted(HERE.glob("*.cpp"))
REDZONE = 64  # bytes behind every __shared__ variable

# Roundings as under nvcc --fmad=false: an fma is where the source says so, and is one instruction.
# Unique symbols would merge the __shared__ variables of two libraries in one process.
FLAGS = (
    "-std=c++17 -fPIC -ffp-contract=off -fno-math-errno -fno-gnu-unique -Wall -Wextra "
    f"-Wno-unknown-pragmas -DCUDA_HOST_REDZONE={REDZONE}"
).split()

# The runtime and other host sources are compiled without, so that builds share their objects; the
# runtime is told by a macro. For races, g++ only puts calls before a kernel's loads and stores:
# race.cpp answers them, not libtsan.
_ADDRESS = "-O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all"
_RACE = "-O1 -g -fsanitize=thread --param=tsan-instrument-func-entry-exit=0"
SANITIZE = {None: "-O2", "address": _ADDRESS, "race": _RACE}  # flags for .cu files
UNUSED_SECONDS = 7 * 24 * 3600  # after which a file leaves the cache


Source = str | Path | tuple[str | Path, Sequence[str]]  # with flags of its own


def build(
    sources: Iterable[Source],
    *,
    sanitize: str | None = None,
    include: Sequence[str | Path] = (CSRC,),
    flags: Sequence[str] = (),
) -> Path:
    """Compiles ``sources`` and the shim's runtime into one shared library.

    Files are kept by content: same sources, headers, flags and compiler, same file.

    Args:
        sources: ``.cu`` files, and ``.cpp`` files that call their launchers; each may come with
            flags of its own.
        sanitize: ``None``, ``"address"`` (ASan and UBSan) or ``"race"``.
        include: directories for ``#include``.
        flags: further flags for the sources.
    Returns:
        The library's path.
    Raises:
        RuntimeError: no CUDA headers here, or the compiler's message.
    """
    CACHE.mkdir(parents=True, exist_ok=True)
    _forget_unused()
    common = [*FLAGS, *(f"-isystem{path}" for path in toolkit_include())]
    told = [f"-DCUDA_HOST_SANITIZE_{sanitize.upper()}=1"] if sanitize else []
    own = [*common, f"-I{HERE}", *(f"-I{Path(path).resolve()}" for path in include), *flags]
    device = [*told, "-mfma", "-include", str(HERE / "shim.h"), *SANITIZE[sanitize].split()]
    jobs = []
    for given in sources:
        name, extra = given if isinstance(given, tuple) else (given, ())
        source = Path(name).resolve()
        jobs.append((source, [*own, *(device if source.suffix == ".cu" else ["-O1"]), *extra]))
    jobs += [(source, [*common, *told, "-O2", "-fvisibility=hidden"]) for source in RUNTIME]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(lambda job: _compile(*job), jobs))
    link = ["-shared", "-Wl,-Bsymbolic"]
    if sanitize == "address":
        link.append("-fsanitize=address,undefined")
    library = CACHE / f"lib{_digest(_recipe(), *link, *(o.name for o in objects))}.so"
    if not _used(library):
        _run([CXX, *map(str, objects), *link], library)
    return library


def load(library: Path) -> ctypes.CDLL:
    """Loads a library that ``build`` made, with the functions of device.h declared."""
    loaded = ctypes.CDLL(str(library))
    for function in (loaded.cuda_host_kernels, loaded.cuda_host_take_launches):
        function.restype = ctypes.c_char_p
    loaded.cudaGetErrorString.restype = ctypes.c_char_p
    return loaded


def sanitizer_env() -> dict[str, str]:
    """The environment in which a process may load a library built for addresses."""
    # libstdc++ too: Python doesn't link it, and ASan looks for its functions when it starts.
    names = ("libasan.so", "libstdc++.so")
    paths = [_output([CXX, f"-print-file-name={name}"]) for name in names]
    options = {"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"}
    return {**os.environ, "LD_PRELOAD": ":".join(paths), **options}


def kernels_declared(sources: Iterable[str | Path]) -> set[str]:
    """Names of the ``__global__`` functions in ``sources``."""
    pattern = r"__global__\s[^;{()]*?(?:__launch_bounds__\s*\([^{;]*?\)\s*)?(\w+)\s*\("
    return {name for source in sources for name in re.findall(pattern, Path(source).read_text())}


def kernels_instantiated(library: Path, names: Iterable[str]) -> set[str]:
    """What ``cuda_host_kernels`` names once every instance of these kernels has run."""
    function = re.compile(rf"(?:^|[\s:])(?:{'|'.join(map(re.escape, names))})(?:<.*>)?\(")
    symbols = _output(["nm", "--demangle", "--defined-only", str(library)]).splitlines()
    demangled = (line.split(" ", 2)[2] for line in symbols if line.split(" ", 2)[1] in "tTwW")
    # What is declared within a function, a lambda or a struct, has its arguments in its name.
    inner = re.compile(r"(?<!\(anonymous namespace)\)::")
    return {name for name in demangled if function.search(name) and not inner.search(name)}


def wheels() -> list[Path]:
    """The folders of PyPI's nvidia-cuda-* wheels in this environment, each like a toolkit's."""
    package = importlib.util.find_spec("nvidia")
    folders = package.submodule_search_locations if package else None
    return [root for folder in folders or [] for root in sorted(Path(folder).iterdir())]


@functools.cache
def tool(name: str) -> str:
    """A program of the toolkit (nvcc, nvdisasm): on PATH, or in PyPI's wheels."""
    found = [shutil.which(name), *(shutil.which(name, path=root / "bin") for root in wheels())]
    for path in found:
        if path:
            return path
    raise RuntimeError(f"no {name} here: install CUDA's toolkit, or PyPI's nvidia-cuda-{name}")


@functools.cache
def toolkit_include() -> list[Path]:
    """Where the CUDA headers are: with nvcc, or in PyPI's wheels in this environment."""
    if home := os.environ.get("CUDA_HOME"):
        roots = [Path(home)]
    elif nvcc := shutil.which("nvcc"):
        command = [nvcc, "--dryrun", "-x", "cu", "-c", os.devnull]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        roots = [Path(top) for top in re.findall(r"^#\$ TOP=(.*)$", said, re.MULTILINE)]
    else:
        roots = wheels()
    headers = ("include/cuda_runtime.h", "include/crt/host_defines.h", "include/cccl/nv/target")
    found = [root / Path(h).parts[0] for root in roots for h in headers if (root / h).exists()]
    if not any((path / "cuda_runtime.h").exists() for path in found):
        raise RuntimeError(
            "no CUDA headers here: install CUDA's toolkit, or PyPI's nvidia-cuda-runtime, "
            "nvidia-cuda-crt and nvidia-cuda-cccl"
        )
    unique = dict.fromkeys(path.resolve() for path in found)
    return [*unique, *(path / "cccl" for path in unique)]


def _compile(source: Path, flags: Sequence[str]) -> Path:
    """Compiles one file, unless an object of the same content is there."""
    key = _digest(_recipe(), *flags, str(source))
    manifest = CACHE / f"{key}.json"  # what the object was made from, by name
    if _used(manifest):
        made = _object(key, json.loads(manifest.read_text()))
        if made and _used(made):
            return made
    with tempfile.TemporaryDirectory(dir=CACHE) as folder:
        assembly, rule, binary = (Path(folder, name) for name in ("a.s", "a.d", "a.o"))
        command = [CXX, *flags, "-x", "c++", str(source), "-MD", "-MF", str(rule), "-S"]
        _run(command, assembly)
        if source.suffix == ".cu":
            assembly.write_text(_mark_shared(assembly.read_text()))
        _run([CXX, "-c", str(assembly)], binary)
        names = rule.read_text().split(":", 1)[1].replace("\\\n", " ")
        sources = [name.replace("\\ ", " ") for name in re.split(r"(?<!\\)\s+", names) if name]
        made = _object(key, sources)
        os.replace(binary, made)
        Path(folder, "manifest").write_text(json.dumps(sources))
        os.replace(Path(folder, "manifest"), manifest)
    return made


def _used(path: Path) -> bool:
    """Whether ``path`` is there; if so, it stays a while longer."""
    if path.exists():
        path.touch()
        return True
    return False


def _forget_unused() -> None:
    for path in CACHE.iterdir():
        if path.is_file() and time.time() - path.stat().st_mtime > UNUSED_SECONDS:
            path.unlink(missing_ok=True)


def _mark_shared(assembly: str) -> str:
    """Gives every thread-local variable a second name, by which symbols.cpp knows that it is a
    ``__shared__`` one, and room for a redzone behind it."""
    lines, thread_local, name = [], False, ""
    for line in assembly.splitlines():
        if re.match(r"\s*\.(section|text|data|bss)\b", line):
            thread_local = ".tbss" in line
        elif thread_local and (label := re.fullmatch(r"(\S+):", line)):
            name = f"__shared__.{label[1]}"
            lines.append(f"{name}:")
        lines.append(line)
        if thread_local and re.match(r"\s*\.zero\b", line):
            lines += [f"\t.size\t{name}, . - {name}", f"\t.zero\t{REDZONE}"]
    return "\n".join(lines) + "\n"


def _object(key: str, sources: Sequence[str]) -> Path | None:
    if not all(Path(source).exists() for source in sources):
        return None
    return CACHE / f"{_digest(key, *sources, *map(_content, sources))}.o"


def _content(path: str) -> str:
    status = os.stat(path)
    return _content_at(path, status.st_mtime_ns, status.st_size)


@functools.cache
def _content_at(path: str, _modified: int, _size: int) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


@functools.cache
def _recipe() -> str:
    return _output([CXX, "--version"]) + Path(__file__).read_text()


def _run(command: Sequence[str], target: Path) -> None:
    """Runs a compiler; ``target`` appears when it is complete, or not at all."""
    partial = target.with_name(f"{target.name}.{os.getpid()}")
    done = subprocess.run([*command, "-o", str(partial)], capture_output=True, text=True)
    if done.returncode:
        partial.unlink(missing_ok=True)
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
    if done.stderr:
        print(done.stderr)
    os.replace(partial, target)


def _output(command: Sequence[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sources", nargs="+", type=Path)
    parser.add_argument("-o", "--output", required=True, type=Path)
    parser.add_argument("--sanitize", choices=[name for name in SANITIZE if name])
    parser.add_argument("-I", "--include", action="append", type=Path, default=[CSRC])
    arguments = parser.parse_args()
    library = build(arguments.sources, sanitize=arguments.sanitize, include=arguments.include)
    shutil.copy(library, arguments.output)


if __name__ == "__main__":
    main()
