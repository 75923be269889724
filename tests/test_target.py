"""A study's target: some organs, renumbered, and test cases by a rule."""
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from smit import data, runtime
from smit.study import target


def make(source, out, *flags):
    target.main(target.parse_arguments(["--data", str(source), "--out", str(out), *flags]))
    return out / "dataset.json"


def write_cases(folder, labels):
    """Write images of 4^3 voxels of 2 mm whose labels hold these numbers, and a text list."""
    lines = []
    for number, values in enumerate(labels):
        voxels = np.zeros((4, 4, 4), np.uint8)
        voxels.flat[:len(values)] = values
        for kind, content in (("image", np.full((4, 4, 4), 7, np.int16)), ("label", voxels)):
            nifti = nib.Nifti1Image(content, np.diag([-2., -2., 2., 1.]))
            path = folder / f"{kind}s/case{number}.nii.gz"
            path.parent.mkdir(parents=True, exist_ok=True)
            nib.save(nifti, path)
        lines.append(f"images/case{number}.nii.gz\tlabels/case{number}.nii.gz\n")
    (folder / "list.txt").write_text("".join(lines))
    return folder / "list.txt"


ORGANS = ["--organs", "5=left", "2=right side"]


def test_organs_are_kept_renumbered_and_named(tmp_path):
    source = write_cases(tmp_path, [[0, 5, 2, 2, 9], [2, 5, 1, 5, 0]])
    listed = make(source, tmp_path / "out", *ORGANS)
    assert data.label_names(listed) == {0: "background", 1: "left", 2: "right side"}
    first, second = data.read_list(listed)
    voxels = np.asarray(nib.load(first["label"]).dataobj)
    assert voxels.flat[:5].tolist() == [0, 1, 2, 2, 0] and not voxels.flat[5:].any()
    assert np.asarray(nib.load(second["label"]).dataobj).flat[:5].tolist() == [2, 1, 0, 1, 0]
    assert np.array_equal(nib.load(first["label"]).affine, nib.load(first["image"]).affine)
    data.check_cases([first, second], labels=True)
    assert first["image"] == str(tmp_path / "images/case0.nii.gz")       # images stay


def test_every_third_case_is_a_test_case_and_training_cases_have_all_organs(tmp_path):
    whole, partly = [5, 2], [5, 5]
    source = write_cases(tmp_path, [whole, partly, partly, whole, whole, whole, whole])
    listed = make(source, tmp_path / "out", *ORGANS, "--test_every", "3")
    names = {key: [Path(case["image"]).name[4] for case in data.read_list(listed, key)]
             for key in ("training", "validation")}
    assert names == {"training": list("0346"), "validation": list("25")}
    # to pre-train on there is the case that lacks an organ, too, and no test case
    pool = (tmp_path / "out/pool.txt").read_text().split()
    assert [Path(path).name[4] for path in pool] == list("01346")


def test_a_list_s_modality_and_folds_stay_and_a_comma_does_not_part_a_name(tmp_path):
    write_cases(tmp_path, [[5, 2], [5, 2]])
    cases = []
    for number in (0, 1):
        path = tmp_path / f"images/case{number}.nii.gz"
        path = path.rename(path.with_name(f"Doe, Jane {number}.nii.gz"))
        cases.append({"image": str(path), "label": f"labels/case{number}.nii.gz", "fold": number})
    source = tmp_path / "list.json"
    source.write_text(json.dumps({"modality": {"0": "MRI"}, "training": cases}))
    listed = make(source, tmp_path / "out", *ORGANS)
    assert data.list_modality(listed) == "mr"
    assert [case["fold"] for case in data.read_list(listed)] == [0, 1]
    pool = data.read_list(tmp_path / "out/pool.txt")
    assert [case["image"] for case in pool] == [case["image"] for case in cases]


def test_without_a_rule_the_splits_of_the_list_stay(phantoms, tmp_path):
    listed = make(phantoms, tmp_path / "out", "--organs", "1=first")
    for key in ("training", "validation"):
        wanted = [case["image"] for case in data.read_list(phantoms, key)]
        assert [case["image"] for case in data.read_list(listed, key)] == wanted


def test_sizes_are_those_of_cases_that_have_the_organ(tmp_path, capsys):
    source = write_cases(tmp_path, [[5, 5, 5, 5], [5, 5, 2, 2], [2, 2, 2, 2]])
    make(source, tmp_path / "out", *ORGANS, "--spacing", "1", "2", "2")      # voxels of 4 mm^3
    lines = [[cell.strip() for cell in line.split("|")[1:-1]]
             for line in capsys.readouterr().out.splitlines()]
    assert ["left", "6", "1"] in lines and ["right side", "6", "1"] in lines


@pytest.mark.parametrize("flags, words", [
    (["--organs", "5"], "NUMBER=NAME"),
    (["--organs", "0=background"], "1 to 255"),
    (["--organs", "300=spleen"], "1 to 255"),
    (["--organs", "5=left", "5=right"], "twice"),
    ([*ORGANS, "--test_every", "1"], "2 or more"),
])
def test_flags_that_name_no_target_are_refused(flags, words, capsys):
    with pytest.raises(SystemExit):
        target.parse_arguments(["--data", "list.txt", "--out", "out", *flags])
    assert words in capsys.readouterr().err


def test_a_number_that_no_label_has_and_a_folder_in_use_are_refused(tmp_path):
    source = write_cases(tmp_path, [[5, 2]])
    with pytest.raises(ValueError, match="no label has the number 7, liver"):
        make(source, tmp_path / "out", "--organs", "5=left", "7=liver")
    assert not (tmp_path / "out").exists()                       # the name is free for another try
    with pytest.raises(ValueError, match="another --out"):
        make(source, tmp_path, *ORGANS)


def test_a_target_without_test_cases_is_told(tmp_path, capsys):
    runtime.ranks.WARNED.discard("test cases")
    make(write_cases(tmp_path, [[5, 2]]), tmp_path / "out", *ORGANS)
    assert "no case is there to test on" in capsys.readouterr().err


def test_cases_without_labels_are_refused(tmp_path):
    write_cases(tmp_path, [[5, 2]])
    (tmp_path / "list.json").write_text(json.dumps({"training": ["images/case0.nii.gz"]}))
    with pytest.raises(ValueError, match="case0"):
        make(tmp_path / "list.json", tmp_path / "out", *ORGANS)
