"""
Interrupts runs of train.py again and again and compares what is left with a run that nobody disturbed.

    python tests/crash.py                           # kill term two full, 50 interruptions of each
    python tests/crash.py kill term --times=200
    sudo python tests/crash.py full                 # mounts a file system of 5 MB, which takes root

    kill    SIGKILL: in the start, between two steps or in one, and while a checkpoint is being written
    term    SIGTERM at the same moments
    two     one of two data-parallel processes under torchrun is killed
    full    the disk of the run's folder is full for a while, then the run is killed

After each interruption every checkpoint in the folder must load, its metrics must be whole lines, and no more
steps may be lost than lie between two checkpoints, and those that were made while the newest was written. In
the end metrics, weights and the optimizer's state must be the undisturbed run's to the bit.
"""

import argparse
import contextlib
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402

import checkpoint  # noqa: E402
import train  # noqa: E402
from test_train import ROOT, TINY, assert_same_run, info  # noqa: E402

INTERVAL = 8                            # updates between checkpoints
KINDS = {'kill': 'SIGKILL', 'term': 'SIGTERM', 'two': 'SIGKILL of one of two processes',
         'full': 'full disk, then SIGKILL'}
fork = multiprocessing.get_context('fork')      # imports are made once; a start takes a fraction of a second


def flags(out_dir, times):
    return [*TINY, '--dropout=0.1', f'--max_iters={2 * times * INTERVAL}', f'--eval_interval={2 * INTERVAL}',
            f'--checkpoint_interval={INTERVAL}', '--keep_checkpoints=2', f'--out_dir={out_dir}']


def start(out_dir, times, processes=1):
    """The run, in a process of its own, from the latest checkpoint, if any; log.txt has its output."""
    resume = ['--init_from=resume'] * checkpoint.exists(out_dir)
    if processes > 1:
        command = ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={processes}']
        with open(out_dir / 'log.txt', 'a') as log:
            return subprocess.Popen(
                [sys.executable, *command, str(ROOT / 'train.py'), *flags(out_dir, times), *resume],
                stdout=log, stderr=log, stdin=subprocess.DEVNULL, env={**os.environ, 'OMP_NUM_THREADS': '1'})

    def body():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        log = os.open(out_dir / 'log.txt', os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        train.main([*flags(out_dir, times), *resume])

    process = fork.Process(target=body)
    process.start()
    return process


def alive(process):
    return process.poll() is None if isinstance(process, subprocess.Popen) else process.is_alive()


def ended(process, seconds=120):
    """The exit status of a process that ends within so many seconds."""
    if isinstance(process, subprocess.Popen):
        return process.wait(seconds)
    process.join(seconds)
    assert process.exitcode is not None, 'a run hangs'
    return process.exitcode


def last_step(out_dir):
    """The last step of which metrics.jsonl has a whole line."""
    path = out_dir / 'metrics.jsonl'
    whole = path.read_text().rpartition('\n')[0] if path.exists() else ''
    return train.json.loads(whole.rpartition('\n')[2] or '{"iter": 0}')['iter']


def saved_step(out_dir):
    """The step of the latest checkpoint, 0 where there is none. Every one there must load."""
    for path in out_dir.glob('ckpt*.pt'):
        checkpoint.load(path)
    return checkpoint.load_latest(out_dir, fail)[1]['iter'] if checkpoint.exists(out_dir) else 0


def fail(line):
    raise AssertionError(line)


def stamps(out_dir):
    """(name, time) of run.json, and of the files that are there while a checkpoint is being written."""
    files = [*out_dir.glob('ckpt*.tmp'), *out_dir.glob('ckpt-new.pt'), *out_dir.glob('run.json')]
    found = set()
    for path in files:
        with contextlib.suppress(FileNotFoundError):
            found.add((path.name, path.stat().st_mtime_ns))
    return found


def began(out_dir, was):
    return any(name == 'run.json' for name, _ in stamps(out_dir) - was)


def writing(out_dir, was):
    """Whether a checkpoint is being written or named, by a run before whose start the stamps were these."""
    return any(name != 'run.json' for name, _ in stamps(out_dir) - was)


def wait_for_moment(process, out_dir, was, before, rng):
    """Until a random moment of a run that goes on from step `before`; at once where the process has ended."""
    kind = rng.choice(['start', 'step', 'write'])
    if kind == 'start':
        time.sleep(rng.uniform(0, 1))
        return
    until = before + rng.randrange(1, 2 * INTERVAL)
    while alive(process) and not (began(out_dir, was) and last_step(out_dir) >= until):
        time.sleep(rng.uniform(0, 0.004))
    if kind == 'write':
        while alive(process) and not writing(out_dir, was):
            pass
        time.sleep(rng.uniform(0, 0.003))


def children(process):
    """The process ids of a process's children."""
    return Path(f'/proc/{process.pid}/task/{process.pid}/children').read_text().split()


@contextlib.contextmanager
def filled(folder):
    """No room on the file system of the folder."""
    path = folder / 'filler'
    with contextlib.suppress(OSError), open(path, 'wb', buffering=0) as file:
        while file.write(bytes(4096)):
            pass
    try:
        yield
    finally:
        path.unlink()


def interrupt(kind, process, out_dir, was, before, rng):
    """One interruption. Returns the exit status."""
    if kind == 'two':
        while len(children(process)) < 2:
            time.sleep(0.01)
        wait_for_moment(process, out_dir, was, before, rng)
        os.kill(int(rng.choice(children(process))), signal.SIGKILL)
        return ended(process)
    wait_for_moment(process, out_dir, was, before, rng)
    with filled(out_dir.parent) if kind == 'full' else contextlib.nullcontext():
        if kind == 'full':
            time.sleep(rng.uniform(0, 0.2))
        os.kill(process.pid, signal.SIGTERM if kind == 'term' else signal.SIGKILL)
        return ended(process)


def torment(kind, out_dir, times, rng):
    """Interrupts a run so many times, then lets it end. Returns (how often in a write, most steps lost)."""
    done = in_write = most = 0
    out_dir.mkdir()
    processes = 2 if kind == 'two' else 1
    while done < times:
        before, was = saved_step(out_dir), stamps(out_dir)
        process = start(out_dir, times, processes)
        status = interrupt(kind, process, out_dir, was, before, rng)
        assert status != 0, 'the run ended before it was interrupted often enough'
        done, caught = done + 1, writing(out_dir, was)
        in_write += caught
        reached, saved = last_step(out_dir), saved_step(out_dir)
        most = max(most, reached - saved)
        assert saved >= before and reached - saved <= INTERVAL + INTERVAL * caught, (before, saved, reached)
        if status == train.RESUMABLE:
            assert reached == saved == info(out_dir)['iter'] and info(out_dir)['state'] == 'resumable'
        else:                           # SIGTERM ends a run that has not begun to train
            assert status in (-signal.SIGKILL, -signal.SIGTERM, 1), status
    assert ended(start(out_dir, times, processes), 600) == 0
    return in_write, most


@contextlib.contextmanager
def small_disk(folder):
    """A file system of 5 MB, mounted on the folder. It takes root."""
    folder.mkdir()
    subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=5m', 'tmpfs', str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(['umount', str(folder)], check=True)


def main(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('kinds', nargs='*', help='kill, term, two, full; default: all')
    parser.add_argument('--times', type=int, default=50, help='interruptions of each kind; default: 50')
    parser.add_argument('--seed', type=int, default=1, help='of the moments')
    args = parser.parse_args(argv)
    kinds = args.kinds or list(KINDS)
    if set(kinds) - KINDS.keys():
        parser.error(f'it has {", ".join(KINDS)}, not {", ".join(kinds)}')
    if 'full' in kinds and os.geteuid():
        parser.error('full mounts a file system, which takes root')
    torch.set_num_threads(1)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))       # cleans up, as Ctrl-C does
    print('| interruption | times | in a write | most steps lost | minutes |', '|---|---:|---:|---:|---:|',
          sep='\n', flush=True)
    with tempfile.TemporaryDirectory() as folder:       # TMPDIR says on which disk
        for kind in kinds:
            disk, since = Path(folder) / kind, time.monotonic()
            undisturbed = Path(folder) / f'undisturbed-{kind}'
            undisturbed.mkdir()
            assert ended(start(undisturbed, args.times, 2 if kind == 'two' else 1), 600) == 0
            with small_disk(disk) if kind == 'full' else contextlib.nullcontext(disk.mkdir()):
                in_write, most = torment(kind, disk / 'run', args.times, random.Random(args.seed))
                assert_same_run(disk / 'run', undisturbed)
                assert not list((disk / 'run').glob('*.tmp'))
            minutes = (time.monotonic() - since) / 60
            print(f'| {KINDS[kind]} | {args.times} | {in_write} | {most} | {minutes:.1f} |', flush=True)
    print(f'\nA checkpoint every {INTERVAL} steps. After each interruption every checkpoint could be read; '
          "in the end metrics, weights and moments were the undisturbed run's to the bit.")


if __name__ == '__main__':
    main(sys.argv[1:])
