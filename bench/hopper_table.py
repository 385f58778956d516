#!/usr/bin/env python3
"""The Hopper table of docs/performance.md from one command, as text and JSON.

    python3 bench/hopper_table.py --bin DIR --engine E [--fp8-engine F] [--out table.json] [--only kernels,model,serve]

DIR holds nibble, libnibble_cuda.so and nibble_cuda_bench; E is an engine of the 24B shape with room for the
serving runs:

    nibble build --synthetic mistral-24b --tokenizer models/nano --target cuda:sm_90 \
        --max-input-len 7000 --max-output-len 300 --out E

F is the same built with --activations fp8, for the rows that say so.
Every row has its value, the limit measured or computed for the same run, the bar and whether it is met.
"""
# SPDX-License-Identifier: Apache-2.0
import argparse
import json
import pathlib
import re
import subprocess
import sys
import time

LAYER_BYTES = 286.6e6  # int4 weights and scales of one layer
LAYER_FLOPS = 2 * 555.75e6  # per token
KV_BYTES = 260 * 8  # per token and layer, int8 with scales
BF16_FLOPS = 750e12  # what cuBLAS gives on random data at this card's power
E4M3_FLOPS = 1400e12  # the same with e4m3 inputs
STEP_BYTES = 12.80e9  # weights read by a decode step

# tokens: (must, aim) in us
LAYER_BARS = {1: (80, 72), 4: (80, 72), 8: (80, 72), 16: (80, 72), 32: (95, 80), 64: (125, 110),
              128: (240, 212), 256: (410, 385), 5525: (9300, 8800)}
FP8_BARS = {64: (105, 85), 128: (140, 120), 5525: (6000, 4900)}


class Table:
    def __init__(self):
        self.rows = []

    def add(self, work, value, unit, limit=None, must=None, aim=None, larger_is_better=False):
        """limit, must and aim are in the row's unit; None: there is none."""
        row = {"work": work, "value": value, "unit": unit, "limit": limit, "must": must, "aim": aim}
        if limit:
            row["percent_of_limit"] = 100 * (value / limit if larger_is_better else limit / value)
        if must is not None:
            meets = (lambda bar: value >= bar) if larger_is_better else (lambda bar: value <= bar)
            row["met"] = "aim" if aim is not None and meets(aim) else "must" if meets(must) else "no"
            if row["met"] == "no":
                row["gap_percent"] = 100 * (must / value - 1 if larger_is_better else value / must - 1)
        self.rows.append(row)

    def text(self):
        lines = [f"{'work':<58}{'value':>10} {'unit':<6}{'limit':>9}{'% of it':>9}{'must':>8}{'aim':>8}  met"]
        def number(x, digits=2):
            text = "" if x is None else f"{x:.{digits}f}"
            return text.rstrip("0").rstrip(".") if "." in text else text

        for row in self.rows:
            percent = row.get("percent_of_limit")
            met = row.get("met", "")
            if met == "no":
                met = f"no, {row['gap_percent']:.1f} % short"
            lines.append(f"{row['work']:<58}{number(row['value']):>10} {row['unit']:<6}"
                         f"{number(row['limit'], 1):>9}{number(percent, 0):>9}{number(row['must']):>8}"
                         f"{number(row['aim']):>8}  {met}")
        return "\n".join(lines)


def run(command, timeout=300):
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=timeout)
    if done.returncode != 0:
        sys.exit(f"{' '.join(map(str, command))} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.stdout


def kernels(table, bench):
    tokens = ",".join(map(str, LAYER_BARS))
    out = run([bench, "linear", "--no-check", "--no-shapes", "--m", tokens, "--", "attention", "--no-check",
               "--", "prefill", "--", "ops"], timeout=580)
    read = float(re.search(r"read limit of this run: (\d+)", out).group(1)) * 1e9
    table.add("device memory, read", read * 1e-9, "GB/s")
    for m, us in re.findall(r"M=(\d+)\s+tactic.*?layer\s+([\d.]+) us", out):
        must, aim = LAYER_BARS[int(m)]
        limit = max(LAYER_BYTES / read, int(m) * LAYER_FLOPS / BF16_FLOPS) * 1e6
        table.add(f"int4 linears of one layer, M = {m}", float(us), "us", limit, must, aim)
    fp8 = run([bench, "linear", "--kernel", "fp8", "--no-check", "--m", ",".join(map(str, FP8_BARS))])
    for m, what, us in re.findall(r"M=(\d+)\s+tactic\s+-1 (sum|layer)\s+([\d.]+) us", fp8):
        limit = max(LAYER_BYTES / read, int(m) * LAYER_FLOPS / E4M3_FLOPS) * 1e6
        if what == "sum":
            table.add(f"the same with e4m3 inputs, one by one, M = {m}", float(us), "us", limit, *FP8_BARS[int(m)])
        else:
            table.add(f"  as a chain, rounding included, M = {m}", float(us), "us", limit)
    for name, batch, length, us in re.findall(
            r"decode (attention|step)\s+(\d+) x\s+(\d+) tokens.*?([\d.]+) us", out):
        bar = (200, 185) if (int(batch), int(length)) == (64, 5600) else (None, None)
        what = "decode attention" if name == "attention" else "the same, RoPE and append included"
        table.add(f"{what}, {batch} x {length}, int8 KV", float(us), "us",
                  int(batch) * int(length) * KV_BYTES / read * 1e6, *bar)
    for count, length, us, tflops in re.findall(
            r"prefill attention\s+(\d+) of\s+(\d+) tokens.*?([\d.]+) us\s+([\d.]+) TFLOPS", out):
        bar = (650, 450) if (count, length) == ("5525", "5525") else (None, None)
        table.add(f"prefill attention, {count} of {length} ({tflops} TFLOPS)", float(us), "us", None, *bar)
    for rows, us in re.findall(r"lm_head\s+(\d+) rows: ([\d.]+) us", out):
        table.add(f"logits, {rows} rows", float(us), "us", 1.342e9 / read * 1e6)
    for rows, what, us in re.findall(r"sample\s+(\d+) rows, (.*?): ([\d.]+) us", out):
        table.add(f"sampling, {rows} rows, {what}", float(us), "us")
    return read


def latency(nibble, engine, batch, prompt, output):
    out = run([nibble, "bench", "latency", engine, "--batch", batch, "--prompt-tokens", prompt,
               "--output-tokens", output, "--json"])
    return json.loads(out.strip().splitlines()[-1])


def model(table, nibble, engine, fp8_engine):
    for batch, prompt, output, must, aim in [(1, 1024, 128, 3.8, 3.35), (8, 1024, 128, None, None),
                                             (64, 1024, 128, None, None), (64, 5500, 240, 14, 12.3)]:
        got = latency(nibble, engine, batch, prompt, output)
        read = got["read_bandwidth_gb_per_s"] * 1e9
        floor = (max(STEP_BYTES / read, 40 * batch * LAYER_FLOPS / BF16_FLOPS) +
                 batch * prompt * KV_BYTES * 40 / read) * 1e3
        table.add(f"whole model, batch {batch}, context {prompt}", got["decode_step_ms"], "ms", floor, must, aim)
    cold = latency(nibble, engine, 1, 5525, 8)
    table.add("cold prefill, 5525 tokens", cold["time_to_first_token_s"] * 1e3, "ms", 365, 430, 385)
    if fp8_engine:
        for prompt, output in [(1024, 128), (5500, 240)]:
            step = latency(nibble, fp8_engine, 64, prompt, output)["decode_step_ms"]
            table.add(f"whole model, batch 64, context {prompt}, fp8", step, "ms")
        cold = latency(nibble, fp8_engine, 1, 5525, 8)
        table.add("cold prefill, 5525 tokens, fp8", cold["time_to_first_token_s"] * 1e3, "ms", 200, 260, 215)


def serve(table, nibble, engine, port):
    server = subprocess.Popen([str(nibble), "serve", str(engine), "--port", str(port), "--access-log", "off"],
                              stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}/v1"

    def load(*flags):
        command = [nibble, "bench", "serve", url, "--prompts", "random-ids", "--vocab-size", 500, "--json", *flags]
        return json.loads(run(command, timeout=400).strip().splitlines()[-1])

    try:
        for _ in range(200):  # until it answers
            probe = [str(nibble), "bench", "serve", url, "--prompts", "random-ids", "--vocab-size", "500",
                     "--sessions", "1", "--input-len", "8", "--output-len", "1"]
            if subprocess.run(probe, capture_output=True).returncode == 0:
                break
            time.sleep(0.5)
        cold = load("--sessions", 128, "--concurrency", 64, "--input-len", 5525, "--output-len", 150)
        table.add("serve, 64 clients, 5525 in / 150 out, no shared prefix", cold["requests_per_s"], "req/s", 2.6,
                  1.9, 2.3, True)
        warm = ["--shared-prefix", 5000, "--input-len", 500, "--seed", 9]
        one = load("--sessions", 12, "--concurrency", 1, "--output-len", 8, *warm)
        table.add("one warm turn alone, 5000 cached + 500: TTFT p50", one["ttft_ms"]["p50"], "ms", 33, 60, 45)
        many = load("--sessions", 200, "--rate", 9.5, "--output-len", 150, *warm)
        table.add("serve, 5000 cached + 500 in / 150 out, 9.5 arrivals/s", many["requests_per_s"], "req/s", None, 9,
                  13, True)
        table.add("  its TTFT p95", many["ttft_ms"]["p95"], "ms", None, 400, 250)
    finally:
        server.terminate()
        server.wait()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bin", type=pathlib.Path, default=pathlib.Path("build/release"))
    parser.add_argument("--engine", type=pathlib.Path, help="needed for model and serve")
    parser.add_argument("--fp8-engine", type=pathlib.Path)
    parser.add_argument("--out", type=pathlib.Path, help="JSON file")
    parser.add_argument("--only", default="kernels,model,serve")
    parser.add_argument("--port", type=int, default=8123)
    flags = parser.parse_args()
    parts = flags.only.split(",")
    if flags.engine is None and {"model", "serve"} & set(parts):
        parser.error("model and serve need --engine")
    flags.bin = flags.bin.resolve()  # or "." would be looked for in PATH
    table = Table()
    if "kernels" in parts:
        kernels(table, flags.bin / "nibble_cuda_bench")
    if "model" in parts:
        model(table, flags.bin / "nibble", flags.engine, flags.fp8_engine)
    if "serve" in parts:
        serve(table, flags.bin / "nibble", flags.engine, flags.port)
    print(table.text())
    if flags.out:
        flags.out.write_text(json.dumps({"rows": table.rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
