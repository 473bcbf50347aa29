"""evaluate.py: what a perfect, a wrong and an untrained model score, and what is written."""
import io
import json
import random
import signal
import sys
from concurrent.futures import ThreadPoolExecutor

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
from fusedit_lib.evaluation import drawing, drawing, figures, results
from fusedit_lib.shapes import scenes, tiny_gemma
from fusedit_lib.shapes.render import render
from fusedit_lib.shapes.scenes import CATEGORIES, COLOURS, SIZES


def complete(said, rng):
    """A full scene of which `said` may be said: what it leaves open, drawn at random."""
    while True:
        ground = said.background or rng.choice(list(COLOURS))
        groups = tuple(g._replace(size=g.size or rng.choice(list(SIZES)),
                                  colour=g.colour or rng.choice(list(COLOURS)))
                       for g in said.groups)
        if ground not in [g.colour for g in groups]:
            return said._replace(groups=groups, background=ground)


def draw_with(change):
    """A stand-in for the model: draws change(what is said) of every prompt, exactly."""
    def draw(jobs, model, vae, size, args, *_, quiet):
        rng = random.Random(0)
        wanted = scenes.evaluation_prompts(args.n, args.seed)
        said = [job for part in jobs for job in part]
        assert [prompt for prompt, _ in said] == [p for *_, p in wanted]
        for (category, scene, _), (prompt, seed) in zip(wanted, said, strict=True):
            scene = complete(change(category, scene), rng)
            yield prompt, seed, render(scene, scenes.layout(scene, rng)), []
    return draw


def command(*words):
    args = evaluate.arguments([str(word) for word in words])
    args.command(args)


def score(monkeypatch, tmp_path, change, n=120):
    monkeypatch.setattr(drawing, "draw", draw_with(change))
    command("shapes", "-n", n, "--out", tmp_path, "--device", "cpu")
    return json.loads((tmp_path / "guidance-3-steps-25/shapes.json").read_text())


def test_a_perfect_model_scores_one(monkeypatch, tmp_path, capsys):
    result = score(monkeypatch, tmp_path, lambda _, said: said)
    assert result["overall"] == 1 and result["categories"] == dict.fromkeys(CATEGORIES, 1)
    assert len(result["prompts"]) == 120 and result["settings"]["seed"] == 0
    table = capsys.readouterr().out
    assert all(category in table for category in CATEGORIES) and "20 prompts" in table
    assert Image.open(tmp_path / "guidance-3-steps-25/shapes.png").size == (
        10 * figures.CELL, 6 * (figures.CELL + results.LABEL))
    low, high = result["intervals"]["overall"]
    assert 0.95 < low < high == 1


def swap_colours(_, said):
    """Of two objects in two colours, each gets the other's; the rest as said."""
    if len(said.groups) == 2:
        a, b = said.groups
        said = said._replace(groups=(a._replace(colour=b.colour), b._replace(colour=a.colour)))
    return said


def one_more(_, said):
    g = said.groups[0]
    if g.count == 1:
        return said
    return said._replace(groups=(g._replace(count=g.count + 1 if g.count < 4 else 3),))


def turn(_, said):
    return said._replace(relation=scenes.OPPOSITE.get(said.relation))


@pytest.mark.parametrize("change, fails", [(swap_colours, "attribution"), (one_more, "counting"),
                                           (turn, "position")])
def test_each_mistake_costs_its_category(monkeypatch, tmp_path, change, fails):
    result = score(monkeypatch, tmp_path, change)
    scores = result["categories"]
    assert scores[fails] < 0.5, scores
    others = [c for c in CATEGORIES if c != fails and (fails, c) != ("attribution", "position")]
    assert all(scores[c] == 1 for c in others), scores
    assert result["overall"] == pytest.approx(sum(scores.values()) / 6)
    wrong = [p for p in result["prompts"] if not p["right"]]
    assert wrong and all(p["why"] for p in wrong)


def test_a_model_that_ignores_the_prompt_scores_almost_nothing(monkeypatch, tmp_path):
    other = [said for _, said, _ in scenes.evaluation_prompts(600, 7)]
    rng = random.Random(3)
    result = score(monkeypatch, tmp_path, lambda *_: rng.choice(other))
    assert result["overall"] < 0.15


def test_the_prompts_are_fixed_even_and_held_out():
    prompts = scenes.evaluation_prompts(600)
    assert prompts == scenes.evaluation_prompts(600) != scenes.evaluation_prompts(600, 1)
    assert prompts[:60] == scenes.evaluation_prompts(60)
    for category in CATEGORIES:
        said = [s for c, s, _ in prompts if c == category]
        assert len(said) == 100
        assert len({p for c, _, p in prompts if c == category}) > 40
        rng = random.Random(0)
        if category != "single object":     # whatever is not said, it is held out
            assert all(scenes.is_held_out(complete(s, rng)) for s in said), category
    by = {c: [s for k, s, _ in prompts if k == c] for c in CATEGORIES}
    assert all(g.count == 1 for c in CATEGORIES if c != "counting" for s in by[c] for g in s.groups)
    assert {s.groups[0].count for s in by["counting"]} == {2, 3, 4}
    assert {s.relation for s in by["position"]} == set(scenes.RELATIONS)
    assert all(g.colour for s in by["attribution"] + by["colours"] for g in s.groups)
    assert not any(g.colour for s in by["two objects"] + by["single object"] for g in s.groups)


@pytest.fixture(scope="session")
def untrained(tmp_path_factory):
    """A model of the demo's shape that paints something of every prompt."""
    from fusedit_lib.pretrained import build_model, save_model
    folder, words = tmp_path_factory.mktemp("untrained"), tiny_gemma.vocabulary()
    tiny_gemma.save(tiny_gemma.build(len(words)), words, folder / "gemma")
    config = preset("demo", base=str(folder / "gemma"))
    torch.manual_seed(0)
    dit = build_model(config).dit.state_dict()
    last = [k for k in dit if dit[k].abs().max() == 0]     # zero as trainings begin: no picture
    assert last
    for name in last:
        torch.nn.init.normal_(dit[name], std=0.05)
    save_model(folder / "model", config, dit)
    return folder / "model"


def test_an_untrained_model_end_to_end(untrained, tmp_path):
    words = ["shapes", "--model", untrained, "-n", 8, "--steps", 2, "--batch-size", 3, "--device",
             "cpu", "--out"]
    for out in ("a", "b"):
        command(*words, tmp_path / out)
    a, b = (json.loads((tmp_path / out / "guidance-3-steps-2/shapes.json").read_text())
            for out in "ab")
    assert a["settings"].pop("images_per_s") > 0 and b["settings"].pop("images_per_s") > 0
    assert a == b and a["overall"] <= 0.1 and len(a["prompts"]) == 8
    assert a["settings"]["guidance"] == 3.0               # the demo's own
    assert names(tmp_path / "a") == {f"guidance-3-steps-2/{name}" for name in (
        "run.json", "shapes.json", "shapes.png", *(f"images/{k:05}.png" for k in range(8)))}


def names(folder):
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


def contents(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*.*")
            if p.is_file() and p.name != "run.json"}


# ------------------------------------------------------------------------------ official layouts

# Of GenEval's prompts/create_prompts.py, which makes evaluation_metadata.jsonl: one a tag.
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


def metadata(tmp_path):
    path = tmp_path / "evaluation_metadata.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in METADATA))
    return path


def test_geneval_as_its_scorer_reads_it(tmp_path, capsys):
    """evaluation/evaluate_images.py of djghosh13/geneval: of the folder's entries it takes the
    folders whose name isdigit(), json.load()s metadata.jsonl there, which takes one object only,
    and reads all of samples/ whose name matches \\d+\\.png; the README has samples/0000.png."""
    command("geneval", "--prompts", metadata(tmp_path), "--out", tmp_path / "out", "--steps", 2)
    folder = tmp_path / "out/guidance-3-steps-2/images"
    assert names(folder) == {f"{k:05}/{name}" for k in range(6) for name in (
        "metadata.jsonl", *(f"samples/{i:04}.png" for i in range(4)))}
    for k, row in enumerate(METADATA):
        with open(folder / f"{k:05}" / "metadata.jsonl") as file:
            assert json.load(file) == row
        pictures = [Image.open(folder / f"{k:05}/samples/{i:04}.png") for i in range(4)]
        assert all(p.size == (32, 32) and p.mode == "RGB" for p in pictures)
        assert pictures[0].text["prompt"] == row["prompt"]
        assert len({p.tobytes() for p in pictures}) == 4
    assert "evaluate_images.py" in capsys.readouterr().out


def test_dpg_as_its_scorer_reads_it(tmp_path, monkeypatch):
    """dpg_bench/compute_dpg_bench.py of TencentQQGYLab/ELLA: takes all that os.listdir() gives, up
    to the first dot it must be an item_id, which are the names of the prompt files; cuts squares of
    --resolution at (0,0), (1,0), (0,1), (1,1) for --pic-num 4."""
    prompts = tmp_path / "prompts"
    prompts.mkdir()
    (prompts / "COCOval2014000000000042.txt").write_text("a large red circle\n")
    (prompts / "partiprompts0.txt").write_text("two small blue squares")
    command("dpg", "--prompts", prompts, "--out", tmp_path / "out", "--steps", 3)
    folder = tmp_path / "out/guidance-3-steps-3/images"
    assert names(folder) == {"COCOval2014000000000042.png", "partiprompts0.png"}
    grid = Image.open(folder / "partiprompts0.png")
    assert grid.size == (64, 64) and grid.text["prompt"] == "two small blue squares"
    seeds = grid.text["seed"].split()
    assert [int(s) for s in seeds] == [drawing.picture_seed(0, 1, i) for i in range(4)]
    for seed, place in zip(seeds, [(0, 0), (1, 0), (0, 1), (1, 1)], strict=True):
        monkeypatch.setattr(sys, "argv", [
            "sample.py", "--prompt", "two small blue squares", "--seed", seed, "--steps", "3",
            "--out", str(tmp_path / "one")])
        sample.main()
        x, y = place[0] * 32, place[1] * 32
        one = np.asarray(Image.open(tmp_path / f"one/two-small-blue-squares-{seed}.png"), int)
        assert np.abs(one - np.asarray(grid.crop((x, y, x + 32, y + 32)), int)).max() <= 1


def test_mjhq_as_its_pictures_lie(tmp_path):
    """meta_data.json of playgroundai/MJHQ-30K, {NAME: {"category", "prompt"}}; its mjhq30k_imgs.zip
    holds CATEGORY/NAME.jpg, ten categories; clean-fid reads folders recursively."""
    rows = {f"{k:032x}": dict(category=c, prompt=f"a large red circle {c}") for k, c in enumerate((
        "animals", "art", "fashion", "food", "indoor", "landscape", "logo", "people", "plants",
        "vehicles"))}
    (tmp_path / "meta_data.json").write_text(json.dumps(rows))
    command("mjhq", "--prompts", tmp_path / "meta_data.json", "--out", tmp_path / "out", "--steps",
            1)
    folder = tmp_path / "out/guidance-3-steps-1/images"
    assert names(folder) == {f"{row['category']}/{name}.jpg" for name, row in rows.items()}
    assert all(Image.open(p).size == (32, 32) and Image.open(p).format == "JPEG"
               for p in folder.rglob("*.jpg"))


@pytest.mark.parametrize("name, text, says", [
    ("mjhq", '{"a": {"category": "art", "prompt": null}}', "a has no category or prompt"),
    ("geneval", "", "no prompt"), ("geneval", '{"tag": "x"}\n', "line 1 has no tag or no prompt"),
    ("geneval", '{"tag": "x", "prompt": 7}', "line 1 has no tag or no prompt"),
    ("geneval", "[1]\n", "line 1 is no JSON"), ("dpg", "", "no prompt"), ("mjhq", "{", "no JSON"),
    ("mjhq", '{"a": {"category": "art"}}', "a has no category or prompt"),
    ("mjhq", '{"../a": {"category": "art", "prompt": "x"}}', "no plain name"),
    ("mjhq", '{"a": {"category": "..", "prompt": "x"}}', "no plain name")])
def test_prompts_that_are_none(tmp_path, name, text, says):
    path = tmp_path / "prompts"
    path.mkdir() if name == "dpg" else path.write_text(text)
    with pytest.raises(FuseDiTError, match=says):
        command(name, "--prompts", path, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------ the same pictures

SEEDS = [2968811710, 3831201730, 3964924996, 2858441268]     # NumPy promises not to change them


def process(untrained, tmp_path, out, *more, n=1, before=""):
    """`evaluate.py geneval` to its end, in n processes as torchrun starts them.

    before: code that runs in it first.
    """
    words = ["geneval", "--prompts", metadata(tmp_path), "--model", untrained, "--steps", 3,
             "--out", tmp_path / out, "--device", "cpu", *more]
    code = f"{before}\nimport evaluate\nfrom fusedit_lib import cli\ncli.run(evaluate.main, '')"
    program = ["-c", code]
    program = [*program, *words] if before else [ROOT / "evaluate.py", *words]
    return finish(ranks(program, n)) if n > 1 else warm.run(program, ENV)


def test_any_batch_and_number_of_processes_draw_the_same(untrained, tmp_path):
    runs = dict(b4=(4, 1), b7=(7, 1), b1=(1, 1), again=(4, 1), two=(4, 2))
    with ThreadPoolExecutor(2) as pool:
        ends = list(pool.map(lambda out: process(
            untrained, tmp_path, out, "--batch-size", runs[out][0], n=runs[out][1]), runs))
    for done in ends:
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("next:") >= 1             # whoever ends last says it
    want = contents(tmp_path / "b4")
    assert len(want) == 30
    assert contents(tmp_path / "again") == want == contents(tmp_path / "two")
    assert contents(tmp_path / "b7") == want               # 7 holds one prompt's four, as 4 does
    one = contents(tmp_path / "b1")
    assert one.keys() == want.keys()
    for name in want:                                      # sums of another batch: the last bit
        if name.endswith(".png"):
            a, b = (np.asarray(Image.open(io.BytesIO(x[name])), int) for x in (one, want))
            assert np.abs(a - b).max() <= 1


def test_seeds_are_of_their_place_and_stay_what_they_are():
    places = [(seed, k, i) for seed in (0, 1, 2**32 - 1) for k in range(40) for i in range(4)]
    assert len({drawing.picture_seed(*place) for place in places}) == len(places)
    some = (0, 0, 0), (0, 0, 1), (0, 1, 0), (7, 552, 3)
    assert [drawing.picture_seed(*place) for place in some] == SEEDS


def test_processes_share_without_overlap(untrained, tmp_path, monkeypatch, capsys):
    words = ["geneval", "--prompts", metadata(tmp_path), "--model", untrained, "--steps", 1,
             "--batch-size", 4, "--device", "cpu", "--out", tmp_path / "out"]
    folder = tmp_path / "out/guidance-3-steps-1/images"
    monkeypatch.setenv("WORLD_SIZE", "2")
    shares = []
    for rank in "10":
        monkeypatch.setenv("RANK", rank)
        before = {p: p.stat().st_mtime_ns for p in folder.rglob("samples/*")}
        command(*words)
        assert all(p.stat().st_mtime_ns == age for p, age in before.items())
        shares.append({p.parts[-3] for p in folder.rglob("samples/*") if p not in before})
        assert ("next:" in capsys.readouterr().out) == (rank == "0")       # it came last
    assert shares == [{"00001", "00003", "00005"}, {"00000", "00002", "00004"}]


@pytest.mark.parametrize("batch, sizes", [(9, [8, 8, 8]), (4, [4] * 6), (3, [3, 1] * 6)])
def test_a_batch_is_of_whole_prompts_where_it_can(untrained, tmp_path, monkeypatch, batch, sizes):
    drawn = []

    def draw(jobs, *_, **__):
        drawn.extend(map(len, jobs))
        yield from ((prompt, seed, Image.new("RGB", (4, 4)), []) for part in jobs
                    for prompt, seed in part)
    monkeypatch.setattr(drawing, "draw", draw)
    command("geneval", "--prompts", metadata(tmp_path), "--model", untrained, "--batch-size", batch,
            "--device", "cpu", "--out", tmp_path / "out")
    assert drawn == sizes


# The process kills itself before its n-th step that a crash could leave half done.
DIES = """
import os, signal, sys
left = iter(range({n}))
def dies(event, args):
    if event in ("open", "os.rename", "os.mkdir") and {out!r} in str(args[0]) \\
            and (event != "open" or args[1] != "r") and next(left, None) is None:
        os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(dies)
"""


@pytest.mark.parametrize("kills", [4, pytest.param(6, marks=pytest.mark.slow)])
def test_killed_again_and_again(untrained, tmp_path, kills):
    """At moments of all kinds; nothing whole is drawn again, nothing half done counts."""
    assert process(untrained, tmp_path, "whole").returncode == 0
    rng, ages, folder = random.Random(kills), {}, tmp_path / "killed"
    for _ in range(kills):
        dies = DIES.format(n=rng.randrange(8, 20), out=str(folder))
        assert process(untrained, tmp_path, "killed", before=dies).returncode == -signal.SIGKILL
        now = {p: p.stat().st_mtime_ns for p in folder.rglob("samples/0*.png")}
        assert all(now[p] == age for p, age in ages.items()) and len(now) < 24     # none again
        ages = now
    assert ages
    half = next(folder.rglob("samples")) / ".0003.png.1.tmp"
    half.write_bytes(b"half")
    assert process(untrained, tmp_path, "killed").returncode == 0 and not half.exists()
    assert contents(folder) == contents(tmp_path / "whole")


def test_other_settings_are_not_mixed(untrained, tmp_path, capsys):
    words = ["shapes", "-n", 2, "--steps", 1, "--device", "cpu", "--out", tmp_path, "--model"]
    command(*words, untrained)
    before = (next(tmp_path.rglob("00001.png"))).stat().st_mtime_ns
    (next(tmp_path.rglob("00000.png"))).unlink()
    command(*words, untrained, "--batch-size", 7)          # another batch may go on
    assert (next(tmp_path.rglob("00001.png"))).stat().st_mtime_ns == before
    other = "float32" if backend.native_bf16(torch.device("cpu")) else "bf16"     # than auto
    for more in (["--seed", 1], ["-n", 3], ["--dtype", other]):
        with pytest.raises(FuseDiTError, match="drawn otherwise .*give another --out"):
            command(*words, untrained, *more)
    with pytest.raises(FuseDiTError, match="weights"):
        command(*words, ROOT / "demo", "--guidance", 3)
    (tmp_path / "guidance-3-steps-1" / "run.json").unlink()
    with pytest.raises(FuseDiTError, match="not empty"):
        command(*words, untrained)


def test_a_sweep_with_its_figure(untrained, tmp_path, capsys):
    command("shapes", "-n", 6, "--guidance", "1,2.5", "--steps", "1,2", "--model", untrained,
            "--out", tmp_path, "--device", "cpu")
    results = {p.parent.name: json.loads(p.read_text()) for p in tmp_path.rglob("shapes.json")}
    assert results.keys() == {f"guidance-{g}-steps-{s}" for g in ("1", "2.5") for s in "12"}
    assert results["guidance-2.5-steps-1"]["settings"]["guidance"] == 2.5
    assert Image.open(tmp_path / "sweep-guidance-1-2.5-steps-1-2.png").width > 1000    # two panels
    one, other = (p.read_bytes() for p in tmp_path.glob("guidance-*-steps-2/images/00000.png"))
    assert one != other


def test_ground_truth_and_errors_as_a_user_sees_them(tmp_path):
    def command(*words):
        return warm.run([ROOT / "evaluate.py", "shapes", *words])
    done = command("--ground-truth", "-n", "60")
    assert done.returncode == 0
    assert "60 of 60 ground-truth renders read back right (100.00%)" in done.stdout
    done = command("--model", str(tmp_path / "none"), "--out", str(tmp_path / "out"))
    assert done.returncode == 1 and "Traceback" not in done.stderr and "none" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1 and not (tmp_path / "out").exists()
