"""Translate MONAI's and the authors' names of tensors to this project's [ours].

Needs the standard library alone. MONAI's SwinViT counts its stages from 1, layers1.0 to layers4.0;
the release counts from 0, layers.0 on.
In this project a tensor is called as SwinTransformer3D's state dict has it.
"""
import re

# prefixes that wrap an encoder's names
PREFIXES = ("module.", "_orig_mod.", "backbone.", "swinViT.", "swin_vit.", "transformer.",
            "encoder.")
ANY_PREFIX = rf"(?:{'|'.join(map(re.escape, PREFIXES))})*"

FAMILIES = {
    "smit": "an encoder of this project",
    "monai": "MONAI's SwinViT",
    "release": "an encoder of the authors' release",
}
FIRST_STAGE = {"smit": "stages.0.", "monai": "layers1.", "release": "layers.0."}

# pairs of a pattern and this project's name; None: known, and not used
EMBEDDING = [
    (r"patch_embed\.proj\.(weight|bias)", r"patch_embed.\1"),
    (r"patch_embed\.norm\.(weight|bias)", r"patch_norm.\1"),
]
STAGE = [  # what follows the stage's own name, whose group is its number
    (r"blocks\.(\d+)\.(norm1|norm2)\.(weight|bias)", r"blocks.\2.\3.\4"),
    (r"blocks\.(\d+)\.attn\.(qkv|proj)\.(weight|bias)", r"blocks.\2.attention.\3.\4"),
    (r"blocks\.(\d+)\.attn\.relative_position_bias_table", r"blocks.\2.attention.bias_table"),
    (r"blocks\.(\d+)\.attn\.relative_position_index", None),       # follows from the window
    # fc in the release, and in MONAI before May 2022
    (r"blocks\.(\d+)\.mlp\.(?:fc1|linear1)\.(weight|bias)", r"blocks.\2.mlp.0.\3"),
    (r"blocks\.(\d+)\.mlp\.(?:fc2|linear2)\.(weight|bias)", r"blocks.\2.mlp.2.\3"),
    (r"downsample\.norm\.(weight|bias)", r"merge.norm.\2"),
    (r"downsample\.reduction\.weight", r"merge.reduction.weight"),
]


def stage_table(stage):
    """Join a pattern of a stage's own name to each row of STAGE."""
    table = []
    for pattern, ours in STAGE:
        table.append((stage + pattern, ours and rf"stages.\1.{ours}"))
    return table


TABLES = {
    "smit": [
        (r"((?:patch_embed|patch_norm|norms\.\d+|stages\..*)\.(?:weight|bias))", r"\1"),
        (r"(stages\..*\.bias_table|mask_token)", r"\1"),
    ],
    "monai": EMBEDDING + stage_table(r"layers(\d)\.0\.(?:0\.)?") + [  # one more 0 in [DAE]
        (r"norm\.(weight|bias)", None),                            # of pre-training
        (r"mask_token", None),
    ],
    "release": EMBEDDING + stage_table(r"layers\.(\d)\.") + [
        (r"norm(\d)\.(weight|bias)", r"norms.\1.\2"),
        (r"mask_token", r"mask_token"),
    ],
}
# how the names of heads and decoders begin, which stand beside the encoder
BESIDE = {
    "smit": ("voxel_head.", "patch_head.", "image_head.", "projector.", "predictor.", "ups.",
             "last_up.", "out."),
    "monai": ("encoder", "decoder", "out.", "rotation_head.", "contrastive_head.", "conv."),
    "release": ("encoder", "decoder", "out.", "head", "norm."),
}
# the way back: MONAI has neither norms of the stages' outputs nor a mask token
TO_MONAI = [
    (r"patch_embed\.(.*)", r"patch_embed.proj.\1"),
    (r"patch_norm\.(.*)", r"patch_embed.norm.\1"),
    (r"stages\.(\d)\.merge\.(.*)", r"layers\1.0.downsample.\2"),
    (r"stages\.(\d)\.(blocks\.\d+)\.(norm\d\..*)", r"layers\1.0.\2.\3"),
    (r"stages\.(\d)\.(blocks\.\d+)\.attention\.bias_table",
     r"layers\1.0.\2.attn.relative_position_bias_table"),
    (r"stages\.(\d)\.(blocks\.\d+)\.attention\.(.*)", r"layers\1.0.\2.attn.\3"),
    (r"stages\.(\d)\.(blocks\.\d+)\.mlp\.0\.(.*)", r"layers\1.0.\2.mlp.linear1.\3"),
    (r"stages\.(\d)\.(blocks\.\d+)\.mlp\.2\.(.*)", r"layers\1.0.\2.mlp.linear2.\3"),
]


def find_encoder(names):
    """Find the encoder that these names are of: (its family, the prefix of its names).

    ValueError if there is none, or none that fits.
    """
    embedding = re.compile(rf"({ANY_PREFIX})patch_embed\.(?:proj\.)?(?:weight|bias)")
    prefixes = {match[1] for match in map(embedding.fullmatch, names) if match}
    if len(prefixes) != 1:
        raise ValueError(f"{len(prefixes)} patch embeddings of a Swin encoder where one is "
                         f"expected, among {', '.join(list(names)[:3])}, ...")

    (prefix,) = prefixes
    inside = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
    if any(re.match(r"layers\dc\.", name) for name in inside):
        raise ValueError("a convolution stands before each stage (MONAI's use_v2=True, as in "
                         "VoCo); the encoder here has none, so these weights have no place in it")
    for family, start in FIRST_STAGE.items():
        if any(name.startswith(start) for name in inside):
            return family, prefix
    raise ValueError(f"a patch embedding, but no stage of a known name among "
                     f"{', '.join(inside[:3])}")


def our_name(name, family, prefix):
    """Translate a name: this project's; None if known and not used; "" if not known."""
    if not name.startswith(prefix):
        return ""
    name = name.removeprefix(prefix)
    for pattern, ours in TABLES[family]:
        match = re.fullmatch(pattern, name)
        if match and ours is None:
            return None
        if match:
            first_stage = 1 if family == "monai" else 0
            return count_stages(match.expand(ours), -first_stage)
    return ""


def monai_name(name):
    """Translate a name of this project to MONAI's; None if MONAI has no such tensor."""
    for pattern, monai in TO_MONAI:
        match = re.fullmatch(pattern, name)
        if match:
            return count_stages(match.expand(monai), 1)
    return None


def count_stages(name, change):
    """Add to the number of the stage that a name begins with."""
    return re.sub(r"^(stages\.|layers)(\d)", lambda match: match[1] + str(int(match[2]) + change),
                  name)


def is_beside(name, family, prefix):
    """Whether a name is of a known head or decoder, outside of what the prefix holds."""
    if prefix and name.startswith(prefix):
        return False
    return re.sub(f"^{ANY_PREFIX}", "", name).startswith(BESIDE[family])
