#!/usr/bin/env python3
"""Where the device's time went, from what bench/cuda/kernel_trace.cpp wrote.

    python3 bench/kernel_timeline.py trace.tsv [--pause-us 300] [--last 1]
    python3 bench/kernel_timeline.py trace.tsv --window-ms 1500 1200

The trace is cut at pauses; of the last parts of some length each kernel's calls, mean duration, and what it adds: the
time behind the end of the kernel before it (with dependent launches a kernel begins, and waits, while that one runs).
Steps that overlap have no pauses: --window-ms reports what ran between two times before the trace's end.
"""
# SPDX-License-Identifier: Apache-2.0
import argparse
import collections
import re


def read(path):
    rows = []
    with open(path) as file:
        for line in file:
            start, end, name, *grid = line.rstrip("\n").split("\t")
            rows.append((int(start), int(end), name, tuple(map(int, grid))))
    return sorted(rows)


def parts(rows, pause_ns):
    found, end = [], None
    for row in rows:
        if end is None or row[0] - end > pause_ns:
            found.append([])
        found[-1].append(row)
        end = max(end or 0, row[1])
    return found


def short(name):
    """Of a mangled kernel in the anonymous namespace of a source file: file and kernel."""
    found = re.search(r"_GLOBAL__N__\w{8}_\d+_(\w+?)_cu_\w{8}(\w+)", name)
    return f"{found.group(1)}: {found.group(2).lstrip('0123456789')[:40]}" if found else name[:60]


def report(rows):
    begin, end = rows[0][0], max(row[1] for row in rows)
    print(f"{(end - begin) * 1e-6:.3f} ms, {len(rows)} kernels and copies")
    table = collections.defaultdict(lambda: [0, 0, 0, 0])
    last = begin
    for start, stop, name, grid in sorted(rows, key=lambda row: row[1]):
        entry = table[short(name), grid]
        entry[0] += 1
        entry[1] += stop - start
        entry[2] += max(0, stop - max(last, start))
        entry[3] += max(0, start - last)
        last = max(last, stop)
    print(f"{'calls':>6} {'mean us':>9} {'adds us':>9} {'gap us':>7} {'adds ms in all':>15}  kernel, grid")
    for (name, grid), (calls, duration, adds, gap) in sorted(table.items(), key=lambda item: -item[1][2]):
        print(f"{calls:6} {duration / calls * 1e-3:9.2f} {adds / calls * 1e-3:9.2f} {gap / calls * 1e-3:7.2f} "
              f"{adds * 1e-6:15.3f}  {name} {grid}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace")
    parser.add_argument("--pause-us", type=float, default=300)
    parser.add_argument("--last", type=int, default=1, help="parts to report, of 50 kernels and more")
    parser.add_argument("--window-ms", type=float, nargs=2, metavar=("FROM", "TO"),
                        help="what began and ended between these times before the end, instead of parts")
    flags = parser.parse_args()
    if flags.window_ms:
        rows = read(flags.trace)
        end = max((row[1] for row in rows), default=0)
        first, last = (end - ms * 1e6 for ms in flags.window_ms)
        inside = [row for row in rows if first <= row[0] and row[1] <= last]
        if not inside:
            raise SystemExit(f"{flags.trace}: nothing between {flags.window_ms[0]} and {flags.window_ms[1]} ms before "
                             f"its end (of {len(rows)} kernels and copies); want FROM larger than TO")
        report(inside)
        return
    long = [part for part in parts(read(flags.trace), flags.pause_us * 1e3) if len(part) >= 50]
    if not long:
        raise SystemExit(f"{flags.trace}: no 50 kernels without a pause of {flags.pause_us} us")
    for part in long[-flags.last:]:
        report(part)


if __name__ == "__main__":
    main()
