# SPDX-License-Identifier: MIT
"""What the released accelerate does to 4-bit layers: empty weights, setting, offloading."""

import torch
from torch import nn

from bitsandbytes.nn import LinearNF4, Params4bit


def inputs(device):
    return torch.randn(3, 64, generator=torch.Generator().manual_seed(1)).to(device)


def test_empty_weights_and_setting_them(accelerate, device):
    source = nn.Linear(64, 96)
    with accelerate.init_empty_weights():
        layer = LinearNF4(64, 96)
    assert type(layer.weight) is Params4bit and layer.weight.is_meta and layer.bias.is_meta
    assert layer.weight.module is layer
    for name in ("weight", "bias"):
        value = getattr(source, name).detach()
        accelerate.utils.set_module_tensor_to_device(layer, name, device, value=value)
    want = LinearNF4(64, 96)
    want.load_state_dict(source.state_dict())
    want.to(device)
    assert type(layer.weight) is Params4bit and layer.weight.quant_state == want.quant_state
    assert torch.equal(layer(inputs(device)), want(inputs(device)))


def test_offloading(accelerate, device, tmp_path):
    for how in ("cpu", "disk"):
        model = nn.Sequential(LinearNF4(64, 64), nn.ReLU(), LinearNF4(64, 8)).to(device)
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
    model = nn.Sequential(LinearNF4(64, 64), nn.ReLU(), nn.Linear(64, 8)).to(device)
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
