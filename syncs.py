"""
Which syncs of a trained net can go? Drops them one by one, then one after the other, and measures the loss.

    python syncs.py --init_from=gpt2 --tp_size=4 --dataset=mine
    python syncs.py --init_from=out/gpt2-cpu/ckpt.pt config/cpu.py --tp_size=4 --search=greedy --tokens=65536

A sync point is named after the sublayer before it: h.3.attn. Dropped, its sum waits for the next sync. So
every set of dropped syncs is a list of block types, and each loss is that of the line printed beside it:

    dropped in a layer      nothing   attn   mlp        both
    block type              tp        spd    attn_spd   parallel

The model's last sync stands among the points with difference 0: dropped, it moves to the model's end, so it
is never saved and not searched. The best of many sets looks better on the tokens that it was chosen on than
on others: confirm a line with train.py and more --eval_tokens.

With --layout=affinity, heads and MLP columns are first permuted so that those that use each other's output
share a rank: the same dense net, affinity.pt in --out, which the printed lines load.

--out gets syncs.json, points.csv, frontier.csv, syncs.png, and measured.jsonl, from which the same command
goes on where it was stopped. Any train.py key may be given.

References  Sync-Point Drop (arXiv 2502.20727): attention's syncs of a trained net, by sensitivity
"""

import argparse
import csv
import json
import math
import random
import shlex
import sys
import time
import zlib
from itertools import accumulate
from pathlib import Path

from configurator import begin_program, fail, load

KINDS = ('attn', 'mlp')
# what a layer of a block type drops, by kind
TYPES = {(): 'tp', ('attn',): 'spd', ('mlp',): 'attn_spd', KINDS: 'parallel'}
PREDICTED = 4  # batches that the predictors read
PROBED = 2048  # tokens of train, at most, that the layout is found on


def parse_args(argv):
    """(args, flags): this script's arguments, and those that train.py knows too."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument('--tokens', type=int, help='of val, from the first on; default: eval_tokens')
    parser.add_argument('--search', choices=('ranked', 'greedy'), default='ranked',
                        help='the next to drop: by the loss of each alone, or the cheapest by then')
    parser.add_argument('--kinds', default='attn,mlp', help='of sync points; attn alone is Sync-Point Drop')
    parser.add_argument('--margin', type=float, default=0.02, help='nats that the syncs dropped may cost')
    parser.add_argument('--random', type=int, default=0, metavar='N',
                        help='measure N random sets as well, at a quarter, a half, three quarters dropped')
    parser.add_argument('--layout', choices=('given', 'affinity'), default='given',
                        help='which heads and MLP columns share a rank')
    parser.add_argument('--out', type=Path, default=Path('out/syncs'), help='the folder to write')
    parser.error = lambda message: fail(f'{message}; see python syncs.py --help')
    args, flags = parser.parse_known_args(argv)
    kinds = args.kinds.split(',')
    if not set(kinds) <= set(KINDS):
        fail(f'--kinds is {args.kinds}, it must be attn, mlp or attn,mlp')
    args.kinds = tuple(kind for kind in KINDS if kind in kinds)
    if args.random < 0:
        fail(f'--random is {args.random}, it must be at least 0')
    if not 0 < args.margin < math.inf:
        fail(f'--margin is {args.margin}, it must be a number of nats above 0, such as 0.02')
    return args, flags


def load_config(args, flags):
    """The Config of the net and its evaluation. Ends the program if there is nothing to drop, or no net."""
    config = load(flags)
    if config.init_from == 'scratch' or config.resume:
        fail('--init_from must name a trained net: gpt2 ... gpt2-xl, a folder, a checkpoint file')
    for key in 'block_types', 'block_types_at':
        if config.sources[key].startswith('--'):
            config.refuse(f'{key} is what is searched for; leave it out')
    if config.tp_size == 1:
        config.refuse('tp_size is 1, it must be at least 2: one rank syncs nothing')
    if config.merge != 'sum' or config.shard:
        config.refuse(f'merge is {config.merge} and shard {config.shard}, they must be sum and False')
    if args.tokens is not None:
        config.eval_tokens = args.tokens
    if config.eval_tokens < 2 * config.block_size:
        fail(f'{config.eval_tokens} tokens are less than two windows of block_size {config.block_size}')
    return config


if __name__ == '__main__':
    begin_program()
    load_config(*parse_args(sys.argv[1:]))  # --help and mistakes are reported before torch is loaded

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from scipy.stats import spearmanr, t
from tqdm import tqdm

from analysis.figures import REPORT, settings, write_figure
from data.corpus import open_corpus
from data.dataloader import val_batches
from model import BLOCKS, GPT, count_all_reduces
from training import layout
from training.compiling import autocast
from training.distributed import find_world
from training.pretrained import initial_weights
from training.rundir import write_json
from variants import gpt_config

# measuring


def block_types(dropped, n_layer):
    """The block types, a tuple, that drop a set of points (layer, kind)."""
    return tuple(TYPES[tuple(kind for kind in KINDS if (i, kind) in dropped)] for i in range(n_layer))


def nats_of(model, x, y, sets):
    """
    x, y (B, T) and a list of block types -> {block types: nats of each window (B,), float64}.

    Layers that several have in common from the first on are computed once: a sync that is dropped late costs
    the layers after it alone.
    """
    nats_by_types, before = {}, ()
    streams = [model.enter(x)]  # before the first layer, and after each
    for types in sorted(sets):
        shared = next((i for i, (a, b) in enumerate(zip(types, before)) if a != b), len(before))
        del streams[shared + 1:]
        for name, block in zip(types[shared:], model.transformer.h[shared:]):
            streams.append(BLOCKS[name].forward(block, streams[-1]))  # all types have the same parameters
        logits = model.lm_head(model.leave(streams[-1])).flatten(0, 1)  # (N, V)
        nats = F.cross_entropy(logits, y.flatten(), ignore_index=-1, reduction='none')  # (N,)
        nats_by_types[types], before = nats.view_as(y).double().sum(-1).cpu(), types
    return nats_by_types


class Measured:
    """The nats of each window under each list of block types so far. measured.jsonl keeps them."""

    def __init__(self, model, corpus, config, world, path):
        """Raises ValueError if the file holds measurements of something else."""
        self.model, self.val, self.config, self.world, self.path = model, corpus.val, config, world, path
        targets, T = min(config.eval_tokens, len(corpus.val) - 1), config.block_size
        self.counts = np.array([T] * (targets // T) + [targets % T] * (targets % T > 0))  # a window's tokens
        self.batches = -(-len(self.counts) // config.batch_size)
        self.nats = {}  # block types: {batch: nats of its windows}
        self.dense = ('tp',) * config.n_layer
        facts = dict(init_from=config.init_from, weights=checksum(model), tp_size=config.tp_size,
                     block_size=T, batch_size=config.batch_size, dtype=config.dtype,
                     val=corpus.meta['splits']['val']['sha256'], tokens=targets)
        self.read(facts)

    def read(self, facts):
        lines = self.path.read_text().split('\n') if self.path.exists() else []
        if len(lines) < 2:
            return self.path.write_text(json.dumps(facts) + '\n')
        theirs = json.loads(lines[0])
        changed = [f'{key} is {theirs.get(key)} there, {facts[key]} here'
                   for key in facts if theirs.get(key) != facts[key]]
        if changed:
            raise ValueError(f'{self.path} is of other measurements: {", ".join(changed)}; choose another '
                             '--out')
        for line in lines[1:-1]:  # a killed program may leave half a line at the end
            batch, nats_by_name = json.loads(line)
            self.note(batch, {tuple(name.split(',')): nats for name, nats in nats_by_name.items()})
        self.path.write_text('\n'.join([*lines[:-1], '']))

    def all_batches(self):
        config = self.config
        return val_batches(self.val, config.block_size, config.batch_size, config.eval_tokens, 0, 1,
                           self.world.device)

    def note(self, batch, nats_by_types):
        for types, nats in nats_by_types.items():
            self.nats.setdefault(types, {})[batch] = nats

    @torch.no_grad()
    def measure(self, sets, bar):
        """Measure those of a list of block types that are not measured yet."""
        with open(self.path, 'a') as file:
            for i, (x, y, n) in enumerate(self.all_batches()):
                missing = [types for types in sets if i not in self.nats.get(types, ())]
                if missing:
                    windows = -(-n // self.config.block_size)
                    with autocast(self.config, self.world):
                        nats_by_types = {types: nats[:windows].tolist()
                                         for types, nats in nats_of(self.model, x, y, missing).items()}
                    self.note(i, nats_by_types)
                    line = [i, {','.join(types): nats for types, nats in nats_by_types.items()}]
                    print(json.dumps(line), file=file, flush=True)
                bar.update(len(sets))

    def windows(self, types):
        """Nats of each window, (W,)."""
        return np.concatenate([self.nats[types][i] for i in range(self.batches)])

    def loss(self, types):
        return float(self.windows(types).sum() / self.counts.sum())

    def difference(self, types, confidence=0.95):
        """
        (difference to dense, half of its interval), nats per token; windows of text count as independent.
        """
        d, n = self.windows(types) - self.windows(self.dense), self.counts
        W, mean = len(n), d.sum() / n.sum()
        error = np.sqrt(np.square(d - mean * n).sum() * W / (W - 1)) / n.sum()
        return float(mean), float(t.ppf((1 + confidence) / 2, W - 1) * error)


def checksum(model):
    """Of a model's weights, to know it again by."""
    value = 0
    for p in model.parameters():
        value = zlib.crc32(p.detach().cpu().contiguous().numpy(), value)
    return value


# searching


def all_points(n_layer, kinds):
    return [(i, kind) for i in range(n_layer) for kind in kinds]


def cumulative(order, n_layer):
    """The block types after the first of `order` is dropped, after the first two, ..."""
    sets = accumulate(order, lambda dropped, point: dropped | {point}, initial=frozenset())
    return [block_types(dropped, n_layer) for dropped in sets][1:]


def rank(measured, points, n_layer):
    """The points by what each costs alone, the cheapest first."""
    return sorted(points, key=lambda point: measured.loss(block_types({point}, n_layer)))


def greedy(measured, points, n_layer, bar):
    """The points in the order in which each costs least once those before it are dropped."""
    order, left = [], list(points)
    while left:
        sets = {point: block_types({*order, point}, n_layer) for point in left}
        measured.measure(list(sets.values()), bar)
        order.append(min(left, key=lambda point: measured.loss(sets[point])))
        left.remove(order[-1])
    return order


def random_sets(points, n_layer, count, seed):
    """Lists of block types: `count` sets each of a quarter, a half and three quarters of all syncs."""
    own = random.Random(seed)
    return [block_types(own.sample(points, part * (len(points) + 1) // 4), n_layer)
            for part in (1, 2, 3) for _ in range(count)]


# predictors


def predict(model, x, y):
    """
    What one forward and one backward pass of the dense net say of each sync point: {name: (2 n_layer,)}.

    Dropped, rank r reads u_r = c + P_r - sum_s P_s in place of c until the next sync.

        first_order   sum_r <gradient of the loss by u_r, u_r - c>, nats per token
        defect        of what the next sublayer writes, ||change|| / ||what it writes||
        cosine        1 - cosine of u_r and c, mean over ranks and tokens
    """
    stream, R, apart = model.enter(x), model.tp.size, None
    stream = stream._replace(c=stream.c.requires_grad_())  # the parameters need none
    reads, changes, values = [], [], dict(first_order=[], defect=[], cosine=[])
    for block in model.transformer.h:
        for norm, sublayer in (block.ln_1, block.attn), (block.ln_2, block.mlp):
            product = sublayer(norm(stream.u))
            written, P = product.sum_over_ranks().detach(), product.per_rank().detach()
            if apart is not None:
                other = sublayer(norm(apart)).sum_over_ranks()
                values['defect'].append((other - written).norm() / written.norm())
            stream = stream.sync(product)
            # drifted in shape alone, so that each rank's reading has a gradient of its own
            reads.append(stream.c.expand(R, *stream.c.shape))  # drifted (R, B, T, C)
            changes.append(P - P.sum(0))
            apart = (reads[-1] + changes[-1]).detach()
            values['cosine'].append(1 - F.cosine_similarity(apart, stream.c.detach(), dim=-1).mean())
            stream = stream._replace(u=reads[-1])
    loss = F.cross_entropy(model.lm_head(model.leave(stream)).flatten(0, 1), y.flatten(), ignore_index=-1)
    grads = torch.autograd.grad(loss, reads[:-1])
    values['first_order'] = [(grad * change).sum() for grad, change in zip(grads, changes)]
    zero = loss.new_zeros(())  # nothing reads after the last
    values['cosine'].pop()
    return {name: torch.stack([*own, zero]) for name, own in values.items()}


def predictions(measured):
    """predict() over the first batches: {name: {point: mean}}"""
    config, per_batch = measured.config, []
    for _, (x, y, n) in zip(range(PREDICTED), measured.all_batches()):
        windows = -(-n // config.block_size)  # the rest is padding
        with autocast(config, measured.world):
            per_batch.append(predict(measured.model, x[:windows], y[:windows]))
    points = all_points(config.n_layer, KINDS)
    return {name: dict(zip(points, torch.stack([one[name] for one in per_batch]).mean(0).tolist()))
            for name in per_batch[0]}


def correlation(values, differences):
    """Spearman's rank correlation; None of fewer than three points or where all are equal."""
    if len(values) < 3 or len(set(values)) == 1 or len(set(differences)) == 1:
        return None
    return float(spearmanr(values, differences).statistic)


# the report


def dropped_in(types):
    """The points that a list of block types drops, but the model's last."""
    kinds = {name: kinds for kinds, name in TYPES.items()}
    return {(i, kind) for i, name in enumerate(types) for kind in kinds[name]} - {(len(types) - 1, 'mlp')}


def entry(measured, types):
    """A measured list of block types, for syncs.json."""
    idx = torch.zeros(1, 1, dtype=torch.long, device=measured.world.device)
    with torch.no_grad(), count_all_reduces() as observed:
        nats_of(measured.model, idx, idx, [types])
    mean, half = measured.difference(types)
    return dict(all_reduces=observed.forward, block_types=','.join(types), loss=measured.loss(types),
                difference=mean, low=mean - half, high=mean + half)


def best_sets(measured, kinds):
    """The best list of block types measured at each number of all-reduces, from all of them on."""
    best = {}
    for types, nats in measured.nats.items():
        dropped = dropped_in(types)
        if len(nats) == measured.batches and {kind for _, kind in dropped} <= set(kinds):
            best[len(dropped)] = min(types, best.get(len(dropped), types), key=measured.loss)
    return [best[n] for n in sorted(best)]


def can_go(measured, best, margin):
    """
    How many syncs can go on the tokens that the sets were chosen on: as many as before the first of
    best_sets() whose difference, with half of its 90% interval over windows, reaches the margin.

    That is no bound for other tokens: the sets were chosen on the same ones.
    """
    within = 0
    for types in best:
        if not sum(measured.difference(types, confidence=0.9)) < margin:  # nor if it is not a number
            break
        within = len(dropped_in(types))
    return within


def plot(report):
    """Each point's difference alone, and the loss against all-reduces."""
    with settings(REPORT):
        fig = Figure(figsize=(8, 3.2))
        left, right = fig.subplots(1, 2)
        names = [point['name'] for point in report['points']]
        for kind, marker in zip(KINDS, 'os'):
            own = [(i, point) for i, point in enumerate(report['points']) if point['name'].endswith(kind)]
            left.errorbar([i for i, _ in own], [point['difference'] for _, point in own],
                          [point['high'] - point['difference'] for _, point in own], linestyle='',
                          marker=marker, markersize=3.5, color='black' if kind == 'attn' else '0.5',
                          linewidth=1, label=kind)
        left.set_xticks(range(len(names)), names, rotation=90, fontsize=5.5)
        left.set_ylabel('nats per token more than dense')
        left.set_yscale('symlog', linthresh=0.001)
        left.set_title('one sync dropped, 95% intervals over windows')
        for (name, curve), style in zip(report['curves'].items(), ('o-', 's--')):
            right.plot([one['all_reduces'] for one in curve], [one['difference'] for one in curve], style,
                       color='black' if name == 'greedy' else '0.5', markersize=3, label=name)
        for i, one in enumerate(report['random']):
            right.plot(one['all_reduces'], one['difference'], '.', color='0.7', markersize=3, zorder=1,
                       label='random sets' if i == 0 else None)
        right.axhspan(0, report['margin'], color='0.9', zorder=0)
        right.invert_xaxis()
        right.set_yscale('symlog', linthresh=report['margin'] / 10)
        right.set_xlabel('all-reduces, forward')
        right.set_title(f'dropped one after the other, tp_size {report["tp_size"]}')
        for ax in left, right:
            ax.axhline(0, color='black', linewidth=0.8)
            ax.legend(fontsize=7)
        return fig


def write_csv(path, rows):
    with open(path, 'w', newline='') as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


# the program


def open_net(config):
    """
    (model, corpus, world): the dense net, all its ranks simulated. Ends the program if they do not fit, or if
    the net was not trained dense.
    """
    world = find_world(config)
    if world.processes > 1:
        fail('syncs.py simulates all ranks in one process; start it without torchrun')
    with config.refusing():
        corpus = open_corpus(config.dataset)
        needed = 2 * config.block_size + 1  # an interval over windows takes two of them
        if len(corpus.val) < needed:
            raise ValueError(f'dataset is {corpus.name}, whose val has {len(corpus.val)} tokens; two windows '
                             f'of block_size {config.block_size} need {needed}')
        keys = vars(config) | dict(block_types=None, dropout=0.0)
        with torch.device('meta'):
            model = GPT(gpt_config(keys))
        model.load_state_dict(initial_weights(config, corpus, dense=True), assign=True)
    return model.requires_grad_(False).to(world.device).eval(), corpus, world


def permute_by_affinity(model, corpus, config, path):
    """Permute a model's heads and MLP columns over the ranks by affinity, and write it as a checkpoint."""
    T = min(config.block_size, PROBED, len(corpus.train))
    windows = min(PROBED, len(corpus.train)) // T
    idx = torch.from_numpy(corpus.train.read(0, windows * T).astype('int64')).view(windows, T)
    orders = layout.affinity(model, idx.to(model.lm_head.weight.device))
    model.load_state_dict(layout.permuted(model.state_dict(), orders), assign=True)
    layout.save(path, model, config, corpus)


def search(measured, args):
    """Measure all that the arguments ask for. Returns ({search: order of points}, the random sets)."""
    config = measured.config
    L, points = config.n_layer, all_points(config.n_layer, args.kinds)
    points = [point for point in points if point != (L - 1, 'mlp')]
    drawn, n = random_sets(points, L, args.random, config.seed), len(points)
    sets = 1 + 2 * n + len(drawn) + (n * (n + 1) // 2 if args.search == 'greedy' else 0)
    often = 0.5 if sys.stderr.isatty() else 60  # seconds
    with tqdm(total=sets * measured.batches, unit='batch', mininterval=often) as bar:
        measured.measure([measured.dense, *(block_types({point}, L) for point in points)], bar)
        orders = dict(ranked=rank(measured, points, L))
        measured.measure(cumulative(orders['ranked'], L), bar)
        if args.search == 'greedy':
            orders['greedy'] = greedy(measured, points, L, bar)
        measured.measure(drawn, bar)
    return orders, drawn


def summary(measured, args, orders, drawn, guesses):
    """The report, for syncs.json. Its can_go holds for the tokens that the sets were chosen on: can_go()."""
    config, L = measured.config, measured.config.n_layer
    points = []
    for point in all_points(L, args.kinds):
        last = point == (L - 1, 'mlp')
        types = measured.dense if last else block_types({point}, L)
        mean, half = measured.difference(types)
        points.append(dict(name=f'h.{point[0]}.{point[1]}', loss=measured.loss(types), difference=mean,
                           low=mean - half, high=mean + half,
                           **{name: values[point] for name, values in guesses.items()}))
    searched = points[:-1] if points[-1]['name'] == f'h.{L - 1}.mlp' else points
    truth = [point['difference'] for point in searched]
    best = best_sets(measured, args.kinds)
    return dict(
        init_from=config.init_from, layout=args.layout, tp_size=config.tp_size, dataset=config.dataset,
        search=args.search, kinds=args.kinds, tokens=int(measured.counts.sum()),
        windows=len(measured.counts), margin=args.margin, dense_loss=measured.loss(measured.dense),
        syncs=2 * L, can_go=can_go(measured, best, args.margin),
        points=points, frontier=[entry(measured, types) for types in best],
        curves={name: [entry(measured, types) for types in [measured.dense, *cumulative(order, L)]]
                for name, order in orders.items()},
        random=[entry(measured, types) for types in drawn],
        spearman={name: correlation([point[name] for point in searched], truth) for name in guesses})


def show(report, command):
    print(f'dense: val loss {report["dense_loss"]:.6f} over {report["tokens"]:,} tokens')
    print('dropped alone      difference, 95% interval over windows     first_order   defect   cosine')
    for point in report['points']:
        print('{name:<18} {difference:+.6f} [{low:+.6f}, {high:+.6f}]     {first_order:+.6f}    {defect:.4f}'
              '   {cosine:.4f}'.format(**point))
    words = [f'{name} {value:+.2f}' for name, value in report['spearman'].items() if value is not None]
    print(f'rank correlation of the predictors with the differences: {", ".join(words)}')
    print(f'the best at each number of all-reduces, each as measured by\n{command} with its line')
    for one in report['frontier']:
        print('{all_reduces:3} {loss:.6f} {difference:+.6f} [{low:+.6f}, {high:+.6f}]  '
              '--block_types={block_types}'.format(**one))
    print('{can_go} of {syncs} can go within {margin:g} on the tokens that they were chosen on; confirm with '
          'train.py --eval_only=True and more --eval_tokens'.format(**report))


def main(argv):
    args, flags = parse_args(argv)
    config = load_config(args, flags)
    model, corpus, world = open_net(config)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        if args.layout == 'affinity':
            permute_by_affinity(model, corpus, config, args.out / 'affinity.pt')
            flags = [flag for flag in flags if not flag.startswith('--init_from=')]
            flags.append(f'--init_from={args.out / "affinity.pt"}')
        measured = Measured(model, corpus, config, world, args.out / 'measured.jsonl')
    except OSError as error:
        fail(f'--out is {args.out}, which cannot be written: {error.strerror}')
    except ValueError as error:
        fail(str(error))
    began = time.perf_counter()
    guesses = predictions(measured)
    print(f'predictors: {time.perf_counter() - began:.1f} s')
    orders, drawn = search(measured, args)
    report = summary(measured, args, orders, drawn, guesses)
    command = ['python', 'train.py', *flags, f'--eval_tokens={config.eval_tokens}', '--eval_only=True']
    show(report, shlex.join(command))
    write_json(args.out / 'syncs.json', report | dict(command=shlex.join(command)))
    write_csv(args.out / 'points.csv', report['points'])
    write_csv(args.out / 'frontier.csv', report['frontier'])
    write_figure(plot(report), args.out, 'syncs', ['png'])


if __name__ == '__main__':
    main(sys.argv[1:])
