"""What a long run needs beside the algorithm: ranks and signals, whole files [ours]."""
from smit.runtime.files import (  # noqa: F401
    CsvLog, OutputFolder, atomic_write, compare_settings, load_checkpoint, load_latest, save_checkpoint)
from smit.runtime.ranks import (  # noqa: F401
    FIRST, Ranks, StopSignals, keep_freed_memory, peak_memory_mb, pick_precision, run, start)
