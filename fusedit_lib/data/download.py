"""Downloads that are complete or absent: SA-1B's thousand tars, and the packages of emoji."""
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

CHUNK = 1 << 20                             # bytes to read at a time, at most
SILENCE = 60                                # seconds without data before a connection is dropped
SLOWEST = 1000                              # bytes per second; a slower one is dropped as well
TRIES = 6                                   # in a row with (almost) no new data
WAIT = 1.0                                  # seconds before the second try; then 2, 4, ...
FINAL = {400, 401, 403, 404, 405, 410, 451}     # HTTP errors that trying again does not change
LOCAL = {errno.ENOSPC, errno.EACCES, errno.EROFS}   # the disk's errors, not the network's


class DownloadFailed(Exception):
    """The reason why a file could not be downloaded."""


# ---------------------------------------------------------------------------- one file
def fetch(url, path, find_fault, on_data):
    """Download a file to `path`, resuming from PATH.part if there is one.

    The file must have the length that the server announces. find_fault(path) returns what is wrong
    with a complete file, or None. on_data(bytes, length) is called for all data that arrives, and
    may raise DownloadFailed to stop. Raises DownloadFailed, or OSError if the disk is full or
    cannot be written.

    PATH.part.id holds the server's name for this version of the file, so that parts of two
    versions are never put together.
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
            # Renaming comes last: whoever finds PATH does not look for the other files.
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
    """Append to `part`, which has `have` bytes, what is missing of the file; raises OSError."""
    response = request(url, part, have)
    if response is None:
        return
    resuming = response.status == 206
    if resuming:
        mode = "ab"
        content_range = response.headers.get("Content-Range", "")
        if not content_range.startswith(f"bytes {have}-"):
            raise OSError("the server sent another part than it was asked for")
    else:                                   # the whole file, whatever was asked for
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
        checked = time.monotonic()          # when the speed was last checked, and the bytes then
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
        raise OSError(f"{have} of {length} bytes arrived")


def request(url, part, have):
    """The response to a request for what is missing after `have` bytes, or None: nothing is."""
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
    """An exception as a few words."""
    code = getattr(error, "code", None)
    if code:
        return f"{code} {error.reason}"
    return str(error) or type(error).__name__


# ---------------------------------------------------------------------------- archives
def unpack(archive, folder, pattern):
    """Extract the files of a tar that match `pattern`; returns how many.

    The folder appears complete or not at all. Files are named by the last part of their names in
    the tar, so that none can be written elsewhere; links and other special files are left out.
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
    os.sync()                               # all files must be on disk before the folder is renamed
    os.replace(tmp, folder)
    return count


def tar_fault(path):
    """What is wrong with a tar, or None: every header must be valid, and its end be there."""
    try:
        with tarfile.open(path, "r:") as tar:
            for _ in tar:
                tar.members.clear()         # it would keep them all in memory
            if not ends_well(tar.fileobj, tar.offset):
                return "the tar is cut short"
    except tarfile.TarError as e:
        return f"not a whole tar ({e})"
    return None


# ---------------------------------------------------------------------------- progress
class DownloadBar(tqdm):
    """Progress in bytes of several downloads, which threads may report at the same time.

    The total is estimated from the files whose length is known so far.
    """

    def __init__(self, files, **options):
        super().__init__(unit="B", unit_scale=True, disable=None, smoothing=0.05, **options)
        self.files = files                  # how many
        self.lengths = {}                   # file name -> bytes
        self.stop = False                   # set it to stop all downloads
        self.lock = threading.Lock()

    def advance(self, name, size, length):
        """Count `size` bytes that have arrived of a file; length: of all of it, or None."""
        with self.lock:
            if self.stop:
                raise DownloadFailed("interrupted")
            if length:
                self.lengths[name] = length
                self.total = sum(self.lengths.values()) * self.files // len(self.lengths)
            self.update(size)
