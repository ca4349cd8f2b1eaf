// What kernels that run on the CPU ask of the emulation. The other headers of this folder bear the names of
// CUDA's and are built on it, so that a .cu file is compiled by g++ as it stands.
//
// Every thread of a block is a fiber; all fibers and blocks of a launch share one thread of the operating
// system, in an order that the schedule sets. The compiler puts a call before every load and store
// (-fsanitize=thread, with hooks of our own in source/memory.cpp), which is how memory is watched.
#pragma once
#include <cstddef>
#include <cstdint>

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace emulation {

// Within one fiber these never change, so the compiler may keep them.
uint3 thread_index() __attribute__((const));
uint3 block_index() __attribute__((const));
uint3 block_size() __attribute__((const));
uint3 grid_size() __attribute__((const));

// Waits of a whole block. All of these return what the votes of its threads come to.
enum class Vote { NONE, COUNT, ALL, ANY };
int block_barrier(Vote vote, int value, const char* where);

// Collectives of a warp.
void warp_barrier(unsigned mask, const char* where);
enum class Shuffle { INDEX, UP, DOWN, XOR };
uint64_t shuffle(Shuffle kind, unsigned mask, uint64_t value, unsigned by, unsigned width, const char* where);
unsigned ballot(unsigned mask, bool value, const char* where);
unsigned active_mask();

enum class Number { HALF, BFLOAT16, INT8 };
// d (4 floats, or ints) += a (4 registers) · b (2): m16n8k16, or m16n8k32 of INT8.
void mma(Number number, void* d, const uint32_t* a, const uint32_t* b, const char* where);
// Lane 8i + r gives the address of row r of matrix i; register i holds a piece of matrix i.
void load_matrix(uint32_t* registers, int matrices, bool transposed, const void* row, const char* where);

// Asynchronous copies land when they are waited for, or at once, or at any time, as the schedule says.
void copy_async(void* shared, const void* global, int bytes, int present, const char* where);
void copy_async_commit();
void copy_async_wait(int groups);

// A load or store that the compiler does not see as one.
void touch(const void* address, size_t bytes, bool write, bool atomic);

enum class Work { MULTIPLY_ADD };
void count(Work work, int64_t operations);

struct Launch {
  dim3 grid, block;
  size_t dynamic_shared;
};
int launch(const void* kernel, const Launch& shape, void (*call)(void*), void* arguments);
void allow_dynamic_shared(const void* kernel, size_t bytes);
int device_attribute(int attribute, int* value);

}  // namespace emulation

#define EMULATION_TEXT_(x) #x
#define EMULATION_TEXT(x) EMULATION_TEXT_(x)
#define EMULATION_HERE __FILE__ ":" EMULATION_TEXT(__LINE__)
