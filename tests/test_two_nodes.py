"""Two nodes, played by two torchrun agents: the same run as one agent with two processes."""
import socket

import forked
import torch
from conftest import ROOT

from smit import runtime


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def test_two_agents_equal_one_agent_with_two_processes_to_the_bit(two_ranks, tmp_path):
    flags, folder = two_ranks
    agent = ["-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1",
             "--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{free_port()}", "--rdzv_id=smit"]
    script = [ROOT / "train_ssl.py", *flags, "--batch", 1, "--accumulate", 2, "--out", "two"]
    forked.run(*agent, *script, folder=tmp_path, processes=2)

    one, two = (runtime.load_checkpoint(path / "student.pt")["model"]
                for path in (folder, tmp_path / "two"))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
