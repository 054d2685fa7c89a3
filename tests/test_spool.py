"""What waits when a log's store is away: in order, once, across processes that die, and at a price that has a bound."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from llm_from_scratch import spool
from llm_from_scratch.spool import Patient, Record, Spool


class Store:
    """A list of what it was told; while `away` it takes nothing."""

    def __init__(self) -> None:
        self.away = False
        self.told: list[tuple[str, Any]] = []
        self.asked = 0

    def tell(self, key: str, record: Record) -> None:
        self.asked += 1
        if self.away:
            raise ConnectionError("nobody answers")
        self.told.append((key, record["n"]))


def test_a_store_that_takes_everything_leaves_no_file(tmp_path: Path) -> None:
    store = Store()
    run = Spool(tmp_path, "run", store.tell, pytest.fail)
    for n in range(3):
        run.put({"n": n})
    run.close()
    assert store.told == [("run", 0), ("run", 1), ("run", 2)]
    assert not list(tmp_path.iterdir())


def test_a_store_that_comes_back_within_a_run_gets_all_of_it_in_order(tmp_path: Path) -> None:
    store, heard = Store(), list[Exception]()
    run = Spool(tmp_path, "run", store.tell, heard.append)
    run.put({"n": 0})
    store.away = True
    run.put({"n": 1})
    run.put({"n": 2})
    assert {str(error) for error in heard} == {"nobody answers"}
    store.away = False
    run.put({"n": 3})
    run.put({"n": 4})
    run.close()
    assert [n for _, n in store.told] == [0, 0, 1, 2, 3, 4], "a kept file opens with the run's first record, for it may go to another store"
    assert not list(tmp_path.iterdir())


def test_what_a_run_leaves_is_delivered_by_the_next_one(tmp_path: Path) -> None:
    store = Store()
    store.away = True
    run = Spool(tmp_path, "run", store.tell, lambda error: None)
    run.put({"n": 0})
    run.put({"n": 1})
    run.close()
    with pytest.raises(ConnectionError):
        spool.deliver(tmp_path, store.tell)
    store.away = False
    spool.deliver(tmp_path, store.tell)
    spool.deliver(tmp_path, store.tell)
    assert store.told == [("run", 0), ("run", 1)]


def test_the_file_of_a_run_that_lives_is_let_alone(tmp_path: Path) -> None:
    store = Store()
    store.away = True
    run = Spool(tmp_path, "run", store.tell, lambda error: None)
    run.put({"n": 0})
    store.away = False
    spool.deliver(tmp_path, store.tell)
    assert store.told == []
    run.close()
    assert store.told == [("run", 0)]


def test_a_killed_process_leaves_its_records_and_half_a_line_is_none(tmp_path: Path) -> None:
    program = """if True:
        import os, signal, sys
        from pathlib import Path
        from llm_from_scratch.spool import Spool
        def away(key, record):
            raise ConnectionError
        run = Spool(Path(sys.argv[1]), "run", away, lambda error: None)
        run.put({"n": 0})
        run.put({"n": 1})
        run.waiting.file.seek(0, os.SEEK_END)
        run.waiting.file.write(b'{"n": 2')
        run.waiting.file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    """
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=False, timeout=60)
    store = Store()
    spool.deliver(tmp_path, store.tell)
    assert store.told == [("run", 0), ("run", 1)]
    assert not list(tmp_path.iterdir())


def test_a_slow_store_keeps_its_process_for_its_grace_and_no_longer(tmp_path: Path) -> None:
    store, heard, grace = Store(), list[Exception](), 0.3

    def slow(key: str, record: Record) -> None:
        time.sleep(0.2)
        store.tell(key, record)

    started = time.monotonic()
    run = Spool(tmp_path, "run", Patient(slow, grace, share=0.0), heard.append)
    for n in range(100):
        run.put({"n": n})
    run.close()
    assert time.monotonic() - started < 2 * grace
    assert store.told in ([("run", 0)], [("run", 0), ("run", 1)]), "one that was given up may still arrive"
    assert "kept this process for 0 s" in str(heard[0])
    store.told.clear()
    spool.deliver(tmp_path, store.tell)
    assert store.told == [("run", n) for n in range(100)]


def test_what_a_patient_store_raises_is_raised() -> None:
    store = Store()
    patient = Patient(store.tell, grace=10.0, share=0.0)
    patient("run", {"n": 0})
    store.away = True
    with pytest.raises(ConnectionError, match="nobody answers"):
        patient("run", {"n": 1})
    assert store.told == [("run", 0)]


def test_without_a_folder_what_is_not_taken_is_dropped(tmp_path: Path) -> None:
    store, heard = Store(), list[Exception]()
    store.away = True
    run = Spool(None, "run", store.tell, heard.append)
    run.put({"n": 0})
    store.away = False
    run.put({"n": 1})
    run.close()
    assert [n for _, n in store.told] == [1]
    assert len(heard) == 1


def test_the_reason_is_what_the_system_said_and_not_what_failed_beside_it() -> None:
    """A refused connection that is met while a cache is found empty; and an error that is its own cause."""
    try:
        try:
            {}["session"]
        except KeyError:
            raise ConnectionRefusedError("nobody listens") from None
    except OSError as refused:
        wrapped = RuntimeError("too many retries")
        wrapped.__cause__ = refused
    assert spool.reason(wrapped) == "ConnectionRefusedError: nobody listens"

    alone = ValueError("no such\nexperiment")
    alone.__cause__ = alone
    assert spool.reason(alone) == "ValueError: no such experiment"
