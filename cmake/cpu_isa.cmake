# Flags of the cpu backend's instruction-set files (src/backends/cpu/isa_*.cpp). Never use these flags anywhere else:
# the program chooses a kernel table at run time and must start on any x86-64. -ffp-contract=off: every fused
# multiply-add is written out, so that a loop's body and its tail round alike.
# -fno-tree-reassoc: GCC 12 rebalances chains of integer adds into trees and then spills every partial product (int4
# AVX2 kernel: 70 -> 110 GMAC/s on Zen 3 without it).
set(NIBBLE_ISA_FLAGS -O3 -ffp-contract=off -fno-math-errno -fno-trapping-math -fno-tree-reassoc)
set(NIBBLE_ISA_generic)
if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
  set(NIBBLE_ISA_avx2 -mavx2 -mfma -mf16c)
  set(NIBBLE_ISA_avxvnni -mavx2 -mfma -mf16c -mavxvnni)
  set(NIBBLE_ISA_avx512 -mavx2 -mfma -mf16c -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512vnni
      -mprefer-vector-width=512 -Wno-uninitialized -Wno-maybe-uninitialized)  # GCC 12: _mm512_undefined_ps
endif()
foreach(isa generic avx2 avxvnni avx512)
  set_source_files_properties(${PROJECT_SOURCE_DIR}/src/backends/cpu/isa_${isa}.cpp PROPERTIES
    COMPILE_OPTIONS "${NIBBLE_ISA_FLAGS};${NIBBLE_ISA_${isa}}")
endforeach()
