# SPDX-License-Identifier: MIT
"""The 4-bit linear layers: forward, compute dtypes, moves, copies, recovery, compilation."""

import copy
import inspect
import io
import logging
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import bitsandbytes as bnb
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit, LinearFP4, LinearNF4, Params4bit
from reference.gemm4 import weight_rounding
from reference.linear import closeness

LOGGER = "bitsandbytes.nn.modules"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
STORAGES = [torch.uint8, torch.float16, torch.bfloat16, torch.float32]


def make(cls=LinearNF4, **settings):
    """An unquantized layer of 64 inputs and 96 outputs."""
    return cls(64, 96, **settings)


def quantized(device="cpu", cls=LinearNF4, **settings):
    return make(cls, **settings).to(device)


def inputs(device="cpu", dtype=torch.float32, rows=5):
    return torch.randn(rows, 64, generator=torch.Generator().manual_seed(3)).to(device, dtype)


def values(layer):
    return dequantize_4bit(layer.weight.data, layer.weight.quant_state)


def assert_whole(layer, device):
    """The weight, its class and its state are together, on one device."""
    assert type(layer.weight) is Params4bit and layer.weight.bnb_quantized
    assert layer.weight.device.type == device == layer.quant_state.absmax.device.type
    assert layer.quant_state is layer.weight.quant_state
    assert layer._parameters["weight"] is layer.weight


# --- construction -------------------------------------------------------------------------------


def test_signatures():
    names = {
        "bias": True,
        "compute_dtype": None,
        "compress_statistics": True,
        "quant_type": "fp4",
        "quant_storage": torch.uint8,
        "device": None,
    }
    for cls in (Linear4bit, LinearFP4, LinearNF4):
        parameters = list(inspect.signature(cls).parameters.values())
        assert [p.name for p in parameters[:2]] == ["input_features", "output_features"]
        want = {k: v for k, v in names.items() if cls is Linear4bit or k != "quant_type"}
        assert {p.name: p.default for p in parameters[2:]} == want
        assert [p.name for p in parameters[2:]] == list(want)
        assert issubclass(cls, Linear4bit) and issubclass(cls, nn.Linear)
        assert getattr(bnb.nn.modules, cls.__name__) is cls
    assert LinearNF4(8, 8).weight.quant_type == "nf4"
    assert LinearFP4(8, 8).weight.quant_type == "fp4"


def test_a_new_layer():
    layer = Linear4bit(64, 96, compute_dtype=torch.bfloat16, quant_storage=torch.float16)
    assert repr(layer) == "Linear4bit(in_features=64, out_features=96, bias=True)"
    assert layer.weight.shape == (96, 64) and layer.weight.dtype == torch.float32
    assert not layer.weight.requires_grad and layer.bias.requires_grad
    assert layer.weight.module is layer and layer.weight.quant_storage == torch.float16
    assert layer.quant_state is None and layer.quant_storage == torch.float16
    assert layer.compute_dtype == torch.bfloat16 and layer.compute_type_is_set
    assert not make().compute_type_is_set and make().compute_dtype is None
    assert make(bias=False).bias is None
    assert not layer.support_avx512bf16_for_cpu
    torch.set_default_dtype(torch.float16)
    try:
        assert make().weight.dtype == torch.float16
    finally:
        torch.set_default_dtype(torch.float32)


# --- forward ------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("cls", [LinearFP4, LinearNF4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_is_the_product_with_the_dequantized_weight(device, gpu_kernels, dtype, cls, bias):
    layer = quantized(device, cls, bias=bias, compute_dtype=dtype)
    x = inputs(device, dtype)
    out = layer(x)
    assert out.dtype == dtype and out.requires_grad == bias
    # Kernels of a GPU round the weight in ways of their own.
    weight = values(layer).to(torch.float32 if gpu_kernels else dtype).cpu().double().numpy()
    exact = x.cpu().double().numpy()
    offset = layer.bias.detach().cpu().double().numpy() if bias else np.zeros(96)
    want = exact @ weight.T + offset
    significand = {torch.float32: 24, torch.float16: 11, torch.bfloat16: 8}[dtype]
    bound = closeness(significand, want, np.abs(exact) @ np.abs(weight.T), offset)
    if gpu_kernels:
        bound += weight_rounding(exact, weight.T, str(dtype).removeprefix("torch."))
    assert (np.abs(out.detach().cpu().double().numpy() - want) <= bound).all()


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("nested", [False, True])
def test_storages_give_the_same(device, nested, storage):
    torch.manual_seed(1)
    layer = quantized(device, compress_statistics=nested, quant_storage=storage)
    torch.manual_seed(1)
    other = quantized(device, compress_statistics=nested)
    assert layer.weight.dtype == storage
    assert torch.equal(layer(inputs(device)), other(inputs(device)))


@pytest.mark.parametrize("lead", [(), (1,), (2, 3), (2, 1, 2), (0,), (2, 0)])
def test_any_rank(device, lead):
    layer = quantized(device)
    x = torch.randn(*lead, 64, device=device, requires_grad=True)
    out = layer(x)
    assert out.shape == (*lead, 96)
    torch.testing.assert_close(out, F.linear(x, values(layer), layer.bias))
    out.sum().backward()
    torch.testing.assert_close(x.grad, values(layer).sum(0).expand(x.shape))
    assert layer.weight.grad is None


@pytest.mark.parametrize("features", [(1, 7), (33, 5), (100, 1), (65, 130)])
def test_any_size(device, features):
    layer = LinearNF4(*features).to(device).eval()
    x = torch.randn(3, features[0], device=device)
    torch.testing.assert_close(layer(x), F.linear(x, values(layer), layer.bias))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("nested", [False, True])
def test_forward_changes_no_weight(device, nested, training):
    layer = quantized(device, compress_statistics=nested).train(training)
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    pointer, state = layer.weight.data_ptr(), layer.quant_state
    with torch.no_grad():
        layer(inputs(device))
    layer(inputs(device, torch.bfloat16))
    assert layer.weight.data_ptr() == pointer and layer.quant_state is state
    after = layer.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert_whole(layer, device)


def test_gradients_after_an_evaluation(device):
    layer = quantized(device)
    grads = []
    for evaluate in (False, True):
        if evaluate:
            with torch.no_grad():
                layer.eval()(inputs(device))
            layer.train()
        x = inputs(device).requires_grad_()
        layer(x).square().sum().backward()
        grads.append(x.grad)
    assert torch.equal(*grads)


class LargestTensor(TorchDispatchMode):
    """Keeps the bytes of the largest tensor that an operation returned."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.bytes = max(self.bytes, tensor.nbytes)
        return result


@pytest.mark.parametrize("nested", [False, True])
def test_training_never_holds_a_dequantized_weight(device, nested):
    # Sums that several blocks of threads of a GPU share are few beside a weight that needs them.
    features, tokens = 4096 if device == "cuda" else 1024, 16
    layer = LinearNF4(
        features, features, compute_dtype=torch.bfloat16, compress_statistics=nested
    ).to(device)
    x = torch.randn(tokens, features, dtype=torch.bfloat16, device=device, requires_grad=True)
    layer(x).sum().backward()  # what is made once is there
    x.grad = None
    # Other GPUs leave the gradient of so many tokens to plain PyTorch.
    measured = device == "cuda" and torch.cuda.get_device_capability()[0] == 9
    if measured:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    with LargestTensor() as largest:
        layer(x).sum().backward()
    dequantized = features * features * x.element_size()
    assert largest.bytes <= layer.weight.nbytes < dequantized / 3
    if measured:  # what the operations took for themselves, too
        assert torch.cuda.max_memory_allocated() - before < dequantized / 3


def test_wrong_width_gets_a_sentence(device):
    with pytest.raises((ValueError, RuntimeError), match=r"64.*\[5, 63\]"):
        quantized(device)(inputs(device)[:, 1:])


# --- compute dtype ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "compute"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, None),
        (torch.float64, None),
    ],
)
def test_compute_dtype_of_the_first_input(device, first, compute):
    layer = quantized(device)
    out = layer(inputs(device, first))
    assert out.dtype == first and layer.compute_dtype == compute
    assert layer.bias.dtype == first
    want = F.linear(inputs(device, first), values(layer).to(first), layer.bias)
    tolerance = {torch.float16: 2e-3, torch.bfloat16: 2e-2}.get(first, 1e-5)
    torch.testing.assert_close(out, want, rtol=tolerance, atol=tolerance)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert layer(inputs(device, dtype)).dtype == dtype
        assert layer.compute_dtype == compute
        assert layer.bias.dtype == (compute or dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_explicit_compute_dtype(device, dtype, caplog):
    layer = quantized(device, compute_dtype=torch.bfloat16)
    x = inputs(device, dtype)
    out = layer(x)
    assert out.dtype == dtype and layer.bias.dtype == torch.bfloat16
    assert layer.compute_dtype == torch.bfloat16
    assert torch.equal(out, layer(x.bfloat16()).to(dtype)) and caplog.text == ""


def test_float16_without_compute_dtype_warns_once(caplog):
    layer = quantized()
    with caplog.at_level(logging.WARNING, LOGGER):
        layer(inputs(dtype=torch.float16))
        layer(inputs(dtype=torch.float16))
        assert len(caplog.records) == 1 and caplog.records[0].name == LOGGER
        assert "inference or training" in caplog.text
        caplog.clear()
        quantized()(inputs(dtype=torch.float16, rows=1))
        assert "inference." in caplog.text and "inference or training" not in caplog.text
        caplog.clear()
        for dtype in (torch.float32, torch.bfloat16):
            quantized()(inputs(dtype=dtype))
        assert caplog.text == ""


def test_bias_of_another_dtype_than_compute(device):
    layer = make(compute_dtype=torch.bfloat16)
    with torch.no_grad():
        layer.bias.fill_(1 + 2**-12)
    layer.to(device)
    layer(inputs(device)).sum().backward()
    assert layer.bias.dtype == layer.bias.grad.dtype == torch.bfloat16
    assert layer.bias.tolist() == [1.0] * 96 and layer.bias.grad.tolist() == [5.0] * 96


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.complex64])
@pytest.mark.parametrize("compute_dtype", [None, torch.bfloat16])
def test_a_refused_input_leaves_the_bias_alone(device, compute_dtype, dtype):
    layer = quantized(device, compute_dtype=compute_dtype).requires_grad_(False)
    bias = layer.bias.clone()
    with pytest.raises(ValueError, match=rf"^{type(layer).__name__}: x must be .*, got {dtype}"):
        layer(inputs(device).to(dtype))
    assert torch.equal(layer.bias.to(bias.dtype), bias.to(layer.bias.dtype).to(bias.dtype))
    assert layer.bias.dtype == (compute_dtype or bias.dtype)


def test_autocast_leaves_the_layer_alone(device):
    layer = quantized(device)
    with torch.autocast(device, torch.bfloat16):
        out = layer(inputs(device))
    assert out.dtype == torch.float32 and torch.equal(out, layer(inputs(device)))


# --- moving -------------------------------------------------------------------------------------


def test_moving_quantizes_once(device):
    layer = make()
    weight = layer.weight
    assert layer.to(device) is layer and layer.weight is weight
    assert_whole(layer, device)
    before = weight.data.clone()
    layer.to(device).to("cpu").to(device)
    assert layer.weight is weight and torch.equal(weight.data, before)
    assert_whole(layer, device)


def test_a_parent_quantizes_too(device):
    model = nn.Sequential(make(), nn.ReLU(), nn.Sequential(LinearFP4(96, 3))).to(device)
    assert_whole(model[0], device)
    assert_whole(model[2][0], device)
    assert model(inputs(device)).shape == (5, 3)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize(
    "cast",
    [
        lambda m: m.half(),
        lambda m: m.float(),
        lambda m: m.bfloat16(),
        lambda m: m.double(),
        lambda m: m.to(torch.float16),
        lambda m: m.to("cpu", torch.float16),
        lambda m: m.type(torch.float16),
        lambda m: m._apply(lambda t: t.to(torch.float16) if t.is_floating_point() else t),
        lambda m: m._apply(lambda t: t.detach().half() if t.is_floating_point() else t),
    ],
)
def test_casts_leave_the_packed_weight_alone(storage, cast):
    layer = quantized(quant_storage=storage)
    before, x = layer.weight.data.clone(), inputs()
    want = layer(x)
    model = cast(nn.Sequential(layer))
    assert layer.weight.dtype == storage
    assert torch.equal(layer.weight.data.view(torch.uint8), before.view(torch.uint8))
    assert_whole(layer, "cpu")
    torch.testing.assert_close(model.float()(x), want, atol=2e-2, rtol=0)


def test_casts_of_an_unquantized_layer(device):
    layer = make().half()
    assert type(layer.weight) is Params4bit and layer.weight.dtype == torch.float16
    layer.to(device)
    assert layer.weight.quant_state.dtype == torch.float16
    assert_whole(layer, device)
    layer = make().to(device, torch.bfloat16)  # quantized before it is cast
    assert layer.weight.quant_state.dtype == torch.float32 and layer.bias.dtype == torch.bfloat16


def test_meta_to_device(device):
    layer = make(device="meta")
    assert type(layer.weight) is Params4bit and layer.weight.is_meta
    with pytest.raises(NotImplementedError, match="meta"):
        layer.to("cpu")
    layer = make(device="meta").to_empty(device=device)
    assert type(layer.weight) is Params4bit and not layer.weight.bnb_quantized
    source = nn.Linear(64, 96)
    layer.load_state_dict(source.state_dict())
    layer.to(device)
    want = make()
    want.load_state_dict(source.state_dict())
    assert torch.equal(layer(inputs(device)), want.to(device)(inputs(device)))


@pytest.mark.parametrize("nested", [False, True])
def test_quantized_to_meta_and_back(device, nested):
    layer = quantized(device, compress_statistics=nested)
    want, saved = layer(inputs(device)), layer.state_dict()
    layer.to("meta")
    assert type(layer.weight) is Params4bit and layer.weight.is_meta and layer.bias.is_meta
    assert layer.quant_state is layer.weight.quant_state and layer.quant_state.absmax.is_meta
    layer.to_empty(device=device)
    assert_whole(layer, device)
    layer.load_state_dict(saved)
    assert torch.equal(layer(inputs(device)), want)


def test_to_empty_of_a_quantized_layer(device):
    layer = quantized(device)
    saved, want = copy.deepcopy(layer.state_dict()), layer(inputs(device))
    layer.to_empty(device=device)
    assert_whole(layer, device)
    layer.load_state_dict(saved)
    assert torch.equal(layer(inputs(device)), want)


def test_memory_can_be_shared():
    layer = quantized().share_memory()
    assert layer.weight.is_shared() and type(layer.weight) is Params4bit


def test_requires_grad():
    layer = quantized()
    assert layer.requires_grad_(False) is layer and not layer.bias.requires_grad
    with pytest.raises(RuntimeError):
        layer.requires_grad_(True)


# --- copies and shared weights ------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["float", "quantized", "used"])
def test_copies(device, stage):
    layer = make() if stage == "float" else quantized(device)
    if stage == "used":
        layer(inputs(device))
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    copies = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))]
    copies += [torch.load(buffer, weights_only=False)]
    layer.to(device)
    want = layer(inputs(device))
    for other in copies:
        assert other.weight.module is other and other.weight is not layer.weight
        other.to(device)
        assert_whole(other, device)
        assert other.quant_state is not layer.quant_state
        assert torch.equal(other(inputs(device)), want)


@pytest.mark.parametrize("as_list", [False, True])
def test_layers_pickled_by_other_releases(device, as_list):
    source = quantized(compress_statistics=True)
    want, saved = source(inputs()), source.state_dict()
    layer = copy.deepcopy(source)
    # The public package pickles a plain parameter with attributes; older ones have fewer.
    weight = nn.Parameter(layer.weight.data, requires_grad=False)
    state = list(source.quant_state) if as_list else source.quant_state
    weight.__dict__.update(source.weight.__dict__, module=None, quant_state=state)
    layer._parameters["weight"] = weight
    for name in ("quant_state", "quant_storage", "compute_type_is_set") if as_list else ():
        del layer.__dict__[name]
    if not as_list:
        layer.quant_state = state
    loaded = pickle.loads(pickle.dumps(layer))
    assert type(loaded.weight) is Params4bit and loaded.weight.quant_type == "nf4"
    assert torch.equal(loaded(inputs()), want)
    assert set(loaded.state_dict()) == set(saved)
    loaded.to(device)
    assert_whole(loaded, device)


def test_tied_weights(device):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = LinearNF4(64, 64), LinearNF4(64, 64)
            self.second.weight = self.first.weight

        def forward(self, x):
            return self.second(self.first(x))

    model = Tied().to(device)
    assert model.first.weight is model.second.weight
    x = inputs(device)
    first = F.linear(x, values(model.first), model.first.bias)
    want = F.linear(first, values(model.first), model.second.bias)
    torch.testing.assert_close(model(x), want)
    out, saved = model(x), copy.deepcopy(model.state_dict())
    copied = copy.deepcopy(model)
    assert copied.first.weight is copied.second.weight
    for fresh in (copied, Tied(), Tied().to(device)):
        fresh.load_state_dict(saved)
        fresh.to(device)
        assert fresh.first.weight is fresh.second.weight
        assert torch.equal(fresh(x), out)


# --- lost states --------------------------------------------------------------------------------


def test_an_unquantized_layer_says_so(caplog):
    layer = make()
    with (
        caplog.at_level(logging.WARNING, LOGGER),
        pytest.raises(RuntimeError, match=r"^LinearNF4: quantization state not initialized"),
    ):
        layer(inputs())
    assert "quantization state not initialized" in caplog.text
    assert not layer.weight.bnb_quantized and layer.weight.shape == (96, 64)


def test_a_lost_state_is_recovered(device):
    for cls in (LinearNF4, LinearFP4):
        layer = quantized(device, cls, quant_storage=torch.bfloat16)
        want, state = layer(inputs(device)), layer.quant_state
        layer.weight.quant_state = None
        assert torch.equal(layer(inputs(device)), want)
        assert layer.weight.quant_state is state
        layer.weight = nn.Parameter(layer.weight.data, requires_grad=False)
        assert torch.equal(layer(inputs(device)), want)
        assert_whole(layer, device)
        assert layer.weight.quant_type == state.quant_type
        assert layer.weight.quant_storage == torch.bfloat16
        saved = layer.state_dict()
        layer.weight = nn.Parameter(layer.weight.data, requires_grad=False)
        again = layer.state_dict()
        assert list(again) == list(saved)
        # As bytes: what is stored as bfloat16 may be NaN.
        assert all(again[k].view(torch.uint8).equal(saved[k].view(torch.uint8)) for k in saved)


def test_a_state_that_was_left_behind_follows(device):
    layer = quantized(device, compress_statistics=True)
    want = layer(inputs(device))
    layer.quant_state.to("cpu")
    assert torch.equal(layer(inputs(device)), want)
    assert_whole(layer, device)


def test_a_state_is_not_given_to_another_weight(device):
    layer = quantized(device)
    for weight in (torch.randn(96, 64), torch.zeros(10, 1, dtype=torch.uint8)):
        layer.weight = nn.Parameter(weight.to(device), requires_grad=False)
        with pytest.raises(RuntimeError, match="quantization state not initialized"):
            layer(inputs(device))
        assert list(layer.state_dict()) == ["weight", "bias"]


def test_a_replaced_weight_is_used(device):
    layer, other = quantized(device), quantized(device, LinearFP4, bias=False)
    layer.bias = None
    layer.weight = Params4bit(other.weight.data, **other.weight.__dict__)
    assert torch.equal(layer(inputs(device)), other(inputs(device)))
    assert layer.quant_state is other.quant_state


def test_tensors_in_place_of_parameters_are_used(device):
    layer = quantized(device)
    x = inputs(device)
    want = layer(x)
    # What FSDP does: attributes that hide nothing, since the parameters are gone.
    weight, bias = layer.weight.data, layer.bias.data + 1
    del layer.weight, layer.bias
    layer.weight, layer.bias = weight, bias
    torch.testing.assert_close(layer(x), want + 1)


# --- torch.compile ------------------------------------------------------------------------------


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("mode", ["inference", "training", "checkpointing"])
def test_compiles_into_one_graph(device, mode, nested, compile_fresh):
    model = nn.Sequential(
        *(LinearNF4(64, 64, compute_dtype=torch.float32, compress_statistics=nested) for _ in "12")
    ).to(device)

    def run(x):
        if mode == "checkpointing":
            return checkpoint(model, x, use_reentrant=False)
        return model(x)

    results = []
    for function in (run, compile_fresh(run, fullgraph=True, backend="aot_eager")):
        x = inputs(device).requires_grad_(mode != "inference")
        with torch.set_grad_enabled(mode != "inference"):
            out = function(x)
        results.append([out])
        if mode != "inference":
            out.square().sum().backward()
            results[-1] += [x.grad, model[0].bias.grad.clone()]
            model.zero_grad()
    for eager, traced in zip(*results, strict=True):
        torch.testing.assert_close(traced, eager)
    assert_whole(model[0], device)


def test_compiles_without_a_compute_dtype(device, compile_fresh):
    for dtype in DTYPES:
        layer = quantized(device, bias=False)
        want = copy.deepcopy(layer)(inputs(device, dtype))
        compiled = compile_fresh(layer, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(inputs(device, dtype)), want)
        assert layer.compute_dtype == (None if dtype == torch.float16 else dtype)


def test_compiles_without_the_class_of_the_weight(device, compile_fresh):
    layer = quantized(device, compute_dtype=torch.float32)
    want = layer(inputs(device))
    layer.weight = nn.Parameter(layer.weight.data, requires_grad=False)
    compiled = compile_fresh(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(inputs(device)), want)
