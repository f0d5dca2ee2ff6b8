"""What users of the package see raised."""


class DepthKVError(ValueError):
    """A request that cannot be met: the message names the thing, its value and the way out, on one line."""


class Stopped(Exception):
    """The caller asked to stop before the work was done."""
