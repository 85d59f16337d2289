"""The stand-in for CUDA's driver: the rules by which other tests judge code that uses a GPU."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.cuda_driver import build, compiler, environment, report

_PRELUDE = "from tests.support.cuda_driver.trial import *\n"
_LONG_S = 30.0

# One process has a pool, a buffer and an event that the other opens: the pool's file travels as a descriptor, all else
# as bytes. Both run this first.
_SHARED = """
from cuda.core import Buffer, Device, DeviceMemoryResource, DeviceMemoryResourceOptions, Event, EventOptions
from cuda.core._event import IPCEventDescriptor
from cuda.core._memory._ipc import IPCBufferDescriptor

device = Device(0)
device.set_current()
queue = device.create_stream()


def new_pool(size=1 << 20):
    return DeviceMemoryResource(device, DeviceMemoryResourceOptions(ipc_enabled=True, max_size=size))


def give(pool, buffer, event):
    payload, size = buffer.ipc_descriptor.__reduce__()[1]
    handle, blocking = event.ipc_descriptor.__reduce__()[1]
    message = payload + handle + bytes([blocking]) + size.to_bytes(8, "little")
    socket.send_fds(peer, [message], [int(pool.allocation_handle)])


def take():
    message, (file,), _, _ = socket.recv_fds(peer, 1024, 1)
    pool = DeviceMemoryResource.from_allocation_handle(device, file)
    os.close(file)
    return pool, message[:64], int.from_bytes(message[129:], "little"), message[64:128]


def open_buffer(pool, payload, size):
    return Buffer.from_ipc_descriptor(pool, IPCBufferDescriptor._init(payload, size), stream=queue)


def open_event(handle):
    return Event.from_ipc_descriptor(IPCEventDescriptor._init(handle, False))


class EventHandle(ctypes.Structure):
    _fields_ = [("bytes", ctypes.c_ubyte * 64)]


def answer_to(handle):  # cuda.core does not say which error it was
    driver = ctypes.CDLL("libcuda.so.1")
    return driver.cuIpcOpenEventHandle(ctypes.byref(ctypes.c_void_p()), EventHandle.from_buffer_copy(handle))


def refusal(act):
    try:
        act()
    except Exception as refused:
        return str(refused).split(":")[0]
    return "none"
"""

# Both processes of a pair have started: what one does takes as long as the driver's settings say, as the other sees it.
_MEETING = """
peer.send(b"!")
assert peer.recv(1) == b"!"
"""

# The exporting process of most tests of two: it has filled its buffer, and recorded that on its event.
_EXPORTER = """
pool = new_pool()
buffer = pool.allocate(PAGE, stream=queue)
buffer.fill(5, stream=queue)
event = queue.record(options=EventOptions(ipc_enabled=True))
give(pool, buffer, event)
"""


def _exporter(program: str) -> str:
    return _EXPORTER + textwrap.dedent(program)


Run = Callable[..., None]
Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the stand-in."""
    pytest.importorskip("cuda.core", reason="cuda-core is not installed")
    if compiler() is None:
        pytest.skip("there is no C compiler")
    folder = tmp_path_factory.mktemp("driver")
    build(folder)
    return folder


@pytest.fixture
def start(driver: Path) -> Iterator[Start]:
    """Start a program with the stand-in: ``start(program, setting=value)``; what still runs at the end is killed."""
    started: list[subprocess.Popen[str]] = []

    def begin(program: str, peer: int | None = None, **settings: str | int) -> subprocess.Popen[str]:
        arguments = [] if peer is None else [str(peer)]
        command = [sys.executable, "-c", _PRELUDE + textwrap.dedent(program), *arguments]
        passed = () if peer is None else (peer,)
        environ = environment(driver, **settings)
        started.append(subprocess.Popen(command, env=environ, pass_fds=passed, stderr=subprocess.PIPE, text=True))
        return started[-1]

    yield begin
    for process in started:
        process.kill()
        process.communicate()


def _finish(*processes: subprocess.Popen[str]) -> None:
    """Wait for their ends; none must have failed. One that fails may make the other fail, so all errors are shown."""
    errors = [process.communicate(timeout=_LONG_S)[1] for process in processes]
    assert not any(process.returncode for process in processes), "\n".join(errors)


@pytest.fixture
def run(start: Start) -> Run:
    """Run a program with the stand-in to its end; it must not fail."""

    def to_the_end(program: str, **settings: str | int) -> None:
        _finish(start(program, **settings))

    return to_the_end


@pytest.fixture
def run_pair(start: Start) -> Run:
    """Run two programs with sockets to each other, with the same settings or each with its own; neither must fail."""

    def to_the_end(one: str, other: str, others: dict[str, str | int] | None = None, **settings: str | int) -> None:
        ends = socket.socketpair()
        programs = zip((one, other), ends, (settings, settings if others is None else others), strict=True)
        processes = [
            start(_SHARED + _MEETING + textwrap.dedent(code), end.fileno(), **given) for code, end, given in programs
        ]
        for end in ends:
            end.close()
        _finish(*processes)

    return to_the_end


def test_cuda_core_takes_it_for_the_driver(run: Run) -> None:
    """Devices as the settings say; their UUIDs are those given, and cuda.core needs neither NVML nor a CUDA toolkit."""
    run(
        """
        from cuda.core import Device
        devices = Device.get_all_devices()
        assert [each.uuid[-2:] for each in devices] == ["0a", "0b"]
        assert devices[1].name == "Stand-in GPU 1" and devices[0].compute_capability == (9, 0)
        assert ok(cuda.cuDriverGetVersion()) == 13000
        """,
        devices=2,
        uuid="0" * 31 + "a," + "0" * 31 + "b",
    )


def test_a_copy_is_carried_out_late(run: Run) -> None:
    """Until then its destination is poison, and what is written to its source meanwhile is what arrives."""
    run(
        """
        host, there, queue = register(value=7), allocate(), stream()
        ok(cuda.cuMemcpyHtoDAsync(there, host, PAGE, queue))
        assert look(there, PAGE) == b"\\xdb" * PAGE
        put(host, b"\\x01" * PAGE)
        event = ok(cuda.cuEventCreate(2))
        ok(cuda.cuEventRecord(event, queue))
        assert code(cuda.cuEventQuery(event)) == 600 and code(cuda.cuStreamQuery(queue)) == 600
        ok(cuda.cuEventSynchronize(event))
        assert look(there, PAGE) == b"\\x01" * PAGE
        ok(cuda.cuMemcpyDtoHAsync(host, there, PAGE, queue))
        assert look(host, PAGE) == b"\\xdb" * PAGE
        settle(queue)
        assert look(host, PAGE) == b"\\x01" * PAGE and counter("async_copies") == 2
        ok(cuda.cuMemsetD16Async(there, 0x0201, PAGE // 2, queue))
        assert look(there, 2) == b"\\xdb\\xdb"
        settle(queue)
        assert look(there, PAGE) == b"\\x01\\x02" * (PAGE // 2)
        """,
        delay_us=50_000,
    )


def test_memory_may_be_used_again_in_the_order_of_a_stream(run: Run) -> None:
    """What queued work will still read is not poisoned before its turn; nor what is written after a wait."""
    run(
        """
        first, second, back, there = register(value=1), register(value=2), register(), allocate()
        queue, other = stream(), stream()
        ok(cuda.cuMemcpyHtoDAsync(there, first, PAGE, queue))
        ok(cuda.cuMemcpyDtoHAsync(back, there, PAGE, queue))
        ok(cuda.cuMemcpyHtoDAsync(there, second, PAGE, queue))
        settle(queue)
        assert look(back, PAGE) == b"\\x01" * PAGE and look(there, PAGE) == b"\\x02" * PAGE
        event = ok(cuda.cuEventCreate(2))
        ok(cuda.cuMemcpyHtoDAsync(there, first, PAGE, queue))
        ok(cuda.cuEventRecord(event, queue))
        ok(cuda.cuStreamWaitEvent(other, event, 0))
        put(back, b"\\x09" * PAGE)
        ok(cuda.cuMemcpyDtoHAsync(back, there, PAGE, other))
        assert look(back, PAGE) == b"\\x09" * PAGE
        settle(other)
        assert look(back, PAGE) == b"\\x01" * PAGE and counter("event_waits") == 1
        """,
        delay_us=20_000,
    )


def test_new_and_freed_device_memory_is_poison(run: Run) -> None:
    """0xCD and 0xDD, each when its turn comes in the stream; what is freed is refused at once."""
    run(
        """
        queue = stream()
        host, there = register(), ok(cuda.cuMemAllocAsync(PAGE, queue))
        settle(queue)
        assert look(there, PAGE) == b"\\xcd" * PAGE and leaks().device_bytes == PAGE
        ok(cuda.cuMemcpyDtoHAsync(host, there, PAGE, queue))
        ok(cuda.cuMemFreeAsync(there, queue))
        assert look(there, PAGE) == b"\\xcd" * PAGE and leaks().device_bytes == 0
        assert code(cuda.cuMemcpyDtoHAsync(host, there, PAGE, queue)) == 1 and code(cuda.cuMemFree(there)) == 1
        settle(queue)
        assert look(there, PAGE) == b"\\xdd" * PAGE and look(host, PAGE) == b"\\xcd" * PAGE
        """
    )


def test_a_copy_of_pageable_memory_is_done_when_the_call_returns(run: Run) -> None:
    """And counted, since it takes the caller's time; a copy that is not asynchronous is not."""
    run(
        """
        queue, there, host = stream(), allocate(), (ctypes.c_char * PAGE)(*b"\\x07" * PAGE)
        ok(cuda.cuMemcpyHtoDAsync(there, ctypes.addressof(host), PAGE, queue))
        assert look(there, PAGE) == b"\\x07" * PAGE
        assert (counter("pageable_copies"), counter("async_copies")) == (1, 0)
        ok(cuda.cuMemcpyDtoH(ctypes.addressof(host), there, PAGE))
        assert counter("pageable_copies") == 1
        """
    )


def test_what_cannot_be_registered_is_refused(run: Run) -> None:
    """No bytes, unknown flags, nothing mapped, bytes registered before, too much, and what is not registered."""
    run(
        """
        memory = mmap.mmap(-1, 4 * PAGE)
        base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        assert code(cuda.cuMemHostRegister(base, 0, 0)) == 1
        assert code(cuda.cuMemHostRegister(base, PAGE, 16)) == 1
        assert code(cuda.cuMemHostRegister(PAGE, PAGE, 0)) == 1
        assert code(cuda.cuMemHostRegister(base, 4 * PAGE, 0)) == 2
        assert code(cuda.cuMemHostUnregister(base)) == 713
        ok(cuda.cuMemHostRegister(base, 2 * PAGE, 3))
        assert ok(cuda.cuMemHostGetFlags(base)) == 3 and int(ok(cuda.cuMemHostGetDevicePointer(base, 0))) == base
        assert code(cuda.cuMemHostRegister(base + PAGE, 2 * PAGE, 0)) == 712
        assert leaks().registered_bytes == 2 * PAGE
        ok(cuda.cuMemHostUnregister(base))
        assert not leaks()
        """,
        register_limit=3 * os.sysconf("SC_PAGESIZE"),
    )


def test_memory_that_may_only_be_read_is_registered_as_such(run: Run) -> None:
    """Without that flag it is refused; with it, it is a source and never a destination."""
    run(
        """
        libc = ctypes.CDLL(None)
        libc.mmap.restype = ctypes.c_void_p
        file = os.memfd_create("x")
        os.write(file, b"\\x03" * PAGE)
        base = libc.mmap(None, ctypes.c_size_t(PAGE), mmap.PROT_READ, mmap.MAP_SHARED, file, ctypes.c_long(0))
        there, queue = allocate(), stream()
        assert code(cuda.cuMemHostRegister(base, PAGE, 0)) == 1
        ok(cuda.cuMemHostRegister(base, PAGE, 8))
        ok(cuda.cuMemcpyHtoDAsync(there, base, PAGE, queue))
        settle(queue)
        assert look(there, PAGE) == b"\\x03" * PAGE
        assert code(cuda.cuMemcpyDtoHAsync(base, there, PAGE, queue)) == 1
        """
    )


def test_a_copy_stays_within_one_range(run: Run) -> None:
    """Neither two registrations that touch, nor what lies behind one or behind an allocation, is one range."""
    run(
        """
        memory = mmap.mmap(-1, 3 * PAGE)
        base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        for part in range(2):
            ok(cuda.cuMemHostRegister(base + part * PAGE, PAGE, 0))
        there, queue = allocate(2 * PAGE), stream()
        for part in range(2):
            assert code(cuda.cuMemcpyHtoDAsync(there, base + part * PAGE, 2 * PAGE, queue)) == 1
            assert code(cuda.cuMemcpyDtoHAsync(base + part * PAGE, there, 2 * PAGE, queue)) == 1
        assert code(cuda.cuMemcpyHtoDAsync(there + PAGE + 1, base, PAGE, queue)) == 1
        assert code(cuda.cuMemcpyHtoDAsync(base + 2 * PAGE, base, PAGE, queue)) == 1
        ok(cuda.cuMemcpyHtoDAsync(there + PAGE, base, PAGE, queue))
        """
    )


def test_memory_that_goes_before_its_registration_is_counted(run: Run) -> None:
    """Unmapped, also if something else lies there since; or unregistered while a queued copy needs it."""
    run(
        """
        libc = ctypes.CDLL(None)
        libc.mmap.restype = ctypes.c_void_p
        def map(place, file=-1, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS):
            return libc.mmap(ctypes.c_void_p(place), ctypes.c_size_t(PAGE), 3, flags, file, ctypes.c_long(0))
        gone, replaced = map(0), map(0)
        for base in (gone, replaced):
            ok(cuda.cuMemHostRegister(base, PAGE, 0))
        assert counter("unmapped_while_registered") == 0
        libc.munmap(ctypes.c_void_p(gone), ctypes.c_size_t(PAGE))
        file = os.memfd_create("x")
        os.truncate(file, PAGE)
        assert map(replaced, file, mmap.MAP_SHARED | 0x10) == replaced
        assert counter("unmapped_while_registered") == 2
        for base in (gone, replaced):
            ok(cuda.cuMemHostUnregister(base))
        assert counter("unmapped_while_registered") == 2

        host, there, queue = register(), allocate(), stream()
        ok(cuda.cuMemcpyHtoDAsync(there, host, PAGE, queue))
        ok(cuda.cuMemHostUnregister(host))
        assert counter("unregistered_in_use") == 1
        settle(queue)
        """
    )


def test_a_copy_of_memory_that_is_gone_is_an_error_that_sticks(run: Run) -> None:
    """As on a GPU: nothing crashes, and every call from then on answers CUDA_ERROR_ILLEGAL_ADDRESS."""
    run(
        """
        libc = ctypes.CDLL(None)
        libc.mmap.restype = ctypes.c_void_p
        anonymous = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        base = libc.mmap(None, ctypes.c_size_t(PAGE), 3, anonymous, -1, ctypes.c_long(0))
        ok(cuda.cuMemHostRegister(base, PAGE, 0))
        there, queue = allocate(), stream()
        ok(cuda.cuMemcpyHtoDAsync(there, base, PAGE, queue))
        libc.munmap(ctypes.c_void_p(base), ctypes.c_size_t(PAGE))
        assert code(cuda.cuStreamSynchronize(queue)) == 700
        assert code(cuda.cuMemAlloc(PAGE)) == 700 and code(cuda.cuMemHostUnregister(base)) == 700
        """
    )


def test_calls_fail_on_request(run: Run) -> None:
    """Each call of a function, or one of them only; the others do what they are asked."""
    run(
        """
        assert code(cuda.cuMemHostRegister(0, 0, 0)) == 801
        assert [code(cuda.cuEventCreate(0)) for _ in range(3)] == [0, 2, 0]
        assert calls("cuEventCreate") == 3 and leaks().events == 2
        configure("fail", "")
        assert code(cuda.cuMemHostRegister(0, 0, 0)) == 1
        """,
        fail="cuMemHostRegister=801,cuEventCreate=2@2",
    )


def test_an_error_that_sticks_wakes_who_waits(run: Run) -> None:
    """From the function's call on every call answers 700, and nothing that is queued is carried out."""
    run(
        """
        import threading
        host, there, queue = register(value=7), allocate(), stream()
        ok(cuda.cuMemcpyHtoDAsync(there, host, PAGE, queue))
        answers = []
        waiting = threading.Thread(target=lambda: answers.append(code(cuda.cuEventSynchronize(event))))
        event = ok(cuda.cuEventCreate(0))
        ok(cuda.cuEventRecord(event, queue))
        waiting.start()
        time.sleep(0.05)
        assert code(cuda.cuMemGetInfo()) == 700 == code(cuda.cuStreamQuery(queue))
        waiting.join(10.0)
        assert answers == [700] and look(there, 1) == b"\\xdb"
        """,
        stall=1,
        sticky="cuMemGetInfo",
    )


def test_a_process_ends_at_once_whatever_is_queued(start: Start, tmp_path: Path) -> None:
    """A hung GPU's copies as well; the report tells what was not given back."""
    program = """
        host, there, queue = register(), allocate(), stream()
        ok(cuda.cuMemcpyHtoDAsync(there, host, PAGE, queue))
        assert code(cuda.cuStreamQuery(queue)) == 600
        """
    for settings in ({"stall": 1}, {"delay_us": 60_000_000}):
        began = time.monotonic()
        _finish(start(program, report=str(tmp_path / "report"), **settings))
        assert time.monotonic() - began < 10.0
        counted = report(tmp_path / "report")
        assert counted["registered_bytes"] == counted["device_bytes"] == os.sysconf("SC_PAGESIZE")
        assert (counted["streams"], counted["calls:cuMemcpyHtoDAsync"]) == (1, 1)


def test_calls_need_a_current_context_of_their_thread(run: Run) -> None:
    """Without one CUDA_ERROR_INVALID_CONTEXT; in another thread none is current until it is set."""
    run(
        """
        import threading
        host, there, queue, event = register(), allocate(), stream(), ok(cuda.cuEventCreate(0))
        asked = {
            "register": lambda: cuda.cuMemHostRegister(host + PAGE, PAGE, 0),
            "unregister": lambda: cuda.cuMemHostUnregister(host),
            "allocate": lambda: cuda.cuMemAlloc(PAGE),
            "free": lambda: cuda.cuMemFreeAsync(there, queue),
            "copy": lambda: cuda.cuMemcpyHtoDAsync(there, host, PAGE, queue),
            "stream": lambda: cuda.cuStreamCreate(0),
            "event": lambda: cuda.cuEventCreate(0),
            "record": lambda: cuda.cuEventRecord(event, queue),
            "synchronize": cuda.cuCtxSynchronize,
        }
        answers = {}
        def ask():
            for name, call in asked.items():
                answers[name] = code(call())
            ok(cuda.cuCtxSetCurrent(context))
            answers["then"] = code(asked["copy"]())
        thread = threading.Thread(target=ask)
        thread.start()
        thread.join(10.0)
        assert answers == {**dict.fromkeys(asked, 201), "then": 0}, answers
        ok(cuda.cuCtxPushCurrent(context))
        assert int(ok(cuda.cuCtxPopCurrent())) == int(ok(cuda.cuCtxGetCurrent())) == int(context)
        """
    )


def test_handles_that_were_destroyed_are_refused(run: Run) -> None:
    """CUDA_ERROR_INVALID_HANDLE, also once others of their kind were made; what was queued before is still done."""
    run(
        """
        host, there, queue, event = register(value=4), allocate(), stream(), ok(cuda.cuEventCreate(0))
        ok(cuda.cuMemcpyHtoDAsync(there, host, PAGE, queue))
        ok(cuda.cuEventRecord(event, queue))
        ok(cuda.cuEventDestroy(event))
        ok(cuda.cuStreamDestroy(queue))
        other, another = stream(), ok(cuda.cuEventCreate(0))
        for answer in (
            cuda.cuStreamSynchronize(queue), cuda.cuStreamDestroy(queue), cuda.cuStreamQuery(queue),
            cuda.cuEventRecord(another, queue), cuda.cuMemcpyHtoDAsync(there, host, PAGE, queue),
            cuda.cuEventQuery(event), cuda.cuEventSynchronize(event), cuda.cuEventDestroy(event),
            cuda.cuEventRecord(event, other), cuda.cuStreamWaitEvent(other, event, 0),
        ):
            assert code(answer) == 400
        until(lambda: look(there, PAGE) == b"\\x04" * PAGE)
        """
    )


def test_flags_that_are_unknown_are_refused(run: Run) -> None:
    """CUDA_ERROR_INVALID_VALUE; so is an interprocess event that takes times."""
    run(
        """
        event = ok(cuda.cuEventCreate(0))
        for answer in (
            cuda.cuStreamCreate(2), cuda.cuEventCreate(8), cuda.cuEventCreate(4), cuda.cuMemHostAlloc(PAGE, 8),
            cuda.cuStreamWaitEvent(0, event, 2), cuda.cuEventRecordWithFlags(event, 0, 4),
            cuda.cuMemHostGetDevicePointer(register(), 1), cuda.cuIpcGetEventHandle(event),
        ):
            assert code(answer) == 1, answer
        """
    )


def test_the_default_stream_waits_for_streams_that_block(run: Run) -> None:
    """And they for it, not those that were made not to; each thread has a default stream of its own as well."""
    run(
        """
        host, queue, free = register(value=6), stream(0), stream(1)
        there, back = allocate(), register()
        ok(cuda.cuMemcpyHtoDAsync(there, host, PAGE, queue))
        ok(cuda.cuMemcpyDtoHAsync(back, there, PAGE, 0))
        ok(cuda.cuStreamSynchronize(0))
        assert look(back, PAGE) == b"\\x06" * PAGE
        for each in (1, 2, queue):
            ok(cuda.cuMemcpyHtoDAsync(there, host, PAGE, free))
            ok(cuda.cuStreamSynchronize(each))
            assert code(cuda.cuStreamQuery(free)) == 600
            settle(free)
        """,
        delay_us=20_000,
    )


def test_a_stream_does_all_in_order(run: Run) -> None:
    """Copies, recordings and functions of the host; elapsed times are known once both events are done."""
    run(
        """
        seen = []
        host, there, queue = register(value=8), allocate(), stream()
        before, after = ok(cuda.cuEventCreate(0)), ok(cuda.cuEventCreate(0))
        @ctypes.CFUNCTYPE(None, ctypes.c_void_p)
        def note(_):
            seen.append((look(there, 1), code(cuda.cuEventQuery(before)), code(cuda.cuEventQuery(after))))
        assert code(cuda.cuEventElapsedTime(before, after)) == 400
        ok(cuda.cuEventRecord(before, queue))
        ok(cuda.cuMemcpyHtoDAsync(there, host, PAGE, queue))
        ok(cuda.cuLaunchHostFunc(queue, ctypes.cast(note, ctypes.c_void_p).value, 0))
        ok(cuda.cuEventRecord(after, queue))
        assert code(cuda.cuEventElapsedTime(before, after)) == 600
        settle(queue)
        assert seen == [(b"\\x08", 0, 600)] and 15.0 < ok(cuda.cuEventElapsedTime(before, after)) < 5000.0
        """,
        delay_us=20_000,
    )


def test_what_is_held_is_counted(run: Run) -> None:
    """Streams, events, pools and bytes, until they are given back; waiting for the whole context is counted."""
    run(
        """
        queue, event = stream(), ok(cuda.cuEventCreate(0))
        properties = cuda.CUmemPoolProps()
        properties.allocType, properties.location.type = (
            cuda.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED, cuda.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE)
        pool, pinned, host = ok(cuda.cuMemPoolCreate(properties)), ok(cuda.cuMemAllocHost(100)), register()
        there = ok(cuda.cuMemAllocFromPoolAsync(200, pool, queue))
        held = leaks()
        assert (held.streams, held.events, held.pools, held.device_bytes, held.host_bytes) == (1, 1, 1, 200, 100)
        assert int(ok(cuda.cuMemGetAddressRange(int(there) + 5))[0]) == int(there)
        where = cuda.CUpointer_attribute.CU_POINTER_ATTRIBUTE_MEMPOOL_HANDLE
        assert int(ok(cuda.cuPointerGetAttribute(where, there))) == int(pool)
        ok(cuda.cuMemFreeAsync(there, queue))
        ok(cuda.cuMemPoolDestroy(pool))
        ok(cuda.cuCtxSynchronize())
        assert (counter("context_synchronizations"), calls("cuCtxSynchronize")) == (1, 1)
        ok(cuda.cuMemFreeHost(pinned))
        ok(cuda.cuMemHostUnregister(host))
        ok(cuda.cuEventDestroy(event))
        ok(cuda.cuStreamDestroy(queue))
        assert not leaks(), leaks()
        """
    )


def test_a_pool_has_room_again_once_a_free_was_carried_out(run: Run) -> None:
    """An allocation waits for that, and is refused where nothing is on its way back."""
    run(
        _SHARED
        + textwrap.dedent("""
        pool = new_pool(2 << 20)
        first = pool.allocate(2 << 20, stream=queue)
        assert refusal(lambda: pool.allocate(1, stream=queue)) == "CUDA_ERROR_OUT_OF_MEMORY"
        first.close()
        second = pool.allocate(2 << 20, stream=queue)
        assert second.handle == int(second.handle) and leaks().device_bytes == 2 << 20
        """)
    )


def test_a_buffer_crosses_to_another_process(run_pair: Run) -> None:
    """Through cuda.core: the reader waits for what the writer recorded, in its stream, and both see the same bytes."""
    run_pair(
        _exporter("""
        assert peer.recv(1) == b"x"
        assert look(buffer.handle, PAGE) == b"\\x09" * PAGE
        buffer.close()
        pool.close()
        event.close()
        queue.sync()
        assert counter("freed_while_imported") == 0
        queue.close()
        assert not leaks(), leaks()
        assert calls("cuCtxSynchronize") == 0
        """),
        """
        pool, payload, size, handle = take()
        buffer, event, back = open_buffer(pool, payload, size), open_event(handle), register()
        assert pool.is_mapped and leaks().imported_bytes == size == PAGE
        assert not event.is_done and look(buffer.handle, 1) != b"\\x05"
        queue.wait(event)
        ok(cuda.cuMemcpyDtoHAsync(back, int(buffer.handle), PAGE, queue.handle))
        queue.sync()
        assert look(back, PAGE) == b"\\x05" * PAGE and event.is_done
        buffer.fill(9, stream=queue)
        buffer.close()
        queue.sync()
        assert refusal(lambda: pool.allocate(1, stream=queue)).startswith("Cannot allocate")
        pool.close()
        event.close()
        ok(cuda.cuMemHostUnregister(back))
        queue.close()
        peer.send(b"x")
        assert not leaks(), leaks()
        """,
        delay_us=2_000_000,  # the reader has looked by then, on however busy a machine
        others={},
    )


def test_what_was_altered_or_freed_cannot_be_opened(run_pair: Run) -> None:
    """A pointer of another pool, of freed memory or with a bit changed; an event so changed, destroyed or our own."""
    run_pair(
        _exporter("""
        assert answer_to(event.ipc_descriptor.__reduce__()[1][0]) == 201
        other = new_pool()
        give(other, other.allocate(PAGE, stream=queue), event)
        assert peer.recv(1) == b"x"
        buffer.close()
        event.close()
        peer.send(b"x")
        peer.recv(1)
        """),
        """
        pool, payload, size, handle = take()
        other = take()[0]
        for place in range(0, 64, 7):
            altered = bytearray(payload)
            altered[place] ^= 1
            assert refusal(lambda: open_buffer(pool, bytes(altered), size)) == "CUDA_ERROR_INVALID_VALUE"
            altered = bytearray(handle)
            altered[place] ^= 1
            assert answer_to(bytes(altered)) == 400
        assert refusal(lambda: open_buffer(other, payload, size)) == "CUDA_ERROR_INVALID_VALUE"
        assert refusal(lambda: DeviceMemoryResource.from_allocation_handle(device, 0)) == "CUDA_ERROR_INVALID_VALUE"
        open_buffer(pool, payload, size).close()
        queue.sync()
        peer.send(b"x")
        peer.recv(1)
        assert refusal(lambda: open_buffer(pool, payload, size)) == "CUDA_ERROR_INVALID_VALUE"
        assert answer_to(handle) == 400 and refusal(lambda: open_event(handle)) == "Failed to open IPC event handle"
        peer.send(b"x")
        """,
    )


def test_a_pool_of_another_device_cannot_be_opened(run_pair: Run) -> None:
    """Two processes with GPUs of different UUIDs."""
    run_pair(
        _exporter("peer.recv(1)"),
        """
        assert refusal(take) == "CUDA_ERROR_INVALID_DEVICE"
        peer.send(b"x")
        """,
        uuid="1" * 32,
        others={"uuid": "2" * 32},
    )


def test_freeing_what_the_other_process_has_open_is_counted(run_pair: Run) -> None:
    """The process that imported it must have freed it first."""
    run_pair(
        _exporter("""
        peer.recv(1)
        buffer.close()
        assert counter("freed_while_imported") == 1
        peer.send(b"x")
        """),
        """
        buffer = open_buffer(*take()[:3])
        peer.send(b"x")
        peer.recv(1)
        """,
    )


def test_a_process_that_is_killed_keeps_no_other_waiting(start: Start) -> None:
    """What it recorded counts as done once it is dead; the other's work goes on, and nothing is left in /dev/shm."""
    before = set(os.listdir("/dev/shm"))
    ends = socket.socketpair()
    writer = start(_SHARED + _exporter("time.sleep(60)"), ends[0].fileno(), stall=1)
    reader = start(
        _SHARED
        + textwrap.dedent("""
        pool, payload, size, handle = take()
        buffer, event, back = open_buffer(pool, payload, size), open_event(handle), register()
        queue.wait(event)
        ok(cuda.cuMemcpyDtoHAsync(back, int(buffer.handle), PAGE, queue.handle))
        time.sleep(0.1)
        assert code(cuda.cuStreamQuery(queue.handle)) == 600
        peer.send(b"x")
        queue.sync()
        event.sync()
        assert event.is_done and look(back, 1) == b"\\xdb"
        """),
        ends[1].fileno(),
    )
    ends[1].close()
    ends[0].settimeout(_LONG_S)
    assert ends[0].recv(1) == b"x"  # the writer, which has this end as well, never reads
    os.kill(writer.pid, signal.SIGKILL)
    ends[0].close()
    _finish(reader)
    assert set(os.listdir("/dev/shm")) <= before
