"""AdamW on backend triton gives the bits of the CPU backend, which test_adamw.py holds to float64.

With TRITON_INTERPRET=1 (a process of its own, see run.py) the kernels run in Triton's interpreter,
on CPU tensors and on stand-ins for GPU tensors whose memory is the CPU's; without it, on a GPU.
"""

import itertools
import mmap
from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from test_adamw import COMBINATIONS, FLOATS, LAYOUTS, OPTIONS, SIZES, copies, laid_out, lists
from test_adamw import test_steps_against_float64 as steps_against_float64

import fusedopt
from fusedopt import _C, backends

NORESERVE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
INTERPRETED = backends.triton_is_interpreted()
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
NAMES = ("params", "grads", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs")

pytestmark = [
    *([] if INTERPRETED else [pytest.mark.gpu]),
    pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(), reason="no GPU"),
    pytest.mark.skipif("avx2" not in _C.available_isas(), reason="the CPU backend has no fma here"),
    # Overflow, 0/0 and the like in the interpreter's NumPy.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]

if INTERPRETED:
    import triton_interpreter

    triton_interpreter.install()


@pytest.fixture(autouse=True)
def with_fma():
    before = _C.isa()
    _C.set_isa("avx2")
    yield
    _C.set_isa(before)


class OnGpu:
    """Says that it lies on a GPU, and is read by its attributes; the memory is the CPU's."""

    device = torch.device("cuda", 0)

    def __init__(self, tensor):
        self.tensor = tensor

    def __dlpack_device__(self):
        return (2, 0)

    @property
    def ndim(self):
        return self.tensor.ndim


for _name in ("data_ptr", "shape", "stride", "dtype", "layout"):
    setattr(OnGpu, _name, property(lambda self, name=_name: getattr(self.tensor, name)))


def on_gpu(x):
    """A tensor's twin on the GPU."""
    return OnGpu(x.clone()) if INTERPRETED else x.to(DEVICE)


def on_cpu(x):
    return x.tensor if isinstance(x, OnGpu) else x.cpu()


def bits(x):
    """A copy of the elements as whole numbers, every NaN the same."""
    x = x.detach().cpu().clone(memory_format=torch.contiguous_format)
    whole = x.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.itemsize])
    return torch.where(x.isnan(), -1, whole)


def moved(arrays):
    return [[x.to(DEVICE) for x in role] for role in arrays]


def triton_step(arrays, **options):
    run(arrays, backend="triton", **options)


def cpu_step(arrays, **options):
    run(arrays, backend="cpu", **options)


def run(arrays, **options):
    p, g, m, v, *u = arrays
    options = {**OPTIONS, **options}
    fusedopt.adamw_step(p, g, m, v, max_exp_avg_sqs=u[0] if u else None, **options)


def assert_same_bits(got, want):
    for name, a, b in zip(NAMES, got, want, strict=False):
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            different = (bits(x) != bits(y)).flatten().nonzero()
            assert not len(different), (
                f"{name}[{i}], {x.numel()} elements: {different[:5].tolist()}"
            )


def check(want, **options):
    """One step on both backends from the same values."""
    got = moved(copies(want))
    triton_step(got, **options)
    cpu_step(want, **options)
    assert_same_bits(got, want)


# ---- values


@pytest.mark.parametrize("dtypes", COMBINATIONS, ids=lambda d: "-".join(str(x)[6:] for x in d))
def test_bits_of_every_combination(dtypes):
    """Every size in one list; every other combination has maxima and another sign."""
    odd = COMBINATIONS.index(dtypes) % 2 == 1
    check(lists(dtypes, amsgrad=odd), step=3, maximize=odd)


@pytest.mark.skipif(not INTERPRETED, reason="compares CPU tensors")
@pytest.mark.parametrize("dtypes", [(f, f, f) for f in FLOATS], ids=lambda d: str(d[0])[6:])
def test_against_float64(dtypes):
    steps_against_float64("triton", dtypes, amsgrad=True, maximize=True)


@pytest.mark.parametrize("betas", [(0.0, 0.0), (0.3, 0.5), (0.9, 0.999)])
def test_bits_with_other_betas_and_scales(betas):
    for dtype in (torch.float32, torch.float64):
        check(lists((dtype,) * 3), step=1, betas=betas, eps=0.0, grad_scale=65536.0)


def test_bits_of_several_kinds_in_one_list():
    """All dtypes, and tensors with and without decay or a counter of their own, in one call."""
    parts = [lists(d, seed=i, sizes=[5, 4097, 1]) for i, d in enumerate(COMBINATIONS[::7])]
    arrays = [list(itertools.chain(*role)) for role in zip(*parts, strict=True)]
    count = len(arrays[0])
    check(
        arrays,
        step=7,
        lr=[0.01 * (i + 1) for i in range(count)],
        weight_decay=[0.1 * i for i in range(count)],
    )


def test_counters_on_the_host():
    arrays = lists((torch.float32,) * 3)
    got, counters = moved(copies(arrays)), [torch.tensor(float(i)) for i in range(len(SIZES))]
    triton_step(got, step=counters)
    assert [int(c) for c in counters] == list(range(1, len(SIZES) + 1))
    cpu_step(arrays, step=[torch.tensor(float(i)) for i in range(len(SIZES))])
    assert_same_bits(got, arrays)


@pytest.mark.parametrize("dtype", FLOATS, ids=lambda d: str(d)[6:])
def test_special_values(dtype):
    p, g, m, v, u = (x[0] for x in lists((dtype,) * 3, amsgrad=True, sizes=[4096]))
    special = [0.0, -0.0, float("inf"), -float("inf"), float("nan")]
    tiny = torch.finfo(dtype).smallest_normal
    special = torch.tensor([*special, tiny, tiny / 2, -tiny / 8, torch.finfo(dtype).max]).to(dtype)
    for role, x in enumerate((p, g, m, v)):
        x[: 9**3] = special.repeat_interleave(9 ** min(role, 2)).repeat(81)[: 9**3]
    v.abs_()
    for eps in (0.0, 1e-8):
        check([[x.clone()] for x in (p, g, m, v)], step=2, eps=eps)
    u[::3] = torch.nan
    check([[x] for x in (p, g, m, v, u)], step=2)


def test_rounding_to_bfloat16():
    """Every pattern of the discarded bits around ties, from float and from double."""
    ones = torch.arange(0x3F800000, 0x3F800000 + 4 * 65536, 37, dtype=torch.int32)
    m = ones.view(torch.float32)
    for wide in (torch.float32, torch.float64):
        tie = torch.tensor([1 + 2.0**-8, 1 + 2.0**-8 + 2.0**-40, 1 + 3 * 2.0**-8 - 2.0**-40])
        grads = torch.cat([m.to(wide), tie.to(wide)])
        zeros = [
            torch.zeros(grads.numel(), dtype=d) for d in (wide, torch.bfloat16, torch.bfloat16)
        ]
        check([[zeros[0]], [grads], [zeros[1]], [zeros[2]]], step=1, betas=(0.0, 0.9))


# ---- where elements lie


@pytest.mark.parametrize("dtype", FLOATS, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("shift", range(9))
def test_unaligned_views(dtype, shift):
    """All roles alike, so that they are aligned behind some head; then one of them otherwise."""
    for shifts in ([shift] * 5, [shift, 0, shift, shift, shift]):
        arrays = lists((dtype,) * 3, amsgrad=True, sizes=[n for n in SIZES if n < 9000])
        got = [views(role, by) for role, by in zip(arrays, shifts, strict=True)]
        triton_step(got, step=2)
        cpu_step(arrays, step=2)
        assert_same_bits(got, arrays)


def views(tensors, shift):
    """The same values, that many elements after an aligned address."""
    made = []
    for x in tensors:
        flat = torch.zeros(x.numel() + 16 + shift, dtype=x.dtype, device=DEVICE)
        start = -flat.data_ptr() % 16 // x.itemsize + shift
        made.append(flat[start : start + x.numel()].copy_(x))
    return made


def test_vector_kernel_takes_what_can_be_aligned():
    """The other one is right too, so only the table tells which was launched."""
    from fusedopt.triton_kernels import _table

    def accesses(address, sizes, numel, layout=-1):
        row = [address, address + 64 * sizes[0], 0, 0, 0, 0, numel, layout, 0]
        row.append(sum({4: 0, 8: 1, 2: 2}[size] << 8 * i for i, size in enumerate(sizes)))
        table = _table.pack(np.array([row]), np.zeros(0, np.int64), 5, [])
        head = table.words[6]
        return [one.kind.access for one in table.launches], head

    assert accesses(160, (4, 4), 100) == ([_table.VECTOR.value], 0)
    assert accesses(164, (4, 4), 100) == ([_table.VECTOR.value], 3)
    assert accesses(162, (2, 2), 100) == ([_table.VECTOR.value], 7)
    assert accesses(162, (2, 2), 7) == ([_table.SINGLE.value], 0)
    assert accesses(164, (4, 2), 100) == ([_table.SINGLE.value], 0)
    assert accesses(160, (4, 4), 100, layout=0) == ([_table.STRIDED.value], 0)


@pytest.mark.parametrize("layouts", [(a, b) for a in LAYOUTS for b in LAYOUTS], ids="-".join)
def test_layouts(layouts):
    inner, outer = layouts
    for dtype in (torch.float32, torch.bfloat16):
        arrays = lists((dtype,) * 3, amsgrad=True, sizes=[2 * 3 * 5 * 33])
        laid = [
            [laid_out(role[0].view(2, 3, 5, 33), outer if i in (1, 3) else inner).to(DEVICE)]
            for i, role in enumerate(arrays)
        ]
        triton_step(laid, step=4)
        cpu_step(arrays, step=4)
        assert_same_bits([[x[0].reshape(-1)] for x in laid], arrays)


def test_expanded_gradient_and_empty_list():
    arrays = [[torch.full((5, 70), value)] for value in (1.0, 0.5, 0.25, 0.125)]
    got = moved(copies(arrays))
    got[1] = [torch.full((), 0.5, device=DEVICE).expand(5, 70)]
    triton_step(got, step=1)
    cpu_step(arrays, step=1)
    assert_same_bits(got, arrays)
    fusedopt.adamw_step([], [], [], [], step=1, backend="triton")


def test_neighbours_are_left_alone():
    """Beyond either end of an array, nothing is written."""
    for numel, shift in itertools.product((1, 7, 33, 4095, 4097), range(5)):
        around = [torch.full((numel + 64,), 7.0, device=DEVICE) for _ in range(4)]
        triton_step([[x[16 + shift : 16 + shift + numel]] for x in around], step=1)
        for x in around:
            assert (x[: 16 + shift] == 7).all() and (x[16 + shift + numel :] == 7).all()
        assert (around[0][16 + shift : 16 + shift + numel] != 7).all()


def test_large_chunk_numbers_stay_64_bit():
    """A row of more than 2^31 elements: the last block's words, without the memory."""
    from fusedopt.triton_kernels import _table

    rows = np.array([[160, 320, 480, 640, 0, 0, 2**33 + 5, -1, 0, 0]])
    table = _table.pack(rows, np.zeros(0, np.int64), 5, [])
    assert table.words[-1] == (2**33 + 5) // 4096 << 32
    assert table.launches[0].thread_blocks == 2**33 // 4096 + 1


@pytest.mark.skipif(not INTERPRETED, reason="the interpreter runs one block of many")
@pytest.mark.parametrize("layout", [None, "halves in turn"])
def test_last_block_of_a_huge_row(monkeypatch, layout):
    """In memory of which only the pages in use exist; test_gpu.py has all of such a row."""
    from fusedopt.triton_kernels import _table, adamw

    numel = 2**33 + 4092
    places = np.arange(numel - numel % 4096, numel)
    if layout:  # the second half lies in the odd places
        places = 2 * (places - numel // 2) + 1
    want = lists((torch.bfloat16,) * 3, sizes=[places.size])
    huge = [np.frombuffer(mmap.mmap(-1, 2 * numel, flags=NORESERVE), np.uint16) for _ in range(4)]
    for far, [near] in zip(huge, want, strict=True):
        far[places] = near.view(torch.uint16).numpy()
    packed = []
    with monkeypatch.context() as patch:
        patch.setattr(adamw, "launch", lambda *arrays, **_: packed.extend(arrays))
        triton_step([[on_gpu(x) for x in role] for role in want], step=3, stream=0)
    [rows, _, scalars] = packed
    rows[0, :4] = [x.ctypes.data for x in huge]
    rows[0, _table.NUMEL], rows[0, _table.LAYOUT] = numel, 0 if layout else -1
    strides = np.array([2, 2, numel // 2, *[1, 2] * 5])
    table = _table.pack(rows, strides, 5, [scalars])
    [every] = table.launches
    last = replace(every, thread_blocks=1, block_at=every.block_at + every.thread_blocks - 1)
    words = torch.from_numpy(table.words)
    adamw.launch_rows(
        replace(table, launches=[last]), words, words[table.more_at[0] :].view(torch.float64)
    )
    cpu_step(want, step=3)
    got = [[torch.from_numpy(x[places]).view(torch.bfloat16)] for x in huge]
    assert_same_bits(got, want)


# ---- numbers on the device


COUNTERS = [torch.float32, torch.float64, torch.int32, torch.int64]


@pytest.mark.parametrize("counter", COUNTERS, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("found_inf", [None, 0.0, 1.0])
def test_numbers_on_the_device(counter, found_inf):
    """The step, lr, decay, loss scale and found_inf lie there: same bits, and the step counted."""
    arrays = lists((torch.float32,) * 3, amsgrad=True)
    got = [[on_gpu(x) for x in role] for role in arrays]
    before = copies(arrays)
    counts = [on_gpu(torch.tensor(10.0 * i, dtype=counter)) for i in range(len(SIZES))]
    numbers = {"lr": 0.02, "weight_decay": 0.1, "grad_scale": 1024.0}
    device = {name: on_gpu(torch.tensor(x, dtype=torch.float64)) for name, x in numbers.items()}
    if found_inf is not None:
        device["found_inf"] = on_gpu(torch.tensor(found_inf))
    stream = 0 if INTERPRETED else None
    triton_step(got, step=counts, maximize=True, stream=stream, **device)
    want = before if found_inf else arrays
    if not found_inf:
        host = [torch.tensor(10.0 * i, dtype=counter) for i in range(len(SIZES))]
        cpu_step(arrays, step=host, maximize=True, **numbers)
    assert_same_bits([[on_cpu(x) for x in role] for role in got], want)
    counted = 0 if found_inf else 1
    assert [int(on_cpu(c)) for c in counts] == [10 * i + counted for i in range(len(SIZES))]


@pytest.mark.parametrize("lr", COUNTERS[:2], ids=lambda d: str(d)[6:])
def test_one_number_on_the_device(lr):
    """Each alone, beside an int step: the others come from the host."""
    rate = torch.tensor(0.015625, dtype=lr)
    for name, value in [("lr", rate), ("weight_decay", rate), ("grad_scale", rate)]:
        arrays = lists((torch.bfloat16,) * 3)
        got = [[on_gpu(x) for x in role] for role in arrays]
        stream = 0 if INTERPRETED else None
        triton_step(got, step=12345, stream=stream, **{name: on_gpu(value)})
        cpu_step(arrays, step=12345, **{name: 0.015625})
        assert_same_bits([[on_cpu(x) for x in role] for role in got], arrays)


@pytest.mark.parametrize("step", [1, 2, 1000, 2**24, 2**40 + 1])
def test_bias_correction_on_the_device(step):
    """Both moments' corrections by repeated squaring, in the bits of the host's."""
    arrays = lists((torch.float64,) * 3, sizes=[33])
    got = [[on_gpu(x) for x in role] for role in arrays]
    counter = on_gpu(torch.tensor(step - 1, dtype=torch.int64))
    triton_step(got, step=counter, betas=(0.95, 0.99999), stream=0 if INTERPRETED else None)
    cpu_step(arrays, step=step, betas=(0.95, 0.99999))
    assert_same_bits([[on_cpu(x) for x in role] for role in got], arrays)


# ---- refusals


@pytest.mark.skipif(not INTERPRETED, reason="torch makes no such tensor")
def test_split_elements_are_refused_before_anything_is_written():
    """A view across its elements' own boundaries, which no GPU can access."""

    class Crooked(OnGpu):
        def data_ptr(self):
            return self.tensor.data_ptr() + 2

    arrays = [[OnGpu(torch.ones(40))] for _ in range(4)]
    arrays[2] = [Crooked(torch.ones(41)[:40])]
    with pytest.raises(ValueError, match=r"exp_avgs \(of 40 elements\).*multiple of.* 4 bytes"):
        triton_step(arrays, step=1, stream=0)
    assert all((role[0].tensor == 1).all() for role in arrays)


def test_supports():
    assert fusedopt.supports("adamw_step", "triton", dtypes=["bfloat16"], device="cuda")[0]
    assert fusedopt.env()["backends"]["triton"] == "available"
