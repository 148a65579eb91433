"""compare.py on run folders written here, with differences that can be worked out by hand."""
import csv
import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from scipy.stats import linregress, t, ttest_1samp, ttest_rel

from analysis import answers
import compare
from analysis import plots
from analysis import runs
from configurator import communications, load, pattern
from training.logger import CHARTS, TRACKED
from test_train import wandb_records

TP, SPD, PARALLEL = ['tp'] * 4, ['spd'] * 4, ['parallel'] * 4     # 8, 4 and 2 communications
DENSE = {1: 2.0, 2: 2.1, 3: 2.2}


def write_run(root, name, losses, block_types=TP, tp_size=4, state='finished', corpus={}, info={}, lines=None,
              last={}, **keys):
    """
    Run folders root/name-seedN, one for each seed of {seed: final validation loss}.

    lines: of metrics.jsonl before the last evaluation; last: what that says beside the loss.
    """
    for seed, loss in losses.items():
        folder = root / f'{name}-seed{seed}'
        folder.mkdir(parents=True)
        config = dict(out_dir=str(folder), seed=seed, block_types=block_types, tp_size=tp_size,
                      dataset='pystdlib', batch_size=12, gradient_accumulation_steps=40, learning_rate=6e-4,
                      max_iters=20, device='cpu', log_interval=10, n_embd=64, warmup_iters=0,
                      wandb_project='owt') | keys
        reduced = 0 if tp_size == 1 else 3
        run = dict(name=folder.name, state=state, config=config, parameters=620_032,
                   corpus=dict(name='pystdlib', corpus='Some text', tokenizer='byte', vocab_size=257,
                               val_sha256='ab') | corpus,
                   communications=communications(block_types, tp_size),
                   all_reduces={'forward': reduced, 'backward': reduced}) | info
        (folder / 'run.json').write_text(json.dumps(run))
        lines = [dict(iter=0, val_loss=5.5), dict(iter=10, train_loss=4.0, tokens_per_sec=10.0),
                 dict(iter=20, train_loss=3.0, tokens_per_sec=30.0)] if lines is None else lines
        lines = lines + [dict(iter=config['max_iters'], val_loss=loss) | last] * (state == 'finished')
        (folder / 'metrics.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))


def shifted(*shifts):
    """The dense control's losses plus these, seed by seed."""
    return {seed: loss + shift for (seed, loss), shift in zip(DENSE.items(), shifts)}


def rows_under(root, level=None):
    """The rows of the finished runs under root."""
    found = [runs.read_run(folder) for folder in runs.find_runs([root])[0]]
    return runs.group([run for run in found if not run.trouble], level)


def table(root):
    """{communications: row} of the finished runs under root."""
    return {row.communications: row for row in rows_under(root)}


def refused(*argv):
    """The one line with which compare.py ends."""
    with pytest.raises(SystemExit) as end:
        compare.main([str(arg) for arg in argv])
    assert end.value.code not in (0, None)
    assert '\n' not in str(end.value.code)
    return str(end.value.code)


def test_differences_are_paired_and_judged(tmp_path):
    write_run(tmp_path, 'dense', DENSE, tp_size=1)
    write_run(tmp_path, '8comm', shifted(-0.001, 0.002, 0.001))
    write_run(tmp_path, '4comm', shifted(0.020, 0.021, 0.022), SPD)
    write_run(tmp_path, '2comm', shifted(0.0015, 0.0015, 0.0016), PARALLEL)
    rows = table(tmp_path)
    assert list(rows) == [0, 8, 4, 2]
    spread = runs.to_dense(rows[4])
    # standard deviation 0.001, t(0.975, 2) = 4.302653
    assert spread.n == 3 and spread.mean == pytest.approx(0.021)
    assert spread.half == pytest.approx(4.302653 * 0.001 / math.sqrt(3), rel=1e-5)
    low, high = ttest_rel(list(rows[4].losses.values()), list(DENSE.values())).confidence_interval(0.95)
    assert (spread.mean - spread.half, spread.mean + spread.half) == pytest.approx((low, high))
    assert [rows[count].floor for count in (8, 4, 2)] == pytest.approx([0.002] * 3)
    assert runs.judge(spread, 0.002) == 'higher'
    assert runs.judge(runs.to_dense(rows[2]), 0.002) == 'no difference'      # its interval excludes 0
    assert runs.judge(runs.estimate([0.01, 0.02, 0.03]), 0.002) == 'undecided'       # 0.02 +- 0.0248
    assert runs.judge(runs.estimate([-0.1, -0.11]), None) == 'lower, floor unknown'


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
    assert plots.placed(row) == row.control.loss + 0.5


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
    message = refused(tmp_path, '--out', tmp_path / 'cmp')
    assert f'{path} line 5' in message


@pytest.mark.parametrize('other, told', [
    (dict(learning_rate=1e-3), 'learning_rate is '),
    (dict(max_iters=10), 'max_iters is '),
    (dict(batch_size=6), 'windows per step is '),
    (dict(corpus=dict(val_sha256='cd')), 'corpus val_sha256 is '),
])
def test_mixed_runs_are_refused(tmp_path, capsys, other, told):
    write_run(tmp_path, 'dense', {1: 2.0}, tp_size=1)
    write_run(tmp_path, '4comm', {1: 2.5}, SPD, **other)
    message = refused(tmp_path, '--out', tmp_path / 'cmp')
    assert told in message and '4comm-seed1' in message and 'dense-seed1' in message
    assert message.count(' is ') == 1       # and in nothing else
    compare.main([str(tmp_path), '--mix', f'--out={tmp_path / "cmp"}'])
    out = capsys.readouterr().out
    assert 'no dense control among these runs' in out       # of its own recipe and corpus there is none


def test_runs_that_differ_in_no_recipe_compare(tmp_path):
    write_run(tmp_path, 'dense', {1: 2.0}, tp_size=1)
    write_run(tmp_path, '4comm', {1: 2.5}, SPD, batch_size=8, gradient_accumulation_steps=60, device='cuda',
              log_interval=1)
    assert runs.to_dense(table(tmp_path)[4]).mean == 0.5


def test_unfinished_runs_are_named_and_in_no_mean(tmp_path, capsys):
    write_run(tmp_path, 'dense', {1: 2.0}, tp_size=1)
    write_run(tmp_path, '4comm', {1: 2.5}, SPD)
    write_run(tmp_path, '4comm', {2: 0}, SPD, state='failed')
    write_run(tmp_path, '4comm', {3: math.nan}, SPD)
    (tmp_path / 'crashed').mkdir()
    (tmp_path / 'crashed' / 'log.txt').write_text('no such device\n')
    compare.main([str(tmp_path), f'--out={tmp_path / "cmp"}'])
    out = capsys.readouterr().out
    assert '4comm-seed2: failed, last seen at step 20 of 20' in out
    assert '4comm-seed3: diverged: its validation loss is nan' in out
    assert 'crashed: ended before it wrote run.json' in out
    lines = list(csv.DictReader(open(tmp_path / 'cmp' / 'table.csv')))
    assert [(line['run'], line['seeds'], line['val_loss']) for line in lines[:2]] == [
        ('dense', '1', '2.0'), ('4comm', '1', '2.5')]
    assert len(lines) == 5 and {line['val_loss'] for line in lines[2:]} == {''}
    assert all(line['corpus'] == 'Some text' for line in lines[:2])


def test_a_run_given_twice_is_refused(tmp_path):
    write_run(tmp_path, 'a', {1: 2.0}, SPD)
    write_run(tmp_path, 'b', {1: 2.1}, SPD)
    assert 'one run twice' in refused(tmp_path, '--out', tmp_path / 'cmp')


def test_without_a_dense_control_differences_are_blank(tmp_path, capsys):
    write_run(tmp_path, '4comm', {1: 2.0}, SPD)
    compare.main([str(tmp_path), f'--out={tmp_path / "cmp"}'])
    assert '4comm: no dense control among these runs' in capsys.readouterr().out
    assert list(csv.DictReader(open(tmp_path / 'cmp' / 'table.csv')))[0]['difference'] == ''


class Page(HTMLParser):
    """What a page is made of; asserts that its elements close in order."""

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
    out = tmp_path / 'cmp'
    out.mkdir()
    (out / 'drift.svg').write_text('of an earlier comparison')
    compare.main([str(tmp_path / 'out'), f'--out={out}'])
    printed, text = capsys.readouterr().out, (out / 'table.md').read_text()
    page = (out / 'report.html').read_text().replace('\xa0', ' ')
    for said in (printed, text, page):
        assert 'Some text, byte tokens, 20 steps' in said and '+0.0210 [+0.0185, +0.0235] (n=3)' in said
        assert 'higher' in said and 'seed9: failed, last seen at step 20 of 20' in said
    found, lines = json.loads((out / 'table.json').read_text()), list(csv.DictReader(open(out / 'table.csv')))
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
    # in one file, without scripts
    assert not re.search('https?:', page) and '<4>' not in page
    made = Page(page)
    assert 'script' not in made.tags
    assert made.links and all(link.startswith('data:image/') for link in made.links)


def test_plots_are_the_same_byte_for_byte(tmp_path, monkeypatch):
    write_run(tmp_path / 'out', 'dense', DENSE, tp_size=1)
    write_run(tmp_path / 'out', '4comm', shifted(0.02, 0.021, 0.022), SPD)
    monkeypatch.setattr(plots, 'PLOTS', dict(a=plots.plot_tradeoff, b=plots.plot_differences))
    for name in ('one', 'other'):
        (tmp_path / name).mkdir()
        plots.draw_all(rows_under(tmp_path / 'out'), tmp_path / name)
    for file in ('a.svg', 'a.png', 'b.svg'):
        assert (tmp_path / 'one' / file).read_bytes() == (tmp_path / 'other' / file).read_bytes()


def test_every_plot_draws_many_configs(tmp_path):
    apart = dict(drift=[0.0, 0.1, 0.3], drift_cosine=[None, 0.5, -0.5])
    kinds = dict(a=['tp', 'spd'] * 2, b=['tp', 'tp', 'spd', 'spd'], c=SPD, d=['mean_spd'] * 4)
    for width, names in {64: 'abcd', 128: 'c'}.items():
        size = dict(info=dict(parameters=width**2), n_embd=width, max_iters=200, last=apart,
                    lines=logged([3 + 0.1 * (i % 3) for i in range(20)]))
        write_run(tmp_path / 'out', f'dense{width}', DENSE, tp_size=1, **size)
        for name in names:
            write_run(tmp_path / 'out', f'{name}{width}', shifted(0, 0.1, 0.2), kinds[name], **size)
    rows = rows_under(tmp_path / 'out')
    for row in rows:
        row.seconds = 0.1 + row.communications / 100
    assert plots.draw_all(rows, tmp_path).keys() == plots.PLOTS.keys() - {'tokens_per_sec'}


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


COUNTS = {24: ['tp'] * 12, 18: ['tp', 'spd'] * 6, 16: ['tp', 'spd', 'spd'] * 4, 12: ['spd'] * 12,
          8: ['spd', 'parallel'] * 6, 6: ['spd', 'parallel', 'parallel'] * 4, 2: ['parallel'] * 12}


def curve(tmp_path, mean, seeds=5, noise=0.002):
    """
    The curve of runs that lie mean(communications) above the dense control, which varies ten times as much
    from seed to seed as they do beside it.
    """
    random = np.random.default_rng(1)
    dense = {seed: 2 + 10 * noise * random.standard_normal() for seed in range(seeds)}
    write_run(tmp_path, 'dense', dense, tp_size=1)
    for count, types in COUNTS.items():
        off = {seed: noise * random.standard_normal() * (count < 24) for seed in dense}
        losses = {seed: dense[seed] + mean(count) + off[seed] for seed in dense}
        write_run(tmp_path, f'{count}comm', losses, types)
    return answers.curves(rows_under(tmp_path))[0]


@pytest.mark.parametrize('mean, answer', [
    (lambda count: 0.0005 * (24 - count) + 0.02 * max(0, 8 - count), 'yes: below 8 communications'),
    (lambda count: 0.004 * (24 - count), 'no'),
    (lambda count: -0.05 * math.log(count / 24), 'but as a logarithm does: gradual'),
    (lambda count: -0.0005 * (24 - count) - 0.02 * max(0, 8 - count), 'no: the loss does not rise'),
    (lambda count: 0.0, 'no'),
    (lambda count: 0.5 + 0.02 * max(0, 8 - count), 'within the rounding floor of 5.0e-01'),
])
def test_a_cliff_is_told_from_a_line_and_a_logarithm(tmp_path, mean, answer):
    line = answers.cliff(curve(tmp_path, mean))[0]
    assert answer in line and line.startswith('yes') == answer.startswith('yes')


def test_the_bend_is_a_least_squares_fit_and_its_p_value_a_t_test_over_seeds(tmp_path):
    rows = curve(tmp_path, lambda count: 0.004 * (24 - count) + 0.001 * max(0, 8 - count))
    bend = answers.fit_bend(rows)
    x, at = np.array(list(COUNTS)), bend.at
    design = np.stack((np.ones(7), 24 - x, np.maximum(0, at - x)), axis=1)
    losses = np.array([list(row.losses.values()) for row in rows])
    bends = np.linalg.lstsq(design, losses, rcond=None)[0][2]
    assert bend.bend.mean == pytest.approx(bends.mean()) and bend.bend.n == 5
    assert bend.p == pytest.approx(min(1, 5 * ttest_1samp(bends, 0).pvalue))
    squares = {other: np.linalg.lstsq(np.stack((np.ones(7), x, np.maximum(0, other - x)), axis=1),
                                      losses.mean(1), rcond=None)[1][0] for other in x[1:-1]}
    assert at == min(squares, key=squares.get) and bend.left['bent'] == pytest.approx(squares[at])


def test_straight_lines_are_seldom_called_a_bend(tmp_path):
    random = np.random.default_rng(2)
    rows, called = curve(tmp_path, lambda count: 0.0), 0
    for _ in range(200):
        for row in rows:
            mean = 0.004 * (24 - row.communications)
            row.losses = {seed: mean + 0.01 * random.standard_normal() for seed in range(4)}
        called += answers.fit_bend(rows).p < 0.05
    assert called <= 15                 # a test that is wrong in one of twenty makes 10 of 200


def test_a_cliff_takes_four_counts_and_two_seeds(tmp_path):
    rows = curve(tmp_path, lambda count: 0.02 * max(0, 8 - count), seeds=1)
    assert answers.cliff(rows)[0].startswith(f'{answers.UNANSWERED}: one seed, no interval, so no test')
    assert answers.cliff(rows[:3]) == [
        f'{answers.UNANSWERED}: it takes four counts that share a seed, here are 3 counts']


def test_the_cliff_keeps_the_most_runs_in_which_each_seed_has_each_count(tmp_path):
    rows = curve(tmp_path, lambda count: 0.02 * max(0, 8 - count))
    rows[1].losses.pop(4)
    bend = answers.fit_bend(rows)       # 4 seeds of 7 counts are 28 runs, 5 of 6 are 30
    assert bend.seeds == [0, 1, 2, 3, 4] and 18 not in [row.communications for row in bend.curve]
    rows[2].losses.pop(4)
    bend = answers.fit_bend(rows)
    assert bend.seeds == [0, 1, 2, 3] and len(bend.curve) == 7


def test_comparisons_are_of_what_differs_in_one_thing(tmp_path):
    write_run(tmp_path, 'mixed', shifted(0.01, 0.01, 0.01), ['tp', 'spd'] * 2)
    write_run(tmp_path, 'first', shifted(0.05, 0.051, 0.052), ['tp', 'tp', 'spd', 'spd'])
    write_run(tmp_path, 'mean', shifted(0.03, 0.03, 0.03), ['mean_tp', 'mean_spd'] * 2)
    write_run(tmp_path, 'attn', shifted(0.0, 0.02, 0.04), ['tp', 'attn_spd'] * 2)
    write_run(tmp_path, 'other', shifted(0, 0, 0), SPD)
    write_run(tmp_path, 'many', shifted(0.02, 0.02, 0.02), SPD, tp_size=8)
    rows = rows_under(tmp_path)
    assert [(one.kind, one.first.name, one.second.name, round(one.difference.mean, 4))
            for one in answers.comparisons(rows)] == [
        ('placement', 'mixed', 'first', -0.041), ('merge', 'mean', 'mixed', 0.02),
        ('sync', 'attn', 'mixed', 0.01), ('tp_size', 'many', 'other', 0.02)]
    line, = answers.compared(rows, 'placement', 'none')
    assert line.startswith('[tp, spd] x 2 (tp_size 4) minus tp x 2, spd x 2 (tp_size 4): -0.0410')
    assert line.endswith('lower, floor unknown')
    assert answers.compared(rows[:1], 'merge', 'none') == [f'{answers.UNANSWERED}: none']


def test_variants_are_in_no_answer_about_plain_blocks(tmp_path):
    write_run(tmp_path, 'dense', DENSE, tp_size=1)
    write_run(tmp_path, 'mean', shifted(0.03, 0.03, 0.03), ['mean_spd'] * 12)
    write_run(tmp_path, 'plain', shifted(0.01, 0.02, 0.03), ['spd'] * 12)
    rows = rows_under(tmp_path)
    assert len(answers.curves(rows)) == 2
    told = ' '.join(answers.goal(rows, 12, 3.35))
    assert 'mean' not in told and 'spd x 12' in told


def at_widths(tmp_path, differences):
    """Runs of 24 and 12 communications and dense ones of {width: differences of 12 by seed}."""
    for width, own in differences.items():
        size = dict(info=dict(parameters=width**2), n_embd=width)
        write_run(tmp_path, f'dense-n_embd={width}', DENSE, tp_size=1, **size)
        write_run(tmp_path, f'24comm-n_embd={width}', DENSE, ['tp'] * 12, **size)
        write_run(tmp_path, f'12comm-n_embd={width}', shifted(*own), ['spd'] * 12, **size)


def test_width_trend_against_scipy(tmp_path):
    at_widths(tmp_path, {64: (-0.02, -0.03, -0.02), 128: (-0.01, 0.0, 0.01), 256: (0.03, 0.02, 0.035)})
    trend, = answers.width_trends(rows_under(tmp_path))
    x, y = np.log2([width for width, _ in trend.points]), [difference for _, difference in trend.points]
    line, quantile = linregress(x, y), t.ppf(0.975, 7)
    assert (trend.slope.mean, trend.slope.half) == pytest.approx((line.slope, quantile * line.stderr))
    there = linregress(x - math.log2(768), y)       # its intercept is the line at 768
    at = trend.at(768)
    assert (at.mean, at.half, at.n) == pytest.approx((there.intercept, quantile * there.intercept_stderr, 9))
    told = ' '.join(answers.width(rows_under(tmp_path)))
    assert 'the difference rises with width' in told and 'would refute' in told


def test_width_trend_takes_two_widths_of_one_recipe(tmp_path):
    at_widths(tmp_path, {64: (-0.02, -0.03, -0.02)})
    write_run(tmp_path, 'dense-other', DENSE, tp_size=1, n_embd=128, learning_rate=1e-3)
    write_run(tmp_path, '12comm-other', shifted(0, 0, 0), ['spd'] * 12, n_embd=128, learning_rate=1e-3)
    assert answers.width(rows_under(tmp_path))[0].startswith(answers.UNANSWERED)


def test_the_pareto_front_and_the_fastest_that_is_no_worse(tmp_path):
    write_run(tmp_path, 'dense', DENSE, tp_size=1)
    write_run(tmp_path, '24comm', shifted(0, 0, 0), COUNTS[24])
    write_run(tmp_path, '18comm', shifted(0.02, 0.02, 0.021), COUNTS[18])
    write_run(tmp_path, '12comm', shifted(0.01, 0.01, 0.011), COUNTS[12])
    write_run(tmp_path, '2comm', shifted(0.2, 0.2, 0.21), COUNTS[2])
    rows = rows_under(tmp_path)
    assert answers.sweet_spot(rows, None)[0].startswith(answers.UNANSWERED)
    for row in rows:
        row.seconds = row.communications / 1000
    assert [row.name for row in answers.front(rows)] == ['2comm', '12comm', '24comm']   # 12 beat 18 in both
    assert 'no worse than dense: tp x 12 (tp_size 4), 24 ms' in answers.sweet_spot(rows, 'a link')[1]
    assert 'by communications: 18: 1.33, 12: 2.00, 2: 12.00' in ' '.join(answers.speed(rows, 'a link'))


def test_step_times_are_predicted_from_the_runs_configs(tmp_path):
    for count, tp_size in ((12, 4), (2, 4), (2, 1)):
        keys = vars(load([f'config/train_gpt2_{count}comm.py', 'config/cpu.py', f'--tp_size={tp_size}']))
        types = keys.pop('block_types')
        write_run(tmp_path, f'{count}-{tp_size}', {1: 2.0}, types, **keys | dict(tp_size=tp_size, seed=1))
    write_run(tmp_path, 'odd', {1: 2.0}, SPD * 3, **keys | dict(tp_size=4, seed=1, batch_size=1))
    rows = {row.name: row for row in rows_under(tmp_path)}
    words, (note,) = compare.predict_steps(list(rows.values()), (25, 30))
    assert '8 GPUs' in words and '4 nodes, 25 Gbit/s and 30 us' in words
    assert note.startswith('odd: its step time is not predicted') and rows['odd'].seconds is None
    fast = {name: row.seconds for name, row in rows.items() if name != 'odd'}
    assert fast['2-4'] < fast['12-4']
    compare.predict_steps(list(rows.values()), (25, 300))
    assert all(rows[name].seconds > seconds for name, seconds in fast.items())


# how training went


def logged(losses, norms=None):
    """Log lines every 10 steps with these training losses."""
    return [dict(iter=10 * (i + 1), train_loss=loss, grad_norm=norms[i] if norms else 1.0, skipped=0)
            for i, loss in enumerate(losses)]


def test_steps_to_a_level_are_interpolated_and_the_level_is_one_that_all_reach(tmp_path):
    evals = [dict(iter=0, val_loss=5.0), dict(iter=10, val_loss=3.0)]
    write_run(tmp_path, 'dense', {1: 2.0, 2: 2.5}, tp_size=1, lines=evals)
    write_run(tmp_path, '4comm', {1: 2.2, 2: 2.4}, SPD, lines=evals)
    rows = {row.communications: row for row in rows_under(tmp_path)}
    assert rows[0].level == rows[4].level == 2.5        # the highest final loss
    steps = rows[0].values(lambda run: run.steps_to(2.5))
    assert steps == {1: 15.0, 2: 20.0}      # from 3.0 at step 10 to 2.0 and 2.5 at step 20
    assert rows[4].values(lambda run: run.steps_to(2.1)) == {}
    assert rows_under(tmp_path, level=4.0)[0].first.steps_to(4.0) == 5.0
    told = answers.convergence(rows_under(tmp_path, level=2.1))
    assert 'not reached by every run of dense control (tp_size 1), spd x 4 (tp_size 4)' in told[0]


def test_spikes_skipped_steps_and_norms(tmp_path):
    calm = [3 - 0.1 * (i % 2) for i in range(20)]
    spiked = calm[:15] + [3.11] + calm[16:]         # above 3.0 by more than their spread, 0.1
    norms = [9.0] + [1.0] * 18 + [2.0]
    keys = dict(warmup_iters=10, max_iters=200)
    write_run(tmp_path, 'dense', {1: 2.0}, tp_size=1, lines=logged(calm, norms), **keys)
    lines = logged(spiked)
    lines[-1]['skipped'] = 2
    lines[3]['train_loss'] = None           # a step whose loss was not finite
    write_run(tmp_path, '4comm', {1: 2.0}, SPD, lines=lines, **keys)
    dense, row = rows_under(tmp_path)
    assert dense.first.spikes == [] and row.first.spikes == [160] and row.first.skipped == 2
    assert answers.highest_norm(dense) == 2.0           # 9.0 was within warmup
    told = answers.stability([dense, row])[0]
    assert 'spd x 4' in told and 'dense' not in told


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
    code = 'import sys, sweep, compare; print({"torch", "scipy", "matplotlib", "numpy"} & sys.modules.keys())'
    root = Path(compare.__file__).parent
    run = subprocess.run([sys.executable, '-c', code], cwd=root, capture_output=True, text=True)
    assert run.stdout == 'set()\n', run.stderr


# W&B


def test_wandb_offline_gets_the_table_and_the_plots(tmp_path, monkeypatch):
    monkeypatch.setenv('WANDB_MODE', 'offline')
    monkeypatch.setenv('WANDB_CONSOLE', 'off')
    monkeypatch.setattr(plots, 'PLOTS', dict(loss=plots.plot_tradeoff))
    write_run(tmp_path / 'out', 'dense', DENSE, tp_size=1)
    write_run(tmp_path / 'out', '4comm', shifted(0.02, 0.021, 0.022), SPD)
    compare.main([str(tmp_path / 'out'), f'--out={tmp_path / "cmp"}', '--wandb'])
    path, = (tmp_path / 'cmp').glob('wandb/offline-run-*/*.wandb')
    records = {record.WhichOneof('record_type'): record for record in wandb_records(path)}
    run = records['run'].run
    assert (run.project, run.job_type, run.display_name) == ('owt', 'compare', 'cmp')
    keys = {item.key or item.nested_key[0] for item in records['history'].history.item}
    assert {'table', 'answers', 'report', 'plots/loss'} <= keys
    table, = path.parent.glob('files/media/table/table_*.json')
    kept = json.loads(table.read_text())
    assert [dict(zip(kept['columns'], row))['val_loss'] for row in kept['data']] == [
        row.loss for row in rows_under(tmp_path / 'out')]


class StandIn:
    """A W&B Api whose projects hold what was logged of run folders."""

    def __init__(self, root):
        self.root = root

    def runs(self, project, filters, lazy):
        assert (project, filters) == ('me/owt', {'jobType': 'train'})
        for folder in sorted(self.root.iterdir()):
            info = json.loads((folder / 'run.json').read_text())
            lines = map(json.loads, (folder / 'metrics.jsonl').read_text().splitlines())
            charts = [{CHARTS.get(key, key): value for key, value in line.items()} for line in lines]
            reduced = {f'all_reduces_{way}': n for way, n in info['all_reduces'].items()}
            config = {key: info[key] for key in TRACKED & info.keys()} | info['config'] | reduced
            yield SimpleNamespace(path=['me', 'owt', folder.name], name=info['name'], state=info['state'],
                                  config=config, scan_history=lambda charts=charts: iter(charts))


def test_runs_come_back_from_wandb(tmp_path, monkeypatch, capsys):
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
    monkeypatch.setattr(plots, 'PLOTS', {})
    compare.main(['--from-wandb=me/owt', f'--out={tmp_path / "cmp"}'])
    out = capsys.readouterr().out
    assert '+0.0210 [+0.0185, +0.0235] (n=3)' in out and 'me/owt/4comm-seed4: crashed, last seen' in out


def test_runs_in_wandb_of_another_program_are_named(tmp_path):
    other = SimpleNamespace(path=['me', 'owt', 'x'], name='x', state='finished', config=dict(lr=1))
    run, = runs.read_wandb('me/owt', SimpleNamespace(runs=lambda *_, **__: [other]))
    assert 'its config in W&B lacks' in run.trouble and 'block_types' in run.trouble


@pytest.mark.parametrize('flag', ['--link=25', '--link=25,-1', '--link=a,b', '--level=x', '--level=nan'])
def test_mistyped_flags_are_refused(flag):
    assert flag.partition('=')[2].partition(',')[0] in refused(flag)
