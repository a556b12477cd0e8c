from __future__ import annotations

import json
import stat
import subprocess
import time
from dataclasses import replace
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from broker.sandbox import accounts, process_spawn, procfs
from broker.sandbox.process_records import Record, Records

PROCESS = st.none() | st.builds(procfs.Process, pid=st.integers(1, 2**22), start=st.integers(0, 2**40))
RECORD = st.builds(
    Record,
    ref=st.from_regex(r"[a-z0-9]{1,12}\.[0-9]{1,4}", fullmatch=True),
    slot=st.text(max_size=9),
    incarnation=st.integers(0, 99),
    isolated=st.booleans(),
    argv=st.lists(st.text(), max_size=4),
    env=st.dictionaries(st.text(), st.text(), max_size=3),
    stage=st.sampled_from(["created", "starting", "running", "paused", "exited"]),
    boot=st.text(max_size=9),
    init=PROCESS,
    monitor=PROCESS,
    code=st.none() | st.integers(0, 255),
)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(RECORD)
def test_what_is_saved_is_loaded(tmp_path: Path, record: Record) -> None:
    records = Records(tmp_path / "process")
    records.open()
    records.save(record)
    assert records.load() == [record]
    records.delete(record.ref)
    records.delete(record.ref)
    assert records.load() == []


def test_records_are_the_brokers_own(tmp_path: Path) -> None:
    records = Records(tmp_path / "process")
    records.open()
    records.save(Record("a.1", "a", 1, True, [], {}))
    assert stat.S_IMODE(records.directory.stat().st_mode) == 0o700
    assert stat.S_IMODE((records.directory / "a.1.json").stat().st_mode) == 0o600


def test_a_broken_record_hides_no_other(tmp_path: Path) -> None:
    records = Records(tmp_path)
    good = Record("a.1", "a", 1, True, [], {})
    records.save(good)
    for name, text in (("b.1", ""), ("c.1", "[]"), ("d.1", '{"ref": "d.1"}'), ("e.1", json.dumps({"pid": 1}))):
        (tmp_path / f"{name}.json").write_text(text)
    assert records.load() == [good]


def test_a_record_of_another_boot_or_process_is_not_adopted(tmp_path: Path) -> None:
    records = Records(tmp_path)
    with subprocess.Popen(["sleep", "30"]) as child:
        me = procfs.identify(child.pid)
        assert me is not None
        record = Record("a.1", "a", 1, False, ["sleep"], {}, "running", procfs.boot_id(), me, me)
        later = replace(me, start=me.start + 1)
        for stale in (replace(record, boot="another boot"), replace(record, init=later)):
            found, handles = process_spawn.adopt(stale, records)
            assert (found.stage, handles) == ("exited", None)
        found, handles = process_spawn.adopt(record, records)
        assert handles is not None
        assert not procfs.ended(handles.init)
        child.kill()
        assert procfs.ready([handles.init], 5) == [handles.init]
        assert process_spawn.last_code(handles, 5) == 137
        handles.close()
        handles.close()
        child.returncode = 0


def test_the_status_descriptor_goes_before_the_command() -> None:
    record = Record("a.1", "a", 1, True, ["bwrap", "--dir", "/x", "--", "python3", "--", "y"], {})
    assert process_spawn.command(record, 9)[2:6] == ["/x", "--json-status-fd", "9", "--"]
    assert process_spawn.command(record, None) == record.argv


@given(st.binary(max_size=200))
def test_status_lines_are_read_whatever_they_are(data: bytes) -> None:
    value = process_spawn._field(data, "child-pid")
    assert value is None or isinstance(value, int)


def test_a_process_is_known_by_its_start() -> None:
    # It speaks first: the kernel shows the arguments a moment after exec has returned.
    with subprocess.Popen(["sh", "-c", "echo up; exec sleep 30"], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        deadline = time.monotonic() + 10
        while child.pid not in procfs.find(["sleep", "30"]) and time.monotonic() < deadline:
            time.sleep(0.01)
        process = procfs.identify(child.pid)
        assert process is not None
        assert child.pid in procfs.find(["sleep", "30"])
        assert child.pid in procfs.tree(procfs.parent(child.pid))
        assert procfs.freeze(child.pid, 5)
        assert procfs._stat(child.pid)[0] == "T"
        procfs.thaw(child.pid)
        child.kill()
    assert procfs.identify(child.pid) is None
    assert procfs.open_pidfd(process) is None


def test_every_sandbox_uid_has_an_account(tmp_path: Path) -> None:
    files = accounts.write_etc(tmp_path, 1234, 4321)
    lines = files["/etc/passwd"].read_text().splitlines()
    assert [line.split(":")[2:6] for line in lines if ":1234:" in line] == [
        ["1234", "4321", "Cortex sandbox", "/vol/home"]
    ]
    assert ":4321:" in files["/etc/group"].read_text()
    assert stat.S_IMODE(files["/etc/passwd"].stat().st_mode) == 0o644
    before = files["/etc/passwd"].stat().st_ino
    accounts.write_etc(tmp_path, 1234, 4321)
    assert files["/etc/passwd"].stat().st_ino == before
