// Goal: errors return early with their code and message; values come through by move.

#include "base/status_macros.h"

#include <memory>

#include "gtest/gtest.h"

namespace moebius {
namespace {

absl::StatusOr<std::unique_ptr<int>> Make(bool good) {
  if (!good) return absl::NotFoundError("no int");
  return std::make_unique<int>(5);
}

absl::StatusOr<int> Use(bool good) {
  ASSIGN_OR_RETURN(std::unique_ptr<int> value, Make(good));
  RETURN_IF_ERROR(absl::OkStatus());
  return *value;
}

TEST(StatusMacros, PassValuesAndErrorsThrough) {
  EXPECT_EQ(*Use(true), 5);
  EXPECT_EQ(Use(false).status(), absl::NotFoundError("no int"));
}

TEST(Annotate, KeepsTheCode) {
  EXPECT_EQ(Annotate(absl::DataLossError("bad scale"), "layer 7"),
            absl::DataLossError("layer 7: bad scale"));
}

}  // namespace
}  // namespace moebius
