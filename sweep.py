"""
Trains several runs, one after another or a few at a time, always with the dense control they are compared to.

    python sweep.py --with config/cpu.py                                  # the experiment's eight configs
    python sweep.py config/train_gpt2_*comm.py --with config/cpu.py --seed=1,2,3 --tp_size=2,4 --jobs 2

Every --key=value goes on to train.py. A comma list makes a grid, each value with each of the other keys'
(block_types has commas of its own and takes one value). The dense control has no tp ranks, so --tp_size does
not apply to it: it is trained once for each combination of the other keys. A run's folder is named after the
run and the keys given to the sweep, but for those that do not change the training (--device and the like) and
have one value:

    out/gpt2-124M-12comm-cpu-seed2-tp4

The same command continues a sweep that was stopped: finished runs are skipped, unfinished ones go on from
their last checkpoint. Each run's output is in its folder's log.txt. Where there are GPUs, runs are started by
torchrun on all of them, or with --jobs on equal shares.
"""

import argparse
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import timedelta
from itertools import product
from pathlib import Path

from compare import find_runs, read_info, recipe
from configurator import HOUSEKEEPING, Config, differences, fail, load, pattern

ROOT = Path(__file__).resolve().parent
CONFIGS = [f'config/train_gpt2_{count}comm.py' for count in (24, 18, 16, 12, 8, 6, 2)]
OWN = {'out_dir', 'wandb_run_name', 'init_from'}        # a run's place, which the sweep settles
SHORT = {'seed': 'seed', 'tp_size': 'tp'}               # these go without '=' in a folder's name

# the plan


@dataclass
class Run:
    """One run of the plan: train.py's arguments, and the config that they amount to."""
    args: list
    config: Config

    @property
    def name(self):
        return self.config.wandb_run_name

    @property
    def out_dir(self):
        return Path(self.config.out_dir)


def parse_grid(flags):
    """--key=value[,value...] flags -> {key: values as typed}, seed first and tp_size last, as the runs go."""
    grid = {}
    for flag in flags:
        key, equals, text = flag.removeprefix('--').partition('=')
        if not flag.startswith('--') or not equals:
            fail(f'{flag}: a key for train.py is given as --key=value; see python sweep.py --help')
        if key in OWN:
            fail(f'{flag}: the sweep names its runs and their folders itself; --out says where they go')
        if key in grid:
            fail(f'{flag}: {key} is given twice; a list is --{key}={",".join(grid[key])},{text}')
        grid[key] = [text] if key == 'block_types' else text.split(',')
    if '1' in grid.get('tp_size', []):
        fail('--tp_size has 1, which is the dense control: it is always added and needs no mention')
    return {key: grid[key] for key in sorted(grid, key=lambda key: (key != 'seed', key == 'tp_size', key))}


def tag(key, value):
    """What a key given to the sweep adds to the name of a run."""
    text = pattern(value) if key == 'block_types' else str(value)
    return SHORT.get(key, f'{key}=') + re.sub(r'[^\w.+-]+', '_', text).strip('_')


def find_controls(files):
    """The dense controls of run configs: files with tp_size 1 and the same recipe, of these or of config/."""
    dense = {}
    for file in [*files, *(os.path.relpath(path) for path in sorted(ROOT.glob('config/train_*.py')))]:
        config = vars(load([file]))
        if config['tp_size'] == 1:
            dense.setdefault(json.dumps(recipe(config)), file)
    controls = [dense.get(json.dumps(recipe(vars(load([file]))))) for file in files]
    if None in controls:
        file = files[controls.index(None)]
        fail(f'{file}: no config has tp_size 1 and the same recipe, to be its dense control; name one')
    return list(dict.fromkeys(controls))


def plan(files, withs, grid, out):
    """
    The runs of a sweep, in order: all runs of a seed together, so that half a sweep is whole seeds.

    files: run configs, to which their dense controls are added; withs: config files composed after each;
    grid: as parse_grid gives it; out: the folder that gets the run folders.
    """
    controls = find_controls(files)
    runs = {}
    for values in product(*grid.values()):
        for file in dict.fromkeys(controls + files):
            given = dict(zip(grid, values))
            if file in controls:
                given = {key: value for key, value in given.items() if key not in ('tp_size', 'block_types')}
            args = [file, *withs, *(f'--{key}={value}' for key, value in given.items())]
            args += ['--tp_size=1'] * (file in controls)        # whatever a file composed after it says
            config = load(args)
            tags = [tag(key, getattr(config, key)) for key in sorted(given)
                    if key not in HOUSEKEEPING or len(grid[key]) > 1]
            name = '-'.join([config.wandb_run_name, *tags])
            args += [f'--wandb_run_name={name}', f'--out_dir={out / name}']
            twin = runs.setdefault(name, Run(args, load(args)))
            if twin.args != args:
                fail(f'{shlex.join(twin.args[:-2])} and {shlex.join(args[:-2])} would share {out / name}')
    return list(runs.values())


def standing(run):
    """How a run stands: finished, resume or new. Ends the program where its folder holds another run."""
    path = run.out_dir / 'run.json'
    if path.exists():
        info = read_info(path)
        changed = differences(info['config'], vars(run.config))
        if changed:
            told = ', '.join(f'{key} is {there} there, {here} here' for key, (there, here) in changed.items())
            fail(f'{run.out_dir} holds another run ({told}): move it away, or give this sweep another --out')
        if info['state'] == 'finished':
            return 'finished'
    saved = any((run.out_dir / name).exists() for name in ('ckpt.pt', 'ckpt-previous.pt'))
    return 'resume' if saved else 'new'


# the machine


def find_gpus():
    """The ids of the GPUs to be used, as CUDA_VISIBLE_DEVICES has them; none where there are none."""
    if 'CUDA_VISIBLE_DEVICES' in os.environ:
        return [gpu for gpu in os.environ['CUDA_VISIBLE_DEVICES'].split(',') if gpu.strip()]
    if not shutil.which('nvidia-smi'):
        return []
    listed = subprocess.run(['nvidia-smi', '-L'], capture_output=True, text=True).stdout
    return [str(i) for i in range(len(re.findall(r'^GPU ', listed, re.MULTILINE)))]


def shares(jobs, gpus):
    """What each job of so many at a time may use, as environment variables: its part of the GPUs or cores."""
    if gpus:
        if jobs > len(gpus):
            fail(f'--jobs={jobs}: there are {len(gpus)} GPUs, and a run needs one at least')
        each = len(gpus) // jobs
        return [{'CUDA_VISIBLE_DEVICES': ','.join(gpus[i * each:(i + 1) * each])} for i in range(jobs)]
    if jobs == 1:
        return [{}]
    return [{'OMP_NUM_THREADS': str(max(1, os.cpu_count() // jobs))}] * jobs


def command(run, resume, share, script=ROOT / 'train.py'):
    """The command line that trains a run with a script, train.py or the like, on a share of the machine."""
    launcher = [sys.executable]
    if 'CUDA_VISIBLE_DEVICES' in share:
        processes = len(share['CUDA_VISIBLE_DEVICES'].split(','))
        launcher += ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={processes}']
    return [*launcher, str(script), *run.args, *['--init_from=resume'] * resume]


# running


def last_line(path):
    """The last whole line of a file that has something on it; '' where there is none."""
    whole = path.read_text(errors='replace').rpartition('\n')[0] if path.exists() else ''
    return whole.rstrip().rpartition('\n')[2]


def latest(run):
    """The last line of a run's metrics, {} before there is one."""
    return json.loads(last_line(run.out_dir / 'metrics.jsonl') or '{}')


@dataclass
class Job:
    """A run that is being trained."""
    run: Run
    share: dict
    process: subprocess.Popen
    began: float


class Sweep:
    """The runs on their way: waiting (with whether each resumes), jobs now, and those that are over."""

    def __init__(self, runs, shares, script=ROOT / 'train.py'):
        self.script = script
        self.finished = [run for run in runs if standing(run) == 'finished']
        self.waiting = [run for run in runs if run not in self.finished]
        self.shares, self.jobs, self.failed = list(shares), [], []
        self.steps_at_start = self.steps_to_do()
        self.began, self.told = time.monotonic(), time.monotonic()

    def steps_to_do(self):
        todo = self.waiting + [job.run for job in self.jobs]
        return sum(run.config.max_iters - latest(run).get('iter', 0) for run in todo)

    def say(self, line):
        """A line that stays, above the one that is refreshed."""
        print(('\r\033[K' if sys.stdout.isatty() else '') + line, flush=True)

    def start(self):
        run, share = self.waiting.pop(0), self.shares.pop(0)
        resume = standing(run) == 'resume'
        words = command(run, resume, share, self.script)
        run.out_dir.mkdir(parents=True, exist_ok=True)
        with open(run.out_dir / 'log.txt', 'a') as log:
            print('$', shlex.join(words), file=log, flush=True)
            # a session of its own: the terminal's Ctrl-C comes to the sweep alone, which passes it on once
            process = subprocess.Popen(words, env=os.environ | share, stdin=subprocess.DEVNULL, stdout=log,
                                       stderr=subprocess.STDOUT, start_new_session=True)
        self.jobs.append(Job(run, share, process, time.monotonic()))
        self.say(f'{"continues" if resume else "starts"}: {run.name}')

    def end(self, job):
        """Books a job whose process has ended."""
        self.jobs.remove(job)
        self.shares.append(job.share)
        run, status = job.run, job.process.returncode
        if status == 0 and standing(run) == 'finished':
            self.finished.append(run)
            took = timedelta(seconds=round(time.monotonic() - job.began))
            self.say(f'done: {run.name}, val loss {latest(run)["val_loss"]:.4f}, {took}')
        else:
            self.failed.append(run)
            self.steps_at_start -= run.config.max_iters - latest(run).get('iter', 0)
            log = run.out_dir / 'log.txt'
            self.say(f'FAILED: {run.name}, exit status {status}, see {log}: {last_line(log)}')

    def progress(self):
        """How far the sweep is, in a line."""
        left, elapsed = self.steps_to_do(), time.monotonic() - self.began
        made = self.steps_at_start - left
        eta = timedelta(seconds=round(left * elapsed / made)) if made > 0 else '?'
        now = []
        for job in self.jobs:
            line = latest(job.run)
            kind = 'train' if 'train_loss' in line else 'val'
            loss = f', {kind} loss {line[kind + "_loss"]:.3f}' if line else ''
            now.append(f'step {line.get("iter", 0)}/{job.run.config.max_iters}{loss} {job.run.name}')
        failed = f', {len(self.failed)} failed' if self.failed else ''
        return (f'{len(self.finished)} done{failed}, {len(self.waiting) + len(self.jobs)} left, ETA {eta} | '
                + ' | '.join(now))

    def show(self):
        """The progress, refreshed in place on a terminal, a line a minute elsewhere."""
        if sys.stdout.isatty():
            width = shutil.get_terminal_size().columns - 1
            print('\r\033[K' + self.progress()[:width], end='', flush=True)
        elif time.monotonic() - self.told > 60:
            self.told = time.monotonic()
            print(self.progress(), flush=True)

    def train(self):
        """Trains all that is to do. A run that fails is booked and the next one starts."""
        while self.waiting or self.jobs:
            while self.waiting and self.shares:
                self.start()
            for job in [job for job in self.jobs if job.process.poll() is not None]:
                self.end(job)
            if self.jobs:
                self.show()
                time.sleep(0.2)
        self.say(f'{len(self.finished)} runs finished, {len(self.failed)} failed'
                 + ''.join(f'\n  FAILED: {run.name}, see {run.out_dir / "log.txt"}' for run in self.failed))

    def stop(self):
        """Has the jobs save and end."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)        # a second Ctrl-C would cut the saving short
        for job in self.jobs:
            job.process.terminate()     # not SIGINT, to which the children of a background shell job are deaf
        self.say(f'stopping: {len(self.jobs)} runs save their state')
        for job in self.jobs:
            job.process.wait()
        total = len(self.finished) + len(self.failed) + len(self.waiting) + len(self.jobs)
        self.say(f'stopped with {len(self.finished)} of {total} runs finished; the same command continues')


def compare_command(runs, out):
    """The command that compares the runs of this sweep."""
    folders = [run.out_dir for run in runs]
    named = [out] if set(find_runs([out])[0]) == set(folders) else folders
    return shlex.join(['python', 'compare.py', *map(str, named), f'--out={out / "compare"}'])


def parse_args(argv):
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('configs', nargs='*', help='run configs; default: those of the experiment')
    parser.add_argument('--with', dest='withs', metavar='FILE', action='append', default=[],
                        help='a config file composed after each; may be repeated')
    parser.add_argument('--out', type=Path, default=Path('out'), help='where run folders go; default: out')
    parser.add_argument('--jobs', type=int, default=1, help='runs at a time; default: 1')
    parser.add_argument('--script', type=Path, default=ROOT / 'train.py',
                        help='what trains a run, with train.py\'s arguments; default: train.py')
    parser.add_argument('--dry-run', action='store_true', help='show the plan and end')
    parser.error = lambda message: fail(f'{message}; see python sweep.py --help')
    args, flags = parser.parse_known_args(argv)
    if args.jobs < 1:
        fail(f'--jobs={args.jobs}: it must be at least 1')
    if not args.script.is_file():
        fail(f'--script={args.script}: there is no such file')
    return args, flags


def main(argv):
    args, flags = parse_args(argv)
    configs = args.configs or [os.path.relpath(ROOT / file) for file in CONFIGS]
    runs = plan(configs, args.withs, parse_grid(flags), args.out)
    gpus = find_gpus() if any(run.config.device == 'cuda' for run in runs) else []
    parts = shares(args.jobs, gpus)
    where = f'{len(gpus)} GPUs' if gpus else 'no GPU'
    print(f'{len(runs)} runs, {args.jobs} at a time, {where}:')
    for run in runs:
        print(f'  {standing(run):8}  {run.out_dir}, {run.config.max_iters} steps')
    if args.dry_run:
        return
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f'--out={args.out} cannot be written: {error.strerror}')

    signal.signal(signal.SIGTERM, signal.default_int_handler)   # ends like Ctrl-C
    sweep = Sweep(runs, parts, args.script)
    try:
        sweep.train()
    except KeyboardInterrupt:
        sweep.stop()
        sys.exit(130)
    print('compare them:', compare_command(runs, args.out), sep='\n  ')
    sys.exit(1 if sweep.failed else 0)


if __name__ == '__main__':
    main(sys.argv[1:])
