"""The machine: its description for the JSON file, and the thread count of every runtime in use."""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_ISA_FLAGS = ("avx512_bf16", "avx512f", "avx2", "asimd")
_PACKAGES = ("fusedopt", "torch", "numpy", "deepspeed", "bitsandbytes", "torchao")


def cpu_count() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def _cpu_fields() -> dict[str, str]:
    """The first processor's lines of /proc/cpuinfo; empty elsewhere."""
    lines = (line.partition(":") for line in _read("/proc/cpuinfo").split("\n\n")[0].splitlines())
    return {key.strip(): value.strip() for key, _, value in lines}


def _isa(fields: dict[str, str]) -> str:
    """The widest vector extension that tells machines of one model name apart."""
    flags = (fields.get("flags") or fields.get("Features") or "").split()
    return next((flag for flag in _ISA_FLAGS if flag in flags), platform.machine())


def _caches() -> dict[str, str]:
    """Size of each cache level of CPU 0, as the kernel prints it."""
    found = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        if _read(f"{index}/type") != "Instruction":
            found[f"L{_read(f'{index}/level')}"] = _read(f"{index}/size")
    return found


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Python's and every package's version; ``missing`` where it is not installed."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "missing"
    return found


def compiler() -> str:
    """The C++ compiler command, from ``CXX`` or the usual name."""
    return os.environ.get("CXX", "g++")


def _compiler_version() -> str:
    try:
        answer = subprocess.run(
            [compiler(), "--version"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "missing"
    return answer.stdout.splitlines()[0]


def describe() -> dict[str, Any]:
    """CPU, memory, system and versions: what a reader needs to place the numbers."""
    fields = _cpu_fields()
    return {
        "cpu": fields.get("model name") or platform.processor() or platform.machine(),
        "family_model_stepping": [
            fields.get(key, "") for key in ("cpu family", "model", "stepping")
        ],
        "isa": _isa(fields),
        "cpus": cpu_count(),
        "caches": _caches(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "huge_pages": _read("/sys/kernel/mm/transparent_hugepage/enabled"),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "compiler": _compiler_version(),
        "versions": versions(_PACKAGES),
    }


def slug(machine: dict[str, Any]) -> str:
    """A file name for this machine, such as ``amd-epyc-avx2-2cpu``."""
    text = f"{machine['cpu']}-{machine['isa']}-{machine['cpus']}cpu"
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _openmp_runtimes() -> set[str]:
    """Paths of the OpenMP libraries in this process; a JIT-built peer may bring a second one."""
    names = re.findall(r"/\S*/lib(?:gomp|omp|iomp5)[^/\s]*\.so[^/\s]*", _read("/proc/self/maps"))
    return set(names)


def set_threads(count: int) -> None:
    """Give torch, fusedopt and every loaded OpenMP runtime ``count`` threads."""
    for name in ("torch", "fusedopt"):
        if module := sys.modules.get(name):
            module.set_num_threads(count)
    for path in _openmp_runtimes():
        ctypes.CDLL(path).omp_set_num_threads(count)
