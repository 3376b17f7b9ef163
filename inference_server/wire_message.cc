#include "inference_server/wire_message.h"

#include <google/protobuf/io/coded_stream.h>
#include <google/protobuf/wire_format_lite.h>

#include <map>

#include "absl/strings/str_cat.h"
#include "transformer/tokenizer_utf8.h"

namespace memory3 {
namespace {

using google::protobuf::Descriptor;
using google::protobuf::FieldDescriptor;
using google::protobuf::OneofDescriptor;
using google::protobuf::internal::WireFormatLite;
using google::protobuf::io::CodedInputStream;

constexpr int kMaxDepth = 32;  // our messages nest three deep

bool IsUtf8(std::string_view text) {
  while (!text.empty()) {
    const Utf8Char c = NextUtf8(text);
    if (c.kind != Utf8Char::Kind::kValid) return false;
    text.remove_prefix(c.length);
  }
  return true;
}

std::string NameOf(const FieldDescriptor& field, int index) {
  const OneofDescriptor* oneof = field.real_containing_oneof();
  std::string name =
      oneof != nullptr ? absl::StrCat(oneof->name(), ".", field.name()) : std::string(field.name());
  if (field.is_repeated() && !field.is_map()) absl::StrAppend(&name, "[", index, "]");
  return name;
}

// False: the bytes cannot be read on.
bool Walk(CodedInputStream& in, const Descriptor& type, int depth,
          std::optional<std::string>* found) {
  std::map<int, int> counts;
  while (const uint32_t tag = in.ReadTag()) {
    const int number = WireFormatLite::GetTagFieldNumber(tag);
    if (WireFormatLite::GetTagWireType(tag) != WireFormatLite::WIRETYPE_LENGTH_DELIMITED) {
      if (!WireFormatLite::SkipField(&in, tag)) return false;
      continue;
    }
    uint32_t length = 0;
    if (!in.ReadVarint32(&length) || length > static_cast<uint32_t>(in.BytesUntilTotalBytesLimit()))
      return false;
    const FieldDescriptor* field = type.FindFieldByNumber(number);
    const int index = counts[number]++;
    if (field != nullptr && field->type() == FieldDescriptor::TYPE_STRING) {
      std::string text;
      if (!in.ReadString(&text, static_cast<int>(length))) return false;
      if (!IsUtf8(text)) {
        *found = NameOf(*field, index);
        return true;
      }
    } else if (field != nullptr && field->type() == FieldDescriptor::TYPE_MESSAGE &&
               depth < kMaxDepth) {
      const CodedInputStream::Limit limit = in.PushLimit(static_cast<int>(length));
      if (!Walk(in, *field->message_type(), depth + 1, found)) return false;
      if (found->has_value()) {
        *found = absl::StrCat(NameOf(*field, index), ".", **found);
        return true;
      }
      if (in.BytesUntilLimit() > 0) return false;
      in.PopLimit(limit);
    } else if (!in.Skip(static_cast<int>(length))) {
      return false;
    }
  }
  return true;
}

}  // namespace

std::optional<std::string> FindBrokenText(std::string_view bytes, const Descriptor& type) {
  CodedInputStream in(reinterpret_cast<const uint8_t*>(bytes.data()),
                      static_cast<int>(bytes.size()));
  in.SetTotalBytesLimit(static_cast<int>(bytes.size()));
  std::optional<std::string> found;
  Walk(in, type, 0, &found);
  return found;
}

absl::Status ParseMessage(std::string_view bytes, google::protobuf::Message* message) {
  if (message->ParseFromArray(bytes.data(), static_cast<int>(bytes.size())))
    return absl::OkStatus();
  const Descriptor& type = *message->GetDescriptor();
  if (const std::optional<std::string> field = FindBrokenText(bytes, type))
    return absl::InvalidArgumentError(absl::StrCat(*field, " is no UTF-8"));
  return absl::InvalidArgumentError(absl::StrCat("the request is no ", type.full_name()));
}

absl::Status ParseMessage(const grpc::ByteBuffer& buffer, google::protobuf::Message* message) {
  grpc::Slice slice;
  if (buffer.Valid() && !buffer.DumpToSingleSlice(&slice).ok())
    return absl::InternalError("cannot read the request");
  return ParseMessage({reinterpret_cast<const char*>(slice.begin()), slice.size()}, message);
}

grpc::ByteBuffer SerializeMessage(const google::protobuf::Message& message) {
  const grpc::Slice slice(message.SerializeAsString());
  return {&slice, 1};
}

}  // namespace memory3
