"""Makes something fail once, as the file $FAULT says when it is there.

`bug R`: reading an image raises a RuntimeError in rank R or a worker of it; `kill R`: it kills that process; `block R`:
it never returns. `stop R`: rank R gets a SIGTERM in the middle of an evaluation.
"""
import os
import runpy
import signal
import time
from pathlib import Path

SITE = runpy.run_path(str(Path(__file__).parents[1] / "site/sitecustomize.py"))


def fault_of_this_rank(*kinds):
    """The kind of fault that is due, which is then over; None without one."""
    file = Path(os.environ["FAULT"])
    kind, rank = file.read_text().split() if file.is_file() else ("", "")
    if kind not in kinds or rank != os.environ.get("RANK", "0"):
        return None
    file.unlink(missing_ok=True)
    return kind


def spoil_reading(voc):
    def decode_image(path, decode=voc.decode_image):
        kind = fault_of_this_rank("bug", "kill", "block")
        if kind is None:
            return decode(path)
        if kind == "bug":
            raise RuntimeError("a bug")
        if kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        return time.sleep(1000)

    voc.decode_image = decode_image


def spoil_evaluation(inference):
    def confusion_matrix(*args, count=inference.confusion_matrix):
        if fault_of_this_rank("stop"):
            os.kill(os.getpid(), signal.SIGTERM)
        return count(*args)

    inference.confusion_matrix = confusion_matrix


SITE["CHANGES"]["voc"].append(spoil_reading)
SITE["CHANGES"]["inference"].append(spoil_evaluation)
