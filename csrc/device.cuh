// What the kernels need of the machine, in one place: CUDA here, or a host emulation of the same names
// (tests/csrc/emulator.h) that runs the very same kernels thread by thread on a CPU.
#pragma once

#ifdef SDA_EMULATE
#include "emulator.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#define SDA_SHARED __shared__
#define SDA_LAUNCH(kernel, grid, threads, stream, ...) (kernel)<<<(grid), (threads), 0, (stream)>>>(__VA_ARGS__)

namespace sda {

inline int multiprocessor_count() {
  int device = 0, count = 1;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return count;
}

// Byte i of the result is byte (selector >> 4i) & 7 of the eight bytes b:a.
__device__ __forceinline__ uint32_t byte_permute(uint32_t a, uint32_t b, uint32_t selector) {
  return __byte_perm(a, b, selector);
}

template <typename V>
__device__ __forceinline__ V load_streaming(const V* address) {
  return __ldcs(address);
}

template <typename V>
__device__ __forceinline__ V load_cached(const V* address) {
  return __ldg(address);
}

// One store of 16 bytes, which the compiler may make four of if it is left to it.
__device__ __forceinline__ void store_wide(void* address, uint4 value) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(address), "r"(value.x), "r"(value.y), "r"(value.z), "r"(value.w));
}

__device__ __forceinline__ void sync_warp() { __syncwarp(); }

__device__ __forceinline__ float shuffle_xor(float value, int lanes) {
  return __shfl_xor_sync(0xffffffffu, value, lanes);
}

__device__ __forceinline__ float shuffle_from(float value, int lane) {
  return __shfl_sync(0xffffffffu, value, lane);
}

// Sixteen values, held by lanes i and i + 16; of an index only the four low bits count.
class LaneTable {
 public:
  __device__ __forceinline__ explicit LaneTable(float value) : value_(value) {}
  __device__ __forceinline__ float at(uint32_t index) const { return __shfl_sync(0xffffffffu, value_, int(index), 16); }

 private:
  float value_;
};

// Copies of 16 bytes to shared memory that are under way while the thread goes on. They are waited for in the order of their
// commits; wait_for_copies<N> leaves at most the last N commits under way.
__device__ __forceinline__ void copy_async(void* shared, const void* global) {
  const uint32_t address = uint32_t(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(global) : "memory");
}
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// Separate roundings: the compiler must not contract these into one.
__device__ __forceinline__ float multiply_rounded(float a, float b) { return __fmul_rn(a, b); }
__device__ __forceinline__ float add_rounded(float a, float b) { return __fadd_rn(a, b); }
__device__ __forceinline__ float multiply_add(float a, float b, float c) { return __fmaf_rn(a, b, c); }

__device__ __forceinline__ uint32_t float_bits(float value) { return __float_as_uint(value); }
__device__ __forceinline__ float bits_float(uint32_t bits) { return __uint_as_float(bits); }

struct BFloat16 {
  using Storage = uint16_t;
  static constexpr bool kExactInTf32 = true;
  static __device__ __forceinline__ uint32_t pack(float low, float high) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&pair);
  }
  static __device__ __forceinline__ uint16_t round(float value) { return __bfloat16_as_ushort(__float2bfloat16_rn(value)); }
  static __device__ __forceinline__ float widen(uint16_t bits) { return __uint_as_float(uint32_t(bits) << 16); }
};

struct Float16 {
  using Storage = uint16_t;
  static constexpr bool kExactInTf32 = true;
  static __device__ __forceinline__ uint32_t pack(float low, float high) {
    const __half2 pair = __floats2half2_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&pair);
  }
  static __device__ __forceinline__ uint16_t round(float value) { return __half_as_ushort(__float2half_rn(value)); }
  static __device__ __forceinline__ float widen(uint16_t bits) { return __half2float(__ushort_as_half(bits)); }
};

struct Float32 {
  using Storage = float;
  static constexpr bool kExactInTf32 = false;
  static __device__ __forceinline__ float round(float value) { return value; }
  static __device__ __forceinline__ float widen(float value) { return value; }
};

// What all lanes do together is volatile, so that it is not moved into a branch that only some of them take.
// d += a b for one warp, m16n8k16; fragments as in the PTX manual, "Matrix fragments for mma.m16n8k16".
template <typename T>
__device__ __forceinline__ void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

template <>
__device__ __forceinline__ void mma_16x8x16<BFloat16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <>
__device__ __forceinline__ void mma_16x8x16<Float16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// d += a b for one warp, m16n8k8.
template <typename T>
__device__ __forceinline__ void mma_16x8x8(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t b0);

template <>
__device__ __forceinline__ void mma_16x8x8<BFloat16>(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t b0) {
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a0), "r"(a1), "r"(b0));
}

template <>
__device__ __forceinline__ void mma_16x8x8<Float16>(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t b0) {
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a0), "r"(a1), "r"(b0));
}

// The transpose of an 8 x 8 matrix of 16-bit elements, of which lane (g, t) holds row g, columns 2t and 2t + 1.
__device__ __forceinline__ uint32_t transpose_8x8(uint32_t pair) {
  uint32_t transposed;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(transposed) : "r"(pair));
  return transposed;
}

// m16n8k8 with tf32 factors, of which the hardware reads the upper 19 bits.
__device__ __forceinline__ void mma_tf32_16x8x8(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

}  // namespace sda

#endif
