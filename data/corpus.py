"""
What a prepared corpus is: its files, its tokenizers, and how a run opens it. preparing.py writes them.

A corpus is a folder with a meta.json that names the token files of two splits, train and val. A token file is
little-endian uint16, bare (nanoGPT's .bin) or behind the 1,024-byte header of llm.c's shards; its first four
bytes say which. The files are data and nothing else: their contents are compared, never executed, and what
does not fit is refused with a ValueError of one plain line.

    corpus = open_corpus('pystdlib')
    load_tokenizer(corpus.meta).decode(corpus.train.read(0, 80).tolist())
"""

import hashlib
import json
import os
from bisect import bisect_right
from collections.abc import Callable
from functools import partial
from itertools import accumulate
from pathlib import Path
from reprlib import repr as brief
from typing import NamedTuple

import numpy as np
import tiktoken

from configurator import ROOT

DATA_DIR = ROOT / 'data'
EOT = '<|endoftext|>'
VOCAB_SIZES = dict(byte=257, gpt2=50257)
TOKEN = np.dtype('<u2')
# llm.c's header is 256 little-endian int32, of which three are used: magic, version, token count
MAGIC, VERSION, HEADER_BYTES = 20240520, 1, 1024
SCAN_TOKENS = 1 << 22
PICKLE = ("nanoGPT's meta.pkl is a pickle, which is code and is not read; prepare its text with "
          'python data/shakespeare_char/prepare.py --input=FILE')


# tokenizers


class Tokenizer(NamedTuple):
    encode: Callable  # str -> list of int; <|endoftext|> is the special token, if the tokenizer has one
    decode: Callable  # list of int, each below meta.json's vocab_size -> str


def byte_encoding():
    """A tiktoken.Encoding of the 256 bytes, each a token, and <|endoftext|> = 256. It needs no file."""
    # nothing is ever merged, so the pattern only sets how much text tiktoken takes at a time: lines are fast
    return tiktoken.Encoding('byte', pat_str=r'[^\n]+|\n+',
                             mergeable_ranks={bytes([i]): i for i in range(256)}, special_tokens={EOT: 256})


def byte_units():
    """The 256 bytes as GPT-2's vocabulary files write them, each as one visible character."""
    visible = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte if byte in visible else next(others)) for byte in range(256)]


def load_encoding(name):
    """The tiktoken.Encoding called 'byte' or 'gpt2'. Raises ValueError if gpt2's files cannot be fetched."""
    if name == 'byte':
        return byte_encoding()
    try:
        return tiktoken.get_encoding(name)
    except OSError as error:  # the exceptions of requests are OSErrors
        raise ValueError(f'tiktoken cannot fetch its {name} files ({type(error).__name__}): connect to the '
                         'network, or set TIKTOKEN_CACHE_DIR to a folder that holds them') from None


def load_tokenizer(meta):
    """
    The Tokenizer of a corpus, from its meta.json. Raises ValueError if its files cannot be fetched.

    meta may be of a net instead: file is then its tokenizer.json.
    """
    if 'file' in meta:
        from tokenizers import Tokenizer as FromFile  # which transformers brings, and no corpus needs
        found = FromFile.from_file(meta['file'])
        return Tokenizer(lambda text: found.encode(text, add_special_tokens=False).ids,
                         partial(found.decode, skip_special_tokens=False))
    if meta['tokenizer'] == 'char':
        return char_tokenizer(meta['chars'])
    encoding = load_encoding(meta['tokenizer'])
    return Tokenizer(partial(encoding.encode, allowed_special='all'), encoding.decode)


def char_tokenizer(chars):
    """The Tokenizer whose token i is chars[i]. Its encode raises ValueError for any other character."""
    token_of = {char: token for token, char in enumerate(chars)}

    def encode(text):
        unknown = set(text) - token_of.keys()
        if unknown:
            raise ValueError(f'character {min(unknown)!r} is not among the {len(chars)} of this corpus')
        return [token_of[char] for char in text]

    return Tokenizer(encode, lambda tokens: ''.join(chars[token] for token in tokens))


# token files


def find_tokens(path):
    """(offset in bytes, number of tokens) of a token file. Raises ValueError if it is none, or cut short."""
    if not path.is_file():
        raise ValueError(f'{path} is missing')
    size = path.stat().st_size
    with open(path, 'rb') as file:
        start = file.read(12)
    if not start:
        raise ValueError(f'{path} is empty')
    magic, version, tokens = (int.from_bytes(start[i:i + 4], 'little') for i in (0, 4, 8))
    if magic != MAGIC:
        if size % TOKEN.itemsize:
            raise ValueError(f'{path} has an odd size, {size} bytes: it is cut short or does not hold uint16')
        return 0, size // TOKEN.itemsize
    if version != VERSION:
        raise ValueError(f"{path} has version {version} in its header, GPT-2's uint16 tokens have {VERSION}")
    if tokens == 0 or size != HEADER_BYTES + tokens * TOKEN.itemsize:
        raise ValueError(f'{path} has {size} bytes, which are not the {tokens} tokens that its header gives')
    return HEADER_BYTES, tokens


class Tokens:
    """The tokens of one split, its files end to end. Raises ValueError if one of them is no token file."""

    def __init__(self, paths, vocab_size):
        self.paths, self.vocab_size = paths, vocab_size
        # bytes before the tokens, and the number of tokens
        self.offsets, self.counts = zip(*map(find_tokens, paths))
        # read, not mapped: the pages of a mapped file fault when touched and count as this process's memory
        self.files = [open(path, 'rb', buffering=0) for path in paths]
        self.begins = [0, *accumulate(self.counts)]  # position of each file's first token, and the end

    def __len__(self):
        return self.begins[-1]

    def read_windows(self, starts, n):
        """
        (len(starts), n) uint16: n tokens from each start.

        Raises ValueError if one is outside the vocabulary.
        """
        windows = np.empty((len(starts), n), dtype=TOKEN)
        for window, start in zip(windows, starts):
            self.fill(window, int(start))
        if windows.size and windows.max() >= self.vocab_size:
            row, column = np.argwhere(windows >= self.vocab_size)[0]
            path, token = self.paths[self.file_at(starts[row] + column)], windows[row, column]
            raise ValueError(f'{path} holds the token {token}, outside the vocabulary of {self.vocab_size}: '
                             'delete this file and prepare the corpus again')
        return windows

    def read(self, start, n):
        """(n,) uint16: the tokens start to start + n - 1. Raises ValueError as read_windows() does."""
        return self.read_windows([start], n)[0]

    def describe(self):
        """The entries of a split in meta.json beside its files; sha256 is of the tokens without headers."""
        largest, digest = 0, hashlib.sha256()
        for start in range(0, len(self), SCAN_TOKENS):
            chunk = np.empty(min(SCAN_TOKENS, len(self) - start), dtype=TOKEN)
            self.fill(chunk, start)
            largest = max(largest, int(chunk.max()))
            digest.update(chunk)
        return dict(tokens=len(self), max_token=largest, sha256=digest.hexdigest())

    def file_at(self, position):
        return bisect_right(self.begins, position) - 1

    def fill(self, window, start):
        """Read tokens into `window`, an array of uint16, from position `start` on."""
        assert 0 <= start <= len(self) - len(window), f'{len(window)} tokens from {start} of {len(self)}'
        while len(window):
            i = self.file_at(start)
            piece = window[:self.begins[i + 1] - start]
            offset = self.offsets[i] + (start - self.begins[i]) * TOKEN.itemsize
            if os.preadv(self.files[i].fileno(), [piece], offset) < piece.nbytes:
                raise ValueError(f'{self.paths[i]} became shorter while it was in use')
            window, start = window[len(piece):], start + len(piece)


# opening a corpus


class Corpus(NamedTuple):
    name: str
    meta: dict
    vocab_size: int  # meta.json's, before the model rounds it up
    train: Tokens
    val: Tokens


def open_corpus(dataset, data_dir=DATA_DIR):
    """
    The Corpus in the folder data_dir/dataset.

    Raises ValueError, naming the command that prepares it, if a file is missing, cut short or of another
    dtype, or if it contradicts meta.json. val is read whole and compared with its hash and its largest token;
    of train only the size is checked here, and its tokens when they are read.
    """
    folder = Path(data_dir) / dataset
    try:
        if dataset != folder.name or not folder.is_dir():
            raise ValueError(f'there is no dataset {brief(dataset)} in {data_dir}')
        return open_folder(folder)
    except (OSError, ValueError) as error:
        raise ValueError(f'{error}: {preparation(dataset, data_dir)}') from None


def preparation(dataset, data_dir):
    """How to prepare the dataset of that name, in words."""
    known = sorted(path.parent.name for path in DATA_DIR.glob('*/prepare.py'))
    known.remove('text')  # it prepares datasets of other names
    folder, inside = Path(data_dir) / dataset, Path(data_dir).resolve() == DATA_DIR
    named = f'data/{dataset}' if inside else folder  # as a person in the project's root would name it
    ways = []
    if dataset in known:
        ways.append(f'run python data/{dataset}/prepare.py' + ('' if inside else f' --out={folder}'))
    if dataset == folder.name and not os.path.exists(folder / 'meta.json'):
        if os.path.exists(folder / 'meta.pkl'):
            ways.append(PICKLE)
        elif os.path.exists(folder / 'train.bin') and os.path.exists(folder / 'val.bin'):
            ways.append(f"adopt nanoGPT's files with python data/text/prepare.py --adopt={named}")
    if not ways:
        ways = [f'data/ can prepare {", ".join(known)}', 'your own text is prepared by '
                'python data/text/prepare.py --input FILE... --out=data/NAME']
    return '; '.join(ways)


def open_folder(folder):
    """The Corpus in a folder, checked as in open_corpus(). Raises ValueError or OSError if not whole."""
    meta = read_meta(folder / 'meta.json')
    splits = {}
    for split in ('train', 'val'):
        files = meta['splits'][split]['files']
        splits[split] = Tokens([folder / file['name'] for file in files], meta['vocab_size'])
        for file, found in zip(files, splits[split].counts):
            if found != file['tokens']:
                raise ValueError(f'{folder / file["name"]} holds {found} tokens of uint16, meta.json says '
                                 f'{file["tokens"]}')
    if not splits['val'].describe().items() <= meta['splits']['val'].items():
        raise ValueError(f'the validation tokens in {folder} are not those that meta.json describes')
    return Corpus(folder.name, meta, meta['vocab_size'], **splits)


def read_meta(path):
    """meta.json as a dict, with all keys that a run needs. Raises ValueError if one is missing or wrong."""
    if not path.is_file():
        raise ValueError(f'{path} is missing')
    try:
        meta = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        raise ValueError(f'{path} is not JSON') from None
    fault = find_fault(meta)
    if fault:
        raise ValueError(f'{path}: {fault}')
    return meta


def find_fault(meta):
    """What is wrong with the contents of a meta.json, in words; None if nothing is."""
    if not isinstance(meta, dict):
        return f'it is {brief(meta)}, it must be a JSON object'
    for key in ('dataset', 'corpus', 'tokenizer'):
        if not isinstance(meta.get(key), str):
            return f'{key} is {brief(meta.get(key))}, it must be a string'
    if meta.get('dtype') != 'uint16':
        return f"dtype is {brief(meta.get('dtype'))}, it must be 'uint16'"
    chars = meta.get('chars')
    if meta['tokenizer'] == 'char':
        if not isinstance(chars, str) or not chars or list(chars) != sorted(set(chars)):
            return f'chars is {brief(chars)}, it must be the alphabet as one sorted string'
    elif meta['tokenizer'] not in VOCAB_SIZES:
        return f'tokenizer is {brief(meta["tokenizer"])}, it must be byte, gpt2 or char'
    vocab_size = VOCAB_SIZES.get(meta['tokenizer']) or len(chars)
    if type(meta.get('vocab_size')) is not int or meta['vocab_size'] != vocab_size:
        return f'vocab_size is {brief(meta.get("vocab_size"))}, it must be {vocab_size} for this tokenizer'
    splits = meta.get('splits')
    if not isinstance(splits, dict) or not all(isinstance(splits.get(key), dict) for key in ('train', 'val')):
        return f'splits is {brief(splits)}, it must hold the objects train and val'
    for split in ('train', 'val'):
        fault = find_fault_in_split(splits[split], vocab_size)
        if fault:
            return f'{split}: {fault}'
    names = [file['name'] for split in ('train', 'val') for file in splits[split]['files']]
    if len(set(names)) < len(names):
        return 'splits names a file twice'
    if not isinstance(splits['val'].get('sha256'), str):
        return f'val: sha256 is {brief(splits["val"].get("sha256"))}, it must be a string'


def find_fault_in_split(split, vocab_size):
    """What is wrong with the entry of a split, a dict, in words; None if nothing is."""
    files, total, largest = (split.get(key) for key in ('files', 'tokens', 'max_token'))
    if not isinstance(files, list) or not files or not all(isinstance(file, dict) for file in files):
        return f'files is {brief(files)}, it must be a list of objects with name and tokens'
    for name, tokens in ((file.get('name'), file.get('tokens')) for file in files):
        # a plain name, so that nothing in meta.json leads out of its folder
        if not isinstance(name, str) or name in ('', '.', '..') or set(name) & set('/\\\0'):
            return f'the name of a file is {brief(name)}, it must be a plain name'
        if type(tokens) is not int or tokens < 1:
            return f'tokens of {brief(name)} is {brief(tokens)}, it must be a positive whole number'
    if type(total) is not int or total != sum(file['tokens'] for file in files) or total < 2:
        return f'tokens is {brief(total)}, it must be the sum over the files and at least 2'
    if type(largest) is not int or not 0 <= largest < vocab_size:
        return f'max_token is {brief(largest)}, it must be below the vocabulary of {vocab_size}'
