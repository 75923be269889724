"""Scripts and modules in processes of their own, forked from one that has torch loaded.

A fresh interpreter needs seconds to import torch and its optimizers, a fork needs none. Each
process has its own session, folder, environment, console and exit code, and several are the
ranks of a group. Tests that judge torchrun itself run it here, and it starts fresh interpreters.
"""
import multiprocessing
import os
import runpy
import shlex
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload([
    "torch.nn.parallel", "torch._dynamo", "fault_lab", "train_ssl", "finetune", "evaluate",
    "smit.baselines.__main__", "smit.study.__main__"])


def start(target, *arguments):
    """Start target(*arguments) in a process that is forked from the server."""
    process = SERVER.Process(target=target, args=arguments)
    with pytest.MonkeyPatch.context() as patch:
        # the first call starts the server, which must find what it is to load
        for folder in (TESTS, ROOT):
            patch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)
        process.start()
    return process


def variables_of_ranks(ranks):
    """The environment of each rank of a group, as torchrun gives it."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]


def settle(variables, out, err):
    """Give this process a session, an environment and two files as its console."""
    os.setsid()
    multiprocessing.set_start_method("fork", force=True)   # for loader workers, as by default
    torch.set_num_threads(1)
    os.environ.update(variables)
    for stream, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT), stream)


def be_script(words, folder, *console):
    """Be python with these words, which `run` explains."""
    settle(*console)
    os.chdir(folder)
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    elif words[0] == "-c":
        forget_the_project()
        sys.argv = ["-c", *words[2:]]
        exec(words[1], {"__name__": "__main__"})
    else:
        sys.argv = words
        runpy.run_path(str(ROOT / words[0]), run_name="__main__")


def forget_the_project():
    """Leave what is installed and this folder as the only places to import from."""
    sys.path[:] = [place for place in sys.path if place not in ("", str(ROOT), str(TESTS))]
    sys.path.insert(0, os.getcwd())
    for name in list(sys.modules):
        if name.split(".")[0] in ("smit", "train_ssl", "finetune", "evaluate"):
            del sys.modules[name]


def run(*words, folder, ranks=1, processes=1, seconds=300, check=True):
    """Do what `python *words` would, in each rank of a group or in processes that know of none.

    words: a script of ROOT and its flags, "-m" and a module and its flags, or "-c" and code.
    Returns a CompletedProcess with the first exit code that is not 0 and the text of them all.
    AssertionError if that takes longer than those seconds, or if it fails and `check`.
    """
    words = [str(word) for word in words]
    common = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with tempfile.TemporaryDirectory() as console:
        out, err = Path(console, "out"), Path(console, "err")
        variables = variables_of_ranks(ranks) if ranks > 1 else processes * [{}]
        jobs = [start(be_script, words, folder, common | own, out, err) for own in variables]
        wait(jobs, seconds)
        code = next((job.exitcode for job in jobs if job.exitcode), 0)
        done = subprocess.CompletedProcess(words, code, out.read_text(), err.read_text())
    assert not check or code == 0, f"{shlex.join(words)}\n{done.stdout}{done.stderr}"
    return done


def wait(jobs, seconds):
    """Wait for processes; kill them and fail if that takes too long."""
    end = time.monotonic() + seconds
    for job in jobs:
        job.join(max(0, end - time.monotonic()))
    hung = [job for job in jobs if job.exitcode is None]
    for job in hung:
        job.kill()
    assert not hung, f"{len(hung)} of {len(jobs)} ranks did not end within {seconds} s"
