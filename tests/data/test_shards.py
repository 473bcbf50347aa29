"""Shard patterns, incomplete indexes, and reading samples of unusual, damaged and remote tars."""
import errno
import os
import resource
import shutil
import signal
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
from fusedit_lib.data import batches as batches_module
from fusedit_lib.data import cache as cache_module
from fusedit_lib.data import shards as shards_module
from fusedit_lib.data.batches import load_batches
from fusedit_lib.data.cache import ShardCache, check_limits
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


# ------------------------------------------------------------------------------ open files

@pytest.fixture
def file_limit():
    """Sets the limit of open files; it is put back after the test."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield lambda number: resource.setrlimit(resource.RLIMIT_NOFILE, (number, hard))
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def lowest_free_handle():
    handle = os.open(os.devnull, os.O_RDONLY)
    os.close(handle)
    return handle


def test_an_open_shard_is_one_open_file(shards):
    reader = ShardReader(expand_shards(str(shards)), 3, "")
    before = len(os.listdir("/dev/fd"))
    for number in range(3):
        reader.read(number, 0)
    assert len(os.listdir("/dev/fd")) == before + 3


def test_a_reader_may_open_as_many_files_as_the_system_grants(shards, file_limit):
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    file_limit(hard - 1)
    ShardReader(expand_shards(str(shards)), 3, "")
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)


def test_too_many_open_files_are_no_damaged_samples(gemma_folder, shards, file_limit):
    batches = tiny_batches(gemma_folder, shards, micro_batch=24)
    file_limit(lowest_free_handle() + 1)
    problem = batches[0]
    file_limit(1000)
    assert problem.keys() == {"error"}
    assert problem["error"].startswith("too many open files: the limit is")
    assert "`ulimit -n 65536`" in problem["error"]
    assert not batches[0]["bad"]            # nor is a shard taken for unreadable from then on


def test_an_error_of_safetensors_without_a_number_is_recognised(tmp_path):
    error = RuntimeError("unable to open file <a> in read-only mode: Too many open files (24)")
    with pytest.raises(FuseDiTError, match="too many open files"):
        check_limits(error, tmp_path)
    check_limits(RuntimeError("unable to open file <a> in read-only mode"), tmp_path)


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
    copies = {path.stem for path in cache.glob("*.tar")}
    assert len(copies) == 2 * 1 + SPARE + 1
    assert {path.stem for path in cache.glob("*.npy")} <= copies


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


class FullDisk:
    """A file on a disk that is full."""

    def __init__(self, path, mode):
        self.file = open(path, mode)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def write(self, block):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_ends_the_run(gemma_folder, server, tmp_path, monkeypatch):
    url, _ = server
    batches = tiny_batches(gemma_folder, f"{url}/", "--cache", str(tmp_path / "cache"))
    monkeypatch.setattr(cache_module, "open", FullDisk, raising=False)
    problem = batches[0]
    assert problem.keys() == {"error"}
    assert problem["error"].startswith(f"no space is left in {tmp_path / 'cache'}")
    assert "--cache" in problem["error"] and "--streams" in problem["error"]


def test_the_command_that_copies_may_hide_that_the_disk_is_full(tmp_path):
    """As gsutil does, which fails when its output cannot be written on."""
    with pytest.raises(OSError, match="exit 1") as raised:
        try:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        finally:
            raise OSError("gsutil: exit 1")
    with pytest.raises(FuseDiTError, match="no space is left"):
        check_limits(raised.value, tmp_path)


def test_room_for_copies_is_checked_before_the_first(gemma_folder, shards, server, tmp_path,
                                                     monkeypatch):
    url, requests = server
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / "0.tar").write_bytes(bytes(5000))
    needed = sum(path.stat().st_size for path in shards.glob("*.tar"))
    usage = shutil.disk_usage(tmp_path)

    def start(free):
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=free))
        batches = tiny_batches(gemma_folder, f"{url}/", "--cache", str(cache))
        load_batches(batches, range(0), 0).close()

    with pytest.raises(FuseDiTError, match=f"{cache} has room for .* GB, but .*--cache.*--streams"):
        start(needed - 5001)
    start(needed - 5000)                    # what is there can be deleted
    assert not [path for path in requests if path.endswith("tar")]

    (cache / "file").touch()
    cache = cache / "file"
    with pytest.raises(FuseDiTError, match="--cache .*/file cannot be used for copies"):
        start(needed)


def test_the_cache_need_only_hold_the_copies_that_it_keeps(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    cache = ShardCache(tmp_path, 10)
    cache.check_space([100] * 50)
    cache.check_space([101] * 9 + [None])
    cache.check_space([101] * 9)
    with pytest.raises(FuseDiTError, match="has room"):
        cache.check_space([101] * 50)


def test_rank_0_says_what_is_copied_first(gemma_folder, server, tmp_path, monkeypatch, capsys):
    url, _ = server
    monkeypatch.setattr(batches_module, "DOWNLOADS", 2)

    def said(rank, *flags, start=0):
        batches = tiny_batches(gemma_folder, f"{url}/", "--cache", str(tmp_path), *flags,
                               rank=rank, world=2, micro_batch=12, start=start)
        load_batches(batches, range(0), 0).close()
        return batches, capsys.readouterr().err

    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    batches, text = said(0)
    first = f"shards to copy to {tmp_path} before the first step: 3"
    assert text == f"{first} (fewer with fewer --streams)\n"
    assert said(0, start=24)[1] == f"{first}\n"            # a resumed run keeps its streams
    assert said(1)[1] == ""

    # with another host, which reads every second stream, the first 12 samples of the epoch or the
    # last
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    assert said(0, "--streams", "2", "--mix-shards", "2")[1] == f"{first[:-1]}2\n"

    assert not batches[0]["bad"] and not batches[1]["bad"]
    assert said(0)[1] == ""                 # all have been copied


def test_each_copy_is_scanned_once_on_a_host(gemma_folder, server, tmp_path, monkeypatch):
    """The offsets are stored beside it, with the size of the tar that they belong to."""
    url, _ = server
    scanned = []

    def scan(path):
        scanned.append(path)
        return sample_offsets(path)

    monkeypatch.setattr(shards_module, "sample_offsets", scan)
    for _ in range(2):                      # processes of the host
        batches = tiny_batches(gemma_folder, f"{url}/", "--cache", str(tmp_path), micro_batch=24)
        assert not batches[0]["bad"]
    assert len(scanned) == len(set(scanned)) == 3

    longer = scanned[0]
    with open(longer, "ab") as tar:
        tar.write(bytes(512))
    batches = tiny_batches(gemma_folder, f"{url}/", "--cache", str(tmp_path), micro_batch=24)
    assert not batches[0]["bad"]
    assert scanned[3:] == [longer]


def test_progress_restarts_the_time_limit(gemma_folder, shards, server, tmp_path, monkeypatch):
    """For each sample and each block of a copy, but not for copies in the background."""
    url, _ = server
    alarms = []
    monkeypatch.setattr(batches_module, "get_worker_info", lambda: True)
    monkeypatch.setattr(batches_module.Batches, "prefetch", lambda *_: None)
    monkeypatch.setattr(cache_module, "BLOCK", 2048)
    monkeypatch.setattr(signal, "alarm", alarms.append)
    limit = batches_module.SAMPLE_TIMEOUT
    batches = tiny_batches(gemma_folder, f"{url}/", "--cache", str(tmp_path), micro_batch=24)
    thread = threading.Thread(target=batches.download, args=[0])
    thread.start()
    thread.join()
    assert not alarms
    assert not batches[0]["bad"]
    blocks = sum(path.stat().st_size // 2048 for path in shards.glob("s-[12].tar"))
    assert alarms == [limit] * (24 + blocks) + [0]


def test_a_copy_of_another_process_is_progress_while_it_grows(tmp_path, monkeypatch):
    monkeypatch.setattr(cache_module, "WAIT", 0.01)
    path = ShardCache(tmp_path, 10).path("http://a/b.tar")
    partial = tmp_path / f".{path.name}.1.tmp"
    partial.touch()
    looks = []
    waiting = threading.Event()

    def progress():
        looks.append(partial.stat().st_size)
        waiting.set()

    def wait():
        with ShardCache(tmp_path, 10, progress).locked(path):
            pass

    with ShardCache(tmp_path, 10).locked(path):
        thread = threading.Thread(target=wait)
        thread.start()
        for _ in range(3):
            assert waiting.wait(60)
            time.sleep(0.1)                 # it looks several times without seeing it grow
            waiting.clear()
            with open(partial, "ab") as file:
                file.write(b"x")
        assert waiting.wait(60)
    thread.join()
    assert looks == [0, 1, 2, 3]
