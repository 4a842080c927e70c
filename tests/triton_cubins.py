"""Compiles Triton kernels to machine code for GPUs that need not be there, and reads what came out.

``python tests/triton_cubins.py --write`` writes tests/data/triton_budget.json anew.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fusedopt.triton_kernels import (
    _adam,
    _gemm,
    _numbers,
    _table,
    adamw,
    blockwise_adam,
    muon,
    newton_schulz,
)
from fusedopt.triton_kernels._storage import LAUNCH_OPTIONS

BUDGET = Path(__file__).parent / "data" / "triton_budget.json"
VERSION = tuple(map(int, triton.__version__.split(".")[:2]))
ARCHS = (80, 90, 100, 120) if VERSION >= (3, 3) else (80, 90)  # that it has a compiler for
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

F32, F64, BF16, F16, NONE = 0, 1, 2, 3, -1
FORMATS = {
    "fp32": (F32, F32, F32, F32, NONE),
    "fp32 amsgrad": (F32, F32, F32, F32, F32),
    "fp32 states bf16": (F32, F32, BF16, BF16, NONE),
    "bf16": (BF16, BF16, BF16, BF16, NONE),
    "bf16 states fp32": (BF16, BF16, F32, F32, NONE),
    "fp16": (F16, F16, F16, F16, NONE),
    "fp64": (F64, F64, F64, F64, NONE),
}
ACCESSES = {"vector": _table.VECTOR, "single": _table.SINGLE, "strided": _table.STRIDED}
TENSOR_OPS = ("HGMMA", "HMMA", "DMMA", "UTCHMMA")  # what multiplies tiles
SHARED_LIMIT = {80: 166912, 90: 232448, 100: 232448, 120: 101376}  # bytes of a thread block
TABLE = {"table": "*i64"}
PLACES = TABLE | {
    "all_scalars": "*fp64", "values": "*fp64", "block_at": "i32", "layouts_at": "i32",
    "copies_at": "i32",
}  # fmt: skip


def adamw_kernels():
    """{name: (kernel, signature, constants, warps)} of every format by every access."""
    kernels = {}
    for format_name, dtypes in FORMATS.items():
        for access_name, access in ACCESSES.items():
            kind = _table.Kind(dtypes, access.value)
            constants = [*dtypes, kind.access, adamw.tile_of(kind)]
            names = adamw.adamw_kernel.arg_names[-len(constants) :]
            signature = TABLE | {"all_scalars": "*fp64", "block_at": "i32", "layouts_at": "i32"}
            kernels[f"adamw {format_name}, {access_name}"] = (
                adamw.adamw_kernel, signature, dict(zip(names, constants, strict=True)),
                adamw.THREADS // 32,
            )  # fmt: skip
    return kernels


# Formats of param, grad and exp_avg; spaces of blocks in one pass, and strips in two.
BLOCK_FORMATS = {"fp32": (F32, F32, F32), "bf16": (BF16, BF16, BF16), "fp64": (F64, F64, F64)}
BLOCKS = [
    ("fp32", "vector", (1024, 8192), (0, 128)),
    ("fp32", "single", (8,), ()),
    ("fp32", "strided", (4096,), (128,)),
    ("bf16", "vector", (1024,), (128,)),
    ("fp64", "vector", (4096,), (0,)),
]


def block_kernels():
    """The same of blockwise Adam's."""
    stages = {
        "one_pass": blockwise_adam.one_pass_kernel,
        "squares": blockwise_adam.squares_kernel,
        "update": blockwise_adam.update_kernel,
        "coordinates": blockwise_adam.coordinates_kernel,
        "sums": blockwise_adam.sums_kernel,
        "rates": blockwise_adam.rates_kernel,
    }
    keys: list[tuple[str, str, tuple[int, ...]]] = [
        ("sums", "sums", (1024,)),
        ("rates", "rates", (0,)),
    ]
    for format_name, access_name, spaces, strips in BLOCKS:
        dtypes, access = BLOCK_FORMATS[format_name], ACCESSES[access_name].value
        kind = f"{format_name}, {access_name}"
        keys += [(f"{kind}, {n} in one pass", "one_pass", (*dtypes, access, n)) for n in spaces]
        for n in strips:
            keys += [(f"{kind}, squares by {n}", "squares", (dtypes[1], access, n))]
            keys += [(f"{kind}, update by {n}", "update", (*dtypes, access, n))]
    strided = _table.STRIDED.value
    keys += [("fp32, coordinates", "coordinates", (*BLOCK_FORMATS["fp32"], strided))]
    kernels = {}
    for name, stage, key in keys:
        constants, threads = blockwise_adam.constants_of(stage, key)
        arguments = stages[stage].arg_names
        places = arguments[: len(arguments) - len(constants)]
        kernels[f"blocks {name}"] = (
            stages[stage], {place: PLACES[place] for place in places},
            dict(zip(arguments[len(places) :], constants, strict=True)), threads // 32,
        )  # fmt: skip
    return kernels


def small_kernels():
    copied = {name: PLACES[name] for name in blockwise_adam.copy_kernel.arg_names}
    places = {"options_at": "i32", "loss_scale_at": "i32", "all_scalars": "*fp64"}
    counted = {"counters_at": "i32", "found_inf_at": "i32"}
    return {
        "prepare": (_adam.prepare_kernel, TABLE | places, {}, 1),
        "copy": (blockwise_adam.copy_kernel, copied, {}, 1),
        "increment": (_numbers.increment_kernel, TABLE | counted, {}, 1),
    }


# What products multiply, and the sizes that choose their tiles.
SIZES = {"long": (4096, 11008), "middle": (1024, 1024), "heads": (128, 7168)}
SYMMETRIC = [  # dtype, size, beta D, C + shift I
    ("fp16", "long", False, False), ("bf16", "long", True, True), ("fp16", "heads", True, False),
    ("fp32", "long", True, True), ("fp64", "long", True, True),
]  # fmt: skip
WIDE = [("fp16", "long"), ("fp16", "middle"), ("fp32", "long"), ("fp64", "long")]
TORCH = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
LONG = "i32, 16"  # a multiple of 16


def product_kernels():
    """Of Newton–Schulz: {name: (kernel, signature, arch -> (constants, warps, stages))}."""
    kernels = {}
    for dtype, size, add, shifted in SYMMETRIC:
        name = (
            f"symmetric {dtype}, {size}" + (", + D" if add else "") + (", + I" if shifted else "")
        )
        counts = {"numbers_at": "i32", "used": "i32", "tiles": "i32", "n": LONG, "depth": LONG}
        kernels[name] = (
            _gemm.symmetric_kernel,
            {"numbers": "*fp64", **dict.fromkeys("abdcq", f"*{dtype}"), **counts},
            symmetric_launch(dtype, SIZES[size], add, shifted),
        )
    for dtype, size in WIDE:
        counts = {"numbers_at": "i32", "down": "i32", "tiles": "i32", "n": LONG, "m": LONG}
        kernels[f"wide {dtype}, {size}"] = (
            _gemm.wide_kernel,
            {"numbers": "*fp64", **dict.fromkeys("axy", f"*{dtype}"), **counts},
            wide_launch(dtype, SIZES[size]),
        )
    return kernels


def symmetric_launch(dtype, size, add, shifted):
    def launch(arch):
        tiles = _gemm.tiles_for(*size, TORCH.get(dtype, torch.float64), arch)
        constants = {"EDGE": tiles.edge, "DEPTH": tiles.depth, "ADD": add, "SHIFTED": shifted}
        return constants, tiles.symmetric_warps, tiles.stages

    return launch


def wide_launch(dtype, size):
    def launch(arch):
        t = _gemm.tiles_for(*size, TORCH.get(dtype, torch.float64), arch)
        constants = {"EDGE": t.edge, "WIDTH": t.width, "DEPTH": t.depth, "ADD": True}
        return constants, t.wide_warps, t.stages

    return launch


# What normalises a matrix and what writes it: dtype given or wanted, dtype of the products, order,
# aligned, short side, square.
BESIDE = {
    "fp32 to fp16": (F32, F16, newton_schulz.BY_COLUMN, True, 4096, False),
    "bf16, square": (BF16, BF16, newton_schulz.BY_COLUMN, True, 4096, True),
}


def beside_kernels():
    kernels = {}
    tables = {"table": "*i64", "norms": "*fp64"}
    counts = dict.fromkeys(("matrices_at", "n", "m", "across", "tiles"), "i32")
    room = {"room_n": LONG, "room_m": LONG}
    warps = newton_schulz.THREADS // 32
    for name, (outer, inner, order, aligned, n, square) in BESIDE.items():
        values = (order.value, aligned, *newton_schulz.tile_shape(n), square)
        x = {"x_all": ("*fp32", "*fp64", "*u16", "*fp16")[inner]}
        for kernel, places, codes in (
            (newton_schulz.stats_kernel, {"table": "*i64", "parts": "*fp64", **counts}, (inner,)),
            (newton_schulz.load_kernel, {**tables, **x, **counts, **room}, (inner, inner)),
            (newton_schulz.store_kernel, {**tables, **x, **counts, **room}, (inner,)),
        ):
            names = kernel.arg_names[len(places) :]
            what = kernel.__name__.removesuffix("_kernel")
            constants = dict(zip(names, (outer, *codes, *values), strict=True))
            kernels[f"{what} {name}"] = (kernel, places, constants, warps)
    norms = {"parts": "*fp64", "norms": "*fp64", "tiles": "i32", "count": "i32"}
    kernels["norms"] = (newton_schulz.norms_kernel, norms, {"SQUARE": True}, warps)
    return kernels


def muon_kernels():
    """What Muon and NorMuon do before and after the products."""
    vector = _table.VECTOR.value
    moments, warps = TABLE | {"all_scalars": "*fp64"}, muon.THREADS // 32
    places = {"block_at": "i32", "layouts_at": "i32"}
    launches = {
        "before fp32, vector": (muon.before_kernel, (F32, F32, F32, vector, muon.TILE)),
        "after bf16, vector, by row": (muon.after_kernel, (BF16, vector, 1, muon.TILE)),
    }
    kernels = {}
    for name, (kernel, values) in launches.items():
        names = kernel.arg_names[4:]
        constants = dict(zip(names, values, strict=True))
        kernels[f"muon {name}"] = (kernel, moments | places, constants, warps)
    at = {"block_at": "i32"}
    for name, statistics in (("row", 1), ("column", 2)):
        constants = {"WIDE": F32, "STATISTICS": statistics}
        kernels[f"muon sums by {name}"] = (muon.sums_kernel, TABLE | at, constants, warps)
    scales = {"STATISTICS": 1}
    kernels["muon scales"] = (muon.scales_kernel, moments | at, scales, warps)
    return kernels


def all_kernels():
    adam = adamw_kernels() | block_kernels() | small_kernels()
    return adam | product_kernels() | beside_kernels() | muon_kernels()


def source(kernel, signature, constants):
    """An ASTSource, whose spelling changed in Triton 3.3; pointers come from torch, so aligned."""
    pointers = [
        i for i, kind in enumerate(signature.values()) if kind.startswith("*") or kind == LONG
    ]
    signature = {name: kind.split(",")[0] for name, kind in signature.items()}
    if VERSION < (3, 3):
        from triton.backends.compiler import AttrsDescriptor

        aligned = {"tt.divisibility": tuple(pointers)}
        attrs = AttrsDescriptor.from_dict({"arg_properties": aligned, "cls": "AttrsDescriptor"})
    else:
        attrs = {(i,): [["tt.divisibility", 16]] for i in pointers}
        signature = signature | dict.fromkeys(constants, "constexpr")
    return ASTSource(kernel, signature, constants, attrs)


def compile_for(arch, kernel, signature, constants, warps=None, stages=None):
    if warps is None:
        constants, warps, stages = constants(arch)
    options = {"num_warps": warps, **LAUNCH_OPTIONS}
    if stages is not None:
        options["num_stages"] = stages
    target = GPUTarget("cuda", arch, 32)
    return triton.compile(source(kernel, signature, constants), target=target, options=options)


def resources(compiled):
    """Registers, bytes of stack, local and shared memory, 128-bit accesses, products of tiles."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _cuobjdump("-res-usage", file.name)
        sass = _cuobjdump("-sass", file.name)
    found = {
        key: int(re.search(rf"{key}:(\d+)", usage).group(1)) for key in ("REG", "STACK", "LOCAL")
    }
    return {
        "registers": found["REG"],
        "stack": found["STACK"],
        "local": found["LOCAL"],
        "loads_128": len(re.findall(r"\bLDG\.E(?:\.\w+)*\.128", sass)),
        "stores_128": len(re.findall(r"\bSTG\.E(?:\.\w+)*\.128", sass)),
        **{op: n for op in TENSOR_OPS if (n := len(re.findall(rf"\b{op}\b", sass)))},
        **({"shared": compiled.metadata.shared} if compiled.metadata.shared > 4096 else {}),
    }


def _cuobjdump(*arguments):
    command = [TOOLS / "cuobjdump", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def main():
    budget = {
        name: {f"sm_{arch}": resources(compile_for(arch, *parts)) for arch in ARCHS}
        for name, parts in all_kernels().items()
    }
    BUDGET.parent.mkdir(exist_ok=True)
    BUDGET.write_text(
        json.dumps({"triton": triton.__version__, "kernels": budget}, indent=1) + "\n"
    )


if __name__ == "__main__":
    sys.exit(main() if sys.argv[1:] == ["--write"] else __doc__)
