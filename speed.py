"""How fast a training is, as the log and the summary report it, and how long it still takes."""
import datetime
import time

from tqdm import tqdm

from advice import CPU_FLAGS
from device import synchronize
from flags import WARM_UP_ITERS

LONG = datetime.timedelta(days=1)
TIMED = 3  # iterations, of which the first is left out, that tell how long a run will be


class Speed:
    """Images per second and waiting for data between two log lines, without the first of a run's `iterations` and
    without the pauses for evaluation and saving."""

    def __init__(self, images_per_iteration, device, iterations):
        self.images, self.device = images_per_iteration, device
        self.skip = min(WARM_UP_ITERS, iterations - 1)  # a shorter run has a speed, too, if a slow one
        self.start()

    def start(self):
        """Begins to count anew."""
        self.iterations, self.waited, self.since = 0, 0.0, time.perf_counter()

    def count(self, waited):
        """One iteration is done; `waited` seconds of it went by before its batch was there."""
        self.iterations += 1
        self.waited += waited
        if self.skip:
            self.skip -= 1
            synchronize(self.device)
            self.start()

    def read(self):
        """dict: fps (images/s), iter_time and data_time (seconds an iteration); None each if nothing was counted."""
        if not self.iterations:
            return {"fps": None, "iter_time": None, "data_time": None}
        synchronize(self.device)
        seconds = (time.perf_counter() - self.since) / self.iterations
        return {"fps": self.images / seconds, "iter_time": seconds, "data_time": self.waited / self.iterations}


class Pace:
    """Reports how long a run still takes: in a line after its first iteration, in a note if that is beyond a day, and
    on a terminal in a progress bar below the log lines."""

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
            self.folder.log(f"iter {self.first}/{self.last} took {seconds:.1f} s, later ones less; at most {left} left")
        elif left > LONG:
            shorter = CPU_FLAGS if self.device.type == "cpu" else "--max_iters, --crop_size, --backbone resnet50, --amp"
            self.folder.log(f"note: {left} are left; what shortens that: {shorter}")
