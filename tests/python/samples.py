# SPDX-License-Identifier: MIT
"""Arguments for every op of the package: what opcheck and the schema tests call it with."""

import math
from collections.abc import Callable

import torch

from bitsandbytes.functional import create_dynamic_map

__all__ = ["SAMPLES", "Call"]

Call = tuple[tuple, dict]  # positional and keyword arguments

# Op and overload -> samples on a device. Every schema needs an entry; between them, the samples of
# an op change everything that its schema marks as written.
SAMPLES: dict[str, Callable[[str], list[Call]]] = {}


def samples(name: str):
    def register(function):
        SAMPLES[name] = lambda device: [
            sample if isinstance(sample[-1], dict) else (sample, {}) for sample in function(device)
        ]
        return function

    return register


# --- 8-bit blockwise quantization ---------------------------------------------------------------


@samples("quantize_blockwise")
def _(device):
    code = create_dynamic_map().to(device)
    x = torch.randn(3, 50, device=device)
    return [
        (x, code, 64),
        (x.half().t(), code, 256),
        (x.bfloat16()[:, ::2], create_dynamic_map(False).to(device), 4096),
        (x[:0], code, 64),
    ]


@samples("quantize_blockwise.out")
def _(device):
    x = torch.randn(3, 50, device=device)
    out = torch.zeros(3, 50, dtype=torch.uint8, device=device)
    absmax = torch.zeros(3, device=device)
    code = create_dynamic_map().to(device)
    return [((x, code, 64), {"out": out, "absmax": absmax})]


@samples("quantize_blockwise_stochastic")
def _(device):
    x = torch.randn(3, 50, device=device)
    rand = torch.rand(1024, device=device)
    return [
        (x, create_dynamic_map().to(device), 64, rand, 0),
        (x.half().t(), torch.rand(17, device=device), 256, rand[:5], 4),
        (x.bfloat16()[:0], create_dynamic_map().to(device), 64, rand, 1000),
    ]


@samples("quantize_no_absmax")
def _(device):
    x = torch.randn(3, 50, device=device)
    return [
        (x, create_dynamic_map().to(device)),
        (x.half().t(), torch.rand(1, device=device)),
        (x.bfloat16()[:0], create_dynamic_map().to(device)),
    ]


@samples("estimate_quantiles")
def _(device):
    x = torch.randn(30, 50, device=device)
    return [(x, 1 / 512), (x.half().t(), 0.0), (x.bfloat16()[:, ::2], 0.5), (x[0, :1], 0.1)]


def _quantized(device):
    codes = torch.randint(0, 256, (3, 50), dtype=torch.uint8, device=device)
    return codes, torch.rand(3, device=device), create_dynamic_map().to(device)


@samples("dequantize_blockwise")
def _(device):
    codes, absmax, code = _quantized(device)
    return [
        (codes, absmax, code, 64, torch.float32),
        (codes.t(), absmax, code, 64, torch.float16),
        (codes[:, ::2], absmax[:1], code, 4096, torch.bfloat16),
        (codes[:0], absmax[:0], code, 64, torch.float32),
    ]


@samples("dequantize_blockwise.out")
def _(device):
    out = torch.zeros(3, 50, dtype=torch.float16, device=device)
    return [(*_quantized(device), 64, torch.float16, out)]


def _nested_scales(device, blocks):
    codes = torch.randint(0, 256, (blocks,), dtype=torch.uint8, device=device)
    return codes, create_dynamic_map().to(device), torch.rand(1, device=device)


@samples("dequantize_blockwise_nested")
def _(device):
    codes, _, code = _quantized(device)
    nested = (*_nested_scales(device, 3), torch.tensor(0.5, device=device))
    return [
        (codes, *nested, code, 64, 256, torch.float32),
        (codes.t(), *nested, code, 64, 3, torch.bfloat16),
    ]


@samples("dequantize_blockwise_nested.out")
def _(device):
    codes, _, code = _quantized(device)
    nested = (*_nested_scales(device, 3), torch.tensor(0.5, device=device))
    out = torch.zeros(3, 50, dtype=torch.float16, device=device)
    return [(codes, *nested, code, 64, 256, torch.float16, out)]


# --- 4-bit blockwise quantization ---------------------------------------------------------------


@samples("quantize_4bit")
def _(device):
    x = torch.randn(3, 51, device=device)
    return [
        (x, 64, "nf4", torch.uint8),
        # Integers: bytes of codes may be NaN as floats, which equals nothing.
        (x.half().t(), 32, "fp4", torch.int16),
        (x.bfloat16()[:, ::2], 4096, "nf4", torch.int64),
        (x[:0], 64, "fp4", torch.uint8),
    ]


@samples("quantize_4bit.out")
def _(device):
    x = torch.randn(3, 51, device=device)
    out = torch.zeros(20, 1, dtype=torch.int32, device=device)
    absmax = torch.zeros(3, device=device)
    return [((x, 64, "nf4", torch.int32), {"out": out, "absmax": absmax})]


def _packed(device):
    return torch.randint(0, 256, (77, 1), dtype=torch.uint8, device=device)


@samples("dequantize_4bit")
def _(device):
    packed, absmax = _packed(device), torch.rand(3, device=device)
    return [
        (packed, absmax, 64, "nf4", [3, 51], torch.float32),
        (packed.t(), absmax, 64, "fp4", [153], torch.bfloat16),
        (packed[:76].view(-1).view(torch.int16), absmax, 64, "nf4", [151], torch.float16),
        (packed[:0], absmax[:0], 64, "nf4", [0, 64], torch.float32),
    ]


@samples("dequantize_4bit.out")
def _(device):
    out = torch.zeros(3, 51, dtype=torch.float16, device=device)
    absmax = torch.rand(3, device=device)
    return [(_packed(device), absmax, 64, "fp4", [3, 51], torch.float16, out)]


@samples("dequantize_4bit_nested")
def _(device):
    nested = (*_nested_scales(device, 3), torch.tensor(0.5, device=device))
    return [
        (_packed(device), *nested, 64, 256, "nf4", [3, 51], torch.float32),
        (_packed(device), *nested, 64, 3, "fp4", [3, 51], torch.bfloat16),
    ]


@samples("dequantize_4bit_nested.out")
def _(device):
    nested = (*_nested_scales(device, 3), torch.tensor(0.5, device=device))
    out = torch.zeros(3, 51, device=device)
    return [(_packed(device), *nested, 64, 256, "nf4", [3, 51], torch.float32, out)]


# --- products with a 4-bit weight ---------------------------------------------------------------


def _weight_4bit(device, *shape, blocksize):
    """Packed codes of any kind, their shape and scales, plain and quantized."""
    numel = math.prod(shape)
    packed = torch.randint(0, 256, ((numel + 1) // 2, 1), dtype=torch.uint8, device=device)
    blocks = -(-numel // blocksize)
    plain = torch.rand(blocks, device=device)
    codes = torch.randint(0, 256, (blocks,), dtype=torch.uint8, device=device)
    quantized = {
        "absmax_8bit": codes,
        "absmax_code": create_dynamic_map().to(device),
        "absmax_offset": torch.tensor(0.75, device=device),
    }
    return packed, shape, plain, torch.rand(-(-blocks // 256), device=device), quantized


@samples("gemm_4bit")
def _(device):
    packed, shape, absmax, nested_absmax, nested = _weight_4bit(device, 5, 96, blocksize=64)
    x = torch.randn(2, 3, 96, device=device)
    bias = torch.randn(5, device=device)
    odd, odd_shape, odd_absmax, _, _ = _weight_4bit(device, 3, 7, blocksize=32)
    return [
        (x, packed, shape, absmax, 64, "nf4"),
        (x.half(), packed.t(), shape, absmax, 64, "fp4", bias.half()),
        (
            (x.bfloat16(), packed.flatten().view(torch.int32), shape, nested_absmax, 64, "nf4"),
            nested,
        ),
        ((x[0, 0], packed, shape, nested_absmax, 64, "fp4", bias), nested),
        (x[0, :, :7], odd, odd_shape, odd_absmax, 32, "nf4"),
        (x[:0], packed, shape, absmax, 64, "nf4"),
    ]


@samples("gemm_4bit_dgrad")
def _(device):
    packed, shape, absmax, nested_absmax, nested = _weight_4bit(device, 5, 96, blocksize=64)
    grad = torch.randn(2, 3, 5, device=device)
    return [
        (grad, packed, shape, absmax, 64, "nf4"),
        (grad.half(), packed.t(), shape, absmax, 64, "fp4"),
        ((grad.bfloat16()[0, 0], packed, shape, nested_absmax, 64, "nf4"), nested),
        (grad[:0], packed, shape, absmax, 64, "nf4"),
    ]


@samples("grouped_gemm_4bit")
def _(device):
    packed, shape, absmax, nested_absmax, nested = _weight_4bit(device, 3, 5, 96, blocksize=64)
    x = torch.randn(6, 96, device=device)
    bias = torch.randn(3, 5, device=device)
    offs = torch.tensor([2, 2, 5], device=device)
    odd, odd_shape, odd_absmax, _, _ = _weight_4bit(device, 2, 3, 7, blocksize=32)
    return [
        (x, packed, offs, shape, absmax, 64, "nf4"),
        (x.half(), packed.t(), offs.int(), shape, absmax, 64, "fp4", bias.half()),
        (
            (x.bfloat16(), packed.flatten(), offs, shape, nested_absmax, 64, "nf4"),
            nested,
        ),
        (x[:, :7], odd, offs[:2].int(), odd_shape, odd_absmax, 32, "nf4"),
        (x[:0], packed, offs * 0, shape, absmax, 64, "nf4"),
    ]


@samples("grouped_gemm_4bit_dgrad")
def _(device):
    packed, shape, absmax, nested_absmax, nested = _weight_4bit(device, 3, 5, 96, blocksize=64)
    grad = torch.randn(6, 5, device=device)
    offs = torch.tensor([0, 4, 6], device=device)
    return [
        (grad, packed, offs, shape, absmax, 64, "nf4"),
        (grad.half(), packed.t(), offs.int(), shape, absmax, 64, "fp4"),
        ((grad.bfloat16(), packed, offs, shape, nested_absmax, 64, "nf4"), nested),
        (grad[:0], packed, offs * 0, shape, absmax, 64, "nf4"),
    ]


@samples("gemv_4bit")
def _(device):
    packed, shape, absmax, _, _ = _weight_4bit(device, 5, 96, blocksize=64)
    x = torch.randn(3, 96, device=device)
    code = torch.linspace(-1, 1, 16, device=device)
    return [(x, packed, shape, absmax, code, 64), (x[0].half(), packed, shape, absmax, code, 64)]


@samples("gemv_4bit.out")
def _(device):
    packed, shape, absmax, _, _ = _weight_4bit(device, 5, 96, blocksize=64)
    x = torch.randn(96, device=device)
    code = torch.linspace(-1, 1, 16, device=device)
    return [(x, packed, shape, absmax, code, 64, torch.zeros(5, device=device))]


# --- LLM.int8() ---------------------------------------------------------------------------------


def _int8(device):
    a = torch.randint(-127, 128, (6, 33), dtype=torch.int8, device=device)
    b = torch.randint(-127, 128, (5, 33), dtype=torch.int8, device=device)
    return a, b, torch.rand(6, device=device) + 0.1, torch.rand(5, device=device) + 0.1


@samples("int8_vectorwise_quant")
def _(device):
    x = torch.randn(6, 33, device=device)
    x[2, 3] = 9
    return [(x,), (x.half().view(2, 3, 33),), (x.bfloat16(), 6.0)]


@samples("int8_double_quant")
def _(device):
    x = torch.randn(6, 33, device=device)
    x[2, 3] = 9
    return [(x,), (x.half().view(2, 3, 33),), (x.bfloat16(), 6.0)]


@samples("int8_vectorwise_dequant")
def _(device):
    a, _, row_stats, _ = _int8(device)
    return [(a, row_stats), (a.view(2, 3, 33), row_stats)]


@samples("int8_vectorwise_dequant.dtype")
def _(device):
    a, _, row_stats, _ = _int8(device)
    return [
        (a, row_stats, torch.bfloat16),
        (a.view(2, 3, 33), row_stats, torch.float16),
        (a[:, 3:20], row_stats, torch.float32),
    ]


@samples("int8_linear_matmul")
def _(device):
    a, b, _, _ = _int8(device)
    return [(a, b), (a.view(2, 3, 33), b)]


@samples("int8_linear_matmul.out")
def _(device):
    a, b, _, _ = _int8(device)
    return [(a, b, torch.zeros(6, 5, dtype=torch.int32, device=device))]


@samples("int8_mm_dequant")
def _(device):
    _, _, row_stats, col_stats = _int8(device)
    product = torch.randint(-(10**6), 10**6, (6, 5), dtype=torch.int32, device=device)
    return [
        (product, row_stats, col_stats),
        (product, row_stats, col_stats, torch.bfloat16, col_stats.half()),
    ]


@samples("int8_scaled_mm")
def _(device):
    a, b, row_stats, col_stats = _int8(device)
    return [
        (a, b, row_stats, col_stats),
        (a, b, row_stats, col_stats, col_stats, torch.float32),
    ]


@samples("int8_linear")
def _(device):
    _, b, _, col_stats = _int8(device)
    x = torch.randn(6, 33, device=device)
    x[2, 3] = 9
    return [
        (x, b, col_stats),
        (x.half().view(2, 3, 33), b, col_stats, col_stats.half()),
        (x.bfloat16(), b, col_stats, None, 6.0),
    ]


@samples("int8_linear_dgrad")
def _(device):
    _, b, _, col_stats = _int8(device)
    grad = torch.randn(2, 3, 5, device=device)
    return [
        (grad, b, col_stats),
        (grad.half()[0, 0], b, col_stats),
        (grad.bfloat16()[:0], b, col_stats),
    ]


@samples("int8_mixed_scaled_mm")
def _(device):
    a, b, row_stats, col_stats = _int8(device)
    x = torch.randn(6, 33, device=device)
    columns = torch.tensor([3], device=device)
    return [
        (x, a, b, row_stats, col_stats),
        (x, a, b, row_stats, col_stats, columns, col_stats),
    ]


# --- optimizers ---------------------------------------------------------------------------------


def _step(device, dtype, lr_tensor):
    params = [torch.randn(300, device=device).to(dtype), torch.randn(4, 7, device=device).to(dtype)]
    grads = [torch.randn_like(p) for p in params]
    step = torch.tensor(2, device=device)
    lr = torch.tensor(1e-2, device=device) if lr_tensor else None
    tail = (step, lr, 1e-2, 0.9, 0.999, 0.9999, 5.0, 1e-8, 0.1, 0.5, False)
    return params, grads, tail


def _options(device):
    """Every option of a step."""
    return {
        "t_alpha": 10.0,
        "t_beta3": 10.0,
        "max_unorm": 0.1,
        "rounding_seed": -7,
        "gnorm_scales": torch.tensor([0.5, 2.0], device=device),
        "unorm": torch.zeros(2, device=device),
    }


def _codes(params, rows, device):
    shapes = [p.shape if rows == 1 else (rows, *p.shape) for p in params]
    codes = [torch.randint(0, 256, s, dtype=torch.uint8, device=device) for s in shapes]
    blocks = [-(-p.numel() // 256) for p in params]
    return codes, [torch.rand(*((rows,) if rows > 1 else ()), n, device=device) for n in blocks]


@samples("optimizer_step_32bit")
def _(device):
    calls = []
    for rule, dtype, lr_tensor in (
        ("adam", torch.float32, False),
        ("lamb", torch.bfloat16, True),
        ("ademamix", torch.float16, False),
    ):
        params, grads, tail = _step(device, dtype, lr_tensor)
        state1, state2 = ([torch.rand(p.shape, device=device) for p in params] for _ in "12")
        if rule == "ademamix":
            state1 = [torch.stack((s, s)) for s in state1]
        options = _options(device) if rule != "adam" else {}
        calls.append(((rule, params, grads, state1, state2, *tail), options))
    params, grads, tail = _step(device, torch.float32, False)
    state = [torch.rand(p.shape, device=device) for p in params]
    calls.append((("lars", params, grads, state, [], *tail), _options(device)))
    scaled = {**_options(device), "max_unorm": 0.0, "update_scales": torch.rand(2, device=device)}
    params, grads, tail = _step(device, torch.float32, False)
    calls.append((("lars", params, grads, state, [], *tail), scaled))
    return calls


@samples("optimizer_step_8bit_blockwise")
def _(device):
    calls = []
    qmaps = create_dynamic_map().to(device), create_dynamic_map(False).to(device)
    for rule, dtype, lr_tensor in (
        ("adam", torch.float32, False),
        ("adam", torch.float16, True),
        ("ademamix", torch.bfloat16, False),
    ):
        params, grads, tail = _step(device, dtype, lr_tensor)
        state1, absmax1 = _codes(params, 2 if rule == "ademamix" else 1, device)
        state2, absmax2 = _codes(params, 1, device)
        options = _options(device) if dtype == torch.bfloat16 else {}
        lists = (params, grads, state1, state2, absmax1, absmax2)
        calls.append(((rule, *lists, *qmaps, *tail), options))
    return calls


@samples("optimizer_step_8bit")
def _(device):
    calls = []
    qmaps = create_dynamic_map().to(device), create_dynamic_map(False).to(device)
    for dtype, lr_tensor in ((torch.float32, False), (torch.bfloat16, True)):
        params, grads, tail = _step(device, dtype, lr_tensor)
        state1, state2 = (_codes(params, 1, device)[0] for _ in "12")
        scales = [torch.rand(2, device=device) for _ in "1234"]
        options = _options(device) if dtype == torch.bfloat16 else {}
        calls.append((("adam", params, grads, state1, state2, *scales, *qmaps, *tail), options))
    params, grads, tail = _step(device, torch.float16, False)
    new_max = torch.zeros(2, device=device)
    scales = (torch.rand(2, device=device), None, new_max, None)
    codes, _ = _codes(params, 1, device)
    calls.append((("lion", params, grads, codes, [], *scales, qmaps[0], None, *tail), {}))
    return calls


def _of_preview(calls, outputs=()):
    """Calls of a step, without the arguments that only a step takes."""
    kept = ("t_alpha", "t_beta3", "gnorm_scales")
    return [
        (
            [value for i, value in enumerate(args) if i not in outputs],
            {key: value for key, value in options.items() if key in kept},
        )
        for args, options in calls
    ]


@samples("optimizer_preview_32bit")
def _(device):
    return _of_preview(SAMPLES["optimizer_step_32bit"](device))


@samples("optimizer_preview_8bit_blockwise")
def _(device):
    return _of_preview(SAMPLES["optimizer_step_8bit_blockwise"](device))


@samples("optimizer_preview_8bit")
def _(device):
    return _of_preview(SAMPLES["optimizer_step_8bit"](device), outputs=(7, 8))


@samples("percentile_clipping_step")
def _(device):
    calls = []
    for dtype, step in ((torch.float32, 0), (torch.bfloat16, 7)):
        grads = [torch.randn(n, device=device).to(dtype) for n in (300, 28)]
        history = [torch.rand(100, device=device) for _ in grads]
        calls.append(((grads, history, torch.tensor(step, device=device), 5), {}))
    return calls


@samples("optimizer_update_32bit")
def _(device):
    calls = []
    for rule, dtype, step in (("lamb", torch.float32, 3), ("momentum", torch.bfloat16, 1)):
        p = torch.randn(4, 75, device=device).to(dtype)
        states = [torch.rand(4, 75, device=device) for _ in range(2 if rule == "lamb" else 1)]
        unorm = torch.zeros(1, device=device)
        bound = (unorm, 0.5, 1.0) if rule == "lamb" else (None, 0.0, 0.0)
        hyper = (0.9, 0.999, 0.0, 0.0, 1e-8, 0.1, step, 1e-2, 0.5)
        calls.append((rule, torch.randn_like(p), p, *([*states, None])[:2], *bound, *hyper))
    return calls


@samples("optimizer_update_8bit_blockwise")
def _(device):
    calls = []
    qmaps = create_dynamic_map().to(device), create_dynamic_map(False).to(device)
    for two, dtype in ((True, torch.float32), (False, torch.float16)):
        p = torch.randn(4, 75, device=device).to(dtype)
        codes = [torch.randint(0, 256, p.shape, dtype=torch.uint8, device=device) for _ in "12"]
        absmax = [torch.rand(2, device=device) for _ in "12"]
        second = [codes[1], qmaps[1], absmax[1]] if two else [None] * 3
        hyper = (0.9, 0.999, 0.0, 0.0, 1e-8, 3, 1e-2)
        calls.append(
            (
                *("adam" if two else "lion", torch.randn_like(p), p, codes[0], second[0]),
                *(*hyper, qmaps[0], second[1], absmax[0], second[2], 0.1, 0.5),
            )
        )
    return calls
