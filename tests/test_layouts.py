"""Random layouts: whatever the strides of each array, the bits are those of contiguous arrays."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

import fusedopt
import where
from device_array import DeviceArray

DTYPES = [np.float32, np.float64, np.float16]


@st.composite
def layout(draw, ndim):
    """How one array lies in memory: order of its axes, steps and direction along each."""
    return (
        draw(st.permutations(range(ndim))),
        [draw(st.sampled_from([1, 1, 2, -1, -3])) for _ in range(ndim)],
    )


@st.composite
def problem(draw):
    shape = draw(st.lists(st.integers(0, 9), min_size=0, max_size=4))
    layouts = [draw(layout(len(shape))) for _ in range(4)]
    return shape, layouts, draw(st.sampled_from(DTYPES)), draw(st.integers(0, 2**32 - 1))


def laid_out(values, order, steps):
    """An array equal to ``values`` whose axes lie in memory in another order, with gaps."""
    spans = [n * abs(step) for n, step in zip(values.shape, steps, strict=True)]
    memory = np.zeros([spans[axis] for axis in order], values.dtype)
    view = memory.transpose(np.argsort(order)) if order else memory
    view = view[tuple(slice(None, None, step) for step in steps)] if steps else view
    view[...] = values
    return view


@settings(max_examples=150, deadline=None)
@given(problem())
def test_any_layout_gives_the_bits_of_contiguous_arrays(case):
    shape, layouts, dtype, seed = case
    rng = np.random.default_rng(seed)
    arrays = [np.asarray(rng.standard_normal(shape)).astype(dtype) for _ in range(4)]
    np.abs(arrays[3], out=arrays[3])
    laid = [laid_out(a, *where) for a, where in zip(arrays, layouts, strict=True)]
    for roles in (arrays, laid):
        options = {"step": 5, "lr": 0.1, "weight_decay": 0.1}
        if where.FAKE and roles is laid:  # against the CPU's bits
            fusedopt.adamw_step(*([DeviceArray(x)] for x in roles), stream=0, **options)
        else:
            fusedopt.adamw_step(*([x] for x in roles), **options)
    for straight, other in zip(arrays, laid, strict=True):
        np.testing.assert_array_equal(straight, other)
