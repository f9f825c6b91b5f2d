"""The bundled text-to-image model: drawn scenes, a judge, a training script and the weights.

Imports neither torch nor diffusers, so that the path of the weights can be asked for anywhere.
"""

from pathlib import Path

WEIGHTS = Path(__file__).parent / "weights"
"""A folder in diffusers' own layout: `ZImagePipeline.from_pretrained(WEIGHTS, dtype=torch.float32)`."""
