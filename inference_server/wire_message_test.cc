#include "inference_server/wire_message.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>

#include "memory3/v1/inference.pb.h"

namespace memory3 {
namespace {

using ::testing::HasSubstr;

const google::protobuf::Descriptor& Type() { return *v1::GenerateRequest::descriptor(); }

std::string Field(int number, const std::string& bytes) {
  return std::string{static_cast<char>(number << 3 | 2), static_cast<char>(bytes.size())} + bytes;
}

TEST(WireMessageTest, ParsesWhatIsSound) {
  v1::GenerateRequest request;
  request.set_text("größer");
  request.mutable_stopping()->add_stop("λ");
  request.mutable_sampling()->set_temperature(0.5f);
  v1::GenerateRequest parsed;
  ASSERT_TRUE(ParseMessage(request.SerializeAsString(), &parsed).ok());
  EXPECT_EQ(parsed.SerializeAsString(), request.SerializeAsString());
  EXPECT_EQ(FindBrokenText(request.SerializeAsString(), Type()), std::nullopt);
  ASSERT_TRUE(ParseMessage(SerializeMessage(request), &parsed).ok());
  EXPECT_EQ(parsed.text(), "größer");
  EXPECT_TRUE(ParseMessage(grpc::ByteBuffer(), &parsed).ok()) << "an empty message";
}

TEST(WireMessageTest, NamesTheFieldThatIsNoUtf8) {
  const std::string broken = "a\xc3(";
  EXPECT_EQ(FindBrokenText(Field(1, broken), Type()), "request_id");
  EXPECT_EQ(FindBrokenText(Field(2, broken), Type()), "prompt.text");
  EXPECT_EQ(FindBrokenText(Field(6, Field(3, "fine") + Field(3, broken)), Type()),
            "stopping.stop[1]");
  // A filter's metadata: value of an entry.
  const std::string entry = Field(1, "key") + Field(2, broken);
  EXPECT_EQ(FindBrokenText(Field(4, Field(5, Field(2, entry))), Type()),
            "memory.filter.metadata.value");
  v1::GenerateRequest parsed;
  const absl::Status status = ParseMessage(Field(2, broken), &parsed);
  EXPECT_TRUE(absl::IsInvalidArgument(status));
  EXPECT_THAT(std::string(status.message()), HasSubstr("prompt.text is no UTF-8"));
}

TEST(WireMessageTest, SaysThatBytesAreNoMessage) {
  for (const std::string& bytes : {std::string("\x12\x7f", 2) + "short", std::string("\x0f"),
                                   Field(6, "\x1a\x20"), std::string("\x00\x00", 2)}) {
    v1::GenerateRequest parsed;
    const absl::Status status = ParseMessage(bytes, &parsed);
    EXPECT_TRUE(absl::IsInvalidArgument(status)) << status;
    EXPECT_THAT(std::string(status.message()), HasSubstr("memory3.v1.GenerateRequest"));
    EXPECT_EQ(FindBrokenText(bytes, Type()), std::nullopt);
  }
}

}  // namespace
}  // namespace memory3
