from __future__ import annotations

import pytest

from sandbox_agent.workspace import Workspace


@pytest.mark.parametrize(
    ("wanted", "cwd"),
    [
        ("/vol/home/workspace", "/vol/home/workspace"),
        ("/vol/home/workspace/shop/", "/vol/home/workspace/shop"),
        ("/vol/home/workspace/../../etc", "/vol/home/workspace"),
        ("/vol/home/workspaces", "/vol/home/workspace"),
        ("/Users/ann/src", "/vol/home/workspace"),
        ("C:\\Users\\ann", "/vol/home/workspace"),
        ("relative", "/vol/home/workspace"),
        ("/vol/home/workspace/\0", "/vol/home/workspace"),
        (None, "/vol/home/workspace"),
    ],
)
def test_a_clients_directory_is_mapped_into_the_workspace(wanted: object, cwd: str) -> None:
    assert Workspace("/vol/home").cwd(wanted) == cwd


def test_an_old_conversation_keeps_its_directory_in_the_home_and_never_makes_one_elsewhere() -> None:
    workspace = Workspace("/vol/home")
    workspace.set("/vol/home/other")
    assert workspace.restored("/vol/home/workspace/shop") == "/vol/home/workspace/shop"
    assert workspace.restored("/state/slots/gone/vol/home/workspace") == "/vol/home/other"
    assert workspace.restored("/vol/home/../../etc") == "/vol/home/other"
