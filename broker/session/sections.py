"""The eight sections of a user's configuration and the ``SandboxConfig`` they make.

A section comes as JSON (control API, HTTP source) or TOML (watched directory), is validated on its
own, and is stored as it was written. ``assemble`` lays sections over defaults.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, StringConstraints, TypeAdapter, ValidationError, model_validator

from broker.config import AgentName, Config, Section
from broker.config_types import Ecosystem, HostRule
from broker.errors import Code, CortexError
from broker.problems import Problem, from_validation, nearest

MAX_SECTION_BYTES = 256 * 2**10
"""Largest section as JSON."""

_TEXT = r"^[^\x00]*$"
Text = Annotated[str, StringConstraints(max_length=4096, pattern=_TEXT)]
LongText = Annotated[str, StringConstraints(max_length=32_768, pattern=_TEXT)]
ServerName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9 ._@/-]{0,63}$")]
HeaderName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9!#$%&'*+.^_`|~-]{1,64}$")]
HeaderValue = Annotated[str, StringConstraints(max_length=8192, pattern=r"^[^\x00\r\n]*$")]

_ENV_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}")
_TAKEN_PREFIXES = ("LD_", "DYLD_", "CORTEX_")
_TAKEN = frozenset(
    {"PATH", "HOME", "PWD", "USER", "LOGNAME", "SHELL", "IFS", "ENV", "BASH_ENV"}
    | {"PYTHONPATH", "PYTHONHOME", "PYTHONSTARTUP", "PYTHONUSERBASE", "GCONV_PATH", "NLSPATH"}
    | {"HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"}
)


def _env_name(name: str) -> str:
    if not _ENV_NAME.fullmatch(name):
        raise ValueError("an environment variable is letters, digits and _, and does not begin with a digit")
    if name.upper() in _TAKEN or name.upper().startswith(_TAKEN_PREFIXES):
        raise ValueError(f"{name} is set by the sandbox itself and cannot be changed")
    return name


EnvName = Annotated[str, AfterValidator(_env_name)]
Env = Annotated[dict[EnvName, LongText], Field(max_length=256)]


class AgentOptions(Section):
    """More for one agent: ``args`` are appended to its command."""

    env: Env = Field({})
    args: Annotated[tuple[Text, ...], Field(max_length=64)] = ()


class SettingsSection(Section):
    """``team``: whose budget and usage the user's calls count for, too."""

    team: Annotated[str, StringConstraints(pattern=r"^([A-Za-z0-9][A-Za-z0-9._@+:|-]{0,127})?$")] = ""
    model: Annotated[str, StringConstraints(max_length=200, pattern=r"^[^\x00-\x1f]*$")] | None = None
    allow_client_mcp: bool = False
    permission_policy: Literal["ask", "allow", "deny"] = "ask"
    agent: Annotated[dict[AgentName, AgentOptions], Field(max_length=32)] = Field({})


class McpServer(Section):
    """A local server (``command``) or one reached by ``url``; never both."""

    type: Literal["stdio", "http", "sse"] | None = None
    command: Annotated[Text, StringConstraints(min_length=1)] | None = None
    args: Annotated[tuple[Text, ...], Field(max_length=128)] = ()
    env: Annotated[dict[EnvName, LongText], Field(max_length=128)] = Field({})
    url: Annotated[str, StringConstraints(max_length=4096, pattern=r"^https?://[^\s\x00]+$")] | None = None
    headers: Annotated[dict[HeaderName, HeaderValue], Field(max_length=64)] = Field({})

    @property
    def kind(self) -> Literal["stdio", "http", "sse"]:
        """``type``, or what follows from the keys that are there."""
        return self.type or ("http" if self.url else "stdio")

    @model_validator(mode="after")
    def _one_kind(self) -> McpServer:
        if self.kind == "stdio":
            if not self.command:
                raise ValueError('needs "command" (a local server) or "url" (a remote one)')
            if self.url or self.headers:
                raise ValueError('a server with "command" has neither "url" nor "headers"')
        elif not self.url:
            raise ValueError(f'a server of type "{self.kind}" needs "url"')
        elif self.command or self.args or self.env:
            raise ValueError('a server with "url" has no "command", "args" or "env"')
        return self

    def acp(self, name: str) -> dict[str, Any]:
        """As an ACP ``McpServer`` object."""
        if self.kind == "stdio":
            env = [{"name": key, "value": value} for key, value in self.env.items()]
            return {"name": name, "command": self.command, "args": list(self.args), "env": env}
        headers = [{"name": key, "value": value} for key, value in self.headers.items()]
        return {"type": self.kind, "name": name, "url": self.url, "headers": headers}


class McpSection(Section):
    servers: Annotated[dict[ServerName, McpServer], Field(max_length=64)] = Field({}, alias="mcpServers")


class PluginsSection(Section):
    packages: Annotated[
        tuple[Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9@][A-Za-z0-9@._/+=:~^-]{0,199}$")], ...],
        Field(max_length=64),
    ] = ()


class ProviderChoice(Section):
    """``use``: the entry of [gateway.providers] that stands in for this one."""

    use: AgentName | None = None


def _relative(path: str) -> str:
    parts = path.split("/")
    if any(part in ("", ".", "..") for part in parts):
        raise ValueError('a relative path below the home, without "." or ".."')
    return path


class WorkspaceSection(Section):
    """``path``: the directory below the home in which agents work."""

    path: Annotated[
        str, StringConstraints(min_length=1, max_length=255, pattern=r"^[^\x00-\x1f\\]+$"), AfterValidator(_relative)
    ] = "workspace"


class EgressSection(Section):
    """Where the sandbox may go besides what its agent's settings allow. ``hosts``: ``name`` (port 443),
    ``name:port`` or ``*.name``; ``ecosystems``: ready-made lists."""

    hosts: Annotated[tuple[HostRule, ...], Field(max_length=256)] = ()
    ecosystems: Annotated[tuple[Ecosystem, ...], Field(max_length=16)] = ()


class LimitsSection(Section):
    """None: the driver's default."""

    memory_bytes: Annotated[int, Field(ge=64 * 2**20, le=2**42)] | None = None
    cpus: Annotated[float, Field(ge=0.05, le=1024)] | None = None
    pids: Annotated[int, Field(ge=16, le=2**20)] | None = None


class SandboxConfig(Section):
    """Everything a sandbox is told about its user; no credentials."""

    settings: SettingsSection = SettingsSection()
    mcp: McpSection = McpSection()
    plugins: PluginsSection = PluginsSection()
    providers: Annotated[dict[AgentName, ProviderChoice], Field(max_length=32)] = Field({})
    env: Env = Field({})
    workspace: WorkspaceSection = WorkspaceSection()
    egress: EgressSection = EgressSection()
    limits: LimitsSection = LimitsSection()


SECTIONS: tuple[str, ...] = tuple(SandboxConfig.model_fields)
"""The names of the sections: settings, mcp, plugins, providers, env, workspace, egress, limits."""

_TYPES: dict[str, Any] = {
    name: Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation
    for name, field in SandboxConfig.model_fields.items()
}
_ADAPTERS: dict[str, TypeAdapter[Any]] = {name: TypeAdapter(kind) for name, kind in _TYPES.items()}


def validate(section: str, value: object) -> dict[str, Any]:
    """The JSON object ``value`` if it is a valid ``section``: what was written, without defaults.

    Raises ``CortexError``: ``UNKNOWN_SECTION``, or ``BAD_SECTION`` whose ``details["problems"]`` is a
    list of ``{path, what, hint}``.
    """
    check_name(section)
    if not isinstance(value, dict):
        raise _bad(section, [Problem((), "a section is an object")])
    try:
        text = json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise _bad(section, [Problem((), f"not JSON: {error}")]) from error
    if len(text) > MAX_SECTION_BYTES:
        raise _bad(section, [Problem((), f"larger than {MAX_SECTION_BYTES} bytes")])
    try:
        adapter = _ADAPTERS[section]
        parsed = adapter.validate_json(text, strict=True)
    except ValidationError as error:
        raise _bad(section, from_validation(error, _TYPES[section])) from error
    result: dict[str, Any] = adapter.dump_python(parsed, mode="json", by_alias=True, exclude_unset=True)
    return result


def check_name(section: str) -> None:
    """Raises ``UNKNOWN_SECTION`` unless ``section`` is one of ``SECTIONS``."""
    if section not in SECTIONS:
        raise CortexError(
            Code.UNKNOWN_SECTION,
            f"there is no section {section[:40]!r}",
            hint=nearest(section[:40], SECTIONS),
            details={"sections": list(SECTIONS)},
        )


def assemble(*layers: Mapping[str, Mapping[str, Any]]) -> SandboxConfig:
    """Lays ``layers`` (section → value) over each other, later ones on top, and validates the sum.

    A section's keys are taken one by one; of ``mcpServers`` and ``settings.agent`` the entries are.
    Anything else is replaced whole. Raises ``CortexError`` as ``validate`` does.
    """
    merged: dict[str, dict[str, Any]] = {}
    for layer in layers:
        for section, value in layer.items():
            check_name(section)
            merged[section] = _over(merged.get(section, {}), value)
    checked = {section: validate(section, value) for section, value in merged.items()}
    return SandboxConfig.model_validate_json(json.dumps(checked), strict=True)


def default_problems(config: Config) -> list[Problem]:
    """What is wrong with the ``[defaults]`` of a settings tree; a check for ``broker.settings.load``."""
    found: list[Problem] = []
    for section in SECTIONS:
        try:
            validate(section, getattr(config.defaults, section))
        except CortexError as error:
            for item in error.details["problems"]:
                path = ("defaults", section, *(part for part in item["path"].split(".") if part))
                found.append(Problem(path, item["what"], item["hint"]))
    return found


def _over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(below)
    for key, value in above.items():
        old = result.get(key)
        if key in ("mcpServers", "agent") and isinstance(old, dict) and isinstance(value, dict):
            value = {**old, **value}
        result[key] = value
    return result


def _bad(section: str, problems: list[Problem]) -> CortexError:
    first = problems[0]
    more = f" and {len(problems) - 1} more" if len(problems) > 1 else ""
    return CortexError(
        Code.BAD_SECTION,
        f"section {section!r} is not valid: {first}{more}",
        hint=first.hint or f"correct {'.'.join(first.path) or 'it'} and put the section again",
        details={"section": section, "problems": [problem.as_dict() for problem in problems]},
    )
