"""The examples of optimal transport, at their smallest."""

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
WITHOUT = """
import runpy, sys
sys.modules["sklearn"] = sys.modules["sklearn.datasets"] = None
sys.path.insert(0, sys.argv[1])
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
RUNS = {
    "color_transfer.py": (["--pixels", "60"], "colors.png"),
    "digit_matching.py": (["--known", "12", "--asked", "6"], "digits.png"),
}


def run(*command):
    return subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("name", RUNS)
def test_pictures(name, tmp_path):
    pytest.importorskip("sklearn", reason="make test installs it")
    options, picture = RUNS[name]
    result = run(EXAMPLES / name, "--out", tmp_path, *options)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
    assert float(result.stdout.split("marginal error")[1].replace("at most", "").split()[0]) <= 1e-8


@pytest.mark.parametrize("name", [*RUNS, "train_gpt.py"])
def test_without_scikit_learn(name, tmp_path):
    result = run("-c", WITHOUT, EXAMPLES, EXAMPLES / name, "--out", tmp_path)
    assert result.returncode == 1
    assert "this needs sklearn" in result.stderr and "Traceback" not in result.stderr


ROW = """
import sys
sys.path.insert(0, sys.argv[1])
import digits, report
from rich.console import Console
digits.PAIRS = 5
timings = digits.time_pairs()
assert timings[0].label == "fusedopt" and timings[0].error <= 1e-8
assert all(timing.error <= 1e-7 for timing in timings[1:])
report.print_transport(timings, Console(width=80))
"""


def test_the_demos_table_of_transport():
    pytest.importorskip("sklearn", reason="make test installs it")
    result = run("-c", ROW, EXAMPLES)
    assert result.returncode == 0, result.stderr
    assert "Optimal transport between" in result.stdout
    assert all(len(line) <= 80 for line in result.stdout.splitlines())
