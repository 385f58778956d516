#!/usr/bin/env python3
"""Many clients at once against a running `nibble serve`, none of them well-behaved for long. Standard library only.

    tests/clients/swarm.py http://127.0.0.1:8000 idle 1000     hold N streams open, all of which must complete
    tests/clients/swarm.py http://127.0.0.1:8000 kill 1000     N streams, every one cut in mid-answer
    tests/clients/swarm.py http://127.0.0.1:8000 storm 2000    N requests at once: 200, 429 or 503, and how fast
    tests/clients/swarm.py http://127.0.0.1:8000 slow 50       N clients that never read, beside one that does

Afterwards the server must hold no KV block. Prints what it saw and the server's memory (--pid).
"""
import argparse
import asyncio
import json
import statistics
import time
import urllib.parse
import urllib.request

parser = argparse.ArgumentParser()
parser.add_argument("url")
parser.add_argument("mode", choices=["idle", "kill", "storm", "slow"])
parser.add_argument("count", type=int)
parser.add_argument("--pid", type=int, help="of the server, to show its memory")
parser.add_argument("--max-tokens", type=int, default=20, help="of an answer; kill uses 300")
args = parser.parse_args()
target = urllib.parse.urlsplit(args.url)


def metric(name):
    text = urllib.request.urlopen(args.url + "/metrics").read().decode()
    return float(next(line for line in text.splitlines() if line.startswith(name)).split()[-1])


def memory():
    if not args.pid:
        return "?"
    for line in open(f"/proc/{args.pid}/status"):
        if line.startswith("VmRSS"):
            return f"{int(line.split()[1]) / 1024:.0f} MB"


def request(max_tokens, **more):
    body = json.dumps({"messages": [{"role": "user", "content": "What is water?"}], "max_tokens": max_tokens,
                       "ignore_eos": True, "stream": True, **more}).encode()
    return (f"POST /v1/chat/completions HTTP/1.1\r\nHost: {target.netloc}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n").encode() + body


async def connect(limit=2 ** 16):
    return await asyncio.open_connection(target.hostname, target.port, limit=limit)


async def whole():
    start = time.monotonic()
    reader, writer = await connect()
    writer.write(request(args.max_tokens))
    head = await reader.readuntil(b"\r\n\r\n")
    first = time.monotonic() - start
    rest = await reader.read()
    while chunk := await reader.read():
        rest += chunk
    writer.close()
    return int(head.split()[1]), first, b"data: [DONE]" in rest


async def killed():
    reader, writer = await connect()
    writer.write(request(300))
    head = await reader.readuntil(b"\r\n\r\n")
    if b" 200 " in head.split(b"\r\n")[0]:
        await reader.read(200)
    writer.transport.abort()  # a reset, not a farewell
    return int(head.split()[1])


async def silent(stop):
    reader, writer = await connect(limit=1)
    writer.write(request(400, logprobs=True, top_logprobs=20, n=4))
    await stop.wait()
    writer.transport.abort()


async def main():
    print(f"before: {memory()}")
    if args.mode in ("idle", "storm"):
        results = await asyncio.gather(*(whole() for _ in range(args.count)))
        for status in sorted({r[0] for r in results}):
            times = sorted(r[1] * 1e3 for r in results if r[0] == status)
            print(f"{len(times)} x {status}: head after p50 {statistics.median(times):.1f} ms, "
                  f"p99 {times[int(len(times) * .99)]:.1f} ms, max {times[-1]:.1f} ms")
        print(f"complete: {sum(r[2] for r in results)} of {sum(r[0] == 200 for r in results)}")
    elif args.mode == "kill":
        statuses = await asyncio.gather(*(killed() for _ in range(args.count)))
        print({status: statuses.count(status) for status in set(statuses)})
    else:
        stop = asyncio.Event()
        stalled = [asyncio.create_task(silent(stop)) for _ in range(args.count)]
        start = time.monotonic()
        while metric("nibble:http_slow_readers_cut_total") < args.count and time.monotonic() - start < 120:
            status, first, done = await whole()
            print(f"a reader meanwhile: {status}, first byte after {first * 1e3:.0f} ms, complete {done}; "
                  f"cut so far {metric('nibble:http_slow_readers_cut_total'):.0f}, {memory()}")
        stop.set()
        await asyncio.gather(*stalled)
    start = time.monotonic()
    while metric("nibble:kv_blocks_used") > 0 or metric("nibble:replies_in_flight") > 0:
        if time.monotonic() - start > 30:
            raise SystemExit(f"FAILED: {metric('nibble:kv_blocks_used'):.0f} KV blocks are still held")
        await asyncio.sleep(0.05)
    print(f"KV blocks held: 0, {1e3 * (time.monotonic() - start):.0f} ms later; {memory()}")


asyncio.run(main())
