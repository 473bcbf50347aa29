"""Trains a Gemma 2 with two million parameters, which is the demo's frozen text tower.

It is trained on the text of training_text.py and saved like any other Gemma. The report shows the
share of questions about unseen captions that the model answers correctly.
"""
import json
import math
import random
import time
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from fusedit_lib.files import atomic_folder
from fusedit_lib.seeds import torch_seed
from fusedit_lib.shapes import scenes
from fusedit_lib.shapes.scenes import Scene
from fusedit_lib.shapes.training_text import PAD_ID, batches, vocabulary

# The files that save() writes; --overwrite replaces a folder only if it contains nothing else.
FILES = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
         "tokenizer_config.json"}


# ---------------------------------------------------------------------------- model
def build(vocab_size: int):
    """A randomly initialised Gemma 2 for a vocabulary of this size."""
    from transformers import Gemma2Config, Gemma2ForCausalLM
    config = Gemma2Config(
        vocab_size=vocab_size, hidden_size=128, num_hidden_layers=8, intermediate_size=352,
        num_attention_heads=4, num_key_value_heads=2, head_dim=64, query_pre_attn_scalar=64,
        max_position_embeddings=512, sliding_window=512, tie_word_embeddings=True,
        attn_logit_softcapping=None, final_logit_softcapping=None, attn_implementation="eager",
        pad_token_id=PAD_ID, eos_token_id=1, bos_token_id=2, initializer_range=0.05)
    return Gemma2ForCausalLM(config)


def build_tokenizer(words: list[str]):
    """A tokenizer with one token per lower-case word, which AutoTokenizer loads like any other."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast
    ids = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", ids["<bos>"])])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>",
        unk_token="<unk>", padding_side="right", model_max_length=512)


# ---------------------------------------------------------------------------- training
def next_token_loss(model, ids: torch.Tensor) -> torch.Tensor:
    """The mean cross entropy of the next token over ids [B,T], ignoring padding."""
    inputs = ids[:, :-1]
    targets = ids[:, 1:]
    mask = (inputs != PAD_ID).long()
    logits = model(input_ids=inputs, attention_mask=mask).logits         # [B,T-1,vocabulary]
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=PAD_ID)


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warmup over the first twentieth of the steps, capped by a cosine decay to 0."""
    warmup_steps = max(1, steps // 20)
    cosine = 0.5 + 0.5 * math.cos(math.pi * step / steps)
    return peak * min(step / warmup_steps, cosine)


def train(model, texts, steps, lr, device) -> None:
    """Train a model, which is in evaluation mode afterwards. lr: the peak learning rate.

    texts: yields (token ids [B,T] padded on the right with PAD_ID, anything).
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr, betas=(0.9, 0.98), weight_decay=0.05)

    start = time.time()
    losses = []                         # since the last log line
    for step in tqdm(range(1, steps + 1), unit="step", desc="training", disable=None):
        optimizer.param_groups[0]["lr"] = learning_rate(step, steps, lr)
        batch, _ = next(texts)
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            loss = next_token_loss(model, batch.to(device))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

        losses.append(loss.item())
        if step % 100 == 0 or step == steps:
            mean = sum(losses) / len(losses)
            tqdm.write(f"step {step}/{steps}  loss {mean:.4f}  {time.time() - start:.0f} s")
            losses = []
    model.eval()


# ---------------------------------------------------------------------------- report
def held_out_scene(rng: random.Random) -> Scene:
    """A random full scene that contains a held-out composition."""
    while True:
        scene = scenes.random_scene(rng)
        if scenes.is_held_out(scene):
            return scene


@torch.no_grad()
def answer_accuracy(model, ids: dict, draw_scene, count=768, seed=1) -> dict[str, float]:
    """The share of correct answers in `count` new texts, by kind of question and for "all".

    An answer is correct if each of its tokens is the one that the model finds most likely.
    draw_scene: returns a random full scene, as in training_text.batches.
    """
    rng = random.Random(f"answers {seed}")
    correct = {}                        # kind of question -> one bool per answer
    for batch, answers in islice(batches(rng, 64, ids, draw_scene), count // 64):
        predicted = model(input_ids=batch.to(model.device)).logits.argmax(-1).cpu()
        for row, predicted_row, spans in zip(batch, predicted, answers, strict=True):
            for span in spans:
                if span.kind == "again":                   # many wordings would be correct
                    continue
                answer = row[span.start:span.end]
                guess = predicted_row[span.start - 1:span.end - 1]
                correct.setdefault(span.kind, []).append(torch.equal(answer, guess))

    scores = {kind: sum(results) / len(results) for kind, results in sorted(correct.items())}
    everything = [result for results in correct.values() for result in results]
    scores["all"] = sum(everything) / len(everything)
    return scores


def print_accuracy(model, words, title, draw_scene):
    ids = {word: i for i, word in enumerate(words)}
    scores = answer_accuracy(model, ids, draw_scene)
    shown = ", ".join(f"{kind} {score:.1%}" for kind, score in scores.items())
    print(f"correct answers on {title}: {shown}")


# ---------------------------------------------------------------------------- saving
def save(model, words: list[str], folder: Path) -> None:
    """Save like any other Gemma: config.json, model.safetensors (bfloat16), tokenizer.json."""
    model.to(torch.bfloat16).save_pretrained(folder)
    build_tokenizer(words).save_pretrained(folder)

    # name a tokenizer class that exists in every version of transformers
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(config, indent=2) + "\n")


def replaced_folder(out: Path, overwrite: bool):
    """A temporary folder, for `with`, that becomes `out`: see atomic_folder."""
    return atomic_folder(out, FILES, "a tiny Gemma", overwrite)


def make(out: Path, steps, batch_size, lr, seed, device, overwrite=False) -> None:
    """Train a model, print its report and save it to `out`.

    `out` then contains the complete model. If anything fails, `out` is left unchanged.
    """
    with replaced_folder(out, overwrite) as tmp:
        torch.manual_seed(torch_seed(seed))
        words = vocabulary()
        ids = {word: i for i, word in enumerate(words)}
        model = build(len(words)).to(device)
        texts = batches(random.Random(f"text {seed}"), batch_size, ids)
        train(model, texts, steps, lr, device)
        print_accuracy(model, words, "scenes like those in training", scenes.training_scene)
        print_accuracy(model, words, "held-out compositions", held_out_scene)
        save(model, words, tmp)
    print(f"wrote {out}")
