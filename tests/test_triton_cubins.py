"""Triton kernels compiled ahead of time: resources, widths of accesses, and roundings."""

import json
import os
import re
import subprocess
import sys
from collections import Counter

import pytest

pytest.importorskip("triton")

from fusedopt import backends

if backends.triton_is_interpreted():
    pytest.skip("kernels are not compiled in the interpreter", allow_module_level=True)

import triton
import triton_cubins as cubins

BUDGET = json.loads(cubins.BUDGET.read_text())
KERNELS = cubins.all_kernels()
BYTES = (4, 8, 2, 2)
SLACK = 12  # registers that another version of Triton may take beside those measured; one word too


def test_budget_names_every_kernel():
    archs = {f"sm_{arch}" for arch in cubins.ARCHS}
    assert BUDGET["kernels"].keys() == KERNELS.keys()
    assert all(by_arch.keys() >= archs for by_arch in BUDGET["kernels"].values())


@pytest.mark.parametrize("arch", cubins.ARCHS, ids="sm_{}".format)
@pytest.mark.parametrize("name", KERNELS)
def test_resources(name, arch):
    found = cubins.resources(cubins.compile_for(arch, *KERNELS[name]))
    allowed = BUDGET["kernels"][name][f"sm_{arch}"]
    measured = triton.__version__ == BUDGET["triton"]
    slack, stack = (0, 0) if measured else (SLACK, 8)
    assert found["local"] == 0 and found["stack"] <= stack, found
    assert found["registers"] <= allowed["registers"] + slack, (found, allowed)
    if name.startswith("adamw fp32, vector"):
        assert found["registers"] <= 64
    assert (found["loads_128"], found["stores_128"]) == (
        allowed["loads_128"],
        allowed["stores_128"],
    )
    assert {op for op in cubins.TENSOR_OPS if op in found} == {
        op for op in cubins.TENSOR_OPS if op in allowed
    }
    assert found.get("shared", 0) <= cubins.SHARED_LIMIT[arch]


@pytest.mark.parametrize("name", cubins.product_kernels())
def test_products_run_on_tensor_cores(name):
    """By wgmma on Hopper, by mma.sync before it; float32 is never multiplied as TF32."""
    half = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA", "sm_120": "HMMA"}
    double = dict.fromkeys(("sm_80", "sm_90", "sm_100"), "DMMA")
    ops = {"fp16": half, "bf16": half, "fp64": double, "fp32": {}}[name.split()[1].strip(",")]
    for arch, row in BUDGET["kernels"][name].items():
        found = [op for op in cubins.TENSOR_OPS if op in row]
        assert found == ([ops[arch]] if arch in ops else []), arch
        assert row["shared"] <= cubins.SHARED_LIMIT[int(arch.removeprefix("sm_"))]
        assert row["stores_128"] > 0


@pytest.mark.parametrize("name", ["wide fp16, middle", "wide fp32, long"])
def test_products_are_rounded_once(name):
    """Nothing flushes or approximates, and the one conversion of a half is to nearest."""
    found = instructions(cubins.compile_for(90, *KERNELS[name]))
    assert not [op for op in found if re.search(r"\.(ftz|approx|full|rz|rm|rp|sat)\b", op)]


@pytest.mark.parametrize("format_name", cubins.FORMATS)
def test_every_role_is_accessed_by_16_bytes(format_name):
    """The budget can't have been written from a kernel with narrow accesses."""
    roles = [BYTES[dtype] for dtype in cubins.FORMATS[format_name] if dtype >= 0]
    for row in BUDGET["kernels"][f"adamw {format_name}, vector"].values():
        each = 4 if roles[0] == 8 else 8  # elements of a thread
        wide = [size * each // 16 for size in roles]
        assert row["loads_128"] == sum(wide)
        assert row["stores_128"] == sum(wide) - wide[1]  # not the gradient


@pytest.mark.parametrize("name", [n for n in KERNELS if n.startswith("blocks") and "vector" in n])
def test_blocks_are_accessed_by_16_bytes(name):
    """Each role once; sums read gradients alone."""
    format_name, each = name.split()[1].strip(","), 16 if "8192" in name else 8
    size = BYTES[cubins.BLOCK_FORMATS[format_name][0]]
    reads, writes = (1, 0) if "squares" in name else (3, 2)
    for row in BUDGET["kernels"][name].values():
        wide = size * each // 16
        assert (row["loads_128"], row["stores_128"]) == (reads * wide, writes * wide)


def instructions(compiled):
    operations = r"^\s*(?:@\S+\s+)?((?:fma|add|sub|mul|div|sqrt|rcp|rsqrt|cvt)\.\S*f(?:32|64)\S*)\s"
    return Counter(re.findall(operations, compiled.asm["ptx"], flags=re.MULTILINE))


@pytest.mark.parametrize("format_name", cubins.FORMATS)
def test_roundings(format_name):
    """Fusions only where the formula has them; all round to nearest and keep subnormals."""
    kernel = cubins.compile_for(90, *KERNELS[f"adamw {format_name}, vector"])
    found = instructions(kernel)
    bad = [op for op in found if re.search(r"\.(ftz|approx|full|rz|rm|rp|sat)\b", op)]
    assert not bad
    elements = (4 if format_name == "fp64" else 8) + 1  # a thread's, and one at the ends
    kind = "f64" if format_name == "fp64" else "f32"
    assert (
        found[f"fma.rn.{kind}"] == 5 * elements
    )  # two moments, difference, denominator, parameter
    assert found[f"div.rn.{kind}"] == found[f"sqrt.rn.{kind}"] == elements
    assert found[f"mul.rn.{kind}"] + found[f"mul.{kind}"] == 4 * elements
    param, _, *states = cubins.FORMATS[format_name]
    converted = 2 * found["cvt.rn.bf16x2.f32"] + found["cvt.rn.bf16.f32"]
    assert converted == [param, *states].count(cubins.BF16) * elements


@pytest.mark.parametrize("name", ["1024 in one pass", "update by 128"])
def test_roundings_of_blocks(name):
    """An element has AdamW's fusions, but for the second moment, and no division."""
    found = instructions(cubins.compile_for(90, *KERNELS[f"blocks fp32, vector, {name}"]))
    assert not [op for op in found if re.search(r"\.(ftz|approx|full|rz|rm|rp|sat)\b", op)]
    assert found["fma.rn.f32"] == 3 * 8  # difference, first moment, parameter
    assert not [op for op in found if re.search(r"^(div|sqrt|rcp)\S*f32", op)]
    rates = 2 if name.endswith("pass") else 0  # blocks of a tile; the update reads its rate
    assert found["div.rn.f64"] == 2 * rates and found["sqrt.rn.f64"] == rates
    assert found["fma.rn.f64"] == 2 * rates  # second moment, denominator


def test_prepare_kernel_fuses_nothing():
    """Dekker's product would be another one with an fma in it."""
    found = instructions(cubins.compile_for(90, *KERNELS["prepare"]))
    assert not [op for op in found if op.startswith("fma") or ".approx" in op or ".ftz" in op]


def test_counts_do_not_specialise_kernels():
    """A size divisible by 16, or a lone block, must not compile another kernel."""
    for kernel in {parts[0] for parts in KERNELS.values()}:
        for parameter in kernel.params:
            if parameter.name.endswith("_at"):
                assert parameter.do_not_specialize, parameter.name


def test_import_needs_no_triton():
    """The package itself imports neither triton nor torch; what needs triton says so."""
    code = (
        "import sys, importlib.util as u\n"
        "assert u.find_spec('triton_kernels') is None\n"  # that name is another project's
        "find = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'triton' else find(name, *a)\n"
        "import fusedopt, fusedopt.triton_kernels\n"
        "assert not {'triton', 'torch'} & set(sys.modules)\n"
        "print(fusedopt.env()['backends']['triton'])"
    )
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True,
        env=environment, cwd="/",
    )  # fmt: skip
    assert done.stdout.strip() == "triton is not installed: pip install fusedopt[triton]"
