"""Starts the agent server. The one way to start it, in every driver::

    PYTHON -I -S DIR/sandbox_agent/__main__.py --socket-dir SOCKETS --vol VOLUME

``PYTHON`` is an interpreter of 3.11 or later (in the image ``python3``, in the process driver the
broker's own ``sys.executable``, virtual environment or not). ``SOCKETS`` holds ``agent``,
``gateway`` and ``egress`` (``/run/cortex``), ``VOLUME`` the home (``/vol``). Nothing is read from
the environment, no secret is passed. ``-S`` saves 10 ms, so the dependencies (msgpack,
websockets, uvloop) are looked for here: ``DIR/lib`` (the image has ``/opt/cortex/lib``), ``DIR``
itself when it is a site-packages, the interpreter's virtual environment, its own prefix.

Exit codes: 0 told to stop, 64 bad arguments, 70 broken installation, 75 no broker.
"""

import os
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def dependency_dirs(root: str = ROOT, executable: str = sys.executable) -> list[str]:
    """Directories that may hold the dependencies, best first."""
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    above = os.path.dirname(os.path.dirname(executable))
    dirs = [os.path.join(root, "lib"), root]
    for prefix in dict.fromkeys((above, sys.prefix, sys.base_prefix)):
        dirs += [os.path.join(prefix, "lib", version, name) for name in ("site-packages", "dist-packages")]
    dirs += ["/usr/lib/python3/dist-packages"]
    return [path for path in dirs if os.path.isdir(os.path.join(path, "msgpack"))]


if __name__ == "__main__":
    sys.path.append(ROOT)
    sys.path += dependency_dirs()[:1]
    try:
        from sandbox_agent.boot import main
    except ImportError as error:
        os.write(2, f"agent server: broken installation: {error}\n".encode())
        sys.exit(70)
    sys.exit(main(sys.argv[1:]))
