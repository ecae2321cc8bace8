// Runs CUDA kernels as ordinary functions, for tests of their logic where there is no GPU: a thread of the machine for
// each thread of a block, blocks one after another.  Warps are not in step, and nothing is said about memory or speed.
#pragma once

#include <algorithm>
#include <barrier>
#include <thread>
#include <vector>

#define __global__
#define __device__
#define __shared__ static
#define __launch_bounds__(...)

struct Index {
  unsigned x, y;
};
static thread_local Index threadIdx, blockIdx;
static Index blockDim, gridDim;
static std::barrier<>* block_barrier;

static void __syncthreads() { block_barrier->arrive_and_wait(); }
static void __threadfence_system() {}

// Called by every thread of the block, as block sums do.
template <class T>
T __shfl_xor_sync(unsigned, T value, int lane) {
  static T values[1024];
  values[threadIdx.x] = value;
  __syncthreads();
  const T other = values[threadIdx.x ^ lane];
  __syncthreads();
  return other;
}

using std::min;
using std::sqrt;

template <class F>
void launch(Index grid, unsigned threads, F kernel) {
  std::barrier<> barrier(threads);
  gridDim = grid;
  blockDim = {threads, 1};
  block_barrier = &barrier;
  std::vector<std::thread> block;
  for (unsigned thread = 0; thread < threads; ++thread) {
    block.emplace_back([=, &barrier] {
      threadIdx = {thread, 0};
      for (unsigned y = 0; y < grid.y; ++y) {
        for (unsigned x = 0; x < grid.x; ++x) {
          blockIdx = {x, y};
          kernel();
          barrier.arrive_and_wait();
        }
      }
    });
  }
  for (std::thread& thread : block) thread.join();
}
