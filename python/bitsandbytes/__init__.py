# SPDX-License-Identifier: MIT
"""8-bit optimizers, int8 and 4-bit linear layers and quantization functions for PyTorch.

    import bitsandbytes as bnb

    optimizer = bnb.optim.Adam8bit(model.parameters(), lr=1e-3)
    layer = bnb.nn.Linear8bitLt(1024, 1024, has_fp16_weights=False, threshold=6.0)
    layer = bnb.nn.LinearNF4(1024, 1024, compute_dtype=torch.bfloat16)
    codes, state = bnb.functional.quantize_blockwise(tensor)

``python -m bitsandbytes`` shows what is installed and checks it.
"""

from importlib.metadata import entry_points

from . import _ops as _ops
from . import utils
from ._version import __version__

# The ops must exist before anything that calls them.
from . import autograd, functional, nn, optim, research  # isort: skip
from .autograd._functions import (
    MatmulLtState,
    bmm_cublas,
    matmul,
    matmul_4bit,
    matmul_cublas,
    mm_cublas,
)
from .autograd.grouped4 import grouped_matmul_4bit
from .cextension import COMPILED_WITH_CUDA
from .nn import modules
from .optim import adam

__all__ = [
    "COMPILED_WITH_CUDA",
    "MatmulLtState",
    "__version__",
    "adam",
    "autograd",
    "bmm_cublas",
    "features",
    "functional",
    "grouped_matmul_4bit",
    "matmul",
    "matmul_4bit",
    "matmul_cublas",
    "mm_cublas",
    "modules",
    "nn",
    "optim",
    "research",
    "supported_torch_devices",
    "utils",
]


def _import_backends() -> None:
    """Calls the entry points of other packages that bring kernels for further devices."""
    for backend in entry_points(group="bitsandbytes.backends"):
        try:
            backend.load()()
        except Exception as error:
            raise RuntimeError(
                f"bitsandbytes: the backend {backend.name} ({backend.value}) does not load: {error}"
            ) from error


_import_backends()

# Asked for by transformers, accelerate and diffusers.
features = {"multi_backend"}
supported_torch_devices = {"cpu", "cuda", "xpu", "hpu", "npu", "mps"}
