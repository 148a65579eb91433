"""
What the findings cannot answer, each with the command that would.
"""

import shlex
from itertools import count, islice
from pathlib import Path
from typing import NamedTuple

from analysis.answers import cliff
from analysis.findings import FEWEST_COUNTS, GUIDE_SCOPE, in_scope
from analysis.runs import simulated
from configurator import HOUSEKEEPING, RESUMING, read_defaults

ALL = 'config/train_gpt2_*comm.py'


class Open(NamedTuple):
    """A question that these runs leave open, and the command that would answer it."""
    question: str
    command: str


def folder_of(row):
    """The folder of a row's runs, beside which more of them belong."""
    return row.first.folder.parent if (row.first.folder / 'run.json').exists() else Path('out')


def sweep(row, configs='', **grid):
    """The sweep.py command that trains runs of a row's recipe, under its plan. grid: {key: values as text}"""
    argv = row.first.info.get('argv') or []
    files = [arg for arg in argv if arg.endswith('.py') and not arg.startswith('-')]
    flags = dict(flag.removeprefix('--').split('=', 1) for flag in argv if flag.startswith('--'))
    recipe = read_defaults().keys() - HOUSEKEEPING - {'seed', 'tp_size', 'block_types'} | {'plan'}
    # a sweep itself says --init_from=auto
    flags = {key: value for key, value in flags.items() if key in recipe and value not in RESUMING} | grid
    withs = [f'--with {shlex.quote(file)}' for file in files[1:]]
    if folder_of(row) != Path('out'):
        flags['out'] = shlex.quote(str(folder_of(row)))
    return ' '.join(['python sweep.py', *filter(None, [configs or ' '.join(files[:1])]), *withs,
                     *(f'--{key}={value}' for key, value in flags.items())])


def seeds_to_run(n, tuned):
    """At least n seeds for an answer, as text: those that the plan names, then others not used for tuning."""
    planned, used = (tuned.answer_seeds, tuned.tuning_seeds) if tuned else ((), ())
    planned = [seed for seed in planned if seed not in used]
    others = (seed for seed in count(1) if seed not in (*planned, *used))
    return ','.join(map(str, (*planned, *islice(others, max(0, n - len(planned))))))


def pairing(row, seeds):
    """The command that trains what a row lacks of a dense control, which sweep.py adds to a config."""
    if row.control:  # which may be at another value of the tuned key
        return sweep(row.control, seed=','.join(seeds))
    return sweep(row, seed=','.join(seeds), **(dict(tp_size=row.tp_size) if row.tp_size > 1 else {}))


def more_seeds(row, seeds):
    """The command that trains a config and dense on seeds, each at its own value of the tuned key."""
    words = sweep(row, seed=seeds, tp_size=row.tp_size)
    if row.tuning is None or row.tuning.best == row.control.tuning.best:
        return words
    return f'{words} --without_dense && {sweep(row.control, seed=seeds)}'


def open_questions(found, command):
    """What these runs cannot answer, as Opens, the most important first. command: that of this comparison."""
    rows, listed = found.rows, []
    dense = next((row for row in rows if row.dense), None)
    configs = [row for row in rows if not row.dense]
    if dense is None:
        return [Open('every difference to dense: there is no control', sweep(rows[0], seed='1,2,3'))]
    if not configs:
        return [Open('every question: only dense runs have finished', sweep(dense, ALL))]
    for answer in found.answers[:1]:
        failure = answer.first_failure
        if failure and failure.word != 'worse' and not failure.diverged:
            listed.append(Open(f'whether {failure.blocks} is as good as dense, if it is equal to it',
                               more_seeds(failure, seeds_to_run(answer.seeds, found.tuned))))
    if not found.tuned:
        rate = dense.first.config['learning_rate']
        grid = ','.join(f'{rate * factor:g}' for factor in (0.5, 1, 2))
        listed.append(Open(
            'each config at its own best learning rate',
            sweep(dense, ALL, seed='1,2', learning_rate=grid)
            + f' && python compare.py {shlex.quote(str(folder_of(dense)))} --tuned=learning_rate '
            '--tuning_seeds=1,2'))
    for row in rows:
        if row.tuning and row.tuning.missing:
            seeds = ','.join(map(str, found.tuned.tuning_seeds))
            values = ','.join(f'{value:.12g}' for value in row.tuning.missing)
            listed.append(Open(f'the best {found.tuned.key} of {row.title}, with values still to run',
                               sweep(row, seed=seeds, **{found.tuned.key: values})))
    if not found.floors:
        listed.append(Open('the noise floor', sweep(dense, seed=seeds_to_run(3, found.tuned)) + ' --floor'))
    if not any(in_scope(row.first) for row in rows):
        listed.append(Open(f"the guide's thresholds, which are for {GUIDE_SCOPE}",
                           'python sweep.py --max_iters=20000'))
    if not any(one.kind == 'placement' for one in found.comparisons):
        listed.append(Open('placement: no two have the same blocks in another order',
                           sweep(dense, 'config/train_gpt2_14comm_*.py')))
    if not any(cliff(curve, bend) for curve, bend in found.bends if curve[0].plain):
        listed.append(Open(f'a cliff: it takes {FEWEST_COUNTS} counts of all-reduces that share a seed',
                           sweep(dense, ALL)))
    if found.link is None:
        listed.append(Open('speed and the sweet spot: simulated ranks have no network' if simulated(rows)
                           else 'the sweet spot on a given link', f'{command} --link=25,30'))
    if not any('widths' in trend.regressors for trend in found.trends):
        double = {key: 2 * dense.first.config[key] for key in ('n_embd', 'n_head')}  # equal heads, and more
        listed.append(Open('the trend with width', sweep(dense, ALL, **double)))
    return listed
