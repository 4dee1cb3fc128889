# SPDX-License-Identifier: MIT
"""Quantiles of tensors, the 8-bit map made of them, and histograms in two dimensions."""

import torch
from torch import Tensor

from .._checks import FLOATS, check_output

__all__ = ["create_quantile_map", "estimate_quantiles", "histogram_scatter_add_2d"]

QUANTILES = 256
DEFAULT_OFFSET = 1 / 512


def estimate_quantiles(
    A: Tensor,
    out: Tensor | None = None,
    offset: float = DEFAULT_OFFSET,
    num_quantiles: int = QUANTILES,
) -> Tensor:
    """Finds equally spaced quantiles of a whole tensor, exactly.

    With n elements, quantile k of 256 is the element of rank ``round((offset + k (1 - 2 offset) /
    255) (n - 1))`` in ascending order. NaN counts as the greatest. Nothing is sorted: see
    ``docs/numerics.md`` for the method. The device is not synchronised.

    Args:
        A: float32, float16 or bfloat16 tensor of any shape, of 256 elements or more.
        out: float32 ``[256]`` that receives all 256 quantiles.
        offset: Share of the elements below the first quantile and above the last, 0 to 0.5. With
            fewer quantiles, the default becomes ``1 / (2 num_quantiles)``.
        num_quantiles: 1 to 256. Fewer than 256 are picked from the 256, equally spaced: number i is
            quantile ``i * 255 // (num_quantiles - 1)``.

    Returns:
        float32 ``[num_quantiles]``, ascending; `out` if given and all 256 are asked for.

    Raises:
        NotImplementedError: A has another dtype or fewer than 256 elements, or `num_quantiles` is
            greater than 256.
        ValueError: `offset`, `num_quantiles` or `out` does not fit.

    Example:
        >>> estimate_quantiles(torch.arange(1001.0), offset=0.25)[[0, 255]]
        tensor([250., 750.])
    """
    name = "estimate_quantiles"
    if A.dtype not in FLOATS:
        raise NotImplementedError(f"{name}: A must be float32, float16 or bfloat16, got {A.dtype}")
    if A.numel() < QUANTILES:
        raise NotImplementedError(
            f"{name}: A must have at least {QUANTILES} elements, got {A.numel()}"
        )
    if num_quantiles > QUANTILES:
        raise NotImplementedError(
            f"{name}: num_quantiles must be at most {QUANTILES}, got {num_quantiles}"
        )
    if num_quantiles < 1:
        raise ValueError(f"{name}: num_quantiles must be at least 1, got {num_quantiles}")
    if num_quantiles < QUANTILES and offset == DEFAULT_OFFSET:
        offset = 1 / (2 * num_quantiles)
    if not 0 <= offset <= 0.5:
        raise ValueError(f"{name}: offset must be 0 to 0.5, got {offset}")
    check_output(name, "out", out, QUANTILES, torch.float32)
    quantiles = torch.ops.bitsandbytes.estimate_quantiles.default(A, offset)
    if out is not None:
        quantiles = out.copy_(quantiles.view(out.shape))
    if num_quantiles == QUANTILES:
        return quantiles
    picked = torch.arange(num_quantiles, device=A.device) * (QUANTILES - 1)
    return quantiles.view(-1)[picked // max(num_quantiles - 1, 1)]


def create_quantile_map(A: Tensor, total_bits: int = 8) -> Tensor:
    """Creates a map from the quantiles of a tensor: every level stands for equally many elements.

    Args:
        A: float32, float16 or bfloat16 tensor of 256 elements or more, like those to be quantized.
        total_bits: Bits of a code, 1 to 8; fewer than 8 pad the table with zeros.

    Returns:
        float32 tensor of 256 levels in [-1, 1], ascending, zero among them, on A's device. The
        level of greatest magnitude is 1 or -1; a tensor of zeros gives zeros.

    Raises:
        NotImplementedError: As :func:`estimate_quantiles`.
        ValueError: `total_bits` is out of range.

    Example:
        >>> code = create_quantile_map(torch.randn(10000))
        >>> codes, state = quantize_blockwise(torch.randn(10000), code=code)
    """
    if not 1 <= total_bits <= 8:
        raise ValueError(f"create_quantile_map: total_bits must be 1 to 8, got {total_bits}")
    levels = estimate_quantiles(A, num_quantiles=2**total_bits - 1)
    levels = torch.cat((levels, levels.new_zeros(QUANTILES - levels.numel()))).sort().values
    most = levels.abs().amax()
    return levels / torch.where(most == 0, 1, most)


def histogram_scatter_add_2d(
    histogram: Tensor, index1: Tensor, index2: Tensor, source: Tensor
) -> None:
    """Adds numbers to the cells of a matrix: ``histogram[index1[i], index2[i]] += source[i]``.

    Numbers whose indices lie outside the matrix are left out. The device is not synchronised. On
    CPU and CUDA the numbers of a cell are added in an order that does not depend on threads.

    Args:
        histogram: float32 ``[rows, columns]``, changed in place.
        index1: int32 rows, of any shape.
        index2: int32 columns, as many.
        source: float32 numbers to add, as many.

    Raises:
        AssertionError: An argument has another dtype, number of dimensions, size or device.

    Example:
        >>> histogram, index = torch.zeros(2, 2), torch.tensor([0, 1, 1], dtype=torch.int32)
        >>> histogram_scatter_add_2d(histogram, index, index, torch.ones(3))
        >>> histogram
        tensor([[1., 0.],
                [0., 2.]])
    """
    name = "histogram_scatter_add_2d"

    def require(ok: bool, argument: str, expected: str, got: object) -> None:
        if not ok:
            raise AssertionError(f"{name}: {argument} must be {expected}, got {got}")

    require(histogram.dim() == 2, "histogram", "of two dimensions", tuple(histogram.shape))
    for argument, tensor, dtype in (
        ("histogram", histogram, torch.float32),
        ("index1", index1, torch.int32),
        ("index2", index2, torch.int32),
        ("source", source, torch.float32),
    ):
        require(tensor.dtype == dtype, argument, str(dtype), tensor.dtype)
        expected = f"on the device of histogram ({histogram.device})"
        require(tensor.device == histogram.device, argument, expected, tensor.device)
        if tensor is not histogram:
            expected = f"of {source.numel()} elements as source"
            require(tensor.numel() == source.numel(), argument, expected, tuple(tensor.shape))
    if histogram.numel() == 0 or source.numel() == 0:
        return
    rows, columns = (index.reshape(-1).long() for index in (index1, index2))
    inside = (rows >= 0) & (rows < histogram.shape[0])
    inside &= (columns >= 0) & (columns < histogram.shape[1])
    cells = torch.where(inside, rows * histogram.shape[1] + columns, 0)
    numbers = torch.where(inside, source.reshape(-1), 0)
    sums = torch.zeros(histogram.numel(), device=histogram.device)
    if histogram.is_cuda:
        # Sorts by cell, so that the order of additions is fixed; index_add_ does not.
        sums.index_put_((cells,), numbers, accumulate=True)
    else:
        sums.index_add_(0, cells, numbers)
    histogram += sums.view(histogram.shape)
