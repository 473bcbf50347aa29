"""evaluate.py emoji: its prompts, and the scores of perfect, wrong and copying models."""
import itertools
import json
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_shards import index, png, write_shard

import evaluate
from fusedit import FuseDiTError
from fusedit_lib.data.emoji_captions import STYLES, prompt_of
from fusedit_lib.evaluation import (
    drawing,
    emoji,
    emoji_chance,
    emoji_copies,
    emoji_features,
    emoji_gallery,
    judging,
    metrics,
    results,
)
from fusedit_lib.evaluation.unseen_words import UnseenWord

SIDE = 32                                   # pixels, of the bundled demo
CONCEPTS = 20
OTHER_STYLE = {"google": "fluent", "fluent": "google"}
WORDS = [UnseenWord("sedan", "synonym", ("thing 3",)),
         UnseenWord("vehicle", "hypernym", ("thing 3", "thing 4", "thing 19"))]


def command(*words):
    args = evaluate.parse_args([str(word) for word in words])
    args.command(args)


# ---- shards --------------------------------------------------------------------------------------

def pattern(style, concept, tone=""):
    """An image of random squares; a tone or another style changes it, but not entirely."""
    rng = np.random.default_rng(int(concept, 16))
    squares = rng.uniform(30, 225, (4, 4, 3))
    if tone:
        squares[0, 0] = 255
    if style == "fluent":
        squares = 0.7 * squares + 0.3 * np.array([0, 128, 255])
    squares = squares.repeat(SIDE // 4, 0).repeat(SIDE // 4, 1)
    return Image.fromarray(squares.astype(np.uint8))


def sample(style, concept, label, tone=""):
    point = concept
    if tone:
        point = f"{concept}-{tone}"
    files = {"image.png": png(pattern(style, concept, tone)),
             "synthetic_caption.txt": f"an icon of {label}",
             "original_caption.txt": prompt_of(label, style)}
    return f"{style}-{point}", files


def write_part(folder, samples):
    folder.mkdir(parents=True)
    write_shard(folder / "emoji-000000.tar", samples)
    index(folder)


@pytest.fixture
def shards(tmp_path):
    """Shards of 20 concepts; flat thing 0 has two skin tones, one held out; thing 19 is only flat.
    """
    samples = []
    held_out = []
    for number in range(CONCEPTS):
        for style in STYLES:
            one = sample(style, f"1f6{number:02x}", f"thing {number}")
            if number == 19 and style == "fluent":
                continue
            if (number, style) in ((1, "google"), (2, "fluent")):
                held_out.append(one)
            else:
                samples.append(one)
    tone = sample("google", "1f600", "thing 0: light skin tone", "1f3fb")
    dark = sample("google", "1f600", "thing 0: dark skin tone", "1f3ff")
    write_part(tmp_path / "shards/train", [*samples, tone])
    write_part(tmp_path / "shards/held-out", [*held_out, dark])
    return tmp_path / "shards"


@pytest.fixture
def stub(monkeypatch):
    """Features that are pixels at two resolutions, in place of EfficientNet's. Counts images."""
    count = SimpleNamespace(images=0)

    def prepare(image):
        count.images += 1
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).float()

    def network(x):
        pool = torch.nn.functional.adaptive_avg_pool2d
        return [pool(x, 4).flatten(1), pool(x, 2).flatten(1)]
    extractor = emoji_features.BlockExtractor("pixels", prepare, network)
    monkeypatch.setattr(emoji_features, "load_extractor", lambda device: extractor)
    monkeypatch.setattr(evaluate, "UNSEEN_WORDS", WORDS)
    monkeypatch.setattr(judging, "UNSEEN_WORDS", WORDS)
    return count


def prompts_of(folder, seed=0, words=WORDS):
    return emoji.choose_prompts(emoji_gallery.read_images(folder), words, seed)


def open_gallery(folder):
    return emoji_gallery.Gallery(folder, SIDE, emoji_features.load_extractor("cpu"), "cpu")


# ---- prompts -------------------------------------------------------------------------------------

def test_prompts_are_fixed_by_the_seed(shards, monkeypatch):
    monkeypatch.setattr(emoji, "SEEN", 8)
    prompts = prompts_of(shards)
    assert prompts == prompts_of(shards)
    assert prompts != prompts_of(shards, 1)
    by_category = {}
    for prompt in prompts:
        by_category.setdefault(prompt.category, []).append(prompt)
    assert list(by_category) == list(emoji.CATEGORIES)
    assert len({prompt.text for prompt in by_category["seen"]}) == 8
    held_out = {"thing 1, flat", "thing 2, 3d"}
    assert {prompt.text for prompt in by_category["held-out"]} == held_out
    assert not held_out & {prompt.text for prompt in by_category["seen"]}
    assert [prompt.text for prompt in by_category["other tone"]] == [
        "thing 0: dark skin tone, flat"]
    unseen = {prompt.text: len(prompt.concepts) for prompt in by_category["unseen words"]}
    assert unseen == {"sedan, flat": 1, "sedan, 3d": 1, "vehicle, flat": 3, "vehicle, 3d": 2}


def test_a_word_that_no_image_of_a_style_fits_is_left_out(shards):
    prompts = prompts_of(shards, words=[UnseenWord("lorry", "synonym", ("thing 19",))])
    texts = [prompt.text for prompt in prompts if prompt.category == "unseen words"]
    assert texts == ["lorry, flat"]


def test_n_counts_the_prompts_of_each_category(shards):
    prompts = prompts_of(shards)
    first = prompts[:emoji.count_prompts(prompts, 3)]
    counts = [sum(prompt.category == category for prompt in first)
              for category in emoji.CATEGORIES]
    assert counts == [3, 2, 1, 3]
    assert emoji.count_prompts(prompts, 1000) == len(prompts)


def test_skin_tones_are_one_concept(shards):
    images = {image.key: image for image in emoji_gallery.read_images(shards)}
    plain = images["google-1f600"]
    light = images["google-1f600-1f3fb"]
    assert (light.concept, light.label) == (plain.concept, plain.label) == ("1f600", "thing 0")
    assert light.prompt == "thing 0: light skin tone, flat"
    seen = [prompt for prompt in prompts_of(shards) if prompt.category == "seen"]
    assert len(seen) == 2 * CONCEPTS - 1 - 2               # the tone is no pair of its own


def test_prompts_with_the_same_answers_share_a_unit(shards):
    words = [*WORDS, UnseenWord("coach", "synonym", ("thing 19", "thing 4", "thing 3"))]
    units = {prompt.text: prompt.unit for prompt in prompts_of(shards, words=words)}
    assert units["coach, flat"] == units["vehicle, flat"] == units["vehicle, 3d"]
    assert units["sedan, flat"] not in (units["coach, flat"], units["thing 3, flat"])
    assert units["thing 3, flat"] != units["thing 3, 3d"]

    images = emoji_gallery.read_images(shards)
    tone, = (image for image in images if image.prompt == "thing 0: dark skin tone, flat")
    lighter = tone._replace(prompt="thing 0: medium skin tone, flat")
    held_out, other_tone = emoji.held_out_prompts([*images, lighter], random.Random(0))
    assert len({prompt.unit for prompt in held_out}) == 2
    assert len(other_tone) == 2
    assert len({prompt.unit for prompt in other_tone}) == 1


# ---- verdicts ------------------------------------------------------------------------------------

def draw(monkeypatch, shards, tmp_path, choose, *flags):
    """The result of a model that draws choose(style, concept) for each prompt."""
    concepts = {image.prompt: image.concept for image in emoji_gallery.read_images(shards)}
    for word in WORDS:
        for style in STYLES:
            concepts[prompt_of(word.prompt, style)] = "1f603"
    styles = {words: style for style, words in STYLES.items()}

    def generate(model, prompts, seeds, **settings):
        images = []
        for prompt in prompts:
            style = styles[prompt.rpartition(", ")[2]]
            images.append(pattern(*choose(style, concepts[prompt])))
        return images
    monkeypatch.setattr(drawing, "generate", generate)
    command("emoji", "--data", shards, "--out", tmp_path / "out", "--device", "cpu", *flags)
    return json.loads((tmp_path / "out/guidance-3-steps-25/emoji.json").read_text())


def measured(result, measure):
    return result["measures"][measure]["categories"]


def test_a_perfect_model_scores_one(monkeypatch, shards, stub, tmp_path, capsys):
    result = draw(monkeypatch, shards, tmp_path, lambda *pair: pair, "--nearest",
                  tmp_path / "nearest.png")
    for measure in emoji.MEASURES:
        assert measured(result, measure) == dict.fromkeys(emoji.CATEGORIES, 1)
    assert result["overall"] == 1
    assert set(result["kinds"]) == {"unseen words: synonym", "unseen words: hypernym"}
    output = capsys.readouterr().out
    assert "hypernym" in output
    assert "unseen words" in output
    width, height = Image.open(tmp_path / "nearest.png").size
    assert width == 3 * (4 * emoji_copies.CELL + emoji_copies.GAP)
    assert height == 6 * (emoji_copies.CELL + emoji_copies.LABEL)      # 10 + 2 + 1 + 4 images


def test_another_concept_is_wrong(monkeypatch, shards, stub, tmp_path):
    result = draw(monkeypatch, shards, tmp_path, lambda style, concept: (style, "1f60f"))
    assert measured(result, "top-1")["held-out"] == 0
    assert measured(result, "style") == dict.fromkeys(emoji.CATEGORIES, 1)
    row = next(row for row in result["prompts"] if row["category"] == "held-out")
    assert row["nearest"][0] == "thing 15"
    assert row["rank"] > 1


def test_another_style_is_seen(monkeypatch, shards, stub, tmp_path):
    def choose(style, concept):
        if concept == "1f613":              # thing 19, which is only flat
            return style, concept
        return OTHER_STYLE[style], concept
    result = draw(monkeypatch, shards, tmp_path, choose)
    assert measured(result, "style")["unseen words"] == 0
    assert measured(result, "style")["held-out"] == 0
    assert measured(result, "top-1")["held-out"] == 1      # the concept is right all the same


def test_near_copies_are_counted(monkeypatch, shards, stub, tmp_path, capsys):
    result = draw(monkeypatch, shards, tmp_path, lambda *pair: pair)
    ratios = {row["prompt"]: row["copy_ratio"] for row in result["prompts"]}
    assert ratios["thing 5, flat"] == 0
    # Training has thing 1 only in the other style.
    assert ratios["thing 1, flat"] > 0.1
    assert "seen               1.000" in capsys.readouterr().out


def test_a_tone_does_not_make_a_copy_less_near(shards, stub):
    """Other tones of the nearest training image are not its neighbours."""
    gallery = open_gallery(shards)
    pixels = gallery.pixels[[image.key for image in gallery.images].index("google-1f600")]
    almost = (pixels.float() + 4).clamp(0, 255).to(torch.uint8)
    ratio, = emoji_copies.copy_ratios([almost], gallery)
    training = emoji_copies.flat_pixels(gallery.pixels)
    spacing = emoji_copies.distances(emoji_copies.flat_pixels([pixels]), training)[0]
    others = [float(distance) for distance, image in zip(spacing, gallery.images, strict=True)
              if image.concept != "1f600" and image.part == "train"]
    assert ratio == pytest.approx(4 / min(others), rel=0.02)


def test_the_nearest_are_concepts_and_not_their_tones(shards, stub):
    gallery = open_gallery(shards)
    query = gallery.pixels[[image.key for image in gallery.images].index("google-1f600")]
    found, = gallery.neighbours([query], ["google"])
    concepts = [gallery.images[number].concept for number in found.concepts]
    assert len(concepts) == len(set(concepts)) == CONCEPTS
    assert concepts[0] == "1f600"


def test_the_nearest_training_images_are_not_held_out(shards, stub):
    gallery = open_gallery(shards)
    number = [image.key for image in gallery.images].index("google-1f601")
    found, = gallery.neighbours([gallery.pixels[number]], ["google"])
    assert found.nearest == number
    assert len(found.training) == emoji_gallery.TRAINING
    assert {gallery.images[number].part for number in found.training} == {"train"}


# ---- chance --------------------------------------------------------------------------------------

@pytest.mark.parametrize("near", [1, 5])
def test_chance_is_the_mean_score_of_the_real_images(shards, stub, near):
    """Each real image of the style is scored as if it were drawn."""
    gallery = open_gallery(shards)
    random_real = emoji_chance.RandomReal(gallery)
    for prompt in prompts_of(shards):
        pixels = [gallery.pixels[number] for number, image in enumerate(gallery.images)
                  if image.style == prompt.style]
        hits = 0
        for found in gallery.neighbours(pixels, [prompt.style] * len(pixels)):
            concepts = {gallery.images[number].concept for number in found.concepts[:near]}
            hits += bool(concepts & prompt.concepts)
        assert random_real.score(prompt, near) == pytest.approx(hits / len(pixels))


def test_chance_is_averaged_over_prompts(monkeypatch, shards, stub, tmp_path):
    """22 real images are flat, because of the tones, and 19 are not."""
    result = draw(monkeypatch, shards, tmp_path, lambda *pair: pair)
    flat = (1 / 22 + 3 / 22) / 2
    solid = (1 / 19 + 2 / 19) / 2
    expected = (flat + solid) / 2
    assert result["measures"]["top-1"]["chance"]["unseen words"] == pytest.approx(expected)
    assert result["measures"]["top-1"]["chance"]["other tone"] == pytest.approx(3 / 22)
    assert result["measures"]["style"]["chance"]["other tone"] == pytest.approx(22 / 41)


def test_shuffling_is_a_permutation_test(monkeypatch):
    """Its p is the share of all permutations that score at least as high, within blocks."""
    rng = np.random.default_rng(0)
    blocks = [(rng.random((n, n)) < 0.3).astype(float) for n in (4, 3)]
    scores = []
    for orders in itertools.product(*(itertools.permutations(range(n)) for n in (4, 3))):
        scores.append(sum(block[range(len(block)), order].sum()
                          for block, order in zip(blocks, orders, strict=True)) / 7)
    actual = scores[0]                      # of the order that changes nothing
    assert min(scores) < actual < max(scores)
    expected = np.mean([score >= actual - 1e-9 for score in scores])
    test = emoji_chance.shuffle_test(blocks)
    assert test.p == pytest.approx(expected, abs=0.02)
    assert test.score == pytest.approx(np.mean(scores), abs=0.01)

    monkeypatch.setattr(emoji_chance, "SHUFFLES", 99)
    assert emoji_chance.shuffle_test([np.eye(20)]).p == 1 / 100


def verdicts_of(*pairs):
    """Verdicts on perfect images of concepts a, b, ...: pairs of a concept and a style."""
    found = []
    for concept, style in pairs:
        prompt = emoji.Prompt("unseen words", "", concept, "", style, frozenset([concept]))
        found.append(emoji.Verdict(prompt, [concept], {}))
    return found


def test_units_are_shuffled_whole_and_only_among_the_same_styles():
    """Two units have two orders, whether or not they have images in both styles."""
    pairs = list(itertools.product("ab", STYLES))
    both = emoji_chance.shuffle_tests(verdicts_of(*pairs), 1)["unseen words"]
    assert both.p == pytest.approx(1 / 2, abs=0.02)
    apart = verdicts_of(("a", "google"), ("b", "fluent"))
    assert emoji_chance.shuffle_tests(apart, 1)["unseen words"] == (1, 1)


def test_a_model_that_ignores_its_prompts_is_no_better_than_shuffled(
        monkeypatch, shards, stub, tmp_path, capsys):
    perfect = draw(monkeypatch, shards, tmp_path / "a", lambda *pair: pair)
    assert perfect["measures"]["top-1"]["shuffled"]["seen"]["p"] == pytest.approx(1 / 10_001)
    capsys.readouterr()
    ignorant = draw(monkeypatch, shards, tmp_path / "b", lambda style, concept: (style, "1f60f"))
    test = ignorant["measures"]["top-1"]["shuffled"]["seen"]
    assert test["score"] == pytest.approx(measured(ignorant, "top-1")["seen"])
    assert test["p"] == 1
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("seen"))
    assert line.endswith(f"{test['score']:.3f}  1.0000")


def test_two_styles_of_a_word_are_one_observation():
    """The interval is that of half as many prompts if both styles agree."""
    rng = random.Random(0)
    pairs = []
    singles = []
    for number in range(40):
        right = rng.randint(0, 1)
        row = dict(category="unseen words", prompt="", right=right)
        singles.append(row | dict(unit=f"{number}"))
        pairs += [row | dict(unit=f"{number}"), row | dict(unit=f"{number}")]
    assert results.summarise(pairs) == results.summarise(singles)
    apart = [row | dict(unit=number) for number, row in enumerate(pairs)]
    low, high = results.summarise(apart)["intervals"]["overall"]
    wide_low, wide_high = results.summarise(pairs)["intervals"]["overall"]
    assert high - low < 0.8 * (wide_high - wide_low)


# ---- files ---------------------------------------------------------------------------------------

def test_more_prompts_are_added_to_the_same_folder(monkeypatch, shards, stub, tmp_path):
    few = draw(monkeypatch, shards, tmp_path, lambda *pair: pair, "-n", 1)
    everything = draw(monkeypatch, shards, tmp_path, lambda *pair: pair)
    assert [row["prompt"] for row in few["prompts"]] == [
        row["prompt"] for row in everything["prompts"][:4]]
    assert len(everything["prompts"]) == 37 + 2 + 1 + 4


def test_features_of_real_images_are_stored(shards, stub):
    first = open_gallery(shards)
    computed = stub.images
    assert computed == len(first.images)
    again = open_gallery(shards)
    assert stub.images == computed
    assert torch.equal(again.features, first.features)

    changed = [sample("google", "1f6ff", "thing 255"), sample("fluent", "1f6ff", "thing 255")]
    write_shard(shards / "held-out/emoji-000000.tar", changed)
    index(shards / "held-out")
    other = open_gallery(shards)
    assert stub.images == computed + len(other.images)


def test_results_are_compared_and_reported(monkeypatch, shards, stub, tmp_path, capsys):
    draw(monkeypatch, shards, tmp_path / "a", lambda style, concept: (style, "1f60f"))
    draw(monkeypatch, shards, tmp_path / "b", lambda *pair: pair)
    a = tmp_path / "a/out/guidance-3-steps-25/emoji.json"
    b = tmp_path / "b/out/guidance-3-steps-25/emoji.json"
    capsys.readouterr()
    command("compare", a, b)
    output = capsys.readouterr().out
    assert "B is better" in output
    line = next(line for line in output.splitlines() if line.startswith("seen"))
    assert float(line.rpartition("p = ")[2]) < 0.01
    assert " units better, 0 worse" in line
    line = next(line for line in output.splitlines() if line.startswith("unseen"))
    assert "1.000" in line
    assert "different real images" not in output

    result = json.loads(b.read_text())
    result["settings"]["gallery"] = "another"
    (tmp_path / "other.json").write_text(json.dumps(result))
    command("compare", a, tmp_path / "other.json")
    assert "scored with different real images" in capsys.readouterr().out

    pytest.importorskip("matplotlib")
    command("report", f"a={a}", f"b={b}", "--out", tmp_path / "report.md")
    table = (tmp_path / "report.md").read_text()
    assert "emoji, held-out, top-5, 2 prompts" in table
    assert "emoji, other tone, top-5, 1 prompts" in table
    assert "emoji, style" in table


def test_the_digest_of_the_gallery_covers_images_and_their_names(shards, stub):
    before = open_gallery(shards).digest
    assert open_gallery(shards).digest == before
    images = emoji_gallery.read_images(shards)
    renamed = [images[0]._replace(prompt="apple, flat"), *images[1:]]
    assert emoji_gallery.gallery_digest(images, "a") != emoji_gallery.gallery_digest(images, "b")
    assert emoji_gallery.gallery_digest(images, "a") != emoji_gallery.gallery_digest(renamed, "a")


def test_the_scorer_is_opened_before_drawing(monkeypatch, shards, stub, tmp_path):
    def missing(device):
        raise ModuleNotFoundError(name="efficientnet_lite_pytorch")
    monkeypatch.setattr(emoji_features, "load_extractor", missing)
    with pytest.raises(ModuleNotFoundError):
        draw(monkeypatch, shards, tmp_path, lambda *pair: pytest.fail("drew an image"))
    assert not (tmp_path / "out").exists()


def test_the_scorer_finds_changed_images(monkeypatch, shards, stub, capsys):
    monkeypatch.setattr(emoji_copies, "copy_ratios", lambda *_: pytest.fail("not printed"))
    command("emoji", "--data", shards, "--ground-truth", "-n", 30)
    tables = capsys.readouterr().out.split("\n\n")
    cells = {}                              # (measure, change) -> the line after its name
    for table in tables[:3]:
        head, *lines = table.splitlines()
        for line in lines:
            cells[head.split()[0], line[:20].strip()] = line[20:].split()
    assert cells["top-5", "half resolution"][:2] == ["30", "1.000"]
    assert cells["style", "as flat"][1] == "0.000"
    assert float(cells["top-1", "as flat"][1]) > 0.9


@pytest.mark.parametrize("caption", ["a flat emoji of thing 0", "thing 0, 3d"])
def test_other_captions_are_refused(shards, caption):
    key, files = sample("google", "1f600", "thing 0")
    write_shard(shards / "train/emoji-000000.tar",
                [(key, files | {"original_caption.txt": caption})])
    with pytest.raises(FuseDiTError, match=r"google-1f600 has the caption.*prepare_data.py emoji"):
        emoji_gallery.read_images(shards)


def test_a_folder_without_both_parts_is_refused(shards):
    with pytest.raises(FuseDiTError, match=r"has no train/index.json.*prepare_data.py emoji"):
        emoji_gallery.read_images(shards / "train")


def test_a_figure_needs_drawn_images(shards, tmp_path):
    with pytest.raises(FuseDiTError, match="--ground-truth draws none"):
        command("emoji", "--data", shards, "--ground-truth", "--nearest", tmp_path / "a.png")


def test_a_figure_needs_one_setting(shards, tmp_path):
    with pytest.raises(FuseDiTError, match="one number of --steps"):
        command("emoji", "--data", shards, "--steps", "2,3", "--nearest", tmp_path / "a.png")


# ---- features ------------------------------------------------------------------------------------

def test_whitening_gives_equal_variances():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(5000, 3, generator=generator) * torch.tensor([1.0, 10.0, 0.01]) + 7
    whitening = emoji_features.fit_whitening(features)
    white = (features - whitening.mean) @ whitening.matrix
    variances = white.var(0).sort().values
    mean_variance = (1 + 100 + 0.0001) / 3
    expected = torch.tensor([v / (v + mean_variance) for v in (0.0001, 1.0, 100.0)])
    assert torch.allclose(variances, expected, rtol=0.1)
    assert white.mean(0).abs().max() < 1e-3


def test_features_of_efficientnet():
    """The last block's features are those that its head reads."""
    pytest.importorskip("efficientnet_lite_pytorch")
    extractor = emoji_features.load_extractor("cpu")
    images = [torch.from_numpy(np.array(pattern(style, "1f601"))).permute(2, 0, 1)
              for style in STYLES]
    features = emoji_features.extract(images, extractor, "cpu")
    assert [block.shape for block in features] == [(2, 4 * 112), (2, 4 * 320)]

    model = metrics.efficientnet_lite0("cpu")
    seen = []
    model._conv_head.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        model.extract_features(torch.stack([extractor.prepare(
            Image.fromarray(image.permute(1, 2, 0).numpy())) for image in images]))
    quarters = torch.nn.functional.adaptive_avg_pool2d(seen[0], 2).flatten(1)
    assert torch.allclose(features[1], quarters, atol=1e-4)
