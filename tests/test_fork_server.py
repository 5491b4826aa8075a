"""That a command in a fork is the command in a new interpreter: what it sees, how it ends, and its children."""
import json
import signal
import subprocess

import pytest
from conftest import ROOT, start_python
from fork_server import Forked

SEEN = """
import concurrent.futures, json, multiprocessing, os, signal, sys
from backbones import BACKBONES

def square(number):
    return number * number

if __name__ == "__main__":
    with concurrent.futures.ProcessPoolExecutor(2) as pool:
        squares = list(pool.map(square, range(4)))
    print(json.dumps({
        "argv": sys.argv, "cwd": os.getcwd(), "path": sys.path, "main": sys.modules["__main__"].__file__,
        "given": os.environ.get("GIVEN"), "threads": os.environ["OMP_NUM_THREADS"],
        "stdin": sys.stdin.read(), "squares": squares, "tiny": "tiny" in BACKBONES,
        "signals": [str(signal.getsignal(number)) for number in range(1, 32)],
        "modules": sorted(name for name in ("cli", "train", "voc", "fcn8s", "device") if name in sys.modules),
        "children": [str(child) for child in multiprocessing.active_children()],
        "session": os.getsid(0) == os.getpid()}))
"""

ENDS = {
    "return": "print('out'); print('err', file=sys.stderr)",
    "number": "sys.exit(7)",
    "message": "sys.exit('no such file')",
    "exception": "raise ValueError('a bug')",
    "none": "sys.exit()",
    "beyond": "sys.exit(-1)",
    "abrupt": "print('kept', flush=True); os._exit(3)",
    "killed": "os.kill(os.getpid(), signal.SIGKILL)",
    "interrupted": "os.kill(os.getpid(), signal.SIGINT); time.sleep(60)",
    "at_exit": "atexit.register(print, 'last'); threading.Timer(0.1, print, ('late',)).start()"}


@pytest.mark.parametrize("new_session", (False, True))
def test_a_fork_sees_what_a_new_interpreter_sees(tmp_path, monkeypatch, new_session):
    monkeypatch.setenv("GIVEN", "by the test")
    (tmp_path / "seen.py").write_text(SEEN)
    seen = []
    for real in (False, True):
        process = start_python((tmp_path / "seen.py", "a b", 3), tmp_path, None, real, new_session=new_session)
        output, errors = process.communicate(timeout=60)
        assert (process.returncode, errors) == (0, "") and isinstance(process, subprocess.Popen) == real
        seen.append(json.loads(output))
    assert seen[0] == seen[1] and seen[0]["squares"] == [0, 1, 4, 9] and seen[0]["tiny"] and not seen[0]["modules"]


@pytest.mark.parametrize("end", ENDS)
def test_a_fork_ends_as_a_new_interpreter_does(tmp_path, end):
    script = tmp_path / "end.py"
    script.write_text("import atexit, os, signal, sys, threading, time\n" + ENDS[end])
    forked, real = (start_python((script,), ROOT, None, real) for real in (False, True))
    outputs, expected = forked.communicate(timeout=60), real.communicate(timeout=60)
    assert forked.returncode == real.returncode and outputs[0] == expected[0]
    if "Traceback" in expected[1]:  # the fork's begins in the server
        assert outputs[1].splitlines()[-1] == expected[1].splitlines()[-1]
    else:
        assert outputs[1] == expected[1]


def test_a_started_fork_is_waited_for_and_stopped(tmp_path):
    (tmp_path / "sleep.py").write_text("import time\nprint('started', flush=True)\ntime.sleep(60)")
    process = start_python((tmp_path / "sleep.py",), ROOT, None, False, merged=True)
    with pytest.raises(subprocess.TimeoutExpired):
        process.communicate(timeout=0.3)
    assert process.poll() is None
    process.terminate()
    assert process.communicate(timeout=60) == ("started\n", None) and process.poll() == -signal.SIGTERM
    process.kill()  # as nothing is left to kill, does nothing


def test_output_that_nobody_reads_yet_stops_no_fork(tmp_path):
    (tmp_path / "much.py").write_text("print('x' * 1_000_000)")
    process = start_python((tmp_path / "much.py",), ROOT, None, False)
    assert process.wait(timeout=60) == 0 and len(process.communicate()[0]) == 1_000_001


@pytest.mark.parametrize("changes, forked", [
    ({}, True), ({"TORCH_HOME": "hub"}, True), ({"PYTHONPATH": str(ROOT)}, True), ({"PYTHONPATH": "/tmp"}, False),
    ({"OMP_NUM_THREADS": "7"}, False), ({"LC_ALL": "C"}, False)])
def test_what_matters_at_start_gets_a_new_interpreter(tmp_path, changes, forked):
    (tmp_path / "nothing.py").touch()
    process = start_python((tmp_path / "nothing.py",), ROOT, changes, real=False)
    process.communicate()
    assert isinstance(process, Forked) == forked


def test_stand_ins_have_a_server_of_their_own(tmp_path):
    (tmp_path / "find.py").write_text("import importlib.util\nprint(importlib.util.find_spec('torch_npu') is not None)")
    stand_in = {"PYTHONPATH": str(ROOT / "tests/stand_ins/npu")}
    for changes, there in ((stand_in, "True\n"), ({}, "False\n")):
        process = start_python((tmp_path / "find.py",), ROOT, changes, real=False)
        assert process.communicate()[0] == there and isinstance(process, Forked)
