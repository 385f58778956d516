# torch's bf16 on this card: the limit (8192^3) and the peer (the four linears of a 24B layer, CUDA
# graphs, three layers' weights in turn, medians; prefill attention by cuDNN, where torch has it).
# bench/hopper_table.py runs it; by itself: run it beside nibble_cuda_bench.
# SPDX-License-Identifier: Apache-2.0
import torch

from torch_timing import time_graph


def random(*shape, scale=1.0):
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16) * scale


torch.manual_seed(0)
a, b = random(8192, 8192), random(8192, 8192)
us = time_graph(lambda: [a @ b for _ in range(4)], 4)
print(f"torch bf16 8192^3: {2 * 8192**3 / us * 1e-6:.0f} TFLOPS")
del a, b

SHAPES = [(6144, 5120), (5120, 4096), (65536, 5120), (5120, 32768)]
layers = [[random(n, k, scale=0.02) for n, k in SHAPES] for _ in range(3)]
for tokens in (1, 4, 8, 16, 32, 64, 128, 256, 5525):
    inputs = [random(tokens, k) for _, k in SHAPES]
    outputs = [torch.empty(tokens, n, device="cuda", dtype=torch.bfloat16) for n, _ in SHAPES]

    def run():
        for layer in layers:
            for x, w, y in zip(inputs, layer, outputs):
                torch.mm(x, w.t(), out=y)

    us = time_graph(run, len(layers))
    flops = 2 * tokens * sum(n * k for n, k in SHAPES)
    print(f"torch bf16 layer, M = {tokens}: {us:.1f} us, {flops / us * 1e-6:.0f} TFLOPS")
    del inputs, outputs
del layers

# One layer of a prompt: 32 heads of 128, keys and values given to every head of theirs beforehand.
try:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    tokens = 5525
    q, k, v = (random(1, 32, tokens, 128) for _ in range(3))

    def attend():
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            for _ in range(4):
                torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    us = time_graph(attend, 4)
    flops = 4 * 128 * 32 * tokens * (tokens + 1) / 2
    print(f"torch cuDNN attention, {tokens} causal: {us:.1f} us, {flops / us * 1e-6:.0f} TFLOPS")
except (ImportError, AttributeError, RuntimeError) as error:
    print(f"torch cuDNN attention was not measured: {type(error).__name__}: {str(error).splitlines()[:1]}")
