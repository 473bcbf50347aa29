"""Tiny models that the tests share. Nothing is downloaded."""
import json
import os
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
REFERENCE = Path(__file__).parent / "reference"
sys.path.insert(0, str(ROOT))

# Tests are of the CPU, to 1e-5 and with two ranks, also where there is a GPU: none of their
# processes sees it, but those of tests/test_gpu.py. (pytest-xdist's processes inherit both.)
GPUS = os.environ.setdefault("GPUS_OF_TESTS", os.environ.get("CUDA_VISIBLE_DEVICES", "all"))
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import pytest
import torch

WORDS = "a the red green blue small large circle square star and above below of imagine :".split()


def tiny_tokenizer(folder):
    """A word-level tokenizer with Gemma's special tokens, saved as transformers saves one."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast
    vocab = {w: i for i, w in enumerate(["<pad>", "<eos>", "<bos>", "<unk>", *WORDS])}
    tok = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tok.normalizer, tok.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    tok.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 2)])
    PreTrainedTokenizerFast(tokenizer_object=tok, pad_token="<pad>", eos_token="<eos>",
                            bos_token="<bos>", unk_token="<unk>").save_pretrained(folder)


def tiny_gemma(folder, kind="gemma2", seed=0, **changes):
    """A random Gemma of 4 layers, saved by transformers; returns transformers' own model."""
    import transformers as tf
    shape = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=4,
                 num_attention_heads=4, num_key_value_heads=2, head_dim=16, pad_token_id=0,
                 attn_implementation="eager") | changes
    if kind == "gemma":
        config, model = tf.GemmaConfig(**shape), tf.GemmaModel
    elif kind == "gemma2":
        config = tf.Gemma2Config(**dict(query_pre_attn_scalar=24) | shape,
                                 attn_logit_softcapping=None)
        model = tf.Gemma2Model
    else:
        # 6 layers: five with a window of 3 tokens, and one without; two rotary bases.
        config = tf.Gemma3TextConfig(**shape | dict(num_hidden_layers=6), sliding_window=3,
                                     query_pre_attn_scalar=24)
        model = tf.Gemma3TextModel
    torch.manual_seed(seed)
    model = model(config).eval()
    with torch.no_grad():                   # transformers starts norms at 0: give them a value
        for name, p in model.named_parameters():
            p.normal_(std=0.3 if p.dim() == 1 else p.shape[-1] ** -0.5)
    model.save_pretrained(folder)
    tiny_tokenizer(folder)
    return model


def tiny_clip(folder):
    """A random CLIP text model with vectors of 24 numbers, saved as transformers saves one."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection
    torch.manual_seed(0)
    CLIPTextModelWithProjection(CLIPTextConfig(
        vocab_size=600, hidden_size=16, intermediate_size=32, num_hidden_layers=2, eos_token_id=1,
        num_attention_heads=2, projection_dim=24)).save_pretrained(folder)
    # CLIP's tokenizer: 256 bytes, the same ending a word, no merges, two special tokens.
    chars = sorted(ByteLevel.alphabet())
    words = ["<|startoftext|>", "<|endoftext|>", *chars, *(c + "</w>" for c in chars)]
    (folder / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return folder


def assert_near(got, want, near):
    """The largest difference is at most `near` times the largest value."""
    assert got.shape == want.shape, (got.shape, want.shape)
    far = (got.double() - want.double()).abs().max().item() / want.double().abs().max().item()
    assert far <= near, f"{far:.1e} of the largest value away"


@pytest.fixture
def float64(monkeypatch):
    """All in float64, also what the code does in float32 for its range: so identities are exact.

    Float32 would round otherwise on other machines, and hide a small fault.
    """
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="session")
def gemma_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gemma")
    tiny_gemma(folder)
    return folder
