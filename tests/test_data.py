"""The boundary against files: refusals, acceptance, and that accepted files are read right."""

import json
import os
import random
import re
import shutil
import sys
import tempfile
import threading
from pathlib import Path

import forked
import hostile
import nibabel as nib
import numpy as np
import pytest
import torch

import finetune
import train_ssl
from smit import data, runtime
from smit import transforms as T
from smit.data import cases

REAL = Path(__file__).parents[2] / "shared" / "data"
needs_real = pytest.mark.skipif(not REAL.is_dir(), reason="no real volumes in ../shared/data")


def use(item):
    """Read an item of hostile.build as the scripts would; what it holds, or its refusal."""
    try:
        if item.kind == "list":
            return data.read_list(item.path)
        if item.kind == "label":
            return data.read_label(item.path, 14)
        data.check_case({"image": item.path, "label": None}, False)
        data.load_case({"image": item.path, "label": None})
        return data.read_volume(item.path)
    except ValueError as refusal:
        return refusal


@pytest.fixture(scope="module")
def items(tmp_path_factory):
    return hostile.build(tmp_path_factory.mktemp("hostile"))


def test_every_bad_file_is_refused_by_name_and_every_odd_one_accepted(items):
    assert len(items) >= 60
    for item in items:
        result = use(item)
        assert isinstance(result, ValueError) != item.good, f"{item}: {result}"
        if item.good and item.kind == "label":
            empty = "empty" in item.path
            assert np.array_equal(result[0], hostile.LABEL * (not empty)), item
        if not item.good:
            assert item.path in str(result) and "\n" not in str(result) and ";" in str(result), (
                f"{item}: {result}"
            )
            assert item.kind == "list" or isinstance(result, data.BadVolume), f"{item}: {result!r}"


def test_the_same_volume_in_every_encoding_has_identical_voxels(items):
    same = [data.read_volume(item.path) for item in items if item.kind == "image" and item.good]
    assert len(same) > 20
    for voxels, affine in same:
        assert voxels.dtype == torch.float32 and affine.dtype == np.float64
        assert np.array_equal(voxels.numpy(), hostile.VOXELS) and np.allclose(
            affine, hostile.AFFINE, atol=1e-6
        )


def test_a_refusal_takes_little_time_and_memory(items):
    code = (
        "import sys, time, resource; from smit import data\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024\n"
        "for path in sys.argv[1:]:\n    before, start = peak(), time.process_time()\n"
        "    try: data.read_volume(path)\n"
        "    except data.BadVolume: print(peak() - before, time.process_time() - start)\n"
    )
    paths = [item.path for item in items if "bomb" in item.path]
    out = forked.run("-c", code, *paths, folder=forked.ROOT).stdout
    cost = np.array([line.split() for line in out.splitlines()], float)

    assert len(cost) == len(paths) >= 5 and cost[:, 0].max() < 300 and cost[:, 1].max() < 2, out


def test_no_flipped_bit_of_a_gz_file_changes_a_voxel(tmp_path):
    path, coin = tmp_path / "flipped.nii.gz", random.Random(0)
    nib.save(nib.Nifti1Image(hostile.VOXELS, hostile.AFFINE), path)
    whole = path.read_bytes()
    refused = 0

    for _ in range(300):
        bit = coin.randrange(len(whole) * 8)
        path.write_bytes(
            whole[: bit // 8] + bytes([whole[bit // 8] ^ 1 << bit % 8]) + whole[bit // 8 + 1 :]
        )
        result = use(hostile.Item(str(path), "image", False))
        refused += isinstance(result, data.BadVolume)
        assert isinstance(result, data.BadVolume) or np.array_equal(
            result[0].numpy(), hostile.VOXELS
        )
    assert refused > 280


COST = """import resource, sys, warnings; warnings.simplefilter("ignore")
import torch; torch.set_num_threads(1)
from smit import data, transforms
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
small, large, kind, *spacing = sys.argv[1:]
settings = data.Preparation(tuple(map(float, spacing)), kind)
data.load_case({"image": small}, settings)
before = peak()
made = data.load_case({"image": large}, settings)
grid = transforms.ras_grid(made["original_shape"], made["original_affine"])
sides = grid[0], transforms.resampled_grid(*grid, settings.spacing_mm)[0]
print((peak() - before) / 4 / max(torch.Size(shape).numel() for shape in sides))"""


def cost(tmp_path, kind, spacing, dtype=np.int16, order="<", axes=(0, 1, 2)):
    """Peak memory of loading 8.6 million voxels, in float32 sizes of the larger of two grids."""
    voxels = (
        (np.arange(224 * 200 * 192).reshape(224, 200, 192) % 901 - 450)
        .transpose(axes)
        .astype(dtype)
    )
    header = nib.Nifti1Header(endianness=order)
    header.set_data_dtype(dtype)
    affine = hostile.AFFINE[:, [*axes, 3]]
    for name, part in (("small", voxels[:30, :30, :30]), ("large", voxels)):
        nib.save(nib.Nifti1Image(part, affine, header), tmp_path / f"{name}.nii")
    paths = tmp_path / "small.nii", tmp_path / "large.nii"
    return float(forked.run("-c", COST, *paths, kind, *spacing, folder=forked.ROOT).stdout)


@pytest.mark.parametrize(
    "kind, spacing, how",
    [
        ("ct", (1.5, 2.0, 2.5), {}),
        ("ct", (1.5, 2.0, 2.5), dict(dtype=np.float64)),
        ("ct", (1.0, 1.5, 2.0), dict(order=">")),
        ("ct", (4.0, 4.0, 4.0), dict(axes=(2, 0, 1))),
        ("mr", (1.5, 2.0, 2.5), {}),
    ],
)
def test_loading_stays_below_three_times_the_float32_size(kind, spacing, how, tmp_path):
    # Python 3.10 holds the arguments of a call until it returns, and so one volume more
    most = 3 if sys.version_info >= (3, 11) else 4
    assert cost(tmp_path, kind, spacing, **how) < most


def test_folders_are_read_recursively_in_natural_order(tmp_path):
    for name in ("b/case10.nii.gz", "b/case2.nii", "a/x.hdr", "a/x.img", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "loop").symlink_to(tmp_path)
    found = data.read_list(tmp_path)

    assert [os.path.relpath(case["image"], tmp_path) for case in found] == [
        "a/x.hdr",
        "b/case2.nii",
        "b/case10.nii.gz",
    ]
    assert all(case["label"] is None for case in found)

    (tmp_path / "b/case2.nii.gz").touch()
    with pytest.raises(ValueError, match="case2.nii.gz is listed twice"):
        data.read_list(tmp_path)


def test_msd_and_nnunet_lists_give_images_labels_and_names(tmp_path):
    for name in (
        "imagesTr/p1_0000.nii.gz",
        "imagesTr/p10_0000.nii.gz",
        "labelsTr/p1.nii.gz",
        "imagesTs/q_0000.nii.gz",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    nnunet, msd = tmp_path / "dataset.json", tmp_path / "msd.json"
    nnunet.write_text(
        json.dumps({"channel_names": {"0": "T2"}, "labels": {"background": 0, "liver": 1}})
    )
    msd.write_text(
        json.dumps(
            {
                "labels": {"0": "background", "1": "liver"},
                "test": ["imagesTs/q_0000.nii.gz"],
                "val": [{"image": "imagesTr/p1_0000.nii.gz", "label": "labelsTr/p1.nii.gz"}],
            }
        )
    )
    first = {
        "image": str(tmp_path / "imagesTr/p1_0000.nii.gz"),
        "label": str(tmp_path / "labelsTr/p1.nii.gz"),
    }
    test = [{"image": str(tmp_path / "imagesTs/q_0000.nii.gz"), "label": None}]

    assert data.read_list(nnunet)[0] == first and len(data.read_list(nnunet)) == 2
    assert data.read_list(nnunet, "test") == test
    assert data.read_list(msd, "val") == [first] and data.read_list(msd, "test") == test
    assert data.label_names(nnunet) == data.label_names(msd) == {0: "background", 1: "liver"}
    assert data.label_names(tmp_path / "imagesTr") is None and data.label_names(
        tmp_path
    ) == data.label_names(msd)
    with pytest.raises(ValueError, match="'training'.*'val'"):
        data.read_list(msd)


@pytest.mark.parametrize(
    "labels",
    [
        '{"liver": NaN}',
        '{"liver": Infinity}',
        '{"liver": 1.5}',
        '{"liver": true}',
        '{"liver": -1}',
        '{"liver": 256}',
        '{"liver": 1, "spleen": 1}',
        '{"1": "liver", "01": "spleen"}',
        '{"1": "liver", "1": "spleen"}',
        '{"all": [1, 2]}',
        '["liver"]',
        '{"one": "liver"}',
        '{"liver": null}',
    ],
)
def test_labels_without_one_plain_number_each_are_refused(labels, tmp_path):
    (tmp_path / "dataset.json").write_text(f'{{"labels": {labels}}}')
    with pytest.raises(ValueError, match="dataset.json: "):
        data.label_names(tmp_path / "dataset.json")


def test_several_lists_are_read_as_one_and_all_that_is_wrong_is_kept(items, tmp_path):
    paths = {os.path.basename(item.path): item.path for item in items}
    cases, problems = data.read_lists(
        [paths[name] for name in ("list.txt", "brace.json", "tab.txt", "leaves.json")]
    )
    assert [os.path.basename(case["image"]) for case in cases] == ["plain.nii"]

    bad = [paths[name] for name in ("brace.json", "tab.txt", "leaves.json")]
    assert [text.split(": ")[0] for text in problems] == bad
    assert "two sources" in problems[1]
    assert data.has_split(paths["BOM.JSON"], "training") and not data.has_split(
        paths["BOM.JSON"], "validation"
    )
    assert not data.has_split(paths["brace.json"], "training") and not data.has_split(
        paths["list.txt"], "training"
    )


@pytest.mark.parametrize("script", [train_ssl, finetune], ids=lambda script: script.__name__)
def test_check_names_all_that_is_wrong_at_once_and_writes_nothing(
    script, phantoms, tmp_path, capsys
):
    def check(listing):
        flags = [
            "--data",
            listing,
            "--spacing",
            10,
            10,
            10,
            "--out",
            tmp_path / "out",
            "--check",
            "--workers",
            2,
        ]
        script.main(script.parse_arguments([str(flag) for flag in flags]))

    check(phantoms)
    assert "all good" in capsys.readouterr().out
    listing, images = tmp_path / "data/dataset.json", tmp_path / "data/imagesTr"
    shutil.copytree(phantoms.parent, listing.parent)
    content = json.loads(listing.read_text())
    listing.write_text(
        json.dumps({**content, "training": content["training"][:3] + content["training"][2:3]})
    )
    (images / "phantom0000.nii.gz").unlink()
    flipped = bytearray((images / "phantom0001.nii.gz").read_bytes())
    flipped[-6] ^= 1  # of the CRC
    (images / "phantom0001.nii.gz").write_bytes(flipped)
    with pytest.raises(
        ValueError, match="listed twice.*\n.*phantom0000.*No such file.*\n.*phantom0001.*CRC"
    ) as error:
        check(listing)
    assert str(error.value).startswith("3 problems") and not (tmp_path / "out").exists()


def test_text_lists_hold_labels_and_are_relative_to_the_list(items):
    pair = next(data.read_list(item.path) for item in items if item.path.endswith("bom.csv"))
    assert [os.path.basename(pair[0][kind]) for kind in ("image", "label")] == [
        "plain.nii",
        "float32.nii",
    ]
    assert os.path.isfile(pair[0]["image"]) and os.path.isfile(pair[0]["label"])


def test_pre_flight_lists_every_problem_once(items):
    bad = [item.path for item in items if "/bad/" in item.path and item.kind == "image"]
    good = [item.path for item in items if item.kind == "image" and item.good]
    data.check_cases([{"image": path, "label": good[0]} for path in good], labels=True)
    cases = [{"image": path, "label": None} for path in [*good, *bad[:5]]]

    with pytest.raises(ValueError) as error:
        data.check_cases(cases)
    assert str(error.value).splitlines()[0] == "5 problems:"
    assert str(error.value).count("\n") == 5 and all(path in str(error.value) for path in bad[:5])
    with pytest.raises(ValueError, match=f"{len(good)} problems:\n.*has no label"):
        data.check_cases([{"image": path, "label": None} for path in good], labels=True)


def test_labels_on_another_grid_are_refused_and_the_full_pass_sees_values(items):
    paths = {os.path.basename(item.path): item.path for item in items}
    for label in ("oblique.nii", "one_slice.nii"):
        with pytest.raises(ValueError, match=label):
            data.check_cases([{"image": paths["plain.nii"], "label": paths[label]}], labels=True)

    cases = [
        {"image": paths["plain.nii"], "label": paths[f"label_{kind}.nii"]}
        for kind in ("float", "half", "empty")
    ]
    data.check_cases(cases, labels=True)

    with pytest.raises(ValueError, match="1 problem:\n.*half.*1.5"):
        data.check_voxels(cases, T.Preparation(), labels=True, num_classes=14)


def test_a_label_is_prepared_onto_its_images_grid(items):
    paths = {os.path.basename(item.path): item.path for item in items}
    case = {"image": paths["plain.nii"], "label": paths["label_uint8.nii.gz"]}
    made = data.load_case(case, T.Preparation((1.5, 2.0, 2.5)), with_label=True)
    assert (
        made["original_shape"] == hostile.SHAPE
        and made["image"].dtype == made["label"].dtype == torch.uint8
    )

    bright = made["image"] > round(255 * 175 / 425)  # 0 HU: the label is VOXELS > 0
    assert torch.equal(made["label"] > 0, bright), (
        "same spacing, so only orientation and crop were done"
    )


@pytest.mark.parametrize(
    "name",
    [
        "plain.nii",
        "nifti2.nii.gz",
        "big_endian.nii",
        "one_frame.nii",
        "pair.hdr",
        "oblique.nii",
        "no_form.nii",
        "slope.nii",
        "singletons.nii",
        "forms_differ.nii",
        "qfac_0.nii",
        "negative_pixdim.nii",
    ],
)
def test_a_written_label_has_its_images_shape_affine_and_codes(items, tmp_path, name):
    image = nib.load(next(item.path for item in items if item.path.endswith("/" + name)))
    data.write_label(tmp_path / "made.nii.gz", hostile.LABEL, image.get_filename())
    made = nib.load(tmp_path / "made.nii.gz")

    assert (
        made.shape == image.shape
        and np.array_equal(made.affine, image.affine)
        and made.get_data_dtype() == np.uint8
    )
    assert all(
        made.header[code] == image.header[code]
        for code in ("sform_code", "qform_code", "xyzt_units")
    )
    assert np.array_equal(np.asarray(made.dataobj).squeeze(), hostile.LABEL)
    assert np.array_equal(data.read_label(tmp_path / "made.nii.gz")[0], hostile.LABEL)


def test_the_cache_returns_what_load_case_makes_as_memory_maps(items, tmp_path):
    paths = {os.path.basename(item.path): item.path for item in items}
    case = {"image": paths["plain.nii"], "label": paths["label_uint8.nii.gz"]}
    for _ in range(2):
        image, label = data.cached(case, T.Preparation(), tmp_path, with_label=True)
        made = data.load_case(case, T.Preparation(), with_label=True)
        assert np.array_equal(image, made["image"]) and np.array_equal(label, made["label"])
        assert isinstance(image, np.memmap) and isinstance(label, np.memmap)
    assert len(list(tmp_path.rglob("*.npy"))) == 1
    image, none = data.cached(case, T.Preparation((3.0, 3.0, 3.0)), tmp_path)

    assert none is None and image.shape != made["image"].shape


def test_a_damaged_cache_entry_is_made_again(items, tmp_path):
    case = {
        "image": next(item.path for item in items if item.path.endswith("good/plain.nii")),
        "label": None,
    }
    image = np.array(data.cached(case, T.Preparation(), tmp_path)[0])
    (entry,) = tmp_path.rglob("*.npy")
    whole = entry.read_bytes()

    for damaged in (
        b"",
        whole[:40],
        whole[:-1],
        whole[:200] + b"x" + whole[201:],
        b"\0" * len(whole),
        whole + b"x",
    ):
        entry.write_bytes(damaged)
        assert np.array_equal(data.cached(case, T.Preparation(), tmp_path)[0], image)
        assert entry.read_bytes() == whole


def test_a_changed_source_makes_a_new_entry_and_a_removed_one_is_named(tmp_path):
    path = tmp_path / "case.nii"
    path.write_bytes(hostile.plain())
    case = {"image": str(path), "label": None}
    before = np.array(data.cached(case, T.Preparation(), tmp_path / "cache")[0])
    path.write_bytes(hostile.plain(hostile.VOXELS[::-1].copy()))
    assert not np.array_equal(data.cached(case, T.Preparation(), tmp_path / "cache")[0], before)

    path.unlink()
    with pytest.raises(data.BadVolume, match="case.nii: No such file"):
        data.cached(case, T.Preparation(), tmp_path / "cache")


def test_a_source_that_changes_while_it_is_read_is_not_kept(tmp_path, monkeypatch):
    path, prepare = tmp_path / "case.nii", cases.prepare
    path.write_bytes(hostile.plain())

    def slowly(*args):
        os.utime(path, (0, 0))  # as a copy that is still running would
        return prepare(*args)

    monkeypatch.setattr(cases, "prepare", slowly)
    with pytest.raises(data.BadVolume, match="case.nii: changed while it was read"):
        data.cached({"image": str(path), "label": None}, T.Preparation(), tmp_path / "cache")
    assert not list(tmp_path.rglob("*.npy"))


def test_many_may_fill_the_cache_at_once_and_none_is_held_open(items, tmp_path):
    cases = [
        {"image": item.path, "label": None} for item in items if item.kind == "image" and item.good
    ]
    results, opened = [], len(os.listdir("/proc/self/fd"))

    def fill():
        results.append([data.cached(case, T.Preparation(), tmp_path)[0].sum() for case in cases])

    threads = [threading.Thread(target=fill) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4 and all(result == results[0] for result in results)
    assert len(os.listdir("/proc/self/fd")) <= opened + 2


@needs_real
@pytest.mark.parametrize(
    "image, label, modality, organ",
    [
        ("btcv/imagesTr/img0001.nii.gz", "btcv/labelsTr/label0001.nii.gz", "ct", 6),
        ("chaos_t2/imagesTr/chaos01_0000.nii.gz", "chaos_t2/labelsTr/chaos01.nii.gz", "mr", 1),
    ],
)
def test_the_liver_survives_preparation_and_the_way_back(image, label, modality, organ):
    case = {"image": str(REAL / image), "label": str(REAL / label)}
    made = data.load_case(case, T.Preparation(modality=modality), with_label=True)
    right = made["label"].eq(organ).nonzero()[:, 0].float().mean() / made["label"].shape[0]
    assert right > 0.5, "the first axis runs to the patient's right, where the liver is"

    shape, affine = T.ras_grid(made["original_shape"], made["original_affine"])
    back = T.regrid(made["label"].eq(organ).float(), made["affine"], affine, shape) > 0.5
    back, truth = (
        T.from_ras(back, made["original_affine"]),
        data.read_label(case["label"])[0].eq(organ),
    )
    dice = 2 * (back & truth).sum() / (back.sum() + truth.sum())
    assert dice > 0.95


def test_volumes_are_prepared_ahead_by_every_rank_its_share(phantoms, tmp_path, run_script):
    folder = shutil.copytree(phantoms.parent / "imagesTr", tmp_path / "images")
    sorted(folder.iterdir())[-1].unlink()
    for number in (1, 3):                                    # in the second rank's share
        path = folder / f"phantom000{number}.nii.gz"
        image = nib.load(path)
        stored = (image.get_fdata() + 1024).clip(0).astype(np.int16)
        nib.save(nib.Nifti1Image(stored, image.affine), path)
    flags = ["--data", folder, "--spacing", 10, 10, 10, "--workers", 0, "--device", "cpu",
             "--cache", "cache"]
    done = run_script("train_ssl.py", *flags, "--prepare_only", ranks=2)
    assert "prepared 2 of 2 volumes on each of 2 ranks, 0:00:00 left" in done.stdout
    assert re.search(r"phantom000[13].*1024 added.*\[1 more: phantom000[13]", done.stderr)
    assert len(list((tmp_path / "cache").glob("*/*.npy"))) == 4 and not (tmp_path / "runs").exists()


def test_ranks_that_prepare_meet_before_anyone_waits_too_long(phantoms, tmp_path, monkeypatch):
    """Another rank has two cases more than this one, and the first is never waited for."""
    class First(runtime.Ranks):
        def agree(self, *flags):
            met.append(flags)
            return tuple(flag or len(met) <= 5 for flag in flags)

        def gather(self, values):
            return [values, []]

    met = []
    monkeypatch.setattr(cases, "TELL_EVERY_S", 1e-9)                # a round for every case
    ranks = First(0, 2, torch.device("cpu"))
    cases_found = data.read_list(phantoms)[:4]
    data.prepare_ahead(cases_found, data.Preparation((10, 10, 10)), tmp_path / "cache", ranks)
    assert met == [(True,), (True,), (False,), (False,), (False,), (False,)]
    assert len(list((tmp_path / "cache").glob("*/*.npy"))) == 2


def test_bad_volumes_are_all_named_after_the_others_were_prepared(phantoms, tmp_path):
    shutil.copytree(phantoms.parent / "imagesTr", tmp_path / "images")
    for number in (0, 3):
        path = tmp_path / f"images/phantom000{number}.nii.gz"
        path.write_bytes(path.read_bytes()[:-9])
    cases_found = data.read_list(tmp_path / "images")
    alone = runtime.Ranks(0, 1, torch.device("cpu"))

    with pytest.raises(ValueError, match="2 problems(.|\n)*phantom0000(.|\n)*phantom0003"):
        data.prepare_ahead(cases_found, data.Preparation((10, 10, 10)), tmp_path / "cache", alone)
    assert len(list((tmp_path / "cache").glob("*/*.npy"))) == 3


def test_what_one_process_has_verified_another_does_not_read_again(phantoms, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    case = data.read_list(phantoms)[0]
    settings, reads, read = data.Preparation((10, 10, 10)), [], Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: reads.append(path.suffix) or read(path))
    for _ in range(3):
        for memory in (cases.is_whole, cases.verified_folder, cases.read_concerns):
            memory.cache_clear()                        # as in a process of its own
        data.cached(case, settings, tmp_path / "cache")
    assert reads.count(".npy") == 1                     # made, then verified once, then trusted

    (entry,) = (tmp_path / "cache").glob("*/*.npy")
    damaged = bytearray(read(entry))
    damaged[-1] ^= 1
    entry.write_bytes(damaged)  # its state is another: read again, and made anew
    data.cached(case, settings, tmp_path / "cache")
    assert reads.count(".npy") == 2 and read(entry)[-1] != damaged[-1]


def test_a_sample_from_the_cache_opens_no_original(phantoms, tmp_path, monkeypatch):
    case, settings = data.read_list(phantoms)[0], data.Preparation((10, 10, 10))
    data.cached(case, settings, tmp_path)
    monkeypatch.setattr(cases, "read_header", None)     # calling it would raise
    image, _ = data.cached(case, settings, tmp_path)
    assert image.max() == 255
