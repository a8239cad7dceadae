// How a GPU's launches are made up of a plan's jobs. Host code without CUDA, so that the CPU's library can run it with
// the launches left out: what is left is what a call costs the host.
#pragma once

#include "codec/tile.h"
#include "prepare.h"

namespace nvit {

constexpr int kJobsPerLaunch = 56;

struct JobTable {
  Job job[kJobsPerLaunch];
  int count;
  uint32_t* faults;  // one word a job
};
static_assert(sizeof(JobTable) <= 4096, "what kernel arguments may take on every driver");

// Calls `launch(format, mask, table, blocks)` for neighbours of one format and mask form; how often.
template <class Launch>
int64_t for_each_launch(const Plan& plan, uint32_t* faults, Launch launch) {
  const int64_t total = static_cast<int64_t>(plan.jobs.size());
  int64_t launches = 0;
  for (int64_t begin = 0; begin < total; ++launches) {
    JobTable table;
    int blocks = 0;
    table.count = 0;
    table.faults = faults + begin;
    int64_t end = begin;
    for (; end < total && table.count < kJobsPerLaunch && plan.formats[end] == plan.formats[begin] &&
           plan.masks[end] == plan.masks[begin];
         ++end) {
      Job& job = table.job[table.count++];
      job = plan.jobs[end];
      job.first_unit = blocks;
      blocks += tile_count(job);
    }
    launch(plan.formats[begin], plan.masks[begin], table, blocks);
    begin = end;
  }
  return launches;
}

}  // namespace nvit
