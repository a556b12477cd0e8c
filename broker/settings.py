"""Reads the settings: file, environment, command line; then every path in them is made absolute.

A value comes from the command line, else ``CORTEX_SECTION__KEY``, else the file, else its default.
All that is wrong is found at once and raised as one ``CortexError`` (``BAD_CONFIG``).
"""

from __future__ import annotations

import json
import math
import os
import re
import socket
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_origin

from pydantic import ValidationError

from broker.config import Config
from broker.errors import Code, CortexError
from broker.problems import Problem, from_validation, nearest, type_at
from broker.toml_lines import line_of, locate

SYSTEM_CONFIG = Path("/etc/cortex/config.toml")
MAX_FILE_BYTES = 2**20
ENV_PREFIX = "CORTEX_"
VAULT_KEY_CREDENTIAL = "cortex-vault.key"
"""Name of the systemd credential that holds the vault's keys."""

Check = Callable[[Config], list[Problem]]
"""A check by a higher layer; problem paths are from the root of the tree."""

_RESTART = (
    *("broker.state_dir", "broker.runtime_dir", "broker.node", "broker.users_dir", "broker.log_format"),
    *("front.listen", "control.listen", "control.admin_token_file", "control.hook_secrets_file"),
    *("sandbox.driver", "sandbox.uid", "sandbox.ca_file", "sandbox.docker", "sandbox.process"),
    *("gateway.mode", "gateway.link", "vault.key_file"),
)
_FILE_KEYS = (
    *("control.admin_token_file", "control.hook_secrets_file", "session.config_url_token_file"),
    *("sandbox.ca_file", "gateway.link"),
)
_MISSING_NAME = re.compile(r"^(\S+) '(.*)' is not in \[(.+)\]$")


@dataclass(frozen=True)
class Loaded:
    """``origins``: dotted key → where its value is from; ``path``: the file read, None without one."""

    config: Config
    origins: Mapping[str, str]
    path: Path | None


@dataclass
class _Sources:
    """The raw tree while it is put together, and where each value in it is from."""

    env: Mapping[str, str]
    path: Path | None
    tree: dict[str, Any] = field(default_factory=dict)
    lines: Mapping[tuple[str, ...], int] = field(default_factory=dict)
    given: dict[tuple[str, ...], str] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def origin(self, path: Sequence[str]) -> str:
        for length in range(len(path), 0, -1):
            name = self.given.get(tuple(path[:length]))
            if name is not None:
                return name
        line = line_of(self.lines, path)
        if line is not None:
            return f"{self.path}:{line}"
        # A table that the file does not know came with what was given below it.
        return next((name for key, name in self.given.items() if path and key[: len(path)] == tuple(path)), "")

    def has(self, path: Sequence[str]) -> bool:
        table: Any = self.tree
        for part in path:
            if not isinstance(table, dict) or part not in table:
                return False
            table = table[part]
        return True

    def set(self, path: Sequence[str], value: object, origin: str) -> None:
        table = self.tree
        for part in path[:-1]:
            below = table.setdefault(part, {})
            if not isinstance(below, dict):
                self.problems.append(Problem(tuple(path), "is below a key that is not a table"))
                return
            table = below
        table[path[-1]] = value
        self.given[tuple(path)] = origin


def load(
    path: Path | None,
    env: Mapping[str, str],
    *,
    root: bool | None = None,
    overrides: Mapping[str, Any] | None = None,
    checks: Sequence[Check] = (),
) -> Loaded:
    """The settings of ``path``, or of the first file that ``find`` knows, or none.

    ``overrides`` (dotted key → value) come from the command line; ``checks`` are run on a tree that
    the schema accepts. Raises ``CortexError`` (``BAD_CONFIG``); ``details["problems"]`` is a list of
    ``{path, what, hint, origin, line}``.
    """
    sources = _Sources(env, find(path, env, root=root))
    if sources.path is not None:
        _read_file(sources, sources.path)
    _read_env(sources)
    for key, value in (overrides or {}).items():
        sources.set(key.split("."), value, "command line")
    config = _validated(sources)
    origins = {dotted(key): sources.origin(key) if sources.has(key) else "default" for key, _ in leaves(config)}
    config = _Resolver(sources, origins).resolve(config)
    for check in checks:
        sources.problems.extend(check(config))
    _raise_if_bad(sources)
    return Loaded(config, origins, sources.path)


def find(path: Path | None, env: Mapping[str, str], *, root: bool | None = None) -> Path | None:
    """``path``, else $CORTEX_CONFIG, else the system's file (root, systemd), else the user's; None: no file."""
    named = path or (Path(env["CORTEX_CONFIG"]) if env.get("CORTEX_CONFIG") else None)
    if named is not None:
        return named.expanduser().absolute()
    is_root = os.geteuid() == 0 if root is None else root
    places = [SYSTEM_CONFIG] if is_root or "INVOCATION_ID" in env else []
    places.append(_xdg(env, "XDG_CONFIG_HOME", ".config") / "cortex" / "config.toml")
    return next((place for place in places if place.is_file()), None)


def changed(old: Config, new: Config) -> tuple[list[str], list[str]]:
    """The dotted keys whose values differ, and those of them that need a restart."""
    before = {dotted(key): value for key, value in leaves(old)}
    after = {dotted(key): value for key, value in leaves(new)}
    keys = sorted(key for key in before.keys() | after.keys() if before.get(key) != after.get(key))
    return keys, [key for key in keys if key.startswith(_RESTART)]


def leaves(config: Config) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every key with its JSON value, in the order of the schema. Empty tables are values."""
    yield from _leaves((), config.model_dump(mode="json"))


def _leaves(path: tuple[str, ...], value: Any) -> Iterator[tuple[tuple[str, ...], Any]]:
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _leaves((*path, key), item)
    else:
        yield path, value


def dotted(path: Sequence[str]) -> str:
    """A TOML key: parts that are not bare are quoted."""
    return ".".join(part if re.fullmatch(r"[A-Za-z0-9_-]+", part) else json.dumps(part) for part in path)


def _read_file(sources: _Sources, path: Path) -> None:
    try:
        data = path.read_bytes()
        if len(data) > MAX_FILE_BYTES:
            raise OSError(f"larger than {MAX_FILE_BYTES} bytes")
        text = data.decode("utf-8-sig").replace("\r\n", "\n")
    except (OSError, UnicodeDecodeError) as error:
        raise CortexError(
            Code.BAD_CONFIG, f"cannot read {path}", cause=error, hint="name another file with --config or CORTEX_CONFIG"
        ) from error
    try:
        sources.tree = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        place = re.search(r"at line (\d+), column (\d+)", str(error))
        where = f"{path}:{place[1]}:{place[2]}" if place else str(path)
        line = int(place[1]) if place else None
        problem = {"path": "", "what": str(error), "hint": "", "origin": where, "line": line}
        raise CortexError(
            Code.BAD_CONFIG,
            f"{where}: not TOML: {error}",
            hint="strings need quotes; see config.toml at the root of the source",
            details={"problems": [problem]},
        ) from error
    sources.lines = locate(text)
    sources.problems.extend(_not_json((), sources.tree))


def _not_json(path: tuple[str, ...], value: Any) -> Iterator[Problem]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _not_json((*path, key), item)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _not_json((*path, str(index)), item)
    elif isinstance(value, float) and not math.isfinite(value):
        yield Problem(path, "must be a finite number")
    elif not isinstance(value, (str, int, float)):
        yield Problem(path, "a date or time is not a setting; put it in quotes")


def _read_env(sources: _Sources) -> None:
    for name in sorted(sources.env):
        if name.startswith(ENV_PREFIX) and "__" in name:
            path = _env_path(name.removeprefix(ENV_PREFIX).split("__"), sources.tree)
            sources.set(path, _env_value(sources.env[name], type_at(Config, path)), f"environment {name}")


def _env_path(parts: Sequence[str], tree: Mapping[str, Any]) -> list[str]:
    """Lower-cases names and matches those of entries that exist (``CODEX_RAW`` is ``codex-raw``)."""
    path: list[str] = []
    table: Any = tree
    for part in parts:
        name = part.lower()
        if type_at(Config, path) == dict[str, str]:
            name = part
        elif isinstance(table, dict) and name not in table:
            name = next((key for key in table if key.lower().replace("-", "_") == name), name)
        path.append(name)
        table = table.get(name) if isinstance(table, dict) else None
    return path


def _env_value(text: str, kind: Any) -> Any:
    """A string where the schema wants one, else a TOML value; lists may be ``a,b``."""
    if kind in (str, Path):
        return text
    if get_origin(kind) is tuple and not text.lstrip().startswith("["):
        return [part.strip() for part in text.split(",") if part.strip()]
    try:
        return tomllib.loads(f"value = {text}")["value"] if "\n" not in text else text
    except tomllib.TOMLDecodeError:
        return text


def _validated(sources: _Sources) -> Config:
    _raise_if_bad(sources)
    try:
        return Config.model_validate_json(json.dumps(sources.tree, default=str), strict=True)
    except ValidationError as error:
        sources.problems.extend(_named(problem, sources.tree) for problem in from_validation(error, Config))
        raise _bad(sources) from error


def _named(problem: Problem, tree: Mapping[str, Any]) -> Problem:
    """A problem of the whole tree names its key in its text; gives it that path and a hint."""
    match = _MISSING_NAME.match(problem.what)
    if problem.path or match is None:
        return problem
    table: Any = tree
    for part in match[3].split("."):
        table = table.get(part, {}) if isinstance(table, dict) else {}
    names = {*table, "demo"} if match[3] == "agents" else set(table)
    hint = nearest(match[2], names) or f"add [{match[3]}.{match[2]}]"
    return Problem(tuple(match[1].split(".")), f"'{match[2]}' is not in [{match[3]}]", hint)


def _raise_if_bad(sources: _Sources) -> None:
    if sources.problems:
        raise _bad(sources)


def _bad(sources: _Sources) -> CortexError:
    details: list[dict[str, Any]] = []
    for problem in sources.problems:
        origin = sources.origin(problem.path)
        from_file = origin.startswith(f"{sources.path}:")
        line = line_of(sources.lines, problem.path) if from_file else None
        details.append({**problem.as_dict(), "origin": origin, "line": line})
    told = [
        f"{item['origin'] or 'defaults'}: {problem}" for item, problem in zip(details, sources.problems, strict=True)
    ]
    return CortexError(
        Code.BAD_CONFIG,
        "\n".join([f"the settings have {len(told)} problem{'s' if len(told) > 1 else ''}:", *told]),
        hint="correct them and run: cortex config check",
        details={"problems": details},
    )


def _xdg(env: Mapping[str, str], name: str, below_home: str) -> Path:
    place = Path(env.get(name, ""))
    return place if place.is_absolute() else Path(env.get("HOME") or os.path.expanduser("~")) / below_home


class _Resolver:
    """Makes paths absolute: ``~``, ``{state_dir}`` and the like; relative ones are the file's neighbours."""

    def __init__(self, sources: _Sources, origins: dict[str, str]) -> None:
        self._sources = sources
        self._origins = origins
        self._base = sources.path.parent if sources.path else Path.cwd()
        self._places: dict[str, str] = {}
        if credentials := sources.env.get("CREDENTIALS_DIRECTORY"):
            self._places["credentials"] = credentials

    def resolve(self, config: Config) -> Config:
        updates: dict[str, Any] = {}
        broker = config.broker
        state = self._directory("broker.state_dir", broker.state_dir, self._state_default)
        self._places["state_dir"] = str(state)
        runtime = self._directory("broker.runtime_dir", broker.runtime_dir, self._runtime_default)
        self._places["runtime_dir"] = str(runtime)
        updates["broker.state_dir"] = state
        updates["broker.runtime_dir"] = runtime
        updates["broker.users_dir"] = self._directory(
            "broker.users_dir", broker.users_dir, lambda: ("default", state / "users")
        )
        updates["broker.node"] = broker.node or socket.gethostname()
        updates["sandbox.docker.host"] = config.sandbox.docker.host or self._docker_host()
        updates["sandbox.process.visible"] = tuple(
            self._file("sandbox.process.visible", item) for item in config.sandbox.process.visible
        )
        for key in _FILE_KEYS:
            updates[key] = self._file(key, _get(config, key))
        providers = {
            name: _updated(
                provider,
                {
                    key: self._file(f"gateway.providers.{name}.{key}", _get(provider, key))
                    for key in ("credential_file", "ca_file", "oauth.client_secret_file")
                },
            )
            for name, provider in config.gateway.providers.items()
        }
        updates["gateway.providers"] = providers
        updates["vault.key_file"] = self._vault_key(config.vault.key_file, state)
        resolved: Config = _updated(config, updates)
        return resolved

    def _directory(self, key: str, value: Path | None, default: Callable[[], tuple[str, Path]]) -> Path:
        if value is not None:
            return Path(self._file(key, str(value)))
        self._origins[key], path = default()
        return path

    def _state_default(self) -> tuple[str, Path]:
        if given := self._sources.env.get("STATE_DIRECTORY"):
            return "environment STATE_DIRECTORY", Path(given.split(":")[0])
        return "default", _xdg(self._sources.env, "XDG_STATE_HOME", ".local/state") / "cortex"

    def _runtime_default(self) -> tuple[str, Path]:
        if given := self._sources.env.get("RUNTIME_DIRECTORY"):
            return "environment RUNTIME_DIRECTORY", Path(given.split(":")[0])
        if given := self._sources.env.get("XDG_RUNTIME_DIR"):
            return "environment XDG_RUNTIME_DIR", Path(given) / "cortex"
        return "default", Path(self._places["state_dir"]) / "run"

    def _docker_host(self) -> str:
        if given := self._sources.env.get("DOCKER_HOST"):
            self._origins["sandbox.docker.host"] = "environment DOCKER_HOST"
            return given
        return "unix:///var/run/docker.sock"

    def _vault_key(self, value: str, state: Path) -> str:
        if value:
            return self._file("vault.key_file", value)
        credentials = self._places.get("credentials")
        if credentials and (passed := Path(credentials, VAULT_KEY_CREDENTIAL)).exists():
            self._origins["vault.key_file"] = "environment CREDENTIALS_DIRECTORY"
            return str(passed)
        return str(state / "vault.key")

    def _file(self, key: str, value: str) -> str:
        """``value`` as an absolute path; "" stays."""
        if not value:
            return value

        def place(match: re.Match[str]) -> str:
            name = match[1]
            if name in self._places:
                return self._places[name]
            if name == "credentials":
                hint = "systemd sets it for units with LoadCredential="
            else:
                hint = nearest(name, ("state_dir", "runtime_dir", "credentials"))
            self._sources.problems.append(Problem(tuple(key.split(".")), f"{{{name}}} is not known here", hint))
            return "unknown"

        path = Path(re.sub(r"\{([^{}]*)\}", place, value))
        if path.parts and path.parts[0] == "~":
            path = Path(self._sources.env.get("HOME") or os.path.expanduser("~"), *path.parts[1:])
        return os.path.normpath(self._base / path)


def _get(model: Any, key: str) -> Any:
    value = model
    for part in key.split("."):
        value = getattr(value, part)
    return value


def _updated(model: Any, updates: Mapping[str, Any]) -> Any:
    """A copy of a frozen tree with some dotted keys replaced."""
    here: dict[str, Any] = {}
    below: dict[str, dict[str, Any]] = {}
    for key, value in updates.items():
        first, _, rest = key.partition(".")
        if rest:
            below.setdefault(first, {})[rest] = value
        else:
            here[first] = value
    for name, values in below.items():
        here[name] = _updated(getattr(model, name), values)
    return model.model_copy(update=here)
