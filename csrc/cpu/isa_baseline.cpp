// The instruction set the compiler targets by itself.
#define NVIT_ISA baseline
#define NVIT_REGISTER 16
#include "kernels.h"
