# SPDX-License-Identifier: MIT
"""The product with an int8 weight, its gradients, and what it keeps between calls."""

import copy
import pickle
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import bitsandbytes as bnb
from bitsandbytes.autograd import _functions
from bitsandbytes.autograd.matmul import GlobalOutlierPooler
from bitsandbytes.functional import int8_vectorwise_dequant, int8_vectorwise_quant
from reference import linear as reference

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Bits of the significand; one rounding is an error of 2^-bits.
SIGNIFICAND = {torch.float64: 24, torch.float32: 24, torch.float16: 11, torch.bfloat16: 8}


def numpy(tensor):
    return tensor.detach().cpu().double().numpy()


def frozen(weight, training=False, threshold=0.0):
    """A state whose weight is int8 for good."""
    state = bnb.MatmulLtState()
    state.CB, state.SCB, _ = int8_vectorwise_quant(weight)
    state.has_fp16_weights, state.is_training, state.threshold = False, training, threshold
    return state


def dense(state, dtype):
    return int8_vectorwise_dequant(state.CB, state.SCB).to(dtype)


def assert_near(actual, expected, dtype, roundings, *terms):
    """Compares within a number of roundings, in dtype, of numbers as large as the terms."""
    assert actual.dtype == dtype
    bound = sum(np.abs(term) for term in terms) * roundings * 2.0 ** -SIGNIFICAND[dtype] + 2.0**-24
    assert (np.abs(numpy(actual) - expected) <= bound).all()


# --- forward ------------------------------------------------------------------------------------


@pytest.mark.parametrize("threshold", [0.0, 4.0])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES])
def test_int8_product_matches_specification(device, dtype, with_bias, threshold):
    a = torch.randn(19, 70, device=device).to(dtype)
    a[3, 11] = -30
    weight = torch.randn(23, 70, device=device)
    bias = torch.randn(23, device=device).to(dtype) if with_bias else None
    state = frozen(weight, threshold=threshold)
    out = bnb.matmul(a, weight, state=state, bias=bias)
    codes, stats = state.CB.cpu().numpy(), numpy(state.SCB)
    shift = numpy(bias) if with_bias else np.zeros(23)
    expected = reference.linear(numpy(a), codes, stats, shift, threshold)
    _, _, columns = reference.quantize(numpy(a), threshold)
    columns = [] if columns is None else columns
    outlier_values = reference.dequantize(codes, stats)[:, columns].T
    rest = expected - shift - numpy(a)[:, columns] @ outlier_values
    outlier_term = np.abs(numpy(a)[:, columns]) @ np.abs(outlier_values)
    bound = reference.closeness(SIGNIFICAND[dtype], expected, rest, outlier_term, shift)
    assert out.dtype == dtype
    assert (np.abs(numpy(out) - expected) <= bound).all()
    assert (state.idx is None) == (threshold == 0)
    if threshold:
        assert state.idx.dtype == torch.int64
        np.testing.assert_array_equal(state.idx.cpu().numpy(), columns)
        assert 11 in columns


def test_activations_are_quantized_on_the_int8_path_only():
    a = torch.tensor([[1.0, 0.003]])
    weight = torch.eye(2)
    assert bnb.matmul(a, weight, state=frozen(weight))[0, 1] == 0
    training = bnb.matmul(a, weight, state=frozen(weight, training=True))
    torch.testing.assert_close(training, a)


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES])
def test_training_on_the_cpu_uses_the_dequantized_weight(dtype):
    a, weight = torch.randn(5, 33).to(dtype), torch.randn(7, 33)
    bias = torch.randn(7)
    state = frozen(weight, training=True, threshold=1.0)
    out = bnb.matmul(a, weight, state=state, bias=bias)
    assert torch.equal(out, F.linear(a, dense(state, dtype), bias.to(dtype)))
    assert state.idx is None


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("lead", [(), (1,), (3,), (2, 3), (2, 1, 3)])
def test_any_rank(device, lead, training):
    a = torch.randn(*lead, 24, device=device, requires_grad=True)
    weight, bias = torch.randn(5, 24, device=device), torch.randn(5, device=device)
    bias.requires_grad_()
    state = frozen(weight, training, threshold=2.0)
    out = bnb.matmul(a, weight, state=state, bias=bias)
    flat = bnb.matmul(a.reshape(-1, 24), weight, state=state, bias=bias)
    assert out.shape == (*lead, 5)
    torch.testing.assert_close(out.reshape(-1, 5), flat)
    out.sum().backward()
    torch.testing.assert_close(a.grad, dense(state, torch.float32).sum(0).expand(a.shape))
    torch.testing.assert_close(bias.grad, torch.full_like(bias, flat.shape[0]))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    ("shape", "outputs"), [((0, 8), 5), ((2, 0, 8), 5), ((3, 0), 5), ((3, 8), 0)]
)
def test_empty(device, shape, outputs, training):
    a = torch.randn(shape, device=device, requires_grad=True)
    weight = torch.randn(outputs, shape[-1], device=device)
    bias = torch.randn(outputs, device=device, requires_grad=True)
    state = frozen(weight, training, threshold=0.0)
    out = bnb.matmul(a, weight, state=state, bias=bias)
    torch.testing.assert_close(out, bias.expand(*shape[:-1], outputs))
    out.sum().backward()
    assert torch.equal(a.grad, torch.zeros_like(a))
    torch.testing.assert_close(bias.grad, torch.full_like(bias, out.numel() // max(outputs, 1)))


@pytest.mark.parametrize("training", [False, True])
def test_transposed_operands(device, training):
    a, weight = torch.randn(24, 6, device=device).t(), torch.randn(24, 5, device=device).t()
    state = bnb.MatmulLtState()
    state.is_training = training
    out = bnb.matmul(a, weight, state=state)
    same = bnb.matmul(a.contiguous(), weight.contiguous(), state=state)
    torch.testing.assert_close(out, same)


def test_values_beyond_float16(device):
    a = torch.full((2, 8), 1e6, device=device, dtype=torch.bfloat16)
    weight = torch.full((3, 8), 1e6, device=device)
    out = bnb.matmul(a, weight, state=frozen(weight))
    torch.testing.assert_close(out, torch.full_like(out, 8e12), rtol=2**-7, atol=0)


def test_nan_shows(device):
    a = torch.randn(3, 8, device=device)
    a[1, 2] = float("nan")
    weight = torch.randn(4, 8, device=device)
    for threshold in (0.0, 6.0):
        out = bnb.matmul(a, weight, state=frozen(weight, threshold=threshold))
        assert out.isnan().all(1).tolist() == [False, True, False]
        assert out[[0, 2]].isfinite().all()


def test_out(device):
    a, weight = torch.randn(3, 8, device=device), torch.randn(4, 8, device=device)
    out = torch.empty(3, 4, device=device)
    assert bnb.matmul(a, weight, out, frozen(weight)) is out
    assert torch.equal(out, bnb.matmul(a, weight, state=frozen(weight)))


@pytest.mark.parametrize("training", [False, True])
def test_bias_of_another_shape(device, training):
    a, weight = torch.randn(3, 8, device=device), torch.randn(4, 8, device=device)
    for shape in ((1,), (3,), (3, 4), ()):
        with pytest.raises((ValueError, RuntimeError), match=r"bias must "):
            bnb.matmul(a, weight, state=frozen(weight, training), bias=a.new_zeros(shape))


def test_public_name_of_the_function(device):
    A, B, bias = (torch.randn(n, device=device) for n in ((3, 16), (5, 16), (5,)))
    out, state = torch.empty(3, 5, device=device), bnb.MatmulLtState()
    assert _functions.MatMul8bitLt.apply(A, B, out, bias, state) is out
    assert torch.equal(out, bnb.matmul(A, B, bias=bias)) and state.CB.shape == B.shape


def test_default_state_is_that_of_a_trained_weight(device):
    a, weight = torch.randn(3, 8, device=device), torch.randn(4, 8, device=device)
    out = bnb.matmul(a, weight, threshold=6.0)
    torch.testing.assert_close(out, F.linear(a, weight), atol=0.1, rtol=0.02)


# --- gradients ----------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("threshold", [0.0, 2.5])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_match_specification(device, dtype, threshold, training):
    a = torch.randn(6, 40, device=device).to(dtype).requires_grad_()
    weight = torch.randn(9, 40, device=device).to(dtype).requires_grad_()
    bias = torch.randn(9, device=device, requires_grad=True)
    state = bnb.MatmulLtState()
    state.is_training = training
    out = bnb.matmul(a, weight, state=state, threshold=threshold, bias=bias)
    assert out.dtype == dtype
    grad = torch.randn_like(out)
    out.backward(grad)

    codes, stats = state.CB.cpu().numpy(), numpy(state.SCB)
    want_a, want_weight, want_bias = reference.gradients(numpy(grad), numpy(a), codes, stats)
    size_a = np.abs(numpy(grad)) @ np.abs(reference.dequantize(codes, stats))
    size_weight = np.abs(numpy(grad)).T @ np.abs(numpy(a))
    # The dequantized weight and the result are rounded to dtype, sums are made in float32.
    sums = 40 * 2.0 ** (SIGNIFICAND[dtype] - 24)
    assert_near(a.grad, want_a, dtype, 2 + sums, size_a)
    assert_near(weight.grad, want_weight, dtype, 1 + sums, size_weight)
    assert_near(bias.grad, want_bias, torch.float32, 40, np.abs(numpy(grad)).sum(0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("n", "k", "rows"),
    [
        # Rows and columns that fill no tile, and no multiple of what a copy takes.
        (72, 80, (1, 20, 40)),
        (264, 272, (64, 100, 300)),
        (9, 64, (40,)),
        (72, 72, (40,)),
        # Tiles that two, four and eight blocks of threads of 132 share evenly.
        (264, 4096, (50, 100, 256, 500)),
    ],
)
def test_gradient_in_tiles(device, n, k, rows, dtype):
    weight = torch.randn(n, k, device=device)
    codes, stats, _ = int8_vectorwise_quant(weight)
    values = reference.dequantize(codes.cpu().numpy(), numpy(stats))
    for m in rows:
        grad = torch.randn(m, n, device=device).to(dtype)
        result = torch.ops.bitsandbytes.int8_linear_dgrad(grad, codes, stats)
        sums = n * 2.0 ** (SIGNIFICAND[dtype] - 24)
        size = np.abs(numpy(grad)) @ np.abs(values)
        assert_near(result, numpy(grad) @ values, dtype, 2 + sums, size)
        assert torch.equal(result, torch.ops.bitsandbytes.int8_linear_dgrad(grad, codes, stats))


def test_a_gradient_without_a_value_is_none(device):
    class Stop(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return None

    a = torch.randn(3, 8, device=device, requires_grad=True)
    state = frozen(torch.randn(4, 8, device=device), threshold=2.0)
    Stop.apply(bnb.matmul(a, state.CB, state=state)).sum().backward()
    assert a.grad is None


def test_gradcheck():
    weight = torch.randn(4, 6)
    state = frozen(weight, training=True)
    a = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(4, dtype=torch.float64, requires_grad=True)

    def product(a, bias):
        return bnb.matmul(a, weight, state=state, bias=bias)

    assert torch.autograd.gradcheck(product, (a, bias))
    assert torch.autograd.gradgradcheck(product, (a, bias))


@pytest.mark.parametrize("training", [False, True])
def test_only_wanted_gradients(device, training):
    a, weight = torch.randn(3, 8, device=device), torch.randn(4, 8, device=device)
    bias = torch.randn(4, device=device, requires_grad=True)
    state = frozen(weight, training)
    bnb.matmul(a, weight, state=state, bias=bias).sum().backward()
    assert a.grad is None and weight.grad is None
    assert bias.grad.tolist() == [3.0] * 4
    assert bnb.matmul(a, weight, state=state).grad_fn is None
    with torch.no_grad():
        assert bnb.matmul(a, weight, state=state, bias=bias).grad_fn is None


@pytest.mark.parametrize("training", [False, True])
def test_a_frozen_weight_keeps_no_activations(device, training):
    a = torch.randn(64, 8, device=device, requires_grad=True)
    weight = torch.randn(4, 8, device=device)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.append(t.shape) or t, lambda t: t
    ):
        bnb.matmul(a, weight, state=frozen(weight, training)).sum().backward()
    assert sorted(saved) == [(4,), (4, 8)]
    assert a.grad is not None


@pytest.mark.parametrize("training", [False, True])
def test_autocast(device, training):
    a = torch.randn(5, 16, device=device, requires_grad=True)
    weight = torch.randn(4, 16, device=device)
    bias = torch.randn(4, device=device, requires_grad=True)
    state = frozen(weight, training)
    with torch.autocast(device, torch.bfloat16):
        out = bnb.matmul(a, weight, state=state, bias=bias)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, bnb.matmul(a.bfloat16(), weight, state=state, bias=bias))
    out.sum().backward()
    assert a.grad.dtype == torch.float32 and bias.grad.dtype == torch.float32


@pytest.mark.parametrize("threshold", [0.0, 2.0])
@pytest.mark.parametrize("training", [False, True])
def test_compiles_into_one_graph(device, training, threshold, compile_fresh):
    weight = torch.randn(4, 16, device=device)
    state = frozen(weight, training, threshold)

    def product(a, bias):
        return bnb.matmul(a, weight, state=state, bias=bias)

    compiled = compile_fresh(product, fullgraph=True, backend="aot_eager")
    results = []
    for run in (product, compiled):
        torch.manual_seed(1)
        a = torch.randn(5, 16, device=device, requires_grad=True)
        bias = torch.randn(4, device=device, requires_grad=True)
        out = run(a, bias)
        out.square().sum().backward()
        results.append((out, a.grad, bias.grad, state.idx))
    for eager, traced in zip(*results, strict=True):
        assert (traced is None) == (eager is None)
        if eager is not None:
            torch.testing.assert_close(traced, eager)


class Ops(TorchDispatchMode):
    """Collects the names of the ops that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("threshold", [0.0, 2.0])
def test_the_forward_is_one_op_that_reads_nothing_back(device, threshold):
    state = frozen(torch.randn(4, 16, device=device), threshold=threshold)
    a = torch.randn(5, 16, device=device)
    with torch.no_grad(), Ops() as ops:
        bnb.matmul(a, state.CB, state=state)
    assert ops.names == ["int8_linear.default"]


# --- what is kept between calls -----------------------------------------------------------------


def product_of(a, weight, state, training):
    state.is_training = training
    return bnb.matmul(a, weight, state=state)


@pytest.mark.parametrize("change", ["in place", "data"])
def test_a_changed_weight_is_quantized_again(device, change):
    a = torch.eye(8, device=device)
    weight = torch.randn(4, 8, device=device, requires_grad=True)
    state = bnb.MatmulLtState()
    product_of(a, weight, state, True).sum().backward()
    with torch.no_grad():
        if change == "data":
            weight.data = weight.data * 2
        else:
            weight.mul_(2)  # as an optimizer does, with gradients still there
    out = product_of(a, weight, state, False)
    torch.testing.assert_close(out, weight.t(), atol=0.05, rtol=0.01)


def test_an_unchanged_weight_is_quantized_once(device):
    a = torch.randn(2, 8, device=device)
    weight = torch.randn(4, 8, device=device, requires_grad=True)
    state = bnb.MatmulLtState()
    product_of(a, weight, state, True).sum().backward()
    codes = state.CB
    product_of(a, weight, state, True)  # gradients accumulate
    product_of(a, weight, state, False)
    assert state.CB is codes
    weight.grad = None
    product_of(a, weight, state, True)
    assert state.CB is not codes


@pytest.mark.parametrize("has_fp16_weights", [False, True])
def test_training_after_inference_mode(device, has_fp16_weights):
    a = torch.randn(2, 8, device=device, requires_grad=True)
    weight = torch.randn(4, 8, device=device, requires_grad=has_fp16_weights)
    state = bnb.MatmulLtState()
    state.has_fp16_weights = has_fp16_weights
    weight.grad = torch.zeros_like(weight) if has_fp16_weights else None
    with torch.inference_mode():
        product_of(a, weight, state, False)
    codes = state.CB
    product_of(a, weight, state, True).sum().backward()
    assert state.CB is codes and a.grad is not None


def test_another_weight_is_not_mistaken_for_the_first(device):
    a = torch.eye(8, device=device)
    first, second = torch.randn(4, 8, device=device), torch.randn(4, 8, device=device)
    state = bnb.MatmulLtState()
    product_of(a, first, state, False)
    out = product_of(a, second, state, False)
    torch.testing.assert_close(out, second.t(), atol=0.05, rtol=0.01)


def test_a_frozen_state_does_not_read_the_weight(device):
    a, weight = torch.randn(2, 8, device=device), torch.randn(4, 8, device=device)
    state = frozen(weight)
    want = bnb.matmul(a, weight, state=state)
    assert torch.equal(bnb.matmul(a, torch.full_like(weight, float("nan")), state=state), want)


def test_a_frozen_state_quantizes_its_first_weight(device):
    a, weight = torch.randn(2, 8, device=device), torch.randn(4, 8, device=device)
    state = bnb.MatmulLtState()
    state.has_fp16_weights = state.is_training = False
    out = bnb.matmul(a, weight, state=state)
    assert torch.equal(out, bnb.matmul(a, weight, state=frozen(weight)))
    assert torch.equal(bnb.matmul(a, weight * 2, state=state), out)
    state.reset_grads()
    assert not torch.equal(bnb.matmul(a, weight * 2, state=state), out)


def test_threshold_replaces_that_of_the_state(device):
    weight = torch.randn(4, 8, device=device)
    state = frozen(weight)
    bnb.matmul(torch.full((1, 8), 3.0, device=device), weight, state=state, threshold=2.0)
    assert state.threshold == 2.0
    assert state.idx.tolist() == list(range(8))


# --- bad arguments ------------------------------------------------------------------------------


def test_bad_arguments_get_a_sentence(device):
    a, weight = torch.randn(2, 8, device=device), torch.randn(4, 8, device=device)
    lost = frozen(weight)
    lost.SCB = None
    cases = [
        (dict(A=a.int(), B=weight), "A must be floating point"),
        (dict(A=a.sum(), B=weight), "A must be of at least one dimension"),
        (dict(A=a, B=weight.char()), "B must be floating point"),
        (dict(A=a[:, :7], B=weight), r"the weight must be \[N, 7\] .* got \[4, 8\]"),
        (dict(A=a, B=weight, state=lost), "state.SCB must be set"),
    ]
    for args, message in cases:
        with pytest.raises(ValueError, match=f"^matmul: {message}"):
            bnb.matmul(**args)
    with pytest.raises((ValueError, RuntimeError), match="bias"):
        bnb.matmul(a, weight, state=frozen(weight), bias=torch.ones(3, device=device))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs two devices")
def test_devices_must_agree():
    weight = torch.randn(4, 8)
    with pytest.raises(ValueError, match="the weight must be on the device of A"):
        bnb.matmul(torch.randn(2, 8, device="cuda"), weight, state=frozen(weight))


# --- the state ----------------------------------------------------------------------------------


def test_state_has_the_public_fields():
    tensors = [torch.ones(1) for _ in range(6)]
    state = bnb.MatmulLtState(True, *tensors, "pool", None)
    assert state.force_no_igemmlt is True
    fields = (state.CB, state.SB, state.SCB, state.SBt, state.CBt, state.subB)
    assert all(a is b for a, b in zip(fields, tensors, strict=True))
    assert state.outlier_pool == "pool" and state.idx is None
    assert state.threshold == 0.0 and state.is_training is True and state.has_fp16_weights is True
    assert state.use_pool is False and state.has_accumulated_gradients is False
    with pytest.raises(TypeError):
        bnb.MatmulLtState(threshold=6.0)
    with pytest.raises(TypeError):
        hash(state)
    assert bnb.MatmulLtState() == bnb.MatmulLtState()
    assert bnb.MatmulLtState(idx=1) != bnb.MatmulLtState()
    assert _functions.MatmulLtState is bnb.MatmulLtState and _functions.matmul is bnb.matmul


def test_state_reset():
    state = bnb.MatmulLtState(False, *[torch.ones(1)] * 6, None, torch.ones(1))
    state.reset_grads()
    assert state.CB is state.SB is state.SCB is state.SBt is state.CBt is None
    assert state.subB is not None and state.idx is not None


@pytest.mark.parametrize("name", ["CxB", "CxBt", "formatB", "_tile_indices"])
def test_state_of_removed_layouts(name):
    state = bnb.MatmulLtState()
    with pytest.warns(FutureWarning, match=name):
        assert getattr(state, name) is None
    setattr(state, name, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert getattr(state, name) == 3


def test_state_refuses_unknown_names_and_can_be_copied():
    state = frozen(torch.randn(2, 3), threshold=6.0)
    with pytest.raises(AttributeError, match=r"MatmulLtState.*nothing"):
        _ = state.nothing
    bnb.matmul(torch.tensor([[1.0, 7.0, -6.0]]), state.CB, state=state)
    for other in (copy.copy(state), copy.deepcopy(state), pickle.loads(pickle.dumps(state))):
        assert other.idx.tolist() == [1, 2]
        assert other.threshold == 6.0 and other.has_fp16_weights is False
        assert torch.equal(other.CB, state.CB) and torch.equal(other.SCB, state.SCB)


def test_outlier_pooler():
    with pytest.raises(RuntimeError, match="get_instance"):
        GlobalOutlierPooler()
    pooler = GlobalOutlierPooler.get_instance()
    assert (
        GlobalOutlierPooler.get_instance()
        is pooler
        is _functions.GlobalOutlierPooler.get_instance()
    )
    assert pooler.get_current_outlier_idx().dtype == torch.int64
    pooler.add_outliers(torch.tensor([5, 2]), 8)
    pooler.add_outliers(torch.tensor([2, 7]), 8)
    pooler.add_outliers(torch.tensor([1]), 16)  # another width
    assert pooler.get_current_outlier_idx().tolist() == [2, 5, 7]
