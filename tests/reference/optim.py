# SPDX-License-Identifier: MIT
"""Executable specification of the optimizers, in NumPy float64 and without bitsandbytes.

The decay rates of the recurrences are float32 numbers, as in the public format's kernels; the bias
corrections use them as given. t is the number of the step, counted from 1.

Adam (Kingma & Ba 2014, arXiv:1412.6980) with decoupled weight decay (Loshchilov & Hutter 2017,
arXiv:1711.05101), where the parameter shrinks after its update:

    m <- beta1 m + (1 - beta1) g
    v <- beta2 v + (1 - beta2) g^2
    p <- (p - lr m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps)) (1 - lr weight_decay)

AdEMAMix (Pagliardini et al. 2024, arXiv:2409.03137) adds a second, slower average to m:

    m2 <- beta3 m2 + (1 - beta3) g
    p  <- (p - lr (m / (1 - beta1^t) + alpha m2) / (sqrt(v / (1 - beta2^t)) + eps)) (1 - lr wd)

Lion (Chen et al. 2023, arXiv:2302.06675) shrinks the parameter before its update; SGD, RMSprop
(Tieleman & Hinton 2012) and Adagrad (Duchi et al. 2011) add weight_decay * p to the gradient.

LAMB (You et al. 2019, arXiv:1904.00962) is Adam, LARS (You et al. 2017, arXiv:1708.03888) is SGD,
and both bound the update: its norm is at most max_unorm times the norm of the parameter.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from . import codes

__all__ = [
    "BLOCK",
    "RULES",
    "Hyper",
    "Rule",
    "State8",
    "Stepped",
    "adam",
    "advance",
    "bounded_scale",
    "decode",
    "encode",
    "percentile_clipping",
]

BLOCK = 256  # elements that share one absmax in 8-bit states
SIGNED = codes.dynamic_map(True)
UNSIGNED = codes.dynamic_map(False)
HISTORY = 100  # norms that percentile clipping remembers


@dataclass(frozen=True)
class Hyper:
    """Hyperparameters."""

    lr: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    beta3: float = 0.9999
    alpha: float = 5.0
    t_alpha: float = 0.0
    t_beta3: float = 0.0


def _f32(x) -> np.float64:
    return np.float64(np.float32(x))


# --- rules ---------------------------------------------------------------------------------------
#
# Each takes hyperparameters, gradient (with L2 decay, where that is meant), states and t. It gives
# the new states, and numerator and square of the update over the learning rate, which is
# numerator / (sqrt(square) + eps), without a square the numerator, or its sign.


@dataclass(frozen=True)
class Rule:
    """A rule, the maps of its states, and where weight decay enters: "l2", "before", "after"."""

    terms: Callable
    maps: tuple
    decay: str
    by_sign: bool = False


def _adam(h: Hyper, g, states, t: int):
    m, v = states
    beta1, beta2 = _f32(h.beta1), _f32(h.beta2)
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g * g
    return (m, v), m / (1 - h.beta1**t), v / (1 - h.beta2**t)


def ademamix_schedule(h: Hyper, t: int):
    """Returns alpha and beta3 of step t.

    Over t_alpha steps alpha grows from 0 linearly; over t_beta3 steps beta3 grows from beta1 so
    that the half-life of the average grows linearly (section 3 of the paper).
    """
    alpha = h.alpha * min(t / h.t_alpha, 1.0) if h.t_alpha else h.alpha
    if not h.t_beta3 or t >= h.t_beta3:
        return alpha, h.beta3
    share = t / h.t_beta3
    inverse = (1 - share) / np.log(h.beta1) + share / np.log(h.beta3)
    return alpha, np.exp(1 / inverse)


def _ademamix(h: Hyper, g, states, t: int):
    m1, m2, v = states
    alpha, beta3 = ademamix_schedule(h, t)
    beta1, beta2, beta3 = _f32(h.beta1), _f32(h.beta2), _f32(beta3)
    m1 = beta1 * m1 + (1 - beta1) * g
    m2 = beta3 * m2 + (1 - beta3) * g
    v = beta2 * v + (1 - beta2) * g * g
    return (m1, m2, v), m1 / (1 - h.beta1**t) + alpha * m2, v / (1 - h.beta2**t)


def _lion(h: Hyper, g, states, t: int):
    (m,) = states
    beta1, beta2 = _f32(h.beta1), _f32(h.beta2)
    return (beta2 * m + (1 - beta2) * g,), beta1 * m + (1 - beta1) * g, None


def _momentum(h: Hyper, g, states, t: int):
    (m,) = states
    m = g if t == 1 else _f32(h.beta1) * m + g
    return (m,), m, None


def _rmsprop(h: Hyper, g, states, t: int):
    (v,) = states
    beta1 = _f32(h.beta1)
    v = beta1 * v + (1 - beta1) * g * g
    return (v,), g, v


def _adagrad(h: Hyper, g, states, t: int):
    (v,) = states
    return (v + g * g,), g, v + g * g


RULES = {
    "adam": Rule(_adam, (SIGNED, UNSIGNED), "after"),
    "lion": Rule(_lion, (SIGNED,), "before", by_sign=True),
    "momentum": Rule(_momentum, (SIGNED,), "l2"),
    "rmsprop": Rule(_rmsprop, (SIGNED,), "l2"),
    "adagrad": Rule(_adagrad, (SIGNED,), "l2"),
    "ademamix": Rule(_ademamix, (SIGNED, SIGNED, UNSIGNED), "after"),
}
RULES["lamb"] = RULES["adam"]
RULES["lars"] = RULES["momentum"]


# --- the step ------------------------------------------------------------------------------------


@dataclass
class Stepped:
    """What a step gives."""

    param: np.ndarray
    states: tuple  # before they are quantized
    update: np.ndarray  # over the learning rate, before it is bounded; without decoupled decay
    scale: float  # of the update, that keeps it within its bound


def bounded_scale(p, update, max_unorm: float) -> float:
    """Factor that keeps |update| <= max_unorm |p|. A parameter of zeros bounds nothing."""
    bound = max_unorm * np.sqrt(np.sum(np.square(p)))
    norm = np.sqrt(np.sum(np.square(update)))
    return bound / norm if bound > 0 and norm > bound else 1.0


def advance(
    rule: str,
    h: Hyper,
    p,
    g,
    states,
    t: int,
    *,
    max_unorm: float = 0.0,
    skip_zeros: bool = False,
    drop_bad: bool = False,
) -> Stepped:
    """Step number t of one parameter.

    Args:
        rule: Name in RULES.
        h: Hyperparameters.
        p: Parameter [n].
        g: Gradient [n], scaled.
        states: One [n] per state.
        t: Number of the step, from 1.
        max_unorm: Bound on |update| / |p|; 0 for none.
        skip_zeros: Elements of zero gradient keep parameter and states.
        drop_bad: Elements whose gradient is not finite keep the parameter and lose their states,
            and states beyond float32 become its largest number, as where states are codes.
    """
    found = RULES[rule]
    p, g = (np.asarray(x, np.float64) for x in (p, g))
    old = tuple(np.asarray(s, np.float64) for s in states)
    bad = ~np.isfinite(g) if drop_bad else np.zeros(g.shape, bool)
    skip = g == 0 if skip_zeros else np.zeros(g.shape, bool)
    g = np.where(bad, 0.0, g)
    with np.errstate(all="ignore"):
        start = p * (1 - h.lr * h.weight_decay) if found.decay == "before" else p
        decayed = g + h.weight_decay * p if found.decay == "l2" else g
        new, numerator, square = found.terms(h, decayed, old, t)
        if found.by_sign:
            update = np.sign(numerator)
        elif square is None:
            update = numerator
        else:
            root = np.sqrt(square) + h.eps
            # An element that never had a gradient stays where it is, also without eps.
            update = np.where(root > 0, numerator / np.where(root > 0, root, 1), 0.0)
        update = np.where(bad | skip, 0.0, update)
        scale = bounded_scale(p, update, max_unorm) if max_unorm > 0 else 1.0
        param = start - h.lr * scale * update
        if found.decay == "after":
            param = param * (1 - h.lr * h.weight_decay)
    if drop_bad:
        largest = np.finfo(np.float32).max
        new = tuple(np.where(bad, 0.0, np.clip(s, -largest, largest)) for s in new)
    new = tuple(np.where(skip, s0, s) for s, s0 in zip(new, old, strict=True))
    return Stepped(np.where(bad | skip, p, param), new, update, scale)


def adam(h: Hyper, p, g, m, v, step: int):
    """Returns parameter, first and second moment after a step of Adam."""
    stepped = advance("adam", h, p, g, (m, v), step)
    return (stepped.param, *stepped.states)


# --- states as codes -----------------------------------------------------------------------------


def decode(rule: str, stored, block: int = BLOCK):
    """Returns the states, float32 [n] each, that pairs of codes [n] and absmax stand for."""
    maps = RULES[rule].maps
    return tuple(
        codes.dequantize(levels, code, absmax, block)
        for levels, (code, absmax) in zip(maps, stored, strict=True)
    )


def encode(rule: str, states, block: int = BLOCK):
    """Returns one pair of codes and absmax per state; a signed state keeps its minus sign."""
    return tuple(
        codes.quantize(levels, np.float32(s), block, keep_sign=levels is SIGNED)
        for levels, s in zip(RULES[rule].maps, states, strict=True)
    )


@dataclass
class State8:
    """Adam's moments as 8-bit codes: the signed map for the first, the unsigned for the second."""

    code1: np.ndarray  # uint8 [n]
    code2: np.ndarray
    absmax1: np.ndarray  # float32 [ceil(n / 256)]
    absmax2: np.ndarray

    @classmethod
    def zeros(cls, n: int) -> "State8":
        blocks = -(-n // BLOCK)
        return cls(*(np.zeros(n, np.uint8) for _ in "12"), *(np.zeros(blocks) for _ in "12"))

    def moments(self):
        """Returns both moments [n], as float32 numbers."""
        return decode("adam", ((self.code1, self.absmax1), (self.code2, self.absmax2)))

    @classmethod
    def of(cls, m, v) -> "State8":
        """Quantizes both moments; a negative first moment never becomes zero."""
        (code1, absmax1), (code2, absmax2) = encode("adam", (m, v))
        return cls(code1, code2, absmax1, absmax2)

    def advance(self, h: Hyper, p, g, step: int):
        """Returns the new parameter, the new state and its moments before quantization.

        An element whose gradient is not finite keeps its parameter and loses its moments. Moments
        beyond float32 become its largest number.
        """
        stepped = advance("adam", h, p, g, self.moments(), step, drop_bad=True)
        return stepped.param, State8.of(*stepped.states), stepped.states


# --- percentile clipping -------------------------------------------------------------------------


def percentile_clipping(history, norm: float, t: int, percentile: int):
    """Adaptive clipping of a gradient of this norm in step t, counted from 1.

    Args:
        history: The last hundred squares of norms, float64 [100]; changed in place.
        norm: Norm of the gradient.
        t: Number of the step, from 1.
        percentile: Place in the sorted history that a norm is clipped to.

    Returns:
        The value that norms are clipped to, and the factor for this gradient.
    """
    if np.isfinite(norm):
        if t == 1 or not history.any():
            history[:] = norm**2
        history[t % HISTORY] = norm**2
    clip = np.sqrt(np.sort(history)[percentile])
    return clip, (clip / norm if np.isfinite(norm) and norm > clip else 1.0)
