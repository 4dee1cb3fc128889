# SPDX-License-Identifier: MIT
"""int8 models of the released transformers, unmodified, with and without outlier columns."""

import copy

import pytest
import torch

import bitsandbytes as bnb
from bitsandbytes.functional import int8_vectorwise_dequant


def layers(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, bnb.nn.Linear8bitLt)}


def stats_of(layer):
    return layer.weight.SCB if layer.weight.SCB is not None else layer.state.SCB


def values_of(layer):
    return int8_vectorwise_dequant(layer.weight.data, stats_of(layer))


def logits(model, tokens):
    with torch.no_grad():
        return model(tokens).logits


def test_a_model_is_quantized_when_loaded(load8, load, tokens, device, threshold):
    model, plain = load8(), load()
    assert len(layers(model)) == 14
    for name, layer in layers(model).items():
        weight = layer.weight
        assert type(weight) is bnb.nn.Int8Params and weight.dtype == torch.int8
        assert weight.device.type == device and not layer.state.has_fp16_weights
        assert layer.state.threshold == threshold
        exact = plain.get_submodule(name).weight
        assert (values_of(layer) - exact).abs().max() < exact.abs().max() / 100
    assert model.get_memory_footprint() < plain.get_memory_footprint() * 0.6
    out = model.generate(tokens, max_new_tokens=6, do_sample=False)
    assert out.shape == (2, 14) and torch.equal(out[:, :8], tokens)
    error = (logits(model, tokens) - logits(plain, tokens)).abs().mean()
    assert 0 < error < 0.05 * logits(plain, tokens).abs().mean()


@pytest.mark.parametrize("used", [False, True])
def test_save_and_load(load8, tokens, tmp_path, used):
    model = load8()
    if used:
        model.generate(tokens[:1], max_new_tokens=2, do_sample=False)
    model.save_pretrained(tmp_path)
    loaded = load8(tmp_path)
    for (name, layer), other in zip(layers(loaded).items(), layers(model).values(), strict=True):
        assert torch.equal(layer.weight.data, other.weight.data), name
        assert torch.equal(stats_of(layer), stats_of(other)), name
    assert torch.equal(logits(loaded, tokens), logits(model, tokens))


def test_serialized_names(load8, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    load8().save_pretrained(tmp_path)
    tensors = safetensors.load_file(tmp_path / "model.safetensors")
    prefix = "model.layers.0.mlp.up_proj"
    names = {"weight": torch.int8, "SCB": torch.float32, "weight_format": torch.uint8}
    found = {n.removeprefix(prefix + "."): t for n, t in tensors.items() if n.startswith(prefix)}
    assert {n: t.dtype for n, t in found.items()} == names


def test_dequantize(load8, tokens):
    model = load8()
    want = {n: values_of(m) for n, m in layers(model).items()}
    before = logits(model, tokens)
    model = model.dequantize(dtype=torch.float32)
    assert not layers(model)
    for name, weight in want.items():
        torch.testing.assert_close(model.get_submodule(name).weight, weight, rtol=1e-6, atol=1e-7)
    # Without the quantization of activations.
    assert (logits(model, tokens) - before).abs().mean() < 0.05 * before.abs().mean()


def test_state_dicts_and_copies(load8, tokens):
    model, other = load8(), load8()
    state = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        for layer in layers(other).values():
            layer.weight.data.zero_()
    other.load_state_dict(state)
    assert torch.equal(logits(other, tokens), logits(model, tokens))
    assert torch.equal(logits(copy.deepcopy(model), tokens), logits(model, tokens))


def test_gradients_after_an_evaluation(load8, tokens):
    model, grads = load8(), []
    for evaluate in (False, True):
        if evaluate:
            model.generate(tokens, max_new_tokens=2, do_sample=False)
        embedded = model.get_input_embeddings()(tokens).detach().requires_grad_()
        model(inputs_embeds=embedded).logits.square().sum().backward()
        grads.append(embedded.grad)
    assert torch.equal(*grads) and grads[0].abs().sum() > 0


def test_a_model_compiles_into_one_graph(load8, tokens):
    torch._dynamo.reset()
    model = load8()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(tokens).logits, model(tokens).logits)


def test_outlier_features_are_multiplied_in_floating_point(
    load8, load, tokens, threshold, tmp_path
):
    """A feature of the residual stream that is as large as those of trained models."""
    plain, errors = load(), []
    for planted in (False, True):
        if planted:
            with torch.no_grad():
                plain.get_input_embeddings().weight[:, 5] += 0.4
                plain.model.norm.weight[5] = 0.05
                for block in plain.model.layers:
                    for norm in (block.input_layernorm, block.post_attention_layernorm):
                        norm.weight[5] = 6.0
                    attention, mlp = block.self_attn, block.mlp
                    queries, keys, values = attention.q_proj, attention.k_proj, attention.v_proj
                    for reader in (queries, keys, values, mlp.gate_proj, mlp.up_proj):
                        reader.weight[:, 5] *= 0.2
        plain.save_pretrained(tmp_path / str(planted))
        model = load8(tmp_path / str(planted))
        for name, layer in layers(model).items():
            # What is looked at is the quantization of activations.
            plain.get_submodule(name).weight.data = values_of(layer)
        want = logits(plain, tokens)
        errors.append(((logits(model, tokens) - want).norm() / want.norm()).item())
    indices = {n: layer.state.idx for n, layer in layers(model).items()}
    if threshold:
        assert indices["model.layers.0.self_attn.q_proj"].tolist() == [5]
        assert errors[1] < 1.2 * errors[0]
    else:
        assert all(idx is None for idx in indices.values())
        assert errors[1] > 3 * errors[0]
