"""examples/finetune_demo.py: images that the demo's own data do not have, and a score of moons."""
import hashlib
import random
import re
import runpy
import sys

import pytest
import warm
from conftest import ROOT
from launching import ENV
from PIL import Image

from fusedit_lib import sampling
from fusedit_lib.data.shapes import shapes_sample
from fusedit_lib.shapes import detector, render, scenes

PROGRAM = ROOT / "examples" / "finetune_demo.py"
ALL_SHAPES = (*scenes.SHAPES, "moon")


@pytest.fixture(scope="module")
def example():
    """The names that the program defines."""
    return runpy.run_path(str(PROGRAM))


def test_a_folder_of_captioned_images_is_drawn(tmp_path):
    out = tmp_path / "moons"
    done = warm.run([PROGRAM, "images", out, "-n", "8"], ENV)
    assert done.returncode == 0, done.stderr
    names = [path.name for path in sorted(out.iterdir())]
    assert names == [f"00{i}{suffix}" for i in range(8) for suffix in (".png", ".txt")]
    for i in range(8):
        assert re.search(r"\bmoons?\b", (out / f"00{i}.txt").read_text())
        image = Image.open(out / f"00{i}.png")
        assert image.size == (32, 32)
        found = [item.shape for item in detector.detect(image, ALL_SHAPES).objects]
        assert "moon" in found and set(found) <= set(ALL_SHAPES)

    again = warm.run([PROGRAM, "images", out], ENV)
    assert (again.returncode, again.stderr.count("\n")) == (1, 1)
    assert f"{out} exists: choose another folder" in again.stderr


def test_the_samples_are_of_all_kinds_and_hold_out_what_the_demo_holds_out(example):
    samples = [example["moon_sample"]("training", i) for i in range(500)]
    assert len({sample.caption for sample in samples}) > 400
    prompts = example["evaluation_samples"](120)
    assert len(prompts) == 120
    assert not {prompt.caption for prompt in prompts} & {sample.caption for sample in samples}
    for kind in example["KINDS"]:
        assert sum(prompt.kind == kind for prompt in prompts) > 20

    counts = set()
    for i in range(200):
        scene = example["moon_scene"](random.Random(i), "two")
        shapes = [group.shape for group in scene.groups]
        assert shapes.count("moon") == 1
        counts.add(shapes.index("moon"))
        other = tuple(group for group in scene.groups if group.shape != "moon")
        assert not scenes.is_held_out(scene._replace(groups=other))
    assert counts == {0, 1}


def test_the_detector_knows_moons_and_takes_no_other_shape_for_one(example):
    right = 0
    for i in range(100):
        sample = example["moon_sample"]("evaluation", i)
        detection = detector.detect(sample.image, ALL_SHAPES)
        right += detector.mismatch(sample.description, detection) == ""
    assert right > 98

    for i in range(24):
        rng = random.Random(i)
        scene = example["moon_scene"](rng, example["KINDS"][i % 4])
        discs = scenes.layout(scene, rng)
        groups = []
        for group in scene.groups:
            if group.shape == "moon":
                group = group._replace(shape=scenes.SHAPES[i % 6])
            groups.append(group)
        image = render.render(scene._replace(groups=tuple(groups)), discs)
        assert detector.mismatch(scene, detector.detect(image, ALL_SHAPES)) != ""


def score(example, monkeypatch, capsys, *argv):
    monkeypatch.setattr(sys, "argv", ["finetune_demo.py", "score", *map(str, argv)])
    example["main"]()
    return float(re.search(r"^overall +(\S+)", capsys.readouterr().out, re.M)[1])


def test_the_score_is_0_for_the_demo_and_1_for_moons(example, monkeypatch, capsys, tmp_path):
    assert score(example, monkeypatch, capsys, "-n", 4, "--grid", tmp_path / "grid.png") == 0
    assert Image.open(tmp_path / "grid.png").width > 4 * 32

    samples = example["evaluation_samples"](40)
    asked = []

    def exact(model, prompts, seeds):
        asked.extend(prompts)
        return [samples[seed].image for seed in seeds]

    monkeypatch.setattr(sampling, "generate", exact)
    assert score(example, monkeypatch, capsys, "-n", 40) == 1
    assert asked == [sample.caption for sample in samples]


def test_the_demos_own_world_is_unchanged():
    """The prompts of evaluate.py shapes and the samples of prepare_data.py shapes know no moon."""
    whole = hashlib.sha256()
    for prompt in scenes.evaluation_prompts(600):
        whole.update(prompt.text.encode())
    for i in range(200):
        sample = shapes_sample(0, 32, i)
        whole.update(sample["synthetic_caption.txt"] + sample["original_caption.txt"])
    assert whole.hexdigest()[:16] == "b28588c1b53ec018"
