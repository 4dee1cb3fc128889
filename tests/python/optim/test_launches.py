# SPDX-License-Identifier: MIT
"""How many kernels a step starts on a GPU."""

import ctypes

import pytest
import torch
from torch import nn
from torch.profiler import DeviceType, ProfilerActivity, profile

import bitsandbytes as bnb
from bitsandbytes import _library

LARGE, SMALL = (64, 80), (30,)  # states of 8 bits, states of 32 bits
NO_LAUNCH = {"aten::empty", "aten::new_empty", "aten::empty_strided"}


def launches_of(work, device) -> int:
    """Kernels and copies that `work` starts."""
    if device == "cuda":
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
            work()
            torch.cuda.synchronize()
        on_device = [event for event in seen.events() if event.device_type == DeviceType.CUDA]
        # torch marks the time of its optimizers' steps there, too.
        return sum(not event.name.startswith("Optimizer.") for event in on_device)
    counter = ctypes.CDLL(str(_library.libraries["_ops"].path)).bnb_emulated_launches
    counter.restype = ctypes.c_int64
    before = counter()
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        work()
    ops = [event.name for event in seen.events() if event.name.startswith("aten::")]
    # Every op of torch would start one or more.
    return counter() - before + sum(name not in NO_LAUNCH for name in ops)


def bounded(opt):
    opt.args.max_unorm = 0.1
    return opt


# Passes over the lists of 8-bit and of 32-bit states, and an optimizer.
MAKERS = {
    "Adam8bit": ((1, 1), bnb.optim.Adam8bit),
    "AdamW8bit": ((1, 1), bnb.optim.AdamW8bit),
    "AdEMAMix8bit": ((1, 1), bnb.optim.AdEMAMix8bit),
    "Lion8bit": ((1, 1), bnb.optim.Lion8bit),
    "SGD8bit": ((1, 1), lambda ps: bnb.optim.SGD8bit(ps, lr=1e-2, momentum=0.9)),
    "RMSprop8bit": ((1, 1), bnb.optim.RMSprop8bit),
    "Adagrad8bit": ((1, 1), bnb.optim.Adagrad8bit),
    "Adam8bit(block_wise=False)": ((2, 1), lambda ps: bnb.optim.Adam8bit(ps, block_wise=False)),
    "LAMB8bit": ((2, 2), bnb.optim.LAMB8bit),
    "LAMB8bit(block_wise=False)": ((2, 2), lambda ps: bnb.optim.LAMB8bit(ps, block_wise=False)),
    "LARS8bit": ((2, 2), lambda ps: bnb.optim.LARS8bit(ps, lr=1e-2, momentum=0.9)),
    "max_unorm": ((2, 2), lambda ps: bounded(bnb.optim.AdEMAMix8bit(ps))),
    "percentile_clipping": ((2, 2), lambda ps: bnb.optim.Adam8bit(ps, percentile_clipping=5)),
    "LAMB8bit(percentile_clipping)": (
        (3, 3),
        lambda ps: bnb.optim.LAMB8bit(ps, percentile_clipping=5),
    ),
}


@pytest.mark.parametrize(("passes", "make"), MAKERS.values(), ids=MAKERS)
def test_launches_of_a_step(device, gpu_kernels, passes, make):
    if not gpu_kernels:
        pytest.skip("needs kernels for a GPU")
    if not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"):
        pytest.skip("this torch describes no tensors to native code")
    params = [nn.Parameter(torch.randn(s, device=device)) for s in (LARGE, SMALL, LARGE, SMALL)]
    for p in params:
        p.grad = torch.randn_like(p)
    opt = make(params)
    for _ in range(2):
        opt.step()
    # Two lists, those of 8-bit and of 32-bit states.
    assert launches_of(opt.step, device) == sum(passes)
