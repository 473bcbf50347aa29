"""sa1b-download and emoji's packages against a server on which everything goes wrong."""
import hashlib
import io
import json
import os
import re
import sys
import tarfile
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from test_datasets import kill
from test_prepare_data import pack

from fusedit import FuseDiTError
from fusedit_lib.data import download


def tar_of(names, seed=0):
    """A tar of files whose bytes follow from their names."""
    box = io.BytesIO()
    with tarfile.open(fileobj=box, mode="w") as tar:
        for name in names:
            info = tarfile.TarInfo(name)
            data = hashlib.sha256(f"{seed} {name}".encode()).digest() * 500
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return box.getvalue()


TARS = {f"sa_{k:06d}.tar": tar_of([f"./sa_{k}{i}.jpg" for i in range(6)] + [f"./sa_{k}{i}.json"
                                  for i in range(6)], k) for k in range(9)}


class Server(BaseHTTPRequestHandler):
    """/KIND/NAME: the file, with the trouble of its kind; how often it was asked for is counted."""
    asked = Counter()
    ranges = []
    etag = '"1"'

    def log_message(self, *_):
        pass

    def do_GET(self):
        _, kind, name = self.path.split("/", 2)
        data, n = TARS[name], self.asked[self.path]
        self.asked[self.path] += 1
        if kind == "404" or kind == "503" and n < 2:
            return self.send_error(int(kind))
        begin, wanted = 0, self.headers.get("Range")
        if self.headers.get("If-Range", self.etag) != self.etag:
            wanted = None
        if wanted and kind != "norange":
            begin = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1])
            self.ranges.append((kind, begin))
            if begin >= len(data):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(data)}")
                return self.end_headers()
        body, said = data[begin:], len(data) - begin
        if kind in ("drops", "norange") and n < 3:
            body = body[:70_000]            # and the connection ends
        if kind == "short" or kind == "shortonce" and not n:
            body, said = body[:50_000], 50_000             # a wrong length, as if it were all
        if kind == "empty":
            body, said = bytes(10240), 10240
        if kind == "garbage":
            body = b"<html>" + body[6:]
        if kind == "flipped":
            body = body[:1000] + bytes([body[1000] ^ 1]) + body[1001:]
        self.send_response(206 if begin else 200)
        self.send_header("Content-Length", str(said))
        self.send_header("ETag", self.etag)
        if begin:
            self.send_header("Content-Range", f"bytes {begin}-{len(data) - 1}/{len(data)}")
        self.end_headers()
        step = dict(slow=20_000, trickles=1).get(kind, len(body))
        try:
            for at in range(0, len(body), step):
                self.wfile.write(body[at:at + step])
                time.sleep(0.05 if step < len(body) else 0)
        except (BrokenPipeError, ConnectionResetError):    # it was given up
            pass


@pytest.fixture
def url(monkeypatch):
    monkeypatch.setattr(download, "WAIT", 0.01)
    Server.asked, Server.ranges = Counter(), []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def links(tmp_path, url, kinds):
    path = tmp_path / "links.txt"
    path.write_text("file_name\tcdn_link\n" + "".join(
        f"{name}\t{url}/{kind}/{name}\n" for name, kind in zip(TARS, kinds, strict=False)))
    return path


def assert_whole(out, name):
    with tarfile.open(fileobj=io.BytesIO(TARS[name])) as tar:
        want = {m.name[2:]: tar.extractfile(m).read() for m in tar if m.name.endswith(".jpg")}
    assert {p.name: p.read_bytes() for p in (out / name[:-4]).iterdir()} == want


def test_all_that_can_be_had_is_whole_and_every_failure_is_said(tmp_path, url, capsys):
    kinds = ["good", "drops", "norange", "503", "slow", "shortonce", "404", "short", "garbage"]
    out = tmp_path / "out"
    with pytest.raises(FuseDiTError, match="3 could not be had"):
        pack("sa1b-download", links(tmp_path, url, kinds), out)
    names = list(TARS)
    for name in names[:6]:
        assert_whole(out, name)
    report = json.loads((out / "download.json").read_text())
    assert report["files"] == 9 and report["whole"] == 6
    assert list(sorted(report["failed"])) == names[6:]
    assert report["failed"][names[6]] == "404 Not Found"
    assert all("not a whole tar" in report["failed"][name] for name in names[7:])
    assert {p.name for p in out.iterdir()} == {"download.json", *(n[:-4] for n in names[:6])}
    assert ("drops", 70_000) in Server.ranges              # what had come was not asked for again
    assert Server.asked[f"/404/{names[6]}"] == 1           # and what will never come, once
    asked = Server.asked.copy()
    pack("sa1b-download", links(tmp_path, url, kinds[:6] + ["good"] * 3), out)
    assert "9 of 9 files are whole" in capsys.readouterr().out
    for name in names:
        assert_whole(out, name)
    assert all(Server.asked[path] == n for path, n in asked.items())       # only the others


def test_a_download_goes_on_after_a_kill(tmp_path, url):
    name, out = "sa_000000.tar", tmp_path / "out"
    out.mkdir()
    (out / f"{name}.part").write_bytes(TARS[name][:40_000])
    (out / ".sa_000000.tmp").mkdir()
    (out / ".sa_000000.tmp" / "sa_00.jpg").write_bytes(b"half")
    (out / "sa_000001.tar.part").write_bytes(TARS["sa_000001.tar"])       # all but renamed
    pack("sa1b-download", links(tmp_path, url, ["good", "good"]), out, "--keep-tars")
    assert ("good", 40_000) in Server.ranges
    for name in ("sa_000000.tar", "sa_000001.tar"):
        assert_whole(out, name)
        assert (out / name).read_bytes() == TARS[name]
    assert len(list(out.iterdir())) == 5


def test_two_versions_of_a_file_never_become_one(tmp_path, url):
    """Parts of another version, an unpacked tar that is damaged, a tar without a picture."""
    name, out = "sa_000000.tar", tmp_path / "out"
    out.mkdir()
    (out / f"{name}.part").write_bytes(bytes(40_000))
    (out / f"{name}.part.id").write_text('"0"')
    (out / "sa_000001.tar").write_bytes(TARS["sa_000001.tar"][:50_000])
    with pytest.raises(FuseDiTError, match="1 could not be had"):
        pack("sa1b-download", links(tmp_path, url, ["good", "good", "empty"]), out)
    assert_whole(out, name)
    assert_whole(out, "sa_000001.tar")
    report = json.loads((out / "download.json").read_text())
    assert report["failed"] == {"sa_000002.tar": "no image is in it"}
    assert len(list(out.iterdir())) == 3


def test_a_server_that_trickles_is_given_up(tmp_path, url, monkeypatch):
    monkeypatch.setattr(download, "SILENCE", 0.2)
    with pytest.raises(FuseDiTError, match="1 could not be had"):
        pack("sa1b-download", links(tmp_path, url, ["trickles"]), tmp_path / "out")
    report = json.loads((tmp_path / "out" / "download.json").read_text())
    assert report["failed"] == {"sa_000000.tar": "too slow"}


def test_killed_eight_times_every_image_is_there(tmp_path, url):
    out = tmp_path / "out"
    kill(["sa1b-download", links(tmp_path, url, ["slow"] * 9), out, "--workers", 2], 0.25)
    assert {p.name for p in out.iterdir()} == {"download.json", *(n[:-4] for n in TARS)}
    for name in TARS:
        assert_whole(out, name)
    assert any(begin for _, begin in Server.ranges)


def test_killed_before_any_step_it_leaves_no_trace(tmp_path, url):
    """Killed before the k-th file is opened, renamed or deleted, for every k, and run again."""
    steps = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir"}
    words, k, status = [links(tmp_path, url, ["drops", "good"]), "--workers", 1], 0, 9
    while status == 9:
        k, out, Server.asked = k + 1, tmp_path / f"out{k}", Counter()
        if not (child := os.fork()):
            left = iter(range(k - 1))
            sys.addaudithook(lambda event, args, left=left, out=out: os._exit(9) if (
                event in steps and str(out) in str(args[0]) and next(left, None) is None) else None)
            try:
                pack("sa1b-download", *words[:1], out, *words[1:])
                os._exit(0)
            finally:
                os._exit(1)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        pack("sa1b-download", *words[:1], out, *words[1:])
        assert {p.name for p in out.iterdir()} == {"download.json", "sa_000000", "sa_000001"}, k
        for name in list(TARS)[:2]:
            assert_whole(out, name)
    assert status == 0 and k > 30


def test_checksums_find_what_a_tar_cannot(tmp_path, url):
    sums = "".join(f"{hashlib.md5(data).hexdigest()}  *{name}\n" for name, data in TARS.items())
    (tmp_path / "md5").write_text(sums)
    with pytest.raises(FuseDiTError, match="1 could not"):
        pack("sa1b-download", links(tmp_path, url, ["good", "flipped"]), tmp_path / "out", "--md5",
             tmp_path / "md5")
    failed = json.loads((tmp_path / "out" / "download.json").read_text())["failed"]
    assert failed == {"sa_000001.tar": "the md5 is another"}
    assert_whole(tmp_path / "out", "sa_000000.tar")


def test_nothing_ends_up_outside_of_its_folder(tmp_path):
    """Names that climb, absolute names, links: the last part of the name, or nothing."""
    box = io.BytesIO()
    with tarfile.open(fileobj=box, mode="w") as tar:
        for name in ("../up.jpg", "/tmp/root.jpg", "a/../../b.jpg"):
            info = tarfile.TarInfo(name)
            info.size = 3
            tar.addfile(info, io.BytesIO(b"jpg"))
        link = tarfile.TarInfo("link.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    (tmp_path / "t.tar").write_bytes(box.getvalue())
    assert download.unpack(tmp_path / "t.tar", tmp_path / "in" / "t", "*.jpg") == 3
    names = sorted(p.name for p in (tmp_path / "in" / "t").iterdir())
    assert names == ["b.jpg", "root.jpg", "up.jpg"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "t.tar"]


@pytest.mark.parametrize("text", ["", "<html>no</html>", "name\tlink\na.tar\n",
                                  "../sa.tar\thttp://x/y\n", "sa.zip\thttp://x\n"])
def test_what_is_no_list_of_links_is_said(tmp_path, text):
    (tmp_path / "links.txt").write_text(text)
    with pytest.raises(FuseDiTError, match="is not a list of file_name TAB cdn_link"):
        pack("sa1b-download", tmp_path / "links.txt", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_registry_that_gives_something_else(tmp_path, url, monkeypatch):
    TARS["emoji-datasource-google/-/emoji-datasource-google-16.0.0.tgz"] = b"another"
    monkeypatch.setattr(download, "TRIES", 2)
    with pytest.raises(FuseDiTError, match="the sha512 is another.*--registry"):
        pack("emoji", tmp_path / "out", "--packages", tmp_path / "packages", "--registry",
             f"{url}/x")
    del TARS["emoji-datasource-google/-/emoji-datasource-google-16.0.0.tgz"]
    assert not list((tmp_path / "packages").iterdir())
