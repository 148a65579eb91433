"""
compare.py on run folders written here, with differences that can be worked out by hand.

    python -m pytest tests/test_compare.py
"""

import csv
import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
from scipy.stats import ttest_1samp

import compare
from analysis import answers, findings, plots, runs
from configurator import COMMUNICATIONS, ROOT, communications, load, pattern
from toy_runs import wandb_records
from training.logger import CHARTS, TRACKED
from training.rundir import find_runs

TP, SPD, PARALLEL = ['tp'] * 4, ['spd'] * 4, ['parallel'] * 4  # 8, 4 and 2 communications
DENSE = {1: 2.0, 2: 2.1, 3: 2.2}
LINES = [dict(iter=0, val_loss=5.5), dict(iter=10, train_loss=4.0, tokens_per_sec=10.0),
         dict(iter=20, train_loss=3.0, tokens_per_sec=30.0)]


def write_run(root, name, losses, block_types=TP, tp_size=4, state='finished', corpus=(), info=(),
              lines=LINES, last=(), **keys):
    """
    Run folders root/name-seedN, one for each seed of {seed: final validation loss}.

    corpus, info: what run.json has there besides, or instead. lines: of metrics.jsonl before the last
    evaluation. last: what that has besides the loss. keys: of the config.
    """
    for seed, loss in losses.items():
        folder = root / f'{name}-seed{seed}'
        folder.mkdir(parents=True)
        config = dict(out_dir=str(folder), seed=seed, block_types=block_types, tp_size=tp_size,
                      dataset='pystdlib', max_iters=20, device='cpu', n_embd=64, warmup_iters=0) | keys
        known = [name.removeprefix('mean_') for name in block_types]
        counted = communications([name if name in COMMUNICATIONS else 'spd' for name in known], tp_size)
        reduced = 0 if tp_size == 1 else 3
        run = dict(name=folder.name, state=state, config=config, parameters=620_032, iter=config['max_iters'],
                   val_loss=loss, communications=counted, all_reduces=dict(forward=reduced, backward=reduced),
                   corpus=dict(name='pystdlib', corpus='Some text', tokenizer='byte', vocab_size=257,
                               val_sha256='ab') | dict(corpus)) | dict(info)
        (folder / 'run.json').write_text(json.dumps(run))
        written = lines + [dict(iter=config['max_iters'], val_loss=loss) | dict(last)] * (state == 'finished')
        (folder / 'metrics.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in written))


def shifted(*shifts):
    """The dense control's losses plus these, seed by seed."""
    return {seed: loss + shift for (seed, loss), shift in zip(DENSE.items(), shifts)}


def read_all(root):
    return [runs.read_run(folder) for folder in find_runs([root])[0]]


def rows_under(root, level=None, predict=None):
    """The rows of the finished runs under root."""
    return runs.group([run for run in read_all(root) if not run.trouble], level, predict)


def table(root):
    """{communications: row} of the finished runs under root."""
    return {row.communications: row for row in rows_under(root)}


def compare_all(root, *flags):
    """compare.py on the runs under root. Returns the folder of its outputs."""
    compare.main([str(root), f'--out={root / "compare"}', *flags])
    return root / 'compare'


def csv_lines(folder):
    with open(folder / 'table.csv') as file:
        return list(csv.DictReader(file))


def refused(*argv):
    """The one line with which compare.py ends."""
    with pytest.raises(SystemExit) as end:
        compare.main([str(arg) for arg in argv])
    message = end.value.code
    assert isinstance(message, str) and message.startswith('error: ') and len(message.splitlines()) == 1
    return message


@pytest.fixture
def no_plots(monkeypatch):
    """compare.py draws nothing, which takes it most of its time."""
    monkeypatch.setattr(plots, 'PLOTS', {})


# pairs and verdicts


def test_differences_are_paired_and_judged(tmp_path):
    write_run(tmp_path, 'dense', DENSE, tp_size=1)
    write_run(tmp_path, '8comm', shifted(-0.001, 0.002, 0.001))
    write_run(tmp_path, '4comm', shifted(0.020, 0.021, 0.022), SPD)
    write_run(tmp_path, '2comm', shifted(0.0015, 0.0015, 0.0016), PARALLEL)
    rows = table(tmp_path)
    assert list(rows) == [0, 8, 4, 2]
    spread = runs.to_dense(rows[4])
    # standard deviation 0.001 and, from a table, t(0.975, 2) = 4.302653
    assert spread.n == 3 and spread.mean == pytest.approx(0.021)
    assert spread.half == pytest.approx(4.302653 * 0.001 / math.sqrt(3), rel=1e-5)
    assert [rows[count].floor for count in (8, 4, 2)] == pytest.approx([0.002] * 3)
    assert runs.judge(spread, 0.002) == 'higher'
    assert runs.judge(runs.to_dense(rows[2]), 0.002) == 'no difference'  # though its interval excludes 0
    assert runs.judge(runs.estimate([0.01, 0.02, 0.03]), 0.002) == 'undecided'  # 0.02 +- 0.0248
    assert runs.judge(runs.estimate([-0.1, -0.11]), None) == 'lower, floor unknown'


@pytest.mark.filterwarnings('error')
@pytest.mark.parametrize('value', [0.0, 0.1, -0.021])
def test_equal_differences_have_an_interval_without_width_and_no_warning(value):
    found = runs.estimate([value] * 3)
    assert (found.mean, found.n) == (value, 3) and found.half < 1e-15
    assert findings.p_value([value] * 3) == pytest.approx(float(value == 0))


def test_one_seed_has_no_interval(tmp_path):
    write_run(tmp_path, 'dense', {7: 2.0}, tp_size=1)
    write_run(tmp_path, '4comm', {7: 2.5}, SPD)
    row = table(tmp_path)[4]
    assert runs.verdict(runs.to_dense(row), row.floor) == '+0.5000 (one seed, no interval): undecided'


def test_pairs_are_of_one_seed(tmp_path):
    write_run(tmp_path, 'dense', {1: 2.0, 2: 3.0}, tp_size=1)
    write_run(tmp_path, '4comm', {2: 3.5, 3: 9.0}, SPD)
    row = table(tmp_path)[4]
    assert runs.to_dense(row) == runs.Estimate(0.5, None, 1)
    assert compare.missing_notes([row], []) == [
        '4comm: no dense control of seed 3, not in its difference',
        'val losses are means over different seeds: compare the differences, not the losses']
    assert plots.height(row) == row.control.loss + 0.5


def test_any_dense_run_is_the_control(tmp_path):
    write_run(tmp_path, 'dense', DENSE, tp_size=1, merge='mean')
    write_run(tmp_path, '4comm', shifted(0.5, 0.5, 0.5), SPD)
    dense, row = rows_under(tmp_path)
    assert row.control is dense and dense.control is None
    assert runs.to_dense(row).mean == pytest.approx(0.5) and runs.to_dense(dense) is None


def test_a_perturbed_dense_run_is_no_control(tmp_path):
    write_run(tmp_path, 'dense', DENSE, tp_size=1)
    write_run(tmp_path, 'twin', shifted(0.001, 0.002, 0.003), tp_size=1, perturb=1e-7)
    dense, twin = rows_under(tmp_path)
    assert (dense.name, twin.control, twin.title) == ('dense', dense, 'tp x 4 (tp_size 1, perturb 1e-07)')
    assert runs.to_dense(twin).mean == pytest.approx(0.002)


@pytest.mark.parametrize('change', [dict(merge='mean'), dict(perturb=1e-7), dict(embed_scale=2.0)])
def test_tp_blocks_with_a_variation_set_no_rounding_floor(tmp_path, change):
    write_run(tmp_path, 'dense', DENSE, tp_size=1)
    write_run(tmp_path, 'varied', shifted(0.1, 0.1, 0.1), **change)
    assert table(tmp_path)[8].floor is None


# which runs are compared


@pytest.mark.parametrize('broken', [
    '{"iter": 30, "val_l', '{"val_loss": 2.0}', '{"iter": 30.5, "val_loss": 2.0}',
    '{"iter": 30, "val_loss": "2"}', '{"iter": 30, "val_loss": [2.0]}', '{"iter": 30, "drift": [0.5, "0.5"]}',
    '30', '[]', '[' * 10**5], ids=range(9))
def test_torn_last_line_is_dropped_and_a_broken_one_refused(tmp_path, broken):
    write_run(tmp_path, 'dense', {1: 2.0}, tp_size=1)
    path = tmp_path / 'dense-seed1' / 'metrics.jsonl'
    whole = path.read_text()
    path.write_text(whole + broken)
    assert table(tmp_path)[0].loss == 2.0
    path.write_text(whole + broken + '\n' + whole)
    assert f'{path} line 5' in refused(tmp_path, '--out', tmp_path / 'cmp')


@pytest.mark.parametrize('text', ['{"name": "dense', '[]', '{"name": "dense-seed1"}'])
def test_a_damaged_run_json_is_refused(tmp_path, text):
    write_run(tmp_path, 'dense', {1: 2.0}, tp_size=1)
    path = tmp_path / 'dense-seed1' / 'run.json'
    path.write_text(text)
    assert str(path) in refused(tmp_path, '--out', tmp_path / 'cmp')


@pytest.mark.parametrize('other, difference', [
    (dict(learning_rate=1e-3), 'learning_rate is '),
    (dict(max_iters=10), 'max_iters is '),
    (dict(batch_size=6), 'windows per step is '),
    (dict(corpus=dict(val_sha256='cd')), 'corpus val_sha256 is '),
])
def test_mixed_runs_are_refused(tmp_path, capsys, no_plots, other, difference):
    write_run(tmp_path, 'dense', {1: 2.0}, tp_size=1)
    write_run(tmp_path, '4comm', {1: 2.5}, SPD, **other)
    message = refused(tmp_path, '--out', tmp_path / 'cmp')
    assert difference in message and '4comm-seed1' in message and 'dense-seed1' in message
    assert message.count(' is ') == 1  # nothing else differs
    compare_all(tmp_path, '--mix')
    assert 'no dense control among these runs' in capsys.readouterr().out  # none of its own recipe and corpus


def test_runs_whose_recipe_is_the_same_compare(tmp_path):
    write_run(tmp_path, 'dense', {1: 2.0}, tp_size=1)
    write_run(tmp_path, '4comm', {1: 2.5}, SPD, batch_size=8, gradient_accumulation_steps=60, device='cuda',
              log_interval=1, merge='mean')
    assert runs.to_dense(table(tmp_path)[4]).mean == 0.5


def test_unfinished_runs_are_listed_and_in_no_mean(tmp_path, capsys, no_plots):
    write_run(tmp_path, 'dense', {1: 2.0}, tp_size=1)
    write_run(tmp_path, '4comm', {1: 2.5}, SPD)
    write_run(tmp_path, '4comm', {2: 0}, SPD, state='failed')
    write_run(tmp_path, '4comm', {3: math.nan}, SPD)
    (tmp_path / 'crashed').mkdir()
    (tmp_path / 'crashed' / 'log.txt').write_text('no such device\n')
    lines = csv_lines(compare_all(tmp_path))
    out = capsys.readouterr().out
    assert '4comm-seed2: failed, last seen at step 20 of 20' in out
    assert '4comm-seed3: diverged: its validation loss is nan' in out
    assert 'crashed: ended before it wrote run.json' in out
    assert [(line['run'], line['seeds'], line['val_loss']) for line in lines[:2]] == [
        ('dense', '1', '2.0'), ('4comm', '1', '2.5')]
    assert len(lines) == 5 and {line['val_loss'] for line in lines[2:]} == {''}
    assert all(line['corpus'] == 'Some text' for line in lines[:2])


def test_a_run_given_twice_is_refused(tmp_path):
    write_run(tmp_path, 'a', {1: 2.0}, SPD)
    write_run(tmp_path, 'b', {1: 2.1}, SPD)
    assert 'one run twice' in refused(tmp_path, '--out', tmp_path / 'cmp')


def test_without_a_dense_control_differences_are_blank(tmp_path, capsys, no_plots):
    write_run(tmp_path, '4comm', {1: 2.0}, SPD)
    lines = csv_lines(compare_all(tmp_path))
    assert '4comm: no dense control among these runs' in capsys.readouterr().out
    assert lines[0]['difference'] == ''


# outputs


class Page(HTMLParser):
    """The tags and links of a page; asserts that its elements close in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.links = [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [value for name, value in attributes if name in ('src', 'href')]
        self.open += [tag] if tag not in ('meta', 'img') else []

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_outputs_agree(tmp_path, capsys):
    write_run(tmp_path / 'out', 'dense', DENSE, tp_size=1)
    write_run(tmp_path / 'out', '8comm', shifted(0.001, 0.0, 0.0))
    write_run(tmp_path / 'out', '4comm', shifted(0.02, 0.021, 0.022), SPD)
    write_run(tmp_path / 'out', '<4>comm', {9: 2.0}, SPD, state='failed')
    (tmp_path / 'out/compare').mkdir()
    (tmp_path / 'out/compare/drift.svg').write_text('of an earlier comparison')
    out = compare_all(tmp_path / 'out')
    printed, text = capsys.readouterr().out, (out / 'table.md').read_text()
    page = (out / 'report.html').read_text().replace('\xa0', ' ')
    for output in (printed, text, page):
        assert 'Some text, byte tokens, 20 steps' in output and '+0.0210 [+0.0185, +0.0235] (n=3)' in output
        assert 'higher' in output and 'seed9: failed, last seen at step 20 of 20' in output
    found, lines = json.loads((out / 'table.json').read_text()), csv_lines(out)
    for row, line in zip(found['rows'], lines):
        for key, value in line.items():
            if key != 'block_types':
                assert value == ('' if row[key] is None else str(row[key]))
    assert [line['run'] for line in lines] == ['dense', '8comm', '4comm', '<4>comm-seed9']
    assert len(found['rows']) == 3 and found['rows'][2]['runs'][0]['val_loss'] == 2.02
    assert [run['state'] for run in found['unfinished']] == [lines[3]['state']]
    assert not (out / 'drift.svg').exists()
    for name in ('loss_vs_communications', 'paired_differences', 'training_curves', 'tokens_per_sec'):
        assert (out / f'{name}.png').read_bytes().startswith(b'\x89PNG') and f']({name}.png)' in text
        assert '</svg>' in (out / f'{name}.svg').read_text()
    # one file, without scripts
    assert not re.search('https?:', page) and '<4>' not in page
    parsed = Page(page)
    assert 'script' not in parsed.tags
    assert parsed.links and all(link.startswith('data:image/') for link in parsed.links)


def test_plots_are_the_same_byte_for_byte(tmp_path, monkeypatch):
    write_run(tmp_path / 'out', 'dense', DENSE, tp_size=1)
    write_run(tmp_path / 'out', '4comm', shifted(0.02, 0.021, 0.022), SPD)
    monkeypatch.setattr(plots, 'PLOTS', dict(a=plots.plot_tradeoff, b=plots.plot_differences))
    for name in ('one', 'other'):
        (tmp_path / name).mkdir()
        plots.draw_all(rows_under(tmp_path / 'out'), tmp_path / name)
    for file in ('a.svg', 'a.png', 'b.svg'):
        assert (tmp_path / 'one' / file).read_bytes() == (tmp_path / 'other' / file).read_bytes()


def by_count(run):
    """A predicted step time that rises with the communications."""
    return run.info['communications'] / 1000


def test_every_plot_draws_many_configs(tmp_path):
    apart = dict(drift=[0.0, 0.1, 0.3], drift_cosine=[None, 0.5, -0.5])
    kinds = dict(a=(['tp', 'spd'] * 2, 'sum'), b=(['tp', 'tp', 'spd', 'spd'], 'sum'), c=(SPD, 'sum'),
                 d=(SPD, 'mean'))
    for width, names in {64: 'abcd', 128: 'c'}.items():
        size = dict(info=dict(parameters=width**2), n_embd=width, max_iters=200, last=apart,
                    lines=logged([3 + 0.1 * (i % 3) for i in range(20)]))
        write_run(tmp_path / 'out', f'dense{width}', DENSE, tp_size=1, **size)
        for name in names:
            types, merge = kinds[name]
            write_run(tmp_path / 'out', f'{name}{width}', shifted(0, 0.1, 0.2), types, merge=merge, **size)
    rows = rows_under(tmp_path / 'out', predict=by_count)
    assert plots.draw_all(rows, tmp_path).keys() == plots.PLOTS.keys() - {'tokens_per_sec'}


# the guide's thresholds

FULL = dict(corpus=dict(tokenizer='gpt2'), info=dict(parameters=124_373_760), dataset='fineweb',
            max_iters=20_000)


@pytest.mark.parametrize('losses, answer', [
    ({1: 3.30, 2: 3.31, 3: 3.30}, 'yes'),
    ({1: 3.30, 2: 3.36, 3: 3.33}, 'undecided'),
    ({1: 3.37, 2: 3.38, 3: 3.37}, 'no'),
    ({1: 3.34}, 'yes, 3.3400 in one seed, no interval'),
])
def test_thresholds_at_the_guides_scale(tmp_path, losses, answer):
    write_run(tmp_path, '12comm', losses, ['spd'] * 12, **FULL)
    (line, relative) = answers.goal([table(tmp_path)[12]], 12, 3.35)
    assert line.startswith(f'spd x 12 (tp_size 4): {answer}') and 'no pair of runs' in relative


@pytest.mark.parametrize('off', [
    dict(corpus=dict(tokenizer='byte')), dict(info=dict(parameters=620_032)), dict(dataset='pystdlib'),
    dict(max_iters=600)])
def test_thresholds_are_not_applied_elsewhere(tmp_path, off):
    write_run(tmp_path, '12comm', {1: 2.0}, ['spd'] * 12, **(FULL | off))
    (line, relative) = answers.goal([table(tmp_path)[12]], 12, 3.35)
    assert line.startswith(f'{answers.UNANSWERED} in its absolute form')
    assert relative.startswith('relative form')
    assert answers.goal([], 12, 3.35)[0].startswith(answers.UNANSWERED)


# cliffs

COUNTS = {24: ['tp'] * 12, 18: ['tp', 'spd'] * 6, 16: ['tp', 'spd', 'spd'] * 4, 12: ['spd'] * 12,
          8: ['spd', 'parallel'] * 6, 6: ['spd', 'parallel', 'parallel'] * 4, 2: ['parallel'] * 12}


def points(losses):
    """A curve of nothing but its points. losses: {communications: {seed: loss}}"""
    return [SimpleNamespace(communications=count, losses=own) for count, own in losses.items()]


def write_curve(tmp_path, mean, seeds=5, noise=0.002):
    """
    The curve of runs that lie mean(communications) above the dense control.

    From seed to seed the control varies by ten times as much as the differences to it.
    """
    random = np.random.default_rng(1)
    dense = {seed: 2 + 10 * noise * random.standard_normal() for seed in range(seeds)}
    write_run(tmp_path, 'dense', dense, tp_size=1)
    for count, types in COUNTS.items():
        off = {seed: noise * random.standard_normal() * (count < 24) for seed in dense}
        losses = {seed: dense[seed] + mean(count) + off[seed] for seed in dense}
        write_run(tmp_path, f'{count}comm', losses, types)
    return findings.curves(rows_under(tmp_path))[0]


@pytest.mark.parametrize('mean, answer', [
    (lambda count: 0.0005 * (24 - count) + 0.02 * max(0, 8 - count), 'yes: below 8 communications'),
    (lambda count: 0.004 * (24 - count), 'no'),
    (lambda count: -0.05 * math.log(count / 24), 'but as a logarithm does: gradual'),
    (lambda count: -0.0005 * (24 - count) - 0.02 * max(0, 8 - count), 'no: the loss does not rise'),
    (lambda count: 0.0, 'no'),
    (lambda count: 0.5 + 0.02 * max(0, 8 - count), 'within the rounding floor of 5.0e-01'),
])
def test_a_cliff_is_told_from_a_line_and_a_logarithm(tmp_path, mean, answer):
    line = answers.cliff(write_curve(tmp_path, mean))[0]
    assert answer in line and line.startswith('yes') == answer.startswith('yes')


def test_a_bend_is_recovered_and_its_p_value_corrected_for_the_choice_of_place():
    bends = [0.001, 0.002, 0.0022, 0.0031]  # of the seeds
    bend = findings.fit_bend(points({
        count: {seed: 2 + seed + 0.004 * (24 - count) + own * max(0, 8 - count)
                for seed, own in enumerate(bends)} for count in COUNTS}))
    assert bend.at == 8 and bend.seeds == [0, 1, 2, 3]
    assert (bend.bend.mean, bend.bend.n) == (pytest.approx(np.mean(bends)), 4)
    assert bend.slopes == pytest.approx((0.004, 0.004 + np.mean(bends)))
    assert bend.p == pytest.approx(5 * ttest_1samp(bends, 0).pvalue)  # five counts could have been its place
    assert bend.residuals['bent'] < 1e-20 < 1e-6 < bend.residuals['straight']


def test_straight_lines_are_seldom_called_a_bend():
    random, called = np.random.default_rng(2), 0
    for _ in range(200):
        losses = {count: {seed: 0.004 * (24 - count) + 0.01 * random.standard_normal() for seed in range(4)}
                  for count in COUNTS}
        called += findings.fit_bend(points(losses)).p < 0.05
    assert called <= 15  # a test that is wrong once in twenty times makes 10 of 200


def test_a_cliff_takes_four_counts_and_two_seeds(tmp_path):
    rows = write_curve(tmp_path, lambda count: 0.02 * max(0, 8 - count), seeds=1)
    assert answers.cliff(rows)[0].startswith(f'{answers.UNANSWERED}: one seed, no interval, so no test')
    assert answers.cliff(rows[:3]) == [
        f'{answers.UNANSWERED}: it takes four counts that share a seed, here are 3 counts']


def test_the_cliff_keeps_the_most_runs_in_which_each_seed_has_each_count():
    losses = {count: {seed: 2 + 0.02 * max(0, 8 - count) for seed in range(5)} for count in COUNTS}
    losses[18].pop(4)
    bend = findings.fit_bend(points(losses))  # 4 seeds of 7 counts are 28 runs, 5 of 6 are 30
    assert bend.seeds == [0, 1, 2, 3, 4] and 18 not in [row.communications for row in bend.curve]
    losses[16].pop(4)
    bend = findings.fit_bend(points(losses))
    assert bend.seeds == [0, 1, 2, 3] and len(bend.curve) == 7


# comparisons


def test_comparisons_are_of_rows_that_differ_in_one_thing(tmp_path):
    write_run(tmp_path, 'mixed', shifted(0.01, 0.01, 0.01), ['tp', 'spd'] * 2)
    write_run(tmp_path, 'first', shifted(0.05, 0.051, 0.052), ['tp', 'tp', 'spd', 'spd'])
    write_run(tmp_path, 'mean', shifted(0.03, 0.03, 0.03), ['tp', 'spd'] * 2, merge='mean')
    write_run(tmp_path, 'attn', shifted(0.0, 0.02, 0.04), ['tp', 'attn_spd'] * 2)
    write_run(tmp_path, 'other', shifted(0, 0, 0), SPD)
    write_run(tmp_path, 'many', shifted(0.02, 0.02, 0.02), SPD, tp_size=8)
    write_run(tmp_path, 'many-mean', shifted(0, 0, 0), SPD, tp_size=16, merge='mean')  # two things: no pair
    rows = rows_under(tmp_path)
    assert [(one.kind, one.first.name, one.second.name, round(one.difference.mean, 4))
            for one in findings.comparisons(rows)] == [
        ('placement', 'mixed', 'first', -0.041), ('merge', 'mean', 'mixed', 0.02),
        ('sync', 'attn', 'mixed', 0.01), ('tp_size', 'many', 'other', 0.02)]
    line, = answers.compared(rows, 'placement', 'none')
    assert line.startswith('[tp, spd] x 2 (tp_size 4) minus tp x 2, spd x 2 (tp_size 4): -0.0410')
    assert line.endswith('lower, floor unknown')
    line, = answers.compared(rows, 'merge', 'none')
    assert line.startswith('[tp, spd] x 2 (tp_size 4, merge mean) minus [tp, spd] x 2 (tp_size 4): +0.0200')
    assert answers.compared(rows[:1], 'merge', 'none') == [f'{answers.UNANSWERED}: none']


@pytest.mark.parametrize('change', [
    dict(merge='mean'), dict(block_types=['mean_spd'] * 12),  # the second as earlier versions called it
    dict(embed_scale=2.0), dict(perturb=1e-7),
    *(dict(block_types=[name, *['spd'] * 11]) for name in [*sorted(COMMUNICATIONS.keys() - runs.GUIDE_TYPES),
                                                           'unlisted'])])
def test_other_merges_and_blocks_are_on_curves_of_their_own(tmp_path, change):
    write_run(tmp_path, 'dense', DENSE, tp_size=1)
    write_run(tmp_path, 'plain', shifted(0.01, 0.02, 0.03), ['spd'] * 12)
    write_run(tmp_path, 'other', shifted(0.03, 0.03, 0.03), **dict(block_types=['spd'] * 12) | change)
    rows = rows_under(tmp_path)
    assert [[row.name for row in curve] for curve in findings.curves(rows)] == [['plain'], ['other']]
    names = [findings.curve_name(row) for row in rows[1:]]
    assert names[0] == 'tp_size 4' and re.match('tp_size 4, (merge mean|embed_scale|perturb|with )', names[1])
    assert rows[1].label != rows[2].label and rows[1].title != rows[2].title
    text = ' '.join(answers.goal(rows, 12, 3.35))
    assert rows[1].title in text and rows[2].title not in text


# width


def at_widths(tmp_path, differences):
    """Runs of 24 and 12 communications and dense ones of {width: differences of 12 by seed}."""
    for width, own in differences.items():
        size = dict(info=dict(parameters=width**2), n_embd=width)
        write_run(tmp_path, f'dense-n_embd={width}', DENSE, tp_size=1, **size)
        write_run(tmp_path, f'24comm-n_embd={width}', DENSE, ['tp'] * 12, **size)
        write_run(tmp_path, f'12comm-n_embd={width}', shifted(*own), ['spd'] * 12, **size)


def test_width_trend_by_hand(tmp_path):
    # log2(width / 128) is -1, 0, 1; 0.015 a doubling about 0.04 / 3 leaves 0.005 / 3 * (1, -2, 1): the
    # deviation about the line is 0.01 / sqrt(6). from a table, t(0.975, 1) = 12.7062
    at_widths(tmp_path, {64: (0.0,), 128: (0.01,), 256: (0.03,)})
    trend, = findings.width_trends(rows_under(tmp_path))
    deviation = 0.01 / math.sqrt(6)
    assert (trend.slope.mean, trend.slope.n) == (pytest.approx(0.015), 3)
    assert trend.slope.half == pytest.approx(12.7062 * deviation / math.sqrt(2), rel=1e-5)
    middle = trend.at(128)
    assert middle.mean == pytest.approx(0.04 / 3)
    assert middle.half == pytest.approx(12.7062 * deviation / math.sqrt(3), rel=1e-5)
    beyond = trend.at(1024)  # three doublings from the middle
    assert beyond.mean == pytest.approx(0.04 / 3 + 3 * 0.015)
    assert beyond.half == pytest.approx(12.7062 * deviation * math.sqrt(1 / 3 + 9 / 2), rel=1e-5)


def test_width_is_answered_with_what_would_refute_it(tmp_path):
    at_widths(tmp_path, {64: (-0.02, -0.03, -0.02), 128: (-0.01, 0.0, 0.01), 256: (0.03, 0.02, 0.035)})
    text = ' '.join(answers.width(rows_under(tmp_path)))
    assert 'the difference rises with width' in text and 'would refute' in text


def test_width_trend_takes_two_widths_of_one_recipe(tmp_path):
    at_widths(tmp_path, {64: (-0.02, -0.03, -0.02)})
    write_run(tmp_path, 'dense-other', DENSE, tp_size=1, n_embd=128, learning_rate=1e-3)
    write_run(tmp_path, '12comm-other', shifted(0, 0, 0), ['spd'] * 12, n_embd=128, learning_rate=1e-3)
    assert answers.width(rows_under(tmp_path))[0].startswith(answers.UNANSWERED)


# predicted step times


def test_the_pareto_front_and_the_fastest_that_is_no_worse(tmp_path):
    write_run(tmp_path, 'dense', DENSE, tp_size=1)
    write_run(tmp_path, '24comm', shifted(0, 0, 0), COUNTS[24])
    write_run(tmp_path, '18comm', shifted(0.02, 0.02, 0.021), COUNTS[18])
    write_run(tmp_path, '12comm', shifted(0.01, 0.01, 0.011), COUNTS[12])
    write_run(tmp_path, '2comm', shifted(0.2, 0.2, 0.21), COUNTS[2])
    assert answers.sweet_spot(rows_under(tmp_path), None)[0].startswith(answers.UNANSWERED)
    rows = rows_under(tmp_path, predict=by_count)
    assert [row.name for row in findings.front(rows)] == ['2comm', '12comm', '24comm']  # 12 beats 18 in both
    assert 'no worse than dense: tp x 12 (tp_size 4), 24 ms' in answers.sweet_spot(rows, 'a link')[1]
    assert 'by communications: 18: 1.33, 12: 2.00, 2: 12.00' in ' '.join(answers.speed(rows, 'a link'))


def test_step_times_are_predicted_from_the_configs(tmp_path, capsys, no_plots):
    for count, tp_size in ((12, 4), (2, 4), (2, 1)):
        keys = vars(load([f'{ROOT}/config/train_gpt2_{count}comm.py', f'{ROOT}/config/cpu.py',
                          f'--tp_size={tp_size}']))
        write_run(tmp_path, f'{count}-{tp_size}', {1: 2.0}, **keys | dict(tp_size=tp_size, seed=1))
    write_run(tmp_path, 'odd', {1: 2.0}, **keys | dict(tp_size=4, seed=1, batch_size=1))
    seconds = []
    for link in ((25, 30), (25, 300)):
        predict, reasons, words = compare.step_predictor(read_all(tmp_path), link)
        rows = rows_under(tmp_path, predict=predict)
        seconds.append({row.name: row.seconds for row in rows})
        assert [run.name for run in reasons] == ['odd'] and seconds[-1].pop('odd') is None
        assert f'8 GPUs of 400 TFLOP/s on 4 nodes, 25 Gbit/s and {link[1]} us' in words
    fast, slow = seconds
    assert fast['2-4'] < fast['12-4'] and all(slow[name] > fast[name] for name in fast)
    out = compare_all(tmp_path, '--link=25,30', '--mix')
    assert 'odd: its step time is not predicted: ' in capsys.readouterr().out
    assert float({line['run']: line for line in csv_lines(out)}['2-4']['predicted_seconds']) == fast['2-4']


# how training went


def logged(losses, norms=None):
    """Log lines every 10 steps with these training losses."""
    return [dict(iter=10 * (i + 1), train_loss=loss, grad_norm=norms[i] if norms else 1.0, skipped=0)
            for i, loss in enumerate(losses)]


def test_steps_to_a_level_are_interpolated_and_the_level_is_one_that_all_reach(tmp_path):
    evals = [dict(iter=0, val_loss=5.0), dict(iter=10, val_loss=3.0)]
    write_run(tmp_path, 'dense', {1: 2.0, 2: 2.5}, tp_size=1, lines=evals)
    write_run(tmp_path, '4comm', {1: 2.2, 2: 2.4}, SPD, lines=evals)
    rows = table(tmp_path)
    assert rows[0].level == rows[4].level == 2.5  # the highest final loss
    steps = rows[0].values(lambda run: run.steps_to(2.5))
    assert steps == {1: 15.0, 2: 20.0}  # from 3.0 at step 10 to 2.0 and 2.5 at step 20
    assert rows[4].values(lambda run: run.steps_to(2.1)) == {}
    assert rows_under(tmp_path, level=4.0)[0].first.steps_to(4.0) == 5.0
    first = answers.convergence(rows_under(tmp_path, level=2.1))[0]
    assert 'not reached by every run of dense control (tp_size 1), spd x 4 (tp_size 4)' in first


def test_spikes_skipped_steps_and_norms(tmp_path):
    calm = [3 - 0.1 * (i % 2) for i in range(20)]
    spiked = calm[:15] + [3.11] + calm[16:]  # above 3.0 by more than their spread, 0.1
    norms = [9.0] + [1.0] * 18 + [2.0]
    keys = dict(warmup_iters=10, max_iters=200)
    write_run(tmp_path, 'dense', {1: 2.0}, tp_size=1, lines=logged(calm, norms), **keys)
    lines = logged(spiked)
    lines[-1]['skipped'] = 2
    lines[3]['train_loss'] = None  # a step whose loss was not finite
    write_run(tmp_path, '4comm', {1: 2.0}, SPD, lines=lines, **keys)
    dense, row = rows_under(tmp_path)
    assert dense.first.spikes == [] and row.first.spikes == [160] and row.first.skipped == 2
    assert findings.highest_norm(dense) == 2.0  # 9.0 was within warmup
    spikes = answers.stability([dense, row])[0]
    assert 'spd x 4' in spikes and 'dense' not in spikes


def test_generalisation_gap_and_drift(tmp_path):
    apart = dict(drift=[0.0, 0.1, 0.3], drift_cosine=[None, 0.5, -0.5])
    write_run(tmp_path, 'dense', DENSE, tp_size=1, last=dict(fixed_train_loss=1.9))
    write_run(tmp_path, '8comm', DENSE, last=dict(fixed_train_loss=1.9))
    write_run(tmp_path, '4comm', DENSE, SPD, last=dict(fixed_train_loss=1.8) | apart)
    rows = rows_under(tmp_path)
    assert runs.to_dense(rows[2], lambda run: run.gap).mean == pytest.approx(0.1)
    assert 'a larger gap than dense in 1 of 2 configs, furthest in spd x 4 (tp_size 4): +0.1000' in ' '.join(
        answers.overfitting(rows))
    assert 'by communications: 4: 0.30' in answers.drifting(rows)[0]
    assert answers.drifting(rows[:2])[0].startswith(answers.UNANSWERED)


@pytest.mark.parametrize('block_types, short', [
    (['spd'] * 12, 'spd x 12'), (['tp', 'spd', 'spd'] * 4, '[tp, spd, spd] x 4'),
    (['spd'] * 6 + ['tp'] * 6, 'spd x 6, tp x 6'), (['tp', 'spd', 'spd'], 'tp, spd x 2')])
def test_pattern(block_types, short):
    assert pattern(block_types) == short


def test_start_imports_nothing_heavy():
    heavy = {'torch', 'scipy', 'matplotlib', 'numpy', 'wandb'}
    code = f'import sys, compare; print({heavy} & sys.modules.keys())'
    process = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True)
    assert process.stdout == 'set()\n', process.stderr


# W&B


def test_wandb_offline_gets_the_table_and_the_plots(tmp_path, monkeypatch):
    monkeypatch.setenv('WANDB_MODE', 'offline')
    monkeypatch.setenv('WANDB_CONSOLE', 'off')
    monkeypatch.setattr(plots, 'PLOTS', dict(loss=plots.plot_tradeoff))
    write_run(tmp_path / 'out', 'dense', DENSE, tp_size=1)
    write_run(tmp_path / 'out', '4comm', shifted(0.02, 0.021, 0.022), SPD)
    path, = compare_all(tmp_path / 'out', '--wandb').glob('wandb/offline-run-*/*.wandb')
    records = {record.WhichOneof('record_type'): record for record in wandb_records(path)}
    run = records['run'].run
    assert (run.project, run.job_type, run.display_name) == ('owt', 'compare', 'compare')
    keys = {item.key or item.nested_key[0] for item in records['history'].history.item}
    assert {'table', 'answers', 'report', 'plots/loss'} <= keys
    table, = path.parent.glob('files/media/table/table_*.json')
    kept = json.loads(table.read_text())
    assert [dict(zip(kept['columns'], row))['val_loss'] for row in kept['data']] == [
        row.loss for row in rows_under(tmp_path / 'out')]


class StandIn:
    """A W&B Api whose project holds what was logged of run folders. lacking: keys missing in its configs"""

    def __init__(self, root, lacking=()):
        self.root, self.lacking = root, lacking

    def runs(self, project, filters, lazy):
        assert (project, filters) == ('me/owt', dict(jobType='train'))
        for folder in sorted(self.root.iterdir()):
            info = json.loads((folder / 'run.json').read_text())
            lines = map(json.loads, (folder / 'metrics.jsonl').read_text().splitlines())
            charts = [{CHARTS.get(key, key): value for key, value in line.items()} for line in lines]
            reduced = {f'all_reduces_{way}': n for way, n in info['all_reduces'].items()}
            config = {key: info[key] for key in TRACKED & info.keys()} | info['config'] | reduced
            config = {key: value for key, value in config.items() if key not in self.lacking}
            yield SimpleNamespace(path=['me', 'owt', folder.name], name=info['name'], state=info['state'],
                                  config=config, scan_history=lambda charts=charts: iter(charts))


def test_runs_come_back_from_wandb(tmp_path, monkeypatch, capsys, no_plots):
    evaluated = dict(last=dict(val_tokens=100))
    write_run(tmp_path / 'out', 'dense', DENSE, tp_size=1, **evaluated)
    write_run(tmp_path / 'out', '4comm', shifted(0.02, 0.021, 0.022), SPD, **evaluated)
    write_run(tmp_path / 'out', '4comm', {4: 9.0}, SPD, state='crashed')
    there = runs.read_wandb('me/owt', StandIn(tmp_path / 'out'))
    rows, local = runs.group([run for run in there if not run.trouble]), rows_under(tmp_path / 'out')
    assert [(row.name, row.losses) for row in rows] == [(row.name, row.losses) for row in local]
    assert rows[1].first.series('train_loss') == {10: 4.0, 20: 3.0}
    assert runs.to_dense(rows[1]) == runs.to_dense(local[1])
    monkeypatch.setattr('wandb.Api', lambda: StandIn(tmp_path / 'out'))
    compare.main(['--from_wandb=me/owt', f'--out={tmp_path / "cmp"}'])
    out = capsys.readouterr().out
    assert '+0.0210 [+0.0185, +0.0235] (n=3)' in out and 'me/owt/4comm-seed4: crashed, last seen' in out


def test_keys_that_wandb_lacks_take_their_default_unless_there_is_none(tmp_path):
    write_run(tmp_path, 'mean', {1: 2.0}, ['mean_spd'] * 4, last=dict(val_tokens=100))
    run, = runs.read_wandb('me/owt', StandIn(tmp_path, lacking=('n_embd', 'device')))
    assert not run.trouble and run.loss == 2.0
    assert (run.config['block_types'], run.config['merge']) == (SPD, 'mean')
    assert (run.config['n_embd'], run.config['batch_size']) == (768, 12)
    run, = runs.read_wandb('me/owt', StandIn(tmp_path, lacking=('max_iters',)))
    assert run.trouble == 'its config in W&B lacks max_iters'


def test_runs_in_wandb_of_another_program_are_named(tmp_path):
    other = SimpleNamespace(path=['me', 'owt', 'x'], name='x', state='finished', config=dict(lr=1))
    run, = runs.read_wandb('me/owt', SimpleNamespace(runs=lambda *_, **__: [other]))
    assert 'its config in W&B lacks' in run.trouble and 'block_types' in run.trouble


@pytest.mark.parametrize('flag', ['--wandb', '--from_wandb=me/owt'])
def test_a_missing_wandb_is_reported_before_any_work(tmp_path, monkeypatch, flag):
    monkeypatch.setitem(sys.modules, 'wandb', None)
    message = refused(tmp_path, flag, f'--out={tmp_path / "cmp"}')
    assert flag.partition('=')[0] in message and 'not installed' in message
    assert not (tmp_path / 'cmp').exists()


@pytest.mark.parametrize('flag', ['--link=25', '--link=25,-1', '--link=a,b', '--level=x', '--level=nan'])
def test_mistyped_flags_are_refused(flag):
    assert flag.partition('=')[2].partition(',')[0] in refused(flag)
