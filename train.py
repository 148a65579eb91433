"""
Train one run of the experiment, in one process or over several: data-parallel, and with --shard=True
tensor-parallel too.

    python train.py config/train_gpt2_12comm.py config/cpu.py
    torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2_12comm.py --max_iters=20000
    torchrun --nnodes=2 --nproc_per_node=8 --node_rank=0 --master_addr=HOST --master_port=29500 train.py ...

`python train.py --help` lists every key. The run's folder gets metrics.jsonl, run.json and checkpoints. The
batches of a step follow from (seed, step) alone, so that runs differ in nothing but what their configs say.
"""

import math
import signal
import sys
import time
from contextlib import nullcontext
from dataclasses import replace

from configurator import begin_program, blocks_after, fail, load, model_vocab_size, one_line, pattern, stages

if __name__ == '__main__':
    begin_program()
    load(sys.argv[1:])  # --help and mistakes are reported before torch is loaded

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel

from data.corpus import open_corpus
from data.dataloader import TrainLoader, val_batches
from model import GPT, count_all_reduces
from training.checkpoint import Diverged, Writer, fresh_or_resumed
from training.compiling import autocast, compiled, recompute
from training.diagnostics import diagnose
from training.distill import find_teacher, with_teacher
from training.distributed import Report, all_reduce_sum, find_world, joined, on_rank0, require_agreement
from training.logger import Log, counts, describe, introduction
from training.optimizer import adamw, gradient_norm, sum_replicated_gradients
from training.pretrained import initial_weights
from training.rundir import claim, git_commit
from training.sharding import shard_model
from variants import gpt_config

RESUMABLE = 75  # exit status, EX_TEMPFAIL: stopped by a signal, saved, can be resumed

signals = []  # those received that ask the run to save and leave


# setup


def open_data(config, world):
    """
    (corpus, loader, model_config). Ends the program, in one line, if data, batch or model do not fit.

    loader.micro_batch: windows in a backward pass. A process's share of a step is cut into equal
    micro-batches of at most batch_size.
    """
    with config.refusing():
        corpus = open_corpus(config.dataset)
        model_config = gpt_config(vars(config), model_vocab_size(corpus.vocab_size))
        if corpus.vocab_size > model_config.vocab_size:
            raise ValueError(f'vocab_size is {model_config.vocab_size}, it must be at least that of '
                             f'{corpus.name}, {corpus.vocab_size}')
        windows = config.batch_size * config.gradient_accumulation_steps  # of a step, over all processes
        loader = TrainLoader(corpus.train, config.block_size, windows, config.seed, world.ddp_rank,
                             world.ddp_size, config.batch_size, world.device)
    return corpus, loader, model_config


def facts(config, corpus):
    """What must be the same on every process before the first step, by name."""
    # used by rank 0 only, or chosen per process
    may_differ = {'out_dir', 'device', 'wandb_log', 'wandb_project', 'wandb_run_name'}
    keys = {key: value for key, value in vars(config).items() if key not in may_differ}
    files = {f'data/{corpus.name}, {split}': corpus.meta['splits'][split] for split in ('train', 'val')}
    return keys | files | dict(torch=torch.__version__, commit=git_commit())


def build_model(config, model_config, world, weights=None):
    """
    (the GPT of this process, the whole network's size and all-reduces, for run.json).

    weights: a dense state_dict to begin with. Without it, a seed gives one network, whatever the blocks.
    """
    torch.manual_seed(config.seed)  # on the CPU: the same weights on every device
    whole = GPT(model_config)
    if weights:
        whole.load_state_dict(weights)
    if config.perturb:
        perturb_weights(whole, config.perturb, config.seed)
    later = [with_blocks(whole, block_types) for _, block_types in stages(vars(config))[1:]]
    observed, used = zip(*[observe(model) for model in (whole, *later)])
    freeze_untrained(whole, used[0], config.train_layers)
    size = dict(**counts(observed, config), parameters=whole.num_params(),
                flops_per_token=whole.flops_per_token())
    model = whole if world.tp is None else shard_model(whole, world.tp)
    return model.to(world.device), size


def with_blocks(model, block_types):
    """A GPT of other block types over the model's own parameters."""
    with torch.device('meta'):
        other = GPT(replace(model.config, block_types=block_types), model.tp)
    other.load_state_dict(model.state_dict(keep_vars=True), assign=True)
    return other


@torch.no_grad()
def perturb_weights(model, scale, seed):
    """Each weight times 1 + scale x normal, from a stream of random numbers of its own."""
    own = torch.Generator().manual_seed(int(np.random.SeedSequence((seed, 1)).generate_state(1)[0]))
    for p in model.parameters():
        p.mul_(1 + scale * torch.randn(p.shape, generator=own))


def observe(model):
    """
    (the AllReduces of one eager pass over one token, forward and backward; the parameters that it uses).

    It leaves every parameter trainable.
    """
    idx = torch.zeros(1, 1, dtype=torch.long, device=model.lm_head.weight.device)
    model.requires_grad_(True).zero_grad(set_to_none=True)
    with count_all_reduces() as observed:
        model(idx, idx)[1].backward()
    used = {p for p in model.parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return observed, used


def freeze_untrained(model, used, train_layers=None):
    """
    Freeze what is in none of train_layers, unless that is None, and what is not used, as observe() finds it:
    a block may leave a parameter out, for whose gradient DDP would wait.
    """
    layers = [model] if train_layers is None else [model.transformer.h[i] for i in train_layers]
    trained = used & {p for layer in layers for p in layer.parameters()}
    for p in model.parameters():
        p.requires_grad_(p in trained)


class Network:
    """A model and what trains it: raw_model the GPT itself, model compiled, ddp_model averaging gradients."""

    def __init__(self, raw_model, config, teacher=None):
        self.raw_model, self.teacher = raw_model, teacher
        self.model = self.ddp_model = with_teacher(raw_model, teacher, config)
        self.optimizer = adamw(raw_model, config)
        device = raw_model.lm_head.weight.device.type
        self.scaler = torch.amp.GradScaler(device, enabled=config.dtype == 'float16')

    def use_blocks(self, block_types, config):
        """Go on with these blocks over the same parameters and optimizer state. Collective if sharded."""
        if block_types != self.raw_model.config.block_types:
            self.raw_model = with_blocks(self.raw_model, block_types)
            self.model = self.ddp_model = with_teacher(self.raw_model, self.teacher, config)
            freeze_untrained(self.raw_model, observe(self.raw_model)[1], config.train_layers)

    def switch(self, block_types, micro_batch, config, world, say):
        """use_blocks() during training. Collective."""
        self.use_blocks(block_types, config)
        torch.compiler.reset()
        self.wrap(micro_batch, config, world, say)
        say(f'the blocks are {pattern(block_types)} from here on')

    def wrap(self, micro_batch, config, world, say):
        """Compile the model and put DDP around it, as config and world ask for."""
        recompute(self.raw_model, config.recompute_layers)
        if config.compile:
            self.model = compiled(self.model, micro_batch, config, world, say)
        self.ddp_model = self.model
        if world.ddp_group is not None:
            # not static_graph: after no_sync() it averages nothing (pytorch/pytorch#143580, #187732)
            self.ddp_model = DistributedDataParallel(
                self.model, process_group=world.ddp_group, gradient_as_bucket_view=True)


# a step and an evaluation


def learning_rate(it, config):
    """The rate of update `it`, counted from 0: linear warmup, then a cosine from learning_rate to min_lr."""
    if not config.decay_lr:
        return config.learning_rate
    if it < config.warmup_iters:
        return config.learning_rate * (it + 1) / (config.warmup_iters + 1)
    if it >= config.lr_decay_iters:
        return config.min_lr
    progress = (it - config.warmup_iters) / (config.lr_decay_iters - config.warmup_iters)
    return config.min_lr + 0.5 * (1 + math.cos(math.pi * progress)) * (config.learning_rate - config.min_lr)


def train_step(net, batches, lr, config, world, stopping=False):
    """
    One update from a list of equal micro-batches (x, y). Collective. Returns its Report.

    A step whose loss or gradient is not finite updates nothing. The device decides that, and never waits for
    the host.
    """
    loss = torch.zeros((), device=world.device)
    for i, (x, y) in enumerate(batches, 1):
        # DDP averages the gradients after the last micro-batch only
        accumulating = i < len(batches) and world.ddp_size > 1
        with net.ddp_model.no_sync() if accumulating else nullcontext():
            with autocast(config, world):
                micro_loss = net.ddp_model(x, y)[1] / len(batches)
            net.scaler.scale(micro_loss).backward()
        loss += micro_loss.detach()
    net.scaler.unscale_(net.optimizer)  # does nothing but for float16, which is refused if sharded
    sum_replicated_gradients(net.raw_model)
    norm = gradient_norm(net.raw_model)
    if config.grad_clip:
        torch.nn.utils.clip_grads_with_norm_(net.raw_model.parameters(), config.grad_clip, norm)
    summed = all_reduce_sum(torch.stack((loss, loss.new_full((), float(stopping)))), world)
    found = torch.cat((summed, norm.view(1)))  # (3,)
    for group in net.optimizer.param_groups:
        group['lr'] = lr
    # fused AdamW leaves weights, moments and step counts as they are where this is 1
    net.optimizer.found_inf = 1 - found.isfinite().all().float()
    net.optimizer.step()
    net.scaler.update()
    net.optimizer.zero_grad(set_to_none=True)
    return Report(found, world.processes)


def undamaged(batches):
    """The batches, one by one. Ends the program, in one line, if their data are damaged."""
    with one_line(ValueError):
        yield from batches


@torch.no_grad()
def evaluate(model, tokens, at_most, config, world):
    """(loss, number of tokens): the mean over the first at_most of `tokens`, each read once. Collective."""
    model.eval()
    nats, targets = [], 0  # of this process
    for x, y, n in undamaged(val_batches(tokens, config.block_size, config.batch_size, at_most,
                                         world.ddp_rank, world.ddp_size, world.device)):
        with autocast(config, world):
            nats.append(model(x, y)[1].float() * n)
        targets += n
    model.train()
    local = math.fsum(torch.stack(nats).tolist()) if nats else 0.0
    exact = torch.float32 if world.device.type == 'mps' else torch.float64
    sums = all_reduce_sum(torch.tensor([local, targets], dtype=exact, device=world.device), world)
    total, all_targets = sums.tolist()
    # the processes of a tensor-parallel group read the same windows: in the mean that cancels
    return total / all_targets, int(all_targets) // world.tp_processes


def evaluate_extras(net, corpus, config, world):
    """What an evaluation line says beside the validation loss, as the config asks for. Collective."""
    extras = {}
    if config.eval_train_tokens:
        extras['fixed_train_loss'], extras['fixed_train_tokens'] = evaluate(
            net.model, corpus.train, config.eval_train_tokens, config, world)
    if config.log_diagnostics and world.rank0:  # never sharded: find_world() refuses that
        x, y, _ = next(val_batches(corpus.val, config.block_size, config.batch_size, config.eval_tokens,
                                   0, 1, world.device))
        extras['diagnostics'] = diagnose(net.raw_model, x, y)
    return extras


# the run


def seed_dropout(config, step, world):
    """Dropout's masks follow from the step, so that a resumed run draws the same."""
    if config.dropout:
        seeds = np.random.SeedSequence((config.seed, step, world.ddp_rank))
        torch.manual_seed(int(seeds.generate_state(1)[0]))


class Reports:
    """The Reports of a run's steps, read a step late: while the device computes the next one."""

    def __init__(self, state, config, log):
        self.state, self.config, self.log = state, config, log
        self.unread = []
        self.bad_steps = 0  # in a row, up to the last one read
        self.loss, self.norm, self.stopping = math.nan, math.nan, False

    def read(self, keep=0):
        """Read all but the last `keep`. Ends the run if too many steps in a row have updated nothing."""
        while len(self.unread) > keep:
            self.loss, self.norm, stopping = self.unread.pop(0).read()
            self.stopping |= stopping
            bad = not (math.isfinite(self.loss) and math.isfinite(self.norm))
            self.bad_steps = self.bad_steps + 1 if bad else 0
            self.state.skipped += bad
            if bad:
                self.warn(self.state.iter - len(self.unread))

    def warn(self, step):
        """Warn of a step, counted from 1, that updated nothing; end the run after too many in a row."""
        config, log, rate = self.config, self.log, learning_rate(step - 1, self.config)
        what = f'step {step}: loss {self.loss}, grad norm {self.norm}, lr {rate:.2e}'
        log.say(f'warning: {what}; this step updated nothing')
        # float16's loss scale starts too high on purpose, and comes down by such steps
        if self.bad_steps == (25 if config.dtype == 'float16' else 5):
            log.alert('diverged', what)
            fail(f'{what}, the {self.bad_steps}th step in a row without a finite gradient; try a lower '
                 f'--learning_rate or --grad_clip=1.0; the checkpoints in {config.out_dir} are intact',
                 Diverged)


def catch_signals():
    """Have the signals that ask a run to end noted in `signals`; the loop reads them after each step."""
    for number in signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup has it ignored
            signal.signal(number, lambda number, frame: signals.append(number))


def evaluation_is_due(state, config):
    """At every eval_interval and at the end, unless it was made before the run was resumed."""
    regular = state.iter % config.eval_interval == 0 or state.iter == config.max_iters
    return regular and state.evaluated != state.iter


def log_evaluation(net, state, corpus, log, config, world):
    """Evaluate and log it. Returns whether the validation loss is the lowest so far. Collective."""
    began = time.perf_counter()
    state.val_loss, tokens = evaluate(net.model, corpus.val, config.eval_tokens, config, world)
    extras = evaluate_extras(net, corpus, config, world)
    state.evaluated = state.iter
    state.seconds += time.perf_counter() - began
    best = state.val_loss < state.best_val_loss  # never if the loss is not a number
    if best:
        state.best_val_loss = state.val_loss
    log.evaluation(state, tokens, best, extras)
    return best


def save_is_due(state, config, evaluated=False, best=False, saved_step=None):
    """
    Save every checkpoint_interval steps; if that is None, at every evaluation (always_save_checkpoint).
    Always at the best loss and at the end. A saved step is saved again only after an evaluation.
    """
    regular = evaluated and config.always_save_checkpoint
    if config.checkpoint_interval:
        regular = state.iter % config.checkpoint_interval == 0
    return (regular or best or state.iter == config.max_iters) and (evaluated or saved_step != state.iter)


def main(argv):
    config = load(argv)
    world = find_world(config)
    corpus, loader, model_config = open_data(config, world)  # refusals come before processes join
    with joined(config, world, loader.micro_batch) as world:
        with config.refusing():
            require_agreement(facts(config, corpus), world)
            result, resuming = on_rank0(lambda: claim(config), world)
            if result:
                return world.say(result)  # finished already
            weights = initial_weights(config, corpus, resuming, say=world.say)
            raw_model, size = build_model(config, model_config, world, weights)
            net = Network(raw_model, config, find_teacher(config, model_config, weights, world))
            state, saved_step, messages = fresh_or_resumed(net, resuming, config, corpus, world)
        net.use_blocks(blocks_after(state.iter, vars(config)), config)
        if config.eval_only:
            loss, tokens = evaluate(net.model, corpus.val, config.eval_tokens, config, world)
            words = f'val loss {loss:.6f} over {tokens:,} tokens of {corpus.meta["corpus"]}'
            return world.say(*messages, words)
        info = describe(config, corpus, size, net, world)
        catch_signals()
        log = Log(config, world, info, state)
        with Writer(net, state, info, log, config, corpus, world, saved_step) as writer:
            log.say(*introduction(info), *messages)
            net.wrap(loader.micro_batch, config, world, log.say)
            switches, reports = dict(stages(vars(config))[1:]), Reports(state, config, log)
            while not reports.stopping:
                evaluating = evaluation_is_due(state, config)
                best = evaluating and log_evaluation(net, state, corpus, log, config, world)
                if save_is_due(state, config, evaluating, best, writer.saved_step):
                    writer.save(best)
                if state.iter == config.max_iters:
                    break

                if state.iter in switches:
                    net.switch(switches[state.iter], loader.micro_batch, config, world, log.say)
                began, lr = time.perf_counter(), learning_rate(state.iter, config)
                batches = list(undamaged(loader.batches(state.iter)))
                seed_dropout(config, state.iter, world)
                reports.unread.append(train_step(net, batches, lr, config, world, stopping=bool(signals)))
                state.iter += 1
                logging = state.iter % config.log_interval == 0 or state.iter == config.max_iters
                # an evaluation and a save wait for the device anyway
                waiting = logging or evaluation_is_due(state, config) or save_is_due(state, config)
                reports.read(keep=0 if waiting else 1)
                log.timed.append(time.perf_counter() - began)
                state.seconds += log.timed[-1]
                if logging:
                    log.step(state, reports.loss, reports.norm, lr)
            reports.read()
            if reports.stopping:
                writer.save()
            finished = writer.finish()  # False if stopped before the last evaluation, or not saved
        log.close(0 if finished else RESUMABLE)
    sys.exit(0 if finished else RESUMABLE)


if __name__ == '__main__':
    main(sys.argv[1:])
