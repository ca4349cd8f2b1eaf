"""The operators in C++ for CPUs."""
