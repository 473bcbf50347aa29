"""What DESIGN says of style: short lines and functions, imports, no machine's paths.

Every rule is a function of source text, so that the last test can plant a fault for each.
"""
import ast
import io
import re
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DEMO_BYTES = 12_000_000
LINE, FUNCTION = 100, 50
PURE = {"torch", "safetensors"} | set(sys.stdlib_module_names)
LATE = {"transformers", "huggingface_hub"}        # allowed where it is used, inside a function
BACKENDS = ("torch.distributed", "torch_xla", "deepspeed", "diffusers")
MACHINE_PATH = re.compile(r"(?<![\w.~-])/(?:work|root|home)/")  # not part of a URL or longer path

WHERE = "*.py", "fusedit_lib/**/*.py", "tests/**/*.py"
SOURCES = sorted(p.relative_to(ROOT).as_posix() for where in WHERE for p in ROOT.glob(where))


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


# ------------------------------------------------------------------------------ rules

def long_lines(source):
    return [i for i, line in enumerate(source.splitlines(), 1) if len(line) > LINE]


def long_functions(source):
    return [f"{f.name}: {f.end_lineno - f.lineno + 1} lines" for f in ast.walk(ast.parse(source))
            if isinstance(f, ast.FunctionDef | ast.AsyncFunctionDef)
            and f.end_lineno - f.lineno >= FUNCTION]


def imports(node, late=False):
    """(dotted name, is it inside a function) of every import; relative ones start with a dot."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from ((alias.name, late) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            base = "." * child.level + (child.module or "")
            yield from ((f"{base}.{alias.name}", late) for alias in child.names)
        inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        yield from imports(child, late or inside)


def wrong_imports(source, ours=()):
    """Imports beyond torch, safetensors, the standard library and the named files of ours."""
    found = imports(ast.parse(source))
    return [name for name, late in found
            if name.split(".")[0] not in PURE | set(ours) | (LATE if late else set())]


def backends(source):
    """Names of a training backend, imported or reached through torch."""
    tree = ast.parse(source)
    names = [name for name, _ in imports(tree)]
    names += [ast.unparse(n) for n in ast.walk(tree) if isinstance(n, ast.Attribute)]
    return [name for name in names if any(f"{name}.".startswith(f"{b}.") for b in BACKENDS)]


def explained(source):
    """The share of lines that hold a comment or belong to a docstring."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    lines = {t.start[0] for t in tokens if t.type == tokenize.COMMENT}
    for node in ast.walk(ast.parse(source)):
        documented = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        if documented and ast.get_docstring(node):
            lines |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return len(lines) / len(source.splitlines())


# ------------------------------------------------------------------------------ the repository

@pytest.mark.parametrize("name", SOURCES)
def test_lines_and_functions_are_short(name):
    lines, functions = long_lines(read(name)), long_functions(read(name))
    assert not lines and not functions


def test_the_method_needs_only_torch():
    method, vae = read("fusedit.py"), read("fusedit_lib/vae.py")
    assert wrong_imports(method) == [] == wrong_imports(vae, ours=("fusedit", "fusedit_lib"))


@pytest.mark.parametrize("name", ["fusedit.py", "fusedit_lib/vae.py", "fusedit_lib/pretrained.py"])
def test_the_method_knows_no_backend(name):
    source = read(name)
    assert backends(source) == []


def test_the_method_is_explained():
    share = explained(read("fusedit.py"))
    assert 0.15 <= share <= 0.40


def test_the_demo_is_small():
    files = [p for p in (ROOT / "demo").rglob("*") if p.is_file() and p.suffix != ".pyc"]
    assert files and sum(p.stat().st_size for p in files) < DEMO_BYTES


def test_the_readme_shows_the_house_as_it_is():
    """Every program and every file and folder of fusedit_lib, and nothing that is not there."""
    tree = re.search(r"^## Files\n+```\n(.*?)```", read("README.md"), re.M | re.S)[1]
    shown = re.findall(r"^(  )?([\w/]+(?:\.py)?/?)  ", tree, re.M)
    inside = {name for indent, name in shown if indent}
    there = {p.name + "/" * p.is_dir() for p in (ROOT / "fusedit_lib").iterdir()
             if p.name[:2] != "__"}
    assert inside == there
    assert {name for indent, name in shown if not indent and name.endswith(".py")} == {
        p.name for p in ROOT.glob("*.py")}
    for indent, name in shown:
        assert indent or (ROOT / name).exists(), name


def test_no_path_of_a_machine():
    run = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True)
    if run.returncode:
        pytest.skip("not a git checkout")
    found = []
    for name in filter(None, run.stdout.decode().split("\0")):
        try:
            text = read(name)
        except (UnicodeDecodeError, FileNotFoundError):       # not text, or deleted just now
            continue
        found += [f"{name}: {line.strip()[:80]}" for line in text.splitlines()
                  if MACHINE_PATH.search(line)]
    assert not found


# ------------------------------------------------------------------------------ the rules bite

PLANTED = {
    "long line": (long_lines, f"x = '{'y' * LINE}'"),
    "long function": (long_functions, "def f():\n" + "    x = 1\n" * FUNCTION),
    "long method": (long_functions, "class A:\n def f(self):\n" + "  x = 1\n" * FUNCTION),
    "ours": (wrong_imports, "from vae import VAE"),
    "ours, late": (wrong_imports, "def f():\n    import training"),
    "relative": (wrong_imports, "from . import vae"),
    "early transformers": (wrong_imports, "import transformers"),
    "early, hidden": (wrong_imports, "try:\n    import huggingface_hub\nexcept E:\n    pass"),
    "early, in a class": (wrong_imports, "class A:\n    import transformers"),
    "numpy": (wrong_imports, "import json, numpy as np"),
    "diffusers, late": (backends, "def f():\n    from diffusers import AutoencoderKL"),
    "deepspeed": (backends, "import deepspeed.ops"),
    "distributed from": (backends, "from torch import distributed as dist"),
    "distributed used": (backends, "import torch\ntorch.distributed.barrier()"),
    "machine": (MACHINE_PATH.search, "data = '" + "/".join(["", "work", "main"]) + "'"),
}
INNOCENT = ["import torch.nn as nn\nfrom safetensors import safe_open\nimport json, math",
            "def f():\n    from transformers import AutoTokenizer\n    import huggingface_hub",
            f"x = '{'y' * (LINE - 6)}'", "def f():\n" + "    x = 1\n" * (FUNCTION - 1),
            "url = 'https://example.org" + "/".join(["", "home", "x'"])]


@pytest.mark.parametrize("case", PLANTED)
def test_a_planted_fault_is_found(case):
    rule, source = PLANTED[case]
    assert rule(source)


def test_what_is_allowed_is_not_found():
    for source in INNOCENT:
        for rule in (long_lines, long_functions, wrong_imports, backends, MACHINE_PATH.search):
            assert not rule(source), (rule, source)
    assert explained('"""A."""\n# b\nx = 1  # c\ny = 1\n') == 0.75
    assert explained("x = 'not # one'\n") == 0
