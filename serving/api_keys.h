// Who may do what: the API keys of a server, and the identity a request has.
//
// A key file is JSON and holds hashes, never keys:
//   {"keys": [{"name": "loader", "sha256": "9f86d0…", "tenant": "acme",
//              "knowledge_bases": {"wiki": "write", "*": "read"}}]}
// `knowledge_bases` maps a name, or "*" for all others, to read, write or admin; each includes the
// ones before it. Clients send `authorization: Bearer KEY`.
//
// Thread-safety: ApiKeys and Identity are immutable; a server swaps a shared_ptr to reload.
#pragma once

#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "memory/hash.h"

namespace memory3 {

enum class Right : uint8_t { kNone = 0, kRead = 1, kWrite = 2, kAdmin = 3 };

struct Identity {
  std::string name = "anonymous";
  std::string tenant = "default";
  std::map<std::string, Right, std::less<>> rights = {{"*", Right::kAdmin}};

  Right RightOn(std::string_view knowledge_base) const;
  // PERMISSION_DENIED naming key, right and knowledge base.
  absl::Status Require(Right right, std::string_view knowledge_base) const;
  // For what concerns the whole server (snapshots, backups): admin on "*".
  absl::Status RequireServerAdmin() const { return Require(Right::kAdmin, "*"); }
};

class ApiKeys {
 public:
  // No keys at all: every request is the anonymous admin of tenant `default`.
  ApiKeys() = default;

  // Errors: INVALID_ARGUMENT naming `source`, the entry and the field.
  static absl::StatusOr<ApiKeys> Parse(std::string_view json, std::string_view source);
  static absl::StatusOr<ApiKeys> Load(const std::string& path);

  bool empty() const { return keys_.empty(); }
  // `authorization`: the header's value, empty where there is none. UNAUTHENTICATED where no key
  // fits. Takes the same time whichever key fits or none does.
  absl::StatusOr<Identity> Authenticate(std::string_view authorization) const;

 private:
  struct Key {
    Hash256 sha256;
    Identity identity;
  };
  std::vector<Key> keys_;
};

}  // namespace memory3
