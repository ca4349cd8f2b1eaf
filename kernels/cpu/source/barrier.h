// Where the threads of a parallel region wait for each other, hundreds of times per token.
#pragma once
#include <atomic>

#include <sched.h>

namespace compress {

class Barrier {
 public:
  // Return when all `threads` have called this. A thread gives its processor away when it has waited for long, because
  // the one it waits for may need it.
  void wait(int threads) {
    if (threads == 1) return;
    const int phase = phase_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads) {
      arrived_.store(0, std::memory_order_relaxed);
      phase_.store(phase + 1, std::memory_order_release);
      return;
    }
    for (int turns = 0; phase_.load(std::memory_order_acquire) == phase; turns++)
      if (turns < PATIENCE)
        rest();
      else
        sched_yield();
  }

 private:
  static constexpr int PATIENCE = 2000;

  static void rest() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
  }

  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<int> phase_{0};
};

}  // namespace compress
