"""
How fast a training step is, config by config, as ratios to the dense control.

    python bench.py --batch_size=1 --block_size=256 --device=cpu --dtype=float32 --compile=False
    python bench.py config/train_gpt2_12comm.py config/train_gpt2_2comm.py --rounds=50 --textbook

A step is train.py's own: forward, backward, clip, AdamW, on one micro-batch of random tokens. The configs
take turns within each round, so that whatever else the machine does meets all of them. The last line is
JSON.
"""

import argparse
import json
import statistics
import sys
import time

import torch
import torch.nn.functional as F
from scipy import stats

from configurator import fail, load
from model import GPT
from train import Network, autocast, find_place, model_config_of, peak_flops, train_step

CONTROL = 'config/train_gpt2.py'
RUNS = [f'config/train_gpt2_{n}comm.py' for n in (24, 18, 16, 12, 8, 6, 2)]
VOCAB_SIZE = 50304
WARMUP = 3                              # rounds before the timed ones


class Candidate:
    """A config's model and optimizer, and what its steps took."""

    def __init__(self, files, flags):
        self.config = config = load([*files, *flags])
        self.name, self.place = config.wandb_run_name, find_place(config)
        device = self.place.device
        self.cuda = device.type == 'cuda'
        resident = torch.cuda.memory_allocated() if self.cuda else 0    # by the candidates before this one
        torch.manual_seed(config.seed)
        model = GPT(model_config_of(config, VOCAB_SIZE)).to(device)
        self.flops_per_token = model.flops_per_token()
        self.prepare(model)
        shape = (config.batch_size, config.block_size + 1)
        tokens = torch.randint(VOCAB_SIZE, shape, generator=torch.Generator().manual_seed(0)).to(device)
        self.batch = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        for _ in range(WARMUP):
            self.step()
        self.memory = (torch.cuda.max_memory_allocated() - resident) / 2**30 if self.cuda else None
        self.seconds = []

    def prepare(self, model):
        self.net = Network(model, self.config)
        self.net.wrap(self.config.batch_size, None, self.config, self.place, print)

    def step(self):
        train_step(self.net, [self.batch], self.config.learning_rate, self.config, self.place)

    def time_step(self):
        began = time.perf_counter()
        self.step()
        if self.cuda:
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - began)


class Textbook(Candidate):
    """The dense control as a textbook writes it: all logits, then the cross-entropy; AdamW as it comes."""

    def prepare(self, model):
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


def interval(values):
    """(median, low, high): the median and its 95% interval, from order statistics."""
    bounds = stats.quantile_test(values, q=statistics.median(values)).confidence_interval()
    return statistics.median(values), float(bounds.low), float(bounds.high)


def result(candidate, control):
    """What was measured of a candidate: time in seconds, memory in GiB, ratio to the dense control."""
    config, seconds = candidate.config, statistics.median(candidate.seconds)
    ratio, low, high = interval([ours / dense for ours, dense in zip(candidate.seconds, control.seconds)])
    speed = config.batch_size * config.block_size / seconds
    peak = peak_flops(candidate.place.device_name, config.dtype)
    mfu = peak and speed * candidate.flops_per_token / peak
    return dict(name=candidate.name, step_seconds=seconds, tokens_per_sec=speed, ratio=ratio, low=low,
                high=high, mfu=mfu, peak_memory_gib=candidate.memory)


def main(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
        epilog='Any other --key=value is a key of the runs; see train.py --help.')
    parser.add_argument('configs', nargs='*', default=RUNS, help='run configs, beside the dense control')
    parser.add_argument('--with', dest='also', metavar='FILE', action='append', default=[],
                        help='a config file composed after each; may be repeated')
    parser.add_argument('--rounds', type=int, default=25, help='timed steps of each config')
    parser.add_argument('--textbook', action='store_true', help='measure a plain textbook step as well')
    options, flags = parser.parse_known_args(argv)
    if options.rounds < 6:
        fail(f'--rounds={options.rounds}: a 95% interval of a median needs at least 6')
    control = Candidate([CONTROL, *options.also], flags)
    paths = [path for path in options.configs if path != CONTROL]
    candidates = [control] + [Candidate([path, *options.also], flags) for path in paths]
    if options.textbook:
        candidates.append(Textbook([CONTROL, *options.also], flags))
    for i in range(options.rounds):
        for candidate in candidates[::1 if i % 2 else -1]:
            candidate.time_step()
    results = [result(candidate, control) for candidate in candidates]
    config = control.config
    print(f'{control.place.device_name}, {config.dtype}, {"compiled" if config.compile else "eager"}, '
          f'batch {config.batch_size} x {config.block_size}, tp_size {candidates[-1].config.tp_size}, '
          f'torch {torch.__version__}, {torch.get_num_threads()} threads, {options.rounds} rounds')
    print(f'{"config":28} {"ms a step":>10} {"tokens/s":>10} {"ratio to dense":>15} {"95% interval":>15} '
          f'{"MFU":>6} {"GiB":>6}')
    for row in results:
        mfu = f'{row["mfu"]:.1%}' if row['mfu'] else '-'
        memory = f'{row["peak_memory_gib"]:.1f}' if row['peak_memory_gib'] is not None else '-'
        print(f'{row["name"]:28} {row["step_seconds"] * 1e3:10.1f} {row["tokens_per_sec"]:10,.0f} '
              f'{row["ratio"]:15.3f} {row["low"]:9.3f}-{row["high"]:.3f} {mfu:>6} {memory:>6}')
    print(json.dumps(results))


if __name__ == '__main__':
    main(sys.argv[1:])
