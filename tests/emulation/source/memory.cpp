// What kernels do to memory. The compiler puts a call of __tsan_* before every load and store of a kernel; they
// are ours, and look at three kinds of memory:
//
// - tensors, which the caller has registered: bounds, alignment, bytes moved;
// - shared memory: bounds, alignment, uninitialised bytes (they are NaN), and races: two threads reach a byte, one
//   of them writes, and no barrier lies between;
// - anything else that a kernel may read: constants of its library, arguments, its own stack.
#include <dlfcn.h>
#include <link.h>

#include <algorithm>
#include <cstring>
#include <unordered_map>

#include "state.h"

namespace emulation {
namespace {

struct Range {
  const char* from = nullptr;
  size_t bytes = 0;
  bool has(const void* p, size_t n) const {
    const size_t at = (size_t)((const char*)p - from);
    return at < bytes && n <= bytes - at;
  }
};

constexpr size_t SECTOR = 32;

struct Buffer {
  Range range;
  std::string name;
  bool writable = false;
  int64_t read = 0, written = 0, copied = 0, fetched = 0;
  std::vector<bool> sectors;  // those that were read
};

// One load of a warp: the sectors that its lanes ask for, each of which is fetched once.
struct Fetch {
  const void* code;
  unsigned warp, turn;  // the how-manieth time that a lane comes to this code
  bool operator==(const Fetch& other) const {
    return code == other.code && warp == other.warp && turn == other.turn;
  }
};
struct FetchHash {
  size_t operator()(const Fetch& f) const {
    return ((size_t)f.code * 31 + f.warp) * 0x9e3779b97f4a7c15ull + f.turn * 0xff51afd7ed558ccdull;
  }
};

// Who reached a byte of shared memory last.
struct Trace {
  uint32_t write_epoch = 0, read_epoch = 0;            // of the block; 0: never
  uint32_t write_warp_epoch = 0, read_warp_epoch = 0;  // of the warp
  int16_t writer = -1, reader = -1;                    // threads
  bool by_warp = false, by_many = false;               // several lanes of the reader's warp; several warps
};

struct Library {
  Range image, shared;
  char* dynamic = nullptr;
};

std::vector<Buffer> buffers;
std::unordered_map<const void*, Library> libraries;
Library library;
size_t dynamic_bytes = 0;
std::vector<Trace> traces;
Range fiber_stacks, host_stack;
int64_t steps = 0, multiply_adds = 0, shared_bytes = 0;
size_t latest = 0;
std::unordered_map<Fetch, std::vector<size_t>, FetchHash> fetches;  // of this block
std::vector<std::unordered_map<const void*, unsigned>> turns;       // of its threads

void fetch(Buffer& b, const void* code, size_t at, size_t bytes) {
  const unsigned turn = turns[current->number][code]++;
  std::vector<size_t>& known = fetches[{code, current->warp, turn}];
  for (size_t s = at / SECTOR; s <= (at + bytes - 1) / SECTOR; s++) {
    const size_t sector = s * 64 + latest % 64;  // of two tensors they are different ones
    if (std::find(known.begin(), known.end(), sector) != known.end()) continue;
    known.push_back(sector);
    b.fetched += SECTOR;
  }
}

// Whether what a thread of this block did comes before what the current one does.
bool ordered(int thread, uint32_t epoch, uint32_t warp_epoch) {
  return thread == (int)current->number || epoch < block.epoch ||
         (block.threads[thread].warp == current->warp && warp_epoch < block.warps[current->warp].epoch);
}

[[noreturn]] void race(const char* what, size_t at, int other) {
  fail("%s byte %zu of shared memory after %s, and no barrier lies between", what, at,
       name_of(block.threads[other]).c_str());
}

void trace(size_t at, size_t bytes, bool write) {
  const uint32_t warp_epoch = block.warps[current->warp].epoch;
  for (size_t i = at; i < at + bytes; i++) {
    Trace& t = traces[i];
    if (t.write_epoch == block.epoch && !ordered(t.writer, t.write_epoch, t.write_warp_epoch))
      race(write ? "writes" : "reads", i, t.writer);
    const bool read_before = t.read_epoch == block.epoch;
    const bool alone = !t.by_warp && !t.by_many && t.reader == (int)current->number;
    if (write) {
      const bool passed = !t.by_many && read_before && t.read_warp_epoch < warp_epoch &&
                          block.threads[t.reader].warp == current->warp;
      if (read_before && !alone && !passed) race("overwrites", i, t.reader);
      t.writer = (int16_t)current->number;
      t.write_epoch = block.epoch;
      t.write_warp_epoch = warp_epoch;
    } else {
      if (!read_before) t.by_warp = t.by_many = false;
      if (read_before && t.reader != (int)current->number)
        (block.threads[t.reader].warp == current->warp ? t.by_warp : t.by_many) = true;
      t.reader = (int16_t)current->number;
      t.read_epoch = block.epoch;
      t.read_warp_epoch = warp_epoch;
    }
  }
}

void reach_shared(const char* p, size_t bytes, bool write, bool atomic) {
  shared_bytes += bytes;
  if (p + bytes > library.dynamic + dynamic_bytes && p >= library.dynamic)
    fail("reaches %zu bytes past the dynamic shared memory of its launch, at %s",
         (size_t)(p + bytes - library.dynamic - dynamic_bytes), current->where);
  if (settings.strict && !atomic) trace(p - library.shared.from, bytes, write);
  if (settings.schedule == Schedule::RANDOM && random_number() % 16 == 0) yield();
}

void reach_global(const char* p, size_t bytes, bool write, const void* code) {
  if (latest >= buffers.size() || !buffers[latest].range.has(p, bytes)) {
    const auto found = std::find_if(buffers.begin(), buffers.end(), [&](const Buffer& b) { return b.range.has(p, bytes); });
    if (found == buffers.end()) {
      if ((!write && library.image.has(p, bytes)) || host_stack.has(p, bytes) || buffers.empty()) return;
      for (const Buffer& b : buffers) {
        const long at = p - b.range.from;
        if (at > -4096 && at < (long)b.range.bytes + 4096)
          fail("%s %zu bytes at %ld of '%s', which has %zu bytes", write ? "writes" : "reads", bytes, at,
               b.name.c_str(), b.range.bytes);
      }
      fail("%s %zu bytes that are of no tensor", write ? "writes" : "reads", bytes);
    }
    latest = found - buffers.begin();
  }
  Buffer& b = buffers[latest];
  if (write) {
    if (!b.writable) fail("writes into '%s'", b.name.c_str());
    b.written += bytes;
  } else {
    b.read += bytes;
    const size_t at = p - b.range.from;
    for (size_t s = at / SECTOR; s <= (at + bytes - 1) / SECTOR; s++) b.sectors[s] = true;
    if (settings.strict) fetch(b, code, at, bytes);
  }
}

void reach(const void* address, size_t bytes, bool write, bool aligned, const void* code, bool atomic = false) {
  if (!current) return;
  if (++steps > settings.steps) fail("does not end");
  const char* p = (const char*)address;
  if (fiber_stacks.has(p, 1)) return;
  if (aligned && (size_t)p % bytes)
    fail("%s %zu bytes at an address that is no multiple of %zu", write ? "writes" : "reads", bytes, bytes);
  if (library.shared.has(p, 1))
    reach_shared(p, bytes, write, atomic);
  else
    reach_global(p, bytes, write, code);
}

void land(const Copy& copy) {
  if (settings.strict) trace(copy.shared - library.shared.from, copy.bytes, true);
  std::memcpy(copy.shared, copy.global, copy.present);
  std::memset(copy.shared + copy.present, 0, copy.bytes - copy.present);
}

// The image of the library that holds a kernel, and its thread-local storage, which is its shared memory.
int look(dl_phdr_info* info, size_t, void* found) {
  auto& [kernel, into] = *(std::pair<const char*, Library*>*)found;
  size_t end = 0;
  bool here = false;
  const ElfW(Phdr)* storage = nullptr;
  for (int i = 0; i < info->dlpi_phnum; i++) {
    const auto& part = info->dlpi_phdr[i];
    if (part.p_type == PT_TLS) storage = &part;
    if (part.p_type != PT_LOAD) continue;
    const char* from = (const char*)info->dlpi_addr + part.p_vaddr;
    here |= kernel >= from && kernel < from + part.p_memsz;
    end = std::max<size_t>(end, part.p_vaddr + part.p_memsz);
  }
  if (!here) return 0;
  into->image = {(const char*)info->dlpi_addr, end};
  if (storage) {
    struct {
      unsigned long module, offset;
    } index{info->dlpi_tls_modid, 0};
    extern void* tls_address(void*) asm("__tls_get_addr");
    into->shared = {(const char*)tls_address(&index), storage->p_memsz};
  }
  return 1;
}

}  // namespace

void find_shared(const void* kernel) {
  const auto known = libraries.find(kernel);
  if (known == libraries.end()) {
    Library found;
    std::pair<const char*, Library*> asked{(const char*)kernel, &found};
    dl_iterate_phdr(look, &asked);
    Dl_info info;
    if (dladdr(kernel, &info))
      if (void* handle = dlopen(info.dli_fname, RTLD_LAZY | RTLD_NOLOAD)) {
        found.dynamic = (char*)dlsym(handle, "emulation_dynamic_shared");
        dlclose(handle);
      }
    libraries[kernel] = found;
    library = found;
  } else {
    library = known->second;
  }
  steps = 0;
  traces.assign(settings.strict ? library.shared.bytes : 0, Trace{});
}

void begin_block(size_t dynamic_shared) {
  dynamic_bytes = dynamic_shared;
  fetches.clear();
  turns.assign(settings.strict ? block.threads.size() : 0, {});
  // All bits set is NaN in every type of number.
  if (library.shared.bytes) std::memset((char*)library.shared.from, 0xff, library.shared.bytes);
}

void set_host_stack(const void* here) { host_stack = {(const char*)here - (16 << 10), 48 << 10}; }
void set_fiber_stacks(const char* from, size_t bytes) { fiber_stacks = {from, bytes}; }

void touch(const void* address, size_t bytes, bool write, bool atomic) {
  reach(address, bytes, write, (bytes & (bytes - 1)) == 0, __builtin_return_address(0), atomic);
}

void count(Work, int64_t operations) { multiply_adds += operations; }

void copy_async(void* shared, const void* global, int bytes, int present, const char* where) {
  char* to = (char*)shared;
  current->where = where;
  if ((size_t)to % bytes || (size_t)global % bytes) fail("copies %d bytes from or to an odd address at %s", bytes, where);
  if (!library.shared.has(to, bytes)) fail("copies to what is no shared memory at %s", where);
  if (present) reach(global, present, false, false, __builtin_return_address(0));
  if (latest < buffers.size() && buffers[latest].range.has(global, present)) buffers[latest].copied += present;
  reach_shared(to, bytes, true, false);
  const Copy copy{to, (const char*)global, bytes, present, where};
  const bool at_once = settings.schedule == Schedule::REVERSE ||
                       (settings.schedule == Schedule::RANDOM && random_number() % 2);
  if (at_once)
    land(copy);
  else
    current->open.push_back(copy);
}

void copy_async_commit() {
  current->groups.push_back(std::move(current->open));
  current->open.clear();
}

void copy_async_wait(int groups) { land_all(*current, groups); }

void land_all(Thread& thread, size_t groups_left) {
  while (thread.groups.size() > groups_left) {
    for (const Copy& copy : thread.groups.front()) land(copy);
    thread.groups.pop_front();
  }
}

}  // namespace emulation

using namespace emulation;

// ------------------------------------------------------------------------------------ what Python calls

extern "C" {
void emulation_set(int schedule, int strict, int64_t seed, int64_t shared_limit, int64_t capability) {
  settings.schedule = (Schedule)schedule;
  settings.strict = strict;
  settings.seed = seed;
  settings.shared_limit = shared_limit;
  settings.capability = capability;
}

void emulation_forget() {
  buffers.clear();
  latest = 0;
  multiply_adds = shared_bytes = 0;
}

void emulation_register(const char* name, const void* from, int64_t bytes, int writable) {
  Buffer b;
  b.range = {(const char*)from, (size_t)bytes};
  b.name = name;
  b.writable = writable;
  b.sectors.resize(bytes / SECTOR + 2);
  buffers.push_back(std::move(b));
}

// Fills in bytes read, written and copied asynchronously, of the sectors that were read, and of those fetched.
void emulation_counts(int64_t buffer, int64_t* to) {
  const Buffer& b = buffers[buffer];
  to[0] = b.read;
  to[1] = b.written;
  to[2] = b.copied;
  to[3] = SECTOR * std::count(b.sectors.begin(), b.sectors.end(), true);
  to[4] = b.fetched;
}

int64_t emulation_multiply_adds() { return multiply_adds; }
int64_t emulation_shared_bytes() { return shared_bytes; }
const char* emulation_failure() { return failure.c_str(); }
void emulation_forgive() { failure.clear(); }

#define HOOK(name, bytes, write, aligned) \
  void __tsan_##name(void* p) { reach(p, bytes, write, aligned, __builtin_return_address(0)); }
#define HOOKS(n)                        \
  HOOK(read##n, n, false, true)         \
  HOOK(write##n, n, true, true)         \
  HOOK(unaligned_read##n, n, false, false) \
  HOOK(unaligned_write##n, n, true, false) \
  HOOK(volatile_read##n, n, false, true) \
  HOOK(volatile_write##n, n, true, true)
HOOKS(1) HOOKS(2) HOOKS(4) HOOKS(8) HOOKS(16)
#undef HOOKS
#undef HOOK
void __tsan_read_range(void* p, long bytes) { reach(p, bytes, false, false, __builtin_return_address(0)); }
void __tsan_write_range(void* p, long bytes) { reach(p, bytes, true, false, __builtin_return_address(0)); }
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
}
