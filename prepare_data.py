"""Pack images and their captions into WebDataset shards, and train small models for demos.

    python prepare_data.py shapes shards/shapes -n 200000
    python prepare_data.py emoji shards/emoji                # 5,017 emoji, downloaded
    python prepare_data.py folder photos/ captions.jsonl shards/photos
    python prepare_data.py folder photos/ shards/photos      # captions in .txt files
    python prepare_data.py parquet data/*.parquet shards/art # images in Parquet files
    python prepare_data.py cc12m cc12m-wds/ train.jsonl.gz shards/cc12m
    python prepare_data.py sa1b-download links.txt sa1b/
    python prepare_data.py sa1b sa1b/ captions/ shards/sa1b
    python prepare_data.py journeydb train_anno_realease_repath.jsonl imgs/ shards/journeydb
    python prepare_data.py encode shards/cc12m --vae PATH    # writes VAE latents beside the shards
    python prepare_data.py check shards/cc12m --grid cc12m.png
    python prepare_data.py index shards/others               # for shards that have no index.json
    python prepare_data.py tiny-gemma demo/gemma
    python prepare_data.py tiny-vae shards/emoji/train tiny-vae

For each sample, a shard contains the files KEY.image.jpg (or .png, .webp),
KEY.synthetic_caption.txt (written by a model) and KEY.original_caption.txt (supplied with the
image). Beside the shards, index.json lists them, offsets.npy stores the byte offset of each sample,
and report.json accounts for every input. To resume a run that was interrupted or killed, repeat the
command. To train on OUT, run `python train_gpu.py --data OUT`.
"""
import argparse
import os
import textwrap
from pathlib import Path

from fusedit_lib import threads

threads.limit_spinning()                    # has no effect once torch is imported

from fusedit_lib import cli, seeds
from fusedit_lib.backend import local_world, pick_device
from fusedit_lib.cli import (
    DTYPE,
    HelpFormatter,
    RenamedFlag,
    jpeg_quality,
    natural,
    positive,
    run,
)
from fusedit_lib.data import (
    cc12m,
    check,
    emoji,
    folder,
    index,
    journeydb,
    latents,
    packing,
    parquet,
    sa1b,
    shapes,
    tiny_vae,
)
from fusedit_lib.data.images import FILTERS
from fusedit_lib.shapes import tiny_gemma

SEED_HELP = "random seed; -1: draw one, which is kept when the command is repeated"


def make_tiny_gemma(args):
    """Run `prepare_data.py tiny-gemma`."""
    device = pick_device(args.device)
    tiny_gemma.make(args.out, args.steps, args.batch_size, args.lr, args.seed, device,
                    args.overwrite)


# ---------------------------------------------------------------------------- argument types
def aspect_ratio(text):
    """argparse type for an aspect ratio: the longer side divided by the shorter side."""
    ratio = float(text)
    if not ratio >= 1:                      # also rejects "nan"
        raise argparse.ArgumentTypeError("must be at least 1")
    return ratio


# ---------------------------------------------------------------------------- common arguments
def add_out(p, what="folder for the shards"):
    p.add_argument("out", type=Path, metavar="OUT", help=what)


def add_image_rules(p, size=0):
    """Add the flags that select images and determine how they are stored."""
    group = p.add_argument_group("images")
    group.add_argument("--size", type=natural, default=size, metavar="PIXELS",
                       help="downscale larger images so that their shorter side has this length; "
                            "0 stores image files unchanged where possible")
    group.add_argument("--quality", type=jpeg_quality, default=95,
                       help="JPEG quality of downscaled images")
    group.add_argument("--resize", choices=tuple(FILTERS), default="bicubic",
                       help="filter to downscale with; bilinear: as in the published code")
    group.add_argument("--min-size", type=natural, default=1, metavar="PIXELS",
                       help="skip images whose shorter side is shorter than this")
    group.add_argument("--max-aspect", type=aspect_ratio, default=1000, metavar="RATIO",
                       help="skip images whose longer side is more than RATIO times the shorter")
    group.add_argument("--skip-duplicates", action="store_true",
                       help="skip images whose pixels are those of an earlier input")
    group = p.add_argument_group("caption length")
    group.add_argument("--min-words", type=natural, default=0, metavar="N",
                       help="leave out captions with fewer words, and images without any other")
    group.add_argument("--max-words", type=natural, default=0, metavar="N",
                       help="leave out captions with more words, and images without any other; 0 "
                            "leaves out none")


def add_shard_options(p, seed=True):
    """Add the flags that determine which sample is written to which shard."""
    group = p.add_argument_group("shards")
    group.add_argument("--shard-size", type=positive, default=2000, metavar="N",
                       help="number of inputs per shard")
    if seed:
        group.add_argument("--seed", type=cli.seed, default=0, help=SEED_HELP)


def add_run_options(p):
    """Add the flags that do not affect the contents of the shards."""
    group = p.add_argument_group("execution")
    group.add_argument("--overwrite", action="store_true",
                       help="start over and replace what an earlier run wrote to OUT")
    add_workers(group, "number of worker processes; the output does not depend on it")


def add_workers(group, what, default=os.cpu_count()):
    group.add_argument("--workers", type=positive, default=default, metavar="N", help=what)


def add_caption_columns(p, key, caption):
    """Add the flags for captions that are stored in separate files."""
    group = p.add_argument_group("captions")
    group.add_argument("--key-column", default=key, metavar="NAME",
                       help="column of CAPTIONS that contains the image's key")
    group.add_argument("--caption-column", default=caption, metavar="NAME",
                       help="column of CAPTIONS that contains the caption")


def add_columns(p, where, image):
    """Add the flags for the columns of files whose columns have other names than usual."""
    group = p.add_argument_group("captions")
    group.add_argument("--image-column", metavar="NAME",
                       help=f"column of {where} that {image} (default: a usual name, such as "
                            "image or file_name)")
    group.add_argument("--caption-column", metavar="NAME", action="append",
                       help=f"column of {where} that contains the caption (default: a usual name, "
                            "such as caption or text); repeat the flag if several columns contain "
                            "captions of the image")
    return group


def add_device(group):
    group.add_argument("--device", default="auto",
                       help="device to compute on: auto, cpu, cuda, cuda:1, ...")


def add_shard_folder(p):
    p.add_argument("folder", type=Path, metavar="FOLDER",
                   help="folder that contains the shards (*.tar)")


def add_image_key(p):
    p.add_argument("--image-key", default="", metavar="EXTENSION",
                   help="extension of the images in the shards (default: image.*, jpg, jpeg, png, "
                        "webp or another image's)")


def add_caption_key(p):
    p.add_argument("--caption-key", default="", metavar="NAME",
                   help="extension of the captions in the shards, or a field of KEY.json (default: "
                        "synthetic_caption.txt and original_caption.txt, txt, or caption, text, "
                        "...)")


# ---------------------------------------------------------------------------- the commands
class Parser(argparse.ArgumentParser):
    """A parser for which flags may also stand between CAPTIONS and OUT."""

    def parse_known_args(self, args=None, namespace=None):
        found, rest = super().parse_known_args(args, namespace)
        positional = len(rest) == 1 and not rest[0].startswith("-")
        if positional and getattr(found, "captions", "") is None:
            found.captions = found.out      # argparse has taken CAPTIONS for OUT
            found.out = Path(rest.pop())
        return found, rest


class Commands:
    """Adds commands to a parser.

    report.json lists the settings in the order in which a command's arguments are added below.
    """

    def __init__(self, parser):
        self.subparsers = parser.add_subparsers(required=True, metavar="COMMAND", title="commands")

    def add(self, name, function, summary, example, details=""):
        """Add a command that calls function(args), and return its parser.

        summary: one line for the list of commands. details: continues the summary in the
        description that the command's own --help prints.
        """
        description = f"{summary[0].upper()}{summary[1:]}{details}."
        p = self.subparsers.add_parser(
            name, help=summary,
            description=textwrap.fill(description, 80, break_on_hyphens=False),
            epilog=f"example:\n  python prepare_data.py {name} {example}",
            formatter_class=HelpFormatter)
        p.set_defaults(run=function, command=name)
        return p


def parse_args(argv=None):
    """Parse argv or, if it is None, the command line; args.run(args) runs the command."""
    parser = Parser(description=__doc__, formatter_class=HelpFormatter)
    commands = Commands(parser)
    add_shapes(commands)
    add_emoji(commands)
    add_folder(commands)
    add_parquet(commands)
    add_tiny_gemma(commands)
    add_tiny_vae(commands)
    add_cc12m(commands)
    add_sa1b_download(commands)
    add_sa1b(commands)
    add_journeydb(commands)
    add_check(commands)
    add_index(commands)
    add_encode(commands)
    args = parser.parse_args(argv)
    if "max_words" in args and 0 < args.max_words < args.min_words:
        parser.error("argument --max-words: must not be below --min-words")
    return args


def add_shapes(commands):
    p = commands.add("shapes", shapes.shapes, "draw scenes of coloured shapes, the demo's data set",
                     "shards/shapes -n 200000")
    add_out(p)
    group = p.add_argument_group("images")
    add_shard_options(p)
    add_run_options(p)
    group.add_argument("-n", type=positive, default=200000, help="number of images")
    group.add_argument("--image-size", type=positive, default=32, metavar="PIXELS",
                       help="width and height of the images")


def add_emoji(commands):
    p = commands.add("emoji", emoji.emoji, "download and pack about 5,000 emoji", "shards/emoji",
                     " in two styles, with captions. Some (style, concept) pairs are held out of "
                     "OUT/train and written to OUT/held-out")
    add_out(p)
    add_image_rules(p)
    add_shard_options(p)
    add_run_options(p)
    group = p.add_argument_group("download")
    cache = Path("~/.cache/fusedit/emoji").expanduser()
    group.add_argument("--packages", type=Path, default=cache, metavar="DIR",
                       help="folder for the downloaded packages, 25 MB")
    registry = os.environ.get("NPM_CONFIG_REGISTRY", "https://registry.npmjs.org")
    group.add_argument("--registry", default=registry, metavar="URL",
                       help="npm registry to download the packages from")


def add_folder(commands):
    p = commands.add("folder", folder.folder, "pack a folder of images and their captions",
                     "photos/ captions.jsonl shards/photos")
    p.add_argument("images", type=Path, metavar="IMAGES",
                   help="folder of images, searched recursively")
    p.add_argument("captions", type=Path, metavar="CAPTIONS", nargs="?",
                   help="file with an image name and a caption in each row (.csv, .tsv, .txt, "
                   ".json, .jsonl, .parquet), or a folder of .txt files (default: "
                   "metadata.jsonl, .csv or .parquet in IMAGES, otherwise .txt, .caption or .json "
                   "files beside the images)")
    add_out(p)
    add_image_rules(p)
    add_shard_options(p)
    group = add_columns(p, "CAPTIONS", "names the image")
    group.add_argument("--image-root", metavar="PATH", action="append",
                       help="what IMAGES was called where CAPTIONS was written, if its names are "
                            "absolute paths of another machine; repeat the flag if it had several "
                            "names")
    add_run_options(p)


def add_parquet(commands):
    p = commands.add("parquet", parquet.parquet,
                     "pack images that are stored in Parquet files with their captions",
                     "data/train-*.parquet shards/art",
                     ", as data sets on the Hugging Face hub are. The order of the rows is kept")
    p.add_argument("data", type=Path, metavar="DATA", nargs="+",
                   help=".parquet files, or folders of them, searched recursively")
    add_out(p)
    add_image_rules(p)
    add_shard_options(p, seed=False)
    add_columns(p, "DATA", "contains the images")
    add_run_options(p)


def add_tiny_gemma(commands):
    p = commands.add("tiny-gemma", make_tiny_gemma, "train the demo's frozen text tower",
                     "demo/gemma", ", a Gemma 2 with two million parameters, on text about scenes "
                     "of coloured shapes")
    add_out(p, "folder for the model and its tokenizer")
    p.add_argument("--steps", type=positive, default=1200, metavar="N",
                   help="number of training steps")
    p.add_argument("--batch-size", type=positive, default=64, metavar="N",
                   help="number of texts per step")
    p.add_argument("--lr", type=float, default=2e-3, help="peak learning rate")
    add_device(p)
    p.add_argument("--seed", type=cli.seed, default=0, help="random seed; -1: draw one")
    p.add_argument("--overwrite", action="store_true", help="replace the model in OUT")


def add_tiny_vae(commands):
    p = commands.add("tiny-vae", tiny_vae.tiny_vae, "train a small VAE on the images of shards",
                     "shards/emoji/train tiny-vae", ". It encodes 4 x 4 pixels as 8 numbers. A "
                     "diffusion model is then trained on its latents: see encode")
    add_shard_folder(p)
    add_out(p, "folder for the VAE")
    p.add_argument("--image-size", type=positive, default=64, metavar="PIXELS",
                   help="images are cropped to the central square and resized to this")
    p.add_argument("--steps", type=positive, default=2000, metavar="N",
                   help="number of training steps")
    p.add_argument("--batch-size", type=positive, default=16, metavar="N",
                   help="number of images per step")
    p.add_argument("--lr", type=float, default=3e-3, help="peak learning rate")
    add_device(p)
    p.add_argument("--seed", type=cli.seed, default=0, help="random seed; -1: draw one")
    p.add_argument("--overwrite", action="store_true", help="replace the VAE in OUT")


def add_cc12m(commands):
    p = commands.add("cc12m", cc12m.cc12m, "pack CC12M with its LLaVA-NeXT captions",
                     "cc12m-wds/ train.jsonl.gz shards/cc12m",
                     ". Download the images (pixparse/cc12m-wds) and the captions "
                     "(CaptionEmporium/conceptual-captions-cc12m-llavanext) from the Hugging Face "
                     "hub first. Each tar of images becomes one shard")
    p.add_argument("images", type=Path, metavar="IMAGES", help="folder of the cc12m-wds tars")
    p.add_argument("captions", type=Path, metavar="CAPTIONS",
                   help=".jsonl, .jsonl.gz or .parquet file, or a folder of such files")
    add_caption_columns(p, "key", "caption_llava")
    add_out(p)
    add_image_rules(p)
    add_run_options(p)


def add_sa1b_download(commands):
    p = commands.add("sa1b-download", sa1b.sa1b_download, "download and unpack SA-1B",
                     "links.txt sa1b/", " from Meta's list of links. Every tar is checked; repeat "
                     "the command to retry those that failed")
    p.add_argument("links", type=Path, metavar="LINKS",
                   help="Meta's list of links, with lines of file_name TAB cdn_link")
    add_out(p, "folder for the images, in subfolders sa_000000/, sa_000001/, ...")
    p.add_argument("--md5", type=Path, metavar="FILE",
                   help="file of MD5 checksums in the format of md5sum")
    p.add_argument("--keep-tars", action="store_true", help="keep the tars after unpacking them")
    add_workers(p, "number of simultaneous downloads", 8)


def add_sa1b(commands):
    p = commands.add("sa1b", sa1b.sa1b, "pack SA-1B with PixArt's SAM-LLaVA captions",
                     "sa1b/ captions/ shards/sa1b")
    p.add_argument("images", type=Path, metavar="IMAGES",
                   help="folder of images, searched recursively")
    p.add_argument("captions", type=Path, metavar="CAPTIONS",
                   help="folder of sa_1.txt, sa_2.txt, ...; or a .jsonl, .jsonl.gz or .parquet "
                   "file, or a folder of such files")
    add_caption_columns(p, "__key__", "txt")
    add_out(p)
    add_image_rules(p, size=512)
    add_shard_options(p, seed=False)
    add_run_options(p)


def add_journeydb(commands):
    p = commands.add("journeydb", journeydb.journeydb,
                     "pack JourneyDB with its prompts as captions",
                     "train_anno_realease_repath.jsonl imgs/ shards/journeydb",
                     ". Prompts are stored as synthetic captions, which training uses by default; "
                     "the captions that GPT wrote are stored as original captions")
    p.add_argument("annotations", type=Path, metavar="ANNOTATIONS",
                   help="train_anno_realease_repath.jsonl")
    p.add_argument("images", type=Path, metavar="IMAGES",
                   help="folder that contains 000/, 001/, ...")
    add_out(p)
    add_image_rules(p, size=512)
    add_shard_options(p, seed=False)
    add_run_options(p)


def add_check(commands):
    p = commands.add("check", check.check, "read shards and report their contents and problems",
                     "shards/cc12m --grid cc12m.png",
                     ". Every image is decoded, and a missing or wrong index.json is rewritten")
    add_shard_folder(p)
    p.add_argument("--grid", type=Path, metavar="OUT.png",
                   help="save an image grid of random samples with their captions")
    p.add_argument("--sheet", type=Path, action=RenamedFlag, new_name="--grid", dest="grid")
    add_image_key(p)
    add_caption_key(p)
    add_workers(p, "number of worker processes")


def add_index(commands):
    p = commands.add("index", index.index, "write index.json for shards that have none",
                     "shards/others", ", without decoding their images, and report the images and "
                     "captions that they contain")
    add_shard_folder(p)
    add_image_key(p)
    add_caption_key(p)
    add_workers(p, "number of worker processes")


def add_encode(commands):
    p = commands.add("encode", latents.encode, "encode the images of shards into VAE latents",
                     "shards/cc12m --vae PATH_OR_HUB_ID", ". The latents are stored beside the "
                     "shards, and training reads them in place of the images. Start the command "
                     "with torchrun to distribute the shards across several GPUs")
    add_shard_folder(p)
    group = p.add_argument_group("latents")
    group.add_argument("--vae", required=True, metavar="PATH_OR_HUB_ID",
                       help="the VAE that the model's config names: a folder or a hub id")
    group.add_argument("--image-size", type=positive, default=512, metavar="PIXELS",
                       help="image size of the model")
    add_image_key(group)
    group.add_argument("--resize", choices=tuple(FILTERS), default="bicubic",
                       help="filter with which images are resized; the training run must have the "
                            "same --resize")
    group = p.add_argument_group("execution")
    group.add_argument("--batch-size", type=positive, default=16, metavar="N",
                       help="number of images encoded at once")
    add_device(group)
    group.add_argument("--dtype", **DTYPE,
                       help="precision of the computation; auto is bf16 if the device supports it "
                            "natively, otherwise float32")
    group.add_argument("--compile", action="store_true",
                       help="compile the VAE on a GPU, which takes about a minute and makes "
                            "encoding faster")
    group.add_argument("--overwrite", action="store_true", help="replace existing latents")
    add_workers(group, "number of processes that decode images",
                max(1, os.cpu_count() // local_world()))


def main():
    args = parse_args()
    if "seed" in args:
        stored = packing.started_seed(args) if args.seed == seeds.RANDOM else None
        args.seed = seeds.settle(args.seed, stored)
    return args.run(args)


if __name__ == "__main__":
    run(main, "--workers or --batch-size")
