# SPDX-License-Identifier: MIT
"""An optimizer of one's own, on a rule that the library has.

An optimizer is a rule, written once for every device (see "Add an optimizer" in CONTRIBUTING.md),
and a Python class that names the rule and its settings. This file shows the class: Signum
(Bernstein et al. 2018, arXiv:1802.04434), the sign of a momentum, is the rule "lion" with both
betas equal. States in 8 bits, overrides of single parameters, checkpoints, CUDA graphs and the rest
come with the base class.

    python examples/custom_optimizer.py
"""

import torch
from torch import nn

import bitsandbytes as bnb
from bitsandbytes.optim.optimizer import Optimizer1State


class Signum(Optimizer1State):
    """Signum: steps of the same size in the direction of an average of gradients.

    Args:
        params: Parameters or parameter groups.
        lr: Size of the step of every element.
        momentum: Decay rate of the average.
        weight_decay: Weight decay, decoupled.
        optim_bits: 8 or 32: bits per element of the average.
        min_8bit_size: Parameters with fewer elements keep 32 bits.
    """

    def __init__(
        self,
        params,
        lr: float = 1e-3,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        optim_bits: int = 32,
        min_8bit_size: int = 4096,
    ):
        # The rule takes the sign of beta1 m + (1 - beta1) g, then m <- beta2 m + (1 - beta2) g.
        super().__init__(
            "lion",
            params,
            lr,
            (momentum, momentum),
            weight_decay=weight_decay,
            optim_bits=optim_bits,
            min_8bit_size=min_8bit_size,
        )


# A variant states what differs: the number of bits is fixed, and the argument for it is gone.
class Signum8bit(Signum, without=("optim_bits",)):
    """Signum with an 8-bit average. The arguments of :class:`Signum` without `optim_bits`."""

    state_bits = 8


def train(cls: type[torch.optim.Optimizer], steps: int = 80) -> tuple[float, int]:
    """Fits a linear map; returns the last loss and the bytes of the optimizer's state."""
    torch.manual_seed(0)
    layer, target = nn.Linear(128, 64), nn.Linear(128, 64)
    optimizer = cls(layer.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, total_iters=steps)
    for _ in range(steps):
        x = torch.randn(64, 128)
        loss = nn.functional.mse_loss(layer(x), target(x).detach())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    states = [value for state in optimizer.state.values() for value in state.values()]
    tensors = [value for value in states if isinstance(value, torch.Tensor)]
    return loss.item(), sum(tensor.nbytes for tensor in tensors)


def main() -> None:
    """Trains with both precisions, and keeps one layer's average in 32 bits."""
    for cls in (Signum, Signum8bit):
        loss, size = train(cls)
        print(f"{cls.__name__:12} loss {loss:.4f}   state {size:6d} bytes")

    first, second = nn.Linear(128, 128), nn.Linear(128, 128)
    manager = bnb.optim.GlobalOptimManager.get_instance()
    manager.override_config(second.weight, "optim_bits", 32)
    optimizer = Signum8bit([first.weight, second.weight])
    second(first(torch.randn(8, 128))).sum().backward()
    optimizer.step()
    for name, weight in (("first", first.weight), ("second", second.weight)):
        print(f"{name:12} {optimizer.state[weight]['state1'].dtype}")


if __name__ == "__main__":
    main()
