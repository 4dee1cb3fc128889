# SPDX-License-Identifier: MIT
"""What importing the package does and does not do, in a process of its own."""

import functools
import json
import os
import subprocess
import sys

import pytest
import torch

import bitsandbytes as bnb
from bitsandbytes import _library

# A process without network. What a test adds runs behind this.
PRELUDE = """
import sys
def refuse_network(event, args):
    if event in ("socket.connect", "socket.bind", "socket.getaddrinfo", "socket.sendto"):
        raise AssertionError("import used the network: " + event)
sys.addaudithook(refuse_network)
"""

WORK = """
import hashlib, json, torch
import bitsandbytes as bnb
torch.manual_seed(0)
codes, state = bnb.functional.quantize_blockwise(torch.randn(5000), blocksize=256)
back = bnb.functional.dequantize_blockwise(codes, state)
ints, stats, _ = bnb.functional.int8_vectorwise_quant(torch.randn(8, 64))
p = torch.nn.Parameter(torch.randn(5000))
optimizer = bnb.optim.Adam8bit([p], lr=1e-2)
for _ in range(3):
    p.grad = torch.randn(5000)
    optimizer.step()
layer = bnb.nn.Linear8bitLt(64, 32, has_fp16_weights=False).to("cpu")
out = layer(torch.randn(4, 64))
digest = lambda t: hashlib.sha256(t.detach().numpy().tobytes()).hexdigest()
print(json.dumps({
    "codes": digest(codes), "absmax": digest(state.absmax), "back": digest(back),
    "ints": digest(ints), "stats": digest(stats), "step": optimizer.state[p]["step"],
    "parameter": p.tolist(), "out": list(out.shape),
    "reasons": [library.reason for library in bnb._library.libraries.values()],
    "loaded": [library.loaded for library in bnb._library.libraries.values()],
}))
"""

HIDE = """
sys.modules["bitsandbytes._C"] = None
"""

BREAK = """
class Broken:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "bitsandbytes._C":
            raise ImportError("libgone.so: cannot open shared object file")
sys.meta_path.insert(0, Broken)
"""


def run(code, *options, **environment):
    return subprocess.run(
        [sys.executable, *options, "-c", PRELUDE + code],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )


@functools.cache
def native_results():
    return json.loads(check(run(WORK)))


def check(process):
    assert process.returncode == 0, process.stderr
    return process.stdout


def test_import_is_silent():
    # torch itself may have something to say; what the package adds is compared.
    alone = run("import torch")
    process = run("import torch\nimport bitsandbytes")
    assert check(process) == check(alone)
    assert process.stderr == alone.stderr


def test_import_warns_of_nothing():
    code = "import torch, warnings\nwarnings.simplefilter('error')\nimport bitsandbytes"
    check(run(code))


def test_import_touches_neither_gpu_nor_threads_nor_defaults():
    code = """
import torch
before = torch.get_num_threads(), torch.get_default_dtype(), torch.random.get_rng_state()
import bitsandbytes
assert not torch.cuda.is_initialized()
assert torch.get_num_threads() == before[0] and torch.get_default_dtype() == before[1]
assert torch.equal(torch.random.get_rng_state(), before[2])
"""
    check(run(code))


def test_import_brings_no_further_package():
    code = """
import torch
before = set(sys.modules)
import bitsandbytes
new = {name.split(".")[0] for name in set(sys.modules) - before}
print(sorted(new - set(sys.stdlib_module_names) - {"bitsandbytes", "torch"}))
"""
    # The hooks of an editable installation are no packages of ours.
    names = [name for name in eval(check(run(code))) if not name.startswith(("_", "numpy"))]
    assert names == []


@pytest.mark.parametrize("hide", [HIDE, BREAK], ids=["absent", "broken"])
def test_works_without_native_code(hide):
    result = json.loads(check(run(hide + WORK)))
    assert result["loaded"] == [False, False]
    expected = "without native code" if hide is HIDE else "libgone.so"
    assert all(expected in reason for reason in result["reasons"])
    assert result["step"] == 3 and result["out"] == [4, 32]
    if not _library.libraries["_ops"].loaded:
        return
    native = native_results()
    assert native["loaded"][0] is True
    for key in ("codes", "absmax", "back", "ints", "stats"):
        assert result[key] == native[key], key
    # Three steps of 1e-2; float32 arithmetic in another order. Where a code falls on the other side
    # of a threshold, a later step differs by its 1/64 at most.
    torch.testing.assert_close(
        torch.tensor(result["parameter"]), torch.tensor(native["parameter"]), rtol=0, atol=1e-2 / 64
    )


BACKEND = """
from bitsandbytes._ops import register_fake, register_kernel

def load():
    register_kernel("bitsandbytes::quantize_4bit", "mps")(lambda *args: None)

def fail():
    raise OSError("no such device")
"""


@pytest.mark.parametrize("function", ["load", "fail"])
def test_entry_points_of_backends_are_called(tmp_path, function):
    (tmp_path / "of_somebody.py").write_text(BACKEND)
    facts = tmp_path / "of_somebody-1.0.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: of-somebody\nVersion: 1.0\n")
    entry = f"[bitsandbytes.backends]\nsomebodys = of_somebody:{function}\n"
    (facts / "entry_points.txt").write_text(entry)
    code = """
import torch, bitsandbytes
has = torch._C._dispatch_has_kernel_for_dispatch_key
assert has("bitsandbytes::quantize_4bit", "MPS")
"""
    process = run(code, PYTHONPATH=str(tmp_path))
    if function == "load":
        check(process)
    else:
        assert "RuntimeError: bitsandbytes: the backend somebodys" in process.stderr
        assert "no such device" in process.stderr


def test_says_what_is_loaded():
    for library in _library.libraries.values():
        assert library.loaded == (library.reason == "loaded")
        assert library.loaded or len(library.reason) > 10


def test_public_names():
    assert all(hasattr(bnb, name) for name in bnb.__all__)
    for module in (bnb.functional, bnb.optim, bnb.nn, bnb.utils):
        assert all(hasattr(module, name) for name in module.__all__)


def test_version_is_the_distributions():
    from importlib.metadata import version

    assert bnb.__version__ == version("bitsandbytes")
