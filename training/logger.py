"""
What a run says while it runs: metrics.jsonl always, plain lines or a progress bar on the terminal, W&B where
wanted.
"""

import json
import math
import os
import sys
from pathlib import Path

from tqdm import tqdm

# of run.json, beside the config: what dashboards filter and plot by
TRACKED = {'communications', 'parameters', 'tokens_per_step', 'processes', 'device', 'git_commit', 'corpus'}
CHARTS = {'train_loss': 'train/loss', 'val_loss': 'val/loss'}   # W&B's names, where they are not ours


def finite(value):
    """The value, with None in place of a number that is not finite, which JSON does not have. Lists too."""
    if isinstance(value, list):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Log:
    """
    The first process's log; the others' is silent.

    info: run.json's contents. kept: the bytes of an earlier metrics.jsonl that still hold; what a run wrote
    after its last checkpoint it will write again. wandb_id: of the W&B run to go on with, if any.
    """

    def __init__(self, config, first, info, start, kept, wandb_id):
        self.first, self.wandb = first, None
        if first:
            self.bar = tqdm(total=config.max_iters, initial=start, unit='step',
                            disable=not sys.stderr.isatty())
            self.metrics = self.open_metrics(Path(config.out_dir) / 'metrics.jsonl', kept)
            if config.wandb_log:
                self.start_wandb(config, info, wandb_id)

    def open_metrics(self, path, kept):
        """The file, cut to `kept` bytes: a run writes again what it wrote after its last checkpoint."""
        path.touch()
        found = path.read_bytes()[:kept]
        found = found[:found.rfind(b'\n') + 1]
        if len(found) < kept:           # somebody changed it: what is left of it ends with a whole line
            self.say(f'warning: {path} is not as the last checkpoint left it; lines may be lost')
        metrics = open(path, 'r+b')
        metrics.truncate(len(found))
        metrics.seek(len(found))
        return metrics

    def say(self, words):
        """One line for people."""
        if self.first:
            self.bar.write(' '.join(words.split()), file=sys.stdout)
            sys.stdout.flush()

    def write(self, **line):
        """One line of metrics, for programs."""
        if not self.first:
            return
        line = {key: finite(value) for key, value in line.items()}
        try:
            self.metrics.write(json.dumps(line).encode() + b'\n')
            self.metrics.flush()
        except OSError as error:        # what could not be written stays buffered, and goes with a later line
            self.say(f'warning: metrics.jsonl cannot be written now: {error}')
        if self.wandb:
            charts = {CHARTS.get(key, key): value for key, value in line.items()}
            self.guard_wandb(lambda: self.wandb.log(charts))

    def size(self):
        """The bytes of all metrics so far, whether they are on the disk or on their way."""
        return self.metrics.tell()

    def flush(self):
        """Puts the metrics on the disk. Raises OSError where it does not take them."""
        self.metrics.flush()
        os.fsync(self.metrics.fileno())

    def progress(self, step, total, words):
        """How far the run is: on the bar where there is one, else as a line."""
        if self.first and self.bar.disable:
            self.say(f'step {step}/{total} | {words}')
        elif self.first:
            self.bar.set_postfix_str(words, refresh=False)
            self.bar.update(step - self.bar.n)

    def close(self, exit_code):
        if self.first:
            self.bar.close()
            try:
                self.metrics.close()
            except OSError as error:
                self.say(f'warning: the last lines of metrics.jsonl could not be written: {error}')
            if self.wandb:
                self.guard_wandb(lambda: self.wandb.finish(exit_code))

    def start_wandb(self, config, info, wandb_id):
        """
        Opens the W&B run, or goes on with the one of that id. Without a key it runs offline and never asks.
        """
        os.environ.setdefault('WANDB_SILENT', 'true')
        # its service starts slowly on a busy machine, and W&B would give up after 30 s, for the whole run
        os.environ.setdefault('WANDB_X_SERVICE_WAIT', '300')
        try:
            import wandb
            mode = None                 # W&B's own choice
            if 'WANDB_MODE' not in os.environ and not wandb.login(prompt=False):
                mode = 'offline'
                self.say('warning: W&B has no key here and runs offline; after `wandb login`, '
                         f'`wandb sync {config.out_dir}/wandb/offline-run-*` uploads what it kept')
            reduced = {f'all_reduces_{way}': count for way, count in info['all_reduces'].items()}
            tracked = {key: value for key, value in info.items() if key in TRACKED} | info['config'] | reduced
            self.wandb = wandb.init(
                project=config.wandb_project, name=config.wandb_run_name, config=tracked, dir=config.out_dir,
                mode=mode, id=wandb_id, resume='allow', group=info['corpus']['name'], job_type='train')
            self.wandb.define_metric('iter')
            # W&B drops what comes at a lower step of its own than it has seen; plotted against iter, nothing
            # is lost
            self.wandb.define_metric('*', step_metric='iter')
            self.wandb.define_metric('val/loss', step_metric='iter', summary='min,last')
        except Exception as error:
            self.say(f'warning: W&B is off for this run, {type(error).__name__}: {error}')
            self.wandb = None

    def guard_wandb(self, call):
        """Training outlives W&B: its first failure is said, and switches it off."""
        try:
            call()
        except Exception as error:
            self.say(f'warning: W&B failed and is off from here on, {type(error).__name__}: {error}')
            self.wandb = None
