"""
Compares runs: validation loss against communications, from the files that train.py wrote, with uncertainty.

    python compare.py                                       # every run folder under out/
    python compare.py out/*-cpu-seed* --out=results         # these, and the answer somewhere else
    python compare.py out --link=25,30                      # loss against the step time predicted for a link
    python compare.py out/width64 out/width128 --mix        # runs of several widths, and the trend
    python compare.py --from-wandb=someone/owt --wandb      # runs read from W&B, the answer logged to it

A run is paired with the dense control of the same seed, data and recipe; that difference is what counts. Runs
that did not finish are named and are in no mean. It prints tables and answers to the guide's questions, and
writes table.md, table.csv, table.json, report.html and the plots to --out. runs.py says what is read and how
it is paired, answers.py how each question is answered, plots.py and report.py what is drawn and written.
"""

import argparse
import math
import shlex
import sys
from pathlib import Path

from analysis.answers import answers
from configurator import fail, model_vocab_size
from analysis.report import log_to_wandb, markdown, page, terminal_table, write_csv, write_json
from analysis.runs import find_runs, group, read_run, read_wandb, refuse_mixed, subject


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
    if any(row.control and row.runs.keys() != row.control.runs.keys() for row in rows):
        notes.append('val losses are means over different seeds: compare the differences, not the losses')
    return notes


def from_wandb(project):
    """The runs of a W&B project. Ends the program where it cannot be read."""
    import wandb
    try:
        return read_wandb(project, wandb.Api())
    except (wandb.Error, ValueError, OSError) as error:
        fail(f'--from-wandb={project}: W&B does not give its runs, {type(error).__name__}: {error}')


def predict_steps(rows, link):
    """
    Sets the predicted seconds a step of each row, sharded over nodes that a link joins. link: (Gbit/s, us)

    There are as many nodes as let every tensor-parallel group have its ranks on different ones, and 8 GPUs at
    least in all.
    Returns (what that is, in words; a note for each row whose step cannot be predicted).
    """
    import variants  # noqa: F401       its blocks may be among the rows
    from speed.costmodel import Cluster, predicted_seconds
    nodes = math.lcm(2, *(row.tp_size for row in rows))
    cluster = Cluster(gbit=link[0], latency_us=link[1], nodes=nodes, gpus=nodes * math.ceil(8 / nodes))
    notes = []
    for row in rows:
        vocab_size = model_vocab_size(row.first.info['corpus']['vocab_size'])
        try:
            row.seconds = predicted_seconds(row.first.config, cluster, vocab_size=vocab_size)
        except ValueError as error:
            notes.append(f'{row.name}: its step time is not predicted: {error}')
    words = (f'{cluster.gpus} GPUs of {cluster.gpu_tflops:g} TFLOP/s on {nodes} nodes, {cluster.gbit:g} '
             f'Gbit/s and {cluster.latency_us:g} us between nodes, tensor-parallel groups across them')
    return words, notes


def parse_link(text):
    """--link's 'Gbit/s,microseconds' as two floats."""
    try:
        gbit, latency = map(float, text.split(','))
    except ValueError:
        gbit = latency = math.nan
    if not (0 < gbit < math.inf and 0 < latency < math.inf):
        raise argparse.ArgumentTypeError(f'it is {text}, it must be Gbit/s and microseconds, as in 25,30')
    return gbit, latency


def parse_args(argv):
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('folders', nargs='*', type=Path, help='run folders, or what holds them; default: out')
    parser.add_argument('--out', type=Path, default=Path('out/compare'), help='default: %(default)s')
    parser.add_argument('--mix', action='store_true', help='corpora, recipes and lengths may differ')
    parser.add_argument('--level', type=float, help='the loss to time convergence to; default: one all reach')
    parser.add_argument('--link', type=parse_link, metavar='GBIT,US', help='predict step times for a link')
    parser.add_argument('--wandb', action='store_true', help='log the answer to W&B, too')
    parser.add_argument('--from-wandb', metavar='ENTITY/PROJECT', help='read the runs of a W&B project')
    parser.error = lambda message: fail(f'{message}; see python compare.py --help')
    args = parser.parse_args(argv)
    if args.level is not None and not math.isfinite(args.level):
        fail(f'--level={args.level}: it must be a finite loss, in nats per token')
    return args


def main(argv):
    args = parse_args(argv)
    from analysis.plots import draw_all          # matplotlib takes a second, which a mistyped flag need not wait for
    default = [] if args.from_wandb else [Path('out')]
    folders, empty = find_runs(args.folders or default)
    runs = [read_run(folder) for folder in folders] + (from_wandb(args.from_wandb) if args.from_wandb else [])
    if not args.mix:
        refuse_mixed([run for run in runs if run.info])
    rows = group([run for run in runs if not run.trouble], args.level)
    unfinished = [run for run in runs if run.trouble]
    notes = missing_notes(rows, unfinished) + [f'{path}: no run in it' for path in empty if path != args.out]
    if not rows:
        fail('; '.join(['no finished run to compare', *notes]))

    link = None
    if args.link:
        link, unpredicted = predict_steps(rows, args.link)
        notes += unpredicted
    said = answers(rows, link)
    command = shlex.join(['python', 'compare.py', *argv])
    print(subject([row.first for row in rows]), terminal_table(rows), *notes, sep='\n')
    for question, answer in said:
        print('', question, *(f'    {line}' for line in answer), sep='\n')
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        plots = draw_all(rows, args.out)
        (args.out / 'table.md').write_text(markdown(rows, notes, said, plots, command))
        (args.out / 'report.html').write_text(page(rows, notes, said, plots, command, args.out))
        write_csv(args.out / 'table.csv', rows, unfinished)
        write_json(args.out / 'table.json', rows, unfinished, notes, said, link, command)
    except OSError as error:
        fail(f'cannot write to --out={args.out}: {error.strerror}')
    print(f'\nwritten to {args.out}: table.md, table.csv, table.json, report.html and {len(plots)} plots')
    if args.wandb:
        import wandb
        try:
            log_to_wandb(rows, said, plots, args.out, command)
        except (wandb.Error, OSError) as error:
            fail(f'--wandb: all is in {args.out}, but W&B failed, {type(error).__name__}: {error}')


if __name__ == '__main__':
    main(sys.argv[1:])
