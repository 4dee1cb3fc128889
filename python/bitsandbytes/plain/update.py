# SPDX-License-Identifier: MIT
"""The optimizer ops of the public package: one parameter per call, over the ops for lists.

Their schemas mark more as written than is: gradients and tables of levels are only read.
"""

import torch
from torch import Tensor

from .._checks import check
from .._ops import register_kernel

__all__ = ["single_step_options"]


def single_step_options(
    op: str,
    p: Tensor,
    step: int,
    hyper: tuple,
    skip_zeros: bool,
    *,
    max_unorm: float = 0.0,
    unorm: Tensor | None = None,
    lr_tensor: Tensor | None = None,
    gnorm_scales: Tensor | None = None,
) -> tuple:
    """Returns the last arguments of a list op for one parameter.

    Args:
        op: The function that was called.
        p: The parameter.
        step: The number of this step, from 1.
        hyper: lr, beta1, beta2, beta3, alpha, eps, weight_decay, gnorm_scale.
        skip_zeros: Leave elements alone whose gradient is zero.
        max_unorm: Bound on the norm of the update relative to the parameter's; 0: none.
        unorm: Where the square of the update's norm goes, float32 [1].
        lr_tensor: The learning rate, if it lies on the device.
        gnorm_scales: The factor on the gradient, if it lies on the device, float32 [1].

    Raises:
        ValueError: If `step` is below 1: corrections of bias would divide by zero.
    """
    check(step >= 1, op, "step", "1 or more", step)
    taken = torch.full((), step - 1, dtype=torch.int64, device=p.device)
    bounded = unorm if max_unorm > 0.0 else None
    schedules = (0.0, 0.0)  # callers pass alpha and beta3 of this step
    return (
        *(taken, lr_tensor, *hyper, skip_zeros),
        *(*schedules, max_unorm, None, gnorm_scales, bounded),
    )


def _listed(state: Tensor | None) -> list[Tensor]:
    return [] if state is None else [state]


@register_kernel("optimizer_update_32bit", "default")
@torch.no_grad()
def optimizer_update_32bit(
    optimizer_name: str,
    g: Tensor,
    p: Tensor,
    state1: Tensor,
    state2: Tensor | None,
    unorm_vec: Tensor | None,
    max_unorm: float,
    param_norm: float,  # not used: the op for lists measures it on the device
    beta1: float,
    beta2: float,
    beta3: float,
    alpha: float,
    eps: float,
    weight_decay: float,
    step: int,
    lr: float,
    gnorm_scale: float,
    skip_zeros: bool = False,
) -> None:
    hyper = (lr, beta1, beta2, beta3, alpha, eps, weight_decay, gnorm_scale)
    options = single_step_options(
        "optimizer_update_32bit",
        *(p, step, hyper, skip_zeros),
        max_unorm=max_unorm,
        unorm=unorm_vec,
    )
    torch.ops.bitsandbytes.optimizer_step_32bit(
        optimizer_name, [p], [g], [state1], _listed(state2), *options
    )


@register_kernel("optimizer_update_8bit_blockwise", "default")
@torch.no_grad()
def optimizer_update_8bit_blockwise(
    optimizer_name: str,
    g: Tensor,
    p: Tensor,
    state1: Tensor,
    state2: Tensor | None,
    beta1: float,
    beta2: float,
    beta3: float,
    alpha: float,
    eps: float,
    step: int,
    lr: float,
    qmap1: Tensor,
    qmap2: Tensor | None,
    absmax1: Tensor,
    absmax2: Tensor | None,
    weight_decay: float,
    gnorm_scale: float,
    skip_zeros: bool = False,
) -> None:
    hyper = (lr, beta1, beta2, beta3, alpha, eps, weight_decay, gnorm_scale)
    torch.ops.bitsandbytes.optimizer_step_8bit_blockwise(
        *(optimizer_name, [p], [g], [state1], _listed(state2)),
        *([absmax1], _listed(absmax2), qmap1, qmap2),
        *single_step_options("optimizer_update_8bit_blockwise", p, step, hyper, skip_zeros),
    )
