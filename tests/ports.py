"""Ports for servers that a test begins in other processes."""

import socket

GIVEN = []
"""Sockets that keep what was given for as long as this process lives."""


def free_port() -> int:
    """A port that nothing listens at, and that no other process is given meanwhile: until the server has imported what
    it needs, tests beside this one ask for ports too. What is bound and not listened at, a server may still take."""
    kept = socket.socket()
    kept.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    kept.bind(("127.0.0.1", 0))
    GIVEN.append(kept)
    return kept.getsockname()[1]
