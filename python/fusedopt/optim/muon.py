"""Muon as a drop-in for ``torch.optim.Muon``; NorMuon; AdamW beside them for all but matrices."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fusedopt import _C, _options, partitions
from fusedopt.optim import _partitions, _state
from fusedopt.optim._step import FusedStep
from fusedopt.optim.adamw import init_state as init_adamw_state
from fusedopt.steps import _adam
from fusedopt.steps import adamw as adamw_steps
from fusedopt.steps import muon as steps

JORDAN = (3.4445, -4.7750, 2.0315)
ALGORITHMS = ("muon", "adamw")
# What groups of "adamw" have where neither they nor the argument ``adamw`` say otherwise.
ADAMW: dict[str, Any] = {"lr": 3e-4, "betas": (0.9, 0.95), "eps": 1e-10, "weight_decay": 0.0}
ADAMW_FIXED: dict[str, Any] = {"amsgrad": False, "fused": None}


class Muon(FusedStep, torch.optim.Optimizer):
    """``torch.optim.Muon`` on fusedopt's kernels.

    Arguments, their order, defaults and meaning, and the state's key ``momentum_buffer`` are
    torch's, and checkpoints load both ways. Beyond torch's, any parameter of two axes or more is
    taken, and groups with ``algorithm="adamw"`` are stepped by AdamW, so that one optimizer trains
    a model: ``Muon(fusedopt.param_groups_for(model), lr=0.02)``.

    Args:
        params: parameters, groups or named parameters, as every torch optimizer takes them.
        lr, weight_decay, momentum, nesterov: as ``torch.optim.Muon``.
        ns_coefficients: as ``torch.optim.Muon``; or what ``fusedopt.newton_schulz`` takes.
        eps: accepted and kept: the normalisation here needs none, whatever the gradients' scale.
        ns_steps: as ``torch.optim.Muon``.
        adjust_lr_fn: as ``torch.optim.Muon`` (None is ``"original"``), and ``"spectral"``,
            ``"rms_norm"``, ``"none"``; see ``fusedopt.muon_step``.
        ns_dtype, ns_method, momentum_form, cautious_weight_decay, maximize: as
            ``fusedopt.muon_step``. On the CPU Newton–Schulz computes in float32, on a GPU in
            float16 unless told otherwise (in float64 for float64): either is more accurate than
            torch's bfloat16.
        capturable: keep the step counters of AdamW's parameters on a GPU there too, and allow
            capture in a CUDA graph. Nothing waits for the device either way, unless there are
            parameters on the CPU too and a number lies on a GPU.
        partition: how parameters are cut into matrices, each orthogonalised on its own: one for
            all, a mapping from parameters, or their names where ``params`` are named, or a function
            from a parameter to one. Also per group.
        state_dtype: ``torch.float32`` or ``torch.bfloat16`` for the momentum; ``None`` (default)
            keeps each parameter's own dtype.
        adamw: options of the groups of ``"adamw"``, over ``lr=3e-4``, ``betas=(0.9, 0.95)``,
            ``eps=1e-10``, ``weight_decay=0``; a group's own come first.

    ``torch.amp.GradScaler`` leaves unscaling and the skipping of bad steps to the kernels.

    Raises:
        ValueError, TypeError, RuntimeError: as torch for its arguments; a parameter that is no
            matrix; at ``step``, what kernels can't take, by name. Nothing is written then.

    Source: Jordan 2024; ``torch.optim.Muon``.
    """

    _step_supports_amp_scaling = True
    _normuon = False

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: Any = JORDAN,
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = None,
        *,
        ns_dtype: torch.dtype | None = None,
        ns_method: str = "auto",
        momentum_form: str = "ema",
        cautious_weight_decay: bool = False,
        maximize: bool = False,
        capturable: bool = False,
        partition: Any = "tensor",
        state_dtype: torch.dtype | None = None,
        adamw: Mapping[str, Any] | None = None,
        **own: Any,
    ) -> None:
        unknown = set(own) - ({"beta2", "axis"} if self._normuon else set())
        if unknown:
            raise TypeError(f"{type(self).__name__} has no arguments {sorted(unknown)}")
        if unknown := set(adamw or {}) - set(ADAMW):
            raise TypeError(f"adamw has {sorted(unknown)}, expected some of {', '.join(ADAMW)}")
        self._adamw = {**ADAMW, **(adamw or {})}
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_coefficients": ns_coefficients,
            "eps": eps,
            "ns_steps": ns_steps,
            "adjust_lr_fn": adjust_lr_fn,
            "ns_dtype": ns_dtype,
            "ns_method": ns_method,
            "momentum_form": momentum_form,
            "cautious_weight_decay": cautious_weight_decay,
            "maximize": maximize,
            "capturable": capturable,
            "partition": partition,
            "state_dtype": state_dtype,
            "algorithm": "muon",
            **own,
        }
        _check_muon(defaults)
        super().__init__(params, defaults)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_adamw": self._adamw}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        algorithm = param_group.get("algorithm", "muon")
        if algorithm not in ALGORITHMS:
            raise ValueError(f"algorithm is {algorithm!r}, expected one of {', '.join(ALGORITHMS)}")
        if algorithm == "adamw":
            self._add_adamw_group(param_group)
            return
        _check_muon({**self.defaults, **param_group})
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            for i, p in enumerate(group["params"]):
                if p.ndim < 2:
                    raise ValueError(
                        f"Muon takes matrices, but {_partitions.name_of(group, i)} has fewer than "
                        "two axes: give it to AdamW, as fusedopt.param_groups_for(model) does"
                    )
            group["partition"] = _partitions.one_each(group, partitions.matrices)
        except Exception:
            self.param_groups.pop()
            raise

    def _add_adamw_group(self, param_group: dict[str, Any]) -> None:
        keep = {*ADAMW, *ADAMW_FIXED, "maximize", "capturable", "state_dtype", "algorithm"}
        muon_only = set(self.defaults) - keep
        if unknown := muon_only & set(param_group):
            raise ValueError(f"a group of algorithm 'adamw' has no options {sorted(unknown)}")
        options = {**self._adamw, **ADAMW_FIXED, **param_group}
        lr, betas, eps, decay = (options[k] for k in ("lr", "betas", "eps", "weight_decay"))
        _adam.options(0, lr, betas, eps, decay, False)
        _state.check_dtype(options.get("state_dtype"))
        super().add_param_group(options)
        group = self.param_groups[-1]
        for key in muon_only:
            del group[key]

    def state_dict(self) -> dict[str, Any]:
        saved: dict[str, Any] = super().state_dict()
        _partitions.to_data(saved)
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a ``state_dict`` of this class or of ``torch.optim.Muon``.

        What the checkpoint does not say, as torch's does not of the options it lacks, stays as this
        optimizer has it.

        Raises:
            ValueError: it was saved with other partitions or algorithms; both are named. Nothing is
                loaded.
        """
        final: list[dict[str, Any]] = []
        handle = self.register_load_state_dict_pre_hook(
            lambda _, loaded: final.append(self._completed(loaded))
        )
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
        for group, saved in zip(self.param_groups, final[0]["param_groups"], strict=True):
            if "partition" in saved:  # torch copied it
                group["partition"] = saved["partition"]
        _state.restore_dtypes(self, final[0], _state_dtypes)

    def _completed(self, loaded: dict[str, Any]) -> dict[str, Any]:
        loaded = _partitions.put_in_own(self.param_groups, loaded, required=False)
        for index, (own, group) in enumerate(
            zip(self.param_groups, loaded["param_groups"], strict=False)
        ):
            saved = group.get("algorithm", "muon")
            if saved != own["algorithm"]:
                raise ValueError(
                    f"param_groups[{index}]: the checkpoint was saved with algorithm {saved!r}, "
                    f"but this optimizer has {own['algorithm']!r}"
                )
            for key, value in own.items():
                if key not in ("params", "param_names"):
                    group.setdefault(key, value)
        return loaded

    def _new_plan(self) -> "Plans":
        return Plans(self._normuon)

    def _update(self, plan: "Plans", grad_scale: Any, found_inf: Any) -> None:
        scale, found_inf, skip = _adam.loss_scale(grad_scale, found_inf, on_device=True)
        _adam.param_groups_step(
            plan,
            self.param_groups,
            begin=lambda: plan.begin(scale, found_inf),
            add_group=lambda index, group: plan.add_group(self.state, index, group),
            init_state=self._init_state,
            launch=None if skip else lambda: plan.launch(found_inf),
        )

    def _init_state(self, group: dict[str, Any], params: list[Tensor]) -> None:
        if group["algorithm"] == "adamw":
            init_adamw_state(self.state, group, params)
            return
        buffers = _state.zeros_like(params, group["state_dtype"], 1)
        for p, buffer in zip(params, buffers, strict=True):
            self.state[p]["momentum_buffer"] = buffer
        if not self._normuon:
            return
        kinds = dict(zip(map(id, group["params"]), group["partition"], strict=True))
        counts = [steps.row_count(kinds[id(p)], p.shape, group["axis"]) for p in params]
        rows = _state.vectors(counts, params, torch.float32, 2)
        for p, row_sq in zip(params, rows, strict=True):
            self.state[p]["row_sq"] = row_sq


class NorMuon(Muon):
    """Muon with rows of like size: a second moment for each row of the orthogonalised update.

    Arguments as ``Muon``'s, with ``beta2=0.95`` and ``axis="row"`` by name
    (``fusedopt.normuon_step`` says what they mean). State: ``momentum_buffer``, and ``row_sq`` with
    one float32 per row.

    Source: Li et al., arXiv:2510.05491.
    """

    _normuon = True

    def __init__(
        self, params: Any, *args: Any, beta2: float = 0.95, axis: str = "row", **kwargs: Any
    ) -> None:
        super().__init__(params, *args, **kwargs, beta2=beta2, axis=axis)


class Plans:
    """Muon's plan and AdamW's as one: nothing is written before both are checked."""

    def __init__(self, normuon: bool) -> None:
        self.muon = steps.new_plan(normuon)
        self.adamw = _C.AdamWPlan()

    def begin(self, scale: Any, found_inf: Any) -> None:
        for plan in (self.muon, self.adamw):
            plan.begin(scale, found_inf, None, True)

    def add_group(
        self, state: dict[Any, dict[str, Any]], index: int, group: dict[str, Any]
    ) -> list[Any]:
        if group["algorithm"] == "adamw":
            return adamw_steps.add_group(self.adamw, state, index, group)
        return steps.add_group(self.muon, state, index, group)

    def check(self) -> None:
        self.muon.check()
        self.adamw.check()
        self.muon.check_beside(self.adamw)

    def updated(self) -> list[Any]:
        return [*self.muon.updated(), *self.adamw.updated()]

    def launch(self, found_inf: Any) -> None:
        steps.launch(self.muon, found_inf=found_inf)  # first: it asks for memory before it writes
        _adam.launch(self.adamw, adamw_steps.OPERATION.name, found_inf=found_inf)

    def clear(self) -> None:
        self.muon.clear()
        self.adamw.clear()


def _check_muon(options: dict[str, Any]) -> None:
    """Raise unless a group may have these options; torch's messages for torch's."""
    if isinstance(options["lr"], Tensor) and options["lr"].numel() != 1:
        raise ValueError("Tensor lr must be 1-element")
    for name, key in (
        ("Learning rate", "lr"),
        ("momentum", "momentum"),
        ("weight decay", "weight_decay"),
    ):
        if not options[key] >= 0.0:
            raise ValueError(f"{name} should be >= 0 but is: {options[key]}")
    if options["adjust_lr_fn"] not in (None, *steps.SCALES):
        raise ValueError(
            f"Adjust learning rate function {options['adjust_lr_fn']} is not supported; "
            f"there are {', '.join(steps.SCALES)}"
        )
    _options.number("eps", options["eps"], 0.0)
    _state.check_dtype(options["state_dtype"])
    steps.options(**{key: options[key] for key in steps.OPTION_KEYS if key in options})


def _state_dtypes(param: Tensor, group: dict[str, Any]) -> dict[str, torch.dtype]:
    """What the states should be, by key, whatever a checkpoint's loading made of them."""
    dtype = _state.dtype_of(param, group["state_dtype"])
    if group["algorithm"] == "adamw":
        return {"exp_avg": dtype, "exp_avg_sq": dtype}
    return {"momentum_buffer": dtype, "row_sq": torch.float32}
