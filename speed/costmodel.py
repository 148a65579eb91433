"""
What a sharded training step takes if the network counts: its all-reduces, a link's measure, and a model.

    step time = compute of one rank + sum over the step's all-reduces of (alpha + bytes / beta)

    python -m speed.costmodel config/train_gpt2_*comm.py --gbit=25 --nodes=2 --gpus=8
    python -m speed.costmodel config/train_gpt2_*comm.py --gbit=400 --decode --prompt=1024 --new=128

The command predicts what GPUs that are not here would take and gain, by falling number of all-reduces, with
dense, data-parallel alone, and TP blocks alone beside what was named. On real processes, `bench.py --shard`
measures every term of the formula, and the step time too.

Assumptions
- An all-reduce takes alpha + bytes / beta. Bytes are the message's, counted once, whatever the wire carries.
- An all-reduce that was not measured is a ring of n processes: 2 (n - 1) messages in a row of bytes / n
  each. So alpha = 2 (n - 1) latency, and beta = bandwidth n / (2 (n - 1)), of the slowest link on the way.
- The groups that reduce over a node's network at the same time share it evenly.
- A hidden all-reduce (see model.py) overlaps with one sublayer's compute and costs what it takes beyond that.
  A sublayer has 1 / (2 n_layer) of a micro-batch's compute: a third of that forward, the rest backward.
- Nothing else overlaps, not even the data-parallel average with the backward pass, and no process waits for a
  late peer. On real processes those of ladder and dtp overlap, and bench.py sees them so; it also measures
  what they take if they are waited for at once, as those of fal and stale are.
- The command's compute is PaLM's count of FLOPs at --gpu_tflops, the same for every config, and its
  data-parallel average is one message of all gradients that a process holds, in float32. bench.py measures
  the former and observes the latter.
- With --decode it is text that is generated, on tp_size GPUs. A token reads each weight of a rank once, and
  the keys and values so far, at --memory_gbs; a prompt takes its FLOPs at --gpu_tflops. Kernels take no time
  to start, so that a small model is slower than this. A message takes --alpha_us inside a node,
  --alpha_between_us between nodes, and its bytes.
"""

import argparse
import math
import statistics
import sys
import time
from dataclasses import MISSING, dataclass, field, fields
from types import SimpleNamespace
from typing import NamedTuple

from configurator import (
    add_text_arguments,
    begin_program,
    check_text_arguments,
    communications,
    differences,
    fail,
    load,
    load_each,
    mean_over_steps,
    stages,
)

# links and clusters


class Link(NamedTuple):
    """What an all-reduce over it takes."""
    alpha: float  # seconds, whatever the size
    beta: float  # bytes a second

    def seconds(self, size):
        """size: in bytes"""
        return self.alpha + size / self.beta

    def __str__(self):
        return f'alpha {self.alpha * 1e6:.0f} us, beta {self.beta * 8e-9:.3g} Gbit/s'


def ring(n, latency, bandwidth):
    """The Link of a ring of n processes. latency: seconds a message; bandwidth: bytes a second."""
    return Link(2 * (n - 1) * latency, bandwidth * n / (2 * (n - 1)))


def setting(default, words):
    return field(default=default, metadata=dict(help=words))


@dataclass
class Cluster:
    """GPUs and the network that joins them. Raises ValueError, in one line, if they do not fit together."""
    gbit: float = setting(MISSING, 'Gbit/s of a node to the others, each way')
    latency_us: float = setting(30.0, 'latency of a message between nodes, in microseconds')
    nodes: int = setting(2, 'number of nodes')
    gpus: int = setting(8, 'number of GPUs, on all nodes together')
    node_gbit: float = setting(3600.0, 'Gbit/s between the GPUs of a node, each way; 3600 is NVLink 4')
    node_latency_us: float = setting(5.0, 'latency of a message inside a node, in microseconds')
    gpu_tflops: float = setting(400.0, 'what a GPU reaches in a step, not its peak, in TFLOP/s')
    # --decode. 2 to 4 KB in a CUDA graph take 9 us by symmetric memory, 17 by NCCL, and 27 to 48 eagerly
    # (sglang issue 10571); a tiny message between nodes 31 us (nccl-tests issue 214)
    alpha_us: float = setting(9.0, '--decode: a small all-reduce inside a node, in microseconds')
    alpha_between_us: float = setting(31.0, '--decode: a small all-reduce between nodes, in microseconds')
    memory_gbs: float = setting(2700.0, "--decode: what a GPU reads, in GB/s; an H100's peak is 3350")

    def __post_init__(self):
        for name, value in vars(self).items():
            if not 0 < value < math.inf:
                raise ValueError(f'{name} is {value}, it must be above 0 and finite')
        if self.gpus % self.nodes:
            raise ValueError(f'gpus is {self.gpus}, it must be a multiple of nodes, {self.nodes}')

    def links(self, tp_size, across):
        """
        The Link of each of 'tp', 'ddp', 'all'; tensor-parallel groups across the nodes or inside them.

        Raises ValueError if they do not fit there.
        """
        if across and self.nodes % tp_size:
            raise ValueError(f'tp_size is {tp_size}, it must divide {self.nodes} nodes')
        if not across and self.gpus // self.nodes % tp_size:
            raise ValueError(f'tp_size is {tp_size}, it must divide {self.gpus // self.nodes} GPUs of a node')
        nodes = dict(tp=tp_size, ddp=self.nodes // tp_size) if across else dict(tp=1, ddp=self.nodes)
        nodes['all'] = self.nodes
        sizes = dict(tp=tp_size, ddp=self.gpus // tp_size, all=self.gpus)
        links = {}
        for axis, n in sizes.items():
            if n > 1 and nodes[axis] > 1:  # a node has n / nodes[axis] GPUs of each group
                sharing = self.gpus * nodes[axis] // (self.nodes * n)
                links[axis] = ring(n, self.latency_us * 1e-6, self.gbit * 1e9 / 8 / sharing)
            elif n > 1:
                links[axis] = ring(n, self.node_latency_us * 1e-6, self.node_gbit * 1e9 / 8)
        return links


def parse_args(argv):
    """(args, a Cluster's fields as a dict, what is composed after each config: files, then flags)"""
    parser = argparse.ArgumentParser(
        prog='python -m speed.costmodel', description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog='Any other --key=value is a key of the configs; see train.py --help.')
    parser.error = lambda message: fail(f'{message}; see python -m speed.costmodel --help')
    parser.add_argument('configs', nargs='+', help='run configs')
    parser.add_argument('--with', dest='withs', metavar='FILE', action='append', default=[],
                        help='a config file composed after each; may be repeated')
    add_text_arguments(parser, 'predict text, on tp_size GPUs, in place of a step')
    for key in fields(Cluster):
        default = dict(required=True) if key.default is MISSING else dict(default=key.default)
        parser.add_argument(f'--{key.name}', type=key.type, **key.metadata, **default)
    args, flags = parser.parse_known_intermixed_args(argv)
    check_text_arguments(args)
    cluster = {key.name: getattr(args, key.name) for key in fields(Cluster)}
    return args, cluster, [*args.withs, *flags]


if __name__ == '__main__':
    begin_program()
    parse_args(sys.argv[1:])  # --help and mistakes are reported before torch is loaded

import numpy as np
import torch
import torch.distributed as dist
from scipy.optimize import nnls
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from data.dataloader import TrainLoader
from model import GPT, GPTConfig, TPGroup, count_all_reduces
from train import observe
from training.sharding import sharding
from variants import gpt_config

VOCAB_SIZE = GPTConfig.vocab_size
SIZES = [2**k for k in range(10, 26)]  # bytes, of a sweep's messages: 1 KiB to 32 MiB

# what an all-reduce of a step is for, and over what: a tensor-parallel group, a data-parallel one, everyone
KINDS = dict(
    forward='tp',  # the residual stream, by g_op
    backward='tp',  # the residual stream, by f_op
    head='tp',  # the vocabulary-parallel head and its cross-entropy, both ways
    gradients='tp',  # of replicated parameters
    norm='tp',  # of the gradient
    average='ddp',  # of all gradients
    report='all',  # the loss, and whether any process is stopping
)


# measuring a link


def sweep(group, device):
    """
    [(bytes, seconds)]: the median time of an all-reduce of each of SIZES over a process group. Collective.

    Groups that sweep at the same time share what they have in common.
    """
    def timed(message, reduction=dist.ReduceOp.SUM):
        began = time.perf_counter()
        dist.all_reduce(message, reduction, group)
        if message.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - began

    def slowest(seconds):
        """Of all processes, which must agree on how often to repeat a message."""
        message = torch.tensor(seconds, device=device)
        timed(message, dist.ReduceOp.MAX)
        return message.item()

    points = []
    slowest(0.0)  # a group's first all-reduce connects it
    for size in SIZES:
        message = torch.zeros(size // 4, device=device)
        repeats = min(max(round(0.2 / slowest(timed(message))), 3), 20)
        points.append((size, slowest(statistics.median(timed(message) for _ in range(repeats)))))
        if points[-1][1] > max(0.5, 2 * points[0][1]):  # a slow link is known well enough by now
            break
    return points


def fit(points):
    """
    The Link nearest to a sweep: least squares of the relative errors, alpha and 1 / beta not negative. Ends
    the program if larger messages took no longer.
    """
    sizes, seconds = np.array(points, dtype=float).T
    (alpha, slowness), _ = nnls(np.stack((1 / seconds, sizes / seconds), axis=1), np.ones(len(points)))
    if not slowness > 0:
        fail(f'this link shows no rate: all-reduces of {sizes[0]:.0f} to {sizes[-1]:.0f} bytes took '
             f'{seconds[0]:.3g} to {seconds[-1]:.3g} s; measure again while nothing else uses it')
    return Link(float(alpha), float(1 / slowness))


def predict(compute, messages, links):
    """Seconds a step. compute: those of one rank without a network; links: the Link of 'tp', 'ddp', 'all'."""
    return compute + sum(
        max(0.0, links[KINDS[message.kind]].seconds(message.bytes) - message.behind * compute)
        for message in messages)


# the all-reduces of a step: observed, or as the design has them


class Message(NamedTuple):
    """An all-reduce of a step."""
    kind: str  # one of KINDS
    bytes: int
    behind: float = 0.0  # the share of the step's compute that it is hidden behind


class Collectives(TorchDispatchMode):
    """
    The all-reduces that reach torch.distributed inside the `with`, eagerly, as a list of Messages.

    A message's kind follows from its shape, its group and when it came, not from who asked for it. So this is
    independent of f_op and g_op, which count themselves. DDP's all-reduces are seen as well.
    """

    def __init__(self, model, behind):
        super().__init__()
        self.messages, self.in_forward, self.group, self.behind = [], False, model.tp.group, behind
        self.hooks = [model.register_forward_pre_hook(lambda *_: setattr(self, 'in_forward', True)),
                      model.register_forward_hook(lambda *_: setattr(self, 'in_forward', False))]

    def __exit__(self, *error):
        super().__exit__(*error)
        for hook in self.hooks:
            hook.remove()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == 'symm_mem':  # its one-shot all-reduce, of the stream alone, is waited for
            self.messages.append(Message(self.kind(args[0], self.group), args[0].nbytes))
        elif 'c10d' in func.namespace:
            assert func is torch.ops.c10d.allreduce_.default, f'{func} is a collective that nobody counts'
            group, waited_for = dist.ProcessGroup.unbox(args[1]), args[4:5] == (False,)
            kinds = [self.kind(tensor, group) for tensor in args[0]]
            self.messages += [Message(kind, tensor.nbytes, 0.0 if waited_for else self.behind.get(kind, 0.0))
                              for kind, tensor in zip(kinds, args[0])]
        return func(*args, **(kwargs or {}))

    def kind(self, tensor, group):
        if tensor.dim() == 3:  # only the stream is sent as (B, T, C)
            return 'forward' if self.in_forward else 'backward'
        if self.in_forward or tensor.dim() == 2:
            return 'head'
        if tensor.numel() <= 2:
            return ('norm', 'report')[tensor.numel() - 1]
        return 'gradients' if self.group and group.group_name == self.group.group_name else 'average'


def behind_sublayer(n_layer, micro_steps=1):
    """Of each way, the share of a training step's compute that a hidden all-reduce overlaps with."""
    sublayer = 1 / (2 * n_layer * micro_steps)
    return dict(forward=sublayer / 3, backward=sublayer * 2 / 3)


def behind_decoding(model):
    """The same of a token that is generated: by the weights that it reads, of the blocks and of the head."""
    blocks = sum(p.numel() for p in model.transformer.h.parameters())
    return dict(forward=blocks / (blocks + model.lm_head.weight.numel()) / (2 * model.config.n_layer))


def observe_step(model, step, behind):
    """
    The Messages of one step() of the model. behind: the share of its compute that hidden ones overlap with.

    Compiled code runs eagerly in here, since neither instrument sees into a graph. That the two instruments
    agree is asserted.
    """
    seen = Collectives(model, behind)
    with torch.compiler.set_stance('force_eager'), count_all_reduces() as own, seen:
        step()
    kinds = [message.kind for message in seen.messages]
    met, counted = (kinds.count('forward'), kinds.count('backward')), (own.forward, own.backward)
    if any('forward' in vars(block) for block in model.transformer.h):
        met, counted = sum(met), sum(counted)  # what a recomputed layer repeats is met in backward
    assert met == counted, f'the stream was all-reduced {met} times, f_op and g_op counted {counted}'
    return seen.messages


def design_messages(config, ddp_size, vocab_size=VOCAB_SIZE):
    """
    The Messages of a step of a config (a namespace of its keys), sharded, with ddp_size replicas.

    The stream's all-reduces, and the parameters that a block uses, are observed in a pass over one token, of
    shapes without numbers; the other messages are the design's. The data-parallel average is one message
    here; DDP sends a few. Raises ValueError if the config makes no model or does not divide.
    """
    R, windows = config.tp_size, config.batch_size * config.gradient_accumulation_steps
    loader = TrainLoader(range(config.block_size + 1), config.block_size, windows, config.seed, 0, ddp_size,
                         config.batch_size, 'cpu')
    N, C = loader.micro_batch * config.block_size, config.n_embd
    wide = 4 if config.dtype == 'float32' else 2  # bytes of the compute dtype
    with FakeTensorMode():
        dense = GPT(gpt_config(vars(config), vocab_size))
        stream, used = observe(dense)  # in float32
        mine = GPT(dense.config, TPGroup(R, rank=0))
    sizes = {name: p.numel() for name, p in mine.named_parameters()
             if dense.get_parameter(name) in used}  # a block may leave one out
    behind, messages = behind_sublayer(config.n_layer, loader.micro_steps), []
    if R > 1:
        head = [Message('head', size) for size in (4 * N, 8 * N, wide * N * C)]
        micro = [Message(way, size * N * wide // 4, behind[way] if kind == 'hidden' else 0.0)
                 for way, kind, size in stream]
        replicated = sum(size for name, size in sizes.items() if sharding(name) is None)
        messages = (micro + head) * loader.micro_steps
        messages += [Message('gradients', 4 * replicated), Message('norm', 4)]
    if ddp_size > 1:
        messages.append(Message('average', 4 * sum(sizes.values())))
    if R * ddp_size > 1:
        messages.append(Message('report', 8))
    return messages


def by_kind(messages):
    """{kind: [how many, bytes in all]} for each of KINDS"""
    sizes = {kind: [message.bytes for message in messages if message.kind == kind] for kind in KINDS}
    return {kind: [len(size), sum(size)] for kind, size in sizes.items()}


def print_messages(rows):
    """rows: (name, by_kind() of its messages) of each config"""
    print(f'{"all-reduces a step / MB":28}', *(f'{kind:>14}' for kind in KINDS))
    for name, kinds in rows:
        cells = (f'{count:,} / {size / 1e6:,.4g}' for count, size in kinds.values())
        print(f'{name:28}', *(f'{cell:>14}' for cell in cells))


# predictions


def foresee(config, cluster, vocab_size=VOCAB_SIZE):
    """(compute, messages) of a step of a config, a namespace of its keys, as predict() takes them."""
    if cluster.gpus % config.tp_size:
        raise ValueError(f'tp_size is {config.tp_size}, it must divide {cluster.gpus} GPUs')
    messages = design_messages(config, cluster.gpus // config.tp_size, vocab_size)
    with torch.device('meta'):
        flops_per_token = GPT(gpt_config(vars(config), vocab_size)).flops_per_token()
    return flops_per_token * step_tokens(config) / (cluster.gpus * cluster.gpu_tflops * 1e12), messages


def step_tokens(config):
    return config.batch_size * config.gradient_accumulation_steps * config.block_size


def predicted_seconds(config, cluster, across=True, vocab_size=VOCAB_SIZE):
    """
    Seconds that a training step of a run would take, sharded over a Cluster; if its blocks change, the mean.

        predicted_seconds(info['config'], Cluster(gbit=25))  # info: the contents of run.json

    config: a Config, or its keys as a dict; its `shard` and `tp_across_nodes` are not read. across: each
    tensor-parallel group has one GPU on each of tp_size nodes, the guide's case; False: it lies inside a
    node. The dense control, tp_size 1, is only data-parallel. vocab_size: the model's.

    Raises ValueError if the config makes no model or does not divide over the GPUs.
    """
    keys = config if isinstance(config, dict) else vars(config)
    links = cluster.links(keys['tp_size'], across)
    return mean_over_steps([
        predict(*foresee(SimpleNamespace(**keys | dict(block_types=block_types)), cluster, vocab_size), links)
        for _, block_types in stages(keys)], keys)


def foresee_text(config, cluster, args, vocab_size=VOCAB_SIZE):
    """
    (compute, messages) of a text's first token, and of one in its middle, as predict() takes them.

    config: a namespace of its keys; args: prompt, new and batch.
    """
    R, wide = config.tp_size, 4 if config.dtype == 'float32' else 2  # bytes of the compute dtype
    with FakeTensorMode():
        dense = GPT(gpt_config(vars(config), vocab_size))
        stream = [found for found in observe(dense)[0] if found[0] == 'forward']
        mine = GPT(dense.config, TPGroup(R, rank=0) if R > 1 else None)
    head, n_layer = mine.lm_head.weight.numel(), config.n_layer
    blocks = sum(p.numel() for p in mine.transformer.h.parameters())
    width = config.n_embd // R * n_layer  # of all layers' keys
    texts, middle = args.batch, args.prompt + args.new // 2

    def seconds(tokens, context):
        """Of a pass over so many tokens of each text, which attend to so many on average."""
        flops = 2 * texts * (tokens * blocks + head) + 4 * texts * tokens * context * width
        read = wide * (blocks + head + 2 * texts * context * width)
        return max(flops / (cluster.gpu_tflops * 1e12), read / (cluster.memory_gbs * 1e9))

    def messages(tokens, behind):
        return [Message('forward', size * wide // 4 * texts * tokens, behind if kind == 'hidden' else 0.0)
                for _, kind, size in stream]

    return ((seconds(args.prompt, args.prompt / 2), messages(args.prompt, 1 / (2 * n_layer))),
            (seconds(1, middle), messages(1, behind_decoding(mine)['forward'])))


def print_text(configs, control, cluster, args):
    """Print what generating text would take inside a node and between nodes."""
    rows = [(config, *foresee_text(config, cluster, args)) for config in configs]
    rows.sort(key=lambda row: -len(row[2][1]))
    n = control.tp_size
    alone = foresee_text(control, cluster, args)[1]
    for where, alpha, gbit in (('inside a node', cluster.alpha_us, cluster.node_gbit),
                               ('between nodes', cluster.alpha_between_us, cluster.gbit)):
        link = Link(alpha * 1e-6, ring(n, 0.0, gbit * 1e9 / 8).beta)
        print(f'\n{n} GPUs {where}, {link}; speed-up over TP blocks alone')
        print(f'{"config":28} {"all-reduces":>11} {"hidden":>6} {"first token":>12} {"compute":>10} '
              f'{"a token":>10} {"tokens/s":>9} {"speed-up":>9}')
        for config, first, token in rows:
            took = predict(*token, dict(tp=link))
            hidden = sum(message.behind > 0 for message in token[1])
            print(f'{config.wandb_run_name:28} {len(token[1]):11} {hidden:6} '
                  f'{predict(*first, dict(tp=link)) * 1e3:9.2f} ms {token[0] * 1e6:7.0f} us '
                  f'{took * 1e6:7.0f} us {args.batch / took:9,.0f} '
                  f'{predict(*alone, dict(tp=link)) / took:9.3f}')


def print_layout(rows, control, cluster, across):
    """rows: (config, compute, messages) of each config; control: that of TP blocks alone."""
    where = f'tensor-parallel groups {"across" if across else "inside"} the nodes'
    try:
        links = {tp_size: cluster.links(tp_size, across) for tp_size in (1, control[0].tp_size)}
    except ValueError as error:
        return print(f'\n{where}: {error}')
    print(f'\n{where}; speed-up over TP blocks alone')
    print(f'{"config":28} {"comms":>5} {"compute":>10} {"predicted":>10} {"tokens/s":>10} {"speed-up":>9}')
    slowest = predict(*control[1:], links[control[0].tp_size])
    for config, compute, messages in rows:
        seconds = predict(compute, messages, links[config.tp_size])
        print(f'{config.wandb_run_name:28} {communications(config.block_types, config.tp_size):5} '
              f'{compute * 1e3:7,.0f} ms {seconds * 1e3:7,.0f} ms {step_tokens(config) / seconds:10,.0f} '
              f'{slowest / seconds:9.3f}')


def main(argv):
    args, cluster, flags = parse_args(argv)
    paths = [path for path in args.configs if load([path, *flags]).tp_size > 1]  # dense has a row of its own
    if not paths:
        fail('tp_size is 1 in every config, it must be above 1 in one')
    alone = [paths[0], *flags, '--block_types=tp']
    configs = load_each([*([path, *flags] for path in paths), alone, [*alone, '--tp_size=1']])
    first, rows = configs[0], []
    for config in configs[:-1]:
        if config.tp_size != first.tp_size:
            config.refuse(f'tp_size is {config.tp_size}, but {first.tp_size} in {paths[0]}; they must agree')
    with first.refusing():
        cluster = Cluster(**cluster)
        if args.decode:
            print(f'predicted: {args.batch} x {args.new} tokens after {args.prompt}, {first.dtype}, tp_size '
                  f'{first.tp_size}; GPUs read {cluster.memory_gbs:g} GB/s and reach {cluster.gpu_tflops:g} '
                  'TFLOP/s in a prompt')
            return print_text(configs, load(alone), cluster, args)
        rows = [(config, *foresee(config, cluster)) for config in configs[:-1]]
    rows.sort(key=lambda row: (by_kind(row[2])['forward'][0],
                               communications(row[0].block_types, row[0].tp_size)), reverse=True)
    control = next(row for row in rows if not differences(vars(row[0]), vars(load(alone))))
    try:
        rows.insert(0, (configs[-1], *foresee(configs[-1], cluster)))
    except ValueError as error:
        print(f'dense: {error}')
    print(f'predicted: {cluster.gpus} GPUs at {cluster.gpu_tflops:g} TFLOP/s over {cluster.nodes} nodes, '
          f'{cluster.gbit:g} Gbit/s and {cluster.latency_us:g} us between nodes, {cluster.node_gbit:g} and '
          f'{cluster.node_latency_us:g} inside; tp_size {first.tp_size}, {first.dtype}, {first.batch_size} x '
          f'{first.gradient_accumulation_steps} windows of {first.block_size} tokens a step')
    for across in (True, False):
        print_layout(rows, control, cluster, across)
    print()
    print_messages([(config.wandb_run_name, by_kind(messages)) for config, _, messages in rows])


if __name__ == '__main__':
    main(sys.argv[1:])
