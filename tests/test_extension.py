"""What the docstrings promise: a schedule is one function, a backbone a class and a line, a data set a class."""
import pytest
from conftest import ROOT, metrics, run, state, train_flags

SCHEDULE = """
import trainer
trainer.learning_rate = lambda iteration, recipe: recipe.lr / (1 + iteration)
"""
BACKBONE = """
from torch import nn
import backbones

class Flat(nn.Module):
    channels, strides = (8, 8, 16), (8, 8, 8)

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 9, stride=8, padding=4), nn.Conv2d(8, 16, 1)

    def forward(self, images):
        maps = self.first(images)
        return maps, maps, self.second(maps)

backbones.BACKBONES["flat"] = backbones.Backbone("changed.Flat")
"""
DATA_SET = """
import numpy as np, torch
from torch.utils.data import Dataset
import data

class Squares(Dataset):
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

data.DATA_SET = Squares
"""


@pytest.fixture
def changed(tmp_path):
    """Runs a command of the project after a change to its modules."""
    def start(change, script, *flags):
        (tmp_path / "changed.py").write_text(change)
        (tmp_path / "start.py").write_text("import runpy, sys\nimport changed\nsys.argv.pop(0)\n"
                                           "runpy.run_path(sys.argv[0], run_name='__main__')\n")
        return run(tmp_path / "start.py", ROOT / script, *flags).stdout
    return start


def test_another_schedule_trains(changed, drawn_voc, tmp_path):
    changed(SCHEDULE, "train.py", *train_flags(drawn_voc, tmp_path / "run"))
    assert [line["lr"] for line in metrics(tmp_path / "run") if "lr" in line] == [0.01 / n for n in (1, 2, 3, 4)]


def test_another_backbone_trains_and_is_scored(changed, drawn_voc, tmp_path):
    changed(BACKBONE, "train.py", *train_flags(drawn_voc, tmp_path / "run"), "--backbone", "flat")
    best = tmp_path / "run/ckpt/best.pth"
    assert state(best)["meta"]["backbone"] == "flat"
    assert "flat from" in changed(BACKBONE, "evaluate.py", best, "--data_path", drawn_voc, "--device", "cpu")


def test_another_data_set_trains_and_is_scored(changed, tmp_path):
    (tmp_path / "names.txt").write_text("ground\nsquare\n")
    output = changed(DATA_SET, "train.py", *train_flags("nowhere", tmp_path / "run"), "--classes",
                     tmp_path / "names.txt")
    assert "2 classes, 3 images of 'train', 3 of 'val'" in output
    scored = changed(DATA_SET, "evaluate.py", tmp_path / "run/ckpt/latest.pth", "--data_path", "nowhere", "--device",
                     "cpu", "--save_dir", tmp_path / "pictures")
    assert f"mIoU {[line['mIoU'] for line in metrics(tmp_path / 'run') if 'mIoU' in line][-1]:.2f}" in scored
    assert len(list((tmp_path / "pictures/compared").glob("val *.png"))) == 3
