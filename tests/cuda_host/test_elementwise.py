"""What the element-wise driver decides, and rows of more elements than fit here."""

from __future__ import annotations

import ctypes
import mmap
import os

import numpy as np
import pytest

from cuda_host import build as shim

NORESERVE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
CHUNK = 4096
F32, F64, BF16 = 0, 1, 2  # enum class DType
BYTES = (4, 8, 2)

pytestmark = pytest.mark.skipif("libasan" in os.environ.get("LD_PRELOAD", ""), reason="not for it")


@pytest.fixture(scope="module")
def library():
    loaded = shim.load(shim.build([shim.HERE / "elementwise_entry.cu"]))
    loaded.add_last_chunk.restype = ctypes.c_char_p
    return loaded


@pytest.mark.parametrize("late", range(8))
@pytest.mark.parametrize("dtypes", [(F32,) * 4, (BF16,) * 4, (F64,) * 4, (BF16, BF16, F32, F32)])
def test_heads_align_most_roles(library, dtypes, late):
    """Results are the same with any head: only accesses of 16 bytes become fewer."""

    def head(addresses, numel=1000):
        data = np.array(addresses, np.uint64)
        codes = np.array(dtypes, np.uint8)
        arrays = (ctypes.c_void_p(x.ctypes.data) for x in (data, codes))
        return library.row_head(*arrays, len(dtypes), ctypes.c_int64(numel))

    per_access = 16 // min(BYTES[dtype] for dtype in dtypes)
    late %= per_access
    together = [4096 * (role + 1) + late * BYTES[dtype] for role, dtype in enumerate(dtypes)]
    wanted = -late % per_access
    assert head(together) == wanted
    assert head(together, numel=wanted + 1) == wanted
    assert head(together, numel=max(wanted, 1)) < max(wanted, 1)
    for role, dtype in enumerate(dtypes):  # one that is out of step changes nothing
        assert head([*together[:role], together[role] + BYTES[dtype], *together[role + 1 :]]) in (
            wanted,
            *([wanted - 4] if wanted >= 4 and F32 in dtypes else []),  # aligns as many
        )


@pytest.mark.parametrize("numel", [2**32 + 10, 2**33 + 4092])
@pytest.mark.parametrize("layout", [None, "contiguous", "halves in turn"])
def test_last_thread_block_of_a_huge_row(library, numel, layout):
    """In memory of which only the pages in use exist."""
    x, y = (np.frombuffer(mmap.mmap(-1, 2 * numel, flags=NORESERVE), np.uint16) for _ in range(2))
    places = np.arange(numel - ((numel - 1) % CHUNK + 1), numel)
    sizes_and_strides = [1, numel, 1, 1]
    if layout == "halves in turn":  # the second half lies in the odd places
        places = 2 * (places - numel // 2) + 1
        sizes_and_strides = [2, 2, numel // 2, *[1, 2] * 2]
    one, two, three = (np.float32(value).view(np.uint32) >> 16 for value in (1, 2, 3))
    x[places], y[places] = one, two
    record = np.array(sizes_and_strides, np.int64)
    address = ctypes.c_void_p(record.ctypes.data) if layout else None
    arrays = (ctypes.c_void_p(a.ctypes.data) for a in (x, y))
    assert library.add_last_chunk(*arrays, ctypes.c_int64(numel), address) is None
    assert (x[places] == three).all()
    assert not x[:CHUNK].any()
