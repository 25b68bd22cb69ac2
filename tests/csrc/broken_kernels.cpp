// Small kernels that each break one of CUDA's rules if they are told to, for the emulator to notice.
#include "device.cuh"

namespace sda {
namespace {

constexpr int kThreads = 64;

struct Arguments {
  const float* x;  // [kThreads]
  float* y;        // [kThreads]
  int is_broken;
};

__global__ void barrier_of_a_warp_is_missing(Arguments arguments) {
  SDA_SHARED float values[kThreads];
  const int i = threadIdx.x;
  values[i] = load_cached(arguments.x + i);
  // A shuffle brings the lanes together, but orders no memory.
  const float one = shuffle_from(1.f, 0);
  if (!arguments.is_broken) sync_warp();
  arguments.y[i] = one * values[i ^ 1];
}

__global__ void barrier_of_the_block_is_missing(Arguments arguments) {
  SDA_SHARED float values[kThreads];
  const int i = threadIdx.x;
  values[i] = load_cached(arguments.x + i);
  if (arguments.is_broken) {
    sync_warp();
  } else {
    __syncthreads();
  }
  arguments.y[i] = values[kThreads - 1 - i];
}

__global__ void buffer_is_overwritten_too_early(Arguments arguments) {
  SDA_SHARED float values[kThreads];
  const int i = threadIdx.x;
  float sum = 0.f;
  for (int round = 0; round < 3; ++round) {
    values[i] = load_cached(arguments.x + i) + round;
    __syncthreads();
    sum += values[kThreads - 1 - i];
    if (!arguments.is_broken) __syncthreads();
  }
  arguments.y[i] = sum;
}

__global__ void shared_memory_is_never_written(Arguments arguments) {
  SDA_SHARED float values[kThreads];
  const int i = threadIdx.x;
  if (!arguments.is_broken || i != 5) values[i] = load_cached(arguments.x + i);
  arguments.y[i] = values[i];
}

__global__ void copy_is_not_waited_for(Arguments arguments) {
  SDA_SHARED uint4 copies[2][kThreads / 4];
  const int i = threadIdx.x;
  for (int stage = 0; stage < 2; ++stage) {
    if (i < kThreads / 4) copy_async(&copies[stage][i], arguments.x + 4 * i);
    commit_copies();
  }
  if (arguments.is_broken) {
    wait_for_copies<1>();
  } else {
    wait_for_copies<0>();
  }
  if (i < kThreads / 4) arguments.y[i] = bits_float(copies[1][i].x);
  wait_for_copies<0>();
}

__global__ void copy_is_read_by_others_without_a_barrier(Arguments arguments) {
  SDA_SHARED uint4 copies[kThreads / 4];
  const int i = threadIdx.x;
  if (i < kThreads / 4) copy_async(&copies[i], arguments.x + 4 * i);
  commit_copies();
  wait_for_copies<0>();
  if (!arguments.is_broken) sync_warp();
  if (i < kThreads / 4) arguments.y[i] = bits_float(copies[i ^ 1].x);
}

__global__ void copy_overwrites_what_others_read(Arguments arguments) {
  SDA_SHARED uint4 copies[kThreads / 4];
  const int i = threadIdx.x;
  for (int round = 0; round < 2; ++round) {
    if (i < kThreads / 4) copy_async(&copies[i], arguments.x + 4 * i);
    commit_copies();
    wait_for_copies<0>();
    sync_warp();
    if (i < kThreads / 4) arguments.y[i] = bits_float(copies[i ^ 1].x);
    if (!arguments.is_broken) sync_warp();
  }
}

__global__ void copy_outlives_its_thread(Arguments arguments) {
  SDA_SHARED uint4 copies[kThreads / 4];
  const int i = threadIdx.x;
  if (i < kThreads / 4) copy_async(&copies[i], arguments.x + 4 * i);
  commit_copies();
  if (!arguments.is_broken) wait_for_copies<0>();
}

__global__ void load_runs_past_the_end(Arguments arguments) {
  const int i = threadIdx.x;
  arguments.y[i] = load_streaming(arguments.x + i + arguments.is_broken);
}

__global__ void load_is_of_another_column(Arguments arguments) {
  // The test gives four columns of rows of eight.
  const int i = threadIdx.x;
  if (i < 8) arguments.y[i] = arguments.x[i * 8 + 3 + arguments.is_broken];
}

__global__ void store_goes_to_an_input(Arguments arguments) {
  const int i = threadIdx.x;
  (arguments.is_broken ? const_cast<float*>(arguments.x) : arguments.y)[i] = 1.f;
}

__global__ void two_threads_write_one_element(Arguments arguments) {
  const int i = threadIdx.x;
  arguments.y[arguments.is_broken ? i / 2 : i] = 1.f;
}

__global__ void what_is_written_is_loaded_as_read_only(Arguments arguments) {
  const int i = threadIdx.x;
  arguments.y[i] = 1.f;
  arguments.y[i] = 1.f + (arguments.is_broken ? load_cached(arguments.y + i) : load_streaming(arguments.y + i));
}

__global__ void load_is_misaligned(Arguments arguments) {
  const int i = threadIdx.x;
  const float* x = arguments.x + 4 * i + arguments.is_broken;
  if (i < 8) arguments.y[i] = bits_float(load_streaming(reinterpret_cast<const uint4*>(x)).x);
}

__global__ void store_is_misaligned(Arguments arguments) {
  const int i = threadIdx.x;
  const uint4 value{1, 2, 3, uint32_t(i)};
  if (i < 8) *reinterpret_cast<uint4*>(arguments.y + 4 * i + arguments.is_broken) = value;
}

__global__ void lanes_have_left_before_a_shuffle(Arguments arguments) {
  const int i = threadIdx.x;
  if (arguments.is_broken && i % 32 >= 30) return;
  arguments.y[i] = shuffle_xor(1.f, 1);
}

__global__ void lanes_meet_in_different_operations(Arguments arguments) {
  const int i = threadIdx.x;
  float d[4] = {};
  if (arguments.is_broken && i % 2) {
    d[0] = shuffle_xor(1.f, 2);
  } else {
    mma_tf32_16x8x8(d, {0, 0, 0, 0}, 0, 0);
  }
  arguments.y[i] = d[0];
}

__global__ void lanes_shuffle_in_different_branches(Arguments arguments) {
  const int i = threadIdx.x;
  if (arguments.is_broken && i % 2) {
    arguments.y[i] = 2.f * shuffle_from(1.f, 3);
  } else {
    arguments.y[i] = shuffle_from(2.f, 1);
  }
}

__global__ void barrier_is_not_reached_by_all(Arguments arguments) {
  if (!arguments.is_broken || threadIdx.x != 40) __syncthreads();
}

__global__ void index_is_outside_its_array(Arguments arguments) {
  SDA_SHARED float values[2][kThreads / 2];
  const int i = threadIdx.x;
  float* y = arguments.y;
  if (arguments.is_broken) {
    values[0][i] = 1.f;
    y[i] = values[0][i];
  } else {
    values[i % 2][i / 2] = 1.f;
    y[i] = values[i % 2][i / 2];
  }
}

__global__ void product_overflows(Arguments arguments) {
  const int i = threadIdx.x;
  const int stride = arguments.is_broken ? 1 << 26 : 1 << 24;
  arguments.y[i] = i * stride;
}

__global__ void grid_is_too_high(Arguments) {}

}  // namespace

extern "C" void emulated_kernel(int index, const float* x, float* y, int is_broken) {
  const Arguments arguments{x, y, is_broken};
  constexpr decltype(&grid_is_too_high) kernels[] = {
      barrier_of_a_warp_is_missing,
      barrier_of_the_block_is_missing,
      buffer_is_overwritten_too_early,
      shared_memory_is_never_written,
      copy_is_not_waited_for,
      copy_is_read_by_others_without_a_barrier,
      copy_overwrites_what_others_read,
      copy_outlives_its_thread,
      load_runs_past_the_end,
      load_is_of_another_column,
      store_goes_to_an_input,
      two_threads_write_one_element,
      what_is_written_is_loaded_as_read_only,
      load_is_misaligned,
      store_is_misaligned,
      lanes_have_left_before_a_shuffle,
      lanes_meet_in_different_operations,
      lanes_shuffle_in_different_branches,
      barrier_is_not_reached_by_all,
      index_is_outside_its_array,
      product_overflows,
      grid_is_too_high,
  };
  const auto kernel = kernels[index];
  const bool is_too_high = is_broken && kernel == grid_is_too_high;
  SDA_LAUNCH(kernel, dim3(1, is_too_high ? 65536 : 1), kThreads, nullptr, arguments);
}

}  // namespace sda
