"""
How data/<name>/prepare.py writes a corpus: tokens, meta.json, restartable parts, one-line refusals.

corpus.py says what a corpus is and reads it.
"""

import argparse
import errno
import json
import shutil
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from configurator import fail
from data.corpus import TOKEN, Tokens, find_fault, open_folder
from training.rundir import atomic_write


def encode_documents(encoding, texts):
    """uint16 tokens of all texts, <|endoftext|> after each. Inside a text that string is ordinary text."""
    end = [encoding.eot_token]
    return np.concatenate([np.array(encoding.encode_ordinary(text) + end, dtype=TOKEN) for text in texts])


def write_corpus(out, meta, splits):
    """Writes train.bin, val.bin and, last of all, meta.json into the folder `out`.

    meta: meta.json but for dtype and splits; splits: {"train": arrays, "val": arrays}, iterables of uint16
    arrays, each consumed once. ValueError as write_meta's."""
    out.mkdir(parents=True, exist_ok=True)
    (out / 'meta.json').unlink(missing_ok=True)  # until the new one is written this folder must not open
    for split, arrays in splits.items():
        with atomic_write(out / f'{split}.bin') as file:
            for tokens in arrays:
                file.write(tokens.astype(TOKEN).tobytes())
    write_meta(out, meta, {split: [f'{split}.bin'] for split in splits})


def write_meta(out, meta, names):
    """Reads the token files names["train"] and names["val"] in the folder `out` whole, then writes meta.json.

    ValueError if one is no token file, holds a token outside the vocabulary, or a split is too short."""
    splits = {}
    for split in ('train', 'val'):
        tokens = Tokens([out / name for name in names[split]], meta['vocab_size'])
        files = [{'name': name, 'tokens': count} for name, count in zip(names[split], tokens.counts)]
        splits[split] = {'files': files, **tokens.describe()}
    meta = {**meta, 'dtype': 'uint16', 'splits': splits}
    fault = find_fault(meta)
    if fault:
        raise ValueError(f'{out} cannot be a corpus: {fault}')
    with atomic_write(out / 'meta.json') as file:
        file.write(json.dumps(meta, indent=1).encode() + b'\n')


def is_prepared(out, meta):
    """Whether the folder `out` holds a whole corpus whose meta.json has all these entries."""
    try:
        found = open_folder(out).meta
    except (OSError, ValueError):
        return False
    return all(found.get(key) == value for key, value in meta.items())


@contextmanager
def parts_folder(out, meta):
    """Gives the folder out/parts for what a long preparation has finished, removed if the block ends well.

    `meta` is noted there. ValueError if parts are there that an earlier start with another meta made, or if
    another process is preparing in `out`."""
    import fcntl  # not on every system where a run reads a corpus
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
            if plan.exists() and any(parts.glob('*.bin')):
                raise ValueError(f'{parts} is unfinished work of another command: delete it or change --out')
            for path in parts.glob('*.bin'):
                path.unlink()
            with atomic_write(plan) as file:
                file.write(note)
        yield parts
    shutil.rmtree(parts)


def hub_revision(repo, out):
    """The commit of a Hugging Face dataset that an earlier start in `out` has taken, else the newest one.

    ValueError if that has to be asked for and the hub does not answer."""
    for path in (out / 'meta.json', out / 'parts' / 'plan.json'):
        try:
            source = json.loads(path.read_bytes())['source']
            if source['dataset'] == repo:
                return source['revision']
        except (OSError, ValueError, LookupError, TypeError):
            pass  # nothing is noted there
    from huggingface_hub import HfApi
    try:
        return HfApi().dataset_info(repo).sha
    except Exception as error:  # of whichever network library this release of huggingface_hub uses
        raise ValueError(f'cannot reach {repo} on the Hugging Face hub ({error})') from None


class Parser(argparse.ArgumentParser):
    """A prepare script's flags: --out and what the script adds. What it refuses is a one-line ValueError."""

    def __init__(self, script, doc):
        super().__init__(description=doc.split('\n')[0])
        self.add_argument('--out', type=Path, default=Path(script).resolve().parent,
                          help="folder to write to (default: this script's)")

    def error(self, message):
        raise ValueError(f'{message} (--help lists the flags)')


def plainly(main):
    """Runs a prepare script's main(): what flags, files or machine refuse is one line and exit status 1."""
    try:
        main()
    except (OSError, ValueError) as error:
        fail(f'{error.filename}: {error.strerror}' if getattr(error, 'filename', None) else str(error))
    except KeyboardInterrupt:
        raise SystemExit('stopped; the same command goes on from what is finished') from None
