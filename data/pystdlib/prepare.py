"""
The embedded corpus: the Python standard library's own sources, one token per byte. It needs no download.

    python data/pystdlib/prepare.py            writes train.bin, val.bin and meta.json beside this file

The same Python version gives the same files wherever its sources are unaltered. So it takes only modules that
every installation has, and of those no test folders, no tables and no generated text. A corpus of another
Python that is there already stays, so that its runs can go on.
"""

import hashlib
import platform
import sys
import sysconfig
import tokenize
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from data.corpus import byte_encoding, read_meta
from data.preparing import (
    Parser,
    encode_documents,
    fraction,
    is_prepared,
    prepared_already,
    run_script,
    write_corpus,
)

# Linux distributions and container images package these separately or leave them out
OFTEN_MISSING = {'distutils', 'ensurepip', 'idlelib', 'lib2to3', 'tkinter', 'turtle', 'turtledemo', 'venv'}
# character tables and the help texts of `help()`: long, repetitive, and no program text
TABLES = {'encodings', 'pydoc_data'}
VAL_SHARE = 0.1


def find_modules(folder):
    """{posix path: file} of the standard library's modules in this folder, without tests and TABLES."""
    files = []
    for module in sys.stdlib_module_names - OFTEN_MISSING - TABLES:
        files += [folder / f'{module}.py', *(folder / module).rglob('*.py')]
    files = {path.relative_to(folder).as_posix(): path for path in files if path.is_file()}
    return {name: path for name, path in files.items() if not {'test', 'tests'} & set(name.split('/'))}


def position(name):
    """A number in [0, 1) that a file's path alone decides."""
    return fraction(hashlib.sha256(name.encode()).digest())


def read_source(path):
    with tokenize.open(path) as file:  # decodes as Python itself would; line ends become \n on every system
        return file.read()


def main():
    out = Parser(__doc__, Path(__file__).resolve().parent).parse_args().out
    folder = Path(sysconfig.get_paths()['stdlib'])
    modules = find_modules(folder)
    # in the order of their hashes, so that the first tokens of val are as mixed as all of it
    names = sorted(modules, key=position)
    val = [name for name in names if position(name) < VAL_SHARE]
    train = names[len(val):]
    if not val or not train:
        raise ValueError(f'this Python has no sources of its standard library in {folder}')
    texts = {name: read_source(modules[name]) for name in names}
    digest = hashlib.sha256(''.join(f'{name}\n{texts[name]}' for name in names).encode()).hexdigest()
    source = dict(python=platform.python_version(), files=len(names), sha256=digest)
    encoding = byte_encoding()
    meta = dict(dataset='pystdlib', corpus=f'Python {platform.python_version()} standard library sources',
                source=source, tokenizer='byte', vocab_size=encoding.n_vocab)
    if is_prepared(out, dict(dataset='pystdlib')) and not is_prepared(out, meta):
        print(f'{out} stays as it is, {read_meta(out / "meta.json")["corpus"]}; for those of this Python, '
              f'{platform.python_version()}, delete its meta.json or choose another --out')
        return
    if prepared_already(out, meta):
        return
    write_corpus(out, meta, dict(train=[encode_documents(encoding, [texts[name]]) for name in train],
                                 val=[encode_documents(encoding, [texts[name]]) for name in val]))
    print(f'{out}: {len(train)} files in train.bin, {len(val)} in val.bin')


if __name__ == '__main__':
    run_script(main)
