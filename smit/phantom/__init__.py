"""Synthetic torsos with the 13 BTCV organs, as CT or as MR: made here, with labels, for a first run and the tests. [ours]

    shapes.py     signed distances of solids, numpy alone
    anatomy.py    the organs and bones of a patient, the image, the files
    __main__.py   python -m smit.phantom OUT
"""
from smit.phantom.anatomy import ORGANS, make_patient, write_dataset

__all__ = ["ORGANS", "make_patient", "write_dataset"]
