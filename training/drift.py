"""
How far apart the ranks' residual streams are, sublayer by sublayer: a possible cause of a cliff in the loss.

    python train.py config/train_gpt2_8comm.py config/cpu.py --log_drift=True  # at every evaluation
    python compare.py out/gpt2-8comm-cpu  # plots it against depth
"""

import torch
import torch.nn.functional as F

from model import add_optional, drifted


@torch.no_grad()
def measure_drift(model, idx):
    """
    The drift that each sublayer reads, over the tokens idx (B, T), of a model that simulates all its ranks.

    Returns (drift, cosine), lists of 2 n_layer + 1 numbers: for attention and the MLP of each layer in turn,
    then for the end of the model, before its sync.

        drift   ||d_r|| / ||c||, Frobenius norms over all tokens, mean over ranks; 0 if nothing is apart.
                c is the replicated stream as read, with the biases that this segment has added
        cosine  of d_r and d_s, mean over tokens and pairs of ranks; None if nothing is apart
    """
    seen = []  # of each sublayer: (c, d), or (c, None) if nothing is apart

    def see(c, u):
        seen.append((c, u - c if drifted(u) else None))

    hooks = []
    for block in model.transformer.h:
        hooks.append(block.register_forward_pre_hook(lambda _, args: see(args[0].c, args[0].u)))
        # what the MLP reads: c as the block's attention has left it
        hooks.append(block.ln_2.register_forward_pre_hook(
            lambda _, args, block=block: see(add_optional(seen[-1][0], block.attn.c_proj.bias), args[0])))
    hooks.append(model.transformer.h[-1].register_forward_hook(lambda *call: see(call[-1].c, call[-1].u)))
    training = model.training
    model.eval()
    try:
        model(idx)
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    return [size(c, d) for c, d in seen], [alignment(d) for _, d in seen]


def size(c, d):
    """c replicated (B, T, C), d drifted (R, B, T, C) or None -> mean over ranks of ||d_r|| / ||c||"""
    return 0.0 if d is None else (d.flatten(1).norm(dim=1).mean() / c.norm()).item()


def alignment(d):
    """d drifted (R, B, T, C) -> mean cosine of d_r and d_s over r != s and tokens. None without a pair."""
    if d is None or len(d) == 1:
        return None
    R, unit = len(d), F.normalize(d, dim=-1)
    squares = unit.sum(0).square().sum(-1)  # (B, T): R + the sum of the pairs' cosines
    return ((squares - R) / (R * (R - 1))).mean().item()
