"""evaluate.py: the scores of perfect, wrong and untrained models, and the files it writes."""
import io
import json
import random
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import warm
from conftest import ROOT
from launching import ENV, finish, ranks
from PIL import Image

import evaluate
import sample
from fusedit import FuseDiTError, preset
from fusedit_lib import backend
from fusedit_lib.evaluation import drawing, figures
from fusedit_lib.pretrained import build_model, save_model
from fusedit_lib.shapes import scenes, tiny_gemma, training_text
from fusedit_lib.shapes.render import render
from fusedit_lib.shapes.scenes import CATEGORIES, COLOURS, SIZES


def command(*words):
    """Run a command of evaluate.py in this process."""
    args = evaluate.parse_args([str(word) for word in words])
    args.command(args)


def read_json(path):
    return json.loads(path.read_text())


def file_names(folder):
    """The paths of all files in a folder and below, relative to it."""
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


def contents(folder):
    """{path: bytes} of all files except run.json, which contains the speed."""
    names = file_names(folder)
    return {name: (folder / name).read_bytes() for name in names if Path(name).name != "run.json"}


def modification_times(folder):
    """{path: modification time} of GenEval's images."""
    return {p: p.stat().st_mtime_ns for p in folder.rglob("samples/0*.png")}


# ------------------------------------------------------------------------------ a perfect model

def complete(described, rng):
    """A full scene that matches a description; unmentioned attributes are random."""
    while True:
        background = described.background or rng.choice(list(COLOURS))
        groups = []
        for group in described.groups:
            size = group.size or rng.choice(list(SIZES))
            colour = group.colour or rng.choice(list(COLOURS))
            groups.append(group._replace(size=size, colour=colour))
        if background not in [group.colour for group in groups]:
            return described._replace(groups=tuple(groups), background=background)


def exact_generate(change, n):
    """A replacement for generate() that renders change(category, description) of each prompt."""
    rng = random.Random(0)
    expected = iter(scenes.evaluation_prompts(n))

    def generate(model, prompts, seeds, **settings):
        images = []
        for prompt in prompts:
            category, described, expected_prompt = next(expected)
            assert prompt == expected_prompt
            scene = complete(change(category, described), rng)
            images.append(render(scene, scenes.layout(scene, rng)))
        return images
    return generate


def score(monkeypatch, tmp_path, change, n=120):
    """The result of a model that draws change(category, description) for each prompt."""
    monkeypatch.setattr(drawing, "generate", exact_generate(change, n))
    command("shapes", "-n", n, "--out", tmp_path, "--device", "cpu")
    return read_json(tmp_path / "guidance-3-steps-25/shapes.json")


def unchanged(category, described):
    return described


def test_a_perfect_model_scores_one(monkeypatch, tmp_path, capsys):
    result = score(monkeypatch, tmp_path, unchanged)
    assert result["overall"] == 1
    assert result["categories"] == dict.fromkeys(CATEGORIES, 1)
    assert len(result["prompts"]) == 120
    assert result["settings"]["seed"] == 0
    table = capsys.readouterr().out
    assert all(category in table for category in CATEGORIES)
    assert "20 prompts" in table
    assert Image.open(tmp_path / "guidance-3-steps-25/shapes.png").size == (
        10 * figures.CELL, 6 * (figures.CELL + figures.LABEL))
    low, high = result["intervals"]["overall"]
    assert 0.95 < low < high == 1


def swap_colours(category, described):
    """Swap the colours of two objects."""
    if len(described.groups) != 2:
        return described
    a, b = described.groups
    groups = (a._replace(colour=b.colour), b._replace(colour=a.colour))
    return described._replace(groups=groups)


def wrong_count(category, described):
    """Add one object or, if there are four, remove one."""
    group = described.groups[0]
    if group.count == 1:
        return described
    count = group.count + 1
    if group.count == 4:
        count = 3
    return described._replace(groups=(group._replace(count=count),))


def opposite_relation(category, described):
    return described._replace(relation=scenes.OPPOSITE.get(described.relation))


@pytest.mark.parametrize("change, fails", [
    (swap_colours, "attribution"), (wrong_count, "counting"), (opposite_relation, "position")])
def test_each_mistake_lowers_only_its_category(monkeypatch, tmp_path, change, fails):
    result = score(monkeypatch, tmp_path, change)
    scores = result["categories"]
    assert scores[fails] < 0.5, scores
    unaffected = set(CATEGORIES) - {fails}
    if fails == "attribution":
        unaffected -= {"position"}          # half of its prompts name colours
    assert all(scores[category] == 1 for category in unaffected), scores
    assert result["overall"] == pytest.approx(sum(scores.values()) / 6)
    wrong = [row for row in result["prompts"] if not row["right"]]
    assert wrong
    assert all(row["why"] for row in wrong)


def test_a_model_that_ignores_the_prompt_scores_almost_nothing(monkeypatch, tmp_path):
    others = [described for _, described, _ in scenes.evaluation_prompts(600, 7)]
    rng = random.Random(3)
    result = score(monkeypatch, tmp_path, lambda category, described: rng.choice(others))
    assert result["overall"] < 0.15


def test_prompts_are_fixed_balanced_and_held_out():
    prompts = scenes.evaluation_prompts(600)
    assert prompts == scenes.evaluation_prompts(600)
    assert prompts != scenes.evaluation_prompts(600, 1)
    assert prompts[:60] == scenes.evaluation_prompts(60)
    by_category = {}
    for category in CATEGORIES:
        described = [d for c, d, _ in prompts if c == category]
        by_category[category] = described
        assert len(described) == 100
        assert len({prompt for c, _, prompt in prompts if c == category}) > 40
        rng = random.Random(0)
        if category != "single object":     # held out, regardless of unmentioned attributes
            assert all(scenes.is_held_out(complete(d, rng)) for d in described), category

    groups = {category: [group for d in by_category[category] for group in d.groups]
              for category in CATEGORIES}
    for category in CATEGORIES:
        if category != "counting":
            assert all(group.count == 1 for group in groups[category])
    assert {d.groups[0].count for d in by_category["counting"]} == {2, 3, 4}
    assert {d.relation for d in by_category["position"]} == set(scenes.RELATIONS)
    assert all(group.colour for group in groups["attribution"] + groups["colours"])
    assert not any(group.colour for group in groups["two objects"] + groups["single object"])


# ------------------------------------------------------------------------------ a real model

@pytest.fixture(scope="session")
def untrained(tmp_path_factory):
    """The folder of an untrained model of the demo's shape whose images are not empty."""
    folder = tmp_path_factory.mktemp("untrained")
    words = training_text.vocabulary()
    tiny_gemma.save(tiny_gemma.build(len(words)), words, folder / "gemma")
    config = preset("demo", base=str(folder / "gemma"))
    torch.manual_seed(0)
    dit = build_model(config).dit.state_dict()
    # Training starts with a last layer of zeros, which would draw nothing.
    zeros = [name for name in dit if dit[name].abs().max() == 0]
    assert zeros
    for name in zeros:
        torch.nn.init.normal_(dit[name], std=0.05)
    save_model(folder / "model", config, dit)
    return folder / "model"


def test_an_untrained_model_end_to_end(untrained, tmp_path):
    results = []
    for name in ("a", "b"):
        command("shapes", "--model", untrained, "-n", 8, "--steps", 2, "--batch-size", 3,
                "--device", "cpu", "--out", tmp_path / name)
        result = read_json(tmp_path / name / "guidance-3-steps-2/shapes.json")
        assert result["settings"].pop("images_per_s") > 0
        results.append(result)
    a, b = results
    assert a == b
    assert a["overall"] <= 0.1
    assert len(a["prompts"]) == 8
    assert a["settings"]["guidance"] == 3.0               # the demo's own
    images = {f"images/{k:05}.png" for k in range(8)}
    assert file_names(tmp_path / "a" / "guidance-3-steps-2") == images | {
        "run.json", "shapes.json", "shapes.png"}
    assert len(list((tmp_path / "a").iterdir())) == 1


# ------------------------------------------------------------------------------ official layouts

# One prompt per tag, as GenEval's prompts/create_prompts.py writes them.
METADATA = [
    dict(tag="single_object", include=[{"class": "bench", "count": 1}],
         prompt="a photo of a bench"),
    dict(tag="two_object", include=[{"class": "clock", "count": 1}, {"class": "cup", "count": 1}],
         prompt="a photo of a clock and a cup"),
    dict(tag="counting", include=[{"class": "bird", "count": 3}], exclude=[
        {"class": "bird", "count": 4}], prompt="a photo of three birds"),
    dict(tag="colors", include=[{"class": "car", "count": 1, "color": "red"}],
         prompt="a photo of a red car"),
    dict(tag="position", include=[{"class": "dog", "count": 1}, {
        "class": "cat", "count": 1, "position": ["left of", 0]}],
        prompt="a photo of a cat left of a dog"),
    dict(tag="color_attr", include=[{"class": "cup", "count": 1, "color": "pink"}, {
        "class": "tie", "count": 1, "color": "blue"}],
        prompt="a photo of a pink cup and a blue tie")]


def write_metadata(tmp_path):
    path = tmp_path / "evaluation_metadata.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in METADATA))
    return path


def test_geneval_files_suit_the_official_scorer(tmp_path, capsys):
    """evaluation/evaluate_images.py of djghosh13/geneval uses the subfolders whose name isdigit(),
    applies json.load(), which accepts only one object, to their metadata.jsonl, and reads all files
    in samples/ whose names match \\d+\\.png; the README shows samples/0000.png."""
    prompts = write_metadata(tmp_path)
    command("geneval", "--prompts", prompts, "--out", tmp_path / "out", "--steps", 2)
    folder = tmp_path / "out/guidance-3-steps-2/images"
    expected = set()
    for k in range(6):
        expected.add(f"{k:05}/metadata.jsonl")
        expected |= {f"{k:05}/samples/{i:04}.png" for i in range(4)}
    assert file_names(folder) == expected

    for k, row in enumerate(METADATA):
        with open(folder / f"{k:05}" / "metadata.jsonl") as file:
            assert json.load(file) == row
        images = [Image.open(folder / f"{k:05}/samples/{i:04}.png") for i in range(4)]
        assert all(image.size == (32, 32) and image.mode == "RGB" for image in images)
        assert images[0].text["prompt"] == row["prompt"]
        assert len({image.tobytes() for image in images}) == 4
    assert "evaluate_images.py" in capsys.readouterr().out


def draw_by_sample_py(monkeypatch, prompt, seed, steps, out):
    monkeypatch.setattr(sys, "argv", ["sample.py", "--prompt", prompt, "--seed", str(seed),
                                      "--steps", str(steps), "--out", str(out)])
    sample.main()


def test_dpg_files_suit_the_official_scorer(tmp_path, monkeypatch):
    """dpg_bench/compute_dpg_bench.py of TencentQQGYLab/ELLA uses all files that os.listdir()
    returns. The part of a name before the first dot must be an item_id, the name of a prompt file.
    With --pic-num 4 it cuts squares of --resolution at (0,0), (1,0), (0,1) and (1,1)."""
    prompts = tmp_path / "prompts"
    prompts.mkdir()
    (prompts / "COCOval2014000000000042.txt").write_text("a large red circle\n")
    (prompts / "partiprompts0.txt").write_text("two small blue squares")
    command("dpg", "--prompts", prompts, "--out", tmp_path / "out", "--steps", 3)
    folder = tmp_path / "out/guidance-3-steps-3/images"
    assert file_names(folder) == {"COCOval2014000000000042.png", "partiprompts0.png"}

    grid = Image.open(folder / "partiprompts0.png")
    assert grid.size == (64, 64)
    assert grid.text["prompt"] == "two small blue squares"
    seeds = [int(seed) for seed in grid.text["seed"].split()]
    assert seeds == [drawing.image_seed(0, 1, i) for i in range(4)]
    for seed, corner in zip(seeds, [(0, 0), (32, 0), (0, 32), (32, 32)], strict=True):
        draw_by_sample_py(monkeypatch, "two small blue squares", seed, 3, tmp_path / "one")
        one = np.asarray(Image.open(tmp_path / f"one/two-small-blue-squares-{seed}.png"), int)
        x, y = corner
        quarter = np.asarray(grid.crop((x, y, x + 32, y + 32)), int)
        assert np.abs(one - quarter).max() <= 1


def test_mjhq_files_are_named_like_the_real_images(tmp_path):
    """meta_data.json of playgroundai/MJHQ-30K is {NAME: {"category", "prompt"}}. Its
    mjhq30k_imgs.zip contains CATEGORY/NAME.jpg in ten categories. clean-fid reads folders
    recursively."""
    categories = ("animals", "art", "fashion", "food", "indoor", "landscape", "logo", "people",
                  "plants", "vehicles")
    rows = {}
    expected = set()
    for k, category in enumerate(categories):
        rows[f"{k:032x}"] = dict(category=category, prompt=f"a large red circle {category}")
        expected.add(f"{category}/{k:032x}.jpg")
    (tmp_path / "meta_data.json").write_text(json.dumps(rows))
    command("mjhq", "--prompts", tmp_path / "meta_data.json", "--out", tmp_path / "out",
            "--steps", 1)
    folder = tmp_path / "out/guidance-3-steps-1/images"
    assert file_names(folder) == expected
    for name in expected:
        image = Image.open(folder / name)
        assert image.size == (32, 32)
        assert image.format == "JPEG"


@pytest.mark.parametrize("name, text, message", [
    ("mjhq", '{"a": {"category": "art", "prompt": null}}', "a has no category or prompt"),
    ("geneval", "", "no prompt"),
    ("geneval", '{"tag": "x"}\n', "line 1 has no tag or no prompt"),
    ("geneval", '{"tag": "x", "prompt": 7}', "line 1 has no tag or no prompt"),
    ("geneval", "[1]\n", "line 1 is not a JSON object"),
    ("dpg", "", "no prompt"),
    ("mjhq", "{", "not a JSON object"),
    ("mjhq", '{"a": {"category": "art"}}', "a has no category or prompt"),
    ("mjhq", '{"../a": {"category": "art", "prompt": "x"}}', "not a plain file name"),
    ("mjhq", '{"a": {"category": "..", "prompt": "x"}}', "not a plain file name")])
def test_wrong_prompt_files_are_refused(tmp_path, name, text, message):
    path = tmp_path / "prompts"
    if name == "dpg":
        path.mkdir()
    else:
        path.write_text(text)
    with pytest.raises(FuseDiTError, match=message):
        command(name, "--prompts", path, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------ the same images

SEEDS = [2968811710, 3831201730, 3964924996, 2858441268]     # NumPy guarantees these numbers


def run_geneval(untrained, tmp_path, out, *more, n=1, before=""):
    """Run `evaluate.py geneval` to completion, in n processes as torchrun starts them.

    before: code to run first in the process.
    """
    words = ["geneval", "--prompts", write_metadata(tmp_path), "--model", untrained,
             "--steps", 3, "--out", tmp_path / out, "--device", "cpu", *more]
    program = [ROOT / "evaluate.py", *words]
    if before:
        code = f"{before}\nimport evaluate\nfrom fusedit_lib import cli\ncli.run(evaluate.main, '')"
        program = ["-c", code, *words]
    if n > 1:
        return finish(ranks(program, n))
    return warm.run(program, ENV)


def test_batch_size_and_processes_do_not_change_the_images(untrained, tmp_path):
    # name -> batch size, processes
    runs = dict(b4=(4, 1), b7=(7, 1), b1=(1, 1), again=(4, 1), two=(4, 2))

    def draw(name):
        batch_size, n = runs[name]
        return run_geneval(untrained, tmp_path, name, "--batch-size", batch_size, n=n)
    with ThreadPoolExecutor(2) as pool:
        ends = list(pool.map(draw, runs))
    for done in ends:
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("next:") >= 1             # printed by the last to finish

    expected = contents(tmp_path / "b4")
    assert len(expected) == 30
    assert contents(tmp_path / "again") == expected
    assert contents(tmp_path / "two") == expected
    assert contents(tmp_path / "b7") == expected           # both have one prompt per batch
    single = contents(tmp_path / "b1")
    assert single.keys() == expected.keys()
    for name in expected:                   # in another batch, the last bit of sums may differ
        if name.endswith(".png"):
            a = np.asarray(Image.open(io.BytesIO(single[name])), int)
            b = np.asarray(Image.open(io.BytesIO(expected[name])), int)
            assert np.abs(a - b).max() <= 1


def test_image_seeds_are_distinct_and_never_change():
    places = [(seed, k, i) for seed in (0, 1, 2**32 - 1) for k in range(40) for i in range(4)]
    assert len({drawing.image_seed(*place) for place in places}) == len(places)
    some = [(0, 0, 0), (0, 0, 1), (0, 1, 0), (7, 552, 3)]
    assert [drawing.image_seed(*place) for place in some] == SEEDS


def test_processes_share_a_random_seed_and_later_ones_keep_it(untrained, tmp_path):
    done = run_geneval(untrained, tmp_path, "out", "--seed", -1, "--steps", 1, n=2)
    assert done.returncode == 0, done.stderr
    (path,) = (tmp_path / "out").glob("*/run.json")
    seed = read_json(path)["seed"]
    assert done.stderr.count(f"--seed -1: drew seed {seed}\n") == 1
    assert done.stderr.count(f"--seed -1: keeps seed {seed}\n") == 1
    seeds_of_images = set()
    for image in (tmp_path / "out").rglob("*.png"):
        seeds_of_images.add(int(Image.open(image).text["seed"]))
    assert seeds_of_images == {drawing.image_seed(seed, k, i) for k in range(6) for i in range(4)}
    assert drawing.shared_seed(tmp_path / "out") == seed
    assert drawing.image_seed(2**64 - 1, 3, 2) != drawing.image_seed(2**32 - 1, 3, 2)


def test_processes_divide_the_prompts_without_overlap(untrained, tmp_path, monkeypatch, capsys):
    words = ["geneval", "--prompts", write_metadata(tmp_path), "--model", untrained,
             "--steps", 1, "--batch-size", 4, "--device", "cpu", "--out", tmp_path / "out"]
    monkeypatch.setenv("WORLD_SIZE", "2")
    shares = []
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        before = modification_times(tmp_path)
        command(*words)
        now = modification_times(tmp_path)
        assert all(now[path] == age for path, age in before.items())
        shares.append({path.parts[-3] for path in now if path not in before})
        came_last = rank == "0"
        assert ("next:" in capsys.readouterr().out) == came_last
    assert shares == [{"00001", "00003", "00005"}, {"00000", "00002", "00004"}]


@pytest.mark.parametrize("batch_size, sizes", [(9, [8] * 3), (4, [4] * 6), (3, [3, 1] * 6)])
def test_a_batch_contains_whole_prompts_if_possible(untrained, tmp_path, monkeypatch, batch_size,
                                                  sizes):
    drawn = []

    def generate(model, prompts, seeds, **settings):
        drawn.append(len(prompts))
        return [Image.new("RGB", (4, 4)) for _ in prompts]
    monkeypatch.setattr(drawing, "generate", generate)
    command("geneval", "--prompts", write_metadata(tmp_path), "--model", untrained,
            "--batch-size", batch_size, "--device", "cpu", "--out", tmp_path / "out")
    assert drawn == sizes


# The process kills itself before its n-th operation that writes, renames or creates a file in OUT.
KILLS_ITSELF = """
import os, signal, sys
left = iter(range({n}))
def kill_at_n(event, args):
    if event in ("open", "os.rename", "os.mkdir") and {out!r} in str(args[0]) \\
            and (event != "open" or args[1] != "r") and next(left, None) is None:
        os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(kill_at_n)
"""


@pytest.mark.parametrize("kills", [4, pytest.param(6, marks=pytest.mark.slow)])
def test_repeated_kills_lose_and_repeat_nothing(untrained, tmp_path, kills):
    """Complete images are never drawn again, and half-written files are never used."""
    assert run_geneval(untrained, tmp_path, "whole").returncode == 0
    folder = tmp_path / "killed"
    rng = random.Random(kills)
    before = {}
    for _ in range(kills):
        # The four threads cause up to eight events before the first image has its name.
        kills_itself = KILLS_ITSELF.format(n=rng.randrange(12, 24), out=str(folder))
        done = run_geneval(untrained, tmp_path, "killed", before=kills_itself)
        assert done.returncode == -signal.SIGKILL
        now = modification_times(folder)
        assert all(now[path] == age for path, age in before.items())
        assert len(now) < 24
        before = now
    assert before
    half = next(folder.rglob("samples")) / ".0003.png.1.tmp"
    half.write_bytes(b"half")
    assert run_geneval(untrained, tmp_path, "killed").returncode == 0
    assert not half.exists()
    assert contents(folder) == contents(tmp_path / "whole")


@pytest.mark.parametrize("world", [1, 2])
def test_a_half_written_run_json_of_another_rank_is_left_alone(tmp_path, world):
    run = SimpleNamespace(out=tmp_path)
    half = tmp_path / ".run.json.1.tmp"
    half.write_bytes(b"half")
    drawing.prepare_folder(run, SimpleNamespace(texts={}), [], 0, world)
    assert half.exists() == (world == 2)


def test_other_settings_are_not_mixed(untrained, tmp_path, capsys):
    words = ["shapes", "-n", 2, "--steps", 1, "--device", "cpu", "--out", tmp_path, "--model"]
    folder = tmp_path / "guidance-3-steps-1"
    command(*words, untrained)
    age = (folder / "images/00001.png").stat().st_mtime_ns
    (folder / "images/00000.png").unlink()
    command(*words, untrained, "--batch-size", 7)          # may resume with another batch size
    assert (folder / "images/00001.png").stat().st_mtime_ns == age

    other_dtype = "bf16"                    # not the one that auto has chosen
    if backend.native_bf16(torch.device("cpu")):
        other_dtype = "float32"
    for more in (["--seed", 1], ["-n", 3], ["--dtype", other_dtype]):
        with pytest.raises(FuseDiTError, match="with other settings .*choose a different --out"):
            command(*words, untrained, *more)
    with pytest.raises(FuseDiTError, match="weights"):
        command(*words, ROOT / "demo", "--guidance", 3)
    (folder / "run.json").unlink()
    with pytest.raises(FuseDiTError, match="not empty"):
        command(*words, untrained)


def test_a_sweep_with_its_figure(untrained, tmp_path):
    command("shapes", "-n", 6, "--guidance", "1,2.5", "--steps", "1,2", "--model", untrained,
            "--out", tmp_path, "--device", "cpu")
    results = {p.parent.name: read_json(p) for p in tmp_path.rglob("shapes.json")}
    assert results.keys() == {"guidance-1-steps-1", "guidance-1-steps-2", "guidance-2.5-steps-1",
                              "guidance-2.5-steps-2"}
    assert results["guidance-2.5-steps-1"]["settings"]["guidance"] == 2.5
    figure = Image.open(tmp_path / "sweep-guidance-1-2.5-steps-1-2.png")
    assert figure.width > 1000              # two charts
    one, other = tmp_path.glob("guidance-*-steps-2/images/00000.png")
    assert one.read_bytes() != other.read_bytes()


def test_ground_truth_and_errors_as_a_user_sees_them(tmp_path):
    done = warm.run([ROOT / "evaluate.py", "shapes", "--ground-truth", "-n", "60"])
    assert done.returncode == 0
    assert "60 of 60 ground-truth renders detected correctly (100.00%)" in done.stdout
    done = warm.run([ROOT / "evaluate.py", "shapes", "--model", tmp_path / "none", "--out",
                     tmp_path / "out"])
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "none" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()
