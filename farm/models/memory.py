"""How much memory this process holds for a device: what torch's allocator has reserved there, or what is resident here.

Safe to ask from any thread. Imports torch only where a GPU is asked about, and starts no CUDA context by asking.
"""

import os
import resource
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes held now, and the most since this process began.

    On a GPU what torch's allocator has reserved: the CUDA context, some 0.5 GiB, lies outside. On the CPU the resident set of the
    whole process, pages of mapped weights with it.
    """

    reserved_bytes: int
    peak_bytes: int


def memory_of(device: str) -> Memory:
    """Look at a device by torch's name of it: cpu, cuda or cuda:N."""
    if device.partition(":")[0] == "cuda":
        import torch

        if not torch.cuda.is_initialized():
            return Memory(0, 0)
        return Memory(torch.cuda.memory_reserved(device), torch.cuda.max_memory_reserved(device))
    with open("/proc/self/statm", encoding="ascii") as file:
        resident = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return Memory(resident, max(resident, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024))
