// Threads of a GPU as fibers; see emulated.h.
// SPDX-License-Identifier: MIT
#include "gpu/runtime/emulated.h"

#include <ucontext.h>

#include <algorithm>
#include <atomic>
#include <csetjmp>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <vector>

namespace bnb::gpu::emulated {

Place place;

namespace {

constexpr size_t kStackBytes = 256 * 1024;
constexpr int kWarpSize = 32;

struct Copy {
  void* to;
  const void* from;
  size_t bytes;
  int group;
};

struct Fiber {
  std::unique_ptr<char[]> stack;
  ucontext_t start;
  jmp_buf resume;
  bool started;
  bool done;
  dim3 index;
  int group;  // of copies that is open
  std::vector<Copy> copies;
};

// A place where `members` fibers wait for each other, again and again.
struct Meeting {
  int members = 0;
  int arrived = 0;
  uint64_t number = 0;  // of meetings that took place
  bool all = true;
  bool all_of_last = true;
};

struct Warp {
  Meeting meeting;
  // Two, so that quick lanes may leave the next value while slow ones read this.
  char values[2][kWarpSize * 16];
};

std::vector<Fiber> fibers;
std::vector<Warp> warps;
Meeting barrier;
std::vector<char> shared;
const std::function<void()>* body;
Fiber* current;
jmp_buf scheduler;
std::atomic<int64_t> launches;
uint64_t progress;  // changes when something happened that others may wait for

void finish_meeting(Meeting& m) {
  m.arrived = 0;
  m.all_of_last = m.all;
  m.all = true;
  ++m.number;
  ++progress;
}

void yield() {
  const Place own = place;
  if (_setjmp(current->resume) == 0) _longjmp(scheduler, 1);
  place = own;
}

void meet(Meeting& m) {
  const uint64_t number = m.number;
  ++progress;
  if (++m.arrived == m.members) {
    finish_meeting(m);
    return;
  }
  while (m.number == number) yield();
}

void leave(Meeting& m) {
  --m.members;
  if (m.members > 0 && m.arrived == m.members) finish_meeting(m);
}

Warp& own_warp() { return warps[static_cast<size_t>(current - fibers.data()) / kWarpSize]; }

void enter() {
  (*body)();
  current->done = true;
  ++progress;
  leave(own_warp().meeting);
  leave(barrier);
  _longjmp(scheduler, 1);
}

void run_block() {
  for (size_t i = 0; i < fibers.size(); ++i) {
    Fiber& f = fibers[i];
    if (!f.stack) f.stack = std::make_unique_for_overwrite<char[]>(kStackBytes);
    f.started = f.done = false;
    f.group = 0;
    f.copies.clear();
    const unsigned x = static_cast<unsigned>(i);
    const dim3& size = place.block_size;
    f.index = dim3(x % size.x, x / size.x % size.y, x / size.x / size.y);
    getcontext(&f.start);
    f.start.uc_stack.ss_sp = f.stack.get();
    f.start.uc_stack.ss_size = kStackBytes;
    f.start.uc_link = nullptr;
    makecontext(&f.start, enter, 0);
  }
  warps.assign((fibers.size() + kWarpSize - 1) / kWarpSize, Warp{});
  for (size_t w = 0; w < warps.size(); ++w) {
    warps[w].meeting.members =
        static_cast<int>(std::min<size_t>(kWarpSize, fibers.size() - w * kWarpSize));
  }
  barrier = Meeting{};
  barrier.members = static_cast<int>(fibers.size());
  std::fill(shared.begin(), shared.end(), static_cast<char>(0xff));

  // Every other block backwards: what one thread writes for another without a barrier between them
  // is then missed in one block or the next.
  static bool backwards = false;
  backwards = !backwards;
  const Place of_block = place;
  volatile size_t left = fibers.size();
  while (left > 0) {
    const uint64_t before = progress;
    for (volatile size_t turn = 0; turn < fibers.size();) {
      const size_t i = turn;
      turn = i + 1;
      Fiber& next = fibers[backwards ? fibers.size() - 1 - i : i];
      if (next.done) continue;
      current = &next;
      place = of_block;
      place.thread = current->index;
      if (_setjmp(scheduler) == 0) {
        if (!current->started) {
          current->started = true;
          setcontext(&current->start);
        }
        _longjmp(current->resume, 1);
      }
      if (current->done) {
        const size_t rest = left;
        left = rest - 1;
      }
    }
    if (progress == before && left > 0) {
      throw std::logic_error("a barrier or warp operation was reached by some of its threads only");
    }
  }
  place = of_block;
}

}  // namespace

void run(const std::function<void()>& thread, dim3 grid, dim3 block, int shared_bytes) {
  static std::mutex one_at_a_time;  // static shared memory is one per process
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  ++launches;
  body = &thread;
  fibers.resize(block.x * block.y * block.z);
  shared.resize(static_cast<size_t>(shared_bytes) + 16);
  place = {{}, {}, block, grid};
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        place.block = dim3(x, y, z);
        run_block();
      }
    }
  }
}

char* dynamic_shared() {
  const auto address = reinterpret_cast<uintptr_t>(shared.data());
  return shared.data() + (16 - address % 16) % 16;
}

bool block_all(bool condition) {
  barrier.all = barrier.all && condition;
  meet(barrier);
  return barrier.all_of_last;
}

void SplitBarrier::arrive() {
  ++progress;
  if (++arrived == arrivals) {
    arrived = 0;
    ++phase;
  }
}

void SplitBarrier::wait(uint32_t parity) {
  while (phase % 2 == parity) yield();
}

void exchange(const void* value, size_t size, void* values) {
  Warp& warp = own_warp();
  char* const buffer = warp.values[warp.meeting.number % 2];
  if (size * kWarpSize > sizeof(warp.values[0])) throw std::logic_error("value too large");
  std::memcpy(buffer + static_cast<size_t>(lane()) * size, value, size);
  meet(warp.meeting);
  std::memcpy(values, buffer, size * kWarpSize);
}

void start_copy(void* to, const void* from, size_t bytes) {
  current->copies.push_back({to, from, bytes, current->group});
}

void close_copy_group() { ++current->group; }

void wait_copies(int open) {
  std::erase_if(current->copies, [&](const Copy& copy) {
    if (copy.group >= current->group - open) return false;
    std::memcpy(copy.to, copy.from, copy.bytes);
    return true;
  });
}

}  // namespace bnb::gpu::emulated

// Kernels that this process started, for tests.
extern "C" [[gnu::visibility("default")]] int64_t bnb_emulated_launches() {
  return bnb::gpu::emulated::launches;
}
