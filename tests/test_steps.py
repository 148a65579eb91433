"""
What a step and an evaluation of train.py compute, however they are batched.

    python -m pytest tests/test_steps.py
"""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.utils._pytree import tree_map

import train
from model import TPGroup, count_all_reduces
from toy_runs import (
    DROPOUT,
    TINY,
    Crash,
    assert_same_run,
    column,
    crash,
    info,
    metrics,
    micro_batches,
    refused,
    report,
    run,
    stop_at,
    toy,
)
from training import checkpoint
from training.sharding import shard_model

pytestmark = pytest.mark.usefixtures('corpus')


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


def test_validation_is_the_mean_over_the_first_tokens_whatever_the_batch_size(corpus):
    net, config, world = toy(eval_tokens=1003)
    tokens = torch.from_numpy(corpus.val.read(0, 1004).astype(np.int64))
    nats = 0
    with torch.no_grad():
        for i in range(0, 1003, 8):
            x, y = tokens[i:i + 8][:1003 - i], tokens[i + 1:i + 9]
            nats += net.raw_model(x[None], y[None])[1].item() * len(y)
    for config.batch_size in 1, 5, 300:
        loss, count = train.evaluate(net.raw_model, corpus.val, config.eval_tokens, config, world)
        assert count == 1003 and loss == pytest.approx(nats / 1003, rel=1e-6)
    assert net.raw_model.training


# one update


def state_of(net):
    return dict(model=net.raw_model.state_dict(), optimizer=net.optimizer.state_dict()['state'])


@pytest.mark.parametrize('where', ['loss', 'gradient'])
@pytest.mark.parametrize('value', [math.nan, math.inf])
def test_a_step_that_is_not_finite_updates_nothing_and_leaves_no_trace(where, value):
    (net, config, world), (other, *_) = toy(), toy()
    for one in net, other:
        train.train_step(one, micro_batches(1), 1e-3, config, world)
    before = tree_map(torch.clone, state_of(net))
    if where == 'loss':
        forward, net.ddp_model = net.ddp_model, lambda x, y: (None, forward(x, y)[1] * value)
    else:
        hook = net.raw_model.transformer.h[2].mlp.c_fc.weight.register_hook(lambda grad: grad * value)
    loss, norm, stopping = train.train_step(net, micro_batches(2), 1e-3, config, world).read()
    assert not (math.isfinite(loss) and math.isfinite(norm)) and not stopping
    torch.testing.assert_close(state_of(net), before, rtol=0, atol=0)
    if where == 'loss':
        net.ddp_model = forward
    else:
        hook.remove()
    results = [train.train_step(one, micro_batches(3), 1e-3, config, world).read() for one in (net, other)]
    assert results[0] == results[1] and math.isfinite(results[0][0])
    torch.testing.assert_close(state_of(net), state_of(other), rtol=0, atol=0)


def test_the_norm_is_of_the_gradient_before_clipping():
    net, config, world = toy(grad_clip=0.0)
    batches = micro_batches(1)
    loss = sum(net.raw_model(x, y)[1] for x, y in batches) / 2
    grads = torch.autograd.grad(loss, list(net.raw_model.parameters()))
    norm = torch.cat([grad.flatten() for grad in grads]).norm().item()
    for config.grad_clip in 0.0, norm / 7, norm * 7:
        net, *_ = toy()
        found = train.train_step(net, batches, 1e-3, config, world).read()
        assert found[:2] == pytest.approx((loss.item(), norm), rel=1e-5)
        # a first step's exp_avg is (1 - beta1) times the gradient that AdamW got
        state = net.optimizer.state.values()
        used = torch.cat([entry['exp_avg'].flatten() for entry in state]).norm().item() / (1 - config.beta1)
        assert used == pytest.approx(min(norm, config.grad_clip or norm), rel=1e-4)


@pytest.mark.parametrize('lr', [1e-3, 4e-3])
def test_an_update_moves_the_weights_at_the_given_rate(lr):
    net, config, world = toy(weight_decay=0.0)
    before = [p.detach().clone() for p in net.raw_model.parameters()]
    train.train_step(net, micro_batches(1), lr, config, world)
    moved = torch.cat([(p.detach() - q).abs().flatten() for p, q in zip(net.raw_model.parameters(), before)])
    # AdamW's first step is the rate times the gradient's sign
    assert moved.max().item() == pytest.approx(lr, rel=1e-3)
    assert moved.median().item() == pytest.approx(lr, rel=1e-2)


def test_a_process_that_is_stopping_says_so():
    net, config, world = toy()
    assert [train.train_step(net, micro_batches(1), 1e-3, config, world, stopping).read()[2]
            for stopping in (False, True)] == [False, True]


def test_too_many_bad_steps_in_a_row_end_the_run(tmp_path, monkeypatch):
    real = train.train_step
    monkeypatch.setattr(train, 'train_step', lambda *args, **kw: report(math.nan, math.inf))
    message = refused(tmp_path, *TINY, '--learning_rate=0.5', '--min_lr=0.1')
    assert all(word in message for word in ('step 5', 'nan', 'inf', '4.17e-01', '--learning_rate'))
    assert info(tmp_path)['state'] == 'diverged' and checkpoint.load(tmp_path / 'ckpt.pt')['iter'] == 0
    assert metrics(tmp_path)[4] == dict(iter=4, train_loss=None, grad_norm=None, lr=0.5 * 4 / 6, skipped=4)
    bad = iter([True, True, True, True, False] * 8)
    monkeypatch.setattr(train, 'train_step', lambda *args, **kw: (
        report(math.nan, 1.0) if next(bad) else real(*args, **kw)))
    flags = [*TINY, '--learning_rate=0.5', '--min_lr=0.1', '--log_interval=7']
    assert run(tmp_path, *flags, '--init_from=resume') == 0
    assert metrics(tmp_path)[-2]['skipped'] == 32
    # read a step late, a bad step is still itself
    monkeypatch.setattr(train, 'train_step', lambda *args, **kw: report(math.nan, math.inf))
    assert 'step 5: loss nan' in refused(tmp_path / 'late', *flags)


# layers that are recomputed


def test_recomputing_layers_changes_no_number_of_a_run(undisturbed, tmp_path):
    assert run(tmp_path, *DROPOUT, '--recompute_layers=2') == 0
    assert_same_run(undisturbed, tmp_path)
    assert info(tmp_path)['all_reduces'] == info(undisturbed)['all_reduces']


@pytest.mark.parametrize('block_type, forward', [('tp', 6 + 2), ('spd', 3), ('parallel', 1)])
def test_recomputing_repeats_the_first_all_reduce_of_a_tp_layer(block_type, forward):
    net, config, world = toy([block_type] * 3, recompute_layers=2)
    net.wrap(3, config, world, print)
    with count_all_reduces() as found:
        train.train_step(net, micro_batches(1, count=1), 1e-3, config, world)
    assert (found.forward, found.backward) == (forward, dict(tp=6, spd=3, parallel=1)[block_type])


# a block that leaves a parameter unused


def test_an_unused_parameter_stays_as_it_is_and_counts_for_nothing(gptj):
    net, config, world = toy(['gptj', 'spd'], grad_clip=0.1)
    unused, batches = net.raw_model.transformer.h[0].ln_2.weight, micro_batches(1)
    loss = sum(net.raw_model(x, y)[1] for x, y in batches) / 2
    used = [p for p in net.raw_model.parameters() if p is not unused]
    norm = torch.cat([grad.flatten() for grad in torch.autograd.grad(loss, used)]).norm().item()
    before = unused.detach().clone()
    assert train.train_step(net, batches, 1e-3, config, world).read()[1] == pytest.approx(norm, rel=1e-5)
    assert torch.equal(unused, before) and unused not in net.optimizer.state
    assert len(net.optimizer.state) == len(used)


def test_a_run_with_an_unused_parameter_is_resumed_to_the_bit(gptj, tmp_path, monkeypatch):
    flags = [*DROPOUT, '--block_types=gptj,spd', '--max_iters=12', '--eval_interval=5']
    assert run(tmp_path / 'a', *flags) == 0
    assert column(tmp_path / 'a', 'val_loss')[12] < column(tmp_path / 'a', 'val_loss')[0]
    with monkeypatch.context() as patch, pytest.raises(Crash):
        stop_at(patch, 7, crash)
        run(tmp_path / 'b', *flags)
    assert run(tmp_path / 'b', *flags, '--init_from=resume') == 0
    assert_same_run(tmp_path / 'a', tmp_path / 'b')
    assert info(tmp_path / 'a')['communications'] == 4


@pytest.fixture
def group(tmp_path):
    """A process group of this process alone."""
    dist.init_process_group('gloo', init_method=f'file://{tmp_path / "store"}', rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_data_parallel_training_does_not_wait_for_an_unused_parameter(gptj, group):
    (net, config, world), (other, *_) = toy(['gptj', 'spd']), toy(['gptj', 'spd'])
    train.freeze_untrained(net.raw_model, train.observe(net.raw_model)[1])
    net.wrap(3, config, world._replace(ddp_group=group), print)
    for seed in range(3):
        results = [train.train_step(one, micro_batches(seed), 1e-3, config, world).read()
                   for one in (net, other)]
        assert results[0] == pytest.approx(results[1], rel=1e-6)


def test_a_sharded_process_trains_without_an_unused_parameter(gptj, group):
    dense, config, world = toy(['gptj', 'spd'])
    sharded = train.Network(shard_model(dense.raw_model, TPGroup(2, rank=0, group=group)), config)
    loss, norm, _ = train.train_step(sharded, micro_batches(1), 1e-3, config, world).read()
    assert math.isfinite(loss) and math.isfinite(norm)
    unused = sharded.raw_model.transformer.h[0].ln_2.weight
    assert torch.equal(unused, torch.ones_like(unused)) and unused not in sharded.optimizer.state


# the learning rate


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
