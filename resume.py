"""Where a run goes on from: the checkpoint, whether it may, what has changed since, and its training state."""
import dataclasses
from pathlib import Path

from errors import RunError, WeightsError, first_line
from processes import restarted
from trainer import Progress
from weights import Checkpoint, load_exactly
from work_folder import DYING_TIME


def find_start(settings, folder):
    """(file, Checkpoint) to go on from, or None to start afresh. Raises RunError rather than overwrite another run."""
    folder.lock(DYING_TIME if restarted() else 0)
    measured = any(entry["performance"] for entry in folder.records())
    if measured and not restarted():
        if settings.performance:
            return None
        raise RunError(f"{folder.path}: holds a --performance run, which cannot be resumed; name another folder by "
                       "--work_dir")
    if settings.resume == "auto" or restarted():
        found = folder.newest()
        if found is not None or settings.resume in (None, "auto"):
            return found
    own = settings.resume is not None and Path(settings.resume).resolve().parent == folder.checkpoints.resolve()
    if folder.holds_run() and not (own or restarted()):
        resumable = folder.holds_checkpoints() and not settings.performance
        remedy = "go on with it by --resume auto, or " if resumable else ""
        raise RunError(f"{folder.path}: holds a run already; {remedy}name another folder by --work_dir")
    return settings.resume and (Path(settings.resume), Checkpoint.read(settings.resume))


def load_resumed(model, recipe, classes, path, checkpoint):
    """Loads the weights of a checkpoint to go on from. -> its origin and what is different now, in words

    Raises WeightsError or RunError if it cannot be the same run.
    """
    if checkpoint.training is None:
        raise WeightsError(f"{path}: holds no training state; start from its weights with --pretrained {path}")
    for key, theirs, ours in (("backbone", checkpoint.backbone, model.backbone_name),
                              ("num_classes", checkpoint.meta.get("num_classes"), model.num_classes)):
        if theirs != ours:
            raise WeightsError(f"{path}: has {key} {theirs}, this run {ours}; they must be the same to resume")
    if checkpoint.names() != tuple(classes):
        raise WeightsError(f"{path}: its classes have other names ({', '.join(checkpoint.names())}); give them by "
                           f"--classes, or start from its weights with --pretrained {path}")
    was = recipe_of(checkpoint.meta)
    if was.get("seed") != recipe.seed:
        raise RunError(f"{path}: is of a run with --seed {was.get('seed')}, not {recipe.seed}; a run keeps its seed")
    if (checkpoint.iteration() or 0) > recipe.max_iters:
        raise RunError(f"{path}: is of iteration {checkpoint.iteration()}, past --max_iters {recipe.max_iters}")
    model.use_form(checkpoint.form)
    load_exactly(model, checkpoint.state, path)
    return "; ".join([f"{path}, iteration {checkpoint.iteration()}", *changes(was, recipe, checkpoint)])


def recipe_of(meta):
    """The recipe in a checkpoint's meta: a dict of Recipe's fields. Older checkpoints hold a part of them."""
    older = {name: meta[name] for name in ("seed", "ranks", "batch_size", "backbone") if name in meta}
    return {**older, **meta.get("recipe", {})}


def changes(was, recipe, checkpoint):
    """What of the recipe is no longer as it was, each in words."""
    now = dataclasses.asdict(recipe)
    said = []
    images = ("ranks", "batch_size", "accumulate")
    before, after = ([values.get(name) or 1 for name in images] for values in (was, now))
    if before != after:
        samples = checkpoint.training["progress"].get("samples")
        shown = [" x ".join(str(n) for i, n in enumerate(part) if i < 2 or n > 1) for part in (before, after)]
        said.append(f"an iteration had {shown[0]} images and now has {shown[1]}, from sample {samples} on")
    for name, value in was.items():
        if name in now and name not in images and plain(value) != plain(now[name]):
            if name in ("train_list", "val_list"):
                said.append(f"the list '{now[name.replace('list', 'split')]}' holds other images")
            else:
                said.append(f"--{name} {value} -> {now[name]}" if name != "precision" else
                            f"precision {value} -> {now[name]}")
    return said


def plain(value):
    return list(value) if isinstance(value, tuple) else value


def resume(trainer, path, checkpoint):
    """Takes over a checkpoint's training state. Scores on another validation list are not compared with the old."""
    try:
        trainer.resume(checkpoint.training)
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:  # a state of another kind
        raise WeightsError(f"{path}: its training state does not fit ({first_line(error)}); start from its "
                           f"weights with --pretrained {path}") from None
    progress, was = trainer.progress, recipe_of(checkpoint.meta)
    if was.get("val_list", trainer.recipe.val_list) != trainer.recipe.val_list:
        progress.best, progress.best_iteration = Progress.best, Progress.best_iteration
    if trainer.folder.writes and progress.evaluated >= trainer.intervals.last and not any(
            "mIoU" in line for line in trainer.folder.metrics()):
        raise RunError(f"{path}: is of iteration {progress.iteration} of {trainer.intervals.last}, nothing is left "
                       "to train; raise --max_iters, or score it with evaluate.py")
