"""sqlite_pool.py DATABASE wal|delete THREADS PROCESSES

PROCESSES processes with THREADS connections each write to one SQLite database all the while; every commit that SQLite reported as done is
remembered, and must be found again.

Commands: open N (N more connections in every process), check (do all remembered commits exist, and nothing else?), report, quit.
"""

import json
import os
import sqlite3
import subprocess
import sys
import threading
import time

database, mode, threads, processes = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
worker = int(sys.argv[5]) if len(sys.argv) > 5 else 0
stop = threading.Event()
writers = []
errors = []
busy = 0
failures = {}
children = []


def connect():
    connection = sqlite3.connect(database, timeout=20, isolation_level=None, check_same_thread=False)
    connection.execute("PRAGMA synchronous=NORMAL")
    # Small enough that checkpoints happen while the test runs.
    connection.execute("PRAGMA wal_autocheckpoint=50")
    return connection


class Writer(threading.Thread):
    def __init__(self):
        super().__init__(daemon=True)
        self.number = worker * 1000 + len(writers)
        self.committed = []
        self.unknown = []
        self.connection = connect()

    def run(self):
        global busy
        sequence = 0
        while not stop.is_set():
            sequence += 1
            committing = False
            try:
                self.connection.execute("BEGIN IMMEDIATE")
                self.connection.execute("INSERT INTO t VALUES (?, ?, ?)", (self.number, sequence, "x" * 200))
                committing = True
                self.connection.execute("COMMIT")
                self.committed.append(sequence)
            except sqlite3.Error as error:
                text = str(error)
                if "locked" in text or "busy" in text:
                    busy += 1
                else:
                    failures[text] = failures.get(text, 0) + 1
                try:
                    if self.connection.in_transaction:
                        self.connection.execute("ROLLBACK")
                        committing = False
                except sqlite3.Error as second:
                    failures[f"ROLLBACK: {second}"] = failures.get(f"ROLLBACK: {second}", 0) + 1
                if committing:
                    # The commit failed and no transaction is left: it may or may not have happened.
                    self.unknown.append(sequence)
            time.sleep(0.002)
        self.connection.close()


def start(count):
    for _ in range(count):
        writer = Writer()
        writers.append(writer)
        writer.start()


def summary():
    return {
        "committed": {w.number: list(w.committed) for w in writers},
        "unknown": {w.number: list(w.unknown) for w in writers},
        "busy": busy,
        "failures": failures,
    }


def ask(child, command):
    child.stdin.write(command + "\n")
    child.stdin.flush()
    return json.loads(child.stdout.readline())


def collect(command):
    total = summary()
    for child in children:
        other = ask(child, command)
        for key in ("committed", "unknown"):
            total[key].update(other[key])
        total["busy"] += other["busy"]
        for text, count in other["failures"].items():
            total["failures"][text] = total["failures"].get(text, 0) + count
    return total


def finish():
    stop.set()
    for writer in writers:
        writer.join()


def check():
    finish()
    total = collect("finish")
    committed = {(int(w), s) for w, list_ in total["committed"].items() for s in list_}
    unknown = {(int(w), s) for w, list_ in total["unknown"].items() for s in list_}
    connection = connect()
    found = set(connection.execute("SELECT writer, sequence FROM t"))
    for row in sorted(committed - found)[:10]:
        errors.append(f"committed row {row} is lost")
    for row in sorted(found - committed - unknown)[:10]:
        errors.append(f"row {row} was never committed")
    verdict = connection.execute("PRAGMA integrity_check").fetchone()[0]
    if verdict != "ok":
        errors.append(f"integrity_check: {verdict}")
    connection.close()
    return {"committed": len(committed), "found": len(found), "lost": len(committed - found), **counts(total)}


def counts(total):
    return {"busy": total["busy"], "failures": total["failures"]}


def child_main():
    start(threads)
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        command = line.split()
        if command[0] == "open":
            start(int(command[1]))
        elif command[0] == "finish":
            finish()
        print(json.dumps(summary()), flush=True)
    os._exit(0)


def main():
    if worker:
        return child_main()
    connection = connect()
    connection.execute(f"PRAGMA journal_mode={mode}")
    connection.execute("CREATE TABLE t (writer INTEGER, sequence INTEGER, payload TEXT, PRIMARY KEY (writer, sequence))")
    connection.close()
    for number in range(1, processes):
        arguments = [sys.executable, __file__, database, mode, str(threads), str(processes), str(number)]
        child = subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        child.stdout.readline()
        children.append(child)
    start(threads)
    print(json.dumps({"ready": True, "pids": [os.getpid()] + [child.pid for child in children]}), flush=True)
    answer = {}
    for line in sys.stdin:
        command = line.split()
        if command[0] == "open":
            start(int(command[1]))
            answer = counts(collect(line.strip()))
        elif command[0] == "check":
            answer = check()
        elif command[0] == "report":
            total = collect("report")
            answer = {"committed": sum(map(len, total["committed"].values())), **counts(total)}
        print(json.dumps({"errors": errors, **answer}), flush=True)
        if command[0] == "quit":
            break
    for child in children:
        child.stdin.close()
        child.wait(10)
    os._exit(0)


main()
