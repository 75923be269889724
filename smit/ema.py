"""The teacher's update and every schedule [SMIT 2]. Needs torch alone.

Schedules are pure functions of how far training has come.
"""
import math

import torch


@torch.no_grad()
def update_teacher(teacher, student, momentum):
    """Move the teacher towards the student [SMIT 2, "online teacher network update"].

    theta_t = momentum * theta_t + (1 - momentum) * theta_s. Parameters are matched
    by name; the student may have more heads than the teacher.
    """
    student_parameters = dict(student.named_parameters())
    old, new = [], []
    for name, parameter in teacher.named_parameters():
        old.append(parameter)
        new.append(student_parameters[name])
    torch._foreach_lerp_(old, new, 1 - momentum)


def cosine(t, start, end):
    """Go from `start` at t = 0 to exactly `end` at t = 1 along half a cosine.

    t is clamped to [0, 1].
    """
    t = min(max(t, 0.0), 1.0)
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * t))


def linear_warmup(t, start, end):
    """Go straight from `start` at t = 0 to `end` at t = 1, and stay [SMIT 2].

    The teacher's temperature follows this.
    """
    return start + (end - start) * min(max(t, 0.0), 1.0)


def warmup_cosine(step, warmup, total, base):
    """Rise from 0 to `base` in `warmup` steps, then fall to 0 at step `total` [SMIT 2].

    This is the learning rate. The rise is straight, the fall is half a cosine.
    """
    if step < warmup:
        return base * step / warmup
    return cosine((step - warmup) / max(1, total - warmup), base, 0)
