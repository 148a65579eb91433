"""
The guide's questions, answered from the rows that runs.py makes, in words.

Each answer is a list of lines. What the runs cannot tell is said to be not answerable from them: the guide's
thresholds hold for one model, length and tokenizer; one seed has no interval; and nothing below the rounding
floor is called a difference.

References  a line with one bend, its place chosen by least squares: Hinkley (1971), JASA 66(336)
            the p value of a test chosen among m, times m: Bonferroni; Dunn (1961), JASA 56(293)
            prediction on a fitted line: Draper & Smith, Applied Regression Analysis, section 3.1
"""

import json
import math
from collections import Counter
from dataclasses import dataclass
from itertools import combinations
from typing import NamedTuple

from configurator import pattern
from analysis.runs import (SPIKE, Estimate, Row, estimate, judge, paired, settings, simulated, t_quantile, to_dense,
                  verdict)

# the guide's thresholds hold for one model, length and tokenizer
GUIDE_STEPS, GUIDE_PARAMETERS, GUIDE_DATASETS = 20_000, 124_373_760, ('openwebtext', 'fineweb')
GUIDE_SCOPE = '124M parameters on GPT-2 tokens of OpenWebText or FineWeb after 20k steps'
TARGET = 3.28
GOALS = (('Key question 1: below 3.35 with 12 communications?', 12, 3.35),
         ('Key question 2: below 3.40 with 6 communications?', 6, 3.40),
         ('Minimum goal: below 3.40 with 12 communications?', 12, 3.40),
         ('Stretch goal: below 3.35 with 8 communications?', 8, 3.35),
         ('Dream goal: below 3.30 with 6 communications?', 6, 3.30))
UNANSWERED = 'Not answerable from these runs'


def by_note(rows):
    """The rows apart by what --mix mixed: {note: rows}."""
    apart = {}
    for row in rows:
        apart.setdefault(row.note, []).append(row)
    return apart


# the guide's thresholds


def in_scope(run):
    """Do the guide's thresholds apply to a run."""
    steps = run.config['max_iters'] / GUIDE_STEPS       # "about 20k": llm.c's run has 19,560
    parameters = run.info['parameters'] / GUIDE_PARAMETERS
    return (run.info['corpus']['tokenizer'] == 'gpt2' and run.config['dataset'] in GUIDE_DATASETS
            and abs(steps - 1) <= 0.05 and abs(parameters - 1) <= 0.01)


def below(row, limit):
    """Is a row's validation loss below a limit, in words, by the 95% interval of its mean."""
    loss = estimate(list(row.losses.values()))
    if loss.half is None:
        return f'{"yes" if loss.mean < limit else "no"}, {loss.mean:.4f} in one seed, no interval'
    answer = 'yes' if loss.high < limit else 'no' if loss.low >= limit else 'undecided'
    return f'{answer}, {loss.mean:.4f} [{loss.low:.4f}, {loss.high:.4f}] (n={loss.n})'


def caveat(rows):
    """What the corpus has to do with a threshold, as lines."""
    if any(row.first.config['dataset'] == 'openwebtext' for row in rows):
        return [f"({TARGET} is FineWeb's; on OpenWebText dense GPT-2 ends lower: see the difference)"]
    return []


def goal(rows, communications, limit):
    """The answer to one threshold question, as lines: absolute where it applies, and relative to dense."""
    rows = [row for row in rows if not row.dense and not row.variant and row.communications == communications]
    if not rows:
        return [f'{UNANSWERED}: no run with {communications} communications has finished']
    scoped = [row for row in rows if in_scope(row.first)]
    lines = [f'{row.title}: {below(row, limit)}' for row in scoped] + caveat(scoped)
    if len(scoped) < len(rows):
        lines.append(f'{UNANSWERED} in its absolute form: the thresholds are for {GUIDE_SCOPE}')
    return lines + [f'relative form, {row.title} minus dense: {verdict(to_dense(row), row.floor)}'
                    for row in rows]


def closeness(rows):
    """How close each row comes to the guide's target, as lines."""
    scoped = [row for row in rows if in_scope(row.first)]
    if not scoped:
        return [f'{UNANSWERED}: {TARGET} is for {GUIDE_SCOPE}']
    away = [(row, estimate([loss - TARGET for loss in row.losses.values()])) for row in scoped]
    return [f'{row.title}: {distance} away' for row, distance in away] + caveat(scoped)


# two ways to place the same budget


class Comparison(NamedTuple):
    """Two rows that differ in one thing, and their paired difference, first minus second."""
    kind: str                       # placement, merge, sync or tp_size
    first: Row
    second: Row
    difference: Estimate

    @property
    def words(self):
        return f'{self.first.title} minus {self.second.title}'

    @property
    def verdict(self):
        return judge(self.difference, self.first.floor)


def switches(row):
    """How often neighbouring blocks differ: high for alternating placement, low for clustered."""
    return sum(a != b for a, b in zip(row.block_types, row.block_types[1:]))


def comparisons(rows):
    """
    The pairs of rows that differ in one thing only, as Comparisons:

    placement   the same blocks in the most alternating order, minus them in each more clustered one
    merge       the mean of the ranks' additions, minus their sum
    sync        the MLP's sync dropped, minus attention's
    tp_size     the same blocks with the most ranks, minus them with the fewest
    """
    def plain(row, prefix):
        return [name.removeprefix(prefix) for name in row.block_types]

    found, orders, ranks = [], {}, {}
    for row in rows:
        if not row.dense:
            key = row.tp_size, row.note, frozenset(Counter(row.block_types).items())
            orders.setdefault(key, []).append(row)
            ranks.setdefault((tuple(row.block_types), row.note), []).append(row)
    for same in orders.values():
        most, *others = sorted(same, key=switches, reverse=True)
        found += [('placement', most, other) for other in others if switches(other) < switches(most)]
    for one, other in combinations([row for row in rows if not row.dense], 2):
        for a, b in ((one, other), (other, one)):
            if (a.tp_size, a.note) == (b.tp_size, b.note) and not b.variant:
                if a.variant == 'mean' and plain(a, 'mean_') == b.block_types:
                    found.append(('merge', a, b))
                if a.variant == 'attn' and plain(a, 'attn_') == b.block_types:
                    found.append(('sync', a, b))
    for same in ranks.values():
        same.sort(key=lambda row: row.tp_size)
        found += [('tp_size', same[-1], same[0])] * (len(same) > 1)
    found.sort(key=lambda one: ('placement', 'merge', 'sync', 'tp_size').index(one[0]))
    return [Comparison(kind, a, b, paired(a, b)) for kind, a, b in found]


def compared(rows, kind, missing):
    """The comparisons of a kind and their verdicts counted, as lines. missing: what to say without any."""
    found = [comparison for comparison in comparisons(rows) if comparison.kind == kind]
    if not found:
        return [f'{UNANSWERED}: {missing}']
    lines = [f'{one.words}: {verdict(one.difference, one.first.floor)}' for one in found]
    if len(found) > 1:
        counts = Counter(one.verdict.partition(',')[0] for one in found)
        lines.append(f'in all {len(found)}: ' + ', '.join(f'{n} {word}' for word, n in counts.most_common())
                     + '; each interval is for one comparison, not for all of them together')
    return lines


# is there a cliff


def curves(rows):
    """
    The rows of each curve of loss against communications, most communications first: a curve for each tp_size
    and variant. Where a count was placed in several ways, it goes through the most alternating.
    """
    by_curve = {}
    for row in sorted((row for row in rows if not row.dense), key=switches):
        by_curve.setdefault((row.tp_size, row.note, row.variant), {})[row.communications] = row
    found = [[counts[n] for n in sorted(counts, reverse=True)] for counts in by_curve.values()]
    return sorted(found, key=lambda curve: (list(by_note(rows)).index(curve[0].note), curve[0].tp_size,
                                            curve[0].variant))


def curve_name(row):
    """What the rows of its curve have in common."""
    return f'tp_size {row.tp_size}' + {'': '', 'mean': ', merge by mean', 'attn': ", the MLP's sync dropped"
                                       }[row.variant] + row.note


@dataclass
class Bend:
    """
    A curve as two lines that meet, fitted by least squares, against a straight one.

    The loss of a seed at x communications is a + slope (most - x) + bend max(0, at - x). Of all counts but
    the first and the last, `at` is the one that leaves the mean curve the least squares. The bend is fitted
    seed by seed, which gives it a t-test over seeds, the independent ones here; its p is multiplied by how
    many counts were tried. Subtracting a seed's dense control would shift all of its points alike, not bend
    them.
    """
    curve: list                     # Rows, most communications first
    seeds: list                     # those that have all the counts
    at: int                         # where the lines meet
    bend: Estimate                  # nats per communication dropped, over the seeds
    slopes: tuple                   # of the mean curve before and after it, nats per communication dropped
    p: float                        # None for one seed
    left: dict                      # the squares that each shape leaves of the mean curve, nats squared

    @property
    def rise(self):
        """The fewest communications minus the bend's, paired by seed."""
        return paired(self.curve[-1], next(row for row in self.curve if row.communications == self.at))


def fit_bend(curve):
    """
    The Bend of a curve; None where it has fewer than four counts that share a seed.

    Each seed must have all the counts. Where some seeds lack some, it takes those that keep the most runs.
    """
    import numpy as np
    shared = [(list(row.losses), [other for other in curve if row.losses.keys() <= other.losses.keys()])
              for row in curve]
    shared = [(seeds, rows) for seeds, rows in shared if len(rows) >= 4]
    if not shared:
        return None
    seeds, curve = max(shared, key=lambda pair: len(pair[0]) * len(pair[1]))
    x = np.array([row.communications for row in curve], dtype=float)
    y = np.array([[row.losses[seed] for seed in seeds] for row in curve])       # (counts, seeds)
    mean, one = y.mean(1), np.ones_like(x)

    def fit(*columns):
        """Least squares: the columns' coefficients (columns, seeds), and the squares left of the mean."""
        design = np.stack((one, *columns), axis=1)
        inverse = np.linalg.pinv(design)
        return inverse @ y, float(((mean - design @ (inverse @ mean)) ** 2).sum())

    bent = {row.communications: fit(x[0] - x, np.maximum(0, row.communications - x)) for row in curve[1:-1]}
    at = min(bent, key=lambda count: bent[count][1])
    (_, slopes, bends), two_lines = bent[at]
    bend = estimate(bends.tolist())
    return Bend(curve, seeds, at, bend, (slopes.mean(), slopes.mean() + bend.mean),
                None if bend.p is None else min(1.0, len(bent) * bend.p),
                dict(straight=fit(x)[1], logarithm=fit(np.log(x))[1], bent=two_lines))


def cliff(curve):
    """Is there a cliff in one curve, as lines: the verdict, the test, the shapes."""
    found = fit_bend(curve)
    if found is None:
        return [f'{UNANSWERED}: it takes four counts that share a seed, here are {len(curve)} counts']
    rise, at, curve, n = found.rise, found.at, found.curve, len(found.seeds)
    fewest = curve[-1].communications
    floor, gradual = curve[0].floor, found.left['logarithm'] <= 2 * found.left['bent']
    if rise.mean <= 0:
        answer = f'no: the loss does not rise from {at} communications to {fewest}'
    elif floor is not None and rise.mean <= floor:
        answer = f'none seen: the rise from {at} to {fewest} is within the rounding floor of {floor:.1e}'
    elif found.bend.mean <= 0:
        answer = f'no: from {at} communications to {fewest} the loss does not rise more steeply than before'
    elif found.p is None:
        answer = f'{UNANSWERED}: one seed, no interval, so no test; the bend is at {at} communications'
    elif found.p >= 0.05 or not rise.clear:
        answer = f'none shown: a bend at {at} communications is not told apart from a straight line'
    elif gradual:
        answer = f'no: the loss bends at {at} communications, but as a logarithm does: gradual'
    else:
        answer = f'yes: below {at} communications the loss rises more steeply'
    counts, total = ', '.join(str(row.communications) for row in curve), found.left['straight'] or 1
    test = ('one seed, no test' if found.p is None else
            f't-test of the bend over n={n} seeds, times {len(curve) - 2} for the choice of where: '
            f'p = {found.p:.2g}')
    return [
        f'{answer}; {fewest} minus {at} communications: {rise}',
        f'two lines that meet at {at} against a straight one, over {counts}: {found.slopes[0]:+.5f} nats per '
        f'communication dropped before, {found.slopes[1]:+.5f} after; {test}',
        f'linear, logarithmic or cliff-like: of the squares that a straight line leaves, a logarithm leaves '
        f'{found.left["logarithm"] / total:.0%}, the two lines {found.left["bent"] / total:.0%}']


# loss against time


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


def sweet_spot(rows, link):
    """Which config gives the most for its predicted step time, as lines. link: what --link says, or None."""
    if link is None:
        return [f'{UNANSWERED}: no link was given; --link=25,30 predicts step times for 25 Gbit/s and 30 us']
    lines = []
    for note, own in by_note([row for row in rows if not row.dense]).items():
        timed, best = fastest_first(own), front(own)
        if not timed:
            continue
        lines.append(f'Pareto front{note}, fastest first: ' + '; '.join(
            f'{row.title} {row.seconds * 1e3:.4g} ms, {to_dense(row)}' for row in best))
        safe = [row for row in timed if judge(to_dense(row), row.floor).startswith(('lower', 'no diff'))]
        lines.append(f'the fastest shown to be no worse than dense{note}: '
                     + (f'{safe[0].title}, {safe[0].seconds * 1e3:.4g} ms' if safe else 'none'))
    if not lines:
        return [f'{UNANSWERED}: no step time could be predicted for a config that has a dense control']
    return lines + [f'step times are predicted for {link}, not measured; the front goes by means, and '
                    'configs on it whose intervals overlap are not told apart']


def speed(rows, link):
    """Does reduced communication speed up training, as lines: only sharded runs can say, or a prediction."""
    measured, predicted = [], []
    for full, *fewer in curves(rows):
        if not full.all_tp:
            continue
        ratios = [f'{row.communications}: {full.seconds / row.seconds:.2f}' for row in fewer
                  if row.seconds and full.seconds]
        if ratios:
            predicted.append(f'{curve_name(full)}, predicted times the speed of all-tp, by communications: '
                             + ', '.join(ratios))
        for row in fewer:
            ratio = paired_ratio(row, full)
            if row.first.config.get('shard') and full.first.config.get('shard') and ratio:
                measured.append(f'{row.title}: {ratio} times the tokens/s of all-tp')
    if not measured:
        measured = [f'{UNANSWERED}: simulated ranks have no network between them for tokens/s to speak of'
                    if simulated(rows) else f'{UNANSWERED}: there is no all-tp run to compare with']
    return measured + predicted + ([f'predicted for {link}'] if predicted else [])


def paired_ratio(row, other):
    """How many times other's tokens/s a row has, paired by seed, as text; None without a pair."""
    logs = paired(row, other, lambda run: run.tokens_per_sec and math.log(run.tokens_per_sec))
    if logs is None:
        return None
    if logs.half is None:
        return f'{math.exp(logs.mean):.3f} (one seed, no interval)'
    return f'{math.exp(logs.mean):.3f} [{math.exp(logs.low):.3f}, {math.exp(logs.high):.3f}] (n={logs.n})'


# how training went


def tally(differences, lower, higher, digits='4'):
    """
    {row: (paired difference to dense, floor)} -> how many configs are lower, higher and neither, as lines,
    each with the furthest. lower, higher: what to call it.
    """
    judged = {}
    for row, (difference, floor) in differences.items():
        if difference is not None:
            judged.setdefault(judge(difference, floor).partition(',')[0], []).append((difference, row.title))
    lines, total = [], sum(map(len, judged.values()))
    calls = {'lower': lower, 'higher': higher, 'undecided': 'undecided', 'no difference': 'the same'}
    for word, said in calls.items():
        if word in judged:
            furthest, title = max(judged[word], key=lambda pair: abs(pair[0].mean))
            end = '' if word == 'no difference' else f', furthest in {title}: {format(furthest, digits)}'
            lines.append(f'{said} in {len(judged[word])} of {total} configs{end}')
    return lines


def convergence(rows):
    """How soon a given loss is reached, as lines."""
    lines = []
    for note, own in by_note(rows).items():
        level = own[0].level
        steps = {row: row.values(lambda run: run.steps_to(level)) for row in own}
        late = [row.title for row in own if len(steps[row]) < len(row.runs)]
        lines.append(f'to a validation loss of {level:.4f}{note}, on straight lines between evaluations'
                     + (f'; not reached by every run of {", ".join(late)}' if late else ''))
        lines += [f'dense control{note}: {sum(steps[row].values()) / len(steps[row]):.1f} steps'
                  for row in own if row.dense and steps[row]]
        lines += tally({row: (to_dense(row, lambda run: run.steps_to(level)), 0) for row in own},
                       'sooner than dense', 'later than dense', '1')
    return lines


def stability(rows):
    """Loss spikes, skipped steps and gradient norms, as lines."""
    spiked = {row: sum(len(run.spikes) for run in row.runs.values()) for row in rows}
    skipped = {row: sum(run.skipped for run in row.runs.values()) for row in rows}
    lines = [f'loss spikes ({SPIKE}): ' + in_runs(spiked),
             'steps without a finite gradient, which updated nothing: ' + in_runs(skipped)]
    norms = {row: norm for row in rows if (norm := highest_norm(row)) is not None}
    if norms:
        row = max(norms, key=norms.get)
        lines.append(f'the highest gradient norm logged after warmup is {norms[row]:.2f}, in {row.title}')
    return lines


def highest_norm(row):
    """The highest gradient norm after warmup, None where none was logged."""
    return max((norm for run in row.runs.values() for norm in run.grad_norms), default=None)


def in_runs(counts):
    """{row: how many} in words."""
    some = {row: count for row, count in counts.items() if count}
    runs = sum(len(row.runs) for row in counts)
    if not some:
        return f'none in {runs} run{"s" * (runs > 1)}'
    return ', '.join(f'{count} in {len(row.runs)} of {row.title}' for row, count in some.items())


def overfitting(rows):
    """Generalisation gap and whether the validation loss has turned up, as lines."""
    gaps = {row: estimate(list(row.values(lambda run: run.gap).values())) for row in rows}
    lines = [f'validation minus train loss on fixed windows, {row.title}: {gap}' for row, gap in gaps.items()
             if row.dense and gap]
    lines += tally({row: (to_dense(row, lambda run: run.gap), row.floor) for row in rows},
                   'a smaller gap than dense', 'a larger gap than dense')
    if not any(gaps.values()):
        lines = [f'{UNANSWERED}: no run read fixed windows of train; --eval_train_tokens has them read']
    risen = [row.title for row in rows if row.mean(lambda run: run.risen) > (row.floor or 0)]
    return lines + ['validation loss ends above its lowest in: ' + (', '.join(risen) or 'none of them')]


def drift_of(run):
    """The (drift, cosine) lists of a run's last evaluation; None where they were not logged."""
    line = run.evals[run.config['max_iters']]
    return (line['drift'], line['drift_cosine']) if 'drift' in line else None


def largest_drift(run):
    return max(drift_of(run)[0]) if drift_of(run) else None


def drifting(rows):
    """How far the ranks' streams come apart, as lines."""
    sizes = {row: drift for row in rows if (drift := row.mean(largest_drift)) is not None}
    if not sizes:
        return [f'{UNANSWERED}: no run logged any drift; --log_drift=True has it logged at evaluations']
    lines = []
    for curve in curves(list(sizes)):
        found = ', '.join(f'{row.communications}: {sizes[row]:.2f}' for row in curve)
        lines.append(f'{curve_name(curve[0])}, largest ||d_r|| / ||c|| by communications: {found}')
    return lines + ['that it goes along with a difference in loss does not make it the cause']


# which way it goes with width


@dataclass
class Trend:
    """A config's paired differences against log2 of the width: a line by least squares over the points."""
    rows: list                      # of one config, the narrowest first
    points: list                    # (width, difference), one a width and seed

    @property
    def words(self):
        row = self.rows[0]
        return f'{pattern(row.block_types)} (tp_size {row.tp_size})'

    @property
    def widths(self):
        return sorted({width for width, _ in self.points})

    def at(self, width):
        """The line's mean difference at a width, as an Estimate whose n is the number of points."""
        slope, centre, mean, error, spread = self.line
        x = math.log2(width) - centre
        n = len(self.points)
        return Estimate(mean + slope * x, t_quantile(n - 2) * error * math.sqrt(1 / n + x * x / spread), n)

    @property
    def slope(self):
        """Nats per doubling of the width."""
        slope, _, _, error, spread = self.line
        return Estimate(slope, t_quantile(len(self.points) - 2) * error / math.sqrt(spread), len(self.points))

    @property
    def line(self):
        """slope, mean log2(width), mean difference, deviation about the line, squares of log2(width)"""
        n = len(self.points)
        x, y = [math.log2(width) for width, _ in self.points], [difference for _, difference in self.points]
        centre, mean = sum(x) / n, sum(y) / n
        spread = sum((xi - centre) ** 2 for xi in x)
        slope = sum((xi - centre) * yi for xi, yi in zip(x, y)) / spread
        left = sum((yi - mean - slope * (xi - centre)) ** 2 for xi, yi in zip(x, y))
        return slope, centre, mean, math.sqrt(left / (n - 2)), spread


def width_trends(rows):
    """
    The Trends of the configs that were run at several widths, all else equal, of three points at least. Not
    of TP blocks alone, whose differences are rounding.
    """
    alike = {}
    for row in rows:
        if to_dense(row) and not row.all_tp:
            rest = settings(row.first) | dict(n_embd=None, blocks=row.block_types, tp_size=row.tp_size)
            alike.setdefault(json.dumps(rest, sort_keys=True), []).append(row)
    trends = []
    for same in alike.values():
        same.sort(key=lambda row: row.first.config['n_embd'])
        points = [(row.first.config['n_embd'], loss - row.control.losses[seed])
                  for row in same for seed, loss in row.losses.items() if seed in row.control.losses]
        trends.append(Trend(same, points))
    return [trend for trend in trends if len(trend.widths) > 1 and len(trend.points) > 2]


FULL_WIDTH = 768                        # GPT-2's (124M)


def width(rows):
    """Which way the difference goes with the width of the model, as lines."""
    trends = width_trends(rows)
    if not trends:
        return [f'{UNANSWERED}: it takes one config and its dense control at two widths, given with --mix']
    lines = []
    for trend in trends:
        slope = trend.slope
        way = 'rises with width' if slope.mean > 0 else 'falls with width'
        lines.append(f'{trend.words} at widths {", ".join(map(str, trend.widths))}: the difference '
                     f'{way if slope.clear else "may rise or fall, undecided"}, {slope} nats per doubling; '
                     f'the line is at {trend.at(FULL_WIDTH)} where n_embd is {FULL_WIDTH}')
    widest, fewest = max(max(trend.widths) for trend in trends), min(len(trend.widths) for trend in trends)
    if widest < FULL_WIDTH:
        straight = 'cannot be seen from two widths' if fewest == 2 else f'{fewest} widths can only suggest'
        lines.append(
            f'n is the number of pairs. {FULL_WIDTH} is {math.log2(FULL_WIDTH / widest):.1f} doublings '
            'beyond the widest of these runs: the line and its interval hold there only if the trend stays '
            f'straight in log2(width), which {straight}, and for the depth, corpus and steps of these runs. '
            'A larger width whose paired difference lies outside the interval of the line would refute it.')
    return lines


# all of them


def answers(rows, link=None):
    """
    The guide's questions with their answers, as pairs of a line and a list of lines. link: what --link says,
    in words; None without it.
    """
    configs = [row for row in rows if not row.dense]
    floors = {curve_name(row): 'unknown: no all-tp run with its dense control' if row.floor is None
              else f'{row.floor:.1e}' if row.floor else '0, they are equal to the last bit'
              for row in configs if not row.variant}
    said = [('Rounding floor: the largest |all-tp minus dense| of any seed. Nothing smaller is a difference.',
             [f'{where}: {floor}' for where, floor in floors.items()]),
            (f'How close to {TARGET}?', closeness(rows))]
    said += [(question, goal(rows, communications, limit)) for question, communications, limit in GOALS]
    said += [
        ('Key question 3: does alternating placement beat clustered?',
         compared(rows, 'placement', 'no two have the same blocks in another order')),
        ('Key question 4: is there a cliff?',
         [f'{curve_name(curve[0])}: {line}' for curve in curves(rows) for line in cliff(curve)]),
        ('Where is the sweet spot?', sweet_spot(rows, link)),
        ('Does reduced communication speed up training?', speed(rows, link)),
        ('Convergence speed: how many steps does each take to one loss?', convergence(rows)),
        ('Is training stable?', stability(rows)),
        ('Does it overfit?', overfitting(rows)),
        ('Merge: the mean of the ranks\' additions, or their sum?',
         compared(rows, 'merge', 'no config with mean_* blocks and the same with plain ones')),
        ('Which sync matters: the MLP\'s dropped instead of attention\'s?',
         compared(rows, 'sync', 'no config with attn_spd blocks and the same with spd')),
        ('Does it matter how many ranks there are?',
         compared(rows, 'tp_size', 'no config was run at two sizes of tp_size')),
        ('Which way does the difference go with width?', width(rows)),
        ('Drift: how far do the ranks\' streams come apart?', drifting(rows))]
    return [(question, lines if configs else [f'{UNANSWERED}: only dense runs have finished'])
            for question, lines in said]
