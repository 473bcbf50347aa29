"""Measure fusedit on this machine's GPU: speed, memory, exactness, and whether all flags work.

    bash benchmarks/gpu/measure.sh                  about 7 minutes of an H100 or H200
    STEPS="smoke sample large score tests" TOTAL=340 bash benchmarks/gpu/measure.sh

Settings are environment variables:
    STEPS    which parts run, in this order; some of
             {parts}
    TOTAL    seconds after which no part is begun, and none runs on (415)
    OUT      folder of what is found (runs/gpu); it is added to what is there
    W        folder of data, checkpoints and compiled kernels, for later calls (runs/gpu-work)
    LIMITS   other time limits of parts, in seconds: "large:240 smoke:200"
    SMALL    1: tiny sizes, also on a CPU, to find mistakes; 4 minutes on two cores
    PY       the Python that runs all of it (python3)
    PLANT    parts that are made to fail, to see that the others lose nothing: "demo" raises,
             "demo:hang" never ends, "demo:kill" is killed

Each part is a process group of its own with its own time limit: if it fails, hangs or is killed,
what it found before is kept and the others run. The exit code is 0 only if no part failed. In OUT:
log.txt (what the parts printed), results.jsonl (a line a figure), profile.txt, train.json,
sample.json, demo.jsonl, large.jsonl, grid.png; the table that is printed last is in log.txt too.
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
USUAL = "ceilings demo attn step train draw smoke sample score"
SMALL_LIMIT = 300                           # seconds of a part with SMALL=1, on a busy machine
TINY = ["--batch", 1, "--rounds", 1, "--no-compile", "--dtype", "float32", "--image-size", 16]
VARIANTS = os.environ.get(                  # what should bring most comes first
    "VARIANTS", "budget70:12,budget50:16,compiled:12,vae:8,tuned:8,graphs:2,demo-graphs:512,"
    "compiled:16,remat:16,eager:4")
TOO_SLOW, STOPPED, NOT_BEGUN = 124, 130, -1                # exit codes of parts that did not end
LOG = 200_000                               # bytes of a part's output that log.txt keeps


class Part(NamedTuple):
    """A part of the measurement: its time limit in seconds, and its command line."""
    limit: int
    command: list
    small: list = None                      # the command line with SMALL=1, if it is another
    needs_shards: bool = False
    elastic: bool = False                   # does what it can in the time that there is
    torchao: bool = False                   # which may break transformers: only for who needs it


def python(*argv):
    return [sys.executable, *map(str, argv)]


def kit(name, *argv):
    return python(HERE / f"{name}.py", *argv)


def benchmark(name, *argv):
    return python(ROOT / "benchmarks" / f"{name}.py", *argv)


def parts(out):
    """{name: Part}, in the order in which SMALL=1 runs all of them."""
    train = ["--no-exactness", "--out", out / "train.json"]
    pytest = python("-m", "pytest", "-q", "-m", "gpu", "-n", 4, "--timeout", 150, "-p",
                    "no:cacheprovider", "tests/train/test_gpu.py")
    return {
        "ceilings": Part(40, kit("ceilings")),
        "attn": Part(75, kit("attn")),
        "step": Part(125, kit("step", "--variants", "remat:8,nocudnn:8"),
                     kit("step", "--batch", 2, "--variants", "remat:2,nocudnn:2")),
        "train": Part(100, benchmark("train", "--preset", "fusedit/large-scale", "--batch", 4,
                                     "--rounds", 4, *train), kit("tiny", "train", *TINY, *train)),
        "sample": Part(100, kit("runs", "sample")),
        "demo": Part(120, kit("runs", "demo", "--seconds", 90), needs_shards=True),
        "draw": Part(45, kit("runs", "draw")),
        "score": Part(45, kit("runs", "score")),
        "smoke": Part(110, kit("smoke"), needs_shards=True, elastic=True),
        "large": Part(120, kit("runs", "large", "--zero", "1", "2", "3"), kit("runs", "large"),
                      elastic=True),
        "tests": Part(160, pytest),
        "variants": Part(300, kit("step", "--batch", 0, "--variants", VARIANTS),
                         kit("step", "--batch", 0, "--variants", "budget70:2,vae:1,tuned:2,"
                             "graphs:2,demo-graphs:4,eager:2"), elastic=True),
        "exact": Part(140, kit("runs", "exact")),
        "float8": Part(110, kit("step", "--batch", 0, "--variants", "compiled:8,float8:8"),
                       kit("step", "--batch", 0, "--variants", "float8:2"), torchao=True)}


# ------------------------------------------------------------------------------ processes


def end(process):
    """End a process and all that it started; returns when it has ended."""
    for number, patience in ((signal.SIGTERM, 5), (signal.SIGKILL, None)):
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(patience)


def run(command, log, env, limit):
    """Run a command into a log file; returns its exit code."""
    with open(log, "ab") as file:
        file.write(f"$ {' '.join(command)}\n".encode())
        file.flush()
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file, cwd=ROOT,
                                   stderr=subprocess.STDOUT, env=env, start_new_session=True)
        try:
            return process.wait(limit)
        except subprocess.TimeoutExpired:
            return TOO_SLOW
        finally:
            end(process)                    # and what it left running


class Kit:
    """A call of the kit: its settings, its clock, and what it has written."""

    def __init__(self):
        get = os.environ.get
        self.begin, self.small, self.failed = time.monotonic(), get("SMALL") == "1", []
        self.out, self.work = (Path(get(name) or ROOT / "runs" / default).resolve()
                               for name, default in (("OUT", "gpu"), ("W", "gpu-work")))
        self.parts = parts(self.out)
        self.total = float(get("TOTAL") or (1200 if self.small else 415))
        self.steps = (get("STEPS") or (" ".join(self.parts) if self.small else USUAL)).split()
        self.plants = dict((word + ":fail").split(":")[:2] for word in get("PLANT", "").split())
        limits = dict(word.split(":") for word in get("LIMITS", "").split())
        self.limits = {name: float(seconds) for name, seconds in limits.items()}
        if unknown := {*self.steps, *self.plants, *self.limits} - {*self.parts}:
            sys.exit(f"no part {', '.join(sorted(unknown))}; there are {' '.join(self.parts)}")
        for folder in (self.out, self.work):
            folder.mkdir(parents=True, exist_ok=True)
        quiet = dict(PYTHONUNBUFFERED="1", TQDM_DISABLE="1", TOKENIZERS_PARALLELISM="false")
        offline = dict(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1")
        caches = dict(TORCHINDUCTOR_CACHE_DIR=str(self.work / "inductor"),
                      TRITON_CACHE_DIR=str(self.work / "triton"))
        self.env = os.environ | quiet | offline | caches | dict(OUT=str(self.out), W=str(self.work))
        if self.small:
            self.env["TORCHDYNAMO_DISABLE"] = "1"          # what would be compiled is run as it is

    def seconds(self):
        return time.monotonic() - self.begin

    def install(self):
        """Wheels that prepare.sh has fetched, of packages that this Python lacks, into W."""
        wheels = {path.name.split("-")[0]: str(path) for path in sorted(HERE.glob("whl/*.whl"))}
        for folder, names in (("site", [*{*wheels} - {"torchao"}]), ("torchao", ["torchao"])):
            target = self.work / folder
            lacks = [wheels[name] for name in names
                     if name in wheels and not importlib.util.find_spec(name)]
            if lacks and not target.exists():
                done = subprocess.run(python(
                    "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-compile",
                    "--no-cache-dir", "--target", target, *lacks))
                if done.returncode:
                    shutil.rmtree(target, ignore_errors=True)
        if (self.work / "site").exists():
            self.env["PYTHONPATH"] = self.path_with("site")

    def path_with(self, folder):
        found = str(self.work / folder), self.env.get("PYTHONPATH")
        return os.pathsep.join(filter(None, found))

    def note(self, **row):
        with open(self.out / "results.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")

    def say(self, text):
        """Print it, and write it to log.txt."""
        print(text, flush=True)
        with open(self.out / "log.txt", "a") as file:
            file.write(text + "\n")

    def draw_shards(self):
        """Start to make the demo's data, beside the first parts; returns the process or None."""
        if (self.work / "shards").exists() or not any(self.parts[s].needs_shards
                                                      for s in self.steps):
            return None
        log = open(self.work / "shards.log", "wb")         # noqa: SIM115 (the process has it)
        return subprocess.Popen(kit("runs", "shards"), stdin=subprocess.DEVNULL, stdout=log,
                                cwd=ROOT, stderr=log, env=self.env, start_new_session=True)

    def measure(self, name):
        """Run a part; what it says ends up in log.txt, and its end on the screen."""
        part, begin, log = self.parts[name], self.seconds(), self.work / f"{name}.log"
        command = part.small if self.small and part.small else part.command
        limit = SMALL_LIMIT if self.small else self.limits.get(name, part.limit)
        limit = min(limit, self.total - begin)
        if limit < part.limit / (4 if part.elastic else 2):
            self.say(f"--- {name}: no time left")
            self.note(kind="part", name=name, code=NOT_BEGUN, seconds=0)
            return
        self.say(f"--- {name}: at most {limit:.0f} s, begun after {begin:.0f} s")
        log.unlink(missing_ok=True)
        env = self.env | dict(PART=name)
        if name == "tests" and not self.small:
            env["GPU_EXPECTED"] = "1"       # else no GPU would mean: all skipped, none failed
        if part.torchao:
            env["PYTHONPATH"] = self.path_with("torchao")
        if name in self.plants:
            command, limit = planted(self.plants[name], limit)
        code = STOPPED
        try:
            code = run(command, log, env | dict(LIMIT=str(limit)), limit)
        finally:
            took = round(self.seconds() - begin, 1)
            self.note(kind="part", name=name, code=code, seconds=took)
            if code:
                self.failed.append(name)
            self.show(log, name, code, took)

    def show(self, log, name, code, took):
        text = log.read_bytes().decode(errors="replace")
        with open(self.out / "log.txt", "a") as file:
            file.write(text[-LOG:].rstrip() + "\n")
        lines = [line[:200] for line in text.splitlines()[1:] if line.strip()]
        print("\n".join(line for line in lines[-30:] if "Warning" not in line))
        self.say(f"    {name}: {'ok' if code == 0 else f'FAILED with {code}'} after {took} s")

    def await_shards(self, shards):
        """A part that needs them fails by itself if there are none."""
        if shards.poll() is None:
            with suppress(subprocess.TimeoutExpired):
                shards.wait(max(1, min(120, self.total - self.seconds())))
        if shards.poll() != 0:
            self.say("no data: " + (self.work / "shards.log").read_text()[-300:].strip())

    def main(self):
        """All parts; returns the exit code."""
        self.install()
        self.say(f"{time.strftime('%F %T')}: {' '.join(self.steps)}; ready after "
                 f"{self.seconds():.0f} s")
        shards = self.draw_shards()
        try:
            for name in self.steps:
                if shards and self.parts[name].needs_shards:
                    self.await_shards(shards)
                self.measure(name)
        except KeyboardInterrupt:
            self.say("stopped by a signal")
        finally:
            if shards:
                end(shards)
        for line in summary.lines(self.out):
            self.say(line)
        failed = f"FAILED: {', '.join(self.failed)}" if self.failed else "no part failed"
        self.say(f"{failed}; {self.seconds():.0f} s; in {self.out}: "
                 f"{' '.join(sorted(p.name for p in self.out.iterdir()))}")
        return 1 if self.failed else 0


def planted(how, limit):
    """(command, limit) of a part that fails in a given way."""
    codes = dict(fail="raise SystemExit('planted: this part fails')",
                 hang="import time; print('planted: this part hangs'); time.sleep(1e6)",
                 kill="import os; print('planted'); os.kill(os.getpid(), 9)")
    return python("-c", codes[how]), 5 if how == "hang" else limit


def interrupt(*_):
    raise KeyboardInterrupt


def main():
    if sys.argv[1:]:
        names = [*parts(Path())]
        wrapped = " ".join(names[:9]) + "\n             " + " ".join(names[9:])
        print(__doc__.replace("{parts}", wrapped).strip())
        return 0 if {*sys.argv[1:]} <= {"-h", "--help"} else 2
    signal.signal(signal.SIGTERM, interrupt)
    return Kit().main()


if __name__ == "__main__":
    sys.exit(main())
