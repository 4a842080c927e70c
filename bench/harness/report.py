"""From rows of samples to a record, and from records to tables, a JSON file and a plot."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.harness.machine import slug
from bench.harness.timing import Case, Row

Record = dict[str, Any]


def _row_record(case: Case, row: Row, medians: dict[str, float]) -> Record:
    """One contestant's numbers; what does not apply is ``None``."""
    ranked = not row.contestant.wrong
    floor, ours = medians.get(case.floor or ""), medians.get(case.ours)
    low, high = row.quartiles
    return {
        "name": row.contestant.name,
        "median_ms": row.median * 1e3,
        "quartiles_ms": [low * 1e3, high * 1e3],
        "rate": case.work / row.median if case.work and ranked else None,
        "of_floor": floor / row.median if floor and ranked else None,
        "times_ours": row.median / ours if ours and ranked else None,
        "samples_ms": [round(sample * 1e3, 5) for sample in row.samples],
        "busy": sum(row.busy),
        "note": row.contestant.note,
        "wrong": row.contestant.wrong,
    }


def record(case: Case, rows: list[Row]) -> Record:
    """Everything that was measured in one case, ready for JSON."""
    medians = {row.contestant.name: row.median for row in rows if not row.contestant.wrong}
    return {
        "case": case.name,
        "variant": case.variant,
        "threads": case.threads,
        "title": case.title,
        "detail": case.detail,
        "work_per_call": case.work,
        "unit": case.unit,
        "floor": case.floor,
        "ours": case.ours,
        "rows": [_row_record(case, row, medians) for row in rows],
        "not_run": case.not_run,
    }


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _spread(row: Record) -> str:
    """Half the distance of the quartiles, in percent of the median."""
    low, high = row["quartiles_ms"]
    return f"±{50 * (high - low) / row['median_ms']:.0f}%"


def print_case(console: Console, result: Record) -> None:
    """The table of one case; contestants that did not run are named below it."""
    table = Table(title=f"{result['title']}: {result['detail']}", title_justify="left")
    table.add_column("contestant", no_wrap=True)
    for heading in ("median ms", "spread", result["unit"], "of floor", "time / ours", "busy"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("note")
    for row in result["rows"]:
        table.add_row(
            row["name"],
            _number(row["median_ms"], ".3f"),
            _spread(row),
            _number(row["rate"], ".1f"),
            _number(row["of_floor"], ".2f"),
            "[red]not ranked[/]" if row["wrong"] else _number(row["times_ours"], ".2f"),
            f"{row['busy']}/{len(row['samples_ms'])}",
            f"[red]wrong answer: {row['wrong']}[/]" if row["wrong"] else row["note"],
        )
    console.print(table)
    for name, reason in result["not_run"].items():
        console.print(f"  not run: [bold]{name}[/]: {reason}", highlight=False, soft_wrap=True)
    console.print()


def _peers(results: list[Record]) -> list[str]:
    """Everyone but ours and the floor, run or not, in order of first appearance."""
    names = {row["name"]: None for result in results for row in result["rows"]}
    names |= {name: None for result in results for name in result["not_run"]}
    special = {result[key] for result in results for key in ("ours", "floor")}
    return [name for name in names if name not in special]


def _find(result: Record, name: str) -> Record | None:
    return next((row for row in result["rows"] if row["name"] == name), None)


def _cell(result: Record, name: str) -> str:
    """Time over ours; where ours is absent, the time itself."""
    row = _find(result, name)
    if row is None:
        return "–"
    if row["wrong"]:
        return "[red]wrong[/]"
    if row["times_ours"] is None:
        return f"{row['median_ms']:.3g} ms"
    return f"{row['times_ours']:.2f}×"


def _summary_row(result: Record, peers: list[str]) -> list[str]:
    ours = _find(result, result["ours"]) or {"median_ms": None, "of_floor": None}
    return [
        result["case"],
        result["variant"],
        str(result["threads"]),
        _number(ours["median_ms"], ".3f"),
        _number(ours["of_floor"], ".2f"),
        *[_cell(result, name) for name in peers],
    ]


def print_summary(console: Console, results: list[Record]) -> None:
    """All cases on one page: the time of each contestant over ours."""
    peers = _peers(results)
    table = Table(title="peer time / ours (above 1: ours is faster)", title_justify="left")
    table.add_column("case", no_wrap=True)
    table.add_column("variant")
    for heading in ("threads", "ours, ms", "of floor", *peers):
        table.add_column(heading, justify="right")
    for result in results:
        table.add_row(*_summary_row(result, peers))
    console.print(table)


def _save_json(path: Path, name: str, machine: Record, results: list[Record]) -> None:
    """Write this benchmark's part of the machine's file and leave the others' as they are."""
    known = json.loads(path.read_text()) if path.exists() else {}
    known[name] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine,
        "cases": results,
    }
    path.write_text(json.dumps(known, indent=1) + "\n")


def _points(results: list[Record], name: str) -> tuple[list[float], list[int]]:
    """Ratios of one contestant to ours, and the cases' positions they stand at."""
    found = [
        (row["times_ours"], place)
        for place, result in enumerate(results)
        for row in result["rows"]
        if row["name"] == name and row["times_ours"] is not None
    ]
    return [ratio for ratio, _ in found], [place for _, place in found]


def _save_plot(path: Path, name: str, machine: Record, results: list[Record]) -> None:
    """Plot time over ours on a logarithmic axis, one panel per variant and thread count."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    variants = list(dict.fromkeys(result["variant"] for result in results))
    threads = sorted({result["threads"] for result in results})
    peers = [peer for peer in _peers(results) if _points(results, peer)[0]]
    figure, axes = pyplot.subplots(
        len(variants),
        len(threads),
        figsize=(6 * len(threads), 1 + 2.6 * len(variants)),
        squeeze=False,
        sharex=True,
        layout="constrained",
    )
    for row, variant in enumerate(variants):
        for column, count in enumerate(threads):
            panel = [r for r in results if (r["variant"], r["threads"]) == (variant, count)]
            _draw_panel(axes[row][column], panel, peers)
            axes[row][column].set_title(f"{variant}, {count} thread{'s'[: count > 1]}")
    handles, labels = axes[0][0].get_legend_handles_labels()
    for bottom in axes[-1]:
        bottom.set_xlabel("time / ours (right of 1: ours is faster)")
        bottom.xaxis.set_major_formatter("{x:g}×")
    figure.legend(
        handles, labels, loc="outside lower center", ncols=1 + 2 * len(threads), frameon=False
    )
    figure.suptitle(f"{name}: time / ours on {machine['cpu']} ({machine['isa']})")
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _draw_panel(axes: Any, results: list[Record], peers: list[str]) -> None:
    for index, name in enumerate(peers):
        axes.plot(*_points(results, name), "o", color=f"C{index}", label=name, alpha=0.85)
    for floor in {result["floor"] for result in results} - {None}:
        axes.plot(*_points(results, floor), "|", color="black", markersize=14, label=floor)
    axes.axvline(1, color="0.5", linewidth=1)
    axes.set_xscale("log")
    axes.set_yticks(range(len(results)), [result["case"] for result in results])
    axes.set_ylim(len(results) - 0.5, -0.5)
    axes.grid(axis="x", which="both", alpha=0.3)


def save(folder: Path, name: str, machine: Record, results: list[Record]) -> list[Path]:
    """Write ``<machine>.json`` and ``<machine>-<name>.png``; return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    data, plot = folder / f"{slug(machine)}.json", folder / f"{slug(machine)}-{name}.png"
    _save_json(data, name, machine, results)
    _save_plot(plot, name, machine, results)
    return [data, plot]
