# SPDX-License-Identifier: MIT
"""Executable specification of the optimizers, in NumPy float64 and without bitsandbytes.

Adam (Kingma & Ba 2014, arXiv:1412.6980) with decoupled weight decay (Loshchilov & Hutter 2017,
arXiv:1711.05101), where the parameter shrinks after its update:

    m <- beta1 m + (1 - beta1) g
    v <- beta2 v + (1 - beta2) g^2
    p <- (p - lr m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps)) (1 - lr weight_decay)

The decay rates of the recurrences are float32 numbers, as in the public format's kernels; the bias
corrections use them as given.
"""

from dataclasses import dataclass

import numpy as np

from . import codes

__all__ = ["BLOCK", "ONE_STATE", "Adam", "State8", "adam"]

BLOCK = 256  # elements that share one absmax in 8-bit states
SIGNED = codes.dynamic_map(True)
UNSIGNED = codes.dynamic_map(False)


@dataclass(frozen=True)
class Adam:
    """Hyperparameters."""

    lr: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0


def adam(h: Adam, p, g, m, v, step: int):
    """Returns parameter, first and second moment after step number `step`, counted from 1."""
    p, g, m, v = (np.asarray(x, np.float64) for x in (p, g, m, v))
    beta1, beta2 = (np.float64(np.float32(beta)) for beta in (h.beta1, h.beta2))
    with np.errstate(all="ignore"):
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g * g
        c1 = 1 - np.float64(h.beta1) ** step
        c2 = 1 - np.float64(h.beta2) ** step
        p = p - h.lr * (m / c1) / (np.sqrt(v / c2) + h.eps)
        return p * (1 - h.lr * h.weight_decay), m, v


@dataclass
class State8:
    """Moments as 8-bit codes: the signed map for the first, the unsigned one for the second."""

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
        return (
            codes.dequantize(SIGNED, self.code1, self.absmax1, BLOCK),
            codes.dequantize(UNSIGNED, self.code2, self.absmax2, BLOCK),
        )

    @classmethod
    def of(cls, m, v) -> "State8":
        """Quantizes both moments; a negative first moment never becomes zero."""
        code1, absmax1 = codes.quantize(SIGNED, np.float32(m), BLOCK, keep_sign=True)
        code2, absmax2 = codes.quantize(UNSIGNED, np.float32(v), BLOCK)
        return cls(code1, code2, absmax1, absmax2)

    def advance(self, h: Adam, p, g, step: int):
        """Returns the new parameter, the new state and its moments before quantization.

        An element whose gradient is not finite keeps its parameter and loses its moments. Moments
        beyond float32 become its largest number.
        """
        finite = np.isfinite(g)
        new, m, v = adam(h, p, np.where(finite, g, 0), *self.moments(), step)
        largest = np.finfo(np.float32).max
        m, v = (np.where(finite, np.clip(x, -largest, largest), 0.0) for x in (m, v))
        return np.where(finite, new, p), State8.of(m, v), (m, v)


# --- rules with one state ------------------------------------------------------------------------
#
# Each returns the new parameter and the new state after step number `step`, in float64.


def lion(h: Adam, p, g, m, step: int):
    """Lion (Chen et al. 2023, arXiv:2302.06675); decoupled weight decay before the update."""
    p, g, m = (np.asarray(x, np.float64) for x in (p, g, m))
    beta1, beta2 = (np.float64(np.float32(beta)) for beta in (h.beta1, h.beta2))
    p = p * (1 - h.lr * h.weight_decay) - h.lr * np.sign(beta1 * m + (1 - beta1) * g)
    return p, beta2 * m + (1 - beta2) * g


def momentum(h: Adam, p, g, m, step: int):
    """SGD with momentum; weight decay is added to the gradient."""
    p, g, m = (np.asarray(x, np.float64) for x in (p, g, m))
    g = g + h.weight_decay * p
    m = g if step == 1 else np.float64(np.float32(h.beta1)) * m + g
    return p - h.lr * m, m


def rmsprop(h: Adam, p, g, v, step: int):
    """RMSprop (Tieleman & Hinton 2012); weight decay is added to the gradient."""
    p, g, v = (np.asarray(x, np.float64) for x in (p, g, v))
    beta1 = np.float64(np.float32(h.beta1))
    g = g + h.weight_decay * p
    v = beta1 * v + (1 - beta1) * g * g
    return p - h.lr * g / (np.sqrt(v) + h.eps), v


def adagrad(h: Adam, p, g, v, step: int):
    """Adagrad (Duchi, Hazan & Singer 2011); weight decay is added to the gradient."""
    p, g, v = (np.asarray(x, np.float64) for x in (p, g, v))
    g = g + h.weight_decay * p
    v = v + g * g
    return p - h.lr * g / (np.sqrt(v) + h.eps), v


ONE_STATE = {"lion": lion, "momentum": momentum, "rmsprop": rmsprop, "adagrad": adagrad}
