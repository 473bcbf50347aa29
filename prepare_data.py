"""Make data sets: captioned pictures as WebDataset shards, and the demo's tiny Gemma.

    python prepare_data.py shapes shards/shapes -n 200000
    python prepare_data.py emoji shards/emoji                # 5,017 real ones, downloaded
    python prepare_data.py folder photos/ captions.jsonl shards/photos
    python prepare_data.py folder photos/ shards/photos      # captions in .txt beside the images
    python prepare_data.py cc12m cc12m-wds/ train.jsonl.gz shards/cc12m
    python prepare_data.py sa1b-download links.txt sa1b/
    python prepare_data.py sa1b sa1b/ captions/ shards/sa1b
    python prepare_data.py journeydb train_anno_realease_repath.jsonl imgs/ shards/journeydb
    python prepare_data.py encode shards/cc12m --vae PATH    # latents beside the shards
    python prepare_data.py check shards/cc12m --sheet cc12m.png
    python prepare_data.py index shards/others               # shards that came without index.json
    python prepare_data.py tiny-gemma demo/gemma

A shard is a tar of KEY.image.jpg (png, webp), KEY.synthetic_caption.txt (a model's caption) and
KEY.original_caption.txt (the one it came with). index.json lists the shards, offsets.npy says
where in them each sample begins, report.json what became of every input. A run that was stopped,
or killed, goes on with the same command. Train on OUT with  python train_gpu.py --data OUT.
"""
import argparse
import os
from pathlib import Path

from fusedit_lib import threads

threads.limit_spinning()                    # before torch is imported

from fusedit_lib.backend import local_world, pick_device
from fusedit_lib.cli import DTYPE, HelpFormatter, positive, run
from fusedit_lib.data import cc12m, check, emoji, folder, journeydb, latents, sa1b
from fusedit_lib.data.shapes import shapes

REGISTRY = os.environ.get("NPM_CONFIG_REGISTRY", "https://registry.npmjs.org")


def tiny_gemma(args):
    from fusedit_lib.shapes import tiny_gemma as gemma
    gemma.make(args.out, args.steps, args.batch_size, args.lr, args.seed,
               pick_device(args.device), args.overwrite)


def rate(text):
    """argparse's type of a number of 1 or more."""
    if not float(text) >= 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return float(text)


def natural(text):
    """argparse's type of a whole number from 0 up."""
    if int(text) < 0:
        raise argparse.ArgumentTypeError("must not be negative")
    return int(text)


def quality(text):
    """argparse's type of a JPEG's quality."""
    if not 1 <= int(text) <= 100:
        raise argparse.ArgumentTypeError("must be from 1 to 100")
    return int(text)


# ---- flags that several commands have ------------------------------------------------------------

def packs(p, size=0, seed=True, shard_size=2000, pictures=True):
    """Those of a command that writes shards."""
    p.add_argument("out", type=Path, metavar="OUT", help="folder for the shards")
    if pictures:
        p.add_argument("--size", type=natural, default=size, metavar="PIXELS", help="shrink "
                       "pictures to this shorter side; 0: keep their files as they are")
        p.add_argument("--quality", type=quality, default=95, help="of a JPEG that is shrunk")
        p.add_argument("--min-size", type=natural, default=1, metavar="PIXELS", help="skip "
                       "pictures with a shorter side below it")
        p.add_argument("--max-aspect", type=rate, default=1000, metavar="RATIO", help="skip "
                       "pictures that are more times as long as wide")
    if shard_size:
        p.add_argument("--shard-size", type=positive, default=shard_size, help="inputs of a shard")
    if seed:
        p.add_argument("--seed", type=int, default=0, help="of everything random")
    p.add_argument("--overwrite", action="store_true",
                   help="begin anew: replace what an earlier run wrote to OUT")
    workers(p)


def workers(p, default=os.cpu_count(), what="processes; what they write does not depend on it"):
    p.add_argument("--workers", type=positive, default=default, help=what)


def looks_up(p, key, caption):
    """Those of a command whose captions come in files of their own."""
    p.add_argument("--key-column", default=key, metavar="NAME", help="of CAPTIONS: the key")
    p.add_argument("--caption-column", default=caption, metavar="NAME", help="of CAPTIONS: text")


# ---- the command line ----------------------------------------------------------------------------

def arguments(argv=None):
    top = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    def command(function, name, about, example):
        p = commands.add_parser(name, help=about, description=about, formatter_class=HelpFormatter,
                                epilog=f"example:\n  python prepare_data.py {name} {example}")
        p.set_defaults(run=function, command=name)
        return p

    drawn(command)
    published(command)
    looked_at(command)
    return top.parse_args(argv)


def drawn(command):
    """Data for a laptop, and anyone's own."""
    s = command(shapes, "shapes", "draw captioned scenes of coloured shapes, the demo's "
                "data", "shards/shapes -n 200000")
    packs(s, pictures=False)
    s.add_argument("-n", type=positive, default=200000, help="how many pictures")
    s.add_argument("--image-size", type=positive, default=32, help="their side in pixels")
    e = command(emoji.emoji, "emoji", "pack about 5,000 real emoji with words for them, and hold "
                "some (style, concept) pairs out", "shards/emoji")
    packs(e)
    e.add_argument("--packages", type=Path, default=Path("~/.cache/fusedit/emoji").expanduser(),
                   metavar="DIR", help="where the downloaded packages are kept, 25 MB")
    e.add_argument("--registry", default=REGISTRY, metavar="URL", help="of npm, to get them from")
    f = command(folder.folder, "folder", "pack a folder of images and their captions",
                "photos/ captions.jsonl shards/photos")
    f.add_argument("images", type=Path, metavar="IMAGES", help="folder, searched with all below it")
    f.add_argument("captions", type=Path, metavar="CAPTIONS", nargs="?",
                   help=".json, .jsonl or .csv with an image name and a caption a row (columns "
                   "`image` and `caption`, and `synthetic_caption` if a model wrote one), or a "
                   "folder of .txt files; left out: .txt files beside the images")
    packs(f)
    g = command(tiny_gemma, "tiny-gemma", "train the demo's frozen reader, a two-million-parameter "
                "Gemma 2, on text about scenes", "demo/gemma")
    g.add_argument("out", type=Path, metavar="OUT", help="folder for the model and its tokenizer")
    g.add_argument("--steps", type=positive, default=1200, help="training steps")
    g.add_argument("--batch-size", type=positive, default=64, help="texts a step")
    g.add_argument("--lr", type=float, default=2e-3, help="highest learning rate")
    g.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    g.add_argument("--seed", type=int, default=0, help="of everything random")
    g.add_argument("--overwrite", action="store_true", help="replace what is in OUT")


def published(command):
    """The paper's three data sets, as their publishers lay them out."""
    c = command(cc12m.cc12m, "cc12m", "pack CC12M (pixparse/cc12m-wds) with its LLaVA-NeXT "
                "captions (CaptionEmporium/conceptual-captions-cc12m-llavanext), a shard for each "
                "of its tars", "cc12m-wds/ train.jsonl.gz shards/cc12m")
    c.add_argument("images", type=Path, metavar="IMAGES", help="folder of the tars")
    c.add_argument("captions", type=Path, metavar="CAPTIONS", help=".jsonl, .jsonl.gz or "
                   ".parquet, or a folder of them")
    looks_up(c, "key", "caption_llava")
    packs(c, seed=False, shard_size=0)
    d = command(sa1b.sa1b_download, "sa1b-download", "download SA-1B from Meta's list of "
                "links, each tar checked and unpacked; what fails is tried again by the same "
                "command", "links.txt sa1b/")
    d.add_argument("links", type=Path, metavar="LINKS", help="Meta's list: file_name TAB cdn_link")
    d.add_argument("out", type=Path, metavar="OUT", help="folder for sa_000000/ and so on")
    d.add_argument("--md5", type=Path, metavar="FILE", help="checksums, as md5sum writes them")
    d.add_argument("--keep-tars", action="store_true", help="do not delete what is unpacked")
    workers(d, 8, "files at a time")
    s = command(sa1b.sa1b, "sa1b", "pack SA-1B with PixArt's SAM-LLaVA captions",
                "sa1b/ captions/ shards/sa1b")
    s.add_argument("images", type=Path, metavar="IMAGES", help="folder, searched with all below it")
    s.add_argument("captions", type=Path, metavar="CAPTIONS", help="folder of sa_1.txt and so "
                   "on; or .jsonl, .jsonl.gz, .parquet, or a folder of them")
    looks_up(s, "__key__", "txt")
    packs(s, 512, seed=False)
    j = command(journeydb.journeydb, "journeydb", "pack JourneyDB: its prompts as captions, GPT's "
                "captions as the other ones",
                "train_anno_realease_repath.jsonl imgs/ shards/journeydb")
    j.add_argument("annotations", type=Path, metavar="ANNOTATIONS",
                   help="train_anno_realease_repath.jsonl")
    j.add_argument("images", type=Path, metavar="IMAGES", help="folder of 000/, 001/ and so on")
    packs(j, 512, seed=False)


def looked_at(command):
    """What is done to shards that are there."""
    k = command(check.check, "check", "read shards whole, say what is in them and what is wrong, "
                "and write index.json anew where it is", "shards/cc12m --sheet cc12m.png")
    k.add_argument("folder", type=Path, metavar="FOLDER", help="folder of the *.tar")
    k.add_argument("--sheet", type=Path, metavar="OUT.png", help="draw some samples, with captions")
    workers(k, what="processes")
    i = command(check.index, "index", "list the shards of a folder that came without index.json, "
                "without looking at their pictures", "shards/others")
    i.add_argument("folder", type=Path, metavar="FOLDER", help="folder of the *.tar")
    workers(i, what="processes")
    v = command(latents.encode, "encode", "write each shard's VAE latents beside it, which "
                "training then reads in place of the pictures; torchrun shares the shards out",
                "shards/cc12m --vae PATH_OR_HUB_ID")
    v.add_argument("folder", type=Path, metavar="FOLDER", help="folder of the *.tar")
    v.add_argument("--vae", required=True, help="as in the model's config: a folder or a hub id")
    v.add_argument("--image-size", type=positive, default=512, help="the model's, in pixels")
    v.add_argument("--batch-size", type=positive, default=16, help="pictures at a time")
    v.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    v.add_argument("--dtype", **DTYPE,
                   help="of compute: auto is bf16 where the device has it, else float32")
    v.add_argument("--compile", action="store_true",
                   help="on a GPU, compile the VAE: faster, after a minute")
    v.add_argument("--overwrite", action="store_true", help="replace latents that are there")
    workers(v, max(1, os.cpu_count() // local_world()),
            "processes that decode pictures")


def main():
    args = arguments()
    return args.run(args)


if __name__ == "__main__":
    run(main, "--workers or --batch-size")
