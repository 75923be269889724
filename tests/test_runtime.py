"""Real faults, no stand-ins: processes are killed, disks filled, bits flipped, agents shot."""
import contextlib
import errno
import fcntl
import io
import json
import os
import random
import re
import resource
import signal
import struct
import subprocess
import sys
import textwrap
import time
import zipfile
from pathlib import Path

import forked
import pytest
import torch
import torch.distributed as dist

from smit import runtime, weights

ROOT = Path(__file__).resolve().parents[1]
ALONE = runtime.Ranks(0, 1, torch.device("cpu"))
STARTS_WITHIN_S = 240                    # ranks that import torch anew, on a busy machine
torch.set_num_threads(1)


def state_at(step, numbers=2000):
    """A small training state, different at every step."""
    generator = torch.Generator().manual_seed(step)
    weights = {"a.weight": torch.randn(numbers, generator=generator),
               "a.bias": torch.arange(5) + step}
    settings = {"lr": 2e-4, "grid": (2, 4, 6), "name": "smit", "none": None}
    return {"step": step, "model": weights, "settings": settings}


def same(a, b):
    tensors_equal = all(torch.equal(a["model"][key], b["model"][key]) for key in b["model"])
    plain_equal = (a["step"], a["settings"]) == (b["step"], b["settings"])
    return a.keys() == b.keys() and tensors_equal and plain_equal


def in_child(action):
    """Run action() in a forked process and return its wait status.

    0: fine, 2 << 8: an exception, n: killed by signal n.
    """
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            action()
            os._exit(0)
        os._exit(2)
    return os.waitpid(child, 0)[1]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def torchrun(folder, script, *options, processes=2):
    """Start a script under torchrun; its body finds `runtime`, `ranks` and `out`."""
    head = f"""
import os, signal, sys, time
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
import torch
from smit import runtime
out = Path({str(folder)!r})

def main():
    ranks = runtime.start('cpu')
"""
    body = textwrap.indent(textwrap.dedent(script), "    ")
    (folder / "script.py").write_text(f"{head}{body}\nruntime.run(main)\n")
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    words, console = [*launch, *options, str(folder / "script.py")], folder / "console.txt"
    return forked.start(forked.be_script, words, folder, {}, console, console)


def wait_for(condition, seconds):
    end = time.time() + seconds
    while not (value := condition()):
        assert time.time() < end, f"not within {seconds} s"
        time.sleep(0.1)
    return value


# ---------------------------------------------------------------- checkpoints
def test_a_checkpoint_comes_back_bit_for_bit_and_the_one_before_stays(tmp_path):
    for step in (1, 2, 3):
        runtime.save_checkpoint(tmp_path / "last.pt", state_at(step))
    assert same(runtime.load_checkpoint(tmp_path / "last.pt"), state_at(3))
    assert same(runtime.load_checkpoint(tmp_path / "last.prev.pt"), state_at(2))
    assert names(tmp_path) == ["last.prev.pt", "last.pt"]


def test_optimizer_and_generator_states_survive(tmp_path):
    net = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(net.parameters())
    net(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    state = {"net": net.state_dict(), "optimizer": optimizer.state_dict(),
             "random": torch.Generator().get_state(),
             "scaler": torch.amp.GradScaler(enabled=False).state_dict()}
    runtime.save_checkpoint(tmp_path / "x.pt", state)
    back = runtime.load_checkpoint(tmp_path / "x.pt")
    moments = [each["optimizer"]["state"][0]["exp_avg"] for each in (back, state)]

    assert torch.equal(*moments)
    assert torch.equal(back["random"], state["random"])


@pytest.mark.parametrize("second_names", [True, False])
def test_a_checkpoint_is_there_while_the_next_one_takes_its_place(
        second_names, tmp_path, monkeypatch):
    def refuse(*paths):
        raise PermissionError("this file system has no second names")

    path, there = tmp_path / "best.pt", []
    runtime.save_checkpoint(path, state_at(1))
    replace = os.replace

    def look_after(*paths):
        replace(*paths)
        there.append(path.exists())

    monkeypatch.setattr(os, "replace", look_after)
    if not second_names:
        monkeypatch.setattr(os, "link", refuse)
    for step in (2, 3):
        runtime.save_checkpoint(path, state_at(step))
        assert same(runtime.load_checkpoint(path), state_at(step))
        assert same(runtime.load_checkpoint(tmp_path / "best.prev.pt"), state_at(step - 1))
    assert all(there) == second_names
    if second_names:                            # as a kill before the new one's rename leaves them
        (tmp_path / "best.prev.pt").unlink()
        os.link(path, tmp_path / "best.prev.pt")
        runtime.save_checkpoint(path, state_at(4))
        assert same(runtime.load_checkpoint(tmp_path / "best.prev.pt"), state_at(3))
    assert names(tmp_path) == ["best.prev.pt", "best.pt"]


@pytest.mark.parametrize("share", [0, 1000, 0.5, 0.99])
def test_a_kill_in_mid_write_leaves_the_previous_checkpoint(tmp_path, share):
    runtime.save_checkpoint(tmp_path / "last.pt", state_at(1))
    size = (tmp_path / "last.pt").stat().st_size
    limit = int(share * size) if 0 < share < 1 else share

    def write_until_killed():
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        runtime.save_checkpoint(tmp_path / "last.pt", state_at(2))

    assert in_child(write_until_killed) & 127 == signal.SIGXFSZ
    assert any(name.endswith(".partial") for name in names(tmp_path))
    with runtime.OutputFolder(tmp_path, ALONE, resume=True) as out:
        assert same(runtime.load_latest(out, ALONE), state_at(1))
    assert names(tmp_path) == [".lock", "last.pt"]


def test_random_kills_while_saving_are_all_resumable(tmp_path):
    def save_without_end():
        for step in range(1, 10**6):
            runtime.save_checkpoint(tmp_path / "last.pt", state_at(step))

    runtime.save_checkpoint(tmp_path / "last.pt", state_at(0))
    draw = random.Random(0)
    for _ in range(10):
        child = os.fork()
        if child == 0:
            save_without_end()
        time.sleep(0.02 + 0.1 * draw.random())
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        state = runtime.load_latest(tmp_path, ALONE)
        assert same(state, state_at(state["step"]))


@pytest.mark.parametrize("moment", ["first", "second"])
def test_a_kill_at_either_rename_leaves_a_whole_checkpoint(tmp_path, moment):
    for step in (1, 2):
        runtime.save_checkpoint(tmp_path / "last.pt", state_at(step))
    rename, calls = os.replace, []

    def save_and_die():
        def replace(source, target):
            calls.append(target)
            if len(calls) == ("first", "second").index(moment) + 1:
                os.kill(os.getpid(), signal.SIGKILL)
            rename(source, target)
        os.replace = replace
        runtime.save_checkpoint(tmp_path / "last.pt", state_at(3))

    assert in_child(save_and_die) == signal.SIGKILL
    assert same(runtime.load_latest(tmp_path, ALONE), state_at(2))


def test_of_400_bit_flips_none_loads_other_values(tmp_path):
    path, state, draw, refused = tmp_path / "last.pt", state_at(1, numbers=200), random.Random(7), 0
    runtime.save_checkpoint(path, state)
    good = path.read_bytes()
    for _ in range(400):
        bad = bytearray(good)
        bad[draw.randrange(len(bad))] ^= 1 << draw.randrange(8)
        path.write_bytes(bad)
        try:
            assert same(runtime.load_checkpoint(path), state)  # flipped padding changes nothing
        except ValueError as error:
            refused += 1
            assert str(path) in str(error)

    assert refused > 200


def test_a_flip_that_makes_a_tensor_a_folder_is_refused(tmp_path):
    runtime.save_checkpoint(tmp_path / "x.pt", state_at(1))
    bad = bytearray((tmp_path / "x.pt").read_bytes())
    # torch would read nothing and return what lay in memory
    bad[bad.rindex(b"archive/data/0") - 8] ^= 0x10
    (tmp_path / "x.pt").write_bytes(bad)

    with pytest.raises(ValueError, match="x.pt.*cannot hold"):
        runtime.load_checkpoint(tmp_path / "x.pt")


def test_code_in_a_checkpoint_is_named_and_never_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'ran'}",)

    torch.save({"step": 1, "model": Evil()}, tmp_path / "last.pt")
    with pytest.raises(ValueError, match=r"last.pt.*posix.system"):
        runtime.load_checkpoint(tmp_path / "last.pt")
    assert names(tmp_path) == ["last.pt"]


def test_a_zip_bomb_is_refused_before_memory_is_taken(tmp_path):
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(1 << 26))
    with pytest.raises(ValueError, match="bomb.pt.*cannot hold"):
        runtime.load_checkpoint(tmp_path / "bomb.pt")


def lists_within_lists(levels, width):
    """Return a list that holds `width` times the same list, and so on."""
    nested = [0]
    for _ in range(levels):
        nested = [nested] * width
    return nested


ONE = torch.zeros(1)


@pytest.mark.parametrize("model, why", [
    (ONE.expand(2 ** 20), r"state\['model'\] claims 4,194,304 bytes and has 4"),
    (ONE.long().expand(9), "claims 72 bytes and has 8"),
    (torch.sparse_coo_tensor(size=(2 ** 40,)), "asks to run torch"),
    (torch.empty(2 ** 40, device="meta"), "asks to run torch"),
    ([torch.zeros(999)] * 999, "the tensors before it claim"),
    (lists_within_lists(22, 2), "262,144 entries"),
    (lists_within_lists(70, 1), "64th container"),
])
def test_a_small_file_that_claims_much_memory_or_time_is_refused_unread(
        tmp_path, monkeypatch, model, why):
    monkeypatch.setattr(torch, "isfinite", lambda tensor: tensor[:1] == 0)  # the first value alone
    torch.save({"model": model}, tmp_path / "claims.pt")
    assert (tmp_path / "claims.pt").stat().st_size < 10_000
    with pytest.raises(ValueError, match=f"claims.pt is refused.*{why}") as refusal:
        runtime.load_checkpoint(tmp_path / "claims.pt")
    assert len(str(refusal.value)) < 1000


def write_pickle(path, value, name="archive/data.pkl"):
    """Write a checkpoint {1: value}; value: the bytes that a pickle has for it."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(name, b"\x80\x02}K\x01" + value + b"s.")
        archive.writestr("archive/version", "3")
        archive.writestr("archive/byteorder", "little")


def encoded(value, codec):
    """Return the bytes with which a pickle has _codecs.encode(value, codec)."""
    text = b"X" + struct.pack("<I", len(codec)) + codec.encode()
    return b"c_codecs\nencode\n" + value + text + b"\x86R"


BYTEARRAY = b"c__builtin__\nbytearray\nJ\x00\x00\x00\x01\x85R"            # of 2 ** 24 bytes
HEX = encoded(b"X\x01\x00\x00\x00a", "utf-8")
for _ in range(9):
    HEX = encoded(HEX, "hex")                                    # doubles them
COPIES = b"ccollections\nOrderedDict\n)R" + b"}K\x01Nsb" * 33   # of {1: None}
DOUBLED = b"}" + b")q\x00" + b"h\x00\x86q\x00" * 45 + b"Ns"        # a key (t, t), t = (u, u), ...
DEEP = b"}" + b")" + b"\x85" * 150_000 + b"Ns"                    # a key (((...)))


@pytest.mark.parametrize("name", ["archive/data.pkl", "archive/DATA.PKL"])  # torch reads either
@pytest.mark.parametrize("value, why", [
    (BYTEARRAY, "asks to run __builtin__.bytearray, which was not done"),
    (HEX, "asks to run _codecs.encode, which was not done"),
    (COPIES, "copies a dict more than 32 times"),
    (DOUBLED, "more than 4,096 parts"),
    (DEEP, "more than 4,096 parts"),
], ids=["bytearray", "hex", "copies", "doubled", "deep"])
def test_a_pickle_that_takes_memory_time_or_the_process_is_refused_before_torch_reads_it(
        tmp_path, monkeypatch, value, why, name):
    write_pickle(tmp_path / "small.pt", value, name)
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("torch reads it"))
    with pytest.raises(ValueError, match=f"small.pt.*{why}") as refusal:
        runtime.load_checkpoint(tmp_path / "small.pt")
    assert "\n" not in str(refusal.value)


def test_what_plain_types_and_tensors_need_is_not_refused(tmp_path):
    dtypes = [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64,
              torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64]
    state = {"tensors": [torch.ones(2, dtype=dtype) for dtype in dtypes],
             "parameter": torch.nn.Parameter(torch.ones(2)), "random": random.getstate(),
             "states": [torch.nn.Linear(1, 1).state_dict() for _ in range(32)],
             "plain": [None, True, 2 ** 70, -1.5, "ü", {(1, "a"): ()}]}
    runtime.save_checkpoint(tmp_path / "x.pt", state)
    back = runtime.load_checkpoint(tmp_path / "x.pt")
    assert all(map(torch.equal, back["tensors"], state["tensors"]))
    assert type(back["parameter"]) is torch.nn.Parameter
    assert (back["plain"], back["random"]) == (state["plain"], state["random"])
    assert back["states"][31].keys() == {"weight", "bias"}


@pytest.mark.parametrize("before, after", [(b"before", b""), (b"PK\x03\x04", b""), (b"", b"after")])
def test_a_file_that_is_more_than_an_archive_is_refused(tmp_path, before, after):
    # zipfile finds an archive by a file's end, and torch a checkpoint by its beginning
    write_pickle(tmp_path / "x.pt", b"N")
    assert runtime.load_checkpoint(tmp_path / "x.pt") == {1: None}
    data = (tmp_path / "x.pt").read_bytes()
    length = struct.pack("<H", len(after))                      # of a comment
    (tmp_path / "x.pt").write_bytes(before + data[:-2] + length + after)
    with pytest.raises(ValueError, match="x.pt.*does not begin and end as an archive"):
        runtime.load_checkpoint(tmp_path / "x.pt")


def test_no_zip_behind_an_older_kind_of_checkpoint_makes_it_one(tmp_path):
    torch.save({"a": ONE}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    with zipfile.ZipFile(tmp_path / "old.pt", "a") as archive:
        archive.writestr("empty", "")
    assert torch.load(tmp_path / "old.pt", weights_only=True) == {"a": ONE}
    with pytest.raises(ValueError, match="old.pt.*does not begin and end as an archive"):
        runtime.load_checkpoint(tmp_path / "old.pt")


def test_layers_that_are_tied_and_parts_that_share_settings_load(tmp_path):
    layer, settings = torch.nn.Linear(99, 99), {"lr": [0.1]}
    tied = torch.nn.Sequential(*[layer] * 12).state_dict()
    state = {"model": tied, "average": tied, "config": settings, "before": [settings] * 99}
    runtime.save_checkpoint(tmp_path / "tied.pt", state)
    loaded = runtime.load_checkpoint(tmp_path / "tied.pt")
    assert torch.equal(loaded["average"]["11.weight"], layer.weight)
    assert loaded["before"] == state["before"]


@pytest.mark.parametrize("kind", ["missing", "folder", "fifo", "dangling", "text"])
def test_what_is_no_checkpoint_is_refused_by_name(tmp_path, kind):
    path = tmp_path / "some name.pt"
    make = {"missing": lambda: None, "folder": path.mkdir, "fifo": lambda: os.mkfifo(path),
            "dangling": lambda: path.symlink_to(tmp_path / "gone"),
            "text": lambda: path.write_text("step,loss\n")}
    make[kind]()

    with pytest.raises(ValueError, match="some name.pt"):
        runtime.load_checkpoint(path)


def test_a_checkpoint_must_be_a_dict(tmp_path):
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="list.pt.*not a mapping"):
        runtime.load_checkpoint(tmp_path / "list.pt")


@pytest.mark.parametrize("entry, told", [
    (Path("x"), "Path"), (json.JSONDecoder(), "JSONDecoder"), (torch.float32, "dtype"),
    (torch.tensor([1.0, float("nan")]), "NaN"), (torch.Size([2]), "Size"), (b"x", "bytes"),
    (torch.sparse_coo_tensor(size=(2,)), "another kind"),
    (torch.empty(2, device="meta"), "another kind")])
def test_what_could_not_be_loaded_again_is_refused_by_its_key(tmp_path, entry, told):
    with pytest.raises(ValueError, match=rf"state\['model'\]\['list'\]\[1\].*{told}"):
        runtime.save_checkpoint(tmp_path / "last.pt", {"step": 1, "model": {"list": [0, entry]}})
    assert names(tmp_path) == []


def test_numpy_scalars_are_refused(tmp_path):
    numpy = pytest.importorskip("numpy")
    with pytest.raises(ValueError, match=r"state\['loss'\].*float64"):
        runtime.save_checkpoint(tmp_path / "last.pt", {"loss": numpy.float64(1)})


DAMAGE = {"cut": lambda b: b[:len(b) // 2], "empty": lambda b: b"",
          "zeroed": lambda b: bytes(len(b)),
          "flipped": lambda b: b.replace(b[2000:2004], bytes(x ^ 16 for x in b[2000:2004]))}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_newest_is_named_and_the_one_before_used(tmp_path, capsys, damage):
    last, before = tmp_path / "last.pt", tmp_path / "last.prev.pt"
    for step in (10, 20):
        runtime.save_checkpoint(last, state_at(step))
    last.write_bytes(DAMAGE[damage](last.read_bytes()))

    assert same(runtime.load_latest(tmp_path, ALONE), state_at(10))
    assert re.search(r"^warning: .*last\.pt .*step 10$", capsys.readouterr().err, re.MULTILINE)

    before.write_bytes(DAMAGE[damage](before.read_bytes()))
    with pytest.raises(ValueError, match=r"last\.pt .*last\.prev\.pt .*--overwrite"):
        runtime.load_latest(tmp_path, ALONE)


def test_a_damaged_newest_never_pushes_out_the_whole_one_before(tmp_path):
    for step in (10, 20):
        runtime.save_checkpoint(tmp_path / "last.pt", state_at(step))
    (tmp_path / "last.pt").write_bytes(b"rotten")
    runtime.save_checkpoint(tmp_path / "last.pt", state_at(11))
    assert runtime.load_checkpoint(tmp_path / "last.prev.pt")["step"] == 10


def test_the_newest_is_told_by_its_step_and_not_by_the_clock(tmp_path):
    for step in (10, 20):
        runtime.save_checkpoint(tmp_path / "last.pt", state_at(step))
    os.utime(tmp_path / "last.pt", (0, 0))
    assert runtime.load_latest(tmp_path, ALONE)["step"] == 20

    (tmp_path / "last.pt").rename(tmp_path / "x")
    (tmp_path / "last.prev.pt").rename(tmp_path / "last.pt")
    (tmp_path / "x").rename(tmp_path / "last.prev.pt")
    assert runtime.load_latest(tmp_path, ALONE)["step"] == 20


def test_no_checkpoint_is_none(tmp_path):
    assert runtime.load_latest(tmp_path, ALONE) is None


# ---------------------------------------------------------------- writing
def test_a_rename_stands_between_two_fsyncs(tmp_path, monkeypatch):
    calls, fsync, rename = [], os.fsync, os.replace

    def noted_fsync(descriptor):
        calls.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def noted_rename(source, target):
        calls.append((source, target))
        rename(source, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_rename)
    path = tmp_path / "a.bin"
    runtime.atomic_write(path, lambda file: file.write(b"new"))
    partial = calls[0]
    assert calls == [partial, (partial, path), tmp_path]
    assert partial.parent == tmp_path and path.read_bytes() == b"new"


def test_an_io_error_at_fsync_keeps_the_old_file_and_no_other(tmp_path, monkeypatch):
    def broken(descriptor):
        raise OSError(5, "Input/output error")

    runtime.save_checkpoint(tmp_path / "last.pt", state_at(1))
    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError, match=r"last\.pt could not be written: Input/output error"):
        runtime.save_checkpoint(tmp_path / "last.pt", state_at(2))
    assert same(runtime.load_checkpoint(tmp_path / "last.pt"), state_at(1))
    assert names(tmp_path) == ["last.pt"]


def test_an_error_of_the_writer_itself_passes_and_leaves_nothing(tmp_path):
    def wrong(file):
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        runtime.atomic_write(tmp_path / "a.bin", wrong)
    assert names(tmp_path) == []


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 3 MB; skipped where mounting is not permitted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "none", folder]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mount is not permitted")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk_is_named_and_the_old_checkpoint_loads(small_disk):
    runtime.save_checkpoint(small_disk / "last.pt", state_at(1, numbers=500_000))
    for numbers in (400_000, 2_000_000):
        told = r"last\.pt could not be written: No space left on device"
        with pytest.raises(OSError, match=told):
            runtime.save_checkpoint(small_disk / "last.pt", state_at(2, numbers))
        assert names(small_disk) == ["last.pt"]
    assert same(runtime.load_latest(small_disk, ALONE), state_at(1, numbers=500_000))

    held = (small_disk / "last.pt").stat().st_size
    (small_disk / "fill").write_bytes(bytes(3 * 2**20 - 2**16 - held))
    assert "No space left" in refusal(small_disk, resume=True)


def test_a_read_only_disk_is_refused_at_the_start(small_disk):
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    for folder in (small_disk, small_disk / "below"):
        assert re.search(f"{folder} cannot.*Read-only", refusal(folder))


# ---------------------------------------------------------------- the output folder
def refusal(folder, **how):
    """What is said of a folder that cannot be used."""
    with pytest.raises(ValueError) as refused, runtime.OutputFolder(folder, ALONE, **how):
        pass
    return str(refused.value)


def test_a_second_run_is_refused_at_once_and_a_killed_one_leaves_no_lock(tmp_path):
    def hold():
        with runtime.OutputFolder(tmp_path, ALONE):
            (tmp_path / "ready").touch()
            if os.fork() == 0:  # a loader worker that outlives its parent must not hold the lock
                time.sleep(5)
                os._exit(0)
            time.sleep(600)

    first = os.fork()
    if first == 0:
        hold()
    wait_for((tmp_path / "ready").exists, 60)
    assert f"in use by {os.uname().nodename} pid {first}" in refusal(tmp_path)
    assert os.waitpid(first, os.WNOHANG) == (0, 0), "the second waited until the first was gone"
    os.kill(first, signal.SIGKILL)
    os.waitpid(first, 0)
    with runtime.OutputFolder(tmp_path, ALONE) as out:
        assert out == tmp_path


def test_a_run_is_neither_overwritten_nor_mixed_up(tmp_path):
    out = tmp_path / "deep" / "er"
    with runtime.OutputFolder(out, ALONE):
        runtime.resume(out, {}, {}, set(), ALONE)
        runtime.save_checkpoint(out / "last.pt", state_at(1))
        (out / "mine.txt").write_text("kept")
    assert re.search(r"run \(last.pt\): --resume .* --overwrite", refusal(out))

    with runtime.OutputFolder(out, ALONE, resume=True, overwrite=True):
        assert runtime.load_latest(out, ALONE)["step"] == 1
    with runtime.OutputFolder(out, ALONE, overwrite=True):
        assert runtime.load_latest(out, ALONE) is None
        assert (out / "last.pt").exists()                # the new run may still be refused
    with runtime.OutputFolder(out, ALONE, resume=True):
        assert runtime.load_latest(out, ALONE)["step"] == 1
    with runtime.OutputFolder(out, ALONE, overwrite=True):
        assert runtime.resume(out, {}, {}, set(), ALONE)["step"] == 0
        assert names(out) == [".files", ".lock", "mine.txt"]


@pytest.mark.parametrize("kind", ["file", "dangling", "loop", "below a file"])
def test_what_cannot_be_a_folder_is_named(tmp_path, kind):
    out = tmp_path / "out"
    if kind == "file":
        out.write_text("")
    elif kind == "below a file":
        (tmp_path / "f").write_text("")
        out = tmp_path / "f" / "out"
    else:
        out.symlink_to(out if kind == "loop" else tmp_path / "gone")
    assert f"{out} cannot be used: " in refusal(out)


# ---------------------------------------------------------------- log and settings
def test_the_resumed_log_is_the_uninterrupted_one(tmp_path):
    def write(path, steps, resume_step=None):
        log = runtime.CsvLog(path, ("step", "mip", "note"), ALONE, resume_step)
        for step in steps:
            log.row(step=step, mip=1 / (step + 3))

    write(tmp_path / "whole.csv", range(1, 13))
    write(tmp_path / "log.csv", range(1, 10))
    with open(tmp_path / "log.csv", "a") as file:
        file.write("10,0.0769")  # cut by a crash
    write(tmp_path / "log.csv", range(7, 13), resume_step=6)
    assert (tmp_path / "log.csv").read_text() == (tmp_path / "whole.csv").read_text()
    assert (tmp_path / "log.csv").read_text().splitlines()[:2] == ["step,mip,note", "1,0.25,"]
    write(tmp_path / "log.csv", [1])
    assert (tmp_path / "log.csv").read_text() == "step,mip,note\n1,0.25,\n"


def test_a_log_takes_its_own_columns_only(tmp_path):
    log = runtime.CsvLog(tmp_path / "log.csv", ("step", "mip"), ALONE)
    with pytest.raises(ValueError, match="log.csv.*mpd"):
        log.row(step=1, mpd=0.5)

    log.row(step=1, mip=0.5)
    with pytest.raises(ValueError, match="log.csv has the columns step,mip"):
        runtime.CsvLog(tmp_path / "log.csv", ("step", "mpd"), ALONE, resume_step=1)

    second = runtime.Ranks(1, 2, torch.device("cpu"))
    runtime.CsvLog(tmp_path / "none.csv", ("step",), second).row(step=1)
    assert names(tmp_path) == ["log.csv"]


def test_settings_that_matter_must_not_change():
    saved = {"lr": 2e-4, "workers": 2, "seed": 0}
    now = {"lr": 2e-4, "workers": 4, "seed": 0, "new": 1}
    lines = runtime.compare_settings(saved, now, free={"workers", "new"})
    assert lines == ["new: absent in the checkpoint, 1 now", "workers: 2 in the checkpoint, 4 now"]
    with pytest.raises(ValueError, match="seed: 0 in the checkpoint, 1 now"):
        runtime.compare_settings(saved, {**saved, "seed": 1}, free={"workers"})
    assert runtime.compare_settings(saved, dict(saved), free=set()) == []


def test_a_column_that_came_or_went_does_not_end_a_resumed_log(tmp_path):
    (tmp_path / "log.csv").write_text("step,contrast,mip\n1,,.5\n2,,.25\n3,,.125\n")
    runtime.CsvLog(tmp_path / "log.csv", ("step", "mip", "itd"), ALONE, 2).row(step=3, itd=0.5)
    assert (tmp_path / "log.csv").read_text() == "step,mip,itd\n1,.5,\n2,.25,\n3,,0.5\n"


# ---------------------------------------------------------------- the state of a run
def parts_at(seed):
    """A network and its optimiser after a step."""
    torch.manual_seed(seed)
    net = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(net.parameters())
    net(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return {"net": net, "optimizer": optimizer, "teacher": None}


def test_a_run_goes_on_with_the_parts_and_facts_that_were_saved(tmp_path, capsys):
    saved, fresh = parts_at(1), parts_at(2)
    assert runtime.resume(tmp_path, fresh, {}, set(), ALONE) == {"step": 0, "skipped": 0}
    config = {"lr": 1, "workers": 2}
    runtime.save_state(tmp_path / "last.pt", saved, step=7, skipped=1, config=config)
    facts = runtime.resume(tmp_path, fresh, {"lr": 1, "workers": 4}, {"workers"}, ALONE)
    assert (facts["step"], facts["skipped"]) == (7, 1) and not facts.keys() & fresh.keys()
    assert torch.equal(fresh["net"].weight, saved["net"].weight)

    moments = [parts["optimizer"].state_dict()["state"][0]["exp_avg"] for parts in (saved, fresh)]
    assert torch.equal(*moments)
    assert "resumed with another workers: 2 in the checkpoint, 4 now" in capsys.readouterr().out


def test_a_setting_that_came_or_went_is_read_as_its_default(tmp_path):
    parts, defaults = parts_at(1), {"contrast": 0.0, "offset": 0}
    runtime.save_state(tmp_path / "last.pt", parts, step=7, config={"lr": 1, "contrast": 0.0})
    facts = runtime.resume(tmp_path, parts, {"lr": 1, "offset": 0}, set(), ALONE, defaults)
    assert facts["step"] == 7
    with pytest.raises(ValueError, match="offset: 0 in the checkpoint, 1 now"):
        runtime.resume(tmp_path, parts, {"lr": 1, "offset": 1}, set(), ALONE, defaults)

    runtime.save_state(tmp_path / "last.pt", parts, step=8, config={"lr": 1, "contrast": 0.5})
    with pytest.raises(ValueError, match="contrast: 0.5 in the checkpoint, 0.0 now"):
        runtime.resume(tmp_path, parts, {"lr": 1, "offset": 0}, set(), ALONE, defaults)


def test_weights_and_moments_of_an_older_format_are_upgraded_before_they_are_loaded(tmp_path):
    def parts():
        net = torch.nn.Module()
        net.stages = torch.nn.ModuleList([torch.nn.Module()])
        net.stages[0].merge = torch.nn.Module()
        net.stages[0].merge.reduction = torch.nn.Linear(8, 1, bias=False)   # of one channel
        return {"net": net, "optimizer": torch.optim.SGD(net.parameters(), momentum=0.9)}

    old, new, again = parts(), parts(), parts()
    weight = old["net"].stages[0].merge.reduction.weight
    weight.grad = torch.arange(8.0)[None]
    old["optimizer"].step()
    runtime.save_state(tmp_path / "last.pt", old, step=7, config={})
    runtime.resume(tmp_path, new, {"format": 2}, set(), ALONE, None, weights.upgrade_run)
    order = [0, 3, 2, 5, 1, 6, 4, 7]        # where 000, 001, ..., 111 stood in format 1
    assert torch.equal(new["net"].stages[0].merge.reduction.weight, weight[:, order])
    moment = new["optimizer"].state_dict()["state"][0]["momentum_buffer"]
    assert moment.tolist() == [order]

    runtime.save_state(tmp_path / "last.pt", new, step=8, config={"format": 2})
    runtime.resume(tmp_path, again, {"format": 2}, set(), ALONE, None, weights.upgrade_run)
    assert torch.equal(again["net"].stages[0].merge.reduction.weight, weight[:, order])


@pytest.mark.parametrize("state", [{"model": 1}, {"step": "1", "config": {}},
                                   {"step": 1, "config": 2}])
def test_a_last_pt_that_is_no_state_of_a_run_is_refused_by_name(tmp_path, state):
    torch.save(state, tmp_path / "last.pt")
    with pytest.raises(ValueError, match="last.pt holds no state of a run.*--overwrite"):
        runtime.load_latest(tmp_path, ALONE)


def test_overwrite_deletes_what_the_run_wrote_and_no_file_of_the_users(tmp_path):
    out, before = tmp_path / "out", tmp_path / "before.png"
    before.write_text("kept")
    with runtime.OutputFolder(out, ALONE):
        runtime.resume(out, {}, {}, set(), ALONE)
        (out / "mine.png").write_text("kept")
        for name in ("last.pt", "panel.svg", "other.png"):
            runtime.atomic_write(out / name, b"the run's")
    with open(out / ".files", "a") as listing:
        listing.write("../before.png\n..\n\n.lock/..\n" + str(before) + "\n")
    with runtime.OutputFolder(out, ALONE, overwrite=True):
        runtime.resume(out, {}, {}, set(), ALONE)
        assert names(out) == [".files", ".lock", "mine.png"]

    assert before.read_text() == "kept"


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EIO])
def test_a_file_system_without_locks_is_warned_of_and_used(tmp_path, monkeypatch, capsys, number):
    def lockf(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "lockf", lockf)
    monkeypatch.setattr(runtime.ranks, "WARNED", set())
    if number == errno.EIO:
        with pytest.raises(ValueError, match="cannot be used: Input/output error"):
            runtime.files.claim(tmp_path, False, False)
        return
    for name in ("one", "two"):
        with runtime.OutputFolder(tmp_path / name, ALONE) as out:
            runtime.atomic_write(out / "log.csv", b"")
    told = capsys.readouterr().err
    assert re.fullmatch("warning: .*one: this file system has no locks.*\n", told)


def test_a_file_system_that_cannot_sync_folders_is_warned_of_and_used(
        tmp_path, monkeypatch, capsys):
    fsync = os.fsync

    def only_files(descriptor):
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.EINVAL, "Invalid argument")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", only_files)
    monkeypatch.setattr(runtime.ranks, "WARNED", set())
    for step in (1, 2):
        runtime.save_checkpoint(tmp_path / "last.pt", state_at(step))
    assert runtime.load_latest(tmp_path, ALONE)["step"] == 2
    assert capsys.readouterr().err.count("cannot sync folders") == 1


# ---------------------------------------------------------------- precision, memory
def test_each_precision_has_its_dtype_and_fp16_alone_scales_its_loss():
    x, cpu = torch.ones(2, 2), torch.device("cpu")
    for name, dtype, scale in (("fp32", torch.float32, 1), ("auto", torch.float32, 1),
                               ("bf16", torch.bfloat16, 1), ("fp16", torch.float16, 4096)):
        precision = runtime.Precision(name, cpu)
        assert precision.name == ("fp32" if name == "auto" else name)
        with precision.autocast():
            assert (x @ x).dtype == dtype
        assert precision.scaler.scale(torch.ones(())).item() == scale


@pytest.mark.parametrize("flags, slow", [
    ("avx2 avx512_bf16", False), ("amx_bf16", False), ("", False), ("asimd bf16", False),
    ("avx2 avx512f", True)])
def test_bf16_is_warned_of_where_the_cpu_only_emulates_it(monkeypatch, capsys, flags, slow):
    monkeypatch.setattr(runtime.ranks, "read_cpu_flags", lambda: set(flags.split()))
    monkeypatch.setattr(runtime.ranks, "WARNED", set())
    for name in ("bf16", "bf16", "fp32"):
        runtime.Precision(name, torch.device("cpu"))
    assert capsys.readouterr().err.count("5 to 9 times as long") == slow


@pytest.mark.parametrize("version, slow", [(90799, 0), (90800, 1), (91499, 1), (91500, 0),
                                           (None, 0)])
def test_the_versions_of_cudnn_without_half_precision_convolutions_are_warned_of(
        monkeypatch, capsys, version, slow):
    monkeypatch.setattr(runtime.ranks, "WARNED", set())
    runtime.ranks.warn_of_slow_convolutions(version)
    assert capsys.readouterr().err.count("warning: with cuDNN 9.") == slow


def test_memory_before_activations_is_that_of_weights_gradients_moments_and_teacher():
    net, teacher = torch.nn.Linear(1023, 1024), torch.nn.Linear(1023, 1024)     # 2^20 numbers each
    assert "network of 1,048,576 parameters; 16 MiB for it, its gradients and AdamW," in (
        runtime.describe_memory(net))
    assert "20 MiB for it, its gradients, AdamW and the teacher," in (
        runtime.describe_memory(net, teacher))
    assert "; 4 MiB for" in runtime.describe_memory(net.requires_grad_(False))


# ---------------------------------------------------------------- ranks, errors, signals
def test_what_torchrun_says_is_read_when_it_is_asked_for(monkeypatch):
    def told():
        return runtime.launched_by_torchrun(), runtime.restarts(), runtime.is_first()

    assert told() == (False, 0, True)
    for name, value in (("RUN_ID", "x"), ("RESTART_COUNT", "3")):
        monkeypatch.setenv(f"TORCHELASTIC_{name}", value)
    monkeypatch.setenv("RANK", "1")
    assert told() == (True, 3, False)


def test_the_mean_of_named_numbers_keeps_their_names():
    norm = torch.tensor(2.0, requires_grad=True)
    assert ALONE.mean_of({"mip": 0.5, "norm": norm}) == {"mip": 0.5, "norm": 2}
    assert ALONE.mean_of({}) == {}


def test_one_process_starts_no_group():
    ranks = runtime.start("cpu")
    assert ranks == ALONE and ranks.is_main and not torch.distributed.is_initialized()
    assert ranks.agree(True, 3, False) == (True, 3, False)
    assert torch.equal(ranks.mean(torch.ones(2, 3)), torch.ones(2, 3))
    assert runtime.peak_memory_mb(ranks.device) > 50


def test_devices_that_are_not_there_are_refused():
    with pytest.raises(ValueError, match="device tpu"):
        runtime.start("tpu")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="torch finds no GPU"):
            runtime.start("cuda")


def test_every_stop_signal_sets_the_flag(capfd):
    before = {number: signal.getsignal(number) for number in runtime.ranks.STOP_SIGNALS}
    try:
        for number in runtime.ranks.STOP_SIGNALS:
            stop = runtime.StopSignals(ALONE)
            assert not stop.asked
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), number)
            assert stop.asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

    assert capfd.readouterr().err.count("saving and leaving") == 3


def told_by(main, *arguments):
    """(exit code, console text) of a run of main."""
    console = io.StringIO()
    with pytest.raises(SystemExit) as leaving, contextlib.redirect_stderr(console):
        runtime.run(main, *arguments)
    return leaving.value.code, console.getvalue()


def test_the_place_in_the_code_is_shown_of_errors_that_nobody_foresaw_alone():
    code, text = told_by(runtime.start, "tpu")
    assert code == 2 and re.fullmatch(r"error: device tpu .*: one process each, or cpu\n", text)
    assert re.fullmatch(r"error: .*'x' \[.*test_runtime.py:\d+\]\n", told_by(lambda: int("x"))[1])
    missing = "error: [Errno 2] No such file or directory: '/nowhere'\n"
    assert told_by(open, "/nowhere") == (2, missing)


class Crash(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        os.kill(os.getpid(), signal.SIGBUS)          # as where shared memory is full


def test_a_loader_worker_that_dies_ends_in_a_line_that_says_what_to_do():
    loader = torch.utils.data.DataLoader(Crash(), num_workers=1, multiprocessing_context="fork")
    code, text = told_by(lambda: next(iter(loader)))
    told = r"error: DataLoader worker .*--workers 0.*--shm-size.*\n"

    assert code == 2 and re.fullmatch(told, text)


def test_a_terminal_that_lacks_a_letter_does_not_end_a_run(tmp_path):
    script = "from smit import runtime\nruntime.run(print, 'case M\\u00fcller \\udcff')"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"})
    assert done.returncode == 0 and done.stdout == "case M\\xfcller \\udcff\n", done.stderr


@pytest.mark.parametrize("module", ["fcntl", "resource"])
def test_a_system_that_cannot_run_it_is_told_so_in_a_sentence(module):
    script = f"import sys\nsys.modules['{module}'] = None\nimport smit.runtime"
    done = forked.run("-c", script, folder=ROOT, check=False)
    assert done.stderr == "smit runs on Linux and macOS; on Windows, run it inside WSL\n"


@pytest.mark.parametrize("error, code, told", [
    (ValueError("bad.nii: cut"), 2, f"error: bad.nii: cut [{__file__}:"),
    (OSError("disk full"), 2, "error: disk full\n"), (KeyboardInterrupt(), 130, "interrupted"),
    (torch.OutOfMemoryError("no memory"), 2,
     "error: no memory; give a smaller --batch; or --checkpointing, to train"),
    (MemoryError(), 2, "error: no memory is left; give a smaller --batch"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), 2,
     "error: DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes; give a "
     "smaller --batch"),
    (RuntimeError("DataLoader timed out after 300 seconds"), 2, "error: DataLoader timed out"),
    (TypeError("a bug"), 1, "Traceback")])
def test_errors_become_one_line_and_bugs_keep_their_traceback(capsys, error, code, told):
    def main(number):
        raise error

    with pytest.raises(SystemExit) as leaving:
        runtime.run(main, 1)
    shown = capsys.readouterr().err
    assert leaving.value.code == code and shown.startswith(told)
    assert code == 1 or shown.count("\n") == 1


def test_a_build_for_cuda_that_finds_no_gpu_is_told(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    for cuda, told in ((None, 0), ("12.8", 1)):
        monkeypatch.setattr(torch.version, "cuda", cuda)
        runtime.ranks.WARNED.discard("no gpu")
        assert runtime.ranks.place_of("auto", 0) == torch.device("cpu")
        assert capsys.readouterr().err.count("finds no GPU: this runs on the CPU") == told
    with pytest.raises(ValueError, match="torch finds no GPU; .* --device cpu"):
        runtime.ranks.place_of("cuda", 0)


def test_two_ranks_agree_and_recover_from_a_killed_one(tmp_path):
    job = torchrun(tmp_path, """
        with runtime.OutputFolder(out / "run", ranks) as folder:
            state = runtime.load_latest(folder, ranks)
            assert ranks.agree(ranks.rank == 1, False, ranks.rank + 5) == (True, False, 6)
            assert ranks.mean(torch.full((2,), float(ranks.rank))).tolist() == [.5, .5]
            assert ranks.mean_of({"a": ranks.rank, "b": torch.tensor(3.)}) == {"a": .5, "b": 3}
            if ranks.is_main and not state:
                runtime.save_checkpoint(folder / "last.pt", {"step": 7})
            ranks.agree()
            if ranks.rank == 1 and not state:
                os.kill(os.getpid(), signal.SIGKILL)
            ranks.agree()
            (out / f"done{ranks.rank}").write_text(f"{state['step']} {runtime.restarts()}")
        """, "--max-restarts=1")
    job.join(STARTS_WITHIN_S)

    assert job.exitcode == 0, (tmp_path / "console.txt").read_text()
    assert [(tmp_path / f"done{rank}").read_text() for rank in (0, 1)] == ["7 1", "7 1"]
    assert "closed by peer" not in (tmp_path / "console.txt").read_text()


def test_the_first_error_is_shown_once_and_last_and_nobody_hangs(tmp_path):
    job = torchrun(tmp_path, """
        stop = runtime.StopSignals(ranks)
        if ranks.rank == 1:
            raise ValueError("case 7.nii.gz is cut short")
        ranks.agree()
        """)
    job.join(STARTS_WITHIN_S)
    assert job.exitcode, "still running"

    shown = (tmp_path / "console.txt").read_text()
    told = "error: case 7.nii.gz is cut short"
    assert len(re.findall(f"^{told}", shown, re.MULTILINE)) == 1
    assert told in "".join(shown.splitlines(True)[-3:]) and "closed by peer" not in shown


@pytest.mark.parametrize("error, code, waits", [
    (RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer"), 1, (60,)),
    (dist.DistBackendError("NCCL error: remote process exited"), 1, (60,)),
    (RuntimeError("[gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 30000ms"), 1, (1,)),
    (BrokenPipeError("Broken pipe"), 2, (1,)),
    (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), 1, (1,)),
    (ValueError("case 7.nii.gz is cut short"), 2, (1,)),
    (KeyboardInterrupt(), 130, ())])
def test_a_rank_that_only_lost_its_peer_lets_the_peer_speak_first(monkeypatch, error, code, waits):
    slept = []
    monkeypatch.setattr(runtime.ranks.time, "sleep", slept.append)
    monkeypatch.setattr(runtime.ranks.dist, "is_initialized", lambda: True)
    monkeypatch.setenv("RANK", "1")
    runtime.ranks.wait_for_the_first_error(error, code)
    assert tuple(slept) == waits


def test_workers_leave_when_their_agent_dies_even_in_a_collective(tmp_path):
    job = torchrun(tmp_path, """
        runtime.ranks.ORPHAN_GRACE_S = 2
        stop = runtime.StopSignals(ranks)
        (out / f"pid{ranks.rank}").write_text(str(os.getpid()))
        if ranks.rank == 1:
            time.sleep(600)
        ranks.agree()
        """)
    files = [tmp_path / "pid0", tmp_path / "pid1"]
    wait_for(lambda: all(file.exists() and file.read_text() for file in files), STARTS_WITHIN_S)
    pids = [file.read_text() for file in files]
    job.kill()
    job.join()
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), 60)
