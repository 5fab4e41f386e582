#define PLAIT_ISA avx2
#define PLAIT_ISA_NAME "avx2"
#include "kernels.inl"
