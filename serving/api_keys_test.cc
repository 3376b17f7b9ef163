#include "serving/api_keys.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "absl/strings/str_cat.h"

namespace memory3 {
namespace {

using ::testing::HasSubstr;

std::string OneKey(std::string_view key, std::string_view rights) {
  return absl::StrCat(R"({"keys": [{"name": "loader", "sha256": ")", Sha256Of(key).ToHex(),
                      R"(", "tenant": "acme", "knowledge_bases": )", std::string(rights), "}]}");
}

TEST(ApiKeysTest, WithoutKeysEveryoneIsAdminOfTheDefaultTenant) {
  const absl::StatusOr<Identity> identity = ApiKeys().Authenticate("");
  ASSERT_TRUE(identity.ok());
  EXPECT_EQ(identity->tenant, "default");
  EXPECT_TRUE(identity->RequireServerAdmin().ok());
}

TEST(ApiKeysTest, RightsIncludeTheLowerOnesAndStarIsTheRest) {
  const absl::StatusOr<ApiKeys> keys =
      ApiKeys::Parse(OneKey("s3cret", R"({"wiki": "write", "*": "read"})"), "k.json");
  ASSERT_TRUE(keys.ok()) << keys.status();
  const absl::StatusOr<Identity> identity = keys->Authenticate("Bearer s3cret");
  ASSERT_TRUE(identity.ok()) << identity.status();
  EXPECT_EQ(identity->tenant, "acme");
  EXPECT_TRUE(identity->Require(Right::kRead, "wiki").ok());
  EXPECT_TRUE(identity->Require(Right::kWrite, "wiki").ok());
  EXPECT_TRUE(identity->Require(Right::kRead, "other").ok());
  const absl::Status denied = identity->Require(Right::kAdmin, "wiki");
  EXPECT_EQ(denied.code(), absl::StatusCode::kPermissionDenied);
  EXPECT_THAT(std::string(denied.message()),
              HasSubstr("'loader' lacks the right admin on knowledge base 'wiki'"));
  EXPECT_FALSE(identity->RequireServerAdmin().ok());
}

TEST(ApiKeysTest, WithoutStarOtherKnowledgeBasesAreClosed) {
  const absl::StatusOr<ApiKeys> keys =
      ApiKeys::Parse(OneKey("k", R"({"wiki": "admin"})"), "k.json");
  ASSERT_TRUE(keys.ok());
  EXPECT_FALSE(keys->Authenticate("Bearer k")->Require(Right::kRead, "other").ok());
}

TEST(ApiKeysTest, WrongOrMissingKeysAreUnauthenticated) {
  const absl::StatusOr<ApiKeys> keys =
      ApiKeys::Parse(OneKey("s3cret", R"({"*": "read"})"), "k.json");
  ASSERT_TRUE(keys.ok());
  for (const char* header :
       {"", "s3cret", "Basic s3cret", "Bearer ", "Bearer s3cre", "Bearer s3crett"}) {
    EXPECT_EQ(keys->Authenticate(header).status().code(), absl::StatusCode::kUnauthenticated)
        << header;
  }
}

TEST(ApiKeysTest, BadFilesNameFileEntryAndField) {
  const std::pair<std::string, const char*> cases[] = {
      {"", "k.json: must be a JSON object"},
      {R"({"keys": []})", "k.json: must be a JSON object"},
      {R"({"keys": [1]})", "k.json: keys[0] must be an object"},
      {R"({"keys": [{"name": "a"}]})", "k.json: keys[0].tenant must be a string"},
      {R"({"keys": [{"name": "a", "tenant": "t"}]})", "keys[0].knowledge_bases must be an object"},
      {R"({"keys": [{"name": "a", "tenant": "t", "knowledge_bases": {"w": "own"}}]})",
       "keys[0].knowledge_bases.w: 'own' is none of"},
      {R"({"keys": [{"name": "a", "tenant": "t", "knowledge_bases": {}, "sha256": "12"}]})",
       "keys[0].sha256 must be"},
  };
  for (const auto& [json, message] : cases) {
    const absl::Status status = ApiKeys::Parse(json, "k.json").status();
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
    EXPECT_THAT(std::string(status.message()), HasSubstr(message));
  }
  EXPECT_THAT(std::string(ApiKeys::Load("/nonexistent/keys").status().message()),
              HasSubstr("/nonexistent/keys"));
}

}  // namespace
}  // namespace memory3
