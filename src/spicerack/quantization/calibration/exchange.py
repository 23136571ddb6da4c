"""`Exchange`: solved layers of the present block, on their way from the rank that solved them to all ranks.

They go as files among the hidden states, which all ranks see; where there is only one rank nothing is written. A weight
may take minutes to solve and its codes are small, so that files cost nothing beside them, and tensors of every scheme
(codes, scales, zero points, scales of scales) are laid out by the same function that puts them into a block's file.
"""

from __future__ import annotations

import dataclasses

from spicerack.algorithms.solved import Solved
from spicerack.machine.devices import CPU
from spicerack.machine.ranks import Ranks
from spicerack.numerics.qtensor import QTensor, moved
from spicerack.quantization.calibration.states import States
from spicerack.quantization.calibration.targets import Target


class Exchange:
    """Takes in what this rank solved, and gives out what any rank did; the same for all of them behind `Ranks.wait`."""

    def __init__(self, ranks: Ranks, states: States) -> None:
        self.ranks, self._states = ranks, states
        self._here: dict[str, tuple[QTensor, Solved]] = {}

    def hand_over(self, target: Target, start: QTensor, solved: Solved) -> None:
        """To all ranks: how the target is rounded to nearest, on the CPU, and its solution, wherever that lies."""
        solved = dataclasses.replace(solved, q=moved(solved.q, CPU))
        self._here[target.path] = start, solved
        if self.ranks.count > 1:
            self._states.write_part(target.path, start, solved)

    def take(self, target: Target) -> tuple[QTensor, Solved]:
        """What some rank has handed over of the target, once; on the CPU."""
        return self._here.pop(target.path, None) or self._states.read_part(target.path, target.stored)
