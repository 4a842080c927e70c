"""What the tests of Adam's CUDA kernels share: arrays, and options as the entries take them."""

from __future__ import annotations

import ctypes

import ml_dtypes
import numpy as np

SEEDS = [0, 1, 2, 3]  # threads in ascending, descending and two random orders
F32, F64, F16 = (np.dtype(name) for name in ("float32", "float64", "float16"))
BF16 = np.dtype(ml_dtypes.bfloat16)
FLOATS = [F32, F64, BF16, F16]
COUNTERS = [F32, F64, np.dtype("int32"), np.dtype("int64")]
CODES = {F32: 0, F64: 1, BF16: 2, F16: 3, COUNTERS[2]: 4, COUNTERS[3]: 5}  # enum class DType
OPTIONS = {"lr": 0.02, "betas": (0.85, 0.97), "eps": 1e-6, "weight_decay": 0.1}
MAX_ROLES = 6


class Options(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_double) for name in ("lr", "beta1", "beta2", "eps", "weight_decay")),
        ("maximize", ctypes.c_bool),
    ]


class DeviceNumber(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("dtype", ctypes.c_uint8)]

    @classmethod
    def of(cls, array):
        return cls() if array is None else cls(array.ctypes.data, CODES[array.dtype])


# ---- arrays


def placed(values, dtype, offset=0):
    """A copy that starts `offset` elements behind a 16-byte boundary and ends with its memory."""
    values = np.asarray(values).astype(dtype)
    # ASan reports what lies behind the last byte, if that is the end of an allocation.
    room = np.empty(offset * dtype.itemsize + values.nbytes, np.uint8)
    assert room.ctypes.data % 16 == 0
    out = room[offset * dtype.itemsize :].view(dtype)
    out[:] = values.ravel()
    return out.reshape(values.shape)


def copy_of(x):
    """A copy with the same order of axes."""
    axes = sorted(range(x.ndim), key=lambda d: -abs(x.strides[d]))
    copy = np.empty([x.shape[d] for d in axes], x.dtype).transpose(np.argsort(axes))
    copy[...] = x
    return copy


def bits(x):
    """The elements as whole numbers, every NaN the same."""
    numbers = np.ascontiguousarray(x).view(f"u{x.itemsize}")
    return np.where(np.isnan(x), np.iinfo(numbers.dtype).max, numbers)


def compare(rows, want):
    for i, (got, expected) in enumerate(zip(rows, want, strict=True)):
        for role, (a, b) in enumerate(zip(got, expected, strict=True)):
            np.testing.assert_array_equal(bits(a), bits(b), err_msg=f"row {i}, role {role}")


def launches(library):
    return [line.split("(")[0] for line in library.cuda_host_take_launches().decode().splitlines()]
