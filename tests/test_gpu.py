"""On a GPU: what networks, losses and scripts compute there, beside the same on the CPU.

Skipped where there is none. `python -m pytest tests/test_gpu.py` takes a minute on one.
"""
import copy
import csv
import os
import signal

import nibabel
import numpy as np
import pytest
import torch
from conftest import SMALL

import evaluate
import finetune
import train_ssl
from smit import losses, segment
from smit.sliding import sliding_window
from smit.swin import SwinTransformer3D, fused_attention

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
SIZES = dict(embed_dim=24, depths=(2, 2), heads=(2, 4))     # heads of 12 channels, as in the paper
FINETUNE = ("--spacing 10 10 10 --crop 24 --embed_dim 8 --depths 1 1 --heads 2 2 --workers 0 "
            "--log_every 1 --lr 3e-3 --device cuda").split()


@pytest.fixture(autouse=True)
def full_precision():
    """Let float32 be float32: by default a GPU's convolutions round their factors to TF32."""
    torch.manual_seed(0)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


def assert_close(on_gpu, on_cpu, tolerance):
    """Compare tensors by the largest difference, as a share of the largest value."""
    on_gpu = on_gpu.detach().cpu().to(on_cpu.dtype)
    assert on_gpu.isfinite().all()
    assert (on_gpu - on_cpu).abs().max() <= tolerance * on_cpu.abs().max()


def outputs_and_gradients(net, x):
    """Run forward and backward: every output, and every gradient by name."""
    outputs = net(x)
    outputs = outputs if isinstance(outputs, list) else [outputs]
    sum(output.square().mean() for output in outputs).backward()
    return outputs, {name: p.grad for name, p in net.named_parameters() if p.grad is not None}


def compare(net, on_gpu, x, tolerance=1e-4):
    """Assert that a network and its copy on the GPU give alike outputs and alike gradients."""
    outputs, gradients = outputs_and_gradients(net, x)
    gpu_outputs, gpu_gradients = outputs_and_gradients(on_gpu, x.cuda())
    for ours, reference in zip(gpu_outputs, outputs, strict=True):
        assert_close(ours, reference.detach(), tolerance)
    assert gpu_gradients.keys() == gradients.keys()
    for name, reference in gradients.items():
        assert_close(gpu_gradients[name], reference, 10 * tolerance)


# ---------------------------------------------------------------- networks
# 20 x 18 x 22 tokens: shifted windows, and padded ones
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_encoder_computes_what_it_does_on_the_cpu(checkpointing):
    net = SwinTransformer3D(**SIZES, checkpointing=checkpointing)
    compare(net, copy.deepcopy(net).cuda(), torch.rand(2, 1, 40, 36, 44))


def test_the_encoder_without_gradient_is_the_one_with():
    net = SwinTransformer3D(**SIZES).cuda()
    x = torch.rand(2, 1, 40, 36, 44, device="cuda")
    with torch.no_grad():
        fused = net(x)
    for ours, reference in zip(fused, net(x), strict=True):
        assert_close(ours, reference.detach().cpu(), 1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_compiled_encoder_is_the_plain_one(checkpointing):
    net = SwinTransformer3D(**SIZES, checkpointing=checkpointing)
    compiled = copy.deepcopy(net).cuda()
    compiled.compile_blocks()
    compare(net, compiled, torch.rand(1, 1, 32, 32, 32))


def test_the_segmentation_network_computes_what_it_does_on_the_cpu():
    # in float32 its gradients are off by up to .015 of the largest even on one CPU: rounding
    # moves some values across the kinks of LeakyReLU
    net = segment.SegmentationNet(5, **SIZES).double()
    compare(net, copy.deepcopy(net).cuda(), torch.rand(2, 1, 32, 32, 32).double(), 1e-9)


@pytest.mark.parametrize("volumes, windows, heads, n, d", [
    (2, 5, 3, 8, 12), (70_000, 1, 1, 8, 12), (1, 40_000, 2, 8, 12),   # more than a kernel takes
    (2, 216, 4, 64, 12), (2, 27, 4, 64, 24), (2, 8, 4, 64, 48), (2, 1, 4, 64, 96),  # at 96^3
])
@pytest.mark.parametrize("dtype, tolerance", [
    (torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
def test_fused_attention_is_the_formula(volumes, windows, heads, n, d, dtype, tolerance):
    q, k, v = torch.randn(3, volumes, windows, heads, n, d, device="cuda").to(dtype)
    bias = torch.randn(heads, n, n, device="cuda")
    mask = None
    if windows > 1:
        mask = torch.where(torch.rand(windows, n, n, device="cuda") < .2, -1e4, 0.)
    y = fused_attention(q, k, v, bias, mask)

    scores = q.float() @ k.float().transpose(-2, -1) * d ** -.5 + bias
    if mask is not None:
        scores = scores + mask[:, None]
    assert y.dtype == dtype
    assert_close(y, (scores.softmax(-1) @ v.float()).cpu(), tolerance)


@pytest.mark.parametrize("stitch_on_cpu", [False, True])
def test_a_volume_is_predicted_as_on_the_cpu(stitch_on_cpu):
    net = segment.SegmentationNet(5, **SIZES).eval()
    volume = torch.rand(1, 1, 40, 33, 50)
    reference = sliding_window(net, volume, (32, 32, 32), batch=4)
    logits = sliding_window(net.cuda(), volume, (32, 32, 32), batch=4, stitch_on_cpu=stitch_on_cpu)
    assert logits.is_cuda != stitch_on_cpu
    assert_close(logits, reference, 1e-4)


# ---------------------------------------------------------------- losses
def loss_of(name, device):
    """Compute a loss on fixed numbers: (its value, the gradient of what the network said)."""
    draw = torch.Generator().manual_seed(3)
    hidden = torch.rand(2, 30, generator=draw) < .7
    if name == "mip":
        given = torch.rand(2, 1, 6, 6, 6, generator=draw).to(device).requires_grad_()
        views = torch.rand(2, 1, 6, 6, 6, generator=draw).to(device)
        counted = (torch.rand(2, 6, 6, 6, generator=draw) < .7).to(device)
        loss = losses.mip_loss(given, views, counted)
    elif name == "mpd":
        given = torch.randn(2, 30, 16, generator=draw).to(device).requires_grad_()
        taught = torch.randn(2, 30, 16, generator=draw).to(device)
        loss = losses.mpd_loss(given, taught, hidden.to(device), torch.zeros(16, device=device),
                               .1, .04, losses.hidden_index(hidden).to(device))
    else:
        given = torch.randn(4, 16, generator=draw).to(device).requires_grad_()
        taught = torch.randn(4, 16, generator=draw).to(device)
        loss = losses.itd_loss(given, taught, torch.zeros(16, device=device), .1, .04)
    loss.backward()
    return loss.detach(), given.grad


@pytest.mark.parametrize("name", ["mip", "mpd", "itd"])
def test_a_loss_and_its_gradient_are_those_of_the_cpu(name):
    for ours, reference in zip(loss_of(name, "cuda"), loss_of(name, "cpu")):
        assert_close(ours, reference, 1e-5)


# ---------------------------------------------------------------- scripts
def pretrain(phantoms, out, *flags):
    """Pre-train on the phantoms, and read log.csv: {column: [number]}."""
    train_ssl.main(train_ssl.parse_arguments([
        *SMALL, "--device", "cuda", "--precision", "fp32", "--data", str(phantoms),
        "--cache", str(out.parent / "cache"), "--out", str(out), *flags]))
    with open(out / "log.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    return {name: [row[name] for row in rows] for name in rows[0]}


def numbers(log, name):
    return np.array(log[name], float)


def test_pre_training_takes_the_steps_that_it_takes_on_the_cpu(phantoms, tmp_path):
    flags = ("--steps", "4", "--lr", "1e-4")         # AdamW turns a gradient's rounding into lr
    on_gpu = pretrain(phantoms, tmp_path / "gpu", *flags)
    on_cpu = pretrain(phantoms, tmp_path / "cpu", *flags, "--device", "cpu")
    for name in ("loss", "mip", "mpd", "itd", "grad_norm"):
        np.testing.assert_allclose(numbers(on_gpu, name), numbers(on_cpu, name), rtol=2e-3)


def test_a_resumed_run_takes_the_steps_of_an_uninterrupted_one(phantoms, tmp_path):
    flags = ("--steps", "6", "--drop_path", ".3")
    whole = pretrain(phantoms, tmp_path / "whole", *flags)

    advance = train_ssl.progress.Progress.advance
    with pytest.MonkeyPatch.context() as patch:
        def advance_and_stop(self):
            advance(self)
            stops.append(True)
            if len(stops) == 3:
                os.kill(os.getpid(), signal.SIGTERM)
        stops = []
        patch.setattr(train_ssl.progress.Progress, "advance", advance_and_stop)
        pretrain(phantoms, tmp_path / "halved", *flags)
    halved = pretrain(phantoms, tmp_path / "halved", *flags, "--resume")
    assert len(stops) == 3 and len(halved["loss"]) == 6
    np.testing.assert_allclose(numbers(halved, "loss"), numbers(whole, "loss"), rtol=1e-3)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("way", [(), ("--checkpointing",), ("--compile",)], ids=str)
def test_half_precision_learns(precision, way, phantoms, tmp_path):
    log = pretrain(phantoms, tmp_path / "run", "--precision", precision, "--steps", "40", *way)
    mip = numbers(log, "mip")
    assert np.isfinite(mip).all() and mip[-10:].mean() < mip[:10].mean()
    assert int(log["skipped"][-1]) <= 2                 # the first loss scale may be too large


def test_what_is_fine_tuned_on_a_gpu_is_scored_alike_on_both(phantoms, tmp_path):
    cache = ["--cache", str(tmp_path / "cache")]
    finetune.main(finetune.parse_arguments([
        *FINETUNE, *cache, "--data", str(phantoms), "--steps", "60",
        "--out", str(tmp_path / "run")]))
    for device in ("cpu", "cuda"):
        evaluate.main(evaluate.parse_arguments([
            "--weights", str(tmp_path / "run/last.pt"), "--data", str(phantoms),
            "--key", "training", "--precision", "fp32", "--device", device,
            "--out", str(tmp_path / device)]))

    paths = sorted((tmp_path / "cpu").glob("*.nii.gz"))
    assert paths
    for path in paths:
        on_cpu, on_gpu = (np.asanyarray(nibabel.load(tmp_path / device / path.name).dataobj)
                          for device in ("cpu", "cuda"))
        assert on_cpu.any() and (on_cpu == on_gpu).mean() > .999
