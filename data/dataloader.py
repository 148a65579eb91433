"""
The windows that a step trains on and a validation reads: functions of (seed, step) and of nothing else.

Neither the model nor the number of processes nor an evaluation in between changes a window. So runs that
differ in block_types alone see the same batches, and a resumed run needs no saved position.

    loader = TrainLoader(corpus.train, block_size, windows_per_step, seed, 0, 1, batch_size, device)
    for x, y in loader.batches(step): ...   # the micro-batches of that step, for this process
    for x, y, n in val_batches(corpus.val, block_size, batch_size, eval_tokens, 0, 1, device): ...
"""

from concurrent.futures import Future
from threading import Thread

import numpy as np
import torch

# B = micro-batch or batch_size, T = block_size, S = windows of a step for this process


class TrainLoader:
    """
    The training windows of every step, divided among the data-parallel processes in contiguous shares.

    A process takes its share in micro_steps micro-batches of micro_batch windows: the largest equal ones of
    at most batch_size. Raises ValueError if the processes do not divide the windows, or if the split is
    shorter than one.
    """

    def __init__(self, tokens, block_size, windows_per_step, seed, ddp_rank, ddp_size, batch_size, device):
        if windows_per_step % ddp_size:
            raise ValueError(f'batch_size x gradient_accumulation_steps = {windows_per_step} windows '
                             f'do not divide by {ddp_size} data-parallel processes')
        if len(tokens) <= block_size:
            raise ValueError(f'the training split has {len(tokens)} tokens, one window of block_size '
                             f'{block_size} needs {block_size + 1}')
        self.tokens, self.block_size, self.seed = tokens, block_size, seed
        self.windows_per_step, self.share = windows_per_step, windows_per_step // ddp_size
        self.first = ddp_rank * self.share
        sizes = range(1, min(batch_size, self.share) + 1)
        self.micro_batch = max(size for size in sizes if self.share % size == 0)
        self.micro_steps = self.share // self.micro_batch
        self.device = torch.device(device)
        self.prefetched = None, None  # the step expected next, and the Future of its windows

    def window_starts(self, step):
        """(windows_per_step,) int64: where the windows of a step begin, those of all processes together."""
        rng = np.random.default_rng([self.seed, step])
        return rng.integers(0, len(self.tokens) - self.block_size, self.windows_per_step)

    def batches(self, step):
        """
        Yield micro_steps times (x, y), int64 (B, T) on the device; y is the token after each of x's.

        Raises ValueError if a token is outside the vocabulary.
        """
        if self.prefetched[0] != step:
            self.prefetch(step)
        share = self.prefetched[1].result()  # (x, y), (S, T) each; raises here what the thread met
        self.prefetch(step + 1)
        for i in range(0, self.share, self.micro_batch):
            yield tuple(part[i:i + self.micro_batch].to(self.device, non_blocking=self.device.type == 'cuda')
                        for part in share)

    def prefetch(self, step):
        # a new thread for each step: nothing to shut down. not a daemon either: a program that ends waits for
        # one read, some milliseconds, while a daemon thread would be killed inside torch
        self.prefetched = step, Future()
        Thread(target=self.read_share, args=self.prefetched).start()

    def read_share(self, step, future):
        """Set the future to this process's windows of a step."""
        try:
            starts = self.window_starts(step)[self.first:self.first + self.share]
            windows = self.tokens.read_windows(starts, self.block_size + 1)  # (S, T + 1)
            x, y = (torch.from_numpy(part.astype(np.int64, order='C'))
                    for part in (windows[:, :-1], windows[:, 1:]))  # (S, T)
            future.set_result((x.pin_memory(), y.pin_memory()) if self.device.type == 'cuda' else (x, y))
        except BaseException as error:
            future.set_exception(error)


def val_batches(tokens, block_size, batch_size, eval_tokens, ddp_rank, ddp_size, device):
    """
    Yield (x, y, n), int64 (B, T) on the device, and the number n of real targets in y.

    The targets are the first eval_tokens of the split (its tokens 1, 2, ...) in consecutive windows, each in
    one window of one process. A batch that they do not fill is padded, with -1 in y. Batch i goes to process
    i % ddp_size, and is the same for any ddp_size. Raises ValueError if a token is outside the vocabulary.
    """
    targets = min(eval_tokens, len(tokens) - 1)
    size = batch_size * block_size
    for begin in range(ddp_rank * size, targets, ddp_size * size):
        n = min(size, targets - begin)
        x, y = np.zeros(size, dtype=np.int64), np.full(size, -1, dtype=np.int64)
        read = tokens.read(begin, n + 1)
        x[:n], y[:n] = read[:-1], read[1:]
        x, y = (torch.from_numpy(part.reshape(batch_size, block_size)).to(device) for part in (x, y))
        yield x, y, n
