"""What a long run needs beside the algorithm: ranks and signals, whole files [ours]."""
# ranks first: it says in one sentence on which systems this runs
from smit.runtime.ranks import (  # noqa: F401
    Precision, Ranks, StopSignals, describe_memory, is_first, is_out_of_memory,
    keep_freed_memory, launched_by_torchrun, peak_memory_mb, restarts, run, start, warn_once)
from smit.runtime.files import (  # noqa: F401
    CsvLog, OutputFolder, atomic_write, compare_settings, load_checkpoint, load_latest, resume,
    save_checkpoint, save_state, saved_settings)
