"""The steps of the lab, its record and its summary. Standard library only."""

from __future__ import annotations

import datetime
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from bench.gpu_lab.registry import BENCHMARKS
from bench.gpu_lab.steps import Outcome, Step, as_records, run_all
from bench.harness.machine import versions

_ROOT = Path(__file__).resolve().parents[2]
# cmake and ninja may be Python packages; CUDA's programs need not be on the PATH.
_PLACES = [str(Path(sys.executable).parent), os.environ.get("PATH", ""), "/usr/local/cuda/bin"]
_PATH = os.pathsep.join(_PLACES)
_FIELDS = (
    "name", "driver_version", "compute_cap", "memory.total", "power.limit", "pstate",
    "clocks.sm", "clocks.max.sm", "clocks.mem", "clocks.max.mem", "temperature.gpu",
)  # fmt: skip
_FAKE_GPU = "dry run, 0.0, 9.0, 0 MiB, 0 W, P0, 0 MHz, 0 MHz, 0 MHz, 0 MHz, 0"
_TRITON = "tests/test_triton_*.py"  # each of their kernels is compiled first
_PACKAGES = (
    "torch", "triton", "numpy", "pybind11", "cmake", "ninja", "setuptools", "pytest", "apex",
    "transformer-engine", "flashoptim", "torch-optimi",
)  # fmt: skip


def run(out: Path, dry: bool) -> int:
    """Run everything; the exit status tells whether a step failed."""
    before = gpu(dry)
    for name in BENCHMARKS:  # what an earlier run left here is not this one's
        (out / f"{name}.json").unlink(missing_ok=True)
    outcomes = run_all(plan(out, dry, before), out / "gpu_lab.log")
    record = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "dry_run": dry,
        "gpu": {"before": before, "after": gpu(dry)},
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpus": os.cpu_count(),
        "nvcc": _nvcc(),
        "versions": versions(_PACKAGES),
        "steps": as_records(outcomes),
        "measured": {name: _read(out / f"{name}.json") for name in BENCHMARKS},
    }
    (out / "gpu_lab.json").write_text(json.dumps(record, indent=1) + "\n")
    print(summary(record, outcomes))
    print(f"wrote {out / 'gpu_lab.json'} and {out / 'gpu_lab.log'}")
    return int(any(outcome.status != "ok" for outcome in outcomes))


def plan(out: Path, dry: bool, device: dict[str, str]) -> list[Step]:
    """The steps; their seconds add up to 8 minutes."""
    path = {"PATH": _PATH}
    job = [sys.executable, "-m", "bench.gpu_lab"]
    rest = ["--out", str(out), *(["--dry-run"] if dry else [])]
    # Without torch's own memory cache an access beyond an array is one beyond an allocation.
    no_cache = {**path, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}

    def bench(name: str, limit: float) -> list[str]:
        return [*job, name, "--seconds", f"{0.7 * limit:.0f}", *rest]

    return [
        Step("machine", _machine_command(dry), 10, path),
        Step("build", _build_command(dry), 110, {**path, **_build_env(device)}),
        Step("tests", _test_command(dry, ["tests", f"--ignore-glob={_TRITON}"]), 70, path),
        Step("triton tests", _test_command(dry, sorted(map(str, _ROOT.glob(_TRITON)))), 45, path),
        Step("graph", [*job, "graph", *rest], 20, path),
        *(Step(name, partial(bench, name), s, path) for name, s in BENCHMARKS.items()),
        Step("memcheck", [*_sanitizer("memcheck", dry), *job, "sanitize", *rest], 35, no_cache),
        Step("racecheck", [*_sanitizer("racecheck", dry), *job, "sanitize", *rest], 35, no_cache),
    ]


def _machine_command(dry: bool) -> list[str]:
    need = "" if dry else "assert torch.cuda.is_available(), 'torch finds no GPU'; "
    modules = "torch, numpy, pybind11, pytest, rich"
    return [sys.executable, "-c", f"import {modules}; {need}print(torch.__config__.show())"]


def _build_command(dry: bool) -> list[str]:
    install = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps"]
    install += ["--no-index", "--editable", str(_ROOT)]
    if not dry:
        return install
    # What the build would begin with, without touching the package that the caller is using.
    return [
        "sh",
        "-c",
        f"set -e; cmake --version; ninja --version; {sys.executable} -m pip --version",
    ]


def _build_env(device: dict[str, str]) -> dict[str, str]:
    """Machine code for this GPU alone: the rest would take minutes."""
    arch = device.get("compute_cap", "").replace(".", "")
    archs = f"-DFUSEDOPT_CUDA_ARCHS={arch}" if arch.isdigit() else ""
    given = os.environ.get("CMAKE_ARGS", "")
    return {
        "FUSEDOPT_CUDA": "1",
        "CMAKE_ARGS": f"{given} {archs}".strip(),
        "PIP_BREAK_SYSTEM_PACKAGES": "1",  # a container's own Python, where there is no other
    }


def _test_command(dry: bool, tests: list[str]) -> list[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
    if importlib.util.find_spec("expecttest") is None:  # torch's own test inputs import it
        command.append("--ignore=tests/test_torch_optim_infos.py")
    if dry:  # the marked tests are left out where there is no GPU: collect all
        return [*command, "--collect-only"]
    workers = max(2, 3 * (os.cpu_count() or 2) // 4)
    parallel = ["-n", str(workers)] if importlib.util.find_spec("xdist") else []
    return [*command, "--continue-on-collection-errors", "-m", "gpu", *parallel]


def _sanitizer(tool: str, dry: bool) -> list[str]:
    if dry:
        return []
    return [
        shutil.which("compute-sanitizer", path=_PATH) or "compute-sanitizer",
        "--tool",
        tool,
        "--error-exitcode",
        "9",
        "--target-processes",
        "all",
    ]


def gpu(dry: bool) -> dict[str, str]:
    """What nvidia-smi says of the first GPU; empty, with the reason, if it says nothing."""
    query = ["nvidia-smi", f"--query-gpu={','.join(_FIELDS)}", "--format=csv,noheader", "--id=0"]
    try:
        answer = _FAKE_GPU if dry else subprocess.check_output(query, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError) as error:
        return {"error": str(error)}
    return dict(zip(_FIELDS, (part.strip() for part in answer.strip().split(",")), strict=False))


def _nvcc() -> str:
    try:
        nvcc = shutil.which("nvcc", path=_PATH) or "nvcc"
        answer = subprocess.check_output([nvcc, "--version"], text=True, timeout=10)
    except (OSError, subprocess.SubprocessError) as error:
        return f"missing: {error}"
    return answer.strip().splitlines()[-1]


def _read(path: Path) -> Any:
    return json.loads(path.read_text()) if path.exists() else None


def summary(record: dict[str, Any], outcomes: Sequence[Outcome]) -> str:
    """Steps, then measurements against goals."""
    lines = ["", f"GPU: {record['gpu']['before']}"]
    lines += [f"{o.name:12}{o.status:12}{o.seconds:5.0f} s" for o in outcomes]
    if record["dry_run"]:
        lines.append("a dry run: what it measured means nothing")
    for name, measured in record["measured"].items():
        if measured is None:
            lines.append(f"{name}: nothing was measured")
        elif not record["dry_run"]:
            lines += [f"{name}:", *_verdicts(measured)]
    failed = [o.name for o in outcomes if o.status != "ok"]
    lines.append(f"FAILED: {', '.join(failed)}" if failed else "every step did well")
    return "\n".join(lines)


def _verdicts(measured: dict[str, Any]) -> list[str]:
    rate = measured["copy_gb_per_s"]
    lines = [f"copy: {rate:.0f} GB/s"] if rate else []
    for goal in measured["goals"]:
        value = "not measured" if goal["value"] is None else f"{goal['value']:.2f}"
        verdict = {True: "reached", False: "missed", None: ""}[goal["reached"]]
        lines.append(f"{goal['what']:60}{value:>14}  of {goal['wanted']:.2f}  {verdict}")
    lines += [f"not measured for want of time: {name}" for name in measured["left_out"]]
    return lines
