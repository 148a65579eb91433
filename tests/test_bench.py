"""
bench.py, simulated and sharded, and slow_link.py: what they print is consistent, and what they refuse.

    python -m pytest tests/test_bench.py
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

import bench
from speed import slow_link
from configurator import ROOT, load
from speed.costmodel import KINDS, Link, ring
from model import GPT
from train import find_place, model_config_of

TINY = ['--with', 'config/cpu.py', '--n_embd=16', '--block_size=8', '--batch_size=2', '--vocab_size=64',
        '--rounds=6']
CONTROL = ['config/train_gpt2_24comm.py']
needs_namespaces = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which('ip') is None or shutil.which('tc') is None,
    reason='network namespaces need root, ip and tc')


def run(*command, **kwargs):
    """A bounded run of one of our scripts. Returns what it printed, by lines."""
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=240,
                          env=dict(os.environ, OMP_NUM_THREADS='1', **kwargs))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout.splitlines()


def check_sharded(report, tokens):
    """A sharded bench's JSON: its numbers follow from one another."""
    links = {axis: Link(**link) for axis, link in report['links'].items()}
    for row in report['configs']:
        kinds, step = row['all_reduces'], row['step_seconds']
        assert row['tokens_per_sec'] == pytest.approx(tokens / step)
        assert row['collectives_share'] == pytest.approx(1 - row['compute_seconds'] / step)
        network = sum(count * links[KINDS[kind]].alpha + size / links[KINDS[kind]].beta
                      for kind, (count, size) in kinds.items() if count)
        assert row['predicted_seconds'] == pytest.approx(row['compute_seconds'] + network)
        assert row['low'] <= row['ratio'] <= row['high']
    assert report['configs'][0]['ratio'] == 1


def test_a_sharded_bench_is_consistent():
    torchrun = ['-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=4']
    *_, last = run(*torchrun, 'bench.py', '--shard', 'config/train_gpt2_8comm.py', *TINY, '--gbit=2',
                   '--latency_us=100')
    report = json.loads(last)
    assert report['processes'] == 4 and report['backend'] == 'gloo' and report['wte_bytes'] == 64 * 16 * 4
    check_sharded(report, tokens=2 * 2 * 8)             # of two data-parallel processes
    for row, all_reduces in zip(report['configs'], (24, 7), strict=True):
        kinds = row['all_reduces']
        assert kinds['forward'] == kinds['backward'] == [all_reduces, all_reduces * 2 * 8 * 16 * 4]
        assert (kinds['head'][0], kinds['gradients'][0]) == (3, 1)
        assert (kinds['norm'], kinds['report']) == ([1, 4], [1, 8])
        assert kinds['average'][1] == 4 * (64 * 16 + 8 * 16 + 25 * 16 + 12 * 12 * 16 * 16 // 2)
        asked = {axis: ring(n, 1e-4, 2.5e8) for axis, n in dict(tp=2, ddp=2, all=4).items()}
        network = sum(count * asked[KINDS[kind]].alpha + size / asked[KINDS[kind]].beta
                      for kind, (count, size) in kinds.items())
        assert row['predicted_on_given_link'] == pytest.approx(row['compute_seconds'] + network)


def test_a_simulated_bench_measures_the_dense_control_first():
    *_, last = run('bench.py', 'config/train_gpt2_2comm.py', *TINY, '--textbook')
    rows = json.loads(last)
    assert [row['name'] for row in rows] == ['gpt2-124M-cpu', 'gpt2-124M-2comm-cpu', 'textbook']
    assert rows[0]['ratio'] == 1 and all(row['low'] <= row['ratio'] <= row['high'] for row in rows)
    assert all(row['tokens_per_sec'] == pytest.approx(16 / row['step_seconds']) for row in rows)


def test_what_a_step_keeps_grows_by_the_same_with_every_window(capsys):
    """Three windows are foretold from one and two; here they are run as well."""
    path, shape = 'config/train_gpt2_8comm.py', ['--tp_size=4', '--n_head=4', '--batch_size=3']
    bench.main([path, '--kept', *TINY, *shape, '--vocab_size=320'])
    dense, drifted = json.loads(capsys.readouterr().out.splitlines()[-1])
    config = load([path, 'config/cpu.py', *TINY[2:-2], *shape])
    model = GPT(model_config_of(config, vocab_size=320))
    kept = sum(tensor.untyped_storage().nbytes()
               for tensor in bench.kept_tensors(model, 3, config, find_place(config)))
    assert drifted['kept_gib'] == kept / 2**30
    assert drifted['step_gib'] == (kept + 16 * model.num_params()) / 2**30
    assert dense['kept_gib'] < drifted['kept_gib'] and drifted['ratio'] > dense['ratio'] == 1
    assert dense['float32_logits'] == drifted['float32_logits'] == 1       # eagerly, they are kept


@pytest.mark.parametrize('flags, environment, words', [
    (['--rounds=5'], {}, '--rounds=5'),
    (['--rounds=many'], {}, 'many'),
    (['--shard'], {}, 'multiple of tp_size'),
    (['--shard', '--tp_size=1'], {}, '--shard needs more processes'),
    (['--shard', '--textbook'], {}, '--textbook'),
    (['--shard', '--kept'], {}, '--kept'),
    (['--input', '--kept'], {}, 'choose one'),
    (['--shard', 'config/train_gpt2.py'], dict(WORLD_SIZE='2'), 'tp_size is 1, but 2'),
    ([], dict(WORLD_SIZE='2'), 'add --shard'),
    (['--shard', '--gbit=-1'], {}, '--gbit=-1'),
    (['--n_head=3'], {}, 'n_embd is 16, not a multiple of n_head, 3'),
    (['--vocab_size=0'], {}, 'vocab_size is 0'),
], ids=str)
def test_a_bench_that_cannot_be_is_refused_in_one_line(flags, environment, words, monkeypatch):
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(SystemExit) as stopped:
        bench.main([*TINY, *flags])
    assert words in stopped.value.code and '\n' not in stopped.value.code


# slow_link.py


@pytest.mark.parametrize('flags, words', [
    (['--gbit=1'], 'needs root'), (['--gbit=0'], '--gbit is 0'), (['--latency_us=5'], '--gbit'),
    (['--gbit=1', '--latency_us=-1'], '--latency_us is -1'),
])
def test_a_slow_link_is_refused_in_one_line(flags, words, monkeypatch):
    monkeypatch.setattr(os, 'geteuid', lambda: 1000)
    with pytest.raises(SystemExit) as stopped:
        slow_link.main(flags)
    assert words in stopped.value.code and '\n' not in stopped.value.code


@needs_namespaces
def test_a_slow_link_is_as_slow_as_asked():
    first, *_, last = run('slow_link.py', '--gbit=0.5', '--latency_us=2000', *CONTROL, *TINY,
                          '--n_layer=2', '--block_types=tp')
    if not first.startswith('link: veth'):
        pytest.skip(first)              # a kernel without veth or tbf: predicted, not measured
    report = json.loads(last)
    check_sharded(report, tokens=2 * 8)
    # two messages of 2 ms one after the other, and no more than the rate; a busy machine is only slower
    assert report['links']['tp']['alpha'] > 0.9 * 4e-3 and report['links']['tp']['beta'] < 1.5 * 0.5e9 / 8


@needs_namespaces
def test_a_link_that_cannot_be_made_is_called_predicted(monkeypatch, tmp_path):
    """Its tc refuses everything."""
    tc = tmp_path / 'tc'
    tc.write_text('#!/bin/sh\necho no such qdisc >&2\nexit 2\n')
    tc.chmod(0o755)
    first, *_, last = run('slow_link.py', '--gbit=1', *CONTROL, *TINY, '--n_layer=2', '--block_types=tp',
                          PATH=f'{tmp_path}:{os.environ["PATH"]}')
    assert 'could not be made' in first and 'no such qdisc' in first and 'predicted' in first
    assert json.loads(last)['configs'][0]['predicted_on_given_link'] > 0


def processes_with(text):
    """How many processes have the text in their command line."""
    found = 0
    for pid in filter(str.isdigit, os.listdir('/proc')):
        try:
            with open(f'/proc/{pid}/cmdline') as file:
                found += text in file.read()
        except OSError:                 # it has ended since
            pass
    return found


@needs_namespaces
@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGKILL])
def test_a_slow_link_that_is_killed_leaves_nothing(number, tmp_path):
    def machine():
        return [subprocess.run(['ip', *what.split()], capture_output=True, text=True).stdout
                for what in ('-brief link', 'netns list')]

    before, mark = machine(), tmp_path / 'nothing.py'
    mark.write_text('')
    process = subprocess.Popen(
        [sys.executable, 'slow_link.py', '--gbit=1', '--latency_us=100', *TINY, '--rounds=100000',
         '--with', str(mark)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline().startswith('link:')
    until = time.monotonic() + 60
    while processes_with(str(mark)) < 3:
        assert time.monotonic() < until and process.poll() is None
        time.sleep(0.1)
    process.send_signal(number)
    process.wait(30)
    while processes_with(str(mark)):
        assert time.monotonic() < until, 'processes are left'
        time.sleep(0.1)
    assert machine() == before
