"""Whether math-verify calls an answer equal to the right one, asked in a process of its own that can be ended.

An answer is text of a model, and 9**9**9**9 keeps sympy busy for ever, within one operation that no signal interrupts;
the timeouts of math-verify are signals besides, and those exist in the main thread alone. So a child process does the
work: one JSON line [gold, answer] in, one line 1 or 0 out, at most `SECONDS` each, then it is killed and the answer is
not equal. The child is this file run as a script.
"""

from __future__ import annotations

import json
import logging
import os
import re
import selectors
import subprocess
import sys
from functools import cache
from threading import Lock

# Of a whole question, in the parent; of parsing and of one comparison, in the child.
SECONDS = 8.0
INNER_SECONDS = 3
START_SECONDS = 120.0
CHILD_BYTES = 4 << 30
# Characters of an answer: a longer one is prose.
LONGEST = 200
MARKUP = re.compile(r"\\?\$|\\[()\[\]]")
# Between thousands, where math-verify would multiply.
THIN_SPACE = re.compile(r"(?<=[0-9])\\[,!](?=[0-9]{3})")


class Grader:
    """One child process, started when first asked and again after an answer that it did not survive."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._child: subprocess.Popen[bytes] | None = None

    def equal(self, gold: str, answer: str) -> bool:
        """Safe to call from any thread; longer texts than `LONGEST` are never equal."""
        if len(gold) > LONGEST or len(answer) > LONGEST:
            return False
        with self._lock:
            child = self._running()
            assert child.stdin is not None
            child.stdin.write(json.dumps([gold, answer]).encode() + b"\n")
            reply = _line(child, SECONDS)
            if not reply:
                self._end()
            return reply == b"1\n"

    def close(self) -> None:
        with self._lock:
            self._end()

    def _running(self) -> subprocess.Popen[bytes]:
        if self._child and self._child.poll() is not None:
            self._end()
        if self._child is None:
            # -P: the folder of this file is no place to import from.
            command = [sys.executable, "-P", __file__]
            self._child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
            if _line(self._child, START_SECONDS) != b"ready\n":
                self._end()
                raise RuntimeError("math-verify did not start; what its process wrote is above")
        return self._child

    def _end(self) -> None:
        if self._child:
            self._child.kill()
            self._child.communicate()
            self._child = None


def _line(child: subprocess.Popen[bytes], seconds: float) -> bytes:
    """The next line of the child, or nothing: it ended, or the time is over."""
    assert child.stdout is not None
    with selectors.DefaultSelector() as selector:
        selector.register(child.stdout, selectors.EVENT_READ)
        return child.stdout.readline() if selector.select(seconds) else b""


@cache
def grader() -> Grader:
    """The one of this process; its child ends with it, when its input does."""
    return Grader()


def plain(text: str) -> str:
    """One line of LaTeX without what marks it as mathematics and a final period, as math-verify reads it best."""
    return " ".join(MARKUP.sub(" ", THIN_SPACE.sub("", text)).split()).strip(" *").rstrip(" .")


def serve() -> None:
    """The child: answers one line a question until its input ends."""
    import resource

    from math_verify import parse, verify

    def equal(gold: str, answer: str) -> bool:
        parsed = [parse(f"${plain(text)}$", parsing_timeout=INNER_SECONDS) for text in (gold, answer)]
        return bool(verify(*parsed, timeout_seconds=INNER_SECONDS))

    # What loads with the first answer is no part of its time.
    equal("1/2", "\\frac{2}{4}")
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "wb", buffering=0)
    replies.write(b"ready\n")
    # Parsers print what they think of an answer; nobody reads it, and the replies must stay alone.
    logging.disable()
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.dup2(nowhere, sys.stderr.fileno())
    if sys.platform == "linux":
        resource.setrlimit(resource.RLIMIT_AS, (CHILD_BYTES, CHILD_BYTES))
    for line in sys.stdin:
        replies.write(b"1\n" if equal(*json.loads(line)) else b"0\n")


if __name__ == "__main__":
    serve()
