"""Stands in for the agent server: dials the slot's agent socket and runs the Python that it is sent.

Standard library only. One JSON object a line, each way: out ``{"pid"}`` at once, then for each
``{"code"}`` that comes in, ``{"result"}`` or ``{"error"}``. It dials again when the socket closes.
"""

import json
import os
import socket
import sys
import time


def serve(path: str) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(path)
        with sock.makefile("rw") as stream:
            stream.write(json.dumps({"pid": os.getpid()}) + "\n")
            stream.flush()
            for line in stream:
                space: dict[str, object] = {"result": None}
                try:
                    exec(json.loads(line)["code"], space)
                    answer = {"result": space["result"]}
                except Exception as error:  # noqa: BLE001
                    answer = {"error": f"{type(error).__name__}: {error}"}
                stream.write(json.dumps(answer) + "\n")
                stream.flush()


def main() -> None:
    where = dict(zip(sys.argv[1::2], sys.argv[2::2], strict=True))
    print("dialler is up", flush=True)
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            serve(where["--socket-dir"] + "/agent")
            deadline = time.monotonic() + 30
        except OSError:
            pass
        time.sleep(0.02)


main()
