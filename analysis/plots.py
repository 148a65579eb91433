"""
The plots of a comparison. Each plot_* function takes the rows of runs.py and returns a matplotlib figure, or
None if the rows have nothing to show in it.

Curves differ in marker, line or panel, never in colour alone. If there may be many configs, each gets a
panel of its own, with the dense control in grey. The same runs give the same files, byte for byte.
"""

import math
import statistics
import textwrap
from collections import Counter

from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator

from analysis.families import comparisons
from analysis.findings import (
    FULL_WIDTH,
    GOALS,
    TARGET,
    by_note,
    curve_name,
    curves,
    drift_of,
    fastest_first,
    find_trends,
    front,
    in_scope,
    largest_drift,
)
from analysis.runs import TOKENS, simulated, subject, to_dense

MARKERS, LINES = 'osD^vP*X<>', ('-', '--', '-.', ':')
POINTS = 100  # of a line, at most: enough for a panel, and the file stays small
STYLE = {
    'font.size': 8, 'axes.titlesize': 8, 'figure.titlesize': 10, 'figure.dpi': 150,
    'figure.constrained_layout.use': True, 'axes.spines.top': False, 'axes.spines.right': False,
    'axes.grid': True, 'grid.alpha': 0.3, 'grid.linewidth': 0.5, 'axes.axisbelow': True,
    # without a salt ids are random; text as text, in whatever font the reader has, keeps files small
    'svg.hashsalt': 'compare', 'svg.fonttype': 'none'}
NO_DATE = dict.fromkeys(('Date', 'Creator'))

# what every figure has


def figure(rows, title, panels=1, columns=1, size=(8, 4.6), seeds=None, **shared):
    """
    An empty figure whose title names the corpus, and the list of its axes. seeds: to name in place of how
    many the rows have.
    """
    fig = Figure(figsize=size)
    lines = math.ceil(panels / columns)
    grid = fig.subplots(lines, columns, squeeze=False, **shared)
    for unused in grid.flat[panels:]:
        unused.remove()
    few, many = min(len(row.runs) for row in rows), max(len(row.runs) for row in rows)
    seeds = seeds or (f'{few} to {many} seeds' if few < many else f'{many} seed{"s" * (many > 1)}')
    corpus = '\n'.join(textwrap.wrap(f'{subject([row.first for row in rows])}, {seeds}', 110))
    fig.suptitle(f'{title}\n{corpus}')
    return fig, list(grid.flat[:panels])


def panels(rows, title, unit, below='step (updates made)', seeds=None):
    """A figure with a small panel for each row, named after it, four or five in a line, all on one scale."""
    columns = min(4 if len(rows) <= 12 else 5, len(rows))
    size = max(5, 2.6 * columns), 1.1 + 1.9 * math.ceil(len(rows) / columns)
    fig, axes = figure(rows, title, len(rows), columns, size, seeds, sharex=True, sharey=True)
    for i, (ax, row) in enumerate(zip(axes, rows)):
        ax.set_title('\n'.join(textwrap.wrap(row.label, 38)), fontsize=7)
        ax.tick_params(labelsize=7, labelbottom=i + columns >= len(rows))
    axes[0].xaxis.set_major_locator(MaxNLocator(4, integer=True))
    fig.supxlabel(below, fontsize=8)
    fig.supylabel(unit, fontsize=8)
    return fig, axes


def loss_unit(rows):
    units = {TOKENS.get(row.first.info['corpus']['tokenizer'], '') for row in rows}
    return f'nats per {units.pop() if len(units) == 1 else ""} token'.replace('  ', ' ')


def wrapped(row):
    """A row's label, broken into lines that leave room for a plot."""
    return '\n'.join(textwrap.wrap(row.label, 44))


def bar(ax, difference, y, **style):
    """Draw a mean with its interval, horizontally at height y; an open marker if it has none."""
    style = dict(marker='o', color='black', markersize=4.5) | style
    if difference.half is None:
        ax.plot(difference.mean, y, markerfacecolor='white', linestyle='', **style)
    else:
        ax.errorbar(difference.mean, y, xerr=difference.half, capsize=2.5, linewidth=1, linestyle='', **style)


# the answer


def plot_tradeoff(rows):
    """Validation loss against communications; bars are the intervals of the paired differences to dense."""
    notes = by_note(rows)
    fig, axes = figure(rows, 'Validation loss against communications', len(notes), len(notes),
                       (max(8, 4.5 * len(notes)), 5))
    for ax, (note, own) in zip(axes, notes.items()):
        draw_tradeoff(ax, own)
        ax.set_title(note.removeprefix(', '))
    axes[0].set_ylabel(f'validation loss ({loss_unit(rows)})')
    return fig


def curve_styles(rows):
    """{name of a curve: its style}"""
    names = [curve_name(curve[0]) for curve in curves(rows)]
    return {name: dict(marker=MARKERS[i % len(MARKERS)], color=f'{0.65 * i / max(1, len(names) - 1):.2f}',
                       markersize=5, label=name.removesuffix(rows[0].note)) for i, name in enumerate(names)}


def height(row):
    """
    A row's height in the plot: its dense control's mean loss plus the paired difference.

    That is its own mean loss, unless it lacks some of the control's seeds: these may all be higher or lower.
    """
    return row.control.loss + to_dense(row).mean if to_dense(row) else row.loss


def draw_tradeoff(ax, rows):
    """One recipe: a line for each curve, open markers for other placements of the same count."""
    lines, styles = curves(rows), curve_styles(rows)
    on_curve = [row for curve in lines for row in curve]
    # placements share their count, but not always what a pass really all-reduces
    observed = any(row not in on_curve for row in rows if not row.dense)
    beside = Counter()  # x of a row that is on no curve -> how many are there already
    for i, curve in enumerate(lines):
        aside = 0.16 * (i - (len(lines) - 1) / 2)  # so that intervals stand side by side
        style = styles[curve_name(curve[0])]
        own = [row for row in rows if not row.dense and curve_name(row) == curve_name(curve[0])]
        x = {row: (row.all_reduces['forward'] if observed else row.communications) + aside for row in own}
        ax.plot([x[row] for row in curve], list(map(height, curve)), linestyle=LINES[i % len(LINES)],
                zorder=3, **style)
        for row in own:
            if row not in curve:
                beside[x[row]] += 1
                x[row] += 0.3 * beside[x[row]]
                ax.plot(x[row], height(row), linestyle='', markerfacecolor='white', zorder=3,
                        **style | dict(label=None))
            difference = to_dense(row)
            if difference and difference.half is not None:
                ax.errorbar(x[row], height(row), difference.half, color=style['color'], capsize=2.5,
                            linewidth=1)
    if observed:
        ax.plot([], [], 'o', color='black', markerfacecolor='white', label='blocks in another order')
    mark_counts(ax, on_curve, observed)
    mark_references(ax, rows)
    # below the axes, where it hides nothing
    ax.legend(fontsize=7, title='dense plus the paired difference; bars: its 95% interval', title_fontsize=7,
              loc='upper center', bbox_to_anchor=(0.5, -0.2), ncols=2)


def mark_counts(ax, rows, observed):
    """Ticks at the rows' observed all-reduces, or at their communications with the all-reduces below."""
    if observed:
        names = {row.all_reduces['forward']: row.all_reduces['forward'] for row in rows}
        ax.set_xlabel('all-reduces observed in a forward pass')
    else:
        names = {row.communications: f'{row.communications}\n({row.all_reduces["forward"]})' for row in rows}
        ax.set_xlabel("communications by the guide's count\n(all-reduces observed in a forward pass)")
    ax.set_xticks(list(names), names.values())


def mark_references(ax, rows):
    """Draw the dense control, the margin above it, and the guide's limits if they apply."""
    for control in (row for row in rows if row.dense):
        ax.axhline(control.loss, color='black', linewidth=1, linestyle=(0, (6, 3)), label='dense control')
        if control.margin:
            ax.axhspan(control.loss, control.loss + control.margin, color='0.88', zorder=0,
                       label=f'within the margin, {control.margin:g}')
    if all(in_scope(row.first) for row in rows):
        for limit in sorted({TARGET, *(limit for *_, limit in GOALS)}):
            ax.axhline(limit, color='0.4', linewidth=0.7, linestyle=':')
            ax.text(1.01, limit, f"guide's\n{limit:.2f}", transform=ax.get_yaxis_transform(), fontsize=7,
                    va='center')


def plot_differences(rows):
    """Each row's paired difference to dense with its interval, and each seed's."""
    shown = [row for row in rows if to_dense(row)]
    if not shown:
        return None
    fig, (ax,) = figure(shown, 'Validation loss minus the dense control of the same seed',
                        size=(8, 1.7 + 0.3 * len(shown)))
    for y, row in enumerate(shown):
        seeds = [loss - row.control.losses[seed] for seed, loss in row.losses.items()
                 if seed in row.control.losses]
        ax.plot(seeds, [y] * len(seeds), '|', color='0.45', markersize=8)
        bar(ax, to_dense(row), y)
    finish_forest(ax, [f'{wrapped(row)}  (n={to_dense(row).n})  {row.word}' for row in shown], shown)
    ax.set_xlabel(f'difference ({loss_unit(rows)}); mean and 95% interval, a stroke for each seed; grey: '
                  'the margin')
    return fig


def finish_forest(ax, names, rows):
    """Draw a line at 0, the margin, and a name at each height, the first on top."""
    ax.axvline(0, color='black', linewidth=0.8)
    ax.axvspan(0, rows[0].margin or 0, color='0.9', zorder=0)
    ax.set_yticks(range(len(names)), names, fontsize=7)
    ax.set_ylim(len(names) - 0.4, -0.6)
    ax.grid(visible=False, axis='y')


def plot_placement(rows):
    """The comparisons of rows that differ in one thing only: order, merge, which sync is dropped."""
    kinds = dict(placement=('o', 'alternating minus clustered'), merge=('s', 'mean minus sum'),
                 sync=('^', "MLP's sync dropped minus attention's"))
    found = [one for one in comparisons(rows) if one.difference and one.kind in kinds]
    if not found:
        return None
    fig, (ax,) = figure(rows, 'Equal communications: order of the blocks, merge, which sync is dropped',
                        size=(9, 1.7 + 0.42 * len(found)))
    for y, one in enumerate(found):
        bar(ax, one.difference, y, marker=kinds[one.kind][0])
    names = [f'{one.first.label}\nminus {one.second.blocks}  (n={one.difference.n})'
             for one in found]
    finish_forest(ax, names, [one.first for one in found])
    for kind, (marker, label) in kinds.items():
        if any(one.kind == kind for one in found):
            ax.plot([], [], marker, color='black', label=label)
    ax.legend(fontsize=7)
    ax.set_xlabel(f'difference in validation loss ({loss_unit(rows)}), paired by seed, mean and 95% interval')
    return fig


def plot_pareto(rows):
    """Paired difference against predicted step time, the Pareto front joined."""
    notes = by_note(fastest_first(rows))
    if not notes:
        return None
    fig, axes = figure(rows, 'Validation loss minus dense, against the predicted time of a step', len(notes),
                       len(notes), (max(8, 4.5 * len(notes)), 4.8))
    for ax, (note, own) in zip(axes, notes.items()):
        best, styles = front(own), curve_styles(own)
        named = {row for curve in curves(own) for row in curve if row.plain}
        ax.plot([row.seconds * 1e3 for row in best], [to_dense(row).mean for row in best], color='0.5',
                linewidth=1, drawstyle='steps-post', label='Pareto front, by verdict')
        for row in own:
            style = styles[curve_name(row)] | dict(label=None)
            difference, x = to_dense(row), row.seconds * 1e3
            ax.errorbar(x, difference.mean, difference.half, capsize=2.5, linewidth=0.8,
                        markerfacecolor=style['color'] if row in best else 'white', **style)
            if row in best or row in named:
                ax.annotate(str(row.communications), (x, difference.mean), xytext=(5, 4), fontsize=7,
                            textcoords='offset points')
        for style in styles.values():
            ax.plot([], [], linestyle='', **style)
        control = own[0].control
        if control and control.seconds is not None:
            ax.plot(control.seconds * 1e3, 0, 'x', color='black', label='dense control, data-parallel alone')
        ax.plot([], [], 'o', color='black', markerfacecolor='white', label='open: not on the front')
        ax.axhline(0, color='black', linewidth=0.8)
        ax.set_title(note.removeprefix(', '))
        ax.set_xlabel('predicted milliseconds a step; numbers: communications')
        ax.legend(fontsize=7)
    axes[0].set_ylabel(f'difference ({loss_unit(rows)})')
    return fig


def plot_width(rows):
    """Paired differences against width, a panel for each config; a line for each seed goes on to GPT-2's."""
    trends = [trend for trend in find_trends(rows) if len(trend.widths) > 1]
    if not trends:
        return None
    columns = min(4, len(trends))
    shown = [row for trend in trends for row in trend.rows]
    size = max(6, 2.8 * columns), 1.4 + 2.2 * math.ceil(len(trends) / columns)
    fig, axes = figure(shown, 'Validation loss minus dense, against the width of the model', len(trends),
                       columns, size, sharey=True, sharex=True)
    for ax, trend in zip(axes, trends):
        longest = max(trend.tokens)
        draw(ax, [(width, difference) for width, tokens, difference in trend.all_points if tokens == longest],
             'o', color='black', markersize=3)
        ends = [trend.widths[0], max(trend.widths[-1], FULL_WIDTH)]
        for values in (trend.fits[0] @ trend.columns(ends, [longest] * 2).T).tolist():
            ax.plot(ends, values, color='0.6', linewidth=0.7)
        new = trend.prediction(ends[1])
        ax.errorbar(ends[1], new.mean, new.half, color='black', marker='D', markerfacecolor='white',
                    markersize=4, capsize=2.5, linewidth=1)
        ax.axhline(0, color='black', linewidth=0.5)
        ax.set_xscale('log', base=2)
        ax.set_xticks([*trend.widths, FULL_WIDTH], [*map(str, trend.widths), str(FULL_WIDTH)])
        ax.set_title(f'{trend.rows[0].communications}: {trend.name}', fontsize=7)
    fig.supxlabel('n_embd; a line for each seed; diamond: its 95% prediction interval for a new seed',
                  fontsize=8)
    fig.supylabel(f'difference ({loss_unit(rows)})', fontsize=8)
    return fig


def plot_tuning(rows):
    """Loss against the tuned key; a stroke for each seed, a square for the best value; grey is dense."""
    shown = [row for row in rows if row.tuning and row.tuning.compared]
    if not shown:
        return None
    key, seeds = shown[0].tuning.tuned.key, shown[0].tuning.tuned.tuning_seeds
    fig, axes = panels(shown, f'Loss of the tuning seeds against {key}: the line is their mean, the square '
                       'its lowest; grey is dense', f'validation loss ({loss_unit(rows)})', key,
                       f'seeds {", ".join(map(str, seeds))}')
    values = sorted({value for row in shown for value in row.tuning.means})
    for ax, row in zip(axes, shown):
        dense = row.control or row
        if dense.tuning:
            draw(ax, list(dense.tuning.means.items()), color='0.7', linewidth=3)
        means = row.tuning.means
        draw(ax, list(means.items()), 'o-', color='black', markersize=3.5, linewidth=1)
        draw(ax, [(value, row.tuning.runs[value][seed].loss) for value in means
                  for seed in seeds], '_', color='0.4', markersize=6)
        best = row.tuning.best
        ax.plot(best, means[best], 's', color='black', markersize=7, markerfacecolor='white')
        if min(values) > 0:
            ax.set_xscale('log')
        ax.minorticks_off()
        ax.set_xticks(values, [f'{value:g}' for value in values])
    return fig


# how training went


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


def draw(ax, curve, *line, **style):
    if curve:
        ax.plot(*zip(*curve), *line, **style)


def plot_curves(rows):
    """Every run's training loss, smoothed, and the mean validation loss; the dense control's is grey."""
    fig, axes = panels(rows, 'Training curves: lines are train loss of each run, smoothed; dots are mean '
                       'validation loss; grey is dense', f'loss ({loss_unit(rows)})')
    settled = []  # what the panels must show; the first descent would flatten the rest
    for ax, row in zip(axes, rows):
        draw(ax, mean_curve(map(train_curve, controls(row))), color='0.7', linewidth=2.5)
        for run in row.runs.values():
            curve = train_curve(run)
            draw(ax, curve, color='black', linewidth=0.5, alpha=0.7)
            settled += [loss for step, loss in curve if step >= 0.2 * run.config['max_iters']]
        draw(ax, mean_curve([val_curve(run) for run in row.runs.values()]), 'o', color='black', markersize=3)
        settled += row.losses.values()
    margin = 0.05 * (max(settled) - min(settled)) or 0.1
    axes[0].set_ylim(min(settled) - margin, max(settled) + margin)
    return fig


def plot_difference_curves(rows):
    """Validation loss minus dense by step: every seed, and their mean."""
    shown = [row for row in rows if to_dense(row)]
    if not shown:
        return None
    fig, axes = panels(shown, 'Validation loss minus the dense control of the same seed: thin lines are '
                       'seeds, dots their mean', f'difference ({loss_unit(rows)})')
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


def plot_stability(rows):
    """Every run's gradient norm by step, and its loss spikes."""
    shown = [row for row in rows if any(run.series('grad_norm') for run in row.runs.values())]
    if not shown:
        return None
    fig, axes = panels(shown, 'Stability: gradient norm of each run before clipping; a triangle is a loss '
                       'spike; grey is dense', 'gradient norm')
    axes[0].set_yscale('log')
    axes[0].yaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), major_formatter='{x:g}')
    axes[0].minorticks_off()
    for ax, row in zip(axes, shown):
        norms = mean_curve(run.series('grad_norm').items() for run in controls(row))
        draw(ax, thinned(norms), color='0.7', linewidth=2.5)
        for run in row.runs.values():
            norms = run.series('grad_norm')
            draw(ax, highest(list(norms.items())), color='black', linewidth=0.5, alpha=0.7)
            draw(ax, [(step, norms[step]) for step in run.spikes if step in norms], 'v', color='black',
                 markersize=5)
    return fig


def plot_speed(rows):
    """Tokens per second of each row, as bars; a stroke for each run."""
    shown = [row for row in rows if row.mean(lambda run: run.tokens_per_sec)]
    if not shown:
        return None
    fig, (ax,) = figure(shown, 'Training speed', size=(8, 1.6 + 0.28 * len(shown)))
    speeds = [row.mean(lambda run: run.tokens_per_sec) for row in shown]
    ax.barh(range(len(shown)), speeds, height=0.65, color='0.8', edgecolor='black', linewidth=0.7)
    for y, (row, speed) in enumerate(zip(shown, speeds)):
        own = list(row.values(lambda run: run.tokens_per_sec).values())
        ax.plot(own, [y] * len(own), '|', color='black', markersize=7)
        ax.annotate(f'{speed:,.0f}', (max(own), y), xytext=(6, 0), textcoords='offset points', va='center',
                    fontsize=7)
    ax.set_yticks(range(len(shown)), [wrapped(row) for row in shown], fontsize=7)
    ax.set_ylim(len(shown) - 0.4, -0.6)
    ax.margins(x=0.12)
    ax.grid(visible=False, axis='y')
    caveat = ' (simulated ranks: no communication is saved)' if simulated(rows) else ''
    ax.set_xlabel(f'tokens per second, a stroke for each run{caveat}')
    return fig


def drift_panels(rows, title, unit, which):
    """
    (figure, axes) of the first or second list of drift_of(), mean over runs, against depth; (None, []) if
    nothing drifts. A sublayer that reads a replicated stream has no point.
    """
    measured = {row: list(row.values(drift_of).values()) for row in rows if row.mean(largest_drift)}
    if not measured:
        return None, []
    fig, axes = panels(list(measured), title, unit,
                       'depth in layers: what attention reads at whole numbers, what the MLP reads at halves')
    for ax, runs in zip(axes, measured.values()):
        means = [statistics.mean(values) if all(values) else math.nan
                 for values in zip(*(run[which] for run in runs))]
        ax.plot([i / 2 for i in range(len(means))], means, 'o-', color='black', markersize=2.5, linewidth=0.8)
    return fig, axes


def plot_drift(rows):
    """How far apart the ranks' streams are that each sublayer reads, against depth."""
    fig, axes = drift_panels(rows, 'Drift at the last evaluation, of the streams that a sublayer reads',
                             '||d_r|| / ||c||', 0)
    for ax in axes[:1]:
        ax.set_yscale('log')
        ax.yaxis.set(major_formatter='{x:g}')
        ax.minorticks_off()
    return fig


def plot_drift_cosine(rows):
    """Whether the ranks' streams drift the same way, against depth: the cosine of d_r and d_s."""
    fig, axes = drift_panels(rows, "Cosine of two ranks' drifts at the last evaluation", 'cosine', 1)
    for ax in axes:
        ax.axhline(0, color='black', linewidth=0.5)
    return fig


PLOTS = dict(
    loss_vs_communications=plot_tradeoff, paired_differences=plot_differences, tuning=plot_tuning,
    placement=plot_placement, pareto=plot_pareto, width_trend=plot_width, drift=plot_drift,
    drift_cosine=plot_drift_cosine, training_curves=plot_curves, difference_by_step=plot_difference_curves,
    stability=plot_stability, tokens_per_sec=plot_speed)


def draw_all(rows, folder):
    """
    Write each plot that the rows have as PNG and SVG, and remove what an earlier comparison left of others.

    Returns {name: what it shows}.
    """
    drawn = {}
    with rc_context(STYLE):
        for name, plot in PLOTS.items():
            fig, files = plot(rows), [folder / f'{name}.png', folder / f'{name}.svg']
            if fig is None:
                for file in files:
                    file.unlink(missing_ok=True)
                continue
            # savefig would lay it out and draw it several times, which takes most of the time
            fig.get_layout_engine().execute(fig)
            fig.set_layout_engine('none')
            FigureCanvasAgg(fig).print_png(files[0])
            FigureCanvasSVG(fig).print_svg(files[1], metadata=NO_DATE)
            drawn[name] = ' '.join(plot.__doc__.split())
    return drawn
