"""sa1b-download and the emoji packages, from a server with all kinds of faults."""
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
from fusedit_lib.data import download, sa1b


def tar_of(names, seed=0):
    """The bytes of a tar of files whose contents are derived from their names."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name in names:
            data = hashlib.sha256(f"{seed} {name}".encode()).digest() * 500
            add_file(tar, name, data)
    return buffer.getvalue()


def add_file(tar, name, data):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def sa1b_tar(k):
    images = [f"./sa_{k}{i}.jpg" for i in range(6)]
    annotations = [f"./sa_{k}{i}.json" for i in range(6)]
    return tar_of(images + annotations, k)


TARS = {f"sa_{k:06d}.tar": sa1b_tar(k) for k in range(9)}


# ---- a server ------------------------------------------------------------------------------------

class Server(BaseHTTPRequestHandler):
    """Serves /KIND/NAME with the fault KIND, and counts the requests for each path.

    good, slow, trickles      no fault except the speed
    404, 503                  this error; 503 only twice, then the file
    drops, norange            the connection ends early, three times; norange ignores Range
    short, shortonce          part of the file, sent as the whole; shortonce only the first time
    empty, garbage, flipped   a tar without files; not a tar; a tar with one flipped bit
    """
    asked = Counter()
    ranges = []                             # (kind, first byte) of every request with a Range
    etag = '"1"'

    def log_message(self, *_):
        pass

    def do_GET(self):
        _, kind, name = self.path.split("/", 2)
        data = TARS[name]
        requests = self.asked[self.path]    # number of earlier requests for this file
        self.asked[self.path] += 1
        if kind == "404" or (kind == "503" and requests < 2):
            return self.send_error(int(kind))
        begin = self.requested_begin(kind)
        if begin and begin >= len(data):
            return self.send_range_error(len(data))
        body, length = self.spoil(kind, requests, data[begin:])
        self.send_head(begin, length, len(data))
        self.send_body(kind, body)

    def requested_begin(self, kind):
        """The first requested byte; 0 without a Range, or if it is for another version."""
        wanted = self.headers.get("Range")
        same_version = self.headers.get("If-Range", self.etag) == self.etag
        if not wanted or not same_version or kind == "norange":
            return 0
        begin = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1])
        self.ranges.append((kind, begin))
        return begin

    def send_range_error(self, size):
        self.send_response(416)
        self.send_header("Content-Range", f"bytes */{size}")
        self.end_headers()

    def spoil(self, kind, requests, body):
        """(bytes to send, length to announce) of a response after `requests` earlier ones."""
        length = len(body)
        if kind in ("drops", "norange") and requests < 3:
            body = body[:70_000]            # and the connection ends
        elif kind == "short" or (kind == "shortonce" and requests == 0):
            body = body[:50_000]
            length = 50_000
        elif kind == "empty":
            body = bytes(10240)
            length = 10240
        elif kind == "garbage":
            body = b"<html>" + body[6:]
        elif kind == "flipped":
            body = body[:1000] + bytes([body[1000] ^ 1]) + body[1001:]
        return body, length

    def send_head(self, begin, length, size):
        self.send_response(206 if begin else 200)
        self.send_header("Content-Length", str(length))
        self.send_header("ETag", self.etag)
        if begin:
            self.send_header("Content-Range", f"bytes {begin}-{size - 1}/{size}")
        self.end_headers()

    def send_body(self, kind, body):
        step = dict(slow=20_000, trickles=1).get(kind, len(body))
        try:
            for start in range(0, len(body), step):
                self.wfile.write(body[start:start + step])
                if step < len(body):
                    time.sleep(0.05)
        except (BrokenPipeError, ConnectionResetError):    # the client has given up
            pass


@pytest.fixture
def url(monkeypatch):
    monkeypatch.setattr(download, "WAIT", 0.01)
    Server.asked = Counter()
    Server.ranges = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def links(tmp_path, url, kinds):
    """Write a list like Meta's, of the first tars with one of the given kinds each."""
    lines = ["file_name\tcdn_link"]
    for name, kind in zip(TARS, kinds, strict=False):
        lines.append(f"{name}\t{url}/{kind}/{name}")
    path = tmp_path / "links.txt"
    path.write_text("\n".join(lines) + "\n")
    return path


# ---- expected files ------------------------------------------------------------------------------

def names_in(folder):
    return {path.name for path in folder.iterdir()}


def folders_of(names):
    return {name.removesuffix(".tar") for name in names}


def assert_complete(out, name):
    """Assert that a tar's folder contains all of its images and nothing else."""
    expected = {}
    with tarfile.open(fileobj=io.BytesIO(TARS[name])) as tar:
        for member in tar:
            if member.name.endswith(".jpg"):
                expected[member.name.removeprefix("./")] = tar.extractfile(member).read()
    folder = out / name.removesuffix(".tar")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == expected


def report_of(out):
    return json.loads((out / "download.json").read_text())


# ---- downloads -----------------------------------------------------------------------------------

def test_downloads_are_complete_and_every_failure_is_reported(tmp_path, url, capsys):
    kinds = ["good", "drops", "norange", "503", "slow", "shortonce", "404", "short", "garbage"]
    out = tmp_path / "out"
    with pytest.raises(FuseDiTError, match="3 of 9 files could not be downloaded"):
        pack("sa1b-download", links(tmp_path, url, kinds), out)
    names = list(TARS)
    for name in names[:6]:
        assert_complete(out, name)
    report = report_of(out)
    assert report["files"] == 9 and report["whole"] == 6
    assert sorted(report["failed"]) == names[6:]
    assert report["failed"][names[6]] == "404 Not Found"
    for name in names[7:]:
        assert "not a complete tar" in report["failed"][name]
    assert names_in(out) == {"download.json"} | folders_of(names[:6])
    assert ("drops", 70_000) in Server.ranges              # resumed after the data it had
    assert Server.asked[f"/404/{names[6]}"] == 1           # trying again would not help

    asked_before = Server.asked.copy()
    pack("sa1b-download", links(tmp_path, url, kinds[:6] + ["good"] * 3), out)
    assert "9 of 9 files are complete" in capsys.readouterr().out
    for name in names:
        assert_complete(out, name)
    for path, count in asked_before.items():               # only failed files are requested again
        assert Server.asked[path] == count


def test_a_download_is_resumed_after_a_kill(tmp_path, url):
    out = tmp_path / "out"
    out.mkdir()
    (out / "sa_000000.tar.part").write_bytes(TARS["sa_000000.tar"][:40_000])
    (out / ".sa_000000.tmp").mkdir()
    (out / ".sa_000000.tmp" / "sa_00.jpg").write_bytes(b"half")
    (out / "sa_000001.tar.part").write_bytes(TARS["sa_000001.tar"])       # all but renamed
    pack("sa1b-download", links(tmp_path, url, ["good", "good"]), out, "--keep-tars")
    assert ("good", 40_000) in Server.ranges
    for name in ("sa_000000.tar", "sa_000001.tar"):
        assert_complete(out, name)
        assert (out / name).read_bytes() == TARS[name]
    assert len(names_in(out)) == 5


def test_two_versions_of_a_file_are_never_combined(tmp_path, url):
    """A part of another version, a tar that is already damaged, and a tar without images."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "sa_000000.tar.part").write_bytes(bytes(40_000))
    (out / "sa_000000.tar.part.id").write_text('"0"')
    (out / "sa_000001.tar").write_bytes(TARS["sa_000001.tar"][:50_000])
    with pytest.raises(FuseDiTError, match="1 of 3 files could not be downloaded"):
        pack("sa1b-download", links(tmp_path, url, ["good", "good", "empty"]), out)
    assert_complete(out, "sa_000000.tar")
    assert_complete(out, "sa_000001.tar")
    assert report_of(out)["failed"] == {"sa_000002.tar": "the tar contains no images"}
    assert len(names_in(out)) == 3


def test_a_very_slow_server_is_given_up(tmp_path, url, monkeypatch):
    monkeypatch.setattr(download, "SILENCE", 0.2)
    with pytest.raises(FuseDiTError, match="1 of 1 files could not be downloaded"):
        pack("sa1b-download", links(tmp_path, url, ["trickles"]), tmp_path / "out")
    assert report_of(tmp_path / "out")["failed"] == {"sa_000000.tar": "too slow"}


def test_every_image_is_complete_after_eight_kills(tmp_path, url):
    out = tmp_path / "out"
    kill(["sa1b-download", links(tmp_path, url, ["slow"] * 9), out, "--workers", 2], 0.25)
    assert names_in(out) == {"download.json"} | folders_of(TARS)
    for name in TARS:
        assert_complete(out, name)
    assert any(begin > 0 for _, begin in Server.ranges)


# ---- killed before any step ----------------------------------------------------------------------

STEPS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir"}       # audit events
KILLED = 9


def exit_before_step(k, out):
    """Make this process exit before its k-th operation on a file or folder below `out`."""
    steps = 0

    def count(event, args):
        nonlocal steps
        if event in STEPS and str(out) in str(args[0]):
            steps += 1
            if steps == k:
                os._exit(KILLED)
    sys.addaudithook(count)


def status_of_child(k, out, words):
    """The exit code of a forked process that runs the command and exits before step k."""
    child = os.fork()
    if child == 0:
        exit_code = 1
        try:
            exit_before_step(k, out)
            pack(*words)
            exit_code = 0
        finally:
            os._exit(exit_code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_kill_before_any_step_leaves_no_trace(tmp_path, url):
    """The command is killed before the k-th file operation, for every k, and then repeated."""
    link_list = links(tmp_path, url, ["drops", "good"])
    k = 0
    status = KILLED
    while status == KILLED:
        k += 1
        out = tmp_path / f"out{k}"
        words = ["sa1b-download", link_list, out, "--workers", "1"]
        Server.asked = Counter()
        status = status_of_child(k, out, words)
        pack(*words)
        assert names_in(out) == {"download.json", "sa_000000", "sa_000001"}, k
        assert_complete(out, "sa_000000.tar")
        assert_complete(out, "sa_000001.tar")
    assert status == 0 and k > 30


# ---- checks --------------------------------------------------------------------------------------

def test_checksums_find_damage_that_tar_headers_do_not_show(tmp_path, url):
    lines = [f"{hashlib.md5(data).hexdigest()}  *{name}\n" for name, data in TARS.items()]
    (tmp_path / "md5").write_text("".join(lines))
    out = tmp_path / "out"
    with pytest.raises(FuseDiTError, match="1 of 2 files could not be downloaded"):
        pack("sa1b-download", links(tmp_path, url, ["good", "flipped"]), out,
             "--md5", tmp_path / "md5")
    assert report_of(out)["failed"] == {"sa_000001.tar": "the MD5 checksum is wrong"}
    assert_complete(out, "sa_000000.tar")


def test_no_file_is_unpacked_outside_its_folder(tmp_path):
    """Only the last part of absolute names and names with ".." is used, and links are ignored."""
    with tarfile.open(tmp_path / "t.tar", mode="w") as tar:
        for name in ("../up.jpg", "/etc/root.jpg", "a/../../b.jpg"):
            add_file(tar, name, b"jpg")
        link = tarfile.TarInfo("link.jpg")
        link.type = tarfile.SYMTYPE
        link.linkname = "/etc/passwd"
        tar.addfile(link)
    assert download.unpack(tmp_path / "t.tar", tmp_path / "in" / "t", "*.jpg") == 3
    assert names_in(tmp_path / "in" / "t") == {"b.jpg", "root.jpg", "up.jpg"}
    assert names_in(tmp_path) == {"in", "t.tar"}


@pytest.mark.parametrize("text, fault", [
    ("", "it is empty"),
    ("<!DOCTYPE html><pre>sa_000000.tar\thttp://x/y\n", "it is a web page"),
    ("name\tlink\na.tar\n", "it begins with 'name link'"),
    ("../sa_000000.tar\thttp://x/y\n", "no row has a file sa_<digits>.tar and its link"),
    ("sa_images_ids.txt\thttp://x/y\n", "it begins with 'sa_images_ids.txt http://x/y'"),
    ("sa_000000.tar\n", "no row has a file")])
def test_a_file_that_is_not_a_list_of_links_is_refused(tmp_path, text, fault):
    (tmp_path / "links.txt").write_text(text)
    with pytest.raises(FuseDiTError, match=f"is not a list of file_name TAB cdn_link: .*{fault}"):
        pack("sa1b-download", tmp_path / "links.txt", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_rows_of_other_files_are_left_out_and_named(tmp_path, url, capsys):
    """Meta's list has a row of sa_images_ids.txt. This one is also cut short, and joins two."""
    path = links(tmp_path, url, ["good", "404"])
    with open(path, "a") as file:
        file.write(f"sa_images_ids.txt\t{url}/good/ids\nsa_000001.tar\t{url}/good/sa_000001.tar\n"
                   f"sa_000000.tar\t{url}/good/sa_000000.tar\nsa_000002.tar")
    pack("sa1b-download", path, tmp_path / "out")
    assert names_in(tmp_path / "out") == {"download.json", "sa_000000", "sa_000001"}
    report = report_of(tmp_path / "out")
    assert report["files"] == report["whole"] == 2
    assert report["left_out"] == ["sa_images_ids.txt", "sa_000002.tar"]
    assert report["repeated"] == ["sa_000001.tar"]         # with another link
    left_out, repeated = capsys.readouterr().err.splitlines()
    assert left_out.endswith(" are left out: sa_images_ids.txt, sa_000002.tar")
    assert repeated.endswith(" the last is used: sa_000001.tar")


@pytest.mark.parametrize("template, end, heading", [
    ("{}\t{}", "\n", "file_name\tcdn_link"), ("{}\t{}", "\r\n", "\ufefffile_name\tcdn_link"),
    ("{}    {}", "\n", ""), ('"{}","{}"', "\n", '"file_name","cdn_link"'),
    ("'{}'\t'{}'", "\n", ""), ("{},{}", "\n", "file_name,cdn_link"),
    (" {}\t {} ", "\n\n", "file_name\tcdn_link")])
def test_a_list_that_another_program_has_saved(tmp_path, template, end, heading):
    """TABs, commas or spaces; quotes; CRLF and a byte order mark; capitals; no heading."""
    url = "https://host.net/m1/An_8-x.tar?ccb=10-5&oh=00_Af,B&oe=6717&_nc_sid=0fd"
    lines = [heading, template.format("SA_000000.TAR", url), template.format("sa_000010.tar", url)]
    path = tmp_path / "links.txt"
    path.write_bytes(end.join(lines).encode())
    listed = sa1b.read_links(path)
    assert listed.links == {"sa_000000.tar": url, "sa_000010.tar": url}
    assert listed.left_out == listed.repeated == []


def test_a_wrong_package_from_a_registry_is_refused(tmp_path, url, monkeypatch):
    package = "emoji-datasource-google/-/emoji-datasource-google-16.0.0.tgz"
    monkeypatch.setitem(TARS, package, b"another")
    monkeypatch.setattr(download, "TRIES", 2)
    with pytest.raises(FuseDiTError, match="the SHA-512 checksum is wrong.*--registry"):
        pack("emoji", tmp_path / "out", "--packages", tmp_path / "packages",
             "--registry", f"{url}/x")
    assert not names_in(tmp_path / "packages")
