"""
The plots of a comparison: those of the answer, and the list of all. training_plots.py has the others.

Each plot_* function takes the Findings and a Sheet and returns a matplotlib figure, or None if there is
nothing to show in it. Its docstring is the figure's caption. Curves differ in marker, line or panel, never in
colour alone. If there may be many configs, each gets a panel or a line of its own.
"""

import math
from collections import Counter
from typing import NamedTuple

from matplotlib.ticker import LogLocator

from analysis.answers import asked, at_equal
from analysis.figures import (
    REPORT,
    bar,
    described,
    draw,
    figure,
    finish_forest,
    forest_height,
    group_heights,
    legend_below,
    loss_unit,
    panels,
    seed_differences,
    settings,
    short_label,
    strokes,
    wrapped,
    write_figure,
)
from analysis.findings import (
    FULL_WIDTH,
    GOALS,
    TARGET,
    by_note,
    count,
    curve_name,
    curves,
    fastest_first,
    find_trends,
    front,
    in_scope,
)
from analysis.runs import to_dense
from analysis.training_plots import (
    plot_curves,
    plot_difference_curves,
    plot_drift,
    plot_lone_ranks,
    plot_ranks_apart,
    plot_speed,
    plot_stability,
)
from configurator import pattern

# the last ones are stars of 4, 3, 6 and 3 points
MARKERS, LINES = [*'osD^vP*X<>dph', (4, 1, 0), (3, 1, 0), (6, 1, 0), (3, 1, 180)], ('-', '--', '-.', ':')
FILLS = 'full', 'left', 'bottom', 'right', 'top'

# loss against communications


class BlockSet(NamedTuple):
    """Rows with one mark: a curve through the guide's nets, or the same blocks in one order or several."""
    name: str
    curve: list  # Rows, joined by a line, most all-reduces first
    others: list  # the blocks of one of these in another order

    @property
    def rows(self):
        return self.curve + self.others


def block_sets(rows):
    """The BlockSets of the rows of one recipe."""
    found, lines = {}, curves(rows)
    on_curve = {row for curve in lines for row in curve}
    for curve in lines:
        name = curve_name(curve[0]) if len(curve) > 1 else short_name(curve[0])
        own = BlockSet(name.removesuffix(rows[0].note), curve, [])
        found |= {(curve_name(row), blocks_of(row)): own for row in curve}
    for row in rows:
        if not row.dense and row not in on_curve:
            key = curve_name(row), blocks_of(row)
            if key in found:
                found[key].others.append(row)
            else:
                found[key] = BlockSet(short_name(row), [row], [])
    return list({id(one): one for one in found.values()}.values())


def blocks_of(row):
    """Its block types and how often each is there, whatever their order."""
    return frozenset(Counter(row.block_types).items())


def short_name(row):
    return row.called or row.twin or f'{pattern(row.block_types)}, tp_size {row.tp_size}{row.varied}'


def set_styles(sets):
    """{name of a BlockSet: its style}"""
    return {one.name: dict(
        marker=MARKERS[i % len(MARKERS)], fillstyle=FILLS[i // len(MARKERS) % len(FILLS)],
        color=f'{0.5 * i / max(1, len(sets) - 1):.2f}', markerfacecoloralt='white', markersize=5,
        label=one.name) for i, one in enumerate(sets)}


def plot_tradeoff(found, sheet=REPORT):
    """
    Validation loss against communications: dense plus the paired difference; bars are its 95% intervals.
    """
    notes = by_note(found.rows)
    fig, axes = recipe_axes(found, 'Validation loss against communications', sheet, notes)
    for ax, (note, own) in zip(axes, notes.items()):
        draw_tradeoff(ax, own, sheet)
        ax.set_title(note.removeprefix(', '))
        ax.set_ylabel(f'validation loss\n({loss_unit(found.rows)})')
    return fig


def recipe_axes(found, title, sheet, notes):
    """A figure with axes for each recipe of {note: rows}, three in a line, and room for their legends."""
    columns = 1 if sheet.paper else min(3, len(notes))
    entries = max(len(block_sets(own)) for own in notes.values())
    tall = 2.9 + 0.16 * entries if sheet.paper else 4.4 + 0.08 * entries
    size = sheet.size(max(8, 4.5 * columns), tall * math.ceil(len(notes) / columns))
    return figure(found.rows, title, sheet, size, len(notes), columns)


def height(row):
    """
    A row's height in the plot: its dense control's mean loss plus the paired difference.

    That is its own mean loss, unless it lacks some of the control's seeds: these may all be higher or lower.
    """
    return row.control.loss + to_dense(row).mean if to_dense(row) else row.loss


def draw_tradeoff(ax, rows, sheet):
    """One recipe: a mark for each block set, a line through a curve, open marks for other orders."""
    sets = block_sets(rows)
    # the guide's count is no place for other nets than the guide's
    observed = any(not row.whole or row.other_types for one in sets for row in one.rows) or any(
        row not in curves(rows)[0] for one in sets for row in one.rows)
    x, styles = places(sets, observed), set_styles(sets)
    for i, one in enumerate(sets):
        style = styles[one.name]
        ax.plot([x[row] for row in one.curve], list(map(height, one.curve)),
                linestyle=LINES[i % len(LINES)] if len(one.curve) > 1 else '', linewidth=1, zorder=3, **style)
        for row in one.others:
            ax.plot(x[row], height(row), linestyle='', zorder=3,
                    **style | dict(label=None, fillstyle='none'))
        for row in one.rows:
            difference = to_dense(row)
            if difference and difference.half is not None:
                ax.errorbar(x[row], height(row), difference.half, color=style['color'], capsize=2,
                            linewidth=0.8)
    if any(one.others for one in sets):
        ax.plot([], [], 'o', color='black', fillstyle='none', label='the same blocks in another order')
    if sets:
        mark_counts(ax, [row for one in sets for row in one.rows], observed, sheet)
    mark_references(ax, rows)
    legend_below(ax, sheet, title=sheet.note('dense plus the paired difference; bars: its 95% interval'))


def places(sets, observed):
    """{row: x}, at its count; rows at one count stand side by side around it."""
    at = {}
    for one in sets:
        for row in one.rows:
            at.setdefault(count(row) if observed else row.communications, []).append(row)
    x = {}
    for n, own in at.items():
        step = min(0.2, 0.8 / len(own))
        x |= {row: n + step * (i - (len(own) - 1) / 2) for i, row in enumerate(own)}
    return x


def mark_counts(ax, rows, observed, sheet):
    """Ticks at the rows' observed all-reduces, or at their communications with the all-reduces below."""
    if observed:
        names = {count(row): count(row) for row in rows}
        ax.set_xlabel('all-reduces observed in a forward pass')
    else:
        names = {row.communications: f'{row.communications}\n({count(row)})' for row in rows}
        ax.set_xlabel("communications by the guide's count\n(all-reduces observed in a forward pass)")
    room = 0.2 * (max(names) - min(names)) / (sheet.width - 0.8 if sheet.paper else 7)
    named, last = {}, math.inf
    for n in sorted(names, reverse=True):  # a name needs some room, else its tick stands without
        named[n] = names[n] if last - n >= room else ''
        last = n if named[n] else last
    ax.set_xticks(list(named), named.values())
    left, right = ax.get_xlim()
    ax.set_xlim(min(left, min(names) - 1), max(right, max(names) + 1))  # beside one count is not another


def mark_references(ax, rows):
    """Draw the dense control, the margin above it, and the guide's limits if they apply."""
    for control in (row for row in rows if row.dense):
        ax.axhline(control.loss, color='black', linewidth=1, linestyle=(0, (6, 3)),
                   label=control.called or 'dense control')
        if control.margin:
            ax.axhspan(control.loss, control.loss + control.margin, color='0.88', zorder=0,
                       label=f'within the margin, {control.margin:g}')
    if all(in_scope(row.first) for row in rows):
        for limit in sorted({TARGET, *(limit for *_, limit in GOALS)}):
            ax.axhline(limit, color='0.4', linewidth=0.7, linestyle=':')
            ax.text(1.01, limit, f"guide's\n{limit:.2f}", transform=ax.get_yaxis_transform(), fontsize=7,
                    va='center')


# differences, one below the other


def plot_differences(found, sheet=REPORT):
    """
    Validation loss minus the dense control of the same seed: the mean and its 95% interval, a stroke for each
    seed; grey is the margin.
    """
    shown = [row for row in found.rows if to_dense(row)]
    if not shown:
        return None
    names = [sheet.wrap(f'{short_label(row, shown) if sheet.paper else row.label}  (n={to_dense(row).n})  '
                        f'{row.word}', 4 if sheet.paper else 3) for row in shown]
    fig, (ax,) = figure(shown, 'Validation loss minus the dense control of the same seed', sheet,
                        sheet.size(8, forest_height(names, sheet)))
    for y, row in enumerate(shown):
        strokes(ax, seed_differences(row, row.control), y)
        bar(ax, to_dense(row), y)
    finish_forest(ax, names, shown, sheet)
    note = sheet.note('; mean and 95% interval, a stroke for each seed; grey: the margin')
    ax.set_xlabel(sheet.wrap(f'difference ({loss_unit(shown)}){note}', 5))
    return fig


def plot_rivals_by_bytes(found, sheet=REPORT):
    """
    Validation loss minus dense, of all configs, by the megabytes that a step all-reduces, forward and
    backward. Means with their 95% intervals; grey is the margin.
    """
    return draw_rivals(found, sheet, 'Validation loss minus dense, by the bytes that a step all-reduces',
                       lambda row: (-row.step_bytes, -row.blocking),
                       lambda row: f'{row.step_bytes / 1e6:.4g} MB')


def plot_rivals_by_blocking(found, sheet=REPORT):
    """
    Validation loss minus dense, of all configs, by the all-reduces of a forward pass that the next sublayer
    waits for. Means with their 95% intervals; grey is the margin.
    """
    return draw_rivals(found, sheet, 'Validation loss minus dense, by the all-reduces that are waited for',
                       lambda row: (-row.blocking, -row.step_bytes), lambda row: f'{row.blocking} blocking')


def draw_rivals(found, sheet, title, cost, words):
    """All tensor-parallel rows by a cost, the most costly on top; None if only the guide's nets are there."""
    shown = [row for row in found.rows if to_dense(row) and row.tp_size > 1 and row.step_bytes is not None]
    if all(row.plain for row in shown):
        return None
    notes = {note: sorted(own, key=cost) for note, own in by_note(shown).items()}
    names = {row: sheet.wrap(short_label(row, shown), 4 if sheet.paper else 3) for row in shown}
    heights = [forest_height([names[row] for row in own], sheet) for own in notes.values()]
    fig, axes = figure(shown, title, sheet, sheet.size(8, sum(heights)), len(notes),
                       height_ratios=heights)
    for ax, (note, own) in zip(axes, notes.items()):
        for y, row in enumerate(own):
            strokes(ax, seed_differences(row, row.control), y)
            bar(ax, to_dense(row), y)
        finish_forest(ax, [names[row] for row in own], own, sheet)
        group_heights(ax, list(map(words, own)))
        ax.set_title(note.removeprefix(', '))
        ax.set_xlabel(sheet.wrap(f'difference ({loss_unit(shown)})', 5))
    return fig


def plot_pairs(found, sheet=REPORT):
    """
    One config's validation loss minus another's, paired by seed: what was asked for or planned is a diamond,
    all others have an equal number of observed all-reduces. The mean and its 95% interval, a stroke for each
    seed; p is adjusted by Holm; grey is the margin.
    """
    first = [one for one in found.comparisons if one.kind == 'pair']
    named = asked(found) + [one for one in first if one not in asked(found)]
    others = [] if sheet.paper and named else [one for one in at_equal(found) if one not in named]
    shown = [one for one in named + others if one.difference]
    if not shown:
        return None
    names = [sheet.wrap(pair_label(one, shown), 4) for one in shown]
    fig, (ax,) = figure(found.rows, 'One config minus another, paired by seed', sheet,
                        sheet.size(8, forest_height(names, sheet)))
    for y, one in enumerate(shown):
        strokes(ax, seed_differences(one.first, one.second), y)
        bar(ax, one.difference, y, marker='D' if one in named else 'o')
    finish_forest(ax, names, [one.first for one in shown], sheet)
    group_heights(ax, [f'{count(one.first)} all-\nreduces' if one.equal else '' for one in shown])
    note = sheet.note('; diamond: asked for or planned' * bool(named) + '; grey: the margin')
    ax.set_xlabel(sheet.wrap(f'difference ({loss_unit(found.rows)}){note}', 4))
    return fig


def pair_label(one, shown):
    rows = [row for each in shown for row in (each.first, each.second)]
    p = '' if one.p_holm is None else f', p {one.p_holm:.2g}'
    numbers = f'(n={one.difference.n}{p})'.replace(' ', '\xa0')
    return f'{short_label(one.first, rows)} minus {short_label(one.second, rows)}  {numbers}'


def plot_placement(found, sheet=REPORT):
    """
    Equal communications: the same blocks alternating minus clustered, the ranks' mean minus their sum, the
    MLP's sync dropped minus attention's. Paired by seed, the mean and its 95% interval.
    """
    kinds = dict(placement=('o', 'alternating minus clustered'), merge=('s', 'mean minus sum'),
                 sync=('^', "MLP's sync dropped minus attention's"))
    shown = [one for one in found.comparisons if one.difference and one.kind in kinds]
    if not shown:
        return None
    names = [sheet.wrap(pair_label(one, shown), 4) for one in shown]
    fig, (ax,) = figure(found.rows, 'Equal communications: order of the blocks, merge, which sync is dropped',
                        sheet, sheet.size(9, forest_height(names, sheet)))
    for y, one in enumerate(shown):
        bar(ax, one.difference, y, marker=kinds[one.kind][0])
    finish_forest(ax, names, [one.first for one in shown], sheet)
    for kind, (marker, label) in kinds.items():
        if any(one.kind == kind for one in shown):
            ax.plot([], [], marker, color='black', label=label)
    ax.set_xlabel(sheet.wrap(f'difference in validation loss ({loss_unit(found.rows)}), paired by seed, mean '
                             'and 95% interval', 5))
    legend_below(ax, sheet, ncols=1, loc='upper right', bbox_to_anchor=(1, 0))
    return fig


# loss against predicted time


def plot_pareto(found, sheet=REPORT):
    """
    Validation loss minus dense against the predicted time of a step; filled marks are on the Pareto front by
    verdict; the cross is dense, data-parallel alone.
    """
    notes = by_note(fastest_first(found.rows))
    if not notes:
        return None
    fig, axes = recipe_axes(found, 'Validation loss minus dense, against the predicted time of a step', sheet,
                            notes)
    for ax, (note, own) in zip(axes, notes.items()):
        draw_pareto(ax, own, sheet)
        ax.set_title(note.removeprefix(', '))
        ax.set_ylabel(f'difference ({loss_unit(found.rows)})')
    return fig


def draw_pareto(ax, rows, sheet):
    """One recipe: what is on the front filled and joined, the others open, and dense."""
    best, sets = front(rows), block_sets(rows)
    styles = set_styles(sets)
    times = [row.seconds * 1e3 for row in rows]
    if len(best) > 1:
        ax.plot([row.seconds * 1e3 for row in best], [to_dense(row).mean for row in best], color='0.5',
                linewidth=1, drawstyle='steps-post', label='Pareto front, by verdict')
    for one in sets:
        style = styles[one.name] | dict(fillstyle='full')
        for row in one.rows:
            difference, face = to_dense(row), style['color'] if row in best else 'white'
            ax.errorbar(row.seconds * 1e3, difference.mean, difference.half, capsize=2, linewidth=0.8,
                        markerfacecolor=face, **style | dict(label=None))
            if row in best or row in one.curve and len(one.curve) > 1 and row.plain:
                ax.annotate(str(row.communications) if row.whole else f'{count(row)} all-reduces',
                            (row.seconds * 1e3, difference.mean), xytext=(5, 4), fontsize=7,
                            textcoords='offset points')
        ax.plot([], [], linestyle='', **style | dict(markerfacecolor='white'))
    control = rows[0].control
    if control and control.seconds is not None:
        times.append(control.seconds * 1e3)
        ax.plot(times[-1], 0, 'x', color='black', markersize=7, markeredgewidth=1.5,
                label=f'{control.called or "dense"}, data-parallel alone')
    if best:
        ax.plot([], [], 'o', color='black', label='filled: on the front')
    ax.axhline(0, color='black', linewidth=0.8)
    if max(times) > 8 * min(times):
        ax.set_xscale('log')
        ax.xaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), major_formatter='{x:g}')
        ax.minorticks_off()
    ax.set_xlabel(sheet.wrap('predicted milliseconds a step; numbers: communications', 6))
    legend_below(ax, sheet)


# loss against width, and against the tuned key


def plot_width(found, sheet=REPORT):
    """
    Validation loss minus dense against the width of the model, a panel for each config; a line for each seed
    goes on to GPT-2's width; diamonds are 95% prediction intervals for a new seed.
    """
    trends = [trend for trend in find_trends(found.rows) if len(trend.widths) > 1]
    if not trends:
        return None
    columns = min(2 if sheet.paper else 4, len(trends))
    shown = [row for trend in trends for row in trend.rows]
    lines = math.ceil(len(trends) / columns)
    size = (sheet.width, 0.7 + 1.6 * lines) if sheet.paper else (max(6, 2.8 * columns), 1.4 + 2.2 * lines)
    fig, axes = figure(shown, 'Validation loss minus dense, against the width of the model', sheet, size,
                       len(trends), columns, sharey=True, sharex=True)
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
        ax.minorticks_off()
        ax.set_xticks([*trend.widths, FULL_WIDTH], [*map(str, trend.widths), str(FULL_WIDTH)])
        name = trend.rows[0].called or f'{trend.rows[0].counted}: {trend.name}'
        ax.set_title(wrapped(name, 1.4 if sheet.paper else 2.7), fontsize=7)
    fig.supxlabel(sheet.wrap('n_embd; a line for each seed; diamond: its 95% prediction interval for a new '
                             'seed', 8), fontsize=8)
    fig.supylabel(f'difference ({loss_unit(found.rows)})', fontsize=8)
    return fig


def plot_tuning(found, sheet=REPORT):
    """
    Validation loss of the tuning seeds against the tuned key: the line is their mean, the square its lowest,
    a stroke each seed, also at values that not all of them have run; grey is dense.
    """
    shown = [row for row in found.rows if row.tuning and row.tuning.compared]
    if not shown:
        return None
    key, seeds = shown[0].tuning.tuned.key, shown[0].tuning.tuned.tuning_seeds
    fig, axes = panels(shown, f'Loss of the tuning seeds against {key}: the line is their mean, the square '
                       'its lowest; grey is dense', f'validation loss ({loss_unit(shown)})', sheet, key,
                       f'seed{"s" * (len(seeds) > 1)} {", ".join(map(str, seeds))}')
    values = sorted({value for row in shown for value, own in row.tuning.runs.items()
                     if own.keys() & set(seeds)})
    for ax, row in zip(axes, shown):
        dense = row.control or row
        if dense.tuning:
            draw(ax, list(dense.tuning.means.items()), color='0.7', linewidth=3)
        means = row.tuning.means
        draw(ax, list(means.items()), 'o-', color='black', markersize=3.5, linewidth=1)
        draw(ax, [(value, own[seed].loss) for value, own in row.tuning.runs.items()
                  for seed in seeds if seed in own], '_', color='0.4', markersize=6)
        best = row.tuning.best
        ax.plot(best, means[best], 's', color='black', markersize=7, markerfacecolor='white')
        if min(values) > 0:
            ax.set_xscale('log')
        ax.minorticks_off()
        ax.set_xticks(values, [f'{value:g}' for value in values])
        if sheet.paper:
            ax.tick_params(axis='x', rotation=60)
    return fig


# all of them

PLOTS = dict(
    loss_vs_communications=plot_tradeoff, paired_differences=plot_differences, pairs=plot_pairs,
    rivals_by_bytes=plot_rivals_by_bytes, rivals_by_blocking=plot_rivals_by_blocking,
    tuning=plot_tuning, placement=plot_placement, pareto=plot_pareto,
    width_trend=plot_width, ranks_apart=plot_ranks_apart, lone_ranks=plot_lone_ranks, drift=plot_drift,
    training_curves=plot_curves,
    difference_by_step=plot_difference_curves, stability=plot_stability, tokens_per_sec=plot_speed)


def draw_all(found, folder, sheet=REPORT, formats=('png', 'svg')):
    """
    Write each plot that the findings have, and remove what an earlier comparison left of others. On a paper's
    sheet each gets its caption in a .txt file.

    Returns {name: what it shows}.
    """
    folder.mkdir(exist_ok=True)
    drawn = {}
    with settings(sheet):
        for name, plot in PLOTS.items():
            fig = plot(found, sheet)
            for old in ('png', 'svg', 'pdf', 'txt') if sheet.paper else formats:
                (folder / f'{name}.{old}').unlink(missing_ok=True)
            if fig is None:
                continue
            write_figure(fig, folder, name, formats)
            drawn[name] = ' '.join(plot.__doc__.split())
            if sheet.paper:
                (folder / f'{name}.txt').write_text(f'{drawn[name]} {described(found.rows)}.\n', 'utf-8')
    return drawn
