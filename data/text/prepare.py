"""
Your own text as tokens.

    python data/text/prepare.py --input FILE... --out=data/NAME [--tokenizer=byte] [--val_share=0.01]
    python data/text/prepare.py --adopt=data/NAME [--tokenizer=byte]

Then `python train.py --dataset=NAME ...` trains on it. A FILE is .txt or .md, one document each; .jsonl,
.jsonl.gz or .jsonl.xz, a JSON object with `text` per line; or a folder, of which all such files are taken, in
the order of their names. All text is UTF-8. Documents keep their order, <|endoftext|> follows each, and those
without text are left out. A document goes to val if the hash of its text, as a number from 0 to 1, is below
--val_share, so copies of a document are never on both sides. Of a single document the end goes to val.

Files are streamed and tokenized on all cores. Stop it at any time: the same command goes on from the finished
parts, to equal files.

--adopt writes the meta.json that nanoGPT's train.bin and val.bin lack, after reading both whole.
"""

import gzip
import hashlib
import io
import json
import lzma
import sys
import zlib
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from data.corpus import DATA_DIR, PICKLE, TOKEN, VOCAB_SIZES, load_encoding
from data.preparing import (
    TOKEN_BYTES,
    Job,
    Parser,
    check_disk,
    encode_documents,
    fraction,
    hash_file,
    make_parts,
    parts_folder,
    prepared_already,
    read_parts,
    readable_name,
    remove_parts,
    run_script,
    write_corpus,
    write_meta,
)
from training.rundir import atomic_write

LINES = ('.jsonl', '.jsonl.gz', '.jsonl.xz')
KINDS = ('.txt', '.md', *LINES)
PART = 1 << 22  # bytes of JSON or characters of a document: parts depend on the input alone
EXPANSION = 4  # bytes of text per byte of a compressed file, to estimate the disk space


class Piece(NamedTuple):
    """A stretch of a file, to be tokenized in one go: whole lines of JSON, or of one document."""
    path: Path
    data: bytes | str  # lines of JSON, not yet decoded; or text
    line: int = 0  # number of the first line of JSON
    split: str = ''  # of a document; lines are each assigned by their own text
    last: bool = True  # whether the document ends here
    read: int = 0  # bytes of the file, compressed or not, that were read for it


# flags and files


def parse_args():
    parser = Parser(__doc__, None)
    parser.add_argument('--input', type=Path, nargs='+', metavar='FILE',
                        help=f'{", ".join(KINDS)} or folders of such files')
    parser.add_argument('--val_share', type=float, default=0.01, metavar='SHARE',
                        help='of the documents that go to val (default: %(default)s)')
    parser.add_argument('--adopt', type=Path, metavar='FOLDER',
                        help="a folder with nanoGPT's train.bin and val.bin, to be given its meta.json")
    parser.add_tokenizing()
    args = parser.parse_args()
    if bool(args.adopt) == bool(args.input) or bool(args.adopt) == bool(args.out):
        parser.error('either --input and --out are needed, or --adopt alone')
    if not 0 < args.val_share < 1:
        raise ValueError(f'--val_share is {args.val_share}, it must be above 0 and below 1')
    return args


def suffix(path):
    """Which of the suffixes that are read here a file has, or None."""
    return next((end for end in KINDS if path.name.lower().endswith(end)), None)


def find_files(inputs):
    """The files to read, in order. Raises ValueError if one is missing or of another kind."""
    files = []
    for path in inputs:
        if path.is_dir():
            found = sorted(file for file in path.rglob('*') if suffix(file) and file.is_file())
            if not found:
                raise ValueError(f'{path} has no files {", ".join(KINDS)} in it')
            files += found
        elif not path.exists():
            raise ValueError(f'{path} does not exist')
        elif suffix(path) is None:
            raise ValueError(f'{path} is of another kind, it must be a folder or {", ".join(KINDS)}')
        else:
            files.append(path)
    return files


def text_size(path):
    """About how many bytes of text a file has."""
    return path.stat().st_size * (EXPANSION if path.suffix in ('.gz', '.xz') else 1)


# reading


def choose_split(digest, val_share):
    return 'val' if fraction(digest) < val_share else 'train'


def read_document(path, split):
    """
    The Pieces of a file that is one document. Raises UnicodeDecodeError.

    It is cut before white space that follows another character. No token of GPT-2's reaches across, so the
    pieces have the tokens of the whole.
    """
    with open(path, 'rb') as raw, io.TextIOWrapper(raw, encoding='utf-8-sig', newline='') as file:
        rest, at = '', 0
        while block := file.read(PART):
            rest += block
            for cut in range(len(rest) - 1, len(rest) - len(block), -1):
                if rest[cut] in ' \t\r\n' and not rest[cut - 1].isspace():
                    yield Piece(path, rest[:cut], split=split, last=False, read=raw.tell() - at)
                    rest, at = rest[cut:], raw.tell()
                    break
        if rest:
            yield Piece(path, rest, split=split, read=raw.tell() - at)


def read_lines(path):
    """The Pieces of a file of JSON lines. Raises OSError, EOFError, zlib.error or LZMAError if damaged."""
    opener = {'.gz': gzip.open, '.xz': lzma.open}.get(path.suffix.lower(), lambda raw: raw)
    with open(path, 'rb') as raw, opener(raw) as file:
        line, at = 1, 0
        while data := file.read(PART):
            data += file.readline()
            yield Piece(path, data, line, read=raw.tell() - at)
            line, at = line + data.count(b'\n'), raw.tell()


def read_file(path, digest, val_share):
    """The Pieces of a file. Raises ValueError if it is damaged or not UTF-8."""
    try:
        if suffix(path) in LINES:
            yield from read_lines(path)
        else:
            yield from read_document(path, choose_split(digest, val_share))
    except UnicodeDecodeError as error:
        raise ValueError(f'{path} is not UTF-8 text ({error.reason})') from None
    except (gzip.BadGzipFile, EOFError, zlib.error, lzma.LZMAError) as error:
        raise ValueError(f'{path} is damaged or not what its name says ({error})') from None


def plan_parts(files, digests, parts, val_share):
    """Yield the Jobs in order: pieces of about PART bytes together."""
    pieces, size, number = [], 0, 0
    for path, digest in zip(files, digests):
        for piece in read_file(path, digest, val_share):
            pieces.append(piece)
            size += len(piece.data)
            if size >= PART:
                yield make_job(parts, number, pieces)
                pieces, size, number = [], 0, number + 1
    if pieces:
        yield make_job(parts, number, pieces)


def make_job(parts, number, pieces):
    return Job(parts / f'train-{number:08}.bin', sum(piece.read for piece in pieces), (pieces,))


def val_part(path):
    """The part with the tokens for val that was written with a part for train."""
    return path.with_name(path.name.replace('train', 'val'))


# tokenizing


def parse_line(line):
    """The text of a line of JSON, '' for an empty line. Raises ValueError if it has none."""
    if not line.strip():
        return ''
    try:
        value = json.loads(line.decode('utf-8-sig'))
    except UnicodeDecodeError:
        raise ValueError('not UTF-8 text') from None
    except (ValueError, RecursionError):
        raise ValueError('not JSON') from None
    if not isinstance(value, dict) or not isinstance(value.get('text'), str):
        raise ValueError('no JSON object with a string as its text')
    return value['text']


def encode_piece(encoding, piece, val_share):
    """Yield (split, uint16 tokens) of a piece. Raises ValueError, with file and line, if it cannot be."""
    place = piece.path
    try:
        if piece.split:
            tokens = encode_documents(encoding, [piece.data])
            yield piece.split, tokens if piece.last else tokens[:-1]
            return
        for number, line in enumerate(piece.data.split(b'\n'), piece.line):
            place = f'{piece.path} line {number}'
            if text := parse_line(line):
                digest = hashlib.sha256(text.encode('utf-8', 'surrogatepass')).digest()
                yield choose_split(digest, val_share), encode_documents(encoding, [text])
    except ValueError as error:
        raise ValueError(f'{place}: {error}') from None


def tokenize_part(encoding, val_share, path, pieces):
    """Write the tokens of pieces: those for val into val_part(path), then those for train into `path`."""
    arrays = dict(train=[], val=[])
    for piece in pieces:
        for split, tokens in encode_piece(encoding, piece, val_share):
            arrays[split].append(tokens)
    for target, split in (val_part(path), 'val'), (path, 'train'):
        with atomic_write(target) as file:
            file.writelines(arrays[split])


def between(paths, begin, end):
    """The tokens begin to end - 1 of parts, one array at a time."""
    for tokens in read_parts(paths):
        yield tokens[max(0, begin):max(0, end)]
        begin, end = begin - len(tokens), end - len(tokens)


def join(paths, counts, args):
    """
    The tokens of the splits, dict(train=arrays, val=arrays). Raises ValueError if one would have no document.

    paths: the parts by split; counts: how many documents are in them.
    """
    if sum(counts.values()) == 0:
        raise ValueError(f'{", ".join(map(str, args.input))} has no text')
    if sum(counts.values()) == 1:
        parts = paths['train'] + paths['val']
        total = sum(path.stat().st_size for path in parts) // TOKEN.itemsize
        cut = total - max(2, round(total * args.val_share))
        if cut < 2:
            raise ValueError(f'the only document has {total} tokens, too few for train and val')
        return dict(train=between(parts, 0, cut), val=between(parts, cut, total))
    for split, other, better in ('train', 'val', 'smaller'), ('val', 'train', 'larger'):
        if counts[split] == 0:
            raise ValueError(f'--val_share is {args.val_share}, it must be {better}: all {counts[other]} '
                             f'documents fall to {other}')
    return {split: read_parts(paths[split]) for split in paths}


# the two commands


def prepare(args):
    """Tokenize args.input into args.out."""
    files = find_files(args.input)
    digests = [hash_file(path) for path in files]
    source = dict(files=len(files), sha256=hashlib.sha256(b''.join(digests)).hexdigest())
    name = readable_name(args.out.resolve())
    meta = dict(dataset=name, corpus=name, source=source, tokenizer=args.tokenizer,
                vocab_size=VOCAB_SIZES[args.tokenizer], val_share=args.val_share)
    if prepared_already(args.out, meta):
        return
    encoding = load_encoding(args.tokenizer)
    done = sum(path.stat().st_size for path in (args.out / 'parts').glob('*.bin'))
    needed = 2 * TOKEN_BYTES[args.tokenizer] * sum(map(text_size, files)) - done
    check_disk([(args.out, needed)], 'make room or choose another --out')
    with parts_folder(args.out, meta) as parts:
        train = make_parts(partial(tokenize_part, encoding, args.val_share),
                           plan_parts(files, digests, parts, args.val_share),
                           args.workers, sum(path.stat().st_size for path in files), 'B')
        paths = dict(train=train, val=list(map(val_part, train)))
        counts = {split: sum(int(np.count_nonzero(tokens == encoding.eot_token))
                             for tokens in read_parts(paths[split])) for split in paths}
        try:
            splits = join(paths, counts, args)
        except ValueError:
            remove_parts(parts)  # with other flags they would only be in the way
            raise
        write_corpus(args.out, meta | dict(documents=counts), splits)
    if sum(counts.values()) == 1:
        print(f'{args.out}: one document, its end in val.bin{how_to_read(args.out)}')
    else:
        print(f'{args.out}: {counts["train"]} documents in train.bin, {counts["val"]} in val.bin'
              f'{how_to_read(args.out)}')


def adopt(args):
    """Write the meta.json of a folder with nanoGPT's token files. Raises ValueError if it cannot have one."""
    folder = args.adopt
    if (folder / 'meta.pkl').exists():
        raise ValueError(f'{folder}: {PICKLE}')
    if (folder / 'meta.json').exists():
        raise ValueError(f'{folder} has a meta.json, so there is nothing to adopt')
    name = readable_name(folder.resolve())
    meta = dict(dataset=name, corpus=name, source=dict(adopted=['train.bin', 'val.bin']),
                tokenizer=args.tokenizer, vocab_size=VOCAB_SIZES[args.tokenizer])
    write_meta(folder, meta, dict(train=['train.bin'], val=['val.bin']))
    print(f'{folder}/meta.json is written{how_to_read(folder)}')


def how_to_read(folder):
    folder = folder.resolve()
    return f'; --dataset={folder.name} reads it' if folder.parent == DATA_DIR else ''


def main():
    args = parse_args()
    adopt(args) if args.adopt else prepare(args)


if __name__ == '__main__':
    run_script(main)
