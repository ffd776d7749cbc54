"""All nodes of an allocation meet once before ranks are started on them: `python -m trainer.meeting`, one process each.

Each comes to the first node's store, so that who does not come is known by name and nobody waits for it. Then those
that came compare clocks, form a process group as ranks will, add something up and check the sum, and measure the
bandwidth from each to the next. What is found out goes to stdout, a JSON object a line, each as soon as it is known: of
a meeting that gets stuck it is known how far it got. The order to begin comes on stdin, so that whoever starts the
process can do something else while it imports torch.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

_STARTED = time.monotonic()

import torch  # noqa: E402 (its seconds are told)
import torch.distributed as dist  # noqa: E402
from torch import Tensor  # noqa: E402
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore  # noqa: E402 (where they have types)

from trainer.heartbeat import die_with_parent  # noqa: E402

Say = Callable[[dict[str, Any]], None]

POLL_SECONDS = 0.02
"""Between two looks at who has come."""
PATIENCE, PATIENCE_SECONDS = 3.0, 5.0
"""When half of all are there, the others get 3 times as long again, and 5 s: a dead node costs seconds, and where disks
are slow, and importing takes minutes, all are waited for."""
CLOCK_ROUNDS = 5
"""Round trips; the shortest counts. The first one waits for its turn."""
CLOCK_SECONDS = 10.0
"""How long the first node waits for a question about the time."""
SHARE_TOGETHER = 0.85
"""Of the time for the meeting: by then all have given up what hangs, and then say so to the first node."""
SUM_ELEMENTS = 2**18
"""float32, together: a megabyte, shared between the nodes."""
SIDE = 1024
"""Of the matrices that a device multiplies."""
FIRST_BITS, LAST_BITS = 16, 26
"""Of the messages that measure bandwidth, 2ⁿ bytes."""
LONG_SECONDS = 0.1
"""A message that takes so long tells enough: latency does not count in it any more."""


@dataclass(frozen=True, slots=True)
class Order:
    """What the process is told on stdin, JSON."""

    nodes: list[str]
    """In the order of the allocation."""
    index: int
    """Of this node."""
    host: str
    """Address of the first node, for the others."""
    port: int
    """On which it can be reached."""
    token: str
    """Of this meeting: one on the same port that is not ours has another."""
    gpus: int
    """To be used on this node; 0: it computes on CPU."""
    join_seconds: float
    """From the order: who has not come by then is missing."""
    seconds: float
    """From the order: the meeting is over by then."""
    about: str
    """What this node has to say of itself, for the first one to keep."""


class MeetingError(Exception):
    """It cannot go on; the text is a clause for a person."""


def main() -> None:
    """Wait for the order, meet, and say on stdout what came of it."""
    die_with_parent()
    # whatever else is printed goes to stderr
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def say(found: dict[str, Any]) -> None:
        channel.write(json.dumps(found) + "\n")
        channel.flush()

    say({"seconds_import": time.monotonic() - _STARTED})
    line = sys.stdin.readline()
    if not line:
        return
    order = Order(**json.loads(line))
    began = time.monotonic()
    try:
        meet(order, say)
    except MeetingError as error:
        say({"error": str(error)})
    except Exception as error:  # noqa: BLE001 (whatever torch raises is what is wrong with the node)
        say({"error": f"{type(error).__name__}: {_first_line(error)}"})
    say({"seconds": time.monotonic() - began})
    # what a broken network left in the threads of the group must not keep the process
    os._exit(0)


def meet(order: Order, say: Say) -> None:
    """Come, compare, compute.

    Raises:
        MeetingError: it cannot go on.
    """
    began = time.monotonic()
    deadline = began + order.seconds
    say({"stage": "joining"})
    store = _store(order, say, began + order.join_seconds)
    store.set(f"here/{order.index}", order.about)
    if order.index == 0:
        present = _roll(order, store, say, began + order.join_seconds)
    else:
        # the first one may have started later than this one
        present = json.loads(_get(store, "roll", deadline))
        if order.index not in present:
            raise MeetingError("it came too late")
    try:
        _together(order, store, say, present, began + SHARE_TOGETHER * order.seconds)
        store.set(f"end/{order.index}", "well")
    except Exception:
        store.set(f"end/{order.index}", "ill")
        raise
    finally:
        if order.index == 0:
            # it keeps the store until nobody needs it
            gone = _await_ends(store, present, deadline)
            if gone:
                missing = [name for i, name in enumerate(order.nodes) if i in gone or i not in present]
                say({"missing": missing})
    say({"stage": "done"})


def _together(order: Order, store: Store, say: Say, present: list[int], deadline: float) -> None:
    """What those that came do with each other."""
    say({"stage": "clock"})
    if order.index == 0:
        _answer_time(store, present[1:])
    else:
        offset, error = _ask_time(store, order.index, deadline)
        say({"clock_offset": offset, "clock_error": error})
    say({"stage": "devices"})
    if trouble := _compute(order.gpus):
        say({"device_error": trouble})
    if len(present) < 2:
        return
    say({"stage": "group"})
    rank, size = present.index(order.index), len(present)
    if order.gpus:
        torch.cuda.set_device(0)
    dist.init_process_group(
        # with GPUs, gloo carries what is about the measurement and NCCL what is measured
        "cpu:gloo,cuda:nccl" if order.gpus else "gloo",
        store=PrefixStore("group", store),
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=_left(deadline)),
    )
    device = torch.device("cuda", 0) if order.gpus else torch.device("cpu")
    names = [order.nodes[index] for index in present]
    say({"stage": "sum"})
    say({"wrong": [names[place] for place in _wrong_parts(rank, size, device)]})
    say({"stage": "bandwidth"})
    if (speed := _bandwidth(rank, size, device)) is not None:
        say({"to": names[(rank + 1) % size], "gbit_per_second": speed})
    dist.destroy_process_group()
    say({"stage": "ending"})


def _store(order: Order, say: Say, deadline: float) -> Store:
    """The first node's store; there it is made."""
    first = order.index == 0
    if first:
        try:
            store = TCPStore(
                order.host, order.port, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=order.seconds)
            )
        except dist.DistNetworkError as error:
            raise MeetingError(f"port {order.port} cannot be opened: {_first_line(error)}") from error
    else:
        _reach(order, deadline)
        # something else may listen there, and never answer; torch tries twice
        left = timedelta(seconds=_left(deadline) / 2)
        try:
            store = TCPStore(order.host, order.port, is_master=False, timeout=left)
        except dist.DistError as error:
            raise MeetingError(f"{order.host} port {order.port}: {_first_line(error)}") from error
    say({"reached": True})
    store.set_timeout(timedelta(seconds=order.seconds))
    return PrefixStore(order.token, store)


def _reach(order: Order, deadline: float) -> None:
    """Wait until the first node listens."""
    why = "no answer"
    while (left := deadline - time.monotonic()) > 0:
        try:
            socket.create_connection((order.host, order.port), timeout=min(left, 5.0)).close()
            return
        except OSError as error:
            why = error.strerror or str(error)
        time.sleep(min(0.1, max(0.0, deadline - time.monotonic())))
    raise MeetingError(f"{order.host} port {order.port}: {why}")


def _roll(order: Order, store: Store, say: Say, deadline: float) -> list[int]:
    """Who has come: everybody, or whoever had when waiting longer made no sense."""
    awaited, half = set(range(len(order.nodes))), len(order.nodes) // 2
    half_came = False
    while (awaited := {i for i in awaited if not store.check([f"here/{i}"])}) and time.monotonic() < deadline:
        if not half_came and len(awaited) <= half:
            half_came = True
            deadline = min(deadline, time.monotonic() + PATIENCE * (time.monotonic() - _STARTED) + PATIENCE_SECONDS)
        time.sleep(POLL_SECONDS)
    present = [index for index in range(len(order.nodes)) if index not in awaited]
    say({"missing": [order.nodes[index] for index in sorted(awaited)]})
    # before it goes on: what was said is known even if the rest fails
    say({"heard": [store.get(f"here/{index}").decode() for index in present[1:]]})
    store.set("roll", json.dumps(present))
    return present


def _answer_time(store: Store, others: list[int]) -> None:
    for index in others:
        for number in range(CLOCK_ROUNDS):
            try:
                store.wait([f"ping/{index}/{number}"], timedelta(seconds=CLOCK_SECONDS))
            except dist.DistStoreError:
                # it is gone, which shows in the group
                break
            store.set(f"pong/{index}/{number}", repr(time.time()))


def _ask_time(store: Store, index: int, deadline: float) -> tuple[float, float]:
    """(seconds that this clock is ahead of the first node's, by which that may be wrong), as NTP has it."""
    found = []
    for number in range(CLOCK_ROUNDS):
        before = time.time()
        store.set(f"ping/{index}/{number}", "")
        there = float(_get(store, f"pong/{index}/{number}", deadline))
        after = time.time()
        found.append((max(0.0, after - before) / 2, (before + after) / 2 - there))
    error, offset = min(found)
    return offset, error


def _compute(gpus: int) -> str:
    """Why a device does not compute what it should, in a clause; empty: all do."""
    if gpus > torch.cuda.device_count():
        return f"torch sees {torch.cuda.device_count()} GPUs, {gpus} are required"
    for index in range(max(gpus, 1)):
        name = f"GPU {index}" if gpus else "the CPU"
        device = torch.device("cuda", index) if gpus else torch.device("cpu")
        try:
            ones = torch.ones(SIDE, SIDE, device=device)
            # integers: exact whatever the order of the sum
            wrong = int((ones @ ones != SIDE).sum())
        except RuntimeError as error:
            return f"{name} does not compute: {_first_line(error)}"
        if wrong:
            return f"{name} computes wrongly: {wrong} of {SIDE * SIDE} elements of a product"
    return ""


def _wrong_parts(rank: int, size: int, device: torch.device) -> list[int]:
    """Ranks whose part of a sum over all came out wrong; each brings its own row and zeros elsewhere."""
    width = max(1, SUM_ELEMENTS // size)
    rows = torch.zeros(size, width, device=device)
    rows[rank] = _pattern(rank, width, device)
    dist.all_reduce(rows)
    return [other for other in range(size) if not torch.equal(rows[other], _pattern(other, width, device))]


def _pattern(rank: int, width: int, device: torch.device) -> Tensor:
    """Integers up to 2²⁴: float32 holds them exactly."""
    return (torch.arange(width, device=device) * 31 + rank * 7919 + 1).remainder(2**24).to(torch.float32)


def _bandwidth(rank: int, size: int, device: torch.device) -> float | None:
    """Gbit/s from this rank to the next. Pairs without a node in common measure at once."""
    speed = None
    before = (rank - 1) % size
    for turn in (0, 1, 2):
        if _turn(rank, size) == turn:
            speed = _send(device, (rank + 1) % size)
        elif _turn(before, size) == turn:
            _receive(device, before)
        # nobody begins the next before all are through
        dist.all_reduce(torch.zeros(1))
    return speed


def _turn(rank: int, size: int) -> int:
    """Of the pair rank → rank + 1: even ones, odd ones, and in a ring of odd size the last one by itself."""
    return 2 if size % 2 and rank == size - 1 else rank % 2


def _send(device: torch.device, other: int) -> float:
    """Messages of growing size until one takes long enough; Gbit/s of that."""

    def seconds_for(size: int) -> float:
        payload = torch.zeros(size, dtype=torch.uint8, device=device)
        dist.send(torch.tensor([size]), other)
        began = time.perf_counter()
        dist.send(payload, other)
        dist.recv(torch.empty(1, dtype=torch.int64), other)
        return time.perf_counter() - began

    # opens connections
    seconds_for(1)
    speed = 0.0
    for bits in range(FIRST_BITS, LAST_BITS + 1):
        seconds = seconds_for(1 << bits)
        speed = (8 << bits) / 1e9 / max(seconds, 1e-9)
        if seconds > LONG_SECONDS:
            break
    dist.send(torch.tensor([0]), other)
    return speed


def _receive(device: torch.device, other: int) -> None:
    header = torch.empty(1, dtype=torch.int64)
    while True:
        dist.recv(header, other)
        size = int(header.item())
        if not size:
            return
        dist.recv(torch.empty(size, dtype=torch.uint8, device=device), other)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        dist.send(torch.zeros(1, dtype=torch.int64), other)


def _await_ends(store: Store, present: list[int], deadline: float) -> set[int]:
    """Those that have not come to the end, well or ill: they lost the store."""
    awaited = set(present)
    while (
        awaited := {index for index in awaited if not store.check([f"end/{index}"])}
    ) and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
    return awaited


def _get(store: Store, key: str, deadline: float) -> str:
    """Wait for a value.

    Raises:
        MeetingError: the first node did not give it.
    """
    try:
        store.wait([key], timedelta(seconds=_left(deadline)))
        return str(store.get(key).decode())
    except (dist.DistStoreError, dist.DistNetworkError) as error:
        raise MeetingError("the first node stopped answering") from error


def _left(deadline: float) -> float:
    return max(1.0, deadline - time.monotonic())


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


if __name__ == "__main__":
    main()
