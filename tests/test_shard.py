"""
Sharded runs: two and four processes, one rank each, against the simulated run.

    python -m pytest tests/test_shard.py
"""

import json
import os
import signal
import subprocess
import sys
from threading import Timer
from pathlib import Path

import pytest

from configurator import ROOT

SMALL = ['config/train_gpt2_8comm.py', 'config/cpu.py', '--n_layer=4', '--max_iters=8', '--eval_interval=4',
         '--eval_tokens=2000', '--log_interval=1', '--gradient_accumulation_steps=2', '--batch_size=4',
         '--block_types=spd,parallel', '--dropout=0.1', '--bias=True']


def launch(processes, script, *args):
    """A bounded run of a script of ours under torchrun, or alone."""
    torchrun = ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={processes}']
    command = [sys.executable, *(torchrun if processes > 1 else []), str(script), *args]
    return subprocess.run(command, cwd=ROOT, env=dict(os.environ, OMP_NUM_THREADS='1'), capture_output=True,
                          text=True, timeout=600)


@pytest.mark.parametrize('processes, tp_size', [(2, 2), (4, 4), (4, 2)], ids=['tp 2', 'tp 4', '2 x tp 2'])
def test_gradients_losses_and_collectives_are_those_of_the_simulated_run(processes, tp_size):
    done = launch(processes, Path(__file__).with_name('shard_process.py'), str(tp_size))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert 'all checks passed' in done.stdout


def metrics(out_dir):
    """The numbers that a run's arithmetic gave, speeds left out."""
    lines = [json.loads(line) for line in (out_dir / 'metrics.jsonl').read_text().splitlines()]
    return [(line['iter'], line.get('train_loss', line.get('val_loss')), line.get('grad_norm', 0))
            for line in lines]


def test_a_checkpoint_goes_from_simulated_to_sharded_and_back(tmp_path):
    assert launch(1, ROOT / 'data/pystdlib/prepare.py').returncode == 0
    for name, stages in {'undisturbed': [(1, 8, '')], 'sharded': [(2, 8, '--shard=True')],
                         'mixed': [(1, 3, ''), (2, 6, '--shard=True'), (1, 8, '--tp_size=4')]}.items():
        for i, (processes, until, flag) in enumerate(stages):
            done = launch(processes, ROOT / 'train.py', *SMALL, f'--out_dir={tmp_path / name}',
                          f'--max_iters={until}', '--lr_decay_iters=8', *[flag] * bool(flag),
                          *['--init_from=resume'] * bool(i))
            assert done.returncode == 0, done.stdout + done.stderr
    undisturbed = metrics(tmp_path / 'undisturbed')
    assert metrics(tmp_path / 'sharded') == [pytest.approx(line, abs=1e-4) for line in undisturbed]
    # the stages end with evaluations of their own, and the last one drifts apart over four ranks, not two
    two_ranks = {line[:1]: line for line in undisturbed if line[0] <= 6 and line[2]}
    assert [line for line in metrics(tmp_path / 'mixed') if line[0] <= 6 and line[2]] == [
        pytest.approx(line, abs=1e-4) for line in two_ranks.values()]
    import torch
    shapes = [{name: p.shape for name, p in torch.load(tmp_path / name / 'ckpt.pt')['model'].items()}
              for name in ('undisturbed', 'sharded')]
    assert shapes[0] == shapes[1]


def process_of(torchrun, process):
    """The pid of one of the processes that a torchrun has started."""
    for pid in Path(f'/proc/{torchrun.pid}/task/{torchrun.pid}/children').read_text().split():
        if f'RANK={process}'.encode() in Path(f'/proc/{pid}/environ').read_bytes().split(b'\0'):
            return int(pid)
    raise AssertionError(f'no process {process}')


@pytest.mark.parametrize('victim', [0, 1])
def test_a_process_that_dies_ends_all_with_one_line(victim, tmp_path):
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2',
               'train.py', *SMALL, '--shard=True', '--max_iters=100000', f'--out_dir={tmp_path}']
    torchrun = subprocess.Popen(command, cwd=ROOT, env=dict(os.environ, OMP_NUM_THREADS='1'),
                                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    watchdog = Timer(200, torchrun.kill)
    watchdog.daemon = True
    watchdog.start()
    for line in torchrun.stdout:
        if line.startswith('step 4:'):
            break
    os.kill(process_of(torchrun, victim), signal.SIGKILL)
    said = torchrun.communicate(timeout=90)[0].splitlines()
    ours = [line for line in said if line.startswith('error:')]
    assert len(ours) == 1 and f'lost touch with process {victim} of 2' in ours[0], '\n'.join(said)
    assert torchrun.returncode == 1


@pytest.mark.parametrize('flags, words', [
    (['--shard=True'], 'multiple of tp_size'),
    (['--tp_across_nodes=True'], 'with --shard=True only'),
    (['--shard=True', '--tp_size=1', '--dtype=float16'], 'float16'),
])
def test_a_wrong_launch_is_refused_in_one_line(flags, words, monkeypatch):
    import train
    from configurator import load
    with pytest.raises(SystemExit) as stopped:
        train.find_place(load(['config/cpu.py', *flags]))
    assert words in stopped.value.code and '\n' not in stopped.value.code


@pytest.mark.parametrize('local_rank, index', [(None, 0), ('3', 3)])
def test_a_process_names_its_gpu_by_number(local_rank, index, monkeypatch):
    import torch
    import train
    from configurator import load
    zeros, chosen = torch.zeros, []

    def set_device(device):             # torch's own takes a number or a device that has one
        assert device.index is not None
        chosen.append(device.index)

    if local_rank:
        monkeypatch.setenv('LOCAL_RANK', local_rank)
    monkeypatch.setattr(torch, 'zeros', lambda *shape, device: zeros(*shape))
    monkeypatch.setattr(torch.cuda, 'set_device', set_device)
    monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda **_: True)
    assert train.find_place(load(['config/train_gpt2.py'])).device.index == index
    assert chosen == [index]


def test_a_compiled_shard_has_the_simulated_gradients(tmp_path):
    """Every all-reduce in a compiled backward pass happens: a group of itself sums what simulating sums."""
    import torch
    import torch.distributed as dist
    from model import GPT, GPTConfig, Ranks
    torch.manual_seed(0)
    dense = GPT(GPTConfig(block_size=6, vocab_size=32, n_layer=1, n_head=2, n_embd=8, block_types=['spd']))
    idx = torch.randint(32, (3, 6))
    dense(idx, idx)[1].backward()
    dist.init_process_group('gloo', init_method=f'file://{tmp_path / "store"}', rank=0, world_size=1)
    try:
        shard = dense.shard(Ranks(2, 2, group=dist.group.WORLD))
        torch.compile(shard, backend='aot_eager')(idx, idx)[1].backward()
    finally:
        dist.destroy_process_group()
    for name, p in dense.named_parameters():
        torch.testing.assert_close(shard.get_parameter(name).grad, p.grad, msg=name)


@pytest.mark.parametrize('nodes, groups', [('2', [[0, 2], [1, 3]]), ('4', [[0, 1], [2, 3]])])
def test_groups_across_nodes_take_one_process_of_each(nodes, groups, monkeypatch):
    import train
    from configurator import load
    monkeypatch.setenv('GROUP_WORLD_SIZE', nodes)
    config = load(['config/cpu.py', '--shard=True', '--tp_across_nodes=True'])
    assert train.tensor_parallel_groups(config, 4) == groups
