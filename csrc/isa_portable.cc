#define PLAIT_ISA portable
#define PLAIT_ISA_NAME "portable"
#include "kernels.inl"
