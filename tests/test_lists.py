"""From what people name to cases: folders as they are on disks, lists as other tools write them."""

import gzip
import json
import os
import unicodedata

import finetune
import hostile
import numpy as np
import pytest

from smit import data
from smit.data import concerns, labelled, organs, samples


@pytest.fixture(autouse=True)
def nothing_told():
    concerns.printed.clear()
    concerns.warned.clear()


def touch(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def names_of(cases, folder):
    return [os.path.relpath(case["image"], folder) for case in cases]


def write_list(folder, name="dataset.json", **content):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(content))
    return folder / name


# ------------------------------------------------------------------------------------------ folders
def test_hidden_names_and_label_folders_are_left_out_with_one_line(tmp_path, capsys):
    touch(
        tmp_path,
        "s1/ct.nii.gz",
        "s1/._ct.nii.gz",
        "s1/segmentations/liver.nii.gz",
        "s2/ct.nii.gz",
        "__MACOSX/s1/ct.nii.gz",
        ".git/annex/objects/x.nii.gz",
        "s2/segmentation.nii.gz",
        "s3/scan.mha",
    )
    assert names_of(data.read_list(tmp_path), tmp_path) == ["s1/ct.nii.gz", "s2/ct.nii.gz"]

    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1 and told[0].startswith(f"note: {tmp_path}: left out ")
    for part in (
        "hidden names: 3",
        "folders of labels (segmentations): 1",
        "labels, by their names: 1",
        "(*.mha): 1",
    ):
        assert part in told[0]


def test_lists_below_a_folder_and_all_folders_of_labels_are_told(tmp_path, capsys):
    touch(tmp_path, "a/imagesTr/1.nii", "a/labelsTr/1.nii", "b/2.nii", "b/labels/2.nii",
          "c/labels/3.nii")
    write_list(tmp_path / "a", training=["imagesTr/1.nii"])
    assert names_of(data.read_list(tmp_path), tmp_path) == ["a/imagesTr/1.nii", "b/2.nii"]

    told = capsys.readouterr().err
    assert "lists in its subfolders, which are read if they are named: 1" in told
    assert "folders of labels (labels, labelsTr): 3" in told


@pytest.mark.parametrize("name", ["", "ct.nii.gz"])
def test_sources_that_name_no_labels_are_refused_in_one_line_by_fine_tuning(name, tmp_path):
    touch(tmp_path, "ct.nii.gz", "mr.nii.gz")
    args = finetune.parse_arguments(["--data", str(tmp_path / name)])
    with pytest.raises(ValueError, match=r"^[^\n]*: names no labels; give a dataset.json[^\n]*$"):
        labelled.read_lists(args, args.data)


@pytest.mark.parametrize(
    "name",
    [
        "labelsTr",
        "labels",
        "label",
        "Masks",
        "segmentations",
        "lesion_masks",
        "gt",
        "seg",
        "labels_v2",
        "ground_truth",
        "annotations",
    ],
)
def test_folders_of_labels_are_known_by_their_names(name, tmp_path):
    touch(tmp_path, f"{name}/a.nii.gz", "imagesTr/a.nii.gz")
    assert names_of(data.read_list(tmp_path), tmp_path) == ["imagesTr/a.nii.gz"]


@pytest.mark.parametrize("name", ["segment1", "images_labelled", "mastoid", "lab", "gtv_study"])
def test_other_folders_are_not_taken_for_labels(name, tmp_path):
    touch(tmp_path, f"{name}/a.nii.gz")
    assert len(data.read_list(tmp_path)) == 1


def test_linked_folders_are_entered_once_and_loops_end(tmp_path, capsys):
    touch(tmp_path, "data/siteA/1.nii.gz", "store/2.nii.gz")
    for link, target in (
        ("a_link", "siteA"),
        ("siteB", "../store"),
        ("again", "../store"),
        ("loop", "."),
        ("siteA/up", ".."),
    ):
        (tmp_path / "data" / link).symlink_to(target)
    found = names_of(data.read_list(tmp_path / "data"), tmp_path / "data")

    assert found == ["again/2.nii.gz", "siteA/1.nii.gz"]
    assert "links to folders that were read already: 4" in capsys.readouterr().err


def test_links_to_one_file_are_one_case_and_the_file_itself_comes_first(tmp_path):
    touch(tmp_path, "b.nii.gz")
    (tmp_path / "a.nii.gz").symlink_to("b.nii.gz")
    assert names_of(data.read_list(tmp_path), tmp_path) == ["b.nii.gz"]


def test_a_folder_with_a_dataset_json_is_read_through_it(tmp_path, capsys):
    write_list(
        tmp_path,
        training=[{"image": "imagesTr/a.nii.gz", "label": "labelsTr/a.nii.gz"}],
        test=["b.nii.gz"],
    )
    touch(tmp_path, "imagesTr/a.nii.gz", "imagesTr/b.nii.gz", "labelsTr/a.nii.gz")

    assert names_of(data.read_list(tmp_path), tmp_path) == ["imagesTr/a.nii.gz"]
    assert ("read through its dataset.json, its 'training' cases (it has 'test', too)"
            in capsys.readouterr().err)
    with pytest.raises(
        ValueError, match="'validation' is no list of cases; --key can be 'training', 'test'"
    ):
        data.read_list(tmp_path, "validation")


def label_map(folder, values=14):
    blocks = np.arange(16**3).reshape(16, 16, 16) // 64 % values
    (folder / "x.nii").write_bytes(hostile.plain(blocks.astype(np.uint8)))
    return folder / "x.nii"


@pytest.mark.parametrize("values", [3, 14, 118])
def test_a_volume_that_looks_like_a_label_is_refused_unless_it_is_named(values, tmp_path):
    path = label_map(tmp_path, values)
    for modality in ("ct", "mr"):
        settings = data.Preparation((2.0, 2.0, 2.0), modality)
        for _ in range(2):  # made, and then from the cache
            with pytest.raises(data.BadVolume, match="x.nii: holds few whole numbers"):
                data.cached(data.read_list(tmp_path)[0], settings, tmp_path / "cache")
        found = data.cached_with_concerns(data.read_list(path)[0], settings, tmp_path / "cache")[2]
        assert "as a label does" in found[0].what


def test_an_eight_bit_scan_is_no_label(tmp_path):
    noise = np.random.default_rng(0).integers(0, 200, (16, 16, 16)).astype(np.uint8)
    (tmp_path / "scan.nii").write_bytes(hostile.plain(noise))
    assert (
        data.load_case(data.read_list(tmp_path)[0], data.Preparation((2.0, 2.0, 2.0), "mr"))[
            "image"
        ].max()
        == 255
    )


# -------------------------------------------------------------------------------------------- lists
NNUNET = {
    "channel_names": {"0": "CT"},
    "labels": {"background": 0, "liver": 1},
    "file_ending": ".nii.gz",
}


def test_nnunets_file_ending_may_lack_its_dot(tmp_path):
    for name in ("imagesTr/a_0000.nii.gz", "labelsTr/a.nii.gz"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    path = write_list(tmp_path, **{**NNUNET, "file_ending": "nii.gz"})
    assert names_of(data.read_list(path), tmp_path) == ["imagesTr/a_0000.nii.gz"]


def test_nnunets_dataset_key_names_files_one_by_one(tmp_path):
    entry = {"images": ["files/p1_img.nii.gz"], "label": "files/p1_seg.nii.gz"}
    path = write_list(tmp_path, **NNUNET, dataset={"p1": entry})
    assert data.read_list(path) == [
        {
            "image": str(tmp_path / "files/p1_img.nii.gz"),
            "label": str(tmp_path / "files/p1_seg.nii.gz"),
        }
    ]

    write_list(tmp_path, **NNUNET, dataset={"p1": {"images": ["a.nii", "b.nii"], "label": "c.nii"}})
    with pytest.raises(ValueError, match="'p1' under 'dataset' has not one image"):
        data.read_list(path)


def test_a_listed_name_without_nnunets_channel_is_found_with_it(tmp_path, capsys):
    path = write_list(
        tmp_path, training=[{"image": "./imagesTr/p.nii.gz", "label": "./labelsTr/p.nii.gz"}]
    )
    touch(tmp_path, "imagesTr/p_0000.nii.gz", "labelsTr/p.nii.gz")

    assert names_of(data.read_list(path), tmp_path) == ["imagesTr/p_0000.nii.gz"]
    assert "found with nnU-Net's channel" in capsys.readouterr().err

    touch(tmp_path, "imagesTr/p_0001.nii.gz")
    with pytest.raises(ValueError, match="several channels"):
        data.read_list(path)


def test_what_an_nnunet_folder_holds_and_does_not_use_is_told(tmp_path, capsys):
    path = write_list(tmp_path, **NNUNET, numTraining=3)
    touch(
        tmp_path,
        "imagesTr/a_0000.nii.gz",
        "imagesTr/b.nii.gz",
        "labelsTr/a.nii.gz",
        "labelsTr/c.nii.gz",
    )
    assert names_of(data.read_list(path), tmp_path) == ["imagesTr/a_0000.nii.gz"]

    told = capsys.readouterr().err.splitlines()
    assert len(told) == 3 and all(line.startswith("warning: ") for line in told)
    assert (
        "3 expected, 1 found" in told[0] and "1: b.nii.gz" in told[1] and "1: c.nii.gz" in told[2]
    )

    (tmp_path / "imagesTr/a_0000.nii.gz").unlink()
    with pytest.raises(ValueError, match="none of its 1 files is named CASE_0000.nii.gz"):
        data.read_list(path)


def test_an_empty_split_is_none_and_the_keys_that_hold_cases_are_named(tmp_path):
    path = write_list(tmp_path, training=["a.nii.gz"], validation=[], labels={"1": "liver"})
    assert not data.has_split(path, "validation") and data.has_split(path, "training")
    with pytest.raises(ValueError, match="'validation' is empty; --key can be 'training'$"):
        data.read_list(path, "validation")

    nnunet = write_list(tmp_path, "nnunet.json", **NNUNET)
    with pytest.raises(ValueError, match="--key can be 'training', 'test'$"):
        data.read_list(nnunet, "validation")


def test_a_list_may_lie_apart_from_its_data(tmp_path, capsys):
    path = write_list(tmp_path / "jsons", training=[{"image": "imagesTr/a.nii.gz"}, "../b.nii.gz"])
    cases, problems = data.read_lists([path], data_root=tmp_path / "data")
    assert names_of(cases, tmp_path) == ["data/imagesTr/a.nii.gz"]
    assert (
        len(problems) == 1 and "../b.nii.gz leaves" in problems[0] and "--data_root" in problems[0]
    )
    assert "none of its images is there" in capsys.readouterr().err

    touch(tmp_path, "data/imagesTr/p_0000.nii.gz")
    nnunet = write_list(tmp_path / "jsons", "nnunet.json", **NNUNET)
    assert names_of(data.read_list(nnunet, data_root=tmp_path / "data"), tmp_path) == [
        "data/imagesTr/p_0000.nii.gz"
    ]
    path = write_list(tmp_path / "jsons", training=[str(tmp_path / "elsewhere/a.nii.gz")])
    assert names_of(data.read_list(path), tmp_path) == ["elsewhere/a.nii.gz"]


def test_windows_separators_are_read_or_told(tmp_path):
    touch(tmp_path, "imagesTr/a.nii.gz")
    path = write_list(tmp_path, training=["imagesTr\\a.nii.gz"])
    assert names_of(data.read_list(path), tmp_path) == ["imagesTr/a.nii.gz"]
    write_list(tmp_path, training=["imagesTr\\absent.nii.gz"])
    with pytest.raises(ValueError, match="Windows' separators"):
        data.read_list(path)


@pytest.mark.parametrize(
    "said, modality, told",
    [
        ({"modality": {"0": "MRI"}}, "ct", "use --modality mr"),
        ({"channel_names": {"0": "T2w"}}, "ct", "use --modality mr"),
        ({"channel_names": ["CT"]}, "mr", "use --modality ct"),
        ({"modality": {"0": "CT"}}, "ct", ""),
        ({"channel_names": {"0": "noNorm"}}, "ct", ""),
        ({"modality": "PET/CT and MR"}, "ct", ""),
    ],
)
def test_a_lists_modality_is_held_against_the_flag(said, modality, told, tmp_path, capsys):
    touch(tmp_path, "a.nii.gz")
    path = write_list(tmp_path, **said, training=["a.nii.gz"])
    data.read_lists([path], modality=modality)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == bool(told) and told in "".join(lines)


def test_region_labels_and_ignore_are_refused_in_plain_words(tmp_path):
    path = write_list(tmp_path, labels={"background": 0, "whole": [1, 2], "core": 2})
    with pytest.raises(ValueError, match="'whole' is a region of several numbers"):
        data.label_names(path)

    write_list(tmp_path, labels={"background": 0, "liver": 1, "ignore": 2})
    with pytest.raises(ValueError, match="'ignore' marks voxels that nobody annotated"):
        data.label_names(path)
    assert data.label_names(path, ignore=True) == {0: "background", 1: "liver", 2: "ignore"}


@pytest.mark.parametrize("name", ["Ignore", "IGNORE", " ignore "])
def test_ignore_is_refused_in_any_spelling(name, tmp_path):
    path = write_list(tmp_path, labels={"0": "background", "1": "liver", "2": name})
    with pytest.raises(ValueError, match="'ignore' marks voxels that nobody annotated"):
        data.label_names(path)


@pytest.mark.parametrize("name", ["spleen", "Kidney_R", "IVC"])
def test_an_organ_as_number_0_is_refused(name, tmp_path):
    path = write_list(tmp_path, labels={"0": name, "1": "liver"})
    with pytest.raises(ValueError, match=f"label 0 is named '{name}', but 0 is the background "
                                         "here; number organs from 1"):
        data.label_names(path)


def test_a_name_of_number_0_that_is_no_usual_background_s_is_told(tmp_path, capsys):
    for name in ("background", "Background", "BG", "unlabeled", "Clear Label", "Unknown"):
        data.label_names(write_list(tmp_path, labels={"0": name, "1": "liver"}))
    data.label_names(write_list(tmp_path, labels={"1": "liver"}))
    assert capsys.readouterr().err == ""
    assert data.label_names(write_list(tmp_path, labels={"0": "left lung", "1": "liver"}))
    assert "0 has a name, but it is the background here ('left lung')" in capsys.readouterr().err


@pytest.mark.parametrize(
    "head, name",
    [
        (bytes(128) + b"DICM", "DICOM.*dcm2niix"),
        (b"NRRD0005\n", "NRRD"),
        (b"ObjectType = Image\nNDims = 3\n", "MetaImage"),
        (b"\0\0\0\1\0\0\1\0", "mri_convert"),
    ],
)
def test_other_formats_are_known_by_content_and_their_converter_is_named(head, name, tmp_path):
    for path in (tmp_path / "volume.nii", tmp_path / "volume.dat"):
        path.write_bytes(head + bytes(600))
        with pytest.raises(ValueError, match=f"{path.name}: is .*{name}"):
            data.check_cases(data.read_list(path))

    (tmp_path / "volume.nii").unlink()
    with pytest.raises(ValueError, match=f"holds no NIfTI image .*, but volume.dat is .*{name}"):
        data.read_list(tmp_path)


# -------------------------------------------------------------------------------------------- folds
def test_folds_are_nnunets_whatever_the_padding_of_names_and_the_order_of_the_list():
    # KFold(5, shuffle=True, random_state=12345) over the sorted names: liver_0, liver_1, liver_10
    cases = [{"image": f"/d/imagesTr/liver_{n}_0000.nii.gz", "label": None} for n in range(13)]
    for order in (cases, cases[::-1]):
        train, held_back = samples.fold_split(order, 0, 5)
        assert sorted(case["image"][18:-12] for case in held_back) == ["0", "4", "6"]
        assert len(train) == 10 and [case for case in order if case in train] == train


def test_the_folds_of_a_list_are_taken(tmp_path, capsys):
    path = write_list(
        tmp_path, training=[{"image": f"{n}.nii.gz", "fold": n % 3} for n in range(7)]
    )
    train, held_back = samples.fold_split(data.read_list(path), 1, 5)

    assert names_of(held_back, tmp_path) == ["1.nii.gz", "4.nii.gz"] and len(train) == 5
    assert "fold 1 is the list's own: 2 of 7" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"--fold 4: the list has the folds \[0, 1, 2\]"):
        samples.fold_split(data.read_list(path), 4, 5)

    write_list(tmp_path, training=[{"image": "0.nii.gz", "fold": 0}, {"image": "1.nii.gz"}])
    with pytest.raises(ValueError, match="1.nii.gz has no whole number as its fold"):
        samples.fold_split(data.read_list(path), 0, 5)


def test_splits_final_json_gives_the_folds(tmp_path):
    path = write_list(tmp_path, **NNUNET)
    touch(tmp_path, *(f"imagesTr/{name}_0000.nii.gz" for name in "abcd"))
    splits = [{"train": ["c", "d"], "val": ["a", "b"]}, {"train": ["a", "b"], "val": ["c", "d"]}]
    (tmp_path / "splits_final.json").write_text(json.dumps(splits))
    train, held_back = samples.fold_split(data.read_list(path), 1, 5)

    assert (
        names_of(held_back, tmp_path) == ["imagesTr/c_0000.nii.gz", "imagesTr/d_0000.nii.gz"]
        and len(train) == 2
    )

    (tmp_path / "splits_final.json").write_text(json.dumps([{"train": ["a"], "val": ["b"]}]))
    with pytest.raises(ValueError, match="splits_final.json: fold 0 leaves cases of the list out"):
        samples.fold_split(data.read_list(path), 0, 5)


@pytest.mark.parametrize("splits", [
    '[{"train": ["a"], "val": ["b"]}, {"train": ["a"], "val": ["b"]}]',      # drawn with repetition
    "[", '[{"train": [[]], "val": 3}]'])
def test_splits_that_are_no_folds_stop_who_asks_for_a_fold_and_nobody_else(splits, tmp_path):
    path = write_list(tmp_path, **NNUNET)
    touch(tmp_path, "imagesTr/a_0000.nii.gz", "imagesTr/b_0000.nii.gz")
    (tmp_path / "splits_final.json").write_text(splits)
    cases, problems = data.read_lists([path])
    assert len(cases) == 2 and not problems
    with pytest.raises(ValueError, match="splits_final.json: .*move it away to have folds made"):
        samples.fold_split(cases, 0, 2)


def test_splits_final_json_names_cases_whatever_their_files_are_called(tmp_path):
    files = {name: {"images": [f"f/{name}_img.nii.gz"], "label": f"f/{name}_seg.nii.gz"}
             for name in "ab"}
    path = write_list(tmp_path, **NNUNET, dataset=files)
    splits = [{"train": ["a"], "val": ["b"]}, {"train": ["b"], "val": ["a"]}]
    (tmp_path / "splits_final.json").write_text(json.dumps(splits))
    train, held_back = samples.fold_split(data.read_list(path), 0, 5)
    assert names_of(train, tmp_path) == ["f/a_img.nii.gz"]
    assert names_of(held_back, tmp_path) == ["f/b_img.nii.gz"]


# ----------------------------------------------------------------------------------------- identity
def test_cases_are_told_apart_by_the_folders_that_differ():
    kits = [f"/data/case_{n}/imaging.nii.gz" for n in range(3)]
    assert organs.case_names(kits) == ["case_0", "case_1", "case_2"]
    assert organs.identities(kits) == [
        "case_0/imaging.nii.gz",
        "case_1/imaging.nii.gz",
        "case_2/imaging.nii.gz",
    ]
    assert organs.case_names(["/d/s1/ct.nii", "/d/s1/mr.nii", "/d/s2/ct.nii"]) == [
        "s1_ct",
        "s1_mr",
        "s2_ct",
    ]
    assert organs.case_names(["/d/imagesTr/p_0000.nii.gz", "/d/q.nii"]) == ["p", "q"]
    assert organs.identities(["/d/a.nii", "/e/b.nii.gz"]) == ["a.nii", "b.nii.gz"]
    assert organs.those_among(kits, {"case_1/imaging.nii.gz"}) == {kits[1]}
    with pytest.raises(ValueError, match="are both case a_b_c"):
        organs.case_names(["/a_b/c.nii", "/a/b_c.nii", "/a/c.nii", "/a_b/b_c.nii"])


def test_nnunets_channel_is_dropped_in_its_layout_alone():
    assert organs.case_name("/d/imagesTr/chaos01_0000.nii.gz") == "chaos01"
    assert organs.case_name("/d/weeks/week_0000.nii.gz") == "week_0000"


# ------------------------------------------------------------------- lists of spreadsheets, by hand
@pytest.mark.parametrize("text", [
    "a.nii\tl/a.nii\r\nb.nii\tl/b.nii\r\n",                      # Windows' line ends
    "\ufeffa.nii,l/a.nii\nb.nii,l/b.nii\n",                       # its mark of UTF-8
    '"a.nii","l/a.nii"\n"b.nii", "l/b.nii"\n',
    "image,label\na.nii,l/a.nii\nb.nii,l/b.nii\n",
    "a.nii,l/a.nii,,\nb.nii,l/b.nii,,\n",
])
def test_a_spreadsheets_list_is_read_as_the_plain_one(text, tmp_path):
    (tmp_path / "list.csv").write_bytes(text.encode())
    cases = data.read_list(tmp_path / "list.csv")
    assert names_of(cases, tmp_path) == ["a.nii", "b.nii"]
    assert [os.path.relpath(case["label"], tmp_path) for case in cases] == ["l/a.nii", "l/b.nii"]


def test_quotes_and_tabs_keep_commas_in_names_and_an_empty_column_is_no_label(tmp_path):
    (tmp_path / "list.csv").write_text('"a,1.nii",\na,2.nii\tl.nii\n')
    cases = data.read_list(tmp_path / "list.csv")
    assert names_of(cases, tmp_path) == ["a,1.nii", "a,2.nii"]
    assert cases[0]["label"] is None and cases[1]["label"] == str(tmp_path / "l.nii")


@pytest.mark.parametrize("title", ["image_path,label_path", "CT volume\tOrgans", "scans"])
def test_a_first_line_without_a_path_is_read_as_titles_and_told(title, tmp_path, capsys):
    (tmp_path / "list.csv").write_text(f"# a comment\n{title}\na.nii\tl.nii\nb.nii\n")
    assert names_of(data.read_list(tmp_path / "list.csv"), tmp_path) == ["a.nii", "b.nii"]
    assert "is read as titles" in capsys.readouterr().err


def test_titles_that_put_the_label_first_are_refused(tmp_path):
    (tmp_path / "list.csv").write_text("label,image\nl.nii,a.nii\n")
    with pytest.raises(ValueError, match="put the label first"):
        data.read_list(tmp_path / "list.csv")


def test_a_line_without_a_path_that_is_not_the_first_stays_a_case(tmp_path):
    (tmp_path / "list.csv").write_text("image\ncase1\ncase2\n")
    assert names_of(data.read_list(tmp_path / "list.csv"), tmp_path) == ["case1", "case2"]


@pytest.mark.parametrize("name, told", [
    ("a.nii.gz b.nii.gz", "looks like two names; separate image and label by a tab or comma"),
    ("C:/data/a.nii.gz", "is a path of Windows; .* --data_root"),
    ("D:\\data\\a.nii.gz", "is a path of Windows; .* --data_root"),
    ("~/data/a.nii.gz", "begins with ~, which no list can; write the folder in full"),
    ("https://host/a.nii.gz", "is an address; download it, and name the file"),
])
def test_a_name_that_can_be_no_file_here_is_told_by_its_kind(name, told, tmp_path):
    (tmp_path / "list.txt").write_text(f"{name}\n")
    for path in (tmp_path / "list.txt", write_list(tmp_path, training=[name])):
        with pytest.raises(ValueError, match=f"^{path}: '.*' {told}"):
            data.read_list(path)


def test_a_file_with_a_space_after_its_suffix_is_a_case(tmp_path):
    touch(tmp_path, "a.nii copy.nii")
    (tmp_path / "list.txt").write_text("a.nii copy.nii\n")
    assert names_of(data.read_list(tmp_path / "list.txt"), tmp_path) == ["a.nii copy.nii"]


@pytest.mark.parametrize("listed, there", [("NFC", "NFD"), ("NFD", "NFC")])
def test_accents_of_either_form_of_unicode_are_found_and_told(listed, there, tmp_path, capsys):
    images, labels = (unicodedata.normalize(there, name) for name in ("é/ü.nii", "é/ö.nii"))
    touch(tmp_path, images, labels)
    named = [unicodedata.normalize(listed, name) for name in ("é/ü.nii", "é/ö.nii")]
    path = write_list(tmp_path, training=[{"image": named[0], "label": named[1]}])
    (case,) = data.read_list(path)
    assert [case["image"], case["label"]] == [str(tmp_path / images), str(tmp_path / labels)]
    assert f"found in the form {there}" in capsys.readouterr().err


def test_more_columns_than_two_are_refused(tmp_path):
    (tmp_path / "list.csv").write_text("a.nii,l.nii,0\n")
    with pytest.raises(ValueError, match="more columns than an image and its label"):
        data.read_list(tmp_path / "list.csv")


def test_a_case_without_an_image_is_told_by_the_keys_that_it_has(tmp_path):
    path = write_list(tmp_path, training=[{"img": "a.nii", "seg": "l.nii"}])
    with pytest.raises(ValueError, match="has the keys .'img', 'seg'.; name its file 'image'"):
        data.read_list(path)

    (tmp_path / "a.nii").write_bytes(hostile.plain())
    path = write_list(tmp_path, training=[{"image": "a.nii", "mask": "l.nii"}])
    with pytest.raises(ValueError, match="a.nii: has no label, only the keys 'image', 'mask'; name "
                                         "it in the list as 'label'"):
        data.check_cases(data.read_list(path), labels=True)

    path = write_list(tmp_path, training=[{"image": ["a.nii"], "label": ["l.nii"]}])
    assert names_of(data.read_list(path), tmp_path) == ["a.nii"]       # MONAI's list of one channel
    with pytest.raises(ValueError, match="no path of one image"):
        data.read_list(write_list(tmp_path, training=[None]))


def test_an_image_as_its_own_label_is_refused_and_one_label_of_two_images_is_told(
    tmp_path, capsys
):
    path = write_list(tmp_path, training=[{"image": "a.nii", "label": "./a.nii"}])
    with pytest.raises(ValueError, match="a.nii is listed as its own label"):
        data.read_list(path)
    cases = [{"image": f"{name}.nii", "label": "l.nii"} for name in "ab"]
    assert len(data.read_list(write_list(tmp_path, training=cases))) == 2
    assert "labels are those of more than one image (l.nii)" in capsys.readouterr().err


def test_a_case_in_training_and_validation_is_refused_whatever_its_label_is_called(tmp_path):
    touch(tmp_path, "a.nii", "b.nii", "l.nii", "m.nii")
    (tmp_path / "link.nii").symlink_to("a.nii")
    path = write_list(tmp_path, training=[{"image": "a.nii", "label": "l.nii"},
                                          {"image": "b.nii", "label": "l.nii"}],
                      validation=[{"image": "link.nii", "label": "m.nii"}])
    args = finetune.parse_arguments(["--data", str(path)])

    with pytest.raises(ValueError, match="link.nii: to train on, and held back as well, 1 of 1"):
        labelled.find_cases(args, args.data)


def test_an_empty_file_and_one_packed_twice_are_named_so(tmp_path):
    (tmp_path / "zero.nii.gz").write_bytes(b"")
    with pytest.raises(data.BadVolume, match="is empty, 0 bytes; copy it again"):
        data.cases.read_header(tmp_path / "zero.nii.gz")
    (tmp_path / "twice.nii.gz").write_bytes(gzip.compress(gzip.compress(bytes(1000))))
    with pytest.raises(data.BadVolume, match="is packed twice; unpack it once with gunzip"):
        data.cases.read_header(tmp_path / "twice.nii.gz")


# ---------------------------------------------------------------------------- splits to validate on
def find_cases(path, *flags):
    """The names of cases to train on and of those held back, as finetune.py finds them."""
    args = finetune.parse_arguments(["--data", str(path), *flags])
    return [[os.path.basename(case["image"]) for case in part]
            for part in labelled.find_cases(args, args.data)[:2]]


def test_the_test_files_of_nnunet_can_be_validated_on(tmp_path):
    path = write_list(tmp_path, **NNUNET)
    for part, names in (("Tr", "ab"), ("Ts", "t")):
        for name in names:
            touch(tmp_path, f"images{part}/{name}_0000.nii.gz", f"labels{part}/{name}.nii.gz")
    train, held_back = find_cases(path, "--val_key", "test")
    assert held_back == ["t_0000.nii.gz"] and train == ["a_0000.nii.gz", "b_0000.nii.gz"]

    moved = write_list(tmp_path / "jsons", **NNUNET)
    assert not data.has_split(moved, "test") and data.has_split(moved, "test", tmp_path)
    named = write_list(tmp_path, "named.json", **NNUNET, test=[])
    assert not data.has_split(named, "test") and data.has_split(named, "training")


def test_a_val_key_that_no_list_has_is_refused_and_a_random_share_is_told(tmp_path, capsys):
    path = write_list(tmp_path, training=["a.nii", "b.nii"], val=["c.nii"], validation=[])
    with pytest.raises(ValueError, match="no cases under 'validaton', the --val_key; the keys "
                                         "with cases are 'training', 'val'; name one"):
        find_cases(path, "--val_key", "validaton")
    assert find_cases(path, "--val_key", "val")[1] == ["c.nii"]
    assert "random" not in capsys.readouterr().err

    assert len(find_cases(path)[1]) == 1
    told = capsys.readouterr().err
    assert "no list has cases under 'validation': 1 of 2, drawn at random" in told
    (tmp_path / "list.txt").write_text("a.nii\tl.nii\n")
    with pytest.raises(ValueError, match="the --val_key; no key has cases"):
        find_cases(tmp_path / "list.txt", "--val_key", "test")


def test_a_name_that_is_no_utf_8_is_refused_as_that(tmp_path):
    (tmp_path / os.fsdecode(b"caf\xe9.nii.gz")).touch()
    with pytest.raises(ValueError, match=r"caf.udce9.nii.gz' is no UTF-8 .* rename the file"):
        data.read_list(tmp_path)
    with pytest.raises(ValueError, match="holds control characters"):
        data.read_list(write_list(tmp_path, training=["a\tb.nii"]))
