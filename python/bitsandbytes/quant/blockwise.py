# SPDX-License-Identifier: MIT
"""8-bit blockwise quantization (Dettmers et al. 2022, arXiv:2110.02861, section 2)."""

import functools
import random
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .. import _ops  # noqa: F401  (registers the ops)
from .._checks import FLOATS, check_output
from .codes import default_code
from .scales import nested_arguments, plain_scales, quantize_scales
from .state import QuantState

__all__ = ["dequantize_blockwise", "quantize_blockwise"]


_quantize = torch.ops.bitsandbytes.quantize_blockwise.default
_quantize_stochastic = torch.ops.bitsandbytes.quantize_blockwise_stochastic.default
_dequantize = torch.ops.bitsandbytes.dequantize_blockwise
_dequantize_nested = torch.ops.bitsandbytes.dequantize_blockwise_nested

LEAST_RANDOM_NUMBERS = 1024  # that stochastic rounding takes


def _takes_old_order(function: Callable) -> Callable:
    """Compat: bitsandbytes 0.38 and older had ``A, code, absmax, rand, out, blocksize``."""

    @functools.wraps(function)
    def call(*args, **kwargs):
        if 4 <= len(args) <= 6:
            new_order = None, 0, False  # out, blocksize, nested, where they are not given
            fourth, fifth, sixth = args[3:] + new_order[len(args) - 3 :]
            if (
                (isinstance(fourth, Tensor) and fourth.is_floating_point())
                or fifth is None
                or isinstance(fifth, Tensor)
                or not isinstance(sixth, bool)
            ):
                kwargs |= zip(("rand", "out", "blocksize"), args[3:], strict=False)
                args = args[:3]
        return function(*args, **kwargs)

    return call


@_takes_old_order
def quantize_blockwise(
    A: Tensor,
    code: Tensor | None = None,
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int = 4096,
    nested: bool = False,
    *,
    rand: Tensor | None = None,
) -> tuple[Tensor, QuantState]:
    """Quantizes a tensor to 8-bit codes with one scale per block of consecutive elements.

    Each block is divided by its absolute maximum and each element replaced by the index of the
    nearest level of `code`, or, with `rand`, of one of the two levels that it lies between. The
    result is the same, bit for bit, on every device.

    Args:
        A: Tensor of any shape and strides; float32, float16 or bfloat16. Blocks run over its
            elements in row-major order.
        code: float32 levels ``[1 to 256]``, in any order; ascending ones are found faster. Default:
            the signed dynamic map.
        absmax: float32 ``[ceil(n / blocksize)]`` that receives the scales.
        out: uint8 tensor of A's shape that receives the codes.
        blocksize: Elements per block. CUDA: 32, 64, 128 ... 4096; CPU: any positive number.
        nested: Quantize the scales as well.
        rand: Round stochastically, so that the mean of many results is A: float32 ``[1024 or
            more]`` of numbers uniform in [0, 1), on A's device. Elements take one after the other
            from a place on that Python's `random` chooses (in compiled code, from the first), and
            begin anew at the end.

    Returns:
        uint8 codes of A's shape, and the state that :func:`dequantize_blockwise` needs.

    Raises:
        ValueError: `blocksize` is not positive, A is not of a floating dtype named above, or an
            output does not fit.
        AssertionError: `rand` holds fewer than 1024 numbers.
        RuntimeError: `code` does not fit A or the device does not have this `blocksize`.

    Example:
        >>> x = torch.randn(1000)
        >>> codes, state = quantize_blockwise(x, blocksize=256)
        >>> (dequantize_blockwise(codes, state) - x).abs().max() < 0.05
        tensor(True)
    """
    name = "quantize_blockwise"
    if blocksize <= 0:
        raise ValueError(f"{name}: blocksize must be positive, got {blocksize}")
    if A.dtype not in FLOATS:
        raise ValueError(f"{name}: A must be float32, float16 or bfloat16, got {A.dtype}")
    check_output(name, "out", out, A.shape, torch.uint8)
    check_output(name, "absmax", absmax, -(-A.numel() // blocksize))
    if rand is not None and rand.numel() < LEAST_RANDOM_NUMBERS:
        raise AssertionError(
            f"{name}: rand must have at least {LEAST_RANDOM_NUMBERS} elements, got {rand.numel()}"
        )

    shared = code is None
    code = default_code("dynamic", A.device) if shared else code.to(A.device)
    if rand is None:
        codes, scales = _quantize(A, code, blocksize)
    else:
        # A compiled graph cannot draw Python's random numbers.
        start = 0 if torch.compiler.is_compiling() else random.randrange(LEAST_RANDOM_NUMBERS)
        codes, scales = _quantize_stochastic(A, code, blocksize, rand, start)

    offset = state2 = None
    if nested:
        scales, offset, state2 = quantize_scales(scales, blocksize)
    if absmax is not None:
        scales = absmax.copy_(scales.view(absmax.shape))
    if out is not None:
        codes = out.copy_(codes)
    state = QuantState(
        absmax=scales, code=code, blocksize=blocksize, dtype=A.dtype, offset=offset, state2=state2
    )
    if shared:
        state.share_code(code)
    return codes, state


def dequantize_blockwise(
    A: Tensor,
    quant_state: QuantState | Sequence | None = None,
    absmax: Tensor | None = None,
    code: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int = 4096,
    nested: bool = False,
) -> Tensor:
    """Turns the codes of :func:`quantize_blockwise` back into numbers.

    Args:
        A: uint8 codes of any shape.
        quant_state: State of the codes; `absmax`, `code` and `blocksize` are then ignored. Taken
            too are the forms of bitsandbytes 0.41 and older: a pair ``(absmax, code)``, whose block
            size is the argument, and a list ``[absmax, code, blocksize, nested, dtype, offset,
            state2]``.
        absmax: float32 scales ``[ceil(n / blocksize)]``, when there is no state.
        code: float32 levels ``[1 to 256]``. Default: the signed dynamic map. Codes beyond its end
            become NaN.
        out: Tensor of A's shape for the result; of the state's dtype, or of any floating dtype
            where the state does not name one.
        blocksize: Elements per block, when there is no state.
        nested: Ignored; the state knows.

    Returns:
        ``code[A] * absmax`` per block, rounded once to the dtype of the state (float32 where it
        does not name one); `out` if given.

    Raises:
        ValueError: Neither `quant_state` nor `absmax` was given, A is not uint8, or `out` does not
            fit.
        RuntimeError: The parts of the state do not fit A.

    Example:
        >>> codes, state = quantize_blockwise(torch.ones(4))
        >>> dequantize_blockwise(codes, state)
        tensor([1., 1., 1., 1.])
    """
    name = "dequantize_blockwise"
    if quant_state is None and absmax is None:
        raise ValueError(f"{name}: quant_state or absmax must be given, got neither")
    if A.dtype != torch.uint8:
        raise ValueError(f"{name}: A must be uint8, got {A.dtype}")
    if quant_state is None:
        quant_state = QuantState(absmax, code=code, blocksize=blocksize)
    elif isinstance(quant_state, (tuple, list)):
        if len(quant_state) not in (2, 7):
            raise ValueError(
                f"{name}: quant_state must be a QuantState or a list of 2 or 7 entries, "
                f"got {len(quant_state)} entries"
            )
        quant_state = QuantState.from_list(quant_state, blocksize)
    if quant_state.blocksize <= 0:
        raise ValueError(f"{name}: blocksize must be positive, got {quant_state.blocksize}")

    code = quant_state.levels()
    code = default_code("dynamic", A.device) if code is None else code.to(A.device)
    dtype = quant_state.dtype
    if dtype is None:
        dtype = torch.float32 if out is None or out.dtype not in FLOATS else out.dtype
    if quant_state.nested:
        op = _dequantize_nested
        *scales, nested_blocksize = nested_arguments(quant_state, A.device)
        rest = (code, quant_state.blocksize, nested_blocksize, dtype)
    else:
        op = _dequantize
        scales = [plain_scales(quant_state)]
        rest = (code, quant_state.blocksize, dtype)
    if out is None:
        return op.default(A, *scales, *rest)
    check_output(name, "out", out, A.shape, dtype)
    if out.is_contiguous():
        op.out(A, *scales, *rest, out)
    else:
        out.copy_(op.default(A, *scales, *rest))
    return out
