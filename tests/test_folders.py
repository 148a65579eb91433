"""
Whose folder it is: no run is overwritten, and a finished one gives its result.

    python -m pytest tests/test_folders.py
"""

import math
import shutil

import pytest

import train
from toy_runs import (
    DROPOUT,
    TINY,
    assert_same_run,
    column,
    contents,
    info,
    metrics,
    refused,
    run,
    stop_at,
    terminate,
)
from training import rundir

pytestmark = pytest.mark.usefixtures('corpus')


def test_a_finished_folder_gives_its_result_and_stays_as_it_is(undisturbed, capsys):
    before = contents(undisturbed)
    for flags in [], ['--init_from=resume'], ['--log_interval=2', '--wandb_log=True']:
        assert run(undisturbed, *DROPOUT, *flags) == 0
        out = capsys.readouterr().out
        assert len(out.splitlines()) == 1 and 'finished' in out
        assert f'{info(undisturbed)["val_loss"]:.4f}' in out
    message = refused(undisturbed, *DROPOUT, '--seed=2', '--max_iters=50')
    assert all(word in message for word in (str(undisturbed), 'seed', '1337', '2', 'max_iters', '40', '50'))
    message = refused(undisturbed, *DROPOUT, '--learning_rate=1e-3', '--init_from=resume')
    assert 'learning_rate is 0.002 there, 0.001 here' in message
    assert contents(undisturbed) == before


def test_a_finished_run_without_a_finite_loss_gives_its_result(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, 'evaluate', lambda *args: (math.nan, 1000))
    for _ in range(2):
        assert run(tmp_path, *TINY, '--max_iters=1') == 0
    assert info(tmp_path)['val_loss'] is None
    assert 'is finished: val loss nan, step 1' in capsys.readouterr().out.splitlines()[-1]


def test_the_guides_options_share_a_folder_and_never_destroy_each_other(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    out_dir = tmp_path / 'out/gpt2-12comm-cpu'

    def option(*flags):
        capsys.readouterr()
        return run(None, *TINY, *flags)

    long, short = '--max_iters=30', '--max_iters=20'
    with monkeypatch.context() as patch:
        stop_at(patch, 12, terminate)
        assert option(long) == 75  # A, stopped on its way
    before = contents(out_dir)
    assert 'max_iters is 30 there, 20 here' in option(short) and contents(out_dir) == before  # then B
    assert option(long, '--init_from=resume') == 0
    before = contents(out_dir)
    assert 'max_iters is 30 there, 20 here' in option(short) and contents(out_dir) == before
    assert 'max_iters is 30 there, 20 here' in option(short, '--init_from=resume')
    assert contents(out_dir) == before
    shutil.rmtree(out_dir)
    assert option(short) == 0  # B, then C, which is B again, then A
    before = contents(out_dir)
    assert option(short) == 0 and 'is finished' in capsys.readouterr().out
    assert 'max_iters is 20 there, 30 here' in option(long) and contents(out_dir) == before


def test_a_finished_run_can_be_made_longer(undisturbed, tmp_path, capsys):
    out_dir = shutil.copytree(undisturbed, tmp_path / 'copy')
    assert run(out_dir, *DROPOUT, '--max_iters=45', '--init_from=resume') == 0
    assert 'max_iters was 40 up to step 40, it is 45' in capsys.readouterr().out
    assert metrics(out_dir)[:len(metrics(undisturbed))] == metrics(undisturbed)
    assert list(column(out_dir, 'val_loss')) == [0, 10, 20, 30, 40, 45] and info(out_dir)['iter'] == 45
    assert 'max_iters' in refused(out_dir, *DROPOUT, '--max_iters=30', '--init_from=resume')


def test_an_unfinished_folder_is_not_written_without_resume(crashed):
    before = contents(crashed)
    assert '--init_from=resume' in refused(crashed, *DROPOUT)
    message = refused(crashed, *DROPOUT, '--n_layer=8')
    assert 'n_layer' in message and 'block_types' in message
    assert contents(crashed) == before


def test_without_a_checkpoint_a_run_starts_again_in_place_of_its_lines(undisturbed, copy_of_crashed):
    for path in copy_of_crashed.glob('*.pt'):
        path.unlink()
    assert 'no checkpoint' in refused(copy_of_crashed, *DROPOUT, '--init_from=resume')
    assert run(copy_of_crashed, *DROPOUT) == 0
    assert_same_run(copy_of_crashed, undisturbed)


def test_a_folder_in_use_is_refused(copy_of_crashed):
    before = contents(copy_of_crashed)
    rundir.lock(copy_of_crashed)
    try:
        assert 'another run' in refused(copy_of_crashed, *DROPOUT, '--init_from=resume')
    finally:
        rundir.locks.pop().close()
    assert contents(copy_of_crashed) == before
