"""Memory on the CPU: what torch frees stays with the process. Needs the standard library alone."""
import ctypes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h


def keep_freed_memory(device):
    """Where `device` is the CPU and the C library glibc, hand freed tensors of up to 1 GiB to the next ones [ours].

    By itself glibc returns every tensor above 32 MiB to the system, whose pages must be zeroed and mapped again for the
    next one: at 96^3 a third of a training step's time. The price: some memory is held and not used.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another system, another C library
        return
    if device.type == "cpu":           # else it is the loader's workers that would hold what they freed
        mallopt(M_MMAP_THRESHOLD, 2 ** 30)
        mallopt(M_TRIM_THRESHOLD, 2 ** 31 - 1)
