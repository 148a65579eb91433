"""
Heads and MLP columns in another order, against the net as it was and a net whose best layout is known.

    python -m pytest tests/test_layout.py
"""

import itertools

import pytest
import torch

from model import GPT, GPTConfig
from training.layout import affinity, assign, permuted
from training.sharding import sharding

B, T, R = 3, 8, 2


def net(weights=None, tp_size=R, **settings):
    torch.manual_seed(4)
    model = GPT(GPTConfig(block_size=T, vocab_size=29, n_layer=2, n_head=4, n_embd=16, bias=True,
                          tp_size=tp_size, **settings)).double()
    if weights is not None:
        model.load_state_dict(weights)
    return model


@pytest.fixture
def idx():
    return torch.randint(29, (B, T))


@torch.no_grad()
def test_the_dense_net_stays_the_same_function(idx):
    model = net()
    for p in model.parameters():
        p += 0.3 * torch.randn_like(p)  # biases and LayerNorms too
    orders = affinity(model, idx)
    assert list(orders) == ['h.0.attn', 'h.0.mlp', 'h.1.attn', 'h.1.mlp']
    assert all(order.sort().values.equal(torch.arange(len(order))) for order in orders.values())
    assert not orders['h.1.mlp'].equal(torch.arange(64))
    weights, wanted = permuted(model.state_dict(), orders), model(idx)[0]
    for tp_size in 1, R:
        torch.testing.assert_close(net(weights, tp_size)(idx)[0], wanted, rtol=0, atol=1e-10)
    drifted = dict(block_types=['parallel', 'spd'])
    before, after = (net(state, **drifted)(idx)[0] for state in (model.state_dict(), weights))
    assert not torch.allclose(before, after, atol=1e-3)


@torch.no_grad()
def test_units_that_were_made_for_one_rank_find_it_again(idx):
    made = net()
    for name, p in made.named_parameters():
        if p.dim() == 2 and sharding(name):  # a rank's heads and columns keep to half of the channels
            dim, parts = sharding(name)
            by_rank = (p.t() if dim else p).unflatten(0, (parts, R, -1)).unflatten(-1, (R, -1))
            by_rank *= 10 * torch.eye(R)[None, :, None, :, None]
    shuffles = {f'h.{i}.{kind}': torch.randperm(n)
                for i in range(2) for kind, n in (('attn', 4), ('mlp', 64))}
    shuffles['h.0.attn'] = torch.arange(4)  # nothing is written before them: they stay
    shuffled = net(permuted(made.state_dict(), shuffles))
    orders = affinity(shuffled, idx)
    for name, order in orders.items():
        of_rank = shuffles[name][order] // (len(order) // R)  # where each unit was made
        assert of_rank.view(R, -1).equal(torch.arange(R)[:, None].expand(R, len(order) // R)), name

    def error(weights):
        return (net(weights, block_types=['parallel', 'spd'])(idx)[0] - made(idx)[0]).norm()
    assert 2 * error(permuted(shuffled.state_dict(), orders)) < error(shuffled.state_dict())


def test_the_ranks_are_even_and_no_others_keep_more():
    values = torch.rand(6, 3) + torch.tensor([3.0, 0, 0])  # all would go to rank 0
    ranks = assign(values, 3)
    assert ranks.bincount().tolist() == [2, 2, 2]
    best = max(sum(values[j, r].item() for j, r in enumerate(other))
               for other in set(itertools.permutations([0, 0, 1, 1, 2, 2])))
    assert values[range(6), ranks].sum().item() == pytest.approx(best)
