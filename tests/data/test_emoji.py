"""The captions of emoji, and what prepare_data.py emoji makes of several captions."""
import pytest
from layouts import emoji_packages
from test_prepare_data import pack, read_shards

from fusedit_lib.data.emoji import list_emoji
from fusedit_lib.data.emoji_captions import (
    CAPTIONS,
    MAX_SHARED,
    CaptionWriter,
    phrase_label,
    prompt_of,
    tags_of,
    without_tone,
)

APPLE = {"label": "red apple", "tags": ["apple", "diet", "food", "Fruit", "red", "ripe"]}
PEAR = {"label": "pear", "tags": ["food", "fruit"]}
HAND = {"label": "waving hand", "tags": ["hello", "hand", "wave", "bye"]}
CHINA = {"label": "flag: China", "tags": ["CN", "flag"]}
HOLE = {"label": "hole", "tags": ["hole"]}
FRUITS = [{"label": f"fruit {i}", "tags": ["food", "fruit"]} for i in range(MAX_SHARED)]
ENTRIES = [APPLE, PEAR, HAND, CHINA, HOLE, *FRUITS]


def write(entry, label=None, seed=0, style="google", key="google-1"):
    writer = CaptionWriter(ENTRIES, seed)
    return writer.write(key, style, label or entry["label"].lower(), tags_of(entry))


@pytest.mark.parametrize(("style", "in_words"), [("google", "flat"), ("fluent", "3d")])
@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry["label"])
def test_an_emoji_has_several_captions_with_the_style(entry, style, in_words):
    captions = write(entry, style=style)
    assert len(set(captions)) == len(captions) == CAPTIONS
    label = entry["label"].lower()
    assert captions[0] == prompt_of(entry["label"], style) == f"{label}, {in_words}"
    assert all(in_words in caption.replace(",", "").split() for caption in captions)
    assert all(caption == caption.lower() for caption in captions)


def test_captions_have_the_label_or_tags_or_both():
    captions = write(APPLE)
    named = [caption for caption in captions if "red apple" in caption]
    with_tags = [caption for caption in named if any(f", {tag}" in caption for tag in
                                                     ("diet", "food", "fruit", "ripe"))]
    assert 0 < len(with_tags) < len(named) < CAPTIONS


def test_all_tags_are_reachable():
    captions = " ".join(caption for seed in range(20) for caption in write(APPLE, seed=seed))
    assert all(tag in captions for tag in tags_of(APPLE))


def test_tags_that_many_emoji_share_are_not_the_whole_caption():
    """All fruits are "food, fruit", which does not tell a pear."""
    for seed in range(50):
        assert all("pear" in caption for caption in write(PEAR, seed=seed))


def test_captions_tell_skin_tones_apart():
    light = [caption for seed in range(20)
             for caption in write(HAND, "waving hand: light skin tone", seed)]
    assert any("waving hand" not in caption for caption in light)
    assert all("light skin tone" in caption for caption in light)
    assert not any("skin" in caption for caption in write(HAND))


def test_captions_depend_on_the_seed_and_the_key():
    captions = write(APPLE)
    assert write(APPLE) == captions
    assert write(APPLE, seed=1) != captions and write(APPLE, key="google-2") != captions


@pytest.mark.parametrize(("label", "phrases"), [
    ("red apple", ["red apple"]),
    ("flag: china", ["flag: china", "flag of china", "china flag"]),
    ("keycap: 3", ["keycap: 3", "keycap 3"]),
    ("waving hand: dark skin tone",
     ["waving hand: dark skin tone", "waving hand with dark skin tone",
      "dark skin tone waving hand"]),
    ("man: light skin tone, beard",
     ["man: light skin tone, beard", "man with light skin tone and beard"]),
    ("kiss: woman, man", ["kiss: woman, man", "kiss, woman, man"]),
    ("man running: dark skin tone, facing right",
     ["man running: dark skin tone, facing right",
      "man running with dark skin tone, facing right"]),
])
def test_labels_in_words(label, phrases):
    assert phrase_label(label) == phrases


@pytest.mark.parametrize(("label", "expected"), [
    ("man: dark skin tone, beard", "man: beard"), ("waving hand: dark skin tone", "waving hand"),
    ("kiss: woman, man", "kiss: woman, man"), ("red apple", "red apple")])
def test_labels_without_skin_tone(label, expected):
    assert without_tone(label) == expected


def test_list_emoji_tells_label_and_style(tmp_path):
    emoji_packages(tmp_path)
    found = list_emoji(tmp_path / "packages", seed=0)
    (toned,) = (emoji for emoji in found if "skin" in emoji.label)
    assert toned.style == "google" and toned.concept == "1f607-1f3fb"
    assert toned.label == "thing 7: light skin tone"
    assert toned.item.captions["original_caption"] == "thing 7: light skin tone, flat"


def test_the_order_of_packing_does_not_change_the_captions(tmp_path):
    """Another shard size and number of workers packs the same samples."""
    emoji_packages(tmp_path)
    first = packed(tmp_path, "a", "--shard-size", 3, "--workers", 1)
    assert packed(tmp_path, "b", "--shard-size", 7, "--workers", 2) == first
    other_seed = packed(tmp_path, "c", "--seed", 5)
    assert all(other_seed[key] != first[key] for key in other_seed.keys() & first.keys())


def test_the_length_of_captions_is_limited_line_by_line(tmp_path):
    emoji_packages(tmp_path)
    everything = packed(tmp_path, "all")
    limited = packed(tmp_path, "limited", "--min-words", 4, "--max-words", 6)
    assert limited.keys() == everything.keys()
    for key, captions in limited.items():
        assert captions == [c for c in everything[key] if 4 <= len(c.split()) <= 6]
    counts = [len(captions) for captions in limited.values()]
    assert 0 < min(counts) and max(counts) < CAPTIONS


def packed(folder, name, *words):
    """{key: synthetic captions} of the samples in OUT/train."""
    pack("emoji", folder / name, "--packages", folder / "packages", *words)
    samples, _ = read_shards(folder / name / "train")
    return {key: sample["synthetic_caption.txt"].decode().split("\n")
            for key, sample in samples.items()}
