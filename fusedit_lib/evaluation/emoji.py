"""The emoji benchmark: the prompts, and the verdicts on drawn images.

A drawn image is right if its nearest real images show what its prompt asks for. The real images are
those of the asked style, from the training set and the held-out set. Skin tones of an emoji count
as one concept.
"""
import random
from typing import NamedTuple

from fusedit_lib.data.emoji_captions import STYLES, prompt_of
from fusedit_lib.evaluation import results
from fusedit_lib.evaluation.benchmarks import Benchmark
from fusedit_lib.evaluation.emoji_chance import RandomReal, shuffle_tests
from fusedit_lib.evaluation.emoji_gallery import NEAR, held_out_categories

SEEN = 200                                  # prompts from the training set
CATEGORIES = ("seen", "held-out", "other tone", "unseen words")


class Measure(NamedTuple):
    """A measure of the drawn images."""
    key: str                                # of its value in a row
    chance: str                             # key of the value that a random real image would have
    near: int | None                        # concepts among which a right one must be


MEASURES = {"top-1": Measure("top_1", "chance_top_1", 1),
            "top-5": Measure("right", "chance", NEAR),
            "style": Measure("style", "chance_style", None)}


class Prompt(NamedTuple):
    """A prompt and what counts as right."""
    category: str                           # one of CATEGORIES
    kind: str                               # of unseen words: synonym, ...
    unit: str                               # prompts with the same answers share a unit
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
    groups = [seen_prompts(images, rng), *held_out_prompts(images, rng),
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


def pair_prompt(image, category):
    """The Prompt that is an image's own caption. All skin tones of an emoji are one unit."""
    unit = f"{image.style}-{image.concept}"
    return Prompt(category, "", unit, image.prompt, image.style, frozenset([image.concept]))


def seen_prompts(images, rng):
    """Prompts of SEEN different (style, concept) pairs of the training set."""
    trained = [image for image in images if image.part == "train"]
    rng.shuffle(trained)
    by_pair = {}
    for image in trained:
        by_pair.setdefault((image.style, image.concept), image)
    return [pair_prompt(image, "seen") for image in list(by_pair.values())[:SEEN]]


def held_out_prompts(images, rng):
    """Two lists: Prompts of the held-out images of the category "held-out", and of "other tone"."""
    groups = []
    for category, numbers in held_out_categories(images).items():
        prompts = [pair_prompt(images[number], category) for number in numbers]
        rng.shuffle(prompts)
        groups.append(prompts)
    return groups


def unseen_prompts(images, words, rng):
    """Prompts of unseen words in both styles. Those that no image of a style fits are left out."""
    concepts = {}                           # (style, label) -> concepts
    for image in images:
        concepts.setdefault((image.style, image.label), set()).add(image.concept)
    words = list(words)
    rng.shuffle(words)
    prompts = []
    for word in words:
        unit = " | ".join(sorted(word.labels))
        for style in STYLES:
            right = set()
            for label in word.labels:
                right |= concepts.get((style, label), set())
            if right:
                prompts.append(Prompt("unseen words", word.kind, unit,
                                      prompt_of(word.prompt, style), style, frozenset(right)))
    return prompts


def benchmark(prompts):
    """Emoji: prompts of the training set, held-out prompts, and prompts in words that no caption
    contains. An image is right if its nearest real images show what the prompt asks for."""
    files = [[f"{k:05}.png"] for k in range(len(prompts))]
    return Benchmark([prompt.text for prompt in prompts], files)


# ---- verdicts ------------------------------------------------------------------------------------

class Verdict(NamedTuple):
    """The scores of one drawn image."""
    prompt: Prompt
    near: list[str]                         # the NEAR nearest concepts of the asked style
    row: dict                               # as results.make_result expects it; "right" is top-5


def judge(prompts, drawn, gallery):
    """Verdicts, one per prompt.

    drawn: uint8 images [3,H,W], one per prompt. gallery: a Gallery.
    """
    random_real = RandomReal(gallery)
    found = gallery.neighbours(drawn, [prompt.style for prompt in prompts])
    verdicts = []
    for prompt, neighbours in zip(prompts, found, strict=True):
        near = [gallery.images[number] for number in neighbours.concepts]
        row = dict(category=prompt.category, kind=prompt.kind, unit=prompt.unit,
                   prompt=prompt.text)
        row |= scores(prompt, [image.concept for image in near])
        row |= dict(
            style=int(gallery.images[neighbours.nearest].style == prompt.style),
            chance=random_real.score(prompt, NEAR),
            chance_top_1=random_real.score(prompt, 1),
            chance_style=random_real.share[prompt.style],
            nearest=[image.label for image in near[:NEAR]],
            training=neighbours.training)
        verdicts.append(Verdict(prompt, [image.concept for image in near[:NEAR]], row))
    return verdicts


def scores(prompt, concepts):
    """The rank of the first right concept, from 1, among the concepts with the nearest first, and
    whether the prompt is right at top-5 and top-1."""
    rank = 1 + next(k for k, concept in enumerate(concepts) if concept in prompt.concepts)
    return dict(right=int(rank <= NEAR), top_1=int(rank == 1), rank=rank)


# ---- the result ----------------------------------------------------------------------------------

def make_result(verdicts, settings):
    """The result of evaluate.py: top-5, the other measures, and kinds within categories."""
    result = results.make_result("emoji", [verdict.row for verdict in verdicts], settings)
    result["measures"] = measure(verdicts)
    by_kind = {}
    for verdict in verdicts:
        if verdict.prompt.kind:
            name = f"{verdict.prompt.category}: {verdict.prompt.kind}"
            by_kind.setdefault(name, []).append(verdict)
    result["kinds"] = {name: measure(by_kind[name]) for name in sorted(by_kind)}
    return result


def measure(verdicts):
    """{measure: its "overall", "categories", "intervals" and, by category, "chance" and, except
    for the style, "shuffled"}."""
    rows = [verdict.row for verdict in verdicts]
    measured = {}
    for name, one in MEASURES.items():
        measured[name] = results.summarise(rows, one.key)
        measured[name]["chance"] = results.category_means(rows, one.chance)
        if one.near is not None:
            tests = shuffle_tests(verdicts, one.near)
            measured[name]["shuffled"] = {category: test._asdict()
                                          for category, test in tests.items()}
    return measured


def print_result(result):
    """Print a table of each measure for the categories and their kinds."""
    for name in MEASURES:
        head = f"{name:<20}prompts  score  95 % interval   chance"
        if "shuffled" in result["measures"][name]:
            head += "  shuffled       p"
        print(head)
        for category in result["categories"]:
            some = [row for row in result["prompts"] if row["category"] == category]
            print_line(category, len(some), result["measures"][name], category)
            for title, measured in result["kinds"].items():
                if title.startswith(f"{category}: "):
                    kind = title.removeprefix(f"{category}: ")
                    count = sum(row["kind"] == kind for row in some)
                    print_line(f"  {kind}", count, measured[name], category)
        print()
    print("chance: a real image of the asked style, drawn at random; shuffled: the drawn images\n"
          "with other prompts of the category and style; p: how often that scores as high")


def print_line(title, count, values, category):
    score = values["categories"][category]
    interval = results.format_interval(values["intervals"][category])
    line = f"{title:<20}{count:>7}  {score:5.3f}  {interval}  {values['chance'][category]:5.3f}"
    if "shuffled" in values:
        test = values["shuffled"][category]
        line += f"  {test['score']:8.3f}  {test['p']:6.4f}"
    print(line)
