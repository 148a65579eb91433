"""
bench.py --shard: each config's step with its network and without, the links, and the cost model beside them.
"""

import statistics

import torch
import torch.distributed as dist

from configurator import HIDING, communications, fail
from speed import costmodel
from speed.candidates import Candidate, print_results, result, take_turns
from training.distributed import World, connect, find_world
from variants import Flight


def keep_slowest(candidates, world, name='seconds'):
    """Replace the seconds of every step by those of the slowest process. Collective."""
    seconds = torch.tensor([getattr(candidate, name) for candidate in candidates], dtype=torch.float64,
                           device=world.device)
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    for candidate, row in zip(candidates, seconds.tolist()):
        setattr(candidate, name, row)


class WaitingCandidate(Candidate):
    """A candidate whose hidden all-reduces are waited for at once."""

    def step(self):
        with Flight.waited_for():
            super().step()


def sharded_world(configs):
    """
    The World of these processes, not yet joined. Refuses a lone process, and a config of another tp_size than
    the first's: it would be measured at the first's.
    """
    world = find_world(configs[0])
    for config in configs:
        if config.tp_size != configs[0].tp_size:
            config.refuse(f'tp_size is {config.tp_size}, but {configs[0].tp_size} in the control, '
                          f'{configs[0].wandb_run_name}')
    if world.processes == 1:
        fail('--shard needs more processes: torchrun --standalone --nproc_per_node=2 bench.py --shard ...')
    return world


def measure_links(world, args):
    """
    (the Link of each of 'tp', 'ddp' and 'all' that is there, measured; the same for --gbit, None without it).
    Collective.
    """
    groups = dict(tp=world.tp and world.tp.group, ddp=world.ddp_group, all=dist.group.WORLD)
    groups = {axis: group for axis, group in groups.items() if group is not None}
    sizes = {axis: dist.get_world_size(group) for axis, group in groups.items()}
    links, measured = {}, {}
    for axis, n in sizes.items():
        if n not in measured or n < world.processes:  # a group of all processes has the link of all
            measured[n] = costmodel.fit(costmodel.sweep(groups[axis], world.device))
        links[axis] = measured[n]
    given = args.gbit and {
        axis: costmodel.ring(n, args.latency_us * 1e-6, args.gbit * 1e9 / 8) for axis, n in sizes.items()}
    return links, given


def lone_world(world):
    """This process without the others: the same tp rank, in a process group of its own. Collective."""
    groups = [dist.new_group([process]) for process in range(world.processes)]
    return World(0, 1, [[0]], world.device, tp=world.tp and world.tp._replace(group=groups[world.process]))


def hides(config):
    """Whether some of its all-reduces are on their way while a sublayer computes, unless it is compiled."""
    return bool(HIDING & set(config.block_types))


def sharded_result(networked, alone, control, links, given):
    """result() and the time in collectives, what was all-reduced, and what the cost model predicts."""
    config, row = networked.config, result(networked, control)
    compute = statistics.median(alone.seconds)
    behind = costmodel.behind_sublayer(config.n_layer, networked.windows // config.batch_size)
    messages = costmodel.observe_step(networked.net.raw_model, networked.step,
                                      {} if config.compile else behind)
    return dict(
        row, communications=communications(config.block_types, config.tp_size),
        all_reduces=costmodel.by_kind(messages), compute_seconds=compute,
        collectives_share=1 - compute / row['step_seconds'],
        predicted_seconds=costmodel.predict(compute, messages, links),
        predicted_on_given_link=given and costmodel.predict(compute, messages, given))


def print_predictions(results, args):
    """Print measured and predicted steps, in milliseconds and as ratios to TP blocks alone."""
    given = f'predicted at {args.gbit:g} Gbit/s, {args.latency_us:g} us' if args.gbit else ''
    print(f'{"config":28} {"comms":>5} {"compute":>9} {"in collectives":>15} {"measured":>9} '
          f'{"predicted":>10} {"ratio":>6} {"predicted":>10}  {given}')
    control = results[0]
    for row in results:
        print(f'{row["name"]:28} {row["communications"]:5} {row["compute_seconds"] * 1e3:9.1f} '
              f'{row["collectives_share"]:15.1%} {row["step_seconds"] * 1e3:9.1f} '
              f'{row["predicted_seconds"] * 1e3:10.1f} {row["ratio"]:6.3f} '
              f'{row["predicted_seconds"] / control["predicted_seconds"]:10.3f}', end='')
        if args.gbit:
            seconds = row['predicted_on_given_link']
            print(f'  {seconds * 1e3:10.1f} {seconds / control["predicted_on_given_link"]:10.3f}', end='')
        print()


def bench_sharded(configs, args):
    """
    Print what the configs' steps took over these processes, TP blocks alone first, and what was predicted.

    Returns it as a dict on rank 0, None on the others.
    """
    world = connect(configs[0], sharded_world(configs))
    links, given = measure_links(world, args)
    lone, pairs = lone_world(world), []
    for config in configs:
        pairs.append([Candidate(config, where, args.vocab_size, args.micro_steps) for where in (world, lone)])
        if hides(config) and not config.compile:
            pairs.append([WaitingCandidate(config, world, args.vocab_size, args.micro_steps), pairs[-1][1]])
            pairs[-1][0].name += ', waited for'
    candidates = list(dict.fromkeys(candidate for pair in pairs for candidate in pair))
    take_turns(candidates, args.rounds)
    keep_slowest(candidates, world)
    results = [sharded_result(*pair, pairs[0][0], links, given) for pair in pairs]
    report = None
    if world.rank0:
        print_results(results, configs[0], world, 'TP', args)
        print('links:', '; '.join(f'{axis} {link}' for axis, link in links.items()))
        print_predictions(results, args)
        costmodel.print_messages([(row['name'], row['all_reduces']) for row in results])
        model = pairs[0][0].net.raw_model
        wte = model.transformer.wte.weight
        print(f'wte is replicated: {wte.nbytes / 1e6:,.4g} MB of the {4 * model.num_params() / 1e6:,.4g} MB '
              'of parameters that a process holds')
        report = dict(processes=world.processes, backend=dist.get_backend(), wte_bytes=wte.nbytes,
                      links={axis: link._asdict() for axis, link in links.items()}, configs=results)
    dist.destroy_process_group()
    return report
