"""load.py sqlite|prober VOLUME CONTROL NUMBER

One process of the load of `cargo xtask soak`. Works until CONTROL/stop is there, then writes what it saw to CONTROL/<role>-<number>.json:
operations done, errors (the first ten in words), and the longest time that one operation took in milliseconds."""

import json
import os
import sqlite3
import sys
import time

ROLE, VOLUME, CONTROL, NUMBER = sys.argv[1:5]
seen = {"operations": 0, "errors": 0, "longest_ms": 0.0, "words": []}


def stopped():
    # The directory goes with whoever measures, even if that is killed.
    return os.path.exists(CONTROL + "/stop") or not os.path.exists(CONTROL)


def failed(words):
    seen["errors"] += 1
    if len(seen["words"]) < 10:
        seen["words"].append(str(words))


def timed(act):
    start = time.monotonic()
    try:
        act()
        seen["operations"] += 1
        if seen["operations"] == 1:
            open("%s/%s-%s.works" % (CONTROL, ROLE, NUMBER), "w").close()
        return True
    except (OSError, sqlite3.Error) as error:
        failed(error)
        return False
    finally:
        seen["longest_ms"] = max(seen["longest_ms"], (time.monotonic() - start) * 1000)


def connect():
    # Autocommit: transactions begin and end where this program says so.
    db = sqlite3.connect(VOLUME + "/sqlite.db", timeout=60, isolation_level=None)
    db.execute("pragma journal_mode=wal")
    db.execute("create table if not exists row (writer text, number integer)")
    return db


def again(db):
    """Another connection after an error; what keeps it from being made is counted like any other."""
    while True:
        try:
            db.close()
            return connect()
        except sqlite3.Error as error:
            failed(error)
            time.sleep(0.1)


def sqlite():
    db = connect()
    committed = 0
    while not stopped():
        def transaction():
            db.execute("begin immediate")
            for number in range(5):
                db.execute("insert into row values (?, ?)", (NUMBER, committed + number))
            db.execute("commit")

        if timed(transaction):
            committed += 5
        else:
            db = again(db)
        time.sleep(0.01)
    found = db.execute("select count(*) from row where writer = ?", (NUMBER,)).fetchone()[0]
    if found != committed:
        failed("%d rows are committed, %d are there" % (committed, found))
    check = db.execute("pragma integrity_check").fetchone()[0]
    if check != "ok":
        failed(check)


def prober():
    fd = os.open(VOLUME + "/prober", os.O_RDWR | os.O_CREAT, 0o644)
    turn = 0
    while not stopped():
        data = bytes([turn % 251]) * 4096
        at = (turn % 64) * 4096

        def there_and_back():
            if os.pwrite(fd, data, at) != 4096:
                raise OSError("a short write")
            if os.pread(fd, 4096, at) != data:
                raise OSError("what was read is not what was written")

        timed(there_and_back)
        turn += 1
        time.sleep(0.001)


{"sqlite": sqlite, "prober": prober}[ROLE]()
with open("%s/%s-%s.json" % (CONTROL, ROLE, NUMBER), "w") as out:
    json.dump(seen, out)
