#pragma once

// Every operation of the Backend as a function of single rows, for the row rule: a RowOp computes a
// batch of rows named by number and hashes what each of them got.

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "kernels/backend.h"

namespace moebius::kernels::cpu {

// Row contents by number: g >= 0 is a fixed finite row, the others are poison.
inline constexpr int kNanRow = -1;
inline constexpr int kInfRow = -2;

struct RowOp {
  std::string name;
  int good_rows = 0;  // g in [0, good_rows)
  // One call of the operation for `rows`; the hash of each row's outputs.
  std::function<std::vector<uint64_t>(Backend& backend, const std::vector<int>& rows)> run;
};

std::vector<RowOp> AllRowOps();

// The row rule: whatever else is in a call of `op`, and wherever it stands, a row gets the bits it
// gets alone. `expected` are the hashes of each good row alone; every row index of every m in `ms`
// is tried with all other rows poisoned, and once with good neighbours. Empty if the rule holds,
// else descriptions of what differs.
std::vector<std::string> RowRuleViolations(const RowOp& op, Backend& backend,
                                           const std::vector<uint64_t>& expected,
                                           const std::vector<int64_t>& ms);

// Each good row alone, in one-row calls.
std::vector<uint64_t> SingleRowHashes(const RowOp& op, Backend& backend);

}  // namespace moebius::kernels::cpu
