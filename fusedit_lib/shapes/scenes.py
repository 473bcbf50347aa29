"""What a scene is, what can be said about it, and what training never contains.

A Scene is one to four flat shapes on a flat background. The same type holds a scene in full (every
field known: it can be drawn) and what a caption says about it (None where it says nothing), so a
caption is made by forgetting fields of a full scene, and judged by comparing the ones left.

Held out of every scene of training, in the pictures and in the tiny Gemma's text, said or not:
  HELD_OUT_PAIRS        a colour on a shape                     ("a red star")
  HELD_OUT_TOGETHER     two shapes in one picture               ("a star and a heart")
  is_held_out_count()   so many of one shape in one colour      ("three pink squares"), 1 in 6
(The text may name one to deny it: "is there a red star ? no".) The prompts of evaluate.py are made
of these wherever a category can hold something out. A shape word alone ("a large circle") cannot:
the single-object prompts are phrases training may contain.
"""
import random
from collections import Counter
from typing import NamedTuple

COLOURS = {  # at least 100 apart in RGB, so that the nearest is right even in a poor drawing
    "red": (215, 25, 45), "orange": (250, 135, 0), "yellow": (255, 235, 40),
    "green": (30, 160, 60), "cyan": (40, 205, 225), "blue": (40, 70, 220),
    "purple": (130, 30, 180), "pink": (255, 140, 195), "black": (20, 20, 20),
    "white": (250, 250, 250), "gray": (130, 130, 130),
}
SHAPES = ("circle", "square", "triangle", "star", "heart", "cross")
SIZES = {"small": (8.4, 9.2), "large": (12.0, 13.0)}       # range of the radius, 64 to a picture
RELATIONS = ("left of", "right of", "above", "below")      # of the first group to the second
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
NUMBERS = ("zero", "one", "two", "three", "four")
CATEGORIES = ("single object", "two objects", "counting", "colours", "position", "attribution")
SIDE = 64.0                                                # every length here is in 1/64 picture
BORDER, WOBBLE = 2.5, 5.0               # free space around a quarter; how far off an object stands

HELD_OUT_PAIRS = frozenset({("red", "star"), ("blue", "heart"), ("green", "triangle"),
                            ("yellow", "cross"), ("purple", "circle"), ("orange", "square")})
HELD_OUT_TOGETHER = (frozenset({"star", "heart"}), frozenset({"circle", "cross"}),
                     frozenset({"square", "triangle"}))


class Group(NamedTuple):
    """`count` alike objects; None is a size or colour that is not said."""
    count: int
    size: str | None
    colour: str | None
    shape: str


class Scene(NamedTuple):
    groups: tuple[Group, ...]
    relation: str | None                # of groups[0] to groups[1], two single objects
    background: str | None


class Disc(NamedTuple):
    """Where an object stands: centre and radius, in 1/64 of the picture's side."""
    x: float
    y: float
    r: float


# ---- what training never contains ----------------------------------------------------------------

def is_held_out_count(count: int, colour: str, shape: str) -> bool:
    """One in six of the (count, colour, shape) with two or more objects."""
    return count > 1 and (count + list(COLOURS).index(colour) + 2 * SHAPES.index(shape)) % 6 == 0


def is_held_out(scene: Scene) -> bool:
    """Whether a full scene holds any composition that training never contains."""
    shapes = {g.shape for g in scene.groups}
    if any(both <= shapes for both in HELD_OUT_TOGETHER):
        return True
    alike = Counter()
    for g in scene.groups:
        alike[g.colour, g.shape] += g.count
    return any(pair in HELD_OUT_PAIRS or is_held_out_count(n, *pair) for pair, n in alike.items())


# ---- drawing a scene from the grammar ------------------------------------------------------------

KINDS = {"single": 0.17, "two": 0.27, "position": 0.24, "counting": 0.20, "mixed": 0.12}
COUNTS = (2, 3, 3, 4, 4)
MIXED = ((1, 1, 1), (1, 1, 1), (2, 1), (1, 2), (3, 1), (1, 3), (2, 2), (2, 1, 1), (1, 1, 1, 1))
# Captions leave out only what is usual: a white background, black ink (white on black), large and
# left to right. What a caption leaves open is the hardest to draw: all patches must settle on one
# colour or place while all they see is noise. With random silent backgrounds, colours and places,
# pictures were still in pieces after 320,000 of training.
BACKGROUNDS = tuple(COLOURS) + 9 * ("white",)
DRAWINGS = 0.2                                             # share of scenes all in ink


def ink(background: str) -> str:
    """The colour of what is drawn on a background with no colour said."""
    return "white" if background == "black" else "black"


def draw_scene(rng: random.Random, kind: str | None = None) -> Scene:
    """A full scene of the kind (None: any, in the proportions of KINDS), held out or not."""
    kind = kind or rng.choices(list(KINDS), list(KINDS.values()))[0]
    counts = {"single": (1,), "counting": (rng.choice(COUNTS),)}.get(kind, (1, 1))
    if kind == "mixed":
        counts = rng.choice(MIXED)
    background = rng.choice(BACKGROUNDS)
    colours = [c for c in COLOURS if c != background]
    if rng.random() < DRAWINGS:
        colours = [ink(background)]
    while True:
        groups = tuple(Group(n, rng.choice(("small", "large")), rng.choice(colours),
                             rng.choice(SHAPES)) for n in counts)
        if len({g[1:] for g in groups}) == len(groups):    # no two groups alike
            break
    return Scene(groups, rng.choice(RELATIONS) if kind == "position" else None, background)


def training_scene(rng: random.Random) -> Scene:
    """A full scene with nothing held out in it."""
    while is_held_out(scene := draw_scene(rng)):
        pass
    return scene


def forget(scene: Scene, rng: random.Random, size=0.5, colour=0.3, background=0.3,
           relation=0.5) -> Scene:
    """What a caption says of a full scene: what is usual only with the probability given.

    Usual colours (and sizes) are said of all groups or of none, but always where they are what
    tells two groups of one shape apart.
    """
    shapes, pairs = {g.shape for g in scene.groups}, {g[2:] for g in scene.groups}
    say_colours = len(shapes) < len(scene.groups) or rng.random() < colour
    say_sizes = len(pairs) < len(scene.groups) or rng.random() < size

    def said(value, usual, always):
        return value if value != usual or always else None

    groups = tuple(Group(g.count, said(g.size, "large", say_sizes),
                         said(g.colour, ink(scene.background), say_colours), g.shape)
                   for g in scene.groups)
    return Scene(groups, said(scene.relation, "left of", rng.random() < relation),
                 said(scene.background, "white", rng.random() < background))


# ---- captions ------------------------------------------------------------------------------------

SYNONYMS = {"large": ("large",) * 5 + ("big",), "small": ("small",) * 5 + ("little",),
            "gray": ("gray", "gray", "gray", "grey")}
RELATION_PHRASES = {
    "left of": ("left of", "left of", "to the left of", "on the left of"),
    "right of": ("right of", "right of", "to the right of", "on the right of"),
    "above": ("above", "above", "above", "over"),
    "below": ("below", "below", "below", "under"),
}
FRAMES = ("{}",) * 6 + ("a picture of {}", "an image of {}", "a drawing of {}", "a photo of {}")
GROUNDS = ("{} on a {} background", "{} on a {} background", "{} on {}", "{} with a {} background",
           "{} against a {} background", "on a {1} background, {0}", "a {1} background with {0}")


def synonym(word: str, rng: random.Random) -> str:
    return rng.choice(SYNONYMS[word]) if word in SYNONYMS else word


def plural(shape: str) -> str:
    return shape + ("es" if shape.endswith("s") else "s")


def article(words: str) -> str:
    return ("an " if words[0] in "aeio" else "a ") + words


def describe(group: Group, rng: random.Random, bare: bool = False) -> str:
    """"a large red circle", "three small stars"; bare: no article."""
    words = [synonym(w, rng) for w in (group.size, group.colour) if w]
    noun = " ".join(words + [group.shape if group.count == 1 else plural(group.shape)])
    if group.count > 1:
        return f"{NUMBERS[group.count]} {noun}"
    return noun if bare else article(noun)


def caption(said: Scene, rng: random.Random) -> str:
    """One of the many ways to put what is said into words."""
    bare = rng.random() < 0.06
    if said.relation:
        first, second, relation = *said.groups, said.relation
        if rng.random() < 0.5:                             # the same fact from the other side
            first, second, relation = second, first, OPPOSITE[relation]
        is_word = " is " if rng.random() < 0.12 else " "
        things = (describe(first, rng, bare) + is_word + rng.choice(RELATION_PHRASES[relation])
                  + " " + describe(second, rng, bare))
        framed = is_word == " "
    else:
        parts = [describe(g, rng, bare) for g in said.groups]
        if rng.random() < 0.08:
            parts[0] = ("there are " if parts[0].split()[0] in NUMBERS else "there is ") + parts[0]
        framed = not parts[0].startswith("there")
        things = (", ".join(parts[:-1]) + " and " if len(parts) > 1 else "") + parts[-1]
    if framed and not bare:
        things = rng.choice(FRAMES).format(things)
    if not said.background:
        return things
    frame = rng.choice(GROUNDS if framed else GROUNDS[:5])
    text = frame.format(things, synonym(said.background, rng))
    return text.replace("a orange", "an orange")


# ---- where the objects stand ---------------------------------------------------------------------

def place(scene: Scene, rng: random.Random) -> list[Disc]:
    """A disc for every object, in the order of the groups; they never touch, nor the border.

    In reading order: one in the middle, two side by side, more in two rows; two with a relation
    as it says. Each is off its place by up to WOBBLE, as far as there is room.
    """
    radii = [rng.uniform(*SIZES[g.size]) for g in scene.groups for _ in range(g.count)]
    low, mid, high = SIDE / 4, SIDE / 2, SIDE * 3 / 4
    places = {1: [(mid, mid)], 2: [(low, mid), (high, mid)],
              3: [(low, low), (high, low), (mid, high)],
              4: [(low, low), (high, low), (low, high), (high, high)]}[len(radii)]
    if scene.relation in ("above", "below"):
        places = [(y, x) for x, y in places]
    if scene.relation in ("right of", "below"):
        places.reverse()

    def near(at, r):
        room = WOBBLE if at == mid else min(WOBBLE, SIDE / 4 - BORDER - r)
        return at + rng.uniform(-room, room)
    return [Disc(near(x, r), near(y, r), r) for (x, y), r in zip(places, radii, strict=True)]


def stands(relation: str, a: Disc, b: Disc) -> bool:
    """Whether a is left of (...) b: further along that axis than across it."""
    dx, dy = b.x - a.x, b.y - a.y
    along, across = {"left of": (dx, dy), "right of": (-dx, dy),
                     "above": (dy, dx), "below": (-dy, dx)}[relation]
    return along > 0 and abs(across) < along


# ---- the prompts of the evaluation ---------------------------------------------------------------

def evaluation_prompts(n: int, seed: int = 0) -> list[tuple[str, Scene, str]]:
    """n prompts (category, what is said, prompt), spread evenly over the categories."""
    rng = random.Random(f"evaluation {seed}")
    prompts = []
    for i in range(n):
        category = CATEGORIES[i % len(CATEGORIES)]
        said = evaluation_scene(category, rng)
        prompts.append((category, said, caption(said, rng)))
    return prompts


def evaluation_scene(category: str, rng: random.Random) -> Scene:
    """What one prompt says: held out of training wherever its category can be."""
    kind = {"two objects": "two", "counting": "counting", "position": "position",
            "attribution": "two"}.get(category, "single")
    while True:
        scene = draw_scene(rng, kind)
        shapes = [g.shape for g in scene.groups]
        together = frozenset(shapes) in HELD_OUT_TOGETHER
        paired = any(g[2:] in HELD_OUT_PAIRS for g in scene.groups)
        if {"single object": True, "two objects": together, "counting": is_held_out(scene),
            "colours": paired, "position": together,
            "attribution": together or (paired and len(set(shapes)) == 2)}[category]:
            break
    colour = {"single object": 0, "two objects": 0, "position": 0.5}.get(category, 1)
    said = forget(scene, rng, size=0.4, colour=colour, background=0.3, relation=1)
    if category != "position":                             # all colours are said, or none
        said = said._replace(groups=tuple(s._replace(colour=g.colour if colour else None)
                                          for s, g in zip(said.groups, scene.groups)))
    return said
