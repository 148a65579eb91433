"""
Rivals at an equal number of all-reduces, comparisons before the end, and figures for a paper, on run folders
written here.

    python -m pytest tests/test_rival_tables.py
"""

import json
import os
import subprocess
import sys

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

import compare
from analysis import findings, plots, runs
from analysis.figures import REPORT, Sheet
from analysis.training_plots import plot_difference_curves
from configurator import ROOT
from written_runs import (
    DENSE,
    PARALLEL,
    SPD,
    compare_all,
    csv_lines,
    found_under,
    read_all,
    refused,
    rows_under,
    shifted,
    write_run,
)

PALM, LADDER, CAAT = ['palm'] * 4, ['ladder'] * 4, ['caat'] * 4
EVALS = [dict(iter=0, val_loss=5.5), dict(iter=10, val_loss=3.0)]


@pytest.fixture
def no_plots(monkeypatch):
    monkeypatch.setattr(plots, 'PLOTS', {})


def write_rivals(root):
    """Dense, spd and palm with 4 all-reduces, parallel with 1, ladder with 7 of which 6 hidden, and caat."""
    write_run(root, 'dense', DENSE, tp_size=1)
    write_run(root, '4comm', shifted(0.02, 0.021, 0.022), SPD)
    write_run(root, 'palm', shifted(0.05, 0.049, 0.051), PALM)
    write_run(root, '2comm', shifted(0.1, 0.1, 0.101), PARALLEL)
    hidden = dict(forward=7, backward=7, blocking=1, hidden=6, bytes_per_token=14 * 64 * 2)
    write_run(root, 'ladder', shifted(0.01, 0.01, 0.012), LADDER, info=dict(all_reduces=hidden))
    part = dict(forward=8, backward=8, blocking=8, hidden=0, bytes_per_token=8 * 64 * 2)
    write_run(root, 'caat', shifted(0.0, 0.01, 0.012), CAAT, info=dict(all_reduces=part))


# pairs


def test_a_pair_that_is_asked_for_is_in_every_output(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(plots, 'PLOTS', dict(pairs=plots.plot_pairs))
    write_rivals(tmp_path)
    out = compare_all(tmp_path, '--pair', 'spd x 4', 'palm x 4')
    printed, text = capsys.readouterr().out, (out / 'table.md').read_text()
    page = (out / 'report.html').read_text().replace('\xa0', ' ')
    name = 'spd x 4 (tp_size 4) minus palm x 4 (tp_size 4)'
    found = json.loads((out / 'table.json').read_text())
    assert found['pairs_asked_for'] == [['4comm', 'palm']]
    pair, = [one for one in found['comparisons'] if one['kind'] == 'pair']
    assert pair['difference']['mean'] == pytest.approx(-0.029) and pair['difference']['n'] == 3
    assert pair['p'] == pair['p_holm'] < 0.05 and pair['all_reduces'] == 4 and not pair['planned']
    questions = 'The pairs that were asked for', 'Which blocks are better at an equal number'
    assert 0 < printed.index(questions[0]) < printed.index(questions[1])
    for output in (printed, text, page):
        assert f'{name}, both with 4 all-reduces: -0.0290' in output
    row = next(line for line in text.splitlines() if line.startswith(f'| {name} |'))
    assert '| 4 | -0.0290 [' in row and row.endswith('| lower | exploratory |')
    assert (out / 'pairs.svg').exists()


def test_the_order_that_is_asked_for_is_kept_and_the_dense_control_has_a_name(tmp_path):
    write_rivals(tmp_path)
    found = found_under(tmp_path, pairs=[['palm-seed1', '4comm'], ['2comm', 'dense']])
    named = [one for one in found.comparisons if one.kind == 'pair']
    assert [(one.first.name, one.second.name) for one in named] == [('palm', '4comm'), ('2comm', 'dense')]
    assert named[0].difference.mean == pytest.approx(0.029)
    assert named[1].difference == runs.to_dense(named[1].first)


def test_holm_counts_a_pair_once_and_keeps_equal_counts_apart(tmp_path):
    write_rivals(tmp_path)
    write_run(tmp_path, 'attn', shifted(0.03, 0.031, 0.034), ['attn_spd'] * 4)
    found = found_under(tmp_path, pairs=[['attn', '4comm'], ['2comm', '4comm']])
    equal = [one for one in found.comparisons if one.equal]
    pairs = {frozenset((one.first.name, one.second.name)) for one in equal}
    # attn minus spd is asked for, and of one thing changed: twice in the list, once in the family
    assert len(equal) == 4 and len(pairs) == 3
    smallest = min(equal, key=lambda one: one.p)
    assert smallest.p_holm == pytest.approx(3 * smallest.p)
    other, = [one for one in found.comparisons if one.kind == 'pair' and not one.equal]
    assert other.p_holm == other.p


@pytest.mark.parametrize('pair, message', [
    (['spd x 5', 'dense'], 'no config is called spd x 5; there are dense; '),
    (['dense', 'dense'], 'they must be two configs')])
def test_a_pair_that_is_not_there_is_refused(tmp_path, pair, message):
    write_rivals(tmp_path)
    line = refused(tmp_path, f'--out={tmp_path / "cmp"}', '--pair', *pair)
    assert message in line and not (tmp_path / 'cmp').exists()


def test_each_block_set_has_a_mark_of_its_own_at_its_all_reduces(tmp_path):
    write_rivals(tmp_path)
    write_run(tmp_path, 'mixed', DENSE, ['tp', 'spd'] * 2)
    write_run(tmp_path, 'first', DENSE, ['tp', 'tp', 'spd', 'spd'])
    rows = [row for row in rows_under(tmp_path)]
    sets = plots.block_sets(rows)
    assert [[row.name for row in one.others] for one in sets if one.others] == [['first']]
    styles = plots.set_styles(sets)
    assert len({(style['marker'], style['fillstyle']) for style in styles.values()}) == len(sets) == 4
    x = plots.places(sets, observed=True)
    assert len(set(x.values())) == len(x)
    assert all(abs(at - findings.count(row)) <= 0.5 for row, at in x.items())


def test_marks_do_not_run_out():
    sets = [plots.BlockSet(str(i), [], []) for i in range(40)]
    assert len({(one['marker'], one['fillstyle']) for one in plots.set_styles(sets).values()}) == 40


# bytes, blocking and hidden


def test_rivals_are_listed_by_all_reduces_with_their_bytes(tmp_path, no_plots, capsys):
    write_rivals(tmp_path)
    out = compare_all(tmp_path)
    assert 'blocking' in capsys.readouterr().out
    lines = {line['run']: line for line in csv_lines(out)}
    tokens = 12 * 40 * 1024
    # ladder and caat as run.json says; the others, older, by their all-reduces of the whole stream
    assert [lines[name]['all_reduces_hidden'] for name in ('ladder', 'caat', '4comm')] == ['6', '0', '0']
    assert int(lines['ladder']['bytes_per_step']) == 14 * 64 * 2 * tokens
    assert {lines[name]['bytes_per_step'] for name in ('4comm', 'caat')} == {str(8 * 64 * 2 * tokens)}
    text = (out / 'table.md').read_text()
    table = text[text.index('All by observed all-reduces'):].splitlines()[4:10]
    names = [line.split(' | ')[0].removeprefix('| ') for line in table]
    assert names[:3] == ['dense', 'caat x 4', 'ladder x 4'] and names[-1] == 'parallel x 4'
    assert '| 7/7 | 1 | 6 | 880.8 |' in table[2]


def test_what_an_older_run_did_not_note_is_left_open(tmp_path):
    write_run(tmp_path, 'dense', DENSE, tp_size=1)
    write_run(tmp_path, 'ladder', DENSE, LADDER)
    row = rows_under(tmp_path)[1]
    assert (row.blocking, row.hidden, row.step_bytes) == (None, None, None)
    assert row.label.startswith('8 all-reduces: ladder x 4')


def test_only_the_guides_nets_need_no_table_of_rivals(tmp_path, no_plots):
    write_run(tmp_path, 'dense', DENSE, tp_size=1)
    write_run(tmp_path, '4comm', shifted(0.02, 0.021, 0.022), SPD)
    text = (compare_all(tmp_path) / 'table.md').read_text()
    assert 'All by observed' not in text and 'MB a step |' not in text
    assert plots.plot_rivals_by_bytes(found_under(tmp_path), REPORT) is None


# before the end


def test_unfinished_runs_are_compared_at_a_step(tmp_path, no_plots, capsys):
    write_run(tmp_path, 'dense', {1: 2.0, 2: 2.1}, tp_size=1, lines=EVALS)
    for seed, loss in ((1, 3.1), (2, 3.2)):
        write_run(tmp_path, '4comm', {seed: 0}, SPD, state='running',
                  lines=[EVALS[0], dict(iter=10, val_loss=loss), dict(iter=12, train_loss=1.0)])
    write_run(tmp_path, '2comm', {1: 0}, PARALLEL, state='running', lines=EVALS[:1])
    message = refused(tmp_path / '4comm-seed1', f'--out={tmp_path / "x"}')
    assert '--at=last compares runs as they are' in message
    found = json.loads((compare_all(tmp_path, '--at=last') / 'table.json').read_text())
    out = capsys.readouterr().out
    assert out.startswith('At step 10 of 20, as the runs were there, which is no answer yet: ')
    assert found['at'] == 10 and found['answer'] is None
    assert [(row['run'], row['state'], row['difference']) for row in found['rows']] == [
        ('dense', 'at step 10', None), ('4comm', 'at step 10', pytest.approx(0.15))]
    assert '2comm-seed1: no evaluation at step 10; running, last seen at step 0' in out
    assert 'step 10 of 20 steps' in out


def test_the_last_step_of_finished_runs_is_their_end(tmp_path):
    write_run(tmp_path, 'dense', DENSE, tp_size=1, lines=EVALS)
    everything = read_all(tmp_path)
    assert runs.last_common_step(everything) == 20
    assert [run.at for run in compare.read_at(everything, 'last')] == [None] * 3
    early = compare.read_at(everything, 10)[0]
    assert (early.loss, early.at, early.evals.keys()) == (3.0, 10, {0, 10})


def test_a_step_that_nobody_has_is_refused(tmp_path):
    write_run(tmp_path, 'dense', {1: 2.0}, tp_size=1, lines=EVALS)
    assert 'no evaluation at step 15' in refused(tmp_path, '--at=15', f'--out={tmp_path / "cmp"}')
    write_run(tmp_path / 'new', 'dense', {1: 2.0}, tp_size=1, lines=EVALS[:1], state='running')
    assert '--at=STEP names one' in refused(tmp_path / 'new', '--at=last', f'--out={tmp_path / "cmp"}')


# figures and files


def test_figures_for_a_paper(tmp_path, monkeypatch):
    write_rivals(tmp_path / 'out')
    monkeypatch.setattr(plots, 'PLOTS', dict(a=plots.plot_tradeoff, b=plots.plot_rivals_by_blocking))
    out = compare_all(tmp_path / 'out', '--width=3.3', '--format=pdf,png,svg',
                      '--labels=palm x 4=PaLM; spd x 4=Sync-Point Drop')
    assert {path.name for path in (out / 'figures').iterdir()} == {
        f'{name}.{form}' for name in 'ab' for form in ('pdf', 'png', 'svg', 'txt')}
    pdf = (out / 'figures/b.pdf').read_bytes()
    assert b'/FontFile2' in pdf and b'/Type3' not in pdf  # TrueType, embedded
    assert f'/MediaBox [ 0 0 {3.3 * 72:g}'.encode() in pdf
    caption = (out / 'figures/b.txt').read_text()
    assert 'that the next sublayer waits for' in caption and 'Some text, byte tokens, 20 steps' in caption
    assert '<text' not in (out / 'figures/b.svg').read_text()
    report = (out / 'b.svg').read_text()  # the report's stays, with its title
    assert 'PaLM' in report and 'Validation loss minus dense, by the all-reduces' in report


@pytest.mark.parametrize('plot', [plots.plot_tradeoff, plots.plot_differences, plots.plot_rivals_by_bytes,
                                  plots.plot_pairs, plots.plot_curves, plots.plot_speed])
def test_a_papers_figure_has_its_width_and_no_title(tmp_path, plot):
    write_rivals(tmp_path)
    with plots.settings(Sheet(3.3)):
        fig = plot(found_under(tmp_path), Sheet(3.3))
        assert isinstance(fig, Figure) and fig.get_figwidth() == 3.3 and fig.get_suptitle() == ''
        sizes = {text.get_fontsize() for ax in fig.axes for text in (*ax.texts, ax.xaxis.label, ax.title,
                                                                     *ax.get_xticklabels())}
    assert sizes <= {7, 8}


def test_two_block_sets_at_one_count_stand_close_to_it(tmp_path):
    write_run(tmp_path, 'dense', DENSE, tp_size=1)
    for name, blocks in dict(spd=SPD, palm=['palm'] * 4).items():
        write_run(tmp_path, name, shifted(0.02, 0.021, 0.022), blocks)
    ax, = plots.plot_tradeoff(found_under(tmp_path)).axes
    left, right = ax.get_xlim()
    assert left <= 3 and right >= 5


def test_a_reports_title_fits_a_figure_of_one_panel(tmp_path):
    write_run(tmp_path, 'dense', DENSE, tp_size=1)
    write_run(tmp_path, 'spd', shifted(0.02, 0.021, 0.022), SPD)
    with plots.settings(REPORT):
        fig = plot_difference_curves(found_under(tmp_path))
        box = fig._suptitle.get_window_extent(FigureCanvasAgg(fig).get_renderer())
    assert 0 < box.x0 and box.x1 < fig.bbox.width


@pytest.mark.parametrize('flags, message', [
    (['--format=pdf,jpg'], 'must be of pdf, png, svg'), (['--width=1'], 'from 2 to 20 inches'),
    (['--labels=spd x 4'], "must be as in 'spd x 12=SPD"), (['--labels=tp x 9=A'], 'is called tp x 9'),
    (['--at=soon'], 'must be a step, or last')])
def test_mistakes_in_their_flags_are_refused(tmp_path, flags, message):
    write_rivals(tmp_path)
    assert message in refused(tmp_path, *flags, f'--out={tmp_path / "cmp"}')


def test_settings_and_locale_of_the_user_do_not_reach_the_outputs(tmp_path):
    write_run(tmp_path, 'dense', {1: 2.0}, tp_size=1, corpus=dict(corpus='Müller | Söhne'))
    write_run(tmp_path, '4comm', {1: 2.1}, SPD, corpus=dict(corpus='Müller | Söhne'), learning_rate=1e-3)
    (tmp_path / 'matplotlibrc').write_text('text.usetex: True\nfont.size: 30\naxes.facecolor: red\n')
    script = ('import sys, compare, configurator; from analysis import plots; configurator.begin_program(); '
              'plots.PLOTS = dict(loss_vs_communications=plots.plot_tradeoff); compare.main(sys.argv[1:])')
    outputs = []
    for name, more in (('plain', {}), ('set', dict(MATPLOTLIBRC=str(tmp_path / 'matplotlibrc'), LC_ALL='C',
                                                   PYTHONUTF8='0', PYTHONCOERCECLOCALE='0'))):
        out = tmp_path / name
        process = subprocess.run(
            [sys.executable, '-c', script, str(tmp_path / 'dense-seed1'), str(tmp_path / '4comm-seed1'),
             f'--out={out}'], cwd=ROOT, capture_output=True, env=os.environ | more)
        assert process.returncode == 0, process.stderr.decode()
        text = (out / 'table.md').read_text(encoding='utf-8')
        assert 'Müller | Söhne' in text and 'Müller' in (out / 'report.html').read_text(encoding='utf-8')
        outputs.append((out / 'loss_vs_communications.png').read_bytes())
    assert outputs[0] == outputs[1]


def test_a_bar_in_a_name_does_not_break_a_table(tmp_path, no_plots):
    write_run(tmp_path, 'dense', DENSE, tp_size=1, dataset='a|b')
    write_run(tmp_path, '4comm', shifted(0, 0.1, 0.2), SPD, dataset='c')
    text = (compare_all(tmp_path) / 'table.md').read_text()
    table = [line for line in text.splitlines() if line.startswith('| ')]
    assert any('dataset a\\|b' in line for line in table)
    widths = {line.replace('\\|', '').count('|') for line in table[:4]}
    assert len(widths) == 1
