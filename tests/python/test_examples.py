# SPDX-License-Identifier: MIT
"""Examples that need no data do what they say."""

import importlib.util
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"

if not EXAMPLES.is_dir():
    pytest.skip("the sources are not here", allow_module_level=True)


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def _one_thread():
    # Tensors are tiny: more threads would wait for each other most of the time.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_custom_optimizer(capsys):
    example = load("custom_optimizer")
    example.main()
    lines = capsys.readouterr().out.splitlines()
    (_, _, exact, *_, large, _), (_, _, coarse, *_, small, _) = (line.split() for line in lines[:2])
    assert float(exact) < 0.01 and float(coarse) < 0.01
    assert int(small) < int(large) / 3
    assert lines[2:] == ["first        torch.uint8", "second       torch.float32"]


@pytest.mark.parametrize("bits", [8, 32])
def test_custom_optimizer_follows_its_rule(bits):
    example = load("custom_optimizer")
    p = torch.nn.Parameter(torch.zeros(5000))
    opt = example.Signum([p], lr=0.25, momentum=0.5, optim_bits=bits)
    want, m = torch.zeros(5000), torch.zeros(5000)
    for _ in range(4):
        p.grad = torch.randn(5000)
        m = 0.5 * m + 0.5 * p.grad
        want -= 0.25 * m.sign()
        opt.step()
    # Quantization turns signs around where the average is next to nothing.
    assert (p == want).float().mean() > (0.999 if bits == 32 else 0.95)
