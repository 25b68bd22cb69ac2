// What the two halves of the emulator know of each other: emulated_threads.cpp and emulated_memory.cpp.
#pragma once

#include "emulator.h"

namespace sda::emulation {

constexpr unsigned kMostThreads = 1024, kMostWarps = kMostThreads / 32;

struct Range {
  const char *first = nullptr, *last = nullptr;
  bool holds(const void* address) const { return address >= first && address < last; }
};

// Threads.
extern bool in_fiber;         // a thread of a kernel runs
extern uint32_t block_epoch;  // barriers of blocks, and blocks, so far
extern uint32_t first_epoch;  // of the block that runs
uint32_t warp_barriers();     // that this thread's warp has passed
Range fiber_stacks();
// Ends the launch, and says why once the caller asks for it; the first reason counts.
[[noreturn]] void fail(const char* format, ...);

// Memory.
void begin_launch();
void begin_copy(void* shared, const void* global);
void end_copy(void* shared, const void* global);
void forget_tensors();

}  // namespace sda::emulation
