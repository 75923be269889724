"""weights.reading: what becomes of other people's files, and that none is used in part."""
import numpy as np
import pytest
import torch

from foreign import monai_encoder, release_encoder
from smit import runtime, weights
from smit.swin import PatchMerging, SwinTransformer3D
from smit.weights import orders, reading

# One value of each of the four merges, at 5/8 of its memory, and the last one's root mean
# square, by MONAI 1.6.1 for foreign.monai_encoder() on RandomState(side).rand(1, 1, side,
# side, side); its merging of before 1.5 written anew
FINGERPRINTS = {
    ("monai-1.4", 64): [0.62321, -0.78655, -0.66617, -0.79343, 1.34939],
    ("monai-1.4", 96): [0.68262, -0.77391, -0.65153, -0.76297, 1.35145],
    ("monai-1.5", 64): [0.51177, -0.76987, -0.65272, -0.78718, 1.35088],
    ("monai-1.5", 96): [0.64469, -0.76123, -0.64486, -0.75195, 1.35279],
    ("row-major", 64): [0.47690, -0.79928, -0.64955, -0.80067, 1.35216],
    ("row-major", 96): [0.61775, -0.79087, -0.65814, -0.75438, 1.35262],
}


def save(path, state):
    torch.save(state, path)
    return path


def volume(side):
    return torch.from_numpy(np.random.RandomState(side).rand(1, 1, side, side, side)).float()


def merge_outputs(encoder, x):
    """What MONAI's SwinViT returns without its parameter-free norms:
    the embedding and each merge's output."""
    outputs = [encoder.embed(x)]
    hooks = [stage.merge.register_forward_hook(lambda module, given, y: outputs.append(y))
             for stage in encoder.stages]
    encoder(x)
    for hook in hooks:
        hook.remove()
    return [y.permute(0, 4, 1, 2, 3) for y in outputs]


@pytest.mark.parametrize("order, side", FINGERPRINTS)
@torch.no_grad()
def test_monais_encoder_computes_what_it_computed_there(order, side, tmp_path):
    encoder = weights.read_encoder(save(tmp_path / "monai.pt", monai_encoder()),
                                   merge=order).build()
    outputs = merge_outputs(encoder.eval(), volume(side))
    values = [y.flatten()[y.numel() * 5 // 8].item() for y in outputs[1:]]
    values.append(outputs[-1].square().mean().sqrt().item())
    assert values == pytest.approx(FINGERPRINTS[order, side], abs=2e-5)


@pytest.mark.parametrize("order", ["monai-1.4", "monai-1.5", "row-major"])
def test_where_monai_is_installed_the_outputs_are_equal(order, tmp_path):
    pytest.importorskip("einops")
    theirs = pytest.importorskip("monai.networks.nets.swin_unetr")

    class Before(theirs.PatchMergingV2):
        def forward(self, x):
            read = ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1), (0, 1, 0),
                    (0, 0, 1), (1, 1, 1))
            return self.reduction(
                self.norm(torch.cat([x[:, d::2, h::2, w::2] for d, h, w in read], -1)))

    merging = {"monai-1.4": Before, "monai-1.5": theirs.PatchMerging,
               "row-major": theirs.PatchMergingV2}[order]
    net = theirs.SwinTransformer(1, 12, (7, 7, 7), (2, 2, 2), (2, 2, 2, 2), (3, 6, 12, 24),
                                 downsample=merging)
    kept = net.load_state_dict(monai_encoder(), strict=False)
    assert (not kept.unexpected_keys
            and all(name.endswith("position_index") for name in kept.missing_keys))
    found = weights.read_encoder(save(tmp_path / "monai.pt", {"state_dict": net.state_dict()}),
                                 merge=order)
    for a, b in zip(merge_outputs(found.build(), volume(64)), net(volume(64), normalize=False),
                    strict=True):
        if order == "monai-1.5":  # its LayerNorms sum in another order
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        else:
            assert torch.equal(a, b)


@pytest.mark.parametrize("order", orders.ORDERS)
def test_merges_read_the_neighbours_that_their_weights_are_for(order):
    state = {"stages.0.merge.norm.weight": torch.arange(1., 9),
             "stages.0.merge.norm.bias": torch.arange(8.),
             "stages.0.merge.reduction.weight": torch.randn(2, 8)}
    merge = weights.habits.DuplicatedMerging(1) if order == "monai-1.4" else PatchMerging(1)
    permuted = orders.merges_row_major(state, orders.ORDERS[order])
    merge.load_state_dict({name.removeprefix("stages.0.merge."): w for name, w in permuted.items()})

    number = torch.arange(8.).view(1, 2, 2, 2, 1)                      # 4 d + 2 h + w
    read = torch.tensor([4. * d + 2 * h + w for d, h, w in orders.ORDERS[order]])
    normed = ((read - read.mean()) / (read.var(correction=0) + 1e-5).sqrt()
              * torch.arange(1., 9) + torch.arange(8.))
    torch.testing.assert_close(merge(number).flatten(),
                               state["stages.0.merge.reduction.weight"] @ normed)


def test_a_pretraining_file_of_monai_just_loads_and_every_tensor_is_accounted_for(tmp_path):
    state = {f"module.{name}": tensor
             for name, tensor in monai_encoder(mlp=("mlp.fc1", "mlp.fc2")).items()}
    state |= {"module.norm.weight": torch.ones(192),
              "module.rotation_head.weight": torch.ones(4, 192),
              "module.layers1.0.blocks.0.attn.relative_position_index":
                  torch.zeros(343, 343, dtype=torch.long)}
    found = weights.read_encoder(
        save(tmp_path / "model_swinvit.pt", {"state_dict": state, "epoch": 3}))

    assert found.arguments == dict(in_channels=1, embed_dim=12, depths=[2, 2, 2, 2],
                                   heads=[3, 6, 12, 24], window=[7, 7, 7], patch=2,
                                   mlp_ratio=4, qkv_bias=True)
    assert found.habits == ["no_patch_norm", "attended_padding", "cut_bias_index",
                            "duplicated_merge"]
    assert ("with MONAI's SwinViT under state_dict.module" in found.report
            and "fc1 and fc2" in found.report)
    assert "new: 360 (norms.0.weight" in found.report

    size = sum(p.numel() for p in found.build().parameters())
    assert (f"{size:,} of {size:,} matched; missing 0; unexpected 0; "
            f"left out {192 + 4 * 192 + 343 ** 2:,} (norm.weight, ") in found.report


def under(prefix, tensors):
    return {prefix + name: tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize("wrap", [
    lambda trunk: trunk,
    lambda trunk: {
        "state_dict": under("swinViT.", trunk)
        | {"encoder1.layer.conv1.conv.weight": torch.ones(2),
           "decoder5.up.weight": torch.ones(2), "out.bias": torch.ones(2)}},
    lambda trunk: {
        "net": under("module.backbone.swinViT.", trunk)
        | {"module.backbone.encoder10.w": torch.ones(1)}},
    lambda trunk: {
        "model": {f"encoder.{name.replace('.0.blocks', '.0.0.blocks')}": w
                  for name, w in trunk.items()}
        | {"encoder.mask_token": torch.ones(1, 12), "encoder.norm.bias": torch.ones(3),
           "out.conv.bias": torch.ones(1)}},
    lambda trunk: under("_orig_mod.module.swin_vit.", trunk),
], ids=["bare", "SwinUNETR", "SuPreM", "DAE", "compiled"])
def test_monais_encoder_is_found_within_whatever_wraps_it(wrap, tmp_path):
    plain = weights.read_encoder(save(tmp_path / "plain.pt", monai_encoder())).weights
    found = weights.read_encoder(save(tmp_path / "wrapped.pt", wrap(monai_encoder())))
    assert found.weights.keys() == plain.keys()
    assert all(torch.equal(found.weights[name], plain[name]) for name in plain)


@pytest.mark.parametrize("wrap", [
    lambda state: {"epoch": 1, "state_dict": state, "optimizer": {"state": {}}},
    lambda state: {
        "student": under("module.backbone.transformer.", state)
        | {"module.head.mlp.0.weight": torch.ones(2)},
        "teacher": under("backbone.transformer.", state)},
], ids=["2023", "HeartSubSeg"])
def test_the_authors_files_load_with_their_habits(wrap, tmp_path):
    state = release_encoder() | {"mask_token": torch.ones(1, 1, 8)}
    found = weights.read_encoder(save(tmp_path / "release.pt", wrap(state)))
    assert found.habits == ["attended_padding", "scattered_reverse"]
    assert found.arguments["depths"] == [1, 2] and found.arguments["qkv_bias"] is False

    encoder = found.build()
    assert torch.equal(encoder.mask_token, torch.ones(8))
    assert torch.equal(encoder.norms[1].bias, state["norm1.bias"])

    blocks = state["layers.0.downsample.norm.bias"].view(8, 8)  # 000 100 010 001 110 011 101 111
    assert torch.equal(encoder.stages[0].merge.norm.bias,
                       blocks[[0, 3, 2, 5, 1, 6, 4, 7]].flatten())


def student(path, **config):
    """A file such as train_ssl.py writes: its encoder, and the path."""
    torch.manual_seed(0)
    sizes = dict(embed_dim=8, depths=[1, 2], heads=[2, 2], window=[2, 4, 3])
    encoder = SwinTransformer3D(**sizes)
    for parameter in encoder.parameters():
        parameter.data += torch.randn_like(parameter)
    state = under("encoder.", encoder.state_dict()) | {"voxel_head.project.weight": torch.ones(3)}
    runtime.save_checkpoint(path, {"model": state, "config": {**sizes, "format": 2, **config}})
    return encoder, path


def test_a_student_of_this_project_comes_back_to_the_bit(tmp_path):
    encoder, path = student(tmp_path / "student.pt")
    found = weights.read_encoder(path)
    x = torch.rand(1, 1, 8, 16, 12)
    assert all(torch.equal(a, b) for a, b in zip(found.build()(x), encoder(x)))
    assert (found.habits == [] and "imported" not in found.settings()
            and found.arguments["window"] == [2, 4, 3])
    assert ("merge order: row-major" in found.report
            and "left out 3 (voxel_head.project.weight)" in found.report)


def test_a_student_of_format_1_has_its_merges_permuted(tmp_path):
    encoder, path = student(tmp_path / "student.pt", format=1)
    expected = weights.upgrade(encoder.state_dict(), {})[0]
    found = weights.read_encoder(path).weights
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert not torch.equal(found["stages.0.merge.norm.bias"],
                           encoder.state_dict()["stages.0.merge.norm.bias"])


def test_student_and_teacher_of_a_last_pt_are_told_apart(tmp_path):
    state = runtime.load_checkpoint(student(tmp_path / "student.pt")[1])
    teacher = {name: 2 * w for name, w in state["model"].items()}
    runtime.save_checkpoint(tmp_path / "last.pt", {
        "student": state["model"], "teacher": teacher, "config": state["config"]})
    of = {part: weights.read_encoder(tmp_path / "last.pt", part).weights["norms.0.bias"]
          for part in ("student", "teacher")}

    assert torch.equal(of["teacher"], 2 * of["student"])
    with pytest.raises(ValueError, match="no teacher in it; last.pt"):
        weights.read_encoder(tmp_path / "student.pt", "teacher")


def test_safetensors_are_read_as_torch_files_are(tmp_path):
    (tmp_path / "monai").write_bytes(weights.safetensors_file.encode(monai_encoder(), {}))
    found, plain = (weights.read_encoder(tmp_path / "monai"),
                    reading.read_encoder(save(tmp_path / "x.pt", monai_encoder())))
    assert all(torch.equal(found.weights[name], plain.weights[name]) for name in plain.weights)
    assert "safetensors with MONAI's SwinViT" in found.report


NAN = torch.full((12,), float("nan"))


@pytest.mark.parametrize("change, why", [
    (lambda state: state.pop("layers2.0.blocks.1.attn.qkv.bias"),
     r"missing 72 \(stages.1.blocks.1.attention.qkv.bias\)"),
    (lambda state: state.pop("patch_embed.proj.weight"), r"missing 96 \(patch_embed.weight\)"),
    (lambda state: state.pop("layers1.0.blocks.0.mlp.linear1.weight"),
     r"missing 576 \(stages.0.blocks.0.mlp.0.weight\)"),
    (lambda state: state.update({"layers2.0.blocks.1.attn.gate": torch.ones(5)}),
     r"unexpected 5 \(layers2.0.blocks.1.attn"),
    (lambda state: state.update({"layers4.0.downsample.norm.bias": torch.ones(760)}),
     "missing 768 .*unexpected 760"),
    (lambda state: state.update({"layers1.0.blocks.0.norm1.bias": NAN}), "holds NaN"),
    (lambda state: state.update({"patch_embed.proj.weight": torch.ones(12, 1, 2, 2)}),
     "3-D cubes"),
    (lambda state: state.update(
        {"layers1.0.blocks.0.attn.relative_position_bias_table": torch.ones(2196, 3)}),
     "2196 rows"),
    (lambda state: state.update({"layers1.0.blocks.0.mlp.fc1.bias": torch.ones(48)}),
     "two tensors for stages.0"),
    (lambda state: state.update({"layers1c.0.conv.weight": torch.ones(3)}), "use_v2=True"),
    (lambda state: [state.pop(name) for name in [*state] if "layers1" in name],
     "bias tables of stages|no stage"),
    (lambda state: [state.pop(name) for name in [*state] if "patch" in name],
     "0 patch embeddings"),
    (lambda state: state.update({"swinViT.patch_embed.proj.weight": torch.ones(1)}),
     "2 patch embeddings"),
    (lambda state: state.update({"step": 3}), "no weights under"),])
def test_a_file_that_is_not_whole_is_refused_in_one_line(change, why, tmp_path):
    state = monai_encoder()
    change(state)
    with pytest.raises(ValueError, match=why) as refusal:
        weights.read_encoder(save(tmp_path / "odd.pt", state))
    assert "\n" not in str(refusal.value) and "odd.pt" in str(refusal.value)


class Bomb:
    def __reduce__(self):
        return (print, ("this code was run",))


def test_code_lies_and_nothing_at_all_are_refused_in_one_line(tmp_path, capsys):
    save(tmp_path / "code.pt", {"state_dict": Bomb()})
    (tmp_path / "text.pt").write_text("weights")
    data = weights.safetensors_file.encode(monai_encoder(), {})
    (tmp_path / "cut.safetensors").write_bytes(data[:-9])
    student(tmp_path / "whole.pt")
    bare = runtime.load_checkpoint(tmp_path / "whole.pt")["model"]
    save(tmp_path / "bare.pt", bare)

    for name, why in (("code.pt", "asks to run"), ("text.pt", "refused"),
                      ("cut.safetensors", "bytes where"), ("absent.pt", "no regular file"),
                      ("bare.pt", "no settings beside the weights")):
        with pytest.raises(ValueError, match=why) as refusal:
            weights.read_encoder(tmp_path / name)
        assert "\n" not in str(refusal.value) and name in str(refusal.value)
    assert "this code was run" not in capsys.readouterr().out


@pytest.mark.parametrize("settings", [
    {"window": "abc"}, {"window": [4, 4]}, {"format": "new"}, {"format": 3}, {"imported": 3},
    {"imported": {"habits": ["telepathy"]}}, {"embed_dim": None, "window": 3}])
def test_settings_that_make_no_sense_are_refused_in_one_line(settings, tmp_path):
    with pytest.raises(ValueError, match="holds no pre-trained encoder") as refusal:
        weights.read_encoder(student(tmp_path / "odd.pt", **settings)[1])
    assert "\n" not in str(refusal.value)


def test_names_that_take_long_to_look_into_are_refused(tmp_path):
    tensors = under("module." * 2 ** 15, {"patch_embed.weight": torch.ones(1)})
    (tmp_path / "odd.safetensors").write_bytes(weights.safetensors_file.encode(tensors, {}))
    save(tmp_path / "odd.pt", {"state_dict": tensors})
    for name in ("odd.safetensors", "odd.pt"):
        with pytest.raises(ValueError, match=f"{name}.* a name of 229,394 letters") as refusal:
            weights.read_encoder(tmp_path / name)
        assert len(str(refusal.value)) < 1000

    deep = under("module." * 60, monai_encoder())
    assert "under " + "module." * 59 in weights.read_encoder(
        save(tmp_path / "deep.pt", deep)).report


@pytest.mark.parametrize("told, settings", [
    ("row-major", {}), ("release", {"format": 1}),
    ("monai-1.4", {"imported": {"habits": ["duplicated_merge"]}})])
def test_an_order_of_merges_that_the_file_tells_is_not_overruled(told, settings, tmp_path):
    path = student(tmp_path / "student.pt", **settings)[1]
    plain = weights.read_encoder(path).weights
    for order in orders.ORDERS:
        if order == told:
            again = weights.read_encoder(path, merge=order).weights
            assert all(torch.equal(again[name], plain[name]) for name in plain)
            continue
        with pytest.raises(ValueError, match=f"{order} is asked for, and the file tells {told}, "
                                             ".*leave out --merge") as refusal:
            weights.read_encoder(path, merge=order)
        assert "\n" not in str(refusal.value)


def test_what_is_unknown_can_be_left_out_by_name(tmp_path):
    path = save(tmp_path / "more.pt",
                under("swinViT.", monai_encoder()) | {"organ_embedding": torch.ones(7)})
    with pytest.raises(ValueError, match=r"unexpected 7 \(organ_embedding\)"):
        weights.read_encoder(path)
    assert "left out 7 (organ_embedding)" in weights.read_encoder(path, drop=["organ_"]).report
