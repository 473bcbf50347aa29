"""Make data sets: images and their captions as WebDataset shards, and the demo's tiny Gemma.

    python prepare_data.py shapes shards/shapes -n 200000
    python prepare_data.py emoji shards/emoji                # 5,017 real ones, downloaded
    python prepare_data.py folder photos/ captions.jsonl shards/photos
    python prepare_data.py folder photos/ shards/photos      # captions in .txt beside the images
    python prepare_data.py cc12m cc12m-wds/ train.jsonl.gz shards/cc12m
    python prepare_data.py sa1b-download links.txt sa1b/
    python prepare_data.py sa1b sa1b/ captions/ shards/sa1b
    python prepare_data.py journeydb train_anno_realease_repath.jsonl imgs/ shards/journeydb
    python prepare_data.py encode shards/cc12m --vae PATH    # latents beside the shards
    python prepare_data.py check shards/cc12m --grid cc12m.png
    python prepare_data.py index shards/others               # shards that came without index.json
    python prepare_data.py tiny-gemma demo/gemma

A shard is a tar of KEY.image.jpg (or png, webp), KEY.synthetic_caption.txt (written by a model) and
KEY.original_caption.txt (the one that came with the image). Beside the shards, index.json lists
them, offsets.npy says where in them each sample begins, and report.json counts what became of every
input. A run that was interrupted or killed is resumed by the same command. Train on OUT with
`python train_gpu.py --data OUT`.
"""
import argparse
import os
import textwrap
from pathlib import Path

from fusedit_lib import threads

threads.limit_spinning()                    # takes effect only before torch is imported

from fusedit_lib.backend import local_world, pick_device
from fusedit_lib.cli import DTYPE, HelpFormatter, RenamedFlag, natural, positive, run
from fusedit_lib.data import (
    cc12m,
    check,
    emoji,
    folder,
    index,
    journeydb,
    latents,
    sa1b,
    shapes,
)
from fusedit_lib.shapes import tiny_gemma

SEED_HELP = "seed of all random choices"


def make_tiny_gemma(args):
    """Run `prepare_data.py tiny-gemma`."""
    device = pick_device(args.device)
    tiny_gemma.make(args.out, args.steps, args.batch_size, args.lr, args.seed, device,
                    args.overwrite)


# ---------------------------------------------------------------------------- argument types
def aspect_ratio(text):
    """argparse type of the ratio of an image's longer to its shorter side."""
    ratio = float(text)
    if not ratio >= 1:                      # "nan" as well
        raise argparse.ArgumentTypeError("must be at least 1")
    return ratio


def jpeg_quality(text):
    """argparse type of the quality of a JPEG."""
    quality = int(text)
    if not 1 <= quality <= 100:
        raise argparse.ArgumentTypeError("must be from 1 to 100")
    return quality


# ---------------------------------------------------------------------------- common arguments
def add_out(p, what="folder for the shards"):
    p.add_argument("out", type=Path, metavar="OUT", help=what)


def add_image_rules(p, size=0):
    """Which images are packed, and how they are stored."""
    p.add_argument("--size", type=natural, default=size, metavar="PIXELS",
                   help="shrink images to this shorter side; 0: store their files as they are")
    p.add_argument("--quality", type=jpeg_quality, default=95,
                   help="JPEG quality of images that are shrunk")
    p.add_argument("--min-size", type=natural, default=1, metavar="PIXELS",
                   help="skip images whose shorter side is below it")
    p.add_argument("--max-aspect", type=aspect_ratio, default=1000, metavar="RATIO",
                   help="skip images with a larger ratio of longer to shorter side")


def add_shard_size(p):
    p.add_argument("--shard-size", type=positive, default=2000, help="inputs of each shard")


def add_run_options(p):
    """Arguments that have no influence on what is written."""
    p.add_argument("--overwrite", action="store_true",
                   help="start again: replace what an earlier run wrote to OUT")
    add_workers(p, "number of processes; what they write does not depend on it")


def add_workers(p, what, default=os.cpu_count()):
    p.add_argument("--workers", type=positive, default=default, help=what)


def add_caption_columns(p, key, caption):
    """For captions that are stored in files of their own."""
    p.add_argument("--key-column", default=key, metavar="NAME",
                   help="column of CAPTIONS that holds the key of the image")
    p.add_argument("--caption-column", default=caption, metavar="NAME",
                   help="column of CAPTIONS that holds the caption")


def add_device(p):
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")


def add_shard_folder(p):
    p.add_argument("folder", type=Path, metavar="FOLDER", help="folder of the *.tar")


# ---------------------------------------------------------------------------- the commands
class Commands:
    """The commands of a parser.

    The settings in report.json have the order in which a command's arguments are added here.
    """

    def __init__(self, parser):
        self.subparsers = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(self, name, function, summary, example, details=""):
        """The parser of a new command, which calls function(args).

        summary: one line for the list of commands. details: what --help adds to it.
        """
        p = self.subparsers.add_parser(
            name, help=summary, description=textwrap.fill(summary + details, 80),
            epilog=f"example:\n  python prepare_data.py {name} {example}",
            formatter_class=HelpFormatter)
        p.set_defaults(run=function, command=name)
        return p


def parse_args(argv=None):
    """The arguments of the command line, or of a list; args.run(args) runs the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    commands = Commands(parser)
    add_shapes(commands)
    add_emoji(commands)
    add_folder(commands)
    add_tiny_gemma(commands)
    add_cc12m(commands)
    add_sa1b_download(commands)
    add_sa1b(commands)
    add_journeydb(commands)
    add_check(commands)
    add_index(commands)
    add_encode(commands)
    return parser.parse_args(argv)


def add_shapes(commands):
    p = commands.add("shapes", shapes.shapes, "draw scenes of coloured shapes, the demo's data set",
                     "shards/shapes -n 200000")
    add_out(p)
    add_shard_size(p)
    p.add_argument("--seed", type=int, default=0, help=SEED_HELP)
    add_run_options(p)
    p.add_argument("-n", type=positive, default=200000, help="number of images")
    p.add_argument("--image-size", type=positive, default=32, help="their side in pixels")


def add_emoji(commands):
    p = commands.add("emoji", emoji.emoji, "pack about 5,000 real emoji", "shards/emoji",
                     " in two styles, with captions; some (style, concept) pairs are held out")
    add_out(p)
    add_image_rules(p)
    add_shard_size(p)
    p.add_argument("--seed", type=int, default=0, help=SEED_HELP)
    add_run_options(p)
    cache = Path("~/.cache/fusedit/emoji").expanduser()
    p.add_argument("--packages", type=Path, default=cache, metavar="DIR",
                   help="where the downloaded packages, 25 MB, are kept")
    registry = os.environ.get("NPM_CONFIG_REGISTRY", "https://registry.npmjs.org")
    p.add_argument("--registry", default=registry, metavar="URL",
                   help="npm registry to download them from")


def add_folder(commands):
    p = commands.add("folder", folder.folder, "pack a folder of images and their captions",
                     "photos/ captions.jsonl shards/photos")
    p.add_argument("images", type=Path, metavar="IMAGES",
                   help="folder that is searched, with all folders below it")
    p.add_argument("captions", type=Path, metavar="CAPTIONS", nargs="?",
                   help=".json, .jsonl or .csv file with an image name and a caption in each row "
                   "(columns `image` and `caption`, and `synthetic_caption` if a model wrote one), "
                   "or a folder of .txt files; if left out: .txt files beside the images")
    add_out(p)
    add_image_rules(p)
    add_shard_size(p)
    p.add_argument("--seed", type=int, default=0, help=SEED_HELP)
    add_run_options(p)


def add_tiny_gemma(commands):
    p = commands.add("tiny-gemma", make_tiny_gemma, "train the demo's frozen text tower",
                     "demo/gemma", ", a Gemma 2 of two million parameters, on text about scenes")
    add_out(p, "folder for the model and its tokenizer")
    p.add_argument("--steps", type=positive, default=1200, help="training steps")
    p.add_argument("--batch-size", type=positive, default=64, help="texts in each step")
    p.add_argument("--lr", type=float, default=2e-3, help="highest learning rate")
    add_device(p)
    p.add_argument("--seed", type=int, default=0, help=SEED_HELP)
    p.add_argument("--overwrite", action="store_true", help="replace the model in OUT")


def add_cc12m(commands):
    p = commands.add("cc12m", cc12m.cc12m, "pack CC12M with its LLaVA-NeXT captions",
                     "cc12m-wds/ train.jsonl.gz shards/cc12m",
                     ": pixparse/cc12m-wds and CaptionEmporium/conceptual-captions-cc12m-"
                     "llavanext, one shard for each tar of the former")
    p.add_argument("images", type=Path, metavar="IMAGES", help="folder of the tars")
    p.add_argument("captions", type=Path, metavar="CAPTIONS",
                   help=".jsonl, .jsonl.gz or .parquet file, or a folder of them")
    add_caption_columns(p, "key", "caption_llava")
    add_out(p)
    add_image_rules(p)
    add_run_options(p)


def add_sa1b_download(commands):
    p = commands.add("sa1b-download", sa1b.sa1b_download, "download and unpack SA-1B",
                     "links.txt sa1b/", " from Meta's list of links. Every tar is checked; those "
                     "that fail are tried again by the same command")
    p.add_argument("links", type=Path, metavar="LINKS", help="Meta's list: file_name TAB cdn_link")
    add_out(p, "folder for sa_000000/ and so on")
    p.add_argument("--md5", type=Path, metavar="FILE", help="checksums, as md5sum writes them")
    p.add_argument("--keep-tars", action="store_true", help="do not delete tars once unpacked")
    add_workers(p, "number of files to download at a time", 8)


def add_sa1b(commands):
    p = commands.add("sa1b", sa1b.sa1b, "pack SA-1B with PixArt's SAM-LLaVA captions",
                     "sa1b/ captions/ shards/sa1b")
    p.add_argument("images", type=Path, metavar="IMAGES",
                   help="folder that is searched, with all folders below it")
    p.add_argument("captions", type=Path, metavar="CAPTIONS",
                   help="folder of sa_1.txt and so on; or a .jsonl, .jsonl.gz or .parquet file, or "
                   "a folder of them")
    add_caption_columns(p, "__key__", "txt")
    add_out(p)
    add_image_rules(p, size=512)
    add_shard_size(p)
    add_run_options(p)


def add_journeydb(commands):
    p = commands.add("journeydb", journeydb.journeydb, "pack JourneyDB, with prompts as captions",
                     "train_anno_realease_repath.jsonl imgs/ shards/journeydb",
                     "; GPT's captions are stored as the original ones")
    p.add_argument("annotations", type=Path, metavar="ANNOTATIONS",
                   help="train_anno_realease_repath.jsonl")
    p.add_argument("images", type=Path, metavar="IMAGES", help="folder of 000/, 001/ and so on")
    add_out(p)
    add_image_rules(p, size=512)
    add_shard_size(p)
    add_run_options(p)


def add_check(commands):
    p = commands.add("check", check.check, "read shards and report what is wrong with them",
                     "shards/cc12m --grid cc12m.png",
                     ". Every image is decoded; an index.json that is missing or wrong is replaced")
    add_shard_folder(p)
    p.add_argument("--grid", type=Path, metavar="OUT.png",
                   help="save an image grid of some samples with their captions")
    p.add_argument("--sheet", type=Path, action=RenamedFlag, new_name="--grid", dest="grid")
    add_workers(p, "number of processes")


def add_index(commands):
    p = commands.add("index", index.index, "write index.json for shards that came without it",
                     "shards/others", ", without decoding their images")
    add_shard_folder(p)
    add_workers(p, "number of processes")


def add_encode(commands):
    p = commands.add("encode", latents.encode, "write the VAE latents of shards beside them",
                     "shards/cc12m --vae PATH_OR_HUB_ID", ". Training then reads the latents in "
                     "place of the images. torchrun distributes the shards over several GPUs")
    add_shard_folder(p)
    p.add_argument("--vae", required=True, help="as in the model's config: a folder or a hub id")
    p.add_argument("--image-size", type=positive, default=512, help="the model's, in pixels")
    p.add_argument("--batch-size", type=positive, default=16, help="images encoded at a time")
    add_device(p)
    p.add_argument("--dtype", **DTYPE,
                   help="of the computation; auto: bf16 where the device supports it, else float32")
    p.add_argument("--compile", action="store_true",
                   help="on a GPU, compile the VAE: faster, after a minute")
    p.add_argument("--overwrite", action="store_true", help="replace existing latents")
    add_workers(p, "number of processes that decode images",
                max(1, os.cpu_count() // local_world()))


def main():
    args = parse_args()
    return args.run(args)


if __name__ == "__main__":
    run(main, "--workers or --batch-size")
