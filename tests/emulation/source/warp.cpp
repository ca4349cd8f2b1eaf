// Collectives of a warp: a lane hands over what it has, and the last one to come computes for all.
#include <cstring>

#include "state.h"

namespace emulation {
namespace {

// Kind 0 is none, so that a waiting thread of kind 0 waits for its block.
enum Kind { NONE, BARRIER, SHUFFLE, BALLOT, MMA, LOAD };
const char* const NAMES[] = {"", "a barrier of the warp", "a shuffle", "a vote", "a matrix product", "a load of matrices"};

constexpr uint64_t UNDEFINED = 0xdeadbeefdeadbeef;

void exchange(Warp& warp, unsigned mask) {
  for (unsigned lane = 0; lane < 32; lane++) {
    if (!(mask >> lane & 1)) continue;
    Lane& mine = warp.lanes[lane];
    const unsigned segment = lane & ~(mine.width - 1), at = lane & (mine.width - 1);
    unsigned from = lane;
    switch ((Shuffle)mine.given[1]) {
      case Shuffle::INDEX: from = segment + (mine.by & (mine.width - 1)); break;
      case Shuffle::UP: from = at >= mine.by ? lane - mine.by : lane; break;
      case Shuffle::DOWN: from = at + mine.by < mine.width ? lane + mine.by : lane; break;
      case Shuffle::XOR: from = (at ^ mine.by) < mine.width ? segment + (at ^ mine.by) : lane; break;
    }
    // What a lane that takes no part holds is not defined.
    mine.result[0] = mask >> from & 1 ? warp.lanes[from].given[0] : UNDEFINED;
    if (settings.strict && !(mask >> from & 1))
      fail("meets at a shuffle at %s where lane %u reads lane %u, which takes no part", mine.where, lane, from);
  }
}

float half_at(uint32_t pair, int which) {
  const uint16_t bits = (uint16_t)(pair >> 16 * which);
  _Float16 value;
  std::memcpy(&value, &bits, 2);
  return (float)value;
}

float bfloat_at(uint32_t pair, int which) {
  const uint32_t bits = (pair >> 16 * which & 0xffff) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// The fragments as the PTX manual lays them out, where g = lane / 4 and t = lane % 4: a register of A holds row
// g or g + 8 (odd registers), a register of B column g, and D rows g and g + 8 of columns 2t and 2t + 1.
template <int DEPTH, class T, class Get>
void multiply(Warp& warp, Get get) {
  constexpr int PER = DEPTH / 8;  // numbers in a register
  T a[16][DEPTH], b[DEPTH][8], d[16][8];
  for (int lane = 0; lane < 32; lane++) {
    const int g = lane >> 2, t = lane & 3;
    uint32_t registers[6];
    std::memcpy(registers, warp.lanes[lane].given, sizeof registers);
    for (int r = 0; r < 4; r++)
      for (int e = 0; e < PER; e++)
        a[g + 8 * (r & 1)][t * PER + e + DEPTH / 2 * (r >> 1)] = get(registers[r], e);
    for (int r = 0; r < 2; r++)
      for (int e = 0; e < PER; e++) b[t * PER + e + DEPTH / 2 * r][g] = get(registers[4 + r], e);
    T held[4];
    std::memcpy(held, warp.lanes[lane].result, sizeof held);
    for (int r = 0; r < 4; r++) d[g + 8 * (r >> 1)][2 * t + (r & 1)] = held[r];
  }
  for (int i = 0; i < 16; i++)
    for (int k = 0; k < DEPTH; k++)
      for (int j = 0; j < 8; j++) d[i][j] += a[i][k] * b[k][j];
  for (int lane = 0; lane < 32; lane++) {
    const int g = lane >> 2, t = lane & 3;
    T held[4];
    for (int r = 0; r < 4; r++) held[r] = d[g + 8 * (r >> 1)][2 * t + (r & 1)];
    std::memcpy(warp.lanes[lane].result, held, sizeof held);
  }
}

void load(Warp& warp) {
  uint16_t rows[4][8][8];
  const int matrices = (int)warp.lanes[0].given[1];
  const bool transposed = warp.lanes[0].given[2];
  for (int lane = 0; lane < 8 * matrices; lane++)
    std::memcpy(rows[lane / 8][lane % 8], (const void*)warp.lanes[lane].given[0], 16);
  for (int lane = 0; lane < 32; lane++) {
    uint32_t registers[4] = {};
    for (int m = 0; m < matrices; m++)
      for (int e = 0; e < 2; e++) {
        const int major = lane >> 2, minor = 2 * (lane & 3) + e;
        const uint32_t value = transposed ? rows[m][minor][major] : rows[m][major][minor];
        registers[m] |= value << 16 * e;
      }
    std::memcpy(warp.lanes[lane].result, registers, sizeof registers);
  }
}

void carry_out(Warp& warp, unsigned mask, const Lane& lane) {
  switch (lane.kind) {
    case BARRIER: warp.epoch++; break;
    case SHUFFLE: exchange(warp, mask); break;
    case BALLOT: {
      unsigned votes = 0;
      for (unsigned i = 0; i < 32; i++)
        if (mask >> i & 1) votes |= (unsigned)warp.lanes[i].given[0] << i;
      for (unsigned i = 0; i < 32; i++) warp.lanes[i].result[0] = votes;
      break;
    }
    case MMA:
      if ((Number)lane.given[3] == Number::HALF) multiply<16, float>(warp, half_at);
      if ((Number)lane.given[3] == Number::BFLOAT16) multiply<16, float>(warp, bfloat_at);
      if ((Number)lane.given[3] == Number::INT8)
        multiply<32, int>(warp, [](uint32_t four, int which) { return (int)(int8_t)(four >> 8 * which); });
      break;
    case LOAD: load(warp); break;
  }
}

// Carries a collective out if all lanes of its mask that are left have come.
bool complete(Warp& warp, unsigned mask) {
  const unsigned needed = mask & warp.alive;
  if ((warp.waiting & needed) != needed || !needed) return false;
  const Lane* first = nullptr;
  for (unsigned i = 0; i < 32; i++) {
    if (!(needed >> i & 1)) continue;
    const Lane& lane = warp.lanes[i];
    if (!first) first = &lane;
    if (lane.mask != mask || lane.kind != first->kind) return false;
    if (settings.strict && std::strcmp(lane.where, first->where) != 0) return false;
  }
  carry_out(warp, needed, *first);
  warp.waiting &= ~needed;
  const unsigned first_thread = 32 * (unsigned)(&warp - block.warps.data());
  for (unsigned i = 0; i < 32; i++) {
    if (!(needed >> i & 1)) continue;
    warp.lanes[i].kind = NONE;
    Thread& thread = block.threads[first_thread + i];
    if (thread.state == State::WAITING) thread.state = State::RUNNABLE;
  }
  return true;
}

Lane& meet(Kind kind, unsigned mask, const char* where) {
  Warp& warp = block.warps[current->warp];
  Lane& lane = warp.lanes[current->lane];
  if (!(mask >> current->lane & 1)) fail("is not in the mask %08x of %s at %s", mask, NAMES[kind], where);
  if ((kind == MMA || kind == LOAD) && warp.alive != ~0u)
    fail("meets at %s at %s in a warp of which only the threads %08x are left", NAMES[kind], where, warp.alive);
  lane.kind = kind;
  lane.mask = mask;
  lane.where = current->where = where;
  warp.waiting |= 1u << current->lane;
  if (!complete(warp, mask)) {
    current->state = State::WAITING;
    wait();
  }
  return lane;
}

}  // namespace

void thread_left(Warp& warp) {
  for (unsigned i = 0; i < 32; i++)
    if (warp.waiting >> i & 1) complete(warp, warp.lanes[i].mask);
}

void warp_barrier(unsigned mask, const char* where) { meet(BARRIER, mask, where); }

uint64_t shuffle(Shuffle kind, unsigned mask, uint64_t value, unsigned by, unsigned width, const char* where) {
  Lane& lane = block.warps[current->warp].lanes[current->lane];
  lane.given[0] = value;
  lane.given[1] = (uint64_t)kind;
  lane.by = by;
  lane.width = width;
  return meet(SHUFFLE, mask, where).result[0];
}

unsigned ballot(unsigned mask, bool value, const char* where) {
  block.warps[current->warp].lanes[current->lane].given[0] = value;
  return (unsigned)meet(BALLOT, mask, where).result[0];
}

unsigned active_mask() { return block.warps[current->warp].alive; }

void mma(Number number, void* d, const uint32_t* a, const uint32_t* b, const char* where) {
  Lane& lane = block.warps[current->warp].lanes[current->lane];
  std::memcpy(lane.given, a, 16);
  std::memcpy(lane.given + 2, b, 8);
  lane.given[3] = (uint64_t)number;
  std::memcpy(lane.result, d, 16);
  std::memcpy(d, meet(MMA, ~0u, where).result, 16);
  if (current->lane == 0) count(Work::MULTIPLY_ADD, 16 * 8 * (number == Number::INT8 ? 32 : 16));
}

void load_matrix(uint32_t* registers, int matrices, bool transposed, const void* row, const char* where) {
  Lane& lane = block.warps[current->warp].lanes[current->lane];
  lane.given[0] = (uint64_t)row;
  lane.given[1] = matrices;
  lane.given[2] = transposed;
  if ((int)current->lane < 8 * matrices) touch(row, 16, false, false);
  std::memcpy(registers, meet(LOAD, ~0u, where).result, 4 * matrices);
}

}  // namespace emulation
