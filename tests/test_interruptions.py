"""
Interrupted runs: stopped by a signal, killed, or continued elsewhere, they end as if nothing had happened.

    python -m pytest tests/test_interruptions.py
"""

import os
import signal
import subprocess
import sys

import pytest

import train
from configurator import ROOT
from toy_runs import (
    DROPOUT,
    TINY,
    Crash,
    assert_same_run,
    column,
    crash,
    info,
    metrics,
    run,
    start_two,
    stop_at,
    terminate,
    wait_for_step,
)
from training import checkpoint

pytestmark = pytest.mark.usefixtures('corpus')


@pytest.mark.parametrize('number, step', [(signal.SIGTERM, 0), (signal.SIGINT, 19), (signal.SIGUSR1, 39)])
def test_a_signal_saves_and_leaves_after_the_step_it_meets(undisturbed, tmp_path, monkeypatch, number, step):
    stop_at(monkeypatch, step, lambda: os.kill(os.getpid(), number))
    assert run(tmp_path, *DROPOUT) == train.RESUMABLE == 75
    assert info(tmp_path)['state'] == 'resumable' and info(tmp_path)['iter'] == step + 1
    assert checkpoint.load(tmp_path / 'ckpt.pt')['iter'] == metrics(tmp_path)[-1]['iter'] == step + 1
    assert run(tmp_path, *DROPOUT, '--init_from=resume') == 0
    assert_same_run(tmp_path, undisturbed)


def test_a_stop_before_the_first_new_line_keeps_the_metrics_whole(undisturbed, copy_of_crashed, monkeypatch):
    stop_at(monkeypatch, 20, terminate)
    sparse = [*DROPOUT, '--log_interval=10', '--init_from=resume']
    assert run(copy_of_crashed, *sparse) == 75
    assert metrics(copy_of_crashed)[-1]['iter'] == 20
    monkeypatch.undo()
    assert run(copy_of_crashed, *sparse) == 0
    assert metrics(copy_of_crashed) == [
        line for line in metrics(undisturbed) if line['iter'] <= 20 or line['iter'] % 10 == 0]


def test_the_loss_scale_is_resumed_too(tmp_path, monkeypatch):
    flags = [*DROPOUT, '--dtype=float16', '--max_iters=12', '--eval_interval=5']
    assert run(tmp_path / 'a', *flags) == 0
    stop_at(monkeypatch, 7, crash)
    with pytest.raises(Crash):
        run(tmp_path / 'b', *flags)
    monkeypatch.undo()
    assert run(tmp_path / 'b', *flags, '--init_from=resume') == 0
    assert_same_run(tmp_path / 'a', tmp_path / 'b')
    assert checkpoint.load(tmp_path / 'b/ckpt.pt')['scaler']['_growth_tracker'] == 12


def test_a_run_goes_on_with_the_same_batches_on_another_number_of_processes(tmp_path, monkeypatch):
    # 12 windows a step: two processes take 6 each, in two micro-batches of 3
    flags = [*TINY, '--gradient_accumulation_steps=3', '--lr_decay_iters=40', '--log_interval=3']
    one, mixed = tmp_path / 'one', tmp_path / 'mixed'
    stop_at(monkeypatch, 6, terminate)
    assert run(mixed, *flags) == 75 and info(mixed)['processes'] == 1
    monkeypatch.undo()
    processes = start_two(mixed, *flags, '--max_iters=100000', '--init_from=resume')
    wait_for_step(processes[0], mixed, 12)
    processes[1].terminate()  # one that is asked to stop stops all, after the same step
    output = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [75, 75], output
    assert info(mixed)['state'] == 'resumable' and info(mixed)['processes'] == 2
    assert info(mixed)['iter'] >= 12
    end = f'--max_iters={info(mixed)["iter"] + 6}'
    assert run(mixed, *flags, end, '--init_from=resume') == run(one, *flags, end) == 0
    for key in ('train_loss', 'grad_norm', 'val_loss', 'val_tokens'):
        assert column(mixed, key) == pytest.approx(column(one, key), rel=1e-4)


def test_random_interruptions_change_nothing():
    # the script makes as many of them as wanted; here a few
    command = [sys.executable, str(ROOT / 'tests/crash.py'), 'kill', 'term', '--times=4', '--seed=3']
    done = subprocess.run(command, env=os.environ | dict(OMP_NUM_THREADS='1'), capture_output=True, text=True,
                          timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count('| 4 |') == 2
