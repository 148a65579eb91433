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

It says how long this will take before it starts: from the speed of runs of the same size that are in their
folders already, else from the first steps of some of the runs, made in a temporary folder.

The same command continues a sweep that was stopped or killed: finished runs are skipped, unfinished and
failed ones go on from their last checkpoint, and those that another process is training now are left to it.
When a sweep ends for whatever reason, its runs save and end. Each run's output is in its folder's log.txt.
Where there are GPUs, runs are started by torchrun on all of them. With --jobs each run gets an equal share of
the GPUs and cores, and is pinned to it; of more jobs than there are GPUs, several train on one.
"""

import argparse
import ctypes
import fcntl
import json
import os
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import timedelta
from itertools import product
from pathlib import Path

from configurator import HOUSEKEEPING, ROOT, RUNS, Config, differences, fail, load, pattern
from analysis.runs import find_runs, read_info, read_metrics, recipe

OWN = {'out_dir', 'wandb_run_name', 'init_from'}        # a run's place, which the sweep settles
SHORT = {'seed': 'seed', 'tp_size': 'tp'}               # these go without '=' in a folder's name
SIZE = ('dataset', 'n_layer', 'n_head', 'n_embd', 'block_size', 'batch_size', 'gradient_accumulation_steps',
        'dropout', 'bias', 'device', 'dtype', 'compile', 'shard')       # what a step's time depends on most
PROBE_STEPS, PROBE_SECONDS = 10, 180    # a probe of the speed ends after so many steps, or so long
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)        # those that end a sweep, its runs saved

libc = ctypes.CDLL(None)
PR_SET_PDEATHSIG = 1                    # of Linux's prctl: the signal to get when the parent dies

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


def noted(run):
    """What the run's run.json says, {} before there is one."""
    path = run.out_dir / 'run.json'
    return read_info(path) if path.exists() else {}


def being_trained(run):
    """Whether a process holds the lock of the run's folder."""
    path = run.out_dir / 'lock'
    if path.exists():
        with open(path) as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
    return False


def standing(run):
    """
    How a run stands: finished, running (some process trains it), resume (it has a checkpoint) or new. Ends
    the program where its folder holds another run.
    """
    info = noted(run)
    if info:
        changed = differences(info['config'], vars(run.config))
        if changed:
            told = ', '.join(f'{key} is {there} there, {here} here' for key, (there, here) in changed.items())
            fail(f'{run.out_dir} holds another run ({told}): move it away, or give this sweep another --out')
        if info['state'] == 'finished':
            return 'finished'
    if being_trained(run):
        return 'running'
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
    """What a run may use: the ids of GPUs, [] for none; cores, [] for no limit."""
    gpus: list
    cores: list

    @property
    def environment(self):
        if self.gpus:
            return {'CUDA_VISIBLE_DEVICES': ','.join(self.gpus)}
        return {'OMP_NUM_THREADS': str(len(self.cores))} if self.cores else {}


def shares(jobs, gpus, cores):
    """The Share of each of so many jobs at a time: things are dealt out, or shared where there are fewer."""
    if jobs == 1:
        return [Share(gpus, [])]

    def part(things, i):
        if 0 < len(things) < jobs:
            return [things[i % len(things)]]
        each = len(things) // jobs
        return things[i * each:(i + 1) * each]
    return [Share(part(gpus, i), part(cores, i)) for i in range(jobs)]


def command(run, resume, share, script=ROOT / 'train.py'):
    """The command line that trains a run with a script, train.py or the like, on a share of the machine."""
    launcher = [sys.executable]
    if share.gpus:
        launcher += ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={len(share.gpus)}',
                     '--signals-to-handle=SIGTERM,SIGINT,SIGUSR1']
    return [*launcher, str(script), *run.args, *['--init_from=resume'] * resume]


def launch(words, share, log):
    """Starts a command on a share of the machine; its output goes to a file. Returns the Popen."""
    def settle():       # by the child, before it becomes the command
        if share.cores and hasattr(os, 'sched_setaffinity'):
            os.sched_setaffinity(0, share.cores)
        if sys.platform == 'linux':     # a sweep that is killed leaves no run behind on cores it thinks free
            libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)

    print('$', shlex.join(words), file=log, flush=True)
    # a session of its own: the terminal's Ctrl-C comes to the sweep alone, which passes it on once
    return subprocess.Popen(words, env=os.environ | share.environment, stdin=subprocess.DEVNULL, stdout=log,
                            stderr=subprocess.STDOUT, start_new_session=True, preexec_fn=settle)


# what runs write, and how long they take


def last_line(path):
    """The last whole line of a file that has something on it; '' where there is none."""
    whole = path.read_text(errors='replace').rpartition('\n')[0] if path.exists() else ''
    return whole.rstrip().rpartition('\n')[2]


def reason(path):
    """Why a run failed, from its log: the last error that it names, after which torchrun may say more."""
    text = path.read_text(errors='replace').rpartition('\n$ ')[2] if path.exists() else ''
    errors = re.findall(r'^(?:\[rank\d+\]: *)?((?:error:|[\w.]+(?:Error|Exception)\b).*)', text, re.MULTILINE)
    return errors[-1].removeprefix('error: ') if errors else last_line(path)


def saved_at(run):
    """The time of the run's last checkpoint, 0 before there is one."""
    path = run.out_dir / 'ckpt.pt'
    return path.stat().st_mtime if path.exists() else 0


def latest(run):
    """The last line of a run's metrics, {} before there is one."""
    return json.loads(last_line(run.out_dir / 'metrics.jsonl') or '{}')


def loss_of(line, kind):
    """A metrics line's train or val loss, in words."""
    loss = line.get(f'{kind}_loss')
    return 'not a number' if loss is None else f'{loss:.4f}'


def duration(seconds):
    return str(timedelta(seconds=round(seconds)))


@dataclass
class Pace:
    """How fast a run trains: tokens a second in its steps, tokens that an evaluation reads."""
    config: dict                        # of the run that went so fast
    tokens_per_sec: float
    eval_tokens: int


def find_pace(run, processes):
    """The Pace that a run's files tell, None where they tell none or of other processes."""
    info = noted(run)
    evals, logs = read_metrics(run.out_dir / 'metrics.jsonl')
    speeds = [line['tokens_per_sec'] for line in logs.values()][1:]     # the first pays for the start
    if info.get('processes') != processes or not evals or not speeds:
        return None
    line = next(iter(evals.values()))
    tokens = line['val_tokens'] + line.get('fixed_train_tokens', 0)
    return Pace(info['config'], statistics.median(speeds), tokens)


def size(config):
    return [config[key] for key in SIZE]


def seconds_left(run, paces):
    """
    How long a run will still take, from runs with the same blocks, else from any of its size. None where
    paces has none. What an evaluation reads takes a third of what training on it would: it goes forward only.
    """
    config = run.config
    alike = [pace for pace in paces if size(pace.config) == size(vars(config))]
    same = [pace for pace in alike if all(pace.config[key] == getattr(config, key)
                                          for key in ('block_types', 'tp_size'))] or alike
    if not same:
        return None
    steps = config.max_iters - latest(run).get('iter', 0)
    windows = config.batch_size * config.gradient_accumulation_steps
    tokens = steps * (windows * config.block_size + same[0].eval_tokens / 3 / config.eval_interval)
    return tokens / statistics.mean(pace.tokens_per_sec for pace in same)


def probe(runs, shares, script):
    """
    The first steps of runs, one on each share at once, in a temporary folder. Returns (paces, errors): the
    Paces found, and of those that failed, in words, why.
    """
    with tempfile.TemporaryDirectory() as folder:
        going, errors = [], []
        try:
            for i, (run, share) in enumerate(zip(runs, shares)):
                there = Path(folder, str(i))
                there.mkdir()
                flags = ['--log_interval=1', '--wandb_log=False', f'--out_dir={there}']
                twin = Run([*run.args, *flags], Config(**vars(run.config) | dict(out_dir=str(there))))
                with open(there / 'log.txt', 'w') as log:
                    going.append((twin, launch(command(twin, False, share, script), share, log)))
            end = time.monotonic() + PROBE_SECONDS
            while (time.monotonic() < end and any(latest(twin).get('iter', 0) < PROBE_STEPS
                                                  and process.poll() is None for twin, process in going)):
                time.sleep(0.2)
            errors = [f'{twin.name} cannot be trained: {reason(twin.out_dir / "log.txt")}'
                      for twin, process in going if process.poll()]     # ended, and not well
        finally:
            for _, process in going:
                process.terminate()
            for _, process in going:
                process.wait()
        paces = [pace for twin, _ in going if (pace := find_pace(twin, max(1, len(shares[0].gpus))))]
    return paces, errors


def measure(runs, shares, script):
    """
    The Paces from which seconds_left can tell of runs, and in words what they rest on. Runs of a size of
    which nothing is known are probed; if a size stays unknown, ([], why). Ends the program where every run
    that was probed failed.
    """
    paces = [pace for run in runs if (pace := find_pace(run, max(1, len(shares[0].gpus))))]
    sources, unknown = [f'the speed of {len(paces)} of these runs so far'] * bool(paces), {}
    for run in runs:
        if standing(run) != 'finished' and seconds_left(run, paces) is None:
            unknown.setdefault(json.dumps(size(vars(run.config))), []).append(run)
    errors = []
    for alike in unknown.values():
        n = len(shares)
        picked = [alike[(2 * i + 1) * len(alike) // (2 * n)] for i in range(n)]
        names = ' and '.join(dict.fromkeys(run.name for run in picked))
        print(f'measuring the speed in the first {PROBE_STEPS} steps of {names}', flush=True)
        found, said = probe(picked, shares, script)
        paces += found
        errors += said
        sources.append('those first steps')
    if errors and not paces:
        fail(errors[0])
    for alike in unknown.values():
        if seconds_left(alike[0], paces) is None:
            return [], errors[0] if errors else f'{alike[0].name} made no two in {PROBE_SECONDS} seconds'
    return paces, ', '.join(sources)


def makespan(durations, jobs):
    """Seconds until tasks of these durations are done, each begun in order as one of so many jobs is free."""
    busy = [0.0] * jobs
    for seconds in durations:
        busy[busy.index(min(busy))] += seconds
    return max(busy)


# running


@dataclass
class Job:
    """A run that is being trained, since when, and of when its checkpoint was then."""
    run: Run
    share: Share
    process: subprocess.Popen
    began: float
    saved: float


class Sweep:
    """The runs on their way: waiting, jobs now, and those that are over."""

    def __init__(self, runs, shares, script=ROOT / 'train.py', paces=()):
        self.script, self.paces = script, paces
        self.finished = [run for run in runs if standing(run) == 'finished']
        self.waiting = [run for run in runs if run not in self.finished]
        self.shares, self.jobs, self.failed, self.elsewhere = list(shares), [], [], set()
        self.common = set.intersection(*(set(run.name.split('-')) for run in runs))
        self.left_at_start = self.left()
        self.estimate = makespan(map(self.to_do, self.waiting), len(shares)) if paces else None
        self.began, self.told = time.monotonic(), time.monotonic()

    def to_do(self, run):
        """What is left of a run: in seconds where all paces are known, else in steps."""
        if self.paces:
            return seconds_left(run, self.paces)
        return run.config.max_iters - latest(run).get('iter', 0)

    def short(self, run):
        """A run's name without what all names have in common."""
        parts = [part for part in run.name.split('-') if part not in self.common]
        return '-'.join(['dense'] * (run.config.tp_size == 1) + parts) or run.name

    def left(self):
        return sum(map(self.to_do, self.waiting + [job.run for job in self.jobs]))

    def say(self, line):
        """A line that stays, above the one that is refreshed."""
        print(('\r\033[K' if sys.stdout.isatty() else '') + line, flush=True)

    def start(self):
        """Starts the first waiting run that no other process has finished or is training."""
        for run in list(self.waiting):
            state = standing(run)
            if state == 'running':
                if run.name not in self.elsewhere:
                    self.elsewhere.add(run.name)
                    self.say(f'left to the process that trains it now: {run.name}')
                continue
            self.waiting.remove(run)
            if state == 'finished':
                self.book(run, 'done by another process')
                continue
            try:
                self.begin(run, state == 'resume')
            except OSError as error:
                self.fail(run, f'it cannot be started: {error.strerror}')
                continue
            return

    def begin(self, run, resume):
        run.out_dir.mkdir(parents=True, exist_ok=True)
        with open(run.out_dir / 'log.txt', 'a') as log:
            process = launch(command(run, resume, self.shares[0], self.script), self.shares[0], log)
        self.jobs.append(Job(run, self.shares.pop(0), process, time.monotonic(), saved_at(run)))
        self.say(f'{"continues" if resume else "starts"}: {run.name}')

    def book(self, run, how, *words):
        """A run is finished."""
        self.finished.append(run)
        self.say(', '.join([f'{how}: {run.name}', f'val loss {loss_of(latest(run), "val")}', *words]))

    def fail(self, run, why):
        """A run has failed; the sweep goes on."""
        self.failed.append(run)
        self.left_at_start -= self.to_do(run)
        self.say(f'FAILED: {run.name}, {why}')

    def end(self, job):
        """Books a job whose process has ended."""
        self.jobs.remove(job)
        self.shares.append(job.share)
        run, status, state = job.run, job.process.returncode, standing(job.run)
        step, log = latest(run).get('iter', 0), run.out_dir / 'log.txt'
        if state == 'finished':
            self.book(run, 'done', duration(time.monotonic() - job.began))
        elif state == 'running':        # another process took the folder first
            self.waiting.append(run)
        elif noted(run).get('state') == 'resumable' and saved_at(run) > job.saved:
            self.waiting.append(run)    # a signal that was not the sweep's
            self.say(f'stopped from outside at step {step}, goes on after the others: {run.name}')
        else:
            how = f'exit status {status}' if status >= 0 else f'killed by {signal.Signals(-status).name}'
            self.fail(run, f'{how}, see {log}: {reason(log)}')

    def eta(self):
        """Seconds until all is done: at first as estimated, then as it goes. None where nobody knows yet."""
        left, elapsed = self.left(), time.monotonic() - self.began
        made = self.left_at_start - left
        if self.estimate is not None and made < self.left_at_start / 20:
            return max(0, self.estimate - elapsed)
        return left * elapsed / made if made > 0 else None

    def progress(self):
        """How far the sweep is, in a line."""
        eta = self.eta()
        failed = f', {len(self.failed)} failed' if self.failed else ''
        left, eta = len(self.waiting) + len(self.jobs), '?' if eta is None else duration(eta)
        parts = [f'{len(self.finished)} done{failed}, {left} left, ETA {eta}']
        for job in self.jobs:
            line = latest(job.run)
            kind = 'train' if 'train_loss' in line else 'val'
            loss = f' {kind} loss {loss_of(line, kind)}' if line else ''
            step = f'{line.get("iter", 0)}/{job.run.config.max_iters}'
            parts.append(f'{self.short(job.run)} {step}{loss}')
        if not self.jobs:
            parts.append('waiting for runs that other processes train')
        return ' | '.join(parts)

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
            for _ in range(min(len(self.waiting), len(self.shares))):
                self.start()
            for job in [job for job in self.jobs if job.process.poll() is not None]:
                self.end(job)
            if self.waiting or self.jobs:
                self.show()
                time.sleep(0.2)
        self.say(f'{len(self.finished)} runs finished, {len(self.failed)} failed'
                 + ''.join(f'\n  FAILED: {run.name}, see {run.out_dir / "log.txt"}' for run in self.failed))

    def stop(self):
        """Has the jobs save and end."""
        for number in ENDING:           # a second one would cut the saving short
            signal.signal(number, signal.SIG_IGN)
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
    parser.add_argument('--dry-run', action='store_true',
                        help='show the plan and how long it will take, and end')
    parser.error = lambda message: fail(f'{message}; see python sweep.py --help')
    args, flags = parser.parse_known_args(argv)
    if args.jobs < 1:
        fail(f'--jobs={args.jobs}: it must be at least 1')
    if not args.script.is_file():
        fail(f'--script={args.script}: there is no such file')
    return args, flags


def show_plan(runs, jobs, machine):
    print(f'{len(runs)} runs, {jobs} at a time, {machine}:')
    for run in runs:
        state, step = standing(run), latest(run).get('iter', 0)
        at = f'at step {step} of ' if state in ('running', 'resume') else ''
        whose = ', by another process' if state == 'running' else ''
        print(f'  {state}, {at}{run.config.max_iters} steps{whose}: {run.out_dir}')


def main(argv):
    args, flags = parse_args(argv)
    configs = args.configs or [os.path.relpath(ROOT / file) for file in RUNS]
    runs = plan(configs, args.withs, parse_grid(flags), args.out)
    gpus = find_gpus() if any(run.config.device == 'cuda' for run in runs) else []
    cores = find_cores()
    parts = shares(args.jobs, gpus, cores)
    show_plan(runs, args.jobs, f'{len(gpus)} GPUs' if gpus else f'{len(cores)} cores, no GPU')
    if not args.dry_run:
        try:
            args.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            fail(f'--out={args.out} cannot be written: {error.strerror}')

    for number in ENDING[1:]:
        signal.signal(number, signal.default_int_handler)       # ends like Ctrl-C
    sweep = None
    try:
        paces, source = measure(runs, parts, args.script)
        sweep = Sweep(runs, parts, args.script, paces)
        if sweep.waiting:
            print(f'about {duration(sweep.estimate)} of training left, from {source}' if paces
                  else f'how long it takes is unknown until runs make steps: {source}', flush=True)
        if args.dry_run:
            return
        sweep.train()
    except KeyboardInterrupt:
        if sweep:
            sweep.stop()
        else:
            print('stopped before a run was started')
        sys.exit(130)
    if sweep.finished:
        print('compare them:', compare_command(runs, args.out), sep='\n  ')
    sys.exit(1 if sweep.failed else 0)


if __name__ == '__main__':
    main(sys.argv[1:])
