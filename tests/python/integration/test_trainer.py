# SPDX-License-Identifier: MIT
"""Every optimizer that the Trainer of the released transformers takes from here, and resuming."""

import pytest
import torch
from torch import nn

import bitsandbytes as bnb

NAMES = {
    "adamw_bnb_8bit": ("AdamW", 8, False),
    "adamw_8bit": ("AdamW", 8, False),
    "lion_8bit": ("Lion", 8, False),
    "lion_32bit": ("Lion", 32, False),
    "ademamix": ("AdEMAMix", 32, False),
    "ademamix_8bit": ("AdEMAMix", 8, False),
    "rmsprop_bnb": ("RMSprop", 32, False),
    "rmsprop_bnb_8bit": ("RMSprop", 8, False),
    "rmsprop_bnb_32bit": ("RMSprop", 32, False),
    "paged_adamw_32bit": ("AdamW", 32, True),
    "paged_adamw_8bit": ("AdamW", 8, True),
    "paged_lion_32bit": ("Lion", 32, True),
    "paged_lion_8bit": ("Lion", 8, True),
    "paged_ademamix_32bit": ("AdEMAMix", 32, True),
    "paged_ademamix_8bit": ("AdEMAMix", 8, True),
}


class Model(nn.Module):
    """Parameters large enough for 8-bit states, and an embedding, which keeps 32 bits."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(80, 64)
        self.hidden = nn.Linear(64, 80)
        self.head = nn.Linear(80, 4)

    def forward(self, tokens, labels):
        hidden = self.hidden(self.embedding(tokens).mean(1)).relu()
        logits = self.head(hidden)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


class Data(torch.utils.data.Dataset):
    """Sixteen examples."""

    def __len__(self):
        return 16

    def __getitem__(self, i):
        tokens = torch.arange(8) * (i + 3) % 80
        return {"tokens": tokens, "labels": torch.tensor(i % 4)}


@pytest.fixture
def run(transformers, accelerate, device):
    def run(folder, name, resume=None, **settings):
        torch.manual_seed(0)
        arguments = transformers.TrainingArguments(
            output_dir=str(folder),
            optim=name,
            max_steps=6,
            save_steps=3,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            use_cpu=device == "cpu",
            report_to=[],
            logging_steps=1,
            seed=1,
            disable_tqdm=True,
            **settings,
        )
        trainer = transformers.Trainer(model=Model(), args=arguments, train_dataset=Data())
        trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
        return trainer

    return run


def optimizer_of(trainer):
    optimizer = trainer.optimizer
    return getattr(optimizer, "optimizer", optimizer)


def test_every_name_is_here(transformers):
    from transformers.training_args import OptimizerNames

    ours = ("bnb", "8bit", "paged", "lion", "ademamix")
    theirs = ("galore", "torch", "apollo")  # from other packages
    known = {o.value for o in OptimizerNames if any(part in o.value for part in ours)}
    assert {n for n in known if not any(part in n for part in theirs)} | {"rmsprop_bnb"} == set(
        NAMES
    )


@pytest.mark.parametrize("name", NAMES)
def test_resuming_is_not_interrupting(run, tmp_path, name):
    if NAMES[name][2] and bnb.paged.unavailable(torch.device("cuda", 0)) is not None:
        pytest.skip("needs paged memory")
    whole = run(tmp_path / "whole", name)
    cls, bits, paged = NAMES[name]
    optimizer = optimizer_of(whole)
    assert isinstance(optimizer, getattr(bnb.optim, cls))
    assert optimizer.args.optim_bits == bits and optimizer.is_paged == paged
    states = {n: optimizer.state[p] for n, p in whole.model.named_parameters()}
    assert states["embedding.weight"]["state1"].dtype == torch.float32
    expected = torch.uint8 if bits == 8 else torch.float32
    assert states["hidden.weight"]["state1"].dtype == expected
    losses = [entry["loss"] for entry in whole.state.log_history if "loss" in entry]
    assert len(losses) == 6 and losses[-1] < losses[0]

    resumed = run(tmp_path / "resumed", name, tmp_path / "whole" / "checkpoint-3")
    assert resumed.state.global_step == 6
    for (key, value), other in zip(
        resumed.model.named_parameters(), whole.model.parameters(), strict=True
    ):
        assert torch.equal(value, other), key
