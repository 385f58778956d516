#include "backends/cpu/cpu_backend.h"
#include "formats/weight_source.h"
#include "pack/pack.h"
namespace nibble {
std::unique_ptr<Backend> make_cpu_backend(std::string_view, ActivationPrecision, int) { return nullptr; }
std::string resolve_cpu_isa(std::string_view s) { return std::string(s); }
PackedLinear pack_int4(const Int4Matrix&, WeightLayout) { return {}; }
size_t packed_int4_bytes(int, int, int, WeightLayout) { return 0; }
bool packs_scales_inline(WeightLayout) { return true; }
}
