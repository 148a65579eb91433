"""
Repair of a net whose syncs were dropped: the dense net of the same weights teaches it.

    python train.py --init_from=FILE --block_types=spd --distill=True --train_layers=3,4

References  Hinton, Vinyals, Dean (arXiv 1503.02531), section 2: the temperature, and its square in the loss
            Sync-Point Drop (arXiv 2502.20727): distills block by block, each to its own output; here the
            net's logits teach whatever layers --train_layers names
"""

import hashlib
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from model import GPT


class Teacher(NamedTuple):
    model: GPT  # dense, frozen
    sha256: str  # of its weights, by which a resumed run knows it again


def find_teacher(config, model_config, weights, world):
    """The Teacher: the dense net of these weights, not sharded. None if the run does not distill."""
    if weights is None or not config.distill:
        return None
    digest = hashlib.sha256()
    for name, p in sorted(weights.items()):
        digest.update(name.encode())
        digest.update(p.contiguous().numpy())
    model = GPT(replace(model_config, tp_size=1, block_types=None, merge='sum'))
    model.load_state_dict(weights)
    return Teacher(model.requires_grad_(False).eval().to(world.device), digest.hexdigest())


def with_teacher(model, teacher, config):
    """The GPT, or with a Teacher the Distilled that trains it as the config says."""
    return model if teacher is None else Distilled(
        model, teacher.model, config.distill_temperature, config.distill_weight)


class Distilled(nn.Module):
    """A GPT whose training loss is that against a teacher. In eval mode its loss is the text's, as ever."""

    def __init__(self, student, teacher, temperature=1.0, weight=1.0):
        super().__init__()
        self.student, self.temperature, self.weight = student, temperature, weight
        self.teachers = (teacher,)  # in a tuple: no submodule, so train() and DDP leave it alone

    def forward(self, idx, targets):
        """idx, targets (B, T) -> (None, loss); of a sharded student, whole logits are on every process"""
        if not self.training:
            return self.student(idx, targets)
        logits = self.student(idx)[0].flatten(0, 1)  # (N, V)
        with torch.no_grad():
            wanted = self.teachers[0](idx)[0].flatten(0, 1)  # (N, V)
        loss = self.weight * divergence(logits, wanted, self.temperature)
        if self.weight < 1:
            loss = loss + (1 - self.weight) * F.cross_entropy(logits, targets.flatten(), ignore_index=-1)
        return None, loss

    @property
    def config(self):
        return self.student.config

    @property
    def tp(self):
        return self.student.tp


def divergence(logits, wanted, temperature):
    """
    temperature^2 x KL(softmax(wanted / temperature) || softmax(logits / temperature)), in nats per token.

    logits, wanted (N, V) -> the mean over N. The gradient of the KL shrinks with the square of the
    temperature; times that, it keeps its size beside the text's (Hinton et al., section 2).
    """
    log_q, log_p = (F.log_softmax(x.to(torch.promote_types(x.dtype, torch.float32)) / temperature, -1)
                    for x in (logits, wanted))
    return temperature**2 * F.kl_div(log_q, log_p, reduction='batchmean', log_target=True)
