"""Runs the whole suite: several pytest processes, one closing line.

    python tests/run.py [arguments for pytest]

Suites that need a process of their own (an interpreter switch, a sanitizer) get a row in suites().
Fails too if a kernel of csrc/cuda was not executed, plain and under the sanitizers.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from pathlib import Path

from kernel_budget import BUDGET, shortened

from cuda_host import build as shim
from cuda_host import fake_gpu

ROOT = Path(__file__).resolve().parent.parent
INTERPRETED = [
    f"tests/test_triton_{name}.py" for name in ("adamw", "blockwise_adam", "newton_schulz", "muon")
]
PARALLEL = ["-n2", "--dist=worksteal"]
SANITIZED = [
    *("layouts", "adamw_on_gpus", "blockwise_adam_on_gpus"),
    *("muon_on_gpus", "newton_schulz_on_gpus"),
]
ON_A_GPU = [
    *("adamw", "optim_adamw", "torch_optim_infos", "torch_state_exchange", "blockwise_adam"),
    *("optim_blockwise_adam", "newton_schulz", "sinkhorn_on_gpus", *SANITIZED),
]


def suites() -> list[tuple[str, list[str], dict[str, str]]]:
    """(name, pytest's arguments, environment) of each process."""
    fake_gpu.build_module("address")  # here, where the compiler runs without ASan
    sanitized = {**shim.sanitizer_env(), "FUSEDOPT_FAKE_GPU": "address", "PYTHONMALLOC": "malloc"}
    return [
        (
            "package, CPU kernels, compiled CUDA kernels",
            ["tests", *PARALLEL, *(f"--ignore={path}" for path in INTERPRETED)],
            {},
        ),
        ("Triton's interpreter", [*INTERPRETED, *PARALLEL], {"TRITON_INTERPRET": "1"}),
        (
            "CUDA kernels on a fake GPU",
            [*files(ON_A_GPU), *PARALLEL],
            {"FUSEDOPT_FAKE_GPU": "plain"},
        ),
        (
            "some of it under ASan and UBSan",
            [*files(SANITIZED), "-p", "no:cacheprovider"],
            sanitized,
        ),
    ]


def files(names: list[str]) -> list[str]:
    return [f"tests/test_{name}.py" for name in names]


def run(name: str, arguments: list[str], env: dict[str, str]) -> tuple[dict[str, int], int]:
    """One pytest process; its counts and its exit status."""
    print(f"--- {name}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", *arguments, *sys.argv[1:]]
        status = subprocess.run(
            [*command, f"--junitxml={report}"], cwd=ROOT, env={**os.environ, **env}, check=False
        ).returncode
        counts = {"tests": 0, "failures": 0, "errors": 0, "skipped": 0}
        if report.exists():
            for suite in ET.parse(report).getroot().iter("testsuite"):
                for key in counts:
                    counts[key] += int(suite.get(key, 0))
    return counts, status


def kernels_missing(log: Path) -> set[str]:
    """Prints which CUDA kernels have run, and how, and returns those that lack a sort of run."""
    lines = log.read_text().splitlines() if log.exists() else []
    runs = [line.split("\t") for line in lines]
    executed = {shortened(name) for name, *sanitizer in runs if not sanitizer}
    sanitized = {shortened(name) for name, *sanitizer in runs if sanitizer == ["address"]}
    [wanted, *_] = json.loads(BUDGET.read_text()).values()
    for what, names in (("executed", executed), ("under ASan and UBSan", sanitized)):
        print(f"--- kernels {what}: {len(wanted.keys() & names)} of {len(wanted)}")
    for name in sorted(wanted):
        ways = {"executed": name in executed, "sanitised": name in sanitized}
        print(f"{', '.join(k if done else f'NOT {k.upper()}' for k, done in ways.items())}: {name}")
    return wanted.keys() - (executed & sanitized)


def main() -> int:
    start = time.monotonic()
    total = {"tests": 0, "failures": 0, "errors": 0, "skipped": 0}
    worst = 0
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "kernels")
        for name, arguments, env in suites():
            counts, status = run(name, arguments, {**env, "CUDA_HOST_KERNEL_LOG": str(log)})
            worst = max(worst, abs(status))  # a signal's is negative
            for key, count in counts.items():
                total[key] += count
        if kernels_missing(log) and not sys.argv[1:]:  # a selection may leave some out
            worst = max(worst, 1)
    failed = total["failures"] + total["errors"]
    passed = total["tests"] - failed - total["skipped"]
    print(f"--- all suites, {time.monotonic() - start:.0f} s")
    print(f"{passed} passed, {failed} failed, {total['skipped']} skipped")
    return worst or int(failed > 0 or passed == 0)


if __name__ == "__main__":
    sys.exit(main())
