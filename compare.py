"""
Compare runs: validation loss against communications, from the files that train.py wrote.

    python compare.py                                    # every run folder under out/
    python compare.py out/*-cpu-seed* --out=results      # these, and the answer somewhere else

It reads each folder's run.json and metrics.jsonl, prints a table and answers to the guide's questions, and
writes table.md, table.csv and three plots to --out. A run is paired with the dense control of the same seed,
data and recipe; that difference is what counts. Runs that did not finish are named and are in no mean.

References  Student's t interval of paired differences: Student (1908), Biometrika 6(1)
"""

import argparse
import csv
import json
import math
import shlex
import statistics
import sys
from collections import Counter
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from configurator import HOUSEKEEPING, fail, pattern

VARIED = {'seed', 'block_types', 'tp_size'}     # what the experiment varies; the rest is the recipe

# the guide's thresholds hold for one model, length and tokenizer
GUIDE_STEPS, GUIDE_PARAMETERS, GUIDE_DATASETS = 20_000, 124_373_760, ('openwebtext', 'fineweb')
GUIDE_SCOPE = '124M parameters on GPT-2 tokens of OpenWebText or FineWeb after 20k steps'
GOALS = (('Key question 1: below 3.35 with 12 communications?', 12, 3.35),
         ('Key question 2: below 3.40 with 6 communications?', 6, 3.40),
         ('Minimum goal: below 3.40 with 12 communications?', 12, 3.40),
         ('Stretch goal: below 3.35 with 8 communications?', 8, 3.35),
         ('Dream goal: below 3.30 with 6 communications?', 6, 3.30))
NEEDED = {'name', 'state', 'config', 'corpus', 'communications', 'all_reduces', 'parameters'}  # of a run.json
UNANSWERED = 'Not answerable from these runs'
CLIFF = 3           # a step this many times as steep as the next steepest is called a cliff

TOKENS = {'byte': 'byte', 'char': 'character', 'gpt2': 'GPT-2'}

# reading


def read_metrics(path):
    """
    The two kinds of lines of a metrics.jsonl, as {iter: line}: evaluations, log lines.

    A run that was killed may leave half a line at the end, which is dropped. Any other broken line ends the
    program.
    """
    evals, logs = {}, {}
    lines = path.read_bytes().split(b'\n') if path.exists() else []
    for number, text in enumerate(lines, 1):
        if not text.strip():
            continue
        try:
            line = json.loads(text)
            (evals if 'val_loss' in line else logs)[line['iter']] = line
        except (ValueError, KeyError, TypeError):
            if number < len(lines):     # the last has no newline after it: it was being written
                fail(f'{path} line {number} is broken: {text[:60].decode(errors="replace")}')
    return evals, logs


def read_info(path):
    """A run.json as a dict. Ends the program where it lacks what a comparison needs."""
    try:
        info = json.loads(path.read_bytes())
        missing = NEEDED - info.keys()
    except (ValueError, AttributeError):
        fail(f'{path} is not JSON as train.py writes it: move the folder away, or train it again')
    if missing:
        fail(f'{path} lacks {", ".join(sorted(missing))}: it was not written by this train.py')
    return info


@dataclass
class Run:
    """A run's folder as read. `trouble` says why it is in no mean; empty for a finished run."""
    folder: Path
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

    @property
    def tokens_per_sec(self):
        """Median over the log lines, without the first, which pays for start-up, where there are others."""
        speeds = [line['tokens_per_sec'] for line in self.logs.values() if line.get('tokens_per_sec')]
        return statistics.median(speeds[1:] or speeds) if speeds else math.nan


def read_run(folder):
    """The run in a folder, finished or not."""
    if not (folder / 'run.json').exists():
        return Run(folder, {}, {}, {}, 'ended before it wrote run.json (see its log.txt)')
    run = Run(folder, read_info(folder / 'run.json'), *read_metrics(folder / 'metrics.jsonl'))
    state, last = run.info['state'], run.config['max_iters']
    if state != 'finished':
        state = 'running, or killed' if state == 'running' else state
        run.trouble = f'{state}, last seen at step {max([0, *run.evals, *run.logs])} of {last}'
    elif last not in run.evals:
        run.trouble = f'finished, but without an evaluation at step {last}'
    elif run.loss is None or not math.isfinite(run.loss):
        run.trouble = f'diverged: its validation loss is {run.loss}'
    return run


def find_runs(paths):
    """The run folders among the paths, or right under them, and the paths that hold none."""
    def is_run(folder):
        return any((folder / name).exists() for name in ('run.json', 'metrics.jsonl', 'log.txt'))

    found, empty = [], []
    for path in paths:
        if not path.exists():
            fail(f'{path} does not exist: name run folders, or folders that hold them')
        inside = [path] if is_run(path) else sorted(p for p in path.glob('*') if is_run(p))
        found += [folder for folder in inside if folder not in found]
        empty += [] if inside else [path]
    return found, empty


# what may be compared with what


def recipe(config):
    """What two runs must share of their configs before their losses may be compared, as a dict."""
    shared = {key: value for key, value in config.items() if key not in VARIED | HOUSEKEEPING}
    # 12 x 40 and 8 x 60 are the same step
    shared['windows per step'] = shared.pop('batch_size') * shared.pop('gradient_accumulation_steps')
    return shared


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
    control: 'Row' = None                           # the dense control of the same settings
    note: str = ''                                  # under --mix: what sets it apart
    floor: float = None                             # the rounding floor of its tp_size, nats per token

    def __post_init__(self):
        self.first = next(iter(self.runs.values()))
        self.tp_size = self.first.config['tp_size']
        self.dense = self.tp_size == 1
        self.block_types = self.first.config['block_types']
        self.communications = self.first.info['communications']
        self.all_reduces = self.first.info['all_reduces']
        self.losses = {seed: run.loss for seed, run in self.runs.items()}
        self.loss = statistics.mean(self.losses.values())
        self.tokens_per_sec = statistics.mean(run.tokens_per_sec for run in self.runs.values())

    @property
    def name(self):
        seed = self.first.config['seed']
        return self.first.info['name'].replace(f'-seed{seed}', '') + self.note

    @property
    def label(self):
        """A few words for a plot."""
        words = f'{self.communications}: {pattern(self.block_types)}, tp_size {self.tp_size}'
        return ('dense control' if self.dense else words) + self.note

    @property
    def title(self):
        """A few more, for a sentence."""
        return f'{pattern(self.block_types)} (tp_size {self.tp_size}{self.note})'


def group(runs):
    """
    Finished runs as rows: each dense control, then its configs with most communications first.

    Ends the program where one was run twice: averaging would count it double, choosing would be a guess.
    """
    rows, mixed = {}, differing(runs)
    for run in sorted(runs, key=lambda run: run.config['seed']):
        own, dense = settings(run), run.config['tp_size'] == 1
        kind = 'dense' if dense else (tuple(run.config['block_types']), run.config['tp_size'])
        note = ''.join(f', {key} {own[key]}' for key in mixed)
        seeds = rows.setdefault((json.dumps(own, sort_keys=True), kind), (note, {}))[1]
        twin = seeds.setdefault(run.config['seed'], run)
        if twin is not run:
            fail(f'{twin.folder} and {run.folder} are one run twice, of seed {run.config["seed"]}: name one')
    rows = {key: Row(by_seed, note=note) for key, (note, by_seed) in rows.items()}
    for (own, kind), row in rows.items():
        row.control = rows.get((own, 'dense'))
    for row in rows.values():
        row.floor = rounding_floor([other for other in rows.values()
                                    if other.tp_size == row.tp_size and other.control is row.control])
    return sorted(rows.values(), key=lambda row: (row.note, not row.dense, -row.communications, row.tp_size))


# the numbers


@dataclass
class Estimate:
    """A mean, half the width of its 95% interval (None where n is 1: one seed has no interval), and n."""
    mean: float
    half: float
    n: int

    def __str__(self):
        if self.half is None:
            return f'{self.mean:+.4f} (one seed, no interval)'
        return f'{self.mean:+.4f} [{self.mean - self.half:+.4f}, {self.mean + self.half:+.4f}] (n={self.n})'


def estimate(values):
    """Mean and 95% Student-t interval of a list of numbers, None of an empty one."""
    if not values:
        return None
    if len(values) == 1:
        return Estimate(values[0], None, 1)
    from scipy.stats import t           # a second to import
    deviation = statistics.stdev(values) / math.sqrt(len(values))
    return Estimate(statistics.mean(values), float(t.ppf(0.975, len(values) - 1)) * deviation, len(values))


def paired(row, other):
    """row minus other in validation loss, over the seeds that both have; None where they share none."""
    if other is None:
        return None
    return estimate([row.losses[seed] - other.losses[seed] for seed in row.losses if seed in other.losses])


def to_dense(row):
    """A row's paired difference to its dense control; None for the control itself and where there is none."""
    return None if row.dense else paired(row, row.control)


def rounding_floor(rows):
    """
    The largest |all-tp minus dense| over the seeds: two equal functions, so only rounding sets them apart.

    None where there is no such pair. Not their mean: a difference must beat what rounding did to any seed.
    """
    gaps = [abs(loss - row.control.losses[seed])
            for row in rows if set(row.block_types) == {'tp'} and row.control and not row.dense
            for seed, loss in row.losses.items() if seed in row.control.losses]
    return max(gaps, default=None)


def judge(difference, floor):
    """What may be said of a difference, in a word: real only above the floor, with an interval without 0."""
    if difference is None:
        return 'no pair of runs'
    if floor is not None and abs(difference.mean) <= floor:
        return 'no difference'
    if difference.half is None or abs(difference.mean) <= difference.half:
        return 'undecided'
    return ('higher' if difference.mean > 0 else 'lower') + ('' if floor is not None else ', floor unknown')


def verdict(difference, floor):
    """A difference and what may be said of it."""
    return judge(None, floor) if difference is None else f'{difference}: {judge(difference, floor)}'


# the guide's questions, in words


def switches(row):
    """How often neighbouring blocks differ: high for alternating placement, low for clustered."""
    return sum(a != b for a, b in zip(row.block_types, row.block_types[1:]))


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
    low, high = loss.mean - loss.half, loss.mean + loss.half
    answer = 'yes' if high < limit else 'no' if low >= limit else 'undecided'
    return f'{answer}, {loss.mean:.4f} [{low:.4f}, {high:.4f}] (n={loss.n})'


def goal(rows, communications, limit):
    """The answer to one threshold question, as lines: absolute where it applies, and relative to dense."""
    rows = [row for row in rows if not row.dense and row.communications == communications]
    if not rows:
        return [f'{UNANSWERED}: no run with {communications} communications has finished']
    lines = []
    for row in rows:
        if in_scope(row.first):
            lines.append(f'{row.title}: {below(row, limit)}')
            if row.first.config['dataset'] == 'openwebtext':
                lines.append("(3.28 is FineWeb's; on OpenWebText dense GPT-2 ends lower: see the difference)")
    if not all(in_scope(row.first) for row in rows):
        lines.append(f'not answerable: thresholds are for {GUIDE_SCOPE}')
    return lines + [f'relative form, {row.title} minus dense: {verdict(to_dense(row), row.floor)}'
                    for row in rows]


def placement(rows):
    """Does alternating placement beat clustered, where two rows have the same blocks in another order."""
    lines = []
    for a, b in combinations([row for row in rows if not row.dense], 2):
        if (a.tp_size, a.note, Counter(a.block_types)) == (b.tp_size, b.note, Counter(b.block_types)):
            even, clustered = sorted((a, b), key=switches, reverse=True)
            difference = paired(even, clustered)
            lines.append(f'{even.title} minus {clustered.title}: {verdict(difference, a.floor)}')
    return lines or [f'{UNANSWERED}: no two have the same blocks in another order']


def curves(rows):
    """
    The rows of each curve of loss against communications, most communications first: one curve per tp_size.

    Where a count was placed in several ways, the curve goes through the most alternating.
    """
    by_curve = {}
    for row in sorted((row for row in rows if not row.dense), key=switches):
        by_curve.setdefault((row.tp_size, row.note), {})[row.communications] = row
    return [[counts[n] for n in sorted(counts, reverse=True)] for _, counts in sorted(by_curve.items())]


def cliff(curve):
    """Is there a cliff in one curve: its steepest step, per communication, against the next steepest."""
    steps = [(paired(low, high), high.communications, low.communications)
             for high, low in zip(curve, curve[1:])]
    if len(curve) < 4 or any(step is None for step, _, _ in steps):
        return f'{UNANSWERED}: it takes four counts with shared seeds at least, here are {len(curve)} counts'
    steps.sort(key=lambda step: step[0].mean / (step[1] - step[2]), reverse=True)
    (rise, start, end), (next_rise, next_start, next_end) = steps[:2]
    slope, next_slope = rise.mean / (start - end), next_rise.mean / (next_start - next_end)
    if rise.mean <= 0:
        return 'no, the loss rises at no step from more communications to fewer'
    picked = f'the steepest of {len(steps)} steps is {start} to {end}, {rise}'
    if curve[0].floor is not None and rise.mean <= curve[0].floor:
        return f'none seen: {picked}, within the rounding floor of {curve[0].floor:.1e}'
    if rise.half is not None and rise.mean <= rise.half:
        return f'none shown: {picked}, not told apart from 0'
    against = f'{slope:.5f} per communication, against {next_slope:.5f} from {next_start} to {next_end}'
    looks = 'this looks like a cliff' if slope > CLIFF * next_slope else 'this looks gradual'
    unsure = '; one seed cannot tell it from chance' if rise.half is None else ''
    return f'{picked}, {against}: {looks}{unsure}'


def simulated(rows):
    return not all(row.first.config.get('shard') for row in rows if not row.dense)


def speed(rows):
    """Does reduced communication speed up training, as lines: only sharded runs can say."""
    if simulated(rows):
        return [f'{UNANSWERED}: simulated ranks have no network between them for tokens/s to speak of']
    ratios = [f'{row.title}: {row.tokens_per_sec / full.tokens_per_sec:.2f} times all-tp'
              for full, *fewer in curves(rows) if set(full.block_types) == {'tp'} for row in fewer]
    return ratios or [f'{UNANSWERED}: there is no all-tp run to compare with']


def answers(rows):
    """The guide's questions with their answers, as pairs of a line and a list of lines."""
    floors = {f'tp_size {row.tp_size}{row.note}':
              'unknown: no all-tp run with its dense control' if row.floor is None else f'{row.floor:.1e}'
              for row in rows if not row.dense}
    said = [('Rounding floor: the largest |all-tp minus dense| of any seed. Nothing smaller is a difference.',
             [f'{where}: {floor}' for where, floor in floors.items()])]
    said += [(question, goal(rows, communications, limit)) for question, communications, limit in GOALS]
    said.append(('Key question 3: does alternating placement beat clustered?', placement(rows)))
    said.append(('Key question 4: is there a cliff?',
                 [f'tp_size {curve[0].tp_size}{curve[0].note}: {cliff(curve)}' for curve in curves(rows)]))
    said.append(('Does reduced communication speed up training?', speed(rows)))
    return [(question, lines or [f'{UNANSWERED}: only dense runs have finished'])
            for question, lines in said]


# the table


def subject(runs, between=' / '):
    """Which corpus, length and size the numbers belong to."""
    told = []
    for run in runs:
        corpus, parameters = run.info['corpus'], run.info['parameters']
        size = f'{parameters / 1e6:.0f}M' if parameters >= 1e7 else f'{parameters / 1e6:.2f}M'
        told.append(f'{corpus["corpus"]}, {TOKENS.get(corpus["tokenizer"], corpus["tokenizer"])} tokens, '
                    f'{run.config["max_iters"]:,} steps, {size} parameters')
    return between.join(dict.fromkeys(told))


HEADER = ['run', 'communications', 'all-reduces fwd/bwd', 'blocks', 'tp_size', 'seeds', 'val loss',
          'minus dense, 95% interval', 'verdict', 'tokens/s']


def cells(row):
    """A row as text, under HEADER."""
    difference = to_dense(row)
    return [row.name, str(row.communications), f'{row.all_reduces["forward"]}/{row.all_reduces["backward"]}',
            'dense' if row.dense else pattern(row.block_types), str(row.tp_size), str(len(row.runs)),
            f'{row.loss:.4f}', str(difference or ''), judge(difference, row.floor) if difference else '',
            f'{row.tokens_per_sec:,.0f}']


def terminal_table(rows):
    """The table as aligned text."""
    lines = [HEADER, *map(cells, rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(HEADER))]
    return '\n'.join('  '.join(map(str.ljust, line, widths)).rstrip() for line in lines)


def markdown(rows, notes, said, plots, command):
    """table.md: the table, what is missing from it, the answers and the plots."""
    corpus = subject([row.first for row in rows])
    lines = ['# Validation loss against communications', '', f'Corpus: {corpus}.', '']
    lines += [f'| {" | ".join(line)} |' for line in [HEADER, ['---'] * len(HEADER), *map(cells, rows)]]
    lines += ['', 'Loss in nats per token after the last step, mean over seeds; differences are paired by',
              'seed, with Student-t intervals. One is only called higher or lower above the rounding floor,',
              'and when its interval excludes 0.', '']
    lines += [f'- {note}' for note in notes] + [''] * bool(notes)
    lines += ["## The guide's questions", '']
    for question, answer in said:
        lines += [f'- **{question}**', *(f'  - {line}' for line in answer)]
    lines += [''] + [f'![{name}]({name})' for name in plots] + ['', 'Made by:', '', f'    {command}', '']
    return '\n'.join(lines)


def write_csv(path, rows, unfinished):
    """table.csv: the same numbers unrounded, one line a row; unfinished runs without a loss."""
    lines = []
    for row in rows:
        difference, corpus = to_dense(row), row.first.info['corpus']
        line = dict(run=row.name, state='finished', communications=row.communications,
                    all_reduces_forward=row.all_reduces['forward'],
                    all_reduces_backward=row.all_reduces['backward'], block_types=' '.join(row.block_types),
                    tp_size=row.tp_size, seeds=' '.join(map(str, row.runs)), val_loss=row.loss,
                    difference=difference and difference.mean, half_interval=difference and difference.half,
                    pairs=difference and difference.n, rounding_floor=row.floor,
                    tokens_per_sec=row.tokens_per_sec, corpus=corpus['corpus'], tokenizer=corpus['tokenizer'],
                    max_iters=row.first.config['max_iters'])
        lines.append(line)
    lines += [dict(run=run.info.get('name', run.folder.name), state=run.trouble) for run in unfinished]
    with open(path, 'w', newline='') as file:
        table = csv.DictWriter(file, lines[0].keys())
        table.writeheader()
        table.writerows(lines)


# the plots: told apart by marker and line as well as by lightness, so that they survive grey print


MARKERS, LINES = 'osD^vP*X<>', ('-', '--', '-.', ':')


def looks(rows):
    """Each row with its style: marker and colour tell the blocks, the line the tp_size. Dense is black."""
    from matplotlib import colormaps
    patterns = list(dict.fromkeys((tuple(row.block_types), row.note) for row in rows if not row.dense))
    sizes = sorted({row.tp_size for row in rows if not row.dense})
    styled = []
    for row in rows:
        style = dict(marker='.', linestyle='-', color='black', label=row.label)
        if not row.dense:
            i = patterns.index((tuple(row.block_types), row.note))
            line = sizes.index(row.tp_size) if len(sizes) > 1 else i
            style |= dict(marker=MARKERS[i % len(MARKERS)], linestyle=LINES[line % len(LINES)],
                          color=colormaps['viridis'](0.9 * i / max(1, len(patterns) - 1)))
        styled.append((row, style))
    return styled


def figure(rows, title, panels=1, height=4.8):
    """An empty figure whose title names the corpus, and its axes."""
    from matplotlib.figure import Figure
    fig = Figure(figsize=(8 if panels == 1 else 11, height), dpi=150, layout='constrained')
    axes = fig.subplots(1, panels, squeeze=False)[0]
    n = max(len(row.runs) for row in rows)
    corpus = subject([row.first for row in rows], between='\n')
    fig.suptitle(f'{title}\n{corpus}, {n} seed{"s" * (n > 1)}', fontsize=10)
    for ax in axes:
        ax.grid(alpha=0.3, linewidth=0.5)
        ax.set_axisbelow(True)
        ax.spines[['top', 'right']].set_visible(False)
    return fig, axes


def loss_unit(rows):
    units = {TOKENS.get(row.first.info['corpus']['tokenizer'], '') for row in rows}
    return f'nats per {units.pop() if len(units) == 1 else ""} token'.replace('  ', ' ')


def mark_references(ax, rows):
    """What a loss is read against: the dense control, its rounding floor, the guide's limits in scope."""
    floors = {}
    for row in rows:
        if row.control:
            floors[row.control.note] = max(floors.get(row.control.note, 0), row.floor or 0)
    for i, row in enumerate(row for row in rows if row.dense):
        ax.axhline(row.loss, color='black', linewidth=1, linestyle=(0, (6, 3 + 4 * i)), label=row.label)
        floor = floors.get(row.note)
        if floor:
            ax.axhspan(row.loss - floor, row.loss + floor, color='0.88', zorder=0,
                       label='within the rounding floor' if i == 0 else None)
    if all(in_scope(row.first) for row in rows):
        for limit in sorted({limit for *_, limit in GOALS}):
            ax.axhline(limit, color='0.5', linewidth=0.7, linestyle=':')
            ax.annotate(f"guide's {limit:.2f}", (1, limit), xycoords=('axes fraction', 'data'), fontsize=7,
                        va='bottom', ha='right')


def plot_tradeoff(rows, path):
    """Validation loss against communications; bars are the intervals of the paired differences to dense."""
    fig, (ax,) = figure(rows, 'Validation loss against communications')
    lines = curves(rows)
    on_curve = [row for curve in lines for row in curve]
    # a count cannot tell placements apart; what a pass really all-reduces can
    observed = len(on_curve) < len([row for row in rows if not row.dense])
    for i, curve in enumerate(lines):
        own = [row for row in rows if (row.tp_size, row.note) == (curve[0].tp_size, curve[0].note)]
        aside = 0.12 * (i - (len(lines) - 1) / 2)       # so that the bars of two tp_sizes stand side by side
        x = {id(row): (row.all_reduces['forward'] if observed else row.communications) + aside for row in own}
        style = dict(marker=MARKERS[i % len(MARKERS)], color=f'{0.1 + 0.45 * i / max(1, len(lines) - 1):.2f}')
        ax.plot([x[id(row)] for row in curve], [row.loss for row in curve], linestyle=LINES[i % len(LINES)],
                label=f'tp_size {curve[0].tp_size}{curve[0].note}', zorder=3, markersize=5, **style)
        for row in own:
            difference = to_dense(row)
            if difference and difference.half is not None:
                ax.errorbar(x[id(row)], row.loss, difference.half, color=style['color'], capsize=3,
                            linewidth=1)
            if row not in curve:
                ax.plot(x[id(row)], row.loss, linestyle='', markerfacecolor='white', zorder=3, **style)
                ax.annotate(pattern(row.block_types), (x[id(row)], row.loss), xytext=(6, 3), fontsize=7,
                            textcoords='offset points')
    mark_references(ax, rows)
    if observed:
        ax.set_xlabel('all-reduces of one forward pass, observed')
    else:
        names = {row.communications: f'{row.communications}\n({row.all_reduces["forward"]})'
                 for row in on_curve}
        ax.set_xticks(list(names), names.values())
        ax.set_xlabel("communications, by the guide's count (all-reduces observed in a forward pass)")
    ax.set_ylabel(f'validation loss ({loss_unit(rows)})')
    bars = any(difference and difference.half is not None for difference in map(to_dense, rows))
    ax.legend(fontsize=8, title='bars: 95% interval of the difference to dense' if bars else None,
              title_fontsize=7)
    fig.savefig(path)


def mean_curve(row, kind, key, control=None):
    """Steps and a metric's mean over a row's seeds at them, minus the control's where one is given."""
    pairs = [(getattr(run, kind), getattr(control.runs[seed], kind) if control else None)
             for seed, run in row.runs.items() if control is None or seed in control.runs]
    steps = sorted(set.intersection(*(set(own) & set(own if base is None else base) for own, base in pairs)))
    return steps, [statistics.mean(own[step][key] - (base[step][key] if base else 0) for own, base in pairs)
                   for step in steps]


def smooth(values, width):
    """Centred moving mean; the window shrinks at the ends."""
    return [statistics.mean(values[max(0, i - width): i + width + 1]) for i in range(len(values))]


def plot_curves(rows, path):
    """Training loss (smoothed) and validation loss (markers); beside them, validation loss minus dense."""
    compared = [row for row in rows if to_dense(row)]
    fig, axes = figure(rows, 'Training curves', panels=2 if compared else 1, height=5.2)
    settled = []                        # what the left panel shows; the first descent would flatten it
    for row, style in looks(rows):
        steps, losses = mean_curve(row, 'logs', 'train_loss')
        losses = smooth(losses, len(losses) // 40)
        axes[0].plot(steps, losses, linewidth=1, **style | {'marker': '', 'label': None})
        settled += [loss for step, loss in zip(steps, losses) if step >= 0.2 * row.first.config['max_iters']]
        steps, losses = mean_curve(row, 'evals', 'val_loss')
        every = max(1, len(steps) // 12)
        style |= dict(markersize=4, markevery=((len(steps) - 1) % every, every), linewidth=1)
        axes[0].plot(steps, losses, **style | {'linestyle': '', 'label': None})
        settled += losses[-1:]
        axes[0].plot([], [], **style)   # for the legend: line and marker
        if row in compared:
            axes[1].plot(*mean_curve(row, 'evals', 'val_loss', row.control), **style | {'label': None})
    margin = 0.05 * (max(settled) - min(settled)) or 0.1
    axes[0].set_ylim(min(settled) - margin, max(settled) + margin)
    axes[0].set_ylabel(f'loss ({loss_unit(rows)})')
    axes[0].set_title('lines: train, smoothed; markers: validation; the first steps are cut off', fontsize=8)
    if compared:
        axes[1].axhline(0, color='black', linewidth=1)
        axes[1].set_ylabel(f'difference ({loss_unit(rows)})')
        axes[1].set_title('validation loss minus the dense control, paired by seed', fontsize=8)
    for ax in axes:
        ax.set_xlabel('step (updates made)')
    fig.legend(loc='outside lower center', ncols=3, fontsize=8, title='communications: blocks',
               title_fontsize=8)
    fig.savefig(path)


def plot_speed(rows, path):
    """Tokens per second of each row, as bars."""
    fig, (ax,) = figure(rows, 'Training speed', height=1.8 + 0.3 * len(rows))
    bars = ax.barh(range(len(rows)), [row.tokens_per_sec for row in rows], height=0.7, color='0.75',
                   edgecolor='black')
    ax.bar_label(bars, [f'{row.tokens_per_sec:,.0f}' for row in rows], padding=3, fontsize=8)
    ax.set_yticks(range(len(rows)), [row.label for row in rows], fontsize=8)
    ax.invert_yaxis()
    ax.margins(x=0.12)
    ax.grid(visible=False, axis='y')
    caveat = ' (simulated ranks: no communication is saved)' if simulated(rows) else ''
    ax.set_xlabel(f'tokens per second{caveat}')
    fig.savefig(path)


PLOTS = {'loss_vs_communications.png': plot_tradeoff, 'training_curves.png': plot_curves,
         'tokens_per_sec.png': plot_speed}


def missing_notes(rows, unfinished):
    """What a reader must know is not in the table."""
    notes = [f'not in the table: {run.folder}: {run.trouble}' for run in unfinished]
    for row in rows:
        if row.dense:
            continue
        alone = [str(seed) for seed in row.runs if row.control is None or seed not in row.control.runs]
        if row.control is None:
            notes.append(f'{row.name}: no dense control among these runs, so its difference is blank')
        elif alone:
            notes.append(f'{row.name}: no dense control of seed {", ".join(alone)}, not in its difference')
    return notes


def main(argv):
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('folders', nargs='*', type=Path, help='run folders, or what holds them; default: out')
    parser.add_argument('--out', type=Path, default=Path('out/compare'), help='default: %(default)s')
    parser.add_argument('--mix', action='store_true', help='corpora, recipes and lengths may differ')
    parser.error = lambda message: fail(f'{message}; see python compare.py --help')
    args = parser.parse_args(argv)

    folders, empty = find_runs(args.folders or [Path('out')])
    runs = [read_run(folder) for folder in folders]
    if not args.mix:
        refuse_mixed([run for run in runs if run.info])
    rows = group([run for run in runs if not run.trouble])
    unfinished = [run for run in runs if run.trouble]
    notes = missing_notes(rows, unfinished) + [f'{path}: no run in it' for path in empty if path != args.out]
    if not rows:
        fail('; '.join(['no finished run to compare', *notes]))

    try:
        args.out.mkdir(parents=True, exist_ok=True)
        said = answers(rows)
        command = shlex.join(['python', 'compare.py', *argv])
        (args.out / 'table.md').write_text(markdown(rows, notes, said, PLOTS, command))
        write_csv(args.out / 'table.csv', rows, unfinished)
        for name, plot in PLOTS.items():
            plot(rows, args.out / name)
    except OSError as error:
        fail(f'cannot write to --out={args.out}: {error.strerror}')
    print(subject([row.first for row in rows]), terminal_table(rows), *notes, sep='\n')
    for question, answer in said:
        print('', question, *(f'    {line}' for line in answer), sep='\n')
    print(f'\nwritten to {args.out}: table.md, table.csv, {", ".join(PLOTS)}')


if __name__ == '__main__':
    main(sys.argv[1:])
