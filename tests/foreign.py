"""Make other people's encoders: their names and shapes, values of order 1 that never change."""
import zlib

import numpy as np
import torch


def monai_encoder(width=12, mlp=("mlp.linear1", "mlp.linear2")):
    """Return the state dict of MONAI's SwinViT with its defaults, but for the width.

    Index buffers are left out. mlp: the names of a block's two linear layers.
    """
    shapes = trunk(width, depths=(2, 2, 2, 2), heads=(3, 6, 12, 24), window=7, mlp=mlp,
                   stage="layers{}.0.", first=1)
    return draw_all(shapes)


def release_encoder(width=8, depths=(1, 2), heads=(2, 2)):
    """Return the state dict of the authors' encoder.

    It has norms of the patches and of each stage's output, and no bias of queries, keys, values.
    """
    shapes = trunk(width, depths, heads, window=4, mlp=("mlp.fc1", "mlp.fc2"),
                   stage="layers.{}.", first=0)
    shapes = {name: shape for name, shape in shapes.items() if "qkv.bias" not in name}
    for stage in range(len(depths)):
        shapes.update(weight_and_bias(f"norm{stage}", width * 2 ** stage))
    shapes.update(weight_and_bias("patch_embed.norm", width))
    return draw_all(shapes)


# ---------------------------------------------------------------- shapes
def trunk(width, depths, heads, window, mlp, stage, first):
    """Return the shapes of the tensors that MONAI's and the authors' encoders share, by name.

    stage: how the name of a stage begins; stages count from `first`.
    """
    shapes = weight_and_bias("patch_embed.proj", width, 1, 2, 2, 2)
    for number, (depth, head_count) in enumerate(zip(depths, heads)):
        begin = stage.format(number + first)
        channels = width * 2 ** number
        for block in range(depth):
            block_shapes = shapes_of_block(channels, head_count, window, mlp)
            for name, shape in block_shapes.items():
                shapes[f"{begin}blocks.{block}.{name}"] = shape

        # merging joins the channels of 8 neighbours
        shapes.update(weight_and_bias(f"{begin}downsample.norm", 8 * channels))
        shapes[f"{begin}downsample.reduction.weight"] = (2 * channels, 8 * channels)
    return shapes


def shapes_of_block(channels, head_count, window, mlp):
    """Return the shapes of a block's tensors, by name."""
    offsets = (2 * window - 1) ** 3      # between two voxels of a window
    return {
        **weight_and_bias("norm1", channels),
        **weight_and_bias("attn.qkv", 3 * channels, channels),
        **weight_and_bias("attn.proj", channels, channels),
        **weight_and_bias("norm2", channels),
        **weight_and_bias(mlp[0], 4 * channels, channels),
        **weight_and_bias(mlp[1], channels, 4 * channels),
        "attn.relative_position_bias_table": (offsets, head_count),
    }


def weight_and_bias(layer, *shape):
    """Return the shapes of a layer's weight and of its bias, which has one value a channel."""
    return {f"{layer}.weight": shape, f"{layer}.bias": shape[:1]}


# ---------------------------------------------------------------- values
def draw_all(shapes):
    return {name: draw(name, shape) for name, shape in shapes.items()}


def draw(name, shape):
    """Draw a tensor by its name: matrices keep the size of their input, gains lie around 1."""
    random = np.random.RandomState(zlib.crc32(name.encode()))
    tensor = torch.from_numpy(random.randn(*shape)).float()

    is_matrix = len(shape) > 1 and "table" not in name
    is_gain = "norm" in name and name.endswith("weight")
    if is_matrix:
        inputs = tensor[0].numel()
        return tensor / inputs ** .5
    if is_gain:
        return 1 + .3 * tensor
    return tensor
