# SPDX-License-Identifier: MIT
"""Mixtures of experts of the released transformers, with their experts in 4 bits."""

import copy

import pytest
import torch

import bitsandbytes as bnb

SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
# Families: fused gates; many experts; weights [experts, in, out] with biases.
FAMILIES = {
    "Mixtral": {"intermediate_size": 48, "num_local_experts": 4, "num_experts_per_tok": 2},
    "Qwen3Moe": {"moe_intermediate_size": 40, "num_experts": 9, "num_experts_per_tok": 3},
    "GptOss": {"intermediate_size": 48, "num_local_experts": 4, "num_experts_per_tok": 2},
}


def make(transformers, family, device):
    config = getattr(transformers, f"{family}Config")(**SIZES, **FAMILIES[family])
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    for name, param in model.named_parameters():
        if name.endswith("_bias"):
            torch.nn.init.normal_(param)
    return model.to(device)


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def models(transformers, family, device):
    """A model with 4-bit experts, and the same with the numbers that its codes stand for."""
    plain = make(transformers, family, device)
    model = copy.deepcopy(plain)
    names = bnb.nn.replace_experts_4bit(model, compress_statistics=family == "Mixtral")
    assert len(names) == 4 and all(".experts." in name for name in names)
    with torch.no_grad():
        for name in names:
            path, _, param = name.rpartition(".")
            getattr(plain.get_submodule(path), param).copy_(
                getattr(model.get_submodule(path), param)
            )
    return model, plain


def logits(model, tokens):
    with torch.no_grad():
        return model(tokens).logits


def test_logits_and_generation_are_those_of_the_numbers(models, tokens):
    model, plain = models
    assert model.config._experts_implementation == "bitsandbytes_4bit"
    assert plain.config._experts_implementation != "bitsandbytes_4bit"
    torch.testing.assert_close(logits(model, tokens), logits(plain, tokens), rtol=1e-4, atol=1e-4)
    outs = [m.generate(tokens, max_new_tokens=6, do_sample=False) for m in models]
    assert torch.equal(*outs)
    assert model.get_memory_footprint() < 0.8 * plain.get_memory_footprint()


def test_no_expert_is_dequantized(models, tokens, monkeypatch):
    step = bnb.nn.parametrize.Bnb4bitParametrization
    monkeypatch.setattr(step, "forward", lambda *_: pytest.fail("dequantized"))
    logits(models[0], tokens)


def test_gradients_are_those_of_the_numbers(models, tokens):
    grads = []
    for model in models:
        model(tokens).logits.square().sum().backward()
        grads.append([p.grad for n, p in model.named_parameters() if "experts" not in n])
    for got, want in zip(*grads, strict=True):
        scale = want.abs().max().item()
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4 * scale)


def test_other_implementations_read_the_numbers(models, tokens):
    model, plain = models
    model.set_experts_implementation("eager")
    torch.testing.assert_close(logits(model, tokens), logits(plain, tokens), rtol=1e-4, atol=1e-4)
    # Experts that are not packed are computed as ever.
    plain.set_experts_implementation("bitsandbytes_4bit")
    torch.testing.assert_close(logits(model, tokens), logits(plain, tokens), rtol=1e-4, atol=1e-4)


def test_save_and_load(transformers, family, device, models, tokens, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    model, _ = models
    # The original format of these models has a tensor for each expert.
    model.save_pretrained(tmp_path, save_original_format=False)
    loaded = make(transformers, family, device)
    with torch.no_grad():
        for param in loaded.parameters():
            param.add_(1.0)
    bnb.nn.replace_experts_4bit(loaded, compress_statistics=family == "Mixtral")
    loaded.load_state_dict(safetensors.load_file(tmp_path / "model.safetensors"))
    assert torch.equal(logits(loaded, tokens), logits(model, tokens))


def test_a_model_compiles_into_one_graph(models, tokens):
    torch._dynamo.reset()
    model, _ = models
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(tokens).logits, logits(model, tokens))
