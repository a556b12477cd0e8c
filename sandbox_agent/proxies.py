"""Variables that lead tools to the way out, those that ignore the usual ones included. Light: boot imports it.

What the usual ones do for git, curl, pip, apt, go, gem and npm, JAVA_TOOL_OPTIONS does for every JVM (Gradle and
its daemons with it); Maven's resolver looks at a JVM's proxy only when told to. yarn from version 2 on has
variables of its own, and stops at one that it does not know, so there is none for what needs no proxy.
"""

from __future__ import annotations

HOST = "127.0.0.1"
DIRECT = ("127.0.0.1", "localhost", "::1")
JOINED = "JAVA_TOOL_OPTIONS"
"""What a user sets here comes behind ours, where it wins."""


def variables(port: int) -> dict[str, str]:
    """Of a process in the sandbox; ``port``: where the way out listens."""
    proxy, direct = f"http://{HOST}:{port}", ",".join(DIRECT)
    env = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"), proxy)
    env |= {"NO_PROXY": direct, "no_proxy": direct}
    # npm takes the usual ones; pnpm and the first yarn take npm's.
    env |= {"npm_config_proxy": proxy, "npm_config_https_proxy": proxy, "npm_config_noproxy": direct}
    env |= {"YARN_HTTP_PROXY": proxy, "YARN_HTTPS_PROXY": proxy}
    # cargo's own git knows no proxy for every kind of address; git does.
    env |= {"CARGO_HTTP_PROXY": proxy, "CARGO_NET_GIT_FETCH_WITH_CLI": "true"}
    return env | {JOINED: _java(port)}


def over(env: dict[str, str], given: dict[str, str]) -> dict[str, str]:
    """``env`` with ``given`` laid over it."""
    full = env | given
    if given.get(JOINED) and env.get(JOINED):
        full[JOINED] = f"{env[JOINED]} {given[JOINED]}"
    return full


def _java(port: int) -> str:
    settings: dict[str, str] = {}
    for scheme in ("http", "https"):
        settings |= {f"{scheme}.proxyHost": HOST, f"{scheme}.proxyPort": str(port)}
    settings["http.nonProxyHosts"] = "localhost|127.0.0.1|[::1]"
    # The transports of Maven 3 and of Maven 4.
    settings |= dict.fromkeys(
        ("aether.connector.http.useSystemProperties", "aether.transport.apache.useSystemProperties"), "true"
    )
    return " ".join(f"-D{name}={value}" for name, value in settings.items())
