"""Which records a step reads and how each is augmented: pure functions of the seed."""

from dali_lmdb.plan.augment import EvalTransform, TrainTransform, Transform
from dali_lmdb.plan.order import EpochOrder, StepPlan, epoch_order

__all__ = ["EpochOrder", "EvalTransform", "StepPlan", "TrainTransform", "Transform", "epoch_order"]
