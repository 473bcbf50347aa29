"""google/gemma-3-270m from the hub's cache, the package or the hub. Nothing real is converted.

tests/test_real_gemma.py converts the real package.
"""
import multiprocessing
import os
import signal
import struct
import sys
import time

import huggingface_hub
import pytest
from huggingface_hub import constants

from fusedit import FuseDiTConfig, FuseDiTError
from fusedit_lib import gemma_package
from fusedit_lib.files import say_once
from fusedit_lib.folders import gemma_source, resolve
from fusedit_lib.train import costs

NAME = gemma_package.NAME
FILES = ("config.json", "model.safetensors", "tokenizer.json")
FAKE = """
def assemble(path):
    path.write_text("GGUF")
    return path
"""


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """The home of a user without a network, in which nothing is installed or downloaded."""
    def refuse(name, allow_patterns):
        raise OSError("Name or service not known")

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    monkeypatch.setattr(gemma_package, "find_spec", lambda name: None)
    say_once.cache_clear()
    return tmp_path


@pytest.fixture
def cache(home):
    return home / ".cache/fusedit/gemma-3-270m"


@pytest.fixture
def package(home, monkeypatch):
    """Installs a fake package. Conversions add a line to the file that is returned."""
    def convert_gguf(path, target):
        assert path.read_text() == "GGUF"
        time.sleep(0.2)                     # so that conversions overlap if they may
        write_model(target)
        with open(home / "conversions", "a") as log:
            log.write("once\n")

    (home / "packages").mkdir()
    (home / "packages" / f"{gemma_package.PACKAGE}.py").write_text(FAKE)
    monkeypatch.delitem(sys.modules, gemma_package.PACKAGE, raising=False)
    monkeypatch.syspath_prepend(home / "packages")
    monkeypatch.setattr(gemma_package, "find_spec", lambda name: True)
    monkeypatch.setattr(gemma_package, "convert_gguf", convert_gguf)
    return home / "conversions"


def write_model(folder, files=FILES):
    folder.mkdir(parents=True, exist_ok=True)
    for name in files:
        (folder / name).write_text("{}")


def contents(folder):
    return sorted(path.name for path in folder.iterdir())


def in_a_process(function, *arguments):
    """A started process that calls a function."""
    process = multiprocessing.get_context("fork").Process(target=function, args=arguments)
    process.start()
    return process


# ---- where it comes from -------------------------------------------------------------------------

def test_without_it_one_line_says_how_to_get_it():
    with pytest.raises(FuseDiTError) as caught:
        resolve(NAME)
    message = str(caught.value)
    assert "pip install -e '.[emoji]'" in message
    assert "accept the licence on the hub and run `hf auth login`" in message
    assert "\n" not in message


def test_the_order_of_sources(home, cache, package, monkeypatch):
    assert resolve(NAME) == cache
    snapshot = home / "hub/models--google--gemma-3-270m/snapshots/123"
    (snapshot.parents[1] / "refs").mkdir(parents=True)
    (snapshot.parents[1] / "refs/main").write_text("123")
    write_model(snapshot, FILES[:2])                        # a download that was interrupted
    assert resolve(NAME) == cache
    assert gemma_source(NAME) == "package"
    write_model(snapshot)
    assert resolve(NAME) == snapshot
    assert gemma_source(NAME) == "release"
    write_model(home / NAME)
    monkeypatch.chdir(home)
    assert resolve(NAME) == home / NAME
    assert gemma_source(NAME) == gemma_source(cache) == gemma_source("google/gemma-2b") == ""


def test_without_a_package_it_is_downloaded(home, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download",
                        lambda name, allow_patterns: str(home / name))
    assert resolve(NAME) == home / NAME


def test_the_cache_is_used_even_without_the_package(cache):
    write_model(cache)
    assert resolve(NAME) == cache


def test_the_plan_needs_none_of_them():
    model = costs.abstract_model(FuseDiTConfig(base=NAME))
    assert model.llm.embed_tokens.weight.shape == (262144, 640)


# ---- the conversion ------------------------------------------------------------------------------

def test_it_is_converted_once(cache, package, capsys):
    resolve(NAME)
    converting, note = capsys.readouterr().err.splitlines()
    assert "converting" in converting
    resolve(NAME)
    assert capsys.readouterr().err == ""
    say_once.cache_clear()                  # as in a new process
    resolve(NAME)
    assert capsys.readouterr().err.splitlines() == [note]
    assert "is the package's, with weights rounded to 4 to 8 bits" in note
    assert package.read_text() == "once\n"
    assert contents(cache) == sorted(FILES)
    assert contents(cache.parent) == ["gemma-3-270m", "gemma-3-270m.lock"]


def test_two_processes_convert_it_once(cache, package):
    processes = [in_a_process(resolve, NAME) for _ in range(2)]
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert package.read_text() == "once\n"
    assert contents(cache) == sorted(FILES)


def test_a_killed_conversion_leaves_nothing_that_looks_whole(cache, package, monkeypatch):
    def die(path, target):
        write_model(target)
        os.kill(os.getpid(), signal.SIGKILL)

    with monkeypatch.context() as changes:
        changes.setattr(gemma_package, "convert_gguf", die)
        process = in_a_process(resolve, NAME)
        process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not cache.exists()
    assert ".gemma-3-270m.tmp" in contents(cache.parent)

    (cache.parent / ".gemma-3-270m.tmp/half").touch()
    assert contents(resolve(NAME)) == sorted(FILES)
    assert contents(cache.parent) == ["gemma-3-270m", "gemma-3-270m.lock"]


def test_a_failed_conversion_removes_its_files(cache, package, monkeypatch):
    def fill_the_disk(path, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gemma_package, "convert_gguf", fill_the_disk)
    with pytest.raises(OSError, match="No space left"):
        resolve(NAME)
    assert contents(cache.parent) == ["gemma-3-270m.lock"]


def test_a_damaged_package_is_one_line(home, cache, package):
    damaged = "def assemble(path):\n    raise ValueError('sha256 did not match')\n"
    (home / "packages" / f"{gemma_package.PACKAGE}.py").write_text(damaged)
    with pytest.raises(FuseDiTError, match="is damaged .sha256 did not match.: reinstall it"):
        resolve(NAME)
    assert not cache.exists()


# ---- GGUF ----------------------------------------------------------------------------------------

def string(text):
    return struct.pack("<Q", len(text.encode())) + text.encode()


def test_the_header_of_a_gguf_file(tmp_path):
    header = b"GGUF" + struct.pack("<IQQ", 3, 2, 3)
    header += string("eps") + struct.pack("<If", 6, 0.5)
    header += string("tokens") + struct.pack("<IIQ", 9, 8, 2) + string("▁a") + string("")
    header += string("kinds") + struct.pack("<IIQ3i", 9, 5, 3, 1, -3, 4)
    header += string("norm.weight") + struct.pack("<IQIQ", 1, 640, 0, 0)
    header += string("table.weight") + struct.pack("<IQQIQ", 2, 640, 7, 8, 2560)
    assert len(header) % 32 != 0
    (tmp_path / "a.gguf").write_bytes(header + bytes(100))

    with open(tmp_path / "a.gguf", "rb") as file:
        fields, tensors = gemma_package.read_header(file)
    assert fields == {"eps": 0.5, "tokens": ["▁a", ""], "kinds": [1, -3, 4]}
    start = len(header) + 32 - len(header) % 32
    assert tensors == [("norm.weight", (640,), 0, start),
                       ("table.weight", (7, 640), 8, start + 2560)]


@pytest.mark.parametrize("name, want", [
    ("token_embd.weight", "model.embed_tokens.weight"),
    ("blk.11.attn_output.weight", "model.layers.11.self_attn.o_proj.weight")])
def test_names_of_tensors(name, want):
    assert gemma_package.tensor_name(name) == want


def test_the_tokenizer():
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    words = ["[image]", "\n", "a", "b", "▁", "\n\n", "aa", "  ", "ab", "▁a", "▁ab"]
    kinds = [3] * len(special) + [4, 4] + [1] * 3 + [4] + [1] * 5
    tokenizer = gemma_package.make_tokenizer(special + words, kinds)

    def pieces(text):
        return tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"])

    assert len(tokenizer) == len(special + words)
    assert pieces("ab aab") == ["<bos>", "ab", "▁", "aa", "b"]     # aa comes before ab and ▁a
    assert pieces("b  b") == ["<bos>", "b", "▁▁", "b"]
    assert pieces("a[image]\n\n<eos>") == ["<bos>", "a", "[image]", "\n\n", "<eos>"]
    assert pieces("") == ["<bos>"]
