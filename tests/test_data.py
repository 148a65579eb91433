"""
Corpora and batches: every token is read as it was written, a step's windows are the same for any number of
processes, validation reads each token once, and whatever does not fit is refused in one line.

    python -m pytest tests/test_data.py
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from configurator import ROOT
from data.corpus import (EOT, HEADER_BYTES, MAGIC, TOKEN, Tokens, byte_encoding, encode_documents, load_tokenizer,
                    open_corpus, write_corpus)
from data.dataloader import TrainLoader, val_batches

META = {'dataset': 'pystdlib', 'corpus': 'numbers', 'source': {}, 'tokenizer': 'gpt2', 'vocab_size': 50257}
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
    def dealt(ddp_size):
        for ddp_rank in range(ddp_size):
            loader = TrainLoader(thousand, block_size, windows, seed, ddp_rank, ddp_size, batch_size, 'cpu')
            share = windows // ddp_size
            assert loader.micro_batch * loader.micro_steps == share and loader.micro_batch <= batch_size
            assert all(share % size for size in range(loader.micro_batch + 1, min(batch_size, share) + 1))
            batches = list(loader.batches(step))
            assert len(batches) == loader.micro_steps
            yield from batches

    whole = [torch.cat(part) for part in zip(*dealt(1))]
    assert whole[0].shape == (windows, block_size) and whole[0].dtype == torch.int64
    assert (whole[1] == whole[0] + 1).all() and (whole[0].diff() == 1).all()
    for ddp_size in (2, 4):
        assert all(torch.equal(torch.cat(part), all_) for part, all_ in zip(zip(*dealt(ddp_size)), whole))


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
    program = f'''
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
'''
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


def write_toy(folder):
    """A corpus of 300 and 40 tokens; returns its data_dir."""
    write_corpus(folder / 'pystdlib', META, {'train': [numbers(100), numbers(200)], 'val': [numbers(40)]})
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
    'other count': (header_of_another_count, 'is not the 300 tokens that its header says'),
    'val changed': (rewritten('val.bin', lambda data: data[2:] + data[:2]), 'not those that meta.json'),
    'val token': (rewritten('val.bin', lambda data: data[:-2] + b'\xff\xff'), 'holds the token 65535'),
    'not JSON': (rewritten('meta.json', lambda data: data[:-9]), 'meta.json is not JSON'),
    'deep JSON': (rewritten('meta.json', lambda data: b'[' * 100_000), 'meta.json is not JSON'),
    'not UTF-8': (rewritten('meta.json', lambda data: b'\xff\xfe\xfa'), 'meta.json is not JSON'),
    'a list': (rewritten('meta.json', lambda data: b'[1]'), 'it must be a JSON object'),
    'no tokenizer': (edited('tokenizer', value=...), 'tokenizer must be a string, not None'),
    'odd tokenizer': (edited('tokenizer', value='pickle'), "must be byte, gpt2 or char, not 'pickle'"),
    'odd dtype': (edited('dtype', value='uint32'), "dtype must be 'uint16', not 'uint32'"),
    'vocabulary': (edited('vocab_size', value=50304), 'must be 50257 for this tokenizer, not 50304'),
    'char': (edited('tokenizer', value='char'), 'chars must be the alphabet as one sorted string, not None'),
    'no val': (edited('splits', 'val', value=...), 'splits must hold the objects train and val'),
    'no files': (edited('splits', 'val', 'files', value=[]), 'files must be a list of objects'),
    'path': (edited(*FILES, 'name', value='../train.bin'), "must have a plain name, not '../train.bin'"),
    'absolute': (edited(*FILES, 'name', value='/etc/passwd'), "must have a plain name, not '/etc/passwd'"),
    'twice': (edited(*FILES, 'name', value='val.bin'), 'a file is named twice'),
    'true': (edited(*FILES, 'tokens', value=True), "tokens of 'train.bin' must be a positive whole number"),
    'sum': (edited('splits', 'train', 'tokens', value=301), 'tokens must be the sum over the files'),
    'max_token': (edited('splits', 'train', 'max_token', value=50257), 'must be below the vocabulary'),
    'no hash': (edited('splits', 'val', 'sha256', value=...), "val's sha256 must be a string, not None"),
}


@pytest.mark.parametrize('damage, complaint', REFUSALS.values(), ids=REFUSALS)
def test_wrong_files_are_refused_in_one_line_that_names_the_command(tmp_path, damage, complaint):
    data_dir = write_toy(tmp_path)
    damage(data_dir / 'pystdlib')
    with pytest.raises(ValueError) as refusal:
        open_corpus('pystdlib', data_dir)
    line = str(refusal.value)
    assert complaint in line and '\n' not in line
    assert line.endswith(f'run python data/pystdlib/prepare.py --out {tmp_path}/pystdlib')


def test_what_is_whole_opens_and_unknown_names_are_told_the_known_ones(tmp_path):
    data_dir = write_toy(tmp_path)
    edited('source', value={'any': ['thing']})(data_dir / 'pystdlib')
    edited('extra', value=1)(data_dir / 'pystdlib')
    with_header()(data_dir / 'pystdlib')
    corpus = open_corpus('pystdlib', data_dir)
    assert (corpus.name, corpus.vocab_size) == ('pystdlib', 50257)
    assert (len(corpus.train), len(corpus.val)) == (300, 40)
    assert (corpus.train.read(250, 50) == numbers(300)[250:]).all()
    for name in ('nosuch', '', '..', '../pystdlib', 'a\0b', 'x' * 300):
        with pytest.raises(ValueError, match='can prepare fineweb, openwebtext, pystdlib, shakespeare_char'):
            open_corpus(name, data_dir)


@pytest.mark.parametrize('tokens, complaint', [
    ([1, 50257], 'outside the vocabulary'), ([1], 'at least 2'), ([], 'is empty')])
def test_no_corpus_is_written_that_would_not_open(tmp_path, tokens, complaint):
    write_toy(tmp_path)
    with pytest.raises(ValueError, match=complaint):
        write_corpus(tmp_path / 'pystdlib', META, {'train': [numbers(9)], 'val': [np.array(tokens, TOKEN)]})
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
        tokenizer = load_tokenizer({'tokenizer': 'byte'})
        assert tokenizer.decode(tokenizer.encode(text + EOT)) == text + EOT and tokenizer.encode(EOT) == [256]


def test_characters_round_trip_and_strangers_are_refused():
    tokenizer = load_tokenizer({'tokenizer': 'char', 'chars': '\n abé'})
    assert tokenizer.encode('é ab\n') == [4, 1, 2, 3, 0] and tokenizer.decode([4, 1, 2, 3, 0]) == 'é ab\n'
    with pytest.raises(ValueError, match="character 'c' is not among the 5 of this corpus"):
        tokenizer.encode('abc')


def prepare(*args):
    return subprocess.run([sys.executable, *map(str, args)], capture_output=True, text=True, timeout=120)


def test_openwebtext_from_a_local_file_killed_and_begun_again(tmp_path):
    script, source = ROOT / 'data/openwebtext/prepare.py', tmp_path / 'docs.jsonl'
    source.write_text(''.join(json.dumps({'text': f'document {i} ' * 300}) + '\n' for i in range(4000)))
    whole, torn = tmp_path / 'whole', tmp_path / 'torn'
    flags = ['--input', source, '--tokenizer=byte', '--workers=1', '--out']
    done = prepare(script, *flags, whole)
    assert done.returncode == 0, done.stderr
    process = subprocess.Popen([sys.executable, *map(str, [script, *flags, torn])], stderr=subprocess.DEVNULL)
    while process.poll() is None and len(list(torn.glob('parts/*.bin'))) < 20:
        pass
    process.kill()
    assert process.wait() == -9 and not (torn / 'meta.json').exists()
    assert prepare(script, *flags, torn).returncode == 0
    for name in ('train.bin', 'val.bin'):
        assert (whole / name).read_bytes() == (torn / name).read_bytes()


def test_fineweb_shards_from_a_folder_are_read_across_their_border(tmp_path):
    shards, out, rng = tmp_path / 'shards', tmp_path / 'fineweb', np.random.default_rng(1)
    shards.mkdir()
    parts = {name: rng.integers(0, 50257, 300) for name in
             ('fineweb_val_000000.bin', 'fineweb_train_000001.bin', 'fineweb_train_000002.bin')}
    for name, tokens in parts.items():
        write_tokens(shards / name, tokens.astype(TOKEN), header=True)
    done = prepare(ROOT / 'data/fineweb/prepare.py', '--input', shards, '--shards', 2, '--out', out)
    assert done.returncode == 0, done.stderr
    train = open_corpus('fineweb', tmp_path).train
    both = np.concatenate([parts[f'fineweb_train_00000{i}.bin'] for i in (1, 2)])
    assert train.read(290, 20).tolist() == both[290:310].tolist()
    shutil.rmtree(out)
    (shards / 'fineweb_train_000002.bin').write_bytes(b'not tokens')
    refused = prepare(ROOT / 'data/fineweb/prepare.py', '--input', shards, '--shards', 2, '--out', out)
    assert refused.returncode == 1 and len(refused.stderr.splitlines()) == 1, refused.stderr
