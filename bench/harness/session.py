"""Runs one benchmark from its cases to its table, JSON file and plot."""

from __future__ import annotations

from functools import partial
from types import ModuleType
from typing import Any

from rich.console import Console
from rich.progress import Progress

from bench.harness import machine, report
from bench.harness.options import Options
from bench.harness.timing import measure

_FILE_WIDTH = 160  # columns, where the output is no terminal


def run(name: str, benchmark: ModuleType, options: Options) -> None:
    """Measure every case of ``benchmark``, printing each as it is done."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=_FILE_WIDTH)
    results: list[dict[str, Any]] = []
    with Progress(console=console, transient=True) as progress:
        for case in benchmark.cases(options):
            task = progress.add_task(case.title, total=case.rounds)
            rows = measure(case, on_round=partial(progress.advance, task))
            progress.remove_task(task)
            results.append(report.record(case, rows))
            report.print_case(console, results[-1])
    report.print_summary(console, results)
    if options.out:
        for path in report.save(options.out, name, machine.describe(), results):
            console.print(f"wrote {path}")
