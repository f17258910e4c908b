"""files.py DIR DESCRIPTORS

The Python sibling of files.c: keeps DESCRIPTORS files open below DIR, reads, appends, writes and renames all the while in a
thread, and knows what each must hold.

Commands: check, report, reset, tolerate 0|1, quit.
"""

import fcntl
import json
import os
import random
import resource
import sys
import threading
import time

SIZE = 4096
errors = []
faults = 0
operations = 0
tolerate = False
longest = 0
lock = threading.Lock()


def fail(text):
    if len(errors) < 24:
        errors.append(text)


def failed(what, error):
    global faults
    faults += 1
    if not tolerate:
        fail(f"{what}: {error}")


def pattern(number, offset, length):
    return bytes((number * 131 + (offset + i) * 7 + 1) & 255 for i in range(length))


class Slot:
    SORTS = ("buffered", "raw", "append", "unlinked", "directory")

    def __init__(self, directory, number):
        self.number = number
        self.sort = self.SORTS[number % len(self.SORTS)]
        self.path = os.path.join(directory, f"py-{number}")
        self.content = pattern(number, 0, SIZE)
        self.appended = 0
        self.file = None
        if self.sort == "directory":
            os.mkdir(self.path)
            self.fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        elif self.sort == "append":
            self.fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        elif self.sort == "buffered":
            self.file = open(self.path, "w+b")
            self.file.write(self.content)
            self.file.flush()
            self.fd = self.file.fileno()
        else:
            self.fd = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600)
            os.pwrite(self.fd, self.content, 0)
            if self.sort == "unlinked":
                os.unlink(self.path)
        self.flags = fcntl.fcntl(self.fd, fcntl.F_GETFL), fcntl.fcntl(self.fd, fcntl.F_GETFD)
        self.inode = os.fstat(self.fd).st_ino

    def step(self):
        offset = random.randrange(SIZE)
        length = random.randint(1, SIZE - offset)
        if self.sort == "directory":
            name = os.path.join(self.path, "entry")
            os.close(os.open(name, os.O_CREAT | os.O_WRONLY, 0o644))
            os.rename(name, name + ".moved")
            os.unlink(name + ".moved")
        elif self.sort == "append":
            os.write(self.fd, b"%015d\n" % self.appended)
            self.appended += 1
        elif self.sort == "buffered":
            self.file.seek(offset)
            if self.file.read(length) != self.content[offset : offset + length]:
                fail(f"{self.path}: wrong data at {offset}")
        elif random.random() < 0.5:
            if os.pread(self.fd, length, offset) != self.content[offset : offset + length]:
                fail(f"{self.path}: wrong data at {offset}")
        else:
            os.pwrite(self.fd, self.content[offset : offset + length], offset)

    def check(self):
        flags = fcntl.fcntl(self.fd, fcntl.F_GETFL), fcntl.fcntl(self.fd, fcntl.F_GETFD)
        if flags != self.flags:
            fail(f"{self.path}: flags {flags}, were {self.flags}")
        status = os.fstat(self.fd)
        if status.st_ino != self.inode:
            fail(f"{self.path}: inode {status.st_ino}, was {self.inode}")
        if self.sort == "append":
            if status.st_size != self.appended * 16:
                fail(f"{self.path}: {status.st_size} bytes, must be {self.appended * 16}")
            if self.appended and os.pread(self.fd, 16, status.st_size - 16) != b"%015d\n" % (self.appended - 1):
                fail(f"{self.path}: the last record is wrong")
        elif self.sort != "directory" and os.pread(self.fd, SIZE, 0) != self.content:
            fail(f"{self.path}: wrong data")


def work(slots):
    global operations
    while True:
        with lock:
            slot = random.choice(slots)
            try:
                slot.step()
            except OSError as error:
                failed(f"{slot.path} ({slot.sort})", error)
            operations += 1
        time.sleep(0.0002)


def watch():
    global longest
    last = time.monotonic()
    while True:
        time.sleep(0.0005)
        now = time.monotonic()
        longest = max(longest, now - last)
        last = now


def main():
    global tolerate, longest
    directory, count = sys.argv[1], int(sys.argv[2])
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    slots = [Slot(directory, number) for number in range(count)]
    threading.Thread(target=work, args=(slots,), daemon=True).start()
    threading.Thread(target=watch, daemon=True).start()
    print(json.dumps({"ready": True, "pids": [os.getpid()]}), flush=True)
    for line in sys.stdin:
        command = line.split()
        if command[0] in ("check", "quit"):
            with lock:
                for slot in slots:
                    try:
                        slot.check()
                    except OSError as error:
                        failed(f"{slot.path} ({slot.sort})", error)
        elif command[0] == "reset":
            longest = 0
        elif command[0] == "tolerate":
            tolerate = command[1] == "1"
        print(
            json.dumps(
                {"errors": errors, "operations": operations, "faults": faults, "gap_us": int(longest * 1e6)}
            ),
            flush=True,
        )
        if command[0] == "quit":
            os._exit(0)


main()
