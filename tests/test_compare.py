"""
compare.py on run folders written here: which runs are compared, what is written, W&B.

    python -m pytest tests/test_compare.py
"""

import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest

import compare
from analysis import findings, plots, runs
from analysis.findings import find_all
from analysis.verdicts import additive_spread
from configurator import ROOT, pattern
from toy_runs import wandb_records
from training.logger import TRACKED, as_charts
from written_runs import (
    DENSE,
    INSIDE,
    PARALLEL,
    SPD,
    by_count,
    compare_all,
    csv_lines,
    found_under,
    logged,
    refused,
    rows_under,
    shifted,
    table,
    write_run,
)

# pairs and verdicts


def test_differences_are_paired_and_judged_by_one_spread(tmp_path):
    write_run(tmp_path, 'dense', DENSE, tp_size=1)
    write_run(tmp_path, '8comm', DENSE)
    write_run(tmp_path, '4comm', shifted(0.020, 0.021, 0.022), SPD)
    write_run(tmp_path, '2comm', shifted(-0.003, 0.0, 0.003), PARALLEL)
    rows = table(tmp_path)
    assert list(rows) == [0, 8, 4, 2] and rows[8].word == 'identical'
    # residuals by config about -0.0135, 0 and 0.0135: 0, 4 and 2 communications have, seed by seed,
    # (4, 1, -5) / 3, (1, 1, -2) / 3 and (-5, -2, 7) / 3 thousandths at most; df is (3 - 1) (3 - 1)
    spread = additive_spread([list(rows[count].losses.values()) for count in (0, 4, 2)])
    assert spread.df == 4 and rows[4].spread == rows[2].spread
    assert rows[4].spread.s == pytest.approx(spread.s)
    difference = runs.to_dense(rows[4])
    assert (difference.n, difference.mean) == (3, pytest.approx(0.021))
    half = spread.s * math.sqrt(2 / 3)
    assert difference.half == pytest.approx(2.776445 * half, rel=1e-5)  # t(0.975, 4), from a table
    assert rows[4].verdict.upper == pytest.approx(0.021 + 2.131847 * half, rel=1e-5)  # t(0.95, 4)
    assert (rows[2].word, rows[4].word) == ('as good', 'undecided')


@pytest.mark.filterwarnings('error')
@pytest.mark.parametrize('value', [0.0, 0.1, -0.021])
def test_equal_differences_have_an_interval_without_width_and_no_warning(value):
    found = runs.estimate([value] * 3)
    assert (found.mean, found.n) == (value, 3) and found.half < 1e-15
    assert findings.p_value([value] * 3) == float(value == 0)


def test_one_seed_has_no_interval_and_no_verdict(tmp_path):
    write_run(tmp_path, 'dense', {7: 2.0}, tp_size=1)
    write_run(tmp_path, '4comm', {7: 2.5}, SPD)
    row = table(tmp_path)[4]
    assert str(runs.to_dense(row)) == '+0.5000 (one seed, no interval)' and row.word == ''


def test_pairs_are_of_one_seed(tmp_path):
    write_run(tmp_path, 'dense', {1: 2.0, 2: 3.0}, tp_size=1)
    write_run(tmp_path, '4comm', {2: 3.5, 3: 9.0}, SPD)
    row = table(tmp_path)[4]
    assert runs.to_dense(row) == runs.Estimate(0.5, None, 1)
    assert compare.missing_notes([row], [], []) == [
        'spd x 4 (tp_size 4): no dense control of seed 3, not in its difference; this trains it: '
        f'python sweep.py --seed=3 --out={tmp_path}',
        'val losses are means over different seeds: compare the differences, not the losses']
    assert plots.height(row) == row.control.loss + 0.5


def test_any_dense_run_is_the_control(tmp_path):
    write_run(tmp_path, 'dense', DENSE, tp_size=1, merge='mean')
    write_run(tmp_path, '4comm', shifted(0.5, 0.5, 0.5), SPD)
    dense, row = rows_under(tmp_path)
    assert row.control is dense and dense.control is None
    assert runs.to_dense(row).mean == pytest.approx(0.5) and runs.to_dense(dense) is None


def test_a_perturbed_dense_run_is_no_control(tmp_path):
    write_run(tmp_path, 'dense', DENSE, tp_size=1)
    write_run(tmp_path, 'twin', shifted(0.001, 0.002, 0.003), tp_size=1, perturb=1e-7)
    dense, twin = rows_under(tmp_path)
    assert (dense.name, twin.control, twin.blocks) == ('dense', dense, 'dense, weights perturbed by 1e-07')
    assert runs.to_dense(twin).mean == pytest.approx(0.002)


def test_a_rival_with_one_rank_is_no_control(tmp_path):
    write_run(tmp_path, 'dense', DENSE, tp_size=1)
    write_run(tmp_path, 'palm', shifted(0.1, 0.1, 0.1), ['palm'] * 4, tp_size=1)
    dense, palm = rows_under(tmp_path)
    assert dense.dense and palm.control is dense and not palm.dense


@pytest.mark.parametrize('change', [dict(merge='mean'), dict(perturb=1e-7), dict(embed_scale=2.0)])
def test_tp_blocks_with_a_variation_are_tested(tmp_path, change):
    write_run(tmp_path, 'dense', DENSE, tp_size=1)
    write_run(tmp_path, 'varied', shifted(0.1, 0.1, 0.1), **change)
    assert table(tmp_path)[8].word == 'worse'


# which runs are compared


@pytest.mark.parametrize('broken', [
    '{"iter": 30, "val_l', '{"val_loss": 2.0}', '{"iter": 30.5, "val_loss": 2.0}',
    '{"iter": 30, "val_loss": "2"}', '{"iter": 30, "val_loss": [2.0]}', '{"iter": 30, "drift": [0.5, "0.5"]}',
    '{"iter": 30, "diagnostics": {"cka": ["0.5"]}}', '{"iter": 30, "diagnostics": [0.5]}', '30', '[]',
    '[' * 10**5], ids=range(11))
def test_torn_last_line_is_dropped_and_a_broken_one_refused(tmp_path, broken):
    write_run(tmp_path, 'dense', {1: 2.0}, tp_size=1)
    path = tmp_path / 'dense-seed1' / 'metrics.jsonl'
    whole = path.read_text()
    path.write_text(whole + broken)
    assert table(tmp_path)[0].loss == 2.0
    path.write_text(whole + broken + '\n' + whole)
    assert f'{path} line 5' in refused(tmp_path, '--out', tmp_path / 'cmp')


@pytest.mark.parametrize('text', ['{"name": "dense', '[]', '{"name": "dense-seed1"}'])
def test_a_damaged_run_json_is_refused(tmp_path, text):
    write_run(tmp_path, 'dense', {1: 2.0}, tp_size=1)
    path = tmp_path / 'dense-seed1' / 'run.json'
    path.write_text(text)
    assert str(path) in refused(tmp_path, '--out', tmp_path / 'cmp')


@pytest.mark.parametrize('other, difference', [
    (dict(learning_rate=1e-3), 'learning_rate is '),
    (dict(max_iters=10), 'max_iters is '),
    (dict(batch_size=6), 'windows per step is '),
    (dict(corpus=dict(val_sha256='cd')), 'corpus val_sha256 is '),
])
def test_recipes_are_shown_one_by_one(tmp_path, capsys, no_plots, other, difference):
    write_run(tmp_path, 'dense', {1: 2.0}, tp_size=1)
    write_run(tmp_path, '4comm', {1: 2.5}, SPD, info=dict(argv=['config/train_gpt2_12comm.py']), **other)
    lines = csv_lines(compare_all(tmp_path))
    out = capsys.readouterr().out
    note, = [line for line in out.splitlines() if line.startswith('several recipes, each with its own')]
    assert difference in note and '4comm-seed1' in note and 'dense-seed1' in note
    assert note.count(' is ') == 2  # nothing else differs: "no run is compared", and the difference
    assert ('--tuned=learning_rate' in note) == ('learning_rate' in other)
    # a first line for each; the run without a control comes with the command that would pair it
    first = out.partition('\n\n')[0].splitlines()
    assert len(first) == 2 and all(line.startswith('No answer (') for line in first)
    assert sorted(line.rpartition(': ')[2] for line in first) == [
        'no tensor-parallel run has finished beside its dense control',
        'there is no dense control among these runs']
    command = f'python sweep.py config/train_gpt2_12comm.py --seed=1 --tp_size=4 --out={tmp_path}'
    assert f'this trains it: {command}' in out
    assert [line['difference'] for line in lines] == ['', '']


def test_runs_whose_recipe_is_the_same_compare(tmp_path):
    write_run(tmp_path, 'dense', {1: 2.0}, tp_size=1)
    write_run(tmp_path, '4comm', {1: 2.5}, SPD, batch_size=8, gradient_accumulation_steps=60, device='cuda',
              log_interval=1, merge='mean')
    assert runs.to_dense(table(tmp_path)[4]).mean == 0.5


def test_unfinished_runs_are_listed_and_in_no_mean(tmp_path, capsys, no_plots):
    write_run(tmp_path, 'dense', {1: 2.0}, tp_size=1)
    write_run(tmp_path, '4comm', {1: 2.5}, SPD)
    write_run(tmp_path, '4comm', {2: 0}, SPD, state='failed')
    write_run(tmp_path, '4comm', {3: math.nan}, SPD)
    (tmp_path / 'crashed').mkdir()
    (tmp_path / 'crashed' / 'log.txt').write_text('no such device\n')
    lines = csv_lines(compare_all(tmp_path))
    out = capsys.readouterr().out
    assert '4comm-seed2: failed, last seen at step 20 of 20' in out
    assert '4comm-seed3: diverged: its validation loss is nan' in out
    assert 'crashed: ended before it wrote run.json' in out
    assert [(line['run'], line['seeds'], line['val_loss']) for line in lines[:2]] == [
        ('dense', '1', '2.0'), ('4comm', '1', '2.5')]
    assert len(lines) == 5 and {line['val_loss'] for line in lines[2:]} == {''}
    assert all(line['corpus'] == 'Some text' for line in lines[:2])


def test_a_run_given_twice_is_refused(tmp_path):
    write_run(tmp_path, 'a', {1: 2.0}, SPD)
    write_run(tmp_path, 'b', {1: 2.1}, SPD)
    assert 'one run twice' in refused(tmp_path, '--out', tmp_path / 'cmp')


def test_without_a_dense_control_differences_are_blank(tmp_path, capsys, no_plots):
    write_run(tmp_path, '4comm', {1: 2.0}, SPD)
    lines = csv_lines(compare_all(tmp_path))
    assert 'no dense control among these runs' in capsys.readouterr().out
    assert lines[0]['difference'] == ''


# outputs


class Page(HTMLParser):
    """The tags and links of a page; asserts that its elements close in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.links = [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [value for name, value in attributes if name in ('src', 'href')]
        self.open += [tag] if tag not in ('meta', 'img', 'br') else []

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_outputs_agree(tmp_path, capsys):
    write_run(tmp_path / 'out', 'dense', DENSE, tp_size=1)
    write_run(tmp_path / 'out', '8comm', DENSE)
    write_run(tmp_path / 'out', '4comm', shifted(0.001, 0.002, 0.003), SPD)
    write_run(tmp_path / 'out', '<4>comm', {9: 2.0}, SPD, state='failed')
    (tmp_path / 'out/compare').mkdir()
    (tmp_path / 'out/compare/drift.svg').write_text('of an earlier comparison')
    out = compare_all(tmp_path / 'out')
    printed, text = capsys.readouterr().out, (out / 'table.md').read_text()
    page = (out / 'report.html').read_text().replace('\xa0', ' ')
    found, lines = json.loads((out / 'table.json').read_text()), csv_lines(out)
    answer = found['headlines'][0]
    assert answer.startswith('At one learning rate, untuned: 4 communications (4 all-reduces) are the fewest')
    assert printed.startswith(f'{answer}\n')
    assert text.startswith(f'# {answer}\n') and page.index(answer) < page.index('<table>')
    for output in (printed, text, page):
        assert 'Some text, byte tokens, 20 steps' in output and '+0.0020 [-0.0005, +0.0045] (n=3)' in output
        assert 'as good' in output and 'seed9: failed, last seen at step 20 of 20' in output
    assert found['answer']['block_types'] == SPD and found['answer']['difference'] == pytest.approx(0.002)
    for row, line in zip(found['rows'], lines):
        for key, value in line.items():
            if key != 'block_types':
                assert value == ('' if row[key] is None else str(row[key]))
    assert [line['run'] for line in lines] == ['dense', '8comm', '4comm', '<4>comm-seed9']
    assert len(found['rows']) == 3 and found['rows'][2]['runs'][0]['val_loss'] == 2.001
    assert [run['state'] for run in found['unfinished']] == [lines[3]['state']]
    assert not (out / 'drift.svg').exists()
    for name in ('loss_vs_communications', 'paired_differences', 'training_curves', 'tokens_per_sec'):
        assert (out / f'{name}.png').read_bytes().startswith(b'\x89PNG') and f'`{name}.png`' in text
        assert '</svg>' in (out / f'{name}.svg').read_text()
    # one file, without scripts
    assert not re.search('https?:', page) and '<4>' not in page
    parsed = Page(page)
    assert 'script' not in parsed.tags
    assert parsed.links and all(link.startswith('data:image/') for link in parsed.links)


def test_plots_are_the_same_byte_for_byte(tmp_path, monkeypatch):
    write_run(tmp_path / 'out', 'dense', DENSE, tp_size=1)
    write_run(tmp_path / 'out', '4comm', shifted(0.02, 0.021, 0.022), SPD)
    monkeypatch.setattr(plots, 'PLOTS', dict(a=plots.plot_tradeoff, b=plots.plot_differences))
    for name in ('one', 'other'):
        (tmp_path / name).mkdir()
        plots.draw_all(found_under(tmp_path / 'out'), tmp_path / name)
    for file in ('a.svg', 'a.png', 'b.svg'):
        assert (tmp_path / 'one' / file).read_bytes() == (tmp_path / 'other' / file).read_bytes()


def test_every_plot_draws_many_configs(tmp_path):
    apart = dict(drift=[0.0, 0.1, 0.3], diagnostics=INSIDE)
    kinds = dict(a=(['tp', 'spd'] * 2, 'sum'), b=(['tp', 'tp', 'spd', 'spd'], 'sum'), c=(SPD, 'sum'),
                 d=(SPD, 'mean'))
    for width, names in {64: 'abcd', 128: 'c'}.items():
        size = dict(info=dict(parameters=width**2), n_embd=width, max_iters=200, last=apart,
                    lines=logged([3 + 0.1 * (i % 3) for i in range(20)]))
        write_run(tmp_path / 'out', f'dense{width}', DENSE, tp_size=1, **size)
        for name in names:
            types, merge = kinds[name]
            write_run(tmp_path / 'out', f'{name}{width}', shifted(0, 0.1, 0.2), types, merge=merge, **size)
    found = found_under(tmp_path / 'out', predict=by_count)
    assert plots.draw_all(found, tmp_path).keys() == plots.PLOTS.keys() - {'tokens_per_sec', 'tuning'}


@pytest.mark.parametrize('block_types, short', [
    (['spd'] * 12, 'spd x 12'), (['tp', 'spd', 'spd'] * 4, '[tp, spd, spd] x 4'),
    (['spd'] * 6 + ['tp'] * 6, 'spd x 6, tp x 6'), (['tp', 'spd', 'spd'], 'tp, spd x 2')])
def test_pattern(block_types, short):
    assert pattern(block_types) == short


def test_help_waits_for_nothing_heavy():
    process = subprocess.run([sys.executable, '-X', 'importtime', 'compare.py', '--help'], cwd=ROOT,
                             capture_output=True, text=True)
    imported = {line.rpartition('|')[2].strip() for line in process.stderr.splitlines()}
    assert 'usage:' in process.stdout and 'argparse' in imported
    assert not imported & {'torch', 'scipy', 'matplotlib', 'numpy', 'wandb'}


# W&B


def test_wandb_offline_gets_the_table_and_the_plots(tmp_path, monkeypatch):
    monkeypatch.setenv('WANDB_MODE', 'offline')
    monkeypatch.setenv('WANDB_CONSOLE', 'off')
    monkeypatch.setattr(plots, 'PLOTS', dict(loss=plots.plot_tradeoff))
    write_run(tmp_path / 'out', 'dense', DENSE, tp_size=1)
    write_run(tmp_path / 'out', '4comm', shifted(0.02, 0.021, 0.022), SPD)
    path, = compare_all(tmp_path / 'out', '--wandb').glob('wandb/offline-run-*/*.wandb')
    records = {record.WhichOneof('record_type'): record for record in wandb_records(path)}
    run = records['run'].run
    assert (run.project, run.job_type, run.display_name) == ('owt', 'compare', 'compare')
    keys = {item.key or item.nested_key[0] for item in records['history'].history.item}
    assert {'table', 'answers', 'report', 'plots/loss'} <= keys
    table, = path.parent.glob('files/media/table/table_*.json')
    kept = json.loads(table.read_text())
    assert [dict(zip(kept['columns'], row))['val_loss'] for row in kept['data']] == [
        row.loss for row in rows_under(tmp_path / 'out')]


class StandIn:
    """A W&B Api whose project holds what was logged of run folders. lacking: keys missing in its configs"""

    def __init__(self, root, lacking=()):
        self.root, self.lacking = root, lacking

    def runs(self, project, filters, lazy):
        assert (project, filters) == ('me/owt', dict(jobType='train'))
        for folder in sorted(self.root.iterdir()):
            info = json.loads((folder / 'run.json').read_text())
            lines = map(json.loads, (folder / 'metrics.jsonl').read_text().splitlines())
            charts = list(map(as_charts, lines))
            reduced = {f'all_reduces_{way}': n for way, n in info['all_reduces'].items()}
            config = {key: info[key] for key in TRACKED & info.keys()} | info['config'] | reduced
            config = {key: value for key, value in config.items() if key not in self.lacking}
            yield SimpleNamespace(path=['me', 'owt', folder.name], name=info['name'], state=info['state'],
                                  config=config, scan_history=lambda charts=charts: iter(charts))


def test_runs_come_back_from_wandb(tmp_path, monkeypatch, capsys, no_plots):
    evaluated = dict(last=dict(val_tokens=100))
    write_run(tmp_path / 'out', 'dense', DENSE, tp_size=1, **evaluated)
    write_run(tmp_path / 'out', '4comm', shifted(0.02, 0.021, 0.022), SPD, **evaluated)
    write_run(tmp_path / 'out', '4comm', {4: 9.0}, SPD, state='crashed')
    there = runs.read_wandb('me/owt', StandIn(tmp_path / 'out'))
    rows = find_all(runs.group([run for run in there if not run.trouble])).rows
    local = rows_under(tmp_path / 'out')
    assert [(row.name, row.losses) for row in rows] == [(row.name, row.losses) for row in local]
    assert rows[1].first.series('train_loss') == {10: 4.0, 20: 3.0}
    assert runs.to_dense(rows[1]) == runs.to_dense(local[1])
    monkeypatch.setattr('wandb.Api', lambda: StandIn(tmp_path / 'out'))
    compare.main(['--from_wandb=me/owt', f'--out={tmp_path / "cmp"}'])
    out = capsys.readouterr().out
    assert '+0.0210 [+0.0185, +0.0235] (n=3)' in out
    assert 'me/owt/4comm-seed4: crashed, last seen' in out


def test_keys_that_wandb_lacks_take_their_default_unless_there_is_none(tmp_path):
    write_run(tmp_path, 'mean', {1: 2.0}, ['mean_spd'] * 4, last=dict(val_tokens=100))
    run, = runs.read_wandb('me/owt', StandIn(tmp_path, lacking=('n_embd', 'device')))
    assert not run.trouble and run.loss == 2.0
    assert (run.config['block_types'], run.config['merge']) == (SPD, 'mean')
    assert (run.config['n_embd'], run.config['batch_size']) == (768, 12)
    run, = runs.read_wandb('me/owt', StandIn(tmp_path, lacking=('max_iters',)))
    assert run.trouble == 'its config in W&B lacks max_iters'


def test_runs_in_wandb_of_another_program_are_named(tmp_path):
    other = SimpleNamespace(path=['me', 'owt', 'x'], name='x', state='finished', config=dict(lr=1))
    run, = runs.read_wandb('me/owt', SimpleNamespace(runs=lambda *_, **__: [other]))
    assert 'its config in W&B lacks' in run.trouble and 'block_types' in run.trouble


@pytest.mark.parametrize('flag', ['--wandb', '--from_wandb=me/owt'])
def test_a_missing_wandb_is_reported_before_any_work(tmp_path, monkeypatch, flag):
    monkeypatch.setitem(sys.modules, 'wandb', None)
    message = refused(tmp_path, flag, f'--out={tmp_path / "cmp"}')
    assert flag.partition('=')[0] in message and 'not installed' in message
    assert not (tmp_path / 'cmp').exists()


@pytest.mark.parametrize('flag', [
    '--link=25', '--link=25,-1', '--link=a,b', '--level=x', '--level=nan', '--margin=0', '--margin=nan',
    '--tuning_seeds=1,x'])
def test_mistyped_flags_are_refused(flag):
    assert flag.partition('=')[2].partition(',')[0] in refused(flag)
