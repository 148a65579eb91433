"""
How a network's forward pass is run: compiled or not, in which dtype, and which activations it keeps.
"""

from functools import partial

import torch
from torch.utils.checkpoint import checkpoint

from training.distributed import all_reduce_sum
from training.optimizer import gradient_norm


def recompute(model, layers):
    """
    Activation checkpointing: of the first `layers` layers keep only the inputs; backward recomputes the rest.

    Sharded, that repeats all-reduces, one of a tp layer's two and none of an spd layer's, unless a bias has
    dropout. A run's counts leave them out.
    """
    for block in model.transformer.h[:layers]:
        block.forward = partial(checkpoint, partial(type(block).forward, block), use_reentrant=False)


def autocast(config, world):
    dtype = getattr(torch, config.dtype)
    return torch.autocast(world.device.type, dtype, enabled=dtype != torch.float32)


def compiled(model, micro_batch, config, world, say):
    """
    The model under torch.compile, if it gives the loss and gradient norm of a micro-batch that it gives
    eagerly, to 0.1% in float32 and 10% in 16 bits. Else the model itself, with a warning.
    """
    tokens = torch.randint(model.config.vocab_size, (2, micro_batch, config.block_size),
                           generator=torch.Generator().manual_seed(0)).to(world.device)
    reason = None
    model.train(not config.dropout)  # compiled code draws other dropout masks: compared without
    try:
        compiled_model = torch.compile(model)
        eager = loss_and_norm(model, model, *tokens, 1, config, world)  # by single windows, to save memory
        found = loss_and_norm(model, compiled_model, *tokens, micro_batch, config, world)
        near = 1e-3 if config.dtype == 'float32' else 0.1
        # atol: a student equal to its teacher has loss 0, and a gradient of rounding errors
        if not torch.allclose(found, eager, rtol=near, atol=near / 10):
            reason = f'loss and gradient norm are {found.tolist()}, {eager.tolist()} eagerly'
        if config.dropout:  # does it compile for training at all
            loss_and_norm(model.train(), compiled_model, *tokens, micro_batch, config, world)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # compilers fail in many ways, and eager training needs none of them
        reason = f'{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}'
    model.train().zero_grad(set_to_none=True)
    failures = all_reduce_sum(torch.tensor(float(reason is not None), device=world.device), world)
    if failures.item() == 0:
        return compiled_model
    say(f'warning: torch.compile failed, training runs eagerly ({reason or "on another process"})')
    return model


def loss_and_norm(model, candidate, x, y, windows, config, world):
    """
    x, y (B, T) -> a tensor (2,): the mean loss by `candidate`, which is the model or the model compiled, a
    number of windows at a time, and the norm of its gradient. If sharded, replicated parameters' gradients
    are still each rank's own here.
    """
    total = torch.zeros((), device=world.device)
    for part_x, part_y in zip(x.split(windows), y.split(windows), strict=True):
        with autocast(config, world):
            loss = candidate(part_x, part_y)[1] * len(part_x) / len(x)
        loss.backward()
        total += loss.detach()
    norm = gradient_norm(model)
    model.zero_grad(set_to_none=True)
    return torch.stack((total, norm))
