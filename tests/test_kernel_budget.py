"""Every kernel's machine code for every architecture against its budget (kernel_budget.py)."""

import json
import re
import subprocess
from pathlib import Path

import kernel_budget
import pytest

from cuda_host import build as shim
from fusedopt import _C

BUDGET = json.loads(kernel_budget.BUDGET.read_text())
REGISTERS_OF_FP32 = 64
VECTOR = "elementwise_kernel<AdamW,"
BYTES = {"Float32": 4, "Float64": 8, "BFloat16": 2, "Float16": 2}


@pytest.fixture(scope="module")
def measured():
    return kernel_budget.measure()


def problems(measured, budget):
    """What is over or missing, in words."""
    found = []
    for arch in sorted(measured.keys() | budget.keys()):
        here, allowed = measured.get(arch, {}), budget.get(arch, {})
        found += [f"{arch}: {name} is gone" for name in allowed.keys() - here.keys()]
        found += [f"{arch}: {name} has no budget" for name in here.keys() - allowed.keys()]
        for name in sorted(here.keys() & allowed.keys()):
            now, limit = here[name], allowed[name]
            if now["registers"] > limit["registers"]:
                found.append(f"{arch}: {name}: {now['registers']} registers > {limit['registers']}")
            if now["spills"] or now["local"]:
                found.append(f"{arch}: {name}: spills, or another use of local memory")
            for access in ("loads_128", "stores_128"):
                if now[access] < limit[access]:
                    found.append(f"{arch}: {name}: {now[access]} {access} < {limit[access]}")
    return found


def test_kernels_keep_to_the_budget(measured):
    found = problems(measured, BUDGET)
    assert not found, "\n".join([*found, "If meant: python tests/kernel_budget.py --write"])


def test_every_kernel_of_the_sources_is_there(measured):
    names = shim.kernels_declared([*kernel_budget.SOURCES, *shim.CSRC.glob("cuda/**/*.cuh")])
    for arch, kernels in measured.items():
        assert {name.split("<")[0] for name in kernels} == names, arch


def test_adamw_in_fp32_takes_64_registers(measured):
    for arch, kernels in measured.items():
        vector = {name: k for name, k in kernels.items() if name.startswith(VECTOR)}
        [fp32] = [k for name, k in vector.items() if set(codecs(name)) == {"Float32"}]
        assert fp32["registers"] <= REGISTERS_OF_FP32, arch


def test_accesses_have_16_bytes(measured):
    """In every vector body: as many 16-byte loads and stores as the elements in flight make up."""
    for arch, kernels in measured.items():
        for name, kernel in kernels.items():
            roles = [BYTES[codec] for codec in codecs(name)]
            if not name.startswith(VECTOR):
                continue
            elements = 4 if roles[0] == 8 else 8
            loads = [elements * size // 16 for size in roles]
            stores = [loads[0], *loads[2:]]
            # all roles aligned, with and without maxima; only some aligned
            assert kernel["loads_128"] >= 3 * sum(loads) - loads[-1], (arch, name)
            assert kernel["stores_128"] >= 3 * sum(stores) - stores[-1], (arch, name)


def test_blockwise_adam_in_one_pass(measured):
    """1024 threads on a multiprocessor; gradient, parameter and moment by 16 bytes, in and out."""
    for arch, kernels in measured.items():
        kernel = kernels["block_one_pass_kernel<float, 4>"]
        assert kernel["registers"] <= REGISTERS_OF_FP32, arch
        assert kernel["loads_128"] >= 3, arch
        assert kernel["stores_128"] >= 2, arch


@pytest.mark.parametrize("source", kernel_budget.SOURCES, ids=lambda path: path.stem)
def test_ptx_for_later_architectures(source):
    declared = bool(shim.kernels_declared([source])) or re.search(
        "elementwise|launcher", source.read_text()
    )
    text = kernel_budget.ptx(source)
    assert ".target sm_120" in text
    assert (".entry" in text) == bool(declared)
    assert not contractions(text)


def contractions(ptx):
    """Products and sums that the assembler may fuse: those without a rounding of their own."""
    return re.findall(r"^\s*(?:mul|add|sub)\.f(?:32|64)\b.*", ptx, re.MULTILINE)


def test_the_build_is_told_what_is_measured_here():
    """CMakeLists.txt has the same architectures and the same arithmetic."""
    text = (shim.CSRC.parent / "CMakeLists.txt").read_text()
    *older, newest = map(str, kernel_budget.ARCHS)
    archs = ";".join([*(f"{arch}-real" for arch in older), newest])
    assert archs == "80-real;86-real;89-real;90-real;100-real;120"
    assert f'FUSEDOPT_CUDA_ARCHS "{archs}"' in text
    options = re.search(r"target_compile_options\(kernels_cuda(.*?)\)\n", text, re.DOTALL)[1]
    assert "--fmad=false" in options and "--fmad=false" in kernel_budget.FLAGS


@pytest.mark.skipif(not _C.built_with_cuda, reason="the installed module has no CUDA kernels")
def test_the_installed_module_holds_what_is_measured_here():
    """Every kernel for every architecture it names, within the budget; PTX for later ones."""
    program = Path(pytest.importorskip("triton").__file__).parent / "backends/nvidia/bin/cuobjdump"

    def dump(option):
        command = [program, option, _C.__file__]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    archs = _C.cuda_archs.split()
    assert re.findall(r"\.sm_(\d+)\.ptx", dump("-lptx")).count(archs[-1]) >= 1
    assert not contractions(dump("-ptx"))
    registers = {f"sm_{arch.removesuffix('-real')}": {} for arch in archs}
    for section in dump("-res-usage").split("arch = ")[1:]:
        usage = re.findall(
            r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", section
        )
        for mangled, used, *memory in usage:
            registers[section.split()[0]][kernel_budget.readable(mangled)] = int(used)
            assert memory == ["0", "0"], mangled
    for arch, kernels in registers.items():
        allowed = BUDGET[arch]
        assert kernels.keys() == allowed.keys(), arch
        assert all(used <= allowed[name]["registers"] for name, used in kernels.items()), arch


def codecs(name):
    """The roles' codecs in a kernel's name."""
    return re.findall(r"\b(?:B?Float\d+)\b", name)


def test_the_gate_can_fail():
    """A planted excess of each kind, and kernels that come and go."""
    good = {"registers": 40, "spills": 0, "local": 0, "loads_128": 8, "stores_128": 6}
    budget = {"sm_90": {"k": good}}
    assert problems({"sm_90": {"k": good}}, budget) == []
    for bad in (
        {"registers": 41},
        {"spills": 4},
        {"local": 1},
        {"loads_128": 7},
        {"stores_128": 5},
    ):
        assert len(problems({"sm_90": {"k": good | bad}}, budget)) == 1
    assert len(problems({"sm_90": {"k": good, "l": good}}, budget)) == 1
    assert len(problems({"sm_90": {}}, budget)) == 1
    assert len(problems({}, budget)) == 1
