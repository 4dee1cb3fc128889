# SPDX-License-Identifier: MIT
"""Layers that learn their outlier columns, and what finds those."""

import inspect
import logging

import numpy as np
import pytest
import torch
from torch import nn

import bitsandbytes as bnb
from bitsandbytes.nn import OutlierAwareLinear
from bitsandbytes.utils import OutlierTracer, find_outlier_dims, outlier_hook


@pytest.fixture
def tracer():
    """The tracer as a process finds it, and leaves it."""
    OutlierTracer._instance = None
    yield OutlierTracer.get_instance()
    OutlierTracer._instance = None


def test_outlier_columns_of_a_weight(device):
    weight = torch.randn(64, 100, device=device)
    weight[:, 7] *= 30
    assert find_outlier_dims(weight).tolist() == [7]
    assert find_outlier_dims(weight.t(), reduction_dim=1).tolist() == [7]
    assert find_outlier_dims(weight, zscore=1e9).numel() == 0
    deviation = weight.cpu().double().numpy().std(axis=0, ddof=1)
    top = find_outlier_dims(weight, topk=3)
    np.testing.assert_array_equal(top.cpu(), np.argsort(-deviation)[:3])
    random = find_outlier_dims(weight, topk=5, rdm=True)
    assert random.shape == (5,) and (random < 100).all() and (random >= 0).all()


def test_tracer_records_layers_once(device, tracer):
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4)).to(device)
    with torch.no_grad():
        model[2].weight[:, 9] = 20.0
        model[2].weight[::2, 9] = -20.0
    assert not tracer.is_initialized()
    tracer.initialize(model)
    assert tracer.is_initialized() and len(tracer.hooks) == 2
    x = torch.randn(32, 64, device=device).clamp_(-3, 3)
    x[5, 40] = 6.5
    x[:, 11] *= 20
    model(x.view(4, 8, 64))
    assert tracer.get_outliers(model[0].weight).tolist() == [11, 40]
    assert tracer.get_outliers(model[2].weight).tolist() == [9]
    assert len(tracer.hvalues) == len(tracer.outliers) == len(tracer.hvalue2outlier_idx) == 2
    assert tracer.get_hvalue(model[0].weight) == model[0].weight.data_ptr()
    assert tracer.get_outliers(nn.Linear(2, 2).weight) is None
    model(x)
    assert tracer.hooks == [] and not model[0]._forward_pre_hooks
    outlier_hook(model[0], (x,))
    assert len(tracer.hvalues) == 2


def test_tracer_is_one_object(tracer, caplog):
    assert OutlierTracer.get_instance() is tracer
    with pytest.raises(RuntimeError, match="get_instance"):
        OutlierTracer()
    with caplog.at_level(logging.WARNING):
        assert tracer.get_outliers(torch.ones(2, 2)) is None
    assert "no model is traced" in caplog.text


class Kept(OutlierAwareLinear):
    """Keeps only the outlier columns of its weight."""

    def quantize_weight(self, w, outlier_idx):
        kept = torch.zeros_like(w)
        kept[:, outlier_idx] = w[:, outlier_idx]
        return kept

    def forward_with_outliers(self, x, outlier_idx):
        return nn.functional.linear(x, self.weight, self.bias)


def test_layer_quantizes_its_weight_once(device, tracer):
    layer = Kept(32, 8, device=device)
    weight = layer.weight.detach().clone()
    tracer.initialize(nn.Sequential(layer))
    x = torch.randn(16, 32, device=device).clamp_(-3, 3)
    x[0, 3] = 9
    assert layer.outlier_dim is None and layer.is_quantized is False
    out = layer(x)
    assert layer.outlier_dim.tolist() == [3] and layer.is_quantized is True
    torch.testing.assert_close(out, x[:, [3]] @ weight[:, [3]].t() + layer.bias)
    before = layer.weight.detach().clone()
    assert torch.equal(layer(x), out) and torch.equal(layer.weight, before)


def test_a_subclass_says_what_to_do(tracer):
    names = ["input_features", "output_features", "bias", "device"]
    assert list(inspect.signature(OutlierAwareLinear).parameters) == names
    assert bnb.nn.modules.OutlierAwareLinear is OutlierAwareLinear
    layer, x = OutlierAwareLinear(4, 4), torch.ones(1, 4)
    for call in (
        lambda: layer.quantize_weight(x, None),
        lambda: layer.forward_with_outliers(x, None),
        lambda: layer(x),
    ):
        with pytest.raises(NotImplementedError, match="a subclass of OutlierAwareLinear defines"):
            call()
