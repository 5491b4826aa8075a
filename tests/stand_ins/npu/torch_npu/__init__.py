"""A stand-in for Ascend's torch_npu: importing it makes tests/software_npu.py the device `npu`."""
import software_npu

from . import optim  # noqa: F401

REGISTRATIONS = software_npu.register()
