"""
What rows of runs show, on run folders written here, with numbers that can be worked out by hand.

    python -m pytest tests/test_findings.py
"""

import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
from scipy.stats import t, ttest_1samp

import compare
from analysis import answers, families, findings, runs
from analysis.inside import inside
from configurator import COMMUNICATIONS, ROOT, load
from written_runs import (
    DENSE,
    INSIDE,
    SPD,
    by_count,
    compare_all,
    csv_lines,
    found_under,
    logged,
    observed,
    read_all,
    rows_under,
    shifted,
    table,
    write_run,
)

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
    first = answers.thresholds(rows_under(tmp_path))[0]
    assert first.question == 'Key question 1: below 3.35 with 12 communications?'
    assert first.lines[0].startswith(f'spd x 12 (tp_size 4): {answer}')


@pytest.mark.parametrize('off', [
    dict(corpus=dict(tokenizer='byte')), dict(info=dict(parameters=620_032)), dict(dataset='pystdlib'),
    dict(max_iters=600)])
def test_thresholds_are_not_applied_elsewhere(tmp_path, off):
    write_run(tmp_path, '12comm', {1: 2.0}, ['spd'] * 12, **(FULL | off))
    assert answers.thresholds(rows_under(tmp_path)) == []


# cliffs

COUNTS = {24: ['tp'] * 12, 18: ['tp', 'spd'] * 6, 16: ['tp', 'spd', 'spd'] * 4, 12: ['spd'] * 12,
          8: ['spd', 'parallel'] * 6, 6: ['spd', 'parallel', 'parallel'] * 4, 2: ['parallel'] * 12}


def points(losses):
    """A curve of nothing but its points. losses: {all-reduces: {seed: loss}}"""
    return [SimpleNamespace(all_reduces=dict(forward=count), losses=own) for count, own in losses.items()]


def write_curve(tmp_path, mean, seeds=5, noise=0.002):
    """
    The curve of runs that lie mean(all-reduces) above the dense control, and its bend.

    From seed to seed the control varies by ten times as much as the differences to it.
    """
    random = np.random.default_rng(1)
    dense = {seed: 2 + 10 * noise * random.standard_normal() for seed in range(seeds)}
    write_run(tmp_path, 'dense', dense, tp_size=1)
    for count, types in COUNTS.items():
        off = {seed: noise * random.standard_normal() * (count < 24) for seed in dense}
        losses = {seed: dense[seed] + mean(observed(types)) + off[seed] for seed in dense}
        write_run(tmp_path, f'{count}comm', losses, types)
    return found_under(tmp_path).bends[0]


@pytest.mark.parametrize('mean, answer', [
    (lambda count: 0.0005 * (24 - count) + 0.02 * max(0, 7 - count), 'yes: below 7 all-reduces'),
    (lambda count: 0.02 * max(0, 7 - count) - 0.15, 'no: the low end, 1 all-reduce, is not shown'),
    (lambda count: 0.004 * (24 - count), 'no'),
    (lambda count: -0.05 * math.log(count / 24), 'but as a logarithm does: gradual'),
    (lambda count: -0.0005 * (24 - count) - 0.02 * max(0, 8 - count), 'no: the loss does not rise'),
    (lambda count: 0.0, 'no'),
])
def test_a_cliff_is_told_from_a_line_and_a_logarithm(tmp_path, mean, answer):
    line = answers.cliff(*write_curve(tmp_path, mean))[0]
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


def test_a_cliff_takes_six_counts_and_two_seeds(tmp_path):
    curve, bend = write_curve(tmp_path, lambda count: 0.02 * max(0, 7 - count), seeds=1)
    assert answers.cliff(curve, bend)[0].startswith('not tested: one seed')
    assert findings.fit_bend(curve[:5]) is None and findings.fit_bend(curve[:6]) is not None
    assert answers.cliff(curve[:5], None) == []
    # without a bend, a low end that is as good as dense is an answer
    write_run(tmp_path / 'flat', 'dense', DENSE, ['tp'] * 12, tp_size=1)
    write_run(tmp_path / 'flat', '2comm', shifted(0.001, 0.0, -0.001), COUNTS[2])
    assert answers.all_cliffs(found_under(tmp_path / 'flat'))[0].startswith(
        'tp_size 4: no: the low end, 1 all-reduce, is no worse than dense: as good')


def test_the_cliff_keeps_the_most_runs_in_which_each_seed_has_each_count():
    losses = {count: {seed: 2 + 0.02 * max(0, 8 - count) for seed in range(5)} for count in COUNTS}
    losses[18].pop(4)
    bend = findings.fit_bend(points(losses))  # 4 seeds of 7 counts are 28 runs, 5 of 6 are 30
    assert bend.seeds == [0, 1, 2, 3, 4] and 18 not in map(findings.count, bend.curve)
    losses[16].pop(4)
    bend = findings.fit_bend(points(losses))
    assert bend.seeds == [0, 1, 2, 3] and len(bend.curve) == 7


# comparisons


def test_comparisons_are_of_rows_that_differ_in_one_thing(tmp_path):
    write_run(tmp_path, 'dense', DENSE, tp_size=1)
    write_run(tmp_path, 'mixed', shifted(0.01, 0.01, 0.01), ['tp', 'spd'] * 2)
    write_run(tmp_path, 'first', shifted(0.05, 0.051, 0.052), ['tp', 'tp', 'spd', 'spd'])
    write_run(tmp_path, 'mean', shifted(0.03, 0.03, 0.03), ['tp', 'spd'] * 2, merge='mean')
    write_run(tmp_path, 'attn', shifted(0.019, 0.02, 0.021), ['tp', 'attn_spd'] * 2)
    write_run(tmp_path, 'other', shifted(0, 0, 0), SPD)
    write_run(tmp_path, 'many', shifted(0, 0, 0), SPD, tp_size=8)
    write_run(tmp_path, 'many-mean', shifted(0, 0, 0.001), SPD, tp_size=16, merge='mean')  # two things
    found = found_under(tmp_path)
    assert [(one.kind, one.first.name, one.second.name, round(one.difference.mean, 4), one.verdict)
            for one in found.comparisons] == [
        ('placement', 'mixed', 'first', -0.041, 'lower'), ('merge', 'mean', 'mixed', 0.02, 'higher'),
        ('sync', 'attn', 'mixed', 0.01, 'higher'), ('tp_size', 'many', 'other', 0.0, 'identical'),
        # all others with 6 all-reduces over 4 ranks
        ('equal', 'first', 'attn', 0.031, 'higher'), ('equal', 'first', 'mean', 0.021, 'higher'),
        ('equal', 'attn', 'mean', -0.01, 'lower')]
    tested = sorted((one for one in found.comparisons if one.equal), key=lambda one: one.p)
    # two-sided t of the recipe's spread, times 6, 5 ... from the smallest on
    smallest, *_, largest = tested
    assert len(tested) == 6 and smallest.p_holm == pytest.approx(6 * smallest.p)
    assert largest.p_holm >= tested[-2].p_holm
    error = found.rows[0].spread.error(3)
    assert largest.p == pytest.approx(2 * t.sf(0.01 / error, found.rows[0].spread.df))
    assert answers.pairs(found, 'merge')[0].startswith(
        '[tp, spd] x 2 (tp_size 4, merge mean) minus [tp, spd] x 2 (tp_size 4), both with 6 all-reduces: +0')
    assert answers.pairs(found, 'other') == []


@pytest.mark.parametrize('change', [
    dict(merge='mean'), dict(block_types=['mean_spd'] * 12),  # the second as earlier versions called it
    dict(embed_scale=2.0), dict(perturb=1e-7), dict(block_types_at='10:tp'),
    *(dict(block_types=[name, *['spd'] * 11]) for name in [*sorted(COMMUNICATIONS.keys() - runs.GUIDE_TYPES),
                                                           'unlisted'])])
def test_other_merges_and_blocks_are_on_curves_of_their_own(tmp_path, change):
    write_run(tmp_path, 'dense', DENSE, tp_size=1)
    write_run(tmp_path, 'plain', shifted(0.01, 0.02, 0.03), ['spd'] * 12)
    write_run(tmp_path, 'other', shifted(0.03, 0.03, 0.03), **dict(block_types=['spd'] * 12) | change)
    rows = rows_under(tmp_path)
    curves = findings.curves(rows)
    assert [[row.name for row in curve] for curve in curves] == [['plain'], ['other']]
    names = [findings.curve_name(row) for row, in curves]
    others = 'merge mean|embed_scale|perturb|block_types_at 10:tp|with '
    assert names[0] == 'tp_size 4' and re.match(f'tp_size 4, ({others})', names[1])
    assert rows[1].label != rows[2].label and rows[1].title != rows[2].title
    assert families.candidates(rows, 4) == [row for row in rows if row.name == 'plain']


# width and tokens


def at_widths(tmp_path, differences, **keys):
    """Runs of 24 and 12 communications and dense ones of {width: differences of 12 by seed}."""
    for width, own in differences.items():
        size = dict(info=dict(parameters=width**2), n_embd=width) | keys
        name = f'n_embd={width}-{"".join(map(str, keys.values()))}'
        write_run(tmp_path, f'dense-{name}', DENSE, tp_size=1, **size)
        write_run(tmp_path, f'24comm-{name}', DENSE, ['tp'] * 12, **size)
        write_run(tmp_path, f'12comm-{name}', shifted(*own), ['spd'] * 12, **size)


def test_width_trend_by_hand(tmp_path):
    # two seeds, with slopes 0.01 and 0.03 a doubling, without residuals: mean 0.02, deviation 0.02 / sqrt(2)
    at_widths(tmp_path, {64: (-0.01, -0.03), 128: (0, 0), 256: (0.01, 0.03)})
    trend, = found_under(tmp_path).trends
    quantile = 12.7062  # t(0.975, 1), from a table
    slope = trend.slope('widths')
    assert (slope.mean, slope.n) == (pytest.approx(0.02), 2)
    assert slope.half == pytest.approx(quantile * 0.01, rel=1e-5)
    assert trend.at(512).mean == pytest.approx(0.04)
    # two doublings from 128: deviation 0.04 / sqrt(2), of a new seed and the mean of two
    new = trend.prediction(512)
    assert (new.mean, new.half) == (pytest.approx(0.04), pytest.approx(
        quantile * 0.04 / math.sqrt(2) * math.sqrt(1.5), rel=1e-5))


def test_width_trend_keeps_the_head_size_where_it_can(tmp_path):
    for width, heads in ((64, 2), (128, 2), (128, 4), (256, 8)):
        at_widths(tmp_path, {width: (-0.01, -0.03)}, n_head=heads)
    trend, = found_under(tmp_path).trends
    assert [(row.first.config['n_embd'], row.first.config['n_head']) for row in trend.rows] == [
        (64, 2), (128, 4), (256, 8)]
    assert not answers.heads_grow(found_under(tmp_path))


def test_a_new_seed_lies_in_the_prediction_interval_in_19_of_20():
    rng, hits, draws = np.random.default_rng(3), 0, 500
    widths = [64, 128, 256]
    for _ in range(draws):
        slopes = rng.normal(0.01, 0.02, 5)
        points = {seed: [(width, 1, slope * math.log2(width / 128) + rng.normal(0, 0.01)) for width in widths]
                  for seed, slope in enumerate(slopes[:4])}
        new = findings.Trend([], points).prediction(768)
        hits += new.low < slopes[4] * math.log2(6) + rng.normal(0, 0.01) < new.high
    assert 0.92 < hits / draws < 0.98


def test_tokens_are_a_second_regressor(tmp_path):
    # 0.01 a doubling of the width, -0.02 a doubling of the tokens, in each of three seeds
    seeds = (0.001, 0.0, -0.001)
    for steps, doublings in ((20, 0), (80, 2)):
        lines = [dict(iter=0, val_loss=5.5)]
        at_widths(tmp_path, {width: [one + 0.01 * i - 0.02 * doublings for one in seeds]
                             for i, width in enumerate((64, 128))}, max_iters=steps, lines=lines)
    found = found_under(tmp_path)
    trend, = found.trends
    assert trend.regressors == ['widths', 'tokens'] and len(trend.points[1]) == 4
    assert trend.slope('widths').mean == pytest.approx(0.01)
    assert trend.slope('tokens').mean == pytest.approx(-0.02)
    assert 'falls with the number of tokens, -0.0200' in answers.trends(found, 'tokens')[0]
    assert trend.at(256).mean == pytest.approx(0.02 - 0.04)  # at the most tokens
    early = [runs.up_to(run, 0) for run in read_all(tmp_path)]
    assert findings.find_all(runs.group(early)).trends == []  # read before their end, they have no budget


def test_width_is_answered_with_what_would_refute_it(tmp_path):
    at_widths(tmp_path, {64: (-0.02, -0.03, -0.02), 128: (-0.001, 0.0, 0.001), 256: (0.02, 0.02, 0.025)})
    text = ' '.join(answers.trends(found_under(tmp_path), 'widths'))
    assert 'the difference rises with the width' in text and 'would refute' in text


def test_width_trend_takes_two_widths_of_one_recipe(tmp_path):
    at_widths(tmp_path, {64: (-0.02, -0.03, -0.02)})
    write_run(tmp_path, 'dense-other', DENSE, tp_size=1, n_embd=128, learning_rate=1e-3)
    write_run(tmp_path, '12comm-other', shifted(0, 0, 0.1), ['spd'] * 12, n_embd=128, learning_rate=1e-3)
    assert found_under(tmp_path).trends == []


# predicted step times


def test_the_pareto_front_and_the_fastest_that_is_no_worse(tmp_path):
    write_run(tmp_path, 'dense', DENSE, tp_size=1)
    write_run(tmp_path, '24comm', shifted(0, 0, 0), COUNTS[24])
    write_run(tmp_path, '18comm', shifted(-0.2, -0.2, -0.201), COUNTS[18])
    write_run(tmp_path, '16comm', shifted(-0.001, 0, 0.001), COUNTS[16])
    write_run(tmp_path, '12comm', shifted(0.01, 0.01, 0.011), COUNTS[12])
    write_run(tmp_path, '2comm', shifted(0.2, 0.2, 0.21), COUNTS[2])
    assert answers.sweet_spot(found_under(tmp_path)) == []
    found = found_under(tmp_path, predict=by_count, link='a link')
    # 16 has a lower mean than 12, but the same verdict in a longer step
    assert [(row.name, row.word) for row in findings.front(found.rows)] == [
        ('2comm', 'worse'), ('12comm', 'as good'), ('18comm', 'better')]
    assert 'no worse than dense: spd x 12 (tp_size 4), 12 ms' in answers.sweet_spot(found)[0]
    text = ' '.join(answers.speed(found))
    assert 'by communications: 18: 1.33, 16: 1.50, 12: 2.00, 2: 12.00' in text
    assert 'async TP with sequence parallelism, exact (tp_size 4): 21.82 to 22.02 ms' in text


def falling(per):
    """Evaluations every 10 of 100 steps of a loss that falls by 0.1 in `per` steps, from 4."""
    return [dict(iter=step, val_loss=4 - 0.1 * step / per) for step in range(0, 100, 10)]


def test_steps_to_denses_losses_and_the_time_that_they_take(tmp_path):
    keys = dict(max_iters=100, warmup_iters=10)
    for seed, dense, per in ((1, 10, 5), (2, 10, 4)):  # twice and 2.5 times as fast
        for name, own, count, tp_size in (
                ('dense', dense, 24, 1), ('24comm', dense, 24, 4), ('12comm', per, 12, 4)):
            write_run(tmp_path, name, {seed: 4 - 10 / own}, COUNTS[count], tp_size, lines=falling(own),
                      **keys)
    found = found_under(tmp_path, predict=by_count, link='a link')
    row = found.rows[2]
    steps, time = findings.step_ratio(row), findings.time_ratio(row)
    assert steps.mean == pytest.approx((math.log(1 / 2) + math.log(1 / 2.5)) / 2)
    assert time.mean == pytest.approx(steps.mean + math.log(12 / 24)) and time.half == steps.half
    assert 'spd x 12 (tp_size 4): 0.45' in answers.convergence(found)[0]


def test_a_config_that_never_reaches_denses_losses_has_no_ratio(tmp_path):
    write_run(tmp_path, 'dense', {1: 2.0}, tp_size=1, lines=[dict(iter=0, val_loss=3.0)])
    write_run(tmp_path, '12comm', {1: 2.5}, COUNTS[12], lines=[dict(iter=0, val_loss=3.0)])
    assert findings.step_ratio(rows_under(tmp_path)[1]) is None


def test_step_times_are_predicted_from_the_configs(tmp_path, capsys, no_plots):
    for count, tp_size in ((12, 4), (2, 4), (24, 1)):
        keys = vars(load([f'{ROOT}/config/train_gpt2_{count}comm.py', f'{ROOT}/config/cpu.py',
                          f'--tp_size={tp_size}']))
        write_run(tmp_path, f'{count}-{tp_size}', {1: 2.0}, **keys | dict(tp_size=tp_size, seed=1))
    write_run(tmp_path, 'odd', {1: 2.0}, **keys | dict(tp_size=4, seed=1, batch_size=1))
    seconds = []
    for link in ((25, 30), (25, 300)):
        predict, reasons, words = compare.step_predictor(read_all(tmp_path), link)
        rows = rows_under(tmp_path, predict=predict)
        seconds.append({row.name: row.seconds for row in rows})
        assert {run.name for run in reasons} == {'odd'} and seconds[-1].pop('odd') is None
        assert f'8 GPUs of 400 TFLOP/s on 4 nodes, 25 Gbit/s and {link[1]} us' in words
    fast, slow = seconds
    assert fast['2-4'] < fast['12-4'] and all(slow[name] > fast[name] for name in fast)
    out = compare_all(tmp_path, '--link=25,30')
    assert 'its step time is not predicted: ' in capsys.readouterr().out
    assert float({line['run']: line for line in csv_lines(out)}['2-4']['predicted_seconds']) == fast['2-4']


# how training went


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
    last = answers.convergence(found_under(tmp_path, level=2.1))[-1]
    assert 'not reached by every run of dense control, spd x 4 (tp_size 4)' in last


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
    found = found_under(tmp_path)
    dense, row = found.rows
    assert dense.first.spikes == [] and row.first.spikes == [160] and row.first.skipped == 2
    assert findings.highest_norm(dense) == 2.0  # 9.0 was within warmup
    spikes = answers.stability(found)[0]
    assert 'spd x 4' in spikes and 'dense' not in spikes


def test_gaps_are_compared_at_equal_loss(tmp_path):
    def lines(*train):
        return [dict(iter=10 * i, val_loss=3 - 0.5 * i, fixed_train_loss=own) for i, own in enumerate(train)]

    # dense ends at 2.0 with a gap of 0.1; the config passes 2.0 at step 20, with 0.2, and ends at 1.5
    write_run(tmp_path, 'dense', {1: 2.0, 2: 2.0}, tp_size=1, lines=lines(2.9, 2.4),
              last=dict(fixed_train_loss=1.9))
    write_run(tmp_path, '4comm', {1: 1.5, 2: 1.5}, SPD, max_iters=20, lines=[
        dict(iter=0, val_loss=3.0, fixed_train_loss=2.9), dict(iter=10, val_loss=2.0, fixed_train_loss=1.8)],
        last=dict(fixed_train_loss=1.0))
    found = found_under(tmp_path)
    assert findings.gap_to_dense(found.rows[1]).mean == pytest.approx(0.1)  # 0.4 at the last step
    assert 'larger in 1, smaller in 0 of 1 configs' in answers.overfitting(found)[0]


def test_what_happens_inside(tmp_path):
    write_run(tmp_path, 'earlier', DENSE, last=dict(drift=[0.0, 0.1, 0.3]))
    assert inside(found_under(tmp_path)) == []
    write_run(tmp_path, 'dense', DENSE, tp_size=1, last=dict(diagnostics=INSIDE | dict(
        grad=[1.0] * 5, attention_over_embedding=1.9)))
    write_run(tmp_path, '4comm', DENSE, SPD, last=dict(diagnostics=INSIDE))
    write_run(tmp_path, 'palm', DENSE, ['palm'] * 4,
              last=dict(diagnostics=INSIDE | dict(dispersion=[0.0] * 5)))
    apart, alike, alone, fading, first, _ = inside(found_under(tmp_path))
    assert 'spd x 4 (tp_size 4): 0.3 at the MLP of layer 1, mean 0.2 of the 2 above 0' in apart
    assert 'palm x 4 (tp_size 4): nowhere' in apart and 'dense' not in apart
    assert 'spd x 4 (tp_size 4): CKA 0.70, 1.75 times of at most 4' in alike and 'palm' not in alike
    assert 'spd x 4 (tp_size 4): +0.50 at the end, +2.00 at the MLP of layer 0' in alone
    assert 'spd x 4 (tp_size 4): 0.20 in layer 1 of that in layer 0' in fading
    assert 'dense control: 1.00 in layer 0' in fading
    assert 'dense control: 1.90' in first and 'spd x 4 (tp_size 4): 0.70' in first
