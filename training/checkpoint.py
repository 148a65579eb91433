"""
Checkpoints: dense weights and moments, written by a thread so that at every moment a whole one is there.

    ckpt.pt             the latest
    ckpt-previous.pt    the one before it
    ckpt-best.pt        the best validation loss
    ckpt-STEP.pt        those that keep_checkpoints asks for
"""

import math
import os
import re
import shutil
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch

from configurator import SHAPE, complete, differences
from training.distributed import broadcast, broadcast_state, on_rank0
from training.logger import finite
from training.rundir import LATEST, atomic_write, write_json
from training.sharding import join_shards, load_dense, take_shard

KEYS = {'model', 'optimizer', 'scaler', 'iter', 'config', 'vocab_size', 'corpus', 'progress'}


@dataclass
class Progress:
    """Where a run stands: with weights and moments, all that an exact resume needs."""
    iter: int = 0  # updates made
    evaluated: int = -1  # step of the last evaluation
    val_loss: float | None = None  # what it gave
    best_val_loss: float = math.inf
    skipped: int = 0  # updates without a finite gradient, in all
    seconds: float = 0.0  # of training, evaluations included, over all resumes
    metrics_bytes: int = 0  # length of metrics.jsonl at this checkpoint; a resumed run cuts the file to it
    wandb_id: str | None = None


# files


def kept(out_dir):
    """The checkpoints that save() named by step, the oldest first; no other file, which may be a person's."""
    names = [path for path in Path(out_dir).glob('ckpt-*.pt') if re.fullmatch(r'ckpt-\d{8,}\.pt', path.name)]
    return sorted(names, key=lambda path: int(path.stem[5:]))


def link_as(path, name):
    """Hard-link under a second name, replacing what was there (copy if the file system has no links)."""
    other = path.with_name(name)
    temporary = path.with_name(f'{name}.tmp')
    temporary.unlink(missing_ok=True)
    try:
        os.link(path, temporary)  # takes no space of its own
    except OSError:
        with open(path, 'rb') as file, atomic_write(other) as copy:
            shutil.copyfileobj(file, copy)
    else:
        os.replace(temporary, other)


def save(out_dir, state, best, keep):
    """
    Write ckpt.pt, keeping the one before as ckpt-previous.pt; ckpt-best.pt if this is the best so far; if
    keep > 0 also ckpt-STEP.pt, and keep the last `keep` of those besides this one.

    Whenever the process is killed, a file that is there is whole, and from the end of the first call on one
    of LATEST is there. ckpt.pt is named last: a run that resumes from it will not write the others again.
    """
    folder = Path(out_dir)
    latest, new, previous = folder / 'ckpt.pt', folder / 'ckpt-new.pt', folder / 'ckpt-previous.pt'
    first, *others = ['ckpt-best.pt'] * best + [f'ckpt-{state["iter"]:08}.pt'] * (keep > 0) + [new.name]
    with atomic_write(folder / first) as file:
        torch.save(state, file)  # to a Python file: other threads can run while it writes
    for name in others:
        link_as(folder / first, name)
    if latest.exists():
        os.replace(latest, previous)
    os.replace(new, latest)
    if keep:
        for path in kept(folder)[:-keep - 1]:
            path.unlink()


def drop_optimizer(out_dir, warn):
    """
    Take AdamW's state out of all checkpoints; a run that resumes from them starts its moments anew.

    warn(line) names those that cannot be read or written, which stay as they are.
    """
    folder, done = Path(out_dir), {}
    for path in [folder / 'ckpt.pt', folder / 'ckpt-previous.pt', folder / 'ckpt-best.pt', *kept(out_dir)]:
        try:
            file = path.stat().st_ino
            if file in done:  # another name of a file that has been written anew
                link_as(done[file], path.name)
                continue
            saved = load(path)
            saved['optimizer']['state'] = {}
            with atomic_write(path) as stripped:
                torch.save(saved, stripped)
            done[file] = path
        except FileNotFoundError:
            continue
        except ValueError as error:
            warn(f'warning: {error}')
        except (OSError, RuntimeError) as error:
            warn(f"warning: {path} keeps AdamW's state: {write_error(error)}")


def write_error(error):
    """Why a write failed, for people. torch.save hides an OSError in a RuntimeError of its own."""
    while not isinstance(error, OSError) and error.__context__:
        error = error.__context__
    return getattr(error, 'strerror', None) or error


def read(path, mmap=False):
    """
    A dict of tensors, numbers and strings, on the CPU; with mmap, tensors stay in the file until they are
    used. No code in it is ever run.

    Raises FileNotFoundError, or ValueError in one line if it cannot be read.
    """
    try:
        with zipfile.ZipFile(path) as parts:
            broken = parts.testzip()  # torch.load does not look at the checksums
        saved = None if broken else torch.load(path, map_location='cpu', weights_only=True, mmap=mmap)
    except FileNotFoundError:
        raise
    except Exception as error:  # it fails in the unpickler, the zip reader or a tensor's storage
        raise ValueError(f'{path} is damaged: {type(error).__name__}') from None
    if broken:
        raise ValueError(f'{path} is damaged: {broken}')
    if not isinstance(saved, dict):
        raise ValueError(f'{path} is not a checkpoint')
    return saved


def load(path):
    """A checkpoint of train.py. Raises as read() does."""
    saved = read(path)
    if not KEYS <= saved.keys():
        raise ValueError(f'{path} is not a checkpoint that train.py wrote')
    return saved


def load_latest(out_dir, warn):
    """
    (path, checkpoint) of the latest that can be read; warn(line) names those that are damaged.

    Raises ValueError if there is none.
    """
    for path in [*(Path(out_dir) / name for name in LATEST), *reversed(kept(out_dir))]:  # the latest first
        try:
            return path, load(path)
        except FileNotFoundError:
            continue
        except ValueError as error:
            warn(str(error))
    raise ValueError(f'{out_dir} has no checkpoint that can be read')


# what is in them


def optimized_names(net):
    """The parameters' names in the order in which the optimizer's state numbers them."""
    names = {id(p): name for name, p in net.raw_model.named_parameters()}
    return [names[id(p)] for group in net.optimizer.param_groups for p in group['params']]


def dense_state(net):
    """A copy of the dense model's and optimizer's state, on the CPU. Collective if sharded."""
    def dense(name, tensor):
        whole = join_shards(name, tensor.detach(), net.raw_model.tp) if tensor.dim() else tensor
        return whole.to('cpu', copy=True)

    weights = {name: dense(name, p) for name, p in net.raw_model.named_parameters()}
    weights['lm_head.weight'] = weights['transformer.wte.weight']  # one tensor, so that a file holds it once
    state, names = net.optimizer.state_dict(), optimized_names(net)
    moments = {i: {key: dense(names[i], value) for key, value in entry.items()}
               for i, entry in state['state'].items()}
    return dict(model=weights, optimizer=dict(state, state=moments))


def load_dense_state(net, saved):
    """
    Load what dense_state gave; a sharded process takes its slices. The optimizer keeps its own weight decay
    and betas, and has no moments of a parameter that no block uses.

    Raises ValueError and the like if it does not fit.
    """
    def mine(name, key, tensor):
        scalar = key == 'step'
        if tensor.shape != (() if scalar else saved['model'][name].shape):
            raise ValueError(f'{key} of {name} has the shape {tuple(tensor.shape)}')
        return tensor if scalar else take_shard(name, tensor, net.raw_model.tp)

    load_dense(net.raw_model, saved['model'])
    state, names = saved['optimizer']['state'], optimized_names(net)
    if not state.keys() <= set(range(len(names))) \
            or any(entry.keys() != {'step', 'exp_avg', 'exp_avg_sq'} for entry in state.values()):
        raise ValueError("the optimizer's state is not that of AdamW for this network")
    moments = {i: {key: mine(names[i], key, value) for key, value in entry.items()}
               for i, entry in state.items()}
    net.optimizer.load_state_dict(dict(net.optimizer.state_dict(), state=moments))


def fresh_or_resumed(net, resuming, config, corpus, world):
    """
    If resuming, load the newest readable checkpoint of out_dir into net. Rank 0 reads it and sends it to all.
    Collective.

    Returns (the run's Progress, its step if it is that of ckpt.pt, messages to log).

    Raises ValueError, in one line, if none fits.
    """
    if not resuming:
        return Progress(), None, []
    messages, saved = [], None

    def load_newest():
        nonlocal saved
        path, saved = load_latest(config.out_dir, messages.append)
        return path

    path = on_rank0(load_newest, world)
    saved = broadcast_state(saved, world)
    network = set(SHAPE) - {'embed_scale'}

    def identity(keys, vocab_size, corpus):
        return dict(keys, vocab_size=vocab_size, train_tokens=corpus['splits']['train']['tokens'],
                    val_sha256=corpus['splits']['val']['sha256'])

    try:
        theirs = identity(complete(saved['config']), saved['vocab_size'], saved['corpus'])
        ours = identity(vars(config), net.raw_model.config.vocab_size, corpus.meta)
        changed = differences(theirs, ours)
        if network & changed.keys():
            raise ValueError(', '.join(f'{key} is {here} here, {there} there'
                                       for key, (there, here) in changed.items() if key in network))
        state = Progress(**saved['progress'])
        for field in fields(Progress):
            if not isinstance(getattr(state, field.name), field.type):
                raise ValueError(f'{field.name} is {getattr(state, field.name)!r:.40}')
        if net.teacher and saved.get('teacher_sha256') not in (None, net.teacher.sha256):
            raise ValueError(f'the weights of {config.init_from}, its teacher, have changed since it began; '
                             'put them back, or go on without them, --distill=False')
        if state.iter > config.max_iters and not config.eval_only:
            raise ValueError(f'max_iters is {config.max_iters}, it is at step {state.iter} already')
        load_dense_state(net, saved)
        if saved['scaler']:  # else its first steps were not in float16
            net.scaler.load_state_dict(saved['scaler'])
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise ValueError(f'{path} does not fit this run: {error}') from None
    messages += [f'warning: {key} was {there} up to step {state.iter}, it is {here} from here on'
                 for key, (there, here) in changed.items()]
    messages.append(f'resuming from {path} at step {state.iter}')
    return state, state.iter if path.name == 'ckpt.pt' else None, messages


# writing them while training goes on


class Diverged(SystemExit):
    """Ends a run whose steps update nothing any more: its result is that it diverged, and no failure."""


class Writer:
    """
    Writes a run's checkpoints, in a thread, and its run.json; files come from rank 0 alone.

        with Writer(...) as writer:  # run.json says running; failed, if the block raises; or diverged
            writer.save()
            finished = writer.finish()  # it says finished, or resumable
    """

    def __init__(self, net, state, info, log, config, corpus, world, saved_step=None):
        """saved_step: that of the ckpt.pt that is there already"""
        self.net, self.state, self.info, self.log = net, state, info, log
        self.config, self.corpus, self.world, self.saved_step = config, corpus, world, saved_step
        self.thread, self.pending = ThreadPoolExecutor(1), None

    def __enter__(self):
        self.note('running')
        return self

    def __exit__(self, kind, error, traceback):
        if error is not None:
            self.note('diverged' if isinstance(error, Diverged) else 'failed')

    def save(self, best=False):
        """Write a checkpoint. Training waits for a copy on the CPU only. Collective if sharded."""
        self.wait()  # one copy at a time
        saved = dense_state(self.net) if self.world.ddp_rank == 0 else None
        if not self.world.rank0:
            return
        self.state.metrics_bytes = self.log.size()
        self.state.wandb_id = self.log.wandb.id if self.log.wandb else self.state.wandb_id
        saved.update(
            scaler=self.net.scaler.state_dict(), iter=self.state.iter, progress=asdict(self.state),
            config=vars(self.config), corpus=self.corpus.meta,
            vocab_size=self.net.raw_model.config.vocab_size,
            teacher_sha256=self.net.teacher and self.net.teacher.sha256)
        self.pending = self.thread.submit(self.write, saved, best)

    def write(self, saved, best):
        """In the thread. A failed write is logged, training continues."""
        try:
            self.log.flush()  # the lines that a checkpoint counts on are on the disk before it
            save(self.config.out_dir, saved, best, self.config.keep_checkpoints)
            self.saved_step = saved['iter']
        except (OSError, RuntimeError) as error:
            why = write_error(error)
            self.log.say(f'warning: no checkpoint at step {saved["iter"]}: {why}; the last one is intact')

    def wait(self):
        """Wait for the checkpoint that is being written, if any."""
        if self.pending:
            self.pending.result()

    def finish(self):
        """Write run.json for the end of the run. True if all of it is done and saved. Collective."""
        self.wait()
        done = self.saved_step == self.state.iter and self.state.evaluated == self.config.max_iters
        # all leave together: torchrun terminates the others once one has left
        finished = broadcast(done, self.world)
        if finished and self.world.rank0 and not self.config.keep_optimizer:
            drop_optimizer(self.config.out_dir, self.log.say)
        self.note('finished' if finished else 'resumable')
        return finished

    def note(self, status):
        """Write run.json, after the checkpoints it speaks of. status: see Writer"""
        self.wait()
        if self.world.rank0:
            state = self.state
            self.info.update(
                state=status, iter=state.iter, val_loss=finite(state.val_loss), seconds=state.seconds)
            try:
                write_json(f'{self.config.out_dir}/run.json', self.info)
            except OSError as error:
                self.log.say(f'warning: run.json does not say that the run is {status}: {error}')
