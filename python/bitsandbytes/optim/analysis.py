# SPDX-License-Identifier: MIT
"""Adam in 32 bits that measures what 8-bit states would have cost."""

import math
from pathlib import Path

import torch
import torch.distributed
from torch import Tensor

from ..plain.states import BLOCK
from ..quant.codes import create_linear_map, default_code

__all__ = ["AnalysisAdam"]

LEVELS = 256
SMALLEST, LARGEST = 8192, 50_000_000  # elements of the parameters that are analysed
SAVE_EVERY = 100  # steps


class AnalysisAdam(torch.optim.Optimizer):
    """AdamW in 32 bits that quantizes its states on the side and keeps histograms of the errors.

    The update that is applied is always that of the 32-bit states:
    ``p <- p - lr weight_decay p - lr c2 / c1 m / (sqrt(v) + eps)``, with ``c1 = 1 - beta1^t`` and
    ``c2 = sqrt(1 - beta2^t)``.

    The state of each parameter holds ``abserrors``, ``relerrors`` and ``counts``, float32
    [256, 256]: sums over elements whose moments have these two codes. Parameters of more than
    8192 and at most 50 million elements are analysed.

    Args:
        params: Parameters or parameter groups.
        lr: Learning rate.
        betas: Decay rates of the first and second moment.
        eps: Added to the denominator.
        weight_decay: Weight decay, decoupled.
        amsgrad: Must be False.
        bnb_analysis: How to quantize: ``"dynamic-blockwise"``, ``"dynamic"`` and ``"linear"`` (one
            scale per tensor), ``"quantile"`` (levels are quantiles of the tensor), or
            ``"my-quantization-routine"``: what a subclass defines as :meth:`quantize`.
        savedir: Folder for the histograms, written every 100 steps by the first process; None or
            empty: none.

    Raises:
        ValueError: `bnb_analysis` is none of these.

    Example:
        >>> layer = torch.nn.Linear(128, 128)
        >>> optimizer = AnalysisAdam(layer.parameters(), bnb_analysis="linear")
    """

    ROUTINES = ("dynamic-blockwise", "dynamic", "linear", "quantile", "my-quantization-routine")

    def __init__(
        self,
        params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        bnb_analysis: str = "dynamic-blockwise",
        savedir: str | None = None,
    ):
        if bnb_analysis not in self.ROUTINES:
            raise ValueError(
                f"AnalysisAdam: bnb_analysis must be one of {self.ROUTINES}, got {bnb_analysis!r}"
            )
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
        }
        super().__init__(params, defaults)
        self.analysis = bnb_analysis
        self.savedir = savedir

    @property
    def supports_memory_efficient_fp16(self) -> bool:
        """For fairseq."""
        return True

    @property
    def supports_flat_params(self) -> bool:
        """For fairseq."""
        return True

    @torch.no_grad()
    def step(self, closure=None):
        """Takes one step with the gradients at hand.

        Args:
            closure: Recomputes and returns the loss.

        Returns:
            What `closure` returned, or None.

        Raises:
            RuntimeError: A gradient is sparse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        place = 0
        for group in self.param_groups:
            assert not group["amsgrad"], "AnalysisAdam: amsgrad must be False"
            for p in group["params"]:
                if p.grad is not None:
                    self._advance(group, p, place)
                place += 1
        return loss

    def _advance(self, group: dict, p: Tensor, place: int) -> None:
        if p.grad.layout != torch.strided:
            raise RuntimeError("AnalysisAdam.step: gradients must be dense, got a sparse one")
        state = self.state[p]
        if not state:
            state["step"] = 0
            state["exp_avg"] = torch.zeros_like(p, dtype=torch.float32)
            state["exp_avg_sq"] = torch.zeros_like(p, dtype=torch.float32)
            for key in ("abserrors", "relerrors", "counts"):
                state[key] = torch.zeros((LEVELS, LEVELS), dtype=torch.float32, device=p.device)
        state["step"] += 1
        beta1, beta2 = group["betas"]
        m, v, grad = state["exp_avg"], state["exp_avg_sq"], p.grad.float()
        m.mul_(beta1).add_(grad, alpha=1 - beta1)
        v.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        update = m / (v.sqrt() + group["eps"])
        if SMALLEST < p.numel() <= LARGEST:
            self._measure(group, state, m, v, update)
        c1 = 1 - beta1 ** state["step"]
        c2 = math.sqrt(1 - beta2 ** state["step"])
        new = p.float() * (1 - group["lr"] * group["weight_decay"])
        p.copy_(new - group["lr"] * c2 / c1 * update)
        if self.savedir and state["step"] % SAVE_EVERY == 0 and _is_first_process():
            self._save(p, state, place)

    def _measure(self, group: dict, state: dict, m: Tensor, v: Tensor, update: Tensor) -> None:
        code1, m8 = self.quantize(m, True)
        code2, v8 = self.quantize(v, False)
        error = (m8 / (v8.sqrt() + group["eps"]) - update).abs().reshape(-1)
        relative = error / (update.reshape(-1) + 1e-6).abs()
        place = code1.reshape(-1).long() * LEVELS + code2.reshape(-1).long()
        for key, values in (
            ("abserrors", error),
            ("relerrors", relative),
            ("counts", torch.ones_like(error)),
        ):
            state[key].view(-1).index_add_(0, place, values)

    def quantize(self, x: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
        """Returns codes and the numbers they stand for.

        Args:
            x: A moment, float32.
            signed: Whether it has a sign.

        Returns:
            Codes, uint8 of x's shape, and the dequantized moment, float32 of x's shape.

        Raises:
            NotImplementedError: The routine is a subclass's own, and it has none.
        """
        if self.analysis == "my-quantization-routine":
            raise NotImplementedError(
                "AnalysisAdam: bnb_analysis 'my-quantization-routine' needs a subclass that "
                "defines quantize()"
            )
        if self.analysis == "quantile":
            return _quantize_by_quantiles(x)
        if self.analysis == "linear":
            levels = create_linear_map(signed=signed).to(x.device)
        else:
            levels = default_code("dynamic" if signed else "udynamic", x.device)
        ops = torch.ops.bitsandbytes
        flat = x.reshape(-1)
        if self.analysis == "dynamic-blockwise":
            codes, absmax = ops.quantize_blockwise(flat, levels, BLOCK)
            numbers = ops.dequantize_blockwise(codes, absmax, levels, BLOCK, torch.float32)
            return codes.view(x.shape), numbers.view(x.shape)
        # Not as one block: ops do not take blocks of any size on every device.
        absmax = flat.abs().max()
        codes = _nearest(flat / absmax.clamp(min=torch.finfo(torch.float32).tiny), levels)
        return codes.view(x.shape), (levels[codes.long()] * absmax).view(x.shape)

    def _save(self, p: Tensor, state: dict, place: int) -> None:
        shape = "_".join(map(str, p.shape))
        for name, key in (
            ("abserr", "abserrors"),
            ("relerr", "relerrors"),
            ("counts", "counts"),
        ):
            torch.save(state[key], Path(self.savedir) / f"{place}_{shape}_{name}.pkl")


def _nearest(x: Tensor, levels: Tensor) -> Tensor:
    """Codes of the nearest of sorted `levels`."""
    thresholds = (levels[1:] + levels[:-1]) / 2
    return torch.bucketize(x, thresholds).to(torch.uint8)


def _quantize_by_quantiles(x: Tensor) -> tuple[Tensor, Tensor]:
    flat = x.reshape(-1)
    shares = (torch.arange(LEVELS, device=x.device, dtype=torch.float32) + 0.5) / LEVELS
    # torch.quantile takes 16 million elements at most.
    ordered = flat.sort().values
    levels = ordered[(shares * flat.numel()).long()]
    codes = _nearest(flat, levels).view(x.shape)
    return codes, levels[codes.long()]


def _is_first_process() -> bool:
    distributed = torch.distributed
    return not (
        distributed.is_available() and distributed.is_initialized() and distributed.get_rank() != 0
    )
