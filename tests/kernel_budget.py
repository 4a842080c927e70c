"""What nvcc makes of every kernel in csrc/cuda: registers, spills and 128-bit accesses.

    python tests/kernel_budget.py --write    accepts what is measured now as the budget

The budget is tests/data/kernel_budget.json; test_kernel_budget.py holds kernels to it, for each
architecture. No GPU is needed: the compiler is the machine's nvcc, or that of PyPI's wheels.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from cuda_host import build as shim

BUDGET = Path(__file__).parent / "data/kernel_budget.json"
ARCHS = [80, 86, 89, 90, 100, 120]
SOURCES = sorted(path for path in shim.CSRC.glob("cuda/**/*.cu"))
FLAGS = ["-std=c++17", "-O3", "--fmad=false", f"-I{shim.CSRC}"]

Kernels = dict[str, dict[str, int]]


def measure(sources: list[Path] = SOURCES) -> dict[str, Kernels]:
    """{"sm_90": {kernel: what it takes}} of every kernel in ``sources``."""
    jobs = [(source, arch) for arch in ARCHS for source in sources]
    result: dict[str, Kernels] = {f"sm_{arch}": {} for arch in ARCHS}
    with ThreadPoolExecutor(2) as pool:
        for (_, arch), kernels in zip(
            jobs, pool.map(lambda job: _compile(*job), jobs), strict=True
        ):
            result[f"sm_{arch}"].update(kernels)
    return result


def ptx(source: Path) -> str:
    """The PTX that later architectures than the last will run."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernels.ptx")
        _run("nvcc", *FLAGS, "-ptx", f"-arch=compute_{ARCHS[-1]}", str(source), "-o", str(path))
        return path.read_text()


def _compile(source: Path, arch: int) -> Kernels:
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernels.cubin")
        target = ["-cubin", f"-arch=sm_{arch}", "-Xptxas", "-v", str(source), "-o", str(cubin)]
        said = _run("nvcc", *FLAGS, *target)
        if "warning" in said:
            raise RuntimeError(said)
        sass = _run("nvdisasm", "-c", str(cubin)) if "entry function" in said else ""
    return {
        name: {**resources, **_accesses(sass, mangled)}
        for mangled, name, resources in _resources(said)
    }


def _resources(said: str) -> list[tuple[str, str, dict[str, int]]]:
    """(mangled name, name, registers and spills) from what ptxas says."""
    kernels = re.findall(
        r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads.*?Used (\d+) registers",
        said,
        re.DOTALL,
    )
    return [
        (mangled, readable(mangled), {"registers": int(used), "spills": sum(map(int, spills))})
        for mangled, *spills, used in kernels
    ]


def _accesses(sass: str, mangled: str) -> dict[str, int]:
    """128-bit accesses to global memory, and whether there are any to local memory."""
    begin = re.search(rf"^\.text\.{mangled}:", sass, re.MULTILINE)
    assert begin, f"no machine code for {mangled}"
    end = sass.find("\n.text.", begin.end())
    code = sass[begin.end() : end if end >= 0 else len(sass)]
    return {
        "loads_128": len(re.findall(r"\bLDG\.[\w.]*128", code)),
        "stores_128": len(re.findall(r"\bSTG\.[\w.]*128", code)),
        "local": len(re.findall(r"\b(?:LDL|STL)\b", code)),
    }


def readable(mangled: str) -> str:
    """elementwise_kernel<AdamW, Format<...>>, from a mangled name."""
    done = subprocess.run(["c++filt", mangled], capture_output=True, text=True, check=True)
    return shortened(done.stdout)


def shortened(name: str) -> str:
    """Without namespaces, result and parameters."""
    name = re.sub(r"fusedopt::(?:cuda::)?|\(anonymous namespace\)::", "", name.strip())
    return name.removeprefix("void ").split("(")[0]


def _run(name: str, *arguments: str) -> str:
    done = subprocess.run([shim.tool(name), *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{name} {' '.join(arguments)}\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="make this the budget")
    arguments = parser.parse_args()
    text = json.dumps(measure(), indent=1, sort_keys=True) + "\n"
    if arguments.write:
        BUDGET.parent.mkdir(exist_ok=True)
        BUDGET.write_text(text)
    else:
        print(text)


if __name__ == "__main__":
    main()
