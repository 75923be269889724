"""Shared by the tests: small phantoms, and the three scripts run in small, in this process or under torchrun."""
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # a bare `pytest` looks for modules in tests/ only

from smit import phantom  # noqa: E402
from smit.data import concerns  # noqa: E402

SMALL = ("--spacing 10 10 10 --crop 24 --view 16 --mask_cell 4 --embed_dim 8 --depths 1 1 --heads 2 2 --head_width 16 "
         "--bottleneck 8 --prototypes 32 --lr 3e-3 --warmup_epochs 40 --workers 0 --log_every 1 --device cpu").split()
torch.set_num_threads(1)  # the networks are small, and on a busy machine threads wait for each other


@pytest.fixture(scope="session")
def phantoms(tmp_path_factory):
    """The dataset.json of five coarse CT phantoms."""
    return phantom.write_dataset(tmp_path_factory.mktemp("phantoms"), 5, spacing_mm=(10.0, 10.0, 10.0))


@pytest.fixture(autouse=True)
def nothing_told_before():
    """Let each test see the warnings that a process shows once."""
    concerns.printed.clear()
    concerns.warned.clear()


@pytest.fixture
def run_script(tmp_path):
    """run_script("train_ssl.py", *flags, ranks=1) -> CompletedProcess, in a folder of its own."""
    def run(script, *flags, ranks=1, check=True):
        launch = [] if ranks == 1 else ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        done = subprocess.run([sys.executable, *launch, ROOT / script, *map(str, flags)], cwd=tmp_path, text=True,
                              capture_output=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return done
    return run
