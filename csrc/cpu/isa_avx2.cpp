#include "isa.h"
#if NVIT_HAS_ISA_COPIES
#pragma GCC target("avx2,bmi,bmi2,fma,f16c")
#define NVIT_ISA avx2
#define NVIT_REGISTER 32
#include "kernels.h"
#endif
