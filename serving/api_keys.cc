#include "serving/api_keys.h"

#include <openssl/crypto.h>

#include <fstream>
#include <nlohmann/json.hpp>
#include <sstream>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"

namespace memory3 {
namespace {

constexpr std::string_view kRightNames[] = {"none", "read", "write", "admin"};

absl::StatusOr<Right> ParseRight(std::string_view name) {
  for (int i = 1; i < 4; ++i) {
    if (name == kRightNames[i]) return static_cast<Right>(i);
  }
  return absl::InvalidArgumentError(
      absl::StrCat("'", std::string(name), "' is none of read, write, admin"));
}

absl::StatusOr<std::string> StringField(const nlohmann::json& object, const char* field) {
  const auto it = object.find(field);
  if (it == object.end() || !it->is_string() || it->get_ref<const std::string&>().empty()) {
    return absl::InvalidArgumentError(absl::StrCat(field, " must be a string that is not empty"));
  }
  return it->get<std::string>();
}

absl::StatusOr<Identity> ParseIdentity(const nlohmann::json& object) {
  Identity identity;
  absl::StatusOr<std::string> name = StringField(object, "name");
  if (!name.ok()) return name.status();
  absl::StatusOr<std::string> tenant = StringField(object, "tenant");
  if (!tenant.ok()) return tenant.status();
  identity.name = *std::move(name);
  identity.tenant = *std::move(tenant);
  identity.rights.clear();
  const auto rights = object.find("knowledge_bases");
  if (rights == object.end() || !rights->is_object()) {
    return absl::InvalidArgumentError("knowledge_bases must be an object of name: right");
  }
  for (const auto& [knowledge_base, right] : rights->items()) {
    absl::StatusOr<Right> parsed =
        ParseRight(right.is_string() ? right.get<std::string>() : right.dump());
    if (!parsed.ok()) {
      return absl::InvalidArgumentError(
          absl::StrCat("knowledge_bases.", knowledge_base, ": ", parsed.status().message()));
    }
    identity.rights[knowledge_base] = *parsed;
  }
  return identity;
}

}  // namespace

Right Identity::RightOn(std::string_view knowledge_base) const {
  auto it = rights.find(knowledge_base);
  if (it == rights.end()) it = rights.find("*");
  return it == rights.end() ? Right::kNone : it->second;
}

absl::Status Identity::Require(Right right, std::string_view knowledge_base) const {
  if (RightOn(knowledge_base) >= right) return absl::OkStatus();
  return absl::PermissionDeniedError(absl::StrCat(
      "key '", name, "' lacks the right ", std::string(kRightNames[static_cast<int>(right)]),
      " on knowledge base '", std::string(knowledge_base), "'"));
}

absl::StatusOr<ApiKeys> ApiKeys::Parse(std::string_view json, std::string_view source) {
  const nlohmann::json root = nlohmann::json::parse(json, nullptr, /*allow_exceptions=*/false);
  if (!root.is_object() || !root.contains("keys") || !root["keys"].is_array() ||
      root["keys"].empty()) {
    return absl::InvalidArgumentError(absl::StrCat(
        std::string(source), ": must be a JSON object whose `keys` is an array that is not empty"));
  }
  ApiKeys result;
  for (size_t i = 0; i < root["keys"].size(); ++i) {
    const nlohmann::json& entry = root["keys"][i];
    const std::string where = absl::StrCat(std::string(source), ": keys[", i, "]");
    if (!entry.is_object())
      return absl::InvalidArgumentError(absl::StrCat(where, " must be an object"));
    absl::StatusOr<Identity> identity = ParseIdentity(entry);
    if (!identity.ok())
      return absl::InvalidArgumentError(absl::StrCat(where, ".", identity.status().message()));
    absl::StatusOr<std::string> hex = StringField(entry, "sha256");
    absl::StatusOr<Hash256> hash = hex.ok() ? Hash256::FromHex(*hex) : hex.status();
    if (!hash.ok()) {
      return absl::InvalidArgumentError(
          absl::StrCat(where, ".sha256 must be 64 hexadecimal digits"));
    }
    result.keys_.push_back({*hash, *std::move(identity)});
  }
  return result;
}

absl::StatusOr<ApiKeys> ApiKeys::Load(const std::string& path) {
  std::ifstream in(path);
  std::stringstream text;
  text << in.rdbuf();
  if (!in) return absl::InvalidArgumentError(absl::StrCat("cannot read the API key file ", path));
  return Parse(text.str(), path);
}

absl::StatusOr<Identity> ApiKeys::Authenticate(std::string_view authorization) const {
  if (keys_.empty()) return Identity{};
  constexpr std::string_view kScheme = "Bearer ";
  const bool has_scheme =
      absl::StartsWithIgnoreCase(std::string(authorization), std::string(kScheme));
  const Hash256 presented = Sha256Of(has_scheme ? authorization.substr(kScheme.size()) : "");
  const Key* found = nullptr;
  for (const Key& key : keys_) {  // no early end: the time taken must not tell which key fits
    if (CRYPTO_memcmp(key.sha256.bytes.data(), presented.bytes.data(), presented.bytes.size()) ==
        0) {
      found = &key;
    }
  }
  if (!has_scheme)
    return absl::UnauthenticatedError("metadata `authorization: Bearer KEY` is missing");
  if (found == nullptr) return absl::UnauthenticatedError("the API key is not known");
  return found->identity;
}

}  // namespace memory3
