// SPDX-License-Identifier: Apache-2.0
#include "backends/cuda/runtime.h"

#include <cuda_runtime.h>

#include <cstring>

namespace nibble::cuda {

static_assert(kErrorMemory == cudaErrorMemoryAllocation);

namespace {
cudaStream_t as_stream(void* stream) { return static_cast<cudaStream_t>(stream); }
}  // namespace

const char* error_text(int status) { return cudaGetErrorString(static_cast<cudaError_t>(status)); }

int open_device(Device* device, int* count) {
  *count = 0;
  cudaError_t status = cudaGetDeviceCount(count);
  if (status != cudaSuccess || *count == 0) return status;
  cudaDeviceProp properties;
  if ((status = cudaSetDevice(0)) != cudaSuccess) return status;
  if ((status = cudaGetDeviceProperties(&properties, 0)) != cudaSuccess) return status;
  static_assert(sizeof device->name == sizeof properties.name);
  std::memcpy(device->name, properties.name, sizeof properties.name);
  device->major = properties.major;
  device->minor = properties.minor;
  device->num_sms = properties.multiProcessorCount;
  device->total_bytes = properties.totalGlobalMem;
  return cudaFree(nullptr);  // the context is made now, not in the first op
}

void runtime_versions(int* driver, int* runtime) {
  if (cudaDriverGetVersion(driver) != cudaSuccess) *driver = 0;
  if (cudaRuntimeGetVersion(runtime) != cudaSuccess) *runtime = 0;
}

int runtime_major() { return CUDART_VERSION / 1000; }

int stream_create(void** stream) {
  cudaStream_t created = nullptr;
  const cudaError_t status = cudaStreamCreateWithFlags(&created, cudaStreamNonBlocking);
  *stream = created;
  return status;
}
void stream_destroy(void* stream) { cudaStreamDestroy(as_stream(stream)); }
int stream_sync(void* stream) { return cudaStreamSynchronize(as_stream(stream)); }

void* pinned_alloc(size_t bytes) {
  void* data = nullptr;
  if (cudaHostAlloc(&data, bytes, cudaHostAllocDefault) == cudaSuccess) return data;
  cudaGetLastError();
  return nullptr;
}
void pinned_free(void* data) { cudaFreeHost(data); }
int pin(void* data, size_t bytes) { return cudaHostRegister(data, bytes, cudaHostRegisterDefault); }
void unpin(void* data) { cudaHostUnregister(data); }
int event_create(void** event) {
  cudaEvent_t created = nullptr;
  const cudaError_t status =
      cudaEventCreateWithFlags(&created, cudaEventDisableTiming | cudaEventBlockingSync);
  *event = created;
  return status;
}
void event_destroy(void* event) { cudaEventDestroy(static_cast<cudaEvent_t>(event)); }
int event_record(void* event, void* stream) {
  return cudaEventRecord(static_cast<cudaEvent_t>(event), as_stream(stream));
}
int event_sync(void* event) { return cudaEventSynchronize(static_cast<cudaEvent_t>(event)); }

int capture_begin(void* stream) {
  return cudaStreamBeginCapture(as_stream(stream), cudaStreamCaptureModeThreadLocal);
}
int capture_end(void* stream, void** graph) {
  *graph = nullptr;
  cudaGraph_t recorded = nullptr;
  cudaError_t status = cudaStreamEndCapture(as_stream(stream), &recorded);
  if (status != cudaSuccess) return status;
  cudaGraphExec_t executable = nullptr;
  status = cudaGraphInstantiate(&executable, recorded, 0);
  cudaGraphDestroy(recorded);
  *graph = executable;
  return status;
}
int graph_launch(void* graph, void* stream) {
  return cudaGraphLaunch(static_cast<cudaGraphExec_t>(graph), as_stream(stream));
}
void graph_destroy(void* graph) { cudaGraphExecDestroy(static_cast<cudaGraphExec_t>(graph)); }

int memory_alloc(void** data, size_t bytes) {
  const cudaError_t status = cudaMalloc(data, bytes);
  if (status != cudaSuccess) cudaGetLastError();  // not sticky: the caller reports it
  return status;
}
void memory_free(void* data) { cudaFree(data); }
int memory_free_bytes(uint64_t* bytes) {
  size_t available = 0, total = 0;
  const cudaError_t status = cudaMemGetInfo(&available, &total);
  *bytes = available;
  return status;
}
int memory_fill(void* data, int byte, size_t bytes, void* stream) {
  return cudaMemsetAsync(data, byte, bytes, as_stream(stream));
}
int copy_to_device(void* device, const void* host, size_t bytes, void* stream) {
  return cudaMemcpyAsync(device, host, bytes, cudaMemcpyHostToDevice, as_stream(stream));
}
int copy_to_host(void* host, const void* device, size_t bytes, void* stream) {
  return cudaMemcpyAsync(host, device, bytes, cudaMemcpyDeviceToHost, as_stream(stream));
}
int copy_on_device(void* to, const void* from, size_t bytes, void* stream) {
  return cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, as_stream(stream));
}

}  // namespace nibble::cuda
