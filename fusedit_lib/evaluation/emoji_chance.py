"""The scores that emoji would have if the images had nothing to do with their prompts.

Two answers: the score of a random real image, and that of the drawn images after a shuffle.
"""
from collections import defaultdict
from typing import NamedTuple

import numpy as np
import torch

SHUFFLES = 10_000


# ---- a random real image -------------------------------------------------------------------------

class RandomReal:
    """The scores of a real image of the asked style, drawn at random: means over all of them."""

    def __init__(self, gallery):
        self.gallery = gallery
        self.nearest = {}                   # style -> see Gallery.nearest_of_real
        self.numbers = {}                   # style -> {concept: its number there}
        self.share = {}                     # style -> its share of all real images
        for style, concepts in gallery.of_style.items():
            self.nearest[style] = gallery.nearest_of_real(style)
            self.numbers[style] = {concept: number for number, concept in enumerate(concepts)}
            self.share[style] = len(self.nearest[style]) / len(gallery.images)

    def score(self, prompt, near):
        """The share of the real images of a prompt's style that have a right concept among their
        `near` nearest ones."""
        numbers = self.numbers[prompt.style]
        right = torch.tensor([numbers[concept] for concept in prompt.concepts])
        hits = torch.isin(self.nearest[prompt.style][:, :near], right).any(1)
        return float(hits.double().mean())


# ---- shuffled prompts ----------------------------------------------------------------------------

class ShuffleTest(NamedTuple):
    """Scores of the drawn images after shuffles of their prompts."""
    score: float                            # the mean over the shuffles
    p: float                                # see shuffle_test


def shuffle_tests(verdicts, near):
    """{category: ShuffleTest} of Verdicts, for the measure that a right concept is among the `near`
    nearest ones.

    Units are shuffled as a whole, so that the two styles of a word stay together, among the units
    of the same category that have prompts in the same styles.
    """
    units = defaultdict(list)               # (category, unit) -> Verdicts
    for verdict in verdicts:
        units[verdict.prompt.category, verdict.prompt.unit].append(verdict)
    blocks = defaultdict(list)              # (category, styles) -> units
    for (category, _), unit in units.items():
        blocks[category, frozenset(verdict.prompt.style for verdict in unit)].append(unit)
    matrices = defaultdict(list)
    for (category, _), some in blocks.items():
        matrices[category].append(score_matrix(some, near))
    return {category: shuffle_test(several) for category, several in matrices.items()}


def score_matrix(units, near):
    """The scores [n,n] of the images of each unit (row) for the answers of each unit (column).

    All units have prompts in the same styles, and a unit has one answer in each style.
    """
    answers = []
    for unit in units:
        answers.append({verdict.prompt.style: verdict.prompt.concepts for verdict in unit})
    matrix = np.zeros((len(units), len(units)))
    for row, unit in enumerate(units):
        for verdict in unit:
            concepts = set(verdict.near[:near])
            for column, answer in enumerate(answers):
                hit = not concepts.isdisjoint(answer[verdict.prompt.style])
                matrix[row, column] += hit / len(unit)
    return matrix


def shuffle_test(matrices):
    """The ShuffleTest of a category from the matrices of its blocks, see score_matrix.

    p is the probability that a shuffle scores at least as high as the drawn images do.
    """
    rng = np.random.default_rng(0)
    count = sum(len(matrix) for matrix in matrices)
    actual = sum(np.trace(matrix) for matrix in matrices) / count
    scores = np.zeros(SHUFFLES)
    for matrix in matrices:
        own = np.arange(len(matrix))
        others = rng.permuted(np.tile(own, (SHUFFLES, 1)), axis=1)
        scores += matrix[own, others].sum(1) / count
    as_high = int((scores >= actual - 1e-9).sum())
    return ShuffleTest(float(scores.mean()), (1 + as_high) / (1 + SHUFFLES))
