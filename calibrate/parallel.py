"""Windows split over the processes of `accelerate launch`."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Processes:
    """This process among those of one calibration.

    Attributes:
        rank: index of this one; the first merges and writes.
        count: how many there are.
        device: the device that the launcher meant for this process, empty if it meant none.
    """

    rank: int = 0
    count: int = 1
    device: str = ""

    def gather(self, items: list[Any]) -> list[Any]:
        """The items of all processes, in the order of their ranks."""
        if self.count == 1:
            return items
        from accelerate.utils import gather_object

        return gather_object(items)


def join_processes(device: str) -> Processes:
    """Meet the other processes, if a launcher started several.

    Args:
        device: that the user asked for; `cpu` keeps the processes off the accelerators.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Processes()
    from accelerate import PartialState

    state = PartialState(cpu=device == "cpu")
    return Processes(state.process_index, state.num_processes, str(state.device))
