"""sweep.py: what it plans, and what it does with runs that end well, fail or are stopped; stand-ins train."""
import fcntl
import json
import os
import signal
import subprocess
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
import json, os, signal, sys, time
from pathlib import Path

def note(state, **line):
    line = line or dict(iter=config['max_iters'], val_loss=2.5, val_tokens=65536)
    with open(out_dir / 'metrics.jsonl', 'a') as metrics:
        print(json.dumps(line), file=metrics)
    info = dict(name=name, state=state, config=config, corpus={}, communications=0, all_reduces={},
                parameters=0, processes=1)
    (out_dir / 'run.json').write_text(json.dumps(info))

"""


def stand_in(monkeypatch, script):
    """Has each run be `script`, which knows the run's out_dir, name and config, if it resumes, and note()."""
    def command(run, resume, share, _):
        known = f'name, resume, config = {run.name!r}, {resume}, {vars(run.config)!r}\n'
        return [sys.executable, '-c', HEAD + known + f'out_dir = Path({str(run.out_dir)!r})\n' + script]
    monkeypatch.setattr(sweep, 'command', command)


def swept(runs, jobs=1):
    going = sweep.Sweep(runs, [sweep.Share([], [])] * jobs)
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
    plain = sweep.command(run, resume=True, share=sweep.Share([], []))
    assert plain[:2] == [sys.executable, str(sweep.ROOT / 'train.py')] and plain[-1] == '--init_from=resume'
    assert f'--out_dir={run.out_dir}' in plain and '--seed=5' in plain
    _, second = sweep.shares(2, ['4', '5', '6', '7'], list(range(9)))
    launched = sweep.command(run, resume=False, share=second)
    assert '--nproc_per_node=2' in launched and '--init_from=resume' not in launched
    assert second.environment == {'CUDA_VISIBLE_DEVICES': '6,7'} and second.cores == [4, 5, 6, 7]
    shared = sweep.shares(3, ['0', '1'], [0, 1, 2, 3])
    assert [(share.gpus, share.cores) for share in shared] == [(['0'], [0]), (['1'], [1]), (['0'], [2])]


def test_a_job_has_its_share_of_the_cores_and_no_more(tmp_path):
    assert [share.cores for share in sweep.shares(2, [], [0, 1, 2, 3, 4])] == [[0, 1], [2, 3]]
    assert [share.cores for share in sweep.shares(3, [], [0, 1])] == [[0], [1], [0]]
    assert sweep.shares(1, [], [0, 1])[0].environment == {}
    core = sweep.find_cores()[-1]
    with open(tmp_path / 'log.txt', 'w+') as log:
        code = 'import os; print(os.sched_getaffinity(0), os.environ["OMP_NUM_THREADS"])'
        sweep.launch([sys.executable, '-c', code], sweep.Share([], [core]), log).wait()
        log.seek(0)
        assert log.readlines()[1:] == [f'{{{core}}} 1\n']


def test_a_failed_run_is_named_and_the_rest_goes_on(tmp_path, monkeypatch, capsys):
    stand_in(monkeypatch, 'if "8comm" in name: print("error: no luck"); sys.exit(3)\nnote("finished")')
    runs = planned(tmp_path, '--seed=1,2', files=(EIGHT, TWELVE))
    going = swept(runs, jobs=2)
    assert names(going.failed) == ['8comm-cpu-seed1', '8comm-cpu-seed2'] and len(going.finished) == 4
    log = tmp_path / 'gpt2-124M-8comm-cpu-seed1' / 'log.txt'
    assert f'exit status 3, see {log}: no luck' in capsys.readouterr().out

    # the same sweep again trains those that failed and no others
    stand_in(monkeypatch, 'assert "8comm" in name and not resume\nnote("finished")')
    assert not swept(runs).failed


def test_exit_status_of_the_sweep(tmp_path, monkeypatch, capsys):
    words = [TWELVE, '--with', CPU, f'--out={tmp_path}', '--seed=1,2']
    stand_in(monkeypatch, 'sys.exit(3 if "12comm" in name else note("finished"))')
    with pytest.raises(SystemExit) as end:
        sweep.main(words)
    assert end.value.code == 1
    stand_in(monkeypatch, 'note("finished")')
    with pytest.raises(SystemExit) as end:
        sweep.main(words)
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
    going = sweep.Sweep(runs, [sweep.Share([], [])])
    going.start()
    while not (runs[0].out_dir / 'ready').exists():
        time.sleep(0.02)
    ours = {number: signal.getsignal(number) for number in sweep.ENDING}
    going.stop()
    for number, handler in ours.items():
        signal.signal(number, handler)
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


def test_a_run_that_a_signal_stopped_goes_on_after_the_others(tmp_path, monkeypatch, capsys):
    stand_in(monkeypatch, 'if "12comm" in name and not resume:\n    (out_dir / "ckpt.pt").touch()\n'
                          '    note("resumable", iter=7)\n    sys.exit(75)\nnote("finished")')
    going = swept(planned(tmp_path, files=(TWELVE, EIGHT)))
    assert names(going.finished) == ['cpu', '8comm-cpu', '12comm-cpu'] and not going.failed
    assert 'stopped from outside at step 7, goes on after the others: gpt2-124M-12comm-cpu' \
        in capsys.readouterr().out

    # but not where it could not save what it had done, as on a full disk
    stand_in(monkeypatch, 'note("resumable", iter=7)\nsys.exit(75)')
    assert len(swept(planned(tmp_path / 'again')).failed) == 2


def test_a_run_that_another_process_trains_is_left_to_it(tmp_path, monkeypatch, capsys):
    runs = planned(tmp_path, files=(TWELVE, EIGHT))
    runs[0].out_dir.mkdir()
    other = open(runs[0].out_dir / 'lock', 'w')
    fcntl.flock(other, fcntl.LOCK_EX)
    assert [sweep.standing(run) for run in runs] == ['running', 'new', 'new']
    going = sweep.Sweep(runs, [sweep.Share([], [])])
    stand_in(monkeypatch, 'note("finished")')
    show = going.show

    def let_go():                       # once nothing else is left to do
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


def test_estimate(tmp_path):
    runs = planned(tmp_path, '--n_embd=64,128', '--max_iters=100')      # dense and 12comm of each width
    config = vars(runs[1].config)
    dense = dict(vars(runs[0].config))
    paces = [sweep.Pace(config, 1024, 3000), sweep.Pace(dense, 2048, 3000), sweep.Pace(dense, 1024, 3000)]
    # 16 windows of 64 tokens a step, an evaluation every 100 steps
    assert sweep.seconds_left(runs[1], paces) == 100 + 1000 / 1024
    assert sweep.seconds_left(runs[0], paces) == pytest.approx(sweep.seconds_left(runs[1], paces) / 1.5)
    assert sweep.seconds_left(runs[2], paces) is None
    assert sweep.makespan([3, 1, 1, 4], 2) == 6


def test_the_speed_comes_from_a_probe_and_later_from_the_runs(tmp_path, monkeypatch, capsys):
    stand_in(monkeypatch, 'note("running", iter=0, val_loss=5, val_tokens=3000)\n'
                          'for i in range(1, 11):\n'
                          '    note("running", iter=i, tokens_per_sec=500 + 1000 * (i > 1))')
    runs, share = planned(tmp_path, '--max_iters=100'), sweep.Share([], [])
    paces, source = sweep.measure(runs, [share, share], sweep.ROOT / 'train.py')
    assert [(pace.tokens_per_sec, pace.eval_tokens) for pace in paces] == [(1500, 3000)] * 2
    assert {pace.config['tp_size'] for pace in paces} == {1, 2} and source == 'those first steps'
    assert not list(tmp_path.iterdir())         # it leaves nothing
    swept(runs)
    assert sweep.measure(runs, [share], None)[1] == 'the speed of 2 of these runs so far'

    stand_in(monkeypatch, 'print("error: no data")\nsys.exit(1)')
    with pytest.raises(SystemExit, match='gpt2-124M-12comm-cpu cannot be trained: no data'):
        sweep.main([TWELVE, '--with', CPU, f'--out={tmp_path / "new"}'])


def test_why_a_run_failed_is_found_in_its_log(tmp_path):
    log = tmp_path / 'log.txt'
    log.write_text('$ train\nerror: of an earlier start\n$ train\nstep 1\n')
    assert sweep.reason(log) == 'step 1'
    with open(log, 'a') as file:
        file.write('[rank1]: torch.OutOfMemoryError: none left\nTraceback of torchrun:\n======\n')
    assert sweep.reason(log) == 'torch.OutOfMemoryError: none left'


def test_progress_tells_done_left_and_loss(tmp_path):
    runs = planned(tmp_path, '--max_iters=100')
    going = sweep.Sweep(runs, [sweep.Share([], [])])
    going.jobs, going.waiting = [sweep.Job(runs[0], None, None, 0, 0)], runs[1:]
    going.began = time.monotonic() - 50
    runs[0].out_dir.mkdir()
    assert going.progress() == '0 done, 2 left, ETA ? | dense 0/100'
    metrics = runs[0].out_dir / 'metrics.jsonl'
    metrics.write_text('{"iter": 50, "train_loss": 3.25}\n{"iter": 60, "tr')
    # 50 of 200 steps in 50 seconds
    assert going.progress() == '0 done, 2 left, ETA 0:02:30 | dense 50/100 train loss 3.2500'
    metrics.write_text('{"iter": 50, "train_loss": null}\n')
    assert going.progress().endswith('dense 50/100 train loss not a number')


def test_the_estimate_is_the_eta_until_a_twentieth_is_done(tmp_path):
    runs = planned(tmp_path, '--max_iters=100')
    paces = [sweep.Pace(vars(runs[0].config), 1024, 0)]
    going = sweep.Sweep(runs, [sweep.Share([], [])] * 2, paces=paces)
    assert going.estimate == 100                # two runs of 100 steps at one a second, side by side
    going.began = time.monotonic() - 40
    runs[0].out_dir.mkdir()
    for step, eta in ((9, 60), (50, 120)):
        (runs[0].out_dir / 'metrics.jsonl').write_text(json.dumps({'iter': step, 'train_loss': 1}) + '\n')
        assert going.eta() == pytest.approx(eta, abs=1)
