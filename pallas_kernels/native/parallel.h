// Work that the calling thread shares with the threads of XLA's own pool.
#pragma once

#include <immintrin.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <new>
#include <thread>
#include <utility>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace jaxserve {

// Returns the item that a thread will most likely work on next. There is none if it is not below the phase's count.
struct Upcoming {
  const std::atomic<int64_t>& next;
  int64_t operator()() const { return next.load(std::memory_order_relaxed); }
};

// `count` independent items of work. Items of a phase start when all items of the phase before are done.
struct Phase {
  int64_t count;
  std::function<void(int64_t, Upcoming)> body;
  std::function<void(int64_t)> fetch = nullptr;  // fetches into a cache what an item will read
};

class Job {
 public:
  explicit Job(std::vector<Phase> phases) : phases_(std::move(phases)), progress_(phases_.size()) {}

  // Takes items until none is left. A thread that comes late finds no item, so it reads nothing of a caller that has returned.
  void Work() {
    int64_t item = Take(0);
    for (size_t p = 0; p < phases_.size(); ++p) {
      Progress& progress = progress_[p];
      const int64_t count = phases_[p].count;
      for (; item < count; item = Take(p)) {
        phases_[p].body(item, Upcoming{progress.next});
        progress.done.fetch_add(1, std::memory_order_release);
      }
      if (p + 1 < phases_.size()) {
        item = Take(p + 1);
        if (phases_[p + 1].fetch && item < phases_[p + 1].count) phases_[p + 1].fetch(item);
      }
      for (int spins = 0; progress.done.load(std::memory_order_acquire) < count; ++spins) {
        _mm_pause();
        if (spins > kSpins) std::this_thread::yield();
      }
    }
  }

 private:
  static constexpr int kSpins = 10000;  // after so many the thread that is waited for may lack a core

  struct alignas(64) Progress {
    std::atomic<int64_t> next{0};
    alignas(64) std::atomic<int64_t> done{0};
  };

  int64_t Take(size_t phase) { return progress_[phase].next.fetch_add(1, std::memory_order_relaxed); }

  std::vector<Phase> phases_;
  std::vector<Progress> progress_;
};

// Threads that help the caller of the moment. A helper looks for more work for a while after it has finished: the next kernel of
// a model comes within microseconds, while waking a thread takes some twenty. No caller waits for a helper to start, and a caller
// without helpers finishes too. Of two callers at the same time, the later one has the helpers.
class Team {
 public:
  static Team& Get() {
    static Team* team = new Team;  // never freed, because helpers may run until the process ends
    return *team;
  }

  void Run(xla::ffi::ThreadPool& pool, int64_t threads, std::vector<Phase> phases) {
    auto job = std::make_shared<Job>(std::move(phases));
    if (threads > 1) {
      {
        std::lock_guard<std::mutex> lock(mutex_);
        current_ = job;
      }
      posted_.fetch_add(1, std::memory_order_release);
      while (helpers_.load(std::memory_order_relaxed) < threads - 1) {
        helpers_.fetch_add(1, std::memory_order_relaxed);
        pool.Schedule([this] { Help(); });
      }
    }
    job->Work();
  }

 private:
  using Clock = std::chrono::steady_clock;
  static constexpr auto kStay = std::chrono::microseconds(200);

  void Help() {
    uint64_t seen = 0;
    for (auto since = Clock::now();;) {
      const uint64_t posted = posted_.load(std::memory_order_acquire);
      if (posted != seen) {
        seen = posted;
        std::shared_ptr<Job> job;
        {
          std::lock_guard<std::mutex> lock(mutex_);
          job = current_;
        }
        job->Work();
        since = Clock::now();
      } else if (Clock::now() - since > kStay) {
        break;
      }
      _mm_pause();
    }
    helpers_.fetch_sub(1, std::memory_order_relaxed);
  }

  std::mutex mutex_;
  std::shared_ptr<Job> current_;
  std::atomic<uint64_t> posted_{0};
  std::atomic<int64_t> helpers_{0};
};

// Calls `run`. If there is no memory for it, returns the error.
template <typename F>
xla::ffi::Error Guarded(const F& run) {
  try {
    run();
  } catch (const std::bad_alloc&) {
    return xla::ffi::Error(xla::ffi::ErrorCode::kResourceExhausted, "no memory for the scratch of a native kernel");
  }
  return xla::ffi::Error::Success();
}

// Runs the phases on up to `threads` threads, of which the caller's is one. Returns when all phases are done.
inline void Run(xla::ffi::ThreadPool& pool, int64_t threads, std::vector<Phase> phases) {
  Team::Get().Run(pool, threads, std::move(phases));
}

}  // namespace jaxserve
