// What the symbol table of the shared library that holds this code says.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

namespace cuda_host {

struct Variable {  // one __shared__ variable; the same for every thread of the process
  std::string name;
  size_t offset, bytes;  // in the calling OS thread's copy of the TLS segment
};

const std::vector<Variable>& shared_variables();
char* shared_segment();  // of the calling OS thread

const char* library_path();
size_t library_offset(const void* code);

// "void kernel<256>(float*)", or "?" for an address that is no function of this library.
std::string function_name(const void* function);

}  // namespace cuda_host
