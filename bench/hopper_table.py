#!/usr/bin/env python3
"""The whole Hopper table of docs/performance.md from one command, as text (row by row) and JSON.

    python3 bench/hopper_table.py --bin DIR --engine E [--fp8-engine F] [--out table.json] [--only kernels,model,serve]

DIR holds nibble, libnibble_cuda.so and nibble_cuda_bench; E is an engine of the 24B shape with room for the
serving runs:

    nibble build --synthetic mistral-24b --tokenizer models/nano --target cuda:sm_90 \
        --max-input-len 7000 --max-output-len 300 --out E

F is the same built with --activations fp8, for the rows that say so.
Every row has its value, the limit, the bar and whether it is met. Limits are measured first, in this run: reading,
and wgmma in bf16, f16 and e4m3; what a row's limit is made of them is computed (whole models: weights and pages read
at that rate, or the flops). The peer is torch in bf16 (bench/cuda/bf16_limit.py), run by --python, this Python or
python3, whichever has torch; without one the table says so. A part that fails says so, the others go on.
"""
# SPDX-License-Identifier: Apache-2.0
import argparse
import json
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import time

LAYERS = 40
LAYER_BYTES = 286.6e6  # int4 weights and scales of one layer
LAYER_FLOPS = 2 * 555.75e6  # per token
HEAD_BYTES = 1.342e9  # lm_head in 16 bits
KV_BYTES = 260 * 8  # per token and layer, int8 with scales
ATTENTION_FLOPS = 4 * 128 * 32  # per pair of tokens and layer
CLIENTS = 64

# tokens: (must, aim) in us
LAYER_BARS = {1: (80, 72), 4: (80, 72), 8: (80, 72), 16: (80, 72), 32: (95, 80), 64: (125, 110),
              128: (240, 212), 256: (410, 385), 5525: (9300, 8800)}
DIGITS = range(9, 17)  # rows at which linears read x as digits
PROMPTS = (16, 64, 500, 545, 5525)  # rows of prompts, whose linears add in order
FP8_BARS = {64: (105, 85), 128: (140, 120), 5525: (6000, 4900)}


def number(x, digits=2):
    text = "" if x is None else f"{x:.{digits}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


class Table:
    """Prints a row as soon as it is there."""

    def __init__(self):
        self.rows, self.notes = [], []
        print(f"{'work':<60}{'value':>9} {'unit':<6}{'limit':>9}{'% of it':>8}{'peer':>9}{'must':>7}{'aim':>7}  met")

    def add(self, work, value, unit, limit=None, must=None, aim=None, larger_is_better=False, peer=None, note=None):
        """limit, must, aim and peer are in the row's unit; None: there is none."""
        row = {"work": work, "value": value, "unit": unit, "limit": limit, "peer": peer, "must": must, "aim": aim}
        if limit:
            row["percent_of_limit"] = 100 * (value / limit if larger_is_better else limit / value)
        met = ""
        if must is not None:
            meets = (lambda bar: value >= bar) if larger_is_better else (lambda bar: value <= bar)
            met = row["met"] = "aim" if aim is not None and meets(aim) else "must" if meets(must) else "no"
            if met == "no":
                row["gap_percent"] = 100 * (must / value - 1 if larger_is_better else value / must - 1)
                met = f"no, {row['gap_percent']:.1f} % short"
        if note:
            row["note"] = note
            met = f"{met}  ({note})"
        self.rows.append(row)
        print(f"{work:<60}{number(value):>9} {unit:<6}{number(limit, 1):>9}"
              f"{number(row.get('percent_of_limit'), 0):>8}{number(peer, 1):>9}{number(must):>7}{number(aim):>7}  {met}",
              flush=True)

    def note(self, text):
        self.notes.append(text)
        print(f"NOTE: {text}", flush=True)


class Failure(Exception):
    pass


def run(command, timeout=300):
    command = [str(c) for c in command]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Failure(f"{' '.join(command)}: {error}") from None
    if done.returncode != 0:
        raise Failure(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.stdout


def find(pattern, text):
    found = re.search(pattern, text)
    if not found:
        raise Failure(f"nothing like \"{pattern}\" in:\n{text[-2000:]}")
    return found.group(1)


class Limits:
    """What the card gives in this run, in bytes and flops a second, and what follows for larger work in seconds."""

    def __init__(self, table, bench):
        out = run([bench, "limits"])
        self.card = out.splitlines()[0]
        self.read = float(find(r"read limit of this run: (\d+)", out)) * 1e9
        self.flops = {kind: float(find(rf"\b{kind} wgmma limit of this run: (\d+)", out)) * 1e12
                      for kind in ("bf16", "f16", "e4m3")}
        table.note(self.card)
        table.add("device memory, read", self.read * 1e-9, "GB/s")
        for kind, flops in self.flops.items():
            table.add(f"wgmma, {kind}", flops * 1e-12, "TFLOPS")

    def linears(self, tokens, kind="bf16"):
        """Of one layer."""
        return max(LAYER_BYTES / self.read, tokens * LAYER_FLOPS / self.flops[kind])

    def decode(self, batch, context, kind="bf16"):
        return (LAYERS * (self.linears(batch, kind) + batch * context * KV_BYTES / self.read) +
                HEAD_BYTES / self.read)

    def prefill(self, count, length, kind="bf16"):
        """The last `count` tokens of `length`."""
        pairs = count * (length - count) + count * (count + 1) / 2
        return (LAYERS * (self.linears(count, kind) + pairs * ATTENTION_FLOPS / self.flops["f16"]) +
                HEAD_BYTES / self.read)

    def request(self, count, length, output, kind="bf16"):
        """Of a server at work for CLIENTS."""
        return self.prefill(count, length, kind) + output * self.decode(CLIENTS, length, kind) / CLIENTS


def torch_python(given):
    for python in [given] if given else [sys.executable, shutil.which("python3"), "/usr/bin/python3"]:
        try:
            probe = [python, "-c", "import torch; torch.zeros(1, device='cuda')"]
            if python and subprocess.run(probe, capture_output=True, timeout=120).returncode == 0:
                return python
        except (OSError, subprocess.TimeoutExpired):
            pass
    return None


def measure_peer(table, given):
    """(us of a layer by tokens, us of prefill attention or None) in torch."""
    python = torch_python(given)
    if python is None:
        table.note("no peer: no Python with torch that sees the GPU (name one with --python)")
        return {}, None
    out = run([python, pathlib.Path(__file__).parent / "cuda" / "bf16_limit.py"])
    table.add("torch bf16, 8192 x 8192 x 8192", float(find(r"torch bf16 8192\^3: (\d+)", out)), "TFLOPS")
    layers = {int(m): float(us) for m, us in re.findall(r"torch bf16 layer, M = (\d+): ([\d.]+) us", out)}
    attention = re.search(r"torch cuDNN attention, 5525 causal: ([\d.]+) us", out)
    if attention is None:
        table.note("no peer for prefill attention: " + find(r"(torch cuDNN attention.*)", out))
    return layers, float(attention.group(1)) if attention else None


def kernels(table, limits, bench, python):
    try:
        peer, peer_attention = measure_peer(table, python)
    except Failure as error:
        table.note(f"no peer: {error}")
        peer, peer_attention = {}, None
    tokens = ",".join(str(m) for m in LAYER_BARS if m not in DIGITS and m != PROMPTS[-1])
    out = run([bench, "linear", "--no-check", "--no-shapes", "--m", tokens, "--", "attention", "--no-check",
               "--", "prefill", "--", "ops"], timeout=580)
    for m, us in re.findall(r"M=(\d+)\s+tactic.*?layer\s+([\d.]+) us", out):
        must, aim = LAYER_BARS[int(m)]
        table.add(f"int4 linears of one layer, M = {m}", float(us), "us", limits.linears(int(m)) * 1e6, must, aim,
                  peer=peer.get(int(m)))
    in_order = run([bench, "linear", "--no-check", "--no-shapes", "--in-order", "--m", ",".join(map(str, PROMPTS))])
    for m, us in re.findall(r"M=(\d+)\s+tactic.*?layer\s+([\d.]+) us", in_order):
        bars = LAYER_BARS[int(m)] if int(m) == PROMPTS[-1] else (None, None)
        table.add(f"int4 linears of one layer, rows of prompts, M = {m}", float(us), "us",
                  limits.linears(int(m)) * 1e6, *bars, peer=peer.get(int(m)))
    for kernel, name, kind, bars in (
            ("digits", "digits", "bf16", {m: bar for m, bar in LAYER_BARS.items() if m in DIGITS}),
            ("fp8", "e4m3", "e4m3", FP8_BARS)):
        rounded = run([bench, "linear", "--kernel", kernel, "--no-check", "--m", ",".join(map(str, bars))])
        for m, what, us in re.findall(r"M=(\d+)\s+tactic\s+-1 (sum|layer)\s+([\d.]+) us", rounded):
            limit = limits.linears(int(m), kind) * 1e6
            if what == "sum":
                table.add(f"the same, inputs as {name}, one by one, M = {m}", float(us), "us", limit, *bars[int(m)],
                          peer=peer.get(int(m)))
            else:
                table.add(f"  as a chain, rounding included, M = {m}", float(us), "us", limit, *bars[int(m)],
                          peer=peer.get(int(m)))
        for m, what, us, percent in re.findall(
                r"M=(\d+)\s+(?:quantize_x|split_digits) (\w+)\s+([\d.]+) us\s+\d+ GB/s \(\s*([\d.]+) % of read\)",
                rounded):
            table.add(f"rounding to {name}, input of {what}, M = {m}", float(us), "us",
                      float(us) * float(percent) / 100)
    for name, batch, length, us in re.findall(
            r"decode (attention|step)\s+(\d+) x\s+([\d.]+) tokens.*?([\d.]+) us", out):
        shortest, _, longest = length.rpartition("..")
        mean = (int(shortest or longest) + int(longest)) / 2
        bar = (200, 185) if (batch, length) == ("64", "5600") else (None, None)
        what = "decode attention" if name == "attention" else "the same, RoPE and append included"
        table.add(f"{what}, {batch} x {length}, int8 KV", float(us), "us",
                  int(batch) * mean * KV_BYTES / limits.read * 1e6, *bar)
    for count, length, us, tflops, percent in re.findall(
            r"prefill attention\s+(\d+) of\s+(\d+) tokens.*?([\d.]+) us\s+([\d.]+) TFLOPS \(\s*([\d.]+) % of f16\)",
            out):
        whole = (count, length) == ("5525", "5525")
        bar = (650, 450) if whole else (None, None)
        table.add(f"prefill attention, {count} of {length} ({tflops} TFLOPS)", float(us), "us",
                  float(us) * float(percent) / 100, *bar, peer=peer_attention if whole else None)
    # The ops: us, GB/s (percent of read) and, of linears, TFLOPS (percent of bf16).
    for what, us, read, tflops in re.findall(
            r"^(\w[^:\n]*): ([\d.]+) us\s+\d+ GB/s \(\s*([\d.]+) % of read\)"
            r"(?:\s+[\d.]+ TFLOPS \(\s*([\d.]+) % of bf16\))?$", out, re.MULTILINE):
        percent = max(float(read), float(tflops or 0))
        table.add(re.sub(r"\s+", " ", what), float(us), "us", float(us) * percent / 100)


def latency(nibble, engine, batch, prompt, output):
    out = run([nibble, "bench", "latency", engine, "--batch", batch, "--prompt-tokens", prompt,
               "--output-tokens", output, "--json"])
    return json.loads(out.strip().splitlines()[-1])


def model(table, limits, nibble, engine, fp8_engine):
    def steps(engine, batch, prompt, output, kind, suffix="", must=None, aim=None):
        got = latency(nibble, engine, batch, prompt, output)
        table.add(f"whole model, batch {batch}, context {prompt}{suffix}", got["decode_step_ms"], "ms",
                  limits.decode(batch, prompt, kind) * 1e3, must, aim)
        table.add("  the engine's thread, beside waiting, of such a step", got["host_percent_of_step"], "%", None, 5,
                  note=f"{got['host_us_per_step']:.0f} us")

    def cold(engine, kind, suffix, must, aim):
        got = latency(nibble, engine, 1, 5525, 8)
        table.add(f"cold prefill, 5525 tokens{suffix}", got["time_to_first_token_s"] * 1e3, "ms",
                  limits.prefill(5525, 5525, kind) * 1e3, must, aim)

    steps(engine, 1, 1024, 128, "bf16", must=3.8, aim=3.35)
    steps(engine, 8, 1024, 128, "bf16")
    steps(engine, 64, 1024, 128, "bf16")
    steps(engine, 64, 5500, 240, "bf16", must=14, aim=12.3)
    cold(engine, "bf16", "", 430, 385)
    if fp8_engine:
        steps(fp8_engine, 64, 1024, 128, "e4m3", ", fp8")
        steps(fp8_engine, 64, 5500, 240, "e4m3", ", fp8")
        cold(fp8_engine, "e4m3", ", fp8", 260, 215)


def serve(table, limits, nibble, engine, port, kind="bf16", suffix=""):
    url = f"http://127.0.0.1:{port}/v1"

    def load(*flags):
        command = [nibble, "bench", "serve", url, "--prompts", "random-ids", "--vocab-size", 500, "--json", *flags]
        return json.loads(run(command, timeout=400).strip().splitlines()[-1])

    def cached(got):
        return f"{100 * got['cached_tokens'] / got['input_tokens']:.0f} % of prompts cached"

    def arrivals(rate, sessions, seed, what, *flags):
        got = load("--sessions", sessions, "--rate", rate, "--shared-prefix", 5000, "--warm", "--input-len", 500,
                   "--output-len", 150, "--seed", seed, *flags)
        # What arrived cannot be exceeded, and the last ones take their time.
        table.add(f"serve{suffix}, 5000 cached ({what}) + 500 / 150, --rate {rate}", got["requests_per_s"], "req/s",
                  got["arrivals_per_s"], 9, 13, True, note=f"limit: arrived; {cached(got)}")
        table.add("  its TTFT p95", got["ttft_ms"]["p95"], "ms", None, 400, 250)

    with tempfile.TemporaryFile("w+") as log:
        server = subprocess.Popen([str(nibble), "serve", str(engine), "--port", str(port), "--access-log", "off"],
                                  stdout=log, stderr=log)
        try:
            for attempt in range(200):  # until it answers
                probe = [str(nibble), "bench", "serve", url, "--prompts", "random-ids", "--vocab-size", "500",
                         "--sessions", "1", "--input-len", "8", "--output-len", "1"]
                if subprocess.run(probe, capture_output=True, timeout=100).returncode == 0:
                    break
                if server.poll() is not None or attempt == 199:
                    log.seek(0)
                    raise Failure(f"nibble serve {engine} does not answer:\n{log.read()[-2000:]}")
                time.sleep(0.5)
            cold = load("--sessions", 128, "--concurrency", CLIENTS, "--input-len", 5525, "--output-len", 150)
            table.add(f"serve{suffix}, 64 clients, 5525 / 150, no shared prefix", cold["requests_per_s"], "req/s",
                      1 / limits.request(5525, 5525, 150, kind), 1.9, 2.3, True)
            one = load("--sessions", 12, "--concurrency", 1, "--shared-prefix", 5000, "--warm", "--input-len", 500,
                       "--output-len", 8, "--seed", 9)
            table.add(f"one warm turn alone{suffix}, 5000 cached + 500: TTFT p50", one["ttft_ms"]["p50"], "ms",
                      limits.prefill(500, 5500, kind) * 1e3, 60, 45, note=cached(one))
            # Seeds of their own: equal ids would be found in the cache.
            arrivals(10.5, 220, 10, "shared")
            arrivals(10.5, 220, 11, "own", "--prefixes", CLIENTS)
            arrivals(15, 300, 12, "own", "--prefixes", CLIENTS)
        finally:
            server.terminate()
            server.wait()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bin", type=pathlib.Path, default=pathlib.Path("build/release"))
    parser.add_argument("--engine", type=pathlib.Path, help="needed for model and serve")
    parser.add_argument("--fp8-engine", type=pathlib.Path)
    parser.add_argument("--python", help="one with torch")
    parser.add_argument("--out", type=pathlib.Path, help="JSON file, written anew after every part")
    parser.add_argument("--only", default="kernels,model,serve")
    parser.add_argument("--port", type=int, default=8123)
    flags = parser.parse_args()
    parts = flags.only.split(",")
    if unknown := set(parts) - {"kernels", "model", "serve"}:
        parser.error(f"--only: no part is called {', '.join(sorted(unknown))}")
    if flags.engine is None and {"model", "serve"} & set(parts):
        parser.error("model and serve need --engine")
    folder = flags.bin.resolve()  # or "." would be looked for in PATH
    nibble, bench = folder / "nibble", folder / "nibble_cuda_bench"
    table = Table()
    try:
        limits = Limits(table, bench)
    except Failure as error:
        sys.exit(f"no limits: {error}")
    work = {"kernels": lambda: kernels(table, limits, bench, flags.python),
            "model": lambda: model(table, limits, nibble, flags.engine, flags.fp8_engine),
            "serve": lambda: serve(table, limits, nibble, flags.engine, flags.port)}
    if flags.fp8_engine:
        work["serve, fp8"] = lambda: serve(table, limits, nibble, flags.fp8_engine, flags.port, "e4m3", ", fp8")
    failed = False
    for name, make in work.items():
        if name.split(",")[0] not in parts:
            continue
        try:
            make()
        except (Failure, KeyError, ValueError) as error:
            failed = True
            table.note(f"{name} broke off: {error if isinstance(error, Failure) else repr(error)}")
        if flags.out:
            flags.out.write_text(json.dumps({"card": limits.card, "rows": table.rows, "notes": table.notes}, indent=2) +
                                 "\n")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
