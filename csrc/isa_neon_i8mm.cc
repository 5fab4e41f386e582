#define PLAIT_ISA neon_i8mm
#define PLAIT_ISA_NAME "neon_i8mm"
#include "kernels.inl"
