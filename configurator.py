"""
A run's configuration: config/defaults.py, then config files in order, then --key=value flags. Later wins.

    python train.py config/train_gpt2_12comm.py config/cpu.py --seed=2 --block_types=tp,spd,spd

Config files are plain Python assignments. Every key, type and value is checked. A mistake ends the program
with one line: the value, where it came from, and what would be right.
"""

import ast
import atexit
import difflib
import errno
import json
import math
import os
import re
import signal
import sys
import time
import types
import typing
from contextlib import contextmanager
from functools import cache
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent
DEFAULTS = ROOT / 'config' / 'defaults.py'
RUNS = [f'config/train_gpt2_{n}comm.py' for n in (24, 18, 16, 12, 8, 6, 2)]  # beside the dense control
GUIDE_UNITS = [['tp'], ['tp', 'spd'], ['tp', 'spd', 'spd'], ['spd'], ['spd', 'parallel'],
               ['spd', 'parallel', 'parallel'], ['parallel']]  # the guide's blocks of these, repeated

# the communications of one layer of each block type, by the guide's rule. model.py and variants.py define the
# blocks; this table is what can be known of them without loading torch
COMMUNICATIONS = {'tp': 2, 'spd': 1, 'parallel': 0, 'attn_spd': 1, 'palm': 1, 'fal': 1, 'stale': 1,
                  'ladder': 2, 'dtp': 2, 'caat': 2}
CARRYING = ['fal', 'stale', 'ladder']  # each hands something of its own from layer to layer
SUM_ONLY = ['fal', 'stale', 'ladder', 'dtp', 'caat']  # what they exchange is merged by the sum alone
HIDING = {'ladder', 'dtp'}  # their all-reduces are under way while the next layer computes
# the keys that an experiment varies; the rest of a config is the recipe
VARIED = {'seed', 'block_types', 'block_types_at', 'tp_size', 'merge', 'dtp_delay', 'caat_share',
          'embed_scale', 'perturb'}
# the keys that follow a net whose weights a run begins with
SHAPE = ['n_layer', 'n_head', 'n_embd', 'block_size', 'vocab_size', 'bias', 'gelu', 'embed_scale']
STEP = {'batch_size', 'gradient_accumulation_steps'}  # only their product is the recipe's
# the keys that change neither the recipe nor what a run computes
HOUSEKEEPING = {
    'out_dir', 'plan', 'eval_only', 'eval_interval', 'log_interval', 'always_save_checkpoint',
    'checkpoint_interval', 'keep_checkpoints', 'keep_optimizer',
    'wandb_log', 'wandb_project', 'wandb_run_name', 'device', 'backend', 'compile', 'shard',
    'recompute_layers', 'tp_across_nodes', 'eval_train_tokens', 'log_diagnostics',
}

AT_LEAST_1 = (lambda value: value >= 1, 'at least 1')
LAYERS = (lambda value: 1 <= value <= 1000, 'from 1 to 1000')
SEED = (lambda value: 0 <= value < 2**63, 'at least 0 and below 2**63')
NOT_NEGATIVE = (lambda value: value >= 0, 'at least 0')
POSITIVE = (lambda value: value > 0, 'above 0')
FRACTION = (lambda value: 0 <= value < 1, 'at least 0 and below 1')
SHARE = (lambda value: 0 < value <= 1, 'above 0 and at most 1')
WEIGHT = (lambda value: 0 <= value <= 1, 'from 0 to 1')
LIMITS = dict(  # of values; GPTConfig checks the model's other keys
    eval_interval=AT_LEAST_1, eval_tokens=AT_LEAST_1, eval_train_tokens=NOT_NEGATIVE,
    log_interval=AT_LEAST_1, checkpoint_interval=AT_LEAST_1, keep_checkpoints=NOT_NEGATIVE, seed=SEED,
    batch_size=AT_LEAST_1, gradient_accumulation_steps=AT_LEAST_1,
    n_layer=LAYERS, learning_rate=POSITIVE, max_iters=NOT_NEGATIVE, weight_decay=NOT_NEGATIVE,
    beta1=FRACTION, beta2=FRACTION,
    grad_clip=NOT_NEGATIVE, warmup_iters=NOT_NEGATIVE, lr_decay_iters=NOT_NEGATIVE, min_lr=NOT_NEGATIVE,
    embed_scale=POSITIVE, perturb=NOT_NEGATIVE, dtp_delay=NOT_NEGATIVE, caat_share=SHARE,
    distill_temperature=POSITIVE, distill_weight=WEIGHT,
)
# (n_layer, n_head, n_embd, block_size) of the sizes that a run may be named after
SIZES = {'124M': (12, 12, 768, 1024), '350M': (24, 16, 1024, 1024), '774M': (36, 20, 1280, 1024)}
RESUMING = ('resume', 'auto')  # of init_from: go on with the run in out_dir
RENAMED = {'eval_iters': 'eval_tokens, in tokens: validation reads fixed windows, not random batches',
           'log_drift': 'log_diagnostics, which measures that and more'}


def fail(message, ending=SystemExit):
    """
    End the program with one line on stderr and exit status 1. ending: the exception that does it

    Under torchrun only rank 0 prints; the others wait to be terminated.
    """
    if os.environ.get('RANK', '0') != '0':
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(5)  # a process that is not terminated by then has found what rank 0 did not
    message = ' '.join(message.split())
    if path := os.environ.get('TORCHELASTIC_ERROR_FILE'):  # for torchrun's own report
        details = dict(message=message, extraInfo=dict(timestamp=str(int(time.time()))))
        Path(path).write_text(json.dumps(dict(message=details)), encoding='utf-8')
    raise ending(f'error: {message}')


@contextmanager
def one_line(*kinds):
    """End the program, by fail(), if the block raises OSError or an error of these kinds."""
    try:
        yield
    except (OSError, *kinds) as error:
        fail(f'{error.filename}: {error.strerror}' if getattr(error, 'filename', None) else str(error))


def add_text_arguments(parser, words):
    """Of the scripts that measure or predict how fast text is generated."""
    parser.add_argument('--decode', action='store_true', help=words)
    parser.add_argument('--prompt', type=int, default=1024, help='--decode: tokens of a prompt')
    parser.add_argument('--new', type=int, default=128, help='--decode: tokens that are generated after it')
    parser.add_argument('--batch', type=int, default=1, help='--decode: texts at once')


def check_text_arguments(args):
    for name, least in dict(prompt=1, new=2, batch=1).items():
        if getattr(args, name) < least:
            fail(f'--{name} is {getattr(args, name)}, it must be at least {least}')


class Output:
    """
    stdout or stderr, which the program outlives: what a closed terminal, a full disk or a reader that has
    left does not take is dropped.
    """

    def __init__(self, stream):
        self.stream = stream
        atexit.register(self.close)

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def attempt(self, call):
        try:
            return call()
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):  # a disk may have room again
                self.discard()

    def write(self, text):
        self.attempt(lambda: self.stream.write(text))
        return len(text)

    def flush(self):
        self.attempt(self.stream.flush)

    def close(self):
        try:
            self.stream.flush()
        except OSError:
            self.discard()

    def discard(self):
        """Have everything from here on, and what is buffered, go nowhere."""
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self.stream.fileno())
        os.close(null)


def begin_program():
    """
    What each script does first: outlive its output, and leave with one line on Ctrl-C until it has its own
    way to stop.
    """
    for number, name in enumerate(('stdin', 'stdout', 'stderr')):
        if getattr(sys, name) is None:  # closed by the caller; no file opened later may take its number
            null = os.open(os.devnull, os.O_RDWR)
            if null != number:
                os.dup2(null, number)
            setattr(sys, name, open(number, 'r' if number == 0 else 'w', closefd=False))
    for name in ('stdout', 'stderr'):
        getattr(sys, name).reconfigure(errors='backslashreplace')
        setattr(sys, name, Output(getattr(sys, name)))

    def leave(number, frame):
        sys.stderr.write('stopped\n')
        sys.stderr.flush()
        os._exit(128 + number)
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:  # not if a shell had it ignored
        signal.signal(signal.SIGINT, leave)


class Config(SimpleNamespace):
    """
    A run's keys as attributes; vars(config) is the keys alone. `sources` says where each was set.

    init_from is scratch or where the weights came from when the run began. `resume` is what it was set to if
    that was resume or auto, else None.
    """
    __slots__ = ('sources', 'resume')

    def refuse(self, message):
        """fail() with the message and where the keys named in it were set."""
        named = [key for key in vars(self) if re.search(rf'\b{key}\b', message)]
        origins = ', '.join(f'{key} from {self.sources[key]}' for key in named)
        fail(f'{message} ({origins})' if named else message)

    @contextmanager
    def refusing(self):
        """End the program, as refuse() does, if the block raises ValueError."""
        try:
            yield
        except ValueError as error:
            self.refuse(str(error))


@cache
def read_defaults():
    """config/defaults.py as {key: (default, annotated type, comment)}."""
    text = DEFAULTS.read_text(encoding='utf-8')
    namespace, lines, keys = {}, text.splitlines(), {}
    exec(compile(text, DEFAULTS, 'exec'), namespace)
    for node in ast.parse(text).body:
        if isinstance(node, ast.AnnAssign):
            kind = eval(ast.unparse(node.annotation), namespace)
            comment = lines[node.lineno - 1].partition('#')[2].strip()
            keys[node.target.id] = (namespace[node.target.id], kind, comment)
    return keys


def alternatives(kind):
    """The members of a union such as `int | None`; (int,) for int."""
    return typing.get_args(kind) if typing.get_origin(kind) in (typing.Union, types.UnionType) else (kind,)


def accepts(kind, value):
    """Whether a value has this type, or one of a union. An int passes for a float; a bool is no int."""
    for option in alternatives(kind):
        if typing.get_origin(option) is typing.Literal:
            fits = value in typing.get_args(option)
        else:
            fits = type(value) is option or (option is float and type(value) is int)
        if fits:
            return True
    return False


def in_words(kind):
    """A type for people: 'a whole number', 'nccl, gloo or None'."""
    words = {int: 'a whole number', float: 'a number', bool: 'True or False', str: 'text', list: 'a list'}
    return ' or '.join(
        ', '.join(typing.get_args(option)) if typing.get_origin(option) is typing.Literal
        else words.get(option, 'None') for option in alternatives(kind))


def check(key, value, source, keys):
    """The validated value; an int becomes a float if the key takes floats. Ends the program if it is bad."""
    if key not in keys:
        close = difflib.get_close_matches(key, keys, n=1)
        hint = RENAMED.get(key) or (f'{close[0]}?' if close else 'see --help')
        if not source.startswith('--'):
            hint += f'; a helper variable begins with an underscore, _{key}'
        fail(f'{source}: no key is called {key}; {hint}')
    kind = keys[key][1]
    if key == 'block_types' and isinstance(value, str):
        return value  # a pattern, which resolve() repeats once n_layer is known
    if key == 'train_layers' and type(value) is int:
        value = [value]
    if isinstance(value, tuple):
        value = list(value)
    if type(value).__module__ == 'numpy' and hasattr(value, 'item'):
        value = value.item() if value.ndim == 0 else value.tolist()
    if not accepts(kind, value):
        fail(f'{source}: {key} is {value!r}, it must be {in_words(kind)}')
    if type(value) in (int, float) and float in alternatives(kind):
        if not abs(value) <= sys.float_info.max:
            fail(f'{source}: {key} is {value!r:.40}, it must be a finite number')
        value = float(value)
    if not within_limits(key, value):
        fail(f'{source}: {key} is {value!r}, it must be {LIMITS[key][1]}')
    return value


def within_limits(key, value):
    """Whether a key may have a value of its type."""
    return value is None or key not in LIMITS or LIMITS[key][0](value)


def read_file(path):
    """
    The assignments of a config file, as a dict. Helpers are ignored: what is imported or can be called, and
    names with a leading underscore.
    """
    try:
        text = Path(path).read_text(encoding='utf-8-sig')  # some editors put a mark before the text
    except (OSError, ValueError) as error:
        known = {f'config/{p.name}' for p in DEFAULTS.parent.glob('*.py')} - {str(path)}
        close = difflib.get_close_matches(str(path), known, n=1)
        fail(f'{path}: not a readable config file ({getattr(error, "strerror", None) or error})'
             + (f'; {close[0]}?' if close else ''))
    namespace = {}
    try:
        exec(compile(text, path, 'exec'), namespace)
    except (Exception, SystemExit) as error:  # report any error in the user's file in one line
        fail(f'{path}: {type(error).__name__}: {error}')
    return {key: value for key, value in namespace.items()
            if not (key.startswith('_') or callable(value) or isinstance(value, types.ModuleType))}


def parse_value(text, kind):
    """A flag's value: text if the key takes text, else a literal or arithmetic: 5*8, ['tp','spd']*6."""
    if str in alternatives(kind):
        return None if text == 'None' and kind is not str else text
    allowed = (ast.Expression, ast.Constant, ast.List, ast.Tuple, ast.UnaryOp, ast.USub, ast.Load,
               ast.BinOp, ast.Mult, ast.Add, ast.Sub, ast.Div)
    try:
        tree = ast.parse(text, mode='eval')
        if all(isinstance(node, allowed) for node in ast.walk(tree)):
            return eval(compile(tree, 'a flag', 'eval'), {'__builtins__': {}})
    except (SyntaxError, ValueError, TypeError, ArithmeticError, MemoryError, RecursionError):
        pass  # not a literal but text, which check() accepts or refuses
    return text


def parse_flag(flag, keys):
    """--key=value -> (key, value)"""
    key, equals, text = flag.removeprefix('--').partition('=')
    if not flag.startswith('--') or not equals:
        fail(f'{flag}: a flag is --key=value, a config file ends in .py')
    return key, parse_value(text, keys[key][1] if key in keys else None)


def show_help(keys):
    print(__doc__)
    for key, (default, kind, comment) in keys.items():
        print(f'  --{key}={default}'.ljust(40), comment or in_words(kind))
    sys.exit()


def check_types(block_types, key):
    """Raises ValueError, naming the key that they are from, if one of these is no block type."""
    for i, name in enumerate(block_types):
        if not isinstance(name, str) or name not in COMMUNICATIONS:
            close = difflib.get_close_matches(str(name), COMMUNICATIONS, n=1)
            hint = f'{close[0]}?' if close else f'there are {", ".join(COMMUNICATIONS)}; a new one needs a ' \
                'class in variants.py and an entry in COMMUNICATIONS in configurator.py'
            raise ValueError(f'{key} has {name!r} at layer {i}, which is no block type; {hint}')
        if type(COMMUNICATIONS[name]) is not int:
            raise ValueError(f'COMMUNICATIONS in configurator.py has {COMMUNICATIONS[name]} for {name}, it '
                             'must be a whole number')


def check_blocks(config, key='block_types'):
    """
    Check the keys of model.py's GPTConfig that are about its blocks. config: that, or a Config. key: where
    its block types are from.

    Raises ValueError if a value is out of range, or if the blocks do not go together or with `merge`.
    """
    for name in 'dtp_delay', 'caat_share':
        value, (holds, wanted) = getattr(config, name), LIMITS[name]
        if not holds(value):
            raise ValueError(f'{name} is {value}, it must be {wanted}')
    carrying = [name for name in CARRYING if name in config.block_types]
    if len(carrying) > 1:
        raise ValueError(f'{key} has {" and ".join(carrying)}, it must have at most one of '
                         f'{", ".join(CARRYING)}, which carry different things')
    summed = [name for name in SUM_ONLY if name in config.block_types]
    if config.merge != 'sum' and summed:
        raise ValueError(f'merge is {config.merge}, it must be sum if {key} has {" or ".join(summed)}')


def communications(block_types, tp_size):
    """The guide's count: 2 per TP layer, 1 per SPD layer, 2 for the boundaries if any layer is Parallel."""
    if tp_size == 1:
        return 0
    counts = [COMMUNICATIONS[name] for name in block_types]
    return sum(counts) + 2 * (0 in counts)


def stages(config):
    """
    [(step, block types)]: the blocks that a run's updates have from each step on, first of all from step 0.

    config: a dict of its keys, of which block_types_at may still be as typed, STEP:pattern[;STEP:pattern],
    with STEP in percent of max_iters. Raises ValueError if that is no such text, or its steps do not rise.
    """
    found, text = [(0, config['block_types'])], config['block_types_at']
    for stage in text.split(';') if text is not None else ():
        match = re.fullmatch(r' *([0-9]{1,12}|[0-9.]{1,12}%) *:(.+)', stage)
        try:
            step = float(match[1].rstrip('%'))
        except (TypeError, ValueError):
            raise ValueError(f'block_types_at is {text}, it must be STEP:pattern[;STEP:pattern], as in '
                             '200:tp or 25%:tp,spd;50%:tp') from None
        step = round(step / 100 * config['max_iters'] if '%' in match[1] else step)
        if not found[-1][0] < step < config['max_iters']:
            raise ValueError(f'block_types_at is {text}, with a step {step} after {found[-1][0]}; its steps '
                             f'must rise, from 1 to below max_iters, {config["max_iters"]}')
        found.append((step, repeat(match[2], config['n_layer'], 'block_types_at')))
    return found


def repeat(text, n_layer, key):
    """A pattern such as 'tp,spd' as n_layer block types. ValueError, naming the key, if that fails."""
    names = [name.strip() for name in text.split(',')]
    if n_layer % len(names):
        raise ValueError(f'{key} is {text}, a pattern of {len(names)} layers, which does not divide n_layer, '
                         f'{n_layer}')
    return names * (n_layer // len(names))


def blocks_after(step, config):
    """The block types that the weights at a step were trained with last. config: a dict of its keys"""
    return [block_types for start, block_types in stages(config) if start < max(step, 1)][-1]


def mean_over_steps(values, config):
    """The mean over a run's steps of numbers, one for each of its stages(). config: a dict of its keys"""
    starts = [start for start, _ in stages(config)]
    ends = [*starts[1:], max(config['max_iters'], 1)]
    return sum(value * (end - start) for value, start, end in zip(values, starts, ends)) / ends[-1]


def model_vocab_size(tokens):
    """The model's vocabulary: the tokenizer's, rounded up to a multiple of 64."""
    return (tokens + 63) // 64 * 64


def period(block_types):
    """The least number of layers that the block types repeat."""
    n = len(block_types)
    return next(p for p in range(1, n + 1) if n % p == 0 and block_types == block_types[:p] * (n // p))


def pattern(block_types):
    """Block types in short form: 'spd x 12', '[tp, spd] x 6', 'spd x 6, tp x 6'."""
    n, unit = len(block_types), block_types[:period(block_types)]
    if 1 < len(unit) < n:
        return f'[{", ".join(unit)}] x {n // len(unit)}'
    repeats = [(kind, len(list(equal))) for kind, equal in groupby(block_types)]
    return ', '.join(f'{kind} x {length}' if length > 1 else kind for kind, length in repeats)


def differences(theirs, ours):
    """
    The recipe keys in which two configs, as dicts, differ: {key: (theirs, ours)}.

    The same windows in other micro-batches are the same step, up to rounding and dropout's masks.
    """
    keys = sorted((theirs.keys() | ours.keys()) - HOUSEKEEPING)
    found = {key: (theirs.get(key), ours.get(key)) for key in keys if theirs.get(key) != ours.get(key)}
    if STEP <= found.keys() and windows_per_step(theirs) == windows_per_step(ours):
        return {key: pair for key, pair in found.items() if key not in STEP}
    return found


def windows_per_step(config):
    """12 x 40 and 8 x 60 are the same. None if a saved config, as a dict, has no whole numbers there."""
    factors = [config.get(key) for key in STEP]
    return math.prod(factors) if all(type(factor) is int for factor in factors) else None


def describe_changes(differences):
    """What differences() found, in words."""
    return ', '.join(f'{key} is {theirs} there, {ours} here' for key, (theirs, ours) in differences.items())


def recipe(config):
    """What two runs must share of their configs before their losses may be compared, as a dict."""
    shared = {key: value for key, value in config.items() if key not in VARIED | HOUSEKEEPING | STEP}
    return shared | {'windows per step': windows_per_step(config)}


def complete(config):
    """
    A saved config, as a dict, brought up to this version. Missing keys take their defaults; log_drift goes.

    Block types mean_tp, mean_spd and mean_parallel of earlier versions become tp, spd and parallel with merge
    'mean'. An init_from of resume or auto becomes scratch, from which those runs had begun.
    """
    config = {key: default for key, (default, _, _) in read_defaults().items()} | config
    config.pop('log_drift', None)
    names = config['block_types'] or []
    if any(str(name).startswith('mean_') for name in names):
        config.update(block_types=[name.removeprefix('mean_') for name in names], merge='mean')
    if config['init_from'] in RESUMING:
        config['init_from'] = 'scratch'
    return config


def follow(config, shape, source):
    """
    Set the keys of SHAPE to a loaded net's. Ends the program if a flag contradicts them, except that
    block_size may be smaller.
    """
    for key, value in shape.items():
        given = getattr(config, key)
        if not config.sources[key].startswith('--'):
            setattr(config, key, value)
            config.sources[key] = source
        elif given != value and not (key == 'block_size' and given < value):
            config.refuse(f'{key} is {given}, it must be {value}, as in {source}')


def follow_weights(config):
    """Have the shape follow the net that init_from names. Ends the program if there is none."""
    if config.init_from not in ('scratch', *RESUMING):
        from training import pretrained  # only here: it loads torch, and imports this module
        with config.refusing():
            follow(config, pretrained.load(config.init_from).shape, config.init_from)


def follow_run(config):
    """Have init_from, and the shape if that is not scratch, follow the run in out_dir that is to go on."""
    config.resume = config.init_from if config.init_from in RESUMING else None
    if not config.resume:
        return
    from training.rundir import read_info  # it imports this module
    with config.refusing():
        info = read_info(config.out_dir)
    config.init_from = info['config']['init_from'] if info else 'scratch'
    if config.init_from != 'scratch':
        shape = {key: info['config'][key] for key in SHAPE}
        follow(config, shape, f'{config.out_dir}/run.json')


def drop_false_size(config):
    """Drop a size that it does not have from the run's name, unless a flag gave it: a toy is no 124M."""
    shape = config.n_layer, config.n_head, config.n_embd, config.block_size
    for size, theirs in SIZES.items():
        if shape != theirs and not config.sources['wandb_run_name'].startswith('--'):
            config.wandb_run_name = re.sub(rf'-{size}(?=-|$)', '', config.wandb_run_name)


def name_run(config, stems):
    """Set the run's name and folder. stems: the names of config files to add to the name."""
    for key in 'wandb_run_name', 'out_dir':
        if (value := getattr(config, key)) is not None and not value.strip():
            config.refuse(f'{key} is {value!r}, it must not be empty')
    config.wandb_run_name = '-'.join([config.wandb_run_name, *stems])
    drop_false_size(config)
    if config.out_dir is None:
        config.out_dir = f'out/{config.wandb_run_name}'


def resolve_stages(config):
    """
    Check the blocks of all stages, and write block_types_at as it is compared: steps as numbers, each pattern
    as short as can be; None if there is one stage. Raises ValueError if a stage is wrong or changes nothing.
    """
    found = stages(vars(config))
    for i, (step, block_types) in enumerate(found):
        key = 'block_types_at' if i else 'block_types'
        check_types(block_types, key)
        check_blocks(SimpleNamespace(**vars(config) | dict(block_types=block_types)), key)
        if i and block_types == found[i - 1][1]:
            raise ValueError(f'block_types_at is {config.block_types_at}, but the blocks from step {step} '
                             f'on, {pattern(block_types)}, are those before it')
    later = [f'{step}:{",".join(types[:period(types)])}' for step, types in found[1:]]
    config.block_types_at = ';'.join(later) or None


def resolve(config):
    """
    Set the keys that follow from others: each layer's block type, the schedule's end.

    Ends the program if they do not fit together.
    """
    with config.refusing():
        if isinstance(config.block_types, str):
            config.block_types = repeat(config.block_types, config.n_layer, 'block_types')
        elif config.block_types is None:
            config.block_types = ['tp'] * config.n_layer
        resolve_stages(config)
    if config.lr_decay_iters is None:
        config.lr_decay_iters = config.max_iters
    if config.min_lr is None:
        config.min_lr = float(f'{config.learning_rate / 10:.12g}')  # 6e-4 / 10 is not 6e-5 in floats
    if config.decay_lr and config.min_lr > config.learning_rate:
        config.refuse(f'min_lr is {config.min_lr}, above learning_rate, {config.learning_rate}')
    if not 0 <= config.recompute_layers <= config.n_layer:
        config.refuse(f'recompute_layers is {config.recompute_layers}, it must be from 0 to n_layer, '
                      f'{config.n_layer}')
    if config.train_layers is not None:
        layers = range(config.n_layer)
        if not config.train_layers or not all(type(i) is int and i in layers for i in config.train_layers):
            config.refuse(f'train_layers is {config.train_layers}, it must have numbers from 0 to '
                          f'{layers[-1]}, by n_layer')
        config.train_layers = sorted(set(config.train_layers))
    if config.distill and config.init_from == 'scratch':
        config.refuse('distill is True, which needs a teacher: init_from is scratch, it must name weights')
    if config.plan and not Path(config.plan).is_file():
        config.refuse(f'plan is {config.plan}, which is not a file')


def load(argv):
    """
    argv, as in sys.argv[1:] -> Config. Ends the program, in one line, if anything in it is wrong.

    The run's name is the last wandb_run_name and the names of the config files after the one that set it:
    `train_gpt2_12comm.py cpu.py` is gpt2-12comm-cpu, so a toy never shares a folder with a full run, and
    124M stands only in the name of a run of that size.
    """
    keys = read_defaults()
    if '--help' in argv or '-h' in argv:
        show_help(keys)
    config = Config(**{key: default for key, (default, _, _) in keys.items()})
    config.sources = dict.fromkeys(keys, 'config/defaults.py')
    files = [arg for arg in argv if arg.endswith('.py') and not arg.startswith('-')]
    stems = []  # the names of the files after the one that named the run
    for source in files + [arg for arg in argv if arg not in files]:
        values = read_file(source) if source in files else dict([parse_flag(source, keys)])
        for key, value in values.items():
            setattr(config, key, check(key, value, source, keys))
            config.sources[key] = source
        if 'wandb_run_name' in values:
            stems = []
        elif source in files:
            stems.append(Path(source).stem)
    follow_weights(config)
    name_run(config, stems)
    follow_run(config)
    resolve(config)
    return config


def load_each(argvs):
    """
    The Configs of several argv, a run config first in each, as the rows of a table: equal ones stand once.

    A row is named after its blocks, 'spd x 12' or 'dense', if flags say others than its file. Ends the
    program if they change during a run.
    """
    def blocks(config):
        return 'dense' if config.tp_size == 1 else pattern(config.block_types)

    rows = {}
    for argv in argvs:
        config = load(argv)
        if config.block_types_at:
            config.refuse(f'block_types_at is {config.block_types_at}, but a step has one set of blocks; '
                          'leave it out and choose them by block_types')
        own = load([arg for arg in argv if not arg.startswith(('--block_types=', '--tp_size='))])
        if blocks(config) != blocks(own):
            config.wandb_run_name = blocks(config)
        keys = {key: value for key, value in vars(config).items() if key not in ('wandb_run_name', 'out_dir')}
        rows.setdefault(json.dumps(keys), config)
    return list(rows.values())
