"""Joins stdin and stdout with a Unix socket; the MCP server that agents are given. Standard library only::

    PYTHON -I -S mux_shim.py SOCKET

Modules in C where there is a choice: ``os`` and ``socket`` double the time to start. Ends when the socket
does; the end of stdin is passed on, what is still on its way back is not lost.
"""

import _socket
import _thread
import posix
import sys

CHUNK = 65_536


def _write(data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[posix.write(1, view) :]


def _to_socket(sock: _socket.socket) -> None:
    try:
        while data := posix.read(0, CHUNK):
            sock.sendall(data)
        sock.shutdown(_socket.SHUT_WR)
    except OSError:  # the other side has gone: the main thread sees it too
        return


def main(path: str) -> int:
    """Returns the exit code: 0 at the end of the connection, 69 when there was none."""
    sock = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
    try:
        sock.connect(path)
    except OSError as error:
        posix.write(2, f"the MCP multiplexer is not there: {error}\n".encode())
        return 69
    _thread.start_new_thread(_to_socket, (sock,))
    try:
        while data := sock.recv(CHUNK):
            _write(data)
    except OSError:  # nobody reads us any more, or the connection was reset
        return 0
    return 0


if __name__ == "__main__":
    if len(sys.argv) != 2:
        posix.write(2, b"usage: mux_shim.py SOCKET\n")
        posix._exit(64)
    posix._exit(main(sys.argv[1]))  # at once: the other thread may be waiting for stdin
