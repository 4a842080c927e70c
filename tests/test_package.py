"""The package around the kernels: environment report, supports(), torch optional, the module."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import fusedopt
from fusedopt import _C, backends

MODULE = _C.__file__


def run(*command, **env):
    return subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, **env}
    )


def python(code, **env):
    return run(sys.executable, "-c", code, **env)


def test_env_command_prints_what_a_bug_report_needs():
    result = run(sys.executable, "-m", "fusedopt", "env")
    report = json.loads(result.stdout)
    assert report["version"] == fusedopt.__version__
    assert report["isa"] in report["isas"]
    assert report["backends"]["cpu"] == "available"
    assert report["cuda"]["why"] == _C.cuda_decision
    assert set(report["packages"]) == {"numpy", "torch", "triton"}


def test_supports():
    assert fusedopt.supports("adamw_step") == (True, "")
    assert fusedopt.supports("adamw_step", "reference", dtypes=[np.float32, "bfloat16"])[0]
    for arguments, why in [
        (("adam_step",), "no operation 'adam_step'"),
        (("adamw_step", "tpu"), "backend is 'tpu'"),
        (("adamw_step", "cpu", ["int8"]), "does not take int8"),
        (("adamw_step", "cpu", [], "cuda:0"), "does not run on device"),
        (("adamw_step", None, [], "cuda"), "not available"),
    ]:
        supported, reason = fusedopt.supports(*arguments)
        assert not supported
        assert why in reason


@pytest.mark.parametrize(
    ("operation", "arch", "backend"),
    [("newton_schulz", 90, "triton"), ("newton_schulz", 80, "cuda"), ("adamw_step", 90, "cuda")],
)
def test_default_on_a_gpu(operation, arch, backend, monkeypatch):
    monkeypatch.setattr(backends, "cuda_devices", lambda: ([arch], 0, ""))
    assert backends.gpu_default(operation, 0) == backend


def test_threads():
    before = fusedopt.get_num_threads()
    fusedopt.set_num_threads(3)
    assert fusedopt.get_num_threads() == 3
    for bad in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match="n is"):
            fusedopt.set_num_threads(bad)
    fusedopt.set_num_threads(None)
    assert fusedopt.get_num_threads() == before


@pytest.mark.parametrize("isa", _C.available_isas())
def test_isa_by_environment(isa):
    result = python("import fusedopt; print(fusedopt.env()['isa'])", FUSEDOPT_ISA=isa)
    assert result.stdout.strip() == isa


def test_unknown_isa_is_an_error():
    result = python("import fusedopt", FUSEDOPT_ISA="sse9")
    assert result.returncode != 0
    assert "FUSEDOPT_ISA is 'sse9'" in result.stderr


def test_without_torch():
    """The functional step works; the optimizer classes say what is missing."""
    hide = "import sys; sys.modules['torch'] = None\n"
    step = (
        "import numpy as np, fusedopt\n"
        "p = np.ones(3, np.float32)\n"
        "fusedopt.adamw_step([p], [p.copy()], [0 * p], [0 * p], step=1)\n"
        "print(p[0])"
    )
    assert float(python(hide + step).stdout) < 1
    result = python(hide + "import fusedopt; fusedopt.optim")
    assert "fusedopt.optim needs torch" in result.stderr


def test_import_does_not_load_torch():
    assert python("import sys, fusedopt; print('torch' in sys.modules)").stdout.strip() == "False"


def test_module_exports_one_symbol_and_links_only_libc():
    symbols = run("nm", "-D", "--defined-only", MODULE).stdout.split("\n")
    assert [line.split()[-1] for line in symbols if line] == ["PyInit__C"]
    needed = re.findall(r"NEEDED\s+(\S+)", run("objdump", "-p", MODULE).stdout)
    assert needed
    # The loader is part of libc's package; libm holds nothing that the kernels use.
    assert [n for n in needed if not n.startswith(("libc.so", "ld-linux"))] == []


def test_kernels_of_an_instruction_set_stay_in_its_namespace():
    """An inline function outside it would be merged, and old CPUs could be handed AVX-512."""
    build = Path(MODULE).resolve().parents[2] / "build"
    objects = sorted(build.glob("cmake-*/CMakeFiles/kernels_*.dir/csrc/cpu/*.o"))
    if not objects:
        pytest.skip("not a build from this source tree")
    for path in objects:
        isa = re.search(r"kernels_(\w+)\.dir", str(path)).group(1)
        for line in run("nm", "-C", "--defined-only", str(path)).stdout.splitlines():
            kind, name = line[17:].split(" ", 1)
            if kind.upper() in "TWVDBR" and kind.isupper():
                assert f"fusedopt::{isa}::" in name, f"{path}: {name}"


def test_fork_after_use():
    """A forked child has none of the pool's threads: it must start its own, not wait for them."""
    code = (
        "import os, numpy as np, fusedopt\n"
        "fusedopt.set_num_threads(2)\n"
        "a = [np.ones(1 << 20, np.float32) for _ in range(4)]\n"
        "step = lambda: fusedopt.adamw_step(*([x] for x in a), step=1)\n"
        "step()\n"
        "child = os.fork()\n"
        "step()\n"
        "os._exit(0) if child == 0 else print(os.waitpid(child, 0)[1])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert result.stdout.strip() == "0", result.stderr


def test_stub_lists_what_the_module_has():
    stub = (Path(fusedopt.__file__).parent / "_C.pyi").read_text(encoding="utf-8")
    names = set(re.findall(r"^(?:def |class )?(\w+)(?:\(|:)", stub, flags=re.MULTILINE))
    public = {name for name in dir(_C) if not name.startswith("__")} | {"__version__"}
    assert public == names - {"def", "class"}
    for name, body in re.findall(r"^class (\w+):\n((?: .*\n|\n)+)", stub, flags=re.MULTILINE):
        methods = set(re.findall(r"^    def (\w+)\(", body, flags=re.MULTILINE)) - {"__init__"}
        own = {method for method in dir(getattr(_C, name)) if not method.startswith("_")}
        assert own == methods, name
