"""
How data/<name>/prepare.py writes a corpus: flags, tokens, meta.json, restartable parts, one-line refusals.

corpus.py says what a corpus is and reads it.

A long preparation writes its tokens in parts, out/parts/*.bin, which depend on its input alone. Killed and
started again, it makes those that are missing, so that the joined files are equal to those of a single run.
"""

import argparse
import errno
import fcntl
import hashlib
import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from threading import Thread
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from configurator import one_line
from data.corpus import TOKEN, Tokens, find_fault, open_folder
from training.rundir import atomic_write, write_json

PART = re.compile(r'(train|val)-\d{8,}\.bin')  # the name of a part
# size of a token file per byte of text: about English's
TOKEN_BYTES = dict(gpt2=0.5, byte=2.1)


# flags, and how a script ends


class Parser(argparse.ArgumentParser):
    """The flags of a prepare script. Raises ValueError, in one line, for what it refuses."""

    def __init__(self, doc, out):
        """out: the folder that --out has as its default; None: --out is the script's to require."""
        super().__init__(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
        self.add_argument('--out', type=Path, default=out, metavar='FOLDER',
                          help='folder to write to' + (" (default: this script's)" if out else ''))

    def add_tokenizing(self):
        """The flags of scripts that tokenize in a pool of processes."""
        cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
        self.add_argument('--tokenizer', choices=['gpt2', 'byte'], default='gpt2', help='default: gpt2')
        self.add_argument('--workers', type=int, default=cores, metavar='N',
                          help='processes that tokenize (default: one per core)')

    def parse_args(self, argv=None):
        args = super().parse_args(argv)
        if 'workers' in args and args.workers < 1:
            raise ValueError(f'--workers is {args.workers}, it must be at least 1')
        return args

    def error(self, message):
        raise ValueError(f'{message} (--help lists the flags)')


def run_script(main):
    """Run a prepare script's main(). What flags, files or machine refuse is one line and exit status 1."""
    try:
        with one_line(ValueError):
            main()
    except KeyboardInterrupt:
        raise SystemExit('stopped; the same command goes on from what is finished') from None


# what is prepared


def fraction(digest):
    """A number in [0, 1) that a hash, as bytes, decides."""
    return int.from_bytes(digest[:8], 'big') / 2**64


def readable_name(path):
    """A file's name as text, the same in every locale."""
    return os.fsencode(path.name).decode('utf-8', 'replace')


def hash_file(path):
    """A file's sha256, as bytes."""
    with open(path, 'rb') as file:
        return hashlib.file_digest(file, 'sha256').digest()


def import_library(name):
    """A library that only some corpora need. Raises ValueError, with the remedy, if it is missing."""
    try:
        return import_module(name)
    except ImportError as error:
        raise ValueError(f'{name} is needed here and cannot be imported ({error}): pip install {name}') \
            from None


def hub_revision(repo, out):
    """
    The commit of a Hugging Face dataset that an earlier start in `out` has taken, else the newest one.

    Raises ValueError if the hub has to be asked and cannot be.
    """
    for path in (out / 'meta.json', out / 'parts' / 'plan.json'):
        try:
            source = json.loads(path.read_bytes())['source']
            if source['dataset'] == repo:
                return source['revision']
        except (OSError, ValueError, LookupError, TypeError):
            pass  # no earlier start, or one of another dataset
    hub = import_library('huggingface_hub')
    try:
        return hub.HfApi().dataset_info(repo).sha
    except Exception as error:  # of whichever network library this release of huggingface_hub uses
        raise ValueError(f'cannot reach {repo} on the Hugging Face hub ({error})') from None


def check_disk(needs, remedy):
    """
    Refuse what would fill the disk. needs: [(folder, bytes)]; folders on one disk share its free space.

    Raises ValueError, with the remedy in words, if a disk has less free space.
    """
    for folder, _ in needs:
        folder.mkdir(parents=True, exist_ok=True)
    for folder, _ in needs:
        needed = sum(need for other, need in needs if other.stat().st_dev == folder.stat().st_dev)
        free = shutil.disk_usage(folder).free
        if free < needed:
            raise ValueError(f'{free / 1e9:.1f} GB are free at {folder}, {needed / 1e9:.1f} GB are needed: '
                             f'{remedy}')


# tokens and meta.json


def encode_documents(encoding, texts):
    """
    uint16 tokens of all texts, <|endoftext|> after each. Inside a text that string is ordinary text.

    Raises ValueError if tiktoken cannot encode one.
    """
    end, tokens = [encoding.eot_token], []
    for text in texts:
        try:
            tokens.append(np.array(encoding.encode_ordinary(text) + end, dtype=TOKEN))
        except BaseException as error:
            if type(error).__name__ != 'PanicException':  # of Rust; it is no Exception
                raise
            raise ValueError('tiktoken cannot encode this text, perhaps for a run of a million blank '
                             f'characters: {error}') from None
    return np.concatenate(tokens)


def write_corpus(out, meta, splits):
    """
    Write train.bin, val.bin and, last, meta.json into the folder `out`.

    meta: meta.json without dtype and splits. splits: dict(train=arrays, val=arrays), iterables of uint16
    arrays, each consumed once. Raises ValueError as write_meta() does.
    """
    out.mkdir(parents=True, exist_ok=True)
    (out / 'meta.json').unlink(missing_ok=True)  # until the new one is written this folder must not open
    for split, arrays in splits.items():
        with atomic_write(out / f'{split}.bin') as file:
            for tokens in arrays:
                file.write(tokens.astype(TOKEN).tobytes())
    write_meta(out, meta, {split: [f'{split}.bin'] for split in splits})


def write_meta(out, meta, names):
    """
    Read the token files names['train'] and names['val'] in the folder `out` whole, then write meta.json.

    Raises ValueError if one is no token file or holds a token outside the vocabulary, or if a split is too
    short.
    """
    splits = {}
    for split in ('train', 'val'):
        tokens = Tokens([out / name for name in names[split]], meta['vocab_size'])
        files = [dict(name=name, tokens=count) for name, count in zip(names[split], tokens.counts)]
        splits[split] = dict(files=files) | tokens.describe()
    meta = meta | dict(dtype='uint16', splits=splits)
    fault = find_fault(meta)
    if fault:
        raise ValueError(f'{out} cannot be a corpus: {fault}')
    write_json(out / 'meta.json', meta)


def is_prepared(out, meta):
    """Whether the folder `out` holds a whole corpus whose meta.json has all these entries."""
    try:
        return meta.items() <= open_folder(out).meta.items()
    except (OSError, ValueError):
        return False


def prepared_already(out, meta):
    """
    Whether `out` holds this corpus, which is then reported.

    Raises ValueError if it holds another one.
    """
    if is_prepared(out, meta):
        remove_parts(out / 'parts')
        print(f'{out} is already prepared')
        return True
    refuse_another(out, meta)
    return False


def refuse_another(out, meta):
    """Raises ValueError if the folder `out` holds a whole corpus whose meta.json has other entries."""
    if is_prepared(out, {}) and not is_prepared(out, meta):
        raise ValueError(f'{out} holds another corpus: delete its meta.json or choose another --out')


# parts


@contextmanager
def parts_folder(out, meta):
    """
    The folder out/parts, for what a long preparation has finished. It is removed if the block ends well.

    `meta` is noted there. Raises ValueError if it holds parts of an earlier start with another meta, or if
    another process is preparing in `out`.
    """
    parts = out / 'parts'
    parts.mkdir(parents=True, exist_ok=True)
    with open(parts / 'lock', 'w') as lock:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # lockf's locks do not pass to forked processes
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise ValueError(f'another process is preparing a corpus in {out}') from None
            # else a file system without locks, where the caution is the user's
        plan, note = parts / 'plan.json', json.dumps(meta).encode()
        if not plan.exists() or plan.read_bytes() != note:
            if any(PART.fullmatch(path.name) for path in parts.iterdir()):
                raise ValueError(f'{parts} is unfinished work of another command: delete it or change --out')
            with atomic_write(plan) as file:
                file.write(note)
        yield parts
    remove_parts(parts)


def remove_parts(parts):
    """Remove what a preparation keeps in this folder, and the folder itself if nothing else is in it."""
    for path in parts.iterdir() if parts.exists() else ():
        if PART.fullmatch(path.name) or path.name in ('plan.json', 'lock'):
            path.unlink()
        elif path.name == '.cache':
            shutil.rmtree(path)  # of huggingface_hub, beside what it downloads
    with suppress(OSError):  # what somebody else has put there stays
        parts.rmdir()


class Job(NamedTuple):
    """A part to be made."""
    path: Path  # exists once the part is finished
    size: int  # what it adds to the progress
    work: tuple  # further arguments of make_part()


def make_parts(make_part, jobs, workers, total, unit):
    """
    Call make_part(path, *work) for each Job whose path does not exist yet, in a pool of processes.

    jobs may be a generator, which is read only a little ahead of the work; total is the sum of their sizes,
    in `unit`. Returns the paths in order. Raises ValueError if a process was killed, and what make_part()
    and the generator raise.
    """
    pool, paths = ProcessPoolExecutor(workers, initializer=start_process, initargs=(make_part,)), []
    try:
        pool.submit(int).result()  # the processes are forked before tqdm starts a thread
        with tqdm(desc='tokenizing', total=total, unit=unit, unit_scale=unit == 'B',
                  mininterval=0.5 if sys.stderr.isatty() else 60) as bar:
            for job, future in submit_ahead(pool, jobs, 2 * workers):
                future.result()
                bar.update(job.size)
                paths.append(job.path)
    except BrokenProcessPool:
        raise ValueError('a tokenizing process was killed, perhaps for lack of memory: the same command with '
                         f'fewer than --workers={workers} goes on from the finished parts') from None
    finally:
        pool.shutdown(cancel_futures=True)
    return paths


def submit_ahead(pool, jobs, ahead):
    """Yield (job, its Future) in order, with `ahead` further jobs submitted."""
    pending = deque()
    for job in jobs:
        pending.append((job, pool.submit(make_if_missing, job)))
        if len(pending) > ahead:
            yield pending.popleft()
    yield from pending


def start_process(make_part):
    """In each process of the pool: keep what every part needs, and do not outlive the parent."""
    global make_this_part
    make_this_part = make_part
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent to answer
    Thread(target=leave_with_parent, daemon=True).start()


def leave_with_parent():
    multiprocessing.parent_process().join()
    os._exit(1)


def make_if_missing(job):
    if not job.path.exists():
        make_this_part(job.path, *job.work)


def read_parts(paths):
    """The tokens of parts, one array at a time."""
    return (np.fromfile(path, TOKEN) for path in paths)
