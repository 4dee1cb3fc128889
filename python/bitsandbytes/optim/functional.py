# SPDX-License-Identifier: MIT
"""Optimizer steps of single parameters, as functions of the public package."""

from collections.abc import Iterable

import torch
from torch import Tensor

from .._checks import check
from ..plain.update import single_step_options
from .buckets import learning_rate

__all__ = [
    "is_on_gpu",
    "optimizer_update_8bit",
    "optimizer_update_8bit_blockwise",
    "optimizer_update_32bit",
    "percentile_clipping",
]


def is_on_gpu(tensors: Iterable[Tensor | None]) -> bool:
    """Checks that tensors lie on one device; None and paged tensors may lie anywhere.

    Args:
        tensors: The tensors.

    Returns:
        True.

    Raises:
        RuntimeError: They lie on several devices.
    """
    devices = {
        str(tensor.device)
        for tensor in tensors
        if tensor is not None and not getattr(tensor, "is_paged", False)
    }
    if len(devices) > 1:
        raise RuntimeError(f"is_on_gpu: tensors must lie on one device, got {sorted(devices)}")
    return True


def _options(
    op: str,
    p: Tensor,
    step: int,
    lr: float | Tensor,
    decays: tuple,
    weight_decay: float,
    gnorm_scale: float | Tensor,
    skip_zeros: bool,
    max_unorm: float = 0.0,
    unorm_vec: Tensor | None = None,
) -> tuple:
    number, lr_tensor = learning_rate(lr, p.device)
    gnorm_scales = None
    if isinstance(gnorm_scale, Tensor):
        gnorm_scales = gnorm_scale.to(p.device, torch.float32).reshape(1)
        gnorm_scale = 1.0
    return single_step_options(
        op,
        p,
        step,
        (number, *decays, weight_decay, gnorm_scale),
        skip_zeros,
        max_unorm=max_unorm,
        unorm=unorm_vec,
        lr_tensor=lr_tensor,
        gnorm_scales=gnorm_scales,
    )


def _lists(
    optimizer_name: str, g: Tensor, p: Tensor, state1: Tensor, state2: Tensor | None
) -> tuple:
    return optimizer_name, [p], [g], [state1], [] if state2 is None else [state2]


@torch.no_grad()
def optimizer_update_32bit(
    optimizer_name: str,
    g: Tensor,
    p: Tensor,
    state1: Tensor,
    beta1: float,
    eps: float,
    step: int,
    lr: float | Tensor,
    state2: Tensor | None = None,
    beta2: float = 0.0,
    beta3: float = 0.0,
    alpha: float = 0.0,
    weight_decay: float = 0.0,
    gnorm_scale: float | Tensor = 1.0,
    unorm_vec: Tensor | None = None,
    max_unorm: float = 0.0,
    skip_zeros: bool = False,
) -> None:
    """Advances one parameter with 32-bit states, in place.

    Args:
        optimizer_name: Update rule: adam, lamb, ademamix, momentum, lars, rmsprop, adagrad, lion.
        g: Gradient, of p's shape and dtype.
        p: Parameter: float32, float16 or bfloat16.
        state1: First state, float32 of p's shape; ``(2, *p.shape)`` for ademamix.
        beta1: Decay rate of the first state.
        eps: Added to the denominator.
        step: The number of this step, from 1.
        lr: Learning rate; a tensor may lie on p's device.
        state2: Second state, for rules that have one.
        beta2: Decay rate of the second state.
        beta3: Decay rate of ademamix's slow average.
        alpha: Weight of ademamix's slow average.
        weight_decay: Weight decay.
        gnorm_scale: Factor on the gradient.
        unorm_vec: float32 [1]; gets the square of the update's norm if `max_unorm` is given.
        max_unorm: Bound on the norm of the update relative to p's; 0: none.
        skip_zeros: Leave elements alone whose gradient is zero.

    Raises:
        ValueError: `step` is below 1.
        RuntimeError: The tensors lie on several devices, or one does not fit.

    Example:
        >>> p, g, m = torch.randn(10), torch.randn(10), torch.zeros(10)
        >>> optimizer_update_32bit("momentum", g, p, m, beta1=0.9, eps=0.0, step=1, lr=0.1)
    """
    is_on_gpu([g, p, state1, state2, unorm_vec])
    decays = (beta1, beta2, beta3, alpha, eps)
    torch.ops.bitsandbytes.optimizer_step_32bit(
        *_lists(optimizer_name, g, p, state1, state2),
        *_options(
            "optimizer_update_32bit",
            *(p, step, lr, decays, weight_decay, gnorm_scale, skip_zeros),
            *(max_unorm, unorm_vec),
        ),
    )


@torch.no_grad()
def optimizer_update_8bit_blockwise(
    optimizer_name: str,
    g: Tensor,
    p: Tensor,
    state1: Tensor,
    state2: Tensor | None,
    beta1: float,
    beta2: float,
    beta3: float = 0.0,
    alpha: float = 0.0,
    eps: float | None = None,
    step: int | None = None,
    lr: float | Tensor | None = None,
    qmap1: Tensor | None = None,
    qmap2: Tensor | None = None,
    absmax1: Tensor | None = None,
    absmax2: Tensor | None = None,
    weight_decay: float = 0.0,
    gnorm_scale: float | Tensor = 1.0,
    skip_zeros: bool = False,
) -> None:
    """Advances one parameter with 8-bit states in blocks of 256, in place.

    Calls of release 0.43 and older have neither `beta3` nor `alpha`; they are served by keyword.

    Args:
        optimizer_name: Update rule, as in :func:`optimizer_update_32bit`.
        g: Gradient, of p's shape and dtype.
        p: Parameter: float32, float16 or bfloat16.
        state1: First state, uint8 of p's shape; ``(2, *p.shape)`` for ademamix.
        state2: Second state, or None.
        beta1: Decay rate of the first state.
        beta2: Decay rate of the second state.
        beta3: Decay rate of ademamix's slow average.
        alpha: Weight of ademamix's slow average.
        eps: Added to the denominator.
        step: The number of this step, from 1.
        lr: Learning rate; a tensor may lie on p's device.
        qmap1: Levels of the first state, float32 [256].
        qmap2: Levels of the second state, or None.
        absmax1: Scales of the first state, float32 [ceil(n / 256)]; two rows for ademamix.
        absmax2: Scales of the second state, or None.
        weight_decay: Weight decay.
        gnorm_scale: Factor on the gradient.
        skip_zeros: Leave elements alone whose gradient is zero.

    Raises:
        TypeError: One of eps, step, lr, qmap1 and absmax1 is missing.
        ValueError: `step` is below 1.
        RuntimeError: The tensors lie on several devices, or one does not fit.
    """
    required = {"eps": eps, "step": step, "lr": lr, "qmap1": qmap1, "absmax1": absmax1}
    missing = [name for name, value in required.items() if value is None]
    if missing:
        raise TypeError(f"optimizer_update_8bit_blockwise: {' and '.join(missing)} must be given")
    is_on_gpu([g, p, state1, state2, qmap1, qmap2, absmax1, absmax2])
    decays = (beta1, beta2, beta3, alpha, eps)
    torch.ops.bitsandbytes.optimizer_step_8bit_blockwise(
        *_lists(optimizer_name, g, p, state1, state2),
        *([absmax1], [] if absmax2 is None else [absmax2], qmap1, qmap2),
        *_options(
            "optimizer_update_8bit_blockwise",
            *(p, step, lr, decays, weight_decay, gnorm_scale, skip_zeros),
        ),
    )


@torch.no_grad()
def optimizer_update_8bit(
    optimizer_name: str,
    g: Tensor,
    p: Tensor,
    state1: Tensor,
    state2: Tensor | None,
    beta1: float,
    beta2: float,
    eps: float,
    step: int,
    lr: float | Tensor,
    qmap1: Tensor,
    qmap2: Tensor | None,
    max1: Tensor,
    max2: Tensor | None,
    new_max1: Tensor,
    new_max2: Tensor | None,
    weight_decay: float = 0.0,
    gnorm_scale: float | Tensor = 1.0,
    unorm_vec: Tensor | None = None,
    max_unorm: float = 0.0,
) -> None:
    """Advances one parameter with 8-bit states that have one scale per tensor, in place.

    The codes are scaled by `max1` and `max2` before, and by `new_max1` and `new_max2` after the
    call, which writes these: the caller exchanges them.

    Args:
        optimizer_name: Update rule, as in :func:`optimizer_update_32bit`, but not ademamix.
        g: Gradient, of p's shape and dtype.
        p: Parameter: float32, float16 or bfloat16.
        state1: First state, uint8 of p's shape.
        state2: Second state, or None.
        beta1: Decay rate of the first state.
        beta2: Decay rate of the second state.
        eps: Added to the denominator.
        step: The number of this step, from 1.
        lr: Learning rate; a tensor may lie on p's device.
        qmap1: Levels of the first state, float32 [256].
        qmap2: Levels of the second state, or None.
        max1: Scale of the first state before the step, float32 [1].
        max2: Scale of the second state, or None.
        new_max1: Gets the scale of the first state after the step, float32 [1].
        new_max2: Gets that of the second state, or None.
        weight_decay: Weight decay.
        gnorm_scale: Factor on the gradient.
        unorm_vec: float32 [1]; gets the square of the update's norm if `max_unorm` is given.
        max_unorm: Bound on the norm of the update relative to p's; 0: none.

    Raises:
        ValueError: `step` is below 1.
        RuntimeError: The tensors lie on several devices, or one does not fit.
    """
    is_on_gpu([g, p, state1, state2, qmap1, qmap2, max1, max2, new_max1, new_max2, unorm_vec])
    second = (max2, new_max2, qmap2) if state2 is not None else (None, None, None)
    decays = (beta1, beta2, 0.0, 0.0, eps)
    torch.ops.bitsandbytes.optimizer_step_8bit(
        *_lists(optimizer_name, g, p, state1, state2),
        *(max1, second[0], new_max1, second[1], qmap1, second[2]),
        *_options(
            "optimizer_update_8bit",
            *(p, step, lr, decays, weight_decay, gnorm_scale, False),
            *(max_unorm, unorm_vec),
        ),
    )


@torch.no_grad()
def percentile_clipping(
    grad: Tensor, gnorm_vec: Tensor, step: int, percentile: int = 5
) -> tuple[Tensor, Tensor, Tensor]:
    """Records the norm of a gradient, and compares it with the norms of the last hundred steps.

    Args:
        grad: Gradient: float32, float16 or bfloat16.
        gnorm_vec: Squares of past norms, float32 [100]; this one takes the place ``step % 100``,
            at the first step every place.
        step: The number of this step, from 1.
        percentile: From 0 to 99; a norm above this percentile of the history is clipped to it.

    Returns:
        The norm, the clip value, and the factor for the gradient, 1 where nothing is clipped:
        float32 tensors without dimensions. The gradient itself is not changed.

    Raises:
        ValueError: `step` is below 1.
        RuntimeError: A tensor does not fit, or `percentile` is out of its range.

    Example:
        >>> history = torch.zeros(100)
        >>> norm, clip, scale = percentile_clipping(torch.ones(16), history, step=1)
        >>> norm.item(), scale.item()
        (4.0, 1.0)
    """
    is_on_gpu([grad, gnorm_vec])
    check(step >= 1, "percentile_clipping", "step", "1 or more", step)
    taken = torch.full((), step - 1, dtype=torch.int64, device=grad.device)
    ops = torch.ops.bitsandbytes
    norm, clip, scale = ops.percentile_clipping_step([grad], [gnorm_vec], taken, percentile)
    return norm[0], clip[0], scale[0]
