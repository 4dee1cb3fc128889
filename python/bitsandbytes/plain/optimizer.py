# SPDX-License-Identifier: MIT
"""Optimizer steps in plain PyTorch, for devices without a native kernel."""

from typing import NamedTuple

import torch
from torch import Tensor

from .._checks import FLOATS, check, check_device, check_dtype, check_numel, check_written
from .._ops import register_kernel
from .quantize import LEVELS
from .rounding import round_stochastic, rounding_bits
from .rules import RULES, Decay, Hyper, Rule
from .states import BLOCK, Blocks, Floats, Whole, state_rows, state_tensors

__all__ = ["bounded_scale"]


class Options(NamedTuple):
    """What every step takes besides its lists, in the order of the schemas."""

    step: Tensor
    lr_tensor: Tensor | None
    lr: float
    beta1: float
    beta2: float
    beta3: float
    alpha: float
    eps: float
    weight_decay: float
    gnorm_scale: float
    skip_zeros: bool
    t_alpha: float = 0.0
    t_beta3: float = 0.0
    max_unorm: float = 0.0
    rounding_seed: int | None = None
    gnorm_scales: Tensor | None = None
    unorm: Tensor | None = None
    update_scales: Tensor | None = None

    @classmethod
    def of_preview(cls, *args, **named) -> "Options":
        """Returns what a preview takes, which is less."""
        hyper = cls._fields[: cls._fields.index("max_unorm")]
        return cls(**dict(zip((*hyper, "gnorm_scales"), args, strict=False)), **named)

    def hyper(self) -> Hyper:
        lr = self.lr if self.lr_tensor is None else self.lr_tensor.item()
        return Hyper(
            lr,
            self.beta1,
            self.beta2,
            self.beta3,
            self.alpha,
            self.eps,
            self.weight_decay,
            self.t_alpha,
            self.t_beta3,
        )


# --- checks -------------------------------------------------------------------------------------


def _check_member(
    op: str, where: str, tensor: Tensor, param: Tensor, dtype: torch.dtype, rows: int = 1
) -> None:
    check(tensor.layout == torch.strided, op, where, "dense", tensor.layout)
    check_dtype(op, where, tensor, dtype)
    check_numel(op, where, tensor, rows * param.numel(), "as its parameter")
    check_device(op, where, tensor, "its parameter", param)


def _check_rows(op: str, where: str, tensor: Tensor, rows: int) -> None:
    # Rows are written through views.
    contiguous = rows == 1 or tensor.is_contiguous()
    check(contiguous, op, where, "contiguous", f"strides {tensor.stride()}")


def _check_per_parameter(op: str, name: str, tensor: Tensor, params: list[Tensor]) -> None:
    check_dtype(op, name, tensor, torch.float32)
    check_numel(op, name, tensor, len(params), "one per parameter")
    check_device(op, name, tensor, "params[0]", params[0])


def _check_step(
    op: str,
    name: str,
    params: list[Tensor],
    grads: list[Tensor],
    states: tuple[list[Tensor], list[Tensor]],
    dtype: torch.dtype,
    options: Options,
) -> Rule:
    check(name in RULES, op, "rule", f"one of {sorted(RULES)}", repr(name))
    rule = RULES[name]
    check(len(params) > 0, op, "params", "a list of at least one tensor", "an empty list")
    lengths = (len(params), len(params), len(params) if rule.states > 1 else 0)
    for argument, tensors, length in zip(
        ("grads", "state1", "state2"), (grads, *states), lengths, strict=True
    ):
        check(len(tensors) == length, op, argument, f"a list of {length}", len(tensors))
    check_dtype(op, "params", params[0], *FLOATS)
    for i, param in enumerate(params):
        check_dtype(op, f"params[{i}]", param, params[0].dtype)
        check_device(op, f"params[{i}]", param, "params[0]", params[0])
        check_written(op, f"params[{i}]", param)
        _check_member(op, f"grads[{i}]", grads[i], param, params[0].dtype)
        for k, tensors in enumerate(states[: state_tensors(rule)]):
            where = f"state{k + 1}[{i}]"
            _check_member(op, where, tensors[i], param, dtype, state_rows(rule, k))
            _check_rows(op, where, tensors[i], state_rows(rule, k))
    check_dtype(op, "step", options.step, torch.int64)
    check_numel(op, "step", options.step, 1, "the number of steps")
    if options.lr_tensor is not None:
        check_dtype(op, "lr_tensor", options.lr_tensor, torch.float32, torch.float64)
        check_numel(op, "lr_tensor", options.lr_tensor, 1, "the learning rate")
    check(options.max_unorm >= 0, op, "max_unorm", "zero or positive", options.max_unorm)
    if options.update_scales is not None:
        expected = "0 where update_scales keep to a bound"
        check(options.max_unorm == 0, op, "max_unorm", expected, options.max_unorm)
    for argument in ("gnorm_scales", "unorm", "update_scales"):
        tensor = getattr(options, argument)
        if tensor is not None:
            _check_per_parameter(op, argument, tensor, params)
    return rule


def _check_qmaps(op: str, name: str, rule: Rule, qmaps: tuple[Tensor | None, ...]) -> None:
    for k, qmap in enumerate(qmaps[: state_tensors(rule)], 1):
        check(qmap is not None, op, f"qmap{k}", f"given for rule {name!r}", None)
        check_dtype(op, f"qmap{k}", qmap, torch.float32)
        check_numel(op, f"qmap{k}", qmap, LEVELS, "levels")


# --- the step -----------------------------------------------------------------------------------


def bounded_scale(param_squares: Tensor, update_squares: Tensor, max_unorm: float) -> Tensor:
    """Factor that keeps the norm of an update below `max_unorm` times that of the parameter.

    Args:
        param_squares: Sum of squares of the parameter.
        update_squares: That of the update, of the same shape.
        max_unorm: The bound.
    """
    bound = param_squares.sqrt() * max_unorm
    norm = update_squares.sqrt()
    # A parameter of zeros bounds nothing: it would stay so for ever.
    return torch.where((bound > 0) & (norm > bound), bound / norm, torch.ones_like(norm))


class _Change(NamedTuple):
    """What a step does to one tensor before anything is bounded or written; all flat, float32."""

    param: Tensor
    grad: Tensor  # with its factors
    states: list[Tensor]  # after the step
    still: Tensor  # elements that keep their parameter
    direction: Tensor  # the parameter moves by -lr * scale * direction
    scale: float

    def squares(self) -> tuple[Tensor, Tensor]:
        """Sums of squares of the parameter and of its update."""
        update = torch.where(self.still, 0.0, self.direction * self.scale)
        return self.param.square().sum(), update.square().sum()


def _change_of(
    i: int, param: Tensor, grad: Tensor, store, rule: Rule, h: Hyper, step: int, options: Options
) -> _Change:
    """The change of tensor i of a list."""
    factor = options.gnorm_scale
    if options.gnorm_scales is not None:
        factor = options.gnorm_scales.reshape(-1)[i] * factor
    g = grad.reshape(-1).float() * factor
    p = param.reshape(-1).float()
    states = store.read(i)
    before = [state.clone() for state in states]
    decayed = g + p * h.weight_decay if rule.decay is Decay.L2 else g
    direction, scale = rule.direction(decayed, states, h, step)

    zero = g.new_zeros(())
    still = torch.zeros_like(g, dtype=torch.bool)
    if store.bad_gradients_are_dropped:
        # One bad gradient would spoil the scale of many others: that element loses its state.
        still = ~g.isfinite()
        largest = torch.finfo(torch.float32).max
        states = [torch.where(still, zero, s.nan_to_num(0.0, largest, -largest)) for s in states]
    if options.skip_zeros:
        skip = g == 0
        still = still | skip
        states = [torch.where(skip, old, s) for s, old in zip(states, before, strict=True)]
    return _Change(p, g, states, still, direction, scale)


def _advance(
    i: int, param: Tensor, grad: Tensor, store, rule: Rule, h: Hyper, step: int, options: Options
) -> None:
    """The step of tensor i of a list."""
    p, g, states, still, direction, scale = change = _change_of(
        i, param, grad, store, rule, h, step, options
    )
    shrink = 1.0 - h.lr * h.weight_decay
    start = p * shrink if rule.decay is Decay.BEFORE else p
    moved = direction * (-h.lr * scale)
    if options.max_unorm > 0 or options.unorm is not None:
        squares = change.squares()
        if options.unorm is not None:
            options.unorm.view(-1)[i] = squares[1]
        if options.max_unorm > 0:
            moved = moved * bounded_scale(*squares, options.max_unorm)
    if options.update_scales is not None:
        moved = moved * options.update_scales.reshape(-1)[i]
    updated = start + moved
    if rule.decay is Decay.AFTER:
        updated = updated * shrink
    updated = torch.where(still, p, updated)
    if options.rounding_seed is not None and param.dtype == torch.bfloat16:
        bits = rounding_bits(p.numel(), options.rounding_seed, i, step, p.device)
        updated = round_stochastic(updated, bits)
    store.write(i, states, g if options.skip_zeros else None)
    param.copy_(updated.view(param.shape))


def _advance_all(
    params: list[Tensor], grads: list[Tensor], store, rule: Rule, options: Options
) -> None:
    h = options.hyper()
    step = int(options.step.item()) + 1
    for i, (param, grad) in enumerate(zip(params, grads, strict=True)):
        _advance(i, param, grad, store, rule, h, step, options)


def _squares_of_all(
    params: list[Tensor], grads: list[Tensor], store, rule: Rule, options: Options
) -> Tensor:
    h = options.hyper()
    step = int(options.step.item()) + 1
    columns = [
        torch.stack(_change_of(i, param, grad, store, rule, h, step, options).squares())
        for i, (param, grad) in enumerate(zip(params, grads, strict=True))
    ]
    return torch.stack(columns, dim=1)


# --- the ops ------------------------------------------------------------------------------------


def _floats(op: str, rule: str, lists: tuple, options: Options) -> tuple[Floats, Rule]:
    params, grads, *states = lists
    found = _check_step(op, rule, params, grads, tuple(states), torch.float32, options)
    return Floats(found, tuple(states)), found


@register_kernel("optimizer_step_32bit", "default")
@torch.no_grad()
def optimizer_step_32bit(
    rule: str,
    params: list[Tensor],
    grads: list[Tensor],
    state1: list[Tensor],
    state2: list[Tensor],
    *rest,
    **named,
) -> None:
    options = Options(*rest, **named)
    lists = (params, grads, state1, state2)
    store, found = _floats("optimizer_step_32bit", rule, lists, options)
    _advance_all(params, grads, store, found, options)


@register_kernel("optimizer_preview_32bit", "default")
@torch.no_grad()
def optimizer_preview_32bit(
    rule: str,
    params: list[Tensor],
    grads: list[Tensor],
    state1: list[Tensor],
    state2: list[Tensor],
    *rest,
    **named,
) -> Tensor:
    options = Options.of_preview(*rest, **named)
    lists = (params, grads, state1, state2)
    store, found = _floats("optimizer_preview_32bit", rule, lists, options)
    return _squares_of_all(params, grads, store, found, options)


def _blocks(
    op: str, rule: str, lists: tuple, absmaxes: tuple, qmaps: tuple, options: Options
) -> tuple[Blocks, Rule]:
    params, grads, *states = lists
    found = _check_step(op, rule, params, grads, tuple(states), torch.uint8, options)
    _check_qmaps(op, rule, found, qmaps)
    for k, absmax in enumerate(absmaxes):
        name = f"absmax{k + 1}"
        expected = len(params) if k < state_tensors(found) else 0
        check(len(absmax) == expected, op, name, f"a list of {expected}", len(absmax))
        for i, scales in enumerate(absmax):
            check_dtype(op, f"{name}[{i}]", scales, torch.float32)
            blocks = state_rows(found, k) * -(-params[i].numel() // BLOCK)
            check_numel(op, f"{name}[{i}]", scales, blocks, "one per block")
            _check_rows(op, f"{name}[{i}]", scales, state_rows(found, k))
    return Blocks(found, tuple(zip(states, absmaxes, qmaps, strict=True))), found


@register_kernel("optimizer_step_8bit_blockwise", "default")
@torch.no_grad()
def optimizer_step_8bit_blockwise(
    rule: str,
    params: list[Tensor],
    grads: list[Tensor],
    state1: list[Tensor],
    state2: list[Tensor],
    absmax1: list[Tensor],
    absmax2: list[Tensor],
    qmap1: Tensor,
    qmap2: Tensor | None,
    *rest,
    **named,
) -> None:
    op, options = "optimizer_step_8bit_blockwise", Options(*rest, **named)
    lists, packs = (params, grads, state1, state2), ((absmax1, absmax2), (qmap1, qmap2))
    store, found = _blocks(op, rule, lists, *packs, options)
    _advance_all(params, grads, store, found, options)


@register_kernel("optimizer_preview_8bit_blockwise", "default")
@torch.no_grad()
def optimizer_preview_8bit_blockwise(
    rule: str,
    params: list[Tensor],
    grads: list[Tensor],
    state1: list[Tensor],
    state2: list[Tensor],
    absmax1: list[Tensor],
    absmax2: list[Tensor],
    qmap1: Tensor,
    qmap2: Tensor | None,
    *rest,
    **named,
) -> Tensor:
    op, options = "optimizer_preview_8bit_blockwise", Options.of_preview(*rest, **named)
    lists, packs = (params, grads, state1, state2), ((absmax1, absmax2), (qmap1, qmap2))
    store, found = _blocks(op, rule, lists, *packs, options)
    return _squares_of_all(params, grads, store, found, options)


def _whole(
    op: str, rule: str, lists: tuple, scales: dict, qmaps: tuple, options: Options
) -> tuple[Whole, Rule]:
    params, grads, *states = lists
    found = _check_step(op, rule, params, grads, tuple(states), torch.uint8, options)
    check(found.states <= 2, op, "rule", "one with one or two states", repr(rule))
    _check_qmaps(op, rule, found, qmaps)
    for name, pair in scales.items():
        for k, scale in enumerate(pair[: found.states], 1):
            check(scale is not None, op, f"{name}{k}", f"given for rule {rule!r}", None)
            _check_per_parameter(op, f"{name}{k}", scale, params)
    columns = (states, scales["max"], scales.get("new_max", scales["max"]), qmaps)
    return Whole(found, tuple(zip(*columns, strict=True))), found


@register_kernel("optimizer_step_8bit", "default")
@torch.no_grad()
def optimizer_step_8bit(
    rule: str,
    params: list[Tensor],
    grads: list[Tensor],
    state1: list[Tensor],
    state2: list[Tensor],
    max1: Tensor,
    max2: Tensor | None,
    new_max1: Tensor,
    new_max2: Tensor | None,
    qmap1: Tensor,
    qmap2: Tensor | None,
    *rest,
    **named,
) -> None:
    op, options = "optimizer_step_8bit", Options(*rest, **named)
    scales = {"max": (max1, max2), "new_max": (new_max1, new_max2)}
    lists = (params, grads, state1, state2)
    store, found = _whole(op, rule, lists, scales, (qmap1, qmap2), options)
    _advance_all(params, grads, store, found, options)


@register_kernel("optimizer_preview_8bit", "default")
@torch.no_grad()
def optimizer_preview_8bit(
    rule: str,
    params: list[Tensor],
    grads: list[Tensor],
    state1: list[Tensor],
    state2: list[Tensor],
    max1: Tensor,
    max2: Tensor | None,
    qmap1: Tensor,
    qmap2: Tensor | None,
    *rest,
    **named,
) -> Tensor:
    op, options = "optimizer_preview_8bit", Options.of_preview(*rest, **named)
    lists, scales = (params, grads, state1, state2), {"max": (max1, max2)}
    store, found = _whole(op, rule, lists, scales, (qmap1, qmap2), options)
    return _squares_of_all(params, grads, store, found, options)
