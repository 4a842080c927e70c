"""Compiles Triton kernels to machine code for GPUs that need not be there, and reads what came out.

``python tests/triton_cubins.py --write`` writes tests/data/triton_budget.json anew.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fusedopt.triton_kernels import _adam, _numbers, _table, adamw, blockwise_adam
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


def all_kernels():
    return adamw_kernels() | block_kernels() | small_kernels()


def source(kernel, signature, constants):
    """An ASTSource, whose spelling changed in Triton 3.3; pointers come from torch, so aligned."""
    pointers = [i for i, kind in enumerate(signature.values()) if kind.startswith("*")]
    if VERSION < (3, 3):
        from triton.backends.compiler import AttrsDescriptor

        aligned = {"tt.divisibility": tuple(pointers)}
        attrs = AttrsDescriptor.from_dict({"arg_properties": aligned, "cls": "AttrsDescriptor"})
    else:
        attrs = {(i,): [["tt.divisibility", 16]] for i in pointers}
        signature = signature | dict.fromkeys(constants, "constexpr")
    return ASTSource(kernel, signature, constants, attrs)


def compile_for(arch, kernel, signature, constants, warps):
    options = {"num_warps": warps, **LAUNCH_OPTIONS}
    target = GPUTarget("cuda", arch, 32)
    return triton.compile(source(kernel, signature, constants), target=target, options=options)


def resources(compiled):
    """Registers, bytes of stack and local memory, and 128-bit loads and stores."""
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
