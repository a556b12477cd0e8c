"""stub"""


def attach() -> None:
    """stub"""
