#define PLAIT_ISA neon
#define PLAIT_ISA_NAME "neon"
#include "kernels.inl"
