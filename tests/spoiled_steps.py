"""Runs a command some of whose training steps go wrong: python spoiled_steps.py WHAT inf|nan STEPS COMMAND...

WHAT: `gradient`: what goes back into the network; `loss`: the network's output, and with it the loss; `input`: the
images, and with them BN's statistics; `sum`: the loss alone, whose gradients stay finite. STEPS, counted from 1, with
commas; 3/1: step 3 in rank 1 alone; 3!: in step 3 a SIGTERM comes.
"""
import os
import runpy
import signal
import sys

import torch

import fcn8s
import trainer

what, value, steps, *command = sys.argv[1:]
value, steps, rank = float(value), steps.split(","), os.environ.get("RANK", "0")
forward = fcn8s.FCN8s.forward
done = 0


def spoiled(self, images, size=None):
    global done
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


def spoiled_sum(outputs, labels, class_weights=None, losses_of=trainer.losses_of):
    return losses_of(outputs, labels, class_weights) + (value if str(done) in steps else 0)


if what == "sum":
    trainer.losses_of = spoiled_sum
fcn8s.FCN8s.forward = spoiled
sys.argv = command
runpy.run_path(command[0], run_name="__main__")
