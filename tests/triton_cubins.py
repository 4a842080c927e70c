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

from fusedopt.triton_kernels import _numbers, _table, adamw
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


def small_kernels():
    places = {"options_at": "i32", "loss_scale_at": "i32", "all_scalars": "*fp64"}
    counted = {"counters_at": "i32", "found_inf_at": "i32"}
    return {
        "prepare": (adamw.prepare_kernel, TABLE | places, {}, 1),
        "increment": (_numbers.increment_kernel, TABLE | counted, {}, 1),
    }


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
        for name, parts in (adamw_kernels() | small_kernels()).items()
    }
    BUDGET.parent.mkdir(exist_ok=True)
    BUDGET.write_text(
        json.dumps({"triton": triton.__version__, "kernels": budget}, indent=1) + "\n"
    )


if __name__ == "__main__":
    sys.exit(main() if sys.argv[1:] == ["--write"] else __doc__)
