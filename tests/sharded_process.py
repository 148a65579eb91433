"""
What each process of test_sharded.py's launches does, and how they are launched.

`measure` writes what one process of a group saw, to be judged by the test that has the simulated run's numbers
from the same functions. It is no test itself: what fails in here fails the launch.
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
from model import GPT, count_all_reduces, join_shards  # noqa: E402

B, T, V = 2, 5, 29                      # V divides by neither tp_size
STEPS = 20
ALONE = dict(RANK='0', LOCAL_RANK='0', WORLD_SIZE='1', GROUP_WORLD_SIZE='1')

# processes are forked from a server that has imported torch already: a launch takes no seconds
context = multiprocessing.get_context('forkserver')
context.set_forkserver_preload(['pytest', 'train', 'sharded_process'])


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


def launch(folder, processes, target, *args, timeout=60, **environment):
    """
    Runs target(*args) in so many processes in torchrun's environment. Once one fails the others are killed, as
    torchrun does, and all are at the timeout, in seconds.

    Returns (exit status of the first to end badly or 0, stdout of all, stderr of all).
    """
    folder.mkdir(parents=True, exist_ok=True)
    common = dict(ALONE, WORLD_SIZE=str(processes), MASTER_ADDR='127.0.0.1', MASTER_PORT=free_port()) | environment
    started = []
    for i in range(processes):
        mine = common | dict(RANK=str(i), LOCAL_RANK=str(i))
        started.append(context.Process(target=begin, args=(mine, folder / f'process{i}', target, args)))
        started[-1].start()
    deadline, running, status = time.monotonic() + timeout, list(started), 0
    while running and not status:
        wait([process.sentinel for process in running], max(0, deadline - time.monotonic()))
        ended = [process for process in running if process.exitcode is not None]
        status = next((process.exitcode for process in ended if process.exitcode), 0 if ended else 'timeout')
        running = [process for process in running if process not in ended]
    for process in running:
        process.kill()
    for process in started:
        process.join()
    texts = [''.join((folder / f'process{i}.{name}').read_text() for i in range(processes)) for name in ('out', 'err')]
    return status, *texts


# the numbers of a run: simulated where `ranks` is None


def config_of(name, tp_size, bias, *flags):
    """The table's config at small width."""
    path = ROOT / f'config/train_gpt2{name and "_" + name}.py'
    return load([str(path), str(ROOT / 'config/cpu.py'), '--n_embd=16', '--n_head=4', f'--block_size={T + 1}',
                 f'--tp_size={tp_size}', f'--bias={bias}', '--grad_clip=0.5', f'--max_iters={STEPS}',
                 '--warmup_iters=3', *flags])


def network(config, place, ranks, ddp_group, dtype):
    """
    What train.py trains, from its initial weights. In float64 they are moved far from these: no bias 0, no gain 1.
    """
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
    """This process's share of a step's n micro-batches, (B, T) each; some targets are ignored."""
    generator = torch.Generator().manual_seed(step % 3)
    x, y = torch.randint(V, (2, n, B, T), generator=generator)
    y[:, 0, 1] = y[-1, 1, 2:] = -1
    mine = slice(place.ddp_rank * n // place.ddp_size, (place.ddp_rank + 1) * n // place.ddp_size)
    return list(zip(x[mine], y[mine]))


def train_some(config, place, ranks, ddp_group):
    """(loss, grad norm) of STEPS float32 steps of two micro-batches, (STEPS, 2)."""
    net, seen = network(config, place, ranks, ddp_group, torch.float32), []
    for step in range(STEPS):
        lr = train.learning_rate(step, config)
        seen.append(train.train_step(net, batches(step, 2, place), lr, config, place)[:2])
    return torch.tensor(seen)


def first_step(config, place, ranks, ddp_group):
    """
    The first float64 step, of four micro-batches: the dense network's gradients as the optimizer gets them, with
    loss and norm. And what the network says before it: the loss in eval mode, the logits.
    """
    net, seen = network(config, place, ranks, ddp_group, torch.float64), {}

    def keep_gradients(*_):
        for name, p in net.raw.named_parameters():
            seen[name] = join_shards(name, p.grad, net.raw.ranks).clone()

    steps = batches(0, 4, place)
    with torch.no_grad():
        net.raw.eval()
        seen['eval loss'], seen['logits'] = net.raw(*steps[-1])[1], net.raw(steps[-1][0])[0]
        net.raw.train()
    net.optimizer.register_step_pre_hook(keep_gradients)
    torch.manual_seed(3)                # dropout's masks
    loss, norm, _ = train.train_step(net, steps, 1e-3, config, place)
    return seen | {'loss': torch.tensor(loss), 'norm': torch.tensor(norm)}


# what really went over the wire


class Messages(TorchDispatchMode):
    """Records torch.distributed's collectives: (operation, shape, dtype, the processes among which)."""

    def __init__(self):
        super().__init__()
        self.sent = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == 'c10d':
            group = next(dist.ProcessGroup.unbox(a) for a in args if isinstance(a, torch.ScriptObject)
                         and 'ProcessGroup' in str(a._type()))
            for tensor in args[0]:
                self.sent.append((func.overloadpacket.__name__, tuple(tensor.shape), tensor.dtype,
                                  tuple(dist.get_process_group_ranks(group))))
        return func(*args, **(kwargs or {}))


def communicate(config, place, ranks, ddp_group):
    """Every message of one micro-batch and of a whole step, by phase, beside f_op's and g_op's own count."""
    net = network(config, place, ranks, ddp_group, torch.float32)
    (x, y), = batches(0, 2, place)[:1]
    phases = {name: Messages() for name in ('forward', 'backward', 'gradients', 'step')}
    with count_all_reduces() as counted:
        with phases['forward'], train.autocast(config, place):
            loss = net.raw(x, y)[1]
        with phases['backward']:
            loss.backward()
    with phases['gradients']:
        net.raw.sum_replicated_gradients()
        net.raw.gradient_norm()
    with phases['step']:
        train.train_step(net, batches(0, 4, place), 1e-3, config, place)
    sent = {name: messages.sent for name, messages in phases.items()}
    return sent | {'counted': (counted.forward, counted.backward)}


def measure(folder, tp_size, names):
    """All of the above for each config, with bias and without, as one process of a sharded run."""
    seen = {}
    for name in names:
        for bias in (False, True):
            config = config_of(name, tp_size, bias, '--shard=True')
            place = train.find_place(config)
            if not dist.is_initialized():
                ranks, ddp_group = train.connect(config, place)
            here = place, ranks, ddp_group
            seen[name, bias, 'first step'] = first_step(config, *here)
