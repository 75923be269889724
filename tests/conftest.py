"""Shared by the tests: small phantoms, and the scripts run in small, as one process or as ranks."""
import functools
import signal
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # a bare `pytest` looks for modules in tests/ only

import forked  # noqa: E402
from smit import phantom  # noqa: E402
from smit.data import concerns  # noqa: E402

SMALL = (
    "--spacing 10 10 10 --crop 24 --view 16 --mask_cell 4 --embed_dim 8 --depths 1 1 --heads 2 2 "
    "--head_width 16 --bottleneck 8 --prototypes 32 --lr 3e-3 --warmup_epochs 40 --workers 0 "
    "--log_every 1 --device cpu").split()
# the networks are small, and on a busy machine threads wait for each other
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def phantoms(tmp_path_factory):
    """The dataset.json of five coarse CT phantoms."""
    folder = tmp_path_factory.mktemp("phantoms")
    return phantom.write_dataset(folder, 5, spacing_mm=(10.0, 10.0, 10.0))


@pytest.fixture(scope="session")
def two_ranks(phantoms, tmp_path_factory):
    """(flags, folder) of a pre-training by two processes of one torchrun."""
    folder = tmp_path_factory.mktemp("two_ranks")
    flags = [*SMALL, "--data", phantoms, "--cache", folder / "cache", "--steps", 3, "--seed", 5,
             "--drop_path", ".3", "--lr", "1e-4"]       # AdamW turns a gradient's rounding into lr
    launch = "-m torch.distributed.run --standalone --nproc_per_node=2".split()
    sizes = ["--batch", 1, "--accumulate", 2]
    script = [ROOT / "train_ssl.py", *flags, *sizes, "--out", folder / "run"]
    forked.run(*launch, *script, folder=folder)
    return flags, folder / "run"


@pytest.fixture(autouse=True)
def nothing_told_before():
    """Let each test see the warnings that a process shows once."""
    concerns.printed.clear()
    concerns.warned.clear()


@pytest.fixture(scope="session", autouse=True)
def torch_has_set_its_handler():
    """Start a loader worker once: torch then sets its handler of SIGCHLD, for the whole process."""
    list(torch.utils.data.DataLoader([0], num_workers=1, multiprocessing_context="fork"))


@pytest.fixture(autouse=True)
def torch_hears_of_dead_workers(torch_has_set_its_handler):
    """Put the handler of SIGCHLD back, which a run that ends drops."""
    before = signal.getsignal(signal.SIGCHLD)
    yield
    signal.signal(signal.SIGCHLD, before)


@pytest.fixture
def run_script(tmp_path):
    """run_script("train_ssl.py", *flags, ranks=1) -> CompletedProcess, in a folder of its own."""
    return functools.partial(forked.run, folder=tmp_path)
