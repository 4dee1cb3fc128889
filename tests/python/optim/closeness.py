# SPDX-License-Identifier: MIT
"""How far a step in float32 may be from the specification in float64, derived operation by
operation, and parameters with states of every format that steps are checked on."""

from dataclasses import dataclass

import numpy as np
import torch

from bitsandbytes.plain import clipping as plain_clipping
from bitsandbytes.plain import optimizer as plain
from reference import codes
from reference import optim as reference

__all__ = [
    "DTYPES",
    "FORMATS",
    "ROUNDING",
    "Parameter",
    "U",
    "assert_close",
    "assert_codes",
    "assert_step",
    "call",
    "gradient",
    "implementation",
    "numpy",
    "options",
    "preview",
]

ops = torch.ops.bitsandbytes
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
U = 2.0**-24  # half a unit in the last place of float32, relative
# Rounding to the dtype of the parameter: relative to its size, and of its smallest numbers.
ROUNDING = {
    torch.float32: (U, 2.0**-149),
    torch.float16: (2.0**-11, 2.0**-25),
    torch.bfloat16: (2.0**-8, 2.0**-133),
}
FORMATS = ("32bit", "8bit_blockwise", "8bit")


def implementation(name: str, function: str):
    """An op as the dispatcher runs it, or as it runs where nothing is compiled."""
    if name == "dispatched":
        return getattr(ops, function)
    return getattr(plain if function.startswith("optimizer") else plain_clipping, function)


def numpy(tensor):
    """Array of a tensor; float16 and bfloat16 as the float32 numbers they are."""
    tensor = tensor.detach().cpu()
    return tensor.float().numpy() if tensor.is_floating_point() else tensor.numpy()


def gradient(p):
    """A gradient over many magnitudes, of p's shape, dtype, device and strides."""
    g = torch.randn(p.shape) * torch.randn(p.shape).mul(2).exp2()
    return torch.empty_like(p).copy_(g.to(p.dtype))


# --- comparisons ---------------------------------------------------------------------------------


def assert_close(actual, want, bound):
    assert actual.dtype == torch.float32
    error = np.abs(numpy(actual).astype(np.float64) - want)
    assert (error <= bound + 2.0**-149).all(), (error - bound).max()


def assert_codes(actual, absmax, levels, want, tolerance, keep_sign, block=256):
    """Codes of float64 values that float32 knows up to `tolerance`.

    Where a value may lie on either side of a threshold, either code is right.
    """
    n = want.size
    blocks = -(-n // block)
    pad = blocks * block - n
    want, tolerance = (np.pad(x, (0, pad)).reshape(blocks, block) for x in (want, tolerance))
    most = np.abs(want).max(1)
    slack = tolerance.max(1)
    assert_close(absmax, most, slack + U * most)
    for b in np.flatnonzero(most > 0):
        s = want[b] / most[b]
        # s moves with the value, with the absmax, and by its own two roundings.
        near = (tolerance[b] + np.abs(s) * slack[b]) / most[b] + 4 * U * np.abs(s)
        low = codes.encode(levels, s - near, keep_sign)
        high = codes.encode(levels, s + near, keep_sign)
        got = numpy(actual).reshape(-1)[b * block : (b + 1) * block]
        assert (low[: got.size] <= got).all() and (got <= high[: got.size]).all()
        # The tolerance is nothing beside the distance of two levels.
        assert (high.astype(int) - low <= 1).all()
    for b in np.flatnonzero(most == 0):
        assert not numpy(actual).reshape(-1)[b * block : (b + 1) * block].any()


# --- one step ------------------------------------------------------------------------------------
#
# Every operation is rounded to nearest: U of its result. Products and sums of terms that do not
# cancel are off by as many U as there are roundings on the way to them; "as if nothing cancelled"
# are the values that the same rule gives for the magnitudes of its inputs. On the way to
#
#   a gradient        two scales, one of them rounded before; the decay's factor; the sum      5
#   a state           the square of a gradient (11), the factor 1 - beta, its product, beta's
#                     product and the sum                                                     15
#   a numerator       of a state or gradient: two corrections with their products, the sum    20
#   a square          a state, and its correction                                             20
#
# The update numerator / (sqrt(square) + eps) rises with the numerator and falls with the square, so
# its ends are those of the two. Root, eps, sum, quotient, step size and product add 6 U, a GPU's
# root and quotient, off by two units in the last place each, 8 U more: 16 U.
#
# The parameter moves by the update times the learning rate, and is rounded with every decay: the
# factor, the product and the sum, 3 U of what it was and became; at last to its dtype.
STATE = 16 * U
TERMS = 20 * U
UPDATE = 16 * U


@dataclass
class Tolerance:
    states: tuple  # [n] each
    update: np.ndarray


def tolerance(rule, h, p, g, states, t) -> Tolerance:
    """How far states and update of a step may be off."""
    found = reference.RULES[rule]
    p, g, *states = (np.asarray(x, np.float64) for x in (p, g, *states))
    decayed, decayed_size = g, np.abs(g)
    if found.decay == "l2":
        decayed = g + h.weight_decay * p
        decayed_size = np.abs(g) + h.weight_decay * np.abs(p)
    _, numerator, square = found.terms(h, decayed, tuple(states), t)
    sizes, numerator_size, square_size = found.terms(
        h, decayed_size, tuple(np.abs(s) for s in states), t
    )
    off = TERMS * numerator_size
    if found.by_sign:
        # A sum next to zero may get either sign.
        update = np.where(np.abs(numerator) <= off, 2.0, 0.0)
    elif square is None:
        update = off
    else:
        least, most = (
            np.sqrt(np.maximum(square + side * TERMS * square_size, 2.0**-126)) + h.eps
            for side in (-1, 1)
        )
        size = np.abs(numerator)
        middle = size / (np.sqrt(np.maximum(square, 2.0**-126)) + h.eps)
        highest = (size + off) / least
        update = np.maximum(highest - middle, middle - (size - off) / most) + UPDATE * highest
    return Tolerance(tuple(STATE * s + 2.0**-149 for s in sizes), update)


def assert_step(param, stored, rule, h, before, g, t, block=None, **how):
    """One step from `before`, parameter and states as arrays, with gradient g, against float64.

    `stored`: float32 states, or pairs of codes and absmax per `block` elements.
    """
    p0, states = before
    want = reference.advance(rule, h, p0, g, states, t, drop_bad=block is not None, **how)
    usable = np.where(np.isfinite(g), g, 0.0)
    allowed = tolerance(rule, h, p0, usable, states, t)
    for place, levels, value, off in zip(
        stored, reference.RULES[rule].maps, want.states, allowed.states, strict=True
    ):
        if block is None:
            assert_close(place, value, off)
        else:
            assert_codes(*place, levels, value, off, levels is reference.SIGNED, block)

    update, off = np.abs(want.update), allowed.update
    off = np.where(want.param == p0, np.minimum(off, update), off)  # elements that stand still
    if want.scale != 1.0 or how.get("max_unorm"):
        # n squares summed in float32 in any order; the norm moves with what it is of.
        norm = np.linalg.norm(update)
        relative = (update.size + 8) * U + (np.linalg.norm(off) / norm if norm > 0 else 0.0)
        off = off + relative * update
    relative, absolute = ROUNDING[param.dtype]
    sizes = np.abs(np.float64(p0)) + np.abs(want.param)
    bound = h.lr * want.scale * off + 3 * U * sizes + relative * np.abs(want.param) + absolute
    error = np.abs(numpy(param).astype(np.float64) - want.param)
    assert (error <= bound * (1 + 1e-6)).all(), (error - bound).max()
    return want


# --- parameters with states ----------------------------------------------------------------------


def _maps(device):
    return (torch.from_numpy(x.copy()).to(device) for x in (reference.SIGNED, reference.UNSIGNED))


class Parameter:
    """A parameter with states of one format, zeros at first."""

    def __init__(self, rule, form, n, dtype, device):
        self.rule, self.form = rule, form
        self.param = torch.randn(n).to(dtype).to(device)
        count = len(reference.RULES[rule].maps)
        rows = [2, 1] if count == 3 else [1] * count  # of the two tensors
        shapes = [(2, n) if r == 2 else (n,) for r in rows]
        kind = torch.float32 if form == "32bit" else torch.uint8
        self.states = [torch.zeros(shape, dtype=kind, device=device) for shape in shapes]
        blocks = -(-n // 256) if form == "8bit_blockwise" else 1
        self.scales = [
            torch.zeros((2, blocks) if r == 2 else (blocks,), device=device) for r in rows
        ]

    @property
    def block(self):
        """Elements per absmax."""
        return {"32bit": None, "8bit_blockwise": 256, "8bit": self.param.numel()}[self.form]

    def stored(self):
        """The states one by one: tensors, or pairs of codes and absmax."""
        states, scales = (
            [row for t in tensors for row in (t if t.dim() == 2 else t[None])]
            for tensors in (self.states, self.scales)
        )
        return states if self.form == "32bit" else list(zip(states, scales, strict=True))

    def snapshot(self):
        """Parameter and states as arrays."""
        if self.form == "32bit":
            states = tuple(numpy(s).copy() for s in self.stored())
        else:
            pairs = [tuple(numpy(x).copy() for x in pair) for pair in self.stored()]
            states = reference.decode(self.rule, pairs, self.block)
        return numpy(self.param).copy(), states


def options(h, taken, device, *, gnorm_scale=1.0, skip_zeros=False, **named):
    """Arguments of a step behind its lists; `taken` steps were taken before."""
    rest = (h.beta1, h.beta2, h.beta3, h.alpha, h.eps, h.weight_decay, gnorm_scale, skip_zeros)
    named = {"t_alpha": h.t_alpha, "t_beta3": h.t_beta3, **named}
    return (torch.tensor(taken, device=device), None, h.lr, *rest), named


def _arguments(parameters, grads):
    """Lists of a call, scales of the states, and their levels."""
    first = parameters[0]
    lists = [[p.states[k] for p in parameters if k < len(p.states)] for k in range(2)]
    lists = [first.rule, [p.param for p in parameters], grads, *lists]
    if first.form == "32bit":
        return lists, [], []
    qmaps = list(_maps(first.param.device))
    scales = [[p.scales[k] for p in parameters if k < len(p.scales)] for k in range(2)]
    if first.form == "8bit":
        scales = [torch.cat(list_) if list_ else None for list_ in scales]
    if len(first.states) == 1:
        qmaps[1] = None
    return lists, scales, qmaps


def preview(functions, parameters, grads, h, taken, **named):
    """Sums of squares of a list of Parameters and of their updates."""
    first = parameters[0]
    lists, scales, qmaps = _arguments(parameters, grads)
    tail, named = options(h, taken, first.param.device, **named)
    op = implementation(functions, f"optimizer_preview_{first.form}")
    return op(*lists, *scales, *qmaps, *tail, **named)


def call(functions, parameters, grads, h, taken, **named):
    """A step of a list of Parameters; `functions` is "dispatched" or "plain"."""
    first = parameters[0]
    lists, scales, qmaps = _arguments(parameters, grads)
    tail, named = options(h, taken, first.param.device, **named)
    new = []
    if first.form == "8bit":
        new = [None if o is None else torch.full_like(o, torch.nan) for o in scales]
    op = implementation(functions, f"optimizer_step_{first.form}")
    op(*lists, *scales, *new, *qmaps, *tail, **named)
    if first.form == "8bit":
        for k, values in enumerate(new):
            for i, p in enumerate(parameters):
                if values is not None:
                    p.scales[k] = values[i : i + 1]
