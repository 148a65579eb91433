"""
What the plots of a comparison share: the sheet that they are drawn on, panels, names, bars, files.

A figure belongs to the report, or to a paper: then it has the paper's width with text of 7 to 8 points, no
title inside, its fonts embedded, and a suggested caption in a file beside it. The same runs give the same
files, byte for byte, whatever matplotlib's settings are here.
"""

import math
import textwrap
from dataclasses import dataclass
from itertools import groupby

from matplotlib import style
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_pdf import FigureCanvasPdf
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import ScaledTranslation

from analysis.runs import TOKENS, subject

STYLE = {
    'font.size': 8, 'axes.titlesize': 8, 'axes.labelsize': 8, 'xtick.labelsize': 7, 'ytick.labelsize': 7,
    'figure.titlesize': 10, 'figure.dpi': 150,
    'figure.constrained_layout.use': True, 'axes.spines.top': False, 'axes.spines.right': False,
    'axes.grid': True, 'grid.alpha': 0.3, 'grid.linewidth': 0.5, 'axes.axisbelow': True,
    # without a salt ids are random; text as text, in whatever font the reader has, keeps files small
    'svg.hashsalt': 'compare', 'svg.fonttype': 'none'}
PAPER = {'figure.dpi': 300, 'svg.fonttype': 'path', 'pdf.fonttype': 42}  # 42 embeds the font as TrueType
CHARACTERS = 16  # of 7 points in an inch
CANVASES = dict(png=(FigureCanvasAgg, {}), svg=(FigureCanvasSVG, dict.fromkeys(('Date', 'Creator'))),
                pdf=(FigureCanvasPdf, dict(CreationDate=None)))


@dataclass(frozen=True)
class Sheet:
    """What figures are drawn on. width: of a paper's figures, in inches; None: the report's, as it likes"""
    width: float | None = None

    @property
    def paper(self):
        return self.width is not None

    def size(self, width, height):
        """(width, height) in inches of a figure that is so wide in the report."""
        return (self.width if self.paper else width), height

    def wrap(self, text, inches):
        """Text broken into lines that fit into so many inches of the report, or their share of a paper."""
        return wrapped(text, inches * self.width / 8 if self.paper else inches)

    def note(self, words):
        """What the report says inside a figure, and a paper in its caption."""
        return '' if self.paper else words


REPORT = Sheet()


def wrapped(text, inches):
    """Text of 7 points broken into lines that fit into so many inches."""
    bound = text.replace(' x ', '\xa0x\xa0')  # the spaces of a pattern's 'x 12' are no place to break
    return '\n'.join(textwrap.wrap(bound, max(14, int(CHARACTERS * inches))))


# panels


def described(rows, seeds=None):
    """What rows are of, in words. seeds: to name in place of how many the rows have"""
    few, many = min(len(row.runs) for row in rows), max(len(row.runs) for row in rows)
    seeds = seeds or (f'{few} to {many} seeds' if few < many else f'{many} seed{"s" * (many > 1)}')
    return f'{subject([row.first for row in rows])}, {seeds}'


def figure(rows, title, sheet, size, panels=1, columns=1, seeds=None, **shared):
    """An empty figure, whose title in the report names the corpus, and the list of its axes."""
    fig = Figure(figsize=size)
    lines = math.ceil(panels / columns)
    grid = fig.subplots(lines, columns, squeeze=False, **shared)
    for unused in grid.flat[panels:]:
        unused.remove()
    if not sheet.paper:
        fig.suptitle(f'{title}\n' + '\n'.join(textwrap.wrap(described(rows, seeds), 104)))
    return fig, list(grid.flat[:panels])


def panels(rows, title, unit, sheet, below='step (updates made)', seeds=None):
    """A figure with a small panel for each row, named after it, all on one scale."""
    if sheet.paper:
        columns = min(len(rows), max(2 if len(rows) <= 8 else 3, int(sheet.width / 1.6)))
        lines = math.ceil(len(rows) / columns)
        size = sheet.width, 0.7 + 1.4 * lines
        room = sheet.width / columns - 0.3
    else:
        columns = min(4 if len(rows) <= 12 else 5, len(rows))
        size = max(8, 2.6 * columns), 1.1 + 1.9 * math.ceil(len(rows) / columns)
        room = size[0] / columns - 0.2
    fig, axes = figure(rows, title, sheet, size, len(rows), columns, seeds, sharex=True, sharey=True)
    for ax, row in zip(axes, rows):
        name = short_label(row, rows) if sheet.paper else row.label
        ax.set_title(wrapped(name, room), fontsize=7)
        ax.tick_params(labelsize=7, labelbottom=True)  # also with a panel below: all read alike
    axes[0].xaxis.set_major_locator(MaxNLocator(4 if room > 1.5 else 2, integer=True))
    fig.supxlabel(sheet.wrap(below, 8), fontsize=8)
    fig.supylabel(unit, fontsize=8)
    return fig, axes


def short_label(row, rows):
    """A row's name among rows without what it communicates."""
    size = f', tp_size {row.tp_size}' * (len({other.tp_size for other in rows} - {1}) > 1 and row.tp_size > 1)
    note = row.note * (len({other.note for other in rows}) > 1)
    return row.called or row.blocks + size + note


def loss_unit(rows):
    units = {TOKENS.get(row.first.info['corpus']['tokenizer'], '') for row in rows}
    return f'nats per {units.pop() if len(units) == 1 else ""} token'.replace('  ', ' ')


def draw(ax, curve, *line, **style):
    if curve:
        ax.plot(*zip(*curve), *line, **style)


def legend_below(ax, sheet, **options):
    """A legend under the axes and their label, where it hides nothing."""
    names = [name.get_text() for name in ax.get_xticklabels()] + ['']
    lines = max(name.count('\n') for name in names) + ax.get_xlabel().count('\n')
    down = ScaledTranslation(0, -0.5 - 0.14 * lines, ax.figure.dpi_scale_trans)  # inches
    usual = dict(loc='upper center', bbox_to_anchor=(0.5, 0), ncols=1 if sheet.paper else 2)
    ax.legend(fontsize=7, title_fontsize=7, bbox_transform=ax.transAxes + down, **usual | options)


# means with their intervals, one below the other


def bar(ax, difference, y, **style):
    """Draw a mean with its interval, horizontally at height y; an open marker if it has none."""
    style = dict(marker='o', color='black', markersize=4.5) | style
    if difference.half is None:
        ax.plot(difference.mean, y, markerfacecolor='white', linestyle='', **style)
    else:
        ax.errorbar(difference.mean, y, xerr=difference.half, capsize=2.5, linewidth=1, linestyle='', **style)


def seed_differences(first, second):
    """A row's losses minus another's, of the seeds that both have."""
    return [loss - second.losses[seed] for seed, loss in first.losses.items() if seed in second.losses]


def strokes(ax, values, y):
    """A stroke for each seed."""
    ax.plot(values, [y] * len(values), '|', color='0.45', markersize=8)


def forest_height(names, sheet):
    """The height in inches of names one below the other, with room for the axes."""
    lines = max(1 + name.count('\n') for name in names)
    return (0.9 if sheet.paper else 1.4) + (0.06 + 0.125 * lines) * len(names)


def finish_forest(ax, names, rows, sheet):
    """Draw a line at 0, the margin, and a name at each height, the first on top."""
    ax.axvline(0, color='black', linewidth=0.8)
    ax.axvspan(0, rows[0].margin or 0, color='0.9', zorder=0)
    ax.set_yticks(range(len(names)), names, fontsize=7)
    ax.set_ylim(len(names) - 0.4, -0.6)
    ax.grid(visible=False, axis='y')
    ax.xaxis.set_major_locator(MaxNLocator(3 if sheet.paper else 6))


def group_heights(ax, labels):
    """Part the heights where their label changes, and write it once for each group, on the right."""
    y = 0
    for label, group in groupby(labels):
        n = len(list(group))
        if y:
            ax.axhline(y - 0.5, color='0.6', linewidth=0.6)
        ax.text(1.01, y + (n - 1) / 2, label, transform=ax.get_yaxis_transform(), fontsize=7, va='center')
        y += n


# files


def write_figure(fig, folder, name, formats):
    # savefig would lay it out and draw it several times, which takes most of the time
    for _ in range(1 + any(ax.get_legend() for ax in fig.axes)):  # a legend below moves with its axes
        fig.get_layout_engine().execute(fig)
    dpi = fig.dpi
    fig.set_layout_engine('none')
    for form in formats:
        canvas, metadata = CANVASES[form]
        fig.set_dpi(dpi)  # a PDF's is 72, and would stay
        getattr(canvas(fig), f'print_{form}')(folder / f'{name}.{form}', metadata=metadata)


def settings(sheet):
    """The context in which to draw: matplotlib's own defaults and ours, and nothing of a matplotlibrc."""
    return style.context(['default', STYLE | (PAPER if sheet.paper else {})])
