// One instruction set's whole table. An isa_*.cc unit defines PLAIT_ISA (its namespace) and PLAIT_ISA_NAME, and includes
// this and nothing else of ours.

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "table.h"

// Internal linkage and forced inlining: no code of this unit can stand in for another unit's.
#define INLINE static inline __attribute__((always_inline))

namespace plait {
namespace PLAIT_ISA {
namespace {

#include "simd.h"
#include "vmath.inl"
#include "linear.inl"
#include "attention.inl"
#include "attention_2d.inl"
#include "elementwise.inl"
#include "measure.inl"

}  // namespace

extern const KernelTable table;
const KernelTable table = {
    PLAIT_ISA_NAME,
    pack_panel,
    unpack_panel,
    unpack_column,
    quantize_row,
    linear_panel,
    linear_scratch_bytes,
    append_kv,
    attend,
    attention_scratch_bytes,
    attention_rows,
    split_scores,
    split_products,
    split_merge,
    attend_partly,
    merge_parts,
    finish_part,
    attend_2d,
    norm_row,
    rotate,
    scale_row,
    add_row,
    softcap_row,
    route_row,
    small_linear,
    fold_top,
    row_max,
    read_stream,
    repeat_dot,
};

}  // namespace PLAIT_ISA
}  // namespace plait
