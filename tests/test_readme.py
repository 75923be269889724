"""What the pages say: their map, flags, commands and differences are the code's;
files can be copied as they say."""
import ast
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch.distributed.run
from conftest import SMALL

import evaluate
import finetune
import train_ssl
from smit import phantom, settings
from smit.baselines import __main__ as baselines
from smit.benchmark import __main__ as benchmark
from smit.study import __main__ as study
from smit.study import carry, target

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
ROOMS = (ROOT / "smit/README.md").read_text()
PAGES = {name: (ROOT / name).read_text() for name in (
    "README.md", "smit/README.md", "smit/study/README.md", "smit/benchmark/README.md",
    "smit/baselines/README.md")}
SOURCES = [*sorted((ROOT / "smit").rglob("*.py")), *sorted(ROOT.glob("*.py"))]
LEAVES = {"swin", "masking", "heads", "losses", "ema", "transforms", "metrics", "sliding"}
ANNEXES = {"study", "benchmark", "baselines"}
ALLOWED = {"torch", "numpy", "nibabel", "tqdm", "smit"}
MAP = README.split("## From the paper to the code")[1].split("\n## ")[0]
SMALL_FINETUNE = ("--spacing 10 10 10 --crop 24 --embed_dim 8 --depths 1 1 --heads 2 2 "
                  "--workers 0 --device cpu")
# What a command of the README contains, and the flags appended to it, for the last of two wins.
# It may take seconds.
REDUCED = {
    "train_ssl.py": f"{' '.join(SMALL)} --accumulate 1 --batch 1 --steps 2 --val_every 2 "
                    "--phantoms 3",
    "finetune.py": f"{SMALL_FINETUNE} --batch 1 --crops_per_volume 1 --steps 2",
    "evaluate.py": "",
    "smit.study": "--rows smit --labels 2 --seeds 0 --pretrain_flags "
                  f"'{' '.join(SMALL)} --batch 1 --steps 2 --val_fraction .3 --precision fp32' "
                  f"--finetune_flags '{SMALL_FINETUNE} --batch 1 --steps 2 --precision fp32'",
    "smit.benchmark": "--quick --rounds 1 --only encoder",
}
USES = {  # of each leaf, alone in a folder
    "swin": """net = swin.SwinTransformer3D(
            embed_dim=8, depths=(1, 1), heads=(2, 2), window=(2, 4, 2))
        features = net(torch.rand(1, 1, 16, 8, 16), torch.rand(1, 8, 4, 8) < .7)
        features[-1].square().mean().backward()
        assert [f.shape[1] for f in features] == [8, 16, 32] and net.mask_token.grad.any()""",
    "masking": """hidden = masking.random_block_mask(2, (6, 6, 6), .7)
        assert masking.expand_mask(hidden, 8).sum() == 2 * 152 * 8 ** 3""",
    "heads": """assert heads.LinearVoxelHead(8, 4)(
            torch.rand(2, 8, 1, 2, 3)).shape == (2, 1, 4, 8, 12)
        assert heads.MultiLayerVoxelHead(8, 2)(torch.rand(2, 8, 1, 2, 3)).shape == (2, 1, 4, 8, 12)
        assert heads.ProjectionHead(8, 16, 4, 32)(torch.rand(2, 5, 8)).abs().max() <= 1.001""",
    "losses": """logits, center = torch.rand(2, 5, 9, requires_grad=True), losses.Center(9)
        hidden = torch.arange(10).view(2, 5) % 2 == 0
        losses.mpd_loss(logits, torch.rand(2, 5, 9), hidden, center.value, .1, .04).backward()
        assert logits.grad[hidden].any() and not logits.grad[~hidden].any()
        assert center.update(torch.ones(2, 5, 9)).allclose(torch.full((9,), .1))
        assert losses.itd_loss(logits[:, 0], logits[:, 1], 0, .1, .04) > 0
        assert losses.mip_loss(torch.ones(1, 1, 2, 2, 2), torch.zeros(1, 1, 2, 2, 2),
                               torch.ones(1, 2, 2, 2) > 0) == 1
        assert losses.dice_ce_loss(torch.rand(1, 3, 2, 2, 2), torch.ones(1, 2, 2, 2).long()) > 0""",
    "ema": """teacher, student = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
        ema.update_teacher(teacher, student, ema.cosine(.5, 0., 0.))
        assert torch.equal(teacher.weight, student.weight)
        assert ema.warmup_cosine(5, 10, 20, 1.) == .5""",
    "transforms": """volume, affine = transforms.to_ras(
            torch.rand(8, 10, 12), np.diag([-1., -1., 2., 1.]))
        small, affine = transforms.resample(
            transforms.window_hu(volume, 0, .5), affine, (2., 2., 2.))
        assert small.shape == (4, 5, 12) and small.max() < 1.001
        assert np.allclose(transforms.spacing_of(affine), 2)""",
    "metrics": """a = torch.zeros(8, 8, 8, dtype=torch.bool)
        a[2:5, 2:5, 2:5] = True
        assert metrics.hd95(a, a.roll(1, 0), (2., 1., 1.)) == 2 and metrics.dice(a, a, 2) == [1]
        assert metrics.surface_dice(a, a.roll(1, 0), (2., 1., 1.), 2.) == 1""",
    "sliding": """net = torch.nn.Conv3d(1, 3, 1)
        volume = torch.rand(1, 1, 9, 10, 11)
        result = sliding.sliding_window(net, volume, (4, 4, 8))
        assert torch.allclose(result, net(volume), atol=1e-5)""",
}


def commands(page=README):
    """(words, text) of every command in a page's sh blocks, lines joined,
    $(...) replaced by a word."""
    for block in re.findall(r"```sh\n(.*?)```", page, flags=re.S):
        for line in block.replace("\\\n", " ").splitlines():
            yield shlex.split(re.sub(r"\$\(.*?\)", "host", line), comments=True), line


def reduced(words, text):
    """The words of a command at reduced size: two ranks at most, and the flags of REDUCED.
    It must be known there."""
    extra = next((flags for part, flags in REDUCED.items() if part in text), None)
    assert extra is not None, f"REDUCED has no line for the README's command {text}"
    launch, words = [], [str(ROOT / word) if word.endswith(".py") else word for word in words]
    if words[0] == "torchrun":
        asked = torch.distributed.run.parse_args(words[1:])
        ranks = min(int(asked.nproc_per_node), 2)
        launch += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        words = [None, asked.training_script, *asked.training_script_args]
    else:
        assert words[0] == "python", text
    return [*launch, *words[1:], *shlex.split(extra)]


@pytest.fixture
def named_data(tmp_path, phantoms):
    """A folder where the paths that the README names are phantoms."""
    btcv, other = phantoms.parent, phantom.write_dataset(tmp_path / "data/other", 2, seed=1,
                                                         spacing_mm=(10, 10, 10))
    for name, folder in (("btcv", btcv), ("chaos", btcv), ("data/ct", btcv / "imagesTr"),
                         ("openkbp/images", other.parent / "imagesTr"),
                         ("runs/phantoms-ct-20-6x6x6mm-seed0", btcv)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).symlink_to(folder)
    (tmp_path / "ct_extra").mkdir()
    for name in ("scan.nii.gz", "ct_extra/chest.nii.gz"):
        shutil.copy(btcv / "imagesTr/phantom0000.nii.gz", tmp_path / name)
    shutil.copytree(btcv / "labelsTr", tmp_path / "nnunet/out")
    shutil.copy(btcv / "dataset.json", tmp_path / "nnunet/out")          # as nnU-Net itself does
    return tmp_path


def test_every_command_runs_in_the_order_of_the_page(named_data, run_script):
    done = []
    for words, text in commands():
        if words[:2] == ["pip", "install"]:
            assert text in (ROOT / ".ci/run").read_text().replace("--quiet ", "")
        elif words[0] == "srun":
            asked = torch.distributed.run.parse_args(words[words.index("torchrun") + 1:])
            assert ((asked.nnodes, asked.nproc_per_node) == ("2", "4")
                    and "--rdzv_endpoint=host:29500" in words)
            scripts = {"train_ssl.py": train_ssl, "finetune.py": finetune}
            scripts[asked.training_script].parse_arguments(asked.training_script_args)
        else:
            run = run_script(*reduced(words, text))
            done.append(run.stdout.splitlines()[-1])
            # output is no terminal: lines, no bar
            if "train_ssl.py" in text or "finetune.py" in text:
                for told in ("parameters; .* MiB for it", "first step: peak memory",
                             "step 2 of 2, epoch .* left"):
                    assert re.search(told, run.stdout), run.stdout
                assert "\r" not in run.stderr
    assert len(done) > 6
    # the README gives two of these numbers, and then the page beside the weights
    assert re.fullmatch(r"done at step 2: [\d.]+ crops/s, peak memory \d+ MiB, weights in "
                        r"runs/ssl/student.pt", done[0])
    assert (named_data / "runs/ssl/index.html").exists()


@pytest.mark.parametrize("script", [train_ssl, finetune, evaluate],
                         ids=lambda script: script.__name__)
def test_help_has_groups_and_defaults_and_a_wrong_value_is_told_the_allowed_ones(script, capsys):
    tiny = [] if script is evaluate else ["--preset", "tiny"]
    with pytest.raises(SystemExit, match="0"):
        script.parse_arguments([*tiny, "--help"])
    told = " ".join(capsys.readouterr().out.split())
    assert script.__doc__.split("\n")[0] in told and len(re.findall(r" \w+: --", told)) > 1

    default = {train_ssl: f"(default: {settings.PRETRAINING_PRESETS['tiny']['steps']})",
               finetune: f"(default: {settings.FINETUNING_PRESETS['tiny']['steps']})",
               evaluate: "share of a window that the next one covers too [SMIT 3] (default: 0.5)"}
    assert default[script] in told and "[flags]" in told
    with pytest.raises(SystemExit, match="2"):
        script.parse_arguments(["--precision", "fp8"])
    assert "auto, fp32, fp16, bf16" in capsys.readouterr().err.replace("'", "")


def test_the_lines_of_python_run(phantoms, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(phantoms.parent / "imagesTr/phantom0000.nii.gz", "scan.nii.gz")
    small = [*SMALL, "--data", str(phantoms), "--steps", "1"]
    train_ssl.main(train_ssl.parse_arguments(small))
    finetune.main(finetune.parse_arguments(
        [*SMALL_FINETUNE.split(), "--data", str(phantoms), "--steps", "1", "--out", "runs/try"]))
    (lines,), names = re.findall(r"```python\n(.*?)```", README, flags=re.S), {}
    exec(lines, names)
    assert len(names["maps"]) == 3 and names["label"].max() <= 13


@pytest.mark.parametrize("page", PAGES)
def test_every_command_of_a_page_parses(page):
    for words, text in commands(PAGES[page]):
        if words[0] in ("pip", "srun", "git", "cd"):
            continue
        script = next((place for place, word in enumerate(words)
                       if word.endswith(".py") or word == "-m"), None)
        assert script is not None, text
        name = words[script + 1] if words[script] == "-m" else words[script]
        flags = words[script + 1 + (words[script] == "-m"):]
        parse = {"train_ssl.py": train_ssl.parse_arguments, "finetune.py": finetune.parse_arguments,
                 "evaluate.py": evaluate.parse_arguments, "smit.study": study.parse_arguments,
                 "smit.study.carry": carry.parse_arguments,
                 "smit.study.target": target.parse_arguments,
                 "smit.baselines": baselines.parse_arguments,
                 "smit.benchmark": benchmark.parse_arguments}[name]
        parse(flags)


@pytest.mark.parametrize("page", PAGES)
def test_links_between_pages_lead_somewhere(page):
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", PAGES[page]):
        assert (ROOT / page).parent.joinpath(link).exists(), f"{page} points to {link}"


def test_every_flag_that_a_page_names_exists():
    flags = set(re.findall(r"(?<![\w-])--[a-z][a-z_-]*", "".join(PAGES.values())))
    launchers = {"--nproc_per_node", "--nnodes", "--rdzv_backend", "--rdzv_endpoint",
                 "--nodes", "--ntasks-per-node", "--max-restarts", "--signal"}
    assert len(flags) > 20
    for flag in flags - launchers - {"--help"}:
        assert any(f'"{flag}"' in path.read_text() for path in SOURCES), flag


@pytest.mark.parametrize("item", [
    *(f"Eq. {n}" for n in range(1, 5)), *(f"Fig. {n}" for n in range(1, 6)), "Table 1",
    "Table 2", "L_total", "EMA", "masks, ratio .7", "Implementation details"])
def test_the_map_has_each_part_of_the_paper_once(item):
    rows = [row for row in MAP.splitlines() if row.startswith("|") and item in row.split("|")[1]]
    assert len(rows) == 1 and "`" in rows[0].split("|")[2], rows


def test_files_that_the_pages_name_are_there():
    for page, text in PAGES.items():
        for file in re.findall(r"`((?:\w+/)*\w+\.py)", text):
            assert any((folder / file).is_file()
                       for folder in (ROOT, (ROOT / page).parent)), f"{page}: {file}"


def defined(path):
    """Names of functions, classes and Class.methods of a file."""
    tree = ast.parse(path.read_text())
    named = [node for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    methods = {f"{c.name}.{m.name}" for c in named if isinstance(c, ast.ClassDef)
               for m in c.body if hasattr(m, "name")}
    return {node.name for node in named} | methods


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ([node.module] if node.module != "smit"
                        else [f"smit.{alias.name}" for alias in node.names])


def test_every_target_of_the_map_exists():
    targets = re.findall(r"`([\w/]+\.py):([\w.]+)`", README)
    assert len(targets) > 15
    for file, name in targets:
        assert name in defined(ROOT / file), f"README points to {file}:{name}"


def test_each_difference_is_listed_once_and_tagged_once():
    tagged = sum(path.read_text().count("# differs:") for path in SOURCES)
    section = ROOMS.split("## Where this differs")[1].split("\n## ")[0]
    listed = re.findall(r"^(\d+)\. [^`]*(?:`[^`]*`[^`]*)*?`([\w/]+\.py)`$", section, flags=re.M)
    assert [int(number) for number, _ in listed] == list(range(1, tagged + 1))
    for path in SOURCES:
        name = str(path.relative_to(ROOT))
        assert path.read_text().count("# differs:") == sum(file == name for _, file in listed), name


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_from_scripts_to_users_to_leaves(path):
    for name in imports(path):
        root = name.split(".")[0]
        assert (root in ALLOWED
                or root in __import__("sys").stdlib_module_names), f"{path.name} imports {name}"
        if path.stem in LEAVES and path.parent.name == "smit":
            assert root != "smit", f"the leaf {path.name} imports {name}"
        assert root != "nibabel" or path.parent.name in ("data", "phantom")
        assert (root != "tqdm" or path.parent == ROOT or path.stem == "progress"
                or path.parent.name in ANNEXES)
        assert root not in ("train_ssl", "finetune", "evaluate")


@pytest.mark.parametrize("leaf", sorted(LEAVES))
def test_a_leaf_does_its_work_when_its_file_is_copied_alone(leaf, tmp_path, run_script):
    shutil.copy(ROOT / "smit" / f"{leaf}.py", tmp_path)
    lines = [f"import {leaf}, torch, numpy as np", *map(str.strip, USES[leaf].splitlines()),
             "print('used')"]
    assert run_script("-c", "\n".join(lines)).stdout == "used\n"
    assert f"`smit/{leaf}.py`" in ROOMS.split("## Copying a module")[1]
