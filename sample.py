"""
Text from a trained run.

    python sample.py --out_dir=out/gpt2-124M-12comm-cpu --start="def main(" --num_samples=3
    python sample.py --out_dir=out/gpt2-124M-12comm-cpu --start=FILE:prompt.txt --checkpoint=ckpt-best.pt

The checkpoint says which tokenizer it was trained with; --block_types and --tp_size are its own too.
"""

import argparse
import math
import sys
from dataclasses import fields
from pathlib import Path

from configurator import fail


def parse(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument('--out_dir', required=True, help="the run's folder")
    parser.add_argument('--checkpoint', default='ckpt.pt', help='a file in it: ckpt.pt, ckpt-best.pt')
    parser.add_argument('--start', default='\n', help='the text to go on from, or FILE:path')
    parser.add_argument('--num_samples', type=int, default=3)
    parser.add_argument('--max_new_tokens', type=int, default=300)
    parser.add_argument('--temperature', type=float, default=0.8, help='below 1 is more cautious')
    parser.add_argument('--top_k', type=int, default=200, help='only the k likeliest tokens; 0 for all')
    parser.add_argument('--seed', type=int, default=1337)
    parser.add_argument('--device', help='cuda where there is one, else cpu')
    parser.error = lambda message: fail(f'{message}; see python sample.py --help')
    options = parser.parse_args(argv)
    for key, fits, wanted in (('temperature', 0 < options.temperature < math.inf, 'above 0'),
                              ('num_samples', options.num_samples >= 1, 'at least 1'),
                              ('max_new_tokens', options.max_new_tokens >= 1, 'at least 1'),
                              ('top_k', options.top_k >= 0, 'at least 0'),
                              ('seed', 0 <= options.seed < 2**63, 'at least 0 and below 2**63')):
        if not fits:
            fail(f'--{key}={getattr(options, key)}: it must be {wanted}')
    return options


if __name__ == '__main__':
    parse(sys.argv[1:])                 # --help and mistakes are told before torch is loaded

import torch

from training import checkpoint
from data.corpus import load_tokenizer
from model import GPT, GPTConfig


def find_device(name):
    """The torch.device of that name; by default a GPU where there is one."""
    name = name or ('cuda' if torch.cuda.is_available() else 'cpu')
    try:
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError):
        fail(f'--device={name}: this machine or this torch does not have it; try --device=cpu')


def load_model(path, device):
    """
    (model, meta): a checkpoint's network and the meta.json of its corpus. Raises ValueError where it has
    none.
    """
    saved = checkpoint.load(path)
    config = dict(saved['config'], vocab_size=saved['vocab_size'])
    model = GPT(GPTConfig(**{field.name: config[field.name] for field in fields(GPTConfig)}))
    model.load_state_dict(saved['model'])
    return model.to(device).eval(), saved['corpus']


def main(argv):
    options = parse(argv)
    device = find_device(options.device)
    try:
        model, meta = load_model(Path(options.out_dir) / options.checkpoint, device)
        tokenizer = load_tokenizer(meta)
        start = options.start
        if start.startswith('FILE:'):
            start = Path(start.removeprefix('FILE:')).read_text()
        prompt = tokenizer.encode(start)
    except OSError as error:
        fail(f'{error.filename}: {error.strerror}' if error.filename else str(error))
    except (ValueError, RuntimeError) as error:
        fail(str(error))
    if not prompt:
        fail('--start is empty; the model needs a token to go on from')
    torch.manual_seed(options.seed)
    idx = torch.tensor([prompt] * options.num_samples, device=device)                       # (B, T)
    idx = model.generate(idx, options.max_new_tokens, options.temperature, options.top_k or None)
    for tokens in idx.tolist():
        # the model's vocabulary is rounded up: what lies beyond the tokenizer's has no text
        print(tokenizer.decode([token for token in tokens if token < meta['vocab_size']]))
        print('---------------')


if __name__ == '__main__':
    main(sys.argv[1:])
