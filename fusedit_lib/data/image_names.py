"""Finds the image that a row of a caption file names, however the name is written."""
import os.path
import posixpath
import re
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from unicodedata import normalize

from fusedit_lib.data.images import Skip

NOT_FOUND = "image not found"
ELSEWHERE = f"{NOT_FOUND}, by an absolute path (--image-root says what IMAGES was called there)"
CONTROL = rf"{NOT_FOUND}, by a name with a control character (JSON spells a backslash \\)"
AMBIGUOUS = "several images match the name"

OTHER_CASE = "names with letters in another case"      # a note for the report

# Folders of the same name in different parts of a data set hold different images: images/1.jpg of
# val/ is not that of train/.
PART = re.compile(r"(train(ing)?|val(id(ation)?)?|test(ing)?|dev|eval|part|split|fold)(?![a-z])",
                  re.I)


class Several(Skip):
    """Raised if several images match a name."""

    def __init__(self, names):
        super().__init__(AMBIGUOUS)
        self.names = names


class ImageNames:
    """The images below a folder, by all names under which a caption file may know them.

    Names are relative to IMAGES, and are tried in this order: as written; with / for backslashes
    and without ./; in another Unicode normalisation or without the suffix; as an absolute path into
    IMAGES, or relative to the caption file or to a folder above IMAGES; as an absolute path of
    another machine, if it is the same for all names and ends with the name of IMAGES; without a
    folder, if all images are in subfolders; and finally all of this with letters in another case.
    """

    def __init__(self, folder: Path, names: Iterable[str], roots: Iterable[str] = ()):
        """folder: IMAGES. names: of its images. roots: the paths that IMAGES had elsewhere."""
        self.folder = folder
        self.names = set(names)
        # IMAGES as given and with its links resolved
        self.paths = [os.path.abspath(folder), os.path.realpath(folder)]
        self.prefixes = [clean(root) for root in roots]    # of names, in the place of IMAGES
        self.groups = {}                    # see matches
        self.only_subfolders = all("/" in name for name in self.names)
        self.rewritten = {}                 # how a name was changed -> names, for the report

    def find(self, written, base="", beside=None):
        """The name of the image that `written` names. Raises Skip if there is none, or several.

        base: the folder in IMAGES of a metadata file, such as "train/", which its names are
        relative to; it names no images in other folders. beside: the folder of CAPTIONS.
        """
        for name in (written, written.strip()):
            if base + name in self.names:
                return base + name
        without_number = re.sub(r"(\.\w+)#\d+$", r"\1", written.strip())   # Flickr8k's 1.jpg#0
        names = dict.fromkeys([clean(written), clean(without_number)])
        for form in (composed, folded):
            for name in names:
                found, changes = self.lookup(name, form, base, beside)
                if found is not None:
                    for change in filter(None, changes):
                        self.rewritten.setdefault(change, []).append(written)
                    return found
        raise Skip(self.why_not_found(written))

    def lookup(self, name, form, base, beside):
        """(name of the image, changes for the report) for a clean name, or (None, []).

        form: composed or folded; names match if theirs are equal. Raises Skip.
        """
        changes = [OTHER_CASE] if form is folded else []
        for candidate, change in self.candidates(name, base, beside):
            if not candidate.startswith(base):
                continue
            if candidate in self.names:
                return candidate, [change]
            found = (self.matches(whole, form, candidate) or self.matches(stem, form, candidate))
            if found:
                return found, [change, *changes]
            if form is composed and self.other_file(candidate):
                return candidate, [change]
        if self.only_subfolders and not base:
            found = self.matches(basename, form, name)
            if found:
                return found, ["names without the folder of their image", *changes]
        return None, []

    def matches(self, part, form, name):
        """The image whose part (whole, stem or basename) matches a name, or None. Raises Skip."""
        if (part, form) not in self.groups:
            self.groups[part, form] = group(self.names, lambda name: form(part(name)))
        found = self.groups[part, form].get(form(name), [None])
        if len(found) > 1:
            raise Several(found)
        return found[0]

    def why_not_found(self, written):
        """The reason for which a name is skipped, with the remedy if there is one."""
        if re.search(r"[\x00-\x1f]", written.strip()):
            return CONTROL
        if not self.prefixes and is_absolute(clean(written)):
            return ELSEWHERE
        return NOT_FOUND

    def other_file(self, name):
        """True if a name is that of a file in IMAGES that has no image's suffix."""
        if name.startswith(("/", "../")):
            return False
        try:
            return (self.folder / name).is_file()
        except OSError:                     # longer than a name may be
            return False

    def candidates(self, name, base, beside):
        """Yield (path relative to IMAGES, note for the report or "") that `name` may stand for."""
        if base:
            yield base + name, ""
        if is_absolute(name):
            for path in self.paths:
                if name.startswith(f"{path}/"):
                    yield name[len(path) + 1:], ""
        else:
            yield name, ""
            if beside is not None:
                path = posixpath.normpath(f"{os.path.abspath(beside)}/{name}")
                if path.startswith(f"{self.paths[0]}/"):
                    yield path[len(self.paths[0]) + 1:], ""
            yield from self.below_ancestor(name)
        for prefix in self.prefixes:
            rest = below(name, prefix)
            if rest is not None:
                yield rest, f"{prefix} taken as {self.folder}"
        if name.startswith("/"):
            yield name[1:], f"/ taken as {self.folder}"

    def below_ancestor(self, name):
        """Yield the rest of `name` after folders that are the last ones of IMAGES' own path."""
        parts = name.split("/")
        for path in self.paths:
            own = path.split("/")
            for count in range(1, len(parts)):
                if parts[:count] == own[-count:]:
                    yield "/".join(parts[count:]), ""

    def find_prefix(self, written):
        """Find a prefix for absolute paths of another machine, given all names of a caption file.

        It must end with the name of IMAGES, and be the same for all names that contain a folder of
        that name. It must not exist on this machine, and name no part of a data set (train, val,
        ...) that the path of IMAGES does not name.
        """
        if self.prefixes:
            return
        for path in self.paths:
            shared = None                   # {key: prefix} of those that all names have
            for name in map(clean, written):
                found = {}
                if is_absolute(name) and not self.is_inside(name):
                    found = prefixes(name, PurePosixPath(path).name)
                if found:
                    shared = {k: v for k, v in (shared or found).items() if k in found}
                    if not shared:
                        break
            for prefix in sorted(shared or {}, key=len, reverse=True):
                prefix = shared[prefix]
                if not os.path.isdir(prefix) and parts_of_data(prefix) <= parts_of_data(path):
                    self.prefixes = [prefix]
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
    """The path with / for backslashes, and without \\?\, ./, // and the / at its end."""
    name = re.sub(r"^//\?/(?=[A-Za-z]:/)", "", name.strip().replace("\\", "/"))
    name = posixpath.normpath(name)
    return "/" + name.lstrip("/") if name.startswith("/") else name


def is_absolute(name):
    return name.startswith("/") or is_of_windows(name)


def is_of_windows(name):
    return re.match(r"[A-Za-z]:/", name) is not None


def key(path):
    """A text that is equal for names of the same folder: Windows ignores their case."""
    return folded(path) if is_of_windows(path) else composed(path)


def below(name, prefix):
    """The path relative to a folder `prefix` of a clean name; None if it is not in the folder."""
    parts = name.split("/")
    count = len(prefix.split("/"))
    if len(parts) > count and key("/".join(parts[:count])) == key(prefix):
        return "/".join(parts[count:])
    return None


def prefixes(name, own):
    """{key: path} of all folders above an absolute path that have the name `own`."""
    parts = name.split("/")
    found = {}
    for count in range(2, len(parts)):
        prefix = "/".join(parts[:count])
        if key(prefix) == key("/".join([*parts[:count - 1], own])):
            found[key(prefix)] = prefix
    return found


def composed(name):
    """The name in Unicode's composed form; macOS stores names decomposed."""
    return normalize("NFC", name)


def folded(name):
    """The composed name without the difference between upper and lower case."""
    return composed(composed(name).casefold())


def whole(name):
    return name


def stem(name):
    return name.rpartition(".")[0]


def basename(name):
    return name.rpartition("/")[2]


def group(names, form):
    """{form(name): all names of that form, sorted}"""
    groups = {}
    for name in sorted(names):
        groups.setdefault(form(name), []).append(name)
    return groups


def parts_of_data(path):
    """The set of folders in a path that name a part of a data set, such as train and val."""
    return {part.lower() for part in path.split("/") if PART.match(part)}
