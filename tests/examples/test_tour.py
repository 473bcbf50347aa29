"""The notebook examples/tour.ipynb and the README's Python snippet run and show what they claim.

    python tests/examples/test_tour.py        run the notebook and store its new outputs
"""
import base64
import io
import os
import re
import textwrap

import nbformat
import numpy as np
import pytest
import torch
from conftest import ROOT
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from PIL import Image

NOTEBOOK = ROOT / "examples" / "tour.ipynb"
MINUTES = 10                                # for a cell that usually takes seconds
IMAGES = {"draw", "steps", "attention", "tokens", "layers", "guidance", "scene"}    # ids of cells
NUMBER = re.compile(r"\d+\.\d+")


def read():
    return nbformat.read(NOTEBOOK, as_version=4)


def execute(notebook):
    """The notebook with new outputs. A cell that fails is an error."""
    # With no folders to search, the kernel is that of this Python, whatever else is installed.
    specs = KernelSpecManager(kernel_dirs=[])
    kernel = AsyncKernelManager(kernel_name="python3", kernel_spec_manager=specs)
    client = NotebookClient(notebook, km=kernel, timeout=60 * MINUTES, record_timing=False,
                            startup_timeout=60 * MINUTES, coalesce_streams=True)
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return client.execute(cwd=NOTEBOOK.parent, env=os.environ | {"PYTHONPATH": paths})


def without_noise(notebook):
    """The notebook without what would change from one run or machine to the next."""
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type != "code":
            continue
        # Warnings depend on what else is installed, such as ipywidgets.
        cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
        for output in cell.outputs:
            output.get("data", {}).pop("image/jpeg", None)  # Pillow offers images as JPEG as well
    notebook.metadata["language_info"] = {"name": "python"}             # no version
    return notebook


def code(notebook):
    return {cell.id: cell for cell in notebook.cells if cell.cell_type == "code"}


def printed(cell):
    return "".join(output.text for output in cell.outputs if output.get("name") == "stdout")


def images(cell):
    """The images that a cell shows, as arrays [H,W,3]."""
    shown = [output.data["image/png"] for output in cell.outputs if "data" in output]
    opened = [Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB") for png in shown]
    return [np.asarray(image, np.float32) for image in opened]


def loss_table(cell):
    """{caption: losses by noise level} of the notebook's last table."""
    rows = [line.split() for line in printed(cell).splitlines()]
    return {name: [float(word) for word in words] for name, *words in rows}


@pytest.fixture(scope="module")
def stored():
    return read()


# ---- the notebook as it is stored ----------------------------------------------------------------

def test_it_is_stored_with_its_outputs(stored):
    cells = list(code(stored).values())
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert all(cell.outputs for cell in cells)
    kinds = {output.output_type for cell in cells for output in cell.outputs}
    assert kinds <= {"stream", "display_data", "execute_result"}
    assert {name for name, cell in code(stored).items() if images(cell)} == IMAGES


def test_it_is_stored_without_noise(stored):
    assert NOTEBOOK.stat().st_size < 400_000
    text = NOTEBOOK.read_text(encoding="utf-8")
    assert nbformat.writes(without_noise(read())) + "\n" == text


def test_it_is_readable(stored):
    kinds = [cell.cell_type for cell in stored.cells]
    assert kinds == ["markdown", "code"] * (len(kinds) // 2) + ["markdown"]
    for cell in stored.cells:
        assert all(len(line) <= 100 for line in cell.source.splitlines()), cell.source


def test_its_links_lead_somewhere(stored):
    text = "\n".join(cell.source for cell in stored.cells if cell.cell_type == "markdown")
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", text)
    assert len(links) >= 6
    missing = [link for link in links if not (NOTEBOOK.parent / link).exists()]
    assert missing == []


# ---- the notebook as it runs ---------------------------------------------------------------------

@pytest.mark.timeout(2 * 60 * MINUTES)
def test_it_runs_and_shows_what_is_stored(stored):
    """A single test, because the processes of pytest-xdist would each run the notebook."""
    executed = code(execute(read()))
    for name, cell in code(stored).items():
        assert_same_text(name, printed(executed[name]), printed(cell))
    for name in IMAGES:
        (got,) = images(executed[name])
        (want,) = images(code(stored)[name])
        assert got.shape == want.shape, name
        assert np.abs(got - want).mean() < 2, name          # of 255; another CPU rounds otherwise
    assert_the_right_caption_fits(loss_table(executed["loss"]))


def assert_same_text(name, got, want):
    """The same words, and decimal numbers that are close."""
    assert NUMBER.sub("#", got) == NUMBER.sub("#", want), name
    got = [float(number) for number in NUMBER.findall(got)]
    want = [float(number) for number in NUMBER.findall(want)]
    assert got == pytest.approx(want, rel=0.03, abs=0.002), name


def assert_the_right_caption_fits(table):
    """At every noise level the right caption has the lowest loss."""
    assert len(table["right"]) == len(table["sigma"]) == 6
    assert max(table["right"]) < 0.1
    assert (np.array(table["right"]) < table["wrong"]).all()
    assert (np.array(table["right"]) < table["empty"]).all()


def test_it_finds_the_demo_from_the_root(stored, monkeypatch):
    """The kernel above runs in examples/, as Jupyter's does. An editor's may run in the root."""
    monkeypatch.chdir(ROOT)
    with torch.enable_grad():               # restores the mode, which the cell changes
        exec(code(stored)["load"].source, {})


# ---- the README's snippet ------------------------------------------------------------------------

def readme_snippet():
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)
    (snippet,) = [block for block in blocks if "load_model" in block]
    return snippet


def test_the_snippet_of_the_readme_is_short():
    lines = [line for line in readme_snippet().splitlines() if line.strip()]
    assert 8 <= len(lines) <= 12
    assert all(len(line) <= 100 for line in lines)


def test_the_snippet_of_the_readme_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)             # anywhere, after `pip install -e .`
    names = {}
    exec(textwrap.dedent(readme_snippet()), names)
    assert capsys.readouterr().out == "torch.Size([2, 2, 10, 64])\n"
    assert len(names["steps"]) == 25
    assert [image.size for image in names["images"]] == [(32, 32), (32, 32)]
    (saved,) = tmp_path.glob("*.png")
    with Image.open(saved) as image:
        assert len(image.getcolors(10**6)) > 3
    loss = names["loss"]
    assert loss.shape == (2,)
    assert loss.isfinite().all()
    assert loss.max() < 0.2                 # the images fit their prompts


if __name__ == "__main__":
    nbformat.write(without_noise(execute(read())), NOTEBOOK)
