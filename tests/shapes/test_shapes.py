"""The demo's world: grammar, held-out compositions, renderer, detector, and tiny Gemma."""
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
from fusedit_lib.shapes import detector, scenes, tiny_gemma, training_text
from fusedit_lib.shapes.render import render
from fusedit_lib.shapes.scenes import COLOURS, SHAPES, Group, Scene

WORDS = training_text.vocabulary()
IDS = {word: i for i, word in enumerate(WORDS)}
COLOUR_OF_WORD = {colour: colour for colour in COLOURS} | {"grey": "gray"}
SHAPE_OF_WORD = {shape: shape for shape in SHAPES} | {scenes.plural(s): s for s in SHAPES}
SIZE_OF_WORD = {"big": "large", "little": "small", "large": "large", "small": "small"}


def training_scenes(n, seed=0):
    """Yield n training scenes, each with the random generator that has just drawn it."""
    rng = random.Random(seed)
    for _ in range(n):
        yield scenes.training_scene(rng), rng


def draw(scene, rng, size=32):
    return render(scene, scenes.layout(scene, rng), size)


def meanings(words, meaning):
    """The set of the meanings of words in a dictionary; other words are ignored."""
    return {meaning[word] for word in words if word in meaning}


# ---------------------------------------------------------------------------- grammar
def test_the_grammar_covers_all_kinds_of_scenes():
    found = [scene for scene, _ in training_scenes(4000)]
    groups = [group for scene in found for group in scene.groups]

    totals = Counter(sum(group.count for group in scene.groups) for scene in found)
    assert set(totals) == {1, 2, 3, 4}
    assert min(totals.values()) > 200
    assert {scene.relation for scene in found} == {*scenes.RELATIONS, None}
    assert {scene.background for scene in found} == set(COLOURS)
    assert {group.size for group in groups} == set(scenes.SIZES)

    pairs = {(group.colour, group.shape) for group in groups}
    all_pairs = {(colour, shape) for colour in COLOURS for shape in SHAPES}
    assert pairs == all_pairs - scenes.HELD_OUT_PAIRS
    for scene in found:
        assert scene.background not in [group.colour for group in scene.groups]


def test_colours_are_far_apart():
    for a, b in combinations(COLOURS.values(), 2):
        assert np.linalg.norm(np.subtract(a, b)) > 100, (a, b)


def assert_nothing_held_out(caption):
    words = training_text.split_words(caption)
    shapes = meanings(words, SHAPE_OF_WORD)
    for pair in scenes.HELD_OUT_TOGETHER:
        assert not pair <= shapes, words
    for number, colour_word, shape_word in zip(words, words[1:], words[2:], strict=False):
        colour = COLOUR_OF_WORD.get(colour_word)
        shape = SHAPE_OF_WORD.get(shape_word)
        assert (colour, shape) not in scenes.HELD_OUT_PAIRS, words
        if colour and shape and number in scenes.NUMBERS[2:]:
            count = scenes.NUMBERS.index(number)
            assert not scenes.is_held_out_count(count, colour, shape), words


def test_training_never_contains_held_out_compositions():
    """Checks the samples written to shards: the words of both captions, and the pixels."""
    for i in range(1500):
        sample = shapes_sample(3, 32, i)
        assert_nothing_held_out(sample["synthetic_caption.txt"].decode())
        assert_nothing_held_out(sample["original_caption.txt"].decode())
        if i < 150:                         # unmentioned compositions are held out as well
            image = Image.open(io.BytesIO(sample["image.png"]))
            groups = []
            for found in detector.detect(image).objects:
                groups.append(Group(1, found.size, found.colour, found.shape))
            assert not scenes.is_held_out(Scene(tuple(groups), None, None))


def test_a_known_composition_of_each_kind_is_held_out():
    one = Group(1, "small", "white", "circle")
    two = Group(2, "small", "white", "circle")
    red_star = Group(1, "large", "red", "star")
    cross = Group(1, "small", "pink", "cross")
    assert not scenes.is_held_out(Scene((one,), None, "black"))
    assert scenes.is_held_out(Scene((red_star,), None, "black"))
    assert scenes.is_held_out(Scene((one, cross), None, "black"))

    apart = (one, one._replace(size="large"))              # two white circles, in two groups
    together = scenes.is_held_out(Scene((two,), None, "black"))
    assert scenes.is_held_out(Scene(apart, None, "black")) == together

    held_out = []
    for count in (2, 3, 4):
        for colour in COLOURS:
            for shape in SHAPES:
                if scenes.is_held_out_count(count, colour, shape):
                    held_out.append((count, colour, shape))
    assert len(held_out) == 34
    assert (3, "pink", "square") in held_out
    counts, colours, shapes = zip(*held_out, strict=True)
    assert (len(set(counts)), len(set(colours)), len(set(shapes))) == (3, len(COLOURS), len(SHAPES))


def test_captions_mention_exactly_what_is_described():
    for scene, rng in training_scenes(3000):
        description = scenes.omit_defaults(scene, rng)
        words = training_text.split_words(scenes.caption(description, rng))
        colours = {group.colour for group in description.groups} | {description.background}
        sizes = {group.size for group in description.groups}
        assert meanings(words, COLOUR_OF_WORD) == colours - {None}
        assert meanings(words, SIZE_OF_WORD) == sizes - {None}
        assert meanings(words, SHAPE_OF_WORD) == {group.shape for group in description.groups}
        for full, part in zip(scene.groups, description.groups, strict=True):
            for full_value, value in zip(full, part, strict=True):
                assert value in (None, full_value)
        assert " a orange" not in " " + " ".join(words)
        assert len(words) + 1 <= 32


def test_captions_distinguish_objects_of_the_same_shape():
    for scene, rng in training_scenes(3000):
        description = scenes.omit_defaults(scene, rng, size=0, colour=0)
        assert len(set(description.groups)) == len(description.groups), description


def test_only_defaults_are_omitted():
    """The defaults are a white background, black (on black: white), large, and left of."""
    omitted = Counter()
    for scene, rng in training_scenes(3000):
        description = scenes.omit_defaults(scene, rng)
        colour = "black"
        if scene.background == "black":
            colour = "white"
        for full, part in zip(scene.groups, description.groups, strict=True):
            assert part.size or full.size == "large"
            assert part.colour or full.colour == colour
            omitted["size"] += part.size is None
            omitted["colour"] += part.colour is None
        assert description.background or scene.background == "white"
        assert description.relation == scene.relation or scene.relation == "left of"
        omitted["background"] += description.background is None
        omitted["relation"] += description.relation != scene.relation
    assert len(omitted) == 4
    assert min(omitted.values()) > 60, omitted              # each default is sometimes omitted


def test_objects_are_in_reading_order():
    for scene, rng in training_scenes(1000):
        if scene.relation:
            scenes.layout(scene, rng)
            continue
        for a, b in pairwise(scenes.layout(scene, rng)):
            same_row = b.x - a.x > 2 * abs(b.y - a.y)
            next_row = b.y - a.y > scenes.SIDE / 4
            assert same_row or next_row


def test_relation_captions_name_the_correct_side():
    star = Group(1, None, "red", "star")
    circle = Group(1, None, "blue", "circle")
    description = Scene((star, circle), "above", None)
    captions = {scenes.caption(description, random.Random(i)) for i in range(300)}
    for caption in captions:
        words = caption.split()
        says_above = not {"above", "over"}.isdisjoint(words)
        says_below = not {"below", "under"}.isdisjoint(words)
        assert says_above != says_below, caption
        assert (words.index("star") < words.index("circle")) == says_above, caption
    assert "a red star above a blue circle" in captions
    assert len(captions) > 10


def assert_inside(disc):
    room = scenes.BORDER + disc.r
    for coordinate in (disc.x, disc.y):
        assert room <= coordinate <= scenes.SIDE - room


def assert_relation(relation, a, b):
    dx = b.x - a.x
    dy = b.y - a.y
    along = {"left of": dx, "right of": -dx, "above": dy, "below": -dy}[relation]
    assert along > 0
    assert along == max(abs(dx), abs(dy))


def test_objects_never_touch_each_other_or_the_border():
    rng = random.Random(1)
    for _ in range(1500):
        scene = scenes.random_scene(rng)
        discs = scenes.layout(scene, rng)
        assert len(discs) == sum(group.count for group in scene.groups)
        for disc in discs:
            assert_inside(disc)
        for a, b in combinations(discs, 2):
            assert np.hypot(a.x - b.x, a.y - b.y) >= a.r + b.r + 2 * scenes.BORDER
        if scene.relation:
            assert_relation(scene.relation, *discs)


# ---------------------------------------------------------------------------- detector
@pytest.mark.parametrize("size, n", [(32, 250), (48, 80), (64, 80)])
def test_rendered_scenes_are_detected(size, n):
    for i in range(n):
        rng = random.Random(i)
        scene = scenes.random_scene(rng)
        detection = detector.detect(draw(scene, rng, size))
        assert detector.mismatch(scene, detection) == "", scene


def test_soft_and_noisy_images_are_detected():
    correct = 0
    for i in range(60):
        rng = random.Random(i)
        scene = scenes.random_scene(rng)
        soft = draw(scene, rng, 64).filter(ImageFilter.GaussianBlur(1))
        noise = np.random.default_rng(i).normal(0, 12, (64, 64, 3))
        pixels = (np.asarray(soft) + noise).clip(0, 255).astype(np.uint8)
        if detector.mismatch(scene, detector.detect(Image.fromarray(pixels))) == "":
            correct += 1
    assert correct >= 54


def first_not_in(values, used):
    return next(value for value in values if value not in used)


def wrong_descriptions(scene):
    """Yield (name, description), in which the named attribute is wrong, for every attribute."""
    group = scene.groups[0]
    other_colour = first_not_in(COLOURS, [scene.background, *(g.colour for g in scene.groups)])
    other_shape = first_not_in(SHAPES, [g.shape for g in scene.groups])
    other_size = first_not_in(scenes.SIZES, [group.size])
    wrong_groups = {
        "size": group._replace(size=other_size),
        "count": group._replace(count=group.count + 1),
        "colour": group._replace(colour=other_colour),
        "shape": group._replace(shape=other_shape),
    }
    for field, wrong in wrong_groups.items():
        yield field, scene._replace(groups=(wrong, *scene.groups[1:]))
    yield "background", scene._replace(background=other_colour)


def test_every_wrong_attribute_is_detected():
    """An image matches its scene, and no longer matches if one attribute of the scene changes."""
    for scene, rng in training_scenes(60, seed=2):
        detection = detector.detect(draw(scene, rng))
        assert detector.mismatch(scene, detection) == ""
        for field, wrong in wrong_descriptions(scene):
            assert detector.mismatch(wrong, detection) != "", (field, scene)
        if scene.relation:
            wrong = scene._replace(relation=scenes.OPPOSITE[scene.relation])
            assert detector.mismatch(wrong, detection) == f"not {wrong.relation}"


def test_colours_are_bound_to_their_shapes():
    def circle_and_star(circle_colour, star_colour):
        circle = Group(1, "large", circle_colour, "circle")
        star = Group(1, "large", star_colour, "star")
        return Scene((circle, star), None, "white")

    scene = circle_and_star("red", "blue")
    detection = detector.detect(draw(scene, random.Random(0)))
    assert detector.mismatch(scene, detection) == ""
    assert "large blue star" in detector.mismatch(circle_and_star("blue", "red"), detection)


def test_no_shape_is_detected_where_there_is_none():
    """Noise, an empty image and a bar are not shapes."""
    empty = Image.new("RGB", (64, 64), COLOURS["white"])
    assert detector.detect(empty) == detector.Detection((), "white")

    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    for found in detector.detect(Image.fromarray(noise)).objects:
        assert found.shape == "?" or found.colour == "?"

    bar = empty.copy()
    bar.paste(COLOURS["red"], (5, 30, 60, 34))
    assert [found.shape for found in detector.detect(bar).objects] == ["?"]


# ---------------------------------------------------------------------------- training text
def test_the_vocabulary_covers_captions_and_text():
    assert WORDS[:4] == ["<pad>", "<eos>", "<bos>", "<unk>"]
    assert len(WORDS) == len(set(WORDS)) < 200
    for scene, rng in training_scenes(1500, seed=4):
        description = scenes.omit_defaults(scene, rng)
        tokens, answers = training_text.encode(training_text.random_text(description, rng), IDS)
        assert len(tokens) <= training_text.MAX_TOKENS + 1
        for answer in answers:
            assert 0 < answer.start < answer.end < len(tokens)
    for prompt in scenes.evaluation_prompts(600):
        assert set(training_text.split_words(prompt.text)) <= set(WORDS)


def answers_to(description, seeds):
    """{question: set of all answers} in the texts that the seeds give for a description."""
    answers = {}
    for seed in seeds:
        parts = training_text.random_text(description, random.Random(seed))
        for question, answer in pairwise(parts):
            if answer.kind not in ("", "again", "twice"):
                answers.setdefault(question.words, set()).add(answer.words)
    return answers


def test_answers_are_true():
    circle = Group(1, "small", "red", "circle")
    squares = Group(2, None, "blue", "square")
    star = Group(1, "large", "red", "star")
    found = answers_to(Scene((circle, squares, star), None, "white"), range(1, 3000, 2))
    expected = {
        "what color is the circle ?": "red",
        "what color are the squares ?": "blue",
        "what size is the star ?": "large",
        "what size are the squares ?": "unknown",
        "what shape is blue ?": "square",
        "what color is the background ?": "white",
        "how many objects ?": "four",
        "how many squares ?": "two",
        "how many hearts ?": "zero",
        "is there a blue circle ?": "no",
        "is there a red star ?": "yes",
        "list :": "a small red circle , two blue squares , a large red star , on white",
    }
    assert all(len(answers) == 1 for answers in found.values())
    for question, answer in expected.items():
        assert found[question] == {answer}, question
    assert "what shape is large ?" not in found            # the squares' size is unknown


def test_answers_about_a_relation_are_true():
    heart = Group(1, None, "pink", "heart")
    cross = Group(1, "large", "black", "cross")
    found = answers_to(Scene((heart, cross), "left of", None), range(0, 3000, 2))
    expected = {
        "where is the heart ?": "left of the cross",
        "what is right of the heart ?": "a large black cross",
        "what is left of the cross ?": "a pink heart",
        "what is above the cross ?": "nothing",
        "what color is the background ?": "unknown",
    }
    assert all(len(answers) == 1 for answers in found.values())
    for question, answer in expected.items():
        assert found[question] == {answer}, question


# ---------------------------------------------------------------------------- tiny Gemma
def make(out, overwrite=False):
    tiny_gemma.make(out, 2, 4, 1e-3, 0, torch.device("cpu"), overwrite=overwrite)


@pytest.fixture(scope="module")
def gemma_of_two_steps(tmp_path_factory):
    """The folder of a tiny Gemma after two training steps."""
    out = tmp_path_factory.mktemp("made") / "gemma"
    few = partial(tiny_gemma.answer_accuracy, count=64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny_gemma, "answer_accuracy", few)
        make(out)
    return out


def test_make_saves_a_gemma_that_loads_like_any_other(gemma_of_two_steps):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from fusedit_lib.pretrained import build_model
    config = json.loads((gemma_of_two_steps / "config.json").read_text())
    assert config["model_type"] == "gemma2"
    assert config["sliding_window"] > training_text.MAX_TOKENS
    tokenizer_config = json.loads((gemma_of_two_steps / "tokenizer_config.json").read_text())
    assert tokenizer_config["tokenizer_class"] == "PreTrainedTokenizerFast"

    tokenizer = AutoTokenizer.from_pretrained(gemma_of_two_steps)
    batch = tokenizer(["A Large, RED circle", "zebra"], padding=True)
    tokens = [tokenizer.convert_ids_to_tokens(row) for row in batch["input_ids"]]
    assert tokens == [
        ["<bos>", "a", "large", ",", "red", "circle"],
        ["<bos>", "<unk>", "<pad>", "<pad>", "<pad>", "<pad>"]]

    assert AutoModelForCausalLM.from_pretrained(gemma_of_two_steps).dtype == torch.bfloat16
    assert (gemma_of_two_steps / "model.safetensors").stat().st_size < 4_000_000
    model = build_model(preset("demo", base=str(gemma_of_two_steps)))
    text = model.encode(["a red circle", ""])
    assert text.keys[0].shape[0] == 2
    assert text.mask.sum(1).tolist() == [4, 1]


def test_make_replaces_only_its_own_files(gemma_of_two_steps):
    notes = gemma_of_two_steps / "notes.txt"
    notes.write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(FuseDiTError, match="not empty"):
            make(gemma_of_two_steps, overwrite)
    notes.unlink()
    assert [path.name for path in gemma_of_two_steps.parent.iterdir()] == ["gemma"]


def test_a_failed_training_run_leaves_the_old_model(tmp_path, monkeypatch):
    def fail(*_):
        raise ZeroDivisionError

    out = tmp_path / "gemma"
    out.mkdir()
    (out / "tokenizer.json").write_text("old")
    monkeypatch.setattr(tiny_gemma, "next_token_loss", fail)
    with pytest.raises(ZeroDivisionError):
        make(out, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["gemma"]
    assert (out / "tokenizer.json").read_text() == "old"


def test_the_shipped_model_is_the_preset():
    shipped = FuseDiTConfig(**json.loads((ROOT / "demo/config.json").read_text()))
    assert replace(shipped, base="demo/gemma") == preset("demo")


@pytest.mark.skipif(not (ROOT / "demo/gemma").exists(), reason="the demo's Gemma is missing")
def test_the_shipped_gemma_has_this_vocabulary_and_binds_attributes():
    from transformers import AutoModelForCausalLM
    tokenizer = json.loads((ROOT / "demo/gemma/tokenizer.json").read_text())
    assert tokenizer["model"]["vocab"] == IDS
    model = AutoModelForCausalLM.from_pretrained(ROOT / "demo/gemma", dtype=torch.float32)
    for draw_scene in (scenes.training_scene, tiny_gemma.held_out_scene):
        scores = tiny_gemma.answer_accuracy(model, IDS, draw_scene, count=128)
        assert scores["field"] > 0.75, scores
        assert scores["count"] > 0.75, scores
