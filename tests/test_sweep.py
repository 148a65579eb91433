"""sweep.py: what it plans, and what it does with runs that end well, fail or are stopped; stand-ins train."""
import json
import signal
import sys
import time

import pytest

import sweep

TWELVE, EIGHT, DENSE = (str(sweep.ROOT / f'config/train_gpt2{name}.py') for name in ('_12comm', '_8comm', ''))
CPU = str(sweep.ROOT / 'config/cpu.py')


@pytest.fixture(autouse=True)
def in_the_project(monkeypatch):
    monkeypatch.chdir(sweep.ROOT)
    monkeypatch.delenv('CUDA_VISIBLE_DEVICES', raising=False)


def planned(tmp_path, *flags, files=(TWELVE,)):
    return sweep.plan(list(files), [CPU], sweep.parse_grid(flags), tmp_path)


def names(runs):
    return [run.name.removeprefix('gpt2-124M-') for run in runs]


HEAD = """
import json, signal, sys, time
from pathlib import Path

def note(state):
    (out_dir / 'metrics.jsonl').write_text(json.dumps(dict(iter=config['max_iters'], val_loss=2.5)) + '\\n')
    info = dict(name=name, state=state, config=config, corpus={}, communications=0, all_reduces={},
                parameters=0)
    (out_dir / 'run.json').write_text(json.dumps(info))

"""


def stand_in(monkeypatch, script):
    """Has each run be `script`, which knows the run's out_dir, name and config, if it resumes, and note()."""
    def command(run, resume, share, _):
        known = f'name, resume, config = {run.name!r}, {resume}, {vars(run.config)!r}\n'
        return [sys.executable, '-c', HEAD + known + f'out_dir = Path({str(run.out_dir)!r})\n' + script]
    monkeypatch.setattr(sweep, 'command', command)


def swept(runs, jobs=1):
    going = sweep.Sweep(runs, [{}] * jobs)
    going.train()
    return going


def test_grid_has_each_run_once_and_dense_once_per_seed(tmp_path):
    runs = planned(tmp_path, '--tp_size=2,4', '--seed=1,2', files=(TWELVE, EIGHT))
    assert names(runs) == [
        'cpu-seed1', '12comm-cpu-seed1-tp2', '8comm-cpu-seed1-tp2',
        '12comm-cpu-seed1-tp4', '8comm-cpu-seed1-tp4',
        'cpu-seed2', '12comm-cpu-seed2-tp2', '8comm-cpu-seed2-tp2',
        '12comm-cpu-seed2-tp4', '8comm-cpu-seed2-tp4']
    for run in runs:
        size = 1 if 'comm' not in run.name else int(run.name[-1])
        assert run.config.tp_size == size and f'seed{run.config.seed}' in run.name
        assert [arg for arg in run.args if 'tp_size' in arg] == [f'--tp_size={size}']
        assert run.out_dir == tmp_path / run.name


def test_a_dense_control_given_by_name_is_not_added_again(tmp_path):
    assert names(planned(tmp_path, '--tp_size=4', files=(TWELVE, DENSE))) == ['cpu', '12comm-cpu-tp4']


def test_a_file_composed_after_it_leaves_the_control_dense(tmp_path):
    (tmp_path / 'wide.py').write_text('tp_size = 8\n')
    runs = sweep.plan([TWELVE], [CPU, str(tmp_path / 'wide.py')], {}, tmp_path)
    assert [run.config.tp_size for run in runs] == [1, 8]


def test_each_recipe_gets_the_control_of_its_own(tmp_path):
    (tmp_path / 'small.py').write_text('n_layer = 4\nwandb_run_name = "small"\ntp_size = 1\n')
    (tmp_path / 'small_tp.py').write_text('n_layer = 4\nwandb_run_name = "small-tp"\ntp_size = 2\n')
    files = [str(tmp_path / name) for name in ('small_tp.py', 'small.py')]
    assert [run.name for run in sweep.plan([TWELVE, *files], [], {}, tmp_path)] == [
        'gpt2-124M', 'small', 'gpt2-124M-12comm', 'small-tp']
    with pytest.raises(SystemExit, match='small_tp.py: no config has tp_size 1 and the same recipe'):
        sweep.plan(files[:1], [], {}, tmp_path)


def test_folder_names(tmp_path):
    runs = planned(tmp_path, '--seed=3', '--learning_rate=1e-3', '--compile=False')
    assert names(runs) == ['cpu-learning_rate=0.001-seed3', '12comm-cpu-learning_rate=0.001-seed3']
    assert 'cpu-compile=True' in names(planned(tmp_path, '--compile=False,True'))
    assert names(planned(tmp_path, '--block_types=tp,spd'))[1] == '12comm-cpu-block_types=tp_spd_x_6'


@pytest.mark.parametrize('flags, told', [
    (['--seed', '1'], '--seed: a key for train.py is given as --key=value'),
    (['--seed=1', '--seed=2'], 'a list is --seed=1,2'),
    (['--tp_size=1,2'], 'it is always added'),
    (['--out_dir=elsewhere'], '--out says where'),
    (['--sede=1'], 'no key is called sede'),
    (['--learning_rate=1e-3,0.001'], 'would share'),
    (['--jobs=0'], 'must be at least 1'),
    (['--jobs=two'], "invalid int value: 'two'"),
])
def test_wrong_command_lines_get_one_line(tmp_path, flags, told):
    with pytest.raises(SystemExit) as end:
        sweep.main([TWELVE, f'--out={tmp_path / "out"}', *flags])
    assert told in str(end.value.code) and '\n' not in str(end.value.code)
    assert not (tmp_path / 'out').exists()


def test_command_lines(tmp_path):
    run = planned(tmp_path, '--seed=5')[1]
    plain = sweep.command(run, resume=True, share={})
    assert plain[:2] == [sys.executable, str(sweep.ROOT / 'train.py')] and plain[-1] == '--init_from=resume'
    assert f'--out_dir={run.out_dir}' in plain and '--seed=5' in plain
    first, second = sweep.shares(2, ['4', '5', '6', '7'])
    launched = sweep.command(run, resume=False, share=second)
    assert '--nproc_per_node=2' in launched and second == {'CUDA_VISIBLE_DEVICES': '6,7'}
    assert '--init_from=resume' not in launched
    with pytest.raises(SystemExit, match='a run needs one at least'):
        sweep.shares(3, ['0', '1'])


def test_a_failed_run_is_named_and_the_rest_goes_on(tmp_path, monkeypatch, capsys):
    stand_in(monkeypatch, 'if "8comm" in name: print("error: no luck"); sys.exit(3)\nnote("finished")')
    runs = planned(tmp_path, '--seed=1,2', files=(EIGHT, TWELVE))
    going = swept(runs, jobs=2)
    assert names(going.failed) == ['8comm-cpu-seed1', '8comm-cpu-seed2'] and len(going.finished) == 4
    log = tmp_path / 'gpt2-124M-8comm-cpu-seed1' / 'log.txt'
    assert f'exit status 3, see {log}: error: no luck' in capsys.readouterr().out

    # the same sweep again trains those that failed and no others
    stand_in(monkeypatch, 'assert "8comm" in name and not resume\nnote("finished")')
    assert not swept(runs).failed


def test_exit_status_of_the_sweep(tmp_path, monkeypatch, capsys):
    stand_in(monkeypatch, 'sys.exit("12comm" in name or note("finished"))')
    with pytest.raises(SystemExit) as end:
        sweep.main([TWELVE, '--with', CPU, f'--out={tmp_path}'])
    assert end.value.code == 1
    stand_in(monkeypatch, 'note("finished")')
    with pytest.raises(SystemExit) as end:
        sweep.main([TWELVE, '--with', CPU, f'--out={tmp_path}'])
    assert end.value.code == 0
    assert f'python compare.py {tmp_path} --out={tmp_path / "compare"}' in capsys.readouterr().out


def test_an_exit_without_a_finished_run_is_a_failure(tmp_path, monkeypatch):
    stand_in(monkeypatch, 'note("resumable")')
    assert len(swept(planned(tmp_path)).failed) == 2


def test_stop_lets_runs_save_and_the_next_sweep_resumes_them(tmp_path, monkeypatch):
    stand_in(monkeypatch, 'def save(*_):\n    (out_dir / "ckpt.pt").touch()\n    note("resumable")\n'
                          '    sys.exit(75)\n'
                          'signal.signal(signal.SIGTERM, save)\n(out_dir / "ready").touch()\ntime.sleep(60)')
    runs = planned(tmp_path)
    going = sweep.Sweep(runs, [{}])
    going.start()
    while not (runs[0].out_dir / 'ready').exists():
        time.sleep(0.02)
    ours = signal.getsignal(signal.SIGINT)
    going.stop()
    signal.signal(signal.SIGINT, ours)
    assert [sweep.standing(run) for run in runs] == ['resume', 'new']

    stand_in(monkeypatch, 'assert resume == ("12comm" not in name)\nnote("finished")')
    assert not swept(runs).failed
    assert [sweep.standing(run) for run in runs] == ['finished', 'finished']


def test_a_folder_with_another_run_is_refused(tmp_path, monkeypatch):
    stand_in(monkeypatch, 'note("finished")')
    swept(planned(tmp_path))
    path = tmp_path / 'gpt2-124M-12comm-cpu' / 'run.json'
    info = json.loads(path.read_text())
    info['config'].update(log_interval=7)       # is no part of the recipe
    path.write_text(json.dumps(info))
    assert {sweep.standing(run) for run in planned(tmp_path)} == {'finished'}
    info['config'].update(n_embd=32)
    path.write_text(json.dumps(info))
    with pytest.raises(SystemExit, match='12comm-cpu holds another run .n_embd is 32 there, 64 here'):
        sweep.main([TWELVE, '--with', CPU, f'--out={tmp_path}'])


def test_progress_tells_done_left_and_loss(tmp_path, monkeypatch):
    runs = planned(tmp_path, '--max_iters=100')
    going = sweep.Sweep(runs, [{}])
    going.jobs, going.waiting = [sweep.Job(runs[0], {}, None, 0)], runs[1:]
    going.began = time.monotonic() - 50
    runs[0].out_dir.mkdir()
    assert going.progress().startswith('0 done, 2 left, ETA ? | step 0/100 ')
    (runs[0].out_dir / 'metrics.jsonl').write_text('{"iter": 50, "train_loss": 3.25}\n{"iter": 60, "tr')
    # 50 of 200 steps in 50 seconds
    assert going.progress().startswith('0 done, 2 left, ETA 0:02:30 | step 50/100, train loss 3.250 gpt2-')
