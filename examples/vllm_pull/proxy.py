"""A small proxy for vLLM servers that run kvxfer's own connector (or another of vLLM's pull connectors).

    python proxy.py --port 9000 --prefiller http://127.0.0.1:8100 [--prefiller …] --decoder http://127.0.0.1:8200 [--decoder …]

A request goes to a prefiller for its prompt (`max_tokens: 1`, `do_remote_decode`), and with what that answers to a decoder, whose answer
is passed on as it comes. Prefillers and decoders take turns. A prefiller that fails costs its head start, not the request: the decoder
then computes the prompt. Needs fastapi, uvicorn and httpx, which vLLM brings.
"""

import argparse
import contextlib
import itertools
import json

import fastapi
import httpx
import uvicorn
from fastapi.responses import JSONResponse, StreamingResponse

FIRST = {"do_remote_decode": True, "do_remote_prefill": False}


def application(prefillers, decoders):
    turns = itertools.cycle(prefillers), itertools.cycle(decoders)

    @contextlib.asynccontextmanager
    async def lifespan(app):
        async with httpx.AsyncClient(timeout=None, trust_env=False) as app.state.client:
            yield

    app = fastapi.FastAPI(lifespan=lifespan)

    async def prefill(client, path, body, headers):
        """What the decoder needs of the prefiller; nothing where that failed."""
        asked = body | {"max_tokens": 1, "stream": False, "kv_transfer_params": FIRST}
        asked.pop("stream_options", None)
        if "max_completion_tokens" in asked:
            asked["max_completion_tokens"] = 1
        try:
            answer = await client.post(next(turns[0]) + path, json=asked, headers=headers)
        except httpx.HTTPError as e:
            print(f"proxy: a prefiller failed ({e!r}); the decoder computes the prompt", flush=True)
            return None, None
        if answer.is_client_error:
            # The request itself is wrong: the client hears of it in the engine's words.
            return None, answer
        return (answer.json().get("kv_transfer_params") if answer.is_success else None), None

    async def serve(request: fastapi.Request):
        client, path = app.state.client, request.url.path
        try:
            body = await request.json()
        except json.JSONDecodeError as e:
            return JSONResponse({"error": {"message": f"the body is no JSON: {e}", "type": "BadRequestError"}}, 400)
        if not isinstance(body, dict):
            return JSONResponse({"error": {"message": "the body is no object", "type": "BadRequestError"}}, 400)
        kept = ("authorization", "x-request-id")
        headers = {name: value for name, value in request.headers.items() if name in kept}
        body.pop("kv_transfer_params", None)
        params, refusal = await prefill(client, path, body, headers)
        if refusal is not None:
            return fastapi.Response(refusal.content, refusal.status_code, media_type="application/json")
        if params:
            body["kv_transfer_params"] = params
        asked = client.build_request("POST", next(turns[1]) + path, json=body, headers=headers)
        try:
            answer = await client.send(asked, stream=True)
        except httpx.HTTPError as e:
            return JSONResponse({"error": {"message": f"the decoder cannot be reached: {e}", "type": "ServiceUnavailable"}}, 503)

        async def passed_on():
            try:
                async for part in answer.aiter_raw():
                    yield part
            finally:
                await answer.aclose()

        return StreamingResponse(passed_on(), answer.status_code, media_type=answer.headers.get("content-type"))

    app.post("/v1/completions")(serve)
    app.post("/v1/chat/completions")(serve)
    app.get("/health")(lambda: {})
    return app


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--host", default="127.0.0.1", help="address for clients [%(default)s]")
    parser.add_argument("--port", type=int, default=9000, help="port for clients [%(default)s]")
    parser.add_argument("--prefiller", action="append", required=True, metavar="URL", help="a prefiller; repeat for more")
    parser.add_argument("--decoder", action="append", required=True, metavar="URL", help="a decoder; repeat for more")
    options = parser.parse_args()
    app = application([p.rstrip("/") for p in options.prefiller], [d.rstrip("/") for d in options.decoder])
    uvicorn.run(app, host=options.host, port=options.port, log_level="warning")


if __name__ == "__main__":
    main()
