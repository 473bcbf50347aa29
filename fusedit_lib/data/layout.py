"""Finds the image and the captions among the files of a sample.

A sample is {extension: bytes}. The extension is all that follows the first dot of a file's name,
in lower case, as in WebDataset. The first line of a table that applies is used:

    image                                       captions
    --image-key                                 --caption-key, an extension or a field of KEY.json
    image.jpg, image.png, image.webp, ...       synthetic_caption.txt and original_caption.txt
    jpg, jpeg, png, webp, ...                   txt, caption, caption.txt, text, ...
    *.jpg, *.png, ..., if there is only one     *.txt, if there is only one
                                                a field of KEY.json: caption, text, ...

The names of captions are those of columns.CAPTION_FIELDS, after synthetic_caption in KEY.json. A
caption file holds one caption per line, unless a field of KEY.json has the same text, as
img2dataset writes captions with line breaks. A list in KEY.json is several captions. Blank captions
do not count. So the samples of our own shards (KEY.image.jpg), of img2dataset and of cc12m-wds
(KEY.jpg, KEY.txt, KEY.json) are all read as they are.
"""
import json
import math
from collections import Counter
from dataclasses import dataclass, field

from fusedit_lib.data.columns import CAPTION_FIELDS, matching, texts_of
from fusedit_lib.data.images import SUFFIXES

IMAGES = ["jpg", "jpeg", "png", "webp"]     # and then the others
IMAGES += sorted({suffix[1:] for suffix in SUFFIXES} - set(IMAGES))

OUR_CAPTIONS = ("synthetic_caption.txt", "original_caption.txt")
CAPTIONS = ["txt"]
for name in CAPTION_FIELDS:
    CAPTIONS += [name, f"{name}.txt"]

MAX_SKIPPED = 0.01                          # share of samples that training may skip by default
EXAMPLES = 5                                # samples named for each kind of problem
SHOWN = 12                                  # extensions or fields named in a message

NOT_ADJACENT = "files of a sample that are not next to each other"
REPEATED = "two files with the same name"
REMEDIES = {
    "no image": "--image-key names the extension of the image",
    "several images": "A key ends at the first dot of a file's name, as in WebDataset, so that "
                      "samples with dots in their names become one. Unpack the tars and pack the "
                      "images with `prepare_data.py folder`; if all are of one sample, --image-key "
                      "names one",
    "no caption": "--caption-key names an extension, or a field of KEY.json",
    "several caption files": "--caption-key names one",
    "blank caption": "Training skips these samples",
    "caption is not UTF-8": "Convert the captions to UTF-8, or name others with --caption-key",
    "KEY.json is not JSON": "--caption-key names an extension that has captions",
    REPEATED: "A key ends at the first dot of a file's name, so that these samples are one: give "
              "them keys of their own",
    NOT_ADJACENT: "Unpack such a tar and pack it again in the order of the names: "
                  "mkdir x && tar -xf OLD.tar -C x && tar --sort=name -cf NEW.tar -C x .",
}


class LayoutError(ValueError):
    """A sample without an image or a caption that training can use. kind: a key of REMEDIES."""

    def __init__(self, kind, detail):
        super().__init__(f"{kind} ({detail})")
        self.kind = kind


# ------------------------------------------------------------------------------ one sample

def only_one(names, suffixes, kind):
    """The only name whose last part is one of suffixes; None if there is none.

    Raises LayoutError of this kind if there are several.
    """
    found = [name for name in names if name.rpartition(".")[2] in suffixes]
    if len(found) > 1:
        raise LayoutError(kind, shorten(found))
    return found[0] if found else None


def find_image(files, key=""):
    """The extension of a sample's image. key: --image-key. Raises LayoutError if there is none."""
    wanted = IMAGES
    if key:
        wanted = [key.lower().removeprefix(".")]
    else:
        for name in files:
            if name.startswith("image.") and name.rpartition(".")[2] in IMAGES:
                return name
    for name in wanted:
        if name in files:
            return name
    name = None
    if not key:
        name = only_one(files, IMAGES, "several images")
    if name is None:
        raise LayoutError("no image", describe(files))
    return name


def is_merged(files):
    """True if a sample was several, such as cat.jpg and cat.txt, and cat.2.jpg and cat.2.txt."""
    images = set()
    texts = set()
    for name in files:
        prefix, _, suffix = name.rpartition(".")
        if suffix in IMAGES:
            images.add(prefix)
        elif suffix in ("txt", "json", "caption"):
            texts.add(prefix)
    return len(images) > 1 and bool(images & texts - {"", "image"})


def caption_names(files, key=""):
    """The extensions of a sample's captions; [] if there are none. key: --caption-key."""
    if key:
        return [name for name in [key.lower().removeprefix(".")] if name in files]
    ours = [name for name in OUR_CAPTIONS if name in files]
    if ours:
        return ours
    for name in CAPTIONS:
        if name in files:
            return [name]
    name = only_one(files, ["txt"], "several caption files")
    return [name] if name else []


def find_captions(files, key=""):
    """{source: text} of a sample's captions, one per line of the text.

    A source is an extension, or "field NAME of json". key: --caption-key. Raises LayoutError if
    there is no caption, or only a blank one.
    """
    captions = {}
    names = caption_names(files, key)
    for name in names:
        try:
            text = files[name].decode("utf-8-sig").strip()
        except UnicodeDecodeError:
            raise LayoutError("caption is not UTF-8", name) from None
        if "\n" in text and is_in_json(text, files):
            text = " ".join(text.split())
        if text:
            captions[name] = text
    if captions:
        return captions

    texts = json_texts(files)
    fields = [key] if key in texts else []
    if not key:
        fields = matching(texts, ["synthetic_caption", *CAPTION_FIELDS])
    if fields:
        return {f"field {fields[0]} of json": texts[fields[0]]}
    if names:
        raise LayoutError("blank caption", ", ".join(names))
    raise LayoutError("no caption", describe(files))


def is_in_json(text, files):
    """True if the text of a caption file is also a text in KEY.json, and so a single caption."""
    try:
        return " ".join(text.split()) in json_texts(files).values()
    except LayoutError:
        return False


def json_texts(files):
    """{field: text} of the fields of KEY.json that hold text; {} if there is no such file.

    A list of texts becomes one line each. Raises LayoutError if the file is not JSON.
    """
    if "json" not in files:
        return {}
    try:
        row = json.loads(files["json"])
    except (ValueError, RecursionError):
        raise LayoutError("KEY.json is not JSON", "json") from None
    texts = {}
    if isinstance(row, dict):
        for name, value in row.items():
            lines = texts_of(value)
            if lines:
                texts[name] = "\n".join(lines)
    return texts


def caption_lines(text):
    """The captions of a text from find_captions: its lines that are not blank."""
    return [line.strip() for line in text.split("\n") if line.strip()]


def pick_caption(text, pick, rng):
    """One caption of a text from find_captions.

    pick: "random" draws one with rng, a random.Random; "first" is the first; "whole" is the text.
    """
    if pick == "whole":
        return text
    lines = caption_lines(text)
    if pick == "first" or len(lines) == 1:  # nothing is drawn, as if there were no choice
        return lines[0]
    return lines[rng.randrange(len(lines))]


def describe(files):
    """The extensions of a sample and the fields of its KEY.json, as text for a message."""
    text = shorten([name for name in files if name != "latents"])
    try:
        fields = list(json_texts(files))
    except LayoutError:
        fields = []
    if fields:
        text += f"; text fields of json: {shorten(fields)}"
    return f"it has {text}"


def shorten(names):
    """The first few names, as text for a message."""
    text = ", ".join(names[:SHOWN])
    if len(names) > SHOWN:
        text += f" and {len(names) - SHOWN} more"
    return text


# ------------------------------------------------------------------------------ many samples

@dataclass
class LayoutCounts:
    """Counts of what the samples of some shards contain."""
    samples: int = 0
    usable: int = 0                         # samples with an image and a caption
    several: int = 0                        # samples with several captions
    images: Counter = field(default_factory=Counter)       # by extension
    captions: Counter = field(default_factory=Counter)     # by source, see find_captions
    extensions: Counter = field(default_factory=Counter)   # of all files
    fields: Counter = field(default_factory=Counter)       # with text, where there is no caption
    problems: Counter = field(default_factory=Counter)     # by kind
    examples: dict = field(default_factory=dict)           # {kind: where the first few are}

    def add(self, where, files, image_key="", caption_key=""):
        """Count a sample. where: its name in messages. Returns the kind of its problem, or ""."""
        kind = ""
        self.samples += 1
        self.extensions.update(map(general_name, files))
        try:
            self.images[general_name(find_image(files, image_key))] += 1
        except LayoutError as e:
            kind = e.kind
        try:
            captions = find_captions(files, caption_key)
            self.captions.update(map(general_name, captions))
            if any(len(caption_lines(text)) > 1 for text in captions.values()):
                self.several += 1
        except LayoutError as e:
            kind = kind or e.kind
            if e.kind == "no caption":
                self.fields.update(list(json_texts(files)))
        if kind:
            self.add_problem(kind, where)
            return kind
        self.usable += 1
        if is_merged(files) and not image_key:
            self.add_problem("several images", where)      # of which training reads one
        return ""

    def add_problem(self, kind, where):
        self.problems[kind] += 1
        self.examples.setdefault(kind, [])
        self.examples[kind] = [*self.examples[kind], where][:EXAMPLES]

    def merge(self, other):
        """Add the counts of other shards."""
        self.samples += other.samples
        self.usable += other.usable
        self.several += other.several
        self.images.update(other.images)
        self.captions.update(other.captions)
        self.extensions.update(other.extensions)
        self.fields.update(other.fields)
        self.problems.update(other.problems)
        for kind, examples in other.examples.items():
            self.examples[kind] = [*self.examples.get(kind, []), *examples][:EXAMPLES]

    def summary(self):
        """The images and captions, as one line of text."""
        line = f"images: {counts(self.images)}; captions: {counts(self.captions)}"
        if self.several:
            line += f"; {self.several:,} samples with several captions, one per line"
        return line

    def too_few(self):
        """A line if training would stop because it has to skip too many samples; "" otherwise."""
        skipped = self.samples - self.usable
        if skipped <= MAX_SKIPPED * self.samples:
            return ""
        share = skipped / self.samples
        needed = min(1, math.ceil(share * 120) / 100)      # a fifth more, since samples are drawn
        return (f"{skipped:,} of {self.samples:,} samples ({share:.1%}) cannot "
                f"be trained on. Training stops at a share of {MAX_SKIPPED:g}, unless it is given "
                f"--max-skipped {needed:g}")

    def unusable(self):
        """A line about samples of which none can be used, with the remedy."""
        line = f"none of {self.samples:,} samples can be trained on. They have "
        line += counts(self.extensions)
        if self.fields:
            line += f"; text fields of KEY.json: {counts(self.fields)}"
        kind, _ = self.problems.most_common(1)[0]
        if NOT_ADJACENT in self.problems:   # the cause of the others
            kind = NOT_ADJACENT
        return f"{line}. Problem: {kind}. {REMEDIES[kind]}"


def general_name(extension):
    """An extension as it is counted: "0012.jpg" is "*.jpg", so that their number is small."""
    first, _, last = extension.rpartition(".")
    if first in ("", "image") or extension in OUR_CAPTIONS or extension in CAPTIONS:
        return extension
    if " of json" in extension:
        return extension
    return f"*.{last}"


def counts(counter):
    """ "jpg (12), txt (10)" of a Counter, the most common first; "none" if it is empty."""
    parts = [f"{name} ({count:,})" for name, count in counter.most_common(SHOWN)]
    if len(counter) > SHOWN:
        parts.append(f"{len(counter) - SHOWN} more")
    return ", ".join(parts) or "none"
