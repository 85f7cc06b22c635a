"""Ten times more requests than a server can answer: who is answered, who is refused, who waits.

    python benchmarks/overload.py [--seconds 20] [--times 10] [--rows 4] [--peer] [--json FILE]

Real ``mlflow models serve``, one worker, MiniLM. First eight callers ask one after the other,
which is the server's capacity; then requests are sent at ``--times`` this rate for some seconds,
each on a connection of its own, whether earlier ones were answered or not; then one more, to see
when the server is itself again. In turn: our model behind its gate, the same model without one
(``max_queue=0 max_wait=0``: MLflow's server by itself), and with ``--peer`` mlflow.transformers.
Clients give up after 60 s.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from _common import machine, minilm_classifier, save_ours, save_peer
from _server import Server

PATIENCE = 60.0
"""Seconds after which a client gives up."""
_WORDS = "the quick brown fox jumps over three lazy dogs and sleeps "


async def _ask(port: int, body: bytes) -> tuple[int, float]:
    """Status of an answer, 0 for none, and the seconds it took."""
    head = "POST /invocations HTTP/1.1\r\nHost: here\r\nConnection: close\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"

    async def exchange() -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            writer.write(head.encode() + body)
            return await reader.read()
        finally:
            writer.close()

    start = time.perf_counter()
    try:
        answer = await asyncio.wait_for(exchange(), PATIENCE)
        status = int(answer.split(b" ", 2)[1]) if answer else 0
    except (OSError, asyncio.TimeoutError):
        status = 0
    return status, time.perf_counter() - start


async def capacity(port: int, body: bytes, seconds: float) -> float:
    """Requests a second of eight callers."""
    end, done = time.perf_counter() + seconds, 0

    async def caller() -> None:
        nonlocal done
        while time.perf_counter() < end:
            status, _ = await _ask(port, body)
            if status != 200:
                raise SystemExit(f"the server answered {status} while it had time")
            done += 1

    await asyncio.gather(*(caller() for _ in range(8)))
    return done / seconds


async def burst(port: int, body: bytes, rate: float, seconds: float) -> dict[str, Any]:
    """Statuses of requests that are sent at a rate, and the times of those that are answered."""
    start, sent = time.perf_counter(), []
    for i in range(int(rate * seconds)):
        await asyncio.sleep(start + i / rate - time.perf_counter())
        sent.append(asyncio.create_task(_ask(port, body)))
    took = time.perf_counter() - start
    answers = await asyncio.gather(*sent)
    whole = time.perf_counter() - start
    status, after = await _ask(port, body)
    good = sorted(seconds for status, seconds in answers if status == 200)
    refused = [seconds for status, seconds in answers if status == 503]
    return {
        "offered a second": len(sent) / took,
        "answers": dict(Counter(str(status or "none") for status, _ in answers)),
        "p50 s": statistics.median(good) if good else None,
        "p99 s": good[int(0.99 * (len(good) - 1))] if good else None,
        "refusal p99 s": sorted(refused)[int(0.99 * (len(refused) - 1))] if refused else None,
        "good a second": len(good) / whole,
        "one more": (status, after),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--times", type=float, default=10)
    parser.add_argument("--rows", type=int, default=4, help="texts of 80 words in a request")
    parser.add_argument("--peer", action="store_true", help="mlflow.transformers as well")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    print(machine())
    body = json.dumps({"inputs": [_WORDS * 8] * asked.rows}).encode()
    none = {"MLFLOW_SAFEFLAVOR_MAX_QUEUE": "0", "MLFLOW_SAFEFLAVOR_MAX_WAIT": "0"}
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        model = minilm_classifier()
        ours = save_ours(model, Path(folder, "ours"))
        cases: dict[str, tuple[Path, Mapping[str, str]]] = {
            "ours": (ours, {}),
            "ours without the gate's limits": (ours, none),
        }
        if asked.peer:
            peer = save_peer(model, "text-classification", Path(folder, "peer"))
            cases["mlflow.transformers"] = (peer, {})
        for name, (path, variables) in cases.items():
            with Server(path, environ=variables) as server:
                port = server.port
                able = asyncio.run(capacity(port, body, 5))
                found[name] = {
                    "capacity": able,
                    **asyncio.run(burst(port, body, asked.times * able, asked.seconds)),
                }
            print(name, json.dumps(found[name], indent=1))
    if asked.json:
        asked.json.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
