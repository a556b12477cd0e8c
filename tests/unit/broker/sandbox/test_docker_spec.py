from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.config import DockerConfig
from broker.sandbox import docker_spec
from broker.sandbox.driver import SandboxSpec

SLOT = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_-]{0,20}", fullmatch=True)
SPECS = st.builds(
    SandboxSpec,
    slot=SLOT,
    incarnation=st.integers(0, 10**6),
    sock_dir=st.just(Path("/state/slots/a/sock")),
    vol_dir=st.just(Path("/state/slots/a/vol")),
    packages_dir=st.just(Path("/state/packages")),
    uid=st.integers(1, 2**31 - 2),
    role=st.sampled_from(["session", "builder"]),
    commands=st.lists(st.text(), max_size=3).map(tuple),
    labels=st.dictionaries(st.text(min_size=1), st.text(), max_size=3),
    memory_bytes=st.none() | st.integers(2**23, 2**40),
    cpus=st.none() | st.floats(0.01, 64),
    gid=st.none() | st.integers(1, 2**31 - 2),
    pids=st.none() | st.integers(16, 2**20),
)


def _config(spec: SandboxSpec, **changes: Any) -> dict[str, Any]:
    config = DockerConfig(**changes)
    labels = docker_spec.labels(spec, "inst", "node")
    return docker_spec.container_config(spec, config, image_id="sha256:abc", labels=labels)


@given(SPECS)
def test_no_spec_makes_a_container_that_can_do_more(spec: SandboxSpec) -> None:
    body = _config(spec)
    host = body["HostConfig"]
    assert host["NetworkMode"] == "none"
    assert host["ReadonlyRootfs"] is True
    assert host["Privileged"] is False
    assert host["CapDrop"] == ["ALL"]
    assert "CapAdd" not in host
    assert host["SecurityOpt"] == ["no-new-privileges"]
    assert host["Init"] is True
    assert host["Memory"] == host["MemorySwap"] > 0
    assert host["PidsLimit"] > 0
    assert host["NanoCpus"] > 0
    assert host["LogConfig"]["Config"]["max-size"]
    assert body["Image"] == "sha256:abc"
    assert body["User"].partition(":")[0] == str(spec.uid) != "0"
    mounts = {mount["Target"]: mount for mount in host["Mounts"]}
    assert set(mounts) == {"/run/cortex", "/vol", "/opt/cortex/packages"}
    assert {target for target, mount in mounts.items() if not mount["ReadOnly"]} == {"/vol"}
    assert "exec" in host["Tmpfs"]["/tmp"].split(",")
    private = set(host["Tmpfs"]["/run/cortex-credentials"].split(","))
    assert {"nosuid", "nodev", "noexec", "mode=0700", f"uid={spec.uid}", f"gid={spec.group}", "size=1048576"} <= private


@given(SPECS)
def test_labels_of_a_spec_cannot_pass_for_ours(spec: SandboxSpec) -> None:
    forged = SandboxSpec(**{**vars(spec), "labels": {"installation": "theirs", "slot": "theirs", **spec.labels}})
    labels = docker_spec.labels(forged, "inst", "node")
    assert labels["io.cortex.installation"] == "inst"
    assert labels["io.cortex.slot"] == spec.slot
    assert labels["io.cortex.incarnation"] == str(spec.incarnation)


def test_limits_of_the_spec_go_before_those_of_the_config() -> None:
    spec = SandboxSpec("a", 1, Path("s"), Path("v"), Path("p"), 5, memory_bytes=2**24, cpus=0.5, pids=40)
    host = _config(spec, memory_bytes=2**30, cpus=4, runtime="runsc")["HostConfig"]
    assert (host["Memory"], host["NanoCpus"], host["Runtime"]) == (2**24, 5 * 10**8, "runsc")
    assert host["PidsLimit"] == 40
    assert _config(replace(spec, pids=None), pids=99)["HostConfig"]["PidsLimit"] == 99
    assert all(mount["Source"].startswith("/") for mount in host["Mounts"])
    assert "Runtime" not in _config(spec)["HostConfig"]


def test_each_incarnation_has_a_name_of_its_own() -> None:
    names = {docker_spec.container_name("i", slot, n) for slot in ("a", "b") for n in range(3)}
    assert len(names) == 6


@pytest.mark.parametrize("slot", ["", "a/b", "..", "-a", "a b", "a" * 65, "ä"])
def test_a_slot_id_that_could_be_a_path_is_refused(slot: str) -> None:
    with pytest.raises(ValueError, match="slot id"):
        docker_spec.check_slot(slot)


def test_a_ca_bundle_is_mounted_and_named() -> None:
    spec = SandboxSpec("a", 1, Path("/s"), Path("/v"), Path("/p"), 5)
    body = docker_spec.container_config(
        spec, DockerConfig(), image_id="x", labels={}, files={docker_spec.CA_FILE: Path("/etc/inner.pem")}
    )
    assert "NODE_EXTRA_CA_CERTS=/opt/cortex/ca.pem" in body["Env"]
    assert body["HostConfig"]["Mounts"][-1]["ReadOnly"] is True
    assert not [line for line in docker_spec.environment(ca=False) if "CERT" in line]


@pytest.mark.parametrize(
    ("status", "ours"),
    [("created", "created"), ("running", "running"), ("paused", "paused"), ("dead", "exited"), ("new word", "exited")],
)
def test_liveness(status: str, ours: str) -> None:
    assert docker_spec.liveness(status) == ours
