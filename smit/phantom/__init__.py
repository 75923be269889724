"""Make synthetic torsos with the 13 BTCV organs, for a first run and for the tests. [ours]

    shapes.py     signed distances of solids; numpy alone, works when copied
    anatomy.py    organs and bones of a patient, the image, the files
    __main__.py   the command: python -m smit.phantom OUT
"""
from smit.phantom.anatomy import ORGANS, default_data, make_patient, write_dataset

__all__ = ["ORGANS", "default_data", "make_patient", "write_dataset"]
