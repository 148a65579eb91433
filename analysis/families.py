"""
The verdict on each row, the answer, and the pairs of rows: runs.py's rows with the statistics of verdicts.py.

The rows of one recipe share one spread. Dunnett's test is over what the plan names, or else over the nets
that the answer is read from; the other rows of a tp_size are a second, exploratory family. Pairs of rows are
tested with the same spread and adjusted by Holm in three families: those that the plan names, those at an
equal number of observed all-reduces, and the others.
"""

import math
import statistics
from collections import Counter
from dataclasses import dataclass, replace
from itertools import combinations, permutations
from typing import NamedTuple

from scipy.stats import t

from analysis.runs import Estimate, Row, Run, by_note, is_plain, paired, to_dense
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
from configurator import GUIDE_UNITS, fail

USUAL_SD = 0.016  # nats: of a single paired difference, as seen at widths 64 to 256 on bytes
POWER = 0.9


# the verdicts


def judge_rows(rows, margin, plan=None):
    """
    Set each row's margin, spread, verdict, and whether the plan names it. A config that diverged on a seed
    does not pass: the losses that it has are those of the seeds that went well.
    """
    for own in by_note(rows).values():
        control = own[0] if own[0].dense else None
        for row in own:
            row.planned = plan is not None and plan.names(row)
        spread = control and spread_of(own, control, margin)
        for row in own:
            row.margin, row.spread = margin, spread
        if control:
            for family in families(own):
                losses = {row: row.losses for row in (control, *family)}
                identical = identical_rows(family, margin)
                for row, verdict in judge_family(losses, control, spread, margin, identical).items():
                    # the identity check diverges where dense does
                    alone = set(row.diverged) - set(control.diverged if verdict.word == 'identical' else ())
                    unsure = alone and verdict.word in PASSES
                    row.verdict = replace(verdict, word='undecided') if unsure else verdict


def identical_rows(rows, margin):
    """
    Those with all layers tp, at dense's value of the tuned key, that end within the margin of dense: the same
    function but for rounding. One that ends further off is a bug, and is judged as any other config.
    """
    return [row for row in rows if row.all_tp and (difference := to_dense(row))
            and abs(difference.mean) < margin
            and (row.tuning is None or row.tuning.best == row.control.tuning.best)]


def spread_of(rows, control, margin):
    """
    The Spread of a recipe's rows: of all that have certain seeds of the control, those that give the main
    family the most degrees of freedom. So neither one config that is a seed ahead chooses them, nor many
    exploratory ones that have fewer.
    """
    sizes = {row.tp_size for row in rows if not row.dense}
    main = [control, *(row for tp_size in sizes for row in main_family(rows, tp_size))]
    identical = identical_rows(rows, margin)

    def spread(own, seeds):
        losses = {row: row.losses for row in own} | {control: {seed: control.losses[seed] for seed in seeds}}
        return family_spread(losses, control, identical)

    for own in main, rows:  # all of them, if the main family has no degree of freedom
        shared = {tuple(seed for seed in control.losses if seed in row.losses) for row in own}
        df = {seeds: part.df for seeds in sorted(shared, key=lambda seeds: (-len(seeds), seeds))
              if (part := spread(own, seeds))}
        if df:
            return spread(rows, max(df, key=df.get))
    return None


def families(rows):
    """
    The rows of a recipe without the control, in lists: for each tp_size the main family and the others. The
    main family has what the plan names, else the nets of the answer.
    """
    found = {}
    sizes = {row.tp_size for row in rows if not row.dense}
    for tp_size in sorted(sizes):
        main = main_family(rows, tp_size)
        for row in rows:
            if row.tp_size == tp_size and not row.dense:
                found.setdefault((tp_size, row in main), []).append(row)
    return list(found.values())


def main_family(rows, tp_size):
    if has_plan(rows):
        return [row for row in rows if row.planned and row.tp_size == tp_size and not row.dense]
    return candidates(rows, tp_size)


def has_plan(rows):
    return any(row.planned and not row.dense for row in rows)


# the answer


def switches(row):
    """How often neighbouring blocks differ: many times if placed alternately, few times if clustered."""
    return sum(a != b for a, b in zip(row.block_types, row.block_types[1:]))


def follows_guide(row):
    """Whether its blocks repeat one of the guide's patterns."""
    return is_guides(row.block_types)


def is_guides(block_types):
    return any(block_types == unit * (len(block_types) // len(unit)) for unit in GUIDE_UNITS)


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
    control: Row
    tested: list  # Rows, most all-reduces first
    lost: Run | None  # that of most all-reduces of the nets that diverged in every run

    @property
    def note(self):
        """The recipe's, if there are several."""
        return self.control.note

    @property
    def preliminary(self):
        return self.control.preliminary

    @property
    def row(self):
        """The answer, None if none is shown."""
        return fewest(self.in_order, [row.word or None for row in self.in_order])

    @property
    def tuned(self):
        """Whether each config that is judged, and dense, is at its own best of several values."""
        return all(row.tuning is not None and row.tuning.compared
                   for row in (self.control, *self.tested) if row.word != 'identical')

    @property
    def edge(self):
        """Whether dense, or a net up to the answer, has values of the tuned key still to run."""
        used = self.tested[:self.tested.index(self.row) + 1] if self.row else self.tested
        return any(row.tuning and row.tuning.missing for row in (self.control, *used))

    @property
    def seeds(self):
        """
        Those with which the next config is shown to be as good, with 90% power, if it equals dense; None if
        nothing is left to show.
        """
        left = [row for row in self.tested if row.word not in PASSES]
        if not left:
            return None
        sd = left[0].spread.pooled_sd if left[0].spread else USUAL_SD
        configs = max(1, sum(row.word != 'identical' for row in self.tested))
        return seeds_to_show(left[0].margin, sd, configs, POWER) if sd else 2

    @property
    def in_order(self):
        """The rows before a net that is lost: it fails, and the answer ends there."""
        most = self.lost.info['all_reduces']['forward'] if self.lost else 0
        return [row for row in self.tested if row.all_reduces['forward'] > most]

    @property
    def first_failure(self):
        return next((row for row in self.in_order if row.word not in PASSES), None)

    @property
    def beyond(self):
        """The rows after the first failure that would pass, which is exploratory."""
        order = self.in_order
        place = order.index(self.first_failure) + 1 if self.first_failure else len(order)
        return [row for row in self.tested[place:] if row.word in PASSES]


def lost_net(runs, tested, tp_size, plan):
    """
    Of runs of configs that diverged in every run, one of most all-reduces that belongs among the tested nets:
    it is planned, if they are, and no net that goes before it has its number of all-reduces.
    """
    def belongs(run):
        if not is_plain(run) or run.config['tp_size'] != tp_size:
            return False
        if any(row.planned for row in tested):
            return plan.names_run(run)
        return not any(row.all_reduces['forward'] == run.info['all_reduces']['forward'] and (
            follows_guide(row) or not is_guides(run.config['block_types'])) for row in tested)

    return max(filter(belongs, runs), key=lambda run: run.info['all_reduces']['forward'], default=None)


def find_answers(rows, plan=None):
    """The Answers, that of the plan first, then by recipe and tp_size. None of a recipe without a control."""
    found = []
    for own in by_note(rows).values():
        if not own[0].dense:
            continue
        for tp_size in sorted({row.tp_size for row in own if row.tp_size > 1}):
            tested = candidates(own, tp_size)
            rows_of_size = [row for row in own if row.tp_size == tp_size]
            found.append((not has_plan(rows_of_size), Answer(
                tp_size, own[0], tested, lost_net(own[0].lost, tested, tp_size, plan))))
    return [answer for _, answer in sorted(found, key=lambda pair: pair[0])]


# the noise floor


class NoiseFloor(NamedTuple):
    """What a change of the initial weights that should not matter does to the loss of dense."""
    row: Row  # the perturbed twin
    size: float  # the root mean square of its differences to dense, nats per token
    largest: float
    n: int


def noise_floors(rows):
    """Of each perturbed twin; all seeds count, for neither it nor dense was chosen by their difference."""
    found = []
    for row in rows:
        if row.twin and row.control:
            own, dense = ((one.tuning.runs[row.tuning.best] if row.tuning else one.runs)
                          for one in (row, row.control))
            off = [own[seed].loss - dense[seed].loss for seed in own.keys() & dense.keys()]
            if off:
                found.append(NoiseFloor(row, math.sqrt(statistics.mean(one ** 2 for one in off)),
                                        max(map(abs, off)), len(off)))
    return found


# pairs of rows


@dataclass(eq=False)
class Comparison:
    """Two rows that are compared with each other, and their paired difference."""
    kind: str  # pair (asked for, or in the plan), placement, merge, sync, tp_size or equal
    first: Row
    second: Row
    difference: Estimate | None  # first minus second; None if they share no seed
    planned: bool = False
    p: float | None = None  # two-sided
    p_holm: float | None = None

    @property
    def equal(self):
        """Whether both make the same number of observed all-reduces, over as many ranks."""
        return same_all_reduces(self.first, self.second)

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


def same_all_reduces(a, b):
    """Whether two rows of a recipe observe an equal number of all-reduces, above 0, over as many ranks."""
    counts = {(row.all_reduces['forward'], row.tp_size, row.note) for row in (a, b)}
    return len(counts) == 1 and a.all_reduces['forward'] > 0


def equal_pairs(rows):
    """The pairs at an equal number of observed all-reduces: the rival minus the guide's net, if one is it."""
    return [(b, a) if a.plain and follows_guide(a) else (a, b)
            for a, b in combinations(rows, 2) if same_all_reduces(a, b)]


def names_of(row):
    """What --pair and --labels may call a row."""
    names = {row.name, row.blocks, row.title} | {run.info['name'] for run in row.runs.values()}
    return names | ({'dense'} if row.dense else set())


def rows_called(name, rows, flag):
    """The rows of a name. Ends the program, in one line, if there is none."""
    found = [row for row in rows if name in names_of(row)]
    if not found:
        known = '; '.join(dict.fromkeys(row.blocks for row in rows))
        fail(f'{flag}: no config is called {name}; there are {known}, or the names of runs')
    return found


def asked_pairs(rows, names):
    """
    The pairs of rows that --pair names, [(first, second)], of each recipe and tp_size that has both; over
    different tp_sizes if there are no others. Ends the program, in one line, if there is no such pair.
    """
    found = []
    for a, b in names:
        both = [(first, second) for first in rows_called(a, rows, '--pair')
                for second in rows_called(b, rows, '--pair') if first is not second
                and first.note == second.note]
        alike = [(first, second) for first, second in both
                 if first.tp_size == second.tp_size or first.dense or second.dense]
        if not both:
            fail(f'--pair is {a} and {b}, they must be two configs of one recipe')
        found += alike or both
    return found


def comparisons(rows, plan=None, asked=()):
    """
    The Comparisons with their p, not yet adjusted. asked: pairs of rows

    pair        those asked for, and those that the plan names
    placement   the same blocks in the most alternating order, minus each more clustered order
    merge       the mean of the ranks' additions, minus their sum
    sync        the MLP's sync dropped (attn_spd), minus attention's (spd)
    tp_size     the same blocks with the most ranks, minus with the fewest
    equal       all others at an equal number of observed all-reduces
    """
    def is_planned(a, b):
        return (plan is not None and a.note == b.note and (a.tp_size == b.tp_size or a.dense or b.dense)
                and not a.variation and not b.variation and plan.names_pair(a, b))

    configs = [row for row in rows if not row.dense]
    named = [(a, b) for a, b in permutations(rows, 2) if is_planned(a, b)]
    # a pair that the plan has the other way round is the same test
    named += [(a, b) for a, b in dict.fromkeys(asked) if (a, b) not in named]
    pairs = [('pair', a, b) for a, b in named] + pair_kinds(configs)
    there = {frozenset(pair) for _, *pair in pairs}
    pairs += [('equal', a, b) for a, b in equal_pairs(configs) if frozenset((a, b)) not in there]
    found = [Comparison(kind, a, b, paired(a, b), is_planned(a, b) or is_planned(b, a))
             for kind, a, b in pairs]
    for one in found:
        set_p(one)
    return found


def adjust(tests):
    """
    Set p_holm of tests that form one family, Comparisons or others with a p; two of the same rows, which may
    be of several kinds, count once. Those without a p are left out.
    """
    same = {}
    for one in tests:
        if one.p is not None:
            key = frozenset((one.first, one.second)) if isinstance(one, Comparison) else id(one)
            same.setdefault(key, []).append(one)
    for ones, p in zip(same.values(), holm([ones[0].p for ones in same.values()])):
        for one in ones:
            one.p_holm = p


def set_p(one):
    """Set the p of a Comparison from its recipe's spread; without one, or for twins, it has none."""
    spread = one.first.spread
    if one.difference and spread and one.verdict != 'identical':
        one.p = two_sided(one.difference.mean, spread, one.difference.n)


def two_sided(difference, spread: Spread, n):
    """The two-sided p of a paired difference over n seeds; 0 or 1 if there is no spread at all."""
    error = spread.error(n)
    if error == 0:
        return float(difference == 0)
    return float(2 * t.sf(abs(difference) / error, spread.df))
