from __future__ import annotations

from sandbox_agent import proxies


def test_every_proxy_is_the_way_out_and_loopback_is_reached_directly() -> None:
    env = proxies.variables(4181)
    addresses = {name: value for name, value in env.items() if name.lower().endswith("_proxy")}
    direct = {name: value for name, value in addresses.items() if "no_proxy" in name.lower()}
    assert set(direct.values()) == {"127.0.0.1,localhost,::1"} == {env["npm_config_noproxy"]}
    assert {value for name, value in addresses.items() if name not in direct} == {"http://127.0.0.1:4181"}
    assert "YARN_NO_PROXY" not in env, "yarn stops at it"


def test_a_jvm_is_told_by_properties() -> None:
    words = proxies.variables(4181)["JAVA_TOOL_OPTIONS"].split(" ")
    assert {f"-D{scheme}.proxyPort=4181" for scheme in ("http", "https")} < set(words)
    assert {f"-D{scheme}.proxyHost=127.0.0.1" for scheme in ("http", "https")} < set(words)
    assert "-Dhttp.nonProxyHosts=localhost|127.0.0.1|[::1]" in words


def test_a_users_own_options_of_the_jvm_do_not_take_the_proxy_away() -> None:
    ours = proxies.variables(4181)
    full = proxies.over(ours, {"JAVA_TOOL_OPTIONS": "-Xmx1g", "A": "b"})
    assert full["JAVA_TOOL_OPTIONS"] == f"{ours['JAVA_TOOL_OPTIONS']} -Xmx1g"
    assert full["A"] == "b"
    assert proxies.over(ours, {"JAVA_TOOL_OPTIONS": ""})["JAVA_TOOL_OPTIONS"] == ""
    assert proxies.over({}, {"JAVA_TOOL_OPTIONS": "-Xmx1g"}) == {"JAVA_TOOL_OPTIONS": "-Xmx1g"}
