"""serve_rm.py against the same scorer behind FastAPI and uvicorn, alternating in one run.

    pip install fastapi uvicorn uvloop httptools
    python bench/server.py [--quick]

Scorers: a constant, 20 ms + 1 ms a text (one at a time, as on a GPU), and the toy's reward model.
Requests of 1 text of 200 characters and of 16 of 4,000. The FastAPI server is written as its users
write it: one call of the scorer a request, in its thread pool; the constant in the event loop.
Printed: requests a second, median and 99th percentile in ms, and replies that were refused for the
moment (429) or failed; then memory over 20,000 requests and the recovery after a kill.
"""

import argparse
import asyncio
import contextlib
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

SENTENCE = "the crust was very superb and the sauce was stale . "
FUNCTIONS = '''
import time

def constant(prompts, completions, labels):
    """Nothing but HTTP."""
    return [1.0] * len(prompts)

def slow(prompts, completions, labels):
    """20 ms + 1 ms a text."""
    time.sleep(0.02 + 0.001 * len(prompts))
    return [1.0] * len(prompts)
'''
SCORERS = ("constant", "20 ms + 1 ms", "toy's model")
SIZES = ((1, 200), (16, 4000))  # texts, characters
CONNECTIONS = (1, 8, 64, 256, 1000)


def uvicorn_app(scorer: str) -> Any:
    """The same scorer behind FastAPI."""
    import torch
    from fastapi import FastAPI, Request
    from fastapi.concurrency import run_in_threadpool

    lock = threading.Lock()
    if scorer == "toy's model":
        from recipes import toy
        from reinforce.serving.reward_model import load_reward_model, query_ids, score

        name = str(toy.prepare() / "reward_model")
        model, tokenizer = load_reward_model(name, torch.device("cpu"))
        longest = model.config.max_position_embeddings

        def rewards(texts: list[str]) -> list[float]:
            items = [query_ids(tokenizer, text)[-longest:] for text in texts]
            with lock, torch.inference_mode():
                return score(model, items, tokenizer.pad_token_id).tolist()
    else:

        def rewards(texts: list[str]) -> list[float]:
            with lock:
                time.sleep(0.02 + 0.001 * len(texts))
            return [1.0] * len(texts)

    app = FastAPI()

    @app.post("/get_reward")
    async def get_reward(request: Request) -> dict[str, Any]:
        texts = (await request.json())["query"]
        if scorer == "constant":
            return {"rewards": [1.0] * len(texts)}
        return {"rewards": await run_in_threadpool(rewards, texts)}

    return app


@contextlib.contextmanager
def running(command: list[str], ready: Path) -> Iterator[tuple[int, int]]:
    """A server; its port and process id."""
    ready.unlink(missing_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(command, env=environment)
    try:
        while not ready.exists() or not ready.read_text().strip():
            if process.poll() is not None:
                raise SystemExit(f"{command} did not start")
            time.sleep(0.05)
        yield int(ready.read_text().split()[1]), process.pid
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGKILL)
        process.wait()


def ours(scorer: str, folder: Path, port: int = 0) -> list[str]:
    """The command of serve_rm.py."""
    (folder / "functions.py").write_text(FUNCTIONS)
    name = "constant" if scorer == "constant" else "slow"
    reward = [] if scorer == "toy's model" else ["--reward-fn", f"{folder}/functions.py:{name}"]
    command = [sys.executable, str(ROOT / "serve_rm.py"), "--port", str(port), *reward]
    return [*command, "--ready-file", str(folder / "ours.ready")]


def theirs(scorer: str, folder: Path) -> list[str]:
    """The command of uvicorn."""
    return [
        sys.executable,
        str(ROOT / "bench/server.py"),
        "--serve",
        scorer,
        str(folder / "theirs.ready"),
    ]


def serve(scorer: str, ready: Path) -> None:
    """Run uvicorn on a free port."""
    import socket

    import uvicorn

    listener = socket.create_server(("127.0.0.1", 0), backlog=4096)
    ready.write_text(f"127.0.0.1 {listener.getsockname()[1]}\n")
    how = {"loop": "uvloop", "http": "httptools", "access_log": False, "log_level": "error"}
    server = uvicorn.Server(uvicorn.Config(uvicorn_app(scorer), backlog=4096, **how))
    server.run(sockets=[listener])


@dataclass
class Load:
    """Clients that ask again as soon as they are answered, until `end`."""

    request: bytes
    texts: int
    end: float
    times: list[float] = field(default_factory=list)
    busy: int = 0
    failed: int = 0


class Client(asyncio.Protocol):
    """One connection of a load."""

    def __init__(self, load: Load, done: "asyncio.Future[None]") -> None:
        self.load, self.done, self.data, self.start = load, done, b"", 0.0

    def connection_made(self, transport: Any) -> None:
        """Ask first."""
        self.transport = transport
        self._ask()

    def _ask(self) -> None:
        self.data, self.start = b"", self.start or time.perf_counter()
        self.transport.write(self.load.request)

    def data_received(self, data: bytes) -> None:
        """A part of the reply."""
        self.data += data
        head, found, body = self.data.partition(b"\r\n\r\n")
        if not found:
            return
        length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
        if len(body) < length:
            return
        if head.startswith(b"HTTP/1.1 429"):
            self.load.busy += 1
            pause = float(head.lower().split(b"retry-after:")[1].split(b"\r\n")[0])
            asyncio.get_running_loop().call_later(pause * random.uniform(1, 1.5), self._ask)
            return
        numbers = body.partition(b'"rewards":')[2].partition(b"]")[0].count(b",") + 1
        self.load.failed += not head.startswith(b"HTTP/1.1 200") or numbers != self.load.texts
        self.load.times.append(time.perf_counter() - self.start)
        self.start = 0.0
        if time.perf_counter() < self.load.end:
            self._ask()
        else:
            self.transport.close()

    def connection_lost(self, error: Exception | None) -> None:
        """Closed by us, or reset."""
        if time.perf_counter() < self.load.end or self.start:
            self.load.failed += 1
        if not self.done.done():
            self.done.set_result(None)


def attack(port: int, connections: int, size: tuple[int, int], seconds: float) -> dict[str, float]:
    """Requests a second and more of `connections` clients."""
    import uvloop

    texts, characters = size
    line = (SENTENCE * (characters // 40))[:characters]
    body = ('{"query": [' + ", ".join([f'"{line}"'] * texts) + "]}").encode()
    head = "POST /get_reward HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    request = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body

    async def go() -> Load:
        loop = asyncio.get_running_loop()
        load = Load(request, texts, time.perf_counter() + seconds)
        waits = [loop.create_future() for _ in range(connections)]
        make = [
            loop.create_connection(lambda done=done: Client(load, done), "127.0.0.1", port)
            for done in waits
        ]
        results = await asyncio.gather(*make, return_exceptions=True)
        for done, result in zip(waits, results, strict=True):
            if isinstance(result, BaseException):
                load.failed += 1
                done.set_result(None)
        await asyncio.gather(*waits)
        return load

    start = time.perf_counter()
    load = uvloop.new_event_loop().run_until_complete(go())
    times = sorted(load.times) or [float("nan")]
    return {
        "rate": len(load.times) / (time.perf_counter() - start),
        "p50": 1e3 * times[len(times) // 2],
        "p99": 1e3 * times[min(len(times) - 1, int(0.99 * len(times)))],
        "busy": load.busy,
        "failed": load.failed,
    }


def compare(folder: Path, rounds: int, seconds: float, slowest: int) -> None:
    """The table: both servers in turn, medians over rounds."""
    head = ("scorer", "request", "clients", "req/s", "p50", "p99", "429", "failed")
    print("".join(f"{w:>13}" for w in (*head, "uvicorn req/s", "p50", "p99", "failed", "ratio")))
    for scorer in SCORERS:
        with (
            running(ours(scorer, folder), folder / "ours.ready") as (port, _),
            running(theirs(scorer, folder), folder / "theirs.ready") as (other, _),
        ):
            attack(other, 1, SIZES[0], 1.0)  # until it answers and is warm
            attack(port, 1, SIZES[0], 1.0)
            for size in SIZES:
                for connections in CONNECTIONS:
                    if scorer != "constant" and size[0] * connections > slowest:
                        continue
                    found: dict[int, list[dict[str, float]]] = {port: [], other: []}
                    for _ in range(rounds):
                        for at in (port, other):
                            found[at].append(attack(at, connections, size, seconds))
                    print_row(scorer, size, connections, found[port], found[other])


def print_row(
    scorer: str,
    size: tuple[int, int],
    connections: int,
    our: list[dict[str, float]],
    their: list[dict[str, float]],
) -> None:
    """One line of the table."""

    def median(runs: list[dict[str, float]], key: str) -> float:
        return statistics.median(run[key] for run in runs)

    def total(runs: list[dict[str, float]], key: str) -> str:
        return f"{sum(run[key] for run in runs):13.0f}"

    row = f"{scorer:>13}{size[0]:>6} x {size[1]:4}{connections:13}"
    row += "".join(f"{median(our, key):13.2f}" for key in ("rate", "p50", "p99"))
    row += total(our, "busy") + total(our, "failed")
    row += "".join(f"{median(their, key):13.2f}" for key in ("rate", "p50", "p99"))
    row += total(their, "failed") + f"{median(our, 'rate') / median(their, 'rate'):13.2f}"
    print(row, flush=True)


def memory(folder: Path) -> None:
    """Resident memory over 20,000 requests."""

    def resident(pid: int) -> float:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**20

    command, ready = ours("toy's model", folder), folder / "ours.ready"
    with running(command, ready) as (port, pid):
        seen, counted = [], 0
        while counted < 24_000:
            run = attack(port, 64, SIZES[0], 1.0)
            counted += int(run["rate"])
            if counted > 4_000:
                seen.append(resident(pid))
    growth = 100 * (seen[-1] / seen[0] - 1)
    print(f"memory over 20,000 requests: {seen[0]:.0f} -> {seen[-1]:.0f} MiB ({growth:+.1f} %)")


def recovery(folder: Path) -> None:
    """Seconds from the second server's readiness to the reward that a client waits for."""
    from reinforce.rm_client import RewardClient

    ready, took = folder / "ours.ready", []
    for _ in range(3):
        with running(ours("constant", folder), ready) as (port, _pid):
            client = RewardClient("127.0.0.1", port)
            client.rewards(query=["a"])
        found: list[float] = []

        def ask(client: RewardClient = client, found: list[float] = found) -> None:
            client.rewards(query=["a"])
            found.append(time.monotonic())

        asking = threading.Thread(target=ask)
        asking.start()
        time.sleep(6)
        with running(ours("constant", folder, port), ready):
            start = time.monotonic()
            asking.join()
        took.append(found[0] - start)
    print(f"recovery after a kill and 6 s: {max(took):.2f} s after the new server is ready")


def main() -> None:
    """Everything, or with --quick one short round without the largest requests."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one round of a second each")
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments.serve[0], Path(arguments.serve[1]))
        return
    parts: list[Callable[[Path], None]] = [memory, recovery]
    with tempfile.TemporaryDirectory() as name:
        quick = arguments.quick
        compare(Path(name), 1 if quick else 3, 0.7 if quick else 1.0, 300 if quick else 1024)
        for part in parts:
            part(Path(name))


if __name__ == "__main__":
    main()
