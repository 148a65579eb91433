"""
Checkpoints are whole at every moment, are refused in one line if they are damaged, and are never executed.

    python -m pytest tests/test_checkpoint.py
"""

import copy
import math
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import train
from configurator import ROOT, load
from data.corpus import open_corpus
from model import GPT
from toy_runs import ALONE, DROPOUT, run
from training import checkpoint
from training.logger import Log
from training.rundir import has_checkpoint, read_info, read_metrics, write_json
from variants import gpt_config

steady = settings(deadline=None, derandomize=True, database=None, max_examples=60,
                  suppress_health_check=[HealthCheck.function_scoped_fixture])


def state(step):
    weights = {'weight': torch.full((99,), float(step))}
    return dict.fromkeys(checkpoint.KEYS, {}) | dict(model=weights, iter=step)


def steps(folder, pattern='ckpt*.pt'):
    """{name: step} of a folder's checkpoints, each of which must load."""
    return {path.name: checkpoint.load(path)['iter'] for path in folder.glob(pattern)}


def damage(path):
    """Replace the file; its other hard links stay whole."""
    path.unlink()
    path.write_bytes(b'damaged')


class Killed(BaseException):
    """Stands in for the end of the process."""


def killed_at(monkeypatch, moment):
    """Let the first `moment` of the calls that change a folder happen, and none after them."""
    calls = []

    def counted(real):
        def call(*args):
            calls.append(args)
            if len(calls) > moment:
                raise Killed
            return real(*args)
        return call

    for name in 'replace', 'link', 'fsync', 'unlink':
        monkeypatch.setattr(os, name, counted(getattr(os, name)))


@pytest.mark.parametrize('best', [False, True])
@pytest.mark.parametrize('damaged', [False, True])
def test_a_kill_at_any_moment_of_a_save_leaves_the_old_or_the_new(tmp_path, monkeypatch, best, damaged):
    moment, interrupted = 0, True
    while interrupted:
        folder = tmp_path / str(moment)
        folder.mkdir()
        for step in 10, 20:
            checkpoint.save(folder, state(step), True, 1)
        if damaged:  # the run went on from step 10
            damage(folder / 'ckpt.pt')
        with monkeypatch.context() as patch:
            killed_at(patch, moment)
            try:
                checkpoint.save(folder, state(30), best, 1)
                interrupted = False
            except Killed:
                pass
        said = []
        path, saved = checkpoint.load_latest(folder, said.append)
        assert saved['iter'] in ((10, 30) if damaged else (20, 30)) and has_checkpoint(folder)
        assert len(said) <= damaged and steps(folder, 'ckpt-best.pt')['ckpt-best.pt'] in (20, 30)
        # who goes on from step 30 will not evaluate it again
        assert saved['iter'] < 30 or not best or steps(folder, 'ckpt-best.pt') == {'ckpt-best.pt': 30}
        checkpoint.save(folder, state(40), False, 1)
        assert steps(folder, 'ckpt.pt') == {'ckpt.pt': 40}
        moment += 1
    assert moment > 4


def test_the_first_checkpoint_counts_once_it_has_its_name(tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killed_at(patch, 2)  # after the flush and the naming of ckpt-new.pt
        checkpoint.save(tmp_path, state(0), False, 0)
    assert steps(tmp_path) == {'ckpt-new.pt': 0} and not has_checkpoint(tmp_path)


def test_keep_is_how_many_stay_besides_the_latest(tmp_path):
    for step in range(0, 60, 10):
        checkpoint.save(tmp_path, state(step), step == 20, 2)
    assert steps(tmp_path) == {
        'ckpt.pt': 50, 'ckpt-previous.pt': 40, 'ckpt-best.pt': 20,
        'ckpt-00000050.pt': 50, 'ckpt-00000040.pt': 40, 'ckpt-00000030.pt': 30}
    checkpoint.save(tmp_path, state(60), False, 0)
    assert {'ckpt-00000050.pt', 'ckpt-00000030.pt'} <= steps(tmp_path).keys()
    for name in 'ckpt.pt', 'ckpt-previous.pt':
        damage(tmp_path / name)
    said = []
    assert checkpoint.load_latest(tmp_path, said.append)[1]['iter'] == 50 and len(said) == 2


# damage


@pytest.fixture(scope='module')
def finished(corpus, tmp_path_factory):
    out_dir = tmp_path_factory.mktemp('finished') / 'run'
    assert run(out_dir, *DROPOUT, '--max_iters=3') == 0
    return out_dir


@pytest.fixture(scope='module')
def resume(corpus):
    """
    resume(out_dir, *flags) -> (net, its Progress, the messages), as train.py resumes the folder's run.

    Raises ValueError if it is refused.
    """
    def make(*flags):
        config = load([*DROPOUT, '--max_iters=3', *flags])
        return train.Network(GPT(gpt_config(vars(config), 320)), config), config

    plain = make()  # resuming replaces all of its state

    def call(out_dir, *flags):
        net, config = make(*flags) if flags else plain
        config.out_dir = out_dir
        state, _, messages = checkpoint.fresh_or_resumed(net, True, config, corpus, ALONE)
        return net, state, messages
    return call


def state_of(net, state, _):
    return copy.deepcopy((net.raw_model.state_dict(), net.optimizer.state_dict(), asdict(state)))


@st.composite
def damages(draw):
    """A change of a few bytes, for a file of any length: cut, overwritten, taken out or put in."""
    at, length = draw(st.floats(0, 1)), draw(st.integers(0, 40))
    new, cut = draw(st.binary(max_size=8)), draw(st.booleans())

    def damage(data):
        begin = int(at * len(data))
        return data[:begin] + new + (b'' if cut else data[begin + length:])
    return damage


@steady
@given(damage=damages())
def test_a_fuzzed_checkpoint_is_refused_or_is_what_it_was(finished, resume, tmp_path, damage):
    whole = state_of(*resume(finished))
    (tmp_path / 'ckpt.pt').write_bytes(damage((finished / 'ckpt.pt').read_bytes()))
    try:
        torch.testing.assert_close(state_of(*resume(tmp_path)), whole, rtol=0, atol=0)
    except ValueError as refusal:
        assert str(tmp_path) in str(refusal)


THINGS = st.sampled_from([
    None, True, -1, 2**70, 1.5, math.nan, 'text', [], {}, {'step': 1}, torch.zeros(0), torch.zeros(3),
    torch.zeros(3, 4, dtype=torch.complex64)])


@steady
@given(data=st.data())
def test_a_checkpoint_with_anything_anywhere_is_refused_or_resumed(finished, resume, tmp_path, data):
    saved = checkpoint.load(finished / 'ckpt.pt')
    place, key = {'saved': saved}, 'saved'
    for _ in range(data.draw(st.integers(1, 5))):
        if not isinstance(place[key], (dict, list)) or not place[key]:
            break
        place = place[key]
        keys = sorted(place, key=str) if isinstance(place, dict) else range(len(place))
        key = data.draw(st.sampled_from(keys))
    place[key] = data.draw(THINGS)
    torch.save(saved, tmp_path / 'ckpt.pt')
    try:
        net, *_ = resume(tmp_path)
    except ValueError:
        return
    x, config = torch.zeros(2, 8, dtype=torch.long), load(DROPOUT)
    assert isinstance(train.train_step(net, [(x, x)], 1e-3, config, ALONE).read()[0], float)


def test_a_resumed_run_has_its_own_weight_decay_and_says_so(finished, resume):
    net, _, messages = resume(finished, '--weight_decay=0.5', '--beta1=0.8')
    assert [group['weight_decay'] for group in net.optimizer.param_groups] == [0.5, 0.0]
    assert {group['betas'] for group in net.optimizer.param_groups} == {(0.8, 0.95)}
    assert [line for line in messages if 'was' in line] == [
        'warning: beta1 was 0.9 up to step 3, it is 0.8 from here on',
        'warning: weight_decay was 0.1 up to step 3, it is 0.5 from here on']


def test_a_run_goes_on_in_float16_with_a_new_loss_scale(finished, resume):
    net, _, messages = resume(finished, '--dtype=float16')
    assert net.scaler.get_scale() == 2**16 and 'warning: dtype was float32 up to step 3' in ''.join(messages)


def test_a_run_that_goes_on_on_other_data_says_so(finished, resume, tmp_path):
    saved = checkpoint.load(finished / 'ckpt.pt')
    saved['corpus']['splits']['val']['sha256'] = 'abc'
    torch.save(saved, tmp_path / 'ckpt.pt')
    assert any(line.startswith('warning: val_sha256 was abc up to step 3') for line in resume(tmp_path)[2])


@steady
@given(damage=damages(), torn=st.booleans())
def test_fuzzed_metrics_are_read_or_refused_in_one_line(finished, tmp_path, damage, torn):
    path = tmp_path / 'metrics.jsonl'
    data = damage((finished / 'metrics.jsonl').read_bytes())
    path.write_bytes(data + b'{"iter": 9, "val_lo' * torn)
    try:
        evals, logs = read_metrics(tmp_path)
    except SystemExit as stopped:
        assert stopped.code.startswith('error: ') and len(stopped.code.splitlines()) == 1
    else:
        assert len(evals) + len(logs) <= data.count(b'\n') + 1


@steady
@given(damage=damages())
def test_metrics_that_somebody_changed_go_on_after_a_whole_line(finished, tmp_path, damage):
    path, config = tmp_path / 'metrics.jsonl', SimpleNamespace(out_dir=tmp_path, max_iters=3, wandb_log=False)
    was = (finished / 'metrics.jsonl').read_bytes()
    path.write_bytes(damage(was))
    log = Log(config, ALONE, {}, checkpoint.Progress(iter=3, metrics_bytes=len(was)))
    log.write(iter=4, diagnostics=dict(a=[0.5, math.nan], b=math.nan), val_loss=math.inf)
    log.close(0)
    before, _, last = path.read_bytes().rpartition(b'{"iter": 4,')
    assert last == b' "diagnostics": {"a": [0.5, null], "b": null}, "val_loss": null}\n'
    assert damage(was)[:len(was)].startswith(before) and (before == b'' or before.endswith(b'\n'))


# nothing that is read is run


class Code:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize('place', [
    (), ('model', 'transformer.wte.weight'), ('optimizer',), ('config', 'seed')])
def test_code_in_a_checkpoint_is_refused_and_does_not_run(finished, resume, tmp_path, place):
    saved = inside = {'': checkpoint.load(finished / 'ckpt.pt')}
    for key in ('', *place)[:-1]:
        inside = inside[key]
    inside[('', *place)[-1]] = Code(tmp_path / 'ran')
    torch.save(saved[''], tmp_path / 'ckpt.pt')
    with pytest.raises(ValueError, match='ckpt.pt is damaged: UnpicklingError'):
        checkpoint.load(tmp_path / 'ckpt.pt')
    with pytest.raises(ValueError, match='no checkpoint that can be read'):
        resume(tmp_path)
    assert not (tmp_path / 'ran').exists()


def test_code_in_a_json_file_is_text(finished, tmp_path):
    code = f'__import__("os").mkdir({str(tmp_path / "ran")!r})'

    def everywhere(value):
        if isinstance(value, dict):
            return {key: everywhere(item) for key, item in value.items()}
        return [everywhere(item) for item in value] if isinstance(value, list) else code

    folder = Path(shutil.copytree(finished, tmp_path / 'copy'))
    info = read_info(folder)
    write_json(folder / 'run.json', info | dict(config=everywhere(info['config']), name=code))
    assert 'holds another run' in run(folder, *DROPOUT, '--max_iters=3')
    data = tmp_path / 'data/pystdlib'
    shutil.copytree(ROOT / 'data/pystdlib', data)
    meta = open_corpus('pystdlib').meta
    for key in meta:
        write_json(data / 'meta.json', meta | {key: everywhere(meta[key])})
        try:
            open_corpus('pystdlib', tmp_path / 'data')
        except ValueError:
            pass
    for flag in f'--learning_rate={code}', f'--block_types={code}':
        assert isinstance(run(tmp_path / 'out', *DROPOUT, flag), str)
    assert not (tmp_path / 'ran').exists()
