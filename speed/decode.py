"""
bench.py --decode: how fast text is generated, config by config, and what its all-reduces take.

The first token takes a pass over the prompt. Each token after it takes one over itself, with the keys and
values of those before. Weights and messages are in the config's dtype, and the likeliest token is taken. On a
GPU the step is captured in a CUDA graph at the middle of the text, whose replay is what a token takes; the
same step launched eagerly stands beside it.
"""

import statistics
import time

import torch
import torch.distributed as dist

from configurator import fail
from model import KeyValues, TPGroup, count_all_reduces
from speed import costmodel
from speed.candidates import interval, take_turns
from speed.sharded import hides, keep_slowest, lone_world, measure_links, sharded_world
from train import build_model
from training.distributed import connect, find_world
from variants import Flight, gpt_config

WARMUP = 2  # texts before the timed ones
ONE_SHOT = 2**17  # bytes, of the largest message that is small


class Writer:
    """A config's network, and the seconds that the first token and each token after it took, text by text."""

    def __init__(self, config, world, args):
        self.config, self.world, self.args, self.name = config, world, args, config.wandb_run_name
        self.cuda = world.device.type == 'cuda'
        length = args.prompt + args.new
        shape = vars(config) | dict(block_size=max(config.block_size, length))  # every token has a position
        model = build_model(config, gpt_config(shape, args.vocab_size), world)[0]
        self.model = model.to(getattr(torch, config.dtype)).eval()
        self.text = torch.randint(args.vocab_size, (args.batch, length),
                                  generator=torch.Generator().manual_seed(0)).to(world.device)  # (B, length)
        self.first, self.seconds, self.recomputed = [], [], []

    def new_cache(self):
        return [KeyValues(self.text.size(1)) for _ in self.model.transformer.h]

    @torch.no_grad()
    def next_token(self, idx, cache=None):
        """idx (B, T) -> (B, 1)"""
        return self.model(idx, cache=cache)[0][:, -1].argmax(-1, keepdim=True)

    def clock(self):
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def time_step(self):
        """Time a text."""
        prompt, new, cache = self.args.prompt, self.args.new, self.new_cache()
        began = self.clock()
        token = self.next_token(self.text[:, :prompt], cache)
        first = self.clock()
        self.generate(token, cache)
        self.seconds.append((self.clock() - first) / (new - 1))
        self.first.append(first - began)
        if self.args.textbook:
            # a token's seconds are all but linear in its window, so four of them have the mean of all
            windows = [self.text[:, :prompt + new * i // 8] for i in (1, 3, 5, 7)]
            began = self.clock()
            for window in windows:
                self.next_token(window)
            self.recomputed.append((self.clock() - began) / len(windows))

    def generate(self, token, cache):
        for _ in range(self.args.new - 1):
            token = self.next_token(token, cache)

    def observe(self):
        """The Messages of a token."""
        cache = self.new_cache()
        self.next_token(self.text[:, :self.args.prompt], cache)

        def step():
            self.next_token(self.text[:, :1], cache)

        if self.world.tp is not None:
            return costmodel.observe_step(self.model, step, costmodel.behind_decoding(self.model))
        with count_all_reduces() as observed:  # simulated: none is sent
            step()
        return [costmodel.Message(way, size, float(kind == 'hidden')) for way, kind, size in observed]


class GraphWriter(Writer):
    """The same, its step captured in a CUDA graph."""

    def __init__(self, eager):
        vars(self).update(vars(eager))
        self.name = f'{eager.name}, graph'
        self.first, self.seconds = [], []
        self.graph, self.token, cache = torch.cuda.CUDAGraph(), self.text[:, :1].clone(), self.new_cache()
        self.next_token(self.text[:, :self.args.prompt + self.args.new // 2], cache)

        def step():
            for layer in cache:
                layer.length = self.args.prompt + self.args.new // 2
            self.token.copy_(self.next_token(self.token, cache))

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(side)
        with torch.cuda.graph(self.graph):
            step()

    def generate(self, token, cache):
        for _ in range(self.args.new - 1):
            self.graph.replay()


class WaitingWriter(Writer):
    """The same, its hidden all-reduces waited for at once."""

    def __init__(self, hiding):
        vars(self).update(vars(hiding))
        self.name = f'{hiding.name}, waited for'
        self.first, self.seconds = [], []

    def next_token(self, idx, cache=None):
        with Flight.waited_for():
            return super().next_token(idx, cache)


class OneShotGroup(TPGroup):
    """Sends small messages by symmetric memory's one-shot all-reduce: each GPU reads what the others have."""
    buffers = {}  # by shape and dtype

    def all_reduce(self, message):
        if message.nbytes > ONE_SHOT:
            return super().all_reduce(message)
        key = message.shape, message.dtype
        if key not in self.buffers:
            from torch.distributed import _symmetric_memory
            self.buffers[key] = _symmetric_memory.empty(
                *message.shape, dtype=message.dtype, device=message.device)
            _symmetric_memory.rendezvous(self.buffers[key], self.group)
        buffer = self.buffers[key].copy_(message)
        message.copy_(torch.ops.symm_mem.one_shot_all_reduce(buffer, 'sum', self.group.group_name))


def with_one_shot(world):
    """(the World with the fastest small messages, how they are sent, in words). Collective."""
    backend = dist.get_backend(world.tp.group)
    if world.device.type != 'cuda':
        return world, backend
    group, problem = OneShotGroup(*world.tp), None
    try:
        group.all_reduce(torch.zeros(1, 1, 8, dtype=torch.bfloat16, device=world.device))
    except (ImportError, AttributeError, RuntimeError) as error:  # not of this torch, or of this machine
        problem = str(error).partition('\n')[0]
    failures = torch.tensor(float(problem is not None), device=world.device)
    dist.all_reduce(failures, group=world.tp.group)
    if failures.item():
        return world, f'{backend} (no symmetric memory: {problem or "on another process"})'
    words = f"symmetric memory's one-shot if waited for and up to {ONE_SHOT // 1024} KB, else {backend}"
    return world._replace(tp=group), words


def text_result(pair, control, links, given):
    """What was measured of a Writer, as a dict, and what the cost model predicts if it has a network."""
    writer, *alone = pair
    token, (first, first_low, first_high) = statistics.median(writer.seconds), interval(writer.first)
    ratios, first_ratios = (
        interval([mine / its for mine, its in zip(getattr(writer, name), getattr(control, name))])
        for name in ('seconds', 'first'))
    messages = writer.observe()
    row = dict(
        name=writer.name, first_seconds=first, first_low=first_low, first_high=first_high,
        token_seconds=token, tokens_per_sec=writer.args.batch / token,
        **dict(zip(('ratio', 'low', 'high'), ratios)),
        **dict(zip(('first_ratio', 'first_ratio_low', 'first_ratio_high'), first_ratios)),
        all_reduces=len(messages), hidden=sum(message.behind > 0 for message in messages),
        bytes=sum(message.bytes for message in messages))
    if writer.recomputed:
        new = writer.args.new
        row['over_recomputing'], row['over_low'], row['over_high'] = interval([
            new * whole / (first + (new - 1) * each)
            for whole, first, each in zip(writer.recomputed, writer.first, writer.seconds)])
    if alone:
        compute = statistics.median(alone[0].seconds)
        row.update(compute_seconds=compute, collectives_share=1 - compute / token,
                   predicted_seconds=costmodel.predict(compute, messages, links),
                   predicted_on_given_link=given and costmodel.predict(compute, messages, given))
    return row


def print_text(results, args):
    """Print text_result() of each Writer."""
    print(f'{"config":34} {"first token":>12} {"ratio":>6} {"a token":>10} {"tokens/s":>9} {"ratio":>6} '
          f'{"95% interval":>13} {"all-reduces":>11} {"hidden":>6} {"KB":>7}', end='')
    sharded, recomputed = 'compute_seconds' in results[0], 'over_recomputing' in results[0]
    print(f' {"in collectives":>14} {"predicted":>10} {"ratio":>6}' * sharded
          + f' {"predicted on the link asked for":>32}' * bool(sharded and args.gbit)
          + f' {"times recomputing":>18}' * recomputed)
    for row in results:
        print(f'{row["name"]:34} {row["first_seconds"] * 1e3:9.1f} ms {row["first_ratio"]:6.3f} '
              f'{row["token_seconds"] * 1e3:7.2f} ms {row["tokens_per_sec"]:9,.1f} {row["ratio"]:6.3f} '
              f'{row["low"]:7.3f}-{row["high"]:.3f} {row["all_reduces"]:11} {row["hidden"]:6} '
              f'{row["bytes"] / 1e3:7.1f}', end='')
        if sharded:
            print(f' {row["collectives_share"]:14.1%} {row["predicted_seconds"] * 1e3:7.2f} ms '
                  f'{row["predicted_seconds"] / results[0]["predicted_seconds"]:6.3f}', end='')
        if sharded and args.gbit:
            seconds = row['predicted_on_given_link']
            print(f' {seconds * 1e3:22.2f} ms {seconds / results[0]["predicted_on_given_link"]:6.3f}', end='')
        if recomputed:
            print(f' {row["over_recomputing"]:6.1f} ({row["over_low"]:.1f}-{row["over_high"]:.1f})', end='')
        print()


def bench_decode(configs, args):
    """
    Print how fast the configs write text, the control first: dense, or sharded TP blocks alone.

    Returns the rows as dicts, on rank 0.
    """
    config, links, given = configs[0], None, None
    world = sharded_world(configs) if args.shard else find_world(config)
    if world.ddp_size > 1:
        fail(f'--decode --shard takes tp_size processes, here {config.tp_size}; there are {world.processes}')
    if args.shard:
        world = connect(config, world)
        links, given = measure_links(world, args)
        lone = lone_world(world)
        world, sends = with_one_shot(world)
    pairs = []  # of a Writer and, if sharded, the same without its network
    for config in configs:
        pair = [Writer(config, place, args) for place in ((world, lone) if args.shard else (world,))]
        pairs.append(pair)
        if args.shard and hides(config):
            pairs.append([WaitingWriter(pair[0]), pair[1]])
        if world.device.type == 'cuda':
            pairs.append([GraphWriter(writer) for writer in pair])
    timed = list(dict.fromkeys(writer for pair in pairs for writer in pair))
    take_turns(timed, WARMUP)
    for writer in timed:
        writer.first, writer.seconds, writer.recomputed = [], [], []
    take_turns(timed, args.rounds)
    if args.shard:
        keep_slowest(timed, world, 'seconds')
        keep_slowest(timed, world, 'first')
    rows = [text_result(pair, pairs[0][0], links, given) for pair in pairs]
    if world.rank0:
        print(f'{world.processes} x {world.device_name}, {config.dtype}, {config.n_layer} layers of '
              f'{config.n_embd}, tp_size {config.tp_size}, torch {torch.__version__}, '
              f'{torch.get_num_threads()} threads; {args.batch} x {args.new} tokens after {args.prompt}, '
              f'{args.rounds} rounds')
        if args.shard:
            print(f'links: {links["tp"]}; all-reduces by {sends}')
        print_text(rows, args)
    if args.shard:
        dist.destroy_process_group()
    return rows if world.rank0 else None
