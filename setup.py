"""Builds fusedopt._C with CMake and ninja, without torch; the rest stands in pyproject.toml.

FUSEDOPT_CUDA=1|0|auto   build the CUDA kernels, don't, or do if nvcc is found (the default)
CMAKE_ARGS, MAX_JOBS     handed on
"""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def cuda_decision() -> tuple[bool, str]:
    """Whether to build the CUDA kernels, and why, in words that end up in the module."""
    asked = os.environ.get("FUSEDOPT_CUDA", "auto")
    nvcc = os.environ.get("CUDACXX") or shutil.which("nvcc")
    if asked == "0":
        return False, "off: FUSEDOPT_CUDA=0"
    if asked == "1":
        if nvcc is None:
            raise SystemExit("FUSEDOPT_CUDA=1, but there is no nvcc on PATH and CUDACXX is not set")
        return True, "on: FUSEDOPT_CUDA=1"
    if asked != "auto":
        raise SystemExit(f"FUSEDOPT_CUDA is {asked!r}, expected 1, 0 or auto")
    return (True, "on: nvcc found") if nvcc else (False, "off: no nvcc found")


class CMakeBuild(build_ext):
    """One extension, one CMake project."""

    def build_extension(self, ext: Extension) -> None:
        out = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        # An editable install rebuilds what changed; its own temporary folder would start over.
        kept = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        build = kept if self.editable_mode else Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        cuda, why = cuda_decision()
        print(f"fusedopt: CUDA kernels {why}", flush=True)
        configure = [
            "cmake", "-S", str(ROOT), "-B", str(build), "-GNinja",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={out}",
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            f"-DFUSEDOPT_VERSION={self.distribution.get_version()}",
            f"-DFUSEDOPT_CUDA={'ON' if cuda else 'OFF'}",
            f"-DFUSEDOPT_CUDA_DECISION={why}",
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]  # fmt: skip
        subprocess.run(configure, check=True)
        jobs = os.environ.get("MAX_JOBS", str(os.cpu_count() or 1))
        subprocess.run(["cmake", "--build", str(build), "-j", jobs], check=True)


setup(ext_modules=[Extension("fusedopt._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
