"""
The runs that train.py left, read from their folders or from W&B, and paired with their dense controls.

A Run is one folder. A Row is the runs that differ in nothing but their seed; it knows the dense control of
the same data and recipe. Differences are taken seed by seed and then averaged: a run shares its initial
weights and batches with the control of its seed, so most of what a seed does to a loss cancels.

References  Student's t interval of paired differences: Student (1908), Biometrika 6(1)
"""

import json
import math
import statistics
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import NoneType

from configurator import HOUSEKEEPING, fail, pattern, read_defaults

TOKENS = {'byte': 'byte', 'char': 'character', 'gpt2': 'GPT-2'}

SPIKE_LINES = 10
SPIKE = (f'a logged training loss above the highest of the {SPIKE_LINES} logged before it by more than their '
         'spread, the highest minus the lowest')

# reading


@dataclass(eq=False)
class Run:
    """A run as read. `trouble` says why it is in no mean; empty for a finished run."""
    folder: Path                # or its path in W&B
    info: dict
    evals: dict                 # iter -> line with val_loss, nats per token
    logs: dict                  # iter -> line with train_loss, tokens_per_sec ...
    trouble: str = ''

    @property
    def config(self):
        return self.info['config']

    @property
    def loss(self):
        """Validation loss after the last step, nats per token."""
        return self.evals[self.config['max_iters']]['val_loss']

    @cached_property
    def tokens_per_sec(self):
        """Median over the log lines, without the first, which pays for start-up, where there are others."""
        speeds = [line['tokens_per_sec'] for line in self.logs.values() if line.get('tokens_per_sec')]
        return statistics.median(speeds[1:] or speeds) if speeds else None

    @property
    def gap(self):
        """Validation loss minus the loss on fixed windows of train; None where those were not read."""
        train = self.evals[self.config['max_iters']].get('fixed_train_loss')
        return None if train is None else self.loss - train

    @property
    def risen(self):
        """How far the final validation loss lies above the lowest one: what overfitting would raise."""
        return self.loss - min(loss for _, loss in self.val_losses)

    @cached_property
    def val_losses(self):
        """The validation losses that are numbers: [(iter, loss)]."""
        return [(step, line['val_loss']) for step, line in sorted(self.evals.items())
                if line['val_loss'] is not None]

    def series(self, key):
        """A key of the log lines as {iter: value}, where it is a number."""
        return {step: line[key] for step, line in sorted(self.logs.items()) if line.get(key) is not None}

    @cached_property
    def spikes(self):
        """The steps with a loss spike, as SPIKE defines it."""
        losses = list(self.series('train_loss').items())
        spikes = []
        for i in range(SPIKE_LINES, len(losses)):
            before = [loss for _, loss in losses[i - SPIKE_LINES:i]]
            if losses[i][1] > max(before) + (max(before) - min(before)):
                spikes.append(losses[i][0])
        return spikes

    @property
    def skipped(self):
        """Steps without a finite gradient, which updated nothing."""
        return max(self.series('skipped').values(), default=0)

    @cached_property
    def grad_norms(self):
        """The logged gradient norms after warmup, before clipping."""
        return [norm for step, norm in self.series('grad_norm').items()
                if step > self.config.get('warmup_iters', 0)]

    def steps_to(self, level):
        """
        The steps after which the validation loss is first at the level, on straight lines between
        evaluations; None where it never is.
        """
        points = self.val_losses
        for (step, loss), (next_step, next_loss) in zip([points[0], *points], points):
            if next_loss <= level:
                part = (loss - level) / (loss - next_loss) if loss > next_loss else 0
                return step + part * (next_step - step)
        return None


def find_trouble(run):
    """Why a run with a run.json is in no mean; '' for one that is."""
    state, last = run.info['state'], run.config['max_iters']
    if state != 'finished':
        state = 'running, or killed' if state == 'running' else state
        return f'{state}, last seen at step {max([0, *run.evals, *run.logs])} of {last}'
    if last not in run.evals:
        return f'finished, but without an evaluation at step {last}'
    if run.loss is None or not math.isfinite(run.loss):
        return f'diverged: its validation loss is {run.loss}'
    return ''


def read_run(folder):
    """The run in a folder, finished or not."""
    if not (folder / 'run.json').exists():
        return Run(folder, {}, {}, {}, 'ended before it wrote run.json (see its log.txt)')
    run = Run(folder, read_info(folder / 'run.json'), *read_metrics(folder / 'metrics.jsonl'))
    run.trouble = find_trouble(run)
    return run


def read_wandb(project, api):
    """
    The training runs of a W&B project, 'entity/project', with what they logged there. api: a wandb.Api

    A run of another program is given as one with trouble. Raises what the api raises.
    """
    from training.logger import CHARTS, TRACKED
    ours, keys = {chart: key for key, chart in CHARTS.items()}, read_defaults().keys()
    runs = []
    for there in api.runs(project, filters={'jobType': 'train'}, lazy=False):
        told = dict(there.config)
        run = Run(Path(*there.path), {key: told[key] for key in TRACKED & told.keys()}, {}, {})
        run.info.update(
            name=there.name, state=there.state, config={key: told[key] for key in keys & told.keys()},
            all_reduces={way: told.get(f'all_reduces_{way}') for way in ('forward', 'backward')})
        missing = (NEEDED - run.info.keys()) | ({'max_iters', *VARIED} - run.config.keys())
        if missing:
            run.info, run.trouble = {}, f'its config in W&B lacks {", ".join(sorted(missing))}'
        else:
            for logged in there.scan_history():
                line = {ours.get(key, key): value for key, value in logged.items() if value is not None}
                if 'val_tokens' in line:
                    run.evals[line['iter']] = dict(val_loss=None) | line
                elif 'iter' in line:
                    run.logs[line['iter']] = line
            run.trouble = find_trouble(run)
        runs.append(run)
    return runs


# what may be compared with what


def settings(run):
    """The recipe and the corpus of a run, as a dict."""
    corpus = run.info['corpus']
    named = {f'corpus {key}': corpus[key] for key in ('corpus', 'tokenizer', 'val_sha256')}
    return recipe(run.config) | named


def differing(runs):
    """Which settings differ: {key: {value as text: first folder with it}}."""
    seen = {}
    for run in runs:
        for key, value in settings(run).items():
            seen.setdefault(key, {}).setdefault(json.dumps(value), run.folder)
    return {key: values for key, values in seen.items() if len(values) > 1}


def refuse_mixed(runs):
    """Ends the program where corpora, recipes or lengths differ, in one line that says which."""
    told = []
    for key, values in differing(runs).items():
        told.append(f'{key} is ' + ' and '.join(f'{value} in {folder}' for value, folder in values.items()))
    if told:
        fail(f'these runs cannot be compared: {"; ".join(told)}. Name folders that agree, or give --mix')


@dataclass(eq=False)
class Row:
    """The finished runs that differ in nothing but their seed."""
    runs: dict                                      # seed -> Run
    note: str = ''                                  # under --mix: what sets it apart
    control: 'Row' = None                           # the dense control of the same settings
    floor: float = None                             # the rounding floor of its tp_size, nats per token
    level: float = None                             # the loss that convergence is timed to, nats per token
    seconds: float = None                           # predicted of a step over --link

    def __post_init__(self):
        self.first = next(iter(self.runs.values()))
        self.tp_size = self.first.config['tp_size']
        self.dense = self.tp_size == 1
        self.block_types = self.first.config['block_types']
        self.all_tp = not self.dense and set(self.block_types) == {'tp'}       # dense, up to rounding
        self.communications = self.first.info['communications']
        self.all_reduces = self.first.info['all_reduces']
        self.losses = {seed: run.loss for seed, run in self.runs.items()}
        self.loss = statistics.mean(self.losses.values())
        self.name = self.first.info['name'].replace(f'-seed{self.first.config["seed"]}', '')

    @property
    def label(self):
        """A few words for a plot."""
        words = f'{self.communications}: {pattern(self.block_types)}, tp_size {self.tp_size}'
        return ('dense control' if self.dense else words) + self.note

    @property
    def title(self):
        """The same for a sentence."""
        words = 'tp_size 1' if self.dense else f'tp_size {self.tp_size}'
        return f'{"dense control" if self.dense else pattern(self.block_types)} ({words}{self.note})'

    @property
    def variant(self):
        """Which of variants.py's block types it has: mean, attn; '' for none, blocks of model.py alone."""
        prefixes = {name.partition('_')[0] for name in self.block_types}
        return next((kind for kind in ('mean', 'attn') if kind in prefixes), '')

    def values(self, measure):
        """What measure(run) gives, as {seed: value}, for the seeds for which it is not None."""
        values = {seed: measure(run) for seed, run in self.runs.items()}
        return {seed: value for seed, value in values.items() if value is not None}

    def mean(self, measure):
        """The mean of measure(run) over the seeds; None where no run has it."""
        values = self.values(measure).values()
        return statistics.mean(values) if values else None


def group(runs, level=None):
    """
    Finished runs as rows: each dense control, then its configs with most communications first.

    level: the loss that convergence is timed to; None for the highest final loss of the runs that share their
    settings, which all of them reach. Ends the program where one was run twice: averaging would count it
    double, choosing would be a guess.
    """
    rows, mixed = {}, differing(runs)
    for run in sorted(runs, key=lambda run: run.config['seed']):
        own, dense = settings(run), run.config['tp_size'] == 1
        kind = 'dense' if dense else (tuple(run.config['block_types']), run.config['tp_size'])
        note = ''.join(f', {key} {str(own[key])[:24]}' for key in mixed)
        seeds = rows.setdefault((json.dumps(own, sort_keys=True), kind), (note, {}))[1]
        twin = seeds.setdefault(run.config['seed'], run)
        if twin is not run:
            fail(f'{twin.folder} and {run.folder} are one run twice, of seed {run.config["seed"]}: name one')
    rows = {key: Row(by_seed, note) for key, (note, by_seed) in rows.items()}
    highest = {}
    for (own, _), row in rows.items():
        row.control = rows.get((own, 'dense'))
        highest[own] = max(highest.get(own, 0), *row.losses.values())
    for (own, _), row in rows.items():
        row.level = highest[own] if level is None else level
        row.floor = rounding_floor([other for (there, _), other in rows.items()
                                    if there == own and other.tp_size == row.tp_size])
    names = Counter(row.name for row in rows.values())
    for row in rows.values():
        row.name += row.note if names[row.name] > 1 else ''
    # sizes in their order: n_embd 64 before n_embd 128
    return sorted(rows.values(), key=lambda row: (row.first.info['parameters'], row.note, not row.dense,
                                                  -row.communications, row.tp_size, row.variant, row.name))


# the numbers


def t_quantile(df):
    """The 97.5% quantile of Student's t."""
    from scipy.stats import t           # a second to import
    return float(t.ppf(0.975, df))


@dataclass
class Estimate:
    """A mean, half the width of its 95% interval (None where n is 1: one seed has no interval), and n."""
    mean: float
    half: float
    n: int

    def __format__(self, digits):
        """digits: those after the point, '4' where nothing is given"""
        form = f'+.{digits or 4}f'
        if self.half is None:
            return f'{self.mean:{form}} (one seed, no interval)'
        return f'{self.mean:{form}} [{self.low:{form}}, {self.high:{form}}] (n={self.n})'

    def __str__(self):
        return format(self)

    @property
    def low(self):
        return self.mean - self.half

    @property
    def high(self):
        return self.mean + self.half

    @property
    def clear(self):
        """Does the interval exclude 0."""
        return self.half is not None and abs(self.mean) > self.half

    @property
    def p(self):
        """Of the two-sided t-test that the mean is 0; None where n is 1."""
        from scipy.stats import t
        if self.half is None:
            return None
        error = self.half / t_quantile(self.n - 1)
        return 2 * float(t.sf(abs(self.mean) / error, self.n - 1)) if error else float(self.mean == 0)


def estimate(values):
    """Mean and 95% Student-t interval of a list of numbers, None of an empty one."""
    if not values:
        return None
    if len(values) == 1:
        return Estimate(values[0], None, 1)
    half = t_quantile(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return Estimate(statistics.mean(values), half, len(values))


def final_loss(run):
    return run.loss


def paired(row, other, measure=final_loss):
    """row minus other in measure(run), over the seeds that both have; None where they share none."""
    if other is None:
        return None
    own, theirs = row.values(measure), other.values(measure)
    return estimate([own[seed] - theirs[seed] for seed in own if seed in theirs])


def to_dense(row, measure=final_loss):
    """A row's paired difference to its dense control; None for the control itself and where there is none."""
    return None if row.dense else paired(row, row.control, measure)


def rounding_floor(rows):
    """
    The largest |all-tp minus dense| over the seeds: two equal functions, so only rounding sets them apart.

    None where there is no such pair. Not their mean: a difference must beat what rounding did to any seed.
    """
    gaps = [abs(loss - row.control.losses[seed])
            for row in rows if row.all_tp and row.control
            for seed, loss in row.losses.items() if seed in row.control.losses]
    return max(gaps, default=None)


def judge(difference, floor):
    """What may be said of a difference, in a word: real only above the floor, with an interval without 0."""
    if difference is None:
        return 'no pair of runs'
    if floor is not None and abs(difference.mean) <= floor:
        return 'no difference'
    if not difference.clear:
        return 'undecided'
    return ('higher' if difference.mean > 0 else 'lower') + ('' if floor is not None else ', floor unknown')


def verdict(difference, floor):
    """A difference and what may be said of it."""
    return judge(None, floor) if difference is None else f'{difference}: {judge(difference, floor)}'


def subject(runs):
    """Which corpora, lengths and sizes the numbers belong to."""
    def all_of(values):
        return ' / '.join(dict.fromkeys(values))

    corpora = [run.info['corpus'] for run in runs]
    sizes = [run.info['parameters'] / 1e6 for run in runs]
    told = [all_of(f'{corpus["corpus"]}, {TOKENS.get(corpus["tokenizer"], corpus["tokenizer"])} tokens'
                   for corpus in corpora),
            all_of(f'{run.config["max_iters"]:,}' for run in runs) + ' steps',
            all_of(f'{size:.0f}M' if size >= 10 else f'{size:.2f}M' for size in sizes) + ' parameters']
    return ', '.join(told)


def simulated(rows):
    """Was any config's communication simulated, so that no network shows in its tokens/s."""
    return not all(row.first.config.get('shard') for row in rows if not row.dense)
