"""The process at the other end: an agent with one exported region, led through a pipe."""

import kvxfer

REGION_BYTES = 4 << 20
PAGE = 64 << 10
GEOMETRY = kvxfer.Geometry(page_bytes=PAGE, model="tiny", dtype="bfloat16", layout="KV_2LTD", chunk_tokens=256)


def pattern(length, seed=0):
    """Bytes that differ by place and by seed."""
    period = bytes((i * 7 + (i >> 8) * 13 + seed) & 0xFF for i in range(1 << 16))
    return (period * (length // len(period) + 1))[:length]


def serve(pipe, settings):
    try:
        _serve(pipe, settings)
    except Exception as e:
        pipe.send(e)


def _serve(pipe, settings):
    foreign = settings.pop("foreign", False)
    with kvxfer.Agent("there", listen="tcp://127.0.0.1:0", **settings) as agent:
        memory = bytearray(REGION_BYTES) if foreign else None
        region = agent.register(memory) if foreign else agent.allocate(REGION_BYTES)
        region.export("pages")
        pipe.send(agent.addresses[0])
        while True:
            command, arguments = pipe.recv()
            if command == "stop":
                return
            if command == "bytes":
                offset, length = arguments
                pipe.send(bytes(region.memory[offset : offset + length]))
            elif command == "fill":
                region.memory[:] = pattern(REGION_BYTES, *arguments)
                pipe.send(None)
            elif command == "notification":
                got = agent.wait_notification(*arguments)
                pipe.send(got and (got.peer, got.payload))
            elif command == "notify":
                agent.peer(arguments[0]).notify(arguments[1])
                pipe.send(None)
            elif command == "read back":
                # The same connection, used from this side.
                name, remote_name, length = arguments
                with agent.allocate(length) as local:
                    peer = agent.peer(name)
                    peer.read(local, peer.region(remote_name), [(0, 0, length)]).wait()
                    pipe.send(bytes(local.memory))
            else:
                raise ValueError(command)
