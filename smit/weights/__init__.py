"""Read and write other people's encoders, with a word about every tensor [ours].

`python -m smit.weights FILE` says what a file is, and converts it.

    safetensors_file.py   the format, without its package
    orders.py             the order of a merge's neighbours, here, elsewhere, and in older files
    names.py              this project's, MONAI's and the authors' names of the same tensors
    habits.py             what other people's encoders compute otherwise
    reading.py            from a file to an encoder
    export.py             and back
    start.py              a new pre-training run from them
"""
from smit.weights.orders import (  # noqa: F401
    FORMAT, RELEASE, ROW_MAJOR, reorder_neighbours, upgrade, upgrade_run)
from smit.weights import habits, safetensors_file  # noqa: F401
from smit.weights.habits import HABITS, adopt  # noqa: F401
from smit.weights.reading import (  # noqa: F401
    SIZES, Encoder, adapt_channels, compare, count, fill, listed, read_encoder, read_file,
    read_run)
from smit.weights.start import Start, begin, read_start  # noqa: F401
