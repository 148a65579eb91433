"""
What the rows of runs.py show, in numbers: comparisons, curves, bends, the Pareto front, trends with width.

answers.py puts it into words, plots.py draws it and report.py writes it down.

References  a line with one bend, its place chosen by least squares: Hinkley (1971), JASA 66(336)
            the p value of a test chosen among m, times m: Bonferroni; Dunn (1961), JASA 56(293)
            prediction on a fitted line: Draper & Smith, Applied Regression Analysis, section 3.1
"""

import json
import math
from collections import Counter
from dataclasses import dataclass
from itertools import permutations
from typing import NamedTuple

from analysis.runs import Estimate, Row, estimate, judge, paired, settings, t_quantile, t_test, to_dense
from configurator import pattern

# the guide's thresholds, which hold for one model, length and tokenizer

GUIDE_STEPS, GUIDE_PARAMETERS, GUIDE_DATASETS = 20_000, 124_373_760, ('openwebtext', 'fineweb')
GUIDE_SCOPE = '124M parameters on GPT-2 tokens of OpenWebText or FineWeb after 20k steps'
TARGET = 3.28
GOALS = (('Key question 1: below 3.35 with 12 communications?', 12, 3.35),
         ('Key question 2: below 3.40 with 6 communications?', 6, 3.40),
         ('Minimum goal: below 3.40 with 12 communications?', 12, 3.40),
         ('Stretch goal: below 3.35 with 8 communications?', 8, 3.35),
         ('Dream goal: below 3.30 with 6 communications?', 6, 3.30))


def in_scope(run):
    """Whether the guide's thresholds apply to a run."""
    steps = run.config['max_iters'] / GUIDE_STEPS  # "about 20k": llm.c's run has 19,560
    parameters = run.info['parameters'] / GUIDE_PARAMETERS
    return (run.info['corpus']['tokenizer'] == 'gpt2' and run.config['dataset'] in GUIDE_DATASETS
            and abs(steps - 1) <= 0.05 and abs(parameters - 1) <= 0.01)


def by_note(rows):
    """The rows of each recipe that --mix mixed: {note: rows}."""
    recipes = {}
    for row in rows:
        recipes.setdefault(row.note, []).append(row)
    return recipes


# two rows that differ in one thing


class Comparison(NamedTuple):
    """Two rows that differ in one thing, and their paired difference, first minus second."""
    kind: str  # placement, merge, sync or tp_size
    first: Row
    second: Row
    difference: Estimate | None  # None if they share no seed

    @property
    def verdict(self):
        return judge(self.difference, self.first.floor)


def switches(row):
    """How often neighbouring blocks differ: many times if placed alternately, few times if clustered."""
    return sum(a != b for a, b in zip(row.block_types, row.block_types[1:]))


def comparisons(rows):
    """
    The pairs of rows that differ in one thing only, as Comparisons:

    placement   the same blocks in the most alternating order, minus each more clustered order
    merge       the mean of the ranks' additions, minus their sum
    sync        the MLP's sync dropped (attn_spd), minus attention's (spd)
    tp_size     the same blocks with the most ranks, minus with the fewest
    """
    rows = [row for row in rows if not row.dense]
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
    found.sort(key=lambda one: ('placement', 'merge', 'sync', 'tp_size').index(one[0]))
    return [Comparison(kind, a, b, paired(a, b)) for kind, a, b in found]


# loss against communications


def curves(rows):
    """
    The rows of each curve of loss against communications, most communications first.

    There is a curve for each tp_size, variation and set of block types beyond the guide's. If a count was
    placed in several ways, the curve goes through the most alternating one.
    """
    by_curve = {}
    for row in sorted((row for row in rows if not row.dense), key=switches):
        key = list(by_note(rows)).index(row.note), row.tp_size, row.varied, row.other_types
        by_curve.setdefault(key, {})[row.communications] = row
    return [[counts[n] for n in sorted(counts, reverse=True)] for _, counts in sorted(by_curve.items())]


def curve_name(row):
    """What the rows of its curve have in common."""
    others = f', with {" and ".join(row.other_types)} blocks' if row.other_types else ''
    return f'tp_size {row.tp_size}{row.varied}{others}{row.note}'


@dataclass
class Bend:
    """
    A curve as two lines that meet, fitted by least squares, against a straight one.

    The loss of a seed at x communications is a + slope (most - x) + bend max(0, at - x). Of all counts but
    the first and the last, `at` is the one with the smallest sum of squared residuals of the mean curve. The
    bend is fitted for each seed, and tested by a t-test over seeds, which are independent; its p is
    multiplied by how many counts were tried. A seed's dense control need not be subtracted: that shifts all
    points of the seed alike.
    """
    curve: list  # Rows, most communications first
    seeds: list  # those that have all the counts
    at: int  # where the lines meet
    bend: Estimate  # nats per communication dropped, over the seeds
    slopes: tuple  # of the mean curve before and after it, nats per communication dropped
    p: float | None  # None for one seed
    residuals: dict  # the sum of squared residuals of the mean curve from each shape, nats squared

    @property
    def rise(self):
        """The fewest communications minus the bend's, paired by seed."""
        return paired(self.curve[-1], next(row for row in self.curve if row.communications == self.at))


def largest_block(curve):
    """
    (seeds, rows): a part of a curve in which each seed has each count, of at least four counts and of as many
    runs as can be; None if there is none.
    """
    parts = [(list(row.losses), [other for other in curve if row.losses.keys() <= other.losses.keys()])
             for row in curve]
    return max((part for part in parts if len(part[1]) >= 4), default=None,
               key=lambda part: len(part[0]) * len(part[1]))


def fit_bend(curve):
    """The Bend of a curve; None if fewer than four counts of it share a seed."""
    import numpy as np
    block = largest_block(curve)
    if block is None:
        return None
    seeds, curve = block
    x = np.array([row.communications for row in curve], dtype=float)
    y = np.array([[row.losses[seed] for seed in seeds] for row in curve])  # (counts, seeds)
    mean = y.mean(1)

    def fit(*columns):
        """Least squares: the columns' coefficients (columns, seeds), squared residuals of the mean."""
        design = np.stack((np.ones_like(x), *columns), axis=1)
        inverse = np.linalg.pinv(design)
        return inverse @ y, float(((mean - design @ (inverse @ mean)) ** 2).sum())

    bent = {row.communications: fit(x[0] - x, np.maximum(0, row.communications - x)) for row in curve[1:-1]}
    at = min(bent, key=lambda count: bent[count][1])
    (_, slopes, bends), two_lines = bent[at]
    bend = estimate(bends.tolist())
    return Bend(curve, seeds, at, bend, (slopes.mean(), slopes.mean() + bend.mean),
                None if len(seeds) == 1 else min(1.0, len(bent) * p_value(bends)),
                dict(straight=fit(x)[1], logarithm=fit(np.log(x))[1], bent=two_lines))


def p_value(values):
    """Of the two-sided t-test that their mean is 0."""
    p = float(t_test(values).pvalue)
    return 1.0 if math.isnan(p) else p  # all of them are 0


# loss against predicted time


def fastest_first(rows):
    """The rows with a predicted step time and a paired difference, the fastest step first."""
    known = [row for row in rows if row.seconds is not None and to_dense(row)]
    return sorted(known, key=lambda row: (row.seconds, to_dense(row).mean))


def front(rows):
    """The rows of one recipe that no other beats in both predicted step time and difference to dense."""
    best, kept = math.inf, []
    for row in fastest_first(rows):
        if to_dense(row).mean < best:
            kept.append(row)
            best = to_dense(row).mean
    return kept


# the difference against the width

FULL_WIDTH = 768  # GPT-2's (124M)


@dataclass
class Trend:
    """A config's paired differences against log2 of the width: a line by least squares over the points."""
    rows: list  # of one config, the narrowest first
    points: list  # (width, difference), one for each width and seed

    @property
    def name(self):
        row = self.rows[0]
        return f'{pattern(row.block_types)} (tp_size {row.tp_size}{row.varied})'

    @property
    def widths(self):
        return sorted({width for width, _ in self.points})

    def fit(self, width):
        """scipy's linregress of the differences on log2(own width / width): its intercept is at `width`."""
        from scipy.stats import linregress
        return linregress([math.log2(own / width) for own, _ in self.points],
                          [difference for _, difference in self.points])

    def interval(self, mean, error):
        """95% interval of a coefficient of the line, from its standard error, as an Estimate."""
        n = len(self.points)
        return Estimate(float(mean), float(t_quantile(n - 2) * error), n)

    def at(self, width):
        """The line's mean difference at a width, as an Estimate whose n is the number of points."""
        line = self.fit(width)
        return self.interval(line.intercept, line.intercept_stderr)

    @property
    def slope(self):
        """Nats per doubling of the width, as an Estimate."""
        line = self.fit(FULL_WIDTH)
        return self.interval(line.slope, line.stderr)


def width_trends(rows):
    """
    The Trends, of three points at least, of the configs that were run at several widths, all else equal.

    All-TP is left out: its differences are rounding.
    """
    alike = {}
    for row in rows:
        if to_dense(row) and not row.all_tp:
            rest = settings(row.first) | dict(
                n_embd=None, blocks=row.block_types, tp_size=row.tp_size, variation=row.variation)
            alike.setdefault(json.dumps(rest, sort_keys=True), []).append(row)
    trends = []
    for same in alike.values():
        same.sort(key=lambda row: row.first.config['n_embd'])
        points = [(row.first.config['n_embd'], loss - row.control.losses[seed])
                  for row in same for seed, loss in row.losses.items() if seed in row.control.losses]
        trends.append(Trend(same, points))
    return [trend for trend in trends if len(trend.widths) > 1 and len(trend.points) > 2]


# how training went


def highest_norm(row):
    """The highest gradient norm after warmup; None if none was logged."""
    return max((norm for run in row.runs.values() for norm in run.grad_norms), default=None)


def drift_of(run):
    """The (drift, cosine) lists of a run's last evaluation, see training/drift.py; None if not logged."""
    return (run.last['drift'], run.last['drift_cosine']) if 'drift' in run.last else None


def largest_drift(run):
    return max(drift_of(run)[0]) if drift_of(run) else None
