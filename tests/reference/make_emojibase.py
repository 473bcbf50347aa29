"""Write emojibase_labels.txt and emojibase_words.txt from the packages of prepare_data.py.

    python prepare_data.py emoji OUT                         # downloads the packages
    python -m tests.reference.make_emojibase PACKAGES        # the folder --packages of that command
"""
import json
import re
import sys
from pathlib import Path

from fusedit_lib.data.emoji import list_emoji
from fusedit_lib.data.emoji_captions import STYLES, tags_of, without_tone

HERE = Path(__file__).parent
WORD = re.compile(r"[^\W_]+")


def main(packages):
    """Write both files. packages: the folder of the downloaded packages.

    emojibase_labels.txt has the labels of emoji that have images, one per line, without variants of
    skin tone. After a tab follows the style, if there is an image in this style only.
    emojibase_words.txt has the words of all tags and of other labels that are not in the first.
    """
    styles = {}
    for emoji in list_emoji(packages, seed=0):
        if without_tone(emoji.label) == emoji.label:
            styles.setdefault(emoji.label, set()).add(emoji.style)
    lines = []
    for label, found in styles.items():
        only = "" if len(found) == len(STYLES) else f"\t{found.pop()}"
        lines.append(f"{label}{only}")
    write_lines(HERE / "emojibase_labels.txt", lines)

    texts = []
    for entry in json.loads((packages / "words" / "data.json").read_text()):
        variants = [entry, *entry.get("skins", [])]
        texts += [variant["label"].lower() for variant in variants] + tags_of(entry)
    words = WORD.findall(" ".join(texts))
    known = WORD.findall(" ".join(styles))
    write_lines(HERE / "emojibase_words.txt", sorted(set(words) - set(known)))


def write_lines(path, lines):
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
