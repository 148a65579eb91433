"""
Sweeps whose runs are small scripts in place of train.py, and run folders as if something had trained in them.
"""

import json
import os
import shlex
import signal
import subprocess
import sys
import textwrap

import sweep
from speed.forecast import Forecast

TWELVE, EIGHT, DENSE = (str(sweep.ROOT / f'config/train_gpt2{name}.py') for name in ('_12comm', '_8comm', ''))
CPU = str(sweep.ROOT / 'config/cpu.py')

# before each stand-in: note() writes what train.py would
NOTE = """
import json, os, signal, sys, time
from pathlib import Path

def note(state, **line):
    line = line or dict(iter=config['max_iters'], val_loss=2.5, val_tokens=65536)
    with open(out_dir / 'metrics.jsonl', 'a') as metrics:
        print(json.dumps(line), file=metrics)
    info = dict(name=name, state=state, config=config, corpus={}, communications=0, all_reduces={},
                parameters=0, processes=1, iter=line['iter'], val_loss=line.get('val_loss'))
    (out_dir / 'run.json').write_text(json.dumps(info))

"""
# what a stand-in for the interpreter knows from its command line: [this, train.py, arguments of train.py ...]
FROM_ARGV = """
from configurator import load
config = vars(load(sys.argv[2:]))
name, out_dir = config['wandb_run_name'], Path(config['out_dir'])
resume = (out_dir / 'ckpt.pt').exists()
"""


def planned(out, *flags, files=(TWELVE,), withs=(CPU,), **how):
    return sweep.plan(list(files), list(withs), sweep.parse_grid(flags), out, **how)


def names(runs):
    return [run.name.removeprefix('gpt2-').removeprefix('124M-') for run in runs]


def stand_in(monkeypatch, script):
    """Let `script` be each run. It has the run's out_dir, name and config, `resume`, and note()."""
    def command(run, resume, share):
        known = f'name, resume, config = {run.name!r}, {resume}, {vars(run.config)!r}\n'
        return [sys.executable, '-c', NOTE + known + f'out_dir = Path({str(run.out_dir)!r})\n' + script]
    monkeypatch.setattr(sweep, 'command', command)


def new_sweep(runs, jobs=1):
    return sweep.Sweep(runs, [sweep.Share([], [])] * jobs, Forecast(jobs=jobs))


def swept(runs, jobs=1):
    going = new_sweep(runs, jobs)
    going.train()
    return going


def start(folder, argv, script='note("finished")', ignore=None, shell='', **settings):
    """
    Start `python sweep.py *argv`, in which `script` is each run, as in stand_in(). Returns the Popen.

    ignore: a signal that it finds ignored. shell: bash's words after the command; its exit status is the
    sweep's. settings: Popen's.
    """
    interpreter = folder / 'interpreter'
    interpreter.write_text(f'#!{sys.executable}\n{NOTE}{FROM_ARGV}{script}\n')
    interpreter.chmod(0o755)
    program = textwrap.dedent(f"""
        import runpy, sys
        sys.argv, sys.executable = {['sweep.py', *argv]!r}, {str(interpreter)!r}
        runpy.run_path({str(sweep.ROOT / 'sweep.py')!r}, run_name='__main__')
    """)

    def signals():
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a background job starts with it ignored
        if ignore:
            signal.signal(ignore, signal.SIG_IGN)
    command = [sys.executable, '-c', program]
    if shell:
        command = ['bash', '-c', f'set -o pipefail; {shlex.join(command)} {shell}']
    return subprocess.Popen(command, preexec_fn=signals, cwd=sweep.ROOT,
                            env=os.environ | dict(PYTHONPATH=str(sweep.ROOT)), **settings)


def write_metrics(run, *lines):
    run.out_dir.mkdir(parents=True, exist_ok=True)
    (run.out_dir / 'metrics.jsonl').write_text('\n'.join(map(json.dumps, lines)) + '\n')


def write_info(run, state, iter, processes=1, val_loss=None):
    run.out_dir.mkdir(parents=True, exist_ok=True)
    info = dict(name=run.name, state=state, config=vars(run.config), corpus={}, communications=0,
                all_reduces={}, parameters=0, processes=processes, iter=iter, val_loss=val_loss)
    (run.out_dir / 'run.json').write_text(json.dumps(info))


def make_steps(run, steps, tokens_per_sec, processes=1):
    """Let a run's folder show this many steps at this speed, after a slow first line."""
    write_metrics(run, dict(iter=0, val_loss=5, val_tokens=3072), *(
        dict(iter=step, train_loss=3, tokens_per_sec=tokens_per_sec if step > 1 else 1)
        for step in range(1, steps + 1)))
    write_info(run, 'running', steps, processes)
