"""The columns of a caption file: which one names the image, which hold captions, and their values.

Used for tables, JSON and Parquet alike: a column is a key of a JSON object, too.
"""
import ast
import json
import warnings
from collections import Counter
from typing import NamedTuple

from fusedit import FuseDiTError
from fusedit_lib.backend import printable

# Common names for the column that names the image, and for the one with its caption. Where a row
# has several, the first is used. Case, outer spaces, and spaces and hyphens for _ do not matter.
IMAGE_FIELDS = (
    "image", "file_name", "filename", "file", "path", "image_path", "name", "image_name",
    "image_file", "image_filename", "images", "img", "img_name", "img_path", "img_file",
    "file_path", "filepath", "image_id", "img_id", "id", "key", "__key__")
CAPTION_FIELDS = (
    "caption", "original_caption", "text", "prompt", "description", "captions", "texts", "txt",
    "sentence", "sentences", "raw", "prompts", "descriptions", "alt_text", "alt", "comment",
    "title")
CONVERSATIONS = "conversations", "conversation", "messages"       # of LLaVA, ShareGPT


class Columns(NamedTuple):
    """The names of columns, as the file spells them, in the order in which they are tried."""
    image: list[str]
    captions: list[str]
    synthetic: list[str]
    all_captions: bool = False              # True: an image has the captions of all columns


class CaptionRow(NamedTuple):
    """A row of a caption file."""
    where: str              # its place in the file, such as "line 3"
    image: str              # the image's name as the file spells it; "" if it has none
    captions: dict          # kind, such as "original_caption" -> list of texts, which may be empty
    base: str = ""          # a folder in IMAGES that the name may be relative to, such as "train/"


class CaptionRows:
    """The rows of caption files, and an account of how they were read."""

    def __init__(self):
        self.rows = []                      # of CaptionRow
        self.files = []                     # Paths of the files that were read
        self.skipped = []                   # (reason, place) of rows that are left out
        self.used = Counter()               # caption column -> number of rows that used it
        self.ignored = Counter()            # caption column -> rows in which another one was used
        self.notes = {}                     # note -> places of the rows it is about
        self.objects = {}                   # caption column -> a value that has no text

    def note(self, text, where):
        self.notes.setdefault(text, []).append(where)

    def add(self, where, fields, columns, base=""):
        """Add a row with the given fields, {column: value}."""
        image = image_of(fields, columns)
        if not image:
            self.skipped.append((f"no image name ({', '.join(columns.image)})", where))
            return
        captions, used, ignored = captions_of(fields, columns)
        self.used.update(used)
        self.ignored.update(ignored)
        for name in [*columns.synthetic, *columns.captions]:
            if name not in [*used, *ignored] and isinstance(fields.get(name), list | dict):
                self.objects.setdefault(name, fields[name])
        self.rows.append(CaptionRow(where, image, captions, base))

    def require_text(self, path):
        """Raise FuseDiTError if no row has a caption, since its column contains other things."""
        for name, value in self.objects.items():
            if value and not self.used:
                text = json.dumps(value, default=str)
                raise FuseDiTError(f"{path}: column {name} contains no text, but {text[:100]}; "
                                   "write the captions to a column of texts or lists of texts")


# ---------------------------------------------------------------------------- choosing columns
def normalised(name):
    """The name of a column as IMAGE_FIELDS and CAPTION_FIELDS spell it."""
    return name.strip().lower().replace(" ", "_").replace("-", "_")


def matching(available, fields):
    """The available columns that have one of the names in `fields`, in the order of `fields`."""
    return [name for field in fields for name in available if normalised(name) == field]


def find_columns(available, image_column=None, caption_column=None):
    """The Columns among those available, whose lists may be empty.

    image_column: the only name to accept; None: the common names. caption_column: a list of such
    names, whose columns all hold captions of the image; None: the common names.
    """
    image_fields = IMAGE_FIELDS
    caption_fields = CAPTION_FIELDS
    if image_column is not None:
        image_fields = [normalised(image_column)]
    if caption_column is not None:
        caption_fields = [normalised(name) for name in caption_column]
    captions = matching(available, caption_fields)
    synthetic = matching(available, ["synthetic_caption"])
    synthetic = [name for name in synthetic if name not in captions]
    return Columns(matching(available, image_fields), captions, synthetic,
                   all_captions=caption_column is not None)


def require_columns(columns, available, path, image=True):
    """Raise FuseDiTError if there is no column for the image (if `image`) or for the caption."""
    what = None
    if image and not columns.image:
        what = "names the images"
        flag = "--image-column"
    elif not columns.captions and not columns.synthetic:
        what = "holds captions"
        flag = "--caption-column"
    if what is not None:
        names = printable(", ".join(name.strip() or '""' for name in available)) or "none"
        remedy = f"give one of its {len(available)} columns with {flag}"
        if flag == "--caption-column" and matching(available, CONVERSATIONS):
            remedy = ("a conversation is not a caption: write a column caption, or give one of its "
                      f"{len(available)} columns with {flag}")
        raise FuseDiTError(f"{path}: no column that {what} was found; {remedy}: {names}")


# ---------------------------------------------------------------------------- values
def image_of(fields, columns):
    """The image's name in a row {column: value}, or ""."""
    for column in columns.image:
        value = fields.get(column)
        if isinstance(value, list) and len(value) == 1:
            value = value[0]
        if isinstance(value, dict):         # as the Hugging Face hub writes images
            value = value.get("path")
        if isinstance(value, int) and not isinstance(value, bool):
            value = str(value)
        if isinstance(value, str) and value.strip():
            return value
    return ""


def captions_of(fields, columns):
    """The captions {kind: texts} in a row {column: value}.

    Also returns the columns that they are from, and those with captions that are ignored.
    """
    captions = {}
    used = []
    ignored = []
    for kind, names in (("synthetic_caption", columns.synthetic),
                        ("original_caption", columns.captions)):
        texts = {name: texts_of(fields.get(name)) for name in names}
        filled = [name for name in names if texts[name]]
        count = len(filled) if columns.all_captions else 1
        for name in filled[:count]:
            captions.setdefault(kind, []).extend(texts[name])
        used += filled[:count]
        ignored += filled[count:]
    return captions, used, ignored


def texts_of(value):
    """The captions in a value, each as one line: of a text one, of a list those of its elements.

    Of an object, such as {"raw": "a cat"}, the first field with a common name for captions is used.
    Values of any other type have no captions.
    """
    if isinstance(value, str):
        text = " ".join(value.split())
        return [text] if text else []
    if isinstance(value, dict):
        return texts_of([value[name] for name in matching(value, CAPTION_FIELDS)][:1])
    texts = []
    if isinstance(value, list):
        for element in value:
            texts += texts_of(element)
    return texts


def parse_list(text):
    """The list of texts that a cell of a table spells, in JSON or Python, or the cell itself."""
    if not text.lstrip().startswith("["):
        return text
    for parse in (json.loads, ast.literal_eval):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")              # of the \d in "a \d"
                value = parse(text.strip())
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            continue
        if isinstance(value, list) and all(isinstance(element, str) for element in value):
            return value
    return text
