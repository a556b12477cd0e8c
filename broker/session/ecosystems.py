"""Ready-made lists of hosts: what the package tools of an ecosystem have to reach, and nothing else. Pure data.

The hosts are the tools' own defaults (pip, npm, yarn, go, cargo, rustup, Maven, Gradle, gem, Bundler, apt, git)
with those that these redirect downloads to; a mirror or a registry of one's own is listed by name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from broker.config_types import Ecosystem
from broker.gateway.addresses import listed

# Files of releases, which other ecosystems' downloads are redirected to as well.
_RELEASES = ("github.com", "objects.githubusercontent.com", "release-assets.githubusercontent.com")

HOSTS: Mapping[Ecosystem, tuple[str, ...]] = {
    "python": ("pypi.org", "files.pythonhosted.org", "bootstrap.pypa.io"),
    # nodejs.org: headers that native modules are built with; repo.yarnpkg.com: yarn itself, through corepack.
    "node": ("registry.npmjs.org", "registry.yarnpkg.com", "repo.yarnpkg.com", "nodejs.org"),
    # The module proxy sends large archives, and go.dev the toolchain, from Google's storage.
    "go": ("proxy.golang.org", "sum.golang.org", "go.dev", "dl.google.com", "storage.googleapis.com"),
    "rust": ("index.crates.io", "static.crates.io", "crates.io", "static.rust-lang.org", "sh.rustup.rs"),
    "java": (
        *("repo.maven.apache.org", "repo1.maven.org"),
        *("plugins.gradle.org", "plugins-artifacts.gradle.org"),
        # What a Gradle wrapper downloads.
        *("services.gradle.org", "downloads.gradle.org", "downloads.gradle-dn.com", *_RELEASES),
    ),
    "ruby": ("rubygems.org", "index.rubygems.org", "cache.ruby-lang.org"),
    # Signed by their publisher, so apt fetches them without TLS.
    "debian": ("deb.debian.org:80", "deb.debian.org", "security.debian.org:80", "security.debian.org"),
    "git": (
        *(*_RELEASES, "codeload.github.com", "raw.githubusercontent.com"),
        *("media.githubusercontent.com", "github-cloud.githubusercontent.com"),
        *("gitlab.com", "bitbucket.org", "codeberg.org"),
    ),
}

TOOLS: Mapping[Ecosystem, str] = {
    "python": "pip",
    "node": "npm",
    "go": "go",
    "rust": "cargo",
    "java": "a JVM",
    "ruby": "gem",
    "debian": "apt",
    "git": "git",
}
"""Which tool asks for an ecosystem's hosts as a rule."""


def hosts_of(names: Iterable[Ecosystem]) -> tuple[str, ...]:
    """The hosts of all of them, each once."""
    return tuple(dict.fromkeys(host for name in names for host in HOSTS[name]))


def ecosystem_of(host: str, port: int) -> Ecosystem | None:
    """The one that a host belongs to; those of git that others need too are git's."""
    order: tuple[Ecosystem, ...] = ("git", *HOSTS)
    return next((name for name in order if listed(host, port, HOSTS[name])), None)
