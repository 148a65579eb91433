"""
Corpora and batches: every token is read as it was written, a step's windows are the same for any number of
processes, validation reads each token once, and whatever does not fit is refused in one line.

    python -m pytest tests/test_data.py
"""

import gzip
import hashlib
import io
import json
import lzma
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import tiktoken
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiktoken_ext.openai_public import r50k_pat_str

from configurator import ROOT
from data import preparing
from data.corpus import (
    DATA_DIR,
    EOT,
    HEADER_BYTES,
    MAGIC,
    TOKEN,
    Tokens,
    byte_encoding,
    load_tokenizer,
    open_corpus,
)
from data.dataloader import TrainLoader, val_batches
from data.fineweb import prepare as fineweb
from data.openwebtext import prepare as openwebtext
from data.preparing import Job, encode_documents, import_library, make_parts, remove_parts, write_corpus
from data.pystdlib import prepare as pystdlib
from data.shakespeare_char import prepare as shakespeare_char
from data.text import prepare as text
from toy_runs import contents

META = dict(dataset='pystdlib', corpus='numbers', source={}, tokenizer='gpt2', vocab_size=50257)
steady = settings(deadline=None, derandomize=True, database=None, max_examples=60)


def numbers(n):
    """n different tokens, each saying its position, so that what was read tells where from."""
    assert n <= META['vocab_size']
    return np.arange(n, dtype=TOKEN)


def write_tokens(path, tokens, header=False, magic=MAGIC, version=1):
    head = np.zeros(HEADER_BYTES // 4, '<i4')
    head[:3] = magic, version, len(tokens)
    path.write_bytes((head.tobytes() if header else b'') + tokens.tobytes())
    return path


def tokens_in(folder, tokens):
    return Tokens([write_tokens(Path(folder) / 'tokens.bin', tokens)], META['vocab_size'])


@pytest.fixture(scope='module')
def thousand(tmp_path_factory):
    return tokens_in(tmp_path_factory.mktemp('thousand'), numbers(1000))


@steady
@given(files=st.lists(st.tuples(st.integers(1, 50), st.booleans()), min_size=1, max_size=5), data=st.data())
def test_every_token_is_read_as_written_across_files_with_and_without_header(files, data):
    with TemporaryDirectory() as folder:
        written = numbers(sum(n for n, _ in files)) + 7
        ends = np.cumsum([n for n, _ in files])
        paths = [write_tokens(Path(folder) / str(i), written[end - n:end], header)
                 for i, ((n, header), end) in enumerate(zip(files, ends))]
        tokens = Tokens(paths, META['vocab_size'])
        assert len(tokens) == len(written)
        n = data.draw(st.integers(1, len(written)))
        starts = data.draw(st.lists(st.integers(0, len(written) - n), min_size=1, max_size=4))
        assert (tokens.read_windows(starts, n) == [written[start:start + n] for start in starts]).all()


@steady
@given(seed=st.integers(0, 2**40), step=st.integers(0, 2**40), block_size=st.integers(1, 999),
       windows=st.integers(1, 6).map(lambda n: 4 * n), batch_size=st.integers(1, 30))
def test_windows_of_a_step_are_the_same_for_any_number_of_processes(
        thousand, seed, step, block_size, windows, batch_size):
    def divided(ddp_size):
        for ddp_rank in range(ddp_size):
            loader = TrainLoader(thousand, block_size, windows, seed, ddp_rank, ddp_size, batch_size, 'cpu')
            share = windows // ddp_size
            assert loader.micro_batch * loader.micro_steps == share and loader.micro_batch <= batch_size
            assert all(share % size for size in range(loader.micro_batch + 1, min(batch_size, share) + 1))
            batches = list(loader.batches(step))
            assert len(batches) == loader.micro_steps
            yield from batches

    whole = [torch.cat(part) for part in zip(*divided(1))]
    assert whole[0].shape == (windows, block_size) and whole[0].dtype == torch.int64
    assert (whole[1] == whole[0] + 1).all() and (whole[0].diff() == 1).all()
    for ddp_size in (2, 4):
        assert all(torch.equal(torch.cat(part), all_) for part, all_ in zip(zip(*divided(ddp_size)), whole))


def test_windows_depend_on_seed_and_step_and_not_on_the_steps_before(thousand):
    def first(loader, step):
        return torch.cat([x[:, 0] for x, _ in loader.batches(step)]).tolist()

    def fresh(seed):
        return TrainLoader(thousand, 5, 12, seed, 0, 1, 5, 'cpu')

    loader = fresh(1)
    steps = (0, 1, 7, 6, 7)
    assert [first(loader, step) for step in steps] == [first(fresh(1), step) for step in steps]
    assert len({tuple(first(fresh(seed), step)) for seed in (1, 2) for step in (0, 1)}) == 4


def test_every_place_of_the_training_split_can_be_drawn(tmp_path):
    loader = TrainLoader(tokens_in(tmp_path, numbers(12)), 3, 500, 0, 0, 1, 500, 'cpu')
    assert set(loader.window_starts(0)) == set(range(9))


@steady
@given(n=st.integers(2, 1000), block_size=st.integers(1, 40), batch_size=st.integers(1, 7),
       eval_tokens=st.integers(1, 1200), ddp_size=st.integers(1, 4))
def test_validation_covers_each_target_once(n, block_size, batch_size, eval_tokens, ddp_size):
    with TemporaryDirectory() as folder:
        tokens = tokens_in(folder, numbers(n))
        seen = []
        for ddp_rank in range(ddp_size):
            for x, y, count in val_batches(
                    tokens, block_size, batch_size, eval_tokens, ddp_rank, ddp_size, 'cpu'):
                real = y >= 0
                assert x.shape == y.shape == (batch_size, block_size) and x.dtype == y.dtype == torch.int64
                assert count == real.sum() > 0 and (y[~real] == -1).all()
                assert (x[real] == y[real] - 1).all() and (x.reshape(-1)[:count].diff() == 1).all()
                seen += y[real].tolist()
        assert sorted(seen) == list(range(1, min(eval_tokens, n - 1) + 1))


def test_a_bad_training_token_surfaces_in_the_steps_that_read_it_and_in_no_other(tmp_path):
    tokens = numbers(100)
    tokens[60] = 50257
    loader = TrainLoader(tokens_in(tmp_path, tokens), 10, 4, 2, 0, 1, 2, 'cpu')
    bad = {step for step in range(20) if any(s <= 60 <= s + 10 for s in loader.window_starts(step))}
    assert 1 < len(bad) < 19
    for step in range(20):
        if step not in bad:
            assert len(list(loader.batches(step))) == 2
            continue
        with pytest.raises(ValueError, match='tokens.bin holds the token 50257, outside the vocabulary'):
            next(loader.batches(step))


def test_windows_that_do_not_divide_and_corpora_shorter_than_a_block_are_refused(thousand):
    with pytest.raises(ValueError, match='= 480 windows do not divide by 7 data-parallel processes'):
        TrainLoader(thousand, 8, 480, 1, 0, 7, 12, 'cpu')
    with pytest.raises(ValueError, match='1000 tokens, one window of block_size 1000 needs 1001'):
        TrainLoader(thousand, 1000, 2, 1, 0, 1, 1, 'cpu')
    TrainLoader(thousand, 999, 2, 1, 0, 1, 1, 'cpu')


def test_a_program_that_ends_while_a_step_is_read_ahead_ends_as_it_meant_to(tmp_path):
    tokens_in(tmp_path, numbers(1000))
    program = f"""
from data.corpus import Tokens
from data.dataloader import TrainLoader
from pathlib import Path
import time
class Slow(Tokens):
    def read_windows(self, starts, n):
        time.sleep(0.2)
        return super().read_windows(starts, n)
loader = TrainLoader(Slow([Path({str(tmp_path)!r}) / "tokens.bin"], 50257), 8, 4, 1, 0, 1, 2, "cpu")
next(loader.batches(0))
raise SystemExit("as meant")
"""
    run = subprocess.run(
        [sys.executable, '-c', program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (run.returncode, run.stderr) == (1, 'as meant\n')


@pytest.mark.skipif(not Path('/proc/self/status').exists(), reason='needs /proc')
def test_reading_a_large_file_does_not_grow_the_process(tmp_path):
    path = tmp_path / 'large.bin'
    path.touch()
    os.truncate(path, 1 << 30)  # a gigabyte of zeros that takes no disk
    tokens = Tokens([path], META['vocab_size'])
    rng = np.random.default_rng(0)

    def resident():  # in MB
        return int(Path('/proc/self/status').read_text().split('VmRSS:')[1].split()[0]) / 1024

    before = resident()
    for _ in range(40):
        tokens.read_windows(rng.integers(0, len(tokens) - 1025, 100), 1025)
    assert resident() - before < 30


@cache
def toy_files():
    with TemporaryDirectory() as folder:
        write_corpus(Path(folder), META, dict(train=[numbers(100), numbers(200)], val=[numbers(40)]))
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def write_toy(folder):
    """A corpus of 300 and 40 tokens; returns its data_dir."""
    (folder / 'pystdlib').mkdir()
    for name, data in toy_files().items():
        (folder / 'pystdlib' / name).write_bytes(data)
    return folder


def edited(*keys, value):
    """A change of the entry of meta.json that the keys lead to; value ... takes it out."""
    def edit(folder):
        path = folder / 'meta.json'
        meta = json.loads(path.read_text())
        place = meta
        for key in keys[:-1]:
            place = place[key]
        place[keys[-1]] = value
        if value is ...:
            del place[keys[-1]]
        path.write_text(json.dumps(meta))
    return edit


def rewritten(name, change):
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


def with_header(**header):
    return lambda folder: write_tokens(folder / 'train.bin', numbers(300), header=True, **header)


def removed(name, then=lambda path: None):
    return lambda folder: ((folder / name).unlink(), then(folder / name))


def header_of_another_count(folder):
    write_tokens(folder / 'train.bin', numbers(300), header=True)
    rewritten('train.bin', lambda data: data + b'  ')(folder)


FILES = ('splits', 'train', 'files', 0)
REFUSALS = {
    'no meta': (removed('meta.json'), 'meta.json is missing'),
    'no train': (removed('train.bin'), 'train.bin is missing'),
    'a folder': (removed('val.bin', Path.mkdir), 'val.bin is missing'),
    'a pipe': (removed('val.bin', os.mkfifo), 'val.bin is missing'),
    'empty': (rewritten('train.bin', lambda data: b''), 'train.bin is empty'),
    'odd size': (rewritten('train.bin', lambda data: data[:-1]), 'odd size, 599 bytes'),
    'cut short': (rewritten('train.bin', lambda data: data[:-2]), 'holds 299 tokens of uint16'),
    'uint32': (rewritten('train.bin', lambda data: np.frombuffer(data, TOKEN).astype('<u4')), 'holds 600'),
    'other magic': (with_header(magic=20240801), 'holds 812 tokens of uint16, meta.json says 300'),
    'other version': (with_header(version=2), 'version 2 in its header'),
    'other count': (header_of_another_count, 'are not the 300 tokens that its header gives'),
    'val changed': (rewritten('val.bin', lambda data: data[2:] + data[:2]), 'not those that meta.json'),
    'val token': (rewritten('val.bin', lambda data: data[:-2] + b'\xff\xff'), 'not those that meta.json'),
    'not JSON': (rewritten('meta.json', lambda data: data[:-9]), 'meta.json is not JSON'),
    'deep JSON': (rewritten('meta.json', lambda data: b'[' * 100_000), 'meta.json is not JSON'),
    'not UTF-8': (rewritten('meta.json', lambda data: b'\xff\xfe\xfa'), 'meta.json is not JSON'),
    'a list': (rewritten('meta.json', lambda data: b'[1]'), 'it is [1], it must be a JSON object'),
    'no tokenizer': (edited('tokenizer', value=...), 'tokenizer is None, it must be a string'),
    'odd tokenizer': (edited('tokenizer', value='pickle'), "is 'pickle', it must be byte, gpt2 or char"),
    'odd dtype': (edited('dtype', value='uint32'), "dtype is 'uint32', it must be 'uint16'"),
    'vocabulary': (edited('vocab_size', value=50304), 'vocab_size is 50304, it must be 50257'),
    'char': (edited('tokenizer', value='char'), 'chars is None, it must be the alphabet as one'),
    'no val': (edited('splits', 'val', value=...), 'it must hold the objects train and val'),
    'no files': (edited('splits', 'val', 'files', value=[]), 'val: files is [], it must be a list'),
    'path': (edited(*FILES, 'name', value='../train.bin'), "is '../train.bin', it must be a plain name"),
    'absolute': (edited(*FILES, 'name', value='/etc/passwd'), "is '/etc/passwd', it must be a plain name"),
    'twice': (edited(*FILES, 'name', value='val.bin'), 'splits names a file twice'),
    'true': (edited(*FILES, 'tokens', value=True), "of 'train.bin' is True, it must be a positive"),
    'sum': (edited('splits', 'train', 'tokens', value=301), 'tokens is 301, it must be the sum over'),
    'max_token': (edited('splits', 'train', 'max_token', value=50257), 'train: max_token is 50257, it must'),
    'val max_token': (edited('splits', 'val', 'max_token', value=38), 'not those that meta.json'),
    'no hash': (edited('splits', 'val', 'sha256', value=...), 'val: sha256 is None, it must be a string'),
}


@pytest.mark.parametrize('damage, complaint', REFUSALS.values(), ids=REFUSALS)
def test_wrong_files_are_refused_in_one_line_that_names_the_command(tmp_path, damage, complaint):
    data_dir = write_toy(tmp_path)
    damage(data_dir / 'pystdlib')
    with pytest.raises(ValueError) as refusal:
        open_corpus('pystdlib', data_dir)
    line = str(refusal.value)
    assert complaint in line and '\n' not in line
    assert f': run python data/pystdlib/prepare.py --out={tmp_path}/pystdlib' in line


def test_what_is_whole_opens_and_unknown_names_are_refused_with_the_known_ones(tmp_path):
    data_dir = write_toy(tmp_path)
    edited('source', value=dict(any=['thing']))(data_dir / 'pystdlib')
    edited('extra', value=1)(data_dir / 'pystdlib')
    with_header()(data_dir / 'pystdlib')
    corpus = open_corpus('pystdlib', data_dir)
    assert (corpus.name, corpus.vocab_size) == ('pystdlib', 50257)
    assert (len(corpus.train), len(corpus.val)) == (300, 40)
    assert (corpus.train.read(250, 50) == numbers(300)[250:]).all()
    for name in ('nosuch', '', '..', '../pystdlib', 'a\0b', 'x' * 300):
        with pytest.raises(ValueError) as refusal:
            open_corpus(name, data_dir)
        assert 'data/ can prepare fineweb, openwebtext, pystdlib, shakespeare_char; ' in str(refusal.value)
        assert 'python data/text/prepare.py --input FILE... --out=data/NAME' in str(refusal.value)


@pytest.mark.parametrize('tokens, complaint', [
    ([1, 50257], 'val: max_token is 50257, it must be below the vocabulary of 50257'),
    ([1], 'at least 2'), ([], 'is empty')])
def test_no_corpus_is_written_that_would_not_open(tmp_path, tokens, complaint):
    write_toy(tmp_path)
    with pytest.raises(ValueError, match=complaint):
        write_corpus(tmp_path / 'pystdlib', META, dict(train=[numbers(9)], val=[np.array(tokens, TOKEN)]))
    with pytest.raises(ValueError, match='meta.json is missing'):
        open_corpus('pystdlib', tmp_path)


words = st.text(max_size=5)
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3), max_leaves=5)
KEYS = [('dataset',), ('corpus',), ('source',), ('tokenizer',), ('vocab_size',), ('dtype',), ('splits',),
        ('chars',), FILES[:2], FILES[:3], FILES, (*FILES, 'name'), (*FILES, 'tokens'),
        ('splits', 'val', 'tokens'), ('splits', 'val', 'max_token'), ('splits', 'val', 'sha256')]


@settings(steady, max_examples=250)
@given(data=st.data())
def test_fuzzed_files_open_or_are_refused_in_one_line(data):
    with TemporaryDirectory() as folder:
        data_dir = write_toy(Path(folder))
        if data.draw(st.booleans()):
            edited(*data.draw(st.sampled_from(KEYS)), value=data.draw(anything))(data_dir / 'pystdlib')
        else:
            path = data_dir / 'pystdlib' / data.draw(st.sampled_from(['train.bin', 'val.bin', 'meta.json']))
            was = path.read_bytes()
            i, j = (data.draw(st.integers(0, len(was))) for _ in range(2))
            path.write_bytes(was[:i] + data.draw(st.binary(max_size=8)) + was[j:])
        try:
            corpus = open_corpus('pystdlib', data_dir)
            corpus.train.read(0, len(corpus.train))
            assert (len(corpus.train), len(corpus.val)) == (300, 40)
            assert (corpus.val.read(0, 40) == numbers(40)).all()
        except ValueError as refusal:
            assert str(refusal) and '\n' not in str(refusal) and len(str(refusal)) < 1000


@steady
@given(texts=st.lists(st.text(max_size=20) | st.just(EOT), min_size=1, max_size=4))
def test_bytes_round_trip_and_end_of_text_is_one_token_between_documents(texts):
    tokens = encode_documents(byte_encoding(), texts)
    documents = [[*text.encode('utf-8', 'replace'), 256] for text in texts]
    assert tokens.tolist() == sum(documents, [])
    text = ''.join(texts)
    if EOT not in text:
        tokenizer = load_tokenizer(dict(tokenizer='byte'))
        assert tokenizer.decode(tokenizer.encode(text + EOT)) == text + EOT and tokenizer.encode(EOT) == [256]


def test_characters_round_trip_and_unknown_ones_are_refused():
    tokenizer = load_tokenizer(dict(tokenizer='char', chars='\n abé'))
    assert tokenizer.encode('é ab\n') == [4, 1, 2, 3, 0] and tokenizer.decode([4, 1, 2, 3, 0]) == 'é ab\n'
    with pytest.raises(ValueError, match="character 'c' is not among the 5 of this corpus"):
        tokenizer.encode('abc')



# prepare scripts


def run_script(name, *flags, **environment):
    return subprocess.run(
        [sys.executable, ROOT / 'data' / name / 'prepare.py', *map(str, flags)],
        capture_output=True, encoding='utf-8', timeout=120, env=os.environ | environment)


C_LOCALE = dict(LC_ALL='C', PYTHONUTF8='0', PYTHONCOERCECLOCALE='0')


def test_openwebtext_reads_the_named_files_killed_and_begun_again(tmp_path):
    source = tmp_path / 'data [12]*.jsonl'  # as a pattern it would match the other one
    written = [f'dócument {i} ' * 200 for i in range(800)]
    source.write_text(''.join(f'{{"text": "{one}"}}\n' for one in written), encoding='utf-8')
    (tmp_path / 'data 1.jsonl').write_text('{"text": "another"}\n' * 3)
    flags = ['--input', source, '--tokenizer=byte', '--workers=1']
    whole, torn = tmp_path / 'whole', tmp_path / 'torn'
    done = run_script('openwebtext', *flags, f'--out={whole}', **C_LOCALE)
    assert done.returncode == 0, done.stderr
    script = [sys.executable, ROOT / 'data/openwebtext/prepare.py', *flags, f'--out={torn}']
    process = subprocess.Popen(script, stderr=subprocess.DEVNULL)
    while process.poll() is None and len(list(torn.glob('parts/*.bin'))) < 5:
        pass
    process.kill()
    assert process.wait() == -9 and not (torn / 'meta.json').exists()
    assert run_script('openwebtext', *flags, f'--out={torn}').returncode == 0
    documents = []
    for name in ('train.bin', 'val.bin'):
        assert (whole / name).read_bytes() == (torn / name).read_bytes()
        found = load_tokenizer(dict(tokenizer='byte')).decode(np.fromfile(torn / name, TOKEN).tolist())
        documents += found.split(EOT)[:-1]
    assert sorted(documents) == sorted(written)


def test_fineweb_shards_from_a_folder_are_read_across_their_border(tmp_path):
    shards, out, rng = tmp_path / 'shards', tmp_path / 'fineweb', np.random.default_rng(1)
    shards.mkdir()
    parts = {name: rng.integers(0, 50257, 300) for name in
             ('fineweb_val_000000.bin', 'fineweb_train_000001.bin', 'fineweb_train_000002.bin')}
    for name, tokens in parts.items():
        write_tokens(shards / name, tokens.astype(TOKEN), header=True)
    done = run_script('fineweb', f'--input={shards}', '--shards=2', f'--out={out}')
    assert done.returncode == 0, done.stderr
    train = open_corpus('fineweb', tmp_path).train
    both = np.concatenate([parts[f'fineweb_train_00000{i}.bin'] for i in (1, 2)])
    assert train.read(290, 20).tolist() == both[290:310].tolist()
    shutil.rmtree(out)
    (shards / 'fineweb_train_000002.bin').write_bytes(b'not tokens')
    refused = run_script('fineweb', f'--input={shards}', '--shards=2', f'--out={out}')
    assert refused.returncode == 1 and len(refused.stderr.splitlines()) == 1, refused.stderr


@pytest.fixture
def called(monkeypatch):
    """Runs a prepare script's main() in this process."""
    def call(script, *flags):
        monkeypatch.setattr(sys, 'argv', ['prepare.py', *map(str, flags)])
        script.main()
    return call


def offline(*args, **kwargs):
    raise OSError('no network')


def hub(**functions):
    """A stand-in for the library that reaches the hub."""
    return lambda name: SimpleNamespace(**functions)


def test_a_fineweb_download_goes_on_and_refuses_what_is_no_shard(tmp_path, called, monkeypatch, capsys):
    out, fetched, whole = tmp_path / 'fineweb', [], {'fineweb_val_000000.bin', 'fineweb_train_000001.bin'}

    def fetch(repo, name, repo_type, revision, local_dir):
        fetched.append(name)
        return write_tokens(local_dir / name, numbers(9), header=name in whole)

    monkeypatch.setattr(fineweb, 'hub_revision', lambda repo, out: 'abc')
    monkeypatch.setattr(fineweb, 'import_library', hub(hf_hub_download=fetch))
    with pytest.raises(ValueError, match='train_000002.bin is no FineWeb shard'):
        called(fineweb, f'--out={out}', '--shards=2')
    assert {path.name for path in out.iterdir()} == whole | {'parts'}
    called(fineweb, f'--out={out}', '--shards=1')  # what is there is enough
    whole.add('fineweb_train_000002.bin')
    called(fineweb, f'--out={out}', '--shards=2')  # and more may be added to it
    assert sorted(fetched) == sorted([*whole, 'fineweb_train_000002.bin'])
    assert len(open_corpus('fineweb', tmp_path).train) == 18
    monkeypatch.setattr(fineweb, 'import_library', hub(hf_hub_download=offline))
    with pytest.raises(ValueError, match=r'cannot download fineweb_train_000003.bin .*no network'):
        called(fineweb, f'--out={out}', '--shards=3')
    capsys.readouterr()
    called(fineweb, f'--out={out}', '--shards=2')
    assert 'already prepared' in capsys.readouterr().out


def test_fineweb_keeps_its_own_shards_when_others_are_named(tmp_path, called):
    shards, out = tmp_path / 'shards', tmp_path / 'fineweb'
    for folder, tokens in (shards, numbers(9)), (out, numbers(8)):
        folder.mkdir()
        for name in 'fineweb_val_000000.bin', 'fineweb_train_000001.bin':
            write_tokens(folder / name, tokens, header=True)
    before = contents(out)
    with pytest.raises(ValueError, match='fineweb_val_000000.bin is a file, not a link: delete it or'):
        called(fineweb, f'--input={shards}', f'--out={out}')
    assert contents(out).items() >= before.items()
    called(fineweb, f'--input={out}', f'--out={out}')
    with pytest.raises(ValueError, match='holds another corpus'):
        called(fineweb, f'--input={shards}', f'--out={out}')
    assert contents(out).items() >= before.items() and len(open_corpus('fineweb', tmp_path).train) == 8


def test_a_text_as_characters_is_kept_when_another_is_named(tmp_path, called, capsys):
    out, words = tmp_path / 'characters', 'To be, or not to bé. ' * 20
    (tmp_path / 'one.txt').write_text(words, encoding='utf-8')
    (tmp_path / 'two.txt').write_bytes(b'caf\xe9')
    for _ in range(2):
        called(shakespeare_char, f'--input={tmp_path / "one.txt"}', f'--out={out}')
    assert capsys.readouterr().out.endswith('is already prepared\n')
    corpus = open_corpus('characters', tmp_path)
    assert load_tokenizer(corpus.meta).decode(read_all(corpus.train) + read_all(corpus.val)) == words
    assert len(corpus.train) == 9 * len(corpus.val) and corpus.meta['chars'] == ''.join(sorted(set(words)))
    with pytest.raises(ValueError, match='characters holds another corpus: delete its meta.json'):
        called(shakespeare_char, f'--input={tmp_path / "two.txt"}', f'--out={out}')
    assert read_all(open_corpus('characters', tmp_path).train) == read_all(corpus.train)
    with pytest.raises(ValueError, match='two.txt is not UTF-8 text'):
        called(shakespeare_char, f'--input={tmp_path / "two.txt"}', f'--out={tmp_path / "other"}')


def test_a_download_of_another_text_is_not_tiny_shakespeare(tmp_path, called, monkeypatch):
    monkeypatch.setattr(shakespeare_char, 'urlopen', offline)
    with pytest.raises(OSError, match='no network.*: give the text with --input=FILE'):
        called(shakespeare_char, f'--out={tmp_path}')
    monkeypatch.setattr(shakespeare_char, 'urlopen', lambda url, timeout: io.BytesIO(b'a page of a proxy'))
    with pytest.raises(ValueError, match='input.txt is not tiny Shakespeare'):
        called(shakespeare_char, f'--out={tmp_path}')
    assert not (tmp_path / 'meta.json').exists()


def test_the_sources_of_another_python_stay_as_they_are(tmp_path, called, monkeypatch, capsys):
    for name in pystdlib.find_modules(Path(sysconfig.get_paths()['stdlib'])):
        assert not name.startswith(('turtle', 'pydoc_data')) and '/test' not in name
    modules = {f'{i}.py': tmp_path / f'{i}.py' for i in range(30)}
    for path in modules.values():
        path.write_text(f'name = {path.name!r}\n')
    monkeypatch.setattr(pystdlib, 'find_modules', lambda folder: modules)
    out = tmp_path / 'pystdlib'
    called(pystdlib, f'--out={out}')
    before = contents(out)
    corpus = open_corpus('pystdlib', tmp_path)
    assert (read_all(corpus.train) + read_all(corpus.val)).count(256) == 30
    called(pystdlib, f'--out={out}')
    monkeypatch.setattr(platform, 'python_version', lambda: '3.99.0')
    called(pystdlib, f'--out={out}')
    *_, already, another = capsys.readouterr().out.splitlines()
    assert already.endswith('is already prepared') and before == contents(out)
    assert f'{corpus.meta["corpus"]}; for those of this Python, 3.99.0, delete its meta.json' in another


def test_the_revision_of_an_earlier_start_is_taken_again_without_the_hub(tmp_path, monkeypatch):
    monkeypatch.setattr(preparing, 'import_library', hub(HfApi=offline))
    (tmp_path / 'parts').mkdir()
    (tmp_path / 'parts/plan.json').write_text('{"source": {"dataset": "a/b", "revision": "of the plan"}}')
    assert preparing.hub_revision('a/b', tmp_path) == 'of the plan'
    (tmp_path / 'meta.json').write_text('{"source": {"dataset": "a/b", "revision": "of the meta"}}')
    assert preparing.hub_revision('a/b', tmp_path) == 'of the meta'
    with pytest.raises(ValueError, match=r'cannot reach a/c on the Hugging Face hub \(no network\)'):
        preparing.hub_revision('a/c', tmp_path)
    with pytest.raises(ValueError, match='nosuchlibrary is needed here .*: pip install nosuchlibrary'):
        import_library('nosuchlibrary')


def test_an_openwebtext_that_is_not_whole_is_refused():
    documents = datasets.Dataset.from_dict(dict(text=['one', 'two', 'three']))
    builder = SimpleNamespace(download_and_prepare=lambda: None, as_dataset=lambda split: documents)
    args, source = SimpleNamespace(input=None, name='', rows=openwebtext.ROWS), dict(revision='abc')
    with pytest.raises(ValueError, match='revision abc has 3 documents, it must have 8,013,769: .*--rows=3'):
        openwebtext.load_documents(builder, args, source)
    args.rows = 3
    assert openwebtext.load_documents(builder, args, source) is documents


@pytest.mark.parametrize('tokenizer, whole', [('gpt2', 94e9), ('byte', 222e9)])
def test_openwebtext_needs_what_its_help_says_less_what_is_done(tmp_path, tokenizer, whole):
    builder = SimpleNamespace(cache_dir=tmp_path / 'cache')
    args = SimpleNamespace(input=None, out=tmp_path, tokenizer=tokenizer)
    assert f'{whole / 1e9:g}' in openwebtext.__doc__
    assert sum(size for _, size in openwebtext.find_needs(builder, args)) == whole
    builder.cache_dir.mkdir()
    (tmp_path / 'parts').mkdir()
    (tmp_path / 'parts/train-00000000.bin').write_bytes(bytes(1000))
    assert openwebtext.find_needs(builder, args) == [(tmp_path, whole - 54e9 - 1000)]


def test_a_prepared_openwebtext_needs_no_network_and_no_datasets(tmp_path, called, monkeypatch, capsys):
    out, path = tmp_path / 'openwebtext', write_lines(tmp_path / 'a.jsonl', ['one'])
    meta = META | dict(dataset='openwebtext', corpus='documents of --input', source=dict(
        files=[dict(name='a.jsonl', sha256=hashlib.sha256(path.read_bytes()).hexdigest())]))
    write_corpus(out, meta, dict(train=[numbers(9)], val=[numbers(5)]))
    monkeypatch.setattr(openwebtext, 'load_encoding', offline)
    monkeypatch.setattr(openwebtext, 'import_library', offline)
    called(openwebtext, f'--input={path}', f'--out={out}')
    assert capsys.readouterr().out == f'{out} is already prepared\n'


# own text


@pytest.fixture
def prepare(monkeypatch, tmp_path):
    """Runs data/text/prepare.py in this process, with bytes for tokens and tmp_path/own for --out."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(text, 'PART', 100)  # many parts of little text

    def run(*flags, tokenizer='byte', out='own', workers=1):
        script = ['prepare.py', f'--tokenizer={tokenizer}', f'--workers={workers}']
        monkeypatch.setattr(sys, 'argv', [*script, *map(str, flags), *([f'--out={out}'] if out else [])])
        text.main()
        return out and open_corpus(out, tmp_path)
    return run


def write_lines(path, documents, opener=open):
    with opener(path, 'wt', encoding='utf-8') as file:
        file.writelines(json.dumps(dict(text=one, number=i)) + '\n' for i, one in enumerate(documents))
    return path


def as_tokens(documents):
    return [token for one in documents for token in [*one.encode(), 256]]


def read_all(tokens):
    return tokens.read(0, len(tokens)).tolist()


DOCS = [f'Document {i}: ' + 'a tûrn of phrase,\n' * (i % 7) for i in range(60)]
IN_VAL = [int(hashlib.sha256(one.encode()).hexdigest(), 16) / 2**256 < 0.25 for one in DOCS]
VAL = [one for one, chosen in zip(DOCS, IN_VAL) if chosen]
TRAIN = [one for one, chosen in zip(DOCS, IN_VAL) if not chosen]


@pytest.mark.parametrize('suffix, opener, workers, part', [
    ('.jsonl', open, 1, 100), ('.jsonl', open, 3, 1), ('.jsonl.gz', gzip.open, 2, 1000),
    ('.jsonl.xz', lzma.open, 1, 1 << 22)])
def test_documents_are_split_by_their_hash_in_order_whatever_the_file_the_workers_and_the_parts(
        prepare, monkeypatch, suffix, opener, workers, part):
    monkeypatch.setattr(text, 'PART', part)
    path = write_lines(Path(f'docs{suffix}'), DOCS, opener)
    corpus = prepare('--input', path, '--val_share=0.25', workers=workers)
    assert 5 < len(VAL) < 30
    assert read_all(corpus.train) == as_tokens(TRAIN) and read_all(corpus.val) == as_tokens(VAL)
    assert corpus.meta['documents'] == dict(train=len(TRAIN), val=len(VAL))
    digest = hashlib.sha256(path.read_bytes()).digest()
    assert corpus.meta['source'] == dict(files=1, sha256=hashlib.sha256(digest).hexdigest())
    assert sorted(os.listdir('own')) == ['meta.json', 'train.bin', 'val.bin']


def test_a_folders_files_are_documents_in_the_order_of_their_names_and_names_are_not_patterns(prepare):
    folder = Path('some [12] *texts')
    (folder / 'b').mkdir(parents=True)
    for i, one in enumerate(DOCS[:-20]):
        (folder / f'b/{i:03} [12]?.{"md" if i % 2 else "TXT"}').write_text(one, encoding='utf-8', newline='')
    (folder / 'b/0.txt').write_bytes(b'')  # without text, so no document
    (folder / 'b/picture.png').write_bytes(b'\xff')
    write_lines(folder / 'c[1].jsonl', DOCS[-20:-10])
    write_lines(Path('d[1].jsonl'), DOCS[-10:])
    Path('d1.jsonl').write_text('{"text": "another"}\n')  # d[1].jsonl would match it as a pattern
    corpus = prepare('--input', folder, 'd[1].jsonl', '--val_share=0.25', workers=2)
    assert read_all(corpus.train) == as_tokens(TRAIN) and read_all(corpus.val) == as_tokens(VAL)


@pytest.mark.parametrize('name', ['one.txt', 'one.jsonl'])
def test_the_end_of_a_single_document_is_for_validation(prepare, name):
    words = ''.join(f'word {i}, ' for i in range(100))
    Path('one.txt').write_text(words)
    write_lines(Path('one.jsonl'), [words])
    corpus = prepare('--input', name, '--val_share=0.1')
    assert read_all(corpus.train) + read_all(corpus.val) == as_tokens([words])
    assert len(corpus.val) == round(0.1 * (len(words) + 1))


def gpt2_like(pairs):
    """An encoding that cuts text as GPT-2's does; its merges of pairs show where a piece of text began."""
    ranks = {bytes([i]): i for i in range(256)}
    ranks |= {bytes(pair): 256 + i for i, pair in enumerate(pairs)}
    return tiktoken.Encoding('toy', pat_str=r50k_pat_str, mergeable_ranks=ranks,
                             special_tokens={EOT: len(ranks)})


ALPHABET = " \n\r\t\x1c\xa0\u3000ab1.'sé中"
LETTERS = sorted(set(ALPHABET.encode()))
TOY = gpt2_like((a, b) for a in LETTERS for b in LETTERS)


@steady
@given(words=st.text(ALPHABET, min_size=1, max_size=40), part=st.integers(1, 12))
def test_a_document_read_in_pieces_has_the_tokens_of_the_whole(words, part):
    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(text, 'PART', part)
        path = Path(folder) / 'one.txt'
        path.write_text(words, encoding='utf-8', newline='')
        pieces = list(text.read_document(path, 'train'))
        tokens = [tokens for piece in pieces for _, tokens in text.encode_piece(TOY, piece, 0.5)]
        assert np.concatenate(tokens).tolist() == encode_documents(TOY, [words]).tolist()
        assert sum(piece.read for piece in pieces) == path.stat().st_size


def test_a_long_document_is_read_in_pieces(tmp_path):
    path = tmp_path / 'one.txt'
    path.write_text('some words, ' * 1_000_000)
    sizes = [len(piece.data) for piece in text.read_document(path, 'train')]
    assert sum(sizes) == 12_000_000 and max(sizes) < 1.01 * text.PART


def write_part(path, order, number):
    with open(order, 'a') as file:
        file.write(f'{number}\n')
    path.touch()


def test_finished_parts_are_not_made_again_and_jobs_are_not_read_far_ahead(tmp_path):
    paths, order = [tmp_path / str(i) for i in range(30)], tmp_path / 'order'
    paths[4].touch()

    def jobs():
        for i, path in enumerate(paths):
            assert all(done.exists() for done in paths[:max(0, i - 2)])
            yield Job(path, 1, (order, i))

    assert make_parts(write_part, jobs(), 1, 30, 'part') == paths
    assert order.read_text().split() == [str(i) for i in range(30) if i != 4]


def test_own_text_killed_and_begun_again_gives_equal_files(tmp_path):
    path = write_lines(tmp_path / 'docs.jsonl', [one * 20 for one in DOCS * 10])
    program = 'from data.text import prepare; prepare.PART = 5000; prepare.run_script(prepare.main)'
    flags = ['--input', path, '--tokenizer=byte', '--val_share=0.25', '--workers=2']

    def start(out):
        return subprocess.Popen([sys.executable, '-c', program, *flags, f'--out={tmp_path / out}'], cwd=ROOT,
                                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    assert start('whole').wait() == 0
    process, torn = start('torn'), tmp_path / 'torn'
    while process.poll() is None and len(list(torn.glob('parts/train-*.bin'))) < 10:
        pass
    process.kill()
    assert process.wait() == -9 and not (torn / 'meta.json').exists()
    kept = sorted(torn.glob('parts/train-*.bin'))[0]
    before = kept.stat().st_mtime_ns
    other = run_script('text', *flags[:-2], f'--out={torn}')
    assert other.returncode == 1 and 'parts is unfinished work of another command' in other.stderr
    assert kept.stat().st_mtime_ns == before
    assert start('torn').wait() == 0
    for name in ('train.bin', 'val.bin'):
        assert (tmp_path / 'whole' / name).read_bytes() == (torn / name).read_bytes()


def test_text_is_utf8_in_every_locale(tmp_path):
    byte_order_mark, words = b'\xef\xbb\xbf', 'ünïcode 中\r\n'
    (tmp_path / 'é ü.txt').write_bytes(byte_order_mark + words.encode())
    write_lines(tmp_path / 'a.jsonl', ['naïve', *DOCS])
    done = run_script('text', '--input', tmp_path / 'é ü.txt', tmp_path / 'a.jsonl', '--tokenizer=byte',
                      '--val_share=0.25', f'--out={tmp_path / "ö"}', **C_LOCALE)
    assert done.returncode == 0, done.stderr
    corpus = open_corpus('ö', tmp_path)
    assert corpus.meta['dataset'] == 'ö'
    decode = load_tokenizer(corpus.meta).decode
    documents = (decode(read_all(corpus.train)) + decode(read_all(corpus.val))).split(EOT)
    assert sorted(documents) == sorted(['', words, 'naïve', *DOCS])


def written(data):
    return lambda path: path.write_bytes(data)


LINE = b'{"text": "some words"}\n'
REFUSED_TEXT = {
    'no file': ('docs.txt', lambda path: None, 'docs.txt does not exist'),
    'suffix': ('docs.csv', written(b'a'), 'docs.csv is of another kind, it must be'),
    'empty folder': ('docs', Path.mkdir, 'docs has no files .txt'),
    'empty': ('docs.jsonl', written(b''), 'docs.jsonl has no text'),
    'no text': ('docs.jsonl', written(b'{"text": ""}\n'), 'docs.jsonl has no text'),
    'no JSON': ('docs.jsonl', written(LINE * 9 + b'\nwords\n'), 'docs.jsonl line 11: not JSON'),
    'deep JSON': ('docs.jsonl', written(LINE + b'[' * 100_000), 'docs.jsonl line 2: not JSON'),
    'no object': ('docs.jsonl', written(LINE * 7 + b'["text"]'), 'docs.jsonl line 8: no JSON object with'),
    'no string': ('docs.jsonl', written(LINE + b'{"text": 1}'), 'docs.jsonl line 2: no JSON object with'),
    'other key': ('docs.jsonl', written(b'{"body": "a"}'), 'docs.jsonl line 1: no JSON object with'),
    'line not UTF-8': ('docs.jsonl', written(LINE * 99 + b'{"text": "\xff"}'), 'line 100: not UTF-8 text'),
    'not UTF-8': ('docs.md', written(b'caf\xe9'), 'docs.md is not UTF-8 text'),
    'no gzip': ('docs.jsonl.gz', written(LINE), 'docs.jsonl.gz is damaged'),
    'cut gzip': ('docs.jsonl.gz', written(gzip.compress(LINE * 99)[:-12]), 'docs.jsonl.gz is damaged'),
    'no xz': ('docs.jsonl.xz', written(LINE), 'docs.jsonl.xz is damaged'),
    'cut xz': ('docs.jsonl.xz', written(lzma.compress(LINE * 99)[:-12]), 'docs.jsonl.xz is damaged'),
    'one side': ('docs.jsonl', written(LINE * 9), 'it must be larger: all 9 documents fall to train'),
    'too short': ('docs.jsonl', written(b'{"text": "a"}'), 'the only document has 2 tokens, too few'),
}


@pytest.mark.parametrize('name, make, complaint', REFUSED_TEXT.values(), ids=REFUSED_TEXT)
def test_unfit_text_is_refused_in_one_line(prepare, name, make, complaint):
    make(Path(name))
    with pytest.raises(ValueError) as refusal:
        prepare('--input', name)
    assert complaint in str(refusal.value) and '\n' not in str(refusal.value)
    assert not Path('own/meta.json').exists()


def test_flags_a_full_disk_and_a_folder_with_another_corpus_are_refused(prepare, monkeypatch, tmp_path):
    path = write_lines(Path('docs.jsonl'), DOCS)
    for flags, complaint in ((['--val_share=1'], '--val_share is 1.0, it must be above 0 and below 1'),
                             (['--workers=0'], '--workers is 0, it must be at least 1'),
                             (['--adopt=own'], 'either --input and --out are needed, or --adopt alone'),
                             (['--tokenizer=char'], "invalid choice: 'char'")):
        with pytest.raises(ValueError, match=complaint):
            prepare('--input', path, *flags)
    with pytest.raises(ValueError, match='either --input and --out are needed'):
        prepare('--input', path, out=None)
    prepare('--input', path, '--val_share=0.25')
    written = Path('own/train.bin').stat().st_mtime_ns
    with monkeypatch.context() as patch:
        patch.setattr(text, 'load_encoding', offline)  # what is prepared needs no tokenizer
        prepare('--input', path, '--val_share=0.25')
    assert Path('own/train.bin').stat().st_mtime_ns == written
    with pytest.raises(ValueError, match='own holds another corpus: delete its meta.json or choose another'):
        prepare('--input', path, '--val_share=0.5')
    monkeypatch.setattr(shutil, 'disk_usage', lambda folder: shutil._ntuple_diskusage(9, 9, 9))
    with pytest.raises(ValueError, match='0.0 GB are free at other, .* are needed: make room'):
        prepare('--input', path, out='other')


def test_nanogpts_files_are_adopted_by_the_command_that_the_refusal_names(prepare, tmp_path):
    folder = tmp_path / 'theirs'
    folder.mkdir()
    write_tokens(folder / 'train.bin', numbers(500))
    write_tokens(folder / 'val.bin', numbers(50))
    with pytest.raises(ValueError) as refusal:
        open_corpus('theirs', tmp_path)
    command = f'python data/text/prepare.py --adopt={folder}'
    assert str(refusal.value).endswith(f"meta.json is missing: adopt nanoGPT's files with {command}")
    assert run_script('text', command.split()[-1]).returncode == 0
    corpus = open_corpus('theirs', tmp_path)
    assert read_all(corpus.train) == list(range(500)) and read_all(corpus.val) == list(range(50))
    assert corpus.meta['splits']['train']['max_token'] == 499 and corpus.vocab_size == 50257
    with pytest.raises(ValueError, match='theirs has a meta.json'):
        prepare(f'--adopt={folder}', out=None)
    (folder / 'meta.json').unlink()
    with pytest.raises(ValueError, match='train: max_token is 499, it must be below the vocabulary of 257'):
        prepare(f'--adopt={folder}', out=None)
    (folder / 'meta.pkl').write_bytes(b'')
    for refuse in (partial(open_corpus, 'theirs', tmp_path), partial(prepare, f'--adopt={folder}', out=None)):
        with pytest.raises(ValueError, match='meta.pkl is a pickle, which is code and is not read'):
            refuse()
    assert not (folder / 'meta.json').exists()


def test_own_text_in_the_data_folder_is_a_dataset():
    folder = DATA_DIR / f'own-text-of-test-{os.getpid()}'
    try:
        write_corpus(folder, META, dict(train=[numbers(9)], val=[numbers(5)]))
        assert len(open_corpus(folder.name).train) == 9
        (folder / 'meta.json').unlink()
        with pytest.raises(ValueError, match=f'python data/text/prepare.py --adopt=data/{folder.name}$'):
            open_corpus(folder.name)
    finally:
        shutil.rmtree(folder)


def test_only_parts_that_a_preparation_named_are_removed(tmp_path):
    parts = tmp_path / 'parts'
    parts.mkdir()
    for name in ('train-00000000.bin', 'val-00000000.bin', 'plan.json', 'lock', 'train-00000000-mine.bin'):
        (parts / name).write_bytes(b'')
    remove_parts(parts)
    assert [path.name for path in parts.iterdir()] == ['train-00000000-mine.bin']
    (parts / 'train-00000000-mine.bin').unlink()
    remove_parts(parts)
    assert not parts.exists()
