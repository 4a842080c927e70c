"""`fusedopt.optim.Muon`, `NorMuon`: torch.optim.Muon's habits, checkpoints, AdamW beside them."""

import copy
import gc
import io
import pickle
import weakref

import numpy as np
import pytest
import torch

import fusedopt
from fusedopt import partitions, reference
from fusedopt.optim import AdamW, Muon, NorMuon
from fusedopt.partitions import Each, Heads
from optim_helpers import bits, draw, parameters, params_of, run_alone, set_grads, snapshot, threads

torch_only = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch before 2.9")
CLASSES = [Muon, NorMuon]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
OPTIONS = {"lr": 0.03, "weight_decay": 0.2, "momentum": 0.9}
SHAPES = ((12, 20), (33, 7), (16, 16))
QKV = [(slice(0, 4), Heads(n=2)), (slice(4, 12), "tensor")]


def through_a_file(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def steps_of(optimizer, count, seed=0):
    """Steps with random gradients; returns them, for a reference to follow."""
    taken = []
    for step in range(count):
        taken.append(draw(params_of(optimizer), seed + step))
        set_grads(optimizer, taken[-1])
        optimizer.step()
    return taken


def follow(params, buffers, taken, **options):
    """The float64 reference's trajectory."""
    for grads in taken:
        grads = [g.double().numpy() for g in grads]
        params, buffers = reference.muon_step(params, grads, buffers, **options)
    return params, buffers


def doubles(tensors):
    return [t.detach().double().numpy().copy() for t in tensors]


def distance(got, want):
    return max(np.abs(a - b).max() for a, b in zip(doubles(got), want, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("normuon", [False, True], ids=["Muon", "NorMuon"])
def test_the_class_is_the_functional_step(normuon, dtype):
    own = {"beta2": 0.8, "axis": "short"} if normuon else {}
    cls, step = (NorMuon, fusedopt.normuon_step) if normuon else (Muon, fusedopt.muon_step)
    optimizer = cls(parameters(*SHAPES, (5, 3, 2), (0, 4), dtype=dtype), **OPTIONS, **own)
    params = [p.detach().clone() for p in params_of(optimizer)]
    buffers = [torch.zeros_like(p) for p in params]
    rows = [torch.zeros(max(p.shape[0], p[:1].numel()) if p.numel() else 0) for p in params]
    for grads in steps_of(optimizer, 3):
        step(params, grads, buffers, *([rows] if normuon else []), **OPTIONS, **own)
    for i, (p, want) in enumerate(zip(params_of(optimizer), params, strict=True)):
        assert torch.equal(p, want)
        assert torch.equal(optimizer.state[p]["momentum_buffer"], buffers[i])
        if normuon:
            assert torch.equal(optimizer.state[p]["row_sq"], rows[i])
    assert set(optimizer.state[p]) == {"momentum_buffer", *(["row_sq"] if normuon else [])}


@torch_only
@pytest.mark.parametrize("adjust", [None, "original", "match_rms_adamw"])
@pytest.mark.parametrize("nesterov", [True, False])
def test_against_torch(nesterov, adjust):
    """torch's Newton-Schulz is in bfloat16: its error, not ours, sets the distance."""
    options = {**OPTIONS, "nesterov": nesterov, "adjust_lr_fn": adjust}
    ours, torchs = (cls(parameters(*SHAPES), **options) for cls in (Muon, torch.optim.Muon))
    start = doubles(params_of(ours))
    taken = steps_of(ours, 5)
    steps_of(torchs, 5)
    truth, buffers = follow(start, [np.zeros(s) for s in SHAPES], taken, **options)
    error, torchs_error = (distance(params_of(x), truth) for x in (ours, torchs))
    assert error < 1e-5 < torchs_error
    assert distance(params_of(ours), doubles(params_of(torchs))) <= 1.1 * torchs_error
    momenta = [[x.state[p]["momentum_buffer"] for p in params_of(x)] for x in (ours, torchs)]
    for got in momenta:
        assert distance(got, buffers) < 1e-6
    assert list(ours.state[params_of(ours)[0]]) == list(torchs.state[params_of(torchs)[0]])


@torch_only
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("first", ["ours", "torch's"])
def test_checkpoints_load_both_ways(first, dtype):
    """Three steps in one, then three in the other; against the reference all along."""
    classes = [Muon, torch.optim.Muon] if first == "ours" else [torch.optim.Muon, Muon]
    options = {**OPTIONS, "adjust_lr_fn": "match_rms_adamw"}
    one = classes[0](parameters(*SHAPES, dtype=dtype), **options)
    start = doubles(params_of(one))
    taken = steps_of(one, 3)
    two = classes[1]([p.detach().clone().requires_grad_() for p in params_of(one)], lr=7.0)
    two.load_state_dict(through_a_file(one.state_dict()))
    for p, q in zip(params_of(one), params_of(two), strict=True):
        assert torch.equal(one.state[p]["momentum_buffer"], two.state[q]["momentum_buffer"])
    for key, value in options.items():
        assert two.param_groups[0][key] == value
    taken += steps_of(two, 3, seed=3)
    straight = torch.optim.Muon(parameters(*SHAPES, dtype=dtype), **options)
    steps_of(straight, 6)
    truth, _ = follow(start, [np.zeros(s) for s in SHAPES], taken, **options)
    assert distance(params_of(two), truth) <= 1.5 * distance(params_of(straight), truth)


@torch_only
@pytest.mark.parametrize(
    "options",
    [
        {"lr": -1.0},
        {"lr": torch.ones(2)},
        {"momentum": -0.5},
        {"weight_decay": -1.0},
        {"adjust_lr_fn": "x"},
    ],
    ids=str,
)
def test_bad_arguments_as_torch_has_them(options):
    errors = []
    for cls in (torch.optim.Muon, Muon, NorMuon):
        with pytest.raises(ValueError) as caught:
            cls(parameters((3, 3)), **options)
        errors.append(str(caught.value))
    assert errors[1].startswith(errors[0]) and errors[2] == errors[1]


BAD = [
    ({"params": parameters((3,))}, ValueError, r"parameter 0 \(shape \(3,\)\).*param_groups_for"),
    ({"params": [("x.bias", parameters((3,))[0])]}, ValueError, "'x.bias'.*fewer than two axes"),
    ({"partition": "row"}, ValueError, r"parameter 0 \(shape \(6, 4\)\).*does not cut matrices"),
    ({"partition": Heads(n=5)}, ValueError, r"parameter 0.*Heads\(n=5\)"),
    ({"partition": {}}, ValueError, "parameter 0.*no entry"),
    ({"eps": -1.0}, ValueError, "eps is -1.0"),
    ({"state_dtype": torch.float16}, ValueError, "state_dtype is torch.float16"),
    ({"ns_steps": 0}, ValueError, "steps is 0"),
    ({"ns_method": "x"}, ValueError, "method is 'x'"),
    ({"ns_coefficients": (1.0, 2.0)}, ValueError, "coefficients is"),
    ({"momentum_form": "x"}, ValueError, "momentum_form is 'x'"),
    ({"algorithm": "x"}, ValueError, "algorithm is 'x'"),
    ({"algorithm": "adamw", "lr": -1.0}, ValueError, "lr is -1.0"),
    ({"algorithm": "adamw", "betas": (0.9, 1.0)}, ValueError, r"betas\[1\] is 1.0"),
    ({"algorithm": "adamw", "momentum": 0.9}, ValueError, r"no options \['momentum'\]"),
]  # fmt: skip


@pytest.mark.parametrize(("group", "error", "message"), BAD, ids=lambda x: str(x)[:50])
def test_bad_groups(group, error, message):
    optimizer = Muon(parameters((3, 3)))
    named = isinstance(group.get("params", [0])[0], tuple)
    if named:
        optimizer = Muon([("y", parameters((3, 3))[0])])
    with pytest.raises(error, match=message):
        optimizer.add_param_group({"params": parameters((6, 4)), **group})
    assert len(optimizer.param_groups) == 1
    with pytest.raises(error, match=message):
        Muon([{"params": parameters((6, 4)), **group}])


def test_unknown_arguments():
    with pytest.raises(TypeError, match="beta2"):
        Muon(parameters((3, 3)), beta2=0.9)
    with pytest.raises(TypeError, match=r"adamw has.*'momentum'"):
        Muon(parameters((3, 3)), adamw={"momentum": 0.9})
    with pytest.raises(ValueError, match=r"beta2 is 1\.5"):
        NorMuon(parameters((3, 3)), beta2=1.5)


def mixed(cls=NorMuon, steps=0, dtype=torch.float32, **options):
    """Matrices for Muon, cut or not, and an embedding and a gain for AdamW."""
    matrices = parameters((12, 8), (9, 5), (3, 4, 5), dtype=dtype)
    others = parameters((7, 6), (9,), dtype=dtype, seed=5)
    kinds = {matrices[0]: QKV, matrices[1]: "tensor", matrices[2]: Each("tensor")}
    groups = [
        {"params": matrices, "partition": kinds},
        {"params": others, "algorithm": "adamw", "lr": 0.01},
    ]
    return run_alone(cls(groups, **{**OPTIONS, **options}), steps)


def test_adamw_beside_muon():
    optimizer = mixed(Muon, adamw={"weight_decay": 0.5})
    adamw = AdamW(
        parameters((7, 6), (9,), seed=5),
        lr=0.01,
        betas=(0.9, 0.95),
        eps=1e-10,
        weight_decay=0.5,
    )
    group = optimizer.param_groups[1]
    assert "momentum" not in group and "partition" not in group
    alone = Muon(parameters((12, 8), (9, 5), (3, 4, 5)), **OPTIONS)
    alone.param_groups[0]["partition"] = optimizer.param_groups[0]["partition"]
    for _ in range(4):
        grads = draw(params_of(optimizer), 1)
        set_grads(optimizer, grads)
        set_grads(alone, grads[:3])
        set_grads(adamw, grads[3:])
        for x in (optimizer, alone, adamw):
            x.step()
    together = snapshot(optimizer)
    assert together[:3] == snapshot(alone)
    assert [p for p, _ in together[3:]] == [p for p, _ in snapshot(adamw)]


def test_nothing_is_written_if_either_part_is_bad():
    for bad, message in ((0, r"param_groups\[0\]"), (4, r"param_groups\[1\]")):
        optimizer = mixed(steps=1)
        before = snapshot(optimizer)
        params = params_of(optimizer)
        set_grads(optimizer, draw(params, 3))
        key = "momentum_buffer" if bad == 0 else "exp_avg"
        optimizer.state[params[bad]][key] = optimizer.state[params[bad]][key].to(torch.int32)
        with pytest.raises(TypeError, match=message):
            optimizer.step()
        after = snapshot(optimizer)
        assert [p for p, _ in after] == [p for p, _ in before]
        good = [i for i in range(5) if i != bad]
        assert [after[i] for i in good] == [before[i] for i in good]


SHARED = [  # of a matrix, and of an embedding
    *[("params", "params"), ("params", "exp_avg"), ("momentum_buffer", "params")],
    *[("row_sq", "exp_avg_sq"), ("momentum_buffer", "step"), ("grads", "params")],
    *[("params", "grads"), ("row_sq", "grads")],
]


def replace(optimizer, p, what, tensor):
    if what == "params":
        p.data = tensor
    elif what == "grads":
        p.grad = tensor
    else:
        optimizer.state[p][what] = tensor


def shape_of(optimizer, p, what):
    return p.shape if what in ("params", "grads") else optimizer.state[p][what].shape


@pytest.mark.parametrize(("first", "second"), SHARED)
def test_memory_shared_across_muon_and_adamw_is_found(first, second):
    """Where it comes to be shared after steps that passed, by a new gradient or a new state."""
    optimizer = mixed(steps=2)
    matrix, embedding = params_of(optimizer)[0], params_of(optimizer)[3]
    set_grads(optimizer, draw(params_of(optimizer), 3))
    buffer = torch.ones(200)
    for p, what, at in ((matrix, first, 0), (embedding, second, 1)):
        shape = shape_of(optimizer, p, what)
        replace(optimizer, p, what, buffer[at : at + shape.numel()].view(shape))
    before = [p.detach().clone() for p in params_of(optimizer)]
    with pytest.raises(ValueError, match=r"is written, but shares memory with"):
        optimizer.step()
    assert all(map(torch.equal, before, params_of(optimizer)))
    # what shares memory no more passes again, and so do neighbours without a gap
    shape = shape_of(optimizer, embedding, second)
    start = shape_of(optimizer, matrix, first).numel()
    replace(optimizer, embedding, second, buffer[start : start + shape.numel()].view(shape))
    optimizer.step()
    assert not torch.equal(before[0], matrix)


def test_gradients_may_be_shared_across_muon_and_adamw():
    optimizer = mixed(steps=1)
    matrix, embedding = params_of(optimizer)[0], params_of(optimizer)[3]
    set_grads(optimizer, draw(params_of(optimizer), 3))
    matrix.grad = torch.ones(96).view(12, 8)
    embedding.grad = matrix.grad.view(-1)[:42].view(7, 6)
    optimizer.step()


def test_columns_of_one_matrix_may_be_interleaved_across_muon_and_adamw():
    whole = torch.randn(12, 14)
    left, right = torch.nn.Parameter(whole[:, :8]), torch.nn.Parameter(whole[:, 8:])
    right.data = whole[:, 8:]
    left.data = whole[:, :8]
    optimizer = Muon([{"params": [left]}, {"params": [right], "algorithm": "adamw"}])
    for _ in range(2):
        set_grads(optimizer, draw([left, right], 1))
        optimizer.step()
    right.data = whole[:, 7:13]
    with pytest.raises(ValueError, match="shares memory"):
        optimizer.step()


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("state_dtype", [None, torch.float32])
def test_a_checkpoint_continues_bit_for_bit(cls, dtype, state_dtype):
    options = {"dtype": dtype, "state_dtype": state_dtype}
    straight, saved, loaded = (mixed(cls, n, **options) for n in (5, 3, 0))
    with torch.no_grad():
        for p, q in zip(params_of(loaded), params_of(saved), strict=True):
            p.copy_(q)
    loaded.load_state_dict(through_a_file(saved.state_dict()))
    assert loaded.param_groups[0]["partition"] == saved.param_groups[0]["partition"]
    assert snapshot(run_alone(loaded, 2, seed=4)) == snapshot(straight)


def test_another_partition_or_algorithm_is_refused():
    saved = through_a_file(mixed(steps=1).state_dict())
    other = mixed(steps=1)
    other.param_groups[0]["partition"][0] = partitions.parse("tensor")
    before = snapshot(other)
    with pytest.raises(ValueError, match=r"saved with partition \[\(slice.*has 'tensor'"):
        other.load_state_dict(saved)
    saved["param_groups"][1]["algorithm"] = "muon"
    with pytest.raises(ValueError, match=r"param_groups\[1\].*'muon'.*'adamw'"):
        mixed(steps=1).load_state_dict(saved)
    assert snapshot(other) == before


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_continue(duplicate, cls):
    straight, half = (mixed(cls, n, adamw={"weight_decay": 0.3}) for n in (5, 3))
    again = duplicate(half)
    assert snapshot(run_alone(again, 2, seed=4)) == snapshot(straight)
    again.add_param_group({"params": parameters((3,)), "algorithm": "adamw"})
    assert again.param_groups[-1]["weight_decay"] == 0.3


def test_groups_added_later_and_missing_gradients():
    optimizer = NorMuon(parameters((6, 4), (5, 5)), **OPTIONS)
    run_alone(optimizer, 2)
    late = parameters((5, 2), seed=3)
    optimizer.add_param_group({"params": late, "lr": 0.1, "axis": "short"})
    before = bits(params_of(optimizer)[0])
    set_grads(optimizer, [None, *draw(params_of(optimizer), seed=9)[1:]])
    optimizer.step()
    assert bits(params_of(optimizer)[0]) == before
    assert optimizer.state[late[0]]["row_sq"].shape == (5,)


def test_appended_parameters_are_refused():
    optimizer = run_alone(Muon(parameters((6, 4))), 1)
    optimizer.param_groups[0]["params"].append(parameters((3, 3))[0])
    with pytest.raises(ValueError, match=r"param_groups\[0\] has 2 parameters.*1 entries"):
        optimizer.step()


def test_closures_hooks_schedulers_and_tensor_lr():
    optimizer = Muon(parameters((6, 4)), lr=torch.tensor(0.1))
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    p = params_of(optimizer)[0]

    def closure():
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    start = float(p.detach().square().sum())
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    assert optimizer.step(closure).item() == pytest.approx(start)
    assert calls == ["before", "after"]
    schedule.step()
    assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(0.05)
    assert optimizer.step(closure).item() < start


def test_grad_scale_and_found_inf():
    """What torch.amp.GradScaler sets on optimizers that unscale by themselves."""
    plain, scaled = mixed(), mixed()
    grads = draw(params_of(plain), 1)
    set_grads(plain, grads)
    plain.step()
    set_grads(scaled, [g * 1024 for g in grads])
    scaled.grad_scale, scaled.found_inf = torch.tensor(1024.0), torch.tensor(0.0)
    scaled.step()
    assert snapshot(scaled) == snapshot(plain)
    scaled.found_inf = torch.tensor(1.0)
    scaled.step()
    assert snapshot(scaled) == snapshot(plain)


def test_threads_change_no_bit():
    results = []
    for count in (1, 2, 5):
        with threads(count):
            results.append(
                snapshot(run_alone(NorMuon(parameters((300, 257), (64, 500)), **OPTIONS), 2))
            )
    assert results[0] == results[1] == results[2]


def test_nothing_keeps_gradients_or_the_optimizer_alive():
    optimizer = mixed(steps=2)
    gone = [weakref.ref(optimizer), *(weakref.ref(p.grad) for p in params_of(optimizer))]
    for p in params_of(optimizer):
        p.grad = None
    gc.collect()
    assert all(ref() is None for ref in gone[1:])
    del optimizer, p
    gc.collect()
    assert gone[0]() is None


def test_convolutions_and_channels_last():
    plain, permuted = (
        torch.nn.Conv2d(4, 6, 3, bias=False),
        torch.nn.Conv2d(4, 6, 3, bias=False).to(memory_format=torch.channels_last),
    )
    permuted.load_state_dict(plain.state_dict())
    optimizers = [Muon(m.parameters(), **OPTIONS) for m in (plain, permuted)]
    for step in range(3):
        grad = draw([plain.weight], step)[0]
        plain.weight.grad = grad
        permuted.weight.grad = grad.contiguous(memory_format=torch.channels_last)
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(plain.weight, permuted.weight)
    assert permuted.weight.is_contiguous(memory_format=torch.channels_last)
