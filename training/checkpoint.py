"""
What a run keeps in its folder so that nothing is lost: files that are whole or absent, the lock, the
checkpoints.

    ckpt.pt             the latest
    ckpt-previous.pt    the one before it
    ckpt-best.pt        the best validation loss
    ckpt-STEP.pt        those that keep_checkpoints asks for
    run.json            what the run is and how it stands
"""

import fcntl
import json
import os
import shutil
import time
import zipfile
from pathlib import Path

import torch

from data.corpus import atomic_write


LATEST = ('ckpt-new.pt', 'ckpt.pt', 'ckpt-previous.pt')    # ckpt-new.pt is there for a moment, and whole
KEYS = {'model', 'optimizer', 'scaler', 'iter', 'config', 'vocab_size', 'corpus', 'progress'}
held = []                               # open files whose locks last as long as the process


def write_json(path, value):
    with atomic_write(Path(path)) as file:
        file.write(json.dumps(value, indent=1).encode() + b'\n')


def read_info(path):
    """
    run.json's object, or None where there is no file. Raises ValueError, in one line, for a damaged one.
    """
    try:
        info = json.loads(Path(path).read_bytes())
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError) as error:
        raise ValueError(f'{path} is damaged: {error}') from error
    kinds = dict(name=str, state=str, iter=int, val_loss=float | int | None, config=dict)
    if not isinstance(info, dict) or not kinds.keys() <= info.keys() \
            or not all(isinstance(info[key], kind) for key, kind in kinds.items()):
        raise ValueError(f'{path} is not a run.json that train.py wrote')
    return info


def lock(out_dir):
    """Takes the folder until this process ends or dies. Raises ValueError where another process has it."""
    held.append(open(Path(out_dir) / 'lock', 'w'))
    for _ in range(20):                 # sweep.py holds it for an instant, to see whether anybody does
        try:
            return fcntl.flock(held[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.05)
    raise ValueError(f'out_dir is {out_dir}, which another run is using now')


def kept(out_dir):
    """The checkpoints that are named by step, the oldest first."""
    return sorted(Path(out_dir).glob('ckpt-[0-9]*.pt'))


def exists(out_dir):
    """Whether a save was ever finished. A lone ckpt-new.pt is from a first one that was killed at its end."""
    return any((Path(out_dir) / name).exists() for name in LATEST[1:])


def name_too(path, name):
    """Gives a file another name in its folder, whose earlier file goes."""
    other = path.with_name(name)
    temporary = path.with_name(f'{name}.tmp')
    temporary.unlink(missing_ok=True)
    try:
        os.link(path, temporary)        # takes no room of its own
    except OSError:                     # not every file system has second names
        with open(path, 'rb') as file, atomic_write(other) as copy:
            shutil.copyfileobj(file, copy)
    else:
        os.replace(temporary, other)


def save(out_dir, state, best, keep):
    """
    Writes ckpt.pt, keeping the one before as ckpt-previous.pt; ckpt-best.pt where this is the best so far;
    with keep > 0 ckpt-STEP.pt, of which so many before this one stay.

    Whenever the process is killed, a file that is there is whole, and from the end of the first call on one
    of LATEST is there. ckpt.pt is named last: a run that goes on from it will not write the others again.
    """
    folder = Path(out_dir)
    latest, new, previous = folder / 'ckpt.pt', folder / 'ckpt-new.pt', folder / 'ckpt-previous.pt'
    first, *others = ['ckpt-best.pt'] * best + [f'ckpt-{state["iter"]:08}.pt'] * (keep > 0) + [new.name]
    with atomic_write(folder / first) as file:
        torch.save(state, file)         # into a file of Python's: while it writes, other threads can run
    for name in others:
        name_too(folder / first, name)
    if latest.exists():
        os.replace(latest, previous)
    os.replace(new, latest)
    if keep:
        for path in kept(folder)[:-keep - 1]:
            path.unlink()


def load(path):
    """
    A checkpoint: a dict of tensors, numbers and strings, on the CPU. No code in it is ever run.

    Raises FileNotFoundError, or ValueError in one line where it cannot be read.
    """
    try:
        with zipfile.ZipFile(path) as parts:
            broken = parts.testzip()    # torch.load does not look at the checksums
        saved = None if broken else torch.load(path, map_location='cpu', weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:          # it fails in the unpickler, the zip reader or a tensor's storage
        raise ValueError(f'{path} is damaged: {type(error).__name__}') from error
    if broken:
        raise ValueError(f'{path} is damaged: {broken}')
    if not isinstance(saved, dict) or not KEYS <= saved.keys():
        raise ValueError(f'{path} is not a checkpoint that train.py wrote')
    return saved


def load_latest(out_dir, warn):
    """
    (path, checkpoint) of the latest that can be read; warn(line) names those that are damaged. Raises
    ValueError where there is none.
    """
    for path in [*(Path(out_dir) / name for name in LATEST), *reversed(kept(out_dir))]:     # the latest first
        try:
            return path, load(path)
        except FileNotFoundError:
            continue
        except ValueError as error:
            warn(str(error))
    raise ValueError(f'{out_dir} has no checkpoint that can be read')
