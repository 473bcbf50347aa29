"""Scenes of coloured shapes: random scenes, captions, layouts, and held-out compositions.

A Scene has one to four flat shapes on a flat background. The same type represents a full scene
(every field is known, so it can be drawn) and a description (fields that the caption does not
mention are None). A description is a full scene with some fields omitted, and an image is checked
by comparing the remaining fields.

These compositions are held out of training, from both the images and the text that the tiny Gemma
is trained on, whether or not the caption mentions them:

    HELD_OUT_PAIRS        a colour on a shape                          "a red star"
    HELD_OUT_TOGETHER     two shapes in one image                      "a star and a heart"
    is_held_out_count()   a count of one shape in one colour           "three pink squares"
                          (1 in 6 of them)

(The text may name one only to deny it: "is there a red star ? no".) The prompts of evaluate.py are
held-out compositions in every category where this is possible. A single shape ("a large circle")
cannot be held out, so prompts of the category "single object" may occur in training.
"""
import random
from collections import Counter
from typing import NamedTuple

# They are at least 100 apart in RGB, so that the nearest colour is correct even in a poor image.
COLOURS = {
    "red": (215, 25, 45),
    "orange": (250, 135, 0),
    "yellow": (255, 235, 40),
    "green": (30, 160, 60),
    "cyan": (40, 205, 225),
    "blue": (40, 70, 220),
    "purple": (130, 30, 180),
    "pink": (255, 140, 195),
    "black": (20, 20, 20),
    "white": (250, 250, 250),
    "gray": (130, 130, 130),
}
SHAPES = ("circle", "square", "triangle", "star", "heart", "cross")
SIZES = {"small": (8.4, 9.2), "large": (12.0, 13.0)}       # range of the radius
RELATIONS = ("left of", "right of", "above", "below")      # of the first group to the second
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
NUMBERS = ("zero", "one", "two", "three", "four")
CATEGORIES = ("single object", "two objects", "counting", "colours", "position", "attribution")

SIDE = 64.0        # side of the image; all lengths in this file are in units of 1/64 of the side
BORDER = 2.5       # free space between an object and the edges of its quarter of the image
WOBBLE = 5.0       # maximum offset of an object from its regular position, along each axis

HELD_OUT_PAIRS = frozenset({
    ("red", "star"),
    ("blue", "heart"),
    ("green", "triangle"),
    ("yellow", "cross"),
    ("purple", "circle"),
    ("orange", "square"),
})
HELD_OUT_TOGETHER = (
    frozenset({"star", "heart"}),
    frozenset({"circle", "cross"}),
    frozenset({"square", "triangle"}),
)


class Group(NamedTuple):
    """One or more objects that look the same."""
    count: int
    size: str | None                    # None: not mentioned
    colour: str | None                  # None: not mentioned
    shape: str


class Scene(NamedTuple):
    """A full scene, or the description of one, in which fields that are not mentioned are None."""
    groups: tuple[Group, ...]
    relation: str | None                # of groups[0] to groups[1], if these are two single objects
    background: str | None


class Disc(NamedTuple):
    """The position of an object: centre and radius, in 1/64 of the image's side."""
    x: float
    y: float
    r: float


class EvaluationPrompt(NamedTuple):
    category: str                       # one of CATEGORIES
    description: Scene                  # the scene that the text describes
    text: str


# ---------------------------------------------------------------------------- held out of training
def is_held_out_count(count: int, colour: str, shape: str) -> bool:
    """True if this number of objects of this colour and shape is held out (one in six is)."""
    if count < 2:
        return False
    index = count + list(COLOURS).index(colour) + 2 * SHAPES.index(shape)
    return index % 6 == 0


def is_held_out(scene: Scene) -> bool:
    """True if a full scene contains any composition that is held out of training."""
    shapes = {group.shape for group in scene.groups}
    if any(pair <= shapes for pair in HELD_OUT_TOGETHER):
        return True

    # objects of one colour and shape are counted together, even across groups
    totals = Counter()
    for group in scene.groups:
        totals[group.colour, group.shape] += group.count
    for (colour, shape), count in totals.items():
        if (colour, shape) in HELD_OUT_PAIRS or is_held_out_count(count, colour, shape):
            return True
    return False


# ---------------------------------------------------------------------------- random scenes
KIND_WEIGHTS = {"single": 0.17, "two": 0.27, "position": 0.24, "counting": 0.20, "mixed": 0.12}
COUNTS = (2, 3, 3, 4, 4)
MIXED_COUNTS = ((1, 1, 1), (1, 1, 1), (2, 1), (1, 2), (3, 1), (1, 3), (2, 2), (2, 1, 1),
                (1, 1, 1, 1))

# Captions omit only default values: a white background, black objects (white on a black
# background), large size, and left-to-right order. What a caption leaves open is hardest for the
# model, because all patches have to agree on one colour or position while their only input is
# noise. When unmentioned backgrounds, colours and positions were random, samples were still
# fragmented after 320,000 training images.
BACKGROUNDS = tuple(COLOURS) + 9 * ("white",)
# share of scenes in which all objects have the default colour
DEFAULT_COLOUR_SHARE = 0.2


def default_colour(background: str) -> str:
    """The colour of objects whose colour is not mentioned."""
    if background == "black":
        return "white"
    return "black"


def random_scene(rng: random.Random, kind: str | None = None) -> Scene:
    """A random full scene, which may be held out.

    kind: a key of KIND_WEIGHTS, or None to choose one with these weights.
    """
    if kind is None:
        kind = rng.choices(list(KIND_WEIGHTS), list(KIND_WEIGHTS.values()))[0]

    # Drawn for every kind, since the random stream of a seed depends on it.
    count = rng.choice(COUNTS)
    if kind == "single":
        counts = (1,)
    elif kind == "counting":
        counts = (count,)
    elif kind == "mixed":
        counts = rng.choice(MIXED_COUNTS)
    else:
        counts = (1, 1)

    background = rng.choice(BACKGROUNDS)
    colours = [colour for colour in COLOURS if colour != background]
    if rng.random() < DEFAULT_COLOUR_SHARE:
        colours = [default_colour(background)]

    groups = _random_groups(rng, counts, colours)
    relation = None
    if kind == "position":
        relation = rng.choice(RELATIONS)
    return Scene(groups, relation, background)


def _random_groups(rng, counts, colours):
    """One group for each count, no two with the same size, colour and shape."""
    while True:
        groups = []
        for count in counts:
            size = rng.choice(("small", "large"))
            colour = rng.choice(colours)
            shape = rng.choice(SHAPES)
            groups.append(Group(count, size, colour, shape))
        appearances = {(group.size, group.colour, group.shape) for group in groups}
        if len(appearances) == len(groups):
            return tuple(groups)


def training_scene(rng: random.Random) -> Scene:
    """A random full scene that contains no held-out composition."""
    while True:
        scene = random_scene(rng)
        if not is_held_out(scene):
            return scene


def omit_defaults(scene: Scene, rng: random.Random, size=0.5, colour=0.3, background=0.3,
                  relation=0.5) -> Scene:
    """A description of a full scene, in which some default values are None.

    size, colour, background, relation: probabilities of mentioning a default value. Other values
    are always mentioned. Default colours (and sizes) are mentioned for all groups or for none, but
    always if they are needed to distinguish two groups of the same shape.
    """
    shapes = {group.shape for group in scene.groups}
    colours_and_shapes = {(group.colour, group.shape) for group in scene.groups}
    mention_colours = len(shapes) < len(scene.groups) or rng.random() < colour
    mention_sizes = len(colours_and_shapes) < len(scene.groups) or rng.random() < size
    mention_relation = rng.random() < relation
    mention_background = rng.random() < background

    groups = []
    for group in scene.groups:
        group_size = _unless_default(group.size, "large", mention_sizes)
        group_colour = _unless_default(group.colour, default_colour(scene.background),
                                       mention_colours)
        groups.append(Group(group.count, group_size, group_colour, group.shape))
    return Scene(tuple(groups),
                 _unless_default(scene.relation, "left of", mention_relation),
                 _unless_default(scene.background, "white", mention_background))


def _unless_default(value, default, mention_default):
    if value == default and not mention_default:
        return None
    return value


# ---------------------------------------------------------------------------- captions
SYNONYMS = {
    "large": ("large",) * 5 + ("big",),
    "small": ("small",) * 5 + ("little",),
    "gray": ("gray", "gray", "gray", "grey"),
}
RELATION_PHRASES = {
    "left of": ("left of", "left of", "to the left of", "on the left of"),
    "right of": ("right of", "right of", "to the right of", "on the right of"),
    "above": ("above", "above", "above", "over"),
    "below": ("below", "below", "below", "under"),
}
IMAGE_PHRASES = ("{}",) * 6 + (
    "a picture of {}", "an image of {}", "a drawing of {}", "a photo of {}")
BACKGROUND_PHRASES = (
    "{} on a {} background", "{} on a {} background", "{} on {}", "{} with a {} background",
    "{} against a {} background")
# These fit only a noun phrase ("two stars"), not a sentence ("there are two stars").
LEADING_BACKGROUND_PHRASES = ("on a {1} background, {0}", "a {1} background with {0}")


def synonym(word: str, rng: random.Random) -> str:
    """The word itself or, at random, another word for it."""
    if word in SYNONYMS:
        return rng.choice(SYNONYMS[word])
    return word


def plural(shape: str) -> str:
    if shape.endswith("s"):
        return shape + "es"
    return shape + "s"


def article(words: str) -> str:
    """The words preceded by "a" or "an"."""
    if words[0] in "aeio":
        return "an " + words
    return "a " + words


def group_phrase(group: Group, rng: random.Random, bare: bool = False) -> str:
    """A noun phrase: "a large red circle", "three small stars". bare: without the article."""
    words = [synonym(word, rng) for word in (group.size, group.colour) if word]
    if group.count > 1:
        words.append(plural(group.shape))
        return " ".join([NUMBERS[group.count], *words])
    words.append(group.shape)
    phrase = " ".join(words)
    if bare:
        return phrase
    return article(phrase)


def caption(description: Scene, rng: random.Random) -> str:
    """A random caption for a description."""
    bare = rng.random() < 0.06
    if description.relation:
        text, is_sentence = _relation_phrase(description, rng, bare)
    else:
        text, is_sentence = _list_phrase(description, rng, bare)
    if not is_sentence and not bare:
        text = rng.choice(IMAGE_PHRASES).format(text)
    if not description.background:
        return text

    phrases = BACKGROUND_PHRASES
    if not is_sentence:
        phrases = BACKGROUND_PHRASES + LEADING_BACKGROUND_PHRASES
    phrase = rng.choice(phrases)
    text = phrase.format(text, synonym(description.background, rng))
    return text.replace("a orange", "an orange")


def _relation_phrase(description, rng, bare):
    """(text such as "a star above a circle", True if it is a sentence with "is")"""
    first, second = description.groups
    relation = description.relation
    if rng.random() < 0.5:                                 # state it from the other object's side
        first, second = second, first
        relation = OPPOSITE[relation]
    is_sentence = rng.random() < 0.12
    words = [group_phrase(first, rng, bare)]
    if is_sentence:
        words.append("is")
    words.append(rng.choice(RELATION_PHRASES[relation]))
    words.append(group_phrase(second, rng, bare))
    return " ".join(words), is_sentence


def _list_phrase(description, rng, bare):
    """(text such as "a star, a cross and two circles", True if it starts with "there is")"""
    phrases = [group_phrase(group, rng, bare) for group in description.groups]
    is_sentence = rng.random() < 0.08
    if is_sentence:
        first_word = phrases[0].split()[0]
        if first_word in NUMBERS:
            phrases[0] = "there are " + phrases[0]
        else:
            phrases[0] = "there is " + phrases[0]
    if len(phrases) == 1:
        return phrases[0], is_sentence
    return ", ".join(phrases[:-1]) + " and " + phrases[-1], is_sentence


# ---------------------------------------------------------------------------- layout
LOW = SIDE / 4
MIDDLE = SIDE / 2
HIGH = SIDE * 3 / 4
REGULAR_POSITIONS = {                   # number of objects -> their centres, in reading order
    1: [(MIDDLE, MIDDLE)],
    2: [(LOW, MIDDLE), (HIGH, MIDDLE)],
    3: [(LOW, LOW), (HIGH, LOW), (MIDDLE, HIGH)],
    4: [(LOW, LOW), (HIGH, LOW), (LOW, HIGH), (HIGH, HIGH)],
}


def layout(scene: Scene, rng: random.Random) -> list[Disc]:
    """A disc for every object, in the order of the groups. No disc touches another or the border.

    Objects are placed in reading order: one in the middle, two side by side, more in two rows. If
    there is a relation, the two objects are placed accordingly. Each object is moved from its
    regular position by up to WOBBLE along each axis if there is room.
    """
    radii = []
    for group in scene.groups:
        for _ in range(group.count):
            radii.append(rng.uniform(*SIZES[group.size]))

    positions = list(REGULAR_POSITIONS[len(radii)])
    if scene.relation in ("above", "below"):
        positions = [(y, x) for x, y in positions]
    if scene.relation in ("right of", "below"):
        positions.reverse()

    discs = []
    for (x, y), r in zip(positions, radii, strict=True):
        moved_x = _moved(x, r, rng)
        moved_y = _moved(y, r, rng)
        discs.append(Disc(moved_x, moved_y, r))
    return discs


def _moved(coordinate, r, rng):
    room = WOBBLE
    if coordinate != MIDDLE:                               # stay inside one quarter of the image
        room = min(WOBBLE, SIDE / 4 - BORDER - r)
    return coordinate + rng.uniform(-room, room)


def relation_holds(relation: str, a: Disc, b: Disc) -> bool:
    """True if a is left of (right of, above, below) b, and farther along that axis than across."""
    dx = b.x - a.x
    dy = b.y - a.y
    if relation == "left of":
        return abs(dy) < dx
    if relation == "right of":
        return abs(dy) < -dx
    if relation == "above":
        return abs(dx) < dy
    return abs(dx) < -dy


# ---------------------------------------------------------------------------- evaluation prompts
SCENE_KINDS = {                         # category of a prompt -> kind of its scene
    "single object": "single",
    "two objects": "two",
    "counting": "counting",
    "colours": "single",
    "position": "position",
    "attribution": "two",
}


def evaluation_prompts(n: int, seed: int = 0) -> list[EvaluationPrompt]:
    """n prompts, spread evenly over the categories."""
    rng = random.Random(f"evaluation {seed}")
    prompts = []
    for i in range(n):
        category = CATEGORIES[i % len(CATEGORIES)]
        description = evaluation_scene(category, rng)
        prompts.append(EvaluationPrompt(category, description, caption(description, rng)))
    return prompts


def evaluation_scene(category: str, rng: random.Random) -> Scene:
    """The description for one prompt, held out of training if its category allows it."""
    while True:
        scene = random_scene(rng, SCENE_KINDS[category])
        if _suits(scene, category):
            break
    if category == "position":
        return omit_defaults(scene, rng, size=0.4, colour=0.5, background=0.3, relation=1)

    # In the other categories, either all colours are mentioned or none.
    with_colours = category not in ("single object", "two objects")
    description = omit_defaults(scene, rng, size=0.4, colour=float(with_colours), background=0.3,
                                relation=1)
    groups = []
    for part, full in zip(description.groups, scene.groups, strict=True):
        if with_colours:
            groups.append(part._replace(colour=full.colour))
        else:
            groups.append(part._replace(colour=None))
    return description._replace(groups=tuple(groups))


def _suits(scene, category):
    """True if a scene contains the kind of held-out composition that its category tests."""
    shapes = [group.shape for group in scene.groups]
    together = frozenset(shapes) in HELD_OUT_TOGETHER
    paired = any((group.colour, group.shape) in HELD_OUT_PAIRS for group in scene.groups)
    if category == "single object":
        return True
    if category == "counting":
        return is_held_out(scene)
    if category == "colours":
        return paired
    if category == "attribution":
        return together or (paired and shapes[0] != shapes[1])
    return together
