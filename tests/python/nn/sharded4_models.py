# SPDX-License-Identifier: MIT
"""What the tests of sharded 4-bit layers run on each process."""

import copy

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.fsdp import (
    FullStateDictConfig,
    MixedPrecisionPolicy,
    StateDictType,
    fully_shard,
)
from torch.distributed.fsdp import (
    FullyShardedDataParallel as FSDP,
)
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor, init_device_mesh

from bitsandbytes.nn import LinearNF4


def device_type():
    return "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"


class Adapted(nn.Module):
    """A frozen 4-bit layer and a trained low-rank one."""

    def __init__(self, storage, dtype, nested):
        super().__init__()
        self.base = LinearNF4(48, 48, False, dtype, nested, storage)
        self.a = nn.Linear(48, 4, bias=False)
        self.b = nn.Linear(4, 48, bias=False)

    def forward(self, x):
        return self.base(x) + self.b(self.a(x))


def model(storage, dtype=torch.float32, nested=True):
    torch.manual_seed(1)
    settings = (storage, dtype, nested)
    return nn.Sequential(Adapted(*settings), nn.ReLU(), Adapted(*settings)).to(device_type())


def shard(layers, **settings):
    mesh = init_device_mesh(device_type(), (torch.distributed.get_world_size(),))
    for layer in layers:
        if isinstance(layer, Adapted):
            fully_shard(layer, mesh=mesh, **settings)
    return fully_shard(layers, mesh=mesh, **settings)


def inputs():
    draw = torch.Generator().manual_seed(7)
    return torch.randn(6, 48, generator=draw).to(device_type())


def train(layers, steps=3):
    trained = [p for p in layers.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.05)
    losses = []
    for _ in range(steps):
        loss = layers(inputs()).float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def equal_bytes(a, b):
    a = a.full_tensor() if isinstance(a, DTensor) else a
    return a.cpu().reshape(-1).view(torch.uint8).equal(b.cpu().reshape(-1).view(torch.uint8))


def run_training(storage, reshard):
    layers, alone = shard(model(storage), reshard_after_forward=reshard), model(storage)
    assert isinstance(layers[0].base.weight, DTensor)
    sharded, single = train(layers), train(alone)
    torch.testing.assert_close(torch.tensor(sharded), torch.tensor(single))
    for p, q in zip(layers.parameters(), alone.parameters(), strict=True):
        if p.requires_grad:
            torch.testing.assert_close(p.full_tensor(), q)
        else:
            assert p.shape == q.shape
    layers.eval()
    with torch.no_grad():
        torch.testing.assert_close(layers(inputs()), alone(inputs()))


def run_mixed_precision(storage):
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, cast_forward_inputs=True)
    layers = shard(model(storage, torch.bfloat16), mp_policy=policy)
    alone = model(storage, torch.bfloat16).bfloat16()
    with torch.no_grad():
        out = layers(inputs())
        want = alone(inputs().bfloat16())
    torch.testing.assert_close(out, want)


def run_bytes_that_are_cast():
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    for storage in (torch.float16, torch.float32):
        layers = shard(model(storage), mp_policy=policy)
        with pytest.raises(RuntimeError, match="mixed precision"), torch.no_grad():
            layers(inputs())


def run_state_dict(storage, trained):
    alone = model(storage)
    before = copy.deepcopy(alone.state_dict())
    layers = shard(model(storage))
    if trained:
        layers(inputs()).sum().backward()
        layers.zero_grad()
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(layers, options=options)
    if torch.distributed.get_rank() == 0:
        assert set(state) == set(before)
        for key, value in before.items():
            assert equal_bytes(state[key], value), key
        fresh = model(storage)
        fresh.load_state_dict(state)
    parts = get_model_state_dict(layers)
    assert set(parts) == set(before)
    assert isinstance(parts["0.base.weight"], DTensor)
    return set(state)


def changed_model(storage, nested):
    source = model(storage, nested=nested)
    torch.manual_seed(5)
    with torch.no_grad():
        for p in source.parameters():
            if p.requires_grad:
                p.mul_(2)
    weight = nn.Linear(48, 48).weight.detach() * 3
    source[0].base.load_state_dict({"weight": weight.to(device_type())})
    return source


def run_loading(storage, how, folder):
    # The text of nested scales has no fixed length, which torch.distributed.checkpoint needs.
    nested = how != "files"
    source, layers = changed_model(storage, nested), shard(model(storage, nested=nested))
    full = StateDictOptions(full_state_dict=True)
    if how == "full":
        set_model_state_dict(layers, source.state_dict(), options=full)
    else:
        state = get_model_state_dict(shard(changed_model(storage, nested)))
        if how == "files":
            dcp.save({"model": state}, checkpoint_id=folder)
            state = get_model_state_dict(layers)
            dcp.load({"model": state}, checkpoint_id=folder)
        set_model_state_dict(layers, state)
    torch.testing.assert_close(layers(inputs()), source(inputs()))
    after = get_model_state_dict(layers, options=full)
    for key, value in source.state_dict().items():
        assert not after or equal_bytes(after[key], value), key


def run_flattened(use_orig_params):
    # FSDP1 flattens parameters of one dtype, and frozen ones apart from others unless told so.
    wrapped = {Adapted} if use_orig_params else {LinearNF4, nn.Linear}
    alone = model(torch.float32)
    layers = FSDP(
        model(torch.float32),
        auto_wrap_policy=ModuleWrapPolicy(wrapped),
        use_orig_params=use_orig_params,
        device_id=torch.device(device_type(), torch.distributed.get_rank())
        if device_type() == "cuda"
        else torch.device("cpu"),
    )
    torch.testing.assert_close(torch.tensor(train(layers)), torch.tensor(train(alone)))
    layers.eval()
    with torch.no_grad():
        torch.testing.assert_close(layers(inputs()), alone(inputs()))
    config = FullStateDictConfig(offload_to_cpu=False)
    with FSDP.state_dict_type(layers, StateDictType.FULL_STATE_DICT, config):
        state = layers.state_dict()
    want = alone.state_dict()
    assert set(state) == set(want)
    for key, value in want.items():
        if "base" in key:
            assert equal_bytes(state[key], value), key
    fresh = model(torch.float32)
    fresh.load_state_dict(state)
    with torch.no_grad():
        torch.testing.assert_close(fresh(inputs()), alone(inputs()))
