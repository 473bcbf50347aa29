"""Draw the images of benchmarks, score them, and compare models.

    python evaluate.py shapes                                      # the demo, 600 prompts
    python evaluate.py shapes --guidance 1,2,3,6 --steps 10,25     # a sweep, with a figure
    torchrun --nproc-per-node 8 evaluate.py geneval --prompts evaluation_metadata.jsonl --model ...
    python evaluate.py fid --real photos --fake evaluation/mjhq-my-model/guidance-6-steps-25/images
    python evaluate.py report a=evaluation/shapes-a b=evaluation/shapes-b

For each combination of settings, a benchmark writes run.json and images/ to
DIR/guidance-G-steps-S/, in the layout that its official scorer expects. The noise of an image
depends only on the seed, the index of its prompt and its number among the images of that prompt. To
resume a run that was stopped, repeat the command. geneval, dpg and mjhq draw only the first N
prompts with -n N; the same command with a larger N, or without -n, adds the rest. For the settings
of the published evaluation, see "The published settings" in docs/evaluation.md.
"""
import argparse
import inspect
import os
from pathlib import Path

from fusedit_lib import threads

threads.limit_spinning()                    # has no effect once torch is imported

from fusedit import FuseDiTError
from fusedit_lib import backend, cli, seeds
from fusedit_lib.cli import HelpFormatter, jpeg_quality, number_list, positive
from fusedit_lib.evaluation import (
    benchmarks,
    emoji,
    emoji_gallery,
    emoji_scorer,
    figures,
    judging,
    metrics,
    results,
)
from fusedit_lib.evaluation.drawing import (
    JPEG_QUALITY,
    SamplingRun,
    claim_folder,
    draw_missing,
    shared_seed,
    started_dtype,
)
from fusedit_lib.evaluation.report import report
from fusedit_lib.evaluation.unseen_words import UNSEEN_WORDS
from fusedit_lib.folders import last_checkpoint
from fusedit_lib.sampling import check_guidance_span, latent_size

# Commands that score the images of benchmarks with external scorers (see docs/evaluation.md).
NEXT_COMMANDS = {
    "geneval": ["python geneval/evaluation/evaluate_images.py {out}/images --outfile "
                "{out}/results.jsonl --model-path DETECTOR",
                "python evaluate.py geneval-score {out}/results.jsonl"],
    "dpg": ["(cd ELLA && PYTHONHASHSEED=0 accelerate launch dpg_bench/compute_dpg_bench.py "
            "--image-root-path {out}/images --resolution {height} --pic-num 4 "
            "--res-path {out}/dpg.txt)",
            "python evaluate.py dpg-score {out}/dpg.txt"],
    "mjhq": ["python evaluate.py fid --real REAL --fake {out}/images"],
}

# Benchmarks whose images must be square -> the reason.
SQUARE = {
    "shapes": "the detector resizes images to a square",
    "dpg": "DPG-Bench's scorer cuts squares out of the image grid",
    "emoji": "the real images are squares",
}

EMOJI_SIZE = 64                             # pixels of the images of emoji --ground-truth


# ---- benchmarks that draw ------------------------------------------------------------------------

def draw_command(args):
    """Draw a benchmark with every combination of --guidance and --steps, and finish each run."""
    check_guidance_span(args.guidance_span)
    folder = args.out
    if folder is None:
        folder = Path("evaluation") / f"{args.name}-{model_name(args.model)}"
    if args.seed == seeds.RANDOM:
        args.seed = shared_seed(folder)
    benchmark = load_benchmark(args)
    if not benchmark.prompts:
        raise FuseDiTError(f"no prompts in {args.prompts}")
    points = len(args.steps)
    if args.guidance is not None:
        points *= len(args.guidance)
    is_sweep = args.name == "shapes" and points > 1
    if is_sweep:
        import matplotlib  # noqa: F401     if it is missing, fail before drawing

    dtype = args.dtype
    if dtype == "auto":
        dtype = started_dtype(folder)
    loaded = cli.open_model(args.model, args.device, dtype, not args.no_ema, args.compile)
    if backend.rank_and_world()[0] == 0:
        cli.announce(loaded, list(dict.fromkeys(benchmark.prompts[:args.n])), args.negative)

    runs = sampling_runs(args, folder, loaded, len(benchmark.prompts))
    gallery = None
    if args.name == "emoji" and backend.rank_and_world()[0] == 0:
        gallery = open_gallery(args, runs[0].height)       # if this fails, fail before drawing
    all_settings = [claim_folder(run, benchmark, loaded.model) for run in runs]
    for run, settings in zip(runs, all_settings, strict=True):
        if draw_missing(run, benchmark, loaded.model, loaded.vae, settings):
            finish_run(run, settings, args, gallery)
    if is_sweep:
        draw_sweep(runs, folder)


def load_benchmark(args):
    """Load the prompts and file names of the benchmark from files or the demo's grammar.

    The -n of emoji, which counts the prompts of each category, becomes the number of all prompts.
    """
    if args.name == "shapes":
        return benchmarks.shapes(args.n, args.seed)
    if args.name == "emoji":
        images = emoji_gallery.read_images(args.data)
        prompts = emoji.choose_prompts(images, UNSEEN_WORDS, args.seed)
        if args.n is not None:
            args.n = emoji.count_prompts(prompts, args.n)
        return emoji.benchmark(prompts)
    load = {"geneval": benchmarks.geneval, "dpg": benchmarks.dpg, "mjhq": benchmarks.mjhq}
    return load[args.name](args.prompts)


def model_name(model):
    """The last part of a model's path; for a checkpoint, the last two: RUN-step-0001000, RUN-50."""
    path = Path(os.path.abspath(last_checkpoint(model)))   # "." and ".." have no name
    if path.name.startswith("step-") or path.name.isdigit():
        return "-".join(path.parts[-2:])
    return path.name


def image_size(args, loaded):
    """(height, width) of the images in pixels.

    Raises FuseDiTError if the model cannot draw them or the benchmark cannot use them.
    """
    height = args.height
    if height is None:
        height = loaded.model.config.image_size
    width = args.width
    if width is None:
        width = loaded.model.config.image_size
    latent_size(loaded.model.config, loaded.vae, height, width)
    if args.name in SQUARE and height != width:
        raise FuseDiTError(f"images of {height} x {width} pixels: {SQUARE[args.name]}; give "
                           "--height and --width the same value")
    return height, width


def sampling_runs(args, folder, loaded, total):
    """A SamplingRun for every combination of --guidance and --steps.

    total: the number of prompts in the whole benchmark.
    """
    height, width = image_size(args, loaded)
    n = total
    if args.n is not None:
        n = min(args.n, total)
    scales = args.guidance
    if scales is None:
        scales = [loaded.model.config.guidance]
    low, high = args.guidance_span
    span = ""
    if (low, high) != (0, 1):
        span = f"-span-{low:g}-{high:g}"
    runs = []
    for guidance in scales:
        for steps in args.steps:
            out = folder / f"guidance-{guidance:g}{span}-steps-{steps}"
            runs.append(SamplingRun(args.name, out, loaded.path, not args.no_ema, args.seed,
                                    steps, guidance, [low, high], args.negative, height, width, n,
                                    args.jpeg_quality, args.batch_size))
    return runs


def open_gallery(args, size):
    return judging.open_gallery(args.data, size, backend.pick_device(args.device))


def finish_run(run, settings, args, gallery):
    """Score the images of a run, or print the commands that do.

    gallery: of emoji, or None in processes that have not opened it.
    """
    drawn = settings["prompts_drawn"]
    total = settings["prompts_total"]
    prompts = f"{drawn} prompts"
    if drawn < total:
        prompts = f"the first {drawn} of {total} prompts"
    print(f"{run.out}/images: {drawn * settings['images']} images for {prompts}")
    if run.name == "shapes":
        judging.score_shapes(run.out, args.n, args.seed, settings)
        return
    if run.name == "emoji":
        if gallery is None:
            gallery = open_gallery(args, run.height)
        judging.score_emoji(run.out, gallery, args.seed, settings, args.nearest)
        return
    print("next:")
    for command in NEXT_COMMANDS[run.name]:
        print("    " + command.format(out=run.out.resolve(), height=run.height))


def draw_sweep(runs, folder):
    """Draw the figure of a sweep if all of its runs have been scored."""
    paths = [run.out / "shapes.json" for run in runs]
    if not all(path.exists() for path in paths):
        return                              # the last process to finish draws it
    scales = list(dict.fromkeys(f"{run.guidance:g}" for run in runs))
    steps = list(dict.fromkeys(str(run.steps) for run in runs))
    name = f"sweep-guidance-{'-'.join(scales)}-steps-{'-'.join(steps)}.png"
    figures.sweep([results.load(path) for path in paths], folder / name)


# ---- other commands ------------------------------------------------------------------------------

def shapes_command(args):
    """Draw and score the shapes benchmark; with --ground-truth, score the detector instead."""
    if args.ground_truth:
        judging.score_detector(args.n, seeds.settle(args.seed))
    else:
        draw_command(args)


def emoji_command(args):
    """Draw and score the emoji benchmark; with --ground-truth, score its scorer instead."""
    if args.ground_truth:
        if args.nearest is not None:
            raise FuseDiTError("--nearest shows drawn images, and --ground-truth draws none: give "
                               "one of them")
        device = backend.pick_device(args.device)
        size = args.height or EMOJI_SIZE
        judging.score_emoji_scorer(args.data, size, args.n, seeds.settle(args.seed), device)
        return
    if args.nearest is not None and len(args.steps) * len(args.guidance or [0]) > 1:
        raise FuseDiTError("--nearest shows the images of one setting: give one number of --steps "
                           "and one of --guidance")
    draw_command(args)


def fid_command(args):
    """Compute the Frechet and kernel distances between two folders of images.

    Both distances compare features that a vision network computes from each image. With Inception
    features and the image preparation of clean-fid, the Frechet distance is FID. With any other
    network it is a different measure and is never called FID.
    """
    device = backend.pick_device(args.device)
    extractor = metrics.load_extractor(args.features, device, args.inception)
    judging.score_distance(args.real, args.fake, extractor, device, args.batch_size, args.workers,
                           args.out)


def geneval_score_command(args):
    results.geneval_score(args.results, args.out)


def dpg_score_command(args):
    results.dpg_score(args.results, args.out)


def compare_command(args):
    results.compare(args.a, args.b)


def report_command(args):
    report(args.results, args.out)


# ---- the command line ----------------------------------------------------------------------------

def add_command(commands, name, function, documented, summary):
    """Add a subcommand whose description in --help is the docstring of `documented`."""
    parser = commands.add_parser(name, formatter_class=HelpFormatter, help=summary,
                                 description=inspect.getdoc(documented))
    parser.set_defaults(command=function)
    return parser


def add_draw_command(commands, name, documented, summary, prompts_help=None):
    """Add a benchmark with the flags that all benchmarks share. Returns its parser."""
    parser = add_command(commands, name, draw_command, documented, summary)
    parser.set_defaults(name=name, prompts=None, jpeg_quality=None)

    group = parser.add_argument_group("what to draw")
    if prompts_help is not None:
        group.add_argument("--prompts", type=Path, required=True, metavar="PATH",
                           help=prompts_help)
        group.add_argument("-n", type=positive, metavar="N",
                           help="draw only the first N prompts (default: all); a larger N adds the "
                                "others to the same folder later")
    group.add_argument("--negative", default="", metavar="TEXT",
                       help="negative prompt: a description of what to steer away from")
    group.add_argument("--seed", type=cli.seed, default=0, metavar="N",
                       help="random seed for the noise, and for the prompts of shapes and of "
                            "emoji; -1: draw one, which the output folder keeps")
    group.add_argument("--height", type=positive, metavar="PIXELS",
                       help="height of the images (default: the size the model was trained at)")
    group.add_argument("--width", type=positive, metavar="PIXELS",
                       help="width of the images (default: the size the model was trained at)")
    group.add_argument("--out", type=Path, metavar="DIR",
                       help="output folder, with one subfolder per combination of settings "
                            "(default: evaluation/BENCHMARK-MODEL)")

    cli.add_model_flags(parser)

    sampler = parser.add_argument_group("sampler")
    sampler.add_argument("--steps", type=number_list(positive), default="25", metavar="N,...",
                         help="number of Euler steps; several values run a sweep")
    sampler.add_argument("--guidance", type=number_list(float), metavar="SCALE,...",
                         help="classifier-free guidance scale: how closely images follow the "
                              "prompt; several values run a sweep (default: the model's own, 6 "
                              "in the paper)")
    cli.add_guidance_span(sampler)
    sampler.add_argument("--batch-size", type=positive, default=32, metavar="N",
                         help="maximum number of images drawn at once; lower it if memory runs "
                              "out")
    return parser


def add_draw_commands(commands):
    parser = add_draw_command(commands, "shapes", benchmarks.shapes,
                              "coloured shapes, scored by an exact pixel detector")
    parser.set_defaults(command=shapes_command)
    group = parser.add_argument_group("shapes")
    group.add_argument("-n", type=positive, default=600, metavar="N",
                       help="number of prompts, spread evenly over the categories; another "
                            "number needs another --out")
    group.add_argument("--ground-truth", action="store_true",
                       help="score the detector instead of a model: render N scenes exactly and "
                            "run the detector on them")
    add_emoji_command(commands)
    add_draw_command(commands, "geneval", benchmarks.geneval,
                     "objects, counts, colours and positions, for GenEval's scorer",
                     "GenEval's prompts/evaluation_metadata.jsonl")
    add_draw_command(commands, "dpg", benchmarks.dpg,
                     "long prompts, for DPG-Bench's scorer",
                     "ELLA's folder dpg_bench/prompts, which contains .txt files")
    parser = add_draw_command(commands, "mjhq", benchmarks.mjhq,
                              "30,000 images for FID", "MJHQ-30K's meta_data.json")
    group = parser.add_argument_group("images")
    group.add_argument("--jpeg-quality", type=jpeg_quality, default=JPEG_QUALITY, metavar="N",
                       help="quality of the JPEGs, from 1 to 100, which changes FID; below 90, "
                            "colour is stored at half the resolution; 75 gives the files of the "
                            "published script")


def add_emoji_command(commands):
    parser = add_draw_command(commands, "emoji", emoji.benchmark,
                              "emoji, scored by the nearest real ones")
    parser.set_defaults(command=emoji_command)
    group = parser.add_argument_group("emoji")
    group.add_argument("--data", type=Path, required=True, metavar="OUT",
                       help="the real images: the OUT of `prepare_data.py emoji OUT`, where their "
                            "features are stored, too")
    group.add_argument("-n", type=positive, metavar="N",
                       help="draw only the first N prompts of each category (default: all); a "
                            "larger N adds the others to the same folder later")
    group.add_argument("--nearest", type=Path, metavar="FILE.png",
                       help="show ten images of each category beside their nearest training "
                            "images")
    group.add_argument("--ground-truth", action="store_true",
                       help="score the scorer instead of a model: N real images (default: "
                            f"{emoji_scorer.IMAGES}), changed in several ways, and the real images "
                            "of the other style")


def add_fid_command(commands):
    parser = add_command(commands, "fid", fid_command, fid_command,
                         "distances between two folders of images")
    group = parser.add_argument_group("what to compare")
    group.add_argument("--real", type=Path, required=True, metavar="DIR",
                       help="folder of real images, searched recursively")
    group.add_argument("--fake", type=Path, required=True, metavar="DIR",
                       help="folder of drawn images, searched recursively")
    group.add_argument("--features", default="inception", metavar="NAME",
                       help="network whose features are compared: inception (FID), "
                            "efficientnet-lite0 (no download needed), or the folder or hub id of "
                            "a vision model that transformers can load")
    group.add_argument("--inception", type=Path, metavar="DIR",
                       default=Path.home() / ".cache/fusedit",
                       help=f"folder that contains {metrics.INCEPTION} "
                            "(default: ~/.cache/fusedit)")
    group.add_argument("--out", type=Path, metavar="FILE",
                       help="output file (default: fid.json or fd-NAME.json, beside the --fake "
                            "folder)")
    group = parser.add_argument_group("execution")
    group.add_argument("--batch-size", type=positive, default=64, metavar="N",
                       help="number of images passed to the network at once")
    group.add_argument("--workers", type=positive, default=os.cpu_count(), metavar="N",
                       help="number of threads that read images (default: one per core)")
    group.add_argument("--device", default="auto",
                       help="device to compute on: auto, cpu, cuda, cuda:1, ...")


def add_score_commands(commands):
    parser = add_command(commands, "geneval-score", geneval_score_command, results.geneval_score,
                         "GenEval's table, from the official scorer's output")
    parser.add_argument("results", type=Path, metavar="FILE", help="the scorer's results.jsonl")
    parser.add_argument("--out", type=Path, metavar="FILE",
                        help="output file (default: geneval.json beside the scorer's file)")

    parser = add_command(commands, "dpg-score", dpg_score_command, results.dpg_score,
                         "DPG-Bench's table, from the official scorer's output")
    parser.add_argument("results", type=Path, metavar="FILE",
                        help="the file passed to the scorer as --res-path")
    parser.add_argument("--out", type=Path, metavar="FILE",
                        help="output file (default: dpg.json beside the scorer's file)")

    parser = add_command(commands, "compare", compare_command, results.compare,
                         "comparison of two models on the same prompts, with a paired test")
    parser.add_argument("a", type=Path, metavar="A.json", help="result of the first model")
    parser.add_argument("b", type=Path, metavar="B.json", help="result of the second model")

    parser = add_command(commands, "report", report_command, report,
                         "results of several models in one table and one figure")
    parser.add_argument("results", nargs="+", metavar="NAME=PATH",
                        help="a result or a folder of results; a training run's folder adds its "
                             "validation loss and speed; results with the same name share a row")
    parser.add_argument("--out", type=Path, default=Path("report.md"), metavar="FILE.md",
                        help="output file for the table; the figure is saved as FILE.png")


def parse_args(argv=None):
    """Parse argv or, if it is None, the command line; args.command(args) runs the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND", title="commands")
    add_draw_commands(commands)
    add_fid_command(commands)
    add_score_commands(commands)
    return parser.parse_args(argv)


def main():
    args = parse_args()
    args.command(args)


if __name__ == "__main__":
    cli.run(main, "--batch-size")
