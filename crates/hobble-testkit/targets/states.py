"""states.py DIR STATE

A program in one state, looked at in four steps: before anything is done to it, and after each of three commands `step` (it is attached, its rules are changed, it is
recovered). What it sees must be the same as where nothing was done to it at all.

Each state is a generator; what it yields is what it saw. Commands: step, quit.
"""

import array
import ctypes
import errno
import fcntl
import json
import mmap
import os
import resource
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time

libc = ctypes.CDLL(None, use_errno=True)
children = []


def attempt(call, *arguments, **more):
    """The result, or the name of the error."""
    try:
        return call(*arguments, **more)
    except OSError as error:
        return errno.errorcode.get(error.errno, str(error.errno))


def read(path):
    with open(path, "rb") as file:
        return file.read().decode()


def write(path, text):
    with open(path, "w") as file:
        file.write(text)


def fork(work):
    """A child that runs `work` with the writing end of a pipe, and the reading end of it."""
    out, into = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(out)
            work(into)
        finally:
            os._exit(0)
    os.close(into)
    children.append(child)
    return child, out


def in_child(call):
    """What another process sees."""
    def work(into):
        os.write(into, json.dumps(call()).encode())
    child, out = fork(work)
    said = b""
    while part := os.read(out, 65536):
        said += part
    os.close(out)
    os.waitpid(child, 0)
    children.remove(child)
    return json.loads(said)


def lock(fd, kind, wait=False, command=None):
    request = struct.pack("hhqqi4x", kind, os.SEEK_SET, 0, 0, 0)
    fcntl.fcntl(fd, command or (fcntl.F_SETLKW if wait else fcntl.F_SETLK), request)
    return "ok"


def give_a_name(fd, name):
    # AT_FDCWD, AT_SYMLINK_FOLLOW
    done = libc.linkat(-100, f"/proc/self/fd/{fd}".encode(), -100, name.encode(), 0x400)
    return "ok" if done == 0 else errno.errorcode[ctypes.get_errno()]


def tmpfile_linked_meanwhile():
    fd = os.open(".", os.O_TMPFILE | os.O_RDWR, 0o644)
    os.write(fd, b"one")
    yield os.fstat(fd).st_nlink
    yield give_a_name(fd, "linked"), read("linked")
    os.write(fd, b" two")
    yield read("linked"), os.fstat(fd).st_nlink
    yield read("linked"), os.fstat(fd).st_nlink, os.stat("linked").st_size


def tmpfile_linked_afterwards():
    fd = os.open(".", os.O_TMPFILE | os.O_RDWR, 0o644)
    os.write(fd, b"one")
    yield os.fstat(fd).st_nlink
    os.write(fd, b" two")
    yield os.fstat(fd).st_size
    yield os.pread(fd, 100, 0).decode()
    yield give_a_name(fd, "linked"), read("linked")


def renamed():
    fd = os.open("first", os.O_RDWR | os.O_CREAT)
    os.write(fd, b"a")
    for name, next_name in [("first", "second"), ("second", "third"), ("third", "fourth"), ("fourth", "fifth")]:
        os.rename(name, next_name)
        os.write(fd, b"b")
        yield read(next_name), os.path.exists(name)


def name_used_again():
    old = os.open("name", os.O_RDWR | os.O_CREAT)
    os.write(old, b"old")
    os.unlink("name")
    new = os.open("name", os.O_RDWR | os.O_CREAT | os.O_EXCL)
    os.write(new, b"new")
    for _ in range(4):
        os.write(old, b"-")
        os.write(new, b"+")
        yield os.pread(old, 99, 0).decode(), os.pread(new, 99, 0).decode(), read("name"), os.fstat(old).st_nlink


def privileges_dropped():
    os.mkdir("secret", 0o700)
    fd = os.open("secret/file", os.O_RDWR | os.O_CREAT, 0o600)
    os.chmod(".", 0o711)
    os.setgroups([])
    os.setresgid(65534, 65534, 65534)
    os.setresuid(65534, 65534, 65534)
    libc.prctl(4, 1, 0, 0, 0)
    for _ in range(4):
        os.write(fd, b"x")
        yield os.fstat(fd).st_size, attempt(os.open, "secret/file", os.O_RDONLY), attempt(os.open, "new", os.O_CREAT | os.O_WRONLY)


def table_full():
    kept = [os.open("file", os.O_RDWR | os.O_CREAT) for _ in range(40)]
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(kept) + 1, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    for _ in range(4):
        for fd in kept:
            os.pwrite(fd, b"y", fd)
        yield attempt(os.open, "file", os.O_RDONLY), resource.getrlimit(resource.RLIMIT_NOFILE)[0] == max(kept) + 1, os.stat("file").st_size == max(kept) + 1


def flags_of_open_files():
    write("file", "content")
    flags = [os.O_RDONLY, os.O_WRONLY, os.O_RDWR | os.O_APPEND, os.O_RDWR | os.O_SYNC, os.O_RDWR | os.O_DSYNC, os.O_RDONLY | os.O_NOATIME, os.O_RDWR | os.O_DIRECT,
             os.O_PATH, os.O_RDONLY | os.O_NONBLOCK, os.O_RDONLY | os.O_CLOEXEC]
    fds = [os.open("file", flag) for flag in flags]
    fcntl.fcntl(fds[0], fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(fds[0], fcntl.F_SETFL, fcntl.fcntl(fds[0], fcntl.F_GETFL) | os.O_ASYNC)
    for _ in range(4):
        yield [fcntl.fcntl(fd, fcntl.F_GETFL) for fd in fds], [fcntl.fcntl(fd, fcntl.F_GETFD) for fd in fds], fcntl.fcntl(fds[0], fcntl.F_GETOWN) == os.getpid()


def directory_being_read():
    os.mkdir("many")
    for number in range(3000):
        write(f"many/entry-with-quite-a-long-name-{number}", "")
    entries = os.scandir("many")
    seen = []
    for _ in range(3):
        seen += [next(entries).name for _ in range(700)]
        yield len(seen)
    seen += [entry.name for entry in entries]
    yield len(seen), len(set(seen))


def working_directory():
    os.mkdir("below")
    os.chdir("below")
    for step in range(4):
        write(f"file-{step}", "x")
        yield os.path.basename(os.getcwd()), sorted(os.listdir(".")), sorted(os.listdir("..")), os.path.basename(os.readlink("/proc/self/cwd"))


def working_directory_removed():
    os.mkdir("below")
    os.chdir("below")
    os.rmdir("../below")
    for _ in range(4):
        yield attempt(os.getcwd), attempt(os.listdir, "."), attempt(os.open, "new", os.O_CREAT | os.O_WRONLY)


def changed_root():
    """Of a child: the program that is named has to have the path of the volume below its own root."""
    os.mkdir("root")
    write("root/file", "inside")
    asked, ask = os.pipe()

    def work(into):
        os.chroot("root")
        os.chdir("/")
        for step in range(4):
            os.read(asked, 1)
            write(f"/new-{step}", "x")
            os.write(into, json.dumps([read("/file"), sorted(os.listdir("/")), sorted(os.listdir("/.."))]).encode())

    _, out = fork(work)
    for _ in range(4):
        os.write(ask, b"?")
        yield os.read(out, 65536).decode()


def locks_upgraded():
    fds = {kind: os.open(kind, os.O_RDWR | os.O_CREAT) for kind in ("posix", "ofd", "flock")}
    ofd = 37

    def seen_by_another():
        other = {kind: os.open(kind, os.O_RDWR) for kind in fds}
        return [attempt(lock, other["posix"], kind) for kind in (fcntl.F_RDLCK, fcntl.F_WRLCK)] + [
            attempt(lock, other["ofd"], kind, command=ofd) for kind in (fcntl.F_RDLCK, fcntl.F_WRLCK)] + [
            attempt(fcntl.flock, other["flock"], kind | fcntl.LOCK_NB) for kind in (fcntl.LOCK_SH, fcntl.LOCK_EX)]

    lock(fds["posix"], fcntl.F_RDLCK)
    lock(fds["ofd"], fcntl.F_RDLCK, command=ofd)
    fcntl.flock(fds["flock"], fcntl.LOCK_SH)
    yield in_child(seen_by_another)
    lock(fds["posix"], fcntl.F_WRLCK)
    lock(fds["ofd"], fcntl.F_WRLCK, command=ofd)
    fcntl.flock(fds["flock"], fcntl.LOCK_EX)
    yield in_child(seen_by_another)
    yield in_child(seen_by_another)
    before = in_child(seen_by_another)
    lock(fds["posix"], fcntl.F_UNLCK)
    lock(fds["ofd"], fcntl.F_UNLCK, command=ofd)
    fcntl.flock(fds["flock"], fcntl.LOCK_UN)
    yield before, in_child(seen_by_another)


def lock_waited_for(kind):
    """The waiter waits from before the attachment until after the recovery."""
    fd = os.open("locked", os.O_RDWR | os.O_CREAT)
    take = (lambda fd: lock(fd, fcntl.F_WRLCK, wait=True)) if kind == "posix" else (lambda fd: fcntl.flock(fd, fcntl.LOCK_EX))
    give = (lambda fd: lock(fd, fcntl.F_UNLCK)) if kind == "posix" else (lambda fd: fcntl.flock(fd, fcntl.LOCK_UN))
    take(fd)

    def work(into):
        own = os.open("locked", os.O_RDWR)
        os.write(into, b"w")
        os.write(into, b"got" if attempt(take, own) in ("ok", None) else b"failed")

    child, out = fork(work)
    os.read(out, 1)
    time.sleep(0.1)
    os.set_blocking(out, False)
    for _ in range(3):
        yield attempt(os.read, out, 10)
    give(fd)
    os.set_blocking(out, True)
    yield os.read(out, 10).decode()


def file_that_grows_and_shrinks():
    fd = os.open("file", os.O_RDWR | os.O_CREAT)
    for size in (10000, 100, 50000, 7):
        os.ftruncate(fd, size)
        os.pwrite(fd, b"end", size - 3)
        yield os.stat("file").st_size, os.fstat(fd).st_size, os.pread(fd, 3, size - 3).decode(), len(read("file"))


def directory_watched():
    watch = libc.inotify_init1(os.O_NONBLOCK)
    libc.inotify_add_watch(watch, b".", 0x100 | 0x200)
    for step in range(4):
        write(f"file-{step}", "x")
        os.unlink(f"file-{step}")
        time.sleep(0.05)
        events, names = os.read(watch, 65536), []
        while events:
            _, mask, _, length = struct.unpack_from("iIII", events)
            names.append((mask, events[16:16 + length].rstrip(b"\0").decode()))
            events = events[16 + length:]
        yield names


def descriptor_in_a_socket():
    fd = os.open("file", os.O_RDWR | os.O_CREAT)
    os.write(fd, b"sent")
    one, other = socket.socketpair()
    one.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))])
    os.close(fd)
    yield read("file")
    yield read("file")
    yield read("file")
    _, control, _, _ = other.recvmsg(1, socket.CMSG_SPACE(4))
    received = array.array("i", control[0][2])[0]
    yield os.pread(received, 10, 0).decode(), os.write(received, b"+"), read("file")


def sockets_and_pipes_by_name():
    server = socket.socket(socket.AF_UNIX)
    server.bind(os.path.abspath("socket"))
    server.listen()
    os.mkfifo("pipe")
    pipe = os.open("pipe", os.O_RDWR)
    for _ in range(4):
        client = socket.socket(socket.AF_UNIX)
        connected = attempt(client.connect, "socket")
        peer = server.accept()[0] if connected is None else None
        sent = peer and (client.send(b"hello"), peer.recv(10).decode())
        writer = os.open("pipe", os.O_WRONLY | os.O_NONBLOCK)
        os.write(writer, b"through")
        os.close(writer)
        yield connected, sent, os.read(pipe, 20).decode()


def sent_without_copying():
    write("file", "0123456789" * 1000)
    fd = os.open("file", os.O_RDONLY)
    for step in range(4):
        out, into = os.pipe()
        count = os.sendfile(into, fd, step * 10, 4000)
        yield count, os.read(out, 5000).decode()
        os.close(out), os.close(into)


def many_mappings():
    write("file", "".join(chr(65 + page % 26) * 4096 for page in range(256)))
    fd = os.open("file", os.O_RDWR)
    maps = [mmap.mmap(fd, 4096, flags=mmap.MAP_PRIVATE if page % 2 else mmap.MAP_SHARED, offset=page * 4096) for page in range(256)]
    for page in range(1, 256, 16):
        maps[page][0:5] = b"dirty"
    for step in range(4):
        maps[2 * step][0:6] = b"shared"
        yield [mapping[0:6].decode() for mapping in maps], read("file")[8192 * step:8192 * step + 6]


def library_of_the_volume():
    shutil.copy(next(path for path in ("/lib/x86_64-linux-gnu/libm.so.6", "/lib64/libm.so.6", "/usr/lib/libm.so.6") if os.path.exists(path)), "before.so")
    shutil.copy("before.so", "meanwhile.so")

    def root(path):
        library = ctypes.CDLL(os.path.abspath(path))
        library.sqrt.restype, library.sqrt.argtypes = ctypes.c_double, [ctypes.c_double]
        return library.sqrt(2.0)

    yield root("before.so")
    for _ in range(3):
        yield root("before.so"), root("meanwhile.so")


def program_of_the_volume():
    shutil.copy("/bin/cat", "program")
    write("file", "by a program of the volume")
    running = subprocess.Popen(["./program"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    children.append(running.pid)
    for step in range(4):
        running.stdin.write(b"%d\n" % step)
        running.stdin.flush()
        yield subprocess.run(["./program", "file"], capture_output=True, check=False).stdout.decode(), running.stdout.readline().decode()


def threads_all_the_time():
    write("file", "content")
    stop, counts = threading.Event(), [0, 0]

    def once():
        counts[0] += read("file") == "content"

    def spawn():
        while not stop.is_set():
            thread = threading.Thread(target=once)
            thread.start()
            thread.join()
            counts[1] += 1

    spawner = threading.Thread(target=spawn, daemon=True)
    spawner.start()
    for _ in range(4):
        time.sleep(0.2)
        yield counts[1] > 50
    stop.set()
    spawner.join()


def children_all_the_time():
    write("file", "content")
    stop = False
    wrong = []

    def spawn():
        while not stop:
            child = os.fork()
            if child == 0:
                try:
                    os._exit(0 if read("file") == "content" else 1)
                except OSError:
                    os._exit(2)
            status = os.waitpid(child, 0)[1]
            if status:
                wrong.append(status)

    spawner = threading.Thread(target=spawn, daemon=True)
    spawner.start()
    for step in range(4):
        time.sleep(0.2)
        if step == 3:
            stop = True
            spawner.join()
        yield wrong


def stopped_child_and_zombie():
    fd = os.open("file", os.O_RDWR | os.O_CREAT)

    def work(into):
        for _ in range(1000):
            os.pwrite(fd, b"x", 0)
            os.write(into, b".")
            time.sleep(0.01)

    child, out = fork(work)
    os.read(out, 1)
    os.kill(child, signal.SIGSTOP)
    os.waitpid(child, os.WUNTRACED)
    zombie = os.fork()
    if zombie == 0:
        os._exit(0)
    time.sleep(0.05)
    os.set_blocking(out, False)
    attempt(os.read, out, 4096)
    for _ in range(3):
        yield attempt(os.read, out, 4096), os.pread(fd, 1, 0).decode()
    os.kill(child, signal.SIGCONT)
    os.set_blocking(out, True)
    yield os.read(out, 1).decode(), os.waitpid(zombie, 0)[1]


def no_new_privileges():
    libc.prctl(38, 1, 0, 0, 0)
    fd = os.open("file", os.O_RDWR | os.O_CREAT)
    for _ in range(4):
        os.write(fd, b"x")
        yield libc.prctl(39, 0, 0, 0, 0), read("file"), subprocess.run(["cat", "file"], capture_output=True, check=False).stdout.decode()


def namespace_of_its_own():
    """A child with a mount namespace of its own: no target, and unharmed."""
    def work(into):
        # CLONE_NEWNS, after which nothing is shared.
        libc.unshare(0x20000)
        libc.mount(b"none", b"/", None, 0x44000, None)
        os.write(into, b"r")
        for number in range(100):
            write("own", str(number))
            os.write(into, b"." if read("own") == str(number) else b"!")
            time.sleep(0.02)

    _, out = fork(work)
    os.read(out, 1)
    for _ in range(4):
        time.sleep(0.1)
        yield set(os.read(out, 4096).decode()) == {"."}


def real_time_signals():
    counts = [0]
    number = signal.SIGRTMIN + 3
    signal.signal(number, lambda *_: counts.__setitem__(0, counts[0] + 1))
    sent = 0
    own = os.getpid()
    for _ in range(4):
        signal.pthread_sigmask(signal.SIG_BLOCK, [number])
        for _ in range(200):
            libc.sigqueue(own, number, ctypes.c_void_p(7))
            sent += 1
        # They wait while something is done to us.
        yield sent
        waiting = 0
        while signal.sigtimedwait([number], 0):
            waiting += 1
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [number])
        sent -= 200 - waiting


def until_stopped(work):
    """Runs work on a thread until the returned function is called."""
    stop = threading.Event()

    def run():
        while not stop.is_set():
            work()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()

    def end():
        stop.set()
        thread.join()

    return end


def blocked_calls():
    """By ctypes, which does not hide an EINTR as Python's own functions do."""
    milliseconds = 150
    span = (ctypes.c_long * 2)(0, milliseconds * 1000000)
    epoll = libc.epoll_create1(0)
    events = ctypes.create_string_buffer(64)
    word = ctypes.c_uint32(0)
    sleeper, _peer = socket.socketpair()
    sleeper.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", 0, milliseconds * 1000))
    # What each is to return after its time: the result and the error.
    calls = {
        "nanosleep": (lambda: libc.nanosleep(span, None), 0, 0),
        "clock_nanosleep": (lambda: libc.clock_nanosleep(1, 0, span, None), 0, 0),
        "poll": (lambda: libc.poll(None, 0, milliseconds), 0, 0),
        "epoll_wait": (lambda: libc.epoll_wait(epoll, events, 1, milliseconds), 0, 0),
        "select": (lambda: libc.select(0, None, None, None, (ctypes.c_long * 2)(0, milliseconds * 1000)), 0, 0),
        "futex": (lambda: libc.syscall(202, ctypes.byref(word), 0, 0, span, None, 0), -1, errno.ETIMEDOUT),
        "recv": (lambda: libc.recv(sleeper.fileno(), events, 1, 0), -1, errno.EAGAIN),
    }
    wrong, done = [], dict.fromkeys(calls, 0)

    def blocked(name, call, result, error):
        def once():
            ctypes.set_errno(0)
            begun = time.monotonic()
            got = call()
            took = time.monotonic() - begun
            failed = ctypes.get_errno() if got == -1 else 0
            if (got, failed) != (result, error):
                wrong.append(f"{name}: {got} {errno.errorcode.get(failed)}")
            # The kernel's clock ticks are not finer.
            if took < milliseconds / 1000 - 0.005:
                wrong.append(f"{name} ended after {took:.3f} s")
            done[name] += 1
        return once

    ends = [until_stopped(blocked(name, *call)) for name, call in calls.items()]
    for _ in range(4):
        time.sleep(0.4)
        yield sorted(set(wrong)), all(count > 0 for count in done.values())
    for end in ends:
        end()


def futex_in_a_mapping():
    """Waiters from before an exchange are woken by whoever wakes after it."""
    write("file", "\0" * 4096)
    fd = os.open("file", os.O_RDWR)
    memory = mmap.mmap(fd, 4096)
    word = ctypes.c_uint32.from_buffer(memory)

    def work(into):
        for _ in range(3):
            os.write(into, b"w")
            span = (ctypes.c_long * 2)(10, 0)
            woken = libc.syscall(202, ctypes.byref(word), 0, word.value, span, None, 0)
            os.write(into, b"." if woken == 0 or ctypes.get_errno() == errno.EAGAIN else b"!")

    _, out = fork(work)
    os.read(out, 1)
    time.sleep(0.05)
    yield "waiting"
    for _ in range(3):
        word.value += 1
        woken = libc.syscall(202, ctypes.byref(word), 1, 10, None, None, 0)
        said = os.read(out, 1).decode()
        time.sleep(0.05)
        yield woken, said


def mappings_with_attributes():
    write("file", "x" * 4096 * 16)
    fd = os.open("file", os.O_RDWR)
    libc.mmap.restype = libc.mremap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
    libc.mremap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int]
    for call in (libc.mprotect, libc.madvise, libc.mlock, libc.munmap):
        call.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int][:2 if call in (libc.mlock, libc.munmap) else 3]

    def mapped(pages, shared=True):
        return libc.mmap(None, pages * 4096, 3, 1 if shared else 2, fd, 0)

    guarded, locked, kept, moved, cut = mapped(2), mapped(1), mapped(2, False), mapped(2), mapped(3)
    libc.mprotect(guarded, 4096, 0)
    libc.mlock(locked, 4096)
    for advice in (10, 16, 18 + 0):
        # MADV_DONTFORK, MADV_DONTDUMP; MADV_WIPEONFORK is for anonymous memory and refused.
        libc.madvise(kept, 4096, advice)
    moved = libc.mremap(moved, 2 * 4096, 8 * 4096, 1)
    libc.munmap(cut + 4096, 4096)

    def flags():
        seen, current = [], None
        for line in read("/proc/self/smaps").splitlines():
            if "VmFlags" in line and current:
                seen.append((current, sorted(set(line.split()[1:]) - {"sd", "mr"})))
            elif line[:1] in "0123456789abcdef" and "-" in line.split()[0]:
                fields = line.split()
                low, high = (int(number, 16) for number in fields[0].split("-"))
                current = [fields[1], (high - low) // 4096, int(fields[2], 16)] if fields[-1].endswith("/file") else None
        return sorted(seen)

    for step in range(4):
        ctypes.memset(moved + step, 65 + step, 1)
        ctypes.memset(cut, 97 + step, 1)
        yield flags(), ctypes.string_at(moved, 8).decode(), ctypes.string_at(cut, 1).decode(), read("file")[:8]


def thread_with_a_table_of_its_own():
    ask, asked, answer = threading.Event(), [], threading.Semaphore(0)

    def run():
        # CLONE_FILES
        libc.unshare(0x400)
        fd = os.open("own", os.O_RDWR | os.O_CREAT)
        while True:
            ask.wait()
            ask.clear()
            os.write(fd, b"o")
            asked.append((os.pread(fd, 10, 0).decode(), os.fstat(fd).st_size))
            answer.release()

    threading.Thread(target=run, daemon=True).start()
    for step in range(4):
        shared = os.open(f"shared-{step}", os.O_RDWR | os.O_CREAT)
        ask.set()
        answer.acquire()
        yield asked[-1], os.write(shared, b"s"), read(f"shared-{step}")


def thread_with_a_directory_of_its_own():
    os.mkdir("below")
    ask, asked, answer = threading.Event(), [], threading.Semaphore(0)

    def run():
        # CLONE_FS
        libc.unshare(0x200)
        os.chdir("below")
        while True:
            ask.wait()
            ask.clear()
            write(f"file-{len(asked)}", "x")
            asked.append((os.path.basename(os.getcwd()), sorted(os.listdir("."))))
            answer.release()

    threading.Thread(target=run, daemon=True).start()
    for _ in range(4):
        ask.set()
        answer.acquire()
        yield asked[-1], sorted(os.listdir("."))


def filtered_by_seccomp(forbidden):
    """The process is killed for system calls of these numbers."""
    code = [struct.pack("HBBI", 0x20, 0, 0, 0)]
    code += [struct.pack("HBBI", 0x15, len(forbidden) - at, 0, number) for at, number in enumerate(forbidden)]
    code += [struct.pack("HBBI", 0x06, 0, 0, 0x7fff0000), struct.pack("HBBI", 0x06, 0, 0, 0x80000000)]
    program = ctypes.create_string_buffer(b"".join(code))
    write("file", "")
    fd = os.open("file", os.O_RDWR | os.O_APPEND)
    libc.prctl(38, 1, 0, 0, 0)
    filtered = libc.prctl(22, 2, ctypes.create_string_buffer(struct.pack("HxxxxxxQ", len(code), ctypes.addressof(program))), 0, 0)
    for _ in range(4):
        os.write(fd, b"x")
        yield filtered, read("file"), "Seccomp:\t2" in read("/proc/self/status")


def seccomp_filter():
    # ptrace, mount, socket
    yield from filtered_by_seccomp((101, 165, 41))


def seccomp_filter_without_recvmsg():
    yield from filtered_by_seccomp((47,))


def child_with_namespaces(flags):
    def work(into):
        libc.unshare(flags)
        child = os.fork()
        if child:
            os.waitpid(child, 0)
            return
        fd = os.open("file", os.O_RDWR | os.O_APPEND)
        for number in range(100):
            os.write(fd, b"x")
            os.write(into, b"." if os.fstat(fd).st_size == number + 1 and len(read("file")) == number + 1 else b"!")
            time.sleep(0.02)

    write("file", "")
    os.chmod("file", 0o666)
    _, out = fork(work)
    for _ in range(4):
        time.sleep(0.1)
        yield set(os.read(out, 4096).decode()) == {"."}


def user_namespace():
    yield from child_with_namespaces(0x10000000)


def pid_namespace():
    yield from child_with_namespaces(0x20000000)


def posix_lock_waited_for():
    yield from lock_waited_for("posix")


def flock_waited_for():
    yield from lock_waited_for("flock")


def main():
    os.chdir(sys.argv[1])
    state = globals()[sys.argv[2]]()
    print(json.dumps({"ready": True, "pids": [os.getpid()], "saw": next(state)}), flush=True)
    for line in sys.stdin:
        command = line.strip()
        if command == "quit":
            for child in children:
                attempt(os.kill, child, signal.SIGKILL)
            print(json.dumps({"errors": [], "error_count": 0}), flush=True)
            return
        try:
            answer = {"errors": [], "error_count": 0, "saw": next(state)}
        except Exception as error:  # whatever it is, it is what the test is about
            answer = {"errors": [repr(error)], "error_count": 1}
        print(json.dumps(answer), flush=True)


main()
