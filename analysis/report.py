"""
The outputs of a comparison: tables for the terminal, table.md, table.csv, table.json, report.html, W&B.

All of them hold the same numbers. report.html is a single file with its plots inside and without scripts, to
be read and printed anywhere.
"""

import base64
import csv
import html
import json
import os
from dataclasses import asdict
from itertools import starmap

from analysis.findings import (
    by_note,
    comparisons,
    curve_name,
    curves,
    fit_bend,
    front,
    highest_norm,
    largest_drift,
    width_trends,
)
from analysis.runs import OTHER_VARIED, SPIKE, judge, subject, to_dense

# the numbers of a row


def steps_to_level(row):
    """The mean number of steps to row.level; None if a run does not reach it."""
    steps = row.values(lambda run: run.steps_to(row.level))
    return sum(steps.values()) / len(steps) if len(steps) == len(row.runs) else None


def record(row):
    """A row's numbers under flat names, unrounded; losses in nats per token, None if there is none."""
    difference, corpus = to_dense(row), row.first.info['corpus']
    gap_difference = to_dense(row, lambda run: run.gap)
    return dict(
        run=row.name, state='finished', communications=row.communications,
        all_reduces_forward=row.all_reduces['forward'], all_reduces_backward=row.all_reduces['backward'],
        block_types=' '.join(row.block_types), tp_size=row.tp_size,
        **{key: row.first.config[key] for key in OTHER_VARIED}, seeds=' '.join(map(str, row.runs)),
        val_loss=row.loss, difference=difference and difference.mean,
        half_interval=difference and difference.half, pairs=difference and difference.n,
        rounding_floor=row.floor, verdict=judge(difference, row.floor) if difference else None,
        level=row.level, steps_to_level=steps_to_level(row),
        generalisation_gap=row.mean(lambda run: run.gap),
        gap_difference=gap_difference and gap_difference.mean,
        gap_half_interval=gap_difference and gap_difference.half, highest_grad_norm=highest_norm(row),
        loss_spikes=sum(len(run.spikes) for run in row.runs.values()),
        skipped_steps=sum(run.skipped for run in row.runs.values()), largest_drift=row.mean(largest_drift),
        predicted_seconds=row.seconds, tokens_per_sec=row.mean(lambda run: run.tokens_per_sec),
        n_embd=row.first.config['n_embd'], parameters=row.first.info['parameters'], corpus=corpus['corpus'],
        tokenizer=corpus['tokenizer'], max_iters=row.first.config['max_iters'])


def run_record(seed, run):
    """One run of a row, for table.json."""
    return dict(seed=seed, folder=str(run.folder), git_commit=run.info.get('git_commit'), val_loss=run.loss,
                fixed_train_loss=None if run.gap is None else run.loss - run.gap,
                tokens_per_sec=run.tokens_per_sec, spikes=run.spikes, skipped=run.skipped)


def run_name(run):
    return run.info.get('name', run.folder.name)


def write_csv(path, rows, unfinished):
    """table.csv: one line for each row, and one without numbers for each unfinished run."""
    lines = [record(row) for row in rows] + [dict(run=run_name(run), state=run.trouble) for run in unfinished]
    with open(path, 'w', newline='') as file:
        table = csv.DictWriter(file, lines[0].keys(), lineterminator='\n')
        table.writeheader()
        table.writerows(lines)


def write_json(path, rows, unfinished, notes, answers, link, command):
    """table.json: the same, with each run of a row, and the findings behind the answers."""
    bends = [(curve_name(curve[0]), fit_bend(curve)) for curve in curves(rows)]
    found = dict(
        command=command, subject=subject([row.first for row in rows]), link=link,
        rows=[record(row) | dict(block_types=row.block_types,
                                 runs=list(starmap(run_record, row.runs.items()))) for row in rows],
        unfinished=[dict(run=run_name(run), folder=str(run.folder), state=run.trouble) for run in unfinished],
        notes=notes, answers=[dict(question=question, answer=answer) for question, answer in answers],
        comparisons=[dict(kind=one.kind, first=one.first.name, second=one.second.name, verdict=one.verdict,
                          difference=one.difference and asdict(one.difference)) for one in comparisons(rows)],
        bends=[dict(curve=name, at=bend.at, seeds=bend.seeds, bend=asdict(bend.bend), p=bend.p,
                    squares_left=bend.residuals) for name, bend in bends if bend],
        pareto_front=[row.name for own in by_note(rows).values() for row in front(own)],
        width_trends=[dict(config=trend.name, points=trend.points, slope=asdict(trend.slope))
                      for trend in width_trends(rows)])
    path.write_text(json.dumps(found, indent=1, allow_nan=False) + '\n')


# the tables


HEADER = ['run', 'communications', 'all-reduces fwd/bwd', 'blocks', 'tp_size', 'seeds', 'val loss',
          'minus dense, 95% interval', 'verdict', 'tokens/s']
MORE_HEADER = ['run', 'steps to level', 'minus dense', 'level', 'val minus train loss', 'minus dense',
               'highest grad norm', 'loss spikes', 'skipped steps', 'largest drift', 'predicted ms/step']


def cells(row):
    """A row as text, under HEADER."""
    difference, speed = to_dense(row), row.mean(lambda run: run.tokens_per_sec)
    return [row.name, str(row.communications), f'{row.all_reduces["forward"]}/{row.all_reduces["backward"]}',
            row.blocks, str(row.tp_size), str(len(row.runs)),
            f'{row.loss:.4f}', str(difference or ''), judge(difference, row.floor) if difference else '',
            '' if speed is None else f'{speed:,.0f}']


def more_cells(row):
    """How a row's training went, under MORE_HEADER; a cell is empty if nothing was logged for it."""
    own = record(row)

    def cell(key, form, times=1):
        return '' if own[key] is None else format(times * own[key], form)

    steps, gap = to_dense(row, lambda run: run.steps_to(row.level)), to_dense(row, lambda run: run.gap)
    return [row.name, cell('steps_to_level', '.1f'), format(steps, '1') if steps else '',
            cell('level', '.4f'), cell('generalisation_gap', '+.4f'), str(gap or ''),
            cell('highest_grad_norm', '.2f'), cell('loss_spikes', 'd'), cell('skipped_steps', 'd'),
            cell('largest_drift', '.2f'), cell('predicted_seconds', '.4g', 1e3)]


def tables(rows):
    """The two tables, each a list of lines of cells, the header first."""
    return [HEADER, *map(cells, rows)], [MORE_HEADER, *map(more_cells, rows)]


def terminal_table(rows):
    """The tables as aligned text."""
    texts = []
    for lines in tables(rows):
        widths = [max(map(len, column)) for column in zip(*lines)]
        texts.append('\n'.join('  '.join(map(str.ljust, line, widths)).rstrip() for line in lines))
    return '\n\n'.join(texts)


# for people


def methods():
    """How to read the numbers, as sentences."""
    return ['Loss in nats per token after the last step, mean over seeds. Differences are paired by seed, '
            'with 95% Student-t intervals. One is called higher or lower only if it is above the rounding '
            'floor and its interval excludes 0.',
            'Steps to the level, a validation loss, are on straight lines between evaluations; the level is '
            'the highest final loss of the runs of a recipe, which all of them reach, unless --level gave '
            f'it. Gradient norms are those after warmup, before clipping. A loss spike is {SPIKE}. Drift is '
            '||d_r|| / ||c|| at the last evaluation, the largest of all sublayers, mean over seeds.']


def markdown(rows, notes, answers, plots, command):
    """table.md: the tables, what is missing from them, the answers and the plots. plots: {name: caption}"""
    lines = ['# Validation loss against communications', '', f'{subject([row.first for row in rows])}.', '']
    for header, *table in tables(rows):
        lines += [f'| {" | ".join(line)} |' for line in [header, ['---'] * len(header), *table]] + ['']
    lines += [line for sentences in methods() for line in (sentences, '')]
    lines += [f'- {note}' for note in notes] + [''] * bool(notes)
    lines += ["## The guide's questions", '']
    for question, answer in answers:
        lines += [f'- **{question}**', *(f'  - {line}' for line in answer)]
    lines += ['', '## Plots', ''] + [f'![{caption}]({name}.png)\n' for name, caption in plots.items()]
    return '\n'.join([*lines, 'Made by:', '', f'    {command}', ''])


CSS = """
body { font: 15px/1.45 system-ui, sans-serif; color: #111; background: #fff; max-width: 68rem;
       margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; }
h2 { font-size: 1.15rem; margin-top: 2rem; }
h3 { font-size: 1rem; margin: 1rem 0 .2rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .74rem; margin: 1rem 0; }
th, td { border-bottom: 1px solid #bbb; padding: .2rem .45rem; text-align: left; vertical-align: top; }
thead th { border-bottom: 2px solid #111; }
tbody th { font-weight: normal; min-width: 11em; }
ul { margin: .2rem 0; padding-left: 1.2rem; }
figure { margin: 1.5rem 0; } figure img { width: 100%; height: auto; } figcaption { font-size: .85rem; }
code { font-size: .85rem; overflow-wrap: anywhere; }
@media print { body { max-width: none; margin: 0; font-size: 10pt; } .wide { overflow: visible; }
               table { font-size: 6pt; } figure img { width: auto; max-width: 100%; max-height: 9in; }
               tr, figure, li { break-inside: avoid; } h2, h3 { break-after: avoid; } }
"""


def html_table(lines):
    def line(cells, tag):
        first = 'th scope="row"' if tag == 'td' else 'th'
        # an interval stays on one line: no break at its spaces
        rest = [cell.replace(' ', '\xa0') if cell[:1] in ('+', '-') else cell for cell in cells[1:]]
        rest = ''.join(f'<{tag}>{html.escape(cell)}</{tag}>' for cell in rest)
        return f'<tr><{first}>{html.escape(cells[0])}</th>{rest}</tr>'

    header, *body = lines
    return (f'<div class="wide"><table><thead>{line(header, "th")}</thead>\n<tbody>'
            + '\n'.join(line(cells, 'td') for cells in body) + '</tbody></table></div>')


def html_list(lines):
    return '<ul>' + '\n'.join(f'<li>{html.escape(line)}</li>' for line in lines) + '</ul>'


def html_figure(path, caption):
    """An SVG file as a figure, embedded as an image, so that the ids of two figures cannot clash."""
    data = base64.b64encode(path.read_bytes()).decode()
    return (f'<figure><img alt="{html.escape(caption)}" src="data:image/svg+xml;base64,{data}">'
            f'<figcaption>{html.escape(caption)}</figcaption></figure>')


def page(rows, notes, answers, plots, command, folder):
    """report.html. The plots, {name: caption}, are in the folder as SVG."""
    main, more = (html_table(table) for table in tables(rows))
    figures = [html_figure(folder / f'{name}.svg', caption) for name, caption in plots.items()]
    parts = [
        '<!DOCTYPE html>', '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f'<title>Validation loss against communications</title><style>{CSS}</style></head><body>',
        '<h1>Validation loss against communications</h1>',
        f'<p>{html.escape(subject([row.first for row in rows]))}</p>',
        *figures[:1], main, f'<p>{html.escape(methods()[0])}</p>',
        '<h2>Not in the table</h2>' + html_list(notes) if notes else '',
        "<h2>The guide's questions</h2>",
        *(f'<h3>{html.escape(question)}</h3>{html_list(answer)}' for question, answer in answers),
        '<h2>How training went</h2>', more, f'<p>{html.escape(methods()[1])}</p>',
        '<h2>Plots</h2>', *figures[1:],
        f'<h2>Made by</h2><p><code>{html.escape(command)}</code></p></body></html>']
    return '\n'.join(part for part in parts if part) + '\n'


# for W&B


def log_to_wandb(rows, answers, plots, folder, command):
    """
    Log the table, answers, plots and report as one run of job_type compare, in the project of the first run.

    Without a key the run is offline, which is said in a line; W&B never asks for one.
    """
    import wandb
    os.environ.setdefault('WANDB_SILENT', 'true')
    mode = None  # W&B's own choice
    if 'WANDB_MODE' not in os.environ and not wandb.login(prompt=False):
        mode = 'offline'
        print(f'W&B has no key here and runs offline; `wandb sync {folder}/wandb/offline-run-*` uploads this')
    records = [record(row) for row in rows]
    first = rows[0].first
    run = wandb.init(
        project=first.config['wandb_project'], name=folder.name, group=first.info['corpus']['name'],
        job_type='compare', dir=folder, mode=mode, config=dict(command=command, folder=str(folder)))
    lines = [[question, line] for question, answer in answers for line in answer]
    run.log(dict(table=wandb.Table(list(records[0]), [list(line.values()) for line in records]),
                 answers=wandb.Table(['question', 'answer'], lines),
                 report=wandb.Html((folder / 'report.html').read_text(), inject=False),
                 **{f'plots/{name}': wandb.Image(str(folder / f'{name}.png')) for name in plots}))
    run.summary.update({f'difference/{line["run"]}': line['difference'] for line in records
                        if line['difference'] is not None})
    run.finish()
