"""The float64 reference of blockwise Adam against the rule written out block by block."""

import numpy as np
import pytest

from fusedopt import reference
from fusedopt.partitions import Contiguous, Heads, Transposed, block_count, block_ids

SHAPES = [(8, 6), (), (0, 3), (5,), (4, 3, 2)]
OPTIONS = {"lr": 0.02, "betas": (0.85, 0.97), "eps": 1e-6, "weight_decay": 0.1}


def lists(partition, seed=0):
    rng = np.random.default_rng(seed)
    p, g, m = ([rng.standard_normal(shape) for shape in SHAPES] for _ in range(3))
    v = [np.square(rng.standard_normal(block_count(partition, shape))) for shape in SHAPES]
    return p, g, m, v


def by_hand(p, g, m, v, blocks, step, sign=1.0):
    """One block after another: flat indices in, scalars out."""
    b1, b2 = OPTIONS["betas"]
    p, g, m, v = p.reshape(-1).copy(), sign * g.reshape(-1), m.reshape(-1).copy(), v.copy()
    for b, members in enumerate(blocks):
        v[b] = b2 * v[b] + (1 - b2) * sum(g[i] ** 2 for i in members) / len(members)
        for i in members:
            m[i] = b1 * m[i] + (1 - b1) * g[i]
            root = (v[b] / (1 - b2**step)) ** 0.5 + OPTIONS["eps"]
            p[i] -= OPTIONS["lr"] * OPTIONS["weight_decay"] * p[i]
            p[i] -= OPTIONS["lr"] * m[i] / (1 - b1**step) / root
    return p, m, v


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("partition", ["coordinate", "tensor", "row", "column", Contiguous(4)])
def test_rule(partition, maximize):
    p, g, m, v = lists(partition)
    got = reference.blockwise_adam_step(
        p, g, m, v, partitions=partition, step=3, maximize=maximize, grad_scale=4.0, **OPTIONS
    )
    for i, shape in enumerate(SHAPES):
        ids = block_ids(partition, shape).reshape(-1)
        blocks = [np.flatnonzero(ids == b) for b in range(len(v[i]))]
        want = by_hand(p[i], g[i], m[i], v[i], blocks, 3, (-1 if maximize else 1) / 4)
        for ours, theirs in zip((got.params[i], got.exp_avgs[i], got.block_sqs[i]), want,
                                strict=True):  # fmt: skip
            np.testing.assert_allclose(ours.reshape(-1), theirs, rtol=1e-13, atol=1e-300)
    assert [x.shape for x in got.params] == SHAPES


def test_coordinate_is_adamw():
    p, g, m, v = lists("coordinate")
    got = reference.blockwise_adam_step(p, g, m, v, partitions="coordinate", step=3, **OPTIONS)
    v = [x.reshape(shape) for x, shape in zip(v, SHAPES, strict=True)]
    want = reference.adamw_step(p, g, m, v, step=3, **OPTIONS)
    for ours, theirs in zip(got.params, want.params, strict=True):
        assert (ours == theirs).all()


def test_global_is_one_block_over_all_tensors():
    p, g, m, _ = lists("tensor")
    g[3] = None
    got = reference.blockwise_adam_step(
        p, g, m, [[0.3]] * len(p), partitions="global", step=3, **OPTIONS
    )
    present = [x for x in g if x is not None]
    mean = sum(np.square(x).sum() for x in present) / sum(x.size for x in present)
    v = 0.97 * 0.3 + 0.03 * mean
    np.testing.assert_allclose(np.concatenate(got.block_sqs), v, rtol=1e-14)  # the empty one too
    assert (got.params[3] == p[3]).all() and (got.exp_avgs[3] == m[3]).all()
    # Two tensors with one flat vector's elements move as the vector does.
    flat = [np.concatenate([x[0].reshape(-1), x[4].reshape(-1)]) for x in (p, g, m)]
    one = reference.blockwise_adam_step(
        *([x] for x in flat), [[0.3]], partitions="tensor", step=3, **OPTIONS
    )
    two = reference.blockwise_adam_step(
        *([x[0], x[4]] for x in (p, g, m)), [[0.3]] * 2, partitions="global", step=3, **OPTIONS
    )
    joined = np.concatenate([x.reshape(-1) for x in two.params])
    np.testing.assert_allclose(joined, one.params[0], rtol=1e-14)


def test_no_gradient_at_all_leaves_everything():
    p, _, m, _ = lists("tensor")
    got = reference.blockwise_adam_step(
        p, [None] * 5, m, [[0.3]] * 5, partitions="global", step=3, **OPTIONS
    )
    assert all(float(v[0]) == 0.3 for v in got.block_sqs)
    assert all((a == b).all() for a, b in zip(got.params + got.exp_avgs, p + m, strict=True))


def test_found_inf_leaves_everything():
    p, g, m, v = lists("row")
    got = reference.blockwise_adam_step(p, g, m, v, partitions="row", step=3, found_inf=1.0)
    assert all((a == b).all() for a, b in zip(got.params + got.block_sqs, p + v, strict=True))


def test_each_tensor_its_own_partition():
    p, g, m = ([x, x.T.copy()] for x in (lists("row")[i][0] for i in range(3)))
    v = [np.ones(2), np.ones(2)]
    got = reference.blockwise_adam_step(
        p, g, m, v, partitions=[Heads(2), Transposed(Heads(2))], step=[3, 3], **OPTIONS
    )
    np.testing.assert_allclose(got.params[0], got.params[1].T, rtol=1e-14)


@pytest.mark.parametrize(
    ("seconds", "partition", "message"),
    [
        ([[1.0] * 3], "row", r"block_sqs\[0\] has 3 elements, expected 8 .* shape \(8, 6\)"),
        ([[1.0], [2.0]], "global", r"are \[1.0, 2.0\], expected one value"),
    ],
)
def test_block_sqs_that_do_not_fit(seconds, partition, message):
    arrays = [np.ones((8, 6))] * len(seconds)
    with pytest.raises(ValueError, match=message):
        reference.blockwise_adam_step(arrays, arrays, arrays, seconds, partitions=partition, step=1)
