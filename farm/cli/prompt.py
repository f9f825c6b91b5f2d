"""`farm prompt`: a loop for trying things on a farm that is up.

A line is a prompt; one that opens an XML tag is read on until the tag is closed or a blank line comes, and one that opens a
character until the general tags are closed or two blank lines come. A line that begins with / changes a setting.
Pictures are numbered files that never take the place of another.
"""

import re
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from farm.cli.advice import tell
from farm.cli.exits import Exit, exit_code
from farm.cli.following import spinner
from farm.cli.options import Options, command
from farm.cli.terminal import note, print_error, print_json, say
from farm.cli.wording import cut, duration, printable
from farm.errors import FarmError, ForbiddenError, InputError, PictureError, UnauthorizedError

if TYPE_CHECKING:
    from farm.client import Client, Image

FOLDER = Path("farm-pictures")
ONCE = frozenset({"licence", "preset"})
"""Codes of warnings that hold for every picture of a model."""
LEAVE = frozenset({"quit", "exit", "q", "/quit", "/exit", "/q"})
_OPENS = re.compile(r"\s*<([A-Za-z_][\w.:-]*)")
_CHARACTER = re.compile(r"<character_\d")
_GENERAL_ENDS = re.compile(r"</general_tags\s*>")
_NUMBERED = re.compile(r"(\d{4,})\.(png|webp|jpg)")
_SIZE = re.compile(r"(\d+)\s*[x×*,\s]\s*(\d+)")

HELP = """\
a line            is a prompt; one that opens an XML tag is read on until it is closed, or a blank line
<character_1>     begins a scene, which ends with </general_tags>, or two blank lines
/model NAME       another model; /model lists them
/steps N          denoising steps              /guidance X   how closely to follow the prompt
/size 1024x768    in pixels                    /seed N       a fixed seed
/n N              pictures of each prompt      /negative T   what not to draw
/quality NAME     a preset of the model        /format F     png, webp or jpeg
/show             the settings; a setting's name alone puts it back to the model's own
quit              leaves, and so does Ctrl-D; Ctrl-C stops the picture that is being drawn"""


def register(app: typer.Typer) -> None:
    """Add the command."""
    command(app, "prompt", remote=True)(prompt)


@dataclass(slots=True)
class Settings:
    """What is sent beside a prompt; None leaves it to the model."""

    model: str | None = None
    values: dict[str, Any] = field(default_factory=dict)
    said: set[str] = field(default_factory=set)

    def news(self, warnings: object) -> list[Mapping[str, Any]]:
        """Return what a farm warns of, but for what of the model was said before."""
        told = [one for one in warnings if isinstance(one, Mapping)] if isinstance(warnings, list) else []
        fresh = [one for one in told if one.get("code") not in ONCE or one.get("text") not in self.said]
        self.said.update(str(one.get("text")) for one in told)
        return fresh

    def change(self, word: str, text: str) -> str:
        """Change one setting, or with an empty text put it back; returns what to say. Raises InputError."""
        if word not in _SETTINGS:
            raise InputError(
                f"/{word} is no setting; there are {', '.join(f'/{name}' for name in _SETTINGS)}, /show, /help"
            )
        name, read = _SETTINGS[word]
        if not text:
            self.values.pop(name, None)
            return f"{word}: the model's own"
        try:
            self.values[name] = read(text)
        except ValueError as exc:
            raise InputError(f"/{word} {text}: {exc}") from exc
        return f"{word}: {printable(str(self.values[name]))}"

    def lines(self) -> list[str]:
        """Say all settings."""
        given = [f"  {word:<9} {printable(str(self.values.get(name, '–')))}" for word, (name, _) in _SETTINGS.items()]
        return [f"  model     {printable(self.model or '–')}", *given]


@dataclass(slots=True)
class Reading:
    """Lines put together to prompts."""

    lines: list[str] = field(default_factory=list)

    def take(self, line: str) -> str | None:
        """Return a whole prompt; None while it goes on, and for a blank line where none was begun."""
        if not self.lines and not line.strip():
            return None
        self.lines.append(line)
        whole = "\n".join(self.lines).strip()
        if self.opened and not self._ended(whole):
            return None
        self.lines.clear()
        return whole

    @property
    def opened(self) -> bool:
        """Whether a tag was opened, so that more lines may follow."""
        return bool(self.lines) and _OPENS.match(self.lines[0]) is not None

    def _ended(self, whole: str) -> bool:
        if _CHARACTER.match(whole):
            return _GENERAL_ENDS.search(whole) is not None or not any(one.strip() for one in self.lines[-2:])
        return not self.lines[-1].strip() or _closed(whole)

    def rest(self) -> str | None:
        """Return what was begun, at the end of all lines."""
        whole = "\n".join(self.lines).strip()
        self.lines.clear()
        return whole or None


def prompt(
    options: Options,
    to: Annotated[Path, typer.Option("--to", metavar="DIR", help="Where the pictures go.")] = FOLDER,
    model: Annotated[str | None, typer.Option("--model", metavar="NAME", help="The model to begin with.")] = None,
) -> Exit:
    """Try prompts on a farm that is up: type one, get a picture and its seconds, change settings, go on.

    Type /help inside for the settings. From a pipe every line is a prompt.
    """
    with options.client() as farm:
        names = [one.id for one in farm.models()]
        if model is not None and model not in names:
            farm.model(model)  # which raises, and names the nearest
        settings = Settings(model or _first(farm))
        talking = sys.stdin.isatty()
        if talking:
            note(f"{farm.url}, model {printable(settings.model or '–')}; /help says what can be typed, quit leaves")
        with suppress(ImportError):
            import readline  # noqa: F401  (lines can be edited, called back and be longer than 4 kB)
        return _talk(options, farm, settings, to, talking=talking)


def _talk(options: Options, farm: "Client", settings: Settings, to: Path, *, talking: bool) -> Exit:
    reading, last = Reading(), Exit.OK
    while True:
        try:
            line = _line("… " if reading.lines else "› ", talking=talking)
        except KeyboardInterrupt:
            reading.lines.clear()
            note("\nquit, or Ctrl-D, leaves")
            if not talking:
                return Exit.INTERRUPTED
            continue
        if line is None:
            text = reading.rest()
        elif not reading.lines and line.strip().lower() in LEAVE:
            return _end(last, talking)
        elif not reading.lines and line.strip().startswith("/"):
            last = _setting(options, farm, settings, line.strip()[1:])
            continue
        else:
            text = reading.take(line)
        if text is not None:
            last = _draw(options, farm, settings, text, to)
            if last is Exit.INTERRUPTED and not talking:
                return last
        if line is None:
            return _end(last, talking)


def _end(last: Exit, talking: bool) -> Exit:
    """A person has read what went wrong; a script is told how the last prompt ended."""
    return Exit.OK if talking else last


def _setting(options: Options, farm: "Client", settings: Settings, text: str) -> Exit:
    word, _, rest = text.partition(" ")
    word, rest = word.lower(), rest.strip()
    try:
        if word in ("help", "?", "h"):
            note(HELP)
        elif word == "show":
            note("\n".join(settings.lines()))
        elif word == "model" and not rest:
            note("\n".join(f"  {printable(one.id)}" for one in farm.models()))
        elif word == "model":
            settings.model = farm.model(rest).id
            note(f"model: {printable(settings.model)}")
        else:
            note(settings.change(word, rest))
    except FarmError as error:
        print_error(error.code, error.message, as_json=options.json)
        return exit_code(error)
    return Exit.OK


def _draw(options: Options, farm: "Client", settings: Settings, text: str, to: Path) -> Exit:
    began = time.monotonic()
    try:
        with spinner(f"drawing {cut(text, 60)}"):
            images = farm.generate(text, model=settings.model, **settings.values)
        whole_s = time.monotonic() - began
        tell(settings.news(images[0].metadata.get("warnings")) if images else ())
        for image in images:
            if image.error is not None:
                print_error(image.error.code, image.error.message, as_json=options.json)
                continue
            path = _save(image, to)
            if options.json:
                print_json({"file": str(path), "seconds": image.seconds, "whole_seconds": whole_s, **image.metadata})
            else:
                say(f"{path}  seed {image.seed}, {duration(whole_s)} ({duration(image.seconds)} on the device)")
    except KeyboardInterrupt:
        note("\nstopped")
        return Exit.INTERRUPTED
    except (UnauthorizedError, ForbiddenError):
        raise
    except FarmError as error:
        print_error(error.code, error.message, as_json=options.json)
        return exit_code(error)
    return Exit.OK


def _save(image: "Image", to: Path) -> Path:
    """Write a picture under the next number."""
    try:
        to.mkdir(parents=True, exist_ok=True)
        taken = [int(found[1]) for one in to.iterdir() if (found := _NUMBERED.fullmatch(one.name))]
        number = max(taken, default=0)
        while True:
            number += 1
            path = to / f"{number:04d}{image.suffix}"
            with suppress(FileExistsError), path.open("xb") as file:
                file.write(image.data)
                return path
    except OSError as exc:
        raise PictureError(f"{to} cannot be written: {exc.strerror}; name another folder with --to") from exc


def _line(ready: str, *, talking: bool) -> str | None:
    """Read a line; None at the end of all. Where stdout is no terminal it is for data alone."""
    if talking and sys.stdout.isatty():
        try:
            return input(ready)
        except EOFError:
            say()
            return None
    if talking:
        print(ready, end="", file=sys.stderr, flush=True)
    line = sys.stdin.readline()
    return line.rstrip("\n") if line else None


def _first(farm: "Client") -> str | None:
    """The model to begin with: one that is loaded, else the first."""
    models = farm.models()
    loaded = [one for one in models if one.readiness.state == "loaded"]
    return next((one.id for one in [*loaded, *models]), None)


def _closed(text: str) -> bool:
    """Whether the tag that a text begins with is closed in it."""
    opened = _OPENS.match(text)
    if opened is None:
        return True
    name = re.escape(opened[1])
    begins = len(re.findall(rf"<{name}(?=[\s>/])", text))
    empty = len(re.findall(rf"<{name}(?:\s[^<>]*)?/>", text))
    return len(re.findall(rf"</{name}\s*>", text)) + empty >= begins > 0


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError("write a whole number") from None


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError("write a number") from None


def _pixels(text: str) -> str:
    found = _SIZE.fullmatch(text.strip())
    if found is None:
        raise ValueError("write width and height, as 1024x768")
    return f"{found[1]}x{found[2]}"


_SETTINGS: dict[str, tuple[str, Any]] = {
    "steps": ("num_inference_steps", _whole),
    "guidance": ("guidance_scale", _number),
    "size": ("size", _pixels),
    "seed": ("seed", _whole),
    "n": ("n", _whole),
    "negative": ("negative_prompt", str),
    "quality": ("quality", str),
    "format": ("output_format", str),
}
"""A setting's word -> the field that it sets, and how it is read."""
