import json

import forked
import numpy as np
import pytest
import torch

from smit import data
from smit.benchmark import __main__ as command, measure, rows, workloads
from smit.transforms import spacing_of

TINY = dict(view=32, dim=8, prototypes=16, width=16, volume=(33, 36, 34), ct=(24, 20, 16))


def setting(tmp_path, **own):
    """The settings of a contestant in small, on the CPU whatever he asks for."""
    sizes = {**measure.DEFAULTS, **TINY, "threads": 1, "folder": tmp_path, "port": 29001}
    return workloads.Setting({**sizes, **own, "device": "cpu", "backend": "eager"})


def benchmark(*flags):
    return forked.run("-m", "smit.benchmark", *flags, folder=forked.ROOT, check=False)


def test_it_runs_and_writes_what_it_prints(tmp_path):
    flags = "--quick --ours --rounds 1 --threads 1 --only prepare inference --json".split()
    done = benchmark(*flags, tmp_path / "all.json")
    assert done.returncode == 0, done.stderr

    found = json.loads((tmp_path / "all.json").read_text())["rows"]
    assert list(found) == ["inference", "prepare"] and "failed" not in done.stdout
    for row in found.values():
        for result in row.values():
            assert result["wall"] > 0 and result["memory"] > 0
            assert f"{result['wall']:8.3f}" in done.stdout


def test_a_benchmark_that_is_cut_off_has_written_the_rows_before(tmp_path, monkeypatch):
    def measure_rows(*arguments):
        result = dict(precision="fp32", batch=1, wall=.5, cpu=.5, memory=1, parts={})
        yield "encoder", {"ours": result}, {"copy": 10.}
        raise KeyboardInterrupt

    monkeypatch.setattr(measure, "measure_rows", measure_rows)
    flags = ["--ours", "--threads", str(torch.get_num_threads()),
             "--json", str(tmp_path / "some.json")]
    with pytest.raises(KeyboardInterrupt):
        command.main(command.parse_arguments(flags))
    found = json.loads((tmp_path / "some.json").read_text())
    assert found["rows"]["encoder"]["ours"]["wall"] == .5 and found["ceiling"]["encoder"]


def test_help_is_documentation():
    done = benchmark("--help")
    assert "take turns" in done.stdout and "--compile" in done.stdout


@pytest.mark.parametrize("flags", ["--rounds 0", "--threads 0", "--batches 0"])
def test_numbers_that_measure_nothing_are_refused(flags, capsys):
    with pytest.raises(SystemExit):
        command.parse_arguments(flags.split())
    assert "1 or more" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_said_in_a_line():
    done = benchmark("--device", "cuda")
    assert done.returncode == 1 and done.stderr == "error: --device cuda: torch finds no GPU here\n"


# ---------------------------------------------------------------- contestants
@pytest.mark.parametrize("device, compiled", [("cpu", False), ("cpu", True), ("cuda", True)])
def test_every_contestant_of_a_row_has_a_name_of_its_own(device, compiled):
    labels = [(c.row, c.label) for c in rows.contestants(device, measure.PAPER, compiled)]
    assert len(labels) == len(set(labels)) and {row for row, _ in labels} <= set(rows.ROWS)
    assert {row for row, _ in labels} == set(rows.ON_GPU if device == "cuda" else rows.ROWS)


def test_on_a_gpu_precisions_and_batches_can_be_chosen():
    chosen = rows.contestants("cuda", measure.PAPER, False, [2, 8], ["bf16"])
    ways = {(c.settings["precision"], c.settings.get("batch")) for c in chosen}
    assert ways == {("bf16", 2), ("bf16", 8), ("bf16", None)}          # None: the sliding window


def of_each_work(device):
    """Contestants without MONAI, the first of each work and way of running."""
    chosen = {}
    for contestant in rows.contestants(device, TINY, compiled=True):
        own = contestant.settings
        way = contestant.work, own.get("compiled"), own.get("checkpointing")
        if not contestant.is_peer:
            chosen.setdefault(way, contestant)
    return chosen.values()


@pytest.mark.parametrize("contestant", of_each_work("cuda"), ids=lambda c: f"{c.row}, {c.label}")
def test_what_a_gpu_would_do_runs_on_the_cpu(tmp_path, contestant):
    once = contestant.work(setting(tmp_path, **contestant.settings))
    once()
    once()


def test_a_step_is_the_one_of_the_training_script(tmp_path, monkeypatch):
    import train_ssl
    asked, smit_losses = [], train_ssl.smit_losses

    def noted(args, *rest, **named):
        asked.append((args.view, args.embed_dim, args.prototypes, args.head_width))
        return smit_losses(args, *rest, **named)

    monkeypatch.setattr(train_ssl, "smit_losses", noted)
    parts = workloads.step(setting(tmp_path))()
    assert asked == [([32] * 3, 8, 16, 16)]
    assert list(parts) == ["forward, losses", "backward", "update"] and min(parts.values()) > 0


def test_checkpointing_computes_more_and_holds_less(tmp_path):
    # large enough that a piece recomputed at a time is a small part of it
    sizes = {"view": 64, "batch": 2}
    plain, saving = (measure.count(workloads.encoder(setting(tmp_path, **sizes, checkpointing=on)))
                     for on in (False, True))
    assert saving["gflop"] > 1.2 * plain["gflop"] and saving["held_gb"] < 0.9 * plain["held_gb"]


# ---------------------------------------------------------------- measuring
def test_traffic_counts_what_is_read_and_written_and_no_view():
    x = torch.ones(10, 20)
    with measure.Traffic() as traffic:
        x.t() + 1
    assert traffic.moved == 2 * 800


@pytest.mark.parametrize("tensors, work", [
    (2, lambda x, y: x.copy_(y)), (1, lambda x, y: x.zero_()), (1, lambda x, y: x.fill_(2.)),
    (0, lambda x, y: torch.empty_like(x)), (1, lambda x, y: torch.zeros_like(x)),
    (3, lambda x, y: x.add_(y)), (4, lambda x, y: torch._foreach_mul_([x, y], 2.)),
    (6, lambda x, y: torch._foreach_lerp_([x, y], [y, x], .5)),
    (1, lambda x, y: torch.stack([x[:1].expand(100)]))])
def test_traffic_counts_what_an_operator_changes_and_gives_not_back(tensors, work):
    x, y = torch.ones(100), torch.ones(100)
    with measure.Traffic() as traffic:
        work(x, y)
    assert traffic.moved == pytest.approx(tensors * 400, abs=8)


def test_traffic_counts_the_weights_and_moments_that_fused_adamw_writes():
    weight = torch.nn.Parameter(torch.ones(1000))
    weight.grad = torch.ones(1000)
    optimizer = torch.optim.AdamW([weight], fused=True)
    optimizer.step()
    with measure.Traffic() as traffic:
        optimizer.step()
    # four are read; the schema has all four written, though the gradient is with a scaler alone
    assert traffic.moved == pytest.approx(8 * 4000, abs=40)


def test_traffic_knows_the_most_that_operators_held_at_a_time():
    x = torch.ones(100)                                 # 400 bytes, there before
    with measure.Traffic() as traffic:
        y = x + 1                                       # 400 held
        y = y.view(10, 10) * 2                          # 800, then 400: the first one is freed
        y += 1                                          # in place: nothing new
        z = torch.cat([y, y, y])                        # 1600
        assert (traffic.held, traffic.most) == (1600, 1600)
        del y, z
        x.repeat(2)

    assert (traffic.held, traffic.most) == (0, 1600)


def test_idle_is_the_time_in_which_no_kernel_runs():
    overlapping = [(10, 20), (0, 4), (12, 15), (18, 25), (30, 40)]      # 4 + 15 + 10 of 40
    assert measure.idle_share(overlapping) == pytest.approx(11 / 40)
    assert measure.idle_share([(5, 6)]) == 0


def test_kernels_are_found_in_a_profile():
    x = torch.rand(64, 64)
    kernels = measure.kernels_of(lambda: x @ x, device="cpu")
    assert len(kernels) >= measure.PROFILED and all(begin <= end for begin, end in kernels)


def test_shares_are_of_the_machines_rates():
    result = dict(wall=2., gflop=100., gb=30., precision="bf16")
    measure.add_shares(result, {"bf16": 200., "fp32": 1., "copy": 20.})
    assert (result["flop_share"], result["copy_share"]) == (.25, .75)


# ---------------------------------------------------------------- marks
def test_marks_compare_the_two_sides_that_were_measured():
    def result(cpu, memory, gflop):
        return dict(cpu=cpu, memory=memory, wall=cpu, gflop=gflop)

    found = {"encoder": {"ours": result(2, 60, 1), "MONAI": result(4, 100, 1),
                         "ours, checkpointing": result(3, 20, 1)},
             "step": {"ours": result(6, 1, 30), "MONAI, student only": result(4, 1, 10)}}
    reached = {mark.what: (mark.value, mark.is_reached) for mark in rows.marks(found, 2)}
    assert reached == {
        "encoder, MONAI's time / ours": (2, True), "encoder, our memory / MONAI's": (.6, True),
        "encoder, memory with checkpointing": (pytest.approx(1 / 3), True),
        "encoder, time with checkpointing": (1.5, False),
        "step, our CPU time a GFLOP / that of MONAI's student alone": (.5, True)}


def test_the_loader_must_feed_four_cards_that_are_bound_by_their_memory():
    found = {"step": {"ours, bf16": dict(gb=27.)}, "loader": {"0 workers": dict(wall=3.2),
                                                              "2 workers": dict(wall=.8)}}
    (mark,) = rows.marks(found, 2)              # 64 pairs in .8 s; 4 * 675 GB/s / 27 GB = 100
    assert mark.value == pytest.approx(80 / 100) and not mark.is_reached
    assert "80 pairs/s on 2 cores / 100 that 4 V100" in mark.what


def test_on_a_gpu_the_mark_is_the_share_of_a_copys_rate():
    way = dict(precision="fp16", batch=4)
    ours = dict(way, wall=1., gb=80., copy_share=.7, idle=.1)
    found = {"step": {"ours fp16, batch 4": ours, "MONAI fp16, batch 4": dict(way, wall=1.)}}
    reached = {mark.what.split(": ")[1]: (mark.value, mark.is_reached)
               for mark in rows.marks(found, 2, "cuda")}

    assert reached == {"our time / MONAI's student alone": (1, True), "GB a pair": (20, True),
                       "share of a copy's rate": (.7, True),
                       "share of time without a kernel": (.1, False)}


def test_the_batch_that_fills_a_card_follows_from_what_two_steps_held():
    held = {1: 3., 2: 5., 4: 9.}                        # 1 GB, and 2 a pair
    assert rows.batches_that_fit(held) == {16: 6, 40: 17, 80: 35}
    assert rows.batches_that_fit({1: 3.}) is None


def test_the_batch_is_said_by_what_plain_steps_held(capsys):
    result = dict(precision="bf16", wall=1., memory=3e9 / 2 ** 20)
    double = result | dict(batch=2, memory=5e9 / 2 ** 20)
    less = double | dict(memory=1e9 / 2 ** 20)
    command.show_batches({"ours, bf16": result | dict(batch=1), "ours, bf16, batch 2": double,
                          "ours, bf16, batch 2, compiled": less,
                          "ours, bf16, batch 2, checkpointing": less, "MONAI": less})
    assert ": --batch 6 on 16 GB, 17 on 40 GB, 35 on 80 GB" in capsys.readouterr().out


def test_a_reshape_moves_nothing_and_fused_attention_counts_on_a_cpu():
    q = torch.rand(1, 2, 64, 32)
    counted = measure.count(lambda: torch.nn.functional.scaled_dot_product_attention(q, q, q))
    assert counted["gflop"] == pytest.approx(2 * 2 * 2 * 64 * 64 * 32 / 1e9)
    x, w = torch.rand(2, 8, 16), torch.rand(4, 16)
    flat = measure.count(lambda: torch.mm(x.view(16, 16), w.T))
    shaped = measure.count(lambda: torch.matmul(x, w.T))                # a product and a reshape
    assert shaped["gb"] == flat["gb"] > 0


# ---------------------------------------------------------------- data
def test_the_ct_that_is_prepared_is_a_readable_one(tmp_path):
    path = workloads.write_ct(tmp_path / "ct.nii.gz", (40, 48, 20))
    case = data.load_case({"image": path, "label": None})
    assert case["original_shape"] == (40, 48, 20) and case["image"].float().std() > 10
    assert spacing_of(case["original_affine"]) == pytest.approx((.8, .8, 1))
    assert np.allclose(np.diag(case["original_affine"])[:2], -.8)


def test_the_loader_s_first_turn_finds_its_volume_prepared(tmp_path):
    at = setting(tmp_path)
    workloads.write_ct(at.ct_path(), at.ct)
    workloads.loader(at)
    assert list((tmp_path / "cache").iterdir())


def test_data_contestants_do_their_work(tmp_path):
    at = setting(tmp_path, volumes=3)
    workloads.write_ct(at.ct_path(), at.ct)
    for work in (workloads.prepare, workloads.headers, workloads.loader):
        work(at)()
