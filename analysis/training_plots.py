"""
The plots of how training went, a panel for each row; plots.py has those of the answer.

Each plot_* function takes the Findings and a Sheet and returns a figure, or None if there is nothing to show.
"""

import math
import statistics

from matplotlib.ticker import LogLocator, MaxNLocator

from analysis.figures import REPORT, draw, figure, forest_height, loss_unit, panels, short_label
from analysis.inside import diagnosed
from analysis.runs import simulated, to_dense

POINTS = 100  # of a line, at most: enough for a panel, and the file stays small


def smooth(values, width):
    """Centred moving mean over 2 width + 1 values; the window shrinks at the ends."""
    return [statistics.mean(values[max(0, i - width): i + width + 1]) for i in range(len(values))]


def thinned(points):
    """At most POINTS of a list, the last among them."""
    every = max(1, math.ceil(len(points) / POINTS))
    return points[(len(points) - 1) % every::every]


def highest(points):
    """At most POINTS of a curve [(step, value)]: the highest of each window, so that no peak is lost."""
    every = max(1, math.ceil(len(points) / POINTS))
    return [max(points[i:i + every], key=lambda point: point[1]) for i in range(0, len(points), every)]


def train_curve(run):
    """A run's training loss, smoothed: [(step, loss)]."""
    losses = run.series('train_loss')
    return thinned(list(zip(losses, smooth(list(losses.values()), len(losses) // 40))))


def val_curve(run):
    return thinned(run.val_losses)


def mean_curve(curves):
    """The mean of curves [(step, value)] at the steps that all of them have, as a curve."""
    curves = [dict(curve) for curve in curves]
    return [(step, statistics.mean(curve[step] for curve in curves)) for step in (curves[0] if curves else [])
            if all(step in curve for curve in curves)]


def controls(row):
    """The runs of a row's dense control, which for a control is itself, of the row's seeds."""
    control = row if row.dense else row.control
    return [run for seed, run in control.runs.items() if seed in row.runs] if control else []


def plot_curves(found, sheet=REPORT):
    """Training loss of each run, smoothed, and mean validation loss as dots; the dense control is grey."""
    rows = found.rows
    fig, axes = panels(rows, 'Training curves: lines are train loss of each run, smoothed; dots are mean '
                       'validation loss; grey is dense', f'loss ({loss_unit(rows)})', sheet)
    settled = []  # what the panels must show; the first descent would flatten the rest
    for ax, row in zip(axes, rows):
        draw(ax, mean_curve(map(train_curve, controls(row))), color='0.7', linewidth=2.5)
        for run in row.runs.values():
            curve = train_curve(run)
            draw(ax, curve, color='black', linewidth=0.5, alpha=0.7)
            settled += [loss for step, loss in curve if step >= 0.2 * (run.at or run.config['max_iters'])]
        draw(ax, mean_curve([val_curve(run) for run in row.runs.values()]), 'o', color='black', markersize=3)
        settled += row.losses.values()
    margin = 0.05 * (max(settled) - min(settled)) or 0.1
    axes[0].set_ylim(min(settled) - margin, max(settled) + margin)
    return fig


def plot_difference_curves(found, sheet=REPORT):
    """Validation loss minus dense by step: thin lines are seeds, dots their mean."""
    shown = [row for row in found.rows if to_dense(row)]
    if not shown:
        return None
    fig, axes = panels(shown, 'Validation loss minus the dense control of the same seed: thin lines are '
                       'seeds, dots their mean', f'difference ({loss_unit(shown)})', sheet)
    for ax, row in zip(axes, shown):
        seeds = []
        for seed, run in row.runs.items():
            if seed in row.control.runs:
                dense = dict(val_curve(row.control.runs[seed]))
                seeds.append([(step, loss - dense[step]) for step, loss in val_curve(run) if step in dense])
                draw(ax, seeds[-1], color='0.5', linewidth=0.6)
        draw(ax, mean_curve(seeds), 'o-', color='black', markersize=3, linewidth=1)
        ax.axhline(0, color='black', linewidth=0.5)
    return fig


def log_scale(ax):
    """Have axes, and those that share its heights, on a log scale with plain numbers."""
    ax.set_yscale('log')
    ax.yaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), major_formatter='{x:g}')
    ax.minorticks_off()


def plot_stability(found, sheet=REPORT):
    """Every run's gradient norm by step before clipping, its loss spikes as triangles; dense is grey."""
    shown = [row for row in found.rows if any(run.series('grad_norm') for run in row.runs.values())]
    if not shown:
        return None
    fig, axes = panels(shown, 'Stability: gradient norm of each run before clipping; a triangle is a loss '
                       'spike; grey is dense', 'gradient norm', sheet)
    log_scale(axes[0])
    for ax, row in zip(axes, shown):
        norms = mean_curve(run.series('grad_norm').items() for run in controls(row))
        draw(ax, thinned(norms), color='0.7', linewidth=2.5)
        for run in row.runs.values():
            norms = run.series('grad_norm')
            draw(ax, highest(list(norms.items())), color='black', linewidth=0.5, alpha=0.7)
            draw(ax, [(step, norms[step]) for step in run.spikes if step in norms], 'v', color='black',
                 markersize=5)
    return fig


def plot_speed(found, sheet=REPORT):
    """Tokens per second of each row, as bars; a stroke for each run."""
    shown = [row for row in found.rows if row.mean(lambda run: run.tokens_per_sec)]
    if not shown:
        return None
    names = [sheet.wrap(short_label(row, shown) if sheet.paper else row.label, 4 if sheet.paper else 2.75)
             for row in shown]
    fig, (ax,) = figure(shown, 'Training speed', sheet, sheet.size(8, forest_height(names, sheet)))
    speeds = [row.mean(lambda run: run.tokens_per_sec) for row in shown]
    ax.barh(range(len(shown)), speeds, height=0.65, color='0.8', edgecolor='black', linewidth=0.7)
    for y, (row, speed) in enumerate(zip(shown, speeds)):
        own = list(row.values(lambda run: run.tokens_per_sec).values())
        ax.plot(own, [y] * len(own), '|', color='black', markersize=7)
        ax.annotate(f'{speed:,.0f}', (max(own), y), xytext=(6, 0), textcoords='offset points', va='center',
                    fontsize=7)
    ax.set_yticks(range(len(shown)), names, fontsize=7)
    ax.set_ylim(len(shown) - 0.4, -0.6)
    ax.margins(x=0.3 if sheet.paper else 0.12)
    ax.xaxis.set(major_locator=MaxNLocator(3 if sheet.paper else 8), major_formatter='{x:,.0f}')
    ax.grid(visible=False, axis='y')
    caveat = ' (simulated ranks: no communication is saved)' if simulated(found.rows) else ''
    ax.set_xlabel(sheet.wrap(f'tokens per second{sheet.note(", a stroke for each run")}{caveat}', 5))
    return fig


# against depth

DEPTH = 'depth in layers: what attention reads at whole numbers, what the MLP reads at halves'


def by_depth(values):
    """A list over sublayers as a curve [(depth in layers, value)]."""
    return [(i / 2, value) for i, value in enumerate(values) if value is not None]


def depth_panels(found, title, units, sheet):
    """
    (figure, [(row's measures, dense's, upper axes, lower axes)]) of the rows with diagnostics, (None, []) if
    there are none. The dense control has panels of its own only if it is alone. units: of upper and lower
    """
    measured = {row: own for row in found.rows if (own := diagnosed(row))}
    shown = [row for row in measured if not row.dense] or list(measured)
    if not shown:
        return None, []
    columns = min(len(shown), max(2, int(sheet.width / 1.6)) if sheet.paper else 5)
    bands = math.ceil(len(shown) / columns)
    size = sheet.size(max(8, 2.2 * columns), 1 + 3.4 * bands)
    fig, axes = figure(shown, title, sheet, size, 2 * bands * columns, columns, sharex=True)
    drawn = []
    for i, row in enumerate(shown):
        at = i // columns * 2 * columns + i % columns
        pair = axes[at], axes[at + columns]
        for which, (ax, unit) in enumerate(zip(pair, units)):
            if i:
                ax.sharey(drawn[0][2 + which])
            if i % columns:
                ax.tick_params(labelleft=False)
            else:
                ax.set_ylabel(unit, fontsize=7)
        pair[0].set_title(sheet.wrap(short_label(row, shown) if sheet.paper else row.label, 2), fontsize=7)
        pair[1].tick_params(labelbottom=True)
        drawn.append((measured[row], measured.get(row.control, {}), *pair))
    for ax in axes[2 * columns * (bands - 1):]:
        if not any(ax in one for one in drawn):
            ax.remove()
    axes[0].xaxis.set_major_locator(MaxNLocator(4, integer=True))
    fig.supxlabel(sheet.wrap(DEPTH, 8), fontsize=8)
    return fig, drawn


def plot_ranks_apart(found, sheet=REPORT):
    """
    How far apart the ranks' streams are, by sublayer: dispersion 0 is one stream, CKA 1 is alike but for a
    rotation; if the effective rank of all ranks is that of one, the others add nothing.
    """
    units = 'dispersion (dots),\nCKA (dashes)', 'effective rank of\none stream (dots),\nof all (dashes)'
    fig, drawn = depth_panels(found, "How far apart the ranks' streams are at the last evaluation; grey is "
                              'dense', units, sheet)
    for own, dense, upper, lower in drawn:
        draw(upper, by_depth(own.get('cka', [])), '--', color='black', linewidth=1)
        draw(upper, by_depth(own['dispersion']), 'o-', color='black', markersize=2.5, linewidth=0.8)
        draw(lower, by_depth(dense.get('rank_one', [])), color='0.7', linewidth=2.5)
        draw(lower, by_depth(own['rank_all']), '--', color='black', linewidth=1)
        draw(lower, by_depth(own['rank_one']), 'o-', color='black', markersize=2.5, linewidth=0.8)
    return fig


def plot_lone_ranks(found, sheet=REPORT):
    """
    What is known at each depth: the loss of the head on the stream with all that earlier sublayers added, and
    on what a rank reads. Where dashes lie above dots, it lacks what other ranks, or an attention beside the
    MLP, added. Below, where the gradient fades.
    """
    units = (f'loss of the head\n({loss_unit(found.rows)}):\nstream synced (dots),\na rank alone (dashes)',
             'gradient norm:\nattention (dots),\nMLP (dashes)')
    fig, drawn = depth_panels(found, 'What a rank alone knows, and gradients, at the last evaluation; '
                              'grey is dense', units, sheet)
    for own, dense, upper, lower in drawn:
        draw(upper, by_depth(dense.get('lens_synced', [])), color='0.7', linewidth=2.5)
        draw(upper, by_depth(own['lens_synced']), 'o-', color='black', markersize=2.5, linewidth=0.8)
        draw(upper, by_depth(own['lens_alone']), 's--', color='black', markersize=2.5, linewidth=1,
             markerfacecolor='white')
        for kind, line in enumerate(('o-', 's--')):  # the last entry is the embeddings'
            draw(lower, by_depth(dense.get('grad', [])[:-1])[kind::2], line[1:], color='0.7', linewidth=2)
            draw(lower, by_depth(own['grad'][:-1])[kind::2], line, color='black', markersize=2.5,
                 linewidth=0.8, markerfacecolor='black' if kind == 0 else 'white')
    for *_, lower in drawn[:1]:
        log_scale(lower)
    return fig


def plot_drift(found, sheet=REPORT):
    """
    How far apart the ranks' streams are that each sublayer reads, against depth, in runs of an earlier
    version: ||d_r|| / ||c||, which is large where the embedding is small.
    """
    measured = {row: drifts for row in found.rows
                if any(map(any, drifts := [run.last['drift'] for run in row.runs.values()
                                           if 'drift' in run.last]))}
    if not measured:
        return None
    fig, axes = panels(list(measured), 'Drift at the last evaluation, of the streams that a sublayer reads',
                       '||d_r|| / ||c||', sheet, DEPTH)
    for ax, drifts in zip(axes, measured.values()):
        # a sublayer that reads a replicated stream has no point
        means = [statistics.mean(values) if all(values) else math.nan for values in zip(*drifts)]
        draw(ax, by_depth(means), 'o-', color='black', markersize=2.5, linewidth=0.8)
    log_scale(axes[0])
    return fig
