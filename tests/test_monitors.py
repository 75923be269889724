"""Signs of collapse and errors on held-back volumes, by hand."""
import contextlib
import types

import pytest
import torch

from smit import losses, masking, monitors, pretrain

ALONE = types.SimpleNamespace(mean=lambda tensor: tensor)


def test_monitors_tell_uniform_collapsed_and_healthy_outputs_apart():
    K = 64
    assert monitors.entropies(torch.zeros(2, 9, K), 0., .04) == pytest.approx((1, 1))
    one = torch.zeros(2, 9, K)
    one[..., 3] = 1
    assert monitors.entropies(one, 0., .01) == pytest.approx((0, 0), abs=1e-6)
    each, mean = monitors.entropies(torch.eye(K), 0., .01)
    assert each == pytest.approx(0, abs=1e-6) and mean == pytest.approx(1)


def test_effective_rank_counts_dimensions_in_use():
    torch.manual_seed(0)
    basis = torch.linalg.qr(torch.randn(32, 32))[0][:5]
    tokens = (torch.eye(5).repeat(200, 1) @ basis).view(4, 250, 32) * 3 + 7
    # five points span four dimensions
    assert monitors.effective_rank(tokens) == pytest.approx(4, rel=1e-3)
    assert monitors.effective_rank(torch.ones(2, 9, 8)) == pytest.approx(1, abs=1e-3)


class Stub(torch.nn.Module):
    """A student that answers 0 in hidden cells and 1 elsewhere."""

    def reconstruct(self, views, cells, cell):
        return 1 - masking.expand_mask(cells, cell)[:, None].float()


def test_errors_on_held_back_volumes_by_hand():
    views = torch.zeros(1, 2, 1, 4, 4, 8, dtype=torch.uint8)       # two cells of 4^3 a view
    views[0, 0, ..., :4], views[0, 0, ..., 4:] = 51, 102           # .2 visible, .4 hidden
    views[0, 1, ..., :4], views[0, 1, ..., 4:] = 255, 204          # 1. visible, .8 hidden
    cells = torch.tensor([False, True]).view(1, 1, 1, 1, 2).expand(1, 2, 1, 1, 2)
    batch = [{"views": views, "hidden": cells}]

    def errors(count_all):
        return monitors.masked_image_errors(Stub(), batch, 4, count_all, torch.device("cpu"),
                                            contextlib.nullcontext, ALONE)
    found = errors(count_all=False)                                # the student answers 0 there
    assert found["val_mip"] == pytest.approx((.4 + .8) / 2)
    assert found["val_mse"] == pytest.approx((.16 + .64) / 2)
    assert found["val_constant"] == pytest.approx((.0 + .4) / 2)
    assert found["val_median"] == pytest.approx((.2 + .2) / 2)
    assert errors(count_all=True)["val_mip"] == pytest.approx((.8 + .4 + .0 + .8) / 4)


def test_guesses_without_anatomy_by_hand():
    view = torch.tensor([1, 2, 9, 200, 201], dtype=torch.uint8)
    hidden = torch.tensor([False, False, False, True, True])
    assert monitors.visible_median(view, hidden) == 2
    assert monitors.visible_median(view, torch.ones(5, dtype=torch.bool)) == 9

    histogram = torch.zeros(256, dtype=torch.float64)
    histogram[[10, 20, 250]] = torch.tensor([1., 3., 1.], dtype=torch.float64)
    assert monitors.best_constant(histogram) == 20
    assert monitors.constant_l1(histogram) == pytest.approx((10 + 230) / 255)


def test_collapse_reports_the_heads_that_are_there():
    centers = {"mpd": losses.Center(4), "itd": losses.Center(4)}
    centers["mpd"].value += torch.tensor([3., 0, 4, 0])
    taught = pretrain.Outputs(tokens=torch.rand(2, 9, 6), patch_logits=torch.zeros(2, 9, 4))
    row = monitors.collapse(taught, centers, .04, ALONE)

    assert row.keys() == {"effective_rank", "mpd_entropy", "mpd_mean_entropy", "mpd_center"}
    assert row["mpd_center"] == 5
    assert row["mpd_entropy"] == pytest.approx(.5)  # the centre leaves two prototypes of four


def test_entropy_of_the_mean_is_taken_over_all_ranks():
    logits = torch.zeros(3, 4)
    logits[:, 2] = 1
    other_rank = torch.tensor([1., 0, 0, 0])
    each, mean = monitors.entropies(logits, 0., .01, lambda own: (own + other_rank) / 2)
    assert each == pytest.approx(0, abs=1e-6) and mean == pytest.approx(.5)      # ln 2 of ln 4


def test_errors_on_held_back_volumes_are_those_of_all_ranks():
    random = torch.Generator().manual_seed(0)
    batches = [{"views": torch.randint(256, (1, 2, 1, 4, 4, 8), generator=random).byte(),
                "hidden": torch.tensor([False, True]).expand(1, 2, 1, 1, 2)} for _ in range(2)]

    def errors(batches, mean):
        ranks = types.SimpleNamespace(mean=mean)
        return monitors.masked_image_errors(Stub(), batches, 4, False, torch.device("cpu"),
                                            contextlib.nullcontext, ranks)
    sent = []
    errors(batches[1:], lambda sums: sent.append(sums) or sums)                   # the other rank
    shared = errors(batches[:1], lambda sums: (sums + sent[0]) / 2)
    assert shared == pytest.approx(errors(batches, lambda sums: sums))
