"""The emoji benchmark: the prompts, and the verdicts on drawn images.

A drawn image is right if its nearest real images show what its prompt asks for. The real images are
those of the asked style, from the training set and the held-out set. Skin tones of an emoji count
as one concept.
"""
import random
from math import comb
from typing import NamedTuple

from fusedit_lib.data.emoji_captions import STYLES, prompt_of
from fusedit_lib.evaluation import emoji_copies, results
from fusedit_lib.evaluation.benchmarks import Benchmark

SEEN = 200                                  # prompts from the training set
CATEGORIES = ("seen", "held-out", "unseen words")
NEAR = 5                                    # concepts among which the asked one must be

# name of a measure -> (key of its value in a row, key of the value by chance)
MEASURES = {"top-1": ("top_1", "chance_top_1"), "top-5": ("right", "chance"),
            "style": ("style", "chance_style")}


class Prompt(NamedTuple):
    """A prompt and what counts as right."""
    category: str                           # one of CATEGORIES
    kind: str                               # of unseen words: synonym, ...; of pairs: see kind_of
    unit: str                               # prompts with the same unit are not independent
    text: str
    style: str                              # a key of STYLES
    concepts: frozenset[str]                # that count as right


# ---- prompts -------------------------------------------------------------------------------------

def choose_prompts(images, words, seed):
    """All Prompts. Categories take turns, so the first ones contain every category.

    images: RealImages. words: entries of unseen_words.py. The seed determines the pairs that are
    drawn from the training set, and the order.
    """
    rng = random.Random(f"emoji prompts {seed}")
    groups = [seen_prompts(images, rng), held_out_prompts(images, rng),
              unseen_prompts(images, words, rng)]
    prompts = []
    for turn in range(max(len(group) for group in groups)):
        for group in groups:
            prompts += group[turn:turn + 1]
    return prompts


def count_prompts(prompts, n):
    """The number of prompts, from the first, that hold n of each category (or all, if fewer)."""
    sizes = {category: 0 for category in CATEGORIES}
    for prompt in prompts:
        sizes[prompt.category] += 1
    return sum(min(n, size) for size in sizes.values())


def pair_prompt(image, category, kind=""):
    return Prompt(category, kind, image.prompt, image.prompt, image.style,
                  frozenset([image.concept]))


def seen_prompts(images, rng):
    """Prompts of SEEN different (style, concept) pairs of the training set."""
    trained = [image for image in images if image.part == "train"]
    rng.shuffle(trained)
    by_pair = {}
    for image in trained:
        by_pair.setdefault((image.style, image.concept), image)
    return [pair_prompt(image, "seen") for image in list(by_pair.values())[:SEEN]]


def held_out_prompts(images, rng):
    """Prompts of all held-out images.

    Their kind says what training contains of the pair: only the concept in the other style, or
    the same style too, in another skin tone.
    """
    trained = {(image.style, image.concept) for image in images if image.part == "train"}
    prompts = []
    for image in images:
        if image.part == "held-out":
            kind = "other style seen"
            if (image.style, image.concept) in trained:
                kind = "other skin tone seen"
            prompts.append(pair_prompt(image, "held-out", kind))
    rng.shuffle(prompts)
    return prompts


def unseen_prompts(images, words, rng):
    """Prompts of unseen words in both styles. Those that no image of a style fits are left out."""
    concepts = {}                           # (style, label) -> concepts
    for image in images:
        concepts.setdefault((image.style, image.label), set()).add(image.concept)
    words = list(words)
    rng.shuffle(words)
    prompts = []
    for word in words:
        for style in STYLES:
            right = set()
            for label in word.labels:
                right |= concepts.get((style, label), set())
            if right:
                prompts.append(Prompt("unseen words", word.kind, word.prompt,
                                      prompt_of(word.prompt, style), style, frozenset(right)))
    return prompts


def benchmark(prompts):
    """Emoji: prompts of the training set, held-out prompts, and prompts in words that no caption
    contains. An image is right if its nearest real images show what the prompt asks for."""
    files = [[f"{k:05}.png"] for k in range(len(prompts))]
    return Benchmark([prompt.text for prompt in prompts], files)


# ---- verdicts ------------------------------------------------------------------------------------

def judge(prompts, drawn, gallery):
    """Rows, one per prompt, as results.make_result expects them; "right" is top-5.

    drawn: uint8 images [3,H,W], one per prompt. gallery: a Gallery.
    """
    found = gallery.neighbours(drawn, [prompt.style for prompt in prompts])
    ratios = emoji_copies.copy_ratios(drawn, gallery)
    rows = []
    for prompt, neighbours, ratio in zip(prompts, found, ratios, strict=True):
        row = dict(category=prompt.category, kind=prompt.kind, unit=prompt.unit,
                   prompt=prompt.text)
        row |= verdict(prompt, neighbours, gallery)
        row |= dict(training=neighbours.training, copy_ratio=round(ratio, 4))
        rows.append(row)
    return rows


def verdict(prompt, neighbours, gallery):
    """The values of MEASURES for a prompt, the rank of a right concept, and the nearest labels."""
    near = [gallery.images[number] for number in neighbours.concepts]
    ranks = [rank for rank, image in enumerate(near, 1) if image.concept in prompt.concepts]
    same_style = sum(image.style == prompt.style for image in gallery.images)
    nearest_style = gallery.images[neighbours.nearest].style
    return dict(
        right=int(ranks[0] <= NEAR),
        top_1=int(ranks[0] == 1),
        style=int(nearest_style == prompt.style),
        rank=ranks[0],
        chance=chance(len(ranks), len(near), NEAR),
        chance_top_1=chance(len(ranks), len(near), 1),
        chance_style=same_style / len(gallery.images),
        nearest=[image.label for image in near[:NEAR]])


def chance(right, concepts, near):
    """The probability that `near` different concepts drawn at random include a right one."""
    near = min(near, concepts)
    return 1 - comb(concepts - right, near) / comb(concepts, near)


# ---- the result ----------------------------------------------------------------------------------

def make_result(rows, settings):
    """The result of evaluate.py: top-5, the other measures, chance, and kinds within categories."""
    result = results.make_result("emoji", rows, settings)
    result["measures"] = measure(rows)
    kinds = list(dict.fromkeys((row["category"], row["kind"]) for row in rows if row["kind"]))
    result["kinds"] = {}
    for category, kind in sorted(kinds):
        some = [row for row in rows if (row["category"], row["kind"]) == (category, kind)]
        result["kinds"][f"{category}: {kind}"] = measure(some)
    return result


def measure(rows):
    """{measure: its "overall", "categories", "intervals" and, by category, "chance"}."""
    measured = {}
    for name, (key, chance_key) in MEASURES.items():
        measured[name] = results.summarise(rows, key)
        measured[name]["chance"] = results.summarise(rows, chance_key)["categories"]
    return measured


def print_result(result):
    """Print a table of each measure with its interval and chance, for categories and kinds."""
    rows = result["prompts"]
    head = "".join(f"{name:<29}" for name in MEASURES)
    print(f"{'':<34}{'prompts':>7}  {head}")
    for category in result["categories"]:
        count = sum(row["category"] == category for row in rows)
        print_line(category, count, result["measures"], category)
        for name, measured in result["kinds"].items():
            if name.startswith(f"{category}: "):
                count = sum(f"{row['category']}: {row['kind']}" == name for row in rows)
                print_line("  " + name.removeprefix(f"{category}: "), count, measured, category)
    print("with 95 % intervals, and what drawing a real image at random would score")


def print_line(name, count, measured, category):
    cells = ""
    for values in measured.values():
        score = values["categories"][category]
        interval = results.format_interval(values["intervals"][category])
        cells += f"{score:5.3f} {interval} {values['chance'][category]:5.3f}   "
    print(f"{name:<34}{count:>7}  {cells.rstrip()}")
