"""
Damaged, foreign and changed files in a run's folder.

    python -m pytest tests/test_damage.py
"""

import copy
import os

import pytest
import torch

import train
from toy_runs import DROPOUT, TINY, assert_same_run, column, info, metrics, refused, run
from training import checkpoint
from training.rundir import LATEST


def cut(data):
    return data[:len(data) // 2]


def flip(data):
    return data[:len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1:]


@pytest.mark.parametrize('damage', [cut, flip, lambda data: b'', lambda data: b'{}'])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
        undisturbed, copy_of_crashed, damage, capsys):
    latest = copy_of_crashed / 'ckpt.pt'
    latest.write_bytes(damage(latest.read_bytes()))
    assert run(copy_of_crashed, *DROPOUT, '--init_from=resume') == 0
    out = capsys.readouterr().out
    assert f'{latest} is damaged' in out and 'ckpt-previous.pt at step 10' in out
    assert_same_run(copy_of_crashed, undisturbed)


def test_a_checkpoint_lost_between_two_renames_is_made_up_for(undisturbed, copy_of_crashed):
    (copy_of_crashed / 'ckpt.pt').unlink()
    assert run(copy_of_crashed, *DROPOUT, '--init_from=resume') == 0
    assert_same_run(copy_of_crashed, undisturbed)


@pytest.mark.parametrize('foreign', [
    'tensor', 'list', 'other keys', 'no moments', 'other shapes', 'other progress'])
def test_a_foreign_checkpoint_gets_one_line(copy_of_crashed, foreign):
    saved = checkpoint.load(copy_of_crashed / 'ckpt.pt')
    shapes = dict(saved['model'], **{'transformer.wte.weight': torch.zeros(3, 3)})
    thing = {
        'tensor': torch.zeros(3), 'list': [1],
        'other keys': {'model': saved['model']}, 'no moments': dict(saved, optimizer={}),
        'other shapes': dict(saved, model=shapes),
        'other progress': dict(saved, progress=dict(saved['progress'], place=1)),
    }[foreign]
    for name in LATEST:
        torch.save(thing, copy_of_crashed / name)
    assert str(copy_of_crashed) in refused(copy_of_crashed, *DROPOUT, '--init_from=resume')


@pytest.mark.parametrize('text', [
    '', '[]', '{}', '{"state": "finished"}', '{"config": 1}', '[' * 10**5, '\0'])
def test_a_damaged_run_json_gets_one_line(copy_of_crashed, text):
    (copy_of_crashed / 'run.json').write_text(text)
    assert str(copy_of_crashed / 'run.json') in refused(copy_of_crashed, *DROPOUT, '--init_from=resume')


@pytest.mark.parametrize('size', [0, 1000])
def test_metrics_that_were_cut_stay_whole_lines(undisturbed, copy_of_crashed, size, capsys):
    os.truncate(copy_of_crashed / 'metrics.jsonl', size)
    assert run(copy_of_crashed, *DROPOUT, '--init_from=resume') == 0
    assert 'metrics.jsonl is not as' in capsys.readouterr().out
    after = [line for line in metrics(undisturbed) if line['iter'] > 20]
    assert metrics(copy_of_crashed)[-len(after):] == after


@pytest.mark.parametrize('flag, there, here', [
    ('n_embd', 32, 64), ('n_head', 8, 4), ('block_size', 32, 16), ('bias', False, True), ('n_layer', 4, 8)])
def test_a_checkpoint_of_another_network_is_refused(copy_of_crashed, flag, there, here):
    message = refused(copy_of_crashed, *DROPOUT, f'--{flag}={here}', '--init_from=resume')
    assert all(word in message for word in (flag, str(there), str(here), 'ckpt.pt'))


def test_a_run_goes_on_under_another_recipe_with_a_warning(copy_of_crashed, capsys):
    flags = ['--block_types=tp', '--tp_size=4', '--learning_rate=1e-3', '--max_iters=22']
    assert run(copy_of_crashed, *DROPOUT, *flags, '--init_from=resume') == 0
    out = capsys.readouterr().out
    assert 'learning_rate was 0.002 up to step 20, it is 0.001 from here on' in out
    assert 'tp_size was 2' in out and 'block_types was' in out and 'resuming' in out
    found = info(copy_of_crashed)
    assert found['config']['tp_size'] == 4 and found['communications'] == 8 and found['iter'] == 22
    assert metrics(copy_of_crashed)[-1]['val_loss'] < column(copy_of_crashed, 'val_loss')[0]


@pytest.mark.parametrize('flags', [['--max_iters=1'], ['--eval_train_tokens=64']])
def test_a_damaged_token_of_train_gets_one_line(corpus, tmp_path, monkeypatch, flags):
    damaged = corpus._replace(train=copy.copy(corpus.train))
    damaged.train.vocab_size = 5
    monkeypatch.setattr(train, 'open_corpus', lambda name: damaged)
    assert 'outside the vocabulary of 5' in refused(tmp_path, *TINY, *flags)
