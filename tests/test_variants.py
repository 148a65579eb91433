"""
variants.py and the merge by the mean, compared with the loop over ranks.

    python -m pytest tests/test_variants.py
"""

import json

import pytest
import torch

import configurator
from configurator import communications
from model import BLOCKS, GPT, count_all_reduces
from reference import reference_gpt
from training.rundir import read_info
from variants import gpt_config

R, B, T, C, V = 4, 2, 7, 16, 29
MIXES = [
    ['attn_spd', 'parallel', 'attn_spd', 'attn_spd'], ['spd', 'attn_spd', 'tp', 'parallel'],
    ['parallel', 'parallel', 'attn_spd', 'spd'], ['tp', 'parallel', 'spd', 'parallel'], ['tp'] * 4]


def network(block_types, **settings):
    keys = dict(block_size=T, n_layer=4, n_head=4, n_embd=C, bias=True, tp_size=R, block_types=block_types)
    model = GPT(gpt_config(keys | settings, V)).double()
    with torch.no_grad():
        for p in model.parameters():  # no bias is 0 and no gain 1
            p.add_(0.1 * torch.randn_like(p))
    return model


@pytest.mark.parametrize('merge', ['sum', 'mean'])
@pytest.mark.parametrize('block_types', MIXES, ids='-'.join)
def test_logits_equal_the_loop_over_ranks(block_types, merge):
    model, idx = network(block_types, merge=merge), torch.randint(V, (B, T))
    logits, syncs = reference_gpt(model.state_dict(), model.config, idx)
    with count_all_reduces() as observed:
        ours = model(idx)[0]
        ours.sum().backward()
    torch.testing.assert_close(ours, logits, rtol=0, atol=1e-12)
    assert observed.forward == observed.backward == syncs


@pytest.mark.parametrize('name', ['tp', 'spd', 'parallel', 'attn_spd'])
def test_the_registry_counts_what_a_layer_all_reduces(name):
    model, idx = network([name] * 4), torch.randint(V, (B, T))
    with count_all_reduces() as observed:
        model(idx, idx)[1].backward()
    # a layer that leaves the ranks apart is synced by the next one, and the last by the end of the model
    assert observed.forward == max(4 * configurator.COMMUNICATIONS[name], 1) + (name == 'attn_spd')


def test_the_registry_and_the_classes_have_the_same_names():
    assert configurator.COMMUNICATIONS.keys() == BLOCKS.keys()
    assert communications(['attn_spd'] * 11 + ['spd'], 2) == communications(['spd'] * 12, 2) == 12


def test_a_saved_run_with_the_former_names_is_read_as_merge_mean(tmp_path):
    saved = dict(name='a', state='finished', corpus={}, all_reduces={}, parameters=1, communications=8,
                 iter=9, val_loss=2.5, config=dict(n_layer=4, block_types=['mean_spd', 'mean_parallel'] * 2))
    (tmp_path / 'run.json').write_text(json.dumps(saved))
    config = read_info(tmp_path)['config']
    assert config['block_types'] == ['spd', 'parallel'] * 2 and config['merge'] == 'mean'
    assert config['n_layer'] == 4 and config['tp_size'] == 2  # a key that is not there takes its default
    saved['config']['block_types'] = ['spd', 'attn_spd'] * 2
    (tmp_path / 'run.json').write_text(json.dumps(saved))
    config = read_info(tmp_path)['config']
    assert config['block_types'] == ['spd', 'attn_spd'] * 2 and config['merge'] == 'sum'
