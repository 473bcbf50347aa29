"""The text that the tiny Gemma is trained on: captions of scenes, followed by questions about them.

A frozen text tower retains only what its own training required. With captions alone, the next-token
loss never requires it to bind a colour to a shape: any colour may follow "a", so forgetting the
colour costs nothing. Here every caption is followed by questions with answers ("what color is the
small circle ? red"), some of which ask for a list of the objects or for the caption in other words.
30 % of the captions are repeated first. To predict all this, the keys and values at the words of
the caption have to carry colour, size, number and position, each bound to its object. These keys
and values are what the DiT attends to.
"""
import random
import re
from collections.abc import Callable
from typing import NamedTuple

import torch

from fusedit_lib.shapes import scenes
from fusedit_lib.shapes.scenes import NUMBERS, OPPOSITE, RELATIONS, Group, Scene

SPECIAL_TOKENS = ("<pad>", "<eos>", "<bos>", "<unk>")
OTHER_WORDS = """, . ? : a an the is are it in of on to there and with against over under left right
above below background picture image drawing photo big little grey zero one two three four what
which how many color colour size shape where objects same list yes no unknown nothing none
""".split()
MAX_TOKENS = 128
PAD_ID = 0


class Part(NamedTuple):
    """A piece of text."""
    words: str
    kind: str                           # "": not an answer; "twice": the repeated caption; else
                                        # the kind of question that it answers, as in QUESTIONS


class Question(NamedTuple):
    text: str
    answer: str


class AnswerSpan(NamedTuple):
    """The tokens of an answer: [start, end)."""
    kind: str
    start: int
    end: int


def vocabulary() -> list[str]:
    """Every word that the demo knows, special tokens first. A word's index is its token id."""
    plurals = [scenes.plural(shape) for shape in scenes.SHAPES]
    words = [*SPECIAL_TOKENS, *scenes.COLOURS, *scenes.SIZES, *scenes.SHAPES, *plurals,
             *OTHER_WORDS]
    return list(dict.fromkeys(words))                      # without duplicates


def split_words(text: str) -> list[str]:
    return re.findall(r"\w+|[^\w\s]", text)


# ---------------------------------------------------------------------------- phrases
class _FirstChoice(random.Random):
    """Always makes the first choice, so that a phrase has one fixed wording without synonyms."""
    def choice(self, seq):
        return seq[0]


def fixed_phrase(group: Group) -> str:
    """Everything that is mentioned about a group, in one fixed wording: "a large red circle"."""
    return scenes.group_phrase(group, _FirstChoice(0))


def referring_phrase(description: Scene, k: int, rng: random.Random) -> str | None:
    """Words, without an article, that refer only to group k; None if there are none."""
    group = description.groups[k]
    others = description.groups[:k] + description.groups[k + 1:]
    same_shape = [other for other in others if other.shape == group.shape]

    adjectives = []                     # lists; each, together with the noun, identifies the group
    if not same_shape:
        adjectives.append([])
    for field in ("colour", "size"):
        value = getattr(group, field)
        if value and all(getattr(other, field) not in (value, None) for other in same_shape):
            adjectives.append([value])
    if not adjectives:
        return None

    noun = group.shape
    if group.count > 1:
        noun = scenes.plural(group.shape)
    return " ".join([*rng.choice(adjectives), noun])


# ---------------------------------------------------------------------------- questions
# Each function makes a random question about a description, or returns None if the chosen question
# cannot be asked or answered.

def ask_field(description, rng):
    """Asks "what color is the circle ?". The answer is the mentioned value or "unknown"."""
    k = rng.randrange(len(description.groups))
    field = rng.choice(("colour", "colour", "size"))
    group = description.groups[k]
    value = getattr(group, field)
    who = referring_phrase(description, k, rng)
    if who is None:
        return None
    if value is not None and value in who.split():         # the question would give the answer
        return None

    word = field
    if field == "colour":
        word = rng.choice(("color", "color", "colour"))
    verb = "is"
    if group.count > 1:
        verb = "are"
    return Question(f"what {word} {verb} the {who} ?", value or "unknown")


def ask_which(description, rng):
    """Asks "what shape is red ?". The answer is a shape, such as "circle"."""
    k = rng.randrange(len(description.groups))
    field = rng.choice(("colour", "size"))
    group = description.groups[k]
    value = getattr(group, field)
    if value is None:
        return None
    for other in description.groups:
        if other is not group and getattr(other, field) in (value, None):
            return None
    return Question(f"what shape is {value} ?", group.shape)


def ask_background(description, rng):
    return Question("what color is the background ?", description.background or "unknown")


def ask_count(description, rng):
    """Asks "how many red squares ?". The answer is the sum over all groups, which may be zero."""
    groups = description.groups
    if rng.random() < 0.2:
        return Question("how many objects ?", NUMBERS[sum(group.count for group in groups)])

    # shapes in the scene are chosen more often than the others
    shape = rng.choice([group.shape for group in groups] * 3 + list(scenes.SHAPES))
    same_shape = [group for group in groups if group.shape == shape]
    colours = [group.colour for group in same_shape if group.colour]
    plural = scenes.plural(shape)
    all_colours_known = len(colours) == len(same_shape)
    if colours and all_colours_known and rng.random() < 0.4:
        any_colour = rng.choice(list(scenes.COLOURS))
        colour = rng.choice([*colours, any_colour])
        count = sum(group.count for group in same_shape if group.colour == colour)
        return Question(f"how many {colour} {plural} ?", NUMBERS[count])
    count = sum(group.count for group in same_shape)
    return Question(f"how many {plural} ?", NUMBERS[count])


def ask_exists(description, rng):
    """Asks "is there a green circle ?", often with the colour of another object."""
    group = rng.choice(description.groups)
    any_colour = rng.choice(list(scenes.COLOURS))
    if rng.random() < 0.5:
        colour = group.colour
    else:
        colours = [other.colour for other in description.groups]
        colour = rng.choice([*colours, description.background, any_colour])
    if colour is None:
        return None

    same_shape = [other for other in description.groups if other.shape == group.shape]
    colours_there = [other.colour for other in same_shape]
    if None in colours_there:
        return None
    answer = "no"
    if colour in colours_there:
        answer = "yes"
    return Question(f"is there {scenes.article(colour)} {group.shape} ?", answer)


def ask_place(description, rng):
    """Asks "what is left of the star ?" or "where is the circle ?", from either object's side."""
    if not description.relation:
        return None
    k = rng.randrange(2)
    relation = description.relation                        # of group k to the other group
    if k == 1:
        relation = OPPOSITE[description.relation]
    who = referring_phrase(description, k, rng)
    other = referring_phrase(description, 1 - k, rng)
    if who is None or other is None:
        return None

    if rng.random() < 0.5:
        other_shape = description.groups[1 - k].shape
        return Question(f"where is the {who} ?", f"{relation} the {other_shape}")
    if rng.random() < 0.3:
        wrong_relation = rng.choice([r for r in RELATIONS if r != relation])
        return Question(f"what is {wrong_relation} the {other} ?", "nothing")
    return Question(f"what is {relation} the {other} ?", fixed_phrase(description.groups[k]))


def _list_order(group: Group) -> tuple:
    """Sort key: by shape in the order of SHAPES, then by colour, then small before large."""
    colour = -1
    if group.colour:
        colour = list(scenes.COLOURS).index(group.colour)
    return scenes.SHAPES.index(group.shape), colour, group.size == "large"


def ask_list(description, rng):
    """Asks for a list in a fixed order: "list : a large red circle , two stars , on white"."""
    phrases = [fixed_phrase(group) for group in sorted(description.groups, key=_list_order)]
    phrases.append(f"on {description.background or 'unknown'}")
    return Question("list :", " , ".join(phrases))


def ask_again(description, rng):
    """Asks for the caption in other words. Only the choice of words is uncertain."""
    return Question("same :", scenes.caption(description, rng))


class QuestionKind(NamedTuple):
    name: str
    ask: Callable
    weight: int                         # in the random choice among all kinds


QUESTIONS = (
    QuestionKind("field", ask_field, 6),
    QuestionKind("which", ask_which, 3),
    QuestionKind("background", ask_background, 2),
    QuestionKind("count", ask_count, 3),
    QuestionKind("exists", ask_exists, 2),
    QuestionKind("place", ask_place, 6),
    QuestionKind("list", ask_list, 3),
    QuestionKind("again", ask_again, 3),
)


# ---------------------------------------------------------------------------- texts
def random_text(description: Scene, rng: random.Random) -> list[Part]:
    """A caption, sometimes repeated, then a few questions with their answers.

    No question is repeated, so each has to be answered from the caption, not an earlier answer.
    """
    caption = scenes.caption(description, rng) + " ."
    parts = [Part(caption, "")]
    if rng.random() < 0.3:
        parts.append(Part(caption, "twice"))

    weights = [kind.weight for kind in QUESTIONS]
    count = rng.randint(2, 7)
    asked = set()
    for kind in rng.choices(QUESTIONS, weights, k=count):
        question = kind.ask(description, rng)
        if question is None or question.text in asked:
            continue
        asked.add(question.text)
        parts.append(Part(question.text, ""))
        parts.append(Part(question.answer, kind.name))
        parts.append(Part(".", ""))
    return parts


def encode(parts: list[Part], ids: dict) -> tuple[list[int], list[AnswerSpan]]:
    """The token ids of a text and the spans of its answers. Parts beyond MAX_TOKENS are omitted."""
    tokens = [ids["<bos>"]]
    answers = []
    for part in parts:
        new = [ids[word] for word in split_words(part.words)]
        end = len(tokens) + len(new)
        if end >= MAX_TOKENS:
            break
        if part.kind == "twice":        # its first word cannot be predicted: anything could follow
            answers.append(AnswerSpan(part.kind, len(tokens) + 1, end))
        elif part.kind:
            answers.append(AnswerSpan(part.kind, len(tokens), end))
        tokens += new
    tokens.append(ids["<eos>"])
    return tokens, answers


def batches(rng: random.Random, batch_size: int, ids: dict, draw_scene=scenes.training_scene,
            pool=16):
    """Yield (token ids [B,T] padded on the right with 0, answers of each row) indefinitely.

    draw_scene(rng): returns a random full scene. pool: see padded_batches.
    """
    def draw_row():
        description = scenes.omit_defaults(draw_scene(rng), rng)
        return encode(random_text(description, rng), ids)

    return padded_batches(rng, batch_size, draw_row, pool)


def padded_batches(rng: random.Random, batch_size: int, draw_row: Callable, pool=16):
    """Yield (token ids [B,T] padded on the right with 0, notes on each row) indefinitely.

    draw_row(): returns the token ids of a random text, and notes on it. pool: number of batches
    whose texts are sorted by length together. Texts of similar length then share a batch; otherwise
    half of the tokens would be padding.
    """
    while True:
        rows = [draw_row() for _ in range(batch_size * pool)]
        rows.sort(key=lambda row: len(row[0]))
        for k in rng.sample(range(pool), pool):
            batch = rows[k * batch_size:(k + 1) * batch_size]
            longest = len(batch[-1][0])
            padded = [tokens + [PAD_ID] * (longest - len(tokens)) for tokens, _ in batch]
            yield torch.tensor(padded), [notes for _, notes in batch]
