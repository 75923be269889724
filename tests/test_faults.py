"""The faults of long runs, and a few of each injected: `python tests/faults.py --all` injects all of them."""
import contextlib
import csv
import os
import random
import re
import shutil
import signal
import subprocess
import time
from functools import partial

import faults
import pytest
from faults import EVERY, SHARE, STEPS, Row, fingerprint, kept, last_row, message
from smit import runtime


def at(point, do, nth=1, **more):
    return dict(at=point, do=do, nth=nth, **more)


def kills(lab):
    """Every step of a run but its last, first and middle and last of an epoch, on 1, 2, 4 ranks, 0 and 2 workers."""
    for ranks in (1, 2, 4):
        for workers in (0, 2):
            for nth in range(1, STEPS):
                yield partial(lab.trial, f"kill -9 of a rank in mid-step; {ranks} ranks, {workers} workers",
                              at("step", "SIGKILL", nth, rank=nth % ranks), ranks=ranks, flags=("--workers", workers))
        again = at("step", "SIGKILL", 1, rank=ranks - 1)
        yield partial(lab.trial, f"kill -9 in the first step after a resume; {ranks} ranks", at("step", "SIGKILL", 6),
                      ranks=ranks, again=[again])
        yield partial(lab.trial, f"kill -9 three times in an epoch; {ranks} ranks", at("step", "SIGKILL", 6), ranks=ranks,
                      again=[again, {**again, "nth": 2}])


def at_random(lab):
    """Runs that save in every step, killed at random moments, 5 times each."""
    def killed(seed):
        folder, draw, good, ranks = lab.fresh(), random.Random(seed), True, 1 + seed % 2
        lab.whole(ranks)
        for _ in range(5):
            run = lab.run(folder, "--save_steps", 1, "--resume", "--workers", seed % 3, ranks=ranks)
            run.until(lambda: last_row(folder) >= STEPS or 0 in run.codes(), draw.uniform(.2, 3))
            run.signal("SIGKILL")
            run.wait()
            good &= last_row(folder) - kept(folder) <= 1
        return lab.resumed("kill -9 at 5 random times of a run that saves every step", folder, 1, good=good, ranks=ranks)
    return [partial(killed, seed) for seed in range(20)]


def restarts(lab):
    """A killed rank under torchrun --max-restarts=3: the run goes on by itself."""
    return [partial(lab.trial, "kill -9 of a rank under torchrun --max-restarts=3", at("step", "SIGKILL", 2 + n % 9, rank=n % 2),
                    ranks=2, agent=["--max-restarts=3"], code=0) for n in range(20)] + [partial(
            lab.trial, "kill -9 in three lives running under torchrun --max-restarts=3",
            *[at("step", "SIGKILL", 6, rank=life % 2, life=life) for life in range(3)], ranks=2, agent=["--max-restarts=3"], code=0)]


def agents(lab):
    """Signals to torchrun itself."""
    def stopped(name, expected):
        folder, pace = lab.fresh(), at("step", "sleep", times=99, rank=None)
        run = lab.run(folder, "--workers", 2, ranks=2, agent=[], faults=[pace])
        run.until(lambda: last_row(folder) > EVERY)
        run.signal(name)
        gone = run.until(lambda: not run.alive(), 60)
        code, text = run.wait()
        lost = last_row(folder) - kept(folder)
        return lab.resumed(f"{name} to torchrun; its ranks must leave in 30 s", folder, lost, f"gone after {gone:.0f} s\n{text}",
                           code, gone < 30 and lost == 0, "gone after", 2)
    return [partial(stopped, *it) for it in (("SIGKILL", -9), ("SIGUSR1", -10), ("SIGTERM", 1))]


def signals(lab):
    """One rank is told; all stop at one step, save and leave."""
    for name in ("SIGTERM", "SIGINT", "SIGUSR1"):
        yield partial(lab.trial, f"{name} to one rank of two", at("step", name, 6, rank=1), ranks=2, most=0, code=0,
                      flags=("--workers", 2), told="stopped at step 6")
        yield partial(lab.trial, f"{name} to all ranks of four", at("step", name, 6, rank=None), ranks=4, most=0, code=0,
                      told=f"{name}: saving")
        yield partial(lab.trial, f"{name}, and again while saving", at("step", name, 6), at("write", name, 2),
                      at("rename", name, 2), ranks=2, most=0, code=0, told="stopped at step 6")


def saving(lab):
    """Death and errors in the midst of the second checkpoint, of step 8; in the last one."""
    size = (lab.whole() / "last.pt").stat().st_size
    for name, limit in (("byte 0", 0), ("1 kB", 1000), ("10 %", size // 10), ("50 %", size // 2), ("99 %", size * 99 // 100)):
        yield partial(lab.trial, f"killed at {name} of a checkpoint's write", at("write", "limit", 2, size=limit), code=-25, most=EVERY)
    for name, point, nth in (("the old one is moved", "prev", 1), ("the rename", "rename", 2)):
        yield partial(lab.trial, f"killed before {name}", at(point, "SIGKILL", nth), most=EVERY)
    yield partial(lab.trial, "killed after the rename", at("renamed", "SIGKILL", 2), most=0)
    yield partial(lab.trial, "killed after the last rename of a run", at("renamed", "SIGKILL", 4), most=0)
    for nth in (3, 4):
        yield partial(lab.trial, f"EIO on fsync {nth - 2} of a checkpoint", at("fsync", "EIO", nth), code=2, most=EVERY,
                      told="error: .*last.pt could not be written: Input/output error")
    yield partial(lab.trial, "EIO on the folder's fsync", at("renamed", "EIO", 2), code=2, most=EVERY,
                  told="error: .*last.pt could not be written: Input/output error")

    def ordered():
        folder, trace = lab.fresh(), lab.folder / "trace.txt"
        trace.unlink(missing_ok=True)
        code, _ = lab.run(folder, faults=[at("disk", "trace", times=10 ** 6, path=str(trace))]).wait()
        calls = re.sub(r"(fsync|replace) \S+/", r"\1 ", trace.read_text())
        saves = re.findall(r"(?:fsync \.last\.pt\.\w+\.partial\n)+(?:replace last.prev.pt\n)?(?:fsync \.last\.pt\.\w+\.partial\n)"
                           rf"replace last.pt\nfsync {folder.name}\n", calls)
        same = fingerprint(folder) == fingerprint(lab.whole())
        return Row("power loss: fsync(file), rename, fsync(folder), always", 0, f"{len(saves)} saves in this order", code, same,
                   len(saves) == calls.count("replace last.pt\n") == 4 and same)
    yield ordered


@contextlib.contextmanager
def mounted(folder, *how):
    folder.mkdir(exist_ok=True)
    subprocess.run(["mount", *how, str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def disks(lab):
    """Full, read-only, and things that are no folder."""
    def fills():
        with mounted(lab.folder / "small", "-t", "tmpfs", "-o", "size=3m", "tmpfs") as disk:
            out, ballast = disk / "run", disk / "ballast"
            found, text = lab.run(out, faults=[at("step", "fill", 6, path=str(ballast))]).wait()
            lost = last_row(out) - kept(out)
            ballast.unlink()
            return lab.resumed("the disk is full from step 6 on", out, lost, text, found, found == 2 and lost <= EVERY,
                               "error: .*(log.csv|[.]pt) could not be written: No space left")

    def full(name, told, *flags, **how):
        with mounted(lab.folder / "small", "-t", "tmpfs", "-o", "size=3m", "tmpfs") as disk:
            faults.act("fill", path=str(disk / "ballast"))
            return lab.refused(name, disk / "run" if not flags else lab.fresh(), *flags, told=told, **how)

    def read_only():
        (lab.folder / "ro").mkdir(exist_ok=True)
        with mounted(lab.folder / "ro", "--bind", str(lab.folder / "ro")) as disk:
            subprocess.run(["mount", "-o", "remount,bind,ro", str(disk)], check=True)
            return lab.refused("read-only", disk / "run", told="error: output folder .*run cannot be used: Read-only")

    def no_folder(kind):
        out = lab.fresh()
        out.write_text("") if kind == "a file" else out.symlink_to(lab.folder / "nowhere")
        return lab.refused(f"the output is {kind}", out, told="error: output folder .* a file or a link to nowhere", ranks=2, agent=[], code=1)
    if os.geteuid() == 0:
        small = str(lab.folder / "small" / "cache")
        yield fills
        yield partial(full, "the disk is full before step 1", "error: output folder .*run cannot be used: No space left")
        for workers in (0, 2):
            yield partial(full, f"the cache's disk is full; {workers} workers", "error: [^\n]*small[^\n]*No space left", "--cache", small,
                          "--workers", workers)
        yield read_only
    yield partial(no_folder, "a file")
    yield partial(no_folder, "a link to nowhere")


def hangs(lab):
    """Workers and ranks that die, stop or fail: everyone leaves, the first error is shown last."""
    def left(name, fault, told, most_s, **how):
        folder = lab.fresh()
        run = lab.run(folder, "--workers", 1, ranks=2, faults=[at("start", ""), fault], agent=[])
        rows = run.until(lambda: last_row(folder) >= 5)
        code, text = run.wait(200 + rows)
        took = time.time() - (folder / "log.csv").stat().st_mtime
        lost = last_row(folder) - kept(folder)
        last = "".join(text.splitlines(True)[-6:])
        return lab.resumed(f"{name}; all gone in {most_s} s", folder, lost, f"{text}\ntook {took:.0f} s: {message(last, told)}\n", code,
                           code == 1 and took < most_s and lost < EVERY and re.search(told, last) is not None, "took", 2)
    for name, do, told, most_s in (
            ("a loader worker is killed", "worker SIGKILL", "killed by signal: Killed", 30),
            ("a loader worker hangs (timeout 5 s, not 300)", "worker SIGSTOP", "timed out after 5 seconds", 60),
            ("a rank raises", "error", "error: injected", 20), ("a rank has a bug", "bug", "KeyError: 0", 20),
            ("a rank hangs (timeout 30 s, not 10 min)", "SIGSTOP", "[Tt]imed out|Timeout", 100)):
        yield partial(left, name, at("step", do, 6, rank=1), told, most_s)


def damage(lab):
    """What a resume finds; the run was killed in step 10, so last.pt is of step 8 and last.prev.pt of step 4."""
    def flip(data):
        return data[:len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1:]
    ways = {"cut": lambda data: data[:len(data) // 2], "flipped by a bit": flip, "zeroed": lambda data: bytes(len(data)),
            "empty": lambda data: b""}

    def damaged(name):
        folder = lab.broken()
        (folder / "last.pt").write_bytes(ways[name]((folder / "last.pt").read_bytes()))
        lost = last_row(folder) - kept(folder)
        return lab.resumed(f"the newest checkpoint is {name}", folder, lost, told="warning: .*last.pt is refused.*step 4")

    def all_damaged():
        folder = lab.broken()
        for path in folder.glob("last*.pt"):
            path.write_bytes(path.read_bytes()[:-100])
        return lab.refused("all checkpoints are cut", folder, "--resume", told="error: .*no whole checkpoint is left")

    def older():
        folder = lab.broken()
        os.utime(folder / "last.pt", (0, 0))
        return lab.resumed("the clock was wrong", folder, last_row(folder) - kept(folder), told="steps 8 to 13")

    def none():
        folder = lab.broken(nth=2)
        return lab.refused("a run is there, neither --resume nor --overwrite", folder, told="error: .*holds a run")

    def refused_then_restarted():
        row = lab.refused("the same under torchrun --max-restarts=2", lab.broken(nth=6), told="error: .*holds a run", code=1,
                          agent=["--max-restarts=2"])
        return row
    return [*(partial(damaged, name) for name in ways), all_damaged, older, none, refused_then_restarted]


def changes(lab):
    """The resumed command is another one."""
    def other_world(before, after):
        folder = lab.broken(ranks=before)
        code, text = lab.run(folder, "--resume", ranks=after).wait()
        ours, whole = ([float(row["loss"]) for row in csv.DictReader((path / "log.csv").open())]
                       for path in (folder, lab.whole(before)))
        apart = max(abs(a / b - 1) for a, b in zip(ours, whole))
        return Row(f"begun on {before} ranks, resumed on {after}", 0, f"losses alike within {apart:.0e}", code, "-",
                   code == 0 and len(ours) == STEPS and apart < 1e-4)

    def other_order():
        listing = lab.folder / "list.txt"
        paths = sorted(str(path) for path in (lab.folder / "phantoms/imagesTr").glob("*.gz"))
        labels = [path.replace("imagesTr", "labelsTr") for path in paths]
        lines = [f"{path}\t{label}\n" for path, label in zip(paths, labels)]
        listing.write_text("".join(lines))
        folder = lab.broken("--data", listing)
        listing.write_text("".join(reversed(lines)))
        return lab.refused("the data list has another order", folder, "--data", listing, "--resume", told="error: .*in the checkpoint")

    def setting(told, *flags):
        return lab.refused(f"resumed with {' '.join(flags)}", lab.broken(), "--resume", *flags, told=f"error: .*{told}")

    def free():
        return lab.resumed("resumed with other --workers and --save_steps: listed", lab.broken(), flags=("--workers", 2, "--save_steps", 3),
                           told="save_steps: 4 in the checkpoint, 3 now")
    yield from (partial(other_world, *pair) for pair in ((1, 2), (2, 1), (2, 4), (4, 2), (4, 1)))
    yield other_order
    for told, *flags in (("lr: 0.003 in", "--lr", "1e-4"), ("global_batch: 4 in the checkpoint, 3 now", "--batch", "3", *["--accumulate", "1"]
                         * (lab.script == "train_ssl.py")), ("total: 13 in the checkpoint, 20 now", "--steps", "20"), ("seed", "--seed", "1")):
        yield partial(setting, told, *flags)
    yield free


def together(lab):
    """Two runs, one folder."""
    def second(*flags):
        folder = lab.fresh()
        first = lab.run(folder, ranks=2, faults=[at("step", "sleep", times=99)])
        first.until(lambda: last_row(folder) > 1)
        begun = time.time()
        row = lab.refused(f"a second run, {' '.join(flags) or 'plain'}, in the folder", folder, *flags, told="error: .*in use by .* pid")
        took = time.time() - begun
        code, _ = first.wait()
        exact = code == 0 and fingerprint(folder) == fingerprint(lab.whole(2))
        return row._replace(exact=exact, good=row.good and exact and took < 30)
    return [partial(second, *flags) for flags in ((), ("--resume",), ("--overwrite",))]


def nans(lab):
    """A loss that is NaN on one rank only."""
    micro = 2 if lab.script == "train_ssl.py" else 1

    def once():
        folders = []
        for rank in (0, 1):
            folders.append(lab.fresh())
            code, text = lab.run(folders[-1], ranks=2, faults=[at("loss", "nan", 8 * micro, rank=rank)]).wait()
        state = runtime.load_checkpoint(folders[0] / "last.pt")
        exact = fingerprint(folders[0]) == fingerprint(folders[1]) != fingerprint(lab.whole(2))
        return Row("NaN on one rank: alike whichever it is", 1, f"{state['skipped']} step skipped", code, exact,
                   code == 0 and exact and state["skipped"] == 1)

    def always(rank):
        row = lab.refused(f"NaN on rank {rank} from step 6 on", lab.fresh(), "--steps", 40, ranks=2, agent=[], code=1,
                          faults=[at("loss", "nan", 6 * micro, times=999, rank=rank)], told="error: step 25: 20 steps.*nan")
        return row
    return [once, partial(always, 0), partial(always, 1)]


def files(lab):
    """Data that changes under a run; few and odd numbers of cases."""
    def touched(name, **fault):
        images = lab.fresh()
        shutil.copytree(lab.folder / "phantoms", images)
        gone = images / "imagesTr/phantom0004.nii.gz"
        return lab.refused(f"a volume is {name} in mid-run", lab.fresh(), "--data", images / "dataset.json", "--val_fraction", 0, "--workers", 2,
                           ranks=2, agent=[], faults=[at("step", path=str(gone), nth=2, **fault)], code=1,
                           told=r"error: [^\n]*phantom0004.nii.gz")
    yield partial(touched, "removed", do="remove")
    yield partial(touched, "replaced", do="copy", source=str(lab.folder / "phantoms/imagesTr/phantom0005.nii.gz"))
    few = lab.folder / "few.txt"
    few.write_text("".join(f"phantoms/imagesTr/phantom000{i}.nii.gz\tphantoms/labelsTr/phantom000{i}.nii.gz\n" for i in (0, 1)))
    yield partial(lab.trial, "2 cases for 4 ranks", at("step", "SIGKILL", 10, rank=3), ranks=4, same=("--data", few, "--val_fraction", 0))
    yield partial(lab.trial, "epochs of 3.75 steps", at("step", "SIGKILL", 10, rank=1), ranks=2, same=("--val_fraction", 0))


GROUPS = {group.__name__: group for group in (kills, signals, saving, damage, disks, hangs, changes, together, nans, files,
                                              agents, restarts, at_random)}


# ---------------------------------------------------------------- a few of each, as tests
@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    return faults.Lab(tmp_path_factory.mktemp("faults"))


@pytest.mark.parametrize("group, chosen", [
    ("kills", [20, 30, 77]), ("signals", [2]), ("saving", [3, 6, 8, 9, -1]), ("damage", [1, 4, -1]), ("disks", [3, -1]),
    ("changes", [1, 5, -1]), ("together", [1]), ("nans", [0]), ("files", [0, -1]), ("restarts", [0]), ("at_random", [3])])
def test_nothing_is_lost(group, chosen, lab):
    cases = list(GROUPS[group](lab))
    for row in (cases[i]() for i in chosen if i < len(cases)):
        assert row.good, row
