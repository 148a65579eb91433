"""
What a person types: mistakes get one line before any work.

    python -m pytest tests/test_input.py
"""

import os
import subprocess
import sys
from functools import partial

import pytest

import train
from configurator import ROOT
from data.corpus import open_corpus
from toy_runs import TINY, refused, start_two

pytestmark = pytest.mark.usefixtures('corpus')


@pytest.mark.parametrize('flags, words', [
    (['--device=nonesuch'], ['device', 'nonesuch', '--device=cpu']),
    (['--device=meta'], ['device', 'meta']),
    (['--dataset=nothere'], ['dataset', 'nothere', 'pystdlib']),
    (['--tp_size=3'], ['tp_size', '3', 'n_head', '8', 'cpu.py', '--tp_size=3']),
    (['--tp_size=0'], ['tp_size', '0', 'at least 1']),
    (['--n_embd=36'], ['n_embd', '36', 'n_head']),
    (['--block_types=tp,SPD'], ['block_types', 'SPD', 'tp, spd, parallel']),
    (["--block_types=['tp']*3"], ['block_types', '3', 'n_layer', '4']),
    (["--block_types=[['tp']]*4"], ['block_types', "['tp']"]),
    (['--block_size=100000000'], ['block_size', '100000000']),
    (['--seed=99999999999999999999999'], ['seed', '99999999999999999999999']),
    (['--config=1'], ['config', '--config=1']),
])
def test_bad_input_gets_one_line_before_any_work(tmp_path, flags, words):
    message = refused(tmp_path / 'out', *TINY, *flags)
    assert all(word in message for word in words)
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize('flag, words', [
    ('--lerning_rate=1', '--lerning_rate=1: no key is called lerning_rate; learning_rate?\n'),
    ('--block_types=sdp', 'block_types has '),
    ('--block_types=fal,ladder', 'block_types has fal and ladder, '),
])
def test_a_mistaken_flag_is_refused_before_torch_is_loaded(tmp_path, flag, words):
    (tmp_path / 'torch.py').write_text('raise ImportError')
    done = subprocess.run([sys.executable, str(ROOT / 'train.py'), flag], text=True,
                          env=os.environ | dict(PYTHONPATH=str(tmp_path)), capture_output=True)
    assert done.stderr.startswith(f'error: {words}') and len(done.stderr.splitlines()) == 1
    assert (done.returncode, done.stdout) == (1, '')


def test_missing_data_names_the_command_that_makes_it(tmp_path, monkeypatch):
    monkeypatch.setattr(train, 'open_corpus', partial(open_corpus, data_dir=tmp_path / 'data'))
    assert 'python data/pystdlib/prepare.py' in refused(tmp_path / 'out', *TINY)
    assert not (tmp_path / 'out').exists()


def test_windows_that_do_not_divide_by_the_processes_are_refused(tmp_path, monkeypatch):
    launcher = dict(RANK='0', LOCAL_RANK='0', WORLD_SIZE='2', MASTER_ADDR='localhost', MASTER_PORT='1')
    for name, value in launcher.items():
        monkeypatch.setenv(name, value)
    message = refused(tmp_path / 'out', *TINY, '--batch_size=3')
    assert all(word in message for word in ('3', '2', 'batch_size', 'gradient_accumulation_steps'))
    assert not (tmp_path / 'out').exists()


def test_of_two_processes_only_the_first_says_what_is_wrong(tmp_path):
    (tmp_path / 'file').touch()
    first, second = start_two(tmp_path / 'file/out', *TINY)
    out, err = first.communicate(timeout=120)
    second.terminate()  # as torchrun does once a process has failed
    assert (first.returncode, out) == (1, '') and 'Traceback' not in err
    line, = (line for line in err.splitlines() if line.startswith('error: '))
    assert 'out_dir is' in line and 'cannot be written' in line
    out, err = second.communicate(timeout=60)
    assert out == '' and 'error' not in err
