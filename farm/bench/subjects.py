"""What a model is asked to draw where nobody says: prompts of the kind that its family was made for."""

from farm.modelcard import ModelCard

SKETCH = (
    "a red circle on a white background",
    "a blue square to the left of a yellow star on a black background",
    "three green triangles on a pink background",
    "a small orange heart above a large purple diamond on a white background",
    "two cyan stars on a gray background",
)
SCENES = (
    "a golden retriever on grass in sunshine, photograph, shallow depth of field",
    "an anime girl with long pink hair and blue eyes under cherry blossoms, soft light",
    "a mountain sunrise over a sea of clouds, oil painting, broad strokes",
    "a modern coffee cup on a wooden desk by a window, soft morning light",
    "a narrow street of an old town at night after rain, neon signs in the puddles",
)
PORTRAITS = (
    "portrait of a young woman in a light blue linen shirt before a sunlit bamboo forest, soft background, 85 mm lens",
    "an old fisherman mending a net on a pier at dawn, photograph, fine detail in hands and rope",
    "a shop window with a hand-painted sign that reads OPEN DAILY, brass lamps, evening",
    "a still life of three pears and a copper jug on a stone table, window light from the left",
    "a wide valley with a winding river and autumn woods seen from a ridge",
)
CHARACTERS = (
    "1girl, blue hair, long twintails, teal eyes, school uniform, smile, outdoors, anime style, best quality",
    "<character_1><n>haru</n><gender>1boy</gender><appearance>black hair, short hair, red eyes</appearance></character_1>"
    "<general_tags><style>anime</style><quality>best quality</quality></general_tags>",
    "<character_1><n>aoi</n><gender>1girl</gender><appearance>blue hair, long twintails, teal eyes</appearance>"
    "<action>standing, waving</action></character_1>"
    "<character_2><n>haru</n><gender>1boy</gender><appearance>black hair, short hair, red eyes</appearance>"
    "<action>leaning against a wall</action></character_2>"
    "<general_tags><style>cyberpunk, neon lights, rain, wet streets</style><quality>best quality</quality></general_tags>",
)


def prompts_for(card: ModelCard) -> tuple[str, ...]:
    """Return prompts that fit a card's family; the bundled model knows a few words only."""
    if card.source.path is not None and card.source.path.startswith("package:farm.sketch/"):
        return SKETCH
    return {"qwen-image": PORTRAITS, "newbie": CHARACTERS}.get(card.family, SCENES)
