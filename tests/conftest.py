"""What the tests share: the project's commands as a user runs them, and the data they run on."""
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from drawn_voc import draw_data_set  # noqa: E402
from fcn8s import FCN8s  # noqa: E402

HANGS = 240  # seconds after which a command that takes a few is said to hang
REAL_VOC = Path(os.environ.get("FCN8S_VOC", ROOT.parent / "shared" / "voc"))


def pytest_configure():
    """Half the cores for each of two tests at a time, and the same in every process: torchrun would give its own
    another number, and sums by another number of threads are not equal to the bit."""
    os.environ.setdefault("OMP_NUM_THREADS", str((os.cpu_count() + 1) // 2))
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


def run(*command, status=0, cwd=ROOT, env=None):
    """Runs `python COMMAND...` in a process of its own, checks its exit status, and returns it with its output."""
    done = subprocess.run([sys.executable, *map(str, command)], cwd=cwd, capture_output=True, text=True,
                          env={**os.environ, **(env or {})})
    assert done.returncode == status, f"status {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def error_line(*command, status=1, **kwargs):
    """Runs a command that must fail; its error must be one line and no traceback. -> that line"""
    lines = run(*command, status=status, **kwargs).stderr.strip().splitlines()
    assert len(lines) == 1, "\n".join(lines)
    return lines[0]


def train(data, work_dir, *flags, status=0):
    """A short training on small crops; `flags` come last and so override the defaults here."""
    return run(ROOT / "train.py", *train_flags(data, work_dir), *flags, status=status)


def start(data, work_dir, *flags):
    """Starts a training as `train` does, and does not wait for it. -> subprocess.Popen"""
    return subprocess.Popen([sys.executable, *map(str, (ROOT / "train.py", *train_flags(data, work_dir), *flags))],
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)


def finish(process, status):
    """Waits for a started training, checks its exit status, and returns its output."""
    try:
        output, _ = process.communicate(timeout=HANGS)
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun ends its processes, which a SIGKILL would leave behind
        raise
    assert process.returncode == status, f"status {process.returncode}\n{output}"
    return output


def wait_for_iteration(process, work_dir, number):
    """Returns once the metrics, a line each iteration, show that iteration, or when the training has ended."""
    since = time.monotonic()
    while process.poll() is None and f'"iter": {number},' not in read(work_dir / "metrics.jsonl"):
        assert time.monotonic() - since < HANGS, "the training hangs"
        time.sleep(0.01)


def read(path):
    return path.read_text() if path.exists() else ""


def metrics(work_dir):
    return [json.loads(line) for line in (work_dir / "metrics.jsonl").read_text().splitlines()]


def timeless(lines):
    """Lines of metrics without the values that are of the clock or the machine."""
    return [{key: value for key, value in line.items() if key not in ("fps", "iter_time", "data_time", "memory")}
            for line in lines]


def state(path):
    return torch.load(path, weights_only=True)


def assert_same_run(ours, theirs):
    """Two finished runs: parameters, buffers and momentum equal to the bit, the same metrics and the same result."""
    a, b = (state(folder / "ckpt/latest.pth") for folder in (ours, theirs))
    assert a["state_dict"].keys() == b["state_dict"].keys()
    assert all(torch.equal(value, b["state_dict"][key]) for key, value in a["state_dict"].items())
    for number, values in a["optimizer"]["state"].items():
        assert torch.equal(values["momentum_buffer"], b["optimizer"]["state"][number]["momentum_buffer"])
    assert timeless(metrics(ours)) == timeless(metrics(theirs))
    a, b = (json.loads((folder / "result.json").read_text()) for folder in (ours, theirs))
    assert {key: value for key, value in a.items() if "fps" not in key} == {
        key: value for key, value in b.items() if "fps" not in key}


def train_flags(data, work_dir):
    return ("--device", "cpu", "--data_path", data, "--work_dir", work_dir, "--backbone", "resnet50",
            "--pretrained", "none", "--scale", 256, 64, "--crop_size", 64, "--batch_size", 2, "--workers", 0,
            "--max_iters", 4, "--log_interval", 1)


def untrained_checkpoint(path, names):
    """Writes a network that was never trained, but whose answers vary from pixel to pixel, as train.py would."""
    torch.manual_seed(0)
    model = FCN8s(len(names), "resnet50")
    for layer in (model.decode_head.score_pool3, model.decode_head.score_pool4, model.decode_head.score_fr):
        torch.nn.init.normal_(layer.weight, std=0.1)
    colours = [[200, 10 * i, 5] for i in range(len(names))]
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"state_dict": model.state_dict(), "meta": {
        "backbone": "resnet50", "num_classes": len(names), "classes": names, "palette": colours,
        "scale": (96, 64)}}, path)
    return path


@pytest.fixture(scope="session")
def real_voc(tmp_path_factory):
    """The year folder of a converted copy of the real subset."""
    if not REAL_VOC.is_dir():
        pytest.skip(f"no real VOC subset at {REAL_VOC} ($FCN8S_VOC)")
    devkit = tmp_path_factory.mktemp("real") / "VOCdevkit"
    shutil.copytree(REAL_VOC / "VOCdevkit", devkit)
    run(ROOT / "convert_voc_aug.py", devkit, devkit / "VOCaug", "--nproc", 2)
    return devkit / "VOC2012"


@pytest.fixture(scope="session")
def drawn_voc(tmp_path_factory):
    """The year folder of a converted drawn sample. Shared by the tests: they copy it before they change it."""
    devkit = draw_data_set(tmp_path_factory.mktemp("drawn"), counts={"train": 6, "val": 5, "sbd": 6})
    run(ROOT / "convert_voc_aug.py", devkit, devkit / "VOCaug", "--nproc", 2)
    return devkit / "VOC2012"


@pytest.fixture
def own_drawn_voc(drawn_voc, tmp_path):
    """A copy of the drawn sample's year folder, to spoil."""
    return Path(shutil.copytree(drawn_voc.parent, tmp_path / "VOCdevkit")) / "VOC2012"
