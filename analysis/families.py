"""
The verdict on each row, the answer, and the pairs of rows: runs.py's rows with the statistics of verdicts.py.

The rows of one recipe share one spread. Dunnett's test is over what the plan names, or else over the nets
that the answer is read from; the other rows of a tp_size are a second, exploratory family. Pairs of rows are
tested with the same spread and adjusted by Holm: those that the plan names, and apart from them all others.
"""

import math
import statistics
from collections import Counter
from dataclasses import dataclass
from itertools import permutations
from typing import NamedTuple

from scipy.stats import t

from analysis.runs import Estimate, Row, by_note, paired, to_dense
from analysis.verdicts import (
    ALPHA,
    PASSES,
    Spread,
    family_spread,
    fewest,
    holm,
    judge_family,
    seeds_to_show,
)

GUIDE_UNITS = [['tp'], ['tp', 'spd'], ['tp', 'spd', 'spd'], ['spd'], ['spd', 'parallel'],
               ['spd', 'parallel', 'parallel'], ['parallel']]
USUAL_SD = 0.016  # nats: of a single paired difference, as seen at widths 64 to 256 on bytes
POWER = 0.9


# the verdicts


def judge_rows(rows, margin, plan=None):
    """Set each row's margin, spread, verdict, and whether the plan names it."""
    for own in by_note(rows).values():
        control = own[0] if own[0].dense else None
        spread = control and spread_of(own, control)
        for row in own:
            row.margin, row.spread = margin, spread
            row.planned = plan is not None and plan.names(row)
        if control:
            for family in families(own):
                losses = {row: row.losses for row in (control, *family)}
                identical = [row for row in family if row.all_tp]
                for row, verdict in judge_family(losses, control, spread, margin, identical).items():
                    row.verdict = verdict


def spread_of(rows, control):
    """
    The Spread of a recipe's rows. It rests on those with every seed of the control; while none has, as in the
    middle of a sweep, on the seeds that give the most degrees of freedom.
    """
    losses = {row: row.losses for row in rows}
    identical = [row for row in rows if row.all_tp]
    spread = family_spread(losses, control, identical)
    if spread is None:
        shared = {tuple(seed for seed in control.losses if seed in row.losses)
                  for row in rows if not row.dense}
        parts = [family_spread(losses | {control: {seed: control.losses[seed] for seed in seeds}}, control,
                               identical) for seeds in sorted(shared)]
        spread = max(filter(None, parts), key=lambda part: part.df, default=None)
    return spread


def families(rows):
    """
    The rows of a recipe without the control, in lists: for each tp_size the main family and the others. The
    main family has what the plan names, else the nets of the answer that have every seed of the control.
    """
    found = {}
    sizes = {row.tp_size for row in rows if not row.dense}
    for tp_size in sorted(sizes):
        nets = candidates(rows, tp_size)
        main = [row for row in nets if row.losses.keys() >= row.control.losses.keys()] or nets
        for row in rows:
            if row.tp_size == tp_size and not row.dense:
                in_main = row.planned if has_plan(rows) else row in main
                found.setdefault((tp_size, in_main), []).append(row)
    return list(found.values())


def has_plan(rows):
    return any(row.planned and not row.dense for row in rows)


# the answer


def switches(row):
    """How often neighbouring blocks differ: many times if placed alternately, few times if clustered."""
    return sum(a != b for a, b in zip(row.block_types, row.block_types[1:]))


def follows_guide(row):
    """Whether its blocks repeat one of the guide's patterns."""
    types = row.block_types
    return any(types == unit * (len(types) // len(unit)) for unit in GUIDE_UNITS)


def candidates(rows, tp_size):
    """
    The rows of a recipe that the answer is read from, with most observed all-reduces first.

    They have tp, spd and parallel layers, and nothing varied. If a plan names some of them, it is these. Of
    several at one count it is the planned one, else the guide's pattern, else none.
    """
    nets = [row for row in rows if row.plain and not row.dense and row.tp_size == tp_size > 1]
    nets = [row for row in nets if row.planned] or nets
    counts = {}
    for row in sorted(nets, key=lambda row: -row.all_reduces['forward']):
        counts.setdefault(row.all_reduces['forward'], []).append(row)
    one_each = (same if len(same) == 1 else [row for row in same if follows_guide(row)][:1]
                for same in counts.values())
    return [row for same in one_each for row in same]


@dataclass
class Answer:
    """The fewest communications that are shown to be as good as dense, for one recipe and tp_size."""
    tp_size: int
    note: str  # the recipe's, under --mix
    tested: list  # Rows, most all-reduces first
    row: Row | None  # None if none is shown
    seeds: int | None  # that would show the next one, if it equals dense; None if nothing is left to show
    tuned: bool  # whether each config is at its own best of several values
    preliminary: bool
    edge: bool  # whether dense, or a net up to the answer, is at its best at the edge of its grid

    @property
    def first_failure(self):
        return next((row for row in self.tested if row.word not in PASSES), None)

    @property
    def beyond(self):
        """The rows after the first failure that would pass, which is exploratory."""
        place = self.tested.index(self.first_failure) if self.first_failure else len(self.tested)
        return [row for row in self.tested[place + 1:] if row.word in PASSES]


def find_answers(rows):
    """The Answers, that of the plan first, then by recipe and tp_size. None of a recipe without a control."""
    found = []
    for note, own in by_note(rows).items():
        if not own[0].dense:
            continue
        for tp_size in sorted({row.tp_size for row in own if row.tp_size > 1}):
            tested = candidates(own, tp_size)
            row = fewest(tested, [row.word or None for row in tested])
            rows_of_size = [row for row in own if row.tp_size == tp_size]
            used = [own[0], *tested[:tested.index(row) + 1 if row else None]]
            found.append((not has_plan(rows_of_size), Answer(
                tp_size, note, tested, row, seeds_for(tested), is_tuned(own[:1] + tested),
                own[0].preliminary, any(one.tuning and one.tuning.missing for one in used))))
    return [answer for _, answer in sorted(found, key=lambda pair: pair[0])]


def is_tuned(rows):
    """Whether each of these rows is at the best of several values of the tuned key."""
    return all(row.tuning is not None and row.tuning.compared for row in rows)


def seeds_for(tested):
    """The seeds with which a config that equals dense is shown to be as good, with 90% power."""
    left = [row for row in tested if row.word not in PASSES]
    if not left:
        return None
    sd = left[0].spread.pooled_sd if left[0].spread else USUAL_SD
    configs = max(1, sum(row.word != 'identical' for row in tested))
    return seeds_to_show(left[0].margin, sd, configs, POWER) if sd else 2


# the noise floor


class NoiseFloor(NamedTuple):
    """What a change of the initial weights that should not matter does to the loss of dense."""
    row: Row  # the perturbed twin
    size: float  # the root mean square of its differences to dense, nats per token
    largest: float
    n: int


def noise_floors(rows):
    found = []
    for row in rows:
        if row.twin and to_dense(row):
            off = [loss - row.control.losses[seed] for seed, loss in row.losses.items()
                   if seed in row.control.losses]
            found.append(NoiseFloor(row, math.sqrt(statistics.mean(one ** 2 for one in off)),
                                    max(map(abs, off)), len(off)))
    return found


# pairs of rows


@dataclass(eq=False)
class Comparison:
    """Two rows that differ in one thing, or that the plan names, and their paired difference."""
    kind: str  # placement, merge, sync, tp_size or pair
    first: Row
    second: Row
    difference: Estimate | None  # first minus second; None if they share no seed
    planned: bool = False
    p: float | None = None  # two-sided
    p_holm: float | None = None

    @property
    def verdict(self):
        """identical, lower, higher, equal (within the margin, by the 90% interval) or undecided."""
        if self.difference and self.difference.n > 1 and not any(
                self.first.losses[seed] - loss for seed, loss in self.second.losses.items()
                if seed in self.first.losses):
            return 'identical'
        if self.p_holm is None:
            return 'undecided'
        if self.p_holm < ALPHA:
            return 'lower' if self.difference.mean < 0 else 'higher'
        spread = self.first.spread
        half = t.isf(ALPHA, spread.df) * spread.error(self.difference.n)
        return 'equal' if abs(self.difference.mean) + half < self.first.margin else 'undecided'


def pair_kinds(rows):
    """[(kind, first, second)] of the pairs of rows that differ in one thing only, see comparisons()."""
    found, orders, sizes = [], {}, {}
    for row in rows:
        counts = frozenset(Counter(row.block_types).items())
        orders.setdefault((row.tp_size, row.note, row.varied, counts), []).append(row)
        sizes.setdefault((row.note, row.varied, *row.block_types), []).append(row)
    for same in orders.values():
        most, *others = sorted(same, key=switches, reverse=True)
        found += [('placement', most, other) for other in others if switches(other) < switches(most)]
    for a, b in permutations(rows, 2):
        if (a.tp_size, a.note) == (b.tp_size, b.note):
            as_mean = b.variation | dict(merge='mean')
            if a.block_types == b.block_types and a.variation == as_mean != b.variation:
                found.append(('merge', a, b))
            as_spd = ['spd' if name == 'attn_spd' else name for name in a.block_types]
            if a.block_types != as_spd == b.block_types and a.variation == b.variation:
                found.append(('sync', a, b))
    for same in sizes.values():
        same.sort(key=lambda row: row.tp_size)
        found += [('tp_size', same[-1], same[0])] * (len(same) > 1)
    return sorted(found, key=lambda one: ('placement', 'merge', 'sync', 'tp_size').index(one[0]))


def comparisons(rows, plan=None):
    """
    The Comparisons that the plan names, and those of rows that differ in one thing only:

    placement   the same blocks in the most alternating order, minus each more clustered order
    merge       the mean of the ranks' additions, minus their sum
    sync        the MLP's sync dropped (attn_spd), minus attention's (spd)
    tp_size     the same blocks with the most ranks, minus with the fewest
    """
    configs = [row for row in rows if not row.dense]
    named = [('pair', a, b) for a, b in permutations(rows, 2)
             if plan and a.note == b.note and (a.tp_size == b.tp_size or a.dense or b.dense)
             and not a.variation and not b.variation and plan.names_pair(a, b)]
    found = [Comparison(kind, a, b, paired(a, b), kind == 'pair')
             for kind, a, b in [*named, *pair_kinds(configs)]]
    for planned in (True, False):
        tested = [one for one in found if one.planned is planned and set_p(one)]
        for one, p in zip(tested, holm([one.p for one in tested])):
            one.p_holm = p
    return found


def set_p(one):
    """Set the p of a Comparison from its recipe's spread; returns whether it has one."""
    spread = one.first.spread
    if one.difference and spread and one.verdict != 'identical':
        one.p = two_sided(one.difference.mean, spread, one.difference.n)
    return one.p is not None


def two_sided(difference, spread: Spread, n):
    """The two-sided p of a paired difference over n seeds; 0 or 1 if there is no spread at all."""
    error = spread.error(n)
    if error == 0:
        return float(difference == 0)
    return float(2 * t.sf(abs(difference) / error, spread.df))
