"""Windows split over the processes of `accelerate launch`."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

# that one process waits for another: windows do not split evenly, and one of them takes minutes to hours
_PATIENCE = timedelta(days=7)


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
        """The items of all processes, in the order of their ranks. The processes part: this is possible once."""
        if self.count == 1:
            return items
        from accelerate import PartialState
        from accelerate.utils import gather_object

        gathered = gather_object(items)
        PartialState().destroy_process_group()
        return gathered


def join_processes(device: str) -> Processes:
    """Meet the other processes, if a launcher started several.

    Args:
        device: that the user asked for; `cpu` keeps the processes off the accelerators.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Processes()
    from accelerate import PartialState

    state = PartialState(cpu=device == "cpu", timeout=_PATIENCE)
    return Processes(state.process_index, state.num_processes, str(state.device))
