"""
GPT-2 under tensor parallelism, with a choice per layer of when the ranks sync.

    model = GPT(GPTConfig(tp_size=4, block_types=['spd', 'parallel'] * 6))
    logits, _ = model(idx)              # idx (B, T) -> logits (B, T, V)
    _, loss = model(idx, targets)       # targets (B, T), -1 is ignored

The parameters are dense GPT-2's, in name and shape, whatever block_types and tp_size say. A rank's shard is
a view: its heads' rows of q, of k and of v, its rows of c_fc, its columns of each c_proj. A process hosts L
of the R ranks. It simulates when it hosts all of them: the loss is the sharded network's, without its
network. Sharded it hosts one, and holds its slices under the same names.

Shapes      B batch, T sequence, C n_embd, H n_head, V vocab_size, R tp_size, L hosted ranks,
            D one rank's features of a sublayer: C/R in attention, 4C/R in the MLP
Tensors     common   the same on every rank                   (B, T, C)
            partial  an addend of a sum over ranks            (B, T, C)
            drifted  each rank's own                          (L, B, T, C)

References  Megatron-LM (arXiv 1909.08053), section 3: f, g, column- and row-parallel layers
            Sync-Point Drop (arXiv 2502.20727, ICML 2025): one all-reduce a block
            GPT-2 (Radford et al. 2019): the network, its init, its parameters' names
"""

import math
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils import get_total_norm

# communication: the residual stream crosses ranks in f_op and g_op, and nowhere else


class Ranks(NamedTuple):
    """The tensor-parallel ranks, and which of them this process hosts."""
    size: int                           # R
    local: int                          # L
    first: int = 0                      # the lowest hosted one
    group: dist.ProcessGroup | None = None      # the processes among which they are spread; None: simulated

    @property
    def processes(self):
        return self.size // self.local

    @property
    def index(self):
        """The place of this process among them, from 0."""
        return self.first // self.local


class AllReduces:
    """How often f_op (backward) and g_op (forward) all-reduced the residual stream."""

    def __init__(self):
        self.forward = self.backward = 0


counts = []                             # the open counts; every all-reduce adds to each of them


@contextmanager
def count_all_reduces():
    """Counts what happens inside the `with`. It sees eager code only: a compiled graph carries no counter."""
    counts.append(AllReduces())
    try:
        yield counts[-1]
    finally:
        counts.pop()


def compute_dtype(x):
    """What a matmul of x is computed in, and its result sent in."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


class FOp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, ranks, in_stream):
        ctx.ranks, ctx.in_stream, ctx.dtype = ranks, in_stream, compute_dtype(x)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):            # the hosted ranks' gradients arrive here already summed
        for count in (counts if ctx.in_stream else ()):
            count.backward += 1
        if ctx.ranks.group is not None:
            message = grad.to(ctx.dtype, copy=True).contiguous()
            dist.all_reduce(message, group=ctx.ranks.group)
            grad = message.to(grad.dtype)
        return grad, None, None


class GOp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, p, ranks, in_stream):
        for count in (counts if in_stream else ()):
            count.forward += 1
        if ranks.group is None:
            return p.view_as(p)
        message = p.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(message, group=ranks.group)
        return message

    @staticmethod
    def backward(ctx, grad):
        return grad, None, None


def traced_away(ranks):
    """
    Compiled and simulated, f_op and g_op are the identity, without a counter. With one rank they always are.
    """
    return ranks.size == 1 or (ranks.group is None and torch.compiler.is_compiling())


def f_op(x, ranks, in_stream=True):
    """Megatron's f: forward identity, backward all-reduce. x common, as the ranks are to read it."""
    return x if traced_away(ranks) else FOp.apply(x, ranks, in_stream)


def g_op(p, ranks, in_stream=True):
    """Megatron's g: forward all-reduce, backward identity. p partial -> common, of the same shape."""
    return p if traced_away(ranks) else GOp.apply(p, ranks, in_stream)


class Share(torch.autograd.Function):
    @staticmethod
    def forward(ctx, p, processes):
        ctx.processes = processes
        return p.view_as(p)

    @staticmethod
    def backward(ctx, grad):
        return grad / ctx.processes, None


def enter(p, ranks):
    """
    What a replicated parameter p gives to the common stream. Every process computes its whole gradient, of
    which it keeps its share, so that one sum over processes is right for these and for what a rank alone has
    read.
    """
    return p if p is None or ranks.group is None else Share.apply(p, ranks.processes)


# the sharded layers: one matmul for all hosted ranks where they share it, batched where they have drifted


class ColumnParallel(nn.Linear):
    """Output features sharded: D a rank, or D of each of the `parts` matrices stacked in the weight."""

    def __init__(self, in_features, out_features, config, ranks, parts=1):
        super().__init__(in_features, out_features // ranks.processes, bias=config.bias)
        self.ranks, self.parts = ranks, parts

    def forward(self, u):
        """
        u common (B, T, C) -> parts x (B, T, L*D), ranks side by side; drifted (L, B, T, C) -> (L, B, T, D)
        """
        if u.dim() == 3:
            return super().forward(u).chunk(self.parts, dim=-1)
        out = torch.einsum('lbtc,lfc->lbtf', u, self.by_rank(self.weight))              # (L, B, T, parts*D)
        if self.bias is not None:
            out = out + self.by_rank(self.bias)[:, None, None]
        return out.chunk(self.parts, dim=-1)

    def by_rank(self, p):
        """The rows of each rank, of all parts: (parts*L*D, ...) -> (L, parts*D, ...)"""
        return p.unflatten(0, (self.parts, self.ranks.local, -1)).transpose(0, 1).flatten(1, 2)


class RowParallel(nn.Linear):
    """
    Input features sharded, D a rank. The product waits in a Partial until it is known if a sync follows.
    """

    def __init__(self, in_features, out_features, config, ranks):
        super().__init__(in_features // ranks.processes, out_features, bias=config.bias)
        self.ranks, self.dropout = ranks, config.dropout

    def forward(self, y):
        """y (B, T, L*D), the ranks side by side, or (L, B, T, D) -> Partial"""
        mask = None
        if self.training and self.dropout > 0:
            mask = dropout_mask((*y.shape[-3:-1], self.out_features), self.dropout, y)  # (B, T, C)
        return Partial(y, mask, self)


class Partial(NamedTuple):
    """What a sublayer adds to the stream: P_r = W_r y_r of each rank, kept apart or summed, and a bias."""
    y: torch.Tensor                     # (B, T, L*D), the ranks side by side, or (L, B, T, D)
    mask: torch.Tensor | None           # dropout (B, T, C), one for every rank's partial and for the bias
    proj: RowParallel

    def each(self):
        """P_r of every hosted rank: (L, B, T, C)."""
        y, ranks = self.y, self.proj.ranks
        if y.dim() == 3:
            y = y.unflatten(-1, (ranks.local, -1)).permute(2, 0, 1, 3)                  # (L, B, T, D)
        weight = self.proj.weight.unflatten(-1, (ranks.local, -1))                      # (C, L, D)
        return self.drop(torch.einsum('lbtd,cld->lbtc', y, weight))

    def summed(self):
        """sum_r P_r over the hosted ranks, the sum inside one matmul: partial (B, T, C)."""
        y = self.y if self.y.dim() == 3 else self.y.permute(1, 2, 0, 3).flatten(2)      # (B, T, L*D)
        return self.drop(F.linear(y, self.proj.weight))

    def bias(self):
        """Replicated, so it counts once: common, (C,) or under dropout (B, T, C). None without one."""
        return None if self.proj.bias is None else self.drop(self.proj.bias)

    def drop(self, p):
        return p if self.mask is None else p * self.mask.to(p.dtype)


def dropout_mask(shape, p, like):
    """Dropout's factors, 0 or 1/(1-p), drawn for all ranks alike whichever of them a process hosts."""
    return F.dropout(torch.ones(shape, device=like.device), p)


def plus(a, b):
    """a + b, where a b of None is zero and costs nothing."""
    return a if b is None else a + b


class Stream(NamedTuple):
    """
    The residual stream. Rank r reads u_r = c + d_r.

    A stretch runs from one sync point to the next. It starts at u = f_op(c), made once; c itself is the skip
    path. So a stretch has one all-reduce forward, in the sync that ends it, and one backward, in its f_op.

    What a rank adds goes into its u, to be read, and into the sum that the sync will send: u's gradient is
    then one running sum, where c + d_r for each reader would keep every reader's until the stretch's start.
    """
    c: torch.Tensor                     # common (B, T, C)
    u: torch.Tensor                     # common (B, T, C), drifted (L, B, T, C) once a rank has added its own
    d_sum: torch.Tensor | None          # partial (B, T, C), sum_r d_r of the hosted ranks; None: nothing
    ranks: Ranks

    @classmethod
    def start(cls, c, ranks):
        return cls(c, f_op(c, ranks), None, ranks)

    def add(self, partial):
        """d_r <- d_r + P_r, and the bias into c. No communication: the ranks drift apart."""
        bias, P = partial.bias(), partial.each().to(self.c.dtype)                       # P drifted
        return self._replace(c=plus(self.c, enter(bias, self.ranks)), u=plus(self.u + P, bias),
                             d_sum=plus(P.sum(0), self.d_sum))

    def sync(self, partial=None):
        """A sync point: c <- c + sum_r (d_r + P_r), in one all-reduce, and the bias; d <- 0."""
        message, bias = self.d_sum, None                                        # partial (B, T, C)
        if partial is not None:
            message, bias = plus(partial.summed(), message), partial.bias()
        c = self.c + g_op(message.to(compute_dtype(message)), self.ranks)
        return self.start(plus(c, enter(bias, self.ranks)), self.ranks)


# the sublayers, and the three blocks that differ in when they sync


class CausalSelfAttention(nn.Module):
    def __init__(self, config, ranks):
        super().__init__()
        self.c_attn = ColumnParallel(config.n_embd, 3 * config.n_embd, config, ranks, parts=3)
        self.c_proj = RowParallel(config.n_embd, config.n_embd, config, ranks)
        self.n_head, self.head_size = config.n_head, config.n_embd // config.n_head
        self.dropout, self.ranks = config.dropout, ranks

    def forward(self, u):
        """u common (B, T, C) or drifted (L, B, T, C) -> Partial"""
        q, k, v = (self.heads(part) for part in self.c_attn(u))                         # (N, h, T, hd)
        y = self.attend(q, k, v).transpose(1, 2)                                        # (N, T, h, hd)
        return self.c_proj(y.reshape(*u.shape[:-1], -1))

    def heads(self, part):
        """(B, T, L*D) -> (B, H, T, hd), or (L, B, T, D) -> (L*B, H/R, T, hd)"""
        T, heads = part.size(-2), part.size(-1) // self.head_size
        return part.reshape(-1, T, heads, self.head_size).transpose(1, 2)

    def attend(self, q, k, v):
        """Causal softmax attention, scale 1/sqrt(hd). q, k, v and the result (N, h, T, hd)"""
        if not (self.training and self.dropout > 0):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)
        # fused kernels draw masks of their own; these are drawn by head, so that no tp_size changes them
        N, h, T, hd = q.shape
        scores = q @ k.transpose(-1, -2) / math.sqrt(hd)                                # (N, h, T, T)
        future = torch.ones(T, T, dtype=torch.bool, device=q.device).triu(1)
        weights = scores.masked_fill(future, -math.inf).softmax(-1)
        hosted = self.n_head // self.ranks.processes
        B = N * h // hosted
        mask = dropout_mask((B, self.n_head, T, T), self.dropout, q).split(hosted, dim=1)[self.ranks.index]
        mask = mask.view(B, N // B, h, T, T).transpose(0, 1).reshape(N, h, T, T)
        return (weights * mask.to(v.dtype)) @ v


class MLP(nn.Module):
    def __init__(self, config, ranks):
        super().__init__()
        self.c_fc = ColumnParallel(config.n_embd, 4 * config.n_embd, config, ranks)
        self.c_proj = RowParallel(4 * config.n_embd, config.n_embd, config, ranks)

    def forward(self, u):
        """u common (B, T, C) or drifted (L, B, T, C) -> Partial"""
        hidden, = self.c_fc(u)
        return self.c_proj(F.gelu(hidden))


class Block(nn.Module):
    """A layer of GPT-2. The three types below have the same parameters and differ in when they sync."""

    def __init__(self, config, ranks):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config, ranks)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config, ranks)


class TPBlock(Block):
    """attention, sync, MLP, sync: Megatron-LM's layer. 2 sync points."""

    def forward(self, s):
        s = s.sync(self.attn(self.ln_1(s.u)))
        return s.sync(self.mlp(self.ln_2(s.u)))


class SPDBlock(Block):
    """attention, MLP, sync: Sync-Point Drop. 1 sync point."""

    def forward(self, s):
        s = s.add(self.attn(self.ln_1(s.u)))
        return s.sync(self.mlp(self.ln_2(s.u)))


class ParallelBlock(Block):
    """attention, MLP: the ranks drift apart until a later block syncs. Not PaLM's attention beside MLP."""

    def forward(self, s):
        s = s.add(self.attn(self.ln_1(s.u)))
        return s.add(self.mlp(self.ln_2(s.u)))


BLOCKS = {'tp': TPBlock, 'spd': SPDBlock, 'parallel': ParallelBlock}


@dataclass
class GPTConfig:
    """Raises ValueError, in one line, for a value that makes no model."""
    block_size: int = 1024
    vocab_size: int = 50304             # 50257 rounded up to a multiple of 64
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = False                  # in the linear layers and the LayerNorms
    tp_size: int = 2                    # R; 1 is the dense control
    block_types: list | None = None     # one of BLOCKS per layer; None: all 'tp'

    def __post_init__(self):
        if self.block_types is None:
            self.block_types = ['tp'] * self.n_layer
        for name in ('block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd', 'tp_size'):
            if getattr(self, name) < 1:
                raise ValueError(f'{name} is {getattr(self, name)}, it must be at least 1')
        if not 0 <= self.dropout < 1:
            raise ValueError(f'dropout is {self.dropout}, it must be at least 0 and below 1')
        if self.n_embd % self.n_head:
            raise ValueError(f'n_embd is {self.n_embd}, not a multiple of n_head, {self.n_head}')
        if self.n_head % self.tp_size:
            raise ValueError(f'tp_size is {self.tp_size}, it must divide n_head, {self.n_head}')
        for i, name in enumerate(self.block_types):
            if not isinstance(name, str) or name not in BLOCKS:
                raise ValueError(f'block_types has {name!r} at layer {i}, not one of {", ".join(BLOCKS)}')
        if len(self.block_types) != self.n_layer:
            raise ValueError(f'block_types has {len(self.block_types)} entries, n_layer is {self.n_layer}')


# a rank's shards of the parameters: sharded processes hold these under the dense names


def sharding(name):
    """
    (dim, parts) of a sharded parameter: along dim, each of its stacked parts apart. None for a replicated
    one.
    """
    if 'c_attn' in name:
        return 0, 3
    if 'c_fc' in name:
        return 0, 1
    return (1, 1) if name.endswith('c_proj.weight') else None


def take_shard(name, full, ranks):
    """The hosted ranks' slice of a dense parameter, or of a tensor of its shape."""
    if sharding(name) is None or ranks.group is None:
        return full
    dim, parts = sharding(name)
    by_process = full.unflatten(dim, (parts, ranks.processes, -1))
    return by_process.select(dim + 1, ranks.index).flatten(dim, dim + 1).contiguous()   # fused AdamW needs it


def join_shards(name, shard, ranks):
    """The dense tensor of which each process of the group has a slice, on all of them. A collective call."""
    if sharding(name) is None or ranks.group is None:
        return shard
    dim, parts = sharding(name)
    shards = [torch.empty_like(shard) for _ in range(ranks.processes)]
    dist.all_gather(shards, shard.contiguous(), group=ranks.group)
    return torch.stack([s.unflatten(dim, (parts, -1)) for s in shards], dim + 1).flatten(dim, dim + 2)


def parallel_cross_entropy(x, weight, targets, ranks):
    """
    Cross-entropy with the vocabulary sharded (Megatron-LM, section 3): no process sees another's logits.

    x common (N, C), weight (V, C) of which this process reads its rows, targets (N,) -> the mean over those
    not -1
    """
    V, n = weight.size(0), ranks.processes
    low, high = V * ranks.index // n, V * (ranks.index + 1) // n
    logits = F.linear(f_op(x, ranks, in_stream=False), weight[low:high])                # (N, V/R)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    largest = logits.detach().amax(-1)                                                  # (N,)
    dist.all_reduce(largest, dist.ReduceOp.MAX, ranks.group)
    logits = logits - largest[:, None]
    here = (targets >= low) & (targets < high)
    target = logits.gather(-1, (targets - low).clamp(0, high - low - 1)[:, None]).squeeze(-1) * here
    total, target = g_op(torch.stack((logits.exp().sum(-1), target)), ranks, in_stream=False)   # (N,) common
    counted = targets != -1
    return ((total.log() - target) * counted).sum() / counted.sum()


class GPT(nn.Module):
    def __init__(self, config, ranks=None):
        """ranks: those that this process hosts; None for all of them."""
        super().__init__()
        self.config = config
        self.ranks = ranks or Ranks(config.tp_size, config.tp_size)
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(config.vocab_size, config.n_embd),
            wpe=nn.Embedding(config.block_size, config.n_embd),
            h=nn.ModuleList(BLOCKS[name](config, self.ranks) for name in config.block_types),
            ln_f=nn.LayerNorm(config.n_embd, bias=config.bias),
        ))
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = self.transformer.wte.weight
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """
        GPT-2's. The draws do not depend on block_types or tp_size: one seed gives every config one network.

            wte, wpe, c_attn, c_fc      normal, std 0.02
            c_proj                      normal, std 0.02 / sqrt(2 n_layer): 2 n_layer of them add up
            LayerNorms                  weight 1
            every bias                  0
        """
        for name, p in self.named_parameters():
            if name.endswith('bias'):
                p.zero_()
            elif p.dim() == 1:
                p.fill_(1)
            else:
                p.normal_(0, 0.02 / math.sqrt(2 * self.config.n_layer) if 'c_proj' in name else 0.02)

    def forward(self, idx, targets=None):
        """
        idx (B, T) -> (logits (B, T, V), None); with targets (B, T) -> (None, loss): the mean cross-entropy,
        in nats a token, over the targets that are not -1.
        """
        T = idx.size(1)
        assert T <= self.config.block_size, f'{T} tokens, block_size is {self.config.block_size}'
        c = self.transformer.wte(idx) + self.transformer.wpe(torch.arange(T, device=idx.device))
        c = F.dropout(enter(c, self.ranks), self.config.dropout, self.training)         # common (B, T, C)
        stream = Stream.start(c, self.ranks)
        for block in self.transformer.h:
            stream = block(stream)
        if stream.d_sum is not None:
            stream = stream.sync()
        ln_f = self.transformer.ln_f
        weight, bias = enter(ln_f.weight, self.ranks), enter(ln_f.bias, self.ranks)
        x = F.layer_norm(stream.c, ln_f.normalized_shape, weight, bias, ln_f.eps)       # common (B, T, C)
        if targets is None:
            return F.linear(x, enter(self.lm_head.weight, self.ranks)), None
        return None, self.cross_entropy(x.flatten(0, 1), targets.flatten())

    def cross_entropy(self, x, targets):
        """x common (B*T, C), targets (B*T,) -> the mean over the targets that are not -1"""
        if self.ranks.group is None:
            return F.cross_entropy(self.lm_head(x), targets, ignore_index=-1)
        return parallel_cross_entropy(x, self.lm_head.weight, targets, self.ranks)

    def shard(self, ranks):
        """This dense network as one process of a tensor-parallel group holds it."""
        sharded = GPT(self.config, ranks)
        sharded.load_dense(self.state_dict())
        return sharded

    def sum_replicated_gradients(self):
        """Replicated parameters' gradients, summed over the processes of the group in one flat all-reduce."""
        if self.ranks.group is not None:
            grads = [p.grad for name, p in self.named_parameters() if sharding(name) is None]
            flat = torch.cat([grad.flatten() for grad in grads])
            dist.all_reduce(flat, group=self.ranks.group)
            torch._foreach_copy_(grads, [part.view_as(grad) for part, grad in zip(
                flat.split([grad.numel() for grad in grads]), grads)])

    def gradient_norm(self):
        """The norm of the dense network's gradient, each parameter counted once. A 0-dim tensor."""
        sharded, replicated = [], []
        for name, p in self.named_parameters():
            (replicated if sharding(name) is None else sharded).append(p.grad)
        norms = torch.stack((get_total_norm(sharded), get_total_norm(replicated)))
        if self.ranks.group is None:
            return norms.norm()
        squares = norms.square()
        dist.all_reduce(squares[:1], group=self.ranks.group)
        return squares.sum().sqrt()

    def load_dense(self, state):
        """Loads a dense state_dict, of which a sharded process keeps its slices."""
        self.load_state_dict({name: take_shard(name, full, self.ranks) for name, full in state.items()})

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None):
        """
        idx (B, T) -> (B, T + max_new_tokens), each sampled given at most the block_size tokens before it.
        """
        training = self.training
        self.eval()
        for _ in range(max_new_tokens):
            logits = self(idx[:, -self.config.block_size:])[0][:, -1].float() / temperature    # (B, V)
            if top_k is not None:
                kth = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
                logits = logits.masked_fill(logits < kth, -math.inf)
            idx = torch.cat((idx, torch.multinomial(logits.softmax(-1), 1)), dim=1)
        self.train(training)
        return idx

    def configure_optimizers(self, weight_decay, learning_rate, betas):
        """AdamW. Matrices and embeddings decay; biases and LayerNorms do not."""
        params = list(self.parameters())
        groups = [dict(params=[p for p in params if p.dim() >= 2], weight_decay=weight_decay),
                  dict(params=[p for p in params if p.dim() < 2], weight_decay=0.0)]
        return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=True)

    def num_params(self):
        """All parameters, the tied head's once."""
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self):
        """
        Forward and backward, by PaLM's count (arXiv 2204.02311, appendix B): 6 for each parameter but wpe's,
        and 12 n_layer n_embd T for attention, as if it were not causal. Every block type does the same work.
        """
        parameters = self.num_params() - self.transformer.wpe.weight.numel()
        return 6 * parameters + 12 * self.config.n_layer * self.config.n_embd * self.config.block_size
