"""
What happens inside the network: how far apart the ranks' streams are and how alike, what a rank alone could
predict, and where the gradient goes. Measured at every evaluation, on a fixed probe.

    python train.py config/train_gpt2_8comm.py config/cpu.py --log_diagnostics=True
    python compare.py out/gpt2-8comm-cpu  # plots it against depth

References  linear CKA: Kornblith et al., ICML 2019 (arXiv 1905.00414), section 3
            logit lens: nostalgebraist, "interpreting GPT: the logit lens", 2020
            effective rank: the participation ratio of a covariance, Gao et al. 2017 (bioRxiv 214262)
"""

import torch
import torch.nn.functional as F

from model import drifted, open_counters
from training.sharding import sharding

PROBE_TOKENS = 2048  # at most


def diagnose(model, idx, targets):
    """
    Measures over the first PROBE_TOKENS of idx and targets (B, T), of a model that simulates all its ranks.

    Always in the parameters' dtype; gradients, random numbers and counts of all-reduces stay untouched.
    Returns a dict of lists. Each has an entry for every sublayer, attention and MLP of each layer in turn,
    and one for the end of the model, before its sync; None where nothing is measured. u_r is what a sublayer
    reads on rank r.

        dispersion   sum_r ||u_r - mean u||^2 / sum_r ||u_r||^2
        cka          linear CKA of u_r and u_s over tokens, mean over pairs of ranks; left out at one rank
        rank_one     effective rank (tr S)^2 / tr S^2 of u_r, S its covariance over tokens; mean over ranks
        rank_all     the same of all ranks' u_r side by side, R*C numbers a token
        lens_synced  loss of ln_f and the head, nats per token, on c with all that earlier sublayers have
                     added, merged as a sync would merge it; at a few depths
        lens_alone   the same loss on u_r, mean over ranks
        grad         norm of the gradient of the sublayer's weights and biases; last, of the embeddings'
        grad_ln      of its LayerNorm's; last, of ln_f's
        grad_rank_r  of rank r's part of the sublayer's, for each r; left out at one rank

    and of one number, attention_over_embedding: ||u_r - e|| / ||e||, u_r what the first MLP reads and e the
    embedding, mean over ranks.
    """
    T = min(idx.size(1), PROBE_TOKENS)
    idx, targets = (tokens[:PROBE_TOKENS // T, :T] for tokens in (idx, targets))
    training, counters = model.training, open_counters[:]
    model.eval()
    open_counters.clear()
    try:
        loss, read, synced = observe(model, idx, targets)
        params = {name: p for name, p in model.named_parameters() if p.requires_grad}
        # not backward(): nothing lands in .grad, nor in DDP's buckets
        grads = dict(zip(params, torch.autograd.grad(loss, params.values(), allow_unused=True)))
        with torch.no_grad():
            found = likeness(read, model.config) | lens(model, read, synced, targets)
            found |= gradient_norms(grads, model.config)
            found['attention_over_embedding'] = None
            if 1 in read:
                embedding = synced(0)  # (B, T, C)
                apart = with_rank_dim(read[1] - embedding).flatten(1).norm(dim=1).mean()
                found['attention_over_embedding'] = apart / embedding.norm()
    finally:
        model.train(training)
        open_counters.extend(counters)
    return {key: [rounded(item) for item in value] if isinstance(value, list) else rounded(value)
            for key, value in found.items()}


def rounded(value):
    """A 0-dim tensor as a number of six digits; None stays."""
    return None if value is None else float(f'{value.item():.6g}')


def with_rank_dim(u):
    """u replicated (B, T, C) or drifted (R, B, T, C) -> (1 or R, B, T, C)"""
    return u if drifted(u) else u[None]


def observe(model, idx, targets):
    """
    A forward pass -> (loss, read, synced).

    read: {place: what that sublayer reads, or the end}, replicated or drifted; a block that reads through no
    LayerNorm of its own has no entry. synced(place): c as a sync there would leave it, (B, T, C).
    """
    blocks, read, streams, products, hooks = model.transformer.h, {}, [], {}, []

    def see(place, u):
        read[place] = u.detach()

    for i, block in enumerate(blocks):
        hooks += [
            block.register_forward_pre_hook(lambda _, args: streams.append(args[0])),
            block.ln_1.register_forward_pre_hook(lambda _, args, place=2 * i: see(place, args[0])),
            block.attn.register_forward_hook(lambda _, args, product, i=i: products.update({i: product})),
            block.ln_2.register_forward_pre_hook(lambda _, args, place=2 * i + 1: see(place, args[0]))]
    hooks.append(blocks[-1].register_forward_hook(lambda _, args, s: streams.append(s)))
    try:
        with torch.enable_grad():
            loss = model(idx, targets)[1]
    finally:
        for hook in hooks:
            hook.remove()
    see(2 * len(blocks), streams[-1].u)

    def synced(place):
        i, after_attention = divmod(place, 2)
        return streams[i].sync(*([products[i]] if after_attention and i in products else [])).c
    return loss, read, synced


def likeness(read, config):
    """How far apart and how alike the ranks' streams are, and in how many directions they vary: lists."""
    names = 'dispersion', 'cka', 'rank_one', 'rank_all'
    found = {name: [None] * (2 * config.n_layer + 1) for name in names}
    for place, u in read.items():
        x = with_rank_dim(u).flatten(1, 2)  # (1 or R, N, C); 1 stands for R equal ones
        found['dispersion'][place] = (x - x.mean(0)).square().sum() / x.square().sum()
        x = x - x.mean(1, keepdim=True)
        R, _, C = x.shape
        beside = x.transpose(0, 1).flatten(1)  # (N, R*C)
        S = beside.T @ beside  # (R*C, R*C), N times the covariance
        squares = S.square().view(R, C, R, C).sum((1, 3))  # (R, R): ||x_r^T x_s||^2
        own, traces = squares.diagonal(), x.square().sum((1, 2))  # (R,) each
        alike = squares / own.outer(own).sqrt()  # (R, R), with 1 on the diagonal
        found['cka'][place] = (alike.sum() - R) / (R * (R - 1)) if R > 1 else torch.ones(())
        found['rank_one'][place] = (traces.square() / own).mean()
        found['rank_all'][place] = traces.sum().square() / squares.sum()
    if config.tp_size == 1:
        del found['cka']
    return found


def lens(model, read, synced, targets):
    """The losses that the head would have at a few depths, before attention and before the MLP: lists."""
    n = model.config.n_layer
    found = {name: [None] * (2 * n + 1) for name in ('lens_synced', 'lens_alone')}

    def loss(x):
        logits = model.lm_head(model.transformer.ln_f(x)).flatten(0, 1)
        return F.cross_entropy(logits, targets.flatten(), ignore_index=-1)

    for place in {min(2 * round(quarter * n / 4) + half, 2 * n) for quarter in range(5) for half in (0, 1)}:
        found['lens_synced'][place] = loss(synced(place))
        if place in read:
            found['lens_alone'][place] = torch.stack([loss(u) for u in with_rank_dim(read[place])]).mean()
    return found


def gradient_norms(grads, config):
    """{name of a parameter: its gradient, or None} -> the norms, lists"""
    R, places = config.tp_size, 2 * config.n_layer + 1
    like = next(grad for grad in grads.values() if grad is not None)
    squares = like.new_zeros(2 + R, places)  # of weights and biases, of LayerNorms, of each rank's part
    for name, grad in grads.items():
        if grad is None:
            continue
        _, kind, *rest = name.split('.')  # transformer.h.3.attn.c_attn.weight, transformer.wte.weight
        place = 2 * int(rest[0]) + (rest[1] in ('ln_2', 'mlp')) if kind == 'h' else places - 1
        squares[int('ln_' in name), place] += grad.square().sum()
        if sharding(name):
            dim, parts = sharding(name)
            shards = grad.unflatten(dim, (parts, R, -1)).movedim(dim + 1, 0)  # (R, ...)
            squares[2:, place] += shards.flatten(1).square().sum(1)
    names = ['grad', 'grad_ln'] + [f'grad_rank_{r}' for r in range(R) if R > 1]
    found = {name: list(norms) for name, norms in zip(names, squares.sqrt())}
    for name in names[2:]:
        found[name][-1] = None  # embeddings are replicated
    return found
