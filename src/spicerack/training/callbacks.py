"""What hangs on transformers' Trainer beside its loop: decay that follows a schedule, stopping on request, curves.

`Watch` is what the outside sees and says: sentences, a wish to stop, callbacks of one's own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.integration_utils import TensorBoardCallback

from spicerack.machine.memory import settle
from spicerack.training.schedule import Schedule, decay


@dataclass(frozen=True, slots=True)
class Watch:
    """Whoever looks on while a model trains, and may ask for an end; by default nobody.

    notify      is given sentences on the way, by each process
    stopping    is asked behind each step, on every rank, whether to save and to end there with KeyboardInterrupt
    callbacks   of transformers' Trainer, beside the run's own
    """

    notify: Callable[[str], None] = lambda _: None
    stopping: Callable[[], bool] = lambda: False
    callbacks: tuple[TrainerCallback, ...] = ()


class Decay(TrainerCallback):
    """Sets the weight decay of the groups that have one, in front of each step.

    highest: the decay while it lasts. schedule: says when it ends. torch's schedulers move rates only.
    """

    def __init__(self, highest: float, schedule: Schedule) -> None:
        self.highest, self.schedule = highest, schedule

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Called by the Trainer: the optimizer's groups are changed in place, those that decay."""
        for group in kwargs["optimizer"].param_groups:
            if group["decays"]:
                group["weight_decay"] = self.highest * decay(self.schedule, state.global_step, state.max_steps)


class Stopping(TrainerCallback):
    """Ends a run behind a step, with a checkpoint, when `asked` says so on any rank. stopped: whether it did.

    Behind each step memory that nobody uses is given back, too.
    """

    def __init__(self, asked: Callable[[], bool]) -> None:
        self.asked, self.stopped = asked, False

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Ranks are told together: one that stopped alone would leave the others waiting."""
        settle()
        asked = torch.tensor(float(self.asked()), device=args.device, dtype=torch.float32)
        if args.world_size > 1:
            distributed.all_reduce(asked, distributed.ReduceOp.MAX)
        if asked:
            self.stopped = control.should_save = control.should_training_stop = True


def curves(folder: Path) -> TrainerCallback:
    """Losses and rates of a run, as TensorBoard reads them, in the folder `logs` of the run's own folder.

    The package tensorboard is needed here and nowhere else; `run` says so before anything begins.
    """
    from torch.utils.tensorboard import SummaryWriter  # only where something is trained: an optional package

    return TensorBoardCallback(SummaryWriter(str(folder / "logs")))
