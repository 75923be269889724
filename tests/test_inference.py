"""smit.inference: three lines of Python give what the scripts give."""
import shutil

import nibabel as nib
import numpy as np
import pytest
import torch

import evaluate
import finetune
from foreign import monai_encoder
from smit import data, inference, runtime, segment, transforms, weights
from smit.swin import SwinTransformer3D
from smit.weights import __main__ as command

SMALL = (
    "--spacing 10 10 10 --crop 24 --embed_dim 8 --depths 1 1 --heads 2 2 --lr 1e-2 "
    "--workers 0 --log_every 1 "
    "--device cpu --crops_per_volume 2 --steps 2").split()


@pytest.fixture(scope="module")
def networks(phantoms, tmp_path_factory):
    """The best.pt of two short runs on the phantoms, with other seeds."""
    out, paths = tmp_path_factory.mktemp("networks"), []
    for seed in range(2):
        flags = [*SMALL, "--data", phantoms, "--out", out / str(seed),
                 "--cache", out / "cache", "--seed", seed]
        finetune.main(finetune.parse_arguments([str(flag) for flag in flags]))
        paths.append(out / str(seed) / "best.pt")
    return paths


@pytest.fixture(scope="module")
def scan(phantoms):
    return phantoms.parent / "imagesTr" / "phantom0004.nii.gz"


@pytest.fixture
def student(tmp_path):
    """The path of a student of random weights, and its encoder."""
    torch.manual_seed(0)
    sizes = dict(embed_dim=8, depths=[1, 1], heads=[2, 2], window=[4, 4, 4])
    encoder = SwinTransformer3D(**sizes)
    config = {**sizes, "format": 2, "spacing": [9.0, 9.0, 12.0], "modality": "ct",
              "hu_window": [-175.0, 250.0]}
    model = {f"encoder.{name}": w for name, w in encoder.state_dict().items()}
    runtime.save_checkpoint(tmp_path / "student.pt", {"model": model, "config": config})
    return tmp_path / "student.pt", encoder


def test_a_label_from_python_is_the_one_that_evaluate_writes(networks, scan, tmp_path):
    evaluate.main(evaluate.parse_arguments(["--weights", str(networks[0]), "--data", str(scan),
                                            "--out", str(tmp_path), "--device", "cpu"]))
    written = np.asarray(nib.load(tmp_path / scan.name).dataobj)
    net = inference.load_network(networks[0])
    label = inference.segment(net, scan)
    assert len(np.unique(written)) > 1 and np.array_equal(label.numpy(), written)

    image = nib.load(scan)
    assert torch.equal(inference.segment(net, image.get_fdata(), image.affine), label)
    assert (not net.training and net.config["crop"] == [24, 24, 24]
            and net.preparation.spacing_mm == (10, 10, 10))


@pytest.mark.parametrize("count", [1, 2])
def test_an_output_that_is_not_finite_is_no_label(networks, scan, count):
    nets = [inference.load_network(path) for path in networks[:count]]
    with torch.no_grad():
        next(nets[-1].parameters()).fill_(float("nan"))
    with pytest.raises(ValueError, match="not finite: use --precision fp32"):
        inference.segment(nets, scan)


def test_several_networks_vote_with_their_mean_softmax(networks, scan):
    nets = [inference.load_network(path) for path in networks]
    case = data.load_case({"image": str(scan), "label": None}, nets[0].preparation)
    image = case["image"].numpy()
    softmax = [segment.predict(net, image, (24, 24, 24)).softmax(0) for net in nets]
    scores = inference.class_scores(nets, image)

    torch.testing.assert_close(scores, (softmax[0] + softmax[1]) / 2)
    torch.testing.assert_close(scores.sum(0), torch.ones(scores.shape[1:]))

    expected = transforms.to_file_grid(scores, case["affine"], case["original_shape"],
                                       case["original_affine"])
    assert torch.equal(inference.segment(nets, scan), expected)

    nets[1].config = {**nets[1].config, "labels": {1: "liver"}}
    with pytest.raises(ValueError, match="different labels cannot be averaged"):
        inference.segment(nets, scan)


def test_features_are_the_encoders_on_the_prepared_volume(student, scan):
    path, source = student
    encoder = inference.load_encoder(path)
    maps, affines = inference.features(encoder, scan)
    case = data.load_case({"image": str(scan), "label": None},
                          transforms.Preparation((9., 9., 12.)))
    with torch.no_grad():
        outputs = source.eval()(case["image"][None, None] / 255)
    assert all(torch.equal(mine, theirs[0]) for mine, theirs in zip(maps, outputs, strict=True))
    assert not encoder.training and "missing 0; unexpected 0" in encoder.report
    only = inference.features(encoder, scan, wanted=[1]).maps
    assert only[0] is None and only[2] is None and torch.equal(only[1], maps[1])

    image = nib.load(scan)
    from_array = inference.features(encoder, image.get_fdata(), image.affine).maps
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(from_array, maps))


def test_a_token_lies_at_the_mean_of_its_voxels(student, scan):
    encoder = inference.load_encoder(student[0])
    grid = data.load_case({"image": str(scan), "label": None}, encoder.preparation)["affine"]
    affine = inference.features(encoder, scan, wanted=[1]).affines[1]  # tokens of 4^3 voxels
    voxels = torch.cartesian_prod(*[torch.arange(4.)] * 3).numpy() + [4, 0, 8]
    centre = np.mean([grid @ [*voxel, 1] for voxel in voxels], axis=0)
    np.testing.assert_allclose(affine @ [1, 0, 2, 1], centre)


def test_an_imported_encoder_asks_how_volumes_are_prepared(scan, tmp_path):
    torch.save(monai_encoder(), tmp_path / "monai.pt")
    encoder = inference.load_encoder(tmp_path / "monai.pt")
    with pytest.raises(ValueError, match="pass preparation="):
        inference.features(encoder, scan)

    maps = inference.features(encoder, scan,
                              preparation=transforms.Preparation((20., 20., 20.))).maps
    assert [len(y) for y in maps] == [12, 24, 48, 96, 192]


def test_published_weights_segment_as_the_checkpoint_does(networks, scan, tmp_path):
    from smit.weights import export
    (tmp_path / "net.safetensors").write_bytes(
        export.to_safetensors(weights.read_encoder(networks[0])))
    there, here = (inference.segment(inference.load_network(path), scan)
                   for path in (tmp_path / "net.safetensors", networks[0]))
    assert torch.equal(there, here)


def test_the_lines_that_are_shown_to_readers_run(student, networks, scan, tmp_path, monkeypatch):
    shown = "\n".join(line[4:] for line in inference.__doc__.splitlines()
                      if line.startswith("    "))
    for path, source in (("runs/ssl/student.pt", student[0]),
                         ("runs/finetune/best.pt", networks[0]), ("scan.nii.gz", scan)):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, tmp_path / path)
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(shown, names)

    assert (names["label"].shape == nib.load(scan).shape
            and len(names["maps"]) == len(names["affines"]) == 3)


@pytest.mark.parametrize("volume, affine, why",
                         [(np.zeros((4, 4)), np.eye(4), "give .X, Y, Z. and its affine"),
                          (np.zeros((4, 4, 4)), None, "its affine"),
                          (np.zeros((4, 4, 4), complex), np.eye(4), "complex128: give"),
                          (np.full((4, 4, 4), None), np.eye(4), "object: give"),
                          (np.full((4, 4, 4), np.nan), np.eye(4), "not finite"),
                          (np.ones((4, 4, 4)), np.zeros((4, 4)), "singular"),
                          ("absent.nii.gz", None, "absent.nii.gz")])
def test_a_volume_that_cannot_be_used_is_refused_in_one_line(volume, affine, why, student):
    with pytest.raises(ValueError, match=why) as refusal:
        inference.features(inference.load_encoder(student[0]), volume, affine)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("name, value, why", [
    ("crop", 7, "crop 7 is not three"), ("crop", [24, 24, 1e9], "crop"),
    ("crop", [4096] * 3, "voxels at most"), ("train", [["a"]], "train"), ("held_back", 3, "held"),
    ("num_classes", "14", "num_classes '14'"), ("labels", ["liver"], "labels"),
    ("labels", {"1": "liver"}, "labels"), ("spacing", 5, "how volumes are prepared"),
    ("hu_window", None, "how volumes are prepared"), ("modality", "us", "modality|us"),
    ("hu_window", [0, 1, 2], "how volumes are prepared"), ("hu_offset", "5", "hu_offset '5'"),
    ("depths", [10 ** 9, 1], "1000000001 blocks"), ("embed_dim", 2 ** 14, "matched")])
def test_a_network_whose_settings_are_not_its_own_is_refused_before_it_is_built(
        name, value, why, networks, tmp_path, monkeypatch):
    state = runtime.load_checkpoint(networks[0])
    state["config"][name] = value
    torch.save(state, tmp_path / "odd.pt")
    built = []
    monkeypatch.setattr(inference, "build_network", lambda config: built.append(
        torch.empty(0).device.type) or segment.build_network(config))
    with pytest.raises(ValueError, match=f"odd.pt: .*({why})") as refusal:
        inference.load_network(tmp_path / "odd.pt")
    assert "\n" not in str(refusal.value)
    # it was built without memory, if at all, but for settings that it does without
    assert built in ([], ["meta"]) or name in ("spacing", "hu_window", "hu_offset", "modality")


@pytest.mark.parametrize("name, value", [
    ("spacing", 5), ("hu_window", [7]), ("hu_window", "ab"), ("hu_offset", [])])
def test_an_encoders_odd_settings_are_refused_in_one_line(name, value, student, tmp_path):
    state = runtime.load_checkpoint(student[0])
    state["config"][name] = value
    torch.save(state, tmp_path / "odd.pt")
    with pytest.raises(ValueError, match="odd.pt: .*how volumes are prepared"):
        inference.load_encoder(tmp_path / "odd.pt")


def test_arrays_may_be_views_and_in_another_order_of_bytes(networks, scan):
    net, image = inference.load_network(networks[0]), nib.load(scan)
    volume = np.asarray(image.dataobj, dtype=np.float32)
    label = inference.segment(net, volume, image.affine)
    flipped = image.affine @ np.array([[-1, 0, 0, len(volume) - 1], [0, 1, 0, 0], [0, 0, 1, 0],
                                       [0, 0, 0, 1]])
    assert torch.equal(inference.segment(net, volume[::-1], flipped), label.flip(0))
    assert torch.equal(inference.segment(net, volume.astype(">f4"), image.affine), label)


def test_published_weights_score_as_those_that_they_were_made_of(networks, phantoms, tmp_path):
    shutil.copy(networks[0], tmp_path / "best.pt")
    command.main(command.parse_arguments([str(tmp_path / "best.pt"), "--to", "safetensors"]))
    for weights_path, out in ((tmp_path / "best.pt", "torch"),
                              (tmp_path / "best.safetensors", "published")):
        evaluate.main(evaluate.parse_arguments(["--weights", str(weights_path), "--data",
                                                str(phantoms), "--out", str(tmp_path / out),
                                                "--device", "cpu"]))
    assert (tmp_path / "torch/cases.csv").read_bytes() == (
        tmp_path / "published/cases.csv").read_bytes()
    inference.check_alike([inference.load_network(tmp_path / name)
                           for name in ("best.pt", "best.safetensors")])


def test_other_files_are_no_network(student, tmp_path):
    with pytest.raises(ValueError, match="no fine-tuned network"):
        inference.load_network(student[0])


def test_an_array_is_offset_as_a_file_is(scan):
    image, settings = nib.load(scan), transforms.Preparation((10., 10., 10.), hu_offset=-60.)
    there = inference.prepare_volume(scan, None, settings)
    here = inference.prepare_volume(image.get_fdata(), image.affine, settings)
    assert torch.equal(here["image"], there["image"])
    assert np.array_equal(here["affine"], there["affine"])
