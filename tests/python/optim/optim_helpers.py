# SPDX-License-Identifier: MIT
"""What several tests of the optimizers share: parameters, steps, comparisons of states."""

import torch
from torch import nn

import bitsandbytes as bnb

__all__ = ["assert_continues_alike", "assert_same_state", "fresh", "parameter", "step", "trained"]


def parameter(*shape, dtype=torch.float32, device="cpu"):
    return nn.Parameter(torch.randn(shape).to(dtype).to(device))


def step(opt, *params):
    for p in params:
        p.grad = torch.randn(p.shape).to(p.dtype).to(p.device)
    opt.step()


def trained(bits=8, steps=2, shapes=((5000,), (30,)), **kwargs):
    params = [parameter(*shape) for shape in shapes]
    opt = bnb.optim.AdamW(params, lr=1e-2, optim_bits=bits, **kwargs)
    for _ in range(steps):
        step(opt, *params)
    return opt, params


def fresh(params, **kwargs):
    """An untrained optimizer over copies of parameters."""
    copies = [nn.Parameter(p.detach().clone()) for p in params]
    return bnb.optim.AdamW(copies, lr=1e-2, optim_bits=8, **kwargs), copies


def assert_same_state(a, b):
    assert a.keys() == b.keys()
    for key, value in a.items():
        if torch.is_tensor(value):
            other = b[key]
            assert value.dtype == other.dtype and torch.equal(value.cpu(), other.cpu()), key
        else:
            assert value == b[key], key


def assert_continues_alike(opt, params, other, others):
    for p, q in zip(params, others, strict=True):
        assert torch.equal(p.detach().cpu(), q.detach().cpu())
        assert_same_state(opt.state[p], other.state[q])
    for _ in range(2):
        for p, q in zip(params, others, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.to(q.device)
        opt.step()
        other.step()
    for p, q in zip(params, others, strict=True):
        assert torch.equal(p, q)
        assert_same_state(opt.state[p], other.state[q])
