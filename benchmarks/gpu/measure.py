"""Measure fusedit on this machine's GPU: speed, memory, exactness, and whether all flags work.

    bash benchmarks/gpu/measure.sh                  at most 7 minutes
    STEPS="smoke sample large score tests" TOTAL=340 bash benchmarks/gpu/measure.sh

Settings are environment variables:
    STEPS    the parts to run, in this order; any of
             {parts}
    TOTAL    total time limit in seconds: no part starts after it, and a running part is stopped
             (default 415)
    OUT      folder for the results, which are added to those of earlier calls (runs/gpu)
    W        folder for data, checkpoints and compiled kernels, kept for later calls (runs/gpu-work)
    LIMITS   time limits of parts in seconds, instead of the usual ones: "large:240 smoke:200"
    SMALL    1: use tiny sizes, which also run on a CPU, to find mistakes; 4 minutes on two cores
    PY       the Python interpreter to use (python3)
    PLANT    parts that are made to fail, to check that the others lose nothing: "demo" raises an
             error, "demo:hang" never ends, "demo:kill" is killed

Each part runs in its own process group with its own time limit. If it fails, hangs or is killed,
its results so far are kept and the other parts still run. The exit code is 0 only if no part
failed. Afterwards OUT contains log.txt (the output of the parts), results.jsonl (one result per
line), profile.txt, train.json, sample.json, demo.jsonl, large.jsonl and grid.png. The table that is
printed last is also in log.txt.
"""
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import summary

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
USUAL_PARTS = "ceilings demo attn step train draw smoke sample score"
USUAL_TOTAL = 415                           # seconds
SMALL_TOTAL = 1200                          # with SMALL=1
SMALL_LIMIT = 300                           # seconds per part with SMALL=1, on a busy machine
TINY = ["--batch", 1, "--rounds", 1, "--no-compile", "--dtype", "float32", "--image-size", 16]
VARIANTS = os.environ.get(                  # the most promising ones come first
    "VARIANTS", "budget70:12,budget50:16,compiled:12,vae:8,tuned:8,graphs:2,demo-graphs:512,"
    "compiled:16,remat:16,eager:4")
SMALL_VARIANTS = "budget70:2,vae:1,tuned:2,graphs:2,demo-graphs:4,eager:2"
LOG_BYTES = 200_000                         # how much of a part's output log.txt keeps

# Exit codes of parts that did not end by themselves.
TOO_SLOW = 124
STOPPED = 130
NOT_BEGUN = -1


# ---------------------------------------------------------------------------- parts
class Part(NamedTuple):
    limit: int                              # seconds
    command: list
    small: list | None = None               # the command with SMALL=1, if it differs
    needs_shards: bool = False
    elastic: bool = False                   # does as much as the remaining time allows
    torchao: bool = False                   # needs torchao, which may break transformers


def python(*argv):
    return [sys.executable, *map(str, argv)]


def kit(name, *argv):
    return python(HERE / f"{name}.py", *argv)


def benchmark(name, *argv):
    return python(ROOT / "benchmarks" / f"{name}.py", *argv)


def all_parts(out):
    """{name: Part}, in the order in which SMALL=1 runs all of them."""
    train = ["--no-exactness", "--out", out / "train.json"]
    large_train = ["--preset", "fusedit/large-scale", "--batch", 4, "--rounds", 4]
    pytest = python("-m", "pytest", "-q", "-m", "gpu", "-n", 4, "--timeout", 150, "-p",
                    "no:cacheprovider", "tests/train/test_gpu.py")
    return {
        "ceilings": Part(40, kit("ceilings")),
        "attn": Part(75, kit("attn")),
        "step": Part(125, kit("step", "--variants", "remat:8,nocudnn:8"),
                     small=kit("step", "--batch", 2, "--variants", "remat:2,nocudnn:2")),
        "train": Part(100, benchmark("train", *large_train, *train),
                      small=kit("tiny", "train", *TINY, *train)),
        "sample": Part(100, kit("runs", "sample")),
        "demo": Part(120, kit("runs", "demo", "--seconds", 90), needs_shards=True),
        "draw": Part(45, kit("runs", "draw")),
        "score": Part(45, kit("runs", "score")),
        "smoke": Part(110, kit("smoke"), needs_shards=True, elastic=True),
        "large": Part(120, kit("runs", "large", "--zero", "1", "2", "3"),
                      small=kit("runs", "large"), elastic=True),
        "tests": Part(160, pytest),
        "variants": Part(300, kit("step", "--batch", 0, "--variants", VARIANTS),
                         small=kit("step", "--batch", 0, "--variants", SMALL_VARIANTS),
                         elastic=True),
        "exact": Part(140, kit("runs", "exact")),
        "float8": Part(110, kit("step", "--batch", 0, "--variants", "compiled:8,float8:8"),
                       small=kit("step", "--batch", 0, "--variants", "float8:2"), torchao=True),
    }


# ---------------------------------------------------------------------------- settings
class Settings(NamedTuple):
    """The settings from environment variables; see the top of this file."""
    small: bool
    steps: list                             # names of the parts to run
    total: float                            # seconds
    out: Path
    work: Path
    limits: dict                            # part -> seconds
    plants: dict                            # part -> fail, hang or kill


def folder_setting(name, default):
    return Path(os.environ.get(name) or ROOT / "runs" / default).resolve()


def read_settings():
    """Read Settings from the environment. Exits with a message if a part does not exist."""
    small = os.environ.get("SMALL") == "1"
    out = folder_setting("OUT", "gpu")
    parts = list(all_parts(out))
    usual_parts = USUAL_PARTS
    total = USUAL_TOTAL
    if small:
        usual_parts = " ".join(parts)
        total = SMALL_TOTAL
    steps = (os.environ.get("STEPS") or usual_parts).split()

    limits = {}
    for word in os.environ.get("LIMITS", "").split():
        name, seconds = word.split(":")
        limits[name] = float(seconds)
    plants = {}
    for word in os.environ.get("PLANT", "").split():
        name, _, way = word.partition(":")
        plants[name] = way or "fail"

    unknown = {*steps, *plants, *limits} - {*parts}
    if unknown:
        sys.exit(f"unknown part {', '.join(sorted(unknown))}; choose from {' '.join(parts)}")
    return Settings(small, steps, float(os.environ.get("TOTAL") or total), out,
                    folder_setting("W", "gpu-work"), limits, plants)


def process_environment(settings):
    """The environment variables of all parts: quiet, offline, and with caches in W."""
    env = os.environ | dict(
        PYTHONUNBUFFERED="1",
        TQDM_DISABLE="1",
        TOKENIZERS_PARALLELISM="false",
        HF_HUB_OFFLINE="1",
        TRANSFORMERS_OFFLINE="1",
        TORCHINDUCTOR_CACHE_DIR=str(settings.work / "inductor"),
        TRITON_CACHE_DIR=str(settings.work / "triton"),
        OUT=str(settings.out),
        W=str(settings.work),
    )
    if settings.small:
        env["TORCHDYNAMO_DISABLE"] = "1"    # runs without compiling
    return env


# ---------------------------------------------------------------------------- processes
def end(process):
    """End a process and everything that it started, and wait until it has ended."""
    for number, patience in ((signal.SIGTERM, 5), (signal.SIGKILL, None)):
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(patience)


def start(command, log, env):
    """Start a command in its own process group, with its output going to an open file."""
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, cwd=ROOT,
                            stderr=subprocess.STDOUT, env=env, start_new_session=True)


def run(command, log, env, limit):
    """Run a command with its output going to the file `log`. Returns its exit code."""
    with open(log, "ab") as file:
        file.write(f"$ {' '.join(command)}\n".encode())
        file.flush()
        process = start(command, file, env)
        try:
            return process.wait(limit)
        except subprocess.TimeoutExpired:
            return TOO_SLOW
        finally:
            end(process)                    # and everything that it left running


def planted_fault(way):
    """The command of a part that fails in a given way."""
    codes = dict(fail="raise SystemExit('planted: this part fails')",
                 hang="import time; print('planted: this part hangs'); time.sleep(1e6)",
                 kill="import os; print('planted'); os.kill(os.getpid(), 9)")
    return python("-c", codes[way])


def install_wheels(work, folder, names):
    """Install wheels that prepare.sh has downloaded into work/folder, if this Python lacks them.

    names: the packages to install; None: all except torchao.
    """
    wheels = {path.name.split("-")[0]: str(path) for path in sorted(HERE.glob("whl/*.whl"))}
    if names is None:
        names = [name for name in wheels if name != "torchao"]
    missing = [wheels[name] for name in names
               if name in wheels and not importlib.util.find_spec(name)]
    target = work / folder
    if not missing or target.exists():
        return
    done = subprocess.run(python("-m", "pip", "install", "-q", "--no-index", "--no-deps",
                                 "--no-compile", "--no-cache-dir", "--target", target, *missing))
    if done.returncode:
        shutil.rmtree(target, ignore_errors=True)


# ---------------------------------------------------------------------------- the kit
class Kit:
    """One call of the kit: runs the parts in turn and keeps their results."""

    def __init__(self, settings):
        self.begin = time.monotonic()
        self.settings = settings
        self.out = settings.out
        self.work = settings.work
        self.parts = all_parts(self.out)
        self.failed = []
        self.out.mkdir(parents=True, exist_ok=True)
        self.work.mkdir(parents=True, exist_ok=True)
        self.env = process_environment(settings)

    def seconds(self):
        """Seconds since the start."""
        return time.monotonic() - self.begin

    def record(self, **row):
        with open(self.out / "results.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")

    def print(self, text):
        """Print a text, and append it to log.txt."""
        print(text, flush=True)
        with open(self.out / "log.txt", "a") as file:
            file.write(text + "\n")

    def install(self):
        """Install missing packages into W. torchao has a separate folder, as few parts need it."""
        install_wheels(self.work, "site", None)
        install_wheels(self.work, "torchao", ["torchao"])
        if (self.work / "site").exists():
            self.env["PYTHONPATH"] = self.path_with("site")

    def path_with(self, folder):
        """PYTHONPATH with a folder of W in front."""
        path = str(self.work / folder)
        if self.env.get("PYTHONPATH"):
            path += os.pathsep + self.env["PYTHONPATH"]
        return path

    def start_shards(self):
        """Start making the demo's data while the first parts run. Returns the process or None."""
        needed = any(self.parts[name].needs_shards for name in self.settings.steps)
        if not needed or (self.work / "shards").exists():
            return None
        with open(self.work / "shards.log", "wb") as log:
            return start(kit("runs", "shards"), log, self.env)

    def await_shards(self, shards):
        """Wait for the demo's data. If there is none, the parts that need it fail by themselves."""
        if shards.poll() is None:
            patience = max(1, min(120, self.settings.total - self.seconds()))
            with suppress(subprocess.TimeoutExpired):
                shards.wait(patience)
        if shards.poll() != 0:
            self.print("no data: " + (self.work / "shards.log").read_text()[-300:].strip())

    def limit_of(self, name):
        """The time limit of a part in seconds; None if too little time is left to start it."""
        part = self.parts[name]
        limit = self.settings.limits.get(name, part.limit)
        if self.settings.small:
            limit = SMALL_LIMIT
        limit = min(limit, self.settings.total - self.seconds())
        least = part.limit / 2
        if part.elastic:
            least = part.limit / 4
        if limit < least:
            return None
        return limit

    def environment_of(self, name, limit):
        env = self.env | dict(PART=name, LIMIT=str(limit))
        if name == "tests" and not self.settings.small:
            env["GPU_EXPECTED"] = "1"       # without a GPU, fail instead of skipping all tests
        if self.parts[name].torchao:
            env["PYTHONPATH"] = self.path_with("torchao")
        return env

    def measure(self, name):
        """Run a part and report the outcome."""
        begin = self.seconds()
        limit = self.limit_of(name)
        if limit is None:
            self.print(f"--- {name}: no time left")
            self.record(kind="part", name=name, code=NOT_BEGUN, seconds=0)
            return
        self.print(f"--- {name}: at most {limit:.0f} s, started after {begin:.0f} s")

        part = self.parts[name]
        command = part.command
        if self.settings.small and part.small:
            command = part.small
        if name in self.settings.plants:
            way = self.settings.plants[name]
            command = planted_fault(way)
            if way == "hang":
                limit = 5
        log = self.work / f"{name}.log"
        log.unlink(missing_ok=True)
        code = STOPPED
        try:
            code = run(command, log, self.environment_of(name, limit), limit)
        finally:
            seconds = round(self.seconds() - begin, 1)
            self.record(kind="part", name=name, code=code, seconds=seconds)
            if code:
                self.failed.append(name)
            self.show_output(log)
            status = "ok"
            if code:
                status = f"FAILED with {code}"
            self.print(f"    {name}: {status} after {seconds} s")

    def show_output(self, log):
        """Append a part's output to log.txt and print its last lines."""
        text = log.read_bytes().decode(errors="replace")
        with open(self.out / "log.txt", "a") as file:
            file.write(text[-LOG_BYTES:].rstrip() + "\n")
        lines = [line[:200] for line in text.splitlines()[1:] if line.strip()]
        print("\n".join(line for line in lines[-30:] if "Warning" not in line))

    def run_parts(self):
        shards = self.start_shards()
        try:
            for name in self.settings.steps:
                if shards and self.parts[name].needs_shards:
                    self.await_shards(shards)
                self.measure(name)
        except KeyboardInterrupt:
            self.print("stopped by a signal")
        finally:
            if shards:
                end(shards)

    def main(self):
        """Run all parts and print the table. Returns the exit code."""
        self.install()
        self.print(f"{time.strftime('%F %T')}: {' '.join(self.settings.steps)}; ready after "
                   f"{self.seconds():.0f} s")
        self.run_parts()
        for line in summary.lines(self.out):
            self.print(line)
        result = "no part failed"
        if self.failed:
            result = f"FAILED: {', '.join(self.failed)}"
        files = " ".join(sorted(path.name for path in self.out.iterdir()))
        self.print(f"{result}; {self.seconds():.0f} s; results in {self.out}: {files}")
        return int(bool(self.failed))


def interrupt(*_):
    raise KeyboardInterrupt


def print_help():
    names = list(all_parts(Path()))
    wrapped = " ".join(names[:9]) + "\n             " + " ".join(names[9:])
    print(__doc__.replace("{parts}", wrapped).strip())


def main():
    if sys.argv[1:]:
        print_help()
        asked_for = {*sys.argv[1:]} <= {"-h", "--help"}
        if asked_for:
            return 0
        return 2
    signal.signal(signal.SIGTERM, interrupt)
    return Kit(read_settings()).main()


if __name__ == "__main__":
    sys.exit(main())
