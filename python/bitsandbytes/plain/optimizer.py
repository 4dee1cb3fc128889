# SPDX-License-Identifier: MIT
"""Optimizer steps in plain PyTorch, for devices without a native kernel."""

from typing import NamedTuple

import torch
import torch.nn.functional
from torch import Tensor

from .._checks import FLOATS, check, check_device, check_dtype, check_numel
from .._ops import register_kernel
from .quantize import LEVELS, dequantize_blocks, quantize_blocks
from .rounding import round_stochastic, rounding_bits
from .rules import RULES, Decay, Hyper, Rule

__all__ = ["BLOCK"]

# Elements that share one absmax in 8-bit states; fixed by the checkpoint format.
BLOCK = 256


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
        _check_member(op, f"grads[{i}]", grads[i], param, params[0].dtype)
        for k, tensors in enumerate(states[: _tensors(rule)]):
            where = f"state{k + 1}[{i}]"
            _check_member(op, where, tensors[i], param, dtype, _rows(rule, k))
            _check_rows(op, where, tensors[i], _rows(rule, k))
    check_dtype(op, "step", options.step, torch.int64)
    check_numel(op, "step", options.step, 1, "the number of steps")
    if options.lr_tensor is not None:
        check_dtype(op, "lr_tensor", options.lr_tensor, torch.float32)
        check_numel(op, "lr_tensor", options.lr_tensor, 1, "the learning rate")
    check(options.max_unorm >= 0, op, "max_unorm", "zero or positive", options.max_unorm)
    for argument in ("gnorm_scales", "unorm"):
        tensor = getattr(options, argument)
        if tensor is not None:
            _check_per_parameter(op, argument, tensor, params)
    return rule


def _check_qmaps(op: str, name: str, rule: Rule, qmaps: tuple[Tensor | None, ...]) -> None:
    for k, qmap in enumerate(qmaps[: _tensors(rule)], 1):
        check(qmap is not None, op, f"qmap{k}", f"given for rule {name!r}", None)
        check_dtype(op, f"qmap{k}", qmap, torch.float32)
        check_numel(op, f"qmap{k}", qmap, LEVELS, "levels")


# --- states -------------------------------------------------------------------------------------
#
# Three states lie in two tensors: the first has two rows.


def _tensors(rule: Rule) -> int:
    """Tensors that hold a parameter's states."""
    return min(rule.states, 2)


def _rows(rule: Rule, k: int) -> int:
    """States in tensor k."""
    return 2 if rule.states == 3 and k == 0 else 1


class _Floats:
    """States in float32."""

    bad_gradients_are_dropped = False

    def __init__(self, rule: Rule, lists: tuple[list[Tensor], ...]):
        self.lists = lists[: _tensors(rule)]
        self.rows = [_rows(rule, k) for k in range(len(self.lists))]

    def read(self, i: int) -> list[Tensor]:
        return [
            row.clone()
            for tensors, rows in zip(self.lists, self.rows, strict=True)
            for row in tensors[i].reshape(rows, -1)
        ]

    def write(self, i: int, states: list[Tensor], grad: Tensor | None) -> None:
        """Stores the states of tensor i; `grad` only if elements of zero gradient stand still."""
        rest = iter(states)
        for tensors, rows in zip(self.lists, self.rows, strict=True):
            joined = torch.stack([next(rest) for _ in range(rows)])
            tensors[i].copy_(joined.view(tensors[i].shape))


class _Blocks:
    """8-bit codes with one absmax per block."""

    bad_gradients_are_dropped = True

    def __init__(self, rule: Rule, packs: tuple):  # of codes, absmax, qmap
        self.packs = packs[: _tensors(rule)]
        self.rows = [_rows(rule, k) for k in range(len(self.packs))]

    def _places(self, i: int):
        """Yields codes [n], absmax [blocks] and qmap of each state of tensor i."""
        for (codes, absmax, qmap), rows in zip(self.packs, self.rows, strict=True):
            for row in range(rows):
                yield (
                    codes[i].view(rows, -1)[row] if rows > 1 else codes[i],
                    absmax[i].view(rows, -1)[row] if rows > 1 else absmax[i],
                    qmap,
                )

    def read(self, i: int) -> list[Tensor]:
        return [
            dequantize_blocks(codes.reshape(-1), absmax.reshape(-1), qmap, BLOCK)
            for codes, absmax, qmap in self._places(i)
        ]

    def write(self, i: int, states: list[Tensor], grad: Tensor | None) -> None:
        for (codes, absmax, qmap), state in zip(self._places(i), states, strict=True):
            new, scales = quantize_blocks(state, qmap, BLOCK, keep_sign=True)
            if grad is not None:
                # Codes that mean the same numbers again would still lose a little each time.
                idle = _idle_blocks(grad)
                scales = torch.where(idle, absmax.reshape(-1), scales)
                same = idle.repeat_interleave(BLOCK)[: grad.numel()]
                new = torch.where(same, codes.reshape(-1), new)
            codes.copy_(new.view(codes.shape))
            absmax.copy_(scales.view(absmax.shape))


class _Whole:
    """8-bit codes with one absmax per tensor."""

    bad_gradients_are_dropped = True

    def __init__(self, rule: Rule, packs: tuple):  # of codes, max, new max, qmap
        self.packs = [
            (codes, most.reshape(-1), new_most.view(-1), qmap)
            for codes, most, new_most, qmap in packs[: rule.states]
        ]

    def read(self, i: int) -> list[Tensor]:
        return [qmap[codes[i].reshape(-1).long()] * most[i] for codes, most, _, qmap in self.packs]

    def write(self, i: int, states: list[Tensor], grad: Tensor | None) -> None:
        for (codes, most, new_most, qmap), state in zip(self.packs, states, strict=True):
            n = state.numel()
            if n == 0:
                new_most[i] = most[i]
                continue
            new, scale = quantize_blocks(state, qmap, n, keep_sign=True)
            if grad is not None:
                idle = (grad == 0).all()
                scale = torch.where(idle, most[i], scale)
                new = torch.where(idle, codes[i].reshape(-1), new)
            codes[i].copy_(new.view(codes[i].shape))
            new_most[i] = scale.squeeze()


def _idle_blocks(grad: Tensor) -> Tensor:
    """Blocks of a flat gradient in which every element is zero."""
    padded = torch.nn.functional.pad(grad, (0, -grad.numel() % BLOCK))
    return (padded.view(-1, BLOCK) == 0).all(dim=1)


# --- the step -----------------------------------------------------------------------------------


def _bounded_scale(param: Tensor, update_squares: Tensor, max_unorm: float) -> Tensor:
    """Factor that keeps the norm of an update below `max_unorm` times that of the parameter."""
    bound = param.square().sum().sqrt() * max_unorm
    norm = update_squares.sqrt()
    # A parameter of zeros bounds nothing: it would stay so for ever.
    return torch.where((bound > 0) & (norm > bound), bound / norm, torch.ones_like(norm))


def _advance(
    i: int, param: Tensor, grad: Tensor, store, rule: Rule, h: Hyper, step: int, options: Options
) -> None:
    """The step of tensor i of a list."""
    factor = options.gnorm_scale
    if options.gnorm_scales is not None:
        factor = options.gnorm_scales.reshape(-1)[i] * factor
    g = grad.reshape(-1).float() * factor
    p = param.reshape(-1).float()
    states = store.read(i)
    before = [state.clone() for state in states]
    shrink = 1.0 - h.lr * h.weight_decay
    start = p * shrink if rule.decay is Decay.BEFORE else p
    decayed = g + p * h.weight_decay if rule.decay is Decay.L2 else g
    direction, scale = rule.direction(decayed, states, h, step)

    zero = g.new_zeros(())
    still = torch.zeros_like(g, dtype=torch.bool)  # elements that keep their parameter
    if store.bad_gradients_are_dropped:
        # One bad gradient would spoil the scale of many others: that element loses its state.
        still = ~g.isfinite()
        largest = torch.finfo(torch.float32).max
        states = [torch.where(still, zero, s.nan_to_num(0.0, largest, -largest)) for s in states]
    if options.skip_zeros:
        skip = g == 0
        still = still | skip
        states = [torch.where(skip, old, s) for s, old in zip(states, before, strict=True)]

    change = direction * (-h.lr * scale)
    if options.max_unorm > 0 or options.unorm is not None:
        squares = torch.where(still, zero, direction * scale).square().sum()
        if options.unorm is not None:
            options.unorm.view(-1)[i] = squares
        if options.max_unorm > 0:
            change = change * _bounded_scale(p, squares, options.max_unorm)
    updated = start + change
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
    op = "optimizer_step_32bit"
    options = Options(*rest, **named)
    lists = (state1, state2)
    found = _check_step(op, rule, params, grads, lists, torch.float32, options)
    _advance_all(params, grads, _Floats(found, lists), found, options)


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
    op = "optimizer_step_8bit_blockwise"
    options = Options(*rest, **named)
    found = _check_step(op, rule, params, grads, (state1, state2), torch.uint8, options)
    _check_qmaps(op, rule, found, (qmap1, qmap2))
    for k, absmax in enumerate((absmax1, absmax2)):
        name = f"absmax{k + 1}"
        expected = len(params) if k < _tensors(found) else 0
        check(len(absmax) == expected, op, name, f"a list of {expected}", len(absmax))
        for i, scales in enumerate(absmax):
            check_dtype(op, f"{name}[{i}]", scales, torch.float32)
            blocks = _rows(found, k) * -(-params[i].numel() // BLOCK)
            check_numel(op, f"{name}[{i}]", scales, blocks, "one per block")
            _check_rows(op, f"{name}[{i}]", scales, _rows(found, k))
    packs = ((state1, absmax1, qmap1), (state2, absmax2, qmap2))
    _advance_all(params, grads, _Blocks(found, packs), found, options)


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
    op = "optimizer_step_8bit"
    options = Options(*rest, **named)
    found = _check_step(op, rule, params, grads, (state1, state2), torch.uint8, options)
    check(found.states <= 2, op, "rule", "one with one or two states", repr(rule))
    _check_qmaps(op, rule, found, (qmap1, qmap2))
    packs = ((state1, max1, new_max1, qmap1), (state2, max2, new_max2, qmap2))
    for k, (_, *scales, _) in enumerate(packs[: found.states], 1):
        for name, scale in zip((f"max{k}", f"new_max{k}"), scales, strict=True):
            check(scale is not None, op, name, f"given for rule {rule!r}", None)
            _check_per_parameter(op, name, scale, params)
    _advance_all(params, grads, _Whole(found, packs), found, options)
