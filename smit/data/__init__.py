"""From files to samples: lists, NIfTI, cases and their cache; samples.py and organs.py have doors of their own."""
from smit.data.cases import (  # noqa: F401
    cached, check_case, check_cases, check_voxels, find_problems, load_case)
from smit.data.lists import has_split, label_names, read_list, read_lists  # noqa: F401
from smit.data.nifti import BadVolume, read_label, read_volume, write_label  # noqa: F401
from smit.transforms import Preparation  # noqa: F401
