// The instruction set the compiler targets by itself.
#define NVIT_ISA baseline
#include "band.h"
#include "splits.h"
