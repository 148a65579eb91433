"""
Runs whose blocks change while they train.

    python -m pytest tests/test_switches.py
"""

import pytest
import torch

import sweep
import train
from configurator import load, load_each
from speed.costmodel import Cluster, predicted_seconds
from toy_runs import DROPOUT, Crash, assert_same_run, crash, info, metrics, refused, run, stop_at, terminate
from training import checkpoint
from training.pretrained import read_file
from written_runs import DENSE, SPD, compare_all, csv_lines, found_under, shifted, write_run

pytestmark = pytest.mark.usefixtures('corpus')

SHORT = [*DROPOUT, '--max_iters=12', '--lr_decay_iters=12', '--eval_interval=4', '--bias=True']


@pytest.mark.parametrize('first, then', [('gptj,spd', 'parallel,tp'), ('tp', 'dtp,gptj')])
def test_a_switch_is_a_checkpoint_that_is_resumed_under_other_blocks(gptj, tmp_path, first, then):
    switched, resumed = tmp_path / 'switched', tmp_path / 'resumed'
    assert run(switched, *SHORT, f'--block_types={first}', f'--block_types_at=8:{then}') == 0
    assert run(resumed, *SHORT, f'--block_types={first}', '--max_iters=8') == 0
    before = checkpoint.load(resumed / 'ckpt.pt')
    assert run(resumed, *SHORT, f'--block_types={then}', '--init_from=resume') == 0
    assert_same_run(switched, resumed)
    after = checkpoint.load(switched / 'ckpt.pt')
    # what a stage leaves unused stays as it was, with its moments
    unused = [name for i, kind in enumerate((then.split(',') * 4)[:4]) if kind == 'gptj'
              for name in (f'transformer.h.{i}.ln_2.weight', f'transformer.h.{i}.ln_2.bias')]
    for name, p in after['model'].items():
        assert torch.equal(p, before['model'][name]) == (name in unused), name


def test_a_run_that_switches_is_resumed_to_the_bit_before_at_and_after_a_switch(gptj, tmp_path, monkeypatch):
    flags = [*SHORT, '--block_types=spd', '--block_types_at=25%:gptj;6:tp,parallel',
             '--checkpoint_interval=1']
    assert run(tmp_path / 'whole', *flags) == 0
    for step, stop in (2, terminate), (3, crash), (5, terminate), (8, crash):
        with monkeypatch.context() as patch:
            stop_at(patch, step, stop)
            if stop is crash:
                with pytest.raises(Crash):
                    run(tmp_path / 'cut', *flags, '--init_from=auto')
            else:  # it ends after the step in hand
                assert run(tmp_path / 'cut', *flags, '--init_from=auto') == train.RESUMABLE
                assert checkpoint.load(tmp_path / 'cut/ckpt.pt')['iter'] == step + 1
    assert run(tmp_path / 'cut', *flags, '--init_from=auto') == 0
    assert_same_run(tmp_path / 'whole', tmp_path / 'cut')


def test_run_json_has_the_means_over_steps_and_each_stage(tmp_path):
    assert run(tmp_path, *SHORT, '--block_types=spd', '--block_types_at=9:parallel') == 0
    found = info(tmp_path)
    assert (found['communications'], found['all_reduces']['forward']) == (3.5, 3.25)
    assert found['config']['block_types_at'] == '9:parallel'
    assert [(one['step'], one['communications'], one['all_reduces']['backward']) for one in found['stages']] \
        == [(0, 4, 4), (9, 2, 1)]
    per_token = [one['all_reduces']['bytes_per_token'] for one in found['stages']]
    assert found['all_reduces']['bytes_per_token'] == (9 * per_token[0] + 3 * per_token[1]) / 12


def test_every_set_of_blocks_is_compiled_and_evaluated(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(torch, 'compile', lambda model: seen.append(model.config.block_types) or model)
    flags = [*SHORT, '--block_types=spd', '--block_types_at=5:tp;8:parallel']
    assert run(tmp_path / 'compiled', *flags, '--compile=True') == 0
    assert seen == [[name] * 4 for name in ('spd', 'tp', 'parallel')]
    assert run(tmp_path / 'eager', *flags) == 0
    assert metrics(tmp_path / 'compiled') == metrics(tmp_path / 'eager')


def test_a_reader_of_a_checkpoint_gets_the_blocks_that_it_was_trained_with(tmp_path):
    assert run(tmp_path / 'a', *SHORT, '--block_types=spd', '--block_types_at=4:parallel',
               '--keep_checkpoints=3') == 0
    for name, kind in ('ckpt-00000004.pt', 'spd'), ('ckpt-00000008.pt', 'parallel'), ('ckpt.pt', 'parallel'):
        keys = read_file(tmp_path / 'a' / name).keys
        assert (keys['block_types'], keys['block_types_at']) == ([kind] * 4, None)


@pytest.mark.parametrize('text, words', [
    ('40:tp', 'with a step 40 after 0; its steps must rise, from 1 to below max_iters, 12 ('),
    ('100%:tp', 'with a step 12 after 0'), ('0:tp', 'with a step 0 after 0'),
    ('6:tp;6:spd', 'with a step 6 after 6'), ('6', 'it must be STEP:pattern[;STEP:pattern], as in 200:tp'),
    ('6:', 'it must be STEP:pattern'), ('1.5:tp', 'it must be STEP:pattern'), ('', 'it must be STEP:pattern'),
    ('6:tp,spd,tp', 'a pattern of 3 layers, which does not divide n_layer, 4'),
    ('6:spt', "has 'spt' at layer 0, which is no block type; spd?"), ('6:fal,stale', 'has fal and stale'),
    ('6:spd', 'but the blocks from step 6 on, spd x 4, are those before it')])
def test_a_wrong_switch_gets_one_line(tmp_path, text, words):
    message = refused(tmp_path / 'a', *SHORT, '--block_types=spd', f'--block_types_at={text}')
    assert message.startswith('error: block_types_at') and words in message
    assert f'block_types_at from --block_types_at={text}' in message and not (tmp_path / 'a').exists()


def test_a_predicted_step_is_the_mean_over_the_stages():
    flags = ['config/cpu.py', '--block_types=spd', '--n_layer=2', '--block_types_at=75%:parallel']
    keys, cluster = vars(load(flags)), Cluster(gbit=1)
    each = [predicted_seconds(keys | dict(block_types=[name] * 2, block_types_at=None), cluster)
            for name in ('spd', 'parallel')]
    assert predicted_seconds(keys, cluster) == pytest.approx((3 * each[0] + each[1]) / 4)
    with pytest.raises(SystemExit, match='block_types_at is 300:parallel, but a step has one set of blocks'):
        load_each([flags])


def test_a_sweep_names_such_a_run_and_leaves_its_control_dense(tmp_path):
    grid = sweep.parse_grid(['--block_types_at=25%:tp,spd;50%:tp', '--seed=1,2'])
    runs = sweep.plan(['config/train_gpt2_12comm.py'], ['config/cpu.py'], grid, tmp_path)
    assert [(run.name, run.dense, run.config.block_types_at) for run in runs] == [
        (name, dense, at) for seed in (1, 2) for name, dense, at in (
            (f'gpt2-cpu-seed{seed}', True, None),
            (f'gpt2-12comm-cpu-block_types_at=100_tp_spd_200_tp-seed{seed}', False, '100:tp,spd;200:tp'))]


def test_a_comparison_never_takes_such_a_run_for_a_plain_one(tmp_path, no_plots):
    write_run(tmp_path, 'dense', DENSE, tp_size=1, n_layer=4)
    write_run(tmp_path, '4comm', shifted(0.02, 0.021, 0.022), SPD, n_layer=4)
    means = dict(forward=3.25, backward=3.25, blocking=3.25, hidden=0, bytes_per_token=1664)
    write_run(tmp_path, 'switched', shifted(0.01, 0.01, 0.011), SPD, n_layer=4, block_types_at='15:parallel',
              info=dict(communications=3.5, all_reduces=means))
    write_run(tmp_path, 'one-rank', shifted(0.01, 0.01, 0.012), tp_size=1, n_layer=4,
              block_types_at='15:palm')
    found = found_under(tmp_path)
    assert [[row.name for row in answer.tested] for answer in found.answers] == [['4comm']]
    assert [(row.name, row.dense, row.plain, row.all_tp, row.other_types) for row in found.rows] == [
        ('dense', True, True, False, ()), ('4comm', False, True, False, ()),
        ('switched', False, False, False, ()), ('one-rank', False, False, False, ('palm',))]
    out = compare_all(tmp_path)
    switched = next(line for line in csv_lines(out) if line['run'] == 'switched')
    assert (switched['communications'], switched['all_reduces_forward'], switched['block_types_at']) == (
        '3.5', '3.25', '15:parallel')
    assert '| spd x 4, block_types_at 15:parallel | 3.5 | 3.25/3.25 | 4 |' in (out / 'table.md').read_text()
