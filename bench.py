"""
How fast a training step is, config by config: as ratios to the dense control, or sharded over real processes.

    python bench.py --batch_size=1 --block_size=256 --device=cpu --dtype=float32 --compile=False
    python bench.py config/train_gpt2_12comm.py config/train_gpt2_2comm.py --rounds=50 --textbook
    torchrun --standalone --nproc_per_node=8 bench.py --shard --tp_size=2
    python bench.py --input --device=cpu
    python bench.py --kept --device=cpu --batch_size=12 --block_size=1024

A step is train.py's own: forward, backward, clip, AdamW, on one micro-batch of random tokens a data-parallel
process. The configs take turns within each round, so that whatever else the machine does meets all of them.
The first config is what ratios are to where it is a dense control, else config/train_gpt2.py is.

With --shard each process hosts one tensor-parallel rank, and ratios are to 24comm, for there is no dense
control in such a run. Every config's step is measured with its network and without: alone, a process reduces
over a group of itself. What a step takes more than that is its time in collectives, waits for late peers
included. A sweep of all-reduces measures the links, and what costmodel.py predicts stands beside what was
measured. --input measures the reading of a step's windows in place of the step, and --kept the memory that
a step's forward pass leaves for its backward pass. The last line is JSON.
"""

import argparse
import json
import os
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path

from configurator import RUNS, communications, fail, load


def parse(argv):
    """(options, flags): what the command line says to this script, and what to the configs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
        epilog='Any other --key=value is a key of the runs; see train.py --help.')
    parser.error = fail
    parser.add_argument('configs', nargs='*', default=RUNS, help='run configs, beside the control')
    parser.add_argument('--with', dest='also', metavar='FILE', action='append', default=[],
                        help='a config file composed after each; may be repeated')
    parser.add_argument('--rounds', type=int, default=25, help='timed steps of each config')
    parser.add_argument('--vocab_size', type=int, help="of the model; GPT-2's where not given")
    parser.add_argument('--textbook', action='store_true', help='measure a plain textbook step as well')
    parser.add_argument('--profile', type=Path, metavar='FOLDER', help='write where the time goes to there')
    parser.add_argument('--input', action='store_true', help='measure the reading of windows instead')
    parser.add_argument('--kept', action='store_true', help='measure what a forward pass keeps instead')
    parser.add_argument('--shard', action='store_true', help='one tensor-parallel rank a process')
    parser.add_argument('--gbit', type=float, help='sharded: predict for a link of so many Gbit/s, too')
    parser.add_argument('--latency_us', type=float, default=30.0, help='of a message over that link')
    options, flags = parser.parse_known_intermixed_args(argv)
    if options.rounds < 6:
        fail(f'--rounds={options.rounds}: a 95% interval of a median needs at least 6')
    if options.gbit is not None and not (options.gbit > 0 and options.latency_us >= 0):
        fail(f'--gbit={options.gbit:g} --latency_us={options.latency_us:g}: no link is like that')
    alone = [name for name in ('textbook', 'profile', 'input', 'kept') if getattr(options, name)]
    if options.shard and alone:
        fail(f'--{alone[0]} is for one process; leave out --shard')
    if options.input and options.kept:
        fail('--input and --kept are two measurements; choose one')
    return options, flags


if __name__ == '__main__':
    parse(sys.argv[1:])                 # --help and mistakes are told before torch is loaded

import torch
import torch._dynamo
import torch.distributed as dist
import torch.nn.functional as F
from scipy import stats

from speed import costmodel
from data.corpus import Tokens
from data.dataloader import TrainLoader
from model import GPT
from train import (
    Network, Place, autocast, connect, disconnect, find_place, keep_freed_memory, model_config_of, peak_flops,
    train_step)

CONTROL, SHARDED_CONTROL = 'config/train_gpt2.py', 'config/train_gpt2_24comm.py'
WARMUP = 3                              # rounds before the timed ones


class Candidate:
    """A config's model and optimizer, and what its steps took."""

    def __init__(self, config, place, vocab_size, ranks=None, ddp_group=None):
        """ranks, ddp_group: as train.connect() gives them"""
        self.config, self.name, self.place, device = config, config.wandb_run_name, place, place.device
        self.cuda = device.type == 'cuda'
        resident = torch.cuda.memory_allocated() if self.cuda else 0    # by the candidates before this one
        torch.manual_seed(config.seed)
        dense = GPT(model_config_of(config, vocab_size))
        self.flops_per_token = dense.flops_per_token()
        self.prepare((dense if ranks is None else dense.shard(ranks)).to(device), ddp_group)
        shape = (config.batch_size, config.block_size + 1)
        tokens = torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(0)).to(device)
        self.batch = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        for _ in range(WARMUP):
            self.step()
        self.memory = (torch.cuda.max_memory_allocated() - resident) / 2**30 if self.cuda else None
        self.seconds = []

    def prepare(self, model, ddp_group):
        self.net = Network(model, self.config)
        say = print if self.place.first else lambda line: None
        self.net.wrap(self.config.batch_size, ddp_group, self.config, self.place, say)

    def step(self):
        train_step(self.net, [self.batch], self.config.learning_rate, self.config, self.place)

    def time_step(self):
        began = time.perf_counter()
        self.step()
        if self.cuda:
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - began)


class Textbook(Candidate):
    """
    The dense control as a textbook writes it: all logits, then the cross-entropy; AdamW as it comes, and the
    C library too.
    """

    def prepare(self, model, ddp_group):
        self.name = 'textbook'
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=self.config.learning_rate)
        self.model = torch.compile(model) if self.config.compile else model

    def step(self):
        x, y = self.batch
        with autocast(self.config, self.place):
            logits, _ = self.model(x)
            loss = F.cross_entropy(logits.flatten(0, 1), y.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def time_step(self):
        if self.place.device.type != 'cpu':
            return super().time_step()
        # a step settles what the library holds under its own rules, another what the next candidate finds
        keep_freed_memory(False)
        self.step()
        super().time_step()
        keep_freed_memory()
        self.step()


def take_turns(candidates, rounds):
    """A timed step of each candidate a round, there and back."""
    for i in range(rounds):
        for candidate in candidates[::1 if i % 2 else -1]:
            if dist.is_initialized():
                dist.barrier()          # all processes start together
            candidate.time_step()


def interval(values):
    """(median, low, high): the median and its 95% interval, from order statistics."""
    bounds = stats.quantile_test(values, q=statistics.median(values)).confidence_interval()
    return statistics.median(values), float(bounds.low), float(bounds.high)


def result(candidate, control):
    """What was measured of a candidate: time in seconds, memory in GiB, ratio to the control."""
    config, place, seconds = candidate.config, candidate.place, statistics.median(candidate.seconds)
    ratio, low, high = interval([ours / theirs for ours, theirs in zip(candidate.seconds, control.seconds)])
    speed = place.ddp_size * config.batch_size * config.block_size / seconds
    peak = peak_flops(place.device_name, config.dtype)
    mfu = peak and speed * candidate.flops_per_token / (peak * place.processes)
    return dict(name=candidate.name, step_seconds=seconds, tokens_per_sec=speed, ratio=ratio, low=low,
                high=high, mfu=mfu, peak_memory_gib=candidate.memory)


def case(config):
    """What the configs of a bench have in common, in words."""
    return (f'{config.dtype}, {"compiled" if config.compile else "eager"}, '
            f'batch {config.batch_size} x {config.block_size}, n_embd {config.n_embd}, '
            f'tp_size {config.tp_size}, torch {torch.__version__}')


def print_results(results, config, place, control, rounds):
    """The table of the benches of a step. config: one that was measured; control: what ratios are to."""
    print(f'{place.processes} x {place.device_name}, {case(config)}, {torch.get_num_threads()} threads, '
          f'{rounds} rounds')
    print(f'{"config":28} {"ms a step":>10} {"tokens/s":>10} {"ratio to " + control:>15} '
          f'{"95% interval":>15} {"MFU":>6} {"GiB":>6}')
    for row in results:
        mfu = f'{row["mfu"]:.1%}' if row['mfu'] else '-'
        memory = f'{row["peak_memory_gib"]:.1f}' if row['peak_memory_gib'] is not None else '-'
        print(f'{row["name"]:28} {row["step_seconds"] * 1e3:10.1f} {row["tokens_per_sec"]:10,.0f} '
              f'{row["ratio"]:15.3f} {row["low"]:9.3f}-{row["high"]:.3f} {mfu:>6} {memory:>6}')


def write_profile(candidate, folder):
    """Where the time of two steps goes, by operation: a table, and a trace for a browser's profiler page."""
    with torch.profiler.profile() as profile:
        candidate.step()
        candidate.step()
    folder.mkdir(parents=True, exist_ok=True)
    order = 'self_cuda_time_total' if candidate.cuda else 'self_cpu_time_total'
    table = profile.key_averages().table(sort_by=order, row_limit=40, max_name_column_width=80)
    (folder / f'{candidate.name}.txt').write_text(table)
    profile.export_chrome_trace(str(folder / f'{candidate.name}.json.gz'))


def bench_simulated(configs, options):
    """Prints what the configs took, the dense control first."""
    place = find_place(configs[0])
    if place.processes > 1:
        fail(f'{place.processes} processes, of which this would measure one; add --shard')
    candidates = [Candidate(config, place, options.vocab_size) for config in configs]
    if options.textbook:
        candidates.append(Textbook(configs[0], place, options.vocab_size))
    take_turns(candidates, options.rounds)
    if options.profile:
        for candidate in candidates:
            write_profile(candidate, options.profile)
    results = [result(candidate, candidates[0]) for candidate in candidates]
    print_results(results, configs[-1], place, 'dense', options.rounds)
    print(json.dumps(results))


def bench_input(config, options):
    """
    Prints what reading a step's windows takes, of a file of 17 GB (without holes it would be OpenWebText's
    size), as a share of the step at 500,000 tokens a second, and what memory that adds. A run hides this
    behind the step before it; here nothing is hidden.
    """
    place, windows = find_place(config), config.batch_size * config.gradient_accumulation_steps
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / 'train.bin'
        path.touch()
        os.truncate(path, 17 * 10**9)
        loader = TrainLoader(Tokens([path], options.vocab_size), config.block_size, windows, config.seed,
                             place.ddp_rank, place.ddp_size, config.batch_size, place.device)
        list(loader.batches(0))
        resident, seconds = peak_resident(), []
        for step in range(1, options.rounds + 1):
            began = time.perf_counter()
            list(loader.batches(step))
            seconds.append(time.perf_counter() - began)
        median, low, high = interval(seconds)
        step_seconds = windows * config.block_size / 500e3
        grown = peak_resident() - resident
    print(f'{windows} windows of {config.block_size} tokens: {median * 1e3:.1f} ms [{low * 1e3:.1f}, '
          f'{high * 1e3:.1f}], {median / step_seconds:.2%} of a step at 500,000 tokens/s; '
          f'{grown:.0f} MiB more memory after {options.rounds} steps than after one')
    print(json.dumps(dict(seconds=median, low=low, high=high, share=median / step_seconds, grown_mib=grown)))


def kept_tensors(model, windows, config, place):
    """The tensors, one a storage, that a forward pass of so many windows keeps, the parameters apart."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    torch._dynamo.reset()               # or the second batch size would get a graph for any size
    fast = torch.compile(model) if config.compile else model
    idx = torch.zeros(windows, config.block_size, dtype=torch.long, device=place.device)
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = tensor
        return tensor

    with autocast(config, place):
        fast(idx, idx)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            fast(idx, idx)
    return list(kept.values())


def bench_kept(configs, options):
    """
    Prints what a micro-batch's forward pass keeps for its backward pass, beside the parameters with their
    gradients and AdamW's two moments, and the float32 tensors of (B, T, V) among it. One window and two are
    run: what a window keeps, every further one keeps.
    """
    place, rows = find_place(configs[0]), []
    for config in configs:
        torch.manual_seed(config.seed)
        model = GPT(model_config_of(config, options.vocab_size)).to(place.device)
        one, two = (kept_tensors(model, windows, config, place) for windows in (1, 2))
        sizes = [sum(tensor.untyped_storage().nbytes() for tensor in tensors) for tensors in (one, two)]
        logits = [tensor for tensor in one if tensor.dtype == torch.float32
                  and tensor.numel() >= config.block_size * options.vocab_size]
        kept = sizes[0] + (sizes[1] - sizes[0]) * (config.batch_size - 1)
        state = 4 * sum(p.nbytes for p in model.parameters())
        rows.append(dict(name=config.wandb_run_name, tp_size=config.tp_size, kept_gib=kept / 2**30,
                         step_gib=(kept + state) / 2**30, float32_logits=len(logits)))
    print(case(config))
    print(f'{"config":28} {"kept, GiB":>10} {"with state":>11} {"ratio to dense":>15} {"float32 logits":>15}')
    for row in rows:
        row['ratio'] = row['step_gib'] / rows[0]['step_gib']
        print(f'{row["name"]:28} {row["kept_gib"]:10.3f} {row["step_gib"]:11.3f} {row["ratio"]:15.3f} '
              f'{row["float32_logits"]:15}')
    print(json.dumps(rows))


def peak_resident():
    """The most memory that this process has had, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


# sharded: each config with its network and without, and the links


def keep_slowest(candidates, place):
    """Every step's seconds become those of the process that took longest. A collective call."""
    seconds = torch.tensor([candidate.seconds for candidate in candidates], dtype=torch.float64,
                           device=place.device)
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    for candidate, row in zip(candidates, seconds.tolist()):
        candidate.seconds = row


def sharded_result(networked, alone, control, links, rings):
    """result() and the time in collectives, what was all-reduced, and what the cost model predicts."""
    config, row = networked.config, result(networked, control)
    compute = statistics.median(alone.seconds)
    messages = costmodel.observe_step(networked.net.raw, networked.step)
    return dict(
        row, communications=communications(config.block_types, config.tp_size),
        all_reduces=costmodel.by_kind(messages), compute_seconds=compute,
        collectives_share=1 - compute / row['step_seconds'],
        predicted_seconds=costmodel.predict(compute, messages, links),
        predicted_on_given_link=rings and costmodel.predict(compute, messages, rings))


def print_predictions(results, options):
    """What was measured beside what the cost model predicts, in milliseconds and as ratios to 24comm."""
    given = f'predicted at {options.gbit:g} Gbit/s, {options.latency_us:g} us' if options.gbit else ''
    print(f'{"config":28} {"comms":>5} {"compute":>9} {"in collectives":>15} {"measured":>9} '
          f'{"predicted":>10} {"ratio":>6} {"predicted":>10}  {given}')
    control = results[0]
    for row in results:
        print(f'{row["name"]:28} {row["communications"]:5} {row["compute_seconds"] * 1e3:9.1f} '
              f'{row["collectives_share"]:15.1%} {row["step_seconds"] * 1e3:9.1f} '
              f'{row["predicted_seconds"] * 1e3:10.1f} {row["ratio"]:6.3f} '
              f'{row["predicted_seconds"] / control["predicted_seconds"]:10.3f}', end='')
        if options.gbit:
            seconds = row['predicted_on_given_link']
            print(f'  {seconds * 1e3:10.1f} {seconds / control["predicted_on_given_link"]:10.3f}', end='')
        print()


def bench_sharded(configs, options):
    """Prints what the configs took over these processes, and what the cost model predicts; 24comm first."""
    place = find_place(configs[0])
    for config in configs:
        if config.tp_size != configs[0].tp_size:
            config.refuse(f'tp_size is {config.tp_size}, but {configs[0].tp_size} in the control, 24comm')
    if place.processes == 1:
        fail('--shard needs more processes: torchrun --standalone --nproc_per_node=2 bench.py --shard ...')
    ranks, ddp_group = connect(configs[0], place)
    groups = dict(tp=ranks and ranks.group, ddp=ddp_group, all=dist.group.WORLD)
    groups = {axis: group for axis, group in groups.items() if group is not None}
    links = {axis: costmodel.fit(costmodel.sweep(group, place.device)) for axis, group in groups.items()}
    rings = options.gbit and {
        axis: costmodel.ring(dist.get_world_size(group), options.latency_us * 1e-6, options.gbit * 1e9 / 8)
        for axis, group in groups.items()}
    # every process alone: the same rank, in a group of its own
    lone_place = Place(0, 1, [[0]], place.device)
    lone_group = [dist.new_group([process]) for process in range(place.processes)][place.process]
    lone_ranks = ranks and ranks._replace(group=lone_group)
    networked, alone = [], []
    for config in configs:
        networked.append(Candidate(config, place, options.vocab_size, ranks, ddp_group))
        alone.append(Candidate(config, lone_place, options.vocab_size, lone_ranks))
    take_turns([candidate for pair in zip(networked, alone) for candidate in pair], options.rounds)
    keep_slowest(networked + alone, place)
    results = [sharded_result(*pair, networked[0], links, rings) for pair in zip(networked, alone)]
    if place.first:
        print_results(results, configs[0], place, '24comm', options.rounds)
        print('links:', '; '.join(f'{axis} {link}' for axis, link in links.items()))
        print_predictions(results, options)
        costmodel.print_messages([(row['name'], row['all_reduces']) for row in results])
        model = networked[0].net.raw
        wte = model.transformer.wte.weight
        print(f'wte is replicated: {wte.nbytes / 1e6:,.4g} MB of the {4 * model.num_params() / 1e6:,.4g} MB '
              'of parameters that a process holds')
        print(json.dumps(dict(processes=place.processes, backend=dist.get_backend(), wte_bytes=wte.nbytes,
                              links={axis: link._asdict() for axis, link in links.items()}, configs=results)))
    disconnect(place)


def main(argv):
    options, flags = parse(argv)
    if options.vocab_size is None:
        options.vocab_size = costmodel.VOCAB_SIZE
    # compiled, every config is one more graph of one function; torch keeps 8, and would run the rest eagerly
    torch._dynamo.config.recompile_limit = 1000
    control = SHARDED_CONTROL if options.shard else CONTROL
    if not options.shard and options.configs and load([options.configs[0]]).tp_size == 1:
        control = options.configs[0]
    paths = [control] + [path for path in options.configs if path != control]
    shard = ['--shard=True'] * options.shard
    configs = [load([path, *options.also, *flags, *shard]) for path in paths]
    if not options.shard:               # whatever a flag or a file composed after it says
        configs[0] = load([control, *options.also, *flags, '--tp_size=1', '--block_types=tp'])
    for config in configs:
        try:
            model_config_of(config, options.vocab_size)
        except ValueError as error:
            config.refuse(str(error))
    if options.input:
        bench_input(configs[0], options)
    elif options.kept:
        bench_kept(configs, options)
    else:
        (bench_sharded if options.shard else bench_simulated)(configs, options)


if __name__ == '__main__':
    main(sys.argv[1:])
