"""convert_voc_aug.py: the lists, the labels, interruptions, damaged files, the download."""
import hashlib
import http.server
import shutil
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
from PIL import Image

from drawn_voc import SHARED, draw_data_set

CONVERT = ROOT / "convert_voc_aug.py"


@pytest.fixture
def devkit(tmp_path):
    """A drawn sample that is not converted yet."""
    return draw_data_set(tmp_path, counts={"train": 6, "val": 5, "sbd": 12})


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


def running(words):
    """Whether there is a process with these words in its command line."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if words in path.read_text():
                return True
        except OSError:  # it has just ended
            pass
    return False


def test_killed_at_any_moment_it_leaves_whole_labels_and_goes_on(tmp_path):
    devkit = draw_data_set(tmp_path, counts={"train": 6, "val": 5, "sbd": 150})
    command = [sys.executable, str(CONVERT), str(devkit), str(devkit / "VOCaug"), "--nproc", "2"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not labels(devkit) and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    process.wait()
    while running(str(devkit)):
        time.sleep(0.1)  # its workers end without it; were they to stay, this would never end
    for path in labels(devkit):
        Image.open(path).load()
    run(*command[1:])
    assert len(labels(devkit)) == 150 + 2 * SHARED
    assert sorted(path.suffix for path in labels(devkit)[0].parent.iterdir()) == [".png"] * (150 + 2 * SHARED)


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


def test_bad_folders_get_one_line(devkit, tmp_path):
    assert "VOC2012" in error_line(CONVERT, tmp_path / "nowhere", devkit / "VOCaug")
    assert str(tmp_path / "nosbd") in error_line(CONVERT, devkit, tmp_path / "nosbd")
    assert "--nproc" in error_line(CONVERT, devkit, devkit / "VOCaug", "--nproc", 0, status=2)


# ---- the download, from a server of our own

class RangeHandler(http.server.SimpleHTTPRequestHandler):
    """A file server that, like the real ones, answers a request for the rest of a file."""
    asked = []

    def do_GET(self):
        content = open(self.translate_path(self.path), "rb").read()
        wanted = self.headers.get("Range")
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted else 0
        self.asked.append(start)
        self.send_response(206 if wanted else 200)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        self.wfile.write(content[start:])

    def log_message(self, *args):
        pass


@pytest.fixture
def server(tmp_path):
    """Serves tmp_path/www. -> (its address, its folder)"""
    folder = tmp_path / "www"
    folder.mkdir()
    RangeHandler.asked = []
    http_server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), lambda *args: RangeHandler(*args, directory=str(folder)))
    threading.Thread(target=http_server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{http_server.server_port}", folder
    http_server.shutdown()


def archives(devkit, server):
    """Packs a devkit as the two archives of the real data. -> the statements that make the command fetch those"""
    address, folder = server
    statements = "import convert_voc_aug as c, sys\n"
    for constant, source, name, inner in (
            ("VOC_ARCHIVE", devkit / "VOC2012", "voc.tar", "VOCdevkit/VOC2012"),
            ("SBD_ARCHIVE", devkit / "VOCaug/dataset", "benchmark.tgz", "benchmark_RELEASE/dataset")):
        with tarfile.open(folder / name, "w:gz" if name.endswith("gz") else "w") as tar:
            tar.add(source, inner)
        md5 = hashlib.md5((folder / name).read_bytes()).hexdigest()
        statements += f"c.{constant} = ('{address}/{name}', '{md5}', '{inner}')\n"
    return statements


def download(statements, target, status=0):
    main = "args = c.parse_args()\nc.run(c.main, args, 'convert_voc_aug.py', c.ConvertError)\n"
    return run("-c", statements + main, target / "VOCdevkit", target / "VOCdevkit/VOCaug", "--download", status=status)


def test_download_fetches_unpacks_and_converts(devkit, server, tmp_path):
    download(archives(devkit, server), tmp_path / "data")
    assert len(labels(tmp_path / "data/VOCdevkit")) == 12 + 2 * SHARED
    left = sorted(path.name for path in (tmp_path / "data/VOCdevkit").iterdir())
    assert left == ["VOC2012", "VOCaug"] or left == [".VOC2012.unpacking", "VOC2012", "VOCaug"]


def test_a_broken_off_download_goes_on_where_it_was(devkit, server, tmp_path):
    statements = archives(devkit, server)
    content = (server[1] / "voc.tar").read_bytes()
    (tmp_path / "data/VOCdevkit").mkdir(parents=True)
    (tmp_path / "data/VOCdevkit/voc.tar.part").write_bytes(content[:1000])
    download(statements, tmp_path / "data")
    assert RangeHandler.asked == [1000, 0]
    assert len(labels(tmp_path / "data/VOCdevkit")) == 12 + 2 * SHARED


def test_a_wrong_checksum_is_refused_and_nothing_is_unpacked(devkit, server, tmp_path):
    statements = archives(devkit, server)
    with open(server[1] / "voc.tar", "ab") as file:
        file.write(b"more")
    assert "MD5" in download(statements, tmp_path / "data", status=1).stderr
    assert not list((tmp_path / "data/VOCdevkit").iterdir())


def test_an_archive_that_would_write_outside_is_refused(devkit, server, tmp_path):
    statements = archives(devkit, server)
    shutil.copy(server[1] / "voc.tar", tmp_path / "old.tar")
    with tarfile.open(server[1] / "voc.tar", "w") as tar:
        tar.add(devkit / "VOC2012", "VOCdevkit/VOC2012")
        tar.add(tmp_path / "old.tar", "../../../escaped")
    old, new = (hashlib.md5(path.read_bytes()).hexdigest() for path in (tmp_path / "old.tar", server[1] / "voc.tar"))
    errors = download(statements.replace(old, new), tmp_path / "data", status=1).stderr
    assert "does not unpack" in errors and "Traceback" not in errors
    assert not list(tmp_path.rglob("escaped"))


def test_no_server_is_one_line(devkit, server, tmp_path):
    statements = archives(devkit, server).replace("voc.tar", "absent/voc.tar")
    lines = download(statements.replace("127.0.0.1", "127.0.0.1:1/"), tmp_path / "data", status=1).stderr.splitlines()
    assert len(lines) == 1 and "cannot be downloaded" in lines[0]
