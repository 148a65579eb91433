"""
What W&B gets, and how training goes on without it.

    python -m pytest tests/test_wandb.py
"""

import json
import math
import sys
import time

import pytest

from toy_runs import TINY, info, metrics, report, run, start, stop_at, terminate, wandb_records
from training import checkpoint
from training.logger import as_charts, from_charts

pytestmark = pytest.mark.usefixtures('corpus')


def wandb_history(path):
    """(the run's record, its lines): what W&B kept of a run, under W&B's names for the keys."""
    records = wandb_records(path)
    history = [record.history for record in records if record.WhichOneof('record_type') == 'history']
    lines = [{''.join(item.nested_key) or item.key: json.loads(item.value_json) for item in line.item}
             for line in history]
    return next(record.run for record in records if record.WhichOneof('record_type') == 'run'), lines


def test_wandb_offline_has_every_step_under_one_id_across_a_resume(tmp_path, monkeypatch):
    monkeypatch.setenv('WANDB_MODE', 'offline')
    monkeypatch.setenv('WANDB_CONSOLE', 'off')
    stop_at(monkeypatch, 16, terminate)
    assert run(tmp_path, *TINY, '--wandb_log=True', '--max_iters=25') == 75
    time.sleep(1)  # W&B names its folders by the second
    assert run(tmp_path, *TINY, '--wandb_log=True', '--max_iters=25', '--init_from=resume') == 0
    files = sorted(tmp_path.glob('wandb/offline-run-*/*.wandb'), key=lambda path: path.stat().st_mtime)
    (first, early), (second, late) = map(wandb_history, files)
    assert first.run_id == second.run_id == checkpoint.load(tmp_path / 'ckpt.pt')['progress']['wandb_id']
    assert (first.project, first.display_name, first.run_group) == ('owt', 'gpt2-12comm-cpu', 'pystdlib')
    tracked = {item.key: json.loads(item.value_json) for item in first.config.update}
    assert (tracked['communications'], tracked['all_reduces_forward'], tracked['seed']) == (6, 4, 1337)
    names = {'train/loss': 'train_loss', 'val/loss': 'val_loss'}
    lines = [{names.get(key, key): value for key, value in line.items() if not key.startswith('_')}
             for line in early + late]
    assert lines == metrics(tmp_path, but=())


def test_wandb_without_a_key_warns_once_and_keeps_the_run_offline(tmp_path):
    (tmp_path / 'home').mkdir()
    settings = dict(HOME=str(tmp_path / 'home'), WANDB_API_KEY='', NETRC='', WANDB_CONFIG_DIR='')
    process = start(tmp_path / 'out', *TINY, '--wandb_log=True', '--max_iters=3', **settings)
    out, err = process.communicate(timeout=360)
    assert process.returncode == 0, err
    assert len([line for line in out.splitlines() if 'W&B' in line]) == 1 and 'wandb sync' in out
    path, = (tmp_path / 'out').glob('wandb/offline-run-*/*.wandb')
    assert [line['iter'] for line in wandb_history(path)[1]] == [0, 1, 2, 3, 3]


def test_lists_are_charts_of_their_sublayers_and_come_back_from_them():
    deep = as_charts(dict(diagnostics=dict(cka=[0.5] * 25)))
    assert list(deep) == sorted(deep) and 'cka/03 mlp' in deep
    # of an earlier version
    assert from_charts({'iter': 3, 'val/loss': 2.0, 'drift/0 attention': 0.0, 'drift/0 mlp': 0.1,
                        'drift/1 end': 0.2, 'drift_cosine/1 end': 0.7, 'drift_cosine/0 mlp': None}) == dict(
        iter=3, val_loss=2.0, drift=[0.0, 0.1, 0.2], drift_cosine=[None, None, 0.7])


def test_a_run_has_tags_and_alerts_at_its_end_and_if_it_diverges(tmp_path, monkeypatch):
    calls = []

    class Recorder:
        id = 'abc'

        def __getattr__(self, name):
            return lambda *args, **kw: calls.append((name, kw)) or self

    monkeypatch.setitem(sys.modules, 'wandb', Recorder())
    assert run(tmp_path / 'a', *TINY, '--wandb_log=True', '--max_iters=2') == 0
    tags = next(kw['tags'] for name, kw in calls if name == 'init')
    assert tags == ['6 communications', 'parallel', 'spd', 'tp', 'tp_size 2', 'simulated']
    assert [kw['title'] for name, kw in calls if name == 'alert'] == ['gpt2-12comm-cpu finished']
    calls.clear()
    monkeypatch.setattr('train.train_step', lambda *args, **kw: report(math.nan, math.nan))
    assert 'without a finite gradient' in run(tmp_path / 'b', *TINY, '--wandb_log=True')
    assert [kw['title'] for name, kw in calls if name == 'alert'] == ['gpt2-12comm-cpu diverged']


class FailingWandb:
    """Stands in for the module and for its run; the call named `fails` raises `error`."""
    id = 'abc'

    def __init__(self, fails, error):
        self.fails, self.error = fails, error

    def __getattr__(self, name):
        def call(*args, **kw):
            if name == self.fails:
                raise self.error
            return self
        return call


@pytest.mark.parametrize('fails, error', [
    ('login', RuntimeError()), ('init', OSError('no\nnetwork')), ('define_metric', RuntimeError()),
    ('log', OSError('no\nnetwork')), ('alert', RuntimeError()), ('finish', RuntimeError())])
def test_training_outlives_wandb(tmp_path, monkeypatch, capsys, fails, error):
    monkeypatch.setitem(sys.modules, 'wandb', FailingWandb(fails, error))
    assert run(tmp_path, *TINY, '--wandb_log=True', '--max_iters=3') == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if 'W&B' in line or 'network' in line]
    assert len(lines) == 1 and lines[0].startswith('warning: ') and type(error).__name__ in lines[0]
    assert info(tmp_path)['state'] == 'finished'
    assert [line['iter'] for line in metrics(tmp_path)] == [0, 1, 2, 3, 3]


def test_training_does_without_wandb_if_it_is_not_installed(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, 'wandb', None)
    assert run(tmp_path, *TINY, '--wandb_log=True', '--max_iters=1') == 0
    assert capsys.readouterr().out.count('W&B') == 1
