"""
The pre-flight: do the experiment's configs load, have the size they should, and run?

    python test_20k_experiment.py  # the experiment's eight configs, at full size, in about a minute
    python test_20k_experiment.py --all  # every run config, larger models and rivals too: minutes
    python -m pytest test_20k_experiment.py

It needs no data, tokenizer, network or GPU. The exit status is 0 if every check passes.
"""

import math
import sys
from collections import Counter
from functools import cache

import torch

from configurator import (
    GUIDE_UNITS,
    ROOT,
    RUNS,
    begin_program,
    communications,
    fail,
    load,
    mean_over_steps,
    pattern,
    stages,
)
from model import GPT, GPTConfig, count_all_reduces
from train import with_blocks
from variants import gpt_config

EIGHT = ['config/train_gpt2.py', *RUNS]
BLOCKS = {path: unit * (12 // len(unit)) for path, unit in zip(RUNS, GUIDE_UNITS, strict=True)}
SIZES = {'124M': 125e6, '350M': 355e6, '774M': 774e6}  # parameters: the guide's, GPT-2 medium's, large's
VOCAB_SIZE = GPTConfig.vocab_size
MAY_DIFFER = {'out_dir', 'wandb_run_name', 'block_types'}


@cache
def observe(path):
    """
    (config, parameters, loss at init in nats per token, AllReduces) of a pass over two random windows; the
    last two as lists, for each of stages().
    """
    config = load([str(ROOT / path)])
    torch.manual_seed(config.seed)
    model = GPT(gpt_config(vars(config), VOCAB_SIZE))
    tokens = torch.randint(VOCAB_SIZE, (2, 33), generator=torch.Generator().manual_seed(0))
    losses, observed = [], []
    for _, block_types in stages(vars(config)):
        model = with_blocks(model, block_types)
        with count_all_reduces() as found:
            loss = model(tokens[:, :-1], tokens[:, 1:])[1]
            loss.backward()
        losses.append(loss.item())
        observed.append(found)
    return config, model.num_params(), losses, observed


def mean_communications(config):
    """By the guide's count, over the steps of a run."""
    counts = [communications(block_types, config.tp_size) for _, block_types in stages(vars(config))]
    return f'{mean_over_steps(counts, vars(config)):g}'


def check_loads(path):
    """
    The config loads, logs to the guide's project, has the guide's blocks, and is named after its
    communications if no rival.
    """
    config, *_ = observe(path)
    count = mean_communications(config)
    named = config.wandb_run_name.split('-')[2:3]  # gpt2-124M-12comm-and-more
    assert 'rivals/' in path or named == [f'{count}comm'] * (count != '0'), \
        f'{count} communications, but {config.wandb_run_name}'
    assert config.wandb_log and config.wandb_project == 'owt'
    assert config.block_types == BLOCKS.get(path, config.block_types), \
        f'{pattern(config.block_types)}, the guide has {pattern(BLOCKS[path])}'


def parameters_of_gpt2(n_layer, n_embd, block_size=1024):
    """Dense GPT-2's, without biases: embeddings, 12 n_embd^2 in a layer's matrices, the LayerNorms."""
    return (VOCAB_SIZE + block_size + 1) * n_embd + n_layer * (12 * n_embd**2 + 2 * n_embd)


def check_size(path):
    """About 125M parameters, or the size in the name, within 1%, whatever the blocks."""
    config, parameters, _, _ = observe(path)
    size = config.wandb_run_name.split('-')[1]
    assert abs(parameters / SIZES[size] - 1) < 0.01, f'{parameters:,} parameters, its name says {size}'
    dense = parameters_of_gpt2(config.n_layer, config.n_embd)
    assert parameters == dense, f'{parameters:,} parameters, dense GPT-2 has {dense:,}'


def check_runs(path):
    """A pass works: untrained, its loss is about ln(vocab), with as many all-reduces backward as forward."""
    config, _, losses, observed = observe(path)
    for (_, block_types), loss, found in zip(stages(vars(config)), losses, observed, strict=True):
        assert abs(loss - math.log(VOCAB_SIZE)) < 0.3, f'loss {loss:.3f} at init'
        backward = found.backward - ('fal' in block_types)  # what its MLPs read besides has one more
        assert found.forward == backward, f'{found.forward} forward, {found.backward} back'


CHECKS = {'All configs load correctly': check_loads, 'Models have {} parameters (within 1%)': check_size,
          'Forward pass works for each configuration': check_runs}


def pytest_generate_tests(metafunc):
    """pytest's parameters, without its import: this script runs where pytest is not installed."""
    metafunc.parametrize('path', EIGHT)
    if 'check' in metafunc.fixturenames:
        metafunc.parametrize('check', CHECKS.values(), ids=lambda check: check.__name__)


def test_guide(check, path):
    check(path)


def test_runs_differ_only_in_blocks(path):
    ours, baseline = (vars(load([str(ROOT / name)])) for name in (path, 'config/train_gpt2_24comm.py'))
    differing = {key for key in ours if ours[key] != baseline[key]}
    dense_control = path == EIGHT[0]
    assert differing <= (MAY_DIFFER | {'tp_size'} if dense_control else MAY_DIFFER)
    assert dense_control == (ours['tp_size'] == 1)


def failure(check, path):
    """The check's message if it fails, else None."""
    try:
        check(path)
    except (AssertionError, SystemExit, ValueError) as error:
        return f'{path}: {error}'


def main(argv):
    runs = EIGHT
    if argv in (['--help'], ['-h']):
        return print(__doc__)
    if argv == ['--all']:
        every = {str(path.relative_to(ROOT)) for path in ROOT.glob('config/**/train_*.py')}
        runs = EIGHT + sorted(every - set(EIGHT))
    elif argv:
        fail(f'{" ".join(argv)}: the pre-flight takes --all or nothing')
    names = Counter(next((size for size in SIZES if size in path), '124M') for path in runs)  # else gpt2
    sizes = ', '.join(f'~{SIZES[name] / 1e6:.0f}M' for name in names)
    print(f'{len(runs)} configs: {", ".join(f"{count} of {name}" for name, count in names.items())}')
    chance = f'{math.log(VOCAB_SIZE):.3f}'
    print(f'{"":5} {"config":43} {"block_types":44} {"comms":>5} {"all-reduces":>11} {"parameters":>12} '
          f'{"loss at init / ln(vocab)":>25}')
    for i, path in enumerate(runs, 1):
        print(f'{f"{i}/{len(runs)}":>5} {path:43}', end=' ', flush=True)  # the rest follows when it has run
        try:
            config, parameters, losses, observed = observe(path)
        except (SystemExit, ValueError) as error:
            print(error)
            continue
        kinds = 'dense control' if config.tp_size == 1 else ' then '.join(
            pattern(block_types) for _, block_types in stages(vars(config)))
        reduced = ' + '.join(f'{mean_over_steps([getattr(found, way) for found in observed], vars(config)):g}'
                             for way in ('forward', 'backward'))
        print(f'{kinds:44} {mean_communications(config):>5} {reduced:>11} '
              f'{parameters:12,} {f"{losses[0]:.3f} / {chance}":>25}', flush=True)
    print("\ncomms is the guide's count; all-reduces are those observed in a pass, forward + backward\n")
    failures = {words.format(sizes): [line for path in runs if (line := failure(check, path))]
                for words, check in CHECKS.items()}
    for words, lines in failures.items():
        print('FAIL' if lines else 'PASS', words, *lines, sep='\n     ' if lines else '  ')
    sys.exit(any(failures.values()))


if __name__ == '__main__':
    begin_program()
    main(sys.argv[1:])
