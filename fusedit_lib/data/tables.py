"""Reads tables of captions: text with a row on each line, as .csv, .tsv and .txt files have it.

Such files are often not quite CSV: captions have commas but no quotes, or quotes that do not
enclose a field. A row is read where its meaning is clear, and counted; otherwise it is an error.
"""
import csv
import re
from pathlib import PurePosixPath
from typing import NamedTuple

from fusedit import FuseDiTError
from fusedit_lib.data.columns import find_columns, parse_list, require_columns
from fusedit_lib.data.images import SUFFIXES

SEPARATORS = {",": "comma", "\t": "TAB", ";": ";", "|": "|"}

# Notes on rows that are read otherwise than CSV says.
REST = "separators in a caption without quotes (the rest of the row is the caption)"
STRAY = "quotes that do not enclose a field (the row is read as it is)"
NO_HEADER = "no header (the first column is the image, the rest of the row its caption)"
FEWER = "row with fewer fields than the header"


class Record(NamedTuple):
    """A row of a table."""
    line: int                               # the number of its first line, counted from 1
    fields: list | None                     # None if its quotes are not those of CSV
    text: str                               # as it is in the file


class Header(NamedTuple):
    """The first row of a table."""
    names: list[str]                        # of the columns
    unnamed: int                            # number of columns without a name after the last name
    separator: str
    first: int                              # index of the first line that holds a row


def read_table(text, path, rows, image_column=None, caption_column=None, base=""):
    """Add the rows of a table to `rows`, a CaptionRows.

    Raises FuseDiTError if a column is missing, or for a row that can be read in several ways.
    """
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    header = find_header(lines, path, image_column, caption_column)
    if not header.names:
        header = header._replace(names=["image", "caption"])
        check_two_columns(lines, header, path)
        rows.note(NO_HEADER, path.name)
    if len(header.names) == 1:
        raise FuseDiTError(f"{path} has a single column, {header.names[0][:100]!r}; separate the "
                           "image and the caption with a comma, a TAB, ; or |")
    columns = find_columns(header.names, image_column, caption_column)
    require_columns(columns, header.names, path)
    check_names_once(header.names, path)

    # If the only column of captions is the last, it takes the rest of a row that is too long.
    caption_like = columns.captions + columns.synthetic
    rest = [name for name in header.names if name in caption_like] == header.names[-1:]
    # In a row that is too short, the last field may be cut: its line break would need quotes.
    needed = max(header.names.index(columns.image[0]) + 1,
                 min(header.names.index(name) for name in caption_like) + 2)
    needed = min(needed, len(header.names))
    for record in records(lines, header.first, header.separator):
        where = f"line {record.line}"
        values, note = values_of(record, header, rest, path)
        if note:
            rows.note(note, where)
        if len(values) < needed:
            rows.skipped.append((FEWER, where))
            continue
        fields = dict(zip(header.names, values, strict=False))
        for name in caption_like:
            fields[name] = parse_list(fields.get(name, ""))
        rows.add(where, fields, columns, base)


# ---------------------------------------------------------------------------- the header
def find_header(lines, path, image_column, caption_column):
    """The Header of a table; its names are [] if the first row already names an image."""
    first = next((i for i, line in enumerate(lines) if line.strip()), None)
    if first is None:
        raise FuseDiTError(f"{path} is empty")
    separators = list(SEPARATORS)
    declared = re.fullmatch(r'"?sep=(.)"?', lines[first].strip(" "))    # a hint for Excel
    if declared and first + 1 < len(lines):
        separators = [declared[1]]
        first += 1

    best = None
    best_score = (-1, 0)
    for separator in separators:
        try:
            names = next(csv.reader([lines[first]], delimiter=separator, skipinitialspace=True))
        except csv.Error:
            continue
        columns = find_columns(names, image_column, caption_column)
        has_caption = bool(columns.captions or columns.synthetic)
        score = (bool(columns.image) + has_caption, len(names))
        if score > best_score:
            best_score = score
            stripped = [name.strip() for name in names]
            named = max((i for i, name in enumerate(stripped, 1) if name), default=0)
            best = Header(stripped[:named], len(names) - named, separator, first + 1)
    if best is None or best_score[0] < 2:
        for separator in reversed(separators):
            name, found, _ = lines[first].partition(separator)
            if found and is_image_name(name):
                return Header([], 0, separator, first)
    if best is None:
        raise FuseDiTError(f"{path}: the header cannot be read: {lines[first][:200]!r}")
    return best


def is_image_name(text):
    """True for text such as 1.jpg and "cats/1.PNG", with or without Flickr8k's #0 after it."""
    text = re.sub(r"#\d+$", "", text.strip().strip('"'))
    return PurePosixPath(text).suffix.lower() in SUFFIXES


def check_two_columns(lines, header, path):
    """Raise FuseDiTError if all rows of a table without a header have the same 3 or more fields."""
    counts = set()
    for record in records(lines, header.first, header.separator):
        counts.add(len(record.fields or ()))
    if len(counts) == 1 and max(counts) > 2:
        raise FuseDiTError(
            f"{path} has no header, and {max(counts)} columns: {lines[header.first][:200]!r}. "
            "Write the names of the columns on a line above, such as image,width,caption, or "
            "put quotes around captions that have commas")


def check_names_once(names, path):
    for name in names:
        if name and names.count(name) > 1:
            raise FuseDiTError(f"{path} has two columns {name}: rename one")


# ---------------------------------------------------------------------------- rows
def records(lines, start, separator):
    """Yield a Record for every row of the lines from `start` on, blank lines excepted."""
    while start < len(lines):
        with_ends = (lines[i] + "\n" for i in range(start, len(lines)))
        reader = csv.reader(with_ends, delimiter=separator, skipinitialspace=True, strict=True)
        begin = start                       # index of the first line of the next row
        try:
            for fields in reader:
                end = start + reader.line_num
                if any(begins_row(line, separator) for line in lines[begin + 1:end]):
                    raise csv.Error         # a quote without its partner has joined several rows
                if any(field.strip() for field in fields):
                    yield Record(begin + 1, fields, "\n".join(lines[begin:end]))
                begin = end
            return
        except csv.Error:
            yield Record(begin + 1, None, lines[begin])
            start = begin + 1


def begins_row(line, separator):
    """True if a line begins with the name of an image and a separator."""
    name, found, _ = line.partition(separator)
    return bool(found) and is_image_name(name)


def values_of(record, header, rest, path):
    """The values of a Record for the columns of the Header, perhaps too few, and a note or "".

    rest: the last column takes the rest of a row that has too many fields.
    """
    names = header.names
    separator = header.separator
    fields = record.fields
    note = ""
    if fields is None:
        note = STRAY
        fields = record.text.split(separator)
        if rest:
            fields = record.text.split(separator, len(names) - 1)
        fields = [unquote(field.strip()) for field in fields]
    if len(fields) <= len(names):
        return fields, note

    extra = fields[len(names):]
    may_drop = not rest or len(extra) <= header.unnamed
    if may_drop and not any(field.strip() for field in extra):
        return fields[:len(names)], note
    if not rest or fields is not record.fields:
        word = SEPARATORS.get(separator, separator)
        raise FuseDiTError(
            f"{path}, line {record.line}: {len(fields)} fields, but the header has "
            f"{len(names)} ({', '.join(names)}): {record.text[:200]!r}. Put quotes around "
            f"a text that contains the separator ({word})")
    text = rest_of(record.text, separator, len(names) - 1)
    if header.unnamed:
        text = text.rstrip(separator + " ")
    return [*fields[:len(names) - 1], text], REST


def rest_of(text, separator, count):
    """The text of a row after its first `count` fields, as it is."""
    quoted = r' *"(?:[^"]|"")*" *'
    field = re.compile(rf"{quoted}|[^{re.escape(separator)}]*")
    position = 0
    for _ in range(count):
        position = field.match(text, position).end() + 1
    return text[position:]


def unquote(text):
    """The text without the quotes around it, if there are any."""
    if len(text) > 1 and text[0] == text[-1] == '"':
        return text[1:-1].replace('""', '"')
    return text
