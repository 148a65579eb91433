"""OpenWebText as GPT-2 tokens, split as nanoGPT splits it.

    python data/openwebtext/prepare.py                            from the Hugging Face hub, on all cores
    python data/openwebtext/prepare.py --input a.parquet b.parquet [--tokenizer=byte] [--out DIR]

`datasets` downloads and unpacks about 54 GB into its cache (HF_HOME); here it takes 18 GB, twice that while
the parts are joined. Stop it when you like: the same command goes on from the finished parts, to equal files.
"""
import hashlib
import logging
import multiprocessing
import os
import shutil
import signal
import sys
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from threading import Thread

import datasets
import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from data.corpus import TOKEN, load_encoding
from data.preparing import (Parser, encode_documents, hub_revision, is_prepared, parts_folder, plainly,
                            write_corpus)
from training.rundir import atomic_write

REPO, CONFIG, ROWS = 'Skylion007/openwebtext', 'plain_text', 8_013_769
# of REPO: the parquet files, and the text that `datasets` unpacks from them
DOWNLOAD_BYTES, TEXT_BYTES = 14e9, 40e9
TOKEN_BYTES_PER_TEXT_BYTE = {'gpt2': 0.5, 'byte': 2.1}
KINDS = {'.parquet': 'parquet', '.jsonl': 'json', '.txt': 'text'}


def parse_args():
    parser = Parser(__file__, __doc__)
    parser.add_argument('--input', type=Path, nargs='+', metavar='FILE', help='.parquet or .jsonl files with '
                        'a column text, or .txt files of one document each, instead of the download')
    parser.add_argument('--tokenizer', choices=['gpt2', 'byte'], default='gpt2', help='default: gpt2')
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
    parser.add_argument('--workers', type=int, default=cores, metavar='N',
                        help='processes that tokenize (default: one a core)')
    parser.add_argument('--revision', metavar='COMMIT',
                        help=f'of {REPO} (default: the one started with, else the newest)')
    parser.add_argument('--rows', type=int, default=ROWS, metavar='N',
                        help='documents that it must have (default: %(default)s)')
    args = parser.parse_args()
    if args.workers < 1:
        raise ValueError(f'--workers={args.workers} must be at least 1')
    kinds = {path.suffix for path in args.input or []}
    if len(kinds) > 1 or kinds - KINDS.keys():
        raise ValueError(f"--input takes one kind of file, {' '.join(KINDS)}, not {' '.join(sorted(kinds))}")
    args.name = ', '.join(map(str, args.input)) if args.input else REPO
    return args


def fingerprint(path):
    with open(path, 'rb') as file:
        return {'name': path.name, 'sha256': hashlib.file_digest(file, 'sha256').hexdigest()}


def find_builder(args, revision):
    """The datasets builder of what is to be tokenized. ValueError if there is nothing that it could read."""
    try:
        if not args.input:
            return datasets.load_dataset_builder(REPO, CONFIG, revision=revision)
        kind = KINDS[args.input[0].suffix]
        options = {'sample_by': 'document'} if kind == 'text' else {}
        return datasets.load_dataset_builder(kind, data_files=[str(path) for path in args.input], **options)
    except Exception as error:  # datasets passes on those of pyarrow, fsspec, the hub ...
        raise ValueError(f'datasets cannot read {args.name}: {type(error).__name__} {error}') from None


def check_disk(builder, args):
    """ValueError if there is less free space than the whole preparation may still need, caches included."""
    download, text = DOWNLOAD_BYTES, TEXT_BYTES
    if args.input:
        size = sum(path.stat().st_size for path in args.input)
        download, text = 0, 3 * size if args.input[0].suffix == '.parquet' else size
    done = sum(path.stat().st_size for path in (args.out / 'parts').glob('*.bin'))
    needs = [(args.out, 2 * text * TOKEN_BYTES_PER_TEXT_BYTE[args.tokenizer] - done)]
    if not Path(builder.cache_dir).exists():
        needs.append((Path(datasets.config.HF_DATASETS_CACHE), download + text))
    for folder, _ in needs:
        folder.mkdir(parents=True, exist_ok=True)
    for folder, _ in needs:
        there = sum(need for other, need in needs if other.stat().st_dev == folder.stat().st_dev)
        free = shutil.disk_usage(folder).free
        if free < there:
            raise ValueError(f'{free / 1e9:.1f} GB are free at {folder}, {there / 1e9:.1f} GB needed: '
                             'make room, choose another --out, or set HF_HOME to move the caches')


def load_documents(builder, args, revision):
    """datasets.Dataset of all documents, one a row. ValueError if they are not those that were asked for."""
    try:
        builder.download_and_prepare()
        documents = builder.as_dataset(split='train')
    except Exception as error:
        error = error.__cause__ or error
        raise ValueError(f'datasets cannot read {args.name}: {type(error).__name__} {error}') from None
    if not args.input and len(documents) != args.rows:
        raise ValueError(
            f'{REPO} at revision {revision} has {len(documents):,} documents, OpenWebText {args.rows:,}: '
            'take a whole revision from its history on the hub with --revision=COMMIT, or, for a corpus of its '
            f'own, comparable with no other, say --rows={len(documents)}')
    columns = {field.name: str(field.type) for field in documents.features.arrow_schema}
    if columns.get('text') not in ('string', 'large_string'):
        raise ValueError(f'{args.name} must have a column text of strings, its columns are {columns}')
    if len(documents) < 2:
        raise ValueError(f'{args.name} has {len(documents)} document, train and val need at least one each')
    return documents


def begin_process(splits, encoding):
    """In each process of the pool: keeps what every part needs, and lets no process outlive its parent."""
    global SPLITS, ENCODING
    SPLITS, ENCODING = splits, encoding
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    Thread(target=leave_with_parent, daemon=True).start()


def leave_with_parent():
    multiprocessing.parent_process().join()
    os._exit(1)


def tokenize_part(job):
    """Writes one part: the tokens of the rows begin to end - 1 of a split."""
    path, split, begin, end = job
    texts = SPLITS[split][begin:end]['text']
    if None in texts:
        raise ValueError('the text of a document is null: leave such rows out')
    with atomic_write(path) as file:
        file.write(encode_documents(ENCODING, texts).tobytes())


def tokenize(splits, encoding, parts, workers):
    """Brings every part into the folder `parts`; returns their paths in order, by split."""
    jobs = []
    for split, documents in splits.items():
        size = max(16, -(-len(documents) // 2000))  # about 10 MB of OpenWebText's text in one part
        jobs += [(parts / f'{split}-{begin:08}.bin', split, begin, min(begin + size, len(documents)))
                 for begin in range(0, len(documents), size)]
    todo = [job for job in jobs if not job[0].exists()]
    pool = ProcessPoolExecutor(workers, initializer=begin_process, initargs=(splits, encoding))
    try:
        for _ in tqdm(pool.map(tokenize_part, todo), 'tokenizing', len(jobs), initial=len(jobs) - len(todo),
                      unit='part', mininterval=0.5 if sys.stderr.isatty() else 60):
            pass
    except BrokenProcessPool:
        raise ValueError('a tokenizing process was killed, perhaps for want of memory: the same command with '
                         f'fewer than --workers={workers} goes on from the finished parts') from None
    finally:
        pool.shutdown(cancel_futures=True)
    return {split: [path for path, of, *_ in jobs if of == split] for split in splits}


def main():
    args = parse_args()
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)  # what matters of it becomes our own one line
    encoding = load_encoding(args.tokenizer)
    revision = None if args.input else args.revision or hub_revision(REPO, args.out)
    if args.input:
        source = {'files': [fingerprint(path) for path in args.input]}
    else:
        source = {'dataset': REPO, 'config': CONFIG, 'revision': revision}
    meta = {'dataset': 'openwebtext', 'corpus': 'documents of --input' if args.input else 'OpenWebText',
            'source': source, 'tokenizer': args.tokenizer, 'vocab_size': encoding.n_vocab}
    if is_prepared(args.out, meta):
        shutil.rmtree(args.out / 'parts', ignore_errors=True)
        print(f'{args.out} is already prepared')
        return
    if is_prepared(args.out, {}):
        raise ValueError(f'{args.out} holds another corpus: delete its meta.json or choose another --out')
    builder = find_builder(args, revision)
    check_disk(builder, args)
    with parts_folder(args.out, meta) as parts:
        documents = load_documents(builder, args, revision)
        # nanoGPT's split, to the order of the documents
        halves = documents.train_test_split(test_size=0.0005, seed=2357, shuffle=True)
        paths = tokenize({'train': halves['train'], 'val': halves['test']}, encoding, parts, args.workers)
        write_corpus(args.out, {**meta, 'rows': len(documents)},
                     {split: (np.fromfile(path, TOKEN) for path in paths[split]) for split in paths})
    print(f"{args.out}: {len(halves['train'])} documents in train.bin, {len(halves['test'])} in val.bin")


if __name__ == '__main__':
    plainly(main)
