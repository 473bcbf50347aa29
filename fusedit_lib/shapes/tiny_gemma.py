"""A Gemma 2 of two million parameters that has read enough about scenes to be the demo's reader.

What a frozen reader is good for is decided by what its own training asked of it. On captions
alone, next-token loss never asks which colour went with which shape: any colour may follow "a",
so nothing is lost by forgetting it. Here every text goes on: the caption again in other words,
statements, questions and answers ("what color is the small circle ? red"). To guess those, the
keys and values at the words of the caption must carry colour, size, number and place, each bound
to its object; and these keys and values are what the DiT attends to.
"""
import json
import math
import os
import random
import re
import shutil
import time
from itertools import islice
from pathlib import Path

import torch
from tqdm import tqdm

from fusedit import FuseDiTError
from fusedit_lib.shapes import scenes
from fusedit_lib.shapes.scenes import NUMBERS, OPPOSITE, RELATIONS, Group, Scene, describe, plural

SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>")
EXTRA = """, . ? : a an the is are it in of on to there and with against over under left right above
below background picture image drawing photo big little grey zero one two three four what which
how many color colour size shape where objects same list yes no unknown nothing none
""".split()
MAX_TOKENS = 128
FILES = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
         "tokenizer_config.json"}                          # what save() writes


def vocabulary() -> list[str]:
    """Every word the demo can read, most special first: its index is its token id."""
    words = [*SPECIAL, *scenes.COLOURS, *scenes.SIZES, *scenes.SHAPES,
             *map(plural, scenes.SHAPES), *EXTRA]
    return list(dict.fromkeys(words))


def split(text: str) -> list[str]:
    return re.findall(r"\w+|[^\w\s]", text)


# ---- the text ------------------------------------------------------------------------------------
# A text is a list of (words, is_answer): what is scored in the report is the answers.

def name(said: Scene, k: int, rng: random.Random) -> str | None:
    """Words that name group k among all that is said, without an article; None if none do."""
    g, others = said.groups[k], said.groups[:k] + said.groups[k + 1:]
    noun = g.shape if g.count == 1 else plural(g.shape)
    fits = [[]] if all(o.shape != g.shape for o in others) else []
    for field in ("colour", "size"):
        if value := getattr(g, field):
            if all(o.shape != g.shape or getattr(o, field) not in (value, None) for o in others):
                fits.append([value])
    if not fits:
        return None
    return " ".join([*rng.choice(fits), noun])


def ask_field(said, rng):
    """"what color is the circle ?": what was said of it, or unknown."""
    k, field = rng.randrange(len(said.groups)), rng.choice(("colour", "colour", "size"))
    g, who = said.groups[k], name(said, k, rng)
    if who is None or (getattr(g, field) or "-") in who.split():
        return None
    word = rng.choice(("color", "color", "colour")) if field == "colour" else field
    verb = "is" if g.count == 1 else "are"
    return f"what {word} {verb} the {who} ?", getattr(g, field) or "unknown"


def ask_which(said, rng):
    """"what is red ?": the circle."""
    k, field = rng.randrange(len(said.groups)), rng.choice(("colour", "size"))
    g = said.groups[k]
    value = getattr(g, field)
    if value is None or any(getattr(o, field) in (value, None) for o in said.groups if o is not g):
        return None
    return f"what shape is {value} ?", g.shape


def ask_background(said, rng):
    return "what color is the background ?", said.background or "unknown"


def ask_count(said, rng):
    """"how many small squares ?": counted over the groups; none of a shape that is not there."""
    if rng.random() < 0.2:
        return "how many objects ?", NUMBERS[sum(g.count for g in said.groups)]
    shape = rng.choice([g.shape for g in said.groups] * 3 + list(scenes.SHAPES))
    same = [g for g in said.groups if g.shape == shape]
    colours = [g.colour for g in same if g.colour]
    if len(colours) == len(same) > 0 and rng.random() < 0.4:
        colour = rng.choice(colours + [rng.choice(list(scenes.COLOURS))])
        count = sum(g.count for g in same if g.colour == colour)
        return f"how many {colour} {plural(shape)} ?", NUMBERS[count]
    return f"how many {plural(shape)} ?", NUMBERS[sum(g.count for g in same)]


def ask_exists(said, rng):
    """"is there a green circle ?": often of a colour or shape taken from another object."""
    g = rng.choice(said.groups)
    colours = [o.colour for o in said.groups] + [said.background, rng.choice(list(scenes.COLOURS))]
    colour = g.colour if rng.random() < 0.5 else rng.choice(colours)
    if colour is None:
        return None
    same = [o for o in said.groups if o.shape == g.shape]
    if any(o.colour is None for o in same):
        return None
    yes = any(o.colour == colour for o in same)
    return f"is there {scenes.article(colour)} {g.shape} ?", "yes" if yes else "no"


def ask_place(said, rng):
    """"what is left of the star ?", "where is the circle ?", from either side."""
    if not said.relation:
        return None
    k = rng.randrange(2)
    relation = said.relation if k == 0 else OPPOSITE[said.relation]    # of group k to the other
    who, other = name(said, k, rng), name(said, 1 - k, rng)
    if who is None or other is None:
        return None
    if rng.random() < 0.5:
        return f"where is the {who} ?", f"{relation} the {said.groups[1 - k].shape}"
    wrong = rng.random() < 0.3
    asked = rng.choice([r for r in RELATIONS if r != relation]) if wrong else relation
    return f"what is {asked} the {other} ?", "nothing" if wrong else plain(said.groups[k])


def plain(group: Group) -> str:
    """All that is said of a group, in one fixed wording: "a large red circle"."""
    return describe(group, STILL)


class _Still(random.Random):
    """Always the first choice: no synonyms."""
    def choice(self, seq):
        return seq[0]


STILL = _Still(0)


def rank(group: Group) -> tuple:
    """Shapes in the order of SHAPES, one shape by colour, then small before large."""
    return (scenes.SHAPES.index(group.shape), list(scenes.COLOURS).index(group.colour)
            if group.colour else -1, group.size == "large")


def ask_list(said, rng):
    """"list : a large red circle , two stars , on white": everything, in an order of its own."""
    groups = sorted(said.groups, key=rank)
    return "list :", " , ".join([*map(plain, groups), f"on {said.background or 'unknown'}"])


def ask_again(said, rng):
    """The caption in other words: after it, only the choice of words is left to guess."""
    return "same :", scenes.caption(said, rng)


ASK = {ask_field: 6, ask_which: 3, ask_background: 2, ask_count: 3, ask_exists: 2, ask_place: 6,
       ask_list: 3, ask_again: 3}


def text(said: Scene, rng: random.Random) -> list[tuple[str, str]]:
    """[(words, kind of answer or "")]: a caption, then said again, asked about, or both.

    Few questions, none twice: each has to be answered from the caption, not from an answer.
    """
    first = scenes.caption(said, rng) + " ."
    parts = [(first, "")]
    if rng.random() < 0.3:                                 # said twice, word for word
        parts.append((first, "twice"))
    asked = set()
    for ask in rng.choices(list(ASK), list(ASK.values()), k=rng.randint(2, 7)):
        question, answer = ask(said, rng) or ("", "")
        if question and question not in asked:
            asked.add(question)
            parts += [(question, ""), (answer, ask.__name__[4:]), (".", "")]
    return parts


def encode(parts: list, ids: dict) -> tuple[list[int], list[tuple[str, int, int]]]:
    """Token ids of a text, at most MAX_TOKENS, and where its answers are: (kind, start, end)."""
    tokens, answers = [ids["<bos>"]], []
    for words, kind in parts:
        new = [ids[w] for w in split(words)]
        if len(tokens) + len(new) >= MAX_TOKENS:
            break
        if kind:                            # that the caption comes twice cannot be foreseen
            first = len(tokens) + (kind == "twice")
            answers.append((kind, first, len(tokens) + len(new)))
        tokens += new
    return tokens + [ids["<eos>"]], answers


def batches(rng: random.Random, size: int, ids: dict, draw=scenes.training_scene, pool=16):
    """Endlessly: token ids [B, T], right-padded with 0, and the answers of every row.

    Texts of like length go together, from a pool of many batches: half the tokens otherwise
    would be padding.
    """
    while True:
        rows = [encode(text(scenes.forget(draw(rng), rng), rng), ids) for _ in range(size * pool)]
        rows.sort(key=lambda row: len(row[0]))
        for k in rng.sample(range(pool), pool):
            part = rows[k * size:(k + 1) * size]
            longest = len(part[-1][0])
            yield (torch.tensor([tokens + [0] * (longest - len(tokens)) for tokens, _ in part]),
                   [answers for _, answers in part])


# ---- the model -----------------------------------------------------------------------------------

def build(words: int):
    """A Gemma 2 as small as this vocabulary allows, fresh."""
    from transformers import Gemma2Config, Gemma2ForCausalLM
    return Gemma2ForCausalLM(Gemma2Config(
        vocab_size=words, hidden_size=128, num_hidden_layers=8, intermediate_size=352,
        num_attention_heads=4, num_key_value_heads=2, head_dim=64, query_pre_attn_scalar=64,
        max_position_embeddings=512, sliding_window=512, tie_word_embeddings=True,
        attn_logit_softcapping=None, final_logit_softcapping=None, attn_implementation="eager",
        pad_token_id=0, eos_token_id=1, bos_token_id=2, initializer_range=0.05))


def build_tokenizer(words: list[str]):
    """One token a word, lower case; what AutoTokenizer loads like any other."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast
    ids = {w: i for i, w in enumerate(words)}
    tok = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tok.normalizer = normalizers.Lowercase()
    tok.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(),
                                                 pre_tokenizers.Punctuation()])
    tok.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", ids["<bos>"])])
    return PreTrainedTokenizerFast(
        tokenizer_object=tok, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>",
        unk_token="<unk>", padding_side="right", model_max_length=512)


def loss_of(model, ids: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=ids[:, :-1], attention_mask=(ids[:, :-1] != 0).long()).logits
    return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten(),
                                             ignore_index=0)


@torch.no_grad()
def answer_accuracy(model, ids: dict, draw, count=768, seed=1) -> dict[str, float]:
    """Share of answers of each kind whose every token is the model's first guess."""
    rng, right = random.Random(f"answers {seed}"), {}
    for rows, answers in islice(batches(rng, 64, ids, draw), count // 64):
        guess = model(input_ids=rows.to(model.device)).logits.argmax(-1).cpu()
        for row, guessed, spans in zip(rows, guess, answers, strict=True):
            for kind, a, b in spans:
                if kind != "again":                        # any of many wordings would be right
                    right.setdefault(kind, []).append(torch.equal(row[a:b], guessed[a - 1:b - 1]))
    scores = {kind: sum(r) / len(r) for kind, r in sorted(right.items())}
    return scores | {"all": sum(map(sum, right.values())) / sum(map(len, right.values()))}


def held_out_scene(rng: random.Random) -> Scene:
    while not scenes.is_held_out(scene := scenes.draw_scene(rng)):
        pass
    return scene


def train(steps, batch_size, lr, seed, device):
    """A trained model and its words."""
    torch.manual_seed(seed)
    words, rng = vocabulary(), random.Random(f"text {seed}")
    texts = batches(rng, batch_size, {w: i for i, w in enumerate(words)})
    model = build(len(words)).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr, betas=(0.9, 0.98), weight_decay=0.05)
    warmup, start, total = max(1, steps // 20), time.time(), 0.0
    bar = tqdm(range(1, steps + 1), unit="step", desc="reading", disable=None)
    for step in bar:
        rate = min(step / warmup, 0.5 + 0.5 * math.cos(math.pi * step / steps))
        optimizer.param_groups[0]["lr"] = lr * rate
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            loss = loss_of(model, next(texts)[0].to(device))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        total += loss.item()
        if step % 100 == 0 or step == steps:
            tqdm.write(f"step {step}/{steps}  loss {total / (step % 100 or 100):.4f}  "
                       f"{time.time() - start:.0f} s")
            total = 0.0
    return model.eval(), words


def save(model, words: list[str], folder: Path) -> None:
    """As any Gemma is saved: config.json, model.safetensors (bfloat16), tokenizer.json."""
    model.to(torch.bfloat16).save_pretrained(folder)
    build_tokenizer(words).save_pretrained(folder)
    settings = folder / "tokenizer_config.json"            # a class every transformers knows
    config = json.loads(settings.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    settings.write_text(json.dumps(config, indent=2) + "\n")


def make(out: Path, steps, batch_size, lr, seed, device, overwrite=False) -> None:
    """Train, report and save; `out` then holds a whole model, or what it held before."""
    taken = out.exists() and (not out.is_dir() or any(out.iterdir()))
    if taken and not (overwrite and out.is_dir() and {p.name for p in out.iterdir()} <= FILES):
        raise FuseDiTError(f"{out} is not empty; give a new folder" + (
            ", as --overwrite only replaces a tiny Gemma" if overwrite else " or --overwrite"))
    out.parent.mkdir(parents=True, exist_ok=True)
    tmp, old = (out.with_name(f".{out.name}.{os.getpid()}.{end}") for end in ("tmp", "old"))
    try:
        tmp.mkdir()
        model, words = train(steps, batch_size, lr, seed, device)
        ids = {w: i for i, w in enumerate(words)}
        for what, draw in (("scenes like the training's", scenes.training_scene),
                           ("held-out compositions", held_out_scene)):
            scores = answer_accuracy(model, ids, draw)
            print(f"answers right on {what}: "
                  + ", ".join(f"{kind} {score:.1%}" for kind, score in scores.items()))
        save(model, words, tmp)
        if out.exists():
            os.replace(out, old)
        os.replace(tmp, out)
    finally:
        if old.exists() and not out.exists():
            os.replace(old, out)
        shutil.rmtree(tmp, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
    print(f"wrote {out}")
