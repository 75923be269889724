"""Say what a file of weights is, and convert it.

    python -m smit.weights model_swinvit.pt                          # what would be used?
    python -m smit.weights model_swinvit.pt --to smit                # for --init
    python -m smit.weights runs/ssl/student.pt --to monai            # for SwinUNETR, MONAI 1.5.0 on
    python -m smit.weights runs/finetune/best.pt --to safetensors    # to publish

Reads torch files and safetensors with an encoder of this project, MONAI's SwinViT, alone or within
a SwinUNETR, or an encoder of the authors' releases. A file is used whole or not at all: a tensor
that is missing, unknown, of a wrong shape or not finite is an error. What is written holds no path
and no name of a case.
"""
import argparse
from pathlib import Path

from smit import runtime
from smit.weights import export, orders, reading

SUFFIXES = {"smit": ".smit.pt", "monai": ".monai.pt", "safetensors": ".safetensors"}
PADDING = ("MONAI lets padded cells take part in the softmax: outputs agree where every stage's "
           "grid is a multiple of the window (of 4: at 64^3 and 128^3, not in stage 4 at 96^3)")


def parse_arguments(argv=None):
    parser = argparse.ArgumentParser(
        "python -m smit.weights", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("file", help="a torch file or safetensors")
    add("--to", choices=SUFFIXES, help="write its encoder, or its whole fine-tuned network")
    add("--out", metavar="PATH", help="where; by default beside FILE")
    add("--part", choices=["student", "teacher"], help="which network of a last.pt")
    add("--merge", choices=orders.ORDERS, help="order of a merge's neighbours, if no file tells it")
    add("--drop", nargs="+", default=[], metavar="NAME", help="leave out tensors that begin so")
    return parser.parse_args(argv)


def main(args):
    encoder = reading.read_encoder(args.file, args.part, args.merge, args.drop)
    print(encoder.report)
    if not args.to:
        return

    out = Path(args.out or Path(args.file).with_suffix(SUFFIXES[args.to]))
    if out.resolve() == Path(args.file).resolve():
        raise ValueError(f"{out} is the file that is read: give another with --out")
    if args.to == "smit":
        runtime.save_checkpoint(out, export.to_smit(encoder))
    elif args.to == "safetensors":
        runtime.atomic_write(out, export.to_safetensors(encoder))
    else:
        runtime.save_checkpoint(out, export.to_monai(encoder))
        print(f"net = monai.networks.nets.{export.monai_call(encoder)}\n"
              f"net.swinViT.load_state_dict("
              f"torch.load({str(out)!r}, weights_only=True)['state_dict'])")
        if "attended_padding" not in encoder.habits:
            print(PADDING)
    print(f"written: {out}")


if __name__ == "__main__":
    runtime.run(main, parse_arguments())
