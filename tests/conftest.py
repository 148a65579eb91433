"""
What every test starts from: the root importable, one thread, fixed seeds, no network, no torchrun, no W&B.
"""

import fcntl
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

# before transformers is imported: its models are built from a config, never fetched
os.environ.setdefault('HF_HUB_OFFLINE', '1')
os.environ.setdefault('TRANSFORMERS_OFFLINE', '1')
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import pytest
import torch

import configurator
import model
from configurator import ROOT
from data.corpus import open_corpus
from toy_runs import DROPOUT, TINY, Crash, crash, info, metrics, run, stop_at

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def fixed_seeds():
    random.seed(1337)
    np.random.seed(1337)
    torch.manual_seed(1337)


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    """No torchrun around this process, and no mode for W&B, except in tests that set them."""
    for name in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'MASTER_ADDR', 'MASTER_PORT', 'WANDB_MODE'):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def own_blocks(monkeypatch):
    """A test may register block types of its own; they are forgotten afterwards."""
    monkeypatch.setattr(model, 'BLOCKS', dict(model.BLOCKS))
    monkeypatch.setattr(configurator, 'COMMUNICATIONS', dict(configurator.COMMUNICATIONS))


@pytest.fixture
def gptj(own_blocks):
    """GPT-J's layer, in which attention and the MLP share one LayerNorm; ln_2 is not used."""
    class GPTJBlock(model.Block, name='gptj'):
        def forward(self, s):
            h = self.ln_1(s.u)
            return s.sync(self.attn(h), self.mlp(h))
    configurator.COMMUNICATIONS['gptj'] = 1


@pytest.fixture(scope='session')
def corpus():
    """The corpus pystdlib, prepared by one worker of pytest-xdist while the others wait."""
    folder = ROOT / 'data/pystdlib'
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        subprocess.run([sys.executable, folder / 'prepare.py'], check=True, stdout=subprocess.DEVNULL)
    finally:
        os.close(lock)
    return open_corpus('pystdlib')


@pytest.fixture(scope='session')
def undisturbed(corpus, tmp_path_factory):
    """The folder of a finished run. Tests only read it."""
    out_dir = tmp_path_factory.mktemp('undisturbed') / 'run'
    assert run(out_dir, *DROPOUT) == 0
    return out_dir


@pytest.fixture(scope='session')
def dense(corpus, tmp_path_factory):
    """A checkpoint of a dense net. Tests only read it."""
    out_dir = tmp_path_factory.mktemp('dense') / 'run'
    assert run(out_dir, *TINY, '--tp_size=1', '--block_types=tp', '--max_iters=5') == 0
    return out_dir / 'ckpt.pt'


@pytest.fixture(scope='session')
def crashed(corpus, tmp_path_factory):
    """The folder of the same run, dead at step 26: checkpoints of steps 20 and 10, lines up to step 26."""
    out_dir = tmp_path_factory.mktemp('crashed') / 'run'
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Crash):
        stop_at(patch, 26, crash)
        run(out_dir, *DROPOUT)
    assert info(out_dir)['state'] == 'failed' and metrics(out_dir)[-1]['iter'] == 26
    return out_dir


@pytest.fixture
def copy_of_crashed(crashed, tmp_path):
    return shutil.copytree(crashed, tmp_path / 'copy')


@pytest.fixture
def no_plots(monkeypatch):
    """compare.py draws nothing, which takes it most of its time."""
    monkeypatch.setattr('analysis.plots.PLOTS', {})
