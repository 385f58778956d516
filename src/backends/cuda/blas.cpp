// SPDX-License-Identifier: Apache-2.0
#include "backends/cuda/blas.h"

#include <dlfcn.h>

#include <limits>

#include "base/error.h"

namespace nibble::cuda {
namespace {

// Constants of cublas_api.h and library_types.h that are part of cuBLAS' ABI.
constexpr int kOpN = 0, kOpT = 1, kLeft = 0, kRight = 1, kLower = 0, kNonUnit = 0, kUnit = 1;
constexpr int kTypeF32 = 0, kTypeBf16 = 14;
constexpr int kCompute32F = 68, kCompute32FFastTf32 = 77;
constexpr int kGemmDefault = -1;

// Newest first; the bare name is a development package's link.
constexpr const char* kLibraries[] = {"libcublas.so.13", "libcublas.so.12", "libcublas.so"};

int as_int(int64_t value) {
  NIBBLE_CHECK(value >= 0 && value <= std::numeric_limits<int>::max(), "{} is no int", value);
  return static_cast<int>(value);
}

void* open_library() {
  std::string tried;
  for (const char* name : kLibraries) {
    void* library = dlopen(name, RTLD_NOW | RTLD_LOCAL);
    if (library != nullptr) return library;
    const char* reason = dlerror();
    tried += fmt::format("\n  {}", reason != nullptr ? reason : name);
  }
  fail(ErrorKind::kDevice,
       "quantizing on a GPU needs cuBLAS 12 or 13, which comes with the CUDA toolkit (package "
       "libcublas), and it could not be opened; install it or put its directory into "
       "LD_LIBRARY_PATH. Tried:{}",
       tried);
}

template <typename Function>
void load(void* library, const char* name, Function** function) {
  *function = reinterpret_cast<Function*>(dlsym(library, name));
  if (*function == nullptr) fail(ErrorKind::kDevice, "cuBLAS has no function {}", name);
}

}  // namespace

struct Blas::Functions {
  int (*create)(void** handle);
  int (*destroy)(void* handle);
  int (*set_stream)(void* handle, void* stream);
  const char* (*status_string)(int status);
  int (*gemm)(void* handle, int transa, int transb, int m, int n, int k, const void* alpha,
              const void* a, int a_type, int lda, long long a_stride, const void* b, int b_type,
              int ldb, long long b_stride, const void* beta, void* c, int c_type, int ldc,
              long long c_stride, int batch, int compute_type, int algorithm);
  int (*strsm)(void* handle, int side, int uplo, int trans, int diag, int m, int n,
               const float* alpha, const float* a, int lda, float* b, int ldb);

  // Never closed: the library keeps state of its own about the device.
  static const Functions& get() {
    static const Functions functions = [] {
      Functions f{};
      void* library = open_library();
      load(library, "cublasCreate_v2", &f.create);
      load(library, "cublasDestroy_v2", &f.destroy);
      load(library, "cublasSetStream_v2", &f.set_stream);
      load(library, "cublasGetStatusString", &f.status_string);
      load(library, "cublasGemmStridedBatchedEx", &f.gemm);
      load(library, "cublasStrsm_v2", &f.strsm);
      return f;
    }();
    return functions;
  }
};

Blas::Blas(void* stream) : functions_(&Functions::get()) {
  check(functions_->create(&handle_), "opening it");
  check(functions_->set_stream(handle_, stream), "setting the stream");
}

Blas::~Blas() { functions_->destroy(handle_); }

void Blas::check(int status, const std::string& what) const {
  if (status == 0) return;
  constexpr int kAllocFailed = 3;
  fail(status == kAllocFailed ? ErrorKind::kMemory : ErrorKind::kDevice,
       "cuBLAS: {} failed: {} (status {})", what, functions_->status_string(status), status);
}

// cuBLAS is column-major: it sees every matrix transposed, so c^T = b^T a^T is asked for.
void Blas::gemm(const GemmArgs& g) {
  const auto type = [](BlasType t) { return t == BlasType::kBf16 ? kTypeBf16 : kTypeF32; };
  check(functions_->gemm(handle_, g.b_transposed ? kOpT : kOpN, g.a_transposed ? kOpT : kOpN,
                         as_int(g.n), as_int(g.m), as_int(g.k), &g.alpha, g.b, type(g.in),
                         as_int(g.ldb), g.b_stride, g.a, type(g.in), as_int(g.lda), g.a_stride,
                         &g.beta, g.c, type(g.out), as_int(g.ldc), g.c_stride, g.batch,
                         g.tf32 ? kCompute32FFastTf32 : kCompute32F, kGemmDefault),
        fmt::format("a product of {} x {} x {}", g.m, g.n, g.k));
}

// The upper triangle in rows is a lower one in columns, and x R = b is R^T x^T = b^T.
void Blas::solve_right(const SolveRightArgs& s) {
  const float one = 1;
  check(functions_->strsm(handle_, kLeft, kLower, s.transposed ? kOpT : kOpN,
                          s.unit ? kUnit : kNonUnit, as_int(s.size), as_int(s.rows), &one, s.r,
                          as_int(s.ldr), s.b, as_int(s.ldb)),
        fmt::format("a triangular system of {} for {} rows", s.size, s.rows));
}

void Blas::solve_left_transposed(const float* r, int64_t ldr, int64_t size, float* b, int64_t ldb,
                                 int64_t columns) {
  const float one = 1;
  check(functions_->strsm(handle_, kRight, kLower, kOpT, kNonUnit, as_int(columns), as_int(size),
                          &one, r, as_int(ldr), b, as_int(ldb)),
        fmt::format("a triangular system of {} for {} columns", size, columns));
}

}  // namespace nibble::cuda
