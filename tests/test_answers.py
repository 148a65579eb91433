"""
The answer, a grid of learning rates and the plan, on run folders written here with known truth.

    python -m pytest tests/test_answers.py
"""

import json
import math
import shutil

import numpy as np
import pytest

import compare
from analysis import answers, findings, plan, plots, runs, tables, tuning, unanswered
from analysis.tuning import Tuned
from written_runs import DENSE, compare_all, found_under, read_all, refused, shifted, write_run

SEEDS = range(1, 7)
NETS = {24: ['tp'] * 12, 18: ['tp', 'spd'] * 6, 16: ['tp', 'spd', 'spd'] * 4, 12: ['spd'] * 12,
        8: ['spd', 'parallel'] * 6, 6: ['spd', 'parallel', 'parallel'] * 4, 2: ['parallel'] * 12}
# the noise of the seeds, which sums to 0: a difference is exact, and the spread about 0.01
NOISE = np.array([[1, -1, 1, -1, 1, -1], [1, 1, -1, -1, 1, -1], [-1, 1, 1, -1, -1, 1],
                  [1, -1, -1, 1, 1, -1], [-1, -1, 1, 1, 1, -1], [1, 1, 1, -1, -1, -1]]) * 0.005


def write_nets(root, differences, tp_size=2, seeds=SEEDS, dense=True, **keys):
    """Dense runs and nets of {communications: difference to dense}."""
    size = keys.get('n_embd', '')
    if dense:
        write_run(root, f'dense{size}', {seed: 2 + seed / 10 for seed in seeds}, NETS[24], 1, **keys)
    for noise, (count, difference) in zip(NOISE, differences.items()):
        losses = {seed: 2 + seed / 10 + difference + noise[seed - 1] * (count < 24) for seed in seeds}
        write_run(root, f'{count}comm-tp{tp_size}{size}', losses, NETS[count], tp_size, **keys)


def words(found):
    return {row.communications: row.word for row in found.rows if not row.dense}


# the answer


def test_the_answer_is_the_last_before_the_first_that_fails(tmp_path):
    write_nets(tmp_path, {18: 0.0, 16: -0.001, 12: 0.005, 8: 0.02, 6: 0.0, 2: -0.2})
    found = found_under(tmp_path)
    assert words(found) == {18: 'as good', 16: 'as good', 12: 'as good', 8: 'undecided', 6: 'as good',
                            2: 'better'}
    answer, = found.answers
    assert answer.row.communications == 12 and answer.first_failure.communications == 8
    assert [row.communications for row in answer.beyond] == [6, 2]
    line = answers.headlines(found)[0]
    assert line.startswith('At one learning rate, untuned: 12 communications (12 all-reduces) are the fewest')
    uppers = [f'{row.verdict.upper:+.4f}' for row in (answer.row, answer.first_failure)]
    assert f'spd x 12, tp_size 2, difference +0.0050, one-sided 95% upper bound {uppers[0]} (n=6)' in line
    assert f'[spd, parallel] x 6 is undecided, +0.0200, upper bound {uppers[1]}: {answer.seeds} seeds' in line
    assert line.endswith('; beyond it, exploratory: 6 (as good), 2 (better)')


def test_a_config_that_diverged_on_a_seed_does_not_pass(tmp_path):
    write_nets(tmp_path, {18: 0.0, 12: -0.1, 6: 0.0})
    write_run(tmp_path, 'late', {7: 2.7}, NETS[24], 1)
    write_run(tmp_path, 'wild', {7: float('nan')}, NETS[12], 2)
    found = found_under(tmp_path)
    assert words(found) == {18: 'as good', 12: 'undecided', 6: 'as good'}
    assert answers.headlines(found)[0].endswith(
        '; spd x 12 is undecided, it diverged on seed 7; beyond it, exploratory: 6 (as good)')


def test_a_net_that_diverged_in_every_run_ends_the_order(tmp_path):
    write_nets(tmp_path, {18: 0.0, 6: 0.0})
    write_run(tmp_path, 'wild', {seed: 9.0 for seed in SEEDS}, NETS[12], 2, state='diverged')
    found = found_under(tmp_path)
    assert found.answers[0].row.communications == 18
    assert answers.headlines(found)[0].endswith(
        '; spd x 12 diverged in every run; beyond it, exploratory: 6 (as good)')
    wild = next(run for run in read_all(tmp_path) if run.trouble)
    assert runs.up_to(wild, 30).trouble == 'diverged at step 20, before step 30'  # --at=30
    # one of another net with as many all-reduces says nothing of the guide's
    write_run(tmp_path, 'clustered', {1: 9.0}, ['spd'] * 3 + ['tp'] * 3 + ['spd', 'tp'] * 3, 2,
              state='diverged')
    assert found_under(tmp_path).answers[0].row.communications == 18


def test_a_value_of_the_grid_that_diverged_is_no_loss_of_the_config(tmp_path):
    write_grid(tmp_path, 'dense', 2e-3, 2.0, NETS[24], 1)
    write_grid(tmp_path, '12comm', 2e-3, 1.95, NETS[12], 2)
    losses = {1: 2.0, 2: 2.1}
    # 18 has no other seed yet
    for rate, state in ((1e-3, 'finished'), (2e-3, 'finished'), (4e-3, 'diverged')):
        write_run(tmp_path, f'18comm-{rate}', losses, NETS[18], 2, learning_rate=rate, min_lr=rate / 10,
                  state=state)
    found = tuned_under(tmp_path)
    assert found.answers[0].row.communications == 12 and found.answers[0].lost is None
    shutil.rmtree(tmp_path)  # but if no value is left that all tuning seeds have, it is lost
    write_grid(tmp_path, 'dense', 2e-3, 2.0, NETS[24], 1)
    write_grid(tmp_path, '12comm', 2e-3, 1.95, NETS[12], 2)
    for rate in (1e-3, 2e-3):
        for seed, state in ((1, 'finished'), (2, 'diverged')):
            write_run(tmp_path, f'18comm-{rate}', {seed: 2.0}, NETS[18], 2, learning_rate=rate,
                      min_lr=rate / 10, state=state)
    assert tuned_under(tmp_path).answers[0].row is None


def test_all_layers_tp_is_identical_only_where_it_ends_near_dense(tmp_path):
    write_nets(tmp_path / 'near', {24: 0.001, 12: 0.0})
    write_nets(tmp_path / 'far', {24: 0.3, 12: 0.0})
    assert words(found_under(tmp_path / 'near'))[24] == 'identical'
    assert words(found_under(tmp_path / 'far'))[24] == 'worse'


def test_no_answer_says_how_many_seeds_it_takes(tmp_path):
    write_nets(tmp_path, {24: 0.0, 12: 0.018, 6: 0.3})
    found = found_under(tmp_path)
    assert found.answers[0].row.word == 'identical' and found.answers[0].seeds >= 2
    assert 'no number of communications below the full count' in answers.headlines(found)[0]
    assert 'seeds show it, with 90% power' in answers.headlines(found)[0]


def test_a_margin_is_a_choice(tmp_path):
    write_nets(tmp_path, {18: 0.0, 12: 0.005})
    assert found_under(tmp_path, margin=0.02).answers[0].row.communications == 12
    assert found_under(tmp_path, margin=0.002).answers[0].row is None


def test_each_tp_size_has_its_own_answer_the_lowest_first(tmp_path):
    write_nets(tmp_path, {18: 0.0, 12: 0.1}, tp_size=4)
    write_nets(tmp_path, {18: 0.0, 12: 0.0}, tp_size=2, dense=False)
    found = found_under(tmp_path)
    assert [(answer.tp_size, answer.row.communications) for answer in found.answers] == [(2, 12), (4, 18)]


def test_rivals_variations_and_twins_are_not_in_the_answer(tmp_path):
    write_nets(tmp_path, {18: 0.0, 12: 0.0})
    good = {seed: 1.9 + seed / 10 for seed in SEEDS}
    write_run(tmp_path, 'palm', good, ['palm'] * 12, 2)
    write_run(tmp_path, 'mean', good, NETS[2], 2, merge='mean')
    write_run(tmp_path, 'scaled', good, NETS[6], 2, embed_scale=4.0)
    write_run(tmp_path, 'twin', good, NETS[24], 1, perturb=0.001)
    answer, = found_under(tmp_path).answers
    assert [row.communications for row in answer.tested] == [18, 12] and answer.row.communications == 12


def test_of_several_nets_at_one_count_the_guides_is_read(tmp_path):
    write_nets(tmp_path, {18: 0.0})
    write_run(tmp_path, 'clustered', {seed: 3.0 + seed / 10 for seed in SEEDS}, ['spd'] * 6 + ['tp'] * 6, 2)
    found = found_under(tmp_path)
    assert found.answers[0].row.block_types == NETS[18]
    assert [row.block_types for row in findings.curves(found.rows)[0]] == [NETS[18]]


def test_json_has_the_answer_or_null(tmp_path, no_plots):
    write_nets(tmp_path / 'a', {18: 0.0, 8: -0.2})
    found = json.loads((compare_all(tmp_path / 'a', '--margin=0.015') / 'table.json').read_text())
    assert found['margin'] == 0.015
    assert (found['answer']['communications'], found['answer']['all_reduces']) == (8, 7)
    assert found['answer']['block_types'] == NETS[8]
    row = found['rows'][-1]
    assert row['verdict'] == 'better' and row['p_dunnett'] < 0.05 and row['df'] == 10
    assert row['upper'] == found['answer']['upper'] < row['difference'] + row['half_interval']
    write_nets(tmp_path / 'b', {18: 0.5})
    assert json.loads((compare_all(tmp_path / 'b') / 'table.json').read_text())['answer'] is None


def test_in_the_middle_of_a_sweep_the_seeds_that_all_have_give_the_spread(tmp_path):
    write_nets(tmp_path, {18: 0.0, 12: 0.005})
    whole = found_under(tmp_path).rows[0].spread
    write_run(tmp_path, 'late', {7: 2.7}, NETS[24], 1)  # the control is ahead by a seed
    rows = found_under(tmp_path).rows
    assert rows[0].spread.s == pytest.approx(whole.s) and rows[1].word == 'as good'
    write_run(tmp_path, '18comm-late', {7: 2.7}, NETS[18], 2)  # and so is one config, of 6 df to 10
    assert found_under(tmp_path).rows[0].spread == rows[0].spread
    for rival in ('palm', 'fal', 'stale', 'ladder'):  # or four rivals, wide apart, on three seeds: 12 df
        write_run(tmp_path, rival, {1: 2.5, 2: 2.1, 3: 2.9}, [rival] * 12, 2)
    assert found_under(tmp_path).rows[0].spread == rows[0].spread


def test_recipes_whose_difference_is_long_are_told_apart(tmp_path):
    for parent, shift in (('1', 0.0), ('2', 0.5)):
        keys = dict(init_from=f'out/a-folder-with-a-long-name-{parent}')
        losses = {seed: 2 + shift + seed / 10 for seed in SEEDS}
        write_run(tmp_path, f'dense-{parent}', {seed: 2 + seed / 10 for seed in SEEDS}, NETS[24], 1, **keys)
        write_run(tmp_path, f'12comm-{parent}', losses | {1: 2.11 + shift}, NETS[12], 2, **keys)
    rows = found_under(tmp_path).rows
    assert [row.word for row in rows if not row.dense] == ['as good', 'worse']
    assert len({row.note for row in rows}) == 2


def test_the_noise_floor_is_what_a_perturbed_twin_is_off_by(tmp_path):
    write_nets(tmp_path, {12: 0.0})
    assert any(one.question == 'the noise floor' for one in
               unanswered.open_questions(found_under(tmp_path), 'python compare.py'))
    write_run(tmp_path, 'twin', {1: 2.1 + 0.006, 2: 2.2 - 0.008}, NETS[24], 1, perturb=0.001)
    found = found_under(tmp_path)
    floor, = found.floors
    assert (floor.size, floor.largest) == (pytest.approx(math.sqrt(0.5) / 100), pytest.approx(0.008))
    assert answers.floor(found)[0].startswith('dense, weights perturbed by 0.001: off by 0.0071')


# each config at its own best rate


RATE = Tuned('learning_rate', (1, 2))


def write_grid(root, name, optimum, at_best, types, tp_size, rates=(1e-3, 2e-3, 4e-3), **keys):
    """Tuning runs, 0.1 higher for each factor of 2 off the optimum, and seeds 3 to 5 at the optimum."""
    for rate in rates:
        off = 0.1 * abs(np.log2(rate / optimum))
        for seed in (1, 2, *((3, 4, 5) if rate == optimum else ())):
            loss = at_best + off + seed / 10 + 0.002 * (-1) ** (seed + tp_size)
            write_run(root, f'{name}-learning_rate={rate}', {seed: loss}, types, tp_size,
                      learning_rate=rate, min_lr=float(f'{rate / 10:.12g}'), **keys)


def tuned_under(root, tuned=RATE, **options):
    return found_under(root, tuned=tuned, **options)


def test_each_config_is_judged_at_its_own_best_rate_on_seeds_that_did_not_choose_it(tmp_path):
    write_grid(tmp_path, 'dense', 1e-3, 2.0, NETS[24], 1, rates=(5e-4, 1e-3, 2e-3, 4e-3))
    write_grid(tmp_path, '12comm', 2e-3, 1.95, NETS[12], 2)
    found = tuned_under(tmp_path)
    dense, row = found.rows
    assert (dense.tuning.best, row.tuning.best) == (1e-3, 2e-3)
    assert list(row.runs) == list(dense.runs) == [3, 4, 5] and not row.preliminary
    difference = runs.to_dense(row)
    assert difference.mean == pytest.approx(-0.05, abs=0.002)
    assert row.word == 'better' and found.answers[0].tuned
    assert answers.headlines(found)[0].startswith('12 communications (12 all-reduces) are the fewest')
    # both at dense's best, where the config is a factor of 2 off: 0.1 - 0.05
    answer, chose = findings.at_common(row)
    assert answer is None  # no seed of the answer has run there
    # and those that chose the value give no interval
    assert chose.mean == pytest.approx(0.05, abs=0.005) and (chose.n, chose.half) == (2, None)
    # over the rates that both have, 1e-3, 2e-3 and 4e-3: (0.1 + 0 + 0.1) / 3 and (0 + 0.1 + 0.2) / 3
    values = tuning.common_values(found.rows)
    assert values == {1e-3, 2e-3, 4e-3}
    assert row.tuning.sensitivity(values) == pytest.approx(0.2 / 3)
    assert dense.tuning.sensitivity(values) == pytest.approx(0.1)


@pytest.mark.parametrize('rates, seeds, floors', [
    ([2e-3], [3], [0.002]), ([1e-3, 2e-3], [1, 2, 3], [0.002]), ([1e-3], [3], [])])
def test_a_perturbed_twin_is_at_the_best_rate_of_dense_and_chooses_none(tmp_path, rates, seeds, floors):
    write_grid(tmp_path, 'dense', 2e-3, 2.0, NETS[24], 1)
    write_grid(tmp_path, '12comm', 4e-3, 1.95, NETS[12], 2, rates=(1e-3, 2e-3, 4e-3, 8e-3))
    write_run(tmp_path, 'slow', {3: 2.402}, NETS[24], 1, learning_rate=1e-3, min_lr=1e-4)
    for rate in rates:  # at 1e-3 it would be far better than dense, and than itself at 2e-3
        losses = {seed: 2.0 + seed / 10 + 0.002 * (-1) ** (seed + 1) + (0.002 if rate == 2e-3 else -0.5)
                  for seed in seeds}
        write_run(tmp_path, f'twin{rate}', losses, NETS[24], 1, perturb=0.001, learning_rate=rate,
                  min_lr=rate / 10)
    found = tuned_under(tmp_path)
    assert [floor.size for floor in found.floors] == [pytest.approx(size) for size in floors]
    assert [floor.n for floor in found.floors] == [len(seeds)] * len(floors)
    assert not any(row.tuning.missing for row in found.rows)


def test_a_perturbed_twin_with_answer_seeds_does_not_hide_the_configs_that_have_none_yet(tmp_path):
    for name, types, tp_size in (('dense', NETS[24], 1), ('12comm', NETS[12], 2)):
        write_run(tmp_path, name, {1: 2.0, 2: 2.1}, types, tp_size, learning_rate=2e-3, min_lr=2e-4)
    write_run(tmp_path, 'late', {3: 2.2}, NETS[24], 1, learning_rate=2e-3, min_lr=2e-4)
    write_run(tmp_path, 'twin', {3: 2.2}, NETS[24], 1, perturb=0.001, learning_rate=2e-3, min_lr=2e-4)
    rows = tuned_under(tmp_path).rows
    assert rows[0].preliminary and 'spd x 12' in {row.blocks for row in rows}


def test_the_best_at_the_edge_of_its_grid_names_the_rate_to_run_next(tmp_path):
    write_grid(tmp_path, 'dense', 2e-3, 2.0, NETS[24], 1)
    write_grid(tmp_path, '12comm', 4e-3, 1.95, NETS[12], 2)
    found = tuned_under(tmp_path)
    assert [row.tuning.missing for row in found.rows] == [[], [8e-3]]
    assert answers.tuning(found)[0].endswith('spd x 12 (tp_size 2), 0.008')
    assert answers.headlines(found)[0].startswith('With values of learning_rate still to run: ')
    opened = unanswered.open_questions(found, 'python compare.py')[0]
    assert opened.command == f'python sweep.py --seed=1,2 --learning_rate=0.008 --out={tmp_path}'
    # a run that diverged at the next rate bounds the grid
    write_run(tmp_path, 'wild', {1: float('nan')}, NETS[12], 2, learning_rate=8e-3, min_lr=8e-4)
    everything = read_all(tmp_path)
    rows = runs.group([run for run in everything if not run.trouble], tuned=RATE,
                      diverged=[run for run in everything if run.trouble])
    assert [row.tuning.missing for row in rows] == [[], []]


@pytest.mark.parametrize('key, values, missing', [
    ('weight_decay', (0.0, 0.1), [0.2]), ('beta2', (0.9, 0.99), []), ('warmup_iters', (2, 3), [4])])
def test_a_grid_goes_on_as_far_as_its_key_may(tmp_path, key, values, missing):
    for value in values:
        losses = {seed: 2 - value / 10 for seed in (1, 2)}
        write_run(tmp_path, f'dense-{value}', losses, NETS[24], 1, **{key: value})
    row, = tuned_under(tmp_path, Tuned(key, (1, 2))).rows
    assert row.tuning.missing == missing


@pytest.mark.parametrize('rate, beyond', [(8e-3, []), (3.2e-3, [5e-3])], ids=['beyond the grid', 'inside'])
@pytest.mark.parametrize('excess', [0.03, -0.03])
def test_a_value_that_one_tuning_seed_has_tried_is_to_run_on_the_others_unless_it_is_worse(
        tmp_path, excess, rate, beyond):
    write_grid(tmp_path, 'dense', 2e-3, 2.0, NETS[24], 1)
    write_grid(tmp_path, '12comm', 4e-3, 1.95, NETS[12], 2)
    at_best = 1.95 + 2 / 10 + 0.002  # write_grid()'s of seed 2
    write_run(tmp_path, 'one', {2: at_best + excess}, NETS[12], 2, learning_rate=rate, min_lr=rate / 10)
    found = tuned_under(tmp_path)
    assert found.rows[1].tuning.missing == [rate] * (excess < 0) + beyond
    assert (f'spd x 12 (tp_size 2), {rate:g} on 2' in answers.tuning(found)[-1]) == (excess > 0)


def test_before_any_other_seed_has_finished_the_tuning_seeds_are_shown_as_preliminary(tmp_path, no_plots):
    for rate in (1e-3, 2e-3):
        write_run(tmp_path, f'dense-{rate}', {1: 2.0 + rate, 2: 2.1 + rate}, NETS[24], 1, learning_rate=rate,
                  min_lr=rate / 10)
        write_run(tmp_path, f'12comm-{rate}', {1: 1.9 + rate, 2: 2.003 + rate}, NETS[12], 2,
                  learning_rate=rate, min_lr=rate / 10)
    out = compare_all(tmp_path, '--tuned=learning_rate', '--tuning_seeds=1,2')
    found = json.loads((out / 'table.json').read_text())
    assert found['answer'] is None and found['rows'][1]['seeds'] == '1 2'
    assert found['headlines'][0].startswith('Preliminary, from the tuning seeds: ')


def test_without_a_grid_it_is_said(tmp_path):
    write_grid(tmp_path, 'dense', 2e-3, 2.0, NETS[24], 1, rates=(2e-3,))
    write_grid(tmp_path, '12comm', 2e-3, 1.95, NETS[12], 2, rates=(2e-3,))
    found = tuned_under(tmp_path)
    assert answers.headlines(found)[0].startswith('At one learning rate, untuned: ')
    assert [line[-2] for line in tables.tables(found)['answer']] == [
        'best learning_rate', '0.002 (alone)', '0.002 (alone)']


def test_a_lowest_rate_of_its_own_is_part_of_the_recipe(tmp_path, no_plots, capsys):
    write_grid(tmp_path, 'dense', 2e-3, 2.0, NETS[24], 1)
    write_run(tmp_path, 'other', {1: 2.0}, NETS[12], 2, learning_rate=2e-3, min_lr=1e-4)  # 1e-3's tenth
    compare_all(tmp_path, '--tuned=learning_rate', '--tuning_seeds=1,2')
    note, = [line for line in capsys.readouterr().out.splitlines() if line.startswith('several recipes')]
    assert 'min_lr is "a tenth of the rate" in ' in note and 'learning_rate is' not in note
    # and the grid of the others is one experiment still
    rows = tuned_under(tmp_path).rows
    assert [row.tuning.means.keys() for row in rows if row.dense] == [{1e-3, 2e-3, 4e-3}]


def test_a_lowest_rate_that_stays_is_no_tenth_of_any(tmp_path, no_plots, capsys):
    for name, types, tp_size in (('dense', NETS[24], 1), ('12comm', NETS[12], 2)):
        for rate in (1e-3, 2e-3):
            write_run(tmp_path, f'{name}-{rate}', {1: 2 + rate, 2: 2.1 + rate}, types, tp_size,
                      learning_rate=rate, min_lr=2e-4)
    compare_all(tmp_path, '--tuned=learning_rate', '--tuning_seeds=1,2')
    assert 'several recipes' not in capsys.readouterr().out


@pytest.mark.parametrize('flags, message', [
    (['--tuned=learning_rate'], 'needs --tuning_seeds'),
    (['--tuned=merge', '--tuning_seeds=1'], 'must be a key of the recipe that is a number'),
    (['--tuned=learningrate', '--tuning_seeds=1'], 'must be a key of the recipe'),
    (['--tuning_seeds=1,2'], 'needs --tuned')])
def test_what_cannot_be_tuned_is_refused(tmp_path, flags, message):
    write_run(tmp_path, 'dense', DENSE, tp_size=1)
    assert message in refused(tmp_path, *flags, f'--out={tmp_path / "cmp"}')


def test_the_plot_of_the_tuned_key(tmp_path):
    write_grid(tmp_path, 'dense', 2e-3, 2.0, NETS[24], 1)
    write_grid(tmp_path, '12comm', 4e-3, 1.95, NETS[12], 2)
    write_run(tmp_path, 'one', {2: 2.5}, NETS[12], 2, learning_rate=8e-3, min_lr=8e-4)
    fig = plots.plot_tuning(tuned_under(tmp_path))
    assert len(fig.axes) == 2
    square, = [line for line in fig.axes[1].lines if line.get_marker() == 's']
    assert list(square.get_xdata()) == [4e-3]
    strokes, = [line for line in fig.axes[1].lines if line.get_marker() == '_']
    assert (8e-3, 2.5) in zip(*strokes.get_data())  # a value that one tuning seed has run


# the plan

PLAN = """
margin = 0.03
configs = ['config/train_gpt2.py', 'config/train_gpt2_12comm.py']
comparisons = [['palm x 12', 'spd x 12']]
question = 'How few?'
"""


def carried(text):
    return dict(info=dict(plan=dict(file='plan.toml', sha256='abc', text=text)))


def write_planned(root, text=PLAN):
    write_nets(root, {12: 0.0, 6: 0.0}, **carried(text))
    write_run(root, 'palm', {seed: 2.2 + seed / 10 for seed in SEEDS}, ['palm'] * 12, 2, **carried(text))


def test_what_was_planned_and_what_is_exploratory(tmp_path, no_plots):
    write_planned(tmp_path)
    out = compare_all(tmp_path)
    found = json.loads((out / 'table.json').read_text())
    assert found['margin'] == 0.03 and found['plan'] == dict(file='plan.toml', sha256='abc')
    assert [row['run'] for row in found['rows'] if row['planned']] == ['dense', '12comm-tp2']
    assert found['answer']['communications'] == 12  # 6, unplanned, is exploratory
    pair, = found['comparisons']
    assert (pair['kind'], pair['planned'], pair['verdict']) == ('pair', True, 'higher')
    assert pair['p_holm'] == pair['p']
    text = (out / 'table.md').read_text()
    assert 'planned in plan.toml (sha256 abc): spd x 12 (tp_size 2); palm x 12 (tp_size 2) minus spd' in text
    assert 'exploratory: palm x 12 (tp_size 2); [spd, parallel, parallel] x 4 (tp_size 2)' in text
    assert 'as good (not planned)' in text


def test_under_a_flag_that_departs_from_the_plan_nothing_is_called_planned(tmp_path, no_plots):
    write_planned(tmp_path)
    out = compare_all(tmp_path, '--margin=0.05')
    found = json.loads((out / 'table.json').read_text())
    assert found['planned'] == ['--margin is 0.05, the plan says 0.03: so all is exploratory']
    assert not any(one['planned'] for one in found['rows'] + found['comparisons'])
    assert 'Planned comparisons' not in (out / 'table.md').read_text()


@pytest.mark.parametrize('grid, said', [
    ('[1e-3, 4e-3]',
     ['learning_rate 0.002 is between those of the plan, 0.001, 0.004: so all is exploratory']),
    ('[1e-3, 2e-3]', None),  # 12comm's best, 4e-3, is beyond the grid, which goes on to it
    ('[1e-3, 2e-3, 4e-3]', None)])
def test_a_best_value_between_those_of_the_plan_is_exploratory(tmp_path, no_plots, grid, said):
    text = f"tuned = 'learning_rate'\ntuning_seeds = [1, 2]\ngrid = {grid}\n" + PLAN
    write_grid(tmp_path, 'dense', 2e-3, 2.0, NETS[24], 1, **carried(text))
    write_grid(tmp_path, '12comm', 4e-3, 1.95, NETS[12], 2, **carried(text))
    found = json.loads((compare_all(tmp_path) / 'table.json').read_text())
    assert found['planned'] == said or said is None and found['planned'][0].startswith('planned in plan.toml')


def test_what_is_not_as_the_plan_says_is_not_planned(tmp_path, no_plots):
    text = "tuned = 'learning_rate'\ntuning_seeds = [1, 2]\nanswer_seeds = [3, 4, 5, 6]\n" + PLAN
    write_grid(tmp_path, 'dense', 2e-3, 2.0, NETS[24], 1, **carried(text))
    write_grid(tmp_path, '12comm', 2e-3, 1.95, NETS[12], 2, **carried(text))
    write_grid(tmp_path, '12comm-tp4', 2e-3, 1.95, NETS[12], 4, **carried(text))
    for ranks in (2, 4):
        write_grid(tmp_path, f'palm-tp{ranks}', 2e-3, 1.98, ['palm'] * 12, ranks, **carried(text))
    found = json.loads((compare_all(tmp_path) / 'table.json').read_text())
    assert [row['tp_size'] for row in found['rows'] if row['planned']] == [1, 2]
    assert [one['planned'] for one in found['comparisons']].count(True) == 1  # palm minus spd, of two ranks
    assert found['planned'][1] == ("of the plan's seeds still to run: dense control, seed 6; "
                                   'spd x 12 (tp_size 2), seed 6')
    # at one rate, or in runs without the plan, nothing was
    shutil.rmtree(tmp_path / '12comm-learning_rate=0.002-seed3')
    write_run(tmp_path, '12comm-again', {3: 2.2}, NETS[12], 2, learning_rate=2e-3, min_lr=2e-4)
    rows = tuned_under(tmp_path, plan=plan.plan_of(read_all(tmp_path))[0]).rows
    assert not any(row.planned for row in rows[1:])


def test_runs_of_two_plans_are_exploratory(tmp_path):
    write_planned(tmp_path)
    write_nets(tmp_path, {8: 0.0}, dense=False,
               info=dict(plan=dict(file='other.toml', sha256='def', text='margin = 0.1')))
    found, notes = plan.plan_of(read_all(tmp_path))
    assert found is None and 'follow 2 plans, so all of it is exploratory' in notes[0]


@pytest.mark.parametrize('text, message', [
    ('margn = 0.02', 'no key margn; margin?'), ('margin = "0.02"', "margin is '0.02', it must be a number"),
    ('margin = 0', 'above 0'), ('tuning_seeds = [1, "2"]', 'must be a list of seeds'),
    ('tuning_seeds = [1]\nanswer_seeds = [1, 2]', 'seed 1 is in tuning_seeds and in answer_seeds'),
    ('comparisons = [["a"]]', 'must be a list of pairs'), ('configs = ["config/none.py"]', 'not a file in'),
    ("recipe = '--tp_size=4'", 'must say tp_size = 4'),
    ('grid = [1e-3, "2e-3"]', 'must be a list of numbers'), ('tuned = 3', 'must be a key of train.py'),
    ('margin', 'not TOML')])
def test_a_plan_with_a_mistake_is_refused(tmp_path, text, message):
    write_run(tmp_path, 'dense', DENSE, tp_size=1, **carried(text))
    line = refused(tmp_path, f'--out={tmp_path / "cmp"}')
    assert line.startswith('error: plan.toml: ') and message in line


def test_the_plan_gives_the_tuned_key_and_the_seeds(tmp_path, no_plots):
    text = "tuned = 'learning_rate'\ntuning_seeds = [1, 2]\nanswer_seeds = [3, 4]\n"
    write_grid(tmp_path, 'dense', 2e-3, 2.0, NETS[24], 1, **carried(text))
    write_grid(tmp_path, '12comm', 2e-3, 1.95, NETS[12], 2, **carried(text))
    found = json.loads((compare_all(tmp_path) / 'table.json').read_text())
    assert found['tuned'] == dict(key='learning_rate', tuning_seeds=[1, 2])
    assert [row['seeds'] for row in found['rows']] == ['3 4', '3 4']


def test_the_first_plan_is_right():
    text = (compare.Path(__file__).parent.parent / 'results/answer/plan.toml').read_text()
    found = plan.parse_plan('plan.toml', 'abc', text)
    assert (found.margin, found.tuned, found.tuning_seeds) == (0.02, 'learning_rate', (1, 2))
    kinds = [(tp_size, blocks, merge) for tp_size, [(_, blocks)], merge in found.kinds]
    assert (1, NETS[24], 'sum') in kinds and (2, ['palm'] * 12, 'sum') in kinds


# what is open


def test_open_questions_come_with_commands_of_the_same_recipe(tmp_path):
    argv = ['config/train_gpt2_12comm.py', 'config/cpu.py', '--seed=1', '--n_embd=128', '--out_dir=x',
            '--init_from=auto', '--log_drift=True']  # of an earlier version
    write_nets(tmp_path, {12: 0.0}, info=dict(argv=argv), n_embd=128, learning_rate=2e-3)
    opened = unanswered.open_questions(found_under(tmp_path), 'python compare.py out')
    commands = {question: command for question, command in opened}
    assert commands['each config at its own best learning rate'] == (
        'python sweep.py config/train_gpt2_*comm.py --with config/cpu.py --n_embd=128 --seed=1,2 '
        f'--learning_rate=0.001,0.002,0.004 --out={tmp_path} '
        f'&& python compare.py {tmp_path} --tuned=learning_rate --tuning_seeds=1,2')
    assert 'python compare.py out --link=25,30' in commands.values()


def test_more_seeds_are_those_of_dense_too_at_its_own_best_rate(tmp_path):
    write_grid(tmp_path, 'dense', 1e-3, 2.0, NETS[24], 1, rates=(5e-4, 1e-3, 2e-3),
               info=dict(argv=['config/train_gpt2.py', '--learning_rate=1e-3']))
    write_grid(tmp_path, '12comm', 2e-3, 2.015, NETS[12], 2,
               info=dict(argv=['config/train_gpt2_12comm.py', '--learning_rate=2e-3']))
    found = tuned_under(tmp_path)
    seeds = unanswered.seeds_to_run(found.answers[0].seeds, RATE)
    assert unanswered.open_questions(found, '')[0].command == (
        f'python sweep.py config/train_gpt2_12comm.py --learning_rate=2e-3 --seed={seeds} --tp_size=2 '
        f'--out={tmp_path} --without_dense && '
        f'python sweep.py config/train_gpt2.py --learning_rate=1e-3 --seed={seeds} --out={tmp_path}')


def test_only_dense_runs(tmp_path):
    write_run(tmp_path, 'dense', shifted(0, 0, 0), tp_size=1)
    found = found_under(tmp_path)
    assert answers.answers(found) == [] and 'No answer' in answers.headlines(found)[0]
    assert len(unanswered.open_questions(found, '')) == 1
