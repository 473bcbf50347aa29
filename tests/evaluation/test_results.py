"""The official scorers' output, comparisons of models, and the report's table and figure."""
import json
import random

import numpy as np
import pytest
from PIL import Image
from test_evaluate import METADATA, command, read_json

from fusedit import FuseDiTError
from fusedit_lib.evaluation import results

TAGS = [row["tag"] for row in METADATA]


# ------------------------------------------------------------------------------ official scorers

def write_geneval_results(path, chances, n=20, images=4):
    """Write a file like evaluate_images.py of djghosh13/geneval, which uses pandas' to_json.

    chances: {tag: probability that an image is right}. Returns the rows.
    """
    rng = random.Random(0)
    rows = []
    for k in rng.sample(range(6 * n), 6 * n):              # os.listdir is in arbitrary order
        tag = TAGS[k % 6]
        if tag == "single_object" and k >= 3 * n:          # tags differ in their number of prompts
            continue
        prompt = f"a {tag} {k}"
        for i in range(images):
            right = rng.random() < chances[tag]
            reason = "expected cup>=1, found 0"
            if right:
                reason = ""
            rows.append(dict(
                filename=f"out/{k:05}/samples/{i:04}.png", tag=tag, prompt=prompt, correct=right,
                reason=reason, metadata=json.dumps(dict(tag=tag, prompt=prompt)), details="{}"))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def test_geneval_score_matches_the_official_one(tmp_path, capsys):
    """evaluation/summary_scores.py averages `correct` by tag and then averages the tags."""
    file = tmp_path / "results.jsonl"
    chances = dict(zip(TAGS, (1, .7, .5, .8, .2, .4), strict=True))
    rows = write_geneval_results(file, chances)
    command("geneval-score", file)
    result = read_json(tmp_path / "geneval.json")
    expected = {}
    for tag in TAGS:
        expected[tag] = np.mean([row["correct"] for row in rows if row["tag"] == tag])
    assert list(result["categories"]) == TAGS              # the paper's order
    assert result["categories"] == pytest.approx(expected)
    assert result["overall"] == pytest.approx(np.mean(list(expected.values())))
    table = capsys.readouterr().out
    assert "110 of GenEval's 553 prompts, 4 images per prompt" in table
    assert f"{expected['colors']:.3f}" in table
    low, high = result["intervals"]["overall"]
    assert low < result["overall"] < high
    assert high - low < 0.15


def test_geneval_score_of_a_part_names_the_missing_categories(tmp_path, capsys):
    """The prompts of GenEval are sorted by category, so that the first ones lack some of them."""
    file = tmp_path / "results.jsonl"
    rows = write_geneval_results(file, dict.fromkeys(TAGS, 0.5))
    first = [json.dumps(row) + "\n" for row in rows if row["tag"] in TAGS[:4]]
    file.write_text("".join(first))
    command("geneval-score", file)
    assert "no prompts of position, color_attr: the overall score is" in capsys.readouterr().out


def test_geneval_results_in_any_order_compare(tmp_path, capsys):
    file = tmp_path / "results.jsonl"
    write_geneval_results(file, dict.fromkeys(TAGS, 0.5))
    command("geneval-score", file)
    lines = file.read_text().splitlines(keepends=True)
    (tmp_path / "other.jsonl").write_text("".join(reversed(lines)))
    command("geneval-score", tmp_path / "other.jsonl", "--out", tmp_path / "other.json")
    capsys.readouterr()
    command("compare", tmp_path / "geneval.json", tmp_path / "other.json")
    assert "p = 1.0000" in capsys.readouterr().out


def test_geneval_results_that_are_incomplete_or_wrong(tmp_path):
    file = tmp_path / "results.jsonl"
    write_geneval_results(file, dict.fromkeys(TAGS, 0.5))
    all_but_first = file.read_text().split("\n", 1)[1]
    for text, message in ((all_but_first, "3 to 4 images"), ("", "is empty"),
                          ("{}\n", "line 1 is not one of"), ("no\n", "line 1 is not one of")):
        file.write_text(text)
        with pytest.raises(FuseDiTError, match=message):
            command("geneval-score", file)


# The --res-path file as written by compute_dpg_bench.py of TencentQQGYLab/ELLA.
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
    result = read_json(tmp_path / "dpg.json")
    assert result["overall"] == 0.625
    assert result["categories"] == dict(entity=0.875, relation=0.9)
    low, high = result["intervals"]["overall"]             # from the means of two prompts
    assert 0 < low < 0.5
    assert 0.75 < high < 1
    table = capsys.readouterr().out
    assert "62.50" in table
    assert "2 of DPG-Bench's 1,065 prompts" in table
    assert result["num_prompts"] == 2


@pytest.mark.parametrize("text", [
    DPG.rsplit("DPG", 1)[0],                # without its last line
    DPG.rsplit("\n", 2)[1],                 # only its last line
    DPG.replace(", 0.75\n", ", x\n"),
    DPG.split("\n", 2)[2]])                 # without the prompts
def test_dpg_files_that_are_incomplete_or_wrong(tmp_path, text):
    (tmp_path / "dpg.txt").write_text(text)
    with pytest.raises(FuseDiTError, match="not a complete --res-path file of compute_dpg_bench"):
        command("dpg-score", tmp_path / "dpg.txt")


# ------------------------------------------------------------------------------ comparisons

def write_result(path, rights, speed=5.0):
    """Write a result of the shapes benchmark with these values, alternating two categories."""
    rows = []
    for k, right in enumerate(rights):
        rows.append(dict(category="ab"[k % 2], prompt=f"prompt {k}", right=right))
    path.write_text(json.dumps(results.make_result("shapes", rows, dict(images_per_s=speed))))


def compare_output(capsys, a, b):
    capsys.readouterr()
    command("compare", a, b)
    return capsys.readouterr().out


def test_compare_counts_prompts_and_tests_the_difference(tmp_path, capsys):
    rng = random.Random(0)
    rights_a = [int(rng.random() < 0.6) for _ in range(200)]
    rights_b = []
    for right in rights_a:
        if rng.random() < 0.3:
            right = 1
        rights_b.append(right)
    a = tmp_path / "a.json"
    b = tmp_path / "b.json"
    write_result(a, rights_a)
    write_result(b, rights_b)

    output = compare_output(capsys, a, b)
    assert f"{(sum(rights_b) - sum(rights_a)) / 200:+.3f}" in output
    assert "B is better" in output
    better = 0
    for line in output.splitlines():
        if "prompts better" in line:
            better += int(line.split(" prompts better")[0].split()[-1])
    assert better == sum(y > x for x, y in zip(rights_a, rights_b, strict=True))
    assert "A is better" in compare_output(capsys, b, a)
    assert "p = 1.0000: may be due to chance" in compare_output(capsys, a, a)

    write_result(tmp_path / "c.json", rights_a[:-1])
    with pytest.raises(FuseDiTError, match="do not have the same prompts"):
        command("compare", a, tmp_path / "c.json")
    (tmp_path / "c.json").write_text("[]")
    with pytest.raises(FuseDiTError, match="not a result of evaluate.py"):
        command("compare", a, tmp_path / "c.json")


# ------------------------------------------------------------------------------ the report

def write_model_folder(folder, rights, distance):
    """Write a folder with a result, a distance, a run.json and an unrelated file."""
    folder.mkdir()
    write_result(folder / "shapes.json", rights)
    (folder / "fid.json").write_text(json.dumps(dict(
        benchmark="distance", label="FID", distance=distance, kid=0.004, real=30, fake=30,
        folders=["photos/real", "fake"])))
    (folder / "run.json").write_text(json.dumps(dict(benchmark="shapes", images_per_s=7.5)))
    (folder / "other.json").write_text("{}")


@pytest.fixture
def models(tmp_path):
    """Two folders of results, a training run with a half-written last line, a GenEval result."""
    write_model_folder(tmp_path / "one", [1] * 9 + [0], 12.5)
    write_model_folder(tmp_path / "two", [1, 0] * 5, 10.25)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text(
        '{"step": 1, "images_per_s": 90.0}\n{"step": 2, "val_loss": 0.5, "images_per_s": 110.0}\n'
        '{"step": 3, "val_loss": 0.25}\n{"st')
    write_geneval_results(tmp_path / "results.jsonl", dict.fromkeys(TAGS, 0.5))
    command("geneval-score", tmp_path / "results.jsonl")
    return tmp_path


def read_table(text):
    """({column heading: its cells}, row headings) of a Markdown table."""
    rows = []
    for line in text.splitlines():
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    head, _, *body = rows
    columns = {}
    for i, name in enumerate(head):
        columns[name] = [row[i] for row in body]
    models = columns.pop("")
    return columns, models


def test_the_report_contains_all_results_of_all_models(models, capsys):
    capsys.readouterr()
    command("report", f"first={models / 'one'}", f"first={models / 'run'}",
            f"second={models / 'two'}", f"second={models / 'geneval.json'}", "--out",
            models / "results.md")
    text = (models / "results.md").read_text()
    assert text in capsys.readouterr().out
    table, names = read_table(text)
    assert names == ["first", "second"]
    assert table["FID, real, 30 and 30 ↓"] == ["12.5", "**10.25**"]
    scores = [cell.split(" [")[0] for cell in table["shapes, 10 prompts ↑"]]
    assert scores == ["**0.9", "0.5"]
    assert table["validation loss ↓"] == ["0.25", ""]
    assert table["training, images/s ↑"] == ["110", ""]
    assert table["sampling, images/s (shapes) ↑"] == ["**7.5**"] * 2
    assert table["GenEval, 110 prompts ↑"][0] == ""
    assert Image.open(models / "results.png").width > 1000


def test_the_report_tells_a_part_of_dpg_bench_from_all_of_it(tmp_path, capsys):
    result = dict(benchmark="dpg", overall=0.5, categories=dict(entity=0.5),
                  intervals=dict(overall=[0.4, 0.6]))
    for name, count in (("part", 100), ("whole", 1065), ("old", None)):
        if count is not None:               # an earlier version did not store it
            result["num_prompts"] = count
        else:
            del result["num_prompts"]
        (tmp_path / f"{name}.json").write_text(json.dumps(result))
    command("report", *tmp_path.glob("*.json"), "--out", tmp_path / "r.md")
    header = capsys.readouterr().out.splitlines()[0]
    columns = {cell.strip() for cell in header.strip("|").split("|")[1:]}
    assert columns == {"DPG-Bench ↑", "DPG-Bench, 100 prompts ↑"}


def test_what_the_report_refuses(models):
    out = models / "r.md"
    with pytest.raises(FuseDiTError, match="has a different value of 'FID, real, 30 and 30'"):
        command("report", f"x={models / 'one'}", f"x={models / 'two'}", "--out", out)
    (models / "nothing").mkdir()
    with pytest.raises(FuseDiTError, match="no results found"):
        command("report", models / "nothing", "--out", out)
    with pytest.raises(FuseDiTError, match="cannot read"):
        command("report", models / "none.json", "--out", out)
    with pytest.raises(FuseDiTError, match="the table must be a .md file"):
        command("report", models / "one", "--out", models / "r.png")
    (models / "bad.json").write_text('{"benchmark": "shapes", "overall": 1}')
    with pytest.raises(FuseDiTError, match="not a result"):
        command("report", models / "bad.json", "--out", out)
