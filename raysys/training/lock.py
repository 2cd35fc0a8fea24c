"""Who may write into a run folder: the newest call that took the run up, and of that call the newest group of workers.

Workers live on for some seconds after their driver was killed, and a node may come back after a partition: such zombies must not write
into a run that another call goes on with. In: a run folder, local or on an object store. Out: :class:`RunLock`, asked before every
write. Leaves what is written to others.

    R/lock/driver.json           who took the run up last: token, host, pid, time
    R/lock/attempt-DRIVER.json   of the driver with that token, the newest group of workers (a file of its own: a late group of an old
                                 driver cannot write over what the new one said)

Nobody waits for a lock: who takes it has it, and who had it is refused from then on. Asking and the write after it are two, so a writer
that is stopped just between them still does that one write when it goes on (an upload that has begun still ends). That is harmless:

- a checkpoint that is complete is never written again, and each file appears whole. A late ``step-N`` is a checkpoint of the same run,
  computed from the same (seed, step), so going on from it is as good as from one's own; a ``state.pt`` that two write at once is
  whichever came last, and both are states of step N.
- what a late writer removes is older than the newest checkpoints that it saw, which stay; who reads one of the removed takes the newest.
- a late line of the log is one that was measured; where both logged a step, readers take the line that was written last.
"""

from __future__ import annotations

import json
import os
import platform
import time
import uuid
from dataclasses import dataclass, replace

from raysys.masking import mask
from raysys.storage import join, read_bytes, write_json


class LostLock(RuntimeError):
    """Another call, or another group of workers of the same call, has taken the run over: this process must end."""


@dataclass(frozen=True)
class RunLock:
    """A claim to write into a run folder: small, goes to the workers as it is."""

    run: str
    driver: str
    """Token of the call."""
    group: str | None
    """Token of the group of workers; None in the driver."""

    @classmethod
    def take(cls, run: str) -> RunLock:
        """By a driver, before it starts workers: whoever had the run loses it."""
        lock = cls(run, uuid.uuid4().hex, None)
        _write(_driver_file(run), lock.driver)
        return lock

    def attempt(self) -> RunLock:
        """By rank 0 of every group of workers of the driver, before it reads the newest checkpoint: an earlier group loses the run.

        :raises LostLock: where another driver has taken it.
        """
        replace(self, group=None).check()
        lock = replace(self, group=uuid.uuid4().hex)
        assert lock.group is not None
        _write(_attempt_file(self.run, self.driver), lock.group)
        return lock

    def check(self) -> None:
        """Before every write; reads one small file in the driver, two in a worker.

        :raises LostLock: where another has taken the run over.
        """
        _refuse_other(self.run, "call", _driver_file(self.run), self.driver)
        if self.group is not None:
            _refuse_other(self.run, "group of workers of this call", _attempt_file(self.run, self.driver), self.group)


def _driver_file(run: str) -> str:
    return join(run, "lock", "driver.json")


def _attempt_file(run: str, driver: str) -> str:
    return join(run, "lock", f"attempt-{driver}.json")


def _write(file: str, token: str) -> None:
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    write_json(file, {"token": token, "host": platform.node(), "pid": os.getpid(), "time": now})


def _refuse_other(run: str, what: str, file: str, token: str) -> None:
    try:
        holder = json.loads(read_bytes(file))
    except FileNotFoundError as error:
        raise LostLock(f"{mask(file)} is gone: the run's folder was removed or moved; give output= where it lies now") from error
    if holder["token"] != token:
        raise LostLock(
            f"another {what} has taken over {mask(run)}: process {holder['pid']} on {holder['host']}, since {holder['time']}; "
            "it goes on there; to go on here, end it and repeat the words"
        )
