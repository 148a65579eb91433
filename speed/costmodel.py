"""
What a sharded training step takes where the network counts: its all-reduces, a link's measure, and a model.

    step time = compute of one rank + sum over the step's all-reduces of (alpha + bytes / beta)

    python costmodel.py config/train_gpt2_*comm.py --gbit=25 --nodes=2 --gpus=8

The command says what GPUs that are not here would take and gain. Where there are processes, `bench.py
--shard` measures all that stands in the formula, and the step time too.

What is assumed
- An all-reduce takes alpha + bytes / beta. Bytes are the message's, counted once, whatever the wire carries.
- Where no all-reduce was measured, it is a ring of n processes: 2 (n - 1) messages in a row of bytes / n
  each. So alpha = 2 (n - 1) latency, and beta = bandwidth n / (2 (n - 1)), of the slowest link on the way.
- The groups that reduce over a node's network at the same time share it evenly.
- Nothing overlaps, not even the data-parallel average with the backward pass, and nobody waits for a late
  peer.
- The command's compute is PaLM's count of FLOPs at --gpu_tflops, the same for every config, and its
  data-parallel average is one message of all gradients that a process holds, in float32. bench.py measures
  the one and observes the other.
"""

import argparse
import math
import statistics
import sys
import time
from dataclasses import MISSING, dataclass, field, fields
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from scipy.optimize import nnls
from torch.utils._python_dispatch import TorchDispatchMode

from configurator import communications, fail, load
from data.dataloader import TrainLoader
from model import GPT, GPTConfig, Ranks, count_all_reduces, sharding
from train import model_config_of, observe_all_reduces

VOCAB_SIZE = GPTConfig.vocab_size
SIZES = [2**k for k in range(10, 26)]   # bytes, of a sweep's messages: 1 KiB to 32 MiB

# what an all-reduce of a step is for, and whose: a tensor-parallel group's, a data-parallel one's, everyone's
KINDS = dict(
    forward='tp',                       # the residual stream, by g_op
    backward='tp',                      # the residual stream, by f_op
    head='tp',                          # the vocabulary-parallel head and its cross-entropy, both ways
    gradients='tp',                     # of replicated parameters
    norm='tp',                          # of the gradient
    average='ddp',                      # of all gradients
    report='all',                       # the loss, and if any process is stopping
)


# a link and its measure


class Link(NamedTuple):
    """What an all-reduce over it takes."""
    alpha: float                        # seconds, whatever the size
    beta: float                         # bytes a second

    def seconds(self, size):
        return self.alpha + size / self.beta

    def __str__(self):
        return f'alpha {self.alpha * 1e6:.0f} us, beta {self.beta * 8e-9:.3g} Gbit/s'


def ring(n, latency, bandwidth):
    """The Link that a ring of n processes makes of so many seconds a message and bytes a second."""
    return Link(2 * (n - 1) * latency, bandwidth * n / (2 * (n - 1)))


def sweep(group, device):
    """
    [(bytes, seconds)]: the median time of an all-reduce of SIZES over a process group. A collective call;
    groups that sweep at the same time share what they have in common.
    """
    def timed(message, reduction=dist.ReduceOp.SUM):
        began = time.perf_counter()
        dist.all_reduce(message, reduction, group)
        if message.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - began

    def slowest(seconds):
        """Of all processes, who must agree on how often to repeat a message."""
        message = torch.tensor(seconds, device=device)
        timed(message, dist.ReduceOp.MAX)
        return message.item()

    points = []
    slowest(0.0)                        # a group's first all-reduce connects it
    for size in SIZES:
        message = torch.zeros(size // 4, device=device)
        repeats = min(max(round(0.2 / slowest(timed(message))), 3), 20)
        points.append((size, slowest(statistics.median(timed(message) for _ in range(repeats)))))
        if points[-1][1] > 0.5:         # a slow link is known well enough by now
            break
    return points


def fit(points):
    """The Link nearest to a sweep: least squares of the relative errors, alpha and 1 / beta not negative."""
    sizes, seconds = np.array(points, dtype=float).T
    (alpha, slowness), _ = nnls(np.stack((1 / seconds, sizes / seconds), axis=1), np.ones(len(points)))
    assert slowness > 0, f'no message took longer than a smaller one: {points}'
    return Link(float(alpha), float(1 / slowness))


def predict(compute, messages, links):
    """
    Seconds a step. compute: those of one rank without a network; links: the Link of each of 'tp', 'ddp' and
    'all'.
    """
    return compute + sum(links[KINDS[message.kind]].seconds(message.bytes) for message in messages)


# the all-reduces of a step: observed, or as the design has them


class Message(NamedTuple):
    """An all-reduce of a step."""
    kind: str                           # one of KINDS
    bytes: int


class Collectives(TorchDispatchMode):
    """
    The all-reduces that reach torch.distributed inside the `with`, eagerly, as a list of Messages.

    Who asked for one is not asked: its kind follows from its shape, its group and when it came. So this can
    be held against f_op and g_op, which count themselves. DDP's all-reduces are met as well.
    """

    def __init__(self, model):
        super().__init__()
        self.messages, self.in_forward, self.group = [], False, model.ranks.group
        self.hooks = [model.register_forward_pre_hook(lambda *_: setattr(self, 'in_forward', True)),
                      model.register_forward_hook(lambda *_: setattr(self, 'in_forward', False))]

    def __exit__(self, *error):
        super().__exit__(*error)
        for hook in self.hooks:
            hook.remove()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if 'c10d' in func.namespace:
            assert func is torch.ops.c10d.allreduce_.default, f'{func} is a collective that nobody counts'
            group = dist.ProcessGroup.unbox(args[1])
            self.messages += [Message(self.kind(tensor, group), tensor.nbytes) for tensor in args[0]]
        return func(*args, **(kwargs or {}))

    def kind(self, tensor, group):
        if tensor.dim() == 3:           # the stream alone is sent as (B, T, C)
            return 'forward' if self.in_forward else 'backward'
        if self.in_forward or tensor.dim() == 2:
            return 'head'
        if tensor.numel() <= 2:
            return ('norm', 'report')[tensor.numel() - 1]
        return 'gradients' if self.group and group.group_name == self.group.group_name else 'average'


def observe_step(model, step):
    """
    The Messages of one step(), which trains the model.

    Compiled code runs eagerly in here, for neither instrument sees into a graph. They must agree, or it is a
    bug.
    """
    with torch.compiler.set_stance('force_eager'), count_all_reduces() as own, Collectives(model) as seen:
        step()
    kinds = [message.kind for message in seen.messages]
    met, counted = (kinds.count('forward'), kinds.count('backward')), (own.forward, own.backward)
    assert met == counted, f'the stream was all-reduced {met} times, f_op and g_op counted {counted}'
    return seen.messages


def design_messages(config, ddp_size, vocab_size=VOCAB_SIZE):
    """
    The Messages of a step of a config (a namespace of its keys), sharded, with so many data-parallel
    processes.

    The stream's all-reduces are counted in a pass of a narrow model; their sizes, and the other messages, are
    the design's. The data-parallel average is one message here, where DDP sends a few. Raises ValueError for
    a config that makes no model or does not divide.
    """
    R, windows = config.tp_size, config.batch_size * config.gradient_accumulation_steps
    loader = TrainLoader(range(config.block_size + 1), config.block_size, windows, config.seed, 0, ddp_size,
                         config.batch_size, 'cpu')
    N, C = loader.micro_batch * config.block_size, config.n_embd
    wide = 4 if config.dtype == 'float32' else 2                # bytes of the compute dtype
    narrow = GPT(GPTConfig(2, 64, config.n_layer, R, R, tp_size=R, block_types=config.block_types))
    stream = observe_all_reduces(narrow)
    with torch.device('meta'):
        mine = GPT(model_config_of(config, vocab_size), Ranks(R, local=1))
    messages = []
    if R > 1:
        head = [Message('head', size) for size in (4 * N, 8 * N, wide * N * C)]
        micro = [Message('forward', wide * N * C)] * stream.forward
        micro += [Message('backward', wide * N * C)] * stream.backward
        replicated = sum(p.numel() for name, p in mine.named_parameters() if sharding(name) is None)
        messages = (micro + head) * loader.micro_steps
        messages += [Message('gradients', 4 * replicated), Message('norm', 4)]
    if ddp_size > 1:
        messages.append(Message('average', 4 * mine.num_params()))
    if R * ddp_size > 1:
        messages.append(Message('report', 8))
    return messages


def by_kind(messages):
    """{kind: [how many, bytes in all]} for each of KINDS"""
    sizes = {kind: [message.bytes for message in messages if message.kind == kind] for kind in KINDS}
    return {kind: [len(size), sum(size)] for kind, size in sizes.items()}


def print_messages(rows):
    """rows: (name, what by_kind() gave) of each config."""
    print(f'{"all-reduces a step / MB":28}', *(f'{kind:>14}' for kind in KINDS))
    for name, kinds in rows:
        cells = (f'{count:,} / {size / 1e6:,.4g}' for count, size in kinds.values())
        print(f'{name:28}', *(f'{cell:>14}' for cell in cells))


# what GPUs that are not here would take


def setting(default, words):
    return field(default=default, metadata=dict(help=words))


@dataclass
class Cluster:
    """GPUs and what joins them. Raises ValueError, in one line, for what cannot be."""
    gbit: float = setting(MISSING, 'Gbit/s of a node to the others, each way')
    latency_us: float = setting(30.0, 'of a message between nodes, in microseconds')
    nodes: int = setting(2, 'nodes')
    gpus: int = setting(8, 'GPUs, on all nodes together')
    node_gbit: float = setting(3600.0, 'Gbit/s between the GPUs of a node, each way; 3600 is NVLink 4')
    node_latency_us: float = setting(5.0, 'of a message inside a node, in microseconds')
    gpu_tflops: float = setting(400.0, 'what a GPU reaches in a step, not its peak, in TFLOP/s')

    def __post_init__(self):
        for name, value in vars(self).items():
            if not 0 < value < math.inf:
                raise ValueError(f'{name} is {value}, it must be above 0 and finite')
        if self.gpus % self.nodes:
            raise ValueError(f'gpus is {self.gpus}, not a multiple of nodes, {self.nodes}')

    def links(self, tp_size, across):
        """The Link of each of 'tp', 'ddp', 'all'; tensor-parallel groups across the nodes or inside them."""
        if across and self.nodes % tp_size:
            raise ValueError(f'tp_size is {tp_size}, it must divide {self.nodes} nodes')
        if not across and self.gpus // self.nodes % tp_size:
            raise ValueError(f'tp_size is {tp_size}, it must divide {self.gpus // self.nodes} GPUs of a node')
        nodes = dict(tp=tp_size, ddp=self.nodes // tp_size) if across else dict(tp=1, ddp=self.nodes)
        nodes['all'] = self.nodes
        sizes = dict(tp=tp_size, ddp=self.gpus // tp_size, all=self.gpus)
        links = {}
        for axis, n in sizes.items():
            if n > 1 and nodes[axis] > 1:       # a node has n / nodes[axis] GPUs of each group
                sharing = self.gpus * nodes[axis] // (self.nodes * n)
                links[axis] = ring(n, self.latency_us * 1e-6, self.gbit * 1e9 / 8 / sharing)
            elif n > 1:
                links[axis] = ring(n, self.node_latency_us * 1e-6, self.node_gbit * 1e9 / 8)
        return links


def foresee(config, cluster, vocab_size=VOCAB_SIZE):
    """(compute, messages) of a step of a config, a namespace of its keys, as predict() takes them."""
    if cluster.gpus % config.tp_size:
        raise ValueError(f'tp_size is {config.tp_size}, it must divide {cluster.gpus} GPUs')
    messages = design_messages(config, cluster.gpus // config.tp_size, vocab_size)
    with torch.device('meta'):
        flops_per_token = GPT(model_config_of(config, vocab_size)).flops_per_token()
    return flops_per_token * step_tokens(config) / (cluster.gpus * cluster.gpu_tflops * 1e12), messages


def step_tokens(config):
    return config.batch_size * config.gradient_accumulation_steps * config.block_size


def predicted_seconds(config, cluster, across=True, vocab_size=VOCAB_SIZE):
    """
    Seconds that a training step of a run would take, sharded over a Cluster.

        predicted_seconds(info['config'], Cluster(gbit=25))         # info: what run.json says

    config: a Config, or its keys as a dict; its `shard` and `tp_across_nodes` are not read. across: each
    tensor-parallel group has one GPU on each of tp_size nodes, the guide's case; False: it lies inside a
    node. The dense control, tp_size 1, is data-parallel alone. vocab_size: the model's.

    Raises ValueError where the config makes no model or does not divide over the GPUs.
    """
    config = SimpleNamespace(**config) if isinstance(config, dict) else config
    links = cluster.links(config.tp_size, across)
    return predict(*foresee(config, cluster, vocab_size), links)


def print_layout(rows, control, cluster, across):
    """rows: (config, compute, messages) of each; control: that of TP blocks alone."""
    where = f'tensor-parallel groups {"across" if across else "inside"} the nodes'
    try:
        links = cluster.links(rows[0][0].tp_size, across)
    except ValueError as error:
        return print(f'\n{where}: {error}')
    print(f'\n{where}; speed-up over TP blocks alone')
    print(f'{"config":28} {"comms":>5} {"compute":>10} {"predicted":>10} {"tokens/s":>10} {"speed-up":>9}')
    slowest = predict(*control[1:], links)
    for config, compute, messages in rows:
        seconds = predict(compute, messages, links)
        print(f'{config.wandb_run_name:28} {communications(config.block_types, config.tp_size):5} '
              f'{compute * 1e3:7,.0f} ms {seconds * 1e3:7,.0f} ms {step_tokens(config) / seconds:10,.0f} '
              f'{slowest / seconds:9.3f}')


def main(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
        epilog='Any other --key=value is a key of the configs; see train.py --help.')
    parser.error = fail
    parser.add_argument('configs', nargs='+', help='run configs')
    for key in fields(Cluster):
        default = dict(required=True) if key.default is MISSING else dict(default=key.default)
        parser.add_argument(f'--{key.name}', type=key.type, **key.metadata, **default)
    options, flags = parser.parse_known_intermixed_args(argv)
    paths = vars(options).pop('configs')
    configs = [load([path, *flags]) for path in paths] + [load([paths[0], *flags, '--block_types=tp'])]
    first = configs[0]
    for config in configs:
        if config.tp_size != first.tp_size:
            config.refuse(f'tp_size is {config.tp_size}, but {first.tp_size} in {paths[0]}; they must agree')
    try:
        cluster = Cluster(**vars(options))
        *rows, control = [(config, *foresee(config, cluster)) for config in configs]
    except ValueError as error:
        first.refuse(str(error))
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
