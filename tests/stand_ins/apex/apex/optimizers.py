"""apex.optimizers as far as it is used here."""
import torch


class NpuFusedSGD(torch.optim.SGD):
    """SGD that, as Ascend's, works only after amp.initialize, at O1 or O2."""

    def step(self, closure=None):
        if getattr(self, "opt_level", None) not in ("O1", "O2"):
            raise RuntimeError("apex.optimizers.NpuFusedSGD should be used with AMP, at O1 or O2")
        return super().step(closure)
