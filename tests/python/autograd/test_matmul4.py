# SPDX-License-Identifier: MIT
"""The differentiable product with a packed 4-bit weight."""

import inspect
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import bitsandbytes as bnb
from bitsandbytes.autograd import _functions
from bitsandbytes.functional import QuantState, dequantize_4bit, quantize_4bit
from reference import codes4
from reference.gemm4 import weight_rounding
from reference.linear import closeness

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SIGNIFICAND = {torch.float32: 24, torch.float16: 11, torch.bfloat16: 8}


def packed_weight(device, rows=9, columns=40, quant_type="nf4", nested=False, **settings):
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(1)).to(device)
    return quantize_4bit(
        weight, quant_type=quant_type, compress_statistics=nested, blocksize=32, **settings
    )


def numbers(packed, state, dtype):
    """The weight as float64, rounded to `dtype`, by the specification."""
    absmax = state.absmax.cpu().numpy()
    if state.nested:
        levels, scales = state.state2.code.cpu().numpy(), state.state2.absmax.cpu().numpy()
        absmax = levels[absmax] * np.repeat(scales, 256)[: absmax.size]
        absmax = absmax + state.offset.cpu().numpy()
    codes = packed.cpu().flatten().view(torch.uint8).numpy()
    name = str(dtype).removeprefix("torch.")
    n = state.shape.numel()
    values = codes4.dequantize(state.quant_type, codes, absmax, state.blocksize, n, name)
    return values.reshape(state.shape).astype(np.float64)


def numpy(tensor):
    return tensor.detach().cpu().double().numpy()


def assert_near(tensor, expected, *terms, slack=0.0):
    bound = closeness(SIGNIFICAND[tensor.dtype], expected, *terms) + slack
    assert (np.abs(numpy(tensor) - expected) <= bound).all()


def test_signature():
    names = ["A", "B", "quant_state", "out", "bias"]
    assert list(inspect.signature(bnb.matmul_4bit).parameters) == names
    assert _functions.matmul_4bit is bnb.matmul_4bit is bnb.autograd.matmul_4bit


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bias_of_another_shape(device, dtype):
    packed, state = packed_weight(device)
    A = torch.randn(3, 40, device=device, dtype=dtype)
    for shape in ((1,), (3,), (3, 9), ()):
        with pytest.raises((ValueError, RuntimeError), match=r"bias must "):
            bnb.matmul_4bit(A, packed, state, bias=A.new_zeros(shape))


def test_public_name_of_the_function(device):
    packed, state = packed_weight(device)
    A, bias = torch.randn(3, 40, device=device), torch.randn(9, device=device)
    out = torch.empty(3, 9, device=device)
    apply = _functions.MatMul4Bit.apply
    assert apply(A, packed.t(), out, bias, state) is out
    assert torch.equal(out, bnb.matmul_4bit(A, packed, state, bias=bias))
    A.requires_grad_()
    apply(A, packed, None, None, state).sum().backward()
    assert (A.grad - dequantize_4bit(packed, state).sum(0)).abs().max() < 1e-5


# --- values -------------------------------------------------------------------------------------


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_and_gradients_match_specification(device, gpu_kernels, dtype, quant_type, nested):
    # Kernels of a GPU round the weight in ways of their own.
    name = str(dtype).removeprefix("torch.") if gpu_kernels else "float32"
    rounded = torch.float32 if gpu_kernels else dtype
    packed, state = packed_weight(device, quant_type=quant_type, nested=nested)
    a = torch.randn(2, 3, 40, device=device).to(dtype).requires_grad_()
    bias = torch.randn(9, device=device).to(dtype).requires_grad_()
    out = bnb.matmul_4bit(a, packed, state, bias=bias)
    assert out.dtype == dtype and out.shape == (2, 3, 9)
    weight, exact = numbers(packed, state, rounded), numpy(a)
    size = np.abs(exact) @ np.abs(weight.T)
    slack = weight_rounding(exact, weight.T, name)
    assert_near(out, exact @ weight.T + numpy(bias), 5 * size, numpy(bias), slack=slack)
    with torch.no_grad():
        assert torch.equal(bnb.matmul_4bit(a, packed, state, bias=bias), out)

    grad = torch.randn_like(out)
    out.backward(grad)
    assert a.grad.dtype == dtype and bias.grad.dtype == dtype
    exact = numpy(grad)
    slack = weight_rounding(exact, weight, name)
    assert_near(a.grad, exact @ weight, 2 * np.abs(exact) @ np.abs(weight), slack=slack)
    assert_near(bias.grad, exact.sum((0, 1)), np.abs(exact).sum((0, 1)))


@pytest.mark.parametrize("lead", [(), (1,), (4,), (2, 1, 3), (0,), (2, 0)])
def test_any_rank(device, lead):
    packed, state = packed_weight(device)
    a = torch.randn(*lead, 40, device=device, requires_grad=True)
    bias = torch.randn(9, device=device, requires_grad=True)
    out = bnb.matmul_4bit(a, packed, state, bias=bias)
    assert out.shape == (*lead, 9)
    weight = dequantize_4bit(packed, state)
    torch.testing.assert_close(out, F.linear(a, weight, bias))
    out.sum().backward()
    torch.testing.assert_close(a.grad, weight.sum(0).expand(a.shape))
    torch.testing.assert_close(bias.grad, torch.full_like(bias, out.numel() // 9))
    with torch.no_grad():
        assert bnb.matmul_4bit(a, packed, state).shape == (*lead, 9)


@pytest.mark.parametrize("shape", [(7, 33), (1, 64), (64, 1), (33, 130)])
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float32, torch.int64])
def test_ragged_shapes_and_storages(device, shape, storage):
    packed, state = packed_weight(device, *shape, quant_storage=storage)
    assert packed.dtype == storage
    a = torch.randn(3, shape[1], device=device, requires_grad=True)
    weight = dequantize_4bit(packed, state)
    for operand in (packed, packed.t()):
        out = bnb.matmul_4bit(a, operand, state)
        torch.testing.assert_close(out, a @ weight.t())
    (grad,) = torch.autograd.grad(out.sum(), a)
    torch.testing.assert_close(grad, weight.sum(0).expand(a.shape))


def test_identity_is_exact(device):
    packed, state = quantize_4bit(torch.eye(64, device=device), quant_type="nf4")
    a = torch.randn(5, 64, device=device, requires_grad=True)
    out = bnb.matmul_4bit(a, packed, state)
    assert torch.equal(out, a)
    out.backward(a.detach())
    assert torch.equal(a.grad, a)


def test_error_of_quantization(device):
    weight = torch.randn(256, 256, device=device) / 16
    a = torch.randn(64, 256, device=device)
    for quant_type, bound in (("nf4", 0.08), ("fp4", 0.115)):
        packed, state = quantize_4bit(weight, quant_type=quant_type)
        error = (bnb.matmul_4bit(a, packed, state) - a @ weight.t()).abs().mean()
        assert bound / 2 < error < bound


def test_nested_scales_in_other_blocks(device):
    packed, state = packed_weight(device, 64, 64)
    scales = state.absmax
    codes, second = bnb.functional.quantize_blockwise(scales - scales.mean(), blocksize=64)
    nested = QuantState(
        codes, state.shape, state.code, 32, "nf4", torch.float32, scales.mean(), second
    )
    a = torch.randn(2, 64, device=device)
    want = a @ dequantize_4bit(packed, nested).t()
    torch.testing.assert_close(bnb.matmul_4bit(a, packed, nested), want)


def test_old_lists(device):
    for nested in (False, True):
        packed, state = packed_weight(device, nested=nested)
        a = torch.randn(2, 40, device=device)
        want = bnb.matmul_4bit(a, packed, state)
        assert torch.equal(bnb.matmul_4bit(a, packed, list(state)), want)


def test_out(device):
    packed, state = packed_weight(device)
    a, out = torch.randn(3, 40, device=device), torch.empty(3, 9, device=device)
    assert bnb.matmul_4bit(a, packed, state, out=out) is out
    assert torch.equal(out, bnb.matmul_4bit(a, packed, state))


@pytest.mark.parametrize("dtype", DTYPES)
def test_autocast_changes_nothing(device, dtype):
    packed, state = packed_weight(device)
    a = torch.randn(5, 40, device=device).to(dtype)
    with torch.autocast(device, torch.bfloat16):
        inside = a.clone().requires_grad_()
        out = bnb.matmul_4bit(inside, packed, state)
        out.sum().backward()
    outside = a.clone().requires_grad_()
    want = bnb.matmul_4bit(outside, packed, state)
    want.sum().backward()
    assert out.dtype == dtype and torch.equal(out, want)
    assert torch.equal(inside.grad, outside.grad)


def test_weights_of_inputs_by_outputs(device):
    packed, state = packed_weight(device, 40, 9)
    a = torch.randn(3, 40, device=device, requires_grad=True)
    weight = dequantize_4bit(packed, state)
    for operand in (packed, packed.t()):
        with pytest.warns(DeprecationWarning, match="Re-quantize from the weight"):
            out = bnb.matmul_4bit(a, operand, state)
        torch.testing.assert_close(out, a @ weight)
    (grad,) = torch.autograd.grad(out.sum(), a)
    torch.testing.assert_close(grad, weight.sum(1).expand(a.shape))
    packed, state = packed_weight(device, 40, 40)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bnb.matmul_4bit(a, packed, state)


# --- gradients ----------------------------------------------------------------------------------


def test_gradcheck(device):
    packed, state = packed_weight(device, 5, 6)
    a = torch.randn(2, 3, 6, dtype=torch.float64, device=device, requires_grad=True)
    bias = torch.randn(5, dtype=torch.float64, device=device, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda *x: bnb.matmul_4bit(x[0], packed, state, bias=x[1]), (a, bias)
    )


def test_gradients_of_gradients(device):
    packed, state = packed_weight(device)
    weight = dequantize_4bit(packed, state)
    a = torch.randn(3, 40, device=device, requires_grad=True)
    results = []
    for product in (lambda a: bnb.matmul_4bit(a, packed, state), lambda a: a @ weight.t()):
        (first,) = torch.autograd.grad(product(a).pow(3).sum(), a, create_graph=True)
        (second,) = torch.autograd.grad(first.pow(2).sum(), a)
        results.append(second)
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-2)


def test_only_wanted_gradients(device):
    packed, state = packed_weight(device)
    a = torch.randn(3, 40, device=device)
    bias = torch.randn(9, device=device, requires_grad=True)
    bnb.matmul_4bit(a, packed, state, bias=bias).sum().backward()
    assert a.grad is None and bias.grad.tolist() == [3.0] * 9
    assert bnb.matmul_4bit(a, packed, state).grad_fn is None
    with torch.no_grad():
        assert bnb.matmul_4bit(a, packed, state, bias=bias).grad_fn is None


@pytest.mark.parametrize("nested", [False, True])
def test_neither_activations_nor_numbers_are_kept(device, nested):
    packed, state = packed_weight(device, 64, 64, nested=nested)
    a = torch.randn(100, 64, device=device, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.append((t.dtype, t.numel())) or t, lambda t: t
    ):
        bnb.matmul_4bit(a, packed, state).sum().backward()
    assert saved[0] == (torch.uint8, 64 * 64 // 2)
    assert all(numel <= 256 for _, numel in saved[1:])
    assert a.grad is not None


def test_bias_of_another_dtype(device):
    packed, state = packed_weight(device)
    a = torch.randn(3, 40, device=device, dtype=torch.bfloat16)
    bias = torch.randn(9, device=device, requires_grad=True)
    out = bnb.matmul_4bit(a, packed, state, bias=bias)
    assert torch.equal(out, bnb.matmul_4bit(a, packed, state, bias=bias.bfloat16()))
    out.sum().backward()
    assert bias.grad.dtype == torch.float32 and bias.grad.tolist() == [3.0] * 9


@pytest.mark.parametrize("nested", [False, True])
def test_compiles_into_one_graph(device, nested, compile_fresh):
    packed, state = packed_weight(device, nested=nested)

    def product(a, bias):
        return bnb.matmul_4bit(a, packed, state, bias=bias)

    results = []
    for run in (product, compile_fresh(product, fullgraph=True, backend="aot_eager")):
        torch.manual_seed(1)
        a = torch.randn(5, 40, device=device, requires_grad=True)
        bias = torch.randn(9, device=device, requires_grad=True)
        out = run(a, bias)
        out.square().sum().backward()
        results.append((out, a.grad, bias.grad))
    for eager, traced in zip(*results, strict=True):
        torch.testing.assert_close(traced, eager)


# --- bad arguments ------------------------------------------------------------------------------


def test_bad_arguments_get_a_sentence(device):
    packed, state = packed_weight(device)
    vector = quantize_4bit(torch.ones(64, device=device))
    a = torch.randn(3, 40, device=device)
    cases = [
        ((a, packed, None), "quant_state must be given, got None"),
        ((a, *vector), r"quant_state must be that of a matrix \[N, K\], got shape \[64\]"),
        ((a.int(), packed, state), "A must be floating point, got torch.int32"),
        ((a.sum(), packed, state), "A must be of at least one dimension"),
        ((a[:, :7], packed, state), r"A must be \[\.\.\., 40\] for a weight of shape \[9, 40\]"),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError, match=f"^matmul_4bit: {message}"):
            bnb.matmul_4bit(*arguments)
    with pytest.raises((ValueError, RuntimeError), match="B"):
        bnb.matmul_4bit(a, packed[:-1], state)
    with pytest.raises((ValueError, RuntimeError), match="bias"):
        bnb.matmul_4bit(a, packed, state, bias=torch.ones(3, device=device))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs two devices")
def test_devices_must_agree():
    packed, state = packed_weight("cpu")
    with pytest.raises((ValueError, RuntimeError), match="device"):
        bnb.matmul_4bit(torch.randn(2, 40, device="cuda"), packed, state)
