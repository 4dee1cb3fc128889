# SPDX-License-Identifier: MIT
"""Fixtures of the tests with other packages: a tiny model, saved, and how it is loaded quantized.

The packages are those of requirements/integration.txt. Without them the tests are skipped, unless
BNB_REQUIRE names "integration".
"""

import importlib
import os
import re

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"  # read when the packages are imported


def _import(name):
    if "integration" in re.split(r"[\s,]+", os.environ.get("BNB_REQUIRE", "")):
        return importlib.import_module(name)
    return pytest.importorskip(name)


@pytest.fixture(scope="session")
def transformers():
    module = _import("transformers")
    module.logging.set_verbosity_error()
    module.logging.disable_progress_bar()
    _import("accelerate")
    return module


@pytest.fixture
def accelerate():
    module = _import("accelerate")
    yield module
    # The device that one test asks for is not that of the next.
    module.state.AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session")
def peft(transformers):
    return _import("peft")


@pytest.fixture(scope="session")
def checkpoint(transformers, tmp_path_factory):
    """The folder of a Llama of two layers with random weights."""
    config = transformers.LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("llama")
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


SETTINGS = {
    "nf4": {"bnb_4bit_quant_type": "nf4"},
    "fp4": {"bnb_4bit_quant_type": "fp4"},
    "nf4 double": {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "nf4 in bfloat16": {
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_quant_storage": torch.bfloat16,
        "bnb_4bit_compute_dtype": torch.bfloat16,
    },
    "fp4 in float32": {"bnb_4bit_quant_type": "fp4", "bnb_4bit_quant_storage": torch.float32},
}


@pytest.fixture(params=SETTINGS)
def settings(request):
    return SETTINGS[request.param]


@pytest.fixture
def load(transformers, checkpoint, device):
    """Loads the model, or one from another folder: ``load(**settings)``, ``load(folder)``."""

    def load(folder=checkpoint, **settings):
        if settings:
            settings = {
                "quantization_config": transformers.BitsAndBytesConfig(
                    load_in_4bit=True, **settings
                )
            }
        cls = transformers.AutoModelForCausalLM
        return cls.from_pretrained(folder, device_map=device, **settings).eval()

    return load


@pytest.fixture(params=[0.0, 6.0])
def threshold(request):
    """From which magnitude activations are outliers; 0 for none."""
    return request.param


@pytest.fixture
def load8(transformers, checkpoint, device, threshold):
    """Loads the model in 8 bits, or one from another folder."""

    def load8(folder=checkpoint):
        config = transformers.BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=threshold)
        cls = transformers.AutoModelForCausalLM
        return cls.from_pretrained(folder, device_map=device, quantization_config=config).eval()

    return load8


@pytest.fixture
def tokens(device):
    return torch.arange(3, 19, device=device).view(2, 8)
