"""
What a run keeps in its folder so that nothing is lost: files that are whole or absent, the lock, the
checkpoints.

    ckpt.pt         the latest;  ckpt-previous.pt  the one before it;  ckpt-best.pt  the best validation loss
    run.json        what the run is and how it stands
"""

import fcntl
import json
import os
import shutil
import zipfile
from pathlib import Path

import torch

from corpus import atomic_write


LATEST = ('ckpt.pt', 'ckpt-previous.pt')    # the first that can be read is where a run goes on
KEYS = {'model', 'optimizer', 'scaler', 'iter', 'config', 'vocab_size', 'corpus', 'progress'}
held = []                               # open files whose locks last as long as the process


def write_json(path, value):
    with atomic_write(Path(path)) as file:
        file.write(json.dumps(value, indent=1).encode() + b'\n')


def read_run(path):
    """
    run.json's object, or None where there is no file. Raises ValueError, in one line, for a damaged one.
    """
    try:
        info = json.loads(Path(path).read_bytes())
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError) as error:
        raise ValueError(f'{path} is damaged: {error}') from error
    if not isinstance(info, dict) or not {'name', 'state', 'iter', 'val_loss'} <= info.keys() \
            or not isinstance(info.get('config'), dict):
        raise ValueError(f'{path} is not a run.json that train.py wrote')
    return info


def lock(out_dir):
    """Takes the folder until this process ends or dies. Raises ValueError where another process has it."""
    held.append(open(Path(out_dir) / 'lock', 'w'))
    try:
        fcntl.flock(held[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ValueError(f'out_dir is {out_dir}, which another run is using now') from error


def exists(out_dir):
    return any((Path(out_dir) / name).exists() for name in LATEST)


def save(out_dir, state, best):
    """
    Writes ckpt.pt, keeping the one before as ckpt-previous.pt, and ckpt-best.pt where this is the best so
    far.
    """
    names = ('', '-new', '-previous', '-best', '-best-new')
    latest, new, previous, kept, kept_new = (Path(out_dir) / f'ckpt{name}.pt' for name in names)
    with atomic_write(new) as file:
        torch.save(state, file)
    if latest.exists():
        os.replace(latest, previous)
    os.replace(new, latest)
    if best:
        kept_new.unlink(missing_ok=True)
        try:
            os.link(latest, kept_new)   # a second name of the same file, which takes no room of its own
        except OSError:                 # not every file system has such names
            shutil.copyfile(latest, kept_new)
        os.replace(kept_new, kept)


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
    (path, checkpoint) of ckpt.pt, or of the one before where ckpt.pt is missing or damaged; warn(line) says
    so.
    """
    for name in LATEST:
        path = Path(out_dir) / name
        try:
            return path, load(path)
        except FileNotFoundError:
            continue
        except ValueError as error:
            warn(str(error))
    raise ValueError(f'{out_dir} has no checkpoint that can be read')
