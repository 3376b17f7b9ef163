// RocksDB's CRC32C by the CPU's instruction. RocksDB chooses when it is compiled, and distributions
// compile it for every CPU, by tables at about 1 GB/s: most of what reading a large record took. So
// the definition here stands in for the shared library's (ELF interposition: the executable's
// symbols come first); the same function, the same checks, ten times as fast.
//
// Thread-safety: any thread.
#pragma once

namespace memory3 {

// True where RocksDB computes its checksums with this program's function. Calling it is what links
// the function in. False costs speed only.
bool RocksDbUsesOurCrc32c();

}  // namespace memory3
