"""Runs a command some of whose training steps go wrong: python spoiled_steps.py gradient|loss inf|nan STEPS COMMAND...

STEPS, counted from 1, with commas. `gradient`: what goes back into the network; `loss`: the network's output, and with
it the loss.
"""
import runpy
import sys

import torch

import fcn8s

what, value, steps, *command = sys.argv[1:]
value, steps = float(value), {int(step) for step in steps.split(",")}
forward = fcn8s.FCN8s.forward
done = 0


def spoiled(self, images, size=None):
    global done
    outputs = forward(self, images, size)
    done += self.training
    if self.training and done in steps:
        if what == "loss":
            return {name: output * value for name, output in outputs.items()}
        outputs["out"].register_hook(lambda gradient: torch.full_like(gradient, value))
    return outputs


fcn8s.FCN8s.forward = spoiled
sys.argv = command
runpy.run_path(command[0], run_name="__main__")
