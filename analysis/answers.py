"""
The guide's questions, answered in words from the findings.

An answer is a list of lines. It says so if the runs cannot tell: the guide's thresholds hold for one model,
length and tokenizer; one seed has no interval; and nothing below the rounding floor is called a difference.
"""

import math
from collections import Counter

from analysis.findings import (
    FULL_WIDTH,
    GOALS,
    GUIDE_SCOPE,
    TARGET,
    by_note,
    comparisons,
    curve_name,
    curves,
    fastest_first,
    fit_bend,
    front,
    highest_norm,
    in_scope,
    largest_drift,
    width_trends,
)
from analysis.runs import SPIKE, estimate, judge, paired, simulated, to_dense, verdict

UNANSWERED = 'Not answerable from these runs'


# the guide's thresholds


def below(row, limit):
    """Whether a row's validation loss is below a limit, by the 95% interval of its mean."""
    loss = estimate(list(row.losses.values()))
    if loss.half is None:
        return f'{"yes" if loss.mean < limit else "no"}, {loss.mean:.4f} in one seed, no interval'
    answer = 'yes' if loss.high < limit else 'no' if loss.low >= limit else 'undecided'
    return f'{answer}, {loss.mean:.4f} [{loss.low:.4f}, {loss.high:.4f}] (n={loss.n})'


def caveat(rows):
    """What a corpus other than the threshold's means for it, as lines."""
    if any(row.first.config['dataset'] == 'openwebtext' for row in rows):
        return [f"({TARGET} is FineWeb's; on OpenWebText dense GPT-2 ends lower: see the difference)"]
    return []


def goal(rows, communications, limit):
    """The answer to a threshold question: absolute if the threshold applies, and relative to dense."""
    rows = [row for row in rows if not row.dense and row.plain and row.communications == communications]
    if not rows:
        return [f'{UNANSWERED}: no run with {communications} communications has finished']
    scoped = [row for row in rows if in_scope(row.first)]
    lines = [f'{row.title}: {below(row, limit)}' for row in scoped] + caveat(scoped)
    if len(scoped) < len(rows):
        lines.append(f'{UNANSWERED} in its absolute form: the thresholds are for {GUIDE_SCOPE}')
    return lines + [f'relative form, {row.title} minus dense: {verdict(to_dense(row), row.floor)}'
                    for row in rows]


def closeness(rows):
    """How close each row comes to the guide's target."""
    scoped = [row for row in rows if in_scope(row.first)]
    if not scoped:
        return [f'{UNANSWERED}: {TARGET} is for {GUIDE_SCOPE}']
    away = [(row, estimate([loss - TARGET for loss in row.losses.values()])) for row in scoped]
    return [f'{row.title}: {distance} away' for row, distance in away] + caveat(scoped)


# comparisons and cliffs


def compared(rows, kind, missing):
    """The comparisons of a kind, and how many of them got each verdict. missing: what to say without any."""
    found = [comparison for comparison in comparisons(rows) if comparison.kind == kind]
    if not found:
        return [f'{UNANSWERED}: {missing}']
    lines = [f'{one.first.title} minus {one.second.title}: {verdict(one.difference, one.first.floor)}'
             for one in found]
    if len(found) > 1:
        counts = Counter(one.verdict.partition(',')[0] for one in found)
        lines.append(f'in all {len(found)}: ' + ', '.join(f'{n} {word}' for word, n in counts.most_common())
                     + '; each interval is for one comparison, not for all of them together')
    return lines


def cliff(curve):
    """Whether a curve has a cliff: the verdict, the test, the shapes."""
    found = fit_bend(curve)
    if found is None:
        return [f'{UNANSWERED}: it takes four counts that share a seed, here are {len(curve)} counts']
    curve, left = found.curve, found.residuals
    counts = ', '.join(str(row.communications) for row in curve)
    test = ('one seed, no test' if found.p is None else
            f't-test of the bend over n={len(found.seeds)} seeds, times {len(curve) - 2} for the choice of '
            f'where: p = {found.p:.2g}')
    return [
        f'{cliff_verdict(found)}; {curve[-1].communications} minus {found.at} communications: {found.rise}',
        f'two lines that meet at {found.at} against a straight one, over {counts}: {found.slopes[0]:+.5f} '
        f'nats per communication dropped before, {found.slopes[1]:+.5f} after; {test}',
        f'linear, logarithmic or cliff-like: of the squares that a straight line leaves, a logarithm leaves '
        f'{left["logarithm"] / (left["straight"] or 1):.0%}, the two lines '
        f'{left["bent"] / (left["straight"] or 1):.0%}']


def cliff_verdict(found):
    """The verdict on a Bend."""
    rise, at, fewest, floor = found.rise, found.at, found.curve[-1].communications, found.curve[0].floor
    if rise.mean <= 0:
        return f'no: the loss does not rise from {at} communications to {fewest}'
    if floor is not None and rise.mean <= floor:
        return f'none seen: the rise from {at} to {fewest} is within the rounding floor of {floor:.1e}'
    if found.bend.mean <= 0:
        return f'no: from {at} communications to {fewest} the loss does not rise more steeply than before'
    if found.p is None:
        return f'{UNANSWERED}: one seed, no interval, so no test; the bend is at {at} communications'
    if found.p >= 0.05 or not rise.clear:
        return f'none shown: a bend at {at} communications is not told apart from a straight line'
    if found.residuals['logarithm'] <= 2 * found.residuals['bent']:
        return f'no: the loss bends at {at} communications, but as a logarithm does: gradual'
    return f'yes: below {at} communications the loss rises more steeply'


# loss against time


def sweet_spot(rows, link):
    """Which config gives the most for its predicted step time. link: as in answers()"""
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
    """Whether fewer communications speed up training: only sharded runs can show it, or a prediction."""
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
            if row.first.config['shard'] and full.first.config['shard'] and ratio:
                measured.append(f'{row.title}: {ratio} times the tokens/s of all-tp')
    if not measured:
        measured = [f'{UNANSWERED}: simulated ranks have no network between them that tokens/s could show'
                    if simulated(rows) else f'{UNANSWERED}: there is no all-tp run to compare with']
    return measured + predicted + ([f'predicted for {link}'] if predicted else [])


def paired_ratio(row, other):
    """The ratio of row's tokens/s to other's, paired by seed, as text; None if they share no seed."""
    logs = paired(row, other, lambda run: run.tokens_per_sec and math.log(run.tokens_per_sec))
    if logs is None:
        return None
    if logs.half is None:
        return f'{math.exp(logs.mean):.3f} (one seed, no interval)'
    return f'{math.exp(logs.mean):.3f} [{math.exp(logs.low):.3f}, {math.exp(logs.high):.3f}] (n={logs.n})'


# how training went


def tally(differences, lower, higher, digits='4'):
    """
    How many configs are lower than dense, higher and neither, each line with the furthest of them.

    differences: {row: (paired difference to dense, floor)}. lower, higher: what to call these.
    """
    judged = {}
    for row, (difference, floor) in differences.items():
        if difference is not None:
            judged.setdefault(judge(difference, floor).partition(',')[0], []).append((difference, row.title))
    lines, total = [], sum(map(len, judged.values()))
    names = {'lower': lower, 'higher': higher, 'undecided': 'undecided', 'no difference': 'the same'}
    for word, name in names.items():
        if word in judged:
            furthest, title = max(judged[word], key=lambda pair: abs(pair[0].mean))
            end = '' if word == 'no difference' else f', furthest in {title}: {format(furthest, digits)}'
            lines.append(f'{name} in {len(judged[word])} of {total} configs{end}')
    return lines


def convergence(rows):
    """How soon each row reaches a given loss."""
    lines = []
    for note, own in by_note(rows).items():
        def steps_to_level(run, level=own[0].level):
            return run.steps_to(level)

        steps = {row: row.values(steps_to_level) for row in own}
        late = [row.title for row in own if len(steps[row]) < len(row.runs)]
        lines.append(f'to a validation loss of {own[0].level:.4f}{note}, on straight lines between '
                     'evaluations' + (f'; not reached by every run of {", ".join(late)}' if late else ''))
        lines += [f'dense control{note}: {sum(steps[row].values()) / len(steps[row]):.1f} steps'
                  for row in own if row.dense and steps[row]]
        lines += tally({row: (to_dense(row, steps_to_level), 0) for row in own},
                       'sooner than dense', 'later than dense', '1')
    return lines


def stability(rows):
    """Loss spikes, skipped steps and gradient norms."""
    spiked = {row: sum(len(run.spikes) for run in row.runs.values()) for row in rows}
    skipped = {row: sum(run.skipped for run in row.runs.values()) for row in rows}
    lines = [f'loss spikes ({SPIKE}): ' + in_runs(spiked),
             'steps without a finite gradient, which updated nothing: ' + in_runs(skipped)]
    norms = {row: norm for row in rows if (norm := highest_norm(row)) is not None}
    if norms:
        row = max(norms, key=norms.get)
        lines.append(f'the highest gradient norm logged after warmup is {norms[row]:.2f}, in {row.title}')
    return lines


def in_runs(counts):
    """{row: count} in words."""
    runs = sum(len(row.runs) for row in counts)
    found = [f'{count} in {len(row.runs)} of {row.title}' for row, count in counts.items() if count]
    return ', '.join(found) or f'none in {runs} run{"s" * (runs > 1)}'


def overfitting(rows):
    """The generalisation gap, and whether the validation loss has turned up."""
    gaps = {row: estimate(list(row.values(lambda run: run.gap).values())) for row in rows}
    lines = [f'validation minus train loss on fixed windows, {row.title}: {gap}' for row, gap in gaps.items()
             if row.dense and gap]
    lines += tally({row: (to_dense(row, lambda run: run.gap), row.floor) for row in rows},
                   'a smaller gap than dense', 'a larger gap than dense')
    if not any(gaps.values()):
        lines = [f'{UNANSWERED}: no run read fixed windows of train; --eval_train_tokens makes them']
    risen = [row.title for row in rows if row.mean(lambda run: run.rise) > (row.floor or 0)]
    return lines + ['validation loss ends above its lowest in: ' + (', '.join(risen) or 'none of them')]


def drifting(rows):
    """How far the ranks' streams drift apart."""
    sizes = {row: drift for row in rows if (drift := row.mean(largest_drift)) is not None}
    if not sizes:
        return [f'{UNANSWERED}: no run logged any drift; --log_drift=True makes evaluations log it']
    lines = []
    for curve in curves(list(sizes)):
        found = ', '.join(f'{row.communications}: {sizes[row]:.2f}' for row in curve)
        lines.append(f'{curve_name(curve[0])}, largest ||d_r|| / ||c|| by communications: {found}')
    return lines + ['that drift goes along with a difference in loss does not make it the cause']


def width(rows):
    """Whether the difference rises or falls with the width of the model."""
    trends = width_trends(rows)
    if not trends:
        return [f'{UNANSWERED}: it takes one config and its dense control at two widths, given with --mix']
    lines = []
    for trend in trends:
        slope = trend.slope
        way = 'rises with width' if slope.mean > 0 else 'falls with width'
        lines.append(f'{trend.name} at widths {", ".join(map(str, trend.widths))}: the difference '
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
    The guide's questions with their answers, as pairs of a line and a list of lines.

    link: what step times were predicted for, in words; None without --link.
    """
    configs = [row for row in rows if not row.dense]
    floors = {curve_name(row): 'unknown: no all-tp run with its dense control' if row.floor is None
              else f'{row.floor:.1e}' if row.floor else '0, they are equal to the last bit'
              for row in configs if row.plain}
    found = [
        ('Rounding floor: the largest |all-tp minus dense| of any seed. Nothing smaller is a difference.',
         [f'{name}: {floor}' for name, floor in floors.items()]),
        (f'How close to {TARGET}?', closeness(rows)),
        *((question, goal(rows, communications, limit)) for question, communications, limit in GOALS),
        ('Key question 3: does alternating placement beat clustered?',
         compared(rows, 'placement', 'no two have the same blocks in another order')),
        ('Key question 4: is there a cliff?',
         [f'{curve_name(curve[0])}: {line}' for curve in curves(rows) for line in cliff(curve)]),
        ('Where is the sweet spot?', sweet_spot(rows, link)),
        ('Does reduced communication speed up training?', speed(rows, link)),
        ('Convergence speed: how many steps does each take to one loss?', convergence(rows)),
        ('Is training stable?', stability(rows)),
        ('Does it overfit?', overfitting(rows)),
        ("Merge: the mean of the ranks' additions, or their sum?",
         compared(rows, 'merge', 'no config was run with merge mean and with merge sum')),
        ("Which sync matters: the MLP's dropped instead of attention's?",
         compared(rows, 'sync', 'no config with attn_spd blocks and the same with spd')),
        ('Does it matter how many ranks there are?',
         compared(rows, 'tp_size', 'no config was run at two sizes of tp_size')),
        ('Which way does the difference go with width?', width(rows)),
        ("Drift: how far do the ranks' streams come apart?", drifting(rows))]
    return [(question, lines if configs else [f'{UNANSWERED}: only dense runs have finished'])
            for question, lines in found]
