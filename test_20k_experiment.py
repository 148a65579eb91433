"""
The pre-flight: do the experiment's configs load, have the size they should, and run?

    python test_20k_experiment.py           # the eight configs of the experiment, at full size, in about a minute
    python -m pytest test_20k_experiment.py

Needs no data, no tokenizer, no network, no GPU. Exit status 0 if every check passes.
"""

import math
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from configurator import ROOT, communications, load
from model import GPT, GPTConfig, count_all_reduces

RUNS = [f'config/train_gpt2{name}.py'
        for name in ('', '_24comm', '_18comm', '_16comm', '_12comm', '_8comm', '_6comm', '_2comm')]
VOCAB_SIZE = 50304                      # GPT-2's 50,257 rounded up to a multiple of 64
MAY_DIFFER = {'out_dir', 'wandb_run_name', 'block_types'}


def build(path):
    """The config in a file and its model at full size, initial weights included."""
    config = load([str(ROOT / path)])
    shape = {field.name: getattr(config, field.name) for field in fields(GPTConfig) if field.name != 'vocab_size'}
    torch.manual_seed(config.seed)
    return config, GPT(GPTConfig(vocab_size=VOCAB_SIZE, **shape))


def observe(model):
    """(loss at init in nats a token, shape of the logits, AllReduces) on two windows of random tokens."""
    tokens = torch.randint(VOCAB_SIZE, (2, 33), generator=torch.Generator().manual_seed(0))
    with count_all_reduces() as observed:
        loss = model(tokens[:, :-1], tokens[:, 1:])[1]
        loss.backward()
    with torch.no_grad():
        logits, _ = model(tokens[:, :-1])
    return loss.item(), logits.shape, observed
