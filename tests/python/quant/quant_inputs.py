# SPDX-License-Identifier: MIT
"""Inputs of the quantization tests: dtypes, layouts, shapes, and values easily forgotten."""

import torch
from hypothesis import strategies as st

__all__ = [
    "DTYPES",
    "INF",
    "LAYOUTS",
    "NAN",
    "SPECIAL",
    "name_of",
    "numpy",
    "public_vector",
    "shapes",
    "tensor_of",
]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
INF, NAN = float("inf"), float("nan")

LAYOUTS = {
    "contiguous": lambda a: a,
    "transposed": lambda a: a.transpose(0, -1).contiguous().transpose(0, -1) if a.dim() else a,
    "strided": lambda a: torch.stack([a, a * 3 + 1], -1)[..., 0],
    "offset": lambda a: torch.cat([a.flatten().new_ones(1), a.flatten()])[1:].view(a.shape),
    "expanded": lambda a: a[:1].expand(a.shape) if a.dim() and a.shape[0] else a,
}
SPECIAL = [0.0, -0.0, NAN, INF, -INF, 1e-45, -1e-45, 1e-38, 3e38, -3e38, 65504.0, 1.0, -1.0]

shapes = st.one_of(
    st.tuples(st.integers(0, 5000)),
    st.lists(st.integers(0, 17), max_size=3).map(tuple),
)


def tensor_of(shape, dtype, layout, special, seed):
    """Random numbers of a magnitude that the seed decides, with special ones at random places."""
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(shape, generator=generator) * 10.0 ** (seed % 7 - 3)
    flat = a.view(-1)
    for value in special:
        if flat.numel():
            flat[int(torch.randint(flat.numel(), (1,), generator=generator))] = value
    return LAYOUTS[layout](a.to(dtype))


def public_vector():
    """The 5000 numbers for which results of the public package are published as hashes."""
    return ((torch.arange(5000) * 7919 % 2003) - 1001).float() / 1024


def name_of(dtype):
    return str(dtype).removeprefix("torch.")


def numpy(tensor):
    """Array of a tensor; float16 and bfloat16 as the float32 numbers they are."""
    tensor = tensor.detach().cpu()
    return tensor.float().numpy() if tensor.is_floating_point() else tensor.numpy()
