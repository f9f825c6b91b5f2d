"""Run code that comes with weights, where a card pins it and this machine allows it: from the very bytes that were checked.

Its files are the modules of a package of their own, named by their digest, so that cards with equal file names lie side by side
and none takes the place of an installed package. By that package nothing else is imported: neither from a folder nor from what
lies beside the files. What the code imports otherwise, and does, is its own affair; that is what the permission is for.
"""

import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from importlib.abc import InspectLoader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import decode_source, spec_from_loader
from pathlib import Path, PurePosixPath
from types import CodeType

import torch

from farm.errors import FarmError, ModelCardError
from farm.modelcard import ModelCard
from farm.pinnedcode import digest_of, read_code, refuse_unallowed


class RemoteCode:
    """The code of one card, checked; none where it pins none. Raises ModelCardError where it is not allowed, or not as pinned.

    A module is run when a class of it is first asked for, and once in a process.
    """

    def __init__(self, card: ModelCard, folder: Path):
        refuse_unallowed(card)
        self._card = card
        self._folder = folder
        self._package = f"farm_remote_{digest_of(card)}"
        files = read_code(card, folder)
        if files and not any(isinstance(one, _Package) and one.name == self._package for one in sys.meta_path):
            sys.meta_path.insert(0, _Package(self._package, files))

    def find(self, file: str, name: str, kinds: tuple[type, ...]) -> type:
        """Return the class of that name in a file that the card pins; it is one of `kinds`, and the code's own.

        Raises ModelCardError, also for whatever the code raises as it is imported.
        """
        with self.blamed(file):
            found = getattr(import_module(_module(self._package, file)), name, None)
        if isinstance(found, type) and issubclass(found, kinds) and self._defines(found):
            return found
        wanted = " or ".join(kind.__name__ for kind in kinds)
        raise ModelCardError(
            f"model {self._card.name}: {self._folder / file} defines no {wanted} called {name}, which model_index.json names; "
            "choose another model"
        )

    def _defines(self, found: type) -> bool:
        """Not what it imports from elsewhere: nobody meant that to be loaded by a name in a file of settings."""
        return f"{found.__module__}.".startswith(f"{self._package}.")

    @contextmanager
    def blamed(self, file: str | None = None) -> Iterator[None]:
        """Turn what the card's code raises into a ModelCardError with its place, or else `file`; what others raise passes."""
        try:
            yield
        except (MemoryError, torch.OutOfMemoryError, torch.AcceleratorError):
            raise
        except (Exception, SystemExit) as exc:  # it may raise anything, and ends no renderer by that
            ours = isinstance(exc, FarmError)
            raised = exc.__cause__ if ours and exc.__cause__ else exc
            place = self._place(raised)
            if place is None and (ours or file is None):
                raise
            line = " ".join(str(raised).split())[:300]
            raise ModelCardError(
                f"model {self._card.name}: the code in {self._folder / str(place or file)} fails: {type(raised).__name__}: "
                f"{line}; see to what it needs, or choose another model"
            ) from exc

    def _place(self, exc: BaseException) -> str | None:
        """The file and line of the code that raised, None where it was no line of it."""
        found = [(frame.f_code.co_filename, line) for frame, line in traceback.walk_tb(exc.__traceback__)]
        if isinstance(exc, SyntaxError):
            found.append((exc.filename or "", exc.lineno or 0))
        inside = f"{self._package}/"
        own = [f"{where.removeprefix(inside)}:{line}" for where, line in found if where.startswith(inside)]
        return own[-1] if own else None


class _Package(MetaPathFinder, InspectLoader):
    """Finds and loads the package of that name and its modules, from memory, and no others."""

    def __init__(self, name: str, sources: Mapping[str, bytes]):
        self.name = name
        self._sources = sources
        self._files = {_module(name, file): file for file in sources}
        self._folders = {".".join((name, *folder.parts)) for file in sources for folder in PurePosixPath(file).parents}

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if fullname != self.name and not fullname.startswith(f"{self.name}."):
            return None
        if fullname not in self._files and fullname not in self._folders:
            file = fullname.removeprefix(f"{self.name}.").replace(".", "/")
            raise ModuleNotFoundError(f"{file}.py is not among the code that the card pins", name=fullname)
        return spec_from_loader(fullname, self, is_package=self.is_package(fullname))

    def is_package(self, fullname: str) -> bool:
        return fullname in self._folders

    def get_source(self, fullname: str) -> str:
        return decode_source(self._source(fullname))

    def get_code(self, fullname: str) -> CodeType:
        return self.source_to_code(self._source(fullname), f"{self.name}/{self._files.get(fullname, '')}")

    def _source(self, fullname: str) -> bytes:
        """A module's bytes; of a folder without an __init__.py none."""
        return self._sources[self._files[fullname]] if fullname in self._files else b""


def _module(package: str, file: str) -> str:
    return ".".join((package, *file.removesuffix(".py").split("/"))).removesuffix(".__init__")
