"""
sweep.py: what it does with runs that finish, fail or are stopped, and with outputs and signals of its own.

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
from types import SimpleNamespace

import pytest

import sweep
from toy_sweeps import (
    CPU,
    EIGHT,
    FROM_ARGV,
    NOTE,
    TWELVE,
    names,
    new_sweep,
    planned,
    stand_in,
    start,
    swept,
    write_info,
)


@pytest.fixture(autouse=True)
def in_the_project(monkeypatch):
    monkeypatch.chdir(sweep.ROOT)
    monkeypatch.delenv('CUDA_VISIBLE_DEVICES', raising=False)


# the machine


def test_command_lines(tmp_path):
    run = planned(tmp_path, '--seed=5')[1]
    python, script, *args = sweep.command(run, resume=True, share=sweep.Share([], []))
    assert (python, script) == (sys.executable, str(sweep.ROOT / 'train.py'))
    config = sweep.load(args)  # as train.py reads it
    assert (config.seed, config.resume, config.out_dir) == (5, 'auto', str(run.out_dir))
    assert '--nproc_per_node=2' in sweep.command(run, resume=False, share=sweep.Share(['6', '7'], []))
    run.config.init_from = 'gpt2'  # from a file, which a flag would overrule
    assert not any('--init_from' in word for word in sweep.command(run, False, sweep.Share([], [])))
    assert '--init_from=resume' in sweep.command(run, True, sweep.Share([], []))
    assert [run.config.train_layers for run in planned(tmp_path, '--train_layers=3,4')] == [[3, 4]] * 2


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
        assert list(log) == [f'{{{core}}} 1\n', '6,7\n']


# runs that finish, fail or are stopped


def test_a_failed_run_is_named_and_the_rest_goes_on(tmp_path, monkeypatch, capsys):
    stand_in(monkeypatch, 'if "8comm" in name: print("error: no luck"); sys.exit(3)\nnote("finished")')
    runs = planned(tmp_path, '--seed=1,2', files=(EIGHT, TWELVE))
    going = swept(runs, jobs=2)
    assert names(going.failed) == ['8comm-cpu-seed1', '8comm-cpu-seed2'] and len(going.finished) == 4
    log = tmp_path / 'gpt2-8comm-cpu-seed1' / 'log.txt'
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


def test_a_run_that_diverged_is_a_result_and_not_trained_again(tmp_path, monkeypatch, capsys):
    stand_in(monkeypatch, 'note("diverged" if "12comm" in name else "finished", iter=7)\n'
                          'sys.exit("12comm" in name)')
    assert not swept(planned(tmp_path)).failed
    assert 'diverged: gpt2-12comm-cpu' in capsys.readouterr().out
    stand_in(monkeypatch, 'sys.exit(3)')
    assert len(swept(planned(tmp_path)).finished) == 2


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
    path = tmp_path / 'gpt2-12comm-cpu' / 'run.json'
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
    assert 'stopped from outside at step 7, continues after the others: gpt2-12comm-cpu' \
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
    assert capsys.readouterr().out.count('left to the process that trains it now: gpt2-cpu') == 1


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


# why a run failed


@pytest.mark.parametrize('lines, found', [
    (['error: of an earlier start', '$ train', 'step 1/9 | train 3.1'], ''),
    (['error: of an earlier start', 'half a li', '', '$ train', 'error: the last', 'step 2/9'], 'the last'),
    (['error: first', 'error: second', 'KeyError: 3'], 'second'),
    (['Traceback (most recent call last):', '  File "a.py"', "KeyError: 'x'"], "KeyError: 'x'"),
    (['[rank1]: torch.OutOfMemoryError: none left', '======'], 'torch.OutOfMemoryError: none left'),
    (['warning: no checkpoint at step 4: No space left on device; the last one is intact', 'step 5/9'],
     'no checkpoint at step 4: No space left on device'),
    (['warning: no checkpoint at step 4: No space left on device; the last one is intact', 'error: other'],
     'other'),
    ([], ''),
])
def test_the_reason_of_a_failure_is_found_in_the_log(tmp_path, lines, found):
    log = tmp_path / 'log.txt'
    log.write_text('\n'.join(['$ train', *lines, '']))
    assert sweep.reason(log) == found


@pytest.mark.parametrize('what, found', [
    ('refused', 'device is cuda:0, which this machine or this torch does not have; try config/cpu.py, or'),
    ('raised', 'RuntimeError: the matrix is singular'),  # in one process; the other lost touch with it
    ('killed', 'SIGKILL killed a process'),
])
def test_torchruns_own_words_are_no_reason(what, found):
    log = sweep.ROOT / f'tests/data/torchrun_{what}.log'  # written by torchrun, of two processes
    assert sweep.reason(log).startswith(found)


def test_a_failed_run_says_what_ended_it(tmp_path, monkeypatch, capsys):
    runs = planned(tmp_path, files=(TWELVE, EIGHT))
    stand_in(monkeypatch, 'if "12comm" in name: os.kill(os.getpid(), signal.SIGKILL)\n'
                          'if "8comm" in name: print("warning: no checkpoint at step 7: No space left on '
                          'device; the last one is intact"); note("resumable", iter=7)\n'
                          'print("step 7/400 | train 3.1", flush=True)\nsys.exit(75)')
    swept(runs)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith('FAILED')]
    dense, twelve, eight = (run.out_dir / 'log.txt' for run in runs)
    assert [line.partition(', ')[2] for line in lines] == [
        f'exit status 75, see {dense}', f'killed by SIGKILL, see {twelve}',
        f'exit status 75, see {eight}: no checkpoint at step 7: No space left on device']

    # a log on a full disk does not tell
    monkeypatch.setattr(sweep.shutil, 'disk_usage', lambda path: SimpleNamespace(free=4096))
    swept(runs[:1])
    assert f'exit status 75, see {dense}: its disk is full' in capsys.readouterr().out


# what is only said


@pytest.mark.parametrize('log, why', [('folder', 'Is a directory'), ('full', 'No space left on device')])
def test_a_log_that_cannot_be_written_keeps_no_run_from_starting(tmp_path, monkeypatch, capsys, log, why):
    dense, twelve = runs = planned(tmp_path)
    dense.out_dir.mkdir()
    if log == 'full':
        (dense.out_dir / 'log.txt').symlink_to('/dev/full')
    else:
        (dense.out_dir / 'log.txt').mkdir()
    stand_in(monkeypatch, 'print("error: no luck")\nnote("finished") if "12comm" in name else sys.exit(3)')
    going = swept(runs)
    assert (going.finished, going.failed) == ([twelve], [dense])
    out = capsys.readouterr().out
    warning = f'warning: the output of {dense.name} is not kept: {dense.out_dir / "log.txt"}: {why}'
    assert out.splitlines()[0] == warning
    assert f'FAILED: {dense.name}, exit status 3, its output was not kept\n' in out


ARGV = [TWELVE, '--with', CPU]


def finished(out):
    return [json.loads(path.read_text())['state'] for path in out.glob('*/run.json')] == ['finished'] * 2


@pytest.mark.parametrize('shell', ['>/dev/full 2>&1', '>&- 2>&-', '| head -1', '>&- <&-'])
def test_a_sweep_outlives_its_outputs(tmp_path, shell):
    sweep_it = start(tmp_path, [*ARGV, f'--out={tmp_path / "out"}'], shell=shell, stderr=subprocess.PIPE,
                     text=True)
    errors = sweep_it.communicate()[1]
    assert sweep_it.returncode == 0 and errors == '' and finished(tmp_path / 'out')


def until(path):
    return f'while not os.path.exists({str(path)!r}): time.sleep(0.02)\n'


def test_a_sweep_outlives_its_terminal(tmp_path):
    terminal, inside = os.openpty()
    script = until(tmp_path / 'go') + 'note("finished")'
    sweep_it = start(tmp_path, [*ARGV, f'--out={tmp_path / "out"}'], script, stdout=inside, stderr=inside)
    os.close(inside)
    shown = b''
    while b'starts: ' not in shown:
        shown += os.read(terminal, 4096)
    os.close(terminal)  # from here on, writing to it fails with EIO
    (tmp_path / 'go').touch()
    assert sweep_it.wait() == 0 and finished(tmp_path / 'out')


SAVES = ('def save(*_):\n    (out_dir / "ckpt.pt").touch()\n    note("resumable")\n    sys.exit(75)\n'
         'signal.signal(signal.SIGTERM, save)\n(out_dir / "ready").touch()\n')


@pytest.mark.parametrize('ignored', [False, True])
def test_a_closed_terminal_stops_a_sweep_unless_nohup_has_it_ignored(tmp_path, ignored):
    out = tmp_path / 'out'
    script = SAVES + until(tmp_path / 'go') + 'note("finished")'
    sweep_it = start(tmp_path, [*ARGV, f'--out={out}'], script, ignore=ignored and signal.SIGHUP,
                     stdout=subprocess.PIPE, text=True)
    while not list(out.glob('*/ready')):
        time.sleep(0.02)
    sweep_it.send_signal(signal.SIGHUP)
    if ignored:
        (tmp_path / 'go').touch()
        said = sweep_it.communicate()[0]
        assert sweep_it.returncode == 0 and finished(out) and 'stopping' not in said
        return
    said = sweep_it.communicate()[0]
    assert sweep_it.returncode == 130
    assert said.endswith('stopping: 1 runs save their state\n'
                         'stopped with 0 of 2 runs finished; the same command continues\n')
    assert [path.parent.name for path in out.glob('*/ckpt.pt')] == [planned(out)[0].name]


def test_an_early_ctrl_c_gets_one_line(tmp_path):
    os.mkfifo(tmp_path / 'slow.py')  # a config that takes its time
    sweep_it = start(tmp_path, [*ARGV, '--with', str(tmp_path / 'slow.py'), f'--out={tmp_path / "out"}'],
                     stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    config = os.open(tmp_path / 'slow.py', os.O_WRONLY)  # returns once the sweep reads it
    sweep_it.send_signal(signal.SIGINT)
    assert sweep_it.communicate() == ('', 'stopped\n') and sweep_it.returncode == 130
    os.close(config)


def test_torchrun_passes_on_every_signal_that_a_run_saves_at(tmp_path):
    words = sweep.command(planned(tmp_path)[0], False, sweep.Share(['0', '1'], []))
    passed = next(word for word in words if word.startswith('--signals-to-handle='))
    assert set(passed.partition('=')[2].split(',')) == {number.name for number in sweep.STOP_SIGNALS}


def test_a_sweep_of_one_step(tmp_path, monkeypatch, capsys):
    runs = planned(tmp_path, '--max_iters=1', '--eval_interval=1')
    stand_in(monkeypatch, 'note("", iter=0, val_loss=5.6, val_tokens=9)\n'
                          'note("", iter=1, train_loss=5.6, tokens_per_sec=9.0)\n'
                          'note("finished", iter=1, val_loss=5.5, val_tokens=9)')
    going = swept(runs)
    assert names(going.finished) == ['cpu', '12comm-cpu'] and 'val loss 5.5000' in capsys.readouterr().out


# the same runs as a Slurm array


PREEMPTED = 'os.kill(os.getppid(), signal.SIGTERM)\ntime.sleep(60)'  # as Slurm signals the script


@pytest.mark.parametrize('before, script, status, requeued', [
    ('resumable', 'note("finished")', 0, False),
    ('resumable', 'note("resumable", iter=3, val_loss=3.0)\nsys.exit(1)', 0, True),  # 75 is 1 under torchrun
    ('resumable', 'note("running", iter=3, val_loss=3.0)\nos.kill(os.getpid(), 9)', 0, True),
    ('resumable', 'note("failed", iter=3, val_loss=3.0)\nsys.exit(1)', 1, False),
    ('resumable', 'sys.exit(1)', 1, False),  # refused: it would be so again, though the run is resumable
    (None, PREEMPTED, 0, True), ('failed', PREEMPTED, 0, True), ('finished', PREEMPTED, 1, False),
    ('resumable', f'note("failed", iter=3, val_loss=3.0)\n{PREEMPTED}', 1, False),
])
def test_a_slurm_task_is_requeued_if_its_run_can_go_on(tmp_path, before, script, status, requeued):
    (tmp_path / 'config').symlink_to(sweep.ROOT / 'config')
    run = planned(tmp_path / 'out', '--seed=3,4', files=(EIGHT,), withs=())[-1]  # as the sweep names it
    if before:
        write_info(run, before, 2)
    interpreter, scontrol = tmp_path / 'interpreter', tmp_path / 'scontrol'
    interpreter.write_text(f'#!{sys.executable}\nimport os, sys\nif sys.argv[1] == "-c":\n'
                           f'    os.execv({sys.executable!r}, [sys.executable, *sys.argv[1:]])\n'
                           f'{NOTE}{FROM_ARGV}{script}\n')
    scontrol.write_text('#!/bin/sh\necho "$@" > requeued\n')
    for program in interpreter, scontrol:
        program.chmod(0o755)
    slurm = dict(SLURM_ARRAY_JOB_ID='7', SLURM_ARRAY_TASK_ID='5', SEED='4', GPUS='0', PYTHON=str(interpreter))
    done = subprocess.run(
        ['bash', str(sweep.ROOT / 'train.sbatch')], cwd=tmp_path, capture_output=True, text=True, timeout=60,
        env=os.environ | slurm | dict(PYTHONPATH=str(sweep.ROOT), PATH=f'{tmp_path}:{os.environ["PATH"]}'))
    assert done.returncode == status, done.stderr
    assert (tmp_path / 'requeued').exists() == requeued
    assert not requeued or (tmp_path / 'requeued').read_text() == 'requeue 7_5\n'
