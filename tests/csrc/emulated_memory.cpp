// The other half of the emulator: a check of every access to memory.
//
// GCC's -fsanitize=thread puts a call before every load and store of the kernels; the functions that it calls are here (this
// file itself is compiled without). They hold the kernels to CUDA's rules, whatever order the fibers happen to run in:
// - Shared memory: an access conflicts with one of another thread unless a barrier of the block, or of the warp if both are
//   of one, lies between them. A shuffle or a matrix product orders no memory. What no thread of the block has written is not
//   read, and nothing touches the destination of a copy that is under way.
// - Global memory: every access lies in a tensor that the launch was given, rows of a strided one included; no two threads of
//   a launch touch the same element if one of them writes; what is written is not loaded by the read-only path.
// - Every access is aligned to its size.
// -fsanitize=signed-integer-overflow,shift,bounds does the same for what the optimiser may assume never to happen.
#include <cstring>
#include <link.h>
#include <memory>
#include <pthread.h>
#include <vector>

#include "emulator_state.h"

namespace sda::emulation {
namespace {

uint64_t launches = 0;

// Who touched an element of a tensor in a launch.
struct GlobalCell {
  uint64_t launch;
  uint32_t writer, reader;  // numbers of threads, from 1 on; 0 for none, ~0 for several
  uint32_t is_read_only;    // it was loaded by the read-only path
};

// The elements of a tensor: rows of row_bytes, `stride` apart.
struct Region {
  char* first;
  int64_t rows, row_bytes, stride;
  bool is_written;
  std::vector<GlobalCell> cells;  // of two bytes each, of a written one

  bool holds(const char* address, size_t bytes) const {
    const int64_t offset = address - first;
    if (offset < 0 || rows == 0) return false;
    const int64_t row = stride == 0 ? 0 : offset / stride;
    return row < rows && offset - row * stride + int64_t(bytes) <= row_bytes;
  }
};

std::vector<Region> regions;

// When an element of shared memory was touched: after which barriers of the block and of the warp, and by whom.
struct Moment {
  uint32_t epoch = 0, warp_barriers = 0;
  uint16_t thread = 0;
  bool by_several = false;  // lanes of the thread's warp
};

// Two bytes of shared memory.
struct SharedCell {
  Moment written, read[kMostWarps];  // at last; read by each warp
  uint32_t copies = 0;               // under way to it, started in the block of `epoch`
  uint32_t epoch = 0;
};

constexpr size_t kPageBytes = 1024, kCellBytes = 2;
struct Page {
  SharedCell cells[kPageBytes / kCellBytes];
};

Range image, writable_image, host_stack;
std::vector<std::unique_ptr<Page>> pages;  // of the writable image
std::vector<size_t> used_pages;
std::vector<std::unique_ptr<Page>> spare_pages;

int find_image(dl_phdr_info* object, size_t, void*) {
  const char* base = reinterpret_cast<const char*>(object->dlpi_addr);
  const char* own = reinterpret_cast<const char*>(&indices);
  Range all, writable;
  bool is_own = false;
  for (int i = 0; i < object->dlpi_phnum; ++i) {
    const auto& header = object->dlpi_phdr[i];
    if (header.p_type != PT_LOAD) continue;
    const Range segment{base + header.p_vaddr, base + header.p_vaddr + header.p_memsz};
    if (all.first == nullptr || segment.first < all.first) all.first = segment.first;
    if (segment.last > all.last) all.last = segment.last;
    if (segment.holds(own)) is_own = true, writable = segment;
  }
  if (!is_own) return 0;
  image = all, writable_image = writable;
  return 1;
}

void find_memory() {
  if (image.first == nullptr) {
    dl_iterate_phdr(find_image, nullptr);
    pages.resize((writable_image.last - writable_image.first) / kPageBytes + 1);
  }
  pthread_attr_t attributes;
  void* first;
  size_t bytes;
  if (host_stack.holds(&attributes)) return;
  pthread_getattr_np(pthread_self(), &attributes);
  pthread_attr_getstack(&attributes, &first, &bytes);
  pthread_attr_destroy(&attributes);
  host_stack = {static_cast<char*>(first), static_cast<char*>(first) + bytes};
}

SharedCell& shared_cell(const char* address) {
  const size_t offset = address - writable_image.first, page = offset / kPageBytes;
  if (pages[page] == nullptr) {
    if (spare_pages.empty()) spare_pages.emplace_back(new Page);
    pages[page] = std::move(spare_pages.back());
    spare_pages.pop_back();
    used_pages.push_back(page);
  }
  SharedCell& cell = pages[page]->cells[offset % kPageBytes / kCellBytes];
  if (cell.epoch != first_epoch) cell.epoch = first_epoch, cell.copies = 0;
  return cell;
}

// Whether what happened then is ordered before what this thread does now.
bool is_before(const Moment& then) {
  const unsigned thread = indices.thread.x;
  if (then.epoch != block_epoch) return true;  // a barrier of the block since, or another block
  if (then.thread / 32 != thread / 32) return false;
  return then.warp_barriers != warp_barriers() || (!then.by_several && then.thread == thread);
}

Moment now() { return {block_epoch, warp_barriers(), uint16_t(indices.thread.x), false}; }

void check_no_conflict(const SharedCell& cell, bool writes) {
  if (cell.copies > 0) fail("it touches shared memory to which a copy is under way");
  if (!is_before(cell.written)) {
    fail("it %s shared memory that thread %u wrote, with no barrier between", writes ? "writes" : "reads", cell.written.thread);
  }
  if (!writes) return;
  for (unsigned warp = 0; warp * 32 < indices.block_size.x; ++warp) {
    if (!is_before(cell.read[warp])) {
      fail("it writes shared memory that thread %u read, with no barrier between", cell.read[warp].thread);
    }
  }
}

void access_shared(const char* address, size_t bytes, bool writes) {
  for (size_t i = 0; i < bytes; i += kCellBytes) {
    SharedCell& cell = shared_cell(address + i);
    check_no_conflict(cell, writes);
    if (writes) {
      cell.written = now();
      continue;
    }
    if (cell.written.epoch < first_epoch) fail("it reads shared memory that was never written");
    Moment &last = cell.read[indices.thread.x / 32], next = now();
    const bool at_once = last.epoch == next.epoch && last.warp_barriers == next.warp_barriers;
    next.by_several = at_once && (last.by_several || last.thread != next.thread);
    last = next;
  }
}

void access_global(const char* address, size_t bytes, bool writes, bool is_read_only) {
  const uint32_t thread =
      (indices.block.y * indices.grid.x + indices.block.x) * indices.block_size.x + indices.thread.x + 1;
  bool inside = false;
  for (Region& region : regions) {
    if (!region.holds(address, bytes)) continue;
    if (!region.is_written) {
      inside = inside || !writes;
      continue;
    }
    inside = true;
    for (size_t i = 0; i < bytes; i += kCellBytes) {
      GlobalCell& cell = region.cells[(address + i - region.first) / kCellBytes];
      if (cell.launch != launches) cell = {launches, 0, 0, 0};
      if (cell.writer != 0 && cell.writer != thread) fail("it %s what another thread writes", writes ? "writes" : "reads");
      if (writes) {
        if (cell.reader != 0 && cell.reader != thread) fail("it writes what another thread reads");
        cell.writer = thread;
      } else {
        cell.reader = cell.reader == 0 || cell.reader == thread ? thread : ~0u;
        cell.is_read_only |= is_read_only;
      }
      if (cell.is_read_only && cell.writer != 0) fail("what is written is loaded by the read-only path");
    }
  }
  if (!inside) {
    fail("it %s %zu bytes outside every tensor that it may %s", writes ? "writes" : "reads", bytes, writes ? "write" : "read");
  }
}

inline void access(const void* place, size_t bytes, bool writes) {
  const char* address = static_cast<const char*>(place);
  if (!in_fiber || fiber_stacks().holds(address)) return;
  if (bytes <= 16 && reinterpret_cast<uintptr_t>(address) % bytes != 0) fail("misaligned access of %zu bytes", bytes);
  if (writable_image.holds(address)) {
    if (address < reinterpret_cast<const char*>(&indices) || address >= reinterpret_cast<const char*>(&indices + 1)) {
      access_shared(address, bytes, writes);
    }
  } else if (!image.holds(address) && !host_stack.holds(address)) {
    access_global(address, bytes, writes, false);
  }
}

[[noreturn]] void undefined(const char* file, uint32_t line, const char* what) { fail("%s in %s:%u", what, file, line); }

}  // namespace

void begin_launch() {
  ++launches;
  find_memory();
  for (const size_t page : used_pages) spare_pages.push_back(std::move(pages[page]));
  used_pages.clear();
}

void begin_copy(void* shared, const void* global) {
  check_alignment(shared, 16);
  check_alignment(global, 16);
  if (!writable_image.holds(shared)) fail("it copies to what is not shared memory");
  access_global(static_cast<const char*>(global), 16, false, false);
  for (size_t i = 0; i < 16; i += kCellBytes) {
    SharedCell& cell = shared_cell(static_cast<char*>(shared) + i);
    check_no_conflict(cell, true);
    ++cell.copies;
  }
}

void end_copy(void* shared, const void* global) {
  std::memcpy(shared, global, 16);
  for (size_t i = 0; i < 16; i += kCellBytes) {
    SharedCell& cell = shared_cell(static_cast<char*>(shared) + i);
    --cell.copies;
    cell.written = now();
  }
}

void forget_tensors() { regions.clear(); }

void check_alignment(const void* address, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(address) % bytes != 0) fail("misaligned access of %zu bytes", bytes);
}

void note_read_only(const void* address, size_t bytes) {
  access_global(static_cast<const char*>(address), bytes, false, true);
}

}  // namespace sda::emulation

using sda::emulation::access;
using sda::emulation::undefined;

extern "C" {

// Memory that launches may use from now on: `rows` pieces of `row_bytes`, `stride` bytes apart.
void emulated_allow(void* first, int64_t rows, int64_t row_bytes, int64_t stride, int is_written) {
  using namespace sda::emulation;
  if (rows <= 0 || row_bytes <= 0) return;
  for (Region& region : regions) {
    if (region.first == first && region.rows == rows && region.row_bytes == row_bytes && region.stride == stride) {
      if (region.is_written || !is_written) return;
    }
  }
  regions.push_back({static_cast<char*>(first), rows, row_bytes, stride, is_written != 0, {}});
  if (is_written) regions.back().cells.resize(((rows - 1) * stride + row_bytes) / kCellBytes + 1);
}

// What -fsanitize=thread calls.
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
#define SDA_ACCESS(bytes)                                                              \
  void __tsan_read##bytes(void* address) { access(address, bytes, false); }            \
  void __tsan_write##bytes(void* address) { access(address, bytes, true); }            \
  void __tsan_unaligned_read##bytes(void* address) { access(address, bytes, false); }  \
  void __tsan_unaligned_write##bytes(void* address) { access(address, bytes, true); }
SDA_ACCESS(1)
SDA_ACCESS(2)
SDA_ACCESS(4)
SDA_ACCESS(8)
SDA_ACCESS(16)
void __tsan_read_range(void* address, size_t bytes) { access(address, bytes, false); }
void __tsan_write_range(void* address, size_t bytes) { access(address, bytes, true); }

// What the other -fsanitize flags call: the first argument begins with the place in the source.
struct Place {
  const char* file;
  uint32_t line, column;
};
#define SDA_UNDEFINED(name, what) \
  void __ubsan_handle_##name(const Place* place, uintptr_t, uintptr_t) { undefined(place->file, place->line, what); }
SDA_UNDEFINED(add_overflow, "a sum overflows")
SDA_UNDEFINED(sub_overflow, "a difference overflows")
SDA_UNDEFINED(mul_overflow, "a product overflows")
SDA_UNDEFINED(negate_overflow, "a negation overflows")
SDA_UNDEFINED(divrem_overflow, "a quotient overflows")
SDA_UNDEFINED(shift_out_of_bounds, "a shift is too wide")
SDA_UNDEFINED(out_of_bounds, "an index is outside its array")
}
