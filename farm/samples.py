"""The first different prompts of a source, picked as it goes by: what advice is given on, of however many there are."""

from dataclasses import dataclass

import pyarrow as pa

from farm.sources import Chunk
from farm.sweep import TemplatePrompts

LOOKS = 200
"""Different prompts that planning looks at."""
LOOK_ROWS = 50
"""So many rows for each are searched for them."""


@dataclass(frozen=True, slots=True)
class Sample:
    """A prompt, and the first row that has it. `where`: its file and line; of a manifest's own list, empty."""

    row: int
    where: str
    prompt: str


@dataclass(frozen=True, slots=True)
class Samples:
    """The first different prompts; `whole`: there are no others."""

    prompts: tuple[Sample, ...] = ()
    whole: bool = True


class Sampler:
    """Picks `most` prompts."""

    def __init__(self, most: int = LOOKS):
        self._most = most
        self._found: dict[str, Sample] = {}
        self._rows = 0
        self.full = False

    @property
    def samples(self) -> Samples:
        """Those that were picked so far."""
        return Samples(tuple(self._found.values()), whole=not self.full)

    def add(self, chunk: Chunk, table: pa.Table, *, listed: bool) -> None:
        """Look through the next rows. `listed`: they are a manifest's own list."""
        column = table["prompt"]
        for at in range(0 if self.full else table.num_rows):
            text = column[at].as_py()
            if text not in self._found:
                if len(self._found) >= self._most:
                    self.full = True
                    return
                self._found[text] = Sample(self._rows, "" if listed else chunk.where(at), text)
            self._rows += 1
            if self._rows >= self._most * LOOK_ROWS:
                self.full = True
                return


def template_samples(prompts: TemplatePrompts, most: int = LOOKS) -> Samples:
    """Return the different ones among a template's first prompts."""
    found: dict[str, Sample] = {}
    for row in range(min(prompts.rows, most)):
        text = prompts.row(row)
        found.setdefault(text, Sample(row, "prompts.template", text))
    return Samples(tuple(found.values()), whole=prompts.rows <= most)
