"""
The runs that train.py left, read from their folders or from W&B, and paired with their dense controls.

A Run is one folder. A Row is the finished runs that differ only in their seed; it knows the dense control of
the same data and recipe. Differences are taken seed by seed and then averaged: a run shares its initial
weights and batches with the control of its seed, so most of what the seed does to a loss cancels. With a
tuned key (tuning.py), a row has the runs at its config's best value of that key. Runs may also be read as
they were at a step (up_to): nothing after it counts.

References  Student's t interval of paired differences: Student (1908), Biometrika 6(1)
"""

import json
import math
import statistics
from collections import Counter
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from scipy.stats import t

from analysis.tuning import Tuning, without_tuned
from analysis.verdicts import Spread, Verdict, paired_t
from configurator import VARIED, complete, fail, pattern, read_defaults, recipe, stages
from training.rundir import read_info, read_metrics

TOKENS = dict(byte='byte', char='character', gpt2='GPT-2')
GUIDE_TYPES = {'tp', 'spd', 'parallel'}  # the guide's block types; any other gets a curve of its own
# those whose every all-reduce is of the whole stream, and waited for
WHOLE_TYPES = GUIDE_TYPES | {'attn_spd', 'palm'}
ITEM_BYTES = dict(float32=4, bfloat16=2, float16=2)
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
    at: int | None = None  # the step at which it is read, see up_to(); None: at its end

    @property
    def config(self):
        return self.info['config']

    @property
    def diverged(self):
        return self.trouble.startswith('diverged')

    @property
    def name(self):
        """Its name without the seed."""
        return self.info['name'].replace(f'-seed{self.config["seed"]}', '')

    @property
    def last(self):
        """The evaluation after the last step, or at the step at which it is read."""
        return self.evals[self.config['max_iters'] if self.at is None else self.at]

    @property
    def loss(self):
        """Validation loss there, nats per token."""
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

    def gap_at(self, level):
        """
        The level minus the loss on fixed windows of train where the validation loss first reaches it, on
        straight lines between evaluations; None if it never does, or those windows were not read.
        """
        step = self.steps_to(level)
        points = [(at, line['fixed_train_loss']) for at, line in sorted(self.evals.items())
                  if line.get('fixed_train_loss') is not None]
        if step is None or not points or not points[0][0] <= step <= points[-1][0]:
            return None
        steps, losses = zip(*points)
        return level - float(np.interp(step, steps, losses))


def find_trouble(info, evals, logs):
    """Why a run with a run.json is in no mean; '' if it is in one."""
    state, last = info['state'], info['config']['max_iters']
    if state == 'diverged':
        return f'diverged at step {max([0, *evals, *logs])} of {last}'
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
    from training.logger import TRACKED, from_charts  # which takes torch
    folder, found = Path(*wandb_run.path), dict(wandb_run.config)
    reduced = {way: f'all_reduces_{way}' for way in ('forward', 'backward')}
    newer = {way: f'all_reduces_{way}' for way in ('blocking', 'hidden', 'bytes_per_token')}
    # keys of the config beside these may be missing: an earlier version had none, and the default is right
    missing = {'communications', 'corpus', 'parameters', *reduced.values(),
               'max_iters', 'seed', 'block_types', 'tp_size'} - found.keys()
    if missing:
        return Run(folder, {}, {}, {}, f'its config in W&B lacks {", ".join(sorted(missing))}')
    config = {key: found[key] for key in read_defaults().keys() & found.keys()}
    info = {key: found[key] for key in TRACKED & found.keys()} | dict(
        name=wandb_run.name, state=wandb_run.state, config=complete(config),
        all_reduces={way: found[key] for way, key in (reduced | newer).items() if key in found})
    evals, logs = {}, {}
    for logged in wandb_run.scan_history():
        line = {key: value for key, value in from_charts(logged).items() if value is not None}
        if 'val_tokens' in line:
            evals[line['iter']] = dict(val_loss=None) | line
        elif 'iter' in line:
            logs[line['iter']] = line
    return Run(folder, info, evals, logs, find_trouble(info, evals, logs))


# runs as they were at a step


def last_common_step(runs):
    """The last step after 0 that every run beyond step 0 was evaluated at; None if there is none."""
    steps = [set(run.evals) - {0} for run in runs if run.evals.keys() - {0}]
    return max(set.intersection(*steps), default=None) if steps else None


def up_to(run, step):
    """A run as it was at a step, without what came later; with its trouble if it was not evaluated there."""
    if not run.info:
        return run
    loss = run.evals.get(step, {}).get('val_loss')
    trouble = ''
    seen = max([0, *run.evals, *run.logs])
    if run.info['state'] == 'diverged' and seen < step:
        trouble = f'diverged at step {seen}, before step {step}'
    elif step not in run.evals:
        trouble = f'no evaluation at step {step}; {run.info["state"]}, last seen at step {seen}'
    elif loss is None or not math.isfinite(loss):
        trouble = f'diverged: its validation loss is {loss} at step {step}'
    evals, logs = ({at: line for at, line in lines.items() if at <= step} for lines in (run.evals, run.logs))
    ended = step == run.config['max_iters']
    return replace(run, evals=evals, logs=logs, trouble=trouble, at=None if ended else step)


# what may be compared with what


def settings(run, tuned=None):
    """The recipe and the corpus of a run, as a dict, without what --tuned varies."""
    corpus = run.info['corpus']
    named = {f'corpus {key}': corpus[key] for key in ('corpus', 'tokenizer', 'val_sha256')}
    return without_tuned(recipe(run.config), tuned) | named


def settings_key(run, tuned=None):
    """The same as text: runs that share it share a control."""
    return json.dumps(settings(run, tuned), sort_keys=True)


def differing(runs, tuned):
    """The settings in which runs differ: {key: {value as text: first folder with it}}."""
    seen = {}
    for run in runs:
        for key, value in settings(run, tuned).items():
            seen.setdefault(key, {}).setdefault(json.dumps(value), run.folder)
    return {key: values for key, values in seen.items() if len(values) > 1}


def mixed_recipes(runs, tuned=None):
    """What differs between the recipes and corpora of the runs, as lines; none if they have one."""
    found = differing(runs, tuned)
    differences = [f'{key} is ' + ' and '.join(f'{value} in {folder}' for value, folder in values.items())
                   for key, values in found.items()]
    if not differences:
        return []
    hint = '; --tuned=learning_rate takes each config at its best' * ('learning_rate' in found)
    return [f'several recipes, each with its own control; no run is compared with one of another: '
            f'{"; ".join(differences)}{hint}']


def variation(run):
    """What sets a run apart besides seed, blocks and tp_size: the other varied keys, if not the default."""
    config, defaults = run.config, read_defaults()
    return {key: config[key] for key in OTHER_VARIED
            if config[key] != defaults[key][0] and not (key == 'merge' and config['tp_size'] == 1)}


def is_plain(run):
    """Whether a run's net is made of the guide's blocks, all through training, and has no variation."""
    types = {name for _, block_types in stages(run.config) for name in block_types}
    return types <= GUIDE_TYPES and not variation(run)


def all_layers_tp(run):
    return set(run.config['block_types']) == {'tp'} and not variation(run)


def is_dense(run):
    """Whether a run is a dense control: one rank, every layer tp, nothing varied."""
    return run.config['tp_size'] == 1 and all_layers_tp(run)


def is_twin(run):
    """Whether a run is a dense control with perturbed initial weights, for the noise floor."""
    one_rank = run.config['tp_size'] == 1 and set(run.config['block_types']) == {'tp'}
    return one_rank and variation(run).keys() == {'perturb'}


def is_all_tp(run):
    """Whether a run is tensor-parallel and syncs wherever Megatron does: equal to dense, up to rounding."""
    return run.config['tp_size'] > 1 and all_layers_tp(run)


def as_all_tp(run):
    """A Run of nothing but run.json: the same with all layers tp, and nothing varied."""
    layers, defaults = len(run.config['block_types']), read_defaults()
    plain = {key: defaults[key][0] for key in OTHER_VARIED} | dict(block_types=['tp'] * layers)
    return Run(run.folder, run.info | dict(config=run.config | plain, communications=2 * layers), {}, {})


@dataclass(eq=False)
class Row:
    """The finished runs that differ only in their seed."""
    runs: dict  # seed -> Run
    name: str
    level: float  # the loss that convergence is timed to, nats per token
    settings: dict  # of all its runs
    note: str = ''  # what sets its recipe apart, if there are several
    control: 'Row | None' = None  # the dense control of the same settings; a control has none
    seconds: float | None = None  # predicted for a step over --link
    tp_seconds: float | None = None  # the same with all layers tp
    tuning: Tuning | None = None  # under --tuned
    preliminary: bool = False  # its runs are those that chose the best value
    diverged: list = field(default_factory=list)  # the seeds on which it did, at its best value
    lost: list = field(default_factory=list)  # of a control: diverged runs of configs without a row
    # set by families.judge_rows
    margin: float | None = None  # nats per token
    spread: Spread | None = None  # of its recipe
    verdict: Verdict | None = None  # against its control
    planned: bool = False  # whether the plan names it

    def __post_init__(self):
        self.first = next(iter(self.runs.values()))
        self.tp_size, self.block_types = self.first.config['tp_size'], self.first.config['block_types']
        self.types = {name for _, block_types in stages(self.first.config) for name in block_types}
        self.variation = variation(self.first)
        self.dense, self.all_tp = is_dense(self.first), is_all_tp(self.first)
        self.communications = self.first.info['communications']
        self.all_reduces = self.first.info['all_reduces']
        self.losses = {seed: run.loss for seed, run in self.runs.items()}
        self.loss = statistics.mean(self.losses.values())
        self.called = ''  # what --labels calls it in plots

    @property
    def word(self):
        """Its verdict as a word; '' if there is none."""
        return self.verdict.word or '' if self.verdict else ''

    @property
    def other_types(self):
        """Its block types that are none of the guide's, sorted."""
        return tuple(sorted(self.types - GUIDE_TYPES))

    @property
    def plain(self):
        """Whether it is made of the guide's blocks and has no variation."""
        return is_plain(self.first)

    @property
    def varied(self):
        """Its variation in words, ', merge mean'; '' if it has none."""
        return ''.join(f', {key} {value:.4g}' if isinstance(value, float) else f', {key} {value}'
                       for key, value in self.variation.items())

    @property
    def blocks(self):
        """Its blocks and variation in short form."""
        return 'dense' if self.dense else self.twin or pattern(self.block_types) + self.varied

    @property
    def twin(self):
        """What to call it if it is a dense control with perturbed initial weights; '' if it is not."""
        return f'dense, weights perturbed by {self.variation["perturb"]:g}' if is_twin(self.first) else ''

    @property
    def whole(self):
        """Whether each of its all-reduces is of the whole stream, and waited for by the next sublayer."""
        return self.types <= WHOLE_TYPES

    @property
    def blocking(self):
        """The all-reduces of a forward pass that the next sublayer waits for; None if that was not noted."""
        return self.all_reduces.get('blocking', self.all_reduces['forward'] if self.whole else None)

    @property
    def hidden(self):
        """The other ones, which a sublayer's compute can hide; None if that was not noted."""
        return self.all_reduces.get('hidden', 0 if self.whole else None)

    @property
    def step_bytes(self):
        """
        Of the residual stream's all-reduces in a step, forward and backward, of all its tokens, each message
        counted once; None if an earlier version did not note it.
        """
        config, size = self.first.config, self.all_reduces.get('bytes_per_token')
        if size is None and self.whole:
            both = self.all_reduces['forward'] + self.all_reduces['backward']
            size = both * config['n_embd'] * ITEM_BYTES[config['dtype']]
        tokens = config['batch_size'] * config['gradient_accumulation_steps'] * config['block_size']
        return None if size is None else size * tokens

    @property
    def counted(self):
        """
        What it communicates, for a plot or a list: the guide's count, or what was observed if that does not
        fit, as with hidden all-reduces or those of a share of the channels.
        """
        if self.whole:
            return str(self.communications)
        hidden = f', {self.hidden} hidden' if self.hidden else ''
        size = '' if self.step_bytes is None else f', {self.step_bytes / 1e6:.4g} MB'
        return f'{self.all_reduces["forward"]} all-reduces{hidden}{size}'

    @property
    def label(self):
        """A few words for a plot."""
        words = f'{self.counted}: {pattern(self.block_types)}, tp_size {self.tp_size}{self.varied}'
        return self.called or ('dense control' if self.dense else self.twin or words) + self.note

    @property
    def title(self):
        """The same for a sentence."""
        if self.dense or self.twin:
            return ('dense control' if self.dense else self.twin) + self.note
        return f'{pattern(self.block_types)} (tp_size {self.tp_size}{self.varied}{self.note})'

    def values(self, measure):
        """measure(run) by seed, without the seeds for which it is None."""
        values = {seed: measure(run) for seed, run in self.runs.items()}
        return {seed: value for seed, value in values.items() if value is not None}

    def mean(self, measure):
        """The mean of measure(run) over the seeds; None if no run has it."""
        values = self.values(measure).values()
        return statistics.mean(values) if values else None


def by_note(rows):
    """The rows of each recipe: {note: rows}."""
    recipes = {}
    for row in rows:
        recipes.setdefault(row.note, []).append(row)
    return recipes


def group(runs, level=None, predict=None, tuned=None, diverged=()):
    """
    Finished runs as rows: each dense control, then its configs with most communications first.

    level: the loss that convergence is timed to; None for the highest final loss of the runs that share their
    settings, which all of them reach. predict: a function of a run that returns the predicted seconds of its
    step, or None. tuned: a Tuned, or None. diverged: runs that did, which bound its grids and let no config
    pass. Ends the program if a run is there twice: an average would count it double, and a choice would be a
    guess.
    """
    mixed, recipes = differing(runs, tuned), {}
    names = Counter()
    for run in sorted(runs, key=lambda run: run.config['seed']):
        kinds = recipes.setdefault(settings_key(run, tuned), {})
        values = kinds.setdefault(kind_of(run), {})
        seeds = values.setdefault(tuned and run.config[tuned.key], {})
        twin = seeds.setdefault(run.config['seed'], run)
        if twin is not run:
            fail(f'{twin.folder} and {run.folder} are one run twice, of seed {run.config["seed"]}: name one')
    for kinds in recipes.values():
        names.update(first_run(values).name for values in kinds.values())
    rows, notes = [], notes_of(recipes, mixed)
    for key, kinds in recipes.items():
        lost = [run for run in diverged if settings_key(run, tuned) == key]
        grids = {kind: Tuning(tuned, values, {run.config[tuned.key] for run in lost if kind_of(run) == kind})
                 for kind, values in kinds.items()} if tuned else {}
        for kind, grid in grids.items():
            if is_twin(first_run(kinds[kind])):
                grid.follow(grids.get('dense'))
        rows += make_rows(kinds, grids, lost, level, predict, notes[key], names)
    # sizes in their order: n_embd 64 before n_embd 128
    return sorted(rows, key=lambda row: (row.first.info['parameters'], row.first.config['max_iters'],
                                         row.note, not row.dense, -row.communications, row.tp_size,
                                         row.varied, row.other_types, row.name))


def notes_of(recipes, mixed):
    """{settings as text: what sets this recipe apart, the settings that differ}, cut short if that tells."""
    texts = {key: [(name, str(json.loads(key)[name])) for name in mixed] for key in recipes}
    for most in 24, None:
        notes = {key: ''.join(f', {name} {text[:most]}' for name, text in own) for key, own in texts.items()}
        if len(set(notes.values())) == len(notes):
            break
    return notes


def first_run(values):
    """One run of a config, {value of the tuned key: {seed: Run}}."""
    return next(iter(next(iter(values.values())).values()))


def kind_of(run):
    """What makes two runs of one recipe one config, as text."""
    config = run.config
    return 'dense' if is_dense(run) else json.dumps(
        [config['tp_size'], config['block_types'], variation(run)])


def choose_runs(kinds, grids):
    """
    ({kind: {seed: run}}, whether they are preliminary) at each config's best value, of the answer's seeds.

    Until dense and another config have finished one of these, they are the tuning seeds' runs, and
    preliminary. Without grids they are all runs.
    """
    if not grids:
        return {kind: values[None] for kind, values in kinds.items()}, False
    chosen = {kind: grid.chosen(for_answer=True) for kind, grid in grids.items()}
    preliminary = not chosen.get('dense') or sum(
        bool(chosen[kind]) for kind, grid in grids.items() if not grid.twin) < 2
    if preliminary:
        chosen = {kind: grid.chosen(for_answer=False) or chosen[kind] for kind, grid in grids.items()}
    return {kind: seeds for kind, seeds in chosen.items() if seeds}, preliminary


def make_rows(kinds, grids, lost, level, predict, note, names):
    """
    The rows of the runs that share their settings. level, predict: as in group()

    kinds: {'dense' or a config: {value of the tuned key, or None: {seed: run}}}. grids: {the same: Tuning}.
    lost: the runs of these settings that diverged. note: what sets the recipe apart. names: how many configs
    have a name; one that is not unique gets the note.
    """
    chosen, preliminary = choose_runs(kinds, grids)
    lost = [run for run in lost if kind_of(run) not in grids or grids[kind_of(run)].judges(run)]
    if level is None:
        level = max((run.loss for seeds in chosen.values() for run in seeds.values()), default=None)
    predict = predict or (lambda run: None)
    rows, tp_seconds = [], {1: None}
    for kind in sorted(chosen, key=lambda kind: kind != 'dense'):  # the control first: others refer to it
        first = next(iter(chosen[kind].values()))
        tp_size = first.config['tp_size']
        if tp_size not in tp_seconds:
            tp_seconds[tp_size] = predict(as_all_tp(first))
        grid = grids.get(kind)
        rows.append(Row(
            chosen[kind], name=first.name + note * (names[first.name] > 1), level=level,
            settings=settings(first, grid and grid.tuned), note=note,
            control=rows[0] if rows and 'dense' in chosen else None,
            seconds=predict(first), tp_seconds=tp_seconds[tp_size], tuning=grid, preliminary=preliminary,
            diverged=[run.config['seed'] for run in lost if kind_of(run) == kind]))
    if rows and rows[0].dense:
        rows[0].lost = [run for run in lost if kind_of(run) not in chosen]
    return rows


# the numbers


@dataclass
class Estimate:
    """A mean, half the width of its 95% interval (None if there is none), and n."""
    mean: float
    half: float | None
    n: int

    def __format__(self, digits):
        """digits: after the point, 4 by default"""
        form = f'+.{digits or 4}f'
        if self.half is None:
            return f'{self.mean:{form}} ({f"n={self.n}" if self.n > 1 else "one seed, no interval"})'
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
    mean = statistics.mean(values)  # exact: the mean of equal values is that value
    interval = paired_t(values)
    return Estimate(mean, (interval[1] - interval[0]) / 2 if interval else None, len(values))


def by_spread(values, spread):
    """
    Mean and 95% interval of paired differences of final losses, from the spread of their family; None for an
    empty list. Without a spread, or if all are 0 to the last bit, there is no interval.
    """
    if not values:
        return None
    n = len(values)
    half = None if spread is None else t.isf(0.025, spread.df) * spread.error(n)
    return Estimate(math.fsum(values) / n, float(half) if half is not None and any(values) else None, n)


def final_loss(run):
    return run.loss


def paired(row, other, measure=final_loss):
    """row minus other in measure(run), over the seeds that both have; None if they share none."""
    own, theirs = row.values(measure), other.values(measure) if other else {}
    values = [own[seed] - theirs[seed] for seed in own if seed in theirs]
    return by_spread(values, row.spread) if measure is final_loss else estimate(values)


def to_dense(row, measure=final_loss):
    """A row's paired difference to its dense control; None for the control itself and without one."""
    return None if row.dense else paired(row, row.control, measure)


def subject(runs):
    """The corpora, lengths and sizes to which the numbers belong, in words."""
    def distinct(values):
        return ' / '.join(dict.fromkeys(values))

    corpora = [run.info['corpus'] for run in runs]
    sizes = [run.info['parameters'] / 1e6 for run in runs]
    return ', '.join([
        distinct(f'{corpus["corpus"]}, {TOKENS.get(corpus["tokenizer"], corpus["tokenizer"])} tokens'
                 for corpus in corpora),
        distinct(('' if run.at is None else f'step {run.at:,} of ') + f'{run.config["max_iters"]:,}'
                 for run in runs) + ' steps',
        distinct(f'{size:.0f}M' if size >= 10 else f'{size:.2f}M' for size in sizes) + ' parameters'])


def simulated(rows):
    """Whether any config's communication was simulated, so that its tokens/s show no network."""
    return not all(row.first.config['shard'] for row in rows if not row.dense)
