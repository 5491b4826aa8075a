"""The errors whose message is for the user: one line with the file, the value and the remedy.

`cli.run` prints them without a traceback. Every other exception is a bug and keeps its traceback.
"""


class UserError(ValueError):
    """Something the user can mend; the message is one line."""


class DataError(UserError):
    """An image, a label or a list that cannot be used."""


class WeightsError(UserError):
    """Weights that cannot be read, or do not fit the network."""


class DeviceError(UserError):
    """A device, a precision or a group of processes that cannot be had."""


class RunError(UserError):
    """A run that cannot start or continue."""


def first_line(error):
    """The first line of an exception's message, or its type where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
