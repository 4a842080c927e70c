"""Interleaved timing: every contestant once a round, in a new order each round, in one process."""

from __future__ import annotations

import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from bench.harness.canary import Canary, OtherLoad, settle

_SHORTEST_SAMPLE = 0.005  # seconds; shorter calls are timed several at once
_SLOW_FACTOR, _SLOW_SECONDS = 4, 0.25  # against the fastest, and at least so long:
_SLOW_EVERY = 5  # what is slow by both is timed every fifth round,
_HOPELESS_SECONDS = 1.0  # and only in the first if it takes longer than this
_ENDLESS_SECONDS = 20.0  # what takes longer is not tried twice before
_NEVER_AGAIN = 1 << 30
_EXTRA_ROUNDS = 1.5  # busy rounds are repeated up to this many times the rounds asked for
_FEWEST_QUIET = 3  # with fewer quiet samples the median is that of all samples


@dataclass
class Contestant:
    """One way to do the work. ``wrong`` says why its answer is wrong: it is timed, not ranked.

    ``seconds``: it was timed when its answer was checked, and is too slow for another call.
    """

    name: str
    call: Callable[[], object]
    note: str = ""
    wrong: str = ""
    seconds: float | None = None


@dataclass
class Case:
    """One piece of work, its contestants checked and so called before.

    ``detail`` says in words what the name stands for. ``work`` is what one call does, in ``unit``
    times seconds (bytes / 1e9 for GB/s); ``ours`` and ``floor`` name contestants. ``not_run`` names
    every peer that is absent here, with the reason.
    """

    name: str
    variant: str
    threads: int
    contestants: list[Contestant]
    not_run: dict[str, str]
    rounds: int
    detail: str = ""
    work: float | None = None
    unit: str = "GB/s"
    ours: str = "fusedopt"
    floor: str | None = None

    @property
    def title(self) -> str:
        """What a person calls this case."""
        threads = "1 thread" if self.threads == 1 else f"{self.threads} threads"
        return f"{self.name} · {self.variant} · {threads}"


@dataclass
class Row:
    """The samples of one contestant in one case, in seconds per call; ``every`` 0: no more."""

    contestant: Contestant
    burst: int
    every: int
    samples: list[float] = field(default_factory=list)
    busy: list[bool] = field(default_factory=list)

    def _counted(self) -> list[float]:
        quiet = [time for time, busy in zip(self.samples, self.busy, strict=True) if not busy]
        return quiet if len(quiet) >= min(_FEWEST_QUIET, len(self.samples)) else self.samples

    @property
    def median(self) -> float:
        """Median of the quiet samples."""
        return statistics.median(self._counted())

    @property
    def quartiles(self) -> tuple[float, float]:
        """First and third quartile of the quiet samples."""
        times = self._counted()
        if len(times) < 2:
            return times[0], times[0]
        low, _, high = statistics.quantiles(times, n=4, method="inclusive")
        return low, high


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _seconds(call: Callable[[], object], burst: int) -> float:
    """Time of one call; a burst is preceded by one untimed call, since it runs warm anyway."""
    if burst > 1:
        call()
    start = time.perf_counter()
    for _ in range(burst):
        call()
    return (time.perf_counter() - start) / burst


def _every(seconds: float, fastest: float) -> int:
    """In every which round a contestant takes part."""
    if seconds < max(_SLOW_FACTOR * fastest, _SLOW_SECONDS):
        return 1
    return _SLOW_EVERY if seconds < _HOPELESS_SECONDS else _NEVER_AGAIN


def _shortest(call: Callable[[], object]) -> float:
    """Of two calls, or of one that takes very long."""
    seconds = _seconds(call, 1)
    return seconds if seconds > _ENDLESS_SECONDS else min(seconds, _seconds(call, 1))


def _rows(case: Case) -> list[Row]:
    """Choose each contestant's burst length and how often it takes part; ours always does."""
    once = [c.seconds if c.seconds is not None else _shortest(c.call) for c in case.contestants]
    rows = [
        Row(
            contestant,
            burst=min(200, math.ceil(_SHORTEST_SAMPLE / seconds)),
            every=1 if contestant.name == case.ours else _every(seconds, min(once)),
        )
        for contestant, seconds in zip(case.contestants, once, strict=True)
    ]
    for row in rows:
        if row.contestant.seconds is not None:
            row.samples, row.busy, row.every = [row.contestant.seconds], [False], 0
    return rows


def _round(rows: list[Row], canary: Canary) -> bool:
    """One sample of each row; whether the whole round was quiet."""
    load = OtherLoad()
    settle()
    slow_before = canary.slow(canary.lap())
    for row in rows:
        row.samples.append(_seconds(row.contestant.call, row.burst))
        settle()
        slow_after = canary.slow(canary.lap())
        row.busy.append(slow_before or slow_after)
        slow_before = slow_after
    if load.heavy():
        for row in rows:
            row.busy[-1] = True
    return not any(row.busy[-1] for row in rows)


def measure(case: Case, on_round: Callable[[], None] = lambda: None) -> list[Row]:
    """Time the contestants of ``case`` until enough rounds were quiet, or rounds run out."""
    if not case.contestants:
        return []
    shuffle = random.Random(0).shuffle
    canary = Canary(case.threads)
    rows = _rows(case)
    quiet = 0
    with _no_garbage_collection():
        for index in range(math.ceil(_EXTRA_ROUNDS * case.rounds)):
            taking_part = [row for row in rows if row.every and index % row.every == 0]
            shuffle(taking_part)
            quiet += _round(taking_part, canary)
            on_round()
            if quiet >= case.rounds:
                break
    canary.close()
    return rows
