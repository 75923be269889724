"""Where a network's output meets numpy: with tensors that refuse numpy as one on a GPU does,
no GPU needed."""
import numpy as np
import pytest
import torch
from conftest import SMALL
from on_gpu import on_gpu

import evaluate
import finetune
import train_ssl
from smit import figures, metrics, pretrain, segment, swin
from smit.study import probe, reconstruction

FINETUNE = (
    "--spacing 10 10 10 --crop 24 --embed_dim 8 --depths 1 1 --heads 2 2 "
    "--workers 0 --log_every 1 --device cpu "
    "--crops_per_volume 2 --steps 2").split()


def send_to_gpu(monkeypatch, owner, name):
    """Let owner.name return its result as a GPU would hold it."""
    original = getattr(owner, name)

    def moved(*arguments, **settings):
        result = original(*arguments, **settings)
        if isinstance(result, torch.Tensor):
            return on_gpu(result)
        kind = type(result)
        values = [on_gpu(value) if isinstance(value, torch.Tensor) else value for value in result]
        return kind(*values) if hasattr(result, "_fields") else kind(values)
    monkeypatch.setattr(owner, name, moved)


@pytest.fixture(scope="module")
def best(phantoms, tmp_path_factory):
    """The best.pt of two steps of fine-tuning."""
    out = tmp_path_factory.mktemp("tuned")
    finetune.main(finetune.parse_arguments([*FINETUNE, "--data", str(phantoms),
                                            "--out", str(out / "run"),
                                            "--cache", str(out / "cache")]))
    return out / "run/best.pt"


@pytest.fixture(scope="module")
def student(phantoms, tmp_path_factory):
    """The student.pt of two steps of pre-training."""
    out = tmp_path_factory.mktemp("pretrained")
    train_ssl.main(train_ssl.parse_arguments([*SMALL, "--data", str(phantoms),
                                              "--out", str(out / "run"),
                                              "--cache", str(out / "cache"), "--steps", "2"]))
    return out / "run/student.pt"


def test_the_stand_in_refuses_numpy_and_tensors_of_the_cpu():
    tensor = on_gpu(torch.rand(2, 3))
    for meet in (np.asarray, lambda x: x.numpy(), lambda x: x + torch.rand(2, 3)):
        with pytest.raises((TypeError, RuntimeError), match="cuda"):
            meet(tensor)
    assert metrics.to_numpy(tensor).shape == (2, 3)


def test_fine_tuning_ends_with_all_its_files_where_predictions_are_on_a_gpu(
        phantoms, tmp_path, monkeypatch):
    send_to_gpu(monkeypatch, segment, "predict")
    finetune.main(finetune.parse_arguments([*FINETUNE, "--data", str(phantoms),
                                            "--out", str(tmp_path / "run"),
                                            "--cache", str(tmp_path / "cache")]))
    for name in ("best.pt", "last.pt", "index.html"):
        assert (tmp_path / "run" / name).is_file()


def test_evaluation_writes_what_a_gpu_predicted(best, phantoms, tmp_path, monkeypatch):
    flags = ["--weights", str(best), "--data", str(phantoms), "--key", "training",
             "--device", "cpu"]
    evaluate.main(evaluate.parse_arguments([*flags, "--out", str(tmp_path / "cpu")]))
    send_to_gpu(monkeypatch, segment, "predict")
    evaluate.main(evaluate.parse_arguments([*flags, "--out", str(tmp_path / "gpu")]))

    for path in (tmp_path / "cpu").glob("*.nii.gz"):
        assert path.read_bytes() == (tmp_path / "gpu" / path.name).read_bytes()


def test_pre_training_draws_what_a_student_on_a_gpu_predicts(phantoms, tmp_path, monkeypatch):
    flags = train_ssl.parse_arguments([*SMALL, "--data", str(phantoms),
                                       "--out", str(tmp_path / "run"),
                                       "--cache", str(tmp_path / "cache"), "--steps", "2"])
    report = train_ssl.figures.pretraining_report

    def on_card(out, config, student, sample, step):
        with monkeypatch.context() as patch:
            send_to_gpu(patch, pretrain.SMIT, "forward")
            report(out, config, student, sample, step)
            send_to_gpu(patch, swin.SwinTransformer3D, "forward")
            # the token panel takes the encoder alone
            head, student.voxel_head = student.voxel_head, None
            report(out, config, student, sample, step)
            student.voxel_head = head
    monkeypatch.setattr(train_ssl.figures, "pretraining_report", on_card)
    train_ssl.main(flags)
    assert (tmp_path / "run/index.html").is_file()


def test_figure_5_and_the_probe_take_outputs_of_a_gpu(student, phantoms, tmp_path, monkeypatch):
    send_to_gpu(monkeypatch, pretrain.SMIT, "forward")
    reconstruction.fig5(tmp_path / "fig5", {("smit", 0): str(student)}, {"ct": str(phantoms)},
                        str(tmp_path / "cache"))
    monkeypatch.undo()
    send_to_gpu(monkeypatch, swin.SwinTransformer3D, "forward")
    settings = probe.Settings(str(phantoms), "ct", [None], [None], str(tmp_path / "cache"))
    probe.probe(tmp_path / "probe", {("smit", 0): str(student)}, False, settings)

    assert (tmp_path / "fig5/fig5.md").is_file() and (tmp_path / "probe/probe.md").is_file()


@pytest.mark.parametrize("panel", ["reconstruction", "overlay", "token"])
def test_panels_take_tensors_of_any_device(panel, tmp_path):
    image, label = torch.rand(12, 14, 10), torch.randint(3, (12, 14, 10))
    arguments = {"reconstruction": (image, image > .5, image.flip(0), (1, 1, 1)),
                 "overlay": (image, label, label.flip(0), (1, 1, 1), {1: "liver"}),
                 "token": (image, [torch.rand(4, 6, 7, 5)], (1, 1, 1))}[panel]
    draw = getattr(figures, f"{panel}_panel")
    there = [
        [on_gpu(part) for part in a] if isinstance(a, list)
        else on_gpu(a) if isinstance(a, torch.Tensor)
        else a
        for a in arguments
    ]
    draw(tmp_path / "cpu.svg", *arguments)
    draw(tmp_path / "gpu.svg", *there)
    assert (tmp_path / "cpu.svg").read_bytes() == (tmp_path / "gpu.svg").read_bytes()
