"""
Compare runs: how few communications are as good as dense, from the files that train.py wrote.

    python compare.py                                       # every run folder under out/
    python compare.py out/*-cpu-seed* --out=results         # these, with the outputs in another folder
    python compare.py out --tuned=learning_rate --tuning_seeds=1,2  # each config at its own best rate
    python compare.py out --link=25,30                      # loss against the step time predicted for a link
    python compare.py out --pair 'spd x 12' 'palm x 12'     # one config minus another
    python compare.py out --at=last                         # unfinished runs, at the last step that all have
    python compare.py out/width64 out/width128              # several recipes, one by one, and the trend
    python compare.py --from_wandb=someone/owt --wandb      # read runs from W&B, log the outputs to it
    python compare.py out --format=pdf --width=3.3          # figures for a paper, too, with captions

A run is paired with the dense control of the same seed, data and recipe. A config is better than dense, as
good within the margin, worse, or undecided; the first line names the fewest communications that are shown to
be as good. With --tuned, each config is at its best value of a key, chosen on the tuning seeds, and judged on
the others. A plan that the runs carry gives the margin and the seeds, and says what was planned.

Runs that did not finish are listed and are in no mean, unless --at says at which step to compare. The answer,
the table and what is open are printed; table.md, table.csv, table.json, report.html and the plots are written
to --out, and figures for a paper to its folder figures.
"""

import argparse
import importlib.util
import math
import os
import shlex
import sys
from pathlib import Path

from configurator import begin_program, fail, model_vocab_size
from training.rundir import find_runs

FORMATS = 'pdf', 'png', 'svg'


def parse_link(text):
    """--link's 'Gbit/s,microseconds' as two floats."""
    try:
        gbit, latency = map(float, text.split(','))
    except ValueError:
        gbit = latency = math.nan
    if not (0 < gbit < math.inf and 0 < latency < math.inf):
        raise argparse.ArgumentTypeError(f'it is {text}, it must be Gbit/s and microseconds, as in 25,30')
    return gbit, latency


def parse_seeds(text):
    """--tuning_seeds as a tuple of numbers."""
    try:
        return tuple(map(int, text.split(',')))
    except ValueError:
        raise argparse.ArgumentTypeError(f'it is {text}, it must be seeds, as in 1,2') from None


def parse_at(text):
    """--at as a number of steps, or 'last'."""
    if text != 'last' and not (text.isascii() and text.isdigit()):
        raise argparse.ArgumentTypeError(f'it is {text}, it must be a step, or last')
    return text if text == 'last' else int(text)


def parse_formats(text):
    """--format as a tuple of names."""
    names = tuple(text.split(','))
    if not set(names) <= set(FORMATS):
        raise argparse.ArgumentTypeError(f'it is {text}, it must be of {", ".join(FORMATS)}, as in pdf,png')
    return names


def parse_labels(text):
    """--labels as a dict: 'spd x 12=SPD; palm x 12=PaLM'. A name may contain commas, but no semicolon."""
    pairs = [pair.partition('=') for pair in text.split(';') if pair.strip()]
    if not all(name.strip() and label.strip() for name, _, label in pairs):
        raise argparse.ArgumentTypeError(f"it is {text}, it must be as in 'spd x 12=SPD; palm x 12=PaLM'")
    return {name.strip(): label.strip() for name, _, label in pairs}


def parse_args(argv):
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('folders', nargs='*', type=Path, help='run folders, or folders of them; default: out')
    parser.add_argument('--out', type=Path, default=Path('out/compare'), help='default: %(default)s')
    parser.add_argument('--pair', nargs=2, action='append', default=[], metavar=('A', 'B'),
                        help='compare two configs, named by their blocks or runs: A minus B')
    parser.add_argument('--at', type=parse_at, metavar='STEP',
                        help='compare all runs as they were at this step; last: the last that all have')
    parser.add_argument('--level', type=float, help='the loss to time convergence to; default: one all reach')
    parser.add_argument('--margin', type=float, help="nats above dense that are as good; the plan's, or 0.02")
    parser.add_argument('--tuned', metavar='KEY', help='each config at its best value of this key')
    parser.add_argument('--tuning_seeds', type=parse_seeds, metavar='SEEDS', default=(),
                        help='the seeds that choose it, 1,2 for example; the others give the answer')
    parser.add_argument('--link', type=parse_link, metavar='GBIT,US', help='predict step times for a link')
    parser.add_argument('--format', type=parse_formats, metavar='pdf,png,svg', default=(),
                        help='draw figures for a paper, in these formats; default, with --width: pdf')
    parser.add_argument('--width', type=float, help='of these figures, in inches; default: 3.3')
    parser.add_argument('--labels', type=parse_labels, metavar='NAME=LABEL;...', default={},
                        help='what plots call configs')
    parser.add_argument('--wandb', action='store_true', help='log the outputs to W&B, too')
    parser.add_argument('--from_wandb', metavar='ENTITY/PROJECT', help='read the runs of a W&B project')
    parser.error = lambda message: fail(f'{message}; see python compare.py --help')
    args = parser.parse_args(argv)
    if args.level is not None and not math.isfinite(args.level):
        fail(f'--level is {args.level}, it must be a finite loss, in nats per token')
    if args.margin is not None and not 0 < args.margin < math.inf:
        fail(f'--margin is {args.margin}, it must be a number of nats above 0, such as 0.02')
    if args.width is not None and not 2 <= args.width <= 20:
        fail(f'--width is {args.width}, it must be from 2 to 20 inches')
    if (args.wandb or args.from_wandb) and importlib.util.find_spec('wandb') is None:
        fail(f'--{"wandb" if args.wandb else "from_wandb"} needs wandb, which is not installed: '
             'pip install wandb')
    return args


if __name__ == '__main__':
    begin_program()
    parse_args(sys.argv[1:])  # --help and mistakes are reported before scipy and matplotlib are loaded

from analysis.answers import answers, exploratory, headlines
from analysis.families import rows_called
from analysis.figures import Sheet
from analysis.findings import find_all
from analysis.plan import plan_of
from analysis.plots import draw_all
from analysis.report import Report, log_to_wandb, markdown, page, screen, write_csv, write_json
from analysis.runs import group, last_common_step, mixed_recipes, read_run, read_wandb, up_to
from analysis.tuning import Tuned, check_tuned, fixed_min_lr
from analysis.unanswered import open_questions, pairing
from analysis.verdicts import MARGIN


def missing_notes(rows, unfinished, finished=()):
    """What a reader must know is not in the table."""
    notes = [f'not in the table: {run.folder}: {run.trouble}' for run in unfinished]
    for row in rows:
        if row.dense:
            continue
        lost = row.control.diverged if row.control else []
        alone = [str(seed) for seed in row.runs
                 if row.control is None or seed not in [*row.control.runs, *lost]]
        both = [str(seed) for seed in lost if seed in row.runs]
        if both:
            notes.append(f'{row.title}: dense diverged on seed {", ".join(both)}, not in its difference')
        if row.control is None:
            notes.append(f'{row.title}: no dense control among these runs, so its difference is blank; this '
                         f'trains it: {pairing(row, alone)}')
        elif alone:
            notes.append(f'{row.title}: no dense control of seed {", ".join(alone)}, not in its difference; '
                         f'this trains it: {pairing(row, alone)}')
    if any(row.control and row.runs.keys() != row.control.runs.keys() for row in rows):
        notes.append('val losses are means over different seeds: compare the differences, not the losses')
    tuned = set()
    for row in (row for row in rows if row.tuning):
        tuned |= {run for own in row.tuning.runs.values() for run in own.values()}
        unused = [str(seed) for seed in row.tuning.runs[row.tuning.best] if not row.tuning.tuned.uses(seed)]
        if unused:
            notes.append(f"{row.title}: seed {', '.join(unused)} is none of the plan's, and not used")
    in_rows = tuned | {run for row in rows for run in row.runs.values()}
    waiting = [str(run.folder) for run in finished if run not in in_rows]
    if waiting:
        notes.append(f'in no row: its config has no answer yet at its best value: {", ".join(waiting)}')
    return notes


def read_project(project):
    """The runs of a W&B project. Ends the program, in one line, if W&B does not give them."""
    import wandb
    try:
        return read_wandb(project, wandb.Api())
    except (wandb.Error, ValueError, OSError) as error:
        fail(f'--from_wandb={project}: W&B does not give its runs, {type(error).__name__}: {error}')


def step_predictor(runs, link):
    """
    Predicts the seconds of a run's step, sharded over nodes that a link joins. link: (Gbit/s, us)

    There are enough nodes for every tensor-parallel group to have its ranks on different ones, and at least 8
    GPUs in all.

    Returns (a function of a run: seconds, or None if they cannot be predicted; a dict which it fills with
    {run: why they cannot}; what is predicted, in words).
    """
    from speed.costmodel import Cluster, predicted_seconds
    nodes = math.lcm(2, *(run.config['tp_size'] for run in runs))
    cluster = Cluster(gbit=link[0], latency_us=link[1], nodes=nodes, gpus=nodes * math.ceil(8 / nodes))
    reasons = {}

    def predict(run):
        vocab_size = model_vocab_size(run.info['corpus']['vocab_size'])
        try:
            return predicted_seconds(run.config, cluster, vocab_size=vocab_size)
        except ValueError as error:
            reasons[run] = str(error)

    words = (f'{cluster.gpus} GPUs of {cluster.gpu_tflops:g} TFLOP/s on {nodes} nodes, {cluster.gbit:g} '
             f'Gbit/s and {cluster.latency_us:g} us between nodes, tensor-parallel groups across them')
    return predict, reasons, words


def read_runs(args):
    """(the runs that the flags name, the folders among them that hold none)"""
    folders, empty = find_runs(args.folders or ([] if args.from_wandb else [Path('out')]))
    runs = [read_run(folder) for folder in folders]
    if args.from_wandb:
        runs += read_project(args.from_wandb)
    return runs, empty


def read_at(runs, at):
    """The runs as they were at a step, or the last that all have. Ends the program if there is none."""
    step = last_common_step(runs) if at == 'last' else at
    if step is None:
        fail('--at=last: these runs have no evaluation after step 0 at a common step; --at=STEP names one')
    return [up_to(run, step) for run in runs]


def find_tuned(args, plan, runs):
    """The Tuned that the flags ask for, or else the plan; None for none. Ends the program if it cannot be."""
    if args.tuned is None and args.tuning_seeds and (plan is None or plan.tuned is None):
        fail('--tuning_seeds needs --tuned: the key whose best value they choose')
    key = args.tuned or (plan and plan.tuned)
    if key is None:
        return None
    seeds = args.tuning_seeds or (plan.tuning_seeds if plan else ())
    check_tuned(key, seeds)
    return Tuned(key, seeds, plan.answer_seeds if plan else (), fixed_min_lr(run.config for run in runs))


def departures(args, plan, rows):
    """Where the flags, and the values at which configs are judged, depart from the plan, as lines."""
    if plan is None:
        return []
    lines = [f'--{key} is {getattr(args, key)}, the plan says {getattr(plan, key)}: so all is exploratory'
             for key in ('margin', 'tuned', 'tuning_seeds')
             if getattr(args, key) not in (None, ()) and getattr(args, key) != getattr(plan, key)]
    if plan.grid and not lines:
        between = sorted({row.tuning.best for row in rows if row.tuning} - set(plan.grid))
        grid = ', '.join(f'{value:g}' for value in plan.grid)
        lines = [f'{plan.tuned} {value:g} is between those of the plan, {grid}: so all is exploratory'
                 for value in between if min(plan.grid) < value < max(plan.grid)]
    return lines


def label_rows(rows, labels):
    """Have plots call rows as --labels says. Ends the program, in one line, if a name is none of theirs."""
    for name, label in labels.items():
        for row in rows_called(name, rows, '--labels'):
            row.called = label


def draw_figures(args, found):
    """Draw the figures for a paper, if the flags ask for any. Returns what to say of them."""
    if not args.format and args.width is None:
        return ''
    formats, sheet = args.format or ('pdf',), Sheet(args.width or 3.3)
    drawn = draw_all(found, args.out / 'figures', sheet, formats)
    return (f'; to {args.out / "figures"}: {len(drawn)} figures of {sheet.width:g} inches as '
            f'{", ".join(formats)}, each with a caption')


def main(argv):
    args = parse_args(argv)
    runs, empty = read_runs(args)
    if args.at is not None:
        runs = read_at(runs, args.at)
    begun = [run for run in runs if run.info]
    plan, notes = plan_of(begun)
    tuned = find_tuned(args, plan, begun)
    notes += mixed_recipes(begun, tuned)
    finished, unfinished = ([run for run in runs if bool(run.trouble) is bad] for bad in (False, True))
    predict, reasons, link = step_predictor(finished, args.link) if args.link else (None, {}, None)
    diverged = [run for run in unfinished if run.diverged]
    rows = group(finished, args.level, predict, tuned, diverged)
    notes += missing_notes(rows, unfinished, finished)
    notes += [f'{path}: ' + ('it cannot be read' if path.is_dir() and not os.access(path, os.X_OK) else
                             'no run in it') for path in empty if path != args.out]
    if not rows:
        hint = '; --at=last compares runs as they are' * (args.at is None and any(
            run.evals.keys() - {0} for run in unfinished))
        fail('; '.join([f'no {"" if args.at is not None else "finished "}run to compare{hint}', *notes]))
    notes += [f'{row.title}: its step time is not predicted: {reasons[row.first]}'
              for row in rows if row.first in reasons]

    departed = departures(args, plan, rows)
    found = find_all(rows, args.margin or (plan and plan.margin) or MARGIN, tuned, plan, link, args.pair,
                     bool(departed))
    label_rows(rows, args.labels)
    command = shlex.join(['python', 'compare.py', *argv])
    report = Report(command, headlines(found), departed or exploratory(found),
                    answers(found), open_questions(found, command), notes, unfinished)
    print(screen(found, report))
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        plots = draw_all(found, args.out)
        figures = draw_figures(args, found)
        (args.out / 'table.md').write_text(markdown(found, report, plots), encoding='utf-8')
        (args.out / 'report.html').write_text(page(found, report, plots, args.out), encoding='utf-8')
        write_csv(args.out / 'table.csv', found, unfinished)
        write_json(args.out / 'table.json', found, report)
    except OSError as error:
        fail(f'--out is {args.out}, which cannot be written: {error.strerror}')
    print(f'\nwritten to {args.out}: table.md, table.csv, table.json, report.html and {len(plots)} plots'
          + figures)
    if args.wandb:
        import wandb
        try:
            log_to_wandb(found, report, plots, args.out)
        except (wandb.Error, OSError) as error:
            fail(f'--wandb: all is in {args.out}, but W&B failed, {type(error).__name__}: {error}')


if __name__ == '__main__':
    main(sys.argv[1:])
