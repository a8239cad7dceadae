// All kernels of one instruction set.
#pragma once

#include "band.h"
#include "isa.h"
#include "merge.h"
#include "splits.h"

namespace nvit {
namespace NVIT_ISA {

Kernels kernels() { return {run_band, split_scores, merge_image}; }

}  // namespace NVIT_ISA
}  // namespace nvit
