"""How numbers lie in memory, and arithmetic that rounds once; shared by all Triton kernels.

The twin of ``csrc/math/storage.h`` and ``value.h``: same codes of dtypes, same roundings, so that
kernels give the bits of the CPU's and CUDA's. bfloat16 passes as its
bits: the interpreter truncates where it should round, and computes on bit patterns.
"""

import triton
import triton.language as tl

# enum class DType. ABSENT: a row has no such role.
FLOAT32 = tl.constexpr(0)
FLOAT64 = tl.constexpr(1)
BFLOAT16 = tl.constexpr(2)
FLOAT16 = tl.constexpr(3)
INT32 = tl.constexpr(4)
INT64 = tl.constexpr(5)
ABSENT = tl.constexpr(-1)

# Options of every launch: formulas say where they fuse a multiply and an add.
LAUNCH_OPTIONS = {"enable_fp_fusion": False}


@triton.jit
def maximum(a, b):
    # The larger one, or NaN if either is NaN.
    return tl.where((a > b) | (a != a), a, b)


# Whether kernels run in Triton's interpreter (TRITON_INTERPRET=1).
INTERPRETED = tl.constexpr(not isinstance(maximum, triton.JITFunction))

TRITON = tuple(int(part) for part in triton.__version__.split(".")[:2])

# Before 3.6, Triton's own rounded division and square root flush subnormal numbers to zero.
FLUSHES = tl.constexpr(TRITON < (3, 6))


@triton.jit
def divide(a, b):
    # `/` on float32 would be an approximation.
    if a.dtype == tl.float64:
        return a / b
    elif FLUSHES and not INTERPRETED:
        return tl.inline_asm_elementwise(
            "div.rn.f32 $0, $1, $2;", "=f,f,f", [a, b], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.div_rn(a, b)


@triton.jit
def square_root(a):
    if a.dtype == tl.float64:
        return tl.sqrt(a)
    elif FLUSHES and not INTERPRETED:
        return tl.inline_asm_elementwise(
            "sqrt.rn.f32 $0, $1;", "=f,f", [a], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.sqrt_rn(a)


@triton.jit
def bf16_to_float(bits):
    return (bits.to(tl.uint32) << 16).to(tl.float32, bitcast=True)


@triton.jit
def float_to_bf16(value):
    # A GPU's own conversion rounds alike and spares 20 of 71 instructions an element. Only a NaN's
    # payload differs.
    if not INTERPRETED:
        return value.to(tl.bfloat16).to(tl.uint16, bitcast=True)
    bits = value.to(tl.uint32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    # A NaN's payload may not round up to infinity.
    return tl.where(value != value, (bits >> 16) | 0x40, rounded).to(tl.uint16)


@triton.jit
def round_to_odd(value):
    # A double on its way to bf16 rounds once: first to a float that is odd where it was inexact.
    nearest = value.to(tl.float32)
    wide = nearest.to(tl.float64)
    bits = nearest.to(tl.uint32, bitcast=True)
    odd = tl.where(tl.abs(wide) > tl.abs(value), bits - 1, bits) | 1
    exact = (wide == value) | (value != value)
    return tl.where(exact, bits, odd).to(tl.float32, bitcast=True)


@triton.jit
def size_of(DTYPE: tl.constexpr):
    if DTYPE == FLOAT64:
        size: tl.constexpr = 8
    elif DTYPE == FLOAT32:
        size: tl.constexpr = 4
    else:
        size: tl.constexpr = 2
    return size


@triton.jit
def pointer(address, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """The address of the first of some elements; ALIGNED promises a multiple of 16 bytes."""
    if DTYPE == FLOAT32:
        first = address.to(tl.pointer_type(tl.float32))
    elif DTYPE == FLOAT64:
        first = address.to(tl.pointer_type(tl.float64))
    elif DTYPE == BFLOAT16:
        first = address.to(tl.pointer_type(tl.uint16))
    else:
        first = address.to(tl.pointer_type(tl.float16))
    if ALIGNED:  # a pointer read from a table comes without a promise, and would be read by 32 bits
        first = tl.multiple_of(first, 16)
    return first


@triton.jit
def load(
    first, i, mask, DTYPE: tl.constexpr, COMPUTE: tl.constexpr,
    POLICY: tl.constexpr = "evict_first",  # "" where it is soon read again
):  # fmt: skip
    stored = tl.load(first + i, mask=mask, eviction_policy=POLICY)
    if DTYPE == BFLOAT16:
        return bf16_to_float(stored).to(COMPUTE)
    else:
        return stored.to(COMPUTE)


@triton.jit
def store(first, i, mask, value, DTYPE: tl.constexpr):
    if DTYPE == BFLOAT16:
        if value.dtype == tl.float64:
            value = round_to_odd(value)
        stored = float_to_bf16(value)
    else:
        stored = value.to(first.dtype.element_ty)
    tl.store(first + i, stored, mask=mask, eviction_policy="evict_first")
