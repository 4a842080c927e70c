"""What the theory says of Adam's limits and of rotations, on every backend.

Small problems with known answers: a decay coupled to the gradient, a second moment that belongs to
the wrong block or a bias correction at the wrong place ends somewhere else.
"""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

import fusedopt
from fusedopt import reference
from fusedopt.partitions import Contiguous, Heads, Transposed, block_count, block_ids

STEP = "blockwise_adam_step"
BACKENDS = [name for name in ("cpu", "cuda", "triton") if fusedopt.supports(STEP, name)[0]]
BACKENDS = ["reference", *BACKENDS]


def stepper(backend, name=STEP):
    """The step in place: the backend's, or the pure reference's with its results put back."""
    if backend != "reference":
        function = getattr(fusedopt, name)
        return lambda *arrays, **options: function(*arrays, backend=backend, **options)

    def step(*arrays, **options):
        result = getattr(reference, name)(*arrays, **options)
        for old, new in zip((arrays[0], arrays[2], arrays[3]), result, strict=False):
            for x, y in zip(old, new, strict=True):
                x[...] = y

    return step


SHAPE = (4, 5)
DECAY = 0.8
STEPS = 8000


def quadratic(seed=0):
    """Curvatures from 0.1 to 10 in a random basis; the minimum is far outside the unit box."""
    rng = np.random.default_rng(seed)
    basis, _ = np.linalg.qr(rng.standard_normal((20, 20)))
    hessian = basis @ np.diag(np.logspace(-1, 1, 20)) @ basis.T
    return hessian, 3 * rng.standard_normal(20)


def descend(step, arrays, **options):
    """Full-batch steps of 0.1 / (decay sqrt(t)); what is left of the start is exp(-0.2 sqrt(T))."""
    hessian, center = quadratic()
    x, m, v = arrays
    for t in range(1, STEPS + 1):
        gradient = (hessian @ (x.reshape(-1) - center)).reshape(x.shape)
        rate = 0.1 / DECAY / t**0.5
        step([x], [gradient], [m], [v], step=t, lr=rate, weight_decay=DECAY, betas=(0.9, 0.95),
             eps=1e-12, **options)  # fmt: skip
    return x.reshape(-1), hessian @ (x.reshape(-1) - center)


def check_limit(x, gradient, ids):
    """The KKT conditions of min f in the ball of max over blocks of the rms: |x| <= 1/decay.

    For single coordinates this is the box; its multiplier is the dual norm of the gradient.
    """
    sizes = np.bincount(ids)
    rms = np.sqrt(np.bincount(ids, x * x) / sizes)
    dual = np.sqrt(np.bincount(ids, gradient * gradient) * sizes).sum()
    assert DECAY * rms.max() <= 1 + 1e-5
    assert abs(dual + DECAY * (gradient @ x)) <= 2e-5 * dual
    assert dual > 1  # the minimum lies outside, so the ball was felt


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_adamw_ends_at_the_boxs_kkt_point(backend):
    """Xie & Li, arXiv:2404.04454: the limit of AdamW minimises in the box of 1/decay."""
    arrays = [np.zeros(20) for _ in range(3)]
    x, gradient = descend(stepper(backend, "adamw_step"), arrays)
    check_limit(x, gradient, np.arange(20))
    assert (abs(DECAY * abs(x) - 1) < 1e-4).sum() >= 10  # most constraints are active


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "partition", ["coordinate", "row", "column", Heads(n=2), Contiguous(7), "tensor", "global"],
    ids=str,
)  # fmt: skip
def test_blocks_end_at_the_kkt_point_of_their_ball(backend, partition):
    arrays = [np.zeros(SHAPE), np.zeros(SHAPE)]
    arrays.append(np.zeros(block_count(partition, SHAPE), np.float32))
    x, gradient = descend(stepper(backend), arrays, partitions=partition)
    check_limit(x, gradient, block_ids(partition, SHAPE).reshape(-1))


FUSED = [(slice(0, 4), Heads(n=2)), (slice(4, 6), "row")]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "partition",
    ["row", "column", "tensor", "global", Heads(n=2), Contiguous(13), FUSED, Transposed(FUSED)],
    ids=str,
)
def test_steps_commute_with_rotations_inside_blocks(backend, partition):
    """Turning each block's coordinates among themselves turns the trajectory, and nothing else.

    A kernel that lets one element into another block's mean breaks this. Coordinates exchanged
    between two blocks must change it, or the test would prove nothing.
    """
    rng = np.random.default_rng(0)
    shape = (5, 6) if isinstance(partition, Transposed) else (6, 5)
    ids = block_ids(partition, shape).reshape(-1)
    turn = np.zeros((30, 30))
    for block in np.unique(ids):
        members = np.flatnonzero(ids == block)
        turn[np.ix_(members, members)] = np.linalg.qr(
            rng.standard_normal((len(members), len(members)))
        )[0]
    start, moment, *gradients = rng.standard_normal((12, 30))
    second = np.square(rng.standard_normal(block_count(partition, shape))).astype(np.float32)

    def walk(turn):
        x, m, v = (turn @ start).reshape(shape), (turn @ moment).reshape(shape), second.copy()
        for t, gradient in enumerate(gradients, 1):
            stepper(backend)(
                [x], [(turn @ gradient).reshape(shape)], [m], [v],
                partitions=partition, step=t, lr=0.1, weight_decay=0.3,
            )  # fmt: skip
        return x.reshape(-1)

    # Squares add up in another order: block_sq's float32 may round the other way at each step.
    np.testing.assert_allclose(walk(turn), turn @ walk(np.eye(30)), rtol=0, atol=2e-6)
    if len(np.unique(ids)) > 1:
        exchange = np.eye(30)
        i, j = np.flatnonzero(ids == ids.min())[0], np.flatnonzero(ids == ids.max())[0]
        exchange[[i, j]] = exchange[[j, i]]
        assert abs(walk(exchange) - exchange @ walk(np.eye(30))).max() > 1e-3


@pytest.fixture(scope="module")
def rotation():
    path = Path(__file__).resolve().parent.parent / "examples" / "rotation.py"
    spec = importlib.util.spec_from_file_location("rotation", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["rotation"] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("backend", BACKENDS)
def test_rotation_ruins_coordinates_and_leaves_the_global_block(rotation, backend):
    """The example's problem: 200 curvatures over four decades, in their own axes and rotated."""
    own, rotated = rotation.problems().values()
    step = stepper(backend)
    assert rotation.best(own, "coordinate", step=step)[-1] < 1e-11
    assert rotation.best(rotated, "coordinate", step=step)[-1] > 1e-4
    plain, turned = (
        rotation.losses(problem, "global", 3.0, step=step) for problem in (own, rotated)
    )
    np.testing.assert_allclose(turned, plain, rtol=1e-5)
    assert rotation.losses(own, "coordinate", 3.0, step=step) != plain


def test_hessian_norm_of_the_rotated_problem(rotation):
    """What bounds Adam grows by an order with the rotation; the curvatures stay the same."""
    own, rotated = rotation.problems().values()
    assert own.hessian_norm() == pytest.approx(own.curvatures.mean())
    assert rotated.hessian_norm() > 10 * own.hessian_norm()
