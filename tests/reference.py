"""
GPT-2 over R tp ranks, written as the equations are, one rank after the other. model.py is tested against it.

c     (B, T, C)  residual stream, replicated
d[r]  (B, T, C)  what tp rank r has added since the last sync; it reads u_r = c + d[r]

Slow on purpose, and without dropout: plain slices, lists and sums. It shares no line with model.py.
"""

import math

import torch
import torch.nn.functional as F

# of each block type: the sublayers that read the stream, together or one after the other, and the syncs
STEPS = {
    'tp': ['attn', 'sync', 'mlp', 'sync'],
    'spd': ['attn', 'mlp', 'sync'],
    'parallel': ['attn', 'mlp'],
    'palm': ['attn + mlp', 'sync'],
    'palm_parallel': ['attn + mlp'],
}


def layer_norm(x, weight, bias):
    x = x - x.mean(-1, keepdim=True)
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-5) * weight + bias


def attention(w, name, x, r, config):
    """x (B, T, C) -> partial output of tp rank r's heads (B, T, C), without the bias of c_proj"""
    T, C = x.shape[1:]
    hd, n = C // config.n_head, C // config.tp_size
    mine = slice(r * n, (r + 1) * n)
    # q, k and v are a third of c_attn's rows each; a tp rank has its heads' rows of each third
    thirds = zip(w[name + '.c_attn.weight'].split(C), w[name + '.c_attn.bias'].split(C))
    q, k, v = (x @ weight[mine].T + bias[mine] for weight, bias in thirds)  # (B, T, n) each
    future = torch.ones(T, T, dtype=torch.bool).triu(1)
    heads = []
    for q_h, k_h, v_h in zip(q.split(hd, -1), k.split(hd, -1), v.split(hd, -1)):
        scores = q_h @ k_h.transpose(1, 2) / math.sqrt(hd)  # (B, T, T)
        heads.append(torch.softmax(scores.masked_fill(future, -math.inf), -1) @ v_h)
    return torch.cat(heads, -1) @ w[name + '.c_proj.weight'][:, mine].T


def mlp(w, name, x, r, config):
    """x (B, T, C) -> partial output of tp rank r's hidden units (B, T, C), without the bias of c_proj"""
    n = 4 * config.n_embd // config.tp_size
    mine = slice(r * n, (r + 1) * n)
    h = x @ w[name + '.c_fc.weight'][mine].T + w[name + '.c_fc.bias'][mine]
    h = 0.5 * h * (1 + torch.erf(h / math.sqrt(2)))
    return h @ w[name + '.c_proj.weight'][:, mine].T


SUBLAYERS = {'attn': (attention, 'ln_1'), 'mlp': (mlp, 'ln_2')}


def reference_gpt(weights, config, idx):
    """idx (B, T) -> (logits (B, T, V), the number of forward all-reduces)"""
    R = config.tp_size
    # a model without biases is one whose biases are 0
    w = {name.replace('.weight', '.bias'): p.new_zeros(p.shape[0]) for name, p in weights.items()} | weights
    c = w['transformer.wte.weight'][idx] + w['transformer.wpe.weight'][:idx.shape[1]]
    d, apart, syncs = [torch.zeros_like(c)] * R, False, 0

    def sync():
        merged = sum(d) / R if config.merge == 'mean' else sum(d)
        return c + merged, [torch.zeros_like(c)] * R, False, syncs + 1

    for i, block_type in enumerate(config.block_types):
        for step in STEPS[block_type]:
            if step == 'sync':
                c, d, apart, syncs = sync()
                continue
            read = [c + d[r] for r in range(R)]
            for kind in step.split(' + '):
                sublayer, norm = SUBLAYERS[kind]
                block = f'transformer.h.{i}.'
                ln = w[f'{block}{norm}.weight'], w[f'{block}{norm}.bias']
                d = [d[r] + sublayer(w, block + kind, layer_norm(read[r], *ln), r, config) for r in range(R)]
                c = c + w[f'{block}{kind}.c_proj.bias']
            apart = True
    if apart:
        c, d, apart, syncs = sync()
    c = layer_norm(c, w['transformer.ln_f.weight'], w['transformer.ln_f.bias'])
    # one rank alone has nobody to all-reduce with
    return c @ w['transformer.wte.weight'].T, syncs if R > 1 else 0


def reference_loss(logits, targets):
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
