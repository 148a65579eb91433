"""
Tiny Shakespeare, one token per character: 90% of the text for training, the rest for validation.

    python data/shakespeare_char/prepare.py                 downloads the text (1.1 MB)
    python data/shakespeare_char/prepare.py --input=FILE    takes it, or any other UTF-8 text, from a file
"""

import hashlib
import sys
from pathlib import Path
from urllib.request import urlopen

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from data.corpus import char_tokenizer
from data.preparing import Parser, prepared_already, readable_name, run_script, write_corpus
from training.rundir import atomic_write

URL = 'https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt'
SHA256 = '86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed'
TRAIN_SHARE = 0.9


def download(path):
    """
    The text behind URL as bytes, kept at `path`.

    Raises OSError without a network, ValueError if it is another text.
    """
    if not path.exists():
        try:
            with urlopen(URL, timeout=60) as answer:
                data = answer.read()
        except OSError as error:
            raise OSError(f'cannot download {URL} ({error}): give the text with --input=FILE') from None
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            file.write(data)
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != SHA256:
        raise ValueError(f'{path} is not tiny Shakespeare: delete it, or name it with --input={path}')
    return data


def main():
    parser = Parser(__doc__, Path(__file__).resolve().parent)
    parser.add_argument('--input', type=Path, metavar='FILE', help='a UTF-8 text instead of the download')
    args = parser.parse_args()
    source = dict(sha256=hashlib.sha256(args.input.read_bytes()).hexdigest() if args.input else SHA256)
    if prepared_already(args.out, dict(dataset='shakespeare_char', source=source)):
        return
    data = args.input.read_bytes() if args.input else download(args.out / 'input.txt')
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f'{args.input} is not UTF-8 text ({error})') from None
    chars = ''.join(sorted(set(text)))
    tokens = np.array(char_tokenizer(chars).encode(text), dtype=np.uint16)
    train, val = np.split(tokens, [int(TRAIN_SHARE * len(tokens))])
    name = 'tiny Shakespeare' if source['sha256'] == SHA256 else readable_name(args.input)
    meta = dict(dataset='shakespeare_char', corpus=f'{name}, characters', source=source,
                tokenizer='char', chars=chars, vocab_size=len(chars))
    write_corpus(args.out, meta, dict(train=[train], val=[val]))
    print(f'{args.out}: {len(train)} characters in train.bin, {len(val)} in val.bin, {len(chars)} different')


if __name__ == '__main__':
    run_script(main)
