# SPDX-License-Identifier: MIT
"""What the tests of distributed optimizers run on each process: models, training, checkpoints."""

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Replicate,
    Shard,
    distribute_tensor,
    init_device_mesh,
)

import bitsandbytes as bnb

OPTIMIZERS = ["Adam8bit", "AdamW8bit", "Lion8bit", "Adam", "AdEMAMix8bit"]
# Rows of `whole` and `single` are blocks of 256, those of the others are not.
SHAPES = {
    "whole": (11, 512),
    "odd": (37, 130),
    "vector": (5000,),
    "single": (1, 4608),  # only one process has anything of it
    "image": (9, 4, 8, 16),
    "small": (7, 9),
}
WHOLE = ("whole", "single", "image", "small")


def device_type():
    return "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        draw = torch.Generator().manual_seed(1)
        for name, shape in SHAPES.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape, generator=draw)))
        self.to(device_type())

    def forward(self, number):
        # Gradients are the same on every process and have few bits: their average is exact.
        slopes = [(p.detach() * (1.0 + number % 5) + number).sin() for p in self.parameters()]
        pairs = zip(self.parameters(), slopes, strict=True)
        return sum((p * slope.bfloat16().float()).sum() for p, slope in pairs)


def mesh():
    return init_device_mesh(device_type(), (torch.distributed.get_world_size(),))


def sharded_model():
    return fully_shard(Model(), mesh=mesh())


def make(name, model, **settings):
    return getattr(bnb.optim, name)(model.parameters(), lr=1e-2, **settings)


def train(model, optimizer, numbers):
    for number in numbers:
        model(number).backward()
        optimizer.step()
        optimizer.zero_grad()


def whole(tensor):
    tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return tensor.detach().cpu()


def assert_same(model, expected, exact):
    for (name, p), q in zip(model.named_parameters(), expected.parameters(), strict=True):
        p, q = whole(p), whole(q)
        if name in exact:
            assert torch.equal(p, q), name
        else:
            # Other blocks, other roundings of states; a wrong step moves everything by 1e-2.
            far = (p - q).abs() > 2e-3
            assert far.float().mean() < 0.02, (name, far.float().mean())


def exact_names(name):
    return WHOLE if name.endswith("8bit") else tuple(SHAPES)


def save(model, optimizer, folder, **options):
    options = StateDictOptions(**options)
    model_state, optimizer_state = get_state_dict(model, optimizer, options=options)
    dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folder)


def load(model, optimizer, folder, **options):
    options = StateDictOptions(**options)
    model_state, optimizer_state = get_state_dict(model, optimizer, options=options)
    state = {"model": model_state, "optimizer": optimizer_state}
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(
        model,
        optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
        options=options,
    )


# Shape, dimension that is sharded (None: replicas), and whether states are written by blocks.
PARALLEL = {
    "columns": ((6, 1024), 1, True),
    "narrow": ((6, 768), 1, False),
    "channels": ((4, 6, 16, 16), 1, True),
    "last": ((8, 4, 256), 2, False),
    "replica": ((20, 256), None, True),
    "number": ((), None, None),
}


class Parallel(nn.Module):
    def __init__(self, places):
        super().__init__()
        draw = torch.Generator().manual_seed(2)
        for name, (shape, dim, _) in PARALLEL.items():
            value = torch.randn(shape, generator=draw).to(device_type())
            if places is not None:
                placement = Replicate()
                if dim is not None:
                    placement = Shard(dim if places == "own" else 0)
                value = distribute_tensor(value, mesh(), [placement])
            self.register_parameter(name, nn.Parameter(value))

    def set_gradients(self, number):
        draw = torch.Generator().manual_seed(number)
        for p in self.parameters():
            grad = torch.randn(p.shape, generator=draw).to(device_type())
            if isinstance(p, DTensor):
                if number % 2:
                    # Not where the parameter lies: a sum still to be made.
                    parts = torch.distributed.get_world_size()
                    grad = DTensor.from_local(grad / parts, p.device_mesh, [Partial()])
                else:
                    # Not as the parameter lies in memory.
                    grad = distribute_tensor(grad, p.device_mesh, p.placements)
                    turned = grad.to_local().mT.contiguous().mT if p.dim() else grad.to_local()
                    strides = {"shape": grad.shape, "stride": grad.stride()}
                    grad = DTensor.from_local(turned, p.device_mesh, p.placements, **strides)
            p.grad = grad


def train_parallel(model, optimizer, numbers):
    for number in numbers:
        model.set_gradients(number)
        optimizer.step()
        optimizer.zero_grad()
