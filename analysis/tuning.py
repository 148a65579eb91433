"""
A grid over one key, such as the learning rate, read as one experiment: each config at its own best value.

The best value of a config has the lowest mean validation loss over the tuning seeds. The answer is read from
other seeds, since the loss that a value was chosen for is too low on average.

References  sensitivity to the learning rate: Wortsman et al. (2023), Small-scale proxies for large-scale
            Transformer training instabilities
"""

import statistics
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

from configurator import HOUSEKEEPING, VARIED, fail, read_defaults, within_limits


class Tuned(NamedTuple):
    """What --tuned asks for."""
    key: str
    tuning_seeds: tuple
    answer_seeds: tuple = ()  # none named: all that are not for tuning
    fixed: frozenset = frozenset()  # values of min_lr that stay while learning_rate varies

    def is_answer(self, seed):
        return seed not in self.tuning_seeds and (not self.answer_seeds or seed in self.answer_seeds)

    def uses(self, seed):
        return seed in self.tuning_seeds or self.is_answer(seed)


def check_tuned(key, tuning_seeds):
    """End the program, in one line, if this key cannot be tuned on these seeds."""
    kinds = {name: kind for name, (_, kind, _) in read_defaults().items()}
    if key not in kinds or key in HOUSEKEEPING | VARIED or kinds[key] not in (int, float, float | None):
        fail(f'--tuned is {key}, it must be a key of the recipe that is a number, such as learning_rate')
    if not tuning_seeds:
        fail(f'--tuned={key} needs --tuning_seeds: those that choose the best value, and are in no answer')


def fixed_min_lr(configs):
    """
    The values of min_lr that stay while learning_rate varies: those that configs, as dicts, have at several
    rates, unless min_lr is a tenth at several. Then it follows the rate, but for odd runs.
    """
    rates, followed = {}, set()
    for config in configs:
        rates.setdefault(config['min_lr'], set()).add(config['learning_rate'])
        followed |= {config['learning_rate']} if config['min_lr'] == tenth(config['learning_rate']) else set()
    return frozenset(lowest for lowest, own in rates.items() if len(own) > 1 and len(followed) < 2)


def tenth(rate):
    """min_lr, unset."""
    return float(f'{rate / 10:.12g}')


def without_tuned(recipe, tuned):
    """
    A recipe, as a dict, without what --tuned varies. min_lr, unset, is a tenth of learning_rate, and varies
    with it.
    """
    if tuned is None:
        return recipe
    free = {tuned.key}
    if tuned.key in ('batch_size', 'gradient_accumulation_steps'):
        free.add('windows per step')
    fixed = {key: value for key, value in recipe.items() if key not in free}
    if (tuned.key == 'learning_rate' and fixed['min_lr'] not in tuned.fixed
            and fixed['min_lr'] == tenth(recipe['learning_rate'])):
        fixed['min_lr'] = 'a tenth of the rate'
    return fixed


@dataclass
class Tuning:
    """One config over the values of the tuned key."""
    tuned: Tuned
    runs: dict  # value -> {seed: Run}
    diverged: set = field(default_factory=set)  # values at which a run of it diverged
    means: dict = field(init=False)  # value -> mean loss over the tuning seeds, if all of them finished
    best: float | None = field(init=False)  # None: several values, and none has every tuning seed
    twin: bool = field(init=False, default=False)  # whether it is dense's perturbed twin

    def __post_init__(self):
        seeds = self.tuned.tuning_seeds
        self.runs = dict(sorted(self.runs.items()))
        self.means = {value: statistics.mean(own[seed].loss for seed in seeds)
                      for value, own in self.runs.items() if own.keys() >= set(seeds)}
        self.best = min(self.means, key=self.means.get, default=None)
        if self.best is None and len(self.runs) == 1:
            self.best = next(iter(self.runs))

    def follow(self, dense):
        """Be at the best value of dense, whose perturbed twin this is, or at none. A twin chooses nothing."""
        self.twin, self.means = True, {}
        self.best = dense.best if dense and dense.best in self.runs else None

    @property
    def compared(self):
        """Whether several values were compared, so that the best was chosen."""
        return len(self.means) > 1

    def chosen(self, for_answer):
        """{seed: Run} at the best value, of the seeds for the answer or of those for tuning."""
        return {seed: run for seed, run in self.runs.get(self.best, {}).items()
                if (self.tuned.is_answer(seed) if for_answer else seed in self.tuned.tuning_seeds)}

    def judges(self, run):
        """Whether a run is at the best value, and of a seed for the answer; or each value has diverged."""
        if self.best is None:
            return self.runs.keys() <= self.diverged
        return run.config[self.tuned.key] == self.best and self.tuned.is_answer(run.config['seed'])

    @property
    def missing(self):
        """
        The values to run next on all tuning seeds: those that only some have run, and beyond the grid if the
        best lies at its edge. None if no best was chosen.

        The grid goes on by the factor between its last two values, 2 if there is one value, as far as the
        key's own limits. A value that some tuning seeds have not run bounds it, and is settled if it is worse
        than the best on all that have, or has diverged.
        """
        if not self.means or self.best <= 0:  # a key that is best at 0 has no factor to go on by
            return []
        started = {value for value, own in self.runs.items() if own.keys() & set(self.tuned.tuning_seeds)}
        found = [*started - self.means.keys() - self.worse.keys() - self.diverged]
        grid = sorted(started | self.diverged)
        place = grid.index(self.best)
        factors = [after / before for before, after in pairwise(grid) if before > 0] or [2]
        if place == 0:
            found += self.beyond(self.best / factors[0])
        if place == len(grid) - 1:
            found += self.beyond(self.best * factors[-1])
        return sorted(found)

    def beyond(self, value):
        """A value that the grid goes on with, [] if the key may not have it."""
        kind = int if isinstance(self.best, int) else float
        value = kind(float(f'{value:.12g}'))
        return [value] if value != self.best and within_limits(self.tuned.key, value) else []

    @property
    def worse(self):
        """{value: its tuning seeds} if it lacks some, and is worse than the best value on those it has."""
        found = {}
        for value in self.runs.keys() - self.means.keys() if self.means else ():
            own, best = self.runs[value], self.runs[self.best]
            seeds = [seed for seed in self.tuned.tuning_seeds if seed in own]
            if seeds and all(own[seed].loss > best[seed].loss for seed in seeds):
                found[value] = seeds
        return found

    def sensitivity(self, values):
        """The mean excess of the loss over that of the best value, over these values; None if one lacks."""
        if not values or not values <= self.means.keys():
            return None
        return statistics.mean(self.means[value] for value in values) - self.means[self.best]


def common_values(rows):
    """The values of the tuned key that all tuned rows share, over which their sensitivities compare."""
    grids = [row.tuning.means.keys() for row in rows if row.tuning and row.tuning.compared]
    return set.intersection(*map(set, grids)) if grids else set()
