"""
A run's folder: who may write it, what stands in it, and how it is read. Without torch.

    metrics.jsonl       a JSON object a line, by iter: evaluations and log lines
    run.json            what the run is and how it stands: running, finished, resumable, failed or diverged
    lock                locked while a process trains the run
    log.txt             the output of a run that sweep.py started
    ckpt*.pt            checkpoints, see checkpoint.py
"""

import errno
import fcntl
import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from types import NoneType

from configurator import ROOT, complete, describe_changes, differences, fail

# a save may be interrupted between two renames; ckpt-new.pt is there for a moment, and whole
LATEST = ('ckpt-new.pt', 'ckpt.pt', 'ckpt-previous.pt')
NEEDED = dict(name=str, state=str, config=dict, corpus=dict, all_reduces=dict, parameters=int,
              communications=int | float, iter=int, val_loss=float | int | None)  # of a run.json

NO_LOCKS = errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP  # what flock() says on a file system without locks
locks = []  # open files, whose locks last as long as this process


# writing


@contextmanager
def atomic_write(path):
    """
    Open a temporary file beside `path` for bytes; if the block ends well, flush it to the disk and rename it.

    At every moment `path` is whole, old or new. If the block raises, the temporary file is removed.
    """
    temporary = path.with_name(path.name + '.tmp')
    try:
        with open(temporary, 'wb') as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path, value):
    with atomic_write(Path(path)) as file:
        file.write(json.dumps(value, indent=1).encode() + b'\n')


# locking


def lock(out_dir):
    """
    Lock the folder until this process ends or dies. Raises ValueError if another process holds it.

    Prints a warning if the file system has no locks: then nothing keeps two runs apart but the user.
    """
    locks.append(open(Path(out_dir) / 'lock', 'w'))
    for _ in range(20):  # is_locked() holds it for an instant
        try:
            return fcntl.flock(locks[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.05)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            return print(f'warning: {out_dir} is on a file system without locks ({error.strerror}); take '
                         'care that no other process trains there', file=sys.stderr)
    raise ValueError(f'out_dir is {out_dir}, which another run is using now')


def is_locked(out_dir):
    """Whether a process is training the run in this folder."""
    path = Path(out_dir) / 'lock'
    if path.exists():
        with open(path) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise
    return False


# reading


def read_info(out_dir):
    """
    run.json's contents, None if there is none. Config keys that an earlier version lacked take their default.

    Raises ValueError, in one line, if the file is damaged or not train.py's.
    """
    path = Path(out_dir) / 'run.json'
    try:
        info = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError) as error:
        raise ValueError(f'{path} is damaged: {error}') from None
    if not isinstance(info, dict):
        raise ValueError(f'{path} is not a run.json that train.py wrote')
    wrong = [key for key, kind in NEEDED.items() if key not in info or not isinstance(info[key], kind)]
    if wrong:
        raise ValueError(f'{path} is not a run.json that train.py wrote: {", ".join(wrong)} missing or wrong')
    return info | dict(config=complete(info['config']))


def read_metrics(out_dir):
    """
    The two kinds of lines of metrics.jsonl, as {iter: line}: evaluations, log lines.

    A line is a JSON object with a whole number as its `iter` and numbers or nulls as its other values. Its
    `diagnostics` are an object of numbers and lists; the drift of an earlier version is lists. A killed run
    may leave half a line at the end, which is dropped. Any other broken line ends the program.
    """
    path = Path(out_dir) / 'metrics.jsonl'
    evals, logs = {}, {}
    lines = path.read_bytes().split(b'\n') if path.exists() else []
    for number, text in enumerate(lines, 1):
        if not text.strip():
            continue
        try:
            line = json.loads(text)
            groups = [found if key.startswith('drift') else [found] for key, found in line.items()
                      if key != 'diagnostics']
            groups += [found if isinstance(found, list) else [found]
                       for found in line.get('diagnostics', {}).values()]
            kinds = {type(value) for group in groups for value in group}
            if type(line['iter']) is not int or not kinds <= {int, float, NoneType}:
                raise ValueError
            (evals if 'val_loss' in line else logs)[line['iter']] = line
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            if number < len(lines):  # the last has no newline after it: it was being written
                fail(f'{path} line {number} is broken: {text[:60].decode(errors="replace")}')
    return evals, logs


def last_line(path):
    """The last whole line of a file that is not blank; '' if there is none."""
    whole = path.read_text(errors='replace').rpartition('\n')[0] if path.exists() else ''
    return whole.rstrip().rpartition('\n')[2]


def last_metrics(out_dir):
    """The last line of metrics.jsonl as a dict, {} before there is one."""
    return json.loads(last_line(Path(out_dir) / 'metrics.jsonl') or '{}')


def has_checkpoint(out_dir):
    """Whether a save was ever finished. ckpt-new.pt alone means the first save was interrupted."""
    return any((Path(out_dir) / name).exists() for name in LATEST[1:])


def saved_at(out_dir):
    """The time of the last checkpoint, 0 before there is one."""
    path = Path(out_dir) / 'ckpt.pt'
    return path.stat().st_mtime if path.exists() else 0


def find_runs(paths):
    """(run folders among the paths or directly under them, paths that hold none or cannot be read)"""
    def is_run(folder):
        return os.access(folder, os.X_OK) and any(
            (folder / name).exists() for name in ('run.json', 'metrics.jsonl', 'log.txt'))

    found, empty = {}, []
    for path in paths:
        if not path.exists():
            fail(f'{path} does not exist: name run folders, or folders that hold them')
        inside = [path] if is_run(path) else sorted(p for p in path.glob('*') if is_run(p))
        found |= dict.fromkeys(inside)
        empty += [p for p in path.glob('*') if p.is_dir() and not os.access(p, os.X_OK)] if inside else [path]
    return list(found), empty


# a run's start


def claim(config):
    """
    Lock out_dir for this run. Nothing there is overwritten, except metrics of a run that never reached a
    checkpoint.

    Returns (result, resuming): the result, in words, of a run that is finished already, else None; whether
    the run continues from a checkpoint. Raises ValueError if out_dir is not this run's to write.
    """
    out_dir, told_to = config.out_dir, config.resume == 'resume'
    saved = has_checkpoint(out_dir)
    resuming = told_to or (config.resume == 'auto' and saved)
    if resuming and not saved:
        raise ValueError(f'init_from is resume, but {out_dir} has no checkpoint')
    if config.eval_only:
        return None, resuming
    try:
        os.makedirs(out_dir, exist_ok=True)
        lock(out_dir)
    except OSError as error:
        why = error.strerror
        if os.path.islink(out_dir) and not os.path.exists(out_dir):
            why = f'it is a link to {os.readlink(out_dir)}, which does not exist'
        raise ValueError(f'out_dir is {out_dir}, which cannot be written: {why}') from None
    info = read_info(out_dir)
    changed = differences(info['config'], vars(config)) if info else {}
    finished = info is not None and info['state'] == 'finished'
    if finished and not changed:
        loss = math.nan if info['val_loss'] is None else info['val_loss']
        return f'{info["name"]} is finished: val loss {loss:.4f}, step {info["iter"]} ({out_dir})', False
    longer = finished and config.max_iters > info['iter']  # a finished run may be continued to more steps
    if changed and not (told_to and (longer or not finished)):
        raise ValueError(f'out_dir is {out_dir}, which holds another run ({describe_changes(changed)}); '
                         'choose another --out_dir')
    if saved and not resuming:
        raise ValueError(f'out_dir is {out_dir}, which holds this run unfinished; --init_from=resume goes on')
    return None, resuming


def read_plan(path):
    """An experiment's plan, for run.json: its file, the file's hash and its text."""
    text = Path(path).read_bytes()
    return dict(file=str(path), sha256=hashlib.sha256(text).hexdigest(), text=text.decode())


def git_commit():
    """The commit of the code that runs; None without git or a repository."""
    if shutil.which('git') is None:
        return None
    command = ['git', 'rev-parse', '--verify', '-q', 'HEAD']
    git = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return git.stdout.strip() or None
