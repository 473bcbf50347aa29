"""Local copies of remote shards, which all processes of a host share."""
import contextlib
import errno
import hashlib
import os
import resource
import shutil
import tempfile
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout
from webdataset.gopen import gopen

from fusedit import FuseDiTError
from fusedit_lib.files import atomic_write

BLOCK = 1 << 20                             # bytes that are copied at a time
WAIT = 10                                   # seconds between two looks at another process's copy


def raise_file_limit():
    """Allow this process and those that it starts as many open files as the system grants."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):         # macOS refuses an unlimited number
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def check_limits(error, folder):
    """Raise FuseDiTError if an error means that this process has too many files or a full disk.

    Such an error says nothing about the data that it was raised for. folder: that of the cache.
    """
    # The errors of safetensors have no errno, and a command that cannot write its copy on may raise
    # one of its own when it is closed.
    text = f"{error} {error.__context__}"
    if os.strerror(errno.EMFILE) in text:
        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        raise FuseDiTError(f"too many open files: the limit is {limit} for each process. Raise it, "
                           "as with `ulimit -n 65536`; a new run needs fewer with fewer --streams "
                           "or fewer data sets in --data-weights") from error
    for number in (errno.ENOSPC, errno.EDQUOT):
        if os.strerror(number) in text:
            raise FuseDiTError(f"no space is left in {folder} for copies of remote shards: give "
                               "--cache a folder on a larger disk; a new run needs less with fewer "
                               "--streams") from error


class ShardCache:
    """A folder with copies of remote files. The oldest are deleted."""

    def __init__(self, folder, kept, on_progress=lambda: None):
        """folder: "" for one in the temporary folder; kept: the number of copies that remain.

        on_progress: called while a file is copied, by this process or by another that this one
        waits for, as long as the copy grows.
        """
        self.folder = Path(folder or Path(tempfile.gettempdir(), "fusedit-shards"))
        self.kept = kept
        self.on_progress = on_progress

    def path(self, url):
        """Path of the copy of a remote file."""
        return self.folder / f"{hashlib.sha1(url.encode()).hexdigest()}.tar"

    @contextlib.contextmanager
    def locked(self, path):
        """Keep other processes from a copy. Waits while another process copies or scans it."""
        lock = FileLock(path.with_suffix(".lock"))
        before = None
        while not lock.is_locked:
            with contextlib.suppress(Timeout):
                lock.acquire(timeout=WAIT)
                continue
            copied = total_bytes(self.folder.glob(f".{path.name}.*.tmp"))
            if copied != before:
                self.on_progress()
            before = copied
        try:
            yield
        finally:
            lock.release()

    def fetch(self, url, size):
        """Path of the local copy of a remote file. One process copies it while others wait.

        size: its bytes, or None. Raises OSError if the copy fails or has another size.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.path(url)
        with self.locked(path):
            if not path.exists():
                self.make_room()
                path.with_suffix(".npy").unlink(missing_ok=True)
                with atomic_write(path) as tmp, gopen(url) as source, open(tmp, "wb") as copy:
                    while block := source.read(BLOCK):
                        copy.write(block)
                        self.on_progress()
                    if size not in (None, copy.tell()):
                        raise OSError(f"{copy.tell()} of {size} bytes received")
            os.utime(path)                  # so that its age is the time since its last use
        return path

    def make_room(self):
        """Delete the oldest copies. A process that has one open can still read it."""
        with FileLock(self.folder / "lock"):
            copies = sorted(self.folder.glob("*.tar"), key=os.path.getmtime)
            for old in copies[:-self.kept]:
                old.with_suffix(".npy").unlink(missing_ok=True)
                old.unlink()

    def offsets(self, path, scan):
        """The offsets of the samples in a copy: scan(path), which is stored beside the copy.

        The stored array begins with the size of the tar, and is used only if that still holds.
        """
        stored = path.with_suffix(".npy")
        with self.locked(path):
            size = path.stat().st_size
            if stored.exists():
                known = np.load(stored)
                if known[0] == size:
                    return known[1:]
            offsets = scan(path)
            with atomic_write(stored) as tmp, open(tmp, "wb") as file:
                np.save(file, np.array([size, *offsets]))
        return offsets

    def check_space(self, sizes):
        """Raise FuseDiTError if the disk cannot hold the copies that the cache will have.

        sizes: the bytes of all remote files; nothing is checked if one of them is None.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(self.folder).free
        except OSError as e:
            raise FuseDiTError(f"--cache {self.folder} cannot be used for copies of remote shards: "
                               f"{e}") from None
        if None in sizes:
            return
        needed = sum(sizes) * min(1, self.kept / len(sizes))
        room = free + total_bytes(self.folder.iterdir())   # what is there counts as well
        if room < needed:
            raise FuseDiTError(f"{self.folder} has room for {room / 1e9:.1f} GB, but copies of "
                               f"remote shards will take {needed / 1e9:.1f} GB: give --cache a "
                               "folder on a larger disk; a new run needs less with fewer --streams")


def total_bytes(paths):
    """The total size of files, some of which another process may be deleting."""
    total = 0
    for path in paths:
        with contextlib.suppress(OSError):
            total += path.stat().st_size
    return total
