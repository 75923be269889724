"""The command: python -m smit.phantom OUT --n 8 --modality ct --seed 0 --spacing 1.5 1.5 2 [ours]"""
import argparse

from smit.phantom.anatomy import MODALITIES, write_dataset

if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m smit.phantom", description="Write synthetic patients as NIfTI.")
    parser.add_argument("out", metavar="OUT", help="folder for imagesTr, labelsTr and dataset.json")
    parser.add_argument("--n", type=int, default=8, help="number of patients, the last fifth for validation (8)")
    parser.add_argument("--modality", choices=MODALITIES, default="ct", help="CT in HU, or T2-like MR (ct)")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other patients (0)")
    parser.add_argument("--spacing", type=float, nargs=3, default=(1.5, 1.5, 2.0), help="voxel in mm (1.5 1.5 2)")
    try:  # the flags stand in the order of write_dataset's arguments
        print(write_dataset(*vars(parser.parse_args()).values()))
    except ValueError as error:
        parser.error(str(error))
