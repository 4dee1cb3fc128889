# SPDX-License-Identifier: MIT
"""4-bit blockwise quantization: NF4 and FP4 (Dettmers et al. 2023, arXiv:2305.14314)."""

import torch
from torch import Tensor

from .. import _ops  # noqa: F401  (registers the ops)
from .._checks import FLOATS, check, check_dtype, check_numel, check_output
from .._codes4 import BLOCKSIZES, LEVELS, QUANT_TYPES, STORAGES, levels
from .scales import (
    NESTED_BLOCKSIZE,
    nested_arguments,
    plain_scales,
    quantize_scales,
    weight_arguments,
)
from .state import QuantState

__all__ = [
    "check_state_4bit",
    "dequantize_4bit",
    "dequantize_fp4",
    "dequantize_nf4",
    "gemv_4bit",
    "get_4bit_type",
    "quantize_4bit",
    "quantize_fp4",
    "quantize_nf4",
]

_quantize = torch.ops.bitsandbytes.quantize_4bit.default
_dequantize = torch.ops.bitsandbytes.dequantize_4bit
_dequantize_nested = torch.ops.bitsandbytes.dequantize_4bit_nested

BLOCKSIZE = 64


def get_4bit_type(
    typename: str, device: torch.device | str | None = None, blocksize: int = BLOCKSIZE
) -> Tensor:
    """Returns the levels of a 4-bit type by code.

    Args:
        typename: ``"nf4"``, ``"fp4"``, ``"int4"`` or ``"af4"``.
        device: Where the table goes. Default: CUDA where torch has it, else the CPU.
        blocksize: Block size that ``"af4"`` is made for; only 64 is known.

    Returns:
        A new float32 tensor ``[16]``; the largest magnitude is 1.

    Raises:
        NotImplementedError: The type, or ``"af4"`` for this block size, is not known.

    Example:
        >>> get_4bit_type("fp4", "cpu")[:4]
        tensor([0.0000, 0.0052, 0.6667, 1.0000])
    """
    name = "get_4bit_type"
    if typename not in LEVELS:
        raise NotImplementedError(
            f"{name}: typename must be one of {sorted(LEVELS)}, got {typename!r}"
        )
    if typename == "af4" and blocksize != BLOCKSIZE:
        raise NotImplementedError(
            f"{name}: blocksize must be {BLOCKSIZE} for 'af4', got {blocksize}"
        )
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return _table(typename, torch.device(device)).clone()


def _table(quant_type: str, device: torch.device) -> Tensor:
    """Returns the shared table of a type. It must not be modified."""
    # Compat: the table has no negative zero, though the codes of fp4 do.
    return levels(quant_type, device, negative_zero=False)


def quantize_4bit(
    A: Tensor,
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int | None = None,
    compress_statistics: bool = False,
    quant_type: str = "fp4",
    quant_storage: torch.dtype = torch.uint8,
) -> tuple[Tensor, QuantState]:
    """Quantizes a tensor to 4-bit codes with one scale per block of consecutive elements.

    Each block is divided by its absolute maximum and each element replaced by the code of the
    nearest level. Two codes share a byte, the first in its upper half. The result is the same, bit
    for bit, on every device.

    Args:
        A: Tensor of any shape and strides; float32, float16 or bfloat16. Blocks run over its
            elements in row-major order.
        absmax: Tensor of ``ceil(n / blocksize)`` elements that receives the scales, or their codes
            with `compress_statistics`.
        out: Tensor of `quant_storage` that receives the packed codes.
        blocksize: Elements per block: 32, 64, 128 ... 4096. Default: 64.
        compress_statistics: Quantize the scales as well, to 8 bits in blocks of 256.
        quant_type: ``"nf4"`` or ``"fp4"``.
        quant_storage: dtype of the packed codes. Their bytes are the same in each; zero bytes fill
            up the last element.

    Returns:
        Packed codes of shape ``[ceil(ceil(n / 2) / itemsize), 1]``, and the state that
        :func:`dequantize_4bit` needs.

    Raises:
        ValueError: `blocksize`, `quant_type`, `quant_storage` or the dtype of A is not one of those
            named above, or an output does not fit.

    Example:
        >>> x = torch.tensor([1.0, -1.0, 0.5, 0.0])
        >>> packed, state = quantize_4bit(x, quant_type="nf4")
        >>> packed.flatten().tolist()
        [240, 199]
    """
    name = "quantize_4bit"
    blocksize = BLOCKSIZE if blocksize is None else blocksize
    _check(name, blocksize, quant_type, "A", A.dtype)
    if quant_storage not in STORAGES:
        raise ValueError(
            f"{name}: quant_storage must be an integer or floating-point dtype, got {quant_storage}"
        )
    check_output(name, "absmax", absmax, -(-A.numel() // blocksize))
    elements = -(-((A.numel() + 1) // 2) // quant_storage.itemsize)
    check_output(name, "out", out, elements, quant_storage)

    packed, scales = _quantize(A, blocksize, quant_type, quant_storage)
    offset = state2 = None
    if compress_statistics:
        scales, offset, state2 = quantize_scales(scales, NESTED_BLOCKSIZE)
    if absmax is not None:
        scales = absmax.copy_(scales.view(absmax.shape))
    if out is not None:
        packed = out.copy_(packed.view(out.shape))
    state = QuantState(
        absmax=scales,
        shape=A.shape,
        blocksize=blocksize,
        quant_type=quant_type,
        dtype=A.dtype,
        offset=offset,
        state2=state2,
    )
    state.share_code(_table(quant_type, A.device))
    return packed, state


def quantize_fp4(
    A: Tensor,
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int | None = None,
    compress_statistics: bool = False,
    quant_storage: torch.dtype = torch.uint8,
) -> tuple[Tensor, QuantState]:
    """:func:`quantize_4bit` to FP4."""
    return quantize_4bit(A, absmax, out, blocksize, compress_statistics, "fp4", quant_storage)


def quantize_nf4(
    A: Tensor,
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int | None = None,
    compress_statistics: bool = False,
    quant_storage: torch.dtype = torch.uint8,
) -> tuple[Tensor, QuantState]:
    """:func:`quantize_4bit` to NF4."""
    return quantize_4bit(A, absmax, out, blocksize, compress_statistics, "nf4", quant_storage)


def dequantize_4bit(
    A: Tensor,
    quant_state: QuantState | tuple | list | None = None,
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int | None = None,
    quant_type: str = "fp4",
) -> Tensor:
    """Turns the packed codes of :func:`quantize_4bit` back into numbers.

    Args:
        A: Packed codes, of any dtype that `quantize_4bit` stores them in.
        quant_state: State of the codes; `absmax`, `blocksize` and `quant_type` are then ignored.
            The lists of bitsandbytes 0.41 and older are read as well.
        absmax: float32 scales ``[ceil(n / blocksize)]``, when there is no state.
        out: Tensor of the state's shape and dtype for the result. Without a state it is needed,
            and its shape and dtype hold.
        blocksize: Elements per block, when there is no state. Default: 64.
        quant_type: ``"nf4"`` or ``"fp4"``, when there is no state.

    Returns:
        ``level * scale`` in the shape and dtype of the state, rounded once; `out` if given. Where A
        is one row ``[1, bytes]``, packed codes that were transposed, and the state's shape is a
        matrix, the result is transposed.

    Raises:
        ValueError: Neither `quant_state` nor both of `absmax` and `out` were given, a part of the
            state has a value that is not known, or `out` does not fit.
        RuntimeError: The parts of the state do not fit A.

    Example:
        >>> packed, state = quantize_4bit(torch.tensor([[2.0, -2.0], [1.0, 0.0]]))
        >>> dequantize_4bit(packed, state)
        tensor([[ 2., -2.],
                [ 1.,  0.]])
    """
    name = "dequantize_4bit"
    if quant_state is None:
        if absmax is None or out is None:
            raise ValueError(
                f"{name}: quant_state, or absmax and out, must be given, got absmax "
                f"{_given(absmax)} and out {_given(out)}"
            )
        quant_state = QuantState(
            absmax,
            shape=out.shape,
            blocksize=BLOCKSIZE if blocksize is None else blocksize,
            quant_type=quant_type,
            dtype=out.dtype,
        )
    elif isinstance(quant_state, (tuple, list)):
        quant_state = QuantState.from_list(quant_state)
    state = quant_state
    _check(name, state.blocksize, state.quant_type, "dtype", state.dtype)
    check_output(name, "out", out, state.shape, state.dtype)

    if state.nested:
        op = _dequantize_nested
        *scales, nested_blocksize = nested_arguments(state, A.device)
        rest = (state.blocksize, nested_blocksize, state.quant_type, state.shape, state.dtype)
    else:
        op = _dequantize
        scales = [plain_scales(state)]
        rest = (state.blocksize, state.quant_type, state.shape, state.dtype)
    if out is None:
        result = op.default(A, *scales, *rest)
    elif out.is_contiguous():
        op.out(A, *scales, *rest, out)
        result = out
    else:
        result = out.copy_(op.default(A, *scales, *rest))
    transposed = A.dim() == 2 and A.shape[0] == 1 and A.shape[1] > 1
    return result.t() if transposed and result.dim() == 2 else result


def dequantize_fp4(
    A: Tensor,
    quant_state: QuantState | tuple | list | None = None,
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int | None = None,
) -> Tensor:
    """:func:`dequantize_4bit` of FP4; where there is a state, its type counts."""
    return dequantize_4bit(A, quant_state, absmax, out, blocksize, "fp4")


def dequantize_nf4(
    A: Tensor,
    quant_state: QuantState | tuple | list | None = None,
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int | None = None,
) -> Tensor:
    """:func:`dequantize_4bit` of NF4; where there is a state, its type counts."""
    return dequantize_4bit(A, quant_state, absmax, out, blocksize, "nf4")


def gemv_4bit(
    A: Tensor,
    B: Tensor,
    out: Tensor | None = None,
    transposed_A: bool = False,
    transposed_B: bool = False,
    state: QuantState | tuple | list | None = None,
) -> Tensor:
    """Multiplies a vector, or any number of them, by a 4-bit weight: ``A @ W.t()``.

    The weight is never dequantized in memory as a whole. Nothing is recorded for a backward pass;
    `bitsandbytes.matmul_4bit` does that.

    Args:
        A: ``[..., K]``; float32, float16 or bfloat16.
        B: Packed codes of W ``[N, K]`` as :func:`quantize_4bit` returns them, or their transpose.
        out: Tensor ``[..., N]`` of A's dtype that receives the result.
        transposed_A: Ignored.
        transposed_B: Ignored.
        state: State of the codes, for a weight of two dimensions.

    Returns:
        ``[..., N]`` in A's dtype, each sum made in float32 from W rounded to A's dtype; `out` if
        given.

    Raises:
        ValueError: There is no state, its shape has not two dimensions, or `out` does not fit.
        RuntimeError: A or B does not fit the state.

    Example:
        >>> packed, state = quantize_4bit(torch.eye(2))
        >>> gemv_4bit(torch.tensor([3.0, 5.0]), packed, state=state)
        tensor([3., 5.])
    """
    name = "gemv_4bit"
    if state is None:
        raise ValueError(f"{name}: state must be given, got None")
    if isinstance(state, (tuple, list)):
        state = QuantState.from_list(state)
    if len(state.shape) != 2:
        raise ValueError(f"{name}: state must be of a matrix [N, K], got {tuple(state.shape)}")
    check_output(name, "out", out, (*A.shape[:-1], state.shape[0]), A.dtype)
    weight, nested = weight_arguments(state, A.device)
    result = torch.ops.bitsandbytes.gemm_4bit.default(A, B, *weight, None, *nested)
    return result if out is None else out.copy_(result)


def _given(tensor: Tensor | None) -> str:
    return "None" if tensor is None else "a tensor"


def _check(name: str, blocksize: int, quant_type: str, what: str, dtype: torch.dtype) -> None:
    if blocksize not in BLOCKSIZES:
        raise ValueError(f"{name}: blocksize must be one of {BLOCKSIZES}, got {blocksize}")
    if quant_type not in QUANT_TYPES:
        raise ValueError(f"{name}: quant_type must be one of {QUANT_TYPES}, got {quant_type!r}")
    if dtype not in FLOATS:
        raise ValueError(f"{name}: {what} must be float32, float16 or bfloat16, got {dtype}")


def check_state_4bit(name: str, state: QuantState) -> None:
    """Raises ValueError unless the state has as many scales and levels as its shape asks for."""

    def check_floats(entry: str, tensor: Tensor, count: int, what: str) -> None:
        check_dtype(name, entry, tensor, *FLOATS)
        check_numel(name, entry, tensor, count, what)

    check(state.shape is not None, name, "shape", "that of the weight", None)
    check(state.blocksize in BLOCKSIZES, name, "blocksize", f"one of {BLOCKSIZES}", state.blocksize)
    check_floats("quant_map", state.levels(), 16, "levels")
    blocks = -(-state.shape.numel() // state.blocksize)
    if not state.nested:
        return check_floats("absmax", state.absmax, blocks, "scales")
    check_dtype(name, "absmax", state.absmax, torch.uint8)
    check_numel(name, "absmax", state.absmax, blocks, "codes of scales")
    second = state.state2
    check_floats("nested_quant_map", second.levels(), 256, "levels")
    check_floats("nested_absmax", second.absmax, -(-blocks // second.blocksize), "scales")
