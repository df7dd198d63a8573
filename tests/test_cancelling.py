"""Forwards that are cancelled or interrupted in the middle leave the state as it was."""

from __future__ import annotations

import dis
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from itertools import count
from queue import SimpleQueue
from types import FrameType

import numpy as np
import pytest

import tiny
import toy_ops_cpu
from harness import no_notice
from keelback.engine.model import Model
from keelback.engine.state import State
from keelback.engine.threads import CancelFlag, Job, Pool
from keelback.kernels import table
from keelback.kernels.objects import addresses


class Held:
    """A model whose forwards stop in the middle, at a kernel that waits to be cancelled."""

    def __init__(self, model: Model) -> None:
        self.model, self.backend = model, model.backend
        self._hold = addresses([("toy_hold", "toy_ops_cpu")], no_notice)["toy_hold"]
        records = self.backend._program.records
        self._record = records[len(records) * 2 // 3]
        self._kernel = self._record[table.KERNEL]
        self._release = np.zeros(1, np.int64)
        self._record[table.ATTRIBUTES + toy_ops_cpu.REPLACED] = self._kernel
        self._record[table.ATTRIBUTES + toy_ops_cpu.RELEASE] = self._release.ctypes.data

    def arm(self) -> None:
        self._record[table.KERNEL] = self._hold

    def disarm(self) -> None:
        self._record[table.KERNEL] = self._kernel

    def release(self) -> None:
        """Let a forward that is held go on."""
        self._release[0] = 1

    def once_changed(self, state: State, act: Callable[[], None]) -> threading.Thread:
        """Do something as soon as the forward under way has begun to change the state."""
        before = state.block.tobytes()

        def watch() -> None:
            end = time.monotonic() + 20
            while state.block.tobytes() == before and time.monotonic() < end:
                time.sleep(0.001)
            act()

        thread = threading.Thread(target=watch)
        thread.start()
        return thread


@pytest.fixture
def held(tiny_file):
    held = Held(Model(tiny_file("gdn-q8", "q8_0"), threads=2, notice=no_notice))
    yield held
    held.disarm()


def interrupt() -> None:
    """What Ctrl-C does; the handler runs in the main thread."""
    os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
@pytest.mark.parametrize("way", ["Ctrl-C", "flag"])
def test_a_cancelled_forward_leaves_the_state_as_before_its_chunk(held, way):
    model, ids = held.model, tiny.ids("gdn-q8", 900)
    wanted, after = model.forward(ids)
    _, chunk = model.forward(ids[:512])
    state, watchers, cancel = model.new_state(), [], CancelFlag()

    def read_first_chunk(read: int) -> None:
        held.arm()
        watchers.append(held.once_changed(state, interrupt if way == "Ctrl-C" else cancel.set))

    with pytest.raises(KeyboardInterrupt):
        model.forward(ids, state, progress=read_first_chunk, cancel=cancel)
    watchers[0].join()
    assert state.block.tobytes() == chunk.block.tobytes()
    assert (state.position, state.digest) == (512, chunk.digest)
    held.disarm()
    logits, _ = model.forward(ids[512:], state)
    assert logits.tobytes() == wanted.tobytes() and state.block.tobytes() == after.block.tobytes()


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
def test_ctrl_c_during_a_single_token_is_raised_behind_it(held):
    model, ids = held.model, tiny.ids("gdn-q8", 20)
    _, after = model.forward(ids)
    _, state = model.forward(ids[:19])

    def interrupt_and_release() -> None:
        interrupt()
        time.sleep(0.05)
        held.release()

    held.arm()
    watcher = held.once_changed(state, interrupt_and_release)
    with pytest.raises(KeyboardInterrupt):
        model.forward(ids[19:], state)
    watcher.join()
    assert state.block.tobytes() == after.block.tobytes()
    assert (state.position, state.digest) == (20, after.digest)
    assert state.logits is not None and state.logits.tobytes() == after.logits.tobytes()


class InterruptedOnce(SimpleQueue[Job]):
    """A pool's queue: the first time that something is put there, Ctrl-C comes right behind it."""

    pressed = False

    def put(self, job: Job) -> None:
        super().put(job)
        if not self.pressed:
            self.pressed = True
            raise KeyboardInterrupt


@pytest.mark.parametrize("place", range(4))
def test_a_second_ctrl_c_too_is_raised_behind_the_body(place):
    """It comes at each of the places behind the first where Python looks for signals."""
    pool, cancel, ended, places = Pool(), CancelFlag(), threading.Event(), count()
    pool._jobs = InterruptedOnce()

    def body() -> None:
        while not cancel.is_set:
            time.sleep(0.001)
        ended.set()

    def trace(frame: FrameType, event: str, _: object) -> Callable | None:
        if frame.f_code is not Pool.call.__code__:
            return None
        frame.f_trace_opcodes = True
        instruction = dis.opname[frame.f_code.co_code[frame.f_lasti]]
        looks = instruction.startswith("CALL") or "JUMP_BACKWARD" in instruction
        if event == "opcode" and pool._jobs.pressed and looks and next(places) == place:
            raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        with pytest.raises(KeyboardInterrupt):
            pool.call(body, cancel)
        assert ended.is_set()
    finally:
        sys.settrace(before)
        cancel.set()
