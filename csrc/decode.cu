// 4-bit decode to a 16-bit matrix, without an update.
//
// A warp takes tiles of 1024 elements: 16 packed bytes a lane, so that a lane's 32 elements lie in one block (blocks hold
// a multiple of 32). The lane rounds its block's sixteen products once and keeps them as two byte planes in registers;
// each nibble is then two byte permutations. A swizzled exchange through shared memory makes the stores contiguous.
#include "launchers.h"

namespace sda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kTile = 1024;
constexpr int kCtasAtOnce = 4;  // of a multiprocessor

struct BytePlanes {
  uint32_t low[4];
  uint32_t high[4];
};

template <typename Out>
__device__ __forceinline__ BytePlanes product_table(const float (&code)[16], float scale) {
  BytePlanes planes;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t first = Out::pack(multiply_rounded(code[4 * i], scale), multiply_rounded(code[4 * i + 1], scale));
    const uint32_t second = Out::pack(multiply_rounded(code[4 * i + 2], scale), multiply_rounded(code[4 * i + 3], scale));
    planes.low[i] = byte_permute(first, second, 0x6420);
    planes.high[i] = byte_permute(first, second, 0x7531);
  }
  return planes;
}

// Four nibbles at once: bits 0..2 of each choose within either half of the table, bit 3 chooses the half.
__device__ __forceinline__ uint32_t look_up(const uint32_t (&plane)[4], uint32_t within, uint32_t half) {
  return byte_permute(byte_permute(plane[0], plane[1], within), byte_permute(plane[2], plane[3], within), half);
}

__device__ __forceinline__ uint4 decode_word(const BytePlanes& planes, uint32_t word) {
  const uint32_t within = word & 0x77777777u;
  const uint32_t half = ((word >> 1) & 0x44444444u) | 0x32103210u;
  const uint32_t low0 = look_up(planes.low, within, half), high0 = look_up(planes.high, within, half);
  const uint32_t low1 = look_up(planes.low, within >> 16, half >> 16), high1 = look_up(planes.high, within >> 16, half >> 16);
  // The even element is the high nibble, hence bytes 1, 0 and 3, 2.
  return uint4{byte_permute(low0, high0, 0x4051), byte_permute(low0, high0, 0x6273), byte_permute(low1, high1, 0x4051),
               byte_permute(low1, high1, 0x6273)};
}

__device__ __forceinline__ int swizzled(int chunk) { return chunk ^ ((chunk >> 3) & 7); }

template <typename Out>
__global__ void __launch_bounds__(kThreads) decode_kernel(PackedWeight weight, uint16_t* out, int64_t full_tiles) {
  SDA_SHARED uint4 exchange[kWarps][kTile / 8];
  SDA_SHARED float nested_code[256];
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  const int64_t warp_stride = int64_t(gridDim.x) * kWarps;
  const int64_t first_tile = int64_t(blockIdx.x) * kWarps + warp;

  const BlockScales scales(weight);
  const auto load_scale = [&](int64_t tile) { return scales.load((tile * kTile + lane * 32) >> weight.log2_block_size); };
  const uint4* packed = reinterpret_cast<const uint4*>(weight.packed);
  uint4 words = {};
  LoadedScale loaded = {};
  if (first_tile < full_tiles) {
    words = load_streaming(packed + first_tile * 32 + lane);
    loaded = load_scale(first_tile);
  }
  float code[16];
#pragma unroll
  for (int i = 0; i < 16; ++i) code[i] = load_cached(weight.code + i);
  if (weight.nested_code != nullptr) nested_code[threadIdx.x] = load_cached(weight.nested_code + threadIdx.x);
  __syncthreads();

  for (int64_t tile = first_tile; tile < full_tiles; tile += warp_stride) {
    const uint4 current = words;
    const float scale = scales.value(loaded, nested_code);
    if (tile + warp_stride < full_tiles) {
      words = load_streaming(packed + (tile + warp_stride) * 32 + lane);
      loaded = load_scale(tile + warp_stride);
    }
    const BytePlanes planes = product_table<Out>(code, scale);
    exchange[warp][swizzled(4 * lane + 0)] = decode_word(planes, current.x);
    exchange[warp][swizzled(4 * lane + 1)] = decode_word(planes, current.y);
    exchange[warp][swizzled(4 * lane + 2)] = decode_word(planes, current.z);
    exchange[warp][swizzled(4 * lane + 3)] = decode_word(planes, current.w);
    sync_warp();
    uint4* destination = reinterpret_cast<uint4*>(out + tile * kTile);
#pragma unroll
    for (int j = 0; j < 4; ++j) destination[j * 32 + lane] = exchange[warp][swizzled(j * 32 + lane)];
    sync_warp();
  }

  for (int64_t element = full_tiles * kTile + int64_t(blockIdx.x) * kThreads + threadIdx.x; element < weight.numel;
       element += int64_t(gridDim.x) * kThreads) {
    out[element] = Out::round(decode_element(weight, scales, element));
  }
}

}  // namespace

cudaError_t decode(const PackedWeight& weight, void* out, ScalarKind out_kind, cudaStream_t stream) {
  if (weight.numel == 0) return cudaSuccess;
  const bool vectorised = is_aligned(weight.packed, 16) && is_aligned(out, 16);
  const int64_t full_tiles = vectorised ? weight.numel / kTile : 0;
  const int64_t work = full_tiles > 0 ? (full_tiles + kWarps - 1) / kWarps : (weight.numel + kThreads - 1) / kThreads;
  // Two tiles a warp where there are enough of them: the second load is in flight while the first is decoded.
  const bool two_tiles = full_tiles > 0 && work > int64_t(kCtasAtOnce) * multiprocessor_count();
  const unsigned grid = grid_size(two_tiles ? (work + 1) / 2 : work, int64_t(1) << 20);
  uint16_t* target = static_cast<uint16_t*>(out);
  if (out_kind == ScalarKind::kBFloat16) {
    SDA_LAUNCH(decode_kernel<BFloat16>, grid, kThreads, stream, weight, target, full_tiles);
  } else {
    SDA_LAUNCH(decode_kernel<Float16>, grid, kThreads, stream, weight, target, full_tiles);
  }
  return cudaGetLastError();
}

}  // namespace sda
