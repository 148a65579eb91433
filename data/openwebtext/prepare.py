"""
OpenWebText as GPT-2 tokens, split as nanoGPT splits it.

    python data/openwebtext/prepare.py                          from the Hugging Face hub, on all cores
    python data/openwebtext/prepare.py --input a.parquet b.parquet [--tokenizer=byte] [--out=FOLDER]

94 GB must be free: `datasets` downloads and unpacks 54 GB into its cache (HF_HOME), and the tokens take up to
20 GB here, twice that while their parts are joined. With --tokenizer=byte they take 84 GB, hence 222 in all.
Stop it at any time: the same command goes on from the finished parts, to equal files.
"""

import glob
import logging
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from data.corpus import VOCAB_SIZES, load_encoding
from data.preparing import (
    TOKEN_BYTES,
    Job,
    Parser,
    check_disk,
    encode_documents,
    hash_file,
    hub_revision,
    import_library,
    make_parts,
    parts_folder,
    prepared_already,
    read_parts,
    readable_name,
    run_script,
    write_corpus,
)
from training.rundir import atomic_write

REPO, CONFIG, ROWS = 'Skylion007/openwebtext', 'plain_text', 8_013_769
# of REPO: the parquet files, and the text that `datasets` unpacks from them
DOWNLOAD_BYTES, TEXT_BYTES = 14e9, 40e9
KINDS = {'.parquet': 'parquet', '.jsonl': 'json', '.txt': 'text'}


def parse_args():
    parser = Parser(__doc__, Path(__file__).resolve().parent)
    parser.add_argument('--input', type=Path, nargs='+', metavar='FILE', help='.parquet or .jsonl files with '
                        'a column text, or .txt files of one document each, instead of the download')
    parser.add_tokenizing()
    parser.add_argument('--revision', metavar='COMMIT',
                        help=f'of {REPO} (default: that of an earlier start, else the newest)')
    parser.add_argument('--rows', type=int, default=ROWS, metavar='N',
                        help='documents that it must have (default: %(default)s)')
    args = parser.parse_args()
    kinds = {path.suffix for path in args.input or []}
    if len(kinds) > 1 or kinds - KINDS.keys():
        raise ValueError(f'--input has the suffixes {", ".join(map(repr, sorted(kinds)))}, it must have '
                         f'one of {", ".join(KINDS)}')
    args.name = ', '.join(map(str, args.input)) if args.input else REPO
    return args


def find_source(args):
    """What is to be tokenized, for meta.json."""
    if args.input:
        return dict(files=[dict(name=readable_name(path), sha256=hash_file(path).hex())
                           for path in args.input])
    return dict(dataset=REPO, config=CONFIG, revision=args.revision or hub_revision(REPO, args.out))


def find_builder(args, source):
    """The datasets builder of the source. Raises ValueError if there is nothing that it can read."""
    datasets = import_library('datasets')
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)  # what matters of it becomes a line of our own
    try:
        if not args.input:
            return datasets.load_dataset_builder(REPO, CONFIG, revision=source['revision'])
        kind = KINDS[args.input[0].suffix]
        options = dict(sample_by='document') if kind == 'text' else {}
        # datasets takes names for patterns: 'data [12].txt' would be read from 'data 1.txt'
        names = [glob.escape(str(path)) for path in args.input]
        return datasets.load_dataset_builder(kind, data_files=names, **options)
    except Exception as error:  # datasets passes on those of pyarrow, fsspec, the hub ...
        raise ValueError(f'datasets cannot read {args.name}: {type(error).__name__} {error}') from None


def find_needs(builder, args):
    """[(folder, bytes)]: the free space that the whole preparation may still need, caches included."""
    from datasets.config import HF_DATASETS_CACHE
    download, text = DOWNLOAD_BYTES, TEXT_BYTES
    if args.input:
        size = sum(path.stat().st_size for path in args.input)
        download, text = 0, 3 * size if args.input[0].suffix == '.parquet' else size
    done = sum(path.stat().st_size for path in (args.out / 'parts').glob('*.bin'))
    needs = [(args.out, 2 * text * TOKEN_BYTES[args.tokenizer] - done)]
    if not Path(builder.cache_dir).exists():
        needs.append((Path(HF_DATASETS_CACHE), download + text))
    return needs


def load_documents(builder, args, source):
    """A datasets.Dataset of all documents, one a row. Raises ValueError if they are not as asked."""
    try:
        builder.download_and_prepare()
        documents = builder.as_dataset(split='train')
    except Exception as error:
        error = error.__cause__ or error
        raise ValueError(f'datasets cannot read {args.name}: {type(error).__name__} {error}') from None
    if not args.input and len(documents) != args.rows:
        raise ValueError(
            f'{REPO} at revision {source["revision"]} has {len(documents):,} documents, it must have '
            f'{args.rows:,}: take a whole revision from its history on the hub with --revision=COMMIT, or, '
            f'for another corpus, comparable with no other, --rows={len(documents)}')
    columns = {field.name: str(field.type) for field in documents.features.arrow_schema}
    if columns.get('text') not in ('string', 'large_string'):
        raise ValueError(f'{args.name} has the columns {columns}, it must have a column text of strings')
    if len(documents) < 2:
        raise ValueError(f'{args.name} has {len(documents)} document, train and val need at least one each')
    return documents


def tokenize_part(splits, encoding, path, split, begin, end):
    """Write one part: the tokens of the rows begin to end - 1 of a split."""
    texts = splits[split][begin:end]['text']
    if None in texts:
        raise ValueError('the text of a document is null: leave such rows out')
    with atomic_write(path) as file:
        file.write(encode_documents(encoding, texts).tobytes())


def tokenize(splits, encoding, parts, workers):
    """Make all parts in the folder `parts`. Returns their paths in order, by split."""
    jobs = []
    for split, documents in splits.items():
        size = max(16, -(-len(documents) // 2000))  # about 10 MB of OpenWebText's text in one part
        jobs += [Job(parts / f'{split}-{begin:08}.bin', 1, (split, begin, min(begin + size, len(documents))))
                 for begin in range(0, len(documents), size)]
    paths = make_parts(partial(tokenize_part, splits, encoding), jobs, workers, len(jobs), 'part')
    return {split: [path for path in paths if path.name.startswith(split)] for split in splits}


def main():
    args = parse_args()
    source = find_source(args)
    meta = dict(dataset='openwebtext', corpus='documents of --input' if args.input else 'OpenWebText',
                source=source, tokenizer=args.tokenizer, vocab_size=VOCAB_SIZES[args.tokenizer])
    if prepared_already(args.out, meta):
        return
    encoding = load_encoding(args.tokenizer)
    builder = find_builder(args, source)
    check_disk(find_needs(builder, args),
               'make room, choose another --out, or set HF_HOME to move the caches')
    with parts_folder(args.out, meta) as parts:
        documents = load_documents(builder, args, source)
        # nanoGPT's split, to the order of the documents
        halves = documents.train_test_split(test_size=0.0005, seed=2357, shuffle=True)
        paths = tokenize(dict(train=halves['train'], val=halves['test']), encoding, parts, args.workers)
        write_corpus(args.out, meta | dict(rows=len(documents)),
                     {split: read_parts(paths[split]) for split in paths})
    print(f'{args.out}: {len(halves["train"])} documents in train.bin, {len(halves["test"])} in val.bin')


if __name__ == '__main__':
    run_script(main)
