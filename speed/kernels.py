"""
bench.py --kernels: the kernels that torch.compile generates for a micro-batch, and the bytes they move.

They are counted once operations are fused, then thrown away: nothing is compiled to machine code.
"""

import copy

import torch
import torch._dynamo
import torch._functorch.config
import torch._inductor.config
from torch._functorch.aot_autograd import make_boxed_func
from torch._inductor.compile_fx import compile_fx, compile_fx_inner
from torch._inductor.ir import MultiOutput

from model import GPT
from training.compiling import autocast, recompute
from training.distributed import find_world
from variants import gpt_config


class Counted(Exception):
    """Raised in the compiler once it has fused a graph."""


def fused_kernels(model, windows, config, world):
    """[kernels of the forward graph, of the backward graph], each a list of (generated, bytes of a call)."""
    graphs = []

    def count(nodes):
        sizes = [(not node.is_extern(), node.get_read_write_buffers_sizes())
                 for node in nodes if not isinstance(node.node, MultiOutput)]  # a part of another's result
        graphs.append([(generated, size) for generated, size in sizes if size])
        raise Counted

    def lower(graph, inputs, **options):
        eager, counted = copy.deepcopy(graph), len(graphs)
        try:
            compile_fx_inner(graph, inputs, **options)
        except Exception:  # torch's own, around Counted
            if len(graphs) == counted:
                raise
        return make_boxed_func(eager.forward)

    torch._dynamo.reset()
    recompute(model, config.recompute_layers)
    network = torch.compile(
        model, fullgraph=True, backend=lambda *graph: compile_fx(*graph, inner_compile=lower))
    idx = torch.zeros(windows, config.block_size, dtype=torch.long, device=world.device)
    with (torch._inductor.config.patch(_post_fusion_custom_pass=count, fx_graph_cache=False),
          torch._functorch.config.patch(enable_autograd_cache=False)):
        with autocast(config, world):
            loss = network(idx, idx)[1]
        loss.backward()
    return graphs


def measure(config, vocab_size, world):
    """A config's row of bench_kernels."""
    model = GPT(gpt_config(vars(config), vocab_size)).to(world.device)
    row, mib = dict(name=config.wandb_run_name, tp_size=config.tp_size), 0
    for way, kernels in zip(
            ('forward', 'backward'), fused_kernels(model, config.batch_size, config, world), strict=True):
        for generated, kind in (True, 'generated'), (False, 'library'):
            sizes = [size for is_generated, size in kernels if is_generated == generated]
            row |= {f'{way}_{kind}': len(sizes), f'{way}_{kind}_mib': sum(sizes) / 2**20}
            mib += row[f'{way}_{kind}_mib']
    return row | dict(mib=mib)


def bench_kernels(configs, args):
    """
    Print how many kernels a micro-batch takes, forward and backward, and what they read and write.

    Library kernels are matmuls and attention. Returns the rows as dicts.
    """
    world = find_world(configs[0])
    rows = [measure(config, args.vocab_size, world) for config in configs]
    last = configs[-1]
    print(f'compiled for {world.device.type}, {last.dtype}, batch {last.batch_size} x {last.block_size}, '
          f'n_layer {last.n_layer}, n_embd {last.n_embd}, tp_size {last.tp_size}, torch {torch.__version__}')
    print(f'{"config":28} {"generated, forward":>19} {"backward":>19} {"library, forward":>19} '
          f'{"backward":>19} {"MiB in all":>11} {"ratio to dense":>15}')
    for row in rows:
        row['ratio'] = row['mib'] / rows[0]['mib']
        cells = [f'{row[key]:5} {row[key + "_mib"]:9.1f} MiB' for key in
                 ('forward_generated', 'backward_generated', 'forward_library', 'backward_library')]
        print(f'{row["name"]:28} {" ".join(cells)} {row["mib"]:11.1f} {row["ratio"]:15.3f}')
    return rows
