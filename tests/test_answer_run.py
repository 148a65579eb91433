"""
results/answer/run.py: the grid goes on until each config's best value lies inside, then comes the answer.
"""

import math
import sys
from types import SimpleNamespace

import pytest

from configurator import ROOT, load
from tests.written_runs import write_run

sys.path.insert(0, str(ROOT / 'results/answer'))
import run as script

DENSE, TWELVE = 'config/train_gpt2.py', 'config/train_gpt2_12comm.py'
PLAN = """
tuned = 'learning_rate'
tuning_seeds = [1]
answer_seeds = [2, 3]
configs = ['config/train_gpt2.py', 'config/train_gpt2_12comm.py']
grid = [1e-3, 2e-3]
recipe = '--with config/cpu.py --max_iters=20'
"""


@pytest.fixture
def swept(tmp_path, monkeypatch):
    """The (files, seeds, rates) of each sweep, which writes runs that are best at 8e-3, dense at 2e-3."""
    found = []

    def sweep(self, files, seeds, rates, *more, **keys):
        found.append(([*files], [*seeds], [*rates]))
        for file in files:
            for rate in rates:
                config = vars(load([file, 'config/cpu.py', f'--learning_rate={rate:g}', '--max_iters=20']))
                loss = 2 + abs(math.log(rate / (2e-3 if file == DENSE else 8e-3)))
                name = f'{config["wandb_run_name"]}-{rate:g}'
                del config['seed'], config['out_dir']
                write_run(tmp_path / 'runs', name, dict.fromkeys(seeds, loss), **config)

    monkeypatch.setattr(script.Experiment, 'sweep', sweep)
    return found


def test_configs_are_tuned_together_until_the_best_lies_inside_and_then_judged_on_other_seeds(
        tmp_path, monkeypatch, swept):
    other = dict(learning_rate=1e-3, min_lr=1e-4, max_iters=30)  # of another recipe, and best elsewhere
    write_run(tmp_path / 'runs', 'other', {1: 0.1}, ['spd'] * 12, 2, **other)
    (tmp_path / 'plan.toml').write_text(PLAN)
    args = SimpleNamespace(plan=tmp_path / 'plan.toml', jobs=2, gpu=False, small=False)
    experiment = script.Experiment(args)
    experiment.out = tmp_path / 'runs'
    best = experiment.tune()
    assert best == {DENSE: 2e-3, TWELVE: 8e-3}
    both = [DENSE, TWELVE]
    assert swept == [(both, [1], [1e-3, 2e-3]), (both, [1], [4e-3]), ([TWELVE], [1], [8e-3]),
                     ([TWELVE], [1], [0.016])]
    swept.clear()
    experiment.answer(best, experiment.seeds)
    assert swept == [([DENSE], [2, 3], [2e-3]), ([TWELVE], [2, 3], [8e-3])]


@pytest.mark.parametrize('text, said', [
    (None, 'which cannot be read'),
    ('grid = [', 'which cannot be read'),
    (PLAN.replace('grid', 'gird'), 'a plan has no key gird; grid?'),
    (PLAN.replace('grid = [1e-3, 2e-3]\n', ''), 'a plan to run says its grid'),
    (PLAN.replace('[1e-3, 2e-3]', '[]'), 'a plan to run says its grid'),
    (PLAN.replace('config/cpu.py --max_iters=20', ''), "recipe is '--with '"),
    (PLAN.replace('--with config/cpu.py', 'config/cpu.py'), "recipe is 'config/cpu.py --max_iters=20'")])
def test_what_is_no_plan_to_run_is_refused_in_one_line(tmp_path, text, said):
    file = tmp_path / 'plan.toml'
    if text is not None:
        file.write_text(text)
    with pytest.raises(SystemExit) as refusal:
        script.read_plan(file)
    line = str(refusal.value)
    assert str(file) in line and said in line and '\n' not in line
