"""
sweep.py: what it plans, how it names and recognizes runs, and what it says that they will take.

    python -m pytest tests/test_sweep_plan.py
"""

import os
import subprocess
import sys
import time

import pytest
import torch

import sweep
from analysis.verdicts import seeds_to_detect, seeds_to_show
from configurator import load
from model import GPT
from speed import forecast
from toy_sweeps import (
    CPU,
    DENSE,
    EIGHT,
    TWELVE,
    make_steps,
    names,
    new_sweep,
    planned,
    start,
    write_info,
    write_metrics,
)
from variants import gpt_config


@pytest.fixture(autouse=True)
def in_the_project(monkeypatch):
    monkeypatch.chdir(sweep.ROOT)
    monkeypatch.delenv('CUDA_VISIBLE_DEVICES', raising=False)


# the plan


def test_a_grid_has_each_run_once_and_dense_once_per_seed(tmp_path):
    runs = planned(tmp_path, '--tp_size=2,4', '--seed=1,2', files=(TWELVE, EIGHT))
    assert names(runs) == [
        'cpu-seed1', '12comm-cpu-seed1-tp2', '8comm-cpu-seed1-tp2',
        '12comm-cpu-seed1-tp4', '8comm-cpu-seed1-tp4',
        'cpu-seed2', '12comm-cpu-seed2-tp2', '8comm-cpu-seed2-tp2',
        '12comm-cpu-seed2-tp4', '8comm-cpu-seed2-tp4']
    for run in runs:
        size = 1 if 'comm' not in run.name else int(run.name[-1])
        assert run.config.tp_size == size and f'seed{run.config.seed}' in run.name
        assert run.out_dir == tmp_path / run.name


def test_the_dense_control_takes_no_flag_about_ranks_blocks_or_merge(tmp_path):
    dense, *others = planned(tmp_path, '--tp_size=2,4', '--merge=sum,mean', '--block_types=spd')
    assert names([dense]) == ['cpu'] and len(others) == 4
    assert dense.config == sweep.load([DENSE, CPU, f'--out_dir={dense.out_dir}'])
    assert {(run.config.tp_size, run.config.merge) for run in others} == {
        (size, merge) for size in (2, 4) for merge in ('sum', 'mean')}
    assert {run.name for run in others} > {'gpt2-12comm-cpu-block_types=spd_x_12-merge=mean-tp4'}


def test_a_dense_control_given_by_name_is_not_added_again(tmp_path):
    assert names(planned(tmp_path, '--tp_size=4', files=(TWELVE, DENSE))) == ['cpu', '12comm-cpu']


def test_a_file_composed_after_it_leaves_the_control_dense(tmp_path):
    (tmp_path / 'wide.py').write_text('tp_size = 8\n')
    runs = sweep.plan([TWELVE], [CPU, str(tmp_path / 'wide.py')], {}, tmp_path)
    assert [run.config.tp_size for run in runs] == [1, 8]


def test_each_recipe_gets_its_own_control(tmp_path):
    (tmp_path / 'small.py').write_text('n_layer = 4\nwandb_run_name = "small"\ntp_size = 1\n')
    (tmp_path / 'small_tp.py').write_text('n_layer = 4\nwandb_run_name = "small-tp"\ntp_size = 2\n')
    files = [str(tmp_path / name) for name in ('small_tp.py', 'small.py')]
    assert [run.name for run in sweep.plan([TWELVE, *files], [], {}, tmp_path)] == [
        'gpt2-124M', 'small', 'gpt2-124M-12comm', 'small-tp']
    with pytest.raises(SystemExit, match='small_tp.py: no config has tp_size 1 and the same recipe'):
        sweep.plan(files[:1], [], {}, tmp_path)


def test_a_run_is_named_after_what_varies(tmp_path):
    guide = sweep.plan([str(sweep.ROOT / file) for file in sweep.RUNS], [],
                       sweep.parse_grid(['--max_iters=20000']), tmp_path)
    assert names(guide) == ['124M', *(f'{n}comm' for n in (24, 18, 16, 12, 8, 6, 2))]
    for run, name in zip(guide, ['', *(f'_{n}comm' for n in (24, 18, 16, 12, 8, 6, 2))]):
        theirs = load([str(sweep.ROOT / f'config/train_gpt2{name}.py'), '--max_iters=20000'])
        assert run.name == theirs.wandb_run_name
        assert not sweep.differences(vars(theirs), vars(run.config))
    assert names(planned(tmp_path, '--seed=1,2,3', withs=()))[1] == '12comm-seed1'
    assert names(planned(tmp_path, '--seed=3', '--learning_rate=1e-3')) == ['cpu', '12comm-cpu']
    assert names(planned(tmp_path, '--learning_rate=1e-3,2e-3', '--seed=3'))[1] \
        == '12comm-cpu-learning_rate=0.001'
    assert 'cpu-compile=True' in names(planned(tmp_path, '--compile=False,True'))
    # but a file's own name speaks of its blocks
    assert names(planned(tmp_path, '--block_types=tp,spd'))[1] == '12comm-cpu-block_types=tp_spd_x_6'


def test_a_name_that_another_value_has_taken_gets_this_ones(tmp_path):
    dense, twelve = planned(tmp_path, '--learning_rate=1e-3')
    for run in dense, twelve:
        write_info(run, 'finished', 400)
    assert names(planned(tmp_path, '--learning_rate=2e-3')) == [
        'cpu-learning_rate=0.002', '12comm-cpu-learning_rate=0.002']
    assert names(planned(tmp_path, '--learning_rate=1e-3')) == ['cpu', '12comm-cpu']


def test_a_name_that_is_taken_twice_over_gets_the_keys_that_tell_it_from_both(tmp_path):
    for flags in ['--learning_rate=1e-3', '--seed=5'], ['--learning_rate=2e-3']:
        for run in planned(tmp_path, *flags):
            write_info(run, 'finished', 400)
    assert names(planned(tmp_path, '--learning_rate=2e-3', '--seed=5')) == [
        'cpu-learning_rate=0.002-seed5', '12comm-cpu-learning_rate=0.002-seed5']


def test_dense_controls_are_left_out_unless_they_are_named(tmp_path):
    assert names(planned(tmp_path, '--seed=1,2', without_dense=True)) == [
        '12comm-cpu-seed1', '12comm-cpu-seed2']
    assert names(planned(tmp_path, files=(DENSE, TWELVE), without_dense=True)) == ['cpu', '12comm-cpu']


def test_a_long_name_is_cut_and_stays_unique(tmp_path):
    for last, blocks in ('a', 'spd'), ('b', 'parallel'), ('dense', 'tp'):
        (tmp_path / f'{last}.py').write_text(f'wandb_run_name = "{"é" * 120}{last}"\nn_layer = 2\n'
                                             f'block_types = ["{blocks}"] * 2\n'
                                             f'tp_size = {1 if blocks == "tp" else 2}\n')
    runs = planned(tmp_path / 'out', '--seed=1,2', files=(str(tmp_path / 'a.py'), str(tmp_path / 'b.py'),
                                                          str(tmp_path / 'dense.py')), floor=True)
    assert len({run.out_dir for run in runs}) == len(runs) == 8
    for run in runs:
        assert 190 < len(os.fsencode(run.name)) <= 200 and run.name.startswith('é' * 80)
        assert run.name.endswith('-perturbed') == (run.config.perturb > 0)
        run.out_dir.mkdir(parents=True)
    assert sweep.fit('x' * 200) == 'x' * 200


def test_two_runs_never_share_a_folder(tmp_path):
    with pytest.raises(SystemExit, match='are the same run'):
        planned(tmp_path, '--block_types=tp,spd', files=(TWELVE, EIGHT))
    with pytest.raises(SystemExit, match='would share'):
        planned(tmp_path, '--learning_rate=1e-3,0.001')


def test_a_plan_file_is_passed_on_and_not_in_names(tmp_path):
    (tmp_path / 'plan.toml').write_text('margin = 0.02\n')
    runs = planned(tmp_path, f'--plan={tmp_path / "plan.toml"}', '--seed=1,2')
    assert names(runs) == ['cpu-seed1', '12comm-cpu-seed1', 'cpu-seed2', '12comm-cpu-seed2']
    assert all(f'--plan={tmp_path / "plan.toml"}' in run.args for run in runs)
    with pytest.raises(SystemExit, match='plan is nowhere.toml, which is not a file') as end:
        sweep.main([TWELVE, '--plan=nowhere.toml', f'--out={tmp_path / "out"}'])
    assert '\n' not in end.value.code


def test_floor_adds_a_perturbed_twin_of_each_control(tmp_path):
    runs = planned(tmp_path, '--seed=1,2', '--tp_size=2,4', floor=True)
    assert names(runs) == ['cpu-seed1', 'cpu-seed1-perturbed', '12comm-cpu-seed1-tp2', '12comm-cpu-seed1-tp4',
                           'cpu-seed2', 'cpu-seed2-perturbed', '12comm-cpu-seed2-tp2', '12comm-cpu-seed2-tp4']
    dense, twin = runs[:2]
    assert sweep.differences(vars(dense.config), vars(twin.config)) == dict(perturb=(0.0, 0.001))
    assert twin.config.tp_size == 1 and dense.dense and not twin.dense


def test_a_perturbed_twin_is_no_control(tmp_path):
    (tmp_path / 'twin.py').write_text('tp_size = 1\nperturb = 0.001\nwandb_run_name = "twin"\n')
    runs = planned(tmp_path, files=(str(tmp_path / 'twin.py'), TWELVE))
    assert [(run.name, run.dense) for run in runs] == [
        ('gpt2-cpu', True), ('twin-cpu', False), ('gpt2-12comm-cpu', False)]


def test_help_says_what_the_flags_are_for(capsys):
    with pytest.raises(SystemExit) as end:
        sweep.main(['--help'])
    words = ' '.join(capsys.readouterr().out.split())
    assert not end.value.code
    assert 'From a second terminal, the command of a running sweep and --dry_run show' in words
    for flag in 'with', 'out', 'jobs', 'floor', 'detect', 'dry_run', 'gpus', 'gpu':
        assert f' --{flag} ' in words


# folders that hold a run of the plan already


def leave(out, name, args, **info):
    """Leave a folder as train.py would, if it had been given these arguments. Returns its path."""
    config = load([*args, f'--out_dir={out / name}', f'--wandb_run_name={name}'])
    run = sweep.Run(args, config, dense=False)
    write_info(run, **dict(state='resumable', iter=7) | info)
    (run.out_dir / 'ckpt.pt').touch()
    return run.out_dir


def test_a_run_of_the_same_config_is_continued_in_its_folder(tmp_path, monkeypatch):
    older = leave(tmp_path, 'gpt2-124M-12comm-cpu-learning_rate=0.001-n_embd=256-seed1',
                  [TWELVE, CPU, '--learning_rate=1e-3', '--n_embd=256', '--seed=1'])
    own = leave(tmp_path, 'mine', [DENSE, CPU, '--learning_rate=1e-3', '--n_embd=256', '--seed=2',
                                   '--eval_interval=7'], state='finished', iter=400)
    (tmp_path / 'broken').mkdir()
    (tmp_path / 'broken/run.json').write_text('{"state":')
    runs = planned(tmp_path, '--learning_rate=1e-3', '--n_embd=256', '--seed=1,2')
    assert names(runs) == ['cpu-seed1', older.name.removeprefix('gpt2-124M-'), 'mine', '12comm-cpu-seed2']
    assert [run.out_dir for run in runs][1:3] == [older, own]
    assert [sweep.state_of(run) for run in runs] == ['new', 'resume', 'finished', 'new']
    resumed = load(sweep.command(runs[1], True, sweep.Share([], []))[2:])
    assert (resumed.wandb_run_name, resumed.out_dir) == (older.name, str(older))

    # its own folder comes first
    ours = leave(tmp_path, 'gpt2-12comm-cpu-seed1', runs[1].args[:-2])
    assert planned(tmp_path, '--learning_rate=1e-3', '--n_embd=256', '--seed=1,2')[1].out_dir == ours


def test_only_what_the_sweep_varies_keeps_equal_runs_apart(tmp_path):
    folder = leave(tmp_path, 'mine', [TWELVE, CPU, '--eval_interval=50'])
    assert planned(tmp_path)[1].out_dir == folder
    apart = planned(tmp_path, '--eval_interval=50,100')
    assert [run.out_dir == folder for run in apart] == [False, True, False, False]
    assert len({run.out_dir for run in apart}) == 4
    assert planned(tmp_path, '--seed=2')[1].out_dir != folder


@pytest.mark.parametrize('flags, words', [
    (['--seed', '1'], '--seed: a key for train.py is given as --key=value'),
    (['--seed=1', '--seed=2'], 'a list is --seed=1,2'),
    (['--tp_size=1,2'], 'the control is always trained'),
    (['--out_dir=elsewhere'], '--out says where'),
    (['--sede=1'], 'no key is called sede'),
    (['--learning_rate=1e-3,0.001'], 'would share'),
    (['--jobs=0'], '--jobs is 0, it must be at least 1'),
    (['--jobs=two'], "invalid int value: 'two'"),
    (['--detect=0'], '--detect is 0, it must be'),
    (['--detect=nan'], '--detect is nan, it must be'),
    (['--gpus=8'], '--gpus and --gpu go with --dry_run'),
    (['--dry_run', '--gpus=0'], '--gpus is 0, it must be at least 1'),
    (['--dry_run', '--gpu=H100', '--device=cpu'], '--gpu is H100, but device is cpu'),
    (['--dry_run', '--gpu=H100'], 'there is none here; --gpus=8'),
    (['--dry_run', '--gpu=GTX', '--gpus=1'], '--gpu is GTX, it must be one of H100 PCIe, H100,'),
])
def test_a_mistake_in_the_command_line_gets_one_line(tmp_path, monkeypatch, flags, words):
    monkeypatch.setattr(sweep, 'find_gpus', list)
    with pytest.raises(SystemExit) as end:
        sweep.main([TWELVE, f'--out={tmp_path / "out"}', *flags])
    assert words in str(end.value.code) and '\n' not in str(end.value.code)
    assert not (tmp_path / 'out').exists()


# the time left


def test_the_time_left_is_unknown_until_runs_of_the_size_have_made_steps(tmp_path, capsys):
    argv = [TWELVE, '--with', CPU, f'--out={tmp_path / "out"}', '--n_embd=64,128', '--dry_run']
    sweep.main(argv)
    assert 'time left: unknown until runs have made steps\n' in capsys.readouterr().out
    assert not (tmp_path / 'out').exists()

    small, other_small, large, _ = runs = planned(tmp_path, '--n_embd=64,128', '--max_iters=100')
    # a step has 16 windows of 64 tokens; the evaluation at the end reads 3072, at a third of their cost
    make_steps(small, 20, 1024)
    seconds = 80 * (1 + 1 / 100) + 100 * (1 + 1 / 100)
    assert new_sweep(runs).eta() == f'over {forecast.duration(seconds)}'
    assert new_sweep(runs, jobs=2).eta() == f'over {forecast.duration(101)}'
    make_steps(large, 20, 512)
    assert new_sweep(runs).eta() == forecast.duration(3 * seconds)


def test_the_time_left_follows_the_runs(tmp_path):
    dense, twelve = runs = planned(tmp_path, '--max_iters=100', '--eval_interval=100000')
    going = new_sweep(runs)
    assert going.eta() == 'unknown'
    make_steps(dense, 10, 1024)
    assert going.eta() == '0:03:10'
    make_steps(dense, 50, 2048)
    assert going.eta() == '0:01:15'
    make_steps(twelve, 50, 1024)  # from here on by its own speed
    assert going.eta() == '0:01:15'
    make_steps(twelve, 50, 512)
    assert going.eta() == '0:02:05'


def test_the_speed_of_other_devices_or_processes_tells_nothing(tmp_path):
    runs = planned(tmp_path)
    make_steps(runs[0], 10, 1024, processes=8)
    assert new_sweep(runs).eta() == 'unknown'
    other = planned(tmp_path, '--device=cuda')
    make_steps(other[0], 10, 1024)
    assert new_sweep(runs).eta() == 'unknown' and new_sweep(other).eta() != 'unknown'


def test_progress_shows_done_left_and_loss(tmp_path):
    runs = planned(tmp_path, '--max_iters=100', '--eval_interval=100000')
    going = new_sweep(runs)
    going.jobs, going.waiting = [sweep.Job(runs[0], None, None, 0, 0, None)], runs[1:]
    assert going.progress() == '0 done, 2 left, ETA unknown | dense 0/100'
    make_steps(runs[0], 50, 1024)
    with open(runs[0].out_dir / 'metrics.jsonl', 'a') as metrics:
        metrics.write('{"iter": 60, "tr')
    assert going.progress() == '0 done, 2 left, ETA 0:02:30 | dense 50/100 train loss 3.0000'
    write_metrics(runs[0], dict(iter=50, train_loss=None))
    assert going.progress().endswith('dense 50/100 train loss not a number')


def test_the_speed_of_a_run_of_one_step_is_all_there_is(tmp_path):
    runs = planned(tmp_path, '--max_iters=1', '--eval_interval=100000', '--seed=1,2')
    make_steps(runs[0], 1, None)
    assert new_sweep(runs).eta() == 'unknown'
    write_info(runs[0], 'finished', 1, val_loss=2.0)
    assert new_sweep(runs).eta() == '0:51:12'  # 3 steps of 1024 tokens at the first line's speed, 1 a second


def test_a_damaged_metrics_line_costs_the_estimate_only(tmp_path):
    runs = planned(tmp_path)
    make_steps(runs[0], 10, 1024)
    with open(runs[0].out_dir / 'metrics.jsonl', 'a') as metrics:
        metrics.write('not json\nnot json\n')
    going = new_sweep(runs)
    going.jobs = [sweep.Job(runs[0], None, None, 0, 0, None)]
    assert going.progress().startswith('0 done, 3 left, ETA unknown | dense 0/400')


# a plan for machines that are not here


def test_dry_run_shows_how_each_run_stands_and_its_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sweep, 'find_cores', lambda: list(range(4)))
    argv = [TWELVE, EIGHT, '--with', CPU, f'--out={tmp_path / "o u t"}', '--seed=1,2', '--jobs', '2']
    runs = planned(tmp_path / 'o u t', '--seed=1,2', files=(TWELVE, EIGHT))
    write_info(runs[0], 'finished', 400, val_loss=2.0)
    make_steps(runs[1], 20, 1024)
    (runs[1].out_dir / 'ckpt.pt').touch()
    before = sorted(tmp_path.rglob('*'))
    sweep.main([*argv, '--dry_run'])
    out = capsys.readouterr().out
    assert sorted(tmp_path.rglob('*')) == before
    first, *lines = out.splitlines()
    assert first == '6 runs, 2 at a time, 4 cores, no GPU:'
    assert lines[:3] == [f'  finished, 400 steps: {runs[0].out_dir}',
                         f'  resume, at step 20 of 400 steps: {runs[1].out_dir}',
                         f'  new, 400 steps: {runs[2].out_dir}']
    commands = [line for line in lines if 'train.py ' in line]
    assert len(commands) == 5 and all('--init_from=auto' in line for line in commands)

    # pasted into a shell elsewhere, each does what the sweep would
    monkeypatch.setattr(sweep, 'find_cores', lambda: sorted(os.sched_getaffinity(0))[:1])
    interpreter = tmp_path / 'interpreter'
    interpreter.write_text(f'#!{sys.executable}\nimport os, sys\nthreads = os.environ["OMP_NUM_THREADS"]\n'
                           'print(os.getcwd(), os.sched_getaffinity(0), threads, *sys.argv[2:], sep="\\n")\n')
    interpreter.chmod(0o755)
    monkeypatch.setattr(sys, 'executable', str(interpreter))
    sweep.main([*argv, '--dry_run'])
    command = next(line for line in capsys.readouterr().out.splitlines() if 'train.py ' in line)
    shell = subprocess.run(['bash', '-c', command], cwd='/', capture_output=True, text=True, check=True)
    core = min(os.sched_getaffinity(0))
    assert shell.stdout.splitlines() == [str(sweep.ROOT), f'{{{core}}}', '1', *runs[1].args,
                                         '--init_from=auto']


def test_dry_run_shows_a_sweep_that_runs_in_another_terminal(tmp_path):
    go, argv = tmp_path / 'go', [TWELVE, '--with', CPU, f'--out={tmp_path / "out"}']
    script = (f'import fcntl\nlock = open(out_dir / "lock", "w")\nfcntl.flock(lock, fcntl.LOCK_EX)\n'
              f'note("running", iter=9, train_loss=3.0)\n(out_dir / "ready").touch()\n'
              f'while not os.path.exists({str(go)!r}): time.sleep(0.02)\nnote("finished")')
    running = start(tmp_path, argv, script, stdout=subprocess.DEVNULL)
    while not list(tmp_path.glob('out/*/ready')):
        time.sleep(0.02)
    looked = start(tmp_path, [*argv, '--dry_run'], stdout=subprocess.PIPE, text=True).communicate()[0]
    go.touch()
    assert 'running, at step 9 of 400 steps, by another process: ' in looked
    assert looked.count('new, 400 steps') == looked.count('train.py ') == 1
    assert running.wait() == 0


def test_a_plan_needs_no_gpu_no_data_and_no_torch(tmp_path):
    program = ('import sys, sweep\nsweep.main(sys.argv[1:])\n'
               'assert "torch" not in sys.modules and "numpy" not in sys.modules')
    argv = ['--max_iters=20000', '--dry_run', '--gpus=8', f'--out={tmp_path}', '--dataset=nowhere']
    out = subprocess.run([sys.executable, '-c', program, *argv], cwd=sweep.ROOT, check=True, text=True,
                         capture_output=True).stdout
    assert out.startswith('8 runs, 1 at a time, 8 GPUs:')
    assert out.count('--nproc_per_node=8') == out.count('CUDA_VISIBLE_DEVICES=0,1,2,3,4,5,6,7 ') == 8
    # 8 runs with 3 checkpoints of 124M parameters, of 12 bytes each
    assert 'disk: up to 35.8 GB more, at most 3 checkpoints a run of 1.5 GB; ' in out


def test_an_estimate_from_the_peak_of_a_gpu(tmp_path, capsys):
    keys = ['--max_iters=20000', '--eval_interval=20000']
    argv = [TWELVE, *keys, f'--out={tmp_path}', '--dry_run', '--gpus=8', '--gpu=H100']
    sweep.main(argv)
    # two runs; a token of an evaluation costs a third
    tokens = 20000 * (491520 + 2457600 / 3 / 20000)
    with torch.device('meta'):
        flops = GPT(gpt_config(vars(load([TWELVE])), 50304)).flops_per_token()
    seconds = 2 * tokens * flops / (8 * 0.4 * 989e12)
    out = capsys.readouterr().out
    assert f'time left: {forecast.duration(seconds)}, {seconds * 8 / 3600:.1f} GPU-hours, an estimate' in out
    assert '40% of the peak of H100, 989 TFLOP/s' in out

    # what is measured comes first
    runs = planned(tmp_path, *keys, withs=())
    write_metrics(runs[0], dict(iter=0, val_loss=5, val_tokens=0),
                  *(dict(iter=step, train_loss=3, tokens_per_sec=1e6) for step in (1, 2)))
    write_info(runs[0], 'finished', 20000, processes=8, val_loss=3.3)
    sweep.main(argv)
    seconds = 20000 * 491520 / 1e6
    out = capsys.readouterr().out
    cost = f'{forecast.duration(seconds)}, {seconds * 8 / 3600:.1f} GPU-hours'
    assert f'time left: {cost}, at the speed of these runs so far' in out


@pytest.mark.parametrize('bias', [False, True])
def test_parameters_and_disk(tmp_path, bias):
    run = planned(tmp_path, f'--bias={bias}', '--keep_checkpoints=2', '--n_layer=3', '--block_types=spd',
                  '--dataset=nowhere', '--n_embd=32', '--block_size=16')[1]
    with torch.device('meta'):
        model = GPT(gpt_config(vars(run.config), forecast.VOCAB_SIZE))
    size = 12 * model.num_params()
    assert forecast.disk_left(run) == 5 * size
    run.out_dir.mkdir()
    (run.out_dir / 'ckpt.pt').write_bytes(b'x' * 1000)
    os.link(run.out_dir / 'ckpt.pt', run.out_dir / 'ckpt-best.pt')
    assert forecast.disk_left(run) == 5 * size - 1000


# how many seeds


def seeds_said(runs, difference=0.02, **speeds):
    return forecast.describe_seeds(runs, difference, forecast.Forecast(**speeds))


def test_the_seeds_of_the_guides_plan(tmp_path):
    runs = sweep.plan([str(sweep.ROOT / file) for file in sweep.RUNS], [], {'seed': ['1', '2']}, tmp_path)
    first, detect, show = seeds_said(runs)
    assert first == ('a paired difference has standard deviation 0.016, as seen at other widths, until these '
                     'runs show their own; this plan has 2 seeds')
    # six configs: 24 communications compute the control's function
    assert detect == '  to detect 0.02 with 80% power (Dunnett over 6): 8 seeds, unknown'
    assert show == '  to show as good within 0.02 with 90% power, at no difference: 6 seeds, unknown'
    assert ': 31 seeds' in seeds_said(runs, 0.01)[1]


@pytest.mark.parametrize('width, sd', [(64, 0.013), (128, 0.024), (256, 0.015), (512, 0.016)])
def test_the_spread_that_is_assumed(tmp_path, width, sd):
    first = seeds_said(planned(tmp_path, f'--n_embd={width}'))[0]
    assert f'standard deviation {sd}, as seen at' in first


def test_seeds_rest_on_the_spread_and_pace_of_the_runs(tmp_path):
    runs = planned(tmp_path, '--seed=1,2', '--max_iters=100', '--eval_interval=100000')
    for run, loss in zip(runs, (3.0, 2.9, 3.1, 3.1)):  # differences -0.1 and 0: standard deviation 0.0707
        make_steps(run, 10, 1024)
        write_info(run, 'finished', 100, val_loss=loss)
    going = new_sweep(runs)  # which reads their speed: 100 s a run
    first, detect, show = forecast.describe_seeds(runs, 0.02, going.forecast)
    assert 'standard deviation 0.0707, of the finished runs, 1 degrees of freedom' in first
    for line, seeds in ((detect, seeds_to_detect(0.02, 0.1 / 2**0.5, 1)),
                        (show, seeds_to_show(0.02, 0.1 / 2**0.5, 1))):
        cost = f'{forecast.duration(200 * seeds)}, {seeds / 18:.1f} core-hours'
        assert line.endswith(f': {seeds} seeds, {cost}')


def test_detect_is_said_before_the_sweep(tmp_path, monkeypatch, capsys):
    argv = [TWELVE, '--with', CPU, f'--out={tmp_path}', '--n_embd=64,128', '--detect=0.02']
    monkeypatch.setattr(sweep.Sweep, 'train', lambda self: print('training'))
    with pytest.raises(SystemExit):
        sweep.main(argv)
    out = capsys.readouterr().out
    assert out.index('n_embd 64: a paired') < out.index('n_embd 128: a paired') < out.index('training')
    sweep.main([*argv, '--dry_run'])
    assert 'training' not in capsys.readouterr().out
