"""A stand-in for Ascend's apex, after the documentation of apex.amp; what that calls wrong use is an error here."""
from . import amp, optimizers  # noqa: F401
