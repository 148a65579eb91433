"""
The measures of training/diagnostics.py, compared with plain loops over the ranks of a reference.

    python -m pytest tests/test_diagnostics.py
"""

import itertools
import math

import pytest
import torch

from model import GPT, count_all_reduces
from reference import layer_norm, reference_loss
from reference_rivals import reference_rivals
from toy_runs import DROPOUT, MEASURED, column, metrics, refused, run
from training import checkpoint
from training.diagnostics import diagnose
from training.logger import as_charts, from_charts
from training.rundir import read_metrics
from variants import gpt_config

B, T, C, V, R = 3, 5, 12, 29, 3
CASES = [(['tp', 'spd', 'parallel', 'parallel'], {}),
         (['parallel', 'spd', 'tp', 'parallel'], dict(merge='mean')),
         (['parallel', 'palm', 'palm', 'attn_spd'], dict(merge='desync')), (['dtp'] * 4, dict(dtp_delay=3)),
         (['fal', 'parallel', 'fal', 'caat'], dict(embed_scale=3.0)),
         (['parallel', 'stale', 'stale', 'spd'], {}), (['ladder', 'parallel', 'ladder', 'spd'], {})]


def network(block_types, tp_size=R, **settings):
    """A small GPT in float64, every parameter far from its init, and its tokens and targets, (B, T)."""
    keys = dict(block_size=T, n_layer=len(block_types), n_head=6, n_embd=C, bias=True, tp_size=tp_size)
    model = GPT(gpt_config(keys | dict(block_types=block_types) | settings, V)).double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model, *torch.randint(V, (2, B, T))


def tokens_of(u):
    """(B, T, C) -> (N, C), the mean over tokens subtracted"""
    x = u.flatten(0, 1)
    return x - x.mean(0)


def effective_rank(x):
    """From the eigenvalues of the covariance of x (N, D)."""
    eigenvalues = torch.linalg.eigvalsh(x.T @ x)
    return eigenvalues.sum() ** 2 / (eigenvalues**2).sum()


def cka(x, y):
    """From the kernels over pairs of tokens, as Kornblith et al. define it."""
    K, L = x @ x.T, y @ y.T
    return torch.trace(K @ L) / torch.sqrt(torch.trace(K @ K) * torch.trace(L @ L))


def expected(model, idx, targets):
    """What diagnose() should return, from the reference."""
    n, tp_size = model.config.n_layer, model.config.tp_size
    w = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    reads, streams = {}, {}

    def see(place, u, ranks):
        reads[place], streams[place] = u, ranks.all_in()

    logits, _ = reference_rivals(w, model.config, idx, see=see)
    reference_loss(logits, targets).backward()
    found = {name: [] for name in ('dispersion', 'cka', 'rank_one', 'rank_all')}
    for place in range(2 * n + 1):
        u, x = reads[place], [tokens_of(u_r) for u_r in reads[place]]
        mean = sum(u) / tp_size
        apart = sum(((u_r - mean)**2).sum() for u_r in u)
        found['dispersion'].append(apart / sum((u_r**2).sum() for u_r in u))
        pairs = list(itertools.combinations(x, 2))
        found['cka'].append(sum(cka(*pair) for pair in pairs) / len(pairs))
        found['rank_one'].append(sum(map(effective_rank, x)) / tp_size)
        found['rank_all'].append(effective_rank(torch.cat(x, 1)))

    def loss(c):
        ln_f = w['transformer.ln_f.weight'], w['transformer.ln_f.bias']
        return reference_loss(layer_norm(c, *ln_f) @ w['transformer.wte.weight'].T, targets)

    found['lens_synced'] = [loss(streams[place]) for place in range(2 * n + 1)]
    found['lens_alone'] = [sum(map(loss, reads[place])) / tp_size for place in range(2 * n + 1)]

    def norm(*gradients):
        return sum((gradient**2).sum() for gradient in gradients).sqrt()

    def parts(i, kind, r):
        """Rank r's slices of a sublayer's gradients."""
        g = {key.removeprefix(f'transformer.h.{i}.{kind}.'): p.grad for key, p in w.items()}
        D = (C if kind == 'attn' else 4 * C) // tp_size
        mine = slice(r * D, (r + 1) * D)
        if kind == 'mlp':
            return [g['c_fc.weight'][mine], g['c_fc.bias'][mine], g['c_proj.weight'][:, mine]]
        thirds = [*g['c_attn.weight'].split(C), *g['c_attn.bias'].split(C)]
        return [third[mine] for third in thirds] + [g['c_proj.weight'][:, mine]]

    places = [(i, kind) for i in range(n) for kind in ('attn', 'mlp')]
    grads = {name: p.grad for name, p in w.items()}
    found['grad'] = [norm(*(g for name, g in grads.items() if f'h.{i}.{kind}.' in name))
                     for i, kind in places]
    found['grad'].append(norm(grads['transformer.wte.weight'], grads['transformer.wpe.weight']))
    norms = [f'h.{i}.ln_{1 + (kind == "mlp")}.' for i, kind in places] + ['transformer.ln_f.']
    found['grad_ln'] = [norm(*(g for name, g in grads.items() if ln in name)) for ln in norms]
    for r in range(tp_size):
        found[f'grad_rank_{r}'] = [norm(*parts(*place, r)) for place in places] + [None]
    e = reads[0][0]
    found['attention_over_embedding'] = sum((u_r - e).norm() / e.norm() for u_r in reads[1]) / tp_size
    return found


@pytest.mark.parametrize('block_types, settings', CASES, ids=['-'.join(case[0]) for case in CASES])
def test_measures_equal_loops_over_ranks(block_types, settings):
    model, idx, targets = network(block_types, **settings)
    targets[0, 1] = -1
    found, wanted = diagnose(model, idx, targets), expected(model, idx, targets)
    assert found.keys() == wanted.keys()
    for i, name in enumerate(block_types):
        # where the MLP does not read the attention, the reference's stream is still without it
        if name in ('palm', 'stale', 'fal') or settings.get('merge') == 'desync':
            found['lens_synced'][2 * i + 1] = wanted['lens_synced'][2 * i + 1] = None
    apart = found.pop('attention_over_embedding'), wanted.pop('attention_over_embedding').item()
    assert apart[0] == pytest.approx(apart[1], rel=1e-5, abs=1e-12)
    for key, values in wanted.items():
        want = [math.nan if value is None else value.item() for value in values]
        got = [math.nan if value is None else value for value in found[key]]
        assert got == pytest.approx(want, rel=1e-5, abs=1e-12, nan_ok=True), key


def test_dense_has_no_pairs_and_its_last_lens_is_the_loss():
    model, idx, targets = network(['tp'] * 9, tp_size=1)
    found = diagnose(model, idx, targets)
    assert found['dispersion'] == [0.0] * 19 and found['rank_one'] == found['rank_all']
    assert not [key for key in found if key.startswith(('cka', 'grad_rank'))]
    assert found['lens_synced'] == found['lens_alone']
    assert found['lens_synced'][-1] == pytest.approx(model(idx, targets)[1].item(), rel=1e-5)
    at = [place for place, value in enumerate(found['lens_synced']) if value is not None]
    assert at == [0, 1, 4, 5, 8, 9, 14, 15, 18]


def test_training_counters_and_hooks_are_left_alone(undisturbed, tmp_path):
    assert run(tmp_path, *DROPOUT, '--log_diagnostics=True') == 0
    assert metrics(tmp_path, but={*MEASURED, 'diagnostics'}) == metrics(undisturbed)
    ours, theirs = (checkpoint.load(folder / 'ckpt.pt')['model'] for folder in (tmp_path, undisturbed))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    model, idx, targets = network(['spd', 'parallel'])
    state = torch.get_rng_state()
    with count_all_reduces() as observed:
        diagnose(model, idx, targets)
        assert (observed.forward, observed.backward) == (0, 0)
        model(idx)
        assert observed.forward == 2
    assert model.training and all(p.grad is None for p in model.parameters())
    assert torch.equal(state, torch.get_rng_state())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    # W&B gets every number as a chart, and they come back
    evals, _ = read_metrics(tmp_path)
    assert evals.keys() == column(tmp_path, 'diagnostics').keys() == {0, 10, 20, 30, 40}
    charts = as_charts(evals[40])
    assert {'cka/1 mlp', 'lens_alone/4 end', 'grad_rank_1/0 attention', 'val/loss',
            'diagnostics/attention_over_embedding'} <= charts.keys()
    assert from_charts(charts) == evals[40] and None not in charts.values()


def test_the_former_key_and_sharded_runs_are_refused():
    assert 'log_diagnostics' in refused(None, '--log_drift=True')
    assert 'needs all ranks in one process' in refused(
        None, *DROPOUT, '--log_diagnostics=True', '--shard=True')
