"""
GPT-2 under tensor parallelism, with a choice per layer of when the ranks sync.

    model = GPT(GPTConfig(tp_size=4, block_types=['spd', 'parallel'] * 6))
    logits, _ = model(idx)  # idx (B, T) -> logits (B, T, V)
    _, loss = model(idx, targets)  # targets (B, T), -1 is ignored

Parameters have dense GPT-2's names for every block_types and tp_size. A process either *simulates* all
tensor-parallel ranks (dense GPT-2's shapes, no communication, the same loss up to rounding) or *holds* one of
them: its heads' rows of q, k and v, its rows of c_fc, its columns of each c_proj.

Shapes      B batch, T sequence, C n_embd, H n_head, hd C/H, V vocab_size, N = B*T tokens
            R tp_size, L ranks in this process: R if it simulates, 1 if it holds one
            D features of a sublayer per rank: C/R in attention, 4C/R in the MLP
            parts matrices stacked in one weight: 3 in c_attn (q, k, v), else 1
Tensors     replicated  the same on every rank                             (B, T, C)
            partial     the sum over this process's ranks; if it simulates, already the whole sum  (B, T, C)
            drifted     each rank's own                                    (L, B, T, C)
Stream      c    residual stream, replicated
            d_r  what rank r has added since the last sync, drifted
            u_r  = c + d_r, what rank r reads: replicated after a sync, then drifted
            P_r  a sublayer's output on rank r, drifted; its sum over this process's ranks is partial

References  Megatron-LM (arXiv 1909.08053), section 3: f, g, column- and row-parallel layers
            Sync-Point Drop (arXiv 2502.20727, ICML 2025): one all-reduce a block
            GPT-2 (Radford et al. 2019): the network, its init, its parameters' names
"""

import math
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

# communication: f_op and g_op all-reduce the residual stream; variants.py has those that run behind compute


class TPGroup(NamedTuple):
    """The tensor-parallel ranks, and which of them this process holds."""
    size: int  # R
    rank: int | None = None  # tp rank of this process; None: it simulates all of them
    group: dist.ProcessGroup | None = None  # process group of the ranks; None: simulated

    @property
    def simulated(self):
        return self.rank is None

    @property
    def local(self):
        """L, the number of ranks in this process."""
        return self.size if self.simulated else 1

    def all_reduce(self, message):
        """Sum it over the ranks, in place."""
        dist.all_reduce(message, group=self.group)


class AllReduces(list):
    """(way, kind, bytes) of each all-reduce of the residual stream, forward (g_op) or backward (f_op)."""
    forward = property(lambda self: sum(way == 'forward' for way, _, _ in self))
    backward = property(lambda self: sum(way == 'backward' for way, _, _ in self))
    hidden = property(lambda self: sum(found[:2] == ('forward', 'hidden') for found in self))  # variants.py's
    blocking = property(lambda self: self.forward - self.hidden)  # the very next sublayer waits for these


open_counters = []  # every all-reduce of the stream adds to each of them


@contextmanager
def count_all_reduces():
    """Count those inside the `with`. Eager only: a compiled graph is not instrumented."""
    open_counters.append(AllReduces())
    try:
        yield open_counters[-1]
    finally:
        open_counters.pop()


def compute_dtype(x):
    """The dtype of matmuls on x, hence of the messages: autocast's if it is on."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


class FOp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, tp, kind):
        ctx.tp, ctx.kind, ctx.dtype = tp, kind, compute_dtype(x)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        # autograd has summed over the local ranks (u was broadcast to them)
        for counter in (open_counters if ctx.kind else ()):  # kind None: the sharded loss's, not counted
            counter.append(('backward', ctx.kind, grad.numel() * ctx.dtype.itemsize))
        if not ctx.tp.simulated:
            message = grad.to(ctx.dtype, copy=True).contiguous()
            ctx.tp.all_reduce(message)
            grad = message.to(grad.dtype)
        return grad, None, None


class GOp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, partial, tp, kind):
        for counter in (open_counters if kind else ()):
            counter.append(('forward', kind, partial.nbytes))
        if tp.simulated:
            return partial.view_as(partial)
        message = partial.clone(memory_format=torch.contiguous_format)
        tp.all_reduce(message)
        return message

    @staticmethod
    def backward(ctx, grad):
        return grad, None, None


def is_identity(tp):
    """True where f_op and g_op do nothing: one rank, or simulated under torch.compile, counters skipped."""
    return tp.size == 1 or (tp.simulated and torch.compiler.is_compiling())


def f_op(x, tp, kind='blocking'):
    """Megatron's f: forward identity, backward all-reduce. x replicated, about to be read by the ranks."""
    return x if is_identity(tp) else FOp.apply(x, tp, kind)


def g_op(partial, tp, kind='blocking'):
    """Megatron's g: forward all-reduce, backward identity. partial -> replicated, of the same shape."""
    return partial if is_identity(tp) else GOp.apply(partial, tp, kind)


class ScaleGrad(torch.autograd.Function):
    @staticmethod
    def forward(ctx, p, divisor):
        ctx.divisor = divisor
        return p.view_as(p)

    @staticmethod
    def backward(ctx, grad):
        return grad / ctx.divisor, None


def enter_stream(p, tp):
    """
    Use p, a replicated parameter or a function of some, in c.

    A gradient through c, or after the last sync, is whole on every process; one through u, as a LayerNorm's,
    is a rank's part. sum_replicated_gradients() sums either over the ranks: the whole is divided by R here.
    """
    return p if p is None or tp.simulated else ScaleGrad.apply(p, tp.size)


# sharded layers: a column-parallel one is one matmul while the ranks read the same, batched once they drift;
# a row-parallel one is one matmul for sync(), batched for add()


def drifted(x):
    """True for (L, B, T, ...), each rank's own; False for (B, T, ...)."""
    return x.dim() == 4


def linear(x, weight, bias=None):
    """F.linear. For a few tokens on a CPU, as in sampling, a batched matmul of two halves: twice as fast."""
    out, features = weight.shape
    sampling = not torch.is_grad_enabled() and x.numel() <= 4 * features
    if not sampling or x.device.type != 'cpu' or torch.is_autocast_enabled('cpu') or out % 2:
        return F.linear(x, weight, bias)
    columns = x.reshape(-1, features).t().expand(2, -1, -1)  # (2, features, rows)
    y = torch.bmm(weight.view(2, -1, features), columns).flatten(0, 1)  # (out, rows)
    return add_optional(y.t().reshape(*x.shape[:-1], out), bias)


class ColumnParallel(nn.Linear):
    """Linear with its output features sharded, D per rank. parts=3 for c_attn: q, k, v each sharded alone."""

    def __init__(self, in_features, out_features, config, tp, parts=1):
        super().__init__(in_features, out_features // tp.size * tp.local, bias=config.bias)
        self.tp, self.parts = tp, parts

    def forward(self, u):
        """u replicated (B, T, C) -> parts x (B, T, L*D), ranks side by side; drifted -> (L, B, T, D)"""
        if not drifted(u):
            return linear(u, self.weight, self.bias).chunk(self.parts, dim=-1)
        out = torch.einsum('lbtc,lfc->lbtf', u, self.by_rank(self.weight))  # (L, B, T, parts*D)
        if self.bias is not None:
            out = out + self.by_rank(self.bias)[:, None, None].to(out.dtype)  # else float32 under autocast
        return out.chunk(self.parts, dim=-1)

    def by_rank(self, p):
        """Each rank's rows of every part: (parts*L*D, ...) -> (L, parts*D, ...)"""
        return p.unflatten(0, (self.parts, self.tp.local, -1)).transpose(0, 1).flatten(1, 2)


class RowParallel(nn.Linear):
    """Linear with its input features sharded, D per rank. Its matmul is deferred, see RowProduct."""

    def __init__(self, in_features, out_features, config, tp):
        super().__init__(in_features // tp.size * tp.local, out_features, bias=config.bias)
        self.tp, self.dropout = tp, config.dropout

    def forward(self, y):
        """y (B, T, L*D), ranks side by side, or drifted (L, B, T, D) -> RowProduct"""
        mask = None
        if self.training and self.dropout > 0:
            mask = dropout_mask((*y.shape[-3:-1], self.out_features), self.dropout, y)  # (B, T, C)
        return RowProduct(y, mask, self)


class RowProduct(NamedTuple):
    """
    A sublayer's output before the sum over ranks, not yet multiplied: P_r = W_r y_r, and a bias.

    Stream.sync() takes the sum over ranks inside one matmul; Stream.add() needs each rank's product.
    """
    y: torch.Tensor  # (B, T, L*D), ranks side by side, or drifted (L, B, T, D)
    mask: torch.Tensor | None  # dropout (B, T, C), the same for every rank's P_r and for the bias
    proj: RowParallel

    def per_rank(self):
        """P_r of each local rank: (L, B, T, C)"""
        y, L = self.y, self.proj.tp.local
        if not drifted(y):
            y = y.unflatten(-1, (L, -1)).permute(2, 0, 1, 3)  # (L, B, T, D)
        weight = self.proj.weight.unflatten(-1, (L, -1))  # (C, L, D)
        return self.dropped(torch.einsum('lbtd,cld->lbtc', y, weight))

    def sum_over_ranks(self):
        """sum_r P_r over the local ranks, inside one matmul: partial (B, T, C)"""
        y = self.y.permute(1, 2, 0, 3).flatten(2) if drifted(self.y) else self.y  # (B, T, L*D)
        return self.dropped(linear(y, self.proj.weight))

    def bias(self):
        """Replicated, (C,) or under dropout (B, T, C); it counts once. None without one."""
        return None if self.proj.bias is None else self.dropped(self.proj.bias)

    def dropped(self, x):
        return x if self.mask is None else (x * self.mask).to(x.dtype)


def dropout_mask(shape, p, like):
    """Dropout's factors, 0 or 1/(1-p), for all ranks; processes that hold one draw them from one seed."""
    return F.dropout(torch.ones(shape, device=like.device), p)


def add_optional(a, b):
    """a + b; b may be None."""
    return a if b is None else a + b


class Stream(NamedTuple):
    """
    The residual stream between two sublayers. Rank r reads u_r = c + d_r.

    Between two syncs there is one all-reduce forward (in the closing sync) and one backward (in the opening
    f_op). u = f_op(c) feeds the sublayers; c bypasses f_op as the skip path. P_r is added both to u, which
    later sublayers read, and to d_sum, which the sync sends.
    """
    c: torch.Tensor  # replicated (B, T, C)
    u: torch.Tensor  # replicated (B, T, C) after a sync, drifted (L, B, T, C) after an add
    d_sum: torch.Tensor | None  # partial (B, T, C): sum_r d_r; None: d = 0. no d_r is kept, it is u_r - c
    tp: TPGroup
    merge: str  # how sync() scales what it sums
    left: int  # sublayers still to come
    due: tuple = ()  # variants.py's DelayedSyncs, in order; arrive() applies one once left is down to its own
    carry: Any = None  # whatever a block hands to a later one
    cache: Any = None  # this layer's KeyValues, for its attention; None: every token is in u

    def arrive(self, n):
        """n more sublayers have read u: do the delayed syncs now due; the model's last sync does the rest."""
        s = self._replace(left=self.left - n)
        while s.due and 0 < s.left <= s.due[0].left:
            s = s.due[0].apply(s)
        return s

    def add(self, *products):
        """d_r <- d_r + P_r of each RowProduct, and c takes the biases. No communication: the ranks drift."""
        s = self.arrive(len(products))
        for product in products:
            bias, P = product.bias(), product.per_rank().to(s.c.dtype)  # P drifted
            # u is stored: if each reader computed c + d_r, backward would hold a gradient for every reader
            s = s._replace(c=add_optional(s.c, enter_stream(bias, s.tp)), u=add_optional(s.u + P, bias),
                           d_sum=add_optional(P.sum(0), s.d_sum))
        return s

    def sync(self, *products, kind='blocking'):
        """
        c <- c + sum_r (d_r + P_r) and the biases, d <- 0, in one all-reduce; none if nothing is to be summed.
        merge scales that sum, mean by 1/R, rsqrt by 1/sqrt(R), or desync d_r by 1/R. Biases are never scaled.
        """
        addends = [product.sum_over_ranks() for product in products]  # partial (B, T, C) each
        if self.d_sum is not None:
            addends.append(self.d_sum / self.tp.size if self.merge == 'desync' else self.d_sum)
        if not addends:
            return self
        message = sum(addends[1:], start=addends[0])
        if self.merge in ('mean', 'rsqrt'):
            message = message / self.tp.size ** (1 if self.merge == 'mean' else 0.5)
        c = self.c + g_op(message.to(compute_dtype(message)), self.tp, kind)
        for product in products:
            c = add_optional(c, enter_stream(product.bias(), self.tp))
        u = f_op(c, self.tp, kind)
        # this covers the delayed syncs too: d_sum held what they would have sent
        return self._replace(c=c, u=u, d_sum=None, left=self.left - len(products), due=())


# the sublayers, and the three blocks that differ in when they sync


class KeyValues:
    """The keys and values of one layer, kept while text is sampled, so that u need only have new tokens."""

    def __init__(self, capacity):
        self.capacity, self.length = capacity, 0  # in tokens
        self.kept = None  # (2, B or L*B, heads, capacity, hd)

    def extend(self, k, v):
        """k, v of the next tokens (B or L*B, heads, T, hd) -> of all so far (B or L*B, heads, length, hd)"""
        if self.kept is None:
            self.kept = k.new_empty(2, *k.shape[:2], self.capacity, k.size(-1))
        elif k.size(-2) > 1:
            raise ValueError('a block may give s.cache to self.attn only once, and later tokens come singly')
        start, self.length = self.length, self.length + k.size(-2)
        self.kept[0, :, :, start:self.length], self.kept[1, :, :, start:self.length] = k, v
        return self.kept[:, :, :, :self.length]


class CausalSelfAttention(nn.Module):
    def __init__(self, config, tp):
        super().__init__()
        self.c_attn = ColumnParallel(config.n_embd, 3 * config.n_embd, config, tp, parts=3)
        self.c_proj = RowParallel(config.n_embd, config.n_embd, config, tp)
        self.n_head, self.head_size = config.n_head, config.n_embd // config.n_head
        self.dropout, self.tp = config.dropout, tp

    def forward(self, u, cache=None):
        """
        u replicated (B, T, C) or drifted (L, B, T, C) -> RowProduct

        cache: this layer's KeyValues, which u's tokens join; T > 1 only while it is empty.
        """
        # a batch of B with the local ranks' heads side by side; drifted, a batch of L*B with H/R heads each
        q, k, v = (part.unflatten(-1, (-1, self.head_size)).flatten(0, -4).transpose(1, 2)
                   for part in self.c_attn(u))  # (B or L*B, heads, T, hd)
        if cache is not None:
            k, v = cache.extend(k, v)
        causal = cache is None or q.size(-2) > 1  # a new token reads all tokens up to it
        y = self.attend(q, k, v, causal).transpose(1, 2)  # (B or L*B, T, heads, hd)
        return self.c_proj(y.reshape(*u.shape[:-1], -1))

    def attend(self, q, k, v, causal):
        """Softmax attention, scale 1/sqrt(hd). q, k, v and the result (B or L*B, heads, T, hd)"""
        if not (self.training and self.dropout > 0):
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        # fused kernels draw masks of their own; this one is drawn for all H heads: no tp_size changes it
        batch, heads, T, hd = q.shape
        scores = q @ k.transpose(-1, -2) / math.sqrt(hd)  # (B or L*B, heads, T, T)
        future = torch.ones(T, T, dtype=torch.bool, device=q.device).triu(1)
        weights = scores.masked_fill(future, -math.inf).softmax(-1)
        held = self.n_head // self.tp.size * self.tp.local  # heads here: H if it simulates, else H/R
        shape = batch * heads // held, self.n_head, T, T
        mask = dropout_mask(shape, self.dropout, weights).split(held, dim=1)[self.tp.rank or 0]
        # drifted: the ranks go from the dimension of the heads to that of the batch
        mask = mask.unflatten(1, (-1, heads)).transpose(0, 1).reshape(weights.shape)
        return (weights * mask.to(weights.dtype)) @ v


class MLP(nn.Module):
    def __init__(self, config, tp):
        super().__init__()
        self.c_fc = ColumnParallel(config.n_embd, 4 * config.n_embd, config, tp)
        self.c_proj = RowParallel(4 * config.n_embd, config.n_embd, config, tp)
        self.approximate = 'tanh' if config.gelu == 'tanh' else 'none'

    def forward(self, u):
        """u replicated (B, T, C) or drifted (L, B, T, C) -> RowProduct"""
        hidden, = self.c_fc(u)
        return self.c_proj(F.gelu(hidden, approximate=self.approximate))


class LayerNorm(nn.LayerNorm):
    def forward(self, u):
        """u replicated (B, T, C) or drifted (L, B, T, C) -> the same shape"""
        if not torch.compiler.is_compiling():
            return super().forward(u)
        # backward normalizes u again, and no float32 copy is kept (results/speed.md counts the bytes)
        return checkpoint(super().forward, u, use_reentrant=False)


BLOCKS = {}  # block type -> class; every subclass of Block adds itself, variants.py's when it is imported
checks = []  # functions of a GPTConfig that raise ValueError; variants.py adds one for its blocks


class Block(nn.Module):
    """A layer of GPT-2. Its types have the same parameters and differ in when they sync."""

    def __init_subclass__(cls, name):
        BLOCKS[name] = cls

    def __init__(self, config, tp, layer):
        super().__init__()
        self.config, self.layer = config, layer
        self.ln_1 = LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config, tp)
        self.ln_2 = LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config, tp)


class TPBlock(Block, name='tp'):
    """attention, sync, MLP, sync: Megatron-LM's layer. 2 sync points."""

    def forward(self, s):
        s = s.sync(self.attn(self.ln_1(s.u), s.cache))
        return s.sync(self.mlp(self.ln_2(s.u)))


class SPDBlock(Block, name='spd'):
    """attention, MLP, sync: Sync-Point Drop. 1 sync point."""

    def forward(self, s):
        s = s.add(self.attn(self.ln_1(s.u), s.cache))
        return s.sync(self.mlp(self.ln_2(s.u)))


class ParallelBlock(Block, name='parallel'):
    """attention, MLP: the ranks drift apart until a later block syncs. Not PaLM's attention beside MLP."""

    def forward(self, s):
        s = s.add(self.attn(self.ln_1(s.u), s.cache))
        return s.add(self.mlp(self.ln_2(s.u)))


@dataclass
class GPTConfig:
    """Hyperparameters of a model. ValueError if they do not fit together."""
    block_size: int = 1024
    vocab_size: int = 50304  # 50257 rounded up to a multiple of 64
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = False  # in the linear layers and the LayerNorms
    gelu: str = 'erf'  # exact; or tanh, the approximation of released GPT-2
    tp_size: int = 2  # R; 1 is the dense control
    block_types: list | None = None  # one of BLOCKS per layer; None: all 'tp'
    merge: str = 'sum'  # of the ranks' additions at each sync; or mean, rsqrt, desync
    dtp_delay: int = 1  # for blocks of variants.py
    caat_share: float = 0.5  # for blocks of variants.py
    embed_scale: float = 1.0  # c starts at embed_scale x (wte + wpe)

    def __post_init__(self):
        if self.block_types is None:
            self.block_types = ['tp'] * self.n_layer
        for name in ('block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd', 'tp_size'):
            if getattr(self, name) < 1:
                raise ValueError(f'{name} is {getattr(self, name)}, it must be at least 1')
        if not 0 <= self.dropout < 1:
            raise ValueError(f'dropout is {self.dropout}, it must be at least 0 and below 1')
        if self.n_embd % self.n_head:
            raise ValueError(f'n_embd is {self.n_embd}, it must be a multiple of n_head, {self.n_head}')
        if self.n_head % self.tp_size:
            raise ValueError(f'tp_size is {self.tp_size}, it must divide n_head, {self.n_head}')
        for i, name in enumerate(self.block_types):
            if not isinstance(name, str) or name not in BLOCKS:
                raise ValueError(f'block_types has {name!r} at layer {i}, not one of {", ".join(BLOCKS)}')
        if len(self.block_types) != self.n_layer:
            raise ValueError(f'block_types has {len(self.block_types)} entries, n_layer is {self.n_layer}')
        if self.merge not in ('sum', 'mean', 'rsqrt', 'desync'):
            raise ValueError(f'merge is {self.merge!r}, it must be sum, mean, rsqrt or desync')
        if self.gelu not in ('erf', 'tanh'):
            raise ValueError(f'gelu is {self.gelu!r}, it must be erf or tanh')
        for check in checks:
            check(self)


def vocab_parallel_cross_entropy(x, weight, targets, tp):
    """
    Cross-entropy with the vocabulary sharded (Megatron-LM, section 3): no process sees another's logits.

    x replicated (N, C), weight replicated (V, C), of which this process reads its rows, targets (N,)
    -> the mean over the targets that are not -1
    """
    V = weight.size(0)
    low, high = V * tp.rank // tp.size, V * (tp.rank + 1) // tp.size
    logits = F.linear(f_op(x, tp, kind=None), weight[low:high])  # (N, V/R)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    largest = logits.detach().amax(-1)  # (N,)
    dist.all_reduce(largest, dist.ReduceOp.MAX, tp.group)
    logits = logits - largest[:, None]
    here = (targets >= low) & (targets < high)
    target = logits.gather(-1, (targets - low).clamp(0, high - low - 1)[:, None]).squeeze(-1) * here
    total, target = g_op(torch.stack((logits.exp().sum(-1), target)), tp, kind=None)  # replicated (N,)
    valid = targets != -1
    return ((total.log() - target) * valid).sum() / valid.sum()


class GPT(nn.Module):
    def __init__(self, config, tp=None):
        """tp: the TPGroup if this process holds one rank, whose slices training/sharding.py then loads."""
        super().__init__()
        self.config = config
        self.tp = tp or TPGroup(config.tp_size)
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(config.vocab_size, config.n_embd),
            wpe=nn.Embedding(config.block_size, config.n_embd),
            h=nn.ModuleList(BLOCKS[name](config, self.tp, i) for i, name in enumerate(config.block_types)),
            ln_f=nn.LayerNorm(config.n_embd, bias=config.bias),
        ))
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = self.transformer.wte.weight
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """
        GPT-2's: N(0, 0.02); c_proj N(0, 0.02 / sqrt(2 n_layer)), as 2 n_layer of them add up in the stream;
        LayerNorms 1, biases 0. If it simulates, the same numbers whatever its block_types and tp_size.
        """
        for name, p in self.named_parameters():
            if name.endswith('bias'):
                p.zero_()
            elif p.dim() == 1:
                p.fill_(1)
            else:
                p.normal_(0, 0.02 / math.sqrt(2 * self.config.n_layer) if 'c_proj' in name else 0.02)

    def forward(self, idx, targets=None, cache=None):
        """
        idx (B, T) -> (logits (B, T, V), None); with targets (B, T) -> (None, loss)

        loss: the mean cross-entropy, in nats per token, over the targets that are not -1.
        cache: a KeyValues per layer, which idx joins, T = 1 once filled; no targets; logits (B, 1, V)
        """
        stream = self.enter(idx, cache[0].length if cache else 0)
        for i, block in enumerate(self.transformer.h):
            stream = block(stream._replace(cache=cache[i]) if cache else stream)
        x = self.leave(stream)
        if cache:
            x = x[:, -1:]
        if targets is None:
            # logits read all rows: a whole gradient. the sharded loss reads this rank's rows: a part
            return linear(x, enter_stream(self.lm_head.weight, self.tp)), None
        x, targets = x.flatten(0, 1), targets.flatten()  # (N, C), (N,)
        if self.tp.simulated:
            return None, F.cross_entropy(self.lm_head(x), targets, ignore_index=-1)
        return None, vocab_parallel_cross_entropy(x, self.lm_head.weight, targets, self.tp)

    def enter(self, idx, start=0):
        """Tokens idx (B, T), the first at position `start` -> the Stream that the first layer reads"""
        end, block_size = start + idx.size(1), self.config.block_size
        assert end <= block_size, f'{end} tokens, block_size is {block_size}'
        c = self.transformer.wte(idx) + self.transformer.wpe(torch.arange(start, end, device=idx.device))
        c = F.dropout(enter_stream(self.config.embed_scale * c, self.tp), self.config.dropout, self.training)
        return Stream(c, f_op(c, self.tp), None, self.tp, self.config.merge, 2 * self.config.n_layer)

    def leave(self, stream):
        """The Stream after the last layer -> what the head reads, replicated (B, T, C)"""
        c, ln_f = stream.sync().c, self.transformer.ln_f
        weight, bias = enter_stream(ln_f.weight, self.tp), enter_stream(ln_f.bias, self.tp)
        return F.layer_norm(c, ln_f.normalized_shape, weight, bias, ln_f.eps)

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None):
        """
        idx (B, T) -> (B, T + max_new_tokens), each token sampled given at most block_size before it.

        A step computes one token, with the keys and values of those before it. Beyond block_size it computes
        its whole window, where every token has another position than before; so it does for a block that
        does not give s.cache to its attention.
        """
        training, block_size = self.training, self.config.block_size
        self.eval()
        cache = [KeyValues(min(idx.size(1) + max_new_tokens, block_size)) for _ in self.transformer.h]
        for _ in range(max_new_tokens):
            window = idx[:, -block_size:]  # (B, S)
            if idx.size(1) > block_size:
                cache = []
            if cache:
                logits = self(window[:, cache[0].length:], cache=cache)[0]  # (B, 1, V)
            if any(layer.length != window.size(1) for layer in cache):  # a block has left s.cache out
                cache = []
            if not cache:
                logits = self(window)[0]  # (B, S, V)
            logits = logits[:, -1].float() / temperature  # (B, V)
            if top_k is not None:
                kth = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
                logits = logits.masked_fill(logits < kth, -math.inf)
            idx = torch.cat((idx, torch.multinomial(logits.softmax(-1), 1)), dim=1)
        self.train(training)
        return idx

    def num_params(self):
        """Parameters in this process, the whole network's if it simulates; the tied embedding counts once."""
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self):
        """
        Forward and backward, of a model that simulates, by PaLM's count (arXiv 2204.02311, appendix B).

        6 for each parameter but wpe's, and 12 n_layer n_embd T for attention, as if it were not causal.
        """
        parameters = self.num_params() - self.transformer.wpe.weight.numel()
        return 6 * parameters + 12 * self.config.n_layer * self.config.n_embd * self.config.block_size
