"""bench/gpu_lab.sh: its dry run, and what it does when steps fail. Speed and GPUs play no part."""

import dataclasses
import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench.gpu_lab import adamw as gpu_adamw
from bench.gpu_lab import checks, lab, measure, steps
from bench.gpu_lab.device import Fake
from bench.gpu_lab.registry import BENCHMARKS, CHECKS

ROOT = Path(__file__).resolve().parent.parent
PYTHON = sys.executable
STEPS = ["machine", "build", "tests", "triton tests", "graph", "memcheck", "racecheck"]


def python(code):
    return [PYTHON, "-c", code]


def test_dry_run_goes_through_every_step(tmp_path):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    done = subprocess.run(
        [ROOT / "bench" / "gpu_lab.sh", "--dry-run", "--out", tmp_path],
        env={**environment, "PYTHON": PYTHON}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((tmp_path / "gpu_lab.json").read_text())
    assert {s["name"]: s["status"] for s in record["steps"]} == dict.fromkeys(
        [*STEPS[:5], *BENCHMARKS, *STEPS[5:]], "ok"
    )
    assert record["versions"]["torch"] != "missing" and record["gpu"]["before"]["name"] == "dry run"
    assert len(record["measured"]["adamw"]["cases"]) == 18
    for name, step in [("adamw", "adamw_step"), ("blockwise_adam", "blockwise_adam_step")]:
        measured = record["measured"][name]
        assert not measured["left_out"]
        for case in measured["cases"]:
            rows = {row["name"]: row for row in case["rows"]}
            assert {"copy", "fusedopt", f"fusedopt.{step}"} <= rows.keys()
            assert all(row["median_ms"] > 0 and row["wall_ms"] > 0 for row in rows.values())
            assert not rows["fusedopt"]["wrong"] and not rows[f"fusedopt.{step}"]["wrong"]
        assert all(goal["value"] is not None for goal in measured["goals"])
    log = (tmp_path / "gpu_lab.log").read_text()
    assert all(f"graph {name} cpu" in log and f"\n{name} cpu" in log for name in CHECKS)
    assert "every step did well" in done.stdout


def test_a_failed_step_is_named_and_the_others_run(tmp_path):
    outcomes = steps.run_all(
        [
            steps.Step("good", python("print('fine')"), 20),
            steps.Step("bad", python("print('why it broke'); raise SystemExit(3)"), 20),
            steps.Step("missing", ["no-such-program"], 20),
            steps.Step("after", lambda limit: python(f"print('limit', {limit:.0f})"), 20),
        ],
        tmp_path / "log",
        say=lambda line: None,
    )
    assert [o.status for o in outcomes] == ["ok", "failed", "failed", "ok"]
    assert "why it broke" in outcomes[1].tail and "no-such-program" in outcomes[2].tail
    assert outcomes[3].limit > 70  # with the time that the others left over
    log = (tmp_path / "log").read_text()
    assert "fine" in log and "limit" in log
    record = {"gpu": {"before": {}}, "measured": {"adamw": None}, "dry_run": False}
    text = lab.summary(record, outcomes)
    assert "FAILED: bad, missing" in text and "adamw: nothing was measured" in text


def test_a_step_out_of_time_is_ended_with_its_children(tmp_path):
    marker = tmp_path / "survivor"
    child = f"import time, pathlib; time.sleep(3); pathlib.Path({str(marker)!r}).touch()"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    start = time.monotonic()
    step = steps.Step("slow", python(code), 1)
    (outcome,) = steps.run_all([step], tmp_path / "log", say=lambda line: None)
    assert outcome.status == "timed out" and time.monotonic() - start < 3
    time.sleep(3)
    assert not marker.exists()


def test_real_commands(tmp_path):
    """What can't run here is at least what was meant."""
    plan = {step.name: step for step in lab.plan(tmp_path, False, {"compute_cap": "9.0"})}
    assert sum(step.seconds for step in plan.values()) <= 8 * 60
    assert plan["build"].env["CMAKE_ARGS"].endswith("-DFUSEDOPT_CUDA_ARCHS=90")
    assert {"--no-build-isolation", "--no-index"} <= set(plan["build"].command)
    for name in ("tests", "triton tests"):
        command = " ".join(plan[name].command)
        assert " -m pytest -q " in command and " -m gpu" in command
        assert "--continue-on-collection-errors" in command
    assert "tests/test_triton_blockwise_adam.py" in " ".join(plan["triton tests"].command)
    assert "--ignore-glob=tests/test_triton_*.py" in plan["tests"].command
    for tool in ("memcheck", "racecheck"):
        assert plan[tool].command[1:3] == ["--tool", tool]
        assert "--error-exitcode" in plan[tool].command
    for name in BENCHMARKS:
        assert plan[name].command(100.0)[-5:] == [name, "--seconds", "70", "--out", str(tmp_path)]


def test_every_row_of_the_registry_is_there():
    for name in BENCHMARKS:
        benchmark = importlib.import_module(f"bench.gpu_lab.{name}").BENCHMARK
        assert benchmark.cases and all(len(case) == 2 for case in benchmark.cases)
    assert set(CHECKS) == checks.ALGORITHMS.keys()


def test_what_an_earlier_run_measured_is_not_this_ones(tmp_path, monkeypatch):
    (tmp_path / "adamw.json").write_text("{}")
    monkeypatch.setattr(lab, "plan", lambda *_: [steps.Step("it", python("pass"), 20)])
    lab.run(tmp_path, True)
    record = json.loads((tmp_path / "gpu_lab.json").read_text())
    assert record["measured"]["adamw"] is None


def test_without_a_gpu_it_says_so(tmp_path):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is one")
    step = next(s for s in lab.plan(tmp_path, False, lab.gpu(False)) if s.name == "machine")
    (outcome,) = steps.run_all([step], tmp_path / "log", say=lambda line: None)
    assert outcome.status == "failed" and "torch finds no GPU" in outcome.tail


def test_a_failed_step_shows_in_the_exit_status(tmp_path, monkeypatch):
    for code, status in [("pass", 0), ("raise SystemExit(3)", 1)]:
        monkeypatch.setattr(lab, "plan", lambda *_, code=code: [steps.Step("it", python(code), 20)])
        assert lab.run(tmp_path, True) == status
        record = json.loads((tmp_path / "gpu_lab.json").read_text())
        assert [step["status"] for step in record["steps"]] == [["ok", "failed"][status]]


# ---- what the jobs look for is found


@pytest.fixture(params=CHECKS)
def change_step(request, monkeypatch):
    """change_step(f): f(step, lists, options) takes the place of an algorithm's step."""
    import fusedopt

    name = f"{request.param}_step"
    real = getattr(fusedopt, name)
    return lambda f: monkeypatch.setattr(
        fusedopt, name, lambda *lists, **options: f(real, lists, options)
    )


def off_by_a_bit(step, lists, options):
    """Wrong in one element, where a backend is asked for."""
    step(*lists, **options)
    if "backend" in options:
        lists[0][0].detach().view(-1)[-1:] += 0.5


def without_found_inf(step, lists, options):
    step(*lists, **{**options, "found_inf": None})


def test_the_sanitized_run_compares_with_the_cpu(change_step):
    checks.sanitize(Fake())
    change_step(off_by_a_bit)
    with pytest.raises(SystemExit, match="array 0 of role 0 differs"):
        checks.sanitize(Fake())


def test_graphs_are_compared_with_eager_steps(monkeypatch):
    checks.graph(Fake())
    monkeypatch.setattr(Fake, "capture", lambda self, call: lambda: None)
    with pytest.raises(SystemExit, match="differs"):
        checks.graph(Fake())


def test_graphs_have_to_leave_a_step_out(change_step):
    change_step(without_found_inf)
    with pytest.raises(SystemExit, match="found_inf: array 0 of role 0 differs"):
        checks.graph(Fake())


@pytest.fixture
def smallest(monkeypatch):
    """One case of AdamW's benchmark, run on the CPU."""
    benchmark = dataclasses.replace(gpu_adamw.BENCHMARK, cases=[("500x64", "fp32")])
    return lambda out: measure.run("adamw", benchmark, Fake(), out, None)


@pytest.mark.parametrize("change_step", ["adamw"], indirect=True)
def test_the_benchmark_fails_where_ours_is_wrong_or_does_not_run(tmp_path, smallest, change_step):
    def fails(*_):
        raise RuntimeError("no kernel image")

    smallest(tmp_path)
    change_step(off_by_a_bit)
    with pytest.raises(SystemExit, match=r"500x64.*, fusedopt.adamw_step: wrong answers: "):
        smallest(tmp_path)
    change_step(fails)
    with pytest.raises(SystemExit, match=r"500x64.*, fusedopt.adamw_step: not run: no kernel"):
        smallest(tmp_path)


@pytest.mark.parametrize("change_step", ["blockwise_adam"], indirect=True)
def test_blockwise_adams_answers_are_looked_at(tmp_path, change_step):
    module = importlib.import_module("bench.gpu_lab.blockwise_adam")
    benchmark = dataclasses.replace(module.BENCHMARK, cases=[("gpt2", "fp32")])
    change_step(off_by_a_bit)
    with pytest.raises(SystemExit, match=r"gpt2.*, fusedopt.blockwise_adam_step: wrong answers: "):
        measure.run("blockwise_adam", benchmark, Fake(), tmp_path, None)
