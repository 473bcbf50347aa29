"""sample.py as a user runs it: a process, its files, and its words when something is wrong."""
import shutil
import sys
from dataclasses import asdict

import numpy as np
import pytest
import torch
import warm
from conftest import REFERENCE, ROOT
from PIL import Image

from fusedit import FuseDiTConfig
from fusedit_lib.pretrained import build_model, save_model

PIPELINE = str(REFERENCE / "released_layout" / "pipeline")


def run(*args, cwd=None):
    done = warm.run([ROOT / "sample.py", *args], cwd=cwd)
    assert "Traceback" not in done.stderr, done.stderr
    return done


@pytest.fixture(scope="module")
def model(tmp_path_factory, gemma_folder):
    """A checkpoint that draws something: random weights, pixels of 8 x 8."""
    folder = tmp_path_factory.mktemp("model")
    config = FuseDiTConfig(base=str(gemma_folder), in_channels=3, vae=None, image_size=8,
                           max_text_tokens=6, pos_embed="2d-rope", guidance=2.5)
    torch.manual_seed(0)
    dit = build_model(config).dit
    for p in dit.parameters():
        torch.nn.init.normal_(p, std=0.1)
    save_model(folder, FuseDiTConfig.from_dict(asdict(config)), dit.state_dict())
    return folder


def test_pictures_sheet_animation_and_metadata(model, tmp_path):
    done = run("--model", model, "--prompt", "a red circle", "--prompt", "a blue star",
               "--num-images", 2, "--steps", 3, "--seed", 5, "--grid", "--gif", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == sorted(["grid.png"] + [f"a-{w}-{s}.{e}" for w in ("red-circle", "blue-star")
                                           for s in (5, 6) for e in ("gif", "png")])
    picture = Image.open(tmp_path / "a-blue-star-6.png")
    assert picture.size == (8, 8) and picture.text == {
        "prompt": "a blue star", "seed": "6", "steps": "3", "guidance": "2.5", "negative": "",
        "guidance_span": "0 1", "model": str(model)}          # 2.5: the model's own
    assert Image.open(tmp_path / "a-red-circle-5.gif").n_frames == 3


def test_compiled_it_draws_the_same(model, tmp_path):
    for name, more in (("plain", ()), ("compiled", ("--compile",))):
        done = run("--model", model, "--prompt", "a red circle", "--steps", 3, "--out",
                   tmp_path / name, "--dtype", "float32", *more)
        assert done.returncode == 0, done.stderr
    a, b = (np.asarray(Image.open(tmp_path / name / "a-red-circle-0.png"), int)
            for name in ("plain", "compiled"))
    assert np.ptp(a) > 50 and abs(a - b).max() <= 1


def test_a_picture_names_the_checkpoint_not_the_run(model, tmp_path):
    (tmp_path / "run").mkdir()
    shutil.copytree(model, tmp_path / "run" / "step-0000007")
    (tmp_path / "run" / "latest").write_text("step-0000007\n")
    done = run("--model", tmp_path / "run", "--prompt", "a star", "--steps", 1, "--out", tmp_path,
               "--guidance", 4)
    assert done.returncode == 0, done.stderr
    drawn = Image.open(tmp_path / "a-star-0.png")
    assert drawn.text["guidance"] == "4.0"
    assert drawn.text["model"] == str(tmp_path / "run" / "step-0000007")


def test_a_seed_gives_one_picture_whatever_else_is_drawn(model, tmp_path):
    run("--model", model, "--prompt", "a star", "--prompt", "a small green square above the star",
        "--num-images", 3, "--steps", 4, "--batch-size", 4, "--out", tmp_path / "a")
    run("--model", model, "--prompt", "a star", "--seed", 2, "--steps", 4, "--out", tmp_path / "b")
    a, b = (np.asarray(Image.open(tmp_path / d / "a-star-2.png")).astype(int) for d in "ab")
    other = np.asarray(Image.open(tmp_path / "a" / "a-star-1.png")).astype(int)
    assert abs(a - b).max() <= 1 and abs(a - other).max() > 10


def test_nothing_is_overwritten(model, tmp_path):
    for _ in range(2):
        run("--model", model, "--prompt", "a star", "--steps", 1, "--out", tmp_path, "--grid")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a-star-0.png", "a-star-0_2.png",
                                                          "grid.png", "grid_2.png"]


def test_each_text_is_read_once_and_not_again_during_the_steps(model, monkeypatch, tmp_path):
    import sample
    from fusedit_lib import cli
    calls = []
    real = cli.load_model

    def counted(*args):
        loaded = real(*args)
        loaded.llm.register_forward_hook(lambda m, i, out: calls.append(len(i[0])))
        return loaded
    monkeypatch.setattr(cli, "load_model", counted)
    monkeypatch.setattr(sys, "argv", ["sample.py", "--model", str(model), "--prompt", "a star",
                                      "--prompt", "a star", "--num-images", "3", "--steps", "4",
                                      "--batch-size", "2", "--out", str(tmp_path)])
    sample.main()
    assert calls == [2]                     # one pass: the prompt, and the empty one


def test_released_layout_and_export(tmp_path):
    size = ("--height", 32, "--width", 48, "--steps", 2, "--prompt", "a large green square")
    done = run("--model", PIPELINE, *size, "--out", tmp_path / "a", "--export", tmp_path / "m")
    assert done.returncode == 0, done.stderr
    assert run("--model", tmp_path / "m", *size, "--out", tmp_path / "b").returncode == 0
    a, b = (np.asarray(Image.open(tmp_path / d / "a-large-green-square-0.png")) for d in "ab")
    assert a.shape == (32, 48, 3) and (a == b).all()


def test_words_and_length_the_model_cannot_read(model, tmp_path):
    done = run("--model", model, "--prompt", "a purple zebra and a red circle above the star",
               "--steps", 1, "--out", tmp_path)
    assert done.returncode == 0
    assert "does not know: purple, zebra" in done.stderr
    assert "cut to 6 tokens, after 'a" in done.stderr


@pytest.mark.parametrize("args, code, words", [
    ([], 2, "--prompt"), (["--prompt", "x", "--steps", "0"], 2, "at least 1"),
    (["--prompt", "x", "--no-ema"], 1, "averaged weights only"),
    (["--prompt", "x", "--model", "./nowhere"], 1, "no such model folder"),
    (["--prompt", "x", "--model", "{empty}"], 1, "config.json"),
    (["--prompt", "x", "--height", "9"], 1, "--height 9 is not whole patches of 2 pixels; try 8 or "
                                            "10"),
    (["--prompt", "x", "--device", "cuda:7"], 1, "cuda:7"),
    (["--prompt", "x", "--seed", "99999999999999999999"], 2, "from 0 to"),
    (["--prompt", "x", "--device", "toaster"], 1, "toaster"),
    (["--prompts", "{empty}/none.txt"], 1, "none.txt"),
    (["--prompts", "{blank}"], 1, "is empty"), (["--prompts", "{latin}"], 1, "not UTF-8 (byte 3)"),
    (["--prompt", "x", "--out", "{blank}/deep"], 1, "deep")])
def test_bad_input_gets_one_line(model, tmp_path, args, code, words):
    (tmp_path / "empty").mkdir()
    (tmp_path / "blank.txt").write_text("\n  \n")
    (tmp_path / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    places = dict(empty=tmp_path / "empty", blank=tmp_path / "blank.txt",
                  latin=tmp_path / "latin.txt")
    args = [a.format(**places) for a in args]
    out = [] if "--out" in args else ["--out", tmp_path / "out"]
    done = run(*([] if "--model" in args or not args else ["--model", model]), *args,
               *(out if args else []))
    assert done.returncode == code and words in done.stderr, done.stderr
    assert code == 2 or len(done.stderr.strip().splitlines()) == 1
    assert not list((tmp_path / "out").glob("*"))


def test_a_span_the_wrong_way_round_is_named(model, tmp_path):
    done = run("--model", model, "--prompt", "a star", "--guidance-span", 0.9, 0.1, "--out",
               tmp_path)
    assert done.returncode == 1 and "lower noise level comes first" in done.stderr
