"""
What the diagnostics of a comparison's runs say (training/diagnostics.py has their definitions), in words.

They are those of the last evaluation. What goes along with a difference in loss need not be its cause.
"""

import math
import statistics


def diagnosed(row):
    """{measure: its list over sublayers, or its number}, means over the runs; {} if none were logged."""
    logged = [run.last['diagnostics'] for run in row.runs.values() if 'diagnostics' in run.last]
    found = {}
    for key in logged[0] if logged else ():
        values = [one[key] for one in logged]
        found[key] = list(map(mean, zip(*values))) if isinstance(values[0], list) else mean(values)
    return found


def mean(values):
    return None if None in values else statistics.mean(values)


def largest_dispersion(run):
    return max((value for value in run.last.get('diagnostics', {}).get('dispersion', ())
                if value is not None), default=None)


def place(i, values):
    """A sublayer's name in a sentence; values: a list over all of them."""
    return 'the end' if i == len(values) - 1 else f'the {("attention", "MLP")[i % 2]} of layer {i // 2}'


def inside(found):
    """What separates the configs, as lines: streams, ranks, one rank alone, gradients."""
    every = {row: own for row in found.rows if (own := diagnosed(row))}
    apart, alike, alone, fading, first = [], [], [], [], []
    for row, own in every.items():
        grads = own['grad'][:-1]  # the last is the embeddings'
        norms = [math.hypot(*pair) for pair in zip(grads[::2], grads[1::2])]  # of each layer
        low, high = min(norms), max(norms)
        fading.append(f'{row.title}: {low / high:.2f} in layer {norms.index(low)} of that in layer '
                      f'{norms.index(high)}')
        if own['attention_over_embedding'] is not None:
            first.append(f'{row.title}: {own["attention_over_embedding"]:.2f}')
        if row.tp_size == 1:
            continue
        sizes = [(value, i) for i, value in enumerate(own['dispersion']) if value]
        if not sizes:
            apart.append(f'{row.title}: nowhere')
            continue
        largest, at = max(sizes)
        apart.append(f'{row.title}: {largest:.2g} at {place(at, own["dispersion"])}, mean '
                     f'{statistics.mean(value for value, _ in sizes):.2g} of the {len(sizes)} above 0')
        cka = statistics.mean(own['cka'][i] for _, i in sizes)
        ratio = statistics.mean(own['rank_all'][i] / own['rank_one'][i] for _, i in sizes)
        alike.append(f'{row.title}: CKA {cka:.2f}, {ratio:.2f} times of at most {row.tp_size}')
        excess = [(lone - synced, i) for i, (lone, synced) in enumerate(zip(own['lens_alone'],
                                                                          own['lens_synced']))
                  if lone is not None and synced is not None]
        worst, at = max(excess)
        alone.append(f'{row.title}: {excess[-1][0]:+.2f} at the end, {worst:+.2f} at '
                     f'{place(at, own["lens_alone"])}')
    starts = [
        (apart, 'where the ranks are furthest apart, by dispersion, of what a sublayer reads'),
        (alike, "whether the ranks are redundant, where they are apart: linear CKA of two (1 if alike), and "
         "the effective rank of all ranks' streams in that of one (1 if redundant)"),
        (alone, 'whether a rank alone predicts: nats that the head loses on its stream against the stream '
         'synced there, at the end and where it loses most'),
        (fading, "where the gradient fades: the smallest norm of a layer's gradient"),
        (first, 'what the first MLP reads of the attention before it, as a share of the embedding')]
    lines = [f'{start}: {"; ".join(words)}' for words, start in starts if words]
    return lines + ['each is of one fixed probe at the last evaluation; that it goes along with a difference '
                    'in loss does not make it the cause'] * bool(lines)
