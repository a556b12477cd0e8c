"""Rules of hosts: what may be written, and what is said of the rest."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from broker.config_types import HostRule
from broker.gateway.addresses import listed

RULE = TypeAdapter(HostRule)


@pytest.mark.parametrize(
    ("written", "kept"),
    [
        ("Example.COM", "example.com"),
        (" a.example:8443 ", "a.example:8443"),
        ("*.example.com", "*.example.com"),
        ("*.example.com:80", "*.example.com:80"),
        ("127.0.0.2:8000", "127.0.0.2:8000"),
        ("localhost", "localhost"),
    ],
)
def test_what_may_be_written(written: str, kept: str) -> None:
    assert RULE.validate_python(written) == kept


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("https://example.com", "without https://"),
        ("example.com/simple", "without a path"),
        ("example.com:", "a port, 1 to 65535"),
        ("example.com:0", "a port, 1 to 65535"),
        ("example.com:65536", "a port, 1 to 65535"),
        ("example.com:٣", "a port, 1 to 65535"),
        ("[::1]:443", "IPv6 addresses cannot be listed"),
        ("*", "a wildcard is"),
        ("a.*.example", "a wildcard is"),
        ("*.*.example", "a wildcard is"),
        ("*.com", "allows too much"),
        ("*.0.0.1", "allows too much"),
        ("", "not a host name"),
        ("a..b", "not a host name"),
        ("-a.example", "not a host name"),
        ("exa mple.org", "not a host name"),
        ("x" * 254, "not a host name"),
    ],
)
def test_what_may_not_and_what_is_said_of_it(written: str, said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        RULE.validate_python(written)


@given(st.text(alphabet="aB1.-_*:/[] 8443", max_size=20))
def test_every_rule_that_may_be_written_allows_something(written: str) -> None:
    """The gateway reads rules by itself: what is accepted here means something there, and a name means itself."""
    try:
        rule = RULE.validate_python(written)
    except ValidationError:
        return
    host, _, port = rule.replace("*.", "below.").partition(":")
    assert listed(host, int(port or 443), [rule])
    assert not listed("elsewhere.invalid", int(port or 443), [rule])
