# SPDX-License-Identifier: MIT
"""What the released accelerate does to int8 layers: empty weights, setting, offloading."""

import pytest
import torch
from torch import nn

import bitsandbytes as bnb
from bitsandbytes.nn import Int8Params


def inputs(device):
    return torch.randn(3, 64, generator=torch.Generator().manual_seed(1)).to(device)


def layer8(outputs, threshold=6.0):
    return bnb.nn.Linear8bitLt(64, outputs, has_fp16_weights=False, threshold=threshold)


@pytest.fixture
def accelerator_device(device):
    """accelerate sends int8 weights through an accelerator, also those for the CPU."""
    if device == "cpu":
        pytest.skip("needs an accelerator")
    return torch.device(device, 0)


def test_empty_weights(accelerate):
    with accelerate.init_empty_weights():
        layer = layer8(96)
    assert type(layer.weight) is Int8Params and layer.weight.is_meta and layer.bias.is_meta


def test_empty_weights_and_setting_them(accelerate, accelerator_device):
    device = accelerator_device
    source = nn.Linear(64, 96)
    with accelerate.init_empty_weights():
        layer = layer8(96)
    for name in ("weight", "bias"):
        value = getattr(source, name).detach()
        accelerate.utils.set_module_tensor_to_device(layer, name, device, value=value)
    want = layer8(96)
    # accelerate rounds a float32 weight to float16 on its way to int8.
    rounded = {"weight": source.weight.detach().half(), "bias": source.bias.detach()}
    want.load_state_dict(rounded, assign=True)
    want.to(device)
    assert type(layer.weight) is Int8Params and layer.weight.dtype == torch.int8
    assert (layer.weight.data.int() - want.weight.data.int()).abs().max() <= 1
    torch.testing.assert_close(
        layer.eval()(inputs(device)), want.eval()(inputs(device)), rtol=1e-2, atol=1e-2
    )


def test_setting_codes_with_their_statistics(accelerate, accelerator_device):
    device = accelerator_device
    source = layer8(96).to(device)
    with accelerate.init_empty_weights():
        layer = layer8(96)
    accelerate.utils.set_module_tensor_to_device(
        layer,
        "weight",
        device,
        value=source.weight.data.cpu(),
        dtype=torch.int8,  # or the codes would be cast to the dtype of the empty weight
        fp16_statistics=source.weight.SCB.cpu(),
    )
    bias = source.bias.detach()
    accelerate.utils.set_module_tensor_to_device(layer, "bias", device, value=bias)
    assert torch.equal(layer.weight.SCB, source.weight.SCB)
    assert torch.equal(layer.eval()(inputs(device)), source.eval()(inputs(device)))


@pytest.mark.parametrize("how", ["cpu", "disk"])
def test_offloading(accelerate, device, tmp_path, how):
    model = nn.Sequential(layer8(64), nn.ReLU(), layer8(8)).to(device).eval()
    want = model(inputs(device))
    target = torch.device(device)
    if how == "cpu":
        accelerate.cpu_offload(model, execution_device=target)
    else:
        accelerate.disk_offload(model, tmp_path, execution_device=target)
    assert model[0].weight.is_meta
    for _ in "12":
        assert torch.equal(model(inputs(device)), want)
        assert model[0].weight.is_meta


def test_a_prepared_model_trains(accelerate, device):
    accelerator = accelerate.Accelerator(cpu=device == "cpu")
    model = nn.Sequential(layer8(64), nn.ReLU(), nn.Linear(64, 8)).to(device)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model, optimizer = accelerator.prepare(model, optimizer)
    losses = []
    for _ in range(3):
        loss = model(inputs(device)).square().mean()
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
