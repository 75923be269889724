"""Older checkpoints, whose patch merging joins its neighbours in another order."""
import pytest
import torch
from torch.nn import functional as F

from smit import losses, pretrain, runtime, weights
from smit.baselines.unet import UNet3D
from smit.swin import PatchMerging, SwinTransformer3D


def old_merge(merge, x):
    """Merge as format 1 did: x (B, D, H, W, C) of even sides, neighbours in the release's order."""
    neighbours = [x[:, d::2, h::2, w::2] for d, h, w in weights.RELEASE]
    return merge.reduction(merge.norm(torch.cat(neighbours, dim=-1)))


def randomised(module):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.1)
    return module


def test_each_order_names_the_eight_neighbours_once():
    assert len(set(weights.RELEASE)) == len(set(weights.ROW_MAJOR)) == 8
    assert sorted(weights.RELEASE) == list(weights.ROW_MAJOR)


def test_an_old_merge_gives_the_same_bits_after_its_upgrade():
    old, new = randomised(PatchMerging(6)), PatchMerging(6)
    names = {f"encoder.stages.0.merge.{name}": w for name, w in old.state_dict().items()}
    upgraded, line = weights.upgrade(names, {"embed_dim": 6})
    assert "row-major" in line and "\n" not in line

    new.load_state_dict({name.split("merge.")[1]: w for name, w in upgraded.items()})
    x = torch.randn(2, 4, 6, 2, 6)
    eight = (0, 3, 2, 5, 1, 6, 4, 7)                   # of RELEASE, read row-major, by hand
    plain = torch.cat([x[:, d::2, h::2, w::2] for d, h, w in weights.ROW_MAJOR], dim=-1)
    weight = old.reduction.weight.view(12, 8, 6)[:, eight].flatten(1)
    norm = (p.view(8, 6)[eight, :].flatten() for p in (old.norm.weight, old.norm.bias))

    assert torch.equal(new(x), F.linear(F.layer_norm(plain, (48,), *norm), weight))
    torch.testing.assert_close(new(x), old_merge(old, x))                  # sums in another order


def test_an_old_encoder_answers_as_it_did(monkeypatch):
    torch.manual_seed(0)
    settings = dict(embed_dim=8, depths=(2, 2), heads=(2, 4), window=(2, 4, 3))
    old, new = randomised(SwinTransformer3D(**settings)), SwinTransformer3D(**settings)
    x = torch.rand(1, 1, 16, 8, 16)
    new.load_state_dict(weights.upgrade(old.state_dict(), {})[0])
    after = new(x)
    monkeypatch.setattr(PatchMerging, "forward", old_merge)

    for before, y in zip(old(x), after, strict=True):
        torch.testing.assert_close(y, before)


def test_only_merges_of_old_files_are_touched():
    encoder = randomised(SwinTransformer3D(embed_dim=8, depths=(1, 1), heads=(1, 1)))
    state = encoder.state_dict()
    before = {name: weight.clone() for name, weight in state.items()}
    upgraded, _ = weights.upgrade(state, {})
    changed = {name for name in state if not torch.equal(upgraded[name], state[name])}

    assert changed == {name for name in state if ".merge." in name} and len(changed) == 6
    assert all(torch.equal(state[name], before[name]) for name in state)   # left alone
    assert weights.upgrade(state, {"format": 2}) == (state, None)
    for unknown in (3, "2", None):
        with pytest.raises(ValueError, match="format"):
            weights.upgrade(state, {"format": unknown})


SIZES = dict(embed_dim=8, depths=[1, 1], heads=[1, 1], window=[4, 4, 4])


@pytest.mark.parametrize("sizes, lie, why", [
    (SIZES, {}, None), (SIZES, {"embed_dim": 2 ** 14}, "not 1 in 100"),
    (SIZES, {"window": [999] * 3}, "not 1 in 100"),
    (SIZES, {"depths": [10 ** 9, 1]}, "1000000001 blocks"),
    (SIZES, {"imported": {"habits": ["attended_padding"], "mlp_ratio": 4}}, None),
    (SIZES, {"imported": {"mlp_ratio": 10 ** 6}}, "not 1 in 100"),
    (SIZES, {"imported": {"num_classes": 3}}, "a dict of patch, mlp_ratio, qkv_bias, habits alone"),
    (SIZES, {"imported": "mlp_ratio"}, "a dict of"),
    (SIZES, {"imported": {"habits": ["telepathy"]}}, "make no encoder"),
    (SIZES, {"depths": 3}, "make no encoder"), (SIZES, {"embed_dim": 10 ** 18}, "make no encoder"),
    ({"width": 8}, {}, None), ({"width": 8}, {"width": 2 ** 14}, "not 1 in 100")])
def test_a_run_whose_sizes_are_not_those_of_its_weights_is_refused_before_it_is_built(
        sizes, lie, why, tmp_path):
    network = "unet" if "width" in sizes else "swin"
    encoder = UNet3D(**sizes).encoder if network == "unet" else SwinTransformer3D(**sizes)
    model = {f"encoder.{name}": w for name, w in encoder.state_dict().items()}
    model.pop("encoder.norms.0.bias", None)                    # it may lack tensors
    config = {"network": network, **sizes, **lie, "format": 2}
    runtime.save_checkpoint(tmp_path / "student.pt", {"model": model, "config": config})
    if why is None:
        assert weights.read_run(tmp_path / "student.pt", "student", sizes)[0].keys() == model.keys()
        return
    with pytest.raises(ValueError, match=f"student.pt: .*{why}") as refusal:
        weights.read_run(tmp_path / "student.pt", "student", sizes)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("value", [torch.zeros(9), torch.tensor(1.0), [0.0] * 8])
def test_a_centre_that_is_not_of_the_runs_prototypes_is_refused(value, tmp_path):
    student = pretrain.SMIT(SIZES, voxel_head=None, image_head=False, head_width=8, bottleneck=8,
                            prototypes=8)
    runtime.save_checkpoint(tmp_path / "last.pt", {
        "student": student.state_dict(), "centers": {"mpd.value": value},
        "config": {**SIZES, "format": 2}})
    start = weights.read_start(tmp_path / "last.pt")
    with pytest.raises(ValueError, match="centre of mpd has (9|1|no) prototypes .* 8 here"):
        weights.begin(start, student, None, {"mpd": losses.Center(8)})
