"""
Any order of blocks that a person may write: the network against the reference, and the counts.

    python -m pytest tests/test_properties.py
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from configurator import communications, load
from model import GPT, GPTConfig, count_all_reduces
from reference import reference_gpt

steady = settings(deadline=None, derandomize=True, database=None, max_examples=40)
ORDERS = st.lists(st.sampled_from(['tp', 'spd', 'parallel']), min_size=1, max_size=5)


@steady
@given(block_types=ORDERS, tp_size=st.sampled_from([1, 2, 3, 4, 6, 12]), bias=st.booleans(),
       seed=st.integers(0, 99))
def test_any_order_of_blocks_on_any_number_of_ranks_is_the_reference(block_types, tp_size, bias, seed):
    torch.manual_seed(seed)
    model = GPT(GPTConfig(block_size=7, vocab_size=31, n_layer=len(block_types), n_head=12, n_embd=24,
                          bias=bias, tp_size=tp_size, block_types=block_types)).double()
    idx = torch.randint(31, (2, 5))
    with torch.no_grad():
        wanted, syncs = reference_gpt(dict(model.named_parameters()), model.config, idx)
        torch.testing.assert_close(model(idx)[0], wanted, rtol=1e-9, atol=1e-9)
    with count_all_reduces() as observed:
        model(idx, idx)[1].backward()
    assert (observed.forward, observed.backward) == (syncs, syncs)
    # with a Parallel layer the guide counts two for the boundaries, of which one sync is real at most
    drifts = tp_size > 1 and 'parallel' in block_types
    extra = 2 - (block_types[-1] == 'parallel') if drifts else 0
    assert communications(block_types, tp_size) == syncs + extra


@steady
@given(block_types=ORDERS, repeats=st.integers(1, 4))
def test_a_pattern_on_the_command_line_is_repeated_for_all_layers(block_types, repeats):
    n_layer = len(block_types) * repeats
    pattern = f'--block_types={",".join(block_types)}'
    for flag in pattern, f'--block_types={block_types * repeats}':
        assert load([flag, f'--n_layer={n_layer}']).block_types == block_types * repeats
    if len(block_types) > 1:
        with pytest.raises(SystemExit):
            load([pattern, f'--n_layer={n_layer + 1}'])
