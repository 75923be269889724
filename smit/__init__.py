"""SMIT: self-distilled masked image transformer, after Jiang et al., MICCAI 2022. Unofficial; not for clinical use.

Read in the paper's order:

    [SMIT 2] encoder                              swin.py
    [SMIT 2] masking                              masking.py
    [SMIT 2] heads h^Pred, h^Patch, h^[CLS]       heads.py
    [SMIT Eq. 1-4] MIP, MPD, ITD                  losses.py
    [SMIT 2] teacher update, schedules            ema.py
    [SMIT 2, Fig. 1] student and teacher          pretrain.py, then ../train_ssl.py
    [SMIT 3] voxels, crops, views                 transforms.py, data/
    [SMIT 3] fine-tuning network, inference       segment.py, sliding.py, then ../finetune.py, ../evaluate.py
    [SMIT 3] DSC, tests, tables                   metrics.py, scoring.py
    [SMIT Fig. 2, 3, 5] panels, curves, page      figures/
    [SMIT Table 2, Fig. 3-5] the comparisons      study/
    data made here                                phantom/
    ranks, checkpoints, signals                   runtime/
    what --help shows                             flags.py
    speed and memory beside peers                 benchmark/
"""

# MIT License. Copyright (c) 2026 the developers of this implementation.
#
# Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated
# documentation files (the "Software"), to deal in the Software without restriction, including without
# limitation the rights to use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies of the
# Software, and to permit persons to whom the Software is furnished to do so, subject to the following
# conditions:
#
# The above copyright notice and this permission notice shall be included in all copies or substantial portions
# of the Software.
#
# THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED
# TO THE WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL
# THE AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF
# CONTRACT, TORT OR OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER
# DEALINGS IN THE SOFTWARE.
