"""weights.export: what is written for others is what was read,
and says what they need and no more."""
import re

import pytest
import torch

from foreign import monai_encoder, release_encoder
from smit import runtime, segment, weights
from smit.swin import SwinTransformer3D
from smit.weights import __main__ as command
from smit.weights import export

SIZES = dict(embed_dim=12, depths=[1, 1, 2, 1], heads=[2, 2, 2, 2], window=[4, 4, 4])
SETTINGS = {**SIZES, "format": 2, "spacing": [1.5, 1.5, 2.0], "modality": "ct",
            "hu_window": [-175.0, 250.0], "data": ["/home/anna/patients"],
            "train": ["anna.nii.gz"], "held_back": [], "num_classes": 3, "crop": [96] * 3,
            "labels": {1: "liver"}, "drop_path": 0.0, "checkpointing": False}


def student(path, **config):
    """A file such as train_ssl.py writes, with weights of order 1."""
    torch.manual_seed(0)
    encoder = SwinTransformer3D(**SIZES)
    for parameter in encoder.parameters():
        parameter.data += torch.randn_like(parameter) / parameter[0].numel() ** .5
    model = {f"encoder.{name}": w for name, w in encoder.state_dict().items()}
    runtime.save_checkpoint(path, {"model": model, "config": {**SETTINGS, **config}})
    return encoder


def run(*words):
    command.main(command.parse_arguments([str(word) for word in words]))


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("target", ["smit", "monai", "safetensors"])
def test_an_encoder_of_this_project_goes_out_and_comes_back_to_the_bit(target, tmp_path):
    encoder = student(tmp_path / "student.pt")
    run(tmp_path / "student.pt", "--to", target, "--out", tmp_path / "there")
    found = weights.read_encoder(tmp_path / "there")
    assert same(found.weights, encoder.state_dict()) and found.habits == []
    assert found.config["spacing"] == [1.5, 1.5, 2.0]
    assert b"anna" not in (tmp_path / "there").read_bytes()  # neither paths nor names of cases


@pytest.mark.parametrize("make, merge", [
    (monai_encoder, "monai-1.4"), (monai_encoder, "monai-1.5"), (release_encoder, None)])
@pytest.mark.parametrize("target", ["smit", "safetensors"])
def test_an_imported_encoder_keeps_its_habits(make, merge, target, tmp_path):
    torch.save(make(), tmp_path / "foreign.pt")
    first = weights.read_encoder(tmp_path / "foreign.pt", merge=merge)
    words = ["--merge", merge] if merge else []
    run(tmp_path / "foreign.pt", "--to", target, "--out", tmp_path / "here", *words)
    second = weights.read_encoder(tmp_path / "here")

    assert same(first.weights, second.weights)
    assert (first.habits, first.arguments) == (second.habits, second.arguments) and first.habits


def test_monais_own_names_come_back_to_the_bit(tmp_path):
    state = monai_encoder()
    torch.save(state, tmp_path / "monai.pt")
    found = weights.read_encoder(tmp_path / "monai.pt", merge="row-major")
    exported = export.to_monai(found)["state_dict"]

    assert {name for name in exported if name not in state} == {
        name.replace("bias_table", "index") for name in state if name.endswith("bias_table")}
    assert same({name: exported[name] for name in state}, state)


def test_where_monai_is_installed_its_strict_load_takes_the_export_and_computes_the_same(
        tmp_path, capsys):
    pytest.importorskip("einops")
    nets = pytest.importorskip("monai.networks.nets")
    encoder = student(tmp_path / "student.pt").eval()
    run(tmp_path / "student.pt", "--to", "monai", "--out", tmp_path / "monai.pt")
    told = capsys.readouterr().out
    assert "lets padded cells take part in the softmax" in told

    call = re.search(r"SwinUNETR\(.*\)", told)[0]
    net = eval(call, {"SwinUNETR": nets.SwinUNETR})  # as a reader would paste it
    # strict
    net.swinViT.load_state_dict(torch.load(tmp_path / "monai.pt", weights_only=True)["state_dict"])
    x, outputs = torch.rand(1, 1, 64, 64, 64), []
    for stage in encoder.stages:
        stage.merge.register_forward_hook(
            lambda module, given, y: outputs.append(y.permute(0, 4, 1, 2, 3)))
    encoder(x)

    for ours, theirs in zip([encoder.embed(x).permute(0, 4, 1, 2, 3), *outputs],
                            net.swinViT(x, normalize=False)):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("state, sizes, why", [
    (monai_encoder(), {}, "neighbours 010 and 001 twice"), (release_encoder(), {}, "wrong order"),
    (None, dict(embed_dim=8), "12 divides"), (None, dict(depths=[1, 1], heads=[2, 2]), "4 stages"),
    (None, dict(patch=4), "patches of 2 voxels; this encoder has 4, 12 and 4"),
])
def test_what_monai_cannot_compute_is_not_exported(state, sizes, why, tmp_path):
    if state is None:
        encoder = SwinTransformer3D(**{**SIZES, **sizes})
        state = {"model": {f"encoder.{name}": w for name, w in encoder.state_dict().items()},
                 "config": {**SETTINGS, **sizes}}
    torch.save(state, tmp_path / "file.pt")

    with pytest.raises(ValueError, match=why):
        run(tmp_path / "file.pt", "--to", "monai")
    assert [path.name for path in tmp_path.iterdir()] == ["file.pt"]


def test_a_fine_tuned_network_is_published_whole(tmp_path):
    net = segment.build_network(SETTINGS)
    runtime.save_checkpoint(tmp_path / "best.pt",
                            {"model": net.state_dict(), "config": SETTINGS, "step": 3})
    run(tmp_path / "best.pt", "--to", "safetensors")
    state = weights.read_file(tmp_path / "best.safetensors")

    assert same(state["model"], net.state_dict())
    assert state["config"]["labels"] == {1: "liver"} and state["config"]["train"] == []
    assert b"anna" not in (tmp_path / "best.safetensors").read_bytes()


def test_what_is_dropped_is_not_written(tmp_path):
    net = segment.build_network(SETTINGS)
    model = {**net.state_dict(), "extra.weight": torch.ones(3)}
    runtime.save_checkpoint(tmp_path / "best.pt", {"model": model, "config": SETTINGS})
    run(tmp_path / "best.pt", "--to", "smit", "--drop", "extra.")
    assert same(weights.read_file(tmp_path / "best.smit.pt")["model"], net.state_dict())


@pytest.mark.parametrize("state, merge, order", [
    (monai_encoder, "monai-1.4", "monai-1.4"), (monai_encoder, "monai-1.5", "row-major"),
    (release_encoder, "release", "row-major"), (None, None, "row-major")])
def test_a_published_encoder_tells_its_merge_order(state, merge, order, tmp_path):
    student(tmp_path / "file.pt")
    words = []
    if state:
        torch.save(state(), tmp_path / "file.pt")
        words = ["--merge", merge]
    run(tmp_path / "file.pt", "--to", "safetensors", *words)
    _, metadata = weights.safetensors_file.read(tmp_path / "file.safetensors")
    assert metadata["merge_order"] == order
    assert f"merge order: {order}, " in weights.read_encoder(tmp_path / "file.safetensors").report


@pytest.mark.parametrize("config", [
    '{"labels": {"liver": "1"}}', '{"lr": ' + "1" * 5000 + "}", "[" * 9999])
def test_odd_settings_in_a_published_file_are_refused_in_one_line(config, tmp_path):
    path = tmp_path / "odd.safetensors"
    path.write_bytes(weights.safetensors_file.encode({}, {"config": config}))
    with pytest.raises(ValueError, match="odd.safetensors: .*make it anew") as refusal:
        weights.read_file(path)
    assert "\n" not in str(refusal.value)


def test_the_formats_own_package_reads_what_is_published(tmp_path):
    package = pytest.importorskip("safetensors")
    encoder = student(tmp_path / "student.pt")
    run(tmp_path / "student.pt", "--to", "safetensors")
    with package.safe_open(tmp_path / "student.safetensors", "pt") as file:
        assert (file.metadata()["merge_order"] == "row-major"
                and file.metadata()["orientation"] == "RAS")
        assert same({name[8:]: file.get_tensor(name) for name in file.keys()}, encoder.state_dict())


def test_the_command_says_what_a_file_is_and_overwrites_nothing_it_reads(tmp_path, capsys):
    student(tmp_path / "student.pt")
    run(tmp_path / "student.pt")
    told = capsys.readouterr().out
    assert "a torch file with an encoder of this project under model.encoder" in told
    assert "embed_dim 12, depths [1, 1, 2, 1]" in told and "missing 0; unexpected 0" in told
    assert [path.name for path in tmp_path.iterdir()] == ["student.pt"]
    with pytest.raises(ValueError, match="is the file that is read"):
        run(tmp_path / "student.pt", "--to", "smit", "--out", tmp_path / "student.pt")
