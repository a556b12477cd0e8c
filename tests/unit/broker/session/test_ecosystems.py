from __future__ import annotations

from typing import get_args

from pydantic import TypeAdapter

from broker.config_types import Ecosystem, HostRule
from broker.session.ecosystems import HOSTS, ecosystem_of, hosts_of


def test_there_is_a_list_for_every_name_that_settings_take() -> None:
    assert set(HOSTS) == set(get_args(Ecosystem))


def test_every_host_is_one_that_a_user_could_write_and_no_wildcard() -> None:
    for name, hosts in HOSTS.items():
        assert hosts == tuple(TypeAdapter(HostRule).validate_python(host) for host in hosts), name
        assert len(set(hosts)) == len(hosts), name
        assert not any("*" in host for host in hosts), "anybody may have a name below such a one"


def test_hosts_of_several_are_there_once() -> None:
    both = hosts_of(("java", "git"))
    assert set(both) == {*HOSTS["java"], *HOSTS["git"]}
    assert len(set(both)) == len(both)
    assert hosts_of(()) == ()


def test_the_ecosystem_of_a_host() -> None:
    assert ecosystem_of(HOSTS["python"][0], 443) == "python"
    assert ecosystem_of(HOSTS["python"][0], 8443) is None
    shared = next(host for host in HOSTS["git"] if host in HOSTS["java"])
    assert ecosystem_of(shared, 443) == "git"
    assert ecosystem_of("elsewhere.example", 443) is None
