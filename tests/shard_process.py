"""
Sharded processes, started by test_shard.py: what they compute must be what simulating gives.

    python tests/shard_process.py PROCESSES TP_SIZE

Every config of the experiment is checked at full depth, one whose blocks leave a parameter unused, and one
that a dense net teaches and whose first layers are recomputed. Every other config has biases; those that have
them in groups of two have none in groups of four. The processes are forked: torch takes longer to load than
to check a config.
"""

import math
import os
import socket
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402
import torch._dynamo  # noqa: E402, F401 (loaded by torch's optimizers, here before the fork)
import torch.distributed as dist  # noqa: E402
import torch.multiprocessing as mp  # noqa: E402
from torch.utils._pytree import tree_map  # noqa: E402

from configurator import COMMUNICATIONS, ROOT, RUNS, load  # noqa: E402
from model import GPT, Block  # noqa: E402
from speed.costmodel import by_kind, design_messages, observe_step  # noqa: E402
from train import Network, freeze_untrained, observe, train_step  # noqa: E402
from training.checkpoint import dense_state, load_dense_state  # noqa: E402
from training.distill import find_teacher  # noqa: E402
from training.distributed import World, connect, find_world  # noqa: E402
from training.sharding import join_shards, shard_model  # noqa: E402
from variants import gpt_config  # noqa: E402

B, T, C, V, STEPS = 2, 5, 16, 29, 3  # no tp_size divides V; so the vocabulary shards are uneven
COMMUNICATIONS['one_norm'] = 1


class OneNormBlock(Block, name='one_norm'):
    """attention beside MLP, both of ln_1, sync: ln_2 is left unused."""

    def forward(self, s):
        u = self.ln_1(s.u)
        return s.sync(self.attn(u), self.mlp(u))


def build(config, world, dtype):
    """The Network of this process; unlike a fresh one, no bias is 0 and no gain 1."""
    torch.manual_seed(config.seed)
    dense = GPT(gpt_config(vars(config), V))
    with torch.no_grad():
        for p in dense.parameters():
            p.add_(0.1 * torch.randn_like(p))
    freeze_untrained(dense, observe(dense)[1])
    others = {name: 1.5 * p for name, p in dense.state_dict().items()}
    teacher = find_teacher(config, dense.config, others, world)
    if teacher:
        teacher.model.to(dtype)
    net = Network((shard_model(dense, world.tp) if world.tp else dense).to(dtype), config, teacher)
    net.wrap(B, config, world, print)
    return net


def batches(step, world, n):
    """This process's share of a step's n micro-batches (B, T)."""
    x, y = torch.randint(V, (2, n, B, T), generator=torch.Generator().manual_seed(step))
    share = n // world.ddp_size
    mine = slice(world.ddp_rank * share, (world.ddp_rank + 1) * share)
    return list(zip(x[mine], y[mine]))


def gradients(net, config, world):
    """
    (the dense gradient that the optimizer gets in a first step, by parameter; that step's loss and norm)
    """
    seen = {}

    def gather(*_):
        for name, p in net.raw_model.named_parameters():
            if p.grad is not None:
                seen[name] = join_shards(name, p.grad, net.raw_model.tp).clone()

    net.optimizer.register_step_pre_hook(gather)
    torch.manual_seed(3)  # dropout's masks
    micro_batches = batches(0, world, config.gradient_accumulation_steps)
    return seen, train_step(net, micro_batches, 1e-3, config, world).read()[:2]


def compute(config, world, dropout, micro_batches):
    """
    (gradients of a step in float64 and a text, loss and norm of it and of STEPS steps in float32, whose
    Network)

    The float64 step accumulates; a float32 one has micro_batches, over all processes.
    """
    config.dropout = dropout
    first, accumulated = gradients(build(config, world, torch.float64), config, world)
    config.dropout = 0.0
    model = build(config, world, torch.float64).raw_model
    torch.manual_seed(3)
    first['text'] = model.generate(torch.arange(2 * B).view(B, 2), T)  # beyond block_size
    net = build(config, world, torch.float32)
    steps = [train_step(net, batches(step, world, micro_batches), 1e-3, config, world).read()[:2]
             for step in range(STEPS)]
    return first, [accumulated, *steps], net


def check_config(config, world, dropout, expected):
    """expected: what compute() gave when simulated"""
    what = f'{config.wandb_run_name}, bias {config.bias}'
    ours, steps, net = compute(config, world, dropout, world.ddp_size)
    assert ours.keys() == expected[0].keys()
    assert torch.equal(ours.pop('text'), expected[0].pop('text')), what
    for key, simulated in expected[0].items():
        far = (ours[key] - simulated).abs().max() / simulated.abs().max().clamp(min=1e-12)
        assert far < 1e-9 or simulated.abs().max() < 1e-12, f'{what}: {key} is off by {far}'
    assert len(steps) == len(expected[1]) == 1 + STEPS
    for step, (mine, simulated) in enumerate(zip(steps, expected[1])):
        far = max(abs(a - b) for a, b in zip(mine, simulated))
        assert far < 1e-4, f'{what}, step {step}: {mine}, simulated {simulated}'

    # what reached torch.distributed, by kind: as often and as large as the design has it
    config.dtype = 'float32' if config.bias else 'bfloat16'
    micro_batches = batches(0, world, config.gradient_accumulation_steps)
    seen = by_kind(observe_step(
        net.raw_model, lambda: train_step(net, micro_batches, 1e-3, config, world), {}))
    if config.distill:  # the head's messages are not those of the design
        # tp, spd, parallel: 4 each way, and the first of the tp layer's again, which is recomputed
        assert seen['forward'][0] + seen['backward'][0] == len(micro_batches) * (4 + 4 + 1)
        return
    design = by_kind(design_messages(config, world.ddp_size, V))
    design['average'][0] = seen['average'][0]  # DDP's buckets
    assert seen == design, f'{what}, {config.dtype}: {seen}, not {design}'


def check_bad_step(config, world):
    """If a gradient is not finite on one process, no process updates anything, and the next step is right."""
    net, other = build(config, world, torch.float32), build(config, world, torch.float32)
    weight = net.raw_model.transformer.h[1].mlp.c_fc.weight
    for step in range(3):
        before, bad = tree_map(torch.clone, [net.raw_model.state_dict(), net.optimizer.state]), step == 1
        hook = weight.register_hook(lambda grad: grad / 0) if bad and world.process == 1 else None
        found = train_step(net, batches(step, world, world.ddp_size), 1e-3, config, world).read()
        assert math.isfinite(found[1]) != bad
        if bad:
            torch.testing.assert_close(
                [net.raw_model.state_dict(), net.optimizer.state], before, rtol=0, atol=0, equal_nan=False)
            hook and hook.remove()
        else:
            mine = batches(step, world, world.ddp_size)
            assert found == train_step(other, mine, 1e-3, config, world).read()


def check_switch(config, world):
    """
    Other blocks during training, and back again, compute to the bit what a checkpoint under these does.

    In the one set of blocks a parameter is unused that the other trains.
    """
    def steps(net, *numbers):
        return [train_step(net, batches(i, world, world.ddp_size), 1e-3, config, world).read()
                for i in numbers]

    net, block_types = build(config, world, torch.float32), ['tp', 'one_norm', 'parallel']
    steps(net, 0, 1)
    for _ in range(2):
        saved, config.block_types, block_types = dense_state(net), block_types, config.block_types
        resumed = build(config, world, torch.float32)
        load_dense_state(resumed, saved)
        net.switch(config.block_types, B, config, world, lambda line: None)
        assert steps(net, 2, 3) == steps(resumed, 2, 3)
        for key, state in dense_state(net).items():
            torch.testing.assert_close(state, dense_state(resumed)[key], rtol=0, atol=0, msg=key)


def load_configs(tp_size):
    shape = [f'--n_embd={C}', '--n_head=4', f'--block_size={T}', f'--batch_size={B}', f'--tp_size={tp_size}',
             '--grad_clip=0.1', '--shard=True']
    unused = ['--n_layer=3', '--block_types=one_norm,parallel,spd', '--wandb_run_name=one_norm']
    configs = []
    for i, flags in enumerate([[str(ROOT / path)] for path in RUNS] + [unused]):
        bias = (i + tp_size // 2) % 2 == 0
        configs.append(load([str(ROOT / 'config/cpu.py'), *flags, *shape, f'--bias={bias}']))
    taught = ['--n_layer=3', '--block_types=tp,spd,parallel', '--distill_weight=0.8', '--recompute_layers=2']
    configs.append(load([str(ROOT / 'config/cpu.py'), *taught, '--distill_temperature=2', *shape]))
    configs[-1].distill = True  # by weights that no file holds
    return configs


def check_process(process, tp_size):
    os.environ.update(RANK=str(process), LOCAL_RANK=str(process))
    configs = load_configs(tp_size)
    world = connect(configs[0], find_world(configs[0]))
    for config in configs:  # each process accumulates over two micro-batches
        config.gradient_accumulation_steps = 2 * world.ddp_size
    # dropout draws by data-parallel process, so its masks agree with one process's only if there is one
    dropout = 0.1 if world.ddp_size == 1 else 0.0
    alone = World(0, 1, [[0]], world.device)
    expected = {i: compute(configs[i], alone, dropout, world.ddp_size)[:2]
                for i in range(world.process, len(configs), world.processes)}
    parts = [None] * world.processes
    dist.all_gather_object(parts, expected)
    expected = {i: results for part in parts for i, results in part.items()}
    for i, config in enumerate(configs):
        check_config(config, world, dropout, expected[i])
    check_bad_step(configs[-1], world)
    check_switch(configs[-1], world)
    dist.destroy_process_group()
    world.say('all checks passed')


def main(processes, tp_size):
    torch.set_num_threads(1)
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    os.environ.update(WORLD_SIZE=str(processes), MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
    mp.start_processes(check_process, (tp_size,), processes, start_method='fork')


if __name__ == '__main__':
    main(*map(int, sys.argv[1:]))
