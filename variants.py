"""
Block types beside model.py's own: other ways to spend few all-reduces.

    python train.py config/rivals/train_gpt2_palm.py config/cpu.py
    python sweep.py config/rivals/*.py --with config/cpu.py --seed=1,2,3

A new one takes a class here, with a name of its own, and a line in configurator.COMMUNICATIONS.
"""

from contextlib import contextmanager
from dataclasses import fields
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F

from configurator import check_blocks
from model import (
    Block,
    GPTConfig,
    add_optional,
    checks,
    compute_dtype,
    enter_stream,
    f_op,
    g_op,
    open_counters,
)

checks.append(check_blocks)


class AttentionSPDBlock(Block, name='attn_spd'):
    """attention, sync, MLP: the complement of Sync-Point Drop. 1 sync point; the MLP waits for the next."""

    def forward(self, s):
        s = s.sync(self.attn(self.ln_1(s.u), s.cache))
        return s.add(self.mlp(self.ln_2(s.u)))


class PaLMBlock(Block, name='palm'):
    """
    Attention beside the MLP: both read the same stream, so nothing drifts. 1 sync point.

    PaLM (arXiv 2204.02311, section 2), but two LayerNorms, as in GPT-NeoX, so that parameters are GPT-2's.
    """

    def forward(self, s):
        return s.sync(self.attn(self.ln_1(s.u), s.cache), self.mlp(self.ln_2(s.u)))


class FALBlock(Block, name='fal'):
    """
    PaLM's layer, but its MLP also reads a, the first fal layer's attention output, normalized. 1 sync point.

    The first fal layer syncs as a TPBlock does and keeps a, which includes any drift from before it. Our
    reading of FAL (arXiv 2510.14614), which leaves details open.
    """

    def forward(self, s):
        if s.carry is not None:
            return s.sync(self.attn(self.ln_1(s.u), s.cache), self.mlp(self.ln_2(s.u + s.carry)))
        before, s = s.c, s.sync(self.attn(self.ln_1(s.u), s.cache))
        a = F.layer_norm(s.c - before, before.shape[-1:])  # replicated (B, T, C)
        # hidden: in backward this layer's MLP need not wait for it
        s = s._replace(carry=f_op(a, s.tp, kind='hidden'))
        return s.sync(self.mlp(self.ln_2(s.u)))


class StaleBlock(Block, name='stale'):
    """
    PaLM's layer, whose attention reads what the first of a run of stale layers has read. 1 sync point.

    After modded-nanogpt's record 77. The next stale layer's attention does not read what the sync gives, so
    the all-reduce can run behind it.
    """

    def forward(self, s):
        types, i = self.config.block_types, self.layer
        stale = s.carry if i > 0 and types[i - 1] == 'stale' else s.u
        kind = 'hidden' if 'stale' in types[i + 1:i + 2] else 'blocking'
        s = s.sync(self.attn(self.ln_1(stale), s.cache), self.mlp(self.ln_2(s.u)), kind=kind)
        return s._replace(carry=stale)


class Flight:
    """
    A hidden all-reduce each way: started where its sum is known, waited for where it is read.

    g_op and f_op are cut in two halves, take_off() and land(). What lies between them reads neither sum.
    Simulated and compiled runs do without: they send at land().
    """
    hide = True

    def __init__(self, tp):
        self.group = tp.group

    @classmethod
    @contextmanager
    def waited_for(cls):
        """Inside the `with` none is started early, which bench.py compares."""
        cls.hide = False
        try:
            yield
        finally:
            cls.hide = True

    def start(self, way, partial):
        for counter in open_counters:
            counter.append((way, 'hidden', partial.nbytes))
        self.message = partial.clone(memory_format=torch.contiguous_format)
        self.work = dist.all_reduce(self.message, group=self.group, async_op=True)

    def wait(self):
        self.work.wait()
        message, self.message = self.message, None
        return message

    def take_off(self, partial, c):
        """partial, c (B, T, C) -> c for land()"""
        return TakeOff.apply(partial.to(compute_dtype(partial)), c, self)

    def land(self, c):
        """c -> c + the sum over ranks, replicated, and the same again, to be read by the ranks"""
        return Land.apply(c, self)


class TakeOff(torch.autograd.Function):
    @staticmethod
    def forward(ctx, partial, c, flight):
        ctx.flight = flight
        flight.start('forward', partial)
        return c.view_as(c)

    @staticmethod
    def backward(ctx, grad):
        grad = grad + ctx.flight.wait().to(grad.dtype)
        return grad, grad, None


class Land(torch.autograd.Function):
    @staticmethod
    def forward(ctx, c, flight):
        ctx.flight, ctx.dtype = flight, compute_dtype(c)
        c = c + flight.wait()
        return c, c.view_as(c)

    @staticmethod
    def backward(ctx, grad, grad_u):
        ctx.flight.start('backward', grad_u.to(ctx.dtype))
        return grad, None


def new_flight(s, n, block):
    """
    The Flight of a sync that is due n sublayers after this block's. None if it cannot start early: simulated,
    compiled, due after the last sublayer, or a block of another type may sync before and send it too.
    """
    types, first = block.config.block_types, 2 * block.config.n_layer - s.left
    own, between = types[block.layer], types[first // 2:(first + n + 1) // 2]
    if s.tp.simulated or torch.compiler.is_compiling() or not Flight.hide or s.left <= n:
        return None
    return Flight(s.tp) if set(between) <= {own, 'parallel'} else None


class DelayedSync(NamedTuple):
    """An entry of Stream.due: what enters c by a hidden all-reduce once only `left` sublayers are to come."""
    left: int
    P: torch.Tensor | None = None  # drifted, P_r of one sublayer; None: all that is apart
    flight: Flight | None = None  # if the all-reduce is on its way
    zero: torch.Tensor | None = None  # of P's flight, to which the sum is added

    def apply(self, s):
        if self.P is None and self.flight is None:
            return s.sync(kind='hidden')
        if self.P is None:
            c, u = self.flight.land(s.c)
            return s._replace(c=c, u=u, d_sum=None, due=())
        P_sum = self.P.sum(0)  # partial (B, T, C)
        if self.flight is None:
            total = g_op(P_sum.to(compute_dtype(P_sum)), s.tp, kind='hidden').to(s.c.dtype)
            total_u = f_op(total, s.tp, kind='hidden')
        else:
            total, total_u = self.flight.land(self.zero)
        return s._replace(c=s.c + total, u=s.u - self.P + total_u, d_sum=s.d_sum - P_sum, due=s.due[1:])

    def without(self, k):
        """The same without P's first k channels."""
        return self._replace(P=F.pad(self.P[..., k:], (k, 0)))


class LadderBlock(Block, name='ladder'):
    """
    TPBlock, but a sublayer's sync is waited for by the next sublayer but one. 2 sync points, hidden.

    Ladder-Residual (arXiv 2501.06589). What is apart before a ladder sublayer enters with it.
    """

    def forward(self, s):
        s = self.late_sync(s, self.attn(self.ln_1(s.u), s.cache))
        return self.late_sync(s, self.mlp(self.ln_2(s.u)))

    def late_sync(self, s, product):
        P_sum, s = product.sum_over_ranks(), s.arrive(1)
        # c and d_sum are not read before that sync, and u stays
        c, d_sum = add_optional(s.c, enter_stream(product.bias(), s.tp)), add_optional(P_sum, s.d_sum)
        flight = new_flight(s, 1, self)
        c = flight.take_off(d_sum, c) if flight else c
        return s._replace(c=c, d_sum=d_sum, due=(DelayedSync(s.left - 1, flight=flight), *s.due))


class DTPBlock(Block, name='dtp'):
    """
    P_r is added to d_r at once; dtp_delay sublayers later sum_r P_r is added to c, and P_r taken out of d_r.
    2 sync points.

    Delayed Tensor Parallelism (Kog.ai, 2026). At delay 0 it is a TPBlock. What was apart before stays apart.
    """

    def forward(self, s):
        s = self.delay(s, self.attn(self.ln_1(s.u), s.cache))
        return self.delay(s, self.mlp(self.ln_2(s.u)))

    def delay(self, s, product):
        if self.config.dtp_delay == 0:
            return s.sync(product)
        P = product.per_rank().to(s.c.dtype)  # drifted
        s = s.add(Multiplied(P, product.bias()))
        flight = new_flight(s, self.config.dtp_delay, self)
        zero = flight and flight.take_off(P.sum(0), s.c.new_zeros(()).expand_as(s.c))
        return s._replace(due=(*s.due, DelayedSync(s.left - self.config.dtp_delay, P, flight, zero)))


class Multiplied(NamedTuple):
    """A RowProduct whose P_r are known."""
    P: torch.Tensor  # drifted (L, B, T, C)
    b: torch.Tensor | None

    def per_rank(self):
        return self.P

    def bias(self):
        return self.b


class CAATBlock(Block, name='caat'):
    """
    TPBlock, but a sync sums the first caat_share of the channels only; the others stay with their rank.

    CAAT-Net (arXiv 2506.19645). 2 sync points; the one after the last sublayer is the model's, in full.
    """

    def forward(self, s):
        s = self.sync_share(s, self.attn(self.ln_1(s.u), s.cache))
        return self.sync_share(s, self.mlp(self.ln_2(s.u)))

    def sync_share(self, s, product):
        C = self.config.n_embd
        k = max(1, round(self.config.caat_share * C))
        if k == C:
            return s.sync(product)
        s = s.add(product)
        if s.left == 0:
            return s
        message = s.d_sum[..., :k]
        c = s.c[..., :k] + g_op(message.to(compute_dtype(message)), s.tp)  # replicated (B, T, k)
        u = f_op(c, s.tp).expand(s.tp.local, *c.shape)
        return s._replace(c=torch.cat((c, s.c[..., k:]), -1), u=torch.cat((u, s.u[..., k:]), -1),
                          d_sum=F.pad(s.d_sum[..., k:], (k, 0)), due=tuple(part.without(k) for part in s.due))


def gpt_config(keys, vocab_size=None):
    """
    The GPTConfig of a run's keys, a dict. It knows every block type of model.py and of this file.

    vocab_size: unless the keys give one. Raises ValueError, in one line, if the keys do not fit together.
    """
    shape = {field.name: keys[field.name] for field in fields(GPTConfig) if field.name in keys}
    return GPTConfig(**shape | dict(vocab_size=keys.get('vocab_size') or vocab_size))
