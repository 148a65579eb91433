"""
What model.py promises: one network under any block types, at any tp_size, at the cost of dense GPT-2.

    python -m pytest tests/test_model.py

Numbers are compared with tests/reference.py (a plain loop over tp ranks) and with Hugging Face's GPT-2. Sizes
are small, and B, T, tp_size and the widths differ from one another, so that no wrong axis goes unseen.
"""

import math
import random
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import model as gpt
from model import GPT, Block, GPTConfig, ParallelBlock, SPDBlock, TPBlock, count_all_reduces
from reference import reference_gpt, reference_loss
from training.compiling import recompute
from training.optimizer import adamw

B, T, V = 5, 7, 29
SMALL = dict(block_size=8, vocab_size=V, n_head=12, n_embd=36)
TYPES = {'tp': TPBlock, 'spd': SPDBlock, 'parallel': ParallelBlock}
MIXED = ['spd', 'parallel', 'tp', 'parallel', 'parallel']
RANDOM = [random.Random(seed).choices(sorted(TYPES), k=6) for seed in range(6)]
ORDERS = [['tp'] * 2, ['spd'] * 3, ['parallel'] * 3, *RANDOM]
# the experiment's runs: (tp_size, block_types, all-reduces forward, and as many backward)
PATTERNS = {
    'dense': (1, ['tp'] * 12, 0),
    '24comm': (2, ['tp'] * 12, 24),
    '18comm': (2, ['tp', 'spd'] * 6, 18),
    '16comm': (2, ['tp', 'spd', 'spd'] * 4, 16),
    '12comm': (2, ['spd'] * 12, 12),
    '8comm': (2, ['spd', 'parallel'] * 6, 7),
    '6comm': (2, ['spd', 'parallel', 'parallel'] * 4, 5),
    '2comm': (2, ['parallel'] * 12, 1),
}


def config(block_types, tp_size, **settings):
    return GPTConfig(n_layer=len(block_types), block_types=block_types, tp_size=tp_size, **SMALL, **settings)


def build(block_types, tp_size, dtype=torch.float64, **settings):
    """A small GPT, every parameter far from its init (no bias 0, no gain 1): the same for any types."""
    torch.manual_seed(42)
    model = GPT(config(block_types, tp_size, **settings)).to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model


def batch():
    """Tokens and targets, (B, T) each; some targets are ignored."""
    generator = torch.Generator().manual_seed(7)
    idx, targets = torch.randint(V, (2, B, T), generator=generator)
    targets[1, 2] = targets[3, -1] = targets[4, :3] = -1
    return idx, targets


def results(logits, loss, parameters):
    """What training sees: logits, loss and, after its backward pass, every parameter's gradient by name."""
    loss.backward()
    grads = {name: p.grad.clone() for name, p in parameters}
    return {'logits': logits.detach(), 'loss': loss.detach()} | grads


def model_results(model, idx, targets):
    model.zero_grad()
    return results(model(idx)[0], model(idx, targets)[1], model.named_parameters())


def reference_results(model, idx, targets):
    weights = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    logits, _ = reference_gpt(weights, model.config, idx)
    return results(logits, reference_loss(logits, targets), weights.items())


def assert_same(got, want, tolerance):
    """Each tensor within tolerance of its largest entry: rounding is relative to what was summed."""
    assert got.keys() == want.keys()
    for name in want:
        scale = max(want[name].abs().max().item(), 1e-3)
        assert (got[name] - want[name]).abs().max() <= tolerance * scale, name


# the network's numbers


@pytest.mark.parametrize('bias', [False, True])
@pytest.mark.parametrize('tp_size', [2, 3, 4])
@pytest.mark.parametrize('block_types', ORDERS, ids='-'.join)
def test_any_order_of_blocks_equals_the_loop_over_ranks(block_types, tp_size, bias):
    model = build(block_types, tp_size, bias=bias)
    assert_same(model_results(model, *batch()), reference_results(model, *batch()), 1e-9)


@pytest.mark.parametrize('bias', [False, True])
@pytest.mark.parametrize('block_type', ['spd', 'parallel'])
def test_on_one_rank_all_block_types_are_dense_gpt2(block_type, bias):
    dense, other = build(['tp'] * 3, 1, bias=bias), build([block_type] * 3, 1, bias=bias)
    assert_same(model_results(other, *batch()), model_results(dense, *batch()), 1e-12)
    assert_same(model_results(dense, *batch()), reference_results(dense, *batch()), 1e-9)


def test_returns_logits_or_a_loss_that_ignores_targets_of_minus_one():
    model, (idx, targets) = build(MIXED, 2), batch()
    logits, nothing = model(idx)
    assert logits.shape == (B, T, V) and nothing is None
    nothing, loss = model(idx, targets)
    assert nothing is None
    kept = targets != -1
    torch.testing.assert_close(loss, F.cross_entropy(logits[kept], targets[kept]), rtol=0, atol=1e-12)
    nothing, loss = model(idx, idx)
    torch.testing.assert_close(loss, F.cross_entropy(logits.flatten(0, 1), idx.flatten()), rtol=0, atol=1e-12)


STREAMS = [['tp'], ['spd'], ['parallel'], MIXED]


@pytest.mark.parametrize('block_types', STREAMS, ids='-'.join)
def test_no_token_sees_a_later_one(block_types):
    model, (idx, _) = build(block_types, 2, bias=True), batch()
    before = model(idx)[0]
    for t in range(T):
        changed = idx.clone()
        changed[:, t] = (idx[:, t] + 1) % V
        after = model(changed)[0]
        torch.testing.assert_close(after[:, :t], before[:, :t], rtol=0, atol=1e-12)
        assert (after[:, t:] - before[:, t:]).abs().amax(-1).min() > 1e-6  # itself and all later ones do


@pytest.mark.parametrize('block_types', STREAMS, ids='-'.join)
def test_no_sample_touches_another(block_types):
    model, (idx, _) = build(block_types, 2, bias=True), batch()
    before = model(idx)[0]
    for b in range(B):
        changed = idx.clone()
        changed[b] = (idx[b] + 1) % V
        after = model(changed)[0]
        others = torch.arange(B) != b
        torch.testing.assert_close(after[others], before[others], rtol=0, atol=1e-12)
        torch.testing.assert_close(after[b], model(changed[b:b + 1])[0][0], rtol=0, atol=1e-12)


# communication


@pytest.mark.parametrize('name', PATTERNS)
def test_observed_all_reduces_are_those_of_the_table(name):
    tp_size, block_types, expected = PATTERNS[name]
    model, (idx, targets) = build(block_types, tp_size), batch()
    with count_all_reduces() as n:
        model(idx, targets)[1].backward()
    assert (n.forward, n.backward) == (expected, expected)


@pytest.mark.parametrize('block_types', RANDOM, ids='-'.join)
@pytest.mark.parametrize('tp_size', [1, 3])
def test_observed_all_reduces_are_the_syncs_of_the_reference(block_types, tp_size):
    model, (idx, targets) = build(block_types, tp_size), batch()
    with count_all_reduces() as n:
        model(idx, targets)[1].backward()
    syncs = reference_gpt(dict(model.named_parameters()), model.config, idx)[1]
    assert (n.forward, n.backward) == (syncs, syncs)


def test_a_counter_counts_its_own_block_and_nothing_else():
    model, (idx, targets) = build(['tp', 'spd'], 2), batch()  # 3 forward, 3 backward
    with count_all_reduces() as first:
        loss = model(idx, targets)[1]
    assert (first.forward, first.backward) == (3, 0)  # no backward yet
    with count_all_reduces() as second:
        loss.backward()
    assert (second.forward, second.backward) == (0, 3)
    model(idx, targets)[1].backward()  # outside of any
    with count_all_reduces() as outer, torch.no_grad():
        model(idx)
        with count_all_reduces() as inner:
            model(idx)
        assert inner.forward == 3
        model(idx)
    assert (inner.forward, outer.forward) == (3, 9)  # three passes in the outer's block, one in the inner's
    assert (inner.backward, outer.backward) == (0, 0)
    assert (first.forward, first.backward, second.forward, second.backward) == (3, 0, 0, 3)


@pytest.mark.parametrize('block_types', [['tp'] * 2, *STREAMS], ids='-'.join)
def test_messages_are_one_stream_in_the_compute_dtype_and_streams_are_float32(block_types, monkeypatch):
    messages, streams, hidden, g_op = [], [], [], gpt.g_op
    monkeypatch.setattr(gpt, 'g_op', lambda p, *rest: messages.append(p) or g_op(p, *rest))
    model, (idx, targets) = build(block_types, 2, torch.float32, bias=True), batch()
    norm, gelu = F.layer_norm, F.gelu
    monkeypatch.setattr(gpt.F, 'gelu', lambda x, **how: hidden.append(x) or gelu(x, **how))
    monkeypatch.setattr(gpt.F, 'layer_norm', lambda x, *rest: streams.append(x) or norm(x, *rest))
    with count_all_reduces() as n, torch.autocast('cpu', torch.bfloat16):
        model(idx, targets)[1].backward()
    assert len(messages) == n.forward > 0
    assert {(m.shape, m.dtype) for m in messages} == {((B, T, model.config.n_embd), torch.bfloat16)}
    assert {stream.dtype for stream in streams} == {torch.float32}
    assert {x.dtype for x in hidden} == {torch.bfloat16}


# what a block of one's own may do


@pytest.fixture
def palm(own_blocks):
    """PaLM's layer, in which attention and the MLP read the same stream, with a sync and without one."""
    class PaLMBlock(Block, name='palm'):
        def forward(self, s):
            return s.sync(self.attn(self.ln_1(s.u)), self.mlp(self.ln_2(s.u)))

    class PaLMParallelBlock(Block, name='palm_parallel'):
        def forward(self, s):
            return s.add(self.attn(self.ln_1(s.u)), self.mlp(self.ln_2(s.u)))


@pytest.mark.parametrize('merge', ['sum', 'mean'])
@pytest.mark.parametrize('bias', [False, True])
@pytest.mark.parametrize('block_types', [
    ['palm'] * 3, ['palm_parallel'] * 2, ['parallel', 'palm', 'tp'], ['palm_parallel', 'parallel', 'palm']],
    ids='-'.join)
def test_two_products_are_added_or_share_one_all_reduce(palm, block_types, bias, merge):
    model = build(block_types, 3, bias=bias, merge=merge)
    assert_same(model_results(model, *batch()), reference_results(model, *batch()), 1e-9)
    with count_all_reduces() as n:
        model(*batch())[1].backward()
    syncs = reference_gpt(model.state_dict(), model.config, batch()[0])[1]
    assert (n.forward, n.backward) == (syncs, syncs)
    inside = block_types.count('palm') + 2 * block_types.count('tp')
    assert syncs == inside + (block_types[-1] == 'palm_parallel')


def test_a_sync_of_what_is_together_does_nothing(own_blocks):
    class IdleBlock(Block, name='idle'):
        def forward(self, s):
            s = s.sync().sync().sync(self.attn(self.ln_1(s.u)))
            return s.sync().sync(self.mlp(self.ln_2(s.sync().u))).sync()

    idle, tp = (operations([name] * 2, 2, bias=True) for name in ('idle', 'tp'))
    assert [what for what, *_ in idle.ran] == [what for what, *_ in tp.ran]
    model, other = (build([name] * 2, 2, bias=True) for name in ('idle', 'tp'))
    with count_all_reduces() as n:
        assert_same(model_results(model, *batch()), model_results(other, *batch()), 0)
    assert n.forward == 2 * 4 * 2 and n.backward == 4 * 2  # logits and loss of both, and one backward each


def test_what_a_block_carries_reaches_a_later_one_through_adds_and_syncs(own_blocks):
    found = []

    class FirstBlock(SPDBlock, name='first'):
        def forward(self, s):
            return super().forward(s)._replace(carry=s.u)

    class LastBlock(TPBlock, name='last'):
        def forward(self, s):
            found.append(s.carry)
            return super().forward(s)

    model, (idx, _) = build(['first', 'parallel', 'tp', 'parallel', 'last'], 2), batch()
    model(idx)
    wte, wpe = model.transformer.wte.weight, model.transformer.wpe.weight
    torch.testing.assert_close(found, [wte[idx] + wpe[:T]], rtol=0, atol=0)


# parameters


def gpt2_shapes(c):
    """GPT-2's parameters by name, from the sizes alone."""
    C, V, linears, norms = c.n_embd, c.vocab_size, {}, {'transformer.ln_f': (c.n_embd,)}
    for i in range(c.n_layer):
        h = f'transformer.h.{i}.'
        linears |= {h + 'attn.c_attn': (3 * C, C), h + 'attn.c_proj': (C, C)}
        linears |= {h + 'mlp.c_fc': (4 * C, C), h + 'mlp.c_proj': (C, 4 * C)}
        norms |= {h + 'ln_1': (C,), h + 'ln_2': (C,)}
    embeddings = {'transformer.wte': (V, C), 'transformer.wpe': (c.block_size, C), 'lm_head': (V, C)}
    shapes = {name + '.weight': shape for name, shape in (embeddings | linears | norms).items()}
    return shapes | {name + '.bias': shape[:1] for name, shape in (linears | norms).items() if c.bias}


@pytest.mark.parametrize('bias', [False, True])
def test_parameters_have_gpt2s_names_and_shapes_and_do_not_depend_on_the_blocks(bias):
    states = []
    for tp_size, block_types, _ in (*PATTERNS.values(), (4, ['tp'] * 12, 24), (3, MIXED[:3] * 4, 12)):
        torch.manual_seed(3)
        model = GPT(config(block_types, tp_size, bias=bias))
        assert [type(block) for block in model.transformer.h] == [TYPES[name] for name in block_types]
        assert model.lm_head.weight is model.transformer.wte.weight
        states.append(model.state_dict())
    assert {name: tuple(p.shape) for name, p in states[0].items()} == gpt2_shapes(model.config)
    for state in states[1:]:
        assert state.keys() == states[0].keys()
        assert all(torch.equal(state[name], states[0][name]) for name in state)


def test_every_parameter_starts_as_gpt2s_does():
    c = GPTConfig(block_size=128, vocab_size=256, n_layer=3, n_head=4, n_embd=64, bias=True)
    for name, p in GPT(c).state_dict().items():
        if name.endswith('.bias') or 'ln_' in name:
            assert torch.equal(p, torch.full_like(p, float(name.endswith('.weight')))), name
            continue
        std = 0.02 / math.sqrt(2 * c.n_layer) if 'c_proj' in name else 0.02
        z, n = p / std, p.numel()
        # a normal sample of n: within five standard errors its mean, deviation and share within one sigma
        assert abs(z.mean()) < 5 / math.sqrt(n), name
        assert abs(z.std() - 1) < 5 / math.sqrt(2 * n), name
        assert abs((z.abs() < 1).double().mean() - 0.6827) < 5 * math.sqrt(0.6827 * 0.3173 / n), name


def test_size_and_flops_at_full_size():
    for tp_size, block_types in ((1, None), (2, None), (2, ['spd', 'parallel'] * 6)):
        with torch.device('meta'):
            model = GPT(GPTConfig(tp_size=tp_size, block_types=block_types))
        assert model.num_params() == 124_373_760
        assert model.flops_per_token() == 6 * (124_373_760 - 1024 * 768) + 12 * 12 * 768 * 1024


def test_weight_decay_is_for_matrices_and_each_parameter_is_optimized_once():
    model = build(MIXED, 2, bias=True)
    config = SimpleNamespace(weight_decay=0.1, learning_rate=3e-4, beta1=0.9, beta2=0.95)
    optimizer = adamw(model, config)
    assert isinstance(optimizer, torch.optim.AdamW)
    seen = [id(p) for group in optimizer.param_groups for p in group['params']]
    assert len(seen) == len(set(seen)) and set(seen) == {id(p) for p in model.parameters()}
    for group in optimizer.param_groups:
        assert (group['lr'], group['betas']) == (3e-4, (0.9, 0.95))
        assert all(group['weight_decay'] == (0.1 if p.ndim >= 2 else 0.0) for p in group['params'])


@pytest.mark.parametrize('settings, words', [
    (dict(n_layer=6, block_types=['tp'] * 4), ['block_types has 4 entries, n_layer is 6']),
    (dict(n_layer=2, block_types=['tp', 'tpp']), ['block_types', 'tpp']),
    (dict(tp_size=5), ['tp_size', '5', 'n_head', '12']),
    (dict(tp_size=0), ['tp_size', '0']),
    (dict(n_head=10), ['n_head', '10', 'n_embd', '768']),
    (dict(merge='max'), ['merge', 'max', 'sum, mean']),
])
def test_a_config_that_cannot_be_built_is_refused_in_one_line(settings, words):
    with pytest.raises(ValueError) as refusal:
        GPT(GPTConfig(**settings))
    message = str(refusal.value)
    assert '\n' not in message and all(word in message for word in words), message


# cost


class Operations(TorchDispatchMode):
    """Records the operations that run, in order: (which, its tensors' shapes, size of its largest output)."""

    def __init__(self):
        super().__init__()
        self.ran = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        shapes = [tuple(a.shape) for a in args if isinstance(a, torch.Tensor)]
        outs = out if isinstance(out, (tuple, list)) else [out]
        largest = max((t.numel() for t in outs if isinstance(t, torch.Tensor)), default=0)
        self.ran.append((func.overloadpacket, shapes, largest))
        return out

    def matmuls(self):
        aten = torch.ops.aten
        kinds = (aten.mm, aten.addmm, aten.bmm, aten.baddbmm)
        return [(str(kind), shapes) for kind, shapes, _ in self.ran if kind in kinds]

    def largest(self):
        return max(numel for _, _, numel in self.ran)


def operations(block_types, tp_size, **settings):
    model, (idx, targets) = build(block_types, tp_size, torch.float32, **settings), batch()
    with Operations() as ops:
        model(idx, targets)[1].backward()
    return ops


@pytest.mark.parametrize('bias', [False, True])
def test_a_synced_stream_has_no_rank_dimension_and_costs_what_dense_costs(bias):
    dense = operations(['tp'] * 3, 1, bias=bias)
    synced = operations(['tp'] * 3, 6, bias=bias)
    assert len(dense.matmuls()) > 3 * 4 * 3  # four linear layers a block, forward and two backward
    assert synced.matmuls() == dense.matmuls()
    assert synced.largest() <= dense.largest()
    # the assertion above would see it: six streams are more than the MLP's fourfold width
    assert operations(['parallel'] * 3, 6, bias=bias).largest() > dense.largest()


def test_only_what_drifts_is_batched_over_ranks():
    """An SPD block enters and leaves on a replicated stream: its first and last matmuls are dense GPT-2's."""
    C, shapes = SMALL['n_embd'], [shapes for _, shapes in operations(['spd'], 3).matmuls()]
    assert [(B * T, C), (C, 3 * C)] in shapes  # c_attn
    assert [(B * T, 4 * C), (4 * C, C)] in shapes  # mlp.c_proj, the sum over ranks inside it


@pytest.mark.parametrize('block_types', STREAMS, ids='-'.join)
def test_operations_do_not_grow_with_tp_size(block_types):
    two, four = operations(block_types, 2), operations(block_types, 4)
    assert len(two.ran) == len(four.ran)
    assert len(two.matmuls()) == len(four.matmuls())


@pytest.mark.parametrize('block_types', STREAMS, ids='-'.join)
def test_arithmetic_is_dense_gpt2s_whatever_the_blocks(block_types):
    flops = []
    for types, tp_size in ((['tp'] * len(block_types), 1), (block_types, 2), (block_types, 4)):
        model, (idx, targets) = build(types, tp_size, torch.float32), batch()
        with FlopCounterMode(display=False) as counter:
            model(idx, targets)[1].backward()
        flops.append(counter.get_total_flops())
    assert flops[0] > 0 and flops == flops[:1] * 3


@pytest.mark.parametrize('backend, dropout, recomputed', [('eager', 0.2, 0), ('aot_eager', 0.0, 2)])
def test_compiles_without_a_graph_break(backend, dropout, recomputed):
    torch._dynamo.reset()
    model = build(['tp', 'spd', 'parallel'], 2, bias=True, dropout=dropout)
    recompute(model, recomputed)

    def trained(run):
        model.zero_grad()
        torch.manual_seed(0)
        loss = run(*batch())[1]
        return results(loss, loss, model.named_parameters())

    compiled = torch.compile(model, fullgraph=True, backend=backend)
    with count_all_reduces() as n:  # open while it is traced: no graph break, no count
        got = trained(compiled)
    assert (n.forward, n.backward) == (0, 0)
    assert_same(got, trained(model), 1e-9)
    torch.testing.assert_close(compiled.eval()(batch()[0])[0], model(batch()[0])[0], rtol=0, atol=1e-9)


def test_compiled_code_takes_sequences_of_any_length():
    torch._dynamo.reset()
    model, idx = build(['spd', 'parallel', 'tp'], 2), batch()[0]
    compiled = torch.compile(model, fullgraph=True, backend='eager')
    for length in T, T - 1, T - 2:  # from the second on, the length is a symbol
        torch.testing.assert_close(compiled(idx[:, :length])[0], model(idx[:, :length])[0])


# dropout


def seeded(model, idx):
    torch.manual_seed(11)
    return model(idx)[0]


def test_dropout_masks_do_not_depend_on_tp_size():
    idx, _ = batch()
    dense, *others = (build(['tp'] * 3, tp_size, bias=True, dropout=0.3) for tp_size in (1, 2, 4))
    for other in others:
        torch.testing.assert_close(seeded(other, idx), seeded(dense, idx), rtol=0, atol=1e-9)
    assert (seeded(dense, idx) - dense.eval()(idx)[0]).abs().max() > 0.1


@pytest.mark.parametrize('block_type', ['spd', 'parallel'])
@pytest.mark.parametrize('layer', [0, 1])
@pytest.mark.parametrize('kind', ['attn', 'mlp'])
def test_drifted_streams_are_dropped_by_the_masks_of_dense(block_type, layer, kind):
    """With all sublayers but one silent the ranks read what dense reads; only their masks could differ."""
    streams = []
    for types, tp_size in ((['tp'] * 2, 1), ([block_type] * 2, 4)):
        model = build(types, tp_size, bias=True, dropout=0.3)
        for name, p in model.named_parameters():
            if name.endswith('c_proj.weight') and f'h.{layer}.{kind}.' not in name:
                torch.nn.init.zeros_(p)  # silent, but for its bias
        streams.append(seeded(model, batch()[0]))
    torch.testing.assert_close(streams[1], streams[0], rtol=0, atol=1e-9)


@pytest.mark.parametrize('block_type', TYPES)
@pytest.mark.parametrize('source, masks', [
    ('embedding', 1), ('attn.c_proj.bias', 1), ('mlp.c_proj.bias', 1), ('attention', 2), ('mlp', 1)])
def test_dropout_falls_on_all_that_enters_the_stream_and_on_attention(source, masks, block_type, monkeypatch):
    """All parameters are 0 except those that make `source` add 1; the stream then shows the masks alone."""
    model = GPT(config([block_type], 2, bias=True, dropout=0.3))
    block, C, samples, streams = model.transformer.h[0], model.config.n_embd, 400, []
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
        if source == 'embedding':
            model.transformer.wpe.weight.fill_(1)
        elif source == 'attention':  # v is 1, c_proj the identity
            block.attn.c_attn.bias[2 * C:] = 1
            block.attn.c_proj.weight.copy_(torch.eye(C))
        elif source == 'mlp':
            block.mlp.c_fc.bias.fill_(1)
            block.mlp.c_proj.weight.fill_(1 / (4 * C * F.gelu(torch.tensor(1.0))))
        else:
            block.get_parameter(source).fill_(1)
    norm = F.layer_norm
    monkeypatch.setattr(gpt.F, 'layer_norm', lambda x, *rest: streams.append(x) or norm(x, *rest))
    model(torch.zeros(samples, 1, dtype=torch.long))
    kept = streams[-1] != 0  # (samples, 1, C); with one token, attention's mask is one number a head
    torch.testing.assert_close(streams[-1][kept], torch.full((kept.sum(),), 0.7**-masks), rtol=1e-5, atol=0)
    assert abs(kept.double().mean() - 0.7**masks) < 5 * math.sqrt(0.25 / (samples * model.config.n_head))


@pytest.mark.parametrize('block_types', STREAMS, ids='-'.join)
def test_evaluation_drops_nothing(block_types):
    idx, _ = batch()
    dropping, plain = build(block_types, 2, dropout=0.3).eval(), build(block_types, 2)
    assert torch.equal(dropping(idx)[0], plain(idx)[0])


# generation


def greedy(model, idx, n):
    """Append the likeliest token after the last block_size ones, n times, as a temperature towards 0 must."""
    for _ in range(n):
        last = model(idx[:, -model.config.block_size:])[0][:, -1]
        idx = torch.cat([idx, last.argmax(-1, keepdim=True)], 1)
    return idx


def test_generate_appends_tokens_past_the_context_and_leaves_the_mode_alone():
    idx, n = batch()[0], 4  # T + n is above block_size: the context slides
    model = build(MIXED, 2, dropout=0.3)
    expected = greedy(model.eval(), idx, n)
    for training in (True, False):
        model.train(training)
        assert torch.equal(model.generate(idx, n, top_k=1), expected)  # so nothing is dropped either
        assert torch.equal(model.generate(idx, n, temperature=1e-6), expected)
        assert all(module.training == training for module in model.modules())


def test_generate_samples_the_seeds_tokens_of_the_top_k():
    model, idx = build(MIXED, 2), batch()[0]

    def sample(seed, **settings):
        torch.manual_seed(seed)
        return model.generate(idx, 1, **settings)[:, -1]

    logits = model(idx)[0][:, -1]  # (B, V)
    draws = torch.stack([sample(seed, temperature=3.0, top_k=3) for seed in range(60)])  # (60, B)
    assert torch.equal(draws[5], sample(5, temperature=3.0, top_k=3))
    for b in range(B):
        assert set(draws[:, b].tolist()) == set(logits[b].topk(3).indices.tolist())
    free = torch.stack([sample(seed, temperature=3.0) for seed in range(60)])
    likeliest = (free == logits.argmax(-1)).double().mean(0)  # (B,)
    assert (likeliest - F.softmax(logits / 3.0, -1).amax(-1)).abs().max() < 5 * math.sqrt(0.25 / 60)
