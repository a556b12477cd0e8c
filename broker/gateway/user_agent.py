"""Which tool asks, as it says itself: for people to read, never to decide by. Pure."""

from __future__ import annotations

import base64
import binascii
import re

from broker.gateway.heads import Headers

_PRODUCT = re.compile(rb"[A-Za-z][A-Za-z0-9._+-]{0,31}")
_KNOWN = (
    (b"apt-http", "apt"),
    (b"apache-maven", "mvn"),
    (b"apache-httpclient", "java"),
    (b"go-http-client", "go"),
    (b"python-urllib", "python"),
)


def tool_of(headers: Headers) -> str:
    """The name in User-Agent, or else the user that a proxy setting inside names (``http://pip@…``); "" for none."""
    named = ""
    for name, value in headers:
        match name.lower():
            case b"user-agent":
                return _product(value)
            case b"proxy-authorization":
                named = _user(value)
    return named


def _product(value: bytes) -> str:
    text = value.lower()
    for part, tool in _KNOWN:
        if part in text:
            return tool
    found = _PRODUCT.match(value)
    return found[0].decode().lower() if found else ""


def _user(value: bytes) -> str:
    scheme, _, coded = value.partition(b" ")
    if scheme.lower() != b"basic" or len(coded) > 256:
        return ""
    try:
        user = base64.b64decode(coded.strip(), validate=True).partition(b":")[0]
    except binascii.Error:
        return ""
    found = _PRODUCT.fullmatch(user)
    return found[0].decode().lower() if found else ""
