"""
Weights in from the hub's layout and from nanoGPT's checkpoints, and out again, against transformers itself.

    python -m pytest tests/test_pretrained.py
"""

import json
import shutil

import pytest
import tiktoken
import torch
import torch.nn.functional as F
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

import export
import sample
from configurator import ROOT
from data.corpus import byte_encoding, load_tokenizer, open_corpus
from model import GPT, GPTConfig
from toy_runs import info, metrics, refused, run
from training import checkpoint, pretrained
from variants import gpt_config

B, T = 2, 11
FLAGS = [str(ROOT / 'config/cpu.py'), '--block_types=tp,spd', '--tp_size=2', '--batch_size=4',
         '--eval_tokens=600', '--eval_interval=2', '--log_interval=1', '--warmup_iters=1']


@torch.no_grad()
def save_gpt2(folder, far=False, **settings):
    """A random GPT-2 of transformers, written as it writes it. far: all logits lie near -50."""
    sizes = dict(n_layer=2, n_head=4, n_embd=16, n_positions=32) | settings
    torch.manual_seed(3)
    model = GPT2LMHeadModel(GPT2Config(**sizes))
    for p in model.parameters():
        p.add_(0.1 * torch.randn_like(p))  # biases start at 0, and weights small
    if far:
        model.transformer.wte.weight[:, 0], model.transformer.ln_f.weight[0] = -50, 0
        model.transformer.ln_f.bias[0] = 1
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    path = tmp_path_factory.mktemp('hub')
    return {name: save_gpt2(path / name, **settings) for name, settings in dict(
        near={}, far=dict(far=True, activation_function='gelu'), bytes=dict(vocab_size=257)).items()}


def exported(out_dir, to, *flags):
    """What export.py leaves a program with: None, or a line."""
    try:
        export.main([f'--out_dir={out_dir}', f'--to={to}', *flags])
    except SystemExit as stopped:
        return stopped.code


@pytest.mark.parametrize('dtype, tolerance', [(torch.float32, 1e-4), (torch.float64, 1e-10)], ids=str)
@pytest.mark.parametrize('name', ['near', 'far'])
def test_logits_loss_gradients_and_text_are_the_librarys(folders, name, dtype, tolerance):
    theirs = GPT2LMHeadModel.from_pretrained(folders[name]).to(dtype).eval()
    idx = torch.randint(50257, (B, T))
    logits = theirs(idx).logits
    assert name == 'near' or -80 < logits.max() < -20
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), idx[:, 1:].flatten())
    loss.backward()
    text = theirs.generate(idx[:, :5], max_new_tokens=3, do_sample=False, pad_token_id=0)
    for tp_size in 1, 2, 4:
        found = pretrained.load(str(folders[name]))
        model = GPT(gpt_config(found.keys | dict(tp_size=tp_size)))
        model.load_state_dict(found.weights)
        model.to(dtype)
        ours = model(idx[:, :-1], idx[:, 1:])[1]
        ours.backward()
        wanted = dict(logits=logits, loss=loss) | {
            key: p.grad.T if key.endswith(pretrained.TRANSPOSED) else p.grad
            for key, p in theirs.named_parameters()}
        got = dict(logits=model(idx)[0], loss=ours) | {key: p.grad for key, p in model.named_parameters()}
        torch.testing.assert_close(got, wanted, rtol=0, atol=tolerance)
        assert model.generate(idx[:, :5], 3, top_k=1).tolist() == text.tolist()


def test_a_run_begins_with_the_weights_and_goes_on_without_them(corpus, folders, tmp_path, capsys):
    source = shutil.copytree(folders['bytes'], tmp_path / 'source')
    flags = [*FLAGS, f'--init_from={source}']
    for out_dir, argv in ('whole', ['--max_iters=4']), ('halves', ['--max_iters=2', '--lr_decay_iters=4']):
        assert run(tmp_path / out_dir, *flags, *argv) == 0
    config = info(tmp_path / 'halves')['config']
    assert (config['init_from'], config['n_embd'], config['gelu'], config['vocab_size']) == (
        str(source), 16, 'tanh', 257)
    assert 'another run' in refused(tmp_path / 'whole', *FLAGS, '--max_iters=4', '--n_layer=2')
    source.rename(tmp_path / 'gone')
    assert 'init_from' in refused(tmp_path / 'new', *flags)
    assert run(tmp_path / 'halves', *FLAGS, '--max_iters=4', '--init_from=resume') == 0
    assert metrics(tmp_path / 'halves') == metrics(tmp_path / 'whole')
    config, whole = (info(tmp_path / name)['config'] | dict(out_dir='') for name in ('halves', 'whole'))
    assert config == whole


def test_a_flag_may_only_make_the_windows_shorter(corpus, folders, tmp_path, capsys):
    flags = [*FLAGS, f'--init_from={folders["bytes"]}', '--eval_only=True', '--block_types=tp']
    for flag in '--n_layer=4', '--gelu=erf', '--bias=False', '--block_size=64', '--vocab_size=320':
        assert flag in refused(tmp_path, *flags, flag)
    assert run(tmp_path, *flags, '--block_size=20') == 0
    model, tokens = GPT2LMHeadModel.from_pretrained(folders['bytes']), corpus.val.read(0, 601).astype('int64')
    idx, targets = (torch.from_numpy(part).view(30, 20) for part in (tokens[:-1], tokens[1:]))
    loss = F.cross_entropy(model(idx).logits.flatten(0, 1), targets.flatten())
    assert float(capsys.readouterr().out.split()[2]) == pytest.approx(loss.item(), abs=2e-6)


@pytest.mark.parametrize('name', pretrained.HUB)
def test_a_name_of_the_hub_without_a_network_gets_one_line(tmp_path, name):
    message = refused(tmp_path, *FLAGS, f'--init_from={name}')
    assert f'init_from is {name}' in message and 'network' in message


@pytest.mark.parametrize('damage, words', [
    (lambda config: config.update(model_type='gpt2', activation_function='relu'), 'relu'),
    (lambda config: config.update(scale_attn_by_inverse_layer_idx=True), 'scale_attn_by_inverse_layer_idx'),
    (lambda config: config.update(n_layer=3), 'transformer.h.2.attn.c_attn.bias'),
    (lambda config: config.clear(), 'n_layer'),
])
def test_a_folder_of_another_net_gets_one_line(folders, tmp_path, damage, words):
    folder = shutil.copytree(folders['bytes'], tmp_path / 'folder')
    config = json.loads((folder / 'config.json').read_text())
    damage(config)
    (folder / 'config.json').write_text(json.dumps(config))
    message = refused(tmp_path, *FLAGS, f'--init_from={folder}')
    assert words in message and str(folder) in message


def test_a_net_is_refused_a_corpus_that_it_cannot_read(corpus, folders, undisturbed, tmp_path):
    message = refused(tmp_path, *FLAGS, f'--init_from={folders["near"]}')
    assert 'byte' in message and 'gpt2' in message
    small = save_gpt2(tmp_path / 'small', vocab_size=100)
    assert 'vocab_size is 100' in refused(tmp_path, *FLAGS, f'--init_from={small}')
    assert 'folder' in refused(tmp_path, *FLAGS, f'--init_from={tmp_path}')
    assert f'try {undisturbed}/ckpt.pt' in refused(tmp_path, *FLAGS, f'--init_from={undisturbed}')


@pytest.mark.parametrize('name, text', [
    ('model.safetensors.index.json', '{'), ('model.safetensors.index.json', '[]'),
    ('model.safetensors', 'weights'), ('tokenizer.json', '{}')])
def test_a_damaged_file_of_a_folder_gets_one_line(folders, tmp_path, name, text):
    folder = shutil.copytree(folders['bytes'], tmp_path / 'folder')
    (folder / name).write_text(text)
    assert f'{folder / name} is damaged' in refused(tmp_path, *FLAGS, f'--init_from={folder}')


def test_settings_of_a_net_that_its_new_run_drops_are_warned_of(undisturbed, tmp_path, capsys):
    saved = checkpoint.load(undisturbed / 'ckpt.pt')
    saved['config'] |= dict(block_types=['tp', 'dtp'] * 2, tp_size=4, dtp_delay=2)
    torch.save(saved, tmp_path / 'ckpt.pt')
    flags = [FLAGS[0], f'--init_from={tmp_path}/ckpt.pt', '--eval_tokens=64', '--eval_only=True']
    keep = ['--block_types=tp,dtp', '--tp_size=4', '--dtp_delay=2']
    theirs = ['[tp, dtp] x 2, this run has tp x 4', 'tp_size 4, this run has tp_size 2',
              'dtp_delay 2, this run has dtp_delay 1']
    for given in 0, 1, 3:
        assert run(tmp_path / 'out', *flags, *keep[:given]) == 0
        warned = [line for line in capsys.readouterr().out.splitlines() if line.startswith('warning')]
        assert warned == [f'warning: {tmp_path}/ckpt.pt was trained with {words}; {flag} keeps it'
                          for words, flag in list(zip(theirs, keep))[given:]]


def test_a_checkpoint_of_nanogpt(corpus, tmp_path, capsys):
    shape = dict(n_layer=2, n_head=4, n_embd=16, block_size=32, bias=True, vocab_size=320)
    model = GPT(GPTConfig(**shape, tp_size=1))
    weights = {f'_orig_mod.{name}': p for name, p in model.state_dict().items()}
    weights['_orig_mod.transformer.h.0.attn.bias'] = torch.ones(1, 1, 32, 32).tril()  # its causal mask
    torch.save(dict(model=weights, optimizer={}, model_args=dict(shape, dropout=0.0), iter_num=5,
                    best_val_loss=torch.tensor(3.0), config=dict(dataset='mine')), tmp_path / 'ckpt.pt')
    found = pretrained.load(str(tmp_path / 'ckpt.pt'))
    assert found.meta is None and found.shape == dict(shape, gelu='erf', embed_scale=1.0)
    torch.testing.assert_close(found.weights, dict(model.state_dict()), rtol=0, atol=0)
    assert run(tmp_path / 'run', *FLAGS, '--max_iters=1', f'--init_from={tmp_path}/ckpt.pt') == 0
    torch.save(dict(model=weights), tmp_path / 'ckpt.pt')
    assert 'nanoGPT' in refused(tmp_path / 'other', *FLAGS, f'--init_from={tmp_path}/ckpt.pt')


def test_out_and_in_again_changes_no_bit(corpus, folders, tmp_path, capsys):
    assert run(tmp_path / 'run', *FLAGS[:1], '--tp_size=2', '--max_iters=0', '--eval_tokens=600',
               f'--init_from={folders["bytes"]}') == 0
    assert exported(tmp_path / 'run', tmp_path / 'to') is None
    first, second = (GPT2LMHeadModel.from_pretrained(path) for path in (folders['bytes'], tmp_path / 'to'))
    torch.testing.assert_close(second.state_dict(), first.state_dict(), rtol=0, atol=0)
    assert second.config.activation_function == 'gelu_new' and second.config.eos_token_id == 256
    weights = checkpoint.load(tmp_path / 'run/ckpt.pt')['model']
    torch.testing.assert_close(pretrained.load(str(tmp_path / 'to')).weights, weights, rtol=0, atol=0)
    assert 'must not hold' in exported(tmp_path / 'run', tmp_path / 'to')

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / 'to')
    text = 'def é(x):\n\n    return "☃" <|endoftext|>'
    found = pretrained.load(str(tmp_path / 'to')).meta
    assert found['tokenizer'] == 'byte'
    ids = load_tokenizer(corpus.meta).encode(text)
    assert tokenizer(text)['input_ids'] == load_tokenizer(found).encode(text) == ids
    assert tokenizer.decode(ids) == load_tokenizer(found).decode(ids) == text
    sample.main([f'--init_from={tmp_path}/to', '--num_samples=1', '--max_new_tokens=3', '--device=cpu'])


def test_a_net_that_is_not_dense_is_exported_on_request(corpus, undisturbed, tmp_path, capsys, monkeypatch):
    message = exported(undisturbed, tmp_path / 'to')
    assert 'it was trained with tp, spd, parallel, spd: that is not' in message and '--dense=True' in message
    assert not (tmp_path / 'to').exists()
    assert exported(undisturbed, tmp_path / 'to', '--dense=True') is None
    words = capsys.readouterr().out.split()
    own, dense = (float(words[words.index(before) + 1].rstrip(',')) for before in ('loss', 'exported,'))
    assert own == pytest.approx(info(undisturbed)['val_loss'], abs=1e-6) and abs(dense - own) > 1e-5
    flags = [*FLAGS, '--block_types=tp', '--eval_tokens=1000', '--eval_only=True']
    assert run(tmp_path / 'new', *flags, f'--init_from={tmp_path}/to') == 0
    assert f'val loss {dense:.6f}' in capsys.readouterr().out
    other = corpus._replace(meta=corpus.meta | dict(splits=dict(val=dict(sha256='abc'))))
    for name, opened, words in (('again', lambda name: open_corpus(name, tmp_path), 'there is no dataset'),
                                ('other', lambda name: other, 'the validation tokens of pystdlib are not')):
        monkeypatch.setattr(export, 'open_corpus', opened)
        assert exported(undisturbed, tmp_path / name, '--dense=True') is None
        assert f'warning: the change in loss is not measured: {words}' in capsys.readouterr().out
    again, to = (GPT2LMHeadModel.from_pretrained(tmp_path / name).state_dict() for name in ('again', 'to'))
    torch.testing.assert_close(again, to, rtol=0, atol=0)


def test_a_scale_of_the_embeddings_is_folded_in():
    config = GPTConfig(block_size=8, vocab_size=29, n_layer=2, n_head=2, n_embd=8, bias=True, tp_size=1,
                       embed_scale=8.0)
    assert export.differences_to_dense(vars(config)) == []
    model = GPT(config)
    idx, logits = torch.randint(29, (B, 8)), []
    for scale in 8.0, 1.0:
        model.config.embed_scale = scale
        logits.append(model(idx)[0])
        model.load_state_dict(export.fold(model.state_dict(), 8.0))
    assert torch.equal(*logits)


def test_merges_are_found_again():
    text = (ROOT / 'model.py').read_text()[:6000]
    ranks = dict(byte_encoding()._mergeable_ranks)
    for token in ' s', 'er', '    ', '  ', ' se', 'self', ' self', 'se', 'lf':
        ranks.setdefault(token.encode(), None)
    # a token may only be made of earlier ones
    ranks = {token: rank for rank, token in enumerate(sorted(ranks, key=len))}
    gpt2_pattern = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
    encoding = tiktoken.Encoding('test', pat_str=gpt2_pattern, mergeable_ranks=ranks,
                                 special_tokens={'<|endoftext|>': len(ranks)})
    ids = export.hub_tokenizer(encoding).encode(text).ids
    assert ids == encoding.encode(text) and len(ids) < len(text)
