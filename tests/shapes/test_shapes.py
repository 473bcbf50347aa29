"""The demo's world: grammar, held-out compositions, renderer, detector, and its tiny reader."""
import io
import json
import random
from collections import Counter
from dataclasses import replace
from functools import partial
from itertools import combinations, pairwise

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image, ImageFilter

from fusedit import FuseDiTConfig, FuseDiTError, preset
from fusedit_lib.data.shapes import shapes_sample
from fusedit_lib.shapes import detector, scenes, tiny_gemma
from fusedit_lib.shapes.render import render
from fusedit_lib.shapes.scenes import COLOURS, SHAPES, Group, Scene

WORDS = tiny_gemma.vocabulary()
COLOUR_WORDS = {c: c for c in COLOURS} | {"grey": "gray"}
SHAPE_WORDS = {s: s for s in SHAPES} | {scenes.plural(s): s for s in SHAPES}


def training(n, seed=0):
    rng = random.Random(seed)
    return [(scenes.training_scene(rng), rng) for _ in range(n)]


def picture(scene, rng, size=32):
    return render(scene, scenes.place(scene, rng), size)


# ---- grammar -------------------------------------------------------------------------------------

def test_the_grammar_covers_what_it_promises():
    seen = [s for s, _ in training(4000)]
    groups = [g for s in seen for g in s.groups]
    totals = [sum(g.count for g in s.groups) for s in seen]
    assert set(totals) == {1, 2, 3, 4} and min(map(totals.count, (1, 2, 3, 4))) > 200
    assert {s.relation for s in seen} == {*scenes.RELATIONS, None}
    assert {s.background for s in seen} == set(COLOURS)
    assert {g.size for g in groups} == set(scenes.SIZES)
    pairs = {g[2:] for g in groups}
    assert pairs == {(c, s) for c in COLOURS for s in SHAPES} - scenes.HELD_OUT_PAIRS
    assert all(s.background not in [g.colour for g in s.groups] for s in seen)


def test_colours_are_far_apart():
    for a, b in combinations(COLOURS.values(), 2):
        assert np.linalg.norm(np.subtract(a, b)) > 100, (a, b)


def test_training_never_contains_what_is_held_out():
    """Checked on what is written to shards, by the words of both captions and by the pixels."""
    for i in range(1500):
        sample = shapes_sample(3, 32, i)
        for kind in ("synthetic_caption.txt", "original_caption.txt"):
            words = tiny_gemma.split(sample[kind].decode())
            shapes = {SHAPE_WORDS[w] for w in words if w in SHAPE_WORDS}
            assert not any(both <= shapes for both in scenes.HELD_OUT_TOGETHER), words
            for count, colour, shape in zip(words, words[1:], words[2:]):
                pair = COLOUR_WORDS.get(colour), SHAPE_WORDS.get(shape)
                assert pair not in scenes.HELD_OUT_PAIRS, words
                if None not in pair and count in scenes.NUMBERS[2:]:
                    assert not scenes.is_held_out_count(scenes.NUMBERS.index(count), *pair), words
        if i < 150:                         # what no caption says is held out as well
            seen = detector.read(Image.open(io.BytesIO(sample["image.png"]))).objects
            assert not scenes.is_held_out(Scene(tuple(
                Group(1, o.size, o.colour, o.shape) for o in seen), None, None))


def test_a_known_composition_of_each_kind_is_held_out():
    one = Group(1, "small", "white", "circle")
    two = Group(2, "small", "white", "circle")
    assert not scenes.is_held_out(Scene((one,), None, "black"))
    assert scenes.is_held_out(Scene((Group(1, "large", "red", "star"),), None, "black"))
    assert scenes.is_held_out(Scene((one, Group(1, "small", "pink", "cross")), None, "black"))
    apart = (one, one._replace(size="large"))              # two white circles, said one by one
    assert scenes.is_held_out(Scene(apart, None, "black")) == scenes.is_held_out(
        Scene((two,), None, "black"))
    held = [(n, c, s) for n in (2, 3, 4) for c in COLOURS for s in SHAPES
            if scenes.is_held_out_count(n, c, s)]
    assert len(held) == 34 and (3, "pink", "square") in held
    assert [len({h[k] for h in held}) for k in range(3)] == [3, len(COLOURS), len(SHAPES)]


def test_captions_say_what_is_said_and_nothing_else():
    for scene, rng in training(3000):
        said = scenes.forget(scene, rng)
        words = tiny_gemma.split(scenes.caption(said, rng))
        colours = {COLOUR_WORDS[w] for w in words if w in COLOUR_WORDS}
        assert colours == ({g.colour for g in said.groups} | {said.background}) - {None}
        assert {SHAPE_WORDS[w] for w in words if w in SHAPE_WORDS} == {g.shape for g in said.groups}
        sizes = {"big": "large", "little": "small", "large": "large", "small": "small"}
        assert {sizes[w] for w in words if w in sizes} == {g.size for g in said.groups} - {None}
        for full, part in zip(scene.groups, said.groups, strict=True):
            assert all(p in (None, f) for f, p in zip(full, part))
        assert " a orange" not in " " + " ".join(words) and len(words) + 1 <= 32


def test_captions_tell_objects_of_one_shape_apart():
    for scene, rng in training(3000):
        said = scenes.forget(scene, rng, size=0, colour=0)
        assert len(set(said.groups)) == len(said.groups), said


def test_only_the_usual_goes_unsaid():
    """A white background, black ink (white on black), large, left of: what a caption may omit."""
    unsaid = Counter()
    for scene, rng in training(3000):
        said = scenes.forget(scene, rng)
        pen = "white" if scene.background == "black" else "black"
        for full, part in zip(scene.groups, said.groups, strict=True):
            for field, usual in (("size", "large"), ("colour", pen)):
                assert getattr(part, field) or getattr(full, field) == usual
                unsaid[field] += getattr(part, field) is None
        assert said.background or scene.background == "white"
        assert said.relation == scene.relation or scene.relation == "left of"
        unsaid["background"] += said.background is None
        unsaid["relation"] += said.relation != scene.relation
    assert min(unsaid.values()) > 60, unsaid                # each of them really happens


def test_objects_stand_in_reading_order():
    for scene, rng in training(1000):
        discs = scenes.place(scene, rng)
        if not scene.relation:
            for a, b in pairwise(discs):
                assert b.x - a.x > 2 * abs(b.y - a.y) or b.y - a.y > scenes.SIDE / 4


def test_relation_captions_name_the_true_side():
    said = Scene((Group(1, None, "red", "star"), Group(1, None, "blue", "circle")), "above", None)
    texts = {scenes.caption(said, random.Random(i)) for i in range(300)}
    for text in texts:
        words = text.split()
        down = {"above", "over"} & set(words)
        assert bool(down) != bool({"below", "under"} & set(words)), text
        assert (words.index("star") < words.index("circle")) == bool(down), text
    assert "a red star above a blue circle" in texts and len(texts) > 10


def test_objects_never_touch_each_other_or_the_border():
    rng = random.Random(1)
    for _ in range(1500):
        scene = scenes.draw_scene(rng)
        discs = scenes.place(scene, rng)
        assert len(discs) == sum(g.count for g in scene.groups)
        for a in discs:
            assert scenes.BORDER + a.r <= min(a.x, a.y)
            assert max(a.x, a.y) <= scenes.SIDE - scenes.BORDER - a.r
        for a, b in combinations(discs, 2):
            assert np.hypot(a.x - b.x, a.y - b.y) >= a.r + b.r + 2 * scenes.BORDER
        if scene.relation:
            a, b = discs
            dx, dy = b.x - a.x, b.y - a.y
            side = {"left of": dx, "right of": -dx, "above": dy, "below": -dy}[scene.relation]
            assert side > 0 and side == max(abs(dx), abs(dy))


# ---- detector ------------------------------------------------------------------------------------

@pytest.mark.parametrize("size, n", [(32, 250), (48, 80), (64, 80)])
def test_ground_truth_is_read_back(size, n):
    for i in range(n):
        rng = random.Random(i)
        scene = scenes.draw_scene(rng)
        assert detector.verdict(scene, detector.read(picture(scene, rng, size))) == "", scene


def test_soft_and_noisy_pictures_are_read_back():
    right = 0
    for i in range(60):
        rng = random.Random(i)
        scene = scenes.draw_scene(rng)
        image = picture(scene, rng, 64).filter(ImageFilter.GaussianBlur(1))
        noise = np.random.default_rng(i).normal(0, 12, (64, 64, 3))
        image = Image.fromarray((np.asarray(image) + noise).clip(0, 255).astype(np.uint8))
        right += detector.verdict(scene, detector.read(image)) == ""
    assert right >= 54


def test_every_wrong_attribute_is_noticed():
    """Each picture is right for its scene, and wrong as soon as one word of it changes."""
    for scene, rng in training(60, seed=2):
        reading, g, rest = detector.read(picture(scene, rng)), scene.groups[0], scene.groups[1:]
        other = {"size": "small" if g.size == "large" else "large", "count": g.count + 1,
                 "colour": next(c for c in COLOURS if c not in [scene.background, *(
                     o.colour for o in scene.groups)]),
                 "shape": next(s for s in SHAPES if s not in [o.shape for o in scene.groups])}
        assert detector.verdict(scene, reading) == ""
        for field, value in other.items():
            wrong = scene._replace(groups=(g._replace(**{field: value}), *rest))
            assert detector.verdict(wrong, reading) != "", (field, scene)
        assert detector.verdict(scene._replace(background=other["colour"]), reading) != ""
        if scene.relation:
            wrong = scene._replace(relation=scenes.OPPOSITE[scene.relation])
            assert detector.verdict(wrong, reading) == f"not {wrong.relation}"


def test_colours_are_bound_to_their_shapes():
    scene = Scene((Group(1, "large", "red", "circle"), Group(1, "large", "blue", "star")), None,
                  "white")
    swapped = Scene((Group(1, "large", "blue", "circle"), Group(1, "large", "red", "star")), None,
                    "white")
    reading = detector.read(picture(scene, random.Random(0)))
    assert detector.verdict(scene, reading) == ""
    assert "large blue star" in detector.verdict(swapped, reading)


def test_no_shape_where_there_is_none():
    """Noise, an empty picture and a blot are not shapes."""
    empty = Image.new("RGB", (64, 64), COLOURS["white"])
    assert detector.read(empty) == detector.Reading((), "white")
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    assert all(o.shape == "?" or o.colour == "?"
               for o in detector.read(Image.fromarray(noise)).objects)
    empty.paste(COLOURS["red"], (5, 30, 60, 34))           # a long bar
    assert [o.shape for o in detector.read(empty).objects] == ["?"]


# ---- the reader ----------------------------------------------------------------------------------

def test_the_vocabulary_covers_captions_and_text():
    assert WORDS[:4] == ["<pad>", "<eos>", "<bos>", "<unk>"]
    assert len(WORDS) == len(set(WORDS)) < 200
    ids, longest = {w: i for i, w in enumerate(WORDS)}, 0
    for scene, rng in training(1500, seed=4):
        tokens, answers = tiny_gemma.encode(tiny_gemma.text(scenes.forget(scene, rng), rng), ids)
        longest = max(longest, len(tokens))
        assert all(0 < a < b < len(tokens) for _, a, b in answers)
    assert longest <= tiny_gemma.MAX_TOKENS + 1
    assert all(set(tiny_gemma.split(p)) <= set(WORDS)
               for *_, p in scenes.evaluation_prompts(600))


def test_answers_are_true():
    said = Scene((Group(1, "small", "red", "circle"), Group(2, None, "blue", "square"),
                  Group(1, "large", "red", "star")), None, "white")
    related = Scene((Group(1, None, "pink", "heart"), Group(1, "large", "black", "cross")),
                    "left of", None)
    answers = {}
    for seed in range(3000):
        rng = random.Random(seed)
        parts = tiny_gemma.text(said if seed % 2 else related, rng)
        for (question, _), (answer, kind) in zip(parts, parts[1:]):
            if kind not in ("", "again", "twice"):
                answers.setdefault((seed % 2, question), set()).add(answer)
    assert all(len(found) == 1 for found in answers.values())
    expected = {
        (1, "what color is the circle ?"): "red", (1, "what color are the squares ?"): "blue",
        (1, "what size is the star ?"): "large", (1, "what size are the squares ?"): "unknown",
        (1, "what shape is blue ?"): "square", (1, "what color is the background ?"): "white",
        (1, "how many objects ?"): "four", (1, "how many squares ?"): "two",
        (1, "how many hearts ?"): "zero", (1, "is there a blue circle ?"): "no",
        (1, "is there a red star ?"): "yes",
        (1, "list :"): "a small red circle , two blue squares , a large red star , on white",
        (0, "where is the heart ?"): "left of the cross",
        (0, "what is right of the heart ?"): "a large black cross",
        (0, "what is left of the cross ?"): "a pink heart",
        (0, "what is above the cross ?"): "nothing",
        (0, "what color is the background ?"): "unknown",
    }
    for question, answer in expected.items():
        assert answers[question] == {answer}, question
    assert (1, "what shape is large ?") not in answers     # the squares' size is not known


def test_make_saves_a_gemma_that_loads_like_any_other(tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from fusedit_lib.pretrained import build_model
    few = partial(tiny_gemma.answer_accuracy, count=64)
    monkeypatch.setattr(tiny_gemma, "answer_accuracy", few)
    out = tmp_path / "gemma"
    tiny_gemma.make(out, 2, 4, 1e-3, 0, torch.device("cpu"))
    config = json.loads((out / "config.json").read_text())
    assert config["model_type"] == "gemma2" and config["sliding_window"] > tiny_gemma.MAX_TOKENS
    assert json.loads((out / "tokenizer_config.json").read_text())[
        "tokenizer_class"] == "PreTrainedTokenizerFast"
    tok = AutoTokenizer.from_pretrained(out)
    batch = tok(["A Large, RED circle", "zebra"], padding=True)
    assert [tok.convert_ids_to_tokens(row) for row in batch["input_ids"]] == [
        ["<bos>", "a", "large", ",", "red", "circle"],
        ["<bos>", "<unk>", "<pad>", "<pad>", "<pad>", "<pad>"]]
    assert AutoModelForCausalLM.from_pretrained(out).dtype == torch.bfloat16
    assert (out / "model.safetensors").stat().st_size < 4_000_000
    model = build_model(preset("demo", base=str(out)))
    text = model.encode(["a red circle", ""])
    assert text.keys[0].shape[:1] == (2,) and text.mask.sum(1).tolist() == [4, 1]
    (out / "notes.txt").write_text("mine")
    for overwrite in (False, True):         # only what it wrote itself may go
        with pytest.raises(FuseDiTError, match="not empty"):
            tiny_gemma.make(out, 2, 4, 1e-3, 0, torch.device("cpu"), overwrite=overwrite)
    assert [p.name for p in tmp_path.iterdir()] == ["gemma"]


def test_a_failed_training_leaves_the_old_model(tmp_path, monkeypatch):
    out = tmp_path / "gemma"
    out.mkdir()
    (out / "tokenizer.json").write_text("old")
    monkeypatch.setattr(tiny_gemma, "loss_of", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        tiny_gemma.make(out, 2, 4, 1e-3, 0, torch.device("cpu"), overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["gemma"]
    assert (out / "tokenizer.json").read_text() == "old"


def test_the_shipped_model_is_the_preset():
    shipped = FuseDiTConfig(**json.loads((ROOT / "demo/config.json").read_text()))
    assert replace(shipped, base="demo/gemma") == preset("demo")


@pytest.mark.skipif(not (ROOT / "demo/gemma").exists(), reason="the demo's reader is not there")
def test_the_shipped_reader_knows_these_words_and_binds():
    from transformers import AutoModelForCausalLM
    vocab = json.loads((ROOT / "demo/gemma/tokenizer.json").read_text())["model"]["vocab"]
    assert vocab == {w: i for i, w in enumerate(WORDS)}
    model = AutoModelForCausalLM.from_pretrained(ROOT / "demo/gemma", dtype=torch.float32)
    for draw in (scenes.training_scene, tiny_gemma.held_out_scene):
        scores = tiny_gemma.answer_accuracy(model, vocab, draw, count=128)
        assert scores["field"] > 0.75 and scores["count"] > 0.75, scores
