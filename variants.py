"""
Block types beside model.py's own: other ways to spend few all-reduces.

    python train.py config/rivals/train_gpt2_palm.py config/cpu.py
    python sweep.py config/rivals/*.py --with config/cpu.py --seed=1,2,3

A new one takes a class here, with a name of its own, and a line in configurator.COMMUNICATIONS.
"""

from dataclasses import fields
from typing import NamedTuple

import torch
import torch.nn.functional as F

from configurator import check_blocks
from model import Block, GPTConfig, add_optional, checks, compute_dtype, enter_stream, f_op, g_op

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
    PaLM's layer, whose MLP also reads a, what the attention of the first fal layer added. 1 sync point.

    The first fal layer is a TPBlock and keeps a. After FAL (arXiv 2510.14614), as far as the paper tells.
    """

    def forward(self, s):
        if s.carry is not None:
            return s.sync(self.attn(self.ln_1(s.u), s.cache), self.mlp(self.ln_2(s.u + s.carry)))
        before, s = s.c, s.sync(self.attn(self.ln_1(s.u), s.cache))
        a = F.layer_norm(s.c - before, before.shape[-1:])  # replicated (B, T, C)
        # backward, this layer's MLP does without the all-reduce
        s = s._replace(carry=f_op(a, s.tp, kind='hidden'))
        return s.sync(self.mlp(self.ln_2(s.u)))


class StaleBlock(Block, name='stale'):
    """
    PaLM's layer, whose attention reads what the first of a run of stale layers has read. 1 sync point.

    After modded-nanogpt's record 77. The next stale layer's attention does without the sync.
    """

    def forward(self, s):
        types, i = self.config.block_types, self.layer
        stale = s.carry if i > 0 and types[i - 1] == 'stale' else s.u
        kind = 'hidden' if 'stale' in types[i + 1:i + 2] else 'blocking'
        s = s.sync(self.attn(self.ln_1(stale), s.cache), self.mlp(self.ln_2(s.u)), kind=kind)
        return s._replace(carry=stale)


class Arrival(NamedTuple):
    """An entry of Stream.due: what enters c by a hidden all-reduce once only `left` sublayers are to come."""
    left: int
    P: torch.Tensor | None = None  # drifted, P_r of one sublayer; None: all that is apart

    def enter(self, s):
        if self.P is None:
            return s.sync(kind='hidden')
        P_sum = self.P.sum(0)  # partial (B, T, C)
        total = g_op(P_sum.to(compute_dtype(P_sum)), s.tp, kind='hidden').to(s.c.dtype)
        u = s.u - self.P + f_op(total, s.tp, kind='hidden')
        return s._replace(c=s.c + total, u=u, d_sum=s.d_sum - P_sum, due=s.due[1:])

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
        s = s.arrive(1)
        # c and d_sum are not read before that sync, and u stays
        c = add_optional(s.c, enter_stream(product.bias(), s.tp))
        d_sum = add_optional(product.sum_over_ranks(), s.d_sum)
        return s._replace(c=c, d_sum=d_sum, due=(Arrival(s.left - 1), *s.due))


class DTPBlock(Block, name='dtp'):
    """
    P_r enters d_r at once, and its sum enters c, as P_r leaves d_r, dtp_delay sublayers later. 2 sync points.

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
        return s._replace(due=(*s.due, Arrival(s.left - self.config.dtp_delay, P)))


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
