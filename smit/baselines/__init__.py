"""The paper's other columns: pretext tasks on a 3-D U-Net, and two more on the Swin encoder.

Reading order:

    task.py      what a task must offer to the loop
    unet.py      the U-Net of the five CNN columns [SMIT Table 2]; copies alone
    genesis.py   MG: restore a disturbed crop
    rubik.py     Cub++: restore a crop whose slabs were turned
    cpc.py       CPC: predict the codes of the patches above
    pcrl.py      PCRL: contrast two views, and restore both
    moco.py      contrastive losses on the Swin encoder [SMIT Fig. 4]
    rotation.py  pseudo labels on the Swin encoder [SMIT Fig. 4]
    contrast.py  InfoNCE, which three of them minimise; copies alone
    panel.py     the picture of a restoration
    __main__.py  the loop: python -m smit.baselines TASK
"""
