# SPDX-License-Identifier: MIT
"""Every schema of the package: that it is served everywhere, traced right, and tells the truth."""

import ctypes

import pytest
import torch
from samples import SAMPLES
from torch.library import opcheck
from torch.utils import _pytree as pytree

from bitsandbytes import _library
from bitsandbytes._ops import SCHEMAS

NAMES = [schema.split("(")[0] for schema in SCHEMAS]
# Written with other ops only, so that each device runs them with its own kernels.
COMPOSED = {
    "int8_double_quant",
    "int8_vectorwise_dequant",
    "int8_mixed_scaled_mm",
    "optimizer_update_32bit",
    "optimizer_update_8bit_blockwise",
}
# Schemas of the public package, to the letter: they mark what is only read as written.
OVERSTATED = {"optimizer_update_32bit", "optimizer_update_8bit_blockwise"}


def op_of(name):
    op, _, overload = name.partition(".")
    return getattr(getattr(torch.ops.bitsandbytes, op), overload or "default")


def has_kernel(name, key):
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"bitsandbytes::{name}", key)


def test_samples_name_every_schema_and_nothing_else():
    assert sorted(SAMPLES) == sorted(NAMES)
    assert len(set(NAMES)) == len(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_schema_is_what_the_dispatcher_knows(name):
    op_of(name)
    assert (
        torch._C._dispatch_find_schema_or_throw(
            f"bitsandbytes::{name.split('.')[0]}", name.partition(".")[2]
        )
        is not None
    )


@pytest.mark.parametrize("name", NAMES)
def test_every_op_has_a_shape_rule(name):
    entry = torch._library.simple_registry.singleton.find(f"bitsandbytes::{name}")
    assert entry.fake_impl.kernel is not None


@pytest.mark.parametrize("name", NAMES)
def test_every_op_has_an_implementation_for_any_device(name):
    assert has_kernel(name, "CompositeExplicitAutograd")


@pytest.mark.parametrize("name", NAMES)
def test_every_op_has_a_native_kernel(device, name):
    library = _library.libraries["_cuda" if device == "cuda" else "_ops"]
    if not library.loaded:
        pytest.skip(f"{library.name} is not loaded: {library.reason}")
    assert has_kernel(name, device.upper()) != (name in COMPOSED)


@pytest.mark.parametrize("name", NAMES)
def test_opcheck(device, name):
    for args, kwargs in SAMPLES[name](device):
        opcheck(op_of(name), args, kwargs)


def tensors_in(value):
    return [leaf for leaf in pytree.tree_leaves(value) if torch.is_tensor(leaf)]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("implementation", ["dispatched", "default"])
def test_op_writes_what_its_schema_says_and_nothing_else(device, name, implementation):
    op = op_of(name)
    arguments = op._schema.arguments
    declared = {a.name for a in arguments if a.alias_info is not None and a.alias_info.is_write}
    written = set()
    for args, kwargs in SAMPLES[name](device):
        given = {a.name: value for a, value in zip(arguments, args, strict=False)} | kwargs
        before = {key: [t.clone() for t in tensors_in(value)] for key, value in given.items()}
        if implementation == "default":
            keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CompositeExplicitAutograd)
            op.redispatch(keys, *args, **kwargs)
        else:
            op(*args, **kwargs)
        for key, value in given.items():
            pairs = zip(tensors_in(value), before[key], strict=True)
            changed = [not torch.equal(now, old) for now, old in pairs]
            if any(changed):
                written.add(key)
            if key in declared and name not in OVERSTATED:
                assert all(changed), f"{key} is marked as written, but a tensor of it stayed"
    assert written <= declared if name in OVERSTATED else written == declared


class Heap(ctypes.Structure):
    """What glibc says of the memory that it hands out."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks"),
            *("uordblks", "fordblks", "keepcost"),
        )
    ]


# Where the C library tells how much memory is in use.
mallinfo2 = getattr(ctypes.CDLL(None), "mallinfo2", None)
if mallinfo2 is not None:
    mallinfo2.restype = Heap


@pytest.mark.skipif(mallinfo2 is None, reason="the C library does not tell what is in use")
@pytest.mark.parametrize("name", NAMES)
def test_calls_leave_no_memory_behind(device, name):
    op, calls = op_of(name), 400
    (args, kwargs), *_ = SAMPLES[name](device)
    grown = []
    for _ in range(4):  # in the first, things are made that stay
        before = mallinfo2().uordblks
        for _ in range(calls):
            op(*args, **kwargs)
        grown.append((mallinfo2().uordblks - before) / calls)
    assert min(grown[1:]) < 16, f"a call keeps {grown} bytes"


def test_results_that_find_no_memory(device):
    library = _library.libraries["_cuda" if device == "cuda" else "_ops"]
    if not library.loaded:
        pytest.skip(f"{library.name} is not loaded: {library.reason}")
    vector = torch.zeros(20_000_000, 1, dtype=torch.int8, device=device)
    with pytest.raises(RuntimeError, match=rf"{device}.* \[20000000, 20000000\] and dtype Int"):
        torch.ops.bitsandbytes.int8_linear_matmul(vector, vector)


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("optimizer_step")])
def test_steps_are_seen_as_mutations_by_the_tracer(device, name):
    op = op_of(name)
    (args, _), *_ = SAMPLES[name](device)
    eager, traced = (pytree.tree_map_only(torch.Tensor, torch.clone, args) for _ in range(2))

    def run(params, rest):
        op(rest[0], params, *rest[2:])
        return [p * 2 for p in params]

    want = run(eager[1], eager)
    got = torch.compile(run, fullgraph=True, backend="aot_eager")(traced[1], traced)
    for a, b in zip(want, got, strict=True):
        assert torch.equal(a, b)
    for a, b in zip(tensors_in(eager), tensors_in(traced), strict=True):
        assert torch.equal(a, b)
