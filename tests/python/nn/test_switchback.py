# SPDX-License-Identifier: MIT
"""SwitchBack layers: int8 forward and gradient of the input, exact gradient of the weight."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

import bitsandbytes as bnb
from bitsandbytes.autograd.switchback import switchback
from bitsandbytes.nn import (
    StandardLinear,
    SwitchBackLinear,
    SwitchBackLinearGlobal,
    SwitchBackLinearVectorwise,
    triton_based_modules,
)
from reference import legacy8 as reference

MemEfficient = triton_based_modules.SwitchBackLinearGlobalMemEfficient
CLASSES = [SwitchBackLinearGlobal, SwitchBackLinearVectorwise, MemEfficient]
# Errors of rounding once to the dtype, and of codes that float32 rounds to the other neighbour.
TOLERANCE = {torch.float32: 2e-3, torch.float16: 3e-3, torch.bfloat16: 2e-2}


def numpy(tensor):
    return tensor.detach().cpu().double().numpy()


def near(actual, want, dtype):
    assert actual.dtype == dtype and actual.shape == want.shape
    error = np.abs(numpy(actual) - want).max() / np.abs(want).max()
    assert error < TOLERANCE[dtype], error


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("lead", [(9,), (3, 3)])
@pytest.mark.parametrize("cls", CLASSES)
def test_matches_specification(device, cls, lead, dtype):
    layer = cls(48, 20, device=device, dtype=dtype)
    x = torch.randn(*lead, 48, device=device).to(dtype).requires_grad_()
    out = layer(x)
    grad = torch.randn_like(out)
    out.backward(grad)
    flat, flat_grad = numpy(x).reshape(9, 48), numpy(grad).reshape(9, 20)
    want, grad_x, grad_weight = reference.switchback(
        flat,
        numpy(layer.weight),
        numpy(layer.bias),
        flat_grad,
        cls is SwitchBackLinearVectorwise,
        cls is MemEfficient,
    )
    near(out.reshape(9, 20), want, dtype)
    near(x.grad.reshape(9, 48), grad_x, dtype)
    near(layer.weight.grad, grad_weight, dtype)
    near(layer.bias.grad, flat_grad.sum(0), dtype)


@pytest.mark.parametrize("cls", CLASSES)
def test_evaluation_from_codes(device, cls):
    layer = cls(48, 20, device=device)
    x = torch.randn(7, 48, device=device)
    want = layer(x)
    copied = copy.deepcopy(layer)
    copied.prepare_for_eval()
    assert "weight" not in dict(copied.named_parameters())
    state = copied.state_dict()
    assert state["W_int8"].dtype == torch.int8 and state["W_int8"].shape == (20, 48)
    assert state["state_W"].shape == ((20,) if cls is SwitchBackLinearVectorwise else (1,))
    assert torch.equal(copied(x), want)


def test_only_wanted_gradients(device):
    for frozen in ("weight", "input"):
        layer = SwitchBackLinearVectorwise(16, 8, device=device)
        x = torch.randn(4, 16, device=device, requires_grad=frozen == "weight")
        layer.weight.requires_grad_(frozen == "input")
        layer(x).sum().backward()
        assert (x.grad is None) == (frozen == "input")
        assert (layer.weight.grad is None) == (frozen == "weight")


def test_codes_take_less_memory_for_the_backward_pass(device):
    def kept(layer):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: sizes.append(t.numel() * t.itemsize) or t, lambda t: t
        ):
            layer(torch.randn(64, 48, device=device, requires_grad=True))
        return sum(sizes)

    layers = (cls(48, 20, device=device) for cls in (SwitchBackLinearGlobal, MemEfficient))
    full, codes = (kept(layer) for layer in layers)
    assert codes < full / 3


def test_trains(device):
    torch.manual_seed(0)
    target = nn.Linear(32, 8).to(device)
    model = nn.Sequential(SwitchBackLinear(32, 32), nn.ReLU(), SwitchBackLinear(32, 8)).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        x = torch.randn(64, 32, device=device)
        loss = (model(x) - target(x).detach()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]


@pytest.mark.parametrize("cls", CLASSES)
def test_compiles_into_one_graph(device, cls, compile_fresh):
    layer = cls(16, 8, device=device)
    compiled = compile_fresh(layer, fullgraph=True, backend="aot_eager")
    results = []
    for run in (layer, compiled):
        layer.zero_grad()
        torch.manual_seed(1)
        x = torch.randn(5, 16, device=device, requires_grad=True)
        out = run(x)
        out.square().sum().backward()
        results.append((out, x.grad, layer.weight.grad.clone()))
    for eager, traced in zip(*results, strict=True):
        torch.testing.assert_close(traced, eager)


def test_standard_linear_is_a_linear_layer():
    layer = StandardLinear(8, 4, bias=False, dtype=torch.float64)
    x = torch.randn(2, 8, dtype=torch.float64)
    assert torch.equal(layer(x), x @ layer.weight.t())
    assert triton_based_modules.StandardLinear is StandardLinear


def test_options_that_exclude_each_other():
    with pytest.raises(ValueError, match="mem_efficient must be False"):
        SwitchBackLinear(8, 4, vector_wise_quantization=True, mem_efficient=True)
    x = torch.ones(2, 2)
    with pytest.raises(ValueError, match="keep_codes must be False"):
        switchback(x, x, None, True, True)


def test_switchback_bnb(device):
    layer = SwitchBackLinearVectorwise(16, 8, device=device)
    x = torch.randn(3, 16, device=device)
    out = torch.zeros(3, 8, device=device)
    with torch.no_grad():
        want = layer(x)
        got = bnb.research.switchback_bnb(x, layer.weight, out, None, 0.0, layer.bias)
    assert got is out and torch.equal(out, want)
