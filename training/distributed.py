"""
The processes of a run: their device, their tensor- and data-parallel groups, and how they fail together.
"""

import ctypes
import os
import re
import socket
import sys
import time
from contextlib import contextmanager
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.attention import SDPBackend

from configurator import HIDING, fail, stages
from model import TPGroup

# dense bf16 and fp16 peaks in FLOP/s, from the makers' data sheets; the first name found in a device's counts
PEAK_FLOPS = {
    'H100 PCIe': 756e12, 'H100': 989e12, 'H200': 989e12, 'H20': 148e12, 'B200': 2250e12, 'A100': 312e12,
    'L40S': 362e12, 'L40': 181e12, 'L4': 121e12, 'A10': 125e12, 'V100': 125e12, 'RTX 4090': 165e12,
    'RTX 3090': 71e12,
}


def peak_flops(device, dtype):
    """The peak of the device of that name, in FLOP/s. None if it is not known."""
    found = [peak for name, peak in PEAK_FLOPS.items() if re.search(rf'\b{name}\b', device)]
    return found[0] if found and dtype != 'float32' else None


class World(NamedTuple):
    """Rank of this process, and the tensor- and data-parallel layout."""
    process: int
    processes: int
    layout: list  # a row per tensor-parallel group: its processes, by tp rank
    device: torch.device
    tp: TPGroup | None = None  # None: this process simulates all tp ranks
    ddp_group: dist.ProcessGroup | None = None  # to average gradients with; None: one replica

    @property
    def rank0(self):
        return self.process == 0

    @property
    def ddp_rank(self):
        return next(i for i, group in enumerate(self.layout) if self.process in group)

    @property
    def ddp_size(self):
        return len(self.layout)

    @property
    def tp_processes(self):
        """How many processes share a replica: 1 unless sharded."""
        return len(self.layout[0])

    @property
    def device_name(self):
        """The maker's name of a GPU."""
        return torch.cuda.get_device_name(self.device) if self.device.type == 'cuda' else str(self.device)

    def say(self, *lines):
        """Print lines for people, on rank 0 alone."""
        if self.rank0:
            print(*lines, sep='\n')


def find_world(config):
    """The World that torchrun's environment describes, not yet joined. Refuses a device that is not there."""
    process, processes = read_environment()
    device = find_device(config)
    if processes > 1 and config.backend == 'nccl' and device.type != 'cuda':
        config.refuse(f'backend is nccl, which needs GPUs, and device is {device}; leave backend out')
    return World(process, processes, tensor_parallel_groups(config, processes), device)


def read_environment():
    """(RANK, WORLD_SIZE) as torchrun sets them; (0, 1) without it. Ends the program if some are missing."""
    names = 'RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'MASTER_ADDR', 'MASTER_PORT'
    given = {name: os.environ[name] for name in names if name in os.environ}
    if 'RANK' not in given and given.get('WORLD_SIZE', '1') == '1':
        return 0, 1
    words = ' '.join(f'{name}={value}' for name, value in given.items())
    missing = [name for name in names if name not in given]
    if missing:
        fail(f'the environment has {words} but not {", ".join(missing)}: start with torchrun, which sets all '
             'of them, or unset these')
    numbers = all(given[name].isdecimal() for name in names[:3])
    if not numbers or int(given['RANK']) >= int(given['WORLD_SIZE']):
        fail(f'the environment has {words}, but RANK must be a number below WORLD_SIZE: start with torchrun, '
             'or unset these')
    return int(given['RANK']), int(given['WORLD_SIZE'])


# from Hopper on, cuDNN's attention first
ATTENTION_PRIORITY = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION,
                      SDPBackend.MATH)


def find_device(config):
    """The torch.device of this process, set up for the run. Ends the program if it is missing."""
    try:
        device = open_device(config.device)
    except ValueError as error:
        config.refuse(f'{error}; try config/cpu.py, or --device=cpu --dtype=float32 --compile=False')
    if device.type == 'cuda':
        torch.set_float32_matmul_precision('high')
        if torch.cuda.get_device_capability(device) >= (9, 0):  # Hopper
            torch._C._set_sdp_priority_order([int(kernel) for kernel in ATTENTION_PRIORITY])
        if config.dtype == 'bfloat16' and not torch.cuda.is_bf16_supported(including_emulation=False):
            config.refuse('dtype is bfloat16, which this GPU does not compute; try --dtype=float16')
    elif device.type == 'cpu':
        keep_freed_memory()
    return device


def open_device(name):
    """The torch.device of that name; of cuda, this process's GPU. Raises ValueError if it is missing."""
    if name == 'cuda':  # torch.cuda.set_device wants a number
        name = f'cuda:{os.environ.get("LOCAL_RANK", 0)}'
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError):
        raise ValueError(f'device is {name}, which this machine or this torch does not have') from None
    if device.type == 'cuda':
        torch.cuda.set_device(device)
    return device


def attention_kernel(config, device):
    """The kernel that torch chooses for attention in training: cudnn, flash, efficient or math."""
    if config.dropout:
        return 'eager'  # its masks are drawn by model.py
    if device.type not in ('cpu', 'cuda'):
        return 'math'  # torch has no choice there, as on mps
    shape = 1, config.n_head, config.block_size, config.n_embd // config.n_head
    q = torch.empty(shape, dtype=getattr(torch, config.dtype), device=device, requires_grad=True)
    chosen = SDPBackend(torch._fused_sdp_choice(q, q, q, is_causal=True))
    return chosen.name.removesuffix('_ATTENTION').lower()


def keep_freed_memory(keep=True):
    """
    Keep glibc from returning freed blocks to the kernel; faulting them in again can cost as much as the
    step's arithmetic. keep=False restores the thresholds that glibc arrives at by itself.
    """
    libc, M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = ctypes.CDLL(None), -1, -3, -4  # malloc.h
    if hasattr(libc, 'mallopt'):
        libc.mallopt(M_MMAP_MAX, 0 if keep else 65536)
        libc.mallopt(M_TRIM_THRESHOLD, -1 if keep else 64 * 2**20)  # -1: never
        libc.mallopt(M_MMAP_THRESHOLD, 32 * 2**20)


def tensor_parallel_groups(config, processes):
    """The processes of each tensor-parallel group: one if simulated, else neighbours or one per node."""
    if not config.shard:
        if config.tp_across_nodes:
            config.refuse('tp_across_nodes is True, which means something with --shard=True only')
        return [[process] for process in range(processes)]
    size = config.tp_size
    if config.log_diagnostics:
        config.refuse('log_diagnostics is True, which needs all ranks in one process; leave out shard')
    types = {name for _, block_types in stages(vars(config)) for name in block_types}
    if config.recompute_layers and types & HIDING:
        config.refuse(f'recompute_layers is {config.recompute_layers}, it must be 0 for sharded '
                      f'{" and ".join(sorted(types & HIDING))} layers, whose all-reduces outlast a layer')
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


@contextmanager
def joined(config, world, micro_batch):
    """
    Join the processes; the block gets the World with its groups.

    Out of memory, or a peer lost, ends the program with one line, of flags that help or of who is gone.
    """
    if world.processes > 1:
        world = connect(config, world)
    try:
        yield world
    except SystemExit:  # refused: what is joined is left first, see below
        if world.processes > 1:
            dist.destroy_process_group()
        raise
    except torch.OutOfMemoryError:
        fail_of_memory(config, micro_batch)
    except RuntimeError as error:
        if world.processes == 1 or not re.search('peer|timed out|connection|socket', str(error), re.I):
            raise
        fail_for_lost_peers(world, config.out_dir)
    if world.processes > 1:
        dist.destroy_process_group()  # a process that exits while their threads live may be aborted


def connect(config, world):
    """The World with its process groups. Collective."""
    backend = config.backend or ('nccl' if world.device.type == 'cuda' else 'gloo')
    check_interface(backend)
    began = time.monotonic()
    try:
        # NCCL connects at once if it knows the GPU, and not in the first step
        device = world.device if backend == 'nccl' else None
        dist.init_process_group(backend, timeout=timedelta(minutes=10), device_id=device)
    except (RuntimeError, ValueError) as error:
        address = ' '.join(f'{name}={os.environ[name]}' for name in ('MASTER_ADDR', 'MASTER_PORT'))
        seconds = time.monotonic() - began
        whose = f'process {world.process} of {world.processes}'
        sys.exit(f'error: {whose} could not join the others at {address} '
                 f'in {seconds:.0f} seconds: {str(error).partition(chr(10))[0]}')
    mesh = DeviceMesh(world.device.type, torch.tensor(world.layout), mesh_dim_names=('ddp', 'tp'))
    if world.tp_processes > 1:
        tp_rank = world.layout[world.ddp_rank].index(world.process)
        world = world._replace(tp=TPGroup(config.tp_size, tp_rank, mesh.get_group('tp')))
    if world.ddp_size > 1:
        world = world._replace(ddp_group=mesh.get_group('ddp'))
    return world


def check_interface(backend):
    """Ends the program if the variable for gloo's or NCCL's network interface names one that is missing."""
    variable = f'{backend.upper()}_SOCKET_IFNAME'
    asked, there = os.environ.get(variable, ''), [name for _, name in socket.if_nameindex()]
    # NCCL takes prefixes, and with ^ those that it must not use
    fits = str.startswith if backend == 'nccl' else str.__eq__
    missing = [name for name in asked.lstrip('=').split(',') if not any(fits(other, name) for other in there)]
    if asked and missing and not asked.startswith('^'):
        fail(f'{variable} is {asked}, but this machine has no network interface {missing[0]}, only '
             f'{", ".join(there)}; set it to one of these or unset it')


def fail_for_lost_peers(world, out_dir):
    """End the program; the lowest surviving rank reports which ranks are gone."""
    gone = missing_processes(world)
    if world.process == min(set(range(world.processes)) - set(gone)):
        who = f'process {", ".join(map(str, gone))}' if gone else 'a process that is alive'
        print(f'error: lost touch with {who} of {world.processes}; --init_from=resume goes on from the last '
              f'checkpoint in {out_dir}', file=sys.stderr)
    sys.exit(1)


def missing_processes(world):
    """Ranks that did not check in to torchrun's store within three seconds."""
    address = os.environ['MASTER_ADDR'], int(os.environ['MASTER_PORT'])
    try:
        store = dist.TCPStore(*address, is_master=False, wait_for_workers=False,
                              timeout=timedelta(seconds=10))
    except RuntimeError:  # the store is gone, and with it the node of rank 0
        return [0]
    store.set(f'alive/{world.process}', '1')
    time.sleep(3)
    return [process for process in range(world.processes) if not store.check([f'alive/{process}'])]


def broadcast(value, world):
    """Rank 0's value, on every process. Collective."""
    values = [value]
    if world.processes > 1:
        dist.broadcast_object_list(values, src=0, device=world.device)
    return values[0]


def on_rank0(function, world):
    """function() run by rank 0: its result on every process, or its OSError or ValueError as a ValueError."""
    result = error = None
    if world.rank0:
        try:
            result = function()
        except (OSError, ValueError) as refusal:
            error = str(refusal)
    result, error = broadcast((result, error), world)
    if error is not None:
        raise ValueError(error)
    return result


class Hole(NamedTuple):
    """In place of a tensor that is on its way."""
    shape: torch.Size
    dtype: torch.dtype


def broadcast_state(state, world):
    """Rank 0's state, nested dicts with tensors on the CPU, on every process. Collective."""
    def outline(value):
        if isinstance(value, dict):
            return {key: outline(entry) for key, entry in value.items()}
        return Hole(value.shape, value.dtype) if isinstance(value, torch.Tensor) else value

    def fill(value, own):
        if isinstance(value, dict):
            return {key: fill(entry, own and own[key]) for key, entry in value.items()}
        if not isinstance(value, Hole):
            return value
        tensor = (torch.empty(value.shape, dtype=value.dtype) if own is None else own).to(world.device)
        dist.broadcast(tensor, src=0)
        return tensor.cpu()

    return fill(broadcast(outline(state), world), state) if world.processes > 1 else state


def require_agreement(facts, world):
    """Raises ValueError, on every process, if the facts, a dict, differ between processes. Collective."""
    everywhere = [facts]
    if world.processes > 1:
        everywhere = [None] * world.processes
        dist.all_gather_object(everywhere, facts)
    for process, theirs in enumerate(everywhere):
        for key, value in everywhere[0].items():
            if theirs[key] != value:
                hint = '; to resume a fine-tune, each node needs its run.json' * (key == 'init_from')
                raise ValueError(f'{key} is {value!r:.80} for process 0, but {theirs[key]!r:.80} for process '
                                 f'{process}; all processes must train the same run{hint}')


def all_reduce_sum(values, world):
    """A small tensor, summed over the processes. Collective."""
    if world.processes > 1:
        dist.all_reduce(values)
    return values


class Report:
    """What a step found, on its way from the device."""

    def __init__(self, found, processes):
        """found: on the device, (3,): the processes' losses and wishes to stop summed, the gradient's norm"""
        self.found, self.processes = found.to('cpu', non_blocking=found.is_cuda), processes
        self.arrived = torch.cuda.Event() if found.is_cuda else None
        if self.arrived:
            self.arrived.record()

    def read(self):
        """
        (loss, grad_norm, stopping), the same on all processes: the mean loss of the global batch, its
        gradient's norm before clipping, whether any process is stopping. Waits for this step, no later one.
        """
        if self.arrived:
            self.arrived.synchronize()
        loss, stopping, norm = self.found.tolist()
        # the processes of a tensor-parallel group have the same loss, so the mean is that of the batch
        return loss / self.processes, norm, stopping > 0


def fail_of_memory(config, micro_batch):
    """Exit suggesting a smaller batch_size with the same total batch, two thirds of the memory or less."""
    windows = config.batch_size * config.gradient_accumulation_steps
    sizes = range(1, max(2, micro_batch * 2 // 3 + 1))
    size = max(n for n in sizes if windows % n == 0)
    if micro_batch == 1:
        fail('out of GPU memory with one window at a time; --block_size or the model has to be smaller')
    fail(f'out of GPU memory; --batch_size={size} --gradient_accumulation_steps={windows // size} keeps the '
         'batch and takes less')
