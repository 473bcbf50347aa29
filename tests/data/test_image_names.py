"""The image that a row of a caption file means, and those that it must not be taken for."""
import unicodedata
from pathlib import Path

import pytest

from fusedit_lib.data.image_names import ImageNames
from fusedit_lib.data.images import Skip


@pytest.fixture
def train(tmp_path):
    """A folder data/train for IMAGES."""
    folder = tmp_path / "data" / "train"
    folder.mkdir(parents=True)
    return folder


FILES = ["1.jpg", "cats/1.jpg", "cats/2.PNG", "cats/Mr.X.jpg", "né.jpg", "two.jpg", "two.png",
         "a  b.jpg", "#5.jpg", r"back\slash.jpg"]


def found(folder, written, files=FILES, beside=None, **more):
    """The image found for a name that is the only one in its caption file, or the reason."""
    names = ImageNames(folder, files, **more)
    names.find_prefix([written])
    try:
        return names.find(written, beside=beside)
    except Skip as reason:
        return str(reason)


NOT_FOUND = "image not found"
ELSEWHERE = (
    "image not found, by an absolute path (--image-root says what IMAGES was called there)")
AMBIGUOUS = "several images match the name"


@pytest.mark.parametrize("written, image", [
    ("1.jpg", "1.jpg"),
    ("./1.jpg", "1.jpg"),
    (" 1.jpg ", "1.jpg"),
    ("a  b.jpg", "a  b.jpg"),
    ("cats/./1.jpg", "cats/1.jpg"),
    ("cats//1.jpg", "cats/1.jpg"),
    ("dogs/../cats/1.jpg", "cats/1.jpg"),
    (r"cats\1.jpg", "cats/1.jpg"),
    (r".\cats\1.jpg", "cats/1.jpg"),
    (r"back\slash.jpg", r"back\slash.jpg"),
    ("cats/2", "cats/2.PNG"),                              # the suffix is omitted,
    ("cats/2.png", "cats/2.PNG"),                          # or its case differs
    ("1.JPG", "1.jpg"),
    ("cats/Mr.X", "cats/Mr.X.jpg"),
    ("two.png", "two.png"),
    ("two", AMBIGUOUS),
    ("1.jpg#3", "1.jpg"),
    ("#5.jpg", "#5.jpg"),
    ("#5", "#5.jpg"),
    (unicodedata.normalize("NFD", "né.jpg"), "né.jpg"),
    (unicodedata.normalize("NFD", "né"), "né.jpg"),
    ("train/1.jpg", "1.jpg"),                              # relative to a folder above IMAGES
    ("data/train/cats/1.jpg", "cats/1.jpg"),
    (r"train\cats\1.jpg", "cats/1.jpg"),
    ("/cats/1.jpg", "cats/1.jpg"),
    ("CATS/1.jpg", "cats/1.jpg"),
    ("cats/mr.x", "cats/Mr.X.jpg"),
    ("NÉ.JPG", "né.jpg"),
    # These are other images.
    ("val/1.jpg", NOT_FOUND),
    ("data/val/1.jpg", NOT_FOUND),
    ("dogs/1.jpg", NOT_FOUND),
    ("other/train/1.jpg", NOT_FOUND),
    ("../1.jpg", NOT_FOUND),
    ("2.PNG", NOT_FOUND),                                  # images at the top are in IMAGES itself
    ("11.jpg", NOT_FOUND),
    ("cats/1.png", NOT_FOUND),
    ("cats", NOT_FOUND),
    ("#", NOT_FOUND),
    ("n" * 5000, NOT_FOUND),
])
def test_relative_names(train, written, image):
    assert found(train, written) == image


def test_decomposed_files_are_found_by_composed_names(train):
    composed = "Łódź/né.jpg"
    decomposed = unicodedata.normalize("NFD", composed)
    assert composed != decomposed
    assert found(train, composed, [decomposed]) == decomposed
    assert found(train, decomposed, [composed]) == composed
    assert found(train, composed, [composed, decomposed]) == composed
    half = unicodedata.normalize("NFD", "Łódź") + "/né.jpg"
    assert found(train, half, [composed, decomposed]) == AMBIGUOUS


def test_names_that_differ_in_the_case_of_the_suffix(train):
    assert found(train, "a.Jpg", ["a.jpg", "a.JPG"]) == AMBIGUOUS
    assert found(train, "a.JPG", ["a.jpg", "a.JPG"]) == "a.JPG"
    assert found(train, "x.A/b", ["x.a/b.jpg"]) == "x.a/b.jpg"


def test_a_name_in_another_case_never_beats_the_exact_one(train):
    assert found(train, "train/1.jpg", ["1.jpg", "Train/1.jpg"]) == "1.jpg"
    assert found(train, "A/X.jpg", ["a/x.jpg", "A/x.jpg"]) == AMBIGUOUS
    assert found(train, "X.jpg", ["a/x.jpg"]) == "a/x.jpg"
    assert found(train, "X.jpg", ["a/x.jpg", "b/x.JPG"]) == AMBIGUOUS


def test_absolute_paths_into_the_folder(train, tmp_path, monkeypatch):
    assert found(train, f"{train}/cats/1.jpg") == "cats/1.jpg"
    assert found(train, f"{train}/cats/1") == "cats/1.jpg"
    assert found(train, f"{train.parent}/val/1.jpg") == ELSEWHERE
    assert found(train, f"{train}2/1.jpg") == ELSEWHERE
    link = tmp_path / "photos"
    link.symlink_to(train)
    assert found(link, f"{train}/1.jpg") == "1.jpg"
    assert found(link, f"{link}/1.jpg") == "1.jpg"
    monkeypatch.chdir(tmp_path)
    assert found(Path("data/train"), f"{train}/1.jpg") == "1.jpg"
    assert found(Path("data/train"), "data/train/1.jpg") == "1.jpg"


def test_paths_relative_to_the_caption_file(train, tmp_path):
    captions = tmp_path / "captions"
    assert found(train, "../data/train/1.jpg", beside=captions) == "1.jpg"
    assert found(train, "../data/val/1.jpg", beside=captions) == NOT_FOUND
    assert found(train, "data/train/cats/1.jpg", beside=tmp_path) == "cats/1.jpg"
    # A file beside IMAGES is not one in it, even if both have the same name.
    assert found(train, "../1.jpg", beside=train.parent / "x") == NOT_FOUND


@pytest.mark.parametrize("prefix", ["/Users/bob/train", r"C:\data\train", "D:/x/train", "/train",
                                    r"\\server\share\train"])
def test_absolute_paths_of_another_machine(train, prefix):
    separator = "\\" if "\\" in prefix else "/"
    assert found(train, separator.join([prefix, "1.jpg"])) == "1.jpg"
    assert found(train, separator.join([prefix, "cats", "1.jpg"])) == "cats/1.jpg"


@pytest.mark.parametrize("written, reason", [
    ("/Users/bob/val/1.jpg", ELSEWHERE), ("/Users/bob/photos/1.jpg", ELSEWHERE),
    ("/Users/bob/val/train/1.jpg", ELSEWHERE), (r"C:\data\test\train\1.jpg", ELSEWHERE),
    (r"C:\1.jpg", ELSEWHERE), ("/Users/bob/train/dogs/1.jpg", NOT_FOUND)])
def test_absolute_paths_of_other_images(train, written, reason):
    assert found(train, written) == reason


def test_a_prefix_of_another_machine_is_common_to_all_names(train):
    def prefix_of(*written):
        names = ImageNames(train, FILES)
        names.find_prefix(written)
        return names.prefixes
    assert prefix_of("/a/train/1.jpg", "/a/train/cats/1.jpg", "1.jpg") == ["/a/train"]
    assert prefix_of("/a/train/cats/1.jpg", "/a/train/cats/2.jpg") == ["/a/train"]
    assert prefix_of("/a/train/1.jpg", "/b/train/1.jpg", "/a/train/2.jpg") == []
    assert prefix_of("/a/train/1.jpg", "/A/train/1.jpg") == []
    assert prefix_of("/a/train/1.jpg", "/a/Train/1.jpg") == ["/a/train"]
    # A name without a folder of the name of IMAGES does not matter: it is not found.
    assert prefix_of("/a/train/1.jpg", "/b/val/1.jpg", "/a/train-old/1.jpg") == ["/a/train"]
    assert prefix_of("/a/train/train/1.jpg", "/a/train/1.jpg") == ["/a/train"]
    assert prefix_of("/a/train/train/1.jpg", "/a/train/train/2.jpg") == ["/a/train/train"]
    assert prefix_of(r"D:\x\Train\1.jpg", r"\\?\d:\X\train\2.jpg") == ["D:/x/Train"]
    assert prefix_of(r"D:\x\train\1.jpg", r"\\nas\x\train\2.jpg") == []
    assert prefix_of("1.jpg") == prefix_of() == []


def test_a_folder_of_this_machine_is_not_taken_for_another(train, tmp_path):
    other = tmp_path / "other" / "train"
    assert found(train, f"{other}/1.jpg") == "1.jpg"       # as if of another machine
    other.mkdir(parents=True)
    assert found(train, f"{other}/1.jpg") == ELSEWHERE


@pytest.mark.parametrize("roots", [[], ["D:\\Data\\train"]])
def test_paths_of_windows_in_any_case(train, roots):
    names = ImageNames(train, FILES, roots)
    written = [r"D:\Data\train\cats\1.jpg", r"d:\data\TRAIN\CATS\1.JPG",
               r"\\?\D:\Data\train\cats\1.jpg", "D:/Data\\train/cats\\1.jpg"]
    names.find_prefix(written)
    assert [names.find(name) for name in written] == ["cats/1.jpg"] * 4
    assert names.rewritten == {f"D:/Data/train taken as {train}": written,
                               "names with letters in another case": written[1:2]}


def test_a_control_character_in_a_name_is_explained(train):
    reason = found(train, "cats\box.jpg")                  # {"image": "cats\box.jpg"} in JSON
    assert reason == (r"image not found, by a name with a control character (JSON spells a "
                      r"backslash \\)")


def test_image_root_says_what_the_folder_was_called(train):
    assert found(train, "/mnt/photos/cats/1.jpg", roots=["/mnt/photos/"]) == "cats/1.jpg"
    assert found(train, r"C:\photos\cats\1.jpg", roots=["C:\\photos"]) == "cats/1.jpg"
    assert found(train, "old/cats/1.jpg", roots=["old"]) == "cats/1.jpg"
    assert found(train, "/mnt/photos2/1.jpg", roots=["/mnt/photos"]) == NOT_FOUND
    roots = ["/mnt/photos", "//nas/photos"]
    assert found(train, r"\\nas\photos\cats\1.jpg", roots=roots) == "cats/1.jpg"


def test_names_without_a_folder_if_all_images_are_in_subfolders(train):
    files = ["cats/1.jpg", "cats/2.jpg", "dogs/2.jpg"]
    assert found(train, "1.jpg", files) == "cats/1.jpg"
    assert found(train, "2.jpg", files) == AMBIGUOUS
    assert found(train, "1.jpg", ["cats/1.jpg", "top.jpg"]) == NOT_FOUND
    assert found(train, "birds/1.jpg", files) == NOT_FOUND


def test_a_file_without_an_image_suffix_is_found_by_its_name(train):
    (train / "a1b2c3").write_bytes(b"x")
    (train.parent / "secret").write_bytes(b"x")
    assert found(train, "a1b2c3") == "a1b2c3"
    assert found(train, "train/a1b2c3") == "a1b2c3"
    assert found(train, "../secret") == NOT_FOUND
    assert found(train, f"{train.parent}/secret") == ELSEWHERE


def test_rewritten_names_are_reported(train):
    names = ImageNames(train, FILES)
    names.find_prefix(["/a/train/1.jpg"])
    names.find("/a/train/1.jpg")
    names.find("train/1.jpg")
    assert names.rewritten == {f"/a/train taken as {train}": ["/a/train/1.jpg"]}
