"""What a run was and what came of it: run.json, result.json, and the summary that the Ascend port's scripts leave."""
import dataclasses
import datetime
import json
import math
import platform
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

from data import digest
from files import write_whole
from scores import MEANS

HERE = Path(__file__).parent


def start_record(recipe, settings, data, device, origin):
    """An entry of run.json: with what a run was started. All values are JSON's.

    recipe, settings: dataclasses; data: the TrainingData; device, origin: in words
    """
    return {"time": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
            "command": shlex.join([Path(sys.executable).name, *sys.argv]), "folder": str(Path.cwd()),
            "performance": settings.performance,
            "recipe": dataclasses.asdict(recipe), "settings": dataclasses.asdict(settings), "start": origin,
            "device": device, "versions": versions(), "code": code_version(),
            "data": {"classes": list(data.classes), **{
                name: {"list": part.split, "images": len(part), "sha256": digest(part.ids),
                       **({"ids": part.ids} if data.lists else {})}
                for name, part in (("train", data.train), ("val", data.val))}}}


def versions():
    """The versions that a result depends on: {name: version}."""
    found = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__,
             "platform": platform.platform()}
    if torch.cuda.is_available():
        found.update(cuda=torch.version.cuda, cudnn=torch.backends.cudnn.version(), driver=cuda_driver())
    if "torch_npu" in sys.modules:
        found["torch_npu"] = getattr(sys.modules["torch_npu"], "__version__", None)
    return found


def cuda_driver():
    return output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0] or None


def code_version():
    """The commit of this project and whether its files differ from it; None each where it is no git checkout."""
    commit = output_of("git", "-C", str(HERE), "rev-parse", "HEAD")
    return {"commit": commit or None,
            "clean": not output_of("git", "-C", str(HERE), "status", "--porcelain", "--untracked-files=no")
            if commit else None}


def output_of(*command):
    """What a command prints; empty if it fails or is not there."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def write_results(folder, recipe, progress, performance):
    """Writes result.json and the summary, both from metrics.jsonl. -> the content of result.json"""
    lines = folder.metrics()
    logged = [line for line in lines if "loss" in line]
    scored = [line for line in lines if "mIoU" in line]
    fps = [line["fps"] for line in logged if line["fps"] is not None]
    best = best_of(scored, progress)
    result = {"iters": progress.iteration, "loss": logged[-1]["loss"] if logged else None,
              "fps": max(fps, default=None), "fps_median": statistics.median(fps) if fps else None,
              **{name: scored[-1][name] for name in MEANS}, "best_mIoU": best["mIoU"], "best_iteration": best["iter"],
              "last": scored[-1], "best": best}
    write_whole(folder.path / "result.json", json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    cards = recipe.ranks
    write_summary(folder.path, recipe.backbone, recipe.batch_size, cards, "perf" if performance else "acc", {
        "ActualFPS": result["fps"],
        "TrainingTime": result["fps"] and 1000 * recipe.images_per_iteration / result["fps"],  # ms an iteration
        "mIoU": best["mIoU"] and best["mIoU"] / 100, "ActualLoss": result["loss"], "E2ETrainingTime": progress.seconds})
    return result


def best_of(scored, progress):
    """The evaluation of best.pth, or, where that was deleted, the best there was."""
    of_best = [line for line in scored if line["iter"] == progress.best_iteration]
    return of_best[-1] if of_best else max(scored, key=lambda line: -math.inf if line["mIoU"] is None else line["mIoU"])


def write_summary(folder, backbone, batch_size, cards, kind, values):
    """FCN_bs<batch>_<cards>p_<kind>.log: `Key = value` lines, as the Ascend port's scripts leave them."""
    case = f"FCN_bs{batch_size}_{cards}p_{kind}"
    lines = {"Network": "FCN", "Backbone": backbone, "RankSize": cards, "BatchSize": batch_size,
             "DeviceType": platform.machine(), "CaseName": case, **values}
    write_whole(folder / f"{case}.log", "".join(f"{key} = {value}\n" for key, value in lines.items()))
