"""smit.data.labelled: which labelled cases a fine-tuning takes, refuses, or tells of."""
import json
import os
import shutil

import numpy as np
import pytest
import torch

import finetune
import hostile
from smit import data, runtime
from smit.data import labelled


def write_cases(folder, training, validation, **content):
    """Write a dataset.json and its files, {image: label} by their names; return its path."""
    content |= {"training": entries(training), "validation": entries(validation)}
    (folder / "dataset.json").write_text(json.dumps(content))
    for number, (image, label) in enumerate({**training, **validation}.items()):
        (folder / image).write_bytes(hostile.plain(hostile.VOXELS + np.int16(number)))
        (folder / label).write_bytes(hostile.plain(hostile.LABEL))
    return folder / "dataset.json"


def entries(cases):
    return [{"image": image, "label": label} for image, label in cases.items()]


def arguments(path, *flags):
    flags = ["--data", path, "--cache", path.parent / "cache", "--spacing", 1.5, 2, 2.5, "--crop",
             24, "--depths", 1, 1, "--heads", 2, 2, "--workers", 0, *flags]
    return finetune.parse_arguments([str(flag) for flag in flags])


def find(path):
    args = arguments(path)
    return labelled.find_cases(args, args.data)


def prepare(args):
    """Do what a run does before its first step."""
    train, held_back, names = labelled.find_cases(args, args.data)
    labelled.prepare_cases(args, train, held_back, labelled.count_classes(args, names),
                           runtime.Ranks(0, 1, torch.device("cpu")))


# ----------------------------------------------------------------------- numbers that have no name
@pytest.mark.parametrize("start", [finetune.check, prepare])
def test_numbers_that_the_list_does_not_name_are_refused_by_check_and_run(start, tmp_path):
    path = write_cases(tmp_path, {"a.nii": "la.nii"}, {"b.nii": "lb.nii"},
                       labels={"0": "background", "1": "spleen", "5": "liver"})
    told = r"2 problems:\n.*la.nii: has the numbers \[3\], which the list does not name; name them"
    with pytest.raises(ValueError, match=told + r" .*\n.*lb.nii: has the numbers \[3\]"):
        start(arguments(path))

    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "labels": {"1": "spleen", "3": "liver"}}))
    start(arguments(path))


def two_lists(folder, first, second):
    """Write two lists without cases, with these names, {number: organ}."""
    paths = [folder / "first.json", folder / "second.json"]
    for path, names in zip(paths, (first, second)):
        path.write_text(json.dumps({"labels": names, "training": []}))
    return list(map(str, paths))


def test_lists_number_alike_whatever_the_case_of_names_and_with_or_without_background(tmp_path):
    paths = two_lists(tmp_path, {"0": "background", "1": "spleen"}, {"1": "Spleen"})
    assert labelled.organ_names(paths) == {0: "background", 1: "spleen"}
    paths = two_lists(tmp_path, {"1": "spleen", "2": "liver"}, {"1": "liver", "2": "spleen"})
    with pytest.raises(ValueError, match="number their labels differently"):
        labelled.organ_names(paths)


def test_a_background_that_is_not_0_is_refused(tmp_path):
    paths = two_lists(tmp_path, *2 * [{"1": "background", "2": "spleen"}])
    with pytest.raises(ValueError, match="label 1 is called background"):
        labelled.organ_names(paths)


# ------------------------------------------------------------------------------ files on both sides
def test_a_scan_held_back_that_is_a_copy_of_one_to_train_on_is_told(tmp_path, capsys):
    path = write_cases(tmp_path, {"a.nii": "la.nii", "b.nii": "lb.nii"}, {"c.nii": "lc.nii"})
    find(path)
    assert capsys.readouterr().err == ""

    shutil.copy(tmp_path / "b.nii", tmp_path / "c.nii")
    find(path)
    told = capsys.readouterr().err
    assert f"{tmp_path}/c.nii: is held back, and trained on under another name" in told
    assert f"({tmp_path}/b.nii)" in told


def test_scans_that_begin_and_end_alike_are_no_copies(tmp_path, capsys):
    path = write_cases(tmp_path, {"a.nii": "la.nii", "b.nii": "lb.nii"}, {"c.nii": "lc.nii"})
    for number, image in enumerate("abc"):
        voxels = np.zeros((40, 40, 99), np.int16)            # 155 kB before and behind the middle
        voxels[20, 20, 49] = number
        (tmp_path / f"{image}.nii").write_bytes(hostile.plain(voxels))
    find(path)
    assert "another name" not in capsys.readouterr().err

    shutil.copy(tmp_path / "a.nii", tmp_path / "c.nii")     # not of the last that looks like it
    find(path)
    assert f"({tmp_path}/a.nii)" in capsys.readouterr().err


def test_pairs_of_one_header_are_no_copies_and_a_pipe_is_not_waited_for(tmp_path, capsys):
    path = write_cases(tmp_path, {"a.hdr": "la.nii", "p.nii": "lp.nii"}, {"b.hdr": "lb.nii"})
    (tmp_path / "p.nii").unlink()
    os.mkfifo(tmp_path / "p.nii")
    for name, voxels in (("a", hostile.VOXELS), ("b", hostile.VOXELS + np.int16(1))):
        (tmp_path / f"{name}.hdr").write_bytes(hostile.pair_header())
        (tmp_path / f"{name}.img").write_bytes(voxels.tobytes(order="F"))
    find(path)
    assert "another name" not in capsys.readouterr().err
    shutil.copy(tmp_path / "a.img", tmp_path / "b.img")
    find(path)
    assert f"{tmp_path}/b.img: is held back, and trained on" in capsys.readouterr().err


def test_one_label_of_an_image_to_train_on_and_of_one_held_back_is_told(tmp_path, capsys):
    path = write_cases(tmp_path, {"a.nii": "l.nii"}, {"b.nii": "./l.nii"})
    find(path)
    told = capsys.readouterr().err
    assert "l.nii: is the label of a case held back and of one to train on" in told
    assert f"(of {tmp_path}/b.nii and {tmp_path}/a.nii)" in told


def test_one_label_of_images_in_two_lists_is_told(tmp_path, capsys):
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(f"{name}.nii\tl.nii\n")
    data.read_lists([tmp_path / "a.txt", tmp_path / "b.txt"])
    assert "labels are those of more than one image (l.nii)" in capsys.readouterr().err


# ---------------------------------------------------------------------------------- check and split
@pytest.mark.parametrize("flags, told", [
    (["--split", "smit21_9"], "smit21_9 holds back cases .29, .*; found of them: .."),
    (["--num_train", 50], "50 cases to train on were asked for, and 2 are there"),
    (["--fold", 9], "--fold 9 is not one of 0..4"),
    (["--depths", 1, 1, 1, 1, 1, "--heads", 2, 2, 2, 2, 2], "--crop .*; give more than 32"),
])
def test_check_refuses_a_split_or_crop_that_the_run_would_refuse(flags, told, tmp_path):
    path = write_cases(tmp_path, {"a1.nii": "la.nii", "a2.nii": "lb.nii"}, {"b.nii": "lc.nii"})
    with pytest.raises(ValueError, match=told):
        finetune.check(arguments(path, *flags))


def test_check_names_a_case_on_both_sides_beside_what_is_wrong_with_files(tmp_path):
    path = write_cases(tmp_path, {"a.nii": "la.nii"}, {"a.nii": "la.nii"})
    (tmp_path / "la.nii").write_bytes(hostile.plain(hostile.LABEL * np.uint8(9)))
    with pytest.raises(ValueError, match="a.nii: to train on, and held back as well, 1 of 1"
                                         r"(.|\n)*la.nii: label value 27"):
        finetune.check(arguments(path))
