"""
Corpora and batches: every token read as written, windows from (seed, step) alone, wrong files refused in one line.

    python -m pytest tests/test_data.py
"""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configurator import ROOT
from corpus import Tokens, byte_encoding, load_tokenizer, open_corpus, write_corpus
from dataloader import TrainLoader, val_batches

META = {'dataset': 'toy', 'corpus': 'toy', 'source': {}, 'tokenizer': 'byte', 'vocab_size': 257}


def prepare(*args):
    return subprocess.run([sys.executable, *map(str, args)], capture_output=True, text=True, timeout=120)


def write_shard(path, tokens):
    """A token file with llm.c's header."""
    header = np.zeros(256, '<i4')
    header[:3] = 20240520, 1, len(tokens)
    path.write_bytes(header.tobytes() + tokens.astype('<u2').tobytes())


@pytest.fixture
def toy(tmp_path):
    rng = np.random.default_rng(0)
    splits = {name: rng.integers(0, 257, n).astype('<u2') for name, n in (('train', 1000), ('val', 203))}
    write_corpus(tmp_path / 'pystdlib', META, {name: [tokens] for name, tokens in splits.items()})
    return tmp_path, splits


def test_bytes_go_through_the_tokenizer_and_back():
    text = 'def f():\n    return "δ", 1\n'
    tokenizer = load_tokenizer(META)
    assert tokenizer.encode(text) == list(text.encode())
    assert tokenizer.decode(tokenizer.encode(text)) == text and byte_encoding().eot_token == 256


def test_windows_cross_the_border_of_two_shards(tmp_path):
    tokens = np.arange(100)
    for name, part in (('a.bin', tokens[:37]), ('b.bin', tokens[37:])):
        write_shard(tmp_path / name, part)
    read = Tokens([tmp_path / 'a.bin', tmp_path / 'b.bin'], 257)
    assert len(read) == 100 and read.read(30, 20).tolist() == list(range(30, 50))


@given(seed=st.integers(0, 2**40), step=st.integers(0, 10**6), split=st.sampled_from([2, 3, 4, 6]))
@settings(max_examples=20, deadline=None)
def test_a_steps_windows_are_the_same_for_any_number_of_processes(seed, step, split, tmp_path_factory):
    path = tmp_path_factory.mktemp('w') / 'train.bin'
    (np.arange(500) % 257).astype('<u2').tofile(path)
    tokens = Tokens([path], 257)

    def windows(ddp_size):
        loaders = [TrainLoader(tokens, 7, 12, seed, rank, ddp_size, 5, 'cpu') for rank in range(ddp_size)]
        return [row for loader in loaders for x, y in loader.batches(step) for row in x.tolist() + y.tolist()]

    assert sorted(windows(1)) == sorted(windows(split))


@pytest.mark.parametrize('batch_size, ddp_size, eval_tokens', [(1, 1, 150), (3, 2, 150), (4, 3, 10_000), (16, 4, 1)])
def test_validation_reads_each_token_once(toy, batch_size, ddp_size, eval_tokens):
    folder, splits = toy
    val, seen = open_corpus('pystdlib', folder).val, []
    for rank in range(ddp_size):
        for x, y, n in val_batches(val, 8, batch_size, eval_tokens, rank, ddp_size, 'cpu'):
            assert x.shape == y.shape == (batch_size, 8) and (y != -1).sum() == n > 0
            seen += y[y != -1].tolist()
    expected = splits['val'][1:][:eval_tokens]
    assert sorted(seen) == sorted(expected.tolist())


def spoil_meta(**changes):
    def spoil(folder):
        meta = json.loads((folder / 'meta.json').read_text())
        (folder / 'meta.json').write_text(json.dumps(meta | changes))
    return spoil


def big_token(folder):
    tokens = np.fromfile(folder / 'val.bin', '<u2')
    tokens[5] = 60_000
    tokens.tofile(folder / 'val.bin')


@pytest.mark.parametrize('spoil', [
    lambda folder: (folder / 'val.bin').unlink(),
    lambda folder: (folder / 'meta.json').unlink(),
    lambda folder: (folder / 'meta.json').write_text('{"dataset": '),
    lambda folder: (folder / 'train.bin').write_bytes((folder / 'train.bin').read_bytes()[:-2]),
    lambda folder: (folder / 'train.bin').write_bytes((folder / 'train.bin').read_bytes()[:-1]),
    lambda folder: write_shard(folder / 'train.bin', np.arange(3)),
    big_token,
    spoil_meta(dtype='int32'),
    spoil_meta(vocab_size=50257),
    spoil_meta(splits={}),
])
def test_wrong_files_are_refused_in_a_line_that_names_the_command(toy, spoil):
    folder, _ = toy
    spoil(folder / 'pystdlib')
    with pytest.raises(ValueError, match='python data/pystdlib/prepare.py') as refused:
        open_corpus('pystdlib', folder)
    assert '\n' not in str(refused.value)


def test_a_corpus_shorter_than_a_window_is_refused(toy):
    folder, _ = toy
    with pytest.raises(ValueError, match='1000 tokens'):
        TrainLoader(open_corpus('pystdlib', folder).train, 1000, 4, 1, 0, 1, 2, 'cpu')


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
        write_shard(shards / name, tokens)
    done = prepare(ROOT / 'data/fineweb/prepare.py', '--input', shards, '--shards', 2, '--out', out)
    assert done.returncode == 0, done.stderr
    train = open_corpus('fineweb', tmp_path).train
    both = np.concatenate([parts[f'fineweb_train_00000{i}.bin'] for i in (1, 2)])
    assert train.read(290, 20).tolist() == both[290:310].tolist()
    shutil.rmtree(out)
    (shards / 'fineweb_train_000002.bin').write_bytes(b'not tokens')
    refused = prepare(ROOT / 'data/fineweb/prepare.py', '--input', shards, '--shards', 2, '--out', out)
    assert refused.returncode == 1 and len(refused.stderr.splitlines()) == 1, refused.stderr
