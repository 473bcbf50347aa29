"""Captions of emoji, from the label and the tags that Unicode's CLDR and emojibase give them.

The label is the name, in lower case, with details after a colon: "waving hand: light skin tone",
"flag: china". A caption contains the label or some of the tags, and the style in words.
"""
import random
from collections import defaultdict

STYLES = {"google": "flat", "fluent": "3d"}
CAPTIONS = 7                                # per image
NAMED = 2                                   # of these, those with the label and without tags
WITH_TAGS = 2                               # of these, those with the label and tags
ATTEMPTS = 20                               # to choose tags that say what to draw
MAX_SHARED = 3                              # emoji that may have the same tags; more say too little

# Labels have no article, and which one would be right is unknown: "of sunglasses", "of red apple".
FRAMES = ("{style} {name}", "{name} in {style} style", "{name} as a {style} emoji",
          "a {style} emoji of {name}", "{style} icon of {name}", "{style} image of {name}")
STYLE_FRAMES = {"google": ("a simple flat drawing of {name}", "{name} drawn flat"),
                "fluent": ("a glossy 3d render of {name}", "{name} rendered in 3d")}
TAG_FRAMES = ("{name}, {style}", "{style}, {name}", "{style} emoji: {name}",
              "{name} in {style} style")


# ---------------------------------------------------------------------------- labels
def prompt_of(label: str, style: str) -> str:
    """The prompt that asks for an emoji by its label: "red apple, flat"."""
    return f"{label.lower()}, {STYLES[style]}"


def split_label(label):
    """The label's name and the list of its details: "man: dark skin tone, beard" has two."""
    name, _, details = label.partition(": ")
    return name, details.split(", ") if details else []


def without_tone(label: str) -> str:
    """The label without its skin tones: "man: beard" for "man: dark skin tone, beard"."""
    name, details = split_label(label)
    details = [detail for detail in details if not detail.endswith("skin tone")]
    return ": ".join(filter(None, [name, ", ".join(details)]))


def phrase_label(label):
    """The label in words, in several forms, the label itself first."""
    name, details = split_label(label)
    if not details:
        return [label]
    if name == "flag":
        return [label, f"flag of {details[0]}", f"{details[0]} flag"]
    if name == "keycap":
        return [label, f"keycap {details[0]}"]

    features = [detail for detail in details if detail.endswith(("skin tone", "hair", "beard"))]
    others = [detail for detail in details if detail not in features]
    sentence = name
    if features:
        sentence = f"{name} with {' and '.join(features)}"
    phrases = [label, ", ".join([sentence, *others])]
    if len(details) == 1 and details[0].endswith(("skin tone", "hair", "bald")):
        phrases.append(f"{details[0]} {name}")
    return phrases


# ---------------------------------------------------------------------------- captions
class CaptionWriter:
    """Writes the captions of emoji. It knows which tags are shared by many of them."""

    def __init__(self, entries: list[dict], seed: int):
        """entries: emojibase's, with "label" and, for most, "tags"."""
        self.seed = seed
        self.entries_with = defaultdict(set)               # word -> numbers of entries
        for number, entry in enumerate(entries):
            label = entry["label"].lower()
            for word in [*tags_of(entry), *label.replace(":", "").split()]:
                self.entries_with[word].add(number)

    def write(self, key: str, style: str, label: str, tags: list[str]) -> list[str]:
        """CAPTIONS different captions of one image, the prompt of its label first.

        They depend on the seed and the key, not on other images. tags: as tags_of returns them.
        """
        rng = random.Random(f"{self.seed} {key}")
        phrases = phrase_label(label)
        named = [frame.format(name=phrase, style=STYLES[style])
                 for frame in [*FRAMES, *STYLE_FRAMES[style]] for phrase in phrases]
        rng.shuffle(named)
        captions = [prompt_of(label, style), *named[:NAMED - 1]]
        for _ in range(WITH_TAGS):
            captions.append(self.add_tags(rng, style, phrases, tags))
        while len(captions) < CAPTIONS:
            captions.append(self.only_tags(rng, style, label, tags))

        # A few tags do not give enough captions: further ones with the label take their place.
        captions = dict.fromkeys(filter(None, [*captions, *named]))
        return list(captions)[:CAPTIONS]

    def add_tags(self, rng, style, phrases, tags):
        """A caption of the label and one to three tags that it does not contain, or ""."""
        label_words = set(phrases[0].replace(":", "").replace(",", "").split())
        further = [tag for tag in tags if tag not in label_words]
        if not further:
            return ""
        chosen = rng.sample(further, min(rng.randint(1, 3), len(further)))
        return write_list(rng, style, [rng.choice(phrases), *chosen])

    def only_tags(self, rng, style, label, tags):
        """A caption of two to five tags that few emoji have in common, or "".

        Details such as the skin tone, which tags do not tell, are added.
        """
        name, details = split_label(label)
        if name in ("flag", "keycap"):
            details = []                    # the tags tell: "cn, flag"
        tags = [tag for tag in tags if tag not in details]
        for _ in range(ATTEMPTS):
            chosen = rng.sample(tags, min(rng.randint(2, 5), len(tags)))
            if len(chosen) > 1 and self.count_shared(chosen) <= MAX_SHARED:
                return write_list(rng, style, [*chosen, *details])
        return ""

    def count_shared(self, tags):
        """The number of emoji that have all of these tags, without variants of skin tone."""
        return len(set.intersection(*(self.entries_with[tag] for tag in tags)))


def tags_of(entry: dict) -> list[str]:
    """The tags of an entry of emojibase, in lower case."""
    return [tag.lower() for tag in entry.get("tags", [])]


def write_list(rng, style, words):
    return rng.choice(TAG_FRAMES).format(name=", ".join(words), style=STYLES[style])
