"""
What happens between the backward pass and the update: gradients summed over ranks, their norm, AdamW.
"""

import torch
import torch.distributed as dist
from torch.nn.utils import get_total_norm

from training.sharding import sharding


def sum_replicated_gradients(model):
    """Sum replicated parameters' gradients over the ranks, in one flat all-reduce. Collective if sharded."""
    if not model.tp.simulated:
        grads = [p.grad for name, p in model.named_parameters()
                 if sharding(name) is None and p.grad is not None]
        flat = torch.cat([grad.flatten() for grad in grads])
        dist.all_reduce(flat, group=model.tp.group)
        parts = flat.split([grad.numel() for grad in grads])
        torch._foreach_copy_(grads, [part.view_as(grad) for part, grad in zip(parts, grads, strict=True)])


def gradient_norm(model):
    """
    The norm of the dense network's gradient, once the replicated ones are summed. A 0-dim tensor. Collective
    if sharded.
    """
    sharded, replicated = [], []
    for name, p in model.named_parameters():
        if p.grad is not None:
            (replicated if sharding(name) is None else sharded).append(p.grad)
    norms = torch.stack((get_total_norm(sharded), get_total_norm(replicated)))
    if model.tp.simulated:
        return norms.norm()
    squares = norms.square()
    dist.all_reduce(squares[:1], group=model.tp.group)
    return squares.sum().sqrt()


def adamw(model, config):
    """Matrices and embeddings decay; biases and LayerNorms do not."""
    params = list(model.parameters())
    groups = [dict(params=[p for p in params if p.dim() >= 2], weight_decay=config.weight_decay),
              dict(params=[p for p in params if p.dim() < 2], weight_decay=0.0)]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), fused=True)
