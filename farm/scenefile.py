"""Scenes in a manifest's list of prompts: checked, completed from shared files of characters, and written out as text.

An entry of `prompts` may be a mapping of `characters` and `general_tags` in place of a text. `include` at the manifest's top
names files of characters and general tags, and `use: NAME` takes one of them, with what stands beside it over what it says.
What comes out is a manifest of texts alone, so that plans, receipts and pictures carry the prompt that was drawn. Reads no
file itself.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Discriminator, Field, StrictStr, Tag, create_model

from farm.errors import InputError, ManifestError
from farm.scene import CHARACTER_ELEMENTS, GENERAL, GENERAL_ELEMENTS, Character, GeneralTags, Scene, tag_line
from farm.yamlfile import Document, Loc, did_you_mean, parse_yaml, shown, validate

MAX_INCLUDES = 16
LISTED = 10
"""Names that a message has of what is included."""

Reader = Callable[[str, Loc], Document]
"""From a file as `include` names it, and where it does, to what is in it. Raises ManifestError."""


ReadUrl = Callable[[str], bytes]
"""From `s3://bucket/key` to what lies there. Raises InputError."""
INCLUDED = "file of characters"


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


def _kind(value: Any) -> str:
    return "<scene>" if isinstance(value, dict | _Part) else "<list>" if isinstance(value, list | tuple) else "<text>"


_Text = Annotated[StrictStr, Field(min_length=1)]
_Tags = Annotated[
    Annotated[StrictStr, Tag("<text>")]
    | Annotated[tuple[_Text, ...], Tag("<list>")]
    | Annotated[_Part, Tag("<scene>")],
    Discriminator(_kind),
]
_Names = Annotated[
    Annotated[_Text, Tag("<text>")]
    | Annotated[tuple[_Text, ...], Field(max_length=MAX_INCLUDES), Tag("<list>")]
    | Annotated[_Part, Tag("<scene>")],
    Discriminator(_kind),
]


def _elements(name: str, elements: tuple[str, ...]) -> type[_Part]:
    fields: dict[str, Any] = dict.fromkeys(elements, (_Tags, ()))
    return create_model(name, __base__=_Part, **fields)


_Character = _elements("_Character", CHARACTER_ELEMENTS)
_General = _elements("_General", GENERAL_ELEMENTS)
_use: dict[str, Any] = {"use": (_Text | None, Field(default=None, description="a name in an included file"))}
_UsedCharacter = create_model("_UsedCharacter", __base__=_Character, **_use)
_UsedGeneral = create_model("_UsedGeneral", __base__=_General, **_use)


class _Scene(_Part):
    characters: tuple[_UsedCharacter, ...] = ()
    general_tags: _UsedGeneral = _UsedGeneral()


class _Prompts(BaseModel):
    """The prompts and the include of a manifest; its other keys are looked at elsewhere."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    prompts: tuple[
        Annotated[
            Annotated[StrictStr, Tag("<text>")]
            | Annotated[StrictStr, Tag("<list>")]
            | Annotated[_Scene, Tag("<scene>")],
            Discriminator(_kind),
        ],
        ...,
    ]
    include: _Names = ()


class _File(_Part):
    """A file of characters and general tags by name."""

    characters: dict[_Text, _Character] = {}  # type: ignore[valid-type]
    general_tags: dict[_Text, _General] = {}  # type: ignore[valid-type]


_OTHER_NAMES = {
    **dict.fromkeys(("name", "id"), "it is called n"),
    **dict.fromkeys(("sex",), "it is called gender"),
    **dict.fromkeys(("clothes", "outfit", "wearing"), "it is called clothing"),
    **dict.fromkeys(("looks", "hair", "eyes", "features"), "it is called appearance"),
    **dict.fromkeys(("place", "location"), "it is called position; where the scene is, background"),
    **dict.fromkeys(("face", "emotion", "mood"), "it is called expression"),
    **dict.fromkeys(("character",), "it is called characters, a list"),
    **dict.fromkeys(("general", "tags"), f"it is called {GENERAL}"),
    **dict.fromkeys(("extends", "inherit", "base", "from", "ref"), "it is called use"),
}


def included(url: str, where: str, read_url: ReadUrl | None) -> Document:
    """Read an included file from a bucket. Raises ManifestError; `where` names the include."""
    if read_url is None:
        raise ManifestError(f"{where}: include: no bucket can be read from here, got {shown(url)}; download the file")
    try:
        data = read_url(url)
    except InputError as exc:
        raise ManifestError(f"{where}: include: {exc.message}") from exc
    return parse_yaml(data, url, ManifestError, what=INCLUDED)


def has_scenes(document: Document) -> bool:
    """Whether a manifest has a scene in its list of prompts, or includes what scenes use."""
    prompts = document.data.get("prompts")
    return "include" in document.data or (isinstance(prompts, list) and any(isinstance(one, dict) for one in prompts))


def with_texts(document: Document, read: Reader) -> Document:
    """Return the manifest with every scene as the text that it comes to, and without `include`. Raises ManifestError."""
    if not any(isinstance(one, dict) for one in _listed(document)):
        raise ManifestError(
            f"{document.where(('include',))}: include: scenes in a list of prompts use it, and there are none; take it out"
        )
    lists = {
        "prompts": tuple(_Scene.model_fields),
        "prompts.characters": ("use", *CHARACTER_ELEMENTS),
        f"prompts.{GENERAL}": ("use", *GENERAL_ELEMENTS),
    }
    written = validate(document, _Prompts, ManifestError, other_names=_OTHER_NAMES, field_lists=lists)
    named = (written.include,) if isinstance(written.include, str) else written.include
    shelf = _Shelf()
    files = named if isinstance(named, tuple) else ()
    for at, file in enumerate(files):
        loc: Loc = ("include",) if isinstance(written.include, str) else ("include", at)
        if file in files[:at]:
            raise ManifestError(f"{document.where(loc)}: include: {shown(file)} stands twice; take one of them out")
        shelf.add(read(file, loc))
    texts = [
        prompt if isinstance(prompt, str) else _text(prompt, document, ("prompts", at), shelf)
        for at, prompt in enumerate(written.prompts)
    ]
    rest = {name: value for name, value in document.data.items() if name != "include"}
    return replace(document, data=rest | {"prompts": texts})


class _Shelf:
    """Characters and general tags by name, and the place where each stands."""

    def __init__(self) -> None:
        self.characters: dict[str, _Part] = {}
        self.general_tags: dict[str, _Part] = {}
        self._places: dict[Loc, str] = {}

    def of(self, kind: str) -> Mapping[str, _Part]:
        """Return the characters, or the general tags."""
        return self.general_tags if kind == GENERAL else self.characters

    def add(self, document: Document) -> None:
        """Take in a file. Raises ManifestError where it is malformed, or a name stands in another file already."""
        lists: dict[str, tuple[str, ...]] = {"": tuple(_File.model_fields)}
        for kind, elements in (("characters", CHARACTER_ELEMENTS), (GENERAL, GENERAL_ELEMENTS)):
            names = document.data.get(kind)
            lists |= {f"{kind}.{name}": elements for name in (names if isinstance(names, dict) else ())}
        file = validate(document, _File, ManifestError, other_names=_OTHER_NAMES, field_lists=lists)
        for kind, entries, taken in (
            ("characters", file.characters, self.characters),
            (GENERAL, file.general_tags, self.general_tags),
        ):
            for name, entry in entries.items():
                place: Loc = (kind, name)
                if self._places.get(place) == document.where(place):
                    raise ManifestError(f"{document.path}: is included twice; take one of them out of include")
                if place in self._places:
                    raise ManifestError(
                        f"{document.where(place)}: {kind}.{name} stands at {self._places[place]} too; rename one of them"
                    )
                self._places[place] = document.where(place)
                taken[name] = entry


def _listed(document: Document) -> list[Any]:
    prompts = document.data.get("prompts")
    return prompts if isinstance(prompts, list) else []


def _text(scene: _Scene, document: Document, loc: Loc, shelf: _Shelf) -> str:
    characters = tuple(
        Character(**_values(one, document, (*loc, "characters", at), shelf, "characters"))
        for at, one in enumerate(scene.characters)
    )
    general = GeneralTags(**_values(scene.general_tags, document, (*loc, GENERAL), shelf, GENERAL))
    for at, one in enumerate(characters):
        if not one.given():
            _refuse_silent(document, (*loc, "characters", at))
    if not characters and not general.given():
        _refuse_silent(document, loc)
    return Scene(characters, general).xml()


def _values(part: BaseModel, document: Document, loc: Loc, shelf: _Shelf, kind: str) -> dict[str, str]:
    """Return the elements of a character or of general tags: the used one's, and over them those that stand here."""
    used = getattr(part, "use", None)
    values: dict[str, str] = {}
    if used is not None:
        entry = shelf.of(kind).get(used)
        if entry is None:
            where = (*loc, "use")
            raise ManifestError(
                f"{document.where(where)}: {'.'.join(map(str, where))}: {_not_there(used, shelf, kind)}"
            )
        values = {name: tag_line(getattr(entry, name)) for name in entry.model_fields_set}
    here = {name: tag_line(getattr(part, name)) for name in part.model_fields_set if name != "use"}
    return values | here


def _not_there(used: str, shelf: _Shelf, kind: str) -> str:
    """Say that a name is not in what is included, or is there as the other kind."""
    if kind != GENERAL and used in shelf.general_tags:
        return f"{shown(used)} is no character but {GENERAL} in what is included; write it under {GENERAL}"
    if kind == GENERAL and used in shelf.characters:
        return f"{shown(used)} is a character in what is included, no {GENERAL}; write it under characters"
    names = list(shelf.of(kind))
    more = f" … and {len(names) - LISTED:,} more" if len(names) > LISTED else ""
    listed = ", ".join(shown(name) for name in names[:LISTED]) or "none"
    near = did_you_mean(used, names) or f"; the included files have: {listed}{more}"
    return f"there is no {shown(used)} in what is included{near}"


def _refuse_silent(document: Document, loc: Loc) -> None:
    raise ManifestError(
        f"{document.where(loc)}: {'.'.join(map(str, loc))}: says nothing; write what is to be seen, or take it out"
    )
