from __future__ import annotations

from broker.session.directory import Directory, Solo


async def test_a_single_node_owns_everybody() -> None:
    directory: Directory = Solo("n1")
    assert directory.held("ann")
    assert await directory.claim("ann")
    assert await directory.locate("ann") == "n1"
    await directory.release("ann")
    assert directory.held("ann")
