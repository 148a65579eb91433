"""
train.py with block types that the experiment asks about and the model does not have.

    python variants.py config/variants/train_gpt2_12comm_mean.py config/cpu.py
    python sweep.py config/variants/*.py --script variants.py --with config/cpu.py --seed=1,2,3

    mean_tp, mean_spd, mean_parallel    the merge is the mean, c <- c + (sum_r d_r) / R. From the first of
                                        them on, every sync is: those of plain blocks and the last one too
    attn_spd                            attention, sync, MLP: the MLP's sync is dropped, not attention's
"""

import sys

from configurator import COMMUNICATIONS, load

if __name__ == '__main__':
    load(sys.argv[1:])                  # --help and mistakes are told before torch is loaded

import train
from model import BLOCKS, Block, ParallelBlock, SPDBlock, Stream, TPBlock


class MeanStream(Stream):
    """A stream whose sync points average over the ranks what they have added since the last one."""

    def sync(self, partial=None):
        """A sync point: c <- c + sum_r (d_r + P_r) / R, in one all-reduce, and the bias; d <- 0."""
        R = self.ranks.size
        d_sum = None if self.d_sum is None else self.d_sum / R
        partial = None if partial is None else partial._replace(y=partial.y / R)
        return Stream.sync(self._replace(d_sum=d_sum), partial)


def merged_by_mean(block):
    """The block class, reading and handing on a MeanStream."""
    class Mean(block):
        def forward(self, s):
            return super().forward(MeanStream(*s))
    return Mean


class AttentionSPDBlock(Block):
    """attention, sync, MLP. 1 sync point; what the MLP adds waits for the next layer's."""

    def forward(self, s):
        s = s.sync(self.attn(self.ln_1(s.u)))
        return s.add(self.mlp(self.ln_2(s.u)))


for kind, block in {'tp': TPBlock, 'spd': SPDBlock, 'parallel': ParallelBlock}.items():
    BLOCKS[f'mean_{kind}'] = merged_by_mean(block)
    COMMUNICATIONS[f'mean_{kind}'] = COMMUNICATIONS[kind]
BLOCKS['attn_spd'] = AttentionSPDBlock
COMMUNICATIONS['attn_spd'] = 1

if __name__ == '__main__':
    train.main(sys.argv[1:])
