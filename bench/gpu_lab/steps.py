"""Runs commands one after the other, each with a time limit of its own, whatever the others did."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

_TAIL = 4000  # characters of a failed step's output that the record keeps


@dataclass(frozen=True)
class Step:
    """A command and the seconds it may take; time that earlier steps left over is added.

    ``command`` may be a function of the limit, in seconds.
    """

    name: str
    command: Sequence[str] | Callable[[float], Sequence[str]]
    seconds: float
    env: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """How a step ended: ``ok``, ``failed`` or ``timed out``."""

    name: str
    status: str
    seconds: float
    limit: float
    tail: str = ""


def run_all(steps: Sequence[Step], log: Path, say: Callable[[str], None] = print) -> list[Outcome]:
    """Run every step; all output goes to ``log``."""
    log.write_text("")
    start, planned, outcomes = time.monotonic(), 0.0, []
    for step in steps:
        planned += step.seconds
        limit = max(step.seconds, planned - (time.monotonic() - start))
        say(f"--- {step.name} (at most {limit:.0f} s)")
        outcomes.append(_run(step, limit, log))
        say(f"    {outcomes[-1].status}, {outcomes[-1].seconds:.0f} s")
        if outcomes[-1].status != "ok":
            say("    " + "\n    ".join(outcomes[-1].tail.splitlines()[-15:]))
    return outcomes


def _run(step: Step, limit: float, log: Path) -> Outcome:
    command = step.command(limit) if callable(step.command) else step.command
    start = time.monotonic()
    with log.open("a+", encoding="utf-8", errors="replace") as output:
        output.write(f"\n--- {step.name}: {' '.join(command)}\n")
        output.flush()
        begin = output.tell()
        status = _wait(command, {**os.environ, **step.env}, limit, output.fileno())
        output.seek(begin)
        text = output.read()
    seconds = time.monotonic() - start
    return Outcome(step.name, status, seconds, limit, "" if status == "ok" else text[-_TAIL:])


def _wait(command: Sequence[str], env: dict[str, str], limit: float, output: int) -> str:
    try:
        process = subprocess.Popen(
            command, env=env, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
            start_new_session=True,
        )  # fmt: skip
    except OSError as error:
        os.write(output, f"{error}\n".encode())
        return "failed"
    try:
        return "ok" if process.wait(limit) == 0 else "failed"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # the compiler's or the test runner's children too
        process.wait()
        return "timed out"


def as_records(outcomes: Sequence[Outcome]) -> list[dict[str, object]]:
    """For JSON."""
    return [asdict(outcome) for outcome in outcomes]
