# SPDX-License-Identifier: MIT
"""The int8 parameter: when it quantizes, and what survives moves and copies."""

import copy
import inspect
import io
import pickle

import pytest
import torch
from torch import nn

import bitsandbytes as bnb
from bitsandbytes.functional import int8_vectorwise_quant
from bitsandbytes.nn import Int8Params


def make(rows=4, columns=8, **kwargs):
    return Int8Params(torch.randn(rows, columns), **{"requires_grad": False, **kwargs})


def assert_quantized(param, weight):
    codes, stats, _ = int8_vectorwise_quant(weight)
    assert type(param) is Int8Params and isinstance(param, nn.Parameter)
    assert torch.equal(param.data.cpu(), codes.cpu())
    assert torch.equal(param.SCB.cpu(), stats.cpu())
    assert param.SCB.device == param.device == param.CB.device
    assert param.CB.data_ptr() == param.data_ptr()
    assert param.requires_grad is False


def test_constructor():
    parameters = list(inspect.signature(Int8Params.__new__).parameters.values())[1:]
    names = ["data", "requires_grad", "has_fp16_weights", "CB", "SCB"]
    assert [p.name for p in parameters[:5]] == names
    assert [p.default for p in parameters[:5]] == [None, True, False, None, None]
    assert parameters[5].kind is inspect.Parameter.VAR_KEYWORD
    param = make()
    assert param.__dict__ == {"CB": None, "SCB": None, "has_fp16_weights": False}
    assert Int8Params().numel() == 0
    assert bnb.nn.modules.Int8Params is Int8Params


def test_instance_dict_rebuilds_the_parameter():
    param = make()
    weight = param.data.clone()
    param = param.to("cpu")
    other = Int8Params(param.data, requires_grad=False, **param.__dict__, _is_hf_initialized=True)
    assert_quantized(other, weight)
    assert other.__dict__.keys() == {"CB", "SCB", "has_fp16_weights"}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_move_quantizes_in_place(device, dtype):
    param = make().to(dtype)
    assert type(param) is Int8Params and param.dtype == dtype
    weight = param.data.clone()
    assert param.to(device) is param
    assert param.device.type == device
    assert_quantized(param, weight.float() if dtype == torch.float64 else weight)


@pytest.mark.parametrize(
    "move",
    [
        lambda p: p.to("cpu"),
        lambda p: p.to(device="cpu"),
        lambda p: p.to("cpu", torch.float16),
        lambda p: p.to(torch.empty(0)),
        lambda p: p.cpu(),
    ],
)
def test_every_way_to_the_cpu_quantizes(move):
    param = make()
    weight = param.data.clone()
    assert move(param) is param
    assert_quantized(param, weight)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_quantizes_what_comes_from_the_cpu():
    for move in (
        lambda p: p.cuda(),
        lambda p: p.cuda(0),
        lambda p: p.to(0),
        lambda p: p.to("cuda"),
    ):
        param = make()
        weight = param.data.clone()
        assert move(param) is param
        assert_quantized(param, weight)
        back = param.cpu()
        assert back.device.type == "cpu"
        assert_quantized(back, weight)
    there = Int8Params(torch.randn(2, 3, device="cuda"), requires_grad=False)
    assert there.to("cuda").is_floating_point()
    assert there.cpu().is_floating_point()


def test_weights_beyond_float16_keep_their_statistics(device):
    param = Int8Params(torch.tensor([[1e6, 0.0], [0.0, 0.0]]), requires_grad=False).to(device)
    assert param.SCB.tolist() == [1e6, 0.0]
    assert param.tolist() == [[127, 0], [0, 0]]


def test_float_weights_only_move(device):
    param = make(has_fp16_weights=True, requires_grad=True)
    moved = param.to(device)
    assert type(moved) is Int8Params and moved.has_fp16_weights and moved.requires_grad
    assert torch.equal(moved.data.cpu(), param.data)
    assert moved.CB is None and moved.SCB is None
    half = make().to(torch.float16)
    assert type(half) is Int8Params and half.dtype == torch.float16 and half.SCB is None


def test_cast_of_a_trained_weight_stays_in_the_graph():
    param = make(has_fp16_weights=True, requires_grad=True)
    param.to(torch.float64).sum().backward()
    assert torch.equal(param.grad, torch.ones_like(param))


def test_moving_codes_again(device):
    param = make()
    weight = param.data.clone()
    param = param.to(device)
    again = param.to("cpu")
    assert again is not param
    assert_quantized(again, weight)
    codes_only = Int8Params(param.data, requires_grad=False).to(device)
    assert codes_only.CB is not None and codes_only.SCB is None


def test_codes_with_statistics_become_ready_by_a_move(device):
    codes, stats, _ = int8_vectorwise_quant(torch.randn(4, 8))
    param = Int8Params(codes, requires_grad=False, SCB=stats).to(device)
    assert torch.equal(param.CB.cpu(), codes) and torch.equal(param.SCB.cpu(), stats)
    assert param.SCB.device.type == device


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int32])
def test_a_cast_leaves_codes_alone(dtype):
    param = make().to("cpu")
    codes = param.data.clone()
    for cast in (param.to(dtype), param.to("cpu", dtype)):
        assert cast.dtype == torch.int8
        assert torch.equal(cast.data, codes)
        assert cast.SCB is not None


def test_meta():
    param = make().to("meta")
    assert type(param) is Int8Params and param.is_meta and param.is_floating_point()
    quantized = make().to("cpu").to("meta")
    assert quantized.is_meta and quantized.dtype == torch.int8
    assert quantized.SCB.is_meta and quantized.CB.is_meta


def test_statistics_without_values_are_not_invented():
    codes, stats, _ = int8_vectorwise_quant(torch.randn(4, 8))
    param = Int8Params(codes, requires_grad=False, SCB=stats.to("meta")).to("cpu")
    assert param.device.type == "cpu" and param.SCB.is_meta


def test_unquantizable_weights_get_a_sentence():
    with pytest.raises(RuntimeError, match="requires_grad=True cannot become int8"):
        make(requires_grad=True).to("cpu")
    param = Int8Params(torch.randn(2, 3, 4), requires_grad=False)
    with pytest.raises(ValueError, match=r"the weight must be a matrix, got shape \[2, 3, 4\]"):
        param.to("cpu")
    assert param.shape == (2, 3, 4) and param.SCB is None
    with pytest.raises(ValueError, match="the weight must be floating point or int8"):
        Int8Params(torch.zeros(2, 3, dtype=torch.int64), requires_grad=False).to("cpu")


def by_torch_save(param):
    file = io.BytesIO()
    torch.save(param, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda param: pickle.loads(pickle.dumps(param)),
    "torch.save": by_torch_save,
}


@pytest.mark.parametrize("how", COPIES)
def test_copies_keep_class_and_statistics(device, how):
    param = make()
    weight = param.data.clone()
    param = param.to(device)
    param.note = "kept"
    other = COPIES[how](param)
    assert_quantized(other, weight)
    assert other.note == "kept" and not other.has_fp16_weights
    assert (other.data_ptr() == param.data_ptr()) == (how == "copy")
    assert (other.SCB.data_ptr() == param.SCB.data_ptr()) == (how == "copy")
    assert_quantized(param, weight)


@pytest.mark.parametrize("how", COPIES)
def test_copies_of_unquantized_weights(how):
    param = make(has_fp16_weights=True, requires_grad=True)
    other = COPIES[how](param)
    assert type(other) is Int8Params and other.has_fp16_weights and other.requires_grad
    assert torch.equal(other, param) and other.CB is None and other.SCB is None


def test_deepcopy_of_a_container_copies_once():
    param = make().to("cpu")
    first, second, codes = copy.deepcopy([param, param, param.CB])
    assert first is second and first is not param
    assert codes.data_ptr() == first.data_ptr()


def test_operations_return_plain_tensors():
    param = make().to("cpu")
    results = [param.detach(), param.clone(), param.t(), param[1:], param.view(-1), param.data]
    results += [*torch.chunk(param, 2), *torch.split(param, 2), torch.empty_like(param)]
    assert all(type(result) is torch.Tensor for result in results)
