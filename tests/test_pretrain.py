import pytest
import torch

from smit import ema, pretrain

ENCODER = dict(embed_dim=8, depths=(1, 1, 1), heads=(2, 2, 2), window=(2, 4, 3), drop_path=.3)


def small(**settings):
    torch.manual_seed(0)
    return pretrain.SMIT(ENCODER, head_width=16, bottleneck=8, prototypes=32, **settings)


def test_the_papers_student_has_the_papers_shapes():
    student = pretrain.SMIT({})
    with torch.no_grad():
        out = student(torch.rand(1, 1, 96, 96, 96))
    assert out.tokens.shape == (1, 216, 384) and out.voxels.shape == (1, 1, 96, 96, 96)
    assert out.patch_logits.shape == (1, 216, 8192) and out.image_logits.shape == (1, 8192)
    assert (student.token_side == 16
            and sum(p.numel() for p in student.parameters())
            == 8_763_832 + 25_198_592 + 2 * 7_614_720)


def test_image_token_is_the_mean_of_the_normed_patch_tokens():
    student = small().eval()
    out = student(torch.rand(2, 1, 16, 32, 48))
    torch.testing.assert_close(out.image_logits, student.image_head(out.tokens.mean(1)))
    assert out.tokens.mean(-1).abs().max() < 1e-4                       # LayerNormed, at its start


def test_patch_tokens_come_after_the_last_stages_blocks():
    student = small()
    student(torch.rand(1, 1, 16, 16, 16)).patch_logits.sum().backward()
    assert all(p.grad is not None for p in student.encoder.stages[-1].blocks.parameters())
    assert all(p.grad is None for p in student.encoder.stages[-1].merge.parameters())


def test_tokens_are_numbered_as_mask_cells_are():
    student = small().eval()
    x = torch.rand(1, 1, 16, 16, 24)                                    # tokens of 8^3: 2 x 2 x 3
    tokens = student(x).tokens
    assert tokens.shape == (1, 12, 32)

    features = student.encoder(x)[2]
    # row-major: 1 * 6 + 0 * 3 + 1
    torch.testing.assert_close(tokens[0, 7], features[0, :, 1, 0, 1])


def test_teacher_starts_as_the_student_and_drops_no_path():
    student = small()
    teacher = student.make_teacher()
    x = torch.rand(2, 1, 16, 16, 16)
    mine, theirs = student.eval()(x), teacher(x)

    assert (torch.equal(mine.patch_logits, theirs.patch_logits)
            and torch.equal(mine.image_logits, theirs.image_logits))
    assert (theirs.voxels is None and not teacher.training
            and not any(p.requires_grad for p in teacher.parameters()))

    student.train()
    assert not torch.equal(student(x).patch_logits, theirs.patch_logits)
    assert torch.equal(teacher(x).tokens, theirs.tokens)


def test_teacher_follows_a_shared_head():
    student = small(shared_head=True)
    teacher = student.make_teacher()
    assert student.image_head is student.patch_head and teacher.image_head is teacher.patch_head

    with torch.no_grad():
        student.patch_head.directions.add_(1)
    ema.update_teacher(teacher, student, 0.)
    assert torch.equal(teacher.patch_head.directions, student.patch_head.directions)


def test_heads_that_are_not_asked_for_are_not_there():
    student = small(patch_head=False, image_head=False)
    out = student(torch.rand(1, 1, 16, 16, 16))
    assert out.patch_logits is None and out.image_logits is None and out.voxels is not None


@pytest.mark.parametrize("kind", ["linear", "multilayer"])
def test_both_voxel_heads_return_to_the_image(kind):
    assert small(voxel_head=kind)(torch.rand(1, 1, 16, 32, 48)).voxels.shape == (1, 1, 16, 32, 48)


def test_heads_start_with_something_to_normalise():
    for width, bottleneck in ((2048, 256), (256, 64), (16, 8)):
        head = pretrain.ProjectionHead(96, width, bottleneck, 32)
        assert .1 < head.mlp(torch.nn.functional.layer_norm(torch.randn(50, 96), (96,))).std() < 2
