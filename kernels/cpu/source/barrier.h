// Where the threads of a parallel region wait for each other, hundreds of times per token.
#pragma once
#include <sched.h>

#include <atomic>
#include <climits>
#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace compress {

// Waiting threads spin for some microseconds. On a busy machine the one that is waited for may have no processor; then
// they sleep, so that it gets one, and so that they are the first to run once they are woken.
class Barrier {
 public:
  // Return when all `threads` have called this.
  void wait(int threads) {
    if (threads == 1) return;
    const int phase = phase_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads) {
      arrived_.store(0, std::memory_order_relaxed);
      phase_.store(phase + 1, std::memory_order_seq_cst);
      if (sleeping_.load(std::memory_order_seq_cst)) wake();
      return;
    }
    for (int turns = 0; phase_.load(std::memory_order_acquire) == phase; turns++)
      if (turns < PATIENCE)
        rest();
      else
        sleep(phase);
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

#if defined(__linux__)
  void sleep(int phase) {  // unless the phase is another by now
    sleeping_.fetch_add(1, std::memory_order_seq_cst);
    syscall(SYS_futex, &phase_, FUTEX_WAIT_PRIVATE, phase, nullptr, nullptr, 0);
    sleeping_.fetch_sub(1, std::memory_order_seq_cst);
  }
  void wake() { syscall(SYS_futex, &phase_, FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0); }
#else
  void sleep(int) { sched_yield(); }
  void wake() {}
#endif

  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<int> phase_{0};
  alignas(64) std::atomic<int> sleeping_{0};
};

}  // namespace compress
