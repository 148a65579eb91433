"""
The rivals of variants.py and the merges: their numbers, simulated and sharded, and their all-reduces.

    python -m pytest tests/test_rivals.py

Numbers are compared with tests/reference_rivals.py, a plain loop over tp ranks.
"""

import math
import os
import random
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pytest  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import torch.multiprocessing as mp  # noqa: E402

import model as gpt  # noqa: E402
import train  # noqa: E402
from configurator import COMMUNICATIONS, ROOT, communications, load  # noqa: E402
from model import GPT, GPTConfig, TPGroup, count_all_reduces  # noqa: E402
from reference import reference_loss  # noqa: E402
from reference_rivals import reference_rivals  # noqa: E402
from speed.costmodel import Link, design_messages, predict  # noqa: E402
from training.logger import summary  # noqa: E402
from training.optimizer import sum_replicated_gradients  # noqa: E402
from training.sharding import join_shards, shard_model  # noqa: E402
from variants import gpt_config  # noqa: E402

B, T, C, V = 2, 5, 24, 29
PLAIN = ['tp', 'spd', 'parallel', 'palm', 'attn_spd']  # of two streams at most: merges are for these
ALONE = [([name] * 3, {}) for name in ('palm', 'attn_spd', 'fal', 'stale', 'ladder', 'caat')]
ALONE += [(['dtp'] * 3, dict(dtp_delay=delay)) for delay in (0, 1, 2, 4)]
ALONE += [(['caat'] * 3, dict(caat_share=share)) for share in (0.01, 11 / 23, 1.0)]


def mix(seed):
    """One of the types that carry, and some others, in any order."""
    draw = random.Random(seed)
    carrying = ('fal', 'stale', 'ladder')[seed % 3]
    types = [carrying, *draw.choices([carrying, 'dtp', 'caat', *PLAIN], k=5)]
    draw.shuffle(types)
    return types, dict(dtp_delay=1 + draw.randrange(4), caat_share=draw.choice([0.2, 0.5]))


MIXES = [mix(seed) for seed in range(6)] + [
    (['spd', 'spd', 'stale', 'stale'], {}), (['parallel', 'stale', 'stale', 'tp', 'stale'], {}),
    (['fal', 'parallel', 'fal', 'spd', 'fal'], dict(embed_scale=3.0)),
    (['parallel', 'ladder', 'ladder', 'parallel'], {}), (['ladder', 'tp', 'ladder', 'spd'], {}),
    (['parallel', 'dtp', 'dtp', 'parallel'], dict(dtp_delay=2)), (['dtp', 'caat', 'tp'], dict(dtp_delay=3)),
    (['dtp', 'dtp', 'ladder', 'dtp'], dict(dtp_delay=3))]
MERGED = [(['parallel', 'spd', 'tp', 'attn_spd', 'palm', 'parallel'], dict(merge=merge))
          for merge in ('mean', 'rsqrt', 'desync')]
MERGED += [([name] * 2, dict(merge=merge)) for name in PLAIN for merge in ('rsqrt', 'desync')]


def named(case):
    types, settings = case
    return '-'.join([*types, *(f'{key}={value:.3}' if isinstance(value, float) else f'{key}={value}'
                               for key, value in settings.items())])


def build(block_types, tp_size, **settings):
    """A small GPT in float64, every parameter far from its init (no bias 0, no gain 1)."""
    keys = dict(block_size=T, n_layer=len(block_types), n_head=12, n_embd=C, tp_size=tp_size)
    torch.manual_seed(42)
    model = GPT(gpt_config(keys | dict(block_types=block_types) | settings, V)).double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model


def batch():
    """Tokens and targets, (B, T) each; some targets are ignored."""
    idx, targets = torch.randint(V, (2, B, T), generator=torch.Generator().manual_seed(7))
    targets[1, 2] = targets[0, -1] = -1
    return idx, targets


def results(logits, loss, parameters):
    """What training sees: logits, loss and, after its backward pass, every parameter's gradient by name."""
    loss.backward()
    grads = {name: p.grad.clone() for name, p in parameters if p.grad is not None}
    return {'logits': logits.detach(), 'loss': loss.detach()} | grads


def model_results(model):
    idx, targets = batch()
    model.zero_grad()
    return results(model(idx)[0], model(idx, targets)[1], model.named_parameters())


def reference_results(model, masks=None):
    idx, targets = batch()
    weights = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    logits, _ = reference_rivals(weights, model.config, idx, masks)
    return results(logits, reference_loss(logits, targets), weights.items())


def assert_same(got, want, tolerance=1e-9):
    """Each tensor within tolerance of its largest entry: rounding is relative to what was summed."""
    assert got.keys() == want.keys()
    for name in want:
        scale = max(want[name].abs().max().item(), 1e-3)
        assert (got[name] - want[name]).abs().max() <= tolerance * scale, name


def observe(model):
    idx, targets = batch()
    with count_all_reduces() as observed:
        model(idx, targets)[1].backward()
    return observed


# numbers


@pytest.mark.parametrize('tp_size', [1, 2, 3, 4])
@pytest.mark.parametrize('case', ALONE + MIXES + MERGED, ids=named)
def test_numbers_and_all_reduces_are_those_of_the_loop_over_ranks(case, tp_size):
    for bias in (False, True):
        model = build(case[0], tp_size, bias=bias, **case[1])
        assert_same(model_results(model), reference_results(model))
    _, messages = reference_rivals(dict(model.named_parameters()), model.config, batch()[0])
    kinds = {False: 'blocking', True: 'hidden'}
    expected = [(kinds[hidden], B * T * channels * 8) for channels, hidden in messages]  # float64
    assert sorted(found[1:] for found in observe(model) if found[0] == 'forward') == sorted(expected)


@pytest.mark.parametrize('case', [*ALONE[2:8], *MIXES[:6]], ids=named)
def test_dropout_falls_on_each_sublayer_whatever_the_type(case, monkeypatch):
    masks = []

    def dropout(x, p, training=True):
        if x.dim() == 4:  # attention's, which the reference is without
            return x
        masks.append((torch.rand(B, T, C) > p).double() / (1 - p))
        return x * masks[-1]

    model, (idx, targets) = build(case[0], 3, bias=True, dropout=0.3, **case[1]), batch()
    monkeypatch.setattr(gpt.F, 'dropout', dropout)
    loss = model(idx, targets)[1]
    assert len(masks) == 1 + 2 * len(case[0])
    want = reference_results(model, masks)
    del want['logits']
    got = results(loss, loss, model.named_parameters())
    del got['logits']
    assert_same(got, want)


@pytest.mark.parametrize('tp_size', [1, 2, 4])
@pytest.mark.parametrize('block_type, settings, plain', [
    ('dtp', dict(dtp_delay=0), 'tp'), ('dtp', dict(dtp_delay=12), 'parallel'),
    ('caat', dict(caat_share=1.0), 'tp')])
def test_at_its_ends_a_type_is_a_plain_one_in_any_mix(block_type, settings, plain, tp_size):
    for types in ['X'] * 3, ['X', 'parallel', 'X', 'spd', 'X', 'palm'], ['parallel', 'parallel', 'X', 'X']:
        ours = build([block_type if name == 'X' else name for name in types], tp_size, bias=True, **settings)
        theirs = build([plain if name == 'X' else name for name in types], tp_size, bias=True)
        assert_same(model_results(ours), model_results(theirs), 1e-12)
        assert sorted(observe(ours)) == sorted(observe(theirs))


@pytest.mark.parametrize('block_type', ['attn_spd', 'dtp', 'caat'])
def test_on_one_rank_types_that_only_sync_otherwise_are_dense_gpt2(block_type):
    ours, dense = (build([name] * 3, 1, bias=True) for name in (block_type, 'tp'))
    assert_same(model_results(ours), model_results(dense), 1e-12)


@pytest.mark.parametrize('block_type', ['palm', 'fal', 'stale', 'ladder'])
def test_on_one_rank_types_that_read_other_streams_are_networks_of_their_own(block_type):
    ours, dense = model_results(build([block_type] * 3, 1)), model_results(build(['tp'] * 3, 1))
    assert (ours['logits'] - dense['logits']).abs().max() > 1e-2


@pytest.mark.parametrize('block_type', ['palm', 'fal', 'stale', 'ladder'])
def test_a_stream_without_drift_has_no_rank_dimension(block_type, monkeypatch):
    streams, norm = [], gpt.F.layer_norm
    monkeypatch.setattr(gpt.F, 'layer_norm', lambda x, *rest: streams.append(x) or norm(x, *rest))
    build([block_type] * 3, 4)(batch()[0])
    assert {stream.dim() for stream in streams} == {3}


@pytest.mark.parametrize('block_types', [['dtp', 'ladder', 'caat'], ['fal'] * 2, ['spd', 'stale', 'stale']],
                         ids='-'.join)
def test_compiles_without_a_graph_break(block_types):
    torch._dynamo.reset()
    model = build(block_types, 2, bias=True)

    def trained(run):
        model.zero_grad()
        loss = run(*batch())[1]
        return results(loss, loss, model.named_parameters())

    got = trained(torch.compile(model, fullgraph=True, backend='eager'))
    assert_same(got, trained(model))


# all-reduces


def test_the_registry_and_the_classes_have_the_same_names():
    assert COMMUNICATIONS.keys() == gpt.BLOCKS.keys()
    assert communications(['attn_spd'] * 11 + ['spd'], 2) == communications(['spd'] * 12, 2) == 12


@pytest.mark.parametrize('L', [2, 3, 5])
@pytest.mark.parametrize('block_type, settings, forward, backward, hidden', [
    ('palm', {}, lambda L: L, lambda L: L, lambda L: 0),
    ('attn_spd', {}, lambda L: L + 1, lambda L: L + 1, lambda L: 0),
    ('fal', {}, lambda L: L + 1, lambda L: L + 2, lambda L: 0),
    ('stale', {}, lambda L: L, lambda L: L, lambda L: L - 1),
    ('ladder', {}, lambda L: 2 * L - 1, lambda L: 2 * L - 1, lambda L: 2 * L - 2),
    ('dtp', dict(dtp_delay=0), lambda L: 2 * L, lambda L: 2 * L, lambda L: 0),
    *(('dtp', dict(dtp_delay=delay), count, count, lambda L, count=count: count(L) - 1)
      for delay in (1, 2, 4, 9) for count in [lambda L, delay=delay: max(1, 2 * L - delay)]),
    ('caat', dict(caat_share=11 / 23), lambda L: 2 * L, lambda L: 2 * L, lambda L: 0),
], ids=lambda value: 'count' if callable(value) else str(value))
def test_observed_all_reduces_are_those_of_the_equations(block_type, settings, forward, backward, hidden, L):
    observed = observe(build([block_type] * L, 2, **settings))
    assert (observed.forward, observed.backward) == (forward(L), backward(L))
    assert (observed.blocking, observed.hidden) == (forward(L) - hidden(L), hidden(L))
    whole = B * T * C * 8  # float64
    for way, count in ('forward', forward(L)), ('backward', backward(L)):
        share = round(11 / 23 * C) / C if block_type == 'caat' else 1
        sizes = sorted(size for name, _, size in observed if name == way)
        assert sizes == [round(share * whole)] * (count - 1) + [whole]


@pytest.mark.parametrize('path', sorted(ROOT.glob('config/rivals/*.py')), ids=lambda path: path.stem)
def test_a_run_config_all_reduces_as_often_as_it_says(path):
    config = load([str(path)])
    shape = {key: getattr(config, key) for key in ('merge', 'dtp_delay', 'caat_share')}
    observed = observe(build(config.block_types, config.tp_size, **shape))
    words = path.read_text().partition('\n')[0]
    said = [int(number) for number in re.findall(r'(\d+)(?: all-reduces| of them)', words)]
    assert said in ([], [observed.forward], [observed.forward, observed.hidden]), words


def test_the_bytes_of_a_share_of_the_channels_are_those_of_fewer_all_reduces():
    for name, whole in ('caat_12', 12), ('caat_3', 3):
        config = load([str(ROOT / f'config/rivals/train_gpt2_{name}.py')])
        k = round(config.caat_share * config.n_embd)
        assert (23 * k + config.n_embd) / config.n_embd == pytest.approx(whole, abs=0.02)


def test_what_has_a_sublayers_compute_to_hide_behind_backward():
    for block_type, hidden in ('tp', 0), ('fal', 1), ('stale', 2), ('ladder', 4), ('dtp', 4), ('caat', 0):
        observed = observe(build([block_type] * 3, 2))
        assert sum(found[:2] == ('backward', 'hidden') for found in observed) == hidden, block_type


def test_messages_are_in_the_compute_dtype_and_counted_so():
    for block_type in 'tp', 'ladder', 'dtp', 'caat', 'fal':
        model = build([block_type] * 3, 2).float()
        with torch.autocast('cpu', torch.bfloat16):
            half = observe(model)
        assert sorted((way, kind, 2 * size) for way, kind, size in half) == sorted(observe(model))


def test_a_hidden_all_reduce_costs_what_it_takes_beyond_a_sublayers_compute():
    flags = ['--n_layer=3', '--tp_size=2', '--batch_size=4', '--gradient_accumulation_steps=2']
    for block_type, hidden in ('tp', 0), ('stale', 2), ('ladder', 4):
        config = load([str(ROOT / 'config/cpu.py'), *flags, f'--block_types={block_type}'])
        messages = [found for found in design_messages(config, 1) if found.kind in ('forward', 'backward')]
        assert all(message.bytes == 4 * 4 * config.block_size * config.n_embd for message in messages)
        # 2 micro-batches of 3 layers: a sublayer has 1/12 of a step's compute, a third of that forward
        for seconds in 0.1, 0.04, 0.02:
            took = predict(1.0, messages, dict(tp=Link(seconds, math.inf)))
            saving = 2 * hidden * (min(seconds, 1 / 36) + min(seconds, 2 / 36))
            assert took == pytest.approx(1 + len(messages) * seconds - saving)


class Work(NamedTuple):
    """What dist.all_reduce returns, and what is written into a list when it is waited for."""
    work: dist.Work
    events: list
    start: tuple

    def wait(self):
        self.events.append(('wait', self.start))
        self.work.wait()


@pytest.mark.parametrize('types, settings, hidden', [
    (['ladder'] * 3, {}, 4), (['dtp'] * 3, dict(dtp_delay=1), 4), (['dtp'] * 4, dict(dtp_delay=3), 4),
    (['ladder', 'parallel', 'ladder', 'tp', 'ladder'], {}, 3), (['dtp', 'spd', 'dtp', 'dtp'], {}, 3)])
def test_a_hidden_all_reduce_is_on_its_way_while_sublayers_compute(types, settings, hidden, tmp_path,
                                                                   monkeypatch):
    """Both ways, unless a type follows that may sync before. The process reduces over a group of itself."""
    events, all_reduce = [], dist.all_reduce

    def logged(message, group, async_op=False):
        work = all_reduce(message, group=group, async_op=async_op)
        if async_op:
            events.append(('start', len(events)))
            return Work(work, events, events[-1])

    def check():
        starts = [event for event in events if event[0] == 'start']
        assert len(starts) == hidden and set(starts) == {event[1] for event in events if event[0] == 'wait'}
        for start in starts:
            between = events[events.index(start):events.index(('wait', start))]
            assert between.count(('sublayer',)) == settings.get('dtp_delay', 1)

    monkeypatch.setattr(dist, 'all_reduce', logged)
    dist.init_process_group('gloo', init_method=f'file://{tmp_path / "store"}', rank=0, world_size=1)
    try:
        model = shard_model(build(types, 2, **settings), TPGroup(2, 1, dist.group.WORLD))
        for block in model.transformer.h:
            for first in block.attn.c_attn, block.mlp.c_fc:
                first.register_forward_hook(lambda *_: events.append(('sublayer',)))
                first.weight.register_hook(lambda _: events.append(('sublayer',)))
        loss = model(batch()[0])[0].square().mean()
        check()
        events.clear()
        loss.backward()
        check()
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize('dtype, width', [('float32', 4), ('bfloat16', 2), ('float16', 2)])
def test_run_json_has_the_all_reduces_of_a_pass_and_the_bytes_of_a_token(dtype, width):
    model = build(['caat', 'ladder', 'ladder'], 2).float()
    found = summary(train.observe(model)[0], dtype)
    assert found == dict(forward=5, backward=5, blocking=3, hidden=2,
                         bytes_per_token=width * 2 * (2 * C // 2 + 3 * C))


# refusals


@pytest.mark.parametrize('settings, words', [
    (dict(block_types=['fal', 'tp', 'stale']), 'block_types has fal and stale'),
    (dict(block_types=['ladder', 'fal', 'stale']), 'block_types has fal and stale and ladder'),
    (dict(block_types=['tp', 'dtp'], merge='mean'), 'merge is mean, it must be sum if block_types has dtp'),
    (dict(block_types=['caat', 'ladder'], merge='desync'), 'must be sum if block_types has ladder or caat'),
    (dict(dtp_delay=-1), 'dtp_delay is -1, it must be at least 0'),
    (dict(caat_share=0.0), 'caat_share is 0.0, it must be above 0 and at most 1'),
    (dict(caat_share=1.5), 'caat_share is 1.5, it must be above 0 and at most 1'),
    (dict(merge='max'), 'merge is')])
def test_what_does_not_go_together_is_refused_in_one_line(settings, words):
    types = settings.get('block_types', ['tp'])
    with pytest.raises(ValueError) as refusal:
        GPTConfig(n_layer=len(types), **settings)
    assert words in str(refusal.value).replace("'", '') and '\n' not in str(refusal.value)
    flags = [f'--{key}={",".join(value) if key == "block_types" else value}'
             for key, value in settings.items()]
    with pytest.raises(SystemExit) as refusal:
        load([*flags, f'--n_layer={len(types)}'])
    message = str(refusal.value).replace("'", '')
    assert words in message and '\n' not in message and flags[-1].partition('=')[0].lstrip('-') in message


# sharded


SHARDED = [*ALONE[:8], ALONE[-2], *MIXES[:3], MIXES[-2], MERGED[1], MERGED[2]]


def shard_and_compare(rank, address):
    """One of two processes: its losses and gradients, joined, must be those of the simulated run."""
    torch.set_num_threads(1)
    dist.init_process_group('gloo', init_method=address, rank=rank, world_size=2)
    for i, (types, settings) in enumerate(SHARDED):
        dense = build(types, 2, bias=i % 2 == 0, dropout=0.2 * (i % 3 == 0), **settings)
        mine = shard_model(dense.float(), TPGroup(2, rank, dist.group.WORLD)).double()
        dense.double()
        found = []
        for model in dense, mine:
            torch.manual_seed(5)  # dropout's masks
            with count_all_reduces() as observed:
                loss = model(*batch())[1]
                loss.backward()
            sum_replicated_gradients(model)
            found.append(({'loss': loss.detach()}, sorted(observed)))
            found[-1][0].update((name, join_shards(name, p.grad, model.tp))
                                for name, p in model.named_parameters() if p.grad is not None)
        (simulated, expected), (sharded, observed) = found
        assert_same(sharded, simulated)
        assert observed == expected, named((types, settings))
        torch.manual_seed(5)
        logits = dense.eval()(batch()[0])[0]
        torch.testing.assert_close(mine.eval()(batch()[0])[0], logits, rtol=0, atol=1e-9)
        texts = []
        for model in dense, mine:
            torch.manual_seed(5)
            texts.append(model.generate(batch()[0][:, :2], T))  # beyond block_size
        assert torch.equal(*texts), named((types, settings))
    dist.destroy_process_group()


def test_sharded_gradients_losses_and_all_reduces_are_those_of_the_simulated_run():
    done = subprocess.run([sys.executable, __file__], env=dict(os.environ, OMP_NUM_THREADS='1'),
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


if __name__ == '__main__':
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    # forked: torch takes longer to load than this to run
    mp.start_processes(shard_and_compare, (f'tcp://127.0.0.1:{port}',), 2, start_method='fork')
