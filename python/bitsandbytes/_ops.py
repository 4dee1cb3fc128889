# SPDX-License-Identifier: MIT
"""The schema of every op, written once, and the registration of everything that implements them.

Schemas are defined from Python so that every op exists, with its plain-PyTorch implementation, on
any device and without any native library; the native libraries only add kernels for their
dispatch keys (``csrc/ops``).
"""

import torch

from . import _library

__all__ = ["SCHEMAS", "register_fake", "register_kernel"]

NAMESPACE = "bitsandbytes"

# What every optimizer op takes besides its lists: the number of steps taken, hyperparameters, and
# the options of one call. `gnorm_scales`, `unorm` and `update_scales` hold one number per parameter
# of the list.
_HYPER = (
    "Tensor step, Tensor? lr_tensor, float lr, float beta1, float beta2, float beta3, float alpha, "
    "float eps, float weight_decay, float gnorm_scale, bool skip_zeros, "
    "float t_alpha=0.0, float t_beta3=0.0"
)
_PREVIEW = f"{_HYPER}, Tensor? gnorm_scales=None"
_STEP = (
    f"{_HYPER}, float max_unorm=0.0, int? rounding_seed=None, Tensor? gnorm_scales=None, "
    "Tensor(z!)? unorm=None, Tensor? update_scales=None"
)

SCHEMAS = (
    # 8-bit blockwise quantization
    "quantize_blockwise(Tensor A, Tensor code, int blocksize) -> (Tensor, Tensor)",
    "quantize_blockwise.out(Tensor A, Tensor code, int blocksize, *, Tensor(a!) out, "
    "Tensor(b!) absmax) -> ()",
    "dequantize_blockwise(Tensor A, Tensor absmax, Tensor code, int blocksize, ScalarType dtype) "
    "-> Tensor",
    "dequantize_blockwise.out(Tensor A, Tensor absmax, Tensor code, int blocksize, "
    "ScalarType dtype, Tensor(a!) out) -> ()",
    # Codes of levels that are not the nearest: `rand` decides, read from `offset` on
    "quantize_blockwise_stochastic(Tensor A, Tensor code, int blocksize, Tensor rand, int offset) "
    "-> (Tensor, Tensor)",
    # 8-bit quantization without blocks
    "quantize_no_absmax(Tensor A, Tensor code) -> Tensor",
    "estimate_quantiles(Tensor A, float offset) -> Tensor",
    # The same with quantized scales: absmax_code[absmax_8bit] * absmax + absmax_offset
    "dequantize_blockwise_nested(Tensor A, Tensor absmax_8bit, Tensor absmax_code, Tensor absmax, "
    "Tensor absmax_offset, Tensor code, int blocksize, int nested_blocksize, ScalarType dtype) "
    "-> Tensor",
    "dequantize_blockwise_nested.out(Tensor A, Tensor absmax_8bit, Tensor absmax_code, "
    "Tensor absmax, Tensor absmax_offset, Tensor code, int blocksize, int nested_blocksize, "
    "ScalarType dtype, Tensor(a!) out) -> ()",
    # 4-bit blockwise quantization
    "quantize_4bit(Tensor A, int blocksize, str quant_type, ScalarType quant_storage) "
    "-> (Tensor, Tensor)",
    "quantize_4bit.out(Tensor A, int blocksize, str quant_type, ScalarType quant_storage, *, "
    "Tensor(a!) out, Tensor(b!) absmax) -> ()",
    "dequantize_4bit(Tensor A, Tensor absmax, int blocksize, str quant_type, int[] shape, "
    "ScalarType dtype) -> Tensor",
    "dequantize_4bit.out(Tensor A, Tensor absmax, int blocksize, str quant_type, int[] shape, "
    "ScalarType dtype, Tensor(a!) out) -> ()",
    "dequantize_4bit_nested(Tensor A, Tensor absmax_8bit, Tensor absmax_code, Tensor absmax, "
    "Tensor absmax_offset, int blocksize, int nested_blocksize, str quant_type, int[] shape, "
    "ScalarType dtype) -> Tensor",
    "dequantize_4bit_nested.out(Tensor A, Tensor absmax_8bit, Tensor absmax_code, Tensor absmax, "
    "Tensor absmax_offset, int blocksize, int nested_blocksize, str quant_type, int[] shape, "
    "ScalarType dtype, Tensor(a!) out) -> ()",
    # Products with a 4-bit weight of shape `shapeB`. With `absmax_8bit` the scales are quantized
    # themselves, in blocks of 256: absmax_code[absmax_8bit] * absmax + absmax_offset.
    "gemm_4bit(Tensor A, Tensor B, int[] shapeB, Tensor absmax, int blocksize, str quant_type, "
    "Tensor? bias=None, Tensor? absmax_8bit=None, Tensor? absmax_code=None, "
    "Tensor? absmax_offset=None) -> Tensor",
    "gemm_4bit_dgrad(Tensor grad, Tensor B, int[] shapeB, Tensor absmax, int blocksize, "
    "str quant_type, Tensor? absmax_8bit=None, Tensor? absmax_code=None, "
    "Tensor? absmax_offset=None) -> Tensor",
    # The same with a weight [E, N, K] for groups of rows: group i ends before row offs[i].
    "grouped_gemm_4bit(Tensor A, Tensor B, Tensor offs, int[] shapeB, Tensor absmax, "
    "int blocksize, str quant_type, Tensor? bias=None, Tensor? absmax_8bit=None, "
    "Tensor? absmax_code=None, Tensor? absmax_offset=None) -> Tensor",
    "grouped_gemm_4bit_dgrad(Tensor grad, Tensor B, Tensor offs, int[] shapeB, Tensor absmax, "
    "int blocksize, str quant_type, Tensor? absmax_8bit=None, Tensor? absmax_code=None, "
    "Tensor? absmax_offset=None) -> Tensor",
    "gemv_4bit(Tensor A, Tensor B, int[] shapeB, Tensor absmax, Tensor code, int blocksize) "
    "-> Tensor",
    "gemv_4bit.out(Tensor A, Tensor B, int[] shapeB, Tensor absmax, Tensor code, int blocksize, "
    "Tensor(a!) out) -> ()",
    # LLM.int8()
    "int8_vectorwise_quant(Tensor A, float threshold=0.0) -> (Tensor, Tensor, Tensor?)",
    "int8_vectorwise_dequant(Tensor A, Tensor stats) -> Tensor",
    "int8_vectorwise_dequant.dtype(Tensor A, Tensor stats, ScalarType dtype) -> Tensor",
    # By rows and by columns at once
    "int8_double_quant(Tensor A, float threshold=0.0) -> (Tensor, Tensor, Tensor, Tensor, Tensor?)",
    "int8_linear_matmul(Tensor A, Tensor B) -> Tensor",
    "int8_linear_matmul.out(Tensor A, Tensor B, Tensor(a!) out) -> ()",
    "int8_mm_dequant(Tensor A, Tensor row_stats, Tensor col_stats, ScalarType? dtype=None, "
    "Tensor? bias=None) -> Tensor",
    "int8_scaled_mm(Tensor A, Tensor B, Tensor row_stats, Tensor col_stats, Tensor? bias=None, "
    "ScalarType? dtype=None) -> Tensor",
    # The layer: quantizes the rows of A. The second result is the mask of outlier columns.
    "int8_linear(Tensor A, Tensor CB, Tensor SCB, Tensor? bias=None, float threshold=0.0) "
    "-> (Tensor, Tensor?)",
    # grad times the weight, which is rounded to the dtype of grad
    "int8_linear_dgrad(Tensor grad, Tensor CB, Tensor SCB) -> Tensor",
    "int8_mixed_scaled_mm(Tensor A, Tensor CA, Tensor CB, Tensor SCA, Tensor SCB, "
    "Tensor? outlier_cols=None, Tensor? bias=None) -> (Tensor, Tensor?)",
    # Optimizers: one call for a whole list of parameters
    "optimizer_step_32bit(str rule, Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] state1, "
    f"Tensor(c!)[] state2, {_STEP}) -> ()",
    "optimizer_step_8bit_blockwise(str rule, Tensor(a!)[] params, Tensor[] grads, "
    "Tensor(b!)[] state1, Tensor(c!)[] state2, Tensor(d!)[] absmax1, Tensor(e!)[] absmax2, "
    f"Tensor qmap1, Tensor? qmap2, {_STEP}) -> ()",
    "optimizer_step_8bit(str rule, Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] state1, "
    "Tensor(c!)[] state2, Tensor max1, Tensor? max2, Tensor(d!) new_max1, Tensor(e!)? new_max2, "
    f"Tensor qmap1, Tensor? qmap2, {_STEP}) -> ()",
    # Sums of squares [2, count] of parameters and of their updates, which a step would bound. Parts
    # of one tensor add theirs up and pass `update_scales` to the step instead of `max_unorm`.
    "optimizer_preview_32bit(str rule, Tensor[] params, Tensor[] grads, Tensor[] state1, "
    f"Tensor[] state2, {_PREVIEW}) -> Tensor",
    "optimizer_preview_8bit_blockwise(str rule, Tensor[] params, Tensor[] grads, Tensor[] state1, "
    "Tensor[] state2, Tensor[] absmax1, Tensor[] absmax2, Tensor qmap1, Tensor? qmap2, "
    f"{_PREVIEW}) -> Tensor",
    "optimizer_preview_8bit(str rule, Tensor[] params, Tensor[] grads, Tensor[] state1, "
    "Tensor[] state2, Tensor max1, Tensor? max2, Tensor qmap1, Tensor? qmap2, "
    f"{_PREVIEW}) -> Tensor",
    # Gradient norms [count], clip values [count], factors [count] of adaptive clipping
    "percentile_clipping_step(Tensor[] grads, Tensor(a!)[] gnorm_vec, Tensor step, int percentile) "
    "-> Tensor",
    # The public package's own: one parameter per call
    "optimizer_update_32bit(str optimizer_name, Tensor(a0!) g, Tensor(a1!) p, Tensor(a2!) state1, "
    "Tensor(a3!)? state2, Tensor(a4!)? unorm_vec, float max_unorm, float param_norm, float beta1, "
    "float beta2, float beta3, float alpha, float eps, float weight_decay, int step, float lr, "
    "float gnorm_scale, bool skip_zeros=False) -> ()",
    "optimizer_update_8bit_blockwise(str optimizer_name, Tensor(a0!) g, Tensor(a1!) p, "
    "Tensor(a2!) state1, Tensor(a3!)? state2, float beta1, float beta2, float beta3, float alpha, "
    "float eps, int step, float lr, Tensor(a4!) qmap1, Tensor(a5!)? qmap2, Tensor(a6!) absmax1, "
    "Tensor(a7!)? absmax2, float weight_decay, float gnorm_scale, bool skip_zeros=False) -> ()",
)

# Gives a native library the tensors of a plan to hold (optim/plan.py). It computes nothing, exists
# where there are native kernels only, and is never called where a tracer looks on.
_PLAN_SCHEMA = (
    "_optimizer_plan(str rule, Tensor[] params, Tensor[] state1, Tensor[] state2, "
    "Tensor[] absmax1, Tensor[] absmax2, Tensor? qmap1, Tensor? qmap2, Tensor? max1, Tensor? max2, "
    "Tensor? new_max1, Tensor? new_max2, Tensor step, Tensor tickets, Tensor[] gnorm_vec, "
    "bool watched=True) -> int"
)

# Products that native libraries leave to plain PyTorch where it is faster. Never called otherwise.
_PLAIN_SCHEMAS = tuple(
    "_" + schema.replace("(", "_plain(", 1)
    for schema in SCHEMAS
    if schema.startswith(("gemm_4bit", "grouped_gemm_4bit"))
)

_definitions = torch.library.Library(NAMESPACE, "DEF")
for _schema in (*SCHEMAS, *_PLAIN_SCHEMAS, _PLAN_SCHEMA):
    _definitions.define(_schema)


def register_fake(name: str):
    """Returns a decorator that registers the shape rule of op `name` for tracing."""
    return torch.library.register_fake(f"{NAMESPACE}::{_own(name)}", lib=_definitions)


def register_kernel(name: str, device: str):
    """Returns a decorator that registers a kernel of op `name` for one dispatch key.

    Args:
        name: Op and overload, such as ``"quantize_blockwise"`` or ``"dequantize_blockwise.out"``;
            ``"bitsandbytes::"`` may stand before it, as packages with backends write it.
        device: A device type (``"cpu"``, ``"cuda"`` ...) or ``"default"`` for the implementation
            that serves every device without a kernel of its own.
    """
    special = {"default": "CompositeExplicitAutograd", "privateuseone": "PrivateUse1"}
    key = special.get(device, device.upper())

    def register(function):
        _definitions.impl(_own(name), function, key)
        return function

    return register


def _own(name: str) -> str:
    return name.removeprefix(f"{NAMESPACE}::")


from . import _fake, plain  # noqa: E402, F401  (they register themselves with the names above)

_library.load()
