"""Write synthetic patients as NIfTI, with a dataset.json. [ours]

    python -m smit.phantom OUT --n 8 --modality ct --seed 0 --spacing 1.5 1.5 2
"""
import argparse

from smit.phantom.anatomy import MODALITIES, write_dataset


def main():
    parser = argparse.ArgumentParser(
        prog="python -m smit.phantom", description="Write synthetic patients as NIfTI.")
    add = parser.add_argument
    add("out", metavar="OUT", help="folder for imagesTr, labelsTr and dataset.json")
    add("--n", type=int, default=8, help="number of patients, the last fifth for validation (8)")
    add("--modality", choices=MODALITIES, default="ct", help="CT in HU, or T2-like MR (ct)")
    add("--seed", type=int, default=0, help="another seed, other patients (0)")
    add("--spacing", type=float, nargs=3, default=(1.5, 1.5, 2.0), help="voxel in mm (1.5 1.5 2)")
    args = parser.parse_args()
    try:
        print(write_dataset(args.out, args.n, args.modality, args.seed, args.spacing))
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
