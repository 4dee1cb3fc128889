# SPDX-License-Identifier: MIT
"""Adapters of the released PEFT on int8 models: training, merging, saving."""

import pytest
import torch

import bitsandbytes as bnb
from bitsandbytes.functional import int8_vectorwise_dequant, int8_vectorwise_quant

pytestmark = pytest.mark.filterwarnings("ignore:(Merge|Unmerge|All adapters)")


def adapted(peft, model, targets="all-linear", **settings):
    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM", **settings
    )
    return peft.get_peft_model(model, config)


def bases(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, bnb.nn.Linear8bitLt)}


def logits(model, tokens):
    with torch.no_grad():
        return model(tokens).logits


def stats_of(layer):
    return layer.weight.SCB if layer.weight.SCB is not None else layer.state.SCB


def merged(adapter):
    """The codes and statistics that merging must give."""
    base = adapter.base_layer
    values = int8_vectorwise_dequant(base.weight.data, stats_of(base))
    with torch.no_grad():
        values = values + adapter.get_delta_weight("default")
    return int8_vectorwise_quant(values)[:2]


def train(model, tokens, steps=5):
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = bnb.optim.AdamW32bit(trained, lr=1e-2)
    losses = []
    model.train()
    for _ in range(steps):
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    return losses


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training(peft, load8, tokens, checkpointing):
    model = peft.prepare_model_for_kbit_training(
        load8(),
        use_gradient_checkpointing=checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
    )
    model = adapted(peft, model)
    before = {n: m.weight.data.clone() for n, m in bases(model).items()}
    assert len(before) == 14
    losses = train(model, tokens)
    assert losses[-1] < losses[0] - 0.1
    for name, base in bases(model).items():
        assert torch.equal(base.weight.data, before[name]) and base.weight.grad is None


def test_gradients_of_adapters_after_an_evaluation(peft, load8, tokens):
    grads = []
    for evaluate in (False, True):
        model = adapted(peft, load8(), init_lora_weights=False)
        if evaluate:
            logits(model, tokens)
        model.train()
        model(tokens, labels=tokens).loss.backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
        assert all(g.abs().sum() > 0 for g in grads[-1])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("used", [False, True])
def test_merging_and_unmerging(peft, load8, tokens, used):
    model = adapted(peft, load8(), init_lora_weights=False)
    if used:
        logits(model, tokens)
    adapters = [m for m in model.modules() if hasattr(m, "lora_A")]
    want = [merged(adapter) for adapter in adapters]
    model.merge_adapter()
    for adapter, (codes, stats) in zip(adapters, want, strict=True):
        base = adapter.base_layer
        assert type(base.weight) is bnb.nn.Int8Params
        assert (base.weight.data.int() - codes.int()).abs().max() <= 1
        torch.testing.assert_close(stats_of(base), stats, rtol=1e-5, atol=0)
    model.unmerge_adapter()
    before = logits(model, tokens)
    bound = before.abs().mean() / 10
    model.merge_adapter()
    assert 0 < (logits(model, tokens) - before).abs().mean() < bound
    model = model.merge_and_unload()
    assert not any(hasattr(m, "lora_A") for m in model.modules())
    assert (logits(model, tokens) - before).abs().mean() < bound


def test_a_merged_model_is_saved(peft, load8, tokens, tmp_path):
    model = adapted(peft, load8(), init_lora_weights=False).merge_and_unload()
    want = logits(model, tokens)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(load8(tmp_path), tokens), want)


def test_saved_adapters(peft, load8, tokens, tmp_path):
    model = adapted(peft, load8(), init_lora_weights=False)
    want = logits(model, tokens)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(load8(), tmp_path)
    assert torch.equal(logits(loaded, tokens), want)


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"init_lora_weights": "olora"}])
def test_other_ways_to_begin(peft, load8, tokens, settings):
    model = adapted(peft, load8(), ["q_proj", "down_proj"], **settings)
    assert all(type(m.weight) is bnb.nn.Int8Params for m in bases(model).values())
    losses = train(model, tokens)
    assert losses[-1] < losses[0]
