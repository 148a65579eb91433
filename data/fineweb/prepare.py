"""
FineWeb-10B as GPT-2 tokens, in the ready shards of 100 million tokens that modded-nanogpt trains on.

    python data/fineweb/prepare.py                    all 103 shards and the validation shard, 20.8 GB
    python data/fineweb/prepare.py --shards=99        20,000 steps of 491,520 tokens read at most 98.3 of them
    python data/fineweb/prepare.py --input=FOLDER     links the shards in FOLDER here, after the same checks

Stop it at any time: the same command goes on from there.
"""

import os
import sys
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from data.corpus import HEADER_BYTES, MAGIC, VOCAB_SIZES, find_tokens
from data.preparing import (
    Parser,
    hub_revision,
    import_library,
    is_prepared,
    parts_folder,
    refuse_another,
    run_script,
    write_meta,
)

REPO = 'kjj0/fineweb10B-gpt2'
SHARDS = 103


def check_shard(path):
    """Raises ValueError if this is not a whole shard: magic, version, count and size."""
    if find_tokens(path)[0] != HEADER_BYTES:
        raise ValueError(f'{path} is no FineWeb shard: it does not begin with the magic number {MAGIC}')


def is_shard(path):
    try:
        check_shard(path)
    except ValueError:
        return False
    return True


def download(names, revision, out, parts):
    """Fetch the shards that `out` lacks. Raises ValueError if the hub fails or sends what is no shard."""
    hub = import_library('huggingface_hub')
    for name in tqdm([name for name in names if not is_shard(out / name)], 'shards'):
        try:
            path = Path(hub.hf_hub_download(REPO, name, repo_type='dataset', revision=revision,
                                            local_dir=parts))
        except Exception as error:  # of whichever network library this release of huggingface_hub uses
            raise ValueError(f'cannot download {name} from {REPO} ({error}): run it again') from None
        try:
            check_shard(path)
        except ValueError:
            path.unlink()
            raise
        os.replace(path, out / name)


def link(names, folder, out):
    """
    Make symbolic links in `out` to the shards in another folder.

    Raises ValueError if one is not whole, or if `out` has a file in its place, as a download leaves it.
    """
    for name in names:
        check_shard(folder / name)
        if (out / name).resolve() != (folder / name).resolve():
            if (out / name).exists() and not (out / name).is_symlink():
                raise ValueError(f'{out / name} is a file, not a link: delete it or choose another --out')
            (out / name).unlink(missing_ok=True)
            (out / name).symlink_to((folder / name).resolve())


def parse_args():
    """The flags, with args.shards filled in. Raises ValueError if there are not as many shards."""
    parser = Parser(__doc__, Path(__file__).resolve().parent)
    parser.add_argument('--shards', type=int, metavar='N',
                        help=f'training shards to take (default: all, {SHARDS} on the hub; 20k steps: 99)')
    parser.add_argument('--input', type=Path, metavar='FOLDER', help='a folder of shards in place of the hub')
    args = parser.parse_args()
    there = len(list(args.input.glob('fineweb_train_*.bin'))) if args.input else SHARDS
    if there == 0:
        raise ValueError(f'there are no shards fineweb_train_*.bin in {args.input}')
    if args.shards is None:
        args.shards = there
    if not 1 <= args.shards <= there:
        raise ValueError(f'--shards is {args.shards}, it must be from 1 to {there}: there are no more in '
                         f'{args.input or REPO}')
    return args


def main():
    args = parse_args()
    train = [f'fineweb_train_{i:06}.bin' for i in range(1, args.shards + 1)]
    val = ['fineweb_val_000000.bin']
    if args.input:
        source = dict(input=str(args.input.resolve()))
    else:
        source = dict(dataset=REPO, revision=hub_revision(REPO, args.out))
    meta = dict(dataset='fineweb', corpus='FineWeb-10B', source=source,
                tokenizer='gpt2', vocab_size=VOCAB_SIZES['gpt2'])
    if is_prepared(args.out, meta | dict(shards=args.shards)):
        print(f'{args.out} is already prepared')
        return
    refuse_another(args.out, meta)  # more of the same shards may be added
    with parts_folder(args.out, meta) as parts:
        if args.input:
            (args.out / 'meta.json').unlink(missing_ok=True)  # its shards may be about to become others
            link(val + train, args.input, args.out)
        else:
            download(val + train, source['revision'], args.out, parts)
        write_meta(args.out, meta | dict(shards=args.shards), dict(train=train, val=val))
    print(f'{args.out}: {args.shards} shards to train on, 1 to validate')


if __name__ == '__main__':
    run_script(main)
