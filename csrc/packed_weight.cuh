// The packed 4-bit weight: where an element's nibble and its block's scale are. Plain structures, no torch.
//
// bitsandbytes' layout: two elements a byte over the flattened [N, K] matrix, the even element in the HIGH nibble;
// blocks of block_size elements over the same flattened order, so that they may straddle rows and the last may be partial.
#pragma once

#include "device.cuh"

namespace sda {

struct PackedWeight {
  const uint8_t* packed;        // [(numel + 1) / 2]
  const float* code;            // [16] value of each nibble
  const void* absmax;           // [blocks] float32, or uint8 into nested_code when nested_code is given
  const float* nested_code;     // [256] or null
  const float* nested_absmax;   // [(blocks + 255) / 256] when nested
  const float* nested_offset;   // [1] when nested
  int64_t numel;
  int log2_block_size;
  int log2_nested_block_size;
};

__device__ __forceinline__ float block_scale(const PackedWeight& weight, int64_t block) {
  if (weight.nested_code == nullptr) return load_cached(static_cast<const float*>(weight.absmax) + block);
  const uint32_t index = load_cached(static_cast<const uint8_t*>(weight.absmax) + block);
  const float outer = load_cached(weight.nested_absmax + (block >> weight.log2_nested_block_size));
  return add_rounded(multiply_rounded(load_cached(weight.nested_code + index), outer), load_cached(weight.nested_offset));
}

__device__ __forceinline__ uint32_t nibble_at(const PackedWeight& weight, int64_t element) {
  const uint32_t byte = load_cached(weight.packed + (element >> 1));
  return (element & 1) ? byte & 0xF : byte >> 4;
}

__device__ __forceinline__ float decode_element(const PackedWeight& weight, int64_t element) {
  return multiply_rounded(load_cached(weight.code + nibble_at(weight, element)),
                          block_scale(weight, element >> weight.log2_block_size));
}

// Shift that brings element i (0..7) of a little-endian word of eight nibbles to bits 0..3.
__host__ __device__ constexpr int nibble_shift(int i) { return 8 * (i >> 1) + ((i & 1) ? 0 : 4); }

inline bool is_aligned(const void* pointer, uintptr_t bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

inline unsigned grid_size(int64_t wanted, int64_t limit) {
  return unsigned(wanted < 1 ? 1 : (wanted < limit ? wanted : limit));
}

}  // namespace sda
