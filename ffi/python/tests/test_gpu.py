"""Device memory and fences, in a process that has a CUDA driver: the stand-in over host memory (`KVXFER_CUDA_STANDIN` names its folder), or
with `KVXFER_TEST_GPU=1` this machine's own."""

import ctypes
import json
import os
import subprocess
import sys

import pytest

import kvxfer
from kvxfer import gpu

UNDER = "KVXFER_TEST_UNDER_CUDA"
LENGTH = 200_000


def under_a_driver(test):
    """Runs the test in a process that has a driver."""

    def run(tmp_path):
        environment = dict(os.environ)
        report = tmp_path / "report"
        if not environment.get("KVXFER_TEST_GPU"):
            folder = environment.get("KVXFER_CUDA_STANDIN")
            if not folder:
                pytest.skip("no stand-in CUDA driver (KVXFER_CUDA_STANDIN; scripts/test-python.sh sets it)")
            environment |= {"LD_LIBRARY_PATH": folder, "KVXSTANDIN_REPORT": str(report)}
        code = f"import sys; sys.path.insert(0, {os.path.dirname(__file__)!r}); import test_gpu; test_gpu.{test.__name__}.body()"
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment | {UNDER: "1"}, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stdout + done.stderr
        if report.exists():
            for line in report.read_text().splitlines():
                assert json.loads(line)["live"] == {}, line

    run.body = test
    return run


def pattern(seed):
    return bytes((i * 7 + i // 251 + seed) & 0xFF for i in range(LENGTH))


@under_a_driver
def test_device_memory_is_written_and_read():
    with kvxfer.Agent("there", listen="tcp://127.0.0.1:0") as there, kvxfer.Agent("here") as here:
        for shareable in (False, True):
            target = there.allocate_device(LENGTH, shareable=shareable)
            assert target.device == 0 and target.read() == bytes(LENGTH)
            target.export("target")
            source = here.allocate_device(LENGTH)
            source.write(0, pattern(1))
            peer = here.connect(there.addresses[0])
            remote = peer.region("target")
            assert "cuda_ipc" in remote.transports
            report = peer.write(source, remote, [(0, 100, LENGTH - 100)], after=kvxfer.Fence()).wait()
            assert report.transport == "cuda_ipc"
            assert target.read(100) == pattern(1)[:-100] and target.read(0, 100) == bytes(100)
            # From host memory, by sockets, and back.
            host = here.register(bytearray(pattern(2)))
            assert host.device is None
            peer.write(host, remote, [(0, 0, LENGTH)]).wait()
            assert target.read() == pattern(2)
            peer.read(source, remote, [(0, 0, LENGTH)], transport="tcp").wait()
            assert source.read() == pattern(2)
            there.unexport("target")
            host.close()
            del remote, peer
            source.close()
            target.close()


@under_a_driver
def test_what_the_host_cannot_touch_is_an_error():
    with kvxfer.Agent("here") as here:
        region = here.allocate_device(4096)
        with pytest.raises(kvxfer.Unsupported, match="cannot touch"):
            region.memory  # noqa: B018
        with pytest.raises(kvxfer.OutOfRange):
            region.read(4000, 97)
        with pytest.raises(kvxfer.OutOfRange):
            region.write(4096, b"x")
        host = here.allocate(4096)
        with pytest.raises(AttributeError, match="host memory"):
            host.__cuda_array_interface__  # noqa: B018
        host.pin()
        with pytest.raises(kvxfer.NotAvailable, match="CUDA_VISIBLE_DEVICES"):
            here.allocate_device(4096, device=9)
        with pytest.raises(kvxfer.NoCapacity, match="CUDA_ERROR_OUT_OF_MEMORY"):
            here.allocate_device(1 << 50)
        region.close()
        host.close()


@under_a_driver
def test_memory_of_others_is_registered():
    with kvxfer.Agent("here") as here:
        owner = here.allocate_device(8192)
        owner.write(0, pattern(3)[:8192])

        class Array:
            __cuda_array_interface__ = owner.__cuda_array_interface__ | {"shape": (1024, 2), "typestr": "<f2"}

        region = here.register(Array())
        assert (region.device, len(region), region.read()) == (0, 4096, pattern(3)[:4096])
        region.close()
        part = here.register(Tensor(owner.address, (2, 3, 8), byte_offset=512))
        assert (part.device, len(part), part.read()) == (0, 96, pattern(3)[512:608])
        part.close()
        raw = here.register_memory(owner.address + 100, 50)
        assert raw.device == 0 and raw.read() == pattern(3)[100:150]
        raw.close()
        with pytest.raises(kvxfer.InvalidArgument, match="its allocation ends after"):
            here.register_memory(owner.address, 8193)
        for wrong, says in [
            ({"strides": (4, 1)}, "not contiguous"),
            ({"data": (owner.address, True)}, "read-only"),
            ({"mask": 1}, "masked"),
        ]:
            with pytest.raises(TypeError, match=says):
                gpu.by_array_interface(owner.__cuda_array_interface__ | {"shape": (4, 2), "typestr": "|u1"} | wrong)
        with pytest.raises(TypeError, match="not contiguous"):
            here.register(Tensor(owner.address, (4, 2), strides=(4, 1)))
        owner.close()


@under_a_driver
def test_a_pool_on_a_device():
    shape = kvxfer.Geometry(page_bytes=4096)
    with kvxfer.Agent("decoder", listen="tcp://127.0.0.1:0") as decoder, kvxfer.Agent("prefiller") as prefiller:
        pages = decoder.allocate_device(4 * 4096)
        source = prefiller.allocate_device(8192)
        source.write(0, pattern(4)[:8192])
        with kvxfer.Receiver(decoder, shape, 4, memory=pages) as receiver:
            sender = kvxfer.Sender(prefiller, decoder.addresses[0], geometry=shape)
            reservation = sender.reserve("r", [("a", 4096), ("b", 100)])
            reservation.wait_admitted(10)
            reservation.write(0, source, [(4096, 4096)], after=kvxfer.Fence(0))
            reservation.write(1, source, [(0, 50), (1000, 50)])
            report = reservation.finish().wait(10)
            assert (report.transport, report.written) == ("cuda_ipc", 2)
            receiver.wait_request("r", 10)
            with receiver.acquire("a") as chunk:
                assert chunk.read() == pattern(4)[4096:8192]
            with receiver.acquire("b") as chunk:
                assert chunk.read() == pattern(4)[:50] + pattern(4)[1000:1050]
                assert chunk.read(50, 3) == pattern(4)[1000:1003]
            del chunk, sender, reservation, report
        source.close()
        pages.close()


@under_a_driver
def test_pages_are_gathered_by_a_kernel_and_by_pieces():
    layers, blocks, block, heads, head, tokens = 3, 5, 4, 2, 16, 14
    shape = kvxfer.Layout.paged(blocks, block, heads, head, kv_first=False, heads_first=True)
    layer = 2 * blocks * block * heads * head
    table = [4, 0, 2, 1]
    with kvxfer.Agent("there", listen="tcp://127.0.0.1:0") as there, kvxfer.Agent("here") as here:
        pages = here.allocate_device(layers * layer)
        content = pattern(6)[: layers * layer]
        pages.write(0, content)
        chunk = here.allocate_device(2 * layers * tokens * heads * head)
        source = kvxfer.View(pages, shape, [i * layer for i in range(layers)], table=table, first=1)
        target = kvxfer.View.chunk(chunk, layers, tokens, heads, head)
        expected = bytearray()
        for plane in range(2):
            for i in range(layers):
                for t in range(1, tokens + 1):
                    for h in range(heads):
                        # [blocks, 2, heads, block, head]
                        at = i * layer + (((table[t // block] * 2 + plane) * heads + h) * block + t % block) * head
                        expected += content[at : at + head]
        gather = kvxfer.Gather(source, target, tokens)
        gather.start(after=kvxfer.Fence(), digest=True)
        moved, digest = gather.wait()
        assert chunk.read() == bytes(expected) and moved == len(expected) and digest == digest_of(expected)
        # The same as a transfer to a peer.
        far = there.allocate_device(len(expected))
        far.export("chunk")
        peer = here.connect(there.addresses[0])
        remote = peer.region("chunk")
        assert peer.write(pages, remote, gather.pieces()).wait().transport == "cuda_ipc"
        assert far.read() == bytes(expected)
        with pytest.raises(kvxfer.InvalidArgument, match="has not been started"):
            gather.wait()
        with pytest.raises(kvxfer.InvalidArgument, match="hold 16"):
            kvxfer.Gather(source, kvxfer.View.chunk(chunk, layers, 16, heads, head), 16)
        with pytest.raises(kvxfer.InvalidArgument, match="slot 20"):
            kvxfer.Gather(kvxfer.View(pages, shape, [0], slots=[20]), kvxfer.View.chunk(chunk, 1, 1, heads, head), 1)
        del gather, source, target, remote, peer
        there.unexport("chunk")
        for region in (far, chunk, pages):
            region.close()


def digest_of(data):
    mask, total = (1 << 64) - 1, 0
    for n in range(len(data) // 8):
        x = int.from_bytes(data[8 * n : 8 * n + 8], "little") ^ ((n + 1) * 0x9E3779B97F4A7C15 & mask)
        x = (x ^ x >> 33) * 0xFF51AFD7ED558CCD & mask
        x = (x ^ x >> 33) * 0xC4CEB9FE1A85EC53 & mask
        total = (total + (x ^ x >> 33)) & mask
    return total


def test_without_a_driver_it_is_an_error():
    if os.environ.get("KVXFER_TEST_GPU"):
        pytest.skip("there is a driver")
    with kvxfer.Agent("here") as here:
        with pytest.raises(kvxfer.NotAvailable, match="CUDA not available"):
            here.allocate_device(4096)
        with pytest.raises(kvxfer.NotAvailable, match="CUDA not available"):
            kvxfer.Fence()


class Tensor:
    """Speaks DLPack, as CuPy's and JAX's arrays do."""

    def __init__(self, address, shape, strides=None, byte_offset=0):
        n = len(shape)
        self.tensor = gpu._Tensor(
            address, gpu._Device(gpu.DLPACK_CUDA, 0), n, 2, 16, 1, (ctypes.c_int64 * n)(*shape), None, byte_offset
        )
        if strides:
            self.tensor.strides = (ctypes.c_int64 * n)(*strides)

    def __dlpack_device__(self):
        return (gpu.DLPACK_CUDA, 0)

    def __dlpack__(self, stream=None):
        assert stream == -1
        new = ctypes.pythonapi.PyCapsule_New
        new.restype, new.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
        return new(ctypes.addressof(self.tensor), b"dltensor", None)
