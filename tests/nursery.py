"""A process that imports everything once, and forks a child for each request: to start, to kill, and to starve.

A request is a line of JSON on standard input: `code` to run in the child, `log` for what it says, and optionally
`kill`, the number of the change to a file below `below` at which it dies by SIGKILL, or `after`, seconds until it does,
or gets another `signal`.
The answer is a line with its exit code (negative: the signal) and how many changes it made.
"""

import gc
import json
import os
import signal
import sys
import threading
import time
import traceback

from transformers.models.llama import tokenization_llama  # noqa: F401
from transformers.models.mistral import modeling_mistral  # noqa: F401
from transformers.trainer import Trainer  # noqa: F401

import mini_symposium.cli.main
import mini_symposium.models.merge
import mini_symposium.training.finetune  # noqa: F401

CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "fcntl.flock")
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


def count_changes(below: str, kill: int | None, pipe: int) -> None:
    made = 0

    def audit(event, arguments):
        nonlocal made
        opened = event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITES
        if (opened or event in CHANGES) and (event == "fcntl.flock" or str(arguments[0]).startswith(below)):
            made += 1
            os.pwrite(pipe, str(made).encode(), 0)
            if made == kill:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(audit)


def child(request: dict, counter: int) -> None:
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    os.dup2(log, 1)
    os.dup2(log, 2)
    code = 1
    try:
        count_changes(request["below"], request.get("kill"), counter)
        exec(compile(request["code"], "request", "exec"), {"__name__": "request"})
        code = 0
    except SystemExit as ended:
        code = ended.code or 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def main() -> None:
    assert threading.active_count() == 1, threading.enumerate()  # a fork has but one of them
    gc.freeze()  # a child need not look through all that was imported
    for line in sys.stdin:
        request = json.loads(line)
        counter = os.memfd_create("changes")
        pid = os.fork()
        if pid == 0:
            child(request, counter)
        if "after" in request:
            time.sleep(request["after"])
            os.kill(pid, request.get("signal", signal.SIGKILL))
        _, status = os.waitpid(pid, 0)
        answer = [os.waitstatus_to_exitcode(status), int(os.pread(counter, 20, 0) or 0)]
        os.close(counter)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
