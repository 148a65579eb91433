"""
What the runs of a sweep will take: time, disk, and the seeds that it needs to say something. Without torch,
except for the estimate from a GPU's peak.

A run here has a config, an out_dir, and `dense`, whether it is the control.
"""

import json
import statistics
from dataclasses import dataclass
from datetime import timedelta
from functools import cache

from configurator import ROOT, VARIED, fail, model_vocab_size, recipe
from training import rundir

# what a step's time depends on most
SIZE = ('dataset', 'n_layer', 'n_head', 'n_embd', 'block_size', 'batch_size', 'gradient_accumulation_steps',
        'dropout', 'bias', 'device', 'dtype', 'compile', 'shard')
MFU = 0.4  # the part of a GPU's peak that an estimate assumes; GPT-2 (124M) reached 0.39 to 0.45 on an H200
VOCAB_SIZE = 50304  # of the model, on GPT-2's tokens

# time


def duration(seconds):
    return str(timedelta(seconds=round(seconds)))


@dataclass
class Pace:
    """How fast a run trains: tokens per second in its steps, tokens that an evaluation reads."""
    config: dict  # of the run that was so fast
    tokens_per_sec: float
    eval_tokens: int


def find_pace(out_dir, processes):
    """The Pace of the run in a folder; None if its files do not show it, or it had other processes."""
    try:
        info = rundir.read_info(out_dir) or {}
        evals, logs = rundir.read_metrics(out_dir)
    except (OSError, ValueError, SystemExit):  # a damaged file must not end a sweep for the sake of its ETA
        return None
    speeds = [line['tokens_per_sec'] for line in logs.values() if line.get('tokens_per_sec')]
    # the first one includes start-up; a run of a few steps has no other
    speeds = speeds[1:] or speeds * (info.get('state') == 'finished')
    if info.get('processes') != processes or not evals or not speeds:
        return None
    line = next(iter(evals.values()))
    tokens = line.get('val_tokens', 0) + line.get('fixed_train_tokens', 0)
    return Pace(info['config'], statistics.median(speeds), tokens)


def peak_of(gpu, dtype='bfloat16'):
    """A GPU's peak in FLOP/s, None if it is not known for the dtype. Ends the program at an unknown name."""
    from training.distributed import PEAK_FLOPS, peak_flops  # which takes torch
    if peak_flops(gpu, 'bfloat16') is None:
        fail(f'--gpu is {gpu}, it must be one of {", ".join(PEAK_FLOPS)}')
    return peak_flops(gpu, dtype)


def estimate_pace(config, gpu, gpus):
    """The Pace of a config at MFU of the peak of so many GPUs, by PaLM's count; None if there is no peak."""
    import torch

    from model import GPT
    from variants import gpt_config
    peak = peak_of(gpu, config.dtype)
    if peak is None:
        return None
    with torch.device('meta'), config.refusing():
        flops_per_token = GPT(gpt_config(vars(config), vocab_size(config.dataset))).flops_per_token()
    return Pace(vars(config), gpus * MFU * peak / flops_per_token,
                config.eval_tokens + config.eval_train_tokens)


def makespan(durations, jobs):
    """Seconds until tasks of these durations are done, started in order, `jobs` at a time."""
    busy = [0.0] * jobs
    for seconds in durations:
        busy[busy.index(min(busy))] += seconds
    return max(busy)


class Forecast:
    """How long runs take, a number of jobs at a time on equal shares of a machine."""

    def __init__(self, gpus=0, cores=1, jobs=1, gpu=None):
        """gpus, cores: how many there are. gpu: the name of the GPUs, to estimate what was not measured"""
        self.devices, self.unit = (gpus, 'GPU') if gpus else (cores, 'core')
        self.processes, self.jobs, self.gpu = max(1, gpus // jobs), jobs, gpu
        self.paces = {}  # by the run's folder
        self.estimated = False  # whether any time rests on the peak of the GPU

    def measure(self, runs):
        """Read the paces of these runs from their folders."""
        found = {run.out_dir: find_pace(run.out_dir, self.processes) for run in runs}
        self.paces.update((folder, pace) for folder, pace in found.items() if pace)

    def seconds(self, config, steps):
        """
        The time of so many steps, at the mean pace of the runs with the same blocks; if there are none, of
        all runs of its size; if there are none, at the estimated one; None if nothing is known.
        """
        alike = [pace for pace in self.paces.values()
                 if all(pace.config[key] == getattr(config, key) for key in SIZE)]
        blocks = 'block_types', 'block_types_at', 'tp_size'
        same = [pace for pace in alike
                if all(pace.config[key] == getattr(config, key) for key in blocks)] or alike
        if not same and self.gpu and config.device.startswith('cuda'):
            same = [pace for pace in [estimate_pace(config, self.gpu, self.processes)] if pace]
            self.estimated |= bool(same)
        if not same:
            return None
        windows = config.batch_size * config.gradient_accumulation_steps
        # an evaluation only goes forward, so a token costs it about a third of what it costs a step
        per_step = windows * config.block_size + same[0].eval_tokens / 3 / config.eval_interval
        return steps * per_step / statistics.mean(pace.tokens_per_sec for pace in same)

    def time(self, times):
        """In words, how long runs of these times in seconds (None: unknown) take, started in order."""
        known = [seconds for seconds in times if seconds is not None]
        if times and not known:
            return 'unknown'
        return 'over ' * (len(known) < len(times)) + duration(makespan(known, self.jobs))

    def cost(self, times):
        """The same, and the hours of GPUs or cores, unless they are next to none."""
        hours = sum(filter(None, times)) * self.devices / self.jobs / 3600
        return self.time(times) + f', {hours:,.1f} {self.unit}-hours' * (hours >= 0.05)

    def basis(self):
        """What the times rest on, in words."""
        if not self.estimated:
            return 'at the speed of these runs so far'
        return (f'an estimate where no run has shown its speed: at {MFU:.0%} of the peak of {self.gpu}, '
                f'{peak_of(self.gpu) / 1e12:g} TFLOP/s, whatever the blocks, without start-up and compiling')


# disk


@cache
def vocab_size(dataset):
    """The model's on this dataset; GPT-2's if the data are not here."""
    try:
        meta = json.loads((ROOT / 'data' / dataset / 'meta.json').read_bytes())
        return model_vocab_size(meta['vocab_size'])
    except (OSError, ValueError, KeyError, TypeError):
        return VOCAB_SIZE


def parameters(config):
    """The parameters of a run's model, by the shapes of GPT-2, with or without biases."""
    C, bias = config.n_embd, config.bias
    layer = 12 * C**2 + 2 * C + bias * 11 * C
    return (vocab_size(config.dataset) + config.block_size + 1 + bias) * C + config.n_layer * layer


def checkpoint_bytes(config):
    """The size of a checkpoint: weights and two moments, in float32."""
    return 12 * parameters(config)


def disk_left(run):
    """The bytes that a run's checkpoints will take, at most, beyond those that it has."""
    found = [path.stat() for path in run.out_dir.glob('ckpt*.pt')]
    files = {stat.st_ino: stat.st_size for stat in found}  # some are links
    most = (3 + run.config.keep_checkpoints) * checkpoint_bytes(run.config)  # latest, previous and best
    return max(0, most - sum(files.values()))


# seeds

USUAL_SD = {64: 0.013, 128: 0.024, 256: 0.015}  # by n_embd: of one paired difference on bytes, nats per token
OTHER_SD = 0.016


def families(runs):
    """The runs of each recipe: {what sets it apart from the others, in words: runs}."""
    recipes = {}
    for run in runs:
        recipes.setdefault(json.dumps(recipe(vars(run.config)), sort_keys=True), []).append(run)
    found = [json.loads(text) for text in recipes]
    apart = [key for key in found[0] if any(other[key] != found[0][key] for other in found)]
    return {', '.join(f'{key} {one[key]}' for key in apart): own
            for one, own in zip(found, recipes.values())}


def config_key(run):
    """What a run shares with its like of other seeds, within a family."""
    varied = {key: getattr(run.config, key) for key in VARIED - {'seed'}}
    return 'dense' if run.dense else json.dumps(varied, sort_keys=True)


def is_all_tp(run):
    """Whether a run computes the control's function with several ranks: it is no comparison."""
    config = run.config
    return (set(config.block_types) == {'tp'} and config.merge == 'sum' and not config.perturb
            and config.embed_scale == 1 and not config.block_types_at and not run.dense)


def spread_of(runs):
    """The standard deviation of a paired difference of a family and what it rests on, in words."""
    from analysis.verdicts import family_spread
    losses = {}
    for run in runs:
        info = rundir.read_info(run.out_dir) or {}
        if info.get('state') == 'finished' and info['val_loss'] is not None:
            losses.setdefault(config_key(run), {})[run.config.seed] = info['val_loss']
    identical = {config_key(run) for run in runs if is_all_tp(run)}
    spread = family_spread(losses, 'dense', identical) if 'dense' in losses else None
    if spread and spread.s:
        return float(spread.pooled_sd), f'of the finished runs, {spread.df} degrees of freedom'
    width = runs[0].config.n_embd
    usual = f'as seen at width {width}' if width in USUAL_SD else 'as seen at other widths'
    return USUAL_SD.get(width, OTHER_SD), f'{usual}, until these runs show their own'


def describe_seeds(runs, difference, forecast):
    """
    Lines that say, for each family of a plan, how many seeds detect a difference (nats per token) and show a
    config to be as good within the margin, and what they take.
    """
    from analysis.verdicts import MARGIN, seeds_to_detect, seeds_to_show
    lines = []
    for label, own in families(runs).items():
        configs = {}  # Dunnett's test is over the configs of one tp_size
        for run in own:
            if not run.dense and not is_all_tp(run):
                configs.setdefault(run.config.tp_size, set()).add(config_key(run))
        if not configs:
            continue
        most = max(map(len, configs.values()))
        sd, basis = spread_of(own)
        seeds = {run.config.seed for run in own}
        one = [run.config for run in own if run.config.seed == own[0].config.seed]
        times = [forecast.seconds(config, config.max_iters) for config in one]
        label += ': ' * bool(label)
        lines.append(f'{label}a paired difference has standard deviation {sd:.3g}, {basis}; this plan has '
                     f'{len(seeds)} seed{"s" * (len(seeds) > 1)}')
        for words, count in (
                (f'to detect {difference:g} with 80% power (Dunnett over {most})',
                 seeds_to_detect(difference, sd, most)),
                (f'to show as good within {MARGIN:g} with 90% power, at no difference',
                 seeds_to_show(MARGIN, sd, most))):
            lines.append(f'  {words}: {count} seeds, {forecast.cost(times * count)}')
    return lines
