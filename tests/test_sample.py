"""
Text from a trained run.

    python -m pytest tests/test_sample.py
"""

import os
import subprocess
import sys

import pytest
import torch

import sample
from configurator import ROOT
from training import checkpoint


def test_a_run_writes_on_from_a_start(undisturbed, tmp_path, capsys):
    (tmp_path / 'prompt.txt').write_text('def main(')
    texts = []
    for start, seed in ('def main(', 1), (f'FILE:{tmp_path}/prompt.txt', 1), ('def main(', 2):
        sample.main([f'--out_dir={undisturbed}', f'--start={start}', f'--seed={seed}', '--num_samples=2',
                     '--max_new_tokens=40', '--device=cpu'])
        texts.append(capsys.readouterr().out.split('\n---------------\n'))
    first, second, rest = texts[0]
    assert first.startswith('def main(') and second.startswith('def main(') and rest == ''
    assert len(first) > len('def main(') and first != second and texts[0] == texts[1] != texts[2]


def test_sharded_text_is_the_simulated_text_of_the_seed_and_one_process_prints_it(undisturbed, capsys):
    flags = [f'--out_dir={undisturbed}', '--prompt=def main(', '--prompt=import', '--num_samples=2',
             '--max_new_tokens=40', '--tp_size=2', '--device=cpu']
    sample.main(flags)
    simulated = capsys.readouterr().out
    torchrun = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2']
    done = subprocess.run([*torchrun, 'sample.py', *flags, '--shard=True'], cwd=ROOT, capture_output=True,
                          text=True, timeout=100, env=dict(os.environ, OMP_NUM_THREADS='1'))
    assert simulated.count('---------------\n') == 4 and done.stdout == simulated, done.stderr[-3000:]
    assert done.stderr.count('each recomputes its window') == 1


@pytest.mark.parametrize('flag, words', [
    ('--temperature=1e-45', '--temperature is 1e-45, it must be at least 0.001'),
    ('--tempreture=1', '--tempreture=1'), ('--tp_size=3', 'tp_size is 3, it must divide n_head, 8'),
    ('--shard=True', 'shard is True, which takes a multiple of tp_size, 2, processes, not 1'),
    ('--checkpoint=ckpt-first.pt', 'ckpt-first.pt: No such file'), ('--start=', '--start is empty')])
def test_a_mistake_in_a_flag_of_sample_gets_one_line(undisturbed, flag, words):
    with pytest.raises(SystemExit) as stopped:
        sample.main([f'--out_dir={undisturbed}', '--device=cpu', flag])
    message = stopped.value.code  # text: Python prints it on stderr and leaves with status 1
    assert message.startswith('error: ') and len(message.splitlines()) == 1 and words in message


@pytest.mark.parametrize('keys', [dict(block_types=None), dict(block_types=['dtp'] * 4, recompute_layers=4)])
def test_nothing_but_the_number_of_processes_keeps_a_net_from_being_sharded(undisturbed, tmp_path, keys):
    saved = checkpoint.load(undisturbed / 'ckpt.pt')
    saved['config'] |= keys  # None, as for a net of the hub
    torch.save(saved, tmp_path / 'ckpt.pt')
    with pytest.raises(SystemExit, match='shard is True, which takes a multiple of tp_size, 2, processes'):
        sample.main([f'--out_dir={tmp_path}', '--device=cpu', '--shard=True'])
