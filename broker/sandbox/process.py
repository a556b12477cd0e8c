"""Sandboxes as processes of this host, in bubblewrap's namespaces.

They outlive the broker: nothing ties them to it, and ``process_records`` lets the next one find
them. A sandbox is dead when the pidfd of its namespace's init is readable; the kernel lets that
happen only when no process of the namespace is left. Without isolation (``allow_unisolated`` and
no working bubblewrap) it is a plain child with the broker's own uid and the host's paths.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Literal

import structlog

import sandbox_agent.wire
from broker.config import ProcessConfig
from broker.errors import Code, CortexError
from broker.host.tasks import TaskOwner
from broker.metrics import SANDBOX_CALLS, SANDBOX_ERRORS
from broker.sandbox import accounts, bwrap, process_spawn, procfs, ram_dirs
from broker.sandbox.docker_spec import CA_FILE, CA_VARIABLES, check_slot
from broker.sandbox.driver import (
    CREDENTIALS_DIR,
    HOME_DIR,
    SOCK_DIR,
    VOL_DIR,
    Exit,
    Found,
    Liveness,
    SandboxSpec,
)
from broker.sandbox.process_records import Record, Records

log = structlog.get_logger(__name__)

AGENT_DIR = Path(sandbox_agent.wire.__file__).resolve().parent.parent
ENTRY = (sys.executable, "-I", "-S", str(AGENT_DIR / "__main__.py"))
"""How the agent server starts; ``--socket-dir`` and ``--vol`` follow."""
TRIAL_TIMEOUT_S = 10.0
KILL_TIMEOUT_S = 10.0
FREEZE_TIMEOUT_S = 5.0
DRAIN_PAUSE_S = 0.25
"""Output is read at most every so often: 64 KiB each time, more stays in the pipe or is lost."""


class _Box:
    """One sandbox in memory. ``ended`` is done when it has ended; a new start makes a new one."""

    def __init__(self, record: Record) -> None:
        self.record = record
        self.handles: process_spawn.Handles | None = None
        self.ended: asyncio.Future[Exit] = asyncio.get_running_loop().create_future()
        self.tail = b""
        self.starting: asyncio.Task[None] | None = None
        self.strays: dict[int, procfs.Process] = {}

    @property
    def alive(self) -> bool:
        return self.handles is not None and not procfs.ended(self.handles.init)

    @property
    def liveness(self) -> Liveness:
        if self.alive:
            return "paused" if self.record.stage == "paused" else "running"
        return "created" if self.record.stage in ("created", "starting") else "exited"


class ProcessDriver:
    """``state_dir`` holds the records (below ``process``) and is never shown to a sandbox.

    ``uid``, ``gid``: whose sandboxes a trial at ``open`` is made for. ``entry``: argv of the agent
    server. ``bwrap_path``: the bubblewrap to use. ``ca_file``: PEM bundle that sandboxes trust.
    """

    name = "process"

    def __init__(
        self,
        config: ProcessConfig,
        *,
        installation: str,
        state_dir: Path,
        tasks: TaskOwner,
        uid: int | None = None,
        gid: int | None = None,
        entry: Sequence[str] = ENTRY,
        bwrap_path: str = "bwrap",
        ca_file: Path | None = None,
    ) -> None:
        self.isolated = True
        self._config = config
        self._installation = installation
        self._state_dir = state_dir
        self._records = Records(state_dir / "process")
        self._tasks = tasks
        self._root = os.getuid() == 0
        self._uid = uid if uid is not None else 64321 if self._root else os.getuid()
        self._gid = gid if gid is not None else self._uid if self._root else os.getgid()
        self._entry = tuple(entry)
        self._bwrap = bwrap_path
        self._ca_file = ca_file
        self._boxes: dict[str, _Box] = {}

    async def open(self) -> None:
        SANDBOX_CALLS.labels("process", "open").inc()
        await asyncio.to_thread(self._records.open)
        bwrap.check_visible(self._config.visible, self._state_dir)
        try:
            await asyncio.to_thread(self._trial)
            self.isolated = True
        except CortexError as error:
            if not self._config.allow_unisolated:
                SANDBOX_ERRORS.labels("process", "open").inc()
                raise
            self.isolated = False
            log.warning(
                "sandboxes_not_isolated",
                why=str(error),
                what="agents run as plain processes with the broker's own rights and network",
            )
        for record in await asyncio.to_thread(self._records.load):
            if record.ref not in self._boxes:
                self._adopt(*await asyncio.to_thread(process_spawn.adopt, record, self._records))

    async def close(self) -> None:
        for box in list(self._boxes.values()):
            if box.starting is not None:
                await asyncio.wait([box.starting])
            self._unwatch(box)
        self._boxes.clear()

    def _trial(self) -> None:
        """Runs the agent server's interpreter in a sandbox like all others. Raises ``CortexError``."""
        found = shutil.which(self._bwrap)
        hint = "apt install bubblewrap; where user namespaces are restricted, allow them (`cortex doctor`)."
        hint += " To try Cortex without isolation: sandbox.process.allow_unisolated = true."
        if found is None:
            raise CortexError(Code.ISOLATION_MISSING, f"{self._bwrap} is not installed", hint=hint)
        self._bwrap = found
        empty = self._state_dir / "process" / "trial"
        empty.mkdir(mode=0o755, exist_ok=True)
        spec = SandboxSpec("trial", 0, empty, empty, empty, self._uid, gid=self._gid)
        bubblewrap, *rest = self._prefix(spec)
        # A trial that hangs is killed, and all of it with it.
        argv = [*process_spawn.launcher(), bubblewrap, "--die-with-parent", *rest]
        argv += [self._entry[0], "-I", "-S", "-c", "pass"]
        try:
            done = subprocess.run(
                argv,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                env=self._environment(isolated=True, home=HOME_DIR, words=()),
                timeout=TRIAL_TIMEOUT_S,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise CortexError(Code.ISOLATION_MISSING, "bubblewrap does not run", cause=error, hint=hint) from error
        if done.returncode != 0:
            words = done.stderr.decode(errors="replace").strip()[-400:] or f"exit code {done.returncode}"
            raise CortexError(Code.ISOLATION_MISSING, "bubblewrap cannot make a sandbox", cause=words, hint=hint)

    async def prepare_image(self) -> str:
        return ""

    async def create(self, spec: SandboxSpec) -> str:
        SANDBOX_CALLS.labels("process", "create").inc()
        ref = f"{check_slot(spec.slot)}.{spec.incarnation}"
        if ref in self._boxes:
            if self._boxes[ref].liveness != "created":
                raise CortexError(
                    Code.ENGINE_ERROR, f"sandbox {ref} exists", hint="A new start needs a new incarnation."
                )
            await self.remove(ref)
        preparing = self._tasks.start(self._prepared(ref, spec), f"create-{ref}", on_error=lambda _: None)
        try:
            await asyncio.shield(preparing)
        except asyncio.CancelledError:
            # The thread goes on, so its record can only be deleted once it is written.
            self._tasks.start(self._undo(preparing), f"undo-{ref}", on_error=lambda _: None)
            raise
        return ref

    async def _prepared(self, ref: str, spec: SandboxSpec) -> str:
        record = await asyncio.to_thread(self._prepare, ref, spec)
        self._boxes[ref] = _Box(record)
        return ref

    async def _undo(self, preparing: asyncio.Task[str]) -> None:
        await self.remove(await preparing)

    def _prepare(self, ref: str, spec: SandboxSpec) -> Record:
        for path in (spec.sock_dir, spec.vol_dir, spec.packages_dir):
            if not path.is_dir():
                raise CortexError(
                    Code.ENGINE_ERROR, f"{path} is no directory", hint="The slot has to exist before its sandbox."
                )
        sock, vol = (SOCK_DIR, VOL_DIR) if self.isolated else (str(spec.sock_dir), str(spec.vol_dir))
        words = (*self._entry, *spec.commands)
        home = HOME_DIR if self.isolated else str(spec.vol_dir / "home")
        record = Record(
            ref,
            spec.slot,
            spec.incarnation,
            self.isolated,
            argv=[*(self._prefix(spec) if self.isolated else []), *self._entry, "--socket-dir", sock, "--vol", vol],
            env=self._environment(isolated=self.isolated, home=home, words=words),
            credentials=CREDENTIALS_DIR if self.isolated else self._ram_dir(ref),
        )
        self._records.save(record)
        return record

    def _ram_dir(self, ref: str) -> str:
        try:
            return ram_dirs.make(ref, self._state_dir / "process")
        except OSError as error:
            raise CortexError(
                Code.ENGINE_ERROR,
                "no directory for credential files can be made",
                cause=error,
                hint="Make room, and give the broker's user its state_dir.",
            ) from error

    def _prefix(self, spec: SandboxSpec) -> list[str]:
        """The bubblewrap command up to and with what precedes the agent server's argv."""
        if not self._root and spec.uid != os.getuid():
            raise CortexError(
                Code.ISOLATION_MISSING,
                f"only root can run sandboxes as uid {spec.uid}",
                hint="Set sandbox.uid to 0, use sandbox.driver = docker, or run the broker as root.",
            )
        files = accounts.write_etc(self._state_dir / "process", spec.uid, spec.group)
        if self._ca_file is not None:
            files[CA_FILE] = self._ca_file
        trees = [Path(sys.prefix), Path(sys.base_prefix), AGENT_DIR, *map(Path, self._config.visible)]
        view = bwrap.View(
            spec.sock_dir.absolute(),
            spec.vol_dir.absolute(),
            spec.packages_dir.absolute(),
            bwrap.shown_paths((*self._entry, *spec.commands), trees, self._state_dir),
            files,
            self._state_dir,
        )
        spaces, shed = bwrap.isolation_args(spec.uid, spec.group, root=self._root)
        marker = f"{self._installation}/{spec.slot}.{spec.incarnation}"
        return [self._bwrap, *spaces, "--setenv", "CORTEX_SANDBOX", marker, *bwrap.view_args(view), "--", *shed]

    def _environment(self, *, isolated: bool, home: str, words: Sequence[str]) -> dict[str, str]:
        """The agent server's variables, none of them the broker's own."""
        bins = [os.path.dirname(word) for word in words if os.path.isabs(word) and os.access(word, os.X_OK)]
        env = {
            "HOME": home,
            "PATH": ":".join(dict.fromkeys([*bins, *self._config.path.split(":")])),
            "LANG": "C.UTF-8",
            "USER": accounts.USER,
            "LOGNAME": accounts.USER,
            "SHELL": "/bin/sh",
        }
        if self._ca_file is not None:
            env |= dict.fromkeys(CA_VARIABLES, CA_FILE if isolated else str(self._ca_file))
        return env

    async def start(self, ref: str) -> None:
        SANDBOX_CALLS.labels("process", "start").inc()
        box = self._box(ref)
        if box.alive:
            return
        if box.handles is not None:
            await asyncio.shield(box.ended)
        if box.starting is None:
            box.starting = self._tasks.start(self._start(box), f"start-{ref}", on_error=lambda _: None)
        # A cancelled caller leaves a sandbox that is known, not one half started.
        await asyncio.shield(box.starting)

    async def _start(self, box: _Box) -> None:
        try:
            record, handles = await asyncio.to_thread(process_spawn.spawn, box.record, self._records)
        except CortexError:
            SANDBOX_ERRORS.labels("process", "start").inc()
            raise
        finally:
            box.starting = None
        if box.ended.done():
            box.ended = asyncio.get_running_loop().create_future()
        box.record, box.tail = record, b""
        self._watch(box, handles)

    def _adopt(self, record: Record, handles: process_spawn.Handles | None) -> None:
        box = self._boxes[record.ref] = _Box(record)
        if handles is not None:
            self._watch(box, handles)
        elif record.stage == "exited":
            box.ended.set_result(Exit(record.code))

    def _watch(self, box: _Box, handles: process_spawn.Handles) -> None:
        box.handles = handles
        loop = asyncio.get_running_loop()
        loop.add_reader(handles.init, self._on_end, box)
        if handles.out is not None:
            loop.add_reader(handles.out, self._on_output, box, handles.out)

    def _unwatch(self, box: _Box) -> None:
        handles, box.handles = box.handles, None
        if handles is not None:
            loop = asyncio.get_running_loop()
            loop.remove_reader(handles.init)
            if handles.out is not None:
                loop.remove_reader(handles.out)
            handles.close()

    def _on_output(self, box: _Box, fd: int) -> None:
        box.tail = process_spawn.read_tail(fd, box.tail)
        loop = asyncio.get_running_loop()
        loop.remove_reader(fd)
        loop.call_later(DRAIN_PAUSE_S, self._listen_again, box, fd)

    def _listen_again(self, box: _Box, fd: int) -> None:
        if box.handles is not None and box.handles.out == fd:
            asyncio.get_running_loop().add_reader(fd, self._on_output, box, fd)

    def _on_end(self, box: _Box) -> None:
        if box.handles is not None:
            asyncio.get_running_loop().remove_reader(box.handles.init)
            self._tasks.start(self._finish(box, box.handles), f"end-{box.record.ref}")

    async def _finish(self, box: _Box, handles: process_spawn.Handles) -> None:
        """Learns how it ended and notes it."""
        await asyncio.to_thread(self._sweep, box)
        code = await asyncio.to_thread(process_spawn.last_code, handles, KILL_TIMEOUT_S)
        if box.handles is not handles:
            return
        if handles.out is not None:
            box.tail = process_spawn.read_tail(handles.out, box.tail)
        self._unwatch(box)
        box.record = replace(box.record, stage="exited", code=code, init=None, monitor=None)
        with suppress(CortexError):  # a full disk: the next broker finds it ended, without the code
            await asyncio.to_thread(self._save, box)
        if not box.ended.done():
            box.ended.set_result(Exit(code, tail=box.tail.decode(errors="replace")))

    def _save(self, box: _Box) -> None:
        if self._boxes.get(box.record.ref) is box:
            self._records.save(box.record)

    async def pause(self, ref: str) -> None:
        SANDBOX_CALLS.labels("process", "pause").inc()
        box = self._running(ref)
        await asyncio.to_thread(self._freeze, box)

    def _freeze(self, box: _Box) -> None:
        # Noted before, and until after it is thawed: a broker that is killed on the way leaves one that
        # the next resumes, never one that stands still though it counts as running.
        self._note_stage(box, "paused")
        init = box.record.init
        if init is None or not procfs.freeze(init.pid, FREEZE_TIMEOUT_S):
            if init is not None:
                procfs.thaw(init.pid)
            self._note_stage(box, "running")
            raise CortexError(
                Code.ENGINE_TIMEOUT,
                f"sandbox {box.record.ref} did not stop within {FREEZE_TIMEOUT_S:g} s",
                hint="It is thawed again; a process of it hangs in the kernel, or it forks without end.",
            )

    def _note_stage(self, box: _Box, stage: Literal["paused", "running"]) -> None:
        if box.record.stage in ("paused", "running"):
            record = replace(box.record, stage=stage)
            self._records.save(record)
            box.record = record

    async def resume(self, ref: str) -> None:
        SANDBOX_CALLS.labels("process", "resume").inc()
        await asyncio.to_thread(self._thaw, self._running(ref))

    def _thaw(self, box: _Box) -> None:
        if box.record.init is not None and box.alive:
            procfs.thaw(box.record.init.pid)
        try:
            self._note_stage(box, "running")
        except CortexError:  # a full disk: the next broker resumes what runs, which is no harm
            box.record = replace(box.record, stage="running")

    async def stop(self, ref: str, grace_s: float) -> None:
        SANDBOX_CALLS.labels("process", "stop").inc()
        box = self._boxes.get(ref)
        if box is None:
            return
        if box.starting is not None:
            await asyncio.wait([box.starting])
        if not box.alive:
            return
        if box.record.stage == "paused":
            await asyncio.to_thread(self._thaw, box)
        await asyncio.to_thread(self._terminate, box)
        with suppress(TimeoutError):
            async with asyncio.timeout(grace_s):
                await asyncio.shield(box.ended)
                return
        await self._kill(box)

    def _terminate(self, box: _Box) -> None:
        """SIGTERM to the agent server: as its namespace's init, bubblewrap would neither heed nor pass it on."""
        init = box.record.init
        if init is None:
            return
        self._note_strays(box)
        procfs.send(procfs.children(init.pid)[:1] if box.record.isolated else [init.pid], signal.SIGTERM)

    def _note_strays(self, box: _Box) -> None:
        """Without a namespace, descendants have to be known by name before their parent is gone."""
        if not box.record.isolated and box.record.init is not None:
            seen = map(procfs.identify, procfs.tree(box.record.init.pid)[1:])
            box.strays |= {process.pid: process for process in seen if process is not None}

    def _sweep(self, box: _Box) -> None:
        procfs.kill(box.strays.values(), KILL_TIMEOUT_S)
        box.strays.clear()

    async def _kill(self, box: _Box) -> None:
        await asyncio.to_thread(self._note_strays, box)
        if box.handles is not None:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(box.handles.init, signal.SIGKILL)
        try:
            async with asyncio.timeout(KILL_TIMEOUT_S):
                await asyncio.shield(box.ended)
        except TimeoutError as error:
            raise CortexError(
                Code.ENGINE_TIMEOUT,
                f"sandbox {box.record.ref} is not dead {KILL_TIMEOUT_S:g} s after SIGKILL",
                hint="A process of it hangs in the kernel (state D), for example on a dead file server.",
            ) from error

    async def remove(self, ref: str) -> None:
        SANDBOX_CALLS.labels("process", "remove").inc()
        box = self._boxes.get(ref)
        if box is None:
            return
        if box.starting is not None:
            await asyncio.wait([box.starting])
        if box.handles is not None:
            await self._kill(box)
        self._boxes.pop(ref, None)
        await asyncio.to_thread(self._forget, box.record)
        if not box.ended.done():
            box.ended.set_result(Exit(None))

    def _forget(self, record: Record) -> None:
        if not record.isolated:
            ram_dirs.remove(record.credentials)
        self._records.delete(record.ref)

    def credentials_dir(self, slot: str, incarnation: int) -> str:
        box = self._boxes.get(f"{slot}.{incarnation}")
        return "" if box is None else box.record.credentials

    async def wait(self, ref: str) -> Exit:
        box = self._boxes.get(ref)
        return Exit(None) if box is None else await asyncio.shield(box.ended)

    async def inspect(self, ref: str) -> Liveness:
        box = self._boxes.get(ref)
        return "gone" if box is None else box.liveness

    async def memory(self, ref: str) -> int:
        init = self._running(ref).record.init
        return await asyncio.to_thread(procfs.memory, init.pid) if init is not None else 0

    async def list(self) -> list[Found]:
        return [Found(ref, box.record.slot, box.record.incarnation, box.liveness) for ref, box in self._boxes.items()]

    def _box(self, ref: str) -> _Box:
        box = self._boxes.get(ref)
        if box is None:
            raise _gone(ref)
        return box

    def _running(self, ref: str) -> _Box:
        box = self._box(ref)
        if not box.alive:
            raise _gone(ref)
        return box


def _gone(ref: str) -> CortexError:
    return CortexError(
        Code.SANDBOX_DIED, f"sandbox {ref} is gone", hint="Start the session again; it gets a new sandbox."
    )
