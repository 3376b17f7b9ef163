// hide_protobuf IN OUT: copies the shared library IN and hides the Protobuf symbols it defines.
//
// Debian's libsentencepiece carries a Protobuf of its own, of another version than libprotobuf, and
// exports it: in a process that loads both, whichever comes first is used by both, and dies. Hidden
// symbols are bound within their library and are found by nobody else (the gABI, Symbol Table).
#include <elf.h>

#include <cstdio>
#include <cstring>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

namespace {

constexpr char kProtobuf[] = "6google8protobuf";  // as mangled names spell google::protobuf

int Fail(const char* what, const char* file) {
  std::fprintf(stderr, "hide_protobuf: %s: %s\n", file, what);
  return 1;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) return Fail("usage: hide_protobuf IN OUT", "arguments");
  std::ifstream in(argv[1], std::ios::binary);
  std::vector<char> bytes{std::istreambuf_iterator<char>(in), {}};
  const auto fits = [&](uint64_t offset, uint64_t size) {
    return offset <= bytes.size() && size <= bytes.size() - offset;
  };
  if (!in || !fits(0, sizeof(Elf64_Ehdr)) || std::memcmp(bytes.data(), ELFMAG, SELFMAG) != 0 ||
      bytes[EI_CLASS] != ELFCLASS64) {
    return Fail("no 64-bit ELF file", argv[1]);
  }
  const auto* header = reinterpret_cast<const Elf64_Ehdr*>(bytes.data());
  if (!fits(header->e_shoff, uint64_t{header->e_shnum} * sizeof(Elf64_Shdr)))
    return Fail("its section headers are cut off", argv[1]);
  const auto* sections = reinterpret_cast<const Elf64_Shdr*>(bytes.data() + header->e_shoff);
  int hidden = 0;
  for (int i = 0; i < header->e_shnum; ++i) {
    const Elf64_Shdr& table = sections[i];
    if (table.sh_type != SHT_DYNSYM) continue;
    if (table.sh_link >= header->e_shnum || !fits(table.sh_offset, table.sh_size) ||
        !fits(sections[table.sh_link].sh_offset, sections[table.sh_link].sh_size)) {
      return Fail("its symbol table is cut off", argv[1]);
    }
    const Elf64_Shdr& names = sections[table.sh_link];
    auto* symbols = reinterpret_cast<Elf64_Sym*>(bytes.data() + table.sh_offset);
    for (uint64_t s = 0; s < table.sh_size / sizeof(Elf64_Sym); ++s) {
      Elf64_Sym& symbol = symbols[s];
      if (symbol.st_shndx == SHN_UNDEF || symbol.st_name >= names.sh_size) continue;
      const char* name = bytes.data() + names.sh_offset + symbol.st_name;
      if (std::string(name, strnlen(name, names.sh_size - symbol.st_name)).find(kProtobuf) ==
          std::string::npos) {
        continue;
      }
      symbol.st_other = static_cast<unsigned char>((symbol.st_other & ~3) | STV_HIDDEN);
      ++hidden;
    }
  }
  std::ofstream out(argv[2], std::ios::binary | std::ios::trunc);
  out.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
  out.close();
  if (!out) return Fail("cannot write it", argv[2]);
  std::printf("%s: %d symbols hidden\n", argv[2], hidden);
  return 0;
}
