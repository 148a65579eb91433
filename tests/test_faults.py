"""
Faults while a run trains: a full disk, a compiler that fails, too little memory.

    python -m pytest tests/test_faults.py
"""

import contextlib
import os
import resource

import pytest
import torch

import train
from toy_runs import (
    DROPOUT,
    TINY,
    Crash,
    assert_same_run,
    crash,
    info,
    refused,
    run,
    stop_at,
    terminate,
)
from training import checkpoint

pytestmark = pytest.mark.usefixtures('corpus')


@contextlib.contextmanager
def full_disk(size):
    """
    No file of this process grows beyond `size` bytes: a write that would raises OSError, as on a full disk.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_checkpoint_that_cannot_be_written_is_warned_of(undisturbed, tmp_path, monkeypatch, capsys):
    real = checkpoint.save

    def save(out_dir, state, *args):
        with full_disk(300_000) if state['iter'] == 20 else contextlib.nullcontext():
            real(out_dir, state, *args)
    monkeypatch.setattr(checkpoint, 'save', save)
    stop_at(monkeypatch, 26, crash)
    with pytest.raises(Crash):
        run(tmp_path, *DROPOUT)
    out = capsys.readouterr().out
    assert 'warning: no checkpoint at step 20' in out
    assert checkpoint.load(tmp_path / 'ckpt.pt')['iter'] == 10
    monkeypatch.undo()
    assert run(tmp_path, *DROPOUT, '--init_from=resume') == 0
    assert_same_run(tmp_path, undisturbed)


@pytest.mark.parametrize('room', [1000, 10**9])
def test_a_checkpoint_that_cannot_be_made_smaller_is_warned_of(tmp_path, monkeypatch, capsys, room):
    real = checkpoint.drop_optimizer

    def drop_optimizer(out_dir, warn):
        (tmp_path / 'ckpt-previous.pt').unlink()  # its other hard link stays whole
        (tmp_path / 'ckpt-previous.pt').write_bytes(b'damaged')
        with full_disk(room):
            real(out_dir, warn)
    monkeypatch.setattr(checkpoint, 'drop_optimizer', drop_optimizer)
    assert run(tmp_path, *TINY, '--max_iters=3', '--eval_interval=1', '--keep_optimizer=False') == 0
    out = capsys.readouterr().out
    assert f'warning: {tmp_path}/ckpt-previous.pt is damaged' in out and info(tmp_path)['state'] == 'finished'
    for name in 'ckpt.pt', 'ckpt-best.pt':
        smaller = checkpoint.load(tmp_path / name)['optimizer']['state'] == {}
        assert smaller == (room > 1000) == (f"{name} keeps AdamW's state: File too large" not in out)


def test_a_run_outlives_a_disk_that_is_full_for_a_while(undisturbed, tmp_path, monkeypatch, capsys):
    disk = contextlib.ExitStack()
    stop_at(monkeypatch, 12, lambda: disk.enter_context(full_disk(100)))
    stop_at(monkeypatch, 25, disk.close)
    with disk:
        assert run(tmp_path, *DROPOUT) == 0
    assert 'warning' in capsys.readouterr().out
    assert_same_run(tmp_path, undisturbed)


def test_a_disk_without_hard_links_keeps_both_checkpoints(tmp_path, monkeypatch):
    def link(*args, **kw):
        raise OSError(1, 'Operation not permitted')
    monkeypatch.setattr(os, 'link', link)
    assert run(tmp_path, *TINY, '--max_iters=12') == 0
    assert {checkpoint.load(tmp_path / name)['iter'] for name in ('ckpt.pt', 'ckpt-best.pt')} == {12}


@pytest.mark.parametrize('state', ['finished', 'resumable'])
def test_a_run_json_that_cannot_be_written_is_warned_of(tmp_path, monkeypatch, capsys, state):
    real = checkpoint.write_json

    def write_json(path, value):
        if value['state'] == state:
            raise OSError(28, 'No space left on device')
        real(path, value)
    monkeypatch.setattr(checkpoint, 'write_json', write_json)
    if state == 'resumable':
        stop_at(monkeypatch, 2, terminate)
    assert run(tmp_path, *TINY, '--max_iters=3') == (75 if state == 'resumable' else 0)
    out = capsys.readouterr().out
    assert 'warning' in out and 'No space left on device' in out
    assert checkpoint.load(tmp_path / 'ckpt.pt')['iter'] == 3


@pytest.mark.parametrize('error', [AssertionError(), RuntimeError('\nno compiler\nat all')])
def test_training_is_eager_where_the_compiler_fails(undisturbed, tmp_path, monkeypatch, capsys, error):
    def compile(model):
        raise error
    monkeypatch.setattr(torch, 'compile', compile)
    assert run(tmp_path, *DROPOUT, '--compile=True') == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if 'torch.compile' in line]
    assert len(lines) == 1 and type(error).__name__ in lines[0] and 'eager' in lines[0]
    assert_same_run(tmp_path, undisturbed)


@pytest.mark.parametrize('batch_size, steps, words', [
    (12, 40, '--batch_size=8 --gradient_accumulation_steps=60'),
    (2, 3, '--batch_size=1 --gradient_accumulation_steps=6'),
    (3, 5, '--batch_size=1 --gradient_accumulation_steps=15'),
    (1, 4, '--block_size')])
def test_out_of_gpu_memory_gets_a_line_with_flags_that_keep_the_batch(
        tmp_path, monkeypatch, batch_size, steps, words):
    def out_of_memory(*args):
        raise torch.OutOfMemoryError('CUDA out of memory')
    monkeypatch.setattr(train, 'evaluate', out_of_memory)
    command = [*TINY, '--max_iters=1', f'--batch_size={batch_size}', f'--gradient_accumulation_steps={steps}']
    message = refused(tmp_path, *command)
    assert words in message and 'out of GPU memory' in message and info(tmp_path)['state'] == 'failed'
    if batch_size > 1:  # the same command with these flags trains, in the same folder
        monkeypatch.undo()
        assert run(tmp_path, *command, *words.split()) == 0 and info(tmp_path)['state'] == 'finished'


@pytest.mark.parametrize('name', ['metrics.jsonl', 'run.json', 'lock', 'ckpt.pt'])
def test_a_folder_in_place_of_a_file_gets_one_line(tmp_path, name):
    (tmp_path / name).mkdir()
    assert str(tmp_path) in refused(tmp_path, *TINY, *['--init_from=resume'] * (name == 'ckpt.pt'))


def test_a_machine_without_git_trains(tmp_path, monkeypatch):
    monkeypatch.setenv('PATH', str(tmp_path))
    assert run(tmp_path / 'out', *TINY, '--max_iters=1') == 0
    assert info(tmp_path / 'out')['git_commit'] is None
