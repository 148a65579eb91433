"""
Decoding: a token computed alone, with the keys and values of those before it, is the token of the whole text.

    python -m pytest tests/test_decode.py
"""

import pytest
import torch

import configurator
from model import Block, KeyValues
from sample import continue_each
from test_rivals import ALONE, MERGED, MIXES, V, build, named

B, T, PROMPT = 3, 9, 4
PLAIN = [(['spd', 'parallel', 'tp', 'parallel', 'parallel'], {}), (['tp'] * 2, {}), (['spd'] * 2, {})]


def tokens():
    return torch.randint(V, (B, T), generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize('tp_size', [1, 2, 4])
@pytest.mark.parametrize('case', PLAIN + ALONE + MIXES[:6] + MERGED[:3], ids=named)
def test_cached_steps_have_the_logits_of_the_whole_text(case, tp_size):
    model, idx = build(case[0], tp_size, block_size=T, bias=True, **case[1]).eval(), tokens()
    cache = [KeyValues(T) for _ in case[0]]
    with torch.no_grad():
        parts = [idx[:, :PROMPT], *idx[:, PROMPT:].split(1, dim=1)]
        steps = torch.cat([model(part, cache=cache)[0] for part in parts], dim=1)
        torch.testing.assert_close(steps, model(idx)[0][:, PROMPT - 1:], rtol=0, atol=1e-9)


def recomputed(model, idx, n, seed):
    """The same draws from whole windows."""
    torch.manual_seed(seed)
    for _ in range(n):
        logits = model(idx[:, -model.config.block_size:])[0][:, -1].float()
        idx = torch.cat((idx, torch.multinomial(logits.softmax(-1), 1)), dim=1)
    return idx


@pytest.mark.parametrize('prompt', [1, PROMPT, T, T + 2])
def test_a_seed_draws_what_recomputing_every_window_draws(prompt):
    model = build(['dtp', 'parallel', 'fal', 'spd'], 2, block_size=T).eval()
    idx = torch.cat((tokens(), tokens()), dim=1)[:, :prompt]
    torch.manual_seed(3)
    assert torch.equal(model.generate(idx, 8), recomputed(model, idx, 8, seed=3))


def test_a_token_is_computed_alone_until_the_block_is_full(monkeypatch):
    model, lengths = build(['parallel', 'ladder'], 2, block_size=T), []
    monkeypatch.setattr(model.transformer.wte, 'forward', lambda idx, look_up=model.transformer.wte.forward:
                        lengths.append(idx.size(1)) or look_up(idx))
    model.generate(tokens()[:, :PROMPT], 8)
    assert lengths == [PROMPT, 1, 1, 1, 1, 1, T, T]


def test_prompts_of_unequal_length_are_continued_as_each_would_be_alone():
    model, idx = build(['parallel', 'spd'], 2, block_size=T), tokens()
    prompts = [idx[0, :5], idx[1, :2], idx[2, :5], idx[0, :7]]
    together = continue_each(model, prompts, 4, 1.0, 1)
    for prompt, text in zip(prompts, together, strict=True):
        assert torch.equal(text, model.generate(prompt[None], 4, top_k=1)[0])


def test_a_block_that_leaves_the_cache_out_samples_as_well(own_blocks):
    class Uncached(Block, name='uncached'):
        def forward(self, s):
            return s.sync(self.attn(self.ln_1(s.u)), self.mlp(self.ln_2(s.u)))

    class Twice(Block, name='twice'):
        def forward(self, s):
            s = s.add(self.attn(self.ln_1(s.u), s.cache))
            return s.sync(self.attn(self.ln_2(s.u), s.cache))

    configurator.COMMUNICATIONS.update(uncached=1, twice=1)
    model = build(['spd', 'uncached'], 2, block_size=T).eval()
    torch.manual_seed(3)
    assert torch.equal(model.generate(tokens()[:, :PROMPT], 8),
                       recomputed(model, tokens()[:, :PROMPT], 8, seed=3))
    with pytest.raises(ValueError, match='give s.cache to self.attn only once'):
        build(['spd', 'twice'], 2, block_size=T).generate(tokens()[:, :PROMPT], 2)
