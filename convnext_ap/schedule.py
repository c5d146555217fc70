"""Epochs: the three stages of training and the learning rate of each (paper sec. 3.1.1, 3.3.2, Figure 2).

    pcb      epochs 0 .. T-1        stripes; warm-up, then cosine (Figure 2)
    assign   next rpp_epochs        stripes replaced by the part classifier W; only W learns
    joint    last joint_epochs      everything learns

Without parts there is the first stage alone. Paper silent: it names RPP but no stages; they are PCB's induced
training, with the epochs of a public PCB + RPP implementation.
"""

import math
from typing import NamedTuple


class Plan(NamedTuple):
    """How many epochs each stage has, and the learning rates of the heads in them."""

    epochs: int
    rpp_epochs: int = 0
    joint_epochs: int = 0
    warmup: int = 5
    lr: float = 0.1
    trunk_factor: float = 0.1  # the trunk's rate over the heads'
    later_factor: float = 0.1  # the rate of the later stages over lr

    @property
    def total(self) -> int:
        return self.epochs + self.rpp_epochs + self.joint_epochs


def stage_of(epoch: int, plan: Plan) -> str:
    """pcb, assign or joint: what epoch (from 0) belongs to."""
    if epoch < plan.epochs:
        return "pcb"
    return "assign" if epoch < plan.epochs + plan.rpp_epochs else "joint"


def ends_stage(epoch: int, plan: Plan) -> bool:
    """Whether the epoch is the last of its stage."""
    return epoch + 1 == plan.total or stage_of(epoch + 1, plan) != stage_of(epoch, plan)


def warmup_cosine(epoch: int, epochs: int, warmup: int = 5, lr: float = 0.1) -> float:
    """Learning rate of an epoch, Figure 2: lr (e + 1) / warmup while warming up, then half a cosine down to 0.

    The paper prints lr_init 0.02 and lr_max 0.1 with 5 warm-up epochs, which is lr / 5 in the first.
    """
    if epoch < warmup:
        return lr * (epoch + 1) / warmup
    return 0.5 * lr * (1 + math.cos(math.pi * (epoch - warmup) / (epochs - warmup)))


def learning_rate(epoch: int, plan: Plan, group: str) -> float:
    """Learning rate of a parameter group (trunk | heads | assign) in an epoch; 0 where the stage freezes it."""
    stage = stage_of(epoch, plan)
    if stage == "pcb":
        rate = 0.0 if group == "assign" else warmup_cosine(epoch, plan.epochs, plan.warmup, plan.lr)
    elif stage == "assign":
        rate = plan.later_factor * plan.lr if group == "assign" else 0.0
    else:
        rate = plan.later_factor * plan.lr
    return rate * plan.trunk_factor if group == "trunk" else rate
