"""
configurator.py: what a run's config consists of, and the one line that reports a mistake in it.

    python -m pytest tests/test_configurator.py
"""

import json
import math
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from configurator import (
    COMMUNICATIONS,
    DEFAULTS,
    HOUSEKEEPING,
    LIMITS,
    RENAMED,
    ROOT,
    VARIED,
    accepts,
    communications,
    complete,
    describe_changes,
    differences,
    fail,
    load,
    read_defaults,
    read_file,
    recipe,
)
from training.rundir import read_info

KEYS = read_defaults()
TWELVE, CPU = 'config/train_gpt2_12comm.py', 'config/cpu.py'


@pytest.fixture(autouse=True)
def in_the_project(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv('RANK', raising=False)


def refusal(*argv):
    """The line with which load() ends the program; Python prints it on stderr and exits with status 1."""
    with pytest.raises(SystemExit) as stopped:
        load(list(argv))
    message = stopped.value.code
    assert isinstance(message, str) and len(message.splitlines()) == 1 and message.startswith('error: ')
    return message


@pytest.fixture
def write(tmp_path):
    def config_file(text, name='mine.py'):
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)
    return config_file


def test_defaults_then_files_in_order_then_flags(write):
    first = write('seed = 2; n_head = 4; dropout = 0.2', 'a.py')
    second = write('seed = 3; n_head = 6', 'b.py')
    config = load(['--seed=5', first, '--seed=4', second])
    assert (config.seed, config.n_head, config.dropout, config.n_embd) == (4, 6, 0.2, 768)
    assert [config.sources[key] for key in ('seed', 'n_head', 'dropout', 'n_embd')] == [
        '--seed=4', second, first, 'config/defaults.py']
    assert vars(config).keys() == KEYS.keys()


@pytest.mark.parametrize('argv, name', [
    ([], 'gpt2-124M'),
    ([CPU], 'gpt2-cpu'),
    ([TWELVE], 'gpt2-124M-12comm'),
    ([TWELVE, CPU, '--seed=2'], 'gpt2-12comm-cpu'),
    ([TWELVE, CPU, 'mine.py'], 'gpt2-12comm-cpu-mine'),
    (['mine.py', TWELVE], 'gpt2-124M-12comm'),
    ([TWELVE, CPU, '--wandb_run_name=other'], 'other'),
    # a full run's size stands only in the name of a run of that size
    ([TWELVE, '--n_embd=384'], 'gpt2-12comm'),
    (['config/train_350M.py', '--n_embd=768'], 'gpt2'),
    (['config/train_350M.py', '--n_embd=768', '--n_layer=12', '--n_head=12'], 'gpt2'),
    (['config/train_350M_24comm.py', '--batch_size=1'], 'gpt2-350M-24comm'),
    (['config/train_774M_14comm.py'], 'gpt2-774M-14comm'),
    ([TWELVE, CPU, '--wandb_run_name=gpt2-124M-as-typed'], 'gpt2-124M-as-typed'),
])
def test_name_and_folder_of_composed_files(write, tmp_path, argv, name):
    mine = write('n_layer = 12')
    argv = [mine if arg == 'mine.py' else arg for arg in argv]
    config = load(argv)
    assert (config.wandb_run_name, config.out_dir) == (name, f'out/{name}')
    elsewhere = load([*argv, '--out_dir=elsewhere'])
    assert (elsewhere.wandb_run_name, elsewhere.out_dir) == (name, 'elsewhere')


@pytest.mark.parametrize('flag, value', [
    ('learning_rate=1', 1.0),
    ('min_lr=-(-1e-4/2)', 5e-5),
    ('gradient_accumulation_steps=5*8', 40),
    ('max_iters=20_000', 20000),
    ('compile=False', False),
    ('backend=gloo', 'gloo'),
    ('backend=None', None),
    ('out_dir=a=b=c', 'a=b=c'),
    ('wandb_run_name=12', '12'),
    ('wandb_project=None', 'None'),
    ('dataset=5*8', '5*8'),
    ('block_types=tp,spd,parallel', ['tp', 'spd', 'parallel'] * 4),
    ('block_types=spd', ['spd'] * 12),
    ("block_types=['tp', 'spd']*5 + ['parallel']*2", ['tp', 'spd'] * 5 + ['parallel'] * 2),
    ('block_types=None', ['tp'] * 12),
])
def test_values_of_flags(flag, value):
    found = getattr(load([f'--{flag}']), flag.partition('=')[0])
    assert found == value and type(found) is type(value)


def test_a_file_may_compute_and_import(write):
    config = load([write('import math\n_n = 3\nn_layer = 2 * _n\nlearning_rate = 1\n'
                         'block_types = ("spd",) * n_layer')])
    assert config.n_layer == 6 and config.block_types == ['spd'] * 6
    assert type(config.learning_rate) is float


def test_schedule_ends_with_the_run_unless_set_otherwise():
    assert load(['--max_iters=20000']).lr_decay_iters == 20000
    assert load(['--max_iters=20000', '--lr_decay_iters=600']).lr_decay_iters == 600


def test_defaults_are_the_recipe():
    config = load([])
    assert config.batch_size * config.gradient_accumulation_steps * config.block_size == 491520
    assert (config.learning_rate, config.min_lr, config.warmup_iters) == (6e-4, 6e-5, 2000)


@pytest.mark.parametrize('argv, words', [
    (['--n_layers=6'], ['--n_layers=6', 'n_layers', 'n_layer?']),
    (['--zzz=6'], ['zzz', '--help']),
    (['--eval_iters=200'], ['eval_iters', 'eval_tokens']),
    (['--max_iters=1.5'], ['max_iters', '1.5', 'a whole number']),
    (['--n_layer=True'], ['n_layer', 'True', 'a whole number']),
    (['--n_layer=None'], ['n_layer', 'None', 'a whole number']),
    (['--dropout=a lot'], ['dropout', "'a lot'", 'a number']),
    (['--dropout=False'], ['dropout', 'False', 'a number']),
    (['--compile=yes'], ['compile', "'yes'", 'True or False']),
    (['--compile=1'], ['compile', '1', 'True or False']),
    (['--dtype=fp8'], ['dtype', "'fp8'", 'float32, bfloat16, float16']),
    (['--backend=mpi'], ['backend', "'mpi'", 'nccl, gloo', 'None']),
    (['--init_from=gtp2'], ['init_from', 'gtp2', 'scratch, resume', 'gpt2-xl', 'checkpoint file']),
    (['--block_types=5'], ['block_types', '5', 'a list']),
    (['--block_types=tp,spd', '--n_layer=7'], ['block_types', 'tp,spd', '2', '7', '--n_layer=7']),
    (['--batch_size=0'], ['batch_size', '0', 'at least 1']),
    (['--n_layer=10000000'], ['n_layer', '10000000']),
    (['--beta2=1'], ['beta2', '1', 'below 1']),
    (['--learning_rate=-1e-3'], ['learning_rate', '-0.001', 'above 0']),
    (['--learning_rate=1e999'], ['learning_rate', 'inf']),
    (['--distill=True'], ['distill', 'a teacher', 'scratch', 'name weights']),
    (['--distill_weight=1.1'], ['distill_weight', '1.1', 'from 0 to 1']),
    (['--recompute_layers=13'], ['recompute_layers', '13', 'n_layer, 12']),
    (['--train_layers=3,12'], ['train_layers', '[3, 12]', '0 to 11']),
    (['--train_layers=()'], ['train_layers', '[]', '0 to 11']),
    (['--train_layers=first'], ['train_layers', "'first'", 'a list']),
    (['--grad_clip=1e999'], ['grad_clip', 'inf']),
    (['--seed=99999999999999999999999'], ['seed', '99999999999999999999999']),
    (['--min_lr=0.1'], ['min_lr', '0.1', 'learning_rate', '0.0006', 'config/defaults.py']),
    (['--compile'], ['--compile', '--key=value']),
    (['-seed=2'], ['-seed=2', '--key=value']),
    (['seed=2'], ['seed=2', '--key=value']),
    (['config/train_gpt2_12com.py'], ['config/train_gpt2_12com.py', 'config/train_gpt2_12comm.py?']),
    (['--one\ntwo=3'], ['one two']),
    (['one\ntwo'], ['one two']),
])
def test_a_mistake_in_a_flag_gets_one_line(argv, words):
    message = refusal(*argv)
    assert all(word in message for word in [*words, argv[0].replace('\n', ' ')])


@pytest.mark.parametrize('text, words', [
    ('n_layr = 6', ['n_layr', 'n_layer?']),
    ('eval_iters = 200', ['eval_tokens']),
    ('n_layer = "six"', ['n_layer', "'six'", 'a whole number']),
    ('weight_decay = float("nan")', ['weight_decay', 'nan']),
    ('n_layer = = 6', ['SyntaxError']),
    ('n_layer = 6 / 0', ['ZeroDivisionError']),
    ('n_layer = 6\n\0', ['null bytes']),
    ('raise ValueError("one\\ntwo")', ['one two']),
])
def test_a_mistake_in_a_file_gets_one_line(write, text, words):
    path = write(text)
    message = refusal(CPU, path)
    assert all(word in message for word in [*words, path])


@pytest.mark.parametrize('argv, words', [
    (['--block_types=sdp'], ["'sdp'", 'layer 0', 'spd?', '--block_types=sdp']),
    (['--block_types=tp,Parallel'], ["'Parallel'", 'layer 1', 'parallel?']),
    (["--block_types=['tp', 'attn']*6"], ["'attn'", 'layer 1', 'attn_spd?']),
    (["--block_types=['tp', 5]*6"], ['5', 'layer 1', 'tp, spd, parallel']),
    (["--block_types=['tp', ['spd']]*6"], ["['spd']", 'layer 1']),
    (['--block_types='], ["''", 'layer 0']),
    (['mine.py'], ["'parralel'", 'layer 2', 'parallel?', 'mine.py']),
])
def test_an_unknown_block_type_gets_one_line_with_the_nearest_name(write, argv, words):
    mine = write("block_types = ['tp', 'spd', 'parralel'] * 4")
    message = refusal(*[mine if arg == 'mine.py' else arg for arg in argv])
    assert all(word in message for word in words)


def test_a_file_that_is_not_text_gets_one_line(tmp_path):
    (tmp_path / 'bytes.py').write_bytes(b'seed = 2 # \xff\xfe')
    assert 'bytes.py' in refusal(str(tmp_path / 'bytes.py'))
    (tmp_path / 'folder.py').mkdir()
    assert 'folder.py' in refusal(str(tmp_path / 'folder.py'))


def test_under_torchrun_rank_0_prints_at_once_and_the_others_after_it(monkeypatch, capsys):
    waited = []
    monkeypatch.setattr(time, 'sleep', waited.append)
    for process, seconds in ('0', []), ('1', [5]):
        monkeypatch.setenv('RANK', process)
        with pytest.raises(SystemExit) as stopped:
            fail('what is\nwrong')
        assert stopped.value.code == 'error: what is wrong' and waited == seconds
    assert capsys.readouterr() == ('', '')


def test_a_refusal_names_the_origin_of_the_keys_in_it():
    config = load([CPU, '--tp_size=5'])
    with pytest.raises(SystemExit) as stopped, config.refusing():
        raise ValueError('tp_size is 5, which does not\ndivide n_head, 8')
    assert stopped.value.code == ('error: tp_size is 5, which does not divide n_head, 8 '
                                  f'(n_head from {CPU}, tp_size from --tp_size=5)')
    with pytest.raises(KeyError), config.refusing():
        raise KeyError('tp_size')  # a bug, not a mistake in the config


# the keys


def test_help_lists_every_key_with_its_default_and_meaning(capsys):
    with pytest.raises(SystemExit) as stopped:
        load(['--n_layers=6', '--help'])
    assert not stopped.value.code
    lines = capsys.readouterr().out.splitlines()
    for key, (default, _, comment) in KEYS.items():
        assert comment
        assert len([line for line in lines if f'--{key}={default} ' in line and comment in line]) == 1


def test_keys_are_nanogpts_and_each_has_one_default():
    words = DEFAULTS.read_text().split()
    assert not [key for key in KEYS if words.count(f'{key}:') != 1]
    assert KEYS.keys() >= set(
        'out_dir eval_interval log_interval eval_only always_save_checkpoint init_from wandb_log '
        'wandb_project wandb_run_name dataset gradient_accumulation_steps batch_size block_size n_layer '
        'n_head n_embd dropout bias learning_rate max_iters weight_decay beta1 beta2 grad_clip decay_lr '
        'warmup_iters lr_decay_iters min_lr backend device dtype compile eval_tokens tp_size block_types '
        'seed'.split())


def test_tables_name_only_keys_that_exist():
    assert LIMITS.keys() | VARIED | HOUSEKEEPING <= KEYS.keys()
    assert not RENAMED.keys() & KEYS.keys()
    assert {hint.split(',')[0] for hint in RENAMED.values()} <= KEYS.keys()


def test_cpu_py_sets_nothing_that_runs_differ_in():
    assert not read_file(CPU).keys() & {*VARIED, 'n_layer', 'wandb_run_name', 'out_dir'}


# comparing configs


@pytest.mark.parametrize('block_types, count', [
    (['tp'] * 12, 24), (['spd'] * 12, 12), (['parallel'] * 12, 2), (['attn_spd', 'parallel'] * 6, 8),
    (['spd', 'parallel', 'parallel'] * 4, 6),
])
def test_communications_of_a_network(block_types, count):
    assert communications(block_types, 4) == count and communications(block_types, 1) == 0


def test_communications_of_an_unknown_type_are_not_guessed():
    with pytest.raises(KeyError):
        communications(['tp', 'new'], 2)


def test_differences_are_those_that_change_the_run():
    ours, theirs = (vars(load([CPU, *flags])) for flags in (
        ['--device=cuda', '--out_dir=here', '--n_embd=32'], ['--log_interval=3', '--merge=mean']))
    words = describe_changes(differences(theirs, ours))
    assert words == 'merge is mean there, sum here, n_embd is 64 there, 32 here'
    assert differences(ours, dict(ours, compile=True)) == {}
    step = dict(batch_size=ours['batch_size'] * 2, gradient_accumulation_steps=3)
    assert differences(ours, ours | step).keys() == step.keys()
    ours['gradient_accumulation_steps'] = 6  # the same windows in other micro-batches
    assert differences(ours, ours | step) == {}


def test_runs_share_a_recipe_whatever_blocks_ranks_and_micro_batches_they_have():
    base = recipe(vars(load([])))
    for flags in ['--block_types=spd', '--tp_size=4', '--seed=2', '--merge=mean', '--compile=False'], [
            '--batch_size=8', '--gradient_accumulation_steps=60']:
        assert recipe(vars(load(flags))) == base
    for flag in '--batch_size=8', '--max_iters=20000', '--n_embd=384', '--train_layers=3':
        assert recipe(vars(load([flag]))) != base


@pytest.mark.parametrize('file', sorted(ROOT.glob('config/rivals/*_mean.py')), ids=lambda file: file.stem)
def test_saved_configs_of_earlier_versions_are_those_of_today(file, tmp_path):
    today = vars(load([str(file), CPU]))
    saved = dict(today, block_types=[f'mean_{name}' for name in today['block_types']])
    for key in 'merge', 'log_diagnostics', 'checkpoint_interval':
        del saved[key]
    saved['log_drift'] = True
    info = dict(name='a', state='finished', corpus={}, all_reduces={}, parameters=1, communications=8,
                iter=9, val_loss=2.5, config=saved)
    (tmp_path / 'run.json').write_text(json.dumps(info))
    assert complete(saved) == read_info(tmp_path)['config'] == today
    assert complete(today) == today
    assert 'merge' not in saved  # it is left as it was
    plain = dict(saved, block_types=['spd', 'attn_spd'] * 6)
    assert complete(plain) == dict(today, block_types=plain['block_types'], merge='sum')


# any input

TEXTS = st.one_of(
    st.text(st.characters(codec='utf-8')),
    st.integers().map(str), st.floats().map(str),
    st.text('0123456789.-+*/_e()[], \'"tpsdNoneTrueFals', max_size=12),
    st.recursive(
        st.integers() | st.floats() | st.text(max_size=3) | st.none() | st.booleans(),
        lambda inner: st.lists(inner, max_size=3) | st.lists(inner, max_size=3).map(tuple)).map(repr))


@settings(max_examples=200, deadline=None, derandomize=True, database=None,
          suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(key=st.sampled_from(sorted(KEYS)), text=TEXTS)
@example('learning_rate', '1' + '0' * 400)
@example('learning_rate', '1' + '0' * 5000)
@example('block_types', "['tp'] * 99999999999999999999999")
@example('max_iters', '-' * 20000 + '1')
@example('max_iters', '(' * 300 + '1' + ')' * 300)
@example('dataset', '\ud800')
def test_any_text_gives_the_type_of_its_key_or_one_line(key, text):
    try:
        value = getattr(load([f'--{key}={text}']), key)
    except SystemExit as stopped:
        message = stopped.code
        assert message.startswith('error: ') and len(message.splitlines()) == 1
        assert key in message and len(message) < 1000 + 2 * len(text)
    else:
        kind = list if key == 'block_types' else str if key == 'out_dir' else KEYS[key][1]
        assert accepts(kind, value)
        assert type(value) is not float or math.isfinite(value)
        if isinstance(value, str) and key not in ('out_dir', 'wandb_run_name'):
            assert value == text or value == text.strip().strip('\'"')


LITERALS = st.recursive(
    st.integers() | st.floats() | st.booleans() | st.none() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3), max_leaves=4).map(repr)
KEY_LIKE = st.sampled_from(sorted(KEYS)) | st.text('_abnl', min_size=1, max_size=8)
CONFIG_TEXT = st.one_of(
    st.lists(st.builds('{} = {}'.format, KEY_LIKE, LITERALS), max_size=4).map('\n'.join).map(str.encode),
    st.text(max_size=40).map(lambda text: text.encode('utf-8', 'replace')), st.binary(max_size=40))
FLAGS = st.one_of(
    st.builds('--{}={}'.format, KEY_LIKE, TEXTS), st.builds('--{}={}'.format, KEY_LIKE, LITERALS),
    st.text(max_size=12))


@settings(max_examples=150, deadline=None, derandomize=True, database=None,
          suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(CONFIG_TEXT, max_size=2), flags=st.lists(FLAGS, max_size=3))
@example([b'raise SystemExit'], [])
@example([b'block_types = []'], ['--n_layer=1'])
@example([], ['--block_types=', '--n_layer=1'])
@example([b'block_types = ["tp"] * 3'], ['.py', '--=', '--'])
def test_any_files_and_flags_give_a_config_or_one_line(tmp_path, texts, flags):
    paths = [str(tmp_path / f'{i}.py') for i in range(len(texts))]
    for path, text in zip(paths, texts):
        Path(path).write_bytes(text)
    argv = [*paths, *(flag for flag in flags if flag not in ('-h', '--help'))]
    try:
        config = load(argv)
    except SystemExit as stopped:
        assert isinstance(stopped.code, str) and stopped.code.startswith('error: ')
        assert len(stopped.code.splitlines()) == 1
    else:
        assert vars(config).keys() == KEYS.keys()


def test_a_registry_entry_that_is_no_whole_number_is_refused(monkeypatch):
    monkeypatch.setitem(COMMUNICATIONS, 'half', 0.5)
    with pytest.raises(SystemExit, match=r'COMMUNICATIONS in configurator.py has 0.5 for half'):
        load(['--block_types=half'])
