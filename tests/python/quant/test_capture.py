# SPDX-License-Identifier: MIT
"""CUDA graphs: what is captured of every op but the optimizers' gives, replayed, its eager results.

Optimizer steps, which change their arguments, are captured in the tests of optimizers.
"""

import pytest
import torch
from samples import SAMPLES
from torch.utils import _pytree as pytree

NAMES = [name for name in SAMPLES if not name.startswith(("optimizer_", "percentile_clipping"))]


def op_of(name):
    op, _, overload = name.partition(".")
    return getattr(getattr(torch.ops.bitsandbytes, op), overload or "default")


def capturable(name, args):
    """Whether the sizes of all results are known beforehand: else the op waits for the device."""
    lists_outliers = name in ("int8_vectorwise_quant", "int8_double_quant")
    finds_outliers = lists_outliers and len(args) > 1 and args[1] > 0
    return not finds_outliers


def calls_of(name, device):
    return [call for call in SAMPLES[name](device) if capturable(name, call[0])]


def run(op, calls):
    """All tensors that the calls return and, since ops may write to them, those they take."""
    results = [op(*args, **options) for args, options in calls]
    return [leaf for leaf in pytree.tree_leaves((results, calls)) if torch.is_tensor(leaf)]


def copy_into(calls, others):
    """Gives the tensors of calls the contents of the others'."""
    for to, source in zip(pytree.tree_leaves(calls), pytree.tree_leaves(others), strict=True):
        if torch.is_tensor(to):
            to.copy_(source)
        else:
            assert to == source


@pytest.mark.parametrize("name", NAMES)
def test_replays_equal_eager_calls(device, name):
    if device != "cuda":
        pytest.skip("CUDA graphs exist on CUDA only")
    op = op_of(name)
    captured, other = calls_of(name, device), calls_of(name, device)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # libraries and kernels are loaded before the capture
        run(op, calls_of(name, device))
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        got = run(op, captured)
    for given in (calls_of(name, device), other):
        copy_into(captured, given)
        graph.replay()
        want = run(op, given)
        assert len(got) == len(want)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", NAMES)
def test_samples_can_be_given_to_a_graph(device, name):
    # What the test above relies on, wherever it cannot run.
    first, second = calls_of(name, device), calls_of(name, device)
    assert first
    copy_into(first, second)
    for a, b in zip(run(op_of(name), first), run(op_of(name), second), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
