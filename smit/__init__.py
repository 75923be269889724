"""SMIT: self-distilled masked image transformer, after Jiang et al., MICCAI 2022.

Unofficial; not for clinical use. Read in the paper's order:

    [SMIT 2] encoder f                        swin.py
    [SMIT 2] masks                            masking.py
    [SMIT 2] heads h^Pred, h^Patch, h^[CLS]   heads.py
    [SMIT Eq. 1-4] MIP, MPD, ITD              losses.py
    [SMIT 2] teacher update, schedules        ema.py
    [SMIT Fig. 1] student and teacher         pretrain.py, then ../train_ssl.py
    [SMIT 2, 3] implementation details        settings.py
    [SMIT 3] voxels, crops, views             transforms.py, data/
    [SMIT 3] network, inference               segment.py, sliding.py, then ../finetune.py
    [SMIT 3] DSC, tables                      metrics.py, scoring.py, then ../evaluate.py

README.md beside this file shows the other rooms, and where this code differs from the paper's.
"""
import os

# OpenMP's threads spin while they wait, 300,000 turns each time. On shared cores they spin in place
# of those that have work, and a small step took 4.5 times as long. Without spinning, though, a step
# on idle cores takes a tenth longer. A few turns cost neither. This must be said before torch is
# imported. [ours]
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
