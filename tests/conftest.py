"""Tiny models and fixtures shared by the tests. Nothing is downloaded."""
import json
import os
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
REFERENCE = Path(__file__).parent / "reference"
sys.path.insert(0, str(ROOT))

# Tests run on the CPU even if there is a GPU, because their tolerances (1e-5) and their two ranks
# are meant for a CPU. So no test process sees a GPU, except those of tests/train/test_gpu.py, which
# use GPUS. (The processes of pytest-xdist inherit both variables.)
GPUS = os.environ.setdefault("GPUS_OF_TESTS", os.environ.get("CUDA_VISIBLE_DEVICES", "all"))
os.environ["CUDA_VISIBLE_DEVICES"] = ""

from fusedit_lib import threads

threads.limit_spinning()                    # before torch is imported

import pytest
import torch

WORDS = "a the red green blue small large circle square star and above below of imagine :".split()


def tiny_tokenizer(folder):
    """Save a word-level tokenizer with Gemma's special tokens in the format of transformers."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast
    words = ["<pad>", "<eos>", "<bos>", "<unk>", *WORDS]
    vocab = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", vocab["<bos>"])])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>",
                                   eos_token="<eos>", bos_token="<bos>", unk_token="<unk>")
    fast.save_pretrained(folder)


def tiny_gemma(folder, kind="gemma2", seed=0, **changes):
    """Save a random Gemma of 4 layers with transformers. Returns the transformers model.

    kind: "gemma", "gemma2" or "gemma3". changes: other values for its config.
    """
    import transformers
    shape = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=4,
                 num_attention_heads=4, num_key_value_heads=2, head_dim=16, pad_token_id=0,
                 attn_implementation="eager")
    shape |= changes
    if kind == "gemma":
        config = transformers.GemmaConfig(**shape)
        model_class = transformers.GemmaModel
    elif kind == "gemma2":
        shape.setdefault("query_pre_attn_scalar", 24)
        config = transformers.Gemma2Config(**shape, attn_logit_softcapping=None)
        model_class = transformers.Gemma2Model
    else:
        # 6 layers: five with a window of 3 tokens, and one without; two rotary bases.
        shape["num_hidden_layers"] = 6
        config = transformers.Gemma3TextConfig(**shape, sliding_window=3, query_pre_attn_scalar=24)
        model_class = transformers.Gemma3TextModel

    torch.manual_seed(seed)
    model = model_class(config).eval()
    with torch.no_grad():                   # transformers initialises norms with 0
        for p in model.parameters():
            if p.dim() == 1:
                p.normal_(std=0.3)
            else:
                p.normal_(std=p.shape[-1] ** -0.5)
    model.save_pretrained(folder)
    tiny_tokenizer(folder)
    return model


def tiny_clip(folder):
    """Save a random CLIP text model with 24-dimensional vectors. Returns the folder."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection
    config = CLIPTextConfig(
        vocab_size=600, hidden_size=16, intermediate_size=32, num_hidden_layers=2, eos_token_id=1,
        num_attention_heads=2, projection_dim=24)
    torch.manual_seed(0)
    CLIPTextModelWithProjection(config).save_pretrained(folder)

    # CLIP's tokenizer: two special tokens, 256 bytes, the same 256 at the end of a word, no merges.
    characters = sorted(ByteLevel.alphabet())
    at_the_end = [character + "</w>" for character in characters]
    tokens = ["<|startoftext|>", "<|endoftext|>", *characters, *at_the_end]
    vocab = {token: i for i, token in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return folder


def tiny_vae(folder, stages=3, seed=0, **changes):
    """Save a random VAE with this number of resolutions and 4 channels. changes: to config.json."""
    from safetensors.torch import save_file

    from fusedit_lib.vae import VAE, VAEConfig
    shape = dict(block_out_channels=[8] * stages, layers_per_block=1, latent_channels=4,
                 norm_num_groups=4, use_quant_conv=False, use_post_quant_conv=False,
                 scaling_factor=1.5, shift_factor=0.25)
    shape |= changes
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(shape))
    torch.manual_seed(seed)
    vae = VAE(VAEConfig.from_dict(shape, folder))
    save_file(vae.state_dict(), folder / "diffusion_pytorch_model.safetensors")
    return folder


def assert_near(got, want, near):
    """Assert that the largest difference is at most `near` times the largest value."""
    assert got.shape == want.shape, (got.shape, want.shape)
    difference = (got.double() - want.double()).abs().max().item()
    distance = difference / want.double().abs().max().item()
    assert distance <= near, f"{distance:.1e} of the largest value away"


@pytest.fixture
def float64(monkeypatch):
    """Compute everything in float64, even what the code computes in float32, to test identities.

    float32 rounds differently from machine to machine, which would hide a small error.
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
