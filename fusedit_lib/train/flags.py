"""The command line flags of the training programs: one for each field of RunConfig."""
import argparse
import math
import os
import sys
from dataclasses import fields, replace
from pathlib import Path

from fusedit import FuseDiTError
from fusedit_lib import cli
from fusedit_lib.folders import find_local, last_checkpoint, repository
from fusedit_lib.train.config import (
    CHANGEABLE,
    RunConfig,
    is_resumed,
    lasting_name,
    run_of,
    stored_settings,
)
from fusedit_lib.train.published_runs import published_settings

# ------------------------------------------------------------------------------ the parser

def flag_name(name):
    return "--" + name.replace("_", "-")


def default_text(default):
    """The default as --help shows it. An empty default gives an empty string."""
    if default == "" or default == ():
        return ""
    if isinstance(default, bool):
        return " (default: on)" if default else " (default: off)"
    if isinstance(default, tuple):
        return f" (default: {len(default)} built-in ones)"
    return f" (default: {default})"


def add_flag(parser, setting):
    """Add the flag of a field of RunConfig to a parser or argument group.

    Its value is None if the flag is not given.
    """
    kind = type(setting.default)
    choices = setting.metadata["choices"]
    if kind is bool:
        options = dict(action=argparse.BooleanOptionalAction)
    elif kind is tuple:
        options = dict(nargs="+", action="extend", metavar="TEXT")
    elif choices:
        options = dict(type=kind, choices=choices)
    else:
        options = dict(type=kind, metavar=kind.__name__.upper())
    about = setting.metadata["about"] + default_text(setting.default)
    parser.add_argument(flag_name(setting.name), default=None, help=about, **options)


def make_parser(description, engine):
    """The argument parser of a training program; engine: "gpu" or "tpu"."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s [--flag value ...]; --help lists the flags")
    for setting in fields(RunConfig):
        title = setting.metadata["group"]
        if title:
            group = parser.add_argument_group(title)
        if setting.metadata["about"] and setting.metadata["only"] in ("", engine):
            add_flag(group, setting)

    # DeepSpeed's launcher adds this flag. It is ignored: LOCAL_RANK has the same value.
    parser.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)
    return parser


def join_mesh(words):
    """Replaces "--mesh -1,2" with "--mesh=-1,2", because argparse would take -1,2 for a flag."""
    joined = []
    words = iter(words)
    for word in words:
        if word == "--mesh":
            word = f"--mesh={next(words, '')}"
        joined.append(word)
    return joined


def check_range(parser, setting, value):
    """Exit with a usage error if a value is outside the setting's limits."""
    low = setting.metadata["low"]
    high = setting.metadata["high"]
    if low is None:
        return
    if high is None:
        inside = low <= value <= math.inf   # False for NaN
        allowed = f"at least {low}"
    else:
        inside = low <= value <= high
        allowed = f"from {low} to {high}"
    if not inside:
        parser.error(f"{flag_name(setting.name)} is {value}; it must be {allowed}")


def check_not_empty(parser, setting, value):
    """Exit with a usage error if a text is empty, as a shell variable that has not been set is.

    It would stand for the default. But a prompt may be empty.
    """
    texts = value if isinstance(value, list) else [value]
    if setting.name != "prompts" and "" in texts:
        parser.error(f"{flag_name(setting.name)} is empty: give a value, or leave it out")


def read_weights(parser, words):
    """The numbers of --data-weights; [] for "none". Exits with a usage error for other words."""
    if words == ["none"]:
        return []
    try:
        weights = [float(word) for word in words]
    except ValueError:
        weights = [-1]
    if not all(0 < weight < math.inf for weight in weights):
        parser.error("--data-weights must be positive numbers, one for each --data pattern, or "
                     "none")
    return weights


def read_names(parser, words, provided):
    """The settings that --resume-with names, separated by commas or spaces.

    provided: the settings that are given. Exits with a usage error if a named one must not change,
    or is not given: its default would be a surprise.
    """
    names = " ".join(words).replace(",", " ").replace("-", "_").split()
    for name in names:
        if name not in CHANGEABLE:
            parser.error(f"--resume-with {name}: only {', '.join(CHANGEABLE)} can change in this "
                         "way")
        if name not in provided:
            parser.error(f"--resume-with {name}: give its new value as well, with "
                         f"{flag_name(name)}")
    return names


# ------------------------------------------------------------------------------ parsing

def parse_run(argv, description, engine="gpu"):
    """RunConfig from the command line.

    argv: the arguments after the program's name; None: those of this process.
    description: the training program's docstring, for --help. engine: "gpu" or "tpu".
    Exits with code 2 on a usage error. Raises FuseDiTError if a prompt file cannot be read, if the
    default run folder holds a run on other data, or, with --like-published, if the preset has no
    published run.
    """
    parser = make_parser(description, engine)
    if argv is None:
        argv = sys.argv[1:]
    args = vars(parser.parse_args(join_mesh(argv)))
    del args["local_rank"]
    provided = {name: value for name, value in args.items() if value is not None}

    # checks that argparse does not do
    for setting in fields(RunConfig):
        if setting.name in provided:
            check_range(parser, setting, provided[setting.name])
            check_not_empty(parser, setting, provided[setting.name])
    provided["resume_with"] = read_names(parser, provided.get("resume_with", ()), provided)
    provided["data_weights"] = read_weights(parser, provided.get("data_weights", ()))
    run = RunConfig(**provided)
    run = settle_init(replace(run, out=run.out or default_folder(run)))
    if "out" not in provided:
        check_default_folder(run)
    is_like_published = provided.get("like_published", was_like_published(run))
    check_init(parser, run, "preset" in provided, is_like_published)
    if run.init and not is_like_published:
        run = replace(run, preset="")
    if "caption_pick" not in provided and predates_caption_pick(run):
        run = replace(run, caption_pick="whole")
    if "streams" not in provided:
        run = replace(run, streams=settled_streams(run))
    if is_like_published:
        run = like_published(run, provided)

    return replace(run, prompts=read_prompts(run.prompts))


def read_prompts(words):
    """The prompts that --prompts gives: words, where the name of a .txt file stands for its lines.

    Raises FuseDiTError if a file cannot be read.
    """
    prompts = []
    for word in words:
        if word.endswith(".txt"):
            prompts += cli.read_prompts(Path(word))
        else:
            prompts.append(word)
    cli.check_text(prompts)
    return prompts


def default_folder(run):
    """The run folder if --out is not given: runs/PRESET or, with --init, runs/NAME-finetuned."""
    if not run.init:
        return f"runs/{run.preset}"
    return f"runs/{run_of(Path(run.init).resolve()).name}-finetuned"


def check_init(parser, run, has_preset, is_like_published):
    """Exit with a usage error if --init does not go with the other flags for the model.

    has_preset: True if --preset is given.
    """
    if run.init and is_like_published and not has_preset:
        parser.error("--like-published with --init needs --preset, which chooses the published run "
                     "whose settings are taken; the config remains that of --init")
    if run.init and has_preset and not is_like_published:
        parser.error(f"the config is that of --init {run.init}: leave out --preset, and change "
                     "fields with --set (with --like-published, --preset chooses the run "
                     "settings)")
    if run.init_raw and not run.init:
        parser.error("--init-raw chooses among the weights of --init MODEL: add --init")


def check_default_folder(run):
    """Raise FuseDiTError if --init without --out would resume a run on other --data.

    A second fine-tuning of a model has the same default folder as the first.
    """
    if not run.init or not run.data or run.plan or not is_resumed(run.out):
        return
    stored = stored_settings(run.out)["data"]
    if list(run.data) != stored:
        raise FuseDiTError(f"{run.out} holds a run on {' '.join(stored)}: to continue it, give "
                           f"--out {run.out}; to start another, give another --out")


def settle_init(run):
    """The run with a lasting name for the model of --init (see lasting_name).

    A run that is resumed keeps the model that it was started from, which need no longer exist.
    Otherwise, if --init names a run, it is the checkpoint that is its last one now.
    """
    stored = {}
    if is_resumed(run.out):
        stored = stored_settings(run.out)
    first = stored.get("init", "")          # the model that a resumed run was started from
    if not run.init:
        return replace(run, init=first, init_raw=run.init_raw or stored.get("init_raw", False))

    names = (run.init, os.path.abspath(run.init), lasting_name(run.init))
    if first and (first in names or str(run_of(first)) in names):
        return replace(run, init=first)
    path = find_local(run.init, (".", repository()))
    if path is None:                        # a hub id
        return run
    return replace(run, init=lasting_name(last_checkpoint(path)))


def was_like_published(run):
    """True if --out holds a run of the same preset that was started with --like-published."""
    stored = stored_settings(run.out)
    return stored.get("like_published", False) and stored.get("preset") == run.preset


def predates_caption_pick(run):
    """True if --out holds a run from before --caption-pick, which read caption files whole."""
    stored = stored_settings(run.out)
    return bool(stored) and "caption_pick" not in stored


def settled_streams(run):
    """The number of streams of a run if --streams is not given: a resumed run keeps its own.

    A run from before --streams has one, which gives the order of samples that it began with.
    """
    if is_resumed(run.out):
        return stored_settings(run.out).get("streams", 1)
    return run.streams


def like_published(run, provided):
    """The run with the settings of its preset's published run, except those in `provided`.

    Rank 0 prints the flags of the settings that this changes.
    """
    settings = published_settings(run.preset)
    changes = {}
    for name, value in settings.items():
        if name not in provided and getattr(run, name) != value:
            changes[name] = value
    if os.environ.get("RANK", "0") == "0":
        flags = " ".join(flag_text(name, value) for name, value in changes.items())
        print(f"--like-published sets {flags or 'nothing'}", file=sys.stderr, flush=True)
    return replace(run, like_published=True, **changes)


def flag_text(name, value):
    """A setting as a flag of the command line: --steps 500000, --no-ema-warmup."""
    if value is True:
        return flag_name(name)
    if value is False:
        return flag_name("no_" + name)
    return f"{flag_name(name)} {value}"
