"""A model with room for a system prompt in every layer."""

from __future__ import annotations

from collections.abc import Callable

from depthkv_edge.chat.template import build_opening
from depthkv_edge.errors import DepthKVError
from depthkv_edge.llama import Llama


def load_with_room(make: Callable[[int | None], Llama], system: str) -> Llama:
    """Load a model such that a system prompt fits its smallest layer.

    A calibrated budget may leave a layer fewer cells than the prompt has tokens. As sink tokens they count among what
    every layer has to hold, before the rest is shared out.

    Args:
        make: loads the model, with so many sink tokens; None for the model's own number.

    Raises:
        DepthKVError: the budget has no room for the prompt in every layer, or the model cannot be loaded.
    """
    llama = make(None)
    if not system:
        return llama
    n_system = build_opening(llama, "question", system).n_system
    try:
        llama.pin(0, n_system)
        llama.unpin()
        return llama
    except DepthKVError as error:
        llama.close()
        try:
            return make(n_system)
        except DepthKVError:
            raise DepthKVError(
                f"the system prompt ({n_system} tokens) does not fit every layer: {error}; or shorten the prompt"
            ) from None
