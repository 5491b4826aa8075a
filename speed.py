"""How fast a training is: images per second, as the log and the summary report them."""
import time

from device import synchronize
from flags import WARM_UP_ITERS


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
