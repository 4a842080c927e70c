"""What the suites of the torch optimizers share: AdamW in NumPy, torch's loop, and error bounds.

Nothing here is a guessed tolerance. The truth is AdamW in long double; an optimizer may be off by
twice what a plain implementation in the working precision is off by, plus one unit in the last
place. Where the plain implementation overflows or divides zero by zero, the same values are asked
for.
"""

import contextlib
import copy
from collections import defaultdict
from itertools import chain

import numpy as np
import torch

import where

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
STATE_KEYS = ["exp_avg", "exp_avg_sq", "max_exp_avg_sq"]
EVERY_OPTION = {
    "lr": 0.02,
    "betas": (0.8, 0.95),
    "eps": 1e-3,
    "weight_decay": 0.3,
    "amsgrad": True,
    "maximize": True,
}


def safe(kwargs, dtype):
    """float16 holds no small eps, and torch's loop would divide zero by zero: so torch's inputs."""
    return kwargs | {"eps": 0.1} if dtype is torch.float16 else kwargs


def torch_loop(params, **kwargs):
    """torch.optim.AdamW's for-loop, whichever implementation the arguments ask for."""
    return torch.optim.AdamW(params, **{**kwargs, "foreach": False, "fused": False})


def torch_fused(params, **kwargs):
    return torch.optim.AdamW(params, **kwargs, fused=True)


@contextlib.contextmanager
def threads(count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def params_of(optimizer):
    return list(chain.from_iterable(group["params"] for group in optimizer.param_groups))


def states_of(optimizer):
    return [optimizer.state.get(p, {}) for p in params_of(optimizer)]


def draw(like, seed, scale=1.0):
    """Normally distributed values of the shapes and dtypes of the tensors in `like`."""
    generator = torch.Generator().manual_seed(seed)
    return [_normal(t.shape, t.dtype, generator, scale) for t in like]


def _normal(shape, dtype, generator, scale):
    wide = torch.complex128 if dtype.is_complex else torch.float64
    return (torch.randn(shape, generator=generator, dtype=wide) * scale).to(where.device, dtype)


def parameters(*shapes, dtype=torch.float32, seed=0):
    """Parameters of these shapes: of one dtype, or of one each."""
    dtypes = dtype if isinstance(dtype, list) else [dtype] * len(shapes)
    like = [torch.empty(shape, dtype=d) for shape, d in zip(shapes, dtypes, strict=True)]
    return [torch.nn.Parameter(value) for value in draw(like, seed)]


def set_grads(optimizer, grads):
    for p, grad in zip(params_of(optimizer), grads, strict=True):
        p.grad = grad


def run_alone(optimizer, steps, seed=1):
    """Steps of one optimizer with random gradients."""
    for t in range(steps):
        set_grads(optimizer, draw(params_of(optimizer), seed + t))
        optimizer.step()
    return optimizer


def as_array(tensor):
    """The values as long doubles, flat; a complex number is two of them, as AdamW has it."""
    tensor = tensor.detach().resolve_conj().resolve_neg()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    return tensor.double().cpu().numpy().astype(np.longdouble).reshape(-1)


def bits(tensor):
    """The values in logical order, as bytes, which compare NaN with NaN and tell zeros apart."""
    tensor = tensor.detach().resolve_conj().resolve_neg()
    flat = tensor.clone(memory_format=torch.contiguous_format).view(-1)
    return flat.view(torch.uint8).cpu().numpy().tobytes()


def snapshot(optimizer):
    """Everything a step may change, bit by bit, in an order that does not depend on identities."""
    return [
        (bits(p), {key: bits(value) for key, value in optimizer.state.get(p, {}).items()})
        for p in params_of(optimizer)
    ]


def real_dtype(tensor):
    return tensor.dtype.to_real() if tensor.is_complex() else tensor.dtype


def ulp(values, dtype):
    """The distance between `dtype`'s neighbours at each value, subnormals included."""
    info = torch.finfo(dtype)
    spacing = np.ldexp(np.longdouble(info.eps), np.frexp(values)[1] - 1)
    return np.maximum(spacing, np.longdouble(info.tiny) * info.eps)


def assert_accurate(got, plain, truth, dtype, what):
    """`got` may be off the truth by twice `plain`'s largest error, plus one ulp."""
    finite = np.isfinite(plain)
    np.testing.assert_array_equal(got[~finite], plain[~finite], err_msg=f"{what}: not finite")
    got, plain, truth = got[finite], plain[finite], truth[finite]
    error, plain_error = np.abs(got - truth), np.abs(plain - truth).max(initial=0)
    bad = ~(error <= 2 * plain_error + ulp(truth, dtype))  # a NaN is bad
    assert not bad.any(), (
        f"{what}: {bad.sum()} of {bad.size} wrong, the first is {got[bad][0]:.9g} "
        f"where {truth[bad][0]:.9g} is right; error {np.nanmax(error):.3g}, plain {plain_error:.3g}"
    )


class Model:
    """AdamW in NumPy, driven by an optimizer's own groups and gradients.

    As it stands it is the truth: long double, nothing rounded. With `compute=np.float32` and
    storage dtypes it is the plain formula for data that torch's loop does not take.
    """

    def __init__(self, compute=np.longdouble, param_dtype=None, state_dtype=None):
        self.compute = compute
        self.dtypes = {"param": param_dtype, **dict.fromkeys(STATE_KEYS, state_dtype)}
        self.values = {}

    def step(self, optimizer):
        """Does what `optimizer.step()` is about to do."""
        for group in optimizer.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, optimizer.state.get(p), group)

    def _update(self, p, state, group):
        values = self.values.setdefault(p, {"param": self._read(p)})
        if not state:
            values.update({key: np.zeros_like(values["param"]) for key in STATE_KEYS}, step=0)
        elif "step" not in values:
            values.update({k: self._read(v) for k, v in state.items()})
        values["step"] = (int(state["step"]) if state else 0) + 1
        with np.errstate(all="ignore"):
            updated = self._formula(self._read(p.grad), group, **values)
        values.update({key: self._store(value, key) for key, value in updated.items()})

    def _formula(self, grad, group, *, step, param, exp_avg, exp_avg_sq, max_exp_avg_sq=0):
        lr, decay, eps, beta1, beta2 = (
            np.longdouble(float(x))
            for x in (group["lr"], group["weight_decay"], group["eps"], *group["betas"])
        )
        scalar = self.compute
        grad = -grad if group["maximize"] else grad
        m = exp_avg + scalar(1 - beta1) * (grad - exp_avg)
        v = scalar(beta2) * exp_avg_sq + scalar(1 - beta2) * grad * grad
        v_max = np.maximum(max_exp_avg_sq, v) if group["amsgrad"] else max_exp_avg_sq
        root = np.sqrt(v_max if group["amsgrad"] else v) / scalar(np.sqrt(1 - beta2**step))
        param = param * scalar(1 - lr * decay)
        param = param - scalar(lr / (1 - beta1**step)) * (m / (root + scalar(eps)))
        return {"param": param, "exp_avg": m, "exp_avg_sq": v, "max_exp_avg_sq": v_max}

    def value(self, p, role, tensor):
        """What `tensor` should hold: its own values where the model never saw a gradient."""
        return self.values[p][role] if p in self.values else as_array(tensor)

    def _read(self, tensor):
        return as_array(tensor).astype(self.compute)

    def _store(self, values, key):
        if self.dtypes[key] is None:
            return values
        return self._read(torch.from_numpy(values.astype(np.float64)).to(self.dtypes[key]))


def pooled(optimizer, read=lambda p, role, tensor: as_array(tensor)):
    """{(role, dtype): values} of the parameters and states, those of one kind in one array."""
    pools = defaultdict(list)
    for p in params_of(optimizer):
        tensors = {"param": p, **optimizer.state.get(p, {})}
        for role in ["param", *STATE_KEYS]:
            if role in tensors:
                pools[role, real_dtype(tensors[role])].append(read(p, role, tensors[role]))
    return {key: np.concatenate(arrays) for key, arrays in pools.items()}


class Race:
    """The class under test and torch's loop on equal parameters, and the truth beside them.

    `make` returns the parameters or the groups, the same at every call: the two optimizers share
    the gradients and nothing else.
    """

    def __init__(self, optimizer_class, make, **kwargs):
        self.ours = optimizer_class(make(), **copy.deepcopy(kwargs))
        self.loop = torch_loop(make(), **copy.deepcopy(kwargs))
        self.truth = Model()
        self.steps = 0

    def both(self, action):
        return action(self.ours), action(self.loop)

    def step(self, grads, within=contextlib.nullcontext):
        """One step of each with the same gradients, which must be left as they are."""
        self.both(lambda optimizer: set_grads(optimizer, grads))
        self.truth.step(self.loop)
        before = [None if grad is None else bits(grad) for grad in grads]
        with within():
            self.both(lambda optimizer: optimizer.step())
        assert before == [None if grad is None else bits(grad) for grad in grads]

    def run(self, steps):
        """Steps with random gradients, which shrink: amsgrad's maximum then makes a difference."""
        for _ in range(steps):
            self.steps += 1
            scale = 1 / (1 + self.steps / 4)
            self.step(draw(params_of(self.loop), seed=self.steps, scale=scale))
        return self

    def check(self):
        steps = self.both(lambda optimizer: [s.get("step") for s in states_of(optimizer)])
        assert steps[0] == steps[1]
        ours, loop = self.both(pooled)
        truth = pooled(self.loop, self.truth.value)
        assert list(ours) == list(loop)
        for (role, dtype), got in ours.items():
            assert_accurate(got, loop[role, dtype], truth[role, dtype], dtype, (role, dtype))
