# SPDX-License-Identifier: MIT
"""What a step does with whole lists of Python objects."""

import types

import pytest
import torch
from torch import nn

from bitsandbytes.optim.lists import all_are, gradients, holds_none


class WithProperty(nn.Parameter):
    @property
    def grad(self):
        return "property"


class WithGetattribute:
    def __getattribute__(self, name):
        return name


class WithoutGrad:
    pass


def test_gradients_are_what_each_object_says():
    tensors = [nn.Parameter(torch.zeros(2)) for _ in range(3)]
    tensors[0].grad, tensors[2].grad = torch.ones(2), torch.ones(2)
    tensors[0].__dict__["grad"] = "hidden by the attribute of the class"
    plain = torch.zeros(2)
    plain.grad = torch.zeros(2)
    shown = types.SimpleNamespace(grad="of the object")
    other = types.SimpleNamespace(grad="of another object")
    odd = [WithProperty(torch.zeros(1)), WithGetattribute()]
    got = gradients([*tensors, plain, shown, other, *odd, tensors[0]])
    want = [*(p.grad for p in tensors), plain.grad, shown.grad, other.grad, "property", "grad"]
    assert all_are(got, [*want[:-1], got[-2], tensors[0].grad])
    assert got[-2] == "grad" and got[1] is None and holds_none(got)
    assert gradients([]) == []


def test_object_without_gradient_is_an_error():
    with pytest.raises(AttributeError, match="grad"):
        gradients([torch.zeros(1), WithoutGrad()])


def test_lists_are_compared_by_identity():
    a, b = object(), object()
    assert all_are([], []) and all_are([a, b], [a, b])
    assert not all_are([a, b], [b, a]) and not all_are([a], [a, b])
    assert not all_are([[1]], [[1]])
    assert not holds_none([]) and not holds_none([0, False]) and holds_none([0, None])
