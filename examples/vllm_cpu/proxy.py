"""The smallest disaggregated-prefill proxy: one prefiller, one decoder, `POST /v1/completions` with token ids or text.

    python proxy.py --port 9100 --notify 7500 --prefiller http://127.0.0.1:7100 --decoder http://127.0.0.1:7200 \
        --receiver 127.0.0.1 --init-port 7300 --alloc-port 7400

It speaks LMCache's protocol: ask the prefiller for one token and tell it where the decoder's buffer is; wait until the
prefiller reports over ZeroMQ that the cache has been handed over; let the decoder go on from prompt + first token.
"""

import argparse
import asyncio
import contextlib
import logging
import time
import uuid

import httpx
import msgspec
import uvicorn
import zmq
import zmq.asyncio
from fastapi import FastAPI, HTTPException, Request

log = logging.getLogger("proxy")
HANDOVER_TIMEOUT_S = 60
HTTP_TIMEOUT_S = 600


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--notify", type=int, required=True, help="where the prefiller reports (pd_proxy_port)")
    parser.add_argument("--prefiller", required=True, help="base URL")
    parser.add_argument("--decoder", required=True, help="base URL")
    parser.add_argument("--receiver", default="127.0.0.1", help="pd_peer_host of the decoder")
    parser.add_argument("--init-port", type=int, required=True, help="pd_peer_init_port of the decoder")
    parser.add_argument("--alloc-port", type=int, required=True, help="pd_peer_alloc_port of the decoder")
    return parser.parse_args()


class Handovers:
    """Which requests' caches have arrived at the decoder."""

    def __init__(self):
        self._waiting = {}

    def expect(self, request):
        self._waiting[request] = asyncio.get_running_loop().create_future()

    async def arrived(self, request):
        try:
            await asyncio.wait_for(self._waiting[request], HANDOVER_TIMEOUT_S)
        except asyncio.TimeoutError:
            raise HTTPException(504, f"no handover of request {request} within {HANDOVER_TIMEOUT_S} s") from None

    def forget(self, request):
        self._waiting.pop(request, None)

    async def listen(self, port):
        socket = zmq.asyncio.Context.instance().socket(zmq.PULL)
        socket.bind(f"tcp://127.0.0.1:{port}")
        while True:
            frame = await socket.recv()
            try:
                message = msgspec.msgpack.decode(frame)
                request = message["req_id"] if message["type"] == "ProxyNotif" else None
            except (msgspec.DecodeError, TypeError, KeyError):
                log.warning("not a notification: %r", frame[:64])
                continue
            future = self._waiting.get(request)
            if future and not future.done():
                future.set_result(None)


def application(options):
    handovers = Handovers()

    @contextlib.asynccontextmanager
    async def lifespan(app):
        async with httpx.AsyncClient(timeout=HTTP_TIMEOUT_S, trust_env=False) as client:
            app.state.client = client
            listener = asyncio.create_task(handovers.listen(options.notify))
            yield
            listener.cancel()

    app = FastAPI(lifespan=lifespan)

    async def post(url, body):
        response = await app.state.client.post(url, json=body)
        if response.is_error:
            raise HTTPException(response.status_code, f"{url}: {response.text[:500]}")
        return response.json()

    @app.get("/health")
    async def health():
        return {}

    @app.post("/v1/completions")
    async def completions(incoming: Request):
        body = await incoming.json()
        if body.get("stream"):
            raise HTTPException(400, "this example does not stream")
        wanted = body.get("max_tokens", 16)
        if isinstance(body["prompt"], str):
            text = {"model": body["model"], "prompt": body["prompt"]}
            body["prompt"] = (await post(options.prefiller + "/tokenize", text))["tokens"]

        request = uuid.uuid4().hex
        destination = {
            "req_id": request,
            "receiver_host": options.receiver,
            "receiver_init_port": [options.init_port],
            "receiver_alloc_port": [options.alloc_port],
        }
        handovers.expect(request)
        try:
            started = time.perf_counter()
            transfer = {"ret_first_tok": True, "disagg_spec": destination}
            first = await post(
                options.prefiller + "/v1/completions",
                body | {"max_tokens": 1, "stream": False, "kv_transfer_params": transfer},
            )
            prefilled = time.perf_counter()
            await handovers.arrived(request)
            handed_over = time.perf_counter()
        finally:
            handovers.forget(request)

        answer = first
        if wanted > 1:
            token = first["kv_transfer_params"]["first_tok"]
            rest = body | {"prompt": [*body["prompt"], token], "max_tokens": wanted - 1, "stream": False}
            answer = await post(options.decoder + "/v1/completions", rest)
            choice = answer["choices"][0]
            choice["text"] = first["choices"][0]["text"] + choice["text"]
            if choice.get("token_ids") is not None:
                choice["token_ids"] = [token, *choice["token_ids"]]
        answer["pd_timing_s"] = {
            "prefill": prefilled - started,
            "handover": handed_over - prefilled,
            "decode": time.perf_counter() - handed_over,
        }
        return answer

    return app


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    chosen = arguments()
    uvicorn.run(application(chosen), host="127.0.0.1", port=chosen.port, log_level="warning")
