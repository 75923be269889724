import math

import pretext
import pytest
import torch
from pretext import mean, rng
from torch.nn import functional as F

from smit.baselines import moco, rotation

SIZES = dict(embed_dim=8, depths=(1, 1), heads=(2, 2), window=(2, 2, 2))


def small_moco(**sizes):
    return moco.MoCo(SIZES | sizes, head_width=16, bottleneck=8)


# ------------------------------------------------------------------------------------------ MoCo v3
def test_the_contrast_by_hand():
    task = small_moco()
    task.temperature = .8
    rows = torch.eye(2)
    expected = 2 * .8 * math.log(1 + math.exp(-2.5))   # centred: own key's cosine 1, the other's -1
    assert task.contrast(3 * rows + 1, rows).item() == pytest.approx(expected, rel=1e-4)
    assert task.contrast(rows, rows.flip(0)) > task.contrast(rows, rows)


def test_each_view_is_to_find_the_teacher_s_token_of_the_other_view():
    torch.manual_seed(0)
    task = small_moco()
    for weight in task.teacher.parameters():
        weight += .1 * torch.randn_like(weight)                         # a teacher of its own
    batch = pretext.batch(task, range(4), side=16)

    def token(encoder, views):
        return encoder(views)[1].mean(dim=(2, 3, 4))
    u, v = batch["views"].unbind(1)
    key_u, key_v = (task.teacher["projector"](token(task.teacher["encoder"], x)) for x in (u, v))
    of_u, of_v = (task.predictor(task.projector(token(task.encoder, x))) for x in (u, v))
    expected = (task.contrast(of_u, key_v) + task.contrast(of_v, key_u)) / 2
    torch.testing.assert_close(task(batch)["contrast"], expected)


def test_no_gradient_reaches_the_teacher_and_it_rises_to_standing_still():
    task = small_moco()
    task(pretext.batch(task, range(4), side=16))["contrast"].backward()
    assert all(weight.grad is None for weight in task.teacher.parameters())
    assert task.encoder.patch_embed.weight.grad.any()

    name = "encoder.patch_embed.bias"
    before, student = task.teacher.get_parameter(name).clone(), task.get_parameter(name)
    with torch.no_grad():
        student += 1
    task.after_step(0.0)
    torch.testing.assert_close(task.teacher.get_parameter(name), before + .004)
    task.after_step(1.0)
    torch.testing.assert_close(task.teacher.get_parameter(name), before + .004)


def test_paths_drop_in_the_student_alone_and_by_the_sample_s_own_draws():
    task = small_moco(drop_path=.9).train()
    assert not task.teacher["encoder"].training
    views = pretext.views(0, 16)
    sample = task.samples(views, rng())
    assert sample["noise"].shape == (2, 4)
    assert torch.equal(sample["noise"], task.samples(views, rng())["noise"])

    batch = pretext.batch(task, range(4), side=16)
    first, again = task(batch)["contrast"], task(batch)["contrast"]
    batch["noise"] = 1 - batch["noise"]
    assert torch.equal(first, again) and not torch.equal(first, task(batch)["contrast"])


def test_moco_learns_on_phantoms():
    torch.manual_seed(0)
    totals = pretext.train(small_moco(), steps=30, lr=3e-3, size=4, different=2)
    assert mean(totals[-4:]) < .8 * mean(totals[:4])


# ----------------------------------------------------------------------------------------- rotation
def test_zero_logits_cost_the_logarithm_of_four_classes():
    task = rotation.Rotation(SIZES)
    torch.nn.init.zeros_(task.classes.weight)
    torch.nn.init.zeros_(task.classes.bias)
    loss = task(pretext.batch(task, range(2), side=16))["rotation"]
    assert loss.item() == pytest.approx(math.log(4)) == pytest.approx(1.386294, abs=1e-6)


def test_a_view_is_turned_about_the_body_s_axis_and_the_label_says_how_often():
    task, views = rotation.Rotation(SIZES), torch.rand(2, 1, 8, 8, 16)
    counts = [0, 0, 0, 0]
    for seed in range(200):
        sample = task.samples(views, rng(seed))
        for view, turned, turns in zip(views, sample["views"], sample["turns"].tolist()):
            assert torch.equal(turned.rot90(-turns, (1, 2)), view)
            counts[turns] += 1

    assert all(count / 400 == pytest.approx(.25, abs=.08) for count in counts)


def test_rotation_is_a_cross_entropy_of_the_mean_token():
    torch.manual_seed(0)
    task = rotation.Rotation(SIZES)
    batch = pretext.batch(task, range(3), side=16)
    tokens = task.encoder(batch["views"].flatten(0, 1))[1].mean(dim=(2, 3, 4))
    expected = F.cross_entropy(task.classes(tokens), batch["turns"].flatten())
    torch.testing.assert_close(task(batch)["rotation"], expected)


def test_rotation_learns_on_phantoms_and_hands_over_its_encoder_alone():
    torch.manual_seed(0)
    task = rotation.Rotation(SIZES)
    totals = pretext.train(task, steps=40, lr=3e-3, size=4, different=2)
    assert mean(totals[-4:]) < .8 * mean(totals[:4])
    assert {name.split(".")[0] for name in task.transferred()} == {"encoder"}
    assert task.network == "swin"
