"""
Train several runs, one after another or a few at a time, always with the dense control to compare them to.

    python sweep.py --with config/cpu.py                                  # the experiment's eight configs
    python sweep.py config/train_gpt2_*comm.py --with config/cpu.py --seed=1,2,3 --tp_size=2,4 --jobs 2

Every --key=value goes on to train.py. Values separated by commas make a grid, each with each value of the
other keys (block_types contains commas, so it takes one value). The dense control has one rank, so --tp_size,
--block_types and --merge do not apply to it: it is trained once for each combination of the other keys. A
run's folder is named after the run and the keys given to the sweep. Keys that do not change what a run
computes (--device and the like) are left out of the name unless they have several values:

    out/gpt2-124M-12comm-cpu-seed2-tp4

The time left is estimated from the speed of runs of the same size: those that are training, and those already
in their folders. Until one of them has made steps, it is unknown.

The same command continues a sweep that was stopped or killed: finished runs are skipped, unfinished and
failed ones continue from their last checkpoint, and runs that another process is training are left to it.
However a sweep ends, its runs save their state and end too. A run's output is in log.txt in its folder.
Where there are GPUs, torchrun starts each run on all of them. With --jobs, each run is pinned to an equal
share of the GPUs and cores; if there are more jobs than GPUs, several jobs train on one.
"""

import argparse
import ctypes
import json
import os
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import timedelta
from itertools import product
from pathlib import Path

from configurator import (
    HOUSEKEEPING,
    ROOT,
    RUNS,
    VARIED,
    Config,
    differences,
    fail,
    load,
    pattern,
    recipe,
    told,
)
from training import rundir

OWN = {'out_dir', 'wandb_run_name', 'init_from'}  # keys that the sweep sets
NOT_DENSE = VARIED - {'seed'}  # keys without a meaning for the dense control
SHORT = {'seed': 'seed', 'tp_size': 'tp'}  # these go without '=' in a folder's name
# what a step's time depends on most
SIZE = ('dataset', 'n_layer', 'n_head', 'n_embd', 'block_size', 'batch_size', 'gradient_accumulation_steps',
        'dropout', 'bias', 'device', 'dtype', 'compile', 'shard')
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # they end a sweep, its runs saved

libc = ctypes.CDLL(None)
PR_SET_PDEATHSIG = 1  # of Linux's prctl: the signal to get when the parent dies

# the plan


@dataclass
class Run:
    """One run of the plan: train.py's arguments, and the config that they give."""
    args: list
    config: Config

    @property
    def name(self):
        return self.config.wandb_run_name

    @property
    def out_dir(self):
        return Path(self.config.out_dir)

    @property
    def steps_left(self):
        return self.config.max_iters - rundir.last_metrics(self.out_dir).get('iter', 0)


def parse_grid(flags):
    """--key=value[,value...] flags -> {key: values as typed}, seed first and tp_size last, as the runs go."""
    grid = {}
    for flag in flags:
        key, equals, text = flag.removeprefix('--').partition('=')
        if not flag.startswith('--') or not equals:
            fail(f'{flag}: a key for train.py is given as --key=value; see python sweep.py --help')
        if key in OWN:
            fail(f'{flag}: the sweep names its runs and their folders; --out says where they go')
        if key in grid:
            fail(f'{flag}: {key} is given twice; a list is --{key}={",".join(grid[key])},{text}')
        grid[key] = [text] if key == 'block_types' else text.split(',')
    if '1' in grid.get('tp_size', []):
        fail('--tp_size has 1, which is the dense control; leave it out, the control is always trained')
    return {key: grid[key] for key in sorted(grid, key=lambda key: (key != 'seed', key == 'tp_size', key))}


def tag(key, value):
    """What a key given to the sweep adds to the name of a run."""
    text = pattern(value) if key == 'block_types' else str(value)
    return SHORT.get(key, f'{key}=') + re.sub(r'[^\w.+-]+', '_', text).strip('_')


def find_controls(files):
    """
    The dense controls of run configs: files with tp_size 1 and the same recipe, among these or in config/.

    Ends the program if a config has none.
    """
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
    The runs of a sweep, in order: all runs of a seed together, so that half a sweep has whole seeds.

    files: run configs, to which their dense controls are added. withs: config files composed after each.
    grid: from parse_grid. out: the folder that gets the run folders. Ends the program if two runs would share
    a folder.
    """
    controls = find_controls(files)
    runs = {}
    for values in product(*grid.values()):
        for file in dict.fromkeys(controls + files):
            given = dict(zip(grid, values))
            if file in controls:
                given = {key: value for key, value in given.items() if key not in NOT_DENSE}
            args = [file, *withs, *(f'--{key}={value}' for key, value in given.items())]
            args += ['--tp_size=1'] * (file in controls)  # a file composed after it may say otherwise
            config = load(args)
            tags = [tag(key, getattr(config, key)) for key in sorted(given)
                    if key not in HOUSEKEEPING or len(grid[key]) > 1]
            name = '-'.join([config.wandb_run_name, *tags])
            args += [f'--wandb_run_name={name}', f'--out_dir={out / name}']
            twin = runs.setdefault(name, Run(args, load(args)))
            if twin.args != args:
                fail(f'{shlex.join(twin.args[:-2])} and {shlex.join(args[:-2])} would share {out / name}')
    return list(runs.values())


def info_of(run):
    """The run's run.json, {} before there is one. Ends the program if it is damaged."""
    try:
        return rundir.read_info(run.out_dir) or {}
    except ValueError as error:
        fail(str(error))


def state_of(run):
    """
    finished, running (a process is training it), resume (it has a checkpoint) or new.

    Ends the program if the run's folder holds another run.
    """
    info = info_of(run)
    if info:
        changed = differences(info['config'], vars(run.config))
        if changed:
            fail(f'{run.out_dir} holds another run ({told(changed)}): move it away, or choose another --out')
        if info['state'] == 'finished':
            return 'finished'
    if rundir.is_locked(run.out_dir):
        return 'running'
    return 'resume' if rundir.has_checkpoint(run.out_dir) else 'new'


# the machine


def find_gpus():
    """The ids of the GPUs to use, as in CUDA_VISIBLE_DEVICES; [] if there are none."""
    if 'CUDA_VISIBLE_DEVICES' in os.environ:
        return [gpu for gpu in os.environ['CUDA_VISIBLE_DEVICES'].split(',') if gpu.strip()]
    if not shutil.which('nvidia-smi'):
        return []
    listed = subprocess.run(['nvidia-smi', '-L'], capture_output=True, text=True).stdout
    return [str(i) for i in range(len(re.findall(r'^GPU ', listed, re.MULTILINE)))]


def find_cores():
    """The cores that this process may use, the threads of one physical core side by side."""
    if not hasattr(os, 'sched_getaffinity'):
        return list(range(os.cpu_count()))

    def place(core):
        folder = Path(f'/sys/devices/system/cpu/cpu{core}/topology')
        files = [folder / 'physical_package_id', folder / 'core_id']
        return [int(file.read_text()) if file.exists() else 0 for file in files] + [core]
    return sorted(os.sched_getaffinity(0), key=place)


@dataclass
class Share:
    """What a run may use: ids of GPUs, [] for none; cores, [] for all."""
    gpus: list
    cores: list

    @property
    def environment(self):
        if self.gpus:
            return dict(CUDA_VISIBLE_DEVICES=','.join(self.gpus))
        return dict(OMP_NUM_THREADS=str(len(self.cores))) if self.cores else {}


def divide(jobs, gpus, cores):
    """
    The Share of each job: an equal part of the GPUs and of the cores.

    If there are fewer of them than jobs, each job gets one, which it shares with others.
    """
    if jobs == 1:
        return [Share(gpus, [])]

    def part(things, i):
        if 0 < len(things) < jobs:
            return [things[i % len(things)]]
        each = len(things) // jobs
        return things[i * each:(i + 1) * each]
    return [Share(part(gpus, i), part(cores, i)) for i in range(jobs)]


def command(run, resume, share):
    """The command line that trains a run on a share of the machine."""
    launcher = [sys.executable]
    if share.gpus:
        launcher += ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={len(share.gpus)}',
                     '--signals-to-handle=SIGTERM,SIGINT,SIGUSR1']
    return [*launcher, str(ROOT / 'train.py'), *run.args, *['--init_from=resume'] * resume]


def launch(words, share, log):
    """Start a command on a share of the machine, its output to the file `log`. Returns the Popen."""
    def settle():
        # in the child, before it becomes the command
        if share.cores and hasattr(os, 'sched_setaffinity'):
            os.sched_setaffinity(0, share.cores)
        if sys.platform == 'linux':  # a run must not outlive a killed sweep: the next one would use its cores
            libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)

    print('$', shlex.join(words), file=log, flush=True)
    # in a session of its own: the terminal's Ctrl-C reaches the sweep alone, which passes it on once
    return subprocess.Popen(words, env=os.environ | share.environment, stdin=subprocess.DEVNULL, stdout=log,
                            stderr=subprocess.STDOUT, start_new_session=True, preexec_fn=settle)


# what runs wrote, and how long the others will take


def reason(log):
    """Why a run failed: the last error in its log, after which torchrun may have said more."""
    text = log.read_text(errors='replace').rpartition('\n$ ')[2] if log.exists() else ''
    errors = re.findall(r'^(?:\[rank\d+\]: *)?((?:error:|[\w.]+(?:Error|Exception)\b).*)', text, re.MULTILINE)
    return errors[-1].removeprefix('error: ') if errors else rundir.last_line(log)


def loss_of(line, kind):
    """A metrics line's train or val loss, in words."""
    loss = line.get(f'{kind}_loss')
    return 'not a number' if loss is None else f'{loss:.4f}'


def duration(seconds):
    return str(timedelta(seconds=round(seconds)))


@dataclass
class Pace:
    """How fast a run trains: tokens per second in its steps, tokens that an evaluation reads."""
    config: dict  # of the run that was so fast
    tokens_per_sec: float
    eval_tokens: int


def find_pace(run, processes):
    """A run's Pace so far; None if its files do not show it, or it had another number of processes."""
    info = info_of(run)
    evals, logs = rundir.read_metrics(run.out_dir)
    speeds = [line['tokens_per_sec'] for line in logs.values() if line.get('tokens_per_sec')]
    speeds = speeds[1:]  # the first one includes start-up
    if info.get('processes') != processes or not evals or not speeds:
        return None
    line = next(iter(evals.values()))
    tokens = line['val_tokens'] + line.get('fixed_train_tokens', 0)
    return Pace(info['config'], statistics.median(speeds), tokens)


def seconds_left(run, paces):
    """
    The time that a run will still take, in seconds, at the mean pace of runs with the same blocks; if there
    are none, of all runs of its size; None without those.
    """
    config = run.config
    alike = [pace for pace in paces if all(pace.config[key] == getattr(config, key) for key in SIZE)]
    same = [pace for pace in alike if all(pace.config[key] == getattr(config, key)
                                          for key in ('block_types', 'tp_size'))] or alike
    if not same:
        return None
    windows = config.batch_size * config.gradient_accumulation_steps
    # an evaluation only goes forward, so a token costs it about a third of what it costs a step
    per_step = windows * config.block_size + same[0].eval_tokens / 3 / config.eval_interval
    return run.steps_left * per_step / statistics.mean(pace.tokens_per_sec for pace in same)


def makespan(durations, jobs):
    """Seconds until tasks of these durations are done, started in order, `jobs` at a time."""
    busy = [0.0] * jobs
    for seconds in durations:
        busy[busy.index(min(busy))] += seconds
    return max(busy)


# running


@dataclass
class Job:
    """A run that is being trained: when it was started, and the time of its last checkpoint before that."""
    run: Run
    share: Share
    process: subprocess.Popen
    began: float
    saved: float


class Sweep:
    """The runs of a sweep: waiting, in jobs, finished, failed."""

    def __init__(self, runs, shares):
        """shares: a Share for each run that may train at the same time"""
        self.finished = [run for run in runs if state_of(run) == 'finished']
        self.waiting = [run for run in runs if run not in self.finished]
        self.shares, self.jobs, self.failed, self.elsewhere = list(shares), [], [], set()
        self.common = set.intersection(*(set(run.name.split('-')) for run in runs))
        self.slots, self.processes = len(shares), max(1, len(shares[0].gpus))
        self.paces = {}  # by the run's name
        self.measure(self.finished)
        self.shown = time.monotonic()

    def measure(self, runs):
        """Read the paces of these runs from their folders."""
        found = {run.name: find_pace(run, self.processes) for run in runs}
        self.paces.update((name, pace) for name, pace in found.items() if pace)

    def eta(self):
        """The time until all runs are done, in words; 'unknown' until runs of their sizes have made steps."""
        runs = [job.run for job in self.jobs] + self.waiting
        self.measure(runs)
        times = [seconds_left(run, self.paces.values()) for run in runs]
        known = [seconds for seconds in times if seconds is not None]
        if runs and not known:
            return 'unknown'
        return 'over ' * (len(known) < len(runs)) + duration(makespan(known, self.slots))

    def short(self, run):
        """A run's name without the parts that all names share."""
        parts = [part for part in run.name.split('-') if part not in self.common]
        return '-'.join(['dense'] * (run.config.tp_size == 1) + parts) or run.name

    def say(self, line):
        """Print a line that stays, above the one that is refreshed."""
        print(('\r\033[K' if sys.stdout.isatty() else '') + line, flush=True)

    def start(self):
        """Start the first waiting run that no other process has finished or is training."""
        for run in list(self.waiting):
            state = state_of(run)
            if state == 'running':
                if run.name not in self.elsewhere:
                    self.elsewhere.add(run.name)
                    self.say(f'left to the process that trains it now: {run.name}')
                continue
            self.waiting.remove(run)
            if state == 'finished':
                self.finish(run, 'done by another process')
                continue
            try:
                self.begin(run, state == 'resume')
            except OSError as error:
                self.fail(run, f'it cannot be started: {error.strerror}')
                continue
            return

    def begin(self, run, resume):
        """Start a run on a free share of the machine."""
        run.out_dir.mkdir(parents=True, exist_ok=True)
        share, saved = self.shares[0], rundir.saved_at(run.out_dir)
        with open(run.out_dir / 'log.txt', 'a') as log:
            process = launch(command(run, resume, share), share, log)
        self.shares.remove(share)
        self.jobs.append(Job(run, share, process, time.monotonic(), saved))
        self.say(f'{"continues" if resume else "starts"}: {run.name}')

    def finish(self, run, how, *words):
        """Record a finished run."""
        self.finished.append(run)
        self.measure([run])
        loss = loss_of(rundir.last_metrics(run.out_dir), 'val')
        self.say(', '.join([f'{how}: {run.name}', f'val loss {loss}', *words]))

    def fail(self, run, why):
        """Record a failed run; the sweep goes on."""
        self.failed.append(run)
        self.say(f'FAILED: {run.name}, {why}')

    def end(self, job):
        """Record how a job ended."""
        self.jobs.remove(job)
        self.shares.append(job.share)
        run, status, state = job.run, job.process.returncode, state_of(job.run)
        log = run.out_dir / 'log.txt'
        if state == 'finished':
            self.finish(run, 'done', duration(time.monotonic() - job.began))
        elif state == 'running':  # another process took the folder first
            self.waiting.append(run)
        elif info_of(run).get('state') == 'resumable' and rundir.saved_at(run.out_dir) > job.saved:
            self.waiting.append(run)  # it was stopped by a signal that was not the sweep's
            step = rundir.last_metrics(run.out_dir).get('iter', 0)
            self.say(f'stopped from outside at step {step}, continues after the others: {run.name}')
        else:
            how = f'exit status {status}' if status >= 0 else f'killed by {signal.Signals(-status).name}'
            self.fail(run, f'{how}, see {log}: {reason(log)}')

    def progress(self):
        """How far the sweep is, in a line."""
        failed = f', {len(self.failed)} failed' if self.failed else ''
        left = len(self.waiting) + len(self.jobs)
        parts = [f'{len(self.finished)} done{failed}, {left} left, ETA {self.eta()}']
        for job in self.jobs:
            line = rundir.last_metrics(job.run.out_dir)
            kind = 'train' if 'train_loss' in line else 'val'
            loss = f' {kind} loss {loss_of(line, kind)}' if line else ''
            step = f'{line.get("iter", 0)}/{job.run.config.max_iters}'
            parts.append(f'{self.short(job.run)} {step}{loss}')
        if not self.jobs:
            parts.append('waiting for runs that other processes train')
        return ' | '.join(parts)

    def show(self):
        """Print the progress: on a terminal every second, in place; elsewhere a line a minute."""
        terminal = sys.stdout.isatty()
        if time.monotonic() - self.shown < (1 if terminal else 60):
            return
        self.shown = time.monotonic()
        if terminal:
            width = shutil.get_terminal_size().columns - 1
            print('\r\033[K' + self.progress()[:width], end='', flush=True)
        else:
            print(self.progress(), flush=True)

    def train(self):
        """Train all runs that are not finished. If one fails, the next one starts."""
        while self.waiting or self.jobs:
            for _ in range(min(len(self.waiting), len(self.shares))):
                self.start()
            for job in [job for job in self.jobs if job.process.poll() is not None]:
                self.end(job)
            if self.waiting or self.jobs:
                self.show()
                time.sleep(0.2)
        self.say(f'{len(self.finished)} runs finished, {len(self.failed)} failed')
        for run in self.failed:
            self.say(f'  FAILED: {run.name}, see {run.out_dir / "log.txt"}')

    def stop(self):
        """Have the jobs save their state and end."""
        for number in STOP_SIGNALS:  # a second one would cut the saving short
            signal.signal(number, signal.SIG_IGN)
        for job in self.jobs:
            job.process.terminate()  # not SIGINT, which children of a background shell job ignore
        self.say(f'stopping: {len(self.jobs)} runs save their state')
        for job in self.jobs:
            job.process.wait()
        total = len(self.finished) + len(self.failed) + len(self.waiting) + len(self.jobs)
        self.say(f'stopped with {len(self.finished)} of {total} runs finished; the same command continues')


def compare_command(runs, out):
    """The command that compares the runs of this sweep."""
    folders = [run.out_dir for run in runs]
    named = [out] if set(rundir.find_runs([out])[0]) == set(folders) else folders
    return shlex.join(['python', 'compare.py', *map(str, named), f'--out={out / "compare"}'])


def parse_args(argv):
    """(parsed arguments, the flags that go on to train.py)"""
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('configs', nargs='*', help='run configs; default: those of the experiment')
    parser.add_argument('--with', dest='withs', metavar='FILE', action='append', default=[],
                        help='a config file composed after each; may be repeated')
    parser.add_argument('--out', type=Path, default=Path('out'), help='where run folders go; default: out')
    parser.add_argument('--jobs', type=int, default=1, help='runs at a time; default: 1')
    parser.add_argument('--dry_run', action='store_true', help='show the plan and the time left, and end')
    parser.error = lambda message: fail(f'{message}; see python sweep.py --help')
    args, flags = parser.parse_known_args(argv)
    if args.jobs < 1:
        fail(f'--jobs is {args.jobs}, it must be at least 1')
    return args, flags


def show_plan(runs, jobs, machine):
    """Print how each run stands."""
    print(f'{len(runs)} runs, {jobs} at a time, {machine}:')
    for run in runs:
        state, step = state_of(run), rundir.last_metrics(run.out_dir).get('iter', 0)
        at = f'at step {step} of ' if state in ('running', 'resume') else ''
        whose = ', by another process' if state == 'running' else ''
        print(f'  {state}, {at}{run.config.max_iters} steps{whose}: {run.out_dir}')


def main(argv):
    args, flags = parse_args(argv)
    configs = args.configs or [os.path.relpath(ROOT / file) for file in RUNS]
    runs = plan(configs, args.withs, parse_grid(flags), args.out)
    gpus = find_gpus() if any(run.config.device == 'cuda' for run in runs) else []
    cores = find_cores()
    show_plan(runs, args.jobs, f'{len(gpus)} GPUs' if gpus else f'{len(cores)} cores, no GPU')
    sweep = Sweep(runs, divide(args.jobs, gpus, cores))
    if sweep.waiting:
        eta = sweep.eta()
        print(f'time left: {eta}', 'until runs have made steps' if eta == 'unknown'
              else 'at the speed of these runs so far', flush=True)
    if args.dry_run:
        return
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f'--out is {args.out}, which cannot be written: {error.strerror}')

    for number in STOP_SIGNALS[1:]:
        signal.signal(number, signal.default_int_handler)  # as Ctrl-C does
    try:
        sweep.train()
    except KeyboardInterrupt:
        sweep.stop()
        sys.exit(130)
    if sweep.finished:
        print('compare them:', compare_command(runs, args.out), sep='\n  ')
    sys.exit(1 if sweep.failed else 0)


if __name__ == '__main__':
    main(sys.argv[1:])
