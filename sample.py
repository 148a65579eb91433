"""
Text from a trained run.

    python sample.py --out_dir=out/gpt2-12comm-cpu --start="def main(" --num_samples=3
    python sample.py --out_dir=out/gpt2-12comm-cpu --start=FILE:prompt.txt --checkpoint=ckpt-best.pt
    python sample.py --init_from=gpt2 --start="The"
    torchrun --standalone --nproc_per_node=2 sample.py --shard=True --prompt=def --out_dir=...

The checkpoint says which tokenizer, block_types (the last) and tp_size it was trained with. With --shard=True
each process holds one tensor-parallel rank, and draws the text that one process simulating all would draw.
"""

import argparse
import math
import sys
from pathlib import Path

from configurator import Config, begin_program, complete, fail, one_line


def parse_args(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument('--out_dir', help="the run's folder")
    parser.add_argument('--init_from', help='instead: gpt2 ... gpt2-xl, a folder, a file')
    parser.add_argument('--checkpoint', default='ckpt.pt', help='a file in it: ckpt.pt, ckpt-best.pt')
    # torchrun would take --start for an abbreviation of a flag of its own
    parser.add_argument('--start', '--prompt', action='append',
                        help='a text to continue, or FILE:path; may be repeated')
    parser.add_argument('--num_samples', type=int, default=3)
    parser.add_argument('--max_new_tokens', type=int, default=300)
    parser.add_argument('--temperature', type=float, default=0.8, help='below 1 is more cautious')
    parser.add_argument('--top_k', type=int, default=200, help='only the k likeliest tokens; 0: all')
    parser.add_argument('--seed', type=int, default=1337)
    parser.add_argument('--device', help='default: cuda if there is one, else cpu')
    parser.add_argument('--tp_size', type=int, help="number of tensor-parallel ranks; default: the run's")
    parser.add_argument('--shard', choices=('True', 'False'), default='False',
                        help='one tensor-parallel rank per process')
    parser.error = lambda message: fail(f'{message}; see python sample.py --help')
    args = parser.parse_args(argv)
    if (args.out_dir is None) == (args.init_from is None):
        fail('give one of --out_dir and --init_from; see python sample.py --help')
    for key, fits, wanted in (('temperature', 1e-3 <= args.temperature < math.inf, 'at least 0.001'),
                              ('num_samples', args.num_samples >= 1, 'at least 1'),
                              ('max_new_tokens', args.max_new_tokens >= 1, 'at least 1'),
                              ('top_k', args.top_k >= 0, 'at least 0'),
                              ('seed', 0 <= args.seed < 2**63, 'at least 0 and below 2**63')):
        if not fits:
            fail(f'--{key} is {getattr(args, key)}, it must be {wanted}')
    return args


if __name__ == '__main__':
    begin_program()
    parse_args(sys.argv[1:])  # --help and mistakes are reported before torch is loaded

import torch
import torch.distributed as dist

from data.corpus import load_tokenizer
from model import GPT
from training import pretrained
from training.distributed import World, connect, open_device, read_environment, tensor_parallel_groups
from training.sharding import shard_model
from variants import gpt_config


def load_run(args, flags):
    """
    (config, model, meta): a net's keys with the flags, the dense network, and what load_tokenizer() needs.

    Raises FileNotFoundError or ValueError if there is none, or ValueError if its tokenizer is not known.
    """
    path = Path(args.out_dir or '', args.checkpoint)
    found = pretrained.load(args.init_from) if args.init_from else pretrained.read_file(path)
    if found.meta is None:
        raise ValueError(f'{args.init_from or path} does not say how its text is tokenized')
    config = Config(**complete(found.keys) | flags)
    config.sources = {key: 'sample.py' if key in flags else args.init_from or path for key in vars(config)}
    model = GPT(gpt_config(vars(config)))
    model.load_state_dict(found.weights)
    config.block_types = model.config.block_types  # a net of the hub names none
    return config, model.eval(), found.meta


def join_world(config, device):
    """The World of this process, joined if there are others. Refuses processes that would do nothing."""
    process, processes = read_environment()
    world = World(process, processes, tensor_parallel_groups(config, processes), device)
    if processes != world.tp_processes:
        config.refuse(f'{processes} processes were started, must be {world.tp_processes}: tp_size if shard '
                      'is True, else one')
    return connect(config, world) if processes > 1 else world


def encode(start, tokenizer):
    """The tokens of a start. Raises OSError if its file cannot be read, ValueError if it is empty."""
    if start.startswith('FILE:'):
        start = Path(start.removeprefix('FILE:')).read_text(encoding='utf-8')
    if not start:
        raise ValueError('--start is empty; the model needs at least one token to continue')
    return torch.tensor(tokenizer.encode(start))


def continue_each(model, prompts, *how):
    """Prompts (T,) -> a list of (T + new,); those of one length go together. how: as for GPT.generate()"""
    texts = {}
    for length in sorted({len(prompt) for prompt in prompts}):
        rows = [i for i, prompt in enumerate(prompts) if len(prompt) == length]
        texts.update(zip(rows, model.generate(torch.stack([prompts[i] for i in rows]), *how)))
    return [texts[i] for i in range(len(prompts))]


def main(argv):
    args = parse_args(argv)
    try:
        device = open_device(args.device or ('cuda' if torch.cuda.is_available() else 'cpu'))
    except ValueError as error:
        fail(f'--{error}; try --device=cpu')
    # what the run says of training does not count here
    flags = dict(shard=args.shard == 'True', tp_across_nodes=False, log_diagnostics=False, recompute_layers=0,
                 dtype='float32', backend=None)
    if args.tp_size is not None:
        flags['tp_size'] = args.tp_size
    with one_line(ValueError, RuntimeError):
        config, model, meta = load_run(args, flags)
        tokenizer = load_tokenizer(meta)
        prompts = [encode(start, tokenizer).to(device) for start in args.start or ['\n']]
    world = join_world(config, device)
    model = (model if world.tp is None else shard_model(model, world.tp)).to(device)
    if max(map(len, prompts)) + args.max_new_tokens > config.block_size and world.rank0:
        print(f'block_size is {config.block_size}; after so many tokens, each recomputes its window',
              file=sys.stderr)
    torch.manual_seed(args.seed)  # every process draws the same, from the same logits
    prompts = [prompt for prompt in prompts for _ in range(args.num_samples)]
    for tokens in continue_each(model, prompts, args.max_new_tokens, args.temperature, args.top_k or None):
        # the model's vocabulary is rounded up: tokens beyond the tokenizer's have no text
        world.say(tokenizer.decode([token for token in tokens.tolist() if token < meta['vocab_size']]),
                  '---------------')
    if world.processes > 1:
        dist.destroy_process_group()


if __name__ == '__main__':
    main(sys.argv[1:])
