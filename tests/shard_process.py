"""
One process of a sharded group, started by test_shard.py: what it computes must be what simulating gives.

    torchrun --standalone --nproc_per_node=4 tests/shard_process.py TP_SIZE
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

import train  # noqa: E402
from configurator import ROOT, RUNS, load  # noqa: E402
from speed.costmodel import by_kind, design_messages, observe_step  # noqa: E402
from model import GPT, join_shards  # noqa: E402

B, T, C, V, STEPS = 2, 5, 16, 29, 20    # no tp_size divides V; so the vocabulary shards are uneven


def network(config, ranks, ddp_group, place, dtype):
    torch.manual_seed(config.seed)
    dense = GPT(train.model_config_of(config, V))
    with torch.no_grad():
        for p in dense.parameters():    # no bias is 0 and no gain 1
            p.add_(0.1 * torch.randn_like(p))
    net = train.Network((dense if ranks is None else dense.shard(ranks)).to(dtype), config)
    net.wrap(B, ddp_group, config, place, print)
    return net


def batches(step, place, n):
    """This process's share of a step's n micro-batches (B, T)."""
    x, y = torch.randint(V, (2, n, B, T), generator=torch.Generator().manual_seed(step))
    share = n // place.ddp_size
    mine = slice(place.ddp_rank * share, (place.ddp_rank + 1) * share)
    return list(zip(x[mine], y[mine]))


def gradients(net, place, config):
    """
    (the gathered gradient that the optimizer gets in a first step, by parameter; that step's loss and norm)
    """
    seen = {}
    net.optimizer.register_step_pre_hook(lambda *_: seen.update(
        {name: join_shards(name, p.grad, net.raw.ranks).clone() for name, p in net.raw.named_parameters()}))
    torch.manual_seed(3)                # dropout's masks
    micro_batches = batches(0, place, config.gradient_accumulation_steps)
    return seen, train.train_step(net, micro_batches, 1e-3, config, place)[:2]


def compute(config, dropout, ddp_size, ranks, ddp_group, place):
    """
    (gradients of step 1 in float64, its loss and norm and those of STEPS steps in float32, who took these).
    Step 1 accumulates; the others have a micro-batch for each of ddp_size processes.
    """
    args = config, ranks, ddp_group, place
    config.dropout = dropout
    first, accumulated = gradients(network(*args, torch.float64), place, config)
    config.dropout = 0.0
    net = network(*args, torch.float32)
    steps = [train.train_step(net, batches(step, place, ddp_size), 1e-3, config, place)[:2]
             for step in range(STEPS)]
    return first, [accumulated, *steps], net


def check_config(config, expected, *args):
    """expected: what compute() gave for the simulated ranks; args: its other arguments"""
    what, place = f'{config.wandb_run_name}, bias {config.bias}', args[-1]
    ours, steps, net = compute(config, *args)
    for key, simulated in expected[0].items():
        far = (ours[key] - simulated).abs().max() / simulated.abs().max().clamp(min=1e-12)
        assert far < 1e-9 or simulated.abs().max() < 1e-12, f'{what}: {key} is off by {far}'
    assert len(steps) == len(expected[1]) == 1 + STEPS
    for step, (mine, simulated) in enumerate(zip(steps, expected[1])):
        far = max(abs(a - b) for a, b in zip(mine, simulated))
        assert far < 1e-4, f'{what}, step {step}: {mine}, simulated {simulated}'

    # what reached torch.distributed, by kind: as often and as large as the design has it
    config.dtype = 'float32' if config.bias else 'bfloat16'
    micro_batches = batches(0, place, config.gradient_accumulation_steps)
    seen = by_kind(observe_step(
        net.raw, lambda: train.train_step(net, micro_batches, 1e-3, config, place)))
    design = by_kind(design_messages(config, place.ddp_size, V))
    design['average'][0] = seen['average'][0]           # DDP's buckets
    assert seen == design, f'{what}, {config.dtype}: {seen}, not {design}'


def main(tp_size):
    shape = [f'--n_embd={C}', '--n_head=4', f'--block_size={T}', f'--batch_size={B}',
             f'--tp_size={tp_size}', '--grad_clip=0.1', '--shard=True']
    configs = [load([str(ROOT / path), str(ROOT / 'config/cpu.py'), *shape, f'--bias={bias}'])
               for path in RUNS for bias in (False, True)]
    place = train.find_place(configs[0])
    ranks, ddp_group = train.connect(configs[0], place)
    for config in configs:              # where a step accumulates, each process has two micro-batches
        config.gradient_accumulation_steps = 2 * place.ddp_size
    # dropout draws by data-parallel process, so its masks agree with one process's where there is one
    dropout = 0.1 if place.ddp_size == 1 else 0.0
    alone = train.Place(0, 1, [[0]], place.device)
    expected = {i: compute(configs[i], dropout, place.ddp_size, None, None, alone)[:2]
                for i in range(place.process, len(configs), place.processes)}
    shared = [None] * place.processes
    dist.all_gather_object(shared, expected)
    expected = {i: results for part in shared for i, results in part.items()}
    for i, config in enumerate(configs):
        check_config(config, expected[i], dropout, place.ddp_size, ranks, ddp_group, place)
    train.disconnect(place)
    print('all checks passed')


if __name__ == '__main__':
    torch.set_num_threads(1)
    main(int(sys.argv[1]))
