"""Who may ask: one gate before every route."""

import base64
import contextlib
import hmac
import ipaddress

from reinforce.serving.http import Head, HttpError


def is_loopback(host: str) -> bool:
    """Whether an address can be reached from this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def admit(head: Head, token: str | None, loopback: bool) -> None:
    """Let a request pass. Raises HttpError 401, or 421 for another's name.

    A web page may let its own name point to 127.0.0.1 and so reach a server that listens there (DNS
    rebinding). Its browser says which name it asked for, so where no token guards a loopback
    address, that must be a loopback name.
    """
    if token is not None and head.path != "/health":
        _authorise(head, token)
    host = head.one("host")
    if token is None and loopback and host is not None and not is_loopback(_name(host)):
        raise HttpError(421, "misdirected", "this server is asked by a name of this machine alone")


def _name(host: str) -> str:
    """A Host header without its port."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0].lower()


def _authorise(head: Head, token: str) -> None:
    kind, _, value = (head.one("authorization") or "").partition(" ")
    kind = kind.lower()
    if kind == "basic":
        with contextlib.suppress(ValueError):
            pair = base64.b64decode(value, validate=True).decode("utf-8", "replace")
            value = pair.partition(":")[2]
    given = value.encode("utf-8", "replace")
    if kind not in ("bearer", "basic") or not hmac.compare_digest(given, token.encode()):
        raise HttpError(401, "unauthorized", "a token is needed: Authorization: Bearer <RM_TOKEN>")
