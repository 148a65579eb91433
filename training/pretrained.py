"""
Trained nets that a run may begin with: the hub's GPT-2, a folder in its layout, a checkpoint.

    found = load('gpt2')  # or a folder with config.json and model.safetensors, or a file: ckpt.pt
    GPT(gpt_config(found.keys)).load_state_dict(found.weights)

A file is one that train.py wrote, or nanoGPT: a dict with model_args and model. No code in it is ever run.
"""

import json
import logging
import zipfile
from pathlib import Path
from typing import NamedTuple

import torch

from configurator import SHAPE, blocks_after, complete, pattern, period
from data.corpus import VOCAB_SIZES, byte_units
from model import GPT
from training import checkpoint
from variants import gpt_config

HUB = ('gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl')
GELUS = dict(gelu='erf', gelu_new='tanh', gelu_pytorch_tanh='tanh')  # by the hub's names for them
# settings of the hub's config.json that model.py does not support otherwise
FIXED = dict(n_inner=None, layer_norm_epsilon=1e-5, scale_attn_weights=True, tie_word_embeddings=True,
             scale_attn_by_inverse_layer_idx=False, add_cross_attention=False)
TRANSPOSED = ('c_attn.weight', 'c_proj.weight', 'c_fc.weight')  # (in, out) in the hub's layout
WPE = 'transformer.wpe.weight'


class Pretrained(NamedTuple):
    keys: dict  # for gpt_config(): the net's shape and, if the source knows them, its blocks and tp_size
    weights: dict  # dense state_dict, float32; mapped, not read, where the file allows it
    meta: dict | None  # the keys of meta.json that load_tokenizer() needs; None: not known

    @property
    def shape(self):
        return {key: self.keys[key] for key in SHAPE}


def load(source):
    """The Pretrained net that init_from names. Raises ValueError, in one line, if there is none."""
    path = Path(source)
    if source in HUB:
        path = fetch(source)
    elif not path.exists():
        raise ValueError(f'init_from is {source}, it must be scratch, resume, auto, {", ".join(HUB)}, '
                         "a folder in the hub's layout or a checkpoint file")
    return read_folder(path) if path.is_dir() else read_file(path)


def not_dense(keys):
    """What a net was trained with, in words, if it is not the dense net of its weights; else None."""
    types, merge = keys.get('block_types') or ['tp'], keys.get('merge', 'sum')
    words = pattern(types) + (f', merged by {merge}' if merge != 'sum' else '')
    return None if set(types) == {'tp'} and merge == 'sum' else words


def lost_settings(config, keys):
    """Warnings: what a net was trained with that its new run, which does not choose it, has otherwise."""
    if not_dense(keys) is None:
        return
    for key in 'block_types', 'merge', 'tp_size', 'dtp_delay', 'caat_share':
        theirs, ours = keys.get(key), getattr(config, key)
        if theirs not in (None, ours) and config.sources[key] == 'config/defaults.py':
            here, there = (pattern(value) if key == 'block_types' else f'{key} {value}'
                           for value in (ours, theirs))
            flag = ','.join(theirs[:period(theirs)]) if key == 'block_types' else theirs
            yield (f'warning: {config.init_from} was trained with {there}, this run has {here}; '
                   f'--{key}={flag} keeps it')


def initial_weights(config, corpus, resuming=False, dense=False, say=print):
    """
    The dense state_dict that init_from names, wpe cut to block_size. None for scratch, and for a resumed run
    unless it still needs the weights as its teacher.

    Raises ValueError, in one line, if the net has not learned the corpus's tokens, or is not dense but must
    be: to teach, or because the caller says so. say(line) is called with each warning.
    """
    teaches = config.distill and not config.eval_only
    if config.init_from == 'scratch' or (resuming and not teaches):
        return None
    if resuming and config.init_from not in HUB and not Path(config.init_from).exists():
        raise ValueError(f'distill is True, but the teacher, {config.init_from}, is gone; put it back, or go '
                         'on without it, --distill=False')
    found = load(config.init_from)
    if (teaches or dense) and (words := not_dense(found.keys)):
        raise ValueError(f'{"distill is True, but " if teaches else ""}the net of {config.init_from} is not '
                         f'dense: it was trained with {words}')
    if found.meta and any(found.meta.get(key) != corpus.meta.get(key) for key in ('tokenizer', 'chars')):
        raise ValueError(f'dataset is {corpus.name}, whose tokenizer is {corpus.meta["tokenizer"]}; the net '
                         f'of {config.init_from} was trained with {found.meta["tokenizer"]}')
    for line in lost_settings(config, found.keys):
        say(line)
    return found.weights | {WPE: found.weights[WPE][:config.block_size]}


# the hub's layout


def fetch(name):
    """The folder of a net of the hub, fetched unless it is in transformers' cache."""
    try:
        from transformers.utils import cached_file
    except ImportError:
        raise ValueError(f'init_from is {name}, which is fetched by transformers: pip install transformers') \
            from None
    logging.getLogger('huggingface_hub').setLevel(logging.ERROR)  # it tells of each of its attempts
    try:
        paths = [cached_file(name, file) for file in ('tokenizer.json', 'model.safetensors', 'config.json')]
    except OSError:
        raise ValueError(f"init_from is {name}, which is not in transformers' cache and cannot be fetched: "
                         'connect to the network, or name a folder that holds it') from None
    return Path(paths[-1]).parent


def read_folder(folder):
    path = folder / 'config.json'
    if not path.is_file():
        hint = f'; try {folder}/ckpt.pt' if (folder / 'ckpt.pt').is_file() else ''
        raise ValueError(f'init_from is {folder}, a folder without config.json and model.safetensors{hint}')
    try:
        config = json.loads(path.read_bytes())
        keys = {key: config[key] for key in ('n_layer', 'n_head', 'n_embd', 'vocab_size')}
        keys.update(block_size=config['n_positions'], gelu=GELUS[config['activation_function']])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f'{path} is not that of a GPT-2: {type(error).__name__}: {error}') from None
    if config.get('n_inner') == 4 * config['n_embd']:
        del config['n_inner']
    for key, value in FIXED.items():
        if config.get(key, value) != value:
            raise ValueError(f'{path}: {key} is {config[key]!r}, it must be {value!r}')
    keys.update(bias=True, embed_scale=1.0, tp_size=1)
    weights = {name: tensor.t() if name.endswith(TRANSPOSED) else tensor
               for name, tensor in read_safetensors(folder).items()}
    return checked(folder, keys, weights, find_tokenizer(folder, keys['vocab_size']))


def read_safetensors(folder):
    """The tensors in model.safetensors, or in the files that its index names."""
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError:
        raise ValueError(f'init_from is {folder}, which is read by safetensors: pip install safetensors') \
            from None
    path, names, weights = folder / 'model.safetensors.index.json', ['model.safetensors'], {}
    try:
        if path.is_file():
            names = sorted(set(json.loads(path.read_bytes())['weight_map'].values()))
        for path in [folder / name for name in names]:
            weights |= load_file(path)
    except FileNotFoundError:
        raise ValueError(f'{path} is missing') from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError,
            SafetensorError) as error:
        raise ValueError(f'{path} is damaged: {type(error).__name__}: {error}') from None
    return weights


def find_tokenizer(folder, vocab_size):
    """
    What load_tokenizer() needs for the tokenizer beside a net, as a dict. None: not known.

    tokenizer is byte or gpt2 if it is that one, else the path of tokenizer.json. Without the file, a
    vocabulary of GPT-2's size is taken for GPT-2's. Raises ValueError, in one line, if it cannot be read.
    """
    path = folder / 'tokenizer.json'
    if not path.is_file():
        return guess_tokenizer(vocab_size)
    try:
        from tokenizers import Tokenizer
        vocab = Tokenizer.from_file(str(path)).get_vocab()
    except ImportError:
        raise ValueError(f'{path} is read by tokenizers: pip install tokenizers') from None
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f'{path} is damaged: {error}') from None
    name = str(path)
    if vocab.items() >= {unit: byte for byte, unit in enumerate(byte_units())}.items() and len(vocab) == 257:
        name = 'byte'
    elif len(vocab) == VOCAB_SIZES['gpt2'] and vocab.get('Ġthe') == 262 and vocab.get('Ġof') == 286:
        name = 'gpt2'
    return dict(tokenizer=name, vocab_size=len(vocab), file=str(path))


def guess_tokenizer(vocab_size):
    gpt2 = VOCAB_SIZES['gpt2']
    return dict(tokenizer='gpt2', vocab_size=gpt2) if vocab_size in (gpt2, 50304) else None


# checkpoint files


def read_file(path):
    with open(path, 'rb') as file:
        if not zipfile.is_zipfile(file):
            raise ValueError(f'{path} is not a checkpoint file')
    saved = checkpoint.read(path, mmap=True)
    if checkpoint.KEYS <= saved.keys():
        keys = complete(saved['config']) | dict(vocab_size=saved['vocab_size'])
        keys |= dict(block_types=blocks_after(saved['iter'], keys), block_types_at=None)
        return checked(path, keys, saved['model'], saved['corpus'])
    if not {'model', 'model_args'} <= saved.keys():
        raise ValueError(f'{path} is not a checkpoint that train.py or nanoGPT wrote')
    keys = dict(saved['model_args'], gelu='erf', embed_scale=1.0, tp_size=1)
    if not keys.keys() >= set(SHAPE):
        raise ValueError(f'{path}: model_args has no {", ".join(sorted(set(SHAPE) - keys.keys()))}')
    return checked(path, keys, saved['model'], guess_tokenizer(keys['vocab_size']))


def checked(path, keys, weights, meta):
    """
    The Pretrained net, its weights under the names they have here.

    Raises ValueError, in one line, if keys do not describe them.
    """
    found = {}
    for name, tensor in weights.items():
        name = name.removeprefix('_orig_mod.')  # torch.compile's
        if not name.startswith(('transformer.', 'lm_head.')):
            name = f'transformer.{name}'
        if not name.endswith(('.attn.bias', '.attn.masked_bias')):  # masks, not weights
            found[name] = tensor.float()
    wte = found.get('transformer.wte.weight')
    head = found.setdefault('lm_head.weight', wte)
    with torch.device('meta'):
        wanted = GPT(gpt_config(keys)).state_dict()
    for name in sorted(wanted.keys() | found.keys()):
        shapes = [tuple(state[name].shape) if name in state else None for state in (found, wanted)]
        if shapes[0] != shapes[1]:
            raise ValueError(f'{path}: the shape of {name} is {shapes[0]}, it must be {shapes[1]}')
    if head is not wte and not torch.equal(head, wte):
        raise ValueError(f'{path}: lm_head.weight is not wte.weight, and the head must be tied to it')
    found['lm_head.weight'] = wte
    return Pretrained(keys, found, meta)
