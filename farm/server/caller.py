"""Who asks: the key behind a request, and the parameter types by which routes say what right they demand.

The doors find out whose key it is before a body is read.
"""

from typing import Annotated, cast

from fastapi import Depends, Request

from farm.errors import ForbiddenError
from farm.keys import Key, Scope


def caller_of(request: Request) -> Key:
    """The key that the doors let in; one with an empty id for the local user of an endpoint without keys."""
    return cast(Key, request.scope["caller"])


def must(caller: Key, scope: Scope) -> None:
    """Raise ForbiddenError where the caller lacks a right."""
    if not caller.may(scope):
        raise ForbiddenError(
            f"this needs the scope {scope}, and key {caller.id} has {', '.join(caller.scopes)}; ask an administrator for "
            "a key with it"
        )


def must_own(caller: Key, owner: str, what: str) -> None:
    """Raise ForbiddenError where `what` (as `job captions`) is another owner's, and the caller no administrator."""
    if owner != caller.owner and not caller.may("admin"):
        raise ForbiddenError(
            f"{what} is {owner or 'nobody'}'s and you are {caller.owner}; ask them, or an administrator"
        )


async def _reads(request: Request) -> Key:
    must(caller_of(request), "read")
    return caller_of(request)


async def _renders(request: Request) -> Key:
    must(caller_of(request), "render")
    return caller_of(request)


async def _administers(request: Request) -> Key:
    must(caller_of(request), "admin")
    return caller_of(request)


Reader = Annotated[Key, Depends(_reads)]
Painter = Annotated[Key, Depends(_renders)]
Admin = Annotated[Key, Depends(_administers)]
