# SPDX-License-Identifier: MIT
"""4-bit parameters of any module: reading, caching, state dicts."""

import copy

import pytest
import torch
import torch.nn.utils.parametrize as P
from torch import nn
from torch.utils.checkpoint import checkpoint

from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from bitsandbytes.nn.parametrize import (
    Bnb4bitParametrization,
    _disable_parametrization_cache,
    _register_parametrization_hooks,
    replace_parameter_4bit,
    replace_parameter_4bit_prequantized,
)


class Experts(nn.Module):
    """Two weights of four experts each, in one parameter each."""

    def __init__(self, device="cpu"):
        super().__init__()
        draw = torch.Generator().manual_seed(2)
        self.up = nn.Parameter(torch.randn(4, 64, 32, generator=draw).to(device))
        self.down = nn.Parameter(torch.randn(4, 32, 64, generator=draw).to(device, torch.bfloat16))
        self.norm = nn.LayerNorm(32, device=device)

    def forward(self, x):
        for _ in "12":
            hidden = torch.einsum("ti,ehi->eth", self.norm(x), self.up).relu()
            x = x + torch.einsum("eth,eih->ti", hidden, self.down.float())
        return x


def quantized(device="cpu", **settings):
    model = Experts(device)
    replace_parameter_4bit(model, "up", **settings)
    replace_parameter_4bit(model, "down", quant_type="fp4", blocksize=128)
    return model


@pytest.fixture(autouse=True)
def _balanced_cache():
    yield
    assert P._cache_enabled == 0 and not P._cache


@pytest.mark.parametrize("nested", [False, True])
def test_reading_gives_numbers(device, nested):
    model, plain = quantized(device, compress_statistics=nested), Experts(device)
    packed, state = quantize_4bit(plain.up.data, quant_type="nf4", compress_statistics=nested)
    assert torch.equal(model.up, dequantize_4bit(packed, state))
    assert model.up.shape == (4, 64, 32) and model.up.dtype == torch.float32
    assert not model.up.requires_grad
    assert model.down.dtype == torch.bfloat16
    assert torch.equal(model.down, dequantize_4bit(*quantize_4bit(plain.down.data, blocksize=128)))
    step = model.parametrizations.up[0]
    assert type(step) is Bnb4bitParametrization and step.quant_state == state
    original = dict(model.named_parameters())["parametrizations.up.original"]
    assert original.dtype == torch.uint8 and not original.requires_grad
    assert torch.equal(original.data, packed)
    x = torch.randn(5, 32, device=device, requires_grad=True)
    model(x).sum().backward()
    assert x.grad is not None and model.norm.weight.grad is not None


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_error_of_quantization(device, quant_type):
    bounds = {
        ("nf4", 64): 0.0728,
        ("nf4", 128): 0.0768,
        ("nf4", 256): 0.0803,
        ("fp4", 64): 0.0965,
        ("fp4", 128): 0.1029,
        ("fp4", 256): 0.1087,
    }
    for blocksize in (64, 128, 256):
        module = nn.Module()
        module.w = nn.Parameter(torch.randn(1024, 1024, device=device))
        exact = module.w.data
        replace_parameter_4bit(module, "w", quant_type=quant_type, blocksize=blocksize)
        error = (module.w - exact).abs().mean().item()
        assert error == pytest.approx(bounds[quant_type, blocksize], abs=8e-4)


def test_a_prequantized_parameter(device):
    packed, state = quantize_4bit(torch.randn(3, 8, 8, device=device), quant_type="nf4")
    module = nn.Module()
    module.w = nn.Parameter(packed, requires_grad=False)
    entries = state.as_dict(packed=True)
    replace_parameter_4bit_prequantized(module, "w", entries, torch.device(device))
    assert torch.equal(module.w, dequantize_4bit(packed, state))


def test_bad_names():
    module = nn.Linear(4, 4)
    module.extra = torch.ones(3)
    for replace in (
        lambda name: replace_parameter_4bit(module, name),
        lambda name: replace_parameter_4bit_prequantized(module, name, {}, "cpu"),
    ):
        with pytest.raises(AttributeError, match=r"^Module does not have parameter 'none'$"):
            replace("none")
        with pytest.raises(
            TypeError, match=r"^Parameter 'extra' is not an instance of nn\.Parameter$"
        ):
            replace("extra")


# --- the cache of a forward pass ----------------------------------------------------------------


def count_reads(model, monkeypatch):
    calls = []
    forward = Bnb4bitParametrization.forward

    def counted(self, packed):
        calls.append(self)
        return forward(self, packed)

    monkeypatch.setattr(Bnb4bitParametrization, "forward", counted)
    return calls


def test_a_forward_pass_dequantizes_once(device, monkeypatch):
    model = quantized(device)
    calls = count_reads(model, monkeypatch)
    model(torch.randn(5, 32, device=device))
    assert len(calls) == 2  # each parameter is read twice
    _ = model.up, model.up
    assert len(calls) == 4


@pytest.mark.parametrize("reentrant", [False, True])
def test_the_cache_is_left_empty_by_checkpointing(device, reentrant):
    model = quantized(device)
    x = torch.randn(5, 32, device=device, requires_grad=True)
    model(x).sum().backward()
    want, x.grad = x.grad, None
    for _ in range(2):
        checkpoint(model, x, use_reentrant=reentrant).sum().backward()
        assert P._cache_enabled == 0 and not P._cache
        torch.testing.assert_close(x.grad, want)
        x.grad = None


def test_the_cache_is_left_empty_by_an_error(device):
    model = quantized(device)
    with pytest.raises(RuntimeError):
        model(torch.randn(5, 31, device=device))
    assert P._cache_enabled == 0 and not P._cache
    _disable_parametrization_cache(model, (), None)
    assert P._cache_enabled == 0


def test_hooks_are_there_once():
    model = quantized()
    _register_parametrization_hooks(model, "up")
    assert len(model._forward_pre_hooks) == len(model._forward_hooks) == 1
    assert len(model._state_dict_hooks) == len(model._load_state_dict_pre_hooks) == 1


# --- state dict ---------------------------------------------------------------------------------


@pytest.mark.parametrize("nested", [False, True])
def test_keys(device, nested):
    model = nn.Sequential(quantized(device, compress_statistics=nested))
    state = model.state_dict()
    keys = {"0.up", "0.up.absmax", "0.up.quant_map", "0.up.quant_state.bitsandbytes__nf4"}
    keys |= {"0.up.nested_absmax", "0.up.nested_quant_map"} if nested else set()
    keys |= {"0.down", "0.down.absmax", "0.down.quant_map", "0.down.quant_state.bitsandbytes__fp4"}
    assert set(state) == keys | {"0.norm.weight", "0.norm.bias"}
    assert state["0.up"].dtype == torch.uint8 and state["0.up"].shape == (4 * 64 * 16, 1)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("nested", [False, True])
def test_state_dicts_load(device, nested, assign):
    source = quantized(device, compress_statistics=nested)
    with torch.no_grad():
        for p in source.parameters():
            p.copy_(p.flip(0))
    state = source.state_dict()
    before = copy.deepcopy(state)
    for other in ({}, {"quant_type": "fp4"}, {"compress_statistics": not nested}):
        model = quantized(device, **other)
        model.load_state_dict(state, assign=assign)
        assert torch.equal(model.up, source.up) and torch.equal(model.down, source.down)
        assert set(model.state_dict()) == set(state)
    assert all(torch.equal(state[key], before[key]) for key in before)


def test_what_was_saved_can_be_put_back_by_hand(device):
    source = quantized(device)
    state = source.state_dict()
    model = Experts(device)
    for name in ("up", "down"):
        setattr(model, name, nn.Parameter(state[name], requires_grad=False))
        entries = {k: v for k, v in state.items() if k.startswith(f"{name}.")}
        replace_parameter_4bit_prequantized(model, name, entries, device)
    model.load_state_dict(state)
    assert torch.equal(model.up, source.up) and torch.equal(model.down, source.down)


def test_a_float_checkpoint_is_quantized(device):
    model, plain = quantized(device), Experts(device)
    with torch.no_grad():
        plain.up.mul_(3)
    model.load_state_dict(plain.state_dict())
    want = dequantize_4bit(*quantize_4bit(plain.up.data, quant_type="nf4"))
    assert torch.equal(model.up, want)


def test_what_does_not_fit(device):
    model, state = quantized(device), quantized(device).state_dict()
    before = model.up.clone()
    wrong = dict(state)
    del wrong["up.quant_map"]
    with pytest.raises(RuntimeError, match=r"up: .*must hold 'quant_map'"):
        model.load_state_dict(wrong)
    module = nn.Module()
    module.up = nn.Parameter(torch.randn(4, 64, 31, device=device))
    replace_parameter_4bit(module, "up")
    with pytest.raises(RuntimeError, match=r"up: size mismatch.*\[4, 64, 32\], got \[4, 64, 31\]"):
        model.load_state_dict({**state, **module.state_dict()})
    assert torch.equal(model.up, before)


# --- copies and moves ---------------------------------------------------------------------------


def test_copies_and_moves(device):
    model = quantized("cpu", compress_statistics=True)
    other = copy.deepcopy(model)
    assert torch.equal(other.up, model.up)
    other.to(device)
    assert other.parametrizations.up[0].quant_state.absmax.device.type == device
    torch.testing.assert_close(other.up.cpu(), model.up, rtol=1e-6, atol=0)
    other.half()
    torch.testing.assert_close(other.up.cpu(), model.up, rtol=1e-6, atol=0)
    other.to("meta")
    assert other.up.is_meta and other.up.shape == (4, 64, 32)
    other.to_empty(device=device).load_state_dict(model.state_dict())
    torch.testing.assert_close(other.up.cpu(), model.up, rtol=1e-6, atol=0)
    with pytest.raises(RuntimeError, match="right_inverse"):
        model.up = torch.randn(4, 64, 32)
