"""Starts processes under test in milliseconds, by forking one that has imported all packages.

Starting Python with torch, transformers and DeepSpeed takes 6 seconds, and the tests start hundreds
of processes. So one server process imports these packages once, and forks for each request. It
imports nothing of this repository, starts no thread and does not use a GPU. A forked process then
runs the program as `python program.py ...` would: with its own argv, environment, working
directory, standard streams, signal handlers, session and process group, up to its exit code. (Only
Python's destruction of modules at the very end is left out.)

    done = run([ROOT / "sample.py", "--prompt", "a star"])             # as subprocess.run
    process = start(["-c", code, *argv], env=ENV)                      # as subprocess.Popen

With COLD=1 in the environment each process is a new Python instead, which shows whether a test
passes or fails because of the fork. tests/test_cold.py always starts new ones.
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
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
# The packages that the programs import, at the top or in a function. torch_xla may be missing.
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


# ---------------------------------------------------------------------------- the tests' side
class _Reader(threading.Thread):
    """Reads a pipe to its end, so that its writer never blocks."""

    def __init__(self, pipe):
        super().__init__(daemon=True)
        self.pipe = pipe
        self.text = ""
        self.start()

    def run(self):
        self.text = self.pipe.read()

    def result(self):
        self.join()
        self.pipe.close()
        return self.text


def _pipe():
    """The two ends of a pipe, as text files: one to read from and one to write to."""
    read, write = os.pipe()
    return open(read), open(write, "w")


class Process:
    """A running program, with the part of subprocess.Popen's interface that the tests need.

    live: the test reads stdout while the program runs, and has to do so.
    """

    def __init__(self, argv, env=None, cwd=None, live=True, merge=False, cold=False):
        self.args = [str(word) for word in argv]
        self.returncode = None
        self.stdout, write_stdout = _pipe()
        read_stderr, write_stderr = _pipe()
        self._stdout_reader = None
        if not live:
            self._stdout_reader = _Reader(self.stdout)
        self._stderr_reader = _Reader(read_stderr)
        self._popen = None                  # of a cold process

        with open(os.devnull) as stdin, write_stdout, write_stderr:
            streams = [stdin, write_stdout, write_stderr]
            if merge:
                streams[2] = write_stdout
            if cold or os.environ.get("COLD"):
                self._start_cold(env, cwd, streams)
            else:
                self._start_warm(env, cwd, streams)

    def _start_cold(self, env, cwd, streams):
        stdin, stdout, stderr = streams
        self._popen = subprocess.Popen(
            [sys.executable, *self.args], env=env, cwd=cwd, stdin=stdin, stdout=stdout,
            stderr=stderr, start_new_session=True)
        self.pid = self._popen.pid

    def _start_warm(self, env, cwd, streams):
        if env is None:
            env = os.environ
        request = json.dumps([self.args, dict(env), str(cwd or Path.cwd())]).encode()
        descriptors = [stream.fileno() for stream in streams]
        self._connection = _connect()
        self._answers = self._connection.makefile("r")
        socket.send_fds(self._connection, [len(request).to_bytes(8, "big")], descriptors)
        self._connection.sendall(request)
        self.pid = int(self._answers.readline())

    def wait(self, timeout=None):
        """The exit code, or minus the signal's number if a signal ended the process.

        Raises subprocess.TimeoutExpired after `timeout` seconds.
        """
        if self.returncode is None:
            if self._popen:
                self.returncode = self._popen.wait(timeout)
            else:
                self.returncode = self._wait_warm(timeout)
        return self.returncode

    def _wait_warm(self, timeout):
        with selectors.DefaultSelector() as selector:
            selector.register(self._connection, selectors.EVENT_READ)
            if not selector.select(timeout):
                raise subprocess.TimeoutExpired(self.args, timeout)
        status = self._answers.readline()
        assert status, "the server of tests/warm.py has ended"
        self._connection.close()
        return os.waitstatus_to_exitcode(int(status))

    def poll(self):
        """The exit code, or None while the process runs."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def communicate(self, timeout=None):
        """Wait for the process to end. Returns the rest of stdout, and stderr."""
        with self.stdout:
            if self._stdout_reader:
                stdout = self._stdout_reader.result()
            else:
                stdout = self.stdout.read()
        self.wait(timeout)
        return stdout, self._stderr_reader.result()

    def kill(self):
        """Send SIGKILL to the process and everything that it has started in its process group."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)


def start(argv, env=None, cwd=None, live=True, merge=False):
    """Start a program: [script, ...], ["-c", code, ...] or ["-m", module, ...].

    env: the whole environment; None: that of this process. merge: stderr goes to stdout.
    """
    return Process(argv, env, cwd, live, merge)


def run(argv, env=None, cwd=None, timeout=600, cold=False):
    """Run a program to its end. Returns a subprocess.CompletedProcess with text.

    cold: start a new Python instead of a fork.
    """
    process = Process(argv, env, cwd, live=False, cold=cold)
    stdout, stderr = process.communicate(timeout)
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


_server_path = None                         # path of the server's socket, once it has started
_server_lock = threading.Lock()


def _connect():
    """A connection to the server. The first call starts it; it ends with this process."""
    global _server_path
    with _server_lock:
        if _server_path is None:
            _server_path = _start_server()
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(_server_path)
    return connection


def _start_server():
    """Start the server. Returns the path of its socket."""
    folder = tempfile.TemporaryDirectory()
    path = f"{folder.name}/socket"
    # Imports must not start threads, and must not open a GPU: a forked process could not use it.
    env = os.environ | dict(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1",
                            DS_ACCELERATOR="cpu", CUDA_VISIBLE_DEVICES="")
    server = subprocess.Popen([sys.executable, __file__, path], env=env,
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert server.stdout.readline() == b"ready\n", "the server of tests/warm.py did not start"

    def close():
        server.stdin.close()
        server.wait()
        folder.cleanup()

    atexit.register(close)
    return path


# ---------------------------------------------------------------------------- the server
class Request(NamedTuple):
    """A program to run."""
    argv: list
    env: dict
    cwd: str
    streams: list                           # file descriptors of stdin, stdout and stderr


def serve(path):
    """Fork for every request, and send each connection the exit status of its child.

    Returns only in the children, with the request and its connection.
    """
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen(64)
    child_ended = _socket_of_ended_children()
    events = selectors.DefaultSelector()
    for source in (listener, child_ended, sys.stdin):
        events.register(source, selectors.EVENT_READ)
    print("ready", flush=True)

    running = {}                            # pid -> connection
    while True:
        ready = [key.fileobj for key, _ in events.select()]
        if sys.stdin in ready:              # the tests have ended
            _kill_all(running)
            os._exit(0)
        if child_ended in ready:
            child_ended.recv(4096)
        if listener in ready:
            connection, _ = listener.accept()
            request = receive(connection)
            pid = os.fork()
            if pid == 0:
                os.close(signal.set_wakeup_fd(-1))
                return request, connection
            running[pid] = connection
            for descriptor in request.streams:
                os.close(descriptor)
        _report_ended(running)


def _socket_of_ended_children():
    """A socket that receives a byte whenever a child has ended."""
    receiver, sender = socket.socketpair()
    sender.setblocking(False)
    signal.set_wakeup_fd(sender.detach())
    signal.signal(signal.SIGCHLD, lambda *_: None)
    return receiver


def _kill_all(running):
    for pid in running:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)


def _report_ended(running):
    """Send the exit status of every child that has ended, and forget it."""
    for pid in list(running):
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            connection = running.pop(pid)
            with connection, contextlib.suppress(BrokenPipeError):
                connection.sendall(f"{status}\n".encode())


def receive(connection):
    """Read a Request from a connection."""
    header, descriptors, _, _ = socket.recv_fds(connection, 8, 3)
    size = int.from_bytes(header, "big")
    data = b""
    while len(data) < size:
        data += connection.recv(size - len(data))
    argv, env, cwd = json.loads(data)
    return Request(argv, env, cwd, descriptors)


# ---------------------------------------------------------------------------- the forked process
def become(request, connection):
    """Run the program in the forked process. Returns or raises as the program does."""
    set_up_process(request)
    with connection:                        # after this the process is independent of the server
        connection.sendall(f"{os.getpid()}\n".encode())
    python_path = request.env.get("PYTHONPATH", "")
    sys.path[:1] = [folder for folder in python_path.split(":") if folder]
    run_program(request.argv, request.cwd)


def set_up_process(request):
    """Set up session, streams, signals, working directory and environment, as for a new process."""
    os.setsid()
    for number, descriptor in enumerate(request.streams):
        os.dup2(descriptor, number)
        os.close(descriptor)
    sys.stdin = open(0, closefd=False)
    sys.stdout = open(1, "w", closefd=False)
    sys.stderr = open(2, "w", 1, closefd=False)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.chdir(request.cwd)
    os.environ.clear()
    os.environ.update(request.env)
    import torch

    # torch has read the environment already, when the server imported it
    torch.set_num_threads(int(request.env.get("OMP_NUM_THREADS", os.cpu_count())))
    random.seed()


def run_program(argv, cwd):
    """Run [script, ...], ["-c", code, ...] or ["-m", module, ...] as __main__."""
    main = types.ModuleType("__main__")
    sys.modules["__main__"] = main
    if argv[0] == "-m":
        sys.path.insert(0, cwd)
        sys.argv = argv[1:]
        runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
        return
    if argv[0] == "-c":
        sys.path.insert(0, "")
        sys.argv = ["-c", *argv[2:]]
        code = compile(argv[1], "<string>", "exec")
    else:
        sys.path.insert(0, str(Path(argv[0]).parent))
        sys.argv = argv
        main.__file__ = argv[0]
        code = compile(Path(argv[0]).read_bytes(), argv[0], "exec")
    exec(code, main.__dict__)


def exit_code_of(request, connection):
    """Run the program. Returns its exit code."""
    try:
        become(request, connection)
    except SystemExit as e:
        if e.code is None:
            return 0
        if isinstance(e.code, int):
            return e.code
        if isinstance(e.code, str):
            print(e.code, file=sys.stderr)
        return 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def main():
    import torch  # noqa: F401 (without it nothing here runs)
    for package in PACKAGES:
        with contextlib.suppress(ModuleNotFoundError):
            importlib.import_module(package)
    assert len(os.listdir("/proc/self/task")) == 1, "an import has started a thread"
    gc.freeze()                             # keeps imported memory shared with the children
    request, connection = serve(sys.argv[1])
    exit_code = exit_code_of(request, connection)

    # End as Python does, but without the destruction of modules, which takes half a second.
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    os._exit(exit_code)


if __name__ == "__main__":
    main()
