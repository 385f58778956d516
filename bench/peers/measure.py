#!/usr/bin/env python3
# The int4 linears of a 24B layer (groups of 128) by the peers that bench/peers/build made, on this card:
#   bench/peers/measure.py OUT [TurboMind,Marlin,CUTLASS]
# TurboMind and Marlin: CUDA graphs, weights in turn (more than L2 holds), medians, f16 activations; TurboMind's results
# are checked against its own weights, Marlin gets random bits, whose order does not matter for the time. CUTLASS's
# example times itself, one copy of the weights (gate_up's and down's are larger than L2), the best of its tiles.
# Needs torch that sees the GPU. SPDX-License-Identifier: Apache-2.0
import ctypes
import os
import pathlib
import re
import subprocess
import sys

import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "cuda"))
from torch_timing import time_graph  # noqa: E402

SHAPES = {"qkv": (6144, 5120), "o": (5120, 4096), "gate_up": (65536, 5120), "down": (5120, 32768)}
TOKENS = (1, 8, 16, 32, 64, 128, 256)
L2_BYTES = 200e6  # and more than that: no L2 is so large


def copies(n, k):
    return int(L2_BYTES / (n * k / 2)) + 2


def turbomind(folder):
    ctypes.CDLL(str(folder / "libcudart.so.12"), mode=ctypes.RTLD_GLOBAL)
    sys.path.insert(0, str(folder))
    from turbomind.linear import Linear
    from turbomind.utils import unpack_awq_gemm

    def make(n, k):
        linear = Linear(k, n, quant_method="awq")
        linear.qweight = torch.randint(-(2**31), 2**31 - 1, (k, n // 8), dtype=torch.int32, device="cuda")
        linear.qzeros = torch.full((k // 128, n // 8), -2004318072, dtype=torch.int32, device="cuda")  # eights
        linear.scales = (torch.rand(k // 128, n, device="cuda") + 0.5).half() * (0.2 / k**0.5)
        weight = None
        if n * k < 1e8:
            weight = (unpack_awq_gemm(linear.qweight).float() - 8) * linear.scales.float().repeat_interleave(128, 0)
        linear.post_init()
        return linear, weight

    def measure(n, k):
        made = [make(n, k) for _ in range(copies(n, k))]
        for tokens in TOKENS:
            x = torch.randn(tokens, k, device="cuda", dtype=torch.float16)
            out = torch.empty(tokens, n, device="cuda", dtype=torch.float16)

            def body():
                stream = torch.cuda.current_stream().cuda_stream
                for linear, _ in made:
                    linear.linear.forward(x, out, stream)

            us = time_graph(body, len(made))
            if made[-1][1] is not None:
                want = x.float() @ made[-1][1]
                error = ((out.float() - want).norm() / want.norm()).item()
                if not error < 2e-3:
                    sys.exit(f"TurboMind's result is off by {error}")
            yield tokens, us

    return measure


def marlin(library):
    # int marlin_cuda(A, B, C, s, m, n, k, workspace, groupsize, dev, stream, thread_k, thread_n, sms, max_par)
    symbols = subprocess.run(["nm", "-D", library], capture_output=True, text=True, check=True).stdout
    function = getattr(ctypes.CDLL(str(library)), re.search(r"T (\S*marlin_cuda\S*)", symbols).group(1))
    pointers, ints = [ctypes.c_void_p], [ctypes.c_int]
    function.argtypes = pointers * 4 + ints * 3 + pointers + ints * 2 + pointers + ints * 4

    def measure(n, k):
        weights = [torch.randint(-(2**31), 2**31 - 1, (k // 16, n * 2), dtype=torch.int32, device="cuda")
                   for _ in range(copies(n, k))]
        scales = (torch.rand(k // 128, n, device="cuda") + 0.5).half() * (0.2 / k**0.5)
        workspace = torch.zeros(n // 128 * 16, dtype=torch.int32, device="cuda")
        for tokens in TOKENS:
            x = torch.randn(tokens, k, device="cuda", dtype=torch.float16)
            out = torch.empty(tokens, n, device="cuda", dtype=torch.float16)

            def body():
                stream = torch.cuda.current_stream().cuda_stream
                for weight in weights:
                    status = function(x.data_ptr(), weight.data_ptr(), out.data_ptr(), scales.data_ptr(), tokens, n, k,
                                      workspace.data_ptr(), 128, 0, stream, -1, -1, -1, 16)
                    if status != 0:
                        sys.exit(f"Marlin refuses {tokens} x {n} x {k}: {status}")

            yield tokens, time_graph(body, len(weights))

    return measure


def cutlass(folder, kind, n, k):
    for tokens, tiles in ((64, (64,)), (128, (64, 128)), (256, (128, 256)), (5525, (128, 256))):
        best = None
        for program in (folder / f"cutlass-{kind}-{tile}" for tile in tiles):
            out = subprocess.run([program, f"--m={tokens}", f"--n={n}", f"--k={k}", "--g=128", "--mode=1", "--shuffle=true",
                                  "--iterations=30", "--warmup=10"], capture_output=True, text=True, timeout=120).stdout
            ms = re.search(r"Avg runtime: ([\d.]+) ms", out)
            if ms and "Failed" not in out:
                best = min(filter(None, (best, (float(ms.group(1)) * 1e3, program.name))))
        yield tokens, best


def main():
    names = {"TurboMind", "Marlin", "CUTLASS"}
    wanted = set(sys.argv[2].split(",")) if len(sys.argv) > 2 else names
    if len(sys.argv) < 2 or not wanted <= names:
        sys.exit(f"measure.py OUT [{','.join(sorted(names))}]: OUT is what bench/peers/build made, got {sys.argv[1:]}")
    folder = pathlib.Path(sys.argv[1]).resolve()
    torch.manual_seed(0)
    print(torch.cuda.get_device_name())
    peers = {"TurboMind": turbomind(folder / "turbomind-wheel"), "Marlin": marlin(folder / "libmarlin.so")}
    for peer, measure in peers.items():
        if peer not in wanted:
            continue
        layers = dict.fromkeys(TOKENS, 0.0)
        for matrix, (n, k) in SHAPES.items():
            for tokens, us in measure(n, k):
                layers[tokens] += us
                print(f"{peer} {matrix}, M = {tokens}: {us:.1f} us", flush=True)
        for tokens, us in layers.items():
            print(f"{peer} layer, M = {tokens}: {us:.1f} us", flush=True)
    for kind in ("bf16", "fp8") if "CUTLASS" in wanted else ():
        for matrix in ("gate_up", "down"):
            for tokens, best in cutlass(folder, kind, *SHAPES[matrix]):
                print(f"CUTLASS {kind} {matrix}, M = {tokens}: "
                      + (f"{best[0]:.1f} us ({best[1]})" if best else "not measured"), flush=True)
    sys.stdout.flush()
    os._exit(0)  # TurboMind's destructors want a driver that is gone by then


main()
