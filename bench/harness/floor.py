"""Compiles ``floor.cpp`` for this machine and runs it over the tensors of a case."""

from __future__ import annotations

import ctypes
import functools
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bench.harness.machine import compiler

if TYPE_CHECKING:
    from torch import Tensor

NAME = "floor"


@functools.cache
def _library() -> ctypes.CDLL:
    """Compile the floor; a ``RuntimeError`` says that there is no compiler, or why it failed."""
    source = Path(__file__).with_name("floor.cpp")
    with tempfile.TemporaryDirectory() as folder:
        target = f"{folder}/floor.so"
        flags = ["-std=c++17", "-O3", "-march=native", "-shared", "-fPIC", "-pthread"]
        try:
            subprocess.run(
                [compiler(), *flags, "-o", target, str(source)],
                check=True,
                capture_output=True,
                text=True,
            )
        except OSError as error:
            raise RuntimeError(f"no C++ compiler: {error}") from error
        except subprocess.CalledProcessError as error:
            raise RuntimeError(f"{compiler()} failed: {error.stderr}") from error
        return ctypes.CDLL(target)


def _addresses(tensors: Sequence[Tensor]) -> ctypes.Array[ctypes.c_void_p]:
    return (ctypes.c_void_p * len(tensors))(*[tensor.data_ptr() for tensor in tensors])


def read4_write3(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    firsts: Sequence[Tensor],
    seconds: Sequence[Tensor],
    threads: int,
) -> Callable[[], None]:
    """Return a call that moves the bytes of an AdamW step over dense tensors and changes nothing.

    It walks the storage in memory order, whatever the strides.
    """
    return _sweep([params, grads, firsts, seconds], threads)


def read3_write2(
    params: Sequence[Tensor], grads: Sequence[Tensor], firsts: Sequence[Tensor], threads: int
) -> Callable[[], None]:
    """The same for the bytes of a step of blockwise Adam, which has no second moments."""
    return _sweep([params, grads, firsts], threads)


def multiply_adds(flops: float, threads: int) -> Callable[[], None]:
    """Return a call that does so many float32 operations as multiply-adds in registers."""
    run = _library().multiply_adds
    arguments = ctypes.c_double(flops), ctypes.c_int64(threads)

    def call() -> None:
        run(*arguments)

    return call


def _sweep(roles: list[Sequence[Tensor]], threads: int) -> Callable[[], None]:
    run = _library().read4_write3
    params, firsts = roles[0], roles[2]
    numel = (ctypes.c_int64 * len(params))(*[tensor.numel() for tensor in params])
    tables = [_addresses(tensors) for tensors in roles] + [None] * (4 - len(roles))
    sizes = params[0].element_size(), firsts[0].element_size()
    count, mask = ctypes.c_int64(len(params)), ctypes.c_uint32(0)

    def call(_kept_alive: object = roles) -> None:
        if run(count, numel, *tables, *sizes, ctypes.c_int64(threads), mask):
            raise ValueError(f"the floor knows no elements of {sizes} bytes")

    return call
