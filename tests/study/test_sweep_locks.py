"""Locks of trials: of files and of PostgreSQL, held by a process and by those that it starts."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest
from postgres_server import PostgresServer, needs_postgres
from sqlalchemy import create_engine, make_url, text
from sqlalchemy.exc import SQLAlchemyError

from research.study import sweep_locks
from research.study.sweep_locks import DatabaseLocks, FolderLocks

WAITS_FOR_INPUT = "import sys; print(flush=True); sys.stdin.read()"


@pytest.fixture(scope="module")
def server():
    needs_postgres()
    with PostgresServer() as server:
        yield server


def files_in(folder):
    folder.mkdir(exist_ok=True)
    return FolderLocks(folder, lambda number: folder / "logs" / f"{number}.log")


@pytest.fixture(params=["files", pytest.param("database", marks=pytest.mark.slow)])
def locks(request, tmp_path):
    """Those of two processes: of one folder, or of two machines that share a database and nothing else."""
    if request.param == "files":
        return files_in(tmp_path / "a"), files_in(tmp_path / "a")
    url = make_url(request.getfixturevalue("server").url)
    return tuple(DatabaseLocks(url, tmp_path.name, files_in(tmp_path / machine)) for machine in "ab")


def test_a_trial_is_held_until_it_is_let_go(locks):
    ours, theirs = locks
    assert not theirs.is_held(3)
    lock, another = ours.hold(3), ours.hold(4)
    assert theirs.is_held(3) and theirs.is_held(4) and not theirs.is_held(5)
    lock.close()
    theirs.hold(3).close()  # waits for a server that has not seen it yet
    assert theirs.is_held(4)
    another.close()


def test_a_process_that_inherits_a_lock_holds_it_after_its_parent(locks):
    ours, theirs = locks
    lock = ours.hold(1)
    command = [sys.executable, "-c", WAITS_FOR_INPUT]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=lock.descriptors) as child:
        child.stdout.readline()
        nothing = os.open(os.devnull, os.O_RDWR)
        for descriptor in lock.descriptors:  # closed, as by a kill of the parent, which tells the server nothing;
            os.dup2(nothing, descriptor)  # but the number stays taken: its owner will close it once more
        os.close(nothing)
        assert theirs.is_held(1)
        child.kill()
    theirs.hold(1).close()  # it comes free


def test_one_process_at_a_time(locks):
    ours, theirs = locks
    entered = threading.Event()

    def enter():
        with theirs.exclusive():
            entered.set()

    with ours.exclusive():
        thread = threading.Thread(target=enter)
        thread.start()
        assert not entered.wait(0.3)
    thread.join()
    assert entered.is_set()


@pytest.mark.slow
def test_sweeps_of_other_names_do_not_meet(server, tmp_path):
    first, second = (DatabaseLocks(make_url(server.url), name, files_in(tmp_path / name)) for name in "xy")
    lock = first.hold(0)
    with first.exclusive(), second.exclusive():
        assert not second.is_held(0)
    lock.close()


@pytest.mark.slow
def test_a_database_without_an_encoding_is_understood(server, tmp_path):
    with create_engine(server.url, isolation_level="AUTOCOMMIT").connect() as connection:
        connection.execute(text("CREATE DATABASE plain ENCODING 'SQL_ASCII' TEMPLATE template0"))
    assert not DatabaseLocks(make_url(server.url).set(database="plain"), "s", files_in(tmp_path / "a")).is_held(0)


@pytest.mark.slow
def test_a_lock_that_the_server_took_away_is_noticed(server, tmp_path, monkeypatch):
    monkeypatch.setattr(sweep_locks, "CHECK_S", 0.0)
    ours, theirs = (DatabaseLocks(make_url(server.url), "s", files_in(tmp_path / machine)) for machine in "ab")
    lost, ended = ours.hold(1), ours.hold(2)
    ended.close()
    ours.check()
    with create_engine(server.url).connect() as connection:
        connection.execute(text("SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory'"))
    with pytest.raises(SQLAlchemyError):
        ours.check()
    assert not theirs.is_held(1)
    lost.close()
    ours.check()


def test_a_run_that_the_server_forgot_is_seen_by_its_file(tmp_path):
    """As after a restart of the server: the database is not even asked."""
    files = files_in(tmp_path / "a")
    locks = DatabaseLocks.__new__(DatabaseLocks)
    locks.files = files
    lock = files.hold(1)
    assert locks.is_held(1)
    lock.close()
