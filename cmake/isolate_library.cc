// isolate_library IN OUT NAME SYMBOLS: copies the shared library IN so that a program can have it
// beside another library that defines some of the same symbols:
// - its name (DT_SONAME) becomes NAME, of the same length, so that both can be loaded;
// - it uses its own definitions of its own symbols before any other library's (DF_SYMBOLIC, what
//   the linker's -Bsymbolic would have done);
// - those whose names contain SYMBOLS are hidden, so that nobody else uses them.
// (System V gABI, chapters 4 and 5.)
#include <elf.h>

#include <cstdio>
#include <cstring>
#include <fstream>
#include <iterator>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>

namespace {

// A library's bytes. Errors: std::runtime_error.
class Library {
 public:
  explicit Library(std::string bytes) : bytes_(std::move(bytes)) {
    const Elf64_Ehdr& header = Part<Elf64_Ehdr>(0, 1)[0];
    if (std::memcmp(header.e_ident, ELFMAG, SELFMAG) != 0 ||
        header.e_ident[EI_CLASS] != ELFCLASS64) {
      throw std::runtime_error("is no 64-bit ELF file");
    }
    segments_ = Part<Elf64_Phdr>(header.e_phoff, header.e_phnum);
    sections_ = Part<Elf64_Shdr>(header.e_shoff, header.e_shnum);
  }

  // Its name, whose place is what the dynamic section says, and DF_SYMBOLIC.
  void BindOwnSymbols(const std::string& name) {
    Elf64_Xword strings = 0, offset = 0;  // an address, and where the name is from there
    bool flagged = false;
    for (const Elf64_Phdr& segment : segments_) {
      if (segment.p_type != PT_DYNAMIC) continue;
      for (Elf64_Dyn& entry :
           Part<Elf64_Dyn>(segment.p_offset, segment.p_filesz / sizeof(Elf64_Dyn))) {
        if (entry.d_tag == DT_NULL) break;
        if (entry.d_tag == DT_STRTAB) strings = entry.d_un.d_ptr;
        if (entry.d_tag == DT_SONAME) offset = entry.d_un.d_val;
        if (entry.d_tag != DT_FLAGS) continue;
        entry.d_un.d_val |= DF_SYMBOLIC;
        flagged = true;
      }
    }
    if (!flagged || strings == 0 || offset == 0)
      throw std::runtime_error("has no DT_FLAGS or no DT_SONAME");
    for (const Elf64_Phdr& segment : segments_) {
      const Elf64_Xword address = strings + offset;
      if (segment.p_type != PT_LOAD || address < segment.p_vaddr ||
          address >= segment.p_vaddr + segment.p_filesz) {
        continue;
      }
      const std::span<char> old =
          Part<char>(address - segment.p_vaddr + segment.p_offset, name.size() + 1);
      if (strnlen(old.data(), old.size()) != name.size()) break;
      std::memcpy(old.data(), name.data(), name.size());
      return;
    }
    throw std::runtime_error("has a name of another length than " + name);
  }

  void Hide(const std::string& part_of_name) {
    for (const Elf64_Shdr& table : sections_) {
      if (table.sh_type != SHT_DYNSYM) continue;
      if (table.sh_link >= sections_.size()) throw std::runtime_error("has symbols without names");
      const Elf64_Shdr& strings = sections_[table.sh_link];
      const std::span<char> names = Part<char>(strings.sh_offset, strings.sh_size);
      for (Elf64_Sym& symbol :
           Part<Elf64_Sym>(table.sh_offset, table.sh_size / sizeof(Elf64_Sym))) {
        if (symbol.st_shndx == SHN_UNDEF || symbol.st_name >= names.size()) continue;
        const char* name = &names[symbol.st_name];
        const std::string_view view(name, strnlen(name, names.size() - symbol.st_name));
        if (view.find(part_of_name) == std::string_view::npos) continue;
        symbol.st_other = static_cast<unsigned char>((symbol.st_other & ~3) | STV_HIDDEN);
      }
    }
  }

  const std::string& bytes() const { return bytes_; }

 private:
  template <typename T>
  std::span<T> Part(uint64_t offset, uint64_t count) {
    if (offset > bytes_.size() || count > (bytes_.size() - offset) / sizeof(T))
      throw std::runtime_error("is cut off");
    return {reinterpret_cast<T*>(bytes_.data() + offset), count};
  }

  std::string bytes_;
  std::span<Elf64_Phdr> segments_;
  std::span<Elf64_Shdr> sections_;
};

}  // namespace

int main(int argc, char** argv) {
  if (argc != 5) {
    std::fprintf(stderr, "usage: isolate_library IN OUT NAME SYMBOLS\n");
    return 2;
  }
  try {
    std::ifstream in(argv[1], std::ios::binary);
    if (!in) throw std::runtime_error("cannot be read");
    Library library({std::istreambuf_iterator<char>(in), {}});
    library.BindOwnSymbols(argv[3]);
    library.Hide(argv[4]);
    std::ofstream out(argv[2], std::ios::binary);
    out << library.bytes();
    if (!out.flush()) throw std::runtime_error(std::string("cannot be copied to ") + argv[2]);
  } catch (const std::exception& e) {
    std::fprintf(stderr, "isolate_library: %s: %s\n", argv[1], e.what());
    return 1;
  }
}
