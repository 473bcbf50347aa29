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
    assert rare_tags(entries) == {
        "fruit": {"red apple", "pear"}, "orchard": {"red apple", "pear"}, "hairless": {"man: bald"},
        "chess": {f"piece {i}" for i in range(RARE)}}


def test_the_rank_is_that_of_the_nearest_right_label():
    """By the cosine similarity, in which lengths do not count."""
    labels = torch.tensor([[9.0, 0.0], [1.0, 1.0], [0.0, 0.1], [-1.0, 0.0]])
    queries = torch.tensor([[2.0, 0.2], [0.1, 2.0], [0.1, 2.0]])
    assert ranks(queries, labels, [{0}, {0, 1}, {3}]) == [0, 1, 3]
