"""Runs the whole suite: several pytest processes, one closing line.

    python tests/run.py [arguments for pytest]

Suites that need a process of their own (an interpreter switch, a sanitizer) get a row in SUITES.
"""

import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SUITES: list[tuple[str, list[str], dict[str, str]]] = [
    ("package and CPU kernels", ["tests", "-n2", "--dist=worksteal"], {}),
]


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


def main() -> int:
    start = time.monotonic()
    total = {"tests": 0, "failures": 0, "errors": 0, "skipped": 0}
    worst = 0
    for suite in SUITES:
        counts, status = run(*suite)
        worst = max(worst, status)
        for key, count in counts.items():
            total[key] += count
    failed = total["failures"] + total["errors"]
    passed = total["tests"] - failed - total["skipped"]
    print(f"--- all suites, {time.monotonic() - start:.0f} s")
    print(f"{passed} passed, {failed} failed, {total['skipped']} skipped")
    return worst or int(failed > 0 or passed == 0)


if __name__ == "__main__":
    sys.exit(main())
