"""torch_npu.optim as far as it is used here."""
import torch


class NpuFusedSGD(torch.optim.SGD):
    """SGD with torch_npu's conditions: it keeps all gradients as one tensor, so none may be made anew after a step."""

    def __init__(self, params, lr, momentum=0.0, dampening=0.0, weight_decay=0.0, nesterov=False):
        super().__init__(params, lr, momentum, dampening, weight_decay, nesterov)
        self.is_fused_optimizer = True
        self.gradients = None

    def zero_grad(self, set_to_none=False):
        if set_to_none:
            raise ValueError("set_to_none is not supported in fused optimizers")
        super().zero_grad(set_to_none=False)

    def step(self, closure=None):
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        if self.gradients and any(new is not old for new, old in zip(gradients, self.gradients, strict=True)):
            raise RuntimeError("a gradient was made anew, the combined one does not hold it")
        self.gradients = gradients
        return super().step(closure)
