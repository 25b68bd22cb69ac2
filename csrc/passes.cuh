// What the low-rank passes share: dropout, gates, and how a warp holds a piece of a 16-bit matrix.
//
// Lane (g, t) of a warp, g = lane / 4 and t = lane % 4, loads the 16 bytes of columns 8t ... 8t + 7 of a row g and of the row
// eight below. Which k of a product is which column is free as long as both factors agree: the registers x and y of both rows
// are the first fragment of mma.m16n8k16, z and w the second, and a row of the other factor, read in the same way, is theirs.
// The eight 16-bit samples of one Philox call decide just the eight elements of one load.
#pragma once

#include "launchers.h"

namespace sda {

constexpr int kWarpColumns = 32;

__host__ __device__ constexpr int divide_up(int a, int b) { return a / b + (a % b != 0); }

// The words of Philox4x32-7 for the counter (low, high, 0, 0).
__device__ __forceinline__ uint4 philox(uint64_t seed, uint64_t counter) {
  uint32_t key0 = uint32_t(seed), key1 = uint32_t(seed >> 32);
  uint4 words{uint32_t(counter), uint32_t(counter >> 32), 0, 0};
#pragma unroll
  for (int round = 0; round < 7; ++round) {
    const uint64_t product0 = uint64_t(words.x) * 0xD2511F53u, product1 = uint64_t(words.z) * 0xCD9E8D57u;
    words = uint4{uint32_t(product1 >> 32) ^ words.y ^ key0, uint32_t(product1), uint32_t(product0 >> 32) ^ words.w ^ key1,
                  uint32_t(product0)};
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return words;
}

// Dropout of an [M, width] matrix, by element: counter row * (width / 8) + column / 8, sample column % 8.
struct Dropout {
  uint64_t seed;
  uint32_t last_dropped;  // a sample in the upper half of a word is kept if the word is above
  float scale;
  bool active;
  int groups;

  __device__ __forceinline__ Dropout(const DropoutArguments& arguments, int width)
      : seed(arguments.seed == nullptr ? 0 : uint64_t(load_cached(arguments.seed))),
        last_dropped((uint32_t(arguments.threshold) << 16) - 1),  // 65536 wraps to 0, below which is the largest word
        scale(arguments.scale),
        active(arguments.seed != nullptr),
        groups(width / 8) {}

  __device__ __forceinline__ uint4 words(int row, int column) const {
    return philox(seed, uint64_t(row) * uint32_t(groups) + uint32_t(column / 8));
  }
  __device__ __forceinline__ bool keeps_low(uint32_t word) const { return (word << 16) > last_dropped; }
  __device__ __forceinline__ bool keeps_high(uint32_t word) const { return word > last_dropped; }
  __device__ __forceinline__ uint32_t masked(uint32_t pair, uint32_t word) const {
    if (!keeps_low(word)) pair &= 0xFFFF0000u;
    if (!keeps_high(word)) pair &= 0x0000FFFFu;
    return pair;
  }
  __device__ __forceinline__ uint4 masked(const uint4& values, const uint4& words) const {
    return uint4{masked(values.x, words.x), masked(values.y, words.y), masked(values.z, words.z), masked(values.w, words.w)};
  }
};

// Eight neighbouring elements of a 16-bit matrix; what lies outside is never read.
__device__ __forceinline__ uint4 load_if(bool inside, const uint16_t* address) {
  return inside ? load_streaming(reinterpret_cast<const uint4*>(address)) : uint4{0, 0, 0, 0};
}

// A lane's elements in kTiles tiles of 16 rows: those of rows g and g + 8 of each, from `column` on.
template <int kTiles>
__device__ __forceinline__ void load_tiles(uint4 (&values)[kTiles][2], bool inside, const void* matrix, int64_t stride,
                                           int first_row, int M, int column) {
  const uint16_t* first = static_cast<const uint16_t*>(matrix) + first_row * stride + column;
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = tile * 16 + half * 8;
      values[tile][half] = load_if(inside && first_row + row < M, first + row * stride);
    }
  }
}

// An adapter's matrix, float32 or of the activations' type.
template <typename T>
__device__ __forceinline__ float lora_value(const void* matrix, int64_t index, bool is_float32) {
  return is_float32 ? load_cached(static_cast<const float*>(matrix) + index)
                    : T::widen(load_cached(static_cast<const uint16_t*>(matrix) + index));
}

// Eight neighbouring elements of it, rounded to T.
template <typename T>
__device__ __forceinline__ uint4 lora_row(const void* matrix, int64_t index, bool is_float32) {
  if (!is_float32) return load_cached(reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(matrix) + index));
  const uint4* quads = reinterpret_cast<const uint4*>(static_cast<const float*>(matrix) + index);
  const uint4 first = load_cached(quads), second = load_cached(quads + 1);
  return uint4{T::pack(bits_float(first.x), bits_float(first.y)), T::pack(bits_float(first.z), bits_float(first.w)),
               T::pack(bits_float(second.x), bits_float(second.y)), T::pack(bits_float(second.z), bits_float(second.w))};
}

// d += values factor^T for 16 rows (values[0] are rows g, values[1] rows g + 8) and 32 columns of both.
template <typename T>
__device__ __forceinline__ void multiply_rows(float (&d)[4], const uint4 (&values)[2], const uint4& factor) {
  const uint32_t first[4] = {values[0].x, values[1].x, values[0].y, values[1].y};
  const uint32_t second[4] = {values[0].z, values[1].z, values[0].w, values[1].w};
  mma_16x8x16<T>(d, first, factor.x, factor.y);
  mma_16x8x16<T>(d, second, factor.z, factor.w);
}

// h or dh, with its gates.
struct LowRankRows {
  const float* values;  // [M, R]
  int64_t stride;
  GateTable gate;
  int M, R;

  __device__ __forceinline__ int line(int row) const {
    if (gate.ids == nullptr) return gate.lines == 1 ? 0 : row;
    const int id = int(uint32_t(row) / uint32_t(gate.rows_per_id));
    return gate.ids_are_64bit ? int(load_cached(static_cast<const int64_t*>(gate.ids) + id))
                              : load_cached(static_cast<const int32_t*>(gate.ids) + id);
  }
  __device__ __forceinline__ float gate_at(int row, int expert) const {
    return load_cached(gate.gates + int64_t(line(row)) * gate.num_experts + expert) * gate.scaling;
  }
  // Value times gate; 0 outside. `expert` is that of the rank.
  __device__ __forceinline__ float at(int row, int rank, int expert) const {
    if (row >= M || rank >= R) return 0.f;
    const float value = load_cached(values + row * stride + rank);
    return gate.gates == nullptr ? value : value * gate_at(row, expert);
  }
  __device__ __forceinline__ int expert_of(int rank) const {
    return gate.gates == nullptr ? 0 : rank / (R / gate.num_experts);
  }
};

// The part of a block of low-rank rows that one thread brings into shared memory: always the same rank.
template <int kThreads, int kRows, int kRanks>
struct StagedRows {
  static constexpr int kStep = kThreads / kRanks;
  static constexpr int kCount = (kRows + kStep - 1) / kStep;
  int rank, expert, first_row;
  float values[kCount];

  __device__ __forceinline__ StagedRows(const LowRankRows& rows, int first_rank)
      : rank(threadIdx.x % kRanks), expert(rows.expert_of(first_rank + rank)), first_row(threadIdx.x / kRanks) {}

  __device__ __forceinline__ void load(const LowRankRows& rows, int first_rank, int block) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int row = first_row + i * kStep;
      values[i] = row < kRows ? rows.at(block * kRows + row, first_rank + rank, expert) : 0.f;
    }
  }
  // Calls store(row in block, rank, bits).
  template <typename T, typename Store>
  __device__ __forceinline__ void store(Store&& store) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int row = first_row + i * kStep;
      if (row < kRows) store(row, rank, T::round(values[i]));
    }
  }
};

// 32-bit words of a row of kHalves 16-bit elements in shared memory such that the lanes' fragments lie in different banks.
__host__ __device__ constexpr int fragment_row_words(int halves) { return halves / 2 + (halves > 8 ? 4 : 0); }

__device__ __forceinline__ void store_half(uint32_t* row, int index, uint16_t bits) {
  reinterpret_cast<uint16_t*>(row)[index] = bits;
}

// update[j] += rows factor: rows is 16 low-rank rows in shared memory, factor[r][j] ranks 8r + 2t and 8r + 2t + 1 of the
// column 8 (g / 2) + 2j + g % 2. A lane then holds columns 8t + 2j and 8t + 2j + 1 of rows g and g + 8 in update[j].
template <typename T, int kRankTiles, int kWords>
__device__ __forceinline__ void expand_rows(float (&update)[4][4], uint32_t (*rows)[kWords],
                                            const uint32_t (&factor)[kRankTiles][4], int group, int member) {
  if constexpr (kRankTiles == 1) {
    const uint32_t upper = rows[group][member], lower = rows[group + 8][member];
#pragma unroll
    for (int j = 0; j < 4; ++j) mma_16x8x8<T>(update[j], upper, lower, factor[0][j]);
  } else {
#pragma unroll
    for (int r = 0; r < kRankTiles; r += 2) {
      const uint32_t fragment[4] = {rows[group][r * 4 + member], rows[group + 8][r * 4 + member],
                                    rows[group][r * 4 + 4 + member], rows[group + 8][r * 4 + 4 + member]};
#pragma unroll
      for (int j = 0; j < 4; ++j) mma_16x8x16<T>(update[j], fragment, factor[r][j], factor[r + 1][j]);
    }
  }
}

// The factor of expand_rows, from a matrix with any strides and `width` columns.
template <typename T, int kRankTiles>
__device__ __forceinline__ void load_expanding(uint32_t (&factor)[kRankTiles][4], const void* matrix, bool is_float32,
                                               int64_t stride_column, int64_t stride_rank, int first_column, int width, int R,
                                               int group, int member) {
#pragma unroll
  for (int r = 0; r < kRankTiles; ++r) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int column = first_column + group / 2 * 8 + group % 2 + 2 * j;
      float pair[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int rank = r * 8 + member * 2 + i;
        pair[i] = column < width && rank < R
                      ? lora_value<T>(matrix, column * stride_column + rank * stride_rank, is_float32)
                      : 0.f;
      }
      factor[r][j] = T::pack(pair[0], pair[1]);
    }
  }
}

// Eight elements of a row from the update of a lane, `half` 0 for row g and 1 for g + 8: masked, added to what was there,
// rounded once.
template <typename T>
__device__ __forceinline__ uint4 updated(const float (&update)[4][4], int half, const Dropout& dropout, const uint4& words,
                                         const uint4& before) {
  const uint32_t word[4] = {words.x, words.y, words.z, words.w}, old[4] = {before.x, before.y, before.z, before.w};
  uint32_t result[4];
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    float low = update[j][half * 2], high = update[j][half * 2 + 1];
    if (dropout.active) {
      low = dropout.keeps_low(word[j]) ? low * dropout.scale : 0.f;
      high = dropout.keeps_high(word[j]) ? high * dropout.scale : 0.f;
    }
    result[j] = T::pack(low + T::widen(uint16_t(old[j])), high + T::widen(uint16_t(old[j] >> 16)));
  }
  return uint4{result[0], result[1], result[2], result[3]};
}

// Sum of `count` parts, `stride` elements apart, in their order.
__device__ __forceinline__ float sum_of_parts(const float* parts, int count, int64_t stride) {
  float sum = 0.f;
#pragma unroll 4
  for (int part = 0; part < count; ++part) sum += load_cached(parts + part * stride);
  return sum;
}

// Into how many chunks the blocks of rows are cut so that `column_blocks` times as many CTAs fill the `resident` places of a
// device; no chunk is empty, but one is there even without rows.
inline int chunks_of_rows(int blocks, int column_blocks, int resident, int wanted) {
  int chunks = wanted;
  if (wanted <= 0) {
    double best = 0.;
    chunks = 1;
    // CTAs come in waves; a few of them where one leaves many places empty.
    for (int waves = 1; waves <= 4 && best < 0.95; ++waves) {
      const int candidate = resident * waves / column_blocks;
      const double filled = double(candidate) * column_blocks / (double(resident) * waves);
      if (candidate >= 1 && filled > best) best = filled, chunks = candidate;
    }
  }
  if (blocks < 1) return 1;
  const int limit = blocks < 65535 ? blocks : 65535;  // of a grid's y
  return divide_up(blocks, divide_up(blocks, chunks < limit ? chunks : limit));
}

}  // namespace sda
