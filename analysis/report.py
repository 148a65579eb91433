"""
The outputs of a comparison: what the terminal shows, table.md, table.csv, table.json, report.html, W&B.

All of them hold the same numbers. report.html is a single file with its plots inside and without scripts, to
be read and printed anywhere.
"""

import base64
import csv
import html
import json
import os
from dataclasses import asdict, dataclass
from itertools import starmap

from analysis.findings import by_note, count, curve_name, exact_rivals, front
from analysis.runs import SPIKE, subject
from analysis.tables import aligned, record, tables

TITLE = 'Validation loss against communications'

# the files for programs


def run_record(seed, run):
    """One run of a row, for table.json."""
    return dict(seed=seed, folder=str(run.folder), git_commit=run.info.get('git_commit'), val_loss=run.loss,
                fixed_train_loss=None if run.gap is None else run.loss - run.gap,
                tokens_per_sec=run.tokens_per_sec, spikes=run.spikes, skipped=run.skipped)


def run_name(run):
    return run.info.get('name', run.folder.name)


def write_csv(path, found, unfinished):
    """table.csv: one line for each row, and one without numbers for each unfinished run."""
    lines = [record(row, found) for row in found.rows]
    lines += [dict(run=run_name(run), state=run.trouble) for run in unfinished]
    with open(path, 'w', newline='', encoding='utf-8') as file:
        table = csv.DictWriter(file, lines[0].keys(), lineterminator='\n')
        table.writeheader()
        table.writerows(lines)


def answer_record(answer):
    """The numbers of an Answer; None if nothing is shown, or not by finished runs of seeds for the answer."""
    row = answer.row
    if row is None or answer.preliminary or row.first.at is not None:
        return None
    return dict(communications=row.communications, all_reduces=row.all_reduces['forward'],
                block_types=row.block_types, difference=row.verdict.difference, upper=row.verdict.upper,
                tp_size=row.tp_size, word=row.word, tuned=answer.tuned, n=row.verdict.n)


def comparison_record(one):
    return dict(kind=one.kind, first=one.first.name, second=one.second.name, verdict=one.verdict,
                difference=one.difference and asdict(one.difference), p=one.p, p_holm=one.p_holm,
                planned=one.planned, all_reduces=count(one.first) if one.equal else None)


def write_json(path, found, report):
    """table.json: the same, with each run of a row, and the findings behind the answers."""
    plan, tuned = found.plan, found.tuned
    contents = dict(
        command=report.command, subject=subject([row.first for row in found.rows]), link=found.link,
        margin=found.margin, at=found.rows[0].first.at, headlines=report.headlines,
        answer=answer_record(found.answers[0]) if found.answers else None,
        all_answers=[dict(tp_size=answer.tp_size, recipe=answer.note.removeprefix(', '),
                          answer=answer_record(answer), seeds_for_next=answer.seeds,
                          tested=[row.name for row in answer.tested],
                          beyond=[row.name for row in answer.beyond]) for answer in found.answers],
        plan=plan and dict(file=plan.file, sha256=plan.sha256),
        tuned=tuned and dict(key=tuned.key, tuning_seeds=tuned.tuning_seeds),
        rows=[record(row, found) | dict(
            block_types=row.block_types, runs=list(starmap(run_record, row.runs.items())),
            tuning=[dict(value=value, mean=row.tuning.means.get(value),
                         losses={seed: run.loss for seed, run in own.items()})
                    for value, own in row.tuning.runs.items()] if row.tuning else None)
              for row in found.rows],
        unfinished=[dict(run=run_name(run), folder=str(run.folder), state=run.trouble)
                    for run in report.unfinished],
        notes=report.notes, planned=report.planned, answers=[one._asdict() for one in report.answers],
        unanswered=[one._asdict() for one in report.open],
        noise_floor=[dict(run=one.row.name, size=one.size, largest=one.largest, n=one.n)
                     for one in found.floors],
        comparisons=list(map(comparison_record, found.comparisons)),
        pairs_asked_for=[[a.name, b.name] for a, b in found.asked],
        bends=[dict(curve=curve_name(curve[0]), at=bend.at, seeds=bend.seeds, bend=asdict(bend.bend),
                    p=bend.p, p_holm=bend.p_holm, squares_left=bend.residuals)
               for curve, bend in found.bends if bend],
        pareto_front=[row.name for own in by_note(found.rows).values() for row in front(own)],
        exact_rivals=[dict(name=name, seconds=seconds) for name, *seconds in exact_rivals(found.rows)],
        trends=[dict(config=trend.name, points=trend.points, p_holm=trend.p_holm,
                     slopes={name: asdict(trend.slope(name)) for name in trend.regressors})
                for trend in found.trends])
    path.write_text(json.dumps(contents, indent=1, allow_nan=False) + '\n', encoding='utf-8')


# for people


@dataclass
class Report:
    """The words of a comparison, beside its findings."""
    command: str
    headlines: list  # the answer first
    planned: list  # lines on what was planned
    answers: list  # of answers.py
    open: list  # of unanswered.py
    notes: list  # what a reader must know is not in the table
    unfinished: list  # Runs


def screen(found, report):
    """What the terminal shows: the answer, the table, up to six questions with a line, what is open."""
    shown = [aligned(lines) for name, lines in tables(found, only_named=True).items() if name != 'training']
    parts = [*report.headlines, '', subject([row.first for row in found.rows]), '\n\n'.join(shown),
             *report.planned, *report.notes, '']
    for question, lines in report.answers[:6]:
        more = f' ({len(lines) - 1} more in the report)' if len(lines) > 1 else ''
        parts += [question, f'    {lines[0]}{more}']
    parts += ['', 'What these runs cannot answer, and what would:'] if report.open else []
    for question, command in report.open:
        parts += [f'- {question}', f'    {command}']
    return '\n'.join(parts)


# above the tables, except the first
HEADINGS = dict(rivals='All by observed all-reduces, with the bytes of a step:', pairs='Pairs of configs:',
                times='Predicted times:', training='How training went:')


def methods(margin):
    """How to read the numbers, as sentences."""
    return ['Loss in nats per token after the steps above, mean over seeds. Differences are paired by seed. '
            'Their 95% intervals and bounds come from one spread for all configs of a recipe. Better: below '
            "dense, Dunnett's p < 0.05. As good: the one-sided 95% upper bound is below the margin, "
            f'{margin:g}. Worse: the lower bound is above it. The answer is the last config, from most '
            'all-reduces to fewest, before the first that is neither better nor as good.',
            "Times dense's steps: in what part of dense's steps its losses are reached, over its evaluations "
            'after warmup. Gaps between validation and train loss are compared at equal validation loss. '
            'MB a step: of the residual stream, forward and backward, all tokens of a step, each message '
            'counted once. A blocking all-reduce is waited for by the very next sublayer, a hidden one is '
            'not. Pairs at an equal number of all-reduces are adjusted by Holm among themselves. '
            f'Gradient norms are those after warmup, before clipping. A loss spike is {SPIKE}. '
            "Dispersion is the part of the ranks' streams that is not common to them, "
            'sum_r ||u_r - mean u||^2 / sum_r ||u_r||^2, at the last evaluation, the largest of all '
            'sublayers, mean over seeds.']


def markdown(found, report, plots):
    """table.md: the answer, the tables, the questions, what is open, the plots. plots: {name: caption}"""
    first, *others = report.headlines
    lines = [f'# {first}', '', *(line for other in others for line in (other, '')),
             f'{subject([row.first for row in found.rows])}.', '',
             *(line for planned in report.planned for line in (planned, ''))]
    for name, (header, *table) in tables(found).items():
        lines += [HEADINGS[name], ''] if name in HEADINGS else []
        cells = [header, ['---'] * len(header), *table]
        lines += [f'| {" | ".join(cell.replace("|", chr(92) + "|") for cell in line)} |' for line in cells]
        lines += ['']
    lines += [line for sentences in methods(found.margin) for line in (sentences, '')]
    lines += ['## Answers', '']
    for question, answer in report.answers:
        lines += [f'- **{question}**', *(f'  - {line}' for line in answer)]
    lines += ['', '## What these runs cannot answer', ''] if report.open else []
    lines += [f'- {question}: `{command}`' for question, command in report.open] + ['']
    lines += ['## Notes', '', *(f'- {note}' for note in report.notes), ''] if report.notes else []
    # named, not shown: whoever keeps the table may not keep every plot
    lines += ['## Plots', '', *(f'- `{name}.png`: {caption}' for name, caption in plots.items()), '']
    return '\n'.join([*lines, 'Made by:', '', f'    {report.command}', ''])


CSS = """
body { font: 15px/1.45 system-ui, sans-serif; color: #111; background: #fff; max-width: 76rem;
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
               table { font-size: 5.5pt; } figure img { width: auto; max-width: 100%; max-height: 9in; }
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


def page(found, report, plots, folder):
    """report.html. The plots, {name: caption}, are in the folder as SVG."""
    shown = {name: html_table(table) for name, table in tables(found).items()}
    more = [f'<p>{HEADINGS[name]}</p>{shown[name]}' for name in ('rivals', 'pairs', 'times') if name in shown]
    figures = [html_figure(folder / f'{name}.svg', caption) for name, caption in plots.items()]
    first, *others = report.headlines
    commands = ''.join(f'<li>{html.escape(question)}<br><code>{html.escape(command)}</code></li>'
                       for question, command in report.open)
    meaning, training = (f'<p>{html.escape(sentences)}</p>' for sentences in methods(found.margin))
    parts = [
        '<!DOCTYPE html>', '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f'<title>{TITLE}</title><style>{CSS}</style></head><body>',
        f'<h1>{html.escape(first)}</h1>', html_list(others) if others else '',
        f'<p>{html.escape(subject([row.first for row in found.rows]))}</p>',
        *(f'<p>{html.escape(line)}</p>' for line in report.planned), shown['answer'], *more, meaning,
        *figures[:1],
        '<h2>Answers</h2>',
        *(f'<h3>{html.escape(question)}</h3>{html_list(answer)}' for question, answer in report.answers),
        f'<h2>What these runs cannot answer</h2><ul>{commands}</ul>' if report.open else '',
        '<h2>Notes</h2>' + html_list(report.notes) if report.notes else '',
        '<h2>How training went</h2>', shown['training'], training,
        '<h2>Plots</h2>', *figures[1:],
        f'<h2>Made by</h2><p><code>{html.escape(report.command)}</code></p></body></html>']
    return '\n'.join(part for part in parts if part) + '\n'


# for W&B


def log_to_wandb(found, report, plots, folder):
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
    records = [record(row, found) for row in found.rows]
    first = found.rows[0].first
    run = wandb.init(
        project=first.config['wandb_project'], name=folder.name, group=first.info['corpus']['name'],
        job_type='compare', dir=folder, mode=mode, config=dict(command=report.command, folder=str(folder)))
    lines = [['The answer', line] for line in report.headlines]
    lines += [[question, line] for question, answer in report.answers for line in answer]
    run.log(dict(table=wandb.Table(list(records[0]), [list(line.values()) for line in records]),
                 answers=wandb.Table(['question', 'answer'], lines),
                 report=wandb.Html((folder / 'report.html').read_text(encoding='utf-8'), inject=False),
                 **{f'plots/{name}': wandb.Image(str(folder / f'{name}.png')) for name in plots}))
    run.summary.update({f'difference/{line["run"]}': line['difference'] for line in records
                        if line['difference'] is not None})
    run.finish()
