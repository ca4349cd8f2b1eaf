// The launch that is running: its block, warps and threads, and what is known of its memory.
#pragma once
#include <cstdint>
#include <deque>
#include <string>
#include <vector>

#include "../include/emulation.h"

namespace emulation {

enum class Schedule { FORWARD, REVERSE, RANDOM };

struct Settings {
  Schedule schedule = Schedule::FORWARD;
  bool strict = true;
  uint64_t seed = 1;
  int64_t steps = 1LL << 33;           // loads, stores and waits after which a launch is taken to hang
  int64_t shared_limit = 99 * 1024;    // dynamic shared memory that a kernel may ask for
  int64_t capability = 80, processors = 4;
};

enum class State { RUNNABLE, WAITING, DONE };

struct Copy {
  char* shared;
  const char* global;
  int bytes, present;
  const char* where;
};

// What a lane hands over at a collective of its warp, and what it gets.
struct Lane {
  int kind = 0;  // which collective: see warp.cpp
  unsigned mask = 0;
  const char* where = "";
  uint64_t given[4] = {}, result[4] = {};
  unsigned by = 0, width = 32;
};

struct Thread {
  uint3 index;
  unsigned number, lane, warp;
  State state = State::RUNNABLE;
  const char* where = "its start";
  void* stack_pointer = nullptr;
  std::vector<Copy> open;
  std::deque<std::vector<Copy>> groups;
  int vote = 0;
};

struct Warp {
  unsigned waiting = 0, alive = 0, epoch = 0;
  Lane lanes[32];
};

struct Block {
  uint3 index, size, grid;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  unsigned alive = 0, arrived = 0, epoch = 0;
  int votes = 0;
};

extern Settings settings;
extern Thread* current;  // null where no kernel runs
extern Block block;
extern std::string failure;

// Ends the launch with a sentence. Only threads of a kernel may call it; it does not return to them.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));
std::string name_of(const Thread& thread);

uint64_t random_number();
void wait();   // gives way until the thread is runnable again
void yield();  // gives way, and may go on at once

// warp.cpp
void thread_left(Warp& warp);

// memory.cpp
void find_shared(const void* kernel);
void begin_block(size_t dynamic_shared);
void land_all(Thread& thread, size_t groups_left);
void set_host_stack(const void* here);
void set_fiber_stacks(const char* from, size_t bytes);

}  // namespace emulation
