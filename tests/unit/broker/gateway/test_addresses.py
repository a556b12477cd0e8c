"""Addresses and host lists."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.gateway.addresses import judge, listed, parse_authority, permitted

PRIVATE = [
    "10.0.0.1", "127.0.0.1", "127.255.255.254", "172.16.0.1", "172.31.255.255", "192.168.1.1", "100.64.0.1",
    "198.18.0.1", "192.0.2.1", "203.0.113.9", "::1", "fc00::1", "fd12::1", "2001:db8::1", "::ffff:10.0.0.1",
    "::ffff:127.0.0.1", "64:ff9b::a00:1", "64:ff9b::7f00:1", "64:ff9b::808:808", "64:ff9b:1::1", "2002:a00:1::1",
    "2002:808:808::1", "2001::1", "::10.0.0.1", "::8.8.8.8", "fec0::1", "100::1", "4000::1",
]  # fmt: skip
NEVER = [
    "0.0.0.0", "0.1.2.3", "169.254.169.254", "169.254.0.1", "224.0.0.1", "255.255.255.255", "240.0.0.1",
    "100.100.100.200", "168.63.129.16", "::", "fe80::1", "fe80::1%eth0", "ff02::1", "fd00:ec2::254",
    "::ffff:169.254.169.254", "::ffff:0.0.0.0", "64:ff9b::a9fe:a9fe", "2002:a9fe:a9fe::1",
]  # fmt: skip
PUBLIC = ["8.8.8.8", "1.1.1.1", "104.16.0.1", "172.32.0.1", "100.128.0.1", "2606:4700::1", "::ffff:8.8.8.8"]


@pytest.mark.parametrize("address", PRIVATE)
def test_private(address: str) -> None:
    assert judge(address) == "private"


@pytest.mark.parametrize("address", NEVER)
def test_never(address: str) -> None:
    assert judge(address) == "never"


@pytest.mark.parametrize("address", PUBLIC)
def test_public(address: str) -> None:
    assert judge(address) == "public"


@given(st.ip_addresses(v=4))
def test_a_mapped_address_is_judged_as_what_it_maps(address: object) -> None:
    assert judge(f"::ffff:{address}") == judge(str(address))


@given(st.ip_addresses())
def test_public_is_global_by_the_standard_library_too(address: object) -> None:
    text = str(address)
    if judge(text) == "public" and not text.startswith("::ffff:"):
        assert getattr(address, "is_global")  # noqa: B009


def test_only_what_passes_is_left() -> None:
    found = ["10.0.0.1", "8.8.8.8", "169.254.169.254", "::1"]
    assert permitted(found, private=False) == ["8.8.8.8"]
    assert permitted(found, private=True) == ["10.0.0.1", "8.8.8.8", "::1"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("shop.example:443", ("shop.example", 443)),
        ("Shop.Example.:443", ("shop.example", 443)),
        ("[::1]:443", ("::1", 443)),
        ("1.2.3.4:80", ("1.2.3.4", 80)),
        ("my_host:1", ("my_host", 1)),
        ("shop.example", None),
        ("shop.example:", None),
        ("shop.example:0", None),
        ("shop.example:65536", None),
        ("shop.example:-1", None),
        ("shop.example:4 43", None),
        ("shop.example:\u0664\u0663", None),
        (":443", None),
        ("::1:443", None),
        ("[::1]443", None),
        ("[::1%eth0]:443", None),
        ("[1.2.3.4]:443", None),
        ("a..b:443", None),
        ("-a:443", None),
        ("user@host:443", None),
        ("host/path:443", None),
        ("h\u00f6st:443", None),
        ("host\n:443", None),
        ("a" * 64 + ":443", None),
    ],
)
def test_authorities(text: str, expected: tuple[str, int] | None) -> None:
    assert parse_authority(text) == expected


@pytest.mark.parametrize(
    ("host", "port", "rule", "allowed"),
    [
        ("shop.example", 443, "shop.example", True),
        ("shop.example", 443, "SHOP.EXAMPLE", True),
        ("shop.example", 80, "shop.example", False),
        ("shop.example", 8443, "shop.example:8443", True),
        ("shop.example", 443, "shop.example:8443", False),
        ("evil-shop.example", 443, "shop.example", False),
        ("shop.example.evil", 443, "shop.example", False),
        ("a.shop.example", 443, "shop.example", False),
        ("a.shop.example", 443, "*.shop.example", True),
        ("a.b.shop.example", 443, "*.shop.example", True),
        ("shop.example", 443, "*.shop.example", False),
        ("evilshop.example", 443, "*.shop.example", False),
        ("anything", 443, "*", False),
        ("anything", 443, "", False),
        ("::1", 443, "[::1]", True),
    ],
)
def test_lists(host: str, port: int, rule: str, allowed: bool) -> None:
    assert listed(host, port, [rule]) is allowed
    assert listed(host, port, ["other.example", rule]) is allowed


def test_any_port() -> None:
    assert listed("h", 5, ["h"], default_port=None)
    assert not listed("h", 5, ["h:6"], default_port=None)


@given(st.text(max_size=40))
def test_any_text_is_an_authority_or_not(text: str) -> None:
    parsed = parse_authority(text)
    assert parsed is None or (parsed[0].isascii() and 0 < parsed[1] < 65536)
