import forked

COUNT = """
import resource, torch
from smit.runtime import keep_freed_memory
keep_freed_memory(torch.device({device!r}))
for _ in range(20):
    x = [torch.ones(n * 2 ** 20) for n in (9, 16, 25)]                # 36 to 100 MiB
    del x
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
"""


def page_faults(device):
    return int(forked.run("-c", COUNT.format(device=device), folder=forked.ROOT).stdout)


def test_freed_tensors_are_handed_to_the_next_ones_on_the_cpu():
    kept, returned = page_faults("cpu"), page_faults("cuda")
    # about equal: no glibc, or its pages are huge
    assert kept < returned / 2 or abs(kept / returned - 1) < .05
