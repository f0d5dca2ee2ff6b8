"""The one exception that users of the package see."""


class DepthKVError(ValueError):
    """A request that cannot be met: the message names the thing, its value and the way out, on one line."""
