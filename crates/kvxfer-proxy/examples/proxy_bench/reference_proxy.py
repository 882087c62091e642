"""A disaggregated-prefill proxy in Python that speaks LMCache's protocol, for comparison.

It does what LMCache's own example does, in the same way and with the same packages: FastAPI and uvicorn, httpx towards
the engines, a ZMQ PULL socket read with msgspec, readiness polled every 0.1 ms, the decoder's stream passed on as it
comes. Unlike that one it also answers in one piece, turns chat streams into chat form, and says the right content type.
"""
import argparse
import asyncio
import itertools
import json
import time
from contextlib import asynccontextmanager

import httpx
import msgspec
import uvicorn
import zmq
import zmq.asyncio
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse

flags = argparse.ArgumentParser()
flags.add_argument("--port", type=int, required=True)
flags.add_argument("--proxy-port", type=int, required=True)
flags.add_argument("--upstream-port", type=int, required=True)
args = flags.parse_args()


class ProxyNotif(msgspec.Struct, tag="ProxyNotif"):
    req_id: str


counter = itertools.count()
finished = set()
ttft = []


async def pull():
    socket = zmq.asyncio.Context.instance().socket(zmq.PULL)
    socket.bind(f"tcp://127.0.0.1:{args.proxy_port}")
    decoder = msgspec.msgpack.Decoder(ProxyNotif)
    while True:
        finished.add(decoder.decode(await socket.recv()).req_id)


@asynccontextmanager
async def lifespan(app):
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    url = f"http://127.0.0.1:{args.upstream_port}"
    app.state.prefiller = httpx.AsyncClient(base_url=url, timeout=None, limits=limits, trust_env=False)
    app.state.decoder = httpx.AsyncClient(base_url=url, timeout=None, limits=limits, trust_env=False)
    task = asyncio.create_task(pull())
    yield
    task.cancel()
    await app.state.prefiller.aclose()
    await app.state.decoder.aclose()


app = FastAPI(lifespan=lifespan)


@app.get("/health")
async def health():
    return {}


async def prefill(data, tokenize):
    """The request's tokens, first token and transfer id."""
    start = time.time()
    client = app.state.prefiller
    if tokenize is not None:
        answer = await client.post("/tokenize", json=tokenize)
        answer.raise_for_status()
        data["prompt"] = answer.json()["tokens"]
    req_id = str(next(counter))
    spec = {"req_id": req_id, "receiver_host": "127.0.0.1", "receiver_init_port": [8300], "receiver_alloc_port": [8400]}
    request = dict(data, max_tokens=1, stream=False, kv_transfer_params={"ret_first_tok": True, "disagg_spec": spec})
    request.pop("stream_options", None)
    answer = await client.post("/v1/completions", json=request)
    answer.raise_for_status()
    ttft.append(time.time() - start)
    return answer.json(), req_id


async def ready(req_id):
    while req_id not in finished:
        await asyncio.sleep(0.0001)
    finished.discard(req_id)


async def serve(data, tokenize, chat):
    stream, most = data.get("stream", False), data["max_tokens"]
    answer, req_id = await prefill(data, tokenize)
    first = answer["choices"][0]["text"]
    rest = dict(data, prompt=data["prompt"] + [answer["kv_transfer_params"]["first_tok"]], max_tokens=most - 1)
    if not stream:
        await ready(req_id)
        decoded = await app.state.decoder.post("/v1/completions", json=rest)
        decoded.raise_for_status()
        decoded = decoded.json()
        decoded["choices"][0]["text"] = first + decoded["choices"][0]["text"]
        return JSONResponse(decoded)

    def head(text):
        choice = {"index": 0, "logprobs": None, "finish_reason": None}
        choice.update({"delta": {"role": "assistant", "content": text}} if chat else {"text": text})
        kind = "chat.completion.chunk" if chat else "text_completion"
        chunk = {"id": answer["id"], "object": kind, "created": answer["created"], "model": answer["model"], "choices": [choice]}
        return "data: " + json.dumps(chunk) + "\n\n"

    async def events():
        yield head(first)
        await ready(req_id)
        async with app.state.decoder.stream("POST", "/v1/completions", json=rest) as decoded:
            decoded.raise_for_status()
            if not chat:
                async for piece in decoded.aiter_bytes():
                    yield piece
                return
            async for line in decoded.aiter_lines():
                if not line.startswith("data: "):
                    continue
                if line == "data: [DONE]":
                    yield "data: [DONE]\n\n"
                    continue
                chunk = json.loads(line[6:])
                choice = chunk["choices"][0]
                choice["delta"] = {"content": choice.pop("text")}
                chunk["object"] = "chat.completion.chunk"
                yield "data: " + json.dumps(chunk) + "\n\n"

    return StreamingResponse(events(), media_type="text/event-stream")


@app.post("/v1/completions")
async def completions(request: Request):
    data = await request.json()
    text = isinstance(data["prompt"], str)
    return await serve(data, {"model": data["model"], "prompt": data["prompt"]} if text else None, False)


@app.post("/v1/chat/completions")
async def chat_completions(request: Request):
    data = await request.json()
    return await serve(data, {"model": data["model"], "messages": data.pop("messages")}, True)


uvicorn.run(app, host="127.0.0.1", port=args.port, log_level="info")
