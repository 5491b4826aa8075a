"""weights.py: the files it recognises, what it refuses, and weights to start from."""
import argparse
import dataclasses
import hashlib
import http.server
import os
import pickle
import shlex
import shutil
import sys
import threading

import numpy
import pytest
import torch
import torchvision
from conftest import ROOT, error_line, run, train, train_flags

from amp import Precision, fused_sgd
from cli import UserError
from fcn8s import BACKBONES, VGG16, FCN8s, published
from voc import CLASSES
from weights import Checkpoint, load_exactly, load_start, resume


class NarrowVGG16(VGG16):
    """A few channels, as the real one's weights take half a gigabyte."""
    WIDTHS, channels = ((4, 2), (4, 2), (8, 3), (8, 3), (8, 3)), (8, 8, 16)

    def __init__(self):
        with torch.device("meta"):
            super().__init__()
        self.fc6, self.fc7 = torch.nn.Conv2d(8, 16, 7, padding=3), torch.nn.Conv2d(16, 16, 1)
        self.to_empty(device="cpu")
        for parameter in self.parameters():
            torch.nn.init.normal_(parameter, std=0.1)


@pytest.fixture
def narrow(monkeypatch):
    monkeypatch.setitem(BACKBONES, "vgg16", dataclasses.replace(BACKBONES["vgg16"], network=NarrowVGG16))


@pytest.fixture(scope="module")
def resnets():
    torch.manual_seed(0)
    return {name: FCN8s(21, name) for name in ("resnet50_d8", "resnet50")}


@pytest.fixture
def models(resnets, narrow):
    return {**resnets, "vgg16": FCN8s(21, "vgg16")}


def start(model, content, path, at_once=False):
    """Writes a file and starts a network from it, as train.py does. -> a description of its origin"""
    torch.save(content, path)
    return Checkpoint.read(path, model.backbone_name, at_once).start(model, CLASSES)


def small(model):
    """A state dict of the model's shapes, all 0; each tensor in the file is a single value."""
    return {key: torch.zeros((), dtype=value.dtype).expand(value.shape) for key, value in model.state_dict().items()}


def torchfcns(model):
    """A state dict for a vgg16 under torchfcn's names; all 0."""
    return {key.split(".", 1)[1]: value for key, value in small(model).items()}


# ---- weights to start from

def fake_imagenet(name):
    """Weights of a torchvision classifier, as they are published: random here."""
    torch.manual_seed(1)
    return {"vgg16": torchvision.models.vgg16, "resnet50": torchvision.models.resnet50}[name](num_classes=10)


def test_vggs_linear_layers_become_fc6_and_fc7():
    """On a 224x224 image, the middle of fc7's map and torchvision's second linear layer see the same."""
    peer, model = fake_imagenet("vgg16").eval(), FCN8s(21, "vgg16")
    load_exactly(model.backbone, model.backbone.from_imagenet(peer.state_dict()), "vgg16.pth")
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        expected = peer.classifier[:5](peer.features(images).flatten(1))  # fc6, ReLU, dropout, fc7, ReLU
        fc7 = model.eval().backbone(images)[-1]
    torch.testing.assert_close(fc7[0, :, 3, 3], expected[0], atol=1e-4, rtol=1e-4)


def test_a_classifier_of_another_kind_is_refused_by_its_keys(models, tmp_path):
    state = fake_imagenet("resnet50").state_dict()
    assert "ImageNet" in start(models["resnet50"], state, tmp_path / "resnet50.pth")
    for name, key in (("resnet50_d8", "stem.0.weight is missing"), ("vgg16", "conv1_1.bias is missing")):
        with pytest.raises(UserError, match=key):
            start(models[name], state, tmp_path / "resnet50.pth")


class Silent(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """torch.hub's folder is this test's own; a table entry that a test changes is put back."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))

    def change(name, **fields):
        monkeypatch.setitem(BACKBONES, name, dataclasses.replace(BACKBONES[name], **fields))
    return change


def save_with_hash(content, folder, name):
    """Writes a file whose name ends in the start of its hash, as published ones are named. -> its path"""
    torch.save(content, folder / "weights")
    digest = hashlib.sha256((folder / "weights").read_bytes()).hexdigest()[:8]
    return (folder / "weights").rename(folder / f"{name}-{digest}.pth")


@pytest.mark.parametrize("name", ("resnet50_d8", "resnet50"))
def test_imagenet_weights_are_downloaded_verified_and_loaded(models, name, tmp_path, hub):
    """The real download code, against a server of our own that has files of the published names."""
    content = (fake_imagenet(name).state_dict() if name == "resnet50" else
               {"state_dict": {key.removeprefix("backbone."): value for key, value in models[name].state_dict().items()
                               if key.startswith("backbone.")}})
    file = save_with_hash(content, tmp_path, name)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), lambda *args: Silent(*args, directory=str(tmp_path)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"

    def load(file_name):
        hub(name, imagenet=f"{address}/{file_name}")
        model = FCN8s(21, name)
        Checkpoint.read("imagenet", name).start(model, CLASSES)
        return model.backbone.layer3[1].conv2.weight

    assert torch.equal(load(file.name), content.get("state_dict", content)["layer3.1.conv2.weight"])
    wrong = f"{name}-00000000.pth"  # the hash in the name is not the file's
    os.rename(file, tmp_path / wrong)
    with pytest.raises(UserError, match="damaged"):
        load(wrong)
    server.shutdown()
    server.server_close()
    with pytest.raises(UserError, match="--pretrained none"):
        load(f"again-{file.name}")


def test_no_network_is_one_line_and_leaves_no_folder(drawn_voc, tmp_path):
    done = run(ROOT / "train.py", *train_flags(drawn_voc, tmp_path / "run"), "--backbone", "resnet50_d8",
               "--pretrained", "imagenet", status=1,
               env={"TORCH_HOME": str(tmp_path / "hub"), "https_proxy": "http://127.0.0.1:9"})
    line, = [line for line in done.stderr.splitlines() if not line.startswith("Downloading: ")]  # PyTorch 2.6 adds that
    assert "cannot be downloaded" in line and "--pretrained none" in line and not (tmp_path / "run").exists()


def test_a_published_network_without_a_connection_names_its_url_and_what_to_do(drawn_voc, tmp_path):
    done = run(ROOT / "predict.py", "resnet50_d8_voc", drawn_voc / "JPEGImages", "--save_dir", tmp_path / "run",
               status=1, env={"TORCH_HOME": str(tmp_path / "hub"), "https_proxy": "http://127.0.0.1:9"})
    line, = [line for line in done.stderr.splitlines() if not line.startswith("Downloading: ")]
    assert f"fetch {BACKBONES['resnet50_d8'].voc} elsewhere and give the file with --backbone resnet50_d8 (" in line


def test_a_published_network_of_another_backbone_is_refused_before_its_download(drawn_voc, tmp_path, monkeypatch):
    monkeypatch.setattr("weights.download", lambda *args: pytest.fail("it downloads"))
    line = error_line(ROOT / "train.py", *train_flags(drawn_voc, tmp_path / "run"), "--pretrained", "resnet50_d8_voc")
    assert line.endswith("resnet50_d8_voc: is of backbone resnet50_d8, not tiny; use --backbone resnet50_d8")


def test_the_urls_of_the_table_are_torchvisions():
    for name, published_weights in (("resnet50", torchvision.models.ResNet50_Weights.IMAGENET1K_V1),
                                    ("vgg16", torchvision.models.VGG16_Weights.IMAGENET1K_V1)):
        assert BACKBONES[name].imagenet == published_weights.url


# ---- files

def test_another_number_of_classes_gives_its_backbone_and_says_so(tmp_path):
    donor, model = FCN8s(19, "resnet50"), FCN8s(21, "resnet50")
    head = model.decode_head.score_fr.weight.clone()
    assert "19 classes" in start(model, {"state_dict": donor.state_dict(),
                                         "meta": {"backbone": "resnet50", "num_classes": 19}}, tmp_path / "19.pth")
    assert torch.equal(model.backbone.conv1.weight, donor.backbone.conv1.weight)
    assert torch.equal(model.decode_head.score_fr.weight, head)


def test_another_backbone_is_refused(models, tmp_path):
    with pytest.raises(UserError, match="--backbone vgg16"):
        start(models["resnet50"], {"state_dict": {"backbone.conv1_1.weight": torch.ones(1)},
                                   "meta": {"backbone": "vgg16", "num_classes": 21}}, tmp_path / "vgg.pth")


class Payload:
    def __reduce__(self):
        return os.system, ("touch pwned",)


def test_a_file_that_wants_to_run_code_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {}, "meta": Payload()}, "evil.pth")
    with pytest.raises(UserError, match="refused.*could run code") as caught:
        Checkpoint.read("evil.pth")
    assert not (tmp_path / "pwned").exists() and "\n" not in str(caught.value)


def made_plain(content, monkeypatch, tmp_path, name="a.pth", zipped=True):
    """Reads a file that is refused, and runs the command that the error names. -> the plain file's name"""
    monkeypatch.chdir(tmp_path)
    torch.save(content, name, _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match="refused") as caught:
        Checkpoint.read(name)
    python, flag, program, file = shlex.split(str(caught.value).split("make a plain one: ")[1])
    assert (python, flag, file) == ("python", "-c", name)
    monkeypatch.setattr(sys, "argv", [flag, file])
    exec(program, {})
    return f"{name}.plain.pth"


def test_the_command_that_an_error_names_makes_a_plain_file(models, tmp_path, monkeypatch):
    """mmengine's checkpoints hold objects of its own, beside the weights."""
    plain = made_plain({"state_dict": small(models["resnet50_d8"]), "message_hub": argparse.Namespace()},
                       monkeypatch, tmp_path)
    assert "mmsegmentation" in Checkpoint.read(plain, "resnet50_d8").kind


def test_the_plain_file_of_torchfcns_trainer_keeps_what_tells_its_form(models, tmp_path, monkeypatch):
    """Its checkpoints hold a NumPy number, and the class's name under `arch`."""
    plain = made_plain({"epoch": 1, "arch": "FCN8sAtOnce", "best_mean_iu": numpy.float64(0.5),
                        "model_state_dict": torchfcns(models["vgg16"])}, monkeypatch, tmp_path)
    assert Checkpoint.read(plain).form == "at_once"


@pytest.mark.parametrize("zipped", (True, False))
def test_the_plain_file_keeps_its_meta_and_any_name_and_format_will_do(zipped, tmp_path, monkeypatch):
    """PyTorch's older format is no ZIP file."""
    meta = {"CLASSES": ("a", "猫"), "PALETTE": numpy.zeros((2, 3), int), "best": numpy.float64(0.5),
            "config": argparse.Namespace()}
    weights = {"backbone.a": torch.ones(2)}
    plain = made_plain({"state_dict": weights, "meta": meta}, monkeypatch, tmp_path, "it's $HOME's `a`.pth", zipped)
    content = torch.load(plain, weights_only=True)
    assert torch.equal(content["state_dict"]["backbone.a"], weights["backbone.a"])
    assert content["meta"] == {"CLASSES": ["a", "猫"], "PALETTE": [[0, 0, 0]] * 2, "best": 0.5, "config": "Namespace()"}


def test_a_plain_pickle_is_not_said_to_be_made_plain(tmp_path):
    (tmp_path / "a.pth").write_bytes(pickle.dumps({"state_dict": {}, "meta": argparse.Namespace()}))
    with pytest.raises(UserError, match="damaged, or a plain pickle"):
        Checkpoint.read(tmp_path / "a.pth")


EDITS = (  # (part, key, value)
    ("meta", "lists", 5), ("meta", "lists", {"train": [1], "val": []}), ("meta", "images", 5),
    ("meta", "images", {"train": ["a"]}), ("meta", "args", {"pad_to": "x"}), ("meta", "classes", ["a"]),
    ("meta", "palette", [[0, 0, 300]] * 21), ("meta", "backbone", 7), ("meta", "scale", "large"),
    ("meta", "scale", (1, 2, 3)), ("meta", "form", "padded"), ("meta", "ranks", None), ("meta", "digests", {}),
    ("meta", "recipe", {}), ("progress", "iteration", "six"), ("progress", "evaluated", None),
    ("progress", "sums", [0.0]), ("optimizer", "state", {0: 5}), ("optimizer", "state", []),
    ("optimizer", "state", {1000: {"momentum_buffer": torch.ones(3)}}),
    ("optimizer", "state", {0: {"momentum_buffer": torch.ones(3)}}))


def test_a_checkpoint_of_ours_that_was_edited_is_one_line(drawn_voc, tmp_path):
    """And the one before it is used. What train.py writes is read, also after a step that was skipped."""
    train(drawn_voc, tmp_path / "run", "--max_iters", 2, "--checkpoint_interval", 1)
    latest = tmp_path / "run/ckpt/latest.pth"
    for part, key, value in EDITS:
        content = torch.load(latest, weights_only=True)
        content[part][key] = value
        torch.save(content, tmp_path / "edited.pth")
        with pytest.raises(UserError, match="edited.pth: (the file is damaged|is of backbone)"):
            Checkpoint.read(tmp_path / "edited.pth")
            pytest.fail(f"{part} {key} {value}")
    shutil.copy(tmp_path / "edited.pth", tmp_path / "momentum.pth")  # the last
    content = torch.load(latest, weights_only=True)
    content["optimizer"]["state"] = {0: {"momentum_buffer": None}}
    torch.save(content, tmp_path / "skipped.pth")
    Checkpoint.read(tmp_path / "skipped.pth")
    for path in (latest, tmp_path / "run/ckpt/iter_2.pth"):
        shutil.copy(tmp_path / "momentum.pth", path)
    output = train(drawn_voc, tmp_path / "run", "--max_iters", 2, "--resume", "auto").stdout
    assert "latest.pth: the file is damaged" in output and "iter_1.pth, iteration 1" in output


def test_momentum_that_a_checkpoint_lacks_is_zero():
    """Else a fused SGD whose first step is skipped goes on from memory that nobody set."""
    device, parameters = torch.device("cpu"), [torch.nn.Parameter(torch.ones(size)) for size in (2, 3, 4)]
    precision, progress = Precision(device), argparse.Namespace(iteration=0)
    optimizer = fused_sgd(parameters, device, precision, 0.1, 0.9, 0.0)
    state = {1: {"momentum_buffer": torch.full((3,), 5.0)}, 2: {"momentum_buffer": None}}
    start = argparse.Namespace(
        training={"precision": {}, "optimizer": {"state": state}, "progress": {"iteration": 7}}, scale=lambda: (2, 1),
        meta={"digests": {"val": "a"}, "args": {}}, source="a.pth")
    data = argparse.Namespace(digests=lambda: {"val": "a"}, images=None)
    flags = argparse.Namespace(val_scale=(2, 1), pad_to=None)
    assert resume(flags, optimizer, precision, data, start, progress) == progress.iteration == 7
    momentum = [optimizer.state[parameter]["momentum_buffer"].tolist() for parameter in parameters]
    assert momentum == [[0.0] * 2, [5.0] * 3, [0.0] * 4]


def test_rank_0_alone_reads_the_weights_to_start_from(tmp_path, monkeypatch):
    donor, model = FCN8s(21, "tiny"), FCN8s(21, "tiny")
    torch.save({"state_dict": donor.state_dict(), "meta": {"backbone": "tiny", "num_classes": 21}}, tmp_path / "a.pth")
    checkpoint = Checkpoint.read(tmp_path / "a.pth")
    monkeypatch.setattr("weights.read_file", lambda path: pytest.fail("rank 1 reads it"))
    ranks = argparse.Namespace(rank=1, share=lambda value: checkpoint)
    flags = argparse.Namespace(pretrained=str(tmp_path / "a.pth"), backbone="tiny", at_once=False)
    assert load_start(model, flags, CLASSES, ranks).endswith("a.pth: a checkpoint of train.py")
    assert torch.equal(model.backbone.stage32[0].weight, donor.backbone.stage32[0].weight)


def test_published_models_go_by_their_name(models, tmp_path, hub):
    """From a folder of ours that has a file of that kind: hash in the name, mmsegmentation's keys, its meta."""
    assert {name: url[-12:-4] for name, (_, url) in published().items()} == {
        "resnet50_d8_voc": "52dc5306", "resnet101_d8_voc": "0bb4e798"}
    file = save_with_hash({"meta": {"CLASSES": ("a",), "PALETTE": [[0, 0, 0]]},
                           "state_dict": small(models["resnet50_d8"])}, tmp_path, "fcn_r50-d8_voc")
    hub("resnet50_d8", voc=f"file://{file}")
    checkpoint = Checkpoint.read("resnet50_d8_voc")
    model = checkpoint.network()
    assert (model.backbone_name, model.num_classes) == ("resnet50_d8", 21)
    assert (checkpoint.source, checkpoint.kind) == ("resnet50_d8_voc", "a checkpoint of mmsegmentation")


def test_weights_of_the_original_release_switch_the_form(models, tmp_path):
    """torchfcn's names; at once is told by its trainer's `arch`, by the file's name, or by the flag."""
    model = FCN8s(21, "vgg16").eval()
    state = torchfcns(models["vgg16"])
    trained = {"model_state_dict": state, "arch": "FCN8sAtOnce"}
    for name, content, flag, form in (("fcn8s_from_caffe.pth", state, False, "padded"),
                                      ("fcn8s_from_caffe.pth", state, True, "at_once"),
                                      ("trained.pth", trained, False, "at_once"),
                                      ("fcn8s-atonce_from_caffe.pth", state, False, "at_once")):
        start(model, content, tmp_path / name, flag)
        assert model.form == form
        with torch.no_grad():
            assert model(torch.randn(1, 3, 20, 33))["out"].shape == (1, 21, 20, 33)
    with pytest.raises(UserError, match="--backbone vgg16"):
        Checkpoint.read(tmp_path / "trained.pth", "resnet50")


def test_fine_tuning_keeps_the_form_and_evaluate_uses_it(models, drawn_voc, tmp_path):
    torch.save(torchfcns(models["vgg16"]), tmp_path / "fcn8s_from_caffe.pth")
    own_size = run(ROOT / "evaluate.py", tmp_path / "fcn8s_from_caffe.pth", "--backbone", "vgg16", "--data_path",
                   drawn_voc, "--device", "cpu", "--max_images", 2).stdout
    assert "padded form" in own_size and "of their own size" in own_size
    run(ROOT / "train.py", *train_flags(drawn_voc, tmp_path / "run"), "--backbone", "vgg16", "--max_iters", 1,
        "--pretrained", tmp_path / "fcn8s_from_caffe.pth")
    checkpoint = torch.load(tmp_path / "run/ckpt/latest.pth", weights_only=True)
    assert checkpoint["meta"]["form"] == "padded"


def test_an_incomplete_network_is_not_scored(models, tmp_path):
    model = models["resnet50_d8"]
    state = small(model)
    torch.save({"state_dict": {key: value for key, value in state.items() if "conv_cat" not in key}},
               tmp_path / "a.pth")
    with pytest.raises(UserError, match="decode_head.conv_cat.conv.weight is missing"):
        Checkpoint.read(tmp_path / "a.pth", "resnet50_d8").network()
    with pytest.raises(UserError, match="add --backbone"):
        Checkpoint.read(tmp_path / "a.pth")
    backbone = {key: value for key, value in state.items() if key.startswith("backbone.")}
    assert "without heads" in start(model, {"state_dict": backbone}, tmp_path / "b.pth")
    no_auxiliary = {key: value for key, value in state.items() if not key.startswith("aux")}
    assert "auxiliary head starts afresh" in start(model, {"state_dict": no_auxiliary}, tmp_path / "c.pth")
    assert Checkpoint.read(tmp_path / "c.pth", "resnet50_d8").network().auxiliary_head is None


def test_half_a_head_is_an_error_that_names_the_key(models, tmp_path):
    model, vgg = models["resnet50_d8"], models["vgg16"]
    for spoiled, words in (({key: value for key, value in small(model).items()
                             if key != "decode_head.conv_seg.weight"}, "decode_head.conv_seg.weight is missing"),
                           ({**small(model), "decode_head.bogus": torch.ones(1)},
                            "decode_head.bogus is unexpected")):
        with pytest.raises(UserError, match=words):
            start(model, {"state_dict": spoiled}, tmp_path / "a.pth")
    with pytest.raises(UserError, match="which form"):
        start(vgg, {"state_dict": {"backbone.conv1_1.weight": torch.ones(1)}}, tmp_path / "a.pth")
    theirs = torchfcns(vgg)
    with pytest.raises(UserError, match="decode_head.score_fr.weight is missing"):
        start(vgg, {key: value for key, value in theirs.items() if key != "score_fr.weight"}, tmp_path / "a.pth")
    origin = start(vgg, {key: value for key, value in theirs.items() if key.startswith(("conv", "fc"))},
                   tmp_path / "a.pth")
    assert "without heads" in origin and vgg.form == "padded"


def test_a_truncated_or_foreign_file_is_named(tmp_path):
    torch.save(FCN8s(21, "tiny").state_dict(), tmp_path / "whole.pth")
    content = (tmp_path / "whole.pth").read_bytes()
    for name, part in (("half", content[:len(content) // 2]), ("start", content[:100]), ("empty", b""),
                       ("text", b"hello\n")):
        (tmp_path / name).write_bytes(part)
        with pytest.raises(UserError, match=name) as caught:
            Checkpoint.read(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_weights_without_a_trained_network_are_not_scored(drawn_voc, tmp_path):
    """Said before the list is read."""
    torch.save(fake_imagenet("resnet50").state_dict(), tmp_path / "imagenet.pth")
    line = error_line(ROOT / "evaluate.py", tmp_path / "imagenet.pth", "--backbone", "resnet50", "--data_path",
                      drawn_voc, "--device", "cpu")
    assert "holds no trained network" in line
