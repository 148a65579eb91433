"""
bench.py --kept: the memory that a step's forward pass keeps for its backward pass.
"""

import torch
import torch._dynamo
from torch.utils._pytree import tree_leaves

from model import GPT
from speed.candidates import case
from training.compiling import autocast, recompute
from training.distributed import find_world
from variants import gpt_config


def kept_tensors(model, windows, config, world):
    """The tensors, one per storage, that a forward pass over `windows` windows keeps; no parameters."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    torch._dynamo.reset()  # or the second batch size would get a graph for any size
    recompute(model, config.recompute_layers)
    network = torch.compile(model) if config.compile else model
    idx = torch.zeros(windows, config.block_size, dtype=torch.long, device=world.device)
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = tensor
        return tensor

    def keep_inputs(block, inputs):
        for tensor in filter(torch.is_tensor, tree_leaves(inputs)):
            keep(tensor)

    with autocast(config, world):
        network(idx, idx)
        if not config.compile:  # eagerly, what a recomputed layer reads is kept without a hook's knowledge
            for block in model.transformer.h[:config.recompute_layers]:
                block.register_forward_pre_hook(keep_inputs)  # the model is not used any further
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            network(idx, idx)
    return list(kept.values())


def measure(config, vocab_size, world):
    """A config's row of bench_kept: GiB of a forward pass, and with the parameters' own state."""
    torch.manual_seed(config.seed)
    model = GPT(gpt_config(vars(config), vocab_size)).to(world.device)
    # run with one window and with two: every further window keeps as much as the second
    one, two = (kept_tensors(model, windows, config, world) for windows in (1, 2))
    sizes = [sum(tensor.untyped_storage().nbytes() for tensor in tensors) for tensors in (one, two)]
    logits = [tensor for tensor in one if tensor.dtype == torch.float32
              and tensor.numel() >= config.block_size * vocab_size]
    kept = sizes[0] + (sizes[1] - sizes[0]) * (config.batch_size - 1)
    state = 4 * sum(p.nbytes for p in model.parameters())  # weights, gradients, AdamW's two moments
    return dict(name=config.wandb_run_name, tp_size=config.tp_size, kept_gib=kept / 2**30,
                step_gib=(kept + state) / 2**30, float32_logits=len(logits))


def bench_kept(configs, args):
    """
    Print what a micro-batch's forward pass keeps, and its sum with weights, gradients and moments.

    float32 logits: how many float32 tensors of (B, T, V) are among what is kept. Returns the rows as dicts.
    """
    world = find_world(configs[0])
    rows = [measure(config, args.vocab_size, world) for config in configs]
    print(case(configs[-1], world.device))
    print(f'{"config":28} {"kept, GiB":>10} {"with state":>11} {"ratio to dense":>15} {"float32 logits":>15}')
    for row in rows:
        row['ratio'] = row['step_gib'] / rows[0]['step_gib']
        print(f'{row["name"]:28} {row["kept_gib"]:10.3f} {row["step_gib"]:11.3f} {row["ratio"]:15.3f} '
              f'{row["float32_logits"]:15}')
    return rows
