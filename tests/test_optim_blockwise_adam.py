"""`fusedopt.optim.BlockwiseAdam`: partitions, checkpoints, and the habits of a torch optimizer."""

import copy
import io
import pickle

import pytest
import torch

import fusedopt
from fusedopt import partitions
from fusedopt.optim import AdamW, BlockwiseAdam
from fusedopt.partitions import Contiguous, Heads
from optim_helpers import bits, draw, parameters, params_of, run_alone, set_grads, snapshot

# A 0-d parameter and its second moment, of one axis, lie together on every device but a fake one.
pytestmark = pytest.mark.device_numbers
OPTIONS = {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.3}
QKV = [(slice(0, 4), Heads(n=2)), (slice(4, 6), "row")]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def through_a_file(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["coordinate", "row", "column", "tensor", "global", Contiguous(5)])
def test_the_class_is_the_functional_step(kind, dtype):
    optimizer = BlockwiseAdam(
        parameters((33,), (4, 5), (), (0,), dtype=dtype), **OPTIONS, partition=kind
    )
    params = [p.detach().clone() for p in params_of(optimizer)]
    moments = [torch.zeros_like(p) for p in params]
    seconds = [torch.zeros(partitions.block_count(kind, p.shape)) for p in params]
    for step in range(1, 6):
        grads = draw(params, seed=step)
        set_grads(optimizer, grads)
        optimizer.step()
        fusedopt.blockwise_adam_step(
            params, grads, moments, seconds, partitions=kind, step=step, **OPTIONS
        )
    for p, want, m, v in zip(params_of(optimizer), params, moments, seconds, strict=True):
        state = optimizer.state[p]
        assert torch.equal(p, want)
        assert torch.equal(state["exp_avg"], m)
        assert torch.equal(state["block_sq"], v)
        assert state["block_sq"].dtype is torch.float32
        assert float(state["step"]) == 5


@pytest.mark.parametrize("maximize", [False, True])
def test_coordinate_is_adamw(maximize):
    ours = BlockwiseAdam(
        parameters((33,), (4, 5)), **OPTIONS, partition="coordinate", maximize=maximize
    )
    adamw = AdamW(parameters((33,), (4, 5)), **OPTIONS, maximize=maximize)
    for optimizer in (ours, adamw):
        run_alone(optimizer, 10)
    for p, q in zip(params_of(ours), params_of(adamw), strict=True):
        assert torch.equal(p, q)


def kinds_of(optimizer):
    return [kind for group in optimizer.param_groups for kind in group["partition"]]


def test_partitions_per_group_parameter_name_and_function():
    a, b, c = parameters((6, 4), (6, 4), (3,))
    groups = [{"params": [a, c]}, {"params": [b], "partition": QKV}]
    assert kinds_of(BlockwiseAdam(groups, partition="tensor")) == [
        "tensor", "tensor", partitions.parse(QKV),
    ]  # fmt: skip
    by_parameter = {a: "row", b: QKV, c: "tensor"}
    assert kinds_of(BlockwiseAdam([a, b, c], partition=by_parameter))[1] == partitions.parse(QKV)
    by_name = {"x": Heads(n=3), "y": "column"}
    named = BlockwiseAdam([("x", a), ("y", b)], partition=by_name)
    assert kinds_of(named) == [Heads(n=3), "column"]
    by_rank = BlockwiseAdam([a, c], partition=lambda p: "row" if p.ndim > 1 else "tensor")
    assert kinds_of(by_rank) == ["row", "tensor"]
    for optimizer in (named, by_rank):
        run_alone(optimizer, 2)


def test_adam_mini_of_a_model():
    model = torch.nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    kinds = partitions.adam_mini(model)
    optimizer = BlockwiseAdam(model.named_parameters(), lr=0.01, partition=kinds)
    assert kinds_of(optimizer) == list(kinds.values())
    x = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(0))
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = (model(x) - x.roll(1, 0)).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    saved = through_a_file(optimizer.state_dict())
    again = BlockwiseAdam(model.named_parameters(), partition=partitions.adam_mini(model))
    again.load_state_dict(saved)


BAD = [
    ({"partition": "rows"}, ValueError, "partition is 'rows'"),
    ({"partition": Heads(n=5)}, ValueError, r"parameter 0 \(shape \(6, 4\)\).*Heads\(n=5\)"),
    ({"partition": {}}, ValueError, "parameter 0.*no entry"),
    ({"partition": 3}, TypeError, "partition is 3"),
    ({"lr": -1.0}, ValueError, "lr is -1.0"),
    ({"betas": (0.9, 1.0)}, ValueError, r"betas\[1\] is 1.0"),
    ({"eps": -1.0}, ValueError, "eps is -1.0"),
    ({"weight_decay": -1.0}, ValueError, "weight_decay is -1.0"),
    ({"state_dtype": torch.float16}, ValueError, "state_dtype is torch.float16"),
]


@pytest.mark.parametrize(("options", "error", "message"), BAD)
def test_bad_arguments(options, error, message):
    with pytest.raises(error, match=message):
        BlockwiseAdam(parameters((6, 4)), **options)
    optimizer = BlockwiseAdam(parameters((3,)))
    with pytest.raises(error, match=message):
        optimizer.add_param_group({"params": parameters((6, 4)), **options})
    assert len(optimizer.param_groups) == 1


def run(steps, kind="row", dtype=torch.bfloat16, **options):
    params = parameters((6, 4), (33,), dtype=dtype)
    return run_alone(BlockwiseAdam(params, **OPTIONS, partition=kind, **options), steps)


@pytest.mark.parametrize("kind", ["row", "global", {0: QKV, 1: Contiguous(7)}], ids=repr)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("state_dtype", [None, torch.float32])
def test_a_checkpoint_continues_bit_for_bit(kind, dtype, state_dtype):
    """torch casts states to the parameter's dtype on loading; `block_sq` stays float32."""

    def make(steps):
        params = parameters((6, 4), (33,), dtype=dtype)
        given = {params[i]: k for i, k in kind.items()} if isinstance(kind, dict) else kind
        optimizer = BlockwiseAdam(params, **OPTIONS, partition=given, state_dtype=state_dtype)
        return run_alone(optimizer, steps)

    straight, saved = make(6), make(3)
    loaded = make(0)
    with torch.no_grad():
        for p, q in zip(params_of(loaded), params_of(saved), strict=True):
            p.copy_(q)
    loaded.load_state_dict(through_a_file(saved.state_dict()))
    assert kinds_of(loaded) == kinds_of(saved)
    assert snapshot(run_alone(loaded, 3, seed=4)) == snapshot(straight)


def test_another_partition_is_refused_with_both_named():
    saved = through_a_file(run(2).state_dict())
    other = run(1, QKV_FIRST)
    before = snapshot(other)
    wanted = (
        r"param_groups\[0\]\['params'\]\[0\].*saved with.*'row'.*this optimizer has.*Heads\(n=2\)"
    )
    with pytest.raises(ValueError, match=wanted):
        other.load_state_dict(saved)
    assert snapshot(other) == before
    with pytest.raises(ValueError, match=r"Heads\(n=2\).*has 'row'"):
        run(1).load_state_dict(through_a_file(other.state_dict()))
    adamw = AdamW(parameters((6, 4), (33,)))
    with pytest.raises(ValueError, match=r"no partition"):
        run(1).load_state_dict(adamw.state_dict())


def QKV_FIRST(p):  # noqa: N802
    return QKV if p.ndim == 2 else "tensor"


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_continue(duplicate):
    straight, half = (run(n, QKV_FIRST, state_dtype=torch.float32) for n in (6, 3))
    assert snapshot(run_alone(duplicate(half), 3, seed=4)) == snapshot(straight)


def test_groups_added_later_and_missing_gradients():
    optimizer = run(2, dtype=torch.float32)
    late = parameters((5, 2), seed=3)
    optimizer.add_param_group({"params": late, "partition": "column", "lr": 0.1})
    before = bits(params_of(optimizer)[0])
    grads = draw(params_of(optimizer), seed=9)
    set_grads(optimizer, [None, *grads[1:]])
    optimizer.step()
    assert bits(params_of(optimizer)[0]) == before
    assert [float(optimizer.state[p]["step"]) for p in params_of(optimizer)] == [2, 3, 1]
    assert optimizer.state[late[0]]["block_sq"].shape == (2,)


def test_appended_parameters_are_refused():
    optimizer = run(1)
    optimizer.param_groups[0]["params"].append(parameters((3,))[0])
    with pytest.raises(ValueError, match=r"param_groups\[0\] has 3 parameters.*2 entries"):
        optimizer.step()


def test_global_is_one_block_per_group():
    """Also for a parameter without a gradient, and for one that joins in later."""
    a, b = parameters((6, 4), (33,)), parameters((5,), seed=1)
    optimizer = BlockwiseAdam([{"params": a}, {"params": b}], partition="global", lr=0.1)
    grads = draw([*a, *b], seed=2)
    set_grads(optimizer, [grads[0], None, grads[2]])
    optimizer.step()
    assert a[1] not in optimizer.state
    set_grads(optimizer, [grads[0], grads[1], grads[2]])
    optimizer.step()
    set_grads(optimizer, [None, grads[1], None])
    optimizer.step()
    one, other, third = (float(optimizer.state[p]["block_sq"]) for p in [*a, *b])
    assert one == other != third
    means = [
        float(grads[0].square().mean()),
        float(torch.cat([g.reshape(-1) for g in grads[:2]]).square().mean()),
    ]
    means.append(float(grads[1].square().mean()))
    want = 0.0
    for mean in means:
        want = 0.999 * want + 0.001 * mean
    assert one == pytest.approx(want, rel=1e-5)


def test_closures_hooks_and_schedulers():
    [p] = parameters((6, 4))
    optimizer = BlockwiseAdam([p], lr=torch.tensor(0.1), partition="row")
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))

    def closure():
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    losses = []
    for _ in range(5):
        losses.append(float(optimizer.step(closure)))
        schedule.step()
    assert losses == sorted(losses, reverse=True)
    assert calls == ["before", "after"] * 5
    assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(0.1 / 6)


def test_grad_scaler_leaves_scale_and_skipping_to_the_kernel():
    """A power of two scales without rounding; a bad step changes nothing, not even counters."""
    plain, scaled = run(2, dtype=torch.float32), run(2, dtype=torch.float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1000)
    for seed, bad in [(5, False), (6, True), (7, False)]:
        for optimizer, factor in ((plain, 1.0), (scaled, None)):
            if optimizer is plain and bad:
                continue
            optimizer.zero_grad()
            grads = draw(params_of(optimizer), seed)
            loss = sum((p * g).sum() for p, g in zip(params_of(optimizer), grads, strict=True))
            if factor:
                loss.backward()
                optimizer.step()
                continue
            scaler.scale(loss * float("inf") if bad else loss).backward()
            scaler.step(optimizer)
            scaler.update()
    assert snapshot(plain) == snapshot(scaled)


def test_state_is_half_of_adamws():
    shapes = [(768, 768), (768,), (3072, 768)]
    sizes = []
    for optimizer in (BlockwiseAdam(parameters(*shapes)), AdamW(parameters(*shapes))):
        run_alone(optimizer, 1)
        tensors = [t for s in optimizer.state.values() for t in s.values()]
        sizes.append(sum(t.nbytes for t in tensors))
    assert sizes[0] < 0.51 * sizes[1]
