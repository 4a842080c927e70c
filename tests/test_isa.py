"""Every instruction set gives the same results; AVX-512's source runs here even without AVX-512."""

import ctypes
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FLAGS = ["-std=c++17", "-O1", "-ffp-contract=off", "-fno-math-errno", "-Wno-psabi", "-Icsrc"]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
TWIN = ["-include", str(ROOT / "tests/isa/avx512_twin.h")]
x86_only = pytest.mark.skipif(platform.machine() != "x86_64", reason="compares x86 paths")


def compile_object(source: str, out: Path, *flags: str) -> str:
    command = ["c++", *FLAGS, *flags, "-c", source, "-o", str(out)]
    subprocess.run(command, cwd=ROOT, check=True)
    return str(out)


def build_library(sources: dict[str, list[str]], folder: Path) -> ctypes.CDLL:
    """Sources, each with flags of its own, as a loaded library."""
    objects = [
        compile_object(name, folder / f"{Path(name).stem}.o", "-fPIC", *flags)
        for name, flags in sources.items()
    ]
    library = str(folder / "library.so")
    subprocess.run(["c++", "-shared", *objects, "-pthread", "-o", library], check=True)
    return ctypes.CDLL(library)


@x86_only
def test_avx512_source_gives_the_bits_of_avx2(tmp_path: Path) -> None:
    """The AVX-512 kernels, with their few intrinsics spelled out lane by lane, against AVX2's."""
    kernels = [
        "adamw",
        "blockwise_adam",
        "kernels",
        "muon",
        "newton_schulz",
        "sinkhorn_knopp",
        "sinkhorn_newton_sparse",
    ]
    wide = [*TWIN, "-DFUSEDOPT_TARGET=avx512", "-DFUSEDOPT_PACK_BYTES=64"]
    narrow = ["-DFUSEDOPT_TARGET=avx2", "-DFUSEDOPT_PACK_BYTES=32"]
    objects = [
        compile_object(f"csrc/cpu/{name}.cpp", tmp_path / f"{name}-{isa}.o", *AVX2, *flags)
        for isa, flags in (("avx512", wide), ("avx2", narrow))
        for name in kernels
    ]
    objects += [
        compile_object("tests/isa/compare.cpp", tmp_path / "compare.o"),
        compile_object("tests/isa/compare_transport.cpp", tmp_path / "compare_transport.o"),
        compile_object("csrc/cpu/threads.cpp", tmp_path / "threads.o"),
    ]
    subprocess.run(["c++", *objects, "-pthread", "-o", str(tmp_path / "compare")], check=True)
    result = subprocess.run([tmp_path / "compare"], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout


@x86_only
@pytest.mark.parametrize(
    "flags",
    [
        ["-DFUSEDOPT_PACK_BYTES=16"],
        [*AVX2, "-DFUSEDOPT_PACK_BYTES=32"],
        [*AVX2, *TWIN, "-DFUSEDOPT_PACK_BYTES=64"],
        [*AVX2, *TWIN, "-DFUSEDOPT_PACK_BYTES=64", "-D__AVX512BF16__"],
    ],
    ids=["portable", "avx2", "avx512", "avx512_bf16"],
)
def test_products(flags: list[str], tmp_path: Path) -> None:
    """Matrix products against sums in double; symmetric ones have symmetric bits."""
    products = compile_object("tests/isa/products.cpp", tmp_path / "products.o", *flags)
    subprocess.run(["c++", products, "-o", str(tmp_path / "products")], check=True)
    result = subprocess.run([tmp_path / "products"], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout


@x86_only
def test_portable_path_on_an_old_cpu() -> None:
    """The NumPy suite on an emulated CPU of 2008: no AVX, no FMA, and so the portable path."""
    emulator = shutil.which("qemu-x86_64") or shutil.which("qemu-x86_64-static")
    if emulator is None:
        assert not os.environ.get("FUSEDOPT_REQUIRE_EMULATOR"), "qemu-user is not installed"
        pytest.skip("no qemu-x86_64 here: apt install qemu-user")
    suite = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n0"]
    command = [emulator, "-cpu", "Nehalem", *suite, "tests/test_adamw_numpy.py"]
    env = {**os.environ, "FUSEDOPT_EXPECT_ISAS": "portable"}
    result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert " passed" in result.stdout
