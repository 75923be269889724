"""What is injected and what must come of it, in groups;
`python tests/faults.py --all` runs them, pytest a few of each.

A group is a function of a fault_lab.Lab that gives cases;
a case is a function that gives a fault_lab.Row.
"""
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

import pytest
from fault_lab import EVERY, STEPS, Lab, Row, fingerprint, last_logged_step, lost_steps, message
from injection import Fault, fill_disk
from smit import runtime

KILL, TWO_WORKERS = "SIGKILL", ("--workers", 2)


def kills(lab):
    """In every step of a run but its last: first, middle and last of an epoch,
    on 1, 2, 4 ranks, 0 and 2 workers."""
    for ranks in lab.ranks:
        for workers in lab.workers:
            name = f"kill -9 of a rank in mid-step; {ranks} ranks, {workers} workers"
            for nth in range(1, STEPS):
                fault = Fault("step", KILL, nth, rank=nth % ranks)
                yield partial(lab.trial, name, fault, ranks=ranks, flags=("--workers", workers))
        sixth, again = (Fault("step", KILL, 6),
                        [Fault("step", KILL, 1, rank=ranks - 1), Fault("step", KILL, 2)])
        for name, more in (("in the first step after a resume", again[:1]),
                           ("thrice in an epoch", again)):
            yield partial(lab.trial, f"kill -9 {name}; {ranks} ranks", sixth, ranks=ranks,
                          again=more)


def at_random(lab):
    """Runs that save in every step, killed at random moments, 5 times each: 100 kills."""
    def killed(seed):
        folder, draw, good, ranks = lab.fresh(), random.Random(seed), True, 1 + seed % 2
        for _ in range(5):
            run = lab.run(folder, "--save_steps", 1, "--resume", "--workers", seed % 3, ranks=ranks)
            run.until(lambda: 0 in run.codes(), draw.uniform(.2, 3))
            run.signal(KILL)
            run.wait()
            good &= lost_steps(folder) <= 1
        return lab.resumed("kill -9 at 5 random times, saving in every step", folder, 1,
                           good=good, ranks=ranks)
    return [partial(killed, seed) for seed in range(20)]


def restarts(lab):
    """A killed rank under torchrun --max-restarts=3: the run goes on by itself."""
    how = dict(ranks=2, agent=["--max-restarts=3"], code=0)
    for n in range(20):
        fault = Fault("step", KILL, 2 + n % 9, rank=n % 2)
        yield partial(lab.trial, "kill -9 of a rank under torchrun --max-restarts=3", fault, **how)
    lives = [Fault("step", KILL, 6, rank=life % 2, life=life) for life in range(3)]
    yield partial(lab.trial, "kill -9 in three lives running, the same", *lives, **how)


def agents(lab):
    """Signals to torchrun itself."""
    def stopped(name, expected):
        folder = lab.fresh()
        pace = Fault("step", "sleep", times=99, rank=None)
        run = lab.run(folder, *TWO_WORKERS, ranks=2, agent=[], faults=[pace])
        run.until(lambda: last_logged_step(folder) > EVERY)
        run.signal(name)
        gone = run.until(lambda: not run.is_alive(), 60)
        code, text = run.wait()
        lost = lost_steps(folder)
        text += f"\ngone in {gone:.0f} s\n"
        return lab.resumed(f"{name} to torchrun; its ranks must leave in 30 s", folder, lost,
                           text, code, gone < 30 and lost == 0 and code == expected,
                           "gone in", 2)
    return [partial(stopped, *signal) for signal in ((KILL, -9), ("SIGUSR1", -10), ("SIGTERM", 1))]


def signals(lab):
    """One rank is told or all are; they stop at one step, save and leave."""
    clean = dict(most=0, code=0)
    for name in ("SIGTERM", "SIGINT", "SIGUSR1"):
        yield partial(lab.trial, f"{name} to one rank of two", Fault("step", name, 6, rank=1),
                      ranks=2, flags=TWO_WORKERS, told="stopped at step 6", **clean)
        yield partial(lab.trial, f"{name} to all ranks of four",
                      Fault("step", name, 6, rank=None), ranks=4, told=f"{name}: saving",
                      **clean)
        yield partial(lab.trial, f"{name}, and again twice while saving",
                      Fault("step", name, 6), Fault("write", name, 2),
                      Fault("rename", name, 2), ranks=2, told="stopped at step 6", **clean)


def saving(lab):
    """Death and errors in the midst of the second checkpoint, of step 8, and of the last."""
    size, most = (lab.whole() / "last.pt").stat().st_size, EVERY
    for share, limit in (("byte 0", 0), ("1 kB", 1000), ("10 %", .1 * size),
                         ("50 %", .5 * size), ("99 %", .99 * size)):
        fault = Fault("write", "limit", 2, size=int(limit))
        yield partial(lab.trial, f"killed at {share} of a checkpoint's write", fault, code=-25,
                      most=most)
    yield partial(lab.trial, "killed before the old one is moved", Fault("prev", KILL), most=most)
    yield partial(lab.trial, "killed before the rename", Fault("rename", KILL, 2), most=most)
    yield partial(lab.trial, "killed after the rename", Fault("renamed", KILL, 2), most=0)
    yield partial(lab.trial, "killed after the last rename of a run",
                  Fault("renamed", KILL, 4), most=0)
    told = "error: .*last.pt could not be written: Input/output error"
    for name, point, nth in (("1", "fsync", 3), ("2", "fsync", 4), ("of the folder", "renamed", 2)):
        fault = Fault(point, "EIO", nth)
        yield partial(lab.trial, f"EIO on fsync {name} of a checkpoint", fault, code=2,
                      most=most, told=told)

    def ordered():
        folder, trace = lab.fresh(), lab.folder / "trace.txt"
        trace.unlink(missing_ok=True)
        code, _ = lab.run(
            folder, faults=[Fault("disk", "trace", times=10 ** 6, path=str(trace))]).wait()
        calls = re.sub(r"(fsync|replace) \S+/", r"\1 ", trace.read_text())
        fsync = r"fsync \.last\.pt\.\w+\.partial\n"
        saves = re.findall(
            f"{fsync}(?:replace last.prev.pt\n)?{fsync}replace last.pt\nfsync {folder.name}\n",
            calls)
        exact = fingerprint(folder) == fingerprint(lab.whole())
        return Row("power loss: fsync(file), rename, fsync(folder), always", 0,
                   f"{len(saves)} saves in this order", code, exact,
                   len(saves) == calls.count("replace last.pt\n") == 5 and exact)
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
    small = partial(mounted, lab.folder / "small", "-t", "tmpfs", "-o", "size=3m", "tmpfs")
    told = "error: output folder .*run cannot be used: "

    def fills():
        with small() as disk:
            out, ballast = disk / "run", disk / "ballast"
            found, text = lab.run(out, faults=[Fault("step", "fill", 6, path=str(ballast))]).wait()
            lost = lost_steps(out)
            ballast.unlink()
            return lab.resumed("the disk is full from step 6 on", out, lost, text, found,
                               found == 2 and lost <= EVERY,
                               "error: .* could not be written: No space left")

    def full(name, told, *flags):
        with small() as disk:
            fill_disk(disk / "ballast")
            return lab.refused(name, lab.fresh() if flags else disk / "run", *flags, told=told)

    def read_only():
        with mounted(lab.folder / "ro", "--bind", str(lab.folder / "phantoms")) as disk:
            subprocess.run(["mount", "-o", "remount,bind,ro", str(disk)], check=True)
            return lab.refused("read-only", disk / "run", told=told + "Read-only")

    def no_folder(kind):
        out = lab.fresh()
        out.write_text("") if kind == "a file" else out.symlink_to(lab.folder / "nowhere")
        return lab.refused(f"the output is {kind}", out,
                           told="error: output folder .* a file or a link to nowhere")
    if os.geteuid() == 0:                                            # to mount
        yield fills
        yield partial(full, "the disk is full before step 1", told + "No space left")
        for workers in (0, 2):
            yield partial(full, f"the cache's disk is full; {workers} workers",
                          "error: [^\n]*small[^\n]*No space left",
                          "--cache", str(lab.folder / "small/cache"), "--workers", workers)
        yield read_only
    yield partial(no_folder, "a file")
    yield partial(no_folder, "a link to nowhere")


def hangs(lab):
    """Workers and ranks that die, stop or fail under torchrun:
    everyone leaves, the first error is shown last."""
    def left(name, fault, told, most_s):
        folder = lab.fresh()
        run = lab.run(folder, "--workers", 1, ranks=2, faults=[Fault("start", ""), fault], agent=[])
        rows = run.until(lambda: last_logged_step(folder) >= 5)
        code, text = run.wait(200 + rows)
        took, lost = time.time() - (folder / "log.csv").stat().st_mtime, lost_steps(folder)
        end = "".join(text.splitlines(True)[-6:])
        good = code == 1 and took < most_s and lost < EVERY and bool(re.search(told, end))
        text += f"\nafter {took:.0f} s: {message(end, told)}\n"
        return lab.resumed(f"{name}; all gone in {most_s} s", folder, lost, text, code, good,
                           "after", 2)
    def sixth(do):
        return Fault("step", do, 6, rank=1)
    load = Fault("load", "hang", 14, rank=1)
    for name, fault, told, most_s in (
            ("a loader worker is killed", sixth("worker SIGKILL"),
             "killed by signal: Killed|exited unexpectedly", 30),
            ("a loader worker hangs (timeout 5 s, not 300)", load, "timed out after 5 s", 60),
            ("a rank raises", sixth("error"), "error: injected", 20),
            ("a rank has a bug", sixth("bug"), "KeyError: 0", 20),
            ("a rank hangs (timeout 30 s, not 10 min)", sixth("SIGSTOP"),
             "[Tt]imed out|[Tt]imeout", 100)):
        yield partial(left, name, fault, told, most_s)


def workers(lab):
    """Loader workers that are killed: the step under way is finished, saved,
    and nothing is lost."""
    told, clean = (r"error: (rank 1: )?DataLoader worker .*--workers 0.*--shm-size.*--resume",
                   dict(most=0, code=2))
    for ranks in (1, 2):
        for workers in (1, 2):
            flags, where = ("--workers", workers), f"; {ranks} ranks, {workers} workers"
            how = dict(ranks=ranks, flags=flags, told=told, **clean)
            yield partial(lab.trial, f"a loader worker is killed by its item{where}",
                          Fault("load", KILL, 12 // workers, rank=ranks - 1), **how)
            yield partial(lab.trial, f"a loader worker is killed in mid-step{where}",
                          Fault("step", "worker SIGKILL", 6, rank=ranks - 1), **how)


def damage(lab):
    """What a resume finds; the run was killed in step 10, before whose measurement it saved,
    so last.pt is of step 9 and last.prev.pt of step 8."""
    def flip(data):
        half = len(data) // 2
        return data[:half] + bytes([data[half] ^ 1]) + data[half + 1:]
    ways = {"cut": lambda data: data[:len(data) // 2], "flipped by a bit": flip,
            "zeroed": lambda data: bytes(len(data)), "empty": lambda data: b""}

    def damaged(name):
        folder = lab.broken()
        newest = folder / "last.pt"
        newest.write_bytes(ways[name](newest.read_bytes()))
        told = "warning: .*last.pt is refused.*step 8"
        return lab.resumed(f"the newest checkpoint is {name}", folder, lost_steps(folder),
                           told=told)

    def all_damaged():
        folder = lab.broken()
        for path in folder.glob("last*.pt"):
            path.write_bytes(path.read_bytes()[:-100])
        return lab.refused("all checkpoints are cut", folder, "--resume",
                           told="error: .*no whole checkpoint is left")

    def older():
        folder = lab.broken()
        os.utime(folder / "last.pt", (0, 0))
        return lab.resumed("the clock was wrong", folder, lost_steps(folder), told="steps 9 to 13")

    def occupied(name, **how):
        return lab.refused(f"a run is there{name}", lab.broken(nth=6),
                           told="error: .*holds a run", **how)
    again = dict(agent=["--max-restarts=2"], code=1)
    return [*(partial(damaged, name) for name in ways), all_damaged, older,
            partial(occupied, ", neither --resume nor --overwrite"),
            partial(occupied, ", the same, under torchrun --max-restarts=2", **again)]


def changes(lab):
    """The resumed command is another one."""
    def losses(folder):
        return [float(row["loss"]) for row in csv.DictReader((folder / "log.csv").open())]

    def other_world(before, after):
        folder = lab.broken(ranks=before)
        code, _ = lab.run(folder, "--resume", ranks=after).wait()
        ours, whole = losses(folder), losses(lab.whole(before))
        apart = max(abs(a / b - 1) for a, b in zip(ours, whole))
        return Row(f"begun on {before} ranks, resumed on {after}", 0,
                   f"losses alike within {apart:.0e}", code, "-",
                   code == 0 and len(ours) == STEPS and apart < 1e-4)

    def other_order():
        listing, images = (lab.folder / "list.txt",
                           sorted((lab.folder / "phantoms/imagesTr").glob("*.gz")))
        lines = [f"{image}\t{str(image).replace('imagesTr', 'labelsTr')}\n" for image in images]
        listing.write_text("".join(lines))
        folder = lab.broken("--data", listing)
        listing.write_text("".join(reversed(lines)))
        return lab.refused("the data list has another order", folder, "--data", listing, "--resume",
                           told="error: .*in the checkpoint")

    def setting(told, *flags):
        told = f"error: .*{told} in the checkpoint"
        return lab.refused(f"resumed with {' '.join(flags)}", lab.broken(),
                           "--resume", *flags, told=told)

    def free():
        told = "save_steps: 4 in the checkpoint, 3 now"
        return lab.resumed("resumed with other --workers and --save_steps: listed",
                           lab.broken(), told=told, flags=("--workers", 2, "--save_steps", 3))
    yield from (partial(other_world, *pair) for pair in ((1, 2), (2, 1), (2, 4), (4, 2), (4, 1)))
    yield other_order
    yield partial(setting, "lr: 0.003", "--lr", "1e-4")
    yield partial(setting, "global_batch: 4", "--batch", "5")
    yield partial(setting, "total: 13", "--steps", "20")
    yield partial(setting, "seed: 0", "--seed", "1")
    yield free


def together(lab):
    """Two runs, one folder."""
    def second(*flags):
        folder = lab.fresh()
        first = lab.run(folder, ranks=2, faults=[Fault("step", "sleep", times=99)])
        first.until(lambda: last_logged_step(folder) > 1)
        begun, name = time.time(), f"a second run in the folder, {' '.join(flags) or 'plain'}"
        row = lab.refused(name, folder, *flags, told="error: .*in use by .* pid")
        took = time.time() - begun
        exact = first.wait()[0] == 0 and fingerprint(folder) == fingerprint(lab.whole(2))
        return row._replace(exact=exact, good=row.good and exact and took < 30)
    return [partial(second, *flags) for flags in ((), ("--resume",), ("--overwrite",))]


def nans(lab):
    """A loss that is NaN on one rank only."""
    micro = 2 if lab.script == "train_ssl.py" else 1  # micro-batches a step, on two ranks

    def once():
        for rank, folder in enumerate(folders := [lab.fresh(), lab.fresh()]):
            code, _ = lab.run(folder, ranks=2,
                              faults=[Fault("loss", "nan", 8 * micro, rank=rank)]).wait()
        skipped = runtime.load_checkpoint(folders[0] / "last.pt")["skipped"]
        exact = fingerprint(folders[0]) == fingerprint(folders[1]) != fingerprint(lab.whole(2))
        return Row("NaN on one rank of two: alike whichever it is", 1,
                   f"{skipped} step skipped", code, exact,
                   code == 0 and exact and skipped == 1)

    def always(rank):
        fault = Fault("loss", "nan", 6 * micro, times=999, rank=rank)
        return lab.refused(f"NaN on rank {rank} from step 6 on", lab.fresh(),
                           "--steps", 40, ranks=2, agent=[], code=1, faults=[fault],
                           told="error: step 25: 20 steps.*nan")
    return [once, partial(always, 0), partial(always, 1)]


def files(lab):
    """Data that changes under a run; few and odd numbers of cases."""
    def touched(name, **fault):
        folder = lab.fresh()
        shutil.copytree(lab.folder / "phantoms", folder)
        fault = Fault("step", nth=2, path=str(folder / "imagesTr/phantom0004.nii.gz"), **fault)
        flags = ("--data", folder / "dataset.json", "--val_fraction", 0, *TWO_WORKERS)
        return lab.refused(f"a volume is {name} in mid-run", lab.fresh(), *flags, ranks=2,
                           agent=[], faults=[fault], code=1,
                           told="error: [^\n]*phantom0004.nii.gz")
    yield partial(touched, "removed", deed="remove")
    yield partial(touched, "replaced", deed="copy",
                  source=str(lab.folder / "phantoms/imagesTr/phantom0005.nii.gz"))
    few, case = (lab.folder / "few.txt",
                 "phantoms/imagesTr/phantom{0}.nii.gz\tphantoms/labelsTr/phantom{0}.nii.gz\n")
    few.write_text(case.format("0000") + case.format("0001"))
    yield partial(lab.trial, "2 cases for 4 ranks", Fault("step", KILL, 10, rank=3), ranks=4,
                  same=("--data", few, "--val_fraction", 0))
    yield partial(lab.trial, "epochs of 3.75 steps", Fault("step", KILL, 10, rank=1), ranks=2,
                  same=("--val_fraction", 0))


def evaluation(lab):
    """evaluate.py killed, stopped, refused; then the same command, to the end.
    Lost: predictions made again."""
    tuner, lab = Lab(lab.folder, "finetune.py"), Lab(lab.folder, "evaluate.py")
    weights, listing, case = (lab.folder / "weights.pt", lab.folder / "four.txt",
                              "phantoms/{0}Tr/phantom000{1}.nii.gz")
    shutil.copy(tuner.whole() / "best.pt", weights)
    lines = [f"{case.format('images', n)}\t{case.format('labels', n)}\n" for n in range(4)]
    listing.write_text("".join(lines))
    lab.common = ["--weights", weights, "--data", listing,
                  "--names", lab.folder / "phantoms/dataset.json"]
    small = partial(mounted, lab.folder / "small", "-t", "tmpfs", "-o", "size=3m", "tmpfs")
    second = "phantom0001.nii.gz"

    def met(name, fault, code=KILL, told="", results=False, folder=None):
        folder = folder or lab.fresh()
        found, text = lab.run(folder, faults=[fault]).wait()
        (folder.parent / "ballast").unlink(missing_ok=True)
        made, code = ([*folder.glob("*.nii.gz")],
                      -signal.Signals[code] if isinstance(code, str) else code)
        whole = all(path.read_bytes() == (lab.whole() / path.name).read_bytes() for path in made)
        whole &= (folder / "results.json").exists() == results and bool(re.search(told, text))
        again, _ = lab.run(folder).wait()
        exact = (again == 0 and fingerprint(folder) == fingerprint(lab.whole())
                 and not [*folder.glob(".*.partial")])
        return Row(f"evaluation: {name}", len(made), message(text, told) if told else "-",
                   found, exact, found == code and whole and exact)
    yield partial(met, "killed at byte 100 of a prediction",
                  Fault("label", "limit", file=second, size=100), "SIGXFSZ")
    yield partial(met, "killed before a prediction's rename", Fault("rename", KILL, file=second))
    yield partial(met, "killed after a prediction's rename", Fault("renamed", KILL, file=second))
    yield partial(met, "killed before the results' rename",
                  Fault("rename", KILL, file="results.json"))
    yield partial(met, "killed after the results' rename",
                  Fault("renamed", KILL, file="results.json"), results=True)
    yield partial(met, "SIGTERM in mid-run", Fault("renamed", "SIGTERM", file=second), "SIGTERM")
    yield partial(met, "EIO on fsync of a prediction", Fault("fsync", "EIO", file=second), 2,
                  f"error: .*{second} could not be written: Input/output error")

    def together():
        folder = lab.fresh()
        first = lab.run(folder, faults=[Fault("rename", "hang", file=second)])
        first.until((folder / "phantom0000.nii.gz").exists)
        row = lab.refused("evaluation: a second one in the folder", folder,
                          told="error: .*in use by .* pid")
        first.signal(KILL)
        first.wait()
        return row
    yield together

    def fills():
        with small() as disk:
            fault = Fault("renamed", "fill", file=second, path=str(disk / "ballast"))
            return met("the disk is full from the second prediction on", fault, 2,
                       "error: .*No space left", folder=disk / "run")

    def read_only():
        with mounted(lab.folder / "ro", "--bind", str(lab.folder / "phantoms")) as disk:
            subprocess.run(["mount", "-o", "remount,bind,ro", str(disk)], check=True)
            return lab.refused("evaluation: read-only", disk / "run",
                               told="error: output folder .*Read-only")
    if os.geteuid() == 0:                                            # to mount
        yield fills
        yield read_only

    def no_folder():
        (out := lab.fresh()).write_text("")
        return lab.refused("evaluation: the output is a file", out,
                           told="error: output folder .* a file or a link")
    yield no_folder

    def damaged_weights():
        bad = lab.folder / "damaged.pt"
        bad.write_bytes(weights.read_bytes()[:-1000])
        return lab.refused("evaluation: the weights are cut", lab.fresh(), "--weights", bad,
                           told="error: .*damaged.pt is refused")
    yield damaged_weights

    def bad_cases(name, *flags):
        bad = lab.folder / "bad.txt"
        lines = ([f"{case.format('images', n)}\tabsent{n}.nii.gz\n" for n in (0, 1)]
                 + ["absent2.nii\nabsent3.nii\n"])
        bad.write_text("".join(lines))
        out = lab.fresh()
        row = lab.refused(f"evaluation: 4 of 4 cases are bad; {name}", out, "--data", bad, *flags,
                          told="error: 4 problems" if flags else "error: 4 of 4 cases failed")
        made = len([*out.glob("*.nii.gz")])
        return row._replace(good=row.good and made == (0 if flags else 2)
                            and out.exists() != bool(flags))
    yield partial(bad_cases, "told first, the good images predicted")
    yield partial(bad_cases, "--check", "--check")

    def bad_predictions():
        folder = lab.folder / "theirs"
        shutil.copytree(lab.folder / "phantoms/labelsTr", folder, dirs_exist_ok=True)
        paths = sorted(folder.glob("*.gz"))
        paths[0].write_bytes(paths[0].read_bytes()[:-9])
        paths[1].unlink()
        theirs = Lab(lab.folder, "evaluate.py")
        theirs.common = ["--predictions", folder, "--labels", lab.data, "--key", "training",
                         "--names", lab.data]
        out = theirs.fresh()
        row = theirs.refused("evaluation: predictions cut and missing", out,
                             told="error: 2 of .* cases failed")
        return row._replace(good=row.good and (out / "results.json").exists())
    yield bad_predictions


GROUPS = {group.__name__: group for group in (kills, signals, workers, saving, damage, disks,
                                              hangs, changes, together, nans, files,
                                              evaluation, agents, restarts, at_random)}


# ---------------------------------------------------------------- a few of each, as tests
@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    return Lab(tmp_path_factory.mktemp("faults"))


@pytest.mark.parametrize("group, chosen", [
    ("kills", [20, 77]), ("signals", [2]), ("workers", [0, -1]), ("saving", [3, 6, 8, 9, -1]),
    ("damage", [1, 4, -1]), ("evaluation", [1, 3, 5, 7, -1]), ("disks", [3, -1]),
    ("changes", [1, 5, -1]), ("together", [1]), ("nans", [0]), ("files", [0, -1]),
    ("restarts", [0]), ("at_random", [3])])
def test_nothing_is_lost(group, chosen, lab):
    cases = list(GROUPS[group](lab))
    for row in (cases[i]() for i in chosen if i < len(cases)):
        assert row.good, row
