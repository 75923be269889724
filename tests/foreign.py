"""Other people's encoders, made here: their names and shapes, values of order 1 that never change."""
import zlib

import numpy as np
import torch


def value(name, *shape):
    """Draw a tensor by its name: matrices keep the size of what they multiply, gains lie around 1."""
    drawn = torch.from_numpy(np.random.RandomState(zlib.crc32(name.encode())).randn(*shape)).float()
    if len(shape) > 1 and "table" not in name:
        return drawn / drawn[0].numel() ** .5
    return 1 + .3 * drawn if "norm" in name and name.endswith("weight") else drawn


def trunk(width, depths, heads, window, mlp, stage, first):
    """Shapes of the tensors that MONAI's and the authors' encoders share; stages count from `first`."""
    shapes = {"patch_embed.proj.weight": (width, 1, 2, 2, 2), "patch_embed.proj.bias": (width,)}
    for number, (depth, h) in enumerate(zip(depths, heads)):
        begin, C = stage.format(number + first), width * 2 ** number
        for block in range(depth):
            here = f"{begin}blocks.{block}."
            for name, shape in (("norm1", (C,)), ("attn.qkv", (3 * C, C)), ("attn.proj", (C, C)),
                                ("norm2", (C,)), (mlp[0], (4 * C, C)), (mlp[1], (C, 4 * C))):
                shapes |= {f"{here}{name}.weight": shape, f"{here}{name}.bias": shape[:1]}
            shapes[f"{here}attn.relative_position_bias_table"] = ((2 * window - 1) ** 3, h)
        shapes |= {f"{begin}downsample.norm.{end}": (8 * C,) for end in ("weight", "bias")}
        shapes[f"{begin}downsample.reduction.weight"] = (2 * C, 8 * C)
    return shapes


def monai_encoder(width=12, mlp=("mlp.linear1", "mlp.linear2")):
    """The state dict of MONAI's SwinViT with its defaults, but for the width; without index buffers."""
    shapes = trunk(width, (2, 2, 2, 2), (3, 6, 12, 24), 7, mlp, "layers{}.0.", 1)
    return {name: value(name, *shape) for name, shape in shapes.items()}


def release_encoder(width=8, depths=(1, 2), heads=(2, 2)):
    """The state dict of the authors' encoder: with norms of patches and outputs, without qkv bias."""
    shapes = trunk(width, depths, heads, 4, ("mlp.fc1", "mlp.fc2"), "layers.{}.", 0)
    shapes = {name: shape for name, shape in shapes.items() if "qkv.bias" not in name}
    for stage in range(len(depths)):
        shapes |= {f"norm{stage}.{end}": (width * 2 ** stage,) for end in ("weight", "bias")}
    shapes |= {f"patch_embed.norm.{end}": (width,) for end in ("weight", "bias")}
    return {name: value(name, *shape) for name, shape in shapes.items()}
