// Runs the kernels of csrc/ on a CPU: every CUDA thread is a fiber, one block at a time, and whatever threads do together
// (barriers, shuffles, matrix products) waits until all of them have arrived. Slow, single-threaded, exact in indices.
//
// The kernels are compiled with -fsanitize=thread, and emulated_memory.cpp is what stands behind it: it sees every access.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#define __device__
#define __host__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define SDA_SHARED static
#define SDA_LAUNCH(kernel, grid, threads, stream, ...) \
  sda::emulation::launch(#kernel, (grid), (threads), [=] { (kernel)(__VA_ARGS__); })

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
using std::min;

using cudaStream_t = void*;
using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0;
inline cudaError_t cudaGetLastError() { return cudaSuccess; }

namespace sda {

int multiprocessor_count();

namespace emulation {

struct Indices {
  dim3 thread, block, block_size, grid;
};
extern Indices indices;

void run(const char* kernel, dim3 grid, unsigned threads, void (*body)(const void*), const void* arguments);

template <typename Body>
void launch(const char* kernel, dim3 grid, unsigned threads, const Body& body) {
  run(kernel, grid, threads, [](const void* arguments) { (*static_cast<const Body*>(arguments))(); }, &body);
}

enum class Factors { kBFloat16, kFloat16, kTf32 };

// Stops the launch unless the address is aligned; for an access that is more than one of the host's.
void check_alignment(const void* address, size_t bytes);
// Notes a load through the path for what no thread writes during the launch.
void note_read_only(const void* address, size_t bytes);
// What lane `source` of the warp gives.
uint32_t exchange(uint32_t value, unsigned source);
uint32_t exchange_transposed(uint32_t pair);
// d += a b for one warp, 16 x 8 x k.
void multiply(Factors factors, int k, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
void wait_for_block();
void wait_for_copies(unsigned still_under_way);

}  // namespace emulation

void sync_warp();
void copy_async(void* shared, const void* global);
void commit_copies();
template <int N>
void wait_for_copies() {
  emulation::wait_for_copies(N);
}

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

template <typename V>
V load_streaming(const V* address) {
  emulation::check_alignment(address, sizeof(V));
  return *address;
}

template <typename V>
V load_cached(const V* address) {
  emulation::note_read_only(address, sizeof(V));
  return load_streaming(address);
}

inline void store_wide(void* address, uint4 value) {
  emulation::check_alignment(address, 16);
  *static_cast<uint4*>(address) = value;
}

inline float multiply_rounded(float a, float b) { return a * b; }
inline float add_rounded(float a, float b) { return a + b; }
inline float multiply_add(float a, float b, float c) { return std::fma(a, b, c); }

inline float shuffle_from(float value, int source) { return bits_float(emulation::exchange(float_bits(value), source)); }
inline float shuffle_xor(float value, int lanes) { return shuffle_from(value, (emulation::indices.thread.x % 32) ^ lanes); }

class LaneTable {
 public:
  explicit LaneTable(float value) : value_(value) {}
  float at(uint32_t index) const { return shuffle_from(value_, (emulation::indices.thread.x & 16) | (index & 15)); }

 private:
  float value_;
};

struct BFloat16 {
  using Storage = uint16_t;
  static constexpr bool kExactInTf32 = true;
  static constexpr emulation::Factors kFactors = emulation::Factors::kBFloat16;
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
  static constexpr emulation::Factors kFactors = emulation::Factors::kFloat16;
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

template <typename T>
void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulation::multiply(T::kFactors, 16, d, a, b0, b1);
}

template <typename T>
void mma_16x8x8(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t b0) {
  emulation::multiply(T::kFactors, 8, d, {a0, a1, 0, 0}, b0, 0);
}

inline void mma_tf32_16x8x8(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulation::multiply(emulation::Factors::kTf32, 8, d, a, b0, b1);
}

inline uint32_t transpose_8x8(uint32_t pair) { return emulation::exchange_transposed(pair); }

}  // namespace sda

#define threadIdx sda::emulation::indices.thread
#define blockIdx sda::emulation::indices.block
#define blockDim sda::emulation::indices.block_size
#define gridDim sda::emulation::indices.grid
#define __syncthreads() sda::emulation::wait_for_block()
