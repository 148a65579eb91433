"""
Repair: the loss against a dense teacher, layers that are trained alone, and runs that do both.

    python -m pytest tests/test_distill.py
"""

import shutil

import pytest
import torch
import torch.nn.functional as F

from model import GPT
from toy_runs import TINY, assert_same_run, info, metrics, micro_batches, refused, run, toy
from train import Network, train_step
from training import checkpoint
from training.distill import Distilled, divergence, find_teacher
from training.optimizer import gradient_norm

REPAIR = [*TINY, '--tp_size=4', '--distill=True', '--distill_weight=0.5', '--distill_temperature=2',
          '--train_layers=3,1', '--eval_interval=2']


@pytest.mark.parametrize('temperature', [1.0, 2.5])
def test_the_divergence_is_that_of_its_definition(temperature):
    logits, wanted = 3 * torch.randn(2, 5, 7, dtype=torch.float64)
    logits.requires_grad_()
    q, p = ((x / temperature).exp() / (x / temperature).exp().sum(-1, keepdim=True) for x in (logits, wanted))
    direct = temperature**2 * (p * (p / q).log()).sum() / 5
    found = divergence(logits, wanted, temperature)
    torch.testing.assert_close(found, direct, rtol=1e-12, atol=0)
    found.backward()
    torch.testing.assert_close(logits.grad, temperature * (q - p) / 5, rtol=1e-10, atol=1e-14)


def test_a_net_that_equals_its_teacher_has_nothing_to_learn():
    net, config, world = toy(['tp'] * 3, distill=True)
    teacher = find_teacher(config, net.raw_model.config, net.raw_model.state_dict(), world)
    (x, y), = micro_batches(1, 1)
    distilled = Distilled(net.raw_model, teacher.model, temperature=2.0)
    loss = distilled.train()(x, y)[1]
    loss.backward()
    assert loss.item() == 0 and gradient_norm(net.raw_model) < 1e-6
    text = net.raw_model(x, y)[1]
    assert distilled.eval()(x, y)[1].item() == text.item() > 1


def test_the_loss_is_weighed_against_the_texts_and_leaves_the_teacher_alone():
    net, config, world = toy(['spd', 'parallel'])
    model = GPT(net.raw_model.config)
    weights = model.state_dict()
    teacher = find_teacher(config, model.config, weights, world)
    assert teacher is None
    config.distill = True
    teacher = find_teacher(config, model.config, weights, world).model
    (x, y), = micro_batches(1, 1)
    distilled = Distilled(net.raw_model, teacher, temperature=2.0, weight=0.25).train()
    logits, wanted = (net_(x)[0].flatten(0, 1) for net_ in (net.raw_model, teacher))
    text = F.cross_entropy(logits, y.flatten())
    torch.testing.assert_close(distilled(x, y)[1], 0.25 * divergence(logits, wanted, 2.0) + 0.75 * text)
    distilled(x, y)[1].backward()
    assert not teacher.training and all(p.grad is None for p in teacher.parameters())
    assert teacher.config.block_types == ['tp', 'tp'] and teacher.config.tp_size == 1
    torch.testing.assert_close(dict(teacher.state_dict()), dict(weights), rtol=0, atol=0)


def test_a_student_comes_closer_to_its_teacher():
    net, config, world = toy(['spd', 'parallel'], distill=True)
    torch.manual_seed(2)
    weights = GPT(net.raw_model.config).state_dict()
    net = Network(net.raw_model, config, find_teacher(config, net.raw_model.config, weights, world))
    losses = [train_step(net, micro_batches(1), 1e-2, config, world).read()[0] for _ in range(8)]
    assert losses[-1] < 0.8 * losses[0]


def test_a_repair_resumes_to_the_bit_and_leaves_frozen_layers_as_they_are(dense, tmp_path, capsys):
    source = shutil.copy(dense, tmp_path / 'dense.pt')
    flags, again = [*REPAIR, f'--init_from={source}'], [*REPAIR, '--max_iters=4', '--init_from=resume']
    assert run(tmp_path / 'whole', *flags, '--max_iters=4') == 0
    assert run(tmp_path / 'halves', *flags, '--max_iters=2', '--lr_decay_iters=4') == 0
    source.rename(tmp_path / 'away')
    message = refused(tmp_path / 'halves', *again)
    assert str(source) in message and 'is gone' in message
    assert run(tmp_path / 'halves', *again, '--eval_only=True') == 0  # which needs no teacher
    shutil.copy(tmp_path / 'halves/ckpt.pt', source)
    saved = checkpoint.load(source)
    saved['config']['block_types'] = ['tp'] * 4
    torch.save(saved, source)
    assert 'have changed' in refused(tmp_path / 'halves', *again)
    shutil.copy(dense, source)
    assert run(tmp_path / 'halves', *again) == 0
    assert_same_run(tmp_path / 'halves', tmp_path / 'whole')

    saved, weights = checkpoint.load(tmp_path / 'whole/ckpt.pt'), checkpoint.load(dense)['model']
    assert saved['teacher_sha256'] == info(tmp_path / 'whole')['teacher_sha256'] is not None
    trained = {name for name in weights if not torch.equal(weights[name], saved['model'][name])}
    assert trained == {name for name in weights if name.startswith(('transformer.h.1.', 'transformer.h.3.'))}
    assert len(saved['optimizer']['state']) == len(trained)
    capsys.readouterr()
    plain = [*TINY, '--tp_size=4', f'--init_from={tmp_path}/whole/ckpt.pt', '--eval_only=True']
    assert run(tmp_path / 'plain', *plain) == 0  # val_loss is the text's
    assert f'val loss {metrics(tmp_path / "whole")[-1]["val_loss"]:.6f}' in capsys.readouterr().out


def test_what_cannot_teach_is_refused(undisturbed, dense, tmp_path):
    flags = [*REPAIR, f'--init_from={undisturbed}/ckpt.pt']
    assert 'not dense: it was trained with tp, spd, parallel, spd' in refused(tmp_path, *flags)
    assert 'init_from is scratch' in refused(tmp_path, *REPAIR)
    assert 'gone.pt' in refused(tmp_path, *REPAIR, '--init_from=gone.pt')
