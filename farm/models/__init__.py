import os

# Torch reads it as CUDA starts: fragments then cost next to nothing of what `farm.placement` counts on.
if "PYTORCH_ALLOC_CONF" not in os.environ:
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
