"""
The runs that train.py left, read from their folders or from W&B, and paired with their dense controls.

A Run is one folder. A Row is the finished runs that differ only in their seed; it knows the dense control of
the same data and recipe. Differences are taken seed by seed and then averaged: a run shares its initial
weights and batches with the control of its seed, so most of what the seed does to a loss cancels.

References  Student's t interval of paired differences: Student (1908), Biometrika 6(1)
"""

import json
import math
import statistics
import warnings
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from configurator import VARIED, complete, fail, pattern, read_defaults, recipe
from training.rundir import read_info, read_metrics

TOKENS = dict(byte='byte', char='character', gpt2='GPT-2')
GUIDE_TYPES = {'tp', 'spd', 'parallel'}  # the guide's block types; any other gets a curve of its own
OTHER_VARIED = sorted(VARIED - {'seed', 'block_types', 'tp_size'})

SPIKE_LINES = 10
SPIKE = (f'a logged training loss above the highest of the {SPIKE_LINES} logged before it by more than their '
         'spread, the highest minus the lowest')

# reading


@dataclass(eq=False)
class Run:
    """One run as read. `trouble` says why it is in no mean; it is empty for a finished run."""
    folder: Path  # or its path in W&B
    info: dict  # run.json's contents, {} if there are none
    evals: dict  # iter -> line with val_loss, nats per token
    logs: dict  # iter -> line with train_loss, tokens_per_sec ...
    trouble: str = ''

    @property
    def config(self):
        return self.info['config']

    @property
    def name(self):
        """Its name without the seed."""
        return self.info['name'].replace(f'-seed{self.config["seed"]}', '')

    @property
    def last(self):
        """The evaluation after the last step."""
        return self.evals[self.config['max_iters']]

    @property
    def loss(self):
        """Validation loss after the last step, nats per token."""
        return self.last['val_loss']

    @cached_property
    def tokens_per_sec(self):
        """Median over the log lines. The first pays for start-up and is left out if there are others."""
        speeds = [line['tokens_per_sec'] for line in self.logs.values() if line.get('tokens_per_sec')]
        return statistics.median(speeds[1:] or speeds) if speeds else None

    @property
    def gap(self):
        """Validation loss minus the loss on fixed windows of train; None if those were not read."""
        train = self.last.get('fixed_train_loss')
        return None if train is None else self.loss - train

    @property
    def rise(self):
        """The last validation loss minus the lowest one: overfitting would raise it."""
        return self.loss - min(loss for _, loss in self.val_losses)

    @cached_property
    def val_losses(self):
        """The validation losses that are numbers: [(iter, loss)]."""
        return [(step, line['val_loss']) for step, line in sorted(self.evals.items())
                if line['val_loss'] is not None]

    def series(self, key):
        """The numbers that the log lines have under a key: {iter: value}."""
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
        """The number of steps without a finite gradient, which updated nothing."""
        return max(self.series('skipped').values(), default=0)

    @cached_property
    def grad_norms(self):
        """The logged gradient norms after warmup, before clipping."""
        return [norm for step, norm in self.series('grad_norm').items() if step > self.config['warmup_iters']]

    def steps_to(self, level):
        """
        The number of steps until the validation loss first reaches the level, on straight lines between
        evaluations; None if it never does.
        """
        points = self.val_losses
        for (step, loss), (next_step, next_loss) in zip([points[0], *points], points):
            if next_loss <= level:
                part = (loss - level) / (loss - next_loss) if loss > next_loss else 0
                return step + part * (next_step - step)
        return None


def find_trouble(info, evals, logs):
    """Why a run with a run.json is in no mean; '' if it is in one."""
    state, last = info['state'], info['config']['max_iters']
    if state != 'finished':
        state = 'running, or killed' if state == 'running' else state
        return f'{state}, last seen at step {max([0, *evals, *logs])} of {last}'
    if last not in evals:
        return f'finished, but without an evaluation at step {last}'
    loss = evals[last]['val_loss']
    return '' if loss is not None and math.isfinite(loss) else f'diverged: its validation loss is {loss}'


def read_run(folder):
    """The run in a folder, finished or not. Ends the program, in one line, if a file of it is damaged."""
    try:
        info = read_info(folder)
    except ValueError as error:
        fail(f'{error}; move the folder away, or train it again')
    if info is None:
        return Run(folder, {}, {}, {}, 'ended before it wrote run.json (see its log.txt)')
    evals, logs = read_metrics(folder)
    return Run(folder, info, evals, logs, find_trouble(info, evals, logs))


def read_wandb(project, api):
    """
    The training runs of a W&B project, 'entity/project', with what they logged there. api: a wandb.Api

    Runs of another program come back with their trouble. Raises what the api raises.
    """
    return [read_wandb_run(run) for run in api.runs(project, filters=dict(jobType='train'), lazy=False)]


def read_wandb_run(wandb_run):
    """A run of W&B's api as a Run."""
    from training.logger import CHARTS, TRACKED  # which takes torch
    folder, found = Path(*wandb_run.path), dict(wandb_run.config)
    reduced = {way: f'all_reduces_{way}' for way in ('forward', 'backward')}
    # keys of the config beside these may be missing: an earlier version had none, and the default is right
    missing = {'communications', 'corpus', 'parameters', *reduced.values(),
               'max_iters', 'seed', 'block_types', 'tp_size'} - found.keys()
    if missing:
        return Run(folder, {}, {}, {}, f'its config in W&B lacks {", ".join(sorted(missing))}')
    config = {key: found[key] for key in read_defaults().keys() & found.keys()}
    info = {key: found[key] for key in TRACKED & found.keys()} | dict(
        name=wandb_run.name, state=wandb_run.state, config=complete(config),
        all_reduces={way: found[key] for way, key in reduced.items()})
    keys, evals, logs = {chart: key for key, chart in CHARTS.items()}, {}, {}
    for logged in wandb_run.scan_history():
        line = {keys.get(key, key): value for key, value in logged.items() if value is not None}
        if 'val_tokens' in line:
            evals[line['iter']] = dict(val_loss=None) | line
        elif 'iter' in line:
            logs[line['iter']] = line
    return Run(folder, info, evals, logs, find_trouble(info, evals, logs))


# what may be compared with what


def settings(run):
    """The recipe and the corpus of a run, as a dict."""
    corpus = run.info['corpus']
    named = {f'corpus {key}': corpus[key] for key in ('corpus', 'tokenizer', 'val_sha256')}
    return recipe(run.config) | named


def differing(runs):
    """The settings in which runs differ: {key: {value as text: first folder with it}}."""
    seen = {}
    for run in runs:
        for key, value in settings(run).items():
            seen.setdefault(key, {}).setdefault(json.dumps(value), run.folder)
    return {key: values for key, values in seen.items() if len(values) > 1}


def refuse_mixed(runs):
    """End the program, in one line that says what differs, if the runs have not one corpus and recipe."""
    differences = [f'{key} is ' + ' and '.join(f'{value} in {folder}' for value, folder in values.items())
                   for key, values in differing(runs).items()]
    if differences:
        fail(f'these runs cannot be compared: {"; ".join(differences)}. '
             'Name folders that agree, or give --mix')


def variation(run):
    """What sets a run apart besides seed, blocks and tp_size: the other varied keys, if not the default."""
    config, defaults = run.config, read_defaults()
    return {key: config[key] for key in OTHER_VARIED
            if config[key] != defaults[key][0] and not (key == 'merge' and config['tp_size'] == 1)}


def is_dense(run):
    """Whether a run is a dense control, whose block types and merge do not matter."""
    return run.config['tp_size'] == 1 and not variation(run)


def is_all_tp(run):
    """Whether a run is tensor-parallel and syncs wherever Megatron does: equal to dense, up to rounding."""
    config = run.config
    return config['tp_size'] > 1 and set(config['block_types']) == {'tp'} and not variation(run)


@dataclass(eq=False)
class Row:
    """The finished runs that differ only in their seed."""
    runs: dict  # seed -> Run
    name: str
    level: float  # the loss that convergence is timed to, nats per token
    note: str = ''  # under --mix: what sets it apart
    control: 'Row | None' = None  # the dense control of the same settings; a control has none
    floor: float | None = None  # the rounding floor of its tp_size, nats per token
    seconds: float | None = None  # predicted for a step over --link

    def __post_init__(self):
        self.first = next(iter(self.runs.values()))
        self.tp_size, self.block_types = self.first.config['tp_size'], self.first.config['block_types']
        self.variation = variation(self.first)
        self.dense, self.all_tp = is_dense(self.first), is_all_tp(self.first)
        self.communications = self.first.info['communications']
        self.all_reduces = self.first.info['all_reduces']
        self.losses = {seed: run.loss for seed, run in self.runs.items()}
        self.loss = statistics.mean(self.losses.values())

    @property
    def other_types(self):
        """Its block types that are none of the guide's, sorted."""
        return tuple(sorted(set(self.block_types) - GUIDE_TYPES))

    @property
    def plain(self):
        """Whether it is made of the guide's blocks and has no variation."""
        return not self.variation and not self.other_types

    @property
    def varied(self):
        """Its variation in words, ', merge mean'; '' if it has none."""
        return ''.join(f', {key} {value}' for key, value in self.variation.items())

    @property
    def blocks(self):
        """Its blocks and variation in short form."""
        return 'dense' if self.dense else pattern(self.block_types) + self.varied

    @property
    def label(self):
        """A few words for a plot."""
        words = f'{self.communications}: {pattern(self.block_types)}, tp_size {self.tp_size}{self.varied}'
        return ('dense control' if self.dense else words) + self.note

    @property
    def title(self):
        """The same for a sentence."""
        words = 'dense control' if self.dense else pattern(self.block_types)
        return f'{words} (tp_size {self.tp_size}{self.varied}{self.note})'

    def values(self, measure):
        """measure(run) by seed, without the seeds for which it is None."""
        values = {seed: measure(run) for seed, run in self.runs.items()}
        return {seed: value for seed, value in values.items() if value is not None}

    def mean(self, measure):
        """The mean of measure(run) over the seeds; None if no run has it."""
        values = self.values(measure).values()
        return statistics.mean(values) if values else None


def group(runs, level=None, predict=None):
    """
    Finished runs as rows: each dense control, then its configs with most communications first.

    level: the loss that convergence is timed to; None for the highest final loss of the runs that share their
    settings, which all of them reach. predict: a function of a run that returns the predicted seconds of its
    step, or None. Ends the program if a run is there twice: an average would count it double, and a choice
    would be a guess.
    """
    mixed, recipes = differing(runs), {}
    for run in sorted(runs, key=lambda run: run.config['seed']):
        kinds = recipes.setdefault(json.dumps(settings(run), sort_keys=True), {})
        config = run.config['tp_size'], run.config['block_types'], variation(run)
        seeds = kinds.setdefault('dense' if is_dense(run) else json.dumps(config), {})
        twin = seeds.setdefault(run.config['seed'], run)
        if twin is not run:
            fail(f'{twin.folder} and {run.folder} are one run twice, of seed {run.config["seed"]}: name one')
    names = Counter(next(iter(seeds.values())).name for kinds in recipes.values() for seeds in kinds.values())
    rows = [row for kinds in recipes.values() for row in make_rows(kinds, level, predict, mixed, names)]
    # sizes in their order: n_embd 64 before n_embd 128
    return sorted(rows, key=lambda row: (row.first.info['parameters'], row.note, not row.dense,
                                         -row.communications, row.tp_size, row.varied, row.other_types,
                                         row.name))


def make_rows(kinds, level, predict, mixed, names):
    """
    The rows of the runs that share their settings. level, predict: as in group()

    kinds: {'dense' or a config: {seed: run}}. mixed: the settings that differ between recipes, for the notes.
    names: how many rows have a name; a name that is not unique gets the note.
    """
    dense = kinds.get('dense', {})
    if level is None:
        level = max(run.loss for seeds in kinds.values() for run in seeds.values())
    floors = {}
    for seeds in kinds.values():
        first = next(iter(seeds.values()))
        if is_all_tp(first):
            floors[first.config['tp_size']] = rounding_floor(seeds, dense)
    rows = []
    for kind in sorted(kinds, key=lambda kind: kind != 'dense'):  # the control first: the others refer to it
        first = next(iter(kinds[kind].values()))
        note = ''.join(f', {key} {str(settings(first)[key])[:24]}' for key in mixed)
        rows.append(Row(
            kinds[kind], name=first.name + note * (names[first.name] > 1), level=level, note=note,
            control=rows[0] if rows and dense else None, floor=floors.get(first.config['tp_size']),
            seconds=predict(first) if predict else None))
    return rows


# the numbers


def t_quantile(df):
    """The 97.5% quantile of Student's t with df degrees of freedom."""
    from scipy.stats import t  # takes most of a second to import, which --help need not wait for
    return float(t.ppf(0.975, df))


def t_test(values):
    """scipy's two-sided t-test that the mean of the values is 0."""
    from scipy.stats import ttest_1samp
    with warnings.catch_warnings():  # of equal values, such as the differences of equal networks
        warnings.simplefilter('ignore', RuntimeWarning)
        return ttest_1samp(values, 0)


@dataclass
class Estimate:
    """A mean, half the width of its 95% interval (None for n = 1, which has no interval), and n."""
    mean: float
    half: float | None
    n: int

    def __format__(self, digits):
        """digits: after the point, 4 by default"""
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
        """Whether there is an interval, and it excludes 0."""
        return self.half is not None and abs(self.mean) > self.half


def estimate(values):
    """Mean and 95% Student-t interval of a list of numbers; None for an empty one."""
    if not values:
        return None
    mean = statistics.mean(values)  # exact: the mean of equal values is that value, at a rounding floor too
    if len(values) == 1:
        return Estimate(mean, None, 1)
    interval = t_test(values).confidence_interval(0.95)
    return Estimate(mean, float(interval.high - interval.low) / 2, len(values))


def final_loss(run):
    return run.loss


def paired(row, other, measure=final_loss):
    """row minus other in measure(run), over the seeds that both have; None if they share none."""
    if other is None:
        return None
    own, theirs = row.values(measure), other.values(measure)
    return estimate([own[seed] - theirs[seed] for seed in own if seed in theirs])


def to_dense(row, measure=final_loss):
    """A row's paired difference to its dense control; None for the control itself and without one."""
    return None if row.dense else paired(row, row.control, measure)


def rounding_floor(all_tp, dense):
    """
    The largest |all-tp minus dense| over the seeds, given as {seed: run}; None if they share no seed.

    The two networks are equal functions, so only rounding sets them apart. The largest, not the mean: a
    difference must exceed what rounding did to any seed.
    """
    gaps = [abs(run.loss - dense[seed].loss) for seed, run in all_tp.items() if seed in dense]
    return max(gaps, default=None)


def judge(difference, floor):
    """The verdict on a difference: real only above the floor, and if its interval excludes 0."""
    if difference is None:
        return 'no pair of runs'
    if floor is not None and abs(difference.mean) <= floor:
        return 'no difference'
    if not difference.clear:
        return 'undecided'
    return ('higher' if difference.mean > 0 else 'lower') + ('' if floor is not None else ', floor unknown')


def verdict(difference, floor):
    """A difference and the verdict on it."""
    return judge(None, floor) if difference is None else f'{difference}: {judge(difference, floor)}'


def subject(runs):
    """The corpora, lengths and sizes to which the numbers belong, in words."""
    def distinct(values):
        return ' / '.join(dict.fromkeys(values))

    corpora = [run.info['corpus'] for run in runs]
    sizes = [run.info['parameters'] / 1e6 for run in runs]
    return ', '.join([
        distinct(f'{corpus["corpus"]}, {TOKENS.get(corpus["tokenizer"], corpus["tokenizer"])} tokens'
                 for corpus in corpora),
        distinct(f'{run.config["max_iters"]:,}' for run in runs) + ' steps',
        distinct(f'{size:.0f}M' if size >= 10 else f'{size:.2f}M' for size in sizes) + ' parameters'])


def simulated(rows):
    """Whether any config's communication was simulated, so that its tokens/s show no network."""
    return not all(row.first.config['shard'] for row in rows if not row.dense)
