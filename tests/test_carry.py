"""Prepared copies that travel to another machine: the same voxels, in parts."""
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from smit import data
from smit.study import carry

COARSE = ["--spacing", "12", "12", "12"]


def carried(source, out, *flags):
    carry.main(carry.parse_arguments(["--data", str(source), "--out", str(out), *COARSE, *flags]))
    return out / "dataset.json"


@pytest.mark.parametrize("key", ["training", "validation"])
def test_a_carried_case_is_prepared_to_the_voxels_of_its_scan(phantoms, key, tmp_path):
    copies = data.read_list(carried(phantoms, tmp_path / "carried"), key)
    scans = data.read_list(phantoms, key)
    assert len(copies) == len(scans) > 0
    settings = data.Preparation((12., 12., 12.))
    for scan, copy in zip(scans, copies):
        wanted = data.load_case(scan, settings, with_label=True)
        found = data.load_case(copy, settings, with_label=True)
        assert torch.equal(found["image"], wanted["image"])
        assert torch.equal(found["label"], wanted["label"])
        assert np.allclose(found["affine"], wanted["affine"], atol=1e-3)
        assert found["concerns"] == wanted["concerns"]


def test_a_carried_list_keeps_the_names_of_the_organs_and_its_folds(phantoms, tmp_path):
    content = json.loads(Path(phantoms).read_text())
    for place, case in enumerate(content["training"]):
        case["fold"] = place % 2
    source = Path(phantoms).with_name("with_folds.json")
    source.write_text(json.dumps(content))
    listed = carried(source, tmp_path / "carried")
    assert data.label_names(listed) == data.label_names(phantoms)
    folds = [case.get("fold") for case in data.read_list(listed)]
    assert folds == [case["fold"] for case in content["training"]]


def test_stored_values_with_1024_added_are_carried_as_hu_and_mr_is_refused(phantoms, tmp_path):
    scan = data.read_list(phantoms)[0]
    nifti = nib.load(scan["image"])
    raised = nib.Nifti1Image(nifti.get_fdata(dtype=np.float32) + 1024, nifti.affine)
    (tmp_path / "raised").mkdir()
    nib.save(raised, tmp_path / "raised/scan.nii.gz")
    listed = carried(tmp_path / "raised", tmp_path / "out", "--hu_offset=-1024")
    settings = data.Preparation((12., 12., 12.))
    found = data.load_case(data.read_list(listed)[0], settings)["image"].float()
    wanted = data.load_case(scan, settings)["image"].float()
    assert found.shape == wanted.shape and (found - wanted).abs().max() <= 1    # of 255 greys

    (tmp_path / "mr.json").write_text(json.dumps({"modality": {"0": "MRI"}, "training": []}))
    with pytest.raises(ValueError, match="says MR"):
        carried(tmp_path / "mr.json", tmp_path / "mr")


def test_parts_stay_below_their_limit_and_are_filled(phantoms, tmp_path):
    whole = carried(phantoms, tmp_path / "whole").parent
    sizes = [path.stat().st_size for path in whole.rglob("*.nii.gz")]
    limit = 2.5 * sum(sizes) / 5 / 2 ** 20               # of five cases two fit into a part
    parted = carried(phantoms, tmp_path / "parted", "--part_mib", str(limit)).parent
    parts = sorted(parted.glob("part*"))
    assert [len(list(part.glob("images/*"))) for part in parts] == [2, 2, 1]
    for part in parts:
        assert sum(path.stat().st_size for path in part.rglob("*.nii.gz")) <= limit * 2 ** 20


def test_a_folder_of_scans_is_carried_without_labels(phantoms, tmp_path):
    listed = carried(Path(phantoms).parent, tmp_path / "all")      # through its dataset.json
    images = tmp_path / "all/part1/images"
    listed = carried(images, tmp_path / "images")
    content = json.loads(listed.read_text())
    assert len(content["training"]) == 5 and content["labels"] == {}
    assert all(case["label"] is None for case in data.read_list(listed))


def test_a_case_above_the_limit_and_a_folder_in_use_are_refused(phantoms, tmp_path):
    with pytest.raises(ValueError, match="raise --part_mib"):
        carried(phantoms, tmp_path / "small", "--part_mib", ".0001")
    (tmp_path / "used").mkdir()
    (tmp_path / "used/notes.txt").touch()
    with pytest.raises(ValueError, match="another --out"):
        carried(phantoms, tmp_path / "used")
