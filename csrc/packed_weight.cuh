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

// What a block's scale is made of.
struct LoadedScale {
  float absmax;    // of the block, or of its nested block
  uint32_t index;  // into nested_code
};

// Scale of a block; the offset of nested statistics is read once.
struct BlockScales {
  const void* absmax;
  const float* nested_code;
  const float* nested_absmax;
  float nested_offset;
  int log2_nested_block_size;

  __device__ __forceinline__ explicit BlockScales(const PackedWeight& weight)
      : absmax(weight.absmax),
        nested_code(weight.nested_code),
        nested_absmax(weight.nested_absmax),
        nested_offset(weight.nested_code == nullptr ? 0.f : load_cached(weight.nested_offset)),
        log2_nested_block_size(weight.log2_nested_block_size) {}

  template <typename Index>
  __device__ __forceinline__ LoadedScale load(Index block) const {
    if (nested_code == nullptr) return {load_cached(static_cast<const float*>(absmax) + block), 0};
    return {load_cached(nested_absmax + (block >> log2_nested_block_size)),
            load_cached(static_cast<const uint8_t*>(absmax) + block)};
  }
  // `table` holds nested_code, wherever that is.
  __device__ __forceinline__ float value(const LoadedScale& loaded, const float* table) const {
    if (nested_code == nullptr) return loaded.absmax;
    return add_rounded(multiply_rounded(table[loaded.index], loaded.absmax), nested_offset);
  }
  template <typename Index>
  __device__ __forceinline__ float at(Index block) const {
    const LoadedScale loaded = load(block);
    if (nested_code == nullptr) return loaded.absmax;
    return add_rounded(multiply_rounded(load_cached(nested_code + loaded.index), loaded.absmax), nested_offset);
  }
};

__device__ __forceinline__ uint32_t nibble_at(const PackedWeight& weight, int64_t element) {
  const uint32_t byte = load_cached(weight.packed + (element >> 1));
  return (element & 1) ? byte & 0xF : byte >> 4;
}

__device__ __forceinline__ float decode_element(const PackedWeight& weight, const BlockScales& scales, int64_t element) {
  return multiply_rounded(load_cached(weight.code + nibble_at(weight, element)),
                          scales.at(element >> weight.log2_block_size));
}

// The nibble of element i (0..7) of a little-endian word of eight, in the four low bits; above them are others.
__device__ __forceinline__ uint32_t nibble_in_low_bits(uint32_t word, int i) {
  return word >> (8 * (i >> 1) + ((i & 1) ? 0 : 4));
}

inline bool is_aligned(const void* pointer, uintptr_t bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

inline unsigned grid_size(int64_t wanted, int64_t limit) {
  return unsigned(wanted < 1 ? 1 : (wanted < limit ? wanted : limit));
}

}  // namespace sda
