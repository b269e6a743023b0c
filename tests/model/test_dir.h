#pragma once

// A folder of this process's own for test files, removed when the process ends: tests of several
// checkouts may run at once.

#include <string>

namespace moebius::model {

// "<temporary directory>/moebius_test_<pid>"; exists.
const std::string& TestDir();

}  // namespace moebius::model
