# SPDX-License-Identifier: MIT
"""4-bit experts of a mixture: sorting tokens, products from packed codes, replacing parameters."""

import copy

import pytest
import torch
from torch import nn

import bitsandbytes as bnb
from bitsandbytes.nn import (
    group_by_expert,
    grouped_linear_4bit,
    replace_experts_4bit,
)
from bitsandbytes.nn.parametrize import Bnb4bitParametrization


class Experts(nn.Module):
    """Experts of two layers; the bias of the second is no weight of theirs."""

    def __init__(self, device="cpu", dtype=torch.float32):
        super().__init__()
        draw = torch.Generator().manual_seed(2)
        for name, shape in (("up_proj", (5, 24, 40)), ("down_proj", (5, 40, 24))):
            weight = torch.randn(shape, generator=draw) / 5
            setattr(self, name, nn.Parameter(weight.to(device, dtype)))
        self.bias = nn.Parameter(torch.randn(5, 40, generator=draw).to(device, dtype))

    def forward(self, x, expert):
        order, offs = group_by_expert(expert, 5)
        hidden = grouped_linear_4bit(self, "up_proj", x[order], offs).relu()
        out = grouped_linear_4bit(self, "down_proj", hidden, offs, self.bias)
        return torch.zeros_like(x).index_copy(0, order, out)

    def loop(self, x, expert):
        """The same, token by token, from the numbers."""
        rows = []
        for token, i in zip(x, expert.tolist(), strict=True):
            if i < 5:
                rows.append(self.down_proj[i] @ (self.up_proj[i] @ token).relu() + self.bias[i])
            else:
                rows.append(token * 0)
        return torch.stack(rows)


class Model(nn.Module):
    """Experts beside parameters of three dimensions that are none."""

    def __init__(self, device="cpu"):
        super().__init__()
        self.conv = nn.Conv1d(4, 4, 3, device=device)
        self.tokens = nn.Parameter(torch.zeros(1, 2, 3, device=device))
        self.layers = nn.ModuleList(Experts(device) for _ in "12")
        self.down_proj = nn.Linear(4, 4, device=device)


def test_rows_sorted_by_expert(device):
    expert = torch.tensor([3, 0, 5, 3, 1, 0, 7, 3], device=device)
    for dtype in (torch.int64, torch.int32):
        order, offs = group_by_expert(expert.to(dtype), 5)
        assert order.tolist() == [1, 5, 4, 0, 3, 7, 2, 6]
        assert offs.tolist() == [2, 3, 3, 6, 6]
    order, offs = group_by_expert(expert[:0], 5)
    assert order.numel() == 0 and offs.tolist() == [0] * 5


@pytest.mark.parametrize("nested", [False, True])
def test_a_module_of_ones_own(device, nested):
    experts = Experts(device)
    names = replace_experts_4bit(experts, compress_statistics=nested, quant_type="fp4")
    assert names == ["up_proj", "down_proj"]
    expert = torch.tensor([3, 0, 5, 3, 1, 0, 7, 3], device=device)
    results = []
    for run in (experts, experts.loop):
        x = torch.randn(8, 40, generator=torch.Generator().manual_seed(1)).to(device)
        x.requires_grad_()
        experts.bias.grad = None
        out = run(x, expert)
        out.square().sum().backward()
        results.append((out, x.grad, experts.bias.grad))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_codes_are_read_and_nothing_is_dequantized(device, monkeypatch):
    experts = Experts(device)
    replace_experts_4bit(experts)
    monkeypatch.setattr(Bnb4bitParametrization, "forward", lambda *_: pytest.fail("dequantized"))
    experts(torch.randn(3, 40, device=device), torch.tensor([0, 4, 4], device=device))


def test_what_is_replaced(device):
    model = Model(device)
    kinds = {name: type(module) for name, module in model.named_modules()}
    names = replace_experts_4bit(model, blocksize=32)
    assert names == [f"layers.{i}.{name}_proj" for i in (0, 1) for name in ("up", "down")]
    for i in (0, 1):
        steps = model.layers[i].parametrizations
        assert list(steps) == ["up_proj", "down_proj"]
        assert steps.up_proj.original.shape == (5 * 24 * 40 // 2, 1)
        assert steps.up_proj[0].quant_state.blocksize == 32
        assert isinstance(model.layers[i].bias, nn.Parameter)
    for name in ("conv", "down_proj"):
        assert type(getattr(model, name)) is kinds[name]
    assert model.tokens.dtype == torch.float32
    with pytest.raises(ValueError, match=r"^replace_experts_4bit: model must be a module with"):
        replace_experts_4bit(model)
    assert replace_experts_4bit(model, param_names=("tokens",)) == ["tokens"]


def test_state_dicts_and_copies(device):
    experts, other = Experts(device), Experts(device)
    plain = {name: value.clone() for name, value in experts.state_dict().items()}
    for module in (experts, other):
        replace_experts_4bit(module)
    x, expert = torch.randn(4, 40, device=device), torch.tensor([1, 2, 2, 0], device=device)
    want = experts(x, expert)
    assert set(experts.state_dict()) > {"up_proj", "up_proj.absmax", "down_proj.quant_map", "bias"}
    with torch.no_grad():
        for name in ("up_proj", "down_proj"):
            other.parametrizations[name].original.zero_()
    assert not torch.equal(other(x, expert), want)
    other.load_state_dict(experts.state_dict())
    assert torch.equal(other(x, expert), want)
    assert torch.equal(copy.deepcopy(experts)(x, expert), want)
    other.load_state_dict(plain)
    assert torch.equal(other(x, expert), want)


def test_one_graph(device, compile_fresh):
    experts = Experts(device)
    replace_experts_4bit(experts)
    compiled = compile_fresh(experts, fullgraph=True, backend="aot_eager")
    for rows in (3, 6):
        x, expert = torch.randn(rows, 40, device=device), torch.arange(rows, device=device) % 5
        torch.testing.assert_close(compiled(x, expert), experts(x, expert))


def test_bad_arguments_get_a_sentence(device):
    experts = Experts(device)
    x, offs = torch.randn(3, 40, device=device), torch.arange(5, device=device) % 3
    message = "param_name must be a 4-bit parameter of"
    for name in ("up_proj", "bias", "none"):
        with pytest.raises(ValueError, match=f"^grouped_linear_4bit: {message} Experts, got"):
            grouped_linear_4bit(experts, name, x, offs)
    bnb.nn.parametrize.replace_parameter_4bit(experts, "up_proj")
    with pytest.raises(ValueError, match=f"^grouped_linear_4bit: {message}"):
        grouped_linear_4bit(experts, "down_proj", x, offs)
    with pytest.raises(ValueError, match=r"A must be \[M, 40\]"):
        grouped_linear_4bit(experts, "up_proj", x[:, :8], offs)
