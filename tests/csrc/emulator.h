// Runs the kernels of csrc/ on a CPU: every CUDA thread is a fiber, one block at a time, and whatever threads do together
// (barriers, shuffles, matrix products) waits until all of them have arrived. Slow, single-threaded, exact in indices.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <vector>

#define __device__
#define __host__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define SDA_SHARED static
#define SDA_LAUNCH(kernel, grid, threads, stream, ...) \
  sda::emulation::run((grid), (threads), [&] { (kernel)(__VA_ARGS__); })

struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct dim3 {
  unsigned x, y;
  dim3(unsigned x = 0, unsigned y = 1) : x(x), y(y) {}
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;
using std::min;

using cudaStream_t = void*;
using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0;
inline cudaError_t cudaGetLastError() { return cudaSuccess; }

namespace sda {

inline int multiprocessors = 2;
inline int multiprocessor_count() { return multiprocessors; }

namespace emulation {

constexpr size_t kStackBytes = 128 * 1024;

struct Barrier {
  unsigned arrived = 0, generation = 0;
};

struct Copy {
  void* shared;
  const void* global;
};

struct Fiber {
  ucontext_t context;
  bool finished = false;
  std::vector<Copy> started;                 // since the last commit
  std::deque<std::vector<Copy>> under_way;  // by commit
};

inline std::vector<Fiber> fibers;
inline std::vector<char> stacks;
inline ucontext_t scheduler;
inline unsigned current, alive;
inline uint32_t shuffle = 1;
inline Barrier block_barrier;
inline std::vector<Barrier> warp_barriers;
inline uint32_t exchanged[32][32][8];  // [warp][lane][register]
inline const std::function<void()>* body;

inline void wait(Barrier& barrier, unsigned parties) {
  const unsigned generation = barrier.generation;
  if (++barrier.arrived == parties) {
    barrier.arrived = 0;
    ++barrier.generation;
    return;
  }
  const unsigned self = current;
  while (barrier.generation == generation) {
    swapcontext(&fibers[self].context, &scheduler);
  }
}

inline void wait_warp() { wait(warp_barriers[threadIdx.x / 32], 32); }

inline void fiber_main() {
  (*body)();
  if (!fibers[current].started.empty() || !fibers[current].under_way.empty()) {
    std::fprintf(stderr, "a thread ends before its copies do\n");
    std::abort();
  }
  fibers[current].finished = true;
  --alive;
}

inline void run_block() {
  const unsigned threads = blockDim.x;
  for (unsigned i = 0; i < threads; ++i) {
    Fiber& fiber = fibers[i];
    fiber.finished = false;
    fiber.started.clear();
    fiber.under_way.clear();
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = stacks.data() + i * kStackBytes;
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = &scheduler;
    makecontext(&fiber.context, fiber_main, 0);
  }
  block_barrier = {};
  warp_barriers.assign(threads / 32, {});
  alive = threads;
  if (threads & (threads - 1)) {
    std::fprintf(stderr, "blocks have a power of two of threads here, not %u\n", threads);
    std::abort();
  }
  unsigned idle_rounds = 0, rounds_to_stall = 0;
  uint32_t stalled = 0;  // one bit a warp
  while (alive > 0) {
    const unsigned before = alive;
    const unsigned generation = block_barrier.generation;
    unsigned warp_generations = 0;
    for (const Barrier& barrier : warp_barriers) warp_generations += barrier.generation;
    // So that a missing barrier shows, threads take turns in another order every round, and some warps stand still for as
    // long as the others have something to do.
    shuffle = shuffle * 1664525u + 1013904223u;
    if (rounds_to_stall == 0 || idle_rounds > 0) stalled = shuffle >> 13, rounds_to_stall = 256;
    --rounds_to_stall;
    for (unsigned turn = 0; turn < threads; ++turn) {
      const unsigned i = (turn * (shuffle >> 8 | 1u) + (shuffle >> 16)) % threads;
      if (fibers[i].finished || (stalled >> (i / 32) & 1)) continue;
      current = i;
      threadIdx.x = i;
      swapcontext(&scheduler, &fibers[i].context);
    }
    unsigned after = 0;
    for (const Barrier& barrier : warp_barriers) after += barrier.generation;
    idle_rounds = alive == before && generation == block_barrier.generation && after == warp_generations ? idle_rounds + 1 : 0;
    if (idle_rounds > 100) {
      std::fprintf(stderr, "deadlock: a barrier not reached by all its threads\n");
      std::abort();
    }
  }
}

inline void run(dim3 grid, unsigned threads, const std::function<void()>& kernel) {
  body = &kernel;
  gridDim = grid;
  blockDim.x = threads;
  if (fibers.size() < threads) {
    fibers.resize(threads);
    stacks.resize(threads * kStackBytes);
  }
  for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y) {
    for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x) run_block();
  }
}

}  // namespace emulation

inline void sync_warp() { emulation::wait_warp(); }

inline uint32_t float_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

inline float bits_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline uint32_t byte_permute(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t bytes = (uint64_t(b) << 32) | a;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t choice = (selector >> (4 * i)) & 0xF;
    uint32_t byte = (bytes >> (8 * (choice & 7))) & 0xFF;
    if (choice & 8) byte = byte & 0x80 ? 0xFF : 0;  // the instruction's sign mode, which no kernel may run into
    result |= byte << (8 * i);
  }
  return result;
}

inline void require_aligned(const void* address, size_t bytes, const char* access) {
  if (reinterpret_cast<uintptr_t>(address) % bytes != 0) {
    std::fprintf(stderr, "misaligned %s of %zu bytes\n", access, bytes);
    std::abort();
  }
}

template <typename V>
V load_cached(const V* address) {
  require_aligned(address, sizeof(V), "load");
  return *address;
}

inline void store_wide(void* address, uint4 value) {
  require_aligned(address, 16, "store");
  *static_cast<uint4*>(address) = value;
}

// A copy is made as late as it may be, so that a missing wait shows.
inline void copy_async(void* shared, const void* global) {
  require_aligned(shared, 16, "copy");
  require_aligned(global, 16, "copy");
  emulation::fibers[emulation::current].started.push_back({shared, global});
}
inline void commit_copies() {
  emulation::Fiber& fiber = emulation::fibers[emulation::current];
  fiber.under_way.push_back(std::move(fiber.started));
  fiber.started.clear();
}
template <int N>
void wait_for_copies() {
  auto& under_way = emulation::fibers[emulation::current].under_way;
  for (; under_way.size() > N; under_way.pop_front()) {
    for (const emulation::Copy& copy : under_way.front()) std::memcpy(copy.shared, copy.global, 16);
  }
}

template <typename V>
V load_streaming(const V* address) {
  return load_cached(address);
}

inline float multiply_rounded(float a, float b) { return a * b; }
inline float add_rounded(float a, float b) { return a + b; }
inline float multiply_add(float a, float b, float c) { return std::fma(a, b, c); }

inline float shuffle_from(float value, int source) {
  const unsigned warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  emulation::exchanged[warp][lane][0] = float_bits(value);
  sync_warp();
  const float other = bits_float(emulation::exchanged[warp][source][0]);
  sync_warp();
  return other;
}

class LaneTable {
 public:
  explicit LaneTable(float value) {
    for (int i = 0; i < 16; ++i) values_[i] = shuffle_from(value, threadIdx.x % 32 / 16 * 16 + i);
  }
  float at(uint32_t index) const { return values_[index & 15]; }

 private:
  float values_[16];
};

inline float shuffle_xor(float value, int lanes) { return shuffle_from(value, (threadIdx.x % 32) ^ lanes); }

struct BFloat16 {
  using Storage = uint16_t;
  static constexpr bool kExactInTf32 = true;
  static uint16_t round(float value) {
    const uint32_t bits = float_bits(value);
    if (std::isnan(value)) return 0x7FFF;
    return uint16_t((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
  }
  static uint32_t pack(float low, float high) { return round(low) | (uint32_t(round(high)) << 16); }
  static float widen(uint16_t bits) { return bits_float(uint32_t(bits) << 16); }
};

struct Float16 {
  using Storage = uint16_t;
  static constexpr bool kExactInTf32 = true;
  static uint16_t round(float value) {
    const _Float16 half = static_cast<_Float16>(value);
    uint16_t bits;
    std::memcpy(&bits, &half, 2);
    return bits;
  }
  static uint32_t pack(float low, float high) { return round(low) | (uint32_t(round(high)) << 16); }
  static float widen(uint16_t bits) {
    _Float16 half;
    std::memcpy(&half, &bits, 2);
    return float(half);
  }
};

struct Float32 {
  using Storage = float;
  static constexpr bool kExactInTf32 = false;
  static float round(float value) { return value; }
  static float widen(float value) { return value; }
};

namespace emulation {

inline void post_fragments(const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  uint32_t(&slot)[8] = exchanged[threadIdx.x / 32][threadIdx.x % 32];
  for (int i = 0; i < 4; ++i) slot[i] = a[i];
  slot[4] = b0;
  slot[5] = b1;
  wait_warp();
}

}  // namespace emulation

// Fragment layouts: PTX manual, "Matrix fragments for mma.m16n8k16 with floating point type".
template <typename T>
void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulation::post_fragments(a, b0, b1);
  const auto& lanes = emulation::exchanged[threadIdx.x / 32];
  const int group = threadIdx.x % 32 / 4, member = threadIdx.x % 4;
  for (int i = 0; i < 4; ++i) {
    const int row = group + (i >> 1) * 8, column = member * 2 + (i & 1);
    double sum = d[i];
    for (int k = 0; k < 16; ++k) {
      const uint32_t pair_a = lanes[(row % 8) * 4 + (k % 8) / 2][(row / 8) + (k / 8) * 2];
      const uint32_t pair_b = lanes[column * 4 + (k % 8) / 2][4 + k / 8];
      sum += double(T::widen(uint16_t(pair_a >> (16 * (k & 1))))) * double(T::widen(uint16_t(pair_b >> (16 * (k & 1)))));
    }
    d[i] = float(sum);
  }
  sync_warp();
}

// Fragment layouts: PTX manual, "Matrix fragments for mma.m16n8k8", 16-bit types.
template <typename T>
void mma_16x8x8(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t b0) {
  emulation::post_fragments({a0, a1, 0, 0}, b0, 0);
  const auto& lanes = emulation::exchanged[threadIdx.x / 32];
  const int group = threadIdx.x % 32 / 4, member = threadIdx.x % 4;
  for (int i = 0; i < 4; ++i) {
    const int row = group + (i >> 1) * 8, column = member * 2 + (i & 1);
    double sum = d[i];
    for (int k = 0; k < 8; ++k) {
      const uint32_t pair_a = lanes[(row % 8) * 4 + k / 2][row / 8], pair_b = lanes[column * 4 + k / 2][4];
      sum += double(T::widen(uint16_t(pair_a >> (16 * (k & 1))))) * double(T::widen(uint16_t(pair_b >> (16 * (k & 1)))));
    }
    d[i] = float(sum);
  }
  sync_warp();
}

inline uint32_t transpose_8x8(uint32_t pair) {
  auto& lanes = emulation::exchanged[threadIdx.x / 32];
  const int group = threadIdx.x % 32 / 4, member = threadIdx.x % 4;
  lanes[threadIdx.x % 32][0] = pair;
  sync_warp();
  uint32_t transposed = 0;
  for (int i = 0; i < 2; ++i) {
    const uint32_t source = lanes[(member * 2 + i) * 4 + group / 2][0];
    transposed |= (source >> (16 * (group & 1)) & 0xFFFF) << (16 * i);
  }
  sync_warp();
  return transposed;
}

// Fragment layouts: PTX manual, "Matrix fragments for mma.m16n8k8", tf32.
inline void mma_tf32_16x8x8(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulation::post_fragments(a, b0, b1);
  const auto& lanes = emulation::exchanged[threadIdx.x / 32];
  const int group = threadIdx.x % 32 / 4, member = threadIdx.x % 4;
  for (int i = 0; i < 4; ++i) {
    const int row = group + (i >> 1) * 8, column = member * 2 + (i & 1);
    double sum = d[i];
    for (int k = 0; k < 8; ++k) {
      const uint32_t left = lanes[(row % 8) * 4 + k % 4][(row / 8) + (k / 4) * 2] & 0xFFFFE000u;
      const uint32_t right = lanes[column * 4 + k % 4][4 + k / 4] & 0xFFFFE000u;
      sum += double(bits_float(left)) * double(bits_float(right));
    }
    d[i] = float(sum);
  }
  sync_warp();
}

inline void synchronise_block() { emulation::wait(emulation::block_barrier, blockDim.x); }

}  // namespace sda

#define __syncthreads() sda::synchronise_block()
