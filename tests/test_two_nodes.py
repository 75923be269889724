"""Two nodes, played by two torchrun agents on one machine: the same run as one agent with two processes."""
import os
import socket
import subprocess
import sys

import torch
from conftest import ROOT, SMALL

from smit import runtime


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def test_two_agents_equal_one_agent_with_two_processes_to_the_bit(phantoms, tmp_path, run_script):
    flags = [*SMALL, "--data", str(phantoms), "--cache", "cache", "--steps", "3", "--batch", "1", "--drop_path", ".3"]
    run_script("train_ssl.py", *flags, "--out", "one", ranks=2)

    agent = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d",
             f"--rdzv_endpoint=127.0.0.1:{free_port()}", "--rdzv_id=smit"]
    nodes = [subprocess.Popen([*agent, str(ROOT / "train_ssl.py"), *flags, "--out", "two"], cwd=tmp_path, text=True,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                              env={**os.environ, "OMP_NUM_THREADS": "1"}) for _ in range(2)]
    told = [node.communicate(timeout=240)[0] for node in nodes]
    assert all(node.returncode == 0 for node in nodes), "\n".join(told)

    one, two = (runtime.load_checkpoint(tmp_path / name / "student.pt")["model"] for name in ("one", "two"))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
