"""convert_voc_aug.py: the lists, the labels, interruptions, damaged files, the download."""
import contextlib
import hashlib
import http.server
import os
import shutil
import signal
import tarfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import scipy.io
from conftest import REAL_VOC, ROOT, processes, start_python
from PIL import Image

import convert_voc_aug
from cli import UserError

HANGS = 30  # seconds after which a command that takes one is said to hang
MORE = 1000  # labels of `large_devkit` on top of the sample's


@pytest.fixture
def devkit(drawn_voc, tmp_path):
    """A copy of the drawn sample that is not converted."""
    made = shutil.ignore_patterns("SegmentationClassAug", "aug.txt", "trainaug.txt")
    return Path(shutil.copytree(drawn_voc.parent, tmp_path / "VOCdevkit", ignore=made))


@pytest.fixture
def large_devkit(devkit):
    """With so many labels that the conversion is still under way when a test stops it."""
    folder = devkit / "VOCaug/dataset/cls"
    for i in range(MORE):
        os.link(folder / "drawn_sbd_0000.mat", folder / f"more_{i:04}.mat")
    return devkit


def convert(devkit, *flags):
    """Runs the command in this process. -> its exit status"""
    return convert_voc_aug.main(convert_voc_aug.parse_args([devkit, devkit / "VOCaug", *flags]))


def start_conversion(devkit, *flags):
    return start_python((ROOT / "convert_voc_aug.py", devkit, devkit / "VOCaug", *flags), new_session=True)


def ended(process, status):
    """Waits for a process, checks its exit status. -> the lines of stderr"""
    try:
        errors = process.communicate(timeout=HANGS)[1]
    finally:
        process.kill()
    assert process.returncode == status, errors
    return errors.splitlines()


def mats(devkit):
    return sorted((devkit / "VOCaug/dataset/cls").glob("*.mat"))


def labels(devkit):
    return sorted((devkit / "VOC2012/SegmentationClassAug").glob("*.png"))


def read_lists(devkit):
    return {path.stem: path.read_text().split() for path in (devkit / "VOC2012/ImageSets/Segmentation").glob("*.txt")}


def test_real_subset_gives_210_and_380_ids(real_voc):
    lists = read_lists(real_voc.parent)
    assert len(lists["aug"]) == 210 and len(lists["trainaug"]) == 380
    assert lists["aug"] == sorted(lists["aug"]) and lists["trainaug"] == sorted(lists["trainaug"])
    assert not set(lists["aug"]) & (set(lists["train"]) | set(lists["val"]))
    assert set(lists["trainaug"]) == set(lists["aug"]) | set(lists["train"])


def test_real_labels_equal_the_mat_files_and_have_vocs_palette(real_voc):
    files = mats(REAL_VOC / "VOCdevkit")
    assert len(labels(real_voc.parent)) == len(files) == 234
    for mat in files:
        image = Image.open(real_voc / "SegmentationClassAug" / f"{mat.stem}.png")
        expected = scipy.io.loadmat(mat, squeeze_me=True, struct_as_record=False)["GTcls"].Segmentation
        np.testing.assert_array_equal(np.asarray(image), expected)
    vocs_own = Image.open(next((real_voc / "SegmentationClass").glob("*.png")))
    assert image.mode == "P" and image.getpalette() == vocs_own.getpalette()


def test_counts_that_differ_from_the_full_data_are_a_note(devkit, capsys):
    assert convert(devkit) == 0
    printed = capsys.readouterr()
    lists = read_lists(devkit)
    assert lists["aug"] == [mat.stem for mat in mats(devkit) if mat.stem.startswith("drawn_sbd")]
    assert printed.out.splitlines()[1:] == [
        f"aug.txt: {len(lists['aug'])} images (note: the full data gives 9,118)",
        f"trainaug.txt: {len(lists['aug'] + lists['train'])} images (note: the full data gives 10,582)"]
    assert [path.stem for path in labels(devkit)] == [mat.stem for mat in mats(devkit)] and not printed.err


def test_labels_may_lie_in_cls_and_go_to_another_folder(devkit, tmp_path):
    names = [mat.stem for mat in mats(devkit)]
    (devkit / "VOCaug/dataset/cls").rename(devkit / "VOCaug/cls")
    assert convert(devkit, "-o", tmp_path / "new/out", "--nproc", 2) == 0
    assert sorted(path.stem for path in (tmp_path / "new/out").iterdir()) == names and not labels(devkit)


def test_a_second_run_keeps_good_labels_and_replaces_damaged_ones(devkit):
    convert(devkit)
    kept, cut, lost = labels(devkit)[:3]
    pixels, content = kept.read_bytes(), cut.read_bytes()
    stamp = kept.stat().st_mtime_ns
    cut.write_bytes(content[:len(content) // 2])
    lost.unlink()
    convert(devkit)
    assert kept.stat().st_mtime_ns == stamp and kept.read_bytes() == pixels
    assert cut.read_bytes() == content and lost.exists()


def command_lines(words):
    """The processes with these words in their command lines. -> {pid}"""
    found = set()
    for path in processes():
        with contextlib.suppress(OSError):  # it has just ended
            if words in (path / "cmdline").read_text():
                found.add(int(path.name))
    return found


def wait_until(condition):
    since = time.monotonic()
    while not condition():
        assert time.monotonic() - since < HANGS
        time.sleep(0.01)


@contextlib.contextmanager
def converting(devkit, *flags):
    """A conversion that has written its first labels. The block must end it, and its workers must end with it."""
    process = start_conversion(devkit, *flags)
    try:
        wait_until(lambda: labels(devkit) or process.poll() is not None)
        yield process
        wait_until(lambda: not command_lines(str(devkit)))
        assert 0 < len(labels(devkit)) < MORE
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def a_worker(process, devkit):
    return max(command_lines(str(devkit)) - {process.pid})


def test_killed_it_leaves_whole_labels_and_no_worker_and_resumes(large_devkit):
    with converting(large_devkit) as process:
        process.kill()
        process.wait()
    for path in labels(large_devkit):
        Image.open(path).load()
    folder = large_devkit / "VOC2012/SegmentationClassAug"
    (folder / ".0123456789abcdef.tmp").write_bytes(b"left by a killed worker")
    convert(large_devkit)
    assert sorted(os.listdir(folder)) == [f"{mat.stem}.png" for mat in mats(large_devkit)]


@pytest.mark.parametrize("send, stop, status, lines", [
    (os.kill, signal.SIGTERM, -15, 0), (os.killpg, signal.SIGTERM, -15, 0), (os.killpg, signal.SIGINT, 130, 1)])
def test_a_stop_ends_it_and_its_workers_at_once(large_devkit, send, stop, status, lines):
    with converting(large_devkit) as process:
        send(process.pid, stop)
        errors = ended(process, status)
        assert len(errors) == lines, errors


@pytest.mark.parametrize("stop, status", [(signal.SIGTERM, -15), (signal.SIGINT, 130)])
def test_a_stop_does_not_wait_for_a_worker_that_hangs(large_devkit, stop, status):
    with converting(large_devkit, "--nproc", 2) as process:
        os.kill(a_worker(process, large_devkit), signal.SIGSTOP)
        process.send_signal(stop)
        ended(process, status)


def test_a_killed_worker_is_one_line(large_devkit):
    with converting(large_devkit, "--nproc", 3) as process:
        os.kill(a_worker(process, large_devkit), signal.SIGKILL)
        errors = ended(process, 1)
        assert len(errors) == 1 and "--nproc" in errors[0]


def test_a_disk_that_is_full_is_one_line(large_devkit):
    limited = ("import resource, runpy, signal, sys\nresource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))\n"
               "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"  # write() fails instead
               "sys.argv[0] = 'convert_voc_aug.py'\nrunpy.run_path(sys.argv[0], run_name='__main__')\n")
    errors = ended(start_python(("-c", limited, large_devkit, large_devkit / "VOCaug")), 1)
    assert len(errors) == 1 and "SegmentationClassAug" in errors[0] and "File too large" in errors[0]
    assert not labels(large_devkit)


def test_two_at_once_write_the_same_labels(large_devkit, tmp_path):
    both = [start_conversion(large_devkit, "-o", tmp_path / "out") for _ in range(2)]
    assert [ended(process, 0) for process in both] == [[], []]
    pngs = sorted((tmp_path / "out").iterdir())
    assert [path.name for path in pngs] == [f"{mat.stem}.png" for mat in mats(large_devkit)]
    for path, mat in zip(pngs[:-MORE], mats(large_devkit), strict=False):
        expected = scipy.io.loadmat(mat)["GTcls"]["Segmentation"][0, 0]
        np.testing.assert_array_equal(np.asarray(Image.open(path)), expected)
    assert len({path.read_bytes() for path in pngs[-MORE:]}) == 1  # links to one file


def test_files_that_are_no_labels_are_named_and_the_others_are_done(devkit):
    folder = devkit / "VOCaug/dataset/cls"
    (folder / "drawn_sbd_0003.mat").write_bytes(b"not a MATLAB file" * 40)
    scipy.io.savemat(folder / "drawn_sbd_0004.mat", {"GTcls": {"Segmentation": np.full((4, 4), 77, np.uint8)}})
    os.mkfifo(folder / "fifo.mat")  # opening it would hang: a process of its own
    (folder / "folder.mat").mkdir()
    shutil.copy(folder / "drawn_sbd_0000.mat", folder / "drawn_sbd_0000 (1).mat")
    bad = ["drawn_sbd_0000 (1)", "drawn_sbd_0003", "drawn_sbd_0004", "fifo", "folder"]
    *errors, hint = ended(start_conversion(devkit), 1)
    assert len(errors) == len(bad), errors
    assert all(f"{name}.mat: " in error for name, error in zip(bad, errors, strict=True)) and "leave out" in hint
    good = [mat.stem for mat in mats(devkit) if mat.stem not in bad]
    lists = read_lists(devkit)
    assert [path.stem for path in labels(devkit)] == good
    assert lists["aug"] == [name for name in good if name.startswith("drawn_sbd")]
    assert lists["trainaug"] == sorted(lists["aug"] + lists["train"])


def test_what_stands_where_a_label_goes_is_named_and_the_others_are_done(devkit, capsys):
    """A folder ended the conversion, and a pipe made it wait for ever."""
    folder = devkit / "VOC2012/SegmentationClassAug"
    (folder / "drawn_sbd_0003.png").mkdir(parents=True)
    os.mkfifo(folder / "drawn_sbd_0004.png")
    assert convert(devkit) == 1
    errors = capsys.readouterr().err
    assert all(f"error: {folder}/drawn_sbd_000{number}.png: is not a file; delete it" in errors for number in (3, 4))
    assert sorted({mat.stem for mat in mats(devkit) if mat.stem.startswith("drawn_sbd")}
                  - set(read_lists(devkit)["aug"])) == ["drawn_sbd_0003", "drawn_sbd_0004"]
    assert len(labels(devkit)) == len(mats(devkit))


def test_a_mat_damaged_later_leaves_the_lists_and_comes_back_when_fixed(devkit, capsys):
    convert(devkit)
    mat = devkit / "VOCaug/dataset/cls/drawn_sbd_0003.mat"
    content = mat.read_bytes()
    mat.write_bytes(content[:100])
    assert convert(devkit) == 1 and f"{mat}: cannot be read" in capsys.readouterr().err
    assert "drawn_sbd_0003" not in read_lists(devkit)["trainaug"]
    mat.write_bytes(content)
    assert convert(devkit) == 0
    assert "drawn_sbd_0003" in read_lists(devkit)["trainaug"]


def test_vocs_own_labels_are_not_overwritten(devkit):
    with pytest.raises(UserError, match="VOC's own"):
        convert(devkit, "-o", devkit / "VOC2012/SegmentationClass")


def test_bad_flags_are_usage_errors(devkit, capsys):
    for flags, problem in ((("-o", ""), "takes a value"), (("--nproc", 0), "--nproc")):
        with pytest.raises(SystemExit, match="2"):
            convert(devkit, *flags)
        assert problem in capsys.readouterr().err
    for folders in (["", devkit], [devkit, ""]):
        with pytest.raises(SystemExit, match="2"):
            convert_voc_aug.parse_args(folders)
        assert "takes a value" in capsys.readouterr().err


def test_bad_folders_are_named(devkit, tmp_path):
    for aug, problem in (("VOCaug/dataset/cls", "VOCaug/dataset/cls: holds no .mat"), ("absent", "absent: holds no")):
        with pytest.raises(UserError, match=problem):
            convert_voc_aug.main(convert_voc_aug.parse_args([devkit, devkit / aug]))
    (devkit / "VOC2012/ImageSets/Segmentation/train.txt").unlink()
    with pytest.raises(UserError, match="train.txt"):
        convert(devkit)
    with pytest.raises(UserError, match="nowhere/VOC2012/ImageSets/Segmentation: .*DEVKIT"):
        convert(tmp_path / "nowhere")


def test_an_empty_list_is_an_error(devkit):
    """With an empty val.txt, the images to evaluate on were in trainaug.txt."""
    (devkit / "VOC2012/ImageSets/Segmentation/val.txt").write_text("\n")
    with pytest.raises(UserError, match="val.txt: is empty"):
        convert(devkit)
    assert "trainaug" not in read_lists(devkit)


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
def archive(drawn_voc, server):
    """The drawn VOC as the archive that `fetch` takes."""
    name = "VOCdevkit/VOC2012"
    return f"{server[0]}/voc.tar", pack(server[1] / "voc.tar", drawn_voc, name), name


@pytest.fixture
def sbd_archive(drawn_voc, server):
    name = "benchmark_RELEASE/dataset"
    md5 = pack(server[1] / "benchmark.tgz", drawn_voc.parent / "VOCaug/dataset", name)
    return f"{server[0]}/benchmark.tgz", md5, name


@pytest.fixture
def target(tmp_path):
    """The VOCdevkit to download into; its parent exists."""
    (tmp_path / "data/VOCdevkit").mkdir(parents=True)
    return tmp_path / "data/VOCdevkit"


def fetch(archive, target):
    convert_voc_aug.fetch(archive, target / "VOC2012")


def fetch_error(archive, target):
    with pytest.raises(UserError) as caught:
        fetch(archive, target)
    assert not (target / "VOC2012").exists() and "\n" not in str(caught.value)
    return str(caught.value)


def assert_fetched(archive, target, drawn_voc):
    """It succeeds, and leaves the files of the drawn VOC and nothing else."""
    fetch(archive, target)
    ours, theirs = ({path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
                    for folder in (target / "VOC2012", drawn_voc))
    assert ours == theirs and os.listdir(target) == ["VOC2012"]


def test_download_fetches_unpacks_and_converts(archive, sbd_archive, server, target, monkeypatch, capsys):
    monkeypatch.setattr(convert_voc_aug, "VOC_ARCHIVE", archive)
    monkeypatch.setattr(convert_voc_aug, "SBD_ARCHIVE", sbd_archive)
    target.rmdir()
    for _ in range(2):  # the second finds both
        assert convert(target, "--download") == 0
    assert capsys.readouterr().out.count("is not downloaded") == 2
    assert server[2].asked == [0, 0]
    assert len(labels(target)) == len(mats(target)) > 0 and sorted(os.listdir(target)) == ["VOC2012", "VOCaug"]


def test_file_urls_work_and_start_over(archive, server, drawn_voc, target):
    file = server[1] / "voc.tar"
    (target / "voc.tar.part").write_bytes(file.read_bytes()[:1000])
    assert_fetched((file.as_uri(), *archive[1:]), target, drawn_voc)


def test_an_archive_that_the_user_placed_is_unpacked_or_named(archive, server, drawn_voc, target):
    (target / "voc.tar").write_bytes(b"another")
    assert f"{target / 'voc.tar'}: its MD5" in fetch_error(archive, target)
    assert (target / "voc.tar").exists()
    shutil.copy(server[1] / "voc.tar", target)
    assert_fetched(archive, target, drawn_voc)
    assert server[2].asked == []


@pytest.mark.parametrize("ignores_ranges", [False, True])
def test_a_broken_download_resumes_where_it_was(archive, server, drawn_voc, target, ignores_ranges):
    server[2].break_off = 1000
    assert "bytes before the end" in fetch_error(archive, target)
    assert (target / "voc.tar.part").stat().st_size == 1000
    server[2].break_off, server[2].ignores_ranges = None, ignores_ranges
    assert_fetched(archive, target, drawn_voc)
    assert server[2].asked == [0, 0 if ignores_ranges else 1000]


def test_a_broken_download_in_chunks_resumes(archive, server, drawn_voc, target):
    server[2].chunked, server[2].break_off = True, 1000
    assert "IncompleteRead" in fetch_error(archive, target)
    server[2].break_off = None
    assert_fetched(archive, target, drawn_voc)


def test_a_broken_download_without_a_length_fails_the_checksum(archive, server, drawn_voc, target):
    server[2].sends_length, server[2].break_off = False, 1000
    assert f"{target / 'voc.tar'}: its MD5" in fetch_error(archive, target)
    server[2].break_off = None
    (target / "voc.tar").unlink()  # as the message says
    assert_fetched(archive, target, drawn_voc)


@pytest.mark.parametrize("part, asked", [
    (lambda content: content, ["all"]),
    (lambda content: content + b"more", ["all + 4", 0]),
    (lambda content: b"\0" * 1000, [1000, 0]),
    (lambda content: b"\0" * len(content), ["all", 0])], ids=["whole", "longer", "other version", "other, whole"])
def test_a_part_that_is_whole_is_taken_and_a_wrong_one_replaced(archive, server, drawn_voc, target, part, asked):
    content = (server[1] / "voc.tar").read_bytes()
    (target / "voc.tar.part").write_bytes(part(content))
    assert_fetched(archive, target, drawn_voc)
    names = {"all": len(content), "all + 4": len(content) + 4}
    assert server[2].asked == [names.get(start, start) for start in asked]


def test_a_wrong_checksum_is_refused_and_nothing_is_unpacked(archive, server, target):
    with open(server[1] / "voc.tar", "ab") as file:
        file.write(b"more")
    assert "MD5" in fetch_error(archive, target)
    assert os.listdir(target) == ["voc.tar"]


def test_an_archive_that_would_write_outside_is_refused(archive, server, tmp_path, target):
    file = server[1] / "voc.tar"
    with tarfile.open(file, "a") as tar:
        tar.add(ROOT / "LICENSE", "../../../escaped")
    md5 = hashlib.md5(file.read_bytes()).hexdigest()
    assert "outside the destination" in fetch_error((archive[0], md5, archive[2]), target)
    assert not list(tmp_path.rglob("escaped")) and os.listdir(target) == ["voc.tar"]


def test_a_disk_that_is_full_is_named(archive, target, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tarfile.TarFile, "extractall", full)
    line = fetch_error(archive, target)
    assert str(target / "VOC2012") in line and "No space left" in line and os.listdir(target) == ["voc.tar"]
    (target / "voc.tar").unlink()
    monkeypatch.setattr(shutil, "copyfileobj", full)
    assert "No space left" in fetch_error(archive, target)


def test_no_server_and_no_file_are_one_line(archive, target):
    line = fetch_error((archive[0].replace("127.0.0.1", "127.0.0.1:1/"), *archive[1:]), target)
    assert "Connection refused" in line and str(target / "voc.tar") in line
    assert "404" in fetch_error((archive[0] + ".absent", *archive[1:]), target)


@pytest.mark.parametrize("stop, status, lines", [(signal.SIGTERM, -15, 0), (signal.SIGINT, 130, 1)])
def test_a_stopped_download_ends_without_a_traceback(archive, server, target, stop, status, lines):
    server[2].hangs = True
    process = start_python(("-c", f"import cli, convert_voc_aug\nconvert_voc_aug.VOC_ARCHIVE = {archive}\n"
                            "cli.run(convert_voc_aug.main, convert_voc_aug.parse_args)\n", target, target,
                            "--download"))
    wait_until(lambda: server[2].asked)
    process.send_signal(stop)
    errors = ended(process, status)
    assert len(errors) == lines, errors
