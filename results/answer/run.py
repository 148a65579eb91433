"""
The runs of the tuned answer in the order of plan.toml, each config at its own best learning rate.

    python results/answer/run.py --jobs 2  # items 1 to 5, on a CPU: 7 hours of two cores
    python results/answer/run.py --gpu --jobs 8 --english FILE.jsonl.xz  # all items, on a GPU
    python results/answer/run.py --small --jobs 2  # all items at a size that takes minutes, one seed: a trial
    python results/answer/run.py --plan results/gpu/english-384/plan.toml --jobs 8  # another plan, on a GPU

What is finished is not done again: the same command goes on after an interruption, and from the runs of
results/runs.tar.xz, unpacked into out. A config's best rate has the lowest mean validation loss over the
tuning seeds; the grid is extended until it lies inside. Runs go to out/answer, those of another recipe beside
it, to out/answer-1600-steps and the like. Another plan has two items, its grid and its answer's seeds; its
runs go to out and the name of its folder.
"""

import argparse
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from analysis.plan import parse_plan
from analysis.runs import Run, group, kind_of, read_run
from analysis.tuning import Tuned, without_tuned
from configurator import ROOT, begin_program, fail, load, recipe
from training.rundir import find_runs

PLAN = Path('results/answer/plan.toml')
DENSE, TWELVE, SIX, TWO = (f'config/train_gpt2{end}.py' for end in ('', '_12comm', '_6comm', '_2comm'))
SMALL = dict(n_embd=32, n_head=8, max_iters=4, warmup_iters=1, eval_interval=2, eval_tokens=1024,
             eval_train_tokens=1024)
MOST_VALUES = 8  # in a grid: one that is extended further has no best value inside


def read_plan(file):
    """A plan as a dict. Ends the program, in one line, if it is none to run."""
    try:
        text = (ROOT / file).read_text(encoding='utf-8')
        plan = tomllib.loads(text)
    except (OSError, ValueError) as error:
        fail(f'--plan is {file}, which cannot be read: {getattr(error, "strerror", error)}')
    parse_plan(str(file), '', text)  # refuses wrong keys and values
    for key in 'recipe', 'configs', 'grid', 'tuned', 'tuning_seeds', 'answer_seeds':
        if not plan.get(key):
            fail(f'{file}: a plan to run says its {key}')
    if not re.fullmatch(r'--with [^-\s]\S*( --[a-z_0-9]+=[^=\s]+)*', plan['recipe']):
        fail(f"{file}: recipe is {plan['recipe']!r}, it must be as in '--with config/cpu.py --n_embd=256'")
    return plan


class Experiment:
    """One recipe, its runs in one folder, each config with a learning rate of its own."""

    def __init__(self, args, name='', **changes):
        """name: of the folder, after the plan's. changes: keys of the recipe that differ from the plan's"""
        plan = read_plan(args.plan)
        self.configs, self.seeds = plan['configs'], plan['answer_seeds'][:1 if args.small else None]
        self.three = self.seeds[:3]
        self.tuned = Tuned(plan['tuned'], tuple(plan['tuning_seeds'][:1 if args.small else None]))
        self.grid, self.jobs = plan['grid'], args.jobs
        folder = args.plan.parent.name
        self.out = Path('out') / '-'.join([folder, *['small'] * args.small, *filter(None, [name])])
        with_, file, *flags = plan['recipe'].split()
        self.withs = [with_, file]
        self.keys = dict(flag.removeprefix('--').split('=') for flag in flags) | dict(plan=args.plan)
        self.keys |= dict(tp_size=plan['tp_size']) if 'tp_size' in plan else {}
        self.keys |= changes | (dict(device='cuda') if args.gpu else {})
        self.keys |= {key: SMALL[key] for key in SMALL if args.small}
        if 'min_lr' in self.keys:
            self.tuned = self.tuned._replace(fixed=frozenset({float(self.keys['min_lr'])}))

    def sweep(self, configs, seeds, rates, *more, **keys):
        """
        Train these configs at these rates, or values of another tuned key, and no dense control besides. Ends
        the program if a run fails.
        """
        keys = self.keys | keys | dict(seed=','.join(map(str, seeds)),
                                       **{self.tuned.key: ','.join(f'{rate:.12g}' for rate in rates)})
        words = [*configs, *self.withs, *(f'--{key}={value}' for key, value in keys.items()), *more,
                 '--without_dense', f'--jobs={self.jobs}', f'--out={self.out}']
        print('$ python sweep.py', *words, flush=True)
        status = subprocess.run([sys.executable, 'sweep.py', *words]).returncode
        if status:
            sys.exit(status)

    def tunings(self):
        """{config file: its Tuning} over the runs of this recipe and the tuning seeds that have ended."""
        folders, _ = find_runs([self.out])
        wanted = {file: self.as_run(file) for file in self.configs}
        ours = without_tuned(recipe(wanted[self.configs[0]].config), self.tuned)
        runs = [run for run in map(read_run, folders) if run.info
                and run.config['seed'] in self.tuned.tuning_seeds
                and without_tuned(recipe(run.config), self.tuned) == ours]
        rows = group([run for run in runs if not run.trouble], tuned=self.tuned,
                     diverged=[run for run in runs if run.diverged])
        found = {kind_of(row.first): row.tuning for row in rows}
        kinds = {file: kind_of(run) for file, run in wanted.items()}
        for file, kind in kinds.items():
            if kind not in found or found[kind].best is None:
                fail(f'{file} has diverged at each {self.tuned.key} of the grid, which needs other values')
        return {file: found[kind] for file, kind in kinds.items()}

    def as_run(self, file):
        keys = [f'--{key}={value}' for key, value in self.keys.items()]
        control = ['--tp_size=1'] if load([file]).tp_size == 1 else []
        return Run(None, dict(config=vars(load([file, self.withs[1], *keys, *control]))), {}, {})

    def tune(self):
        """{config file: its best rate}. Trains the grid, and more of it until each best rate lies inside."""
        self.sweep(self.configs, self.tuned.tuning_seeds, self.grid)
        while True:
            tunings = self.tunings()
            open_ = {file: tuning.missing for file, tuning in tunings.items()
                     if tuning.missing and len(tuning.means) < MOST_VALUES}
            if not open_:
                best = {file: tuning.best for file, tuning in tunings.items()}
                print('best rates:', ', '.join(f'{file} {rate:g}' for file, rate in best.items()), flush=True)
                return best
            for rate in sorted({rate for rates in open_.values() for rate in rates}):
                self.sweep([file for file in open_ if rate in open_[file]], self.tuned.tuning_seeds, [rate])

    def answer(self, best, seeds, *more, **keys):
        """Train each config of {config file: rate} on these seeds, those of one rate together."""
        for rate in sorted(set(best.values())):
            self.sweep([file for file in best if best[file] == rate], seeds, [rate], *more, **keys)


# the items: each a function of the arguments and of {config file: best rate} at width 256


def seeds(args, best):
    """2. Each config at its best rate. With 2 communications a CPU stops at three seeds."""
    base = Experiment(args)
    base.answer(best, base.three)
    base.answer({file: best[file] for file in best if args.gpu or file != TWO}, base.seeds)


def floor(args, best):
    """3. The dense control with perturbed weights: the noise floor."""
    base = Experiment(args)
    base.answer({DENSE: best[DENSE]}, base.seeds if args.gpu else base.three, '--floor')


def tokens(args, best):
    """4. Four times the tokens; on a GPU each config at its best rate there, which lies lower."""
    longer = Experiment(args, '1600-steps', max_iters=1600)
    if args.gpu:
        longer.answer(longer.tune(), longer.seeds)
    else:
        longer.answer({file: best[file] for file in (DENSE, TWELVE)}, longer.seeds[:2])


def layer_0(args, best):
    """5. What layer 0 does: SPD there alone, a sync there alone, a larger embedding."""
    base = Experiment(args)
    few = base.seeds if args.gpu else base.seeds[:2]
    for file in 'config/rivals/train_gpt2_23comm_spd_first.py', 'config/rivals/train_gpt2_3comm_sync_0.py':
        base.answer({file: best[TWELVE]}, few)
    base.answer({'config/rivals/train_gpt2_embed_4.py': best[DENSE]}, few)
    base.answer({TWELVE: best[TWELVE]}, few, embed_scale=4)


def ranks(args, best):
    """6. Four ranks, at the best rate and half of it: the tuning seeds choose, three others are judged."""
    base = Experiment(args)
    for file in TWELVE, SIX, TWO:
        base.sweep([file], [*base.tuned.tuning_seeds, *base.three], [best[file], best[file] / 2], tp_size=4)


def rivals(args, best):
    """7. All of config/rivals, placements too, at the best rate of 12 communications and half, as in 6."""
    base = Experiment(args)
    files = sorted(map(str, Path('config/rivals').glob('*.py')))
    base.sweep(files, [*base.tuned.tuning_seeds, *base.three], [best[TWELVE], best[TWELVE] / 2])


def widths(args, best):
    """8. Widths 128 and 512 at the same head size, each config at its best rate there."""
    for width, heads in (128, 4), (512, 16):
        other = Experiment(args, f'width-{width}', n_embd=width, n_head=heads)
        other.answer(other.tune(), other.three)


def english(args, best):
    """9. Bytes of English, of which hardly one is seen twice."""
    if args.english is None and not Path('data/english/meta.json').exists():
        return print('9 is left out: it needs --english', flush=True)
    if not Path('data/english/meta.json').exists():
        status = subprocess.run([sys.executable, 'data/text/prepare.py', f'--input={args.english}',
                                 '--tokenizer=byte', '--out=data/english']).returncode
        if status:
            sys.exit(status)
    other = Experiment(args, 'english', dataset='english')
    other.answer(other.tune(), other.three)


ON_A_CPU = [seeds, floor, tokens, layer_0]
MORE = [ranks, rivals, widths, english]


def main():
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--gpu', action='store_true', help='on a GPU: all items, and more seeds')
    parser.add_argument('--small', action='store_true', help='all items, of few steps and a small width')
    parser.add_argument('--jobs', type=int, default=1, help='runs at a time; default: 1')
    parser.add_argument('--plan', type=Path, metavar='FILE', default=ROOT / PLAN,
                        help=f'default: {PLAN}')
    parser.add_argument('--english', type=Path, metavar='FILE', help='English text, for item 9')
    parser.error = lambda message: fail(f'{message}; see python results/answer/run.py --help')
    args = parser.parse_args()
    if args.english and not args.english.is_file():
        fail(f'--english is {args.english}, which is not a file')
    args.plan = Path(os.path.relpath(args.plan.resolve(), ROOT))
    args.english = args.english and args.english.resolve()
    os.chdir(ROOT)  # configs are named from there
    if not args.plan.parent.name:
        fail(f"--plan is {args.plan}, it must lie in a folder of its own, whose name its runs' folder gets")
    if args.plan != PLAN and (args.gpu or args.small or args.english):
        fail(f'--gpu, --small and --english are for the items of {PLAN}, --plan is {args.plan}')
    base = Experiment(args)
    best = base.tune()
    if args.plan != PLAN:
        base.answer(best, base.seeds)
    else:
        for item in [*ON_A_CPU, *MORE] if args.gpu or args.small else ON_A_CPU:
            print(item.__doc__, flush=True)
            item(args, best)
    print(f'compare: python compare.py {base.out}' + ' --tuning_seeds=1' * args.small)


if __name__ == '__main__':
    begin_program()
    main()
