#include "tests/model/test_dir.h"

#include <unistd.h>

#include <filesystem>

#include "absl/strings/str_cat.h"

namespace moebius::model {
namespace {

struct OwnDir {
  std::string path =
      absl::StrCat(std::filesystem::temp_directory_path().string(), "/moebius_test_", ::getpid());
  OwnDir() { std::filesystem::create_directories(path); }
  ~OwnDir() {
    std::error_code ignored;
    std::filesystem::remove_all(path, ignored);
  }
};

}  // namespace

const std::string& TestDir() {
  static const OwnDir dir;
  return dir.path;
}

}  // namespace moebius::model
