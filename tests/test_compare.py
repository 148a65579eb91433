"""compare.py on run folders written here, with differences that can be worked out by hand."""
import csv
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from scipy.stats import ttest_rel

import compare
from configurator import communications

TP, SPD, PARALLEL = ['tp'] * 4, ['spd'] * 4, ['parallel'] * 4     # 8, 4 and 2 communications
DENSE = {1: 2.0, 2: 2.1, 3: 2.2}


def write_run(root, name, losses, block_types=TP, tp_size=4, state='finished', corpus={}, info={}, **keys):
    """Run folders root/name-seedN, one for each seed of {seed: final validation loss}."""
    for seed, loss in losses.items():
        folder = root / f'{name}-seed{seed}'
        folder.mkdir(parents=True)
        config = dict(out_dir=str(folder), seed=seed, block_types=block_types, tp_size=tp_size,
                      dataset='pystdlib', batch_size=12, gradient_accumulation_steps=40, learning_rate=6e-4,
                      max_iters=20, device='cpu', log_interval=10) | keys
        reduced = 0 if tp_size == 1 else 3
        run = dict(name=folder.name, state=state, config=config, parameters=620_032,
                   corpus=dict(name='pystdlib', corpus='Some text', tokenizer='byte', vocab_size=257,
                               val_sha256='ab') | corpus,
                   communications=communications(block_types, tp_size),
                   all_reduces={'forward': reduced, 'backward': reduced}) | info
        (folder / 'run.json').write_text(json.dumps(run))
        lines = [dict(iter=0, val_loss=5.5), dict(iter=10, train_loss=4.0, tokens_per_sec=10.0),
                 dict(iter=20, train_loss=3.0, tokens_per_sec=30.0)]
        lines += [dict(iter=config['max_iters'], val_loss=loss)] * (state == 'finished')
        (folder / 'metrics.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))


def shifted(*shifts):
    """The dense control's losses plus these, seed by seed."""
    return {seed: loss + shift for (seed, loss), shift in zip(DENSE.items(), shifts)}


def table(root):
    """{communications: row} of the finished runs under root."""
    runs = [compare.read_run(folder) for folder in compare.find_runs([root])[0]]
    return {row.communications: row for row in compare.group([run for run in runs if not run.trouble])}


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
    spread = compare.to_dense(rows[4])
    # standard deviation 0.001, t(0.975, 2) = 4.302653
    assert spread.n == 3 and spread.mean == pytest.approx(0.021)
    assert spread.half == pytest.approx(4.302653 * 0.001 / math.sqrt(3), rel=1e-5)
    low, high = ttest_rel(list(rows[4].losses.values()), list(DENSE.values())).confidence_interval(0.95)
    assert (spread.mean - spread.half, spread.mean + spread.half) == pytest.approx((low, high))
    assert [rows[count].floor for count in (8, 4, 2)] == pytest.approx([0.002] * 3)
    assert compare.judge(spread, 0.002) == 'higher'
    assert compare.judge(compare.to_dense(rows[2]), 0.002) == 'no difference'      # its interval excludes 0
    assert compare.judge(compare.estimate([0.01, 0.02, 0.03]), 0.002) == 'undecided'       # 0.02 +- 0.0248
    assert compare.judge(compare.estimate([-0.1, -0.11]), None) == 'lower, floor unknown'


def test_one_seed_has_no_interval(tmp_path):
    write_run(tmp_path, 'dense', {7: 2.0}, tp_size=1)
    write_run(tmp_path, '4comm', {7: 2.5}, SPD)
    row = table(tmp_path)[4]
    assert compare.verdict(compare.to_dense(row), row.floor) == '+0.5000 (one seed, no interval): undecided'


def test_pairs_are_of_one_seed(tmp_path):
    write_run(tmp_path, 'dense', {1: 2.0, 2: 3.0}, tp_size=1)
    write_run(tmp_path, '4comm', {2: 3.5, 3: 9.0}, SPD)
    row = table(tmp_path)[4]
    assert compare.to_dense(row) == compare.Estimate(0.5, None, 1)
    assert compare.missing_notes([row], []) == ['4comm: no dense control of seed 3, not in its difference']


def test_torn_last_line_is_dropped_and_a_broken_one_refused(tmp_path):
    write_run(tmp_path, 'dense', {1: 2.0}, tp_size=1)
    path = tmp_path / 'dense-seed1' / 'metrics.jsonl'
    whole = path.read_text()
    path.write_text(whole + '{"iter": 30, "val_l')
    assert table(tmp_path)[0].loss == 2.0
    path.write_text(whole + '{"iter": 30, "val_l\n' + whole)
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
    assert compare.to_dense(table(tmp_path)[4]).mean == 0.5


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


def test_outputs(tmp_path, capsys):
    write_run(tmp_path / 'out', 'dense', DENSE, tp_size=1)
    write_run(tmp_path / 'out', '8comm', shifted(0.001, 0.0, 0.0))
    write_run(tmp_path / 'out', '4comm', shifted(0.02, 0.021, 0.022), SPD)
    compare.main([str(tmp_path / 'out'), f'--out={tmp_path / "cmp"}'])
    printed, text = capsys.readouterr().out, (tmp_path / 'cmp' / 'table.md').read_text()
    for said in (printed, text):
        assert 'Some text, byte tokens, 20 steps' in said and 'higher' in said
    for name in compare.PLOTS:
        assert (tmp_path / 'cmp' / name).read_bytes().startswith(b'\x89PNG') and f']({name})' in text


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
    (line, relative) = compare.goal([table(tmp_path)[12]], 12, 3.35)
    assert line.startswith(f'spd x 12 (tp_size 4): {answer}') and 'no pair of runs' in relative


@pytest.mark.parametrize('off', [
    dict(corpus=dict(tokenizer='byte')), dict(info=dict(parameters=620_032)), dict(dataset='pystdlib'),
    dict(max_iters=600)])
def test_thresholds_are_not_applied_elsewhere(tmp_path, off):
    write_run(tmp_path, '12comm', {1: 2.0}, ['spd'] * 12, **(FULL | off))
    (line, relative) = compare.goal([table(tmp_path)[12]], 12, 3.35)
    assert line.startswith('not answerable: thresholds are for') and relative.startswith('relative form')
    assert compare.goal([], 12, 3.35)[0].startswith(compare.UNANSWERED)


def curve(tmp_path, shifts):
    """Runs of 24, 18, 12 and 2 communications that lie so far above the dense control."""
    write_run(tmp_path, 'dense', DENSE, tp_size=1)
    for types, shift in zip((['tp'] * 12, ['tp', 'spd'] * 6, ['spd'] * 12, ['parallel'] * 12), shifts):
        write_run(tmp_path, f'{types[0]}{types[1]}', shifted(shift, shift + 0.0001, shift), types)
    return compare.curves(list(table(tmp_path).values()))[0]


@pytest.mark.parametrize('shifts, answer', [
    ((0, 0.01, 0.02, 0.3), 'this looks like a cliff'),          # 0.028 per communication after 0.0017
    ((0, 0.01, 0.02, 0.05), 'this looks gradual'),
    ((0.05, 0.04, 0.02, 0.01), 'no, the loss rises at no step'),
    ((0.01, 0.011, 0.012, 0.013), 'within the rounding floor'),
    ((0, 0.01, 0.02), 'it takes four counts'),
])
def test_cliff(tmp_path, shifts, answer):
    assert answer in compare.cliff(curve(tmp_path, shifts))


def test_placement_needs_the_same_blocks(tmp_path):
    write_run(tmp_path, 'mixed', shifted(0.01, 0.01, 0.01), ['tp', 'spd'] * 2)
    write_run(tmp_path, 'first', shifted(0.05, 0.051, 0.052), ['tp', 'tp', 'spd', 'spd'])
    write_run(tmp_path, 'other', shifted(0, 0, 0), SPD)
    runs = [compare.read_run(folder) for folder in compare.find_runs([tmp_path])[0]]
    lines = compare.placement(compare.group(runs))
    assert len(lines) == 1
    assert lines[0].startswith('[tp, spd] x 2 (tp_size 4) minus tp x 2, spd x 2 (tp_size 4): -0.0410')
    assert lines[0].endswith('lower, floor unknown')


@pytest.mark.parametrize('block_types, short', [
    (['spd'] * 12, 'spd x 12'), (['tp', 'spd', 'spd'] * 4, '[tp, spd, spd] x 4'),
    (['spd'] * 6 + ['tp'] * 6, 'spd x 6, tp x 6'), (['tp', 'spd', 'spd'], 'tp, spd x 2')])
def test_pattern(block_types, short):
    assert compare.pattern(block_types) == short


def test_start_imports_nothing_heavy():
    code = 'import sys, sweep, compare; print({"torch", "scipy", "matplotlib", "numpy"} & sys.modules.keys())'
    root = Path(compare.__file__).parent
    run = subprocess.run([sys.executable, '-c', code], cwd=root, capture_output=True, text=True)
    assert run.stdout == 'set()\n', run.stderr
