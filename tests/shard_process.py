"""
One process of a sharded group, started by test_shard.py: what it computes must be what simulating gives.

    torchrun --standalone --nproc_per_node=4 tests/shard_process.py TP_SIZE
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

import train  # noqa: E402
from configurator import ROOT, load  # noqa: E402
from model import GPT, count_all_reduces, join_shards  # noqa: E402

B, T, C, V, STEPS = 2, 5, 16, 29, 20    # no tp_size divides V; so the vocabulary shards are uneven
CONFIGS = ['_24comm', '_18comm', '_16comm', '_12comm', '_8comm', '_6comm', '_2comm']


class Collectives(TorchDispatchMode):
    """Every all-reduce that reaches torch.distributed: the shape and dtype of its message."""

    def __init__(self):
        super().__init__()
        self.messages = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == 'c10d' and 'allreduce' in str(func):
            self.messages.append((tuple(args[0][0].shape), args[0][0].dtype))
        return func(*args, **(kwargs or {}))


def network(config, ranks, ddp_group, place, dtype):
    torch.manual_seed(config.seed)
    dense = GPT(train.model_config_of(config, V))
    with torch.no_grad():
        for p in dense.parameters():    # no bias is 0 and no gain 1
            p.add_(0.1 * torch.randn_like(p))
    net = train.Network((dense if ranks is None else dense.shard(ranks)).to(dtype), config)
    net.wrap(B, ddp_group, config, place, print)
    return net


def batches(step, place, n=2):
    """This process's share of a step's n micro-batches (B, T)."""
    x, y = torch.randint(V, (2, n, B, T), generator=torch.Generator().manual_seed(step))
    share = n // place.ddp_size
    mine = slice(place.ddp_rank * share, (place.ddp_rank + 1) * share)
    return list(zip(x[mine], y[mine]))


def gradients(net, place, config):
    """The gathered gradient that the optimizer gets in a first step, by parameter."""
    seen = {}
    net.optimizer.register_step_pre_hook(lambda *_: seen.update(
        {name: join_shards(name, p.grad, net.raw.ranks).clone() for name, p in net.raw.named_parameters()}))
    torch.manual_seed(3)                # dropout's masks
    train.train_step(net, batches(0, place, 4), 1e-3, config, place)
    return seen


def check_config(name, bias, tp_size, place, ranks, ddp_group):
    config = load([str(ROOT / f'config/train_gpt2{name}.py'), str(ROOT / 'config/cpu.py'), f'--tp_size={tp_size}',
                   '--n_embd=16', '--n_head=4', f'--block_size={T}', f'--bias={bias}', '--grad_clip=0.1',
                   '--dropout=0.1', '--shard=True'])
    alone = train.Place(0, 1, [[0]], place.device)
    two = (config, ranks, ddp_group, place), (config, None, None, alone)

    # dropout draws by data-parallel process, so its masks agree with one process's where there is one
    config.dropout = 0.1 if place.ddp_size == 1 else 0.0
    ours, theirs = (gradients(network(*args, torch.float64), args[3], config) for args in two)
    for key, simulated in theirs.items():
        far = (ours[key] - simulated).abs().max() / simulated.abs().max().clamp(min=1e-12)
        assert far < 1e-9 or (simulated.abs().max() < 1e-12), f'{name} bias {bias}: {key} is off by {far}'

    config.dropout = 0.0
    nets = [network(*args, torch.float32) for args in two]
    for step in range(STEPS):
        ours, theirs = (train.train_step(net, batches(step, args[3]), 1e-3, config, args[3])[:2]
                        for net, args in zip(nets, two))
        assert max(abs(a - b) for a, b in zip(ours, theirs)) < 1e-4, f'{name} step {step}: {ours}, {theirs}'

    raw = network(config, ranks, None, place, torch.float32).raw
    x, y = torch.zeros(2, B, T, dtype=torch.long)
    for dtype in (torch.float32, torch.bfloat16):
        with count_all_reduces() as observed, Collectives() as forward, torch.autocast(
                'cpu', dtype, enabled=dtype != torch.float32):
            loss = raw(x, y)[1]
        with count_all_reduces() as backward, Collectives() as back:
            loss.backward()
        stream = (B, T, C), dtype
        assert forward.messages.count(stream) == observed.forward, f'{name} forward {forward.messages}'
        # the head's conjugate sends one more, (B*T, C)
        assert back.messages.count(stream) == backward.backward == observed.forward, f'{name} {back.messages}'
        assert {shape for shape, _ in back.messages} == {(B, T, C), (B * T, C)}
        assert {shape for shape, _ in forward.messages} == {(B, T, C), (B * T,), (2, B * T)}


def main(tp_size):
    config = load([str(ROOT / 'config/cpu.py'), '--shard=True', '--n_head=4', f'--tp_size={tp_size}'])
    place = train.find_place(config)
    ranks, ddp_group = train.connect(config, place)
    for i, name in enumerate(CONFIGS):
        check_config(name, i % 2 == 0, tp_size, place, ranks, ddp_group)
    train.disconnect(place)
    print('all checks passed')


if __name__ == '__main__':
    torch.set_num_threads(1)
    main(int(sys.argv[1]))
