# SPDX-License-Identifier: MIT
"""Ops with arguments that are off: they raise, or work, and touch nothing that is not theirs.

Every sample of every op is called with some of its arguments changed at random. Tensors end where a
page ends that nobody may touch behind, so that an access out of bounds ends the process; and where
an op raises, nothing that it was given may have changed.
"""

import ctypes
import mmap
import random
from collections.abc import Callable

import pytest
import torch
from samples import SAMPLES
from torch import Tensor

from bitsandbytes.functional import int8_vectorwise_quant, quantize_4bit

ROUNDS = 30
PAGE = mmap.PAGESIZE
NO_ACCESS = 0
LIBC = ctypes.CDLL(None)
DTYPES = [
    *(torch.float32, torch.float16, torch.bfloat16, torch.float64),
    *(torch.uint8, torch.int8, torch.int32, torch.int64, torch.bool),
]
NUMBERS = [0, 1, 3, 64, 8192, 2**31, 2**40, 2**62, 2**63 - 1, -1, -(2**63)]
FRACTIONS = [0.0, 1.0, -0.5, 1e-30, 1e300, float("nan"), float("inf")]
TEXTS = ["", "nf4", "fp4", "adam", "lion", "ademamix", "of nobody"]
SPECIAL = [0.0, -1.0, 1e-45, 1e38, float("nan"), float("inf"), float("-inf")]


def guarded(t: Tensor) -> Tensor:
    """Returns a copy with the same strides, with a page behind it that cannot be touched."""
    if t.numel() == 0 or any(stride == 0 for stride in t.stride()):
        return t
    reach = 1 + sum((n - 1) * stride for n, stride in zip(t.shape, t.stride(), strict=True))
    size = reach * t.element_size()
    body = -(-size // PAGE) * PAGE
    memory = mmap.mmap(-1, body + PAGE)
    end = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + body
    assert LIBC.mprotect(ctypes.c_void_p(end), ctypes.c_size_t(PAGE), NO_ACCESS) == 0
    row = torch.frombuffer(memory, dtype=t.dtype, count=reach, offset=body - size)
    return row.as_strided(t.shape, t.stride()).copy_(t)


def changed_tensor(draw: random.Random, t: Tensor) -> Tensor:
    """Returns `t` with another size, shape, dtype or stride, or with a number that is special."""
    flat = t.reshape(-1)

    def with_special() -> Tensor:
        x = flat.clone()
        if x.numel() and x.is_floating_point():
            x[draw.randrange(x.numel())] = draw.choice(SPECIAL)
        return x.view(t.shape)

    changes: list[Callable[[], Tensor]] = [
        lambda: flat[:-1],
        lambda: flat[:1],
        lambda: flat[:0],
        lambda: torch.cat([flat, flat[:1]]),
        lambda: flat,
        lambda: t.unsqueeze(0),
        lambda: t.to(draw.choice(DTYPES)),
        lambda: torch.stack([t, t], -1)[..., 0],
        lambda: t.new_zeros(()),
        lambda: torch.zeros_like(t),
        lambda: torch.cat([t, t]) if t.dim() else t,
        lambda: t[..., :-1] if t.dim() else t,
        lambda: t.t() if t.dim() == 2 else t,
        with_special,
    ]
    return draw.choice(changes)()


def changed(draw: random.Random, value):
    """Returns something else of the kind of `value`."""
    if isinstance(value, Tensor):
        return changed_tensor(draw, value)
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return draw.choice([*NUMBERS, value + 1, value - 1, -value, 2 * value, value // 2])
    if isinstance(value, float):
        return draw.choice([*FRACTIONS, -value])
    if isinstance(value, str):
        return draw.choice(TEXTS)
    if isinstance(value, torch.dtype):
        return draw.choice(DTYPES)
    if isinstance(value, (list, tuple)) and value:
        items = list(value)
        i = draw.randrange(len(items))
        return draw.choice(
            [
                lambda: items[:-1],
                lambda: [*items, items[-1]],
                lambda: [],
                lambda: [*items[:i], changed(draw, items[i]), *items[i + 1 :]],
            ]
        )()
    return value


def each_tensor(function: Callable[[Tensor], Tensor], value):
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, (list, tuple)) and not isinstance(value, torch.Size):
        return [each_tensor(function, item) for item in value]
    return value


def bits(arguments: dict) -> list[bytes]:
    """The contents of all tensors."""
    found = []

    def keep(t: Tensor) -> Tensor:
        flat = t.reshape(-1).clone(memory_format=torch.contiguous_format)
        found.append(flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"")
        return t

    each_tensor(keep, list(arguments.values()))
    return found


@pytest.mark.parametrize("name", sorted(SAMPLES))
def test_changed_arguments(name):
    packet, _, overload = name.partition(".")
    op = getattr(getattr(torch.ops.bitsandbytes, packet), overload or "default")
    draw = random.Random(name)
    names = [argument.name for argument in op._schema.arguments]
    raised = 0
    for _ in range(ROUNDS):
        for args, kwargs in SAMPLES[name]("cpu"):
            arguments = dict(zip(names, args, strict=False)) | kwargs
            for key in draw.choices(sorted(arguments), k=draw.choice([1, 1, 2, 3])):
                arguments[key] = changed(draw, arguments[key])
            arguments = {k: each_tensor(guarded, v) for k, v in arguments.items()}
            before = bits(arguments)
            try:
                op(**arguments)
            except (RuntimeError, ValueError, TypeError) as error:
                raised += 1
                assert "std::" not in str(error) and "INTERNAL" not in str(error), str(error)
                assert bits(arguments) == before, f"{name} wrote before it raised: {error}"
    assert raised > 0, "every change was to its liking"


@pytest.mark.parametrize("name", sorted(SAMPLES))
def test_none_in_place_of_a_tensor(name):
    packet, _, overload = name.partition(".")
    op = getattr(getattr(torch.ops.bitsandbytes, packet), overload or "default")
    args, kwargs = SAMPLES[name]("cpu")[0]
    arguments = dict(zip([a.name for a in op._schema.arguments], args, strict=False)) | kwargs
    for argument in op._schema.arguments:
        if str(argument.type) == "Tensor":
            with pytest.raises((RuntimeError, ValueError, AttributeError, TypeError)) as error:
                op(**arguments | {argument.name: None})
            assert ".h" not in str(error.value), argument.name


def tensors_of(value) -> list[Tensor]:
    found: list[Tensor] = []
    each_tensor(lambda t: found.append(t) or t, value)
    return found


def is_native(name: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"bitsandbytes::{name}", "CPU")


@pytest.mark.parametrize("name", sorted(filter(is_native, SAMPLES)))
def test_tensors_whose_memory_was_taken_away(name):
    packet, _, overload = name.partition(".")
    op = getattr(getattr(torch.ops.bitsandbytes, packet), overload or "default")

    def arguments() -> tuple[list, dict]:
        args, kwargs = SAMPLES[name]("cpu")[0]
        return [each_tensor(Tensor.clone, x) for x in args], {
            key: each_tensor(Tensor.clone, x) for key, x in kwargs.items()
        }

    args, kwargs = arguments()
    for i in range(len(tensors_of([*args, *kwargs.values()]))):
        args, kwargs = arguments()
        taken = tensors_of([*args, *kwargs.values()])[i]
        if taken.numel() > 0:
            taken.untyped_storage().resize_(0)
            with pytest.raises(RuntimeError, match="empty storage"):
                op(*args, **kwargs)


@pytest.mark.parametrize("blocksize", [32, 64, 256])
@pytest.mark.parametrize(("n", "k"), [(16, 64), (24, 192), (40, 1088), (33, 256), (3, 65)])
@pytest.mark.parametrize("m", [1, 7, 9, 40])
def test_products_stay_within_their_operands(m, n, k, blocksize):
    # Kernels ask for codes and scales ahead: not for any behind those of the last row.
    weight = torch.randn(n, k)
    packed, state = quantize_4bit(weight, blocksize=blocksize, quant_type="nf4")
    codes, stats, _ = int8_vectorwise_quant(weight)
    packed_2, state_2 = quantize_4bit(torch.randn(2, n, k), blocksize=blocksize, quant_type="nf4")
    rest_2 = [2, n, k], state_2.absmax, blocksize, "nf4"
    offs = torch.tensor([m // 2, m])
    for dtype in (torch.float32, torch.bfloat16):
        a, grad, bias = (torch.randn(*shape).to(dtype) for shape in ((m, k), (m, n), (n,)))
        weight_4bit = (packed, [n, k], state.absmax, blocksize, "nf4")
        for op, arguments in (
            (torch.ops.bitsandbytes.gemm_4bit, (a, *weight_4bit, bias)),
            (torch.ops.bitsandbytes.gemm_4bit_dgrad, (grad, *weight_4bit)),
            (torch.ops.bitsandbytes.grouped_gemm_4bit, (a, packed_2, offs, *rest_2)),
            (torch.ops.bitsandbytes.grouped_gemm_4bit_dgrad, (grad, packed_2, offs, *rest_2)),
            (torch.ops.bitsandbytes.int8_linear, (a, codes, stats, bias, 0.0)),
            (torch.ops.bitsandbytes.int8_linear, (a, codes, stats, bias, 2.0)),
            (torch.ops.bitsandbytes.int8_linear_dgrad, (grad, codes, stats)),
        ):
            with_guards = [each_tensor(guarded, x) for x in arguments]
            got, expected = op(*with_guards), op(*arguments)
            one = isinstance(got, Tensor)
            assert torch.equal(got, expected) if one else torch.equal(got[0], expected[0])
