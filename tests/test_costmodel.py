"""
The cost model: its arithmetic by hand, its fit, and the all-reduces that it expects in a step.

    python -m pytest tests/test_costmodel.py
"""

from types import SimpleNamespace

import pytest
import torch

from configurator import load
from model import GPT, GPTConfig
from speed import costmodel
from speed.costmodel import Cluster, Link, Message

RUNS = {24: 24, 18: 18, 16: 16, 12: 12, 8: 7, 6: 5, 2: 1}  # communications, all-reduces each way


def test_fit_finds_alpha_and_beta():
    link = Link(alpha=3e-4, beta=2.5e7)
    points = [(size, link.seconds(size)) for size in costmodel.SIZES]
    assert costmodel.fit(points) == pytest.approx(link, rel=1e-6)
    noisy = [(size, seconds * (1.1 if i % 2 else 0.9)) for i, (size, seconds) in enumerate(points)]
    assert costmodel.fit(noisy) == pytest.approx(link, rel=0.15)


@pytest.mark.parametrize('link, points', [(Link(0.6, 1e6), 11), (Link(1e-3, 1e4), 4), (Link(1e-5, 1e9), 16)])
def test_a_link_is_measured_until_the_size_of_a_message_shows(link, points, monkeypatch):
    clock = [0.0]

    def all_reduce(message, reduction, group):
        clock[0] += link.seconds(message.nbytes)
    monkeypatch.setattr(costmodel.dist, 'all_reduce', all_reduce)
    monkeypatch.setattr(costmodel, 'time', SimpleNamespace(perf_counter=lambda: clock[0]))
    measured = costmodel.sweep(None, 'cpu')
    assert len(measured) == points and costmodel.fit(measured) == pytest.approx(link, rel=1e-3)


def test_a_link_on_which_no_size_shows_is_refused():
    with pytest.raises(SystemExit, match='1024 to 2048 bytes took 0.5 to 0.4 s; measure again'):
        costmodel.fit([(1024, 0.5), (2048, 0.4)])


def test_a_step_is_its_compute_and_each_all_reduce_on_its_link():
    messages = [Message('forward', 1000), Message('forward', 1000), Message('average', 600)]
    links = dict(tp=Link(0.5, 100.0), ddp=Link(0.25, 200.0))
    assert costmodel.predict(2.0, messages, links) == 2.0 + 2 * (0.5 + 10.0) + (0.25 + 3.0)
    assert costmodel.by_kind(messages)['forward'] == [2, 2000]


def test_a_ring_sends_twice_all_but_its_own_part():
    assert costmodel.ring(2, 1e-3, 1e6) == pytest.approx((2e-3, 1e6))
    assert costmodel.ring(4, 1e-3, 1e6) == pytest.approx((6e-3, 1e6 * 4 / 6))


@pytest.mark.parametrize('path, all_reduces', [
    *[(f'train_gpt2_{communications}comm.py', all_reduces) for communications, all_reduces in RUNS.items()],
    ('rivals/train_gpt2_12comm_attn.py', 12), ('rivals/train_gpt2_2comm_mean.py', 1),
])
def test_the_streams_all_reduces_are_those_of_the_table(path, all_reduces):
    config = load([f'config/{path}'])
    kinds = costmodel.by_kind(costmodel.design_messages(config, 4))
    # 480 windows over 4 data-parallel processes, 12 in a micro-batch; bfloat16
    expected = [10 * all_reduces, 10 * all_reduces * 12 * 1024 * 768 * 2]
    assert kinds['forward'] == kinds['backward'] == expected
    wte, wpe, layer_norms = 50304 * 768, 1024 * 768, 25 * 768
    assert kinds['gradients'] == [1, 4 * (wte + wpe + layer_norms)]
    assert kinds['average'] == [1, 4 * (wte + wpe + layer_norms + 12 * 12 * 768**2 // 2)]


def test_predicted_seconds_by_hand():
    keys = vars(load(['config/train_gpt2_2comm.py', 'config/cpu.py', '--n_layer=1', '--block_types=parallel',
                      '--batch_size=4']))
    cluster = Cluster(gbit=8, latency_us=100, nodes=2, gpus=4, node_gbit=80, node_latency_us=10, gpu_tflops=1)
    C, V, T = 64, 512, 64
    tokens, replicated, sharded = 4 * T, (V + T + 3) * C, 12 * C * C
    # two groups of two share a node's GB/s; the average stays inside a node, at 10 GB/s
    tp, ddp, everyone = Link(2e-4, 5e8), Link(2e-5, 1e10), Link(6e-4, 1e9 * 4 / 6)
    mine = tokens // 2
    flops = 6 * (sharded + (V + 3) * C) + 12 * C * T
    expected = flops * tokens / 4e12 + sum((
        2 * tp.seconds(4 * mine * C), tp.seconds(4 * mine), tp.seconds(8 * mine), tp.seconds(4 * mine * C),
        tp.seconds(4 * replicated), tp.seconds(4), ddp.seconds(4 * (replicated + sharded // 2)),
        everyone.seconds(8)))
    assert costmodel.predicted_seconds(keys, cluster, vocab_size=V) == pytest.approx(expected, rel=1e-9)

    dense = flops * tokens / 4e12 + Link(6e-4, 1e9 * 4 / 6).seconds(4 * (replicated + sharded))
    seconds = costmodel.predicted_seconds(dict(keys, tp_size=1), cluster, vocab_size=V)
    assert seconds == pytest.approx(dense + everyone.seconds(8), rel=1e-9)


def test_a_predicted_text_by_hand():
    keys = vars(load(['config/train_gpt2_12comm.py', 'config/cpu.py', '--n_layer=3', '--block_types=ladder',
                      '--dtype=bfloat16']))
    cluster, text = Cluster(gbit=8, gpu_tflops=1, memory_gbs=100), SimpleNamespace(batch=2, prompt=10, new=4)
    C, V = 64, 512
    first, token = costmodel.foresee_text(SimpleNamespace(**keys), cluster, text, vocab_size=V)
    blocks, head = 3 * (12 * C * C // 2 + 2 * C), V * C  # of one of two ranks
    assert token[0] == pytest.approx(2 * (blocks + head + 2 * 2 * 12 * 3 * C // 2) / 100e9)
    assert first[0] == pytest.approx((4 * (10 * blocks + head) + 8 * 10 * 5 * 3 * C // 2) / 1e12)
    behind = blocks / (blocks + head) / 6
    assert sorted(token[1]) == [Message('forward', 2 * 2 * C, 0.0)] + [
        Message('forward', 2 * 2 * C, pytest.approx(behind))] * 4
    assert sorted(first[1]) == [Message('forward', 10 * 2 * 2 * C, 0.0)] + [
        Message('forward', 10 * 2 * 2 * C, pytest.approx(1 / 6))] * 4
    took = costmodel.predict(*token, dict(tp=Link(1.0, 1e9)))
    assert took == pytest.approx(token[0] * (1 - 4 * behind) + 5 * (1 + 256e-9))


def test_a_one_shot_all_reduce_is_a_message_of_the_stream():
    model = GPT(GPTConfig(block_size=8, vocab_size=16, n_layer=1, n_head=2, n_embd=8))
    watching = costmodel.Collectives(model, behind={})

    def one_shot(buffer, how, group):
        return buffer
    one_shot.namespace = 'symm_mem'
    watching.in_forward = True
    watching.__torch_dispatch__(one_shot, (), (torch.ones(3, 1, 8), 'sum', 'group'))
    assert watching.messages == [Message('forward', 4 * 3 * 8)]


def test_groups_inside_a_node_leave_its_network_to_the_average():
    links = Cluster(gbit=8, latency_us=100, nodes=2, gpus=8).links(tp_size=4, across=False)
    assert links['tp'] == pytest.approx((6 * 5e-6, 450e9 * 4 / 6))
    assert links['ddp'] == pytest.approx((2 * 1e-4, 1e9 / 4))  # four pairs over one network


def test_a_nodes_network_is_shared_by_the_groups_on_it_if_there_are_more_nodes_than_ranks():
    links = Cluster(gbit=8, latency_us=100, nodes=4, gpus=8).links(tp_size=2, across=True)
    assert links['tp'] == pytest.approx((2 * 100e-6, 1e9 / 2))  # each node has a rank of two groups
    assert links['ddp'] == pytest.approx((2 * 3 * 100e-6, 1e9 * 4 / 6))  # and two of one ddp group


def test_a_tp_size_that_does_not_divide_the_gpus_is_refused():
    with pytest.raises(ValueError, match='must divide 8 GPUs'):
        costmodel.foresee(load(['config/train_gpt2_12comm.py', '--tp_size=12']), Cluster(gbit=1))


@pytest.mark.parametrize('change, words', [
    (dict(gbit=0), 'gbit is 0'), (dict(gpus=7), 'gpus is 7'), (dict(latency_us=float('nan')), 'latency_us'),
])
def test_a_cluster_that_cannot_be_is_refused(change, words):
    with pytest.raises(ValueError, match=words):
        Cluster(**dict(gbit=1) | change)


def test_a_tp_size_that_fits_no_node_is_refused():
    with pytest.raises(ValueError, match='tp_size is 4, it must divide 2 nodes'):
        Cluster(gbit=1).links(tp_size=4, across=True)
    with pytest.raises(ValueError, match='tp_size is 6, it must divide 4 GPUs of a node'):
        Cluster(gbit=1).links(tp_size=6, across=False)


@pytest.mark.parametrize('flags, words', [
    (['config/train_gpt2_2comm.py'], '--gbit'),
    (['config/train_gpt2_2comm.py', '--gbit=fast'], 'fast'),
    (['config/train_gpt2_2comm.py', '--gbit=1', '--decode', '--batch=0'], '--batch is 0'),
    (['config/train_gpt2.py', '--gbit=1'], 'tp_size is 1 in every config'),
    (['config/train_gpt2_2comm.py', '--gbit=1', '--gpus=14'], '480 windows'),
    (['--gbit=1', 'config/train_gpt2_2comm.py', '--nodse=2'], 'nodse'),
])
def test_the_command_refuses_in_one_line(flags, words):
    with pytest.raises(SystemExit) as stopped:
        costmodel.main(flags)
    assert words in stopped.value.code and '\n' not in stopped.value.code


def test_rows_are_named_after_the_blocks_that_flags_give_them(capsys):
    costmodel.main(['config/train_gpt2.py', 'config/train_gpt2_24comm.py', '--with', 'config/cpu.py',
                    '--gbit=1', '--n_layer=2', '--block_types=spd', '--gpus=4'])
    table = capsys.readouterr().out.split('speed-up\n')[1].split('\n\n')[0]
    assert [line[:28].strip() for line in table.splitlines()] == ['dense', 'tp x 2', 'spd x 2']


def test_the_command_says_what_fewer_all_reduces_gain(capsys):
    costmodel.main(['config/train_gpt2_2comm.py', 'config/train_gpt2_24comm.py', '--gbit=25'])
    across, inside = capsys.readouterr().out.split('tensor-parallel groups')[1:]
    names = ['dense', 'gpt2-124M-24comm', 'gpt2-124M-2comm']  # by all-reduces, whatever the order given
    assert [line.split()[0] for line in across.splitlines()[2:5]] == names
    config = load(['config/train_gpt2_2comm.py'])
    for text, layout in (across, True), (inside, False):
        times = [costmodel.predicted_seconds(load([f'config/train_gpt2_{n}comm.py']), Cluster(25), layout)
                 for n in (24, 2)]
        line = next(line for line in text.splitlines() if line.startswith(config.wandb_run_name))
        assert line.split()[-1] == f'{times[0] / times[1]:.3f}'
