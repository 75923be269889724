"""Geometry by hand-computed values, by nibabel, and by going there and back."""
import itertools
import math

import nibabel as nib
import numpy as np
import pytest
import torch

from smit import transforms as T

TURN = np.array([[.8, -.6, 0, 0], [.6, .8, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
SCALE = np.diag([1.5, 2., 3., 1.])


def affines():
    """Every permutation and mirror image of an oblique anisotropic grid:
    48, half of them of negative determinant."""
    for order, signs in itertools.product(itertools.permutations(range(3)),
                                          itertools.product((1, -1), repeat=3)):
        affine = (TURN @ SCALE)[:, [*order, 3]] @ np.diag([*signs, 1])
        affine[:3, 3] = 10, -20, 30
        yield affine


def test_to_ras_is_nibabels_canonical_orientation_for_all_48_orientations():
    array = np.arange(60.).reshape(3, 4, 5)
    for affine in affines():
        expected = nib.as_closest_canonical(nib.Nifti1Image(array, affine))
        ras, ras_affine = T.to_ras(array, affine)
        assert (np.array_equal(ras, expected.get_fdata())
                and np.allclose(ras_affine, expected.affine, atol=1e-4))
        assert T.ras_grid(array.shape, affine)[0] == ras.shape


def test_from_ras_undoes_to_ras_with_leading_axes_for_torch_and_numpy():
    array = torch.randn(2, 3, 4, 5)
    for affine in affines():
        assert torch.equal(T.from_ras(T.to_ras(array, affine)[0], affine), array)
        assert np.array_equal(T.from_ras(T.to_ras(array.numpy(), affine)[0], affine), array.numpy())


def test_an_oblique_volume_keeps_each_voxel_at_its_place():
    array = torch.zeros(3, 4, 5)
    array[2, 0, 3] = 1
    for affine in affines():
        ras, ras_affine = T.to_ras(array, affine)
        assert np.allclose(ras_affine @ [*ras.nonzero()[0].tolist(), 1], affine @ [2, 0, 3, 1])


def test_regrid_on_its_own_grid_is_the_identity_bit_for_bit():
    volume = torch.randn(2, 5, 6, 7) * 1000
    assert torch.equal(T.regrid(volume, SCALE, SCALE, (5, 6, 7)), volume)
    assert torch.equal(T.resample(volume, SCALE, (1.5, 2, 3))[0], volume)


def test_finer_grids_interpolate_linearly_and_repeat_the_edge():
    volume = torch.tensor([0., 1., 3., 2.]).reshape(1, 1, 4).expand(2, 3, 4)
    fine, affine = T.resample(volume, np.eye(4), (1, 1, .5))
    assert torch.equal(fine[1, 2], torch.tensor([0., .25, .75, 1.5, 2.5, 2.75, 2.25, 2.]))
    assert affine[2, 3] == -.25 and T.spacing_of(affine).tolist() == [1, 1, .5]


def test_coarser_grids_are_averaged_by_a_triangle_and_do_not_alias():
    stripes = torch.tensor([0., 1.] * 8).reshape(1, 16, 1).expand(2, 16, 3)
    coarse, _ = T.resample(stripes, np.eye(4), (1, 2, 1))
    assert torch.allclose(coarse[:, 1:-1], torch.tensor(.5)), "the finest stripes average out"

    # voxels 1..4 around 2.5, weights 1 - |distance| / 2
    by_hand = (.25 * 0 + .75 * 0 + .75 * 1 + .25 * 0) / 2
    one = torch.zeros(2, 8, 3)
    one[:, 3] = 1
    assert T.resample(one, np.eye(4), (1, 2, 1))[0][0, 1, 0] == by_hand


def ramp(shape, affine, slope):
    """The field slope . position in mm, on a grid."""
    index = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)
    return torch.tensor((index @ affine[:3, :3].T + affine[:3, 3]) @ slope)


@pytest.mark.parametrize("spacing, off",
                         [((1, 1, 1), 1e-3), ((1.5, 1.1, 2.9), 1e-3), ((2.2, 2.9, 5), .1 * 5)])
def test_a_linear_ramp_in_mm_stays_where_it_was(spacing, off):
    """Exactly on finer grids; on coarser ones to a tenth of a voxel,
    as every sampled triangle filter."""
    affine, slope = TURN @ SCALE, np.array([.6, 0, .8])
    made, grid = T.resample(ramp((24, 22, 20), affine, slope).float(), affine, spacing)
    inside = (made - ramp(made.shape, grid, slope)).abs()[3:-3, 3:-3, 3:-3]
    assert inside.numel() and inside.max() < off


def test_resample_keeps_the_centre_and_rounds_the_shape():
    volume, affine = torch.zeros(5, 6, 7), TURN @ SCALE
    made, grid = T.resample(volume, affine, (2, 2, 50))
    assert made.shape == (4, 6, 1)  # 5 * 1.5 / 2 = 3.75, 6, 7 * 3 / 50 = .42 but at least 1
    centre = [affine @ [2, 2.5, 3, 1], grid @ [1.5, 2.5, 0, 1]]
    assert np.allclose(*centre) and np.allclose(T.spacing_of(grid), (2, 2, 50), rtol=1e-12)


def test_strides_and_leading_axes_do_not_change_the_result():
    volume = torch.randn(2, 9, 8, 7)
    made, _ = T.resample(volume, SCALE, (2, 1, 4))
    for order in itertools.permutations(range(3)):
        stored = volume.permute(0, *(1 + axis for axis in order)).contiguous()
        strided = stored.permute(0, *(1 + order.index(axis) for axis in range(3)))
        assert torch.allclose(T.resample(strided, SCALE, (2, 1, 4))[0], made, atol=1e-6)
    assert torch.allclose(T.resample(volume[1], SCALE, (2, 1, 4))[0], made[1], atol=1e-6)


def test_nearest_keeps_labels_and_dtype_and_sends_ties_up():
    label = torch.arange(4, dtype=torch.uint8).reshape(1, 1, 4) * 5
    assert T.resample(label, np.eye(4), (1, 1, .5),
                      "nearest")[0].tolist() == [[[0, 0, 5, 5, 10, 10, 15, 15]]]
    coarse = T.resample(label, np.eye(4), (1, 1, 2), "nearest")[0]
    assert coarse.dtype == torch.uint8 and coarse.tolist() == [[[5, 15]]]  # centres .5 and 2.5


def test_regrid_refuses_other_directions_and_unknown_modes():
    with pytest.raises(ValueError, match="directions"):
        T.regrid(torch.zeros(3, 4, 5), SCALE, TURN @ SCALE, (3, 4, 5))
    with pytest.raises(ValueError, match="directions"):
        T.regrid(torch.zeros(3, 4, 5), SCALE, SCALE @ np.diag([-1, 1, 1, 1]), (3, 4, 5))
    with pytest.raises(ValueError, match="cubic"):
        T.regrid(torch.zeros(3, 4, 5), SCALE, SCALE, (3, 4, 5), "cubic")


def test_window_and_percentiles_map_to_zero_and_one():
    hu = torch.tensor([-1000., -175., 37.5, 250., 3000.])
    assert T.window_hu(hu).tolist() == [0, 0, .5, 1, 1] and hu[0] == -1000
    mr = torch.cat([torch.zeros(5000), torch.arange(1., 1002.)]).reshape(17, 353, 1)
    scaled = T.percentile_scale(mr, 0, 99.5)
    assert torch.allclose(scaled, ((mr - 1) / 995).clamp(0, 1),
                          atol=1e-6), "the background does not count"
    with pytest.raises(ValueError, match="contrast"):
        T.percentile_scale(torch.ones(2, 3, 4))


@pytest.mark.parametrize("order", ["C", "F"])
def test_a_sample_of_voxels_sees_every_plane_of_every_axis(order):
    shape = (64, 64, 64)                                   # a stride of 64 would see one plane
    for axis in range(3):
        planes = np.arange(64).reshape([64 if i == axis else 1 for i in range(3)])
        x = torch.from_numpy(np.array(np.broadcast_to(planes, shape), order=order))
        seen = np.bincount(T.some_voxels(x, count=4096), minlength=64)
        assert seen.sum() == 4096 and seen.min() > 20
        assert np.array_equal(T.some_voxels(x, count=4096), T.some_voxels(x, count=4096))
    assert T.some_voxels(x).size == 64 ** 3                # no more than it looks at: all of them


def test_one_bad_slice_of_a_large_scan_moves_no_background_level():
    rng = np.random.default_rng(1)
    mr = torch.from_numpy(rng.random((128, 128, 32), dtype=np.float32))
    mr[..., 0] += 500
    assert T.background_level(mr) < .02


def test_box_crop_and_affine_agree():
    volume = torch.zeros(6, 7, 8)
    volume[1, 2, 3] = volume[4, 5, 3] = 2
    assert T.foreground_box(volume, 1) == ((1, 5), (2, 6), (3, 4))
    assert T.foreground_box(volume, 9) == ((0, 6), (0, 7), (0, 8))

    part = T.crop(volume, (-2, 1, 3), (4, 9, 2), fill=-1)
    assert (part.shape == (4, 9, 2) and part[3, 1, 0] == 2 and part[:2].eq(-1).all()
            and part[:, 6:].eq(-1).all())
    assert np.allclose(T.crop_affine(SCALE, (-2, 1, 3)) @ [3, 1, 0, 1], SCALE @ [1, 2, 3, 1])
    assert T.crop(volume, (20, 0, -30), (2, 3, 4),
                  fill=5).eq(5).all(), "a box wholly outside is all fill"


def test_rotate90_turns_the_axial_plane_only():
    volume = torch.arange(24.).reshape(2, 3, 4)
    assert torch.equal(T.rotate90(volume, 1)[:, :, 2], torch.rot90(volume[:, :, 2]))
    assert torch.equal(T.rotate90(T.rotate90(volume, 1), 3), volume)


def test_prepare_is_the_same_for_every_storage_order():
    body = torch.full((24, 20, 16), -1000.)
    body[4:20, 5:17, 2:14] = torch.randn(16, 12, 12) * 100
    settings, results = T.Preparation((2., 2., 3.)), []
    for affine in affines():
        stored = T.from_ras(body, affine)
        image, grid = T.prepare(stored, affine, settings)
        results.append((image, grid))
    shape = results[0][0].shape

    assert all(image.shape == shape and image.dtype == torch.uint8 for image, _ in results)
    assert all((image.int() - results[0][0].int()).abs().max() <= 1
               for image, _ in results), "but for rounding"


@pytest.mark.parametrize("blanked", [True, False])
@pytest.mark.parametrize("strays", [{"share": .001, "value": -60.}, {"count": 2, "value": -400.}])
def test_a_few_stray_voxels_move_no_grey_level_of_an_mr(blanked, strays):
    random = torch.Generator().manual_seed(0)
    mr = torch.zeros(60, 50, 40)
    mr[12:48, 10:40, 5:35] = 200 + 60 * torch.randn(36, 30, 30, generator=random).clamp(-2, 2)
    if not blanked:                                     # a scanner's air: the magnitude of noise
        noise = torch.randn(2, 60, 50, 40, generator=random)
        mr = torch.stack([mr + 6 * noise[0], 6 * noise[1]]).square().sum(0).sqrt()
    count = strays.get("count") or round(strays["share"] * mr.numel())
    places = torch.randperm(mr.numel(), generator=random)[:count]
    stray = mr.clone()
    stray.view(-1)[places] = strays["value"]

    settings = T.Preparation((1.5, 2., 3.), "mr")      # the grid it has: nothing is resampled
    (clean, affine), (other, other_affine) = (T.prepare(mr.clone(), SCALE, settings),
                                              T.prepare(stray, SCALE, settings))
    assert clean.shape == other.shape and np.array_equal(affine, other_affine)
    apart = (clean.int() - other.int()).abs()
    assert (apart > 1).sum() <= count                   # the strays themselves
    assert clean.float().median() == pytest.approx(other.float().median().item(), abs=1)


def test_prepare_refuses_air():
    air = torch.full((8, 9, 10), -1000.)
    air[0, 0, 0] = -900
    with pytest.raises(ValueError, match="all air"):
        T.prepare(air, SCALE, T.Preparation())
    with pytest.raises(ValueError, match="coarser"):
        T.prepare(torch.randn(8, 9, 10), np.diag([500., 500, 500, 1]),
                  T.Preparation((.01, .01, .01)))


@pytest.mark.parametrize("offset", [math.inf, math.nan])
def test_an_offset_of_hu_that_is_no_number_is_refused(offset):
    with pytest.raises(ValueError, match="HU offset .* finite"):
        T.Preparation(hu_offset=offset)


def test_a_prepared_volume_does_not_depend_on_the_number_of_threads():
    volume, threads, made = torch.rand(64, 70, 40) * 400 - 200, torch.get_num_threads(), []
    for n in (1, 2, 3):
        torch.set_num_threads(n)
        made.append(T.resample(volume, np.diag([.8, .8, 1.1, 1]), (1.5, 1.5, 2))[0])
    torch.set_num_threads(threads)
    assert torch.equal(made[0], made[1]) and torch.equal(made[0], made[2])


def test_the_voxels_that_are_allowed_are_allowed_after_resampling_too(monkeypatch):
    volume, settings = torch.randn(8, 9, 10) * 100, T.Preparation((.75, 1., 1.5))
    monkeypatch.setenv("SMIT_MAX_VOXELS", "5759")
    with pytest.raises(ValueError, match="more than 5759; .* SMIT_MAX_VOXELS=5760"):
        T.prepare(volume, SCALE, settings)
    monkeypatch.setenv("SMIT_MAX_VOXELS", "5760")
    assert T.prepare(volume, SCALE, settings)[0].numel() <= 5760

    monkeypatch.setattr(T, "MAX_VOXELS", 5759)           # a limit that is raised counts
    assert T.prepare(volume, SCALE, settings)[0].numel()


def test_at_45_degrees_rounding_does_not_choose_the_axes():
    c, nudge = np.sqrt(.5), 1e-7
    for about in range(3):
        one, other = (way for way in range(3) if way != about)
        turn = np.eye(4)
        turn[one, one], turn[other, other], turn[one, other], turn[other, one] = c, c, -c, c
        more, less = turn.copy(), turn.copy()
        more[one, one] += nudge
        more[other, other] += nudge
        less[one, one] -= nudge
        less[other, other] -= nudge
        assert T.ras_axes(turn) == T.ras_axes(more) == T.ras_axes(less)
        assert T.ras_axes(turn)[0] == (0, 1, 2)


def test_air_at_the_windows_low_is_no_body():
    image, affine = torch.full((30, 30, 30), -175.), np.diag([1.1, 1.3, 2.7, 1])
    image[10:20, 8:20, 12:20] = 60.                      # 11 x 16 x 22 mm
    body, _ = T.prepare(image, affine, T.Preparation((2., 2., 2.)))
    assert body.shape == (6, 9, 12)
    assert all(body.movedim(axis, 0)[end].any() for axis in range(3) for end in (0, -1))


def test_the_noise_of_an_affine_decides_no_number_of_planes():
    for mm in (5., 5 - 1.4e-7, 5 + 1.4e-7):              # 31 planes of 5 mm are 77.5 of 2 mm
        shape, _ = T.resampled_grid((20, 20, 31), np.diag([2., 2., mm, 1]), (2., 2., 2.))
        assert shape == (20, 20, 78)


def test_the_drawn_voxels_do_not_depend_on_how_a_volume_lies_in_memory():
    volume = torch.arange(80 ** 3).view(80, 80, 80)
    turned = volume.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    assert torch.equal(volume, turned) and volume.stride() != turned.stride()
    assert np.array_equal(T.some_voxels(volume), T.some_voxels(turned))


def test_prepared_levels_are_the_nearest_and_not_the_next_lower():
    levels = torch.arange(1., 256)
    hu = (levels / 255 * 425 - 175).view(5, 51, 1)
    for off in (-.8, .8):                                    # a step of grey is 1.67 HU
        image, _ = T.prepare((hu + off).clone(), SCALE, T.Preparation((1.5, 2., 3.)))
        assert torch.equal(image.flatten(), levels.byte())


def test_the_body_of_an_mr_is_what_stands_out_of_the_noise_of_its_air():
    random = torch.Generator().manual_seed(0)
    mr = 4 * torch.rand(30, 31, 32, generator=random)          # of 300: 3 of 255 grey levels
    mr[5:21, 6:24, 9:22] = 200 + 100 * torch.rand(16, 18, 13, generator=random)
    body, affine = T.prepare(mr, SCALE, T.Preparation((1.5, 2., 3.), "mr"))
    assert body.shape == (16, 18, 13)
    assert np.allclose(affine, T.crop_affine(SCALE, (5, 6, 9)))
