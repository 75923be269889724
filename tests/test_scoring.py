"""Scores that do not mislead: organs without a partner, numbers without names, skewed grids."""

import csv
import json
import math
import os
import sys
import unicodedata

import nibabel as nib
import numpy as np
import pytest
import torch

import evaluate
from smit import metrics, phantom, scoring
from smit.data import concerns, organs
from smit.figures import canvas, report

AFFINE = np.diag([2.0, 2, 2, 1])


@pytest.fixture(autouse=True)
def nothing_told():
    concerns.printed.clear()
    concerns.warned.clear()


def save(path, array, affine=AFFINE):
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array.astype(np.uint8), affine), path)


def name_numbers(folder, **labels):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "dataset.json").write_text(json.dumps({"labels": {"background": 0, **labels}}))


def blocks(*numbers):
    """A label with a block of 4 x 4 x 4 voxels for each number, side by side."""
    label = np.zeros((6 * len(numbers), 6, 6), np.uint8)
    for place, number in enumerate(numbers):
        label[6 * place + 1 : 6 * place + 5, 1:5, 1:5] = number
    return label


def score(tmp_path, *flags):
    """Score tmp_path/pred against tmp_path/label: (rows of cases.csv, results.json)."""
    evaluate.main(
        evaluate.parse_arguments(
            [
                "--predictions",
                str(tmp_path / "pred"),
                "--labels",
                str(tmp_path / "label"),
                "--out",
                str(tmp_path / "out"),
                "--device",
                "cpu",
                *map(str, flags),
            ]
        )
    )
    with open(tmp_path / "out/cases.csv", newline="") as file:
        return list(csv.DictReader(file)), json.loads((tmp_path / "out/results.json").read_text())


def test_an_organ_that_the_predictions_do_not_name_is_a_miss_and_told(tmp_path, capsys):
    save(tmp_path / "label/a.nii.gz", blocks(1, 2, 3))
    save(tmp_path / "pred/a.nii.gz", blocks(1, 0, 9))
    name_numbers(tmp_path / "label", liver=1, spleen=2, pancreas=3)
    name_numbers(tmp_path / "pred", liver=1, duodenum=9)
    rows, results = score(tmp_path)

    assert {row["organ"]: float(row["dice"]) for row in rows} == {
        "liver": 1,
        "spleen": 0,
        "pancreas": 0,
    }

    dice = results["scores"]["dice"]
    assert dice["AVG"]["mean"] == pytest.approx(1 / 3) and (
        dice["AVG"]["organs"],
        dice["AVG"]["of"],
    ) == (3, 3)
    assert results["unmatched"] == {
        "in_labels_only": ["spleen", "pancreas"],
        "in_predictions_only": ["duodenum"],
    }

    printed = capsys.readouterr().out
    assert (
        "missed wherever a label has it: spleen, pancreas" in printed
        and "not scored: duodenum" in printed
    )


def test_a_network_whose_numbers_have_gaps_is_scored_by_its_own_numbers(tmp_path):
    names = evaluate.class_names(
        {"labels": {0: "background", 6: "liver", 8: "aorta"}, "num_classes": 9}
    )
    save(tmp_path / "label.nii.gz", blocks(1, 2))
    save(tmp_path / "pred.nii.gz", np.where(blocks(6, 8) == 0, 3, blocks(6, 8)))  # 3 has no name
    case = {
        "label": tmp_path / "label.nii.gz",
        "prediction": tmp_path / "pred.nii.gz",
        "names": {1: "Liver", 2: "aorta"},
    }

    assert [(row["organ"], row["dice"]) for row in scoring.score_case(case, names, 2.0)] == [
        ("liver", 1),
        ("aorta", 1),
    ]
    assert scoring.unmatched([case], names) == {"in_labels_only": [], "in_predictions_only": []}


def test_a_mean_over_fewer_organs_than_the_labels_name_is_marked(tmp_path, capsys):
    save(tmp_path / "label/a.nii.gz", blocks(1, 0))
    save(tmp_path / "pred/a.nii.gz", blocks(1, 0))
    for side in ("label", "pred"):
        name_numbers(tmp_path / side, liver=1, spleen=2)
    score(tmp_path)
    table = (tmp_path / "out/table.md").read_text()
    assert "| DSC | 1.000 | - | 1.000 (1 of 2) |" in table and "nan" not in table


def test_numbers_without_names_are_not_named_by_the_other_side(tmp_path, capsys):
    save(tmp_path / "label/a.nii.gz", blocks(1, 2))
    save(tmp_path / "pred/a.nii.gz", blocks(2, 1))  # perfect, in numbers of its own
    name_numbers(tmp_path / "label", liver=1, spleen=2)
    with pytest.raises(ValueError, match="pred: no names for its numbers, while the other side's"):
        score(tmp_path)

    # now it is the user who says so
    rows, _ = score(tmp_path, "--names", tmp_path / "label/dataset.json")
    assert [float(row["dice"]) for row in rows] == [0, 0]
    (tmp_path / "label/dataset.json").unlink()
    assert [row["organ"] for row in score(tmp_path)[0]] == ["label 1", "label 2"]


@pytest.mark.parametrize(
    "known, spellings",
    [
        ("right kidney", "kidney_right right_kidney Kidney-R kidney_r RK rkid r_kidney"),
        ("left kidney", "kidney_left kidney_l LK"),
        ("right adrenal gland", "RAG adrenal_gland_right rad adrenal_r"),
        ("left adrenal gland", "LAG adrenal_gland_left lad"),
        ("gallbladder", "gall_bladder gall gallbladder GB"),
        ("aorta", "arota Aorta"),
        ("inferior vena cava", "postcava inferior_vena_cava IVC"),
        ("portal and splenic veins", "portal_vein_and_splenic_vein veins psv"),
        ("esophagus", "Oesophagus eso"),
    ],
)
def test_spellings_of_other_tools_meet(known, spellings):
    assert {organs.organ(spelling) for spelling in spellings.split()} == {known}


def test_every_alias_is_one_organs_alone_and_the_organs_are_in_btcvs_order():
    words = [organs.words_of(name) for name in organs.ORGANS]
    words += [organs.words_of(alias) for aliases in organs.ALIASES.values() for alias in aliases]
    owners = {
        word: {
            organ
            for organ in organs.ORGANS
            for name in (organ, *organs.ALIASES.get(organ, ()))
            if organs.words_of(name) == word
        }
        for word in words
    }

    assert (
        all(len(owner) == 1 for owner in owners.values()) and tuple(phantom.ORGANS) == organs.ORGANS
    )


def test_voxels_that_nobody_annotated_count_on_neither_side(tmp_path):
    truth, pred = blocks(1, 1, 0), blocks(1, 0, 1)  # the second block and the third are ignored
    truth[6:] = 5
    save(tmp_path / "label/a.nii.gz", truth)
    save(tmp_path / "pred/a.nii.gz", pred)
    name_numbers(tmp_path / "label", liver=1, ignore=5)
    name_numbers(tmp_path / "pred", liver=1)
    rows, results = score(tmp_path)

    assert [(row["organ"], float(row["dice"]), float(row["prediction_ml"])) for row in rows] == [
        ("liver", 1, 0.512)
    ]
    assert results["unmatched"] == {"in_labels_only": [], "in_predictions_only": []}


def test_a_false_positive_in_a_scan_with_an_empty_label_is_a_miss(tmp_path, capsys):
    save(tmp_path / "label/a.nii.gz", blocks(0, 0))
    save(tmp_path / "pred/a.nii.gz", blocks(1, 0))
    for side in ("label", "pred"):
        name_numbers(tmp_path / side, liver=1, spleen=2)
    rows, results = score(tmp_path)

    assert [(row["organ"], row["dice"], row["hd95_mm"]) for row in rows] == [
        ("liver", "0", "inf"),
        ("spleen", "nan", "nan"),
    ]
    assert results["scores"]["hd95_mm"]["liver"]["misses"] == 1
    assert "the label is empty" in capsys.readouterr().err


def ellipsoid(affine, shape, centre, radii):
    """The voxels whose centres, in mm, lie in an ellipsoid."""
    index = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)
    points = index @ affine[:3, :3].T + affine[:3, 3]
    return (((points - centre) / radii) ** 2).sum(-1) <= 1


def test_on_a_sheared_grid_volumes_and_distances_are_those_of_the_straight_one():
    straight = np.diag([2.0, 2, 3, 1])
    sheared = straight.copy()
    sheared[1, 2] = 3 * math.tan(math.radians(20))  # gantry tilt: each slice shifted along A
    sheared[1, 3] = -12
    radii = np.array([16.0, 14, 18])
    true_ml, scores = 4 / 3 * math.pi * radii.prod() / 1000, []
    for affine in (straight, sheared):
        one = ellipsoid(affine, (24, 26, 20), (24, 24, 28), radii)
        two = ellipsoid(affine, (24, 26, 20), (26, 29, 28), radii)  # moved by (2, 5, 0) mm
        ml = one.sum() * abs(np.linalg.det(affine[:3, :3])) / 1000
        assert ml == pytest.approx(true_ml, rel=0.02)
        distances = scoring.surface_distances(one, two, affine)
        scores.append((metrics.hausdorff_95(*distances), metrics.share_within(*distances, 4.0)))

    assert scores[0][0] == pytest.approx(scores[1][0], abs=0.5) and scores[0][1] == pytest.approx(
        scores[1][1], abs=0.06
    )


def test_distances_on_a_sheared_grid_are_exact():
    spatial = pytest.importorskip("scipy.spatial")
    affine = np.array([[2.0, 0.3, 0, 5], [0, 1.5, 1.1, 0], [0.2, 0, 3, -7], [0, 0, 0, 1]])
    rng = np.random.default_rng(0)
    masks = [rng.random((9, 8, 7)) < 0.2 for _ in "ab"]
    points = []
    for mask in masks:
        voxels = np.argwhere(metrics.surface(torch.from_numpy(mask)).numpy())
        points.append(voxels @ affine[:3, :3].T)
    found = scoring.surface_distances(*masks, affine)

    for distances, query, target in zip(found, points, points[::-1]):
        np.testing.assert_allclose(distances, spatial.cKDTree(target).query(query)[0], rtol=1e-6)
    empty = scoring.surface_distances(masks[0], masks[0] & False, affine)
    assert metrics.hausdorff_95(*empty) == math.inf


def test_volumes_in_the_table_are_of_the_parallelepiped(tmp_path):
    sheared = AFFINE.copy()
    sheared[1, 2] = 2  # 45 degrees; |det| stays 8 mm^3
    for side in ("label", "pred"):
        save(tmp_path / side / "a.nii.gz", blocks(1), sheared)
    assert float(score(tmp_path)[0][0]["label_ml"]) == pytest.approx(0.512)


def test_a_prediction_of_another_orientation_is_turned(tmp_path):
    label = blocks(1, 2)
    pred = nib.Nifti1Image(label, AFFINE)
    turned = pred.as_reoriented(nib.orientations.axcodes2ornt("LPS"))
    save(tmp_path / "label/a.nii.gz", label)
    save(tmp_path / "pred/a.nii.gz", np.asarray(turned.dataobj), turned.affine)
    assert [float(row["dice"]) for row in score(tmp_path)[0]] == [1, 1]

    save(tmp_path / "pred/a.nii.gz", label, np.diag([-2.0, 2, 2, 1]))
    with pytest.raises(ValueError, match="1 of 1 case failed"):
        score(tmp_path)


def test_cases_in_folders_of_their_own_are_paired_by_folder(tmp_path):
    for n in (1, 2):
        save(tmp_path / f"label/case_{n}/segmentation.nii.gz", blocks(n, 0))
        save(tmp_path / f"pred/case_{n}.nii.gz", blocks(n, 0))
    rows, _ = score(tmp_path)
    assert {row["case"] for row in rows} == {"case_1", "case_2"}
    assert sorted(float(row["dice"]) for row in rows if row["dice"] != "nan") == [1, 1]


def test_a_prediction_is_never_scored_against_the_label_of_another_folder(tmp_path, capsys):
    save(tmp_path / "label/s0/seg.nii.gz", blocks(1, 0))
    save(tmp_path / "pred/s1/seg.nii.gz", blocks(1, 0))
    with pytest.raises(ValueError, match="1 of 1 case failed"):
        score(tmp_path)
    told = capsys.readouterr().out
    assert "s0/seg.nii.gz: has no prediction in" in told
    assert "pred/s1/seg.nii.gz has its name, but lies in another folder" in told

    # two patients were each seen twice, and the folders are known on both sides
    for n in (0, 1):
        save(tmp_path / f"visits/label/s{n}/visit{n}.nii.gz", blocks(1, 0))
        save(tmp_path / f"visits/pred/s{n}/visit{1 - n}.nii.gz", blocks(1, 0))
    with pytest.raises(ValueError, match="2 of 2 cases failed"):
        score(tmp_path / "visits")


@pytest.mark.parametrize("label, pred", [
    ("s0/seg s1/seg", "s1/seg"),
    ("s0/seg s1/seg", "s1"),
    ("s0/seg s1/seg", "s1/pred"),
    ("s0 s1", "s1/pred"),
    ("s0/day1 s1/day2", "s1/day1 s1/day2"),
])
def test_a_lone_prediction_is_paired_as_it_would_be_among_others(label, pred, tmp_path):
    for name in label.split():
        save(tmp_path / f"label/{name}.nii.gz", blocks(2, 1 if name.startswith("s1") else 2))
    for name in pred.split():
        save(tmp_path / f"pred/{name}.nii.gz", blocks(2, 1))
    with pytest.raises(ValueError, match="1 of 2 cases failed"):           # s0 has no prediction
        score(tmp_path)
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert results["n"] == 1 and results["scores"]["dice"]["AVG"]["mean"] == 1


def test_files_that_their_names_alone_pair_are_told(tmp_path, capsys):
    for name, label_folder, pred_folder in (("a", "site1", "fold_0"), ("b", "site2", "fold_1")):
        save(tmp_path / f"label/{label_folder}/{name}.nii.gz", blocks(1, 0))
        save(tmp_path / f"pred/{pred_folder}/{name}.nii.gz", blocks(1, 0))
    assert len(score(tmp_path)[0]) == 2
    told = capsys.readouterr().err
    assert "2 files paired by name alone, in unlike folders: " in told
    assert "pred/fold_0/a.nii.gz and " in told and "label/site1/a.nii.gz" in told


def list_of(folder, **label_of):
    """A list in folder/label, whose images are named otherwise than their labels."""
    cases = [{"image": f"{image}.nii.gz", "label": f"{label}.nii.gz"}
             for image, label in label_of.items()]
    content = {"labels": {"background": 0, "liver": 1}, "validation": cases}
    (folder / "label/dataset.json").write_text(json.dumps(content))
    return ["--labels", folder / "label/dataset.json", "--names", folder / "label/dataset.json"]


@pytest.mark.parametrize("names", [("scan0", "scan1"), ("scan0_seg", "scan1_seg")])
def test_predictions_are_named_as_the_images_of_a_list_or_as_its_labels(names, tmp_path):
    for n, name in enumerate(names):
        save(tmp_path / f"label/scan{n}_seg.nii.gz", blocks(n, 1))
        save(tmp_path / f"pred/{name}.nii.gz", blocks(n, 1))
    rows, results = score(tmp_path, *list_of(tmp_path, scan0="scan0_seg", scan1="scan1_seg"))
    assert results["cases"] == ["scan0", "scan1"] and [row["dice"] for row in rows] == ["1", "1"]

    save(tmp_path / "pred/scan0.nii.gz", blocks(0, 1))
    save(tmp_path / "pred/scan0_seg.nii.gz", blocks(0, 1))
    with pytest.raises(ValueError, match="two files for scan0: .*move one away"):
        score(tmp_path, *list_of(tmp_path, scan0="scan0_seg", scan1="scan1_seg"))


def test_folders_may_be_given_by_a_path_that_climbs(tmp_path, monkeypatch, capsys):
    save(tmp_path / "label/a.nii.gz", blocks(1, 0))
    save(tmp_path / "pred/a.nii.gz", blocks(1, 0))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    cases, _, failed, _ = scoring.find_predictions("../pred", "../label", "training")
    assert [case["name"] for case in cases] == ["a"] and not failed
    assert "alone" not in capsys.readouterr().err


def test_a_list_of_labels_may_name_files_below_the_data_root(tmp_path):
    for folder in ("elsewhere", "pred"):
        save(tmp_path / folder / "a.nii.gz", blocks(1, 0))
    (tmp_path / "label").mkdir()
    rows, _ = score(tmp_path, *list_of(tmp_path, scan="a"), "--data_root", tmp_path / "elsewhere")
    assert [row["dice"] for row in rows] == ["1"]


def test_initials_that_are_an_organ_s_code_are_names_of_cases(tmp_path):
    for name in ("pan", "eso"):
        save(tmp_path / f"label/{name}.nii.gz", blocks(1, 0))
        save(tmp_path / f"pred/{name}.nii.gz", blocks(1, 0))
    assert [row["case"] for row in score(tmp_path)[0]] == ["eso", "pan"]


def test_one_mask_per_organ_is_refused(tmp_path):
    for name in ("s0/liver", "s0/spleen"):
        save(tmp_path / f"label/{name}.nii.gz", blocks(1, 0))
        save(tmp_path / f"pred/{name}.nii.gz", blocks(1, 0))
    with pytest.raises(ValueError, match="liver.nii.gz, spleen.nii.gz are named after organs"):
        score(tmp_path)


@pytest.mark.parametrize("empty, told", [("label", "has no label"), ("pred", "holds no NIfTI")])
def test_a_folder_without_a_file_to_score_is_told(empty, told, tmp_path):
    (tmp_path / empty).mkdir()
    save(tmp_path / {"label": "pred", "pred": "label"}[empty] / "a.nii.gz", blocks(1, 0))
    with pytest.raises(ValueError, match=told):
        score(tmp_path)


def test_an_organ_s_name_leaves_a_table_its_columns():
    table = scoring.markdown(["organ", "DSC"], [["prostate|uterus", .5]])
    assert table.splitlines()[-1] == r"| prostate\|uterus | 0.5 |"


def test_a_numbered_folder_of_several_predictions_is_no_case(tmp_path):
    for name in "123":
        save(tmp_path / f"label/{name}.nii.gz", blocks(1, 0))
    for name in "239":                                  # the first fold, and one without a label
        save(tmp_path / f"pred/1/{name}.nii.gz", blocks(1, 0))
    folders = tmp_path / "pred", tmp_path / "label"
    cases, _, failed, _ = scoring.find_predictions(*folders, "training")
    assert [case["name"] for case in cases] == ["2", "3"] and [*failed] == ["1"]


def test_a_lone_prediction_in_a_fold_s_folder_is_of_the_label_with_its_name(tmp_path, capsys):
    for name in ("site1/a", "site1/b", "site2/c"):
        save(tmp_path / f"label/{name}.nii.gz", blocks(1, 0))
    save(tmp_path / "pred/fold_0/a.nii.gz", blocks(1, 0))
    folders = tmp_path / "pred", tmp_path / "label"
    cases, _, failed, _ = scoring.find_predictions(*folders, "training")
    assert [case["name"] for case in cases] == ["a"] and sorted(failed) == ["b", "c"]
    assert "1 file paired by name alone" in capsys.readouterr().err


def test_a_prediction_that_may_be_of_two_cases_is_refused(tmp_path):
    for name in ("1", "2", "3"):
        save(tmp_path / f"label/{name}.nii.gz", blocks(1, 0))
    save(tmp_path / "pred/2.nii.gz", blocks(1, 0))       # the image of one, the label of the other
    flags = list_of(tmp_path, **{"1": "2", "2": "3"})
    with pytest.raises(ValueError, match=r"pred/2.nii.gz: may be of case 1 \(.*\) or of 2 "):
        score(tmp_path, *flags)
    assert not (tmp_path / "out/results.json").exists()


def test_two_predictions_of_one_case_are_named_and_refused(tmp_path):
    for name in "ab":
        save(tmp_path / f"label/{name}.nii.gz", blocks(1, 0))
        save(tmp_path / f"pred/{name}.nii.gz", blocks(1, 0))
        save(tmp_path / f"pred/postprocessed/{name}.nii.gz", blocks(1, 0))
    pred = tmp_path / "pred"
    with pytest.raises(ValueError) as refusal:
        score(tmp_path)
    assert str(refusal.value) == (f"{pred} holds two files for a: {pred}/a.nii.gz, "
                                  f"{pred}/postprocessed/a.nii.gz; name one folder")


def test_accents_that_a_mac_wrote_are_those_of_other_systems(tmp_path):
    composed = unicodedata.normalize("NFC", "p\u00e9")
    decomposed = unicodedata.normalize("NFD", composed)
    assert composed != decomposed
    save(tmp_path / f"label/{composed}.nii.gz", blocks(1, 0))
    save(tmp_path / f"pred/{decomposed}.nii.gz", blocks(1, 0))
    name_numbers(tmp_path / "label", liver=1)
    results = {"predicted": [f"{composed}.nii.gz"], "labels": {"1": "liver"}}
    (tmp_path / "pred/results.json").write_text(json.dumps(results))
    assert [row["dice"] for row in score(tmp_path)[0]] == ["1"]

    for side, name in (("a", composed), ("b", decomposed)):
        (tmp_path / side).mkdir()
        (tmp_path / side / "cases.csv").write_text(
            "\n".join([",".join(scoring.COLUMNS), f"{name},liver,.8,1,1,1,1"]) + "\n")
    assert "| liver | 1 |" in scoring.compare([tmp_path / "a", tmp_path / "b"], tmp_path / "out")


def test_two_results_are_compared_whatever_prefix_their_cases_have(tmp_path):
    for name, prefix, organ in (("a", "img", "RAG"), ("b", "label", "right adrenal gland")):
        (tmp_path / name).mkdir()
        lines = [f"{prefix}000{n},{organ},{0.5 + n / 10},1,1,1,1" for n in range(3)]
        (tmp_path / name / "cases.csv").write_text(
            "\n".join([",".join(scoring.COLUMNS), *lines]) + "\n"
        )
    text = scoring.compare([tmp_path / "a", tmp_path / "b"], tmp_path / "out")

    assert "| right adrenal gland | 3 | 0.600 | 0.600 | +0.000 |" in text


def test_a_false_alarm_is_counted_and_no_dice_of_0_in_the_mean(tmp_path):
    rows = {"a": ["c1,liver,.8,1,1,1,1", "c1,spleen,0,inf,0,1,0", "c2,liver,.7,1,1,1,1",
                  "c2,spleen,.5,1,1,1,1", "c3,liver,.1,1,1,1,1"],
            "b": ["c1,liver,.8,1,1,1,1", "c1,spleen,nan,nan,nan,0,0", "c2,liver,.7,1,1,1,1",
                  "c2,spleen,.5,1,1,1,1"]}
    for side in rows:
        (tmp_path / side).mkdir()
        (tmp_path / side / "cases.csv").write_text(
            "\n".join([",".join(scoring.COLUMNS), *rows[side]]) + "\n")
    text = scoring.compare([tmp_path / "a", tmp_path / "b"], tmp_path / "out")

    assert "| AVG | 2 | 0.700 | 0.700 | +0.000 | +0.000 to +0.000 | 1 | 1, 0 |" in text
    assert f"1 row of cases.csv left out: in {tmp_path / 'a'} alone" in text
    assert (tmp_path / "out/compare.md").read_text() == text


# ------------------------------------------------------------------------ whose names, and of which
def test_given_names_are_for_the_side_without_names(tmp_path, capsys):
    save(tmp_path / "label/a.nii.gz", blocks(1, 2))
    save(tmp_path / "pred/a.nii.gz", blocks(2, 1))       # perfect, in numbers of its own
    name_numbers(tmp_path / "label", liver=1, spleen=2)
    name_numbers(tmp_path / "given", liver=2, spleen=1)
    rows, _ = score(tmp_path, "--names", tmp_path / "given/dataset.json")
    assert [float(row["dice"]) for row in rows] == [1, 1]
    assert "label: has names of its own, which count" in capsys.readouterr().err


def test_results_name_the_files_that_they_are_of_and_no_others(tmp_path):
    save(tmp_path / "label/a.nii.gz", blocks(1, 2))
    save(tmp_path / "pred/a.nii.gz", blocks(2, 1))       # perfect, by the names beside it
    name_numbers(tmp_path / "label", liver=1, spleen=2)
    name_numbers(tmp_path / "pred", liver=2, spleen=1)
    # the scores of another folder, whose numbers are others, were written there
    results = {"predictions": str(tmp_path / "label"), "labels": {"1": "liver", "2": "spleen"}}
    (tmp_path / "pred/results.json").write_text(json.dumps(results))
    assert [float(row["dice"]) for row in score(tmp_path)[0]] == [1, 1]

    results = {"weights": "b.pt", "predicted": ["b.nii.gz"], "labels": results["labels"]}
    (tmp_path / "pred/results.json").write_text(json.dumps(results))
    with pytest.raises(ValueError, match=r"pred: 1 file \(a.nii.gz\) are not of the evaluation"):
        score(tmp_path)


def test_scores_replace_neither_a_list_nor_the_names_of_predictions(tmp_path):
    save(tmp_path / "out/label/a.nii.gz", blocks(1, 2))
    save(tmp_path / "pred/a.nii.gz", blocks(1, 2))
    listing = tmp_path / "out/cases.csv"
    listing.write_text("../pred/a.nii.gz,label/a.nii.gz\n")
    with pytest.raises(ValueError, match="would overwrite .*cases.csv: give another folder"):
        evaluate.main(evaluate.parse_arguments(
            ["--predictions", str(tmp_path / "pred"), "--labels", str(listing),
             "--out", str(tmp_path / "out")]))
    assert listing.read_text().startswith("../pred/a")

    save(tmp_path / "label/a.nii.gz", blocks(1, 2))
    listing.unlink()
    (tmp_path / "out/results.json").write_text(json.dumps({"weights": "a.pt", "labels": {}}))
    with pytest.raises(ValueError, match="holds the results of --weights"):
        score(tmp_path)
    assert (tmp_path / "out/results.json").exists()


def test_names_that_name_nothing_are_refused(tmp_path):
    save(tmp_path / "label/a.nii.gz", blocks(1, 2))
    save(tmp_path / "pred/a.nii.gz", blocks(2, 1))       # perfect, by the names beside it
    name_numbers(tmp_path / "label", liver=1, spleen=2)
    name_numbers(tmp_path / "pred", liver=2, spleen=1)
    name_numbers(tmp_path / "none")
    (tmp_path / "names.txt").write_text("liver\n")
    for flag, why in (("none/dataset.json", "names no organ"), ("names.txt", "names no organ"),
                      ("gone.jsn", "no such file"), ("gone.json", "no such file")):
        with pytest.raises(ValueError, match=why):
            score(tmp_path, "--names", tmp_path / flag)


def test_predictions_below_a_data_set_are_not_numbered_as_it_is(tmp_path):
    save(tmp_path / "labelsTr/a.nii.gz", blocks(1, 2))
    save(tmp_path / "totalseg/a.nii.gz", blocks(5, 1))   # perfect, in numbers of its own
    name_numbers(tmp_path, liver=1, spleen=2, aorta=5)
    for side, folder in (("label", "labelsTr"), ("pred", "totalseg")):
        (tmp_path / side).symlink_to(tmp_path / folder)
    with pytest.raises(ValueError, match="pred: no names for its numbers.* --names"):
        score(tmp_path)

    name_numbers(tmp_path / "totalseg", liver=5, spleen=1)
    rows, _ = score(tmp_path)
    assert [row["dice"] for row in rows if row["organ"] != "aorta"] == ["1", "1"]


def test_two_numbers_of_one_organ_are_refused_before_any_scoring(tmp_path):
    for side in ("label", "pred"):
        save(tmp_path / side / "a.nii.gz", blocks(1))
    name_numbers(tmp_path / "label", liver=1)
    name_numbers(tmp_path / "pred", liver=1, Liver=2)
    with pytest.raises(ValueError, match="pred: labels 1 and 2 are both liver"):
        score(tmp_path)


def test_a_case_that_is_rightly_all_background_is_no_failure_without_names(tmp_path):
    for side in ("label", "pred"):
        save(tmp_path / side / "a.nii.gz", blocks(0, 0))
        save(tmp_path / side / "b.nii.gz", blocks(1, 0))
    rows, results = score(tmp_path)
    assert [(row["case"], row["organ"], row["dice"]) for row in rows] == [
        ("a", "label 1", "nan"), ("b", "label 1", "1")]
    assert results["failed"] == {} and results["cases"] == ["a", "b"]


def test_all_files_of_one_oddity_are_named_in_one_line(tmp_path, capsys):
    for name in "abc":
        save(tmp_path / f"label/{name}.nii.gz", blocks(0, 0))
        save(tmp_path / f"pred/{name}.nii.gz", blocks(0, 1))
        image = nib.load(tmp_path / f"label/{name}.nii.gz")
        image.set_sform(AFFINE, 0)
        image.set_qform(AFFINE, 0)
        for side in ("label", "pred"):
            voxels = np.asarray(nib.load(tmp_path / side / f"{name}.nii.gz").dataobj)
            nib.save(nib.Nifti1Image(voxels, None, image.header),
                     tmp_path / f"{side}/{name}.nii.gz")
    score(tmp_path)
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 2 and all(line.startswith("warning: ") for line in told)
    by_kind = {"empty" if "the label is empty" in line else "unknown": line for line in told}
    assert "[2 more: b.nii.gz, c.nii.gz]" in by_kind["empty"]
    assert "left and right are unknown" in by_kind["unknown"] and "[5 more: " in by_kind["unknown"]


def test_predictions_without_a_label_are_told(tmp_path, capsys):
    for name in "abcde":
        save(tmp_path / f"pred/{name}.nii.gz", blocks(1))
    save(tmp_path / "label/a.nii.gz", blocks(1))
    score(tmp_path)
    told = capsys.readouterr().err
    assert "pred: 4 files not scored, for want of a label in" in told
    assert "b.nii.gz, c.nii.gz, d.nii.gz, ..." in told


def test_names_that_are_no_utf_8_end_no_run(tmp_path, capsys):
    odd, name = os.fsdecode(b"caf\xe9.nii.gz"), os.fsdecode(b"f\xfcr.nii.gz")
    for side in ("label", "pred"):
        save(tmp_path / side / odd, blocks(1))
    save(tmp_path / "label" / name, blocks(1))           # its prediction is missing, which is told
    sys.stdout.reconfigure(errors="backslashreplace")    # as runtime.run does
    with pytest.raises(ValueError, match="1 of 2 cases failed"):
        score(tmp_path)
    with open(tmp_path / "out/cases.csv", encoding="utf-8", newline="") as file:
        assert [row["case"] for row in csv.DictReader(file)] == ["caf\\udce9"]
    results = json.loads((tmp_path / "out/results.json").read_text(encoding="utf-8"))
    assert results["n"] == 1 and (tmp_path / "out/index.html").is_file()
    assert "f\\udcfcr.nii.gz: has no prediction" in capsys.readouterr().out


def test_an_evaluation_in_a_runs_folder_leaves_the_runs_page_and_shows_its_own_pictures(tmp_path):
    for side in ("label", "pred"):
        save(tmp_path / side / "a.nii.gz", blocks(1))
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text("{}")
    canvas.write_svg(out / "overlay.svg", 9, 9, [canvas.text(0, 0, "the run's")])
    report.run_page(out, {}, "Fine-tuning")
    before = (out / "index.html").read_bytes()
    for _ in "12":
        score(tmp_path)
        assert (out / "index.html").read_bytes() == before
        page = (out / "evaluation.html").read_text()
        assert "best of 1" in page and "the run&#x27;s" not in page

    report.run_page(out, {}, "Fine-tuning")              # nor does the run show the evaluation's
    assert (out / "index.html").read_bytes() == before


@pytest.mark.parametrize("axis, mm", [(0, 1.), (1, 2.), (2, 5.)])
def test_distances_are_in_the_mm_of_their_axis(axis, mm, tmp_path):
    affine = np.array([[0., 2, 0, 7], [-1, 0, 0, 3], [0, 0, 5, -4], [0, 0, 0, 1]])
    truth, pred = np.zeros((2, 9, 9, 9), np.uint8)
    truth[4, 4, 4] = 1
    pred[(*(4 + 3 * (way == axis) for way in range(3)),)] = 1              # 3 voxels further on
    save(tmp_path / "label.nii.gz", truth, affine)
    save(tmp_path / "pred.nii.gz", pred, affine)
    case = {"label": tmp_path / "label.nii.gz", "prediction": tmp_path / "pred.nii.gz",
            "names": {1: "liver"}}
    (row,) = scoring.score_case(case, {1: "liver"}, 3 * mm)
    assert row["hd95_mm"] == pytest.approx(3 * mm) and row["surface_dice"] == 1
    assert scoring.score_case(case, {1: "liver"}, 3 * mm - .1)[0]["surface_dice"] == 0
