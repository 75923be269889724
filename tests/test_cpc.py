import math

import pretext
import pytest
import torch
from pretext import mean, rng

from smit.baselines import contrast, cpc


def small(**sizes):
    return cpc.CPC(**{"width": 4, "patch": 16, "code": 16, "context": 16,
                      "view": (32, 32, 32)} | sizes)


# ------------------------------------------------------------------------------------------ InfoNCE
def test_info_nce_by_hand():
    codes = torch.eye(4)
    assert math.log(1 + 3 / math.e) == pytest.approx(.743668, abs=1e-6)
    assert contrast.info_nce(codes, codes, 1.0).item() == pytest.approx(.743668, abs=1e-6)
    assert contrast.info_nce(torch.zeros(4, 4), codes, 1.0).item() == pytest.approx(math.log(4))
    assert contrast.info_nce(codes.roll(1, 0), codes, 1.0) > contrast.info_nce(codes, codes, 1.0)


def test_info_nce_with_a_queue_by_hand():
    own, queue = torch.eye(2)[:1], torch.eye(2)[1:].expand(16384, -1)
    assert math.log(1 + 16384 * math.exp(-5)) == pytest.approx(4.713078, abs=1e-6)
    assert contrast.info_nce_queue(own, own, queue, .2).item() == pytest.approx(4.713078, abs=2e-5)


def test_info_nce_is_float32_also_under_autocast():
    queries, keys, queue = torch.randn(3, 8, 16).unbind()
    plain = contrast.info_nce(queries, keys, .1), contrast.info_nce_queue(queries, keys, queue, .1)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = (contrast.info_nce(queries, keys, .1),
                 contrast.info_nce_queue(queries, keys, queue, .1))
    assert torch.equal(plain[0], mixed[0]) and torch.equal(plain[1], mixed[1])


def test_cpc_takes_products_without_a_norm():
    codes = torch.eye(4)
    assert small().contrast(2 * codes, codes).item() == pytest.approx(math.log(1 + 3 / math.e ** 2))


def test_the_recurrent_network_runs_in_float32_under_autocast():
    model, seen = small(), []
    model.recurrent.register_forward_hook(
        lambda net, given, made: seen.extend([given[0].dtype, made[1].dtype]))
    sample = model.samples(torch.rand(2, 1, 32, 32, 32), rng())
    batch = {name: value[None] for name, value in sample.items()}
    with torch.autocast("cpu", torch.bfloat16):
        model(batch)
    assert seen == [torch.float32, torch.float32]


# ------------------------------------------------------------------------------------------ pyramid
@pytest.mark.parametrize("rows, patches, targets",
                         [(3, 1, 2), (4, 10, 2), (5, 10, 3), (6, 35, 3), (7, 35, 4)])
def test_a_pyramid_reads_and_predicts_as_many_patches_as_the_release_s(rows, patches, targets):
    context, predicted = cpc.pyramid(rows)
    assert (len(context), len(predicted)) == (patches, targets)
    assert context[-1] == (rows // 2 - 1, 0, 0)
    assert [row for row, _, _ in context] == sorted(row for row, _, _ in context)
    assert predicted[0] == context[-1][0] + 1 and predicted[-1] == rows - 1


def test_columns_gather_neighbours_mirrored_at_the_border():
    codes = torch.arange(2 * 3 * 4 * 5).view(2, 3, 4, 5, 1)              # each patch its own number
    contexts, targets = cpc.columns(codes, *cpc.places(3, 4, 5))
    assert contexts.shape == (24, 10, 1) and targets.shape == (24, 3, 1)

    def at(b, x, y, row):
        return int(codes[b, x, y, row])
    column = 1 * 12 + 1 * 4 + 2                                 # of volume 1, at (1, 2): all inside
    expected = [at(1, x, y, 0) for x in (0, 1, 2) for y in (1, 2, 3)] + [at(1, 1, 2, 1)]
    assert contexts[column, :, 0].tolist() == expected
    assert targets[column, :, 0].tolist() == [at(1, 1, 2, row) for row in (2, 3, 4)]
    corner = 3 * 4 - 1                                                      # of volume 0, at (2, 3)
    expected = [at(0, x, y, 0) for x in (1, 2, 1) for y in (2, 3, 2)]
    assert contexts[corner, :9, 0].tolist() == expected


# ------------------------------------------------------------------------------------------ patches
def test_patches_overlap_by_half():
    view = torch.rand(48, 32, 32)
    patches = cpc.cut_patches(view, 16)
    assert patches.shape == (5, 3, 3, 16, 16, 16)
    assert torch.equal(patches[3, 1, 2], view[24:40, 8:24, 16:32])
    assert cpc.cut_patches(torch.rand(96, 96, 96), 32).shape[:3] == (5, 5, 5)


def test_a_patch_is_flipped_cut_and_padded_again():
    patch = (1 + torch.arange(16 ** 3.)).view(16, 16, 16)
    flips, corners = 0, set()
    for seed in range(200):
        result = cpc.augment(patch, rng(seed))
        shell = torch.ones(patch.shape, dtype=torch.bool)
        shell[1:15, 1:15, 1:15] = False
        assert not result[shell].any() and result[~shell].all()
        flipped = bool(result[1, 1, 1] > result[2, 1, 1])
        back = result.flip(0) if flipped else result
        start = int(back[1, 1, 1]) - 1
        x, y, z = start // 256, start // 16 % 16, start % 16
        assert torch.equal(back[1:15, 1:15, 1:15], patch[x:x + 14, y:y + 14, z:z + 14])
        flips += flipped
        corners.add((x, y, z))

    assert flips / 200 == pytest.approx(.5, abs=.1)
    assert corners == {(x, y, z) for x in range(3) for y in range(3) for z in range(3)}


# --------------------------------------------------------------------------------------------- task
def test_zero_predictions_cost_the_logarithm_of_the_columns_of_the_batch():
    task = small()
    for predictor in task.predictors:
        torch.nn.init.zeros_(predictor.weight)
        torch.nn.init.zeros_(predictor.bias)
    loss = task(pretext.batch(task, range(2), side=32))["info_nce"]   # 2 x 2 views of 3 x 3 columns
    assert loss.item() == pytest.approx(math.log(36), rel=1e-5)


def test_the_loss_equals_the_sum_over_candidates_column_by_column():
    torch.manual_seed(0)
    task = small(view=(24, 32, 40))
    batch = {"patches": torch.rand(1, 2, 2, 3, 4, 1, 16, 16, 16)}
    codes = task.encode(torch.cat([batch["patches"][:, 0], batch["patches"][:, 1]]))
    terms = []
    for ahead, row in enumerate((2, 3)):
        everyone = codes[:, :, :, row].reshape(-1, 16)
        contexts, _ = cpc.columns(codes, *cpc.places(2, 3, 4))
        for column, context in enumerate(contexts):
            output, _ = task.recurrent(context[None])
            scores = everyone @ task.predictors[ahead](output[0, -1])
            terms.append(scores.logsumexp(0) - scores[column])
    expected = torch.stack(terms).mean()

    torch.testing.assert_close(task(batch)["info_nce"], expected, rtol=1e-5, atol=0)


def test_samples_are_augmented_patches_of_both_views():
    task, views = small(), torch.rand(2, 1, 32, 32, 32)
    first, again, other = (task.samples(views, rng(seed))["patches"] for seed in (0, 0, 1))
    assert first.shape == (2, 3, 3, 3, 1, 16, 16, 16)
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_cpc_learns_on_phantoms_and_hands_over_its_encoder_alone():
    torch.manual_seed(0)
    task = small(width=8)
    totals = pretext.train(task, steps=30, lr=1e-3, side=32, size=1, different=2)
    assert mean(totals[-2:]) < .9 * mean(totals[:2])
    assert {name.split(".")[0] for name in task.transferred()} == {"encoder"}
