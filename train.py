"""
Trains one run of the experiment, in one process or over several: data-parallel, with --shard=True
tensor-parallel too.

    python train.py config/train_gpt2_12comm.py config/cpu.py
    torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2_12comm.py --max_iters=20000
    torchrun --nnodes=2 --nproc_per_node=8 --node_rank=0 --master_addr=HOST --master_port=29500 train.py ...

`python train.py --help` lists every key. The run's folder gets metrics.jsonl, run.json and checkpoints; the
batches of a step follow from (seed, step) alone, so that runs differ in nothing but what their configs say.
"""

import contextlib
import ctypes
import json
import math
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from datetime import timedelta
from typing import NamedTuple

from configurator import ROOT, communications, differences, fail, load, model_vocab_size

if __name__ == '__main__':
    load(sys.argv[1:])                  # --help and mistakes are told before torch is loaded

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel

from training import checkpoint
from data.corpus import open_corpus
from data.dataloader import TrainLoader, val_batches
from training.drift import measure_drift
from training.logger import Log, finite
from model import GPT, GPTConfig, Ranks, count_all_reduces, join_shards, take_shard

RESUMABLE = 75                          # EX_TEMPFAIL: stopped by a signal, saved, to be continued

signals = []                            # those received that ask the run to save and leave

# dense bf16 and fp16 peaks in FLOP/s, from the makers' data sheets; the first name found in a device's counts
PEAK_FLOPS = {
    'H100 PCIe': 756e12, 'H100': 989e12, 'H200': 989e12, 'H20': 148e12, 'B200': 2250e12, 'A100': 312e12,
    'L40S': 362e12, 'L40': 181e12, 'L4': 121e12, 'A10': 125e12, 'V100': 125e12, 'RTX 4090': 165e12,
    'RTX 3090': 71e12,
}


def peak_flops(device, dtype):
    """The peak of the device of that name, in FLOP/s. None where it is not known."""
    found = [peak for name, peak in PEAK_FLOPS.items() if re.search(rf'\b{name}\b', device)]
    return found[0] if found and dtype != 'float32' else None


# where this process is and what it runs on


class Place(NamedTuple):
    """This process among all, and where its tensor-parallel group and its data-parallel one lie."""
    process: int
    processes: int
    groups: list                        # one row a tensor-parallel group: the processes in it, by tp rank
    device: torch.device

    @property
    def first(self):
        return self.process == 0

    @property
    def ddp_rank(self):
        return next(i for i, group in enumerate(self.groups) if self.process in group)

    @property
    def ddp_size(self):
        return len(self.groups)

    @property
    def tp_rank(self):
        return self.groups[self.ddp_rank].index(self.process)

    @property
    def device_name(self):
        """What the maker calls it, for a GPU."""
        return torch.cuda.get_device_name(self.device) if self.device.type == 'cuda' else str(self.device)


def tensor_parallel_groups(config, processes):
    """The processes of each tensor-parallel group: alone when simulating, else side by side or one a node."""
    if not config.shard:
        if config.tp_across_nodes:
            config.refuse('tp_across_nodes is True, which means something with --shard=True only')
        return [[process] for process in range(processes)]
    size = config.tp_size
    if config.log_drift:
        config.refuse('log_drift is True, which needs all ranks in one process; leave out shard')
    if processes % size:
        config.refuse(f'shard is True, which takes a multiple of tp_size, {size}, processes, not {processes}')
    if config.dtype == 'float16':
        config.refuse('dtype is float16, whose loss scale is not for shard; use bfloat16')
    if not config.tp_across_nodes:
        return torch.arange(processes).view(-1, size).tolist()
    nodes = int(os.environ.get('GROUP_WORLD_SIZE', 1))
    if nodes % size:
        config.refuse(f'tp_across_nodes is True, which needs a multiple of tp_size, {size}, nodes')
    return torch.arange(processes).view(nodes // size, size, -1).transpose(1, 2).reshape(-1, size).tolist()


def keep_freed_memory(keep=True):
    """
    Has the C library keep the memory that a step frees for the next step. glibc would give large blocks back
    to the kernel, and each of their pages faults when it is next touched, which can take as long as the
    step's arithmetic. With keep=False it does so again, by the thresholds that glibc comes to by itself.
    """
    libc, M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = ctypes.CDLL(None), -1, -3, -4    # malloc.h
    if hasattr(libc, 'mallopt'):
        libc.mallopt(M_MMAP_MAX, 0 if keep else 65536)
        libc.mallopt(M_TRIM_THRESHOLD, -1 if keep else 64 * 2**20)                          # -1: never
        libc.mallopt(M_MMAP_THRESHOLD, 32 * 2**20)


def find_place(config):
    """This process's Place, from torchrun's environment. Refuses a device that is not there."""
    name = config.device
    if name == 'cuda':                  # torch.cuda.set_device wants a number
        name = f'cuda:{os.environ.get("LOCAL_RANK", 0)}'
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError):
        config.refuse(f'device is {name}, which this machine or this torch does not have; try config/cpu.py, '
                      'or --device=cpu --dtype=float32 --compile=False')
    if device.type == 'cuda':
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision('high')
        if config.dtype == 'bfloat16' and not torch.cuda.is_bf16_supported(including_emulation=False):
            config.refuse('dtype is bfloat16, which this GPU does not compute; try --dtype=float16')
    elif device.type == 'cpu':
        keep_freed_memory()
    processes = int(os.environ.get('WORLD_SIZE', 1))
    return Place(int(os.environ.get('RANK', 0)), processes, tensor_parallel_groups(config, processes), device)


def connect(config, place):
    """
    Joins the processes. Returns (ranks, ddp_group): the tensor-parallel ranks that this one hosts, None for
    all of them, and the processes that it averages gradients with, None for none.
    """
    if place.processes == 1:
        return None, None
    backend = config.backend or ('nccl' if place.device.type == 'cuda' else 'gloo')
    try:
        dist.init_process_group(backend, timeout=timedelta(minutes=10))
    except RuntimeError as error:
        sys.exit(f'error: process {place.process} of {place.processes} could not reach all others at '
                 f'{os.environ.get("MASTER_ADDR")}:{os.environ.get("MASTER_PORT")} in ten minutes '
                 f'({str(error).partition(chr(10))[0]})')
    mesh = DeviceMesh(place.device.type, torch.tensor(place.groups), mesh_dim_names=('ddp', 'tp'))
    ranks = None
    if len(place.groups[0]) > 1:
        ranks = Ranks(config.tp_size, local=1, first=place.tp_rank, group=mesh.get_group('tp'))
    return ranks, mesh.get_group('ddp') if place.ddp_size > 1 else None


def disconnect(place):
    """Ends the process groups; a process that exits with their threads alive may be aborted."""
    if place.processes > 1:
        dist.destroy_process_group()


def missing_processes(place):
    """
    Which processes do not answer, after those that live had a few seconds to say so in torchrun's store.
    """
    address = os.environ['MASTER_ADDR'], int(os.environ['MASTER_PORT'])
    try:
        store = dist.TCPStore(*address, is_master=False, wait_for_workers=False,
                              timeout=timedelta(seconds=10))
    except RuntimeError:                # the store is gone, and with it the node of the first process
        return [0]
    store.set(f'alive/{place.process}', '1')
    time.sleep(3)
    return [process for process in range(place.processes) if not store.check([f'alive/{process}'])]


def agree(value, place):
    """The first process's value, on every process."""
    values = [value]
    if place.processes > 1:
        dist.broadcast_object_list(values, src=0, device=place.device)
    return values[0]


def total(values, place):
    """A tensor of a few numbers, summed over the processes."""
    if place.processes > 1:
        dist.all_reduce(values)
    return values


# the run's folder


def claim(config):
    """
    Locks out_dir for this run; what is there is never overwritten but for the lines of a run without a
    checkpoint.

    Returns the result, in words, of a run that is finished already, else None. Raises ValueError where
    out_dir is not this run's to write.
    """
    out_dir, resume = config.out_dir, config.init_from == 'resume'
    try:
        os.makedirs(out_dir, exist_ok=True)
        checkpoint.lock(out_dir)
    except OSError as error:
        raise ValueError(f'out_dir is {out_dir}, which cannot be written: {error.strerror}') from error
    info, saved = checkpoint.read_info(f'{out_dir}/run.json'), checkpoint.exists(out_dir)
    changed = differences(info['config'], vars(config)) if info else {}
    finished = info is not None and info['state'] == 'finished'
    if finished and not changed:
        loss = math.nan if info['val_loss'] is None else info['val_loss']
        return f'{info["name"]} is finished: val loss {loss:.4f}, step {info["iter"]} ({out_dir})'
    if resume and not saved:
        raise ValueError(f'init_from is resume, but {out_dir} has no checkpoint')
    longer = finished and config.max_iters > info['iter']       # a finished run may go on to be that
    if changed and not (resume and (longer or not finished)):
        words = ', '.join(f'{key} is {theirs} there, {ours} here' for key, (theirs, ours) in changed.items())
        raise ValueError(f'out_dir is {out_dir}, which holds another run ({words}); choose another --out_dir')
    if saved and not resume:
        raise ValueError(f'out_dir is {out_dir}, which holds this run unfinished; --init_from=resume goes on')


def claim_together(config, place):
    """claim() by the first process, its outcome on all."""
    result = refusal = None
    if place.first:
        try:
            result = claim(config)
        except (OSError, ValueError) as error:
            refusal = str(error)
    result, refusal = agree((result, refusal), place)
    if refusal:
        config.refuse(refusal)
    return result


def git_commit():
    """Of the code that runs, or None where there is no git or no repository."""
    if shutil.which('git') is None:
        return None
    command = ['git', 'rev-parse', '--verify', '-q', 'HEAD']
    git = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return git.stdout.strip() or None


def describe(config, corpus, model, observed, place):
    """What run.json says of a run from its start: what it is, and what made it."""
    return dict(
        name=config.wandb_run_name, state='running', iter=0, config=vars(config),
        corpus=dict(name=corpus.name, val_sha256=corpus.meta['splits']['val']['sha256'],
                    **{key: corpus.meta[key] for key in ('corpus', 'tokenizer', 'vocab_size')}),
        communications=communications(config.block_types, config.tp_size),
        all_reduces=vars(observed), parameters=model.num_params(), flops_per_token=model.flops_per_token(),
        tokens_per_step=config.batch_size * config.gradient_accumulation_steps * config.block_size,
        processes=place.processes, device=place.device_name, git_commit=git_commit(),
        versions=dict(python=platform.python_version(), torch=torch.__version__, numpy=np.__version__),
        argv=sys.argv[1:])


# the model


def model_config_of(config, vocab_size):
    """The GPTConfig that a run's config describes. Raises ValueError as it does."""
    known = {field.name for field in fields(GPTConfig)}
    shape = {key: value for key, value in vars(config).items() if key in known}
    return GPTConfig(vocab_size=vocab_size, **shape)


def observe_all_reduces(model):
    """What f_op and g_op do in one pass over one token, eagerly: AllReduces."""
    idx = torch.zeros(1, 1, dtype=torch.long)
    with count_all_reduces() as observed:
        model(idx, idx)[1].backward()
    model.zero_grad(set_to_none=True)
    return observed


def autocast(config, place):
    dtype = getattr(torch, config.dtype)
    return torch.autocast(place.device.type, dtype, enabled=dtype != torch.float32)


def compiled(model, micro_batch, config, place, say):
    """
    The model under torch.compile, tried on a micro-batch of zeros; where that fails, the model itself and a
    line why.
    """
    try:
        fast, reason = torch.compile(model), None
        idx = torch.zeros(micro_batch, config.block_size, dtype=torch.long, device=place.device)
        with autocast(config, place):
            loss = fast(idx, idx)[1]
        loss.backward()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:          # compilers fail in many ways, and eager training needs none of them
        reason = f'{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}'
    model.zero_grad(set_to_none=True)
    failures = total(torch.tensor(float(reason is not None), device=place.device), place)
    if failures.item() == 0:
        return fast
    say(f'warning: torch.compile failed, training runs eagerly ({reason or "on another process"})')
    return model


# a step and an evaluation


def learning_rate(it, config):
    """
    The rate of update `it`, counted from 0: linear warmup, then a cosine from learning_rate down to min_lr.
    """
    if not config.decay_lr:
        return config.learning_rate
    if it < config.warmup_iters:
        return config.learning_rate * (it + 1) / (config.warmup_iters + 1)
    if it >= config.lr_decay_iters:
        return config.min_lr
    progress = (it - config.warmup_iters) / (config.lr_decay_iters - config.warmup_iters)
    return config.min_lr + 0.5 * (1 + math.cos(math.pi * progress)) * (config.learning_rate - config.min_lr)


class Network:
    """A model and what trains it: `raw` as it is, `fast` compiled where wanted, `ddp` averaging gradients."""

    def __init__(self, raw, config):
        self.raw = raw
        self.optimizer = raw.configure_optimizers(
            config.weight_decay, config.learning_rate, (config.beta1, config.beta2))
        device = raw.lm_head.weight.device.type
        self.scaler = torch.amp.GradScaler(device, enabled=config.dtype == 'float16')

    def wrap(self, micro_batch, ddp_group, config, place, say):
        self.fast = compiled(self.raw, micro_batch, config, place, say) if config.compile else self.raw
        self.ddp = self.fast
        if ddp_group is not None:
            self.ddp = DistributedDataParallel(self.fast, process_group=ddp_group)


def train_step(net, batches, lr, config, place, stopping=False):
    """
    One update from a list of equal micro-batches (x, y). Returns (loss, grad_norm, stopping), the same on all
    processes: the mean loss of the global batch, its gradient's norm before clipping, and if any process is
    stopping.

    A step whose loss or gradient is not finite updates nothing. One transfer to the host decides all of it.
    """
    loss = torch.zeros((), device=place.device)
    for i, (x, y) in enumerate(batches, 1):
        waits = i < len(batches) and place.ddp_size > 1     # gradients are averaged after the last one only
        with net.ddp.no_sync() if waits else contextlib.nullcontext():
            with autocast(config, place):
                micro_loss = net.ddp(x, y)[1] / len(batches)
            net.scaler.scale(micro_loss).backward()
        loss += micro_loss.detach()
    net.scaler.unscale_(net.optimizer)
    net.raw.sum_replicated_gradients()
    norm = net.raw.gradient_norm()
    if config.grad_clip:
        torch.nn.utils.clip_grads_with_norm_(net.raw.parameters(), config.grad_clip, norm)
    summed = total(torch.stack((loss, loss.new_tensor(float(stopping)))), place)
    loss, stopping, norm = torch.cat((summed, norm.view(1))).tolist()
    loss, stopping = loss / place.processes, stopping > 0
    if math.isfinite(loss) and math.isfinite(norm):
        for group in net.optimizer.param_groups:
            group['lr'] = lr
        net.scaler.step(net.optimizer)
    net.scaler.update()
    net.optimizer.zero_grad(set_to_none=True)
    return loss, norm, stopping


@torch.no_grad()
def evaluate(model, tokens, at_most, config, place):
    """
    (loss, its number of tokens): the mean over the first at_most of `tokens`, each read once, by all
    processes.
    """
    model.eval()
    nats, count = [], 0
    for x, y, n in val_batches(tokens, config.block_size, config.batch_size, at_most,
                               place.ddp_rank, place.ddp_size, place.device):
        with autocast(config, place):
            nats.append(model(x, y)[1].float() * n)
        count += n
    model.train()
    summed = math.fsum(torch.stack(nats).tolist()) if nats else 0.0
    exact = torch.float32 if place.device.type == 'mps' else torch.float64
    summed, count = total(torch.tensor([summed, count], dtype=exact, device=place.device), place).tolist()
    return summed / count, int(count) // len(place.groups[0])       # the ranks of a group read the same


# the run


def optimized_names(net):
    """The parameters' names in the order in which the optimizer's state numbers them."""
    names = {id(p): name for name, p in net.raw.named_parameters()}
    return [names[id(p)] for group in net.optimizer.param_groups for p in group['params']]


def dense_state(net):
    """
    A copy of the dense model's and optimizer's state, on the CPU, whatever this process hosts. A collective
    call when sharded.

    The tied head is wte itself, so that a file holds it once.
    """
    def dense(name, tensor):
        whole = join_shards(name, tensor.detach(), net.raw.ranks) if tensor.dim() else tensor
        return whole.to('cpu', copy=True)

    weights = {name: dense(name, p) for name, p in net.raw.named_parameters()}
    weights['lm_head.weight'] = weights['transformer.wte.weight']
    state, names = net.optimizer.state_dict(), optimized_names(net)
    moments = {i: {key: dense(names[i], value) for key, value in entry.items()}
               for i, entry in state['state'].items()}
    return dict(model=weights, optimizer=dict(state, state=moments))


def load_dense_state(net, saved):
    """
    What dense_state gave, into the model and optimizer, of which a sharded process keeps its slices. The
    optimizer keeps its own weight decay and betas. Raises ValueError and the like where it does not fit.
    """
    def mine(name, key, tensor):
        scalar = key == 'step'
        if tensor.shape != (() if scalar else saved['model'][name].shape):
            raise ValueError(f'{key} of {name} has the shape {tuple(tensor.shape)}')
        return tensor if scalar else take_shard(name, tensor, net.raw.ranks)

    net.raw.load_dense(saved['model'])
    state, names = saved['optimizer']['state'], optimized_names(net)
    if state and (state.keys() != set(range(len(names)))
                  or any(entry.keys() != {'step', 'exp_avg', 'exp_avg_sq'} for entry in state.values())):
        raise ValueError("the optimizer's state is not that of AdamW for this network")
    moments = {i: {key: mine(names[i], key, value) for key, value in entry.items()}
               for i, entry in state.items()}
    net.optimizer.load_state_dict(dict(net.optimizer.state_dict(), state=moments))


@dataclass
class Progress:
    """Where a run stands: with weights and moments, all that an exact resume needs."""
    iter: int = 0                       # updates made
    evaluated: int = -1                 # the last evaluation was after so many
    val_loss: float | None = None       # what it gave
    best_val_loss: float = math.inf
    skipped: int = 0                    # updates without a finite gradient, in all
    seconds: float = 0.0                # of training, evaluations included, over all resumes
    metrics_bytes: int = 0              # the size of metrics.jsonl, every line of which holds
    wandb_id: str | None = None


class Run:
    """One run: what it trains and where it stands."""

    def __init__(self, config, place, corpus, loader, model_config, ranks):
        """ranks: the tensor-parallel ranks that this process hosts; None for all of them."""
        self.config, self.place, self.corpus, self.loader = config, place, corpus, loader
        torch.manual_seed(config.seed)  # on the CPU: a seed gives the same weights whatever the device
        dense = GPT(model_config)
        self.info = describe(config, corpus, dense, observe_all_reduces(dense), place)
        self.net = Network((dense if ranks is None else dense.shard(ranks)).to(place.device), config)
        self.now = Progress()
        self.writer, self.writing = ThreadPoolExecutor(1), None     # of checkpoints; the one on its way
        self.saved = None               # the step of the last one that was written

    def restore(self):
        """
        Goes on from the latest checkpoint that can be read. Returns lines to say. Raises ValueError if none
        fits.
        """
        config, lines = self.config, []
        path, saved = checkpoint.load_latest(config.out_dir, lines.append)
        network = {'n_layer', 'n_head', 'n_embd', 'block_size', 'bias', 'vocab_size'}

        def identity(keys, vocab_size, corpus):
            return dict(keys, vocab_size=vocab_size, train_tokens=corpus['splits']['train']['tokens'],
                        val_sha256=corpus['splits']['val']['sha256'])

        try:
            there = identity(saved['config'], saved['vocab_size'], saved['corpus'])
            changed = differences(
                there, identity(vars(config), self.net.raw.config.vocab_size, self.corpus.meta))
            if network & changed.keys():
                raise ValueError(', '.join(f'{key} is {ours} here, {theirs} there'
                                           for key, (theirs, ours) in changed.items() if key in network))
            self.now = Progress(**saved['progress'])
            for field in fields(Progress):
                if not isinstance(getattr(self.now, field.name), field.type):
                    raise ValueError(f'{field.name} is {getattr(self.now, field.name)!r:.40}')
            if self.now.iter > config.max_iters:
                raise ValueError(f'max_iters is {config.max_iters}, it is at step {self.now.iter} already')
            load_dense_state(self.net, saved)
            self.net.scaler.load_state_dict(saved['scaler'])
        except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
            raise ValueError(f'{path} does not fit this run: {error}') from error
        if path.name == 'ckpt.pt':
            self.saved = self.now.iter
        lines += [f'warning: {key} was {theirs} up to step {self.now.iter}, it is {ours} from here on'
                  for key, (theirs, ours) in changed.items()]
        return lines + [f'resuming from {path} at step {self.now.iter}']

    def train(self, ddp_group, lines):
        """
        Updates until max_iters, or until a signal. Returns whether the run is finished. Says `lines` at its
        start.
        """
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, lambda number, frame: signals.append(number))
        config, place, now = self.config, self.place, self.now
        try:
            self.log = Log(config, place.first, self.info, now.iter, now.metrics_bytes, now.wandb_id)
        except OSError as error:
            fail(f'{error.filename} cannot be written: {error.strerror}')
        try:
            self.note_state('running')
            for line in self.introduction() + lines:
                self.log.say(line)
            self.net.wrap(self.loader.micro_batch, ddp_group, config, place, self.log.say)
            reached_the_end = self.update()
            self.finish_writing()
            # all leave together: torchrun ends who is left once one has left
            finished = agree(reached_the_end and self.saved == now.iter, place)
            self.note_state('finished' if finished else 'resumable')
        except BaseException:
            self.note_state('failed')
            raise
        self.log.close(0 if finished else RESUMABLE)
        return finished

    def update(self):
        """Updates, evaluates and saves until max_iters or a signal. Returns whether it is max_iters."""
        config, now = self.config, self.now
        stopping, self.failures, self.timed = False, 0, []
        while not stopping:
            last, best = now.iter == config.max_iters, False
            evaluating = (last or now.iter % config.eval_interval == 0) and now.evaluated != now.iter
            if evaluating:
                best = self.evaluate()
            if config.checkpoint_interval:
                due = now.iter % config.checkpoint_interval == 0
            else:
                due = evaluating and config.always_save_checkpoint
            if (due or best or last) and (evaluating or self.saved != now.iter):
                self.save(best)
            if last:
                return True
            stopping = self.step()
        self.save()
        return False

    def introduction(self):
        """The head of a log: what made this run."""
        info, reduced = self.info, self.info['all_reduces']
        versions = ', '.join(f'{name} {version}' for name, version in info['versions'].items())
        return [f'{info["name"]} -> {self.config.out_dir}',
                f'{info["parameters"]:,} parameters, {info["communications"]} communications '
                f'({reduced["forward"]} all-reduces forward, {reduced["backward"]} backward)',
                f'{info["corpus"]["corpus"]}, {info["tokens_per_step"]:,} tokens a step',
                f'{info["processes"]} x {info["device"]}, {versions}, commit {info["git_commit"]}',
                f'config: {json.dumps(info["config"])}']

    def step(self):
        """One update, logged where it is due. Returns whether to stop."""
        config, now = self.config, self.now
        began, lr = time.perf_counter(), learning_rate(now.iter, config)
        try:
            batches = list(self.loader.batches(now.iter))
        except ValueError as error:
            fail(str(error))
        if config.dropout:              # masks follow from the step, so that a resumed run draws the same
            seeds = np.random.SeedSequence((config.seed, now.iter, self.place.ddp_rank))
            torch.manual_seed(int(seeds.generate_state(1)[0]))
        loss, norm, stopping = train_step(self.net, batches, lr, config, self.place, stopping=bool(signals))
        now.iter += 1
        self.timed.append(time.perf_counter() - began)
        now.seconds += self.timed[-1]
        self.failures = 0 if math.isfinite(loss) and math.isfinite(norm) else self.failures + 1
        now.skipped += self.failures > 0
        if now.iter % config.log_interval == 0 or now.iter == config.max_iters:
            self.log_step(loss, norm, lr)
        if self.failures:
            self.speak_of_failure(loss, norm, lr)
        return stopping

    def speak_of_failure(self, loss, norm, lr):
        """Warns of a step that updated nothing, and ends the run after too many in a row."""
        what = f'step {self.now.iter}: loss {loss}, grad norm {norm}, lr {lr:.2e}'
        self.log.say(f'warning: {what}; this step updated nothing')
        # float16's loss scale starts too high on purpose, and comes down by such steps
        if self.failures == (25 if self.net.scaler.is_enabled() else 5):
            fail(f'{what}, the {self.failures}th step in a row without a finite gradient; try a lower '
                 f'--learning_rate or --grad_clip=1.0; the checkpoints in {self.config.out_dir} are intact')

    def log_step(self, loss, norm, lr):
        config, now, cuda = self.config, self.now, self.place.device.type == 'cuda'
        seconds = sum(self.timed) / len(self.timed)
        speed = self.info['tokens_per_step'] / seconds
        peak = peak_flops(self.info['device'], config.dtype)
        mfu = peak and speed * self.info['flops_per_token'] / (peak * self.place.processes)
        memory = torch.cuda.max_memory_allocated() / 2**30 if cuda else None
        self.timed = []
        self.log.write(iter=now.iter, train_loss=loss, lr=lr, grad_norm=norm, tokens_per_sec=speed, mfu=mfu,
                       peak_memory_gib=memory, skipped=now.skipped)
        left = timedelta(seconds=round(seconds * (config.max_iters - now.iter)))
        words = [f'train {loss:.4f}', f'lr {lr:.2e}', f'grad norm {norm:.2f}', f'{speed:,.0f} tokens/s']
        if mfu:
            words.append(f'mfu {mfu:.1%}')
        self.log.progress(now.iter, config.max_iters, ' | '.join([*words, f'{left} left']))

    def evaluate(self):
        """Validation loss. Returns whether it is the best so far."""
        config, now, began = self.config, self.now, time.perf_counter()
        now.val_loss, tokens = evaluate(
            self.net.fast, self.corpus.val, config.eval_tokens, config, self.place)
        now.evaluated, extras = now.iter, self.extras()
        now.seconds += time.perf_counter() - began
        best = now.val_loss < now.best_val_loss
        if best:                        # never so for a loss that is not a number
            now.best_val_loss = now.val_loss
        self.log.write(iter=now.iter, val_loss=now.val_loss, val_tokens=tokens, **extras)
        note = ' (best)' if best else ''
        self.log.say(f'step {now.iter}: val loss {now.val_loss:.4f} over {tokens:,} tokens{note}')
        return best

    def extras(self):
        """What an evaluation line says beside the validation loss, where it was asked for."""
        config, extras = self.config, {}
        if config.eval_train_tokens:
            extras['fixed_train_loss'], extras['fixed_train_tokens'] = evaluate(
                self.net.fast, self.corpus.train, config.eval_train_tokens, config, self.place)
        if config.log_drift and self.place.first:
            x = next(val_batches(self.corpus.val, config.block_size, config.batch_size, config.eval_tokens,
                                 0, 1, self.place.device))[0]
            extras['drift'], extras['drift_cosine'] = measure_drift(self.net.raw, x)
        return extras

    def save(self, best=False):
        """A checkpoint, by the first process. Training waits for a copy on the CPU, which a thread writes."""
        self.finish_writing()           # one copy at a time
        state = dense_state(self.net) if self.place.ddp_rank == 0 else None
        if not self.place.first:
            return
        self.now.metrics_bytes = self.log.size()
        self.now.wandb_id = self.log.wandb.id if self.log.wandb else self.now.wandb_id
        state.update(scaler=self.net.scaler.state_dict(), iter=self.now.iter, progress=asdict(self.now),
                     config=vars(self.config), vocab_size=self.net.raw.config.vocab_size,
                     corpus=self.corpus.meta)
        self.writing = self.writer.submit(self.write, state, best)

    def write(self, state, best):
        """In the thread. A disk that refuses is warned of, and training goes on."""
        try:
            self.log.flush()            # the lines that a checkpoint counts on are on the disk before it
            checkpoint.save(self.config.out_dir, state, best, self.config.keep_checkpoints)
            self.saved = state['iter']
        except (OSError, RuntimeError) as error:        # torch.save makes the one of the other
            self.log.say(f'warning: no checkpoint at step {state["iter"]}, {error}; the last one is intact')

    def finish_writing(self):
        """Waits for the checkpoint that is being written, if any."""
        if self.writing:
            self.writing.result()

    def note_state(self, state):
        """
        run.json, by the first process, once the checkpoints that it speaks of are written: state is one of
        running, finished, resumable, failed.
        """
        self.finish_writing()
        if self.place.first:
            now = self.now
            self.info.update(state=state, iter=now.iter, val_loss=finite(now.val_loss), seconds=now.seconds)
            try:
                checkpoint.write_json(f'{self.config.out_dir}/run.json', self.info)
            except OSError as error:
                self.log.say(f'warning: run.json does not say that the run is {state}: {error}')


def fail_of_memory(config, micro_batch):
    """One line with the flags that keep a step's windows and take about two thirds of the memory, or less."""
    windows = config.batch_size * config.gradient_accumulation_steps
    sizes = range(1, max(2, micro_batch * 2 // 3 + 1))
    size = max(n for n in sizes if windows % n == 0)
    if micro_batch == 1:
        fail('out of GPU memory with one window at a time; --block_size or the model has to be smaller')
    fail(f'out of GPU memory; --batch_size={size} --gradient_accumulation_steps={windows // size} keeps the '
         'batch and takes less')


def fail_alone(config, place):
    """Names the processes that a failed collective call has lost, by one of those that live."""
    gone = missing_processes(place)
    if place.process == min(set(range(place.processes)) - set(gone)):
        who = f'process {", ".join(map(str, gone))}' if gone else 'a process that lives'
        print(f'error: lost touch with {who} of {place.processes}; --init_from=resume goes on from the last '
              f'checkpoint in {config.out_dir}', file=sys.stderr)
    sys.exit(1)


def run_here(config, place, corpus, loader, model_config):
    """Trains, or evaluates where that is all that is asked for. Returns the exit status."""
    ranks, ddp_group = connect(config, place)
    if not config.eval_only and (result := claim_together(config, place)):
        if place.first:
            print(result)
        return 0
    run = Run(config, place, corpus, loader, model_config, ranks)
    try:
        lines = run.restore() if config.init_from == 'resume' else []
    except ValueError as error:
        config.refuse(str(error))
    if not config.eval_only:
        return 0 if run.train(ddp_group, lines) else RESUMABLE
    loss, tokens = evaluate(run.net.raw, corpus.val, config.eval_tokens, config, place)
    if place.first:
        print(*lines, f'val loss {loss:.4f} over {tokens:,} tokens of {corpus.meta["corpus"]}', sep='\n')
    return 0


def main(argv):
    config = load(argv)
    place = find_place(config)
    try:
        corpus = open_corpus(config.dataset)
        model_config = model_config_of(config, model_vocab_size(corpus.vocab_size))
        windows = config.batch_size * config.gradient_accumulation_steps
        loader = TrainLoader(corpus.train, config.block_size, windows, config.seed, place.ddp_rank,
                             place.ddp_size, config.batch_size, place.device)
    except ValueError as error:
        config.refuse(str(error))
    try:
        status = run_here(config, place, corpus, loader, model_config)
    except torch.OutOfMemoryError:
        fail_of_memory(config, loader.micro_batch)
    except RuntimeError as error:
        if place.processes == 1 or not re.search('peer|timed out|connection|socket', str(error), re.I):
            raise
        fail_alone(config, place)
    disconnect(place)
    sys.exit(status)


if __name__ == '__main__':
    main(sys.argv[1:])
