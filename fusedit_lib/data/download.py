"""Files of the network, whole or not at all: SA-1B's thousand tars, and the packages of emoji."""
import errno
import os
import shutil
import tarfile
import threading
import time
from fnmatch import fnmatch
from http.client import HTTPException
from pathlib import PurePosixPath
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from tqdm import tqdm

from fusedit_lib.data.shards import ends_well

CHUNK = 1 << 20                             # bytes at a time, at most
SILENCE = 60                                # seconds: then, or below 1 kB/s for as long, anew
TRIES = 6                                   # in a row without a new byte
WAIT = 1.0                                  # seconds after the first of them, then 2, 4, ...
FINAL = {400, 401, 403, 404, 405, 410, 451}  # answers that another try does not change


class Failed(Exception):
    """Why a file could not be had."""


# ---- one file ------------------------------------------------------------------------------------

def fetch(url, path, wrong, saw):
    """Bring a file to `path`, going on with PATH.part where there is one; raises Failed.

    It must have the length that the server says, and pass wrong(file) -> what is wrong, or None.
    saw(bytes, length) is told of what arrives, and may raise Failed to end it. PATH.part.id keeps
    what the server calls this version of the file, so that two never become one.
    """
    part, tries = path.with_name(path.name + ".part"), 0
    while True:
        before = part.stat().st_size if part.exists() else 0
        try:
            receive(url, part, before, saw)
            if why := wrong(part):
                drop(part)
                raise OSError(why)
            with open(part, "rb") as file:
                os.fsync(file.fileno())
            version(part).unlink(missing_ok=True)   # first: whoever finds `path` looks no further
            return os.replace(part, path)
        except (OSError, HTTPException, ValueError) as e:  # URLError and timeouts are OSErrors
            if getattr(e, "errno", None) in (errno.ENOSPC, errno.EACCES, errno.EROFS):
                raise
            code = getattr(e, "code", None)
            why = f"{code} {e.reason}" if code else str(e) or type(e).__name__
            now = part.stat().st_size if part.exists() else 0
            tries = 1 if now - before > 1000 * SILENCE else tries + 1
            if code in FINAL or isinstance(e, ValueError) or tries >= TRIES:
                raise Failed(why) from None
            time.sleep(WAIT * 2 ** (tries - 1))


def version(part):
    return part.with_name(part.name + ".id")


def drop(part):
    part.unlink(missing_ok=True)
    version(part).unlink(missing_ok=True)


def receive(url, part, have, saw):
    """Append to `part`, which has `have` bytes, what is missing; raises OSError."""
    headers = {"User-Agent": "fusedit"} | ({"Range": f"bytes={have}-"} if have else {})
    if have and version(part).exists():
        headers["If-Range"] = version(part).read_text()
    try:
        answer = urlopen(Request(url, headers=headers), timeout=SILENCE)
    except HTTPError as e:
        if e.code != 416:                   # nothing comes after the bytes that are here
            raise
        if e.headers.get("Content-Range", "").endswith(f"/{have}"):
            return
        drop(part)
        raise OSError("the file has changed") from None
    goes_on = answer.status == 206
    if goes_on and not answer.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
        raise OSError("the server sent another part than it was asked for")
    name = answer.headers.get("ETag", "") or answer.headers.get("Last-Modified", "")
    if not goes_on and name and not name.startswith("W/"):
        version(part).write_text(name)
    with answer, open(part, "ab" if goes_on else "wb") as file:
        have = have if goes_on else 0
        length = answer.headers.get("Content-Length")
        length = int(length) + have if length else None
        since, then = time.monotonic(), have
        while block := answer.read1(CHUNK):
            file.write(block)
            have += len(block)
            saw(len(block), length)
            if time.monotonic() - since > SILENCE:
                if have - then < 1000 * SILENCE:
                    raise OSError("too slow")
                since, then = time.monotonic(), have
    if length not in (None, have):
        raise OSError(f"{have} of {length} bytes arrived")


def unpack(tar, folder, wanted):
    """The wanted files of a tar into a folder that is there whole or not at all; how many.

    A file comes under the last part of its name alone, so that none can end up elsewhere; links
    and whatever else is not a file are left out.
    """
    tmp, count = folder.with_name(f".{folder.name}.tmp"), 0
    shutil.rmtree(tmp, ignore_errors=True)
    tmp.mkdir(parents=True)
    with tarfile.open(tar) as files:
        for member in files:
            if member.isfile() and fnmatch(member.name, wanted):
                with open(tmp / PurePosixPath(member.name).name, "wb") as copy:
                    shutil.copyfileobj(files.extractfile(member), copy)
                count += 1
    os.sync()                               # one for all of them: renaming must not come first
    os.replace(tmp, folder)
    return count


def damaged_tar(path):
    """What is wrong with a tar, or None: every header must be one, and the end be there."""
    try:
        with tarfile.open(path, "r:") as tar:
            for _ in tar:
                tar.members.clear()         # else it remembers all of them
            return None if ends_well(tar.fileobj, tar.offset) else "the tar is cut short"
    except tarfile.TarError as e:
        return f"not a whole tar ({e})"


# ---- many ----------------------------------------------------------------------------------------

class Bar(tqdm):
    """Bytes, of about as many as the files make up whose length is known so far."""

    def __init__(self, files, **more):
        super().__init__(unit="B", unit_scale=True, disable=None, smoothing=0.05, **more)
        self.files, self.lengths, self.stop, self.lock = files, {}, False, threading.Lock()

    def saw(self, name, size, length):
        with self.lock:
            if self.stop:
                raise Failed("interrupted")
            if length:
                self.lengths[name] = length
                self.total = sum(self.lengths.values()) * self.files // len(self.lengths)
            self.update(size)
