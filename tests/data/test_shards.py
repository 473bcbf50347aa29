"""Shard patterns, incomplete indexes, and reading samples of unusual, damaged and remote tars."""
import os
import tarfile
import threading
import time
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from tiny_shards import (
    ORIGINAL_CAPTIONS,
    add_file,
    index,
    numbered,
    sample_keys,
    sample_names,
    scene,
    tiny_batches,
    write_shard,
)

from fusedit import FuseDiTError
from fusedit_lib.data.shards import (
    SPARE,
    Shard,
    ShardReader,
    expand_shards,
    read_index,
    sample_offsets,
)


@pytest.fixture
def shards(tmp_path):
    """3 shards of 8 numbered samples."""
    return numbered(tmp_path / "shards")


@pytest.fixture(autouse=True)
def empty_index_cache():
    read_index.cache_clear()


# ------------------------------------------------------------------------------ patterns

def test_shard_patterns(tmp_path):
    for name in ("a-0.tar", "a-1.tar", "b-0.tar", "c[1].tar"):
        write_shard(tmp_path / name, [scene("x")])
    index(tmp_path)

    def names(pattern):
        shards = expand_shards(f"{tmp_path}/{pattern}")
        return [Path(shard.path).name for shard in shards]

    assert names("a-{0..1}.tar") == ["a-0.tar", "a-1.tar"]
    assert names(f"a*.tar::{tmp_path}/b*") == ["a-0.tar", "a-1.tar", "b-0.tar"]
    assert names("c[1].tar") == ["c[1].tar"]
    assert len(names("")) == 4
    for wrong in ("{0..2}.tar", "no*.tar"):
        with pytest.raises(FuseDiTError, match="no file matches"):
            names(wrong)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FuseDiTError, match="no file matches .*empty/.*in a folder below it"):
        names("empty")


def test_a_range_with_gaps_names_what_is_missing(tmp_path):
    for i in (0, 1, 3, 9):
        write_shard(tmp_path / f"a-{i:03d}.tar", [scene("x")])
    index(tmp_path)
    with pytest.raises(FuseDiTError, match=r"^1 of the 4 names in .*/a-\{000\.\.003\}.tar do not "
                                           r"exist: .*/a-002.tar$"):
        expand_shards(f"{tmp_path}/a-{{000..003}}.tar")
    with pytest.raises(FuseDiTError, match="6 of the 10 .*/a-002.tar, .*/a-004.tar, .*/a-005.tar "
                                           "and 3 more$") as raised:
        expand_shards(f"{tmp_path}/a-{{000..009}}.tar")
    assert "shapes" not in str(raised.value)


def test_all_shards_that_an_index_does_not_list_are_named(server):
    """At a URL, whose files cannot be listed."""
    url, _ = server
    with pytest.raises(FuseDiTError, match="index.json does not list s-3.tar, s-4.tar: `python"):
        expand_shards(f"{url}/s-{{0..4}}.tar")


def test_index_errors_name_the_remedy(tmp_path):
    write_shard(tmp_path / "a.tar", [scene("x")])
    with pytest.raises(FuseDiTError, match=r"cannot read .*index.json.*prepare_data.py index"):
        expand_shards(str(tmp_path))
    index(tmp_path)
    read_index.cache_clear()
    write_shard(tmp_path / "b.tar", [scene("y")])
    with pytest.raises(FuseDiTError, match=r"does not list b.tar.*prepare_data.py index"):
        expand_shards(str(tmp_path))

    for text in ("[1]", "{", '{"shards": [{"name": "a.tar"}]}'):
        read_index.cache_clear()
        (tmp_path / "index.json").write_text(text)
        with pytest.raises(FuseDiTError, match="cannot read"):
            expand_shards(f"{tmp_path}/a.tar")

    read_index.cache_clear()
    (tmp_path / "index.json").write_text('{"shards": [{"name": "a.tar", "samples": 0}]}')
    with pytest.raises(FuseDiTError, match="lists no samples"):
        expand_shards(f"{tmp_path}/a.tar")


# ------------------------------------------------------------------------------ samples

def test_offsets_do_not_change_the_samples(gemma_folder, shards):
    known = sample_keys(tiny_batches(gemma_folder, shards, *ORIGINAL_CAPTIONS), 6)
    (shards / "offsets.npy").unlink()
    assert sample_keys(tiny_batches(gemma_folder, shards, *ORIGINAL_CAPTIONS), 6) == known
    one = tiny_batches(gemma_folder, f"{shards}/s-1.tar", *ORIGINAL_CAPTIONS, micro_batch=8)
    assert sorted(sample_keys(one, 1)[0]) == sample_names(8, 16)


def test_part_of_a_folder_uses_the_right_offsets(gemma_folder, shards):
    two = tiny_batches(gemma_folder, f"{shards}/s-{{1,2}}.tar", *ORIGINAL_CAPTIONS, micro_batch=16)
    assert sorted(sample_keys(two, 1)[0]) == sample_names(8, 24)


def test_long_names_and_folders_in_a_tar(tmp_path):
    path = tmp_path / "a.tar"
    long = "a" * 150
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        folder = tarfile.TarInfo("folder")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for key in (f"folder/{long}", "folder/short"):
            for extension in ("image.png", "synthetic_caption.txt"):
                add_file(tar, f"{key}.{extension}", key[-3:])
    assert len(sample_offsets(path)) == 3
    reader = ShardReader([Shard(str(path), 2, None, None, 0)], 2, "")
    assert reader.read(0, 0) == {"image.png": b"aaa", "synthetic_caption.txt": b"aaa"}
    assert reader.read(0, 1) == {"image.png": b"ort", "synthetic_caption.txt": b"ort"}


def test_an_unreadable_shard_is_tried_again_after_a_while(shards, monkeypatch):
    """A network disk may recover, and another process may still be copying the file."""
    path = shards / "s-0.tar"
    data = path.read_bytes()
    reader = ShardReader(expand_shards(str(shards)), 2, "")
    path.unlink()
    for _ in range(2):
        with pytest.raises(ValueError, match="the shard cannot be read .FileNotFoundError"):
            reader.read(0, 0)
        path.write_bytes(data)
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + 601)
    assert "image.png" in reader.read(0, 0)


def test_the_shards_used_last_stay_open(tmp_path):
    write_shard(tmp_path / "a.tar", [scene("x")])
    path = str(tmp_path / "a.tar")
    reader = ShardReader([Shard(path, 1, None, None, 0)] * 40, 2, "")
    reader.read(0, 0)
    first = reader.opened[0].file
    for number in range(1, 40):
        reader.read(number, 0)
        reader.read(0, 0)
    assert reader.opened[0].file is first
    assert sorted(reader.opened) == [0, *range(40 - (2 + SPARE) + 1, 40)]


# ------------------------------------------------------------------------------ remote shards

@pytest.fixture
def server(shards):
    """(URL of a web server for the shards, list of requested paths)"""
    requests = []

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *_):
            requests.append(self.path)

    http = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=shards))
    threading.Thread(target=http.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{http.server_port}", requests
    http.shutdown()


def test_remote_shards_are_copied_once_to_a_bounded_cache(gemma_folder, shards, server, tmp_path):
    url, requests = server
    cache = tmp_path / "cache"
    flags = [*ORIGINAL_CAPTIONS, "--mix-shards", "1", "--streams", "1"]

    def remote_keys(pattern):
        batches = tiny_batches(gemma_folder, f"{url}/{pattern}", *flags, "--cache", str(cache))
        return sample_keys(batches, 6)

    local = sample_keys(tiny_batches(gemma_folder, shards, *flags), 6)
    assert remote_keys("s-{0..2}.tar") == local
    assert remote_keys("") == local         # the whole folder
    tars = sorted(path for path in requests if path.endswith("tar"))
    assert tars == [f"/s-{i}.tar" for i in range(3)]

    for i in range(12):                     # copies of another run
        (cache / f"{i}.tar").touch()
        os.utime(cache / f"{i}.tar", (i, i))
    (shards / "s-0.tar").rename(shards / "t-0.tar")
    index(shards)
    read_index.cache_clear()
    assert len(remote_keys("")) == 6
    assert len(list(cache.glob("*.tar"))) == 2 * 1 + SPARE + 1


def test_the_next_shard_of_each_stream_is_copied_ahead(gemma_folder, shards, server, tmp_path):
    """Two streams: the shard of a position, and that of half a shard later in its stream."""
    url, requests = server
    flags = ["--streams", "2", "--mix-shards", "2", "--cache", str(tmp_path)]
    batches = tiny_batches(gemma_folder, f"{url}/", *flags)
    position = 0
    wanted = set()
    while len(wanted) < 2:
        position += 1
        wanted = {f"/s-{batches.order[p][0]}.tar" for p in (position, position + 2 * 4)}
    batches.prefetch([position])
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("*.tar"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert wanted == {path for path in requests if path.endswith("tar")}


def test_missing_and_truncated_remote_files_are_reported(gemma_folder, shards, server, tmp_path,
                                                         monkeypatch):
    url, _ = server
    monkeypatch.setattr(time, "sleep", lambda _: None)
    with pytest.raises(FuseDiTError, match="cannot read .*none/index.json"):
        expand_shards(f"{url}/none/a.tar")

    path = shards / "s-1.tar"
    path.write_bytes(path.read_bytes()[:2048])
    cache = tmp_path / "cache"
    batches = tiny_batches(gemma_folder, f"{url}/", *ORIGINAL_CAPTIONS, "--cache", str(cache),
                           micro_batch=24)
    bad = batches[0]["bad"]
    assert len(bad) == 8
    for line in bad:
        assert "2048 of" in line and "s-1.tar" in line
    assert not list(cache.glob("*.tmp"))
