"""Who works on a local sweep: locks that last as long as the processes that hold them, on one machine or on many."""

from __future__ import annotations

import fcntl
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from sqlalchemy import URL, Connection, create_engine, func, select
from sqlalchemy.pool import NullPool

DRIVERS = ("psycopg", "psycopg2")  # those whose connection is one socket, which another process can inherit
# A lock is a lease: 45 s after a machine's last word PostgreSQL lets go of its locks. By then the machine has noticed
# (CHECK_S, then 15 s without an answer) and has ended its runs (STOP_S).
CHECK_S, STOP_S = 5.0, 20.0
CONNECTION: dict[str, Any] = {
    "client_encoding": "utf8",  # a server without an encoding of its own would answer in bytes
    "connect_timeout": 10,
    "tcp_user_timeout": 15_000,  # milliseconds
    "options": "-c tcp_keepalives_idle=20 -c tcp_keepalives_interval=5 -c tcp_keepalives_count=5",
}


class Descriptor(Protocol):
    """A file, or what else the system counts by descriptors."""

    def fileno(self) -> int: ...

    def close(self) -> None: ...


class Lock:
    """A trial that someone runs. Processes that inherit its descriptors hold it, too, until the last of them ends."""

    def __init__(self, *held: Descriptor):
        self.held = held

    @property
    def descriptors(self) -> list[int]:
        return [part.fileno() for part in self.held]

    def close(self) -> None:
        for part in self.held:
            part.close()


class FolderLocks:
    """Locked files, for the processes of one machine, and of those whose network file system has locks that hold.

    The system lets go of them with the last process that holds them, however it ends. By `fcntl`, as the package
    filelock has no descriptor that a run could inherit.

    Args:
        folder: the sweep's.
        log: the file of a trial's number; its folder is made if need be.
    """

    def __init__(self, folder: Path, log: Callable[[int], Path]):
        self.folder, self.log = folder, log

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Keep the other processes of this sweep out; SQLite alone would hand a trial out twice now and then."""
        with (self.folder / "sweep.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def hold(self, number: int) -> Lock:
        """Take a trial's lock, once it is free."""
        self.log(number).parent.mkdir(exist_ok=True)
        file = self.log(number).open("a")
        fcntl.flock(file, fcntl.LOCK_EX)
        return Lock(file)

    def is_held(self, number: int) -> bool:
        """Whether a process, of this sweep or of an earlier start, runs a trial."""
        if not self.log(number).exists():
            return False
        with self.log(number).open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared: who looks is not taken for who holds
            except BlockingIOError:
                return True
        return False

    def check(self) -> None:
        """Nothing to ask: a file's lock is not lost."""


class DatabaseLocks:
    """PostgreSQL's advisory locks, for the processes of all machines that reach one server.

    Each trial's belongs to a connection of its own, whose socket the run inherits: the server lets go of it when the
    last process that has the socket ends, or when the machine no longer answers. The file is locked besides, for a
    run that a restarted server has forgotten.

    Args:
        url: the database, with one of the `DRIVERS`; not through a pool of transactions, which has no such locks.
        name: of the sweep; sweeps of other names in the same database do not wait for each other.
        files: the locks of this machine.
    """

    def __init__(self, url: URL, name: str, files: FolderLocks):
        self.files = files
        self._engine = create_engine(url, poolclass=NullPool, isolation_level="AUTOCOMMIT", connect_args=CONNECTION)
        self._sweep = zlib.crc32(name.encode()) - 2**31  # two signed integers of 32 bits name a lock
        self._connections: list[Connection] = []
        self._checked_at = 0.0

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Keep the other processes of this sweep out, on all machines."""
        with self._engine.connect() as connection:
            connection.execute(select(func.pg_advisory_lock(self._sweep, -1)))
            yield

    def hold(self, number: int) -> Lock:
        """Take a trial's lock, once it is free."""
        connection = self._engine.connect()
        connection.execute(select(func.pg_advisory_lock(self._sweep, number)))
        self._connections = [held for held in self._connections if not held.closed] + [connection]
        return Lock(_Socket(connection), *self.files.hold(number).held)

    def is_held(self, number: int) -> bool:
        """Whether a process on any machine runs a trial."""
        if self.files.is_held(number):
            return True
        with self._engine.connect() as connection:  # a lock of one transaction: free again when the answer is here
            return not connection.execute(select(func.pg_try_advisory_xact_lock(self._sweep, number))).scalar()

    def check(self) -> None:
        """Ask, every `CHECK_S` seconds, whether the trials' locks are held still.

        Raises:
            sqlalchemy.exc.SQLAlchemyError: a connection is gone, and its lock with it.
        """
        if time.monotonic() - self._checked_at < CHECK_S:
            return
        self._checked_at = time.monotonic()
        for connection in self._connections:
            if not connection.closed:
                connection.execute(select(1))


class _Socket:
    """A connection to the database, as a descriptor."""

    def __init__(self, connection: Connection):
        self.connection = connection

    def fileno(self) -> int:
        return self.connection.connection.driver_connection.fileno()

    def close(self) -> None:
        self.connection.close()
