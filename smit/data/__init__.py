"""From files to cases: lists, NIfTI, preparation, cache. Samples, organs: from their modules."""
from smit.data.cases import (  # noqa: F401
    cached, cached_with_concerns, check_case, check_cases, check_voxels, find_problems, load_case,
    onto_grid, preparation_of, prepare_ahead, readable_cases, same_grid)
from smit.data.concerns import Concern, count, note, tell, verdict  # noqa: F401
from smit.data.lists import (  # noqa: F401
    find_volumes, has_split, label_names, list_modality, read_json, read_list, read_lists)
from smit.data.nifti import (  # noqa: F401
    BadVolume, is_volume, pack, read_header, read_label, read_volume, skew_degrees, stem,
    write_label)
from smit.transforms import Preparation  # noqa: F401
