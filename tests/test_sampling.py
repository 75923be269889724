import contextlib
import os
import signal
import time

import nibabel as nib
import numpy as np
import pytest
import torch

from smit import data, runtime
from smit.data import samples as sampling

SETTINGS = data.Preparation((10.0, 10.0, 10.0))


def same(one, two):
    """Whether two samples or batches are equal in every tensor and text."""
    return all(np.array_equal(one[name], two[name]) for name in {**one, **two})


def dataset(cases, tmp_path, **settings):
    return sampling.ViewPairs(
        cases,
        SETTINGS,
        str(tmp_path / "cache"),
        **{
            **dict(crop=(24, 20, 16), view=(16, 16, 8), cell=4, mask_ratio=0.7, drops=6, seed=3),
            **settings,
        },
    )


def test_an_epoch_shows_every_volume_once_in_an_order_of_its_own():
    orders = [sampling.epoch_order(50, 0, epoch) for epoch in range(3)]
    assert all(sorted(order) == list(range(50)) for order in orders) and len(set(orders)) == 3
    assert sampling.epoch_order(50, 1, 0) != orders[0]


def test_ranks_share_the_samples_that_one_rank_would_see():
    alone = list(sampling.micro_batches(8, 24, 4))
    ranks = [list(sampling.micro_batches(8, 24, 2, rank, 2)) for rank in (0, 1)]
    assert alone == [[8, 9, 10, 11], [12, 13, 14, 15], [16, 17, 18, 19], [20, 21, 22, 23]]
    assert [a + b for a, b in zip(*ranks)] == alone
    assert list(sampling.micro_batches(16, 24, 4)) == alone[2:]  # resumed at sample 16


def test_a_sample_depends_on_its_number_and_the_seed_alone(phantoms, tmp_path):
    cases = data.read_list(phantoms)
    one, again = dataset(cases, tmp_path)[5], dataset(cases, tmp_path / "other")[5]
    assert same(one, again)
    for other in (dataset(cases, tmp_path)[5 + len(cases)], dataset(cases, tmp_path, seed=4)[5]):
        assert not torch.equal(one["hidden"], other["hidden"])


def test_views_and_masks_have_the_shapes_of_the_paper_in_small(phantoms, tmp_path):
    sample = dataset(data.read_list(phantoms), tmp_path)[0]
    assert sample["views"].shape == (2, 1, 16, 16, 8) and sample["views"].dtype == torch.uint8
    assert sample["hidden"].shape == (2, 4, 4, 2) and sample["hidden"].flatten(1).sum(
        1
    ).tolist() == [23, 23]
    assert not torch.equal(sample["views"][0], sample["views"][1])
    assert not torch.equal(sample["hidden"][0], sample["hidden"][1])
    assert sample["noise"].shape == (2, 6)


def test_both_views_lie_in_one_crop_of_the_volume():
    rng = sampling.generator(0)
    starts = torch.stack(
        [
            sampling.random_starts((200, 50, 90), (128, 64, 90), (96, 48, 40), rng)
            for _ in range(500)
        ]
    )
    apart = (starts[:, 0] - starts[:, 1]).abs().amax(0)

    assert (apart <= torch.tensor([32, 16, 50])).all() and (
        apart >= torch.tensor([28, 14, 40])
    ).all()

    low, high = starts.amin((0, 1)), starts.amax((0, 1))
    assert low[0] >= 0 and high[0] <= 200 - 96 and high[0] > 95  # inside, and all over it
    assert low[1] == -7 and high[1] == 9  # 50 voxels centred in a crop of 64
    assert low[2] >= 0 and high[2] <= 50


def test_cutting_pads_with_air_where_the_box_leaves_the_volume():
    volume = np.arange(1, 25, dtype=np.uint8).reshape(2, 3, 4)
    box = sampling.cut(volume, (-1, 1, 2), (4, 2, 3))
    assert torch.equal(box[1:3, :, :2], torch.from_numpy(volume[:, 1:, 2:]).contiguous())
    assert box.sum() == volume[:, 1:, 2:].sum()
    assert sampling.cut(volume, (5, 0, 0), (2, 2, 2)).sum() == 0


def test_a_bad_volume_is_passed_over_and_told(phantoms, tmp_path):
    cases = data.read_list(phantoms)
    (tmp_path / "bad.nii.gz").write_bytes(b"no volume")
    broken = [{"image": str(tmp_path / "bad.nii.gz"), "label": None}, *cases]
    samples = [dataset(broken, tmp_path)[s] for s in range(len(broken))]
    skipping = [s for s in samples if s["passed_over"]]

    assert (
        len(skipping) == 1
        and skipping[0]["volume"] == 1
        and "bad.nii.gz: not a NIfTI" in skipping[0]["skipped"][0]
    )
    with pytest.raises(data.BadVolume, match="bad.nii.gz"):
        list(sampling.load_batches(dataset(broken[:1], tmp_path), [[0]]))


ALONE = runtime.Ranks(0, 1, torch.device("cpu"))


def test_a_skipped_volume_is_told_in_one_line_and_counted_against_max_bad(
    phantoms, tmp_path, capsys
):
    (tmp_path / "bad.nii.gz").write_bytes(b"no volume")
    broken = [{"image": str(tmp_path / "bad.nii.gz"), "label": None}, *data.read_list(phantoms)]
    epochs = list(sampling.micro_batches(0, 3 * len(broken), 2))

    for max_bad in (1, 0):
        loader = sampling.Batches(
            dataset(broken, tmp_path), epochs, ALONE, workers=2, max_bad=max_bad
        )
        assert len(list(loader)) == len(epochs) and loader.bad == {0}
        told = capsys.readouterr().err.splitlines()
        assert len(told) == 1 and told[0].startswith(f"warning: skipped: {tmp_path}/bad.nii.gz: ")
        if max_bad:
            assert loader.agree(True) is True and loader.agree(False) is False
    assert loader.agree(False) is True                  # all ranks leave, and the run is saved
    with pytest.raises(ValueError, match="bad volumes, 1, are more than --max_bad 0: .*bad.nii.gz"):
        loader.raise_failure()


def test_ranks_join_their_bad_volumes_once_and_not_in_every_step(phantoms, tmp_path):
    joined = []

    class Counting(runtime.Ranks):
        def agree(self, *flags):
            joined.append(len(flags))
            return super().agree(*flags)

    loader = sampling.Batches(dataset(data.read_list(phantoms), tmp_path), [[0]],
                              Counting(*ALONE), max_bad=1)
    loader.bad.add(0)
    for _ in range(3):
        assert loader.agree(False) is False
    assert joined == [2, len(loader.dataset.cases), 2, 2]


class Fragile(torch.utils.data.Dataset):
    """Samples that are their numbers; the worker that makes sample `fatal` is killed."""
    cases = ()

    def __init__(self, fatal):
        self.fatal = fatal

    def __getitem__(self, sample):
        if sample == self.fatal and torch.utils.data.get_worker_info():
            os.kill(os.getpid(), signal.SIGKILL)
        return {"number": sample, "concerns": []}


def numbers_of(batches):
    return [batch["number"].item() for batch in batches]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_step_is_begun_only_with_its_batches_at_hand_and_a_dead_worker_ends_the_run_after_it(
    workers
):
    loader = sampling.Batches(Fragile(7), [[n] for n in range(20)], ALONE, workers, per_step=2)
    steps = []
    while not steps or not loader.agree(False):
        steps.append(numbers_of([next(loader), next(loader)]))

    assert steps == [[0, 1], [2, 3], [4, 5]][:len(steps)]          # 6 may be there, 7 is not
    with pytest.raises(RuntimeError, match="killed by signal: Killed|exited unexpectedly"):
        loader.raise_failure()
    for each in torch.multiprocessing.active_children():
        each.kill()


def test_the_batches_of_a_measurement_all_come_though_a_worker_dies_and_the_training_ends():
    before = {*torch.multiprocessing.active_children()}
    training = sampling.Batches(Fragile(99), [[n] for n in range(99)], ALONE, 1, per_step=1)
    assert numbers_of([next(training)]) == [0] and not training.agree(False)
    measuring = sampling.Batches(Fragile(3), [[n] for n in range(6)], ALONE, 1)
    assert numbers_of(measuring) == [0, 1, 2, 3, 4, 5]
    assert numbers_of([next(training)]) == [1] and training.agree(False)
    with pytest.raises(RuntimeError, match="DataLoader worker"):
        training.raise_failure()
    assert {*torch.multiprocessing.active_children()} <= before     # workers ignore SIGTERM


def test_a_worker_that_dies_in_mid_step_is_heard_of_when_batches_are_asked_for():
    before = {*torch.multiprocessing.active_children()}
    loader = sampling.Batches(Fragile(99), [[n] for n in range(99)], ALONE, 1, per_step=1)
    next(loader)
    [worker] = {*torch.multiprocessing.active_children()} - before
    os.kill(worker.pid, signal.SIGKILL)
    time.sleep(.3)                                      # a step, in which torch would raise

    assert not loader.agree(False)
    assert numbers_of([next(loader)]) == [1] and loader.agree(False)
    with pytest.raises(RuntimeError, match="killed by signal: Killed"):
        loader.raise_failure()


def test_a_death_that_python_dropped_is_heard_of_where_the_connection_breaks():
    deaths = runtime.ranks.WorkerDeaths()

    def raise_deaths(number, frame):
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")

    deaths.raise_deaths = raise_deaths
    with pytest.raises(RuntimeError, match="killed by signal"), deaths:
        with contextlib.suppress(RuntimeError):          # as in a weak reference's callback
            deaths.note(signal.SIGCHLD, None)
        raise ConnectionResetError
    with pytest.raises(RuntimeError, match="killed by signal"), deaths:
        deaths.note(signal.SIGCHLD, None)
    with pytest.raises(RuntimeError, match="exited unexpectedly"), deaths:
        with contextlib.suppress(RuntimeError):
            deaths.note(signal.SIGCHLD, None)
        raise RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly")   # as torch has it
    with deaths:                                         # each is told once
        pass


def test_a_batch_names_its_volumes(phantoms, tmp_path):
    cases = data.read_list(phantoms)
    for samples in (dataset(cases, tmp_path), crops(cases, tmp_path)):
        batch = next(sampling.Batches(samples, [[3, 1]], ALONE))
        order = sampling.epoch_order(len(cases), 3, 0)
        assert samples.images(batch) == [cases[order[3]]["image"], cases[order[1]]["image"]]


def test_workers_change_nothing(phantoms, tmp_path):
    pairs = dataset(data.read_list(phantoms), tmp_path)
    numbers = list(sampling.micro_batches(0, 8, 2))
    for one, two in zip(
        sampling.load_batches(pairs, numbers), sampling.load_batches(pairs, numbers, workers=2)
    ):
        assert same(one, two)


def crops(cases, tmp_path, **settings):
    return sampling.LabelledCrops(
        cases,
        SETTINGS,
        str(tmp_path / "cache"),
        14,
        **{**dict(size=(16, 12, 8), crops=3, drops=4, seed=3), **settings},
    )


def test_labelled_crops_depend_on_their_number_and_the_seed_alone(phantoms, tmp_path):
    cases = data.read_list(phantoms)
    one, again = crops(cases, tmp_path)[5], crops(cases, tmp_path / "other")[5]
    assert same(one, again)
    for other in (crops(cases, tmp_path)[5 + len(cases)], crops(cases, tmp_path, seed=4)[5]):
        assert not torch.equal(one["images"], other["images"])
    assert one["images"].shape == (3, 1, 16, 12, 8) and one["labels"].shape == (3, 16, 12, 8)
    assert one["labels"].dtype == torch.uint8 and one["noise"].shape == (3, 4)


def test_crop_centres_lie_in_organs_and_in_none_alike():
    label, size = np.zeros((40, 30, 20), np.uint8), (5, 3, 7)
    label[20:22, 10:12, 8:13] = 6
    rng, hits, seen = sampling.generator(1), 0, set()
    for _ in range(600):
        centre = tuple(s + k // 2 for s, k in zip(sampling.labelled_start(label, size, rng), size))
        hits += bool(label[centre])
        seen |= {centre} if label[centre] else set()

    assert 240 < hits < 360 and len(seen) == 20  # all 20 voxels of the organ
    empty = sampling.labelled_start(label * 0, size, rng)
    assert all(0 <= s <= n - k for s, k, n in zip(empty, size, label.shape))


def test_crops_stay_inside_and_small_volumes_are_centred():
    label = np.zeros((9, 30, 5), np.uint8)
    label[0, 0, 0] = label[8, 29, 4] = 1
    starts = [sampling.labelled_start(label, (6, 12, 8), sampling.generator(n)) for n in range(200)]
    assert {s[2] for s in starts} == {-1}  # 5 voxels centred in 8
    assert all(0 <= s[0] <= 3 and 0 <= s[1] <= 18 for s in starts)
    assert {(0, 0), (3, 18)} <= {(s[0], s[1]) for s in starts}


def test_a_random_voxel_is_any_of_the_true_ones():
    mask = np.random.default_rng(0).random((4, 5, 6)) < 0.1
    rng = sampling.generator(0)
    drawn = [sampling.random_voxel(mask, rng) for _ in range(400)]
    assert set(drawn) == set(map(tuple, np.argwhere(mask).tolist()))


def test_augmentation_turns_image_and_label_together_and_never_mirrors():
    image = np.random.default_rng(0).integers(1, 255, (12, 12, 8), dtype=np.uint8)
    size, turned, dimmed = (12, 12, 8), 0, 0
    for n in range(300):
        x, y, *intensity = sampling.turned_crop(image, image, size, sampling.generator(n))
        scale, shift = (torch.tensor(number) for number in intensity)
        x = sampling.augmented({"images": x, "scale": scale, "shift": shift})
        k = [k for k in range(4) if torch.equal(y, torch.rot90(torch.from_numpy(image), k, (0, 1)))]
        slope, offset = np.polyfit(y.flatten().numpy(), x.flatten().numpy() * 255, 1)
        np.testing.assert_allclose(slope * y + offset, x * 255, atol=1e-3)
        assert (
            len(k) == 1
            and 0.9 <= slope + 1e-6
            and slope <= 1.1 + 1e-6
            and abs(offset) <= 25.5 + 1e-3
        )
        turned, dimmed = turned + (k[0] > 0), dimmed + (abs(slope - 1) > 1e-5)

    assert 35 < turned < 85 and 12 < dimmed < 50  # p .2 and .1
    assert sampling.turned_crop(image, image, (12, 6, 4), sampling.generator(1))[0].shape == (
        12,
        6,
        4,
    )


def test_a_volume_that_cannot_be_used_stops_the_fine_tuning(phantoms, tmp_path):
    broken = [{**data.read_list(phantoms)[0], "label": str(tmp_path / "gone.nii.gz")}]
    with pytest.raises(data.BadVolume, match="gone.nii.gz"):
        list(sampling.load_batches(crops(broken, tmp_path), [[0]]))


def test_a_file_replaced_during_a_run_is_noticed_the_img_of_a_pair_too(tmp_path):
    voxels = np.random.default_rng(0).integers(-500, 500, (24, 20, 16)).astype(np.int16)
    nib.save(nib.Nifti1Pair(voxels, np.diag([10.0, 10.0, 10.0, 1])), tmp_path / "ct.hdr")
    pairs = dataset([{"image": str(tmp_path / "ct.hdr"), "label": None}], tmp_path)
    assert isinstance(pairs[0], dict)
    os.utime(tmp_path / "ct.img", ns=(0, 10**18))
    assert isinstance(pairs[1], data.BadVolume) and "changed or removed" in str(pairs[1])


def test_each_epoch_cuts_a_volume_anew(phantoms, tmp_path):
    cases = data.read_list(phantoms)
    for samples, name in ((dataset(cases, tmp_path), "views"), (crops(cases, tmp_path), "images")):
        made = [samples[number] for number in range(2 * len(cases))]
        for index in range(len(cases)):
            first, second = (sample for sample in made if sample["volume"] == index)
            assert not torch.equal(first[name], second[name]), (name, index)


def test_contrast_and_brightness_change_apart_each_in_one_crop_of_ten():
    volume, n = np.ones((4, 4, 4), np.uint8), 3000
    drawn = [sampling.turned_crop(volume, volume, (4, 4, 4), sampling.generator(k))[2:]
             for k in range(n)]
    scale, shift = np.array(drawn).T
    scaled, shifted = scale != 1, shift != 0
    assert .08 < scaled.mean() < .12 and .08 < shifted.mean() < .12          # 3.6 sigma
    assert .004 < (scaled & shifted).mean() < .016
    for values, low, high in ((scale[scaled], .9, 1.1), (shift[shifted], -.1, .1)):
        ends = .05 * (high - low)
        assert low <= values.min() < low + ends and high - ends < values.max() <= high


def test_views_and_crops_reach_both_ends_and_crops_are_turned_all_ways():
    rng = sampling.generator(0)
    starts = [sampling.random_starts((6, 5, 9), (5, 5, 5), (5, 4, 3), rng) for _ in range(200)]
    seen = [{*axis.tolist()} for axis in torch.stack(starts).flatten(0, 1).T]
    assert seen == [{0, 1}, {0, 1}, {*range(7)}]

    volume = np.random.default_rng(0).integers(1, 255, (4, 4, 4), dtype=np.uint8)
    ways = [torch.rot90(torch.from_numpy(volume), k) for k in range(4)]
    drawn = [sampling.turned_crop(volume, volume, (4, 4, 4), sampling.generator(n))[0]
             for n in range(300)]
    counts = [sum(torch.equal(one, way) for one in drawn) for way in ways]
    assert sum(counts) == 300 and all(8 < count < 36 for count in counts[1:])    # 20 expected
