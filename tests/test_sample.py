"""sample.py as a user runs it (as a process, with its files and error messages), and generate()."""
import json
import os
import re
import shutil
import sys
from dataclasses import asdict

import numpy as np
import pytest
import torch
import warm
from conftest import REFERENCE, ROOT
from PIL import Image
from safetensors.torch import load_file

from fusedit import FuseDiTConfig, FuseDiTError
from fusedit_lib import sampling
from fusedit_lib.files import file_stem
from fusedit_lib.pretrained import build_model, load_model, save_model
from fusedit_lib.vae import load_vae

PIPELINE = str(REFERENCE / "released_layout" / "pipeline")


def run(*args):
    """Run sample.py to its end."""
    done = warm.run([ROOT / "sample.py", *args])
    assert "Traceback" not in done.stderr, done.stderr
    return done


def pixels(path):
    """The pixels of an image file, as signed integers."""
    return np.asarray(Image.open(path)).astype(int)


@pytest.fixture(scope="module")
def model(tmp_path_factory, gemma_folder):
    """The folder of a model with random weights that draws varied images of 8 x 8 pixels."""
    folder = tmp_path_factory.mktemp("model")
    config = FuseDiTConfig(base=str(gemma_folder), in_channels=3, vae=None, image_size=8,
                           max_text_tokens=6, pos_embed="2d-rope", guidance=2.5)
    torch.manual_seed(0)
    dit = build_model(config).dit
    for p in dit.parameters():
        torch.nn.init.normal_(p, std=0.1)
    save_model(folder, FuseDiTConfig.from_dict(asdict(config)), dit.state_dict())
    return folder


# ------------------------------------------------------------------------------ files

def test_images_grid_animation_and_metadata(model, tmp_path):
    done = run("--model", model, "--prompt", "a red circle", "--prompt", "a blue star",
               "--num-images", 2, "--steps", 3, "--seed", 5, "--grid", "--gif", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    expected = {"grid.png"}
    for stem in ("a-red-circle-5", "a-red-circle-6", "a-blue-star-5", "a-blue-star-6"):
        expected |= {f"{stem}.png", f"{stem}.gif"}
    assert {p.name for p in tmp_path.iterdir()} == expected
    assert len(list(tmp_path.iterdir())) == len(expected)

    image = Image.open(tmp_path / "a-blue-star-6.png")
    assert image.size == (8, 8)
    assert image.text == {
        "prompt": "a blue star", "seed": "6", "steps": "3", "guidance": "2.5", "negative": "",
        "guidance_span": "0 1", "model": str(model)}          # 2.5 is the model's own
    assert Image.open(tmp_path / "a-red-circle-5.gif").n_frames == 3


def test_a_compiled_model_draws_the_same_image(model, tmp_path):
    words = ("--model", model, "--prompt", "a red circle", "--steps", 3, "--dtype", "float32")
    plain = run(*words, "--out", tmp_path / "plain")
    assert plain.returncode == 0, plain.stderr
    compiled = run(*words, "--out", tmp_path / "compiled", "--compile")
    assert compiled.returncode == 0, compiled.stderr
    a = pixels(tmp_path / "plain" / "a-red-circle-0.png")
    b = pixels(tmp_path / "compiled" / "a-red-circle-0.png")
    assert np.ptp(a) > 50
    assert abs(a - b).max() <= 1


NAMES = {
    "A red circle, at 5 o'clock!": "a-red-circle-at-5-o-clock",
    "雪地里的红色狐狸": "雪地里的红色狐狸",
    "3D модель лисы": "3d-модель-лисы",
    "हिन्दी में लाल": "हिन्दी-में-लाल",                             # its vowel signs are marks
    "cafe\u0301 au lait": "café-au-lait",                  # stored in NFC
    "می\u200cخواهم": "میخواهم",                              # an invisible joiner
    "3\ufe0f\u20e3 \u2764\ufe0f cats": "3-cats",
    "": "empty",
    "🎉 ❤️ !!": "symbols",
    "a" * 59 + "-bc": "a" * 59 + "-",                       # 60 characters, as ever
    "क\u093f" * 40: "क\u093f" * 30,
    "a" * 59 + "क\u093f": "a" * 59,                         # a mark stays with its letter
    "𐐷" * 60: "𐐷" * 50,                                      # 200 bytes
}


@pytest.mark.parametrize("prompt", NAMES)
def test_a_file_name_keeps_letters_of_any_script(prompt):
    assert file_stem(prompt) == NAMES[prompt]


def test_a_prompt_in_another_script(model, tmp_path):
    """On a terminal that cannot show it, too."""
    env = os.environ | {"PYTHONIOENCODING": "ascii"}
    words = ["--model", model, "--prompt", "красный круг", "--steps", 1, "--gif", "--out", tmp_path]
    done = warm.run([ROOT / "sample.py", *words], env, cold=True)
    assert done.returncode == 0, done.stderr
    assert {p.name for p in tmp_path.iterdir()} == {"красный-круг-0.png", "красный-круг-0.gif"}
    assert Image.open(tmp_path / "красный-круг-0.png").text["prompt"] == "красный круг"
    assert done.stdout.endswith("\\u0433-0.png\n")


BROKEN_COMPILER = """#!/bin/sh
if [ "$1" = --version ]; then echo g++ 12; exit 0; fi
echo "x.cpp:1:10: fatal error: Python.h: No such file or directory" >&2
exit 1
"""


@pytest.mark.parametrize("env, message", [
    (dict(PATH="/nowhere"), "no C\\+\\+ compiler found.*apt install g\\+\\+"),
    (dict(CXX="{broken}"), "--compile has failed .*Python.h: No such file.*python3-dev")])
def test_compiling_without_a_working_compiler_is_one_line(model, tmp_path, env, message):
    broken = tmp_path / "broken"
    broken.write_text(BROKEN_COMPILER)
    broken.chmod(0o755)
    env = {name: value.format(broken=broken) for name, value in env.items()}
    env["TORCHINDUCTOR_CACHE_DIR"] = str(tmp_path)
    folder = model if "CXX" in env else "./nowhere"        # found before the model is loaded
    words = ["--model", folder, "--prompt", "a star", "--steps", 1, "--compile", "--out", tmp_path]
    # PyTorch reads CXX when it is imported, so the process must be a new one.
    done = warm.run([ROOT / "sample.py", *words], os.environ | env, cold="CXX" in env)
    assert done.returncode == 1
    lines = done.stderr.splitlines()
    assert re.search(message, lines[-1]), done.stderr
    assert [line for line in lines[:-1] if not line.startswith("drawing in")] == []


def test_an_image_names_the_checkpoint_not_the_run(model, tmp_path):
    (tmp_path / "run").mkdir()
    shutil.copytree(model, tmp_path / "run" / "step-0000007")
    (tmp_path / "run" / "latest").write_text("step-0000007\n")
    done = run("--model", tmp_path / "run", "--prompt", "a star", "--steps", 1, "--out", tmp_path,
               "--guidance", 4)
    assert done.returncode == 0, done.stderr
    image = Image.open(tmp_path / "a-star-0.png")
    assert image.text["guidance"] == "4.0"
    assert image.text["model"] == str(tmp_path / "run" / "step-0000007")


def test_a_seed_gives_the_same_image_in_any_batch(model, tmp_path):
    run("--model", model, "--prompt", "a star", "--prompt", "a small green square above the star",
        "--num-images", 3, "--steps", 4, "--batch-size", 4, "--out", tmp_path / "a")
    run("--model", model, "--prompt", "a star", "--seed", 2, "--steps", 4, "--out", tmp_path / "b")
    a = pixels(tmp_path / "a" / "a-star-2.png")
    b = pixels(tmp_path / "b" / "a-star-2.png")
    other = pixels(tmp_path / "a" / "a-star-1.png")
    assert abs(a - b).max() <= 1
    assert abs(a - other).max() > 10


def test_nothing_is_overwritten(model, tmp_path):
    for _ in range(2):
        run("--model", model, "--prompt", "a star", "--steps", 1, "--out", tmp_path, "--grid")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a-star-0.png", "a-star-0_2.png",
                                                          "grid.png", "grid_2.png"]


def test_an_image_of_the_demo_does_not_contain_the_path_of_the_clone(tmp_path):
    done = run("--prompt", "a red star", "--steps", 1, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    assert Image.open(tmp_path / "a-red-star-0.png").text["model"] == "demo"


def test_overrides_reach_the_model_and_the_png(model, tmp_path):
    words = ["--model", model, "--prompt", "a star", "--steps", 2, "--dtype", "float32"]
    changes = ["--set", "instruction=a blue ", "guidance=4"]
    assert run(*words, *changes, "--out", tmp_path / "a").returncode == 0
    run(*words, "--prompt", "a blue a star", "--guidance", 4, "--out", tmp_path / "b")
    image = Image.open(tmp_path / "a" / "a-star-0.png")
    assert image.text["set"] == "'instruction=a blue ' guidance=4"
    assert image.text["guidance"] == "4.0"
    assert abs(pixels(tmp_path / "a" / "a-star-0.png")
               - pixels(tmp_path / "b" / "a-blue-a-star-0.png")).max() <= 1
    assert abs(pixels(tmp_path / "a" / "a-star-0.png")
               - pixels(tmp_path / "b" / "a-star-0.png")).max() > 1
    for word, message in (("guidance", "--set takes field=value"), ("guidanc=4", "guidance"),
                          ("vae=true", "config field vae is True")):
        done = run(*words, "--set", word, "--out", tmp_path / "c")
        assert done.returncode == 1
        assert message in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "c").exists()


def test_an_export_keeps_the_stored_precision(model, tmp_path, monkeypatch):
    """Also on a device where --dtype auto means bf16."""
    import sample
    monkeypatch.setattr(sample.backend, "dtype_name", lambda name, device: "bf16")
    for out, more in (("stored", []), ("bf16", ["--dtype", "bf16"])):
        monkeypatch.setattr(sys, "argv", ["sample.py", "--model", str(model), "--export",
                                          str(tmp_path / out), *more])
        sample.main()
    want = load_file(model / "model.safetensors")["dit.proj_out.weight"]
    stored = load_file(tmp_path / "stored" / "transformer" / "model.safetensors")
    assert stored["dit.proj_out.weight"].equal(want)
    rounded = load_file(tmp_path / "bf16" / "transformer" / "model.safetensors")
    assert rounded["dit.proj_out.weight"].equal(want.bfloat16())
    assert {tensor.dtype for tensor in rounded.values()} == {torch.bfloat16}
    for out, dtype in (("stored", "float32"), ("bf16", "bfloat16")):
        config = json.loads((tmp_path / out / "transformer" / "config.json").read_text())
        assert config["torch_dtype"] == dtype


def test_released_layout_and_export(tmp_path):
    words = ("--height", 32, "--width", 48, "--steps", 2, "--prompt", "a large green square")
    done = run("--model", PIPELINE, *words, "--out", tmp_path / "a", "--export", tmp_path / "m")
    assert done.returncode == 0, done.stderr
    done = run("--model", tmp_path / "m", *words, "--out", tmp_path / "b")
    assert done.returncode == 0, done.stderr
    a = pixels(tmp_path / "a" / "a-large-green-square-0.png")
    b = pixels(tmp_path / "b" / "a-large-green-square-0.png")
    assert a.shape == (32, 48, 3)
    assert (a == b).all()


# ------------------------------------------------------------------------------ messages

def test_unknown_words_and_long_prompts_are_reported(model, tmp_path):
    done = run("--model", model, "--prompt", "a purple zebra and a red circle above the star",
               "--steps", 1, "--out", tmp_path)
    assert done.returncode == 0
    assert "does not know: purple, zebra" in done.stderr
    assert "cut to 6 tokens, after 'a" in done.stderr

    # the negative prompt has no instruction, which would make it too long
    done = run("--model", model, "--prompt", "a star", "--negative", "a small red circle and zebra",
               "--set", "instruction=imagine : ", "--steps", 1, "--out", tmp_path)
    assert "does not know: zebra" in done.stderr
    assert "cut to" not in done.stderr


@pytest.mark.parametrize("args, code, message", [
    ([], 2, "--prompt"),
    (["--prompt", "x", "--steps", "0"], 2, "at least 1"),
    (["--prompt", "x", "--no-ema"], 1, "has one set of weights"),
    (["--prompt", "x", "--model", "./nowhere"], 1, "no such model folder"),
    (["--prompt", "x", "--model", "{empty}"], 1, "config.json"),
    (["--prompt", "x", "--height", "9"], 1,
     "height 9 is not a multiple of 2 pixels, the size of a patch; try 8 or 10"),
    (["--prompt", "x", "--device", "cuda:7"], 1, "cuda:7"),
    (["--prompt", "x", "--seed", "99999999999999999999"], 2, "from 0 to"),
    (["--prompt", "x", "--device", "toaster"], 1, "toaster"),
    (["--prompts", "{empty}/none.txt"], 1, "none.txt"),
    (["--prompts", "{blank}"], 1, "is empty"),
    (["--prompts", "{latin}"], 1, "not UTF-8 (byte 3)"),
    (["--prompt", "caf\udce9"], 1, "'caf\\udce9' is not UTF-8"),
    (["--prompt", "x", "--guidance-span", "0.9", "0.1"], 1, "from 0 to 1, the lower one first"),
    (["--prompt", "x", "--guidance-span", "2", "3"], 1, "guidance span 2 3: give two noise levels"),
    (["--prompt", "x", "--out", "{blank}/deep"], 1, "deep"),
    (["--prompt", "x", "--set", "guidance"], 1, "--set takes field=value, not 'guidance'"),
    (["--prompt", "x", "--set", "=1"], 1, "--set takes field=value, not '=1'"),
    (["--prompt", "x", "--set", "colour=1"], 1, "unknown config field 'colour'"),
    (["--prompt", "x", "--set", "device=cpu"], 1, "unknown config field 'device'"),
    (["--prompt", "x", "--set", "vae=5"], 1, "config field vae is 5; allowed: str, None"),
    (["--prompt", "x", "--set", "guidance=large"], 1, "config field guidance is 'large'"),
    (["--prompt", "x", "--set", "base=./nowhere"], 1, "base=./nowhere: there is no such folder")])
def test_bad_input_gets_one_line(model, tmp_path, args, code, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "blank.txt").write_text("\n  \n")
    (tmp_path / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    paths = dict(empty=tmp_path / "empty", blank=tmp_path / "blank.txt",
                 latin=tmp_path / "latin.txt")
    args = [arg.format(**paths) for arg in args]
    if args and "--model" not in args:
        args += ["--model", model]
    if args and "--out" not in args:
        args += ["--out", tmp_path / "out"]

    done = run(*args)
    assert done.returncode == code, done.stderr
    assert message in done.stderr
    if code != 2:                           # argparse prints the usage as well
        assert len(done.stderr.strip().splitlines()) == 1
    assert not list((tmp_path / "out").glob("*"))


# ------------------------------------------------------------------------------ generate()

def count_texts(model):
    """A list to which each call of the model's Gemma appends the number of texts it encodes."""
    counts = []
    model.llm.register_forward_hook(lambda module, inputs, output: counts.append(len(inputs[0])))
    return counts


def test_each_text_is_encoded_once_per_batch_and_not_during_the_steps(model, monkeypatch,
                                                                      tmp_path):
    import sample
    from fusedit_lib import cli
    counts = []
    load = cli.load_model

    def load_and_count(*args, **changes):
        loaded = load(*args, **changes)
        counts.append(count_texts(loaded))
        return loaded
    monkeypatch.setattr(cli, "load_model", load_and_count)
    monkeypatch.setattr(sys, "argv", ["sample.py", "--model", str(model), "--prompt", "a star",
                                      "--prompt", "a star", "--num-images", "3", "--steps", "4",
                                      "--batch-size", "3", "--out", str(tmp_path)])
    sample.main()
    assert counts == [[1, 1, 1, 1]]         # two batches of three: the prompt, the empty one


def test_three_lines_in_a_notebook_draw_the_same_as_sample_py(model, tmp_path):
    run("--model", model, "--prompt", "a star", "--seed", 3, "--num-images", 2, "--out", tmp_path,
        "--dtype", "float32")
    loaded = load_model(model)
    images = sampling.generate(loaded, ["a star", "a star"], [3, 4])
    for image, seed in zip(images, (3, 4), strict=True):
        difference = np.asarray(image, int) - pixels(tmp_path / f"a-star-{seed}.png")
        assert abs(difference).max() <= 1


def test_prompts_and_seeds_of_a_batch_are_paired(model):
    loaded = load_model(model)
    counts = count_texts(loaded)
    steps = []

    def after_step(step, x):
        assert x.shape == (3, 3, 8, 4)
        steps.append(step)
    prompts = ["a star", "a blue circle", "a star"]
    images = sampling.generate(loaded, prompts, [1, 1, 2], width=4, steps=2, negative="a square",
                               text_length=6, callback=after_step)
    assert steps == [0, 1]
    assert counts == [2, 1]                 # two prompts; the negative one
    assert [image.size for image in images] == [(4, 8)] * 3
    assert len({image.tobytes() for image in images}) == 3

    alone, = sampling.generate(loaded, ["a star"], [2], width=4, steps=2, negative="a square")
    assert abs(np.asarray(alone, int) - np.asarray(images[2], int)).max() <= 1


def test_the_instruction_goes_before_prompts_and_not_before_the_negative_one(model, tmp_path):
    prompt, negative = "a star", "a small square"
    loaded = load_model(model, instruction="imagine : ")
    plain = load_model(model)
    wanted, = sampling.generate(plain, [f"imagine : {prompt}"], [0], negative=negative)
    drawn, = sampling.generate(loaded, [prompt], [0], negative=negative)
    assert drawn.tobytes() == wanted.tobytes()
    for other in (f"imagine : {negative}", ""):
        different, = sampling.generate(plain, [f"imagine : {prompt}"], [0], negative=other)
        assert different.tobytes() != wanted.tobytes()
    assert sampling.padded_text_length(loaded, [prompt], negative) == 5      # <bos>, 4 words
    assert sampling.padded_text_length(loaded, ["star"], "a small red square") == 5

    done = run("--model", model, "--set", "instruction=imagine : ", "--prompt", prompt,
               "--negative", negative, "--dtype", "float32", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    assert abs(pixels(tmp_path / "a-star-0.png") - np.asarray(wanted, int)).max() <= 1


def test_default_seeds_count_from_zero(model):
    loaded = load_model(model)
    drawn = sampling.generate(loaded, ["a star"] * 2, steps=2)
    expected = sampling.generate(loaded, ["a star"] * 2, [0, 1], steps=2)
    assert [image.tobytes() for image in drawn] == [image.tobytes() for image in expected]


def test_generate_rejects_bad_arguments(model):
    loaded = load_model(model)
    with pytest.raises(FuseDiTError, match="2 prompts but 1 seeds"):
        sampling.generate(loaded, ["a star", "a circle"], [0])
    with pytest.raises(FuseDiTError, match="must be a list, such as \\['a star'\\]"):
        sampling.generate(loaded, "a star")
    with pytest.raises(FuseDiTError, match="width 7 is not a multiple of 2 pixels"):
        sampling.generate(loaded, ["a star"], [0], width=7)
    with pytest.raises(FuseDiTError, match="guidance span 1 0: give two noise levels from 0 to 1"):
        sampling.generate(loaded, ["a star"], [0], guidance_span=(1, 0))
    latents = load_model(PIPELINE)
    with pytest.raises(FuseDiTError, match="pass it as vae="):
        sampling.generate(latents, ["a star"], [0])
    config = latents.config
    vae = load_vae(config.vae, "cpu", torch.float32, config.in_channels)
    images = sampling.generate(latents, ["a star"], [0], vae=vae, height=32, width=48, steps=1)
    assert images[0].size == (48, 32)
