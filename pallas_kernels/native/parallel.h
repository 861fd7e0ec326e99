// Work shared by the calling thread and those of XLA's own pool.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <thread>
#include <utility>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace jaxserve {

// `count` independent items; items of a later phase start when all of the earlier ones are done.
struct Phase {
  int64_t count;
  std::function<void(int64_t)> body;
};

class Job {
 public:
  explicit Job(std::vector<Phase> phases) : phases_(std::move(phases)), progress_(phases_.size()) {}

  // Takes items until none is left. Whoever comes late finds no item, and so touches nothing of a caller that has gone on.
  void Work() {
    for (size_t p = 0; p < phases_.size(); ++p) {
      Progress& progress = progress_[p];
      const int64_t count = phases_[p].count;
      for (int64_t item; (item = progress.next.fetch_add(1, std::memory_order_relaxed)) < count;) {
        phases_[p].body(item);
        progress.done.fetch_add(1, std::memory_order_release);
      }
      for (int spins = 0; progress.done.load(std::memory_order_acquire) < count; ++spins) {
        if (spins > kSpins) std::this_thread::yield();
      }
    }
  }

 private:
  static constexpr int kSpins = 20000;  // then the thread that is waited for may lack a core

  struct alignas(64) Progress {
    std::atomic<int64_t> next{0};
    alignas(64) std::atomic<int64_t> done{0};
  };

  std::vector<Phase> phases_;
  std::vector<Progress> progress_;
};

// Runs the phases on up to `threads` threads, the caller's among them; returns when all is done. Nobody waits for a thread to
// start: the caller alone would finish too.
inline void Run(xla::ffi::ThreadPool& pool, int64_t threads, std::vector<Phase> phases) {
  auto job = std::make_shared<Job>(std::move(phases));
  for (int64_t i = 1; i < threads; ++i) pool.Schedule([job] { job->Work(); });
  job->Work();
}

}  // namespace jaxserve
