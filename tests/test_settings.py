"""settings.py: what a flag accepts, and that presets and methods become defaults which
single flags override."""
import argparse
import subprocess
import sys
from pathlib import Path

import pytest

from smit import settings

ROOT = Path(__file__).resolve().parent.parent


def test_it_needs_the_standard_library_alone():
    code = (f"import sys; sys.path.insert(0, {str(ROOT / 'smit')!r}); import settings; "
            "print('torch' in sys.modules)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          cwd=ROOT / "tests")
    assert done.stdout == "False\n", done.stderr


@pytest.mark.parametrize("kind, good, bad", [
    (settings.share, {"0": 0, "1": 1, ".7": .7}, ["-.1", "1.1", "nan"]),
    (settings.rate, {"0": 0, ".9": .9}, ["-.1", "1", "nan"]),
    (settings.whole, {"0": 0, "12": 12}, ["-1"]),
    (settings.count, {"1": 1, "12": 12}, ["0", "-3"]),
    (settings.positive, {".5": .5}, ["0", "-1", "nan", "inf"]),
    (settings.not_negative, {"0": 0, "3": 3}, ["-1", "nan", "inf"])])
def test_ranges_are_those_of_the_flag(kind, good, bad):
    assert {text: kind(text) for text in good} == good
    for text in bad:
        with pytest.raises(argparse.ArgumentTypeError, match=text.replace(".", r"\.")):
            kind(text)


def test_one_size_stands_for_three_and_two_are_refused(capsys):
    parse = settings.parse_pretraining
    assert (parse("", ["--view", "48"]).view == [48] * 3
            == parse("", ["--view", "48", "48", "48"]).view)
    with pytest.raises(SystemExit, match="2"):
        parse("", ["--view", "48", "64"])
    assert "--view takes one number or three" in capsys.readouterr().err


def test_a_method_overrides_the_preset_and_a_flag_overrides_both():
    args = settings.parse_pretraining(
        "", ["--preset", "tiny", "--method", "dino", "--itd", ".5", "--batch", "7"])
    assert (args.mip, args.mpd, args.itd, args.mask_ratio) == (0, 0, .5, 0)
    assert (args.embed_dim, args.batch, args.prototypes) == (24, 7, 256)


@pytest.mark.parametrize("parse", [settings.parse_pretraining, settings.parse_finetuning])
def test_typed_epochs_count_though_a_preset_has_steps(parse):
    assert parse("", ["--preset", "tiny"]).steps
    assert parse("", ["--preset", "tiny", "--epochs", "7"]).steps is None
    assert parse("", ["--preset", "tiny", "--epochs", "7", "--steps", "9"]).steps == 9


@pytest.mark.parametrize("flags, least", [
    (["--crop", "16"], 16), (["--crop", "8", "--depths", "1", "1", "--heads", "1", "1"], None),
    (["--net", "unet", "--crop", "8"], 8), (["--crop", "16", "16", "17"], None)])
def test_a_crop_that_ends_as_one_voxel_is_refused(flags, least):
    args = settings.parse_finetuning("", flags)
    sizes = {"depths": args.depths}
    if least is None:
        settings.check_crop(args, sizes)
    else:
        with pytest.raises(ValueError, match=f"more than {least}"):
            settings.check_crop(args, sizes)


def test_a_crop_is_judged_by_the_patch_of_an_imported_encoder():
    args = settings.parse_finetuning("", ["--crop", "16"])
    sizes = {"depths": [1, 1, 1], "imported": {"patch": 2}}
    settings.check_crop(args, sizes)                        # 16 / 8: two voxels a side
    sizes["imported"]["patch"] = 4
    with pytest.raises(ValueError, match="more than 16"):
        settings.check_crop(args, sizes)


@pytest.mark.parametrize("parse, check", [
    (settings.parse_pretraining, settings.check_pretraining),
    (settings.parse_finetuning, settings.check_finetuning)])
def test_a_run_is_not_overwritten_that_is_to_be_begun_with(parse, check, tmp_path):
    out = tmp_path / "run"
    flags = ["--overwrite", "--out", str(out)]
    check(parse("", [*flags, "--init", str(tmp_path / "other.pt")]))
    with pytest.raises(ValueError, match="--overwrite would delete it"):
        check(parse("", [*flags, "--init", str(out / "student.pt")]))


@pytest.mark.parametrize("flag", ["--held_out", "--tta", "--export_test x"])
def test_flags_of_predicting_are_refused_where_nothing_is_predicted(flag, capsys):
    for mode in (["--predictions", "a", "--labels", "b"], ["--compare", "a", "b"]):
        with pytest.raises(SystemExit):
            settings.parse_evaluation("", [*mode, *flag.split()])
        assert "is of predicting with --weights" in capsys.readouterr().err


def test_fine_tuning_knows_which_sizes_were_typed():
    args = settings.parse_finetuning("", ["--preset", "tiny", "--heads", "2", "2", "2"])
    assert args.sizes_given == {"heads": [2, 2, 2]} and args.embed_dim == 24


@pytest.mark.parametrize("method", settings.METHODS)
def test_every_method_fits_both_presets(method):
    for preset in settings.PRETRAINING_PRESETS:
        settings.check_pretraining(
            settings.parse_pretraining("", ["--preset", preset, "--method", method]))
