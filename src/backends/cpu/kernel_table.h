// The one symbol an isa_*.cpp exports. Included after kernel_body.h and the int4 kernels, outside
// the anonymous namespace; NIBBLE_KERNELS is the symbol, NIBBLE_ISA_NAME its name.
// SPDX-License-Identifier: Apache-2.0

extern const Kernels NIBBLE_KERNELS;
const Kernels NIBBLE_KERNELS = {
    .name = NIBBLE_ISA_NAME,
    .quantize_row = quantize_row,
    .int4_int8 = int4_int8,
    .int4_f32 = int4_f32,
    .dense = dense,
    .widen = widen,
    .multiply = multiply,
    .rms_norm = rms_norm,
    .silu_multiply = silu_multiply,
    .rope = rope,
    .kv_store = kv_store,
    .attend = attend,
    .attend_merge = attend_merge,
    .attend_finish = attend_finish,
    .max = max_of,
    .exp_sum = exp_sum,
    .read = read_all,
};
