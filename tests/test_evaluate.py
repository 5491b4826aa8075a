"""evaluate.py and inference.py: metrics held against scikit-learn, resizing against PyTorch's own, odd pictures."""
import json

import numpy as np
import pytest
import sklearn.metrics
import torch
import torch.nn.functional as F
from conftest import ROOT, error_line, run, train, untrained_checkpoint
from PIL import Image

import inference
from cli import UserError
from data import one_size_batches, val_batches
from device import Ranks
from fcn8s import FCN8s
from inference import Predictor, Protocol
from metrics import confusion_matrix, format_table, scores_of
from transforms import prepare
from voc import CLASSES, IGNORE, VOC, read_classes


def test_metrics_equal_scikit_learns_on_real_labels(real_voc):
    """Predictions made from the labels by shifting them and mixing in noise; classes absent from the labels, from the
    predictions, and from both, and void pixels, all occur."""
    rng = np.random.default_rng(0)
    data = VOC(real_voc, "val")
    confusion, truths, guesses = np.zeros((21, 21), np.int64), [], []
    for i in range(20):
        label = data[i][1].numpy()
        guess = np.where(np.roll(label, 9, 1) == IGNORE, 0, np.roll(label, 9, 1))
        guess = np.where(rng.random(label.shape) < 0.02, 2, guess).astype(np.uint8)
        guess[guess == 8] = 0  # a class that is never predicted
        confusion += confusion_matrix(*map(torch.from_numpy, (label, guess)), 21).numpy()
        truths.append(label[label != IGNORE])
        guesses.append(guess[label != IGNORE])
    truth, guess = np.concatenate(truths), np.concatenate(guesses)
    np.testing.assert_array_equal(confusion, sklearn.metrics.confusion_matrix(truth, guess, labels=range(21)))
    scores = scores_of(confusion)

    in_either = sorted(set(truth) | set(guess))
    iou = sklearn.metrics.jaccard_score(truth, guess, labels=in_either, average=None)
    recall = sklearn.metrics.recall_score(truth, guess, labels=sorted(set(truth)), average=None)
    assert 5 < len(in_either) < 21 and len(in_either) > len(recall)
    assert scores["aAcc"] == pytest.approx(100 * sklearn.metrics.accuracy_score(truth, guess), abs=1e-9)
    assert scores["mIoU"] == pytest.approx(100 * iou.mean(), abs=1e-9)
    assert scores["mAcc"] == pytest.approx(100 * recall.mean(), abs=1e-9)
    np.testing.assert_allclose(np.array(scores["IoU"])[in_either], 100 * iou, atol=1e-9)
    assert np.isnan(scores["IoU"]).sum() == 21 - len(in_either)


def test_a_perfect_prediction_scores_100_and_absent_classes_do_not_count():
    scores = scores_of(np.diag([5, 0, 7]))
    assert scores["aAcc"] == scores["mIoU"] == scores["mAcc"] == 100
    assert np.isnan(scores["IoU"][1]) and "-" in format_table(scores, ("a", "b", "c")).splitlines()[2]


@pytest.mark.parametrize("size", ((1, 1), (375, 500), (64, 48), (3, 500)))
def test_strips_give_what_resizing_at_once_gives(size, monkeypatch):
    torch.manual_seed(0)
    logits = torch.randn(21, 64, 48)
    whole = F.interpolate(logits[None], size, mode="bilinear", align_corners=False)[0].argmax(0)
    monkeypatch.setattr(inference, "STRIP_VALUES", 21 * 500 * 7)
    strips = inference.class_map([logits], size)
    assert strips.shape == size and strips.dtype == torch.uint8
    assert (strips == whole).float().mean() >= 0.999  # ties aside


def test_batches_hold_images_of_one_size_and_each_image_once():
    sizes = [(375, 500), (500, 375), (375, 500), (333, 500), (375, 500)]
    batches = one_size_batches(sizes, 2)
    assert sorted(i for batch in batches for i in batch) == [0, 1, 2, 3, 4]
    assert all(len({sizes[i] for i in batch}) == 1 and len(batch) <= 2 for batch in batches)


def test_large_images_of_their_own_size_run_fewer_together():
    assert [len(batch) for batch in one_size_batches([(10, 20)] * 5, 8, pixels=450)] == [2, 2, 1]
    assert [len(batch) for batch in one_size_batches([(10, 20)] * 3, 2, pixels=100)] == [1, 1, 1]


def test_batch_size_and_workers_do_not_change_the_confusion_matrix(drawn_voc):
    torch.manual_seed(0)
    model, data = FCN8s(21, "tiny"), VOC(drawn_voc, "train")
    torch.nn.init.normal_(model.decode_head.score_fr.weight)
    sizes = data.check(21)
    found, alone = [], Ranks(torch.device("cpu"))
    for batch_size, workers in ((1, 0), (3, 2)):
        protocol = Protocol((64, 32), batch_size=batch_size)
        found.append(inference.evaluate(model, val_batches(data, sizes, protocol, workers, alone), protocol, alone))
    one, three = found
    assert one.sum() == sum((data[i][1] != IGNORE).sum() for i in range(len(data)))
    assert np.abs(one - three).sum() <= 1e-3 * one.sum()
    assert model.training


@pytest.fixture(scope="module")
def checkpoint(drawn_voc, tmp_path_factory):
    work_dir = tmp_path_factory.mktemp("evaluated") / "run"
    train(drawn_voc, work_dir, "--max_iters", 2)
    return work_dir / "ckpt/latest.pth"


def evaluate(checkpoint, data, *flags, status=0):
    return run(ROOT / "evaluate.py", checkpoint, "--data_path", data, "--device", "cpu", *flags,
               status=status)


def test_table_and_json_agree(checkpoint, drawn_voc, tmp_path):
    output = evaluate(checkpoint, drawn_voc, "--json", tmp_path / "scores.json", "--max-images", 3)
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["images"] == 3 and len(scores["classes"]) == 21 and scores["images_per_second"] > 0
    assert f"aAcc {scores['aAcc']:.2f}  mIoU {scores['mIoU']:.2f}  mAcc {scores['mAcc']:.2f}" in output.stdout
    assert scores["classes"]["train"] == {"IoU": None, "Acc": None}
    present = [line.split() for line in output.stdout.splitlines() if line.startswith("background")]
    assert float(present[0][1]) == pytest.approx(scores["classes"]["background"]["IoU"], abs=0.005)
    assert output.stderr == ""  # a progress bar is for terminals


def test_a_folder_whose_classes_have_other_names_is_a_note(checkpoint, own_drawn_voc):
    """One line says what is used. There is none where --classes says it, or the names are the same."""
    file = own_drawn_voc / "class_names.txt"
    for names, flags, noted in ((("ground", "cat"), (), True), (CLASSES, (), False),
                                (CLASSES[::-1], ("--classes", file), False)):
        file.write_text("\n".join(names) + "\n")
        output = evaluate(checkpoint, own_drawn_voc, *flags).stdout
        notes = [line for line in output.splitlines() if "class_names.txt" in line]
        assert notes == noted * [f"note: {file}: has other names than the checkpoint, whose names are used: "
                                 "background, aeroplane, bicycle, bird, boat, and 16 more"]


@pytest.mark.parametrize("backbone", ("resnet50_d8", "resnet50"))
def test_padding_is_cropped_from_the_logits_before_they_are_enlarged(backbone):
    """For *_d8 done by hand: the score layer's output on the padded image, cropped at stride 8, resized."""
    torch.manual_seed(0)
    model = FCN8s(21, backbone).eval()
    images = torch.randint(0, 256, (1, 50, 75, 3), dtype=torch.uint8)
    got = inference.predict(model, images, Protocol(None, pad_to=96))[0]
    assert got.shape == (1, 21, 50, 75)
    padded = F.pad(prepare(images), (0, 21, 0, 46))
    with torch.no_grad():
        if backbone == "resnet50":
            expected = model(padded)["out"][..., :50, :75]
        else:
            scores = []
            hook = model.decode_head.conv_seg.register_forward_hook(lambda *args: scores.append(args[-1]))
            model(padded)
            hook.remove()
            expected = F.interpolate(scores[0][..., :7, :10], (50, 75), mode="bilinear", align_corners=False)
    torch.testing.assert_close(got, expected)


def test_windows_cover_the_image_and_their_logits_are_averaged():
    """A network that answers with its input: whatever the windows, the average is the input again."""
    class Echo(torch.nn.Module):
        num_classes = 3

        def forward(self, x):
            seen.append(tuple(x.shape[-2:]))
            return {"out": x}
    for size in ((100, 130), (64, 64), (40, 200), (97, 64)):
        seen, inputs = [], torch.randn(1, 3, *size)
        torch.testing.assert_close(inference.slide_windows(Echo(), inputs, 64, 40), inputs)
        windows = [max(int(np.ceil((side - 64) / 40)), 0) + 1 for side in size]
        assert len(seen) == windows[0] * windows[1]
        assert set(seen) == {(min(size[0], 64), min(size[1], 64))}


def test_the_references_ways_to_evaluate_run_as_commands(checkpoint, drawn_voc):
    plain = evaluate(checkpoint, drawn_voc).stdout
    for flags in (("--ratios", 0.5, 1.0, 1.5, "--flip"), ("--slide", 48, 32), ("--scale", 96, 96, "--pad_to", 96)):
        assert "mIoU" in evaluate(checkpoint, drawn_voc, *flags).stdout
    assert evaluate(checkpoint, drawn_voc, "--ratios", 1.0).stdout.splitlines()[:-1] == plain.splitlines()[:-1]
    for flags, words, status in ((("--slide", 32, 48), "CROP comes first", 2), (("--pad_to", 8), "do not fit", 1),
                                 (("--pad_to", 96, "--slide", 64, 32), "do not go together", 2),
                                 (("--ratios", 0), "above 0", 2), (("--ratios", 1e308), "at most 100", 2),
                                 (("--pad_to", 1_000_000), "at most 16384", 2),
                                 (("--at_once",), "--at_once", 1),
                                 (("--backbone", "vgg16"), "use --backbone tiny", 1)):
        line = evaluate(checkpoint, drawn_voc, *flags, status=status).stderr.strip()
        assert words in line and "\n" not in line, line


def test_pictures_one_pixel_wide_and_very_long_are_scored(checkpoint, own_drawn_voc):
    for image_id, size in (("thin", (1, 300)), ("flat", (3000, 2)), ("dot", (1, 1))):
        Image.new("RGB", size, (90, 20, 30)).save(own_drawn_voc / "JPEGImages" / f"{image_id}.jpg")
        Image.new("L", size, 3).save(own_drawn_voc / "SegmentationClass" / f"{image_id}.png")
    (own_drawn_voc / "ImageSets/Segmentation/odd.txt").write_text("thin\nflat\ndot\n")
    assert "bird" in evaluate(checkpoint, own_drawn_voc, "--split", "odd", "--scale", 64, 64).stdout


def test_where_no_pixel_is_labelled_the_json_has_null(checkpoint, own_drawn_voc, tmp_path):
    (own_drawn_voc / "ImageSets/Segmentation/void.txt").write_text("drawn_val_0001\ndrawn_val_0002\n")
    label = own_drawn_voc / "SegmentationClass/drawn_val_0001.png"
    Image.new("L", Image.open(label).size, IGNORE).save(label)
    done = evaluate(checkpoint, own_drawn_voc, "--split", "void", "--max_images", 1, "--json", tmp_path / "scores.json")
    scores = json.loads((tmp_path / "scores.json").read_text(), parse_constant=pytest.fail)
    assert [scores[name] for name in ("aAcc", "mAcc")] == [None, None]
    assert scores["classes"]["cat"]["Acc"] is None and "aAcc -" in done.stdout


def test_three_lines_of_python_label_a_photograph(tmp_path, drawn_voc):
    """A file, an array and a PIL image of the same photograph have the same class map."""
    checkpoint = untrained_checkpoint(tmp_path / "net.pth", CLASSES)
    path = drawn_voc / "JPEGImages/drawn_val_0000.jpg"
    predictor = Predictor(checkpoint, device="cpu")
    classes = predictor(path)
    with Image.open(path) as image:
        assert classes.dtype == np.uint8 and classes.shape == image.size[::-1] and len(np.unique(classes)) > 1
        for same in (str(path), image, np.array(image), image.convert("RGBA")):
            assert np.array_equal(predictor(same), classes)
    assert predictor.names == CLASSES and predictor.colours.shape == (256, 3)


def test_a_predictor_gives_the_picture_of_predict(tmp_path, drawn_voc):
    """The overlay that predict.py writes, before the JPEG's compression."""
    checkpoint = untrained_checkpoint(tmp_path / "net.pth", CLASSES)
    path = drawn_voc / "JPEGImages/drawn_val_0000.jpg"
    run(ROOT / "predict.py", checkpoint, path, "--save_dir", tmp_path, "--overlay", "--device", "cpu")
    with Image.open(tmp_path / "overlay/drawn_val_0000.jpg") as written:
        picture = Predictor(checkpoint, device="cpu").overlay(path)
        assert picture.mode == "RGB" and picture.size == written.size
        assert np.abs(np.asarray(picture).astype(int) - np.asarray(written)).mean() < 10


@pytest.mark.parametrize("flip", (False, True))
def test_probabilities_are_the_mean_softmax_whatever_the_strips(tmp_path, drawn_voc, monkeypatch, flip):
    """Compared with PyTorch's own resizing of the same logits; the likeliest class is that of the class map."""
    checkpoint = untrained_checkpoint(tmp_path / "net.pth", CLASSES)
    predictor = Predictor(checkpoint, device="cpu", protocol=Protocol(flip=flip))
    path = drawn_voc / "JPEGImages/drawn_val_0000.jpg"
    monkeypatch.setattr(inference, "STRIP_VALUES", 21 * 160 * 13)
    found, classes = predictor.probabilities(path), predictor(path)
    image = inference.fit_into(inference.read_image(path), (96, 64)).permute(1, 2, 0)[None]
    views = inference.predict(predictor.model, image, predictor.protocol)
    expected = sum(F.interpolate(view, classes.shape, mode="bilinear", align_corners=False)[0].softmax(0)
                   for view in views) / len(views)
    assert len(views) == 1 + flip and found.dtype == np.float16 and found.shape == (21, *classes.shape)
    np.testing.assert_allclose(found, expected, atol=1e-3)
    assert np.abs(found.astype(np.float32).sum(0) - 1).max() < 0.01
    likeliest = np.take_along_axis(found, classes[None].astype(int), 0)[0]
    assert np.array_equal(likeliest, found.max(0))  # also where float16 rounds two to one value


@pytest.mark.parametrize("use", (Predictor.__call__, Predictor.overlay, Predictor.probabilities))
def test_a_photograph_that_is_not_there_is_no_matter_of_lists(tmp_path, use):
    predictor = Predictor(untrained_checkpoint(tmp_path / "net.pth", CLASSES), device="cpu")
    with pytest.raises(UserError, match=r"^nope.jpg: there is no such image") as caught:
        use(predictor, "nope.jpg")
    assert "list" not in str(caught.value)


def test_no_label_or_photograph_is_ever_overwritten(checkpoint, own_drawn_voc, tmp_path):
    """Nor through links, nor where ids have sub-folders, nor by the JSON; ids that lead out of the folder are refused.
    """
    labels, lists = own_drawn_voc / "SegmentationClass", own_drawn_voc / "ImageSets/Segmentation"
    for folder, kind in ((labels, ".png"), (own_drawn_voc / "JPEGImages", ".jpg")):
        (folder / "sub").mkdir()
        (folder / f"drawn_val_0000{kind}").rename(folder / f"sub/drawn_val_0000{kind}")
    (lists / "sub.txt").write_text("sub/drawn_val_0000\n")
    (lists / "out.txt").write_text("../SegmentationClass/drawn_val_0001\n")
    (tmp_path / "link").symlink_to(labels)
    overlay = tmp_path / "photographs/overlay"
    overlay.parent.mkdir()
    (own_drawn_voc / "JPEGImages").rename(overlay)
    (own_drawn_voc / "JPEGImages").symlink_to(overlay)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for flags, words in ((("--split", "train", "--save_dir", labels), "would overwrite"),
                         (("--split", "train", "--save_dir", tmp_path / "link"), "would overwrite"),
                         (("--split", "sub", "--save_dir", labels), "would overwrite"),
                         (("--split", "sub", "--save_dir", overlay.parent, "--overlay"), "would overwrite"),
                         (("--split", "sub", "--json", labels / "sub/drawn_val_0000.png"), "would overwrite"),
                         (("--split", "out", "--save_dir", tmp_path / "pictures"), "lead out of the data folder")):
        line = evaluate(checkpoint, own_drawn_voc, *flags, status=1).stderr.strip()
        assert words in line and "\n" not in line, line
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    evaluate(checkpoint, own_drawn_voc, "--split", "sub", "--save_dir", tmp_path / "pictures")
    assert (tmp_path / "pictures/compared/sub/drawn_val_0000.png").is_file()


@pytest.mark.parametrize("flag", ("--split", "--data_path", "--save_dir", "--json", "--classes", "--addr"))
def test_an_empty_value_is_a_usage_error(checkpoint, drawn_voc, flag):
    """As an unset variable of a shell gives it."""
    line = error_line(ROOT / "evaluate.py", checkpoint, "--data_path", drawn_voc, flag, "", status=2)
    assert f"{flag}" in line and "takes a value, not ''" in line


def test_the_json_overwrites_no_list_and_no_class_names(checkpoint, own_drawn_voc, tmp_path):
    (tmp_path / "names.txt").write_text("\n".join(f"class {number}" for number in range(21)))
    command = (ROOT / "evaluate.py", checkpoint, "--data_path", own_drawn_voc, "--device", "cpu", "--classes",
               tmp_path / "names.txt", "--json")
    for path in (tmp_path / "names.txt", own_drawn_voc / "ImageSets/Segmentation/val.txt"):
        before = path.read_bytes()
        assert "would overwrite" in error_line(*command, path) and path.read_bytes() == before
    names = own_drawn_voc / "class_names.txt"
    names.write_text("\n".join(CLASSES))
    assert "would overwrite" in error_line(*command[:6], "--json", names) and read_classes(names) == CLASSES
