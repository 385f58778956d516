// The CUDA runtime as the backend uses it, free of CUDA types: streams and devices are void* and
// int. Every function returns 0 or a cudaError_t value; error_text() says what one means.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>

namespace nibble::cuda {

inline constexpr int kErrorMemory = 2;  // cudaErrorMemoryAllocation

const char* error_text(int status);

struct Device {
  char name[256];
  int major, minor;  // compute capability
  int num_sms;
  uint64_t total_bytes;
};
/// Makes device 0 current. `count` is how many there are.
int open_device(Device* device, int* count);
/// Versions as 1000 * major + 10 * minor; driver 0: none installed.
void runtime_versions(int* driver, int* runtime);
/// The CUDA version this plugin was built with (13). Needs neither driver nor GPU.
int runtime_major();

int stream_create(void** stream);
void stream_destroy(void* stream);
int stream_sync(void* stream);

void* pinned_alloc(size_t bytes);  // host memory the device copies from at full speed; null: none
void pinned_free(void* data);
int pin(void* data, size_t bytes);  // makes mapped memory such memory
void unpin(void* data);
int event_create(void** event);
void event_destroy(void* event);
int event_record(void* event, void* stream);
int event_sync(void* event);  // sleeps

// Records what the stream is given between the two instead of running it.
int capture_begin(void* stream);
int capture_end(void* stream, void** graph);
int graph_launch(void* graph, void* stream);
void graph_destroy(void* graph);

int memory_alloc(void** data, size_t bytes);
void memory_free(void* data);
int memory_free_bytes(uint64_t* bytes);
int memory_fill(void* data, int byte, size_t bytes, void* stream);
int copy_to_device(void* device, const void* host, size_t bytes, void* stream);
int copy_to_host(void* host, const void* device, size_t bytes, void* stream);
int copy_on_device(void* to, const void* from, size_t bytes, void* stream);

}  // namespace nibble::cuda
