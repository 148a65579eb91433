"""
train.py and what it writes: the same numbers however a run is batched, spread, interrupted or evaluated;
nothing lost, and nothing wrong accepted.

    python -m pytest tests/test_train.py

Runs are tiny and mostly made in this process; real signals, torchrun and W&B without a key get processes of
their own.
"""
import contextlib
import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from training import checkpoint
import sample
import train
from configurator import read_defaults
from data.corpus import open_corpus
from model import GPT, GPTConfig

ROOT = train.ROOT
LAYERS = ['tp', 'spd', 'parallel', 'spd']
TINY = [str(ROOT / 'config/train_gpt2_12comm.py'), str(ROOT / 'config/cpu.py'),
        f'--block_types={",".join(LAYERS)}', '--n_layer=4', '--n_embd=32', '--block_size=32',
        '--batch_size=4', '--warmup_iters=5', '--max_iters=40', '--eval_interval=10', '--eval_tokens=1000',
        '--log_interval=1']
DROPOUT = [*TINY, '--dropout=0.1']
MEASURED = {'tokens_per_sec', 'mfu', 'peak_memory_gib'}     # what two equal runs may differ in


@pytest.fixture(scope='session', autouse=True)
def corpus():
    subprocess.run([sys.executable, ROOT / 'data/pystdlib/prepare.py'], check=True, stdout=subprocess.DEVNULL)
    return open_corpus('pystdlib')


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """No torchrun around this process, and no W&B but for the tests that want it."""
    for name in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'WANDB_MODE'):
        monkeypatch.delenv(name, raising=False)


def run(out_dir, *flags):
    """
    train.py in this process, which afterwards holds no lock and no signal; out_dir None is its default.
    Returns sys.exit()'s argument, or 0.
    """
    handlers = {number: signal.getsignal(number)
                for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    held = len(checkpoint.held)
    try:
        train.main([*flags, *[f'--out_dir={out_dir}'] * (out_dir is not None)])
        return 0
    except SystemExit as stopped:
        return stopped.code or 0
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        train.signals.clear()
        while len(checkpoint.held) > held:
            checkpoint.held.pop().close()


def start(out_dir, *flags, processes=None, **settings):
    """train.py in a process of its own, or under torchrun in as many as it is told."""
    torchrun = ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={processes}']
    command = [sys.executable, *torchrun * bool(processes), str(ROOT / 'train.py')]
    return subprocess.Popen(
        [*command, *flags, f'--out_dir={out_dir}'], env={**os.environ, 'OMP_NUM_THREADS': '1', **settings},
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_step(process, out_dir, step):
    deadline, metrics = time.monotonic() + 120, Path(out_dir) / 'metrics.jsonl'
    while not (metrics.exists() and f'"iter": {step},' in metrics.read_text()):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.002)


def refused(out_dir, *flags):
    """The one line that a run ends with, before any work."""
    message = run(out_dir, *flags)
    assert isinstance(message, str) and message.startswith('error: ') and len(message.splitlines()) == 1
    return message


def strict(text):
    """JSON as the standard has it, without NaN and Infinity."""
    return json.loads(text, parse_constant=pytest.fail)


def metrics(out_dir, but=MEASURED):
    lines = map(strict, (Path(out_dir) / 'metrics.jsonl').read_text().splitlines())
    return [{key: value for key, value in line.items() if key not in but} for line in lines]


def column(out_dir, key):
    """{iter: value} of the lines that have the key."""
    return {line['iter']: line[key] for line in metrics(out_dir) if key in line}


def info(out_dir):
    return strict((Path(out_dir) / 'run.json').read_text())


def contents(folder):
    return {path: (path.read_bytes(), path.stat().st_mtime_ns * (path.name != 'lock'))
            for path in Path(folder).rglob('*') if path.is_file()}


def assert_same_run(out_dir, other):
    """Metrics, weights, moments and counters equal to the bit."""
    assert metrics(out_dir) == metrics(other)
    a, b = (checkpoint.load(Path(folder) / 'ckpt.pt') for folder in (out_dir, other))
    assert a['iter'] == b['iter'] and info(out_dir)['state'] == info(other)['state'] == 'finished'
    torch.testing.assert_close(a['model'], b['model'], rtol=0, atol=0)
    torch.testing.assert_close(a['optimizer']['state'], b['optimizer']['state'], rtol=0, atol=0)
    assert a['scaler'] == b['scaler'] and a['progress']['best_val_loss'] == b['progress']['best_val_loss']


def stop_at(monkeypatch, step, act):
    """Has act() happen in the midst of the update from `step` to `step` + 1, until the next undo()."""
    real = train.learning_rate

    def learning_rate(it, config):
        if it == step:
            act()
        return real(it, config)
    monkeypatch.setattr(train, 'learning_rate', learning_rate)


class Crash(Exception):
    pass


def crash():
    raise Crash


@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory):
    out_dir = tmp_path_factory.mktemp('undisturbed') / 'run'
    assert run(out_dir, *DROPOUT) == 0
    return out_dir


@pytest.fixture(scope='module')
def crashed(tmp_path_factory):
    """A run that died at step 26: checkpoints of steps 20 and 10, and lines up to step 26."""
    out_dir = tmp_path_factory.mktemp('crashed') / 'run'
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Crash):
        stop_at(patch, 26, crash)
        run(out_dir, *DROPOUT)
    assert info(out_dir)['state'] == 'failed' and metrics(out_dir)[-1]['iter'] == 26
    return out_dir


@pytest.fixture
def copy_of_crashed(crashed, tmp_path):
    return shutil.copytree(crashed, tmp_path / 'copy')


# interruptions


@pytest.mark.parametrize('number, status, state', [
    (signal.SIGTERM, 75, 'resumable'), (signal.SIGKILL, -9, 'running')])
def test_an_interrupted_run_goes_on_to_the_bit(undisturbed, tmp_path, number, status, state):
    process = start(tmp_path, *DROPOUT)
    wait_for_step(process, tmp_path, 13)
    process.send_signal(number)
    output = process.communicate(timeout=60)
    assert process.returncode == status and info(tmp_path)['state'] == state, output
    assert 'Traceback' not in output[1]
    saved = checkpoint.load(tmp_path / 'ckpt.pt')['iter']
    assert saved == metrics(tmp_path)[-1]['iter'] if number == signal.SIGTERM else saved % 10 == 0
    assert run(tmp_path, *DROPOUT, '--init_from=resume') == 0
    assert_same_run(tmp_path, undisturbed)


@pytest.mark.parametrize('number, step', [(signal.SIGTERM, 0), (signal.SIGINT, 19), (signal.SIGUSR1, 39)])
def test_a_signal_saves_and_leaves_after_the_step_it_meets(undisturbed, tmp_path, monkeypatch, number, step):
    stop_at(monkeypatch, step, lambda: os.kill(os.getpid(), number))
    assert run(tmp_path, *DROPOUT) == train.RESUMABLE == 75
    assert info(tmp_path)['state'] == 'resumable' and info(tmp_path)['iter'] == step + 1
    assert checkpoint.load(tmp_path / 'ckpt.pt')['iter'] == metrics(tmp_path)[-1]['iter'] == step + 1
    assert run(tmp_path, *DROPOUT, '--init_from=resume') == 0
    assert_same_run(tmp_path, undisturbed)


def test_a_stop_before_the_first_new_line_keeps_the_metrics_whole(undisturbed, copy_of_crashed, monkeypatch):
    stop_at(monkeypatch, 20, lambda: os.kill(os.getpid(), signal.SIGTERM))
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


def test_a_run_goes_on_on_the_same_batches_on_another_number_of_processes(tmp_path, monkeypatch):
    # 12 windows a step: two processes take 6 each, in two micro-batches of 3
    flags = [*TINY, '--gradient_accumulation_steps=3']
    one, mixed = tmp_path / 'one', tmp_path / 'mixed'
    assert run(one, *flags) == 0
    stop_at(monkeypatch, 6, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert run(mixed, *flags) == 75 and info(mixed)['processes'] == 1
    monkeypatch.undo()
    process = start(mixed, *flags, '--init_from=resume', processes=2)
    wait_for_step(process, mixed, 13)
    process.terminate()
    output = process.communicate(timeout=60)
    assert info(mixed)['state'] == 'resumable' and info(mixed)['processes'] == 2, output
    assert 13 <= info(mixed)['iter'] < 40
    assert run(mixed, *flags, '--init_from=resume') == 0
    for key in ('train_loss', 'grad_norm', 'val_loss', 'val_tokens'):
        assert column(mixed, key) == pytest.approx(column(one, key), rel=1e-5)


# what a step and an evaluation are


def test_a_step_is_its_windows_however_they_are_batched(tmp_path):
    runs = {}
    for size, steps in (16, 1), (4, 4), (5, 4):
        out_dir = tmp_path / f'{size}x{steps}'
        flags = ['--max_iters=8', f'--batch_size={size}', f'--gradient_accumulation_steps={steps}']
        assert run(out_dir, *TINY, *flags) == 0
        runs[size] = {key: column(out_dir, key) for key in ('train_loss', 'grad_norm', 'val_loss')}
        assert info(out_dir)['tokens_per_step'] == size * steps * 32
    for key, values in runs[16].items():
        assert values == pytest.approx(runs[4][key], rel=1e-5)
    assert runs[16]['train_loss'] != pytest.approx(runs[5]['train_loss'], rel=1e-5)


def test_when_a_run_is_evaluated_changes_nothing_else(undisturbed, tmp_path):
    assert run(tmp_path, *DROPOUT, '--eval_interval=7', '--log_interval=3') == 0
    assert list(column(tmp_path, 'val_loss')) == [0, 7, 14, 21, 28, 35, 40]
    assert list(column(tmp_path, 'train_loss')) == [*range(3, 40, 3), 40]
    for key in ('train_loss', 'grad_norm'):
        assert column(tmp_path, key).items() <= column(undisturbed, key).items()
    assert column(tmp_path, 'val_loss')[40] == column(undisturbed, 'val_loss')[40]


def toy(**settings):
    """(net, config, place) of a small model in this process."""
    config = SimpleNamespace(**{key: default for key, (default, _, _) in read_defaults().items()})
    vars(config).update(device='cpu', dtype='float32', compile=False, batch_size=3, block_size=8, **settings)
    place = train.Place(0, 1, [[0]], torch.device('cpu'))
    torch.manual_seed(1)
    model = GPT(GPTConfig(block_size=8, vocab_size=257, n_layer=4, n_head=4, n_embd=16, block_types=LAYERS))
    net = train.Network(model, config)
    net.wrap(3, None, config, place, print)
    return net, config, place


def test_validation_is_the_mean_over_the_first_tokens_whatever_the_batch_size(corpus):
    net, config, place = toy(eval_tokens=1003)
    tokens = torch.from_numpy(corpus.val.read(0, 1004).astype(np.int64))
    nats = 0
    with torch.no_grad():
        for i in range(0, 1003, 8):
            x, y = tokens[i:i + 8][:1003 - i], tokens[i + 1:i + 9]
            nats += net.raw(x[None], y[None])[1].item() * len(y)
    for config.batch_size in 1, 5, 300:
        loss, count = train.evaluate(net.raw, corpus.val, config.eval_tokens, config, place)
        assert count == 1003 and loss == pytest.approx(nats / 1003, rel=1e-6)
    assert net.raw.training


def micro_batches(seed, count=2):
    generator = torch.Generator().manual_seed(seed)
    return [tuple(torch.randint(257, (2, 3, 8), generator=generator)) for _ in range(count)]


def state_of(net):
    return {'model': net.raw.state_dict(), 'optimizer': net.optimizer.state_dict()['state']}


@pytest.mark.parametrize('where', ['loss', 'gradient'])
@pytest.mark.parametrize('value', [math.nan, math.inf])
def test_a_step_that_is_not_finite_updates_nothing_and_leaves_no_trace(where, value):
    (net, config, place), (other, *_) = toy(), toy()
    for one in net, other:
        train.train_step(one, micro_batches(1), 1e-3, config, place)
    before = torch.utils._pytree.tree_map(torch.clone, state_of(net))
    if where == 'loss':
        forward, net.ddp = net.ddp, lambda x, y: (None, forward(x, y)[1] * value)
    else:
        hook = net.raw.transformer.h[2].mlp.c_fc.weight.register_hook(lambda grad: grad * value)
    loss, norm, stopping = train.train_step(net, micro_batches(2), 1e-3, config, place)
    assert not (math.isfinite(loss) and math.isfinite(norm)) and not stopping
    torch.testing.assert_close(state_of(net), before, rtol=0, atol=0)
    if where == 'loss':
        net.ddp = forward
    else:
        hook.remove()
    results = [train.train_step(one, micro_batches(3), 1e-3, config, place) for one in (net, other)]
    assert results[0] == results[1] and math.isfinite(results[0][0])
    torch.testing.assert_close(state_of(net), state_of(other), rtol=0, atol=0)


def test_the_norm_is_of_the_gradient_before_clipping():
    net, config, place = toy(grad_clip=0.0)
    batches = micro_batches(1)
    loss = sum(net.raw(x, y)[1] for x, y in batches) / 2
    grads = torch.autograd.grad(loss, list(net.raw.parameters()))
    norm = torch.cat([grad.flatten() for grad in grads]).norm().item()
    for config.grad_clip in 0.0, norm / 7, norm * 7:
        net, *_ = toy()
        clipped = {}
        net.optimizer.register_step_pre_hook(lambda optimizer, *_: clipped.update(
            norm=torch.nn.utils.get_total_norm(
                [p.grad for group in optimizer.param_groups for p in group['params']]).item()))
        found = train.train_step(net, batches, 1e-3, config, place)
        assert found[:2] == pytest.approx((loss.item(), norm), rel=1e-5)
        assert clipped['norm'] == pytest.approx(min(norm, config.grad_clip or norm), rel=1e-4)


def test_too_many_bad_steps_in_a_row_end_the_run(tmp_path, monkeypatch):
    real = train.train_step
    monkeypatch.setattr(train, 'train_step', lambda *args, **kw: (math.nan, math.inf, False))
    message = refused(tmp_path, *TINY, '--learning_rate=0.5', '--min_lr=0.1')
    assert all(word in message for word in ('step 5', 'nan', 'inf', '4.17e-01', '--learning_rate'))
    assert info(tmp_path)['state'] == 'failed' and checkpoint.load(tmp_path / 'ckpt.pt')['iter'] == 0
    assert metrics(tmp_path)[4] == dict(iter=4, train_loss=None, grad_norm=None, lr=0.5 * 4 / 6, skipped=4)
    bad = iter([True, True, True, True, False] * 8)
    monkeypatch.setattr(train, 'train_step', lambda *args, **kw: (
        (math.nan, 1.0, False) if next(bad) else real(*args, **kw)))
    assert run(tmp_path, *TINY, '--learning_rate=0.5', '--min_lr=0.1', '--init_from=resume') == 0
    assert metrics(tmp_path)[-2]['skipped'] == 32


@pytest.mark.parametrize('it, rate', [
    (0, 1 / 11), (4, 5 / 11), (9, 10 / 11), (10, 1.0), (35, 0.1 + 0.9 * (0.5 + math.sqrt(0.125))),
    (60, 0.55), (110, 0.1), (1000, 0.1)])
def test_the_learning_rate_rises_then_follows_a_cosine(it, rate):
    config = SimpleNamespace(
        decay_lr=True, learning_rate=1.0, min_lr=0.1, warmup_iters=10, lr_decay_iters=110)
    assert train.learning_rate(it, config) == pytest.approx(rate, rel=1e-12)
    config.decay_lr = False
    assert train.learning_rate(it, config) == 1.0


def test_a_run_shorter_than_its_warmup_only_warms_up():
    config = SimpleNamespace(decay_lr=True, learning_rate=1.0, min_lr=0.1, warmup_iters=10, lr_decay_iters=5)
    assert [train.learning_rate(it, config) for it in range(10)] == [(it + 1) / 11 for it in range(10)]
    assert train.learning_rate(10, config) == 0.1


# what a run writes


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
    assert column(undisturbed, 'lr') == {it + 1: train.learning_rate(it, config) for it in range(40)}
    assert found['config'].keys() == read_defaults().keys()
    assert (config.block_types, config.out_dir, config.lr_decay_iters) == (LAYERS, str(undisturbed), 40)
    assert found['name'] == config.wandb_run_name == 'gpt2-124M-12comm-cpu'
    assert found['corpus'] == dict(
        name='pystdlib', corpus=corpus.meta['corpus'], tokenizer='byte', vocab_size=257,
        val_sha256=corpus.meta['splits']['val']['sha256'])
    assert found['communications'] == 6 and found['all_reduces'] == dict(forward=4, backward=4)
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


def test_the_latest_and_the_best_are_kept(tmp_path, monkeypatch):
    for always, before in (True, 30), (False, 10):
        losses, out_dir = iter([5.0, 2.0, math.nan, 4.0, 3.0]), tmp_path / str(always)
        monkeypatch.setattr(train, 'evaluate', lambda *args: (next(losses), 1000))
        assert run(out_dir, *TINY, f'--always_save_checkpoint={always}') == 0
        iters = [checkpoint.load(out_dir / f'ckpt{name}.pt')['iter'] for name in ('', '-previous', '-best')]
        assert iters == [40, before, 10]
        assert list(column(out_dir, 'val_loss').values()) == [5.0, 2.0, None, 4.0, 3.0]


def test_checkpoints_have_an_interval_of_their_own(tmp_path, monkeypatch):
    real, saved = checkpoint.save, []
    monkeypatch.setattr(checkpoint, 'save', lambda out_dir, state, best, keep: (
        saved.append((state['iter'], best)), real(out_dir, state, best, keep)))
    losses = iter([5.0, 2.0, 4.0, 3.0, 1.0])
    monkeypatch.setattr(train, 'evaluate', lambda *args: (next(losses), 1000))
    assert run(tmp_path, *TINY, '--checkpoint_interval=15', '--keep_checkpoints=1') == 0
    assert saved == [(0, True), (10, True), (15, False), (30, False), (40, True)]
    assert sorted(path.name for path in tmp_path.glob('*.pt')) == [
        'ckpt-00000030.pt', 'ckpt-00000040.pt', 'ckpt-best.pt', 'ckpt-previous.pt', 'ckpt.pt']


def test_training_goes_on_while_a_checkpoint_is_written(undisturbed, tmp_path, monkeypatch):
    real, went_on = checkpoint.save, threading.Event()

    def save(out_dir, state, *args):
        if state['iter'] == 10:
            assert went_on.wait(60)     # until step 13
        real(out_dir, state, *args)
    monkeypatch.setattr(checkpoint, 'save', save)
    stop_at(monkeypatch, 13, went_on.set)
    stop_at(monkeypatch, 16, crash)
    with pytest.raises(Crash):
        run(tmp_path, *DROPOUT)
    assert checkpoint.load(tmp_path / 'ckpt.pt')['iter'] == 10 and metrics(tmp_path)[-1]['iter'] == 16
    monkeypatch.undo()
    assert run(tmp_path, *DROPOUT, '--init_from=resume') == 0       # from the weights of step 10, no later
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
    assert f'val loss {info(undisturbed)["val_loss"]:.4f}' in capsys.readouterr().out
    assert contents(undisturbed) == before


# whose folder it is


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
    out_dir = tmp_path / 'out/gpt2-124M-12comm-cpu'

    def option(*flags):
        capsys.readouterr()
        return run(None, *TINY, *flags)

    long, short = '--max_iters=30', '--max_iters=20'
    with monkeypatch.context() as patch:
        stop_at(patch, 12, lambda: train.signals.append(signal.SIGTERM))
        assert option(long) == 75       # A, stopped on its way
    before = contents(out_dir)
    assert 'max_iters is 30 there, 20 here' in option(short) and contents(out_dir) == before     # then B
    assert option(long, '--init_from=resume') == 0
    before = contents(out_dir)
    assert 'max_iters is 30 there, 20 here' in option(short) and contents(out_dir) == before
    assert 'max_iters is 30 there, 20 here' in option(short, '--init_from=resume')
    assert contents(out_dir) == before
    shutil.rmtree(out_dir)
    assert option(short) == 0           # B, then C, which is B again, then A
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
    checkpoint.lock(copy_of_crashed)
    try:
        assert 'another run' in refused(copy_of_crashed, *DROPOUT, '--init_from=resume')
    finally:
        checkpoint.held.pop().close()
    assert contents(copy_of_crashed) == before


# damage


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
    for name in checkpoint.LATEST:
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


# faults on the way


@contextlib.contextmanager
def full_disk(size):
    """
    No file of this process grows beyond `size` bytes: a write that would raises OSError, as on a full disk.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


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
        stop_at(monkeypatch, 2, lambda: train.signals.append(signal.SIGTERM))
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
    flags = [f'--batch_size={batch_size}', f'--gradient_accumulation_steps={steps}']
    message = refused(tmp_path, *TINY, *flags)
    assert words in message and 'out of GPU memory' in message and info(tmp_path)['state'] == 'failed'


@pytest.mark.parametrize('name', ['metrics.jsonl', 'run.json', 'lock', 'ckpt.pt'])
def test_a_folder_in_place_of_a_file_gets_one_line(tmp_path, name):
    (tmp_path / name).mkdir()
    assert str(tmp_path) in refused(tmp_path, *TINY, *['--init_from=resume'] * (name == 'ckpt.pt'))


def test_a_machine_without_git_trains(tmp_path, monkeypatch):
    monkeypatch.setenv('PATH', str(tmp_path))
    assert run(tmp_path / 'out', *TINY, '--max_iters=1') == 0
    assert info(tmp_path / 'out')['git_commit'] is None


# what a person types


@pytest.mark.parametrize('flags, words', [
    (['--device=nonesuch'], ['device', 'nonesuch', '--device=cpu']),
    (['--device=meta'], ['device', 'meta']),
    (['--dataset=nothere'], ['dataset', 'nothere', 'pystdlib']),
    (['--tp_size=3'], ['tp_size', '3', 'n_head', '8', 'cpu.py', '--tp_size=3']),
    (['--tp_size=0'], ['tp_size', '0', 'at least 1']),
    (['--n_embd=36'], ['n_embd', '36', 'n_head']),
    (['--block_types=tp,SPD'], ['block_types', 'SPD', 'tp, spd, parallel']),
    (["--block_types=['tp']*3"], ['block_types', '3', 'n_layer', '4']),
    (["--block_types=[['tp']]*4"], ['block_types', "['tp']"]),
    (['--block_size=100000000'], ['block_size', '100000000']),
    (['--seed=99999999999999999999999'], ['seed', '99999999999999999999999']),
    (['--config=1'], ['config', '--config=1']),
])
def test_bad_input_gets_one_line_before_any_work(tmp_path, flags, words):
    message = refused(tmp_path / 'out', *TINY, *flags)
    assert all(word in message for word in words)
    assert not (tmp_path / 'out').exists()


def test_a_mistyped_flag_is_told_before_torch_is_loaded(tmp_path):
    (tmp_path / 'torch.py').write_text('raise ImportError')
    done = subprocess.run([sys.executable, str(ROOT / 'train.py'), '--lerning_rate=1'], text=True,
                          env={**os.environ, 'PYTHONPATH': str(tmp_path)}, capture_output=True)
    assert done.stderr == 'error: --lerning_rate=1: no key is called lerning_rate; learning_rate?\n'
    assert (done.returncode, done.stdout) == (1, '')


def test_missing_data_names_the_command_that_makes_it(tmp_path, monkeypatch):
    monkeypatch.setattr(train, 'open_corpus', partial(open_corpus, data_dir=tmp_path / 'data'))
    assert 'python data/pystdlib/prepare.py' in refused(tmp_path / 'out', *TINY)
    assert not (tmp_path / 'out').exists()


def test_windows_that_do_not_divide_by_the_processes_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv('WORLD_SIZE', '2')
    message = refused(tmp_path / 'out', *TINY, '--batch_size=3')
    assert all(word in message for word in ('3', '2', 'batch_size', 'gradient_accumulation_steps'))
    assert not (tmp_path / 'out').exists()


def test_under_torchrun_only_the_first_process_says_what_is_wrong(tmp_path):
    (tmp_path / 'file').touch()
    process = start(tmp_path / 'file/out', *TINY, processes=2)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 1 and out == '' and 'train.py", line' not in err
    line, = (line for line in err.splitlines() if 'out_dir is' in line)
    assert line.startswith('error: ') and 'cannot be written' in line


# text from a run


def test_a_run_writes_on_from_a_start(undisturbed, tmp_path, capsys):
    (tmp_path / 'prompt.txt').write_text('def main(')
    texts = []
    for start, seed in ('def main(', 1), (f'FILE:{tmp_path}/prompt.txt', 1), ('def main(', 2):
        sample.main([f'--out_dir={undisturbed}', f'--start={start}', f'--seed={seed}', '--num_samples=2',
                     '--max_new_tokens=40', '--device=cpu'])
        texts.append(capsys.readouterr().out.split('\n---------------\n'))
    first, second, rest = texts[0]
    assert first.startswith('def main(') and second.startswith('def main(') and rest == ''
    assert len(first) > len('def main(') and first != second and texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize('flag, words', [
    ('--temperature=0', '--temperature=0.0: it must be above 0'), ('--tempreture=1', '--tempreture=1'),
    ('--checkpoint=ckpt-first.pt', 'ckpt-first.pt: No such file'), ('--start=', '--start is empty')])
def test_a_mistake_in_a_flag_of_sample_gets_one_line(undisturbed, flag, words):
    with pytest.raises(SystemExit) as stopped:
        sample.main([f'--out_dir={undisturbed}', '--device=cpu', flag])
    message = stopped.value.code        # text: Python prints it on stderr and leaves with status 1
    assert message.startswith('error: ') and len(message.splitlines()) == 1 and words in message


# weights & biases


def parse_wandb(data):
    """
    The protobuf records of a .wandb file, a log in LevelDB's format: blocks of 32 KiB, a 7-byte header a
    chunk. What is not whole yet is left out.
    """
    from wandb.proto.wandb_internal_pb2 import Record
    at, whole = 7, b''
    while at + 7 <= len(data):
        if 2**15 - at % 2**15 < 7:          # what is too short for a header ends a block
            at += 2**15 - at % 2**15
            continue
        size, kind = int.from_bytes(data[at + 4:at + 6], 'little'), data[at + 6]
        if at + 7 + size > len(data):
            return
        whole += data[at + 7:at + 7 + size]
        at += 7 + size
        if kind in (1, 4):                  # a whole record, or the last part of one
            yield Record.FromString(whole)
            whole = b''


def wandb_records(path):
    """What W&B kept of a run that has ended. Its service may write the last of it a moment later."""
    end, records = time.monotonic() + 60, []
    while not any(record.WhichOneof('record_type') == 'exit' for record in records):
        assert time.monotonic() < end, f'{path} has no exit record'
        time.sleep(0.05)
        records = list(parse_wandb(path.read_bytes()))
    return records


def wandb_history(path):
    """(id, lines): what W&B kept of a run, its keys as W&B names them."""
    records = wandb_records(path)
    history = [record.history for record in records if record.WhichOneof('record_type') == 'history']
    lines = [{''.join(item.nested_key) or item.key: json.loads(item.value_json) for item in line.item}
             for line in history]
    return next(record.run for record in records if record.WhichOneof('record_type') == 'run'), lines


def test_wandb_offline_has_every_step_under_one_id_across_a_resume(tmp_path, monkeypatch):
    monkeypatch.setenv('WANDB_MODE', 'offline')
    monkeypatch.setenv('WANDB_CONSOLE', 'off')
    stop_at(monkeypatch, 16, lambda: train.signals.append(signal.SIGTERM))
    assert run(tmp_path, *TINY, '--wandb_log=True', '--max_iters=25') == 75
    time.sleep(1)                           # W&B names its folders by the second
    assert run(tmp_path, *TINY, '--wandb_log=True', '--max_iters=25', '--init_from=resume') == 0
    files = sorted(tmp_path.glob('wandb/offline-run-*/*.wandb'), key=lambda path: path.stat().st_mtime)
    (first, early), (second, late) = map(wandb_history, files)
    assert first.run_id == second.run_id == checkpoint.load(tmp_path / 'ckpt.pt')['progress']['wandb_id']
    assert (first.project, first.display_name, first.run_group) == ('owt', 'gpt2-124M-12comm-cpu', 'pystdlib')
    tracked = {item.key: json.loads(item.value_json) for item in first.config.update}
    assert (tracked['communications'], tracked['all_reduces_forward'], tracked['seed']) == (6, 4, 1337)
    names = {'train/loss': 'train_loss', 'val/loss': 'val_loss'}
    lines = [{names.get(key, key): value for key, value in line.items() if not key.startswith('_')}
             for line in early + late]
    assert lines == metrics(tmp_path, but=())


def test_wandb_without_a_key_warns_once_and_keeps_the_run_offline(tmp_path):
    (tmp_path / 'home').mkdir()
    settings = dict(HOME=str(tmp_path / 'home'), WANDB_API_KEY='', NETRC='', WANDB_CONFIG_DIR='')
    process = start(tmp_path / 'out', *TINY, '--wandb_log=True', '--max_iters=3', **settings)
    out, err = process.communicate(timeout=360)
    assert process.returncode == 0, err
    assert len([line for line in out.splitlines() if 'W&B' in line]) == 1 and 'wandb sync' in out
    path, = (tmp_path / 'out').glob('wandb/offline-run-*/*.wandb')
    assert [line['iter'] for line in wandb_history(path)[1]] == [0, 1, 2, 3, 3]


class FailingWandb:
    """Stands in for the module and for its run; what it is told to fail at, fails."""
    id = 'abc'

    def __init__(self, fails, error):
        self.fails, self.error = fails, error

    def __getattr__(self, name):
        def call(*args, **kw):
            if name == self.fails:
                raise self.error
            return self
        return call


@pytest.mark.parametrize('fails, error', [
    ('login', RuntimeError()), ('init', OSError('no\nnetwork')), ('define_metric', RuntimeError()),
    ('log', OSError('no\nnetwork')), ('finish', RuntimeError())])
def test_training_outlives_wandb(tmp_path, monkeypatch, capsys, fails, error):
    monkeypatch.setitem(sys.modules, 'wandb', FailingWandb(fails, error))
    assert run(tmp_path, *TINY, '--wandb_log=True', '--max_iters=3') == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if 'W&B' in line or 'network' in line]
    assert len(lines) == 1 and lines[0].startswith('warning: ') and type(error).__name__ in lines[0]
    assert info(tmp_path)['state'] == 'finished'
    assert [line['iter'] for line in metrics(tmp_path)] == [0, 1, 2, 3, 3]


def test_training_does_without_wandb_where_it_is_not_installed(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, 'wandb', None)
    assert run(tmp_path, *TINY, '--wandb_log=True', '--max_iters=1') == 0
    assert capsys.readouterr().out.count('W&B') == 1


# interruptions at random moments, by the script that does many of them


@pytest.mark.parametrize('kind', ['kill', 'term'])
def test_random_interruptions_change_nothing(kind):
    command = [sys.executable, str(ROOT / 'tests/crash.py'), kind, '--times=4', '--seed=3']
    done = subprocess.run(command, env={**os.environ, 'OMP_NUM_THREADS': '1'}, capture_output=True, text=True,
                          timeout=300)
    assert done.returncode == 0, done.stderr
    assert '| 4 |' in done.stdout
