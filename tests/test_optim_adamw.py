"""What `fusedopt.optim.AdamW` has beyond torch's: `state_dtype`, errors that name their tensor,
steps that happen entirely or not at all, bits that depend on nothing but the numbers.

Agreement with torch stands in `test_torch_optim_infos.py`.
"""

import copy
import gc
import io
import multiprocessing
import os
import pickle
import re
import threading
import tracemalloc
import weakref

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode

import fusedopt
from fusedopt.optim import AdamW
from fusedopt.optim.adamw import init_state
from optim_helpers import (
    DTYPES,
    STATE_KEYS,
    Model,
    Race,
    assert_accurate,
    bits,
    draw,
    parameters,
    params_of,
    pooled,
    run_alone,
    set_grads,
    snapshot,
    states_of,
    threads,
    torch_loop,
)

OPTIONS = {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.3, "amsgrad": True}


# ---- state_dtype, and gradients of another dtype than the parameter


def check_against_plain(optimizer, param_dtype, state_dtype, steps=50, grad_dtype=None):
    """The error after `steps` is at most twice that of the plain formula with this storage."""
    params = params_of(optimizer)
    wide = torch.float64 in (param_dtype, state_dtype)
    truth, plain = Model(), Model(np.float64 if wide else np.float32, param_dtype, state_dtype)
    for t in range(steps):
        grads = draw(params, seed=t + 1, scale=1 / (1 + t / 4))
        set_grads(optimizer, [grad.to(grad_dtype or grad.dtype) for grad in grads])
        truth.step(optimizer)
        plain.step(optimizer)
        optimizer.step()
    for key, got in pooled(optimizer).items():
        want, other = (pooled(optimizer, model.value)[key] for model in (truth, plain))
        assert_accurate(got, other, want, key[1], key)


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("options", [{}, OPTIONS], ids=["defaults", "options"])
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_state_dtype(dtype, state_dtype, options):
    optimizer = AdamW(
        parameters((67,), (4, 5), dtype=dtype), state_dtype=state_dtype, **options | {"eps": 1e-3}
    )
    check_against_plain(optimizer, dtype, state_dtype)
    for state in states_of(optimizer):
        assert {state[key].dtype for key in STATE_KEYS if key in state} == {state_dtype}
        assert state["step"].dtype is torch.float32
        assert state["step"].shape == ()


@pytest.mark.usefixtures("device")
@pytest.mark.skipif(not hasattr(torch.Tensor, "grad_dtype"), reason="torch fixes the dtype")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("grad_dtype", DTYPES, ids=str)
def test_gradient_dtypes(dtype, grad_dtype):
    params = parameters((67,), (4, 5), dtype=dtype)
    for p in params:
        p.grad_dtype = grad_dtype
    optimizer = AdamW(params, **OPTIONS)
    check_against_plain(optimizer, dtype, dtype, steps=10, grad_dtype=grad_dtype)


def test_float32_states_keep_what_bfloat16_loses():
    """With beta2 = 0.999 a bfloat16 second moment never decays: 0.1 % is less than half an ulp."""
    [p], [q] = (parameters((1,), dtype=torch.bfloat16) for _ in range(2))
    optimizers = [AdamW([p], state_dtype=torch.float32), AdamW([q])]
    for optimizer in optimizers:
        for grad in (100.0, *[0.0] * 200):
            set_grads(optimizer, [torch.tensor([grad], dtype=torch.bfloat16)])
            optimizer.step()
    wide, narrow = (float(states_of(optimizer)[0]["exp_avg_sq"]) for optimizer in optimizers)
    assert wide == pytest.approx(10 * 0.999**200, rel=1e-3)
    assert narrow == 10.0


def through_a_file(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def bfloat16_run(steps, **kwargs):
    params = parameters((67,), (4, 5), dtype=torch.bfloat16)
    return run_alone(AdamW(params, **OPTIONS, **kwargs), steps)


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("given_again", [False, True])
def test_state_dtype_survives_a_checkpoint(given_again):
    """torch casts loaded states to the parameter's dtype; the lost bits would not come back."""
    straight, saved = (bfloat16_run(n, state_dtype=torch.float32) for n in (6, 3))
    loaded = AdamW(params_of(saved), state_dtype=torch.float32 if given_again else None)
    loaded.load_state_dict(through_a_file(saved.state_dict()))
    assert snapshot(run_alone(loaded, 3, seed=4)) == snapshot(straight)


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_state_dtype_survives_a_copy(duplicate):
    straight, half = (bfloat16_run(n, state_dtype=torch.float32) for n in (6, 3))
    assert snapshot(run_alone(duplicate(half), 3, seed=4)) == snapshot(straight)


@pytest.mark.usefixtures("device")
def test_torchs_checkpoint_gets_the_state_dtype():
    """A bfloat16 checkpoint continues in float32; every bfloat16 is a float32."""
    source = run_alone(torch_loop(parameters((67,), dtype=torch.bfloat16), **OPTIONS), 3)
    target = AdamW(params_of(source), state_dtype=torch.float32)
    target.load_state_dict(source.state_dict())
    for ours, theirs in zip(states_of(target), states_of(source), strict=True):
        for key in STATE_KEYS:
            assert ours[key].dtype is torch.float32
            assert torch.equal(ours[key], theirs[key].float())
    check_against_plain(target, torch.bfloat16, torch.float32, steps=3)


def test_torch_continues_from_wide_states():
    """torch rounds them to its parameters' dtype, and trains on."""
    source = bfloat16_run(3, state_dtype=torch.float32)
    target = torch_loop(params_of(source))
    target.load_state_dict(copy.deepcopy(source.state_dict()))
    for ours, theirs in zip(states_of(source), states_of(target), strict=True):
        assert torch.equal(theirs["exp_avg"], ours["exp_avg"].bfloat16())
    run_alone(target, 1)


def test_state_dtype_per_group():
    groups = [{"params": parameters((3,))}, {"params": parameters((3,)), "state_dtype": None}]
    optimizer = run_alone(AdamW(groups, state_dtype=torch.bfloat16), 1)
    dtypes = [state["exp_avg"].dtype for state in states_of(optimizer)]
    assert dtypes == [torch.bfloat16, torch.float32]


# ---- groups


def three_groups():
    """Options that differ in everything, dtypes that differ within a group."""
    shapes, dtypes = [(33,), (), (4, 5), (0,), (7,)], [*DTYPES, torch.float32]
    a, b, c = (parameters(*shapes, dtype=dtypes, seed=seed) for seed in range(3))
    return [
        {"params": a, "lr": 0.01},
        {"params": b, "lr": 0.1, "betas": (0.8, 0.95), "weight_decay": 0.3, "amsgrad": True},
        {"params": c, "lr": 0.03, "betas": (0.7, 0.9), "weight_decay": 0.0, "maximize": True},
    ]


@pytest.mark.usefixtures("device")
def test_three_groups_in_one_step():
    Race(AdamW, three_groups, eps=0.1).run(10).check()


@pytest.mark.usefixtures("device")
def test_steps_differ_within_a_list():
    """A group-level step gives late parameters the wrong bias correction (apex #1615)."""
    race = Race(AdamW, lambda: parameters(*[(7,)] * 12), **OPTIONS)
    for t in range(12):
        grads = draw(params_of(race.loop), seed=t + 1)
        race.step([grad if i <= t else None for i, grad in enumerate(grads)])
    race.check()


@pytest.mark.usefixtures("device")
def test_a_thousand_parameters_of_mixed_dtypes():
    shapes, dtypes = [(1 + i % 13,) for i in range(1000)], (DTYPES * 250)[:1000]
    Race(AdamW, lambda: parameters(*shapes, dtype=dtypes), eps=0.1).run(3).check()


# ---- bits that depend on nothing but the numbers

LAYOUTS = {
    "contiguous": lambda x: x.clone(),
    "transposed": lambda x: x.t().contiguous().t(),
    "misaligned": lambda x: torch.cat([x.new_zeros(1), x.reshape(-1)])[1:].view(x.shape),
    "with gaps": lambda x: torch.stack([x, x], -1)[..., 0],
}
TENSORS = st.tuples(
    st.tuples(st.integers(0, 40), st.integers(0, 5)),  # shape
    st.sampled_from(DTYPES),
    st.sampled_from(list(LAYOUTS.values())),  # the parameter's
    st.sampled_from(list(LAYOUTS.values())),  # its gradients'
    st.booleans(),  # whether it has one in the second step
)


def train(tensors, groups_of):
    """Everything after three steps; one optimizer for each of the lists that `groups_of` makes."""
    shapes, dtypes, layouts, grad_layouts, always = zip(*tensors, strict=True)
    values = parameters(*shapes, dtype=list(dtypes))
    params = [
        layout(p.detach()).requires_grad_() for layout, p in zip(layouts, values, strict=True)
    ]
    optimizers = [AdamW(group, **OPTIONS) for group in groups_of(params)]
    for t in range(3):
        grads = draw(params, seed=t + 1)
        for p, grad, layout, here in zip(params, grads, grad_layouts, always, strict=True):
            p.grad = layout(grad) if here or t != 1 else None
        for optimizer in optimizers:
            optimizer.step()
    return [entry for optimizer in optimizers for entry in snapshot(optimizer)]


@pytest.mark.usefixtures("device")
@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(TENSORS, min_size=1, max_size=8), st.integers(1, 3))
def test_neighbours_and_layouts_change_no_bit(tensors, count):
    """A list in any layouts is, bit for bit, each tensor alone and contiguous."""
    plain = LAYOUTS["contiguous"]
    alone = [(shape, dtype, plain, plain, always) for shape, dtype, _, _, always in tensors]
    with threads(count):
        together = train(tensors, lambda params: [params])
    assert together == train(alone, lambda params: [[p] for p in params])


def big_run(seed, steps=3):
    params = parameters((70001,), (33,), dtype=[torch.float32, torch.bfloat16], seed=seed)
    return run_alone(AdamW(params, **OPTIONS), steps)


def test_two_optimizers_in_two_threads():
    results = {}

    def work(seed):
        results[seed] = snapshot(big_run(seed))

    pair = [threading.Thread(target=work, args=[seed]) for seed in (1, 2)]
    for thread in pair:
        thread.start()
    for thread in pair:
        thread.join()
    assert results == {seed: snapshot(big_run(seed)) for seed in (1, 2)}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork")
def test_forked_child_after_use():
    """A pool's threads are not in the child; one that waits for them hangs, as libgomp's does."""
    optimizer = big_run(seed=1)
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()

    def child():
        optimizer.step()
        theirs.send([p.detach().view(torch.uint8).numpy().tobytes() for p in params_of(optimizer)])

    process = context.Process(target=child)
    process.start()
    try:
        assert ours.poll(30), "the child hangs"
        optimizer.step()
        assert ours.recv() == [bits(p) for p in params_of(optimizer)]
    finally:
        process.kill()
        process.join()


# ---- what is kept


def test_nothing_keeps_gradients_or_the_optimizer_alive():
    """A plan that owned tensors would keep each step's gradients until the next."""
    optimizer = run_alone(AdamW(parameters((33,), (4, 5)), **OPTIONS), 2)
    gradients = [weakref.ref(p.grad) for p in params_of(optimizer)]
    states = [weakref.ref(value) for state in states_of(optimizer) for value in state.values()]
    params = [weakref.ref(p) for p in params_of(optimizer)]
    optimizer.zero_grad(set_to_none=True)
    assert [reference() for reference in gradients] == [None, None]
    del optimizer
    gc.collect()
    assert {reference() for reference in states + params} == {None}


def test_memory_does_not_grow():
    """What our lines hold in Python after 1000 steps against 500: no byte per step is added."""
    optimizer = run_alone(AdamW(parameters(*[(7,)] * 50)), 5)
    grads = [draw(params_of(optimizer), seed) for seed in range(2)]
    ours = tracemalloc.Filter(True, os.path.join(os.path.dirname(fusedopt.__file__), "*"))
    tracemalloc.start()
    sizes = []
    for t in range(1000):
        set_grads(optimizer, grads[t % 2])
        optimizer.step()
        if t % 500 == 499:
            gc.collect()
            traces = tracemalloc.take_snapshot().filter_traces([ours]).traces
            sizes.append(sum(trace.size for trace in traces))
    tracemalloc.stop()
    assert sizes[1] - sizes[0] < 500


# ---- refusals: by name, and before the first write

BREAKAGES = []


def breakage(message, error=ValueError):
    """Registers what breaks the fourth parameter of an optimizer, the second of its group 1."""

    def register(function):
        values = ("step_not_a_number", "scale_of_zero")
        marks = pytest.mark.host_counters if function.__name__ in values else ()
        BREAKAGES.append(pytest.param(function, error, message, id=function.__name__, marks=marks))
        return function

    return register


def last(optimizer):
    return params_of(optimizer)[3]


def last_state(optimizer):
    return states_of(optimizer)[3]


HERE = r"param_groups\[1\]\['params'\]\[1\]"
NEXT = r"param_groups\[1\]\['params'\]\[2\]"


@breakage(HERE + r".*'exp_avg'.*\(5,\), torch.float32.*shape differs from.*5, 4")
def state_of_another_shape(optimizer):
    last_state(optimizer)["exp_avg"] = torch.zeros(5)


@breakage(HERE + r".*'exp_avg_sq'.*\(5, 4\).*torch.int64", TypeError)
def state_of_integers(optimizer):
    last_state(optimizer)["exp_avg_sq"] = torch.zeros(5, 4, dtype=torch.int64)


@breakage(HERE + r".*'exp_avg_sq'.*\(5, 4\).*torch.float64.*torch.float32", TypeError)
def state_wider_than_its_parameter(optimizer):
    last_state(optimizer)["exp_avg_sq"] = torch.zeros(5, 4, dtype=torch.float64)


@breakage(HERE + r".*'exp_avg'.*missing", KeyError)
def state_missing(optimizer):
    del last_state(optimizer)["exp_avg"]


@breakage(r"param_groups\[1\]\['params'\]\[0\].*'max_exp_avg_sq'.*missing", KeyError)
def amsgrad_turned_on_later(optimizer):
    optimizer.param_groups[1]["amsgrad"] = True


@breakage(HERE + r".*'step'.*\(2,\)")
def step_with_two_elements(optimizer):
    last_state(optimizer)["step"] = torch.zeros(2)


@breakage(HERE + r".*'step'.*nan")
def step_not_a_number(optimizer):
    last_state(optimizer)["step"] = torch.tensor(float("nan"))


@breakage(HERE + r"\.grad.*\(5, 4\).*shape differs from.*\(2, 4\)")
def parameter_cut(optimizer):
    last(optimizer).data = last(optimizer).data[:2]


@breakage(HERE + r" .*\(5, 4\).*torch.float32.*no memory", TypeError)
def parameter_freed(optimizer):
    """FSDP frees storages by resizing them to nothing; their address is then NULL."""
    last(optimizer).untyped_storage().resize_(0)


@breakage(HERE + r"\.grad.*\(5, 4\).*torch.float32.*no memory", TypeError)
def gradient_freed(optimizer):
    last(optimizer).grad.untyped_storage().resize_(0)


@breakage(HERE + r".*'exp_avg.*' is written, but shares memory with " + HERE + ".*'exp_avg")
def one_tensor_for_two_states(optimizer):
    last_state(optimizer)["exp_avg"] = last_state(optimizer)["exp_avg_sq"]


@breakage(HERE + r".*'exp_avg'.*share memory.*strides")
def state_expanded(optimizer):
    last_state(optimizer)["exp_avg"] = torch.zeros(1, 4).expand(5, 4)


@breakage(HERE + r".*'exp_avg'.*str", TypeError)
def state_not_a_tensor(optimizer):
    last_state(optimizer)["exp_avg"] = "zeros"


@breakage(HERE + r".*'exp_avg'.*\(5, 4\).*meta", TypeError)
def state_on_meta(optimizer):
    last_state(optimizer)["exp_avg"] = torch.zeros(5, 4, device="meta")


@breakage(r"sparse gradients", RuntimeError)
def gradient_sparse(optimizer):
    last(optimizer).grad = last(optimizer).grad.to_sparse()


@breakage(r"shares memory with param_groups\[")
def parameter_in_two_groups(optimizer):
    optimizer.param_groups[1]["params"].append(params_of(optimizer)[0])


def append(optimizer, p):
    """One more parameter, with a gradient."""
    p.grad = torch.ones_like(p)
    optimizer.param_groups[1]["params"].append(p)


@breakage(NEXT + r".*\(3,\).*torch.int32", TypeError)
def parameter_of_integers(optimizer):
    append(optimizer, torch.ones(3, dtype=torch.int32))


@breakage(NEXT + r".*\(3,\).*torch.float8_e4m3fn.*not supported", TypeError)
def parameter_of_float8(optimizer):
    optimizer.param_groups[1]["params"].append(p := torch.ones(3).to(torch.float8_e4m3fn))
    p.grad = p.clone()


@breakage(NEXT + r".*\(3,\).*torch.float32.*meta", TypeError)
def parameter_on_meta(optimizer):
    append(optimizer, torch.nn.Parameter(torch.ones(3, device="meta")))


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
@breakage(NEXT + r".*\(3,\).*torch.float32.*FakeTensor", TypeError)
def parameter_fake(optimizer):
    """A FakeTensor exports NULL for its memory, without an error."""
    with FakeTensorMode():
        append(optimizer, torch.nn.Parameter(torch.ones(3)))


@breakage(NEXT + r".*\(3, 4\).*share memory.*strides")
def parameter_expanded(optimizer):
    append(optimizer, torch.ones(1, 4).expand(3, 4).requires_grad_())


@breakage(r"grad_scale is 0")
def scale_of_zero(optimizer):
    optimizer.grad_scale = torch.tensor(0.0)


@pytest.mark.parametrize(("function", "error", "message"), BREAKAGES)
def test_refused_by_name_and_before_the_first_write(function, error, message):
    """What is wrong comes last; the three parameters before it, of two groups, stay as they are."""
    first, second = parameters((3,), (4, 5)), parameters((2, 2), (5, 4), seed=1)
    optimizer = run_alone(AdamW([{"params": first}, {"params": second}]), 1)
    sound = [*first, second[0]]
    before = [bits(t) for p in sound for t in (p, *optimizer.state[p].values())]
    function(optimizer)
    with pytest.raises(error) as caught:
        optimizer.step()
    assert re.search(message, str(caught.value))
    assert "\nframe #" not in str(caught.value), "C++ stack trace"
    assert before == [bits(t) for p in sound for t in (p, *optimizer.state[p].values())]


def test_a_refused_step_did_not_happen():
    """Also the first one, which makes the states: repaired, training goes as if nothing was."""
    straight, stumbling = (AdamW(parameters((33,), (4, 5)), **OPTIONS) for _ in range(2))
    for t in range(3):
        grads = draw(params_of(straight), seed=t + 1)
        stumbling.param_groups[0]["params"].append(intruder := torch.ones(3, dtype=torch.int32))
        set_grads(stumbling, [*grads, torch.ones_like(intruder)])
        with pytest.raises(TypeError, match="int32"):
            stumbling.step()
        stumbling.param_groups[0]["params"].pop()
        for optimizer in (straight, stumbling):
            set_grads(optimizer, grads)
            optimizer.step()
    assert snapshot(straight) == snapshot(stumbling)


BAD_ARGUMENTS = [
    ({"state_dtype": torch.float16}, "state_dtype is torch.float16.*torch.float32, torch.bfloat16"),
    ({"state_dtype": "bfloat16"}, "state_dtype is 'bfloat16'"),
    ({"differentiable": True}, "differentiable.*torch.optim.AdamW"),
]


PLACES = {
    "arguments": lambda group, options: AdamW([group], **options),
    "group": lambda group, options: AdamW([group | options]),
    "added group": lambda group, options: AdamW(parameters((5,))).add_param_group(group | options),
}


@pytest.mark.parametrize(("options", "message"), BAD_ARGUMENTS)
@pytest.mark.parametrize("construct", PLACES.values(), ids=PLACES)
def test_bad_arguments(options, message, construct):
    """Refused at construction, wherever they come from."""
    with pytest.raises(ValueError, match=message):
        construct({"params": parameters((3,))}, options)


# ---- loss scaling inside the kernel


@pytest.mark.usefixtures("device")
def test_found_inf_stops_everything():
    """Parameters, states and the counts of steps; also in the step that would make the states."""
    optimizer = AdamW(parameters((33,), (4, 5)), fused=True, **OPTIONS)
    for taken in range(2):
        optimizer.grad_scale, optimizer.found_inf = None, torch.tensor(1.0)
        before = [bits(p) for p in params_of(optimizer)]
        run_alone(optimizer, 1)
        assert before == [bits(p) for p in params_of(optimizer)]
        assert [float(state["step"]) for state in states_of(optimizer)] == [taken] * 2
        optimizer.found_inf = torch.tensor(0.0)
        run_alone(optimizer, 1)
        assert before != [bits(p) for p in params_of(optimizer)]


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_grad_scale(dtype):
    """A power of two scales without rounding: not one bit differs, and gradients are only read."""
    plain, scaled = (AdamW(parameters((33,), (4, 5), dtype=dtype), fused=True) for _ in range(2))
    assert scaled._step_supports_amp_scaling
    scaled.grad_scale = torch.tensor(1024.0)
    for t in range(3):
        grads = draw(params_of(plain), seed=t + 1)
        set_grads(plain, grads)
        set_grads(scaled, [grad * 1024 for grad in grads])
        before = [bits(p.grad) for p in params_of(scaled)]
        plain.step()
        scaled.step()
        assert before == [bits(p.grad) for p in params_of(scaled)]
    assert snapshot(plain) == snapshot(scaled)


# ---- where step counters lie


@pytest.mark.parametrize("flags", [{}, {"capturable": True}, {"fused": True}], ids=str)
def test_counters_are_made_where_torch_makes_them(flags):
    """On the CPU, or beside a parameter elsewhere (meta stands for a GPU), in one order with it."""
    params = [torch.nn.Parameter(torch.ones(3, device=d)) for d in ("cpu", "meta", "cpu", "meta")]
    state = {p: {} for p in params}
    options = {"amsgrad": False, "state_dtype": None, "capturable": False, "fused": None}
    init_state(state, {**options, **flags}, params)
    counters = [state[p]["step"] for p in params]
    wanted = [p.device.type if flags else "cpu" for p in params]
    assert [counter.device.type for counter in counters] == wanted
    assert {(counter.dtype, counter.shape) for counter in counters} == {(torch.float32, ())}
