# SPDX-License-Identifier: MIT
"""`python -m bitsandbytes`: text, exit status, and that it finds what is broken."""

import os
import subprocess
import sys

import pytest
import torch

import bitsandbytes as bnb
from bitsandbytes import _library
from bitsandbytes.diagnostics import checks, main, native, utils
from bitsandbytes.optim.buckets import Bucket

CPU = torch.device("cpu")


def run(tmp_path, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """Runs Python outside the checkout."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=tmp_path,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_report_without_accelerator(tmp_path):
    hidden = {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}
    result = run(tmp_path, "-m", "bitsandbytes", **hidden)
    lines = result.stdout.splitlines()
    assert result.returncode == 0, result.stdout + result.stderr
    assert lines[0] == f" bitsandbytes v{bnb.__version__} ".center(60, "=")
    for start in ("Platform:", "Python:", "PyTorch:", "  CUDA:", "  HIP:", "  XPU:", "No CUDA"):
        assert any(line.startswith(start) for line in lines), start
    for name in main.RELATED_PACKAGES:
        assert f"  {name}: {main.get_package_version(name)}" in lines
    assert "the CPU library loaded." in result.stdout
    assert any(line.startswith("CPU instruction set:") for line in lines)
    assert any(line.startswith("cpu: native code") for line in lines)
    passed = [line for line in lines if " ok (" in line]
    assert [line.strip().split("  ")[0] for line in passed] == list(checks.CHECKS)
    assert sum(line.startswith("  paged optimizers") for line in lines) == 1
    assert "FAILED" not in result.stdout
    assert lines[-1] == "SUCCESS!"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device")
def test_report_with_gpu(tmp_path):
    result = run(tmp_path, "-m", "bitsandbytes")
    assert "GPU 0: " in result.stdout
    assert "cuda:0: " in result.stdout
    assert "No CUDA" not in result.stdout
    # Without native code for a device that is there, all is not well.
    expected = 0 if _library.libraries["_cuda"].loaded else 1
    assert result.returncode == expected, result.stdout + result.stderr


def test_import_prints_nothing(tmp_path):
    modules = "bitsandbytes.__main__, bitsandbytes.diagnostics.main"
    result = run(tmp_path, "-c", f"import {modules}")
    assert (result.returncode, result.stdout) == (0, "")


@pytest.fixture
def only_cpu(monkeypatch):
    """A machine without accelerators, whatever this one has."""
    monkeypatch.setattr(native, "devices", lambda: [CPU])
    monkeypatch.setattr(native, "gpus", list)
    return monkeypatch


def failures(capsys) -> tuple[int, list[str], str]:
    """Runs the report in this process; returns its status, the problems and all of its text."""
    status = main.main()
    text = capsys.readouterr().out
    problems = [line for line in text.splitlines() if line.startswith("FAILED: ")]
    assert (status == 0) == text.endswith("SUCCESS!\n") == (not problems)
    return status, problems, text


def test_report_in_process_succeeds(only_cpu, capsys):
    assert failures(capsys)[0] == 0


def test_compiled_but_not_loaded_fails(only_cpu, capsys):
    broken = _library.Library("_ops", "cpu", reason="undefined symbol: aoti_torch_new")
    only_cpu.setitem(_library.libraries, "_ops", broken)
    status, problems, text = failures(capsys)
    assert status == 1
    assert problems == ["FAILED: _ops, which serves cpu: undefined symbol: aoti_torch_new"]
    assert "the CPU library did not load" in text


def test_installed_without_native_code_fails(only_cpu, capsys):
    only_cpu.setattr(_library, "native_module", lambda: None)
    only_cpu.setattr(native, "ops_by_kind", lambda device: ([], ["quantize_blockwise"]))
    status, problems, text = failures(capsys)
    assert status == 1
    assert len(problems) == 1 and "without native code" in problems[0]
    assert "cpu: plain PyTorch for every op" in text


def test_binding_module_that_does_not_load_fails(only_cpu, capsys):
    def broken():
        raise ImportError("libstdc++.so.6: version GLIBCXX_3.4.30 not found")

    only_cpu.setattr(_library, "native_module", broken)
    status, problems, _ = failures(capsys)
    assert status == 1
    assert "GLIBCXX_3.4.30" in problems[0]


def test_gpu_without_its_library_fails(only_cpu, capsys):
    only_cpu.setattr(native, "gpus", lambda: [native.Gpu(0, "Some GPU", "9.0")])
    missing = _library.Library("_cuda", "cuda", reason="not part of this build")
    only_cpu.setitem(_library.libraries, "_cuda", missing)
    status, problems, text = failures(capsys)
    assert status == 1
    assert problems == ["FAILED: _cuda, which serves cuda: not part of this build"]
    assert "GPU 0: Some GPU, compute capability 9.0: no native code" in text
    assert "No CUDA" not in text


@pytest.mark.parametrize(
    ("architectures", "works"), [("80-real,90-real", True), ("75-real", False)]
)
def test_gpu_without_code_for_it_fails(only_cpu, capsys, architectures, works):
    class Module:
        build_info = staticmethod(
            lambda: {
                "version": bnb.__version__,
                "backend": "cuda",
                "gpu_architectures": architectures,
                "torch": "2.13.0",
                "compiler": "GNU 12",
            }
        )
        cpu_isa = staticmethod(lambda: "baseline")
        available_cpu_isas = staticmethod(lambda: ["baseline"])

    only_cpu.setattr(native, "gpus", lambda: [native.Gpu(0, "Some GPU", "9.0")])
    only_cpu.setattr(_library, "native_module", Module)
    loaded = _library.Library("_cuda", "cuda", loaded=True, reason="loaded")
    only_cpu.setitem(_library.libraries, "_cuda", loaded)
    status, problems, text = failures(capsys)
    assert (status, len(problems)) == ((0, 0) if works else (1, 1))
    assert ("machine code (90-real)" if works else "no native code") in text


def test_unknown_cpu_isa_is_said(only_cpu, capsys):
    only_cpu.setenv("BNB_CPU_ISA", "mmx")
    assert "BNB_CPU_ISA=mmx has no effect" in failures(capsys)[2]


@pytest.mark.parametrize(
    ("function", "wrong", "check"),
    [
        ("dequantize_blockwise", lambda *a, **k: torch.zeros(64, 128), "Adam8bit update"),
        ("dequantize_blockwise", lambda *a, **k: torch.full((64, 128), torch.nan), "quantize_"),
        ("quantize_blockwise", lambda *a, **k: 1 / 0, "quantize_blockwise round trip"),
    ],
)
def test_wrong_result_fails(only_cpu, capsys, function, wrong, check):
    only_cpu.setattr(bnb.functional, function, wrong)
    status, problems, _ = failures(capsys)
    assert status == 1
    assert any(problem.startswith(f"FAILED: cpu: {check}") for problem in problems)


def test_optimizer_that_does_nothing_fails(only_cpu, capsys):
    only_cpu.setattr(Bucket, "step", lambda self, rule, config, grads: None)
    assert "FAILED: cpu: Adam8bit update: largest error" in failures(capsys)[1][0]


@pytest.mark.parametrize("threshold", [0.0, 6.0])
def test_wrong_product_fails(monkeypatch, threshold):
    original = torch.nn.functional.linear
    monkeypatch.setattr(torch.nn.functional, "linear", lambda *a: original(*a) * 1.05)
    with pytest.raises(ArithmeticError, match="relative error"):
        checks.linear8bit(CPU, threshold)


def test_outliers_of_the_check_need_the_threshold():
    x = torch.randn(32, 128, generator=torch.Generator().manual_seed(0))
    x[:, 5] = 60.0
    state = bnb.MatmulLtState()
    state.is_training = False
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(1))
    expected = x @ weight.t()
    error = (bnb.matmul(x, weight, state=state) - expected).norm() / expected.norm()
    assert error > checks.INT8_ERROR


def test_sanity_check_on_this_device(device, capsys):
    assert main.sanity_check([torch.device(device)]) == []
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + len(checks.CHECKS)
    assert lines[0].startswith(f"{device}: ")


def test_ops_by_kind():
    native_ops, plain_ops = native.ops_by_kind("cpu")
    assert "quantize_blockwise" in native_ops
    assert not set(native_ops) & set(plain_ops)
    assert native.ops_by_kind("mps")[0] == []


@pytest.mark.parametrize(
    ("architecture", "built", "expected"),
    [
        ("9.0", "", None),
        ("9.0", "90-real", "machine code"),
        ("9.0", "90a-real", "machine code"),
        ("8.6", "80-real", "machine code"),
        ("8.0", "86-real", None),
        ("9.0", "80-real", None),
        ("9.0", "80-virtual", "PTX"),
        ("9.0", "80", "PTX"),
        ("8.0", "80", "machine code"),
        ("8.0", "90-virtual", None),
        ("10.0", "90a", None),
        ("10.0", "90", "PTX"),
        ("12.1", "80-real,90a-real,120", "machine code"),
        ("12.1", "120a", None),
        ("12.1", "120f-real", "machine code"),
        ("13.0", "120f", None),
        ("13.0", "80-real,90a-real,120", "PTX"),
        ("7.5", "80-real,90a-real,120", None),
        ("9.0", "native", "when it was built"),
        ("9.0", "something", None),
        ("gfx942", "gfx90a,gfx942", "machine code"),
        ("gfx90a", "gfx90a:xnack+", "machine code"),
        ("gfx1030", "gfx90a,gfx942", None),
    ],
)
def test_code_for(architecture, built, expected):
    text = native.code_for(architecture, built)
    assert text is None if expected is None else expected in text


def test_package_version():
    assert main.get_package_version("pytest") == pytest.__version__
    assert main.get_package_version("no-such-package") == "not found"


def test_print_helpers(capsys):
    utils.print_header("title", 15, "-")
    utils.print_header("")
    utils.print_dedented("""
        one
          two
    """)
    expected = "---- title ----\n" + "=" * 60 + "\none\n  two\n"
    assert capsys.readouterr().out == expected
