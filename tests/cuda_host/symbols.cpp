#include "symbols.h"

#include <cxxabi.h>
#include <dlfcn.h>
#include <elf.h>
#include <link.h>

#include <cstdlib>
#include <fstream>
#include <iterator>
#include <map>

namespace cuda_host {
namespace {

// Gives the library a TLS segment even if no kernel has a __shared__ variable.
thread_local char anchor;

const char kShared[] = "__shared__.";  // how build.py marks these variables

Dl_info this_library() {
  Dl_info info{};
  dladdr(reinterpret_cast<const void*>(&this_library), &info);
  return info;
}

std::string demangled(const char* name) {
  char* text = abi::__cxa_demangle(name, nullptr, nullptr, nullptr);
  std::string result = text ? text : name;
  std::free(text);
  return result;
}

struct Symbols {
  std::vector<Variable> shared;
  std::map<uintptr_t, std::string> functions;  // by offset from the library's base

  Symbols() {
    std::ifstream stream(library_path(), std::ios::binary);
    const std::string file{std::istreambuf_iterator<char>(stream), {}};
    const auto* header = reinterpret_cast<const Elf64_Ehdr*>(file.data());
    const auto* sections = reinterpret_cast<const Elf64_Shdr*>(file.data() + header->e_shoff);
    for (int s = 0; s < header->e_shnum; ++s)
      if (sections[s].sh_type == SHT_SYMTAB) read(file.data(), sections[s], sections[sections[s].sh_link]);
  }

  void read(const char* file, const Elf64_Shdr& table, const Elf64_Shdr& strings) {
    const auto* symbols = reinterpret_cast<const Elf64_Sym*>(file + table.sh_offset);
    for (size_t i = 0; i < table.sh_size / sizeof(Elf64_Sym); ++i) {
      const Elf64_Sym& symbol = symbols[i];
      const std::string name = file + strings.sh_offset + symbol.st_name;
      if (symbol.st_shndx == SHN_UNDEF) continue;
      const int type = ELF64_ST_TYPE(symbol.st_info);
      if (type == STT_FUNC) functions[symbol.st_value] = name;
      if (type == STT_TLS && name.rfind(kShared, 0) == 0)
        shared.push_back({demangled(name.c_str() + sizeof kShared - 1), symbol.st_value, symbol.st_size});
    }
  }
};

const Symbols& symbols() {
  static const Symbols symbols;
  return symbols;
}

int find_segment(dl_phdr_info* module, size_t, void* segment) {
  if (reinterpret_cast<void*>(module->dlpi_addr) != this_library().dli_fbase) return 0;
  *static_cast<void**>(segment) = module->dlpi_tls_data;
  return 1;
}

}  // namespace

const std::vector<Variable>& shared_variables() { return symbols().shared; }

char* shared_segment() {
  *const_cast<volatile char*>(&anchor) = 0;  // a segment exists from the first access on
  void* segment = nullptr;
  dl_iterate_phdr(find_segment, &segment);
  return static_cast<char*>(segment);
}

const char* library_path() { return this_library().dli_fname; }

size_t library_offset(const void* code) {
  return size_t(static_cast<const char*>(code) - static_cast<const char*>(this_library().dli_fbase));
}

std::string function_name(const void* function) {
  const auto found = symbols().functions.find(library_offset(function));
  return found == symbols().functions.end() ? "?" : demangled(found->second.c_str());
}

}  // namespace cuda_host
