// One half of the emulator: threads of a block are fibers, which take turns; what they do together waits for all of them.
#include <csetjmp>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <ucontext.h>
#include <vector>

#include "emulator_state.h"

namespace sda::emulation {

Indices indices;
bool in_fiber = false;
uint32_t block_epoch = 0, first_epoch = 0;

namespace {

constexpr size_t kStackBytes = 128 * 1024;

enum class Meeting { kBarrier, kShuffle, kTranspose, kProduct };
const char* const kMeetings[] = {"a barrier of the warp", "a shuffle", "a transposition", "a matrix product"};

struct Barrier {
  unsigned arrived = 0, generation = 0;
  Meeting meeting = Meeting::kBarrier;
  const void* place = nullptr;  // where in the code they meet
};

struct Copy {
  void* shared;
  const void* global;
};

struct Fiber {
  ucontext_t start;
  jmp_buf context;
  bool started = false, finished = true;
  const Barrier* barrier = nullptr;  // that it waits at, until the generation is another
  unsigned generation = 0;
  std::vector<Copy> copies;                  // since the last commit
  std::deque<std::vector<Copy>> under_way;  // by commit
};

struct Warp {
  Barrier barrier;
  uint32_t barriers = 0;             // passed, without shuffles and the like
  uint32_t exchanged[2][32][6];  // [parity of the barrier's generation][lane][register]
};

}  // namespace

// Not in the unnamed namespace: a compiler may think that what no other file knows cannot change while a fiber waits.
std::vector<Fiber> fibers;
std::vector<char> stacks;
Warp warps[kMostWarps];
Barrier block_barrier;
jmp_buf scheduler;
unsigned current, alive;
uint32_t chance = 1;
void (*body)(const void*);
const void* body_arguments;
const char* kernel_name;
std::vector<char> failure(1024, 0);  // empty without one
int multiprocessors = 2;

[[noreturn]] void fail(const char* format, ...) {
  char text[512];
  va_list values;
  va_start(values, format);
  std::vsnprintf(text, sizeof text, format, values);
  va_end(values);
  if (failure[0] == 0) {
    std::snprintf(failure.data(), failure.size(), "%s: block (%u, %u), thread %u: %s", kernel_name, indices.block.x,
                  indices.block.y, indices.thread.x, text);
  }
  if (!in_fiber) {
    std::fprintf(stderr, "%s\n", failure.data());
    std::abort();
  }
  in_fiber = false;
  _longjmp(scheduler, 1);
}

namespace {

__attribute__((noinline)) void yield() {
  if (_setjmp(fibers[current].context) == 0) {
    in_fiber = false;
    _longjmp(scheduler, 1);
  }
}

void wait(Barrier& barrier, unsigned parties) {
  if (++barrier.arrived == parties) {
    barrier.arrived = 0;
    ++barrier.generation;
    return;
  }
  Fiber& fiber = fibers[current];
  fiber.barrier = &barrier;
  fiber.generation = barrier.generation;
  yield();
  fibers[current].barrier = nullptr;
}

Warp& own_warp() { return warps[indices.thread.x / 32]; }

// What the lanes of a warp give each other, once all of them are there; `place` is where the kernel called.
template <int kRegisters>
const uint32_t (*meet(Meeting meeting, const void* place, const uint32_t (&given)[kRegisters]))[6] {
  Warp& warp = own_warp();
  if (warp.barrier.arrived == 0) warp.barrier.meeting = meeting, warp.barrier.place = place;
  if (warp.barrier.meeting != meeting) {
    fail("it is at %s, other lanes of its warp at %s", kMeetings[int(meeting)], kMeetings[int(warp.barrier.meeting)]);
  }
  if (warp.barrier.place != place) fail("it is at %s, other lanes of its warp at another", kMeetings[int(meeting)]);
  uint32_t(*lanes)[6] = warp.exchanged[warp.barrier.generation & 1];
  for (int i = 0; i < kRegisters; ++i) lanes[indices.thread.x % 32][i] = given[i];
  wait(warp.barrier, 32);
  return lanes;
}

void fiber_main() {
  for (;;) {
    body(body_arguments);
    Fiber& fiber = fibers[current];
    if (!fiber.copies.empty() || !fiber.under_way.empty()) fail("it ends before its copies do");
    fiber.finished = true;
    --alive;
    yield();
  }
}

// Returns when the fiber has to wait, has finished or has failed.
__attribute__((noinline)) void resume(unsigned thread) {
  current = thread;
  indices.thread.x = thread;
  Fiber& fiber = fibers[thread];
  if (_setjmp(scheduler) != 0) return;
  in_fiber = true;
  if (fiber.started) _longjmp(fiber.context, 1);
  fiber.started = true;
  setcontext(&fiber.start);
}

void prepare_fibers(unsigned threads) {
  if (fibers.size() < threads) {
    fibers.resize(threads);
    stacks.resize(threads * kStackBytes);
    for (Fiber& fiber : fibers) fiber.started = false;
  }
  for (unsigned i = 0; i < threads; ++i) {
    Fiber& fiber = fibers[i];
    fiber.finished = false;
    fiber.barrier = nullptr;
    fiber.copies.clear();
    fiber.under_way.clear();
    if (fiber.started) continue;
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = stacks.data() + i * kStackBytes;
    fiber.start.uc_stack.ss_size = kStackBytes;
    makecontext(&fiber.start, fiber_main, 0);
  }
}

void run_block(unsigned threads) {
  prepare_fibers(threads);
  block_barrier = {};
  for (Warp& warp : warps) warp.barrier = {};
  first_epoch = ++block_epoch;
  alive = threads;
  unsigned rounds_to_stall = 0;
  uint32_t stalled = 0;  // one bit a warp
  while (alive > 0) {
    // Threads take turns in another order every round, and some warps stand still as long as others can go on.
    chance = chance * 1664525u + 1013904223u;
    if (rounds_to_stall-- == 0) stalled = chance >> 13, rounds_to_stall = 256;
    bool progress = false;
    for (unsigned turn = 0; turn < threads && failure[0] == 0; ++turn) {
      const unsigned i = (turn * (chance >> 8 | 1u) + (chance >> 16)) % threads;
      const Fiber& fiber = fibers[i];
      if (fiber.finished || (stalled >> (i / 32) & 1)) continue;
      if (fiber.barrier != nullptr && fiber.barrier->generation == fiber.generation) continue;
      progress = true;
      resume(i);
    }
    if (failure[0] == 0 && !progress && stalled == 0) {
      indices.thread.x = 0;
      while (fibers[indices.thread.x].finished) ++indices.thread.x;
      const bool of_block = fibers[indices.thread.x].barrier == &block_barrier;
      std::snprintf(failure.data(), failure.size(),
                    "%s: block (%u, %u): deadlock: thread %u waits at %s for threads that never come", kernel_name,
                    indices.block.x, indices.block.y, indices.thread.x,
                    of_block ? "a barrier of the block" : "an operation of its warp");
    }
    if (failure[0] != 0) {
      for (Fiber& fiber : fibers) fiber.started = false;
      return;
    }
    if (!progress) stalled = 0;
  }
}

}  // namespace

uint32_t warp_barriers() { return own_warp().barriers; }

Range fiber_stacks() { return {stacks.data(), stacks.data() + stacks.size()}; }

void run(const char* kernel, dim3 grid, unsigned threads, void (*function)(const void*), const void* arguments) {
  if (failure[0] != 0) return;
  kernel_name = kernel;
  body = function;
  body_arguments = arguments;
  indices.grid = grid;
  indices.block_size.x = threads;
  const bool is_power_of_two = (threads & (threads - 1)) == 0;
  if (threads % 32 != 0 || threads > kMostThreads || !is_power_of_two || grid.x == 0 || grid.x > 0x7FFFFFFFu || grid.y == 0 ||
      grid.y > 65535) {
    std::snprintf(failure.data(), failure.size(), "%s: it cannot be launched with %u x %u blocks of %u threads", kernel, grid.x,
                  grid.y, threads);
    return;
  }
  prepare_fibers(threads);
  begin_launch();
  for (indices.block.y = 0; indices.block.y < grid.y; ++indices.block.y) {
    for (indices.block.x = 0; indices.block.x < grid.x; ++indices.block.x) {
      run_block(threads);
      if (failure[0] != 0) return;
    }
  }
}

uint32_t exchange(uint32_t value, unsigned source) {
  if (source >= 32) fail("it shuffles from lane %u", source);
  const uint32_t given[1] = {value};
  return meet(Meeting::kShuffle, __builtin_return_address(0), given)[source][0];
}

uint32_t exchange_transposed(uint32_t pair) {
  const uint32_t given[1] = {pair};
  const auto* lanes = meet(Meeting::kTranspose, __builtin_return_address(0), given);
  const int group = indices.thread.x % 32 / 4, member = indices.thread.x % 4;
  uint32_t transposed = 0;
  for (int i = 0; i < 2; ++i) {
    const uint32_t source = lanes[(member * 2 + i) * 4 + group / 2][0];
    transposed |= (source >> (16 * (group & 1)) & 0xFFFF) << (16 * i);
  }
  return transposed;
}

// Element k of a fragment's row, whose pairs or single elements the four lanes from `first` on hold.
static double factor_at(const uint32_t (*lanes)[6], Factors factors, int first, int k, int lower, int upper) {
  if (factors == Factors::kTf32) return bits_float(lanes[first + k % 4][k / 4 ? upper : lower] & 0xFFFFE000u);
  const uint16_t bits = uint16_t(lanes[first + k % 8 / 2][k / 8 ? upper : lower] >> (16 * (k & 1)));
  return factors == Factors::kBFloat16 ? BFloat16::widen(bits) : Float16::widen(bits);
}

// Fragment layouts: PTX manual, "Matrix fragments for mma.m16n8k16 with floating point type" and those "for mma.m16n8k8".
void multiply(Factors factors, int k, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const uint32_t given[6] = {a[0], a[1], a[2], a[3], b0, b1};
  const auto* lanes = meet(Meeting::kProduct, __builtin_return_address(0), given);
  const int group = indices.thread.x % 32 / 4, member = indices.thread.x % 4;
  for (int i = 0; i < 4; ++i) {
    const int row = group + (i >> 1) * 8, column = member * 2 + (i & 1);
    double sum = d[i];
    for (int j = 0; j < k; ++j) {
      sum += factor_at(lanes, factors, row % 8 * 4, j, row / 8, row / 8 + 2) * factor_at(lanes, factors, column * 4, j, 4, 5);
    }
    d[i] = float(sum);
  }
}

void wait_for_block() {
  if (block_barrier.arrived + 1 == indices.block_size.x) ++block_epoch;
  wait(block_barrier, indices.block_size.x);
}

// The copy itself is made as late as it may be.
// A copy is made as late as it may be.
void wait_for_copies(unsigned still_under_way) {
  auto& under_way = fibers[current].under_way;
  for (; under_way.size() > still_under_way; under_way.pop_front()) {
    for (const Copy& copy : under_way.front()) end_copy(copy.shared, copy.global);
  }
}

}  // namespace sda::emulation

namespace sda {

void sync_warp() {
  emulation::Warp& warp = emulation::own_warp();
  if (warp.barrier.arrived == 31) ++warp.barriers;
  emulation::meet(emulation::Meeting::kBarrier, __builtin_return_address(0), {0});
}

void copy_async(void* shared, const void* global) {
  emulation::begin_copy(shared, global);
  emulation::fibers[emulation::current].copies.push_back({shared, global});
}

void commit_copies() {
  emulation::Fiber& fiber = emulation::fibers[emulation::current];
  fiber.under_way.push_back(std::move(fiber.copies));
  fiber.copies.clear();
}

int multiprocessor_count() { return emulation::multiprocessors; }

}  // namespace sda

extern "C" {

void emulated_set_multiprocessors(int count) { sda::emulation::multiprocessors = count; }

// Forgets the tensors and the failure, of which the message is returned; empty if there was none.
const char* emulated_end() {
  using namespace sda::emulation;
  static char message[1024];
  std::snprintf(message, sizeof message, "%s", failure.data());
  failure[0] = 0;
  forget_tensors();
  return message;
}
}
