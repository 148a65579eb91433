"""
The tables of a comparison: the answer, rivals, pairs, predicted times, how training went.
"""

from analysis.answers import as_ratio, asked, at_equal
from analysis.families import has_plan
from analysis.findings import (
    ASYNC_TP,
    at_common,
    by_note,
    count,
    exact_rivals,
    gap_to_dense,
    highest_norm,
    step_ratio,
    time_ratio,
)
from analysis.inside import largest_dispersion
from analysis.runs import OTHER_VARIED, to_dense
from analysis.tuning import common_values

PREDICTED = 'predicted ms/step'

# the numbers of a row


def steps_to_level(row):
    """The mean number of steps to row.level; None if a run does not reach it."""
    steps = row.values(lambda run: run.steps_to(row.level))
    return sum(steps.values()) / len(steps) if len(steps) == len(row.runs) else None


def record(row, found):
    """A row's numbers under flat names, unrounded; losses in nats per token, None if there is none."""
    difference, corpus, verdict, spread = to_dense(row), row.first.info['corpus'], row.verdict, row.spread
    gap, steps, (common, _) = gap_to_dense(row), step_ratio(row), at_common(row)
    return dict(
        run=row.name, state=state_of(row), communications=row.communications,
        all_reduces_forward=row.all_reduces['forward'], all_reduces_backward=row.all_reduces['backward'],
        all_reduces_blocking=row.blocking, all_reduces_hidden=row.hidden, bytes_per_step=row.step_bytes,
        block_types=' '.join(row.block_types), tp_size=row.tp_size,
        **{key: row.first.config[key] for key in OTHER_VARIED}, seeds=' '.join(map(str, row.runs)),
        val_loss=row.loss, verdict=row.word or None, difference=difference and difference.mean,
        half_interval=difference and difference.half, lower=verdict and verdict.lower,
        upper=verdict and verdict.upper, p_dunnett=verdict and verdict.p, pairs=difference and difference.n,
        pooled_sd=spread and float(spread.pooled_sd), df=spread and spread.df, planned=row.planned,
        **tuned_record(row, found),
        difference_at_common=common and common.mean, half_interval_at_common=common and common.half,
        level=row.level, steps_to_level=steps_to_level(row),
        log_step_ratio=steps and steps.mean, log_step_ratio_half_interval=steps and steps.half,
        generalisation_gap=row.mean(lambda run: run.gap),
        gap_difference=gap and gap.mean, gap_half_interval=gap and gap.half,
        highest_grad_norm=highest_norm(row),
        loss_spikes=sum(len(run.spikes) for run in row.runs.values()),
        skipped_steps=sum(run.skipped for run in row.runs.values()), 
        largest_dispersion=row.mean(largest_dispersion),
        predicted_seconds=row.seconds, tokens_per_sec=row.mean(lambda run: run.tokens_per_sec),
        n_embd=row.first.config['n_embd'], parameters=row.first.info['parameters'], corpus=corpus['corpus'],
        tokenizer=corpus['tokenizer'], max_iters=row.first.config['max_iters'])


def state_of(row):
    at = row.first.at
    return 'finished' if at in (None, row.first.config['max_iters']) else f'at step {at}'


def tuned_record(row, found):
    """The value of the tuned key that a row is at, and its sensitivity to it."""
    tuning = row.tuning
    sensitivity = tuning and tuning.compared and tuning.sensitivity(
        common_values([other for other in found.rows if other.note == row.note]))
    return dict(tuned=tuning and tuning.tuned.key, best=tuning and tuning.best,
                tuning_loss=tuning and tuning.means.get(tuning.best),
                sensitivity=None if sensitivity is False else sensitivity,
                run_next=' '.join(f'{value:g}' for value in tuning.missing) if tuning else None)


# the tables


def number(value, form, times=1):
    """A number as a cell, empty if there is none."""
    return '' if value is None else format(times * value, form)


def verdict(row):
    """Its word, and the seeds on which it diverged."""
    return row.word + f' (diverged on seed {", ".join(map(str, row.diverged))})' * bool(row.diverged)


def common_cell(answer, chose):
    """The difference at dense's best value, which the tuning seeds chose."""
    return str(answer) if answer else f'{chose.mean:+.4f} (tuning seeds)' if chose else ''


def columns(found):
    """{header: what its cell shows of a row and of its record()} of the first table; only what is known."""
    noted = any(row.note for row in found.rows)
    unplanned = [row for row in found.rows if has_plan(found.rows) and not row.planned and not row.dense]
    table = {
        'blocks': lambda row, own: row.blocks + row.note * noted,
        'comm': lambda row, own: str(row.communications) if row.whole else '',
        'all-reduces': lambda row, own: f'{row.all_reduces["forward"]}/{row.all_reduces["backward"]}',
        'tp': lambda row, own: str(row.tp_size), 'seeds': lambda row, own: str(len(row.runs)),
        'val loss': lambda row, own: f'{row.loss:.4f}',
        'minus dense, 95% interval': lambda row, own: str(to_dense(row) or ''),
        'upper bound': lambda row, own: number(own['upper'], '+.4f'),
        'verdict': lambda row, own: verdict(row) + ' (not planned)' * (row in unplanned)}
    if not all(row.whole for row in found.rows):
        table['MB a step'] = lambda row, own: number(row.step_bytes, '.4g', 1e-6)
    if found.tuned:
        table |= {
            f'best {found.tuned.key}': lambda row, own: number(own['best'], 'g') + (
                '' if row.tuning.compared else ' (alone)'),
            'sensitivity': lambda row, own: number(own['sensitivity'], '.4f'),
            "both at dense's best": lambda row, own: common_cell(*at_common(row))}
    return table


def rival_columns(found):
    """The same of the table of rivals."""
    return {
        'blocks': lambda row, own: row.blocks + row.note, 'tp': lambda row, own: str(row.tp_size),
        'all-reduces': lambda row, own: f'{count(row)}/{row.all_reduces["backward"]}',
        'blocking': lambda row, own: number(row.blocking, 'g'),
        'hidden': lambda row, own: number(row.hidden, 'g'),
        'MB a step': lambda row, own: number(row.step_bytes, '.4g', 1e-6),
        PREDICTED: lambda row, own: number(own['predicted_seconds'], '.4g', 1e3),
        'minus dense, 95% interval': lambda row, own: str(to_dense(row) or ''),
        'verdict': lambda row, own: row.word}


def rivals(found):
    """The rows of each recipe by observed all-reduces; none if all are the guide's nets and dense."""
    if all(row.plain or row.dense or row.twin for row in found.rows):
        return []
    return [row for own in by_note(found.rows).values()
            for row in sorted(own, key=lambda row: (not row.dense, -count(row), -(row.step_bytes or 0)))]


def pair_table(comparisons):
    """Comparisons as lines of cells, the header first."""
    header = ['first minus second', 'all-reduces', 'difference, 95% interval', 'p', 'p, Holm', 'verdict', '']
    return [header] + [
        [f'{one.first.title} minus {one.second.title}',
         '/'.join(str(n) for n in dict.fromkeys((count(one.first), count(one.second)))),
         str(one.difference or 'no seed in common'), number(one.p, '.2g'), number(one.p_holm, '.2g'),
         one.verdict, 'planned' if one.planned else 'exploratory'] for one in comparisons]


def listed_pairs(found, only_named=False):
    """The Comparisons of the table of pairs: asked for, planned, and at equal all-reduces."""
    named = asked(found) + [one for one in found.comparisons if one.kind == 'pair']
    return list(dict.fromkeys(named + ([] if only_named else at_equal(found))))


def time_columns(found):
    """The same of the table of predicted times."""
    return {
        'blocks': lambda row, own: row.blocks + row.note, 'tp': lambda row, own: str(row.tp_size),
        'verdict': lambda row, own: row.word,
        PREDICTED: lambda row, own: number(own['predicted_seconds'], '.4g', 1e3),
        'step, times that of all-tp': lambda row, own: (
            format(row.seconds / row.tp_seconds, '.2f') if row.seconds and row.tp_seconds else ''),
        "to dense's losses: steps": lambda row, own: ratio(step_ratio(row)),
        'time, times that of all-tp': lambda row, own: ratio(time_ratio(row))}


def ratio(logs):
    return '' if logs is None else as_ratio(logs)


def more_columns(found):
    """The same of the second table: how training went."""
    table = {
        'blocks': lambda row, own: row.blocks + row.note, 'tp': lambda row, own: str(row.tp_size),
        'p, Dunnett': lambda row, own: number(own['p_dunnett'], '.2g'),
        "times dense's steps": lambda row, own: ratio(step_ratio(row)),
        'val minus train loss': lambda row, own: number(own['generalisation_gap'], '+.4f'),
        'minus dense at equal loss': lambda row, own: str(gap_to_dense(row) or ''),
        'highest grad norm': lambda row, own: number(own['highest_grad_norm'], '.2f'),
        'spikes': lambda row, own: str(own['loss_spikes']),
        'skipped': lambda row, own: str(own['skipped_steps']),
        'largest dispersion': lambda row, own: number(own['largest_dispersion'], '.3f'),
        'tokens/s': lambda row, own: number(own['tokens_per_sec'], ',.0f')}
    return table


def lines_of(rows, found, table):
    """A table as a list of lines of cells, the header first. Columns without a cell are left out."""
    cells = [[cell(row, own) for cell in table.values()] for row in rows for own in [record(row, found)]]
    if table.keys() == time_columns(found).keys():
        gain = f'{1 / ASYNC_TP[1]:.2f} to {1 / ASYNC_TP[0]:.2f}'
        for name, low, high in exact_rivals(found.rows):
            cells.append([name, '', "dense's loss", f'{low * 1e3:.4g} to {high * 1e3:.4g}', gain, '1', gain])
    used = [i for i in range(len(table)) if any(line[i] for line in cells)]
    return [[line[i] for i in used] for line in [list(table), *cells]]


def tables(found, only_named=False):
    """
    {what it is of: a table as lines of cells, the header first}, of those that there are.

    only_named: leave out the pairs that nobody asked for or planned
    """
    by_count, listed = rivals(found), listed_pairs(found, only_named)
    every = dict(
        answer=lines_of(found.rows, found, columns(found)),
        rivals=by_count and lines_of(by_count, found, rival_columns(found)),
        pairs=listed and pair_table(listed),
        times=found.link and lines_of(found.rows, found, time_columns(found)),
        training=lines_of(found.rows, found, more_columns(found)))
    return {name: lines for name, lines in every.items() if lines}


def aligned(lines):
    """A table as aligned text."""
    widths = [max(map(len, column)) for column in zip(*lines)]
    return '\n'.join('  '.join(map(str.ljust, line, widths)).rstrip() for line in lines)
