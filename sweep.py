"""
Train several runs, one after another or a few at a time, always with the dense control to compare them to.

    python sweep.py --with config/cpu.py                                  # the experiment's eight configs
    python sweep.py config/train_gpt2_*comm.py --with config/cpu.py --seed=1,2,3 --tp_size=2,4 --jobs 2
    python sweep.py --max_iters=20000 --seed=1,2,3 --dry_run --gpus=8 --gpu=H100          # what it would take

Every --key=value goes on to train.py. Values separated by commas make a grid, each with each value of the
other keys (block_types, block_types_at and train_layers contain commas, so they take one value). The dense
control has one rank, so --tp_size, --block_types and --merge do not apply to it: it is trained once for each
combination of the other keys. A run's folder is named after the run and the keys that have several values, or
another value than a run there that has the name; --out keeps sweeps apart:

    out/gpt2-124M-12comm-seed2-tp4

A folder under --out that holds a run with the same config already, whatever its name, is that run: what
train.py began by itself is continued there.

--dry_run starts nothing. It shows how each run stands, the commands that train them, the time left and the
disk they take. From a second terminal, the command of a running sweep and --dry_run show how far it is. The
time is estimated from the speed of runs of the same size: those that are training, and those already in their
folders. Until one of them has made steps, it is unknown, unless --gpu names GPUs whose peak is known.

The same command continues a sweep that was stopped or killed: finished runs are skipped, unfinished and
failed ones continue from their last checkpoint, and runs that another process is training are left to it.
However a sweep ends, its runs save their state and end too. A run's output is in log.txt in its folder.
Where there are GPUs, torchrun starts each run on all of them. With --jobs, each run is pinned to an equal
share of the GPUs and cores; if there are more jobs than GPUs, several jobs train on one.
"""

import argparse
import ctypes
import hashlib
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from itertools import cycle, product
from pathlib import Path

from configurator import (
    RESUMING,
    ROOT,
    RUNS,
    VARIED,
    Config,
    begin_program,
    describe_changes,
    differences,
    fail,
    load,
    pattern,
    recipe,
)
from speed.forecast import Forecast, checkpoint_bytes, describe_seeds, disk_left, duration, peak_of
from training import rundir

OWN = {'out_dir', 'wandb_run_name'}  # keys that the sweep sets
NOT_DENSE = VARIED - {'seed'}  # keys without a meaning for the dense control
BLOCKS = {'block_types', 'block_types_at'}
SHORT = {'seed': 'seed', 'tp_size': 'tp'}  # these go without '=' in a folder's name
PERTURB = 0.001  # of the dense twin that shows the noise floor
LONGEST = 200  # bytes in a run's name; file systems allow 255
DONE = 'finished', 'diverged'  # states of a run that is not trained on
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)  # they end a sweep, runs saved

libc = ctypes.CDLL(None)
PR_SET_PDEATHSIG = 1  # of Linux's prctl: the signal to get when the parent dies

# the plan


@dataclass
class Run:
    """One run of the plan: train.py's arguments, and the config that they give."""
    args: list
    config: Config
    dense: bool  # whether it is a dense control

    @property
    def name(self):
        return self.config.wandb_run_name

    @property
    def out_dir(self):
        return Path(self.config.out_dir)

    @property
    def last_line(self):
        """The last line of its metrics, {} before there is one."""
        try:
            return rundir.last_metrics(self.out_dir)
        except (OSError, ValueError):  # only shown: whoever needs the metrics refuses a damaged file
            return {}

    @property
    def step(self):
        return self.last_line.get('iter', 0)

    @property
    def steps_left(self):
        return self.config.max_iters - self.step


def parse_grid(flags):
    """--key=value[,value...] flags -> {key: values as typed}, seed first and tp_size last, as the runs go."""
    grid = {}
    for flag in flags:
        key, equals, text = flag.removeprefix('--').partition('=')
        if not flag.startswith('--') or not equals:
            fail(f'{flag}: a key for train.py is given as --key=value; see python sweep.py --help')
        if key in OWN:
            fail(f'{flag}: the sweep names its runs and their folders; --out says where they go')
        if key == 'init_from' and text in ('scratch', *RESUMING):
            fail(f'{flag}: the sweep starts and resumes its runs; it takes trained weights, as in gpt2')
        if key in grid:
            fail(f'{flag}: {key} is given twice; a list is --{key}={",".join(grid[key])},{text}')
        grid[key] = [text] if key in BLOCKS | {'train_layers'} else text.split(',')
    if '1' in grid.get('tp_size', []):
        fail('--tp_size has 1, which is the dense control; leave it out, the control is always trained')
    return {key: grid[key] for key in sorted(grid, key=lambda key: (key != 'seed', key == 'tp_size', key))}


def tag(key, value):
    """What a key given to the sweep adds to the name of a run."""
    text = pattern(value) if key == 'block_types' else str(value)
    return SHORT.get(key, f'{key}=') + re.sub(r'[^\w.+-]+', '_', text).strip('_')


def fit(name, end=''):
    """A name and its end, as long as a folder's may be: what is cut is replaced by a short hash."""
    whole = os.fsencode(name + end)
    if len(whole) <= LONGEST:
        return name + end
    end = f'-{hashlib.sha256(whole).hexdigest()[:8]}{end}'
    return os.fsencode(name)[:LONGEST - len(end)].decode(errors='ignore') + end


def name_run(config, keys, end):
    """The name of a run: its config's, then these keys, which tell it from others, then `end`."""
    tags = [tag(key, getattr(config, key)) for key in sorted(keys)]
    return fit('-'.join([config.wandb_run_name, *tags]), end)


def find_controls(files):
    """
    The dense controls of run configs: files with one rank, all layers tp and the same recipe, among these or
    in config/.

    Ends the program if a config has none.
    """
    dense = {}
    for file in [*files, *(os.path.relpath(path) for path in sorted(ROOT.glob('config/train_*.py')))]:
        config = vars(load([file]))
        varied = (config['perturb'] or config['embed_scale'] != 1 or config['block_types_at']
                  or set(config['block_types']) != {'tp'})
        if config['tp_size'] == 1 and not varied:
            dense.setdefault(json.dumps(recipe(config)), file)
    controls = [dense.get(json.dumps(recipe(vars(load([file]))))) for file in files]
    if None in controls:
        file = files[controls.index(None)]
        fail(f'{file}: no config has tp_size 1 and the same recipe, to be its dense control; name one')
    return list(dict.fromkeys(controls))


def plan(files, withs, grid, out, floor=False, without_dense=False):
    """
    The runs of a sweep, in order: all runs of a seed together, so that half a sweep has whole seeds.

    files: run configs, to which their dense controls are added, unless without_dense. withs: config files
    composed after each. grid: from parse_grid. out: the folder that gets the run folders. floor: whether each
    control gets a perturbed twin. Ends the program if two runs would share a folder.
    """
    controls, runs, there = find_controls(files), {}, runs_in(out)
    varied = {key for key, values in grid.items() if len(values) > 1}

    def add(args, keys, end='', dense=False):
        config = load(args)
        # the name of a file speaks of its blocks, which a flag has changed
        tags = keys.keys() & (varied | BLOCKS)
        name = name_run(config, tags, end)
        while taken := there.get(out / name):  # by a run of other values, if it is not this one
            changed = differences(taken['config'], vars(config)).keys() & keys.keys() - tags
            if not changed:
                break
            tags |= changed
            name = name_run(config, tags, end)
        args = [*args, f'--wandb_run_name={name}', f'--out_dir={out / name}']
        twin = runs.setdefault(name, Run(args, load(args), dense))
        if twin.args != args:
            fail(f'{shlex.join(twin.args[:-2])} and {shlex.join(args[:-2])} would share {out / name}')

    for values in product(*grid.values()):
        given = dict(zip(grid, values))
        plain = {key: value for key, value in given.items() if key not in NOT_DENSE}
        for file in dict.fromkeys(files if without_dense else controls + files):
            if file not in controls:
                add([file, *withs, *as_flags(given)], given)
                continue
            # a file composed after it may say otherwise
            args = [file, *withs, *as_flags(plain), '--tp_size=1']
            add(args, plain, dense=True)
            if floor:
                add([*args, f'--perturb={PERTURB}'], plain, '-perturbed')
    runs = list(runs.values())
    refuse_twins(runs, varied)
    settle_in(runs, varied, there)
    return runs


def as_flags(given):
    return [f'--{key}={value}' for key, value in given.items()]


def same_run(theirs, ours, varied):
    """Whether two configs, as dicts, are one run: only housekeeping that the sweep does not vary differs."""
    return not differences(theirs, ours) and all(theirs[key] == ours[key] for key in varied)


def refuse_twins(runs, varied):
    """End the program if two runs of the plan are the same under two names."""
    for i, run in enumerate(runs):
        for other in runs[:i]:
            if same_run(vars(run.config), vars(other.config), varied):
                fail(f'{shlex.join(other.args[:-2])} and {shlex.join(run.args[:-2])} are the same run, which '
                     'would share a folder: leave one out')


def runs_in(out):
    """{folder: run.json's contents} of the runs under `out`."""
    there = {}
    for path in sorted(out.glob('*/run.json')):
        try:
            there[path.parent] = rundir.read_info(path.parent)
        except (OSError, ValueError):  # no run can be recognized in it; if one is named so, it is refused
            continue
    return {folder: info for folder, info in there.items() if info}


def settle_in(runs, varied, there):
    """
    Let each run whose config a folder holds already, under whatever name, continue there. there: of runs_in()

    If several do, its own folder comes first, then the one that is furthest.
    """
    for run in runs:
        own = {folder: info for folder, info in there.items()
               if same_run(info['config'], vars(run.config), varied)}
        if own and run.out_dir not in own:
            folder = max(own, key=lambda folder: own[folder]['iter'])
            run.args[-2:] = [f'--wandb_run_name={own[folder]["name"]}', f'--out_dir={folder}']
            run.config = load(run.args)


def info_of(run):
    """The run's run.json, {} before there is one. Ends the program if it is damaged."""
    try:
        return rundir.read_info(run.out_dir) or {}
    except ValueError as error:
        fail(str(error))


def state_of(run):
    """
    finished, diverged, running (a process is training it), resume (it has a checkpoint) or new.

    Ends the program if the run's folder holds another run.
    """
    info = info_of(run)
    if info:
        changed = differences(info['config'], vars(run.config))
        if changed:
            fail(f'{run.out_dir} holds another run ({describe_changes(changed)}): move it away, or choose '
                 'another --out')
        if info['state'] in DONE:
            return info['state']
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
                     '--signals-to-handle=SIGTERM,SIGINT,SIGUSR1,SIGHUP']
    # auto: a scheduler may start it again as it is. Weights to begin with leave no room for that
    again = ['--init_from=auto'] if run.config.init_from == 'scratch' else ['--init_from=resume'] * resume
    return [*launcher, str(ROOT / 'train.py'), *run.args, *again]


def shell_line(run, resume, share):
    """The same for a shell, with the folder, the environment and the cores that the sweep would give it."""
    pinned = ['taskset', '--cpu-list', ','.join(map(str, share.cores))] * bool(share.cores)
    variables = [f'{name}={value}' for name, value in share.environment.items()]
    words = shlex.join([*pinned, *command(run, resume, share)])
    return ' '.join(['cd', shlex.quote(os.getcwd()), '&&', *variables, words])


def launch(words, share, log):
    """Start a command on a share of the machine, its output to the file `log`. Returns the Popen."""
    def settle():
        # in the child, before it becomes the command
        if share.cores and hasattr(os, 'sched_setaffinity'):
            os.sched_setaffinity(0, share.cores)
        if sys.platform == 'linux':  # a run must not outlive a killed sweep: the next one would use its cores
            libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)

    # in a session of its own: the terminal's Ctrl-C reaches the sweep alone, which passes it on once
    return subprocess.Popen(words, env=os.environ | share.environment, stdin=subprocess.DEVNULL, stdout=log,
                            stderr=subprocess.STDOUT, start_new_session=True, preexec_fn=settle)


# what runs wrote


def reason(log):
    """
    Why the last start in a log failed, '' if it does not say: our own error, a Python one, a signal that
    killed a process under torchrun, the loss of that process, or a disk that took no checkpoint.

    torchrun prints a traceback of its own in the end, which says nothing.
    """
    text = log.read_text(errors='replace') if log.exists() else ''
    text = '\n' + text[text.rfind('\n$ ') + 1:]
    errors = re.findall(r'\nerror: (.*)', text)
    lost = [error for error in errors if error.startswith('lost touch with')]
    own = [error for error in errors if error not in lost]
    raised = re.findall(r'\n(?:\[rank\d+\]: ?)?(?!torch\.distributed\.elastic)'
                        r'([\w.]+(?:Error|Exception|Interrupt)\b.*)', text)
    killed = re.findall(r'\nRoot Cause[^=]*Signal \d+ \((SIG\w+)\)', text)
    killed = [f'{name} killed a process' for name in killed]
    unsaved = re.findall(r'\nwarning: (no checkpoint at step [^;\n]*)', text)
    return next((found[-1] for found in (own, raised, killed, lost, unsaved) if found), '')


def loss_of(line, kind):
    """A metrics line's train or val loss, in words."""
    loss = line.get(f'{kind}_loss')
    return 'not a number' if loss is None else f'{loss:.4f}'


# running


@dataclass
class Job:
    """A run that is being trained."""
    run: Run
    share: Share
    process: subprocess.Popen
    began: float
    saved: float  # the time of its last checkpoint before that
    log: Path | None  # None: its output is not kept

    def failure(self):
        """How it ended, and why, in words."""
        status = self.process.returncode
        names = {number.value: number.name for number in signal.Signals}
        how = f'exit status {status}' if status >= 0 else f'killed by {names.get(-status, -status)}'
        see = f'see {self.log}' if self.log else 'its output was not kept'
        why = self.log and reason(self.log)
        if not why and shutil.disk_usage(self.run.out_dir).free < 2**20:  # then the log does not tell either
            why = 'its disk is full'
        return f'{how}, {see}' + (f': {why}' if why else '')


class Sweep:
    """The runs of a sweep: waiting, in jobs, finished, failed."""

    def __init__(self, runs, shares, forecast):
        """shares: a Share for each run that may train at the same time"""
        self.finished = [run for run in runs if state_of(run) in DONE]
        self.waiting = [run for run in runs if run not in self.finished]
        self.shares, self.jobs, self.failed, self.elsewhere = list(shares), [], [], set()
        self.reasons = {}  # why runs failed, by their folders
        self.common = set.intersection(*(set(run.name.split('-')) for run in runs))
        self.forecast = forecast
        self.forecast.measure(self.finished)
        self.shown = time.monotonic()
        self.signals = []  # those received that ask the sweep to end

    def times_left(self):
        """The seconds that each unfinished run will still take, None if unknown."""
        runs = [job.run for job in self.jobs] + self.waiting
        self.forecast.measure(runs)
        return [self.forecast.seconds(run.config, run.steps_left) for run in runs]

    def eta(self):
        """The time until all runs are done, in words."""
        return self.forecast.time(self.times_left())

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
                if run.out_dir not in self.elsewhere:
                    self.elsewhere.add(run.out_dir)
                    self.say(f'left to the process that trains it now: {run.name}')
                continue
            self.waiting.remove(run)
            if state in DONE:
                self.finish(run, f'{state} by another process')
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
        words = command(run, resume, share)
        log, path = self.open_log(run, words)
        with log:
            process = launch(words, share, log)
        self.shares.remove(share)
        self.jobs.append(Job(run, share, process, time.monotonic(), saved, path))
        self.say(f'{"continues" if resume else "starts"}: {run.name}')

    def open_log(self, run, words):
        """
        The run's log.txt to append to, the command written in it, and its path; if it cannot be written,
        /dev/null and None.
        """
        path, log = run.out_dir / 'log.txt', None
        try:
            log = open(path, 'ab', buffering=0)
            # a run that was killed may have left half a line
            log.write(b'\n' * (log.tell() > 0) + os.fsencode(f'$ {shlex.join(words)}\n'))
            return log, path
        except OSError as error:
            self.say(f'warning: the output of {run.name} is not kept: {path}: {error.strerror}')
            if log:
                log.close()
            return open(os.devnull, 'wb'), None

    def finish(self, run, how, *words):
        """Record a finished run."""
        self.finished.append(run)
        self.forecast.measure([run])
        loss = loss_of(run.last_line, 'val')
        self.say(', '.join([f'{how}: {run.name}', f'val loss {loss}', *words]))

    def fail(self, run, why):
        """Record a failed run; the sweep goes on."""
        self.failed.append(run)
        self.reasons[run.out_dir] = f'FAILED: {run.name}, {why}'
        self.say(self.reasons[run.out_dir])

    def end(self, job):
        """Record how a job ended."""
        self.jobs.remove(job)
        self.shares.append(job.share)
        run, state = job.run, state_of(job.run)
        if state in DONE:
            self.finish(run, state, duration(time.monotonic() - job.began))
        elif state == 'running':  # another process took the folder first
            self.waiting.append(run)
        elif info_of(run).get('state') == 'resumable' and rundir.saved_at(run.out_dir) > job.saved:
            self.waiting.append(run)  # it was stopped by a signal that was not the sweep's
            self.say(f'stopped from outside at step {run.step}, continues after the others: {run.name}')
        else:
            self.fail(run, job.failure())

    def progress(self):
        """How far the sweep is, in a line."""
        failed = f', {len(self.failed)} failed' if self.failed else ''
        left = len(self.waiting) + len(self.jobs)
        parts = [f'{len(self.finished)} done{failed}, {left} left, ETA {self.eta()}']
        for job in self.jobs:
            line = job.run.last_line
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

    def catch_signals(self):
        """Have the signals that end a sweep noted, for train(). Those that are ignored already stay so."""
        for number in STOP_SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:  # by nohup, or by a shell for a background job
                signal.signal(number, lambda number, frame: self.signals.append(number))

    def train(self):
        """Train all runs that are not finished, until a signal. If one fails, the next one starts."""
        while (self.waiting or self.jobs) and not self.signals:
            for _ in range(min(len(self.waiting), len(self.shares))):
                self.start()
            for job in [job for job in self.jobs if job.process.poll() is not None]:
                self.end(job)
            if self.waiting or self.jobs:
                self.show()
                time.sleep(0.2)
        if self.signals:
            return self.stop()
        self.say(f'{len(self.finished)} runs finished, {len(self.failed)} failed')
        for run in self.failed:
            self.say(f'  {self.reasons[run.out_dir]}')

    def stop(self):
        """Have the jobs save their state and end. Further signals change nothing."""
        for job in self.jobs:
            job.process.terminate()  # not SIGINT, which children of a background shell job ignore
        self.say(f'stopping: {len(self.jobs)} runs save their state')
        for job in self.jobs:
            job.process.wait()
        total = len(self.finished) + len(self.failed) + len(self.waiting) + len(self.jobs)
        done = len(self.finished) + sum(state_of(job.run) in DONE for job in self.jobs)
        self.say(f'stopped with {done} of {total} runs finished; the same command continues')


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
    parser.add_argument('--without_dense', action='store_true',
                        help='leave out dense controls that are not named: they are trained already, or at '
                             'another learning rate')
    parser.add_argument('--floor', action='store_true',
                        help=f'add a twin of each control with --perturb={PERTURB}: how far it ends from the '
                             'control is the noise floor')
    parser.add_argument('--detect', type=float, metavar='NATS',
                        help='say first how many seeds detect this difference to dense')
    parser.add_argument('--dry_run', action='store_true',
                        help='start nothing: show how each run stands, the commands, time and disk; also '
                             'of a sweep that runs in another terminal')
    parser.add_argument('--gpus', type=int, metavar='N', help='with --dry_run: plan for N GPUs')
    parser.add_argument('--gpu', metavar='NAME',
                        help='with --dry_run: H100 or another whose peak is known, to estimate the time if '
                             'no run has shown its speed')
    parser.error = lambda message: fail(f'{message}; see python sweep.py --help')
    args, flags = parser.parse_known_args(argv)
    for key in 'jobs', 'gpus':
        if getattr(args, key) is not None and getattr(args, key) < 1:
            fail(f'--{key} is {getattr(args, key)}, it must be at least 1')
    if args.detect is not None and not 0.001 <= args.detect < math.inf:
        fail(f'--detect is {args.detect:g}, it must be a finite number of nats, at least 0.001')
    if (args.gpus or args.gpu) and not args.dry_run:
        fail('--gpus and --gpu go with --dry_run; a sweep takes all GPUs, or those in CUDA_VISIBLE_DEVICES')
    return args, flags


def machine(args, runs):
    """(ids of the GPUs, cores) to plan for. Ends the program if --gpus or --gpu do not fit the runs."""
    if not any(run.config.device == 'cuda' for run in runs):
        for key in 'gpus', 'gpu':
            if getattr(args, key):
                fail(f'--{key} is {getattr(args, key)}, but device is {runs[0].config.device}')
        return [], find_cores()
    gpus = [str(i) for i in range(args.gpus)] if args.gpus else find_gpus()
    if args.gpu and not gpus:
        fail(f'--gpu is {args.gpu}, but there is none here; --gpus=8 plans for eight')
    if args.gpu:
        peak_of(args.gpu)
    return gpus, find_cores()


def show_plan(runs, jobs, gpus, cores):
    """Print how each run stands."""
    where = f'{len(gpus)} GPUs' if gpus else f'{len(cores)} cores, no GPU'
    print(f'{len(runs)} runs, {jobs} at a time, {where}:')
    for run in runs:
        state = state_of(run)
        at = f'at step {run.step} of ' if state in ('running', 'resume') else ''
        whose = ', by another process' if state == 'running' else ''
        print(f'  {state}, {at}{run.config.max_iters} steps{whose}: {run.out_dir}')


def show_commands(runs, shares):
    """Print the command of each run that is to be started, in a share of its own."""
    startable = [(run, state) for run in runs if (state := state_of(run)) in ('resume', 'new')]
    for (run, state), share in zip(startable, cycle(shares)):
        print(f'  {shell_line(run, state == "resume", share)}')


def show_costs(sweep, out):
    """Print the time and the disk that unfinished runs will take."""
    times, runs = sweep.times_left(), sweep.waiting
    cost = sweep.forecast.cost(times)
    print('time left:', 'unknown until runs have made steps' if cost == 'unknown'
          else f'{cost}, {sweep.forecast.basis()}')
    sizes = sorted({in_bytes(checkpoint_bytes(run.config)) for run in runs}, key=len)
    count = max(3 + run.config.keep_checkpoints for run in runs)
    folder = next(path for path in [out, *out.resolve().parents] if path.exists())
    need, free = sum(map(disk_left, runs)), shutil.disk_usage(folder).free
    print(f'disk: up to {in_bytes(need)} more, at most {count} checkpoints a run of {" or ".join(sizes)}; '
          f'{in_bytes(free)} are free' + ', which is too little' * (need > free), flush=True)


def in_bytes(size):
    return f'{size / 1e9:,.1f} GB' if size >= 1e9 else f'{size / 1e6:,.1f} MB'


def main(argv):
    args, keys = parse_args(argv)
    configs = args.configs or [os.path.relpath(ROOT / file) for file in RUNS]
    runs = plan(configs, args.withs, parse_grid(keys), args.out, args.floor, args.without_dense)
    gpus, cores = machine(args, runs)
    shares = divide(args.jobs, gpus, cores)
    sweep = Sweep(runs, shares, Forecast(len(gpus), len(cores), args.jobs, args.gpu))
    show_plan(runs, args.jobs, gpus, cores)
    if args.dry_run:
        show_commands(runs, shares)
    if args.detect:
        sweep.forecast.measure(runs)
        print(*describe_seeds(runs, args.detect, sweep.forecast), sep='\n')
    if sweep.waiting:
        show_costs(sweep, args.out)
    if args.dry_run:
        return
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f'--out is {args.out}, which cannot be written: {error.strerror}')

    sweep.catch_signals()
    sweep.train()
    if sweep.signals:
        sys.exit(130)
    if sweep.finished:
        print('compare them:', compare_command(runs, args.out), sep='\n  ')
    sys.exit(1 if sweep.failed else 0)


if __name__ == '__main__':
    begin_program()
    main(sys.argv[1:])
