"""
The plan of an experiment: a TOML file, committed before the first run, that every run.json keeps a copy of.

    margin = 0.02                       # nats: how far above dense is still as good
    tuned = 'learning_rate'             # each config at its own best value of this key,
    grid = [1e-3, 2e-3, 4e-3]           # among these; beyond them, where the best lies at an end
    tuning_seeds = [1, 2]               # chosen on these seeds
    answer_seeds = [3, 4, 5]            # and judged on these
    configs = ['config/train_gpt2.py']  # what is judged against dense
    tp_size = 4                         # of these, if not their own
    comparisons = [['spd x 12', 'palm x 12']]  # pairs besides, first minus second, as the tables call them

All keys are optional; those of TEXT are for people. What a plan does not name is exploratory.
"""

import difflib
import re
import tomllib
from dataclasses import dataclass
from functools import cached_property

from analysis.runs import variation
from configurator import ROOT, fail, load, stages

# key -> (whether a value is right, what it must be)
KEYS = dict(
    margin=(lambda value: is_number(value) and value > 0, 'a number of nats, above 0'),
    tuned=(lambda value: isinstance(value, str), 'a key of train.py, as text'),
    grid=(lambda value: isinstance(value, list) and all(map(is_number, value)), 'a list of numbers'),
    tuning_seeds=(lambda value: is_list(value, int), 'a list of seeds'),
    answer_seeds=(lambda value: is_list(value, int), 'a list of seeds'),
    configs=(lambda value: is_list(value, str), 'a list of config files'),
    tp_size=(lambda value: type(value) is int and value > 1, 'a number of ranks, at least 2'),
    comparisons=(lambda value: is_list(value, list) and all(is_list(pair, str) and len(pair) == 2
                                                            for pair in value),
                 "a list of pairs of patterns, as in [['spd x 12', 'palm x 12']]"),
)
TEXT = ('question', 'recipe', 'items', 'expected', 'refuted_if')


def is_number(value):
    return type(value) in (int, float)


def is_list(value, kind):
    return isinstance(value, list) and all(type(item) is kind for item in value)


@dataclass(frozen=True)
class Plan:
    """A plan as read. What it does not say is None, or an empty list."""
    file: str
    sha256: str
    margin: float | None = None
    tuned: str | None = None
    grid: tuple = ()
    tuning_seeds: tuple = ()
    answer_seeds: tuple = ()
    configs: tuple = ()
    comparisons: tuple = ()
    tp_size: int | None = None

    @cached_property
    def kinds(self):
        """(tp_size, blocks, merge) of each config that it names."""
        configs = [vars(load([str(ROOT / file)])) for file in self.configs]
        return [kind(config | (dict(tp_size=self.tp_size) if self.tp_size and config['tp_size'] > 1 else {}))
                for config in configs]

    def covers(self, row):
        """
        Whether a row's runs carry this plan, are at a best value if it tunes, and have its number of ranks.
        """
        sizes = {tp_size for tp_size, *_ in self.kinds}
        return (all((run.info.get('plan') or {}).get('sha256') == self.sha256 for run in row.runs.values())
                and (self.tuned is None or row.tuning.compared)
                and (row.dense or not sizes or row.tp_size in sizes))

    def names_run(self, run):
        """Whether a run is of one of its configs."""
        return kind(run.config) in self.kinds and variation(run).keys() <= {'merge', 'block_types_at'}

    def names(self, row):
        """Whether a row is one of its configs, or the dense control of any, as the plan would have them."""
        return self.covers(row) and (row.dense or self.names_run(row.first))

    def names_pair(self, first, second):
        """Whether it names the comparison of two rows, first minus second, as the plan would have them."""
        return ([first.blocks, second.blocks] in map(list, self.comparisons)
                and self.covers(first) and self.covers(second))


def kind(config):
    return config['tp_size'], stages(config), config['merge']


def parse_plan(file, sha256, text):
    """A Plan from run.json's record of it. Ends the program, in one line, if a key or a value is wrong."""
    try:
        found = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        fail(f'{file}: not TOML: {error}')
    for key, value in found.items():
        if key not in KEYS and key not in TEXT:
            close = difflib.get_close_matches(key, [*KEYS, *TEXT], n=1)
            fail(f'{file}: a plan has no key {key}; {f"{close[0]}?" if close else ""} '
                 f'It has {", ".join([*KEYS, *TEXT])}')
        if key in KEYS and not KEYS[key][0](value):
            fail(f'{file}: {key} is {value!r}, it must be {KEYS[key][1]}')
    both = set(found.get('tuning_seeds', [])) & set(found.get('answer_seeds', []))
    if both:
        fail(f'{file}: seed {min(both)} is in tuning_seeds and in answer_seeds; a seed is for one of them')
    size = re.search(r'--tp_size=(\S+)', str(found.get('recipe', '')))
    if size and size[1] != str(found.get('tp_size')):
        fail(f'{file}: recipe has {size[0]}, so the plan must say tp_size = {size[1]}')
    for config in found.get('configs', []):
        if not (ROOT / config).is_file():
            fail(f'{file}: configs has {config}, which is not a file in {ROOT}')
    own = {key: tuple(value) if isinstance(value, list) else value for key, value in found.items()
           if key in KEYS}
    return Plan(file, sha256, **own)


def plan_of(runs):
    """
    (the one Plan that runs carry, lines to note). None if they carry none, or more than one: then nothing
    among them was planned as a whole.
    """
    plans = {run.info['plan']['sha256']: run.info['plan'] for run in runs if run.info.get('plan')}
    if len(plans) > 1:
        files = ', '.join(f'{plan["file"]} ({sha256[:8]})' for sha256, plan in plans.items())
        return None, [f'these runs follow {len(plans)} plans, so all of it is exploratory: {files}']
    return (parse_plan(**next(iter(plans.values()))), []) if plans else (None, [])
