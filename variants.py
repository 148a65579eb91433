"""
Block types beside model.py's own: other ways to spend few all-reduces.

    python train.py config/variants/train_gpt2_12comm_attn.py config/cpu.py
    python sweep.py config/variants/*.py --with config/cpu.py --seed=1,2,3

A new one takes a class here, with a name of its own, and a line in configurator.COMMUNICATIONS.
"""

from dataclasses import fields

from model import Block, GPTConfig


class AttentionSPDBlock(Block, name='attn_spd'):
    """attention, sync, MLP: the complement of Sync-Point Drop. 1 sync point; the MLP waits for the next."""

    def forward(self, s):
        s = s.sync(self.attn(self.ln_1(s.u)))
        return s.add(self.mlp(self.ln_2(s.u)))


class PaLMBlock(Block, name='palm'):
    """
    Attention beside the MLP: both read the same stream, so nothing drifts. 1 sync point.

    PaLM (arXiv 2204.02311, section 2), but two LayerNorms, as in GPT-NeoX, so that parameters are GPT-2's.
    """

    def forward(self, s):
        return s.sync(self.attn(self.ln_1(s.u)), self.mlp(self.ln_2(s.u)))


def gpt_config(keys, vocab_size):
    """
    The GPTConfig of a run's keys, a dict. It knows every block type of model.py and of this file.

    Raises ValueError, in one line, if the keys do not fit together.
    """
    shape = {field.name: keys[field.name] for field in fields(GPTConfig) if field.name in keys}
    return GPTConfig(**shape | dict(vocab_size=vocab_size))
