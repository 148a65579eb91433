"""
Text from a trained run.

    python sample.py --out_dir=out/gpt2-12comm-cpu --start="def main(" --num_samples=3
    python sample.py --out_dir=out/gpt2-12comm-cpu --start=FILE:prompt.txt --checkpoint=ckpt-best.pt

The checkpoint says which tokenizer, block_types and tp_size it was trained with.
"""

import argparse
import math
import sys
from pathlib import Path

from configurator import begin_program, complete, fail


def parse_args(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument('--out_dir', required=True, help="the run's folder")
    parser.add_argument('--checkpoint', default='ckpt.pt', help='a file in it: ckpt.pt, ckpt-best.pt')
    parser.add_argument('--start', default='\n', help='the text to continue, or FILE:path')
    parser.add_argument('--num_samples', type=int, default=3)
    parser.add_argument('--max_new_tokens', type=int, default=300)
    parser.add_argument('--temperature', type=float, default=0.8, help='below 1 is more cautious')
    parser.add_argument('--top_k', type=int, default=200, help='only the k likeliest tokens; 0: all')
    parser.add_argument('--seed', type=int, default=1337)
    parser.add_argument('--device', help='default: cuda if there is one, else cpu')
    parser.error = lambda message: fail(f'{message}; see python sample.py --help')
    args = parser.parse_args(argv)
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

from data.corpus import load_tokenizer
from model import GPT
from training import checkpoint
from variants import gpt_config


def find_device(name):
    """The torch.device of that name; None: a GPU if there is one. Ends the program if it is missing."""
    name = name or ('cuda' if torch.cuda.is_available() else 'cpu')
    try:
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError):
        fail(f'--device is {name}, which this machine or this torch does not have; try --device=cpu')


def load_model(path, device):
    """
    (model, meta): a checkpoint's network, and the meta.json of its corpus.

    Raises FileNotFoundError, or ValueError or RuntimeError if it is no checkpoint of a network.
    """
    saved = checkpoint.load(path)
    model = GPT(gpt_config(complete(saved['config']), saved['vocab_size']))
    model.load_state_dict(saved['model'])
    return model.to(device).eval(), saved['corpus']


def main(argv):
    args = parse_args(argv)
    device = find_device(args.device)
    try:
        model, meta = load_model(Path(args.out_dir) / args.checkpoint, device)
        tokenizer = load_tokenizer(meta)
        start = args.start
        if start.startswith('FILE:'):
            start = Path(start.removeprefix('FILE:')).read_text(encoding='utf-8')
        prompt = tokenizer.encode(start)
    except OSError as error:
        fail(f'{error.filename}: {error.strerror}' if error.filename else str(error))
    except (ValueError, RuntimeError) as error:
        fail(str(error))
    if not prompt:
        fail('--start is empty; the model needs at least one token to continue')
    torch.manual_seed(args.seed)
    idx = torch.tensor([prompt] * args.num_samples, device=device)  # (B, T)
    idx = model.generate(idx, args.max_new_tokens, args.temperature, args.top_k or None)
    for tokens in idx.tolist():
        # the model's vocabulary is rounded up: tokens beyond the tokenizer's have no text
        print(tokenizer.decode([token for token in tokens if token < meta['vocab_size']]))
        print('---------------')


if __name__ == '__main__':
    main(sys.argv[1:])
