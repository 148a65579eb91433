"""
A rank's slices of the parameters. A sharded process holds them under the dense network's names.
"""

import torch
import torch.distributed as dist

from model import GPT


def sharding(name):
    """How a parameter is sharded: (dim, number of stacked matrices); None if replicated."""
    if 'c_attn' in name:
        return 0, 3
    if 'c_fc' in name:
        return 0, 1
    return (1, 1) if name.endswith('c_proj.weight') else None


def take_shard(name, full, tp):
    """This process's slice of a dense parameter, or of a tensor of its shape."""
    if sharding(name) is None or tp.simulated:
        return full
    dim, parts = sharding(name)
    by_rank = full.unflatten(dim, (parts, tp.size, -1))
    return by_rank.select(dim + 1, tp.rank).flatten(dim, dim + 1).contiguous()  # as fused AdamW needs moments


def join_shards(name, shard, tp):
    """All-gather of the slices into the dense tensor. Collective."""
    if sharding(name) is None or tp.simulated:
        return shard
    dim, parts = sharding(name)
    shards = [torch.empty_like(shard) for _ in range(tp.size)]
    dist.all_gather(shards, shard.contiguous(), group=tp.group)
    return torch.stack([s.unflatten(dim, (parts, -1)) for s in shards], dim + 1).flatten(dim, dim + 2)


def load_dense(model, state):
    """Load a dense state_dict; a sharded process takes its slices."""
    model.load_state_dict({name: take_shard(name, full, model.tp) for name, full in state.items()})


def shard_model(whole, tp):
    """A copy of a model that simulates all ranks, with only this process's slices."""
    sharded = GPT(whole.config, tp)
    load_dense(sharded, whole.state_dict())
    for p, mine in zip(whole.parameters(), sharded.parameters(), strict=True):
        mine.requires_grad_(p.requires_grad)  # frozen if no block uses it
    return sharded
