"""
The findings in words: the answer in a line, and the guide's questions.

Verdicts are those of verdicts.py. The guide's thresholds hold for one model, length and tokenizer, and are
applied nowhere else.
"""

import math
from typing import NamedTuple

from analysis.families import POWER
from analysis.findings import (
    ASYNC_TP,
    FULL_WIDTH,
    GOALS,
    TARGET,
    by_note,
    count,
    curve_name,
    curves,
    exact_rivals,
    fastest_first,
    front,
    gap_to_dense,
    highest_norm,
    in_scope,
    step_ratio,
    time_ratio,
)
from analysis.inside import inside
from analysis.runs import SPIKE, estimate, paired, to_dense
from analysis.verdicts import ALPHA, PASSES
from configurator import pattern


class Answered(NamedTuple):
    """A question with its answer, in lines, the first of which is the shortest answer."""
    question: str
    lines: list


# the answer


def all_reduces(row):
    return f'{count(row)} all-reduce{"s" * (count(row) != 1)}'


def counted(row):
    """Its communications and observed all-reduces, in words."""
    return f'{row.communications} communications ({all_reduces(row)})'


def shown(row):
    """A row's verdict with its numbers."""
    verdict = row.verdict
    if row.diverged:
        return f'{row.word}, it diverged on seed {", ".join(map(str, row.diverged))}'
    if verdict.upper is None:
        return f'{row.word or "no verdict"}, {verdict.difference:+.4f}'
    return f'{row.word}, {verdict.difference:+.4f}, upper bound {verdict.upper:+.4f}'


def headline(answer, margin, key=None):
    """An Answer as a sentence. key: the tuned one."""
    where = f'tp_size {answer.tp_size}{answer.note}'
    start = ''
    if not answer.tuned:
        start = f'At one {"learning rate" if key in (None, "learning_rate") else key}, untuned: '
    elif answer.edge:
        start = f'With values of {key} still to run: '
    if answer.preliminary:
        start = f'Preliminary, from the tuning seeds: {start}'
    if not answer.tested:
        return f'{start}no net of tp, spd and parallel layers to judge ({where})'
    failure, row = answer.first_failure, answer.row
    if row is None or row.word == 'identical':
        fewer = ' below the full count, which is dense itself,' if row else ''
        return (f'{start}no number of communications{fewer} is shown to be as good as dense within '
                f'{margin:g} ({where}){stopped(failure, answer)}')
    return (f'{start}{counted(row)} are the fewest shown to be as good as dense within {margin:g}: '
            f'{row.blocks}, {where}, difference {row.verdict.difference:+.4f}, one-sided 95% upper bound '
            f'{row.verdict.upper:+.4f} (n={row.verdict.n}){stopped(failure, answer)}')


def stopped(failure, answer):
    """Where the answer stopped, the seeds that would go on, and what passes beyond."""
    if failure is None and answer.lost is None:
        return ''
    if failure is None:
        words = f'; {pattern(answer.lost.config["block_types"])} diverged in every run'
    elif failure.verdict is None or not failure.word:
        words = f'; {failure.blocks} has no verdict yet, which takes about {answer.seeds} seeds'
    else:
        words = f'; {failure.blocks} is {shown(failure)}'
        if failure.word != 'worse' and not failure.diverged:
            words += f': {answer.seeds} seeds show it, with {POWER:.0%} power, if it equals dense'
    beyond = ', '.join(f'{row.communications} ({row.word})' for row in answer.beyond)
    return words + (f'; beyond it, exploratory: {beyond}' if beyond else '')


def headlines(found):
    """A line for each recipe and tp_size, the first of which is the answer. At least one line."""
    key, recipes = found.tuned and found.tuned.key, by_note(found.rows)
    lines = [headline(answer, found.margin, key) for answer in found.answers]
    for note, own in recipes.items():
        if not any(answer.note == note for answer in found.answers):
            of = f' ({note.removeprefix(", ")})' * bool(note)
            lines.append(f'No answer{of}: ' + (
                'no tensor-parallel run has finished beside its dense control' if own[0].dense else
                'there is no dense control among these runs'))
    return [at_step(found.rows) + line for line in lines]


def at_step(rows):
    """What a line begins with if the runs are read before their end; '' if they are not."""
    steps = {(row.first.at, row.first.config['max_iters']) for row in rows if row.first.at is not None}
    words = ', '.join(f'{at:,} of {last:,}' for at, last in sorted(steps))
    return f'At step {words}, as the runs were there, which is no answer yet: ' if steps else ''


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


def thresholds(rows):
    """The guide's limits of the loss, for the rows to which they apply."""
    scoped = [row for row in rows if in_scope(row.first)]
    found = []
    for question, communications, limit in GOALS if scoped else ():
        own = [row for row in scoped if not row.dense and row.plain and row.communications == communications]
        found.append(Answered(question, [f'{row.title}: {below(row, limit)}' for row in own] + caveat(own)))
    away = [(row, estimate([loss - TARGET for loss in row.losses.values()])) for row in scoped]
    found.append(Answered(f'How close to {TARGET}?',
                          [f'{row.title}: {distance} away' for row, distance in away] + caveat(scoped)))
    return [one for one in found if one.lines]


# each config, the floor, pairs, cliffs


def exploratory(found):
    """Which of the rows and pairs were planned, and which were not."""
    if found.plan is None:
        return ['no plan came with these runs: every comparison is exploratory']
    planned = [row.title for row in found.rows if row.planned and not row.dense]
    planned += [pair_name(one) for one in found.comparisons if one.planned and one.kind == 'pair']
    other = [row.title for row in found.rows if not row.planned]
    unplanned = sum(not one.planned for one in found.comparisons)
    other += [f'{unplanned} pair{"s" * (unplanned > 1)}'] * bool(unplanned)
    waiting = [(row, [seed for seed in found.plan.answer_seeds if seed not in row.runs])
               for row in found.rows if row.planned]
    waiting = [f'{row.title}, seed {", ".join(map(str, seeds))}' for row, seeds in waiting if seeds]
    return [f'planned in {found.plan.file} (sha256 {found.plan.sha256[:12]}): '
            + ('; '.join(planned) or 'none of these'),
            *[f"of the plan's seeds still to run: {'; '.join(waiting)}"] * bool(waiting),
            f'exploratory: {"; ".join(other) or "nothing"}']


def identity(rows):
    """What the configs that compute dense's own function differ by, as lines."""
    lines = []
    for row in rows:
        if row.word == 'identical' and row.control:
            gaps = [abs(row.losses[seed] - loss) for seed, loss in row.control.losses.items()
                    if seed in row.losses]
            exact = 'equal to dense to the last bit' if not any(gaps) else f'within {max(gaps):.1e} of dense'
            lines.append(f'{row.title}: {exact} in {len(gaps)} seeds, as the same function must be; this '
                         'checks the program and tests nothing')
    return lines


def floor(found):
    return [f'{one.row.blocks}: off by {one.size:.4f} (root mean square of {one.n} seeds, at most '
            f'{one.largest:.4f}); a single paired difference of that size shows nothing'
            for one in found.floors]


def pair_name(one):
    return f'{one.first.title} minus {one.second.title}'


def pairs(found, *kinds):
    """The comparisons of these kinds in words, the planned and the clear ones first."""
    return pair_lines([one for one in found.comparisons if one.kind in kinds], 'pair' not in kinds)


def pair_lines(comparisons, summary):
    """Comparisons in words. summary: whether to begin with how many there are of each verdict"""
    own = sorted((one for one in comparisons if one.difference),
                 key=lambda one: (not one.planned, one.verdict not in ('lower', 'higher')))
    lines = []
    for one in own:
        adjusted = '' if one.p_holm is None else f', p {one.p:.2g}, by Holm {one.p_holm:.2g}'
        plan = '' if one.planned else ' (exploratory)'
        both = f', both with {all_reduces(one.first)}' if one.equal else ''
        lines.append(f'{pair_name(one)}{both}: {one.difference}: {one.verdict}{adjusted}{plan}')
    if len(own) > 1 and summary:
        words = [one.verdict for one in own]
        lines.insert(0, f'of {len(own)} pairs: ' + ', '.join(
            f'{words.count(word)} {word}' for word in dict.fromkeys(words)) + ', adjusted by Holm')
    return lines


def asked(found):
    """The Comparisons that --pair asks for."""
    return [one for one in found.comparisons if one.kind == 'pair' and (one.first, one.second) in found.asked]


def at_equal(found):
    """The Comparisons at an equal number of all-reduces, each pair of rows once, most all-reduces first."""
    once = {frozenset((one.first, one.second)): one for one in reversed(found.comparisons) if one.equal}
    return sorted(reversed(once.values()), key=lambda one: -count(one.first))


def cliff(curve, bend):
    """
    Whether a curve has a cliff: the verdict, the test, the shapes. With too few counts for a bend there is an
    answer only if the low end is as good as dense: then there is nothing to fall off.
    """
    if bend is None:
        last = curve[-1]
        if len(curve) == 1 and not last.plain or last.word not in PASSES or last.word == 'identical':
            return []
        return [f'no: the low end, {all_reduces(last)}, is no worse than dense: {shown(last)}']
    curve, left = bend.curve, bend.residuals
    counts = ', '.join(str(count(row)) for row in curve)
    test = ('one seed, no test' if bend.p is None else
            f't-test of the bend over n={len(bend.seeds)} seeds, times {len(curve) - 2} for the choice of '
            f'where: p = {bend.p:.2g}' + ('' if bend.p_holm is None else f', by Holm {bend.p_holm:.2g}'))
    return [
        f'{cliff_verdict(bend)}; {count(curve[-1])} minus {bend.at} all-reduces: {bend.rise}',
        f'two lines that meet at {bend.at} against a straight one, over {counts} all-reduces: '
        f'{bend.slopes[0]:+.5f} nats per all-reduce dropped before, {bend.slopes[1]:+.5f} after; {test}',
        f'linear, logarithmic or cliff-like: of the squares that a straight line leaves, a logarithm leaves '
        f'{left["logarithm"] / (left["straight"] or 1):.0%}, the two lines '
        f'{left["bent"] / (left["straight"] or 1):.0%}']


def cliff_verdict(bend):
    """The verdict on a Bend."""
    rise, at, last = bend.rise, bend.at, bend.curve[-1]
    low_end = to_dense(last)
    if rise.mean <= 0:
        return f'no: the loss does not rise from {at} all-reduces to {count(last)}'
    if bend.bend.mean <= 0:
        return f'no: from {at} all-reduces to {count(last)} the loss does not rise more steeply than before'
    if low_end is not None and (low_end.mean <= 0 or low_end.half is not None and not low_end.clear):
        return f'no: the low end, {all_reduces(last)}, is not shown to lie above dense, {low_end}'
    if bend.p is None:
        return f'not tested: one seed, no interval; the bend is at {at} all-reduces'
    p = bend.p if bend.p_holm is None else bend.p_holm
    if p >= ALPHA or not rise.clear:
        return f'none shown: a bend at {at} all-reduces is not told apart from a straight line'
    if bend.residuals['logarithm'] <= 2 * bend.residuals['bent']:
        return f'no: the loss bends at {at} all-reduces, but as a logarithm does: gradual'
    return f'yes: below {at} all-reduces the loss rises more steeply'


def all_cliffs(found):
    return [f'{curve_name(curve[0])}: {line}' for curve, bend in found.bends for line in cliff(curve, bend)]


# loss against time


def as_ratio(logs):
    """An Estimate of a logarithm as a ratio with its interval."""
    if logs.half is None:
        return f'{math.exp(logs.mean):.2f} ({f"n={logs.n}" if logs.n > 1 else "one seed, no interval"})'
    return f'{math.exp(logs.mean):.2f} [{math.exp(logs.low):.2f}, {math.exp(logs.high):.2f}] (n={logs.n})'


def sweet_spot(found):
    """Which config gives the most for its predicted step time."""
    lines = []
    for note, own in by_note([row for row in found.rows if not row.dense]).items():
        timed = fastest_first(own)
        if not timed:
            continue
        safe = [row for row in timed if row.word in PASSES]
        lines.append(f'the fastest shown to be no worse than dense{note}: '
                     + (f'{safe[0].title}, {safe[0].seconds * 1e3:.4g} ms' if safe else 'none'))
        lines.append(f'Pareto front by verdict{note}, fastest first: ' + '; '.join(
            f'{row.title} {row.seconds * 1e3:.4g} ms, {shown(row)}' for row in front(own)))
        lines += without_tensor_parallelism(timed)
    return lines + [f'step times are predicted for {found.link}, not measured'] * bool(lines)


def without_tensor_parallelism(timed):
    """When tensor parallelism is needed at all, as lines. timed: rows of a recipe, the fastest first"""
    control, fastest = timed[0].control, timed[0]
    if control is None or control.seconds is None:
        return []
    start = f'data-parallel alone, dense{control.note}, takes {control.seconds * 1e3:.4g} ms'
    if control.seconds > fastest.seconds:
        return [f'{start}, {fastest.title} {fastest.seconds * 1e3:.4g} ms: here tensor parallelism is faster '
                'if the model and its batch fit on one GPU, and needed if they do not']
    return [f'{start}, less than any of these: tensor parallelism is needed only if the model or its batch '
            'does not fit on one GPU, or for latency']


def speed(found):
    """Whether fewer communications speed up training: only sharded runs can show it, or a prediction."""
    rows, measured, predicted = found.rows, [], []
    for curve in curves(rows):
        full = curve[0]
        ratios = [f'{row.counted}: {row.tp_seconds / row.seconds:.2f}' for row in curve
                  if row.seconds and row.tp_seconds and not row.all_tp]
        if ratios:
            predicted.append(f'{curve_name(full)}, predicted times the speed of all-tp, by communications: '
                             + ', '.join(ratios))
        for row in curve[1:] if full.all_tp else ():
            logs = paired(row, full, lambda run: run.tokens_per_sec and math.log(run.tokens_per_sec))
            if row.first.config['shard'] and full.first.config['shard'] and logs:
                measured.append(f'{row.title}: {as_ratio(logs)} times the tokens/s of all-tp')
    rivals = [f'{name}: {low * 1e3:.4g} to {high * 1e3:.4g} ms, as {ASYNC_TP[0]} to {ASYNC_TP[1]} times the '
              "speed of all-tp measured elsewhere; its loss is dense's"
              for name, low, high in exact_rivals(rows)]
    return measured + predicted + rivals + [f'predicted for {found.link}'] * bool(predicted + rivals)


def equal_time(found):
    """Each config's time to dense's losses, against all layers tp on the same link."""
    lines = []
    for row in found.rows:
        logs = time_ratio(row)
        if logs and not row.all_tp:
            lines.append(f'{row.title}: {as_ratio(step_ratio(row))} times the steps, '
                         f'{as_ratio(logs)} times the time of all-tp')
    return lines + [f"to each of dense's losses after warmup; seconds a step predicted for {found.link}"
                    ] * bool(lines)


# how training went


def by_mean(pair):
    return pair[1].mean


def convergence(found):
    """In what part of dense's steps each row reaches dense's losses."""
    ratios = [(row, logs) for row in found.rows if row.word != 'identical' and (logs := step_ratio(row))]
    lines = [f'{row.title}: {as_ratio(logs)}' + ', of those that it reaches' * (row.word == 'worse')
             for row, logs in ratios]
    if len(ratios) > 1:
        clear = [logs.mean < 0 for _, logs in ratios if logs.clear]
        lines.insert(0, f'fewer in {sum(clear)}, more in {len(clear) - sum(clear)} of {len(ratios)} configs, '
                     'by unadjusted 95% intervals; fewest: '
                     f'{lines[ratios.index(min(ratios, key=by_mean))]} times')
    notes = ["to each loss of dense's evaluations after warmup that the config reaches too, on straight "
             'lines between evaluations; the geometric mean, with its interval over seeds']
    for note, own in by_note(found.rows).items():
        level = own[0].level
        late = [row.title for row in own
                if len(row.values(lambda run, level=level: run.steps_to(level))) < len(row.runs)]
        if late:
            notes.append(f'a validation loss of {level:.4f}{note} is not reached by every run of '
                         + ', '.join(late))
    return lines + notes if lines or len(notes) > 1 else []


def stability(found):
    """Loss spikes, skipped steps and gradient norms."""
    rows = found.rows
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
    found = [f'{n} in {len(row.runs)} of {row.title}' for row, n in counts.items() if n]
    return ', '.join(found) or f'none in {runs} run{"s" * (runs > 1)}'


def overfitting(found):
    """The generalisation gap, compared at equal loss, and whether the validation loss has turned up."""
    rows = found.rows
    gaps = [(row, gap) for row in rows if (gap := gap_to_dense(row)) and row.word != 'identical']
    lines = [f'{row.title}: {gap}' for row, gap in gaps]
    clear = [gap.mean > 0 for _, gap in gaps if gap.clear]
    if lines:
        lines.insert(0, f"validation minus train loss, minus dense's at equal validation loss: larger in "
                     f'{sum(clear)}, smaller in {len(clear) - sum(clear)} of {len(gaps)} configs, by '
                     'unadjusted 95% intervals')
    risen = [row.title for row in rows if row.mean(lambda run: run.rise) > 0]
    return lines + ['validation loss ends above its lowest in: ' + (', '.join(risen) or 'none of them')]


def trends(found, regressor):
    """Whether the difference rises or falls with the width, or with the tokens."""
    lines, widest = [], 0
    what = dict(widths='width', tokens='number of tokens')[regressor]
    for trend in found.trends:
        if regressor not in trend.regressors:
            continue
        slope, p = trend.slope(regressor), trend.p_holm.get(regressor)
        way = 'rises' if slope.mean > 0 else 'falls'
        clear = slope.clear and (p is None or p < ALPHA)
        lines.append(f'{trend.name}{over(trend)}: the difference '
                     f'{way if clear else "may rise or fall, undecided,"} with the {what}, {slope} nats per '
                     f'doubling' + ('' if p is None else f', by Holm p = {p:.2g}'))
        if regressor == 'widths':
            widest = max(widest, *trend.widths)
            lines[-1] += (f'; predicted for a new seed where n_embd is {FULL_WIDTH}: '
                          f'{trend.prediction(FULL_WIDTH)}')
    if 0 < widest < FULL_WIDTH:
        lines.append(
            f'a line for each seed; n is the number of seeds. {FULL_WIDTH} is '
            f'{math.log2(FULL_WIDTH / widest):.1f} doublings beyond the widest of these runs: the interval '
            'holds there only if the trend stays straight in log2(width). '
            + 'The head size grows with the width here, which may make some of it. ' * heads_grow(found)
            + 'A paired difference outside the interval would refute it.')
    return lines


def heads_grow(found):
    """Whether the head size grows with the width in any trend."""
    return any(len({row.first.config['n_embd'] // row.first.config['n_head'] for row in trend.rows}) > 1
               for trend in found.trends)


def over(trend):
    """The widths and tokens of a trend, in words."""
    widths = f' at widths {", ".join(map(str, trend.widths))}' if len(trend.widths) > 1 else ''
    tokens = f' at {", ".join(f"{n:,}" for n in trend.tokens)} tokens' if len(trend.tokens) > 1 else ''
    return widths + tokens


# the tuned key


def tuning(found):
    """Where each config's best value lies, and what the difference to dense is at a common one."""
    lines = []
    for compared, start in ((True, ''), (False, 'not tuned: ')):
        own = [f'{row.title} at {row.tuning.best:g}' for row in found.rows
               if row.tuning and row.tuning.compared is compared]
        lines += [start + '; '.join(own)] if own else []
    short = [f'{row.title}, {value:g} on {", ".join(map(str, seeds))}' for row in found.rows if row.tuning
             for value, seeds in sorted(row.tuning.worse.items())]
    if short:
        lines.append('bounded by a worse value that not every tuning seed has run: ' + '; '.join(short))
    missing = [(row, value) for row in found.rows if row.tuning for value in row.tuning.missing]
    if missing:
        lines.insert(0, 'a better value may be among those still to run: ' + '; '.join(
            f'{row.title}, {value:g}' for row, value in missing))
    return lines


# all of them


def answers(found):
    """The questions that these runs answer, the guide's first, as Answereds."""
    if all(row.dense for row in found.rows):
        return []
    every = [
        Answered('The pairs that were asked for', pair_lines(asked(found), summary=False)),
        *thresholds(found.rows),
        Answered('Planned comparisons', pair_lines(
            [one for one in found.comparisons if one.kind == 'pair' and one.planned], summary=False)),
        Answered('Which blocks are better at an equal number of all-reduces?',
                 pair_lines(at_equal(found), summary=True)),
        Answered(f'Each config at its best {found.tuned.key if found.tuned else ""}', tuning(found)),
        Answered('Key question 3: does alternating placement beat clustered?', pairs(found, 'placement')),
        Answered('Key question 4: is there a cliff?', all_cliffs(found)),
        Answered('Where is the sweet spot?', sweet_spot(found)),
        Answered('Which way does the difference go with width?', trends(found, 'widths')),
        Answered('Which way does the difference go with longer training?', trends(found, 'tokens')),
        Answered("Convergence speed: how many of dense's steps does each take to dense's losses?",
                 convergence(found)),
        Answered("How soon are dense's losses reached on this link?", equal_time(found)),
        Answered('Does reduced communication speed up training?', speed(found)),
        Answered('Noise floor: what does a change of the initial weights do that should not matter?',
                 floor(found)),
        Answered('Does it overfit?', overfitting(found)),
        Answered('Is training stable?', stability(found)),
        Answered("Merge: the mean of the ranks' additions, or their sum?", pairs(found, 'merge')),
        Answered("Which sync matters: the MLP's dropped instead of attention's?", pairs(found, 'sync')),
        Answered('Does it matter how many ranks there are?', pairs(found, 'tp_size')),
        Answered('What happens inside: what separates the configs?', inside(found)),
        Answered('Identity check: all layers tp', identity(found.rows))]
    return [one for one in every if one.lines]
