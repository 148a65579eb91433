"""
How fast a training step is, config by config: as ratios to the dense control, or sharded over real processes.

    python bench.py --batch_size=1 --block_size=256 --device=cpu --dtype=float32 --compile=False
    python bench.py config/train_gpt2_12comm.py config/train_gpt2_2comm.py --rounds=50 --textbook
    torchrun --standalone --nproc_per_node=8 bench.py --shard --tp_size=2
    torchrun --standalone --nproc_per_node=2 bench.py --shard --decode --prompt=1024 --new=128 --batch=1
    python bench.py --micro_steps=5 --largest
    python bench.py --input --device=cpu
    python bench.py --kept --device=cpu --batch_size=12 --block_size=1024
    python bench.py --kernels --with config/cpu.py --n_embd=256 --batch_size=4 --block_size=512

A step is train.py's own: forward, backward, clip, AdamW, on one micro-batch of random tokens per replica, or
with --micro_steps=N on N of them, which are read from a file as a run reads them (the recipe's step), and
with --largest on about as many windows as fit the GPU beside all these models. The configs take turns within
each round, so that whatever else the machine does affects all of them. Ratios are to the first config if it
is a dense control, else to config/train_gpt2.py. With --block_types, rows are named after their blocks, and
equal ones are measured once.

With --shard each process holds one tensor-parallel rank, and ratios are to TP blocks alone (24comm), since
such a run has no dense control. Every config's step is measured with its network and without: alone, a
process reduces over a group of itself. The difference is its time in collectives, including waits for late
peers. A sweep of all-reduces measures the links, and the cost model's prediction stands beside what was
measured.

--input measures the reading of a step's windows in place of the step, --kept the memory that a step's forward
pass keeps for its backward pass, and --kernels counts what torch.compile makes of the two. --decode measures
generating text, with --textbook beside a loop that recomputes the whole text for each token, with --shard
over the processes of one tensor-parallel group.
--json=FILE keeps the numbers of any of these, unrounded.
"""

import argparse
import gc
import os
import resource
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

from configurator import (
    RUNS,
    add_text_arguments,
    begin_program,
    check_text_arguments,
    fail,
    load_each,
    model_vocab_size,
    read_file,
)

CONTROL, SHARDED_CONTROL = 'config/train_gpt2.py', 'config/train_gpt2_24comm.py'


def parse_args(argv):
    """(args, flags): this script's arguments, and the flags that are keys of the configs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
        epilog='Any other --key=value is a key of the runs; see train.py --help.')
    parser.error = lambda message: fail(f'{message}; see python bench.py --help')
    parser.add_argument('configs', nargs='*', default=RUNS, help='run configs, beside the control')
    parser.add_argument('--with', dest='withs', metavar='FILE', action='append', default=[],
                        help='a config file composed after each; may be repeated')
    parser.add_argument('--rounds', type=int, default=25, help='timed steps of each config')
    parser.add_argument('--vocab_size', type=int, default=model_vocab_size(50257),
                        help="of the model; default: GPT-2's")
    parser.add_argument('--micro_steps', type=int, metavar='N',
                        help="a run's step: N micro-batches, which are read from a file, and one update")
    parser.add_argument('--largest', action='store_true',
                        help='in place of batch_size, about as many windows as fit the GPU beside the models')
    parser.add_argument('--textbook', action='store_true', help='measure a plain textbook step as well')
    parser.add_argument('--profile', type=Path, metavar='FOLDER', help='write profiles of the steps there')
    parser.add_argument('--json', type=Path, metavar='FILE', help='write the results there')
    parser.add_argument('--input', action='store_true', help='measure the reading of windows instead')
    parser.add_argument('--kept', action='store_true', help='measure what a forward pass keeps instead')
    parser.add_argument('--kernels', action='store_true', help='count generated kernels and their bytes')
    parser.add_argument('--shard', action='store_true', help='one tensor-parallel rank per process')
    add_text_arguments(parser, 'measure generating text instead')
    parser.add_argument('--gbit', type=float, help='sharded: predict for a link of this rate, too')
    parser.add_argument('--latency_us', type=float, default=30.0, help='its latency, in microseconds')
    args, flags = parser.parse_known_intermixed_args(argv)
    if args.rounds < 6:
        fail(f'--rounds is {args.rounds}, it must be at least 6 for a 95% interval of a median')
    if args.micro_steps is not None and args.micro_steps < 1:
        fail(f'--micro_steps is {args.micro_steps}, it must be at least 1')
    if args.gbit is not None and not args.gbit > 0:
        fail(f'--gbit is {args.gbit:g}, it must be above 0')
    if not args.latency_us >= 0:
        fail(f'--latency_us is {args.latency_us:g}, it must be at least 0')
    check_text_arguments(args)
    refuse_what_does_nothing(args)
    check_outputs(args)
    return args, flags


def refuse_what_does_nothing(args):
    """Refuse flags that the measurement asked for would ignore."""
    def given(*names):
        return [f'--{name}' for name in names if getattr(args, name)]

    unsharded = given('largest', 'textbook', 'profile', 'input', 'kept', 'kernels')
    if args.shard and unsharded:
        fail(f'{unsharded[0]} is for one process; leave out --shard')
    measurements = given('input', 'kept', 'kernels', 'decode')
    if len(measurements) > 1:
        fail(f'{" and ".join(measurements)} are two measurements; choose one')
    of_steps = given('largest', 'profile', 'micro_steps', *['textbook'] * (not args.decode))
    if measurements and of_steps:
        fail(f'{of_steps[0]} is for measuring steps, not for {measurements[0]}')
    if args.gbit and not args.shard:
        fail('--gbit is for predicting what --shard measures; add --shard')


def check_outputs(args):
    """Refuse a --profile or a --json that cannot be written, before anything is measured."""
    if args.json and (args.json.is_dir() or not args.json.parent.is_dir()):
        fail(f'--json is {args.json}, it must be a file in a folder that exists')
    for name, folder in ('json', args.json and args.json.parent), ('profile', args.profile):
        if folder:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                tempfile.TemporaryFile(dir=folder).close()
            except OSError as error:
                fail(f'--{name} is {getattr(args, name)}, which cannot be written: {error.strerror}')


if __name__ == '__main__':
    begin_program()
    parse_args(sys.argv[1:])  # --help and mistakes are reported before torch is loaded

import torch
import torch._dynamo
import torch.nn.functional as F

from data.corpus import Tokens
from data.dataloader import TrainLoader
from speed.candidates import Candidate, interval, print_results, result, take_turns
from speed.decode import bench_decode
from speed.kernels import bench_kernels
from speed.memory import bench_kept
from speed.sharded import bench_sharded
from training.compiling import autocast
from training.distributed import find_world, keep_freed_memory
from training.rundir import write_json
from variants import gpt_config


class Textbook(Candidate):
    """The dense control as a textbook writes it: all logits, then the loss; AdamW and glibc as they come."""

    def prepare(self, model):
        self.name = 'textbook'
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=self.config.learning_rate)
        self.model = torch.compile(model) if self.config.compile else model

    def step(self):
        batches = self.batches()
        for x, y in batches:
            with autocast(self.config, self.world):
                logits, _ = self.model(x)
                loss = F.cross_entropy(logits.flatten(0, 1), y.flatten()) / len(batches)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def time_step(self):
        if self.world.device.type != 'cpu':
            return super().time_step()
        # an untimed step lets glibc settle under its own rules, another under those of the next candidate
        keep_freed_memory(False)
        self.step()
        super().time_step()
        keep_freed_memory()
        self.step()


def write_profile(candidate, folder):
    """Profile two steps: a table of operations, and a trace for a browser's profiler page."""
    with torch.profiler.profile() as profile:
        candidate.step()
        candidate.step()
    order = 'self_cuda_time_total' if candidate.cuda else 'self_cpu_time_total'
    table = profile.key_averages().table(sort_by=order, row_limit=40, max_name_column_width=80)
    (folder / f'{candidate.name}.txt').write_text(table)
    profile.export_chrome_trace(str(folder / f'{candidate.name}.json.gz'))


def peak_memory(build, windows):
    """Bytes at the peak of a step of each candidate, all others resident; None if they do not fit."""
    try:
        candidates = build(windows)
        torch.cuda.reset_peak_memory_stats()
        for candidate in candidates:
            candidate.step()
    except torch.OutOfMemoryError:
        return None
    return torch.cuda.max_memory_allocated()


def largest_batch(peak, windows, total):
    """
    About the most windows of a micro-batch for which peak(windows) is not None. It begins with `windows`.

    Memory grows linearly, so two measurements say how many fit in `total`; for fragments it takes off a
    sixteenth at a time.
    """
    taken = peak(windows)
    if taken is None:
        fail(f'batch_size={windows} does not fit; --largest needs one that does to begin with')
    more = peak(2 * windows)
    if more is None:
        most = 2 * windows - 1
    else:
        most = int(windows * (1 + (total - taken) / max(1, more - taken)))
    while most > windows and peak(most) is None:
        most -= max(1, most // 16)
    return max(most, windows)


def bench_simulated(configs, args):
    """Print what the configs' steps took, the dense control's first. Returns result() of each."""
    world = find_world(configs[0])
    kinds = [(Candidate, config) for config in configs] + [(Textbook, configs[0])] * args.textbook

    def build(windows):
        if args.largest:  # what the measurement before took is free again
            torch._dynamo.reset()  # compiled code keeps its model alive
            gc.collect()
            torch.cuda.empty_cache()
        for config in configs:
            config.batch_size = windows
        return [kind(config, world, args.vocab_size, args.micro_steps) for kind, config in kinds]

    windows = configs[0].batch_size
    if args.largest:
        if world.device.type != 'cuda':
            fail(f'--largest is about the memory of a GPU, device is {world.device}')
        windows = largest_batch(partial(peak_memory, build), windows, torch.cuda.mem_get_info()[1])
    candidates = build(windows)
    take_turns(candidates, args.rounds)
    if args.profile:
        for candidate in candidates:
            write_profile(candidate, args.profile)
    results = [result(candidate, candidates[0]) for candidate in candidates]
    print_results(results, configs[-1], world, 'dense', args)
    return results


def bench_input(config, args):
    """
    Print what reading a step's windows takes, as a share of a step at 500,000 tokens a second, and what
    memory it adds. The file has OpenWebText's size, 17 GB, as one hole. A run reads while the step before
    computes; here nothing is hidden. Returns the numbers as a dict.
    """
    world, windows = find_world(config), config.batch_size * config.gradient_accumulation_steps
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / 'train.bin'
        path.touch()
        os.truncate(path, 17 * 10**9)
        loader = TrainLoader(Tokens([path], args.vocab_size), config.block_size, windows, config.seed,
                             world.ddp_rank, world.ddp_size, config.batch_size, world.device)
        list(loader.batches(0))
        resident, seconds = peak_resident(), []
        for step in range(1, args.rounds + 1):
            began = time.perf_counter()
            list(loader.batches(step))
            seconds.append(time.perf_counter() - began)
        median, low, high = interval(seconds)
        step_seconds = windows * config.block_size / 500e3
        grown = peak_resident() - resident
    print(f'{windows} windows of {config.block_size} tokens: {median * 1e3:.1f} ms [{low * 1e3:.1f}, '
          f'{high * 1e3:.1f}], {median / step_seconds:.2%} of a step at 500,000 tokens/s; '
          f'{grown:.0f} MiB more memory after {args.rounds} steps than after one')
    return dict(seconds=median, low=low, high=high, share=median / step_seconds, grown_mib=grown)


def peak_resident():
    """The most memory that this process has had, in MiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == 'darwin' else 2**10)  # macOS counts bytes, Linux KiB


def load_configs(args, flags):
    """The Configs to measure, the control first."""
    # the control's blocks are its own, whatever a flag or a file composed after it says
    if args.shard:
        control, last, others = SHARDED_CONTROL, ['--block_types=tp'], args.configs
    else:
        dense = read_file(args.configs[0]).get('tp_size') == 1
        control, last = args.configs[0] if dense else CONTROL, ['--block_types=tp', '--tp_size=1']
        others = [path for path in args.configs if path != control]
    flags = [*args.withs, *flags, *['--shard=True'] * args.shard]
    configs = load_each([[control, *flags, *last], *([path, *flags] for path in others)])
    for config in configs:
        with config.refusing():
            gpt_config(vars(config), args.vocab_size)
    return configs


def measure(configs, args):
    """Print what was asked for. Returns it for --json; None on all processes but rank 0."""
    if args.input:
        return bench_input(configs[0], args)
    if args.kept:
        return bench_kept(configs, args)
    if args.kernels:
        return bench_kernels(configs, args)
    if args.decode:
        return bench_decode(configs, args)
    return (bench_sharded if args.shard else bench_simulated)(configs, args)


def main(argv):
    args, flags = parse_args(argv)
    # compiled, every config is one more graph of one function; torch keeps 8, and would run the rest eagerly
    torch._dynamo.config.recompile_limit = 1000
    configs = load_configs(args, flags)
    processes = find_world(configs[0]).processes
    if processes > 1 and not args.shard:
        fail(f'there are {processes} processes, and each would measure alone: start one without torchrun, or '
             'add --shard, which is for steps and --decode')
    try:
        report = measure(configs, args)
    except torch.OutOfMemoryError:
        fail('out of GPU memory, where the models of all configs stay: name fewer configs, or set a smaller '
             '--batch_size, with --decode a smaller --batch or --prompt')
    if args.json and report:
        write_json(args.json, report)


if __name__ == '__main__':
    main(sys.argv[1:])
