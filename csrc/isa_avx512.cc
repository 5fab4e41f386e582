#define PLAIT_ISA avx512
#define PLAIT_ISA_NAME "avx512"
#include "kernels.inl"
