"""The rules of style, as functions of source text; the last tests plant a fault for each."""
import ast
import io
import re
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DEMO_BYTES = 12_000_000                     # demo/ without emoji/
EMOJI_BYTES = 26_000_000                    # demo/emoji/: a DiT of 24 MB and its autoencoder
LINE = 100                                        # characters
FUNCTION = 50                                     # lines
TOKENS = 12.5                                     # per code line; of fusedit.py METHOD_TOKENS
METHOD_TOKENS = 11.5
METHOD_WIDE = 0.12                                # share of fusedit.py's lines over 90 characters
METHOD_PARALLEL = 11                              # its assignments such as  a, b = x, y
METHOD_CONDITIONAL = 13                           # its expressions such as  x if c else y

PURE = {"torch", "safetensors"} | set(sys.stdlib_module_names)
LATE = {"transformers", "huggingface_hub"}        # allowed where they are used, inside a function
BACKENDS = ("torch.distributed", "torch_xla", "deepspeed", "diffusers")
MACHINE_PATH = re.compile(r"(?<![\w.~-])/(?:work|root|home)/")  # not part of a URL or longer path

# Imports point down: a module may import those of lower levels, and its neighbours in a folder.
LEVELS = {
    "fusedit": 0, "fusedit_lib.threads": 0, "fusedit_lib.seeds": 0, "fusedit_lib.shapes": 2,
    "fusedit_lib.files": 1, "fusedit_lib.backend": 1, "fusedit_lib.published": 2,
    "fusedit_lib.lora": 2, "fusedit_lib.gemma_package": 2, "fusedit_lib.folders": 3,
    "fusedit_lib.pretrained": 4, "fusedit_lib.vae": 4,
    "fusedit_lib.export": 5, "fusedit_lib.cli": 5, "fusedit_lib.sampling": 6, "fusedit_lib.data": 7,
    "fusedit_lib.offload": 7,
    "fusedit_lib.train": 8, "fusedit_lib.evaluation": 8,
}
PROGRAM = 9                                       # the level of a file at the root
FOLDERS = "fusedit_lib", "demo", "docs", "examples", "benchmarks", "tests"

# Names that an earlier version used and that must not return: as identifiers, and as words in
# comments, help and logs.
LEFT_OUT_NAMES = set(
    "attend rotate turns image_turns sine sine_table Blocks random_sigma train_sigmas "
    "upto reads saw stepped look look_at said painter sheet picture pictures".split())
LEFT_OUT_WORDS = re.compile(r"\b(pictures?|painters?|goes on|pictures a step)\b", re.I)

# Words that open a riddle. A docstring says what a thing is or does instead.
RIDDLE = re.compile(r"(What|Of|Those|Whether|How)\b")

# These files contain the words of the demo's captions, such as "a picture of a star".
GRAMMAR = "fusedit_lib/shapes/scenes.py", "fusedit_lib/shapes/training_text.py"

WHERE = "*.py", "fusedit_lib/**/*.py", "tests/**/*.py", "benchmarks/**/*.py", "examples/**/*.py"
SOURCES = sorted(p.relative_to(ROOT).as_posix() for pattern in WHERE for p in ROOT.glob(pattern))
HOUSE = [name for name in SOURCES if "/" not in name or name.startswith("fusedit_lib/")]


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


# ---- rules ---------------------------------------------------------------------------------------

def long_lines(source):
    return [i for i, line in enumerate(source.splitlines(), 1) if len(line) > LINE]


def long_functions(source):
    found = []
    for f in ast.walk(ast.parse(source)):
        if isinstance(f, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = f.end_lineno - f.lineno + 1
            if lines > FUNCTION:
                found.append(f"{f.name}: {lines} lines")
    return found


def docstring_lines(source):
    """The numbers of the lines that belong to docstrings."""
    lines = set()
    for node in ast.walk(ast.parse(source)):
        documented = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        if documented and ast.get_docstring(node):
            lines |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return lines


def riddles(source):
    """The docstrings that begin with a word of RIDDLE."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            docstring = ast.get_docstring(node) or ""
            if RIDDLE.match(docstring):
                found.append(docstring.splitlines()[0])
    return found


def code_tokens(source):
    """The tokens of code: no comments, no docstrings, no line ends and indents."""
    layout = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
              tokenize.ENDMARKER}
    documented = docstring_lines(source)
    return [t for t in tokenize.generate_tokens(io.StringIO(source).readline)
            if t.type not in layout and t.start[0] not in documented]


def code_lines(source):
    lines = set()
    for token in code_tokens(source):
        lines |= set(range(token.start[0], token.end[0] + 1))
    return lines


def tokens_per_line(source):
    lines = code_lines(source)
    return len(code_tokens(source)) / len(lines) if lines else 0


def wide_share(source):
    """The share of code lines that have more than 90 characters."""
    lines = code_lines(source)
    text = source.splitlines()
    return sum(len(text[n - 1]) > 90 for n in lines) / len(lines)


def parallel_assignments(source):
    """Line numbers of assignments such as  a, b = x, y"""
    return [node.lineno for node in ast.walk(ast.parse(source))
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple)
            and any(isinstance(target, ast.Tuple) for target in node.targets)]


def conditional_expressions(source):
    return [n.lineno for n in ast.walk(ast.parse(source)) if isinstance(n, ast.IfExp)]


def explained(source):
    """The share of lines that hold a comment or belong to a docstring."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    lines = {t.start[0] for t in tokens if t.type == tokenize.COMMENT}
    return len(lines | docstring_lines(source)) / len(source.splitlines())


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
    found = []
    for name, late in imports(ast.parse(source)):
        allowed = PURE | set(ours)
        if late:
            allowed |= LATE
        if name.split(".")[0] not in allowed:
            found.append(name)
    return found


def backends(source, names=BACKENDS):
    """Names of a training backend, imported or reached through torch."""
    tree = ast.parse(source)
    found = [name for name, _ in imports(tree)]
    found += [ast.unparse(n) for n in ast.walk(tree) if isinstance(n, ast.Attribute)]
    return [name for name in found if any(f"{name}.".startswith(f"{b}.") for b in names)]


def left_out_names(source):
    return sorted({t.string for t in code_tokens(source)
                   if t.type == tokenize.NAME and t.string in LEFT_OUT_NAMES})


def left_out_words(source):
    return LEFT_OUT_WORDS.findall(source)


# ---- which way imports point ---------------------------------------------------------------------

def module_of(name):
    """The dotted module of a file: fusedit_lib/data/order.py is fusedit_lib.data.order."""
    return name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


MODULES = {module_of(name) for name in HOUSE}


def folder_of(module):
    """The folder of fusedit_lib that a module is in, or the module itself."""
    parts = module.split(".")
    return ".".join(parts[:2])


def level(module):
    if "." not in module and module != "fusedit":
        return PROGRAM
    return LEVELS[folder_of(module)]


def our_imports(source):
    """(module of ours, name imported from it or "", is it inside a function)."""
    for dotted, late in imports(ast.parse(source)):
        for end in range(dotted.count(".") + 1, 0, -1):
            module = ".".join(dotted.split(".")[:end])
            if module in MODULES:
                yield module, dotted[len(module) + 1:], late
                break


def wrong_directions(source, module):
    """The imports of a module of ours that are not allowed, each with the reason."""
    found = []
    for imported, name, late in our_imports(source):
        if imported == "fusedit_lib":
            continue
        neighbours = folder_of(imported) == folder_of(module) and "." in module
        if late:
            found.append(f"{imported}: imported late")
        if not neighbours and level(imported) >= level(module):
            found.append(f"{imported}: not below {module}")
        if name.startswith("_"):
            found.append(f"{imported}.{name}: private")
    return found


def cycles(graph):
    """Modules from which imports lead back to themselves. graph: {module: modules it imports}."""
    def reachable(start):
        seen = set()
        todo = list(graph.get(start, ()))
        while todo:
            module = todo.pop()
            if module not in seen:
                seen.add(module)
                todo += graph.get(module, ())
        return seen
    return sorted(module for module in graph if module in reachable(module))


# ---- the repository ------------------------------------------------------------------------------

@pytest.mark.parametrize("name", SOURCES)
def test_lines_and_functions_are_short(name):
    source = read(name)
    assert not long_lines(source)
    assert not long_functions(source)


@pytest.mark.parametrize("name", SOURCES)
def test_code_is_not_packed(name):
    assert tokens_per_line(read(name)) <= TOKENS


def test_the_method_reads_like_its_models():
    """The limits lie between the figures of nanoGPT, DiT, flux, gpt-fast and others."""
    source = read("fusedit.py")
    assert tokens_per_line(source) <= METHOD_TOKENS
    assert wide_share(source) <= METHOD_WIDE
    assert len(parallel_assignments(source)) <= METHOD_PARALLEL
    assert len(conditional_expressions(source)) <= METHOD_CONDITIONAL
    assert 0.15 <= explained(source) <= 0.35


def test_the_method_needs_only_torch():
    assert wrong_imports(read("fusedit.py")) == []
    assert wrong_imports(read("fusedit_lib/vae.py"), ours=("fusedit", "fusedit_lib")) == []


@pytest.mark.parametrize("name", ["fusedit.py", "fusedit_lib/vae.py", "fusedit_lib/pretrained.py"])
def test_the_method_imports_no_backend(name):
    assert backends(read(name)) == []


@pytest.mark.parametrize("name", HOUSE)
def test_each_backend_stays_in_its_own_files(name):
    allowed = {"fusedit_lib/train/xla.py": ("torch_xla",), "train_tpu.py": ("torch_xla",),
               "fusedit_lib/train/zero.py": ("deepspeed",), "train_gpu.py": ("deepspeed",)}
    others = {"torch_xla", "deepspeed", "diffusers"} - set(allowed.get(name, ()))
    assert backends(read(name), others) == []


@pytest.mark.parametrize("name", HOUSE)
def test_imports_point_down(name):
    assert wrong_directions(read(name), module_of(name)) == []


def test_there_are_no_import_cycles():
    graph = {}
    for name in HOUSE:
        imported = {module for module, _, _ in our_imports(read(name))}
        graph[module_of(name)] = imported - {"fusedit_lib"}
    assert len(graph) > 30
    assert cycles(graph) == []


@pytest.mark.parametrize("name", HOUSE)
def test_left_out_names_and_words_do_not_occur(name):
    source = read(name)
    assert left_out_names(source) == []
    if name not in GRAMMAR:
        assert left_out_words(source) == []


def test_the_demos_are_small():
    files = [p for p in (ROOT / "demo").rglob("*") if p.is_file()]
    assert files
    assert all(p.suffix != ".py" for p in files)
    emoji = [p for p in files if "emoji" in p.parts]
    assert sum(p.stat().st_size for p in emoji) < EMOJI_BYTES
    assert sum(p.stat().st_size for p in set(files) - set(emoji)) < DEMO_BYTES


def test_the_readme_lists_what_is_there():
    """It lists every program and every folder, at the root and in fusedit_lib, and no others."""
    tree = re.search(r"^## What is where\n+```\n(.*?)```", read("README.md"), re.M | re.S)[1]
    shown = re.findall(r"^(  )?([\w/]+(?:\.py)?)  ", tree, re.M)
    outer = {name for indent, name in shown if not indent}
    inner = {name for indent, name in shown if indent}
    programs = {p.name for p in ROOT.glob("*.py")}
    assert len(programs) == 6
    assert outer == programs | {f"{folder}/" for folder in FOLDERS}
    assert inner == {f"{p.name}/" for p in (ROOT / "fusedit_lib").iterdir()
                     if p.is_dir() and not p.name.startswith("__")}
    assert all((ROOT / folder).is_dir() for folder in FOLDERS)


def test_there_are_no_machine_paths():
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


@pytest.mark.parametrize("name", SOURCES)
def test_docstrings_say_what_a_thing_is(name):
    assert riddles(read(name)) == []


# ---- the rules bite ------------------------------------------------------------------------------

def directions_of_data(source):
    return wrong_directions(source, "fusedit_lib.data.order")


def packed(source):
    return tokens_per_line(source) > TOKENS


PLANTED = {
    "long line": (long_lines, f"x = '{'y' * LINE}'"),
    "long function": (long_functions, "def f():\n" + "    x = 1\n" * FUNCTION),
    "long method": (long_functions, "class A:\n def f(self):\n" + "  x = 1\n" * FUNCTION),
    "packed": (packed, "a, b, c = f(x, y), [g(z) for z in (1, 2)], {k: v}"),
    "wide": (lambda source: wide_share(source) > METHOD_WIDE, f"x = 1\ny = '{'z' * 90}'"),
    "parallel": (parallel_assignments, "a, b = 1, 2"),
    "conditional": (conditional_expressions, "x = [1 if a else 2 for a in b]"),
    "ours": (wrong_imports, "from fusedit_lib.vae import VAE"),
    "ours, late": (wrong_imports, "def f():\n    import fusedit_lib"),
    "relative": (wrong_imports, "from . import vae"),
    "early transformers": (wrong_imports, "import transformers"),
    "early, hidden": (wrong_imports, "try:\n    import huggingface_hub\nexcept E:\n    pass"),
    "early, in a class": (wrong_imports, "class A:\n    import transformers"),
    "numpy": (wrong_imports, "import json, numpy as np"),
    "diffusers, late": (backends, "def f():\n    from diffusers import AutoencoderKL"),
    "deepspeed": (backends, "import deepspeed.ops"),
    "distributed from": (backends, "from torch import distributed as dist"),
    "distributed used": (backends, "import torch\ntorch.distributed.barrier()"),
    "up": (directions_of_data, "from fusedit_lib.train.config import RunConfig"),
    "up, the module": (directions_of_data, "from fusedit_lib.train import plan"),
    "a program": (directions_of_data, "import sample"),
    "a program's name": (directions_of_data, "from train_gpu import train"),
    "late": (directions_of_data, "def f():\n    from fusedit_lib.files import atomic_write"),
    "private": (directions_of_data, "from fusedit_lib.files import _secret"),
    "cycle": (cycles, {"a": {"b"}, "b": {"c"}, "c": {"a"}}),
    "self": (cycles, {"a": {"a"}}),
    "old name": (left_out_names, "x = attend(q, k)"),
    "riddle": (riddles, 'def f():\n    """Whether it is done."""'),
    "old word": (left_out_words, "# draws a picture"),
    "machine": (MACHINE_PATH.search, "data = '" + "/".join(["", "work", "main"]) + "'"),
}
INNOCENT = ["import torch.nn as nn\nfrom safetensors import safe_open\nimport json, math",
            "def f():\n    from transformers import AutoTokenizer\n    import huggingface_hub",
            f"x = '{'y' * (LINE - 20)}'", "def f():\n" + "    x = 1\n" * (FUNCTION - 1),
            "url = 'https://example.org" + "/".join(["", "home", "x'"])]


@pytest.mark.parametrize("case", PLANTED)
def test_a_planted_fault_is_found(case):
    rule, source = PLANTED[case]
    assert rule(source)


def test_what_is_allowed_is_not_reported():
    rules = (long_lines, long_functions, packed, wrong_imports, backends, left_out_names,
             left_out_words, MACHINE_PATH.search)
    for source in INNOCENT:
        for rule in rules:
            assert not rule(source), (rule, source)
    assert not directions_of_data("import fusedit\nfrom fusedit_lib.files import atomic_write\n"
                                  "from fusedit_lib.data.shards import read_index")
    assert not cycles({"a": {"b", "c"}, "b": {"c"}})
    assert explained('"""A."""\n# b\nx = 1  # c\ny = 1\n') == 0.75
    assert explained("x = 'not # one'\n") == 0
    assert tokens_per_line('"""A."""\n# b\nx = 1  # c\nf(\n  y)\n') == 7 / 3
