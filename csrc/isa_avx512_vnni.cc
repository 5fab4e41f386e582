#define PLAIT_ISA avx512_vnni
#define PLAIT_ISA_NAME "avx512_vnni"
#include "kernels.inl"
