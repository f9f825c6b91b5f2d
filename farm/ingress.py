"""Close HAProxy's doors: what Ray Serve would start is started so that it listens at the endpoint's address alone.

Serve writes HAProxy's configuration itself, with a metrics and a statistics page on all interfaces, an admin socket for
everybody and no TLS, and has no option for any of that. It does let one name the program to start, which is this file: it
rewrites the configuration that it is given and becomes HAProxy. It refuses to start what it does not understand, so that a
later Serve cannot open a port unseen.

Run as a script it stands alone, by `python -I -S ingress.py FRONT -db -f CONFIG …`: it imports nothing of the farm.
"""

import ctypes
import dataclasses
import json
import os
import re
import resource
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

PR_SET_PDEATHSIG = 1
FILES_EACH = 3
SPARE_FILES = 100
"""A connection has two sockets and now and then a pipe; the rest is HAProxy's own."""
HEADERS_S = 30
"""How long a client may take over its request's headers, so that slow ones cannot use up the connections."""
CLIENT_S = 75
"""How long a client that is to send or to take something may do neither: HAProxy ends no sooner with one that holds back the
body of a request that was refused. A little longer than gateways wait for one, so that it is they who say so. While a
gateway works at a request that came whole, this time does not run."""
OF_ONE_SOURCE = 4
"""One address has at most one in so many of the connections; an IPv6 network of 64 bits counts as one."""
ERRORS = ("400", "408", "500", "501", "502", "503", "504")
"""Statuses that HAProxy answers with by itself."""
_SECTION = re.compile(r"^(global|defaults|frontend|backend|listen)\b[ \t]*(\S*)")
_DROPPED = ("frontend prometheus", "listen stats")
_FRONTEND = "frontend http_frontend"


class IngressError(Exception):
    """Raised when a configuration is not of the form that is known."""


@dataclasses.dataclass(frozen=True, slots=True)
class Front:
    """How HAProxy is to be reached. `bind`: host:port. `pem`: certificate and key for TLS, empty for none.

    `only_from`: the network that may connect beside this machine, empty for any. `answers`: folder with the whole response of
    each status in ERRORS, as 503.http. `nothing`: body where there is nothing, JSON. `binary`: HAProxy itself.
    """

    bind: str
    binary: str
    answers: str
    nothing: str
    pem: str = ""
    only_from: str = ""


def closed(config: str, front: Front, *, files: int) -> str:
    """Return the configuration with the endpoint as the only listener. Raises IngressError.

    `files`: how many this process may open; HAProxy does not start if its connections could need more.
    """
    lines: list[str] = []
    section, binds, connections = "", 0, 0
    for line in config.splitlines():
        head = _SECTION.match(line)
        if head:
            section = f"{head[1]} {head[2]}".strip()
        word, _, rest = line.strip().partition(" ")
        if section in _DROPPED:
            continue
        if word == "log" and (section == "global" or rest != "global"):
            continue  # to a syslog that is not ours: requests, with what stands in their URLs
        if word == "option" and rest.startswith("splice-"):
            continue  # with it HAProxy 2.8 does not pass on that a client hung up, once head and body came apart
        if word == "errorfile":
            continue
        if word == "acl" and rest.startswith(("healthcheck ", "routes ")):
            continue
        if word.startswith("http-request") and re.search(r" if (healthcheck|routes)\b", rest):
            continue  # pages of Serve's own, for anybody
        if section == "backend default_backend" and word == "http-request":
            continue  # without a server HAProxy answers 503, which is so: no gateway has come up yet
        if section == "global" and word == "stats" and rest.startswith("socket "):
            line = re.sub(r"\bmode \d+", "mode 600", line)
            if "mode 600" not in line:
                raise IngressError(f"the admin socket has no mode: {line.strip()}")
        elif section == "global" and word == "maxconn":
            connections = min(int(rest), max((files - SPARE_FILES) // FILES_EACH, 1))
            line = f"    maxconn {connections}"
        elif word == "timeout" and rest.startswith("client "):
            line = f"    timeout client {CLIENT_S}s"
        elif word == "bind":
            if section != _FRONTEND:
                raise IngressError(f"{section} listens too: {line.strip()}")
            binds += 1
            lines += _front_door(front, max(connections // OF_ONE_SOURCE, 1))
            continue
        lines.append(line)
        if head and section == "defaults":
            lines += [f"    errorfile {status} {_quoted(f'{front.answers}/{status}.http')}" for status in ERRORS]
    if binds != 1:
        raise IngressError(f"{_FRONTEND} has {binds} bind lines, 1 is known")
    return "\n".join(lines) + "\n"


def _front_door(front: Front, of_one_source: int) -> list[str]:
    tls = f" ssl crt {_quoted(front.pem)} ssl-min-ver TLSv1.2 alpn h2,http/1.1" if front.pem else ""
    lines = [f"    bind {front.bind}{tls}", f"    timeout http-request {HEADERS_S}s"]
    if front.only_from:
        lines.append(f"    tcp-request connection reject unless {{ src 127.0.0.0/8 ::1 {front.only_from} }}")
    else:
        lines += [
            "    stick-table type ipv6 size 100k expire 10m store conn_cur",
            "    tcp-request connection accept if { src 127.0.0.0/8 ::1 }",
            "    tcp-request connection track-sc0 src,ipmask(32,64)",
            f"    tcp-request connection reject if {{ sc0_conn_cur gt {of_one_source} }}",
        ]
    scheme = "https" if front.pem or front.only_from else "http"
    # Gateways believe what they are told here, so it is never a client that tells it.
    lines.append(f"    http-request set-header X-Forwarded-Proto {scheme}")
    nothing = f"content-type application/json string {_quoted_json(front.nothing)}"
    # Gateways answer these by themselves, before any door, to whom HAProxy's own checks come from.
    lines.append(f"    http-request return status 404 {nothing} if {{ path,url_dec -i -m beg /-/ }}")
    return lines


def _quoted_json(text: str) -> str:
    if re.search(r"['\\\n]", text):
        raise IngressError(f"{text!r} has a quote or a backslash, which HAProxy's configuration cannot hold")
    return f"'{text}'"


def _quoted(path: str) -> str:
    if re.search(r"[\"'\\$\n]", path):
        raise IngressError(f"{path!r} has a quote, a backslash or a $, which HAProxy's configuration cannot hold")
    return f'"{path}"'


def become_haproxy(front_file: str, arguments: Sequence[str]) -> NoReturn:
    """Replace this process by HAProxy with its doors closed; it ends with the process that started it."""
    front = Front(**json.loads(Path(front_file).read_text()))
    config = Path(arguments[arguments.index("-f") + 1])
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    os.umask(0o077)
    # In place, since Serve tells its own HAProxy by the file's name among the arguments; it writes it anew every time.
    Path(f"{config}.closed").write_text(closed(config.read_text(), front, files=files))
    os.replace(f"{config}.closed", config)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    os.execv(front.binary, [front.binary, *arguments])


if __name__ == "__main__":
    try:
        become_haproxy(sys.argv[1], sys.argv[2:])
    except (IngressError, OSError, ValueError, IndexError) as error:
        sys.exit(f"farm: HAProxy is not started: {error}")
