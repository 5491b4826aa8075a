"""What the docstrings promise: a schedule is one function, a backbone a class and a row, a data set one class."""
import pytest
import tiny_network
import torch
from conftest import ROOT, error_line, metrics, run, state, train
from torch import nn
from torch.utils.data import Dataset

import data
import fcn8s
import train as train_module
from fcn8s import FCN8s


def test_another_schedule_trains(monkeypatch, drawn_voc, tmp_path):
    monkeypatch.setattr(train_module, "draw", lambda *args: None)
    monkeypatch.setattr(train_module, "learning_rate", lambda iteration, args: args.lr / (1 + iteration))
    train(drawn_voc, tmp_path / "run")
    assert [line["lr"] for line in metrics(tmp_path / "run") if "lr" in line] == [0.01 / n for n in (1, 2, 3, 4)]


class Flat(nn.Module):
    """Step one to another backbone: a class with the channels and strides of three maps."""
    channels, strides = (8, 8, 16), (8, 8, 8)

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 9, stride=8, padding=4), nn.Conv2d(8, 16, 1)

    def forward(self, images):
        maps = self.first(images)
        return maps, maps, self.second(maps)


@pytest.mark.parametrize("strides, heads", (((8, 8, 8), ("ConvHead", "ConvHead")),
                                            ((8, 16, 32), ("SkipHead", "NoneType"))))
def test_the_strides_of_a_backbone_choose_its_heads(monkeypatch, strides, heads):
    class Network(Flat):
        def forward(self, images):
            sizes = ((strides[0], 8), (strides[1], 8), (strides[2], 16))
            return [images.new_zeros(len(images), channels, *(-(-side // stride) for side in images.shape[-2:]))
                    for stride, channels in sizes]

    Network.strides = strides
    monkeypatch.setitem(fcn8s.BACKBONES, "network", fcn8s.Backbone(Network))
    model = FCN8s(5, "network")
    assert (type(model.decode_head).__name__, type(model.auxiliary_head).__name__) == heads
    assert {name: tuple(output.shape) for name, output in model(torch.zeros(1, 3, 40, 50)).items()} == {
        name: (1, 5, 40, 50) for name in ("out", "aux")[:2 if model.auxiliary_head else 1]}


def test_another_backbone_trains_and_is_scored(monkeypatch, drawn_voc, tmp_path):
    """Step two is its row: every command knows it by that name, and takes its learning rate."""
    flags = ("--backbone", "flat", "--max_iters", 2)
    monkeypatch.setattr(train_module, "draw", lambda *args: None)
    assert "flat" in error_line(ROOT / "train.py", "--data_path", drawn_voc, *flags, status=2)
    monkeypatch.setitem(fcn8s.BACKBONES, "flat", fcn8s.Backbone(Flat, lr=3e-3))
    assert "flat" in run(ROOT / "train.py", "--help").stdout
    assert "--pretrained none" in error_line(  # it has no ImageNet weights
        ROOT / "train.py", "--data_path", drawn_voc, *flags, "--device", "cpu", "--work_dir", tmp_path / "run")
    output = train(drawn_voc, tmp_path / "run", *flags).stdout
    assert "\nnetwork: flat, " in output and metrics(tmp_path / "run")[0]["lr"] == pytest.approx(3e-3)
    best = tmp_path / "run/ckpt/best.pth"
    assert state(best)["meta"]["backbone"] == "flat"
    assert "flat from" in run(ROOT / "evaluate.py", best, "--data_path", drawn_voc, "--device", "cpu").stdout
    train(drawn_voc, tmp_path / "run", *flags, "--max_iters", 3, "--resume", "auto")
    run(ROOT / "predict.py", best, next((drawn_voc / "JPEGImages").iterdir()), "--device", "cpu", "--save_dir",
        tmp_path / "pictures")
    assert list((tmp_path / "pictures").rglob("*.png"))


def test_another_optimizer_and_a_frozen_layer_with_a_buffer_resume(monkeypatch, drawn_voc, tmp_path):
    class Frozen(tiny_network.Tiny):
        def __init__(self):
            super().__init__()
            self.register_buffer("count", torch.zeros(3))
            next(self.children()).requires_grad_(False)
    monkeypatch.setitem(fcn8s.BACKBONES, "tiny", fcn8s.Backbone(Frozen))
    monkeypatch.setattr(train_module, "fused_sgd", lambda parameters, *rest: torch.optim.AdamW(
        [parameter for parameter in parameters if parameter.requires_grad], 1e-3))
    train(drawn_voc, tmp_path / "whole", "--checkpoint_interval", 2)
    first = tmp_path / "whole/ckpt/iter_2.pth"
    train(drawn_voc, tmp_path / "part", "--resume", first)
    whole, part = (state(tmp_path / name / "ckpt/latest.pth") for name in ("whole", "part"))
    assert all(torch.equal(value, part["state_dict"][key]) for key, value in whole["state_dict"].items())
    assert not torch.equal(whole["state_dict"]["decode_head.score_fr.bias"], state(first)["state_dict"][
        "decode_head.score_fr.bias"])
    run(ROOT / "evaluate.py", tmp_path / "part/ckpt/latest.pth", "--data_path", drawn_voc, "--device", "cpu")


class Squares(Dataset):
    """Another data set: its class is all there is. Each image has a square of class 1."""

    def __init__(self, root, split, ids=None):
        self.split, self.ids = split, [f"{split} {number}" for number in range(3)]

    @staticmethod
    def has_lists(root):
        return True

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        image, label = torch.zeros(3, 40, 50, dtype=torch.uint8), torch.zeros(40, 50, dtype=torch.uint8)
        image[:, 5:30, 5 + index:30], label[5:30, 5 + index:30] = 200, 1
        return image, label

    def check(self, num_classes, count=None):
        return [(40, 50)] * min(count or 3, 3)

    def files(self):
        return []


def test_another_data_set_trains_and_is_scored(monkeypatch, tmp_path):
    monkeypatch.setattr(data, "DATA_SET", Squares)
    (tmp_path / "names.txt").write_text("ground\nsquare\n")
    output = train("nowhere", tmp_path / "run", "--classes", tmp_path / "names.txt").stdout
    assert "2 classes, 3 images of 'train', 3 of 'val'" in output and "could not be drawn" not in output
    scored = run(ROOT / "evaluate.py", tmp_path / "run/ckpt/latest.pth", "--data_path", "nowhere", "--device", "cpu",
                 "--save_dir", tmp_path / "pictures").stdout
    assert f"mIoU {[line['mIoU'] for line in metrics(tmp_path / 'run') if 'mIoU' in line][-1]:.2f}" in scored
    assert len(list((tmp_path / "pictures/compared").glob("val *.png"))) == 3
