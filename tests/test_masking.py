import pytest
import torch

from smit import masking


def test_the_papers_ratio_hides_152_of_216_cells():
    hidden = masking.random_block_mask(5, (6, 6, 6), 0.7)
    assert hidden.shape == (5, 6, 6, 6) and hidden.dtype == torch.bool
    assert hidden.flatten(1).sum(1).tolist() == [152] * 5


@pytest.mark.parametrize("ratio, count",
                         [(0, 0), (.07, 7), (.071, 8), (.29, 29), (.5, 50), (1, 100)])
def test_the_count_is_rounded_up_and_not_by_float_noise(ratio, count):
    assert masking.random_block_mask(1, (4, 5, 5), ratio).sum() == count


def test_masks_are_independent_uniform_and_repeatable():
    draw = lambda seed: masking.random_block_mask(2000, (2, 3, 4), .5,
                                                  torch.Generator().manual_seed(seed))
    hidden = draw(0)
    assert torch.equal(hidden, draw(0)) and not torch.equal(hidden, draw(1))
    assert len({tuple(m.flatten().tolist()) for m in hidden}) > 1900
    assert (hidden.float().mean(0) - .5).abs().max() < .06  # 5 sigma of 2,000 draws

    # without replacement: 1/2 * 11/23
    both = (hidden[:, 0, 0, 0] & hidden[:, 0, 0, 1]).float().mean()
    assert both.item() == pytest.approx(11 / 46, abs=.05)


def test_expansion_repeats_each_cell_along_every_axis():
    mask = torch.zeros(1, 2, 3, 1, dtype=torch.bool)
    mask[0, 1, 2, 0] = True
    expanded = masking.expand_mask(mask, 3)
    assert expanded.shape == (1, 6, 9, 3) and expanded.sum() == 27 and expanded[0, 3:, 6:, :].all()


def test_an_impossible_ratio_is_refused():
    with pytest.raises(ValueError, match="1.2"):
        masking.random_block_mask(1, (2, 2, 2), 1.2)
