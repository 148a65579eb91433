"""
The rivals over R tp ranks, written as their equations are, one rank after the other, as in reference.py.

c         (B, T, C)  residual stream, replicated
d[r]      (B, T, C)  what tp rank r has added and nobody has sent yet
flights              sums on their way: rank r reads seen[r] until sum_r (seen[r] + unseen[r]) + bias is in c
"""

import torch

from reference import SUBLAYERS, layer_norm

SYNCED = {'palm', 'fal', 'stale'}  # attention beside the MLP, and a sync


class Flight:
    def __init__(self, lands, seen, unseen, bias):
        self.lands = lands  # index of the sublayer that reads c with it
        self.seen, self.unseen, self.bias = seen, unseen, bias


class Ranks:
    def __init__(self, w, config, c, masks, see):
        self.see = see
        self.w, self.config, self.c, self.masks, self.R = w, config, c, masks, config.tp_size
        self.d, self.apart, self.flights = self.zeros(), False, []
        self.n = 0  # sublayers so far
        self.carry = None
        self.messages = []  # of each forward all-reduce: (channels, whether it is hidden)

    def zeros(self):
        return [torch.zeros_like(self.c) for _ in range(self.R)]

    def land(self):
        """What lands before the next sublayer reads, if there is one, enters c."""
        if self.n == 2 * self.config.n_layer:
            return
        for flight in [flight for flight in self.flights if flight.lands <= self.n]:
            self.flights.remove(flight)
            self.c = self.c + sum(flight.seen) + sum(flight.unseen) + flight.bias
            self.messages.append((self.c.shape[-1], True))

    def all_in(self):
        """The stream if all that is apart or on its way were merged now; nothing changes."""
        apart = sum(self.d) + sum(sum(flight.seen) + sum(flight.unseen) for flight in self.flights)
        scale = {'sum': 1, 'mean': 1 / self.R, 'rsqrt': self.R**-0.5, 'desync': 1 / self.R}
        return self.c + scale[self.config.merge] * apart + sum(flight.bias for flight in self.flights)

    def read(self):
        """[u_r] of the next sublayer"""
        self.land()
        return [self.c + self.d[r] + sum(flight.seen[r] for flight in self.flights) for r in range(self.R)]

    def compute(self, layer, kind, u):
        """([P_r], bias) of a sublayer that reads [u_r]"""
        self.see(self.n, u, self)
        sublayer, norm = SUBLAYERS[kind]
        name, w, mask = f'transformer.h.{layer}.', self.w, self.masks[1 + self.n]
        self.n += 1
        ln = w[f'{name}{norm}.weight'], w[f'{name}{norm}.bias']
        P = [mask * sublayer(w, name + kind, layer_norm(u[r], *ln), r, self.config) for r in range(self.R)]
        return P, mask * w[f'{name}{kind}.c_proj.bias']

    def add(self, P, bias):
        self.c = self.c + bias
        self.d = [self.d[r] + P[r] for r in range(self.R)]
        self.apart = True

    def collect(self):
        """[what rank r has and the others have not], which it then gives up, and the biases on their way"""
        ours = [self.d[r] + sum(flight.seen[r] + flight.unseen[r] for flight in self.flights)
                for r in range(self.R)]
        biases = sum(flight.bias for flight in self.flights)
        self.d, self.apart, self.flights = self.zeros(), False, []
        return ours, biases

    def sync(self, *last, hidden=False):
        """last: (P, bias) of the sublayers that it is for"""
        older, biases = self.collect()
        total, newest = sum(older), sum(sum(P) for P, _ in last)
        merged = {'sum': total + newest, 'mean': (total + newest) / self.R,
                  'rsqrt': (total + newest) / self.R**0.5, 'desync': total / self.R + newest}
        self.c = self.c + merged[self.config.merge] + biases + sum(bias for _, bias in last)
        self.messages.append((self.c.shape[-1], hidden))

    def sync_channels(self, k):
        def first(x):
            return torch.cat([x[..., :k], torch.zeros_like(x[..., k:])], -1)

        for P in (self.d, *(flight.seen for flight in self.flights)):
            self.c = self.c + sum(first(P_r) for P_r in P)
            P[:] = [P_r - first(P_r) for P_r in P]
        self.messages.append((k, False))

    def sublayer(self, layer, kind, block_type):
        config = self.config
        P, bias = self.compute(layer, kind, self.read())
        k = max(1, round(config.caat_share * config.n_embd))
        if f'{block_type} {kind}' in ('parallel attn', 'parallel mlp', 'spd attn', 'attn_spd mlp'):
            self.add(P, bias)
        elif block_type == 'ladder':
            self.land()
            before, biases = self.collect()
            self.flights = [Flight(self.n + 1, before, P, bias + biases)]
        elif block_type == 'dtp' and config.dtp_delay > 0:
            self.c = self.c + bias
            self.flights.append(Flight(self.n + config.dtp_delay, P, self.zeros(), 0))
        elif block_type == 'caat' and k < config.n_embd:
            self.add(P, bias)
            if self.n < 2 * config.n_layer:
                self.sync_channels(k)
        else:
            self.sync((P, bias))

    def block(self, i, block_type):
        types = self.config.block_types
        if block_type not in SYNCED or (block_type == 'fal' and self.carry is None):
            before = self.c
            self.sublayer(i, 'attn', block_type)
            if block_type == 'fal':
                self.carry = self.c - before
            return self.sublayer(i, 'mlp', block_type)
        u = self.read()
        attn_reads = mlp_reads = u
        if block_type == 'stale':
            if i == 0 or types[i - 1] != 'stale':
                self.carry = u
            attn_reads = self.carry
        if block_type == 'fal':
            one = torch.ones(self.c.shape[-1], dtype=self.c.dtype)
            mlp_reads = [u_r + layer_norm(self.carry, one, 0 * one) for u_r in u]
        attn, mlp = self.compute(i, 'attn', attn_reads), self.compute(i, 'mlp', mlp_reads)
        self.sync(attn, mlp, hidden=block_type == 'stale' and types[i + 1:i + 2] == ['stale'])


def reference_rivals(weights, config, idx, masks=None, see=lambda place, u, ranks: None):
    """
    idx (B, T) -> (logits (B, T, V), messages, see Ranks)

    masks: dropout's, 0 or 1/(1-p), of the embedding and of each sublayer in turn, (B, T, C) each.
    see(place, u, ranks) is called with what each sublayer reads, [u_r], and at the end before the last sync.
    """
    # a model without biases is one whose biases are 0
    w = {name.replace('.weight', '.bias'): p.new_zeros(p.shape[0]) for name, p in weights.items()} | weights
    masks = masks or [1] * (1 + 2 * config.n_layer)
    c = config.embed_scale * (w['transformer.wte.weight'][idx] + w['transformer.wpe.weight'][:idx.shape[1]])
    ranks = Ranks(w, config, masks[0] * c, masks, see)
    for i, block_type in enumerate(config.block_types):
        ranks.block(i, block_type)
    see(ranks.n, ranks.read(), ranks)
    if ranks.apart or ranks.flights:
        ranks.sync()
    c = layer_norm(ranks.c, w['transformer.ln_f.weight'], w['transformer.ln_f.bias'])
    # one rank alone has nobody to all-reduce with
    return c @ w['transformer.wte.weight'].T, ranks.messages if ranks.R > 1 else []
