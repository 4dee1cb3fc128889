# SPDX-License-Identifier: MIT
"""The direction of includes and imports, and where vendors and instruction sets may be named."""

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "python" / "bitsandbytes"
INCLUDE = re.compile(r'^\s*#\s*include\s*([<"])([^>"]+)[>"]', re.MULTILINE)
CONDITION = re.compile(r"^\s*#\s*(?:if|ifdef|ifndef|elif)\b(.*)$", re.MULTILINE)

if not (ROOT / "csrc").is_dir():
    pytest.skip("the sources are not here", allow_module_level=True)


def sources(*folders):
    suffixes = {".h", ".cpp", ".cu", ".cuh", ".inl"}
    found = [p for folder in folders for p in (ROOT / folder).rglob("*") if p.suffix in suffixes]
    assert found
    return found


def name_of(path):
    return path.relative_to(ROOT).as_posix()


def code_of(path):
    """The text without comments."""
    return re.sub(r"//[^\n]*|/\*.*?\*/", "", path.read_text(), flags=re.DOTALL)


# What ops may know of the CPU kernels.
CPU_INTERFACE = ["cpu/bounds.h", "cpu/dispatch.h", "cpu/grouped_gemm_4bit.h", "cpu/parallel.h"]

# Folder -> what its files may include with quotes, and with brackets besides the C++ library.
ALLOWED = {
    "include": (["bitsandbytes/"], []),
    "csrc/cpu": (["bitsandbytes/", "cpu/"], []),
    "csrc/cpu/simd": (["bitsandbytes/", "cpu/"], ["immintrin.h", "arm_neon.h"]),
    "csrc/gpu": (["bitsandbytes/", "gpu/"], []),
    "csrc/gpu/device": (["bitsandbytes/", "gpu/device/", "gpu/runtime/"], []),
    "csrc/gpu/runtime": (["bitsandbytes/", "gpu/runtime/"], ["cuda", "hip", "cub"]),
    "csrc/gpu/runtime/emulated.cpp": (["gpu/runtime/"], ["ucontext.h"]),
    "csrc/ops": (["bitsandbytes/", "ops/"], []),
    "csrc/ops/torch_api.h": (["bitsandbytes/"], ["torch/"]),
    "csrc/ops/cpu.cpp": (["bitsandbytes/", "ops/", *CPU_INTERFACE], []),
    "csrc/ops/gpu.cpp": (["bitsandbytes/", "ops/", "gpu/runtime/"], []),
    "csrc/bindings": (
        ["bitsandbytes/", "bindings/", "cpu/dispatch.h"],
        ["pybind11/", "dlfcn.h"],
    ),
}
STANDARD = re.compile(r"^[a-z_0-9]+$")


@pytest.mark.parametrize("path", sources("include", "csrc"), ids=name_of)
def test_includes_point_downwards(path):
    name = name_of(path)
    # The longest entry that names the file or a folder above it.
    rule = max((key for key in ALLOWED if name == key or name.startswith(key + "/")), key=len)
    quoted, bracketed = ALLOWED[rule]
    for kind, target in INCLUDE.findall(path.read_text()):
        if kind == '"':
            assert target.startswith(tuple(quoted)), f"{name} includes {target}"
        elif not STANDARD.match(target):
            assert target.startswith(tuple(bracketed)), f"{name} includes {target}"


@pytest.mark.parametrize("path", sources("include", "csrc"), ids=name_of)
def test_vendors_are_named_in_the_runtime_only(path):
    name = name_of(path)
    if name.startswith("csrc/gpu/runtime/") or name == "include/bitsandbytes/config.h":
        return
    vendor = re.compile(r"__HIP|__CUDA|USE_ROCM|USE_HIP|__NVCC__|HIPCC|CUDART|CUDA_VERSION")
    for condition in CONDITION.findall(code_of(path)):
        assert not vendor.search(condition), f"{name}: {condition}"


@pytest.mark.parametrize("path", sources("include", "csrc"), ids=name_of)
def test_instruction_sets_are_named_in_simd_only(path):
    name = name_of(path)
    if name.startswith("csrc/cpu/simd/"):
        return
    code = code_of(path)
    intrinsic = re.search(r"\b_mm\w*\(|\b__m(?:128|256|512)\w*|\bv\w+q_(?:f|s|u)\d+\(", code)
    assert intrinsic is None, f"{name}: {intrinsic.group()}"
    if name == "csrc/cpu/dispatch.cpp":  # asks the processor
        return
    for condition in CONDITION.findall(code):
        isa = r"__AVX|__SSE|__ARM|__aarch64__|__x86_64__|__FMA__|__F16C__"
        assert not re.search(isa, condition), f"{name}: {condition}"


@pytest.mark.parametrize("path", sources("include", "csrc"), ids=name_of)
def test_sources_do_not_print_exit_or_synchronize(path):
    calls = r"\b(?:printf|puts|exit|abort|(?:cuda|hip)\w*Synchronize)\s*\(|std::c(?:out|err)\b"
    found = re.search(calls, code_of(path))
    assert found is None, f"{name_of(path)}: {found.group()}"


def modules_of(path):
    """Top-level names that a Python file imports; relative imports give "."."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add("." if node.level else node.module.split(".")[0])
    return names


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=name_of)
def test_package_imports_torch_and_itself_only(path):
    foreign = modules_of(path) - set(sys.stdlib_module_names) - {".", "torch", "bitsandbytes"}
    assert not foreign


@pytest.mark.parametrize("path", sorted((ROOT / "tests/reference").glob("*.py")), ids=name_of)
def test_reference_imports_numpy_only(path):
    assert modules_of(path) <= set(sys.stdlib_module_names) | {".", "numpy"}


# Package part -> parts that it may import, besides the modules that stand beside it.
LAYERS = {
    "plain": {"_checks", "_codes4", "_ops", "_precision"},
    "quant": {"_checks", "_codes4", "_ops", "_precision", "_tables", "utils"},
    "optim": {"_checks", "_library", "_ops", "paged", "plain", "quant"},
    "autograd": {"_checks", "_ops", "_precision", "functional", "plain", "quant", "utils"},
    "nn": {"_checks", "_ops", "autograd", "functional", "optim", "outliers", "quant", "utils"},
    "research": {"autograd", "fp8", "quant", "switchback"},  # two are its own
}


@pytest.mark.parametrize("part", LAYERS)
def test_parts_of_the_package_import_downwards(part):
    for path in (PACKAGE / part).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level == 2:
                names = [node.module] if node.module else [alias.name for alias in node.names]
                for name in names:
                    assert name.split(".")[0] in LAYERS[part], f"{name_of(path)} imports {name}"


OBJECTS = [
    path
    for path in sorted((ROOT / "build").glob("**/bitsandbytes_cpu.dir/cpu/isa/*.o"))
    if "CMakeFiles" in path.parts
]


@pytest.mark.skipif(shutil.which("nm") is None, reason="nm is not installed")
@pytest.mark.skipif(not OBJECTS, reason="no build folder with objects")
@pytest.mark.parametrize("path", OBJECTS, ids=name_of)
def test_objects_of_an_instruction_set_share_no_code(path):
    # Of a weak function the linker keeps one copy for all: if that is AVX-512, others crash.
    isa = path.name.split(".")[0]
    listing = subprocess.run(
        ["nm", "--defined-only", "--demangle", str(path)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    symbols = [line.split(maxsplit=2)[1:] for line in listing.splitlines() if line.strip()]
    exported = [name for kind, name in symbols if kind.isupper() or kind in "uvw"]
    assert exported
    for name in exported:
        if not name.startswith("DW.ref."):
            assert f"bnb::cpu::{isa}::" in name, name
