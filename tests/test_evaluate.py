"""evaluate.py: what a perfect, a wrong and an untrained model score, and what is written."""
import json
import random
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from PIL import Image

import evaluate
from demo import scenes, tiny_gemma
from demo.render import render
from demo.scenes import CATEGORIES, COLOURS, SIZES
from fusedit import preset


def complete(said, rng):
    """A full scene of which `said` may be said: what it leaves open, drawn at random."""
    while True:
        ground = said.background or rng.choice(list(COLOURS))
        groups = tuple(g._replace(size=g.size or rng.choice(list(SIZES)),
                                  colour=g.colour or rng.choice(list(COLOURS)))
                       for g in said.groups)
        if ground not in [g.colour for g in groups]:
            return said._replace(groups=groups, background=ground)


def paint_with(change):
    """A stand-in for the model: draws change(what is said) of every prompt, exactly."""
    def paint(args, prompts):
        rng = random.Random(0)
        wanted = scenes.evaluation_prompts(args.n, args.seed)
        assert prompts == [p for *_, p in wanted]
        for category, said, _ in wanted:
            scene = complete(change(category, said), rng)
            yield render(scene, scenes.place(scene, rng))
    return paint


def score(monkeypatch, tmp_path, change, n=120):
    monkeypatch.setattr(evaluate, "paint", paint_with(change))
    args = evaluate.arguments(["shapes", "-n", str(n), "--out", str(tmp_path)])
    args.command(args)
    return json.loads((tmp_path / "shapes.json").read_text())


def test_a_perfect_model_scores_one(monkeypatch, tmp_path, capsys):
    result = score(monkeypatch, tmp_path, lambda _, said: said)
    assert result["overall"] == 1 and result["categories"] == dict.fromkeys(CATEGORIES, 1)
    assert len(result["prompts"]) == 120 and result["settings"]["seed"] == 0
    table = capsys.readouterr().out
    assert all(category in table for category in CATEGORIES) and "20 of 20" in table
    assert Image.open(tmp_path / "shapes.png").size == (
        10 * evaluate.CELL, 6 * (evaluate.CELL + evaluate.LABEL))


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


def test_an_untrained_model_end_to_end(tmp_path, capsys):
    from weights import build_model, save_model
    words = tiny_gemma.vocabulary()
    tiny_gemma.save(tiny_gemma.build(len(words)), words, tmp_path / "gemma")
    config = preset("demo", base=str(tmp_path / "gemma"))
    torch.manual_seed(0)
    save_model(tmp_path / "model", config, build_model(config).dit.state_dict())
    run = ["shapes", "--model", str(tmp_path / "model"), "-n", "8", "--steps", "2",
           "--batch-size", "3", "--device", "cpu", "--out"]
    for out in ("a", "b"):
        args = evaluate.arguments([*run, str(tmp_path / out)])
        args.command(args)
    assert (tmp_path / "a/shapes.json").read_text() == (tmp_path / "b/shapes.json").read_text()
    result = json.loads((tmp_path / "a/shapes.json").read_text())
    assert result["settings"]["guidance"] == 3.0          # the demo's own
    assert result["overall"] <= 0.1 and len(result["prompts"]) == 8
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["shapes.json", "shapes.png"]


def test_ground_truth_and_errors_as_a_user_sees_them(tmp_path):
    def command(*words):
        return subprocess.run([sys.executable, str(ROOT / "evaluate.py"), "shapes", *words],
                              capture_output=True, text=True)
    done = command("--ground-truth", "-n", "60")
    assert done.returncode == 0
    assert "60 of 60 ground-truth renders read back right (100.00%)" in done.stdout
    done = command("--model", str(tmp_path / "none"), "--out", str(tmp_path / "out"))
    assert done.returncode == 1 and "Traceback" not in done.stderr and "none" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1 and not (tmp_path / "out").exists()
