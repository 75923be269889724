"""The teacher's update and every schedule: pure functions of where training stands [SMIT 2]. Needs torch alone."""
import math

import torch


@torch.no_grad()
def update_teacher(teacher, student, momentum):
    """theta_t = momentum * theta_t + (1 - momentum) * theta_s [SMIT 2, "online teacher network update"].

    The teacher may lack heads that only the student uses; what it has, the student must have, by the same name.
    """
    theirs = dict(student.named_parameters())
    names, mine = zip(*teacher.named_parameters())
    torch._foreach_lerp_(list(mine), [theirs[name] for name in names], 1 - momentum)


def cosine(t, start, end):
    """From `start` at t = 0 to exactly `end` at t = 1 along half a cosine; t is clamped to [0, 1]."""
    t = min(max(t, 0.0), 1.0)
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * t))


def linear_warmup(t, start, end):
    """From `start` at t = 0 straight to `end` at t = 1, and `end` from then on: the teacher's temperature [SMIT 3]."""
    return start + (end - start) * min(max(t, 0.0), 1.0)


def warmup_cosine(step, warmup, total, base, end=0.0):
    """The learning rate: 0 to `base` over `warmup` steps, then half a cosine to `end` at step `total` [SMIT 3]."""
    if step < warmup:
        return base * step / warmup
    return cosine((step - warmup) / max(1, total - warmup), base, end)
