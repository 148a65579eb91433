"""
What surrounds a run: outputs that fail, signals, file systems, other programs' settings, a second node.

    python -m pytest tests/test_surroundings.py
"""

import errno
import fcntl
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import train
from configurator import ROOT, load
from toy_runs import DROPOUT, TINY, assert_same_run, column, info, metrics, refused, run, start, stop_at
from training import checkpoint, rundir
from training.distributed import attention_kernel, find_world

pytestmark = pytest.mark.usefixtures('corpus')
SHORT = [*TINY, '--max_iters=6', '--eval_interval=3', '--lr_decay_iters=6']


# outputs and signals


@pytest.mark.parametrize('output', ['> /dev/full', '| head -1', '<&- >&- 2>&-'])
def test_an_output_that_fails_ends_nothing(tmp_path, output):
    command = shlex.join([sys.executable, str(ROOT / 'train.py'), *SHORT, f'--out_dir={tmp_path}'])
    done = subprocess.run(['bash', '-c', f'{command} {output}; echo ${{PIPESTATUS[0]}} >{tmp_path}/status'],
                          capture_output=True, text=True, timeout=120)
    assert (tmp_path / 'status').read_text() == '0\n' and 'Traceback' not in done.stderr
    assert info(tmp_path)['state'] == 'finished' and metrics(tmp_path)[-1]['iter'] == 6


def test_a_terminal_that_closes_has_the_run_saved_unless_nohup_shields_it(undisturbed, tmp_path, monkeypatch):
    stop_at(monkeypatch, 19, lambda: os.kill(os.getpid(), signal.SIGHUP))
    assert run(tmp_path / 'hung', *DROPOUT) == train.RESUMABLE
    assert checkpoint.load(tmp_path / 'hung/ckpt.pt')['iter'] == 20
    handler = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert run(tmp_path / 'shielded', *DROPOUT) == 0
    finally:
        signal.signal(signal.SIGHUP, handler)
    assert_same_run(tmp_path / 'shielded', undisturbed)


@pytest.mark.parametrize('script', ['train.py', 'sample.py'])
def test_ctrl_c_while_torch_is_loaded_gives_one_line(tmp_path, script):
    loading = str(tmp_path / 'loading')
    (tmp_path / 'torch.py').write_text(f'import time\nopen({loading!r}, "w")\ntime.sleep(60)')
    flags = TINY if script == 'train.py' else [f'--out_dir={tmp_path}']
    process = subprocess.Popen(
        [sys.executable, str(ROOT / script), *flags], env=os.environ | dict(PYTHONPATH=str(tmp_path)),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
    deadline = time.monotonic() + 60
    while not (tmp_path / 'loading').exists():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60) == ('', 'stopped\n') and process.returncode == 130


# what is in the folder


def test_only_checkpoints_that_the_run_named_are_removed(tmp_path):
    mine = [tmp_path / name for name in ('ckpt-00000005-mine.pt', 'ckpt-5.pt', 'ckpt-00000005.pt.bak')]
    for path in mine:
        path.write_bytes(b'a copy')
    state = dict.fromkeys(checkpoint.KEYS, {})
    for step in 10, 20, 30:
        checkpoint.save(tmp_path, state | dict(iter=step), False, 1)
    assert {path.name for path in tmp_path.glob('ckpt-0*')} == {
        'ckpt-00000020.pt', 'ckpt-00000030.pt', 'ckpt-00000005-mine.pt', 'ckpt-00000005.pt.bak'}
    assert all(path.read_bytes() == b'a copy' for path in mine)


@pytest.mark.parametrize('number', [errno.ENOSYS, errno.ENOLCK])
def test_a_file_system_without_locks_is_warned_of(tmp_path, monkeypatch, capsys, number):
    def flock(file, operation):
        raise OSError(number, os.strerror(number))
    monkeypatch.setattr(fcntl, 'flock', flock)
    assert run(tmp_path, *SHORT) == 0
    assert not rundir.is_locked(tmp_path)
    line, = capsys.readouterr().err.splitlines()
    assert line.startswith('warning: ') and os.strerror(number) in line


def test_a_dangling_link_is_called_one(tmp_path):
    (tmp_path / 'out').symlink_to(tmp_path / 'nowhere')
    assert f'a link to {tmp_path / "nowhere"}, which does not exist' in refused(tmp_path / 'out', *TINY)


def test_an_evaluation_is_not_refused_over_steps_that_it_does_not_make(undisturbed, capsys):
    flags = [*DROPOUT, '--init_from=resume', '--eval_only=True', '--max_iters=5']
    assert run(undisturbed, *flags) == 0
    assert f'val loss {column(undisturbed, "val_loss")[40]:.6f}' in capsys.readouterr().out


# the environment


@pytest.mark.parametrize('variables, words', [
    (dict(RANK='0'), ['RANK=0', 'WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT', 'torchrun']),
    (dict(WORLD_SIZE='2', LOCAL_RANK='0'), ['WORLD_SIZE=2 LOCAL_RANK=0', 'RANK, MASTER_ADDR, MASTER_PORT']),
    (dict(RANK='2', WORLD_SIZE='2', LOCAL_RANK='0', MASTER_ADDR='localhost', MASTER_PORT='1'),
     ['RANK=2 WORLD_SIZE=2', 'below WORLD_SIZE']),
    (dict(RANK='zero', WORLD_SIZE='2', LOCAL_RANK='0', MASTER_ADDR='localhost', MASTER_PORT='1'),
     ['RANK=zero']),
])
def test_a_launchers_variables_set_in_part_are_refused(monkeypatch, variables, words):
    monkeypatch.setattr(time, 'sleep', lambda seconds: None)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as stopped:
        find_world(load(TINY))
    assert all(word in stopped.value.code for word in words) and '\n' not in stopped.value.code


@pytest.mark.parametrize('variables, flags, words', [
    (dict(GLOO_SOCKET_IFNAME='nope0'), [], ['GLOO_SOCKET_IFNAME is nope0', 'only lo']),
    ({}, ['--backend=nccl'], ['backend is nccl', 'device is cpu', '--backend=nccl']),
])
def test_a_network_that_is_not_there_is_named_with_its_setting(tmp_path, variables, flags, words):
    process = start(tmp_path, *TINY, *flags, RANK='0', WORLD_SIZE='2', LOCAL_RANK='0',
                    MASTER_ADDR='localhost', MASTER_PORT='29999', **variables)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1 and out == ''
    line, = err.splitlines()
    assert all(word in line for word in words)


def test_attention_on_a_device_without_fused_kernels_is_called_math():
    assert attention_kernel(load(['config/cpu.py', '--device=mps']), torch.device('mps')) == 'math'


def test_text_is_utf8_whatever_the_locale(tmp_path):
    config = tmp_path / 'accent.py'
    config.write_text("# café\nwandb_run_name = 'café'\n", encoding='utf-8')
    ascii = dict(LC_ALL='C', PYTHONUTF8='0', PYTHONCOERCECLOCALE='0')
    process = start(tmp_path / 'out', *SHORT, str(config), **ascii)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert info(tmp_path / 'out')['name'] == 'café' and 'caf' in out


# a compiler that errs


@pytest.mark.parametrize('faulty', [
    lambda model: lambda *args: (None, 0 * model(*args)[1] + 5.7),  # gradients of 0, without a word
    lambda model: lambda *args: (None, 2 * model(*args)[1])])
def test_a_compiled_model_that_computes_something_else_is_not_used(
        undisturbed, tmp_path, monkeypatch, capsys, faulty):
    monkeypatch.setattr(torch, 'compile', faulty)
    assert run(tmp_path, *DROPOUT, '--compile=True') == 0
    line, = (line for line in capsys.readouterr().out.splitlines() if 'compile failed' in line)
    assert 'loss and gradient norm are' in line
    assert_same_run(tmp_path, undisturbed)


# two nodes


def start_nodes(folders, *flags, own=((), ())):
    """A process in each folder, as on two nodes without a shared disk. own: the flags of each alone."""
    with socket.socket() as free:
        free.bind(('localhost', 0))
        port = str(free.getsockname()[1])
    processes = []
    for i, folder in enumerate(folders):
        launcher = dict(RANK=str(i), LOCAL_RANK='0', WORLD_SIZE='2', MASTER_ADDR='localhost',
                        MASTER_PORT=port)
        processes.append(subprocess.Popen(
            [sys.executable, str(ROOT / 'train.py'), *flags, *own[i], '--out_dir=run'], cwd=folder, text=True,
            env=os.environ | dict(OMP_NUM_THREADS='1') | launcher, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE))
    return [(process.communicate(timeout=120), process.returncode) for process in processes]


def test_two_nodes_without_a_shared_disk_resume_from_the_firsts_checkpoint(tmp_path):
    folders = [tmp_path / name for name in ('undisturbed', 'first', 'second')]
    for folder in folders:
        folder.mkdir()
    assert run(folders[0] / 'run', *DROPOUT, '--max_iters=12', '--dropout=0') == 0
    flags = [*DROPOUT, '--dropout=0', '--lr_decay_iters=12']
    for more in ['--max_iters=6'], ['--max_iters=12', '--init_from=resume']:
        ended = start_nodes(folders[1:], *flags, *more)
        assert [status for _, status in ended] == [0, 0], ended
    assert not (folders[2] / 'run').exists() and Path(folders[1] / 'run/ckpt.pt').exists()
    losses = column(folders[1] / 'run', 'train_loss')
    assert list(losses) == list(range(1, 13))
    assert losses == pytest.approx(column(folders[0] / 'run', 'train_loss'), rel=1e-5)


def test_a_fine_tune_resumes_on_a_second_node_that_has_its_run_json(dense, tmp_path):
    folders = [tmp_path / 'first', tmp_path / 'second']
    for folder in folders:
        (folder / 'run').mkdir(parents=True)
    flags = [*TINY[:2], '--block_types=spd', '--batch_size=4', '--eval_tokens=64', '--lr_decay_iters=2']
    assert run(folders[0] / 'run', *flags, f'--init_from={dense}', '--max_iters=1') == 0
    resume = [*flags, '--init_from=resume', '--max_iters=2']
    ended = start_nodes(folders, *resume)
    assert [status for _, status in ended] == [1, 1] and 'each node needs its run.json' in ended[0][0][1]
    shutil.copy(folders[0] / 'run/run.json', folders[1] / 'run')
    ended = start_nodes(folders, *resume)
    assert [status for _, status in ended] == [0, 0], ended
    assert info(folders[0] / 'run')['iter'] == 2 and info(folders[0] / 'run')['config']['n_embd'] == 32


def test_processes_that_would_train_different_runs_are_refused(tmp_path):
    folders = [tmp_path / 'first', tmp_path / 'second']
    for folder in folders:
        folder.mkdir()
    ended = start_nodes(folders, *SHORT, own=([], ['--learning_rate=0.001']))
    assert [status for _, status in ended] == [1, 1]
    (out, err), _ = ended[0]
    line, = (line for line in err.splitlines() if line.startswith('error: '))
    assert 'learning_rate is 0.002 for process 0, but 0.001 for process 1' in line
    assert not any((folder / 'run').exists() for folder in folders)
