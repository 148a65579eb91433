"""
The README's Python: it runs, its config file loads, and the block types that it adds train. Its commands that
train have flags and configs that there are.

    python -m pytest tests/test_readme.py
"""

import math
import re
import shlex
from string import Template
from types import SimpleNamespace

import pytest

import configurator
import model
from configurator import ROOT, load
from toy_runs import micro_batches, toy
from train import train_step
from training import pretrained

README = (ROOT / 'README.md').read_text()
PYTHON = re.findall(r'^```python\n(.*?)^```', README, re.M | re.S)
NAMES = dict(re.findall(r'^([A-Z]+)="(.*)"$', README, re.M))  # what its commands call by a name
TRAINING = [Template(line).safe_substitute(NAMES)  # the arguments
            for line in re.findall(r'^(?:torchrun .*|python )train\.py (.*)', README, re.M)]


@pytest.fixture
def added(own_blocks):
    """The block types that the README's Python adds, run in order, each piece on its own."""
    known = set(model.BLOCKS)
    for text in PYTHON:
        exec(compile(text, 'README.md', 'exec'), dict(__name__='readme'))
    return sorted(set(model.BLOCKS) - known)


def test_its_config_file_loads(tmp_path):
    texts = [text for text in PYTHON if 'import' not in text]
    assert texts
    for i, text in enumerate(texts):
        path = tmp_path / f'{i}.py'
        path.write_text(text)
        config = load([str(path)])
        assert config.wandb_run_name in text and len(config.block_types) == config.n_layer


def test_its_commands_that_train_load(added, monkeypatch):
    monkeypatch.setattr(pretrained, 'load', lambda source: SimpleNamespace(shape=dict(bias=True)))
    assert len(TRAINING) > 4 and {'--shard=True', '--init_from=gpt2'} <= set(' '.join(TRAINING).split())
    for arguments in TRAINING:
        load(shlex.split(arguments, comments=True))


def test_its_blocks_are_counted_as_they_all_reduce_and_they_train(added):
    assert added and set(added) <= configurator.COMMUNICATIONS.keys()
    for name in added:
        net, config, world = toy([name] * 3)
        x, y = micro_batches(1)[0]
        with model.count_all_reduces() as observed:
            net.raw_model(x, y)[1].backward()
        count = 3 * configurator.COMMUNICATIONS[name]
        assert (observed.forward, observed.backward) == (count, count)
        net.optimizer.zero_grad()
        losses = [train_step(net, [(x, y)], 1e-2, config, world).read()[0] for _ in range(4)]
        assert all(map(math.isfinite, losses))
        assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0] - 0.1
        assert load([f'--block_types={name}']).block_types == [name] * 12
