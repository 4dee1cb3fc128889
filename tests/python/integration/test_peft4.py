# SPDX-License-Identifier: MIT
"""Adapters of the released PEFT on 4-bit models: training, merging, initialisations."""

import pytest
import torch

import bitsandbytes as bnb
from bitsandbytes.functional import dequantize_4bit, quantize_4bit

pytestmark = pytest.mark.filterwarnings("ignore:(Merge|Unmerge)")
QLORA = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}


def adapted(peft, model, targets="all-linear", **settings):
    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM", **settings
    )
    return peft.get_peft_model(model, config)


def bases(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, bnb.nn.Linear4bit)}


def logits(model, tokens):
    with torch.no_grad():
        return model(tokens).logits


def merged(adapter):
    """The codes and the state that merging must give."""
    weight = adapter.base_layer.weight
    numbers = dequantize_4bit(weight.data, weight.quant_state)
    with torch.no_grad():
        numbers = numbers + adapter.get_delta_weight("default")
    return quantize_4bit(
        numbers,
        quant_type=weight.quant_type,
        compress_statistics=weight.compress_statistics,
        quant_storage=weight.quant_storage,
    )


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
def test_training(peft, load, settings, tokens, checkpointing):
    model = peft.prepare_model_for_kbit_training(
        load(**settings),
        use_gradient_checkpointing=checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
    )
    model = adapted(peft, model)
    before = {n: m.weight.data.clone() for n, m in bases(model).items()}
    assert len(before) == 14
    losses = train(model, tokens)
    assert losses[-1] < losses[0] - 0.1
    for name, base in bases(model).items():
        assert torch.equal(base.weight.data.view(torch.uint8), before[name].view(torch.uint8))
        assert base.weight.grad is None


def test_gradients_of_adapters_after_an_evaluation(peft, load, tokens):
    grads = []
    for evaluate in (False, True):
        model = adapted(peft, load(**QLORA), init_lora_weights=False)
        if evaluate:
            logits(model, tokens)
        model.train()
        model(tokens, labels=tokens).loss.backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
        assert all(g.abs().sum() > 0 for g in grads[-1])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_merging_and_unmerging(peft, load, settings, tokens):
    model = adapted(peft, load(**settings), init_lora_weights=False)
    adapters = [m for m in model.modules() if hasattr(m, "lora_A")]
    want = [merged(adapter) for adapter in adapters]
    before = logits(model, tokens)
    model.merge_adapter()
    for adapter, (packed, state) in zip(adapters, want, strict=True):
        base = adapter.base_layer
        assert type(base.weight) is bnb.nn.Params4bit and base.weight.dtype == packed.dtype
        assert torch.equal(base.weight.data.view(torch.uint8), packed.view(torch.uint8))
        assert base.quant_state is base.weight.quant_state and base.quant_state == state
    bound = before.abs().mean() / 2
    assert 0 < (logits(model, tokens) - before).abs().mean() < bound
    model.unmerge_adapter()
    assert (logits(model, tokens) - before).abs().mean() < bound
    model = model.merge_and_unload()
    assert not any(hasattr(m, "lora_A") for m in model.modules())
    assert (logits(model, tokens) - before).abs().mean() < bound


def test_saved_adapters(peft, load, tokens, tmp_path):
    model = adapted(peft, load(**QLORA), init_lora_weights=False)
    want = logits(model, tokens)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(load(**QLORA), tmp_path)
    assert torch.equal(logits(loaded, tokens), want)


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"init_lora_weights": "olora"}])
def test_other_ways_to_begin(peft, load, tokens, settings):
    model = adapted(peft, load(**QLORA), ["q_proj", "down_proj"], **settings)
    assert all(type(m.weight) is bnb.nn.Params4bit for m in bases(model).values())
    losses = train(model, tokens)
    assert losses[-1] < losses[0]


def test_another_kind_of_adapter_merges(peft, load, tokens):
    # This one hands the attributes of packed codes to the numbers that replace them.
    model = peft.get_peft_model(load(**QLORA), peft.RandLoraConfig(r=4, target_modules=["q_proj"]))
    losses = train(model, tokens)
    assert losses[-1] < losses[0]
    adapters = [m for m in model.modules() if hasattr(m, "randlora_lambda") and m is not model]
    adapters = [m for m in adapters if hasattr(m, "base_layer")]
    want = [merged(adapter) for adapter in adapters]
    model.merge_adapter()
    assert len(adapters) == 2
    for adapter, (packed, state) in zip(adapters, want, strict=True):
        assert torch.equal(adapter.base_layer.weight.data, packed)
        assert adapter.base_layer.weight.quant_state == state
    assert logits(model, tokens).isfinite().all()
