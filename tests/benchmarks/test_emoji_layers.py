"""benchmarks/emoji_layers.py: the tags that it looks up, and the ranks of the right labels."""
import torch

from benchmarks.emoji_layers import RARE, ranks, rare_tags


def entry(label, *tags):
    return {"label": label, "tags": list(tags)}


def test_rare_tags_are_single_words_that_are_in_no_label_with_them():
    entries = [
        entry("Red apple", "fruit", "apple", "ripe fruit", "orchard"),
        entry("pear", "fruit", "orchard"),
        entry("man: bald", "man", "bald", "hairless"),
        *(entry(f"thing {i}", "common") for i in range(RARE + 1)),
        *(entry(f"piece {i}", "chess") for i in range(RARE)),
    ]
    fruit = {"red apple", "pear"}
    pieces = {f"piece {i}" for i in range(RARE)}
    expected = dict(fruit=fruit, orchard=fruit, hairless={"man: bald"}, chess=pieces)
    assert rare_tags(entries) == expected


def test_the_rank_is_that_of_the_nearest_right_label():
    """By the cosine similarity, in which lengths do not count."""
    degrees = torch.tensor([0, 45, 90, 180])
    lengths = torch.tensor([9, 1, 0.1, 1])
    labels = torch.polar(lengths, degrees.deg2rad())
    degrees = torch.tensor([5, 87, 87])
    queries = torch.polar(torch.ones(3), degrees.deg2rad())
    answers = [{0}, {0, 1}, {3}]
    found = ranks(torch.view_as_real(queries), torch.view_as_real(labels), answers)
    assert found == [0, 1, 3]
