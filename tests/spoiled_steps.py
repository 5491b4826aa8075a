"""Training steps that go wrong: a context.

A plan is "WHAT inf|nan STEPS", several of them with semicolons. WHAT: `gradient`: what goes back into the network;
`loss`: the network's output, and with it the loss; `input`: the images, and with them BN's statistics; `sum`: the loss
alone, whose gradients stay finite. STEPS, counted from 1, with commas; 3/1: step 3 in rank 1 alone; 3!: in step 3 a
SIGTERM comes.
"""
import contextlib
import os
import signal
from unittest import mock


@contextlib.contextmanager
def spoiled(plan):
    """A context for the trainings of this process, in which the steps of the plan go wrong. An empty one does nothing.
    The steps are counted from its beginning."""
    with contextlib.ExitStack() as stack:
        for part in filter(None, plan.split(";")):
            stack.enter_context(spoiled_part(*part.split()))
        yield


@contextlib.contextmanager
def spoiled_part(what, value, steps):
    import torch

    import fcn8s
    import train

    forward, losses_of = fcn8s.FCN8s.forward, train.losses_of
    value, steps, rank, done = float(value), steps.split(","), os.environ.get("RANK", "0"), 0

    def spoiled_forward(self, images, size=None):
        nonlocal done
        done += self.training
        if self.training and f"{done}!" in steps:
            os.kill(os.getpid(), signal.SIGTERM)
        if not self.training or not {str(done), f"{done}!", f"{done}/{rank}"} & {*steps}:
            return forward(self, images, size)
        outputs = forward(self, images * value if what == "input" else images, size)
        if what == "loss":
            return {name: output * value for name, output in outputs.items()}
        if what == "gradient":
            outputs["out"].register_hook(lambda gradient: torch.full_like(gradient, value))
        return outputs

    def spoiled_losses(outputs, labels, class_weights=None):
        return losses_of(outputs, labels, class_weights) + (value if what == "sum" and str(done) in steps else 0)

    with mock.patch.object(fcn8s.FCN8s, "forward", spoiled_forward), \
            mock.patch.object(train, "losses_of", spoiled_losses):
        yield
