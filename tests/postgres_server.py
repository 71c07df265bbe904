"""A PostgreSQL server for tests: the system's own, on a free port of 127.0.0.1, its data in a temporary folder."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path

import pytest


def server_programs() -> Path | None:
    """The folder of `initdb` and `postgres`, on the path or where Debian keeps them; None where there is none."""
    found = shutil.which("initdb")
    folders = [Path(found).resolve().parent] if found else sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    return next((folder for folder in reversed(folders) if (folder / "postgres").exists()), None)


def needs_postgres() -> None:
    """Skip a test, with the reason, where PostgreSQL or the driver is missing."""
    pytest.importorskip("psycopg", reason="the extra postgres is not installed")
    if server_programs() is None:
        pytest.skip("there is no PostgreSQL server here (Debian: postgresql)")


class PostgresServer:
    """A context manager; `stop` and `start` between keep the data.

    Attributes:
        url: of its database, in SQLAlchemy's form.
    """

    def __enter__(self) -> PostgresServer:
        self._folder = Path(tempfile.mkdtemp(prefix="postgres-"))
        self._user = {"user": "nobody"} if os.geteuid() == 0 else {}  # it refuses to run as root
        if self._user:
            shutil.chown(self._folder, "nobody")
        with socket.create_server(("127.0.0.1", 0)) as free:
            self._port = free.getsockname()[1]
        self.url = f"postgresql://sweep@127.0.0.1:{self._port}/postgres"
        words = ("--pgdata=data", "--username=sweep", "--auth=trust", "--no-locale", "--encoding=UTF8", "--no-sync")
        self._run("initdb", *words).wait()
        self.start()
        return self

    def _run(self, program: str, *words: str) -> subprocess.Popen:
        command = [server_programs() / program, *words]
        with (self._folder / "log").open("a") as log:
            return subprocess.Popen(
                command, cwd=self._folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                env={"PATH": os.environ["PATH"]}, **self._user,
            )  # fmt: skip

    def start(self) -> None:
        settings = (f"port={self._port}", "listen_addresses=127.0.0.1", "unix_socket_directories=", "fsync=off")
        self._server = self._run("postgres", "-D", "data", *(word for s in settings for word in ("-c", s)))
        while True:
            assert self._server.poll() is None, (self._folder / "log").read_text()
            try:
                return socket.create_connection(("127.0.0.1", self._port)).close()
            except OSError:
                time.sleep(0.05)

    def stop(self) -> None:
        self._server.send_signal(signal.SIGINT)  # ends its sessions
        self._server.wait()

    def __exit__(self, *_) -> None:
        self.stop()
        shutil.rmtree(self._folder)
