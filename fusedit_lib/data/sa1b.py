"""TODO."""
import hashlib
import json
import re
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from pathlib import Path, PurePosixPath

from tqdm import tqdm

from fusedit import FuseDiTError
from fusedit_lib.data import packing
from fusedit_lib.data.captions import Captioned, Captions, Texts
from fusedit_lib.data.download import Bar, Failed, damaged_tar, fetch, unpack
from fusedit_lib.data.images import SUFFIXES, rules
from fusedit_lib.data.items import Item, cut_lines, digest, item_sample, listing, need, said
from fusedit_lib.files import atomic_write

# ---- SA-1B ---------------------------------------------------------------------------------------

class Listed:
    """Items of a part of the list of images, below a folder."""

    def __init__(self, lines, folder):
        self.lines, self.folder = lines, folder

    def __iter__(self):
        for _, line in self.lines:
            name = line.decode(errors="surrogateescape")
            yield Item(name, self.folder / name, {}, Path(name).stem)


def sa1b(args):
    need(args.images, args.captions)
    folders = [p for p in sorted(args.images.iterdir()) if p.is_dir() and p.name[0] != "."]
    if not packing.begin(args, **said(args, folders=digest(
            (p.name, p.stat().st_mtime_ns) for p in folders or [args.images]))):
        return
    names, progress = args.out / ".progress" / "images.txt", args.out / ".progress"
    if not names.exists():
        with atomic_write(names) as tmp, open(tmp, "w", errors="surrogateescape") as file:
            for name in tqdm(listing(args.images), unit="image", desc="listing", disable=None):
                file.write(f"{name}\n")
    parts, total = cut_lines(names, args.shard_size)
    if not total:
        packing.remove(args.out)
        raise FuseDiTError(f"no images in {args.images} ({', '.join(sorted(SUFFIXES))})")
    texts = args.captions.is_dir() and not any(
        next(args.captions.glob(kind), None) for kind in ("*.parquet", "*.jsonl*", "*/*.parquet"))
    captions = Texts(args.captions) if texts else Captions.of_files(
        args.captions, args.key_column, args.caption_column, progress / "captions.duckdb")
    packing.pack(args, "sa1b", [Captioned(Listed(part, args.images), captions) for part in parts],
                 partial(item_sample, rules(args)), total=total,
                 **{} if texts else dict(captions=captions.counts()))


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
