"""
bench.py, simulated and sharded, and speed.slow_link: what they print is consistent, and what they refuse.

    python -m pytest tests/test_bench.py
"""

import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch

import bench
from configurator import ROOT, load
from model import GPT
from speed import slow_link
from speed.costmodel import KINDS, Link, ring
from speed.memory import kept_tensors
from training.distributed import find_world
from variants import gpt_config

TINY = ['--with', 'config/cpu.py', '--n_embd=16', '--block_size=8', '--batch_size=2', '--vocab_size=64',
        '--rounds=6']
CONTROL = ['config/train_gpt2_24comm.py']
needs_namespaces = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which('ip') is None or shutil.which('tc') is None,
    reason='network namespaces need root, ip and tc')


def run(*command, **kwargs):
    """A bounded run of one of our scripts. Returns its output, by lines."""
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


def test_a_sharded_bench_is_consistent(tmp_path):
    torchrun = ['-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=4']
    run(*torchrun, 'bench.py', '--shard', 'config/train_gpt2_8comm.py', *TINY, '--gbit=2', '--latency_us=100',
        f'--json={tmp_path}/report')
    report = json.loads((tmp_path / 'report').read_text())
    assert report['processes'] == 4 and report['backend'] == 'gloo' and report['wte_bytes'] == 64 * 16 * 4
    check_sharded(report, tokens=2 * 2 * 8)  # of two replicas
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


def test_a_simulated_bench_measures_the_dense_control_first(tmp_path):
    bench.main(['config/train_gpt2_2comm.py', *TINY, '--textbook', '--micro_steps=3',
                f'--json={tmp_path}/report'])
    rows = json.loads((tmp_path / 'report').read_text())
    assert [row['name'] for row in rows] == ['gpt2-cpu', 'gpt2-2comm-cpu', 'textbook']
    assert rows[0]['ratio'] == 1 and all(row['low'] <= row['ratio'] <= row['high'] for row in rows)
    assert all(row['tokens_per_sec'] == pytest.approx(3 * 16 / row['step_seconds']) for row in rows)


def test_a_profile_lists_the_operations_of_two_steps(tmp_path):
    candidate = SimpleNamespace(name='toy', cuda=False, step=lambda: torch.ones(2, 3) @ torch.ones(3, 2))
    bench.write_profile(candidate, tmp_path)
    line, = (line for line in (tmp_path / 'toy.txt').read_text().splitlines() if 'aten::mm' in line)
    assert line.split()[-1] == '2'
    trace = json.loads(gzip.decompress((tmp_path / 'toy.json.gz').read_bytes()))
    assert sum(event['name'] == 'aten::mm' for event in trace['traceEvents']) == 2


def test_the_reading_of_a_steps_windows_is_a_share_of_the_step(tmp_path, capsys):
    bench.main(['--input', *CONTROL, *TINY, '--gradient_accumulation_steps=3', f'--json={tmp_path}/report'])
    report = json.loads((tmp_path / 'report').read_text())
    assert capsys.readouterr().out.startswith('6 windows of 8 tokens: ')
    assert report['share'] == pytest.approx(report['seconds'] * 500e3 / (6 * 8))
    assert 0 < report['low'] <= report['seconds'] <= report['high'] and 0 <= report['grown_mib'] < 1000


TEXT = ['config/rivals/train_gpt2_ladder.py', *TINY, '--decode', '--prompt=6', '--new=4', '--batch=3']


def test_a_bench_of_text_is_consistent(tmp_path):
    bench.main([*TEXT, '--textbook', f'--json={tmp_path}/report'])
    dense, ladder = json.loads((tmp_path / 'report').read_text())
    assert (dense['all_reduces'], ladder['all_reduces'], ladder['bytes']) == (0, 23, 23 * 3 * 16 * 4)
    assert dense['ratio'] == 1 and ladder['over_low'] <= ladder['over_recomputing'] <= ladder['over_high']


def check_sharded_text(rows):
    """A sharded bench's rows of TEXT: their numbers follow from one another."""
    assert [(row['name'], row['all_reduces'], row['hidden']) for row in rows] == [
        ('gpt2-24comm-cpu', 24, 0), ('gpt2-ladder-cpu', 23, 22), ('gpt2-ladder-cpu, waited for', 23, 0)]
    for row in rows:
        assert row['tokens_per_sec'] == pytest.approx(3 / row['token_seconds'])
        assert row['bytes'] == row['all_reduces'] * 3 * 16 * 4
        assert row['collectives_share'] == pytest.approx(1 - row['compute_seconds'] / row['token_seconds'])
    for key in 'predicted_seconds', 'predicted_on_given_link':
        hidden, waited_for = rows[1][key], rows[2][key]
        assert rows[1]['compute_seconds'] == rows[2]['compute_seconds'] < hidden < waited_for


@pytest.mark.parametrize('recomputed', [0, 1])
def test_what_a_step_keeps_grows_by_the_same_with_every_window(tmp_path, recomputed):
    """bench.py infers three windows from one and two; here they are run as well."""
    path = 'config/train_gpt2_8comm.py'
    shape = ['--tp_size=4', '--n_head=4', '--batch_size=3', '--n_layer=2', '--block_types=spd,parallel',
             f'--recompute_layers={recomputed}']
    bench.main([path, '--kept', *TINY, *shape, '--vocab_size=320', f'--json={tmp_path}/report'])
    dense, drifted = json.loads((tmp_path / 'report').read_text())
    config = load([path, 'config/cpu.py', *TINY[2:-2], *shape])
    model = GPT(gpt_config(vars(config), vocab_size=320))
    kept = [sum(tensor.untyped_storage().nbytes()
                for tensor in kept_tensors(model, 3, config, find_world(config)))
            for config.recompute_layers in (recomputed, recomputed + 1)]
    assert kept[1] < 0.9 * kept[0]
    assert drifted['kept_gib'] == kept[0] / 2**30
    assert drifted['step_gib'] == (kept[0] + 16 * model.num_params()) / 2**30
    assert dense['kept_gib'] < drifted['kept_gib'] and drifted['ratio'] > dense['ratio'] == 1
    assert dense['float32_logits'] == drifted['float32_logits'] == 1  # eagerly, they are kept


def test_the_matmuls_of_a_step_are_library_kernels_and_drifted_streams_move_more_bytes(tmp_path):
    bench.main(['config/train_gpt2_2comm.py', '--kernels', *TINY, '--tp_size=4', '--n_head=4', '--n_layer=2',
                '--block_types=parallel', f'--json={tmp_path}/report'])
    dense, drifted = json.loads((tmp_path / 'report').read_text())
    for row in dense, drifted:
        # a layer: four matmuls and attention; the head; backward two matmuls for each
        assert (row['forward_library'], row['backward_library']) == (2 * 5 + 1, 2 * 9 + 2)
        assert row['forward_generated'] > 2 and row['backward_generated'] > 2
    assert drifted['mib'] > dense['mib'] and drifted['ratio'] > dense['ratio'] == 1


@pytest.mark.parametrize('a_window, fits, found', [(1.0, 95, 94), (3.0, 30, 30), (30.0, 3, 3), (60.0, 2, 2),
                                                   (0.0, 200, 190)])
def test_the_largest_micro_batch_is_found_from_two(a_window, fits, found):
    tried = []

    def peak(windows):
        tried.append(windows)
        return 5 + a_window * windows if windows <= fits else None

    assert bench.largest_batch(peak, 2, total=105) == found
    assert len(tried) <= 5
    with pytest.raises(SystemExit, match='batch_size=64 does not fit'):
        bench.largest_batch(lambda windows: None, 64, total=105)


def test_the_control_is_dense_whatever_is_composed_after_it(tmp_path):
    other = tmp_path / 'other.py'
    other.write_text("block_types = 'spd'\ntp_size = 4")
    for first in ('config/train_gpt2_2comm.py', 'config/train_350M.py'):
        configs = bench.load_configs(*bench.parse_args([first, '--with', str(other), '--merge=mean']))
        assert (configs[0].tp_size, configs[0].block_types[0]) == (1, 'tp')
        assert all(config.tp_size == 4 for config in configs[1:])
    assert [(config.wandb_run_name, config.n_layer) for config in configs] == [('dense', 24)]  # its own


def test_rows_are_named_after_the_blocks_that_flags_give_them_and_measured_once():
    given = [f'config/train_gpt2_{n}comm.py' for n in (24, 12)] + ['--block_types=tp,palm', '--n_layer=4']
    for flags, control in ([], 'gpt2'), (['--shard'], 'tp x 4'):
        configs = bench.load_configs(*bench.parse_args(given + flags))
        assert [config.wandb_run_name for config in configs] == [control, '[tp, palm] x 2']
    configs = bench.load_configs(*bench.parse_args([*CONTROL, '--shard', '--tp_size=4']))
    assert [config.wandb_run_name for config in configs] == ['gpt2-124M-24comm']


@pytest.mark.parametrize('flags, processes, words', [
    (['--rounds=5'], 1, '--rounds is 5, it must be at least 6'),
    (['--rounds=many'], 1, 'many'),
    (['--shard'], 1, 'multiple of tp_size'),
    (['--shard', '--tp_size=1'], 1, '--shard needs more processes'),
    (['--shard', '--textbook'], 1, '--textbook'),
    (['--shard', '--kept'], 1, '--kept'),
    (['--input', '--kept'], 1, 'choose one'), (['--decode', '--kept'], 1, 'choose one'),
    (['--decode', '--profile=out'], 1, '--profile is for measuring steps, not for --decode'),
    (['--kernels', '--micro_steps=2'], 1, '--micro_steps is for measuring steps, not for --kernels'),
    (['--input', '--textbook'], 1, '--textbook is for measuring steps, not for --input'),
    (['--gbit=1'], 1, 'add --shard'),
    (['--decode', '--new=1'], 1, '--new is 1, it must be at least 2'),
    (['--decode', '--shard'], 4, '--decode --shard takes tp_size processes, here 2; there are 4'),
    (['--decode', '--shard', 'config/train_gpt2.py'], 2, 'tp_size is 1, but 2'),
    (['--shard', 'config/train_gpt2.py'], 2, 'tp_size is 1, but 2'),
    ([], 2, 'add --shard'), (['--input'], 2, 'start one without torchrun'),
    (['--shard', '--gbit=-1'], 1, '--gbit is -1, it must be above 0'),
    (['--shard', '--gbit=1', '--latency_us=-1'], 1, '--latency_us is -1, it must be at least 0'),
    (['--n_head=3'], 1, 'n_embd is 16, it must be a multiple of n_head, 3'),
    (['--json=no/such/folder/file'], 1, '--json is no/such/folder/file'),
    (['--json=/proc/report'], 1, '--json is /proc/report'),
    ([f'--profile={__file__}'], 1, 'test_bench.py, which cannot be written: File exists'),
    (['--vocab_size=0'], 1, 'vocab_size is 0'),
    (['confg/train_gpt2.py'], 1, 'confg/train_gpt2.py'),
], ids=str)
def test_a_bench_that_cannot_be_is_refused_in_one_line(flags, processes, words, monkeypatch):
    if processes > 1:
        for key, value in dict(RANK=0, LOCAL_RANK=0, WORLD_SIZE=processes, MASTER_ADDR='localhost',
                               MASTER_PORT=1).items():
            monkeypatch.setenv(key, str(value))
    with pytest.raises(SystemExit) as stopped:
        bench.main([*TINY, *flags])
    assert words in stopped.value.code and '\n' not in stopped.value.code


def test_out_of_gpu_memory_gets_a_line_with_flags_that_help(monkeypatch):
    def out_of_memory(*args):
        raise torch.OutOfMemoryError('CUDA out of memory')
    monkeypatch.setattr(bench, 'take_turns', out_of_memory)
    with pytest.raises(SystemExit, match='out of GPU memory.*fewer configs.*--batch_size'):
        bench.main([*CONTROL, *TINY])


# a slow link


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
def test_a_slow_link_is_as_slow_as_asked(tmp_path):
    first, *_ = run('-m', 'speed.slow_link', '--gbit=1', '--latency_us=1000', *CONTROL, *TINY, '--n_layer=2',
                    '--block_types=tp', f'--json={tmp_path}/report')
    if not first.startswith('link: veth'):
        pytest.skip(first)  # a kernel without veth or tbf: predicted, not measured
    report = json.loads((tmp_path / 'report').read_text())
    check_sharded(report, tokens=2 * 8)
    # two messages of 1 ms one after the other, and no more than the rate; a busy machine is only slower
    assert report['links']['tp']['alpha'] > 0.9 * 2e-3 and report['links']['tp']['beta'] < 1.5 * 1e9 / 8


@needs_namespaces
def test_a_link_that_cannot_be_made_is_called_predicted(monkeypatch, tmp_path):
    """Its tc refuses everything."""
    tc = tmp_path / 'tc'
    tc.write_text('#!/bin/sh\necho no such qdisc >&2\nexit 2\n')
    tc.chmod(0o755)
    first, *_ = run('-m', 'speed.slow_link', '--gbit=1', '--latency_us=100', *TEXT,
                    f'--json={tmp_path}/report', PATH=f'{tmp_path}:{os.environ["PATH"]}')
    assert 'could not be made' in first and 'no such qdisc' in first and 'predicted' in first
    check_sharded_text(json.loads((tmp_path / 'report').read_text()))


def processes_with(text):
    """How many processes have the text in their command line."""
    found = 0
    for pid in filter(str.isdigit, os.listdir('/proc')):
        try:
            with open(f'/proc/{pid}/cmdline') as file:
                found += text in file.read()
        except OSError:  # it has ended since
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
        [sys.executable, '-m', 'speed.slow_link', '--gbit=1', '--latency_us=100', *TINY, '--rounds=100000',
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
