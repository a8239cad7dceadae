#include "isa.h"
#if NVIT_HAS_ISA_COPIES
#pragma GCC target("avx2,bmi,bmi2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512cd,prefer-vector-width=512")
#define NVIT_ISA avx512
#define NVIT_REGISTER 64
#include "kernels.h"
#endif
