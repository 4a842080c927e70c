"""Numbers that stay in device memory (step counters, a learning rate, a loss scale).

Kernels read them where they lie, so no step waits for the device. In the table such a number is two
words, its address (0: there is none) and the code of its dtype: FLOAT32, FLOAT64, INT32 or INT64.
"""

import triton
import triton.language as tl

from fusedopt.triton_kernels._storage import FLOAT32, FLOAT64, INT32


@triton.jit
def read_number(number, otherwise):
    """The number as float64, or another if there is none."""
    address = tl.load(number)
    dtype = tl.load(number + 1)
    value = otherwise
    if address != 0:
        if dtype == FLOAT32:
            value = tl.load(address.to(tl.pointer_type(tl.float32))).to(tl.float64)
        elif dtype == FLOAT64:
            value = tl.load(address.to(tl.pointer_type(tl.float64)))
        elif dtype == INT32:
            value = tl.load(address.to(tl.pointer_type(tl.int32))).to(tl.float64)
        else:
            value = tl.load(address.to(tl.pointer_type(tl.int64))).to(tl.float64)
    return value


@triton.jit
def is_set(number):
    return read_number(number, zero()) != 0


@triton.jit
def zero():
    return tl.full((), 0, tl.int64).to(tl.float64)


@triton.jit(do_not_specialize=["counters_at", "found_inf_at"])
def increment_kernel(table, counters_at, found_inf_at):
    """Adds one to each counter unless found_inf is set; one thread block a counter."""
    counter = table + counters_at + 2 * tl.program_id(0)
    if not is_set(table + found_inf_at):
        address = tl.load(counter)
        dtype = tl.load(counter + 1)
        if dtype == FLOAT32:
            as_float = address.to(tl.pointer_type(tl.float32))
            tl.store(as_float, tl.load(as_float) + 1)
        elif dtype == FLOAT64:
            as_double = address.to(tl.pointer_type(tl.float64))
            tl.store(as_double, tl.load(as_double) + 1)
        elif dtype == INT32:
            as_int = address.to(tl.pointer_type(tl.int32))
            tl.store(as_int, tl.load(as_int) + 1)
        else:
            as_long = address.to(tl.pointer_type(tl.int64))
            tl.store(as_long, tl.load(as_long) + 1)


# ---- csrc/math/power.h


@triton.jit
def exact_product(a, b):
    # Dekker's; written out without fma, as in C++.
    split = tl.full((), 134217729, tl.int64).to(tl.float64)  # 2^27 + 1
    as_ = split * a
    bs = split * b
    ah = as_ - (as_ - a)
    bh = bs - (bs - b)
    al = a - ah
    bl = b - bh
    product = a * b
    return product, ((ah * bh - product) + ah * bl + al * bh) + al * bl


@triton.jit
def multiply(a_high, a_low, b_high, b_low):
    p_high, p_low = exact_product(a_high, b_high)
    low = p_low + (a_high * b_low + a_low * b_high)
    high = p_high + low
    return high, low - (high - p_high)


@triton.jit
def bias_correction(beta, step):
    """1 - beta^step, carried in two doubles."""
    high = zero() + 1
    low = zero()
    square_high = beta
    square_low = zero()
    n = step
    while n > 0:
        if n % 2 == 1:
            high, low = multiply(high, low, square_high, square_low)
        square_high, square_low = multiply(square_high, square_low, square_high, square_low)
        n = n // 2
    return (1 - high) - low
