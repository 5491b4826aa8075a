"""Runs the project's commands as forks of one process that has imported PyTorch already, which takes seconds.

`python fork_server.py DESCRIPTOR` is the server. A fork gets its own arguments, folder, environment and outputs. Then
it leaves the server's code and goes on as `python SCRIPT` does: what it imports of the project, how it exits and what
it runs at exit are those of a new interpreter.
"""
import array
import atexit
import gc
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

# What the commands import, of which torch._dynamo comes with the first optimizer. None of these starts a thread, which
# a fork would lose: not onnxruntime, therefore.
LIBRARIES = ("numpy", "torch._dynamo", "torch.distributed.run", "torch.nn.parallel", "torch.utils.data",
             "PIL.Image", "matplotlib.backends.backend_agg", "matplotlib.figure", "scipy.io", "tqdm",
             "concurrent.futures.process", "concurrent.futures.thread")
# Variables that an interpreter or a library reads when it starts. A fork comes too late for another value.
READ_AT_START = ("PYTHON", "OMP_", "MKL_", "OPENBLAS_", "LC_", "LANG", "LD_", "MPL", "TORCH_CPP_LOG_LEVEL",
                 "TORCH_DEVICE_BACKEND_AUTOLOAD")
MAX_MESSAGE = 2 ** 18  # bytes
POLL_SECONDS = 0.005


class ForkServer:
    """The server, as its client sees it: it starts with the client's first request and ends with the client."""

    def __init__(self, environment):
        self.environment = at_start(environment)
        self.channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            # NumPy's BLAS would start threads on import; the second is what train.py sets before it imports PyTorch.
            own = {"OPENBLAS_NUM_THREADS": "1", "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
            self.process = subprocess.Popen(
                [sys.executable, __file__, str(theirs.fileno())], pass_fds=[theirs.fileno()],
                env={**environment, **own}, stdin=subprocess.DEVNULL)

    def can_run(self, environment):
        """Whether a fork in this environment is as good as a new interpreter."""
        return at_start(environment) == self.environment

    def start(self, command, cwd, environment, merged, new_session):
        """Starts `python COMMAND...`. merged: the errors go where the output goes. -> Forked"""
        readers, writers = zip(*(os.pipe() for _ in range(1 if merged else 2)), strict=True)
        pid = self.ask({"command": command, "cwd": str(cwd), "environment": environment, "new_session": new_session},
                       (writers[0], writers[-1]))
        for descriptor in writers:
            os.close(descriptor)
        return Forked(self, pid, command, readers)

    def ask(self, request, descriptors=()):
        """-> the server's answer"""
        sent = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
        self.channel.sendmsg([json.dumps(request).encode()], sent)
        answer = self.channel.recv(MAX_MESSAGE)
        if not answer:
            raise RuntimeError(f"the fork server ended with status {self.process.wait()}")
        return json.loads(answer)

    def close(self):
        self.channel.close()
        self.process.wait()


def at_start(environment):
    """The part of an environment that a fork cannot change."""
    return {name: value for name, value in environment.items() if name.startswith(READ_AT_START)}


class Forked:
    """A started command: of subprocess.Popen what the tests use."""

    def __init__(self, server, pid, args, descriptors):
        self.server, self.pid, self.args, self.returncode = server, pid, args, None
        self.outputs = [None] * len(descriptors)
        self.readers = [threading.Thread(target=self.read, args=pair, daemon=True) for pair in enumerate(descriptors)]
        for reader in self.readers:
            reader.start()

    def read(self, index, descriptor):
        with open(descriptor, encoding="utf-8", errors="replace") as pipe:
            self.outputs[index] = pipe.read()

    def poll(self):
        if self.returncode is None:
            self.returncode = self.server.ask({"poll": self.pid})
        return self.returncode

    def wait(self, timeout=None):
        since = time.monotonic()
        while self.poll() is None:
            if timeout is not None and time.monotonic() - since > timeout:
                raise subprocess.TimeoutExpired(self.args, timeout)
            time.sleep(POLL_SECONDS)
        return self.returncode

    def communicate(self, timeout=None):
        """Waits for the command, and for its children that still hold its outputs. -> (stdout, stderr or None)"""
        since = time.monotonic()
        for reader in self.readers:
            reader.join(None if timeout is None else max(0, since + timeout - time.monotonic()))
            if reader.is_alive():
                raise subprocess.TimeoutExpired(self.args, timeout)
        self.wait(None if timeout is None else max(0, since + timeout - time.monotonic()))
        return (*self.outputs, None)[:2]

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self):
        self.send_signal(signal.SIGTERM)

    def kill(self):
        self.send_signal(signal.SIGKILL)


# ---- the server's own process


def preload():
    """Imports the libraries. The project's modules are not among them: each command imports its own."""
    for name in LIBRARIES:
        importlib.import_module(name)
    assert len(os.listdir("/proc/self/task")) == 1, "a library has started a thread, which a fork would lose"
    gc.collect()
    gc.freeze()  # or the first collection of each fork copies what they all share


def serve(channel):
    """Answers the client until it ends. Returns in a fork only. -> the request that the fork is for"""
    while True:
        message, descriptors, _, _ = socket.recv_fds(channel, MAX_MESSAGE, 2)
        if not message:
            os._exit(0)
        request = json.loads(message)
        if "poll" in request:
            pid, status = os.waitpid(request["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        else:
            answer = os.fork()
            if answer == 0:
                channel.close()
                for number, descriptor in enumerate(descriptors, 1):
                    os.dup2(descriptor, number)
                for descriptor in descriptors:
                    os.close(descriptor)
                return request
            for descriptor in descriptors:
                os.close(descriptor)
        channel.send(json.dumps(answer).encode())


def become(request):
    """Makes this process what a new interpreter is before it runs its script. -> (the script's code, its globals)"""
    if request["new_session"]:
        os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.modules["numpy"].random.seed()  # PyTorch's own generator starts alike in every process
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["cwd"])
    for name in ("stdout", "stderr"):  # the server's took what it writes to for a file, which a pipe is not
        old = getattr(sys, name)
        setattr(sys, name, open(old.fileno(), "w", encoding=old.encoding, errors=old.errors, closefd=False,
                                buffering=1 if name == "stderr" else -1))
    sys.argv = request["command"]
    script = Path(sys.argv[0])
    sys.path[0] = str(script.resolve().parent)
    main = types.ModuleType("__main__")
    main.__file__, main.__builtins__ = str(script), __builtins__
    sys.modules["__main__"] = main
    return compile(script.read_bytes(), script, "exec"), main.__dict__


def end(status):
    """Ends this process as the interpreter does, but for freeing its memory, which would take half a second."""
    if not isinstance(status, int | None):
        print(status, file=sys.stderr)
        status = 1
    threading._shutdown()  # waits for threads
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit((status or 0) & 0xFF)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the commands; the server ends with its client
    preload()
    try:
        exec(*become(serve(socket.socket(fileno=int(sys.argv[1])))))
    except SystemExit as ending:
        end(ending.code)
    end(0)
