"""convert_voc_aug.py: the lists, the labels, interruptions, damaged files, the download."""
import contextlib
import hashlib
import http.server
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import scipy.io
from conftest import REAL_VOC, ROOT, error_line, run
from drawn_voc import SHARED, draw_data_set
from PIL import Image

from download import DownloadError, fetch

CONVERT = ROOT / "convert_voc_aug.py"
HANGS = 30  # seconds after which a command that takes one is said to hang


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """A drawn sample that is not converted."""
    return draw_data_set(tmp_path_factory.mktemp("drawn"), counts={"train": 6, "val": 5, "sbd": 12})


@pytest.fixture
def devkit(drawn, tmp_path):
    """A copy of it, to convert."""
    return Path(shutil.copytree(drawn, tmp_path / "VOCdevkit"))


@pytest.fixture
def large_devkit(devkit):
    """With so many labels that the conversion is still under way when a test stops it."""
    folder = devkit / "VOCaug/dataset/cls"
    for number in range(1000):
        os.link(folder / "drawn_sbd_0000.mat", folder / f"more_{number:04}.mat")
    return devkit


def read_lists(devkit):
    return {path.stem: path.read_text().split() for path in (devkit / "VOC2012/ImageSets/Segmentation").glob("*.txt")}


def labels(devkit):
    return sorted((devkit / "VOC2012/SegmentationClassAug").glob("*.png"))


def test_real_subset_gives_210_and_380_ids(real_voc):
    lists = read_lists(real_voc.parent)
    assert len(lists["aug"]) == 210 and len(lists["trainaug"]) == 380
    assert lists["aug"] == sorted(lists["aug"]) and lists["trainaug"] == sorted(lists["trainaug"])
    assert not set(lists["aug"]) & (set(lists["train"]) | set(lists["val"]))
    assert set(lists["trainaug"]) == set(lists["aug"]) | set(lists["train"])


def test_real_labels_equal_the_mat_files_and_have_vocs_palette(real_voc):
    mats = sorted((REAL_VOC / "VOCdevkit/VOCaug/dataset/cls").glob("*.mat"))
    assert len(labels(real_voc.parent)) == len(mats) == 234
    for mat in mats:
        image = Image.open(real_voc / "SegmentationClassAug" / f"{mat.stem}.png")
        expected = scipy.io.loadmat(mat, squeeze_me=True, struct_as_record=False)["GTcls"].Segmentation
        np.testing.assert_array_equal(np.asarray(image), expected)
    vocs_own = Image.open(next((real_voc / "SegmentationClass").glob("*.png")))
    assert image.mode == "P" and image.getpalette() == vocs_own.getpalette()


def test_counts_that_differ_from_the_full_data_are_a_note(devkit):
    output = run(CONVERT, devkit, devkit / "VOCaug").stdout
    assert "aug.txt: 12 images (note: the full data gives 9,118)" in output
    assert "trainaug.txt: 18 images (note: the full data gives 10,582)" in output
    assert len(labels(devkit)) == 12 + 2 * SHARED


def test_labels_may_lie_in_cls_and_go_to_another_folder(devkit, tmp_path):
    (devkit / "VOCaug/dataset/cls").rename(devkit / "VOCaug/cls")
    run(CONVERT, devkit, devkit / "VOCaug", "-o", tmp_path / "out", "--nproc", 2)
    assert len(list((tmp_path / "out").glob("*.png"))) == 12 + 2 * SHARED and not labels(devkit)


def test_a_second_run_keeps_good_labels_and_mends_damaged_ones(devkit):
    run(CONVERT, devkit, devkit / "VOCaug")
    kept, cut, lost = labels(devkit)[:3]
    pixels, content = kept.read_bytes(), cut.read_bytes()
    stamp = kept.stat().st_mtime_ns
    cut.write_bytes(content[:len(content) // 2])
    lost.unlink()
    run(CONVERT, devkit, devkit / "VOCaug")
    assert kept.stat().st_mtime_ns == stamp and kept.read_bytes() == pixels
    assert cut.read_bytes() == content and lost.exists()


def command_lines(words):
    """The processes with these words in their command lines. -> {pid}"""
    found = set()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has just ended
            if words in path.read_text():
                found.add(int(path.parent.name))
    return found


def wait_until(condition, seconds=10):
    since = time.monotonic()
    while not condition():
        assert time.monotonic() - since < seconds
        time.sleep(0.01)


@contextlib.contextmanager
def converting(devkit, *flags):
    """A conversion that has written its first labels, in a process group of its own."""
    process = subprocess.Popen([sys.executable, CONVERT, devkit, devkit / "VOCaug", *map(str, flags)], text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
    try:
        wait_until(lambda: labels(devkit) or process.poll() is not None)
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def assert_all_ended(devkit):
    wait_until(lambda: not command_lines(str(devkit)))


def assert_goes_on(devkit, count):
    """What is there is whole; a second run completes it and leaves nothing else."""
    for path in labels(devkit):
        Image.open(path).load()
    run(CONVERT, devkit, devkit / "VOCaug")
    assert len(labels(devkit)) == count
    assert len(os.listdir(devkit / "VOC2012/SegmentationClassAug")) == count


def test_killed_it_leaves_whole_labels_and_no_worker_and_goes_on(large_devkit):
    with converting(large_devkit) as process:
        process.kill()
        process.wait()
        assert_all_ended(large_devkit)
    assert 0 < len(labels(large_devkit)) < 1000
    (large_devkit / "VOC2012/SegmentationClassAug/.0123456789abcdef.tmp").write_bytes(b"left by a killed worker")
    assert_goes_on(large_devkit, 1012 + 2 * SHARED)


@pytest.mark.parametrize("send, number, status, lines", [
    (os.kill, signal.SIGTERM, 143, 0), (os.killpg, signal.SIGTERM, 143, 0), (os.killpg, signal.SIGINT, 130, 1)])
def test_a_stop_ends_it_and_its_workers_at_once(large_devkit, send, number, status, lines):
    with converting(large_devkit) as process:
        send(process.pid, number)
        errors = process.communicate(timeout=10)[1]
        assert process.returncode == status and len(errors.splitlines()) == lines, errors
        assert_all_ended(large_devkit)
    assert 0 < len(labels(large_devkit)) < 1000


def test_a_stop_does_not_wait_for_a_worker_that_hangs(large_devkit):
    with converting(large_devkit, "--nproc", 2) as process:
        worker = max(command_lines(str(large_devkit)) - {process.pid})
        os.kill(worker, signal.SIGSTOP)
        process.terminate()
        assert process.wait(timeout=10) == 143
        assert_all_ended(large_devkit)


def test_a_killed_worker_is_one_line(large_devkit):
    with converting(large_devkit, "--nproc", 3) as process:
        os.kill(max(command_lines(str(large_devkit)) - {process.pid}), signal.SIGKILL)
        errors = process.communicate(timeout=10)[1]
        assert process.returncode == 1 and len(errors.splitlines()) == 1 and "--nproc" in errors
        assert_all_ended(large_devkit)


def test_a_disk_that_is_full_is_one_line(large_devkit):
    limited = ("import os, resource, runpy, sys\nresource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))\n"
               "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"  # write() fails instead
               f"sys.argv[0] = {str(CONVERT)!r}\nrunpy.run_path(sys.argv[0], run_name='__main__')\n")
    line = error_line("-c", limited, large_devkit, large_devkit / "VOCaug")
    assert "SegmentationClassAug" in line and "File too large" in line
    assert not labels(large_devkit)


def test_two_at_once_write_the_same_labels(large_devkit, tmp_path):
    command = [sys.executable, CONVERT, large_devkit, large_devkit / "VOCaug", "-o", tmp_path / "out"]
    both = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    errors = [process.communicate(timeout=HANGS)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], errors
    pngs = sorted((tmp_path / "out").iterdir())
    assert [path.suffix for path in pngs] == [".png"] * (1012 + 2 * SHARED)
    for path in pngs[:12 + 2 * SHARED]:  # the others are links to one of these
        mat = scipy.io.loadmat(large_devkit / f"VOCaug/dataset/cls/{path.stem}.mat")
        np.testing.assert_array_equal(np.asarray(Image.open(path)), mat["GTcls"]["Segmentation"][0, 0])
    assert len({path.read_bytes() for path in pngs[12 + 2 * SHARED:]}) == 1


def test_a_damaged_mat_is_named_and_the_others_are_done(devkit):
    folder = devkit / "VOCaug/dataset/cls"
    (folder / "drawn_sbd_0003.mat").write_bytes(b"not a MATLAB file" * 40)
    scipy.io.savemat(folder / "drawn_sbd_0004.mat", {"GTcls": {"Segmentation": np.full((4, 4), 77, np.uint8)}})
    errors = run(CONVERT, devkit, devkit / "VOCaug", status=1).stderr
    assert "drawn_sbd_0003.mat" in errors and "drawn_sbd_0004.mat" in errors and "Traceback" not in errors
    lists = read_lists(devkit)
    assert len(lists["aug"]) == 10 and not {"drawn_sbd_0003", "drawn_sbd_0004"} & set(lists["trainaug"])
    assert len(labels(devkit)) == 10 + 2 * SHARED


def test_a_mat_damaged_later_leaves_the_lists_and_comes_back_when_mended(devkit):
    run(CONVERT, devkit, devkit / "VOCaug")
    mat = devkit / "VOCaug/dataset/cls/drawn_sbd_0003.mat"
    content = mat.read_bytes()
    mat.write_bytes(content[:100])
    run(CONVERT, devkit, devkit / "VOCaug", status=1)
    assert "drawn_sbd_0003" not in read_lists(devkit)["trainaug"]
    mat.write_bytes(content)
    run(CONVERT, devkit, devkit / "VOCaug")
    assert "drawn_sbd_0003" in read_lists(devkit)["trainaug"]


def test_a_mat_that_is_no_file_or_no_id_is_named(devkit):
    folder = devkit / "VOCaug/dataset/cls"
    os.mkfifo(folder / "fifo.mat")
    (folder / "folder.mat").mkdir()
    shutil.copy(folder / "drawn_sbd_0000.mat", folder / "drawn_sbd_0000 (1).mat")
    process = subprocess.Popen([sys.executable, CONVERT, devkit, devkit / "VOCaug"], stderr=subprocess.PIPE, text=True)
    try:
        lines = process.communicate(timeout=HANGS)[1].splitlines()
    finally:
        process.kill()
    assert process.returncode == 1 and len(lines) == 4, lines
    assert ["(1).mat" in lines[0], "fifo.mat" in lines[1], "folder.mat" in lines[2]] == [True] * 3
    assert len(read_lists(devkit)["aug"]) == 12


def test_vocs_own_labels_are_not_overwritten(devkit):
    own = devkit / "VOC2012/SegmentationClass"
    assert "VOC's own" in error_line(CONVERT, devkit, devkit / "VOCaug", "-o", own)


def test_empty_paths_are_usage_errors(devkit):
    for command in ([devkit, devkit / "VOCaug", "-o", ""], ["", devkit], [devkit, ""]):
        assert "takes a value" in error_line(CONVERT, *command, status=2)
    assert not labels(devkit)


def test_bad_folders_get_one_line(devkit, tmp_path):
    assert "VOC2012" in error_line(CONVERT, tmp_path / "nowhere", devkit / "VOCaug")
    assert str(tmp_path / "nosbd") in error_line(CONVERT, devkit, tmp_path / "nosbd")
    assert "--nproc" in error_line(CONVERT, devkit, devkit / "VOCaug", "--nproc", 0, status=2)


# ---- the download, from a server of our own

class Handler(http.server.SimpleHTTPRequestHandler):
    """A file server that answers requests for the rest of a file, unless it `ignores_ranges`."""
    asked, break_off, sends_length, chunked, ignores_ranges, hangs = [], None, True, False, False, False

    def do_GET(self):
        path = Path(self.translate_path(self.path))
        if not path.exists():
            self.send_error(404)
            return
        content = path.read_bytes()
        wanted = None if self.ignores_ranges else self.headers.get("Range")
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted else 0
        self.asked.append(start)
        while self.hangs:  # until the end of the test
            time.sleep(0.02)
        if wanted and start >= len(content):
            self.send_error(416)
            return
        self.protocol_version = "HTTP/1.1" if self.chunked else "HTTP/1.0"
        self.close_connection = True
        self.send_response(206 if wanted else 200)
        if self.chunked:
            self.send_header("Transfer-Encoding", "chunked")
        elif self.sends_length:
            self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        body = content[start:self.break_off]
        end = b"" if self.break_off else b"0\r\n\r\n"
        with contextlib.suppress(BrokenPipeError):  # the client was stopped
            self.wfile.write(b"%x\r\n%s\r\n" % (len(body), body) + end if self.chunked else body)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(tmp_path):
    """Serves tmp_path/www. -> (its address, its folder, its Handler)"""
    folder = tmp_path / "www"
    folder.mkdir()
    handler = type("OwnHandler", (Handler,), {"asked": []})
    http_server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), lambda *args: handler(*args, directory=str(folder)))
    threading.Thread(target=http_server.serve_forever, args=(0.02,), daemon=True).start()
    yield f"http://127.0.0.1:{http_server.server_port}", folder, handler
    handler.hangs = False
    http_server.shutdown()


def pack(file, folder, name):
    """Packs a folder as a tar file, by that name. -> the file's MD5"""
    with tarfile.open(file, "w:gz" if file.suffix == ".tgz" else "w") as tar:
        tar.add(folder, name)
    return hashlib.md5(file.read_bytes()).hexdigest()


@pytest.fixture
def archive(drawn, server):
    """The drawn VOC as the archive that `fetch` takes."""
    name = "VOCdevkit/VOC2012"
    return f"{server[0]}/voc.tar", pack(server[1] / "voc.tar", drawn / "VOC2012", name), name


@pytest.fixture
def statements(archive, drawn, server):
    """Run the command on two archives of the drawn sample instead of the real data's."""
    name = "benchmark_RELEASE/dataset"
    md5 = pack(server[1] / "benchmark.tgz", drawn / "VOCaug/dataset", name)
    return (f"import cli, convert_voc_aug, sbd\nsbd.VOC_ARCHIVE = {archive}\n"
            f"sbd.SBD_ARCHIVE = {(f'{server[0]}/benchmark.tgz', md5, name)}\n"
            "cli.run(convert_voc_aug.main, 'convert_voc_aug.py')\n")


@pytest.fixture
def target(tmp_path):
    """The VOCdevkit to download into; its parent exists."""
    (tmp_path / "data/VOCdevkit").mkdir(parents=True)
    return tmp_path / "data/VOCdevkit"


def command(statements, target):
    return "-c", statements, target, target / "VOCaug", "--download"


def fetch_error(archive, target):
    with pytest.raises(DownloadError) as caught:
        fetch(archive, target / "VOC2012")
    assert not (target / "VOC2012").exists()
    return str(caught.value)


def assert_fetched(archive, target, drawn):
    """It succeeds, and leaves the files of the drawn VOC and nothing else."""
    fetch(archive, target / "VOC2012")
    ours, theirs = ({path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
                    for folder in (target / "VOC2012", drawn / "VOC2012"))
    assert ours == theirs and os.listdir(target) == ["VOC2012"]


def test_download_fetches_unpacks_and_converts(statements, server, target):
    target.rmdir()
    both = [subprocess.Popen([sys.executable, *command(statements, target)], cwd=ROOT) for _ in range(2)]
    assert [process.wait(HANGS) for process in both] == [0, 0]
    assert server[2].asked == [0, 0]  # of two commands at once the second waits, and finds both
    assert len(labels(target)) == 12 + 2 * SHARED and sorted(os.listdir(target)) == ["VOC2012", "VOCaug"]


def test_file_urls_work_and_a_part_of_one_is_begun_anew(archive, server, drawn, target):
    file = server[1] / "voc.tar"
    (target / "voc.tar.part").write_bytes(file.read_bytes()[:1000])
    assert_fetched((file.as_uri(), *archive[1:]), target, drawn)


def test_an_archive_that_the_user_placed_is_unpacked_or_named(archive, server, drawn, target):
    (target / "voc.tar").write_bytes(b"another")
    assert f"{target / 'voc.tar'}: its MD5" in fetch_error(archive, target)
    assert (target / "voc.tar").exists()
    shutil.copy(server[1] / "voc.tar", target)
    assert_fetched(archive, target, drawn)
    assert server[2].asked == []


@pytest.mark.parametrize("ignores_ranges", [False, True])
def test_a_broken_off_download_goes_on_where_it_was(archive, server, drawn, target, ignores_ranges):
    server[2].break_off = 1000
    assert "broke off" in fetch_error(archive, target)
    assert (target / "voc.tar.part").stat().st_size == 1000
    server[2].break_off, server[2].ignores_ranges = None, ignores_ranges
    assert_fetched(archive, target, drawn)
    assert server[2].asked == [0, 0 if ignores_ranges else 1000]


@pytest.mark.parametrize("chunked, found", [(False, "MD5"), (True, "cannot be downloaded")])
def test_a_download_without_a_length(archive, server, drawn, target, chunked, found):
    server[2].sends_length, server[2].chunked, server[2].break_off = False, chunked, 1000
    assert found in fetch_error(archive, target)  # chunks tell that the end is missing
    server[2].break_off = None
    assert_fetched(archive, target, drawn)


@pytest.mark.parametrize("part, asked", [
    (lambda content: content, ["all"]),
    (lambda content: content + b"more", ["all + 4", 0]),
    (lambda content: b"\0" * 1000, [1000, 0]),
    (lambda content: b"\0" * len(content), ["all", 0])], ids=["whole", "longer", "other version", "other, whole"])
def test_a_part_that_is_whole_is_taken_and_a_wrong_one_begun_anew(archive, server, drawn, target, part, asked):
    content = (server[1] / "voc.tar").read_bytes()
    (target / "voc.tar.part").write_bytes(part(content))
    assert_fetched(archive, target, drawn)
    names = {"all": len(content), "all + 4": len(content) + 4}
    assert server[2].asked == [names.get(start, start) for start in asked]


def test_a_wrong_checksum_is_refused_and_nothing_is_unpacked(statements, server, target):
    with open(server[1] / "voc.tar", "ab") as file:
        file.write(b"more")
    assert "MD5" in error_line(*command(statements, target))
    assert not list(target.iterdir())


def test_an_archive_that_would_write_outside_is_refused(archive, server, tmp_path, target):
    file = server[1] / "voc.tar"
    with tarfile.open(file, "a") as tar:
        tar.add(ROOT / "LICENSE", "../../../escaped")
    md5 = hashlib.md5(file.read_bytes()).hexdigest()
    assert "does not unpack" in fetch_error((archive[0], md5, archive[2]), target)
    assert not list(tmp_path.rglob("escaped")) and os.listdir(target) == ["voc.tar"]


def test_no_server_and_no_file_are_one_line(archive, statements, target):
    line = error_line(*command(statements.replace("127.0.0.1", "127.0.0.1:1/"), target))
    assert "cannot be downloaded" in line and str(target / "voc.tar") in line
    assert "HTTP 404" in fetch_error((archive[0] + ".absent", *archive[1:]), target)


@pytest.mark.parametrize("number, status, lines", [(signal.SIGTERM, 143, 0), (signal.SIGINT, 130, 1)])
def test_a_stopped_download_ends_without_a_traceback(statements, server, target, number, status, lines):
    server[2].hangs = True
    process = subprocess.Popen([sys.executable, *command(statements, target)], stderr=subprocess.PIPE, text=True,
                               cwd=ROOT)
    wait_until(lambda: server[2].asked)
    process.send_signal(number)
    errors = process.communicate(timeout=10)[1]
    assert process.returncode == status and len(errors.splitlines()) == lines, errors
