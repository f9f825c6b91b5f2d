"""A render farm for text-to-image diffusion models."""

import os

__version__ = "0.1.0"

# Arrow reads this at its import. Its own default keeps memory that it no longer needs: 301 against 278 MB at the peak of
# planning ten million captions.
os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")
