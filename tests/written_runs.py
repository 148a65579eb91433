"""
Run folders as train.py leaves them, written here without training, and read back.
"""

import csv
import json

import pytest

import compare
from analysis import findings, runs
from configurator import COMMUNICATIONS, communications
from training.rundir import find_runs

TP, SPD, PARALLEL = ['tp'] * 4, ['spd'] * 4, ['parallel'] * 4  # 8, 4 and 2 communications
DENSE = {1: 2.0, 2: 2.1, 3: 2.2}
LINES = [dict(iter=0, val_loss=5.5), dict(iter=10, train_loss=4.0, tokens_per_sec=10.0),
         dict(iter=20, train_loss=3.0, tokens_per_sec=30.0)]
# the diagnostics of two layers
INSIDE = dict(dispersion=[0.0, 0.1, 0.0, 0.3, 0.0], cka=[1.0, 0.8, 1.0, 0.6, 1.0],
              rank_one=[4.0, 4.0, 4.0, 8.0, 4.0], rank_all=[4.0, 6.0, 4.0, 16.0, 4.0],
              lens_synced=[5.0, 4.0, None, None, 2.0], lens_alone=[5.0, 6.0, None, None, 2.5],
              grad=[3.0, 4.0, 0.6, 0.8, 9.0], grad_ln=[0.1] * 5, attention_over_embedding=0.7)


def write_run(root, name, losses, block_types=TP, tp_size=4, state='finished', corpus=(), info=(),
              lines=LINES, last=(), **keys):
    """
    Run folders root/name-seedN, one for each seed of {seed: final validation loss}.

    corpus, info: what run.json has there besides, or instead. lines: of metrics.jsonl before the last
    evaluation. last: what that has besides the loss. keys: of the config.
    """
    for seed, loss in losses.items():
        folder = root / f'{name}-seed{seed}'
        folder.mkdir(parents=True)
        config = dict(out_dir=str(folder), seed=seed, block_types=block_types, tp_size=tp_size,
                      dataset='pystdlib', max_iters=20, device='cpu', n_embd=64, warmup_iters=0) | keys
        types = [name.removeprefix('mean_') for name in config['block_types']]
        types = [name if name in COMMUNICATIONS else 'spd' for name in types]
        counted = communications(types, tp_size)
        reduced = 0 if tp_size == 1 else observed(types)
        run = dict(name=folder.name, state=state, config=config, parameters=620_032, iter=config['max_iters'],
                   val_loss=loss, communications=counted, all_reduces=dict(forward=reduced, backward=reduced),
                   corpus=dict(name='pystdlib', corpus='Some text', tokenizer='byte', vocab_size=257,
                               val_sha256='ab') | dict(corpus)) | dict(info)
        (folder / 'run.json').write_text(json.dumps(run))
        written = lines + [dict(iter=config['max_iters'], val_loss=loss) | dict(last)] * (state == 'finished')
        (folder / 'metrics.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in written))


def observed(types):
    """The all-reduces of a pass: those of the layers, and one at the end if the streams are apart there."""
    return sum(COMMUNICATIONS[name] for name in types) + (types[-1] == 'parallel')


def shifted(*shifts):
    """The dense control's losses plus these, seed by seed."""
    return {seed: loss + shift for (seed, loss), shift in zip(DENSE.items(), shifts)}


def read_all(root):
    return [runs.read_run(folder) for folder in find_runs([root])[0]]


def rows_under(root, level=None, predict=None, **options):
    """The rows of the finished runs under root, judged. options: of find_all"""
    return found_under(root, level, predict, **options).rows


def found_under(root, level=None, predict=None, tuned=None, **options):
    """The Findings of the finished runs under root."""
    every = read_all(root)
    finished = [run for run in every if not run.trouble]
    diverged = [run for run in every if run.diverged]
    return findings.find_all(runs.group(finished, level, predict, tuned, diverged), tuned=tuned, **options)


def table(root):
    """{communications: row} of the finished runs under root."""
    return {row.communications: row for row in rows_under(root)}


def compare_all(root, *flags):
    """compare.py on the runs under root. Returns the folder of its outputs."""
    compare.main([str(root), f'--out={root / "compare"}', *flags])
    return root / 'compare'


def csv_lines(folder):
    with open(folder / 'table.csv') as file:
        return list(csv.DictReader(file))


def refused(*argv):
    """The one line with which compare.py ends."""
    with pytest.raises(SystemExit) as end:
        compare.main([str(arg) for arg in argv])
    message = end.value.code
    assert isinstance(message, str) and message.startswith('error: ') and len(message.splitlines()) == 1
    return message


def by_count(run):
    """A predicted step time that rises with the communications."""
    return run.info['communications'] / 1000


def logged(losses, norms=None):
    """Log lines every 10 steps with these training losses."""
    return [dict(iter=10 * (i + 1), train_loss=loss, grad_norm=norms[i] if norms else 1.0, skipped=0)
            for i, loss in enumerate(losses)]
