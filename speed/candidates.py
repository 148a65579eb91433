"""
What is timed, and how: candidates take turns, and each is a ratio to a control with its 95% interval.
"""

import shutil
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from scipy import stats

from data.corpus import TOKEN, Tokens
from data.dataloader import TrainLoader
from model import GPT
from train import Network, build_model, train_step
from training.distributed import attention_kernel, peak_flops
from variants import gpt_config

WARMUP = 3  # rounds before the timed ones


class Candidate:
    """A config's network and the seconds that its training steps took."""

    def __init__(self, config, world, vocab_size, micro_steps=None):
        """micro_steps: micro-batches of a step, which are read from a file; None: one, which is there."""
        self.config, self.name, self.world = config, config.wandb_run_name, world
        self.cuda = world.device.type == 'cuda'
        resident = torch.cuda.memory_allocated() if self.cuda else 0  # by the candidates before this one
        model_config = gpt_config(vars(config), vocab_size)
        with torch.device('meta'):
            self.flops_per_token = GPT(model_config).flops_per_token()  # of all ranks, sharded or not
        self.prepare(build_model(config, model_config, world)[0])
        self.windows = config.batch_size * (micro_steps or 1)  # of a step, in this process
        self.loader = micro_steps and random_loader(config, world, vocab_size, micro_steps)
        shape = (config.batch_size, config.block_size + 1)
        tokens = torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(0)).to(world.device)
        self.batch = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()  # (B, T) each
        self.steps = 0
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        for _ in range(WARMUP):
            self.step()
        self.memory = (torch.cuda.max_memory_allocated() - resident) / 2**30 if self.cuda else None
        self.seconds = []

    def prepare(self, model):
        self.net = Network(model, self.config)
        self.net.wrap(self.config.batch_size, self.config, self.world, self.world.say)

    def batches(self):
        """The micro-batches of the next step."""
        self.steps += 1
        return list(self.loader.batches(self.steps)) if self.loader else [self.batch]

    def step(self):
        train_step(self.net, self.batches(), self.config.learning_rate, self.config, self.world)

    def time_step(self):
        if self.cuda:  # as in a run, where the host is a step ahead
            self.step()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            self.step()
            end.record()
            end.synchronize()
            self.seconds.append(begin.elapsed_time(end) / 1e3)
        else:
            began = time.perf_counter()
            self.step()
            self.seconds.append(time.perf_counter() - began)


def random_loader(config, world, vocab_size, micro_steps):
    """A run's TrainLoader, of a file of random tokens."""
    path = Path(tempfile.mkdtemp()) / 'train.bin'
    tokens = np.random.default_rng(0).integers(0, vocab_size, 2**21 + config.block_size, dtype=TOKEN)
    path.write_bytes(tokens.tobytes())
    windows = config.batch_size * micro_steps * world.ddp_size
    loader = TrainLoader(Tokens([path], vocab_size), config.block_size, windows, config.seed, world.ddp_rank,
                         world.ddp_size, config.batch_size, world.device)
    shutil.rmtree(path.parent)  # the loader has the file open
    return loader


def take_turns(candidates, rounds):
    """Time a step of each candidate per round, in alternating order. Collective if processes are joined."""
    for i in range(rounds):
        for candidate in candidates[::1 if i % 2 else -1]:
            if dist.is_initialized():
                dist.barrier()  # all processes start together
            candidate.time_step()


def interval(values):
    """(median, low, high): the median and its 95% interval, from order statistics."""
    bounds = stats.quantile_test(values, q=statistics.median(values)).confidence_interval()
    return statistics.median(values), float(bounds.low), float(bounds.high)


def result(candidate, control):
    """What was measured of a candidate, as a dict: times, memory, the ratio to the control, its interval."""
    config, world, seconds = candidate.config, candidate.world, statistics.median(candidate.seconds)
    ratio, low, high = interval([ours / theirs for ours, theirs in zip(candidate.seconds, control.seconds)])
    speed = world.ddp_size * candidate.windows * config.block_size / seconds
    peak = peak_flops(world.device_name, config.dtype)
    mfu = peak and speed * candidate.flops_per_token / (peak * world.processes)
    return dict(name=candidate.name, step_seconds=seconds, tokens_per_sec=speed, ratio=ratio, low=low,
                high=high, mfu=mfu, peak_memory_gib=candidate.memory)


def case(config, device):
    """What the configs of a bench have in common, in words."""
    return (f'{config.dtype}, {"compiled" if config.compile else "eager"}, '
            f'{attention_kernel(config, device)} attention, batch {config.batch_size} x {config.block_size}, '
            f'n_embd {config.n_embd}, tp_size {config.tp_size}, torch {torch.__version__}')


def print_results(results, config, world, control, args):
    """Print result() of each candidate. config: one of those measured; control: the name of the control."""
    steps = f'{args.micro_steps} micro-batches a step with their reading, ' if args.micro_steps else ''
    print(f'{world.processes} x {world.device_name}, {case(config, world.device)}, {steps}'
          f'{torch.get_num_threads()} threads, {args.rounds} rounds')
    print(f'{"config":28} {"ms a step":>10} {"tokens/s":>10} {"ratio to " + control:>15} '
          f'{"95% interval":>15} {"MFU":>6} {"GiB":>6}')
    for row in results:
        mfu = f'{row["mfu"]:.1%}' if row['mfu'] else '-'
        memory = f'{row["peak_memory_gib"]:.1f}' if row['peak_memory_gib'] is not None else '-'
        print(f'{row["name"]:28} {row["step_seconds"] * 1e3:10.1f} {row["tokens_per_sec"]:10,.0f} '
              f'{row["ratio"]:15.3f} {row["low"]:9.3f}-{row["high"]:.3f} {mfu:>6} {memory:>6}')
