# SPDX-License-Identifier: MIT
"""Differentiable products of groups of rows with 4-bit weights."""

import pytest
import torch

import bitsandbytes as bnb
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from bitsandbytes.nn import Params4bit

ENDS = (2, 2, 7, 10)
SHAPE = (4, 9, 40)


def packed_weights(device, nested=False, shape=SHAPE):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)
    return quantize_4bit(values, quant_type="nf4", compress_statistics=nested)


def offsets(device, ends=ENDS):
    return torch.tensor(ends, device=device, dtype=torch.int32)


def loop(a, weights, ends, bias=None, transposed=False):
    """The same product in torch, group by group."""
    weights = weights if transposed else weights.transpose(1, 2)
    out, first = [], 0
    for i, end in enumerate(ends):
        out.append(a[first:end] @ weights[i] + (0 if bias is None else bias[i]))
        first = end
    out.append(a[first:] @ torch.zeros_like(weights[0]))
    return torch.cat(out)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("rows", [10, 12])
def test_results_and_gradients(device, nested, transposed, rows):
    packed, state = packed_weights(device, nested)
    weights = dequantize_4bit(packed, state)
    columns, outputs = (9, 40) if transposed else (40, 9)
    results = []
    for grouped in (True, False):
        draw = torch.Generator().manual_seed(1)
        a = torch.randn(rows, columns, generator=draw).to(device).requires_grad_()
        bias = torch.randn(4, outputs, generator=draw).to(device).requires_grad_()
        upstream = torch.randn(rows, outputs, generator=draw).to(device)
        if grouped:
            out = bnb.grouped_matmul_4bit(
                a, packed, offsets(device), state, bias, transposed=transposed
            )
        else:
            out = loop(a, weights, ENDS, bias, transposed)
        out.backward(upstream)
        results.append((out, a.grad, bias.grad))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-4)
    assert not results[0][0][10:].any() and not results[0][1][10:].any()


@pytest.mark.parametrize("transposed", [False, True])
def test_gradients_are_those_of_differences(device, transposed):
    """The product is linear, so that differences are exact but for rounding."""
    packed, state = packed_weights(device)
    offs = offsets(device)
    a = torch.randn(10, 9 if transposed else 40, device=device, requires_grad=True)
    upstream = torch.randn(10, 40 if transposed else 9, device=device)

    def loss(x):
        out = bnb.grouped_matmul_4bit(x, packed, offs, state, transposed=transposed)
        return (out.double() * upstream).sum()

    (grad,) = torch.autograd.grad(loss(a), a)
    for _ in range(3):
        step = torch.randn_like(a)
        with torch.no_grad():
            difference = (loss(a + step) - loss(a - step)) / 2
        torch.testing.assert_close(difference, (grad.double() * step).sum(), rtol=1e-4, atol=1e-3)


def test_gradients_of_gradients(device):
    packed, state = packed_weights(device)
    weights = dequantize_4bit(packed, state)
    a = torch.randn(10, 40, device=device, requires_grad=True)
    results = []
    for product in (
        lambda a: bnb.grouped_matmul_4bit(a, packed, offsets(device), state),
        lambda a: loop(a, weights, ENDS),
    ):
        (first,) = torch.autograd.grad(product(a).pow(3).sum(), a, create_graph=True)
        (second,) = torch.autograd.grad(first.pow(2).sum(), a)
        results.append(second)
    torch.testing.assert_close(*results, rtol=0, atol=1e-5 * results[1].abs().max().item())


def test_only_wanted_gradients(device):
    packed, state = packed_weights(device)
    offs = offsets(device)
    a = torch.randn(10, 40, device=device)
    bias = torch.randn(4, 9, device=device, requires_grad=True)
    bnb.grouped_matmul_4bit(a, packed, offs, state, bias).sum().backward()
    assert a.grad is None and bias.grad.tolist() == [[2.0] * 9, [0.0] * 9, [5.0] * 9, [3.0] * 9]
    assert bnb.grouped_matmul_4bit(a, packed, offs, state).grad_fn is None
    with torch.no_grad():
        assert bnb.grouped_matmul_4bit(a, packed, offs, state, bias).grad_fn is None


def test_neither_activations_nor_numbers_are_kept(device):
    packed, state = packed_weights(device, shape=(4, 64, 64))
    a = torch.randn(100, 64, device=device, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.append((t.dtype, t.numel())) or t, lambda t: t
    ):
        bnb.grouped_matmul_4bit(a, packed, offsets(device, (50, 50, 60, 100)), state)
    assert saved[0] == (torch.uint8, 4 * 64 * 64 // 2)
    assert all(numel <= 256 for _, numel in saved[1:])


@pytest.mark.parametrize("transposed", [False, True])
def test_bias_of_another_dtype(device, transposed):
    packed, state = packed_weights(device)
    a = torch.randn(10, 9 if transposed else 40, device=device, dtype=torch.bfloat16)
    bias = torch.randn(4, 40 if transposed else 9, device=device, requires_grad=True)

    def product(bias):
        return bnb.grouped_matmul_4bit(
            a, packed, offsets(device), state, bias, transposed=transposed
        )

    out = product(bias)
    assert out.dtype == torch.bfloat16 and torch.equal(out, product(bias.bfloat16()))
    out.sum().backward()
    assert bias.grad.dtype == torch.float32 and bias.grad[:, 0].tolist() == [2.0, 0.0, 5.0, 3.0]


def test_codes_of_a_parameter_and_lists_for_states(device):
    packed, state = packed_weights(device)
    a = torch.randn(10, 40, device=device, requires_grad=True)
    want = bnb.grouped_matmul_4bit(a, packed, offsets(device), state)
    for codes, of in ((Params4bit(packed, requires_grad=False), state), (packed, list(state))):
        assert torch.equal(bnb.grouped_matmul_4bit(a, codes, offsets(device), of), want)


@pytest.mark.parametrize("transposed", [False, True])
def test_compiles_into_one_graph(device, transposed, compile_fresh):
    packed, state = packed_weights(device)
    offs = offsets(device)

    def product(a, bias):
        return bnb.grouped_matmul_4bit(a, packed, offs, state, bias, transposed=transposed)

    results = []
    for run in (product, compile_fresh(product, fullgraph=True, backend="aot_eager")):
        torch.manual_seed(1)
        a = torch.randn(10, 9 if transposed else 40, device=device, requires_grad=True)
        bias = torch.randn(4, 40 if transposed else 9, device=device, requires_grad=True)
        out = run(a, bias)
        out.square().sum().backward()
        results.append((out, a.grad, bias.grad))
    for eager, traced in zip(*results, strict=True):
        torch.testing.assert_close(traced, eager)


def test_capture(device):
    """A graph reads where groups end when it is replayed."""
    if device != "cuda":
        pytest.skip("CUDA graphs exist on CUDA only")
    packed, state = packed_weights(device)
    a, offs = torch.randn(10, 40, device=device), offsets(device)
    bnb.grouped_matmul_4bit(a, packed, offs, state)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = bnb.grouped_matmul_4bit(a, packed, offs, state)
    for ends in (ENDS, (0, 10, 10, 10), (1, 2, 3, 4)):
        offs.copy_(offsets(device, ends))
        graph.replay()
        assert torch.equal(out, bnb.grouped_matmul_4bit(a, packed, offsets(device, ends), state))


def test_bad_arguments_get_a_sentence(device):
    packed, state = packed_weights(device)
    matrix = quantize_4bit(torch.ones(9, 40, device=device))
    a, offs = torch.randn(10, 40, device=device), offsets(device)
    bias = torch.ones(4, 9, device=device)
    cases = [
        ((a, packed, offs, None), "quant_state must be given, got None"),
        (
            (a, matrix[0], offs, matrix[1]),
            r"quant_state must be that of weights \[E, N, K\], got shape \[9, 40\]",
        ),
        ((a.double(), packed, offs, state), "A must be float16 or bfloat16 or float32"),
        ((a[0], packed, offs, state), r"A must be \[M, 40\] for weights of shape \[4, 9, 40\]"),
        ((a[:, :9], packed, offs, state), r"A must be \[M, 40\] for weights of shape"),
        ((a, packed, offs.float(), state), "offs must be int32 or int64"),
        ((a, packed, offs[:3], state), r"offs must be of shape \[4\]"),
        ((a, packed, offs, state, bias[0]), r"bias must be of shape \[4, 9\]"),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError, match=f"^grouped_matmul_4bit: {message}"):
            bnb.grouped_matmul_4bit(*arguments)
    with pytest.raises((ValueError, RuntimeError), match="B"):
        bnb.grouped_matmul_4bit(a, packed[:-1], offs, state)
