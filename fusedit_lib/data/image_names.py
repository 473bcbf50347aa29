"""Finds the image that a row of a caption file names, however the name is written."""
import os.path
import posixpath
import re
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from unicodedata import normalize

from fusedit_lib.data.images import Skip

NOT_FOUND = "image not found"
AMBIGUOUS = "several images match the name"

# Folders of the same name in different parts of a data set hold different images: images/1.jpg of
# val/ is not that of train/.
PART = re.compile(r"(train(ing)?|val(id(ation)?)?|test(ing)?|dev|eval|part|split|fold)(?![a-z])",
                  re.I)


class ImageNames:
    """The images below a folder, by all names under which a caption file may know them.

    Names are relative to IMAGES, and are tried in this order: as written; with / for backslashes
    and without ./; in another Unicode normalisation, without the suffix, or with its letters in
    another case; as an absolute path into IMAGES, or relative to the caption file or to a folder
    above IMAGES; as an absolute path of another machine, if it is the same for all names and ends
    with the name of IMAGES; and without a folder, if all images are in subfolders.
    """

    def __init__(self, folder: Path, names: Iterable[str], root: str | None = None):
        """folder: IMAGES. names: of its images. root: the path that IMAGES had elsewhere."""
        self.folder = folder
        self.names = set(names)
        # IMAGES as given and with its links resolved
        self.paths = [os.path.abspath(folder), os.path.realpath(folder)]
        self.prefix = None                  # of absolute paths, in the place of IMAGES
        if root is not None:
            self.prefix = clean(root)
        self.by_composed = group(self.names, composed)
        self.by_lower_suffix = group(self.names, lower_suffix)
        self.by_stem = group(self.names, stem)
        self.by_basename = {}
        if all("/" in name for name in self.names):
            self.by_basename = group(self.names, basename)
        self.rewritten = {}                 # how a name was changed -> names, for the report

    def find(self, written, base="", beside=None):
        """The name of the image that `written` names. Raises Skip if there is none, or several.

        base: the folder in IMAGES of a metadata file, such as "train/", which its names are
        relative to. beside: the folder of the caption file.
        """
        for name in (written, written.strip()):
            if base + name in self.names:
                return base + name
        without_number = re.sub(r"(\.\w+)#\d+$", r"\1", written.strip())   # Flickr8k's 1.jpg#0
        for name in dict.fromkeys([clean(written), clean(without_number)]):
            for candidate, change in self.candidates(name, base, beside):
                found = self.lookup(candidate)
                if found is not None:
                    if change:
                        self.rewritten.setdefault(change, []).append(written)
                    return found
        raise Skip(NOT_FOUND)

    def lookup(self, name):
        """The name of the image that a relative path stands for, or None. Raises Skip."""
        if name in self.names:
            return name
        for found in (self.by_composed.get(composed(name)),
                      self.by_lower_suffix.get(lower_suffix(name)),
                      self.by_stem.get(composed(name))):
            if found and len(found) > 1:
                raise Skip(AMBIGUOUS)
            if found:
                return found[0]
        return self.other_file(name)

    def other_file(self, name):
        """The name, if it is that of a file in IMAGES that has no image's suffix, or None."""
        if name.startswith(("/", "../")):
            return None
        try:
            exists = (self.folder / name).is_file()
        except OSError:                     # longer than a name may be
            return None
        return name if exists else None

    def candidates(self, name, base, beside):
        """Yield (path relative to IMAGES, note for the report or "") that `name` may stand for."""
        if base:
            yield base + name, ""
        if name.startswith(base):
            yield name, ""
        if is_absolute(name):
            for path in self.paths:
                if name.startswith(f"{path}/"):
                    yield name[len(path) + 1:], ""
        else:
            if beside is not None:
                path = posixpath.normpath(f"{os.path.abspath(beside)}/{name}")
                if path.startswith(f"{self.paths[0]}/"):
                    yield path[len(self.paths[0]) + 1:], ""
            yield from self.below_ancestor(name)
        if self.prefix is not None and name.startswith(f"{self.prefix}/"):
            yield name[len(self.prefix) + 1:], f"{self.prefix} taken as {self.folder}"
        if name.startswith("/"):
            yield name[1:], f"/ taken as {self.folder}"
        found = self.by_basename.get(composed(name), ())
        if len(found) > 1:
            raise Skip(AMBIGUOUS)
        if found and not base:
            yield found[0], "names without the folder of their image"

    def below_ancestor(self, name):
        """Yield the rest of `name` after folders that are the last ones of IMAGES' own path."""
        parts = name.split("/")
        for path in self.paths:
            own = path.split("/")
            for count in range(1, len(parts)):
                if parts[:count] == own[-count:]:
                    yield "/".join(parts[count:]), ""

    def find_prefix(self, written):
        """Set the prefix for absolute paths of another machine, given all names of a caption file.

        It must be common to all of them, end with the name of IMAGES, not exist on this machine,
        and name no part of a data set (train, val, ...) that the path of IMAGES does not name.
        """
        paths = [clean(name) for name in written]
        paths = [path for path in paths if is_absolute(path) and not self.is_inside(path)]
        if self.prefix is not None or not paths:
            return
        first = min(paths).split("/")       # what these two share, all names share
        last = max(paths).split("/")
        shared = len(posixpath.commonprefix([first[:-1], last[:-1]]))
        for path in self.paths:
            for count in range(shared, 0, -1):
                prefix = "/".join(first[:count])
                if first[count - 1] != PurePosixPath(path).name or os.path.isdir(prefix):
                    continue
                if parts_of_data(prefix) <= parts_of_data(path):
                    self.prefix = prefix
                    return

    def possible_root(self, written):
        """A folder that would make `written` the path of an image if it were IMAGES, or None."""
        parts = clean(written).split("/")
        for count in range(1, len(parts)):
            if "/".join(parts[count:]) in self.names:
                return "/".join(parts[:count]) or "/"
        return None

    def is_inside(self, name):
        return any(name.startswith(f"{path}/") for path in self.paths)


# ---------------------------------------------------------------------------- forms of a name
def clean(name):
    """The path with / for backslashes, and without ./, // and the / at its end."""
    name = posixpath.normpath(name.strip().replace("\\", "/"))
    return "/" + name.lstrip("/") if name.startswith("/") else name


def is_absolute(name):
    return name.startswith("/") or re.match(r"[A-Za-z]:/", name) is not None


def composed(name):
    """The name in Unicode's composed form; macOS stores names decomposed."""
    return normalize("NFC", name)


def lower_suffix(name):
    start, dot, suffix = composed(name).rpartition(".")
    return start + dot + suffix.lower()


def stem(name):
    return composed(name).rpartition(".")[0]


def basename(name):
    return composed(name).rpartition("/")[2]


def group(names, form):
    """{form(name): all names of that form, sorted}"""
    groups = {}
    for name in sorted(names):
        groups.setdefault(form(name), []).append(name)
    return groups


def parts_of_data(path):
    """The set of folders in a path that name a part of a data set, such as train and val."""
    return {part.lower() for part in path.split("/") if PART.match(part)}
