"""
Interrupt runs of train.py again and again, and compare what they leave with an undisturbed run.

    python tests/crash.py  # kill term two full, 50 interruptions of each
    python tests/crash.py kill term --times=200
    sudo python tests/crash.py full  # mounts a file system of 5 MB, which takes root

    kill    SIGKILL: at the start, between two steps or in one, and while a checkpoint is being written
    term    SIGTERM at the same moments
    two     one of two data-parallel processes under torchrun is killed
    full    the disk of the run's folder is full for a while, then the run is killed

After each interruption every checkpoint in the folder must load, its metrics must be whole lines, and no more
steps may be lost than lie between two checkpoints, besides those that were made while the newest was being
written. At the end metrics, weights and the optimizer's state must equal the undisturbed run's to the bit.
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

import torch
import torch._dynamo  # an optimizer needs it; imported here once, not in every fork

import train
from configurator import ROOT, begin_program
from toy_runs import DROPOUT, assert_same_run, info
from training import checkpoint, rundir

INTERVAL = 8  # updates between checkpoints
KINDS = {'kill': 'SIGKILL', 'term': 'SIGTERM', 'two': 'SIGKILL of one of two processes',
         'full': 'full disk, then SIGKILL'}
fork = multiprocessing.get_context('fork')  # imports are made once; a start takes a fraction of a second


# a run in processes of its own


def flags(out_dir, times):
    return [*DROPOUT, f'--max_iters={2 * times * INTERVAL}', f'--eval_interval={2 * INTERVAL}',
            f'--checkpoint_interval={INTERVAL}', '--keep_checkpoints=2', f'--out_dir={out_dir}']


def start(out_dir, times, processes=1):
    """Start the run, or resume it if it has a checkpoint; log.txt gets its output."""
    resume = ['--init_from=resume'] * rundir.has_checkpoint(out_dir)
    if processes > 1:
        command = ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={processes}']
        with open(out_dir / 'log.txt', 'a') as log:
            return subprocess.Popen(
                [sys.executable, *command, str(ROOT / 'train.py'), *flags(out_dir, times), *resume],
                stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=os.environ | dict(OMP_NUM_THREADS='1'))

    def body():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        log = os.open(out_dir / 'log.txt', os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        begin_program()  # as train.py does: log.txt is on the disk that may be full
        train.main([*flags(out_dir, times), *resume])

    process = fork.Process(target=body)
    process.start()
    return process


def alive(process):
    return process.poll() is None if isinstance(process, subprocess.Popen) else process.is_alive()


def exit_status(process, seconds=120):
    """Wait for a process, which must end within this many seconds."""
    if isinstance(process, subprocess.Popen):
        return process.wait(seconds)
    process.join(seconds)
    assert process.exitcode is not None, 'a run hangs'
    return process.exitcode


def children(process):
    """The process ids of a process's children."""
    return Path(f'/proc/{process.pid}/task/{process.pid}/children').read_text().split()


# what is in its folder


def last_step(out_dir):
    """The step of the last whole line of metrics.jsonl."""
    return rundir.last_metrics(out_dir).get('iter', 0)


def saved_step(out_dir):
    """The step of the latest checkpoint, 0 before there is one. Every checkpoint there must load."""
    for path in out_dir.glob('ckpt*.pt'):
        checkpoint.load(path)
    return checkpoint.load_latest(out_dir, fail)[1]['iter'] if rundir.has_checkpoint(out_dir) else 0


def fail(line):
    raise AssertionError(line)


def stamps(out_dir):
    """{(name, time)} of run.json and of the files that exist while a checkpoint is being written."""
    files = [*out_dir.glob('ckpt*.tmp'), *out_dir.glob('ckpt-new.pt'), *out_dir.glob('run.json')]
    found = set()
    for path in files:
        with contextlib.suppress(FileNotFoundError):
            found.add((path.name, path.stat().st_mtime_ns))
    return found


def has_begun(out_dir, before):
    """Whether a run has written its run.json. before: stamps() before its start."""
    return any(name == 'run.json' for name, _ in stamps(out_dir) - before)


def is_writing(out_dir, before):
    """Whether a run is writing or renaming a checkpoint. before: stamps() before its start."""
    return any(name != 'run.json' for name, _ in stamps(out_dir) - before)


# interruptions


def wait_for_moment(process, out_dir, before, step, rng):
    """Wait for a random moment of a run that started at `step`, or for its end."""
    kind = rng.choice(['start', 'step', 'write'])
    if kind == 'start':
        time.sleep(rng.uniform(0, 0.3))
        return
    until = step + rng.randrange(1, 2 * INTERVAL)
    while alive(process) and not (has_begun(out_dir, before) and last_step(out_dir) >= until):
        time.sleep(rng.uniform(0, 0.004))
    if kind == 'write':
        while alive(process) and not is_writing(out_dir, before):
            pass
        time.sleep(rng.uniform(0, 0.003))


@contextlib.contextmanager
def filled(folder):
    """Fill the file system of the folder."""
    path = folder / 'filler'
    with contextlib.suppress(OSError), open(path, 'wb', buffering=0) as file:
        while file.write(bytes(4096)):
            pass
    try:
        yield
    finally:
        path.unlink()


def interrupt(kind, process, out_dir, before, step, rng):
    """Interrupt a run at a random moment. Returns its exit status."""
    if kind == 'two':
        while len(children(process)) < 2:
            time.sleep(0.01)
        wait_for_moment(process, out_dir, before, step, rng)
        os.kill(int(rng.choice(children(process))), signal.SIGKILL)
        return exit_status(process)
    wait_for_moment(process, out_dir, before, step, rng)
    with filled(out_dir.parent) if kind == 'full' else contextlib.nullcontext():
        if kind == 'full':  # long enough for lines of progress and a checkpoint that cannot be written
            time.sleep(rng.uniform(0, 0.5))
            assert alive(process) or not has_begun(out_dir, before), 'a full disk has ended the run'
        os.kill(process.pid, signal.SIGTERM if kind == 'term' else signal.SIGKILL)
        return exit_status(process)


def interrupt_often(kind, out_dir, times, rng):
    """Interrupt a run `times` times, then let it end. Returns (how often in a write, most steps lost)."""
    in_write = most = 0
    out_dir.mkdir()
    processes = 2 if kind == 'two' else 1
    for _ in range(times):
        step, before = saved_step(out_dir), stamps(out_dir)
        status = interrupt(kind, start(out_dir, times, processes), out_dir, before, step, rng)
        assert status != 0, 'the run ended before it was interrupted often enough'
        caught = is_writing(out_dir, before)
        in_write += caught
        reached, saved = last_step(out_dir), saved_step(out_dir)
        most = max(most, reached - saved)
        # on a full disk the last page of metrics.jsonl takes some lines more, and no checkpoint fits
        bound = INTERVAL + INTERVAL * caught + 40 * (kind == 'full')
        assert saved >= step and reached - saved <= bound, (step, saved, reached)
        if status == train.RESUMABLE:
            assert reached == saved == info(out_dir)['iter'] and info(out_dir)['state'] == 'resumable'
        else:  # SIGTERM, or a disk that is full, ends a run that has not begun to train
            killed = {'term': -signal.SIGTERM, 'two': 1}.get(kind, -signal.SIGKILL)
            refused = kind == 'full' and status == 1 and not has_begun(out_dir, before)
            assert status == killed or refused, status
            if kind != 'two' and has_begun(out_dir, before):
                assert info(out_dir)['state'] == 'running'
        assert kind == 'two' or 'Traceback' not in (out_dir / 'log.txt').read_text()
    assert exit_status(start(out_dir, times, processes), 600) == 0
    return in_write, most


# the script


@contextlib.contextmanager
def small_disk(folder):
    """Mount a file system of 5 MB on the folder. It takes root."""
    folder.mkdir()
    subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=5m', 'tmpfs', str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(['umount', str(folder)], check=True)


def parse_args(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('kinds', nargs='*', help='kill, term, two, full; default: all')
    parser.add_argument('--times', type=int, default=50, help='interruptions of each kind; default: 50')
    parser.add_argument('--seed', type=int, default=1, help='of the moments')
    args = parser.parse_args(argv)
    args.kinds = args.kinds or list(KINDS)
    if set(args.kinds) - KINDS.keys():
        parser.error(f'kinds are {", ".join(args.kinds)}, they must be among {", ".join(KINDS)}')
    if 'full' in args.kinds and os.geteuid():
        parser.error('full mounts a file system, which takes root')
    return args


def compare_kind(kind, folder, args):
    """Interrupt a run of one kind, in `folder`, and compare it. Returns (how often in a write, most lost)."""
    disk, undisturbed = folder / kind, folder / f'undisturbed-{kind}'
    undisturbed.mkdir()
    assert exit_status(start(undisturbed, args.times, 2 if kind == 'two' else 1), 600) == 0
    with small_disk(disk) if kind == 'full' else contextlib.nullcontext(disk.mkdir()):
        found = interrupt_often(kind, disk / 'run', args.times, random.Random(args.seed))
        assert_same_run(disk / 'run', undisturbed)
        assert not list((disk / 'run').glob('*.tmp'))
    return found


def main(argv):
    args = parse_args(argv)
    torch.set_num_threads(1)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # cleans up, as Ctrl-C does
    print('| interruption | times | in a write | most steps lost | minutes |', '|---|---:|---:|---:|---:|',
          sep='\n', flush=True)
    with tempfile.TemporaryDirectory() as folder:  # TMPDIR says on which disk
        for kind in args.kinds:
            began = time.monotonic()
            in_write, most = compare_kind(kind, Path(folder), args)
            minutes = (time.monotonic() - began) / 60
            print(f'| {KINDS[kind]} | {args.times} | {in_write} | {most} | {minutes:.1f} |', flush=True)
    print(f'\nA checkpoint every {INTERVAL} steps. After each interruption every checkpoint could be read; '
          "at the end metrics, weights and moments equalled the undisturbed run's to the bit.")


if __name__ == '__main__':
    main(sys.argv[1:])
