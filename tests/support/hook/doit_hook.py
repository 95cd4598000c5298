"""doit_hook: watches, holds, kills and deceives doit from within its own process.

What it does is told, as JSON, by the environment variable MLX_MAKE_TEST_HOOK:

    {"under": FOLDER}                   an event is a file below it opened, renamed, made, removed
    {"record": FILE}                    at exit: write what was opened, imported, how many events
    {"kill": [COUNT, SIGNAL]}           at an event of that number: send oneself that signal
    {"fail": [COUNT, ERRNO]}            at an event of that number: the system refuses it
    {"full": [COUNT, NAME]}             from then on events of that name meet a full disk; of
                                        "open", those that may make a file
    {"free": BYTES}                     what shutil.disk_usage says is free
    {"cores": COUNT}                    how many cores the process may use, as os says
    {"reflinks": true}                  files can share blocks (FICLONE); here, they get a copy
    {"ctimes": {PATH: NS}}              what os.stat says of when a file was changed
    {"hold": [PART, MARK, FILE]}        at an event whose path has PART: make MARK, then wait until
                                        FILE exists, in each thread that comes there
    {"meet": [PART, SECONDS, COUNT]}    two threads of tasks that open paths with PART first meet,
                                        each COUNT times

It sees what goes through Python, not what a library in C opens by itself.
"""

import atexit
import collections
import contextlib
import errno
import fcntl
import json
import os
import shutil
import sys
import threading
import time

EVENTS = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.chmod")
WAIT_SECONDS = 60


class Hook:
    """An audit hook that does what it is told."""

    def __init__(self, orders):
        self.orders = orders
        self.under = orders.get("under", "/")
        self.opened = []
        self.count = 0
        self.inside = threading.local()  # what the hook does is no event
        self.lock = threading.Lock()
        self.meeting = threading.Barrier(2)
        self.meetings = collections.Counter()
        self.acts = [getattr(self, name) for name in ("kill", "fail", "full", "hold", "meet")
                     if name in orders]  # fmt: skip

    def __call__(self, event, args):
        if event not in EVENTS or getattr(self.inside, "hook", False):
            return
        path = args[0]
        if isinstance(path, bytes):
            path = os.fsdecode(path)
        if not isinstance(path, str) or not path.startswith(self.under):
            return
        self.inside.hook = True
        try:
            with self.lock:
                self.count += 1
                number = self.count
            if event == "open":
                self.opened.append(path)
            for act in self.acts:
                act(number, event, path, args)
        finally:
            self.inside.hook = False

    def kill(self, number, event, path, args):
        at, signal = self.orders["kill"]
        if number == at:
            os.kill(os.getpid(), signal)

    def fail(self, number, event, path, args):
        at, cause = self.orders["fail"]
        if number == at:
            raise OSError(cause, os.strerror(cause), path)

    def full(self, number, event, path, args):
        start, name = self.orders["full"]
        if number >= start and event == name and (event != "open" or args[2] & os.O_CREAT):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)

    def hold(self, number, event, path, args):
        part, mark, file = self.orders["hold"]
        if part not in path or os.path.exists(file):
            return
        open(mark, "w").close()
        end = time.monotonic() + WAIT_SECONDS
        while not os.path.exists(file) and time.monotonic() < end:
            time.sleep(0.005)

    def meet(self, number, event, path, args):
        part, seconds, times = self.orders["meet"]
        thread = threading.current_thread()
        if part in path and thread is not threading.main_thread() and self.meetings[thread] < times:
            self.meetings[thread] += 1
            with contextlib.suppress(threading.BrokenBarrierError):
                self.meeting.wait(seconds)

    def record(self):
        self.inside.hook = True
        modules = sorted(name for name, module in sys.modules.items() if module is not None)
        facts = {"opened": self.opened, "modules": modules, "events": self.count}
        with open(self.orders["record"], "w", encoding="utf-8") as file:
            json.dump(facts, file)


def _replace(orders):
    """Have the system say what it is told to."""
    if "free" in orders:
        usage = shutil.disk_usage
        shutil.disk_usage = lambda path: usage(path)._replace(free=orders["free"])
    if "cores" in orders:
        os.sched_getaffinity = lambda _: set(range(orders["cores"]))
    if "reflinks" in orders:

        def share(new, _, old):
            os.copy_file_range(old, new.fileno(), os.fstat(old).st_size)

        fcntl.ioctl = share
    if "ctimes" in orders:
        stat, ctimes = os.stat, orders["ctimes"]

        def told(path, **how):
            found = stat(path, **how)
            changed = ctimes.get(str(path))
            facts = {} if changed is None else {"st_ctime_ns": changed}
            return os.stat_result(found, {**_by_name(found), **facts})

        os.stat = told


def _by_name(stat):
    return {name: getattr(stat, name) for name in dir(stat) if name.startswith("st_")}


def install(orders):
    hook = Hook(orders)
    if "record" in orders:
        atexit.register(hook.record)
    _replace(orders)
    sys.addaudithook(hook)
