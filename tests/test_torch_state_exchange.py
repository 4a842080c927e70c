"""An optimizer's state in torch users' hands: moved, replaced, saved, loaded, copied between steps.

As in `test_torch_optim_infos.py`, the class under test is the one imported here, and
torch.optim.AdamW's for-loop passes the suite in its place.
"""

import copy
import io
import pickle
from collections import defaultdict
from itertools import product

import pytest
import torch
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from fusedopt.optim import AdamW
from optim_helpers import (
    DTYPES,
    EVERY_OPTION,
    Race,
    bits,
    parameters,
    params_of,
    run_alone,
    safe,
    snapshot,
    states_of,
    torch_fused,
    torch_loop,
)

pytestmark = pytest.mark.usefixtures("one_thread")


# ---- things users do between two steps

EVENTS = []  # functions of an optimizer, each registered by its decorator


@EVENTS.append
def parameters_swapped(optimizer):
    """`torch.utils.swap_tensors`, as modules use it in `.to()`; a held reference forbids it."""
    for p in params_of(optimizer):
        torch.utils.swap_tensors(p, torch.nn.Parameter(p.detach().clone()))


@EVENTS.append
def parameter_data_moved(optimizer):
    for p in params_of(optimizer):
        p.data = p.data.clone()


@EVENTS.append
def model_made_channels_last(optimizer):
    """The states keep their old strides."""
    for p in params_of(optimizer):
        if p.dim() == 4:
            p.data = p.data.to(memory_format=torch.channels_last)


@EVENTS.append
def state_data_moved(optimizer):
    """`optimizer_to(device)` of the forums: new memory under the same tensors."""
    for state in states_of(optimizer):
        for value in state.values():
            value.data = value.data.clone()


@EVENTS.append
def state_tensors_replaced(optimizer):
    for state in states_of(optimizer):
        state.update({key: value.clone() for key, value in state.items()})


@EVENTS.append
def state_dicts_replaced(optimizer):
    for p in params_of(optimizer):
        optimizer.state[p] = {key: value.clone() for key, value in optimizer.state[p].items()}


@EVENTS.append
def whole_state_replaced(optimizer):
    optimizer.state = defaultdict(dict, copy.copy(optimizer.state))


@EVENTS.append
def state_cleared(optimizer):
    optimizer.state.clear()


@EVENTS.append
def one_state_deleted(optimizer):
    del optimizer.state[params_of(optimizer)[1]]


@EVENTS.append
def steps_set(optimizer):
    for state in states_of(optimizer):
        state["step"].fill_(7.0)


@EVENTS.append
def steps_differ(optimizer):
    for i, state in enumerate(states_of(optimizer)):
        state["step"] = torch.tensor(float(10 + i))


@EVENTS.append
def options_changed(optimizer):
    for group in optimizer.param_groups:
        group.update(lr=0.05, betas=(0.7, 0.9), eps=1e-2, weight_decay=0.2, maximize=False)


@EVENTS.append
def amsgrad_turned_off(optimizer):
    optimizer.param_groups[0]["amsgrad"] = False


@EVENTS.append
def group_replaced(optimizer):
    optimizer.param_groups[0] = dict(optimizer.param_groups[0])


@EVENTS.append
def parameters_reordered(optimizer):
    optimizer.param_groups[0]["params"].reverse()


@EVENTS.append
def parameter_removed(optimizer):
    del optimizer.param_groups[0]["params"][1]


@EVENTS.append
def parameter_appended(optimizer):
    optimizer.param_groups[0]["params"] += parameters((6, 7), seed=5)


@EVENTS.append
def parameters_replaced(optimizer):
    """Accelerate puts new parameters in the place of the old; these start without states."""
    group = optimizer.param_groups[0]
    group["params"] = parameters(*(p.shape for p in group["params"]), seed=6)


@EVENTS.append
def group_added(optimizer):
    optimizer.add_param_group({"params": parameters((6, 7), seed=5), "lr": 0.3, "amsgrad": False})


@EVENTS.append
def parameter_frozen_with_its_gradient(optimizer):
    params_of(optimizer)[0].requires_grad_(False)


@EVENTS.append
def own_state_loaded(optimizer):
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


@pytest.mark.parametrize("event", EVENTS)
def test_between_steps(event):
    """Whatever was remembered of the tensors must be noticed to be out of date.

    Dion's multi-tensor cache was keyed by addresses, which the allocator uses again (its PR 63).
    """
    race = Race(AdamW, lambda: parameters((33,), (4, 5), (4, 6, 3, 5)), **EVERY_OPTION).run(3)
    race.both(event)
    race.run(3).check()


def test_moved_data_leaves_the_old_alone():
    [p] = parameters((33,))
    optimizer = AdamW([p])
    p.grad = torch.ones_like(p)
    optimizer.step()
    old, before = p.data, bits(p)
    p.data = p.data.clone()
    optimizer.step()
    assert bits(old) == before != bits(p)


# ---- state


def through_a_file(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


EXCHANGES = [
    pytest.param(torch_loop, AdamW, id="loop to ours"),
    pytest.param(torch_fused, AdamW, id="fused to ours"),
    pytest.param(AdamW, torch_loop, id="ours to loop"),
    pytest.param(AdamW, AdamW, id="ours to ours"),
]


@pytest.mark.parametrize("transport", [copy.deepcopy, through_a_file])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("source", "target"), EXCHANGES)
def test_state_dicts_load_both_ways(source, target, dtype, transport):
    """Three steps with one class and three with the other are six of the loop's."""
    kwargs = safe(EVERY_OPTION, dtype)
    race = Race(source, lambda: parameters((33,), (4, 5), (), dtype=dtype), **kwargs).run(3)
    state = transport(race.ours.state_dict())
    race.ours = target(params_of(race.ours))
    race.ours.load_state_dict(state)
    race.run(3).check()


def test_reloading_changes_no_bit():
    """Also when the two optimizers then share the loaded state tensors, as torch has it."""
    straight, reloaded = (AdamW(parameters((33,), (4, 5)), **EVERY_OPTION) for _ in range(2))
    run_alone(straight, 6)
    run_alone(reloaded, 3)
    successor = AdamW(params_of(reloaded))
    successor.load_state_dict(reloaded.state_dict())
    assert snapshot(run_alone(successor, 3, seed=4)) == snapshot(straight)


OLD_CHECKPOINTS = []


@OLD_CHECKPOINTS.append
def steps_were_integers(checkpoint):
    for state in checkpoint["state"].values():
        state["step"] = int(state["step"])


@OLD_CHECKPOINTS.append
def steps_were_floats(checkpoint):
    for state in checkpoint["state"].values():
        state["step"] = float(state["step"])


@OLD_CHECKPOINTS.append
def steps_were_float64(checkpoint):
    """As `torch.set_default_dtype(torch.float64)` makes them."""
    for state in checkpoint["state"].values():
        state["step"] = state["step"].double()


@OLD_CHECKPOINTS.append
def options_were_fewer(checkpoint):
    known = ["lr", "betas", "eps", "weight_decay", "params"]
    checkpoint["param_groups"] = [{k: g[k] for k in known} for g in checkpoint["param_groups"]]


@OLD_CHECKPOINTS.append
def a_scheduler_left_its_mark(checkpoint):
    checkpoint["param_groups"][0]["initial_lr"] = 0.5


@OLD_CHECKPOINTS.append
def parameters_had_names(checkpoint):
    checkpoint["param_groups"][0]["param_names"] = ["weight", "bias"]


@OLD_CHECKPOINTS.append
def a_parameter_had_no_state(checkpoint):
    del checkpoint["state"][1]


@OLD_CHECKPOINTS.append
def nothing_had_a_state(checkpoint):
    checkpoint["state"].clear()


@pytest.mark.parametrize("age", OLD_CHECKPOINTS)
def test_old_checkpoints(age):
    race = Race(AdamW, lambda: parameters((33,), (4, 5)), lr=0.02).run(3)
    checkpoint = copy.deepcopy(race.loop.state_dict())
    age(checkpoint)
    race = Race(AdamW, lambda: parameters((33,), (4, 5)))
    race.both(lambda optimizer: optimizer.load_state_dict(copy.deepcopy(checkpoint)))
    race.run(3).check()


def test_named_parameters():
    model = torch.nn.Linear(4, 3)
    optimizer = run_alone(AdamW(model.named_parameters()), 1)
    assert optimizer.param_groups[0]["param_names"] == ["weight", "bias"]
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == ["weight", "bias"]


def test_states_are_torchs():
    """Names, order, dtypes, shapes and devices of the states; the step is a float32 on the CPU."""
    race = Race(AdamW, lambda: parameters((4, 5), (), dtype=torch.bfloat16), amsgrad=True).run(1)
    ours, loop = race.both(
        lambda optimizer: [
            [(key, value.dtype, value.shape, value.device) for key, value in state.items()]
            for state in states_of(optimizer)
        ]
    )
    assert ours == loop


COPIES = {
    "pickle": lambda optimizer: pickle.loads(pickle.dumps(optimizer)),
    "deepcopy": copy.deepcopy,
}


@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("steps", [0, 3])
def test_copies_go_their_own_way(duplicate, steps):
    """A copy in the middle of training continues alike, and in memory of its own."""
    original = run_alone(AdamW(parameters((33,), (4, 5)), **EVERY_OPTION), steps)
    twin = duplicate(original)
    before = snapshot(original)
    after = snapshot(run_alone(twin, 3))
    assert snapshot(original) == before
    assert snapshot(run_alone(original, 3)) == after


def hook_events(optimizer_class):
    """What a run of every kind of hook writes down."""
    log = []

    def note(name):
        return lambda optimizer, *args: log.append((name, len(args), len(optimizer.state)))

    def with_closure(optimizer, args, kwargs):
        log.append("arguments replaced")
        return (optimizer, lambda: log.append("closure") or 5.0), kwargs

    def smaller_lr(optimizer, checkpoint):
        checkpoint["param_groups"][0]["lr"] /= 2
        return checkpoint

    optimizer = optimizer_class(parameters((4, 5)), lr=0.5)
    handles = [register_optimizer_step_pre_hook(note("global step pre"))]
    handles += [register_optimizer_step_post_hook(note("global step post"))]
    for kind, when in product(["step", "state_dict", "load_state_dict"], ["pre", "post"]):
        register = getattr(optimizer, f"register_{kind}_{when}_hook")
        handles.append(register(note(f"{kind} {when}")))
    optimizer.register_step_pre_hook(with_closure)
    optimizer.register_state_dict_post_hook(smaller_lr)
    run_alone(optimizer, 2)
    log.append(optimizer.step())
    optimizer.load_state_dict(optimizer.state_dict())
    for handle in handles:
        handle.remove()
    run_alone(optimizer, 1)
    return [*log, optimizer.param_groups[0]["lr"]]


def test_hooks():
    events = hook_events(AdamW)
    assert events == hook_events(torch_loop)
    assert {"arguments replaced", "closure", 5.0, 0.25} <= set(events)
