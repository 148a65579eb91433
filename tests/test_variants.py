"""
The experiment's block variants and the measure of drift, against a loop over ranks.

    python -m pytest tests/test_variants.py
"""

import pytest
import torch
import torch.nn.functional as F
from reference import attention, layer_norm, mlp

import variants
from configurator import communications
from training.drift import measure_drift
from model import BLOCKS, GPT, GPTConfig, count_all_reduces

R, B, T, C, V = 4, 2, 7, 16, 29
# four layers' block types, the (layer, sublayer)s that a sync follows, the weight of sum_r d_r in it
MERGES = {
    'mean_tp': (['mean_tp'] * 4, {(i, kind) for i in range(4) for kind in ('attn', 'mlp')}, 1 / R),
    'mean': (['mean_spd', 'mean_parallel'] * 2, {(0, 'mlp'), (2, 'mlp')}, 1 / R),
    'attn': (['attn_spd', 'parallel', 'attn_spd', 'attn_spd'], {(0, 'attn'), (2, 'attn'), (3, 'attn')}, 1),
}


def network(block_types):
    model = GPT(GPTConfig(T, V, 4, 4, C, bias=True, tp_size=R, block_types=block_types)).double()
    with torch.no_grad():
        for p in model.parameters():    # no bias is 0 and no gain 1
            p.add_(0.1 * torch.randn_like(p))
    return model


def loop_over_ranks(model, idx, syncs, weight):
    """(logits, ||d_r|| / ||c|| of each sublayer, mean cosine of the last d); a sync adds weight * sum d."""
    w = model.state_dict()
    c = w['transformer.wte.weight'][idx] + w['transformer.wpe.weight'][:idx.size(1)]
    d, drift = [torch.zeros_like(c)] * R, []
    for i in range(model.config.n_layer):
        for sublayer, kind, norm in ((attention, 'attn', 'ln_1'), (mlp, 'mlp', 'ln_2')):
            drift.append((sum(d_r.norm() for d_r in d) / R / c.norm()).item())
            block = f'transformer.h.{i}.'
            ln = w[f'{block}{norm}.weight'], w[f'{block}{norm}.bias']
            d = [d_r + sublayer(w, block + kind, layer_norm(c + d_r, *ln), r, model.config)
                 for r, d_r in enumerate(d)]
            c = c + w[f'{block}{kind}.c_proj.bias']
            if (i, kind) in syncs:
                c, d = c + weight * sum(d), [torch.zeros_like(c)] * R
    drift.append((sum(d_r.norm() for d_r in d) / R / c.norm()).item())
    pairs = [F.cosine_similarity(d[r], d[s], dim=-1).mean() for r in range(R) for s in range(r)]
    c = layer_norm(c + weight * sum(d), w['transformer.ln_f.weight'], w['transformer.ln_f.bias'])
    return c @ w['transformer.wte.weight'].T, drift, torch.stack(pairs).mean().item()


@pytest.mark.parametrize('name', MERGES)
def test_a_variant_and_its_drift_equal_a_loop_over_ranks(name):
    block_types, syncs, weight = MERGES[name]
    model, idx = network(block_types), torch.randint(V, (B, T))
    logits, drift, cosine = loop_over_ranks(model, idx, syncs, weight)
    with count_all_reduces() as observed:
        ours = model(idx)[0]
        ours.sum().backward()
    assert (ours - logits).abs().max() < 1e-12
    # drift that is left is merged at the end
    assert observed.forward == observed.backward == len(syncs | {(3, 'mlp')})
    measured, cosines = measure_drift(model, idx)
    assert measured == pytest.approx(drift, rel=1e-12)
    assert cosines[-1] is None or cosines[-1] == pytest.approx(cosine, rel=1e-12)
    assert [value is None for value in cosines] == [value == 0 for value in drift]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_synced_model_never_drifts_and_one_rank_has_no_pair():
    idx = torch.randint(V, (B, T))
    assert measure_drift(network(['tp'] * 4), idx) == ([0.0] * 9, [None] * 9)
    model = GPT(GPTConfig(T, V, 1, 4, C, tp_size=1, block_types=['parallel']))
    drift, cosine = measure_drift(model, idx)
    assert drift[1] > 0 and cosine == [None] * 3


def test_variants_are_counted_as_their_plain_types():
    assert variants.COMMUNICATIONS.keys() == BLOCKS.keys()
    plain = communications(['spd', 'parallel'] * 6, 2)
    assert communications(['mean_spd', 'mean_parallel'] * 6, 2) == plain == 8
    assert communications(['attn_spd'] * 11 + ['spd'], 2) == communications(['spd'] * 12, 2) == 12
