"""The confusion matrix of evaluations and trainings: its counts, its picture; what a log line has and lacks."""
import json
import re

import numpy as np
import pytest
import sklearn.metrics
from conftest import ROOT, error_line, metrics, run, train, untrained_checkpoint
from PIL import Image

from voc import CLASSES, VOC


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return untrained_checkpoint(tmp_path_factory.mktemp("net") / "net.pth", CLASSES)


def evaluate(checkpoint, data, *flags):
    return ROOT / "evaluate.py", checkpoint, "--data_path", data, "--device", "cpu", *flags


def test_the_counts_are_those_of_the_class_maps(checkpoint, drawn_voc, tmp_path):
    """Compared with scikit-learn's on the PNGs that the same evaluation writes, next to confusion.png."""
    run(*evaluate(checkpoint, drawn_voc, "--save_dir", tmp_path / "val", "--json", tmp_path / "scores.json"))
    text = (tmp_path / "scores.json").read_text()
    counts = np.array(json.loads(text)["confusion"])
    data, truths, guesses = VOC(drawn_voc, "val"), [], []
    for index, name in enumerate(data.ids):
        label = data[index][1].numpy()
        guess = np.asarray(Image.open(tmp_path / f"val/{name}.png"))
        truths.append(label[label != 255])
        guesses.append(guess[label != 255])
    expected = sklearn.metrics.confusion_matrix(np.concatenate(truths), np.concatenate(guesses), labels=range(21))
    assert np.array_equal(counts, expected) and counts.sum() > 1000
    assert len(re.findall(r"^ +\[( \d+,?){21} \],?$", text, re.M)) == 21  # a row on a line
    assert Image.open(tmp_path / "val/confusion.png").width > 300


def test_each_evaluation_of_a_training_counts_and_draws(drawn_voc, tmp_path, pictures):
    train(drawn_voc, tmp_path / "run", "--eval_interval", 2)
    scored = [line for line in metrics(tmp_path / "run") if "mIoU" in line]
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert [line["iter"] for line in scored] == [2, 4] and result["last"]["confusion"] == scored[-1]["confusion"]
    for line in (*scored, result["best"]):
        counts = np.array(line["confusion"])
        assert counts.shape == (21, 21)
        assert 100 * counts.trace() / counts.sum() == pytest.approx(line["aAcc"], rel=1e-12)
    assert Image.open(tmp_path / "run/confusion.png").width > 300


def test_two_pictures_of_one_name_are_refused(checkpoint, own_drawn_voc, tmp_path):
    """An image that is called confusion, whose class map the matrix would overwrite."""
    for folder, suffix in (("JPEGImages", "jpg"), ("SegmentationClass", "png")):
        path = own_drawn_voc / f"{folder}/drawn_val_0000.{suffix}"
        path.rename(path.with_stem("confusion"))
    (own_drawn_voc / "ImageSets/Segmentation/odd.txt").write_text("confusion\n")
    (own_drawn_voc / "ImageSets/Segmentation/twice.txt").write_text("drawn_val_0001\ndrawn_val_0001\n")
    run(*evaluate(checkpoint, own_drawn_voc, "--split", "twice", "--save_dir", tmp_path / "twice"))
    line = error_line(*evaluate(checkpoint, own_drawn_voc, "--split", "odd", "--save_dir", tmp_path / "val"))
    assert "would overwrite" in line and "confusion.png" in line and not list(tmp_path.rglob("val/*"))


@pytest.mark.parametrize("backbone, head", (("tiny", False), ("tiny_d8", True)))
def test_the_auxiliary_loss_is_that_of_networks_with_such_a_head(drawn_voc, tmp_path, backbone, head):
    output = train(drawn_voc, tmp_path / "run", "--backbone", backbone, "--max_iters", 1).stdout
    line = metrics(tmp_path / "run")[0]
    assert ("loss_aux" in line) == head and bool(re.search(r"\baux", output)) == head
    if not head:
        assert line["loss"] == line["loss_main"]


def test_a_log_line_has_its_speed_once_it_is_measured_and_never_a_dash(drawn_voc, tmp_path):
    """The first five iterations warm up; the next lines tell the speed and the time that is left."""
    output = train(drawn_voc, tmp_path / "run", "--max_iters", 7).stdout
    lines = [line for line in output.splitlines() if re.match(r"iter \d/7  lr", line)]
    assert len(lines) == 7 and not [line for line in lines if re.search(r"(?<!e)-", line)]
    assert ["images/s" in line and "left 0:00:" in line for line in lines] == [False] * 5 + [True] * 2


def test_tensorboard_has_the_hyperparameters_and_the_log_names_its_command(drawn_voc, tmp_path):
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
    from tensorboard.plugins.hparams import plugin_data_pb2
    output = train(drawn_voc, tmp_path / "run", "--max_iters", 1, "--tensorboard").stdout
    assert f"tensorboard --logdir {tmp_path / 'run'}" in output.split("to look at: ")[1]
    found = {}
    for file in (tmp_path / "run/tensorboard").iterdir():
        for event in EventFileLoader(str(file)).Load():
            for value in event.summary.value:
                if value.metadata.plugin_data.plugin_name == "hparams":
                    content = plugin_data_pb2.HParamsPluginData.FromString(value.metadata.plugin_data.content)
                    found.update(content.session_start_info.hparams)
    assert found["backbone"].string_value == "tiny" and found["crop_size"].string_value == "64"
    assert float(found["lr"].string_value) == 0.01
