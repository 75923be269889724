import pytest
import torch
from torch.utils.checkpoint import checkpoint

from smit import swin


def tiny(**settings):
    torch.manual_seed(0)
    return swin.SwinTransformer3D(
        **{**dict(embed_dim=8, depths=(2, 2), heads=(2, 4), window=(2, 4, 3)), **settings})


def test_encoder_has_the_papers_parameters():
    encoder = swin.SwinTransformer3D()
    count = lambda *modules: sum(p.numel() for m in modules for p in m.parameters())
    assert count(encoder) == 8_763_832
    assert count(encoder.patch_embed, encoder.patch_norm) == 528
    assert [count(stage) for stage in encoder.stages] == [96_632, 374_840, 2_375_536, 5_914_808]
    assert count(encoder.norms) == 1_440 and encoder.mask_token.numel() == 48


def test_outputs_have_the_papers_shapes():
    encoder = swin.SwinTransformer3D(embed_dim=8, depths=(1, 1, 1, 1), heads=(1, 1, 1, 1))
    shapes = [tuple(y.shape) for y in encoder(torch.rand(1, 1, 96, 32, 64))]
    assert shapes == [(1, 8, 48, 16, 32), (1, 16, 24, 8, 16), (1, 32, 12, 4, 8),
                      (1, 64, 6, 2, 4), (1, 128, 3, 1, 2)]


@pytest.mark.parametrize("size", [(1, 1, 1), (31, 34, 50), (7, 9, 4)])
def test_any_grid_is_encoded(size):
    outputs = tiny()(torch.rand(2, 1, *size))
    halved = [tuple(-(-n // 2 ** k) for n in size) for k in (1, 2, 3)]
    assert [tuple(y.shape[2:]) for y in outputs] == halved
    assert all(y.isfinite().all() for y in outputs)


def test_windows_are_cut_in_row_major_order_and_put_back():
    grid, window = (4, 6, 10), (2, 3, 5)
    x = torch.arange(240.).view(1, *grid, 1)
    windows = swin.partition_windows(x, window)

    assert windows.shape == (8, 30, 1)
    # next window along W, then its next row
    assert windows[1, :6, 0].tolist() == [5, 6, 7, 8, 9, 15]
    assert windows[2, 0, 0] == 30 and windows[4, 0, 0] == 120  # next along H, then along D
    x = torch.rand(2, *grid, 7)
    assert torch.equal(swin.reverse_windows(swin.partition_windows(x, window), window, grid), x)


@pytest.mark.parametrize("shift", [(0, 0, 0), (1, 2, 0), (1, 2, 3)])
def test_shifted_windows_equal_a_roll_and_a_partition_and_go_back(shift):
    grid, window = (4, 8, 12), (2, 4, 6)
    x = torch.randn(2, *grid, 3, requires_grad=True)
    weights = torch.randn(2, *grid, 3)
    back = [-side for side in shift]

    windows = swin.shift_and_partition(x, window, shift)
    plain = swin.partition_windows(x.roll(back, dims=(1, 2, 3)), window)
    assert torch.equal(windows, plain)
    assert torch.equal(swin.reverse_and_unshift(windows, window, grid, shift), x)

    (gradient,) = torch.autograd.grad(windows, x, swin.partition_windows(weights, window))
    assert torch.equal(gradient, weights.roll(shift, dims=(1, 2, 3)))


def test_bias_index_is_one_value_per_offset():
    window = (2, 3, 4)
    index = swin.relative_position_index(window)
    cells = torch.cartesian_prod(*map(torch.arange, window))
    offsets = {}
    for i in range(24):
        for j in range(24):
            offsets.setdefault(tuple((cells[i] - cells[j]).tolist()), set()).add(index[i, j].item())
    values = [v for found in offsets.values() for v in found]
    assert len(offsets) == 3 * 5 * 7 and sorted(values) == list(range(105))


def test_a_clamped_window_finds_the_full_windows_offsets():
    full, small = (swin.relative_position_index((4, 4, 4)),
                   swin.relative_position_index((2, 4, 3), (4, 4, 4)))
    cells = torch.cartesian_prod(*map(torch.arange, (2, 4, 3)))
    rows = (cells * torch.tensor([16, 4, 1])).sum(1)  # the same cells in the 4^3 window
    assert torch.equal(small, full[rows][:, rows])


def test_shift_mask_by_hand():
    # padded to 8; rolled by 2: 2345 | 6'7'01
    mask = swin.shift_mask((1, 1, 6), (1, 1, 4), (0, 0, 2))
    assert torch.equal(mask[0], torch.zeros(4, 4))
    allowed = torch.tensor([[0, 0, 0, 0]] * 2 + [[0, 0, 1, 1]] * 2).bool()
    assert torch.equal(mask[1] == 0, allowed)  # padding may ask, but is asked by nobody


def brute_force_attention(attention, x, window, shift):
    """Every token against every other, by the definition: same window of the shifted lattice;
    bias by true offset."""
    grid, heads = x.shape[1:4], attention.heads
    p = torch.cartesian_prod(*map(torch.arange, grid))  # (N, 3)
    lattice = torch.div(p - torch.tensor(shift), torch.tensor(window), rounding_mode="floor")
    allowed = (lattice[:, None] == lattice[None]).all(-1)
    table = attention.bias_table.view(*(2 * w - 1 for w in attention.window), heads)
    offset = (p[:, None] - p[None]).clamp(-torch.tensor(window) + 1, torch.tensor(window) - 1)
    a, b, c = (offset + torch.tensor(attention.window) - 1).unbind(-1)
    q, k, v = attention.qkv(x.flatten(1, 3)).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** .5 + table[a, b, c].permute(2, 0, 1)
    out = scores.masked_fill(~allowed, -torch.inf).softmax(-1) @ v
    return attention.proj(out.transpose(1, 2).flatten(2)).view(x.shape)


@pytest.mark.parametrize("grid", [(4, 8, 6), (5, 7, 4), (3, 9, 11), (1, 5, 2), (2, 2, 2)])
@pytest.mark.parametrize("shifted", [False, True])
def test_window_attention_equals_brute_force(grid, shifted):
    torch.manual_seed(1)
    block = swin.SwinBlock(12, 3, (2, 4, 3), shifted, 4, True, 0., True)
    torch.nn.init.normal_(block.attention.bias_table)
    x = torch.randn(2, *grid, 12)
    window = tuple(min(w, g) for w, g in zip((2, 4, 3), grid))
    shift = tuple(w // 2 if shifted and w < g else 0 for w, g in zip(window, grid))
    expected = brute_force_attention(block.attention, x, window, shift)

    torch.testing.assert_close(block.attend(x), expected, rtol=1e-5, atol=1e-6)


def test_padded_keys_count_only_when_asked_for():
    torch.manual_seed(0)
    masked, usual = (swin.SwinBlock(8, 2, (4, 4, 4), False, 4, False, 0., mask)
                     for mask in (True, False))
    usual.load_state_dict(masked.state_dict())
    even, odd = torch.randn(1, 4, 8, 4, 8), torch.randn(1, 4, 6, 4, 8)

    assert torch.equal(masked.attend(even), usual.attend(even))
    assert not torch.allclose(masked.attend(odd), usual.attend(odd), atol=1e-4)


def test_one_token_reaches_its_window_and_no_other():
    block = swin.SwinBlock(8, 2, (2, 4, 3), False, 4, False, 0., True)
    x = torch.randn(1, 4, 8, 6, 8)
    y = x.clone()
    y[0, 2, 5, 1, 3] += 1  # one channel; LayerNorm undoes a shift of all
    changed = (block(x) != block(y)).any(-1)[0]
    window = torch.zeros(4, 8, 6, dtype=torch.bool)
    window[2:4, 4:8, 0:3] = True
    assert torch.equal(changed, window)


def test_shifted_windows_do_not_join_opposite_ends():
    block = swin.SwinBlock(8, 2, (4, 4, 4), True, 4, False, 0., True)
    x = torch.randn(1, 8, 8, 12, 8)
    y = x.clone()
    y[0, 0, 0, 0, 3] += 1
    changed = (block(x) != block(y)).any(-1)[0]
    assert changed[:2, :2, :2].all() and changed.sum() == 8


def test_merging_joins_eight_neighbours_in_row_major_order():
    merge = swin.PatchMerging(1)
    merge.norm.weight.data, merge.norm.bias.data = torch.arange(1., 9), torch.arange(8.)
    merge.reduction.weight.data = torch.eye(8)
    x = torch.arange(2 * 4 * 2.).view(1, 2, 4, 2, 1)
    joined = torch.tensor([4., 5, 6, 7, 12, 13, 14, 15])  # 000 001 010 011 100 101 110 111
    assert torch.equal(merge(x)[0, 0, 1, 0], merge.norm(joined))


def test_hidden_tokens_are_replaced_after_the_embedding_and_its_norm():
    encoder = tiny()
    x, hidden = torch.rand(1, 1, 8, 12, 10), torch.zeros(1, 4, 6, 5, dtype=torch.bool)
    hidden[0, 1, 2:4, 3] = True
    tokens = encoder.embed(x, hidden)

    assert torch.equal(tokens[hidden], encoder.mask_token.expand(2, -1))
    assert torch.equal(tokens[~hidden], encoder.embed(x)[~hidden])

    y = x.clone()
    y[0, 0, 2:4, 4:8, 6:8] = 0  # the voxels under the hidden tokens
    assert all(torch.equal(a, b) for a, b in zip(encoder(x, hidden), encoder(y, hidden)))


def test_a_mask_of_another_resolution_is_refused():
    with pytest.raises(ValueError, match="token resolution"):
        tiny()(torch.rand(1, 1, 8, 8, 8), torch.ones(1, 8, 8, 8, dtype=torch.bool))
    with pytest.raises(ValueError, match="no mask token"):
        tiny(mask_token=False)(torch.rand(1, 1, 8, 8, 8), torch.ones(1, 4, 4, 4, dtype=torch.bool))


# all at once; 7 windows of 45, so that 3 are left over
@pytest.mark.parametrize("piece", [2 ** 18, 7 * 24 * 8])
def test_checkpointing_recomputes_in_pieces_and_changes_no_gradient(piece, monkeypatch):
    calls = []
    monkeypatch.setattr(swin, "checkpoint",
                        lambda *a, **k: calls.append(len(a[1])) or checkpoint(*a, **k))
    monkeypatch.setattr(swin, "PIECE", piece)
    x, found = torch.rand(2, 1, 20, 24, 16), []
    for checkpointing in (False, True):
        encoder, before = tiny(checkpointing=checkpointing, drop_path=.5), len(calls)
        noise = torch.rand(2, encoder.drops, generator=torch.Generator().manual_seed(3))
        outputs = encoder(x, noise=noise)
        sum(y.square().sum() for y in outputs).backward()
        found.append([*outputs, *(p.grad for p in encoder.parameters() if p.grad is not None)])
        assert calls[before:].count(7) == (24 if checkpointing and piece < 2 ** 18 else 0)
        with torch.no_grad():
            torch.testing.assert_close(encoder(x, noise=noise)[-1], outputs[-1])

    for kept, made_again in zip(*found, strict=True):
        torch.testing.assert_close(made_again, kept, rtol=1e-5, atol=1e-5 * kept.abs().max().item())


def test_checkpointing_keeps_little_for_backward():
    held = []
    for checkpointing in (False, True):
        block, seen = tiny(embed_dim=32, checkpointing=checkpointing).stages[0].blocks[1], {}
        note = lambda t: seen.setdefault(t.untyped_storage().data_ptr(),
                                         t.untyped_storage().nbytes()) and t
        x = torch.rand(1, 16, 16, 16, 32, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            y = block(x)
        held.append(sum(seen.values()) / y.nbytes)
    assert held[0] > 14 and held[1] < 5, held  # in sizes of the block's input


def test_making_gelu_again_in_backward_changes_nothing():
    block, x, results = tiny().stages[0].blocks[0], torch.randn(1, 4, 6, 5, 8), []
    plain = torch.nn.Sequential(*block.mlp)
    for mlp in (lambda x: plain(block.norm2(x)), block.mix):
        block.zero_grad()
        y = mlp(x)
        y.square().sum().backward()
        results.append([y, *(p.grad.clone() for p in block.mlp.parameters())])

    assert all(torch.equal(a, b) for a, b in zip(*results))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("multiple", [1, 8])           # as on a CPU; heads zero-padded, as on a GPU
@pytest.mark.parametrize("most", [65_535, 7, 1])       # all at once; by 2 windows; one by one
def test_fused_attention_equals_the_plain_form(masked, multiple, most):
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 4, 3, 24, 5)  # 2 volumes of 4 windows, 3 heads of 5 channels
    bias, mask = torch.randn(3, 24, 24), None
    scores = q @ k.transpose(-1, -2) / 5 ** .5 + bias
    if masked:
        mask = swin.shift_mask((4, 8, 3), (2, 4, 3), (1, 2, 1))
        scores = scores + mask[:, None]
    expected = scores.softmax(-1) @ v
    if not masked:                                         # then all windows are volumes
        q, k, v, expected = (x.flatten(0, 1)[:, None] for x in (q, k, v, expected))
    found = swin.fused_attention(q, k, v, bias, mask, multiple, max(most, 3))

    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_without_gradient_the_answer_is_the_same_and_repeatable():
    encoder, x = tiny(window=(4, 4, 4)), torch.rand(2, 1, 18, 16, 14)
    with torch.no_grad():
        once, again = encoder(x), encoder(x)
    for a, b, c in zip(once, again, encoder(x)):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, c.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_softmax_in_half_precision_rounds_once_at_its_end(dtype):
    scores = (torch.randn(3, 4, 64, 64) * 3).to(dtype)
    scores[0, :, :, 32:] += swin.FORBIDDEN
    assert torch.equal(scores.softmax(-1, dtype=dtype), scores.float().softmax(-1).to(dtype))


def test_compiled_blocks_answer_alike_and_keep_their_names():
    torch.compiler.reset()                             # earlier tests may have used up its patience
    plain, compiled = (tiny(depths=(2,), heads=(2,)) for _ in range(2))
    compiled.compile_blocks(fullgraph=True, backend="aot_eager")
    assert list(plain.state_dict()) == list(compiled.state_dict())

    x = torch.rand(1, 1, 8, 16, 12)                    # one block with a shift mask, one without
    for with_gradient in (True, False):                # attention without gradient is another code
        with torch.set_grad_enabled(with_gradient):
            for a, b in zip(plain(x), compiled(x)):
                torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@torch._dynamo.config.patch(recompile_limit=1)         # few, as torch's 8 are few for four stages
def test_no_block_of_student_and_teacher_stays_uncompiled():
    torch.compiler.reset()
    runs = []

    def backend(graph, inputs):
        def run(*tensors):
            runs.append(graph)
            return graph(*tensors)
        return run

    student, teacher = (tiny(depths=(1, 1), heads=(2, 2)) for _ in range(2))
    teacher.requires_grad_(False)
    for encoder in (student, teacher):
        encoder.compile_blocks(backend=backend)
    view = torch.rand(1, 1, 8, 16, 16)
    for _ in range(2):
        runs.clear()
        with torch.no_grad():
            teacher(view)
        student(view)
    assert len(runs) == 2 * 2 * 2                      # attention and MLP of two blocks, twice


@pytest.mark.parametrize("checkpointing", [False, True])
def test_attention_and_mlp_are_compiled_with_checkpointing_too(checkpointing):
    torch.compiler.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph.code)
        return graph

    encoder = tiny(depths=(1,), heads=(2,), checkpointing=checkpointing)
    encoder.compile_blocks(backend=backend)
    encoder(torch.rand(1, 1, 8, 16, 12))[0].sum().backward()
    assert any("softmax" in code for code in graphs) and any("gelu" in code for code in graphs)


def test_training_goes_on_after_an_answer_in_inference_mode():
    swin.shift_mask.cache_clear(), swin.window_order.cache_clear()
    swin.relative_position_index.cache_clear()
    encoder, x = tiny(), torch.rand(1, 1, 8, 16, 12)
    with torch.inference_mode():
        encoder(x)
    encoder(x)[-1].sum().backward()
    assert encoder.patch_embed.weight.grad.abs().max() > 0


def test_the_masks_of_scans_that_passed_are_let_go():
    for side in range(4, 44, 2):
        swin.shift_mask((side, side, side), (4, 4, 4), (2, 2, 2))
        swin.window_order((side + side % 4, 4, 4), (4, 4, 4), (2, 0, 0))
    assert swin.shift_mask.cache_info().currsize <= 8 >= swin.window_order.cache_info().currsize


def test_layers_hold_each_parameter_once_from_the_bottom_up():
    encoder = tiny(depths=(1, 2))
    depths = {"patch_embed": 0, "patch_norm": 0, "mask_token": 0,
              "stages.0.blocks.0": 1, "norms.0": 1, "stages.0.merge": 1,
              "stages.1.blocks.0": 2,
              "stages.1.blocks.1": 3, "norms.1": 3, "stages.1.merge": 3}
    names = {parameter: name for name, parameter in encoder.named_parameters()}

    for depth, layer in enumerate(encoder.layers()):
        for parameter in layer.parameters():
            name = names.pop(parameter)
            (place,) = [place for place in depths if name.startswith(place)]
            assert depths[place] == depth, name
    assert not names
    assert len(tiny(mask_token=False).layers()) == 5


def test_drop_path_follows_the_samples_noise_not_its_batch():
    encoder = tiny(drop_path=.9).train()
    x, noise = torch.rand(4, 1, 8, 12, 10), torch.rand(4, encoder.drops)
    together = encoder(x, noise=noise)[-1]
    alone = torch.cat([encoder(x[i:i + 1], noise=noise[i:i + 1])[-1] for i in range(4)])
    torch.testing.assert_close(together, alone)
    assert not torch.allclose(together, encoder.eval()(x)[-1], atol=1e-3)


def test_drop_path_keeps_the_mean():
    branch, noise = torch.ones(1000, 1, 1, 1, 1), torch.arange(1000) / 1000
    dropped = swin.drop_path(branch, .3, noise)
    assert (dropped == 0).sum() == 300 and dropped.mean().item() == pytest.approx(1)


def test_unwanted_outputs_are_left_out():
    encoder, x = tiny(), torch.rand(1, 1, 8, 12, 10)
    everything, top = encoder(x), encoder(x, wanted=(1,))
    assert top[0] is None and top[2] is None and torch.equal(top[1], everything[1])

    deep = tiny(depths=(1, 1, 1, 1), heads=(1, 1, 1, 1))
    assert [y is None for y in deep(x, wanted=(2,))] == [True, True, False, True, True]
    assert [y is None for y in deep(x, wanted=(0, 4))] == [False, True, True, True, False]
    assert torch.equal(encoder(x, wanted=(0,))[0], everything[0])


@pytest.mark.parametrize("wanted", [[], [-1], [0, 3]])
def test_an_output_that_there_is_not_is_refused(wanted):
    with pytest.raises(ValueError, match=r"choose from the outputs \[0, 1, 2\]"):
        tiny()(torch.rand(1, 1, 8, 8, 8), wanted=wanted)


def test_a_zero_patch_has_a_gentle_gradient():
    encoder = tiny()
    # air; zero vectors gain 316 at every norm
    encoder(torch.zeros(1, 1, 8, 12, 10))[-1].sum().backward()
    assert max(p.grad.norm() for p in encoder.parameters() if p.grad is not None) < 1e3


def test_heads_that_do_not_divide_the_width_are_refused():
    with pytest.raises(ValueError, match="5 heads"):
        tiny(heads=(5, 5))
    with pytest.raises(ValueError, match="2 depths"):
        tiny(heads=(2, 2, 2))


def test_odd_blocks_are_shifted_and_drop_more_the_deeper_they_are():
    blocks = [block for stage in swin.SwinTransformer3D(drop_path=.3).stages
              for block in stage.blocks]
    assert [block.shifted for block in blocks] == [False, True] * 5
    assert [block.drop_rate for block in blocks] == pytest.approx([.3 * i / 9 for i in range(10)])


def test_each_branch_has_its_own_draw_and_eval_drops_nothing():
    encoder, x = tiny(drop_path=.9).train(), torch.rand(1, 1, 8, 12, 10)
    noise = torch.ones(1, encoder.drops)
    keep = encoder(x, noise=noise)[-1]
    for draw in range(2, encoder.drops):                               # the first block's rate is 0
        less = noise.clone()
        less[0, draw] = 0
        assert not torch.equal(encoder(x, noise=less)[-1], keep)
    assert torch.equal(encoder.eval()(x, noise=noise * 0)[-1], encoder(x)[-1])


def test_merging_takes_the_tokens_before_the_output_norm():
    encoder, x = tiny(), torch.rand(1, 1, 8, 12, 10)
    before = encoder(x)[1]
    encoder.norms[0].weight.data.fill_(3)
    assert torch.equal(encoder(x)[1], before)


def test_weights_start_as_swins():
    encoder = swin.SwinTransformer3D()
    qkv, proj = (encoder.stages[3].blocks[0].attention.qkv,
                 encoder.stages[3].blocks[0].attention.proj)
    assert qkv.weight.std().item() == pytest.approx(.02, rel=.02) and not proj.bias.any()
    assert isinstance(encoder.stages[0].blocks[0].mlp[1], torch.nn.GELU)
