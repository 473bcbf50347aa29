"""The prompts in unseen words, compared with all labels and tags of emojibase."""
import re
from collections import Counter
from pathlib import Path
from typing import get_args

import pytest

from fusedit_lib.data.emoji_captions import STYLES, CaptionWriter
from fusedit_lib.evaluation.unseen_words import FUNCTION_WORDS, UNSEEN_WORDS, Kind

REFERENCE = Path(__file__).parents[1] / "reference"
WORD = re.compile(r"[^\W_]+")


def read_lines(name):
    return (REFERENCE / name).read_text(encoding="utf-8").splitlines()


def labels_and_styles():
    """{label: the styles in which emojibase's emoji with this label has an image}"""
    found = {}
    for line in read_lines("emojibase_labels.txt"):
        label, _, style = line.partition("\t")
        found[label] = {style} if style else set(STYLES)
    return found


LABELS = labels_and_styles()
EMOJIBASE_WORDS = set(WORD.findall(" ".join(LABELS))) | set(read_lines("emojibase_words.txt"))


def content_words(prompt):
    return [word for word in WORD.findall(prompt) if word not in FUNCTION_WORDS]


def numbers_of(word):
    """The forms that could be the singular or the plural of a word, and the word itself."""
    forms = {word, f"{word}s", f"{word}es", word.removesuffix("s"), word.removesuffix("es")}
    if word.endswith("y"):
        forms.add(word[:-1] + "ies")
    if word.endswith("ies"):
        forms.add(word[:-3] + "y")
    return forms


def seen_words(prompt, vocabulary):
    return [word for word in content_words(prompt) if numbers_of(word) & vocabulary]


def test_emojibase_has_no_content_word_of_a_prompt():
    assert len(EMOJIBASE_WORDS) > 4000 and {"apple", "flamenco", "regional"} <= EMOJIBASE_WORDS
    assert [u.prompt for u in UNSEEN_WORDS if seen_words(u.prompt, EMOJIBASE_WORDS)] == []
    assert [u.prompt for u in UNSEEN_WORDS if not content_words(u.prompt)] == []


def test_captions_have_no_content_word_of_a_prompt():
    """This adds the words of the phrases that the labels and tags are put into."""
    words = set()
    writer = CaptionWriter([{"label": label} for label in LABELS], seed=0)
    for label in LABELS:
        for style in STYLES:
            captions = writer.write(f"{style}-{label}", style, label, [])
            words |= set(WORD.findall(" ".join(captions)))
    assert {"glossy", "simple", "icon", "3d"} <= words
    assert [u.prompt for u in UNSEEN_WORDS if seen_words(u.prompt, words)] == []


@pytest.mark.parametrize("word", ["lions", "berry", "glass", "cities"])
def test_a_plural_or_singular_counts_as_the_same_word(word):
    assert seen_words(f"a {word}", {"lion", "berries", "glasses", "city"}) == [word]


def test_the_right_answers_are_labels_with_images():
    assert {label for u in UNSEEN_WORDS for label in u.labels} - set(LABELS) == set()
    for unseen in UNSEEN_WORDS:
        assert len(set(unseen.labels)) == len(unseen.labels), unseen.prompt
        assert any(LABELS[label] == set(STYLES) for label in unseen.labels), unseen.prompt


def test_the_prompts_differ_and_all_kinds_occur():
    prompts = [unseen.prompt for unseen in UNSEEN_WORDS]
    assert len(set(prompts)) == len(prompts) >= 120
    kinds = Counter(unseen.kind for unseen in UNSEEN_WORDS)
    assert set(kinds) == set(get_args(Kind)) and min(kinds.values()) >= 10
    assert all(prompt == prompt.lower() for prompt in prompts)
