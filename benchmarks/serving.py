"""Violations over load: requests at random times to a running server, whatever it does (an open loop), on this machine.

    ray-ctrl serve RUN --port 8000 [late=cheapest] &
    python benchmarks/serving.py http://127.0.0.1:8000 [--loads 0.3,0.7,2] [--requests 200] [--fixed]

A load of 1 is one request per mean service time, measured first with one request after another. Budgets are drawn
log-uniformly from `--budgets` times the reference latency. Times are the client's: from sending to the answer.
`--fixed` gives every request so large a budget that the controller chooses as without a budget, and counts violations
of the drawn budget: serving without a controller.
"""

import argparse
import asyncio
import io
import math
import random
import statistics
import time
from typing import Any

import httpx
from PIL import Image

LARGE_MS = 50_000.0


def picture(generator: random.Random) -> bytes:
    """A photo-sized PNG of one color: its pixels cost the same as any."""
    file = io.BytesIO()
    size = generator.choice([(64, 64), (112, 84), (168, 112), (224, 168)])
    Image.new("RGB", size, tuple(generator.randrange(256) for _ in range(3))).save(file, "PNG")
    return file.getvalue()


async def ask(client: httpx.AsyncClient, url: str, budget_ms: float, image: bytes, fixed: bool) -> dict[str, Any]:
    """Sends one request; its status, the client's milliseconds and the budget."""
    sent = LARGE_MS if fixed else budget_ms
    began = time.perf_counter()
    response = await client.post(
        f"{url}/answer", data={"question": "how many digits are there?", "budget_ms": sent}, files={"image": image}
    )
    spent_ms = (time.perf_counter() - began) * 1e3
    found = response.json() if response.status_code == 200 else {}
    return {**found, "status": response.status_code, "ms": spent_ms, "budget_ms": budget_ms}


async def run(url: str, load: float, service_ms: float, arguments: argparse.Namespace, low: float, high: float) -> str:
    """One load, as a line of the table."""
    generator = random.Random(arguments.seed)
    async with httpx.AsyncClient(timeout=120, limits=httpx.Limits(max_connections=1000)) as client:
        tasks = []
        for _ in range(arguments.requests):
            budget_ms = math.exp(generator.uniform(math.log(low), math.log(high)))
            tasks.append(asyncio.create_task(ask(client, url, budget_ms, picture(generator), arguments.fixed)))
            await asyncio.sleep(generator.expovariate(load / service_ms) / 1e3)
        done = await asyncio.gather(*tasks)
    answered = [row for row in done if row["status"] == 200]
    client_over = sum(row["ms"] > row["budget_ms"] for row in answered)
    late = sum(row["ms"] > 1.2 * row["budget_ms"] for row in done)
    server_over = sum(row["latency_ms"] > row["budget_ms"] for row in answered)
    statuses = {status: sum(row["status"] == status for row in done) for status in sorted({r["status"] for r in done})}
    waits = sorted(row["queue_ms"] for row in answered) or [0.0]
    return (
        f"{load:5.1f} {len(answered):9} {len(done) - len(answered):8} {server_over / max(len(answered), 1):9.1%} "
        f"{client_over / max(len(answered), 1):9.1%} {late / len(done):10.1%} {statistics.median(waits):9.1f} "
        f"{waits[int(0.95 * (len(waits) - 1))]:9.1f}  {statuses}"
    )


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("url")
    parser.add_argument("--loads", default="0.3,0.7,2")
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--budgets", default="0.6,6", help="lowest and highest, times the reference latency")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fixed", action="store_true")
    arguments = parser.parse_args()
    url = arguments.url.rstrip("/")
    reference_ms = httpx.get(f"{url}/info").json()["reference_ms"]
    low, high = (float(factor) * reference_ms for factor in arguments.budgets.split(","))
    generator, spent = random.Random(arguments.seed), []
    async with httpx.AsyncClient(timeout=120) as client:
        for _ in range(30):
            budget_ms = math.exp(generator.uniform(math.log(low), math.log(high)))
            row = await ask(client, url, budget_ms, picture(generator), arguments.fixed)
            spent.append((row["ms"], row.get("latency_ms", row["ms"])))
    service_ms, overhead_ms = statistics.mean(s for _, s in spent), statistics.median(c - s for c, s in spent)
    print(
        f"one request at a time: {service_ms:.1f} ms at the replica, {overhead_ms:.1f} ms more at the client; "
        f"reference {reference_ms:.1f} ms, budgets {low:.0f} to {high:.0f} ms, {arguments.requests} requests a load"
    )
    print(" load  answered  refused  over (s)  over (c)  later x1.2  queue p50       p95  statuses")
    for load in map(float, arguments.loads.split(",")):
        print(await run(url, load, service_ms, arguments, low, high), flush=True)


if __name__ == "__main__":
    asyncio.run(main())
