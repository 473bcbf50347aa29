"""The design points of ablations.py.

A point is a line of POINTS: the config fields in which it differs from the baseline of the paper,
at the size of the demo. docs/ablations.md says how to add one.
"""
from typing import NamedTuple

import torch
from ablation_readers import BUNDLED, READERS

import fusedit
from fusedit import FuseDiTConfig, FuseDiTError, GemmaConfig
from fusedit_lib.files import read_json
from fusedit_lib.pretrained import check_build

# All points have the images, the width and the sampler of the demo. Everything else is the default
# of FuseDiTConfig: the paper's baseline.
WORLD = {"vae": None, "image_size": 32, "patch_size": 4, "in_channels": 3, "dit_hidden_size": 256,
         "shift": 4.0, "guidance": 3.0, "max_text_tokens": 32}
BASELINE = "baseline"


class Point(NamedTuple):
    """A design point: what differs from the baseline."""
    changes: dict                           # config fields
    reader: str = "questions"               # the frozen Gemma: one of READERS
    control: str = ""                       # for a control: the point whose number of parameters it
                                            # has, by another width


SHALLOW = {"fusion": "shallow"}
FINAL = {"pos_embed": "2d-rope", "timestep_conditioning": None, "sandwich_norm": True}
FOUR_BLOCKS = {"dit_num_hidden_layers": 4}

POINTS = {
    BASELINE: Point({}),

    # how the image reads the text
    "deep-cross": Point({"attention": "cross"}),
    "shallow-self": Point(SHALLOW),
    "shallow-cross": Point(SHALLOW | {"attention": "cross"}),

    # positions: the baseline has ape
    "1d-rope": Point({"pos_embed": "1d-rope"}),
    "2d-rope": Point({"pos_embed": "2d-rope"}),
    "m-rope": Point({"pos_embed": "m-rope"}),

    # the noise level: the baseline has adaln-zero, which is almost half of its parameters
    "adaln-single": Point({"timestep_conditioning": "adaln-single"}),
    "addition": Point({"timestep_conditioning": "addition"}),
    "no-time": Point({"timestep_conditioning": None}),
    "adaln-single-wide": Point({"timestep_conditioning": "adaln-single", "dit_hidden_size": 404},
                               control=BASELINE),
    "addition-wide": Point({"timestep_conditioning": "addition", "dit_hidden_size": 464},
                           control=BASELINE),
    "no-time-wide": Point({"timestep_conditioning": None, "dit_hidden_size": 488},
                          control=BASELINE),

    # the paper's final design
    "final": Point(FINAL),
    "final-wide": Point(FINAL | {"dit_hidden_size": 488}, control=BASELINE),

    # the text that the reader was trained on: the baseline has "with questions"
    "reader-captions": Point({}, reader="captions"),
    "reader-twice": Point({}, reader="twice"),

    # the depth of the layers that are read: compare these with each other (--against layers-0-3)
    "layers-0-3": Point(FOUR_BLOCKS),
    "layers-2-5": Point(FOUR_BLOCKS | {"initial_layers": 2}),
    "layers-4-7": Point(FOUR_BLOCKS | {"initial_layers": 4}),

    # later readers (arXiv 2602.03510): shallow fusion with other hidden states
    "penultimate": Point(SHALLOW | {"text_hidden_states_index": -2}),
    "uniform": Point(SHALLOW | {"text_states": "uniform"}),
    "static": Point(SHALLOW | {"text_states": "static"}),
    "depth": Point(SHALLOW | {"text_states": "depth"}),
    "time": Point(SHALLOW | {"text_states": "time"}),
    "joint": Point(SHALLOW | {"text_states": "joint"}),

    # "time" and "joint" also tell the DiT the noise level: here it has no other source, or another
    "no-time-shallow": Point(SHALLOW | {"timestep_conditioning": None}),
    "no-time-static": Point(SHALLOW | {"timestep_conditioning": None, "text_states": "static"}),
    "no-time-time": Point(SHALLOW | {"timestep_conditioning": None, "text_states": "time"}),
    "no-time-joint": Point(SHALLOW | {"timestep_conditioning": None, "text_states": "joint"}),
    "addition-shallow": Point(SHALLOW | {"timestep_conditioning": "addition"}),
    "addition-static": Point(SHALLOW | {"timestep_conditioning": "addition",
                                        "text_states": "static"}),
    "addition-time": Point(SHALLOW | {"timestep_conditioning": "addition", "text_states": "time"}),
    "addition-joint": Point(SHALLOW | {"timestep_conditioning": "addition",
                                       "text_states": "joint"}),
}


# ---------------------------------------------------------------------------- choosing
def choose(names=None):
    """{name: Point} of these names, or of all points.

    Raises FuseDiTError for an unknown name, and for a point with an unknown reader or config field.
    """
    chosen = {}
    for name in names or POINTS:
        if name not in POINTS:
            raise FuseDiTError(f"unknown point {name!r}; {fusedit.suggest(name, POINTS)}")
        point = POINTS[name]
        if point.reader not in READERS:
            raise FuseDiTError(f"point {name}: unknown reader {point.reader!r}; "
                               f"{fusedit.suggest(point.reader, READERS)}")
        for field in point.changes:
            FuseDiTConfig.check_field(field)
        chosen[name] = point
    return chosen


def config_of(point, base):
    """The FuseDiTConfig of a Point. base: the folder of its reader. Raises FuseDiTError."""
    return FuseDiTConfig.from_dict(WORLD | {"base": str(base)} | point.changes)


def check(point):
    """Raise FuseDiTError unless a model of this Point can be built."""
    if point.control and point.control not in POINTS:
        raise FuseDiTError(f"control of an unknown point {point.control!r}; "
                           f"{fusedit.suggest(point.control, POINTS)}")
    check_build(config_of(point, "-"))
    count_parameters(point)


def family(point):
    """The name of the points that share a learning rate with this one.

    They have the same fusion and the same time conditioning, which decide how the weights are
    scaled and gated.
    """
    fusion = point.changes.get("fusion", "deep")
    time = point.changes.get("timestep_conditioning", "adaln-zero") or "none"
    return f"{fusion}, {time}"


def count_parameters(point):
    """The number of trained parameters of a point, counted without memory for them."""
    gemma = GemmaConfig.from_dict(read_json(BUNDLED / "config.json"))      # all have this shape
    with torch.device("meta"):
        model = fusedit.FuseDiT(config_of(point, "-"), gemma)
    return sum(p.numel() for p in model.dit.parameters())
