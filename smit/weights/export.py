"""Write an encoder, or a fine-tuned network, for others [ours]."""
import json

from smit.swin import relative_position_index
from smit.weights import names, orders, safetensors_file
from smit.weights.habits import HABITS

# of a run's settings, what others need: no path, and no name of a case
PUBLISHED = ("spacing", "modality", "hu_window", "hu_offset", "crop", "view", "num_classes",
             "labels", "drop_path", "checkpointing")


def to_smit(encoder):
    """Make a checkpoint {"model", "config"}: of an encoder, or the fine-tuned network around it."""
    config = {name: encoder.config[name] for name in PUBLISHED if name in encoder.config}
    config |= {**encoder.settings(), "format": orders.FORMAT}

    model = {f"encoder.{name}": tensor for name, tensor in encoder.weights.items()}
    if "last_up.up.weight" in encoder.left_out:                            # a decoder
        model |= encoder.left_out
        config |= {"train": [], "held_back": []}
    return {"model": model, "config": config}


def to_safetensors(encoder):
    """Make the bytes of a safetensors file that says what to_smit's checkpoint says."""
    state = to_smit(encoder)
    metadata = {
        "format": "pt",
        "software": "SMIT, unofficial",
        "orientation": "RAS",
        "merge_order": orders.order_of(encoder.habits),
        "config": json.dumps(state["config"]),
    }
    return safetensors_file.encode(state["model"], metadata)


def to_monai(encoder):
    """Make a checkpoint whose "state_dict" MONAI's SwinUNETR(...).swinViT takes whole.

    The norms of the stages' outputs and the mask token, which MONAI has not, stand apart under
    "smit": read here again, the encoder is the same to the bit. ValueError for an encoder that
    MONAI cannot compute.
    """
    for habit in ("duplicated_merge", "scattered_reverse"):
        if habit in encoder.habits:
            raise ValueError(f"MONAI from 1.5 on cannot compute what these weights need: "
                             f"{HABITS[habit]}")
    stages, width = len(encoder.arguments["depths"]), encoder.arguments["embed_dim"]
    patch = encoder.arguments["patch"]
    if stages != 4 or width % 12 or patch != 2:
        raise ValueError(f"MONAI's SwinUNETR has 4 stages, a width that 12 divides, and patches of "
                         f"2 voxels; this encoder has {stages}, {width} and {patch}")

    tensors, apart = {}, {}
    index = relative_position_index(tuple(encoder.arguments["window"]))    # a buffer of each block
    for name, tensor in encoder.weights.items():
        monai = names.monai_name(name)
        if monai is None:
            apart[name] = tensor
            continue
        tensors[monai] = tensor
        if monai.endswith("relative_position_bias_table"):
            tensors[monai.replace("bias_table", "index")] = index.clone()
    return {"state_dict": tensors, "smit": {"weights": apart, "config": to_smit(encoder)["config"]}}


def monai_call(encoder):
    """Write the call that builds the network for to_monai's weights, in MONAI 1.5.0 or newer."""
    arguments = encoder.arguments
    return (f"SwinUNETR(in_channels={arguments['in_channels']}, out_channels=14, "
            f"feature_size={arguments['embed_dim']}, depths={tuple(arguments['depths'])}, "
            f"num_heads={tuple(arguments['heads'])}, window_size={tuple(arguments['window'])}, "
            f"patch_size={arguments['patch']}, mlp_ratio={arguments['mlp_ratio']:.1f}, "
            f"qkv_bias={arguments['qkv_bias']}, "
            f"patch_norm={'no_patch_norm' not in encoder.habits}, downsample='mergingv2')")
