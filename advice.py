"""What a run says about its length and its memory, and the flags that change them."""
import datetime
import time

from tqdm import tqdm

from device import synchronize

MANY_EPOCHS = 1000  # beyond what any data needs; the recipe of VOC has 15
CPU_CROP = 256  # pixels; with a larger one a CPU takes seconds for each image
CPU_FLAGS = "--backbone resnet50 --scale 256 128 --crop_size 128 --batch_size 4 --max_iters 400 --amp"
LONG = datetime.timedelta(days=1)
TIMED = 3  # iterations, of which the first is left out, that tell how long a run will be


def at_start(recipe, intervals, device, images, performance):
    """Notes on settings that do not fit a run of `images` training images: a list of texts."""
    notes = []
    late = [f"{what} (--{flag} {interval})" for what, flag, interval in (
        ("log line", "log_interval", intervals.log), ("evaluation", "eval_interval", intervals.evaluation),
        ("checkpoint", "checkpoint_interval", intervals.checkpoint)) if interval >= intervals.last]
    if late and not performance and intervals.last > 1:
        notes.append(f"no {', no '.join(late)} before the end at iteration {intervals.last}")
    epochs = intervals.last * recipe.images / images
    if epochs > MANY_EPOCHS:
        notes.append(f"{epochs:,.0f} epochs, each of {images} images, are more than so few images need; lower "
                     "--max_iters")
    if device.type == "cpu" and (recipe.backbone.endswith("_d8") or recipe.crop_size > CPU_CROP):
        notes.append(f"{recipe.backbone} at --crop_size {recipe.crop_size} is slow on a CPU; this ends in minutes: "
                     + CPU_FLAGS)
    return notes


def of_memory(recipe):
    """The remedy where memory ran out, in words."""
    if recipe.batch_size == 1:
        return "lower --crop_size, or take --backbone resnet50"
    size = max(size for size in range(1, recipe.batch_size) if recipe.batch_size % size == 0)
    return (f"--batch_size {size} --accumulate {recipe.batch_size // size * recipe.accumulate} needs less for the same "
            "step")


class Pace:
    """Tells how long a run still takes: in a line after its first iteration, in a note where that is beyond a day, and
    on a terminal by a progress bar under the log lines."""

    def __init__(self, folder, device, iteration, last):
        self.folder, self.device, self.first, self.last = folder, device, iteration + 1, last
        self.done, self.since = 0, time.perf_counter()
        self.bar = tqdm(total=last, initial=iteration, desc="training", unit="iter", leave=False,
                        disable=None if folder.writes else True)

    def count(self):
        """One iteration is done."""
        self.bar.update()
        self.done += 1
        if self.done not in (1, TIMED):
            return
        synchronize(self.device)
        seconds = (time.perf_counter() - self.since) / max(1, self.done - 1)
        self.since = time.perf_counter()
        left = datetime.timedelta(seconds=round((self.last - self.first + 1 - self.done) * seconds))
        if self.done == 1:
            self.folder.log(f"iter {self.first}/{self.last} took {seconds:.1f} s, the next take less; at most {left} "
                            "left")
        elif left > LONG:
            shorter = CPU_FLAGS if self.device.type == "cpu" else "--max_iters, --crop_size, --backbone resnet50, --amp"
            self.folder.log(f"note: {left} are left; what shortens that: {shorter}")
