"""
What a run says of itself: run.json at its start, metrics.jsonl while it trains, plain lines or a progress bar
on the terminal, W&B if wanted.
"""

import json
import math
import os
import platform
import re
import sys
import textwrap
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from configurator import communications, fail, mean_over_steps, read_defaults, stages
from training.distributed import attention_kernel, peak_flops
from training.rundir import git_commit, read_plan

# keys of run.json that W&B gets beside the config, to filter and plot by
TRACKED = {'communications', 'parameters', 'tokens_per_step', 'processes', 'device', 'git_commit', 'corpus'}
CHARTS = {'train_loss': 'train/loss', 'val_loss': 'val/loss'}  # W&B's names, if they are not ours


def as_charts(line):
    """
    A line of metrics under W&B's names. Each number of the diagnostics becomes a chart, those of a list by
    sublayer: cka/03 attention, cka/03 mlp ..., cka/12 end. from_charts() is the inverse.
    """
    charts = {CHARTS.get(key, key): value for key, value in line.items() if key != 'diagnostics'}
    for key, value in line.get('diagnostics', {}).items():
        if isinstance(value, list):
            charts |= {f'{key}/{sublayer(i, len(value))}': item for i, item in enumerate(value)
                       if item is not None}
        else:
            charts[f'diagnostics/{key}'] = value
    return charts


def sublayer(i, n):
    """The name of sublayer i among n: attention and MLP of each layer in turn, then the end of the model."""
    part = 'end' if i == n - 1 else ('attention', 'mlp')[i % 2]
    return f'{i // 2:0{len(str(n // 2))}d} {part}'


def from_charts(logged):
    """What W&B has of a line, under the names of metrics.jsonl. W&B may leave out what is None."""
    keys, line, lists, numbers = {chart: key for key, chart in CHARTS.items()}, {}, {}, {}
    for chart, value in logged.items():
        key, _, place = chart.partition('/')
        if found := re.fullmatch(r'(\d+) (attention|mlp|end)', place):
            lists.setdefault(key, {})[2 * int(found[1]) + (found[2] == 'mlp')] = value
        elif key == 'diagnostics':
            numbers[place] = value
        else:
            line[keys.get(chart, chart)] = value
    last = max((i for own in lists.values() for i in own), default=0)
    lists = {key: [own.get(i) for i in range(last + 1)] for key, own in lists.items()}
    earlier = {key: lists.pop(key) for key in ('drift', 'drift_cosine') if key in lists}
    return line | earlier | (dict(diagnostics=lists | numbers) if lists else {})


def finite(value):
    """The value, with None for each number in it that is not finite, which JSON does not have."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def summary(observed, dtype):
    """
    The AllReduces of a pass over one token in float32, for run.json: how many forward and backward; how many
    of the forward ones are blocking and how many hidden; the bytes of all, both ways, in dtype.
    """
    size = sum(size for _, _, size in observed) * getattr(torch, dtype).itemsize // torch.float32.itemsize
    return dict(forward=observed.forward, backward=observed.backward, blocking=observed.blocking,
                hidden=observed.hidden, bytes_per_token=size)


def counts(observed, config):
    """
    What a run communicates, for run.json, from the AllReduces of each of its stages: the guide's count and
    summary(), means over its steps; if the blocks change during the run, those of each stage too.
    """
    each = [dict(step=step, block_types=block_types,
                 communications=communications(block_types, config.tp_size),
                 all_reduces=summary(seen, config.dtype))
            for (step, block_types), seen in zip(stages(vars(config)), observed, strict=True)]

    def mean(values):
        found = mean_over_steps(values, vars(config))
        return int(found) if found.is_integer() else round(found, 2)

    found = dict(communications=mean([one['communications'] for one in each]), all_reduces={
        key: mean([one['all_reduces'][key] for one in each]) for key in each[0]['all_reduces']})
    return found | (dict(stages=each) if len(each) > 1 else {})


def describe(config, corpus, size, net, world):
    """run.json from a run's start on: what it is, and what made it."""
    return dict(
        name=config.wandb_run_name, state='running', iter=0, config=vars(config),
        corpus=dict(name=corpus.name, val_sha256=corpus.meta['splits']['val']['sha256'],
                    **{key: corpus.meta[key] for key in ('corpus', 'tokenizer', 'vocab_size')}),
        **size, teacher_sha256=net.teacher and net.teacher.sha256,
        tokens_per_step=config.batch_size * config.gradient_accumulation_steps * config.block_size,
        processes=world.processes, device=world.device_name,
        attention=attention_kernel(config, world.device), git_commit=git_commit(),
        versions=dict(python=platform.python_version(), torch=torch.__version__, numpy=np.__version__),
        plan=config.plan and read_plan(config.plan), argv=sys.argv[1:])


def introduction(info):
    """The head of a log: what made this run. info: run.json's contents."""
    reduced = info['all_reduces']
    versions = ', '.join(f'{name} {version}' for name, version in info['versions'].items())
    return [f'{info["name"]} -> {info["config"]["out_dir"]}',
            f'{info["parameters"]:,} parameters, {info["communications"]} communications '
            f'({reduced["forward"]} all-reduces forward, {reduced["backward"]} backward)',
            f'{info["corpus"]["corpus"]}, {info["tokens_per_step"]:,} tokens a step',
            f'{info["processes"]} x {info["device"]}, {info["attention"]} attention, {versions}, '
            f'commit {info["git_commit"]}',
            *readable(info['config'])]


def readable(config):
    """A config as lines: what differs from config/defaults.py, and a warning if it never leaves warmup."""
    defaults = {key: default for key, (default, _, _) in read_defaults().items()}
    keys = [f'{key}={json.dumps(value)}' for key, value in config.items() if value != defaults.get(key)]
    words = 'config, beside config/defaults.py: ' + ', '.join(keys)
    lines = textwrap.wrap(words, 110, break_long_words=False)
    if config['decay_lr'] and config['warmup_iters'] >= config['max_iters'] > 0:
        lines.append(f'warning: warmup_iters is {config["warmup_iters"]}, max_iters {config["max_iters"]}: '
                     f'the rate never reaches learning_rate, {config["learning_rate"]:g}')
    return lines


def tags(config, info):
    """What to filter a project's runs by: the count, the block types, the ranks and how they are held."""
    types = sorted({name for _, block_types in stages(vars(config)) for name in block_types})
    if config.tp_size == 1:
        return ['one rank', *types]
    return [f'{info["communications"]} communications', *types,
            f'tp_size {config.tp_size}', 'sharded' if config.shard else 'simulated']


class Log:
    """Does nothing except on rank 0."""

    def __init__(self, config, world, info, state):
        """
        info: run.json's contents. state: the run's Progress; metrics.jsonl is cut to its metrics_bytes, and
        later lines are written again. Ends the program if the file cannot be written.
        """
        self.world, self.info, self.config, self.wandb = world, info, config, None
        self.timed = []  # seconds of each step since the last line
        self.alerted = set()
        if not world.rank0:
            return
        self.bar = tqdm(total=config.max_iters, initial=state.iter, unit='step',
                        disable=not sys.stderr.isatty())
        try:
            self.metrics = self.open_metrics(Path(config.out_dir) / 'metrics.jsonl', state.metrics_bytes)
        except OSError as error:
            fail(f'{error.filename} cannot be written: {error.strerror}')
        if config.wandb_log:
            self.start_wandb(state.wandb_id)

    def open_metrics(self, path, kept):
        """The file, cut to `kept` bytes."""
        path.touch()
        found = path.read_bytes()[:kept]
        found = found[:found.rfind(b'\n') + 1]
        if len(found) < kept:  # somebody changed it: what is left of it ends with a whole line
            self.say(f'warning: {path} is not as the last checkpoint left it; lines may be lost')
        metrics = open(path, 'r+b')
        metrics.truncate(len(found))
        metrics.seek(len(found))
        return metrics

    def say(self, *lines):
        """Lines for people."""
        if self.world.rank0:
            for line in lines:
                self.bar.write(' '.join(line.split()), file=sys.stdout)
            sys.stdout.flush()

    def write(self, **line):
        """One line of metrics, for programs."""
        if not self.world.rank0:
            return
        line = {key: finite(value) for key, value in line.items()}
        try:
            self.metrics.write(json.dumps(line).encode() + b'\n')
            self.metrics.flush()
        except OSError as error:  # what could not be written stays buffered, and goes with a later line
            self.say(f'warning: metrics.jsonl cannot be written now: {error}')
        if self.wandb:
            self.guard_wandb(lambda: self.wandb.log(as_charts(line)))

    def step(self, state, loss, norm, lr):
        """A log line: the last step's loss, gradient norm and rate, and the speed since the line before."""
        config, info, cuda = self.config, self.info, self.world.device.type == 'cuda'
        seconds = sum(self.timed) / len(self.timed)
        speed = info['tokens_per_step'] / seconds
        peak = peak_flops(info['device'], config.dtype)
        mfu = peak and speed * info['flops_per_token'] / (peak * self.world.processes)
        memory = torch.cuda.max_memory_allocated() / 2**30 if cuda else None
        self.timed = []
        self.write(iter=state.iter, train_loss=loss, lr=lr, grad_norm=norm, tokens_per_sec=speed, mfu=mfu,
                   peak_memory_gib=memory, skipped=state.skipped)
        left = timedelta(seconds=round(seconds * (config.max_iters - state.iter)))
        words = [f'train {loss:.4f}', f'lr {lr:.2e}', f'grad norm {norm:.2f}', f'{speed:,.0f} tokens/s']
        if mfu:
            words.append(f'mfu {mfu:.1%}')
        self.progress(state.iter, config.max_iters, ' | '.join([*words, f'{left} left']))

    def evaluation(self, state, tokens, best, extras):
        """A line for an evaluation over `tokens` tokens. extras: further entries of the metrics line."""
        self.write(iter=state.iter, val_loss=state.val_loss, val_tokens=tokens, **extras)
        note = ' (best)' if best else ''
        self.say(f'step {state.iter}: val loss {state.val_loss:.4f} over {tokens:,} tokens{note}')
        if not math.isfinite(state.val_loss):
            self.alert('diverged', f'its validation loss is {state.val_loss} at step {state.iter}')

    def progress(self, step, total, words):
        """How far the run is: on the bar if there is one, else as a line."""
        if self.world.rank0 and self.bar.disable:
            self.say(f'step {step}/{total} | {words}')
        elif self.world.rank0:
            self.bar.set_postfix_str(words, refresh=False)
            self.bar.update(step - self.bar.n)

    def size(self):
        """The bytes of all metrics so far, whether on the disk or in the buffer."""
        return self.metrics.tell()

    def flush(self):
        """Put the metrics on the disk. Raises OSError if it refuses them."""
        self.metrics.flush()
        os.fsync(self.metrics.fileno())

    def alert(self, what, text):
        """A message by W&B to whoever follows the run; the first of a kind only."""
        if self.world.rank0 and self.wandb and what not in self.alerted:
            self.alerted.add(what)
            self.guard_wandb(lambda: self.wandb.alert(title=f'{self.info["name"]} {what}', text=text))

    def close(self, exit_code):
        if self.world.rank0:
            if exit_code == 0:
                self.alert('finished', f'validation loss {self.info.get("val_loss")}, {self.config.out_dir}')
            else:
                self.alert('stopped', f'exit status {exit_code}; --init_from=resume continues it')
            self.bar.close()
            try:
                self.metrics.close()
            except OSError as error:
                self.say(f'warning: the last lines of metrics.jsonl could not be written: {error}')
            if self.wandb:
                self.guard_wandb(lambda: self.wandb.finish(exit_code))

    def start_wandb(self, wandb_id):
        """Open the W&B run, or resume the one of that id. Without a key or a network it is kept offline."""
        config, info = self.config, self.info
        os.environ.setdefault('WANDB_SILENT', 'true')
        # its service starts slowly on a busy machine, and W&B would give up after 30 s, for the whole run
        os.environ.setdefault('WANDB_X_SERVICE_WAIT', '300')
        reduced = {f'all_reduces_{way}': count for way, count in info['all_reduces'].items()}
        tracked = {key: value for key, value in info.items() if key in TRACKED} | info['config'] | reduced
        settings = dict(
            project=config.wandb_project, name=config.wandb_run_name, config=tracked, dir=config.out_dir,
            id=wandb_id, resume='allow', group=info['corpus']['name'], job_type='train',
            tags=tags(config, info))
        try:
            import wandb
            try:
                trouble = '' if 'WANDB_MODE' in os.environ or wandb.login(prompt=False) else 'has no key here'
                self.wandb = wandb.init(**settings, mode='offline' if trouble else None)
            except Exception as error:  # no network, a key that is refused, a service that does not start
                trouble = f'cannot be reached ({type(error).__name__})'
                self.wandb = wandb.init(**settings, mode='offline')
            if trouble:
                self.say(f'warning: W&B {trouble}, the run is logged offline; after `wandb login`, '
                         f'`wandb sync {config.out_dir}/wandb/offline-run-*` uploads it')
            self.wandb.define_metric('iter')
            # W&B drops what comes at a lower step of its own than it has seen; against iter nothing is lost
            self.wandb.define_metric('*', step_metric='iter')
            self.wandb.define_metric('val/loss', step_metric='iter', summary='min,last')
        except Exception as error:  # training needs no W&B, however it fails
            self.say(f'warning: W&B is off for this run, {type(error).__name__}: {error}')
            self.wandb = None

    def guard_wandb(self, call):
        """Training outlives W&B: the first failure is logged and turns it off."""
        try:
            call()
        except Exception as error:
            self.say(f'warning: W&B failed and is off from here on, {type(error).__name__}: {error}')
            self.wandb = None
