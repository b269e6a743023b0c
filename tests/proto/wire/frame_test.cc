// Goal: a frame is accepted exactly as sealed; any flipped bit, wrong length or foreign version is
// refused with an error that names the field.

#include "proto/wire/frame.h"

#include <cstring>
#include <string>
#include <vector>

#include "gtest/gtest.h"

namespace moebius::wire {
namespace {

std::vector<std::byte> Bytes(const FrameHeader& header) {
  std::vector<std::byte> bytes(sizeof(header));
  std::memcpy(bytes.data(), &header, sizeof(header));
  return bytes;
}

struct SealedFrame {
  FrameHeader header;
  std::vector<std::byte> payload = std::vector<std::byte>(100, std::byte{42});
  SealedFrame() {
    header.type = static_cast<uint16_t>(FrameType::kTest);
    header.step = 17;
    SealFrame(header, payload);
  }
};

TEST(ValidateFrame, AcceptsWhatWasSealed) {
  SealedFrame sealed;
  FrameHeader parsed;
  ASSERT_TRUE(ValidateFrame(Bytes(sealed.header), sealed.payload, 100, &parsed).ok());
  EXPECT_EQ(parsed.step, 17u);
  EXPECT_EQ(parsed.payload_bytes, 100u);
}

TEST(ValidateFrame, RefusesEverySingleBitFlip) {
  SealedFrame sealed;
  FrameHeader parsed;
  for (size_t bit = 0; bit < 8 * sizeof(FrameHeader); ++bit) {
    std::vector<std::byte> bytes = Bytes(sealed.header);
    bytes[bit / 8] ^= std::byte{1} << (bit % 8);
    EXPECT_FALSE(ValidateFrame(bytes, sealed.payload, 100, &parsed).ok()) << "header bit " << bit;
  }
  for (size_t bit = 0; bit < 8 * sealed.payload.size(); ++bit) {
    std::vector<std::byte> payload = sealed.payload;
    payload[bit / 8] ^= std::byte{1} << (bit % 8);
    EXPECT_EQ(ValidateFrame(Bytes(sealed.header), payload, 100, &parsed).code(),
              absl::StatusCode::kDataLoss)
        << "payload bit " << bit;
  }
}

TEST(ValidateFrame, NamesTheFieldThatIsWrong) {
  FrameHeader parsed;
  const auto message = [&](const SealedFrame& f, uint64_t limit = 100) {
    return std::string(ValidateFrame(Bytes(f.header), f.payload, limit, &parsed).message());
  };
  SealedFrame version;
  version.header.version = 9;
  EXPECT_NE(message(version).find("version 9"), std::string::npos);
  SealedFrame reserved;
  reserved.header.reserved[3] = 1;
  EXPECT_NE(message(reserved).find("reserved"), std::string::npos);
  SealedFrame large;
  EXPECT_NE(message(large, 99).find("payload_bytes"), std::string::npos);
  SealedFrame truncated;
  truncated.payload.pop_back();
  EXPECT_NE(message(truncated).find("payload_bytes"), std::string::npos);
  EXPECT_FALSE(ValidateFrame({}, {}, 100, &parsed).ok());
}

}  // namespace
}  // namespace moebius::wire
