// Sixteen floats, sixteen integers or sixty-four bytes at a time, the same on every instruction set.
//
// Included once by each isa_*.cc, inside that unit's namespace, after its flags are known: nothing in here may be
// visible to another unit, or the linker could give one unit the code of another.
//
// Every operation is exact or rounds once to nearest even, and no multiplication is fused with an addition. The only
// fused product is the bfloat16 dot, where fusing changes nothing: the product of two bfloat16 numbers is exact in
// float32. Equal inputs therefore give equal bits on every instruction set.

#ifndef PLAIT_ISA
#error "simd.h is for the isa_*.cc units"
#endif

#if defined(__AVX512F__)
#include "simd_avx512.inl"
#elif defined(__AVX2__)
#include "simd_avx2.inl"
#elif defined(__ARM_NEON)
#include "simd_neon.inl"
#else
#include "simd_portable.inl"
#endif
