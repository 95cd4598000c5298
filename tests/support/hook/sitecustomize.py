"""sitecustomize: a hook in doit's own process; Python imports it from the path when it starts.

What it does is told, as JSON, by the environment variable MLX_MAKE_TEST_HOOK:

    {"under": FOLDER}                   an event is a file below it opened, renamed, made, removed
    {"record": FILE}                    at exit: write what was opened, imported, how many events
    {"kill": [COUNT, SIGNAL]}           at an event of that number: send oneself that signal
    {"full": [COUNT, NAME]}             from then on events of that name meet a full disk; of
                                        "open", those that may make a file
    {"free": BYTES}                     what shutil.disk_usage says is free
    {"cores": COUNT}                    how many cores the process may use, as os says
    {"reflinks": true}                  files can share blocks (FICLONE); here, they get a copy
    {"hold": [PART, MARK, FILE]}        at an event whose path has PART: make MARK, then wait until
                                        FILE exists, in each thread that comes there
    {"meet": [PART, SECONDS, COUNT]}    two threads of tasks that open paths with PART first meet,
                                        each COUNT times

It sees what goes through Python, not what a library in C opens by itself.
"""

import json
import os
import sys

EVENTS = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.chmod")
WAIT_SECONDS = 60


def _install(told):
    import atexit
    import collections
    import contextlib
    import errno
    import fcntl
    import shutil
    import threading
    import time

    under = told.get("under", "/")
    opened = []
    count = 0
    inside = threading.local()
    lock = threading.Lock()
    meeting = threading.Barrier(2)
    meetings = collections.Counter()

    def kill(number):
        at, signal = told["kill"]
        if number == at:
            os.kill(os.getpid(), signal)

    def fill(number, event, path, flags):
        start, name = told["full"]
        if number >= start and event == name and (event != "open" or flags & os.O_CREAT):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)

    def hold(path):
        part, mark, file = told["hold"]
        if part not in path or os.path.exists(file):
            return
        open(mark, "w").close()
        end = time.monotonic() + WAIT_SECONDS
        while not os.path.exists(file) and time.monotonic() < end:
            time.sleep(0.005)

    def meet(path):
        part, seconds, times = told["meet"]
        thread = threading.current_thread()
        if part in path and thread is not threading.main_thread() and meetings[thread] < times:
            meetings[thread] += 1
            with contextlib.suppress(threading.BrokenBarrierError):
                meeting.wait(seconds)

    def hook(event, args):
        nonlocal count
        if event not in EVENTS or getattr(inside, "hook", False):
            return
        path = args[0]
        if isinstance(path, bytes):
            path = os.fsdecode(path)
        if not isinstance(path, str) or not path.startswith(under):
            return
        inside.hook = True
        try:
            with lock:
                count += 1
                number = count
            if event == "open":
                opened.append(path)
            if "kill" in told:
                kill(number)
            if "full" in told:
                fill(number, event, path, args[2] if event == "open" else 0)
            if "hold" in told:
                hold(path)
            if "meet" in told:
                meet(path)
        finally:
            inside.hook = False

    def record():
        inside.hook = True
        with open(told["record"], "w", encoding="utf-8") as file:
            json.dump({"opened": opened, "modules": sorted(sys.modules), "events": count}, file)

    if "record" in told:
        atexit.register(record)
    if "free" in told:
        usage = shutil.disk_usage
        shutil.disk_usage = lambda path: usage(path)._replace(free=told["free"])
    if "cores" in told:
        os.sched_getaffinity = lambda _: set(range(told["cores"]))
    if "reflinks" in told:

        def share(new, _, old):
            os.copy_file_range(old, new.fileno(), os.fstat(old).st_size)

        fcntl.ioctl = share
    sys.addaudithook(hook)


# Not in the processes that doit starts.
if "MLX_MAKE_TEST_HOOK" in os.environ and "doit" in sys.orig_argv:
    _install(json.loads(os.environ["MLX_MAKE_TEST_HOOK"]))
