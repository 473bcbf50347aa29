"""Write emojibase_labels.txt and emojibase_tag_words.txt from the packages of prepare_data.py.

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
    """emojibase_labels.txt has a label per line; a style follows it if the label has only one."""
    entries = json.loads((packages / "words" / "data.json").read_text())
    styles = {entry["label"].lower(): set() for entry in entries}
    for emoji in list_emoji(packages, seed=0):
        if without_tone(emoji.label) == emoji.label:
            styles[emoji.label].add(emoji.style)

    label_words = set()
    tag_words = set()
    for entry in entries:
        label_words.update(WORD.findall(entry["label"].lower()))
        for tag in tags_of(entry):
            tag_words.update(WORD.findall(tag))

    lines = []
    for label, found in styles.items():
        if len(found) == len(STYLES):
            lines.append(label)
        elif found:
            lines.append(f"{label}\t{found.pop()}")
    write_lines(HERE / "emojibase_labels.txt", lines)
    write_lines(HERE / "emojibase_tag_words.txt", sorted(tag_words - label_words))


def write_lines(path, lines):
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
