"""Command line: ``python -m bench NAME [options]``; without a name it lists the benchmarks."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from bench import peers
from bench.harness import session
from bench.harness.options import Options


def benchmark_names() -> list[str]:
    """Names of the files beside this one; shared code lives in folders."""
    files = Path(__file__).parent.glob("*.py")
    return sorted(file.stem for file in files if not file.stem.startswith("__"))


def _words(text: str) -> tuple[str, ...]:
    return tuple(word for word in text.split(",") if word)


def _numbers(text: str) -> tuple[int, ...]:
    numbers = tuple(int(word) for word in _words(text))
    if not numbers or min(numbers) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: give positive numbers, for example 1,2")
    return numbers


def _parser(name: str, benchmark: ModuleType) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"python -m bench {name}", description=benchmark.__doc__)
    parser.add_argument("--cases", type=_words, help=f"of {','.join(benchmark.CASES)}")
    parser.add_argument("--dtypes", type=_words, help=f"of {','.join(benchmark.VARIANTS)}")
    parser.add_argument("--threads", type=_numbers, help="thread counts (default: 1,2)")
    parser.add_argument("--rounds", type=int, help="rounds per case (default: the case's own)")
    parser.add_argument(
        "--peers",
        type=_words,
        help=f"of {','.join(peers.adapter_names())} (default: all; fusedopt always)",
    )
    parser.add_argument("--quick", action="store_true", help="fewer cases and rounds: a minute")
    parser.add_argument(
        "--out",
        type=Path,
        help="folder for JSON and PNG (default: bench/results for a full run; "
        "a narrowed run writes only where this says)",
    )
    return parser


def _check_names(
    parser: argparse.ArgumentParser, given: Sequence[str], known: Sequence[str]
) -> None:
    unknown = [name for name in given if name not in known]
    if unknown:
        parser.error(f"unknown name {', '.join(unknown)}; choose from {', '.join(known)}")


def _options(name: str, benchmark: ModuleType, arguments: Sequence[str]) -> Options:
    parser = _parser(name, benchmark)
    given = parser.parse_args(arguments)
    _check_names(parser, given.cases or (), tuple(benchmark.CASES))
    _check_names(parser, given.dtypes or (), tuple(benchmark.VARIANTS))
    _check_names(parser, given.peers or (), peers.adapter_names())
    return Options.from_arguments(given, benchmark)


def main(arguments: Sequence[str]) -> int:
    """Run the benchmark that the first argument names."""
    names = benchmark_names()
    if not arguments or arguments[0] not in names:
        print(f"usage: python -m bench NAME [options]\nbenchmarks: {', '.join(names)}")
        return 0 if arguments in ([], ["-h"], ["--help"]) else 2
    name = arguments[0]
    benchmark = importlib.import_module(f"bench.{name}")
    session.run(name, benchmark, _options(name, benchmark, arguments[1:]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
