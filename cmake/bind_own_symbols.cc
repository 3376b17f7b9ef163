// bind_own_symbols IN OUT NAME: copies a shared library under another name and makes it use its own
// definitions of its own symbols before any other library's (DF_SYMBOLIC, System V gABI, chapter 5;
// what the linker's -Bsymbolic would have done).
//
// Debian's libsentencepiece carries a Protobuf of its own and exports its symbols. In a program
// that has libprotobuf too, the loader binds them to libprotobuf's, of another version, and loading
// a model aborts. NAME is as long as the library's own name (DT_SONAME), which it replaces in
// place.
#include <elf.h>

#include <cstdio>
#include <cstring>
#include <fstream>
#include <iterator>
#include <string>

namespace {

int Fail(const char* file, const char* why) {
  std::fprintf(stderr, "bind_own_symbols: %s: %s\n", file, why);
  return 1;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4) return Fail("usage", "bind_own_symbols IN OUT NAME");
  std::ifstream in(argv[1], std::ios::binary);
  std::string file{std::istreambuf_iterator<char>(in), {}};
  Elf64_Ehdr header;
  if (file.size() < sizeof header) return Fail(argv[1], "cannot be read");
  std::memcpy(&header, file.data(), sizeof header);
  if (std::memcmp(header.e_ident, ELFMAG, SELFMAG) != 0 || header.e_ident[EI_CLASS] != ELFCLASS64 ||
      header.e_phentsize != sizeof(Elf64_Phdr) ||
      header.e_phoff + header.e_phnum * sizeof(Elf64_Phdr) > file.size()) {
    return Fail(argv[1], "is no 64-bit ELF file");
  }
  const auto segment = [&](int i) {
    Elf64_Phdr p;
    std::memcpy(&p, file.data() + header.e_phoff + i * sizeof p, sizeof p);
    return p;
  };
  Elf64_Xword names = 0, name = 0, flags_at = 0;  // address, offset in it, place in the file
  for (int i = 0; i < header.e_phnum; ++i) {
    const Elf64_Phdr p = segment(i);
    if (p.p_type != PT_DYNAMIC || p.p_offset + p.p_filesz > file.size()) continue;
    for (Elf64_Xword at = p.p_offset; at + sizeof(Elf64_Dyn) <= p.p_offset + p.p_filesz;
         at += sizeof(Elf64_Dyn)) {
      Elf64_Dyn entry;
      std::memcpy(&entry, file.data() + at, sizeof entry);
      if (entry.d_tag == DT_NULL) break;
      if (entry.d_tag == DT_STRTAB) names = entry.d_un.d_ptr;
      if (entry.d_tag == DT_SONAME) name = entry.d_un.d_val;
      if (entry.d_tag != DT_FLAGS) continue;
      flags_at = at;
      entry.d_un.d_val |= DF_SYMBOLIC;
      std::memcpy(file.data() + at, &entry, sizeof entry);
    }
  }
  if (flags_at == 0 || names == 0 || name == 0) {
    return Fail(argv[1], "has no DT_FLAGS or no DT_SONAME");
  }
  Elf64_Xword name_at = 0;
  for (int i = 0; i < header.e_phnum; ++i) {
    const Elf64_Phdr p = segment(i);
    if (p.p_type == PT_LOAD && names >= p.p_vaddr && names + name < p.p_vaddr + p.p_filesz) {
      name_at = names + name - p.p_vaddr + p.p_offset;
    }
  }
  const std::string to = argv[3];
  if (name_at == 0 || name_at >= file.size() || file.find('\0', name_at) - name_at != to.size()) {
    return Fail(argv[1], "has a name of another length");
  }
  file.replace(name_at, to.size(), to);
  std::ofstream out(argv[2], std::ios::binary);
  out << file;
  out.close();
  return out ? 0 : Fail(argv[2], "cannot be written");
}
