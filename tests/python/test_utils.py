# SPDX-License-Identifier: MIT
"""Small helpers: replacing layers, running commands, waiting for devices."""

import sys

import pytest
import torch
from torch import nn

import bitsandbytes as bnb
from bitsandbytes import utils


def model():
    head = nn.ModuleDict({"lm_head": nn.Linear(8, 3), "proj": nn.Linear(8, 8, bias=False)})
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), head)


class Counted(nn.Linear):
    """Says that it was asked to prepare."""

    def prepare(self, old):
        self.asked = old


def test_replace_linear():
    original = model()
    kept, weight = original[2]["lm_head"], original[0].weight
    replaced = utils.replace_linear(original, bnb.nn.Linear8bitLt)
    assert replaced is original
    assert type(original[0]) is type(original[2]["proj"]) is bnb.nn.Linear8bitLt
    assert original[2]["lm_head"] is kept and original[0].weight is not weight
    assert original[2]["proj"].bias is None and original[0].bias is not None


def test_replace_linear_with_the_same_parameters():
    original = model()
    weight, bias = original[0].weight, original[0].bias
    utils.replace_linear(original, nn.Linear, skip_modules=("0.proj", "proj"), copy_weights=True)
    assert original[0].weight is weight and original[0].bias is bias
    original = nn.Sequential(Counted(2, 2))
    old = original[0]
    utils.replace_linear(original, nn.Linear, post_processing_function="prepare")
    assert old.asked is old and original[0] is not old


def test_replace_linear_keeps_a_replacement_whole():
    class Pair(nn.Module):
        def __init__(self, inputs, outputs, bias):
            super().__init__()
            self.inner = nn.Linear(inputs, outputs, bias)

    replaced = utils.replace_linear(nn.Sequential(nn.Linear(2, 2)), Pair)
    assert type(replaced[0]) is Pair and type(replaced[0].inner) is nn.Linear


def test_execute_and_return():
    code = "import sys; print(' out '); print('err', file=sys.stderr)"
    assert utils.execute_and_return(f'"{sys.executable}" -c "{code}"') == ("out", "err")
    assert utils.execute_and_return("echo '$HOME'") == ("$HOME", "")
    with pytest.raises(FileNotFoundError):
        utils.execute_and_return("no-such-command-here")


def test_sync_gpu(device):
    assert utils.sync_gpu(torch.zeros(1, device=device)) is None
