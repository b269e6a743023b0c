#pragma once

// CHECK: an invariant of our own that must hold, in release builds too. A failed CHECK is a bug in
// Moebius: it prints the condition and place to stderr and aborts. Never use it on outside input
// (files, requests, frames): that gets an absl::Status. May be used from any thread.
//
//   CHECK(ready);                 CHECK_EQ(rows, plan.rows);

namespace moebius::base {

// Prints "file:line: CHECK failed: condition" and aborts.
[[noreturn]] void CheckFailed(const char* file, int line, const char* condition);

}  // namespace moebius::base

#define CHECK(condition)                                            \
  do {                                                              \
    if (!(condition)) [[unlikely]] {                                \
      ::moebius::base::CheckFailed(__FILE__, __LINE__, #condition); \
    }                                                               \
  } while (false)

#define CHECK_EQ(a, b) CHECK((a) == (b))
#define CHECK_NE(a, b) CHECK((a) != (b))
#define CHECK_LT(a, b) CHECK((a) < (b))
#define CHECK_LE(a, b) CHECK((a) <= (b))
#define CHECK_GT(a, b) CHECK((a) > (b))
#define CHECK_GE(a, b) CHECK((a) >= (b))
