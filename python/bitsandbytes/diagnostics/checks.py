# SPDX-License-Identifier: MIT
"""Small computations whose results are known, for one device at a time."""

from collections.abc import Callable

import torch
from torch import Tensor

from .. import functional, nn, optim

__all__ = ["CHECKS", "run"]

# Half the widest gap between two levels of the dynamic map, relative to the block's absmax.
CODE_ERROR = 0.45 / 64
# Half the widest gap between two levels of nf4.
NF4_ERROR = (1 - 0.6961928) / 2
# Rounding both factors to int8 leaves 1 % of the norm of these products; outliers that are
# quantized along with the rest leave more than 2 %.
INT8_ERROR = 0.015


def _random(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _require(error: float, limit: float, what: str) -> str:
    """Returns the text of a passed check; raises where `error` is too large or NaN."""
    if not error <= limit:
        raise ArithmeticError(f"{what} {error:.2g}, expected at most {limit:.2g}")
    return f"{what} {error:.2g}"


def _code_error(values: Tensor, decoded: Tensor, blocksize: int) -> float:
    """Returns the largest error of 8-bit codes relative to their block's absmax."""
    blocks = values.reshape(-1, blocksize)
    error = (blocks - decoded.cpu().reshape(-1, blocksize)).abs()
    return (error / blocks.abs().amax(1, keepdim=True)).max().item()


def adam8bit(device: torch.device) -> str:
    """Takes one step of Adam8bit; parameter and states must be those of Adam in float32."""
    lr, beta1, beta2, eps, decay = 1e-2, 0.9, 0.999, 1e-8, 0.1
    start, grad = _random(0, 64, 128), _random(1, 64, 128)
    parameter = torch.nn.Parameter(start.to(device, copy=True))
    parameter.grad = grad.to(device)
    optimizer = optim.Adam8bit([parameter], lr, (beta1, beta2), eps, decay)
    optimizer.step()

    first = (1 - beta1) * grad
    second = (1 - beta2) * grad * grad
    direction = (first / (1 - beta1)) / ((second / (1 - beta2)).sqrt() + eps)
    expected = (start - lr * direction) * (1 - lr * decay)
    error = (parameter.detach().cpu() - expected).abs().max().item()
    text = _require(error, 2e-6, "largest error")

    state = optimizer.state[parameter]
    for i, values in ((1, first), (2, second)):
        decoded = functional.dequantize_blockwise(
            state[f"state{i}"],
            absmax=state[f"absmax{i}"],
            code=state[f"qmap{i}"],
            blocksize=256,
        )
        _require(_code_error(values, decoded, 256), 1.01 * CODE_ERROR, f"error of state{i}")
    return text


def quantize_blockwise(device: torch.device) -> str:
    """Quantizes and dequantizes; no number may be further off than half a gap between levels."""
    values = _random(0, 64, 128)
    codes, state = functional.quantize_blockwise(values.to(device), blocksize=256)
    decoded = functional.dequantize_blockwise(codes, state)
    return _require(_code_error(values, decoded, 256), 1.01 * CODE_ERROR, "largest relative error")


def quantize_4bit(device: torch.device) -> str:
    """The same with 4-bit codes, whose scales are quantized as well."""
    values = _random(0, 64, 128)
    packed, state = functional.quantize_nf4(values.to(device), compress_statistics=True)
    decoded = functional.dequantize_4bit(packed, state)
    return _require(_code_error(values, decoded, 64), 1.02 * NF4_ERROR, "largest relative error")


def linear8bit(device: torch.device, threshold: float) -> str:
    """Compares an int8 layer with the float32 layer; with a threshold, outliers are among x."""
    x, weight, bias = _random(0, 32, 128), _random(1, 64, 128), _random(2, 64)
    if threshold > 0:
        x[:, 5] = 10 * threshold
    layer = nn.Linear8bitLt(128, 64, has_fp16_weights=False, threshold=threshold)
    layer.load_state_dict({"weight": weight, "bias": bias})
    layer = layer.to(device).eval()
    with torch.no_grad():
        out = layer(x.to(device)).cpu()
    expected = torch.nn.functional.linear(x, weight, bias)
    error = ((out - expected).norm() / expected.norm()).item()
    return _require(error, INT8_ERROR, "relative error")


CHECKS: dict[str, Callable[[torch.device], str]] = {
    "Adam8bit update": adam8bit,
    "quantize_blockwise round trip": quantize_blockwise,
    "quantize_4bit round trip": quantize_4bit,
    "Linear8bitLt, threshold 0.0": lambda device: linear8bit(device, 0.0),
    "Linear8bitLt, threshold 6.0": lambda device: linear8bit(device, 6.0),
}


def run(device: torch.device) -> list[str]:
    """Runs every check on one device, printing a line for each; returns what failed."""
    problems = []
    for name, check in CHECKS.items():
        try:
            result = f"ok ({check(device)})"
        except Exception as error:
            # Whatever a broken installation raises belongs in the report.
            reason = str(error).strip() or "no message"
            result = f"FAILED: {type(error).__name__}: {reason}"
            problems.append(f"{device}: {name}: {reason.splitlines()[0]}")
        print(f"  {name:30s} {result}")
    return problems
