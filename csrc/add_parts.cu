// The second stage of sums that a kernel writes in parts: they are added in their order, so that the same parts give the same
// bits.
#include "passes.cuh"

namespace sda {
namespace {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads) add_parts_kernel(const float* parts, int count, int64_t numel, int columns,
                                                             float* out, int64_t out_stride) {
  for (int64_t element = int64_t(blockIdx.x) * kThreads + threadIdx.x; element < numel;
       element += int64_t(gridDim.x) * kThreads) {
    const int64_t row = element / columns;
    out[row * out_stride + (element - row * columns)] = sum_of_parts(parts + element, count, numel);
  }
}

}  // namespace

cudaError_t add_parts(const float* parts, int count, int64_t rows, int columns, float* out, int64_t out_stride,
                      cudaStream_t stream) {
  const int64_t numel = rows * columns;
  if (numel == 0) return cudaSuccess;
  const unsigned grid = grid_size((numel + kThreads - 1) / kThreads, int64_t(1) << 20);
  SDA_LAUNCH(add_parts_kernel, grid, kThreads, stream, parts, count, numel, columns, out, out_stride);
  return cudaGetLastError();
}

}  // namespace sda
