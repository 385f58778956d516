# How the peers that torch launches are timed. SPDX-License-Identifier: Apache-2.0
import torch


def time_graph(body, calls, replays=15):
    """Microseconds per call of a captured body."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        body()
        body()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            body()
        for _ in range(3):
            graph.replay()
        times = []
        for _ in range(replays):
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            stop.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(stop))
    return sorted(times)[len(times) // 2] * 1e3 / calls
