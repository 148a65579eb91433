"""What a prepared corpus is: its tokenizers, how data/<name>/prepare.py writes it, how a run opens it.

A corpus is a folder with a meta.json that names the token files of two splits, train and val. A token file is
little-endian uint16, bare (nanoGPT's .bin) or behind the 1,024-byte header of llm.c's shards; its first four
bytes tell which. Files are data here and nothing else: what they hold is compared, never executed, and what
does not fit is refused with a ValueError of one plain line.

    corpus = open_corpus("pystdlib")
    load_tokenizer(corpus.meta).decode(corpus.train.read(0, 80).tolist())
"""
import hashlib
import json
import os
from bisect import bisect_right
from functools import partial
from itertools import accumulate
from pathlib import Path
from reprlib import repr as brief
from typing import Callable, NamedTuple

import numpy as np
import tiktoken

from configurator import ROOT

DATA_DIR = ROOT / 'data'
EOT = '<|endoftext|>'
VOCAB_SIZES = {'byte': 257, 'gpt2': 50257}
TOKEN = np.dtype('<u2')
# llm.c's header is 256 little-endian int32, of which three say something: magic, version, token count
MAGIC, VERSION, HEADER_BYTES = 20240520, 1, 1024
SCAN_TOKENS = 1 << 22


class Tokenizer(NamedTuple):
    encode: Callable  # str -> list of int; <|endoftext|> is the special token, where the tokenizer has one
    decode: Callable  # list of int, each below meta.json's vocab_size -> str


def byte_encoding():
    """A tiktoken.Encoding of the 256 bytes, each its own token, and <|endoftext|> = 256. It needs no file."""
    # nothing is ever merged, so the pattern only decides how much tiktoken looks at at once: lines are fast
    return tiktoken.Encoding('byte', pat_str=r'[^\n]+|\n+',
                             mergeable_ranks={bytes([i]): i for i in range(256)}, special_tokens={EOT: 256})


def load_encoding(name):
    """The tiktoken.Encoding called "byte" or "gpt2". ValueError if gpt2's files cannot be fetched."""
    if name == 'byte':
        return byte_encoding()
    try:
        return tiktoken.get_encoding(name)
    except OSError as error:  # requests' exceptions are OSErrors
        raise ValueError(f'tiktoken cannot fetch its {name} files ({type(error).__name__}): connect to the '
                         'network, or set TIKTOKEN_CACHE_DIR to a folder that holds them') from None


def load_tokenizer(meta):
    """The Tokenizer of a corpus, from its meta.json. ValueError if tiktoken's files cannot be fetched."""
    if meta['tokenizer'] == 'char':
        return char_tokenizer(meta['chars'])
    encoding = load_encoding(meta['tokenizer'])
    return Tokenizer(partial(encoding.encode, allowed_special='all'), encoding.decode)


def char_tokenizer(chars):
    """The Tokenizer whose token i is chars[i]. Its encode raises ValueError for any other character."""
    token_of = {char: token for token, char in enumerate(chars)}

    def encode(text):
        strangers = set(text) - token_of.keys()
        if strangers:
            raise ValueError(f'character {min(strangers)!r} is not among the {len(chars)} of this corpus')
        return [token_of[char] for char in text]

    return Tokenizer(encode, lambda tokens: ''.join(chars[token] for token in tokens))


def find_tokens(path):
    """(offset in bytes, number of tokens) of a token file. ValueError if it is none, or is cut short."""
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
        raise ValueError(f'{path} has {size} bytes, which is not the {tokens} tokens that its header says')
    return HEADER_BYTES, tokens


class Tokens:
    """The tokens of one split, its files end to end. ValueError if one of them is no token file."""

    def __init__(self, paths, vocab_size):
        self.paths, self.vocab_size = paths, vocab_size
        self.offsets, self.counts = zip(*map(find_tokens, paths))  # bytes before the tokens, and how many
        # read, not mapped: a page of a map faults when it is touched, and counts as this process's memory
        self.files = [open(path, 'rb', buffering=0) for path in paths]
        self.begins = [0, *accumulate(self.counts)]  # where each file's tokens begin, and the end

    def __len__(self):
        return self.begins[-1]

    def read_windows(self, starts, n):
        """(len(starts), n) uint16: n tokens from each start. ValueError if one is outside the vocabulary."""
        windows = np.empty((len(starts), n), dtype=TOKEN)
        for window, start in zip(windows, starts):
            self._fill(window, int(start))
        if windows.size and windows.max() >= self.vocab_size:
            row, column = np.argwhere(windows >= self.vocab_size)[0]
            path, token = self.paths[self._file_at(starts[row] + column)], windows[row, column]
            raise ValueError(f'{path} holds the token {token}, outside the vocabulary of {self.vocab_size}: '
                             'delete this file and prepare the corpus again')
        return windows

    def read(self, start, n):
        """(n,) uint16: the tokens start to start + n - 1. ValueError if one is outside the vocabulary."""
        return self.read_windows([start], n)[0]

    def describe(self):
        """What meta.json says of a split beside its files; sha256 is of the tokens' bytes, no headers."""
        largest, digest = 0, hashlib.sha256()
        for start in range(0, len(self), SCAN_TOKENS):
            chunk = self.read(start, min(SCAN_TOKENS, len(self) - start))
            largest = max(largest, int(chunk.max()))
            digest.update(chunk)
        return {'tokens': len(self), 'max_token': largest, 'sha256': digest.hexdigest()}

    def _file_at(self, position):
        return bisect_right(self.begins, position) - 1

    def _fill(self, window, start):
        assert 0 <= start <= len(self) - len(window), f'{len(window)} tokens from {start} of {len(self)}'
        while len(window):
            i = self._file_at(start)
            piece = window[:self.begins[i + 1] - start]
            place = self.offsets[i] + (start - self.begins[i]) * TOKEN.itemsize
            if os.preadv(self.files[i].fileno(), [piece], place) < piece.nbytes:
                raise ValueError(f'{self.paths[i]} became shorter while it was in use')
            window, start = window[len(piece):], start + len(piece)


class Corpus(NamedTuple):
    name: str
    meta: dict
    vocab_size: int  # meta.json's, before the model rounds it up
    train: Tokens
    val: Tokens


def open_corpus(dataset, data_dir=DATA_DIR):
    """The Corpus in the folder data_dir/dataset.

    ValueError, naming the command that prepares it, if a file is missing, cut short or of another dtype, if
    it contradicts meta.json, or if a token is outside the vocabulary: val is read whole and compared with its
    hash, train goes by its size here and is checked as it is read."""
    known = sorted(path.parent.name for path in DATA_DIR.glob('*/prepare.py'))
    folder = Path(data_dir) / dataset
    try:
        if dataset not in known and (dataset != folder.name or not (folder / 'meta.json').exists()):
            raise ValueError(f'there is no dataset {brief(dataset)} in {data_dir}')
        return open_folder(folder)
    except (OSError, ValueError) as error:
        if dataset not in known:
            raise ValueError(f"{error} (data/ can prepare {', '.join(known)})") from None
        out = f' --out {folder}' if Path(data_dir).resolve() != DATA_DIR else ''
        raise ValueError(f'{error}: run python data/{dataset}/prepare.py{out}') from None


def open_folder(folder):
    """The Corpus in a folder, checked as open_corpus says. ValueError or OSError if it is not whole."""
    meta = read_meta(folder / 'meta.json')
    splits = {}
    for split in ('train', 'val'):
        files = meta['splits'][split]['files']
        splits[split] = Tokens([folder / file['name'] for file in files], meta['vocab_size'])
        for file, found in zip(files, splits[split].counts):
            if found != file['tokens']:
                raise ValueError(f"{folder / file['name']} holds {found} tokens of uint16, meta.json says "
                                 f"{file['tokens']}")
    if splits['val'].describe()['sha256'] != meta['splits']['val']['sha256']:
        raise ValueError(f'the validation tokens in {folder} are not those that meta.json describes')
    return Corpus(folder.name, meta, meta['vocab_size'], **splits)


def read_meta(path):
    """meta.json as a dict, every key that a run relies on checked. ValueError if one is missing or wrong."""
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
    """What is wrong with the contents of a meta.json, in words, or None."""
    if not isinstance(meta, dict):
        return 'it must be a JSON object'
    for key in ('dataset', 'corpus', 'tokenizer'):
        if not isinstance(meta.get(key), str):
            return f'{key} must be a string, not {brief(meta.get(key))}'
    if meta.get('dtype') != 'uint16':
        return f"dtype must be 'uint16', not {brief(meta.get('dtype'))}"
    chars = meta.get('chars')
    if meta['tokenizer'] == 'char':
        if not isinstance(chars, str) or not chars or list(chars) != sorted(set(chars)):
            return f'chars must be the alphabet as one sorted string, not {brief(chars)}'
    elif meta['tokenizer'] not in VOCAB_SIZES:
        return f"tokenizer must be byte, gpt2 or char, not {brief(meta['tokenizer'])}"
    vocab_size = VOCAB_SIZES.get(meta['tokenizer']) or len(chars)
    if type(meta.get('vocab_size')) is not int or meta['vocab_size'] != vocab_size:
        return f"vocab_size must be {vocab_size} for this tokenizer, not {brief(meta.get('vocab_size'))}"
    splits = meta.get('splits')
    if not isinstance(splits, dict) or not all(isinstance(splits.get(key), dict) for key in ('train', 'val')):
        return 'splits must hold the objects train and val'
    fault = find_fault_in_split(splits['train'], vocab_size) or find_fault_in_split(splits['val'], vocab_size)
    if fault:
        return f'splits: {fault}'
    names = [file['name'] for split in ('train', 'val') for file in splits[split]['files']]
    if len(set(names)) < len(names):
        return 'splits: a file is named twice'
    if not isinstance(splits['val'].get('sha256'), str):
        return f"splits: val's sha256 must be a string, not {brief(splits['val'].get('sha256'))}"


def find_fault_in_split(split, vocab_size):
    files, total, largest = (split.get(key) for key in ('files', 'tokens', 'max_token'))
    if not isinstance(files, list) or not files or not all(isinstance(file, dict) for file in files):
        return f'files must be a list of objects with name and tokens, not {brief(files)}'
    for name, tokens in ((file.get('name'), file.get('tokens')) for file in files):
        # a plain name, so that nothing in meta.json leads out of its folder
        if not isinstance(name, str) or name in ('', '.', '..') or set(name) & set('/\\\0'):
            return f'a file must have a plain name, not {brief(name)}'
        if type(tokens) is not int or tokens < 1:
            return f'tokens of {brief(name)} must be a positive whole number, not {brief(tokens)}'
    if type(total) is not int or total != sum(file['tokens'] for file in files) or total < 2:
        return f'tokens must be the sum over the files and at least 2, not {brief(total)}'
    if type(largest) is not int or not 0 <= largest < vocab_size:
        return f'max_token must be below the vocabulary of {vocab_size}, not {brief(largest)}'
