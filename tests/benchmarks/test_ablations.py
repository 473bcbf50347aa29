"""benchmarks/ablations.py: the points, what makes runs fair, a tiny experiment, the statistics."""
import contextlib
import json
import os
import random
import re
import signal
import sys
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import warm
from conftest import ROOT
from launching import ENV, read_until

import fusedit
from fusedit import PRESETS, FuseDiTConfig, FuseDiTError, GemmaConfig
from fusedit_lib.data.shapes import captioned_scene
from fusedit_lib.pretrained import load_model
from fusedit_lib.sampling import generate
from fusedit_lib.shapes import scenes
from fusedit_lib.shapes.training_text import split_words, vocabulary
from fusedit_lib.train.schedule import learning_rate

sys.path.insert(0, str(ROOT / "benchmarks"))
import ablation_points
import ablation_readers
import ablation_report
import ablation_training
import ablations
from ablation_points import FOUR_BLOCKS, POINTS, SHALLOW, Point
from ablation_training import Execution, Settings

CPU = torch.device("cpu")
SETTINGS = Settings(images=64, batch=8, distinct=40, prompts=12, dtype="float32",
                    reader_steps=2)
TINY = ["--images", "32", "--batch", "16", "--distinct", "20", "--prompts", "6", "--no-compile",
        "--reader-steps", "2", "--dtype", "float32", "--device", "cpu"]
POINTS_OF_EXPERIMENT = "baseline", "reader-captions"
GEMMA = GemmaConfig.from_dict(json.loads((ROOT / "demo/gemma/config.json").read_text()))


# ---- the points ----------------------------------------------------------------------------------

def test_the_baseline_is_the_papers_at_the_size_of_the_demo():
    config = ablation_points.config_of(POINTS["baseline"], "demo/gemma")
    for name, value in vars(FuseDiTConfig()).items():
        assert getattr(config, name) == (ablation_points.WORLD | {"base": "demo/gemma"}).get(
            name, value)
    demo = PRESETS["demo"]
    assert ablation_points.WORLD.items() < demo.items()


def test_the_axes_of_the_paper_and_the_later_readers_are_there():
    changes = [point.changes for point in POINTS.values()]
    for value in ("1d-rope", "2d-rope", "m-rope"):
        assert {"pos_embed": value} in changes
    for value in ("adaln-single", "addition", None):
        assert {"timestep_conditioning": value} in changes
    assert {"fusion": "shallow", "attention": "cross"} in changes
    later = [POINTS["penultimate"].changes.get("text_states", "layer")]
    for name in ("uniform", "static", "depth", "time", "joint"):
        assert POINTS[name].changes == SHALLOW | {"text_states": name}
        later.append(POINTS[name].changes["text_states"])
    assert len(set(later)) == 6
    final = {name: value for name, value in PRESETS["fusedit"].items() if name != "base"}
    assert POINTS["final"].changes == final
    assert {point.reader for point in POINTS.values()} == ablation_readers.READERS.keys()


def test_equal_width_and_depth_but_for_what_a_point_is_about():
    baseline = ablation_points.config_of(POINTS["baseline"], "-")
    for name, point in POINTS.items():
        if not point.control:
            assert "dit_hidden_size" not in point.changes, name
        blocks = point.changes.get("dit_num_hidden_layers", 8)
        assert blocks == (4 if name.startswith("layers-") else 8)
        assert blocks + point.changes.get("initial_layers", 0) <= GEMMA.num_hidden_layers
    assert baseline.dit_hidden_size == 256


def test_controls_have_the_parameters_of_their_point():
    controls = {name: point for name, point in POINTS.items() if point.control}
    assert len(controls) == 4
    for name, point in controls.items():
        own = ablation_points.count_parameters(point)
        wanted = ablation_points.count_parameters(POINTS[point.control])
        assert own == pytest.approx(wanted, rel=0.005), name
        narrow = POINTS[name.removesuffix("-wide")]
        assert narrow.changes == {key: value for key, value in point.changes.items()
                                  if key != "dit_hidden_size"}
        assert ablation_points.count_parameters(narrow) < 0.7 * wanted


def test_points_that_are_misspelt_are_refused(monkeypatch):
    assert list(ablation_points.choose(["final", "baseline"])) == ["final", "baseline"]
    assert ablation_points.choose() == POINTS
    monkeypatch.setitem(POINTS, "new", Point({"pos_embeds": "ape"}))
    with pytest.raises(FuseDiTError, match="unknown config field 'pos_embeds'; did you mean pos_e"):
        ablation_points.choose(["new"])
    with pytest.raises(FuseDiTError, match="did you mean deep-cross or shallow-cross"):
        ablation_points.choose(["cross"])
    monkeypatch.setitem(POINTS, "new", Point({}, reader="caption"))
    with pytest.raises(FuseDiTError, match="unknown reader 'caption'; did you mean captions"):
        ablation_points.choose(["new"])


def test_families_are_those_of_fusion_and_time_conditioning():
    assert ablation_points.family(POINTS["2d-rope"]) == "deep, adaln-zero"
    assert ablation_points.family(POINTS["final"]) == "deep, none"
    assert ablation_points.family(POINTS["joint"]) == "shallow, adaln-zero"
    assert ablation_points.family(POINTS["addition-wide"]) == "deep, addition"


# ---- the readers ---------------------------------------------------------------------------------

def test_the_text_of_the_readers():
    words = vocabulary()
    ids = {word: i for i, word in enumerate(words)}
    texts = {}
    for reader in ("captions", "twice"):
        batch, _ = next(ablation_readers.reader_batches(reader, random.Random(3), ids))
        rows = [[words[token] for token in row if token] for row in batch.tolist()]
        assert len(rows) == 64
        assert all(row[0] == "<bos>" and row[-1] == "<eos>" for row in rows)
        texts[reader] = [row[1:-1] for row in rows]
    assert all(row.count(".") == 1 and row[-1] == "." for row in texts["captions"])
    for row in texts["twice"]:
        half = len(row) // 2
        assert row[:half] == row[half:] and row[half - 1] == "."
    assert len({tuple(row) for row in texts["captions"]}) > 50


def test_a_word_that_no_reader_knows_is_named(monkeypatch):
    readers = ablation_readers.READERS
    monkeypatch.setitem(readers, "polite", lambda caption, rng: ["please", caption])
    ids = {word: i for i, word in enumerate(vocabulary())}
    with pytest.raises(FuseDiTError, match="reader 'polite': 'please' is not in the vocabulary"):
        next(ablation_readers.reader_batches("polite", random.Random(3), ids))


# ---- data, order and noise -----------------------------------------------------------------------

@pytest.fixture(scope="module")
def model():
    return ablation_training.new_model(POINTS["baseline"], ablation_readers.BUNDLED, "float32", 0,
                                       CPU)


@pytest.fixture(scope="module")
def some_scenes(model):
    return ablation_training.make_scenes(40, model, CPU)


def test_the_scenes_are_those_of_prepare_data(some_scenes, model):
    assert some_scenes.pixels.shape == (40, 3, 32, 32)
    words = model.tokenizer.convert_ids_to_tokens(range(len(vocabulary())))
    assert words == vocabulary()            # the readers share one tokenizer
    for i in (0, 39):
        scene = captioned_scene(0, 32, i)
        assert np.array_equal(some_scenes.pixels[i].movedim(0, 2).numpy(), np.asarray(scene.image))
        for row, caption in zip(some_scenes.captions[i].tolist(), scene.captions, strict=True):
            tokens = some_scenes.ids[row][some_scenes.mask[row]].tolist()
            assert [words[token] for token in tokens] == ["<bos>", *split_words(caption)]
    assert some_scenes.mask[0].sum() == 1   # the empty caption
    assert len(some_scenes.ids.unique(dim=0)) == len(some_scenes.ids)


ENDLESS_RENDERING = """
import signal, sys, time
sys.path.insert(0, "benchmarks")
import ablation_training

def render_chunk(image_size, numbers):
    signal.signal(signal.SIGINT, signal.SIG_IGN)       # like a worker that is stuck
    print("rendering", flush=True)
    time.sleep(1000)

ablation_training.render_chunk = render_chunk
ablation_training.render_scenes(500, 32)            # one chunk, for one worker
"""


def test_ctrl_c_ends_the_rendering():
    process = warm.start(["-c", ENDLESS_RENDERING], ENV, ROOT)
    try:
        read_until(process, "rendering")
        os.killpg(process.pid, signal.SIGINT)              # as a terminal does
        assert process.wait(timeout=200) != 0
    finally:
        process.kill()


def test_the_order_is_of_whole_passes(some_scenes):
    order = ablation_training.draw_order(some_scenes, 100, seed=5)
    assert Counter(order.scenes[:40].tolist()) == Counter(range(40))
    assert Counter(order.scenes[40:80].tolist()) == Counter(range(40))
    assert not torch.equal(order.scenes[:40], order.scenes[40:80])
    own = some_scenes.captions[order.scenes]
    is_own = (own == order.captions[:, None]).any(1)
    is_dropped = order.captions == 0
    assert (is_own ^ is_dropped).all()
    many = ablation_training.draw_order(some_scenes, 20_000, seed=5)
    assert (many.captions == 0).float().mean() == pytest.approx(0.1, abs=0.01)
    assert (many.captions == some_scenes.captions[many.scenes, 1]).float().mean() > 0.4


def test_batches_depend_on_the_seed_alone(some_scenes):
    """They are the same for every point, although weights are drawn in between."""
    first = list(ablation_training.run_batches(some_scenes, 64, 8, seed=1))
    torch.manual_seed(77)
    again = list(ablation_training.run_batches(some_scenes, 64, 8, seed=1))
    other = list(ablation_training.run_batches(some_scenes, 64, 8, seed=2))
    assert len(first) == 8
    for a, b, c in zip(first, again, other, strict=True):
        for name in ("x", "ids", "mask", "normal", "eps"):
            assert torch.equal(getattr(a, name), getattr(b, name))
        assert not torch.equal(a.x, c.x) and not torch.equal(a.eps, c.eps)
        assert a.x.min() >= -1 and a.x.max() <= 1 and a.mask[:, 0].all()
    noise = torch.cat([batch.eps for batch in first])
    assert len(noise.flatten(1).unique(dim=0)) == 64


def test_a_run_is_that_of_plain_adamw(some_scenes, model):
    """Weights of the EMA and the loss, computed step by step with torch.optim."""
    def fresh():
        return ablation_training.new_model(POINTS["no-time"], ablation_readers.BUNDLED, "float32",
                                           3, CPU)

    trained_model = fresh()
    trained = ablation_training.train(trained_model, some_scenes, SETTINGS, 64, 3e-3, 3,
                                       Execution(compile=False, cuda_graph=False))

    plain = fresh()
    run = ablation_training.run_config(SETTINGS, 64, 3e-3, 3)
    assert run.steps == 8
    weights = list(plain.dit.parameters())
    ema = [weight.detach().clone() for weight in weights]
    adam = torch.optim.AdamW(weights, betas=(0.9, 0.99), weight_decay=1e-4)
    for step, batch in enumerate(ablation_training.run_batches(some_scenes, 64, 8, 3)):
        adam.param_groups[0]["lr"] = learning_rate(run, step)
        sigma = fusedit.logit_normal_sigma(batch.normal, 4.0)
        text = plain.encode_ids(batch.ids, batch.mask)
        loss = fusedit.flow_loss(plain.dit, batch.x, text, sigma, batch.eps).mean()
        adam.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        adam.step()
        if step + 1 == 5:                   # the first update of the EMA: 1 / (9 + 1)
            ema = [0.1 * a + 0.9 * w.detach() for a, w in zip(ema, weights, strict=True)]
    assert trained.loss == pytest.approx(loss.item(), abs=1e-6)
    for ours, expected in zip(trained_model.dit.parameters(), ema, strict=True):
        torch.testing.assert_close(ours.detach(), expected, rtol=0, atol=1e-4)


# ---- a tiny experiment ---------------------------------------------------------------------------

def run_program(*argv, program="benchmarks/ablations.py"):
    return warm.run([ROOT / program, *map(str, argv)], ENV)


def rows_of(out):
    return [json.loads(line) for line in (out / "runs.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    """An OUT with two points and two seeds."""
    out = tmp_path_factory.mktemp("ablations") / "out"
    done = run_program(out, "--points", *POINTS_OF_EXPERIMENT, "--seeds", 0, 1, "--save-models",
                       *TINY)
    assert done.returncode == 0, done.stderr[-3000:]
    return out


def test_runs_are_lines_with_everything_that_is_needed(experiment):
    rows = rows_of(experiment)
    assert [(row["seed"], row["point"]) for row in rows] == [
        (seed, name) for seed in (0, 1) for name in POINTS_OF_EXPERIMENT]
    for row in rows:
        assert row["images"] == 32 and row["lr"] == 2e-3 and row["distinct"] == 20
        assert len(row["verdicts"]) == 6 and set(row["verdicts"]) <= {"0", "1"}
        assert row["score"] == pytest.approx(row["verdicts"].count("1") / 6)
        assert set(row["categories"]) == set(scenes.CATEGORIES)
        assert row["loss"] > 0.1 and row["images_per_s"] > 0 and row["seconds"] > 0
        assert row["device"] and row["dtype"] == "float32" and row["torch"]
    assert rows[0]["parameters"] == ablation_points.count_parameters(POINTS["baseline"])
    assert rows[1]["reader"] == "captions" and rows[1]["control"] == ""
    assert rows[0]["loss"] != rows[2]["loss"]              # another seed


def test_saved_models_can_be_loaded(experiment):
    loaded = load_model(experiment / "models/reader-captions-seed-1")
    assert loaded.config.base == str(experiment / "readers/captions-2-steps")
    assert loaded.config.timestep_conditioning == "adaln-zero"
    drawn = generate(loaded, ["a red circle"], steps=2)
    assert drawn[0].size == (32, 32)


def test_a_model_is_scored_as_evaluate_does(tmp_path):
    done = run_program("shapes", "-n", 12, "--dtype", "float32", "--device", "cpu", "--out",
                       tmp_path, program="evaluate.py")
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(next(tmp_path.rglob("shapes.json")).read_text())
    rows = ablation_training.score(load_model(ROOT / "demo"), SETTINGS)
    assert rows == result["prompts"]
    scored = ablations.compact(rows)
    rights = [row["right"] for row in result["prompts"]]
    assert scored["verdicts"] == "".join(map(str, rights))
    assert rights != rights[::-1] and sum(rights) > 6
    assert scored["score"] == result["overall"]
    assert scored["categories"] == result["categories"]


def test_a_restart_trains_only_what_is_missing(experiment):
    before = (experiment / "runs.jsonl").read_text()
    lines = before.splitlines(keepends=True)
    try:
        (experiment / "runs.jsonl").write_text("".join(lines[:3]) + lines[3][:50])     # killed
        done = run_program(experiment, "--points", *POINTS_OF_EXPERIMENT, "--seeds", 0, 1, *TINY)
        assert done.returncode == 0, done.stderr[-3000:]
        assert "reader-captions, seed 1: run 1 of 1" in done.stdout
        assert "training the reader" not in done.stdout and "baseline" not in done.stdout
        again = rows_of(experiment)
    finally:
        (experiment / "runs.jsonl").write_text(before)
    for row, known in zip(again, map(json.loads, lines), strict=True):
        for name in ("point", "seed", "loss", "verdicts"):
            assert row[name] == known[name]


@pytest.mark.parametrize("argv, message", [
    (["--images", "128"], "the runs in {out} have --images 32, not 128: give --images 32, or "
                          "choose another OUT"),
    (["--reader-steps", "3"], "the runs in {out} have --reader-steps 2, not 3: give --reader-steps "
                              "2, or choose another OUT"),
    (["--lr", "0"], "--lr 0 must be above 0"),
    (["--cuda-graph"], "--cuda-graph needs a GPU"),
    (["--lr", "0.001"], "baseline, seed 0 has already been trained with lr 0.002, not 0.001: "
                        "choose another OUT, or delete its line from runs.jsonl to train it again"),
    (["--batch", "33"], "32 images are less than a batch of 33: give more --images or a smaller "
                        "--batch"),
    (["--points", "rope"], "unknown point 'rope'; did you mean 1d-rope or 2d-rope or m-rope?"),
    (["--report", "--against", "final"], "{out} has no runs of 'final' to compare with; known: "
                                         "baseline, reader-captions"),
])
def test_mistakes_are_named_with_their_remedy(experiment, argv, message):
    before = (experiment / "runs.jsonl").read_text()
    done = run_program(experiment, "--points", "baseline", *TINY, *argv)
    assert done.returncode == 1
    error = done.stderr.strip().splitlines()[-1]
    assert error == "ablations.py: error: " + message.format(out=experiment)
    assert (experiment / "runs.jsonl").read_text() == before


def test_the_report_has_a_table_and_a_figure(experiment):
    done = run_program(experiment, "--report")
    assert done.returncode == 0, done.stderr[-3000:]
    text = (experiment / "report.md").read_text()
    assert text in done.stdout
    lines = [line for line in text.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line[1:-1].split("|")] for line in lines]
    assert cells[0] == list(ablation_report.HEADER)
    assert [row[0] for row in cells[2:4]] == ["baseline", "reader-captions"]
    losses = [row["loss"] for row in rows_of(experiment) if row["point"] == "baseline"]
    assert cells[2][:3] == ["baseline", "2", "7.19 M"]
    assert cells[2][4] == f"{sum(losses) / 2:.4f}" and cells[2][-1] == ""
    known = "degrees of freedom" in text                   # not if no image was right
    assert known == (cells[3][-1] in ("no difference seen", "better", "worse"))
    assert known != (cells[3][-1] == "not tested" and "is not known" in text)
    assert re.fullmatch(r"[+-]0\.\d{3} \[-0\.\d{3}, \+0\.\d{3}\]", cells[3][-3])
    assert cells[4] == ["point", *scenes.CATEGORIES]
    assert [row[0] for row in cells[6:]] == ["baseline", "reader-captions"]
    assert "no sweep" in text
    assert (experiment / "report.png").stat().st_size > 10_000


def test_the_sweep_chooses_the_rate_of_later_runs(tmp_path):
    out = tmp_path / "out"
    argv = [out, "--points", "no-time", "final", "--seeds", 0, *TINY]
    done = run_program(*argv, "--sweep-lr", 32)
    assert done.returncode == 0, done.stderr[-3000:]
    rates = json.loads((out / "rates.json").read_text())
    assert list(rates) == ["deep, none"] and not (out / "runs.jsonl").exists()
    assert done.stdout.count("  step 1 of 2: loss ") == 3
    swept = rates["deep, none"]
    assert swept["point"] == "no-time" and swept["images"] == 32
    assert list(swept["losses"]) == ["0.001", "0.002", "0.004"]
    assert len(set(swept["losses"].values())) == 3
    assert f"{swept['best']:g}" == min(swept["losses"], key=swept["losses"].get)

    for more, message in ((["--points", "final", "--seeds", 0], "error: the runs in {out} have "
                           "--batch 16, not 8: give --batch 16, or choose another OUT"),
                          (["--points", "final", "--sweep-lr", 32], "error: the runs in {out}")):
        done = run_program(*argv, "--batch", 8, *more)
        assert message.format(out=out) in done.stderr and done.returncode == 1
    done = run_program(*argv, "--sweep-lr", 32, "--images", 48)        # which no sweep uses
    assert f"deep, none: swept already, best rate {swept['best']:g}" in done.stdout
    assert done.returncode == 0 and "  step" not in done.stdout

    swept["best"] = 0.0037
    (out / "rates.json").write_text(json.dumps(rates))
    done = run_program(*argv)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [row["lr"] for row in rows_of(out)] == [0.0037, 0.0037]
    done = run_program(out, "--report", "--against", "no-time")
    assert done.returncode == 0, done.stderr[-3000:]
    text = (out / "report.md").read_text()
    assert "| deep, none | no-time, 32 images | 0.001: " in text
    assert text.count(" |  | not tested |") == 1              # without a p


SWEEP_UP_TO_THE_SCENES = """
import sys
sys.path.insert(0, "benchmarks")
import ablations

def make_scenes(n, model, device):
    sys.exit(f"{n} scenes")

ablations.make_scenes = make_scenes
ablations.main()
"""


def test_the_sweep_renders_only_the_scenes_that_it_trains_on(tmp_path):
    done = warm.run(["-c", SWEEP_UP_TO_THE_SCENES, tmp_path, "--points", "no-time", "--sweep-lr",
                     "64", "--no-compile", "--device", "cpu"], ENV, ROOT)
    assert done.stderr.splitlines()[-1] == "64 scenes"


def test_the_sweep_keeps_what_another_process_has_found_meanwhile(tmp_path, monkeypatch):
    other = {"shallow, adaln-zero": {"point": "shallow-self", "images": 64, "best": 0.001}}

    def train(*_):
        (tmp_path / "rates.json").write_text(json.dumps(other))
        return SimpleNamespace(loss=0.25)

    monkeypatch.setattr(ablations, "new_model", lambda *_: None)
    monkeypatch.setattr(ablations, "train", train)
    args = SimpleNamespace(out=tmp_path, seeds=[0], execution=Execution(False, False))
    ablations.sweep({"no-time": POINTS["no-time"]}, {"questions": None},
                    SimpleNamespace(pixels=torch.zeros(1)), SETTINGS, 64, args)
    rates = ablations.read_rates(tmp_path)
    assert list(rates) == ["shallow, adaln-zero", "deep, none"]
    assert rates["deep, none"]["losses"] == {"0.001": 0.25, "0.002": 0.25, "0.004": 0.25}
    (tmp_path / "rates.json").write_text(json.dumps(rates))
    monkeypatch.setattr(ablations, "train", lambda *_: SimpleNamespace(loss=0.5))
    ablations.sweep({"final": POINTS["final"], "no-time": POINTS["no-time"]}, {"questions": None},
                    SimpleNamespace(pixels=torch.zeros(1)), SETTINGS, 64, args)
    swept = ablations.read_rates(tmp_path)["deep, none"]   # by the first of the points
    assert swept["point"] == "final" and swept["losses"]["0.001"] == 0.5


@pytest.mark.parametrize("point, message", [
    (Point({"qk_norm": "yes"}, reader="captions"), "point new: config field qk_norm is 'yes'"),
    (Point({"dit_hidden_size": 490}), "point new: config field dit_hidden_size is 490"),
    (Point(FOUR_BLOCKS | {"initial_layers": 6}),
     "point new: config fields initial_layers 6, .* a Gemma of 8 layers"),
    (Point({}, control="basline"), "point new: control of an unknown point 'basline'"),
])
def test_a_wrong_point_is_named_before_any_training(tmp_path, point, message):
    args = SimpleNamespace(out=tmp_path, reader_steps=2, dtype="float32")
    with pytest.raises(FuseDiTError, match=message):
        ablations.prepare(args, {"baseline": POINTS["baseline"], "new": point}, 20, CPU)
    assert not any(tmp_path.iterdir())                     # no reader has been trained


def test_a_point_with_a_tuple_is_recognised_in_runs_jsonl():
    point = Point({"shared_attention_layers": (0, 2)})
    run = ablations.Run("some", point, 0, 0.002)
    row = json.loads(json.dumps(dict(point="some", seed=0, lr=0.002, **point._asdict())))
    assert ablations.finished([row], run)
    with pytest.raises(FuseDiTError, match=r"with changes .*\[0, 2\].*, not .*\[0, 4\]"):
        ablations.finished([row], run._replace(point=Point({"shared_attention_layers": (0, 4)})))


def test_a_run_that_another_process_has_finished_is_kept_once(tmp_path, capsys):
    ablations.append_run(tmp_path, dict(point="baseline", seed=0, score=0.5))
    ablations.append_run(tmp_path, dict(point="baseline", seed=1, score=0.6))
    ablations.append_run(tmp_path, dict(point="baseline", seed=0, score=0.7))
    assert [row["score"] for row in rows_of(tmp_path)] == [0.5, 0.6]
    assert "another process" in capsys.readouterr().out


# ---- statistics ----------------------------------------------------------------------------------

def both(observed, chance, degrees):
    """Spreads that are the same for scores and for differences."""
    spread = ablation_report.Spread(observed, chance, degrees)
    return ablation_report.Spreads(alone=spread, paired=spread)


UNKNOWN = both(0.0, 0.0, 0.0)               # the spreads of an experiment with one seed


def made_up_run(point, seed, right):
    """A run with these verdicts, a boolean array [prompts]."""
    verdicts = "".join(str(int(value)) for value in right)
    run = dict(point=point, seed=seed, verdicts=verdicts)
    return run | dict(score=ablation_report.overall(ablation_report.verdicts([run])))


def made_up(point, seeds, share, offsets=(0, 0, 0), n=600):
    """Runs whose images are right with a probability of share, which varies with the seed."""
    runs = []
    for seed in range(seeds):
        rng = np.random.default_rng([seed, len(point)])
        right = rng.random(n) < share + offsets[seed]
        runs.append(made_up_run(point, seed, right))
    return runs


def compared(a, b):
    spreads = ablation_report.seed_spreads({"a": a, "b": b})
    return ablation_report.compare(a, b, spreads), spreads


def test_a_clear_difference_is_seen_and_none_is_not():
    base = made_up("base", 3, 0.6)
    comparison, spreads = compared(made_up("other", 3, 0.8), base)
    assert 3 < spreads.alone.degrees <= 4 and 0.24 * spreads.alone.deviation() < 0.03
    assert comparison.difference == pytest.approx(0.2, abs=0.03)
    assert comparison.interval[0] > 0.1 and comparison.p < 0.02
    assert ablation_report.claim(comparison, spreads) == "better"
    comparison, spreads = compared(base, made_up("other", 3, 0.8))
    assert ablation_report.claim(comparison, spreads) == "worse"
    comparison, spreads = compared(made_up("others", 3, 0.6), base)
    assert comparison.interval[0] < 0 < comparison.interval[1]
    assert ablation_report.claim(comparison, spreads) == "no difference seen"


@pytest.mark.parametrize("difference, p, words", [
    (0.1, 0.049, "better"), (-0.1, 0.049, "worse"), (0.1, 0.051, "no difference seen")])
def test_a_claim_needs_a_p_below_5_percent(difference, p, words):
    comparison = ablation_report.Comparison(difference, [-1, 1], p)
    assert ablation_report.claim(comparison, both(0.1, 0.0, 2)) == words


def test_seeds_that_differ_widen_the_interval():
    """600 prompts would show the difference of these runs, but not that of their designs."""
    offsets = (-0.15, 0, 0.15)
    base = made_up("base", 3, 0.6, offsets)
    other = made_up("other", 3, 0.7, offsets[::-1])
    comparison, spreads = compared(other, base)
    assert ablation_report.claim(comparison, spreads) == "no difference seen"
    without = ablation_report.compare(other, base, UNKNOWN)
    assert without.p < 0.01 and ablation_report.claim(without, UNKNOWN) == "not tested"
    narrow = ablation_report.score_interval(base, UNKNOWN)
    wide = ablation_report.score_interval(base, spreads)
    assert wide[1] - wide[0] > 2 * (narrow[1] - narrow[0])


def made_up_alike(shares, n=600):
    """Runs in which the same prompts are right, with these shares of right images."""
    runs = []
    for seed, share in enumerate(shares):
        right = np.arange(n) < round(share * n)
        runs.append(made_up_run("a", seed, right))
    return runs


def test_the_spread_is_pooled_over_points():
    by_point = {"a": made_up_alike([0.5, 0.7]), "b": made_up_alike([0.2]),
                "c": made_up_alike([0.1, 0.2, 0.3])}
    spread = ablation_report.seed_spread(by_point, paired=False)
    variances = np.array([0.02, 0.01])
    chances = np.array([1 / 5 * 1 / 2, 1 / 5 * 1 / 3]) / 600         # they disagree about 1 / 5
    weights = np.array([0.24 ** 2, 0.16 ** 2])
    degrees = np.array([1, 2])
    total = degrees @ weights
    expected = (degrees @ variances / total, degrees @ chances / total,
                total ** 2 / (degrees @ weights ** 2))
    np.testing.assert_allclose(spread, expected)
    assert spread.deviation() == pytest.approx((spread.observed - spread.chance) ** 0.5)

    by_point["poor"] = made_up_alike([0.01, 0.01])
    with_poor = ablation_report.seed_spread(by_point, paired=False)
    np.testing.assert_allclose(with_poor, spread, rtol=0.01)          # it says next to nothing
    assert ablation_report.seed_spreads({"a": made_up_alike([0.0, 0.0])}) == UNKNOWN


def test_what_a_seed_does_to_all_points_is_no_difference():
    """Three points that gain equally with a better seed; logits, not scores, move together."""
    by_point = {"a": made_up_alike([0.4, 0.5, 0.6]), "b": made_up_alike([0.4, 0.5, 0.6]),
                "c": made_up_alike([0.064, 0.1, 0.136]), "alone": made_up_alike([0.3])}
    alone, paired = ablation_report.seed_spreads(by_point)
    assert alone.deviation() > 0.35 and paired.observed < 0.03 ** 2
    assert 4 < alone.degrees < 5 and 2 < paired.degrees < 3          # c says little
    del by_point["c"]
    assert ablation_report.seed_spread(by_point, paired=True).degrees == pytest.approx(2)
    by_point["b"] = made_up_alike([0.6, 0.5, 0.4])
    against = ablation_report.seed_spread(by_point, paired=True)
    assert against.observed == pytest.approx(4 * 0.1 ** 2 / 2 / 0.25 ** 2)   # 4 residuals of 0.1


def test_the_spread_between_seeds_is_added_to_that_between_prompts():
    alone = ablation_report.Spread(observed=0.04, chance=0.0, degrees=1e9)
    paired = ablation_report.Spread(observed=0.16, chance=0.0, degrees=1e9)
    spreads = ablation_report.Spreads(alone, paired)
    good = made_up_alike([0.5] * 2)
    poor = made_up_alike([0.1] * 2)

    width = np.ptp(ablation_report.compare(good, poor, spreads).interval)
    prompts = np.ptp(ablation_report.compare(good, poor, UNKNOWN).interval)
    seeds = 2 * 1.96 * 0.4 * ((0.25 ** 2 + 0.09 ** 2) / 2) ** 0.5
    assert width == pytest.approx(np.hypot(seeds, prompts), rel=0.02)

    width = np.ptp(ablation_report.score_interval(good, spreads))
    prompts = np.ptp(ablation_report.score_interval(good, UNKNOWN))
    seeds = 2 * 1.96 * 0.2 * 0.25 / 2 ** 0.5
    assert width == pytest.approx(np.hypot(seeds, prompts), rel=0.02)


def test_deviations_vary_as_their_degrees_of_freedom_say():
    rng = np.random.default_rng(0)
    spread = ablation_report.Spread(observed=0.09, chance=0.05, degrees=6)
    drawn = spread.draw_deviations(rng, 100_000)
    assert spread.deviation() == pytest.approx(0.2)
    below = 0.09 * 6 / 12.592                              # the 95th percentile of chi-squared, 6
    above = 0.09 * 6 / 1.635                               # the 5th
    assert np.percentile(drawn, 5) == pytest.approx(max(0, below - 0.05) ** 0.5, abs=0.005)
    assert np.percentile(drawn, 95) == pytest.approx((above - 0.05) ** 0.5, rel=0.02)


@pytest.mark.parametrize("deviation", [0.0, 0.2])
@pytest.mark.parametrize("poor, pairs, experiments, common", [
    (0, 4, 60, 0.0), (6, 4, 60, 0.4), (0, 1, 240, 0.0), (0, 2, 120, 0.4)])
def test_the_p_value_is_right_without_a_difference(deviation, poor, pairs, experiments, common):
    """At most about one in 20 comparisons of equal designs has p < 0.05.

    This must hold beside poor points, too, whose scores vary less than those of the others. In
    small experiments it may be fewer. common: the standard deviation of what a seed does to all
    points.
    """
    small = []
    for experiment in range(experiments):
        rng = np.random.default_rng(experiment)
        difficulty = rng.normal(0, 1, 120)                 # of the prompts, the same for all
        seeds = common * rng.standard_normal(2)
        by_point = {}
        for point in range(2 * pairs):
            by_point[str(point)] = made_up_many(rng, difficulty, seeds, deviation)
        for point in range(poor):
            by_point[f"poor {point}"] = made_up_many(rng, difficulty - 4, seeds, deviation)
        spreads = ablation_report.seed_spreads(by_point)
        for point in range(0, 2 * pairs, 2):
            pair = by_point[str(point)], by_point[str(point + 1)]
            small.append(ablation_report.compare(*pair, spreads).p < 0.05)
    assert np.mean(small) < 0.08
    if deviation and pairs > 1:
        assert np.mean(small) > 0.02


def made_up_many(rng, difficulty, seeds, deviation):
    """Runs of a design whose chance of a right image varies with the prompt and the seed."""
    runs = []
    for seed, effect in enumerate(seeds):
        logits = difficulty + effect + deviation * rng.standard_normal()
        right = rng.random(120) < 1 / (1 + np.exp(-logits))
        runs.append(made_up_run("a", seed, right))
    return runs


def test_chance_in_single_verdicts_is_no_spread_between_seeds():
    """It is in the spread between prompts already."""
    rng = np.random.default_rng(0)
    by_point = {}
    for point in map(str, range(300)):
        chance = rng.random((2, 600)) < 0.3
        by_point[point] = [made_up_run(point, 0, chance[0]), made_up_run(point, 1, chance[1])]
    spread = ablation_report.seed_spread(by_point, paired=False)
    assert spread.chance == pytest.approx(1 / (0.3 * 0.7 * 600), rel=0.02)
    assert spread.deviation() < 0.4 * spread.chance ** 0.5
    assert 290 < spread.degrees <= 300


def test_a_control_is_named_in_the_table():
    runs = made_up("a", 2, 0.5)
    runs = [run | dict(control="baseline", images_per_s=50, loss=0.1, parameters=7_186_992)
            for run in runs]
    cells = ablation_report.table_row("a-wide", runs, runs, UNKNOWN)
    assert cells[:5] == ["a-wide (as many parameters as baseline)", "2", "7.19 M", "50", "0.1000"]


@pytest.mark.parametrize("share, p", [(0.1, "< 0.001"), (0.49, r"0\.\d{3}")])
def test_small_p_values_are_not_printed_as_0(share, p):
    cells = dict(control="", images_per_s=50, loss=0.1, parameters=1)
    runs = [run | cells for run in made_up("a", 3, 0.5)]
    others = [run | cells for run in made_up("others", 3, share)]
    row = ablation_report.table_row("a", runs, others, both(0.001, 0.0, 20))
    assert re.fullmatch(p, row[8])


def test_categories_have_their_own_scores():
    runs = [made_up_run("a", 0, [1, 0, 0, 0, 1, 0] * 5),
            made_up_run("a", 1, [1, 1, 0, 0, 1, 0] * 5)]
    lines = ablation_report.categories_table({"a": runs}).splitlines()
    assert lines[2] == "| a | 1.000 | 0.500 | 0.000 | 0.000 | 1.000 | 0.000 |"


def test_images_of_the_same_prompt_and_seed_are_compared():
    a = made_up("a", 3, 0.5)
    assert ablation_report.compare(a[:1], a[1:], UNKNOWN) is None
    comparison = ablation_report.compare(a, a[:0:-1], UNKNOWN)
    assert comparison.difference == 0 and comparison.interval[1] < 0.005 and comparison.p > 0.9


# ---- the recorded runs ---------------------------------------------------------------------------

def test_the_tables_in_the_docs_are_those_of_the_recorded_runs(tmp_path):
    recorded = ROOT / "docs" / "ablations"
    runs = ablations.read_runs(recorded)
    ablation_report.report(runs, ablations.read_rates(recorded), tmp_path, "baseline")
    number = r"[+-]?\d[\d,]*\.?\d*"
    committed = (recorded / "report.md").read_text()
    again = (tmp_path / "report.md").read_text()
    without_below = [text.replace("< ", "") for text in (again, committed)]
    assert len({re.sub(number, "N", text) for text in without_below}) == 1
    # Another CPU may add up in another order: one bootstrap draw more or less is below 0.
    values = [[float(found.replace(",", "")) for found in re.findall(number, text)]
              for text in without_below]
    np.testing.assert_allclose(*values, atol=0.0011)
    table = committed.split("\n\n")[0]
    assert table in (ROOT / "docs" / "ablations.md").read_text()


# ---- the CUDA graph, without a GPU ---------------------------------------------------------------

class Recorder:
    """Takes the place of torch.cuda: a graph repeats the step that was called while recording."""

    def __init__(self, monkeypatch, fails=False):
        self.fails = fails
        self.replayed = 0
        self.repeat = None
        recorder = self

        class Graph:
            def replay(self):
                recorder.replayed += 1
                recorder.repeat()

        stream = SimpleNamespace(wait_stream=lambda other: None)
        monkeypatch.setattr(torch.cuda, "Stream", lambda: stream)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
        monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
        monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
        monkeypatch.setattr(torch.cuda, "graph", self.recording)

    @contextlib.contextmanager
    def recording(self, graph):
        yield
        if self.fails:
            try:
                raise RuntimeError("operation not permitted\nwhen stream is capturing")
            finally:                        # as when torch ends the recording
                raise RuntimeError("operation failed due to a previous error during capture")


class SumStep:
    """A step whose loss is the sum of the images."""
    adam = None
    set_learning_rate = None

    def __init__(self, recorder):
        self.recorder = recorder

    def __call__(self, batch):
        loss = batch.x.sum()
        self.recorder.repeat = lambda: loss.copy_(batch.x.sum())
        return loss


@pytest.fixture(scope="module")
def batches(some_scenes):
    """Batches of one shape, as on a GPU."""
    found = []
    for batch in ablation_training.run_batches(some_scenes, 64, 8, seed=1):
        found.append(batch._replace(ids=batch.ids[:, :8], mask=batch.mask[:, :8]))
    return found


def test_a_graph_sees_every_batch(monkeypatch, batches):
    recorder = Recorder(monkeypatch)
    step = ablation_training.GraphedStep(SumStep(recorder))
    losses = [step(batch) for batch in batches]
    assert torch.stack(losses).tolist() == [batch.x.sum().item() for batch in batches]
    assert recorder.replayed == len(batches) - ablation_training.WARM


def test_a_step_that_cannot_be_recorded_is_not_trained_further(monkeypatch, batches):
    step = ablation_training.GraphedStep(SumStep(Recorder(monkeypatch, fails=True)))
    with pytest.raises(FuseDiTError, match=r"as a CUDA graph \(operation not permitted\): give "
                                           "--no-cuda-graph"):
        for batch in batches:
            step(batch)
    assert step.calls == ablation_training.WARM + 1
