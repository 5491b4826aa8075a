"""What lies outside of a run: nohup, pipes, special files, links, and names in another encoding."""
import contextlib
import csv
import fcntl
import json
import os
import select
import shlex
import shutil
import signal
import stat
import subprocess
import sys

import numpy as np
import onnx
import pytest
from conftest import (
    ROOT,
    environment,
    error_line,
    fill_pipe,
    finish,
    left_of,
    metrics,
    run,
    start,
    start_python,
    state,
    train_flags,
    untrained_checkpoint,
    wait_for_iteration,
)
from PIL import Image

import predict as predict_command
from voc import CLASSES as VOC_CLASSES
from voc import digest

PREDICT, EVALUATE, EXPORT = (ROOT / f"{name}.py" for name in ("predict", "evaluate", "export"))
ANIMALS = ("ground", "猫", "owl")
GBK = "猫".encode("gbk")  # no UTF-8
C_LOCALE = {"LC_ALL": "C", "PYTHONUTF8": "0"}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return untrained_checkpoint(tmp_path_factory.mktemp("network") / "animals.pth", ANIMALS)


@pytest.fixture
def photographs(tmp_path):
    """A folder of three photographs, the second with a name that is not UTF-8. -> the folder"""
    folder = tmp_path / "photographs"
    folder.mkdir()
    for number, name in enumerate((b"a.png", b"b" + GBK + b".png", b"c.png")):
        noise = np.random.default_rng(number).integers(0, 256, (20, 30, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / os.fsdecode(name))
    return folder


def waits(pid):
    """True if a process waits in select()."""
    with open(f"/proc/{pid}/wchan") as file:
        return "poll" in file.read() or "select" in file.read()


# ---- signals

@pytest.mark.parametrize("ignored", (True, False))
def test_a_run_of_two_ranks_ends_by_a_hangup_unless_nohup_ignores_it(ignored, drawn_voc, tmp_path):
    """The terminal that ends sends it to the launcher, and the kernel to the whole group."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
    try:
        process = start(drawn_voc, tmp_path / "run", "--device_list", "0,1", "--max_iters", 8 if ignored else 10_000,
                        "--eval_interval", 10_000)
    finally:
        signal.signal(signal.SIGHUP, before)
    wait_for_iteration(process, tmp_path / "run", 2)
    os.killpg(process.pid, signal.SIGHUP)
    output = finish(process, 0 if ignored else 128 + signal.SIGHUP)
    saved = state(tmp_path / "run/ckpt/latest.pth")["progress"]["iteration"]
    assert "Traceback" not in output and not left_of(process)
    assert saved == 8 if ignored else saved == metrics(tmp_path / "run")[-1]["iter"]


FORKS = """
import multiprocessing, os, signal, sys, time
from cli import start_worker

def work():
    os.kill(os.getpid(), signal.SIGSTOP)  # at the moment of its birth
    start_worker()
    time.sleep(1000)

worker = multiprocessing.get_context("fork").Process(target=work)
worker.start()
os.waitpid(worker.pid, os.WUNTRACED)
print(worker.pid, flush=True)
time.sleep(1000)
"""


def test_a_worker_whose_parent_was_killed_at_its_birth_ends(tmp_path):
    """PyTorch's own watchdog would take the process that adopts it for its parent."""
    (tmp_path / "forks.py").write_text(FORKS)
    process = start_python([tmp_path / "forks.py"])
    worker = os.pidfd_open(int(process.stdout.readline()))
    process.kill()
    process.wait()
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(worker, signal.SIGCONT)
    assert select.select([worker], [], [], 60)[0]  # it has ended
    os.close(worker)
    process.communicate()


# ---- output that nobody reads

def test_a_run_stops_and_saves_though_its_output_is_a_full_pipe(drawn_voc, tmp_path):
    process = start(drawn_voc, tmp_path / "run", "--max_iters", 10_000, "--eval_interval", 10_000)
    while not process.stdout.readline().startswith("iter 2/"):
        assert process.poll() is None
    fill_pipe(f"/proc/{process.pid}/fd/1")
    process.terminate()
    assert process.wait(timeout=60) == 128 + signal.SIGTERM
    assert not left_of(process)
    process.stdout.close()
    log = (tmp_path / "run/train_0.log").read_text()
    assert log.count("note: the output cannot be written to (nobody reads it)") == 1
    assert "stopped by SIGTERM at iteration" in log.splitlines()[-1] or "note" in log.splitlines()[-1]
    assert state(tmp_path / "run/ckpt/latest.pth")["progress"]["iteration"] == metrics(tmp_path / "run")[-1]["iter"]


def test_two_interrupts_end_a_command_whose_output_is_a_full_pipe(checkpoint, photographs, tmp_path):
    reader, writer = os.pipe()
    fill_pipe(f"/proc/self/fd/{writer}")
    process = subprocess.Popen([sys.executable, PREDICT, checkpoint, photographs, "--device", "cpu", "--save_dir",
                                tmp_path / "out"], stdout=writer, stderr=writer, env=environment())
    for _ in range(2):
        while not waits(process.pid):
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) in (128 + signal.SIGINT, -signal.SIGINT)
    os.close(reader)
    os.close(writer)


def test_an_error_that_nobody_can_read_keeps_its_status(checkpoint, tmp_path):
    command = f'"{sys.executable}" "{EVALUATE}" absent --data_path d --device cpu 2> /dev/full'
    assert subprocess.run(["bash", "-c", command], env=environment()).returncode == 1
    reader, writer = os.pipe()
    os.close(reader)
    process = subprocess.Popen([sys.executable, EVALUATE, "absent", "--data_path", "d"], stdout=writer, stderr=writer,
                               env=environment())
    os.close(writer)
    assert process.wait() == 1


# ---- special files and links

def outputs(checkpoint, photographs, data, folder):
    """The commands that write a file which the user names, but for its name; and how to read it."""
    voc = untrained_checkpoint(folder / "voc.pth", VOC_CLASSES)
    return [([PREDICT, checkpoint, photographs, "--device", "cpu", "--save_dir", folder / "out", "--csv"],
             lambda content: content.splitlines()[0].decode() == "photograph,ground,猫,owl"),
            ([EVALUATE, voc, "--device", "cpu", "--data_path", data, "--max_images", 1, "--workers", 0, "--json"],
             lambda content: json.loads(content)["images"] == 1),
            ([EXPORT, checkpoint], lambda content: onnx.load_from_string(content).ir_version > 0)]


def test_a_command_whose_output_cannot_be_written_to_finishes(checkpoint, photographs, tmp_path):
    """Then it says so, with status 1."""
    flags = ("--device", "cpu", "--save_dir", tmp_path / "out", "--csv", tmp_path / "shares.csv")
    command = shlex.join(map(str, (sys.executable, PREDICT, checkpoint, photographs, *flags)))
    done = subprocess.run(["bash", "-c", f"{command} > /dev/full"], capture_output=True, text=True, env=environment())
    assert done.returncode == 1 and (tmp_path / "shares.csv").is_file() and list((tmp_path / "out").glob("*.png"))
    assert done.stderr == "predict.py: error: the output cannot be written to (No space left on device)\n"


def test_a_program_of_others_keeps_its_ctrl_c_whatever_its_name(tmp_path):
    (tmp_path / "predict.py").write_text(
        "import signal, cli\nprint(signal.getsignal(signal.SIGINT) is signal.default_int_handler)")
    assert run(tmp_path / "predict.py", env={"PYTHONPATH": str(ROOT)}).stdout == "True\n"


def test_a_pipe_is_written_to_and_a_link_is_followed(checkpoint, photographs, drawn_voc, tmp_path):
    """A named pipe without a reader is an error. None of them is replaced. What a kill left is removed."""
    pipe, link, target = tmp_path / "pipe", tmp_path / "link", tmp_path / "elsewhere/target"
    os.mkfifo(pipe)
    target.parent.mkdir()
    link.symlink_to(target)
    for command, is_right in outputs(checkpoint, photographs, drawn_voc, tmp_path):
        line = error_line(*command, pipe)
        assert f"{pipe}: cannot be written to (" in line and "if it is a pipe, start its reader first" in line
        with open(os.open(pipe, os.O_RDONLY | os.O_NONBLOCK), "rb") as reader:
            fcntl.fcntl(reader, fcntl.F_SETPIPE_SZ, 2 ** 20)  # as much as is written
            run(*command, pipe)
            assert is_right(reader.read()) and pipe.is_fifo()
        for content in (None, b"old"):
            target.unlink(missing_ok=True) if content is None else target.write_bytes(content)
            (target.parent / ".0123456789abcdef.tmp").write_bytes(b"of a process that was killed")
            run(*command, link)
            assert is_right(target.read_bytes()) and link.is_symlink() and list(target.parent.iterdir()) == [target]


def test_standard_output_may_be_the_file(checkpoint, photographs, drawn_voc, tmp_path):
    """After what is printed, be it a pipe or a file."""
    command = list(map(str, [*outputs(checkpoint, photographs, drawn_voc, tmp_path)[1][0], "/dev/stdout"]))
    piped = run(*command, real=True).stdout
    with open(tmp_path / "printed", "w") as file:
        subprocess.run([sys.executable, *command], stdout=file, check=True, env=environment())
    for text in (piped, (tmp_path / "printed").read_text()):
        printed, brace, scores = text.partition("{\n")
        assert "mIoU" in printed and json.loads(brace + scores)["images"] == 1
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


def test_a_device_is_written_to_and_a_picture_never_follows_a_link(checkpoint, photographs, tmp_path):
    null = tmp_path / "null"
    try:
        os.mknod(null, 0o666 | stat.S_IFCHR, os.makedev(1, 3))
        null.write_text("")
    except PermissionError:
        pytest.skip("no device can be made here")
    (tmp_path / "out").mkdir()
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "out/a.png").symlink_to(tmp_path / "mine")
    run(PREDICT, checkpoint, photographs, "--device", "cpu", "--save_dir", tmp_path / "out", "--csv", null)
    assert null.is_char_device() and (tmp_path / "mine").read_text() == "mine"
    assert not (tmp_path / "out/a.png").is_symlink()


# ---- names that are not UTF-8

@pytest.mark.parametrize("locale", ({}, C_LOCALE))
def test_photographs_with_names_that_are_not_utf8_are_labelled(locale, checkpoint, photographs, tmp_path):
    (photographs / os.fsdecode(b"d" + GBK + b".jpg")).write_bytes(b"garbage")
    (photographs / os.fsdecode(b"e" + GBK + b".txt")).write_bytes(b"text")
    done = run(PREDICT, checkpoint, photographs, "--device", "cpu", "--overlay", "--save_dir", tmp_path / "out",
               "--csv", tmp_path / "shares.csv", env=locale, real=bool(locale), status=1)
    assert "Traceback" not in done.stderr and "does not decode" in done.stderr
    assert b"d" + GBK + b".jpg: the image does not decode" in os.fsencode(done.stderr)
    assert b"e" + GBK + b".txt\n" in os.fsencode(done.stdout)
    with open(tmp_path / "shares.csv", encoding="utf-8", errors="surrogateescape", newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["photograph", *ANIMALS]
    assert [row[0] for row in rows] == sorted(str(path) for path in photographs.glob("*.png"))
    assert len(list((tmp_path / "out").glob("*.png"))) == len(list((tmp_path / "out/overlay").glob("*.jpg"))) == 3


@pytest.mark.parametrize("locale", ({}, C_LOCALE))
def test_a_run_on_names_that_are_not_utf8(locale, own_drawn_voc, tmp_path):
    """Its folder and ids have such names, and others that are UTF-8 and no ASCII. A list names one of these."""
    data = own_drawn_voc.rename(tmp_path / os.fsdecode(b"data" + GBK))
    lists = data / "ImageSets/Segmentation"
    for number, old in enumerate((lists / "train.txt").read_text().split()):
        new = os.fsdecode(b"g" + GBK + b"%d" % number) if number % 2 else f"u猫{number}"
        for path in (data / f"JPEGImages/{old}.jpg", data / f"SegmentationClass/{old}.png"):
            path.rename(path.with_name(new + path.suffix))
    shutil.rmtree(data / "SegmentationClassAug")
    ids = sorted(path.stem for path in (data / "SegmentationClass").iterdir())
    (lists / "u.txt").write_text("".join(f"{name}\n" for name in ids if name.startswith("u")))
    lists.rename(tmp_path / "lists")
    (data / "class_names.txt").write_text("\n".join(["背景", *map(str, range(20))]))
    work_dir = tmp_path / os.fsdecode(b"run" + GBK)
    flags = [*train_flags(data, work_dir), "--max_iters", 1, "--workers", 1]
    done = run(ROOT / "train.py", *flags, env=locale, real=bool(locale))
    assert "Traceback" not in done.stderr and "could not be drawn" not in done.stdout
    record = json.loads((work_dir / "run.json").read_text(encoding="utf-8"))["starts"][0]
    listed = record["data"]["train"]["ids"] + record["data"]["val"]["ids"]
    assert sorted(map(os.fsencode, listed)) == sorted(map(os.fsencode, ids))
    for part in ("train", "val"):
        assert record["data"][part]["sha256"] == digest(record["data"][part]["ids"])
    assert b"data" + GBK in (work_dir / "train_0.log").read_bytes()
    (data / "ImageSets").mkdir(exist_ok=True)
    (tmp_path / "lists").rename(lists)
    run(EVALUATE, work_dir / "ckpt/best.pth", "--data_path", data, "--split", "u", "--device", "cpu", "--json",
        tmp_path / "scores.json", "--save_dir", tmp_path / "out", env=locale, real=bool(locale))
    scores = json.loads((tmp_path / "scores.json").read_text(encoding="utf-8"))
    assert os.fsencode(scores["checkpoint"]) == os.fsencode(work_dir / "ckpt/best.pth") and "背景" in scores["classes"]
    assert len(list((tmp_path / "out").glob("u猫*.png"))) == scores["images"]


# ---- predict.py

def test_a_loop_of_links_is_one_line_and_what_a_kill_left_is_removed(checkpoint, photographs):
    (photographs / "loop.png").symlink_to("loop.png")
    out = photographs / "out"
    for folder in (out, out / "overlay"):
        folder.mkdir()
        (folder / ".0123456789abcdef.tmp").write_text("of a process that was killed")
    line = error_line(PREDICT, checkpoint, photographs, "--device", "cpu", "--overlay", "--save_dir", out)
    assert "loop.png: " in line and not list(out.rglob(".*.tmp")) and len(list(out.glob("*.png"))) == 3


def test_ctrl_c_keeps_the_csv_of_what_was_done(checkpoint, photographs, tmp_path, monkeypatch):
    label, (first, *_) = predict_command.label, sorted(photographs.iterdir())

    def interrupted(predictor, path, *files):
        if path.name == "c.png":
            sys.exit(128 + signal.SIGINT)
        return label(predictor, path, *files)

    monkeypatch.setattr(predict_command, "label", interrupted)
    first.write_bytes(b"garbage")
    done = run(PREDICT, checkpoint, photographs, "--device", "cpu", "--save_dir", tmp_path / "out", "--csv",
               tmp_path / "shares.csv", status=128 + signal.SIGINT)
    assert "a.png: the image does not decode" in done.stderr
    lines = (tmp_path / "shares.csv").read_bytes().splitlines()
    assert len(lines) == 2 and GBK + b".png" in lines[1]


def test_of_several_frames_the_first_is_labelled_and_a_line_says_so(checkpoint, tmp_path):
    frames = [Image.new("L", (9, 9), grey) for grey in (0, 255)]
    for name, more in (("a.gif", frames[1:]), ("b.tif", frames[1:]), ("c.gif", [])):
        frames[0].save(tmp_path / name, save_all=True, append_images=more)
    output = run(PREDICT, checkpoint, tmp_path, "--device", "cpu", "--save_dir", tmp_path / "out").stdout
    assert output.count("holds several frames") == 2
    for name in ("a.gif", "b.tif"):
        assert f"note: {tmp_path / name}: holds several frames; the first is labelled\n" in output


def test_over_many_shapes_of_image_the_memory_is_bounded(tmp_path):
    """By fewer operators that oneDNN keeps: over 90 shapes their code takes more than the rest of the growth."""
    program = """import sys
sys.argv[0] = sys.argv.pop(1)
import cli, torch
convolutions = torch.nn.Sequential(*(torch.nn.Conv2d(64, 64, 3) for _ in range(10)))
def memory():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmRSS")).split()[1]) / 1024
with torch.inference_mode():
    for side in range(30, 120):
        convolutions(torch.zeros(1, 64, side, 30))
        first = memory() if side == 40 else side > 40 and first
print(memory() - first)"""
    ours, others = (float(run("-c", program, name).stdout) for name in ("predict.py", "train.py"))
    assert ours < others / 2
