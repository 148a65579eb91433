"""
What train.py writes: metrics, run.json and checkpoints, and when.

    python -m pytest tests/test_outputs.py
"""

import math
import sys
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import train
from configurator import read_defaults
from toy_runs import (
    DROPOUT,
    LAYERS,
    TINY,
    Crash,
    assert_same_run,
    column,
    contents,
    crash,
    info,
    metrics,
    run,
    stop_at,
)
from training import checkpoint

pytestmark = pytest.mark.usefixtures('corpus')


def test_metrics_and_run_json(undisturbed, corpus):
    assert list(column(undisturbed, 'val_loss')) == [0, 10, 20, 30, 40]
    assert list(column(undisturbed, 'train_loss')) == list(range(1, 41))
    losses = list(column(undisturbed, 'val_loss').values())
    assert abs(losses[0] - math.log(320)) < 0.3 and losses == sorted(losses, reverse=True)
    for line in metrics(undisturbed, but=()):
        if 'val_loss' in line:
            assert line.keys() == {'iter', 'val_loss', 'val_tokens'} and line['val_tokens'] == 1000
        else:
            assert line.keys() >= {'iter', 'train_loss', 'lr', 'grad_norm', 'tokens_per_sec', 'mfu'}
            assert line['mfu'] is None and line['tokens_per_sec'] > 0
    found, saved = info(undisturbed), checkpoint.load(undisturbed / 'ckpt.pt')
    config = SimpleNamespace(**found['config'])
    lr = column(undisturbed, 'lr')  # warmup over 5 updates, then the cosine, half of it at 22.5
    assert list(lr.values())[:6] == pytest.approx([2e-3 * n / 6 for n in range(1, 7)])
    assert lr[23] + lr[24] == pytest.approx(2 * 1.1e-3) and lr[40] == pytest.approx(2e-4, rel=0.03)
    assert found['config'].keys() == read_defaults().keys()
    assert (config.block_types, config.out_dir, config.lr_decay_iters) == (LAYERS, str(undisturbed), 40)
    assert found['name'] == config.wandb_run_name == 'gpt2-12comm-cpu'
    assert found['corpus'] == dict(
        name='pystdlib', corpus=corpus.meta['corpus'], tokenizer='byte', vocab_size=257,
        val_sha256=corpus.meta['splits']['val']['sha256'])
    assert found['communications'] == 6 and found['all_reduces'] == dict(
        forward=4, backward=4, blocking=4, hidden=0, bytes_per_token=8 * 4 * config.n_embd)  # float32
    assert found['parameters'] == sum(
        p.numel() for name, p in saved['model'].items() if name != 'lm_head.weight')
    assert (found['state'], found['iter'], found['val_loss']) == ('finished', 40, losses[-1])
    assert (found['tokens_per_step'], found['processes'], found['device']) == (128, 1, 'cpu')
    assert found['versions'] == dict(
        python=sys.version.split()[0], torch=torch.__version__, numpy=np.__version__)
    assert found['seconds'] > 0 and found['flops_per_token'] > 0 and found.keys() >= {'git_commit', 'argv'}


def test_a_checkpoint_is_dense_gpt2_after_exactly_max_iters_updates(undisturbed):
    saved = torch.load(undisturbed / 'ckpt.pt', weights_only=True)
    layers = [f'transformer.h.{i}.{name}.weight' for i in range(4)
              for name in ('ln_1', 'attn.c_attn', 'attn.c_proj', 'ln_2', 'mlp.c_fc', 'mlp.c_proj')]
    assert saved['model'].keys() == {'transformer.wte.weight', 'transformer.wpe.weight', *layers,
                                     'transformer.ln_f.weight', 'lm_head.weight'}
    assert saved['model']['transformer.h.1.attn.c_attn.weight'].shape == (96, 32)
    assert saved['model']['lm_head.weight'].data_ptr() == saved['model']['transformer.wte.weight'].data_ptr()
    assert all(tensor.device.type == 'cpu' for tensor in saved['model'].values())
    steps = {entry['step'].item() for entry in saved['optimizer']['state'].values()}
    assert steps == {40} and saved['iter'] == 40
    assert saved['config'] == info(undisturbed)['config'] and saved['corpus']['tokenizer'] == 'byte'


@pytest.mark.parametrize('always, before', [(True, 30), (False, 10)])
def test_the_latest_and_the_best_are_kept(tmp_path, monkeypatch, always, before):
    losses = iter([5.0, 2.0, math.nan, 4.0, 3.0])
    monkeypatch.setattr(train, 'evaluate', lambda *args: (next(losses), 1000))
    assert run(tmp_path, *TINY, f'--always_save_checkpoint={always}') == 0
    iters = [checkpoint.load(tmp_path / f'ckpt{name}.pt')['iter'] for name in ('', '-previous', '-best')]
    assert iters == [40, before, 10]
    assert list(column(tmp_path, 'val_loss').values()) == [5.0, 2.0, None, 4.0, 3.0]


@pytest.mark.parametrize('keep', [1, 9])
def test_checkpoints_have_an_interval_of_their_own(tmp_path, monkeypatch, keep):
    losses = iter([5.0, 2.0, 4.0, 3.0, 2.5])
    monkeypatch.setattr(train, 'evaluate', lambda *args: (next(losses), 1000))
    assert run(tmp_path, *TINY, '--checkpoint_interval=15', f'--keep_checkpoints={keep}') == 0
    saved = sorted(checkpoint.load(path)['iter'] for path in tmp_path.glob('ckpt-0*.pt'))
    assert saved == [0, 10, 15, 30, 40][-keep - 1:]  # the best so far, and the last, besides the interval's
    assert checkpoint.load(tmp_path / 'ckpt-best.pt')['iter'] == 10


def test_training_goes_on_while_a_checkpoint_is_written(undisturbed, tmp_path, monkeypatch):
    real, went_on = checkpoint.save, threading.Event()

    def save(out_dir, state, *args):
        if state['iter'] == 10:
            assert went_on.wait(60)  # for step 13
        real(out_dir, state, *args)
    monkeypatch.setattr(checkpoint, 'save', save)
    stop_at(monkeypatch, 13, went_on.set)
    stop_at(monkeypatch, 16, crash)
    with pytest.raises(Crash):
        run(tmp_path, *DROPOUT)
    assert checkpoint.load(tmp_path / 'ckpt.pt')['iter'] == 10 and metrics(tmp_path)[-1]['iter'] == 16
    monkeypatch.undo()
    assert run(tmp_path, *DROPOUT, '--init_from=resume') == 0  # from the weights of step 10, no later
    assert_same_run(tmp_path, undisturbed)


def test_a_fault_of_the_writing_thread_is_not_swallowed(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, 'save', lambda *args: {}['a bug'])
    with pytest.raises(KeyError, match='a bug'):
        run(tmp_path, *TINY)


def test_a_run_whose_last_checkpoint_could_not_be_written_is_not_finished(undisturbed, tmp_path, monkeypatch):
    real = checkpoint.save

    def save(out_dir, state, *args):
        if state['iter'] == 40:
            raise OSError(28, 'No space left on device')
        real(out_dir, state, *args)
    monkeypatch.setattr(checkpoint, 'save', save)
    assert run(tmp_path, *DROPOUT) == 75 and info(tmp_path)['state'] == 'resumable'
    monkeypatch.undo()
    assert run(tmp_path, *DROPOUT, '--init_from=resume') == 0
    assert_same_run(tmp_path, undisturbed)


def test_no_updates_and_evaluation_alone(undisturbed, tmp_path, capsys):
    assert run(tmp_path / 'none', *TINY, '--max_iters=0') == 0
    assert [line['iter'] for line in metrics(tmp_path / 'none')] == [0]
    assert info(tmp_path / 'none')['state'] == 'finished'
    assert run(tmp_path / 'new', *TINY, '--eval_only=True') == 0
    assert not (tmp_path / 'new').exists()
    before = contents(undisturbed)
    capsys.readouterr()
    assert run(undisturbed, *DROPOUT, '--eval_only=True', '--init_from=resume') == 0
    assert f'val loss {info(undisturbed)["val_loss"]:.6f}' in capsys.readouterr().out
    assert contents(undisturbed) == before
