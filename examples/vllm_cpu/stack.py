"""Starts and stops the real thing: two vLLM servers with LMCache and a proxy between them, on this machine's CPU.

    python stack.py [--mode kvxfer|sync|async] [--channel kvxfer|nixl]      # runs until Ctrl-C, prints where to send requests

Mode `vllm` is vLLM alone with kvxfer's own connector and without a proxy. Mode `kvxfer` is kvxfer's PD backend, which a configuration gets that says nothing of `pd_backend_mode`; `sync` and `async` are
LMCache's own, over whichever channel.

As a context manager, `Stack` leaves nothing behind: every server and all it started end with the block, and also when this
process is killed.
"""

import argparse
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import yaml

HERE = pathlib.Path(__file__).resolve().parent
MODEL_NAME = "tiny"
# One engine step takes a whole prompt of the demo: bf16 sums depend on how a prefill is cut, and tokens are compared.
MAX_TOKENS = 8192
START_TIMEOUT_S = 400


def home():
    return pathlib.Path(os.environ.get("KVXFER_E2E_HOME") or pathlib.Path.home() / ".cache" / "kvxfer-e2e")


def free_ports(count):
    sockets = [socket.socket() for _ in range(count)]
    try:
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        return [s.getsockname()[1] for s in sockets]
    finally:
        for s in sockets:
            s.close()


def cores():
    """A core for each server, two different ones where there are two."""
    available = sorted(os.sched_getaffinity(0))
    return available[0], available[1 % len(available)]


def get(url):
    """The servers are on this machine: a proxy from the environment is of no use."""
    return urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=2)


def wake_tiles(url):
    """On a processor with AMX, vLLM 0.32 dies of its first prompt when that is a single token (SIGILL, with or without a connector): its
    attention uses tiles before anything has asked the kernel for them, which the products of a longer prompt do."""
    if "amx_tile" not in pathlib.Path("/proc/cpuinfo").read_text():
        return
    body = {"model": MODEL_NAME, "prompt": list(range(3, 67)), "max_tokens": 1, "temperature": 0}
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(url + "/v1/completions", json.dumps(body).encode(), headers)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    opener.open(request, timeout=START_TIMEOUT_S).close()


class Server:
    """A child below a keeper (see `keeper.py`), with its log. It ends with this process, however that ends."""

    def __init__(self, name, command, environment, log, mode="wb"):
        self.name, self.log = name, log
        with open(log, mode) as output:
            self.keeper = subprocess.Popen(
                [sys.executable, HERE / "keeper.py", *command],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )

    def wait_healthy(self, url, deadline):
        while True:
            if self.keeper.poll() is not None:
                raise RuntimeError(f"{self.name} ended; its log, {self.log}, ends:\n{self.tail()}")
            try:
                get(url + "/health").close()
                return
            except (urllib.error.URLError, OSError):
                pass
            if time.monotonic() > deadline:
                raise RuntimeError(f"{self.name} did not answer on {url} within {START_TIMEOUT_S} s; see {self.log}")
            time.sleep(0.5)

    def tail(self, lines=15):
        text = self.log.read_text(errors="replace").splitlines()
        return "\n".join(line[:300] for line in text[-lines:])

    def stop(self):
        self.keeper.stdin.close()
        self.keeper.wait()


def kvxfer_command():
    """The `kvxfer` command: KVXFER, or the release build of this repository."""
    binary = pathlib.Path(os.environ.get("KVXFER") or HERE.parents[1] / "target" / "release" / "kvxfer")
    if not os.access(binary, os.X_OK):
        raise SystemExit(f"{binary} is not there; `make build` makes it, or name another one in KVXFER")
    return binary


class Stack:
    """A prefiller, a decoder and a proxy. `proxy`, `prefiller` and `decoder` are base URLs once started.

    `lmcache` holds settings for both sides' LMCache, `vllm` flags for both servers, `environment` variables by role, `files`
    configuration files by role that are used as they are: `ports` then says what they name (`init`, `alloc`, `notify`).
    `connector` holds extra settings of the connector. With `control` the received cache can be spoilt (`negative_control.py`): it is
    zeroed while `corrupt_marker` exists. With several `ranks` each server runs tensor-parallel. `model`, an attribute, is the model's folder.
    """

    def __init__(
        self,
        mode="kvxfer",
        channel="kvxfer",
        control=False,
        lmcache=None,
        vllm=(),
        environment=None,
        proxy=(),
        files=None,
        ports=None,
        ranks=1,
        connector=None,
    ):
        self.mode, self.channel, self.control = mode, channel, control
        self.lmcache, self.vllm, self.environment = lmcache or {}, list(vllm), environment or {}
        self.proxy_flags, self.files, self.ports, self.ranks = list(proxy), files or {}, ports or {}, ranks
        self.connector = connector or {}
        self.home = home()
        self.model = self.home / "model"
        self.logs = self.home / "logs"
        self.corrupt_marker = self.home / "run" / f"corrupt-{os.getpid()}"
        self.servers = []

    def __enter__(self):
        try:
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_):
        self.stop()

    def stop(self):
        self.corrupt_marker.unlink(missing_ok=True)
        # All at once: each takes a few seconds.
        for server in self.servers:
            server.keeper.stdin.close()
        while self.servers:
            self.servers.pop().stop()

    def log(self, name):
        return self.logs / f"{name}-{self.channel}-{self.mode}.log"

    def _start(self):
        for folder in (self.logs, self.home / "run"):
            folder.mkdir(parents=True, exist_ok=True)
        prefiller, decoder, proxy, notify, *others = free_ports(4 + 2 * self.ranks)
        init, alloc, notify = others[: self.ranks], others[self.ranks :], self.ports.get("notify", notify)
        init, alloc = self.ports.get("init", init), self.ports.get("alloc", alloc)
        self.prefiller, self.decoder, self.proxy = (f"http://127.0.0.1:{p}" for p in (prefiller, decoder, proxy))
        self._roles = {
            "prefiller": (prefiller, cores()[0], {"pd_proxy_port": notify}),
            "decoder": (decoder, cores()[1], {"pd_peer_init_port": init, "pd_peer_alloc_port": alloc}),
        }
        for role in self._roles:
            self.servers.append(self._serve(role))
        deadline = time.monotonic() + START_TIMEOUT_S
        if self.mode != "vllm":
            self.servers.append(self._serve_proxy(prefiller, decoder, proxy, init, alloc, notify))
        for server, url in zip(self.servers, (self.prefiller, self.decoder, self.proxy), strict=False):
            server.wait_healthy(url, deadline)
        self._wake_tiles(self.prefiller)
        self._wake_tiles(self.decoder)
        self._wait_known(deadline)

    def _wake_tiles(self, url):
        # LMCache's own PD backends die of a prompt that names no receiver; what uses them here begins with longer ones.
        if self.mode == "vllm" or (self.mode, self.channel) == ("kvxfer", "kvxfer"):
            wake_tiles(url)

    def _wait_known(self, deadline):
        """Until the proxy has both servers: it asks each now and then."""
        while self.mode != "vllm":
            with get(self.proxy + "/metrics") as answer:
                up = [line for line in answer.read().decode().splitlines() if line.startswith("kvxfer_proxy_instance_up{")]
            if len(up) == 2 and all(line.endswith(" 1") for line in up):
                return
            if time.monotonic() > deadline:
                raise RuntimeError(f"the proxy does not see both servers; see {self.log('proxy')}")
            time.sleep(0.2)

    def _serve_proxy(self, prefiller, decoder, proxy, init, alloc, notify):
        command = [kvxfer_command(), "proxy", "--host", "127.0.0.1", "--port", proxy]
        command += ["--prefiller-host", "127.0.0.1", "--prefiller-port", prefiller]
        command += ["--decoder-host", "127.0.0.1", "--decoder-port", decoder]
        command += ["--decoder-init-port", *init, "--decoder-alloc-port", *alloc]
        command += ["--proxy-host", "127.0.0.1", "--proxy-port", notify, *self.proxy_flags]
        return Server("proxy", [str(a) for a in command], os.environ | {}, self.log("proxy"))

    def kill(self, role):
        """SIGKILL for a server and all it started."""
        index = list(self._roles).index(role)
        os.killpg(self.servers[index].keeper.pid, signal.SIGKILL)
        self.servers[index].keeper.wait()

    def restart(self, role):
        """Starts it again where it was, and waits for it."""
        index = list(self._roles).index(role)
        self.servers[index] = self._serve(role, "ab")
        url = {"prefiller": self.prefiller, "decoder": self.decoder}[role]
        deadline = time.monotonic() + START_TIMEOUT_S
        self.servers[index].wait_healthy(url, deadline)
        self._wake_tiles(url)
        self._wait_known(deadline)

    def _serve(self, role, mode="wb"):
        """Starts `vllm serve` with LMCache configured by ROLE.yaml of this folder, its ports replaced by free ones."""
        port, core, _ = self._roles[role]
        config_file = self.files.get(role) or self._write_config(role)

        connector = self._connector(role)
        command = [
            pathlib.Path(sys.executable).parent / "vllm",
            "serve",
            self.model,
            "--served-model-name",
            MODEL_NAME,
        ]
        command += ["--host", "127.0.0.1", "--port", port, "--max-model-len", MAX_TOKENS]
        command += [
            "--max-num-batched-tokens",
            MAX_TOKENS,
            "--max-num-seqs",
            4,
            "--enforce-eager",
            "--no-enable-prefix-caching",
            *self.vllm,
        ]
        command += ["--kv-transfer-config", json.dumps(connector)]
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]),
            # LMCache's chunk keys contain Python hashes: both sides need the same seed.
            "PYTHONHASHSEED": "0",
            "LMCACHE_CONFIG_FILE": str(config_file),
            "LMCACHE_TRACK_USAGE": "false",
            "VLLM_CPU_OMP_THREADS_BIND": str(core),
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
            "VLLM_HOST_IP": "127.0.0.1",
            "GLOO_SOCKET_IFNAME": "lo",
            "VLLM_NO_USAGE_STATS": "1",
            "DO_NOT_TRACK": "1",
            "HF_HUB_OFFLINE": "1",
            "KVXFER_DEMO_CORRUPT": str(self.corrupt_marker),
        }
        environment.setdefault("UCX_NET_DEVICES", "lo")
        # What worker processes count shows at the server's /metrics only with a folder of its own.
        metrics = self.home / "run" / f"metrics-{role}-{os.getpid()}"
        shutil.rmtree(metrics, ignore_errors=True)
        metrics.mkdir(parents=True)
        environment["PROMETHEUS_MULTIPROC_DIR"] = str(metrics)
        if self.ranks > 1:
            command += ["--tensor-parallel-size", self.ranks]
            environment["VLLM_CPU_OMP_THREADS_BIND"] = "|".join([str(core)] * self.ranks)
        environment |= self.environment.get(role, {})
        return Server(role, [str(a) for a in command], environment, self.log(role), mode)

    def _connector(self, role):
        kv_role = "kv_producer" if role == "prefiller" else "kv_consumer"
        if self.mode == "vllm":
            return {
                "kv_connector": "KvxferConnector",
                "kv_connector_module_path": "kvxfer.vllm",
                "kv_role": kv_role,
                "kv_load_failure_policy": "recompute",
                "kv_connector_extra_config": self.connector,
            }
        extra = {"discard_partial_chunks": False, "lmcache_rpc_port": f"kvxfer-{role}-{os.getpid()}"}
        if role == "decoder":
            extra["skip_last_n_tokens"] = 1
        return {
            "kv_connector": "LMCacheConnectorV1",
            "kv_role": kv_role,
            "kv_connector_extra_config": extra | self.connector,
        } | ({"kv_connector": "SpoiltConnector", "kv_connector_module_path": "negative_control"} if self.control else {})

    def _write_config(self, role):
        config = yaml.safe_load((HERE / f"{role}.yaml").read_text())
        config |= self._roles[role][2] | {"transfer_channel": self.channel} | self.lmcache
        if self.mode != "kvxfer":
            config["pd_backend_mode"] = self.mode
        if self.channel == "nixl":
            config["nixl_backends"] = ["UCX"]
        path = self.home / "run" / f"{role}-{os.getpid()}.yaml"
        path.write_text(yaml.safe_dump(config))
        return path


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mode", choices=["kvxfer", "sync", "async"], default="kvxfer", help="whose PD backend")
    parser.add_argument("--channel", choices=["kvxfer", "nixl"], default="kvxfer", help="LMCache's transfer_channel")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    print("starting, about a minute", flush=True)
    try:
        with Stack(options.mode, options.channel) as stack:
            print(
                f"proxy {stack.proxy}\nprefiller {stack.prefiller}\ndecoder {stack.decoder}\nlogs in {stack.logs}; Ctrl-C ends it",
                flush=True,
            )
            signal.pause()
    except KeyboardInterrupt:
        pass


if __name__ == "__main__":
    main()
