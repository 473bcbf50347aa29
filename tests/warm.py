"""Processes under test that start in milliseconds: forked from one that has imported everything.

Starting Python with torch, transformers and DeepSpeed takes 6 seconds, and the tests start hundreds
of processes. So one server process imports these packages once, and forks for each request. It
imports nothing of ours, starts no thread and touches no GPU. What a forked process then runs is the
program itself, as `python program.py ...` would: with its own argv, environment, working directory,
standard streams, signal handlers, session and process group, up to its exit code. (Left out is how
Python takes modules apart at its very end.)

    done = run([ROOT / "sample.py", "--prompt", "a star"])             # as subprocess.run
    process = start(["-c", code, *argv], env=ENV)                      # as subprocess.Popen

COLD=1 in the environment starts a new Python for each, which is how to find out whether it is the
fork that makes a test pass or fail. tests/test_cold.py always does.
"""
import atexit
import contextlib
import gc
import importlib
import json
import os
import random
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
import types
from pathlib import Path

ROOT = Path(__file__).parents[1]
# What the programs import when they start or in a function; of torch_xla, where it is there.
PACKAGES = """
    torch torch.distributed.run torch.utils.data torch.utils.checkpoint torch.utils.flop_counter
    torch._dynamo torch._inductor.compile_fx torch.fx.experimental.symbolic_shapes
    transformers transformers.models.auto.tokenization_auto transformers.models.gemma
    transformers.models.gemma2.modeling_gemma2 transformers.tokenization_utils_tokenizers
    transformers.models.clip.modeling_clip
    transformers.modeling_utils safetensors.torch tokenizers huggingface_hub numpy filelock tqdm
    webdataset PIL.Image PIL.PngImagePlugin PIL.JpegImagePlugin PIL.WebPImagePlugin
    PIL.GifImagePlugin PIL.BmpImagePlugin deepspeed deepspeed.runtime.zero.stage3 duckdb
    torch_xla torch_xla.distributed.spmd torch_xla.runtime torch_xla.experimental.scan
    torch_xla.distributed.parallel_loader
""".split()


# ------------------------------------------------------------------------------ the tests' side

class _Reader(threading.Thread):
    """Reads a pipe to its end, so that who writes to it never waits."""

    def __init__(self, pipe):
        super().__init__(daemon=True)
        self.pipe, self.text = pipe, ""
        self.start()

    def run(self):
        self.text = self.pipe.read()

    def result(self):
        self.join()
        self.pipe.close()
        return self.text


def _pipe():
    read, write = os.pipe()
    return open(read), open(write, "w")


class Process:
    """A started program, with what tests need of subprocess.Popen's interface.

    stdout can be read while it runs if it is `live`, a pipe, which must be read then.
    """

    def __init__(self, argv, env=None, cwd=None, live=True, merge=False, cold=False):
        self.args, self.returncode = [str(a) for a in argv], None
        self.stdout, to_out = _pipe()
        errors, to_err = _pipe()
        self._out, self._err = None if live else _Reader(self.stdout), _Reader(errors)
        with open(os.devnull) as nothing, to_out, to_err:
            streams = [nothing, to_out, to_out if merge else to_err]
            self._start(env, cwd, streams, cold or os.environ.get("COLD"))

    def _start(self, env, cwd, streams, cold):
        self._popen = None
        if cold:
            self._popen = subprocess.Popen(
                [sys.executable, *self.args], env=env, cwd=cwd, stdin=streams[0],
                stdout=streams[1], stderr=streams[2], start_new_session=True)
            self.pid = self._popen.pid
            return
        request = [self.args, dict(os.environ if env is None else env), str(cwd or Path.cwd())]
        request = json.dumps(request).encode()
        self._answers = _connect()
        self._lines = self._answers.makefile("r")
        socket.send_fds(self._answers, [len(request).to_bytes(8, "big")],
                        [stream.fileno() for stream in streams])
        self._answers.sendall(request)
        self.pid = int(self._lines.readline())

    def wait(self, timeout=None):
        """The exit code; negative: of a signal. subprocess.TimeoutExpired after `timeout` s."""
        if self.returncode is None and self._popen:
            self.returncode = self._popen.wait(timeout)
        if self.returncode is None:
            with selectors.DefaultSelector() as ready:
                ready.register(self._answers, selectors.EVENT_READ)
                if not ready.select(timeout):
                    raise subprocess.TimeoutExpired(self.args, timeout)
            line = self._lines.readline()
            assert line, "tests/warm.py's server has ended"
            self.returncode = os.waitstatus_to_exitcode(int(line))
            self._answers.close()
        return self.returncode

    def poll(self):
        """The exit code, or None while the process runs."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def communicate(self, timeout=None):
        """(what is left of stdout, stderr) when the process has ended."""
        with self.stdout:
            out = self._out.result() if self._out else self.stdout.read()
        self.wait(timeout)
        return out, self._err.result()

    def kill(self):
        """SIGKILL to the process and to all that it has started in its process group."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)


def start(argv, env=None, cwd=None, live=True, merge=False):
    """Start a program: [script, ...], ["-c", code, ...] or ["-m", module, ...].

    env: all of its environment, this process's if None. merge: stderr goes to stdout.
    """
    return Process(argv, env, cwd, live, merge)


def run(argv, env=None, cwd=None, timeout=600, cold=False):
    """Run a program to its end; returns a subprocess.CompletedProcess with text.

    cold: by a Python of its own.
    """
    process = Process(argv, env, cwd, live=False, cold=cold)
    out, err = process.communicate(timeout)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


_server, _starting = None, threading.Lock()


def _connect():
    """A connection to the server, which the first call starts and which ends with this process."""
    global _server
    with _starting:
        if _server is None:
            _server = _start_server()
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(_server)
    return connection


def _start_server():
    """The path of its socket."""
    folder = tempfile.TemporaryDirectory()
    path = f"{folder.name}/socket"
    # No threads from imports; no GPU: what is forked could not use one that is open already.
    env = os.environ | dict(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1",
                            DS_ACCELERATOR="cpu", CUDA_VISIBLE_DEVICES="")
    server = subprocess.Popen([sys.executable, __file__, path], env=env,
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert server.stdout.readline() == b"ready\n", "tests/warm.py's server did not start"

    def close():
        server.stdin.close()
        server.wait()
        folder.cleanup()
    atexit.register(close)
    return path


# ------------------------------------------------------------------------------ the server

def serve(path):
    """Fork for every request; tell its connection the child's exit status when it has one.

    Returns in the children only: a request, and its connection.
    """
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen(64)
    woken, wake = socket.socketpair()       # a byte comes in when a child has ended
    wake.setblocking(False)
    signal.set_wakeup_fd(wake.fileno())
    signal.signal(signal.SIGCHLD, lambda *_: None)
    events = selectors.DefaultSelector()
    for source in (listener, woken, sys.stdin):
        events.register(source, selectors.EVENT_READ)
    print("ready", flush=True)
    running = {}                            # pid -> connection
    while True:
        ready = [key.fileobj for key, _ in events.select()]
        if sys.stdin in ready:              # the tests have ended
            for pid in running:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(pid, signal.SIGKILL)
            os._exit(0)
        if woken in ready:
            woken.recv(4096)
        if listener in ready:
            connection = listener.accept()[0]
            request = receive(connection)
            pid = os.fork()
            if not pid:
                signal.set_wakeup_fd(-1)
                return request, connection
            running[pid] = connection
            for fd in request[-1]:
                os.close(fd)
        for pid in list(running):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                with running.pop(pid) as connection, contextlib.suppress(BrokenPipeError):
                    connection.sendall(f"{status}\n".encode())


def receive(connection):
    """(argv, environment, working directory, three file descriptors) of a request."""
    size, fds, _, _ = socket.recv_fds(connection, 8, 3)
    size, data = int.from_bytes(size, "big"), b""
    while len(data) < size:
        data += connection.recv(size - len(data))
    return *json.loads(data), fds


def become(argv, env, cwd, streams, connection):
    """In the forked process: be the program, up to its last line. Returns or raises as it does."""
    os.setsid()
    for number, fd in enumerate(streams):
        os.dup2(fd, number)
        os.close(fd)
    sys.stdin, sys.stdout = open(0, closefd=False), open(1, "w", closefd=False)
    sys.stderr = open(2, "w", 1, closefd=False)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    import torch  # which has read these already
    torch.set_num_threads(int(env.get("OMP_NUM_THREADS", os.cpu_count())))
    random.seed()
    with connection:                        # from here on it is a process of its own
        connection.sendall(f"{os.getpid()}\n".encode())

    sys.path[:1] = [p for p in env.get("PYTHONPATH", "").split(":") if p]
    sys.modules["__main__"] = main = types.ModuleType("__main__")
    if argv[0] == "-m":
        sys.path.insert(0, cwd)
        sys.argv = argv[1:]
        return runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
    if argv[0] == "-c":
        sys.path.insert(0, "")
        sys.argv = ["-c", *argv[2:]]
        code = compile(argv[1], "<string>", "exec")
    else:
        sys.path.insert(0, str(Path(argv[0]).parent))
        sys.argv, main.__file__ = argv, argv[0]
        code = compile(Path(argv[0]).read_bytes(), argv[0], "exec")
    exec(code, main.__dict__)


if __name__ == "__main__":
    import torch  # noqa: F401 (without it nothing here runs)
    for package in PACKAGES:
        with contextlib.suppress(ModuleNotFoundError):
            importlib.import_module(package)
    assert len(os.listdir("/proc/self/task")) == 1, "an import has started a thread"
    gc.freeze()                             # what is imported stays shared with the children
    request, connection = serve(sys.argv[1])
    exit_code = 0
    try:
        become(*request, connection)
    except SystemExit as e:
        exit_code = e.code if isinstance(e.code, int) else int(e.code is not None)
        if isinstance(e.code, str):
            print(e.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        exit_code = 1
    # As Python ends, but for taking apart all that was imported, which takes half a second.
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    os._exit(exit_code)
