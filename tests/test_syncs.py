"""
syncs.py against evaluations that know nothing of it, and its predictors against a difference quotient.

    python -m pytest tests/test_syncs.py
"""

import csv
import json

import pytest
import torch

import syncs
from configurator import ROOT
from model import GPT, Block, GPTConfig
from toy_runs import run

CPU = str(ROOT / 'config/cpu.py')


@pytest.fixture(scope='module')
def source(dense):
    """Flags for a toy run's net: 4 layers, 3 windows of 32 in a batch; 10 windows and a part of one."""
    return [CPU, f'--init_from={dense}', '--tp_size=4', '--batch_size=3', '--tokens=330']


@pytest.fixture(scope='module')
def searched(source, tmp_path_factory):
    """The folder of a greedy search, with random sets."""
    out = tmp_path_factory.mktemp('searched')
    syncs.main([*source, '--search=greedy', '--random=2', f'--out={out}'])
    return out


@pytest.fixture
def found(searched):
    return json.loads((searched / 'syncs.json').read_text())


def test_every_printed_loss_is_that_of_the_printed_line(searched, found, source, tmp_path, capsys):
    assert found['command'].endswith('--eval_tokens=330 --eval_only=True') and found['tokens'] == 330
    ones = [found['frontier'][k] for k in (0, 3, 7)] + found['random'][:1]
    ones += [dict(loss=found['points'][2]['loss'], block_types='tp,spd,tp,tp')]
    assert found['points'][2]['name'] == 'h.1.attn'
    for one in ones:
        capsys.readouterr()
        flags = [*found['command'].split()[2:], f'--block_types={one["block_types"]}']
        assert run(tmp_path / 'none', *flags) == 0
        assert float(capsys.readouterr().out.split()[2]) == pytest.approx(one['loss'], abs=1e-6)


def test_what_is_found_is_consistent(searched, found):
    dense, points, frontier = found['dense_loss'], found['points'], found['frontier']
    assert [point['name'] for point in points] == [f'h.{i}.{kind}' for i in range(4) for kind in syncs.KINDS]
    # the last sync moves to the model's end, and is never saved
    assert points[-1]['difference'] == points[-1]['low'] == points[-1]['high'] == 0
    assert not any(one['block_types'].endswith(('attn_spd', 'parallel')) for one in frontier)
    assert [one['all_reduces'] for one in frontier] == [*range(8, 0, -1)]  # observed
    for one in [*points, *frontier]:
        assert one['difference'] == pytest.approx(one['loss'] - dense, abs=1e-9)
        assert one['low'] <= one['difference'] <= one['high']
    single = min(points[:-1], key=lambda point: point['loss'])
    assert single['loss'] == frontier[1]['loss'] == found['curves']['greedy'][1]['loss']
    for curve in found['curves'].values():
        assert [one['all_reduces'] for one in curve] == [*range(8, 0, -1)]
        assert all(best['loss'] <= one['loss'] for best, one in zip(frontier, curve))
    assert [one['all_reduces'] for one in found['random']] == [6, 6, 4, 4, 2, 2]
    with open(searched / 'frontier.csv') as file:
        assert [float(row['loss']) for row in csv.DictReader(file)] == [one['loss'] for one in frontier]
    assert (searched / 'syncs.png').stat().st_size > 10_000


def test_greedy_takes_what_costs_least_by_then(found, source):
    config = syncs.load_config(*syncs.parse_args(source))
    model, corpus, world = syncs.open_net(config)
    x, y = (torch.from_numpy(corpus.val.read(i, 320).astype('int64')).view(10, 32) for i in (0, 1))

    def loss(dropped):
        keys = dict(vars(config), block_types=list(syncs.block_types(dropped, 4)))
        net = GPT(syncs.gpt_config(keys))
        net.load_state_dict(model.state_dict())
        return net(x, y)[1].item()

    order = [syncs.dropped_in(one['block_types'].split(',')) for one in found['curves']['greedy']]
    points = set(syncs.all_points(4, syncs.KINDS)) - {(3, 'mlp')}
    for before, after in zip(order[1:3], order[2:4]):  # of 320 tokens, ten more in the search
        costs = sorted(loss(before | {point}) for point in points - before)
        assert loss(after) < costs[0] + 1e-4


def test_a_search_that_was_stopped_goes_on(searched, source, tmp_path, monkeypatch, capsys):
    lines = (searched / 'measured.jsonl').read_text().splitlines()
    half = len(lines) // 2
    (tmp_path / 'measured.jsonl').write_text('\n'.join(lines[:half]) + '\n' + lines[half][:40])
    argv = [*source, '--search=greedy', '--random=2', f'--out={tmp_path}']
    syncs.main(argv)
    assert json.loads((tmp_path / 'syncs.json').read_text()) == json.loads(
        (searched / 'syncs.json').read_text())
    assert len((tmp_path / 'measured.jsonl').read_text().splitlines()) == len(lines)
    monkeypatch.setattr(syncs.Measured, 'note', None)  # nothing is measured twice
    with pytest.raises(TypeError):
        syncs.main([*argv, '--random=3'])
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        syncs.main([*argv, '--tp_size=2'])
    assert 'tp_size is 4 there, 2 here' in stopped.value.code


def test_a_layout_by_affinity_is_written_and_its_lines_load_it(found, source, tmp_path, capsys):
    syncs.main([*source, '--layout=affinity', f'--out={tmp_path}'])
    own = json.loads((tmp_path / 'syncs.json').read_text())
    assert own['dense_loss'] == pytest.approx(found['dense_loss'], abs=1e-6)
    assert own['points'][0]['loss'] != found['points'][0]['loss']
    capsys.readouterr()
    one = own['frontier'][5]
    assert run(tmp_path / 'none', *own['command'].split()[2:], f'--block_types={one["block_types"]}') == 0
    assert float(capsys.readouterr().out.split()[2]) == pytest.approx(one['loss'], abs=1e-6)


def test_layers_in_common_are_computed_once(source, monkeypatch):
    model, corpus, world = syncs.open_net(syncs.load_config(*syncs.parse_args(source)))
    computed = []
    for name in syncs.TYPES.values():
        real = syncs.BLOCKS[name].forward
        monkeypatch.setattr(syncs.BLOCKS[name], 'forward', lambda block, s, real=real, name=name: (
            computed.append((block.layer, name)), real(block, s))[1])
    x = torch.randint(257, (2, 32))
    sets = [('tp', 'tp', 'tp', 'spd'), ('tp', 'spd', 'tp', 'tp'), ('tp', 'tp', 'tp', 'tp')]
    found = syncs.nats_of(model, x, x, sets)
    assert len(computed) == 4 + 1 + 3 and len(set(computed)) == 6
    for types in sets:  # and the result is that of the set alone
        torch.testing.assert_close(found[types], syncs.nats_of(model, x, x, [types])[types], rtol=0, atol=0)


def test_first_order_is_the_derivative_of_the_loss(own_blocks):
    class PartBlock(Block, name='part'):
        """attn_spd or spd, but what is dropped counts `share` times."""
        share, kind = 0.0, 'attn'

        def forward(self, s):
            for kind, norm, sublayer in ('attn', self.ln_1, self.attn), ('mlp', self.ln_2, self.mlp):
                product = sublayer(norm(s.u))
                P = product.per_rank()
                s = s.sync(product)
                if kind == self.kind:
                    s = s._replace(u=s.c + self.share * (P - P.sum(0)))
            return s

    shape = dict(block_size=8, vocab_size=29, n_layer=2, n_head=4, n_embd=16, bias=True, tp_size=4)
    torch.manual_seed(5)
    model = GPT(GPTConfig(**shape)).double()
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)
    x, y = torch.randint(29, (2, 3, 8))
    found = syncs.predict(model.requires_grad_(False), x, y)
    net = GPT(GPTConfig(**shape | dict(block_types=['part', 'tp']))).double()
    net.load_state_dict(model.state_dict())
    for i, PartBlock.kind in enumerate(syncs.KINDS):
        losses = []
        for PartBlock.share in 1e-5, -1e-5:
            losses.append(net(x, y)[1].item())
        slope = (losses[0] - losses[1]) / 2e-5
        assert found['first_order'][i].item() == pytest.approx(slope, rel=1e-6) and abs(slope) > 1e-4
    assert all(values[-1] == 0 and (values[:-1] != 0).all() for values in found.values())


@pytest.mark.parametrize('flags, words', [
    (['--init_from=scratch'], 'init_from'), (['--tp_size=1'], 'tp_size is 1'),
    (['--kinds=attn,mpl'], 'kinds is attn,mpl'), (['--block_types=spd'], 'block_types'),
    (['--tokens=40'], '40 tokens'), (['--tp_size=3'], 'tp_size'), (['--merge=mean'], 'merge is mean'),
    (['--search=all'], 'search'), (['--layout=best'], 'layout'), (['--margin=0'], 'margin is 0'),
])
def test_a_mistake_gets_one_line(source, tmp_path, flags, words):
    with pytest.raises(SystemExit) as stopped:
        syncs.main([*source, *flags, f'--out={tmp_path}/out'])
    assert stopped.value.code.startswith('error: ') and words in stopped.value.code
    assert not (tmp_path / 'out').exists()


def test_a_split_of_one_window_has_no_interval_and_is_refused(source, corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(syncs, 'open_corpus', lambda name: corpus._replace(val=range(64)))
    with pytest.raises(SystemExit) as stopped:
        syncs.main([*source, f'--out={tmp_path}/out'])
    assert 'val has 64 tokens; two windows of block_size 32 need 65' in stopped.value.code
    assert not (tmp_path / 'out').exists()


def test_a_net_that_was_not_trained_dense_is_refused(source, undisturbed, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        syncs.main([*source, f'--init_from={undisturbed}/ckpt.pt', f'--out={tmp_path}/out'])
    assert 'trained with tp, spd, parallel, spd' in stopped.value.code and not (tmp_path / 'out').exists()
