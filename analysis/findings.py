"""
What the rows of runs.py show, in numbers: the answer, pairs, curves, bends, trends, speed-ups, the front.

answers.py puts it into words, plots.py draws it and report.py writes it down.

References  a line with one bend, its place chosen by least squares: Hinkley (1971), JASA 66(336)
            the p value of a test chosen among m, times m: Bonferroni; Dunn (1961), JASA 56(293)
            slopes by subject, then a test over subjects: Holmes & Friston (1998), NeuroImage 7(4)
            leverage of a new point: Draper & Smith, Applied Regression Analysis, section 3.1
"""

import json
import math
import statistics
from dataclasses import dataclass, field

import numpy as np
from scipy.stats import t

from analysis.families import (
    Answer,
    Comparison,
    NoiseFloor,
    adjust,
    asked_pairs,
    comparisons,
    find_answers,
    follows_guide,
    judge_rows,
    noise_floors,
    switches,
)
from analysis.plan import Plan
from analysis.runs import Estimate, by_note, by_spread, estimate, paired, to_dense
from analysis.tuning import Tuned
from analysis.verdicts import MARGIN, paired_t
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
    return (run.at is None and run.info['corpus']['tokenizer'] == 'gpt2'
            and run.config['dataset'] in GUIDE_DATASETS
            and abs(steps - 1) <= 0.05 and abs(parameters - 1) <= 0.01)


# loss against communications


def count(row):
    """The all-reduces observed in a forward pass."""
    return row.all_reduces['forward']


def curves(rows):
    """
    The rows of each curve of loss against communications, most communications first.

    There is a curve for each tp_size, variation and set of block types beyond the guide's. It goes through
    the guide's patterns if there are two, or else at each count of observed all-reduces through the net whose
    blocks alternate most.
    """
    by_curve = {}
    for row in sorted((row for row in rows if not row.dense), key=switches):
        key = list(by_note(rows)).index(row.note), row.tp_size, row.varied, row.other_types
        by_curve.setdefault(key, []).append(row)
    found = []
    for _, own in sorted(by_curve.items()):
        guides = [row for row in own if follows_guide(row)]
        counts = {count(row): row for row in (guides if len(guides) > 1 else own)}
        found.append([counts[n] for n in sorted(counts, reverse=True)])
    return found


def curve_name(row):
    """What the rows of its curve have in common."""
    others = f', with {" and ".join(row.other_types)} blocks' if row.other_types else ''
    return f'tp_size {row.tp_size}{row.varied}{others}{row.note}'


FEWEST_COUNTS = 6  # of observed all-reduces, for a bend


@dataclass
class Bend:
    """
    A curve as two lines that meet, fitted by least squares, against a straight one.

    The loss of a seed at x observed all-reduces is a + slope (most - x) + bend max(0, at - x). Of all counts
    but the first and the last, `at` is the one with the smallest sum of squared residuals of the mean curve.
    The bend is fitted for each seed, and tested by a t-test over seeds, which are independent; its p is
    multiplied by how many counts were tried. A seed's dense control need not be subtracted: that shifts all
    points of the seed alike.
    """
    curve: list  # Rows, most all-reduces first
    seeds: list  # those that have all the counts
    at: int  # where the lines meet
    bend: Estimate  # nats per all-reduce dropped, over the seeds
    slopes: tuple  # of the mean curve before and after it, nats per all-reduce dropped
    p: float | None  # None for one seed
    residuals: dict  # the sum of squared residuals of the mean curve from each shape, nats squared
    p_holm: float | None = None

    @property
    def rise(self):
        """The fewest all-reduces minus the bend's, paired by seed."""
        return paired(self.curve[-1], next(row for row in self.curve if count(row) == self.at))


def largest_block(curve):
    """
    (seeds, rows): a part of a curve in which each seed has each count, of at least six counts and of as many
    runs as can be; None if there is none.
    """
    parts = [(list(row.losses), [other for other in curve if row.losses.keys() <= other.losses.keys()])
             for row in curve]
    return max((part for part in parts if len(part[1]) >= FEWEST_COUNTS), default=None,
               key=lambda part: len(part[0]) * len(part[1]))


def fit_bend(curve):
    """The Bend of a curve; None if fewer than six counts of it share a seed."""
    block = largest_block(curve)
    if block is None:
        return None
    seeds, curve = block
    x = np.array([count(row) for row in curve], dtype=float)
    y = np.array([[row.losses[seed] for seed in seeds] for row in curve])  # (counts, seeds)
    mean = y.mean(1)

    def fit(*columns):
        """Least squares: the columns' coefficients (columns, seeds), squared residuals of the mean."""
        design = np.stack((np.ones_like(x), *columns), axis=1)
        inverse = np.linalg.pinv(design)
        return inverse @ y, float(((mean - design @ (inverse @ mean)) ** 2).sum())

    bent = {count(row): fit(x[0] - x, np.maximum(0, count(row) - x)) for row in curve[1:-1]}
    at = min(bent, key=lambda place: bent[place][1])
    (_, slopes, bends), two_lines = bent[at]
    bend = estimate(bends.tolist())
    return Bend(curve, seeds, at, bend, (slopes.mean(), slopes.mean() + bend.mean),
                None if len(seeds) == 1 else min(1.0, len(bent) * p_value(bends.tolist())),
                dict(straight=fit(x)[1], logarithm=fit(np.log(x))[1], bent=two_lines))


def p_value(values):
    """Of the two-sided t-test that their mean is 0; None for fewer than two."""
    test = paired_t(values)
    return test and float(test[2])


# loss against predicted time


def fastest_first(rows):
    """The rows with a predicted step time and a paired difference, the fastest step first."""
    known = [row for row in rows if row.seconds is not None and to_dense(row)]
    return sorted(known, key=lambda row: (row.seconds, to_dense(row).mean))


RANKS = dict(better=0, identical=1, undecided=2, worse=3) | {'as good': 1}


def front(rows):
    """
    The rows of one recipe whose verdict no faster row has, or a better one: what a longer step buys, by what
    is shown and not by means.
    """
    best, kept = len(RANKS), []
    for row in fastest_first(rows):
        if row.word and RANKS[row.word] < best:
            kept.append(row)
            best = RANKS[row.word]
    return kept


# times the speed of plain tensor parallelism, as torchtitan's authors measured it on 64 and 256 H100, bf16
ASYNC_TP = 1.09, 1.10


def exact_rivals(rows):
    """
    (name, seconds at the least, at the most) of the exact ways to hide all-reduces, sequence parallelism and
    asynchronous tensor parallelism on top of it, for each recipe and tp_size with a predicted step time.
    """
    plain = {(row.tp_size, row.note): row.tp_seconds for row in rows if row.tp_seconds is not None}
    return [(f'async TP with sequence parallelism, exact (tp_size {tp_size}{note})',
             seconds / ASYNC_TP[1], seconds / ASYNC_TP[0]) for (tp_size, note), seconds in plain.items()]


def with_dense(row):
    """[(a run of the row, dense's of the same seed)]; empty for dense itself and without a control."""
    if row.dense or row.control is None:
        return []
    return [(run, row.control.runs[seed]) for seed, run in row.runs.items() if seed in row.control.runs]


def step_ratio(row):
    """
    In what part of dense's steps a row reaches dense's losses: log(steps / dense's steps) as an Estimate.

    Of each seed, the mean over dense's evaluations after warmup whose loss the row reaches too; then over
    seeds. None if no seed has such an evaluation.
    """
    ratios = []
    for run, dense in with_dense(row):
        steps = [(run.steps_to(loss), step) for step, loss in dense.val_losses
                 if step > dense.config['warmup_iters'] and loss == min(
                     own for at, own in dense.val_losses if at <= step)]
        logs = [math.log(own / step) for own, step in steps if own]
        ratios += [statistics.mean(logs)] if logs else []
    return estimate(ratios)


def time_ratio(row):
    """
    step_ratio, with each step's predicted seconds over those of all layers tp at the same tp_size: the
    difference in loss as steps, and the steps as seconds. None if either is unknown, or if the row is worse
    than dense, for then dense's last losses are not among those that it reaches.
    """
    steps = step_ratio(row)
    if steps is None or row.tp_seconds is None or row.seconds is None or row.word == 'worse':
        return None
    return Estimate(steps.mean + math.log(row.seconds / row.tp_seconds), steps.half, steps.n)


def gap_to_dense(row):
    """
    The generalisation gap minus dense's at equal loss: of each seed at the higher of the two final validation
    losses, which both runs reach. An Estimate; None if train was not read.
    """
    found = []
    for run, dense in with_dense(row):
        level = max(run.loss, dense.loss)
        gaps = run.gap_at(level), dense.gap_at(level)
        found += [gaps[0] - gaps[1]] if None not in gaps else []
    return estimate(found)


# the tuned key


def at_common(row):
    """
    A row's paired difference to dense at one common value of the tuned key, dense's best: (on the answer's
    seeds; on the tuning seeds, without an interval, for they chose the value), each None if there is none.
    """
    if row.dense or row.tuning is None or row.control is None:
        return None, None
    value = row.control.tuning.best
    own, dense = (one.tuning.runs.get(value, {}) for one in (row, row.control))
    gaps = {seed: own[seed].loss - dense[seed].loss for seed in own if seed in dense}
    answer, chose = ([gap for seed, gap in gaps.items() if belongs(seed)] for belongs in (
        row.tuning.tuned.is_answer, row.tuning.tuned.tuning_seeds.__contains__))
    return by_spread(answer, row.spread), by_spread(chose, None)


# the difference against the width and the tokens

FULL_WIDTH = 768  # GPT-2's (124M)


@dataclass
class Trend:
    """
    A config's paired differences against log2 of the width, and of the tokens if these differ.

    Seeds share their batches over widths, so the points of a seed are not independent: each seed has its own
    line, by least squares, and the seeds are the sample.
    """
    rows: list  # of one config, the narrowest first
    points: dict  # seed -> [(width, tokens, difference)], of the seeds that have all of them
    p_holm: dict = field(default_factory=dict)  # regressor -> p of its slope

    @property
    def name(self):
        row = self.rows[0]
        return f'{pattern(row.block_types)} (tp_size {row.tp_size}{row.varied})'

    @property
    def all_points(self):
        return [point for own in self.points.values() for point in own]

    @property
    def widths(self):
        return sorted({width for width, _, _ in self.all_points})

    @property
    def tokens(self):
        return sorted({tokens for _, tokens, _ in self.all_points})

    @property
    def regressors(self):
        """What differs between the points, as names."""
        return [name for name in ('widths', 'tokens') if len(getattr(self, name)) > 1]

    def columns(self, widths, tokens):
        """The design (points, 1 + regressors): log2 of what differs, from GPT-2's width and most tokens."""
        known = dict(widths=np.log2(np.array(widths) / FULL_WIDTH),
                     tokens=np.log2(np.array(tokens) / max(self.tokens)))
        return np.stack([np.ones(len(widths)), *(known[name] for name in self.regressors)], axis=1)

    @property
    def design(self):
        widths, tokens, _ = zip(*next(iter(self.points.values())))
        return self.columns(widths, tokens)

    @property
    def fits(self):
        """(the coefficients of each seed's line (seeds, 1 + regressors), its squared residuals (seeds,))"""
        y = np.array([[difference for *_, difference in own] for own in self.points.values()]).T
        coefficients = np.linalg.pinv(self.design) @ y
        return coefficients.T, ((y - self.design @ coefficients) ** 2).sum(0)

    def slope(self, regressor):
        """Nats per doubling, as an Estimate over seeds."""
        return estimate(self.fits[0][:, 1 + self.regressors.index(regressor)].tolist())

    def at(self, width):
        """The lines' mean difference at a width and the most tokens, as an Estimate over seeds."""
        return estimate((self.fits[0] @ self.columns([width], [max(self.tokens)])[0]).tolist())

    def prediction(self, width):
        """
        95% interval for the paired difference of a new seed at this width and the most tokens.

        What one seed's line says there has the variance S2 over seeds: how much seeds differ, and sigma2 h
        from the noise of a point, h being the new point's leverage. A new seed's point has the first and
        sigma2. Far outside h is above 1, and S2 is enough.
        """
        there = self.at(width)
        if there.n < 2:
            return Estimate(there.mean, None, there.n)
        new = self.columns([width], [max(self.tokens)])[0]
        leverage = float(new @ np.linalg.pinv(self.design.T @ self.design) @ new)
        coefficients, squares = self.fits
        df = there.n * (len(self.design) - self.design.shape[1])
        sigma2 = squares.sum() / df if df else 0
        variance = float(np.var(coefficients @ new, ddof=1)) * (1 + 1 / there.n)
        half = t.isf(0.025, there.n - 1) * math.sqrt(variance + sigma2 * max(0, 1 - leverage))
        return Estimate(there.mean, float(half), there.n)


class Slope:
    """The test of one slope of a Trend, over its seeds."""

    def __init__(self, trend, regressor):
        self.trend, self.regressor = trend, regressor
        self.p = p_value(trend.fits[0][:, 1 + trend.regressors.index(regressor)].tolist())


def find_trends(rows):
    """
    The Trends of the configs that were run at several widths or budgets, all else equal; with more points of
    a seed than its line has coefficients, or as many. Bit-equal twins and dense's own are left out, and runs
    that are read before their end. With width, the head size is equal, or else the number of heads.
    """
    rows = [row for row in rows if to_dense(row) and row.word != 'identical' and row.first.at is None]
    wide = [trend for trend in trends_of(rows, lambda config: config['n_embd'] // config['n_head'])
            if 'widths' in trend.regressors]
    used = [row for trend in wide for row in trend.rows]
    return wide + trends_of([row for row in rows if row not in used], lambda config: config['n_head'])


def trends_of(rows, heads):
    """The Trends of rows that are alike but for width and budget, and heads(config) too."""
    alike = {}
    for row in rows:
        rest = {key: value for key, value in row.settings.items()
                if key not in ('n_embd', 'n_head', 'max_iters', 'lr_decay_iters', 'warmup_iters')}
        rest |= dict(blocks=row.block_types, tp_size=row.tp_size, variation=row.variation,
                     heads=heads(row.first.config))
        alike.setdefault(json.dumps(rest, sort_keys=True), []).append(row)
    trends = []
    for same in alike.values():
        same.sort(key=lambda row: (row.first.config['n_embd'], tokens_of(row)))
        seeds = set.intersection(*({*row.losses} & {*row.control.losses} for row in same))
        points = {seed: [(row.first.config['n_embd'], tokens_of(row),
                          row.losses[seed] - row.control.losses[seed]) for row in same]
                  for seed in sorted(seeds)}
        trend = Trend(same, points)
        if seeds and trend.regressors and np.linalg.matrix_rank(trend.design) > len(trend.regressors):
            trends.append(trend)
    return trends


def tokens_of(row):
    """The tokens that each of its runs trained on."""
    config = row.first.config
    windows = config['batch_size'] * config['gradient_accumulation_steps']
    return config['max_iters'] * windows * config['block_size']


# how training went


def highest_norm(row):
    """The highest gradient norm after warmup; None if none was logged."""
    return max((norm for run in row.runs.values() for norm in run.grad_norms), default=None)


# all of it


@dataclass
class Findings:
    """What a comparison found, for answers.py, plots.py and report.py."""
    rows: list
    margin: float
    tuned: Tuned | None
    plan: Plan | None
    link: str | None  # what step times were predicted for, in words
    answers: list[Answer]
    floors: list[NoiseFloor]
    comparisons: list[Comparison]
    asked: list  # of these, the pairs of rows that --pair names
    bends: list  # (the curve, its Bend or None)
    trends: list[Trend]


def find_all(rows, margin=MARGIN, tuned=None, plan=None, link=None, pairs=(), departed=False):
    """
    The Findings of rows, which get their verdicts here. pairs: the names of --pair. departed: whether the
    flags or values depart from the plan, which then says what is judged together, but nothing was planned.

    Holm's adjustment is by families: the pairs that the plan names, those at an equal number of all-reduces,
    and all other tests together: pairs, bends and slopes.
    """
    judge_rows(rows, margin, plan)
    asked = asked_pairs(rows, pairs)
    found = Findings(rows, margin, tuned, plan, link, find_answers(rows, plan), noise_floors(rows),
                     comparisons(rows, plan, asked), asked,
                     [(curve, fit_bend(curve)) for curve in curves(rows)], find_trends(rows))
    unplanned = [one for one in found.comparisons if not one.planned]
    slopes = [Slope(trend, name) for trend in found.trends for name in trend.regressors
              if len(trend.points) > 1]
    adjust([one for one in found.comparisons if one.planned])
    adjust([one for one in unplanned if one.equal])
    adjust([one for one in unplanned if not one.equal] + [bend for _, bend in found.bends if bend] + slopes)
    for one in (*rows, *found.comparisons) if departed else ():
        one.planned = False
    for slope in slopes:
        slope.trend.p_holm[slope.regressor] = slope.p_holm
    return found
