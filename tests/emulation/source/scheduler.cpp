// Fibers, the order in which they run, and barriers of blocks.
#include <sys/mman.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <numeric>
#include <unordered_map>

#include "state.h"

namespace emulation {

Settings settings;
Thread* current = nullptr;
Block block;
std::string failure;

namespace {

constexpr size_t STACK = 128 << 10, MOST_THREADS = 1024;
void* scheduler_stack = nullptr;
void (*body)(void*) = nullptr;
void* body_arguments = nullptr;
bool failed = false;
uint64_t random_state = 1;
std::unordered_map<const void*, int64_t> allowed_shared;

// Saves what a function must keep on the stack, and goes on where another stack was left.
__attribute__((naked, noinline)) void change_stack(void**, void*) {
  asm volatile(
      "push %rbp; push %rbx; push %r12; push %r13; push %r14; push %r15; mov %rsp, (%rdi); mov %rsi, %rsp;"
      "pop %r15; pop %r14; pop %r13; pop %r12; pop %rbx; pop %rbp; ret");
}

char* stacks() {
  static char* memory = [] {
    void* made = mmap(nullptr, STACK * MOST_THREADS, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (made == MAP_FAILED) abort();
    set_fiber_stacks((char*)made, STACK * MOST_THREADS);
    return (char*)made;
  }();
  return memory;
}

void give_way() { change_stack(&current->stack_pointer, scheduler_stack); }

void open_barrier() {
  block.arrived = 0;
  block.epoch++;
  for (Thread& thread : block.threads)
    if (thread.state == State::WAITING && block.warps[thread.warp].lanes[thread.lane].kind == 0)
      thread.state = State::RUNNABLE;
}

void start_of_fiber() {
  body(body_arguments);
  Thread& thread = *current;
  Warp& warp = block.warps[thread.warp];
  thread.state = State::DONE;
  thread.where = "its end";
  warp.alive &= ~(1u << thread.lane);
  block.alive--;
  if (block.arrived && settings.strict) {
    const auto waits = std::find_if(block.threads.begin(), block.threads.end(), [](const Thread& t) {
      return t.state == State::WAITING && block.warps[t.warp].lanes[t.lane].kind == 0;
    });
    fail("ends, but %s waits at a barrier at %s, which some threads never reach", name_of(*waits).c_str(),
         waits->where);
  }
  if (block.arrived && block.arrived == block.alive) open_barrier();
  thread_left(warp);
  for (;;) give_way();
}

void begin_threads() {
  char* memory = stacks();
  for (Thread& thread : block.threads) {
    void** top = (void**)(memory + STACK * (thread.number + 1) - 64);
    *--top = nullptr;
    *--top = (void*)start_of_fiber;
    for (int i = 0; i < 6; i++) *--top = nullptr;
    thread.stack_pointer = top;
  }
}

// Runs the threads of the block until all have ended, or the launch has failed.
void run_threads() {
  std::vector<unsigned> order(block.threads.size());
  std::iota(order.begin(), order.end(), 0);
  if (settings.schedule == Schedule::REVERSE) std::reverse(order.begin(), order.end());
  while (block.alive && !failed) {
    if (settings.schedule == Schedule::RANDOM)
      for (size_t i = order.size(); i > 1; i--) std::swap(order[i - 1], order[random_number() % i]);
    bool moved = false;
    for (unsigned number : order) {
      Thread& thread = block.threads[number];
      if (thread.state != State::RUNNABLE) continue;
      moved = true;
      current = &thread;
      change_stack(&scheduler_stack, thread.stack_pointer);
      current = nullptr;
      if (failed) return;
    }
    if (!moved) {
      failed = true;
      std::string all = "all threads wait for others:";
      const char* last = nullptr;
      for (const Thread& thread : block.threads)
        if (thread.state == State::WAITING && thread.where != last) {
          all += " " + name_of(thread) + " at " + thread.where + ";";
          last = thread.where;
        }
      failure = all;
    }
  }
}

void make_block(const Launch& shape, unsigned number) {
  const unsigned threads = shape.block.x * shape.block.y * shape.block.z;
  block.index = {number % shape.grid.x, number / shape.grid.x % shape.grid.y, number / (shape.grid.x * shape.grid.y)};
  block.size = {shape.block.x, shape.block.y, shape.block.z};
  block.grid = {shape.grid.x, shape.grid.y, shape.grid.z};
  block.threads.assign(threads, Thread{});
  block.warps.assign((threads + 31) / 32, Warp{});
  block.alive = threads;
  block.arrived = 0;
  block.epoch++;  // what other blocks did lies in the past
  for (unsigned i = 0; i < threads; i++) {
    Thread& thread = block.threads[i];
    thread.number = i;
    thread.index = {i % block.size.x, i / block.size.x % block.size.y, i / (block.size.x * block.size.y)};
    thread.lane = i & 31;
    thread.warp = i >> 5;
    block.warps[thread.warp].alive |= 1u << thread.lane;
  }
}

int refuse(const char* sentence) {
  failure = sentence;
  return 1;
}

}  // namespace

uint3 thread_index() { return current->index; }
uint3 block_index() { return block.index; }
uint3 block_size() { return block.size; }
uint3 grid_size() { return block.grid; }

std::string name_of(const Thread& thread) {
  char text[96];
  snprintf(text, sizeof text, "thread %u of block (%u, %u, %u)", thread.number, block.index.x, block.index.y,
           block.index.z);
  return text;
}

uint64_t random_number() {
  random_state = random_state * 6364136223846793005ull + 1442695040888963407ull;
  return random_state >> 33;
}

void wait() {
  do give_way();
  while (current->state == State::WAITING);
}

void yield() { give_way(); }

void fail(const char* format, ...) {
  char text[1024];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  failure = name_of(*current) + " " + text;
  failed = true;
  for (;;) give_way();  // the scheduler never comes back
}

int block_barrier(Vote vote, int value, const char* where) {
  if (settings.strict) {
    if (block.alive != block.threads.size()) fail("waits at a barrier at %s, which ended threads never reach", where);
    for (const Thread& other : block.threads)
      if (&other != current && other.state == State::WAITING && block.warps[other.warp].lanes[other.lane].kind == 0 &&
          std::string(other.where) != where)
        fail("waits at a barrier at %s, but %s at another at %s", where, name_of(other).c_str(), other.where);
  }
  if (!block.arrived) block.votes = vote == Vote::ALL;
  if (vote == Vote::COUNT) block.votes += value != 0;
  if (vote == Vote::ALL) block.votes &= value != 0;
  if (vote == Vote::ANY) block.votes |= value != 0;
  current->where = where;
  if (++block.arrived == block.alive) {
    const int votes = block.votes;
    for (Thread& thread : block.threads) thread.vote = votes;
    open_barrier();
  } else {
    current->state = State::WAITING;
    wait();
  }
  return current->vote;
}

void allow_dynamic_shared(const void* kernel, size_t bytes) { allowed_shared[kernel] = bytes; }

int device_attribute(int attribute, int* value) {
  switch (attribute) {
    case 16: *value = settings.processors; return 0;
    case 75: *value = settings.capability / 10; return 0;
    case 76: *value = settings.capability % 10; return 0;
    case 81: *value = settings.shared_limit + 1024; return 0;
    case 97: *value = settings.shared_limit; return 0;
  }
  return refuse("the emulation does not know an attribute of the device that was asked for");
}

int launch(const void* kernel, const Launch& shape, void (*call)(void*), void* arguments) {
  const int64_t threads = (int64_t)shape.block.x * shape.block.y * shape.block.z;
  const int64_t blocks = (int64_t)shape.grid.x * shape.grid.y * shape.grid.z;
  if (threads < 1 || threads > (int64_t)MOST_THREADS || shape.block.z > 64)
    return refuse("a block has 1 to 1024 threads");
  if (blocks < 1 || shape.grid.x > 2147483647u || shape.grid.y > 65535 || shape.grid.z > 65535)
    return refuse("a grid has at least one block, and at most 65535 along y and z");
  const auto allowed = allowed_shared.find(kernel);
  const int64_t most = allowed == allowed_shared.end() ? 48 << 10 : std::max<int64_t>(48 << 10, allowed->second);
  if ((int64_t)shape.dynamic_shared > most) return refuse("more dynamic shared memory than the kernel is allowed");
  if ((int64_t)shape.dynamic_shared > settings.shared_limit)
    return refuse("more dynamic shared memory than the device has");
  body = call;
  body_arguments = arguments;
  failed = false;
  failure.clear();
  random_state = settings.seed * 0x9e3779b97f4a7c15ull + 1;
  block.epoch = 0;
  find_shared(kernel);
  set_host_stack(arguments);
  std::vector<unsigned> order(blocks);
  std::iota(order.begin(), order.end(), 0);
  if (settings.schedule == Schedule::REVERSE) std::reverse(order.begin(), order.end());
  if (settings.schedule == Schedule::RANDOM)
    for (size_t i = order.size(); i > 1; i--) std::swap(order[i - 1], order[random_number() % i]);
  for (unsigned number : order) {
    make_block(shape, number);
    begin_block(shape.dynamic_shared);
    begin_threads();
    run_threads();
    if (failed) return 719;
  }
  return 0;
}

}  // namespace emulation
