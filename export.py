"""
A run's network for other tools: a folder that transformers' GPT2LMHeadModel and lm-eval load.

    python export.py --out_dir=out/gpt2-24comm-cpu --to=exported
    lm_eval --model=hf --model_args=pretrained=exported --tasks=lambada_openai

These tools compute dense GPT-2. A network that syncs otherwise is exported with --dense=True only: the same
weights, another network, and export.py says by how much its loss differs.
"""

import argparse
import math
import sys
from pathlib import Path
from types import SimpleNamespace

from configurator import begin_program, fail, one_line


def parse_args(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument('--out_dir', required=True, help="the run's folder")
    parser.add_argument('--to', required=True, help='the folder to write, which must not hold anything yet')
    parser.add_argument('--checkpoint', default='ckpt.pt', help='a file in out_dir: ckpt.pt, ckpt-best.pt')
    parser.add_argument('--dense', choices=['True', 'False'], default='False',
                        help='True: export the weights of a network that is not dense GPT-2')
    parser.error = lambda message: fail(f'{message}; see python export.py --help')
    return parser.parse_args(argv)


if __name__ == '__main__':
    begin_program()
    parse_args(sys.argv[1:])  # --help and mistakes are reported before torch is loaded

import torch

from data.corpus import EOT, VOCAB_SIZES, byte_units, load_encoding, open_corpus
from model import GPT
from train import evaluate
from training.distributed import World
from training.pretrained import FIXED, TRANSPOSED, not_dense, read_file
from training.rundir import atomic_write, write_json
from variants import gpt_config


def differences_to_dense(keys):
    """What makes the net of a run's keys another function than dense GPT-2 of its weights, in words."""
    words = [f'it was trained with {blocks}'] if (blocks := not_dense(keys)) else []
    if math.frexp(keys['embed_scale'])[0] != 0.5:
        words.append(f'embed_scale is {keys["embed_scale"]}, which is no power of 2 and not exact in wte')
    return words


def fold(weights, scale):
    """
    The weights that give at embed_scale 1 what these give at `scale`; exact if that is a power of 2.

    The head is tied to wte, so what reads it, ln_f, shrinks as wte grows.
    """
    factors = {'transformer.wte.weight': scale, 'transformer.wpe.weight': scale, 'lm_head.weight': scale,
               'transformer.ln_f.weight': 1 / scale, 'transformer.ln_f.bias': 1 / scale}
    return {name: p * factors[name] if name in factors else p for name, p in weights.items()}


def loss_of(keys, weights, val):
    """(loss, tokens) of a net on its run's evaluation tokens, the first of val, in float32 on the CPU."""
    config, world = SimpleNamespace(**keys | dict(dtype='float32')), World(0, 1, [[0]], torch.device('cpu'))
    model = GPT(gpt_config(keys))
    model.load_state_dict(weights)
    return evaluate(model, val, config.eval_tokens, config, world)


def loss_change(keys, weights, meta, dense, folded):
    """A line: the losses of a run's net and of the dense one that is exported for it. meta: of its corpus"""
    try:
        corpus = open_corpus(keys['dataset'])
        if corpus.meta['splits']['val']['sha256'] != meta['splits']['val']['sha256']:
            raise ValueError(f'the validation tokens of {corpus.name} are not those of its run any more')
    except ValueError as error:
        return f'warning: the change in loss is not measured: {error}'
    (loss, tokens), (dense_loss, _) = loss_of(keys, weights, corpus.val), loss_of(dense, folded, corpus.val)
    return (f'val loss {loss:.6f} over {tokens:,} tokens; dense, as exported, {dense_loss:.6f}, '
            f'{dense_loss - loss:+.6f}')


def hub_config(keys, eot):
    """config.json. eot: the token that ends a document; None: the tokenizer has none"""
    sizes = {key: keys[key] for key in ('n_layer', 'n_head', 'n_embd', 'vocab_size')}
    dropout = dict.fromkeys(('resid_pdrop', 'embd_pdrop', 'attn_pdrop'), keys.get('dropout', 0.0))
    return dict(architectures=['GPT2LMHeadModel'], model_type='gpt2', **sizes, n_positions=keys['block_size'],
                activation_function='gelu_new' if keys['gelu'] == 'tanh' else 'gelu', **FIXED, **dropout,
                dtype='float32', bos_token_id=eot, eos_token_id=eot)


def hub_weights(weights, bias):
    """The state_dict that GPT2LMHeadModel reads: its linear layers are (in, out), and it wants biases."""
    found = {name: (p.t() if name.endswith(TRANSPOSED) else p).contiguous() for name, p in weights.items()
             if name != 'lm_head.weight'}  # the library ties it too
    if not bias:
        found |= {name.replace('.weight', '.bias'): torch.zeros(len(p)) for name, p in weights.items()
                  if not name.endswith(('wte.weight', 'wpe.weight', 'lm_head.weight'))}
    return found


def hub_tokenizer(encoding):
    """tokenizer.json of a tiktoken.Encoding whose text is cut as GPT-2's is, as a tokenizers.Tokenizer."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers  # with transformers
    units = byte_units()
    ranks = dict(sorted(encoding._mergeable_ranks.items(), key=lambda item: item[1]))

    def written(token):
        return ''.join(units[byte] for byte in token)

    def halves(token, rank):
        # a token's last merge joins what the merges before it leave of its bytes
        parts = [bytes([byte]) for byte in token]
        while len(parts) > 2:
            best, i = min((ranks.get(a + b, rank), i) for i, (a, b) in enumerate(zip(parts, parts[1:])))
            assert best < rank, f'{token} is not made of earlier tokens'
            parts[i:i + 2] = [parts[i] + parts[i + 1]]
        return tuple(map(written, parts))

    vocab = {written(token): rank for token, rank in ranks.items()} | encoding._special_tokens
    merges = [halves(token, rank) for token, rank in ranks.items() if len(token) > 1]
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(EOT, special=True)])
    return tokenizer


def write_tokenizer(meta, folder):
    """Write the tokenizer of a corpus into a folder. Returns a line about it."""
    if meta is None or meta['tokenizer'] not in VOCAB_SIZES:
        return 'without tokenizer files: none exist for this tokenizer'
    try:
        tokenizer = hub_tokenizer(load_encoding(meta['tokenizer']))
    except ImportError:
        return 'without tokenizer files, which need tokenizers: pip install transformers'
    except ValueError as error:
        return f'without tokenizer files: {error}'
    tokenizer.save(str(folder / 'tokenizer.json'))
    special = dict.fromkeys(('bos_token', 'eos_token', 'unk_token'), EOT)
    write_json(folder / 'tokenizer_config.json', dict(tokenizer_class='PreTrainedTokenizerFast', **special))
    return f'with tokenizer files: {meta["tokenizer"]}'


def main(argv):
    args = parse_args(argv)
    folder = Path(args.to)
    try:
        from safetensors.torch import save
    except ImportError:
        fail('export.py writes with safetensors: pip install safetensors')
    with one_line(ValueError):
        keys, weights, meta = read_file(Path(args.out_dir, args.checkpoint))
        if folder.exists() and any(folder.iterdir()):
            fail(f'--to is {folder}, which must not hold anything yet')
        reasons, folded = differences_to_dense(keys), fold(weights, keys['embed_scale'])
        dense = keys | dict(tp_size=1, block_types=None, embed_scale=1.0)
        if reasons and args.dense != 'True':
            fail(f'{", ".join(reasons)}: that is not dense GPT-2; --dense=True exports the weights anyway')
        if reasons:
            print(f'{", ".join(reasons)}: {loss_change(keys, weights, meta, dense, folded)}')
        folder.mkdir(parents=True, exist_ok=True)
        words = write_tokenizer(meta, folder)
        with atomic_write(folder / 'model.safetensors') as file:
            file.write(save(hub_weights(folded, keys['bias']), metadata=dict(format='pt')))
        eot = VOCAB_SIZES.get(meta and meta['tokenizer'], 0) - 1
        write_json(folder / 'config.json', hub_config(keys, eot if eot > 0 else None))
    print(f'{folder}: GPT-2 of {keys["n_layer"]} layers, {keys["n_embd"]} wide, {words}')


if __name__ == '__main__':
    main(sys.argv[1:])
