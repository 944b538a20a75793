"""The second phase of OneS: refine a gathered dense model with the MoE as its teacher (arXiv 2201.10890)."""
import argparse
import logging
from typing import Optional, Sequence

import torch
from timm.task import LogitDistillationTask
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from .foreign import foreign


def check_weights(args: argparse.Namespace) -> None:
    """Check the flags of a distillation before anything is built for it.

    Raises:
        ValueError: The weight of the label loss leaves the KL term less than nothing.
    """
    if args.distill_loss_weight is None and (args.task_loss_weight or 0.) > 1:
        raise ValueError(
            f'--task-loss-weight {args.task_loss_weight}: alone it can be at most 1, the KL term gets the rest; or '
            'give --distill-loss-weight too.')


def distillation_task(
        student: nn.Module,
        teacher: nn.Module,
        criterion: nn.Module,
        temperature: float = 4.0,
        distill_loss_weight: Optional[float] = None,
        task_loss_weight: Optional[float] = None,
        device: Optional[torch.device] = None,
) -> LogitDistillationTask:
    """timm's logit distillation: label loss plus `temperature^2` times the KL divergence to the teacher's softmax.

    `task(images, target)['loss']` is differentiable. Each model gets images normalised as it was trained.

    Args:
        student: Model to train; may be wrapped (DDP, compiled).
        teacher: Frozen model.
        criterion: Label loss.
        temperature: Of both softmaxes.
        distill_loss_weight: Weight of the KL term; 1 if neither weight is given.
        task_loss_weight: Weight of the label loss; alone, the KL term gets the rest to 1.
        device: Device of the student.
    """
    return LogitDistillationTask(
        student, teacher, criterion=criterion, temperature=temperature, distill_loss_weight=distill_loss_weight,
        task_loss_weight=task_loss_weight, device=device, verbose=False)


class TeacherView(nn.Module):
    """The teacher of a task, for images that are normalised as the student's."""

    def __init__(self, task: LogitDistillationTask) -> None:
        super().__init__()
        self.task = task

    def train(self, mode: bool = True) -> 'TeacherView':
        return self  # stays in eval(), and leaves the student's mode alone

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """`(B, C, H, W)` to logits `(B, classes)`."""
        task = self.task
        return task.teacher(task.teacher.normalize_input(images, task.student_mean, task.student_std))


@torch.no_grad()
def forward_flops(model: nn.Module, image_shape: Sequence[int]) -> int:
    """Floating-point operations of one image's forward pass (a multiply-add counts as two), as torch counts them.

    Args:
        model: A model; for a gated one the count is for as many experts as it uses.
        image_shape: `(C, H, W)`.

    Raises:
        ValueError: The model can't take such an image.
    """
    # where triton is missing it warns that it can't count triton's kernels, and ours have none
    logging.getLogger('torch.utils.flop_counter').setLevel(logging.ERROR)
    from torch.utils.flop_counter import FlopCounterMode

    image = torch.zeros(1, *image_shape, device=next(model.parameters()).device)
    training = {module: module.training for module in model.modules()}
    model.eval()
    # attention as plain matrix products: not every version of torch counts every fused kernel
    try:
        message = f'Images of {" x ".join(map(str, image_shape))} can\'t be taken'
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, foreign(
                message, AssertionError, RuntimeError):
            model(image)
    finally:
        for module, mode in training.items():
            module.training = mode
    return counter.get_total_flops()


def benefit_kept(student: float, dense: float, teacher: float) -> float:
    """The share of the MoE's benefit that the student keeps, `(student - dense) / (MoE - dense)` (OneS).

    Not a number if the MoE has no benefit.
    """
    return (student - dense) / (teacher - dense) if teacher > dense else float('nan')
