# SPDX-License-Identifier: MIT
"""4-bit models of the released transformers, unmodified."""

import copy

import pytest
import torch

import bitsandbytes as bnb
from bitsandbytes.functional import dequantize_4bit


def layers(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, bnb.nn.Linear4bit)}


def logits(model, tokens):
    with torch.no_grad():
        return model(tokens).logits


def assert_same_state(model, other):
    state, want = model.state_dict(), other.state_dict()
    assert list(state) == list(want)
    for key, value in want.items():
        a, b = (t.reshape(-1).view(torch.uint8) for t in (state[key], value))
        assert torch.equal(a, b), key


def test_a_model_is_quantized_when_loaded(load, settings, tokens, device):
    model, plain = load(**settings), load()
    assert len(layers(model)) == 14
    storage = settings.get("bnb_4bit_quant_storage", torch.uint8)
    for name, layer in layers(model).items():
        weight = layer.weight
        assert type(weight) is bnb.nn.Params4bit and weight.dtype == storage
        assert weight.device.type == device and layer.quant_state is weight.quant_state
        assert weight.quant_type == settings["bnb_4bit_quant_type"]
        assert weight.quant_state.nested == settings.get("bnb_4bit_use_double_quant", False)
        exact = plain.get_submodule(name).weight
        error = (dequantize_4bit(weight.data, weight.quant_state) - exact).abs().mean()
        assert 0 < error < 0.15 * exact.abs().mean()
    assert model.num_parameters() == plain.num_parameters()
    assert model.get_memory_footprint() < plain.get_memory_footprint() / 2
    out = model.generate(tokens, max_new_tokens=6, do_sample=False)
    assert out.shape == (2, 14) and torch.equal(out[:, :8], tokens)
    error = (logits(model, tokens) - logits(plain, tokens)).abs().mean()
    assert error < 0.5 * logits(plain, tokens).abs().mean()


@pytest.mark.parametrize("used", [False, True])
def test_save_and_load(load, settings, tokens, tmp_path, used):
    model = load(**settings)
    if used:
        model.generate(tokens[:1], max_new_tokens=2, do_sample=False)
    model.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert_same_state(loaded, load(**settings))
    assert torch.equal(logits(loaded, tokens), logits(model, tokens))
    for name, layer in layers(loaded).items():
        assert layer.weight.module is layer and layer.quant_state is layer.weight.quant_state
        assert layer.quant_state == layers(model)[name].quant_state


def test_serialized_names(load, checkpoint, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    load(bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True).save_pretrained(tmp_path)
    names = set(safetensors.load_file(tmp_path / "model.safetensors"))
    prefix = "model.layers.0.mlp.up_proj.weight"
    assert {n for n in names if n.startswith(prefix)} == {
        prefix,
        f"{prefix}.absmax",
        f"{prefix}.quant_map",
        f"{prefix}.nested_absmax",
        f"{prefix}.nested_quant_map",
        f"{prefix}.quant_state.bitsandbytes__nf4",
    }


def test_dequantize(load, settings, tokens):
    model = load(**settings)
    want = {n: dequantize_4bit(m.weight.data, m.quant_state) for n, m in layers(model).items()}
    before = logits(model, tokens)
    model = model.dequantize(dtype=torch.float32)
    assert not layers(model)
    for name, weight in want.items():
        assert torch.equal(model.get_submodule(name).weight, weight.float())
    tolerance = 1e-5 if settings.get("bnb_4bit_compute_dtype") is None else 3e-2
    torch.testing.assert_close(logits(model, tokens), before, rtol=tolerance, atol=tolerance)


def test_state_dicts_and_copies(load, settings, tokens):
    model, other = load(**settings), load(**settings)
    state = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        for layer in layers(other).values():
            layer.weight.data = torch.zeros_like(layer.weight.data)
    other.load_state_dict(state)
    assert torch.equal(logits(other, tokens), logits(model, tokens))
    assert torch.equal(logits(copy.deepcopy(model), tokens), logits(model, tokens))


def test_gradients_after_an_evaluation(load, settings, tokens):
    model, grads = load(**settings), []
    for evaluate in (False, True):
        if evaluate:
            logits(model, tokens)
            model.generate(tokens, max_new_tokens=2, do_sample=False)
        embedded = model.get_input_embeddings()(tokens).detach().requires_grad_()
        model(inputs_embeds=embedded).logits.square().sum().backward()
        grads.append(embedded.grad)
    assert torch.equal(*grads) and grads[0].abs().sum() > 0


def test_a_model_compiles_into_one_graph(load, tokens, settings):
    torch._dynamo.reset()
    model = load(**settings)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(tokens).logits, model(tokens).logits)
