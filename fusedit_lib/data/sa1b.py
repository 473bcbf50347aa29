"""SA-1B: downloads Meta's images and packs them with the captions that LLaVA wrote for PixArt."""
import hashlib
import json
import re
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from tqdm import tqdm

from fusedit import FuseDiTError
from fusedit_lib.data import packing
from fusedit_lib.data.captions import CaptionFolder, CaptionTable, WithCaptions
from fusedit_lib.data.download import (
    DownloadBar,
    DownloadFailed,
    fetch,
    tar_fault,
    unpack,
)
from fusedit_lib.data.images import image_rules
from fusedit_lib.data.items import (
    Item,
    digest,
    list_images,
    make_sample,
    output_settings,
    require_exists,
    split_lines,
)
from fusedit_lib.files import atomic_write

TAR_NAME = re.compile(r"sa_\d+\.tar")
# A row of the list: a name and a link. The list separates them with a TAB; spreadsheets and other
# programs that save it again use commas or spaces, and quotes.
ROW = re.compile(r"""["']?([^"'\s,;]+)["']?[\s,;]+["']?([a-z]+://[^"'\s]+)["']?""", re.I)
MD5 = re.compile(r"[0-9a-f]{32}")


# ---------------------------------------------------------------------------- packing
class ListedItems:
    """Iterates over the items in a range of lines of a list of images.

    lines: a LineRange of paths relative to `folder`. An image's key is its file name without the
    suffix. WithCaptions adds the captions.
    """

    def __init__(self, lines, folder):
        self.lines = lines
        self.folder = folder

    def __iter__(self):
        for _, line in self.lines:
            name = line.decode(errors="surrogateescape")
            yield Item(name, self.folder / name, captions={}, key=Path(name).stem)


def sa1b(args):
    """Run `prepare_data.py sa1b`."""
    require_exists(args.images, args.captions)
    folders = [path for path in sorted(args.images.iterdir())
               if path.is_dir() and not path.name.startswith(".")]
    # Listing millions of files is slow, so changes are detected from the folders' modification
    # times instead.
    times = digest((path.name, path.stat().st_mtime_ns) for path in folders or [args.images])
    if not packing.begin(args, **output_settings(args, folders=times)):
        return

    progress = args.out / ".progress"
    names = progress / "images.txt"
    others = progress / "other-files.json"
    if not names.exists():
        write_image_list(args.images, names, others)
    parts, total = split_lines(names, args.shard_size)
    if not total:
        packing.remove_output(args.out)
        raise FuseDiTError(f"no images in {args.images}")

    more = dict(other_files=packing.read_json_or_none(others) or {})
    if is_caption_folder(args.captions):
        captions = CaptionFolder(args.captions)
    else:
        captions = CaptionTable.from_files(args.captions, args.key_column, args.caption_column,
                                           progress / "captions.duckdb")
        more["captions"] = captions.counts()
    jobs = [WithCaptions(ListedItems(part, args.images), captions) for part in parts]
    make = partial(make_sample, image_rules(args))
    packing.pack(args, "sa1b", jobs, make, total=total, **more)


def write_image_list(folder, path, others_path):
    """Write the path of every image below `folder` to a text file, one per line.

    others_path: of a JSON file to be written first, the number of other files by suffix.
    """
    others = Counter()
    names = list_images(folder, others)
    with atomic_write(path) as tmp:
        with open(tmp, "w", errors="surrogateescape") as file:
            for name in tqdm(names, unit="image", desc="listing", disable=None):
                file.write(f"{name}\n")
        with atomic_write(others_path) as others_tmp:
            others_tmp.write_text(json.dumps(others))


def is_caption_folder(path):
    """True for a folder of .txt files, that is, a folder without any .parquet or .jsonl files."""
    if not path.is_dir():
        return False
    for pattern in ("*.parquet", "*.jsonl*", "*/*.parquet"):
        if any(path.glob(pattern)):
            return False
    return True


# ---------------------------------------------------------------------------- lists to download
class LinkList(NamedTuple):
    """The contents of Meta's list."""
    links: dict                             # file name -> url, of every sa_<digits>.tar
    left_out: list                          # names of all other rows, such as sa_images_ids.txt
    repeated: list                          # file names with several links; the last is used


def read_links(path):
    """The LinkList of Meta's list, a heading followed by lines of NAME TAB URL.

    Raises FuseDiTError if the file cannot be read or has no row of a tar.
    """
    try:
        text = path.read_text("utf-8-sig")
    except OSError as e:
        raise FuseDiTError(f"cannot read {path}: {e.strerror or e}") from None
    except UnicodeDecodeError as e:
        raise FuseDiTError(f"cannot read {path}: {e}") from None

    links = {}
    left_out = []
    repeated = []
    for line in text.splitlines():
        row = ROW.fullmatch(line.strip())
        name = row[1].lower() if row else ""
        if TAR_NAME.fullmatch(name):
            if links.get(name, row[2]) != row[2] and name not in repeated:
                repeated.append(name)
            links[name] = row[2]
        elif line.strip() and not is_heading(line):
            left_out.append(row[1] if row else line.split()[0].strip("\"',;")[:60])
    if not links:
        raise FuseDiTError(f"{path} is not a list of file_name TAB cdn_link: " + list_fault(text))
    return LinkList(links, left_out, repeated)


def is_heading(line):
    """True for the heading file_name TAB cdn_link."""
    return "file_name" in line and "://" not in line


def list_fault(text):
    """A phrase that says why a text is not Meta's list."""
    if not text.strip():
        return "it is empty"
    if text.lstrip().startswith("<"):
        return "it is a web page; download the text file that Meta's page links to"
    first = " ".join(text.split()[:2])[:60]
    return f"no row has a file sa_<digits>.tar and its link; it begins with {first!r}"


def report_list(path, listed):
    """Print to stderr which rows of the list are not used."""
    if listed.left_out:
        print(f"{path}: rows without a file sa_<digits>.tar and its link are left out: "
              f"{packing.first_few(listed.left_out)}", file=sys.stderr)
    if listed.repeated:
        print(f"{path}: of several links of a file the last is used: "
              f"{packing.first_few(listed.repeated)}", file=sys.stderr)


def read_checksums(path):
    """{file name: md5} from lines in md5sum's format; the name may also come first."""
    checksums = {}
    for line in path.read_text().lower().splitlines():
        words = line.replace("*", " ").split()
        if len(words) != 2:
            continue
        md5, name = words
        if MD5.fullmatch(name) and not MD5.fullmatch(md5):
            name, md5 = words
        checksums[PurePosixPath(name).name] = md5
    return checksums


# ---------------------------------------------------------------------------- download
class TarDownload:
    """Downloads tars one by one, checks each, and extracts its images into a folder."""

    def __init__(self, out, links, checksums, keep_tars, bar):
        self.out = out
        self.links = links                  # file name -> url
        self.checksums = checksums          # file name -> md5, for all, some or none of the files
        self.keep_tars = keep_tars
        self.bar = bar                      # a DownloadBar

    def __call__(self, name):
        """Download one tar and unpack it to a folder in OUT; raises DownloadFailed."""
        tar = self.out / name
        folder = image_folder(self.out, name)
        find_fault = partial(self.find_fault, name)
        if not tar.exists() or find_fault(tar):
            tar.unlink(missing_ok=True)
            fetch(self.links[name], tar, find_fault, partial(self.bar.advance, name))
        if not unpack(tar, folder, "*.jpg"):
            folder.rmdir()
            tar.unlink()
            raise DownloadFailed("the tar contains no images")
        if not self.keep_tars:
            tar.unlink()

    def find_fault(self, name, path):
        """The problem with a downloaded tar, or None."""
        if name in self.checksums:
            with open(path, "rb") as file:
                md5 = hashlib.file_digest(file, "md5").hexdigest()
            if md5 != self.checksums[name]:
                return "the MD5 checksum is wrong"
        return tar_fault(path)


def image_folder(out, name):
    return out / name.removesuffix(".tar")


def sa1b_download(args):
    """Run `prepare_data.py sa1b-download`: download, check and unpack every tar in the list."""
    listed = read_links(args.links)
    links = listed.links
    report_list(args.links, listed)
    checksums = {}
    if args.md5:
        checksums = read_checksums(args.md5)
    args.out.mkdir(parents=True, exist_ok=True)
    missing = [name for name in links if not image_folder(args.out, name).is_dir()]
    remove_leftovers(args, links.keys() - set(missing))

    with DownloadBar(len(missing), desc="downloading") as bar:
        download = TarDownload(args.out, links, checksums, args.keep_tars, bar)
        failed = download_all(download, missing, args.workers)

    complete = len(links) - len(failed)
    report = dict(files=len(links), whole=complete, failed=failed, left_out=listed.left_out,
                  repeated=listed.repeated)
    with atomic_write(args.out / "download.json") as tmp:
        tmp.write_text(json.dumps(report, indent=1) + "\n")
    print(f"{complete} of {len(links)} files are complete: {args.out}")
    if failed:
        message = (f"{len(failed)} of {len(links)} files could not be downloaded (see above or "
                   "download.json); repeat the command to retry them")
        if any(reason.startswith("403") for reason in failed.values()):
            message += ", with a new list from Meta if links have expired (403)"
        raise FuseDiTError(message)


def remove_leftovers(args, complete):
    """Delete what a killed run left in OUT: unpacked tars and half-written reports."""
    if not args.keep_tars:
        for name in complete:
            (args.out / name).unlink(missing_ok=True)
    for path in args.out.glob(".download.json.*.tmp"):
        path.unlink(missing_ok=True)


def download_all(download, names, workers):
    """Call download(name) for all names, `workers` at a time; returns {failed name: reason}."""
    failed = {}
    with ThreadPoolExecutor(workers) as pool:
        jobs = {pool.submit(download, name): name for name in names}
        try:
            for job in as_completed(jobs):
                try:
                    job.result()
                except DownloadFailed as reason:
                    name = jobs[job]
                    failed[name] = str(reason)
                    tqdm.write(f"{name}: {reason}", file=sys.stderr)
        except BaseException:               # Ctrl-C or a full disk
            download.bar.stop = True
            pool.shutdown(cancel_futures=True)
            raise
    return failed
