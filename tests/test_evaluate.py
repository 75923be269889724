"""evaluate.py: predictions on the scanner's grid, scores anyone can check,
and failures that are told."""
import csv
import hashlib
import json
import re
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

import evaluate
import finetune
from smit import data, inference, metrics, phantom, runtime, scoring, segment, transforms
from smit.data import organs

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
SMALL = (
    "--spacing 10 10 10 --crop 24 --embed_dim 8 --depths 1 1 --heads 2 2 --lr 1e-2 "
    "--workers 0 --log_every 1 "
    "--device cpu --crops_per_volume 2 --steps 2").split()


@pytest.fixture(scope="module")
def weights(phantoms, tmp_path_factory):
    """The best.pt of a short run on the phantoms."""
    out = tmp_path_factory.mktemp("weights")
    flags = [*SMALL, "--data", phantoms, "--out", out / "run", "--cache", out / "cache"]
    finetune.main(finetune.parse_arguments([str(flag) for flag in flags]))
    return out / "run" / "best.pt"


def run(*flags):
    evaluate.main(evaluate.parse_arguments([str(flag) for flag in (*flags, "--device", "cpu")]))


def rows(folder):
    with open(folder / "cases.csv", newline="") as file:
        return list(csv.DictReader(file))


def turn(array, affine, axes):
    """The volume (X, Y, Z) stored with other axes, e.g. "LPS": (array, affine)."""
    change = nib.orientations.ornt_transform(nib.io_orientation(affine),
                                             nib.orientations.axcodes2ornt(axes))
    there = affine @ nib.orientations.inv_ornt_aff(change, array.shape)
    return nib.orientations.apply_orientation(array, change), there


def test_predictions_of_one_volume_are_the_same_in_space_however_it_is_stored(
        weights, phantoms, tmp_path):
    source = nib.load(phantoms.parent / "imagesTr" / "phantom0004.nii.gz")
    tilt = nib.affines.from_matvec(nib.eulerangles.euler2mat(.1, .05, -.08))
    for axes in ("RAS", "LPS", "PIR", "LAS"):  # the last one is mirrored: determinant < 0
        array, affine = turn(np.asarray(source.dataobj), source.affine, axes)
        nib.save(nib.Nifti1Image(array, affine), tmp_path / f"{axes}.nii.gz")
        nib.save(nib.Nifti1Image(array, tilt @ affine), tmp_path / f"{axes}-oblique.nii.gz")
    run("--weights", weights, "--data", tmp_path, "--out", tmp_path / "out")
    reference = np.asarray(nib.load(tmp_path / "out" / "RAS.nii.gz").dataobj)

    assert len(np.unique(reference)) > 1 and reference.dtype == np.uint8
    for path in sorted(tmp_path.glob("*.nii.gz")):
        given, made = nib.load(path), nib.load(tmp_path / "out" / path.name)
        assert made.shape == given.shape and np.array_equal(made.affine, given.affine)
        assert all(made.header[code] == given.header[code] for code in ("qform_code", "sform_code"))
        plain = nib.load(tmp_path / f"{path.name[:3]}.nii.gz")
        assert np.array_equal(turn(np.asarray(made.dataobj), plain.affine, "RAS")[0],
                              reference), path.name


def round_trip(case, spacing):
    """Dice per organ of a label pushed through preparation and back."""
    settings = data.Preparation(spacing)
    made = data.load_case(case, settings, with_label=True)
    logits = made["label"] == torch.arange(14).view(-1, 1, 1, 1)
    back = transforms.to_file_grid(logits, made["affine"], made["original_shape"],
                                   made["original_affine"])
    return metrics.dice(back, data.read_label(case["label"])[0], 14)


def test_a_label_survives_preparation_and_the_way_back(tmp_path):
    path = phantom.write_dataset(tmp_path, 1, spacing_mm=(3., 2.5, 4.))
    dice = round_trip(data.read_list(path)[0], (1.5, 1.5, 2.))
    assert dice[5] > .97 and np.nanmin(dice) > .85  # the liver; the smallest organ


@pytest.mark.skipif(not (SHARED / "btcv").is_dir(), reason="no BTCV here")
def test_a_real_liver_survives_preparation_and_the_way_back():
    assert round_trip(data.read_list(SHARED / "btcv" / "dataset.json", "validation")[0],
                      (1.5, 1.5, 2.))[5] > .95


def test_the_arg_max_comes_after_resampling():
    # class 1 wins on the right
    logits = torch.tensor([[0., 0.], [-1., 4.]])[:, :, None, None].expand(2, 2, 3, 2)
    label = transforms.to_file_grid(logits, np.eye(4), (11, 3, 2), np.diag([.25, 1., 1., 1.]))
    # from .2 on; nothing from 2 on
    assert label[:, 0, 0].tolist() == [0, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0]


def test_tta_averages_the_turns_of_training_and_undoes_them():
    class Net(torch.nn.Module):  # equivariant but for a term that marks its axis
        def forward(self, x):
            return torch.cat([x, x * torch.arange(x.shape[2])[:, None, None]], 1)
    image = np.random.default_rng(0).integers(0, 255, (6, 6, 4), dtype=np.uint8)
    x = torch.from_numpy(image) / 255
    plain, turned = (segment.predict(Net(), image, (6, 6, 4), turns) for turns in ((0,), range(4)))
    torch.testing.assert_close(plain[0], x), torch.testing.assert_close(turned[0], x)

    torch.testing.assert_close(turned[1], x * 2.5)  # the mean of i, 5 - j, 5 - i and j


def test_scores_are_those_of_the_metrics_on_the_original_grid(weights, phantoms, tmp_path):
    run("--weights", weights, "--data", phantoms, "--out", tmp_path / "out", "--tta",
        "--blend", "constant")
    case = data.read_list(phantoms, "validation")[0]
    truth, affine = data.read_label(case["label"])
    made = data.read_label(tmp_path / "out" / Path(case["image"]).name, allow_empty=True)[0]
    found, spacing = rows(tmp_path / "out"), transforms.spacing_of(affine)

    assert [row["organ"] for row in found] == list(phantom.ORGANS)
    for i, row in enumerate(found, 1):
        assert float(row["dice"]) == pytest.approx(metrics.dice(made, truth, 14)[i - 1], rel=1e-5)
        assert float(row["hd95_mm"]) == pytest.approx(
            metrics.hd95(made == i, truth == i, spacing), rel=1e-5)

    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["weights_sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert results["n"] == 1 and results["tta"]
    assert (results["overlap"] == .5 and results["blend"] == "constant"
            and results["spacing"] == [10, 10, 10])


def test_several_networks_vote_and_the_record_says_so(weights, phantoms, tmp_path):
    state = runtime.load_checkpoint(weights)
    torch.manual_seed(1)
    state["model"] = {name: w + .3 * torch.randn_like(w) for name, w in state["model"].items()}
    state["config"] = {**state["config"], "train": ["phantom0004.nii.gz"],
                       "held_back": ["phantom0001.nii.gz"]}
    runtime.save_checkpoint(tmp_path / "other.pt", state)
    scan, pair = (phantoms.parent / "imagesTr" / "phantom0004.nii.gz",
                  [weights, tmp_path / "other.pt"])
    run("--weights", *pair, "--data", scan, "--out", tmp_path / "both")
    label = np.asarray(nib.load(tmp_path / "both" / scan.name).dataobj)
    nets = [inference.load_network(path) for path in pair]
    alone = [inference.segment(net, scan).numpy() for net in nets]
    assert np.array_equal(label, inference.segment(nets, scan)) and not np.array_equal(*alone)

    results = json.loads((tmp_path / "both" / "results.json").read_text())
    assert results["models"] == 2 and results["weights"] == [str(path) for path in pair]
    assert results["weights_sha256"] == [hashlib.sha256(path.read_bytes()).hexdigest()
                                         for path in pair]
    assert results["seen_in_training"] == ["phantom0004"]                   # by one of them
    with pytest.raises(ValueError, match="none of .* was held back"):       # no case is new to both
        run("--weights", *pair, "--data", phantoms, "--key", "training", "--held_out",
            "--out", tmp_path / "none")

    state["config"]["spacing"] = [9., 9., 9.]
    runtime.save_checkpoint(tmp_path / "other.pt", state)
    with pytest.raises(ValueError, match="different spacing cannot be averaged"):
        run("--weights", *pair, "--data", scan, "--out", tmp_path / "none")


def test_the_table_has_the_papers_columns_and_averages():
    scores = {name: (i + 1) / 20 for i, name in enumerate(organs.CODES)}
    made = [{"case": case, "organ": name, "dice": score + more, "hd95_mm": 1.}
            for case, more in (("a", 0), ("b", .1)) for name, score in scores.items()]
    summary = scoring.summary(made, "dice")

    assert list(summary) == "SP RK LK GB ESO LV STO AOR IVC SPV Pan RA LA AG AVG AVG12".split()
    assert (summary["AG"]["mean"] == pytest.approx(.675)
            and summary["AVG"]["mean"] == pytest.approx(.40))
    assert summary["AVG12"]["mean"] == pytest.approx(
        (sum(range(1, 12)) / 20 + 11 * .05 + .675) / 12)
    assert (list(scoring.columns(made[:3], "dice"))
            == ["spleen", "right kidney", "left kidney", "AVG"])


def test_misses_are_counted_and_left_out_of_the_mean_distance():
    values = (3., float("inf"), float("nan"), 5.)
    made = [{"case": str(i), "organ": "liver", "hd95_mm": value, "dice": 0.}
            for i, value in enumerate(values)]
    cell = scoring.summary(made, "hd95_mm")["liver"]
    assert (cell["mean"], cell["n"], cell["misses"]) == (4, 2, 1)
    # where Dice is 0, the organ may have been found beside its place
    assert scoring.summary(made, "dice")["AVG"]["misses"] == 1


def test_an_average_and_its_interval_are_of_one_kind():
    # an organ in one case of ten, where it is missed: the mean of organs is far below that of cases
    made = [{"case": str(i), "organ": "liver", "dice": .9 + i / 100, "hd95_mm": 1.}
            for i in range(10)]
    made.append({"case": "0", "organ": "spleen", "dice": .1, "hd95_mm": 9.})
    average = scoring.summary(made, "dice")["AVG"]
    assert average["mean"] == pytest.approx((.945 + .1) / 2)
    # a draw without case 0 (a third of them) has the liver alone, one with it the mean of both
    assert average["low"] == pytest.approx(.52, abs=.01) and average["high"] > .95
    assert average["low"] < average["mean"] < average["high"]


def test_one_case_has_no_interval():
    cells = scoring.summary([{"case": "a", "organ": "liver", "dice": .8, "hd95_mm": 1.}], "dice")
    assert {scoring.interval_text(cell, 3) for cell in cells.values()} == {"-"}


@pytest.mark.parametrize("name, known", [
    ("Right_Kidney", "right kidney"), ("kidney_right", "right kidney"), ("arota", "aorta"),
    ("Bladder", "bladder"), ("postcava", "inferior vena cava"),
    ("gall bladder", "gallbladder"), ("lad", "left adrenal gland"),
    ("portal_vein_and_splenic_vein", "portal and splenic veins")])
def test_organs_are_known_by_their_other_names(name, known):
    assert organs.organ(name) == known


@pytest.mark.parametrize("names, known", [
    ("LV LA RA Aorta LAD", ["lv", "la", "ra", "aorta", "lad"]),              # a heart
    ("esophagus veins", ["esophagus", "veins"]),
    ("LV RK LA", ["liver", "right kidney", "left adrenal gland"]),           # the paper's
    ("Spleen lad rad", ["spleen", "left adrenal gland", "right adrenal gland"])])   # FLARE's
def test_a_heart_s_chambers_are_no_liver_and_no_glands(names, known):
    numbered = dict(enumerate(["background", *names.split()]))
    assert [*organs.organ_ids(numbered, "dataset.json")] == known


@pytest.fixture
def other(phantoms, tmp_path):
    """Another system's folder: the labels, but for two organs' numbers exchanged,
    and a dataset.json that says so."""
    folder = tmp_path / "other"
    folder.mkdir()
    for case in data.read_list(phantoms):
        label = data.read_label(case["label"])[0]
        swapped = torch.where(label == 1, 6, torch.where(label == 6, 1, label))
        data.write_label(folder / Path(case["image"]).name, swapped, case["image"])
    names = dict(enumerate(("background", *phantom.ORGANS)))
    names[1], names[6] = names[6], names[1]
    (folder / "dataset.json").write_text(
        json.dumps({"labels": {name: i for i, name in names.items()}}))
    return folder


def test_organs_are_matched_by_name_not_by_number(other, phantoms, tmp_path):
    run("--predictions", other, "--labels", phantoms, "--key", "training",
        "--out", tmp_path / "out")
    assert all(float(row["dice"]) == 1 for row in rows(tmp_path / "out"))


def test_what_cannot_be_scored_is_told_and_the_rest_is_scored(other, phantoms, tmp_path, capsys):
    first, second, third, *_ = sorted(other.glob("*.nii.gz"))
    first.unlink()
    second.write_bytes(second.read_bytes()[:-20])
    label = np.asarray(nib.load(third).dataobj)
    nib.save(nib.Nifti1Image(label, np.diag([10., 10., 11., 1.])), third)

    with pytest.raises(ValueError, match="3 of 4 cases failed"):
        run("--predictions", other, "--labels", phantoms, "--key", "training",
            "--out", tmp_path / "out")

    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("not done")]
    assert (len(told) == 3 and "no prediction" in told[0] and "damaged" in told[1]
            and "affine" in told[2])
    assert {row["case"] for row in rows(tmp_path / "out")} == {"phantom0003"}


def test_volumes_without_labels_are_predicted_and_bad_ones_told(weights, phantoms, tmp_path):
    images = tmp_path / "images"
    shutil.copytree(phantoms.parent / "imagesTr", images)
    (images / "cut.nii.gz").write_bytes((images / "phantom0000.nii.gz").read_bytes()[:3000])
    with pytest.raises(ValueError, match="1 of 6 cases failed: cut"):
        run("--weights", weights, "--data", images, "--out", tmp_path / "out")
    assert len(list((tmp_path / "out").glob("*.nii.gz"))) == 5 and rows(tmp_path / "out") == []


def test_bad_cases_are_told_before_the_first_prediction_and_by_check_alone(
        weights, phantoms, tmp_path, capsys):
    first, second = (phantoms.parent / "imagesTr" / f"phantom000{n}.nii.gz" for n in (0, 1))
    listing = tmp_path / "list.txt"
    listing.write_text(f"absent.nii.gz\n{first}\tno_label.nii.gz\n{second}\n")
    with pytest.raises(ValueError, match="2 problems:\n.*absent.nii.gz.*\n.*no_label.nii.gz"):
        run("--weights", weights, "--data", listing, "--names", phantoms, "--out",
            tmp_path / "out", "--check")
    assert not (tmp_path / "out").exists()

    capsys.readouterr()
    with pytest.raises(ValueError, match="2 of 3 cases failed: absent, phantom0000"):
        run("--weights", weights, "--data", listing, "--names", phantoms,
            "--out", tmp_path / "out")

    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]
    assert len(told) >= 2 and "absent.nii.gz" in told[-2] and "no_label.nii.gz" in told[-1]
    assert len(list((tmp_path / "out").glob("*.nii.gz"))) == 2  # an image whose label is bad, too


def test_what_an_earlier_network_predicted_does_not_pass_for_this_ones(
        weights, phantoms, tmp_path, capsys):
    images, out = tmp_path / "images", tmp_path / "out"
    images.mkdir()
    names = [f"phantom000{n}.nii.gz" for n in range(3)]
    for name in names:
        shutil.copy(phantoms.parent / "imagesTr" / name, images)
    run("--weights", weights, "--data", images, "--out", out)
    assert [path.name for path in sorted(out.glob("*.nii.gz"))] == names

    (images / names[0]).unlink()
    (images / names[1]).write_bytes(b"cut short")
    capsys.readouterr()
    with pytest.raises(ValueError, match="1 of 2 cases failed: phantom0001"):
        run("--weights", weights, "--data", images, "--out", out)
    assert [path.name for path in sorted(out.glob("*.nii.gz"))] == [names[0], names[2]]
    assert f"out also holds 1 prediction of other cases ({names[0]})" in capsys.readouterr().err
    assert json.loads((out / "results.json").read_text())["predicted"] == [names[2]]


def test_the_networks_own_names_count_before_those_given(weights, phantoms, tmp_path, capsys):
    names = json.loads(phantoms.read_text())["labels"]
    shifted = {number: names[str(int(number) % 13 + 1)] for number in names if number != "0"}
    (tmp_path / "given.json").write_text(json.dumps({"labels": shifted}))
    for flags in ([], ["--names", tmp_path / "given.json"]):
        run("--weights", weights, "--data", phantoms, "--out", tmp_path / f"out{len(flags)}",
            *flags)
    assert rows(tmp_path / "out0") == rows(tmp_path / "out2")
    told = capsys.readouterr().err
    assert "the network of --weights: has names of its own" in told
    assert f"{phantoms}: has names of its own" in told


def listed(phantoms, path, cases=(0,)):
    """Write a text list of phantoms and their labels, which names no organs."""
    folder = phantoms.parent
    path.write_text("".join(f"{folder}/imagesTr/phantom000{n}.nii.gz\t"
                            f"{folder}/labelsTr/phantom000{n}.nii.gz\n" for n in cases))
    return path


def test_labels_that_no_name_can_match_are_refused_before_the_first_prediction(
        weights, phantoms, tmp_path, capsys):
    listing = listed(phantoms, tmp_path / "list.txt", (0, 1))
    flags = ["--weights", weights, "--data", listing, "--out", tmp_path / "out"]
    for more in ([], ["--check"]):
        with pytest.raises(ValueError, match=r"list.txt: no names for its numbers, .* --names$"):
            run(*flags, *more)
    assert not list(tmp_path.glob("out/*.nii.gz"))
    for name in (tmp_path / "gone.jsn", listing):
        with pytest.raises(ValueError, match="no such file|names no organ"):
            run(*flags, "--names", name)

    run(*flags, "--names", phantoms)
    assert {row["organ"] for row in rows(tmp_path / "out")} == set(phantom.ORGANS)
    assert len(json.loads((tmp_path / "out/results.json").read_text())["cases"]) == 2


def test_numbers_that_have_no_name_are_refused_by_check_and_before_the_first_prediction(
        weights, phantoms, tmp_path):
    source = nib.load(phantoms.parent / "labelsTr/phantom0001.nii.gz")
    label = np.asarray(source.dataobj).copy()
    label[3, 3, 3] = 200
    nib.save(nib.Nifti1Image(label, source.affine, source.header), tmp_path / "odd.nii.gz")
    names = json.loads(phantoms.read_text())["labels"]
    few = {number: names[number] for number in ("0", "1", "13")}
    case = {"image": str(phantoms.parent / "imagesTr/phantom0001.nii.gz"), "label": "odd.nii.gz"}
    listing = tmp_path / "list.json"
    for labels, numbers in ((names, "[200]"), (few, f"{[*range(2, 13), 200]}")):
        listing.write_text(json.dumps({"labels": labels, "validation": [case]}))
        refusal = re.escape(f"odd.nii.gz: no name for its numbers {numbers}; give the JSON that ")
        for more in ([], ["--check"]):
            with pytest.raises(ValueError, match=refusal):
                run("--weights", weights, "--data", listing, "--out", tmp_path / "out", *more)
    assert not list(tmp_path.glob("out/*.nii.gz"))


def test_a_check_tells_how_many_cases_have_no_label(weights, phantoms, tmp_path, capsys):
    image, label = (str(phantoms.parent / kind / "phantom0000.nii.gz")
                    for kind in ("imagesTr", "labelsTr"))
    content = {**json.loads(phantoms.read_text()), "validation": [{"image": image, "mask": label}]}
    (tmp_path / "list.json").write_text(json.dumps(content))
    run("--weights", weights, "--data", tmp_path / "list.json", "--check")
    told = capsys.readouterr().err
    assert "1 of 1 case without a label, to be predicted and not scored; a JSON names" in told

    run("--weights", weights, "--data", phantoms, "--check")
    assert "without a label" not in capsys.readouterr().err


def test_names_can_be_given_to_a_network_that_has_none(weights, phantoms, tmp_path):
    state = runtime.load_checkpoint(weights)
    state["config"]["labels"] = {}
    runtime.save_checkpoint(tmp_path / "nameless.pt", state)
    flags = ["--weights", tmp_path / "nameless.pt", "--data", phantoms, "--check"]
    with pytest.raises(ValueError, match="nameless.pt: no names for its numbers"):
        run(*flags)
    run(*flags, "--names", phantoms)


def test_what_is_odd_about_headers_is_told_of_all_files_before_the_first_prediction(
        weights, phantoms, tmp_path, capsys):
    source = nib.load(phantoms.parent / "imagesTr" / "phantom0000.nii.gz")
    source.set_sform(source.affine, 0)
    source.set_qform(source.affine, 0)
    for name in "abc":
        nib.save(source, tmp_path / f"{name}.nii.gz")
    run("--weights", weights, "--data", tmp_path, "--out", tmp_path / "out")
    told = [line for line in capsys.readouterr().err.splitlines() if "are unknown" in line]
    assert len(told) == 1 and "a.nii.gz: left and right" in told[0]
    assert "[2 more: b.nii.gz, c.nii.gz]" in told[0]


def test_a_list_of_another_modality_than_the_networks_is_told(weights, phantoms, tmp_path, capsys):
    content = {"modality": {"0": "MRI"},
               "validation": [str(phantoms.parent / "imagesTr" / "phantom0000.nii.gz")]}
    (tmp_path / "list.json").write_text(json.dumps(content))
    run("--weights", weights, "--data", tmp_path / "list.json", "--out", tmp_path / "out")
    assert "list.json: the list says MR, and it is read as CT" in capsys.readouterr().err


def test_an_output_that_is_not_finite_fails_its_case_and_not_the_run(weights, phantoms, tmp_path):
    state = runtime.load_checkpoint(weights)
    state["model"]["out.weight"] = torch.full_like(state["model"]["out.weight"], 3e38)
    runtime.save_checkpoint(tmp_path / "huge.pt", state)
    with pytest.raises(ValueError, match="1 of 1 case failed: phantom0004"):
        run("--weights", tmp_path / "huge.pt", "--data", phantoms, "--out", tmp_path / "out")
    failed = json.loads((tmp_path / "out/results.json").read_text())["failed"]
    assert "phantom0004.nii.gz: the network's output is not finite" in failed["phantom0004"]


def test_a_prediction_replaces_no_file_that_no_evaluation_wrote(weights, phantoms, tmp_path):
    images, labels = tmp_path / "imagesTr", tmp_path / "labelsTr"
    for folder in (images, labels):
        folder.mkdir()
        shutil.copy(phantoms.parent / folder.name / "phantom0000.nii.gz", folder)
    truth = (labels / "phantom0000.nii.gz").read_bytes()
    with pytest.raises(ValueError, match=r"would overwrite 1 file .* \(phantom0000.nii.gz\)"):
        run("--weights", weights, "--data", images, "--out", labels)
    assert (labels / "phantom0000.nii.gz").read_bytes() == truth

    for _ in range(2):                                   # its own it may replace
        run("--weights", weights, "--data", images, "--out", tmp_path / "out")
        (tmp_path / "out/results.json").unlink()         # as after a kill
    (tmp_path / "out/.written.json").unlink()
    with pytest.raises(ValueError, match="would overwrite"):
        run("--weights", weights, "--data", images, "--out", tmp_path / "out")


def test_an_image_is_seen_under_another_suffix_and_channel():
    seen = {"case0.nii.gz", "site/scan.nii"}
    same = {"/d/case0.nii", "imagesTs/case0_0000.nii.gz", "/x/site/scan_0000.nii.gz"}
    others = {"/d/case01.nii.gz", "/d/case0_0001.nii.gz", "other/scan.nii"}
    assert organs.those_among(same | others, seen) == same


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory"), MemoryError(),
    RuntimeError("DefaultCPUAllocator: can't allocate memory"), TypeError("a bug")])
def test_a_case_that_no_memory_holds_fails_by_itself(
        error, weights, phantoms, tmp_path, monkeypatch):
    segment = inference.segment

    def of_little_memory(nets, path, **options):
        if "large" in str(path):
            raise error
        return segment(nets, path, **options)

    monkeypatch.setattr(inference, "segment", of_little_memory)
    for name in ("a", "large", "z"):
        shutil.copy(phantoms.parent / "imagesTr" / "phantom0000.nii.gz",
                    tmp_path / f"{name}.nii.gz")
    with pytest.raises((ValueError, TypeError), match="1 of 3 cases failed: large|a bug"):
        run("--weights", weights, "--data", tmp_path, "--out", tmp_path / "out")
    assert (tmp_path / "out/z.nii.gz").exists() != isinstance(error, TypeError)
    if not isinstance(error, TypeError):
        (told,) = json.loads((tmp_path / "out/results.json").read_text())["failed"].values()
        assert "large.nii.gz: " in told and "give --stitch_on_cpu" in told


def test_an_evaluation_leaves_the_files_of_the_run_whose_folder_it_is_in(
        weights, phantoms, tmp_path):
    shutil.copytree(weights.parent, tmp_path / "run")
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()
              if not path.name.startswith(".")}
    assert {"index.html", "overlay.svg", "config.json"} <= before.keys()
    run("--weights", weights, "--data", phantoms, "--out", tmp_path / "run")
    for name, content in before.items():
        assert (tmp_path / "run" / name).read_bytes() == content, name
    assert "Segmentation." not in (tmp_path / "run/evaluation.html").read_text()


def test_cases_named_alike_are_told_apart_by_their_folders(weights, phantoms, tmp_path, capsys):
    for n in (1, 2):
        image = tmp_path / f"kits/case_{n}/imaging.nii.gz"
        image.parent.mkdir(parents=True)
        shutil.copy(phantoms.parent / "imagesTr" / f"phantom000{n}.nii.gz", image)
    state, path = runtime.load_checkpoint(weights), tmp_path / "weights.pt"
    state["config"] |= {"train": ["case_1/imaging.nii.gz"], "held_back": ["case_2/imaging.nii.gz"]}
    torch.save(state, path)
    run("--weights", path, "--data", tmp_path / "kits", "--out", tmp_path / "out")

    assert {file.name for file in (tmp_path / "out").glob("*.nii.gz")} == {
        "case_1.nii.gz", "case_2.nii.gz"}
    assert "same name as 1 of 2 cases: case_1\n" in capsys.readouterr().out


def test_a_btcv_submission_has_btcvs_names_and_numbers(weights, phantoms, tmp_path):
    image = tmp_path / "img0061.nii.gz"
    shutil.copy(phantoms.parent / "imagesTr" / "phantom0000.nii.gz", image)
    run("--weights", weights, "--data", image, "--out", tmp_path / "out",
        "--export_test", tmp_path / "test")
    assert [path.name for path in (tmp_path / "test").iterdir()] == ["label0061.nii.gz"]

    a, b = (nib.load(path).dataobj for path in (tmp_path / "test" / "label0061.nii.gz",
                                                tmp_path / "out" / image.name))
    assert np.array_equal(a, b)  # phantoms are numbered as BTCV

    other = shutil.copy(image, tmp_path / "img0062.nii.gz")
    with pytest.raises(ValueError, match="also holds 1 prediction of other cases .label0061.nii"):
        run("--weights", weights, "--data", other, "--out", tmp_path / "other",
            "--export_test", tmp_path / "test")


def test_a_network_without_names_has_no_submission():
    with pytest.raises(ValueError, match="have no names"):
        organs.btcv_numbers({}, ["img0061.nii.gz"])


def test_false_alarms_pair_with_nothing_and_are_counted(tmp_path, capsys):
    for name, dices in (("a", ("0.8", "0.7", "nan", "nan")), ("b", ("0.6", "nan", "0", "0"))):
        (tmp_path / name).mkdir()
        lines = [f"case{i},liver,{dice},1,1,1,1" for i, dice in enumerate(dices)]
        (tmp_path / name / "cases.csv").write_text(
            "\n".join([",".join(scoring.COLUMNS), *lines]) + "\n")
    run("--compare", tmp_path / "a", tmp_path / "b", "--out", tmp_path / "out")
    line = capsys.readouterr().out.splitlines()[2]
    assert line == "| liver | 1 | 0.800 | 0.600 | +0.200 | - | 1 | 1, 2 |"


def test_two_results_are_compared_case_by_case(tmp_path, capsys):
    for name, add in (("a", .1), ("b", .0)):
        (tmp_path / name).mkdir()
        lines = [f"case{i},liver,{.5 + i / 100 + add * (1 + i / 50)},1,1,1,1" for i in range(6)]
        (tmp_path / name / "cases.csv").write_text(
            "\n".join([",".join(scoring.COLUMNS), *lines]) + "\n")
    run("--compare", tmp_path / "a", tmp_path / "b", "--out", tmp_path / "out")
    line = capsys.readouterr().out.splitlines()[2]

    # 2 / 2^6
    assert "| liver | 6 | 0.630 | 0.525 | +0.105 |" in line and line.endswith("| 0.0312 | 0, 0 |")


@pytest.mark.parametrize("label_ml, told", [("100.2", False), ("900", True)])
def test_results_by_other_labels_are_compared_with_a_warning(label_ml, told, tmp_path, capsys):
    header = ["case", "organ", "dice", "label_ml"]
    for name, volume in (("a", "100"), ("b", label_ml)):
        (tmp_path / name).mkdir()
        lines = [",".join(header), f"case1,liver,.5,{volume}"]
        (tmp_path / name / "cases.csv").write_text("\n".join(lines) + "\n")
    run("--compare", tmp_path / "a", tmp_path / "b", "--out", tmp_path / "out")
    shown = capsys.readouterr().out
    assert ("labels are not the same ones" in shown) == told
    assert ("1 of 1 rows" in shown and "of liver in case1" in shown) == told


@pytest.mark.parametrize("part, why",
                         [("student", "no fine-tuned network"), ("cut", "refused"),
                          ("nan", "NaN"), ("wide", "do not fit")])
def test_wrong_weights_are_refused_in_one_line(part, why, weights, phantoms, tmp_path):
    state, path = runtime.load_checkpoint(weights), tmp_path / "weights.pt"
    if part == "student":
        state["config"].pop("num_classes")
    if part == "wide":
        state["config"]["embed_dim"] = 16
    if part == "nan":
        state["model"]["out.bias"][0] = float("nan")
    torch.save(state, path)
    if part == "cut":
        path.write_bytes(path.read_bytes()[:-100])

    with pytest.raises(ValueError, match=why) as refusal:
        run("--weights", path, "--data", phantoms, "--out", tmp_path / "out")
    assert "\n" not in str(refusal.value)


def test_images_are_never_overwritten(weights, phantoms):
    with pytest.raises(ValueError, match="overwrite"):
        run("--weights", weights, "--data", phantoms, "--out", phantoms.parent / "imagesTr")


def test_an_averages_interval_is_of_the_same_level_and_of_whole_cases():
    share = np.random.default_rng(0).random(12)
    def interval(**organs):
        made = [{"case": str(n), "organ": name, "dice": dice, "hd95_mm": 1.}
                for name, dices in organs.items() for n, dice in enumerate(dices)]
        summary = scoring.summary(made, "dice")
        return [[summary[name]["low"], summary[name]["high"]] for name in (*organs, "AVG")]
    liver, average = interval(liver=share)
    assert average == pytest.approx(liver) and liver[0] < liver[1]      # of one organ, its own
    # where one organ gains what the other loses, whole cases leave no doubt of the mean
    assert interval(liver=share, spleen=1 - share)[-1] == pytest.approx([.5, .5])
