"""
What the processes that test_sharded.py starts do, and how they are started.

`measure` writes down what one process of a sharded group sees. The tests judge that by the simulated run's
numbers, which come from the same functions with `ranks` None. What fails in a process fails its launch.
"""
import multiprocessing
import os
import socket
import sys
import time
from multiprocessing.connection import wait
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

import train  # noqa: E402
from configurator import load  # noqa: E402
from model import GPT, count_all_reduces, join_shards, take_shard  # noqa: E402

B, T, V = 2, 5, 29                      # no tp_size divides V
STEPS = 20

# processes are forked from a server that has imported all of this: a launch takes no seconds
PATHS = os.pathsep.join([str(ROOT), str(ROOT / 'tests')])
context = multiprocessing.get_context('forkserver')
context.set_forkserver_preload(['pytest', 'sharded_process'])


def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return str(s.getsockname()[1])


def begin(environment, output, target, args):
    os.environ.update(environment)
    for stream, name in ((1, 'out'), (2, 'err')):
        os.dup2(os.open(f'{output}.{name}', os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    os.chdir(ROOT)
    torch.set_num_threads(1)
    target(*args)


def launch(folder, processes, target, *args, timeout=60):
    """
    Runs target(*args) in so many processes with torchrun's environment. Like torchrun it kills the others once
    one has failed; and all of them after `timeout` seconds.

    Returns (status, stdout, stderr): the exit status of the first to fail, 0 if none did, None after a timeout.
    """
    folder.mkdir(parents=True, exist_ok=True)
    environment = dict(WORLD_SIZE=str(processes), MASTER_ADDR='127.0.0.1', MASTER_PORT=free_port())
    os.environ.setdefault('PYTHONPATH', PATHS)      # the server's
    started = []
    for i in range(processes):
        mine = environment | dict(RANK=str(i), LOCAL_RANK=str(i))
        started.append(context.Process(target=begin, args=(mine, folder / f'process{i}', target, args)))
        started[-1].start()
    deadline, status = time.monotonic() + timeout, 0
    while status == 0 and (running := [process for process in started if process.exitcode is None]):
        if not wait([process.sentinel for process in running], deadline - time.monotonic()):
            status = None
        status = next((process.exitcode for process in started if process.exitcode), status)
    for process in started:
        process.kill()
        process.join()
    out, err = (''.join((folder / f'process{i}.{name}').read_text() for i in range(processes))
                for name in ('out', 'err'))
    return status, out, err


# the numbers of a run, simulated where `ranks` is None


def config_of(name, tp_size, bias, *flags):
    """A config of design.md's table at small width."""
    files = [str(ROOT / f'config/train_gpt2{name}.py'), str(ROOT / 'config/cpu.py')]
    return load([*files, '--n_embd=16', '--n_head=4', f'--block_size={T + 1}', f'--tp_size={tp_size}',
                 f'--bias={bias}', f'--max_iters={STEPS}', '--warmup_iters=3', '--grad_clip=0.1', *flags])


def network(config, place, ranks, ddp_group, dtype):
    """What train.py trains, from its initial weights; in float64 from others: no bias is 0, no gain 1."""
    torch.manual_seed(config.seed)
    dense = GPT(train.model_config_of(config, V))
    if dtype == torch.float64:
        with torch.no_grad():
            for p in dense.parameters():
                p.add_(0.2 * torch.randn_like(p))
    net = train.Network((dense if ranks is None else dense.shard(ranks)).to(dtype), config)
    net.wrap(B, ddp_group, config, place, print)
    return net


def batches(step, n, place):
    """This process's share of a step's n micro-batches, (B, T) each. Some targets are ignored."""
    generator = torch.Generator().manual_seed(step % 3)
    x, y = torch.randint(V, (2, n, B, T), generator=generator)
    y[:, 0, 1] = y[-1, 1, 2:] = -1
    share = n // place.ddp_size
    return list(zip(x, y))[place.ddp_rank * share:][:share]


def training(config, place, ranks, ddp_group):
    """(loss, grad norm) of float32 steps of two micro-batches, (STEPS, 2), and the weights they end with."""
    net, seen = network(config, place, ranks, ddp_group, torch.float32), []
    for step in range(STEPS):
        lr = train.learning_rate(step, config)
        seen.append(train.train_step(net, batches(step, 2, place), lr, config, place)[:2])
    return {'steps': torch.tensor(seen)} | {name: p.detach() for name, p in net.raw.named_parameters()}


def first_step(config, place, ranks, ddp_group):
    """A clipped float64 step of four micro-batches: loss, norm, and the gradients that the optimizer gets."""
    net, seen = network(config, place, ranks, ddp_group, torch.float64), {}

    def keep_gradients(*_):
        seen.update((name, p.grad.clone()) for name, p in net.raw.named_parameters())

    net.optimizer.register_step_pre_hook(keep_gradients)
    torch.manual_seed(3)                # dropout's masks
    loss, norm, _ = train.train_step(net, batches(0, 4, place), 1e-3, config, place)
    return seen | {'loss': torch.tensor(loss), 'norm': torch.tensor(norm)}


def answers(config, place, ranks, ddp_group):
    """The loss in eval mode and the logits, in float64: of the same batch for all."""
    raw = network(config, place, ranks, ddp_group, torch.float64).raw.eval()
    x, y = batches(0, 4, place._replace(groups=[place.groups[0]]))[-1] if False else batches(0, 4, place)[-1]
    with torch.no_grad():
        return {'loss': raw(x, y)[1], 'logits': raw(x)[0]}
