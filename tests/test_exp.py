"""Our own exp and log: the largest error over the whole range, on every kind of pack."""

import platform
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FLAGS = ["-std=c++17", "-O1", "-ffp-contract=off", "-fno-math-errno", "-Wno-psabi", "-Icsrc"]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
PATHS = {"portable": ["-DFUSEDOPT_TARGET=portable"]}
if platform.machine() == "x86_64":
    twin = ["-include", "tests/isa/avx512_twin.h"]  # the intrinsics lane by lane
    PATHS["avx2"] = [*AVX2, "-DFUSEDOPT_TARGET=avx2", "-DFUSEDOPT_PACK_BYTES=32"]
    PATHS["avx512"] = [*twin, *AVX2, "-DFUSEDOPT_TARGET=avx512", "-DFUSEDOPT_PACK_BYTES=64"]


@pytest.mark.parametrize("path", PATHS)
def test_error_in_ulps(path: str, tmp_path: Path) -> None:
    """As math/exp.h states: exp within 1.1 ulp, subnormal results included, log within 2."""
    program = tmp_path / "exp_error"
    command = ["c++", *FLAGS, *PATHS[path], "tests/isa/exp_error.cpp", "-o", str(program)]
    subprocess.run(command, cwd=ROOT, check=True)
    result = subprocess.run([program], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout
    in_double, in_float, of_log = map(float, result.stdout.split())
    assert 0.5 <= in_double <= 1.1
    assert 0.5 <= in_float <= 1.1
    assert 0.5 <= of_log <= 2.0
