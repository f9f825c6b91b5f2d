import logging
import os

# Torch reads it as CUDA starts: fragments then cost next to nothing of what `farm.placement` counts on.
if "PYTORCH_ALLOC_CONF" not in os.environ:
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
# On a CPU it warns, as soon as diffusers imports it, of a faster kernel that would be downloaded: nothing here wants that.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
