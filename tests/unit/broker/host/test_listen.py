from __future__ import annotations

import os
import socket
import stat
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from broker.errors import Code, CortexError
from broker.host.listen import listen, url


@pytest.fixture
def place() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="ctx-", dir="/tmp") as name:
        yield Path(name)


def refused(address: str) -> CortexError:
    with pytest.raises(CortexError) as caught:
        listen(address, "front.listen", {})
    assert caught.value.code is Code.BAD_CONFIG
    assert "front.listen" in caught.value.what
    assert caught.value.hint
    return caught.value


def open_(address: str, stack: ExitStack) -> list[socket.socket]:
    return [stack.enter_context(sock) for sock in listen(address, "front.listen", {})]


def test_a_tcp_address_is_listened_on_without_blocking() -> None:
    with ExitStack() as stack:
        (sock,) = open_("127.0.0.1:0", stack)
        assert not sock.getblocking()
        stack.enter_context(socket.create_connection(sock.getsockname(), timeout=2))
        assert url([sock], "ws") == f"ws://127.0.0.1:{sock.getsockname()[1]}"
        error = refused(f"127.0.0.1:{sock.getsockname()[1]}")
        assert "another port" in error.hint


def test_the_url_of_all_addresses_is_one_that_can_be_connected_to() -> None:
    with ExitStack() as stack:
        (sock,) = open_("0.0.0.0:0", stack)
        assert url([sock], "http").startswith("http://127.0.0.1:")


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="the host has no IPv6")
def test_ipv6_in_brackets() -> None:
    with ExitStack() as stack:
        try:
            (sock,) = open_("[::1]:0", stack)
        except CortexError:
            pytest.skip("no IPv6 loopback here")
        assert url([sock], "ws") == f"ws://[::1]:{sock.getsockname()[1]}"


def test_an_address_that_is_not_local() -> None:
    assert "192.0.2.1" in str(refused("192.0.2.1:0"))


def test_a_unix_socket_is_for_owner_and_group(place: Path) -> None:
    path = place / "deep" / "sock"
    with ExitStack() as stack:
        (sock,) = open_(f"unix:{path}", stack)
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o660
        assert stat.S_IMODE(os.stat(path.parent).st_mode) == 0o700
        assert url([sock], "http") == f"unix:{path}"
        client = stack.enter_context(socket.socket(socket.AF_UNIX))
        client.connect(str(path))


def test_what_a_dead_process_left_behind_is_replaced(place: Path) -> None:
    path = place / "sock"
    with ExitStack() as stack:
        (sock,) = open_(f"unix:{path}", stack)
        sock.close()
        assert path.exists()
        (again,) = open_(f"unix:{path}", stack)
        client = stack.enter_context(socket.socket(socket.AF_UNIX))
        client.connect(str(path))
        again.accept()[0].close()


def test_the_socket_of_a_live_process_is_left_alone(place: Path) -> None:
    path = place / "sock"
    with ExitStack() as stack:
        (sock,) = open_(f"unix:{path}", stack)
        assert "listens there" in str(refused(f"unix:{path}"))
        client = stack.enter_context(socket.socket(socket.AF_UNIX))
        client.connect(str(path))
        assert sock.accept()


def test_a_file_that_is_no_socket_is_left_alone(place: Path) -> None:
    path = place / "file"
    path.write_text("dear")
    refused(f"unix:{path}")
    assert path.read_text() == "dear"


def test_a_path_that_is_too_long(place: Path) -> None:
    assert "107" in refused(f"unix:{place / ('x' * 120)}").hint


def test_sockets_of_systemd_come_by_name() -> None:
    with socket.socket() as sock:
        assert listen("systemd:front", "front.listen", {"front": [sock]}) == [sock]
    assert "cortex.socket" in refused("systemd:front").hint
