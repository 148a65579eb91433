"""
Toy runs of train.py, and what they leave in their folders: the helpers that the tests share.

Runs are tiny and mostly made in this process; real signals, torchrun and W&B without a key get processes of
their own.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import train
from configurator import ROOT, read_defaults
from model import GPT, GPTConfig
from training import checkpoint, rundir
from training.distributed import Report, World

LAYERS = ['tp', 'spd', 'parallel', 'spd']
TINY = [str(ROOT / 'config/train_gpt2_12comm.py'), str(ROOT / 'config/cpu.py'),
        f'--block_types={",".join(LAYERS)}', '--n_layer=4', '--n_embd=32', '--block_size=32',
        '--batch_size=4', '--warmup_iters=5', '--max_iters=40', '--eval_interval=10', '--eval_tokens=1000',
        '--log_interval=1']
DROPOUT = [*TINY, '--dropout=0.1']
MEASURED = {'tokens_per_sec', 'mfu', 'peak_memory_gib'}  # in these, two equal runs may differ
ALONE = World(0, 1, [[0]], torch.device('cpu'))


# starting and stopping


def run(out_dir, *flags):
    """
    train.py in this process, which afterwards holds no lock and no signal handler. out_dir=None: its default.

    Returns what sys.exit() was given, or 0.
    """
    handlers = {number: signal.getsignal(number)
                for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)}
    held = len(rundir.locks)
    try:
        train.main([*flags, *[f'--out_dir={out_dir}'] * (out_dir is not None)])
        return 0
    except SystemExit as stopped:
        return stopped.code or 0
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        train.signals.clear()
        while len(rundir.locks) > held:
            rundir.locks.pop().close()


def start(out_dir, *flags, **settings):
    """train.py in a process of its own. settings: environment variables."""
    return subprocess.Popen(
        [sys.executable, str(ROOT / 'train.py'), *flags, f'--out_dir={out_dir}'],
        env=os.environ | dict(OMP_NUM_THREADS='1') | settings, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def start_two(out_dir, *flags):
    """The two processes of a data-parallel run, in the environment that torchrun gives them."""
    with socket.socket() as free:
        free.bind(('localhost', 0))
        port = free.getsockname()[1]
    return [start(out_dir, *flags, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE='2',
                  MASTER_ADDR='localhost', MASTER_PORT=str(port)) for rank in range(2)]


def wait_for_step(process, out_dir, step):
    """Wait until metrics.jsonl has a line of that step."""
    deadline, path = time.monotonic() + 120, Path(out_dir) / 'metrics.jsonl'
    while not (path.exists() and f'"iter": {step},' in path.read_text()):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.002)


def refused(out_dir, *flags):
    """The one line with which a run ends."""
    message = run(out_dir, *flags)
    assert isinstance(message, str) and message.startswith('error: ') and len(message.splitlines()) == 1
    return message


def stop_at(monkeypatch, step, act):
    """Call act() during the update from `step` to `step` + 1, until monkeypatch.undo()."""
    real = train.learning_rate

    def learning_rate(it, config):
        if it == step:
            act()
        return real(it, config)
    monkeypatch.setattr(train, 'learning_rate', learning_rate)


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


class Crash(Exception):
    pass


def crash():
    raise Crash


# a run's folder


def strict(text):
    """JSON as the standard has it, without NaN and Infinity."""
    return json.loads(text, parse_constant=pytest.fail)


def metrics(out_dir, but=MEASURED):
    """The lines of metrics.jsonl without the keys `but`."""
    lines = map(strict, (Path(out_dir) / 'metrics.jsonl').read_text().splitlines())
    return [{key: value for key, value in line.items() if key not in but} for line in lines]


def column(out_dir, key):
    """{iter: value} of the lines that have the key."""
    return {line['iter']: line[key] for line in metrics(out_dir) if key in line}


def info(out_dir):
    """run.json"""
    return strict((Path(out_dir) / 'run.json').read_text())


def contents(folder):
    """{path: (bytes, time of the last change)} of all files; a lock's time may change."""
    return {path: (path.read_bytes(), path.stat().st_mtime_ns * (path.name != 'lock'))
            for path in Path(folder).rglob('*') if path.is_file()}


def assert_same_run(out_dir, other):
    """Metrics, weights, moments and counters are equal to the bit, and both runs are finished."""
    assert metrics(out_dir) == metrics(other)
    a, b = (checkpoint.load(Path(folder) / 'ckpt.pt') for folder in (out_dir, other))
    assert a['iter'] == b['iter'] and info(out_dir)['state'] == info(other)['state'] == 'finished'
    torch.testing.assert_close(a['model'], b['model'], rtol=0, atol=0)
    torch.testing.assert_close(a['optimizer']['state'], b['optimizer']['state'], rtol=0, atol=0)
    assert a['scaler'] == b['scaler'] and a['progress']['best_val_loss'] == b['progress']['best_val_loss']


# a network without a run


def toy(block_types=LAYERS, **settings):
    """(net, config, world) of a small model in this process. settings: keys of the config."""
    config = SimpleNamespace(**{key: default for key, (default, _, _) in read_defaults().items()})
    vars(config).update(device='cpu', dtype='float32', compile=False, batch_size=3, block_size=8, **settings)
    torch.manual_seed(1)
    shape = dict(block_size=8, vocab_size=257, n_layer=len(block_types), n_head=4, n_embd=16)
    return train.Network(GPT(GPTConfig(**shape, block_types=block_types)), config), config, ALONE


def micro_batches(seed, count=2):
    """Random pairs (x, y) for toy(), (3, 8) each."""
    generator = torch.Generator().manual_seed(seed)
    return [tuple(torch.randint(257, (2, 3, 8), generator=generator)) for _ in range(count)]


def report(loss, norm):
    """What train_step() returns, of a step that found these."""
    return Report(torch.tensor([loss, 0.0, norm]), 1)


# what W&B kept


def parse_wandb(data):
    """
    The protobuf records of a .wandb file, a log in LevelDB's format: blocks of 32 KiB, in them chunks
    with a header of 7 bytes. A record that is not whole yet is left out.
    """
    from wandb.proto.wandb_internal_pb2 import Record
    at, whole = 7, b''
    while at + 7 <= len(data):
        if 2**15 - at % 2**15 < 7:  # what is too short for a header ends a block
            at += 2**15 - at % 2**15
            continue
        size, kind = int.from_bytes(data[at + 4:at + 6], 'little'), data[at + 6]
        if at + 7 + size > len(data):
            return
        whole += data[at + 7:at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # a whole record, or the last part of one
            yield Record.FromString(whole)
            whole = b''


def wandb_records(path):
    """What W&B kept of a run that has ended. Its service may write the last of it a moment later."""
    deadline, records = time.monotonic() + 60, []
    while not any(record.WhichOneof('record_type') == 'exit' for record in records):
        assert time.monotonic() < deadline, f'{path} has no exit record'
        time.sleep(0.05)
        records = list(parse_wandb(path.read_bytes()))
    return records
