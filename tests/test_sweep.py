"""
sweep.py: what it plans, and what it does with runs that finish, fail or are stopped.

Small scripts stand in for train.py.

    python -m pytest tests/test_sweep.py
"""

import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

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


# before each stand-in: note() writes what train.py would
HEAD = """
import json, os, signal, sys, time
from pathlib import Path

def note(state, **line):
    line = line or dict(iter=config['max_iters'], val_loss=2.5, val_tokens=65536)
    with open(out_dir / 'metrics.jsonl', 'a') as metrics:
        print(json.dumps(line), file=metrics)
    info = dict(name=name, state=state, config=config, corpus={}, communications=0, all_reduces={},
                parameters=0, processes=1, iter=line['iter'], val_loss=line.get('val_loss'))
    (out_dir / 'run.json').write_text(json.dumps(info))

"""


def stand_in(monkeypatch, script):
    """Let `script` be each run. It has the run's out_dir, name and config, `resume`, and note()."""
    def command(run, resume, share):
        known = f'name, resume, config = {run.name!r}, {resume}, {vars(run.config)!r}\n'
        return [sys.executable, '-c', HEAD + known + f'out_dir = Path({str(run.out_dir)!r})\n' + script]
    monkeypatch.setattr(sweep, 'command', command)


def new_sweep(runs, jobs=1):
    return sweep.Sweep(runs, [sweep.Share([], [])] * jobs)


def swept(runs, jobs=1):
    going = new_sweep(runs, jobs)
    going.train()
    return going


# the plan


def test_a_grid_has_each_run_once_and_dense_once_per_seed(tmp_path):
    runs = planned(tmp_path, '--tp_size=2,4', '--seed=1,2', files=(TWELVE, EIGHT))
    assert names(runs) == [
        'cpu-seed1', '12comm-cpu-seed1-tp2', '8comm-cpu-seed1-tp2',
        '12comm-cpu-seed1-tp4', '8comm-cpu-seed1-tp4',
        'cpu-seed2', '12comm-cpu-seed2-tp2', '8comm-cpu-seed2-tp2',
        '12comm-cpu-seed2-tp4', '8comm-cpu-seed2-tp4']
    for run in runs:
        size = 1 if 'comm' not in run.name else int(run.name[-1])
        assert run.config.tp_size == size and f'seed{run.config.seed}' in run.name
        assert run.out_dir == tmp_path / run.name


def test_the_dense_control_takes_no_flag_about_ranks_blocks_or_merge(tmp_path):
    dense, *others = planned(tmp_path, '--tp_size=2,4', '--merge=sum,mean', '--block_types=spd')
    assert names([dense]) == ['cpu'] and len(others) == 4
    assert dense.config == sweep.load([DENSE, CPU, f'--out_dir={dense.out_dir}'])
    assert {(run.config.tp_size, run.config.merge) for run in others} == {
        (size, merge) for size in (2, 4) for merge in ('sum', 'mean')}
    assert {run.name for run in others} > {'gpt2-124M-12comm-cpu-block_types=spd_x_12-merge=mean-tp4'}


def test_a_dense_control_given_by_name_is_not_added_again(tmp_path):
    assert names(planned(tmp_path, '--tp_size=4', files=(TWELVE, DENSE))) == ['cpu', '12comm-cpu-tp4']


def test_a_file_composed_after_it_leaves_the_control_dense(tmp_path):
    (tmp_path / 'wide.py').write_text('tp_size = 8\n')
    runs = sweep.plan([TWELVE], [CPU, str(tmp_path / 'wide.py')], {}, tmp_path)
    assert [run.config.tp_size for run in runs] == [1, 8]


def test_each_recipe_gets_its_own_control(tmp_path):
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


@pytest.mark.parametrize('flags, words', [
    (['--seed', '1'], '--seed: a key for train.py is given as --key=value'),
    (['--seed=1', '--seed=2'], 'a list is --seed=1,2'),
    (['--tp_size=1,2'], 'the control is always trained'),
    (['--out_dir=elsewhere'], '--out says where'),
    (['--sede=1'], 'no key is called sede'),
    (['--learning_rate=1e-3,0.001'], 'would share'),
    (['--jobs=0'], '--jobs is 0, it must be at least 1'),
    (['--jobs=two'], "invalid int value: 'two'"),
])
def test_a_mistake_in_the_command_line_gets_one_line(tmp_path, flags, words):
    with pytest.raises(SystemExit) as end:
        sweep.main([TWELVE, f'--out={tmp_path / "out"}', *flags])
    assert words in str(end.value.code) and '\n' not in str(end.value.code)
    assert not (tmp_path / 'out').exists()


# the machine


def test_command_lines(tmp_path):
    run = planned(tmp_path, '--seed=5')[1]
    python, script, *args = sweep.command(run, resume=True, share=sweep.Share([], []))
    assert (python, script) == (sys.executable, str(sweep.ROOT / 'train.py'))
    config = sweep.load(args)  # as train.py reads it
    assert (config.seed, config.init_from, config.out_dir) == (5, 'resume', str(run.out_dir))
    launched = sweep.command(run, resume=False, share=sweep.Share(['6', '7'], []))
    assert '--nproc_per_node=2' in launched and '--init_from=resume' not in launched


@pytest.mark.parametrize('jobs, gpus, cores, parts', [
    (2, '4567', 9, [('45', [0, 1, 2, 3]), ('67', [4, 5, 6, 7])]),
    (3, '01', 4, [('0', [0]), ('1', [1]), ('0', [2])]),
    (2, '', 5, [('', [0, 1]), ('', [2, 3])]),
    (3, '', 2, [('', [0]), ('', [1]), ('', [0])]),
    (1, '01', 2, [('01', [])]),
])
def test_jobs_divide_the_machine(jobs, gpus, cores, parts):
    found = sweep.divide(jobs, list(gpus), list(range(cores)))
    assert [(''.join(share.gpus), share.cores) for share in found] == parts


def test_a_job_gets_its_share_and_no_more(tmp_path):
    core = sweep.find_cores()[-1]
    with open(tmp_path / 'log.txt', 'w+') as log:
        code = 'import os; print(os.sched_getaffinity(0), os.environ["OMP_NUM_THREADS"])'
        sweep.launch([sys.executable, '-c', code], sweep.Share([], [core]), log).wait()
        code = 'import os; print(os.environ["CUDA_VISIBLE_DEVICES"])'
        sweep.launch([sys.executable, '-c', code], sweep.Share(['6', '7'], []), log).wait()
        log.seek(0)
        assert [line for line in log if not line.startswith('$')] == [f'{{{core}}} 1\n', '6,7\n']


# runs that finish, fail or are stopped


def test_a_failed_run_is_named_and_the_rest_goes_on(tmp_path, monkeypatch, capsys):
    stand_in(monkeypatch, 'if "8comm" in name: print("error: no luck"); sys.exit(3)\nnote("finished")')
    runs = planned(tmp_path, '--seed=1,2', files=(EIGHT, TWELVE))
    going = swept(runs, jobs=2)
    assert names(going.failed) == ['8comm-cpu-seed1', '8comm-cpu-seed2'] and len(going.finished) == 4
    log = tmp_path / 'gpt2-124M-8comm-cpu-seed1' / 'log.txt'
    assert f'exit status 3, see {log}: no luck' in capsys.readouterr().out

    # the same sweep again trains those that failed, and no others
    stand_in(monkeypatch, 'assert "8comm" in name and not resume\nnote("finished")')
    assert not swept(runs).failed


def test_exit_status_and_the_command_that_compares(tmp_path, monkeypatch, capsys):
    argv = [TWELVE, '--with', CPU, f'--out={tmp_path}', '--seed=1,2']
    stand_in(monkeypatch, 'sys.exit(3 if "12comm" in name else note("finished"))')
    with pytest.raises(SystemExit) as end:
        sweep.main(argv)
    assert end.value.code == 1
    stand_in(monkeypatch, 'note("finished")')
    with pytest.raises(SystemExit) as end:
        sweep.main(argv)
    assert end.value.code == 0
    assert f'python compare.py {tmp_path} --out={tmp_path / "compare"}' in capsys.readouterr().out

    # with a run of another sweep beside them, it names the folders
    (tmp_path / 'other').mkdir()
    (tmp_path / 'other/run.json').touch()
    with pytest.raises(SystemExit):
        sweep.main(argv)
    command = capsys.readouterr().out.splitlines()[-1].split()
    assert sorted(map(Path, command[2:-1])) == sorted(tmp_path.glob('gpt2-*'))


def test_an_exit_without_a_finished_run_is_a_failure(tmp_path, monkeypatch):
    stand_in(monkeypatch, 'note("resumable")')
    assert len(swept(planned(tmp_path)).failed) == 2


@pytest.mark.parametrize('number', sweep.STOP_SIGNALS)
def test_a_stopped_sweep_saves_its_runs_and_the_next_one_resumes_them(tmp_path, monkeypatch, capsys, number):
    stand_in(monkeypatch, 'def save(*_):\n    (out_dir / "ckpt.pt").touch()\n    note("resumable")\n'
                          '    sys.exit(75)\n'
                          'signal.signal(signal.SIGTERM, save)\n(out_dir / "ready").touch()\ntime.sleep(60)')
    runs = planned(tmp_path)

    def stop():
        while not (runs[0].out_dir / 'ready').exists():
            time.sleep(0.02)
        os.kill(os.getpid(), number)
    ours = {number: signal.getsignal(number) for number in sweep.STOP_SIGNALS}
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job starts with it ignored
    threading.Thread(target=stop).start()
    try:
        with pytest.raises(SystemExit) as end:
            sweep.main([TWELVE, '--with', CPU, f'--out={tmp_path}'])
    finally:
        for number, handler in ours.items():
            signal.signal(number, handler)
    assert end.value.code == 130
    assert 'stopped with 0 of 2 runs finished; the same command continues' in capsys.readouterr().out
    assert [sweep.state_of(run) for run in runs] == ['resume', 'new']

    stand_in(monkeypatch, 'assert resume == ("12comm" not in name)\nnote("finished")')
    assert not swept(runs).failed
    assert [sweep.state_of(run) for run in runs] == ['finished', 'finished']


def test_a_folder_with_another_run_is_refused(tmp_path, monkeypatch):
    stand_in(monkeypatch, 'note("finished")')
    swept(planned(tmp_path))
    path = tmp_path / 'gpt2-124M-12comm-cpu' / 'run.json'
    info = json.loads(path.read_text())
    info['config'].update(log_interval=7)  # does not change what the run computes
    path.write_text(json.dumps(info))
    assert {sweep.state_of(run) for run in planned(tmp_path)} == {'finished'}
    info['config'].update(n_embd=32)
    path.write_text(json.dumps(info))
    with pytest.raises(SystemExit, match='12comm-cpu holds another run .n_embd is 32 there, 64 here'):
        sweep.main([TWELVE, '--with', CPU, f'--out={tmp_path}'])
    path.write_text('{"state":')
    with pytest.raises(SystemExit, match='12comm-cpu/run.json is damaged') as end:
        sweep.main([TWELVE, '--with', CPU, f'--out={tmp_path}'])
    assert len(end.value.code.splitlines()) == 1


def test_a_run_stopped_by_a_signal_continues_after_the_others(tmp_path, monkeypatch, capsys):
    stand_in(monkeypatch, 'if "12comm" in name and not resume:\n    (out_dir / "ckpt.pt").touch()\n'
                          '    note("resumable", iter=7)\n    sys.exit(75)\nnote("finished")')
    going = swept(planned(tmp_path, files=(TWELVE, EIGHT)))
    assert names(going.finished) == ['cpu', '8comm-cpu', '12comm-cpu'] and not going.failed
    assert 'stopped from outside at step 7, continues after the others: gpt2-124M-12comm-cpu' \
        in capsys.readouterr().out

    # but not if it could not save what it had done, as on a full disk
    stand_in(monkeypatch, 'note("resumable", iter=7)\nsys.exit(75)')
    assert len(swept(planned(tmp_path / 'again')).failed) == 2


def test_a_run_that_another_process_trains_is_left_to_it(tmp_path, monkeypatch, capsys):
    runs = planned(tmp_path, files=(TWELVE, EIGHT))
    runs[0].out_dir.mkdir()
    other = open(runs[0].out_dir / 'lock', 'w')
    fcntl.flock(other, fcntl.LOCK_EX)
    assert [sweep.state_of(run) for run in runs] == ['running', 'new', 'new']
    going = new_sweep(runs)
    stand_in(monkeypatch, 'note("finished")')
    show = going.show

    def let_go():
        # once nothing else is left to do
        if len(going.finished) == 2 and not other.closed:
            assert 'waiting for runs that other processes train' in going.progress()
            other.close()
        show()
    monkeypatch.setattr(going, 'show', let_go)
    going.train()
    assert names(going.finished) == ['12comm-cpu', '8comm-cpu', 'cpu'] and not going.failed
    assert capsys.readouterr().out.count('left to the process that trains it now: gpt2-124M-cpu') == 1


@pytest.mark.skipif(sys.platform != 'linux', reason='needs PR_SET_PDEATHSIG')
def test_a_sweep_that_is_killed_takes_its_runs_with_it(tmp_path):
    child = ('import pathlib, signal, sys, time\nhere = pathlib.Path(sys.argv[1])\n'
             'signal.signal(signal.SIGTERM, lambda *_: ((here / "saved").touch(), sys.exit(75)))\n'
             '(here / "ready").touch()\ntime.sleep(60)')
    parent = ('import sys, time, sweep\nsweep.launch([sys.executable, "-c", *sys.argv[1:]], '
              'sweep.Share([], []), open("/dev/null", "w"))\ntime.sleep(60)')
    killed = subprocess.Popen([sys.executable, '-c', parent, child, str(tmp_path)],
                              env=os.environ | {'PYTHONPATH': str(sweep.ROOT)})
    for name in ('ready', 'saved'):
        while not (tmp_path / name).exists():
            time.sleep(0.02)
        killed.kill()
    killed.wait()


def test_the_reason_of_a_failure_is_found_in_the_log(tmp_path):
    log = tmp_path / 'log.txt'
    log.write_text('$ train\nerror: of an earlier start\n$ train\nstep 1\n')
    assert sweep.reason(log) == 'step 1'
    with open(log, 'a') as file:
        file.write('[rank1]: torch.OutOfMemoryError: none left\nTraceback of torchrun:\n======\n')
    assert sweep.reason(log) == 'torch.OutOfMemoryError: none left'


# the time left


def write_metrics(run, *lines):
    run.out_dir.mkdir(exist_ok=True)
    (run.out_dir / 'metrics.jsonl').write_text('\n'.join(map(json.dumps, lines)) + '\n')


def make_steps(run, steps, tokens_per_sec, processes=1):
    """Let a run's folder show this many steps at this speed, after a slow first line."""
    write_metrics(run, dict(iter=0, val_loss=5, val_tokens=3072), *(
        dict(iter=step, train_loss=3, tokens_per_sec=tokens_per_sec if step > 1 else 1)
        for step in range(1, steps + 1)))
    info = dict(name=run.name, state='running', config=vars(run.config), corpus={}, communications=0,
                all_reduces={}, parameters=0, processes=processes, iter=steps, val_loss=None)
    (run.out_dir / 'run.json').write_text(json.dumps(info))


def test_the_time_left_is_unknown_until_runs_of_the_size_have_made_steps(tmp_path, capsys):
    argv = [TWELVE, '--with', CPU, f'--out={tmp_path / "out"}', '--n_embd=64,128', '--dry_run']
    sweep.main(argv)
    assert capsys.readouterr().out.endswith('time left: unknown until runs have made steps\n')
    assert not (tmp_path / 'out').exists()

    small, other_small, large, _ = runs = planned(tmp_path, '--n_embd=64,128', '--max_iters=100')
    # a step has 16 windows of 64 tokens; the evaluation at the end reads 3072, at a third of their cost
    make_steps(small, 20, 1024)
    seconds = 80 * (1 + 1 / 100) + 100 * (1 + 1 / 100)
    assert new_sweep(runs).eta() == f'over {sweep.duration(seconds)}'
    assert new_sweep(runs, jobs=2).eta() == f'over {sweep.duration(101)}'
    make_steps(large, 20, 512)
    assert new_sweep(runs).eta() == sweep.duration(3 * seconds)


def test_the_time_left_follows_the_runs(tmp_path):
    dense, twelve = runs = planned(tmp_path, '--max_iters=100', '--eval_interval=100000')
    going = new_sweep(runs)
    assert going.eta() == 'unknown'
    make_steps(dense, 10, 1024)
    assert going.eta() == '0:03:10'
    make_steps(dense, 50, 2048)
    assert going.eta() == '0:01:15'
    make_steps(twelve, 50, 1024)  # from here on by its own speed
    assert going.eta() == '0:01:15'
    make_steps(twelve, 50, 512)
    assert going.eta() == '0:02:05'


def test_the_speed_of_other_devices_or_processes_tells_nothing(tmp_path):
    runs = planned(tmp_path)
    make_steps(runs[0], 10, 1024, processes=8)
    assert new_sweep(runs).eta() == 'unknown'
    other = planned(tmp_path, '--device=cuda')
    make_steps(other[0], 10, 1024)
    assert new_sweep(runs).eta() == 'unknown' and new_sweep(other).eta() != 'unknown'


def test_progress_shows_done_left_and_loss(tmp_path):
    runs = planned(tmp_path, '--max_iters=100', '--eval_interval=100000')
    going = new_sweep(runs)
    going.jobs, going.waiting = [sweep.Job(runs[0], None, None, 0, 0)], runs[1:]
    assert going.progress() == '0 done, 2 left, ETA unknown | dense 0/100'
    make_steps(runs[0], 50, 1024)
    with open(runs[0].out_dir / 'metrics.jsonl', 'a') as metrics:
        metrics.write('{"iter": 60, "tr')
    assert going.progress() == '0 done, 2 left, ETA 0:02:30 | dense 50/100 train loss 3.0000'
    write_metrics(runs[0], dict(iter=50, train_loss=None))
    assert going.progress().endswith('dense 50/100 train loss not a number')
