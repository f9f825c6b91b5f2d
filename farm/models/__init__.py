import logging
import os
import sys

# Torch reads it as CUDA starts: fragments then cost next to nothing of what `farm.placement` counts on.
if "PYTORCH_ALLOC_CONF" not in os.environ:
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
# Where there are both packages, bitsandbytes would fetch a kernel from a hub and run it, as it is imported with diffusers on a
# processor with AVX512-BF16; without the other one it says that it misses it.
sys.modules["kernels"] = None  # type: ignore[assignment]
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
