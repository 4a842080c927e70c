"""Tells whether the machine was busy with something else while a sample was taken.

There are two witnesses. The canary is a fixed piece of arithmetic that touches no memory, run on as
many threads as the sample uses: it slows down when another process shares a core. The kernel's
counters tell of processes on the other cores, which take no core away but memory bandwidth.
"""

from __future__ import annotations

import hashlib
import os
import time
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

_SLOW = 1.3  # a lap this many times the best lap means a shared core
_OTHERS_SHARE = 0.1  # of one core
_TICK_ERROR = 0.03  # seconds: the kernel counts in ticks of 10 ms, per CPU


def _work() -> None:
    """About half a millisecond in registers and L1; hashlib releases the interpreter's lock."""
    hashlib.pbkdf2_hmac("sha256", b"canary", b"salt", 2000)


def settle(limit: float = 0.05) -> None:
    """Wait until this process's idle threads sleep: OpenMP's spin for a while after a region."""
    deadline = time.perf_counter() + limit
    while time.perf_counter() < deadline:
        used = time.process_time()
        time.sleep(0.001)
        if time.process_time() - used < 0.0003:
            return


class Canary:
    """Times the fixed arithmetic on ``threads`` threads and knows its best time so far."""

    def __init__(self, threads: int) -> None:
        self._helpers = ThreadPoolExecutor(threads - 1) if threads > 1 else None
        self._threads = threads
        self._best = min(self.lap() for _ in range(30))

    def lap(self) -> float:
        """Seconds that the arithmetic took, all threads together."""
        start = time.perf_counter()
        others = (
            [self._helpers.submit(_work) for _ in range(self._threads - 1)] if self._helpers else []
        )
        _work()
        wait(others)
        return time.perf_counter() - start

    def slow(self, lap: float) -> bool:
        """Whether ``lap`` says that somebody else ran on one of the cores."""
        self._best = min(self._best, lap)
        return lap > _SLOW * self._best

    def close(self) -> None:
        """End the helper threads."""
        if self._helpers:
            self._helpers.shutdown()


class OtherLoad:
    """CPU time of other processes, and time stolen by other virtual machines, since it was made."""

    def __init__(self) -> None:
        self._wall, self._others = time.perf_counter(), self._count()

    @staticmethod
    def _count() -> float:
        """Seconds of CPU time that were not this process's; 0 where /proc is missing."""
        stat = Path("/proc/stat")
        if not stat.exists():
            return 0.0
        user, nice, system, _idle, _iowait, irq, softirq, steal = map(
            int, stat.read_text().split("\n", 1)[0].split()[1:9]
        )
        ticks = user + nice + system + irq + softirq + steal
        return ticks / os.sysconf("SC_CLK_TCK") - time.process_time()

    def heavy(self) -> bool:
        """Whether others used more than a tenth of a core."""
        wall = time.perf_counter() - self._wall
        return self._count() - self._others > _OTHERS_SHARE * wall + _TICK_ERROR
