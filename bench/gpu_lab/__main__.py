"""``python -m bench.gpu_lab``: all steps; ``... NAME``: what one step does, in its own process."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import tempfile
from pathlib import Path

from bench.gpu_lab.registry import BENCHMARKS

RESULTS = Path(__file__).resolve().parent.parent / "results" / "gpu_lab"


def _default_out(dry: bool) -> Path:
    """``$OUT``, else among the results; a dry run has none to keep."""
    if os.environ.get("OUT"):
        return Path(os.environ["OUT"])
    return Path(tempfile.mkdtemp(prefix="gpu_lab-")) if dry else RESULTS


def main() -> int:
    """Exit status: 0 if every step did well."""
    parser = argparse.ArgumentParser(prog="bench/gpu_lab.sh", description=__doc__)
    parser.add_argument(
        "job", nargs="?", choices=["all", "sanitize", "graph", *BENCHMARKS], default="all"
    )
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, the GPU's part faked")
    parser.add_argument("--out", type=Path, help="folder for JSON and log")
    parser.add_argument("--seconds", type=float, help="of one job: when to begin no new part")
    given = parser.parse_args()
    out = (given.out or _default_out(given.dry_run)).resolve()
    out.mkdir(parents=True, exist_ok=True)
    if given.job == "all":
        from bench.gpu_lab import lab

        return lab.run(out, given.dry_run)
    from bench.gpu_lab import checks, measure
    from bench.gpu_lab.device import Cuda, Fake

    device = Fake() if given.dry_run else Cuda()
    if given.job == "sanitize":
        checks.sanitize(device)
    elif given.job == "graph":
        checks.graph(device)
    else:
        benchmark = importlib.import_module(f"bench.gpu_lab.{given.job}").BENCHMARK
        measure.run(given.job, benchmark, device, out, given.seconds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
