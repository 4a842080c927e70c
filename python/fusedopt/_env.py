"""What a bug report needs: versions, the build, backends and why one is missing."""

import importlib.metadata
import os
import platform
import sys
from typing import Any

from fusedopt import _C, backends
from fusedopt._threads import get_num_threads


def env() -> dict[str, Any]:
    """Version, build, instruction set, backends, GPU defaults, threads and versions of peers."""
    return {
        "version": _C.__version__,
        "isa": _C.isa(),
        "isas": _C.available_isas(),
        "threads": get_num_threads(),
        "backends": backends.table(),
        "gpu_default": {
            "not measured": "cuda",
            **{f"{op} on {arch}": name for (op, arch), name in backends.GPU_DEFAULT.items()},
        },
        "cuda": _cuda(),
        "cpu": _cpu_name(),
        "cpus": len(os.sched_getaffinity(0)),
        "platform": platform.platform(),
        "python": sys.version.split()[0],
        "packages": {name: _version(name) for name in ("numpy", "torch", "triton")},
    }


def _cuda() -> dict[str, Any]:
    architectures, runtime, error = backends.cuda_devices()
    return {
        "built": _C.built_with_cuda,
        "why": _C.cuda_decision,
        "archs": _C.cuda_archs,
        "runtime": runtime,
        "devices": [f"sm_{architecture}" for architecture in architectures],
        "error": error,
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            names = [
                line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")
            ]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()
