"""README and docs: links, paths, flags, presets and whole command lines.

Every rule is a function of a document's Markdown that returns its faults; the last tests plant a
fault for each. Command lines are parsed by the parsers of the programs themselves.
"""
import argparse
import ast
import contextlib
import functools
import importlib
import inspect
import io
import itertools
import json
import re
import runpy
import sys
from dataclasses import asdict, fields
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import pytest
import torch
from conftest import ROOT

import fusedit
from fusedit import PRESETS, FuseDiT, FuseDiTConfig, FuseDiTError, GemmaConfig
from fusedit_lib import cli
from fusedit_lib.train import hardware
from fusedit_lib.train.config import RunConfig, model_config
from fusedit_lib.train.flags import flag_name, join_mesh, parse_run

README_LINES = range(180, 231)

WHERE = ("README.md", "docs/*.md", "benchmarks/**/*.md", "examples/*.md", "examples/*.ipynb",
         "examples/*.py")
DOCS = sorted(p.relative_to(ROOT).as_posix() for pattern in WHERE for p in ROOT.glob(pattern))
GLOSSARY = "docs/glossary.md"

PROGRAMS = sorted(p.relative_to(ROOT).as_posix()
                  for pattern in ("*.py", "benchmarks/*.py", "examples/*.py")
                  for p in ROOT.glob(pattern)) + ["fusedit_lib/train/plot.py"]
LAUNCHERS = ("python", "python3", "deepspeed", "torchrun", "bash", "sh")
WRAPPERS = ("nohup", "time", "exec", "sudo", "env", "nice", "do", "then", "else", "{", "!")

# Flags of other programs that the text may mention.
OTHER_FLAGS = set(
    "--hostfile --include --ipc --nproc-per-node --nnodes --shutdown-timeout "    # launchers
    "--accelerator-type --command --force --runtime-version --spot --worker --zone "  # gcloud
    "--index-url --no-deps "                                                      # pip
    "--res-path --outfile "                                                       # scorers
    "--dist --maxprocesses "                                                      # pytest
    "--guidance_scale".split())                                     # the published inference.py
MADE = ("benchmarks/gpu/whl", "demo/gemma")     # files that a command makes, or a name in help

# Files of the published code, and their lengths at commit 5e6431a.
PUBLISHED = {"models.py": 938, "modules.py": 306, "trainers.py": 661, "pipelines.py": 851,
             "data.py": 263, "configs.py": 75, "inference.py": 34, "utils/save_pipeline.py": 91}


# ---- Markdown ------------------------------------------------------------------------------------

def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


def markdown(name):
    """A document as Markdown: for a notebook, its cells; for a program, its docstring."""
    text = read(name)
    if name.endswith(".py"):
        return docstring_markdown(ast.get_docstring(ast.parse(text)) or "")
    if name.endswith(".ipynb"):
        return "\n".join(map(cell_markdown, json.loads(text)["cells"]))
    return text


def docstring_markdown(docstring):
    """A docstring whose indented lines are commands; what each does follows after a gap."""
    lines = []
    for line in docstring.splitlines():
        if line.startswith("    "):
            command = re.split(r"\s{3,}", line.strip())[0]
            line = f"```bash\n{command}\n```"
        lines.append(line)
    return "\n".join(lines)


def cell_markdown(cell):
    source = "".join(cell["source"])
    if cell["cell_type"] == "markdown":
        return source + "\n"
    shell = [line.lstrip("!% ") for line in source.splitlines() if line.startswith("!")]
    python = [line for line in source.splitlines() if not line.startswith(("!", "%"))]
    return "\n".join(["```bash", *shell, "```", "```python", *python, "```", ""])


FENCE = re.compile(r"^( *)```+[ ]*(\w*)[^\n]*\n(.*?)^\1```+ *$", re.M | re.S)
SPAN = re.compile(r"(?<!`)(`+)(?!`)(.+?)(?<!`)\1(?!`)", re.S)


class Block(NamedTuple):
    """A fenced code block."""
    language: str
    code: str


def blocks(text):
    return [Block(language, code) for _, language, code in FENCE.findall(text)]


def prose(text):
    return FENCE.sub("", text)


def spans(text):
    """The inline code of the prose."""
    return [" ".join(code.split()) for _, code in SPAN.findall(prose(text))]


def all_code(text):
    """Code blocks, with continued lines joined, and inline code."""
    return [block.code.replace("\\\n", " ") for block in blocks(text)] + spans(text)


def slug(heading):
    """GitHub's anchor of a heading."""
    heading = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", heading)
    heading = re.sub(r"[^\w\- ]", "", heading.replace("*", "").strip().lower())
    return heading.replace(" ", "-")


def anchors(text):
    """The anchors of all headings; a repeated one gets a number."""
    found = []
    for heading in re.findall(r"^#{1,6} +(.+?) *#*$", prose(text), re.M):
        found.append(slug(heading))
    numbered = set()
    for i, name in enumerate(found):
        repeats = found[:i].count(name)
        numbered.add(f"{name}-{repeats}" if repeats else name)
    return numbered


def links(text):
    """The targets of links and images."""
    plain = SPAN.sub("", prose(text))
    found = re.findall(r"\]\(\s*<?([^)\s>]+)", plain)
    found += re.findall(r"(?:src|href)=[\"']([^\"']+)", plain)
    return found + re.findall(r"^\[[^\]]+\]:\s*(\S+)", plain, re.M)


class Table(NamedTuple):
    """A table of Markdown."""
    header: list
    rows: list

    def column(self, name):
        i = self.header.index(name)
        return [row[i] for row in self.rows]


def tables(text):
    found = []
    for lines in re.findall(r"(?:^\|.*\|\n)+", prose(text) + "\n", re.M):
        cells = [[cell.strip() for cell in line.strip().strip("|").split("|")]
                 for line in lines.splitlines()]
        found.append(Table(cells[0], cells[2:]))
    return found


# ---- command lines -------------------------------------------------------------------------------

TOKEN = re.compile(r"""
    (?P<join> \\\n) | (?P<newline> \n) | (?P<blank> [ \t]+) | (?P<comment> \#[^\n]*)
    | (?P<redirection> \d*&?[<>]+&?) | (?P<operator> [;&|()]+)
    | (?P<word> (?: '[^']*' | "(?:\\.|[^"\\])*" | \\[^\n] | [^\s;&|()<>'"\\] )+ )
    """, re.X | re.S)
PARTS = re.compile(r"""'([^']*)'|"((?:\\.|[^"\\])*)"|\\(.)|([^'"\\]+)""", re.S)
ASSIGNMENT = re.compile(r"(\w+)=(.*)", re.S)


def simple_commands(script):
    """The commands of a shell script, as lists of words that still have their quotes.

    Comments and redirections are left out; continued lines are joined.
    """
    found = [[]]
    before = ""
    for match in TOKEN.finditer(script):
        kind = match.lastgroup
        if kind == "blank":
            continue
        if kind == "word" and before != "redirection":
            found[-1].append(match[0])
        elif kind in ("operator", "newline"):
            found.append([])
        before = kind
    return [words for words in found if words]


def unquote(word):
    return "".join(itertools.chain(*PARTS.findall(word)))


def expand_braces(word):
    """The words of a{b,c}d; {0..9} stays as it is."""
    match = re.search(r"\{([^{}]*,[^{}]*)\}", word)
    if match is None or word[0] in "'\"":
        return [word]
    found = []
    for part in match[1].split(","):
        found += expand_braces(word[:match.start()] + part + word[match.end():])
    return found


class Command(NamedTuple):
    """A command line that runs a program of this repository."""
    program: str                            # its path
    words: list                             # its arguments

    def __str__(self):
        return " ".join([self.program, *self.words])


def own_command(words):
    """The Command of a simple command's words, or None if it runs something else."""
    while words and (ASSIGNMENT.match(words[0]) or words[0] in WRAPPERS):
        words = words[1:]
        while words and re.match(r"-?-\w|\d", words[0]):        # nice -n 10
            words = words[1:]
    if not words or Path(words[0]).name not in LAUNCHERS:
        return None
    for i, word in enumerate(words):
        if word == "-m" and i + 1 < len(words):
            program = words[i + 1].replace(".", "/") + ".py"
            rest = words[i + 2:]
        elif word.endswith((".py", ".sh")):
            program = word
            rest = words[i + 1:]
        else:
            continue
        return Command(program, rest) if (ROOT / program).is_file() else None
    return None


def script_commands(script, variables=None):
    """The Commands of a shell script and of the scripts that it quotes, as for ssh.

    Variables that the script sets are replaced; others are 1, which is a number and a name.
    """
    found = []
    variables = {} if variables is None else variables
    for raw in simple_commands(script):
        words = []
        for word in itertools.chain(*map(expand_braces, raw)):
            text = re.sub(r"\$\{?(\w+)\}?", lambda m: variables.get(m[1], "1"), unquote(word))
            assignment = ASSIGNMENT.fullmatch(text)
            if assignment:
                variables[assignment[1]] = assignment[2]
            if word[0] in "'\"" and re.search(r"\s.*\.py|\s-m\s", text, re.S):
                found += script_commands(text, variables)
            words.append(text)
        command = own_command(words)
        if command is not None:
            found.append(command)
    return found


def commands(text):
    """The Commands of a document: of its bash blocks, and of inline code that is one."""
    scripts = [block.code for block in blocks(text) if block.language in ("bash", "sh", "console")]
    variables = {}
    found = []
    for script in scripts + spans(text):
        found += script_commands(script, variables)
    return found


# ---- the programs' parsers -----------------------------------------------------------------------

class Captured(BaseException):
    """Carries the parser of a program that was about to parse its command line."""


def capture(parser, *_, **__):
    raise Captured(parser)


@functools.cache
def parser_of(program):
    """The argparse parser of a program: it is run up to the moment when it parses.

    A program without argparse has a parser without arguments.
    """
    nothing = argparse.ArgumentParser(program)
    if not re.search(r"\bparse_(args|run)\(", read(program)):
        return nothing
    folder = (ROOT / program).parent
    modules = set(sys.modules)
    try:
        with (mock.patch.object(argparse.ArgumentParser, "parse_args", capture),
              mock.patch.object(sys, "argv", [program]),
              mock.patch.object(sys, "path", [str(folder), *sys.path])):
            runpy.run_path(str(ROOT / program), run_name="__main__")
    except Captured as captured:
        return captured.args[0]
    finally:
        for name in set(sys.modules) - modules:         # benchmarks/data.py is not tests/data
            file = getattr(sys.modules[name], "__file__", None)
            if file and Path(file).parent == folder and folder != ROOT:
                del sys.modules[name]
    return nothing


def options(parser, words=()):
    """The flags of a parser and of the subcommand among the words. Old names do not count."""
    found = set()
    for action in parser._actions:
        if not isinstance(action, cli.RenamedFlag):
            found |= set(action.option_strings)
        if isinstance(action, argparse._SubParsersAction):
            for word in set(words) & set(action.choices):
                found |= options(action.choices[word])
    return found


@functools.cache
def all_flags():
    """Every flag of every program of this repository."""
    found = set()
    for program in PROGRAMS:
        parser = parser_of(program)
        subcommands = []
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                subcommands += action.choices
        found |= options(parser, subcommands)
    return found


FLAG = re.compile(r"(?<![\w-])--[a-z][\w-]*")


def flags_in(words):
    return [flag for word in words for flag in FLAG.findall(word)[:1] if word.startswith("--")]


def check_run_settings(words, engine):
    """Parse the command line of a training run; raise FuseDiTError if its model is impossible."""
    run = parse_run(words, "", engine)
    model_config(run)
    if run.plan:
        hardware.parse(run.plan)


def usage_error(command):
    """The usage error that a program reports for a command line; empty if there is none."""
    engines = {"train_gpu.py": "gpu", "train_tpu.py": "tpu"}
    output = io.StringIO()
    with contextlib.redirect_stderr(output), contextlib.redirect_stdout(output):
        try:
            parser_of(command.program).parse_args(join_mesh(command.words))
            if command.program in engines:
                check_run_settings(command.words, engines[command.program])
        except SystemExit as stop:
            return output.getvalue().strip().splitlines()[-1] if stop.code else ""
        except FuseDiTError as e:
            return "" if "prompt file" in str(e) else str(e)    # prompts are the user's own
    return ""


def command_faults(text):
    """Command lines that their program would refuse."""
    found = []
    for command in commands(text):
        known = options(parser_of(command.program), command.words)
        unknown = [flag for flag in flags_in(command.words) if flag not in known]
        problem = " ".join(unknown) or usage_error(command)
        if problem:
            found.append(f"{command}: {problem}")
    return found


# ---- rules ---------------------------------------------------------------------------------------

def broken_links(text, name="README.md"):
    """Relative links and images without a file, and anchors without a heading."""
    found = []
    for target in links(text):
        path, _, anchor = target.partition("#")
        if re.match(r"[a-z][a-z+.-]*:", target):        # https:, mailto:
            continue
        file = ROOT / name
        if path:
            file = (file.parent / path).resolve()
        if not file.exists() or not file.is_relative_to(ROOT):
            found.append(target)
        elif anchor and file.suffix == ".md":
            other = text if file == ROOT / name else file.read_text(encoding="utf-8")
            if anchor not in anchors(other):
                found.append(target)
    return found


PATH = re.compile(r"(?<![\w./~$}{*-])(?:\.\./)*"
                  r"((?:fusedit_lib|tests|benchmarks|docs|examples|demo)/[\w./*{},-]*|\w+\.py\b)"
                  r"(?![\w/]|:\d)")


def missing_paths(text, name="README.md"):
    """Paths in code that look like files of this repository and are not there."""
    found = []
    trees = "\n".join(block.code for block in blocks(text) if not block.language)
    for path in PATH.findall("\n".join(all_code(text))):
        path = path.rstrip("./,")
        for word in expand_braces(path):
            in_a_tree = re.search(rf"^[ │├└─]+{re.escape(word)}\b", trees, re.M)
            places = [ROOT, (ROOT / name).parent]
            there = any(any(place.glob(word)) for place in places)
            if not there and in_a_tree:
                there = any((ROOT / "fusedit_lib").rglob(word))
            if not there and word not in MADE:
                found.append(word)
    return found


def unknown_flags(text):
    """Flags in inline code that no program has, or that the program named with them lacks."""
    found = []
    for span in spans(text):
        words = span.split()
        known = all_flags() | OTHER_FLAGS
        if words[0].endswith(".py") and (ROOT / words[0]).is_file():
            known = options(parser_of(words[0]), words)
        found += [flag for flag in FLAG.findall(span) if flag not in known | {"--local_rank"}]
    return found


def unknown_presets(text):
    """Presets that fusedit.PRESETS does not have."""
    known = {*PRESETS, "small"}             # small: of benchmarks/common.py
    named = []
    for span in spans(text):
        named += re.findall(r"(?<![\w/.~-])(?:fusedit|baselinedit)/[\w-]+(?![\w/.-])", span)
    for code in all_code(text):
        named += re.findall(r"--preset[ =]([a-z][\w/-]*)", code)
    return [preset for preset in named if preset not in known]


def unknown_fields(text):
    """Config fields after --set that FuseDiTConfig does not have."""
    known = {field.name for field in fields(FuseDiTConfig)}
    named = []
    for code in all_code(text):
        for settings in re.findall(r"--set((?:\s+\w+=\S*)+)", code):
            named += re.findall(r"(\w+)=", settings)
    return [name for name in named if name not in known | {"field"}]


def unknown_imports(text):
    """Names that Python code imports from fusedit or fusedit_lib, and that are not there."""
    found = []
    for block in blocks(text):
        if block.language != "python":
            continue
        pattern = r"^\s*from (fusedit[\w.]*) import ([\w, ]+)"
        for module, names in re.findall(pattern, block.code, re.M):
            for name in re.split(r"\s*,\s*", names.strip()):
                if not resolves(f"{module}.{name.split()[0]}"):
                    found.append(f"{module}.{name}")
    return found


def wrong_bibtex(text):
    """BibTeX entries that are not of the form @kind{key, field = {...}, ...}, or lack a field."""
    found = []
    for block in blocks(text):
        if block.language != "bibtex":
            continue
        entries = re.findall(r"^@\w+\{[\w:.-]+,\n(?:\s+\w+\s*=\s*\{.*\},?\n)+\}", block.code, re.M)
        whole = "\n".join(entries).split() == block.code.split()
        for entry in entries:
            whole &= {"title", "author", "year"} <= set(re.findall(r"^\s+(\w+)\s*=", entry, re.M))
            whole &= entry.count("{") == entry.count("}")
        if not entries or not whole:
            found.append(block.code)
    return found


# ---- rules for the glossary ----------------------------------------------------------------------

def resolves(dotted):
    """True if a.b.c is a module, or an attribute of one, of a class or of a class's instances."""
    parts = dotted.split(".")
    for end in range(len(parts), 0, -1):
        try:
            thing = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        for part in parts[end:]:
            if hasattr(thing, part):
                thing = getattr(thing, part)
            elif inspect.isclass(thing) and f"self.{part} = " in inspect.getsource(thing):
                thing = None
            else:
                return False
        return True
    return False


def names_in(cell):
    return [code for _, code in SPAN.findall(cell)]


def table_with(text, column):
    for table in tables(text):
        if column in table.header:
            return table
    raise AssertionError(f"no table has a column {column}")


def unknown_names(text):
    """Names in the column "here" that neither fusedit.py nor fusedit_lib has."""
    found = []
    for name in itertools.chain(*map(names_in, table_with(text, "here").column("here"))):
        if not resolves(f"fusedit.{name}") and not resolves(f"fusedit_lib.{name}"):
            found.append(name)
    return found


def unknown_settings(text):
    """Names in the column "set by" that are neither config fields nor flags."""
    known = all_flags() | {field.name for field in fields(FuseDiTConfig)}
    cells = table_with(text, "set by").column("set by")
    return [name for name in itertools.chain(*map(names_in, cells)) if name not in known]


def difference(listed, wanted):
    """Items that only one of two lists has, and items that the first list has twice."""
    repeated = {name for name in listed if listed.count(name) > 1}
    return sorted(set(listed) ^ set(wanted) | repeated)


def first_names(text, column):
    return [name for cell in table_with(text, column).column(column) for name in names_in(cell)]


def missing_presets(text):
    return difference(first_names(text, "preset"), PRESETS)


def missing_fields(text):
    return difference(first_names(text, "field"), [field.name for field in fields(FuseDiTConfig)])


def wrong_parameters(text):
    """Presets whose number of parameters is not that of the published run."""
    runs = json.loads(read("tests/reference/paper_runs.json"))
    table = table_with(text, "parameters")
    found = []
    for preset, count in zip(table.column("preset"), table.column("parameters"), strict=True):
        run = runs.get(preset.strip("`"))
        if run and f"{run['dit_parameters']:,}" != count:
            found.append(preset)
    return found


def wrong_references(text):
    """References to lines that the published code does not have."""
    found = []
    for file, line, last in re.findall(r"([\w/]+\.py):(\d+)`?(?:-(\d+))?", text):
        lines = PUBLISHED.get(file, 0)
        if not int(line) <= int(last or line) <= lines:
            found.append(f"{file}:{line}")
    return found


PUBLISHED_KEY = re.compile(
    r"(?:trainer|model|ema|vae|noise_scheduler|optimizer|lr_scheduler|data|clip_l)\.[\w.]+")


def missing_keys(text):
    """Keys of the published configs that are not listed, and listed ones that do not exist."""
    configs = json.loads(read("tests/reference/published_configs.json"))
    keys = set(configs["all"]).union(*configs["runs"].values())
    listed = set()
    for table in tables(text):
        if "published key" in table.header:
            for name in itertools.chain(*map(names_in, table.column("published key"))):
                listed |= set(PUBLISHED_KEY.findall(name.partition(":")[0]))
    return difference(list(listed), keys)


def wrong_published_flags(text):
    """Settings in which the command with --like-published differs from the one that spells it out.

    The two are the first commands of the document.
    """
    runs = []
    for command in commands(text)[:2]:
        with contextlib.redirect_stderr(io.StringIO()):
            runs.append(asdict(parse_run(command.words, "", "tpu")))
    short, long = runs
    assert short.pop("like_published") and not long.pop("like_published")
    return [name for name in short if short[name] != long[name]]


TINY = GemmaConfig("gemma2", 8, 8, 8, 18, 1, 1, 4, 1e-6, 4, 1e4, 1, 1e4, 8, ())


@functools.cache
def dit_tensors():
    """The names of the DiT's tensors in all presets, with N for the number of a layer."""
    found = set()
    for name in PRESETS:
        with torch.device("meta"):
            model = FuseDiT(fusedit.preset(name, dit_num_hidden_layers=1), TINY)
        for tensor in model.dit.state_dict():
            found.add("dit." + re.sub(r"^layers\.\d+", "layers.N", tensor))
    return found


def missing_tensors(text):
    """DiT tensors that are not listed, and listed ones that do not exist."""
    listed = list(itertools.chain(*map(expand_braces, first_names(text, "tensor"))))
    in_no_preset = {"dit.patch_embed.pos_embed",
                    "dit.layers.N.post_cross_attention_layernorm.weight", "dit.text_mix.logits",
                    "dit.text_mix.time_embedder.weight", "dit.text_mix.time_embedder.bias",
                    "dit.text_mix.time_weight"}
    return difference(listed, dit_tensors() | in_no_preset)


# ---- the repository ------------------------------------------------------------------------------

def test_the_documents_exist():
    assert {"README.md", GLOSSARY, "benchmarks/gpu/README.md"} <= set(DOCS)


@pytest.mark.parametrize("name", DOCS)
def test_links_paths_and_names_exist(name):
    text = markdown(name)
    assert broken_links(text, name) == []
    assert missing_paths(text, name) == []
    assert unknown_flags(text) == []
    assert unknown_presets(text) == []
    assert unknown_fields(text) == []
    assert unknown_imports(text) == []
    assert wrong_bibtex(text) == []


@pytest.mark.parametrize("name", DOCS)
def test_every_command_line_is_accepted(name):
    """By the program's own parser: flags, types, choices; a run's settings and its model's."""
    assert command_faults(markdown(name)) == []


def test_command_lines_are_found():
    found = {command.program for name in DOCS for command in commands(markdown(name))}
    assert {"sample.py", "train_gpu.py", "train_tpu.py", "prepare_data.py", "evaluate.py"} <= found


def test_the_readme_has_its_length():
    assert len(read("README.md").splitlines()) in README_LINES


def test_the_tpu_page_names_the_flags_that_only_gpus_have():
    page = " ".join(read("docs/tpu.md").split())
    named = re.search(r"`--zero`.* - (`--compile`.*) exist only in `train_gpu.py`", page)[1]
    only_gpu = {flag_name(field.name) for field in fields(RunConfig)
                if field.metadata.get("only") == "gpu"}
    assert set(re.findall("`(--[a-z0-9-]+)`", named)) == only_gpu - {"--zero"}


@pytest.mark.parametrize("rule", [
    unknown_names, unknown_settings, missing_presets, missing_fields, missing_keys,
    wrong_published_flags, wrong_parameters, wrong_references, missing_tensors])
def test_the_glossary_is_right(rule):
    assert rule(read(GLOSSARY)) == []


def test_the_method_refers_to_lines_that_exist():
    assert "models.py:394" in read("fusedit.py")
    assert wrong_references(read("fusedit.py")) == []


# ---- reading a shell -----------------------------------------------------------------------------

@pytest.mark.parametrize("script, programs, words", [
    ("python sample.py --prompt 'a # b'  # comment, it's", "sample.py", "--prompt|a # b"),
    ("A=1 B='x y' python3 sample.py --grid", "sample.py", "--grid"),
    ("deepspeed --hostfile hosts train_gpu.py \\\n    --batch 8", "train_gpu.py", "--batch|8"),
    ("torchrun --nnodes 4 \\\n  evaluate.py shapes > log.txt 2>&1 &", "evaluate.py", "shapes"),
    ("nohup nice -n 10 .venv/bin/python sample.py --gif", "sample.py", "--gif"),
    ("RUN=a\npython evaluate.py fid --real $RUN/x", "evaluate.py", "fid|--real|a/x"),
    ("python sample.py --steps $STEPS", "sample.py", "--steps|1"),
    ("python evaluate.py compare x-{2,3}/y.json", "evaluate.py", "compare|x-2/y.json|x-3/y.json"),
    ("python sample.py --prompt 'x{1,2}'", "sample.py", "--prompt|x{1,2}"),
    ("on all 'cd x; T=. .venv/bin/python train_tpu.py \\\n --remat > l'", "train_tpu.py",
     "--remat"),
    ("pip install x && python sample.py --grid; ls", "sample.py", "--grid"),
    ("python -m fusedit_lib.train.plot runs/x", "fusedit_lib/train/plot.py", "runs/x"),
    ("(cd ELLA && python other.py --x)", "", ""),
    ("python -m venv .venv\ngit diff train_gpu.py train_tpu.py", "", "")])
def test_shell_scripts_are_read(script, programs, words):
    found = commands(f"```bash\n{script}\n```\n")
    assert "|".join(command.program for command in found) == programs
    assert "|".join(word for command in found for word in command.words) == words


def test_anchors_are_those_of_github():
    text = "# A `code.py` title, (1)\n## Same\n## Same\n```\n# no heading\n```\n### [A](b.md) *c*\n"
    assert anchors(text) == {"a-codepy-title-1", "same", "same-1", "a-c"}


def test_notebooks_and_docstrings_are_documents():
    cells = [dict(cell_type="markdown", source=["# Tour"]),
             dict(cell_type="code", source=["!python sample.py --grid\n", "import fusedit"])]
    text = "\n".join(map(cell_markdown, cells))
    assert anchors(text) == {"tour"}
    assert [str(command) for command in commands(text)] == ["sample.py --grid"]
    assert blocks(text)[1] == Block("python", "import fusedit\n")
    text = docstring_markdown("Draws.\n\n    python sample.py --gif      an animation")
    assert [str(command) for command in commands(text)] == ["sample.py --gif"]


# ---- the rules bite ------------------------------------------------------------------------------

def bash(line):
    return f"```bash\n{line}\n```\n"


def table(column, *cells):
    rows = "".join(f"| {cell} | |\n" for cell in cells)
    return f"| {column} | |\n|---|---|\n{rows}"


def listing(column, names):
    return table(column, *(f"`{name}`" for name in names))


PLANTED = {
    "link": (broken_links, "see [data](docs/nothing.md)"),
    "link with code": (broken_links, "see [`x.py`](fusedit_lib/nothing.py)"),
    "image": (broken_links, "![x](docs/nothing.png)"),
    "image as HTML": (broken_links, '<img src="docs/nothing.png">'),
    "reference": (broken_links, "see [a][b]\n\n[b]: docs/nothing.md\n"),
    "link out of here": (broken_links, "[x](../x/README.md)"),
    "anchor": (broken_links, "# One\n[x](#two)"),
    "anchor in a block": (broken_links, "[x](#two)\n```bash\n# two\n```\n"),
    "anchor elsewhere": (broken_links, "[x](docs/glossary.md#nothing)"),
    "path": (missing_paths, "in `fusedit_lib/nothing.py`"),
    "program": (missing_paths, bash("python train_gpuu.py --batch 8")),
    "glob": (missing_paths, "`tests/nothing/*.py`"),
    "test": (missing_paths, bash("pytest tests/test_nothing.py::test_x")),
    "tree": (missing_paths, "```\nfusedit_lib/\n  nothing.py    what\n```\n"),
    "flag": (unknown_flags, "with `--batchh`"),
    "flag of another": (unknown_flags, "`sample.py --batch 8`"),
    "flag of a subcommand": (unknown_flags, "`evaluate.py fid --guidance 1`"),
    "flag by its old name": (unknown_flags, "`prepare_data.py check --sheet x.png`"),
    "flag in a command": (command_faults, bash("python sample.py --prompt x --stepss 3")),
    "abbreviated": (command_faults, bash("python sample.py --prompt x --nega y")),
    "flag on the next line": (command_faults, bash("python sample.py \\\n  --stepss 3")),
    "flag, quoted": (command_faults, bash("on all 'cd x; python train_tpu.py --zero 1'")),
    "flag, inline": (command_faults, "run `torchrun --nnodes 2 train_gpu.py --mesh 1,1`"),
    "type": (command_faults, bash("python sample.py --prompt x --steps many")),
    "choice": (command_faults, bash("deepspeed train_gpu.py --data x --zero 4")),
    "range": (command_faults, bash("python train_gpu.py --data x --batch 0")),
    "subcommand": (command_faults, bash("python evaluate.py shape")),
    "argument": (command_faults, bash("python prepare_data.py encode")),
    "benchmark": (command_faults, bash("python benchmarks/train.py --steps 3")),
    "module": (command_faults, bash("python -m fusedit_lib.train.plot --out x runs/a")),
    "script": (command_faults, bash("SMALL=1 bash benchmarks/gpu/measure.sh --small")),
    "preset in a command": (command_faults, bash("python train_gpu.py --preset fusedit/3d-rope")),
    "field in a command": (command_faults, bash("python train_gpu.py --set patchsize=4")),
    "hardware": (command_faults, bash("python train_gpu.py --plan 8xZ80")),
    "preset": (unknown_presets, "as `fusedit/3d-rope`"),
    "preset, flag": (unknown_presets, "`--preset fusedid`"),
    "field": (unknown_fields, "`--set patch_size=4 shifts=8`"),
    "field, next line": (unknown_fields, bash("python x --set \\\n    shifts=8")),
    "import": (unknown_imports, "```python\nfrom fusedit_lib.sampling import draw\n```\n"),
    "BibTeX": (wrong_bibtex, "```bibtex\n@misc{x,\n  title = {A,\n  year = {1}\n}\n```\n"),
    "BibTeX, a field": (wrong_bibtex, "```bibtex\n@misc{x,\n  title = {A}\n}\n```\n"),
    "name": (unknown_names, table("here", "`flow_loss`, `DiT.ropes`")),
    "setting": (unknown_settings, table("set by", "`shift`, `--shift`")),
    "preset left out": (missing_presets, listing("preset", list(PRESETS)[1:])),
    "preset, twice": (missing_presets, listing("preset", [*PRESETS, "demo"])),
    "field left out": (missing_fields, listing("field", ["base", "fusion"])),
    "key left out": (missing_keys, "| published key |\n|---|\n| `trainer.seed` |\n"),
    "key that is not there": (missing_keys, read(GLOSSARY).replace("`data.center_crop`",
                                                                   "`data.centre_crop`")),
    "published flags": (wrong_published_flags,
                        read(GLOSSARY).replace("--resize bilinear", "--resize bicubic")),
    "parameters": (wrong_parameters,
                   "| preset | parameters |\n|---|---|\n| `fusedit/baseline` | 7 |\n"),
    "line": (wrong_references, "`models.py:939`"),
    "lines": (wrong_references, "`models.py:12`-9"),
    "file": (wrong_references, "`model.py:1`"),
    "tensor": (missing_tensors, listing("tensor", ["dit.proj_out.{weight,bias}"])),
}


@pytest.mark.parametrize("fault", PLANTED)
def test_a_planted_fault_is_found(fault):
    rule, text = PLANTED[fault]
    assert rule(text)


def test_what_is_right_is_not_reported():
    text = ("# Title\nSee [data](docs/glossary.md#config-fields), [here](#title), `--batch`, "
            "`fusedit_lib/vae.py` and `fusedit/2d-rope`.\n"
            + bash("python sample.py --prompt 'a star' --guidance-span 0 0.9 > log 2> /dev/null")
            + bash("python train_tpu.py --data x --mesh -1,2 --set shift=8 --save-every 20 > log"))
    for rule in (broken_links, missing_paths, unknown_flags, unknown_presets, unknown_fields,
                 unknown_imports, wrong_bibtex, command_faults):
        assert rule(text) == []
