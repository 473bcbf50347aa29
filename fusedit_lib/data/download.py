"""Downloads SA-1B's thousand tars and the emoji packages. A file is either complete or absent."""
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

CHUNK = 1 << 20                             # maximum number of bytes to read at once
SILENCE = 60                                # seconds without data before a connection is dropped
SLOWEST = 1000                              # bytes per second; slower connections are dropped too
TRIES = 6                                   # attempts in a row with (almost) no new data
WAIT = 1.0                                  # seconds before the second try; then 2, 4, ...
FINAL = {400, 401, 403, 404, 405, 410, 451}     # HTTP errors for which retrying is pointless
LOCAL = {errno.ENOSPC, errno.EACCES, errno.EROFS}   # errors of the disk, not of the network


class DownloadFailed(Exception):
    """The reason why a file could not be downloaded."""


# ---------------------------------------------------------------------------- one file
def fetch(url, path, find_fault, on_data):
    """Download a file to `path`, resuming from PATH.part if it exists.

    The file must have the length that the server announces. find_fault(path) returns what is wrong
    with a complete file, or None. on_data(bytes, length) is called whenever data arrives and may
    raise DownloadFailed to stop. Raises DownloadFailed, or OSError if the disk is full or not
    writable.

    PATH.part.id holds the server's identifier for this version of the file, so that parts of two
    versions are never combined.
    """
    part = path.with_name(path.name + ".part")
    tries = 0
    while True:
        before = size_of(part)
        try:
            receive(url, part, before, on_data)
            fault = find_fault(part)
            if fault:
                delete_part(part)
                raise OSError(fault)
            with open(part, "rb") as file:
                os.fsync(file.fileno())
            # Rename last: once PATH exists, nothing cleans up the other files.
            version_path(part).unlink(missing_ok=True)
            os.replace(part, path)
            return
        except (OSError, HTTPException, ValueError) as e:  # URLError and timeouts are OSErrors
            if getattr(e, "errno", None) in LOCAL:
                raise
            if size_of(part) - before > SLOWEST * SILENCE:
                tries = 1                   # it made progress
            else:
                tries += 1
            hopeless = isinstance(e, ValueError) or getattr(e, "code", None) in FINAL
            if hopeless or tries >= TRIES:
                raise DownloadFailed(reason_of(e)) from None
            time.sleep(WAIT * 2 ** (tries - 1))


def receive(url, part, have, on_data):
    """Append the rest of the file to `part`, which already has `have` bytes; raises OSError."""
    response = request(url, part, have)
    if response is None:
        return
    resuming = response.status == 206
    if resuming:
        mode = "ab"
        content_range = response.headers.get("Content-Range", "")
        if not content_range.startswith(f"bytes {have}-"):
            raise OSError("the server sent a different part of the file than requested")
    else:                                   # the whole file, whether or not a part was requested
        mode = "wb"
        have = 0
        version = response.headers.get("ETag", "") or response.headers.get("Last-Modified", "")
        if version and not version.startswith("W/"):       # W/ marks a weak validator
            version_path(part).write_text(version)

    length = None                           # of the whole file, if the server announces it
    announced = response.headers.get("Content-Length")
    if announced:
        length = int(announced) + have
    with response, open(part, mode) as file:
        checked = time.monotonic()          # time of the last speed check, and bytes at that time
        checked_bytes = have
        while True:
            data = response.read1(CHUNK)
            if not data:
                break
            file.write(data)
            have += len(data)
            on_data(len(data), length)
            if time.monotonic() - checked > SILENCE:
                if have - checked_bytes < SLOWEST * SILENCE:
                    raise OSError("too slow")
                checked = time.monotonic()
                checked_bytes = have
    if length is not None and have != length:
        raise OSError(f"{have} of {length} bytes received")


def request(url, part, have):
    """Request everything after the first `have` bytes. Returns None if nothing is missing."""
    headers = {"User-Agent": "fusedit"}
    if have:
        headers["Range"] = f"bytes={have}-"
        if version_path(part).exists():
            headers["If-Range"] = version_path(part).read_text()
    try:
        return urlopen(Request(url, headers=headers), timeout=SILENCE)
    except HTTPError as e:
        if e.code != 416:                   # 416: the range begins at or after the file's end
            raise
        if e.headers.get("Content-Range", "").endswith(f"/{have}"):
            return None
        delete_part(part)
        raise OSError("the file has changed") from None


def version_path(part):
    return part.with_name(part.name + ".id")


def delete_part(part):
    part.unlink(missing_ok=True)
    version_path(part).unlink(missing_ok=True)


def size_of(path):
    if not path.exists():
        return 0
    return path.stat().st_size


def reason_of(error):
    """A short description of an exception."""
    code = getattr(error, "code", None)
    if code:
        return f"{code} {error.reason}"
    return str(error) or type(error).__name__


# ---------------------------------------------------------------------------- archives
def unpack(archive, folder, pattern):
    """Extract the files of a tar that match `pattern`; returns their number.

    The folder appears complete or not at all. Only the last part of a name in the tar is used, so
    no file can be written outside the folder. Links and other special files are ignored.
    """
    tmp = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(tmp, ignore_errors=True)
    tmp.mkdir(parents=True)
    count = 0
    with tarfile.open(archive) as tar:
        for member in tar:
            if member.isfile() and fnmatch(member.name, pattern):
                name = PurePosixPath(member.name).name
                with open(tmp / name, "wb") as copy:
                    shutil.copyfileobj(tar.extractfile(member), copy)
                count += 1
    os.sync()                               # put all files on disk before renaming the folder
    os.replace(tmp, folder)
    return count


def tar_fault(path):
    """The problem with a tar, or None if every header is valid and the end marker is present."""
    try:
        with tarfile.open(path, "r:") as tar:
            for _ in tar:
                tar.members.clear()         # tarfile would keep all members in memory
            if not ends_well(tar.fileobj, tar.offset):
                return "the tar is truncated"
    except tarfile.TarError as e:
        return f"not a complete tar ({e})"
    return None


# ---------------------------------------------------------------------------- progress
class DownloadBar(tqdm):
    """Progress in bytes of several downloads, updated by several threads.

    The total is estimated from the files whose lengths are known so far.
    """

    def __init__(self, files, **options):
        super().__init__(unit="B", unit_scale=True, disable=None, smoothing=0.05, **options)
        self.files = files                  # number of files
        self.lengths = {}                   # file name -> bytes
        self.stop = False                   # set it to stop all downloads
        self.lock = threading.Lock()

    def advance(self, name, size, length):
        """Count `size` more bytes of a file; length: of the whole file, or None if unknown."""
        with self.lock:
            if self.stop:
                raise DownloadFailed("interrupted")
            if length:
                self.lengths[name] = length
                self.total = sum(self.lengths.values()) * self.files // len(self.lengths)
            self.update(size)
