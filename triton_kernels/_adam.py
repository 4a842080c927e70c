"""What kernels of Adam's family share: the scalars of a tensor, and the first moment.

The scalars come from the host, or ``prepare_kernel`` computes them where some of the numbers behind
them lie on the device.
"""

import torch
import triton
import triton.language as tl

from fusedopt.triton_kernels._numbers import bias_correction, increment_kernel, is_set, read_number
from fusedopt.triton_kernels._storage import LAUNCH_OPTIONS

# A row's scalars, float64: the first eight of C++'s AdamWScalars, then these.
(
    LERP_WEIGHT, BETA2, EPS, GRAD_WEIGHT, DECAY, RATE, INV_SQRT_C2, GRAD_FACTOR,
    FROM_GRAD, SKIP, SCALAR_WORDS,
) = (tl.constexpr(i) for i in range(11))  # fmt: skip


@triton.jit
def first_moment(g, m, lerp_weight, grad_factor, from_grad):
    difference = tl.fma(grad_factor, g, -m)
    return tl.fma(lerp_weight, difference, tl.where(from_grad, grad_factor * g, m))


# ---- numbers on the device

# A record of options; doubles, then what replaces them where it lies on the device.
(
    LR_OPTION, BETA1_OPTION, BETA2_OPTION, EPS_OPTION, DECAY_OPTION, MAXIMIZE_OPTION, HOST_STEP,
) = (tl.constexpr(i) for i in range(7))  # fmt: skip
LR_NUMBER, DECAY_NUMBER, STEP_NUMBER, OPTION_WORDS = (tl.constexpr(7 + 2 * i) for i in range(4))
# What all rows share: 1 / grad_scale as a double, then what replaces it, then found_inf.
GRAD_SCALE, FOUND_INF = (tl.constexpr(1 + 2 * i) for i in range(2))


@triton.jit
def double(word):
    return tl.load(word).to(tl.float64, bitcast=True)


@triton.jit(do_not_specialize=["options_at", "loss_scale_at"])
def prepare_kernel(table, options_at, loss_scale_at, all_scalars):
    """`adamw_scalars` of C++ for one record of options; one thread block a record."""
    i = tl.program_id(0).to(tl.int64)
    options = table + options_at + i * OPTION_WORDS
    loss_scale = table + loss_scale_at
    lr = read_number(options + LR_NUMBER, double(options + LR_OPTION))
    weight_decay = read_number(options + DECAY_NUMBER, double(options + DECAY_OPTION))
    counted = read_number(options + STEP_NUMBER, tl.load(options + HOST_STEP).to(tl.float64))
    inv_grad_scale = double(loss_scale)
    if tl.load(loss_scale + GRAD_SCALE) != 0:
        inv_grad_scale = 1 / read_number(loss_scale + GRAD_SCALE, inv_grad_scale)
    beta1 = double(options + BETA1_OPTION)
    beta2 = double(options + BETA2_OPTION)
    step = counted.to(tl.int64)
    from_grad = beta1 < 0.5
    scalars = all_scalars + i * SCALAR_WORDS
    tl.store(scalars + LERP_WEIGHT, tl.where(from_grad, -beta1, 1 - beta1))
    tl.store(scalars + BETA2, beta2)
    tl.store(scalars + EPS, double(options + EPS_OPTION))
    tl.store(scalars + GRAD_WEIGHT, (1 - beta2) * inv_grad_scale * inv_grad_scale)
    tl.store(scalars + DECAY, 1 - lr * weight_decay)
    tl.store(scalars + RATE, -lr / bias_correction(beta1, step))
    tl.store(scalars + INV_SQRT_C2, 1 / tl.sqrt(bias_correction(beta2, step)))
    maximize = tl.load(options + MAXIMIZE_OPTION) != 0
    tl.store(scalars + GRAD_FACTOR, tl.where(maximize, -inv_grad_scale, inv_grad_scale))
    tl.store(scalars + FROM_GRAD, from_grad.to(tl.float64))
    tl.store(scalars + SKIP, is_set(loss_scale + FOUND_INF).to(tl.float64))


def scalars_of(
    words: torch.Tensor, at: list[int], sizes: list[int], device: torch.device
) -> torch.Tensor:
    """The rows' scalars in device memory.

    Args:
        words: the table.
        at, sizes: where in it what was sent along begins, and how long it is: the scalars; or
            options, counters and loss scale. Then the step is counted, and they are computed.
        device: the words'.
    """
    if len(at) == 1:
        return words[at[0] : at[0] + sizes[0]].view(torch.float64)
    return _prepare(words, at, sizes, device)


def _prepare(
    words: torch.Tensor, at: list[int], sizes: list[int], device: torch.device
) -> torch.Tensor:
    """Count the step, and compute the rows' scalars on the device."""
    options_at, counters_at, loss_scale_at = at
    if counters := sizes[1] // 2:
        found_inf_at = loss_scale_at + FOUND_INF.value
        increment_kernel[(counters,)](
            words, counters_at, found_inf_at, num_warps=1, **LAUNCH_OPTIONS
        )
    options = sizes[0] // OPTION_WORDS.value
    scalars = torch.empty(options * SCALAR_WORDS.value, dtype=torch.float64, device=device)
    if options:
        prepare_kernel[(options,)](
            words, options_at, loss_scale_at, scalars, num_warps=1, **LAUNCH_OPTIONS
        )
    return scalars
