// Goal: a well-formed file reads back exactly as written; each rule of the format, broken on its
// own, is refused with a message that names the tensor and the field. Method: hand-made headers.

#include "model/safetensors.h"

#include <cstdio>
#include <filesystem>
#include <fstream>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "gtest/gtest.h"
#include "model/safetensors_writer.h"
#include "tests/model/test_dir.h"

namespace moebius::model {
namespace {

std::string File(const std::string& name) { return TestDir() + "/moebius_st_" + name; }

std::string Container(std::string json, size_t data_bytes) {
  std::string out(8, '\0');
  for (int i = 0; i < 8; ++i) out[i] = static_cast<char>(uint64_t{json.size()} >> (8 * i));
  return out + json + std::string(data_bytes, '\x11');
}

absl::Status Open(const std::string& content) {
  const std::string path = File("raw.safetensors");
  std::ofstream(path, std::ios::binary | std::ios::trunc) << content;
  return SafetensorsFile::Open(path).status();
}

absl::Status OpenHeader(const std::string& json, size_t data_bytes) {
  return Open(Container(json, data_bytes));
}

// Bytes of this process's mappings of `path`, and how many mappings they are.
std::pair<uint64_t, int> MappedBytes(const std::string& path) {
  std::ifstream maps("/proc/self/maps");
  uint64_t bytes = 0;
  int count = 0;
  for (std::string line; std::getline(maps, line);) {
    if (!absl::EndsWith(line, path)) continue;
    uint64_t begin = 0, end = 0;
    EXPECT_EQ(std::sscanf(line.c_str(), "%lx-%lx", &begin, &end), 2) << line;
    bytes += end - begin;
    ++count;
  }
  return {bytes, count};
}

TEST(Safetensors, OnlyTensorsThatAreAskedForAreMapped) {
  constexpr int kTensors = 50;
  constexpr int64_t kBytes = 40'000;  // about ten pages, not whole ones
  const std::string path = File("partial.safetensors");
  std::filesystem::remove(path);
  std::vector<TensorSpec> specs;
  for (int i = 0; i < kTensors; ++i)
    specs.push_back({absl::StrCat("t", 100 + i), TensorDType::kF8E4m3, {kBytes}});
  absl::StatusOr<SafetensorsWriter> writer = SafetensorsWriter::Create(path, specs, {});
  ASSERT_TRUE(writer.ok()) << writer.status();
  for (int i = 0; i < kTensors; ++i) {
    ASSERT_TRUE(writer->Append(specs[i].name, std::vector<std::byte>(kBytes, std::byte(i))).ok());
  }
  ASSERT_TRUE(writer->Finish().ok());
  {
    const auto file = SafetensorsFile::Open(path);
    ASSERT_TRUE(file.ok()) << file.status();
    EXPECT_EQ(MappedBytes(path).first, 0u);
    const auto look = [&](int i) {
      const auto bytes = (*file)->Bytes(*(*file)->Find(specs[i].name));
      ASSERT_TRUE(bytes.ok()) << bytes.status();
      EXPECT_EQ(bytes->front(), std::byte(i));
      EXPECT_EQ(bytes->back(), std::byte(i));
    };
    constexpr uint64_t kMost = kBytes + 2 * 4096;  // rounded to pages
    look(7);
    EXPECT_GE(MappedBytes(path).first, static_cast<uint64_t>(kBytes));
    EXPECT_LE(MappedBytes(path).first, kMost);
    look(30);
    EXPECT_LE(MappedBytes(path).first, 2 * kMost);
    for (int i = 10; i < 20; ++i) look(i);
    look(7);
    EXPECT_LE(MappedBytes(path).first, 12 * kMost);
    EXPECT_EQ(MappedBytes(path).second, 3) << "neighbours are one mapping";
    (*file)->DontNeed(*(*file)->Find(specs[11].name));
    look(11);
    look(12);
  }
  EXPECT_EQ(MappedBytes(path).first, 0u);
}

TEST(Safetensors, WrittenFileReadsBack) {
  const std::string path = File("roundtrip.safetensors");
  std::filesystem::remove(path);
  absl::StatusOr<SafetensorsWriter> writer =
      SafetensorsWriter::Create(path,
                                {{"b", TensorDType::kBf16, {3}},
                                 {"scalar", TensorDType::kF32, {}},
                                 {"q", TensorDType::kF8E4m3, {2, 5}},
                                 {"empty", TensorDType::kF32, {0, 7}},
                                 {"a", TensorDType::kF32, {2}}},
                                {{"format", "pt"}});
  ASSERT_TRUE(writer.ok()) << writer.status();
  std::vector<std::string> order;
  uint8_t fill = 1;
  for (const TensorInfo& tensor : writer->layout()) {
    order.push_back(tensor.name);
    const std::vector<std::byte> data(tensor.bytes, std::byte{fill++});
    EXPECT_EQ(writer->Append("other", data).code(), absl::StatusCode::kFailedPrecondition);
    ASSERT_TRUE(writer->Append(tensor.name, data).ok());
  }
  EXPECT_EQ(order, (std::vector<std::string>{"a", "empty", "scalar", "b", "q"}));
  EXPECT_FALSE(std::filesystem::exists(path));
  ASSERT_TRUE(writer->Finish().ok());

  absl::StatusOr<std::unique_ptr<SafetensorsFile>> file = SafetensorsFile::Open(path);
  ASSERT_TRUE(file.ok()) << file.status();
  ASSERT_EQ((*file)->header().tensors.size(), 5u);
  EXPECT_EQ((*file)->header().metadata,
            (std::vector<std::pair<std::string, std::string>>{{"format", "pt"}}));
  EXPECT_EQ((*file)->Find("nobody"), nullptr);
  const TensorInfo* q = (*file)->Find("q");
  ASSERT_NE(q, nullptr);
  EXPECT_EQ(Describe(*q), "F8_E4M3 [2, 5]");
  const auto bytes = (*file)->Bytes(*q);
  ASSERT_TRUE(bytes.ok());
  ASSERT_EQ(bytes->size(), 10u);
  for (const std::byte byte : *bytes) EXPECT_EQ(byte, std::byte{5});
  EXPECT_EQ((*file)->Bytes(*(*file)->Find("empty"))->size(), 0u);
  EXPECT_EQ((*file)->Bytes(*(*file)->Find("scalar"))->size(), 4u);
  EXPECT_EQ(SafetensorsWriter::Create(path, {}).status().code(), absl::StatusCode::kAlreadyExists);
}

TEST(Safetensors, UnfinishedWriterLeavesNothing) {
  const std::string dir = File("unfinished_dir");
  std::filesystem::remove_all(dir);
  std::filesystem::create_directories(dir);
  {
    auto writer =
        SafetensorsWriter::Create(dir + "/x.safetensors", {{"a", TensorDType::kF32, {2}}});
    ASSERT_TRUE(writer.ok());
    EXPECT_EQ(writer->Finish().code(), absl::StatusCode::kFailedPrecondition);
  }
  EXPECT_TRUE(std::filesystem::is_empty(dir));
  EXPECT_FALSE(SafetensorsWriter::Create(
                   dir + "/x", {{"a", TensorDType::kF32, {}}, {"a", TensorDType::kF32, {}}})
                   .ok());
}

TEST(Safetensors, AcceptsWhatTheFormatAllows) {
  EXPECT_TRUE(OpenHeader("{}", 0).ok());
  EXPECT_TRUE(OpenHeader("{}      ", 0).ok());
  EXPECT_TRUE(OpenHeader(R"({"__metadata__":{"k":"v"}})", 0).ok());
  EXPECT_TRUE(OpenHeader(R"({"a":{"dtype":"F32","shape":[],"data_offsets":[0,4]}})", 4).ok());
  EXPECT_TRUE(OpenHeader(R"({"a":{"dtype":"F4","shape":[2],"data_offsets":[0,1]}})", 1).ok());
  // Zero-size tensors anywhere, data in another order than the names, header not padded.
  EXPECT_TRUE(OpenHeader(R"({"z":{"dtype":"U8","shape":[3],"data_offsets":[0,3]},)"
                         R"("a":{"dtype":"F32","shape":[1,0],"data_offsets":[3,3]},)"
                         R"("m":{"shape":[1],"dtype":"BF16","data_offsets":[3,5]}})",
                         5)
                  .ok());
}

TEST(Safetensors, RefusesBadLengthWords) {
  EXPECT_TRUE(absl::StrContains(Open("").message(), "length word"));
  EXPECT_FALSE(Open(std::string(7, '\0')).ok());
  EXPECT_FALSE(Open(std::string(8, '\0')).ok());
  EXPECT_TRUE(absl::StrContains(Open(std::string(8, '\xFF')).message(), "limit"));
  EXPECT_TRUE(
      absl::StrContains(Open(std::string("\x09\0\0\0\0\0\0\0{}", 10)).message(), "reaches beyond"));
}

TEST(Safetensors, EveryBrokenRuleIsNamed) {
  struct Case {
    std::string json;
    size_t data_bytes;
    const char* message;
  };
  const auto tensor = [](const std::string& fields) { return "{\"a\":{" + fields + "}}"; };
  const Case cases[] = {
      {" {}", 0, "begin with '{'"},
      {"[]", 0, "begin with '{'"},
      {"{}\n", 0, "something other than spaces"},
      {"{} x", 0, "something other than spaces"},
      {"{}{}", 0, "JSON"},
      {std::string("{\0}", 3), 0, "NUL"},
      {"{\"a\xFF\":1}", 0, "JSON"},
      {R"({"a":1})", 0, "not an object"},
      {R"({"":{"dtype":"U8","shape":[],"data_offsets":[0,1]}})", 1, "name of 0 bytes"},
      {R"({"__metadata__":[]})", 0, "__metadata__: is not an object"},
      {R"({"__metadata__":{"k":1}})", 0, "__metadata__.k"},
      {tensor(R"("dtype":"F32","shape":[1])"), 4, "data_offsets is missing"},
      {tensor(R"("dtype":"F32","data_offsets":[0,4])"), 4, "shape is missing"},
      {tensor(R"("shape":[1],"data_offsets":[0,4])"), 4, "dtype is missing"},
      {tensor(R"("dtype":"F32","shape":[1],"data_offsets":[0,4],"extra":1)"), 4,
       "unknown field \"extra\""},
      {tensor(R"("dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4])"), 4,
       "duplicate key \"dtype\""},
      {R"({"a":{"dtype":"U8","shape":[],"data_offsets":[0,1]},)"
       R"("a":{"dtype":"U8","shape":[],"data_offsets":[0,1]}})",
       1, "duplicate key \"a\""},
      {tensor(R"("dtype":"F31","shape":[1],"data_offsets":[0,4])"), 4, "dtype is F31"},
      {tensor(R"("dtype":7,"shape":[1],"data_offsets":[0,4])"), 4, "dtype is no string"},
      {tensor(R"("dtype":"F32","shape":[-1],"data_offsets":[0,4])"), 4, "shape holds"},
      {tensor(R"("dtype":"F32","shape":[1.0],"data_offsets":[0,4])"), 4, "shape holds"},
      {tensor(R"("dtype":"F32","shape":[1e0],"data_offsets":[0,4])"), 4, "shape holds"},
      {tensor(R"("dtype":"F32","shape":[18446744073709551616],"data_offsets":[0,4])"), 4,
       "shape holds"},
      {tensor(R"("dtype":"F32","shape":1,"data_offsets":[0,4])"), 4, "shape is not an array"},
      {tensor(R"("dtype":"F32","shape":[1,1,1,1,1,1,1,1,1],"data_offsets":[0,4])"), 4,
       "9 dimensions"},
      {tensor(R"("dtype":"F32","shape":[[1]],"data_offsets":[0,4])"), 4, "nested deeper"},
      {tensor(R"("dtype":"F32","shape":[1],"data_offsets":[0])"), 4, "data_offsets is not a pair"},
      {tensor(R"("dtype":"F32","shape":[1],"data_offsets":[0,4,4])"), 4,
       "data_offsets is not a pair"},
      {tensor(R"("dtype":"F32","shape":[1],"data_offsets":[-4,0])"), 4,
       "data_offsets is not a pair"},
      {tensor(R"("dtype":"F32","shape":[1],"data_offsets":[0,4.0])"), 4,
       "data_offsets is not a pair"},
      {tensor(R"("dtype":"F32","shape":[1],"data_offsets":[4,0])"), 4, "end before they begin"},
      {tensor(R"("dtype":"F32","shape":[2],"data_offsets":[0,4])"), 4, "span 4 bytes"},
      // 2^48 * 2^48 wraps to 0 in 64 bits.
      {tensor(R"("dtype":"U8","shape":[281474976710656,281474976710656],"data_offsets":[0,0])"), 0,
       "overflows"},
      {tensor(R"("dtype":"F4","shape":[3],"data_offsets":[0,1])"), 1, "whole bytes"},
      {tensor(
           R"("dtype":"U8","shape":[1],"data_offsets":[18446744073709551614,18446744073709551615])"),
       1, "overflow"},
      {tensor(R"("dtype":"U8","shape":[1],"data_offsets":[1,2])"), 2, "hole or overlap"},
      {R"({"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},)"
       R"("b":{"dtype":"U8","shape":[2],"data_offsets":[1,3]}})",
       3, "hole or overlap"},
      {R"({"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},)"
       R"("b":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}})",
       2, "hole or overlap"},
      {tensor(R"("dtype":"U8","shape":[1],"data_offsets":[0,1])"), 2, "its tensors end at"},
      {tensor(R"("dtype":"U8","shape":[2],"data_offsets":[0,2])"), 1, "its tensors end at"},
      {"{", 0, "something other than spaces"},
      {"", 0, "begin with '{'"},
  };
  for (const Case& c : cases) {
    const absl::Status status = OpenHeader(c.json, c.data_bytes);
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << c.json;
    EXPECT_TRUE(absl::StrContains(status.message(), c.message)) << c.json << " -> " << status;
    EXPECT_TRUE(absl::StrContains(status.message(), "raw.safetensors")) << status;
  }
}

TEST(Safetensors, RefusesAFileThatChangedItsSizeBeforeItWasMapped) {
  const std::string path = File("shrunk.safetensors");
  const std::string content =
      Container(R"({"a":{"dtype":"U8","shape":[100],"data_offsets":[0,100]}})", 100);
  std::ofstream(path, std::ios::binary | std::ios::trunc) << content;
  auto file = SafetensorsFile::Open(path);
  ASSERT_TRUE(file.ok());
  std::filesystem::resize_file(path, content.size() - 50);
  EXPECT_EQ((*file)->Bytes(*(*file)->Find("a")).status().code(), absl::StatusCode::kDataLoss);
  EXPECT_EQ(SafetensorsFile::Open(TestDir()).status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(SafetensorsFile::Open(File("nobody")).status().code(), absl::StatusCode::kNotFound);
}

}  // namespace
}  // namespace moebius::model
