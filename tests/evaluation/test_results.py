"""The official scorers' files, comparisons of models, the report's table and figure."""
import json
import random

import numpy as np
import pytest
from PIL import Image
from test_evaluate import METADATA, command

from fusedit import FuseDiTError
from fusedit_lib.evaluation import results

TAGS = [row["tag"] for row in METADATA]


def geneval_results(path, chances, n=20, images=4):
    """A file as evaluate_images.py of djghosh13/geneval writes it, by pandas' to_json."""
    rng, rows = random.Random(0), []
    for k in rng.sample(range(6 * n), 6 * n):              # os.listdir has no order
        tag = TAGS[k % 6]
        if tag == "single_object" and k >= 3 * n:          # tags have other numbers of prompts
            continue
        for i in range(images):
            right = rng.random() < chances[tag]
            prompt, why = f"a {tag} {k}", "" if right else "expected cup>=1, found 0"
            rows.append(dict(
                filename=f"out/{k:05}/samples/{i:04}.png", tag=tag, prompt=prompt, correct=right,
                reason=why, metadata=json.dumps(dict(tag=tag, prompt=prompt)), details="{}"))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def test_geneval_score_is_the_official_one(tmp_path, capsys):
    """evaluation/summary_scores.py: of each tag the mean of `correct`, and the mean of the tags."""
    rows = geneval_results(tmp_path / "results.jsonl", dict(zip(TAGS, (1, .7, .5, .8, .2, .4))))
    command("geneval-score", tmp_path / "results.jsonl")
    result = json.loads((tmp_path / "geneval.json").read_text())
    want = {tag: np.mean([row["correct"] for row in rows if row["tag"] == tag]) for tag in TAGS}
    assert list(result["categories"]) == TAGS              # the paper's order
    assert result["categories"] == pytest.approx(want)
    assert result["overall"] == pytest.approx(np.mean(list(want.values())))
    said = capsys.readouterr().out
    assert "110 prompts of GenEval's 553, 4 pictures of each" in said
    assert f"{want['colors']:.3f}" in said
    low, high = result["intervals"]["overall"]
    assert low < result["overall"] < high and high - low < 0.15
    text = (tmp_path / "results.jsonl").read_text()
    (tmp_path / "other.jsonl").write_text("".join(reversed(text.splitlines(keepends=True))))
    command("geneval-score", tmp_path / "other.jsonl", "--out", tmp_path / "other.json")
    command("compare", tmp_path / "geneval.json", tmp_path / "other.json")     # any order will do
    assert "p = 1.0000" in capsys.readouterr().out
    (tmp_path / "results.jsonl").write_text(text.split("\n", 1)[1])
    with pytest.raises(FuseDiTError, match="3 to 4 pictures"):
        command("geneval-score", tmp_path / "results.jsonl")
    for bad, says in (("", "is empty"), ("{}\n", "line 1 is none of"), ("no\n", "line 1 is none")):
        (tmp_path / "results.jsonl").write_text(bad)
        with pytest.raises(FuseDiTError, match=says):
            command("geneval-score", tmp_path / "results.jsonl")


# As compute_dpg_bench.py of TencentQQGYLab/ELLA writes its --res-path.
DPG = """out/images/a.png, 1.0, 0.5, 0.75, 0.75, 0.75
out/images/b.png, 0.5, 0.5, 1.0, 0.0, 0.5
Model: images
L1 category scores:
\tentity: 87.5
\trelation: 90.0
L2 category scores:
\tentity - whole: 87.5
\trelation - spatial: 90.0
Image path: out/images
Save results to: dpg.txt
DPG-Bench score: 62.5
"""


def test_dpg_score_reads_the_official_file(tmp_path, capsys):
    (tmp_path / "dpg.txt").write_text(DPG)
    command("dpg-score", tmp_path / "dpg.txt")
    result = json.loads((tmp_path / "dpg.json").read_text())
    assert result["overall"] == 0.625
    assert result["categories"] == dict(entity=0.875, relation=0.9)
    low, high = result["intervals"]["overall"]             # of two pictures' means
    assert 0 < low < 0.5 and 0.75 < high < 1
    said = capsys.readouterr().out
    assert "62.50" in said and "2 prompts" in said
    for bad in (DPG.rsplit("DPG", 1)[0], DPG.rsplit("\n", 2)[1], DPG.replace(", 0.75\n", ", x\n"),
                DPG.split("\n", 2)[2]):
        (tmp_path / "dpg.txt").write_text(bad)
        with pytest.raises(FuseDiTError, match="no whole file of compute_dpg_bench.py"):
            command("dpg-score", tmp_path / "dpg.txt")


def shapes_result(path, rights, speed=5.0):
    rows = [dict(category="ab"[k % 2], prompt=f"prompt {k}", right=right)
            for k, right in enumerate(rights)]
    path.write_text(json.dumps(results.scored("shapes", rows, dict(images_per_s=speed))))


def test_compare_counts_prompts_and_says_how_sure(tmp_path, capsys):
    rng = random.Random(0)
    a = [int(rng.random() < 0.6) for _ in range(200)]
    b = [1 if rng.random() < 0.3 else right for right in a]
    shapes_result(tmp_path / "a.json", a)
    shapes_result(tmp_path / "b.json", b)
    capsys.readouterr()
    command("compare", tmp_path / "a.json", tmp_path / "b.json")
    said = capsys.readouterr().out
    better = sum(y > x for x, y in zip(a, b, strict=True))
    assert f"{(sum(b) - sum(a)) / 200:+.3f}" in said and "B is better" in said
    assert sum(int(line.split(" prompts better")[0].split()[-1]) for line in said.splitlines()
               if "prompts better" in line) == better
    command("compare", tmp_path / "b.json", tmp_path / "a.json")
    assert "A is better" in capsys.readouterr().out
    command("compare", tmp_path / "a.json", tmp_path / "a.json")
    assert "p = 1.0000: may well be chance" in capsys.readouterr().out
    shapes_result(tmp_path / "c.json", a[:-1])
    with pytest.raises(FuseDiTError, match="not of the same prompts"):
        command("compare", tmp_path / "a.json", tmp_path / "c.json")
    (tmp_path / "c.json").write_text("[]")
    with pytest.raises(FuseDiTError, match="no result of evaluate.py"):
        command("compare", tmp_path / "a.json", tmp_path / "c.json")


def test_the_report_has_all_of_all(tmp_path, capsys):
    for name, rights in (("one", [1] * 9 + [0]), ("two", [1, 0] * 5)):
        folder = tmp_path / name
        folder.mkdir()
        shapes_result(folder / "shapes.json", rights)
        (folder / "fid.json").write_text(json.dumps(dict(
            benchmark="distance", label="FID", distance=12.5 if name == "one" else 10.25, kid=0.004,
            real=30, fake=30, folders=["photos/real", "fake"])))
        (folder / "run.json").write_text(json.dumps(dict(benchmark="shapes", images_per_s=7.5)))
        (folder / "other.json").write_text("{}")
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_text(
        '{"step": 1, "images_per_s": 90.0}\n{"step": 2, "val_loss": 0.5, "images_per_s": 110.0}\n'
        '{"step": 3, "val_loss": 0.25}\n{"st')
    geneval_results(tmp_path / "results.jsonl", dict.fromkeys(TAGS, 0.5))
    command("geneval-score", tmp_path / "results.jsonl")
    capsys.readouterr()
    command("report", f"first={tmp_path / 'one'}", f"first={run}", f"second={tmp_path / 'two'}",
            f"second={tmp_path / 'geneval.json'}", "--out", tmp_path / "results.md")
    text = (tmp_path / "results.md").read_text()
    assert text in capsys.readouterr().out
    rows = [[cell.strip() for cell in line.strip("|\n").split("|")] for line in text.splitlines()]
    table = {rows[0][i]: (rows[2][i], rows[3][i]) for i in range(1, len(rows[0]))}
    assert [row[0] for row in rows[2:]] == ["first", "second"] and len(rows) == 4
    assert table["FID, real, 30 and 30 ↓"] == ("12.5", "**10.25**")
    assert [cell.split(" [")[0] for cell in table["shapes, 10 prompts ↑"]] == ["**0.9", "0.5"]
    assert table["validation loss ↓"] == ("0.25", "")
    assert table["training, images/s ↑"] == ("110", "")
    assert table["sampling, images/s (shapes) ↑"] == ("**7.5**",) * 2
    assert table["GenEval, 110 prompts ↑"][0] == ""
    assert Image.open(tmp_path / "results.png").width > 1000
    with pytest.raises(FuseDiTError, match="another 'FID, real, 30 and 30' already"):
        command("report", f"x={tmp_path / 'one'}", f"x={tmp_path / 'two'}", "--out",
                tmp_path / "r.md")
    (tmp_path / "nothing").mkdir()
    with pytest.raises(FuseDiTError, match="no results there"):
        command("report", tmp_path / "nothing", "--out", tmp_path / "r.md")
    with pytest.raises(FuseDiTError, match="cannot read"):
        command("report", tmp_path / "none.json", "--out", tmp_path / "r.md")
    with pytest.raises(FuseDiTError, match="the table is a .md file"):
        command("report", tmp_path / "one", "--out", tmp_path / "r.png")
    (tmp_path / "bad.json").write_text('{"benchmark": "shapes", "overall": 1}')
    with pytest.raises(FuseDiTError, match="no result"):
        command("report", tmp_path / "bad.json", "--out", tmp_path / "r.md")
