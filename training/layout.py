"""
Which heads and MLP columns share a rank.

    orders = affinity(model, idx)  # by sync point: {'h.3.attn': the heads' new order, 'h.3.mlp': ...}
    model.load_state_dict(permuted(model.state_dict(), orders), assign=True)

Another order within a layer leaves the dense net the same function, up to the rounding of its sums. But once
a sync is dropped, the next sublayer's units on a rank miss what the other ranks' units have written.

References  arXiv 2609.13846: a permutation by affinity before repair; how affinity is measured here is ours
"""

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment

from training.rundir import atomic_write
from training.sharding import sharding


def sublayers(model):
    """[(name, LayerNorm, ColumnParallel that reads, RowParallel that writes, units)], as the stream runs"""
    config, found = model.config, []
    for i, block in enumerate(model.transformer.h):
        found.append((f'h.{i}.attn', block.ln_1, block.attn.c_attn, block.attn.c_proj, config.n_head))
        found.append((f'h.{i}.mlp', block.ln_2, block.mlp.c_fc, block.mlp.c_proj, 4 * config.n_embd))
    return found


def mean_squares(model, idx):
    """The mean square of each activation that a c_proj reads on idx (B, T): [(C or 4C,)], by sublayer"""
    found = []
    hooks = [proj.register_forward_pre_hook(lambda _, args: found.append(args[0].square().mean((0, 1))))
             for *_, proj, _ in sublayers(model)]
    model(idx)
    for hook in hooks:
        hook.remove()
    return found


@torch.no_grad()
def affinities(model, idx):
    """
    Of each sublayer but the last, (its units, units of the next): how much reader j has of writer w.

    ||W_j N W_w diag(rms)||_F^2 is the mean square of what j's rows make of w's output on idx (B, T), if w's
    activations do not correlate. N is the LayerNorm between, without its division, which all writers share.
    """
    found, chain = [], sublayers(model)
    for before, squares, after in zip(chain, mean_squares(model, idx), chain[1:]):
        (*_, proj, writers), (_, norm, linear, _, readers) = before, after
        read = linear.weight * norm.weight  # (rows, C)
        read = read - read.mean(1, keepdim=True)  # LayerNorm takes the mean off
        product = (read @ proj.weight).square() * squares  # (rows, D)
        by_writer = product.unflatten(1, (writers, -1)).sum(-1)  # (rows, writers)
        found.append(by_writer.unflatten(0, (linear.parts, readers, -1)).sum((0, 2)).t())
    return found


def assign(values, R):
    """values (units, R) -> a rank for each unit, as many on every rank, so that the sum is greatest."""
    each = len(values) // R
    _, slots = linear_sum_assignment(values.cpu().repeat_interleave(each, 1).numpy(), maximize=True)
    return torch.from_numpy(slots).to(values.device) // each


def affinity(model, idx):
    """
    The order of each sublayer's units, by name, that puts those with much affinity on one rank of tp_size.

    idx (B, T): tokens to weigh the writers by. One sublayer after the other is assigned, from layer 0 on: by
    what writes to it, then once more by what reads it as well. Assigning 3,072 columns takes 4 s.
    """
    R, between = model.tp.size, affinities(model, idx)
    names, units = zip(*((name, units) for name, *_, units in sublayers(model)))
    ranks = [torch.arange(n, device=idx.device) // (n // R) for n in units]
    for sweep in range(2):
        for k, n in enumerate(units):
            values = between[0].new_zeros(n, R)
            if k:
                values += between[k - 1].t() @ F.one_hot(ranks[k - 1], R).to(values)
            if sweep and k < len(between):
                values += between[k] @ F.one_hot(ranks[k + 1], R).to(values)
            if values.any():  # layer 0's heads read what all ranks have
                ranks[k] = assign(values, R)
    return {name: own.argsort(stable=True) for name, own in zip(names, ranks)}


def permuted(weights, orders):
    """A dense state_dict whose heads and MLP columns stand in the orders that affinity() gives."""
    found = dict(weights)
    for name, p in weights.items():
        if sharding(name) is not None:
            dim, parts = sharding(name)
            order = orders['.'.join(name.split('.')[1:4])]
            by_unit = p.unflatten(dim, (parts, len(order), -1))
            found[name] = by_unit.index_select(dim + 1, order).flatten(dim, dim + 2)
    return found


def save(path, model, config, corpus):
    """Write a dense net as a checkpoint that --init_from, sample.py and export.py read."""
    keys = vars(config) | dict(block_types=['tp'] * config.n_layer, block_types_at=None)
    weights = {name: p.cpu() for name, p in model.state_dict().items()}
    weights['lm_head.weight'] = weights['transformer.wte.weight']  # one tensor, so that a file holds it once
    state = dict(model=weights, optimizer=dict(state={}), scaler={}, iter=0, progress={}, config=keys,
                 vocab_size=model.config.vocab_size, corpus=corpus.meta)
    with atomic_write(path) as file:
        torch.save(state, file)
