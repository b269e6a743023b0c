#pragma once

// Structured-enough logging behind one door (spdlog is visible to log.cc only).
//
//   LOG_INFO(absl::StrCat("hosting ", n, " experts"));
//
// Lines go to stderr as "time level role message". Prompts, completions and token ids must never be
// logged. Any thread may log; a call formats and writes under a lock, so never log per token row.

#include <string>
#include <string_view>

namespace moebius::base {

enum class LogLevel { kDebug, kInfo, kWarning, kError, kOff };

// Sets the process's role name (shown in each line) and the lowest level that is written. Call once
// in main(), before threads start. Without it: role "moebius", level kInfo.
void InitLog(std::string_view role, LogLevel level);

void Log(LogLevel level, std::string_view message);

}  // namespace moebius::base

#define LOG_DEBUG(message) ::moebius::base::Log(::moebius::base::LogLevel::kDebug, (message))
#define LOG_INFO(message) ::moebius::base::Log(::moebius::base::LogLevel::kInfo, (message))
#define LOG_WARNING(message) ::moebius::base::Log(::moebius::base::LogLevel::kWarning, (message))
#define LOG_ERROR(message) ::moebius::base::Log(::moebius::base::LogLevel::kError, (message))
